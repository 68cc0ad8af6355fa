"""Keys: where the user keeps the key."""

from __future__ import annotations

import io
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from zimage.errors import Failure, os_reason
from zimage.files import open_regular
from zimage.outside import outside_text, remember_secret


class KeyPlaces(NamedTuple):
    """The places of one provider's key, in the order in which they are looked at."""

    variable: str  # environment, and `.env` in the working folder
    optional: bool = False  # calls may go without, and do so wherever the key must not go
    ini_file: str | None = None  # below the home folder, INI
    ini_option: str | None = None
    ini_profile_variables: tuple[str, ...] = ()
    file_variable: str | None = None  # names a file that holds the key alone
    file: str | None = None  # below the home folder, holds the key alone


class Key(NamedTuple):
    """A key and the place it came from; only `source` is ever shown. An empty one is not sent."""

    value: str
    source: str
    warning: str = ""

    def __repr__(self) -> str:
        return f"Key(source={self.source!r})"


NO_KEY = Key("", "")
MOST_LINES = 5000  # of a credentials file


def find_key(places: KeyPlaces, env: Mapping[str, str]) -> Key:
    """The first key found, environment first.

    Raises:
        Failure: key_missing, naming every place looked at; key_malformed.
    """
    notes: list[str] = []
    for key in filter(None, _keys(places, env, notes)):
        remember_secret(key.value)
        _check_key(key)
        return key
    options = [f"the environment variable {places.variable}"]
    if places.ini_file:
        options.append(f"{places.ini_option} in ~/{places.ini_file}")
    trouble = f" ({'; '.join(notes)})" if notes else ""
    raise Failure(
        "key_missing",
        f"no API key found{trouble}",
        hint=f"have the user set {' or '.join(options)}; a key never belongs in the chat or on a command line",
    )


def _keys(places: KeyPlaces, env: Mapping[str, str], notes: list[str]) -> Iterator[Key | None]:
    """What each place holds, looked at only when those before it hold nothing."""
    yield _key(env.get(places.variable, ""), f"environment {places.variable}")
    yield _key_in_dotenv(places, notes)
    yield _key_in_ini(places, env, notes)
    yield _key_in_named_file(places, env, notes)
    if places.file is not None:
        yield _key(_read_text(_home(places.file, env), notes), f"~/{places.file}")


def _key_in_dotenv(places: KeyPlaces, notes: list[str]) -> Key | None:
    """`.env` in the working folder. Only the key is taken: a checked-out project must not steer the rest."""
    text = _read_text(Path(".env"), notes)
    return _key(dotenv_value(text, places.variable), ".env in the working folder")


def dotenv_value(text: str, variable: str) -> str:
    """The value that the last line for a variable gives it, quotes and comment taken off; empty where none does."""
    value = ""
    for line in text.split("\n"):
        name, equals, said = line.partition("=")
        if equals and name.split() in ([variable], ["export", variable]):
            value = said.strip()
    if value[:1] in ("'", '"') and value.count(value[0]) > 1:
        return value[1:].partition(value[0])[0]
    return re.split(r"(?:^|\s)#", value)[0]


def _key_in_ini(places: KeyPlaces, env: Mapping[str, str], notes: list[str]) -> Key | None:
    if places.ini_file is None or places.ini_option is None:
        return None
    import configparser

    # The parser takes the square of the time for a long run of blanks, and for many lines that are none of an INI file.
    text = re.sub(r"(?<=\S)[^\S\n]+", " ", _read_text(_home(places.ini_file, env), notes))
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        if text.count("\n") > MOST_LINES:
            raise configparser.Error
        parser.read_string(text)
    except configparser.Error:
        notes.append(f"~/{places.ini_file} is not a valid INI file")
        return None
    profile = next((env[name] for name in places.ini_profile_variables if env.get(name)), "default")
    if not parser.has_section(profile):
        return None
    value = parser.get(profile, places.ini_option, fallback="").strip("\"'")
    return _key(value, f"~/{places.ini_file} [{outside_text(profile, 60)}]")


def _key_in_named_file(places: KeyPlaces, env: Mapping[str, str], notes: list[str]) -> Key | None:
    name = env.get(places.file_variable or "")
    if not name:
        return None
    key = _key(_read_text(Path(os.path.expanduser(name)), notes), f"file that {places.file_variable} names")
    if key is None:
        # The user chose this file: another account's key must not step in for it.
        raise Failure("key_missing", f"{places.file_variable} names a file that holds no readable key")
    return key


def _key(value: str, source: str) -> Key | None:
    return Key(value.strip(), source) if value.strip() else None


def _check_key(key: Key) -> None:
    """Refuse what no header can carry and what is plainly a placeholder."""
    if len(key.value) > 512:
        raise Failure("key_malformed", f"the API key from {key.source} is longer than any key: 512 characters")
    if not re.fullmatch(r"[!-~]+", key.value) or re.search("[\"'<>]", key.value):
        raise Failure(
            "key_malformed",
            f"the API key from {key.source} has blanks, quotes, brackets or characters beyond ASCII in it",
        )


def _home(relative: str, env: Mapping[str, str]) -> Path:
    try:
        return Path(env.get("HOME") or Path.home()) / relative
    except RuntimeError:  # no home folder is known
        return Path(os.devnull)


def _read_text(path: Path, notes: list[str]) -> str:
    """The text of a small file; empty where there is none. A file that cannot be read is noted."""
    try:
        if not path.is_file():
            return ""
        with io.TextIOWrapper(open_regular(path), encoding="utf-8-sig") as source:
            return source.read(64 * 1024)
    except (OSError, ValueError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else os_reason(error)
        notes.append(f"{outside_text(str(path), 200)} cannot be read: {reason}")
        return ""
