"""Real file systems that fail: full to the last byte, out of inodes or quota, read-only in the middle, mounted twice.

They are mounted in a namespace of this process, so nothing stays where it is killed. Needs root; else see
test_surroundings.py and test_every_write.py, which play the same without.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from batch_helpers import BATCH
from conftest import Result
from fault_server import Answer, FaultServer, Received, file
from test_every_write import Till
from test_surroundings import DISK, End, World, assert_told, leftovers, pictures

SYSTEM = ctypes.CDLL(None, use_errno=True)
CLONE_NEWNS, MNT_DETACH = 0x20000, 2
KIB, MIB = 1024, 1024 * 1024
SIZE = 24 * MIB
ENOUGH = 300  # inodes


@pytest.fixture(scope="session")
def own_mounts() -> None:
    """From here on, what this process mounts is seen by itself and its children only, and ends with them."""
    if sys.platform != "linux" or os.geteuid() != 0 or not shutil.which("mount"):
        pytest.skip("mounts need root on Linux")
    if SYSTEM.unshare(CLONE_NEWNS):
        pytest.skip(f"no namespace of mounts here: {os.strerror(ctypes.get_errno())}")
    mount("--make-rprivate", "/")


def mount(*words: str) -> None:
    subprocess.run(["mount", *words], check=True, capture_output=True)


def unmount(folder: Path) -> None:
    """Also where there is no /proc, which the program of that name needs."""
    if SYSTEM.umount2(os.fsencode(folder), MNT_DETACH):
        raise OSError(ctypes.get_errno(), f"umount {folder}")


class Volume:
    """A small file system that holds the project."""

    def __init__(self, world: World, options: str = "") -> None:
        self.folder = world.project
        self.filler = self.folder / "filler"
        mount("-t", "tmpfs", "-o", f"size={SIZE},nr_inodes={ENOUGH}{options}", "none", str(self.folder))

    def fill(self, leave: int = 0) -> None:
        """Leave so many bytes."""
        with suppress(OSError), open(self.filler, "wb", buffering=0) as filler:
            while True:
                filler.write(bytes(64 * KIB))
        os.truncate(self.filler, max(0, self.filler.stat().st_size - leave))

    def use_up_inodes(self) -> None:
        (self.folder / "many").mkdir()
        with suppress(OSError):
            for number in range(2 * ENOUGH):
                (self.folder / "many" / str(number)).touch()

    def read_only(self) -> None:
        mount("-o", "remount,ro", str(self.folder))

    def mend(self) -> None:
        mount("-o", "remount,rw", str(self.folder))
        self.filler.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "many", ignore_errors=True)

    def close(self) -> None:
        unmount(self.folder)


@pytest.fixture
def world(own_mounts: None, tmp_path: Path) -> Iterator[World]:
    with FaultServer() as server:
        world = World(tmp_path, Till(server))
        world.is_cold = True  # forks come from a process that has other mounts
        yield world


@pytest.fixture
def volume(world: World) -> Iterator[Volume]:
    volume = Volume(world)
    yield volume
    volume.close()


Trouble = Callable[[Volume], None]
TROUBLES: dict[str, Trouble] = {
    "read-only": Volume.read_only,
    "no inode": Volume.use_up_inodes,
    **{f"{leave} bytes": functools.partial(Volume.fill, leave=leave) for leave in (0, 4096, 16384, 65536)},
}
ROOM = {name: trouble for name, trouble in TROUBLES.items() if name != "read-only"}  # never, while a database is open
each_trouble = pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES)
each_script = pytest.mark.parametrize("is_many", [False, True], ids=["one", "many"])


def prepare(world: World, is_many: bool) -> tuple[str, ...]:
    if is_many:
        world.shell.script = BATCH
        world.prompts = ["a fox", "an owl", "a hare"]
    return world.arguments()


def go_on(world: World, last: Result, arguments: tuple[str, ...]) -> Result:
    """What the error advises, or the same command."""
    for _ in range(3):
        if last.code == 0:
            break
        error = last.json["error"]
        last = world.run(*(shlex.split(error["next_command"])[2:] if "next_command" in error else arguments))
    return last


def assert_all_is_had(world: World, last: Result) -> None:
    assert last.code == 0, (last.stdout[-1500:], last.stderr[-1500:])
    assert {prompt: world.till.times(prompt) for prompt in world.prompts} == dict.fromkeys(world.prompts, 1)
    assert pictures(world, last) == {prompt: world.till.picture(prompt) for prompt in world.prompts}
    assert leftovers(world) == []


@each_trouble
@each_script
def test_from_the_beginning(world: World, volume: Volume, is_many: bool, trouble: Trouble) -> None:
    arguments = prepare(world, is_many)
    trouble(volume)
    result = world.run(*arguments)
    assert_told(world, result, DISK)
    assert world.paid() == 0
    volume.mend()
    assert_all_is_had(world, go_on(world, result, arguments))


@each_trouble
def test_while_the_paid_call_is_out(world: World, volume: Volume, trouble: Trouble) -> None:
    """Where not even the evidence can be kept, the link is told: nothing else can be done for the picture."""
    arguments = prepare(world, False)
    world.till.at_first_payment(lambda: trouble(volume))
    result = world.run(*arguments)
    if result.code:  # of 64 KiB, both fit
        assert_told(world, result, End(9, result.json["error"]["code"]))
        assert result.json["error"]["billed"] == "yes"
    volume.mend()
    if result.code and "next_command" not in result.error:
        assert result.error["image_url"].endswith(world.till.link("a fox"))
        assert world.paid() == 1
        return
    assert_all_is_had(world, go_on(world, result, arguments))


@pytest.mark.parametrize("trouble", ROOM.values(), ids=ROOM)
def test_while_a_paid_call_of_a_batch_is_out(world: World, volume: Volume, trouble: Trouble) -> None:
    arguments = prepare(world, True)
    world.till.at_first_payment(lambda: trouble(volume))
    result = world.run(*arguments)
    assert result.code in (0, 9), result
    volume.mend()
    if result.json.get("unknown"):
        assert world.till.link("a fox") in result.stderr
        return
    assert_all_is_had(world, go_on(world, result, arguments))


@each_trouble
@each_script
def test_while_the_picture_is_fetched(world: World, volume: Volume, is_many: bool, trouble: Trouble) -> None:
    """All that is needed to fetch it again is on disk."""
    if is_many and trouble is Volume.read_only:
        pytest.skip("no file system becomes read-only while a database on it is open")
    arguments = prepare(world, is_many)
    link, picture = world.till.link("a fox"), world.till.picture("a fox")

    def at_fetch(_: Received) -> Answer:
        world.till.server.play(link, file(picture))
        trouble(volume)
        return file(picture)

    world.till.fetches["a fox"] = at_fetch
    result = world.run(*arguments)
    assert result.code in (0, 9), result
    volume.mend()
    assert_all_is_had(world, go_on(world, result, arguments))


@each_script
def test_a_quota(world: World, is_many: bool) -> None:
    """Used up while the first paid call is out."""
    try:
        volume = Volume(world, f",usrquota,usrquota_block_hardlimit={20 * MIB}")
    except subprocess.CalledProcessError:
        pytest.skip("no quotas for tmpfs here")
    try:
        arguments = prepare(world, is_many)
        world.around["powers"] = False  # root stands above quotas
        world.till.at_first_payment(lambda: volume.fill())
        result = world.run(*arguments)
        assert result.code == 9, result
        volume.mend()
        if not is_many and "next_command" not in result.error:
            assert result.error["image_url"].endswith(world.till.link("a fox"))
        else:
            assert_all_is_had(world, go_on(world, result, arguments))
    finally:
        volume.close()


def test_a_folder_that_is_mounted_twice_is_one(world: World) -> None:
    arguments = prepare(world, True)
    paid, release = threading.Event(), threading.Event()
    world.till.at_first_payment(lambda: release.wait(30))
    world.till.at_first_payment(paid.set)  # the last one comes first
    process = world.shell.start(*arguments)
    assert paid.wait(30)
    other = world.project / "other"
    other.mkdir()
    mount("--bind", str(world.project / "out"), str(other))
    world.out = "other"
    result = world.run(*world.arguments())
    assert (result.code, result.error["code"]) == (2, "already_running")
    unmount(other)
    release.set()
    assert world.shell.finish(process).code == 0
    assert world.paid() == len(world.prompts)


@each_script
@pytest.mark.parametrize("place", ["/dev/shm", "/proc", "/sys"])
def test_without_a_file_system_of_the_system(world: World, is_many: bool, place: str) -> None:
    arguments = prepare(world, is_many)
    mount("-t", "tmpfs", "-o", "ro", "none", place)
    try:
        result = world.run(*arguments)
    finally:
        unmount(Path(place))
    assert_all_is_had(world, result)
