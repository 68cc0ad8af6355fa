"""Keys: where the user keeps the key."""

from __future__ import annotations

import base64
import contextlib
import functools
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zimage.account import below_home, config_of, path_of, shown_place
from zimage.contract import BASIC
from zimage.errors import Failure, os_reason
from zimage.files import open_regular
from zimage.outside import CONTROL, outside_text, remember_secret

if TYPE_CHECKING:
    from zimage.provider import ConfigFile


class KeyPlaces(NamedTuple):
    """The places of one provider's key, in the order in which they are looked at."""

    variable: str  # environment, and `.env` in the working folder
    optional: bool = False  # calls may go without, and do so wherever the key must not go
    ini_file: str | None = None  # below the home folder, INI
    ini_option: str | None = None
    ini_profile_variables: tuple[str, ...] = ()
    config_file: ConfigFile | None = None  # its `api_key`
    file_variable: str | None = None  # names a file that holds the key alone
    file: str | None = None  # below the home folder, holds the key alone
    unfit: Mapping[str, str] = {}  # how keys begin that are never sent, and why
    aliases: tuple[str, ...] = ()  # variables that mean the same, looked at right after it, there too

    @property
    def variables(self) -> tuple[str, ...]:
        """Those that may hold the key, the first that does counts."""
        return (self.variable, *self.aliases)


class Key(NamedTuple):
    """A key, or a login, and the place it came from; only `source` is ever shown. An empty one is not sent."""

    value: str
    source: str
    warning: str = ""
    others: Callable[[], Sequence[str]] = tuple  # what else is to be said of its places, should it be refused

    @property
    def noun(self) -> str:
        return "login" if self.value.startswith(BASIC) else "key"

    def __repr__(self) -> str:
        return f"Key(source={self.source!r})"


NO_KEY = Key("", "")
MOST_LINES = 5000  # of a credentials file
LONGEST_KEY = 512  # characters


def find_key(places: KeyPlaces, env: Mapping[str, str]) -> Key:
    """The first key found, environment first.

    Raises:
        Failure: key_missing, naming every place looked at; key_malformed.
    """
    notes: list[str] = []
    for key in filter(None, _keys(places, env, notes)):
        remember_secret(key.value)
        _check_key(key, places)
        return key._replace(others=functools.partial(_other_places, places, env, key))
    options = [f"the environment variable {places.variable}"]
    if places.ini_file:
        options.append(f"{places.ini_option} in ~/{places.ini_file}")
    trouble = f" ({'; '.join(notes)})" if notes else ""
    raise Failure(
        "key_missing",
        f"no API key found{trouble}",
        hint=f"have the user set {' or '.join(options)}; a key never belongs in the chat or on a command line",
    )


def find_login(names: tuple[str, str], places: KeyPlaces | None, env: Mapping[str, str]) -> Key | None:
    """User and password for HTTP's basic authentication (RFC 7617), from environment or `.env`; None where none is set.

    `names`: the variables of both. `places`: of a key, which it goes before: one header holds but one of them.

    Raises:
        Failure: key_malformed.
    """
    notes: list[str] = []
    dotenv = "" if all(map(env.get, names)) else _read_text(Path(".env"), notes)
    user, password = (env.get(name) or dotenv_value(dotenv, name) for name in names)
    if not user and not password:
        return None
    source = f"environment {' and '.join(names)}" if not dotenv else f"{' and '.join(names)}"
    pair = base64.b64encode(f"{user}:{password}".encode(errors="surrogateescape")).decode()
    for secret in (password, f"{user}:{password}", pair):
        remember_secret(secret)
    for is_so, what in (
        (not user or not password, f"is half of one: {names[0] if password else names[1]} is not set"),
        (":" in user, "has a colon in the user's name, which no login can have"),
        (CONTROL.search(user + password), "has control characters in it"),
        (len(user + password) > LONGEST_KEY, f"is longer than any: {LONGEST_KEY} characters"),
    ):
        if is_so:
            hint = "tell the user to set both anew, or none"
            raise Failure("key_malformed", f"the login of {source} {what}", hint=hint)
    login = Key(BASIC + pair, source)
    return login if places is None else login._replace(others=functools.partial(_other_places, places, env, login))


def _other_places(places: KeyPlaces, env: Mapping[str, str], used: Key) -> Sequence[str]:
    """Places that hold another key than the one that was used, and what is wrong with places, in words."""
    notes: list[str] = []
    others = []
    with contextlib.suppress(Failure):  # a place that stops the search
        found = [key for key in _keys(places, env, notes) if key and key.value != used.value]
        others = [f"another key is in: {', '.join(key.source for key in found)}"] if found else []
    return [*others, *notes]


def _keys(places: KeyPlaces, env: Mapping[str, str], notes: list[str]) -> Iterator[Key | None]:
    """What each place holds, looked at only when those before it hold nothing."""
    for variable in places.variables:
        yield _key(env.get(variable, ""), f"environment {variable}")
    yield _key_in_dotenv(places, notes)
    yield _key_in_ini(places, env, notes)
    config = config_of(places.config_file, env)
    yield _key(config.get("api_key", ""), f"api_key in {shown_place(places.config_file, env)}")
    yield _key_in_named_file(places, env, notes)
    if places.file is not None:
        yield _key(_read_text(below_home(places.file, env), notes), f"~/{places.file}")


def _key_in_dotenv(places: KeyPlaces, notes: list[str]) -> Key | None:
    """`.env` in the working folder. Only the key is taken: a checked-out project must not steer the rest."""
    text = _read_text(Path(".env"), notes)
    values = (dotenv_value(text, variable) for variable in places.variables)
    return _key(next(filter(None, values), ""), ".env in the working folder")


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
    text = re.sub(r"(?<=\S)[^\S\n]+", " ", _read_text(below_home(places.ini_file, env), notes))
    parser = configparser.ConfigParser(interpolation=None, strict=False)
    try:
        if text.count("\n") > MOST_LINES:
            raise configparser.Error
        parser.read_string(text)
    except configparser.Error:
        notes.append(f"~/{places.ini_file} is not a valid INI file")
        return None
    profile = next((env[name] for name in places.ini_profile_variables if env.get(name)), "default")
    named = f"[{outside_text(profile, 60)}]"
    value = parser.get(profile, places.ini_option, fallback="").strip("\"'")
    if text.strip() and not value:
        lack = places.ini_option if parser.has_section(profile) else "such profile"
        notes.append(f"~/{places.ini_file} {named} is looked at, and there is no {lack}")
    return _key(value, f"~/{places.ini_file} {named}")


def _key_in_named_file(places: KeyPlaces, env: Mapping[str, str], notes: list[str]) -> Key | None:
    name = env.get(places.file_variable or "")
    if not name:
        return None
    key = _key(_read_text(path_of(name, env), notes), f"file that {places.file_variable} names")
    if key is None:
        # The user chose this file: another account's key must not step in for it.
        raise Failure("key_missing", f"{places.file_variable} names a file that holds no readable key")
    return key


def _key(value: str, source: str) -> Key | None:
    return Key(value.strip(), source) if value.strip() else None


# What stands in examples and unfilled forms: words for a key, its last signs behind marks, the name of a variable.
PLACEHOLDER = re.compile(
    "|".join(
        (
            r"(?<![a-z])your(?:[^a-z]|[a-z]{0,40}key)",
            r"placeholder|change[-_.]?me|replace[-_.]|(?:goes|key|token)[-_.]?here",
            r"x{5}|[*]{2}|[.]{3}|…",
            r"\A(?:sk[-_])?(?:[-_x]+|(.)\1+|(?:my[-_])?(?:api[-_]?)?key|none|null|nil|undefined|true|false)?\Z",
            r"\A(?:\$[({]?[a-z_]|%[a-z_]+%\Z|\{\{|[<\[].*[>\]]\Z)",
        )
    ),
    re.IGNORECASE,
)


def _check_key(key: Key, places: KeyPlaces) -> None:
    """Refuse what no header can carry, what is plainly a placeholder, and what the service's host never takes.

    Where a key is optional any word is one: servers of users ask for none, and clients for something.
    """

    def refuse(what: str, hint: str | None = None) -> None:
        raise Failure("key_malformed", f"the API key from {key.source} {what}", hint=hint)

    if len(key.value) > LONGEST_KEY:
        refuse(f"is longer than any key: {LONGEST_KEY} characters")
    if not places.optional and (key.value.startswith(places.variables) or PLACEHOLDER.search(key.value)):
        refuse("is a placeholder, not a key", "tell the user to store their own key there, or to take this one away")
    if re.match(r"bearer\s", key.value, re.IGNORECASE):
        refuse("begins with the word Bearer", "tell the user to store the key alone; that word is added to each call")
    if not re.fullmatch(r"[!-~]+", key.value) or re.search("[\"'<>]", key.value):
        refuse("has blanks, quotes, brackets or characters beyond ASCII in it")
    for start, why in places.unfit.items():
        if key.value.lower().startswith(start):
            refuse(why, "tell the user; another key of theirs may be stored in its place")


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
