"""The pictures: drawn from prompt, seed and size, with a caption that says that no model made them."""

from __future__ import annotations

import hashlib
import io
import math
import random
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from PIL import Image, ImageColor, ImageDraw, ImageFont

Color = tuple[int, ...]

CAPTION = "MOCK PICTURE - not made by Z-Image Turbo"
PICTURES_KEPT = 24  # so that a long run does not eat the memory
# Of each mood: the sky from top to horizon, the sun or moon, the nearest land.
PALETTES = (
    ("#27306b", "#7b5a9c", "#ee8f88", "#ffd9a8", "#fff3d6", "#1b1838"),
    ("#0b1030", "#1c2f63", "#3f6c9c", "#a9cfd6", "#f4f1de", "#070c1f"),
    ("#3d7ea6", "#79b4c9", "#c6e2dc", "#fdf3dc", "#fffbea", "#12353f"),
    ("#3a0d3f", "#a3214f", "#f0633c", "#ffc765", "#ffe9a8", "#1f0a24"),
    ("#5b6c9e", "#95a3c8", "#d2cadd", "#f8e3dc", "#fffdf8", "#262b4a"),
    ("#04121f", "#0a3a4a", "#15706d", "#7fd0a5", "#eafff1", "#020a12"),
)
HILLS = 6


@dataclass(frozen=True)
class Picture:
    """All that a picture is drawn from: the same five give the same bytes."""

    prompt: str
    seed: int
    width: int
    height: int
    kind: str = "png"  # or "jpeg", "webp"


@lru_cache(maxsize=PICTURES_KEPT)
def draw_file(picture: Picture) -> bytes:
    """The picture as an image file of its kind."""
    file = io.BytesIO()
    draw(picture).save(file, picture.kind, compress_level=1, quality=90)  # for PNG, and for the others
    return file.getvalue()


def draw(picture: Picture) -> Image.Image:
    """Hills before a low sun. Colors and outlines follow from prompt and seed, their extent from the size."""
    rng = random.Random(hashlib.sha256(f"{picture.seed}\n{picture.prompt}".encode()).digest())
    *sky, light, land = (ImageColor.getrgb(name) for name in rng.choice(PALETTES))
    width, height = size = picture.width, picture.height
    unit, haze = min(size), sky[-1]
    image = _gradient((*sky, haze), size)
    sun = _sun(round(unit * rng.uniform(1.0, 1.6)))
    x, y = width * rng.uniform(0.2, 0.8), height * rng.uniform(0.32, 0.5)
    image.paste(light, (round(x - sun.width / 2), round(y - sun.height / 2)), sun)
    for hill in range(HILLS):
        near = (hill + 1) / HILLS
        color = _mix(haze, land, near)
        outline = _hill(rng, size, height * (0.5 + 0.36 * near), unit * (0.05 + 0.06 * near), 2 * width / unit)
        image.paste(_gradient((color, _mix(color, haze, 0.6 - 0.5 * near)), size), mask=outline)
    _write_caption(image, picture, light, land)
    return image


def _mix(a: Color, b: Color, part: float) -> Color:
    return tuple(round(x + (y - x) * part) for x, y in zip(a, b, strict=True))


def _gradient(colors: Sequence[Color], size: tuple[int, int]) -> Image.Image:
    column = Image.new("RGB", (1, len(colors)))
    column.putdata(colors)
    return column.resize((1, size[1]), Image.Resampling.BICUBIC).resize(size)  # one column first: many times faster


def _sun(side: int) -> Image.Image:
    """A disc and the light around it, as a mask."""
    glow = Image.radial_gradient("L").point([round(170 * max(0, 1 - far / 180) ** 2) for far in range(256)])
    mask = glow.resize((side * 2, side * 2))  # twice the size, for a smooth outline
    ImageDraw.Draw(mask).ellipse((side * 0.86, side * 0.86, side * 1.14, side * 1.14), fill=255)
    return mask.reduce(2)


def _hill(rng: random.Random, size: tuple[int, int], base: float, tall: float, waves: float) -> Image.Image:
    """All below an outline of waves, each finer and lower than the one before, as a mask."""
    width, height = size[0] * 2, size[1] * 2
    octaves = [(math.tau * waves * 1.9**n / width, 0.5**n, rng.uniform(0, math.tau)) for n in range(7)]
    edge = []
    for x in range(0, width + 4, 4):
        edge.append((x, 2 * (base - tall * sum(high * math.sin(fine * x + start) for fine, high, start in octaves))))
    mask = Image.new("L", (width, height))
    ImageDraw.Draw(mask).polygon([(0, height), *edge, (width, height)], fill=255)
    return mask.reduce(2)


def _write_caption(image: Image.Image, picture: Picture, ink: Color, paper: Color) -> None:
    """A strip at the bottom: that this is a mock, seed and size, and as much of the prompt as fits."""
    width, height = image.size
    size = max(2, round(min(max(12, 0.021 * math.sqrt(width * height)), width / 24, height / 12)))
    # The font has no Chinese, and accents only as part of their letter.
    prompt = unicodedata.normalize("NFKD", picture.prompt[:500]).encode("ascii", "ignore").decode()
    facts = f"seed {picture.seed}   {width}*{height}   {' '.join(prompt.split())}"
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(size)
    pen.rectangle((0, height - 4 * size, width, height), paper)
    pen.text((size, height - 2.8 * size), CAPTION, ink, font, anchor="lm")
    pen.text((size, height - 1.3 * size), "".join(filter(str.isprintable, facts)), ink, font, anchor="lm")
