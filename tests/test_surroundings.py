"""Hostile surroundings: disks, rights, limits, clocks, locales, interpreters and links as nobody wishes them.

Each row of SURROUNDINGS is one surrounding, with how one picture and a batch of two end in it. Then it is mended, and
what the error advises is done, or the same command run again. Whatever the row, that is what holds: the error is one
and says what to do next, everything is paid at most once, in the end each picture is there, whole, and nothing outside
the folder has changed (`World.check`). Write by write a disk is tried in test_every_write.py.

The runs are forked off a process that can be put into any surrounding (tests/surroundings/sitecustomize.py).
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from batch_helpers import BATCH, SMALL
from conftest import GENERATE, IS_WARM, KEPT_VARIABLES, SCRIPTS, Result, Shell
from fault_server import FaultServer
from test_every_write import Till
from warm import Warm

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="surroundings of Linux"),
    pytest.mark.heavy,  # by its time
]

INJECTION = Path(__file__).resolve().parent / "surroundings"
YEAR = 365 * 86400.0
NOTHING: Mapping[str, str] = {}


@functools.cache
def adaptable_process() -> Warm:
    kept = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}
    process = Warm(kept | {"PYTHONPATH": str(INJECTION)})
    atexit.register(process.close)
    return process


@dataclass
class Flagged(Shell):
    flags: tuple[str, ...] = ()  # of the interpreter

    def command(self, *arguments: str) -> list[str]:
        return [sys.executable, *self.flags, str(self.script), *arguments]


class World:
    """A project with a home and something beside it, and the commands in it."""

    def __init__(self, folder: Path, till: Till) -> None:
        self.till = till
        self.top = folder
        self.outside = folder / "outside"
        self.outside.mkdir()
        (self.outside / "mine.txt").write_text("mine", encoding="utf-8")
        (folder / "project").mkdir()
        (folder / "home").mkdir()
        self.shell = Flagged(folder / "project", folder / "home", till.environment())
        self.around: dict[str, Any] = {}  # what the injection is told
        self.is_cold = not IS_WARM
        self.mends: list[Callable[[], object]] = []
        self.output = "sub/fox.png"
        self.out = "out"
        self.prompts = ["a fox"]

    @property
    def project(self) -> Path:
        return self.shell.folder

    @property
    def is_single(self) -> bool:
        return self.shell.script.name == GENERATE.name

    def arguments(self) -> tuple[str, ...]:
        if self.is_single:
            asked = ("--prompt", self.prompts[0], "--output", self.output, "--size", SMALL)
            return (*asked, "--timeout", "15", "--print-response")
        rows = [json.dumps({"prompt": prompt, "size": SMALL}) + "\n" for prompt in self.prompts]
        (self.project / "rows.jsonl").write_text("".join(rows), encoding="utf-8")
        pace = ("--rpm", "0", "--concurrency", "1")
        return ("--input", "rows.jsonl", "--output-dir", self.out, *pace, "--timeout", "15")

    def run(self, *arguments: str) -> Result:
        env = dict(self.shell.env)
        if self.around:
            self.shell.env |= {"ZIMAGE_TEST_AROUND": json.dumps(self.around)}
        try:
            if not self.is_cold:
                return self.shell.run_forked(adaptable_process(), *arguments)
            if self.around:
                self.shell.env["PYTHONPATH"] = str(INJECTION)
            return self.shell.run_cold(*arguments)
        finally:
            self.shell.env = env

    def mend(self) -> None:
        self.around = {}
        for mend in reversed(self.mends):
            mend()
        self.mends.clear()

    def paid(self) -> int:
        return sum(self.till.times(prompt) for prompt in self.prompts)


class End(NamedTuple):
    """How a command ends: exit code, and the error's code."""

    exit: int
    code: str = ""


SAVED = End(0)
DISK = End(9, "disk")
NOT_YET = End(7, "paid_not_downloaded")
NO_PACKAGE = End(2, "missing_package")
CRAMPED = End(2, "machine_limit")
Change = Callable[[World], object]


@dataclass(frozen=True)
class Surrounding:
    name: str
    change: Change
    one: End | None = SAVED  # None: no matter of its
    many: End | None = SAVED
    look: tuple[int, int, int] | None = None  # exit codes of --recover, --status, --gallery-only, once all is saved


def around(**settings: Any) -> Change:
    return lambda world: world.around.update(settings)


def refusing(code: str, *calls: str) -> Change:
    return around(refuse=dict.fromkeys(calls, code))


def env(**variables: str) -> Change:
    def change(world: World) -> None:
        before = world.shell.env
        world.shell.env = before | variables
        world.mends.append(lambda: setattr(world.shell, "env", before))

    return change


def read_only(name: str) -> Change:
    """A folder of the project that may not be changed, for somebody who is not above the law."""

    def change(world: World) -> None:
        world.around["powers"] = False
        folder = world.project / name
        folder.mkdir(parents=True, exist_ok=True)
        mode = folder.stat().st_mode
        folder.chmod(0o555)
        world.mends.append(lambda: folder.chmod(mode))

    return change


def clock_jumps(by: float) -> Change:
    """While the first paid call is out."""

    def change(world: World) -> None:
        file = world.top / "clock"
        world.around["clock"] = str(file)
        world.till.at_first_payment(lambda: file.write_text(str(by), encoding="ascii"))

    return change


def clock_is(by: float) -> Change:
    def change(world: World) -> None:
        world.around["clock"] = str(world.top / "clock")
        (world.top / "clock").write_text(str(by), encoding="ascii")

    return change


def in_call(change: Change) -> Change:
    """A change that comes while the first paid call is out."""
    return lambda world: world.till.at_first_payment(lambda: change(world))


def linked(name: str) -> Change:
    """A folder of the project is a link to one outside that is the user's own."""

    def change(world: World) -> None:
        elsewhere = world.top / "elsewhere" / name
        elsewhere.mkdir(parents=True)
        folder = world.project / name
        folder.mkdir(parents=True, exist_ok=True)
        folder.rename(elsewhere)
        folder.symlink_to(elsewhere)
        world.mends += [lambda: elsewhere.rename(folder), folder.unlink]

    return change


def link_at(name: str) -> Change:
    """A link to a file of the user's, which lies elsewhere."""

    def change(world: World) -> None:
        path = world.project / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(world.outside / "mine.txt")
        world.mends.append(path.unlink)

    return change


def project_is_a_link(world: World) -> None:
    real = world.project.rename(world.top / "real")
    world.project.symlink_to(real)


def working_folder_vanishes(world: World) -> None:
    shutil.rmtree(world.project)
    world.mends.append(lambda: world.project.mkdir(exist_ok=True))


def home_is_a_loop(world: World) -> None:
    (world.outside / "loop").symlink_to("loop")
    env(HOME=str(world.outside / "loop"))(world)


def home_is_closed(world: World) -> None:
    world.around["powers"] = False
    world.shell.home.chmod(0)
    world.mends.append(lambda: world.shell.home.chmod(0o700))


def cold(
    *flags: str, shadow: Mapping[str, str] = NOTHING, prompt: str = "", variables: Mapping[str, str] = NOTHING
) -> Change:
    """A process of its own: flags and variables of the interpreter, and modules that lie on PYTHONPATH."""

    def change(world: World) -> None:
        world.is_cold = True
        world.shell.flags = flags
        world.prompts = [prompt or each for each in world.prompts]
        for name, text in shadow.items():
            path = world.top / "shadow" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        env(**variables, **({"PYTHONPATH": str(world.top / "shadow")} if shadow else {}))(world)
        world.mends.append(lambda: setattr(world.shell, "flags", ()))

    return change


ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
FOX = "一只狐狸"
ENDING = "import os\nos.write(2, b'a decoy was loaded')\nos._exit(99)\n"
STANDARD = """calendar code csv datetime email enum hashlib html http json logging queue random secrets select
    socket sqlite3 string subprocess test threading time types typing uuid zlib"""

SURROUNDINGS = [
    # What file systems cannot, and people may not
    Surrounding("no chmod: EPERM", refusing("EPERM", "fchmod"), look=(0, 0, 0)),
    Surrounding("no chmod: ENOTSUP", refusing("ENOTSUP", "fchmod")),
    Surrounding("no locks: ENOLCK", refusing("ENOLCK", "flock"), many=DISK, look=(0, 0, 0)),
    Surrounding("no locks: ENOTSUP", refusing("ENOTSUP", "flock"), many=DISK),
    Surrounding("no hard links: EPERM", refusing("EPERM", "link"), look=(0, 0, 0)),
    Surrounding("no hard links: ENOTSUP", refusing("ENOTSUP", "link")),
    Surrounding("no symbolic links: EPERM", refusing("EPERM", "symlink")),
    Surrounding("no fsync of folders: EINVAL", refusing("EINVAL", "fsync of folders")),
    Surrounding("no fsync of folders: EIO", refusing("EIO", "fsync of folders"), DISK, DISK, (9, 0, 9)),
    Surrounding("no chmod, no links, no fsync of folders", refusing("EPERM", "fchmod", "link", "fsync of folders")),
    Surrounding("free space cannot be told: ENOSYS", refusing("ENOSYS", "statvfs"), look=(0, 0, 0)),
    Surrounding("free space cannot be told: EIO", refusing("EIO", "statvfs"), DISK, DISK, (9, 0, 0)),
    Surrounding("a read-only project", read_only("."), DISK, DISK, (0, 0, 0)),
    Surrounding("a read-only output folder", read_only("output"), DISK, None, (0, 0, 0)),
    Surrounding("a read-only folder of the picture", read_only("sub"), DISK, None, (9, 0, 0)),
    Surrounding("a read-only batch folder", read_only("out"), None, DISK, (0, 0, 9)),
    Surrounding("umask 0", around(umask=0)),
    Surrounding("umask 077", around(umask=0o077)),
    Surrounding("umask 0777", around(umask=0o777, powers=False), DISK, DISK, (9, 0, 9)),
    # Limits
    Surrounding("16 open files", around(limits={"NOFILE": 16}), look=(0, 0, 0)),
    Surrounding("32 open files", around(limits={"NOFILE": 32})),
    Surrounding("no thread", around(threads=0), CRAMPED, CRAMPED, (2, 2, 2)),
    Surrounding("1 thread and no more", around(threads=1), SAVED, CRAMPED, (0, 0, 0)),
    *(Surrounding(f"{n} threads and no more", around(threads=n)) for n in range(2, 7)),
    Surrounding("no memory to decode", around(memory="load"), NOT_YET, End(1, "incomplete"), (7, 0, 0)),
    # Clocks
    Surrounding("a clock that goes ten years back in the paid call", clock_jumps(-10 * YEAR)),
    Surrounding("a clock that goes ten years on in the paid call", clock_jumps(10 * YEAR)),
    Surrounding("a clock that is ten years behind", clock_is(-10 * YEAR), look=(0, 0, 0)),
    Surrounding("a clock that is ten years ahead", clock_is(10 * YEAR), look=(0, 0, 0)),
    # Environment
    Surrounding("TMPDIR missing", env(TMPDIR="/nowhere", TEMP="/nowhere", TMP="/nowhere")),
    Surrounding("HOME empty", env(HOME="")),
    Surrounding("HOME missing", env(HOME="/nowhere/at/all"), look=(0, 0, 0)),
    Surrounding("HOME a file", env(HOME=__file__)),
    Surrounding("HOME relative", env(HOME="home")),
    Surrounding("HOME a link to itself", home_is_a_loop),
    Surrounding("HOME unreadable", home_is_closed, look=(0, 0, 0)),
    Surrounding("variables of 100 kB", env(LONG="x" * 100_000, NO_PROXY="y," * 50_000)),
    Surrounding("our variables empty", env(OUTPUT_DIR="", ZIMAGE_TRUSTED_HOSTS="", DASHSCOPE_HTTP_BASE_URL="")),
    # Links
    Surrounding("the output folder is a link", linked("output"), SAVED, None),
    Surrounding("the picture's folder is a link", linked("sub"), SAVED, None),
    Surrounding("the batch folder is a link", linked("out"), None, SAVED, (0, 0, 0)),
    Surrounding(
        "the folder of evidence is a link", linked("output/alicloud-ai-image-zimage-turbo/evidence"), SAVED, None
    ),
    Surrounding("the folder above all is a link", project_is_a_link, look=(0, 0, 0)),
    Surrounding("the picture's name is a link", link_at("sub/fox.png"), End(2, "output_exists"), None, (0, 0, 0)),
    Surrounding("the picture's name becomes a link in the paid call", in_call(link_at("sub/fox.png")), SAVED, None),
    Surrounding(
        ".gitignore is a link", link_at("output/alicloud-ai-image-zimage-turbo/evidence/.gitignore"), SAVED, None
    ),
    Surrounding(".gitignore of the batch is a link", link_at("out/.gitignore"), None, SAVED),
    Surrounding("the batch's pictures are a link", linked("out/images"), None, End(2, "invalid_output")),
    # What happens meanwhile
    Surrounding("the working folder vanishes in the paid call", in_call(working_folder_vanishes), SAVED, None),
    # Interpreters and locales
    Surrounding("python -OO", cold("-OO")),
    Surrounding("python -I", cold("-I"), SAVED, None),
    Surrounding("python -S", cold("-S"), NO_PACKAGE, NO_PACKAGE),
    Surrounding("python -i", cold("-i"), SAVED, None),
    Surrounding("python -X dev, warnings are errors", cold("-X", "dev", "-bb", "-W", "error")),
    Surrounding("no bytecode can be written", cold(variables={"PYTHONPYCACHEPREFIX": "/proc/nowhere"}), SAVED, None),
    Surrounding("a locale of ASCII", cold(prompt=FOX, variables=ASCII), SAVED, None),
    Surrounding("a locale of ASCII, and a batch", cold(variables=ASCII), None, SAVED),
    Surrounding("streams in UTF-16", cold(prompt=FOX, variables={"PYTHONIOENCODING": "utf-16"}), SAVED, None),
    Surrounding("the standard library on PYTHONPATH", cold(shadow={f"{name}.py": ENDING for name in STANDARD.split()})),
    Surrounding("an empty `requests` on PYTHONPATH", cold(shadow={"requests/__init__.py": ""}), NO_PACKAGE, None),
    Surrounding("a folder `PIL` on PYTHONPATH", cold(shadow={"PIL/notes.txt": ""}), SAVED, None),
    Surrounding("a sitecustomize that fails", cold(shadow={"sitecustomize.py": "1 / 0\n"}), SAVED, None),
]


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_told(world: World, result: Result, end: End) -> None:
    """It ends as the row says, and what it tells of the money is true."""
    assert result.code == end.exit, (result.stdout[-1500:], result.stderr[-1500:])
    assert "decoy" not in result.stderr, result.stderr
    assert "Traceback" not in result.stderr or "sitecustomize" in result.stderr, result.stderr
    if not end.exit:
        return
    result.assert_one_line_of_advice()
    error = result.json["error"]
    assert (error["code"], error["exit_code"]) == (end.code, end.exit)
    if world.is_single:
        assert (error["billed"] == "no") == (world.paid() == 0), error


def pictures(world: World, last: Result) -> dict[str, bytes]:
    """The pictures that the last run tells of, by prompt."""
    if world.is_single:
        return {world.prompts[0]: Path(last.json["image_path"]).read_bytes()}
    lines = (world.project / world.out / "results.jsonl").read_text(encoding="utf-8").splitlines()
    entries = [entry for entry in map(json.loads, lines) if entry["state"] == "saved"]
    return {entry["prompt"]: Path(entry["image_path"]).read_bytes() for entry in entries}


def leftovers(world: World) -> list[str]:
    names = [Path(name) for name in world.shell.files()]
    return [
        str(name)
        for name in names
        if name.suffix in (".part", ".picture") or name.name.endswith(("-wal", "-shm", "-journal", ".reserve"))
    ]


@pytest.fixture
def world(tmp_path: Path) -> Iterator[World]:
    with FaultServer() as server:
        world = World(tmp_path, Till(server))
        yield world
        world.mend()


def table(*columns: str) -> pytest.MarkDecorator:
    """The rows to which all these columns apply."""
    rows = [row for row in SURROUNDINGS if all(getattr(row, column) is not None for column in columns)]
    return pytest.mark.parametrize("row", rows, ids=[row.name for row in rows])


def play(world: World, change: Change, end: End) -> Result:
    """In the surrounding, and again where it is mended: what no surrounding may break."""
    before = tree(world.outside) | tree(world.shell.home)
    change(world)
    arguments = world.arguments()
    result = world.run(*arguments)
    assert_told(world, result, end)
    world.mend()
    again = result
    if result.code:
        error = result.json["error"]
        again = world.run(*(shlex.split(error["next_command"])[2:] if "next_command" in error else arguments))
    assert again.code == 0, (again.stdout[-1500:], again.stderr[-1500:])
    assert {prompt: world.till.times(prompt) for prompt in world.prompts} == dict.fromkeys(world.prompts, 1)
    assert pictures(world, again) == {prompt: world.till.picture(prompt) for prompt in world.prompts}
    assert leftovers(world) == []
    assert tree(world.outside) | tree(world.shell.home) == before
    return again


@pytest.mark.smoke
@table("one")
def test_one_picture(world: World, row: Surrounding) -> None:
    assert row.one
    play(world, row.change, row.one)


@table("many")
def test_a_batch(world: World, row: Surrounding) -> None:
    assert row.many
    world.shell.script = BATCH
    world.prompts = ["a fox", "an owl"]
    play(world, row.change, row.many)


@table("look")
def test_what_is_paid_for_is_looked_at_and_fetched_again(world: World, row: Surrounding) -> None:
    """A recovery, the status and the gallery of what was made while all was well."""
    one = world.run(*world.arguments())
    world.shell.script = BATCH
    many = world.run(*world.arguments())
    assert (one.code, many.code) == (0, 0)
    Path(one.json["image_path"]).unlink()
    thumb = world.project / "out" / "thumbs" / "0000" / "000000.jpg"
    thumb.unlink()
    before = tree(world.outside) | tree(world.shell.home)
    row.change(world)
    ends, told = [], []
    for script, *arguments in (
        (GENERATE, "--recover", one.json["evidence_path"], "--print-response"),
        (BATCH, "--status", "out"),
        (BATCH, "--gallery-only", "out"),
    ):
        world.shell.script = script
        result = world.run(*map(str, arguments))
        assert "Traceback" not in result.stderr, result.stderr
        if result.code:
            result.assert_one_line_of_advice()
            told.append(result.json["error"])
        elif "--recover" in arguments:
            assert Path(result.json["image_path"]).read_bytes() == world.till.picture("a fox")
        ends.append(result.code)
    world.mend()
    assert tuple(ends) == row.look, told
    assert world.paid() == 2
    if ends[0] not in (0, 2):
        assert (told[0]["exit_code"], told[0]["billed"]) == (ends[0], "yes"), told
    assert tree(world.outside) | tree(world.shell.home) == before


def test_the_clock_of_these_tests_is_wrong(world: World) -> None:
    clock_is(-10 * YEAR)(world)
    evidence = json.loads(Path(world.run(*world.arguments()).json["evidence_path"]).read_text(encoding="utf-8"))
    assert int(evidence["started_at"][:4]) < 2020


@pytest.mark.parametrize("most", range(4, 16))
@pytest.mark.parametrize("script", [GENERATE, BATCH], ids=["one", "many"])
def test_however_few_files_may_be_open(world: World, script: Path, most: int) -> None:
    """Which step meets the limit depends on what the interpreter holds open; what holds for all is held here."""
    world.shell.script = script
    around(limits={"NOFILE": most})(world)
    result = world.run(*world.arguments())
    assert "Traceback" not in result.stderr, result.stderr
    if result.code:
        result.assert_one_line_of_advice()
        assert result.json["error"]["code"] != "internal_error", result.json
    world.mend()
    again = result
    for _ in range(2):
        error = again.json.get("error", {})
        advised = shlex.split(error["next_command"])[2:] if "next_command" in error else world.arguments()
        again = world.run(*advised) if again.code else again
    assert (again.code, world.paid()) == (0, 1), (result, again)
    assert pictures(world, again) == {prompt: world.till.picture(prompt) for prompt in world.prompts}


@pytest.mark.parametrize("suspended_s", [0.5, 6.0], ids=["for a moment", "beyond its time"])
def test_what_is_paid_while_a_run_is_suspended_is_kept(world: World, suspended_s: float) -> None:
    """The answer arrives whole meanwhile. Beyond its time the free download may be left to another run: which of its
    threads wakes first decides."""
    paid = threading.Event()
    world.till.at_first_payment(paid.set)
    process = world.shell.start(*world.arguments(), "--timeout", "5")
    assert paid.wait(30)
    process.send_signal(signal.SIGSTOP)
    time.sleep(suspended_s)
    process.send_signal(signal.SIGCONT)
    result = world.shell.finish(process)
    assert_told(world, result, NOT_YET if suspended_s > 5 and result.code else SAVED)
    if result.code:
        result = world.run(*shlex.split(result.error["next_command"])[2:])
    assert (result.code, world.paid()) == (0, 1)
    assert pictures(world, result) == {"a fox": world.till.picture("a fox")}


@pytest.mark.parametrize("before", ["evidence", "connection"])
def test_a_run_that_was_suspended_before_it_paid_does_not_pay_too_late(world: World, before: str) -> None:
    """What cannot be waited for any more is not bought: its outcome would not be known."""
    world.around["sleeps"] = {"before": before, "seconds": 3.0}
    result = world.run(*world.arguments(), "--timeout", "2")
    assert_told(world, result, End(6, "too_slow" if before == "evidence" else "unreachable"))
    assert world.paid() == 0


def test_a_batch_is_one_by_whatever_path(world: World) -> None:
    """While it runs, its folder is known again: as it is written, through `..`, and through links to it or above it."""
    world.shell.script = BATCH
    paid, go_on = threading.Event(), threading.Event()
    world.till.at_first_payment(lambda: go_on.wait(30))
    world.till.at_first_payment(paid.set)  # the last one comes first
    process = world.shell.start(*world.arguments())
    assert paid.wait(30)
    (world.project / "link").symlink_to("out")
    (world.top / "above").symlink_to(world.project)
    for way in ["out/", "out/../out", "link", "../above/out", str(world.top / "above" / "link" / "." / ".." / "out")]:
        world.out = way
        result = world.run(*world.arguments())
        assert (result.code, result.error["code"]) == (2, "already_running"), way
        assert world.run("--status", way).json["running"] is True
    go_on.set()
    assert world.shell.finish(process).code == 0
    assert world.paid() == 1


@pytest.mark.parametrize("name", ["my skill", 'it\'s 100% "new" $HOME `id` 技能', "a#b?c&d;e", "-rf"], ids=ascii)
def test_a_skill_in_a_folder_of_any_name(world: World, name: str) -> None:
    """Read-only, too. What it advises works in a shell, and so do its names of files and of databases."""
    scripts = shutil.copytree(SCRIPTS, world.top / name / "scripts")
    for path in [*scripts.rglob("*"), scripts]:
        path.chmod(0o555 if path.is_dir() else 0o444)
    project = world.project.rename(world.top / f"{name} project")
    world.shell.folder, world.shell.script = project, scripts / "generate_image.py"
    world.is_cold = True
    world.around["powers"] = False
    world.output = f"./{name}/fox.png"
    in_call(read_only(name))(world)
    result = world.run(*world.arguments())
    assert_told(world, result, End(9, "disk_after_paying"))
    world.mend()
    recovered = subprocess.run(
        ["sh", "-c", result.error["next_command"]], cwd=world.top, env=world.shell.environment(), capture_output=True
    )
    assert (recovered.returncode, world.paid()) == (0, 1), recovered
    assert (project / name / "fox.png").read_bytes() == world.till.picture("a fox")
    world.shell.script = scripts / "generate_batch.py"
    world.prompts, world.out = ["an owl"], f"./{name} of many"
    result = world.run(*world.arguments())
    assert_told(world, result, SAVED)
    assert pictures(world, result) == {"an owl": world.till.picture("an owl")}
    assert world.run("--status", world.out).json["saved"] == 1


def test_a_key_file_that_is_not_readable_is_named(world: World) -> None:
    file = world.shell.home / ".dashscope" / "api_key"
    file.parent.mkdir()
    file.write_text(world.shell.env.pop("DASHSCOPE_API_KEY"), encoding="utf-8")
    file.chmod(0)
    world.around["powers"] = False
    result = world.run(*world.arguments())
    assert_told(world, result, End(3, "key_missing"))
    assert str(file) in result.error["message"]
    file.chmod(0o600)
    assert world.run(*world.arguments()).code == 0
