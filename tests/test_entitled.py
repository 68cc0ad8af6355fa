"""Where a call goes and whether the key goes along, in this process: a promise a provider, with no run between.

What a base URL may look like, and that the program connects to nothing else, is held by test_trust.py.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import pytest

from conftest import TEST_KEY
from zimage import outside
from zimage.answers import bearer
from zimage.endpoint import IN_PROCESS, Endpoint
from zimage.errors import Failure
from zimage.keys import NO_KEY, Key, KeyPlaces
from zimage.provider import Provider
from zimage.registry import provider_named
from zimage.trust import (
    Home,
    Own,
    check_trust,
    choose_endpoint,
    home_of,
    home_of_record,
    key_for,
    naming_flags,
    parse_base_url,
    recorded_endpoint,
    telling_of_refused,
    telling_of_withheld,
    trusted_hosts,
    unnamed,
)

VENDOR, OPEN, LOCAL = (provider_named(name) for name in ("dashscope", "openai", "diffusers"))
OURS = "https://gpu.example/v1"
NOBODY: frozenset[str] = frozenset()
KEYS = {"DASHSCOPE_API_KEY": TEST_KEY, "OPENAI_API_KEY": TEST_KEY}


@pytest.fixture(autouse=True)
def nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No key but those that are handed in."""
    monkeypatch.chdir(tmp_path)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(tmp_path))
    monkeypatch.setattr(outside, "_secrets", set())


def at(url: str, provider: Provider = OPEN) -> Endpoint:
    return parse_base_url(url, "x", provider)


def code_of(caught: pytest.ExceptionInfo[Failure]) -> str:
    assert caught.value.fault.billed == "no"
    return caught.value.code


# Which calls carry the key --------------------------------------------------------------------------------------------


def test_who_says_nothing_of_it_needs_a_key() -> None:
    assert not KeyPlaces("X").optional
    for provider in (provider_named("zimageturbo"), VENDOR):
        with pytest.raises(Failure) as caught:
            key_for(provider, at("127.0.0.1", provider), NOBODY, {})
        assert code_of(caught) == "key_missing"


def test_what_works_in_this_process_needs_none() -> None:
    assert key_for(LOCAL, Endpoint("", IN_PROCESS, "", "local"), NOBODY, KEYS) == NO_KEY


@pytest.mark.parametrize(
    ("url", "trusted", "env"),
    [
        ("http://127.0.0.1:8000", (), {}),
        ("http://localhost:8000/v1", (), {}),
        ("http://[::1]:8000/v1", (), {}),
        (OURS, (), {"OPENAI_BASE_URL": OURS}),
        (OURS, (), {"OPENAI_BASE_URL": "gpu.example:443"}),
        (OURS, ("gpu.example",), {}),
        ("https://gpu.example:8443/v1", ("gpu.example",), {}),
    ],
)
def test_an_optional_key_goes_where_the_user_has_named_a_server(
    url: str, trusted: tuple[str, ...], env: dict[str, str]
) -> None:
    key = key_for(OPEN, at(url), frozenset(trusted), KEYS | env)
    assert (key.value, key.warning) == (TEST_KEY, "")


@pytest.mark.parametrize(
    ("url", "trusted", "env", "how"),
    [
        (OURS, (), {}, "--trust-host gpu.example"),
        (OURS, ("other.example",), {"OPENAI_BASE_URL": "https://other.example/v1"}, "--trust-host gpu.example"),
        (OURS, (), {"OPENAI_BASE_URL": "https://gpu.example:8443"}, "--trust-host gpu.example"),
        ("http://gpu.example/v1", ("gpu.example",), {}, "https"),
        ("http://gpu.example/v1", (), {"OPENAI_BASE_URL": "http://gpu.example/v1"}, "https"),
        ("http://10.0.0.1:8000/v1", ("10.0.0.1",), {}, "tunnel"),
    ],
)
def test_an_optional_key_goes_nowhere_else_and_the_user_is_told(
    url: str, trusted: tuple[str, ...], env: dict[str, str], how: str
) -> None:
    key = key_for(OPEN, at(url), frozenset(trusted), KEYS | env)
    assert key.value == "" and TEST_KEY not in repr(tuple(key))
    assert "OPENAI_API_KEY" in key.warning and how in key.warning
    assert ("--trust-host" in key.warning) is how.startswith("--trust-host")


@pytest.mark.parametrize("url", ["http://127.0.0.1:8000", OURS])
def test_who_has_no_optional_key_goes_without(url: str) -> None:
    assert key_for(OPEN, at(url), NOBODY, {}) == NO_KEY


def test_an_optional_key_that_is_malformed_is_told_where_it_would_go() -> None:
    env = {"OPENAI_API_KEY": "<your key>"}
    with pytest.raises(Failure) as caught:
        key_for(OPEN, at("http://127.0.0.1:8000"), NOBODY, env)
    assert code_of(caught) == "key_malformed"
    assert key_for(OPEN, at(OURS), NOBODY, env) == NO_KEY


# A login, of the server or of the proxy before it -------------------------------------------------------------------

LOGIN = {"OPENAI_USER": "fox", "OPENAI_PASSWORD": "hole-7Gq2-den"}
PAIR = "Basic Zm94OmhvbGUtN0dxMi1kZW4="


def test_a_login_goes_where_a_key_would_and_before_it() -> None:
    key = key_for(OPEN, at("http://127.0.0.1:8000"), NOBODY, KEYS | LOGIN)
    assert (key.value, key.noun) == (PAIR, "login")
    assert key.source == "environment OPENAI_USER and OPENAI_PASSWORD"
    assert "OPENAI_API_KEY" in "".join(key.others())
    assert bearer(key.value)["Authorization"] == PAIR
    assert key_for(OPEN, at(OURS), NOBODY, LOGIN | {"OPENAI_BASE_URL": OURS}).value == PAIR


@pytest.mark.parametrize("url", ["http://gpu.example/v1", OURS, "http://10.0.0.1:8000/v1"])
def test_a_login_goes_nowhere_else_and_the_user_is_told(url: str) -> None:
    key = key_for(OPEN, at(url), NOBODY, LOGIN)
    assert key.value == "" and "login of environment OPENAI_USER and OPENAI_PASSWORD is not sent" in key.warning
    assert "hole" not in repr(tuple(key)) and PAIR.split()[1] not in repr(tuple(key))


def test_a_service_with_a_host_of_its_own_has_no_login_by_accident() -> None:
    assert VENDOR.login_variables() is None
    assert LOCAL.login_variables() is None


class NoKey(type(OPEN)):  # type: ignore[misc]
    """A server that has no key at all, such as one behind a proxy."""

    key_places = None
    user_variable, password_variable = "FARM_USER", "FARM_PASSWORD"


def test_a_provider_without_a_key_has_a_login_all_the_same() -> None:
    env = {"FARM_USER": "fox", "FARM_PASSWORD": "hole-7Gq2-den"}
    assert key_for(NoKey(), at("http://127.0.0.1:8000"), NOBODY, env).value == PAIR
    assert key_for(NoKey(), at("http://127.0.0.1:8000"), NOBODY, {}) == NO_KEY
    assert "FARM_USER" in key_for(NoKey(), at(OURS), NOBODY, env).warning
    assert NoKey.key_hint() == "FARM_USER and FARM_PASSWORD"


@pytest.mark.parametrize(
    ("env", "what"),
    [
        ({"OPENAI_USER": "fox"}, "OPENAI_PASSWORD is not set"),
        ({"OPENAI_PASSWORD": "hole-7Gq2-den"}, "OPENAI_USER is not set"),
        (LOGIN | {"OPENAI_USER": "a:b"}, "colon"),
        (LOGIN | {"OPENAI_PASSWORD": "hole\r\nX: 7Gq2"}, "control"),
        (LOGIN | {"OPENAI_PASSWORD": "h" * 510}, "longer than any: 512 characters"),
    ],
)
def test_a_login_that_is_none_is_told_where_it_would_go(env: dict[str, str], what: str) -> None:
    with pytest.raises(Failure) as caught:
        key_for(OPEN, at("http://127.0.0.1:8000"), NOBODY, env)
    assert code_of(caught) == "key_malformed" and what in caught.value.message
    assert caught.value.fault.hint == "tell the user to set both anew, or none"
    assert "hole" not in caught.value.message
    assert key_for(OPEN, at(OURS), NOBODY, env) == NO_KEY


def test_a_login_may_lie_in_the_dotenv_of_the_working_folder_and_is_masked_in_every_form() -> None:
    Path(".env").write_text("OPENAI_USER=fox\nexport OPENAI_PASSWORD='hole-7Gq2-den'\n")
    key = key_for(OPEN, at("http://127.0.0.1:8000"), NOBODY, {})
    assert (key.value, key.source) == (PAIR, "OPENAI_USER and OPENAI_PASSWORD")
    said = outside.outside_text(f"401 for {PAIR}, fox:hole-7Gq2-den, password hole-7Gq2-den")
    assert said == "401 for Basic ***, ***, password ***"


def test_a_login_may_have_512_characters() -> None:
    assert key_for(OPEN, at("http://127.0.0.1:8000"), NOBODY, LOGIN | {"OPENAI_PASSWORD": "h" * 509}).value


def test_a_login_of_bytes_that_are_no_text_goes_as_it_is_set() -> None:
    """Python shows such bytes of the environment as halves of a character, which UTF-8 does not have."""
    key = key_for(OPEN, at("http://127.0.0.1:8000"), NOBODY, LOGIN | {"OPENAI_PASSWORD": "h\udcf6hle"})
    assert base64.b64decode(key.value.split()[1]) == b"fox:h\xf6hle"


def test_who_is_asked_for_a_login_hears_where_it_goes() -> None:
    there = at("http://127.0.0.1:8000")
    with pytest.raises(Failure) as caught, telling_of_refused(NO_KEY, there, OPEN):
        raise Failure("key_rejected", "no")
    assert "OPENAI_USER and OPENAI_PASSWORD" in caught.value.fault.hint
    assert caught.value.fault.hint.endswith(", or OPENAI_API_KEY for a key")
    with pytest.raises(Failure) as caught, telling_of_refused(NO_KEY, there, NoKey()):
        raise Failure("key_rejected", "no")
    assert caught.value.fault.hint.endswith("they set FARM_USER and FARM_PASSWORD for a login")
    with pytest.raises(Failure) as caught, telling_of_refused(key_for(OPEN, there, NOBODY, LOGIN), there, OPEN):
        raise Failure("key_rejected", "no")
    assert "the login is that of environment OPENAI_USER and OPENAI_PASSWORD" in caught.value.message


# A key that is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "given", "more"),
    [
        ("key_rejected", {}, "; --check --region singapore tries that one, free"),
        ("key_rejected", {"region": "singapore"}, "; --region leads to dashscope-intl.aliyuncs.com: "),
        ("key_rejected", {"flag": "http://127.0.0.1:1"}, "; --base-url leads to 127.0.0.1: it must be a key"),
        ("access_denied", {}, ""),
    ],
)
def test_who_has_named_no_region_hears_of_the_other_and_all_others_where_they_are(
    code: str, given: Any, more: str
) -> None:
    key = Key(TEST_KEY, "environment X", others=lambda: ["another key is in: .env"])
    endpoint = chosen(**given)
    with pytest.raises(Failure) as caught, telling_of_refused(key, endpoint, VENDOR):
        raise Failure(code, "no", hint="so", exit_code=3)
    assert caught.value.message == "no; the key is that of environment X"
    assert caught.value.fault.hint.startswith(f"so{more}")
    assert caught.value.fault.hint.endswith("; another key is in: .env" if more else "so")
    assert ("--check" in caught.value.fault.hint) is (not given and bool(more))


# Which hosts are asked at all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "trusted"),
    [
        ("https://dashscope.aliyuncs.com", ()),
        ("http://127.0.0.1:1", ()),
        ("https://gpu.example", ("gpu.example",)),
    ],
)
def test_a_key_goes_to_its_owner_to_this_machine_and_to_whom_the_user_trusts(url: str, trusted: Any) -> None:
    check_trust(at(url, VENDOR), "x", VENDOR, frozenset(trusted))


@pytest.mark.parametrize(
    ("url", "trusted", "code"),
    [
        ("https://gpu.example", (), "host_not_trusted"),
        ("https://gpu.example", ("example", "a.gpu.example"), "host_not_trusted"),
        ("http://gpu.example", ("gpu.example",), "invalid_base_url"),
        ("http://dashscope.aliyuncs.com", (), "invalid_base_url"),
    ],
)
def test_a_key_goes_nowhere_else(url: str, trusted: Any, code: str) -> None:
    with pytest.raises(Failure, match=r"^--base-url: ") as caught:
        check_trust(at(url, VENDOR), "--base-url", VENDOR, frozenset(trusted))
    assert code_of(caught) == code


@pytest.mark.parametrize(("provider", "url"), [(OPEN, "http://gpu.example"), (OPEN, OURS)])
def test_where_calls_may_go_without_a_key_any_host_may_be_asked(provider: Provider, url: str) -> None:
    check_trust(at(url, provider), "x", provider, NOBODY)


@pytest.mark.smoke
def test_trusted_hosts_are_exact_names() -> None:
    named = {"ZIMAGE_TRUSTED_HOSTS": "b.example, C.example\td.example,,"}
    hosts, problems = trusted_hosts(["A.example"], named)
    assert (sorted(hosts), problems) == (["a.example", "b.example", "c.example", "d.example"], [])
    assert not any(trusted_hosts([], {}))


@pytest.mark.parametrize("name", ["https://a.example", "a.example:443", "*.example", "", "a/b", "a@b"])
def test_what_is_no_bare_host_name_is_trusted_by_nobody(name: str) -> None:
    hosts, (problem,) = trusted_hosts([name], {})
    assert not hosts and problem.code == "usage" and problem.text.startswith("--trust-host:")
    if name:
        hosts, (problem,) = trusted_hosts([], {"ZIMAGE_TRUSTED_HOSTS": f"a.example {name}"})
        assert hosts == {"a.example"} and problem.text.startswith("ZIMAGE_TRUSTED_HOSTS:")


# Which endpoint is asked ----------------------------------------------------------------------------------------------


def chosen(provider: Provider = VENDOR, **given: Any) -> Endpoint:
    none: dict[str, Any] = {"flag": None, "request_url": None, "region": None, "env": {}, "trusted": NOBODY}
    return choose_endpoint(provider, **none | given)


def test_flag_request_region_and_environment_count_in_this_order() -> None:
    env = {"DASHSCOPE_HTTP_BASE_URL": "http://127.0.0.1:4"}
    assert chosen().url.startswith("https://dashscope.aliyuncs.com/")
    assert chosen(env=env).root == "http://127.0.0.1:4/api/v1"
    env["DASHSCOPE_BASE_URL"] = "http://127.0.0.1:3"
    assert chosen(env=env).root == "http://127.0.0.1:3/api/v1"
    assert chosen(env=env | {"DASHSCOPE_BASE_URL": ""}).root == "http://127.0.0.1:4/api/v1"
    assert chosen(env=env, region="singapore").host == "dashscope-intl.aliyuncs.com"
    assert chosen(env=env, region="singapore", request_url="http://127.0.0.1:2").root == "http://127.0.0.1:2/api/v1"
    named: dict[str, Any] = {"flag": "http://127.0.0.1:1", "request_url": "http://127.0.0.1:2", "region": "singapore"}
    assert (chosen(env=env, **named).root, chosen(**named).region) == ("http://127.0.0.1:1/api/v1", "singapore")


def test_the_region_of_a_known_host_is_its_own() -> None:
    assert chosen(flag="dashscope-intl.aliyuncs.com").region == "singapore"
    assert (chosen().region, chosen(flag="127.0.0.1").region) == ("beijing", "unknown")
    with pytest.raises(Failure, match="--base-url") as caught:
        chosen(flag="dashscope-intl.aliyuncs.com", region="beijing")
    assert code_of(caught) == "region_mismatch" and "singapore" in caught.value.message
    assert chosen(flag="dashscope-intl.aliyuncs.com", region="singapore").region == "singapore"


def test_where_a_host_does_not_say_its_region_that_of_the_user_counts() -> None:
    env = {"DASHSCOPE_REGION": "ap-southeast-1"}
    assert chosen(env=env, flag="http://127.0.0.1:1").region == "singapore"
    assert chosen(env=env, flag="http://127.0.0.1:1", region="beijing").region == "beijing"
    assert chosen(env=env, flag="https://dashscope.aliyuncs.com").region == "beijing"


def test_a_request_leads_a_provider_without_a_key_to_no_login_either() -> None:
    with pytest.raises(Failure, match=r"^base_url: has user info") as caught:
        chosen(NoKey(), request_url="https://me:secret@gpu.example/v1")
    assert code_of(caught) == "invalid_base_url"
    assert caught.value.fault.hint == "leave base_url out: no request needs it"


@pytest.mark.parametrize(("name", "given"), [("--base-url", "flag"), ("base_url", "request_url")])
def test_a_foreign_host_is_refused_by_where_it_was_named(name: str, given: str) -> None:
    with pytest.raises(Failure, match=rf"^{name}: ") as caught:
        chosen(provider_named("zimageturbo"), **{given: "https://gpu.example/api"})
    assert code_of(caught) == "host_not_trusted"


def test_a_key_goes_nowhere_in_the_clear_because_a_request_says_so() -> None:
    with pytest.raises(Failure, match=r"^base_url: http would send the key in the clear") as caught:
        chosen(request_url="http://gpu.example", trusted=frozenset(["gpu.example"]))
    assert code_of(caught) == "invalid_base_url"
    assert caught.value.fault.hint == "leave base_url out: no request needs it"


@pytest.mark.parametrize(
    ("url", "trusted", "host"),
    [
        ("https://a.example\\@b.example/", (), "a.example"),
        ("https://a.example@b.example/", (), "a.example"),
        ("https://a.example@b.example/", ("a.example",), "b.example"),
        ("https://me@b.example:443/", (), "b.example"),
        ("//B.example?x", (), "b.example"),
        ("https://me@intranet/", (), "intranet"),
        ("https://me@dashscope.aliyuncs.com/", (), None),
        ("https://me@b.example/", ("b.example",), None),
        ("https://me@127.0.0.1/", (), None),
    ],
)
def test_a_stranger_in_a_request_is_named_however_the_url_may_be_read(
    url: str, trusted: tuple[str, ...], host: str | None
) -> None:
    with pytest.raises(Failure, match=r"^base_url: ") as caught:
        chosen(request_url=url, trusted=frozenset(trusted))
    assert code_of(caught) == ("host_not_trusted" if host else "invalid_base_url")
    assert (f"base_url: {host} is not a host of dashscope" in caught.value.message) is bool(host)
    assert caught.value.fault.hint.startswith("leave base_url out") and "http" not in caught.value.fault.hint


def test_a_host_by_flag_is_told_beside_the_one_that_is_set() -> None:
    told = "--region leads to dashscope-intl.aliyuncs.com, and the key with it; DASHSCOPE_BASE_URL leads to "
    for url, where in (("https://gpu.example", "gpu.example"), ("https://a b/", "another place")):
        assert chosen(region="singapore", env={"DASHSCOPE_BASE_URL": url}).warnings == (told + where,)
    for env in ({}, {"DASHSCOPE_BASE_URL": "https://dashscope-intl.aliyuncs.com"}):
        assert chosen(region="singapore", env=env).warnings == ()


def test_a_base_url_that_other_programs_need_can_be_gone_past() -> None:
    other = "https://dashscope-intl.aliyuncs.com/compatible-mode/v1"
    past = "; where other programs need it as it is: --region singapore goes before it"
    for given, told in (
        ({"env": {"DASHSCOPE_BASE_URL": other}}, True),
        ({"env": {"DASHSCOPE_BASE_URL": "https://gpu.example/compatible-mode/v1"}}, False),
        ({"flag": other}, False),
    ):
        with pytest.raises(Failure, match="is not one of this provider's") as caught:
            chosen(**given)
        assert caught.value.fault.hint.startswith("use https://") and caught.value.fault.hint.endswith(past) is told


def test_a_server_that_only_a_request_names_is_told_as_that() -> None:
    (warning,) = chosen(OPEN, request_url=OURS).warnings
    assert warning.startswith("the request's base_url leads to gpu.example: its prompt goes there")
    assert chosen(OPEN, flag=OURS).warnings == chosen(OPEN, request_url="http://127.0.0.1:1").warnings == ()


@pytest.mark.parametrize("url", ["no url", "https://a b/", "https://gpu.example/v1?x", ""])
def test_what_is_no_url_in_a_file_leads_nowhere(url: str) -> None:
    with pytest.raises(Failure, match="the evidence leads to") as caught:
        recorded_endpoint(url, VENDOR, own())
    assert code_of(caught) == "host_not_trusted"


@pytest.mark.parametrize(("length", "cut"), [(200, False), (201, True)])
def test_of_a_long_origin_in_a_file_only_the_beginning_is_shown(length: int, cut: bool) -> None:
    start, end = "https://", f".{'b' * 50}.{'c' * 50}.example:443"
    middle = "a" * 60 + "." + "d" * (length - len(start + end) - 61)
    origin = start + middle + end
    shown = unnamed(f"{origin}/v1", VENDOR).message
    assert shown == f"the evidence leads to {origin[:199] + '…' if cut else origin}, which only its file names"


def test_a_host_that_is_none_of_a_provider_is_told_with_what_to_do() -> None:
    with pytest.raises(Failure, match=r"^x: api-inference\.modelscope\.cn ") as caught:
        at("https://api-inference.modelscope.cn/v1")
    assert code_of(caught) == "invalid_base_url" and "another --provider" in caught.value.fault.hint


@pytest.mark.parametrize(("length", "shown"), [(100, "/" + "p" * 99), (101, "/" + "p" * 98 + "…")])
def test_of_a_long_path_only_the_beginning_is_shown(length: int, shown: str) -> None:
    with pytest.raises(Failure) as caught:
        at("https://dashscope.aliyuncs.com/" + "p" * (length - 1), VENDOR)
    assert caught.value.message == f"x: its path {shown} is not one of this provider's"


def test_where_no_server_is_named_the_user_is_told_how_to_name_one() -> None:
    with pytest.raises(Failure, match="no server is named for openai") as caught:
        chosen(OPEN)
    hint = caught.value.fault.hint
    assert code_of(caught) == "invalid_base_url" and "OPENAI_BASE_URL" in hint and "--base-url http://127.0.0.1" in hint
    with pytest.raises(Failure, match=r"^--base-url: ") as caught:
        chosen(OPEN, flag="")
    assert code_of(caught) == "invalid_base_url"


def test_what_works_in_this_process_is_called_at_no_url() -> None:
    for given in ({}, {"flag": IN_PROCESS}, {"request_url": IN_PROCESS}):
        assert chosen(LOCAL, **given)._replace(source="") == Endpoint("", IN_PROCESS, "", "local")
    for name, given in (
        ("--base-url", {"flag": OURS}),
        ("base_url", {"request_url": OURS}),
        ("--base-url", {"flag": ""}),
    ):
        with pytest.raises(Failure, match=f"^{name}: diffusers ") as caught:
            chosen(LOCAL, **given)
        assert code_of(caught) == "invalid_base_url" and caught.value.fault.hint == "leave it out"


def test_a_base_url_of_another_api_is_told_the_right_forms() -> None:
    with pytest.raises(Failure) as caught:
        at("https://dashscope.aliyuncs.com:8443/compatible-mode/v1", VENDOR)
    assert code_of(caught) == "invalid_base_url" and "/compatible-mode/v1" in caught.value.message
    root = "https://dashscope.aliyuncs.com:8443"
    assert caught.value.fault.hint == f"use {root}/api/v1 or {root}"


@pytest.mark.parametrize(
    ("url", "what"),
    [
        ("https://gpu.example/v1 ", "blanks"),
        ("https://gpu.example\t/v1", "control characters"),
        ("https://gpu.exämple/v1", "beyond ASCII"),
        ("https://me:secret@gpu.example/v1", "user info"),
        ("https:\\\\gpu.example", "a backslash"),
        ("https://gpu.example/v1?key=secret", "a query"),
        ("https://gpu.example/v1#secret", "a fragment"),
        ("https://gpu.example/%76%31", "percent-encoding"),
        ("ftp://gpu.example/v1", "of the form https"),
        ("https://gpu.example/a/../v1", "of the form https"),
        ("https://gpu.example:0/v1", "its port"),
        ("https://gpu.example./v1", "its host"),
        ("https://[::1/v1", "its network location"),
    ],
)
def test_what_is_wrong_with_a_base_url_is_told_without_repeating_it(url: str, what: str) -> None:
    with pytest.raises(Failure, match=r"^--base-url: ") as caught:
        parse_base_url(url, "--base-url", OPEN)
    assert code_of(caught) == "invalid_base_url" and what in caught.value.message
    assert "secret" not in caught.value.message


@pytest.mark.parametrize(
    ("url", "root"),
    [
        ("gpu.example", "https://gpu.example/v1"),
        ("localhost:8000", "http://localhost:8000/v1"),
        ("127.0.0.1:8000/v1/images/generations", "http://127.0.0.1:8000/v1"),
        ("HTTP://[::1]:8000/v1/", "http://[::1]:8000/v1"),
        ("GPU.example:8443", "https://gpu.example:8443/v1"),
        ("https://gpu.example/openai/v1", "https://gpu.example/openai/v1"),
    ],
)
def test_a_base_url_may_be_the_host_the_root_or_the_whole(url: str, root: str) -> None:
    endpoint = at(url)
    assert (endpoint.root, endpoint.url) == (root, f"{root}/images/generations")


# What a file names ----------------------------------------------------------------------------------------------------


def own(base_url: str | None = None, trusted: tuple[str, ...] = (), **env: str) -> Own:
    return Own(base_url, frozenset(trusted), env)


@pytest.mark.parametrize(
    ("mine", "url", "named"),
    [
        (own(OURS), OURS, True),
        (own("gpu.example"), "https://gpu.example:443/elsewhere", True),
        (own(OPENAI_BASE_URL=OURS), OURS, True),
        (own(DASHSCOPE_BASE_URL=OURS), OURS, False),
        (own(OURS), "https://gpu.example:8443/v1", False),
        (own(OURS), "http://gpu.example:443/v1", False),
        (own(OURS), "https://a.gpu.example/v1", False),
        (own("nonsense://x", OPENAI_BASE_URL=OURS), OURS, True),
        (own("nonsense://x"), "nonsense://x", False),
        (own(""), "", False),
        (own(), "no url", False),
        (own(trusted=("gpu.example",)), OURS, False),
    ],
)
def test_a_setting_of_the_user_names_one_server_with_its_port(mine: Own, url: str, named: bool) -> None:
    assert mine.names(url, OPEN) is named


@pytest.mark.parametrize(
    ("provider", "url", "mine"),
    [
        (VENDOR, "https://dashscope.aliyuncs.com/api/v1", own()),
        (VENDOR, "https://gpu.example/api/v1", own(trusted=("gpu.example",))),
        (VENDOR, "http://127.0.0.1:1/api/v1", own(DASHSCOPE_BASE_URL="http://127.0.0.1:1")),
        (VENDOR, "http://127.0.0.1:1/api/v1", own("http://127.0.0.1:1")),
        (OPEN, OURS, own(trusted=("gpu.example",))),
        (OPEN, OURS, own(OPENAI_BASE_URL=OURS)),
        (OPEN, "http://gpu.example/v1", own("http://gpu.example")),
    ],
)
def test_a_file_leads_to_its_provider_and_to_what_the_user_names(provider: Provider, url: str, mine: Own) -> None:
    assert recorded_endpoint(url, provider, mine).root == url


@pytest.mark.parametrize(
    ("provider", "url", "mine"),
    [
        (VENDOR, "https://gpu.example/api/v1", own()),
        (VENDOR, "http://127.0.0.1:1/api/v1", own()),
        (VENDOR, "http://127.0.0.1:1/api/v1", own("http://127.0.0.1:2")),
        (VENDOR, "http://127.0.0.1:1/api/v1", own(trusted=("127.0.0.1",))),
        (OPEN, OURS, own()),
        (OPEN, "http://gpu.example/v1", own(trusted=("gpu.example",))),
    ],
)
def test_a_file_leads_nowhere_else(provider: Provider, url: str, mine: Own) -> None:
    with pytest.raises(Failure) as caught:
        recorded_endpoint(url, provider, mine)
    assert code_of(caught) == "host_not_trusted"


def test_not_even_the_user_sends_a_key_in_the_clear_where_a_file_leads() -> None:
    with pytest.raises(Failure, match=r"^endpoint: gpu.example is not a host of dashscope") as caught:
        recorded_endpoint("http://gpu.example/api/v1", VENDOR, own("http://gpu.example"))
    assert code_of(caught) == "host_not_trusted"


def test_the_user_is_asked_for_the_server_that_a_file_alone_names() -> None:
    fault = unnamed("http://gpu.example/v1", OPEN).fault
    assert fault.code == "host_not_trusted" and "http://gpu.example:80" in fault.message
    assert "ask the user" in fault.hint and "--base-url or OPENAI_BASE_URL" in fault.hint
    nowhere = unnamed("a b", LOCAL).fault
    assert "no plain host" in nowhere.message and nowhere.hint.endswith("--base-url")


@pytest.mark.parametrize(
    ("provider", "url", "trusted", "flags"),
    [
        (VENDOR, "https://dashscope.aliyuncs.com", [], []),
        (VENDOR, "https://gpu.example", ["gpu.example"], ["--base-url", "https://gpu.example/api/v1"]),
        (VENDOR, "https://dashscope.aliyuncs.com", ["dashscope.aliyuncs.com"], []),
        (OPEN, OURS, [], ["--base-url", OURS]),
    ],
)
def test_a_later_command_names_what_this_one_was_told(
    provider: Provider, url: str, trusted: list[str], flags: list[str]
) -> None:
    endpoint = at(url, provider)
    trust = [word for host in trusted for word in ("--trust-host", host)]
    assert naming_flags(endpoint, provider, own(trusted=tuple(trusted))) == trust + flags
    then = own(flags[1] if flags else None, tuple(trusted))
    assert recorded_endpoint(endpoint.url, provider, then) == endpoint  # with these it is let through


def test_what_works_in_this_process_is_named_by_nothing() -> None:
    assert naming_flags(Endpoint("", IN_PROCESS, "", "local"), LOCAL, own()) == []


# Where a picture may be fetched from ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("home", "link", "holds"),
    [
        (Home(), "http://127.0.0.1:1/a.png", False),
        (Home(), "", False),
        (Home(), "no url", False),
        (Home(loopback=True), "http://127.0.0.1:1/a.png", True),
        (Home(loopback=True), "http://localhost/a.png", True),
        (Home(loopback=True), "http://10.0.0.1/a.png", False),
        (Home(origin="http://10.0.0.1:80"), "http://10.0.0.1/a.png", True),
        (Home(origin="http://10.0.0.1:80"), "http://10.0.0.1:81/a.png", False),
        (Home(origin="http://10.0.0.1:80"), "http://127.0.0.1/a.png", False),
    ],
)
def test_a_picture_lies_on_the_internet_or_at_home(home: Home, link: str, holds: bool) -> None:
    assert home.holds(link) is holds


def test_home_is_where_the_user_has_sent_the_call() -> None:
    assert home_of("https://dashscope.aliyuncs.com/api/v1", VENDOR) == Home()
    assert home_of("http://127.0.0.1:1/api/v1", VENDOR) == Home(loopback=True)
    assert home_of("http://10.0.0.1/v1", OPEN) == Home(origin="http://10.0.0.1:80")


@pytest.mark.parametrize(
    ("link", "mine", "home"),
    [
        ("http://10.0.0.1/a.png", own("http://10.0.0.1"), Home(origin="http://10.0.0.1:80")),
        ("http://10.0.0.1/a.png", own(), Home()),
        ("http://10.0.0.1:81/a.png", own("http://10.0.0.1:81"), Home()),
    ],
)
def test_home_of_a_file_is_what_the_user_names_too(link: str, mine: Own, home: Home) -> None:
    assert home_of_record(link, "http://10.0.0.1/v1", OPEN, mine) == home


@pytest.mark.parametrize(
    ("warning", "code", "told"),
    [
        ("it is withheld", "key_rejected", True),
        ("it is withheld", "access_denied", True),
        ("it is withheld", "rate_limited", False),
        ("", "key_rejected", False),
    ],
)
def test_a_service_that_misses_a_withheld_key_does_not_refuse_it(warning: str, code: str, told: bool) -> None:
    with pytest.raises(Failure) as caught, telling_of_withheld(Key("", "", warning)):
        raise Failure(code, "no")
    hint = caught.value.fault.hint
    assert caught.value.code == code and hint and (hint == "it is withheld") is told
