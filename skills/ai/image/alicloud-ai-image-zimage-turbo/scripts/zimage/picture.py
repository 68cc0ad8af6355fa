"""Picture: bytes that decode to a whole image, and what becomes of them."""

from __future__ import annotations

import hashlib
import io
import math
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from zimage.contract import (
    DECODED_BYTES,
    DECODED_BYTES_ELSE,
    LAST_WORK,
    MAX_DECODED_PIXELS,
    MIB,
    RATIO_TOLERANCE,
    READABLE_FORMATS,
    SAVE_OPTIONS,
)
from zimage.errors import Failure
from zimage.formats import lean, orientation, png_lacks_rows
from zimage.memory import MEMORY, Share
from zimage.request import parse_size
from zimage.waiting import Late

if TYPE_CHECKING:
    import PIL.Image

    from zimage.provider import Provider
    from zimage.waiting import Stop

Result = TypeVar("Result")


class Picture(NamedTuple):
    """A verified image: the bytes, their format (PNG, JPEG or WEBP where it can be kept), width, height, pixels.

    Its pixels take a share of the memory for all decoders: it must be closed.
    """

    content: bytes
    format: str
    width: int
    height: int
    image: PIL.Image.Image  # as decoded to verify it: whatever needs the pixels need not decode them again
    share: Share

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    def close(self) -> None:
        """Give back what the pixels take."""
        self.image.close()
        self.share.close()


# Where many pictures arrive at once: decoders beyond the number of cores only push each other out of the caches.
_decoders = threading.BoundedSemaphore(os.cpu_count() or 1)


def in_its_time(what: str, work: Callable[[], Result], stop: Stop) -> Result:
    """Do work on pixels in a thread that can be left: a decoder cannot be broken off.

    Raises:
        Failure: paid_not_downloaded where it is not done in time; what the work raises. Stopped.
    """
    try:
        return stop.in_thread(work, LAST_WORK, grace=LAST_WORK)  # what came whole at the last moment is not left
    except Late:
        raise Failure("paid_not_downloaded", f"the picture was not {what} in time on this machine") from None


def verified(content: bytes, stop: Stop) -> Picture:
    """Decode the whole image, so that nothing broken, cut or hostile is called a picture.

    Raises:
        Failure: image_unusable, image_too_large; paid_not_downloaded where its time is over. Stopped.
    """
    return in_its_time("decoded", lambda: _decoded(content, stop), stop)


def _decoded(content: bytes, stop: Stop) -> Picture:
    from PIL import Image

    Image.MAX_IMAGE_PIXELS = None  # the check below is stricter, and does not print a warning
    what_came = f"what came as the picture ({len(content)} bytes)"
    if not content:
        raise Failure("image_unusable", f"{what_came} is empty")
    try:
        needed = lean(content)
        with _decoders, Image.open(io.BytesIO(needed), formats=READABLE_FORMATS) as image:
            kind, (width, height) = image.format or "", image.size
            share = MEMORY.take(_bytes_for(kind, width, height, content, what_came), stop)
            try:
                image.load()
                is_whole = ends_as_it_should(kind, content) and not (
                    kind == "PNG" and image.crop((0, height - 1, width, height)).getbbox() is None
                    and png_lacks_rows(needed)
                )  # fmt: skip
                if not is_whole:
                    raise Failure("image_unusable", f"{what_came} is a {kind} image that breaks off")
            except BaseException:
                image.close()
                share.close()
                raise
        return Picture(content, kind, width, height, image, share)
    except (Failure, Late):
        raise
    except MemoryError:  # says nothing of the bytes
        raise Failure("paid_not_downloaded", "there is too little memory here to decode the picture") from None
    except Exception as error:  # Pillow's decoders raise many kinds for bytes they cannot read
        reason = f"{what_came} is not a whole image ({type(error).__name__})"
        raise Failure("image_unusable", reason) from None


def _bytes_for(kind: str, width: int, height: int, content: bytes, what_came: str) -> int:
    """The memory that a picture takes, by what its header says, with all that is done with it.

    Raises:
        Failure: image_unusable, image_too_large.
    """
    if width * height > MAX_DECODED_PIXELS:
        reason = f"{what_came} claims {width}*{height} pixels, which no picture of this model has"
        raise Failure("image_unusable", reason)
    needed = width * height * DECODED_BYTES.get(kind, DECODED_BYTES_ELSE) + 2 * len(content)
    if needed > MEMORY.total:
        reason = f"a {kind} picture of {width}*{height} pixels needs {needed // MIB} MiB to decode"
        raise Failure("image_too_large", f"{reason}; at most {MEMORY.total // MIB} are taken")
    return needed


def ends_as_it_should(kind: str, content: bytes) -> bool:
    """Whether a format whose decoder forgives a missing end has its end."""
    if kind == "PNG":
        return b"IEND\xaeB`\x82" in content[-1024:]
    if kind == "JPEG":
        return b"\xff\xd9" in content.rstrip(b"\0")[-1024:]
    if kind == "WEBP":
        return len(content) >= 8 + int.from_bytes(content[4:8], "little")
    return True


def converted(picture: Picture, wanted: str, stop: Stop) -> tuple[bytes, int, int]:
    """The picture in the wanted format, its width and height; the service's bytes where they are of that format.

    Raises:
        Failure: image_unusable; paid_not_downloaded where its time is over. Stopped.
    """
    if picture.format == wanted:
        return picture.content, picture.width, picture.height

    def convert() -> tuple[bytes, int, int]:
        image, target = turned(picture.image), io.BytesIO()
        plain = flattened(image) if wanted == "JPEG" else image.convert("RGBA" if has_alpha(image) else "RGB")
        for name in ("exif", "xmp"):  # they would say that it has to be turned once more
            plain.info.pop(name, None)
        plain.save(target, wanted, **SAVE_OPTIONS[wanted])
        return target.getvalue(), image.width, image.height

    try:
        return in_its_time("converted", convert, stop)
    except (OSError, ValueError) as error:
        reason = f"the picture cannot be converted to {wanted} ({type(error).__name__})"
        raise Failure(
            "image_unusable", reason, hint="run next_command with another --output, such as one ending in .png"
        ) from None


def turned(image: PIL.Image.Image) -> PIL.Image.Image:
    """The picture as it is meant to be seen, by its Exif."""
    from PIL.Image import Transpose

    turns = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }
    turn = turns.get(orientation(image.info.get("exif", b"")))
    return image if turn is None else image.transpose(turn)


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


def size_warning(asked: str, has: tuple[int, int], provider: Provider) -> str | None:
    """A sentence where the picture is not what was asked for, as far as the provider lets that be asked."""
    width, height = parse_size(asked)
    if has == (width, height):
        return None
    if provider.sizes_are_ratios and math.isclose(has[0] * height, has[1] * width, rel_tol=RATIO_TOLERANCE):
        return None
    return f"the picture is {has[0]}*{has[1]}, asked was {asked}"
