"""The file storage: pictures behind signed links that expire."""

from __future__ import annotations

import base64
import hmac
import math
import secrets
import threading
import time
from urllib.parse import quote

from zimage_mock.drawing import Picture
from zimage_mock.exchange import Reply, Request, xml_error
from zimage_mock.faults import EXPIRED, NO_FILE, NO_RIGHT, OK, Fault, drawn
from zimage_mock.ledger import Ledger
from zimage_mock.limits import Recent

LINKS_KEPT = 10_000  # so that a long run does not eat the memory


def delivered(picture: Picture, fault: Fault, link: str = "") -> Reply:
    """The picture as whoever follows the link gets it, with the fault's `image` part, if any."""
    return fault.image(picture, link) if fault.image else drawn(picture)


class Gallery:
    """The file storage: a picture is drawn when its link is first followed, and no key is asked for."""

    prefix = "/files/"

    def __init__(self, root: str, ttl_s: float, ledger: Ledger) -> None:
        self.dialect = ledger.dialect
        self._root, self._ttl_s, self._ledger = root, ttl_s, ledger
        self._secret = secrets.token_bytes(32)
        self._pictures: Recent[tuple[Picture, Fault]] = Recent(LINKS_KEPT)
        self._lock = threading.Lock()

    def issue(self, picture: Picture, fault: Fault) -> str:
        """A new signed link to the picture, which then suffers the fault's `image` part, if any."""
        path = f"{self.prefix}{secrets.token_hex(16)}.{picture.kind}"
        with self._lock:
            self._pictures[path] = (picture, fault)
        now = time.time()
        expires = str(math.ceil(now + self._ttl_s) if self._ttl_s else int(now))
        signature = quote(self._sign(path, expires), safe="")
        return f"{self._root}{path}?Expires={expires}&OSSAccessKeyId=mock&Signature={signature}"

    def answer(self, request: Request) -> Reply:
        """GET or HEAD of one link."""
        if request.method not in ("GET", "HEAD"):
            return xml_error(405, "MethodNotAllowed", "The specified method is not allowed against this resource.")
        with self._lock:
            known = self._pictures.get(request.path)
        if known is None:
            return NO_FILE
        expires = request.query.get("Expires", "")
        signature = request.query.get("Signature", "")
        if not hmac.compare_digest(signature.encode(), self._sign(request.path, expires).encode()):
            return NO_RIGHT
        if time.time() >= int(expires):
            return EXPIRED
        picture, fault = known
        if request.method == "GET" and fault.once:
            with self._lock:
                self._pictures[request.path] = (picture, OK)
        reply = delivered(picture, fault, request.target)
        if request.method == "GET" and reply.status == 200:
            self._ledger.count("downloads")
        return reply

    def _sign(self, path: str, expires: str) -> str:
        # Base64 like the real signatures: a client that mangles "+" or "=" in a link is found out here.
        return base64.b64encode(hmac.digest(self._secret, f"{path}?{expires}".encode(), "sha1")).decode()
