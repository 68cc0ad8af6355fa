#!/usr/bin/env python3
"""Run the tests of the main things with the lowest and the highest versions that requirements.txt allows.

    versions.py FOLDER               the lowest with the oldest Python that is here, the highest with every one
    versions.py FOLDER python3.12    both with this Python

Each gets an environment of its own in FOLDER, which stays. Exit 1 where an installation or a test fails.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

TESTS = Path(__file__).resolve().parent
REQUIREMENTS = TESTS.parent / "requirements.txt"
TOOLS = ("pytest", "pytest-xdist", "responses", "hypothesis", "trustme")
OLDEST, NEWEST = 10, 20  # minor versions of Python that are looked for
SUITES = (
    "batch_input batch_results batch_run batch_state cli credentials faults files interruption recovery request "
    "schemas settle spreadsheets surroundings trust providers"
)


def pythons() -> list[str]:
    """The interpreters of this machine, the oldest first: those in PATH, and pyenv's."""
    found = []
    for minor in range(OLDEST, NEWEST):
        theirs = sorted(Path.home().glob(f".pyenv/versions/3.{minor}.*/bin/python"))
        name = str(theirs[-1]) if theirs else shutil.which(f"python3.{minor}")
        if name and not subprocess.run([name, "-c", "import venv, sqlite3, ssl"], capture_output=True).returncode:
            found.append(name)
    return found


def bounds() -> dict[str, tuple[str, str]]:
    """Name of a package that the skill needs to its lowest version, and to the whole requirement."""
    needed, _, _ = REQUIREMENTS.read_text(encoding="utf-8").partition("\n# Tests")
    return {found[1]: (found[2], found[0]) for found in re.finditer(r"(?m)^(\w+)>=([\d.]+),.*$", needed)}


def check(python: str, which: str, folder: Path) -> bool:
    """Install the `lowest` or `highest` versions for an interpreter, and run the tests with it."""
    version = subprocess.run([python, "-V"], capture_output=True, text=True, check=True).stdout.split()[1]
    place = folder / f"{version}-{which}"
    own = place / "bin" / "python"
    lowest = which == "lowest"
    needed = [f"{name}=={low}" if lowest else text for name, (low, text) in bounds().items()]
    pip = [str(own), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--upgrade"]
    steps: Sequence[Sequence[str]] = (
        [python, "-m", "venv", str(place)],
        [*pip, *needed, "--constraint", str(REQUIREMENTS), *TOOLS],
        [str(own), "-m", "pytest", "-q", "-n", "4", "-m", "not heavy", "-p", "no:cacheprovider", *suites()],
    )
    good = all(not subprocess.run(step, cwd=TESTS.parent, check=False).returncode for step in steps)
    freeze = [str(own), "-m", "pip", "list", "--format=freeze", "--disable-pip-version-check"]
    have = subprocess.run(freeze, capture_output=True, text=True, check=False).stdout.split() if own.exists() else []
    used = [line for line in have if line.partition("==")[0] in {*bounds(), *map(str.lower, bounds())}]
    print(f"{'passed' if good else 'FAILED'}: Python {version}, {which}: {' '.join(used)}", flush=True)
    return good


def suites() -> list[str]:
    return [str(TESTS / f"test_{name}.py") for name in SUITES.split()]


def main(folder: str, *chosen: str) -> int:
    found = chosen or pythons()
    pairs = [(name, "lowest") for name in (found if chosen else found[:1])] + [(name, "highest") for name in found]
    ends = [check(name, which, Path(folder)) for name, which in pairs]
    return 0 if ends and all(ends) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
