"""What somebody else made is read in bounded memory and in time that can be ended: pictures, files, JSON, answers."""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from PIL import Image

from batch_helpers import Batch
from conftest import SCRIPTS, Shell
from fault_server import (
    GENERATE,
    PICTURE,
    Answer,
    FaultServer,
    file,
    good,
    good_body,
    json_answer,
    png,
    png_chunk,
    png_of,
)
from zimage import picture as room
from zimage.contract import (
    DECODED_BYTES,
    DECODED_BYTES_ELSE,
    DECODER_BYTES,
    MAX_DECODED_PIXELS,
    MAX_EVIDENCE_BYTES,
    MAX_JSON_DEPTH,
    MAX_JSON_VALUES,
    MAX_LINK_LENGTH,
    MAX_REQUEST_BYTES,
)
from zimage.errors import Failure
from zimage.files import file_hash, read_file
from zimage.formats import lean, orientation
from zimage.memory import Memory
from zimage.outside import json_of
from zimage.picture import converted, verified
from zimage.waiting import Late, Stop, Stopped

posix = pytest.mark.skipif(os.name == "nt", reason="signals, pipes and devices of POSIX")
RUN = ("--prompt", "x", "--output", "out.png", "--print-response")
SIGNALS = {signal.SIGINT: 130, signal.SIGTERM: 143}
SOON = 2.0  # seconds after its moment in which every command has ended


# Pictures -------------------------------------------------------------------------------------------------------------


def saved_as(kind: str, **options: Any) -> bytes:
    target = io.BytesIO()
    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    image.save(target, kind, **options)
    return target.getvalue()


def with_segments(jpeg: bytes, *segments: tuple[int, bytes]) -> bytes:
    made = [struct.pack(">BBH", 0xFF, marker, len(data) + 2) + data for marker, data in segments]
    return jpeg[:2] + b"".join(made) + jpeg[2:]


def with_comment(gif: bytes, size: int) -> bytes:
    """Pillow puts the parts of a comment together one by one, and copies the whole each time."""
    at = 13 + (3 << ((gif[10] & 7) + 1) if gif[10] & 0x80 else 0)
    return gif[:at] + b"!\xfe" + b"\x01x" * size + b"\0" + gif[at:]


def exif_of(*entries: tuple[int, int, int, int], order: str = "<") -> bytes:
    packed = b"".join(struct.pack(f"{order}HHII", *entry) for entry in entries)
    head = {"<": b"II*\0", ">": b"MM\0*"}[order] + struct.pack(f"{order}IH", 8, len(entries))
    return b"Exif\0\0" + head + packed + bytes(4)


GREY = zlib.compress((b"\0" + bytes(range(100, 164))) * 64)
PACKED = zlib.compress(bytes(2 << 20), 9)
IFDS = exif_of(*[(0x9000 + n, 7, 60_000, 8) for n in range(5000)], (0x0112, 3, 1, 1)) + bytes(60_000)
TEXTS: dict[str, Callable[[], bytes]] = {
    "one text of 8 MiB": lambda: png_of(64, 64, png_chunk(b"tEXt", b"k\0" + bytes(8 << 20)), pixels=GREY),
    "20,000 texts": lambda: png_of(64, 64, *[png_chunk(b"tEXt", b"k\0v")] * 20_000, pixels=GREY),
    "packed texts": lambda: png_of(64, 64, *[png_chunk(b"zTXt", b"k\0\0" + PACKED)] * 50, pixels=GREY),
    "packed international texts": lambda: png_of(
        64, 64, *[png_chunk(b"iTXt", b"k\0\1\0\0\0" + PACKED)] * 50, pixels=GREY
    ),
    "frames of an animation": lambda: png_of(
        64, 64, png_chunk(b"acTL", struct.pack(">II", 9, 0)), *[png_chunk(b"fdAT", bytes(90_000))] * 9, pixels=GREY
    ),
    "chunks nobody knows": lambda: png_of(64, 64, *[png_chunk(b"zzZz", b"x")] * 20_000, pixels=GREY),
    "empty pixels": lambda: png_of(64, 64, *[png_chunk(b"IDAT", b"")] * 20_000, pixels=GREY),
    "Exif of an IFD that repeats": lambda: png_of(64, 64, png_chunk(b"eXIf", IFDS[6:]), pixels=GREY),
    "comments of a JPEG": lambda: with_segments(saved_as("JPEG"), *[(0xFE, bytes(65_000))] * 100),
    "Exif of a JPEG, in parts": lambda: with_segments(saved_as("JPEG"), *[(0xE1, b"Exif\0\0" + bytes(65_000))] * 100),
    "another picture in a JPEG": lambda: with_segments(saved_as("JPEG"), (0xE2, b"MPF\0II*\0" + bytes(200))),
    "a comment of a GIF": lambda: with_comment(saved_as("GIF"), 300_000),
    "Exif of a WEBP": lambda: saved_as("WEBP", exif=IFDS),
}


@pytest.mark.parametrize("name", TEXTS, ids=[name.replace(" ", "-") for name in TEXTS])
def test_what_lies_beside_the_pixels_never_reaches_the_decoder(name: str) -> None:
    content = TEXTS[name]()
    begun = time.process_time()
    with contextlib.closing(verified(content, Stop(30))) as picture:
        for wanted in ("PNG", "JPEG", "WEBP"):
            assert converted(picture, wanted, Stop(30))[1:] == (picture.width, picture.height)
    assert time.process_time() - begun < 2
    assert picture.content == content
    if not content.startswith(b"RIFF"):
        assert len(lean(content)) < (1_100_000 if name.startswith("Exif") else 100_000)


@pytest.mark.smoke
def test_a_jpeg_that_holds_another_picture_is_kept_as_it_came() -> None:
    first, second = io.BytesIO(), Image.new("RGB", (64, 64), "red")
    second.save(first, "MPO", save_all=True, append_images=[Image.new("RGB", (64, 64), "blue")])
    with contextlib.closing(verified(first.getvalue(), Stop(30))) as picture:
        assert picture.format == "JPEG"
        assert converted(picture, "JPEG", Stop(30))[0] == first.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA"])
def test_a_reduced_file_has_the_same_pixels(kind: str, mode: str) -> None:
    mode = "RGB" if kind == "JPEG" and mode in ("P", "RGBA") else mode
    image = Image.effect_noise((61, 47), 90).convert("RGB").convert(mode)
    options = {"progressive": True} if kind == "JPEG" else {"transparency": 3} if mode == "P" and kind == "PNG" else {}
    target = io.BytesIO()
    image.save(target, kind, **options)
    with Image.open(target) as whole, contextlib.closing(verified(target.getvalue(), Stop(30))) as picture:
        assert picture.image.convert("RGBA").tobytes() == whole.convert("RGBA").tobytes()


def test_a_colour_profile_outlasts_a_conversion() -> None:
    for kind in ("JPEG", "WEBP"):
        with contextlib.closing(verified(saved_as(kind, icc_profile=b"profile " * 20), Stop(30))) as picture:
            content = converted(picture, "PNG", Stop(30))[0]
        with Image.open(io.BytesIO(content)) as image:
            assert image.info["icc_profile"] == b"profile " * 20


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("turn", range(1, 9))
def test_a_picture_is_turned_as_pillow_turns_it(order: str, turn: int) -> None:
    from PIL import ImageOps

    exif = exif_of((0x010F, 2, 4, 0), (0x0112, 3, 1, turn if order == "<" else turn << 16), order=order)
    assert orientation(exif) == turn
    for kind in ("JPEG", "PNG", "WEBP"):
        content = saved_as(kind, exif=exif)
        with Image.open(io.BytesIO(content)) as image, contextlib.closing(verified(content, Stop(30))) as picture:
            upright = ImageOps.exif_transpose(image).convert("RGB").tobytes()
            assert room.turned(picture.image).convert("RGB").tobytes() == upright
            if kind != "PNG":
                made = converted(picture, "PNG", Stop(30))[0]
                with Image.open(io.BytesIO(made)) as png_made:
                    assert "exif" not in png_made.info and png_made.convert("RGB").tobytes() == upright


@pytest.mark.parametrize("exif", [b"", b"Exif\0\0", b"Exif\0\0II*\0\xff\xff\xff\xff", exif_of()[:-5], IFDS[:5000]])
def test_exif_that_says_nothing_turns_nothing(exif: bytes) -> None:
    assert orientation(exif) == 1


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once() -> None:
    jpeg = saved_as("JPEG", progressive=True)
    scan = jpeg.rindex(b"\xff\xda")
    bomb = jpeg[:-2] + jpeg[scan:-2] * 5000 + b"\xff\xd9"
    with pytest.raises(Failure, match="not a whole image") as caught:
        verified(bomb, Stop(30))
    assert caught.value.code == "image_unusable"


def interlaced(side: int) -> bytes:
    """A PNG whose pixels come in seven passes, of which Pillow makes none."""
    passes = ((0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2))
    rows = [bytes(1 + len(range(x, side, dx))) * len(range(y, side, dy)) for x, y, dx, dy in passes]
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 1)
    pixels = zlib.compress(b"".join(rows), 1)
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        png_chunk(kind, data) for kind, data in ((b"IHDR", head), (b"IDAT", pixels), (b"IEND", b""))
    )


def test_an_interlaced_picture_is_whole() -> None:
    with contextlib.closing(verified(interlaced(300), Stop(30))) as picture:
        assert (picture.format, picture.width, picture.image.getextrema()) == ("PNG", 300, (0, 0))


# Memory ---------------------------------------------------------------------------------------------------------------


def test_what_the_contract_takes_fits_into_the_memory() -> None:
    assert MAX_DECODED_PIXELS * DECODED_BYTES_ELSE <= DECODER_BYTES
    assert DECODED_BYTES["WEBP"] * 4 * 2048 * 2048 <= DECODER_BYTES


def test_a_large_share_is_not_starved_by_small_ones() -> None:
    memory, done, stop = Memory(100), threading.Event(), Stop(20)

    def nibble() -> None:
        while not done.is_set():
            share = memory.take(40, stop)
            time.sleep(0.002)
            share.close()

    threads = [threading.Thread(target=nibble) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(5):
        memory.take(100, stop).close()
    done.set()
    for thread in threads:
        thread.join(10)
    memory.take(100, Stop(1)).close()  # all is given back


def test_waiting_for_memory_ends_with_the_time_and_with_a_signal() -> None:
    memory, stop = Memory(10), Stop(60)
    held = memory.take(10, stop)
    with pytest.raises(Late):
        memory.take(1, Stop(0.05))
    stop.request("SIGTERM")
    with pytest.raises(Stopped):
        memory.take(1, stop)
    del held  # nobody holds it any more
    memory.take(10, Stop(1)).close()


@pytest.mark.parametrize("broken", [False, True])
def test_a_picture_gives_its_memory_back(broken: bool) -> None:
    memory = Memory(100_000_000)
    content = png()[: len(png()) // 2] + png()[-12:] if broken else png()
    with patch.object(room, "MEMORY", memory):
        with contextlib.suppress(Failure):
            verified(content, Stop(30)).close()
        memory.take(memory.total, Stop(1)).close()


def test_a_picture_that_never_fits_is_too_large() -> None:
    with patch.object(room, "MEMORY", Memory(10_000_000)), pytest.raises(Failure, match="needs 20 MiB") as caught:
        verified(png(), Stop(30))
    assert caught.value.code == "image_too_large"


MEASURE = """
import concurrent.futures, resource, sys, io, threading
sys.path.insert(0, sys.argv[1])
import PIL.Image, PIL.PngImagePlugin, PIL.JpegImagePlugin, PIL.WebPImagePlugin
from zimage import memory, picture
from zimage.waiting import Stop
picture.MEMORY = memory.Memory(60 << 20)
picture._decoders = threading.BoundedSemaphore(12)
image = PIL.Image.new("RGBA", (1200, 1200), (9, 8, 7, 100))
contents = []
for kind in ("PNG", "WEBP"):
    target = io.BytesIO()
    image.save(target, kind, lossless=True)
    contents += [target.getvalue()] * 6
def work(content):
    made = picture.verified(content, Stop(60))
    wanted = picture.converted(made, "JPEG", Stop(60))[0]
    made.close()
    return len(wanted)
work(contents[0])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
with concurrent.futures.ThreadPoolExecutor(12) as pool:
    assert len(list(pool.map(work, contents))) == 12
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the most memory of a process is told otherwise there")
def test_twelve_workers_share_one_budget() -> None:
    """Twelve pictures at once would take some 200 MiB: they get 60."""
    done = subprocess.run([sys.executable, "-c", MEASURE, str(SCRIPTS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 80 << 20, f"{int(done.stdout) >> 20} MiB"


# Time -----------------------------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
import PIL.ImageFile
mark = Path(sys.argv[2])
def load(image):
    mark.write_text("decoding")
    time.sleep(60)
PIL.ImageFile.ImageFile.load = load
sys.argv = sys.argv[3:]
import runpy
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def start_slow(shell: Shell, *arguments: str) -> subprocess.Popen[bytes]:
    """The script, with a decoder that takes a minute for every picture and cannot be broken off."""
    mark = str(shell.home / "decoding")
    process = subprocess.Popen(
        [sys.executable, "-c", SLOW, str(SCRIPTS), mark, str(shell.script), *arguments],
        cwd=shell.folder,
        env=shell.environment(),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    shell.keep(process)
    return process


def wait_until_it_decodes(shell: Shell) -> None:
    until = time.monotonic() + 30
    while not (shell.home / "decoding").exists():
        assert time.monotonic() < until, "it does not decode"
        time.sleep(0.02)


def ended(process: subprocess.Popen[bytes]) -> tuple[int, dict[str, Any], float]:
    begun = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert b"Traceback" not in err, err.decode()
    return process.returncode, json.loads(out), time.monotonic() - begun


@posix
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_a_decoder_and_the_picture_is_recovered(
    shell: Shell, service: FaultServer, number: signal.Signals
) -> None:
    service.play(PICTURE, file(png()))
    process = start_slow(shell, *RUN)
    wait_until_it_decodes(shell)
    process.send_signal(number)
    code, answer, seconds = ended(process)
    assert (code, answer["error"]["billed"]) == (SIGNALS[number], "yes")
    assert seconds < SOON
    assert shell.evidence()["status"] == "generated"
    assert not (shell.folder / "out.png").exists()
    (path,) = shell.evidence_files()
    assert shell.run("--recover", str(path), "--print-response").code == 0
    assert len(service.posts) == 1


@posix
def test_the_time_limit_ends_a_decoder_and_nothing_is_called_saved(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, file(png()))
    begun = time.monotonic()
    code, answer, _ = ended(start_slow(shell, *RUN, "--timeout", "2"))
    assert time.monotonic() - begun < 2 + SOON + 1  # and the start of Python
    assert (code, answer["error"]["code"]) == (7, "paid_not_downloaded")
    assert "next_command" in answer["error"]
    assert shell.evidence()["status"] == "generated"
    assert shell.evidence()["response"]["image_url"]


@posix
def test_a_signal_ends_the_decoders_of_a_batch_and_its_pictures_stay_paid(shell: Shell, service: FaultServer) -> None:
    batch = Batch(shell, service)
    batch.prompts(3)
    process = start_slow(shell, *batch.arguments())
    wait_until_it_decodes(shell)
    time.sleep(0.3)  # for the others to come as far
    process.send_signal(signal.SIGINT)
    code, answer, seconds = ended(process)
    assert (code, answer["generated"]) == (130, 3)
    assert seconds < SOON + 1  # results and gallery are written
    assert batch.run().json["saved"] == 3
    assert len(service.posts) == 3


@posix
def test_a_signal_ends_the_making_of_thumbnails(shell: Shell, service: FaultServer) -> None:
    batch = Batch(shell, service)
    batch.prompts(2)
    assert batch.run("--no-gallery").code == 0
    process = start_slow(shell, "--gallery-only", str(batch.out))
    wait_until_it_decodes(shell)
    process.send_signal(signal.SIGTERM)
    code, answer, seconds = ended(process)
    assert (code, answer["error"]["code"]) == (143, "interrupted")
    assert seconds < SOON


# Files ----------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def pipe(path: Path) -> Iterator[Path]:
    os.mkfifo(path)
    yield path


@contextlib.contextmanager
def listening(path: Path) -> Iterator[Path]:
    folder = os.open(path.parent, os.O_RDONLY)
    with socket.socket(socket.AF_UNIX) as ear:
        ear.bind(f"/proc/self/fd/{folder}/{path.name}" if sys.platform == "linux" else str(path))
        os.close(folder)
        yield path


@contextlib.contextmanager
def a_folder(path: Path) -> Iterator[Path]:
    path.mkdir()
    yield path


def linked(target: str) -> Callable[[Path], Any]:
    @contextlib.contextmanager
    def make(path: Path) -> Iterator[Path]:
        path.symlink_to(target)
        yield path

    return make


@contextlib.contextmanager
def sparse(path: Path) -> Iterator[Path]:
    with path.open("wb") as target:
        target.truncate(10 << 30)
    yield path


STRANGE: dict[str, Callable[[Path], Any]] = {
    "a pipe": pipe,
    "a socket": listening,
    "a folder": a_folder,
    "zeros without end": linked("/dev/zero"),
    "random bytes without end": linked("/dev/urandom"),
    "a terminal": linked("/dev/tty"),
    "itself": linked("strange"),
    "10 GiB of nothing": sparse,
}


@posix
@pytest.mark.parametrize("name", STRANGE, ids=[name.replace(" ", "-") for name in STRANGE])
def test_only_a_regular_file_of_bounded_size_is_read(tmp_path: Path, name: str) -> None:
    with STRANGE[name](tmp_path / "strange") as path:
        begun = time.monotonic()
        with pytest.raises(OSError):
            read_file(path, 1 << 20)
        with pytest.raises(OSError):
            file_hash(path)
        assert time.monotonic() - begun < SOON


def paid(shell: Shell, service: FaultServer, *, handed_over: bool = False) -> Path:
    """A picture that is saved; returns its evidence file."""
    if handed_over:
        import base64

        shell.env["OPENAI_BASE_URL"] = service.base_url.replace("/api/v1", "/v1")
        service.play("/v1/images/generations", json_answer({"data": [{"b64_json": base64.b64encode(png()).decode()}]}))
        assert shell.run(*RUN, "--provider", "openai").code == 0
    else:
        assert shell.run(*RUN).code == 0
    (path,) = shell.evidence_files()
    return path


@posix
@pytest.mark.parametrize("name", STRANGE, ids=[name.replace(" ", "-") for name in STRANGE])
def test_a_saved_picture_that_became_something_else_is_fetched_again(
    shell: Shell, service: FaultServer, name: str
) -> None:
    evidence = paid(shell, service)
    (shell.folder / "out.png").unlink()
    with STRANGE[name](shell.folder / "strange.png"):
        content = json.loads(evidence.read_bytes())
        content["image"]["path"] = str(shell.folder / "strange.png")
        evidence.write_text(json.dumps(content))
        result = shell.run("--recover", str(evidence), "--print-response", "--timeout", "10", timeout=15)
    assert (result.code, result.json["image_path"]) == (0, str(shell.folder / "out.png"))
    assert len(service.posts) == 1


@posix
@pytest.mark.parametrize("name", STRANGE, ids=[name.replace(" ", "-") for name in STRANGE])
def test_bytes_that_were_handed_over_are_read_from_a_file_only(shell: Shell, service: FaultServer, name: str) -> None:
    evidence = paid(shell, service, handed_over=True)
    (shell.folder / "out.png").unlink()
    content = json.loads(evidence.read_bytes()) | {"status": "generated"}
    evidence.write_text(json.dumps(content))
    with STRANGE[name](shell.folder / "strange"):
        evidence.with_suffix(".picture").symlink_to(shell.folder / "strange")
        begun = time.monotonic()
        result = shell.run("--recover", str(evidence), "--print-response", "--timeout", "10", timeout=15)
    assert time.monotonic() - begun < 10
    assert result.error["code"] == "disk_after_paying"


@posix
@pytest.mark.parametrize("flag", ["--recover", "--replay", "--file"])
@pytest.mark.parametrize("name", ["zeros without end", "10 GiB of nothing", "a folder", "a socket", "itself"])
def test_what_a_flag_names_is_bounded(shell: Shell, flag: str, name: str) -> None:
    with STRANGE[name](shell.folder / "strange") as path:
        begun = time.monotonic()
        error = shell.run(flag, str(path), "--print-response", "--timeout", "5", timeout=15).error
    assert error["exit_code"] == 2
    assert error["code"] == "file_unreadable"
    assert time.monotonic() - begun < 5


# JSON -----------------------------------------------------------------------------------------------------------------

HUGE = {
    "objects": "[" + "{}," * 200_000 + "{}]",
    "lists": "[" + "[]," * 200_000 + "[]]",
    "numbers": "[" + "1," * 200_000 + "1]",
    "names": "{" + ",".join(f'"{n}":1' for n in range(200_000)) + "}",
    "empty texts": "[" + '"",' * 500_000 + '""]',
    "texts with quotes": "[" + '"\\"",' * 500_000 + '""]',
    "levels": "[" * 5000 + "]" * 5000,
    "levels that parse": "[" * (MAX_JSON_DEPTH + 50) + "]" * (MAX_JSON_DEPTH + 50),
    "objects in objects": '{"a":' * 100_000,
}


@pytest.mark.parametrize("name", HUGE, ids=[name.replace(" ", "-") for name in HUGE])
def test_json_is_bounded_before_it_is_built(name: str) -> None:
    with pytest.raises(ValueError, match=r"values|nested"):
        json_of(HUGE[name])


@pytest.mark.parametrize(
    "value",
    ["," * MAX_JSON_VALUES * 3, '"[{,' * MAX_JSON_VALUES, "\\" * 500_000, [[]] * 20_000, {"a": {"b": [1, "]"]}}],
)
def test_signs_in_a_text_are_no_values(value: Any) -> None:
    assert json_of(json.dumps({"prompt": value})) == {"prompt": value}


@pytest.mark.parametrize("number", ["1" * 5000, "-" + "9" * 100_000, "1" * 100_000 + ".5", "1e" + "9" * 5000])
def test_a_number_of_any_length_is_a_wrong_seed_and_nothing_else(shell: Shell, number: str) -> None:
    (shell.folder / "request.json").write_text(f'{{"prompt": "x", "seed": {number}}}')
    assert shell.run("--file", "request.json", "--dry-run").error["code"] == "invalid_request"


@pytest.mark.parametrize("name", HUGE, ids=[name.replace(" ", "-") for name in HUGE])
def test_huge_json_of_every_kind_of_file_is_an_error_in_words(shell: Shell, name: str) -> None:
    path = shell.folder / "huge.json"
    path.write_text(HUGE[name])
    for arguments, code in (
        (("--file", "huge.json", "--dry-run"), ("invalid_request", "file_unreadable")),  # some are over 1 MiB
        (("--recover", "huge.json", "--print-response"), ("invalid_evidence",)),
        (("--replay", "huge.json", "--dry-run"), ("invalid_evidence",)),
    ):
        assert shell.call(*arguments).error["code"] in code


@pytest.mark.parametrize("name", ["objects", "levels", "levels that parse"])
def test_huge_json_of_a_service_is_no_answer(shell: Shell, service: FaultServer, name: str) -> None:
    service.play(GENERATE, Answer(body=b'{"output": ' + HUGE[name].encode() + b"}", bills=True))
    error = shell.run(*RUN).error
    assert error["exit_code"] in (7, 8)  # what begins as JSON and is none may have been cut
    assert error["billed"] == "unknown"


def test_an_evidence_file_of_endless_attempts_ends_in_time(shell: Shell, service: FaultServer) -> None:
    evidence = paid(shell, service)
    content = json.loads(evidence.read_bytes())
    content["attempts"] = [{"at": 1, "http_status": "x"}] * 30_000
    evidence.write_text(json.dumps(content))
    begun = time.monotonic()
    error = shell.run("--recover", str(evidence), "--print-response", "--timeout", "2").error
    assert error["code"] in ("invalid_evidence", "file_unreadable")  # as fast as the machine is
    assert time.monotonic() - begun < 2 + SOON


# Answers --------------------------------------------------------------------------------------------------------------


def packed(body: bytes, coding: str) -> bytes:
    for _ in range(coding.count("gzip")):
        body = gzip.compress(body)
    return zlib.compress(body) if coding == "deflate" else body


CODINGS = ("gzip, gzip", "gzip,gzip,gzip", "br", "zstd", "deflate", "compress", "gzip, br", "x" * 5000)


@pytest.mark.parametrize("coding", CODINGS, ids=lambda coding: coding[:20].replace(" ", ""))
def test_an_answer_in_a_coding_nobody_asked_for_is_not_unpacked(
    shell: Shell, service: FaultServer, coding: str
) -> None:
    headers = (("Content-Encoding", coding), ("X-Request-Id", "req-77"))
    body = packed(json.dumps(good_body("https://x.aliyuncs.com/a.png")).encode(), coding)
    service.play(GENERATE, Answer(headers=headers, body=body, bills=True))
    error = shell.run(*RUN).error
    assert (error["code"], error["exit_code"], error["billed"]) == ("answer_unusable", 8, "unknown")
    assert error["request_id"] == "req-77"
    assert coding[:20] in error["message"]
    assert shell.evidence()["error"]["request_id"] == "req-77"
    assert len(service.posts) == 1


@pytest.mark.parametrize("coding", ["br", "gzip, gzip"])
def test_a_picture_in_such_a_coding_keeps_its_link(shell: Shell, service: FaultServer, coding: str) -> None:
    service.play(PICTURE, file(packed(png(), coding), headers=(("Content-Encoding", coding),)))
    error = shell.run(*RUN).error
    assert (error["code"], error["billed"]) == ("image_unusable", "yes")
    service.play(PICTURE, file(png()))
    (path,) = shell.evidence_files()
    assert shell.run("--recover", str(path), "--print-response").code == 0


@pytest.mark.parametrize("coding", ["gzip", "GZIP", "x-gzip", "identity", " gzip "])
def test_one_layer_of_gzip_loses_nothing(shell: Shell, service: FaultServer, coding: str) -> None:
    headers = (("Content-Encoding", coding),)
    content = gzip.compress(png()) if "gzip" in coding.lower() else png()
    service.play(PICTURE, file(content, headers=headers))
    assert shell.run(*RUN).code == 0
    assert (shell.folder / "out.png").read_bytes() == png()


def test_an_error_in_a_strange_coding_says_what_its_status_says(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, json_answer({"code": "x"}, 401, headers=(("Content-Encoding", "br"),)))
    assert shell.run(*RUN).error["code"] == "key_rejected"


def test_of_an_error_only_the_beginning_is_read(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, Answer(status=400, framing="close", repeat=b"x" * 65536))
    assert shell.run(*RUN, "--timeout", "20").error["code"] == "rejected_by_service"


def test_a_link_that_no_evidence_can_hold_is_told_in_words(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, good("https://x.aliyuncs.com/" + "a" * 3_000_000))
    error = shell.run(*RUN).error
    assert (error["code"], error["billed"], error["request_id"]) == ("answer_unusable", "unknown", "req-0001")
    assert str(MAX_LINK_LENGTH) in error["message"]
    (path,) = shell.evidence_files()
    assert path.stat().st_size < 10_000
    assert shell.run("--recover", str(path), "--print-response").error["code"] == "outcome_unknown"


@pytest.mark.parametrize("sign", ["\x7f", "字", ",", "\U0001f98a"], ids=["DEL", "CJK", "comma", "fox"])
def test_the_longest_prompt_and_the_most_telling_answer_can_be_read_again(
    shell: Shell, service: FaultServer, sign: str
) -> None:
    prompt = sign * ((MAX_REQUEST_BYTES - 100) // len(sign.encode()))
    (shell.folder / "long.json").write_text(json.dumps({"prompt": prompt}, ensure_ascii=False), encoding="utf-8")

    def answer(request: Any) -> Answer:
        body = good_body(request.root + PICTURE, usage={str(n): "x" * 400 for n in range(50)})
        content = body["output"]["choices"][0]["message"]["content"]
        content += [{"image": "https://x.aliyuncs.com/" + "\x01" * 8000}] * 30
        content[1]["text"] = "\\" * 200_000
        return Answer(body=json.dumps(body).encode(), bills=True)

    service.play(GENERATE, answer)
    assert shell.run("--file", "long.json", "--output", "out.png", "--print-response").code == 0
    (path,) = shell.evidence_files()
    assert path.stat().st_size < MAX_EVIDENCE_BYTES
    (shell.folder / "out.png").unlink()
    assert shell.run("--recover", str(path), "--print-response").code == 0
