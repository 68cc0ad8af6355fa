"""One exchange in this process: whether the request left, and what of its answer is taken, whatever the network does.

"Not sent" may be tried again, "lost" may have been billed: a word too much on either side costs money or a picture.
The server is on loopback; names lead there by a table of this test.
"""

from __future__ import annotations

import contextlib
import functools
import gzip
import http.client
import ipaddress
import json
import os
import random
import socket
import ssl
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import trustme

from conftest import TEST_KEY
from fault_server import Answer, FaultServer, Received
from providers.openai import OpenAI
from zimage import transport, wire
from zimage.answers import read_begun_json
from zimage.calls import HttpAnswer, HttpCall, LocalCall
from zimage.contract import (
    ASKING_SHARE,
    ASKING_TIME,
    CONNECT_TIMEOUT,
    MAX_ANSWER_BYTES,
    MAX_ERROR_BYTES,
    MIB,
    SKILL,
    VERSION,
)
from zimage.endpoint import Endpoint
from zimage.errors import Failure, NotSent
from zimage.keys import NO_KEY
from zimage.tls import bundle_variable
from zimage.transport import (
    AnswerEncoded,
    AnswerLost,
    AnswerTooLarge,
    ask,
    exchange,
    get_to_know,
)
from zimage.waiting import WATCHER, Stop, Stopped
from zimage.wire import Wire, request_target

NAME = "images.example"
LIMIT = 1000
SOON = 0.2  # seconds of a time limit that is to pass


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither proxy nor certificates of this machine."""
    for name in os.environ:
        if name.lower().endswith("_proxy") or name.endswith(("_BUNDLE", "SSL_CERT_FILE")):
            monkeypatch.delenv(name)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


class TlsServer(FaultServer):
    """The same behind TLS, with the certificate of `authority` for its name."""

    def __init__(self, name: str = NAME) -> None:
        super().__init__()
        self.authority = trustme.CA()
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.authority.issue_cert(name).configure_cert(self._context)
        self.root = f"https://{name}:{self.port}"

    def _serve(self, connection: socket.socket) -> None:
        try:
            wrapped = self._context.wrap_socket(connection, server_side=True)
        except OSError:  # the client does not trust it
            connection.close()
        else:
            super()._serve(wrapped)


@pytest.fixture
def tls_server(names: dict[str, list[Any]]) -> Iterator[TlsServer]:
    with TlsServer() as server:
        names[NAME] = ["127.0.0.1"]
        yield server


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[Any]]:
    """Where names lead: to addresses, each with a port or at the one that is asked for."""
    known: dict[str, list[Any]] = {}
    resolve = socket.getaddrinfo

    def look_up(host: str, port: int, *more: Any, **options: Any) -> list[Any]:
        if host.replace(".", "").isdecimal():
            return resolve(host, port, *more, **options)
        if host not in known:
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        pairs = [(to, port) if isinstance(to, str) else to for to in known[host]]
        return [found for to, at in pairs for found in resolve(to, at, *more, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known


def asked(url: str, *, stop: Stop | None = None, limit: int = LIMIT, reach: str = "service", **call: Any) -> HttpAnswer:
    return exchange(
        HttpCall(**{"method": "GET", "url": url, "headers": {}} | call), stop or Stop(20), limit=limit, reach=reach
    )


def answered(server: FaultServer, answer: Answer | Callable[[Received], Answer], **how: Any) -> HttpAnswer:
    server.play("/x", answer)
    return asked(f"{server.root}/x", **how)


def closed_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def end_now(stop: Stop, reason: str) -> None:
    """End a stop as a signal does: whoever watches it hears of it at once."""
    stop.request(reason)
    with WATCHER.cutting(Stop(0.0), lambda: None):
        pass


# What leaves ----------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_request_leaves_as_it_was_built_and_nothing_is_added_to_it(server: FaultServer) -> None:
    server.play("/x", Answer(headers=(("X-Request-Id", "r"),), body=b"ok"))
    answer = asked(f"{server.root}/x?a=%2f", method="POST", headers={"Authorization": "Bearer k"}, body=b'{"a": 1}')
    assert (answer.status, answer.body, answer.whole) == (200, b"ok", True)
    assert answer.headers["x-request-id"] == "r"
    (request,) = server.requests
    assert (request.method, request.target, request.body) == ("POST", "/x?a=%2f", b'{"a": 1}')
    assert dict(request.headers) == {
        "host": server.root.removeprefix("http://"),
        "user-agent": f"{SKILL}/{VERSION}",
        "accept-encoding": "identity",
        "connection": "close",
        "authorization": "Bearer k",
        "content-length": "8",
    }


def test_the_calls_own_headers_win(server: FaultServer) -> None:
    asked(f"{server.root}/x", headers={"User-Agent": "mine"})
    assert server.requests[0].header("user-agent") == "mine"


@pytest.mark.parametrize(
    ("url", "target"),
    [
        ("https://a.example/x", "/x"),
        ("https://a.example", "/"),
        ("https://a.example?Signature=a%2Fb%3D", "/?Signature=a%2Fb%3D"),
        ("https://a.example:8443/a/../b//c?x=1&y=%e2%82%ac#part", "/a/../b//c?x=1&y=%e2%82%ac"),
        ("https://a.example/?next=https://b.example/", "/?next=https://b.example/"),
        ("https://a.example/猫?q=é", "/%E7%8C%AB?q=%C3%A9"),
    ],
)
def test_a_signed_link_is_asked_for_byte_by_byte(url: str, target: str) -> None:
    assert request_target(url) == target


def test_a_call_never_repeats_a_cookie_or_a_login_of_this_machine(
    server: FaultServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".netrc").write_text("default login evil password hunter2\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    for _ in range(2):
        answered(server, Answer(headers=(("Set-Cookie", "a=b"),)))
    assert not [
        name for request in server.requests for name, _ in request.headers if name in ("cookie", "authorization")
    ]


# Whether it left ------------------------------------------------------------------------------------------------------


def not_sent(url: str, **how: Any) -> NotSent:
    with pytest.raises(NotSent) as caught:
        asked(url, **how)
    return caught.value


def lost(server: FaultServer, answer: Answer, **how: Any) -> AnswerLost:
    with pytest.raises(AnswerLost) as caught:
        answered(server, answer, **how)
    return caught.value


def test_a_refused_connection_is_not_sent() -> None:
    error = not_sent(f"http://127.0.0.1:{closed_port()}/x")
    assert "refused" in error.reason and not error.lasting and not error.refused


def test_a_name_that_does_not_exist_is_not_sent(names: dict[str, list[Any]]) -> None:
    error = not_sent("http://nowhere.example/x")
    assert error.reason == "its name cannot be resolved (there is no such name)" and not error.lasting
    assert error.hint == wire.NO_NAME[False]


def test_a_name_of_which_no_name_server_says_anything_may_be_sound(monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> None:
        raise socket.gaierror(socket.EAI_AGAIN, "later")

    monkeypatch.setattr(socket, "getaddrinfo", silent)
    error = not_sent("http://nowhere.example/x")
    assert error.reason == "its name cannot be resolved (no name server answers)"
    assert error.hint == wire.NO_NAME[True] and not error.lasting


def test_a_proxy_whose_name_does_not_exist_is_named(
    names: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", "http://proxy.example:3128")
    error = not_sent(f"https://{NAME}/x")
    assert "proxy.example" in error.reason and "cannot be resolved (there is no such name)" in error.reason
    assert error.hint != wire.NO_NAME[False]


def test_a_connection_that_nobody_answers_is_late(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def late(wire: Wire, connection: socket.socket) -> None:
        raise TimeoutError

    monkeypatch.setattr(Wire, "_start", late)
    assert not_sent(f"{server.root}/x").reason == "connection timed out"


def test_a_name_that_leads_nowhere_is_not_sent(names: dict[str, list[Any]]) -> None:
    names[NAME] = []
    assert "no address" in not_sent(f"http://{NAME}/x").reason


def test_a_name_server_that_does_not_answer_holds_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    over = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: over.wait(30))
    began = time.monotonic()
    error = not_sent("http://slow.example/x", stop=Stop(SOON))
    over.set()
    assert "name" in error.reason and "in time" in error.reason and time.monotonic() - began < 5


def test_a_name_that_no_name_server_takes_is_not_sent() -> None:
    assert "resolved" in not_sent(f"http://{'a' * 64}.example/x").reason


@pytest.fixture
def slept(monkeypatch: pytest.MonkeyPatch) -> list[Callable[[], None]]:
    """Nobody looks at the time, as while a machine sleeps; gives what would cut the connections."""
    cuts: list[Callable[[], None]] = []

    def cutting(stop: Stop, cut: Callable[[], None]) -> contextlib.AbstractContextManager[None]:
        cuts.append(cut)
        return contextlib.nullcontext()

    monkeypatch.setattr(WATCHER, "cutting", cutting)
    return cuts


class Then(list[Any]):
    """The addresses of a name; something happens while it is resolved."""

    def __init__(self, addresses: list[Any], then: Callable[[], None]) -> None:
        super().__init__(addresses)
        self._then = then

    def __iter__(self) -> Iterator[Any]:
        self._then()
        return super().__iter__()


def end_its_time(stop: Stop) -> None:
    stop.until = time.monotonic() - 0.5


def test_nothing_leaves_after_its_time(server: FaultServer, names: dict[str, list[Any]]) -> None:
    stop = Stop(20)
    names[NAME] = Then(["127.0.0.1"], functools.partial(end_its_time, stop))
    assert "time" in not_sent(f"http://{NAME}:{server.port}/x", stop=stop).reason
    assert server.requests == []


@pytest.mark.usefixtures("slept")
def test_nothing_leaves_from_a_machine_that_slept_beyond_its_time(
    server: FaultServer, deaf_port: int, names: dict[str, list[Any]]
) -> None:
    for port in (server.port, deaf_port):
        stop, began = Stop(20), time.monotonic()
        names[NAME] = Then(["127.0.0.1"], functools.partial(end_its_time, stop))
        assert "time" in not_sent(f"http://{NAME}:{port}/x", stop=stop).reason
        assert server.requests == [] and time.monotonic() - began < 0.9


@pytest.mark.usefixtures("slept")
def test_an_answer_that_does_not_come_is_lost_also_where_nobody_looks(server: FaultServer) -> None:
    assert "in time" in lost(server, Answer(delay_s=30), stop=Stop(SOON)).reason


def test_nothing_leaves_after_a_signal(
    server: FaultServer, names: dict[str, list[Any]], slept: list[Callable[[], None]]
) -> None:
    stop = Stop(20)

    def signalled() -> None:
        stop.request("SIGTERM")
        slept[0]()

    names[NAME] = Then(["127.0.0.1"], signalled)
    with pytest.raises(Stopped) as caught:
        asked(f"http://{NAME}:{server.port}/x", stop=stop)
    assert not caught.value.request_left and server.requests == []


def test_a_handshake_that_does_not_end_is_not_sent(server: FaultServer) -> None:
    server.at_connection(Answer(delay_s=30))
    began = time.monotonic()
    error = not_sent(f"https://127.0.0.1:{server.port}/x", stop=Stop(SOON))
    assert "in time" in error.reason and not error.lasting and time.monotonic() - began < 5


def test_a_handshake_that_the_socket_itself_ends_is_late_too(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever is quicker: the socket's own time limit, or who cuts what blocks."""
    monkeypatch.setattr(WATCHER, "cutting", lambda stop, cut: contextlib.nullcontext())
    server.at_connection(Answer(delay_s=30))
    error = not_sent(f"https://127.0.0.1:{server.port}/x", stop=Stop(SOON))
    assert "in time" in error.reason and not error.lasting


def test_a_server_that_does_not_speak_tls_is_not_sent(server: FaultServer) -> None:
    server.at_connection(Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n"))
    error = not_sent(f"https://127.0.0.1:{server.port}/x")
    assert "no TLS is spoken" in error.reason and error.lasting


def test_a_connection_that_ends_within_its_handshake_is_not_sent(server: FaultServer) -> None:
    server.at_connection(Answer(raw=b""))
    assert not not_sent(f"https://127.0.0.1:{server.port}/x").lasting


def test_a_certificate_that_is_not_trusted_will_not_be_at_a_second_try(tls_server: TlsServer) -> None:
    error = not_sent(f"{tls_server.root}/x")
    assert "certificate" in error.reason and error.lasting and tls_server.requests == []


def test_a_certificate_of_the_users_own_authority_is_trusted(
    tls_server: TlsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls_server.authority.cert_pem.write_to_path(str(tmp_path / "own.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
    answer = answered(tls_server, Answer(body=b"ok"))
    assert (answer.body, answer.whole) == (b"ok", True)
    assert tls_server.requests[0].target == "/x"


def test_the_certificate_must_be_of_the_name_that_is_asked(
    tls_server: TlsServer, names: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names["other.example"] = ["127.0.0.1"]
    tls_server.authority.cert_pem.write_to_path(str(tmp_path / "own.pem"))
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "own.pem"))
    error = not_sent(f"https://other.example:{tls_server.port}/x")
    assert "certificate" in error.reason and error.lasting


def test_certificates_that_cannot_be_read_are_told_before_anything_is_connected(
    tls_server: TlsServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "/nowhere/own.pem")
    error = not_sent(f"{tls_server.root}/x")
    assert "REQUESTS_CA_BUNDLE: /nowhere/own.pem" in error.reason
    assert error.lasting and tls_server.connections == 0


def test_the_first_variable_that_names_certificates_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert bundle_variable() == ""
    for name in ("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.setenv(name, f"/{name}")
        assert bundle_variable() == name
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", "")
    assert bundle_variable() == "CURL_CA_BUNDLE"


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_connection_that_ends_after_the_request_is_lost(server: FaultServer, reset: bool) -> None:
    assert "broke" in lost(server, Answer(hang_up="after-reading", reset=reset)).reason
    assert len(server.requests) == 1


def test_an_answer_that_does_not_come_is_lost(server: FaultServer) -> None:
    began = time.monotonic()
    assert "in time" in lost(server, Answer(delay_s=30), stop=Stop(SOON)).reason
    assert time.monotonic() - began < 5


def test_headers_that_dribble_do_not_outlast_the_time(server: FaultServer) -> None:
    began = time.monotonic()
    assert "in time" in lost(server, Answer(dribble_head_s=0.02), stop=Stop(SOON)).reason
    assert time.monotonic() - began < 5


def test_what_is_no_http_is_lost(server: FaultServer) -> None:
    server.at_connection(Answer(raw=b"220 mail.example ESMTP\r\n"))
    with pytest.raises(AnswerLost):
        asked(f"{server.root}/x")


ALERT = b"\x15\x03\x01\x00\x02\x02"  # and what it is about


@pytest.mark.parametrize("about", [b"\x46", b"\x0a", b"\x28"])
def test_http_on_a_port_of_tls_is_not_sent(server: FaultServer, about: bytes) -> None:
    server.at_connection(Answer(raw=ALERT + about))
    assert "speaks TLS" in not_sent(f"{server.root}/x").reason


@pytest.mark.parametrize(
    "raw", [(ALERT + b"\x46") * 9, ALERT + b"\x46\r\n", ALERT, ALERT[:2] + b"\x03HTTP", ALERT[:5] + b"\x01\x00"]
)
def test_what_only_begins_as_tls_may_have_read_the_request(server: FaultServer, raw: bytes) -> None:
    server.at_connection(Answer(raw=raw))
    with pytest.raises(AnswerLost):
        asked(f"{server.root}/x")


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/x", "ftp://127.0.0.1/x", "http:///x"])
def test_a_url_that_cannot_be_used_is_not_sent(url: str) -> None:
    error = not_sent(url)
    assert error.lasting and "URL" in error.reason


@pytest.mark.parametrize("value", ["a\r\nX-Evil: 1", "猫"])
def test_a_header_that_no_http_carries_is_not_sent(server: FaultServer, value: str) -> None:
    error = not_sent(f"{server.root}/x", headers={"X-Workspace": value})
    assert server.requests == [] and value not in error.reason and "certificate" not in error.reason
    assert "HTTP has no form for a header" in error.reason and error.lasting


@pytest.mark.parametrize("links", [False, True])
def test_where_a_name_truly_leads_only_a_service_need_not_know_that_hands_out_no_links(
    names: dict[str, list[Any]], links: bool
) -> None:
    """Proxies that answer for every name give addresses of 198.18.0.0/15 (RFC 2544)."""
    names[NAME] = ["198.18.0.1"]
    endpoint = Endpoint(f"https://{NAME}", f"https://{NAME}/x", NAME, "global")
    options = {"links_elsewhere": True} if links else {}
    with pytest.raises(Failure) as caught:
        ask(HttpCall("GET", f"https://{NAME}/x", {}), lambda answer: answer, Stop(SOON), endpoint, **options)
    assert ("fake address" in caught.value.message) is links


def test_a_library_that_hides_a_password_in_its_words_is_not_repeated(
    names: dict[str, list[Any]], server: FaultServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", f"http://user:hunter2@127.0.0.1:{server.port}")
    server.at_connection(Answer(raw=b"HTTP/1.1 407 No\r\nContent-Length: 0\r\n\r\n"))
    error = not_sent(f"https://{NAME}/x", headers={"Authorization": "Bearer k"})
    assert "proxy" in error.reason and error.lasting and "hunter2" not in error.reason
    assert error.__cause__ is None and error.__suppress_context__


# Proxies --------------------------------------------------------------------------------------------------------------


class Tunnel(FaultServer):
    """A proxy that leads every CONNECT to a port of this machine, and keeps what it was asked."""

    def __init__(self, port: int) -> None:
        super().__init__()
        self.heads: list[bytes] = []
        self._to = port

    def _serve(self, connection: socket.socket) -> None:
        head = b""
        while b"\r\n\r\n" not in head:
            head += connection.recv(65536)
        self.heads.append(head)
        with socket.create_connection(("127.0.0.1", self._to)) as onward, connection:
            connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
            back = threading.Thread(target=self._carry, args=(onward, connection), daemon=True)
            back.start()
            self._carry(connection, onward)
            back.join(5)

    @staticmethod
    def _carry(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.mark.parametrize("reach", ["service", "public"])
def test_a_proxy_leads_to_where_it_knows_the_name_and_sees_no_key(
    tls_server: TlsServer, names: dict[str, list[Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reach: str
) -> None:
    del names[NAME]  # the proxy alone knows it
    tls_server.authority.cert_pem.write_to_path(str(tmp_path / "own.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
    with Tunnel(tls_server.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        answer = answered(tls_server, Answer(body=b"ok"), headers={"Authorization": f"Bearer {TEST_KEY}"}, reach=reach)
    assert answer.body == b"ok" and tls_server.requests[0].header("authorization") == f"Bearer {TEST_KEY}"
    (head,) = proxy.heads
    assert head.startswith(b"CONNECT ") and TEST_KEY.encode() not in head


def test_what_left_through_a_proxy_may_have_been_billed(
    tls_server: TlsServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tls_server.authority.cert_pem.write_to_path(str(tmp_path / "own.pem"))
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "own.pem"))
    with Tunnel(tls_server.port) as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"http://127.0.0.1:{proxy.port}")
        lost(tls_server, Answer(hang_up="after-reading"))
    assert len(tls_server.requests) == 1


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_loopback_is_reached_without_a_proxy(server: FaultServer, monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{closed_port()}")
    server.play("/x", Answer(body=b"ok"))
    assert asked(f"http://{host}:{server.port}/x").body == b"ok"


@pytest.mark.parametrize("proxy", ["http://user:hunter2@[::1", "http://user:hunter2@:x", "nonsense://hunter2"])
def test_a_proxy_that_cannot_be_used_is_told_without_its_password(
    names: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch, proxy: str
) -> None:
    monkeypatch.setenv("HTTPS_PROXY", proxy)
    error = not_sent(f"https://{NAME}/x")
    assert error.lasting and "proxy" in error.reason and "hunter2" not in error.reason


# Where a call may lead ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("address", ["127.0.0.1", "10.0.0.1", "169.254.169.254", "::1", "fe80::1%1", "::ffff:10.0.0.1"])
def test_a_public_name_never_leads_into_a_private_network(names: dict[str, list[Any]], address: str) -> None:
    names[NAME] = [address]
    error = not_sent(f"https://{NAME}/x", reach="public")
    assert error.refused and error.lasting and address.partition("%")[0] in error.reason


@pytest.mark.parametrize(
    ("address", "goes"),
    [
        *(("127.0.0.1", False), ("::1", False), ("169.254.169.254", False), ("fe80::1", False)),
        *(("10.0.0.1", True), ("93.184.216.34", True)),
    ],
)
def test_a_host_of_the_service_is_no_part_of_this_machine(address: str, goes: bool) -> None:
    """It may lie in a private network, and its certificate says that it is the host."""
    assert wire.REACH["vendor"](ipaddress.ip_address(address)) is goes


@pytest.mark.parametrize("address", ["10.0.0.1", "93.184.216.34"])
def test_what_is_on_this_machine_never_leads_off_it(names: dict[str, list[Any]], address: str) -> None:
    names["localhost"] = [address]
    error = not_sent("http://localhost:1/x", reach="loopback")
    assert error.refused and error.lasting


def test_every_address_of_a_name_is_tried(server: FaultServer, names: dict[str, list[Any]]) -> None:
    names[NAME] = [("127.0.0.1", closed_port()), ("127.0.0.1", server.port)]
    server.play("/x", Answer(body=b"ok"))
    assert asked(f"http://{NAME}/x").body == b"ok"
    assert server.connections == 1


@pytest.fixture
def deaf_port() -> Iterator[int]:
    """A port at which a connection is neither made nor refused: nobody takes those that wait there."""
    if sys.platform != "linux":
        pytest.skip("other systems refuse those for whom there is no room, or have room for many")
    with contextlib.ExitStack() as stack:
        port: int = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0)).getsockname()[1]
        for _ in range(3):
            waiting = stack.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        yield port


def test_a_connection_is_tried_no_longer_than_the_time_that_is_left(deaf_port: int) -> None:
    began = time.monotonic()
    error = not_sent(f"http://127.0.0.1:{deaf_port}/x", stop=Stop(SOON))
    assert "time" in error.reason and SOON / 2 < time.monotonic() - began < 5


def test_an_address_that_does_not_answer_leaves_time_for_the_next(
    server: FaultServer, deaf_port: int, names: dict[str, list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(wire, "CONNECT_TIMEOUT", SOON)
    assert "timed out" in not_sent(f"http://127.0.0.1:{deaf_port}/x").reason
    names[NAME] = [("127.0.0.1", deaf_port), ("127.0.0.1", server.port)]
    server.play("/x", Answer(body=b"ok"))
    assert asked(f"http://{NAME}/x").body == b"ok"


def test_a_connection_sends_at_once_and_may_be_answered_as_late_as_its_time_allows(server: FaultServer) -> None:
    wired = Wire(HttpCall("GET", f"{server.root}/x", {}), Stop(50), "service")
    with wired.open("127.0.0.1", server.port) as connection:
        assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        timeout = connection.gettimeout()
        assert timeout is not None and CONNECT_TIMEOUT < timeout <= 50
        assert wired.connecting and not wired.connected
    wired.close()


@pytest.mark.parametrize(
    "answer", [Answer(body=b"ok"), Answer(hang_up="after-reading"), Answer(status=302, headers=(("Location", "/y"),))]
)
def test_nothing_stays_open(server: FaultServer, answer: Answer) -> None:
    with contextlib.suppress(AnswerLost):
        answered(server, answer)
    server.wait_until(lambda: not server._open, 2)


# What of an answer is taken -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("size", [1, LIMIT])
def test_an_answer_may_be_as_large_as_the_limit(server: FaultServer, framing: Any, size: int) -> None:
    answer = answered(server, Answer(body=b"x" * size, framing=framing))
    assert (answer.body, answer.whole) == (b"x" * size, True)


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_an_answer_beyond_the_limit_is_not_taken(server: FaultServer, framing: Any) -> None:
    with pytest.raises(AnswerTooLarge):
        answered(server, Answer(body=b"x" * (LIMIT + 1), framing=framing))


def test_an_answer_that_is_announced_as_too_large_is_not_waited_for(server: FaultServer) -> None:
    began = time.monotonic()
    with pytest.raises(AnswerTooLarge):
        answered(server, Answer(body=b"x", claimed_length=LIMIT + 1, dribble_body_s=5))
    assert time.monotonic() - began < 3


def test_an_announced_length_that_is_no_number_is_no_limit(server: FaultServer) -> None:
    body = b"HTTP/1.1 200 OK\r\nContent-Length: %s\r\nConnection: close\r\n\r\nok"
    for length in (b"many", b"9" * 5000):
        server.at_connection(Answer(raw=body % length))
        assert asked(f"{server.root}/x").body == b"ok"


def test_an_answer_without_an_end_is_not_read_for_ever(server: FaultServer) -> None:
    with pytest.raises(AnswerTooLarge):
        answered(server, Answer(framing="close", repeat=b"x" * 1000))


@pytest.mark.parametrize("status", [300, 400, 500])
def test_of_a_refusal_the_beginning_is_enough(server: FaultServer, status: int) -> None:
    answer = answered(server, Answer(status=status, framing="close", repeat=b"x" * 65536), limit=10)
    assert MAX_ERROR_BYTES < len(answer.body) < 2 * MAX_ERROR_BYTES
    assert answered(server, Answer(status=status, body=b"no" * 100), limit=10).body == b"no" * 100


def test_a_refusal_is_told_whatever_length_it_announces(server: FaultServer) -> None:
    answer = answered(server, Answer(status=503, body=b"busy", claimed_length=2 * MAX_ERROR_BYTES))
    assert (answer.status, answer.body, answer.whole) == (503, b"busy", False)


def test_a_good_status_is_below_300(server: FaultServer) -> None:
    with pytest.raises(AnswerTooLarge):
        answered(server, Answer(status=299, body=b"x" * 11), limit=10)


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_of_an_answer_that_breaks_off_what_had_come_is_kept(server: FaultServer, framing: Any) -> None:
    """It may hold the link to a picture that was paid for."""
    text = b'{"image": "https://images.example/a.png", ' + b"x" * 900
    answer = answered(server, Answer(body=text, framing=framing, cut_after=300), limit=10_000)
    kept = text[:300] if framing == "length" else text[: 300 - len(b"%x\r\n" % len(text))]
    assert (answer.status, answer.body, answer.whole) == (200, kept, False)


def test_chunks_without_their_end_are_not_whole(server: FaultServer) -> None:
    answer = answered(server, Answer(body=b"x" * 50, framing="chunked-without-end"))
    assert (answer.body, answer.whole) == (b"x" * 50, False)


@pytest.mark.skipif(sys.platform == "win32", reason="Windows throws away what had come before a reset")
@pytest.mark.parametrize("framing", ["length", "close"])
def test_a_reset_is_no_end_of_an_answer(server: FaultServer, framing: Any) -> None:
    answer = answered(server, Answer(body=b"x" * 50, claimed_length=60, framing=framing, reset=True))
    assert (answer.status, answer.body, answer.whole) == (200, b"x" * 50, False)


@pytest.mark.parametrize("framing", ["length", "close"])
def test_an_answer_that_the_time_cuts_is_not_whole_even_where_its_end_looks_like_one(
    server: FaultServer, framing: Any
) -> None:
    answer = answered(server, Answer(body=b"x" * 100, framing=framing, dribble_body_s=0.05), stop=Stop(SOON))
    assert answer.status == 200 and 0 < len(answer.body) < 100 and not answer.whole


@pytest.mark.parametrize(("headers", "whole"), [((), False), ((("Content-Length", "0"),), True)])
def test_headers_that_break_off_are_no_empty_answer(server: FaultServer, headers: Any, whole: bool) -> None:
    answer = answered(server, Answer(framing="close", headers=headers))
    assert (answer.body, answer.whole) == (b"", whole)
    assert answered(server, Answer(framing="chunked")).whole


@pytest.mark.parametrize("status", [300, 301, 302, 307, 308, 399])
def test_a_redirect_is_told_and_neither_followed_nor_read(server: FaultServer, status: int) -> None:
    answer = answered(server, Answer(status=status, headers=(("Location", "/y"),), body=b"x", claimed_length=10**9))
    assert (answer.status, answer.headers["location"], answer.body) == (status, "/y", b"")
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [201, 299, 400])
def test_what_is_no_redirect_is_read_whatever_it_names(server: FaultServer, status: int) -> None:
    assert answered(server, Answer(status=status, headers=(("Location", "/y"),), body=b"ok")).body == b"ok"


def test_a_redirect_that_leads_nowhere_is_read(server: FaultServer) -> None:
    assert answered(server, Answer(status=302, body=b"why")).body == b"why"


@pytest.mark.parametrize("hints", [[100], [102], [103], [103, 103, 100], [199]])
def test_what_a_server_says_before_its_answer_is_no_answer(server: FaultServer, hints: list[int]) -> None:
    before = b"".join(b"HTTP/1.1 %d Wait\r\nLink: </a.css>\r\n\r\n" % hint for hint in hints)
    server.at_connection(Answer(raw=before + b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"))
    answer = asked(f"{server.root}/x")
    assert (answer.status, answer.body) == (200, b"ok")


def test_a_switch_of_protocols_is_an_answer_that_nobody_asked_for(server: FaultServer) -> None:
    server.at_connection(Answer(raw=b"HTTP/1.1 101 Switching\r\nUpgrade: x\r\n\r\n"))
    assert asked(f"{server.root}/x").status == 101


# What is packed -------------------------------------------------------------------------------------------------------


def packed(coding: str, body: bytes, status: int = 200) -> Answer:
    return Answer(status=status, headers=(("Content-Encoding", coding), ("X-Request-Id", "r-1")), body=body)


@pytest.mark.parametrize("coding", ["gzip", "GZIP", " x-gzip "])
def test_a_gateway_that_packs_unasked_hides_no_picture(server: FaultServer, coding: str) -> None:
    answer = answered(server, packed(coding, gzip.compress(b"picture")))
    assert (answer.body, answer.whole) == (b"picture", True)


@pytest.mark.parametrize("coding", ["gzip", "identity", ""])
def test_what_is_not_packed_is_taken_as_it_is(server: FaultServer, coding: str) -> None:
    assert answered(server, packed(coding, b"plain")).body == b"plain"


def test_one_layer_is_unpacked_and_no_more(server: FaultServer) -> None:
    inner = gzip.compress(b"picture")
    assert answered(server, packed("gzip", gzip.compress(inner))).body == inner


def test_a_packed_answer_that_breaks_off_leaves_what_had_come(server: FaultServer) -> None:
    text = json.dumps([str(zlib.crc32(b"%d" % number)) for number in range(50)]).encode()
    content = gzip.compress(text)
    answer = answered(server, packed("gzip", content[: len(content) // 2]))
    assert answer.body and text.startswith(answer.body) and not answer.whole
    whole = answered(server, replace(packed("gzip", content), claimed_length=len(content) + 1))
    assert (whole.body, whole.whole) == (text, False)  # the end of one is not that of the other


def test_what_repeats_itself_from_afar_is_unpacked(server: FaultServer) -> None:
    text = random.Random(1).randbytes(30_000) * 2  # the window of gzip is 32 KiB
    assert answered(server, packed("gzip", gzip.compress(text)), limit=len(text)).body == text


def test_what_cannot_be_unpacked_is_empty_and_not_whole(server: FaultServer) -> None:
    answer = answered(server, packed("gzip", b"\x1f\x8b" + b"\xff" * 50))
    assert (answer.body, answer.whole) == (b"", False)


@pytest.mark.parametrize(("status", "size"), [(200, LIMIT), (299, LIMIT)])
def test_what_is_unpacked_is_held_to_the_same_limit(server: FaultServer, status: int, size: int) -> None:
    answer = answered(server, packed("gzip", gzip.compress(bytes(size)), status))
    assert (answer.body, answer.whole) == (bytes(size), True)
    with pytest.raises(AnswerTooLarge):
        answered(server, packed("gzip", gzip.compress(bytes(size + 1)), status))


@pytest.mark.parametrize("status", [300, 500])
def test_of_a_packed_refusal_the_beginning_is_enough(server: FaultServer, status: int) -> None:
    answer = answered(server, packed("gzip", gzip.compress(bytes(2 * MAX_ERROR_BYTES)), status))
    assert len(answer.body) == MAX_ERROR_BYTES


@pytest.mark.parametrize("status", [200, 299])
@pytest.mark.parametrize("coding", ["br", "zstd", "gzip, gzip", "deflate"])
def test_what_is_packed_in_another_way_is_told_by_its_name(server: FaultServer, coding: str, status: int) -> None:
    with pytest.raises(AnswerEncoded) as caught:
        answered(server, packed(coding, b"...", status))
    assert coding in caught.value.reason and caught.value.request_id == "r-1"


@pytest.mark.parametrize("status", [300, 503])
def test_a_refusal_that_cannot_be_read_is_a_refusal_all_the_same(server: FaultServer, status: int) -> None:
    answer = answered(server, packed("br", b"...", status))
    assert (answer.status, answer.body) == (status, b"")


# Ending early ---------------------------------------------------------------------------------------------------------


def test_a_signal_before_the_call_sends_nothing(server: FaultServer) -> None:
    stop = Stop(20)
    stop.request("SIGINT")
    with pytest.raises(Stopped) as caught:
        answered(server, Answer(), stop=stop)
    assert not caught.value.request_left and server.connections == 0


@pytest.mark.parametrize("begun", [False, True], ids=["no answer yet", "within the answer"])
def test_a_signal_while_the_answer_is_awaited_says_that_the_request_left(server: FaultServer, begun: bool) -> None:
    stop = Stop(20)

    def answer(request: Received) -> Answer:
        threading.Timer(0.1, end_now, (stop, "SIGTERM")).start()
        return Answer(body=b"x" * 100, dribble_body_s=1, quick=10) if begun else Answer(delay_s=30)

    began = time.monotonic()
    with pytest.raises(Stopped) as caught:
        answered(server, answer, stop=stop)
    assert (caught.value.reason, caught.value.request_left) == ("SIGTERM", True)
    assert time.monotonic() - began < 5


def test_a_signal_while_a_connection_is_made_says_that_nothing_left(server: FaultServer) -> None:
    stop = Stop(20)
    server.at_connection(Answer(delay_s=30))
    threading.Timer(0.1, end_now, (stop, "SIGTERM")).start()
    with pytest.raises(Stopped) as caught:
        asked(f"https://127.0.0.1:{server.port}/x", stop=stop)
    assert (caught.value.reason, caught.value.request_left) == ("SIGTERM", False)


@pytest.mark.usefixtures("slept")
def test_an_answer_that_came_whole_wins_over_a_signal(server: FaultServer) -> None:
    stop = Stop(20)

    def answer(request: Received) -> Answer:
        stop.request("SIGTERM")
        return Answer(body=b"paid for")

    said = answered(server, answer, stop=stop)
    assert (said.body, said.whole) == (b"paid for", True)


# What it is to the command --------------------------------------------------------------------------------------------


def endpoint_of(server: FaultServer, host: str = "127.0.0.1") -> Endpoint:
    return Endpoint(server.root, f"{server.root}/x", host, "beijing")


def failed(server: FaultServer, answer: Answer | None = None, limit: int = LIMIT, url: str = "", **how: Any) -> Failure:
    server.play("/x", answer or Answer())
    call = HttpCall("GET", url or f"{server.root}/x", {})
    with pytest.raises(Failure) as caught:
        ask(call, lambda answer: answer, how.pop("stop", Stop(20)), endpoint_of(server, **how), limit)
    assert caught.value.__suppress_context__
    return caught.value


def test_what_an_answer_means_is_for_the_provider_to_say(server: FaultServer) -> None:
    server.play("/x", Answer(status=418, body=b"tea"))
    said = ask(HttpCall("GET", f"{server.root}/x", {}), lambda a: (a.status, a.body), Stop(20), endpoint_of(server))
    assert said == (418, b"tea")


def test_work_in_this_process_is_done_by_its_time(server: FaultServer) -> None:
    stop = Stop(20)
    assert ask(LocalCall(lambda until: until == stop.until), lambda answer: answer, stop, endpoint_of(server)) is True  # type: ignore[comparison-overlap]


def test_what_was_not_sent_may_be_sent_again(server: FaultServer) -> None:
    failure = failed(server, url=f"http://127.0.0.1:{closed_port()}/x")
    fault = failure.fault
    assert (fault.code, fault.exit_code, fault.billed, fault.retryable) == ("unreachable", 6, "no", True)
    assert fault.message.startswith("127.0.0.1: ")


def test_what_will_fail_again_is_not_tried_again(tls_server: TlsServer) -> None:
    fault = failed(tls_server, host=NAME).fault
    assert (fault.code, fault.billed, fault.retryable) == ("unreachable", "no", False)
    assert fault.message.startswith(f"{NAME}: ")


def test_what_may_have_been_billed_is_never_sent_again(server: FaultServer) -> None:
    fault = failed(server, Answer(hang_up="after-reading")).fault
    assert (fault.code, fault.exit_code, fault.billed, fault.retryable) == ("outcome_unknown", 7, "unknown", False)
    assert fault.message.startswith("127.0.0.1: ")


def test_an_answer_that_is_too_large_is_told_with_the_limit(server: FaultServer) -> None:
    fault = failed(server, Answer(claimed_length=3 * MIB), limit=2 * MIB).fault
    assert (fault.code, fault.exit_code, fault.billed) == ("answer_unusable", 8, "unknown")
    assert "2 MiB" in fault.message


def test_an_answer_is_taken_up_to_four_mebibytes(server: FaultServer) -> None:
    assert MAX_ANSWER_BYTES == 4 * MIB
    server.play("/x", Answer(claimed_length=4 * MIB + 1))
    with pytest.raises(Failure, match="4 MiB"):
        ask(HttpCall("GET", f"{server.root}/x", {}), lambda answer: answer, Stop(20), endpoint_of(server))


@pytest.mark.parametrize(("headers", "known"), [((("X-Request-Id", "r-1"),), "r-1"), ((), None)])
def test_an_answer_that_cannot_be_read_keeps_the_services_name_for_it(
    server: FaultServer, headers: tuple[tuple[str, str], ...], known: str | None
) -> None:
    fault = failed(server, Answer(headers=(("Content-Encoding", "br"), *headers), body=b"...")).fault
    assert (fault.code, fault.billed, fault.request_id) == ("answer_unusable", "unknown", known)
    assert "br" in fault.message


def test_a_service_on_this_machine_is_looked_for_on_this_machine_only(
    server: FaultServer, names: dict[str, list[Any]]
) -> None:
    names["localhost"] = ["10.0.0.1"]
    fault = failed(server, url="http://localhost:1/x", host="localhost", stop=Stop(SOON)).fault
    assert fault.code == "unreachable" and not fault.retryable and "10.0.0.1" in fault.message


# Proxies: what is held and let go on the way --------------------------------------------------------------------------


def test_a_proxy_that_says_nothing_to_connect_is_late(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTPS_PROXY", server.root)
    server.at_connection(Answer(delay_s=30))
    error = not_sent("https://gpu.lan/x", stop=Stop(SOON))
    assert "no connection was made in time" in error.reason and str(server.port) in error.reason


@pytest.mark.parametrize("trusted", [True, False])
def test_a_proxy_behind_tls_is_trusted_by_the_same_authorities(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, trusted: bool
) -> None:
    with TlsServer("127.0.0.1") as proxy:
        monkeypatch.setenv("HTTPS_PROXY", f"https://127.0.0.1:{proxy.port}")
        bundle = tmp_path / "ca.pem"
        (proxy.authority if trusted else trustme.CA()).cert_pem.write_to_path(str(bundle))
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(bundle))
        error = not_sent("https://gpu.lan/x")
        assert ("certificate" not in error.reason) is trusted
        assert [request.method for request in proxy.requests] == ["CONNECT"] * trusted


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), Stopped("SIGTERM"), KeyboardInterrupt()], ids=repr)
def test_a_socket_to_a_socks_proxy_is_closed_whatever_ends_it(
    monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    made: list[socket.socket] = []

    class Refused(socket.socket):
        def connect(self, address: Any) -> None:
            raise error

    def socks_socket(proxy: object, family: int, address: str) -> socket.socket:
        made.append(Refused(family, socket.SOCK_STREAM))
        return made[-1]

    monkeypatch.setattr(wire, "socks_socket", socks_socket)
    monkeypatch.setenv("ALL_PROXY", "socks5h://127.0.0.1:1")
    with pytest.raises((NotSent, Stopped, KeyboardInterrupt)):
        asked("https://gpu.lan/x")
    assert [connection.fileno() for connection in made] == [-1]


@pytest.mark.parametrize("error", [ConnectionResetError("reset"), Stopped("SIGTERM"), KeyboardInterrupt()], ids=repr)
def test_a_socket_is_closed_whatever_ends_it(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    made: list[socket.socket] = []

    def start(self: Wire, connection: socket.socket) -> None:
        made.append(connection)
        raise error

    monkeypatch.setattr(Wire, "_start", start)
    with pytest.raises((NotSent, Stopped, KeyboardInterrupt)):
        asked(f"{server.root}/x")
    assert [connection.fileno() for connection in made] == [-1]


@pytest.mark.parametrize(("body", "found"), [(b'{"task_id": 507500, "request_id": "r', 507500), (b'{"task', None)])
def test_of_an_answer_that_a_signal_cuts_what_had_come_counts(
    server: FaultServer, body: bytes, found: int | None
) -> None:
    """The name of a task, or a link, may have come: it was paid for."""
    server.play("/x", Answer(body=body + b" " * 300, framing="close", dribble_body_s=0.01))
    stop = Stop(20)

    def read(answer: HttpAnswer) -> Any:
        named = (read_begun_json(answer) or {}).get("task_id")
        if named is None:
            raise Failure("answer_unusable", "it names no task")
        return named

    def signalled() -> None:
        stop.request("SIGTERM")
        WATCHER._wake(0)  # as the handler of a signal does

    threading.Timer(0.01 * len(body) + 0.4, signalled).start()
    endpoint = endpoint_of(server)
    if found is None:
        with pytest.raises(Stopped) as caught:
            ask(HttpCall("POST", f"{server.root}/x", {}), read, stop, endpoint)
        assert (caught.value.reason, caught.value.request_left) == ("SIGTERM", True)
    else:
        assert ask(HttpCall("POST", f"{server.root}/x", {}), read, stop, endpoint) == found


def test_a_server_that_does_not_say_what_it_is_stops_nobody(server: FaultServer) -> None:
    server.play("/v1/models", Answer(status=500))
    endpoint = Endpoint(f"{server.root}/v1", f"{server.root}/v1/images/generations", "127.0.0.1", "self-hosted")
    assert get_to_know(OpenAI(), endpoint, NO_KEY, Stop(20)) is None
    with socket.create_server(("127.0.0.1", 0)) as closed:
        root = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
    unreached = get_to_know(OpenAI(), endpoint._replace(root=root), NO_KEY, Stop(20))
    assert unreached is not None and unreached.code == "unreachable"


def test_a_coding_that_was_not_asked_for_is_named_in_bounds() -> None:
    error = AnswerEncoded("x" * 100, "r" * 300)
    assert (error.reason.count("x"), len(error.request_id)) == (59, 200)  # and a sign that it was cut


def test_of_a_certificate_that_was_revoked_the_owner_is_told_by_the_name_of_the_host() -> None:
    error = ssl.SSLCertVerificationError(1, "revoked")
    error.verify_code, error.verify_message = 23, "certificate revoked"
    fault = Wire(HttpCall("GET", f"https://{NAME}/x", {}), Stop(20), "service", None).tls_fault(error)
    assert f"the owner of {NAME}" in str(fault.hint)


def test_the_limit_of_an_answer_is_told_in_mebibytes(server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> None:
    def too_large(*_: Any, **__: Any) -> HttpAnswer:
        raise AnswerTooLarge

    monkeypatch.setattr(transport, "exchange", too_large)
    assert failed(server, limit=3 * MIB).message == "the answer is larger than 3 MiB"


@pytest.mark.parametrize(("left_s", "share"), [(8.0, 8.0 * ASKING_SHARE), (6000.0, ASKING_TIME)])
def test_a_server_has_a_small_share_of_the_time_to_say_what_it_is(
    server: FaultServer, monkeypatch: pytest.MonkeyPatch, left_s: float, share: float
) -> None:
    given: list[float] = []

    def ask(call: Any, read: Any, stop: Stop, endpoint: Endpoint) -> None:
        given.append(stop.left_s)
        raise Failure("outcome_unknown", "silent")

    monkeypatch.setattr(transport, "ask", ask)
    get_to_know(OpenAI(), endpoint_of(server), NO_KEY, Stop(left_s))
    assert given and max(given) == pytest.approx(share, abs=0.1)


def test_a_page_leads_to_the_base_url_and_an_api_speaks_for_itself(server: FaultServer) -> None:
    def read(answer: HttpAnswer) -> None:
        raise Failure("rejected_by_service", "no", hint="so", http_status=answer.status)

    hints = []
    for body in (b"<html>not here</html>", b'{"error": "not here"}'):
        server.play("/x", Answer(status=404, body=body))
        with pytest.raises(Failure) as caught:
            ask(HttpCall("GET", f"{server.root}/x", {}), read, Stop(20), endpoint_of(server))
        hints.append(caught.value.fault.hint)
    assert hints[0].endswith("; so") and hints[1] == "so"


def test_what_nobody_knows_may_have_been_billed() -> None:
    nowhere = SimpleNamespace(failure=None, connecting=False, connected=False, expired=False)
    assert isinstance(transport._transport_failure(nowhere, RuntimeError()), AnswerLost)  # type: ignore[arg-type]


def test_of_a_chunk_that_breaks_off_the_bytes_are_taken_and_no_count_of_them() -> None:
    counted, held = http.client.IncompleteRead(7), http.client.IncompleteRead(b"begun")  # type: ignore[arg-type]
    counted.__context__ = held
    assert transport._begun_chunk(counted) == b"begun" and transport._begun_chunk(OSError()) == b""
