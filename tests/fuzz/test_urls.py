"""URLs: what we take for the host is what the library that connects takes for it, and the key goes to no other."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import socket
from typing import Any
from unittest.mock import patch
from urllib.parse import urlsplit

import requests
from hypothesis import strategies as st
from urllib3.util import parse_url

from fuzz.conftest import cases
from fuzz.promises import assert_failure, assert_one_line
from fuzz.strategies import HOSTILE, texts
from zimage import download
from zimage.calls import HttpAnswer, HttpCall
from zimage.endpoint import Endpoint
from zimage.errors import Failure
from zimage.registry import provider_named, provider_names
from zimage.trust import Home, check_trust, choose_endpoint, may_have_optional_key, parse_base_url, trusted_hosts
from zimage.waiting import Stop
from zimage.wire import REACH, Wire, request_target

PROVIDERS = [provider for provider in map(provider_named, provider_names()) if not provider.in_process]
TRUSTED = "proxy.example.com"
# Who owns which key, said once more in other words than the program's.
OWNERS = {
    "dashscope": r"dashscope(-[a-z0-9]+)?\.aliyuncs\.com|([a-z0-9_-]+\.)+(dashscope|maas)\.aliyuncs\.com",
    "zimageturbo": r"zimageturbo\.ai",
    "modelscope": r"api-inference\.modelscope\.(cn|ai)",
    **dict.fromkeys(("openai", "sdapi", "comfyui"), "(?!)"),  # servers of one's own
}

schemes = st.sampled_from(
    ["https://", "https://", "http://", "HTTPS://", "//", "", "ftp://", "file://", "https:", "https:/", "https:\\\\"]
)
hosts = st.one_of(
    st.sampled_from(
        [
            "dashscope.aliyuncs.com",
            "DASHSCOPE.ALIYUNCS.COM",
            "dashscope-intl.aliyuncs.com",
            "ws.eu-1.maas.aliyuncs.com",
            "zimageturbo.ai",
            TRUSTED,
            "evil.example",
            "aliyuncs.com",
            "dashscope.aliyuncs.com.evil.example",
            "dashscope.aliyuncs.com.",
            "dashscope-a.b.aliyuncs.com",
            "evil.dashscope-intl.aliyuncs.com",
            "xdashscope.aliyuncs.com",
            "oss-cn-beijing.aliyuncs.com",
            "dashscope。aliyuncs。com",
            "dashſcope.aliyuncs.com",
            "ⓓashscope.aliyuncs.com",
            "localhost",
            "LOCALHOST",
            "localhost.",
            "localhost.evil.example",
            "127.0.0.1",
            "127.1",
            "2130706433",
            "0x7f.0.0.1",
            "0177.0.0.1",
            "127.0.0.1.evil.example",
            "0.0.0.0",
            "10.0.0.1",
            "169.254.169.254",
            "100.64.0.1",
            "8.8.8.8",
            "[::1]",
            "[::ffff:127.0.0.1]",
            "[::ffff:7f00:1]",
            "[64:ff9b::7f00:1]",
            "[2002:7f00:1::]",
            "[fe80::1%25lo]",
            "[::]",
            "[2606:4700::1111]",
            "::1",
            "",
        ]
    ),
    st.from_regex(r"[a-z0-9.-]{1,20}", fullmatch=True),
)
odd = st.sampled_from(
    [
        "",
        "",
        "",
        "@",
        ":",
        ":80",
        ":443",
        ":8000",
        ":0",
        ":99999",
        ":+80",
        ":٨٠",
        "\\",
        "%2e",
        "%40",
        "#",
        "?",
        ".",
        " ",
        "\t",
        "\n",
        "\0",
        ";",
        "%00",
        "[",
        "]",
        "/@",
    ]
)
users = st.sampled_from(
    ["", "", "", "user@", "user:pw@", "dashscope.aliyuncs.com@", "dashscope.aliyuncs.com:443@", "@", "%40"]
)
roots = st.sampled_from(
    [
        "",
        "",
        "/",
        "/api/v1",
        "/v1",
        "/api",
        "/v1/images/generations",
        "/api/v1/services/aigc/multimodal-generation/generation",
    ]
)
tails = st.one_of(
    roots,
    texts,
    st.sampled_from(["?x=1", "#x", "/../api/v1", "/./v1", "//v1", "/%2e%2e/v1", "/api/v1?a=@b", "\\@evil.example/v1"]),
)
urls = st.one_of(
    st.builds("{}{}{}{}{}{}".format, schemes, users, hosts, odd, roots, tails),
    st.builds("{}{}{}".format, schemes, hosts, roots),
    texts,
)


def connects_to(url: str) -> tuple[str, str, int | None]:
    """Scheme, host and port that requests would connect to: its own reading, by urllib3."""
    prepared = requests.Request("GET", url).prepare()
    assert prepared.url is not None
    parts = parse_url(prepared.url)
    return parts.scheme or "", (parts.host or "").strip("[]"), parts.port


def is_loopback(host: str) -> bool:
    """By the system's own reading of an address, which takes more forms than ours."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def assert_read_as_it_is_connected(endpoint: Endpoint) -> None:
    for url in (endpoint.root, endpoint.url):
        scheme, host, port = connects_to(url)
        parts = urlsplit(url)
        assert (scheme, host, port) == (parts.scheme, endpoint.host, parts.port)
        assert endpoint.host == parts.hostname
        assert parts.username is None and parts.query == parts.fragment == ""
    assert endpoint.is_loopback == is_loopback(endpoint.host)


def goes_out(url: str) -> str:
    """What a connection would be opened to: the host in the hands of the code that opens the socket."""
    seen: list[str] = []

    def opened(self: Wire, host: str, port: int) -> socket.socket:
        seen.append(host)
        raise OSError("far enough")

    from zimage.contract import MIB
    from zimage.errors import NotSent
    from zimage.transport import AnswerLost, exchange

    with patch.object(Wire, "open", opened), contextlib.suppress(NotSent, AnswerLost):
        exchange(HttpCall("GET", url, {}), Stop(5), limit=MIB, reach="service")
    return "".join(seen)


@cases(200, 6_000, text=urls, provider=st.sampled_from(PROVIDERS))
def test_a_base_url_is_read_as_the_library_reads_it(text: str, provider: Any) -> None:
    try:
        endpoint = parse_base_url(text, "--base-url", provider)
    except Failure as failure:
        assert failure.code == "invalid_base_url"
        assert_failure(failure)
        return
    assert_read_as_it_is_connected(endpoint)


@cases(200, 6_000, text=urls, provider=st.sampled_from(PROVIDERS), trusted=st.sampled_from([(), (TRUSTED,)]))
def test_the_key_goes_to_its_owner_to_loopback_and_to_who_is_trusted(text: str, provider: Any, trusted: Any) -> None:
    try:
        endpoint = choose_endpoint(
            provider, flag=text, request_url=None, region=None, env={}, trusted=frozenset(trusted)
        )
    except Failure as failure:
        assert_failure(failure)
        return
    scheme, host, _ = connects_to(endpoint.url)
    owned = re.fullmatch(OWNERS[provider.name], host) is not None
    may = is_loopback(host) or (scheme == "https" and (owned or host in trusted))
    if provider.key_places.optional:
        assert may_have_optional_key(endpoint, provider, frozenset(trusted), {}) == may
    else:
        assert may, endpoint


@cases(60, 500, text=urls)
def test_the_socket_is_opened_to_the_host_that_was_checked(text: str) -> None:
    provider = provider_named("dashscope")
    try:
        endpoint = parse_base_url(text, "--base-url", provider)
        check_trust(endpoint, "--base-url", provider, frozenset([TRUSTED]))
    except Failure:
        return
    assert goes_out(endpoint.url).strip("[]") == endpoint.host


@cases(75, 2_000, text=st.lists(hosts | texts, max_size=3).map(",".join), flags=st.lists(hosts | texts, max_size=2))
def test_only_plain_names_are_trusted(text: str, flags: list[str]) -> None:
    found, problems = trusted_hosts(flags, {"ZIMAGE_TRUSTED_HOSTS": text})
    for host in found:
        assert connects_to(f"https://{host}/")[1] == host
        assert re.fullmatch("[a-z0-9._-]+", host)
    for problem in problems:
        assert_one_line(problem.text)


links = st.one_of(
    urls,
    st.builds(
        "{}{}{}{}{}".format,
        schemes,
        users,
        hosts,
        odd,
        st.sampled_from(["/a.png", "/a.png?Expires=1&x=%2b", "/a b", "/雪.png", "?x", "#f"]),
    ),
)


def assert_may_be_fetched(link: str, *, loopback: bool, origin: str) -> str:
    """What a picture may be fetched from, in other words than the program's; returns the host."""
    scheme, host, _ = connects_to(link)
    assert host == urlsplit(link).hostname
    if is_loopback(host):
        assert loopback
    elif not (origin and link.lower().startswith(origin)):
        assert scheme == "https"
        with contextlib.suppress(ValueError):
            address = ipaddress.ip_address(host)
            assert address.is_global and not address.is_multicast
            assert REACH["public"](address)
    return host


@cases(200, 5_000, link=links, loopback=st.booleans(), provider=st.sampled_from(PROVIDERS))
def test_a_link_is_fetched_from_where_a_picture_may_lie(link: str, loopback: bool, provider: Any) -> None:
    try:
        checked, reach = download.checked_link(link, loopback=loopback, provider=provider)
    except Failure as failure:
        assert failure.code == "hop_refused"
        assert_failure(failure)
        return
    host = assert_may_be_fetched(checked, loopback=loopback, origin="")
    assert host == connects_to(link)[1]
    assert (reach == "loopback") == is_loopback(host)
    target = request_target(checked)
    assert target.startswith("/") and target.isascii() and not re.search(r"[\s#]", target)


locations = st.one_of(links, st.sampled_from(["/b.png", "//evil.example/b", "b.png?x", "", *HOSTILE]))


@cases(100, 2_000, link=links, hops=st.lists(locations, max_size=7), loopback=st.booleans())
def test_no_redirect_leads_the_download_elsewhere(link: str, hops: list[str], loopback: bool) -> None:
    """Each hop is checked as the first link is, and carries nothing but what was asked."""
    asked: list[str] = []
    answers = [HttpAnswer(302, {"location": hop.encode("utf-8", "replace").decode("latin-1")}, b"") for hop in hops]

    def exchange(call: HttpCall, stop: Stop, *, limit: int, reach: str) -> HttpAnswer:
        asked.append(call.url)
        assert call.headers.keys() == {"Accept"} and call.method == "GET" and not call.body
        assert reach == "loopback" or not is_loopback(connects_to(call.url)[1])
        return answers[len(asked) - 1] if len(asked) <= len(answers) else HttpAnswer(200, {}, b"picture")

    with patch.object(download, "exchange", exchange):
        try:
            answer = download.fetch(link, Home(loopback), stop=Stop(5), provider=provider_named("dashscope"))
            assert answer.body == b"picture" or answer.status == 302
        except Failure as failure:
            assert failure.code == "hop_refused"
            assert_failure(failure)
    for url in asked:
        here = is_loopback(connects_to(url)[1])
        assert_may_be_fetched(url, loopback=loopback, origin="")
        loopback = loopback and here  # once on the open internet, there is no way back
    assert len(asked) <= 6
