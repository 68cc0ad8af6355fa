"""Transport: one HTTP exchange, with a deadline that holds and a sure word on whether it left."""

from __future__ import annotations

import contextlib
import io
import zlib
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from zimage.answers import read_json
from zimage.calls import HttpAnswer, LocalCall
from zimage.contract import ASKING_SHARE, ASKING_TIME, MAX_ANSWER_BYTES, MAX_ERROR_BYTES, MIB, SKILL, VERSION
from zimage.errors import Failure, NotSent
from zimage.outside import outside_text
from zimage.page import base_url_advice
from zimage.proxy import check_proxy, own_refusal, proxy_for
from zimage.tls import tls_context
from zimage.waiting import WATCHER, Stop, Stopped, in_time
from zimage.wire import Wire, wired_adapter

if TYPE_CHECKING:
    from zimage.calls import HttpCall
    from zimage.endpoint import Endpoint
    from zimage.keys import Key
    from zimage.provider import Provider

PIECE = 64 * 1024  # bytes of an answer that are read at once


class AnswerLost(Exception):
    """The request left, and no whole answer came back."""

    def __init__(self, reason: str) -> None:
        self.reason = reason


class AnswerTooLarge(Exception):
    """The answer is larger than this tool takes."""


class AnswerEncoded(Exception):
    """The answer is packed in a way that was not asked for and is not unpacked here."""

    def __init__(self, coding: str, request_id: str) -> None:
        self.reason = f"it is encoded as {outside_text(coding, 60)}, which was not asked for"
        self.request_id = outside_text(request_id, 200)


class Cut(Stopped):
    """A signal has cut an answer: what had come of it may be all that counts."""

    def __init__(self, reason: str, answer: HttpAnswer) -> None:
        super().__init__(reason, request_left=True)
        self.answer = answer


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
    proxy = proxy_for(call.url)
    trust = tls_context() if "https" in (urlsplit(call.url).scheme, proxy and proxy.scheme) else None
    wire = Wire(call, stop, reach, proxy)
    proxies = {"all": proxy.url} if proxy and not proxy.is_socks else {}  # SOCKS is the wire's own business
    headers = {"User-Agent": f"{SKILL}/{VERSION}", "Accept-Encoding": "identity", "Connection": "close"} | call.headers
    try:
        request = requests.Request(call.method, call.url, headers=headers, data=call.body).prepare()
        adapter = wired_adapter()(wire, trust)
        with contextlib.closing(adapter), WATCHER.cutting(stop, wire.cut):
            response = adapter.send(request, timeout=wire.remaining, proxies=proxies)
            with contextlib.closing(response):
                answer = _read_answer(response, limit)
    except (urllib3.exceptions.HTTPError, OSError, ValueError) as error:  # those of requests are OSErrors
        if stop.reason:
            raise Stopped(stop.reason, request_left=wire.connected) from None
        raise _transport_failure(wire, error) from None
    finally:
        wire.close()
    answer = answer._replace(whole=answer.whole and not (wire.expired or wire.broken))  # which look like an end
    if stop.reason and wire.expired:
        raise Cut(stop.reason, answer)
    if refusal := own_refusal(proxy, answer, call.url):
        raise refusal
    return answer


def _read_answer(response: Any, limit: int) -> HttpAnswer:
    import urllib3

    headers = {name.lower(): value for name, value in response.headers.items()}
    if 300 <= response.status_code < 400 and "location" in headers:
        return HttpAnswer(response.status_code, headers, b"")  # all that a redirect says is said
    is_good = response.status_code < 300
    limit = limit if is_good else MAX_ERROR_BYTES  # the status alone says enough
    body = io.BytesIO()  # hands its bytes out without a copy
    # Left to itself, urllib3 throws away the beginning of a body that breaks off: it may hold the link.
    response.raw.enforce_content_length = False
    if is_good and (response.raw.length_remaining or 0) > limit:  # what is announced, where that is a number
        raise AnswerTooLarge
    try:
        for chunk in response.raw.stream(PIECE, decode_content=False):  # else as often as the server says
            body.write(chunk)
            if body.tell() > limit and is_good:
                raise AnswerTooLarge
            if body.tell() > limit:
                break
        whole = not response.raw.length_remaining
    except (urllib3.exceptions.HTTPError, OSError) as error:
        body.write(_begun_chunk(error))
        whole = False
    if not body.tell() and not {"content-length", "transfer-encoding"} & headers.keys():
        whole = False  # nothing announced and nothing sent: the headers broke off
    return _unpacked(HttpAnswer(response.status_code, headers, body.getvalue(), whole), limit)


def _unpacked(answer: HttpAnswer, limit: int) -> HttpAnswer:
    """The answer without the one layer of gzip that some gateways add unasked: behind it is what was paid for.

    Raises:
        AnswerTooLarge, AnswerEncoded.
    """
    coding = answer.headers.get("content-encoding", "").strip().lower()
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
        error = error.__context__
    return b""


def _transport_failure(wire: Wire, error: Exception) -> Exception:
    """What an exception of the HTTP library means. Texts of the library may hold a proxy's password: left out."""
    import requests

    if isinstance(wire.failure, NotSent):
        return wire.failure
    if not wire.connecting and isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):
        return NotSent("the URL cannot be used", lasting=True)
    if not wire.connecting and isinstance(error, ValueError):
        return NotSent("the request cannot be sent: HTTP has no form for a header of it", lasting=True)
    if wire.connecting and not wire.connected:
        if wire.expired:
            return wire.placed(NotSent("no connection was made in time"))
        return wire.placed(NotSent("the connection was closed before the request left"))
    if wire.expired or isinstance(error, requests.exceptions.Timeout):
        return AnswerLost("no answer came in time")
    return AnswerLost("the connection broke before the answer was complete")


def _unreachable(error: NotSent, endpoint: Endpoint) -> Failure:
    message = f"{endpoint.host}: {error.reason}"
    return Failure("unreachable", message, hint=error.hint, retryable=not error.lasting, everywhere=error.lasting)


def check_way(endpoint: Endpoint) -> None:
    """What this machine can tell of the way to a service without sending anything.

    Raises:
        Failure: unreachable.
    """
    if endpoint.host:  # else the work is done in this process
        try:
            check_proxy(endpoint.url)
        except NotSent as error:
            raise _unreachable(error, endpoint) from None


Read = TypeVar("Read")


def ask(
    call: HttpCall | LocalCall,
    read: Callable[[HttpAnswer], Read],
    stop: Stop,
    endpoint: Endpoint,
    limit: int = MAX_ANSWER_BYTES,
    *,
    links_elsewhere: bool = False,
) -> Read:
    """Send one call to the service and read its answer; what the network does becomes a Failure.

    `links_elsewhere`: as of a Provider.
    """
    if isinstance(call, LocalCall):
        result: Read = in_time(call.work, stop)
        return result
    reach = "loopback" if endpoint.is_loopback else "service with links" if links_elsewhere else "service"
    try:
        answer = exchange(call, stop, limit=limit, reach=reach)
    except NotSent as error:
        raise _unreachable(error, endpoint) from None
    except Cut as cut:
        try:
            return read(cut.answer)
        except Failure:
            raise cut from None
    except AnswerLost as error:
        raise Failure("outcome_unknown", f"{endpoint.host}: {error.reason}") from None
    except AnswerTooLarge:
        raise Failure("answer_unusable", f"the answer is larger than {limit // MIB} MiB") from None
    except AnswerEncoded as error:
        message = f"the answer cannot be read: {error.reason}"
        raise Failure("answer_unusable", message, request_id=error.request_id or None) from None
    try:
        return read(answer)
    except Failure as failure:
        raise _placed(failure, answer, call.url, endpoint) from None


def get_to_know(provider: Provider, endpoint: Endpoint, key: Key, stop: Stop) -> Failure | None:
    """Let a server say what it is, by free questions; one that says nothing is no reason to fail.

    Returns why the last of them did not even reach it; None where it did, or none was asked. Raises Stopped.
    """
    patience = stop.part(min(ASKING_TIME, ASKING_SHARE * stop.left_s))
    questions = provider.introduction(endpoint, key.value)
    answer = unreached = None
    with contextlib.suppress(StopIteration):
        while True:
            call = questions.send(answer)
            answer = unreached = None
            try:
                answer = ask(call, lambda said: said, patience, endpoint)
            except Failure as failure:
                unreached = failure if failure.code == "unreachable" else None
    return unreached


def ask_all(
    questions: Generator[HttpCall, HttpAnswer, Read], stop: Stop, endpoint: Endpoint, limit: int = MAX_ANSWER_BYTES
) -> Read:
    """Send calls one after the other, each of which may hang on the answers so far. Raises as `ask`."""
    call = next(questions)
    while True:
        try:
            call = ask(call, questions.send, stop, endpoint, limit)
        except StopIteration as end:
            found: Read = end.value
            return found


def _placed(failure: Failure, answer: HttpAnswer, url: str, endpoint: Endpoint) -> Failure:
    """The failure with what its answer tells of the way there: it may be another's who stands on it, or lives there."""
    fault = failure.fault
    if read_json(answer) is not None:
        return failure  # an API speaks
    proxy = proxy_for(url)
    if proxy is not None and proxy.forwards(url):
        past = proxy.way_past(url)
        return failure.but(message=f"{fault.message}; it came through {proxy}", hint=f"{past}; {fault.hint}")
    advice = base_url_advice(answer, endpoint.root)
    return failure.but(hint=f"{advice}; {fault.hint}") if advice else failure
