"""Formats: what of an image file its decoder needs. The rest, such as megabytes of text, never reaches it.

All is linear in the size of the file, and raises ValueError, IndexError or struct.error for one that is not whole.
"""

from __future__ import annotations

import struct
import zlib

from zimage.contract import MAX_JPEG_SCANS, MAX_METADATA_BYTES

PNG, JPEG, GIF = b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"GIF8"
PNG_CHUNKS = (b"IHDR", b"iCCP", b"PLTE", b"tRNS", b"eXIf")  # before the pixels, in this order
JPEG_METADATA = (b"JFIF\0", b"Adobe", b"Exif\0", b"ICC_PROFILE\0")  # what colours or their place depend on
ORIENTATION = 0x0112  # tag of Exif


def lean(content: bytes) -> bytes:
    """The file, reduced to what its first picture is decoded from."""
    for signature, reduce in ((PNG, lean_png), (JPEG, lean_jpeg), (GIF, lean_gif)):
        if content.startswith(signature):
            return reduce(content)
    return content


def lean_png(content: bytes) -> bytes:
    """All checksums are looked at. Chunk layout: PNG specification (W3C), section 5."""
    view, position, kind = memoryview(content), len(PNG), b""
    kept: dict[bytes, bytes] = {}
    pixels = bytearray()
    while kind != b"IEND":
        length, kind = struct.unpack_from(">I4s", content, position)
        data = view[position + 8 : position + 8 + length]
        (checksum,) = struct.unpack_from(">I", content, position + 8 + length)
        if zlib.crc32(data, zlib.crc32(kind)) != checksum or (not kept and kind != b"IHDR"):
            raise ValueError("a chunk is broken")
        if kind == b"IDAT":
            pixels += data
        elif kind in PNG_CHUNKS and length <= MAX_METADATA_BYTES:
            kept.setdefault(kind, bytes(data))
        position += 12 + length
    chunks = [png_chunk(name, kept[name]) for name in PNG_CHUNKS if name in kept]
    return b"".join([PNG, *chunks, png_chunk(b"IDAT", pixels), png_chunk(b"IEND", b"")])


MOST_CHUNKS = 100  # before the pixels; a picture of a stranger may have any number


def png_text(content: bytes, keyword: str) -> str:
    """A text that stands under a keyword before the pixels of a PNG; empty where there is none.

    Plain `tEXt` and `iTXt` chunks: PNG specification (W3C), section 11.3.3. What is packed is not unpacked.
    """
    position = len(PNG)
    for _ in range(MOST_CHUNKS if content.startswith(PNG) else 0):
        if position + 8 > len(content):
            break
        length, kind = struct.unpack_from(">I4s", content, position)
        if kind == b"IDAT":
            break
        data = content[position + 8 : position + 8 + min(length, MAX_METADATA_BYTES)]
        name, _, text = data.partition(b"\0")
        if name == keyword.encode() and kind == b"tEXt":
            return text.decode("latin-1")
        if name == keyword.encode() and kind == b"iTXt" and text[:1] == b"\0":
            return text[2:].split(b"\0", 2)[-1].decode("utf-8", "replace")
        position += 12 + length
    return ""


def png_chunk(kind: bytes, data: bytes | bytearray) -> bytes:
    return b"".join([struct.pack(">I", len(data)), kind, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(kind)))])


def png_lacks_rows(lean_content: bytes) -> bool:
    """Whether a PNG's data ends before its last row: Pillow leaves such rows empty and says nothing.

    Sizes: PNG specification (W3C), section 7. Interlaced pictures are taken as they are.
    """
    width, height, bits, color, _, _, interlaced = struct.unpack_from(">IIBBBBB", lean_content, 16)
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    missing = height * (1 + (width * bits * samples + 7) // 8)
    inflater, block = zlib.decompressobj(), 64 * 1024
    begin = lean_content.index(b"IDAT") + 4
    for start in range(begin, len(lean_content), block):
        data = lean_content[start : start + block]
        while data and missing > 0:
            missing -= len(inflater.decompress(data, 16 * block))
            data = inflater.unconsumed_tail
    return not interlaced and missing > 0


def lean_jpeg(content: bytes) -> bytes:
    """Markers: ITU-T T.81, annex B. What follows the first scan's header stays as it is."""
    if content.count(b"\xff\xda") > MAX_JPEG_SCANS:
        raise ValueError("it has more scans than any encoder makes")
    view, position = memoryview(content), len(JPEG)
    kept, metadata = [view[:position]], 0
    while (marker := content[position + 1]) != 0xDA:
        if content[position] != 0xFF:
            raise ValueError("no marker where one must be")
        if marker == 0xFF:  # a filling
            position += 1
            continue
        alone = marker == 0x01 or 0xD0 <= marker <= 0xD9
        end = position + 2 + (0 if alone else int.from_bytes(view[position + 2 : position + 4], "big"))
        if 0xE0 <= marker <= 0xEF or marker == 0xFE:
            metadata += end - position
            if metadata <= MAX_METADATA_BYTES and content.startswith(JPEG_METADATA, position + 4):
                kept.append(view[position:end])
        else:
            kept.append(view[position:end])
        position = end
    return b"".join([*kept, view[position:]])


def lean_gif(content: bytes) -> bytes:
    """The first picture and what says how it is shown. Blocks: GIF89a specification."""
    view, position = memoryview(content), 13 + _colours(content[10])
    head, control = view[:position], b""
    while True:
        start, kind, label = position, content[position], content[position + 1]
        if kind not in (0x21, 0x2C):
            raise ValueError("no picture is in it")
        position += 2 if kind == 0x21 else 11 + _colours(content[position + 9])
        while content[position]:
            position += 1 + content[position]
        position += 1
        if kind == 0x2C:
            return b"".join([head, control, view[start:position], b";"])
        if label == 0xF9:
            control = content[start:position]


def _colours(flags: int) -> int:
    """Bytes of the colour table that these flags announce."""
    return 3 << ((flags & 7) + 1) if flags & 0x80 else 0


def orientation(exif: bytes) -> int:
    """How a picture lies, 1 to 8, by its Exif; 1 where that does not say. Pillow would read all of it to learn that."""
    tiff = exif.removeprefix(b"Exif\0\0")
    order = "<" if tiff.startswith(b"II") else ">"
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for number in range(count):
            tag, _, _, value = struct.unpack_from(f"{order}HHIH", tiff, start + 2 + 12 * number)
            if tag == ORIENTATION:
                return int(value)
    except struct.error:
        pass
    return 1
