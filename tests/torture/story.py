"""One cell played: the command meets its break, then what its advice says is done without any; and all is judged."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import hashlib
import io
import json
import os
import shlex
import signal
import ssl
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import trustme
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from closed import assert_closed
from conftest import GENERATE, Result, Shell, warm_process
from leaks import forms
from mock_server import MockServer
from torture.cells import Cell, Certificate, Way
from torture.proxy import Proxy
from torture.report import BROKEN
from zimage.contract import EXIT_SIGNAL
from zimage.errors import KINDS
from zimage.formats import png_text
from zimage_mock import rules
from zimage_mock.drawing import Picture, draw_file

KEY = "tk-7f3e9a1c5b2d8064/+"  # nothing that is masked by its looks; two signs of it change when they are quoted
PROMPT = "a fox in the snow"
SEED = 7
LONG_AGO = dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)
LATE_S = 2.0  # after the time-out, or after a signal


@functools.cache
def authority() -> trustme.CA:
    return trustme.CA()


@functools.cache
def server_context(certificate: Certificate) -> ssl.SSLContext | None:
    """A TLS server's side with a certificate for loopback."""
    if not certificate:
        return None
    names = ("somewhere.example",) if certificate == "foreign" else ("127.0.0.1", "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    last = LONG_AGO if certificate == "expired" else None
    authority().issue_cert(*names, not_after=last).configure_cert(context)
    return context


ROOTS = {
    "DASHSCOPE": "/api/v1",
    "ZIMAGETURBO": "/api",
    "MODELSCOPE": "/modelscope/v1",
    "OPENAI": "/v1",
    "SDAPI": "/sdapi/v1",
    "COMFYUI": "/comfyui",
}
FORMS = forms(KEY) | {KEY.replace("/", "\\/").encode()}


def drawn(way: Way, prompt: str = PROMPT) -> bytes:
    """What the mock draws for a way's request."""
    side, kind = (1024, "jpeg") if way.provider == "zimageturbo" else (512, "png")
    return draw_file(Picture(prompt, SEED, side, side, kind))


def is_drawn(way: Way, content: bytes, prompt: str = PROMPT) -> bool:
    """Whether a file is what the mock has drawn, byte for byte; one way writes its settings into it."""
    made = drawn(way, prompt)
    if way.provider == "sdapi":
        chunks = PngInfo()
        chunks.add_text("parameters", png_text(content, "parameters"))
        file = io.BytesIO()
        with Image.open(io.BytesIO(made)) as image:
            image.save(file, "png", pnginfo=chunks, compress_level=1)
        made = file.getvalue()
    return content == made


def mock_for(way: Way) -> MockServer:
    return MockServer(rpm=0, api_key=KEY, faults=way.faults)


def environment(proxy: Proxy, home: Path) -> dict[str, str]:
    """All services through the proxy, whose certificate is believed."""
    authority().cert_pem.write_to_path(str(home / "ca.pem"))
    env = {"REQUESTS_CA_BUNDLE": str(home / "ca.pem")}
    for name, root in ROOTS.items():
        env |= {f"{name}_{'TOKEN' if name == 'COMFYUI' else 'API_KEY'}": KEY, f"{name}_BASE_URL": proxy.root + root}
    return env


@dataclass
class Story:
    """What is done of a cell in an empty folder, and what is wrong with it."""

    cell: Cell
    shell: Shell
    broken: list[tuple[str, str]] = field(default_factory=list)
    said: list[bytes] = field(default_factory=list)
    paid: int = 0
    knowable: bool = False  # what was paid for had reached the client
    saved: bool = False
    commands: int = 0
    pid: int = 0
    script: ClassVar[Path] = GENERATE

    def __str__(self) -> str:
        return str(self.cell)

    def note(self, holds: object, name: str, what: object) -> None:
        assert name in BROKEN
        if not holds:
            self.broken.append((name, str(what)))

    def play(self) -> None:
        cell = self.cell
        with (
            patch.object(rules, "random_seed", lambda: SEED),
            mock_for(cell.way) as mock,
            Proxy(mock, cell.fault, server_context(cell.tls), self.strike, cell.way.questions) as proxy,
        ):
            self.shell.env |= environment(proxy, self.shell.home)
            self.first(mock, proxy)
            proxy.heal()
            self.then(mock, proxy)
            may_ask = self.cell.way.asks_for_key and self.cell.fault.place == "flip-body"  # there is no such file: 401
            self.note("download" not in proxy.keys_seen or may_ask, "leak", "the key went with a download")
        self.search_for_keys()

    def strike(self) -> None:
        """The position is reached."""
        if self.cell.signum:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, self.cell.signum)

    # The command that meets the break ---------------------------------------------------------------------------------

    @property
    def output(self) -> Path:
        return self.shell.folder / f"out.{self.cell.way.suffix}"

    def first(self, mock: MockServer, proxy: Proxy) -> None:
        cell = self.cell
        way = ("--provider", cell.way.provider, *cell.way.settings, "--prompt", PROMPT, *cell.way.options)
        way += ("--output", self.output.name)
        began = time.monotonic()
        result = self.run(*way, "--timeout", f"{cell.timeout:g}", "--print-response")
        ended = time.monotonic()
        self.note(proxy.reached.is_set() or cell.tls in ("foreign", "expired"), "missed", "the break was not met")
        due = proxy.reached_at if cell.signum else began + cell.timeout
        self.note(ended <= due + LATE_S, "hang", f"ended {ended - due:.1f} s after its moment")
        self.note(result.code == cell.exit_code, "exit_code", (result.code, cell.exit_code, result.stdout))
        self.paid = mock.stats()["billed"]
        # What lies unread in a socket when its process is killed has not arrived.
        self.knowable = proxy.arrived and not (self.cell.signum == signal.SIGKILL and self.cell.fault.stage == "paid")
        self.knowable = self.knowable or (cell.way.lost == "found" and self.paid > 0)
        self.judge(result)

    def run(self, *arguments: str) -> Result:
        argv = [str(self.script), *arguments]
        env = self.shell.environment()
        code, out, err = warm_process().run(argv, self.shell.folder, env, b"", 90, self.begun)
        self.said += [out, err]
        self.commands += 1
        return Result(code, out.decode("utf-8"), err.decode("utf-8"))

    def begun(self, pid: int) -> None:
        self.pid = pid

    def evidence(self) -> dict[str, Any]:
        """The newest."""
        paths = sorted(self.shell.evidence_files(), key=os.path.getmtime)
        evidence: dict[str, Any] = json.loads(paths[-1].read_text(encoding="utf-8")) if paths else {"status": "none"}
        if paths:
            assert_closed("evidence", evidence)
        return evidence

    def judge(self, result: Result) -> None:
        """What holds at the end of every command, whatever it met."""
        self.note("Traceback" not in result.stderr, "traceback", result.stderr)
        evidence = self.evidence()
        status = evidence["status"]
        self.note(self.paid <= 1 or self.cell.way.lost == "again", "paid_twice", self.paid)
        unbilled, billed = ("none", "failed"), ("generated", "saved")
        self.note(status not in unbilled or self.paid == 0, "untrue", f"{status}, and {self.paid} billed")
        self.note(status not in billed or self.paid, "untrue", f"{status}, and {self.paid} billed")
        self.judge_picture(evidence)
        if result.code < 0:
            return
        if result.code == 0:
            self.note(status == "saved", "untrue", f"exit 0, and {status}")
            return
        try:
            error = result.error
            assert_closed("error", error)
        except (AssertionError, ValueError) as problem:
            self.note(False, "advice", problem)
            return
        kind = KINDS[error["code"]]
        ends = (kind.exit_code,) if error["code"] != "interrupted" else (EXIT_SIGNAL + 2, EXIT_SIGNAL + 15)
        self.note(result.code in ends, "exit_code", error)
        told = error["billed"]
        self.note(told == "unknown" or (told == "yes") == bool(self.paid), "untrue", f"{error}, {self.paid} billed")

    def judge_picture(self, evidence: dict[str, Any]) -> None:
        """An image is there only whole, and is what was drawn; nothing else is there."""
        status, output = evidence["status"], self.output
        if output.exists():
            content = output.read_bytes()
            self.note(is_drawn(self.cell.way, content), "image", "it is not what the service drew")
            if status == "saved":
                known = evidence["image"]["sha256"]
                self.note(hashlib.sha256(content).hexdigest() == known, "untrue", "the evidence has another hash")
        else:
            self.note(status != "saved", "untrue", "saved, and no file")

    # What its advice says ---------------------------------------------------------------------------------------------

    def then(self, mock: MockServer, proxy: Proxy) -> None:
        """Without faults: the picture comes wherever it can, nothing is paid again, and nothing else is left over."""
        paths = self.shell.evidence_files()
        if paths and not (self.evidence()["status"] == "saved" and not self.cell.signum):
            result = self.go_on(mock, *self.way_back(paths[0]))
            spoilt = self.cell.fault.place == "flip-body" and self.cell.fault.stage == "paid"
            self.note(result.code == 0 or not self.knowable or spoilt, "lost", (result.stdout, result.stderr))
            self.note(result.code in (0, 2, 7) or spoilt, "exit_code", result.stdout)
            if self.cell.way.lost != "unknown" and result.code == 7:  # which costs only time
                result = self.go_on(mock, "--replay", str(paths[0]), "--output", self.output.name, "--print-response")
                self.note(result.code == 0, "lost", (result.stdout, result.stderr))
                paths = self.shell.evidence_files()
        self.saved = self.output.exists() and self.evidence()["status"] == "saved"
        self.note(self.saved or not self.knowable, "lost", self.evidence())
        kept = {path.name for path in self.shell.folder.rglob("*") if path.is_file()}
        known = {self.output.name, ".gitignore", *(path.name for path in paths)}
        known |= {path.with_suffix(".picture").name for path in paths if not self.saved}
        self.note(kept <= known, "files", kept - known)

    def go_on(self, mock: MockServer, *arguments: str) -> Result:
        result = self.run(*arguments)
        self.paid = mock.stats()["billed"]
        self.judge(result)
        return result

    def way_back(self, evidence: Path) -> list[str]:
        """The command that the first one named; else what a reader of the evidence types."""
        with_advice = [json.loads(out)["error"] for out in self.said[:1] if out.startswith(b'{"error"')]
        for error in with_advice:
            if command := error.get("next_command"):
                words = shlex.split(command)
                self.note(words[1] == str(GENERATE), "advice", command)
                return words[2:]
        return ["--recover", str(evidence), "--print-response"]

    def search_for_keys(self) -> None:
        """The key is in no stream and no file."""
        places = {"a stream": b"\0".join(self.said)}
        for path in self.shell.folder.rglob("*"):
            if path.is_file():
                places[path.name] = path.name.encode() + b"\0" + path.read_bytes()
        for name, content in places.items():
            self.note(not any(form in content for form in FORMS), "leak", name)

    def record(self) -> dict[str, Any]:
        """The cell in numbers."""
        counts = Counter(name for name, _ in self.broken)
        facts = {
            "cell": str(self),
            "commands": self.commands,
            "paid": self.paid,
            "saved": self.saved,
            "killed": bool(self.cell.signum),
        }
        return facts | {"told_unknown": self.paid > 0 and not self.saved, **counts}
