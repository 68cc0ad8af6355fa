"""Build the command for one picture as one file: the same sources give the same bytes.

    python3 tests/standalone.py SCRIPTS FILE.pyz

A zip that Python runs (zipapp): `generate_image.py` as its `__main__.py`, its rooms and all providers. What the batch
needs stays out: it has a gallery template and tasks of its own beside it. Dates and order are fixed, as in package.py.
"""

from __future__ import annotations

import hashlib
import io
import sys
import zipapp
import zipfile
from pathlib import Path

from package import EARLIEST, MODE, UNIX

INTERPRETER = "/usr/bin/env python3"


def members(scripts: Path) -> dict[str, Path]:
    """The files of the archive by their names in it."""
    parts = [*scripts.glob("zimage/*.py"), *scripts.glob("providers/*.py")]
    found = {path.relative_to(scripts).as_posix(): path for path in parts}
    return {"__main__.py": scripts / "generate_image.py"} | {name: found[name] for name in sorted(found)}


def build(scripts: Path, target: Path) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as packed:
        for name, path in members(scripts).items():
            entry = zipfile.ZipInfo(name, EARLIEST)
            entry.create_system = UNIX
            entry.external_attr = MODE << 16
            packed.writestr(entry, path.read_bytes())
    archive.seek(0)
    target.parent.mkdir(parents=True, exist_ok=True)
    zipapp.create_archive(archive, target, INTERPRETER)  # copies the zip behind the line that names the interpreter
    target.chmod(0o755)


if __name__ == "__main__":
    scripts, target = map(Path, sys.argv[1:])
    build(scripts.resolve(), target)
    print(f"{target}: sha256 {hashlib.sha256(target.read_bytes()).hexdigest()}")
