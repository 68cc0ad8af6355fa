"""A surrounding that is hostile to one process: Python loads this first where PYTHONPATH leads to it.

    ZIMAGE_TEST_AROUND='{"refuse": {"fchmod": "EPERM"}, "umask": 511}'

What can be asked for stands in the functions below, which are named as their settings. Linux only.
"""

from __future__ import annotations

import datetime as dt
import errno
import json
import os
import stat
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

_REAL_NOW, _REAL_TIME = dt.datetime.now, time.time
_clock = ""


def _shift_s() -> float:
    """By how many seconds the clock is wrong now."""
    try:
        return float(Path(_clock).read_text(encoding="ascii")) if _clock else 0.0
    except (OSError, ValueError):
        return 0.0


class Clock(dt.datetime):
    """What the time of day comes from; nothing that counts seconds does."""

    @classmethod
    def now(cls, tz: dt.tzinfo | None = None) -> Clock:
        real = _REAL_NOW(tz) + dt.timedelta(seconds=_shift_s())
        return cls.combine(real.date(), real.timetz())


dt.datetime = Clock  # type: ignore[misc]  # before anybody has it by name
time.time = lambda: _REAL_TIME() + _shift_s()


def clock(file: str) -> None:
    """The file holds by how many seconds the clock is wrong; it may change at any moment."""
    global _clock
    _clock = file


def refuse(calls: dict[str, str]) -> None:
    """Have calls of the system fail as on file systems, or under rules, that do not know them."""
    import fcntl

    places: dict[str, Any] = {"flock": fcntl}
    for name, code in calls.items():
        number = getattr(errno, code)
        if name == "fsync of folders":
            _refuse_if(os, "fsync", number, lambda file, *_: stat.S_ISDIR(os.fstat(file).st_mode))
        else:
            _refuse_if(places.get(name, os), name, number, lambda *_: True)


def _refuse_if(place: Any, name: str, number: int, applies: Callable[..., bool]) -> None:
    real = getattr(place, name)

    def call(*args: Any, **kwargs: Any) -> Any:
        if applies(*args):
            raise OSError(number, os.strerror(number))
        return real(*args, **kwargs)

    setattr(place, name, call)


def threads(most: int) -> None:
    """After so many threads none can be started any more."""
    real = threading.Thread.start
    started: list[threading.Thread] = []

    def start(thread: threading.Thread) -> None:
        if len(started) >= most:
            raise RuntimeError("can't start new thread")
        started.append(thread)
        real(thread)

    threading.Thread.start = start  # type: ignore


def memory(name: str) -> None:
    """One function of Pillow's images finds no memory."""
    from PIL import Image

    def call(*_: Any, **__: Any) -> Any:
        raise MemoryError

    setattr(Image.Image, name, call)


def limits(most: dict[str, int]) -> None:
    """Limits of the system for this process: NOFILE, AS, FSIZE, by their names in `resource`."""
    import resource

    for name, value in most.items():
        resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (value, value))


def umask(mask: int) -> None:
    os.umask(mask)


def powers(_: bool) -> None:
    """Root keeps its name and its files, and may no more than the permissions say: as everybody else."""
    import ctypes

    header, nothing = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()  # capabilities(7): version 3
    if ctypes.CDLL(None, use_errno=True).capset(header, nothing):
        raise OSError(ctypes.get_errno(), "capset")


def sleeps(when: dict[str, Any]) -> None:
    """The machine is suspended for some seconds before the evidence is begun, or before the first connection."""
    import shutil
    import socket

    place: Any = shutil if when["before"] == "evidence" else socket.socket
    name = "disk_usage" if when["before"] == "evidence" else "connect"
    real = getattr(place, name)

    def call(*args: Any) -> Any:
        setattr(place, name, real)
        time.sleep(when["seconds"])
        return real(*args)

    setattr(place, name, call)


def read_settings() -> None:
    """At the start of a process; and of a fork (tests/warm.py), whose parent was told of nothing."""
    for name, value in json.loads(os.environ.get("ZIMAGE_TEST_AROUND", "{}")).items():
        globals()[name](value)


read_settings()
