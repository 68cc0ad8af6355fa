"""What a field of a request may hold, checked like the service does it."""

from __future__ import annotations

import math
import re
import secrets
from collections.abc import Callable
from typing import Any

MIN_PIXELS, MAX_PIXELS = 512 * 512, 2048 * 2048  # the service's bounds on width * height
MIN_SIDE = 64  # the service names none: this only keeps out slivers that cannot be drawn
MAX_SEED = 2147483647

Rule = tuple[Callable[[Any], bool], str]  # whether a value is right, and what is right in words


def text(longest: float = math.inf) -> Rule:
    def valid(value: object) -> bool:
        if not isinstance(value, str) or re.search("[\ud800-\udfff]", value):
            return False
        return bool(value.strip()) and len(value) <= longest

    return valid, "a string that is not blank" + (f", of at most {longest} characters" if longest < math.inf else "")


def integer(low: int, high: int) -> Rule:
    # type() and not isinstance(): true and false are no integers.
    return lambda value: type(value) is int and low <= value <= high, f"an integer from {low} to {high}"


def boolean() -> Rule:
    return lambda value: type(value) is bool, "true or false"


def string() -> Rule:
    return lambda value: isinstance(value, str), "a string"


def one_of(*values: str) -> Rule:
    return lambda value: value in values, f"one of {', '.join(values)}"


def size(times: str, multiple: int = 1) -> Rule:
    pattern = re.compile(rf"([1-9][0-9]{{2,3}}){re.escape(times)}([1-9][0-9]{{2,3}})")

    def valid(value: object) -> bool:
        sides = pattern.fullmatch(value) if isinstance(value, str) else None
        if not sides:
            return False
        width, height = map(int, sides.groups())
        fitting = MIN_PIXELS <= width * height <= MAX_PIXELS and min(width, height) >= MIN_SIDE
        return fitting and width % multiple == height % multiple == 0

    steps = f", both multiples of {multiple}" if multiple > 1 else ""
    return valid, f'"width{times}height"{steps}, in total from 512*512 to 2048*2048 pixels'


def random_seed() -> int:
    return secrets.randbelow(MAX_SEED + 1)
