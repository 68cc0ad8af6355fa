"""Wire: the connection of one exchange, which knows whether the request left."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import socket
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlsplit

from zimage.contract import CONNECT_TIMEOUT
from zimage.endpoint import _is_address, is_loopback_address, is_public_address
from zimage.errors import NotSent, os_reason
from zimage.waiting import Late, Stop

if TYPE_CHECKING:
    from zimage.provider import HttpCall


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
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, True)
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
                is_late = self.expired or isinstance(error, TimeoutError)  # one that is cut says that it was reset
                reason = "connection timed out" if is_late else os_reason(error)
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
