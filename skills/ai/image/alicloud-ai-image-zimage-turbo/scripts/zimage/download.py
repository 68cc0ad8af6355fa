"""Download: the picture behind a link, fetched without the key over checked hops."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn
from urllib.parse import urljoin, urlsplit, urlunsplit

from zimage.answers import bearer, retry_after
from zimage.calls import HttpCall
from zimage.contract import CORRUPT_DOWNLOAD_RETRIES, DOWNLOAD_RETRIES, MAX_HOPS, MAX_IMAGE_BYTES, MIB
from zimage.endpoint import _is_address, is_loopback_host, is_public_address, origin_of, split_netloc
from zimage.errors import RECOVER_FREE, Failure, NotSent, os_reason
from zimage.evidence import moment_of, said_of, utc_now
from zimage.files import read_file
from zimage.outside import without_surrogates
from zimage.picture import ends_as_it_should, verified
from zimage.settle import DEAD_LINK
from zimage.transport import AnswerEncoded, AnswerLost, AnswerTooLarge, exchange
from zimage.trust import home_of, unnamed
from zimage.waiting import wait_before

if TYPE_CHECKING:
    from zimage.calls import HttpAnswer
    from zimage.evidence import Evidence
    from zimage.picture import Picture
    from zimage.provider import Provider
    from zimage.task import Task
    from zimage.trust import Home
    from zimage.waiting import Stop


def checked_link(link: str, *, loopback: bool, provider: Provider, origin: str = "") -> tuple[str, str]:
    """A link that a picture may be fetched from, and the reach (key of REACH) that holds for it.

    `origin` is the `scheme://host:port` of a server that may link to itself, even where it is not public.

    Raises:
        Failure: hop_refused.
    """

    def refuse(what: str) -> NoReturn:
        raise Failure("hop_refused", f"the link to the picture {what}")

    if re.search(r"[\x00-\x20\x7f\\]", link) or link != without_surrogates(link):
        refuse("has blanks, backslashes or control characters in it")
    try:
        parts = urlsplit(link)
        host, port = split_netloc(parts.netloc)
    except ValueError:
        refuse("does not name a plain host")
    is_at_home = origin != "" and origin_of(link) == origin
    if is_loopback_host(host):
        if not (loopback or is_at_home) or parts.scheme not in ("http", "https"):
            refuse("leads to this machine")
        return link, "loopback"
    if is_at_home:
        return link, "service"
    if _is_address(host) and not is_public_address(ipaddress.ip_address(host)):
        refuse("leads to a private address")
    domain = provider.https_links_under
    is_vendors = domain is not None and (host == domain or host.endswith(f".{domain}"))
    if parts.scheme == "http" and is_vendors:
        netloc = host if port in (None, 80) else f"{host}:{port}"
        parts = parts._replace(scheme="https", netloc=netloc)
    if parts.scheme != "https":
        refuse("is not an https link")
    return urlunsplit(parts), "vendor" if is_vendors or provider.owns(host) else "public"


def fetch(link: str, home: Home, *, stop: Stop, provider: Provider) -> HttpAnswer:
    """Follow a link, over checked hops, to an answer that is not a redirect.

    The key goes only to the origin that is the server's own, where that asks for one, and over no redirect.

    Raises:
        Failure: hop_refused. NotSent, AnswerLost, AnswerTooLarge, AnswerEncoded, Stopped.
    """
    loopback, origin = home.loopback, home.origin
    for _ in range(MAX_HOPS + 1):
        link, reach = checked_link(link, loopback=loopback, provider=provider, origin=origin)
        loopback = loopback and reach == "loopback"  # once on the open internet, there is no way back
        origin = "" if reach in ("public", "vendor") else origin
        call = HttpCall("GET", link, {"Accept": "image/*"})
        answer = exchange(call, stop, limit=MAX_IMAGE_BYTES, reach=reach)
        asks_for_key = provider.links_to_itself and answer.status in (401, 403)
        if asks_for_key and home.key and origin_of(link) == home.origin != "":
            call = call._replace(headers=bearer(home.key) | call.headers)
            answer = exchange(call, stop, limit=MAX_IMAGE_BYTES, reach=reach)
        target = answer.headers.get("location", "").strip()
        if not (300 <= answer.status < 400 and target):
            return answer
        try:  # header bytes come as Latin-1; what is not UTF-8 becomes surrogates, which no link may hold
            link = urljoin(link, target.encode("latin-1").decode("utf-8", "surrogateescape"))
        except ValueError:
            raise Failure("hop_refused", "the link to the picture is redirected to what is no link") from None
    raise Failure("hop_refused", f"the link to the picture was redirected more than {MAX_HOPS} times")


def download(link: str, *, stop: Stop, home: Home, provider: Provider, is_last: bool) -> Picture:
    """The verified picture behind a link, tried again (it is free) while time is left.

    `is_last`: one more refusal is the end of the link.

    Raises:
        Failure: paid_not_downloaded, link_expired, link_refused, hop_refused, image_unusable, image_too_large.
    """
    for attempt in range(DOWNLOAD_RETRIES + 1):
        try:
            answer = fetch(link, home, stop=stop, provider=provider)
            return verified(picture_bytes(answer, is_last), stop)
        except AnswerTooLarge:
            raise Failure("image_too_large", f"the picture is larger than {MAX_IMAGE_BYTES // MIB} MiB") from None
        except AnswerEncoded as error:
            failure = Failure("image_unusable", f"what came as the picture cannot be read: {error.reason}")
        except (NotSent, AnswerLost) as error:
            failure = Failure("paid_not_downloaded", f"the picture was not downloaded: {error.reason}")
            if isinstance(error, NotSent) and error.refused:
                raise Failure("hop_refused", f"the link to the picture is refused: {error.reason}") from None
            if isinstance(error, NotSent) and error.lasting:
                hint = f"{error.hint}; then {RECOVER_FREE}" if error.hint else None
                raise failure.but(hint=hint or failure.fault.hint, everywhere=True) from None
        except Failure as refused:
            failure = refused
        final = failure.code not in ("paid_not_downloaded", "image_unusable")
        spent = failure.code == "image_unusable" and attempt >= CORRUPT_DOWNLOAD_RETRIES
        if final or spent or attempt == DOWNLOAD_RETRIES:
            break
        stop.check()  # told to end while this was found out: that is why there is no further attempt
        wait = wait_before(attempt, failure.fault.retry_after_s)
        if wait >= stop.left_s or stop.is_signalled:
            break
        stop.wait(wait)
    raise failure


def picture_bytes(answer: HttpAnswer, is_last: bool) -> bytes:
    """The body of a successful download. That a link is dead is the service's word.

    `is_last`: as in `download`. A clock alone decides nothing: it may be wrong, or forged.

    Raises:
        Failure: paid_not_downloaded where trying again may help, else link_expired or link_refused.
    """
    status = answer.status
    if 200 <= status < 300:
        if answer.whole or ends_as_it_should("PNG", answer.body):  # a whole PNG, whatever length was announced
            return answer.body
        raise Failure("paid_not_downloaded", "the picture was not downloaded: it broke off", http_status=status)
    if status in (408, 425, 429) or status >= 500:
        message = f"the picture was not downloaded: HTTP {status}"
        raise Failure("paid_not_downloaded", message, http_status=status, retry_after_s=retry_after(answer))
    said_expired = status in (403, 410) and b"expired" in answer.body[:4096].lower()
    if said_expired or (is_last and status in (401, 403, 404, 410)):
        raise Failure("link_expired", f"the link to the picture has expired (HTTP {status})", http_status=status)
    raise Failure("link_refused", f"the link to the picture is answered with HTTP {status}", http_status=status)


def fetch_source(evidence: Evidence, provider: Provider, stop: Stop, home: Home) -> Picture:
    """The picture as the service made it: what was handed over, else by its link.

    Raises:
        Failure: as `verified` and `download`; disk_after_paying; host_not_trusted where a file alone names its place.
    """
    link = evidence.have.link
    if evidence.content or not link:
        return handed_over(evidence, stop)
    # What is refused a second time is dead, unless it may live yet: by its own term, or by a task that names another.
    is_past = moment_of(evidence.said.get("expires_at")) <= utc_now() and not evidence.task_id
    is_last = is_past and evidence.data.get("error", {}).get("code") == "link_refused"
    try:
        return download(link, stop=stop, home=home, provider=provider, is_last=is_last)
    except Failure as failure:
        theirs = home_of(evidence.data["endpoint"], provider)
        if failure.code == "hop_refused" and not home.holds(link) and theirs.holds(link):  # named, it could be fetched
            raise unnamed(link, provider) from None
        raise


def handed_over(evidence: Evidence, stop: Stop) -> Picture:
    """The picture whose bytes came with the answer: they are in memory, or lie beside the evidence.

    Raises:
        Failure: as `verified`; link_expired, disk_after_paying.
    """
    held = evidence.held
    try:
        return verified(evidence.content or read_file(held, MAX_IMAGE_BYTES, follow=False), stop)
    except FileNotFoundError:
        if evidence.status == "saved":
            message = "the saved file has vanished, and there is no link to fetch the picture again"
            raise Failure("link_expired", message, lasting=True) from None
        hint = "report it: the picture was handed over, and no disk took it; do not pay again unasked"
        raise Failure("image_unusable", f"{held} is not there", hint=hint, lasting=True) from None
    except OSError as error:
        raise Failure("disk_after_paying", f"{held} cannot be read: {os_reason(error)}") from None
    except Failure as failure:
        if failure.code == "paid_not_downloaded":  # it had too little time
            raise
        # The same bytes will not get better.
        hint = f"report it, do not rerun unasked; what came is kept as {held}"
        raise failure.but(lasting=True, hint=hint) from None


def fetch_anew(evidence: Evidence, provider: Provider, stop: Stop, home: Home, task: Callable[[], Task]) -> Picture:
    """The picture of an evidence file; where its link has died and there is a task, the service names a new one, free.

    Raises:
        Failure: as `fetch_source`.
    """
    try:
        return fetch_source(evidence, provider, stop, home)
    except Failure as failure:
        if failure.code not in DEAD_LINK or not evidence.task_id:
            raise
        try:
            generated = task().ask(stop)
        except Failure:
            generated = None
        if generated is None:
            raise
    evidence.update(response=said_of(generated))
    try:
        return fetch_source(evidence, provider, stop, home)
    except Failure as failure:
        raise failure.but(lasting=failure.fault.lasting or failure.code in DEAD_LINK) from None
