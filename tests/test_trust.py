"""Where a request goes, and that the key goes to its owner only.

The large tables run the command inside this process with every way onto the network cut and noted (`inside`);
a few runs as a process with a real listener show that the same holds there.
"""

from __future__ import annotations

import base64
import contextlib
import ipaddress
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import requests
from hypothesis import given, settings
from hypothesis import strategies as st
from urllib3.util import parse_url

import generate_image
import mock_server
import zimage.outside
from conftest import TEST_KEY, Result, Shell
from mock_server import MockServer
from records import evidence_file
from zimage.download import checked_link
from zimage.endpoint import is_public_address, origin_of
from zimage.errors import Failure
from zimage.registry import provider_named
from zimage.trust import Own, check_trust, parse_base_url

ROOT_PATH = "/api/v1"
CALL_PATH = f"{ROOT_PATH}/services/aigc/multimodal-generation/generation"
BEIJING = f"https://dashscope.aliyuncs.com{CALL_PATH}"
SINGAPORE = f"https://dashscope-intl.aliyuncs.com{CALL_PATH}"
STEERING = ("DASHSCOPE_", "ZIMAGE_", "ALIBABA_CLOUD_", "ALICLOUD_", "OUTPUT_DIR")


@dataclass
class Inside:
    """The command run in this process; `reached` notes every attempt to resolve a name or to connect."""

    monkeypatch: pytest.MonkeyPatch
    capsys: pytest.CaptureFixture[str]
    reached: list[Any] = field(default_factory=list)

    def run(self, *arguments: str, env: dict[str, str] | None = None) -> Result:
        with self.monkeypatch.context() as patch:
            for name, value in ({"DASHSCOPE_API_KEY": TEST_KEY} | (env or {})).items():
                patch.setenv(name, value)
            self.capsys.readouterr()
            code = generate_image.main([*arguments])
            return Result(code, *self.capsys.readouterr())

    def plan(self, *arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
        """The plan of a dry run that must succeed."""
        result = self.run("--prompt", "a cat", *arguments, "--dry-run", env=env)
        assert result.code == 0, result.stdout
        return result.json

    def endpoint(self, *arguments: str, env: dict[str, str] | None = None) -> str:
        return str(self.plan(*arguments, env=env)["endpoint"])

    def refused(self, *arguments: str, env: dict[str, str] | None = None) -> dict[str, Any]:
        """The error of a paid run that must end before anything is looked up, connected to or written."""
        result = self.run(*arguments, "--print-response", env=env)
        assert result.code == 2, result.stdout
        assert self.reached == []
        assert TEST_KEY not in result.stdout + result.stderr
        assert not Path("output").exists()
        error = result.error
        assert error["billed"] == "no"
        return error


@pytest.fixture
def inside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Iterator[Inside]:
    for name in os.environ:
        if name.startswith(STEERING) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(zimage.outside, "_secrets", set())
    found = Inside(monkeypatch, capsys)

    def unreachable(*arguments: Any, **options: Any) -> Any:
        found.reached.append(arguments)
        raise OSError("this test has no network")

    monkeypatch.setattr(socket.socket, "connect", unreachable)
    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    monkeypatch.setattr(socket, "create_connection", unreachable)
    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    yield found
    for signum, handler in handlers.items():
        signal.signal(signum, handler)


def unpaid(folder: Path, **changes: Any) -> Path:
    """The evidence file of a request that was not billed."""
    return evidence_file(folder, **{"status": "failed", "attempts": []} | changes)


def test_the_network_trap_of_these_tests_catches_an_allowed_host(inside: Inside) -> None:
    result = inside.run("--prompt", "a cat", "--max-retries", "0", "--print-response")
    assert result.code == 6
    assert inside.reached


# -- Hostile and malformed base URLs -----------------------------------------------------------------------------------

HOSTILE = [
    # Somebody else's host.
    "https://example.com",
    "https://example.com/api/v1",
    f"https://example.com{CALL_PATH}",
    "example.com",
    "https://dashscope.aliyuncs.com.evil.com/api/v1",
    "https://evil-dashscope.aliyuncs.com/api/v1",
    "https://evildashscope.aliyuncs.com/api/v1",
    "https://dashscope.evil-aliyuncs.com/api/v1",
    "https://dashscopealiyuncs.com/api/v1",
    "https://dashscope.aliyuncs.co/api/v1",
    "https://dashscope.aliyuncs.org/api/v1",
    "https://dashscope.aliyun.com/api/v1",
    "https://dashscope.aliyuncs.com.cn/api/v1",
    "https://dashscope.aliyuncs.comm/api/v1",
    "https://dashscope-intl.aliyuncs.com.evil.com/api/v1",
    # Names under aliyuncs.com that others can rent.
    "https://aliyuncs.com/api/v1",
    "https://oss-cn-beijing.aliyuncs.com/api/v1",
    "https://bucket.oss-cn-beijing.aliyuncs.com/api/v1",
    "https://dashscope.oss-cn-beijing.aliyuncs.com/api/v1",
    "https://dashscope-result.oss-cn-beijing.aliyuncs.com/api/v1",
    "https://dashscope-a.b.aliyuncs.com/api/v1",
    "https://dashscope-a-b.aliyuncs.com/api/v1",
    "https://dashscope-.aliyuncs.com/api/v1",
    "https://dashscope--intl.aliyuncs.com/api/v1",
    "https://dashscope_intl.aliyuncs.com/api/v1",
    "https://maas.aliyuncs.com/api/v1",
    "https://evilmaas.aliyuncs.com/api/v1",
    "https://evil-maas.aliyuncs.com/api/v1",
    "https://maas.aliyuncs.com.evil.com/api/v1",
    "https://fc.cn-beijing.aliyuncs.com/api/v1",
    # Two hosts in one.
    "https://dashscope.aliyuncs.com@evil.com/api/v1",
    "https://dashscope.aliyuncs.com:443@evil.com/api/v1",
    "https://user:hunter2@dashscope.aliyuncs.com/api/v1",
    "https://user@dashscope.aliyuncs.com/api/v1",
    "https://@dashscope.aliyuncs.com/api/v1",
    "https://:@dashscope.aliyuncs.com/api/v1",
    "http://127.0.0.1@evil.com/api/v1",
    "http://localhost:80@evil.com/api/v1",
    "https://evil.com\\@dashscope.aliyuncs.com/api/v1",
    "https://dashscope.aliyuncs.com\\.evil.com/api/v1",
    "https:\\\\dashscope.aliyuncs.com\\api\\v1",
    "https://evil.com/@dashscope.aliyuncs.com/api/v1",
    "https://evil.com#@dashscope.aliyuncs.com/api/v1",
    "https://evil.com?@dashscope.aliyuncs.com/api/v1",
    "https://evil.com;dashscope.aliyuncs.com/api/v1",
    "https://dashscope.aliyuncs.com,evil.com/api/v1",
    "https://[dashscope.aliyuncs.com]/api/v1",
    "https://evil.com https://dashscope.aliyuncs.com/api/v1",
    # The right host, written to be read in two ways.
    "https://dashscope.aliyuncs.com./api/v1",
    "https://.dashscope.aliyuncs.com/api/v1",
    "https://dashscope..aliyuncs.com/api/v1",
    "https://dashscope%2ealiyuncs.com/api/v1",
    "https://dashscope.aliyuncs.com%00.evil.com/api/v1",
    "https://dashscope.aliyuncs.com%2fapi/v1",
    "https://%64ashscope.aliyuncs.com/api/v1",
    "https://dаshscope.aliyuncs.com/api/v1",  # a Cyrillic а
    "https://dashscope。aliyuncs。com/api/v1",
    "https://dashscope．aliyuncs．com/api/v1",
    "https://ｄashscope.aliyuncs.com/api/v1",
    "https://dashſcope.aliyuncs.com/api/v1",  # a long s, whose upper case is S
    "https://dashscope.aliyuncs.com\u200b/api/v1",
    "https://dashscope.aliyuncs.com\u202e/api/v1",
    "https://xn--dashscope-9jf.aliyuncs.com/api/v1",
    "https://dashscope.aliyuncs.com\t/api/v1",
    "https://dashscope.aliyuncs.com\n/api/v1",
    "https://dashscope.aliyuncs.com/api/v1\n",
    "https://dashscope.aliyuncs.com/api/v1\r\nHost: evil.com",
    "https://dash\tscope.aliyuncs.com/api/v1",
    "https://dashscope.aliyuncs.com /api/v1",
    " https://dashscope.aliyuncs.com/api/v1",
    "https://dashscope.aliyuncs.com/api/v1 ",
    "\x01https://dashscope.aliyuncs.com/api/v1",
    "https://dashscope.aliyuncs.com\x7f/api/v1",
    # Query, fragment, path.
    "https://dashscope.aliyuncs.com/api/v1?x=1",
    "https://dashscope.aliyuncs.com/api/v1?",
    "https://dashscope.aliyuncs.com/api/v1#x",
    "https://dashscope.aliyuncs.com/api/v1#",
    "https://dashscope.aliyuncs.com?/api/v1",
    "https://dashscope.aliyuncs.com/api/v1/../v1",
    "https://dashscope.aliyuncs.com/./api/v1",
    "https://dashscope.aliyuncs.com/..",
    "https://dashscope.aliyuncs.com//api/v1",
    "https://dashscope.aliyuncs.com/api/v1//",
    "https://dashscope.aliyuncs.com/api%2fv1",
    "https://dashscope.aliyuncs.com/api/v1;x=1",
    "https://dashscope.aliyuncs.com/api/v2",
    "https://dashscope.aliyuncs.com/api",
    "https://dashscope.aliyuncs.com/v1",
    "https://dashscope.aliyuncs.com/api/v1/services/aigc/text2image/image-synthesis",
    "https://dashscope.aliyuncs.com/compatible-mode/v1",
    "https://dashscope.aliyuncs.com/compatible-mode/v1/",
    # Loopback, spelled so that some readers do not see it or see it where it is not.
    "http://127.1/api/v1",
    "http://127.0.1/api/v1",
    "http://0x7f000001/api/v1",
    "http://0x7f.0.0.1/api/v1",
    "http://2130706433/api/v1",
    "http://0177.0.0.1/api/v1",
    "http://127.0.0.01/api/v1",
    "http://127.0.0.1./api/v1",
    "http://①②⑦.0.0.1/api/v1",
    "http://0.0.0.0/api/v1",
    "http://0/api/v1",
    "http://[::]/api/v1",
    "http://[::ffff:127.0.0.1]/api/v1",
    "http://[::ffff:7f00:1]/api/v1",
    "http://[::127.0.0.1]/api/v1",
    "http://[::1%25lo]/api/v1",
    "http://[::1/api/v1",
    "http://::1/api/v1",
    "http://[127.0.0.1]/api/v1",
    "http://localhost./api/v1",
    "http://localhost.localdomain/api/v1",
    "http://localhost.evil.com/api/v1",
    "http://127.0.0.1.evil.com/api/v1",
    "http://127.0.0.1.nip.io/api/v1",
    "http://ip6-localhost/api/v1",
    "http://10.0.0.5/api/v1",
    "https://192.168.0.1/api/v1",
    "https://169.254.169.254/api/v1",
    "https://100.100.100.200/api/v1",
    # Schemes and ports.
    "http://dashscope.aliyuncs.com/api/v1",
    "http://dashscope.aliyuncs.com:443/api/v1",
    "ftp://dashscope.aliyuncs.com/api/v1",
    "file:///etc/passwd",
    "file://dashscope.aliyuncs.com/api/v1",
    "ws://dashscope.aliyuncs.com/api/v1",
    "javascript://dashscope.aliyuncs.com/api/v1",
    "https:dashscope.aliyuncs.com/api/v1",
    "https:/dashscope.aliyuncs.com/api/v1",
    "https:///dashscope.aliyuncs.com/api/v1",
    "//dashscope.aliyuncs.com/api/v1",
    "://dashscope.aliyuncs.com/api/v1",
    "https://",
    "https:///api/v1",
    "/api/v1",
    "https",
    "https://dashscope.aliyuncs.com:0/api/v1",
    "https://dashscope.aliyuncs.com:65536/api/v1",
    "https://dashscope.aliyuncs.com:99999/api/v1",
    "https://dashscope.aliyuncs.com:/api/v1",
    "https://dashscope.aliyuncs.com:-1/api/v1",
    "https://dashscope.aliyuncs.com:+443/api/v1",
    "https://dashscope.aliyuncs.com:443:443/api/v1",
    "https://dashscope.aliyuncs.com:https/api/v1",
    "https://dashscope.aliyuncs.com:４４３/api/v1",
    "https://dashscope.aliyuncs.com:443.evil.com/api/v1",
    "http://127.0.0.1:0/api/v1",
    "http://127.0.0.1:99999/api/v1",
    "http://127.0.0.1:/api/v1",
    "https://" + "a" * 5000 + ".aliyuncs.com/api/v1",
    "https://" + "a." * 3000 + "dashscope.aliyuncs.com.evil/api/v1",
]


def short(value: str) -> str:
    return ascii(value)[1:70]


@pytest.mark.parametrize("url", HOSTILE, ids=short)
def test_a_hostile_base_url_is_refused_wherever_it_comes_from(inside: Inside, tmp_path: Path, url: str) -> None:
    evidence = unpaid(tmp_path, endpoint=url)
    request = json.dumps({"prompt": "a cat", "base_url": url})
    errors = [
        inside.refused("--prompt", "a cat", f"--base-url={url}"),
        inside.refused("--request", request),
        inside.refused("--prompt", "a cat", env={"DASHSCOPE_BASE_URL": url}),
        inside.refused("--prompt", "a cat", env={"DASHSCOPE_HTTP_BASE_URL": url}),
        inside.refused("--replay", str(evidence)),
    ]
    named = ["--base-url", "base_url", "DASHSCOPE_BASE_URL", "DASHSCOPE_HTTP_BASE_URL"]
    for error, name in zip(errors, named, strict=False):
        assert error["code"] in ("invalid_base_url", "host_not_trusted")
        assert name in error["message"]
    for error in errors:
        assert "hunter2" not in json.dumps(error)
        assert len(error["message"]) < 700


@pytest.mark.parametrize("url", HOSTILE, ids=short)
def test_a_check_sends_the_key_to_no_hostile_host_either(inside: Inside, url: str) -> None:
    inside.refused("--check", f"--base-url={url}")
    inside.refused("--check", env={"DASHSCOPE_BASE_URL": url})


@pytest.mark.parametrize("path", ["/compatible-mode/v1", "/compatible-mode/v1/", "/compatible-mode/v1/images"])
@pytest.mark.parametrize("host", ["dashscope.aliyuncs.com", "dashscope-intl.aliyuncs.com"])
def test_compatible_mode_is_told_the_right_form(inside: Inside, host: str, path: str) -> None:
    error = inside.refused("--prompt", "a cat", "--base-url", f"https://{host}{path}")
    assert f"https://{host}{ROOT_PATH}" in error["hint"]


def test_nothing_in_dotenv_steers_where_the_key_goes(inside: Inside, tmp_path: Path) -> None:
    lines = ["DASHSCOPE_BASE_URL=https://example.com/api/v1", "DASHSCOPE_HTTP_BASE_URL=https://example.com/api/v1"]
    lines += ["ZIMAGE_TRUSTED_HOSTS=example.com", "HTTPS_PROXY=http://127.0.0.1:9", "DASHSCOPE_REGION=singapore"]
    (tmp_path / ".env").write_text("\n".join([*lines, f"DASHSCOPE_API_KEY={TEST_KEY}", ""]))
    assert inside.endpoint(env={"DASHSCOPE_API_KEY": ""}) == BEIJING
    inside.refused("--prompt", "a cat", "--base-url", "https://example.com/api/v1")


@pytest.mark.parametrize("field_", ["trust_host", "trusted_hosts", "ZIMAGE_TRUSTED_HOSTS", "provider", "region"])
def test_a_request_cannot_widen_trust(inside: Inside, field_: str) -> None:
    inside.refused("--request", json.dumps({"prompt": "a cat", field_: "example.com"}))
    inside.refused("--request", json.dumps({"prompt": "a cat", field_: ["example.com"], "base_url": "example.com"}))


@pytest.mark.parametrize(
    "changes",
    [
        {"endpoint": f"https://example.com{CALL_PATH}", "trusted": ["example.com"]},
        {"endpoint": f"https://example.com{CALL_PATH}", "trust_host": "example.com"},
        {"endpoint": f"https://example.com{CALL_PATH}", "tool": {"name": "x", "version": "x", "trust": "example.com"}},
        {"request": {"prompt": "a cat", "base_url": "https://example.com"}, "endpoint": "https://example.com"},
        {"endpoint": ""},
        {"endpoint": None},
        {"endpoint": SINGAPORE, "region": "beijing"},
    ],
)
def test_an_evidence_file_cannot_widen_trust(inside: Inside, tmp_path: Path, changes: dict[str, Any]) -> None:
    inside.refused("--replay", str(unpaid(tmp_path, **changes)))


# -- What is allowed, and what it means --------------------------------------------------------------------------------


LOOPBACK = ("127.0.0.1", "127.8.9.1", "localhost", "[::1]:808")  # the first nine signs


@pytest.mark.parametrize(
    ("url", "endpoint"),
    [
        (BEIJING, BEIJING),
        (f"{BEIJING}/", BEIJING),
        ("https://dashscope.aliyuncs.com/api/v1", BEIJING),
        ("https://dashscope.aliyuncs.com/api/v1/", BEIJING),
        ("https://dashscope.aliyuncs.com", BEIJING),
        ("https://dashscope.aliyuncs.com/", BEIJING),
        ("dashscope.aliyuncs.com", BEIJING),
        ("dashscope.aliyuncs.com/", BEIJING),
        ("dashscope.aliyuncs.com/api/v1", BEIJING),
        (f"dashscope.aliyuncs.com{CALL_PATH}", BEIJING),
        ("HTTPS://DASHSCOPE.ALIYUNCS.COM", BEIJING),
        ("DashScope.AliyunCS.com/api/v1", BEIJING),
        ("https://dashscope-intl.aliyuncs.com", SINGAPORE),
        ("dashscope-us.aliyuncs.com", f"https://dashscope-us.aliyuncs.com{CALL_PATH}"),
        ("https://dashscope-finance.aliyuncs.com", f"https://dashscope-finance.aliyuncs.com{CALL_PATH}"),
        ("https://cn-hongkong.dashscope.aliyuncs.com/api/v1", f"https://cn-hongkong.dashscope.aliyuncs.com{CALL_PATH}"),
        ("https://dashscope.aliyuncs.com:443/api/v1", f"https://dashscope.aliyuncs.com:443{CALL_PATH}"),
        ("ws-1a2b.cn-beijing.maas.aliyuncs.com", f"https://ws-1a2b.cn-beijing.maas.aliyuncs.com{CALL_PATH}"),
        (
            "https://ws-1a2b.ap-southeast-1.maas.aliyuncs.com/api/v1",
            f"https://ws-1a2b.ap-southeast-1.maas.aliyuncs.com{CALL_PATH}",
        ),
        (
            "https://llm-x.eu-central-1.maas.aliyuncs.com/api/v1",
            f"https://llm-x.eu-central-1.maas.aliyuncs.com{CALL_PATH}",
        ),
        ("http://127.0.0.1:8080/api/v1", f"http://127.0.0.1:8080{CALL_PATH}"),
        ("http://127.0.0.1:8080", f"http://127.0.0.1:8080{CALL_PATH}"),
        ("127.0.0.1:8080", f"http://127.0.0.1:8080{CALL_PATH}"),
        ("127.8.9.10:8080", f"http://127.8.9.10:8080{CALL_PATH}"),
        ("http://localhost:8080/api/v1/", f"http://localhost:8080{CALL_PATH}"),
        ("LOCALHOST:8080", f"http://localhost:8080{CALL_PATH}"),
        ("http://[::1]:8080", f"http://[::1]:8080{CALL_PATH}"),
        ("https://localhost:8443", f"https://localhost:8443{CALL_PATH}"),
    ],
)
def test_the_owners_hosts_and_loopback_are_accepted_in_every_form(
    inside: Inside, tmp_path: Path, url: str, endpoint: str
) -> None:
    assert inside.endpoint("--base-url", url) == endpoint
    assert inside.endpoint(env={"DASHSCOPE_BASE_URL": url}) == endpoint
    request = json.dumps({"prompt": "a cat", "base_url": url})
    assert inside.run("--request", request, "--dry-run").json["endpoint"] == endpoint
    evidence = unpaid(tmp_path, endpoint=endpoint, region="elsewhere")
    named = {"DASHSCOPE_HTTP_BASE_URL": url} if endpoint.partition("://")[2][:9] in LOOPBACK else {}
    assert inside.run("--replay", str(evidence), "--dry-run", env=named).json["endpoint"] == endpoint
    assert inside.reached == []


TRUSTED = "images.example.com"


@pytest.mark.parametrize(
    ("arguments", "env"),
    [
        (["--trust-host", TRUSTED], {}),
        (["--trust-host", TRUSTED.upper()], {}),
        (["--trust-host", "other.example.com", "--trust-host", TRUSTED], {}),
        ([], {"ZIMAGE_TRUSTED_HOSTS": TRUSTED}),
        ([], {"ZIMAGE_TRUSTED_HOSTS": f"other.example.com,{TRUSTED}"}),
        ([], {"ZIMAGE_TRUSTED_HOSTS": f" other.example.com  {TRUSTED} "}),
        ([], {"ZIMAGE_TRUSTED_HOSTS": f"other.example.com, {TRUSTED},"}),
    ],
)
def test_a_host_that_the_user_names_is_trusted(inside: Inside, arguments: list[str], env: dict[str, str]) -> None:
    expected = f"https://{TRUSTED}{CALL_PATH}"
    assert inside.endpoint("--base-url", f"https://{TRUSTED}", *arguments, env=env) == expected
    assert inside.endpoint("--base-url", f"https://{TRUSTED.upper()}:8443", *arguments, env=env) == expected.replace(
        ".com/", ".com:8443/"
    )


@pytest.mark.parametrize(
    "url",
    [
        f"http://{TRUSTED}",
        f"https://sub.{TRUSTED}",
        "https://example.com",
        "https://com",
        f"https://{TRUSTED}.evil.com",
        f"https://evil-{TRUSTED}",
        f"https://{TRUSTED}.",
        f"https://user@{TRUSTED}",
        f"https://{TRUSTED}@evil.com",
        "https://images-example.com",
        "https://imagesXexample.com",
    ],
)
def test_trust_holds_for_the_exact_name_over_https_only(inside: Inside, url: str) -> None:
    inside.refused("--prompt", "a cat", "--base-url", url, "--trust-host", TRUSTED)
    inside.refused("--prompt", "a cat", "--base-url", url, env={"ZIMAGE_TRUSTED_HOSTS": TRUSTED})


@pytest.mark.parametrize(
    "name",
    [
        *("", "*", "*.example.com", ".example.com", "example.com.", "https://example.com", "example.com/api"),
        *("example.com:443", "user@example.com", "example..com", "ex ample.com", "example.com\n"),
        *("пример.com", "example。com", "%2e", "-.com"),
    ],
)
def test_trust_takes_no_wildcard_suffix_or_url(inside: Inside, name: str) -> None:
    error = inside.refused("--prompt", "a cat", "--base-url", "https://example.com", "--trust-host", name)
    assert "--trust-host" in error["message"]


@pytest.mark.parametrize("value", ["*", "*.example.com", ".example.com", "https://example.com"])
def test_a_trust_variable_takes_no_wildcard_suffix_or_url(inside: Inside, value: str) -> None:
    inside.refused("--prompt", "a cat", "--base-url", "https://example.com", env={"ZIMAGE_TRUSTED_HOSTS": value})


# -- Precedence, regions, prices ---------------------------------------------------------------------------------------

HOSTS = {"flag": "localhost:1", "request": "localhost:2", "first": "localhost:3", "second": "localhost:4"}
FALLBACKS = {"region": "dashscope-intl.aliyuncs.com", "nothing": "dashscope.aliyuncs.com"}


@pytest.mark.parametrize(
    ("given", "winner"),
    [
        ({"flag", "request", "region", "first", "second"}, "flag"),
        ({"flag", "first", "second"}, "flag"),
        ({"flag"}, "flag"),
        ({"request", "region", "first", "second"}, "request"),
        ({"request", "first"}, "request"),
        ({"region", "first", "second"}, "region"),
        ({"region"}, "region"),
        ({"first", "second"}, "first"),
        ({"second"}, "second"),
        (set(), "nothing"),
    ],
)
def test_the_endpoint_is_chosen_by_precedence(inside: Inside, given: set[str], winner: str) -> None:
    request = {"prompt": "a cat"} | ({"base_url": HOSTS["request"]} if "request" in given else {})
    arguments = ["--base-url", HOSTS["flag"]] if "flag" in given else []
    arguments += ["--region", "singapore"] if "region" in given else []
    names = {"first": "DASHSCOPE_BASE_URL", "second": "DASHSCOPE_HTTP_BASE_URL"}
    env = {variable: HOSTS[name] for name, variable in names.items() if name in given}
    plan = inside.run("--request", json.dumps(request), *arguments, "--dry-run", env=env).json
    assert plan["endpoint"].split("/")[2] == (HOSTS | FALLBACKS)[winner]


def test_an_empty_variable_counts_as_none(inside: Inside) -> None:
    assert inside.endpoint(env={"DASHSCOPE_BASE_URL": "", "DASHSCOPE_HTTP_BASE_URL": ""}) == BEIJING


@pytest.mark.parametrize(
    ("region", "endpoint", "name"),
    [
        ("beijing", BEIJING, "beijing"),
        ("cn-beijing", BEIJING, "beijing"),
        ("singapore", SINGAPORE, "singapore"),
        ("ap-southeast-1", SINGAPORE, "singapore"),
    ],
)
def test_regions_have_two_names(inside: Inside, region: str, endpoint: str, name: str) -> None:
    plan = inside.plan("--region", region)
    assert (plan["endpoint"], plan["region"]) == (endpoint, name)


@pytest.mark.parametrize(
    ("host", "region"),
    [
        ("dashscope.aliyuncs.com", "beijing"),
        ("dashscope-intl.aliyuncs.com", "singapore"),
        ("ws-1.cn-beijing.maas.aliyuncs.com", "beijing"),
        ("ws-1.ap-southeast-1.maas.aliyuncs.com", "singapore"),
    ],
)
def test_a_known_host_tells_its_region(inside: Inside, host: str, region: str) -> None:
    assert inside.plan("--base-url", host)["region"] == region
    assert inside.plan("--base-url", host, "--region", region)["region"] == region
    other = {"beijing": "singapore", "singapore": "beijing"}[region]
    error = inside.refused("--prompt", "a cat", "--base-url", host, "--region", other)
    assert other in error["message"]
    assert region in error["message"]


def test_a_region_contradicts_the_host_of_a_request_too(inside: Inside) -> None:
    request = json.dumps({"prompt": "a cat", "base_url": "dashscope.aliyuncs.com"})
    inside.refused("--request", request, "--region", "singapore")


def test_a_region_names_the_price_of_a_host_that_does_not_tell(inside: Inside) -> None:
    plan = inside.plan("--base-url", "http://localhost:8000", "--region", "singapore")
    assert (plan["region"], plan["estimated_cost"]) == ("singapore", 0.015)


@pytest.mark.parametrize(
    ("arguments", "price"),
    [
        ([], 0.01434),
        (["--prompt-extend"], 0.02868),
        (["--region", "beijing"], 0.01434),
        (["--region", "singapore"], 0.015),
        (["--region", "singapore", "--prompt-extend"], 0.03),
        (["--base-url", "ws-1.ap-southeast-1.maas.aliyuncs.com"], 0.015),
        (["--base-url", "ws-1.cn-beijing.maas.aliyuncs.com"], 0.01434),
    ],
)
def test_the_price_is_the_regions(inside: Inside, arguments: list[str], price: float) -> None:
    assert inside.plan(*arguments)["estimated_cost"] == price


def test_where_no_price_is_known_the_estimate_is_not_below_the_known_ones(inside: Inside) -> None:
    for extend, least in (([], 0.015), (["--prompt-extend"], 0.03)):
        plan = inside.plan("--base-url", "cn-hongkong.dashscope.aliyuncs.com", *extend)
        assert plan["estimated_cost"] >= least


def test_a_flag_saves_a_request_whose_base_url_is_hostile(inside: Inside) -> None:
    """Flags win: what they replace is not used, and not kept in the normalized request either."""
    request = json.dumps({"prompt": "a cat", "base_url": "https://example.com"})
    plan = inside.run("--request", request, "--base-url", "dashscope-intl.aliyuncs.com", "--dry-run").json
    assert plan["endpoint"] == SINGAPORE
    assert plan["request"].get("base_url") != "https://example.com"


def test_a_replay_goes_where_the_first_request_went(inside: Inside, tmp_path: Path) -> None:
    evidence = str(unpaid(tmp_path, endpoint=SINGAPORE, region="singapore"))
    env = {"DASHSCOPE_BASE_URL": "http://localhost:1", "DASHSCOPE_HTTP_BASE_URL": "http://localhost:2"}
    assert inside.run("--replay", evidence, "--dry-run", env=env).json["endpoint"] == SINGAPORE
    assert inside.run("--replay", evidence, "--region", "beijing", "--dry-run").json["endpoint"] == BEIJING
    url = "http://localhost:3/api/v1"
    plan = inside.run("--replay", evidence, "--base-url", url, "--dry-run").json
    assert plan["endpoint"] == f"http://localhost:3{CALL_PATH}"


def test_a_trusted_host_of_an_evidence_file_must_be_trusted_again(inside: Inside, tmp_path: Path) -> None:
    endpoint = f"https://{TRUSTED}{CALL_PATH}"
    evidence = str(unpaid(tmp_path, endpoint=endpoint))
    inside.refused("--replay", evidence)
    assert inside.run("--replay", evidence, "--trust-host", TRUSTED, "--dry-run").json["endpoint"] == endpoint


# -- As a process, with real listeners ---------------------------------------------------------------------------------


class Listener:
    """A port that notes what arrives at it. It refuses every CONNECT and answers nothing else."""

    def __init__(self) -> None:
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.port = self.socket.getsockname()[1]
        self.seen: list[bytes] = []
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self.socket.accept()
                with connection, contextlib.suppress(OSError):
                    connection.settimeout(5)
                    data = b""
                    while b"\r\n\r\n" not in data and (chunk := connection.recv(65536)):
                        data += chunk
                    self.seen.append(data)
                    if data.startswith(b"CONNECT"):
                        connection.sendall(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n")

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        self.socket.close()
        self._thread.join(5)


@pytest.fixture
def listener() -> Iterator[Listener]:
    found = Listener()
    yield found
    found.close()


@pytest.mark.smoke
@pytest.mark.parametrize(
    "form",
    [
        "http://127.1:{}/api/v1",
        "http://0x7f000001:{}/api/v1",
        "http://2130706433:{}/api/v1",
        "http://0177.0.0.1:{}/api/v1",
        "http://0.0.0.0:{}/api/v1",
        "http://[::ffff:127.0.0.1]:{}/api/v1",
        "http://user:secret@127.0.0.1:{}/api/v1",
        "http://127.0.0.1:{}@dashscope.aliyuncs.com/api/v1",
        "http://localhost.:{}/api/v1",
        "http://127.0.0.1:{}/api/v1?x",
        "http://127.0.0.1:{}/api/v1#x",
        "http://127.0.0.1:{}\t/api/v1",
        "ftp://127.0.0.1:{}/api/v1",
    ],
)
def test_contacts_no_listener_behind_a_refused_base_url(shell: Shell, listener: Listener, form: str) -> None:
    shell.env["DASHSCOPE_API_KEY"] = TEST_KEY
    result = shell.run("--prompt", "a cat", "--base-url", form.format(listener.port), "--print-response")
    assert result.code == 2
    assert result.error["billed"] == "no"
    assert TEST_KEY not in result.stdout + result.stderr
    assert listener.seen == []
    assert shell.files() == []


PROXY_VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_proxy_is_used_for_loopback(shell: Shell, mock: MockServer, listener: Listener, host: str) -> None:
    shell.use(mock)
    shell.env["DASHSCOPE_BASE_URL"] = mock.base_url.replace("127.0.0.1", host)
    shell.env |= dict.fromkeys(PROXY_VARIABLES, f"http://user:secret@127.0.0.1:{listener.port}")
    assert shell.run("--prompt", "a cat", "--size", "512x512").code == 0
    assert shell.run("--check").code == 0
    assert listener.seen == []


@pytest.mark.parametrize("name", ["HTTPS_PROXY", "https_proxy", "ALL_PROXY"])
def test_a_proxy_sees_a_tunnel_and_never_the_key(shell: Shell, listener: Listener, name: str) -> None:
    shell.env |= {
        "DASHSCOPE_API_KEY": TEST_KEY,
        name: f"http://127.0.0.1:{listener.port}",
        "DASHSCOPE_WORKSPACE": "ws-1",
    }
    for arguments in (["--prompt", "a cat", "--print-response"], ["--check"]):
        result = shell.run(*arguments, "--timeout", "10")
        assert result.code == 6, result.stdout
        assert result.error["billed"] == "no"
        assert TEST_KEY not in result.stdout + result.stderr
    assert listener.seen
    for data in listener.seen:
        assert data.startswith(b"CONNECT ws-1.cn-beijing.maas.aliyuncs.com:443 HTTP/1.")
        assert TEST_KEY.encode() not in data
        assert base64.b64encode(TEST_KEY.encode()) not in data
        assert b"\r\nauthorization:" not in data.lower()
        assert b"workspace" not in data.lower()
    assert shell.evidence()["status"] == "failed"


def test_the_proxys_password_is_in_no_output(shell: Shell, listener: Listener) -> None:
    shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, "HTTPS_PROXY": f"http://user:hunter2@127.0.0.1:{listener.port}"}
    result = shell.run("--prompt", "a cat", "--print-response", "--timeout", "10")
    assert result.code == 6
    texts = [result.stdout, result.stderr, *(path.read_text() for path in shell.evidence_files())]
    assert "hunter2" not in "".join(texts)
    assert listener.seen


class Recording(MockServer):
    """The mock service, keeping every request."""

    def __init__(self, **options: Any) -> None:
        super().__init__(rpm=0, **options)
        self.seen: list[mock_server.Request] = []

    def __enter__(self) -> Recording:
        self.start()
        return self

    def answer(self, request: mock_server.Request) -> mock_server.Reply:
        self.seen.append(request)
        return super().answer(request)


def test_netrc_is_never_used(shell: Shell) -> None:
    with Recording() as mock:
        shell.use(mock)
        for name in (".netrc", "_netrc"):
            for host in ("127.0.0.1", "localhost", "default"):
                with (shell.home / name).open("a") as file:
                    file.write(f"machine {host} login evil password hunter2\n")
            (shell.home / name).chmod(0o600)
        shell.env["NETRC"] = str(shell.home / ".netrc")
        assert shell.run("--prompt", "a cat", "--size", "512x512").code == 0
        assert shell.run("--check").code == 0
    given = [request.headers.get("authorization") for request in mock.seen]
    assert set(given) == {f"Bearer {mock.api_key}", None}


@pytest.mark.smoke
def test_the_key_goes_with_the_calls_and_not_with_the_download(shell: Shell) -> None:
    with Recording() as mock:
        shell.use(mock)
        shell.env["DASHSCOPE_WORKSPACE"] = "ws-1a2b"
        assert shell.run("--prompt", "a cat", "--size", "512x512").code == 0
    call, download = mock.seen
    assert (call.method, call.path) == ("POST", CALL_PATH)
    assert call.headers["authorization"] == f"Bearer {mock.api_key}"
    assert download.path.startswith("/files/")
    assert mock.api_key not in repr(download)
    assert not {"authorization", "x-dashscope-workspace", "cookie", "referer"} & set(download.headers)


@pytest.mark.parametrize(("workspace", "expected"), [("ws-1a2b", "ws-1a2b"), ("", None), (None, None)])
def test_the_workspace_travels_as_a_header(shell: Shell, workspace: str | None, expected: str | None) -> None:
    with Recording() as mock:
        shell.use(mock)
        shell.env |= {} if workspace is None else {"DASHSCOPE_WORKSPACE": workspace}
        assert shell.run("--prompt", "a cat", "--size", "512x512").code == 0
        assert shell.run("--check").code == 0
    sent = [request for request in mock.seen if "authorization" in request.headers]
    assert [request.method for request in sent] == ["POST", "GET", "GET"]
    assert [request.headers.get("x-dashscope-workspace") for request in sent] == [expected] * 3


@pytest.mark.parametrize("workspace", ["ws 1", "ws\r\nX-Evil: 1", "ws-ü", "ws\t1", "x" * 5000])
def test_a_workspace_that_is_no_header_value_is_refused(inside: Inside, workspace: str) -> None:
    error = inside.refused("--prompt", "a cat", env={"DASHSCOPE_WORKSPACE": workspace})
    assert "DASHSCOPE_WORKSPACE" in error["message"]


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl to show that the listener is a listener")
def test_the_listener_of_these_tests_hears_a_proxied_request(listener: Listener) -> None:
    proxy = f"http://127.0.0.1:{listener.port}"
    subprocess.run(["curl", "-s", "-m", "3", "-x", proxy, "http://example.com/"], check=False, capture_output=True)
    assert listener.seen


# -- What this tool reads in a URL is what the library will connect to -------------------------------------------------

PIECES = [
    "dashscope.aliyuncs.com",
    "evil.example",
    "127.0.0.1",
    "localhost",
    "[::1]",
    "[::ffff:127.0.0.1]",
    "127.1",
    "0",
]
PIECES += [
    "0x7f000001",
    "2130706433",
    "0177.0.0.1",
    "0.0.0.0",
    "10.0.0.1",
    "[64:ff9b::7f00:1]",
    "169.254.169.254",
    "[::]",
]
PIECES += [
    "DashScope.Aliyuncs.COM",
    "dashscope.aliyuncs.com.",
    "xn--dashscope-x.com",
    "ⓓashscope.aliyuncs.com",
    "user:pw",
]
PIECES += ["127。0。0。1", "%31", "..", "-", "_", "ß", "\u200b", "\u202e"]
SIGNS = [
    "/",
    "//",
    "\\",
    "@",
    ":",
    "?",
    "#",
    ".",
    "[",
    "]",
    "%",
    "%2f",
    "%40",
    " ",
    "\t",
    "\n",
    "\x00",
    "443",
    "80",
    "99999",
]
SIGNS += ["/api/v1", "http://", "https://", "HTTPS://", "ftp:", ";", "&", "|"]
FORMS = [
    "{}{}",
    "https://{}:{}",
    "https://{}/{}",
    "http://{}:{}",
    "https://{}@{}",
    "https://{}{}/api/v1",
    "{}:{}/api/v1",
]
URLS = st.one_of(
    st.lists(st.sampled_from(PIECES + SIGNS) | st.text(max_size=3), max_size=7).map("".join),
    st.builds(str.format, st.sampled_from(FORMS), st.sampled_from(PIECES), st.sampled_from(PIECES + SIGNS)),
    st.tuples(
        st.sampled_from(["https://", "http://", "HTTPS://", ""]),
        st.sampled_from(PIECES),
        st.sampled_from(
            ["", ":80", ":443", ":8443", ":0", ":99999", "@evil.example", "\\@evil.example", "#", "?", ".nip.io"]
        ),
        st.sampled_from(["", "/", "/api/v1", "/api/v1/", "//evil.example", "/..", "?x", "/v1/images/generations"]),
    ).map("".join),
)
LIGHT = settings(max_examples=150, deadline=None, database=None, derandomize=True)


def connected_to(url: str) -> tuple[str, str, int]:
    """Scheme, host and port that requests would connect to, as urllib3 reads the URL that requests has prepared."""
    prepared = requests.Request("GET", url).prepare()
    read = parse_url(str(prepared.url))
    assert read.host is not None and read.scheme is not None and read.auth is None
    return read.scheme, read.host.strip("[]"), read.port or {"http": 80, "https": 443}[read.scheme]


@LIGHT
@given(URLS)
def test_an_accepted_base_url_leads_where_the_library_will_connect(text: str) -> None:
    provider = provider_named("dashscope")
    try:
        endpoint = parse_base_url(text, "x", provider)
    except Failure as failure:
        assert failure.code == "invalid_base_url"
        return
    scheme, host, port = connected_to(endpoint.url)
    assert endpoint.root.startswith(f"{scheme}://")
    assert (endpoint.host, origin_of(endpoint.url)) == (host, f"{scheme}://{host}:{port}")
    with contextlib.suppress(Failure):
        check_trust(endpoint, "x", provider, frozenset())
        assert is_here(host) or (scheme == "https" and is_the_vendors(host))


@LIGHT
@given(
    URLS, st.booleans(), st.sampled_from(["", "https://evil.example:443", "http://127.0.0.1:80", "http://10.0.0.1:80"])
)
def test_an_accepted_link_leads_where_the_library_will_connect(text: str, loopback: bool, origin: str) -> None:
    provider = provider_named("openai")
    try:
        link, reach = checked_link(text, loopback=loopback, provider=provider, origin=origin)
    except Failure as failure:
        assert failure.code == "hop_refused"
        return
    scheme, host, port = connected_to(link)
    is_at_home = f"{scheme}://{host}:{port}" == origin
    if reach == "loopback":
        assert is_here(host) and (loopback or is_at_home)
    elif reach == "service":
        assert is_at_home
    else:
        assert scheme == "https" and not is_here(host)
        with contextlib.suppress(ValueError):
            assert is_public(ipaddress.ip_address(host))


@LIGHT
@given(URLS, URLS)
def test_a_setting_names_no_other_place(setting: str, url: str) -> None:
    own = Own(None, frozenset(), {"OPENAI_BASE_URL": setting})
    if own.names(url, provider_named("openai")):
        named = parse_base_url(setting, "x", provider_named("openai"))
        assert connected_to(url) == connected_to(named.url)


def is_here(host: str) -> bool:
    """By its name alone: where a name of the internet leads is looked at when it is connected to."""
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d+){3}", host) is not None


def is_the_vendors(host: str) -> bool:
    return host.endswith(".aliyuncs.com") and ("dashscope" in host or ".maas." in host)


def is_public(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """By the networks of RFC 6890, with whatever IPv4 address is in the last 32 bits of a wrapping one."""
    if isinstance(address, ipaddress.IPv6Address):
        if any(address in ipaddress.ip_network(net) for net in ("::/96", "::ffff:0:0/96", "64:ff9b::/96")):
            return is_public(ipaddress.IPv4Address(int(address) & 0xFFFFFFFF))
        return address in ipaddress.ip_network("2000::/3")
    private = ("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12")
    return not any(address in ipaddress.ip_network(net) for net in (*private, "192.168.0.0/16", "224.0.0.0/3"))


@LIGHT
@given(st.ip_addresses() | st.integers(0, 2**32 - 1).map(lambda low: ipaddress.IPv6Address(0x64FF9B << 96 | low)))
def test_no_address_that_is_not_public_is_taken_for_one(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    assert not is_public_address(address) or is_public(address)


@pytest.mark.parametrize("inner", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "192.168.1.1", "0.0.0.0", "100.64.0.1"])
def test_a_private_address_in_another_one_is_private(inner: str) -> None:
    low = int(ipaddress.IPv4Address(inner))
    for base in (0xFFFF << 32, 0x64FF9B << 96, 0x2002 << 112, 0):
        address = ipaddress.IPv6Address(base | (low << 80 if base >> 112 == 0x2002 else low))
        assert not is_public_address(address), address
    for text in ("fec0::1", "fe80::1", "fd00::1", "ff02::1", "::", "::1", "2001:db8::1"):
        assert not is_public_address(ipaddress.ip_address(text)), text
    assert is_public_address(ipaddress.ip_address("2606:4700::1111"))
