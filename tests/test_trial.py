"""`--check --deep`: a few small pictures say which of seed, steps and size a server honours."""

from __future__ import annotations

import base64
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import Shell
from fault_server import Answer, FaultServer, Received, drawn, html, json_answer
from mock_server import MockServer
from provider_cases import OPENAI, SDAPI

Draw = Callable[[dict[str, Any]], tuple[object, ...]]  # what a picture is drawn from
rng = random.Random(5)


def picture(wanted: tuple[object, ...], size: tuple[int, int], shade: int = 0) -> bytes:
    value = random.Random(repr(wanted)).randrange(2**24) & 0xFEFEFE
    return drawn("PNG", *size, f"#{value | shade:06x}")


def server_of(draw: Draw, size: tuple[int, int] | None = None, *, noisy: bool = False) -> Callable[[Received], Answer]:
    """A server with OpenAI's API that draws from what `draw` takes of a request, at a size of its own where given."""
    calls = iter(range(99))

    def answer(request: Received) -> Answer:
        body = json.loads(request.body)
        asked = tuple(map(int, body["size"].split("x")))
        shade = 0x010101 * (next(calls) % 2) if noisy else 0
        content = picture(draw(body), size or (asked[0], asked[1]), shade)
        return json_answer({"created": 1, "data": [{"b64_json": base64.b64encode(content).decode()}]})

    return answer


def honest(body: dict[str, Any]) -> tuple[object, ...]:
    return body.get("seed"), body.get("num_inference_steps")


@pytest.fixture
def server(shell: Shell) -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.play(OPENAI.free_path, json_answer(OPENAI.listed()))
        server.play(SDAPI.free_path, json_answer(SDAPI.listed()))
        shell.env |= {"OPENAI_BASE_URL": server.root, "SDAPI_BASE_URL": server.root}
        yield server


KINDS: dict[str, tuple[Callable[[Received], Answer], tuple[bool | None, ...], int]] = {
    # what the server does; seed, steps, size, the same twice; pictures
    "honest": (server_of(honest), (True, True, True, True), 4),
    "one seed for all": (server_of(lambda body: (42, body["num_inference_steps"])), (False, True, True, True), 4),
    "a seed of its own each time": (server_of(lambda body: (rng.random(),)), (False, None, True, False), 2),
    "steps of its own": (server_of(lambda body: (body["seed"],)), (True, False, True, True), 4),
    "size of its own": (server_of(honest, (512, 512)), (True, True, False, True), 4),
    "nearly the same each time": (server_of(honest, noisy=True), (True, None, True, True), 3),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", KINDS)
def test_what_a_server_does_is_seen_in_its_pictures(shell: Shell, server: FaultServer, name: str) -> None:
    behaviour, (seed, steps, size, same), count = KINDS[name]
    server.play(OPENAI.paid_path, behaviour)
    result = shell.call("--check", "--deep", "--provider", "openai")
    assert result.code == 0, result.stdout
    held = result.json["held"]
    assert (held["seed"], held["steps"], held["size"], held["same_request_same_picture"]) == (seed, steps, size, same)
    assert (held["pictures"], len(server.posts), held["estimated_cost"]) == (count, count, 0)
    assert all(Path(path).exists() for path in held["image_paths"]) and len(held["image_paths"]) == count
    assert result.json["ok"] and result.json["model_listed"]


@pytest.mark.parametrize(
    ("told", "seed", "steps"), [({}, True, True), ({"seed": 5}, False, True), ({"steps": 20}, True, False)]
)
def test_what_the_answers_tell_needs_no_third_picture(
    shell: Shell, server: FaultServer, told: dict[str, Any], seed: bool, steps: bool
) -> None:
    def answer(request: Received) -> Answer:
        asked = json.loads(request.body)
        info = {name: asked[name] for name in ("seed", "steps", "cfg_scale")} | told
        image = base64.b64encode(drawn("PNG", asked["width"], asked["height"])).decode()
        return json_answer({"images": [image], "info": json.dumps(info)})

    server.play(SDAPI.paid_path, answer)
    held = shell.call("--check", "--deep", "--provider", "sdapi").json["held"]
    assert (held["seed"], held["steps"], held["size"], held["pictures"]) == (seed, steps, True, 2)


def test_nothing_is_drawn_that_costs_before_the_user_has_agreed(shell: Shell, server: FaultServer) -> None:
    server.play(OPENAI.paid_path, server_of(honest))
    result = shell.call("--check", "--deep", "--provider", "openai", "--price", "0.01")
    error = result.json["error"]
    assert (result.code, error["code"], result.json["ok"], server.posts) == (2, "usage", False, [])
    assert "2 to 4 pictures, each at US$0.01" in error["message"] and "--accept-cost" in error["hint"]
    agreed = shell.call("--check", "--deep", "--accept-cost", "--provider", "openai", "--price", "0.01")
    assert (agreed.code, agreed.json["held"]["estimated_cost"]) == (0, 0.04)


def test_litellm_on_this_machine_may_cost_too(shell: Shell, server: FaultServer) -> None:
    server.play(OPENAI.free_path, json_answer(OPENAI.listed(), headers=(("x-litellm-version", "1.110"),)))
    error = shell.call("--check", "--deep", "--provider", "openai").json["error"]
    assert "a price that is not known" in error["message"] and not server.posts


def test_what_fails_on_the_way_is_told_with_what_is_known(shell: Shell, server: FaultServer) -> None:
    server.play(OPENAI.paid_path, server_of(honest), html(404))
    result = shell.call("--check", "--deep", "--provider", "openai")
    assert (result.code, result.json["ok"], result.json["error"]["code"]) == (2, False, "not_found")
    assert (result.json["held"]["pictures"], result.json["held"]["size"]) == (1, True)


def test_a_service_without_seed_and_steps_shows_what_it_has(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    result = shell.call("--check", "--deep", "--accept-cost", "--provider", "zimageturbo")
    held = result.json["held"]
    assert (result.code, held["seed"], held["steps"], held["pictures"]) == (0, None, None, 2)
    assert held["estimated_cost"] == 0.04


@pytest.mark.parametrize(
    "arguments", [("--prompt", "x", "--deep"), ("--check", "--accept-cost"), ("--prompt", "x", "--accept-cost")]
)
def test_the_options_go_with_a_check_only(shell: Shell, arguments: tuple[str, ...]) -> None:
    result = shell.call(*arguments)
    assert result.code == 2 and "goes with" in result.stderr
