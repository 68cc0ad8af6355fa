"""Pictures: bytes of any kind are a whole image of a known format, or are told to be none."""

from __future__ import annotations

import contextlib
import functools
import io
import struct
import zlib
from collections.abc import Iterator

from hypothesis import strategies as st
from PIL import Image

from fault_server import drawn, png_chunk, png_of
from fuzz.conftest import cases
from fuzz.promises import assert_failure
from fuzz.strategies import changed_bytes
from zimage.batch.gallery import THUMB_SIDE, thumb
from zimage.contract import FORMATS, READABLE_FORMATS
from zimage.errors import Failure
from zimage.memory import MEMORY
from zimage.picture import Picture, converted, verified
from zimage.waiting import Stop

SIDE = 24  # pixels: enough for every part that a format has, and decoded in no time


@functools.cache
def small(kind: str, mode: str) -> bytes:
    """A small picture of a format, in a mode that it knows."""
    image = Image.open(io.BytesIO(drawn("PNG", SIDE, SIDE + 7))).convert(mode)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    target = io.BytesIO()
    image.save(target, kind, **({"exif": exif} if kind in ("JPEG", "WEBP", "PNG") else {}))
    return target.getvalue()


def several(kind: str) -> bytes:
    """One that moves."""
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in ("red", "green")]
    target = io.BytesIO()
    frames[0].save(target, kind, save_all=True, append_images=frames[1:])
    return target.getvalue()


MODES = {"PNG": ["RGB", "RGBA", "L", "LA", "P", "1", "I;16"], "JPEG": ["RGB", "L", "CMYK"], "WEBP": ["RGB", "RGBA"]}
MODES |= {"GIF": ["P", "L"], "BMP": ["RGB", "1"]}
VALID = [small(kind, mode) for kind, modes in MODES.items() for mode in modes if mode != "I;16"]
VALID += [several("GIF"), several("WEBP"), several("PNG"), png_of(SIDE, SIDE)]
OTHER = [
    b"",
    b"<html>",
    b"%PDF-1.7\n",
    b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n",
    b"II*\0\x08\0\0\0",
    b"\0\0\0\x0cjP  \r\n",
]

images = st.one_of(
    st.sampled_from(VALID).flatmap(changed_bytes),
    st.sampled_from(VALID),
    st.sampled_from([*OTHER, *VALID]).flatmap(lambda start: st.binary(max_size=60).map(lambda rest: start[:40] + rest)),
    st.binary(max_size=100),
)
# PNGs whose checksums are right, so that what is wrong in them comes further.
headers = st.builds(
    lambda *fields: struct.pack(">IIBBBBB", *fields),
    st.sampled_from([0, 1, SIDE, 2**16, 2**31 - 1, 2**32 - 1]),
    st.sampled_from([0, 1, SIDE, 2**16, 2**31 - 1]),
    st.sampled_from([1, 2, 4, 8, 16, 3, 0]),
    st.sampled_from([0, 2, 3, 4, 6, 1, 7]),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([0, 0, 0, 1]),
    st.sampled_from([0, 0, 1, 2]),
)
chunks = st.lists(
    st.builds(
        png_chunk,
        st.sampled_from(
            [b"IDAT", b"PLTE", b"tRNS", b"zTXt", b"iTXt", b"eXIf", b"acTL", b"fdAT", b"IEND", b"iCCP", b"abcd"]
        ),
        st.one_of(
            st.binary(max_size=30),
            st.integers(0, 4000).map(lambda count: zlib.compress(bytes(count))),
            st.integers(0, 4000).map(lambda count: b"x\0\0" + zlib.compress(bytes(count))),
        ),
    ),
    max_size=5,
)
built = st.builds(
    lambda header, more: b"\x89PNG\r\n\x1a\n" + png_chunk(b"IHDR", header) + b"".join(more) + png_chunk(b"IEND", b""),
    headers,
    chunks,
)


@contextlib.contextmanager
def whole(content: bytes) -> Iterator[Picture | None]:
    """The picture that the bytes are; None where they are told to be none. Afterwards all memory is given back."""
    try:
        picture = verified(content, Stop(60))
    except Failure as failure:
        assert failure.code in ("image_unusable", "image_too_large")
        assert_failure(failure)
        yield None
    else:
        with contextlib.closing(picture):
            assert picture.content == content and picture.format in READABLE_FORMATS
            yield picture
    assert MEMORY._free == MEMORY.total


@cases(100, 4_000, content=images)
def test_bytes_are_a_whole_picture_or_none(content: bytes) -> None:
    with whole(content) as picture:
        if picture is not None:
            with Image.open(io.BytesIO(content), formats=READABLE_FORMATS) as again:
                again.load()
                assert again.size == (picture.width, picture.height)


@cases(75, 3_000, content=built)
def test_a_png_with_good_checksums_is_a_whole_picture_or_none(content: bytes) -> None:
    with whole(content):
        pass


@cases(100, 1_500, content=st.one_of(images, built), wanted=st.sampled_from(list(FORMATS.values())))
def test_a_picture_is_converted_to_one_that_is_whole(content: bytes, wanted: str) -> None:
    with whole(content) as picture:
        if picture is None:
            return
        try:
            other, *sides = converted(picture, wanted, Stop(60))
        except Failure as failure:
            assert failure.code == "image_unusable"
            assert_failure(failure)
            return
        assert sorted(sides) == sorted((picture.width, picture.height))
        assert other == content or picture.format != wanted
    with whole(other) as again:
        assert again is not None and again.format == wanted and [again.width, again.height] == sides


@cases(60, 1_000, content=images)
def test_a_thumbnail_is_small(content: bytes) -> None:
    with whole(content) as picture:
        assert picture is None or max(thumb(picture.image).size) <= THUMB_SIDE


@cases(60, 1_000, cut=st.integers(0, 10_000), content=st.sampled_from(VALID))
def test_no_part_of_a_picture_is_a_picture(cut: int, content: bytes) -> None:
    """GIF and BMP say less of where they end: of those a part may do."""
    with whole(content[: cut % len(content)]) as part:
        if part is not None and content[:2] not in (b"GI", b"BM"):
            with Image.open(io.BytesIO(content)) as image:
                assert image.tobytes() == part.image.tobytes()
