"""The network between this machine and the service: proxies, certificates, names, pages of gateways.

Two small middlemen play the proxies (middlemen.py), trustme the authorities; `test_real_network.py` has real ones.
"""

from __future__ import annotations

import contextlib
import datetime as dt
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import trustme

from conftest import SCRIPTS, TEST_KEY, Result, Shell
from fault_server import GENERATE, PICTURE, Answer, FaultServer, error, good, html, json_answer, redirect, typed
from middlemen import HttpProxy, Middleman, SocksProxy
from zimage import tls
from zimage.calls import HttpCall
from zimage.contract import MIB
from zimage.errors import NotSent
from zimage.proxy import Proxy, socks_fault
from zimage.transport import exchange
from zimage.waiting import Stop
from zimage.wire import Wire

HOST = "dashscope.aliyuncs.com"
LAN = "http://gpu.lan:8000/v1"
IMAGES = "/v1/images/generations"
VARIABLES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", *tls.BUNDLES, tls.FOLDER)
SECRET = "hunter2"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def bundle(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("authority") / "ca.pem"
    authority.cert_pem.write_to_path(path)
    return path


def server_context(authority: trustme.CA, *names: str, **options: Any) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names, **options).configure_cert(context)
    return context


@pytest.fixture
def vendor(shell: Shell, authority: trustme.CA, bundle: Path) -> Iterator[FaultServer]:
    """A server that is the vendor, for whoever knows its name and trusts its authority: a proxy leads to it."""
    context = server_context(authority, HOST, "*.aliyuncs.com")
    with FaultServer(context, f"https://{HOST}") as server:
        server.play(GENERATE, good())
        shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, "SSL_CERT_FILE": str(bundle)}
        yield server


def make(shell: Shell, *arguments: str) -> Result:
    """In the process of the tests, but where `closed_names` needs one of its own."""
    run = shell.run if "PYTHONPATH" in shell.env else shell.call
    shell.is_first_row = False
    return run("--prompt", "a fox", "--print-response", "--timeout", "20", "--max-retries", "0", *arguments)


def unreachable(shell: Shell, result: Result, *words: str, advice: tuple[str, ...] = ()) -> dict[str, Any]:
    """Exit 6, nothing billed, and what stands in message and advice."""
    assert (result.code, result.error["code"], result.error["billed"]) == (6, "unreachable", "no"), result.stdout
    for word in words:
        assert word in result.error["message"]
    for word in advice:
        assert word in result.error["hint"]
    assert SECRET not in result.stdout + result.stderr + "".join(p.read_text() for p in shell.evidence_files())
    return result.error


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """An environment that says nothing of networks."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)
    return monkeypatch


def ask(url: str, reach: str = "service", timeout: float = 10) -> Any:
    return exchange(HttpCall("GET", url, {}), Stop(timeout), limit=MIB, reach=reach)


# SOCKS ----------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("variable", "user"), [("ALL_PROXY", ""), ("HTTPS_PROXY", "me"), ("all_proxy", "me"), ("https_proxy", "")]
)
def test_a_picture_is_made_through_a_socks_proxy(shell: Shell, vendor: FaultServer, variable: str, user: str) -> None:
    with SocksProxy(vendor.port, user, SECRET) as proxy:
        shell.env[variable] = proxy.url
        assert make(shell).code == 0
    assert proxy.asked == [f"{HOST}:443"] * 2  # names are the proxy's business: nothing was resolved here
    assert len(vendor.posts) == len(vendor.downloads) == 1


@pytest.mark.parametrize("scheme", ["socks5", "socks4", "socks5h", "socks4a"])
def test_who_resolves_a_name_is_said_by_the_scheme(bare: pytest.MonkeyPatch, scheme: str) -> None:
    here = scheme in ("socks5", "socks4")

    def resolved(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        if host != "127.0.0.1":
            assert here and host == "gpu.lan"
            host = "10.9.8.7"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (host, port))]

    with FaultServer() as server, SocksProxy(server.port) as proxy, patch.object(socket, "getaddrinfo", resolved):
        bare.setenv("ALL_PROXY", f"{scheme}://{proxy.place}")
        server.play("/v1/models", json_answer({"data": []}))
        assert ask("http://gpu.lan:8000/v1/models").status == 200
        assert proxy.asked == ["10.9.8.7:8000" if here else "gpu.lan:8000"]
        assert [request.target for request in server.requests] == ["/v1/models"]  # SOCKS knows nothing of HTTP
        if here:  # and what may not be fetched from is not, where it is seen
            with pytest.raises(NotSent) as caught:
                ask("https://gpu.lan/a.png", "public")
            assert caught.value.refused


class SocksFault(NamedTuple):
    scheme: str
    reply: int
    user: str  # that the proxy knows
    who: str  # that is given to it
    words: str
    lasting: bool


SOCKS_FAULTS = [
    SocksFault("socks5h", 2, "", "", "does not allow it", True),
    SocksFault("socks5h", 3, "", "", "network unreachable", False),
    SocksFault("socks5h", 4, "", "", "host unreachable", False),
    SocksFault("socks5h", 5, "", "", "connection refused", False),
    SocksFault("socks5h", 1, "", "", "does not reach it", False),
    SocksFault("socks4a", 1, "", "", "does not reach it", False),
    SocksFault("socks5h", 0, "me", "", "a user name and password", True),
    SocksFault("socks5h", 0, "me", f"me:not-{SECRET}@", "another user name", True),
]


@pytest.mark.parametrize("fault", SOCKS_FAULTS, ids=lambda fault: f"{fault.scheme}-{fault.reply}-{fault.who[:2]}")
def test_what_a_socks_proxy_refuses_is_told_as_its_word(bare: pytest.MonkeyPatch, fault: SocksFault) -> None:
    with FaultServer() as server, SocksProxy(server.port, fault.user, SECRET) as proxy:
        proxy.reply = fault.reply
        bare.setenv("ALL_PROXY", f"{fault.scheme}://{fault.who}{proxy.place}")
        with pytest.raises(NotSent) as caught:
            ask("http://gpu.lan:8000/")
    assert f"the proxy {proxy.place} (ALL_PROXY)" in caught.value.reason
    assert fault.words in caught.value.reason
    assert caught.value.lasting is fault.lasting
    advice = (f"ALL_PROXY ({fault.scheme}://USER:PASSWORD@",) if fault.user else ("NO_PROXY", "gpu.lan")
    assert all(words in str(caught.value.hint) for words in advice)
    assert SECRET not in caught.value.reason + str(caught.value.hint)
    assert not server.connections


@pytest.mark.parametrize("scheme", ["http", "socks5h"])
def test_a_proxy_of_the_other_kind_is_recognized(bare: pytest.MonkeyPatch, scheme: str) -> None:
    other = SocksProxy if scheme == "http" else HttpProxy
    with FaultServer() as server, other(server.port) as proxy:
        bare.setenv("ALL_PROXY", f"{scheme}://{proxy.place}")
        with pytest.raises(NotSent) as caught:
            ask("https://gpu.lan/", timeout=2)
    assert str(proxy.port) in caught.value.reason
    words = "is it a SOCKS proxy" if scheme == "http" else "does not answer in time: does it speak SOCKS here?"
    assert words in caught.value.reason


class Late(OSError):
    """As PySocks tells that a proxy was silent for longer than the socket waits."""

    def __str__(self) -> str:
        return "Socket error: timed out"


class ProxyConnectionError(OSError):
    """As PySocks tells that there was no proxy to talk to."""

    socket_err = ConnectionResetError(104, "Connection reset by peer")


@pytest.mark.parametrize(
    ("error", "is_late", "words"),
    [
        (Late(), False, "does not answer in time"),  # the socket was quicker than who cuts it
        (OSError("Connection closed unexpectedly"), True, "does not answer in time"),  # it was cut here
        (OSError("Connection closed unexpectedly"), False, "closed the connection without a word of SOCKS"),
        (ProxyConnectionError(), True, "fails: no connection was made in time"),
        (ProxyConnectionError(), False, "fails: connection reset"),
        (TimeoutError(), False, "fails: no connection was made"),
    ],
    ids=repr,
)
def test_a_socks_proxy_that_is_cut_off_here_is_late_and_has_closed_nothing(
    error: OSError, is_late: bool, words: str
) -> None:
    proxy = Proxy("socks5h", "127.0.0.1", 1080, (None, None), "socks5h://127.0.0.1:1080", "ALL_PROXY")
    reason = socks_fault(proxy, error, "https://gpu.lan/", is_late=is_late).reason
    assert words in reason.replace("Connection", "connection")
    assert "127.0.0.1:1080" in reason


def assert_told_by_dry_runs(shell: Shell, words: str) -> None:
    """Of one picture and of a batch: a problem, as the call itself would meet it, with nothing sent."""
    (shell.folder / "in.txt").write_text("a fox\n")
    one = shell.run("--prompt", "a fox", "--dry-run")
    shell.script = SCRIPTS / "generate_batch.py"
    many = shell.run("--input", "in.txt", "--output-dir", "out", "--dry-run")
    for plan in (one.json, many.json):
        (problem,) = plan["problems"]
        assert (problem["code"], problem["exit_code"], problem["retryable"]) == ("unreachable", 6, False)
        assert words in problem["message"] and not plan["ok"]


@pytest.mark.parametrize("variable", ["HTTPS_PROXY", "all_proxy"])
def test_without_pysocks_it_is_named_and_nothing_is_sent(shell: Shell, variable: str) -> None:
    """In a process of its own: requests looks for it when it is imported."""
    (shell.home / "lib").mkdir()
    (shell.home / "lib/socks.py").write_text("raise ImportError('not here')")
    with SocksProxy(1, "me", SECRET) as proxy:
        shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, variable: proxy.url, "PYTHONPATH": str(shell.home / "lib")}
        result = shell.run("--prompt", "a fox", "--print-response")
        unreachable(shell, result, "SOCKS", "PySocks", variable, advice=("uv run --with", "pip install", "PySocks"))
        assert result.error["retryable"] is False
        check = shell.run("--check")
        assert (check.code, check.error["code"]) == (6, "unreachable")
        assert_told_by_dry_runs(shell, "PySocks")
    assert not proxy.asked and not proxy.heads


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ("socks://127.0.0.1:1080", "socks://"),  # as desktops write it
        ("ftp://127.0.0.1:21", "ftp://"),
        (f"http://me:{SECRET}@", "names no host"),
        (f"http://me:{SECRET}@127.0.0.1:port", "is not the URL of a proxy"),
    ],
)
def test_a_variable_that_names_no_proxy_is_named(shell: Shell, value: str, words: str) -> None:
    shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, "ALL_PROXY": value}
    unreachable(shell, make(shell), "ALL_PROXY", words, advice=("socks5h://HOST:PORT", "ALL_PROXY"))
    assert_told_by_dry_runs(shell, words)


# Proxies that speak HTTP ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("user", ["", "me"])
def test_https_goes_through_a_tunnel_and_the_key_within_it(shell: Shell, vendor: FaultServer, user: str) -> None:
    with HttpProxy(vendor.port, user, SECRET) as proxy:
        shell.env["HTTPS_PROXY"] = proxy.url
        result = make(shell)
        assert result.code == 0, result.stdout
    assert proxy.asked == [f"CONNECT {HOST}:443"] * 2
    assert TEST_KEY.encode() not in b"".join(proxy.heads)
    assert vendor.posts[0].header("authorization") == f"Bearer {TEST_KEY}"
    assert vendor.posts[0].header("proxy-authorization") is None
    assert SECRET not in result.stdout + result.stderr + shell.evidence_files()[0].read_text()


@pytest.fixture
def lan(shell: Shell) -> Iterator[FaultServer]:
    """A server of one's own behind a name that only a proxy knows."""
    with FaultServer(root="http://gpu.lan:8000") as server:
        server.play(IMAGES, json_answer({"data": [{"url": PICTURE}]}, bills=True))
        shell.env |= {"OPENAI_API_KEY": TEST_KEY, "OPENAI_BASE_URL": LAN}
        yield server


@pytest.mark.parametrize("user", ["", "me"])
def test_plain_http_is_forwarded_in_absolute_form_and_without_the_key(
    shell: Shell, lan: FaultServer, user: str
) -> None:
    with HttpProxy(lan.port, user, SECRET) as proxy:
        shell.env["HTTP_PROXY"] = proxy.url
        assert make(shell, "--provider", "openai").code == 0
    *questions, call, picture = proxy.asked
    assert all(asked.startswith("GET http://gpu.lan:8000/") for asked in questions)
    assert (call, picture) == (f"POST {LAN}/images/generations", f"GET http://gpu.lan:8000{PICTURE}")
    assert all(request.header("host") == "gpu.lan:8000" for request in lan.requests)
    assert TEST_KEY.encode() not in b"".join(proxy.heads)


def test_a_signature_travels_byte_by_byte_in_absolute_form_too(bare: pytest.MonkeyPatch) -> None:
    odd = "/a%2fb//c.png?Signature=x%2By%3d&q=a+b~*'"
    with FaultServer() as server, HttpProxy(server.port) as proxy:
        bare.setenv("http_proxy", proxy.url)
        ask(f"http://gpu.lan:8000{odd}#top")
    assert proxy.asked == [f"GET http://gpu.lan:8000{odd}"]


def status(number: int, words: str, *headers: str, body: str = "") -> bytes:
    lines = [f"HTTP/1.1 {number} {words}", *headers, f"Content-Length: {len(body)}", "", body]
    return "\r\n".join(lines).encode()


TUNNEL_REFUSALS = [  # what it answers; what is told; whether it will last
    (status(403, "Forbidden"), "does not allow it (HTTP 403 Forbidden)", True),
    (status(407, "Proxy Authentication Required"), "user name and password (HTTP 407)", True),
    (status(405, "Method Not Allowed"), "HTTP 405", True),
    (status(502, "Bad Gateway"), "does not reach it (HTTP 502", False),
    (status(503, "Service Unavailable"), "does not reach it (HTTP 503", False),
    (status(504, "Gateway Timeout"), "does not reach it (HTTP 504", False),
    (b"\x05\xff", "is it a SOCKS proxy", False),
]


@pytest.mark.parametrize(("refusal", "words", "lasting"), TUNNEL_REFUSALS, ids=lambda value: str(value)[:12])
def test_what_a_proxy_answers_to_connect_is_told_as_its_word(
    shell: Shell, refusal: bytes, words: str, lasting: bool
) -> None:
    with HttpProxy(1) as proxy:
        proxy.refusal = refusal
        shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, "https_proxy": f"http://me:{SECRET}@{proxy.place}"}
        told = unreachable(shell, make(shell), HOST, f"the proxy {proxy.place} (https_proxy)", words)
    assert told["retryable"] is not lasting
    assert ("USER:PASSWORD" if "407" in words else "NO_PROXY") in told["hint"]


@pytest.mark.parametrize("scheme", ["http", "socks5h", "socks4"])
def test_a_proxy_that_is_not_there_is_named(shell: Shell, scheme: str) -> None:
    with HttpProxy(1) as proxy:
        pass
    shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, "HTTPS_PROXY": f"{scheme}://me:{SECRET}@{proxy.place}"}
    shell.env |= (
        {"DASHSCOPE_BASE_URL": "https://8.8.8.8", "ZIMAGE_TRUSTED_HOSTS": "8.8.8.8"} if scheme == "socks4" else {}
    )
    host = "8.8.8.8" if scheme == "socks4" else HOST
    unreachable(shell, make(shell), f"the proxy {proxy.place} (HTTPS_PROXY)", "refused", advice=("NO_PROXY", host))


@pytest.mark.parametrize("scheme", ["http", "socks5h"])
def test_each_address_of_a_proxy_is_tried(bare: pytest.MonkeyPatch, scheme: str) -> None:
    """As of `localhost`, where ::1 comes first and the proxy listens on 127.0.0.1 alone."""

    def two(host: str, port: int, *_: Any, **__: Any) -> list[Any]:
        hosts = ("127.0.0.2", "127.0.0.1") if host == "proxy.lan" else (host,)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (each, port)) for each in hosts]

    with FaultServer() as server, (HttpProxy if scheme == "http" else SocksProxy)(server.port) as proxy:
        bare.setenv("HTTP_PROXY", f"{scheme}://proxy.lan:{proxy.port}")
        with patch.object(socket, "getaddrinfo", two):
            assert ask("http://gpu.lan:8000/").status == 404
    assert len(proxy.asked) == 1


@pytest.mark.parametrize("scheme", ["http", "socks5h", "socks5"])
def test_a_proxy_whose_name_is_wrong_is_named(bare: pytest.MonkeyPatch, scheme: str) -> None:
    def unknown(host: str, port: int, **_: Any) -> list[Any]:
        assert host == "proxy.lan"
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    bare.setenv("HTTPS_PROXY", f"{scheme}://me:{SECRET}@proxy.lan:3128")
    with patch.object(socket, "getaddrinfo", unknown), pytest.raises(NotSent) as caught:
        ask(f"https://{HOST}/")
    assert "the proxy proxy.lan:3128 (HTTPS_PROXY)" in caught.value.reason
    assert "no such name" in caught.value.reason
    assert "NO_PROXY" in str(caught.value.hint)


FORWARD_REFUSALS = [  # of a proxy in front of a server of one's own: exit 6 where nothing can have gone on
    (status(407, "Proxy Authentication Required"), 6, "HTTP 407"),
    (status(403, "Forbidden", "X-Squid-Error: ERR_ACCESS_DENIED 0", body="<h1>No</h1>"), 6, "does not allow it"),
    (status(403, "Filtered", "Server: tinyproxy/1.11.1", body="<h1>Filtered</h1>"), 6, "Filtered"),
    (status(503, "Service Unavailable", "X-Squid-Error: ERR_DNS_FAIL 0"), 6, "does not reach it"),
    (status(503, "Service Unavailable", "X-Squid-Error: ERR_CONNECT_FAIL 111"), 6, "does not reach it"),
    (status(502, "Bad Gateway", "X-Squid-Error: ERR_READ_ERROR 104"), 7, "it came through"),  # it had gone on
    (status(504, "Gateway Timeout", body="<h1>Too slow</h1>"), 7, "Too slow"),
    (status(403, "Forbidden", body="<h1>Not for you</h1>"), 6, "Not for you"),
    (status(403, "Forbidden", body='{"error": {"message": "no"}}'), 3, ""),  # the service says so
]


@pytest.mark.parametrize(("refusal", "code", "words"), FORWARD_REFUSALS, ids=lambda value: str(value)[9:50])
def test_a_proxy_in_front_of_a_server_in_the_house_is_named(
    shell: Shell, lan: FaultServer, refusal: bytes, code: int, words: str
) -> None:
    with HttpProxy(lan.port) as proxy:
        proxy.refusal = refusal
        shell.env["HTTP_PROXY"] = proxy.url
        result = make(shell, "--provider", "openai")
    assert result.code == code, result.stdout
    told = result.error
    assert (f"the proxy {proxy.place} (HTTP_PROXY)" in told["message"]) is (code != 3)
    assert words in told["message"]
    if code == 6:  # there a second try, which is free, is the first advice
        assert ("USER:PASSWORD" if "407" in words else "NO_PROXY") in told["hint"]
    assert not lan.requests


def test_no_proxy_goes_past_it(shell: Shell, vendor: FaultServer) -> None:
    """The name is resolved here then, and leads nowhere."""
    with HttpProxy(vendor.port) as proxy:
        shell.env |= {"HTTPS_PROXY": proxy.url, "NO_PROXY": f"localhost,.{HOST.partition('.')[2]}"}
        with closed_names(shell):
            unreachable(shell, make(shell), "cannot be resolved")
    assert not proxy.asked


# Names and addresses --------------------------------------------------------------------------------------------------

NAMES = '''
import socket
names, port = {names!r}, {port}
real = socket.getaddrinfo, socket.socket.connect

def resolve(host, service, *rest, **more):
    address = next((value for end, value in names.items() if host.endswith(end)), "")
    if host.replace(".", "").isdigit():
        return real[0](host, service, *rest, **more)
    if not address:
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return [(family, socket.SOCK_STREAM, 6, "", (address, service) + (0, 0) * (":" in address))]

class Socket(socket.socket):
    """Whatever is not on this machine is the one server of the test."""
    def connect(self, address):
        return super().connect(address if address[0] == "127.0.0.1" else ("127.0.0.1", port))

socket.getaddrinfo, socket.socket = resolve, Socket
'''


@contextlib.contextmanager
def closed_names(shell: Shell, names: dict[str, str] | None = None, port: int = 1) -> Iterator[None]:
    """A machine whose names lead where the test says, and no other one anywhere: in processes of their own."""
    folder = shell.home / "names"
    folder.mkdir(exist_ok=True)
    (folder / "sitecustomize.py").write_text(NAMES.format(names=names or {}, port=port))
    shell.env["PYTHONPATH"] = str(folder)
    yield
    del shell.env["PYTHONPATH"]


@pytest.mark.parametrize(
    ("number", "what", "advice"),
    [
        (socket.EAI_AGAIN, "no name server answers", "HTTPS_PROXY"),
        (socket.EAI_NONAME, "there is no such name", "spelling"),
    ],
)
def test_a_name_that_leads_nowhere_is_told_as_that(
    bare: pytest.MonkeyPatch, number: int, what: str, advice: str
) -> None:
    def unknown(*_: Any, **__: Any) -> list[Any]:
        raise socket.gaierror(number, "?")

    with patch.object(socket, "getaddrinfo", unknown), pytest.raises(NotSent) as caught:
        ask(f"https://{HOST}/")
    assert what in caught.value.reason and advice in str(caught.value.hint)


@pytest.mark.parametrize(
    ("address", "reach", "is_taken"),
    [
        ("198.18.0.1", "vendor", True),
        ("10.0.0.5", "vendor", True),  # its endpoints within a private network
        ("127.0.0.1", "vendor", False),
        ("169.254.169.254", "vendor", False),
        ("198.18.0.1", "public", False),
        ("198.17.255.255", "public", True),
        ("198.20.0.0", "public", True),
        ("198.19.255.255", "service", True),
        ("198.19.255.255", "service with links", False),
        ("192.168.1.5", "service with links", True),
    ],
)
def test_where_a_name_may_lead(address: str, reach: str, is_taken: bool) -> None:
    wire = Wire(HttpCall("GET", "https://x.example/", {}), Stop(5), reach)
    with contextlib.nullcontext() if is_taken else pytest.raises(NotSent):
        wire._check(address)


def test_fake_addresses_of_a_vpn_do_not_keep_the_vendors_pictures_back(shell: Shell, vendor: FaultServer) -> None:
    """Its certificate says that it is the vendor, whatever address leads there."""
    vendor.play(GENERATE, good(f"http://dashscope-result-bj.aliyuncs.com{PICTURE}"))
    with closed_names(shell, {"aliyuncs.com": "198.18.0.7"}, vendor.port):
        result = make(shell)
    assert result.code == 0, result.stdout
    assert len(vendor.downloads) == 1


@pytest.mark.parametrize("address", ["198.18.0.9", "fc00::9"])
def test_a_picture_elsewhere_behind_a_fake_address_is_not_lost(
    shell: Shell, vendor: FaultServer, authority: trustme.CA, address: str
) -> None:
    vendor.play(GENERATE, good(f"https://cdn.example.com{PICTURE}"))
    names = {"aliyuncs.com": "198.18.0.7", "cdn.example.com": address}
    with closed_names(shell, names, vendor.port):
        result = make(shell)
        assert (result.code, result.error["code"]) == (7, "paid_not_downloaded")
        assert address in result.error["message"] and "fake" in result.error["message"]
        assert "HTTPS_PROXY" in result.error["hint"] and "next_command" in result.error["hint"]
        assert not vendor.downloads
    with FaultServer(server_context(authority, "cdn.example.com")) as storage, HttpProxy(storage.port) as proxy:
        shell.env["HTTPS_PROXY"] = proxy.url  # the VPN's own
        assert shell.call("--recover", str(shell.evidence_files()[0]), "--print-response").code == 0
    assert len(vendor.posts) == 1


@pytest.mark.parametrize("address", ["10.0.0.5", "fd00::1"])
def test_a_name_that_leads_into_the_house_is_still_refused(shell: Shell, vendor: FaultServer, address: str) -> None:
    vendor.play(GENERATE, good(f"https://cdn.example.com{PICTURE}"))
    with closed_names(shell, {"aliyuncs.com": "8.8.8.8", "cdn.example.com": address}, vendor.port):
        result = make(shell)
    assert (result.code, result.error["code"]) == (8, "hop_refused")
    assert not vendor.downloads


def test_where_pictures_lie_anywhere_fake_addresses_are_known_before_paying(shell: Shell) -> None:
    address = "198.19.255.254"
    with FaultServer() as server:
        shell.env |= {"ZIMAGETURBO_API_KEY": TEST_KEY}
        with closed_names(shell, {"zimageturbo.ai": address}, server.port):
            unreachable(
                shell, make(shell, "--provider", "zimageturbo"), address, "fake", advice=("HTTPS_PROXY", "fake-ip")
            )
        assert not server.connections


def test_a_batch_stops_after_a_few_pictures_that_it_cannot_fetch(shell: Shell, vendor: FaultServer) -> None:
    vendor.play(GENERATE, good(f"https://cdn.example.com{PICTURE}"))
    (shell.folder / "rows.jsonl").write_text("".join(f'{{"prompt": "fox {n}"}}\n' for n in range(30)))
    shell.script = SCRIPTS / "generate_batch.py"
    with closed_names(shell, {"aliyuncs.com": "198.18.0.7", "cdn.example.com": "198.18.0.9"}, vendor.port):
        result = shell.run("--input", "rows.jsonl", "--output-dir", "out", "--concurrency", "2")
    assert result.code == 7, result.stdout + result.stderr
    assert len(vendor.posts) <= 6
    told = result.json["error"]
    assert told["code"] == "paid_not_downloaded" and "HTTPS_PROXY" in told["hint"]
    status_ = shell.run("--status", "out").json
    assert status_["generated"] + status_["pending"] == 30


# TLS ------------------------------------------------------------------------------------------------------------------


class TlsFault(NamedTuple):
    name: str
    context: Callable[[trustme.CA], ssl.SSLContext]
    words: str
    advice: str


def expired(authority: trustme.CA) -> ssl.SSLContext:
    return server_context(authority, HOST, not_after=dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc))


def early(authority: trustme.CA) -> ssl.SSLContext:
    future = dt.datetime(2090, 1, 1, tzinfo=dt.timezone.utc)
    return server_context(authority, HOST, not_before=future, not_after=future + dt.timedelta(days=9))


TLS_FAULTS = [
    TlsFault(
        "unknown authority",
        lambda _: server_context(trustme.CA(), HOST),
        "authority that is not known",
        "SSL_CERT_FILE",
    ),
    TlsFault("expired", expired, "has expired", "clock"),
    TlsFault("not yet", early, "is not valid yet", "clock"),
    TlsFault("another name", lambda ca: server_context(ca, "other.example"), "another name", "base URL"),
    TlsFault("a name within", lambda ca: server_context(ca, "x." + HOST), "another name", "base URL"),
]


@pytest.mark.parametrize("fault", TLS_FAULTS, ids=lambda fault: fault.name)
def test_a_certificate_is_told_as_what_it_is(
    shell: Shell, authority: trustme.CA, bundle: Path, fault: TlsFault
) -> None:
    shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, "SSL_CERT_FILE": str(bundle)}
    with FaultServer(fault.context(authority)) as server, HttpProxy(server.port) as proxy:
        shell.env["HTTPS_PROXY"] = proxy.url
        told = unreachable(shell, make(shell), HOST, "the certificate", fault.words, advice=(fault.advice,))
        assert told["retryable"] is False
        assert not server.requests


def test_an_authority_of_this_machine_is_trusted_beside_those_of_certifi(
    shell: Shell, vendor: FaultServer, bundle: Path
) -> None:
    """SSL_CERT_DIR is how OpenSSL is told where that store is; curl goes by it too."""
    store = shell.home / "certs"
    store.mkdir()
    del shell.env["SSL_CERT_FILE"]
    with HttpProxy(vendor.port) as proxy:
        shell.env |= {"HTTPS_PROXY": proxy.url, "SSL_CERT_DIR": str(store)}
        (store / "company.pem").write_bytes(bundle.read_bytes())
        unreachable(shell, make(shell), "not known here", advice=("SSL_CERT_DIR", "rehash"))
        (store / f"{subject_hash(bundle)}.0").write_bytes(bundle.read_bytes())
        assert make(shell).code == 0


def subject_hash(path: Path) -> str:
    """The name under which OpenSSL looks for a certificate: of its canonical subject, 4 bytes of SHA-1."""
    done = subprocess.run(["openssl", "x509", "-hash", "-noout", "-in", str(path)], capture_output=True, check=True)
    return done.stdout.decode().strip()


@pytest.mark.parametrize("variable", tls.BUNDLES)
def test_the_variable_that_names_the_trusted_is_named_where_they_are_not_enough(
    shell: Shell, vendor: FaultServer, bundle: Path, tmp_path: Path, variable: str
) -> None:
    other = tmp_path / "other.pem"
    trustme.CA().cert_pem.write_to_path(other)
    del shell.env["SSL_CERT_FILE"]
    with HttpProxy(vendor.port) as proxy:
        shell.env |= {"HTTPS_PROXY": proxy.url, variable: str(other)}
        unreachable(shell, make(shell), "not known here", advice=(variable,))
        shell.env[variable] = str(tmp_path / "both.pem")
        (tmp_path / "both.pem").write_bytes(other.read_bytes() + bundle.read_bytes())
        assert make(shell).code == 0


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "is not there"),
        (b"", "holds no certificate in PEM form"),
        (b"\x30\x82\x01\x0a\x02\x82", "holds no certificate in PEM form"),  # DER
        (b"-----BEGIN CERTIFICATE-----\nnonsense\n-----END CERTIFICATE-----\n", "holds no certificate in PEM form"),
    ],
    ids=["missing", "empty", "der", "nonsense"],
)
@pytest.mark.parametrize("variable", ["REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"])
def test_a_bundle_that_is_none_is_named_before_anything_is_connected_to(
    shell: Shell, vendor: FaultServer, variable: str, content: bytes | None, words: str
) -> None:
    path = shell.home / "bundle.pem"
    if content is not None:
        path.write_bytes(content)
    with HttpProxy(vendor.port) as proxy:
        shell.env |= {"HTTPS_PROXY": proxy.url, "SSL_CERT_FILE": "", variable: str(path)}
        told = unreachable(shell, make(shell), variable, str(path), words, advice=(variable,))
    assert told["retryable"] is False
    assert not proxy.asked


def test_no_bundle_is_read_where_no_tls_is_spoken(shell: Shell, service: FaultServer) -> None:
    shell.env["REQUESTS_CA_BUNDLE"] = "/nowhere/ca.pem"
    assert make(shell).code == 0


def test_a_port_without_tls_is_told(shell: Shell) -> None:
    with HttpProxy(1) as server, HttpProxy(server.port) as proxy:
        shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, "HTTPS_PROXY": proxy.url}
        unreachable(shell, make(shell), "no TLS is spoken on this port", advice=("http://",))


def test_a_proxy_that_is_named_with_https_and_speaks_http_is_told(shell: Shell) -> None:
    with HttpProxy(1) as proxy:
        shell.env |= {"DASHSCOPE_API_KEY": TEST_KEY, "HTTPS_PROXY": proxy.url.replace("http:", "https:")}
        unreachable(shell, make(shell), f"the proxy {proxy.place}", "TLS", advice=("http://",))


def test_a_proxy_that_speaks_tls_itself(shell: Shell, vendor: FaultServer, authority: trustme.CA) -> None:
    """TLS in TLS: both are verified by the same authorities."""
    with HttpProxy(vendor.port) as inner, TlsEntrance(inner.port, server_context(authority, "127.0.0.1")) as proxy:
        shell.env["HTTPS_PROXY"] = f"https://{proxy.place}"
        assert make(shell).code == 0
        assert inner.asked == [f"CONNECT {HOST}:443"] * 2


class TlsEntrance(Middleman):
    """Takes TLS off and hands on what is in it."""

    def __init__(self, port: int, context: ssl.SSLContext) -> None:
        super().__init__(port)
        self._context = context

    def serve(self, connection: socket.socket) -> None:
        with self._context.wrap_socket(connection, server_side=True) as inner:
            self.join(inner)


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_keychain_and_windows_store_are_asked_by_truststore(bare: pytest.MonkeyPatch, platform: str) -> None:
    import truststore

    bare.setattr(sys, "platform", platform)
    assert isinstance(tls.tls_context(), truststore.SSLContext)
    assert tls.tls_context() is not tls.tls_context()  # it holds a lock while it shakes hands
    bare.setitem(sys.modules, "truststore", None)  # it may be missing
    bare.setattr(ssl.SSLContext, "load_default_certs", lambda self: None)
    assert type(tls.tls_context()) is ssl.SSLContext


def test_elsewhere_the_store_is_read_once(bare: pytest.MonkeyPatch) -> None:
    bare.setattr(sys, "platform", "linux")
    context = tls.tls_context()
    assert context is tls.tls_context()
    assert context.verify_mode is ssl.CERT_REQUIRED and context.check_hostname


# Pages of gateways ----------------------------------------------------------------------------------------------------

PAGE = b"<!doctype html><html><head><title>Sign in</title><style>p{}</style></head><body><p>Welcome &amp; hello</p>"
LONG = b"<html>" + b"x" * 100_000
STREAM = b'id:1\nevent:result\n:HTTP_STATUS/200\ndata:{"output": 1}\n\ndata: [DONE]\n\n'


class Said(NamedTuple):
    name: str
    answer: Any
    exit: int
    words: tuple[str, ...]
    advice: str = ""


SAID = [
    Said("301", redirect("https://gpu.example/v1", 301), 7, ("301", "a redirect to https://gpu.example/v1"), "https"),
    Said("302", redirect("/login?next=%2F", 302), 7, ("302", "/login"), "check the base URL"),
    Said("308", redirect("http://other.example/", 308), 7, ("308", "http://other.example/"), "check the base URL"),
    Said("413", html(413, "Request Entity Too Large"), 8, ("413", "text/html", "Request Entity Too Large")),
    Said("414", typed(b"URI too long", "text/plain", 414), 8, ("414", "text/plain", "URI too long")),
    Said("a page", typed(PAGE, "text/html; charset=utf-8"), 8, ("200", "text/html", "Sign in", "Welcome"), "base URL"),
    Said("a long page", typed(LONG, "text/html"), 8, ("text/html", "xxx"), "base URL"),
    Said("no type", Answer(200, (), b"It works!"), 8, ("200", "It works!")),
    Said("a stream", typed(b"event: ping\n\nevent: end\n\n", "text/event-stream"), 8, ("text/event-stream", "ping")),
    Said("a stream of JSON", typed(STREAM, "text/event-stream"), 8, ("200", "no picture")),
    Said("502", html(502, "Bad Gateway"), 7, ("502", "text/html", "Bad Gateway")),
    Said("503 text", typed(b"upstream is asleep", "text/plain", 503), 7, ("503", "upstream is asleep")),
    Said("404", html(404, "Not Found"), 2, ("404", "text/html", "Not Found"), "base URL"),
    Said(
        "nginx",
        html(400, "The plain HTTP request was sent to HTTPS port"),
        2,
        ("400", "text/html", "plain HTTP request"),
        "https://127.0.0.1",
    ),
    Said(
        "Go",
        typed(b"Client sent an HTTP request to an HTTPS server.\n", "text/plain", 400),
        2,
        ("400", "HTTPS server"),
        "https://127.0.0.1",
    ),
]


@pytest.mark.parametrize("said", SAID, ids=lambda said: said.name)
def test_what_stands_before_a_service_is_shown_with_its_words(shell: Shell, service: FaultServer, said: Said) -> None:
    service.play(GENERATE, said.answer)
    result = make(shell)
    assert result.code == said.exit, result.stdout
    for word in said.words:
        assert word in result.error["message"], result.error["message"]
    assert said.advice in result.error["hint"]
    assert len(result.error["message"]) < 700
    assert len(service.posts) == 1


@pytest.mark.parametrize("alert", [b"\x15\x03\x01\x00\x02\x02\x46", b"\x15\x03\x03\x00\x02\x02\x0a"])
def test_http_to_a_port_that_answers_in_tls_was_not_taken(shell: Shell, service: FaultServer, alert: bytes) -> None:
    service.play(GENERATE, Answer(raw=alert))
    unreachable(shell, make(shell), "speaks TLS", advice=("https://",))


def test_a_picture_in_a_stream_of_events_is_taken(shell: Shell, service: FaultServer) -> None:
    def streamed(request: Any) -> Answer:
        text = json.dumps(json.loads(good()(request).body)).encode()
        body = b"id:1\nevent:result\n:HTTP_STATUS/200\ndata:" + text + b"\n\n"
        return typed(body, "text/event-stream;charset=UTF-8", bills=True)

    service.play(GENERATE, streamed)
    assert make(shell).code == 0
    assert service.billed == 1


def test_an_error_in_a_stream_of_events_is_the_services(shell: Shell, service: FaultServer) -> None:
    body = error(400, "DataInspectionFailed", "no").body
    service.play(GENERATE, typed(b"event:error\ndata:" + body + b"\r\n\r\n", "text/event-stream", 400))
    assert make(shell).code == 5


def test_the_words_of_a_page_hold_no_key_and_no_escape(shell: Shell, service: FaultServer) -> None:
    page = f"<h1>no entry</h1>\x1b[31m Authorization: Bearer {TEST_KEY} \x1b[0m".encode()
    service.play(GENERATE, typed(page, "text/html\x1b", 403))
    result = make(shell)
    assert result.code == 3
    assert "no entry" in result.error["message"]
    assert TEST_KEY not in result.stdout and "\x1b" not in result.stdout + result.stderr
