"""An engine as it is out there, with the model in it: Xinference with a tiny Z-Image of random weights, on the CPU.

`make engines` installs it, into an environment of its own. It asks for a key, as it does unless it is told not to.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from conftest import KEPT_VARIABLES, ROOT, Shell, cannot
from middlemen import free_port

XINFERENCE = ROOT / ".venv" / "xinference" / "bin"
ADMIN = {"username": "test", "password": "test-password"}
MODEL = "Z-Image-Turbo"  # by this name the engine knows with which pipeline, steps and guidance to draw
SECONDS_TO_START = 240  # 25 on two cores that do nothing else
FOX = ("--prompt", "a red fox in fresh snow", "--size", "640*512", "--print-response")


class Engine(NamedTuple):
    root: str
    key: str

    def ask(self, path: str, **fields: Any) -> dict[str, Any]:
        """What it answers to a POST of these fields, or to a GET where there are none."""
        content = json.dumps(fields).encode() if fields else None
        headers = {"Authorization": f"Bearer {self.key}", "Content-Type": "application/json"}
        request = urllib.request.Request(self.root + path, content, headers)
        with urllib.request.urlopen(request, timeout=SECONDS_TO_START) as answer:
            value: dict[str, Any] = json.load(answer)
        return value


@pytest.fixture
def xinference(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One that serves the model, and a key that may do nothing but draw and look at the list of models."""
    if sys.platform != "linux" or sys.version_info >= (3, 15):
        pytest.skip("what Xinference needs is not built for this system or this Python")
    if not (XINFERENCE / "xinference-local").exists():
        cannot("run Xinference: `make engines` installs it")
    folder = tmp_path_factory.mktemp("xinference")
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    env = kept | {"HOME": str(folder), "XINFERENCE_HOME": str(folder / "home"), "HF_HUB_OFFLINE": "1"}
    model = folder / "model"
    write_model = [str(XINFERENCE / "python"), str(ROOT / "tests" / "tiny_model.py"), str(model)]
    subprocess.run(write_model, env=env, capture_output=True, timeout=SECONDS_TO_START, check=True)
    port = free_port()
    command = [str(XINFERENCE / "xinference-local"), "--host", "127.0.0.1", "--port", str(port)]
    log = folder / "log"
    with (
        log.open("wb") as said,
        subprocess.Popen(command, env=env, stdout=said, stderr=said, start_new_session=True) as process,
    ):
        try:
            yield with_model(f"http://127.0.0.1:{port}", model, log, process)
        except AssertionError:
            print(log.read_text(encoding="utf-8", errors="replace"))
            raise
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            with contextlib.suppress(ProcessLookupError):  # it is several
                os.killpg(process.pid, signal.SIGKILL)


def with_model(root: str, model: Path, log: Path, process: subprocess.Popen[bytes]) -> Engine:
    """What its administrator does before anybody can draw: an account, the model, a key."""
    nobody = Engine(root, "")
    until = time.monotonic() + SECONDS_TO_START
    while not is_up(nobody):
        assert process.poll() is None and time.monotonic() < until, "it has not started"
        time.sleep(0.5)
    token = re.search(r"Setup token: (\S+)", log.read_text(encoding="utf-8"))
    assert token is not None
    nobody.ask("/v1/admin/setup", setup_token=token[1], **ADMIN)
    admin = Engine(root, nobody.ask("/token", **ADMIN)["access_token"])
    # Without an environment of its own for the model: this one has what it needs.
    admin.ask("/v1/models", model_name=MODEL, model_type="image", model_path=str(model), enable_virtual_env=False)
    return Engine(root, admin.ask("/v1/admin/keys", name="test")["key"])


def is_up(engine: Engine) -> bool:
    try:
        return bool(engine.ask("/v1/admin/setup/status")["needs_setup"])
    except OSError:
        return False


def test_xinference_draws_what_it_is_asked_for(xinference: Engine, shell: Shell) -> None:
    """Through both of its APIs: key, model, seed, steps and size hold, and both make the same picture of them."""
    numbers = {"seed": 7, "num_inference_steps": 9, "guidance_scale": 0.0}
    in_its_words: dict[str, dict[str, Any]] = {
        "openai": {"model": MODEL, "size": "640x512", "kwargs": json.dumps(numbers)},
        "sdapi": {"model": MODEL, "width": 640, "height": 512, "seed": 7, "steps": 9, "cfg_scale": 0.0},
    }
    pictures = set()
    for provider, words in in_its_words.items():
        service = ("--provider", provider, "--base-url", xinference.root)
        assert shell.run(*service, "--check").error["code"] == "key_rejected"
        shell.env[f"{provider.upper()}_API_KEY"] = xinference.key
        assert shell.run(*service, "--check").json["model_listed"] is True

        result = shell.run(*service, *FOX, "--seed", "7", "--output", f"{provider}.png", timeout=120)
        assert result.code == 0, result.stderr
        response = result.json
        assert (response["width"], response["height"], response["seed"]) == (640, 512, 7)
        assert "warnings" not in response
        pictures.add(Path(response["image_path"]).read_bytes())
        evidence = json.loads(Path(response["evidence_path"]).read_text(encoding="utf-8"))
        assert evidence["payload"].items() >= words.items()
        assert (evidence["status"], evidence["billable"]) == ("saved", False)
        assert evidence["image"]["source_format"] == "JPEG"

        held = shell.run(*service, "--check", "--deep", timeout=240).json["held"]
        assert (held["size"], held["seed"], held["steps"]) == (True, True, True)
        wrong = shell.run(*service, *FOX, "--model", "another", timeout=120).error
        assert (wrong["exit_code"], wrong["http_status"]) == (2, 404)
        assert MODEL in wrong["hint"]
    (picture,) = pictures
    assert picture.startswith(b"\x89PNG")
