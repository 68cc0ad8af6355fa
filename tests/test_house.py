"""The house: imports run one way, ground first, and no stranger's package is loaded instead of ours."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conftest import SCRIPTS, SKILL, Shell
from mock_server import MockServer

# Each layer imports from those before it only; within one, nobody imports another.
LAYERS = [
    ["contract", "endpoint", "facts", "quota", "quoting", "weights"],
    ["outside"],
    ["errors", "page"],
    ["calls", "model", "together"],
    ["placement"],
    ["tls", "proxy"],
    ["settings", "paths", "waiting", "registry", "formats", "workflow"],
    ["provider"],
    ["files", "settle", "memory", "wire", "words", "traces"],
    ["codes", "account"],
    ["keys", "console", "request", "answers"],
    ["transport", "servers"],
    ["trust"],
    ["evidence", "picture"],
    ["task", "download", "plan"],
    ["options"],
    ["check", "make"],
    ["recover", "trial"],
    ["batch.contract"],
    ["batch.tables", "batch.workbook"],
    ["batch.inputs"],
    ["batch.rows", "batch.names", "batch.folder", "batch.pacer", "batch.forecast", "batch.ending", "batch.options"],
    ["batch.examine", "batch.moves", "batch.jobs"],
    ["batch.plan", "batch.results"],
    ["batch.journal"],
    ["batch.quote", "batch.gallery", "batch.progress", "batch.tasks"],
    ["batch.work"],
    ["batch.fleet"],
    ["batch.run", "batch.resume"],
    ["batch.commands"],
]
LONGEST = 400
# What a provider may know of the house: nothing that waits, sends, keeps or decides.
FOR_PROVIDERS = {
    "answers",
    "calls",
    "codes",
    "contract",
    "endpoint",
    "errors",
    "formats",
    "keys",
    "model",
    "outside",
    "placement",
    "provider",
    "quota",
    "quoting",
    "request",
    "servers",
    "settings",
    "task",
    "together",
    "traces",
    "weights",
    "words",
    "workflow",
}

ROOMS = {
    ".".join(path.relative_to(SCRIPTS / "zimage").with_suffix("").parts): path
    for path in sorted((SCRIPTS / "zimage").rglob("*.py"))
}
PROVIDER_FILES = sorted((SCRIPTS / "providers").glob("*.py"))


def imports(node: ast.AST) -> Iterator[str]:
    """The modules that are imported below the node, wherever, but not those for the type checker alone."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            for other in child.orelse:
                yield from imports(other)
        elif isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0 and child.module, "imports here are absolute"
            yield from [f"{child.module}.{alias.name}" for alias in child.names]
        else:
            yield from imports(child)


def rooms_of(path: Path) -> set[str]:
    """The rooms that a file imports from, by their names below zimage."""
    found = set()
    for name in imports(ast.parse(path.read_text(encoding="utf-8"))):
        first, _, rest = name.partition(".")
        if first == "zimage":
            (room,) = [room for room in (rest, rest.rpartition(".")[0]) if room in ROOMS][:1] or [f"nothing: {name}"]
            found.add(room)
    return found


GRAPH = {room: rooms_of(path) for room, path in ROOMS.items()}
LEVEL = {room: number for number, layer in enumerate(LAYERS) for room in layer}


def test_every_room_has_its_layer() -> None:
    assert sorted(room for layer in LAYERS for room in layer) == sorted(ROOMS)


@pytest.mark.parametrize("room", ROOMS)
def test_imports_run_one_way(room: str) -> None:
    """So there is no circle either: each import goes to a lower layer."""
    assert {other for other in GRAPH[room] if LEVEL[other] >= LEVEL[room]} == set()


@pytest.mark.smoke
def test_the_ground_knows_nobody() -> None:
    assert {room: GRAPH[room] for room in LAYERS[0]} == {room: set() for room in LAYERS[0]}


def test_one_picture_knows_nothing_of_many() -> None:
    assert [room for room in ROOMS if not room.startswith("batch.") and any("batch." in to for to in GRAPH[room])] == []
    assert not any(room.startswith("batch.") for room in rooms_of(SCRIPTS / "generate_image.py"))


@pytest.mark.parametrize("path", PROVIDER_FILES, ids=lambda path: path.stem)
def test_providers_know_the_ground_and_not_each_other(path: Path) -> None:
    assert rooms_of(path) <= FOR_PROVIDERS
    strangers = {name.partition(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")))}
    assert not strangers & {"providers", "generate_image", "generate_batch"}


def test_nobody_imports_a_provider() -> None:
    for path in [*ROOMS.values(), *SCRIPTS.glob("generate_*.py")]:
        names = {name.partition(".")[0] for name in imports(ast.parse(path.read_text(encoding="utf-8")))}
        assert "providers" not in names, path.name


@pytest.mark.parametrize("room", ROOMS)
def test_no_room_is_too_long_to_read(room: str) -> None:
    assert len(ROOMS[room].read_text(encoding="utf-8").splitlines()) <= LONGEST


def test_nothing_needs_an_init_file() -> None:
    assert list(SKILL.rglob("__init__.py")) == []  # installers drop files whose names begin with _


# Strangers of the same name -------------------------------------------------------------------------------------------

LOADED = "import os\nos.write(2, b'a decoy was loaded')\nos._exit(99)\n"
COMMANDS = {
    "generate_image.py": ("--prompt", "a fox", "--size", "512x512", "--dry-run"),
    "generate_batch.py": ("--prompt", "a fox", "--output-dir", "out", "--dry-run"),
    "fill_template.py": ("--list",),
    "mock_server.py": ("--fault", "list"),
}


@pytest.fixture
def decoys(shell: Shell) -> Path:
    """Packages with our names in the working folder and on PYTHONPATH, which end whoever loads them."""
    elsewhere = shell.home / "elsewhere"
    for folder in (shell.folder, elsewhere):
        for name in ("zimage", "zimage/batch", "providers", "zimage_mock"):
            (folder / name).mkdir(parents=True)
            (folder / name / "__init__.py").write_text(LOADED)
        for name in ("providers/dashscope.py", "zimage/contract.py", "zimage_mock/server.py"):
            (folder / name).write_text(LOADED)
    shell.env["PYTHONPATH"] = os.pathsep.join([str(elsewhere), ""])
    return elsewhere


def assert_ran(shell: Shell, *words: str) -> None:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=shell.folder,
        env=shell.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    assert b"decoy" not in done.stderr and done.stdout


@pytest.mark.parametrize("script", COMMANDS)
@pytest.mark.parametrize("how", ["plain", "safe path", "isolated", "symlink"])
def test_no_package_of_the_same_name_is_loaded_instead(shell: Shell, decoys: Path, script: str, how: str) -> None:
    path = SCRIPTS / script
    flags = ["-I"] if how == "isolated" else []
    if how == "safe path":
        shell.env["PYTHONSAFEPATH"] = "1"
    if how == "symlink":
        if os.name == "nt":
            pytest.skip("links need a right there")
        path = shell.folder / "linked.py"
        path.symlink_to(SCRIPTS / script)
    assert_ran(shell, *flags, str(path), *COMMANDS[script])


def test_a_picture_is_made_among_decoys(shell: Shell, decoys: Path, mock: MockServer) -> None:
    """With everything that is imported late, too."""
    shell.use(mock)
    assert shell.run("--prompt", "a fox", "--size", "512x512", "--output", "fox.png").code == 0
    shutil.rmtree(decoys)
