"""A disk that fails, or a process that dies, at the n-th write: Python loads this first where PYTHONPATH leads to it.

    ZIMAGE_TEST_WRITE=fail:7              the 7th write fails, once; with 0 none does
    ZIMAGE_TEST_WRITE=fail-from:7         the 7th write and all after it fail
    ZIMAGE_TEST_WRITE=kill:7              the process dies by SIGKILL as soon as the 7th write is done; with 0 never
    ZIMAGE_TEST_WRITE=fail-while:/a/file  every write fails while that file exists
    ZIMAGE_TEST_WRITE=slow-commit:50      nothing fails, and SQLite takes 50 ms from each commit to its return
    ZIMAGE_TEST_WRITE_BELOW=/a/folder     only writes below it count
    ZIMAGE_TEST_WRITE_LOG=/a/file         gets a line for each: number, what, path

A write is whatever reaches the disk: a file opened to be created or emptied, bytes written, fsync, rename, link, a new
folder, and what a SQLite connection creates, changes or commits. Removing is none: it makes room. Where bytes cannot be
written, half of them are. For `kill` only what others can see counts: no fsync, nothing inside a transaction.
"""

from __future__ import annotations

import io
import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import unquote, urlsplit

MODE = BELOW = LOG = _ARGUMENT = ""
NUMBER = 0
ENOSPC = 28
FAILS, KILLS = "fails", "kills"
SQL_WRITES = ("insert", "update", "delete", "replace", "create", "drop", "alter", "commit", "end", "vacuum")
SQL_PRAGMAS = ("user_version", "application_id", "journal_mode", "wal_checkpoint")

_open, _exists = os.open, os.path.exists
_lock = threading.Lock()
_count = 0


def read_settings() -> None:
    """At the start of a process; and of a fork (tests/warm.py), that its parent was told of no write."""
    global MODE, BELOW, LOG, NUMBER, _ARGUMENT, _count
    MODE, _, _ARGUMENT = os.environ.get("ZIMAGE_TEST_WRITE", "").partition(":")
    NUMBER = int(_ARGUMENT) if _ARGUMENT.isdigit() else 0
    BELOW = os.path.realpath(os.environ.get("ZIMAGE_TEST_WRITE_BELOW", "/")).rstrip(os.sep) + os.sep
    LOG = os.environ.get("ZIMAGE_TEST_WRITE_LOG", "")
    _count = 0


def verdict(what: str, path: str, *, seen: bool = True) -> str:
    """Count a write; what is to become of it."""
    global _count
    if MODE == "kill" and not seen:
        return ""
    with _lock:
        _count += 1
        number = _count
        if LOG:
            log = _open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            _write(log, f"{number}\t{what}\t{path.removeprefix(BELOW)}\n".encode("utf-8", "surrogateescape"))
            os.close(log)
    if MODE == "fail-while":
        return FAILS if _exists(_ARGUMENT) else ""
    if (MODE == "fail" and number == NUMBER) or (MODE == "fail-from" and number >= NUMBER):
        return FAILS
    return KILLS if MODE == "kill" and number == NUMBER else ""


def linger() -> None:
    if MODE == "slow-commit":
        time.sleep(NUMBER / 1000)


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def full(path: str) -> OSError:
    return OSError(ENOSPC, os.strerror(ENOSPC), path)


def path_of(file: object, folder: object = None) -> str | None:
    """The path of a file, by name, relative to an open folder, or by descriptor; None where it does not count."""
    if isinstance(file, int):
        try:
            path = os.readlink(f"/proc/self/fd/{file}")
        except OSError:
            try:
                import fcntl

                path = os.fsdecode(fcntl.fcntl(file, fcntl.F_GETPATH, bytes(1024)).rstrip(b"\0"))  # type: ignore[attr-defined]
            except (ImportError, AttributeError, OSError):
                return None
    else:
        path = os.fsdecode(file)  # type: ignore[arg-type]
        if isinstance(folder, int) and not os.path.isabs(path):
            path = os.path.join(path_of(folder) or "", path)
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    return path if path.startswith(BELOW) else None


class Plain:
    """A function that stays one where it is kept in a class: Python 3.10's pathlib keeps those of `os` so."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._function(*args, **kwargs)


def guard(what: str, call: Callable[..., Any], named: int, folder: str, counts: Callable[..., bool]) -> Any:
    """A function of `os` whose argument number `named` is what it writes to."""

    def guarded(*args: Any, **kwargs: Any) -> Any:
        path = None
        if len(args) > named and counts(*args, **kwargs):
            path = path_of(args[named], kwargs.get(folder))
        if path is None:
            return call(*args, **kwargs)
        told = verdict(what, path, seen=what not in ("fsync", "fdatasync"))
        if told == FAILS:
            if what == "write":
                call(args[0], bytes(args[1])[: len(args[1]) // 2])
            raise full(path)
        result = call(*args, **kwargs)
        if told == KILLS:
            die()
        return result

    plain = Plain(guarded)
    for able in (os.supports_dir_fd, os.supports_fd, os.supports_follow_symlinks):
        if call in able:
            able.add(plain)
    return plain


def always(*_: Any, **__: Any) -> bool:
    return True


def is_new(path: Any, *_: Any, **kwargs: Any) -> bool:
    path = path_of(path, kwargs.get("dir_fd")) or path
    return not os.path.isdir(path) and os.path.isdir(os.path.dirname(path))


def creates(_: object, flags: int, *__: Any, **___: Any) -> bool:
    return bool(flags & (os.O_CREAT | os.O_TRUNC))


class Raw(io.FileIO):
    """A file whose every write counts, whoever buffers before it."""

    def write(self, data: Any, /) -> int:
        path = path_of(self.fileno())
        if path is None:
            return super().write(data)
        told = verdict("write", path)
        if told == FAILS:
            super().write(bytes(data)[: len(bytes(data)) // 2])
            raise full(path)
        written = super().write(data)
        if told == KILLS:
            die()
        return written


_io_open = io.open


def opened(
    file: Any,
    mode: str = "r",
    buffering: int = -1,
    encoding: str | None = None,
    errors: str | None = None,
    newline: str | None = None,
    closefd: bool = True,
    opener: Any = None,
) -> Any:
    """`open`, put together from parts where it is for writing below the folder."""
    path = path_of(file) if set(mode) & set("wax+") else None
    if path is None:
        return _io_open(file, mode, buffering, encoding, errors, newline, closefd, opener)
    told = verdict("open", path) if not isinstance(file, int) and opener is None else ""
    if told == FAILS:
        raise full(path)
    raw = Raw(file, mode.replace("b", "").replace("t", ""), closefd, opener)
    if told == KILLS:
        die()
    if buffering == 0:
        return raw
    buffer = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
    if "b" in mode:
        return buffer
    return io.TextIOWrapper(buffer, encoding, errors, newline, line_buffering=buffering == 1)


def guard_sqlite() -> None:
    """Make connections count what they write."""
    import sqlite3

    errors = ("disk I/O error", "database or disk is full")
    connected = sqlite3.connect

    def passes(connection: Any, what: str) -> bool:
        """Whether the process is to die behind this write.

        Raises:
            sqlite3.OperationalError: The disk has failed.
        """
        commits = what in ("sqlite commit", "sqlite script") or connection.isolation_level is None
        seen = commits and (what == "sqlite commit" or not connection.in_transaction)
        told = verdict(what, connection.counted_path, seen=seen)
        if told == FAILS:
            if what == "sqlite commit" and MODE != "fail":  # SQLite may, and need not, have rolled back by itself
                sqlite3.Connection.rollback(connection)
            raise sqlite3.OperationalError(errors[_count % 2])
        return told == KILLS

    def wrote(statement: str) -> str | None:
        words = statement.lower().replace("=", " ").replace("(", " ").split()
        writes = bool(words) and (
            words[0] in SQL_WRITES
            or (words[0] == "with" and any(word in SQL_WRITES for word in words))
            or (words[0] == "pragma" and len(words) > 2 and words[1].rpartition(".")[2] in SQL_PRAGMAS)
        )
        return f"sqlite {words[0]}".replace("sqlite end", "sqlite commit") if writes else None

    class Cursor(sqlite3.Cursor):
        def _counted(self, name: str, statement: str, *more: Any) -> Any:
            what = "sqlite script" if name == "executescript" else wrote(statement)
            dies = what is not None and passes(self.connection, what)
            result = getattr(super(), name)(statement, *more)
            if what == "sqlite commit":
                linger()
            if dies:
                die()
            return result

        def execute(self, statement: str, *more: Any) -> Any:
            return self._counted("execute", statement, *more)

        def executemany(self, statement: str, *more: Any) -> Any:
            return self._counted("executemany", statement, *more)

        def executescript(self, statement: str) -> Any:
            return self._counted("executescript", statement)

    def counting(base: Any) -> Any:
        class Connection(base):  # type: ignore[misc]
            counted_path = ""

            def cursor(self, factory: Any = Cursor) -> Any:
                return super().cursor(factory)

            def execute(self, *args: Any) -> Any:
                return self.cursor().execute(*args)

            def executemany(self, *args: Any) -> Any:
                return self.cursor().executemany(*args)

            def executescript(self, *args: Any) -> Any:
                return self.cursor().executescript(*args)

            def commit(self) -> None:
                dies = self.in_transaction and passes(self, "sqlite commit")
                super().commit()
                linger()
                if dies:
                    die()

            def __exit__(self, kind: Any, *_: Any) -> None:
                if kind is not None:
                    self.rollback()
                    return
                try:
                    self.commit()
                except BaseException:
                    self.rollback()
                    raise

        return Connection

    def connect(database: Any, *args: Any, **kwargs: Any) -> Any:
        name = os.fsdecode(database)
        if kwargs.get("uri") and name.startswith("file:"):
            name = unquote(urlsplit(name).path)
        path = None if name in ("", ":memory:") else path_of(name)
        if path is None:
            return connected(database, *args, **kwargs)
        told = verdict("sqlite create", path) if not _exists(path) else ""
        if told == FAILS:
            raise sqlite3.OperationalError("unable to open database file")
        kwargs["factory"] = counting(kwargs.get("factory", sqlite3.Connection))
        connection = connected(database, *args, **kwargs)
        connection.counted_path = path
        if told == KILLS:
            die()
        return connection

    sqlite3.connect = sqlite3.dbapi2.connect = connect


_write = os.write


def install() -> None:
    import builtins

    builtins.open = io.open = Plain(opened)
    os.open = guard("open", os.open, 0, "dir_fd", creates)
    for name, named, folder in (
        ("write", 0, ""),
        ("pwrite", 0, ""),
        ("writev", 0, ""),
        ("sendfile", 0, ""),
        ("copy_file_range", 1, ""),
        ("posix_fallocate", 0, ""),
        ("ftruncate", 0, ""),
        ("truncate", 0, ""),
        ("fsync", 0, ""),
        ("fdatasync", 0, ""),
        ("mkdir", 0, "dir_fd"),
        ("replace", 1, "dst_dir_fd"),
        ("rename", 1, "dst_dir_fd"),
        ("link", 1, "dst_dir_fd"),
        ("symlink", 1, "dir_fd"),
    ):
        if hasattr(os, name):
            counts = is_new if name == "mkdir" else always
            setattr(os, name, guard(name, getattr(os, name), named, folder, counts))
    guard_sqlite()


read_settings()
if MODE:
    install()
