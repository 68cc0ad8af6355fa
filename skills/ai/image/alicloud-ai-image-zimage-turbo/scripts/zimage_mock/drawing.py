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
from typing import Any, NamedTuple

from PIL import Image, ImageChops, ImageColor, ImageDraw, ImageFont, ImageOps

PICTURES_KEPT = 24  # so that a long run does not eat the memory
Color = tuple[int, int, int]
Point = tuple[float, float]

CAPTION = "MOCK PICTURE - not made by Z-Image Turbo"
GRAIN = 4  # gray levels; also hides the steps of the gradients


@dataclass(frozen=True)
class Picture:
    """All that a picture is drawn from: the same five give the same bytes."""

    prompt: str
    seed: int
    width: int
    height: int
    kind: str = "png"  # or "jpeg", "webp"


class Palette(NamedTuple):
    """Colors of one mood: the sky from top to horizon, the sun or moon, the nearest land."""

    sky: str
    light: str
    land: str
    night: bool = False


PALETTES = (
    Palette("#27306b #7b5a9c #ee8f88 #ffd9a8", "#fff3d6", "#1b1838"),
    Palette("#0b1030 #1c2f63 #3f6c9c #a9cfd6", "#f4f1de", "#070c1f", night=True),
    Palette("#3d7ea6 #79b4c9 #c6e2dc #fdf3dc", "#fffbea", "#12353f"),
    Palette("#3a0d3f #a3214f #f0633c #ffc765", "#ffe9a8", "#1f0a24"),
    Palette("#12122e #3b2463 #8a3d83 #e58a9d", "#ffe3d8", "#0d0a20", night=True),
    Palette("#0d3b3e #2f7d6d #8cc09a #f1e7b8", "#fff8da", "#082526"),
    Palette("#c25b3f #e58f5b #f3bf80 #fbe8c3", "#fffaf0", "#4b1d1b"),
    Palette("#5b6c9e #95a3c8 #d2cadd #f8e3dc", "#fffdf8", "#262b4a"),
    Palette("#04121f #0a3a4a #15706d #7fd0a5", "#eafff1", "#020a12", night=True),
    Palette("#7a4a6b #c77f8b #f0b7a0 #fde7cf", "#fff6ea", "#33203a"),
)

# The outline of a pine, left side upwards, in units of its half width and of its height.
PINE = (
    *((-0.12, 0.0), (-0.12, 0.1), (-1.0, 0.1), (-0.45, 0.36), (-0.75, 0.33)),
    *((-0.3, 0.6), (-0.5, 0.57), (-0.17, 0.8), (-0.27, 0.78)),
)


ENCODINGS = {"png": {"compress_level": 1}, "jpeg": {"quality": 90}, "webp": {"quality": 90}}


@lru_cache(maxsize=PICTURES_KEPT)
def draw_file(picture: Picture) -> bytes:
    """The picture as an image file of its kind."""
    file = io.BytesIO()
    draw(picture).save(file, picture.kind, **ENCODINGS[picture.kind])
    return file.getvalue()


def draw(picture: Picture) -> Image.Image:
    """A landscape over a caption. Palette and landscape follow from prompt and seed, the composition from the size."""
    rng = random.Random(hashlib.sha256(f"{picture.seed}\n{picture.prompt}".encode()).digest())
    palette = rng.choice(PALETTES)
    strip = _caption(picture, palette)
    scene = _grained(_landscape(rng, palette, picture.width, picture.height - strip.height), rng)
    image = Image.new("RGB", (picture.width, picture.height))
    image.paste(scene, (0, 0))
    image.paste(strip, (0, scene.height))
    return image


def _landscape(rng: random.Random, palette: Palette, width: int, height: int) -> Image.Image:
    kind = rng.choice(("peaks", "lake", "dunes"))
    sky = [_rgb(name) for name in palette.sky.split()]
    light, near, haze = _rgb(palette.light), _rgb(palette.land), sky[-1]
    unit, wide = min(width, height), width / height
    horizon = round(height * {"peaks": 0.72, "lake": rng.uniform(0.56, 0.64), "dunes": 0.62}[kind])
    image = Image.new("RGB", (width, height), near)
    image.paste(_gradient((width, horizon), sky), (0, 0))
    sun = (width * rng.uniform(0.25, 0.75), horizon * rng.uniform(0.36, 0.62))
    radius = unit * rng.uniform(0.06, 0.12)
    if palette.night:
        _stars(image, rng, horizon, _mix(sky[1], light, 0.75))
    _glow(image, sun, radius * 8, _mix(haze, light, 0.4), 0.6)
    _glow(image, sun, radius * 3.2, light, 0.55)
    _disc(image, sun, radius, light, crescent=palette.night)
    layers = {"peaks": 5, "lake": 3, "dunes": 6}[kind]
    for layer in range(layers):
        depth = (layer + 1) / layers
        color = _mix(_mix(haze, sky[1], 0.25), near, depth**1.2 * (0.8 if kind == "lake" else 0.97))
        mist = _mix(color, haze, 0.5 - 0.35 * depth)
        if kind == "lake":
            edge = _ridge(rng, width, 3.2 * wide, 6, horizon, unit * (0.30 - 0.09 * layer))
        elif kind == "peaks":
            base = min(horizon + (height - horizon) * (layer - 0.6) / 3, height + unit * 0.04)
            edge = _ridge(rng, width, (2.2 + layer * 0.5) * wide, 6, base, unit * (0.36 - 0.045 * layer))
        else:
            base = min(horizon + (height - horizon) * layer / (layers - 0.8), height + unit * 0.04)
            edge = _ridge(rng, width, 1.6 * wide, 2, base, unit * (0.13 + 0.022 * layer))
        trees = _pines(rng, edge, unit) if kind == "peaks" and layer == layers - 1 else []
        _land(image, edge, (color, mist), horizon if kind == "lake" else height, trees)
    if kind == "lake":
        _water(image, rng, horizon, _mix(sky[0], near, 0.4), light, sun[0])
        shore = _ridge(rng, width, 1.5 * wide, 2, height + unit * 0.01, unit * 0.09)
        _land(image, shore, (near, near), height, _pines(rng, shore, unit * 1.2))
    return image


def _rgb(name: str) -> Color:
    red, green, blue = ImageColor.getrgb(name)[:3]
    return red, green, blue


def _mix(a: Color, b: Color, part: float) -> Color:
    red, green, blue = (round(x + (y - x) * part) for x, y in zip(a, b, strict=True))
    return red, green, blue


def _gradient(size: tuple[int, int], colors: Sequence[Color]) -> Image.Image:
    strip = Image.new("RGB", (1, len(colors)))
    for row, color in enumerate(colors):
        strip.putpixel((0, row), color)
    return strip.resize((1, size[1]), Image.Resampling.BICUBIC).resize(size)  # one column first: many times faster


def _paint(image: Image.Image, color: Color, at: Point, mask: Image.Image) -> None:
    """Color through a mask whose upper left corner is `at`."""
    image.paste(Image.new("RGB", mask.size, color), (round(at[0]), round(at[1])), mask)


def _stars(image: Image.Image, rng: random.Random, horizon: int, color: Color) -> None:
    mask = Image.new("L", (image.width * 2, horizon * 2))
    pen = ImageDraw.Draw(mask)
    for _ in range(round(170 * image.width / image.height)):
        x, y = rng.random() * mask.width, rng.random() ** 1.5 * mask.height * 0.7
        size = min(image.size) * rng.choice((0.0009, 0.0012, 0.0012, 0.0028))
        pen.ellipse((x - size, y - size, x + size, y + size), fill=rng.randrange(90, 256))
    _paint(image, color, (0, 0), mask.reduce(2))


def _glow(image: Image.Image, center: Point, radius: float, color: Color, strength: float) -> None:
    side = round(2 * radius)
    # Pillow's radial gradient reaches 255 in the corners, 255/√2 where the circle touches the sides.
    fade = [round(255 * strength * max(0.0, 1 - value * 2**0.5 / 250) ** 2) for value in range(256)]
    mask = Image.radial_gradient("L").resize((side, side)).point(fade)
    _paint(image, color, (center[0] - radius, center[1] - radius), mask)


def _disc(image: Image.Image, center: Point, radius: float, color: Color, crescent: bool) -> None:
    side = round(2 * radius)
    mask = Image.new("L", (side * 4, side * 4))
    pen = ImageDraw.Draw(mask)
    pen.ellipse((0, 0, side * 4 - 1, side * 4 - 1), fill=255)
    if crescent:
        pen.ellipse((side * 1.2, -side * 0.6, side * 5.2, side * 3.4), fill=0)
    _paint(image, color, (center[0] - radius, center[1] - radius), mask.reduce(4))


def _ridge(rng: random.Random, width: int, span: float, octaves: int, base: float, tall: float) -> list[Point]:
    """The upper edge of a piece of land from left to right: noise in octaves, `span` hills wide, `tall` high."""
    count = max(160, width // 3)
    heights = [0.0] * count
    for octave in range(octaves):
        knots = [rng.random() for _ in range(math.ceil(span * 2**octave) + 2)]
        for i in range(count):
            left, part = divmod(i / (count - 1) * span * 2**octave, 1)
            if octave == 0 or octaves < 3:
                part = part * part * (3 - 2 * part)  # round hills; the finer octaves of rock stay angular
            knot = int(left)
            heights[i] += 0.47**octave * (knots[knot] + (knots[knot + 1] - knots[knot]) * part)
    low, high = min(heights), max(heights)
    return [(i * width / (count - 1), base - tall * (h - low) / (high - low)) for i, h in enumerate(heights)]


def _pines(rng: random.Random, edge: list[Point], unit: float) -> list[list[Point]]:
    """Outlines of pines along an edge, denser and taller in clumps."""
    width, step = edge[-1][0], edge[1][0]
    clumps = [rng.uniform(0.15, 1) for _ in range(int(width / unit * 5) + 2)]
    trees, x = [], 0.0
    while x < width:
        tall = unit * (0.025 + 0.065 * rng.random() * clumps[int(x / unit * 5)])
        half, foot = tall * 0.19, edge[int(x / step)][1] + tall * 0.1
        outline = [*PINE, (0.0, 1.0), *((-dx, dy) for dx, dy in reversed(PINE))]
        trees.append([(x + half * dx, foot - tall * dy) for dx, dy in outline])
        x += half * rng.uniform(0.9, 3)
    return trees


def _land(
    image: Image.Image, edge: list[Point], colors: tuple[Color, Color], bottom: int, trees: Sequence[list[Point]] = ()
) -> None:
    """All below the edge and the trees on it, drawn at twice the size for a smooth outline."""
    top = max(0, int(min(y for outline in (edge, *trees) for _, y in outline)))
    size = (image.width, bottom - top)
    mask = Image.new("L", (size[0] * 2, size[1] * 2))
    pen = ImageDraw.Draw(mask)
    for outline in ([(0, bottom), *edge, (image.width, bottom)], *trees):
        pen.polygon([(x * 2, (y - top) * 2) for x, y in outline], fill=255)
    image.paste(_gradient(size, colors), (0, top), mask.reduce(2))


def _water(image: Image.Image, rng: random.Random, horizon: int, tint: Color, light: Color, sun_x: float) -> None:
    """Fills all below the horizon with the mirror image of what is above, blurred, rippled and glittering."""
    width, deep = image.width, image.height - horizon
    mirror = ImageOps.flip(image.crop((0, max(0, horizon - round(deep * 1.15)), width, horizon)))
    margin = width // 60
    mirror = mirror.resize((width, max(2, deep // 12)), Image.Resampling.BOX).resize((width + 2 * margin, deep))
    mirror = Image.blend(mirror, _gradient(mirror.size, (_mix(tint, light, 0.25), tint)), 0.3)
    y = 0
    while y < deep:  # rows slide sideways, thicker and wider towards the viewer
        rows = 1 + y * 5 // deep
        left = margin + round(rng.uniform(-1, 1) * margin * y / deep * 0.7)
        image.paste(mirror.crop((left, y, left + width, min(deep, y + rows))), (0, horizon + y))
        y += rows
    unit = min(image.size)
    mask = Image.new("L", (width * 2, deep * 2))
    pen = ImageDraw.Draw(mask)
    for _ in range(240):
        down = rng.random() ** 1.7
        x, y_mid = 2 * (sun_x + rng.gauss(0, unit * (0.03 + 0.1 * down))), mask.height * down
        half, thick = unit * rng.uniform(0.006, 0.045) * (0.4 + down), max(1.0, unit * 0.0012 * (0.6 + 2 * down))
        shine = round(rng.uniform(70, 210) * (1 - 0.6 * down))
        pen.ellipse((x - half, y_mid - thick, x + half, y_mid + thick), fill=shine)
    _paint(image, light, (0, horizon), mask.reduce(2))


def _grained(image: Image.Image, rng: random.Random) -> Image.Image:
    noise = Image.frombytes("L", image.size, rng.randbytes(image.width * image.height))
    noise = noise.point([value * GRAIN // 256 for value in range(256)])
    return ImageChops.add(image, Image.merge("RGB", (noise, noise, noise)), offset=-(GRAIN // 2))


def _caption(picture: Picture, palette: Palette) -> Image.Image:
    """The strip below the landscape: that this is a mock, what was asked, seed and size."""
    wanted = max(12, 0.021 * math.sqrt(picture.width * picture.height))
    size = max(2, round(min(wanted, picture.width / 24, picture.height / 12)))
    pad, line = round(size * 0.9), round(size * 1.45)
    big, small = ImageFont.load_default(size), ImageFont.load_default(round(size * 0.82))
    paper, ink = _mix(_rgb(palette.land), (0, 0, 0), 0.35), _mix(_rgb(palette.light), (255, 255, 255), 0.4)
    strip = Image.new("RGB", (picture.width, 2 * line + round(pad * 1.3)), paper)
    pen = ImageDraw.Draw(strip)
    pen.rectangle((0, 0, strip.width, max(1, size // 9)), fill=_rgb(palette.sky.split()[-1]))
    facts = f"seed {picture.seed}   {picture.width}*{picture.height}"
    room = strip.width - 3 * pad - small.getlength(facts)
    middle = pad * 0.75 + line * 0.5
    pen.text((pad, middle), CAPTION, ink, big, anchor="lm")
    pen.text((pad, middle + line), _fitting(picture.prompt, small, room), _mix(ink, paper, 0.3), small, anchor="lm")
    pen.text((strip.width - pad, middle + line), facts, _mix(ink, paper, 0.3), small, anchor="rm")
    return strip


def _fitting(text: str, font: Any, room: float) -> str:
    """The text without letters that the font lacks (it has no Chinese), cut to the room."""
    missing = bytes(font.getmask("\uffff"))
    plain = unicodedata.normalize("NFKD", " ".join(text[:500].split()))
    drawn = " ".join("".join(c for c in plain if c.isprintable() and bytes(font.getmask(c)) != missing).split())
    if font.getlength(drawn) <= room:
        return drawn
    while drawn and font.getlength(drawn + "...") > room:
        drawn = drawn[:-1]
    return f"{drawn.rstrip()}..." if drawn else ""
