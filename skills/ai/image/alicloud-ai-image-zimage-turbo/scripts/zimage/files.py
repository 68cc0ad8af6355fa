"""Files: written whole or not at all, under names that were free."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from zimage.contract import MAX_SAVED_BYTES, MIB, MIN_FREE_BYTES, SKILL
from zimage.errors import Failure, os_reason
from zimage.outside import CONTROL
from zimage.paths import LONGEST_NAME

OWNER_ONLY = 0o600

_ESCAPED = {code: f"\\u{code:04x}" for code in (*range(0x7F, 0xA0), *range(0x2028, 0x206A)) if CONTROL.match(chr(code))}


def to_json(value: Any) -> bytes:
    """Readable JSON in UTF-8; file names that are not text, and what a terminal would obey, become escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    return (text.translate(_ESCAPED) + "\n").encode("utf-8", "backslashreplace")


def _flush(path: Path, flags: int) -> None:
    descriptor = os.open(path, flags)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Disk:
    """The only calls that change the disk once a picture is paid for; a test puts one that fails in place of DISK."""

    @staticmethod
    def create(path: Path, mode: int) -> None:
        """Make an empty file that must not exist yet; no link that lies there is followed."""
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0), mode)
        try:
            if mode == OWNER_ONLY and hasattr(os, "fchmod"):
                with contextlib.suppress(OSError):  # some file systems know no modes
                    os.fchmod(descriptor, mode)  # whatever the umask
        finally:
            os.close(descriptor)

    @staticmethod
    def sync(path: Path) -> None:
        _flush(path, os.O_RDWR)  # Windows flushes only what may be written

    @staticmethod
    def sync_folder(folder: Path) -> None:
        """Bring the names of a folder to the disk, where the system and the file system can."""
        if os.name == "nt":
            return
        try:
            _flush(folder, os.O_RDONLY)
        except OSError as error:
            if error.errno not in CANNOT_SYNC_FOLDERS:
                raise

    @staticmethod
    def replace(new: Path, target: Path) -> None:
        os.replace(new, target)

    @staticmethod
    def claim(new: Path, target: Path) -> bool:
        """Give a finished file a free name; False where the name is taken. The temporary name may stay."""
        try:
            os.link(new, target)
        except FileExistsError:
            return False
        except OSError:  # a file system without hard links: claim the name first
            try:
                os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                return False
            try:
                os.replace(new, target)
            except BaseException:
                os.unlink(target)
                raise
        return True


CANNOT_SYNC_FOLDERS = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # unreadable, or unable
KNOWS_NO_MODES = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)
LONGEST_REPEATED = 215  # bytes of a name that a temporary one repeats: 255, less process id, serial and suffix
DISK = Disk()
_serials = itertools.count()


@contextlib.contextmanager
def in_the_making(target: Path, mode: int = 0o666) -> Iterator[Path]:
    """A new hidden file beside the target, which is gone at the end. Raises OSError."""
    while True:
        path = target.with_name(f".{_shortened(target.name)}.{os.getpid()}.{next(_serials)}.part")
        try:
            DISK.create(path, mode)
            break
        except FileExistsError:  # of a dead process that had this one's number, or laid there on purpose
            continue
    try:
        yield path
    finally:
        with contextlib.suppress(OSError):
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def aside(target: Path, *, mode: int = 0o666, durable: bool = True) -> Iterator[Path]:
    """A path to write a file at, which takes the target's place in one step at a good end. Raises OSError.

    `durable`: it outlasts a power cut. What can be made again, such as a thumbnail, need not wait for the disk.
    """
    with in_the_making(target, mode) as path:
        yield path
        if durable:
            DISK.sync(path)
        DISK.replace(path, target)
        if durable:
            DISK.sync_folder(target.parent)


def replace_private(path: Path, content: bytes) -> None:
    """Write a file for its owner only, in one step, whether it exists or not. Raises OSError."""
    with aside(path, mode=OWNER_ONLY) as temporary:
        temporary.write_bytes(content)


def write_new(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file that must not exist yet, nor a link in its place. Raises OSError, FileExistsError among them."""
    with in_the_making(path, mode) as temporary:
        temporary.write_bytes(content)
        DISK.sync(temporary)
        if not DISK.claim(temporary, path):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
        DISK.sync_folder(path.parent)


def write_gitignore(folder: Path, patterns: str) -> None:
    """Keep files out of a repository, unless the folder has something of that name. Raises OSError."""
    path = folder / ".gitignore"
    if not os.path.lexists(path):
        with contextlib.suppress(FileExistsError):
            write_new(path, patterns.encode())


def remove_leftovers(folder: Path, made: str) -> None:
    """Remove what dead processes have left in the making; `made` is a regular expression of what they made.

    Version 0.4.0 gave temporary names no serial. This process has nothing in the making when it calls this.
    """
    temporary = re.compile(rf"\.(?:{made})\.(\d{{1,9}})(?:\.\d+)?\.part(?:-journal|-wal|-shm)?")
    with contextlib.suppress(OSError):
        for found in filter(None, map(temporary.fullmatch, os.listdir(folder))):
            with contextlib.suppress(OSError):
                if not is_alive(int(found[1])):
                    os.unlink(folder / found[0])


def leftovers_of(*names: str) -> str:
    """What `remove_leftovers` takes for these names, which are literal."""
    return "|".join(re.escape(_shortened(name)) for name in names)


def is_alive(pid: int) -> bool:
    """Whether another process may be at work. Windows keeps open files from being removed: there, none needs to be."""
    if os.name == "nt" or pid == os.getpid():
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def place(content: bytes, output: Path, evidence_id: str, *, overwrite: bool, again: bool) -> tuple[Path, str | None]:
    """Put the bytes under the output's name in one step; returns the path used, and a warning if it is another.

    `again`: a run that was killed may have put them there already; then its file is the one.

    Raises:
        Failure: disk_after_paying.
    """
    others = (_second_name(output, f"{evidence_id}{more}") for more in ("", *(f"-{n}" for n in range(2, 100))))
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with in_the_making(output.with_name(f"{SKILL}-{evidence_id}")) as temporary:
            temporary.write_bytes(content)
            DISK.sync(temporary)
            if overwrite and not output.is_dir():
                DISK.replace(temporary, output)
                DISK.sync_folder(output.parent)
                return output, None
            for path in (output, *others):
                if DISK.claim(temporary, path) or (again and _holds(path, content)):
                    DISK.sync_folder(output.parent)
                    warning = f"{output} is taken by another file; the picture is saved as {path}"
                    return path, None if path == output else warning
            raise FileExistsError("its other names are taken too")
    except OSError as error:
        raise Failure("disk_after_paying", f"the picture cannot be saved at {output}: {os_reason(error)}") from None


def _shortened(name: str) -> str:
    while len(os.fsencode(name)) > LONGEST_REPEATED:
        name = name[:-1]
    return name


def _second_name(output: Path, evidence_id: str) -> Path:
    """`<stem>-<evidence id>`, the stem shortened where a file system's 255 bytes would not hold it."""
    stem = output.stem
    while stem and len(os.fsencode(f"{stem}-{evidence_id}{output.suffix}")) > LONGEST_NAME:
        stem = stem[:-1]
    return output.with_name(f"{stem}-{evidence_id}{output.suffix}")


def _holds(path: Path, content: bytes) -> bool:
    try:
        return read_file(path, len(content)) == content
    except OSError:
        return False


def check_working_folder() -> None:
    """Raise `disk` where the folder that the command was started in is gone."""
    try:
        os.getcwd()
    except OSError as error:
        raise Failure("disk", f"the working folder cannot be used: {os_reason(error)}") from None


def check_free_name(output: Path, overwrite: bool) -> None:
    """Raise `output_exists` where the name is taken and may not be."""
    if os.path.lexists(output) and not overwrite:
        raise Failure("output_exists", f"--output: {output} exists already")


def nearest_folder(folder: Path) -> Path:
    """The folder itself, or what there is above it."""
    while not os.path.lexists(folder) and folder != folder.parent:
        folder = folder.parent
    return folder


def permissions_warning(folder: Path) -> str | None:
    """A warning where no file can be for its owner only: on mounts that refuse `chmod` (SMB, Windows' drives in WSL).

    Writes nothing: the folder, or what there is above it, is given the permissions that it has.
    """
    if not hasattr(os, "fchmod"):
        return None
    with contextlib.suppress(OSError):
        descriptor = os.open(nearest_folder(folder), os.O_RDONLY | getattr(os, "O_DIRECTORY", 0))
        try:
            found = os.fstat(descriptor)
            # Those of others are not ours to set; a bit beyond read, write and enter might be lost.
            if found.st_uid == os.geteuid() and stat.S_IMODE(found.st_mode) <= 0o777:
                os.fchmod(descriptor, stat.S_IMODE(found.st_mode))
        except OSError as error:
            if error.errno in KNOWS_NO_MODES:
                why = f"its file system refuses chmod ({os_reason(error)})"
                return f"others may be able to read what is written to {folder}, signed links too: {why}"
        finally:
            os.close(descriptor)
    return None


def check_space(folder: Path, needed: int = MIN_FREE_BYTES) -> None:
    """Raise `disk` where a folder, or the nearest one above it that exists, cannot take `needed` bytes."""
    existing = nearest_folder(folder)
    if not existing.is_dir():
        raise Failure("disk", f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Failure("disk", f"the folder {existing} is not writable")
    try:
        total, _, free = shutil.disk_usage(existing)
    except OSError as error:
        if error.errno in (errno.ENOSYS, errno.ENOTSUP):
            return
        raise Failure("disk", f"the folder {existing} cannot be examined: {os_reason(error)}") from None
    if total and free < needed:  # a file system that does not know its size has none
        raise Failure("disk", f"only {free // 1024} KiB are free in {existing}; {needed // MIB} MiB are needed")


def check_writable(folder: Path, evidence_id: str) -> None:
    """Raise `disk` unless a file can really be written into the folder; leaves none behind."""
    check_space(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with in_the_making(folder / f"{SKILL}-{evidence_id}") as probe:
            DISK.sync(probe)
    except OSError as error:
        raise Failure("disk", f"the folder {folder} is not writable: {os_reason(error)}") from None


def open_regular(path: str | Path, *, follow: bool = True) -> BinaryIO:
    """A file that somebody else named, to read: a pipe, device, socket or folder neither blocks nor is read.

    `follow`: it may be a link. In a folder that may be a stranger's, none is.

    Raises:
        OSError, ValueError.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags if follow else flags | getattr(os, "O_NOFOLLOW", 0))
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file", str(path))
        return open(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def read_file(path: str | Path, limit: int, *, follow: bool = True) -> bytes:
    """The bytes of a file that somebody else named. Raises as `open_regular`, also where they are more than `limit`."""
    with open_regular(path, follow=follow) as source:
        content = source.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"is larger than {limit // MIB} MiB", str(path))
    return content


def file_hash(path: Path, *, follow: bool = True) -> str:
    """SHA-256 of a saved picture, in hex. Raises as `read_file`."""
    with open_regular(path, follow=follow) as source:
        if os.fstat(source.fileno()).st_size > MAX_SAVED_BYTES:
            raise OSError(errno.EFBIG, f"is larger than {MAX_SAVED_BYTES // MIB} MiB", str(path))
        digest, left = hashlib.sha256(), MAX_SAVED_BYTES
        while left > 0 and (block := source.read(MIB)):
            digest.update(block)
            left -= len(block)
    return digest.hexdigest()
