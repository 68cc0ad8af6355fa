"""Endpoint: where a service is called, and what kind of address that is."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple
from urllib.parse import urlsplit

_LABEL = r"[a-z0-9](?:[a-z0-9_-]{0,61}[a-z0-9])?"
_HOST_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")
_NETLOC = re.compile(r"(?P<host>[A-Za-z0-9._-]+|\[[0-9A-Fa-f:]+\])(?::(?P<port>[0-9]{1,5}))?")

LOOPBACK_NAME = "localhost"
IN_PROCESS = "in-process"  # the endpoint of a provider that makes no calls
UNKNOWN_REGION = "unknown"  # of a server that is not the service's own, where no setting tells


class Endpoint(NamedTuple):
    """Where a provider is called: `root` is the API root, `url` the call that makes pictures."""

    root: str
    url: str
    host: str
    region: str
    source: str = ""  # what has named it: an option, a field, variables, a file; empty where that is not known
    warnings: tuple[str, ...] = ()  # to be told before anything is sent there

    @property
    def is_loopback(self) -> bool:
        return is_loopback_host(self.host)


def is_loopback_host(host: str) -> bool:
    """True for localhost, 127.0.0.0/8 and ::1 in their usual spelling; nothing is resolved."""
    try:
        return is_loopback_address(ipaddress.ip_address(host))
    except ValueError:
        return host == LOOPBACK_NAME


def is_loopback_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """True for 127.0.0.0/8 and ::1, not for ::ffff:127.0.0.1, on which versions of Python disagree."""
    return address.is_loopback and getattr(address, "ipv4_mapped", None) is None


def split_netloc(netloc: str) -> tuple[str, int | None]:
    """Host (lower case, brackets off) and port of a network location that is exactly `host[:port]`.

    Raises:
        ValueError: with what is wrong.
    """
    match = _NETLOC.fullmatch(netloc)
    if not match:
        raise ValueError("its network location must be exactly host or host:port")
    host = match["host"].lower()
    port = int(match["port"]) if match["port"] else None
    if port is not None and not 0 < port < 65536:
        raise ValueError("its port must be from 1 to 65535")
    if host.startswith("["):
        return str(ipaddress.IPv6Address(host[1:-1])), port
    if not is_host_name(host):
        raise ValueError("its host is not a host name")
    return host, port


def is_host_name(text: str) -> bool:
    """True for a name or a plain IPv4 address in lower case; not for 127.1, 0x7f.1 and their like."""
    if len(text) > 253 or not _HOST_NAME.fullmatch(text):
        return False
    return _is_address(text) or not re.fullmatch(r"[0-9]+|0x[0-9a-f]*", text.rpartition(".")[2])


def _is_loopback_netloc(netloc: str) -> bool:
    try:
        return is_loopback_host(split_netloc(netloc)[0])
    except ValueError:
        return False


_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_COMPATIBLE = ipaddress.IPv6Network("::/96")  # deprecated form of an IPv4 address


def is_public_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is on the open internet, also where IPv6 wraps an IPv4 address."""
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour or (address.teredo[1] if address.teredo else None)
        if inner is None and (address in _NAT64 or address in _COMPATIBLE):
            inner = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
        if inner is not None:
            return is_public_address(inner)
        if address.is_site_local:
            return False
    return address.is_global and not address.is_multicast and not address.is_reserved


# What VPNs answer in place of an address, to learn by it which name is meant (198.18.0.0/15 is kept for benchmarks by
# RFC 2544): nothing is known of the true one.
_FAKE_NETWORKS = (ipaddress.ip_network("198.18.0.0/15"), ipaddress.ip_network("fc00::/18"))


def is_fake_address(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
    """Whether an address is of those that VPNs with fake addresses hand out."""
    return any(address in network for network in _FAKE_NETWORKS)


def is_own_machine(host: str) -> bool:
    """Whether a host is surely one of the user's own, by its name alone: loopback, no public address, or .local."""
    try:
        return not is_public_address(ipaddress.ip_address(host))
    except ValueError:
        return host == LOOPBACK_NAME or host.endswith(("." + LOOPBACK_NAME, ".local"))


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
        return True
    except ValueError:
        return False


DEFAULT_PORTS = {"http": 80, "https": 443}


def origin_of(url: str) -> str:
    """The `scheme://host:port` of a URL, the port also where it is the scheme's own; empty for what is no plain URL."""
    try:
        parts = urlsplit(url)
        host, port = split_netloc(parts.netloc)
    except ValueError:
        return ""
    return f"{parts.scheme}://{host}:{port or DEFAULT_PORTS.get(parts.scheme, 0)}"


def is_loopback_url(url: str) -> bool:
    try:
        return is_loopback_host(split_netloc(urlsplit(url).netloc)[0])
    except ValueError:
        return False


def host_in(text: str) -> str:
    """The host of a base URL in whatever form, also of one that is refused; empty where it is no plain one."""
    try:
        return split_netloc(urlsplit(text if "://" in text else f"https://{text}").netloc)[0]
    except ValueError:
        return ""
