"""Proxy: which one the environment puts before a URL, how SOCKS is spoken with it, and what its refusals mean."""

from __future__ import annotations

import os
import re
import socket
from types import ModuleType
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import unquote, urlsplit

from zimage.endpoint import is_loopback_host
from zimage.errors import NotSent, os_reason
from zimage.outside import outside_text
from zimage.page import first_words

if TYPE_CHECKING:
    from zimage.calls import HttpAnswer

PYSOCKS_HINT = (
    "run it with `uv run --with 'PySocks>=1.7.1,<2' --script …`, or install it beside the other packages: "
    "python3 -m pip install 'PySocks>=1.7.1,<2'"
)
CREDENTIALS = "write its user name and password into the URL in {source} ({scheme}://USER:PASSWORD@HOST:PORT)"
DEFAULT_PORTS = {"http": 80, "https": 443, "socks4": 1080, "socks4a": 1080, "socks5": 1080, "socks5h": 1080}
RESOLVES_ITSELF = ("socks4a", "socks5h")  # of SOCKS: names are its business, else this machine's
# Pages that a proxy has written itself name it here; what it forwards keeps the name of who wrote it.
WRITES_PAGES = re.compile(r"squid|tinyproxy|privoxy|mitmproxy|zscaler|bluecoat|forefront", re.IGNORECASE)
# Of squid's words those that say that nothing was forwarded; after others the answer may have been lost on its way.
NEVER_FORWARDED = re.compile(r"ERR_(CONNECT_FAIL|DNS_FAIL|CANNOT_FORWARD|ACCESS_DENIED|CACHE_ACCESS_DENIED)\b")


class Proxy(NamedTuple):
    """A proxy. `url` may hold its password and is never shown, `auth` neither."""

    scheme: str  # a key of DEFAULT_PORTS
    host: str
    port: int
    auth: tuple[str | None, str | None]
    url: str
    source: str  # the variable that names it

    @property
    def is_socks(self) -> bool:
        return self.scheme.startswith("socks")

    @property
    def is_resolver(self) -> bool:
        """Whether it resolves the names of the hosts behind it."""
        return not self.is_socks or self.scheme in RESOLVES_ITSELF

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"the proxy {host}:{self.port} ({self.source})"

    def forwards(self, url: str) -> bool:
        """Whether it reads and writes HTTP itself for a URL, rather than passing bytes on."""
        return not self.is_socks and url.startswith("http:")

    def way_past(self, url: str) -> str:
        """The advice where it is in the way."""
        host = urlsplit(url).hostname or ""
        return f"check {self.source}, or add {host} to NO_PROXY if this machine reaches it without a proxy"

    def locked(self, url: str, how: str = "") -> NotSent:
        """That it wants to know who asks."""
        hint = CREDENTIALS.format(source=self.source, scheme=self.scheme)
        what = f"wants {'another' if self.auth[0] else 'a'} user name and password{how}"
        return self.fault(what, url, lasting=True, hint=hint)

    def fault(self, what: str, url: str, *, lasting: bool = False, hint: str | None = None) -> NotSent:
        """That it stands in the way of a call to a URL."""
        return NotSent(f"{self} {what}", lasting=lasting, hint=hint or self.way_past(url))


def proxy_for(url: str) -> Proxy | None:
    """The proxy that plain requests would take for a URL, but none for loopback.

    Raises:
        NotSent: where a variable names what is no proxy.
    """
    from requests.utils import get_environ_proxies, select_proxy
    from urllib3.exceptions import LocationParseError
    from urllib3.util import parse_url

    if is_loopback_host(urlsplit(url).hostname or ""):
        return None
    proxies = get_environ_proxies(url)
    text = select_proxy(url, proxies)
    if not text:
        return None
    kind = "all" if proxies.get(urlsplit(url).scheme) != text else urlsplit(url).scheme
    named = (name for name, value in os.environ.items() if value == text and name.lower() == f"{kind}_proxy")
    source = next(named, "this machine's settings")

    def refuse(what: str) -> NoReturn:
        hint = f"write {source} as http://HOST:PORT, socks5h://HOST:PORT or socks5://HOST:PORT, or unset it"
        raise NotSent(f"{source} {what}", lasting=True, hint=hint)

    try:
        full = text if "://" in text else f"http://{text}"
        parts = parse_url(full)
    except (LocationParseError, ValueError):
        refuse("is not the URL of a proxy")
    scheme = (parts.scheme or "").lower()
    if scheme not in DEFAULT_PORTS:
        refuse(f"names a proxy by {outside_text(scheme, 20)}://, which is not spoken here")
    if not parts.host:
        refuse("names no host")
    user, colon, password = (parts.auth or "").partition(":")
    auth = (unquote(user) or None, unquote(password) if colon else None)
    return Proxy(scheme, parts.host.strip("[]"), parts.port or DEFAULT_PORTS[scheme], auth, full, source)


def check_proxy(url: str) -> None:
    """That the proxy before a URL can be used by this machine, as far as is known without asking it.

    Raises:
        NotSent: as `proxy_for`, and without PySocks where it is needed.
    """
    if any(name.lower().endswith("_proxy") for name in os.environ):  # else there is no need to load what reads them
        proxy = proxy_for(url)
        if proxy is not None and proxy.is_socks:
            pysocks(proxy)


# SOCKS ----------------------------------------------------------------------------------------------------------------


def pysocks(proxy: Proxy) -> ModuleType:
    """The package that speaks with a SOCKS proxy.

    Raises:
        NotSent: without it.
    """
    try:
        import socks
    except ImportError:
        reason = f"{proxy} speaks SOCKS, for which the Python package PySocks is missing"
        raise NotSent(reason, lasting=True, hint=PYSOCKS_HINT) from None
    package: ModuleType = socks
    return package


def socks_socket(proxy: Proxy, family: int, address: str) -> socket.socket:
    """A socket whose `connect` goes through a SOCKS proxy at an address. Raises as `pysocks`."""
    socks: Any = pysocks(proxy)
    connection: Any = socks.socksocket(family, socket.SOCK_STREAM)
    version = socks.SOCKS4 if proxy.scheme.startswith("socks4") else socks.SOCKS5
    user, password = proxy.auth
    connection.set_proxy(version, address, proxy.port, proxy.is_resolver, user, password)
    made: socket.socket = connection
    return made


SOCKS_LOCKED = re.compile("all offered|no username/password|authentication failed")
SOCKS_FAULTS = (  # words of PySocks and, in parts of them, of RFC 1928: what is told, and whether it will last
    ("invalid data", "does not speak SOCKS here: is it an HTTP proxy (http://)?", True),
    ("connection closed unexpectedly", "closed the connection without a word of SOCKS", False),
    ("0x02", "does not allow it: connection not allowed by its rules", True),
    ("0x03", "does not reach it: network unreachable", False),
    ("0x04", "does not reach it: host unreachable, or no such name", False),
    ("0x05", "does not reach it: connection refused", False),
    ("0x5", "does not reach it: request rejected or failed", False),  # SOCKS 4: 0x5b to 0x5d
    ("0x", "does not reach it", False),
)


def socks_fault(proxy: Proxy, error: OSError, url: str, *, is_late: bool = False) -> NotSent:
    """What went wrong between this machine and a service behind a SOCKS proxy.

    `is_late`: its time was over, and the connection was cut here.
    """
    said = str(error).lower()
    if SOCKS_LOCKED.search(said):
        return proxy.locked(url)
    if is_unconnected(error):
        cause = getattr(error, "socket_err", None)
        reason = os_reason(cause) if cause and not is_late else "no connection was made"
        return proxy.fault(f"fails: {reason}{' in time' * is_late}", url)
    if is_late or "timed out" in said:
        return proxy.fault("does not answer in time: does it speak SOCKS here?", url)
    found = ((what, lasting) for words, what, lasting in SOCKS_FAULTS if words in said)
    what, lasting = next(found, ("fails within its own words", False))
    return proxy.fault(what, url, lasting=lasting)


def is_unconnected(error: OSError) -> bool:
    """Whether a SOCKS proxy is not there at all, at the address that was tried."""
    return type(error).__name__ == "ProxyConnectionError" or isinstance(error, TimeoutError)


# HTTP -----------------------------------------------------------------------------------------------------------------


def refused_by_proxy(proxy: Proxy, status: int, words: str, url: str) -> NotSent:
    """What a proxy's own answer means: nothing has reached the service."""
    if status == 407:
        return proxy.locked(url, " (HTTP 407)")
    does = "does not allow it" if status < 500 else "does not reach it"
    said = f"HTTP {status} {outside_text(words, 200)}".strip()
    return proxy.fault(f"{does} ({said})", url, lasting=status < 500)


def tunnel_fault(proxy: Proxy, said: tuple[int, str] | None, url: str) -> NotSent:
    """Why there is no tunnel through an HTTP proxy; `said` is the status line of its answer, None where none came."""
    if said is None:
        what = "gave no answer of HTTP to CONNECT: is it a SOCKS proxy (socks5h://)?"
        return proxy.fault(what, url)
    return refused_by_proxy(proxy, *said, url)


def own_refusal(proxy: Proxy | None, answer: HttpAnswer, url: str) -> NotSent | None:
    """That an answer to a call over plain http is the proxy's own, and nothing went on to the service; else None."""
    if proxy is None or not proxy.forwards(url):
        return None
    squids = answer.headers.get("x-squid-error", "")
    is_own = bool(squids) or bool(WRITES_PAGES.search(answer.headers.get("server", "")))
    is_page = not answer.body.lstrip().startswith(b"{")  # a service would say no in JSON
    is_no = answer.status == 407 or (answer.status == 403 and is_page) or (is_own and 400 <= answer.status < 500)
    if is_no or NEVER_FORWARDED.match(squids):
        return refused_by_proxy(proxy, answer.status, first_words(answer.body), url)
    return None
