"""Where a key is found, in this process: the order of the places, how each is read, and what is told of a bad one.

That the program then sends that key, and shows it nowhere, is held by test_credentials.py.
"""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from zimage import keys, outside
from zimage.errors import Failure
from zimage.keys import Key, KeyPlaces, dotenv_value, find_key
from zimage.outside import mask
from zimage.provider import ConfigFile

PLACES = KeyPlaces(
    variable="X_API_KEY",
    ini_file=".x/credentials",
    ini_option="x_api_key",
    ini_profile_variables=("X_PROFILE", "Y_PROFILE"),
    file_variable="X_API_KEY_FILE",
    file=".x/api_key",
)
ALONE = KeyPlaces(variable="X_API_KEY")
KEY = "sk-test-0123456789abcdef"


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's home; the working folder is beside it, and nothing is remembered from other tests."""
    for name in ("home", "project", "home of nobody"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / "project")
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path / "home of nobody"))  # what is handed in counts
    monkeypatch.setattr(outside, "_secrets", set())
    return tmp_path / "home"


@pytest.fixture
def env(home: Path) -> dict[str, str]:
    return {"HOME": str(home)}


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def ini(home: Path, text: str | bytes) -> None:
    write(home / ".x" / "credentials", text)


def refusal(env: dict[str, str], places: KeyPlaces = PLACES) -> tuple[str, str, str]:
    """Code, message and advice where no key is to be had."""
    with pytest.raises(Failure) as caught:
        find_key(places, env)
    fault = caught.value.fault
    assert (fault.exit_code, fault.billed, fault.retryable) == (3, "no", False)
    return fault.code, fault.message, fault.hint


# The order ------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_the_first_place_that_holds_a_key_counts(env: dict[str, str], home: Path) -> None:
    write(home / ".x" / "api_key", "sk-own\n")
    assert find_key(PLACES, env)[:3] == Key("sk-own", "~/.x/api_key")[:3]
    env["X_API_KEY_FILE"] = str(write(home / "named", "sk-named\n"))
    assert find_key(PLACES, env)[:3] == Key("sk-named", "file that X_API_KEY_FILE names")[:3]
    ini(home, "[default]\nx_api_key = sk-ini\n")
    assert find_key(PLACES, env)[:3] == Key("sk-ini", "~/.x/credentials [default]")[:3]
    write(Path(".env"), "X_API_KEY=sk-dotenv\n")
    found = find_key(PLACES, env)
    assert found.value == "sk-dotenv" and ".env" in found.source
    env["X_API_KEY"] = " sk-env "
    assert find_key(PLACES, env)[:3] == Key("sk-env", "environment X_API_KEY")[:3]


def test_the_file_of_the_services_own_client_comes_after_that_of_its_other_tools(
    env: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keys, "config_of", lambda file, env: {"api_key": "sk-config"} if file else {})
    places = PLACES._replace(config_file=ConfigFile("X_CONFIG", ".x/config"))
    env["X_API_KEY_FILE"] = str(write(home / "named", "sk-named\n"))
    assert find_key(PLACES, env).value == "sk-named"
    assert find_key(places, env)[:2] == ("sk-config", "api_key in ~/.x/config")
    ini(home, "[default]\nx_api_key = sk-ini\n")
    assert find_key(places, env).value == "sk-ini"


def test_a_key_knows_where_others_lie_should_it_be_refused(env: dict[str, str], home: Path) -> None:
    env["X_API_KEY"] = "sk-own"
    assert list(find_key(PLACES, env).others()) == []
    write(home / ".x" / "api_key", "sk-own")
    assert list(find_key(PLACES, env).others()) == []  # the same key
    ini(home, "[default]\nx_api_key = sk-ini\n")
    write(Path(".env"), "X_API_KEY=sk-dotenv\n")
    assert list(find_key(PLACES, env).others()) == [
        "another key is in: .env in the working folder, ~/.x/credentials [default]"
    ]


def test_the_environment_of_the_process_is_one_too(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes no name but a text."""
    monkeypatch.delenv("X_API_KEY", raising=False)
    with pytest.raises(Failure) as caught:
        find_key(ALONE, os.environ)
    assert caught.value.code == "key_missing"


def test_only_the_places_of_a_provider_are_looked_at(env: dict[str, str], home: Path) -> None:
    ini(home, "[default]\nx_api_key = sk-ini\n")
    write(home / ".x" / "api_key", "sk-own\n")
    env["X_API_KEY_FILE"] = str(home / ".x" / "api_key")
    code, message, advice = refusal(env, ALONE)
    assert (code, message) == ("key_missing", "no API key found")
    assert "the environment variable X_API_KEY;" in advice and "~/.x" not in advice
    for half in (ALONE._replace(ini_file=".x/credentials"), ALONE._replace(ini_option="x_api_key")):
        assert refusal(env, half)[0] == "key_missing"


def test_whoever_has_no_key_is_told_where_to_put_it(env: dict[str, str]) -> None:
    code, message, advice = refusal(env)
    assert (code, message) == ("key_missing", "no API key found")
    assert "the environment variable X_API_KEY or x_api_key in ~/.x/credentials" in advice and "chat" in advice


def test_the_home_folder_is_that_of_the_users_environment(
    env: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(home.parent / "home of nobody" / ".x" / "api_key", "sk-of-nobody")
    write(home / ".x" / "api_key", "sk-own")
    assert find_key(PLACES, env).value == "sk-own"
    assert find_key(PLACES, {"HOME": ""}).value == find_key(PLACES, {}).value == "sk-of-nobody"

    def unknown() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", unknown)
    assert refusal({})[:2] == ("key_missing", "no API key found")


# How each is read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", ""),
        ("X=", ""),
        ("X=a", "a"),
        (" X = a \r\n", "a"),
        ("export X=a\n", "a"),
        ("exports X=a\nmy X=b\nXX=c\nX Y=d\n# X=e", ""),
        ("X=a\nX=b\nY=c\n", "b"),
        ("X=a\nX\n", "a"),
        ("X=a\nX=\n", ""),
        ("X=a=b", "a=b"),
        ("X='a' # mine", "a"),
        ('X="a b"c"', "a b"),
        ('X="it\'s"', "it's"),
        ("X='a", "'a"),
        ("X='", "'"),
        ("X=a # mine", "a"),
        ("X=a #mine #yours", "a"),
        ("X=a#b", "a#b"),
        ("X=# put it here", ""),
    ],
)
def test_of_a_dotenv_the_last_line_for_a_variable_counts(text: str, value: str) -> None:
    assert dotenv_value(text, "X").strip() == value


@pytest.mark.parametrize(
    ("profile", "value", "source"),
    [
        ({}, "sk-default", "default"),
        ({"X_PROFILE": "work"}, "sk-work", "work"),
        ({"X_PROFILE": "", "Y_PROFILE": "home"}, "sk-home", "home"),
        ({"X_PROFILE": "work", "Y_PROFILE": "home"}, "sk-work", "work"),
    ],
)
def test_a_profile_is_chosen_by_variable(
    env: dict[str, str], home: Path, profile: dict[str, str], value: str, source: str
) -> None:
    ini(home, "[default]\nx_api_key='sk-default'\n[work]\nx_api_key: \"sk-work\"\n[home]\nX_API_KEY = sk-home\n")
    assert find_key(PLACES, env | profile)[:3] == Key(value, f"~/.x/credentials [{source}]")[:3]


@pytest.mark.parametrize(("length", "shown"), [(60, "p" * 60), (61, "p" * 59 + "…")])
def test_of_a_long_name_of_a_profile_only_the_beginning_is_shown(
    env: dict[str, str], home: Path, length: int, shown: str
) -> None:
    profile = "p" * length
    ini(home, f"[{profile}]\nx_api_key = sk-ini\n")
    assert find_key(PLACES, env | {"X_PROFILE": profile}).source == f"~/.x/credentials [{shown}]"


@pytest.mark.parametrize("profile", ["none", "empty"])
def test_a_profile_without_a_key_leaves_it_to_the_next_place(env: dict[str, str], home: Path, profile: str) -> None:
    ini(home, "[default]\nx_api_key = sk-default\n[empty]\nregion = x\n")
    lack = "there is no such profile" if profile == "none" else "there is no x_api_key"
    looked_at = f"~/.x/credentials [{profile}] is looked at, and {lack}"
    assert refusal(env | {"X_PROFILE": profile})[1] == f"no API key found ({looked_at})"
    write(home / ".x" / "api_key", "sk-own")
    key = find_key(PLACES, env | {"X_PROFILE": profile})
    assert key.value == "sk-own" and list(key.others()) == [looked_at]


def test_credentials_are_read_as_other_tools_write_them(env: dict[str, str], home: Path) -> None:
    ini(home, "[default]\na = 1\n[other]\nb = %(c)s\n[default]\na = 2\nx_api_key = 100%\n")
    assert find_key(PLACES, env).value == "100%"


def test_a_long_credentials_file_is_read_up_to_a_bound(env: dict[str, str], home: Path) -> None:
    text = "[default]\nx_api_key = sk-ini\n"
    ini(home, text + "\n" * 4998)
    assert find_key(PLACES, env).value == "sk-ini"
    ini(home, text + "\n" * 4999)
    assert refusal(env)[1] == "no API key found (~/.x/credentials is not a valid INI file)"


@pytest.mark.parametrize("text", ["x_api_key = sk-ini\n", "[default\nx_api_key = sk-ini\n", "[default]\nnonsense\n"])
def test_what_is_no_credentials_file_is_named(env: dict[str, str], home: Path, text: str) -> None:
    ini(home, text)
    code, message, _ = refusal(env)
    assert code == "key_missing" and "~/.x/credentials is not a valid INI file" in message
    write(home / ".x" / "api_key", "sk-own")
    assert find_key(PLACES, env).value == "sk-own"


@pytest.mark.parametrize("content", [None, b"", b" \n", b"\xff\xfe\x00"], ids=["none", "empty", "blank", "no text"])
def test_no_other_key_steps_in_for_the_file_that_the_user_named(
    env: dict[str, str], home: Path, content: bytes | None
) -> None:
    write(home / ".x" / "api_key", "sk-own")
    env["X_API_KEY_FILE"] = str(home / "named")
    if content is not None:
        write(home / "named", content)
    code, message, _ = refusal(env)
    assert code == "key_missing" and message.startswith("X_API_KEY_FILE names a file")


def test_a_mark_of_windows_at_the_beginning_of_a_file_is_not_of_the_key(env: dict[str, str], home: Path) -> None:
    write(home / ".x" / "api_key", f"\ufeff{KEY}\r\n")
    assert find_key(PLACES, env).value == KEY


def test_of_a_file_only_the_beginning_is_read(env: dict[str, str]) -> None:
    line = f"X_API_KEY={KEY}"
    write(Path(".env"), "#" * (64 * 1024 - len(line) - 1) + "\n" + line)
    assert find_key(PLACES, env).value == KEY
    write(Path(".env"), "#" * 64 * 1024 + "\n" + line)
    assert refusal(env)[0] == "key_missing"


def test_every_file_that_cannot_be_read_is_named_with_its_reason(
    env: dict[str, str], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(Path(".env"), b"X_API_KEY=\xff\n")
    write(home / ".x" / "api_key", KEY)
    assert find_key(PLACES, env).value == KEY
    (home / ".x" / "api_key").write_bytes(b"\xfe")
    assert refusal(env)[1].count("cannot be read: not UTF-8") == 2 and "; " in refusal(env)[1]

    def locked(path: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(keys, "open_regular", locked)
    (home / ".x" / "api_key").unlink()
    assert refusal(env)[1] == "no API key found (.env cannot be read: permission denied)"


@pytest.mark.parametrize(("length", "cut"), [(200, False), (201, True)])
def test_of_a_long_path_only_the_beginning_is_shown(home: Path, length: int, cut: bool) -> None:
    end = "/.x/api_key"
    deep = home / ("h" * (length - len(f"{home}/{end}")))
    deep.mkdir()
    path = str(write(deep / ".x" / "api_key", b"\xff"))
    assert len(path) == length
    shown = f"{path[:199]}…" if cut else path
    assert refusal({"HOME": str(deep)})[1] == f"no API key found ({shown} cannot be read: not UTF-8)"


def test_what_is_no_file_is_no_place(env: dict[str, str], home: Path) -> None:
    Path(".env").mkdir()
    (home / ".x" / "api_key").mkdir(parents=True)
    assert refusal(env)[1] == "no API key found"


# What is wrong with a key ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", ["k3" * 256, "!~", "sk-a+b/c=="])
def test_whatever_a_header_carries_may_be_a_key(env: dict[str, str], value: str) -> None:
    assert find_key(PLACES, env | {"X_API_KEY": value}).value == value


@pytest.mark.parametrize(
    "value", ["sk-a b", "sk-a\nX-Evil: 1", "sk-\x7f", "sk-é", "<your-key>", "a<b", "a>b", 'a"b', "a'b", "sk-\u200b"]
)
def test_what_no_header_carries_and_what_is_a_placeholder_is_refused(env: dict[str, str], value: str) -> None:
    code, message, _ = refusal(env | {"X_API_KEY": value})
    assert code == "key_malformed" and "environment X_API_KEY" in message and value not in message


@pytest.mark.parametrize(
    "value",
    [
        *("your-api-key", "YOUR_KEY", "sk-yourkey", "sk-your-key-0123456789", "put-key-here", "change-me"),
        *("sk-xxxxx", "sk-****7f", "sk-...7f", "sk-", "sk-000", "replace_me", "my-api-key", "apikey", "null", "None"),
        *("X_API_KEY", "X_API_KEY_0", "$X_API", "${KEY}", "%KEY%", "{{key}}", "[key]", "placeholder"),
    ],
)
def test_what_stands_in_for_a_key_is_named_as_that(env: dict[str, str], value: str) -> None:
    """But where a key is optional: clients of a server of one's own must send some word, and the server takes any."""
    code, message, hint = refusal(env | {"X_API_KEY": value})
    assert code == "key_malformed" and "is a placeholder, not a key" in message and "their own key" in hint
    assert find_key(PLACES._replace(optional=True), env | {"X_API_KEY": value}).value == value


@pytest.mark.parametrize("value", ["Bearer sk-4f1d0c2b9a", "bearer\tsk-4f1d0c2b9a", "BEARER  x-1"])
def test_the_word_before_a_key_is_named_as_that(env: dict[str, str], value: str) -> None:
    code, message, hint = refusal(env | {"X_API_KEY": value})
    assert code == "key_malformed" and "begins with the word Bearer" in message and "store the key alone" in str(hint)


@pytest.mark.parametrize("value", ["sk-plan-4f1d0c2b9a", "SK-Plan-4f1d0c2b9a"])
def test_a_key_of_another_kind_is_not_sent(env: dict[str, str], value: str) -> None:
    places = PLACES._replace(unfit={"sk-plan-": "is of a plan, which pays for no pictures"})
    code, message, hint = refusal(env | {"X_API_KEY": value}, places)
    assert code == "key_malformed" and hint.startswith("tell the user; another key")
    assert message == "the API key from environment X_API_KEY is of a plan, which pays for no pictures"
    assert find_key(places, env | {"X_API_KEY": "my-sk-plan-4f1d0c2b9a"}).value == "my-sk-plan-4f1d0c2b9a"


def test_what_is_longer_than_any_key_is_refused(env: dict[str, str]) -> None:
    code, message, _ = refusal(env | {"X_API_KEY": "x" * 513})
    assert code == "key_malformed" and "512" in message and "environment X_API_KEY" in message


def test_a_malformed_key_is_not_passed_over(env: dict[str, str], home: Path) -> None:
    write(home / ".x" / "api_key", "sk-own")
    assert refusal(env | {"X_API_KEY": "sk a"})[0] == "key_malformed"


@pytest.mark.parametrize("value", ["no-usual-key-0123456789", "no usual key 0123456789"], ids=["good", "malformed"])
def test_from_here_on_the_key_is_masked_wherever_it_turns_up(env: dict[str, str], value: str) -> None:
    try:
        key: Any = find_key(PLACES, env | {"X_API_KEY": value})
    except Failure as failure:
        key = failure
    assert value not in mask(f"the service says: {value}") and value not in repr(key)
