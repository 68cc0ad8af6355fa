"""What the openai provider sends is what the official client sends for the same picture, to the byte of each field."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from conftest import TEST_KEY, Shell
from fault_server import FaultServer, Received, json_answer, png

PATH = "/v1/images/generations"
PROMPT = '一只"狐狸" in snow, 100%'
# Headers that say who asks and how the connection is used, not what is asked for.
OF_THE_CLIENT = ("user-agent", "accept-encoding", "connection", "host", "content-length", "idempotency-key")


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.play(PATH, json_answer({"created": 1, "data": [{"b64_json": base64.b64encode(png(512, 512)).decode()}]}))
        yield server


def asked(request: Received) -> dict[str, Any]:
    """All of a request that says what is wanted."""
    headers = {name.lower(): value for name, value in request.headers}
    kept = {n: v for n, v in headers.items() if n not in OF_THE_CLIENT and not n.startswith("x-stainless")}
    return {"method": request.method, "target": request.target, "headers": kept, "body": json.loads(request.body)}


@pytest.mark.smoke
@pytest.mark.parametrize("key", [TEST_KEY, None])
def test_our_request_is_the_official_clients(shell: Shell, server: FaultServer, key: str | None) -> None:
    shell.env["OPENAI_BASE_URL"] = f"{server.root}/v1"
    if key:
        shell.env["OPENAI_API_KEY"] = key
    arguments = ("--provider", "openai", "--prompt", PROMPT, "--size", "512x512", "--seed", "7", "--print-response")
    response = shell.run(*arguments).json
    assert "image_url" not in response
    with openai.OpenAI(base_url=f"{server.root}/v1", api_key=key or "none", max_retries=0) as client:
        client.images.generate(
            prompt=PROMPT,
            size="512x512",
            n=1,
            response_format="b64_json",
            extra_body={"seed": 7, "num_inference_steps": 8, "guidance_scale": 0.0},
        )
    ours, theirs = (asked(request) for request in server.posts)
    if not key:  # the official client cannot go without one
        assert "authorization" not in ours["headers"]
        del theirs["headers"]["authorization"]
    assert ours == theirs


def test_the_options_of_the_provider_change_these_fields_only(shell: Shell, server: FaultServer) -> None:
    shell.env["OPENAI_BASE_URL"] = f"{server.root}/v1"
    arguments = ("--provider", "openai", "--prompt", "a fox", "--seed", "7")
    assert shell.run(*arguments).code == 0
    options = ("--steps", "9", "--guidance", "1.5", "--model", "Z-Image", "--image-format", "png")
    assert shell.run(*arguments, *options).code == 0
    plain, changed = (asked(request)["body"] for request in server.posts)
    assert changed == plain | {
        "num_inference_steps": 9,
        "guidance_scale": 1.5,
        "model": "Z-Image",
        "output_format": "png",
    }
