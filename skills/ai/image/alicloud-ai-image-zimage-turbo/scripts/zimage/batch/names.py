"""Names in the folder: where images, thumbnails and evidence lie."""

from __future__ import annotations

import os
import posixpath
import re
import types
import unicodedata
from pathlib import Path
from typing import NoReturn

from zimage.batch.contract import EVIDENCE, FOLDER_SIZE, IMAGES, OWN_FILES, OWN_NAMES, REPLACED, THUMBS
from zimage.contract import FORMATS
from zimage.errors import Failure, Problem, raise_problems
from zimage.outside import outside_text, without_surrogates
from zimage.paths import checked_output, is_file_name, slug_of
from zimage.plan import format_problems
from zimage.request import ImageRequest


def numbered(number: int) -> str:
    return f"{number:06d}"


def spread(number: int) -> str:
    """The folder of a file with that number, among many."""
    return f"{number // FOLDER_SIZE:04d}"


def default_output_name(number: int, name: str) -> str:
    """Path in the folder of an image that its row gives none: its number, and a slug of the row's id or prompt."""
    return among_many(IMAGES, number, "-".join(filter(None, (numbered(number), slug_of(name)))) + ".png")


def replaced_name(number: int, output: str) -> str:
    """Path in the folder of an image whose row was changed: its number, and the beginning of its name before."""
    stem, suffix = posixpath.splitext(posixpath.basename(output))
    return among_many(REPLACED, number, f"{numbered(number)}-{stem.removeprefix(f'{numbered(number)}-')[:40]}{suffix}")


def among_many(folder: str, number: int, file: str) -> str:
    return f"{folder}/{file}" if number < FOLDER_SIZE else f"{folder}/{spread(number)}/{file}"


# A sign of three bytes, where file names can hold it.
LONGEST_DEFAULT_NAME = replaced_name(999_999, ("雪" if is_file_name("雪") else "x") * 40 + ".webp")


def evidence_name(number: int) -> str:
    return f"{EVIDENCE}/{spread(number)}/{numbered(number)}.json"


def is_held(folder: Path, number: int) -> bool:
    """Whether the bytes of a picture were handed over, and wait beside its evidence for the next run to save them."""
    return (folder / evidence_name(number)).with_suffix(".picture").exists()


def path_in(folder: Path, name: str) -> str:
    """The path of what has a name in the folder. pathlib is too slow for each row of a large batch."""
    return f"{folder}{os.sep}{name.replace('/', os.sep)}"


def thumb_name(number: int) -> str:
    return f"{THUMBS}/{spread(number)}/{numbered(number)}.jpg"


def variant_output(output: str, variant: int) -> str:
    """The file of a variant: the row's own name for the first, with a number behind it for the others."""
    stem, suffix = posixpath.splitext(output)
    return f"{stem}-{variant + 1}{suffix}" if variant else output


def output_key(output: str) -> str:
    """The same for all names that some file system takes for one: case and Unicode form are folded."""
    return unicodedata.normalize("NFC", unicodedata.normalize("NFD", output).casefold())


def is_inside(path: str, folder: str, flavour: types.ModuleType = os.path) -> bool:
    """Whether a real path is that of a folder or lies below it; `flavour` is posixpath or ntpath."""
    try:
        return bool(flavour.normcase(flavour.commonpath([path, folder])) == flavour.normcase(folder))
    except ValueError:  # another drive, behind a junction
        return False


def name_in(folder: str, path: str, flavour: types.ModuleType = os.path) -> str:
    """The path of a file in a folder, with `/`; the whole path where it lies on another drive."""
    try:
        relative = str(flavour.relpath(path, folder))
    except ValueError:
        relative = path
    return relative.replace(flavour.sep, "/")


class Names:
    """Checks the outputs that rows name. Folders are examined once each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._real = os.path.realpath(folder)
        self._inside: dict[str, bool] = {}

    def checked(self, output: str, request: ImageRequest) -> str:
        """The output as a path in the folder, with `/`.

        Raises:
            Failure: invalid_output.
        """

        def refuse(what: str) -> NoReturn:
            raise Failure("invalid_output", f"output: {what}")

        if "\\" in output or output != output.strip() or output.endswith("/"):
            refuse("must be a file name without backslashes, and not begin or end with blanks")
        if output.startswith(("/", "~/")) or re.match("[A-Za-z]:", output) or ".." in output.split("/"):
            refuse("must be a path in the output folder, without .. and not absolute")
        path = checked_output(str(self.folder / output), "output")
        raise_problems([Problem(p.code, p.text.replace("--output", "output")) for p in format_problems(request, path)])
        name = posixpath.normpath(output)
        if OWN_NAMES.match(output_key(name)):
            refuse(f"{outside_text(name, 100)} is a name that the batch gives itself")
        if not self.stays_inside(posixpath.dirname(name)):
            refuse(f"{outside_text(name, 100)} leaves the output folder through a symbolic link")
        return name

    def holds(self, name: str) -> bool:
        """Whether a path that a database names is that of a picture in the folder."""
        parent, file = posixpath.split(name)
        return (
            posixpath.splitext(file)[1].lower() in FORMATS
            and posixpath.normpath(name) == name
            and not re.match("/|[A-Za-z]:|[.][.]/", name)
            and name == without_surrogates(name)
            and not re.search(r"[\\\x00-\x1f\x7f]", name)
            and not OWN_FILES.match(output_key(name))
            and self.stays_inside(parent)
        )

    def linked_folders(self, own: str) -> list[Path]:
        """Symbolic links in one of the batch's own folders that are folders, or have the name of one."""
        try:
            with os.scandir(self.folder / own) as entries:
                links = [entry for entry in entries if entry.is_symlink()]
                return [Path(entry.path) for entry in links if entry.is_dir() or entry.name.isdecimal()]
        except OSError:
            return []

    def stays_inside(self, parent: str) -> bool:
        """Whether a folder below the output folder really lies there."""
        if parent not in self._inside:
            real = os.path.realpath(self.folder / parent)
            self._inside[parent] = is_inside(real, self._real)
        return self._inside[parent]
