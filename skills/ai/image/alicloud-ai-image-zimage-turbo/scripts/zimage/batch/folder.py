"""The folder's database: one process at a time writes it, anyone may read it."""

from __future__ import annotations

import contextlib
import errno
import importlib
import json
import os
import sqlite3
import stat
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from zimage.batch.contract import DATABASE, DATABASE_SCHEMA, DATABASE_VERSION, KEPT_FACTS, LOCK, PRIVATE_FILES, RESERVE
from zimage.contract import MAX_EVIDENCE_BYTES, MIB
from zimage.endpoint import UNKNOWN_REGION, Endpoint
from zimage.errors import Failure, os_reason
from zimage.files import OWNER_ONLY, aside, in_the_making, write_gitignore, write_new
from zimage.outside import outside_text

if TYPE_CHECKING:
    from zimage.facts import Facts
    from zimage.waiting import Stop


class FolderLock:
    """One batch a folder, by a lock that the system drops with the process.

    The folder itself is locked, so that no lock file can be removed under a run. A lock file is locked where a folder
    cannot be (Windows; network mounts that want a descriptor for writing), and where version 0.4.0 has left one: it may
    still be running.
    """

    PATIENCE = 1.0  # seconds: somebody who only looks holds it for a moment
    UNKNOWN = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)  # where there are no locks
    TAKEN = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK)

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._descriptors: list[int] = []

    def take(self) -> bool:
        """Take the lock, until `release` or the end of the process; False where another process has it.

        Raises:
            Failure: disk, where the folder cannot be locked.
        """
        until = time.monotonic() + self.PATIENCE
        with self._telling():
            while not self._try(to_keep=True):
                if time.monotonic() > until:
                    self._see_that_it_can_be()
                    return False
                time.sleep(0.05)
        return True

    def check(self) -> None:
        """See, for a moment and writing nothing, whether a folder that is there can be locked.

        Raises:
            Failure: disk.
        """
        try:
            self._try(to_keep=False)
        except OSError as error:
            if error.errno in self.UNKNOWN:
                with self._telling():
                    raise
        finally:
            self.release()

    def _see_that_it_can_be(self) -> None:
        """Raise OSError where nothing can be locked in it: some mounts say of everything that another has it."""
        with contextlib.ExitStack() as held:
            try:
                path = held.enter_context(in_the_making(self._folder / LOCK, OWNER_ONLY))
                descriptor = os.open(path, os.O_RDWR)
            except OSError:  # only read from: then it cannot be told
                return
            held.callback(self.release)
            self._lock(descriptor, to_keep=True)

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            hint = (
                "give an --output-dir on a disk of this machine: without locks two runs could pay for the same picture"
            )
            text = f"{self._folder}: this folder cannot be locked: {os_reason(error)}"
            raise Failure("disk", text, hint=hint) from None

    def is_taken(self) -> bool:
        """Whether some process has it now."""
        try:
            return not self._try(to_keep=False)
        except OSError:
            return False
        finally:
            self.release()

    def release(self) -> None:
        while self._descriptors:
            os.close(self._descriptors.pop())

    def _try(self, *, to_keep: bool) -> bool:
        """Lock what there is to lock, all of it or nothing. Raises OSError."""
        needs_file = os.name == "nt"
        try:
            if not needs_file:
                try:
                    self._lock(os.open(self._folder, os.O_RDONLY | os.O_DIRECTORY), to_keep)
                except OSError as error:
                    if error.errno != errno.EBADF:
                        raise
                    needs_file = True
            file = self._open_file(create=needs_file and to_keep)
            if file is not None:
                self._lock(file, to_keep)
        except BlockingIOError:
            self.release()
            return False
        except BaseException:
            self.release()
            raise
        return True

    def _open_file(self, *, create: bool) -> int | None:
        """The lock file; None where there is none that a run could have locked. No link is followed."""
        flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        try:
            return os.open(self._folder / LOCK, flags | os.O_CREAT * create, OWNER_ONLY)
        except OSError:
            if create:
                raise
            return None

    def _lock(self, descriptor: int, to_keep: bool) -> None:
        """Raise BlockingIOError where another process has it, and OSError where nobody can. Lookers share it."""
        self._descriptors.append(descriptor)
        try:
            if os.name == "nt":
                msvcrt: Any = importlib.import_module("msvcrt")
                msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(descriptor, (fcntl.LOCK_EX if to_keep else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in self.TAKEN:
                raise BlockingIOError(error.errno, error.strerror) from None
            raise


class Reserve:
    """Room on the disk that is kept free while calls are out: their answers can be noted though the disk is full."""

    BYTES = 2 * MIB  # some hundred commits

    def __init__(self, folder: Path) -> None:
        self._path = folder / RESERVE
        with contextlib.suppress(OSError):  # without it a full disk is only told
            self._path.unlink(missing_ok=True)
            write_new(self._path, bytes(self.BYTES), mode=OWNER_ONLY)

    def release(self) -> bool:
        """Give the room back; False where there was none."""
        try:
            self._path.unlink()
        except OSError:
            return False
        return True


PATIENCE = 5.0  # seconds for another program that has locked the database
LOOKERS_PATIENCE = 1.0  # the same, for who only reads
LIMIT_LENGTH, LONGEST_VALUE = 0, 2 * MAX_EVIDENCE_BYTES  # sqlite3.SQLITE_LIMIT_LENGTH
# What an OperationalError says of the database itself; all others are of the disk, or of who else works on it.
DAMAGE = ("no such", "malformed", "decode", "user-defined function", "encoding")
# What a rollback journal ends with that names another file: SQLite deletes that one once it has played this back.
NAMES_ANOTHER = bytes.fromhex("d9d505f920a163d7")


@contextlib.contextmanager
def database_failures(path: Path, stop: Stop | None = None) -> Iterator[None]:
    """What the database says of the disk, or of itself, as a Failure; a query that `heed` broke off, as Stopped."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        text = str(error)
        if stop is not None and text == "interrupted":
            stop.check()
            raise Failure("batch_unreadable", f"{path}: could not be read in {stop.timeout:g} s") from None
        # "file is not a database", "disk image is malformed"; rows that contradict each other; a value too big
        damaged = not isinstance(error, sqlite3.OperationalError) or any(word in text for word in DAMAGE)
        raise Failure("batch_unreadable" if damaged else "disk", f"{path}: {outside_text(text)}") from None
    except UnicodeDecodeError:  # Python could not read what SQLite says: it repeats a damaged schema
        raise Failure("batch_unreadable", f"{path}: names in it are no text") from None


def heed(database: sqlite3.Connection, stop: Stop) -> None:
    """Have queries break off when the command is to end, whatever the database has them do."""
    database.set_progress_handler(lambda: bool(stop.reason) or stop.left_s < 0, 10_000)


def harden(database: sqlite3.Connection) -> None:
    """Take nothing on trust: what the database says runs nothing, and no value is longer than this tool writes."""
    database.execute("PRAGMA trusted_schema = OFF")
    database.execute("PRAGMA cell_size_check = ON")
    if hasattr(database, "setlimit"):  # Python 3.11
        database.setlimit(LIMIT_LENGTH, LONGEST_VALUE)


def check_files(path: Path) -> None:
    """See that a database, and what SQLite keeps beside it, are files of this folder alone.

    SQLite follows links, waits for pipes, and writes into a file that has a second name elsewhere.

    Raises:
        Failure: batch_unreadable, disk.
    """
    try:
        for suffix in ("", "-wal", "-shm", "-journal"):
            beside = path.with_name(path.name + suffix)
            if not os.path.lexists(beside):
                continue
            found = os.lstat(beside)
            if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
                raise Failure("batch_unreadable", f"{beside}: a link, or not a plain file")
            if suffix == "-journal" and found.st_size >= len(NAMES_ANOTHER):
                with open(beside, "rb") as journal:
                    journal.seek(-len(NAMES_ANOTHER), os.SEEK_END)
                    if journal.read() == NAMES_ANOTHER:
                        raise Failure("batch_unreadable", f"{beside}: it names a file that SQLite would delete")
    except OSError as error:
        raise Failure("disk", f"{path} cannot be read: {os_reason(error)}") from None


def database_uri(path: Path, *, read_only: bool) -> str:
    """Opening it to read must write nothing, not even the files beside it that a running batch keeps."""
    beside = path.with_name(path.name + "-wal").exists()
    mode = "mode=rw" if not read_only else "mode=ro" if beside else "immutable=1"
    return f"{path.as_uri()}?{mode}"


def open_database(folder: Path, *, read_only: bool = False, stop: Stop | None = None) -> sqlite3.Connection:
    """The database of an output folder; queries break off with `stop`.

    Raises:
        Failure: batch_unreadable, disk. Stopped.
    """
    path = folder / DATABASE
    check_files(path)
    with database_failures(path, stop):
        uri = database_uri(path, read_only=read_only)
        patience = LOOKERS_PATIENCE if read_only else PATIENCE
        database = sqlite3.connect(uri, uri=True, isolation_level=None, timeout=patience, check_same_thread=False)
        if stop is not None:
            heed(database, stop)
        harden(database)
        check_version(database, path)
        if not read_only:
            database.execute("PRAGMA journal_mode = WAL")
            database.execute("PRAGMA synchronous = FULL")
    return database


def check_version(database: sqlite3.Connection, path: Path, schema: str = "main") -> None:
    (version,) = database.execute(f"PRAGMA {schema}.user_version").fetchone()
    if version != DATABASE_VERSION:
        raise Failure("batch_unreadable", f"{path}: written by another version of this tool ({version})")


def facts_of(text: str) -> Facts:
    """The facts of a picture, as the database holds them.

    Raises:
        Failure: batch_unreadable.
    """
    try:
        facts = json.loads(text)
        if isinstance(facts, dict):
            return cast("Facts", facts)
    except ValueError:
        pass
    raise Failure("batch_unreadable", f"{DATABASE}: the facts of a picture are not the JSON that was written")


def facts_in(content: Mapping[str, object]) -> Facts:
    """What a row remembers of an evidence."""
    return cast("Facts", {name: content[name] for name in KEPT_FACTS if name in content})


def create_database(folder: Path) -> None:
    """Make the database and what lies beside it, all at once or not at all.

    Raises:
        Failure: disk.
    """
    path = folder / DATABASE
    with database_failures(path):
        try:
            write_gitignore(folder, PRIVATE_FILES)
            with aside(path, mode=OWNER_ONLY) as temporary, contextlib.closing(sqlite3.connect(temporary)) as database:
                database.execute("PRAGMA journal_mode = MEMORY")  # no second file beside it
                database.executescript(DATABASE_SCHEMA)
                database.execute(f"PRAGMA user_version = {DATABASE_VERSION}")
                database.commit()
        except OSError as error:
            raise Failure("disk", f"{path} cannot be written: {os_reason(error)}") from None


def check_same_database(folder: Path, inode: int) -> None:
    """Raise `disk` where the database is not the file that was opened."""
    try:
        there = os.stat(folder / DATABASE).st_ino == inode
    except OSError:
        there = False
    if not there:
        raise Failure("disk", f"{folder / DATABASE} was removed or replaced while the batch ran")


def service_number(database: sqlite3.Connection, provider: str, endpoint: Endpoint) -> int:
    """A folder's number for where pictures are asked for; -1 where none have been.

    At one URL a region that is not known is no other one: it is what earlier versions called the default.
    """
    (number,) = database.execute(
        "SELECT number FROM services WHERE provider = :provider AND endpoint = :url "
        "AND (region = :region OR :unknown IN (region, :region)) ORDER BY region <> :region LIMIT 1",
        {"provider": provider, "unknown": UNKNOWN_REGION, "region": endpoint.region, "url": endpoint.url},
    ).fetchone() or (-1,)
    return int(number)
