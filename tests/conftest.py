"""What all tests share: the script run as its users run it, in an empty folder with an empty home.

A test gets `shell`, a `Shell` whose working folder, home and environment hold nothing of this machine, and
`mock`, the mock service in this process. `shell.use(mock)` gives the script the mock's address and key.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn
from unittest.mock import patch

import pytest

ROOT = Path(__file__).resolve().parent.parent
SKILL = ROOT / "skills" / "ai" / "image" / "alicloud-ai-image-zimage-turbo"
SCRIPTS = SKILL / "scripts"
GENERATE = SCRIPTS / "generate_image.py"
MOCK = SCRIPTS / "mock_server.py"
TEST_KEY = "sk-test-0123456789abcdef"
KEPT_VARIABLES = ("PATH", "SYSTEMROOT", "TEMP", "TMP", "LD_LIBRARY_PATH")
# What `make check-all` installs, reaches a package index for, or mounts. A test that asks for one of these is `heavy`.
HEAVY_FIXTURES = {"whole_model", "browser", "agents", "uv", "own_mounts", "peers", "xinference"}
SMOKE_ROWS = 2
IS_WARM = sys.platform == "linux" and "ZIMAGE_TEST_COLD" not in os.environ

sys.path.insert(0, str(SCRIPTS))

import figures
from closed import assert_answer_closed, assert_closed
from fault_server import FaultServer
from leaks import SEARCHED, Search, keys_in
from mock_server import MockServer
from torture.report import torture_figures
from warm import Warm
from zimage import outside, waiting


@pytest.hookimpl
def pytest_sessionfinish(session: pytest.Session) -> None:
    """A worker hands over what it has searched."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["searched"] = dict(SEARCHED)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    SEARCHED.update(getattr(node, "workeroutput", {}).get("searched", {}))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    if SEARCHED["runs"]:
        counts = ", ".join(f"{count:,} {name}" for name, count in SEARCHED.items())
        terminalreporter.write_line(f"searched for keys: {counts}; none found where a test has not put it")
        if SEARCHED["runs"] > 1000:  # all of them: a part must not stand in a document for the whole
            figures.keep("searched", SEARCHED)
    if terminalreporter.config.option.markexpr == "torture":
        terminalreporter.write_line(torture_figures(terminalreporter))


@pytest.hookimpl(tryfirst=True)  # before pytest selects by markers
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Mark what is heavy; of a table that is marked `smoke` keep the first rows, where only `smoke` is asked for."""
    seen: Counter[str] = Counter()
    left_out = []
    for item in items:
        if HEAVY_FIXTURES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker("heavy")
        if config.option.markexpr == "smoke" and item.get_closest_marker("smoke"):
            table = item.nodeid.partition("[")[0]
            seen[table] += 1
            if seen[table] > SMOKE_ROWS:
                left_out.append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in left_out]


def cannot(reason: str) -> NoReturn:
    """What a machine lacks is skipped; CI must lack nothing."""
    if os.environ.get("CI"):
        pytest.fail(f"CI must be able to: {reason}")
    pytest.skip(f"cannot {reason}")


def is_cold_environment(env: Mapping[str, str]) -> bool:
    """Whether it says what an interpreter looks at when it starts."""
    return any(name.startswith(("PYTHON", "LC_", "LANG")) for name in env)


@functools.cache
def warm_process() -> Warm:
    process = Warm({name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ})
    atexit.register(process.close)
    return process


@dataclass
class Result:
    """How one run of the script ended: exit code, and both streams as text."""

    code: int
    stdout: str
    stderr: str

    @property
    def json(self) -> dict[str, Any]:
        """The one JSON object on stdout, without a field that its schema does not name."""
        value = json.loads(self.stdout)
        assert isinstance(value, dict)
        assert_answer_closed(value)
        return value

    @property
    def error(self) -> dict[str, Any]:
        """The error object on stdout, checked for what holds for every error."""
        assert list(self.json) == ["error"] or self.json["ok"] is False, self.stdout  # a check tells more
        error = self.json["error"]
        assert isinstance(error, dict)
        assert error["exit_code"] == self.code, (error, self.code)
        self.assert_one_line_of_advice()
        return error

    def assert_one_line_of_advice(self) -> None:
        """Every failure names itself and, on the last line, what to do next; never a traceback."""
        assert self.code != 0
        assert "Traceback" not in self.stderr, self.stderr
        lines = self.stderr.strip().splitlines()
        assert any(line.startswith("error: ") for line in lines), self.stderr
        assert lines[-1].startswith("next: "), self.stderr


@dataclass
class Shell:
    """An empty working folder with an empty home, and the script in it."""

    folder: Path
    home: Path
    env: dict[str, str] = field(default_factory=dict)
    script: Path = GENERATE
    started: dict[subprocess.Popen[bytes], Search] = field(default_factory=dict)
    is_first_row: bool = True  # or no row of a table at all

    def use(self, mock: MockServer) -> None:
        """Point the script at a mock service, and give it the mock's key."""
        self.env["DASHSCOPE_API_KEY"] = mock.api_key
        self.env["DASHSCOPE_BASE_URL"] = mock.base_url
        self.env |= {"ZIMAGETURBO_API_KEY": mock.api_key, "ZIMAGETURBO_BASE_URL": mock.zimageturbo_url}
        self.env |= {"OPENAI_BASE_URL": mock.openai_url, "SDAPI_BASE_URL": mock.sdapi_url}
        self.env["COMFYUI_BASE_URL"] = mock.comfyui_url
        self.env |= {"MODELSCOPE_API_KEY": mock.api_key, "MODELSCOPE_BASE_URL": mock.modelscope_url}

    def environment(self) -> dict[str, str]:
        kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
        return kept | {"HOME": str(self.home), "USERPROFILE": str(self.home)} | self.env

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, str(self.script), *arguments]

    def run(self, *arguments: str, stdin: bytes | None = None, timeout: float = 60) -> Result:
        """Run the script to its end, with no terminal and, unless given, an empty standard input.

        Where its start is not the subject it is forked off a process that has loaded what it would load.
        """
        if self.can_be_warm and not is_cold_environment(self.env):
            return self.run_forked(warm_process(), *arguments, stdin=stdin, timeout=timeout)
        return self.run_cold(*arguments, stdin=stdin, timeout=timeout)

    def searched(self, search: Search, code: int, stdout: bytes, stderr: bytes) -> Result:
        """The end of a run, which has left no key anywhere."""
        result = Result(code, stdout.decode("utf-8"), stderr.decode("utf-8"))
        search(result.stdout, result.stderr)
        return result

    def search(self) -> Search:
        """To be made before a run."""
        return Search(keys_in(self.env), (self.folder, self.home))

    @property
    def can_be_warm(self) -> bool:
        return IS_WARM and self.script.parent == SCRIPTS and self.script.name.startswith("generate_")

    def run_forked(self, process: Warm, *arguments: str, stdin: bytes | None = None, timeout: float = 60) -> Result:
        argv, search = [str(self.script), *arguments], self.search()
        return self.searched(search, *process.run(argv, self.folder, self.environment(), stdin or b"", timeout))

    def run_cold(self, *arguments: str, stdin: bytes | None = None, timeout: float = 60) -> Result:
        """As `run`, and always by a new interpreter."""
        search = self.search()
        done = subprocess.run(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            input=stdin if stdin is not None else b"",
            capture_output=True,
            timeout=timeout,
            check=False,
        )
        return self.searched(search, done.returncode, done.stdout, done.stderr)

    def call(self, *arguments: str, stdin: bytes | None = None, timeout: float = 60) -> Result:
        """As `run`, for tables: the first row is a process, the others save themselves its start and run in this one.

        Not for what lies between command and process: closed streams, signals, memory, imports, Python's variables.
        """
        if self.is_first_row or self.script.parent != SCRIPTS:
            return self.run_cold(*arguments, stdin=stdin, timeout=timeout)
        main, search = importlib.import_module(self.script.stem).main, self.search()
        out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2))
        with tempfile.TemporaryFile() as given, as_in_a_process(self.folder, self.environment()):
            given.write(stdin or b"")
            given.seek(0)
            with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), io.TextIOWrapper(given) as sys.stdin:
                sys.argv = [str(self.script), *arguments]
                code = main()
        return self.searched(search, code, *(stream.buffer.getvalue() for stream in (out, err)))

    def start(self, *arguments: str) -> subprocess.Popen[bytes]:
        """Start the script and leave it running; what still runs at the end of the test is ended then."""
        process = subprocess.Popen(
            self.command(*arguments),
            cwd=self.folder,
            env=self.environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        return self.keep(process)

    def keep(self, process: subprocess.Popen[bytes]) -> subprocess.Popen[bytes]:
        """Have a process ended, and what it has left searched, at the end of the test."""
        self.started[process] = self.search()
        return process

    def finish(self, process: subprocess.Popen[bytes], timeout: float = 60) -> Result:
        stdout, stderr = process.communicate(timeout=timeout)
        return self.searched(self.started[process], process.returncode, stdout, stderr)

    def evidence_files(self) -> list[Path]:
        return sorted(self.folder.glob("output/alicloud-ai-image-zimage-turbo/evidence/*.json"))

    def evidence(self) -> dict[str, Any]:
        """The content of the only evidence file."""
        (path,) = self.evidence_files()
        data = json.loads(path.read_text(encoding="utf-8"))
        assert isinstance(data, dict)
        assert_closed("evidence", data)
        return data

    def files(self) -> list[str]:
        """Every file below the working folder, hidden ones too, relative to it."""
        return sorted(str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if not path.is_dir())


@contextlib.contextmanager
def as_in_a_process(folder: Path, env: dict[str, str]) -> Iterator[None]:
    """A table's command in this process: what it leaves behind is cleared away at the end."""
    try:
        with own_state(folder, env), patch.object(waiting, "BACKOFF_BASE", 0.02):  # the first rows wait as users do
            yield
    finally:
        with warnings.catch_warnings():  # an answer that is left unread is closed by the end of a process
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()
            gc.freeze()  # what is there now need not be looked through again


@contextlib.contextmanager
def own_state(folder: Path, env: Mapping[str, str]) -> Iterator[None]:
    """What a command may change and a process of its own would take with it: all is as before at the end."""
    kept = os.getcwd(), os.environ.copy(), sys.argv, sys.stdin
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    try:
        yield
    finally:
        os.chdir(kept[0])
        os.environ.clear()
        os.environ.update(kept[1])
        sys.argv, sys.stdin = kept[2:]
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        outside._secrets.clear()
        signal.set_wakeup_fd(-1)


@pytest.fixture
def shell(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Shell]:
    folder, home = tmp_path / "project", tmp_path / "home"
    folder.mkdir()
    home.mkdir()
    row = getattr(request.node, "callspec", None)
    shell = Shell(folder, home, is_first_row=row is None or not any(row.indices.values()))
    yield shell
    for process, search in shell.started.items():
        if process.poll() is None:
            process.kill()
            process.communicate(timeout=30)
        search()  # of what was killed, too
    for path in folder.rglob("evidence/**/*.json"):
        content = path.read_bytes()
        if content.startswith(b"{\n"):  # what a test has put there stands on one line
            assert_closed("evidence", json.loads(content))


@pytest.fixture
def service(shell: Shell) -> Iterator[FaultServer]:
    """A server that breaks the protocol as told, and the shell pointed at it."""
    with FaultServer() as server:
        shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, "DASHSCOPE_BASE_URL": server.base_url}
        yield server


MockServer.poll_s = 0.002  # more than a thousand are closed in a run


@pytest.fixture
def mock() -> Iterator[MockServer]:
    with MockServer(rpm=0) as server:
        yield server
