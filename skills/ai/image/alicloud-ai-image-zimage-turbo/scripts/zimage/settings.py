"""Settings: the command line's options of one provider alone, and how their values are read."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from zimage.outside import json_of


class Setting(NamedTuple):
    """A command line option of one provider alone: `model_path` is --model-path."""

    name: str
    metavar: str
    help: str
    default: Any
    read: Callable[[Any], Any]  # the value that a text means; raises ValueError with what it must be
    repeatable: bool = False  # then `read` gets all texts
    said: Callable[[Any], Any] = str  # what a value was read from; raises ValueError
    shapes_picture: bool = True  # a row of a batch is another one where it is another
    max_bytes: int = 0  # of the file that the text names: then `read` gets its bytes, and of evidence what it holds
    alone: str = ""  # a warning to whoever uses it for one picture

    @property
    def is_switch(self) -> bool:
        """Whether it is given without a value."""
        return not self.metavar


Number = TypeVar("Number", int, float)


def number(kind: type[Number], least: float, most: float, name: str = "a number") -> Callable[[str], Number]:
    """A reader of options: a number within bounds, without sign and exponent."""
    form = "[0-9]{1,9}" + r"(\.[0-9]{1,9})?" * (kind is float)

    def read(text: str) -> Number:
        if not re.fullmatch(form, text) or not least <= kind(text) <= most:
            raise ValueError(f"{name} from {least:g} to {most:g}")
        return kind(text)

    return read


def one_of(names: Collection[str]) -> Callable[[str], str]:
    """A reader of options: one of these names."""

    def read(text: str) -> str:
        if text not in names:
            raise ValueError(f"one of {', '.join(names)}")
        return text

    return read


def is_on(value: Any) -> bool:
    """A reader of switches: they are given, or left out."""
    if value is not True:
        raise ValueError("true")
    return True


STEPS = Setting("steps", "N", "sampling steps", 8, number(int, 1, 200, "a whole number"))
GUIDANCE = Setting("guidance", "X", "guidance scale; this model is made for 0", 0.0, number(float, 0, 100))


FIELD_NAME = re.compile("[A-Za-z_][A-Za-z0-9_.-]{0,63}")
SECRET_NAME = re.compile("api_?key|authorization|token|secret|passw", re.IGNORECASE)


def field_name(text: str, reserved: Mapping[str, str]) -> str:
    """The name of a field that a user may add or leave out. `reserved`: those that they may not, and what to use.

    Raises:
        ValueError: with what it must be.
    """
    if not FIELD_NAME.fullmatch(text):
        raise ValueError("the name of a field, letters, digits and _ . -")
    if text in reserved:
        raise ValueError(f"another field than {text}: {reserved[text]}")
    return text


def added_fields(reserved: Mapping[str, str]) -> Setting:
    """--body NAME=JSON: fields that the request gets beside those of the provider."""

    def read(texts: Sequence[str]) -> dict[str, Any]:
        fields: dict[str, Any] = {}
        for text in texts:
            name, equals, said = text.partition("=")
            if not equals:
                raise ValueError("NAME=JSON")
            if SECRET_NAME.search(name):
                raise ValueError("no key or password: it would be kept in the evidence")
            fields[field_name(name, reserved)] = value_of(said)
        try:
            json.dumps(fields, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("plain text") from None
        return fields

    def said(fields: Any) -> list[str]:
        if not isinstance(fields, dict):
            raise ValueError("an object of fields")
        return [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in fields.items()]

    text = "a field to add to the request; what is no JSON is taken as text; repeatable"
    return Setting("body", "NAME=JSON", text, None, read, repeatable=True, said=said)


def value_of(text: str) -> Any:
    """JSON, else the text itself: `--body quality=high` needs no quotes."""
    try:
        value = json_of(text)
        json.dumps(value, allow_nan=False)
        return value
    except ValueError:
        return text


def left_out_fields(reserved: Mapping[str, str]) -> Setting:
    """--omit NAME: fields that the request goes without."""

    def read(texts: Sequence[str]) -> list[str]:
        return sorted({field_name(text, reserved) for text in texts})

    def said(names: Any) -> list[str]:
        if not isinstance(names, list):
            raise ValueError("a list of names")
        return [str(name) for name in names]

    text = "a field to leave out of the request, where the server refuses it; repeatable"
    return Setting("omit", "NAME", text, None, read, repeatable=True, said=said)
