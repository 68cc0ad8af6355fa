"""Where the key is looked for, in which order, what is wrong with a bad one, and that it is never shown."""

from __future__ import annotations

import base64
import html
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from conftest import Result, Shell
from mock_server import MockServer
from zimage import keys, outside
from zimage.errors import Failure
from zimage.keys import KeyPlaces, find_key
from zimage.outside import forms_of, mask, outside_json, outside_text, remember_environment, remember_secret, told_line

KEYS = {  # one for each place, in the order in which the places are looked at
    "environment": "sk-env-0123456789",
    "dotenv": "sk-dotenv-0123456789",
    "ini": "sk-ini-0123456789",
    "named file": "sk-named-0123456789",
    "own file": "sk-own-0123456789",
}
SOURCES = {  # what tells the user which place it was
    "environment": "DASHSCOPE_API_KEY",
    "dotenv": ".env",
    "ini": ".alibabacloud/credentials",
    "named file": "DASHSCOPE_API_KEY_FILE_PATH",
    "own file": ".dashscope/api_key",
}


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def put(shell: Shell, place: str, key: str) -> None:
    """Store a key in one of the places."""
    writers: dict[str, Callable[[], object]] = {
        "environment": lambda: shell.env.update(DASHSCOPE_API_KEY=key),
        "dotenv": lambda: dotenv(shell, f"DASHSCOPE_API_KEY={key}\n"),
        "ini": lambda: ini(shell, f"[default]\ndashscope_api_key = {key}\n"),
        "named file": lambda: named_file(shell, f"{key}\n"),
        "own file": lambda: own_file(shell, f"{key}\n"),
    }
    writers[place]()


def dotenv(shell: Shell, text: str | bytes) -> None:
    write(shell.folder / ".env", text)


def ini(shell: Shell, text: str | bytes) -> None:
    write(shell.home / ".alibabacloud" / "credentials", text)


def own_file(shell: Shell, text: str | bytes) -> None:
    write(shell.home / ".dashscope" / "api_key", text)


def named_file(shell: Shell, text: str | bytes) -> None:
    shell.env["DASHSCOPE_API_KEY_FILE_PATH"] = str(write(shell.home / "my key.txt", text))


def source(shell: Shell) -> str | None:
    """Where a dry run says that the key would come from."""
    result = shell.call("--prompt", "a cat", "--dry-run")
    assert result.code == 0, result.stdout
    found: str | None = result.json["key_source"]
    return found


def key_used(shell: Shell, key: str) -> None:
    """Assert that a run is sent with exactly this key: the service takes no other."""
    with MockServer(rpm=0, api_key=key) as mock:
        result = shell.call("--check", "--base-url", mock.base_url)
        assert result.code == 0, result.stdout
        assert key not in result.stdout + result.stderr


def refused(shell: Shell, mock: MockServer) -> dict[str, Any]:
    """The error of a run that must end for want of a key, before anything is sent or written."""
    before = shell.files()
    shell.env["DASHSCOPE_BASE_URL"] = mock.base_url
    result = shell.call("--prompt", "a cat", "--print-response")
    assert result.code == 3, result.stdout
    assert mock.stats()["requests"] == []
    assert shell.files() == before
    error = result.error
    assert (error["billed"], error["retryable"]) == ("no", False)
    return error


# -- Order of places ---------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("first", range(len(KEYS)), ids=list(KEYS))
def test_places_are_looked_at_in_order(shell: Shell, first: int) -> None:
    for place in list(KEYS)[first:]:
        put(shell, place, KEYS[place])
    place = list(KEYS)[first]
    assert SOURCES[place] in (source(shell) or "")
    key_used(shell, KEYS[place])


@pytest.mark.parametrize("blank", ["", "   ", "\t"])
def test_an_empty_variable_counts_as_none(shell: Shell, blank: str) -> None:
    shell.env["DASHSCOPE_API_KEY"] = blank
    put(shell, "own file", KEYS["own file"])
    key_used(shell, KEYS["own file"])


def test_the_key_in_the_environment_makes_every_broken_file_irrelevant(shell: Shell) -> None:
    dotenv(shell, b"\xff\xfe\x00")
    ini(shell, "not an INI file")
    own_file(shell, "two words")
    put(shell, "environment", KEYS["environment"])
    key_used(shell, KEYS["environment"])


def test_dotenv_is_read_in_the_working_folder_only(shell: Shell) -> None:
    write(shell.folder.parent / ".env", f"DASHSCOPE_API_KEY={KEYS['dotenv']}\n")
    write(shell.home / ".env", f"DASHSCOPE_API_KEY={KEYS['dotenv']}\n")
    assert source(shell) is None


def test_of_dotenv_only_the_key_is_taken(shell: Shell) -> None:
    steering = ["DASHSCOPE_BASE_URL=https://example.com", "DASHSCOPE_WORKSPACE=ws-evil", "OUTPUT_DIR=/tmp/evil"]
    steering += ["ZIMAGE_TRUSTED_HOSTS=example.com", "ALIBABA_CLOUD_PROFILE=evil", "HTTPS_PROXY=http://127.0.0.1:1"]
    dotenv(shell, "\n".join([*steering, f"DASHSCOPE_API_KEY={KEYS['dotenv']}", ""]))
    plan = shell.run("--prompt", "a cat", "--dry-run").json
    assert plan["endpoint"].startswith("https://dashscope.aliyuncs.com/")
    assert plan["output"].startswith(str(shell.folder / "output"))
    key_used(shell, KEYS["dotenv"])


# -- Profiles ----------------------------------------------------------------------------------------------------------

PROFILES = """\
[default]
access_key_id = LTAI-not-a-key
dashscope_api_key = sk-default-0123456
[work]
dashscope_api_key = sk-work-0123456
[home]
dashscope_api_key = sk-home-0123456
[empty]
region = cn-beijing
"""


@pytest.mark.parametrize(
    ("env", "key"),
    [
        ({}, "sk-default-0123456"),
        ({"ALIBABA_CLOUD_PROFILE": "work"}, "sk-work-0123456"),
        ({"ALICLOUD_PROFILE": "home"}, "sk-home-0123456"),
        ({"ALIBABA_CLOUD_PROFILE": "work", "ALICLOUD_PROFILE": "home"}, "sk-work-0123456"),
        ({"ALIBABA_CLOUD_PROFILE": "", "ALICLOUD_PROFILE": "home"}, "sk-home-0123456"),
        ({"ALIBABA_CLOUD_PROFILE": "", "ALICLOUD_PROFILE": ""}, "sk-default-0123456"),
    ],
)
def test_a_profile_is_chosen_by_variable(shell: Shell, env: dict[str, str], key: str) -> None:
    ini(shell, PROFILES)
    shell.env |= env
    key_used(shell, key)


@pytest.mark.parametrize("profile", ["none", "empty", "DEFAULT", "../work", "work]\n[home"])
def test_a_profile_without_a_key_is_never_replaced_by_another_profiles_key(
    shell: Shell, mock: MockServer, profile: str
) -> None:
    ini(shell, PROFILES)
    shell.env["ALIBABA_CLOUD_PROFILE"] = profile
    assert source(shell) is None
    assert refused(shell, mock)["code"] == "key_missing"


# -- How the key is written down ---------------------------------------------------------------------------------------

KEY = "sk-0123456789abcdef"


@pytest.mark.parametrize(
    "text",
    [
        f"DASHSCOPE_API_KEY={KEY}",
        f"DASHSCOPE_API_KEY={KEY}\n",
        f"DASHSCOPE_API_KEY={KEY}\r\n",
        f"\ufeffDASHSCOPE_API_KEY={KEY}\n",
        f"  DASHSCOPE_API_KEY  =  {KEY}  \n",
        f'DASHSCOPE_API_KEY="{KEY}"\n',
        f"DASHSCOPE_API_KEY='{KEY}'\r\n",
        f'DASHSCOPE_API_KEY="{KEY}" # mine\n',
        f"DASHSCOPE_API_KEY={KEY} # mine\n",
        f"DASHSCOPE_API_KEY={KEY}\t# mine\n",
        f"export DASHSCOPE_API_KEY={KEY}\n",
        f"export  DASHSCOPE_API_KEY='{KEY}'\n",
        f"# DASHSCOPE_API_KEY=sk-commented-out\nDASHSCOPE_API_KEY={KEY}\n#DASHSCOPE_API_KEY=sk-commented-out\n",
        f"MY_DASHSCOPE_API_KEY=sk-of-another\nDASHSCOPE_API_KEY={KEY}\nDASHSCOPE_API_KEY_2=sk-of-another\n",
        f"DASHSCOPE_API_KEY=sk-the-older-one\nOTHER=x\nDASHSCOPE_API_KEY={KEY}\n",
        f"OTHER='猫'\r\n\r\nDASHSCOPE_API_KEY={KEY}\r\nMORE=1\r\n",
    ],
    ids=ascii,
)
def test_dotenv_is_read_as_people_write_it(shell: Shell, text: str) -> None:
    dotenv(shell, text)
    key_used(shell, KEY)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "DASHSCOPE_API_KEY=",
        "DASHSCOPE_API_KEY=\n\n",
        "DASHSCOPE_API_KEY=\nNEXT=line\n",
        'DASHSCOPE_API_KEY=""\n',
        "DASHSCOPE_API_KEY=   # put your key here\n",
        "DASHSCOPE_API_KEY= # put your key here\r\n",
        "# DASHSCOPE_API_KEY=sk-commented-out\n",
        "DASHSCOPE_API_KEY\n",
        "NOT_DASHSCOPE_API_KEY=sk-of-another\n",
        "DASHSCOPE_API_KEYS=sk-of-another\n",
        "DASHSCOPE_API_KEY_FILE_PATH=/etc/hostname\n",
    ],
    ids=ascii,
)
def test_a_dotenv_without_a_key_leaves_it_to_the_next_place(shell: Shell, text: str) -> None:
    dotenv(shell, text)
    assert source(shell) is None
    put(shell, "own file", KEYS["own file"])
    key_used(shell, KEYS["own file"])


@pytest.mark.parametrize(
    "text",
    [
        f"[default]\ndashscope_api_key={KEY}\n",
        f"[default]\r\ndashscope_api_key = {KEY}\r\n",
        f"\ufeff[default]\ndashscope_api_key = {KEY}\n",
        f'[default]\ndashscope_api_key = "{KEY}"\n',
        f"[default]\nDashScope_API_Key: {KEY}\n",
        f"; comment\n[default]\n# comment\ndashscope_api_key = {KEY}\npassword = 100%\n",
        f"[default]\nx = 1\n[other]\nx = 2\n[default]\ndashscope_api_key = {KEY}\n",
    ],
    ids=ascii,
)
def test_the_credentials_file_is_read_as_people_write_it(shell: Shell, text: str) -> None:
    ini(shell, text)
    key_used(shell, KEY)


@pytest.mark.parametrize("text", [KEY, f"{KEY}\n", f"{KEY}\r\n", f"\n  {KEY}  \n\n", f"\ufeff{KEY}\n"], ids=ascii)
@pytest.mark.parametrize("writer", [own_file, named_file])
def test_a_key_file_is_read_as_people_write_it(shell: Shell, text: str, writer: Callable[[Shell, str], None]) -> None:
    writer(shell, text)
    key_used(shell, KEY)


# -- What is wrong with a key ------------------------------------------------------------------------------------------

MALFORMED = [
    "<your-key>",
    "sk-<your-key>",
    '"sk-0123456789abcdef"',
    "'sk-0123456789abcdef'",
    "sk-01234 56789abcdef",
    "Bearer sk-0123456789abcdef",
    "sk-0123456789\tabcdef",
    "sk-0123456789\u00a0abcdef",
    "sk-0123456789abcdef\u200b",
    "sk-01234—56789abcdef",
    "“sk-0123456789abcdef”",
    "你的密钥",
    "sk-ſecret-0123456789",
]


@pytest.mark.parametrize("key", MALFORMED, ids=ascii)
def test_a_malformed_key_is_refused_before_anything_is_sent(shell: Shell, mock: MockServer, key: str) -> None:
    put(shell, "environment", key)
    put(shell, "own file", KEYS["own file"])
    error = refused(shell, mock)
    assert error["code"] == "key_malformed"
    assert "DASHSCOPE_API_KEY" in error["message"], "the place is named"
    assert key not in json.dumps(error, ensure_ascii=False)
    assert "sk-0123456789abcdef" not in json.dumps(error, ensure_ascii=False)


@pytest.mark.parametrize("key", ["sk-0123456789\r\nX-Evil: 1", "sk-0123456789\nabcdef", "sk-0123456789\x7f", "sk-\x01"])
@pytest.mark.parametrize("place", ["environment", "own file", "named file"])
def test_no_key_can_add_a_header(shell: Shell, mock: MockServer, key: str, place: str) -> None:
    put(shell, place, key)
    assert refused(shell, mock)["code"] == "key_malformed"


@pytest.mark.parametrize("variable", ["DASHSCOPE_API_KEY", "OTHER_API_KEY"])
def test_a_variable_that_is_no_text_is_no_fault_of_the_tool(shell: Shell, mock: MockServer, variable: str) -> None:
    """Its own or that of another program: both are masked wherever they may turn up."""
    shell.use(mock)
    shell.env[variable] = os.fsdecode(b"sk-\xff\xfe23456789")
    if variable == "DASHSCOPE_API_KEY":
        assert refused(shell, mock)["code"] == "key_malformed"
    else:
        assert shell.run("--check").code == 0


@pytest.mark.parametrize("place", ["dotenv", "ini", "named file", "own file"])
def test_a_malformed_key_is_refused_by_the_place_it_is_in(shell: Shell, mock: MockServer, place: str) -> None:
    put(shell, place, "sk-01234 56789abcdef")
    error = refused(shell, mock)
    assert error["code"] == "key_malformed"
    assert SOURCES[place] in error["message"]


@pytest.mark.parametrize("arguments", [["--prompt", "a cat", "--print-response"], ["--check"]])
def test_a_missing_key_is_told_where_to_put_it(shell: Shell, mock: MockServer, arguments: list[str]) -> None:
    shell.env["DASHSCOPE_BASE_URL"] = mock.base_url
    result = shell.call(*arguments)
    assert result.code == 3
    assert result.error["code"] == "key_missing"
    advice = result.stderr.strip().splitlines()[-1]
    assert "DASHSCOPE_API_KEY" in advice
    assert "dashscope_api_key" in advice
    assert "~/.alibabacloud/credentials" in advice
    assert mock.stats()["requests"] == []
    assert shell.files() == []


@pytest.mark.parametrize(
    ("break_it", "word"),
    [
        (lambda shell: dotenv(shell, f"DASHSCOPE_API_KEY={KEY}\n".encode("utf-16")), ".env"),
        (lambda shell: dotenv(shell, b"DASHSCOPE_API_KEY=\xff\xfe\n"), ".env"),
        (lambda shell: ini(shell, f"[default]\ndashscope_api_key = {KEY}\n".encode("utf-16")), "credentials"),
        (lambda shell: ini(shell, f"dashscope_api_key = {KEY}\n"), "credentials"),
        (lambda shell: ini(shell, f"[default\ndashscope_api_key = {KEY}\n"), "credentials"),
        (lambda shell: ini(shell, b"\x00\x01\x02\xff"), "credentials"),
        (lambda shell: own_file(shell, f"{KEY}\n".encode("utf-16")), "api_key"),
        (lambda shell: own_file(shell, b"\xff\xfe\x00\xd8"), "api_key"),
    ],
)
def test_a_broken_file_is_named_where_no_key_is_found(
    shell: Shell, mock: MockServer, break_it: Callable[[Shell], None], word: str
) -> None:
    break_it(shell)
    error = refused(shell, mock)
    assert error["code"] == "key_missing"
    assert word in error["message"]
    assert KEY not in json.dumps(error)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(shell: Shell, mock: MockServer) -> None:
    put(shell, "own file", KEY)
    (shell.home / ".dashscope" / "api_key").chmod(0)
    assert "api_key" in refused(shell, mock)["message"]


@pytest.mark.parametrize("name", [".env", "../home/.alibabacloud/credentials", "../home/.dashscope/api_key"])
def test_a_folder_in_the_place_of_a_file_is_no_key(shell: Shell, mock: MockServer, name: str) -> None:
    (shell.folder / name).mkdir(parents=True)
    assert refused(shell, mock)["code"] == "key_missing"


@pytest.mark.parametrize("content", [None, "", " \n", b"\xff\xfe"], ids=ascii)
def test_a_named_file_without_a_key_is_an_error_and_no_other_key_steps_in(
    shell: Shell, mock: MockServer, content: str | bytes | None
) -> None:
    named_file(shell, content or "")
    if content is None:
        (shell.home / "my key.txt").unlink()
    put(shell, "own file", KEYS["own file"])
    error = refused(shell, mock)
    assert error["code"] == "key_missing"
    assert "DASHSCOPE_API_KEY_FILE_PATH" in error["message"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
@pytest.mark.parametrize("place", [".env", "../home/.alibabacloud/credentials", "../home/.dashscope/api_key"])
def test_a_pipe_in_the_place_of_a_file_does_not_hang_the_command(shell: Shell, mock: MockServer, place: str) -> None:
    path = shell.folder / place
    path.parent.mkdir(parents=True, exist_ok=True)
    os.mkfifo(path)
    assert refused(shell, mock)["code"] == "key_missing"


def test_without_a_home_folder_the_environment_still_serves(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    shell.env["HOME"] = shell.env["USERPROFILE"] = str(shell.folder / "none")
    assert shell.run("--check").code == 0


# -- What a hostile file costs -----------------------------------------------------------------------------------------

SIZE = 65_000  # characters; more of a file is not read
BULKS = {
    "blanks": " " * SIZE,
    "tabs": "\t" * SIZE,
    "other blanks": "\x0b \x0c\xa0" * (SIZE // 5),
    "export": "export " * (SIZE // 7),
    "quotes": "'\"" * (SIZE // 2),
    "signs": "=" * SIZE,
    "comments": "# " * (SIZE // 2),
    "colons": "a:" * (SIZE // 2),
    "brackets": "[" * SIZE,
    "empty lines": "\n" * SIZE,
    "lines": "a\n" * (SIZE // 2),
    "blank lines": " a\n" * (SIZE // 3),
    "sections": "".join(f"[{number}]\n" for number in range(SIZE // 8)),
    "settings": "DASHSCOPE_API_KEY=\n" * (SIZE // 19),
}


@pytest.mark.parametrize("bulk", BULKS.values(), ids=BULKS)
def test_a_hostile_file_of_keys_is_read_in_no_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bulk: str) -> None:
    """In processor time, and whatever stands around the bulk: a pattern that looks back is found out by its end."""
    monkeypatch.chdir(tmp_path)
    places = KeyPlaces("DASHSCOPE_API_KEY", False, "ini", "dashscope_api_key", (), None, "file")
    began = time.process_time()
    for form in (
        "{}",
        "{}x",
        "KEY={}",
        "DASHSCOPE_API_KEY={}x",
        "export{}DASHSCOPE_API_KEY",
        "[default]\na{}b",
        "[d]\n{}",
    ):
        for name in (".env", "ini", "file"):
            (tmp_path / name).write_text(form.replace("{}", bulk))
        with pytest.raises(Failure, match="key"):
            find_key(places, {"HOME": str(tmp_path)})
            raise Failure("key_missing", "a key was found")
    assert time.process_time() - began < 2


# -- The key is never shown --------------------------------------------------------------------------------------------

SECRET = "sk-never-shown-0123456789abcdef"


def assert_nowhere(shell: Shell, result: Result, secret: str = SECRET) -> None:
    """The secret is in no stream and no file of the working folder."""
    assert secret not in result.stdout
    assert secret not in result.stderr
    for name in shell.files():
        if name != ".env":
            assert secret.encode() not in (shell.folder / name).read_bytes(), name


@pytest.mark.parametrize(
    "arguments",
    [
        ["--api-key", SECRET],
        [f"--api-key={SECRET}"],
        ["--key", SECRET, "--prompt", "a cat"],
        ["--prompt", "a cat", SECRET],
        [SECRET],
        [f"DASHSCOPE_API_KEY={SECRET}"],
        ["--prompt", "a cat", "--size", SECRET],
        ["--prompt", "a cat", "--seed", SECRET],
        ["--prompt", "a cat", "--aspect-ratio", SECRET],
        ["--prompt", "a cat", "--region", SECRET],
        ["--prompt", "a cat", "--provider", SECRET],
        ["--prompt", "a cat", "--trust-host", f"{SECRET}@example.com"],
        ["--prompt", "a cat", "--timeout", SECRET],
        ["--prompt", "a cat", "--max-retries", SECRET],
        ["--prompt", "a cat", "--base-url", f"https://{SECRET}@dashscope.aliyuncs.com"],
        ["--prompt", "a cat", "--base-url", f"https://example.com/{SECRET}/api/v1"],
        ["--prompt", "a cat", "--base-url", f"https://dashscope.aliyuncs.com/{SECRET}"],
        ["--prompt", "a cat", "--base-url", f"https://{SECRET}.example.com"],
        ["--prompt", "a cat", "--output", f"{SECRET}.gif"],
        ["--prompt", "a cat", f"--overwrite={SECRET}"],
        ["--schema", SECRET],
        ["--file", SECRET],
        ["--replay", SECRET],
        ["--recover", SECRET],
        ["--request", SECRET],
        ["--request", json.dumps({"prompt": "a cat", "api_key": SECRET})],
        ["--request", json.dumps({"prompt": "a cat", SECRET: 1})],
        ["--request", json.dumps({"prompt": [SECRET]})],
        ["--request", json.dumps({"prompt": "a cat", "seed": SECRET})],
    ],
    ids=lambda arguments: " ".join(arguments).replace(SECRET, "KEY"),
)
@pytest.mark.parametrize("known", [False, True])
def test_wrong_arguments_never_repeat_a_key(shell: Shell, arguments: list[str], known: bool) -> None:
    shell.env |= {"DASHSCOPE_API_KEY": SECRET} if known else {}
    result = shell.call(*arguments, "--print-response")
    assert result.code == 2
    assert result.error["message"]
    assert_nowhere(shell, result)


@pytest.mark.parametrize("arguments", [["--api-key", "0123456789abcdef"], ["--api-key=0123456789abcdef"]])
def test_the_value_of_an_unknown_option_is_not_repeated(shell: Shell, arguments: list[str]) -> None:
    result = shell.call("--prompt", "a cat", *arguments, "--print-response")
    assert result.code == 2
    assert "--api-key" in result.error["message"]
    assert_nowhere(shell, result, "0123456789abcdef")


@pytest.mark.parametrize("secret", [SECRET, "no-usual-form-0123456789", "a+b/c=0123456789&x%20"])
@pytest.mark.parametrize("place", KEYS)
def test_the_key_is_in_no_output_and_no_file_of_a_good_run(shell: Shell, place: str, secret: str) -> None:
    put(shell, place, secret)
    with MockServer(rpm=0, api_key=secret) as mock:
        result = shell.call(
            *("--prompt", "a cat", "--size", "512x512", "--prompt-extend", "--print-response"),
            *("--base-url", mock.base_url),
        )
        assert result.code == 0, result.stderr
        assert_nowhere(shell, result, secret)
        for arguments in (["--prompt", "a cat", "--dry-run"], ["--check"]):
            result = shell.call(*arguments, "--base-url", mock.base_url)
            assert result.code == 0
            assert_nowhere(shell, result, secret)


@pytest.mark.smoke
@pytest.mark.parametrize(
    "faults", ["401", "403", "400", "429-long", "blocked", "500-html", "hangup-after", "image-404"]
)
def test_the_key_is_in_no_output_and_no_file_of_a_failed_run(shell: Shell, faults: str) -> None:
    put(shell, "environment", SECRET)
    with MockServer(rpm=0, api_key=SECRET, faults=faults) as mock:
        shell.env["DASHSCOPE_BASE_URL"] = mock.base_url
        result = shell.call("--prompt", "a cat", "--size", "512x512", "--print-response")
        assert result.code != 0
        assert_nowhere(shell, result)
        (evidence,) = shell.evidence_files()
        assert_nowhere(shell, shell.call("--recover", str(evidence), "--print-response"))


def test_a_prompt_that_looks_like_a_key_is_sent_and_kept_as_it_is(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    prompt = "a sign that reads sk-0123456789abcdef"
    response = shell.run("--prompt", prompt, "--size", "512x512", "--print-response").json
    assert response["prompt"] == mock.stats()["payloads"][0]["prompt"] == prompt
    assert shell.evidence()["request"]["prompt"] == prompt


# -- What is a secret, and in which form -------------------------------------------------------------------------------

WORDS = ["none", "None", "EMPTY", "test", "x", "-", "ollama", "lm-studio", "not-needed", "dummy", "sk-no-key-required"]
WORDS += [
    "no key",
    "changeme",
    "placeholder",
    "xxxxxxxx",
    "********",
    "1234",
    "123456",
    "your-api-key-here",
    "fake_key",
]
REAL_KEYS = [SECRET, "a+b/c=0123456789&x%20", "hunter2", "aBcDeFgHiJkL", "correct-horse-battery-staple", "3f9a1c77e2"]
REAL_KEYS += ["qwertzuiopasdfg", "back\\slash{}%s-9"]


@pytest.fixture
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "_secrets", set())


@pytest.mark.usefixtures("no_secrets")
@pytest.mark.parametrize("word", WORDS)
def test_a_word_in_the_place_of_a_key_is_masked_in_no_text(word: str) -> None:
    remember_environment({"OPENAI_API_KEY": word})
    remember_secret(word)
    text = f"{word.removeprefix('sk-')} of them was found: {word.removeprefix('sk-')}"
    assert mask(text) == told_line(text) == text


def test_a_word_as_key_garbles_neither_evidence_nor_advice(shell: Shell) -> None:
    shell.env["OPENAI_API_KEY"] = "none"
    with MockServer(rpm=0, faults="blocked") as mock:
        shell.env["OPENAI_BASE_URL"] = mock.openai_url
        result = shell.run("--provider", "openai", "--prompt", "none of the foxes", "--print-response")
    assert result.error["billed"] == "no" and "***" not in result.stderr
    assert "***" not in shell.evidence_files()[0].read_text(encoding="utf-8")


def spellings(key: str) -> dict[str, str]:
    """The ways in which services, proxies and libraries are known to repeat a key."""
    encoded = key.encode()
    return {
        "plain": key,
        "lower": key.lower(),
        "upper": key.upper(),
        "in a URL": quote(key, safe=""),
        "in a URL, small hex": quote(key, safe="").replace("%2B", "%2b").replace("%2F", "%2f"),
        "in a path": quote(key),
        "JSON": json.dumps(key),
        "JSON of PHP": json.dumps(key).replace("/", "\\/"),
        "JSON, all escaped": "".join(f"\\u{ord(sign):04X}" for sign in key),
        "HTML": html.escape(key),
        "Base64": base64.b64encode(encoded).decode(),
        "basic, as password": base64.b64encode(b"user:" + encoded).decode(),
        "basic, as user": base64.b64encode(encoded + b":").decode(),
        "basic, of another user": base64.b64encode(b"us:" + encoded).decode(),
        "basic, of a third": base64.b64encode(b"u:" + encoded).decode(),
        "Base64 for URLs": base64.urlsafe_b64encode(b"\xff" + encoded).decode(),
        "repr": repr(key),
    }


@pytest.mark.usefixtures("no_secrets")
@pytest.mark.parametrize("key", REAL_KEYS)
def test_a_real_key_is_masked_in_every_form(key: str) -> None:
    remember_secret(key)
    for form, spelled in spellings(key).items():
        for text in (f"key {spelled} is wrong", spelled * 3, "x" * 495 + spelled, "é" * (500 - len(spelled)) + spelled):
            for shown in (outside_text(text), str(outside_json({"a": [text]})), told_line(text), mask(text)):
                assert_hidden(key, shown, form)


def assert_hidden(key: str, shown: str, form: str) -> None:
    """No form of the key is in the text, nor a beginning of it that a cut has left."""
    folded = shown.lower()
    for secret in forms_of(key):
        assert secret[:6].lower() not in folded, (form, shown)


@pytest.mark.usefixtures("no_secrets")
@pytest.mark.parametrize(
    "url", ["http://user:password@127.0.0.1:3128", "user:password@proxy:3128", "socks5h://u:p%40ss1@h/"]
)
@pytest.mark.parametrize("name", ["HTTP_PROXY", "https_proxy", "ALL_PROXY"])
def test_what_a_proxy_is_logged_in_with_is_masked(name: str, url: str) -> None:
    remember_environment({name: url})
    login = url.rpartition("://")[2].partition("@")[0]
    for spelled in (url, login, quote(login), base64.b64encode(login.encode()).decode()):
        for shown in (mask(f"no way by {spelled}"), outside_text(f"no way by {spelled}")):
            assert login not in shown and base64.b64encode(login.encode()).decode()[:8] not in shown


def test_user_info_of_any_url_is_masked() -> None:
    assert mask("see ftp://ann:x@host/a@b and http://host/x@y") == "see ftp://***@host/a@b and http://host/x@y"


# ---------------------------------------------------------------------------------------------------------------------
# In process
# ---------------------------------------------------------------------------------------------------------------------

PLACES = KeyPlaces("SOME_API_KEY", file=".some/key")


def test_a_line_of_dotenv_that_sets_nothing_takes_nothing_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".env").write_text("SOME_API_KEY=sk-0123456789 # mine # really\nexport SOME_API_KEY\nSOME_API_KEY\n")
    assert find_key(PLACES, {"HOME": str(tmp_path)}).value == "sk-0123456789"


def test_the_home_folder_is_the_one_of_the_environment_that_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "another"))
    (tmp_path / ".some").mkdir()
    (tmp_path / ".some" / "key").write_text("sk-0123456789")
    assert find_key(PLACES, {"HOME": str(tmp_path)}).source == "~/.some/key"
    with pytest.raises(Failure, match="no API key found"):
        find_key(PLACES, {})


@pytest.mark.parametrize(
    ("trouble", "reason"),
    [
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "x"), "not UTF-8"),
        (PermissionError(13, "Not for you"), "not for you"),
    ],
)
def test_a_place_that_cannot_be_read_is_told_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trouble: Exception, reason: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".some").mkdir()
    (tmp_path / ".some" / "key").write_text("sk-0123456789")

    def refuse(path: Path) -> None:
        raise trouble

    monkeypatch.setattr(keys, "open_regular", refuse)
    with pytest.raises(Failure) as failed:
        find_key(PLACES, {"HOME": str(tmp_path)})
    assert f"cannot be read: {reason}" in failed.value.message
