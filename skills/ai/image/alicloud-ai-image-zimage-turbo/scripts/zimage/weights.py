"""Weights: the files that hold a model's numbers, read by their headers; nothing of them is loaded.

Formats: safetensors (github.com/huggingface/safetensors, "Format") and GGUF 2 and 3 (github.com/ggml-org/ggml,
docs/gguf.md), of which the sizes of the types are those of ggml-common.h. Neither can hold code.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, BinaryIO, NamedTuple

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors format itself
MAX_GGUF_HEADER = 20_000_000  # more than any transformer needs; bounds how long it is read
MAX_DIMENSIONS = 4  # of a tensor in GGUF
CHUNK = 1 << 20


class Tensor(NamedTuple):
    """What a file says of one tensor. `kind`: the number format, as the file names it."""

    kind: str
    shape: tuple[int, ...]
    size: int  # bytes in the file

    @property
    def numbers(self) -> int:
        return math.prod(self.shape)


Tensors = Mapping[str, Tensor]
FLOATS = frozenset({"F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2"})  # of safetensors: a library converts these


def opened(path: str | Path) -> BinaryIO:
    """A file to read; what is no file, and might never end, is not opened. Raises OSError; ValueError."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("it is no file")
    return open(path, "rb")


# safetensors


def safetensors_in(path: Path) -> Tensors:
    """The tensors of a safetensors file, by its header, which also tells how long the file must be.

    Raises:
        OSError; ValueError where the file is damaged, or none.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        length = struct.unpack("<Q", head)[0] if len(head) == 8 else MAX_HEADER + 1
        if length > min(size, MAX_HEADER):
            raise ValueError("it is cut off, or no safetensors file")
        content = file.read(length)
    try:
        header = json.loads(content)
        ends = [8 + length]
        tensors = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            begin, end = (int(offset) for offset in entry["data_offsets"])
            tensors[name] = Tensor(str(entry["dtype"]), tuple(int(side) for side in entry["shape"]), end - begin)
            ends.append(8 + length + end)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        raise ValueError("its header is damaged") from None
    if size != max(ends):
        raise ValueError(f"it has {size} of {max(ends)} bytes")
    return tensors


# GGUF

# The types that can be read back: number -> name, numbers in a block, bytes of a block.
GGML_TYPES = {
    0: ("F32", 1, 4),
    1: ("F16", 1, 2),
    2: ("Q4_0", 32, 18),
    3: ("Q4_1", 32, 20),
    6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24),
    8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110),
    12: ("Q4_K", 256, 144),
    13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210),
    30: ("BF16", 1, 2),
}
# Of the values before the tensors: number of the type -> bytes. 8 is text, 9 a list of one type.
VALUE_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
TEXT, LIST = 8, 9


class _Header:
    """Reads the header of a GGUF file, within bounds."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    def take(self, length: int) -> bytes:
        content = self._file.read(length) if self._file.tell() + length <= MAX_GGUF_HEADER else b""
        if len(content) != length:
            raise ValueError("it is cut off, or no GGUF file")
        return content

    def number(self, form: str) -> int:
        return int(struct.unpack(f"<{form}", self.take(struct.calcsize(f"<{form}")))[0])

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", "replace")

    def skip_value(self, kind: int) -> None:
        """Go past a value; each entry of a list takes a byte or more, so that none is without end."""
        if kind == TEXT:
            self.text()
        elif kind == LIST:
            inner, count = self.number("I"), self.number("Q")
            if inner in VALUE_SIZES:
                self.take(VALUE_SIZES[inner] * count)
            elif inner == TEXT:
                for _ in range(count):
                    self.text()
            else:
                raise ValueError("its header is damaged")
        elif kind in VALUE_SIZES:
            self.take(VALUE_SIZES[kind])
        else:
            raise ValueError("its header is damaged")


def gguf_in(path: Path) -> Tensors:
    """The tensors of a GGUF file, by its header, which also tells how long the file must be.

    Raises:
        OSError; ValueError where the file is damaged, none, or holds what cannot be read back.
    """
    with opened(path) as file:
        size = os.fstat(file.fileno()).st_size
        header = _Header(file)
        if header.take(4) != b"GGUF" or header.number("I") not in (2, 3):
            raise ValueError("it is no GGUF file of version 2 or 3")
        count, values = header.number("Q"), header.number("Q")
        alignment = 32
        for _ in range(values):
            name, kind = header.text(), header.number("I")
            if name == "general.alignment" and kind == 4:
                alignment = max(1, header.number("I"))
            else:
                header.skip_value(kind)
        tensors, end = {}, 0
        for _ in range(count):
            name, dimensions = header.text(), header.number("I")
            if dimensions > MAX_DIMENSIONS:
                raise ValueError("its header is damaged")
            shape = tuple(header.number("Q") for _ in range(dimensions))
            number, offset = header.number("I"), header.number("Q")
            if number not in GGML_TYPES:
                known = ", ".join(name for name, *_ in GGML_TYPES.values())
                raise ValueError(f"it holds numbers of type {number}, which cannot be read back; those can: {known}")
            kind_name, block, bytes_of_block = GGML_TYPES[number]
            tensors[name] = Tensor(kind_name, shape, math.prod(shape) // block * bytes_of_block)
            end = max(end, offset + tensors[name].size)
        start = -(-file.tell() // alignment) * alignment
    if size < start + end:
        raise ValueError(f"it has {size} of {start + end} bytes")
    return tensors


# Files that a user names

FILE = r"(?P<file>.*\.{ending})"
WEIGHT = r"(:(?P<weight>[-+]?[0-9]{1,3}(\.[0-9]{1,6})?))?"
PIN = "(#sha256=(?P<sha256>[0-9a-f]{64}))?"
MOST_WEIGHT = 10.0


def named_file(text: str, ending: str, *, with_weight: bool = False) -> dict[str, Any]:
    """The file that a text names, as JSON: FILE, or FILE:WEIGHT; a record has its hash behind that, as #sha256=HEX.

    The ending ends the path, so that the colon of C: is none of a weight. What is named by a relative path is made
    absolute: a record then means the same file everywhere.

    Raises:
        ValueError: with what it must be.
    """
    form = FILE.replace("{ending}", ending) + WEIGHT * with_weight + PIN
    found = re.fullmatch(form, text, re.IGNORECASE) if text.isprintable() else None
    weight = float(found["weight"] or 1) if found and with_weight else 1.0
    if found is None or not -MOST_WEIGHT <= weight <= MOST_WEIGHT:
        more = f", or FILE.{ending}:WEIGHT with a number from {-MOST_WEIGHT:g} to {MOST_WEIGHT:g}" * with_weight
        raise ValueError(f"a .{ending} file{more}")
    path = found["file"]
    if not (PurePosixPath(path).is_absolute() or PureWindowsPath(path).is_absolute()):
        path = os.path.abspath(os.path.expanduser(path))
    known = {"file": path, "weight": weight if with_weight else None, "sha256": found["sha256"]}
    return {name: value for name, value in known.items() if value is not None}


def said_of(file: Any) -> str:
    """The text that `named_file` reads so. Raises ValueError."""
    if not isinstance(file, dict) or "file" not in file:
        raise ValueError("an object with the path of a file")
    weight, pin = file.get("weight"), file.get("sha256")
    return f"{file['file']}" + f":{weight}" * (weight is not None) + f"#sha256={pin}" * (pin is not None)


def sha256_of(path: str | Path) -> str:
    """The hash of a file, of which no more than a piece is in memory. Raises OSError; ValueError where it is none."""
    digest = hashlib.sha256()
    with opened(path) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
