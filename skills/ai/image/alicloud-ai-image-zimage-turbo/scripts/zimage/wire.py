"""Wire: the connection of one exchange, which knows whether the request left."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import re
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from zimage.contract import CONNECT_TIMEOUT
from zimage.endpoint import _is_address, is_fake_address, is_loopback_address, is_public_address
from zimage.errors import NotSent, os_reason
from zimage.proxy import is_unconnected, socks_fault, socks_socket, tunnel_fault
from zimage.tls import tls_fault
from zimage.waiting import Late, Stop

if TYPE_CHECKING:
    import ssl

    from zimage.calls import HttpCall
    from zimage.proxy import Proxy


REACH: dict[str, Callable[[ipaddress.IPv4Address | ipaddress.IPv6Address], bool]] = {
    # Which resolved addresses a call may connect to.
    "service": lambda address: True,  # the host was checked by name; private service endpoints exist
    "service with links": lambda address: True,  # as that; its pictures lie on other hosts
    # The certificate says that it is the host which was checked by name, whatever address leads there.
    "vendor": lambda address: not (is_loopback_address(address) or address.is_link_local),
    "public": lambda address: is_public_address(address),
    "loopback": is_loopback_address,
}
TAKE_FAKE = ("service", "vendor")  # which need not know where a name truly leads
NO_NAME = {  # by whether no name server answers
    True: "this machine has no way to the internet, or only through a proxy: name it in HTTPS_PROXY",
    False: "check the host's spelling in the base URL; behind a proxy that resolves names, name it in HTTPS_PROXY",
}
FAKE_HINT = (
    "a VPN hands out fake addresses, behind which nothing can be checked: set HTTPS_PROXY to the VPN's own proxy "
    "(often http://127.0.0.1:7890 or :1080), or switch its fake-ip mode off"
)


# How TLS answers what is no TLS, and all of it: one record of type alert, version 3.x, two bytes long, that is fatal
# (RFC 8446, 5.1 and 6). Whatever goes on behind it may come from who has read the request.
TLS_ALERT = re.compile("\x15\x03[\x00-\x04]\x00\x02\x02.", re.DOTALL)
OVER_TLS = "give the base URL with https:// instead of http://"


class Wire:
    """The connection of one exchange: opens it, knows whether the request left, and cuts it at the deadline.

    Connections are never reused: one that idled for seconds may be closed by the service just as a paid
    request leaves on it.
    """

    def __init__(self, call: HttpCall, stop: Stop, reach: str, proxy: Proxy | None = None) -> None:
        self.url = call.url
        self.target = call.url.partition("#")[0] if proxy and proxy.forwards(call.url) else request_target(call.url)
        self.stop = stop
        self.reach = reach
        self.proxy = proxy
        self.is_at_proxy = proxy is not None  # and not yet behind it
        self.said: tuple[int, str] | None = None  # the last status line
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

    def open(self, host: str, port: int) -> socket.socket:
        """Resolve, check and connect; what goes wrong is kept in `failure` and raised as OSError.

        Host and port are the service's, or those of a proxy that speaks HTTP.
        """
        self.connecting = True
        try:
            if self.proxy and self.proxy.is_socks:
                connection = self._connect_by_socks(self.proxy, host, port)
                self.is_at_proxy = False
            else:
                connection = self._connect(self._resolve(host, port))
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
            connection.settimeout(self.remaining)
            return connection
        except Exception as error:
            self.fail(error)
            raise OSError(str(error)) from error

    def fail(self, error: Exception) -> None:
        """Keep what went wrong, if nothing has before."""
        self.failure = self.failure or (self.placed(error) if isinstance(error, NotSent) else error)

    def placed(self, error: NotSent) -> NotSent:
        """The same, which names the proxy where that is what was spoken with."""
        if self.proxy is None or not self.is_at_proxy or str(self.proxy) in error.reason:
            return error
        return self.proxy.fault(f"fails: {error.reason}", self.url, lasting=error.lasting, hint=error.hint)

    def _resolve(self, host: str, port: int) -> list[tuple[Any, ...]]:
        """Addresses of a host; a name server that does not answer must not hold the command."""

        def look_up() -> list[tuple[Any, ...]]:
            return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))

        try:
            return look_up() if _is_address(host) else self.stop.in_thread(look_up)
        except Late:
            raise NotSent("its name was not resolved in time") from None
        except (OSError, UnicodeError) as error:
            is_silent = getattr(error, "errno", None) == socket.EAI_AGAIN
            what = "no name server answers" if is_silent else "there is no such name"
            if self.is_at_proxy:
                raise NotSent(f"its name cannot be resolved ({what})") from None
            raise NotSent(f"its name cannot be resolved ({what})", hint=NO_NAME[is_silent]) from None

    def _connect(self, addresses: list[tuple[Any, ...]]) -> socket.socket:
        reason = "no address"
        for family, kind, protocol, _, address in addresses:
            if not self.is_at_proxy:
                self._check(address[0])
            connection = socket.socket(family, kind, protocol)
            try:
                self._start(connection)
                connection.connect(address)
                return connection
            except OSError as error:
                connection.close()
                is_late = self.expired or isinstance(error, TimeoutError)  # one that is cut says that it was reset
                reason = "connection timed out" if is_late else os_reason(error)
            except BaseException:
                connection.close()
                raise
        raise NotSent(reason)

    def _connect_by_socks(self, proxy: Proxy, host: str, port: int) -> socket.socket:
        """A connection to a host through a SOCKS proxy."""
        destination = (host.strip("[]"), port)
        addresses = self._resolve(proxy.host, proxy.port)
        if not proxy.is_resolver:
            self.is_at_proxy = False
            destination = self._resolve(destination[0], port)[0][4][:2]
            self._check(destination[0])
            self.is_at_proxy = True
        fault = proxy.fault("has no address", self.url)
        for family, *_, address in addresses:
            connection = socks_socket(proxy, family, address[0])
            try:
                self._start(connection)
                connection.connect(destination)
                return socket.socket(fileno=connection.detach())
            except OSError as error:
                connection.close()
                fault = socks_fault(proxy, error, self.url, is_late=self.expired)
                if not is_unconnected(error):
                    break
            except BaseException:
                connection.close()
                raise
        raise fault

    def _start(self, connection: socket.socket) -> None:
        connection.settimeout(min(CONNECT_TIMEOUT, self.remaining))
        self._hold(connection)

    def _check(self, text: str) -> None:
        """Raises NotSent where an address is none that this call may go to."""
        address = ipaddress.ip_address(text.partition("%")[0])
        if is_fake_address(address) and self.reach not in TAKE_FAKE:
            raise NotSent(f"its name leads to {text}, a fake address", lasting=True, hint=FAKE_HINT)
        if not REACH[self.reach](address):
            raise NotSent(f"{text} is not an address that may be fetched from", lasting=True, refused=True)

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

    def tls_fault(self, error: ssl.SSLError) -> NotSent:
        whose = str(self.proxy) if self.is_at_proxy else urlsplit(self.url).hostname or ""
        return tls_fault(error, whose)


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
    import ssl

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
            self._wire = wire
            self.fp = io.BufferedReader(Arriving(self.fp.detach(), wire))

        def _read_status(self) -> tuple[str, int, str]:
            try:
                version, status, reason = super()._read_status()  # type: ignore[misc]
            except http.client.BadStatusLine as error:
                if TLS_ALERT.fullmatch(str(error.args[0])):
                    self._wire.fail(NotSent("this port speaks TLS, and was spoken to over http", hint=OVER_TLS))
                raise
            self._wire.said = status, reason
            # http.client passes over 100 only, and would take 103 Early Hints for the answer to a paid call.
            return version, http.client.CONTINUE if 101 < status < 200 else status, reason

    class Wired:
        def __init__(self, *args: Any, wire: Wire, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self._wire = wire
            self.response_class: Any = functools.partial(FinalAnswer, wire=wire)

        def _new_conn(self) -> socket.socket:
            host: Any = self
            return self._wire.open(host._dns_host, host.port)

        def _tunnel(self) -> None:
            wire = self._wire
            wire.said = None
            try:
                super()._tunnel()  # type: ignore[misc]
            except (OSError, http.client.HTTPException):
                if wire.proxy and not wire.expired:
                    wire.fail(tunnel_fault(wire.proxy, wire.said, wire.url))
                raise
            wire.is_at_proxy = False

        def connect(self) -> None:
            try:
                super().connect()  # type: ignore[misc]
            except ssl.SSLError as error:
                if not self._wire.expired:
                    self._wire.fail(self._wire.tls_fault(error))
                raise
            except TimeoutError:  # of the handshake: the socket was quicker than who would have cut it
                self._wire.expired = True
                raise
            if self._wire.expired or self._wire.stop.left_s <= 0:  # the machine may have slept
                self._wire.expired = True
                raise OSError("the deadline passed while connecting")
            self._wire.connected = True  # from here on the service may have seen the request

        def putrequest(self, method: str, url: str, *args: Any, **kwargs: Any) -> None:
            # The libraries rewrite a URL on its way here; a signature may hold for its very bytes only.
            super().putrequest(method, self._wire.target, *args, **kwargs)  # type: ignore[misc]

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
        def __init__(self, wire: Wire, trust: ssl.SSLContext | None = None) -> None:
            self._wire = wire
            self._trust = trust  # for https, of the service and of a proxy
            super().__init__()

        def build_connection_pool_key_attributes(self, request: Any, verify: Any, cert: Any = None) -> Any:
            place, options = super().build_connection_pool_key_attributes(request, verify, cert)
            return place, dict(options) | ({"ssl_context": self._trust} if self._trust else {})

        def cert_verify(self, conn: Any, *args: Any) -> None:
            conn.cert_reqs = "CERT_REQUIRED"  # and no bundle beside the context, which knows whom to trust

        def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
            super().init_poolmanager(*args, **kwargs)
            self.poolmanager.pool_classes_by_scheme = pools(self._wire)

        def proxy_manager_for(self, *args: Any, **kwargs: Any) -> Any:
            manager = super().proxy_manager_for(*args, **kwargs, proxy_ssl_context=self._trust)
            manager.pool_classes_by_scheme = pools(self._wire)
            return manager

    return WiredAdapter
