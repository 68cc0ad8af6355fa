"""Pack a folder into a zip: the same files give the same bytes, whoever packs them, when and where.

    python3 tests/package.py FOLDER FILE.zip

Nothing depends on the machine: names are sorted, every file has the format's earliest time and the same mode, and
nothing is compressed, since the bytes of a compressed file depend on the version of zlib. What is not the folder's own
stays out: hidden files, what Python leaves (`__pycache__`), and what runs in it wrote (`output`).
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from pathlib import Path

EARLIEST = (1980, 1, 1, 0, 0, 0)
UNIX = 3
MODE = 0o100644
LEFT_OUT = ("__pycache__", "output")


def members(folder: Path) -> dict[str, Path]:
    """The files to pack, by their names in the archive, which begin with the folder's own name."""
    found = {path.relative_to(folder.parent): path for path in folder.rglob("*") if path.is_file()}
    own = [name for name in found if not any(part.startswith(".") or part in LEFT_OUT for part in name.parts)]
    return {name.as_posix(): found[name] for name in sorted(own, key=Path.as_posix)}


def pack(folder: Path, archive: Path) -> None:
    archive.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(archive, "w") as packed:
        for name, path in members(folder).items():
            entry = zipfile.ZipInfo(name, EARLIEST)
            entry.create_system = UNIX
            entry.external_attr = MODE << 16
            packed.writestr(entry, path.read_bytes())


if __name__ == "__main__":
    folder, archive = map(Path, sys.argv[1:])
    pack(folder.resolve(), archive)
    print(f"{archive}: sha256 {hashlib.sha256(archive.read_bytes()).hexdigest()}")
