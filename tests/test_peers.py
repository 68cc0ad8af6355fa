"""The mock service as other people's programs see it, unchanged: the official command line, the openai client for Node,
LiteLLM as a library and as a proxy. That for Python is in test_mock_protocols.py.

`make clients` installs what is not Python's, and LiteLLM into an environment of its own.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import KEPT_VARIABLES, ROOT, TEST_KEY, Shell, cannot
from mock_server import MockServer

CLIENTS, LITELLM = ROOT / ".venv" / "clients", ROOT / ".venv" / "litellm" / "bin"
PROMPT = "a red fox in fresh snow"


@pytest.fixture(scope="session")
def peers() -> None:
    """The programs that `make clients` installs."""
    if not (LITELLM / "litellm").exists() or not (CLIENTS / "node_modules" / "openai").is_dir():
        cannot("run LiteLLM and the openai client for Node: `make clients` installs them")
    if not shutil.which("node"):
        cannot("run node")


def environment(home: Path, **more: str) -> dict[str, str]:
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    return kept | {"HOME": str(home), "LITELLM_LOCAL_MODEL_COST_MAP": "True", "NO_COLOR": "1"} | more


def run(command: list[str], folder: Path, env: dict[str, str], timeout: float = 120) -> str:
    done = subprocess.run(
        command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout.decode() + done.stderr.decode()
    return done.stdout.decode()


@pytest.mark.parametrize("options", [[], ["--size", "1024*1024", "--n", "1", "--max-images", "1"]])
def test_the_official_command_line(peers: None, mock: MockServer, tmp_path: Path, options: list[str]) -> None:
    env = environment(tmp_path, DASHSCOPE_API_KEY=mock.api_key, DASHSCOPE_HTTP_BASE_URL=mock.base_url)
    program = Path(sys.executable).with_name("dashscope")
    wanted = ["image-generation", "create", "--model", "z-image-turbo", "--text", PROMPT, *options]
    answer = run([str(program), *wanted], tmp_path, env)
    said, _ = json.JSONDecoder().raw_decode(answer)
    (item, text) = said["choices"][0]["message"]["content"]
    with urllib.request.urlopen(item["image"], timeout=10) as picture:
        assert picture.read(4) == b"\x89PNG"
    assert text == {"text": PROMPT}
    assert mock.stats()["billed"] == 1


NODE = """
import OpenAI from "openai";
const client = new OpenAI({ baseURL: process.env.BASE, apiKey: process.env.KEY, maxRetries: 0 });
const wanted = { prompt: process.env.PROMPT, size: "1024x1024", n: 1, response_format: "b64_json" };
const made = await client.images.generate({ ...wanted, seed: 7, num_inference_steps: 9, guidance_scale: 0 });
const models = await client.models.list();
let refused = null;
try { await client.images.generate({ ...wanted, n: 99 }); } catch (error) { refused = [error.status, error.code]; }
console.log(JSON.stringify({ picture: made.data[0].b64_json, models: models.data.map((m) => m.id), refused }));
"""


def test_the_openai_client_for_node(peers: None, mock: MockServer, tmp_path: Path) -> None:
    env = environment(tmp_path, BASE=mock.openai_url, KEY=mock.api_key, PROMPT=PROMPT)
    said = json.loads(run(["node", "--input-type=module", "-e", NODE], CLIENTS, env))
    assert base64.b64decode(said["picture"]).startswith(b"\x89PNG")
    assert said["models"] == ["Tongyi-MAI/Z-Image-Turbo"]
    assert said["refused"] == [400, "invalid_value"]


LIBRARY = """
import json, os, litellm
made = litellm.image_generation(
    model="openai/z-image-turbo", prompt=os.environ["PROMPT"], size="1024x1024", n=1,
    extra_body={"seed": 7, "num_inference_steps": 9}, api_base=os.environ["BASE"], api_key=os.environ["KEY"],
)
print(json.dumps({"picture": made.data[0].b64_json}))
"""


def test_litellm_as_a_library(peers: None, mock: MockServer, tmp_path: Path) -> None:
    env = environment(tmp_path, BASE=mock.openai_url, KEY=mock.api_key, PROMPT=PROMPT)
    answer = run([str(LITELLM / "python"), "-c", LIBRARY], tmp_path, env, timeout=300)
    assert base64.b64decode(json.loads(answer.splitlines()[-1])["picture"]).startswith(b"\x89PNG")


@contextlib.contextmanager
def litellm_proxy(mock: MockServer, folder: Path) -> Iterator[str]:
    """A LiteLLM proxy in front of the mock; its root."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    backend = {"model": "openai/z-image-turbo", "api_base": mock.openai_url, "api_key": mock.api_key}
    served = {"model_list": [{"model_name": "z-image-turbo", "litellm_params": backend}]}
    config = folder / "proxy.yaml"
    config.write_text(json.dumps(served), encoding="utf-8")  # which is YAML
    env = environment(folder, LITELLM_MASTER_KEY=TEST_KEY)
    env["PATH"] = f"{LITELLM}{os.pathsep}{env['PATH']}"
    command = [str(LITELLM / "litellm"), "--config", str(config), "--host", "127.0.0.1", "--port", str(port)]
    with open(folder / "proxy.log", "wb") as log, subprocess.Popen(command, env=env, stdout=log, stderr=log) as proxy:
        try:
            root = f"http://127.0.0.1:{port}"
            until = time.monotonic() + 240
            while not is_alive(f"{root}/health/liveliness"):
                assert proxy.poll() is None and time.monotonic() < until, (folder / "proxy.log").read_text()
                time.sleep(0.5)
            yield root
        finally:
            proxy.terminate()


def is_alive(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=2) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False


def test_our_command_through_a_litellm_proxy(peers: None, shell: Shell, mock: MockServer, tmp_path: Path) -> None:
    """It knows the proxy by its health, names the model that it lists, and tells what it cannot know."""
    with litellm_proxy(mock, tmp_path) as root:
        shell.env |= {"OPENAI_BASE_URL": f"{root}/v1", "OPENAI_API_KEY": TEST_KEY}
        arguments = ("--provider", "openai", "--prompt", PROMPT, "--output", "fox.png", "--print-response")
        response: dict[str, Any] = shell.run(*arguments, timeout=120).json
    assert Path(response["image_path"]).read_bytes().startswith(b"\x89PNG")
    assert "estimated_cost" not in response
    assert "LiteLLM" in response["warnings"][0]
    evidence = shell.evidence()
    assert evidence["payload"]["model"] == "z-image-turbo"
    assert evidence["billable"]
    assert mock.stats()["billed"] == 1
