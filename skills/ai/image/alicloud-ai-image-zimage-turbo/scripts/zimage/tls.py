"""TLS: whom this machine trusts to vouch for a server, and what it means where a handshake fails."""

from __future__ import annotations

import contextlib
import datetime as dt
import functools
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from zimage.errors import NotSent, os_reason
from zimage.outside import outside_text

if TYPE_CHECKING:
    import ssl

BUNDLES = ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE", "SSL_CERT_FILE")  # the first that is set is all that is trusted
FOLDER = "SSL_CERT_DIR"  # trusted beside the machine's store
HASHED_NAME = "[0-9a-f]" * 8 + ".[0-9]*"  # how OpenSSL looks a certificate up in a folder


def tls_context() -> ssl.SSLContext:
    """What a connection is verified with: the authorities that a variable names, else those of this machine.

    Raises:
        NotSent: where a variable names what holds no certificates.
    """
    variable = bundle_variable()
    return _context(variable, os.environ.get(variable, ""), os.environ.get(FOLDER, ""))


def bundle_variable() -> str:
    """The variable that names the only authorities to trust; empty where none does."""
    return next((name for name in BUNDLES if os.environ.get(name)), "")


def _context(variable: str, bundle: str, folder: str) -> ssl.SSLContext:
    if variable:
        return _named_context(variable, bundle)
    if sys.platform in ("darwin", "win32"):
        return _machine_context(folder)  # truststore holds a lock while it shakes hands: not to be shared
    return _shared_machine_context(folder)


@functools.lru_cache(maxsize=8)
def _named_context(variable: str, bundle: str) -> ssl.SSLContext:
    import ssl

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    _load(context, variable, bundle)
    return context


def _machine_context(folder: str) -> ssl.SSLContext:
    """The machine's own store and, as pip has it, the authorities that came with the package `certifi`.

    Keychain and Windows' store are asked by `truststore`; elsewhere OpenSSL finds the store by itself.
    """
    import certifi

    context = _system_context()
    with contextlib.suppress(OSError):  # some systems point it to a store that is not installed
        context.load_verify_locations(certifi.where())
    if folder:  # looked into when a certificate is looked for, wherever it leads
        context.load_verify_locations(capath=folder)
    return context


_shared_machine_context = functools.lru_cache(maxsize=8)(_machine_context)


def _system_context() -> ssl.SSLContext:
    import ssl

    if sys.platform in ("darwin", "win32"):
        try:
            import truststore
        except ImportError:  # it is small and may be missing: what certifi knows works without it
            pass
        else:
            return truststore.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_default_certs()
    return context


def _load(context: ssl.SSLContext, variable: str, place: str) -> None:
    """Trust the certificates in a file or folder.

    Raises:
        NotSent: lasting; with the variable that names it.
    """
    import ssl

    def refuse(what: str, hint: str) -> NotSent:
        return NotSent(f"{variable}: {outside_text(place, 300)} {what}", lasting=True, hint=hint)

    unset = f"give {variable} a file of certificates in PEM form (-----BEGIN CERTIFICATE-----), or unset it"
    if Path(place).is_dir():
        if is_unhashed(place):
            raise refuse("holds no certificate under a hashed name", f"run `openssl rehash` on it, or unset {variable}")
        context.load_verify_locations(capath=place)
        return
    try:
        context.load_verify_locations(cafile=place)
    except ssl.SSLError:
        raise refuse("holds no certificate in PEM form", unset) from None
    except (OSError, ValueError) as error:
        reason = "is not there" if isinstance(error, FileNotFoundError) else f"cannot be read: {os_reason(error)}"
        raise refuse(reason, unset) from None


def is_unhashed(folders: str) -> bool:
    """Whether OpenSSL would find no certificate in folders, named as in SSL_CERT_DIR."""
    return not any(path for folder in folders.split(os.pathsep) if folder for path in Path(folder).glob(HASHED_NAME))


# What a failed handshake means ----------------------------------------------------------------------------------------


class Meaning(NamedTuple):
    """`hint` may hold {clock}, {trust} and {server}."""

    what: str
    hint: str


_CLOCK = "if others reach it this machine's clock is wrong (it says {clock}); else tell the owner of {server}"
_AUTHORITY = "{trust}; if a company's firewall or your own server signs it, ask for its authority's certificate"
_NAME = "check base URL, DNS and proxy: another server answers under this name"
UNKNOWN_AUTHORITY = Meaning("is signed by an authority that is not known here", _AUTHORITY)
# By OpenSSL's number of what is wrong with a certificate (X509_V_ERR_… in x509_vfy.h).
CERTIFICATES = {
    2: UNKNOWN_AUTHORITY,
    9: Meaning("is not valid yet", _CLOCK),
    10: Meaning("has expired", _CLOCK),
    18: Meaning("is self-signed", _AUTHORITY),
    19: Meaning("is signed by an authority that is not known here (self-signed)", _AUTHORITY),
    20: UNKNOWN_AUTHORITY,
    21: UNKNOWN_AUTHORITY,
    23: Meaning("has been revoked", "tell the owner of {server}; do not go on"),
    62: Meaning("is of another name", _NAME),
    64: Meaning("is of another address", _NAME),
}
_NO_TLS = Meaning(
    "no TLS is spoken on this port", "check scheme and port: http:// and https:// are different ports of a server"
)
_NO_COMMON = Meaning("no version of TLS that both sides take", "the server, or what stands before it, is too old")
# By parts of OpenSSL's name of the reason.
REASONS = {
    "WRONG_VERSION_NUMBER": _NO_TLS,
    "HTTP_REQUEST": _NO_TLS,
    "RECORD_LAYER_FAILURE": _NO_TLS,
    "PACKET_LENGTH_TOO_LONG": _NO_TLS,
    "UNKNOWN_PROTOCOL": _NO_TLS,
    "PROTOCOL_VERSION": _NO_COMMON,
    "UNSUPPORTED_PROTOCOL": _NO_COMMON,
    "HANDSHAKE_FAILURE": _NO_COMMON,
    "DH_KEY_TOO_SMALL": _NO_COMMON,
    "UNRECOGNIZED_NAME": Meaning("the server does not know this name", _NAME),
    "CERTIFICATE_REQUIRED": Meaning("the server wants a client's certificate", "use an endpoint that takes the key"),
}


def tls_fault(error: ssl.SSLError, whose: str) -> NotSent:
    """What a failed handshake means. `whose`: the host it was with, or the proxy."""
    import ssl

    if isinstance(error, ssl.SSLCertVerificationError):
        other = Meaning(f"is not valid: {outside_text(error.verify_message, 200)}", _AUTHORITY)
        meaning = CERTIFICATES.get(error.verify_code, other)
        return NotSent(f"the certificate {meaning.what}", lasting=True, hint=_filled(meaning.hint, whose))
    found = (meaning for part, meaning in REASONS.items() if part in (error.reason or ""))
    known = next(found, None)
    if known is None:
        return NotSent("TLS failed: the connection ended within its handshake")
    return NotSent(f"TLS failed: {known.what}", lasting=True, hint=_filled(known.hint, whose))


def _filled(hint: str, whose: str) -> str:
    variable, folder = bundle_variable(), os.environ.get(FOLDER, "")
    if folder and not variable and is_unhashed(folder):
        trust = f"{FOLDER} holds no certificate under a hashed name: run `openssl rehash` on it, or set SSL_CERT_FILE"
    elif variable:
        trust = f"{variable} names all that is trusted: add the authority's certificate to it, or unset it"
    else:
        trust = "set SSL_CERT_FILE to a PEM file with the authority's certificate, or add it to this machine's store"
    return hint.format(trust=trust, clock=dt.datetime.now().strftime("%Y-%m-%d %H:%M"), server=whose)
