"""Picture: bytes that decode to a whole image, and what becomes of them."""

from __future__ import annotations

import hashlib
import io
import math
import os
import struct
import threading
import zlib
from typing import TYPE_CHECKING, NamedTuple

from zimage.contract import MAX_DECODED_PIXELS, RATIO_TOLERANCE, READABLE_FORMATS, SAVE_OPTIONS
from zimage.errors import Failure
from zimage.request import parse_size

if TYPE_CHECKING:
    import PIL.Image

    from zimage.provider import Provider


class Picture(NamedTuple):
    """A verified image: the bytes, their format (PNG, JPEG or WEBP where it can be kept), width, height, pixels."""

    content: bytes
    format: str
    width: int
    height: int
    image: PIL.Image.Image  # as decoded to verify it: whatever needs the pixels need not decode them again

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()


# Where many pictures arrive at once: decoders beyond the number of cores only push each other out of the caches.
_decoders = threading.BoundedSemaphore(os.cpu_count() or 1)


def verified(content: bytes) -> Picture:
    """Decode the whole image, so that nothing broken, cut or hostile is called a picture.

    Raises:
        Failure: image_unusable.
    """
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the check below is stricter, and does not print a warning

    def unusable(what: str) -> Failure:
        return Failure("image_unusable", f"what came as the picture ({len(content)} bytes) {what}")

    if not content:
        raise unusable("is empty")
    try:
        with _decoders, Image.open(io.BytesIO(content), formats=READABLE_FORMATS) as image:
            if image.width * image.height > MAX_DECODED_PIXELS:
                raise unusable(f"claims {image.width}*{image.height} pixels, which no picture of this model has")
            kind = image.format or ""
            image.load()
            last_row_is_empty = image.crop((0, image.height - 1, image.width, image.height)).getbbox() is None
        if kind == "PNG":
            with Image.open(io.BytesIO(content), formats=["PNG"]) as chunks:
                chunks.verify()  # checksums of all chunks, to the last
    except Failure:
        raise
    except Exception as error:  # Pillow's decoders raise many kinds for bytes they cannot read
        raise unusable(f"is not a whole image ({type(error).__name__})") from None
    if not ends_as_it_should(kind, content) or (kind == "PNG" and last_row_is_empty and png_lacks_rows(content)):
        raise unusable(f"is a {kind} image that breaks off")
    return Picture(content, kind, image.width, image.height, image)


def ends_as_it_should(kind: str, content: bytes) -> bool:
    """Whether a format whose decoder forgives a missing end has its end."""
    if kind == "PNG":
        return b"IEND\xaeB`\x82" in content[-1024:]
    if kind == "JPEG":
        return b"\xff\xd9" in content.rstrip(b"\0")[-1024:]
    if kind == "WEBP":
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")
    return True


def png_lacks_rows(content: bytes) -> bool:
    """Whether a PNG's data ends before its last row: Pillow leaves such rows empty and says nothing.

    Chunk layout and sizes: PNG specification (W3C), sections 5 and 7. Interlaced pictures are taken as they are.
    """
    width, height, bits, color, _, _, interlaced = struct.unpack(">IIBBBBB", content[16:29])
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[color]
    expected = height * (1 + (width * bits * samples + 7) // 8)
    data, position = bytearray(), 8
    while position + 8 <= len(content):
        length, kind = struct.unpack(">I4s", content[position : position + 8])
        data += content[position + 8 : position + 8 + length] if kind == b"IDAT" else b""
        position += 12 + length
    return not interlaced and len(zlib.decompressobj().decompress(bytes(data), expected)) < expected


def converted(picture: Picture, wanted: str) -> Picture:
    """The picture in the wanted format; the service's bytes are kept where they are of that format.

    Raises:
        Failure: image_unusable.
    """
    if picture.format == wanted:
        return picture
    from PIL import ImageOps

    target = io.BytesIO()
    try:
        image = ImageOps.exif_transpose(picture.image)
        plain = flattened(image) if wanted == "JPEG" else image.convert("RGBA" if has_alpha(image) else "RGB")
        plain.save(target, wanted, **SAVE_OPTIONS[wanted])
    except (OSError, ValueError) as error:
        reason = f"the picture cannot be converted to {wanted} ({type(error).__name__})"
        raise Failure(
            "image_unusable", reason, hint="run next_command with another --output, such as one ending in .png"
        ) from None
    return Picture(target.getvalue(), wanted, image.width, image.height, image)


def has_alpha(image: PIL.Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info


def flattened(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture without transparency, on white, as JPEG needs it."""
    from PIL import Image

    if not has_alpha(image):
        return image.convert("RGB")
    layer = image.convert("RGBA")
    white = Image.new("RGB", layer.size, "white")
    white.paste(layer, mask=layer.getchannel("A"))
    return white


def size_warning(asked: str, picture: Picture, provider: Provider) -> str | None:
    """A sentence where the picture is not what was asked for, as far as the provider lets that be asked."""
    width, height = parse_size(asked)
    if (picture.width, picture.height) == (width, height):
        return None
    if provider.sizes_are_ratios and math.isclose(
        picture.width * height, picture.height * width, rel_tol=RATIO_TOLERANCE
    ):
        return None
    return f"the picture is {picture.width}*{picture.height}, asked was {asked}"
