"""A process that has loaded what the commands load, and forks itself for every command that it is told to run.

    warm = Warm(environment)                            # of the process; each command gets one of its own
    code, out, err = warm.run(argv, folder, environment, b"", timeout=60)

A command that is run so is a process in all but its start: `__main__`, streams, signals, threads and end are its own.
Only on Linux: elsewhere libraries of the system do not survive a fork.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import select
import selectors
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

SCRIPTS = Path(__file__).resolve().parent.parent / "skills/ai/image/alicloud-ai-image-zimage-turbo/scripts"
LOADED = ("requests", "jsonschema", "PIL.Image", "PIL.PngImagePlugin", "PIL.JpegImagePlugin", "tqdm", "sqlite3", "ssl")
IN_A_PIPE = 32_000  # bytes that fit whoever reads them


class Warm:
    """The process, and what it is told through a socket."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._control, theirs = socket.socketpair()
        self._lock = threading.Lock()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                env=dict(env),
                stdin=subprocess.PIPE,  # pipes, as those of the commands: its streams become theirs
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                pass_fds=[theirs.fileno()],
            )

    def close(self) -> None:
        self._control.close()
        self._process.communicate(timeout=30)

    def run(
        self,
        argv: Sequence[str],
        folder: Path,
        env: Mapping[str, str],
        stdin: bytes,
        timeout: float,
        begun: Callable[[int], None] = lambda pid: None,
    ) -> tuple[int, bytes, bytes]:
        """Run `argv`, the path of a script and its arguments, to its end: as `subprocess.run` does.

        `begun` is told its process id before it does anything.

        Raises:
            subprocess.TimeoutExpired: It was killed.
        """
        with contextlib.ExitStack() as stack:
            out, err = (stack.enter_context(_Pipe()) for _ in range(2))
            link, theirs = map(stack.enter_context, socket.socketpair())
            if len(stdin) <= IN_A_PIPE:
                given = stack.enter_context(_Pipe())
                os.write(given.write_end, stdin)
                given.end()
                read_end = given.read_end
            else:
                file = stack.enter_context(tempfile.TemporaryFile())
                file.write(stdin)
                file.seek(0)
                read_end = file.fileno()
            with self._lock:
                socket.send_fds(self._control, [b"!"], [theirs.fileno(), read_end, out.write_end, err.write_end])
            theirs.close()
            out.end()
            err.end()
            pid = _number(link)
            begun(pid)
            asked = {"argv": list(argv), "folder": str(folder), "env": dict(env), "umask": own_umask()}
            link.sendall(json.dumps(asked).encode())
            link.shutdown(socket.SHUT_WR)
            said = _read({link.fileno(), out.read_end, err.read_end}, time.monotonic() + timeout)
            if said.keys() & {"late"}:
                os.kill(pid, signal.SIGKILL)
                raise subprocess.TimeoutExpired(list(argv), timeout, said[out.read_end], said[err.read_end])
            return int(said[link.fileno()]), said[out.read_end], said[err.read_end]


class _Pipe:
    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self._open = True

    def end(self) -> None:
        """Nobody writes here any more."""
        if self._open:
            os.close(self.write_end)
            self._open = False

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()
        os.close(self.read_end)


def _number(link: socket.socket) -> int:
    """The first number that comes, up to the blank behind it."""
    digits = b""
    while not digits.endswith(b" "):
        digits += link.recv(1) or b"the process that forks is gone "
    return int(digits)


def own_umask() -> int:
    """Looked up where that does not change it, as `os.umask` does."""
    lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(int(line.split()[1], 8) for line in lines if line.startswith("Umask:"))


def _read(files: set[int], deadline: float) -> dict[Any, bytes]:
    """All that comes from these; with an entry `late` where not all of them have ended in time."""
    said: dict[Any, bytes] = dict.fromkeys(files, b"")
    with selectors.DefaultSelector() as selector:
        for file in files:
            selector.register(file, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0.0, deadline - time.monotonic()))
            if not ready:
                return said | {"late": b""}
            for key, _ in ready:
                got = os.read(key.fd, 1 << 16)
                said[key.fd] += got
                if not got:
                    selector.unregister(key.fd)
    return said


# The process ----------------------------------------------------------------------------------------------------------


class Asked(NamedTuple):
    link: socket.socket
    streams: list[int]


def wait_to_be_asked(control: socket.socket) -> Asked:
    """Fork for everything that is asked for, and tell how each child has ended. Returns in the children only."""
    running: dict[int, socket.socket] = {}
    wakes, wake = socket.socketpair()
    with control, wakes, wake:
        wake.setblocking(False)
        signal.set_wakeup_fd(wake.fileno())
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            ready, _, _ = select.select([control, wakes], [], [])
            if wakes in ready:
                wakes.recv(1 << 12)
                tell_of_the_dead(running)
            if control in ready:
                asked, files, _, _ = socket.recv_fds(control, 1, 4)
                if not asked:
                    os._exit(0)
                link = socket.socket(fileno=files[0])
                pid = os.fork()
                if not pid:
                    break
                for file in files[1:]:
                    os.close(file)
                link.sendall(f"{pid} ".encode())
                running[pid] = link
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for other in running.values():
        other.close()
    return Asked(link, files[1:])


def tell_of_the_dead(running: dict[int, socket.socket]) -> None:
    while running:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        with running.pop(pid) as link, contextlib.suppress(OSError):  # nobody listens to one that was killed as late
            link.sendall(str(os.waitstatus_to_exitcode(status)).encode())


def load() -> None:
    """All that a command may come to load, under the names that it would have."""
    sys.path[0] = str(SCRIPTS)
    for name in LOADED:
        importlib.import_module(name)
    for path in sorted((SCRIPTS / "zimage").rglob("*.py")):
        importlib.import_module(".".join(path.relative_to(SCRIPTS).with_suffix("").parts))
    for name in ("dashscope", "openai", "zimageturbo"):
        importlib.import_module(f"providers.{name}")


def main() -> None:
    control = socket.socket(fileno=int(sys.argv[1]))
    load()
    programs = {str(path): compile(path.read_bytes(), path, "exec") for path in SCRIPTS.glob("generate_*.py")}
    gc.collect()
    gc.freeze()
    asked = wait_to_be_asked(control)
    with asked.link, asked.link.makefile("rb") as told:
        request = json.loads(told.read())
    for number, file in enumerate(asked.streams):
        os.dup2(file, number)
        os.close(file)
    os.chdir(request["folder"])
    os.umask(request["umask"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    if hasattr(sys.modules.get("sitecustomize"), "read_settings"):  # tests/every_write, not one of the system's
        sys.modules["sitecustomize"].read_settings()
    sys.argv = request["argv"]
    module = types.ModuleType("__main__")
    module.__file__ = sys.argv[0]
    sys.modules["__main__"] = module
    end(play(programs[sys.argv[0]], vars(module)))


def play(program: types.CodeType, names: dict[str, Any]) -> int:
    try:
        exec(program, names)
    except SystemExit as error:
        assert isinstance(error.code, (int, type(None)))
        return error.code or 0
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        names.clear()
    return 0


def end(code: int) -> NoReturn:
    """What the end of an interpreter does, but taking apart all that was loaded: that is most of a short run's time."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    gc.collect()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            code = 120
    os._exit(code)


if __name__ == "__main__":
    main()
