"""Transport: one HTTP exchange, with a deadline that holds and a sure word on whether it left."""

from __future__ import annotations

import contextlib
import functools
import io
import ipaddress
import os
import socket
import threading
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlsplit

from zimage.contract import CONNECT_TIMEOUT, MAX_ANSWER_BYTES, MAX_ERROR_BYTES, MIB, SKILL, VERSION
from zimage.endpoint import _is_address, is_loopback_address, is_loopback_host, is_public_address
from zimage.errors import Failure, os_reason
from zimage.outside import outside_text
from zimage.provider import HttpAnswer, LocalCall
from zimage.waiting import WATCHER, Late, Stop, Stopped, in_time

if TYPE_CHECKING:
    from zimage.endpoint import Endpoint
    from zimage.provider import HttpCall


class NotSent(Exception):
    """The request surely did not reach the service. `lasting`: trying again at once will not help."""

    def __init__(self, reason: str, *, lasting: bool = False, refused: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting
        self.refused = refused  # by our own rules, not by the network


class AnswerLost(Exception):
    """The request left, and no whole answer came back."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class AnswerTooLarge(Exception):
    """The answer is larger than this tool takes."""


class AnswerEncoded(Exception):
    """The answer is packed in a way that was not asked for and is not unpacked here."""

    def __init__(self, coding: str, request_id: str) -> None:
        super().__init__(coding)
        self.reason = f"it is encoded as {outside_text(coding, 60)}, which was not asked for"
        self.request_id = outside_text(request_id, 200)


REACH: dict[str, Callable[[ipaddress.IPv4Address | ipaddress.IPv6Address], bool]] = {
    # Which resolved addresses a call may connect to.
    "service": lambda address: True,  # the host was checked by name; private service endpoints exist
    "public": lambda address: is_public_address(address),
    "loopback": is_loopback_address,
}


class Wire:
    """The connection of one exchange: opens it, knows whether the request left, and cuts it at the deadline.

    Connections are never reused: one that idled for seconds may be closed by the service just as a paid
    request leaves on it.
    """

    def __init__(self, call: HttpCall, stop: Stop, reach: str) -> None:
        self.target = request_target(call.url)
        self.stop = stop
        self.reach = reach
        self.connecting = False
        self.connected = False
        self.expired = False
        self.broken = False  # by a fault, not by an end
        self.failure: BaseException | None = None
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    @property
    def remaining(self) -> float:
        return max(0.001, self.stop.left_s)

    def open(self, host: str, port: int, *, by_proxy: bool) -> socket.socket:
        """Resolve, check and connect; what goes wrong is kept in `failure` and raised as OSError."""
        self.connecting = True
        try:
            connection = self._connect(self._resolve(host, port), by_proxy)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.settimeout(self.remaining)
            return connection
        except Exception as error:
            self.failure = error
            raise OSError(str(error)) from error

    def _resolve(self, host: str, port: int) -> list[tuple[Any, ...]]:
        """Addresses of a host; a name server that does not answer must not hold the command."""

        def look_up() -> list[tuple[Any, ...]]:
            return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))

        try:
            return look_up() if _is_address(host) else self.stop.in_thread(look_up)
        except Late:
            raise NotSent("its name was not resolved in time") from None
        except (OSError, UnicodeError):
            raise NotSent("its name cannot be resolved") from None

    def _connect(self, addresses: list[tuple[Any, ...]], by_proxy: bool) -> socket.socket:
        reason = "no address"
        for family, kind, protocol, _, address in addresses:
            if not by_proxy and not REACH[self.reach](ipaddress.ip_address(address[0].partition("%")[0])):
                raise NotSent(f"{address[0]} is not an address that may be fetched from", lasting=True, refused=True)
            connection = socket.socket(family, kind, protocol)
            try:
                connection.settimeout(min(CONNECT_TIMEOUT, self.remaining))
                self._hold(connection)
                connection.connect(address)
                return connection
            except OSError as error:
                connection.close()
                reason = "connection timed out" if isinstance(error, TimeoutError) else os_reason(error)
            except BaseException:
                connection.close()
                raise
        raise NotSent(reason)

    def _hold(self, connection: socket.socket) -> None:
        """Have a copy that `cut` can end: while it connects, and when TLS has taken the original over."""
        self.close()
        with self._lock:
            self._socket = connection.dup()

    def cut(self) -> None:
        """End the exchange, whatever the other side still dribbles: its time is over, or its stop has ended."""
        self.expired = True
        with self._lock, contextlib.suppress(OSError):
            if self._socket is not None:
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        with self._lock:
            if self._socket is not None:
                self._socket.close()
                self._socket = None


def request_target(url: str) -> str:
    """Path and query of a URL, byte by byte as they stand; only what is beyond ASCII is encoded."""
    target = url.partition("#")[0].partition("://")[2][len(urlsplit(url).netloc) :]
    target = target if target.startswith("/") else f"/{target}"
    return "".join(sign if sign.isascii() else quote(sign) for sign in target)


@functools.cache
def wired_adapter() -> Any:
    """The class of requests' adapter for one exchange, `WiredAdapter(wire)`: all its connections go through the wire.

    An adapter without a session: no cookies, no environment, no .netrc, no redirects whose bodies are read.
    """
    import http.client
    import io

    from requests.adapters import HTTPAdapter
    from urllib3.connection import HTTPConnection, HTTPSConnection
    from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool

    class Arriving(io.RawIOBase):
        """What a socket receives. Its fault is an end: raised within a read, it would take with it what had come."""

        def __init__(self, received: io.RawIOBase, wire: Wire) -> None:
            self._received, self._wire = received, wire

        def readable(self) -> bool:
            return True

        def readinto(self, buffer: Any) -> int | None:
            try:
                return self._received.readinto(buffer)
            except OSError as error:
                self._wire.broken = True
                self._wire.expired = self._wire.expired or isinstance(error, TimeoutError)
                return 0

        def close(self) -> None:
            self._received.close()
            super().close()

    class FinalAnswer(http.client.HTTPResponse):
        def __init__(self, connection: socket.socket, *args: Any, wire: Wire, **kwargs: Any) -> None:
            super().__init__(connection, *args, **kwargs)
            self.fp = io.BufferedReader(Arriving(self.fp.detach(), wire))

        def _read_status(self) -> tuple[str, int, str]:
            # http.client passes over 100 only, and would take 103 Early Hints for the answer to a paid call.
            version, status, reason = super()._read_status()  # type: ignore[misc]
            return version, http.client.CONTINUE if 101 < status < 200 else status, reason

    class Wired:
        def __init__(self, *args: Any, wire: Wire, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._wire = wire
            self.response_class: Any = functools.partial(FinalAnswer, wire=wire)

        def _new_conn(self) -> socket.socket:
            host: Any = self
            return self._wire.open(host._dns_host, host.port, by_proxy=getattr(host, "proxy", None) is not None)

        def connect(self) -> None:
            super().connect()  # type: ignore[misc]
            if self._wire.expired or self._wire.stop.left_s <= 0:  # the machine may have slept
                self._wire.expired = True
                raise OSError("the deadline passed while connecting")
            self._wire.connected = True  # from here on the service may have seen the request

        def putrequest(
            self, method: str, url: str, skip_host: bool = False, skip_accept_encoding: bool = False
        ) -> None:
            # The libraries rewrite a URL on its way here; a signature may hold for its very bytes only.
            super().putrequest(method, self._wire.target, skip_host, skip_accept_encoding)  # type: ignore[misc]

    class PlainConnection(Wired, HTTPConnection):
        pass

    class TlsConnection(Wired, HTTPSConnection):
        pass

    def pools(wire: Wire) -> dict[str, Any]:
        """What makes connection pools, by scheme."""

        def plain(*args: Any, **kwargs: Any) -> HTTPConnectionPool:
            pool = HTTPConnectionPool(*args, **kwargs)
            pool.ConnectionCls = functools.partial(PlainConnection, wire=wire)  # type: ignore[assignment]
            return pool

        def tls(*args: Any, **kwargs: Any) -> HTTPSConnectionPool:
            pool = HTTPSConnectionPool(*args, **kwargs)
            pool.ConnectionCls = functools.partial(TlsConnection, wire=wire)  # type: ignore[assignment]
            return pool

        return {"http": plain, "https": tls}

    class WiredAdapter(HTTPAdapter):
        def __init__(self, wire: Wire) -> None:
            self._wire = wire
            super().__init__()

        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = pools(self._wire)

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(*args, **kwargs)
            manager.pool_classes_by_scheme = pools(self._wire)
            return manager

    return WiredAdapter


def exchange(call: HttpCall, stop: Stop, *, limit: int, reach: str) -> HttpAnswer:
    """Send one request and read its whole answer. No redirect is followed, nothing is sent twice.

    `limit` is a number of bytes, `reach` a key of REACH. An answer that has arrived whole wins over a signal: what was
    paid for is put on disk first, the next wait gives way.

    Raises:
        NotSent, AnswerLost, AnswerTooLarge, AnswerEncoded, Stopped.
    """
    import requests
    import urllib3

    stop.check()
    wire = Wire(call, stop, reach)
    host = urlsplit(call.url).hostname or ""
    proxies = {} if is_loopback_host(host) else requests.utils.get_environ_proxies(call.url)
    headers = {"User-Agent": f"{SKILL}/{VERSION}", "Accept-Encoding": "identity", "Connection": "close"} | call.headers
    try:
        request = requests.Request(call.method, call.url, headers=headers, data=call.body).prepare()
        adapter = wired_adapter()(wire)
        with contextlib.closing(adapter), WATCHER.cutting(stop, wire.cut):
            response = adapter.send(request, stream=True, timeout=wire.remaining, proxies=proxies, verify=ca_bundle())
            answer = _read_answer(response, limit)
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError, ValueError) as error:
        if stop.reason:
            raise Stopped(stop.reason, request_left=wire.connected) from None
        raise _transport_failure(wire, error) from None
    finally:
        wire.close()
    if stop.reason and wire.expired:
        raise Stopped(stop.reason, request_left=True)
    return answer._replace(whole=answer.whole and not (wire.expired or wire.broken))  # which look like an end


def ca_bundle() -> str | bool:
    """The certificates to trust: those the user's environment names, else the ones requests brings."""
    for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE"):
        if os.environ.get(name):
            return os.environ[name]
    return True


def _read_answer(response: Any, limit: int) -> HttpAnswer:
    import requests
    import urllib3

    headers = {name.lower(): value for name, value in response.headers.items()}
    if 300 <= response.status_code < 400 and "location" in headers:
        return HttpAnswer(response.status_code, headers, b"")  # all that a redirect says is said
    is_good = response.status_code < 300
    limit = limit if is_good else MAX_ERROR_BYTES  # the status alone says enough
    body = io.BytesIO()  # hands its bytes out without a copy
    whole = True
    # Left to itself, urllib3 throws away the beginning of a body that breaks off: it may hold the link.
    response.raw.enforce_content_length = False
    # And it unpacks what was packed, as often as the server says.
    coding = response.raw.headers.pop("content-encoding", "").strip().lower()
    announced = headers.get("content-length", "")
    if is_good and announced.isdecimal() and len(announced) < 19 and int(announced) > limit:
        raise AnswerTooLarge
    try:
        for chunk in response.raw.stream(64 * 1024, decode_content=False):
            body.write(chunk)
            if body.tell() > limit and is_good:
                raise AnswerTooLarge
            if body.tell() > limit:
                break
        whole = not response.raw.length_remaining
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        body.write(_begun_chunk(error))
        whole = False
    if not body.tell() and not {"content-length", "transfer-encoding"} & headers.keys():
        whole = False  # nothing announced and nothing sent: the headers broke off
    return _unpacked(HttpAnswer(response.status_code, headers, body.getvalue(), whole), coding, limit)


def _unpacked(answer: HttpAnswer, coding: str, limit: int) -> HttpAnswer:
    """The answer without the one layer of gzip that some gateways add unasked: behind it is what was paid for.

    Raises:
        AnswerTooLarge, AnswerEncoded.
    """
    is_gzip = coding in ("gzip", "x-gzip")
    if coding in ("", "identity") or (is_gzip and not answer.body.startswith(b"\x1f\x8b")):
        return answer  # some gateways unpack and leave the header
    if not is_gzip and answer.status < 300:
        raise AnswerEncoded(coding, answer.headers.get("x-request-id", ""))
    if not is_gzip:
        return answer._replace(body=b"")
    unpacker = zlib.decompressobj(wbits=16 + zlib.MAX_WBITS)
    try:
        body = unpacker.decompress(answer.body, limit + 1)
    except zlib.error:
        return answer._replace(body=b"", whole=False)
    if len(body) > limit and answer.status < 300:
        raise AnswerTooLarge
    return answer._replace(body=body[:limit], whole=answer.whole and unpacker.eof)


def _begun_chunk(error: BaseException | None) -> bytes:
    """What had come of the chunk in which an answer broke off: the libraries keep it in the cause of their error."""
    import http.client

    while error is not None:
        if isinstance(error, http.client.IncompleteRead) and isinstance(error.partial, bytes):  # of urllib3's, a number
            return error.partial
        error = error.__cause__ or error.__context__
    return b""


def _transport_failure(wire: Wire, error: Exception) -> Exception:
    """What an exception of the HTTP library means. Texts of the library may hold a proxy's password: left out."""
    import requests

    if isinstance(wire.failure, NotSent):
        return wire.failure
    if not wire.connecting and isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
        return NotSent("the URL, or that of the proxy, cannot be used", lasting=True)
    if not wire.connecting and isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return NotSent("the certificate bundle that the environment names cannot be read", lasting=True)
    if wire.connecting and not wire.connected:
        if wire.expired:
            return NotSent("no connection was made in time")
        certificate = "certificate" in str(error).lower()
        if isinstance(error, requests.exceptions.ProxyError):
            return NotSent("the proxy refused the connection", lasting=True)
        if isinstance(error, requests.exceptions.SSLError):
            return NotSent("the certificate is not valid" if certificate else "TLS failed", lasting=certificate)
        return NotSent("the connection was closed before the request left")
    if wire.expired or isinstance(error, requests.exceptions.Timeout):
        return AnswerLost("no answer came in time")
    return AnswerLost("the connection broke before the answer was complete")


Read = TypeVar("Read")


def ask(
    call: HttpCall | LocalCall,
    read: Callable[[HttpAnswer], Read],
    stop: Stop,
    endpoint: Endpoint,
    limit: int = MAX_ANSWER_BYTES,
) -> Read:
    """Send one call to the service and read its answer; what the network does becomes a Failure."""
    if isinstance(call, LocalCall):
        result: Read = in_time(call.work, stop)
        return result
    reach = "loopback" if endpoint.is_loopback else "service"
    try:
        return read(exchange(call, stop, limit=limit, reach=reach))
    except NotSent as error:
        raise Failure("unreachable", f"{endpoint.host}: {error.reason}", retryable=not error.lasting) from None
    except AnswerLost as error:
        raise Failure("outcome_unknown", f"{endpoint.host}: {error.reason}") from None
    except AnswerTooLarge:
        raise Failure("answer_unusable", f"the answer is larger than {limit // MIB} MiB") from None
    except AnswerEncoded as error:
        message = f"the answer cannot be read: {error.reason}"
        raise Failure("answer_unusable", message, request_id=error.request_id or None) from None
