"""A place to run a command in, many times: this process, an empty folder, a clock and a network of its own.

    with Place() as place:
        done = place.run("generate_image.py", "--prompt", "a fox", "--output", "fox.png", service=Service([answer]))
        done.code, done.out, done.err, done.service.paid

What a command must never do is stopped as it is tried, and told: writing outside the place, reaching the network,
starting a process. Waiting costs no time.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import io
import json
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any
from unittest.mock import patch

from hypothesis import event

from closed import assert_answer_closed
from conftest import SCRIPTS, own_state
from fuzz.promises import EXITS, assert_error, assert_keyless, assert_one_line
from fuzz.services import Service
from provider_cases import KEYS
from zimage import download, transport
from zimage.contract import MIB
from zimage.waiting import Stop

WRITES = {
    "os.rename",
    "os.remove",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.utime",
}
NEVER = {
    "socket.connect",
    "socket.getaddrinfo",
    "subprocess.Popen",
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
}
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


class _Guard:
    """Refuses, while it has a folder, what a command must never do. An audit hook, so there is one for ever."""

    def __init__(self) -> None:
        self.folder: str | None = None
        self.tried: list[str] = []
        sys.addaudithook(self._hear)

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.folder is None:
            return
        if event in NEVER:
            self._refuse(event, repr(arguments)[:200])
        if event == "open" and isinstance(arguments[0], (str, bytes)) and int(arguments[2] or 0) & WRITING:
            self._check(event, arguments[0])
        elif event in WRITES:
            for path in arguments[: 2 if event in ("os.rename", "os.link", "os.symlink") else 1]:
                if isinstance(path, (str, bytes)) and not (event == "os.symlink" and path == arguments[0]):
                    self._check(event, path)

    def _check(self, event: str, path: str | bytes) -> None:
        name = os.fsdecode(path)
        real = os.path.realpath(os.path.dirname(os.path.abspath(name)))
        inside = real == self.folder or real.startswith(f"{self.folder}{os.sep}")
        if not inside and "__pycache__" not in name and name != os.devnull:
            self._refuse(event, name)

    def _refuse(self, event: str, what: str) -> None:
        self.tried.append(f"{event} {what}")
        raise PermissionError(13, "refused by the test", what)


@functools.cache
def guard() -> _Guard:
    return _Guard()


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str
    service: Service
    refused: list[str]
    seconds: float  # of processor time

    @property
    def error(self) -> dict[str, Any] | None:
        """The error on stdout, where there is one."""
        try:
            answer = json.loads(self.out)
        except ValueError:
            return None
        error = answer.get("error") if isinstance(answer, dict) else None
        assert error is None or isinstance(error, dict)
        return error


def in_memory() -> str | None:
    """A folder of the machine's memory, where it has one with room: the disk is half of the time of a command."""
    memory = "/dev/shm"
    has_room = os.path.isdir(memory) and shutil.disk_usage(memory).free > 64 * MIB
    return memory if has_room and os.access(memory, os.W_OK) else None


class Place:
    """A folder with a project and a home in it. `clear` makes it anew."""

    def __init__(self) -> None:
        self.folder = Path(os.path.realpath(tempfile.mkdtemp(prefix="zimage-fuzz-", dir=in_memory())))
        self.project, self.home = self.folder / "deep" / "project", self.folder / "home"
        self.env: dict[str, str] = {}
        self.clear()

    def __enter__(self) -> Place:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        shutil.rmtree(self.folder)

    def clear(self) -> None:
        for entry in self.folder.iterdir():
            shutil.rmtree(entry)
        self.project.mkdir(parents=True)
        self.home.mkdir()
        self.env = {"HOME": str(self.home), "PATH": os.environ.get("PATH", "")} | KEYS
        self.env["OPENAI_BASE_URL"] = "http://127.0.0.1:8000/v1"

    def run(self, script: str, *arguments: str, stdin: bytes = b"", service: Service | None = None) -> Done:
        """Run a command to its end, and hold it to what every command promises."""
        service = service or Service()
        module = importlib.import_module(script.removesuffix(".py"))
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        began = time.process_time()
        own = self._as_its_own(service, [str(SCRIPTS / script), *arguments], stdin)
        with own as refused, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = module.main(Stop()) if script == "fill_template.py" else module.main()
        told, said = (stream.buffer.getvalue().decode("utf-8") for stream in (out, err))
        done = Done(code, told, said, service, refused, time.process_time() - began)
        assert_promises(done)
        event(f"exit {code}")  # for --hypothesis-show-statistics
        return done

    @contextlib.contextmanager
    def _as_its_own(self, service: Service, argv: list[str], stdin: bytes) -> Iterator[list[str]]:
        """What a process has of its own, and what the test stands in for."""
        slept = 0.0
        now = time.monotonic

        def sleep(seconds: float) -> None:
            nonlocal slept
            slept += seconds

        with contextlib.ExitStack() as stack:
            given = stack.enter_context(tempfile.TemporaryFile("w+", encoding="utf-8"))
            given.buffer.write(stdin)
            given.seek(0)
            stack.enter_context(patch.object(time, "sleep", sleep))
            stack.enter_context(patch.object(time, "monotonic", lambda: now() + slept))
            stack.enter_context(patch.object(random, "uniform", lambda low, high: high))
            stack.enter_context(patch.object(os, "fsync", lambda descriptor: None))
            for module in (transport, download):
                stack.enter_context(patch.object(module, "exchange", service.exchange))
            stack.enter_context(own_state(self.project, self.env))
            sys.argv, sys.stdin = argv, given
            guard().tried, guard().folder = [], str(self.folder)
            try:
                yield guard().tried
            finally:
                guard().folder = None

    def files(self) -> dict[str, bytes]:
        """Every file of the place, and what is in it."""
        return {
            str(path.relative_to(self.folder)): path.read_bytes()
            for path in self.folder.rglob("*")
            if path.is_file() and not path.is_symlink()
        }


def assert_promises(done: Done) -> None:
    """What every command promises, however it was called."""
    assert done.code in EXITS, done
    assert not done.refused, done.refused
    assert "Traceback" not in done.err and "internal_error" not in done.err, done.err
    for line in done.err.split("\n"):
        assert_one_line(line)
        if not line.startswith("next_command: "):  # which repeats what was given
            assert_keyless(line)
    if done.code:
        lines = done.err.rstrip("\n").split("\n")
        assert sum(line.startswith("error: ") for line in lines) == 1, done.err
        assert lines[-1].startswith("next: ") and sum(line.startswith("next: ") for line in lines) == 1, done.err
        assert lines[-1] != "next: "
        if done.out:
            assert done.error is not None
            assert_error(done.error)
            assert done.error["exit_code"] == done.code
    elif done.out.startswith("{") and done.out.count("\n") > 1:
        answer = json.loads(done.out)
        if "$schema" not in answer:
            assert_answer_closed(answer)
