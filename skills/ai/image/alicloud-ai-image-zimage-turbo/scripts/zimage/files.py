"""Files: written whole or not at all, under names that were free."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import unicodedata
from pathlib import Path
from typing import Any, NoReturn

from zimage.contract import FORMATS, MIB, MIN_FREE_BYTES, SKILL
from zimage.errors import Failure, os_reason
from zimage.outside import _CONTROL, outside_text, shown, without_surrogates

OWNER_ONLY = 0o600


def to_json(value: Any) -> bytes:
    """Readable JSON in UTF-8; file names that are not text, and what a terminal would obey, become escapes."""
    text = json.dumps(value, ensure_ascii=False, indent=2)
    text = re.sub("[\x7f-\x9f]", lambda sign: f"\\u{ord(sign[0]):04x}", text)
    return (text + "\n").encode("utf-8", "backslashreplace")


def temporary_name(folder: Path, stem: str) -> Path:
    """A hidden name for a file in the making."""
    return folder / f".{stem}.{os.getpid()}.part"


def replace_private(path: Path, content: bytes) -> None:
    """Write a file for its owner only, in one step, whether it exists or not. Raises OSError."""
    temporary = temporary_name(path.parent, path.stem)
    try:
        temporary.unlink(missing_ok=True)  # of a dead process that had this one's number
        write_exclusively(temporary, content, mode=OWNER_ONLY)
        os.replace(temporary, path)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(folder: Path, stem: str) -> None:
    """Remove what a killed process has left under temporary names of this stem."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".{stem}.*.part"):
            remove_if_left_over(path)


def remove_if_left_over(path: Path) -> None:
    """Remove a file with a temporary name, unless the process that writes it is alive."""
    with contextlib.suppress(OSError, ValueError):
        if not is_alive(int(path.name.split(".")[-2])):
            path.unlink(missing_ok=True)


def is_alive(pid: int) -> bool:
    """Whether a process may still be at work. Windows keeps open files from being removed: there, none needs to be."""
    if os.name == "nt":
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def write_exclusively(path: Path, content: bytes, mode: int = 0o666) -> None:
    """Write a file that must not exist yet, down to the disk. A failed one is removed.

    Raises:
        OSError: FileExistsError and whatever the disk says.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags, mode)
    try:
        with os.fdopen(descriptor, "wb") as target:
            if mode == OWNER_ONLY and hasattr(os, "fchmod"):
                os.fchmod(descriptor, mode)  # whatever the umask
            target.write(content)
            target.flush()
            os.fsync(target.fileno())
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def place(content: bytes, output: Path, evidence_id: str, *, overwrite: bool, again: bool) -> tuple[Path, str | None]:
    """Put the bytes under the output's name in one step; returns the path used, and a warning if it is another.

    `again`: a run that was killed may have put them there already; then its file is the one.

    Raises:
        Failure: disk_after_paying.
    """
    other = _second_name(output, evidence_id)
    warning = f"{output} is taken by another file; the picture is saved as {other}"
    temporary = None
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        temporary = temporary_name(output.parent, f"{SKILL}-{evidence_id}")
        write_exclusively(temporary, content)
        if overwrite and not output.is_dir():
            os.replace(temporary, output)
            return output, None
        for path, said in ((output, None), (other, warning)):
            if _take_name(temporary, path) or (again and _holds(path, content)):
                return path, said
        raise FileExistsError(f"{other} is taken too")
    except OSError as error:
        raise Failure("disk_after_paying", f"the picture cannot be saved at {output}: {os_reason(error)}") from None
    finally:
        if temporary is not None:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def _second_name(output: Path, evidence_id: str) -> Path:
    """`<stem>-<evidence id>`, the stem shortened where a file system's 255 bytes would not hold it."""
    stem = output.stem
    while stem and len(os.fsencode(f"{stem}-{evidence_id}{output.suffix}")) > 255:
        stem = stem[:-1]
    return output.with_name(f"{stem}-{evidence_id}{output.suffix}")


def _holds(path: Path, content: bytes) -> bool:
    return path.is_file() and path.stat().st_size == len(content) and path.read_bytes() == content


def _take_name(temporary: Path, target: Path) -> bool:
    """Give a finished file its name; False where another file has it."""
    try:
        os.link(temporary, target)
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links: claim the name first
        try:
            os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        os.replace(temporary, target)
    return True


def checked_output(name: str, source: str, hint: str | None = None) -> Path:
    """The absolute path of the picture; `source` is where its name was given.

    Raises:
        Failure: invalid_output.
    """

    def refuse(what: str, hint: str | None = None) -> NoReturn:
        raise Failure("invalid_output", f"{source}: {what}", hint=hint)

    if not name or _CONTROL.search(name):
        refuse("must not be empty or hold control characters", hint)
    if name.endswith(("/", os.sep)) or os.path.isdir(name):
        refuse(f"{outside_text(name, 200)} is a folder; give a file name in it")
    path = Path(os.path.abspath(name))
    if path.suffix.lower() not in FORMATS:
        refuse(f"must end in one of {', '.join(FORMATS)}, got {shown(path.name)}")
    if not is_file_name(path.name):
        refuse("not a file name here, or longer than 255 bytes")
    return path


def slug_of(prompt: str) -> str:
    """The beginning of a prompt as part of a file name: letters and digits of any script, joined by `-`."""
    words = re.findall(r"\w+", unicodedata.normalize("NFC", without_surrogates(prompt[:400])).replace("_", " ").lower())
    slug = "-".join(words)[:40].strip("-")
    return slug if is_file_name(slug) else ""


def is_file_name(text: str) -> bool:
    """Whether this system can write the text as a file name."""
    try:
        return len(os.fsencode(text)) <= 255
    except UnicodeError:
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


def check_space(folder: Path, needed: int = MIN_FREE_BYTES) -> None:
    """Raise `disk` where a folder, or the nearest one above it that exists, cannot take `needed` bytes."""
    existing = folder
    while not os.path.lexists(existing) and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise Failure("disk", f"{existing} is not a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise Failure("disk", f"the folder {existing} is not writable")
    try:
        free = shutil.disk_usage(existing).free
    except OSError as error:
        raise Failure("disk", f"the folder {existing} cannot be examined: {os_reason(error)}") from None
    if free < needed:
        raise Failure("disk", f"only {free // 1024} KiB are free in {existing}; {needed // MIB} MiB are needed")


def check_writable(folder: Path, evidence_id: str) -> None:
    """Raise `disk` unless a file can really be written into the folder; leaves none behind."""
    check_space(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = temporary_name(folder, f"{SKILL}-{evidence_id}")
        write_exclusively(probe, b"")
        probe.unlink()
    except OSError as error:
        raise Failure("disk", f"the folder {folder} is not writable: {os_reason(error)}") from None


def file_hash(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    return hashlib.sha256(path.read_bytes()).hexdigest()
