"""Which host, region, workspace and key the user's variables and files mean, and what is told of them before paying."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sqlite3
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import pytest

from batch_helpers import BATCH
from conftest import TEST_KEY, Shell
from fault_server import GENERATE, Answer, FaultServer, Received, good, json_answer
from mock_server import MockServer
from providers.dashscope import DashScope
from providers.openai import OpenAI
from providers.zimageturbo import ZImageTurbo
from zimage.account import ASK_FOR_REGION, Account, config_of
from zimage.calls import HttpAnswer
from zimage.errors import Failure
from zimage.keys import Key, find_key
from zimage.plan import workspace_of
from zimage.provider import RateLimit
from zimage.trust import choose_endpoint, telling_of_refused

PROVIDER = DashScope()
ONE = ("--prompt", "a cat", "--size", "512x512")
CONFIG = ".dashscope/config.toml"


def configure(home: Path, text: str | bytes, name: str = CONFIG) -> Path:
    path = home / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def planned(shell: Shell, *arguments: str) -> dict[str, Any]:
    result = shell.call(*ONE, *arguments, "--dry-run")
    assert result.code == 0, result.stdout
    return result.json


def refused(shell: Shell, *arguments: str) -> dict[str, Any]:
    result = shell.call(*ONE, *arguments, "--print-response")
    assert result.code == 2, result.stdout
    assert shell.files() == []
    return result.error


# -- The official client as witness ------------------------------------------------------------------------------------


@cache
def part_of_the_client(name: str) -> Path:
    spec = importlib.util.find_spec("dashscope")
    assert spec and spec.origin
    return Path(spec.origin).parent / name


@cache
def new_client() -> ModuleType:
    """Its configuration alone: the whole client takes a second to load."""
    spec = importlib.util.spec_from_file_location("dashscope_config", part_of_the_client("v2/_config.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    with patch.dict("sys.modules", dashscope_config=module):
        spec.loader.exec_module(module)
    return module


@contextmanager
def only(env: dict[str, str], home: Path) -> Iterator[None]:
    with patch.dict("os.environ", {"HOME": str(home)} | env, clear=True), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it advises against its own shared hosts
        yield


def by_the_new_client(env: dict[str, str], home: Path) -> tuple[str, str | None]:
    """API root and workspace header."""
    with only(env, home):
        config = new_client().resolve_config()
    return config.base_url, config.workspace


def by_the_old_part(env: dict[str, str], home: Path) -> tuple[str, None]:
    """API root; its calls name a workspace in a header only where the program gives one."""
    file = part_of_the_client("common/env.py")
    package = ModuleType("dashscope")  # without what its __init__ loads, which takes seconds
    package.__path__ = [str(file.parent.parent)]
    with only(env, home), patch.dict("sys.modules", dashscope=package):
        part = runpy.run_path(str(file))
        return part["resolve_base_url"](part["base_http_api_url"]), None


def by_us(env: dict[str, str], home: Path) -> tuple[str, str | None]:
    account = Account(PROVIDER, {"HOME": str(home)} | env)
    workspace = account.workspace
    return account.root.value if account.root else PROVIDER.roots["beijing"], workspace.value if workspace else None


REGION, WORKSPACE = "DASHSCOPE_REGION", "DASHSCOPE_WORKSPACE"
OLD_REGION, OLD_WORKSPACE = "DASHSCOPE_API_REGION", "DASHSCOPE_WORKSPACE_ID"
URL, OLD_URL = "DASHSCOPE_BASE_URL", "DASHSCOPE_HTTP_BASE_URL"
ELSEWHERE = "https://ws-7.ap-southeast-1.maas.aliyuncs.com/api/v1"
NEW: list[tuple[dict[str, str], str]] = [
    ({}, ""),
    ({REGION: "cn-beijing"}, ""),
    ({REGION: "ap-southeast-1"}, ""),
    ({REGION: ""}, 'region = "ap-southeast-1"'),
    ({WORKSPACE: "ws-1"}, ""),
    ({WORKSPACE: "ws-1", REGION: "ap-southeast-1"}, ""),
    ({WORKSPACE: "ws-1"}, 'region = "ap-southeast-1"\nworkspace = "ws-2"'),
    ({REGION: "cn-beijing"}, 'region = "ap-southeast-1"\nworkspace = "ws-2"'),
    ({}, 'workspace = "ws_2-x"\nregion = "ap-southeast-1"\ntimeout = 7\nstranger = [1]\n[more]\nworkspace = "x"'),
    ({}, f'base_url = "{ELSEWHERE}"\nworkspace = "ws-2"'),
    ({WORKSPACE: "ws-1"}, f'base_url = "{ELSEWHERE}"'),
    ({URL: ELSEWHERE}, 'base_url = "https://dashscope.aliyuncs.com/api/v1"'),
    ({OLD_URL: ELSEWHERE}, 'base_url = "https://dashscope.aliyuncs.com/api/v1"'),
    ({URL: ELSEWHERE, OLD_URL: "https://dashscope.aliyuncs.com/api/v1", WORKSPACE: "ws-1", REGION: "cn-beijing"}, ""),
    ({"DASHSCOPE_CONFIG": ""}, 'region = "ap-southeast-1"'),
    ({"DASHSCOPE_CONFIG": "/nowhere/config.toml"}, 'region = "ap-southeast-1"'),
    ({"DASHSCOPE_CONFIG": "~/.dashscope/config.toml"}, 'region = "ap-southeast-1"'),
]
OLD: list[dict[str, str]] = [
    {},
    {OLD_REGION: "cn-beijing"},
    {OLD_WORKSPACE: "ws-1"},
    {OLD_REGION: "cn-beijing", OLD_WORKSPACE: "ws-1"},
    {OLD_REGION: "ap-southeast-1", OLD_WORKSPACE: "ws-1"},
    {OLD_REGION: "ap-southeast-1", OLD_WORKSPACE: "llm_3-x", OLD_URL: "https://dashscope.aliyuncs.com/api/v1"},
    {OLD_WORKSPACE: "ws-1", OLD_URL: "https://{workspace_id}.ap-southeast-1.maas.aliyuncs.com/api/v1"},
]


@pytest.mark.parametrize(("env", "config"), NEW)
def test_the_settings_of_the_new_client_lead_where_it_goes(tmp_path: Path, env: dict[str, str], config: str) -> None:
    if config:
        configure(tmp_path, config)
    assert by_us(env, tmp_path) == by_the_new_client(env, tmp_path)


@pytest.mark.parametrize("env", OLD)
def test_the_settings_of_its_older_part_lead_where_that_goes(tmp_path: Path, env: dict[str, str]) -> None:
    assert by_us(env, tmp_path) == by_the_old_part(env, tmp_path)


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("env", "host", "source"),
    [
        ({}, "dashscope.aliyuncs.com", "default"),
        ({OLD_REGION: "ap-southeast-1"}, "dashscope-intl.aliyuncs.com", OLD_REGION),  # that part asks for a workspace
        ({REGION: "Singapore"}, "dashscope-intl.aliyuncs.com", REGION),  # as third-party scripts have it
        ({OLD_REGION: "intl"}, "dashscope-intl.aliyuncs.com", OLD_REGION),
        ({REGION: "ap-southeast-1", OLD_REGION: "singapore"}, "dashscope-intl.aliyuncs.com", REGION),
        ({WORKSPACE: "ws-1", OLD_WORKSPACE: "ws-1"}, "ws-1.cn-beijing.maas.aliyuncs.com", WORKSPACE),
        (
            {WORKSPACE: "ws-1", OLD_REGION: "intl"},
            "ws-1.ap-southeast-1.maas.aliyuncs.com",
            f"{WORKSPACE} and {OLD_REGION}",
        ),
        ({URL: "dashscope-intl.aliyuncs.com", WORKSPACE: "ws-1"}, "dashscope-intl.aliyuncs.com", URL),
    ],
)
def test_the_plan_names_what_decided(shell: Shell, env: dict[str, str], host: str, source: str) -> None:
    shell.env |= env
    plan = planned(shell)
    assert (urlsplit(plan["endpoint"]).hostname, plan["endpoint_source"], plan["warnings"]) == (host, source, [])
    assert plan["region"] == ("singapore" if "intl" in host or "southeast" in host else "beijing")


@pytest.mark.parametrize(
    ("env", "config", "words"),
    [
        ({REGION: "cn-beijing", OLD_REGION: "ap-southeast-1"}, "", (REGION, OLD_REGION)),
        ({REGION: "intl", OLD_REGION: "beijing", URL: "http://localhost:9"}, "", (REGION, OLD_REGION)),
        ({WORKSPACE: "ws-1", OLD_WORKSPACE: "ws-2"}, "", (WORKSPACE, OLD_WORKSPACE)),
        ({OLD_WORKSPACE: "ws-2"}, 'workspace = "ws-1"', ("config.toml", OLD_WORKSPACE)),
        ({REGION: "us-east-1"}, "", (REGION, "not offered in us-east-1", "beijing", "singapore")),
        ({OLD_REGION: "cn-hongkong", OLD_WORKSPACE: "ws-1"}, "", (OLD_REGION, "not offered")),
        ({}, 'region = "eu-central-1"', ("config.toml", "not offered")),
        ({REGION: "mars"}, "", (REGION, "must be one of")),
        ({WORKSPACE: "evil.example.com/"}, "", (WORKSPACE,)),
        ({OLD_WORKSPACE: "a.b", OLD_REGION: "intl"}, "", (OLD_WORKSPACE,)),
        ({WORKSPACE: "x" * 65}, "", (WORKSPACE,)),
        ({}, 'workspace = "ws 1"', ("config.toml",)),
        ({OLD_URL: "https://{workspace_id}.cn-beijing.maas.aliyuncs.com"}, "", (OLD_URL, "{workspace_id}")),
        ({}, "region = [", ("config.toml", "cannot be read")),
        ({}, "region = 7", ("region in", "config.toml", "text")),
        ({}, "a = " + "[" * 5000, ("config.toml",)),
        ({"DASHSCOPE_CONFIG": "~/own.toml"}, "\xff", ("DASHSCOPE_CONFIG", "not UTF-8")),
    ],
)
def test_settings_that_cannot_be_followed_stop_the_command(
    shell: Shell, env: dict[str, str], config: str, words: tuple[str, ...]
) -> None:
    shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY} | env
    if config:
        configure(shell.home, config.encode("latin-1"), "own.toml" if "DASHSCOPE_CONFIG" in env else CONFIG)
    error = refused(shell)
    assert error["code"] == "invalid_account"
    for word in words:
        assert word in error["message"]


def test_the_flag_goes_before_regions_that_contradict_each_other(shell: Shell) -> None:
    shell.env |= {REGION: "cn-beijing", OLD_REGION: "us-east-1"}
    assert planned(shell, "--region", "singapore")["region"] == "singapore"


@pytest.mark.parametrize("region", ["us-east-1", "CN-Hongkong"])
def test_a_region_without_the_model_is_refused_with_those_that_have_it(shell: Shell, region: str) -> None:
    error = refused(shell, "--region", region)
    assert error["code"] == "usage" and "beijing and singapore" in error["message"]


def test_without_a_reader_the_file_is_not_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    env = {"HOME": str(tmp_path)}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert config_of(PROVIDER.config_file, env) == {}
    configure(tmp_path, 'region = "ap-southeast-1"')
    with pytest.raises(Failure, match="tomli") as caught:
        config_of(PROVIDER.config_file, env)
    assert (caught.value.code, caught.value.fault.exit_code) == ("missing_package", 2)
    assert "pip install 'tomli" in caught.value.fault.hint


def test_a_file_that_is_too_long_or_broken_at_length_is_told_shortly(tmp_path: Path) -> None:
    env = {"HOME": str(tmp_path)}
    text = 'region = "ap-southeast-1"\n#'
    configure(tmp_path, text.ljust(64 * 1024, "-"))
    assert config_of(PROVIDER.config_file, env) == {"region": "ap-southeast-1"}
    configure(tmp_path, text.ljust(64 * 1024 + 1, "-"))
    with pytest.raises(Failure, match="cannot be read"):
        config_of(PROVIDER.config_file, env)
    configure(tmp_path, text)
    for length, shown in ((200, "x" * 200), (201, "x" * 199 + "…")):
        with patch("zimage.account._toml_of", side_effect=ValueError("x" * length)), pytest.raises(Failure) as caught:
            config_of(PROVIDER.config_file, env)
        assert caught.value.message == f"~/{CONFIG} cannot be read: {shown}"


def test_whoever_has_set_a_region_that_is_none_is_asked_for_theirs() -> None:
    with pytest.raises(Failure, match="must be one of") as caught:
        Account(PROVIDER, {REGION: "mars"}).region  # noqa: B018
    assert caught.value.fault.hint == ASK_FOR_REGION


@pytest.mark.parametrize(
    ("env", "config", "header"),
    [
        ({WORKSPACE: "ws-1"}, "", "ws-1"),
        ({}, 'workspace = "ws-2"', "ws-2"),
        ({WORKSPACE: "ws-1"}, 'workspace = "ws-2"', "ws-1"),
        ({OLD_WORKSPACE: "ws-1", OLD_REGION: "intl"}, "", None),
        ({URL: "https://dashscope.aliyuncs.com", WORKSPACE: "ws-1"}, "", "ws-1"),
    ],
)
def test_the_header_names_the_workspace_where_the_clients_does(
    tmp_path: Path, env: dict[str, str], config: str, header: str | None
) -> None:
    if config:
        configure(tmp_path, config)
    assert workspace_of(PROVIDER, {"HOME": str(tmp_path)} | env) == (header, [])


def test_the_clients_file_names_the_key_too(shell: Shell) -> None:
    configure(shell.home, f'api_key = "{TEST_KEY}"\nbase_url = "http://127.0.0.1:9"')
    configure(shell.home, "sk-own-0123456789", ".dashscope/api_key")
    plan = planned(shell)
    assert plan["key_source"] == "api_key in ~/.dashscope/config.toml"
    assert plan["endpoint_source"] == "base_url in ~/.dashscope/config.toml"
    shell.env["DASHSCOPE_CONFIG"] = ""
    assert planned(shell)["key_source"] == "~/.dashscope/api_key"
    shell.env["DASHSCOPE_API_KEY_FILE_PATH"] = "~/.dashscope/api_key"  # no shell has replaced the ~
    assert "DASHSCOPE_API_KEY_FILE_PATH" in planned(shell)["key_source"]


def test_the_clients_file_cannot_widen_trust(shell: Shell) -> None:
    configure(shell.home, f'api_key = "{TEST_KEY}"\nbase_url = "https://evil.example.com/api/v1"')
    assert refused(shell)["code"] == "host_not_trusted"


# -- A base URL for other programs -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variable", "url", "region"),
    [
        (URL, "https://dashscope.aliyuncs.com/compatible-mode/v1", "beijing"),
        (OLD_URL, "https://dashscope-intl.aliyuncs.com/compatible-mode/v1/", "singapore"),
        (URL, "https://ws-1.ap-southeast-1.maas.aliyuncs.com/apps/anthropic", "singapore"),
    ],
)
def test_a_base_url_for_other_programs_is_told_and_got_past(shell: Shell, variable: str, url: str, region: str) -> None:
    shell.env[variable] = url
    error = refused(shell)
    host = urlsplit(url).hostname
    assert error["code"] == "invalid_base_url" and f"https://{host}/api/v1" in error["hint"]
    assert f"--region {region}" in error["hint"]
    assert planned(shell, "--region", region)["region"] == region


@pytest.mark.parametrize("host", ["gateway.example.com", "cn-hongkong.dashscope.aliyuncs.com", "127.0.0.1:9"])
def test_no_advice_leads_away_from_the_host_that_is_set(shell: Shell, host: str) -> None:
    shell.env[URL] = f"https://{host}/compatible-mode/v1"
    assert "--region" not in refused(shell)["hint"]


# -- What is no key ----------------------------------------------------------------------------------------------------

PLACEHOLDERS = [
    *("your-api-key-here", "YOUR_API_KEY", "sk-your-key", "yourapikey", "<your-key>", "your_dashscope_api_key"),
    *("sk-xxx", "sk-xxxxxxxxxxxxxxxxxxxxxxxx", "XXXX", "sk-xxxx-xxxx-xxxx", "sk-********1234", "sk-...", "sk-"),
    *("$DASHSCOPE_API_KEY", "${DASHSCOPE_API_KEY}", "%DASHSCOPE_API_KEY%", "$env:DASHSCOPE_API_KEY", "{{ key }}"),
    *("DASHSCOPE_API_KEY", "DASHSCOPE_API_KEY=sk-0123456789abcdef", "[api key]", "$(cat key)", "none", "undefined"),
    *("changeme", "change-me-please", "replace_with_key", "insert-key-here", "placeholder", "null", "00000000"),
    *("api-key", "my-api-key", "sk-key"),
]
KEYS = ["sk-test", "test-key", "sk-mock-0f3a", "sk-ws-01.AbC_d-9", "st-0123456789", "sk-youre0123456789", "fake"]


@pytest.mark.parametrize("key", PLACEHOLDERS)
def test_a_placeholder_is_never_sent(key: str, tmp_path: Path) -> None:
    with pytest.raises(Failure, match=r"placeholder|blanks") as caught:
        find_key(PROVIDER.key_places, {"DASHSCOPE_API_KEY": key, "HOME": str(tmp_path)})
    assert (caught.value.code, caught.value.fault.exit_code) == ("key_malformed", 3)
    assert "DASHSCOPE_API_KEY" in caught.value.message


@pytest.mark.parametrize("key", KEYS)
def test_what_may_be_a_key_is_taken(key: str, tmp_path: Path) -> None:
    assert find_key(PROVIDER.key_places, {"DASHSCOPE_API_KEY": key, "HOME": str(tmp_path)}).value == key


@pytest.mark.parametrize("key", ["none", "sk-xxx", "your-key"])
def test_a_server_of_ones_own_may_be_given_any_word(key: str, tmp_path: Path) -> None:
    places = OpenAI.key_places
    assert places is not None
    assert find_key(places, {"OPENAI_API_KEY": key, "HOME": str(tmp_path)}).value == key


@pytest.mark.parametrize("key", ["sk-sp-0123456789abcdef", "SK-SP-x.0123456789"])
def test_a_key_of_a_plan_is_refused_with_the_reason_and_never_sent(shell: Shell, mock: MockServer, key: str) -> None:
    shell.use(mock)
    shell.env["DASHSCOPE_API_KEY"] = key
    shell.env["BAILIAN_CODING_PLAN_API_KEY"] = mock.api_key  # of a plan: no way out
    result = shell.call(*ONE, "--print-response")
    assert (result.code, result.error["code"]) == (3, "key_malformed")
    assert "Coding Plan" in result.error["message"]
    assert mock.stats()["requests"] == []


def test_the_variables_of_plans_are_no_place_of_a_key(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    del shell.env["DASHSCOPE_API_KEY"]
    shell.env |= dict.fromkeys(("BAILIAN_CODING_PLAN_API_KEY", "BAILIAN_TOKEN_PLAN_API_KEY"), mock.api_key)
    assert shell.run("--check").error["code"] == "key_missing"


# -- A key that is refused ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [[*ONE, "--print-response"], ["--check"]])
def test_a_refused_key_is_told_with_its_place_and_the_others(
    shell: Shell, mock: MockServer, arguments: list[str]
) -> None:
    shell.use(mock)
    shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, "ALIBABA_CLOUD_PROFILE": "work"}
    configure(shell.home, "[default]\ndashscope_api_key = sk-ini-0123456789\n", ".alibabacloud/credentials")
    configure(shell.home, f'api_key = "{TEST_KEY}"')
    configure(shell.home, "sk-own-0123456789", ".dashscope/api_key")
    error = shell.call(*arguments).error
    assert (error["exit_code"], error["code"]) == (3, "key_rejected")
    assert "environment DASHSCOPE_API_KEY" in error["message"]
    assert "another key is in: ~/.dashscope/api_key" in error["hint"]
    assert "config.toml" not in error["hint"]  # it holds the same
    assert "[work]" in error["hint"] and "no such profile" in error["hint"]
    assert "--region" not in error["hint"] and "127.0.0.1" in error["hint"]


@pytest.mark.parametrize(
    ("profile", "text", "words"),
    [
        ("work", "[default]\ndashscope_api_key = sk-ini-0123456789\n", "[work] is looked at, and there is no such"),
        ("work", "[work]\nregion = x\n", "[work] is looked at, and there is no dashscope_api_key"),
        ("", "[other]\ndashscope_api_key = sk-ini-0123456789\n", "[default] is looked at, and there is no such"),
    ],
)
def test_a_credentials_file_without_the_profile_is_named(shell: Shell, profile: str, text: str, words: str) -> None:
    configure(shell.home, text, ".alibabacloud/credentials")
    shell.env["ALIBABA_CLOUD_PROFILE"] = profile
    error = shell.call("--check").error
    assert error["code"] == "key_missing" and f"~/.alibabacloud/credentials {words}" in error["message"]


def test_a_check_that_fails_tells_what_it_knows(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    shell.env["DASHSCOPE_API_KEY"] = TEST_KEY
    told = shell.run("--check").json
    assert told.pop("error")["code"] == "key_rejected" and len(told.pop("warnings")) == 1
    assert told == {
        "ok": False,
        "provider": "dashscope",
        "region": "unknown",
        "endpoint": mock.endpoint,
        "endpoint_source": "DASHSCOPE_BASE_URL",
        "key_source": "environment DASHSCOPE_API_KEY",
    }


def test_a_provider_of_one_region_names_no_other(tmp_path: Path) -> None:
    provider, none = ZImageTurbo(), frozenset[str]()
    env = {"HOME": str(tmp_path)}
    endpoint = choose_endpoint(provider, flag=None, request_url=None, region=None, env=env, trusted=none)
    assert endpoint.source == "default"
    with pytest.raises(Failure) as caught, telling_of_refused(Key(TEST_KEY, "x"), endpoint, provider):
        raise Failure("key_rejected", "401")
    assert "--region" not in caught.value.fault.hint and "leads to" in caught.value.fault.hint


def test_another_region_is_named_only_where_the_user_has_set_none(tmp_path: Path) -> None:
    def advice(region: str | None, env: dict[str, str]) -> str:
        env = {"HOME": str(tmp_path)} | env
        none = frozenset[str]()
        endpoint = choose_endpoint(PROVIDER, flag=None, request_url=None, region=region, env=env, trusted=none)
        with pytest.raises(Failure) as caught, telling_of_refused(Key(TEST_KEY, "x"), endpoint, PROVIDER):
            raise Failure("key_rejected", "401")
        return caught.value.fault.hint

    assert "--check --region singapore" in advice(None, {})
    for region, env in (("beijing", {}), (None, {REGION: "intl"}), (None, {URL: "http://localhost:9"})):
        assert "--region singapore" not in advice(region, env) and "--check" not in advice(region, env)


# -- A server that is not the service's own ----------------------------------------------------------------------------

PROXY = "https://images.example.com"


@pytest.mark.parametrize(
    ("arguments", "env", "source"),
    [
        ([], {URL: PROXY}, URL),
        ([], {OLD_URL: f"{PROXY}/api/v1"}, OLD_URL),
        ([], {URL: "http://localhost:9/api/v1"}, URL),
        (["--base-url", PROXY], {}, "--base-url"),
        (["--request", json.dumps({"prompt": "a cat", "base_url": PROXY})], {}, "base_url"),
    ],
)
def test_a_server_that_is_not_the_services_own_is_told_before_paying(
    shell: Shell, arguments: list[str], env: dict[str, str], source: str
) -> None:
    shell.env |= {"ZIMAGE_TRUSTED_HOSTS": "images.example.com"} | env
    plan = shell.call(*([] if "--request" in arguments else ONE), *arguments, "--dry-run").json
    (warning,) = plan["warnings"]
    assert warning.startswith(f"{source} leads to ") and plan["endpoint_source"] == source
    assert plan["region"] == "unknown" and "not known" in plan["cost_basis"]


def test_it_is_told_on_stderr_and_kept_in_the_evidence(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    result = shell.run(*ONE, "--print-response")
    first = result.stderr.splitlines()[0]
    assert result.code == 0 and first.startswith("warning: DASHSCOPE_BASE_URL leads to 127.0.0.1")
    assert "warnings" not in result.json and result.json["region"] == "unknown"
    evidence = shell.evidence()
    assert (evidence["endpoint_source"], evidence["region"]) == ("DASHSCOPE_BASE_URL", "unknown")
    again = shell.run("--replay", str(shell.evidence_files()[0]), "--dry-run").json
    assert (again["endpoint_source"], again["region"], again["endpoint"]) == ("--replay", "unknown", mock.endpoint)


@pytest.mark.parametrize(("env", "region"), [({REGION: "intl"}, "singapore"), ({OLD_REGION: "cn-beijing"}, "beijing")])
def test_a_region_that_is_set_is_that_of_such_a_server(shell: Shell, env: dict[str, str], region: str) -> None:
    shell.env |= {URL: "http://localhost:9"} | env
    assert planned(shell)["region"] == region


@pytest.mark.parametrize(
    ("env", "source", "host"),
    [
        ({URL: "https://images.example.com"}, URL, "images.example.com"),
        ({OLD_URL: "http://127.0.0.1:9/api/v1"}, OLD_URL, "127.0.0.1"),
        ({REGION: "intl", WORKSPACE: "ws-1"}, f"{WORKSPACE} and {REGION}", "ws-1.ap-southeast-1.maas.aliyuncs.com"),
        ({URL: "https://user:pass@images.example.com"}, URL, "another place"),
    ],
)
def test_a_region_against_what_is_set_is_told_with_both_places(
    shell: Shell, env: dict[str, str], source: str, host: str
) -> None:
    shell.env |= env
    (warning,) = planned(shell, "--region", "beijing")["warnings"]
    assert "--region leads to dashscope.aliyuncs.com" in warning and f"{source} leads to {host}" in warning
    assert "pass" not in warning


@pytest.mark.parametrize("env", [{}, {URL: "dashscope.aliyuncs.com"}, {REGION: "cn-beijing"}])
def test_a_region_that_leads_where_all_else_does_is_no_matter(shell: Shell, env: dict[str, str]) -> None:
    shell.env |= env
    assert planned(shell, "--region", "beijing")["warnings"] == []


def test_a_host_of_the_vendor_without_the_model_is_told(shell: Shell) -> None:
    (warning,) = planned(shell, "--base-url", "ws-1.us-east-1.maas.aliyuncs.com")["warnings"]
    assert "beijing and singapore only" in warning


def test_servers_of_users_are_not_warned_of(shell: Shell) -> None:
    shell.env["OPENAI_BASE_URL"] = "http://127.0.0.1:9/v1"
    assert planned(shell, "--provider", "openai")["warnings"] == []


def test_a_batch_tells_it_once_and_its_dry_run_too(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    shell.script = BATCH
    arguments = ("--prompt", "a cat", "--output-dir", "out", "--rpm", "0", "--variants", "2")
    plan = shell.run(*arguments, "--dry-run").json
    assert plan["endpoint_source"] == "DASHSCOPE_BASE_URL" and len(plan["warnings"]) == 1
    result = shell.run(*arguments)
    assert result.code == 0 and result.stderr.count("warning: DASHSCOPE_BASE_URL leads to 127.0.0.1") == 1


def test_a_batch_that_called_the_region_of_such_a_server_beijing_goes_on(shell: Shell, mock: MockServer) -> None:
    """As 0.4.0 did: where it was asked is the same, so nothing is paid for again."""
    shell.use(mock)
    shell.script = BATCH
    arguments = ("--prompt", "a cat", "--output-dir", "out", "--rpm", "0")
    assert shell.run(*arguments, "--limit", "1", "--variants", "2").code == 1
    with closing(sqlite3.connect(shell.folder / "out" / "batch.sqlite3")) as database, database:
        database.execute("UPDATE services SET region = 'beijing'")
    for _ in range(2):
        assert shell.run(*arguments, "--variants", "2").code == 0
    assert mock.stats()["billed"] == 2
    with closing(sqlite3.connect(shell.folder / "out" / "batch.sqlite3")) as database:
        assert database.execute("SELECT region FROM services").fetchall() == [("beijing",)]


# -- What the account may send -----------------------------------------------------------------------------------------


def quota(requests: Any, seconds: Any, **more: Any) -> dict[str, Any]:
    limit = {"request_limit": requests, "request_limit_period": seconds}
    return {"model": "z-image-turbo", "workspace_id": "ws-1", "model_limit": limit, "workspace_limit": None} | more


@pytest.mark.parametrize(
    ("quotas", "limit"),
    [
        ([quota(2, 1)], (2, 1)),
        ([quota(120, 60, workspace_limit={"request_limit": 1, "request_limit_period": 1})], (1, 1)),
        ([quota(60, 60), quota(5, 60, model="z-image")], (60, 60)),
        ([quota(60, 60), quota(5, 60, workspace_id="ws-2")], (60, 60)),  # of another workspace than ours
        ([quota(60, 60, workspace_id="ws-2"), quota(30, 60, workspace_id="ws-3")], (30, 60)),
        ([quota(None, 60)], None),
        ([quota("2", 1)], None),
        ([quota(0, 60)], None),
        ([quota(True, 60)], None),
        ([quota(5, 60) | {"model_limit": 7}], None),
        ([], None),
        ({"a": 1}, None),
    ],
)
def test_the_limit_is_that_of_the_model_and_the_workspace(quotas: Any, limit: tuple[int, int] | None) -> None:
    body = {"output": {"quotas": quotas}}
    read = PROVIDER.read_limits(HttpAnswer(200, {}, json.dumps(body).encode()), "ws-1")
    assert read == (RateLimit(*limit) if limit else None)


def test_a_check_shows_the_accounts_limit(shell: Shell) -> None:
    with MockServer(rpm=90) as mock:
        shell.use(mock)
        told = shell.run("--check").json
    assert told["rate_limit"] == {"requests": 90, "seconds": 60}
    assert mock.stats()["quota_queries"] == 1 and mock.stats()["billed"] == 0


ODD_ANSWERS = {
    "not offered": json_answer({"code": "NotFound", "message": "x"}, 404),
    "a wrong key": json_answer({"code": "InvalidApiKey", "message": "x"}, 401),
    "no JSON": Answer(body=b"<html>"),
    "a fault": Answer(500),
    "cut": Answer(hang_up="after-reading"),
}


@pytest.mark.parametrize("answer", ODD_ANSWERS.values(), ids=ODD_ANSWERS)
def test_an_account_whose_limit_is_not_told_is_checked_all_the_same(
    shell: Shell, service: FaultServer, answer: Answer
) -> None:
    service.play("/api/v1/models", json_answer({"output": {"models": [{"model": "z-image-turbo"}]}}))
    service.play("/api/v1/quotas", answer)
    result = shell.call("--check")
    assert (result.code, result.json["model_listed"]) == (0, True) and "rate_limit" not in result.json


@pytest.mark.parametrize(("arguments", "most"), [([], 1200), (["--rpm", "600"], 600)])
def test_a_batch_goes_at_the_accounts_pace_unless_another_is_given(
    shell: Shell, service: FaultServer, arguments: list[str], most: int
) -> None:
    shell.script = BATCH
    service.play("/api/v1/quotas", json_answer({"output": {"quotas": [quota(20, 1)]}}))
    began: list[float] = []

    def picture(request: Received) -> Answer:
        began.append(request.at)
        return good()(request)

    service.play(GENERATE, picture)
    out = ("--output-dir", "out", "--variants", "5", "--no-gallery")
    assert shell.run("--prompt", "a cat", *out, *arguments).code == 0
    spans = (began[-1] - began[0]) / (len(began) - 1)
    assert 0.9 * 60 / most < spans < 0.4  # seconds; the published pace is one in 0.5 s


def test_a_service_that_does_not_answer_what_the_limit_is_delays_no_batch_for_long(
    shell: Shell, service: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    shell.script = BATCH
    service.play("/api/v1/quotas", Answer(delay_s=60))
    result = shell.run("--prompt", "a cat", "--output-dir", "out", "--no-gallery", "--time-limit", "20", timeout=30)
    assert result.code == 0 and result.json["elapsed_s"] < 8
