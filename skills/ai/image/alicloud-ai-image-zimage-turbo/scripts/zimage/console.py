"""Console: stdout carries data only, everything else goes to stderr."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

from zimage.contract import EXIT_OK, GENERATE_IMAGE, REQUIREMENTS
from zimage.errors import Failure, internal_error, missing_package
from zimage.files import to_json
from zimage.outside import outside_text, remember_environment, told_line
from zimage.settle import before_anything
from zimage.waiting import Stop, Stopped

# Facts of an error that stderr tells too, a line each.
TOLD = ("prompt", "refused", "evidence_path", "seed", "estimated_cost", "next_command", "retry_after_s")


class Console:
    """stdout carries data only, in UTF-8; everything else goes to stderr. A closed stream never ends a command."""

    def __init__(self, *, json_mode: bool, quiet: bool = False) -> None:
        self.json_mode = json_mode
        self.quiet = quiet
        self._warned: set[str] = set()

    def warn(self, warnings: Sequence[str]) -> None:
        """Tell each warning once."""
        for text in warnings:
            if text not in self._warned:
                self._warned.add(text)
                self.note(f"warning: {text}")

    def note(self, text: str) -> None:
        if not self.quiet:
            self._lines(text)

    def answer(self, value: dict[str, Any] | str) -> None:
        """Data that is all that a command has to give: if nobody takes it, the command has failed."""
        if not self.data(value):
            raise Failure("disk", "standard output cannot be written", hint="give the command a place to write to")

    def data(self, value: dict[str, Any] | str) -> bool:
        return self._write("stdout", value.encode() + b"\n" if isinstance(value, str) else to_json(value))

    def path(self, path: str) -> bool:
        return self._write("stdout", os.fsencode(path) + b"\n")

    def failure(self, failure: Failure) -> None:
        """The error for a person on stderr, its advice on the last line; as JSON on stdout where asked for."""
        self.tell(failure)
        if self.json_mode:
            self.data({"error": failure.fault.as_json()})

    def tell(self, failure: Failure) -> None:
        """The error for a person on stderr."""
        error: dict[str, Any] = {**failure.fault.as_json()}
        lines = [f"error: {error['code']}: {error['message']}"]
        if len(error.get("problems", [])) > 1:
            shown_of = f", the first {len(error['problems'])} are" if "problem_count" in error else ""
            lines = [f"error: {error['code']}: {error.get('problem_count', len(error['problems']))} problems{shown_of}"]
            lines += [f"  {problem}" for problem in error["problems"]]
        lines += [f"{name}: {error[name]}" for name in TOLD if name in error]
        lines.append(f"next: {error['hint']}")
        self._lines(*lines)

    def _lines(self, *texts: str) -> None:
        """Each text as one line, whatever stands in it: nobody but this tool says what to do `next:`."""
        self._write("stderr", "".join(f"{told_line(text)}\n" for text in texts).encode())

    def flush(self) -> bool:
        return self._write("stdout", b"")

    def _write(self, name: str, content: bytes) -> bool:
        """Whether the stream took the content."""
        stream = getattr(sys, name)
        if stream is None:
            return False
        try:
            stream.flush()
            stream.buffer.write(content)
            stream.buffer.flush()
        except OSError:  # nobody reads it any more; keep the interpreter from complaining at its end
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            return False
        return True


def prepare_output(env: Mapping[str, str]) -> None:
    """Before anything is printed: both streams take every text, and no key of the environment gets into one."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError, ValueError):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")  # type: ignore[union-attr]
    remember_environment(env)


def carry_out(
    work: Callable[[], Failure | None],
    console: Console,
    env: Mapping[str, str],
    *,
    requirements: Mapping[str, str] = REQUIREMENTS,
    script: Path = GENERATE_IMAGE,
) -> int:
    """Do the work of a command and tell how it failed; returns the exit code of the contract.

    `work` returns a failure that it has told itself. `requirements` are the packages that `script` needs.
    """
    prepare_output(env)
    try:
        told = work()
        return told.fault.exit_code if told else EXIT_OK
    except SystemExit:  # argparse has printed help or version
        console.flush()
        return EXIT_OK
    except Failure as error:
        failure = error
    except Stopped as stopped:
        failure = before_anything(stopped)
    except ImportError as error:
        failure = missing_package(_looked_for(error), requirements, script)
    except Exception as error:
        failure = internal_error(error)
    console.failure(failure)
    return failure.fault.exit_code


def _looked_for(error: ImportError) -> str:
    """The module that is missing; and the package that should have it, which may be another of that name."""
    name = outside_text(error.name or error, 100)
    package = getattr(sys.modules.get(name.partition(".")[0]), "__file__", None)
    return f"{name} (not in {outside_text(package)})" if package else name


def leave(exit_code: int, stop: Stop) -> NoReturn:
    """End the process; at once where a thread still works at what nobody waits for any more."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)  # a late signal must not make a success look like an interruption
    if stop.has_abandoned or sys.flags.inspect:
        os._exit(exit_code)  # both streams are flushed; the interpreter's end would wait for, or break, that work
    sys.exit(exit_code)
