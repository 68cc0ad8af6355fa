"""Answers: what services have in common when they answer, well or not."""

from __future__ import annotations

import calendar
import datetime as dt
import json
import re
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote_to_bytes, urlsplit

from zimage.calls import Generated, HttpCall
from zimage.codes import COMMON_CODES, Code, kind_of
from zimage.contract import BASIC, MAX_KEPT_ANSWER, MAX_LINK_LENGTH, MAX_OTHER_LINKS, MAX_TASK_ID
from zimage.errors import KINDS, Failure
from zimage.outside import at, json_of, kept_text, mask, outside_text, without_surrogates
from zimage.page import media_type, redirect_words
from zimage.traces import ENDED_WELL, OF_A_PICTURE, Traces, traces_in
from zimage.words import Said, said_in

if TYPE_CHECKING:
    from zimage.calls import HttpAnswer
    from zimage.errors import Side


# What HTTP statuses mean where the service's own code does not say more.
STATUS_KINDS = {
    400: "rejected_by_service",
    401: "key_rejected",
    403: "access_denied",
    404: "not_found",
    408: "outcome_unknown",  # a gateway gave up, whatever goes on behind it
    429: "rate_limited",
}
SIDES: dict[Side, re.Pattern[str]] = {  # the words by which services name what content safety has refused
    "input": re.compile(r"\b(?:input|prompt)\b|输入|提示词", re.IGNORECASE),
    "output": re.compile(r"\b(?:output|generated)\b|输出|生成的", re.IGNORECASE),
}
NO_MORE_STATUSES: Mapping[int, str] = {}
GATEWAY_STATUSES = (502, 504)  # whatever their body says, the call is not sent again on its own
OWN_FAULT_STATUSES = (500, 503)  # not billed, but only where the service itself says so in its JSON
UNSAID = {  # what an answer without a message lacks
    "no_image": "no picture is in the answer",
    "answer_unusable": "what came back is not the service's JSON",
    "outcome_unknown": "no answer from which the outcome can be told",
}


LONGEST_WORDS = 20_000  # characters; more is not told anyhow
_A_QUERY = re.compile(r"(https?://[^\s?]{1,2000}\?)[^\s)\"'>]+")  # of a link: it may be what opens a picture


def service_failure(
    answer: HttpAnswer,
    *,
    message: object = None,
    code: str = "",
    kind: str | None = None,
    is_own_json: bool,
    status: int | None = None,
    statuses: Mapping[int, str] = NO_MORE_STATUSES,
    request_id: str = "",
    codes: Sequence[Code] = COMMON_CODES,
    prompt: str = "",
) -> Failure:
    """What an answer without a picture means: one error table for all services.

    Code and message are read from the body, whatever its form, where they are not given. `kind` is what the service's
    own code means, else the first row of `codes` that fits says it, and outranks the status; `is_own_json`: the body is
    what this service says, not a gateway. `status`: where the service names another one than HTTP did; `statuses`: what
    further ones mean to it. `prompt`: words that only repeat it say nothing.
    """
    status = status or answer.status
    body = read_json(answer)
    said, traces = said_in(answer, body), traces_in(body)
    kind = _kind_of(
        answer, status, kind or kind_of(said, status, codes) or statuses.get(status), is_own_json, said, traces
    )
    code = outside_text(code or said.code, 100)
    doubtful = answer.status in GATEWAY_STATUSES and KINDS[kind].retryable
    is_kept = KINDS[kind].billed != "no"
    words = str(message or _words_beside(code, prompt, said))[:LONGEST_WORDS]
    if words and said.form in ("html", "text") and not message:
        words = f"{media_type(answer)}: {words}"  # of whoever stands before the service
    what = _what(answer, kind, outside_text(_A_QUERY.sub(r"\1…", words) if is_kept else words))
    named = code if code not in what else ""
    return Failure(
        kind,
        " ".join(filter(None, ("the service answered", str(status), named)))
        + (f": {what}" if what else "")
        + (_named(traces) if is_kept else ""),
        http_status=answer.status,
        service_code=code or None,
        request_id=request_id or None,
        retry_after_s=retry_after(answer),
        retryable=False if doubtful else None,
        refused=refused_side(what) if kind == "blocked" else None,
        image_url=next(iter(_kept_links(traces)), None) if is_kept else None,
        answer=kept_answer(answer, traces) if is_kept else None,
    )


def refused_side(said: str) -> Side | None:
    """Which side content safety has refused, by the service's words; None where they name none, or both."""
    named = [side for side, words in SIDES.items() if words.search(said)]
    return named[0] if len(named) == 1 else None


def _words_beside(code: str, prompt: str, said: Said) -> str:
    return "" if said.message in (code, prompt, prompt.strip()) else said.message


def _what(answer: HttpAnswer, kind: str, words: str) -> str:
    """What is told of an answer: its words, and what it lacks."""
    if 300 <= answer.status < 400 and not words:
        return redirect_words(answer)
    lacks = UNSAID.get(kind, "")
    if kind == "outcome_unknown":
        return words or lacks
    return ("; it says: " if kind == "no_image" else ": ").join(filter(None, (lacks, words)))


def _named(traces: Traces) -> str:
    """What an answer holds of a picture, to be told: the link itself stands in a field of its own."""
    tasks = [outside_text(name, 100) for name in _kept_tasks(traces)[:3]]
    named = f"; it names {'task' if len(tasks) == 1 else 'tasks'} {', '.join(tasks)}" if tasks else ""
    return named + ("; it holds a link, which the evidence has" if _kept_links(traces) else "")


def _kept_tasks(traces: Traces) -> list[str]:
    is_usable = [
        name for name in traces.task_ids if len(name) <= MAX_TASK_ID and name == mask(without_surrogates(name))
    ]
    return is_usable[:MAX_OTHER_LINKS]


def _kept_links(traces: Traces) -> list[str]:
    return [link for link in traces.links if len(link) <= MAX_LINK_LENGTH][:MAX_OTHER_LINKS]


def kept_answer(answer: HttpAnswer, traces: Traces) -> dict[str, Any]:
    """An answer that was not understood, as the evidence keeps it (UNREAD_SCHEMA): bounded, without the key."""
    kept = {
        "http_status": answer.status,
        "content_type": outside_text(answer.headers.get("content-type"), 100),
        "task_ids": _kept_tasks(traces),
        "links": _kept_links(traces),
        "body": kept_text(answer.body[: 4 * MAX_KEPT_ANSWER].decode("utf-8-sig", "replace"))[:MAX_KEPT_ANSWER],
    }
    return {name: value for name, value in kept.items() if value}


def _kind_of(answer: HttpAnswer, status: int, kind: str | None, is_own_json: bool, said: Said, traces: Traces) -> str:
    refuses = 400 <= status < 500  # so nothing was made, whoever says it
    if not answer.whole and not refuses:
        return "outcome_unknown"
    if traces.of_work and (not refuses or status == 429):
        kind, is_own_json = (kind if kind and KINDS[kind].billed != "no" else None), False
        status = status if status != 429 else 500
    if kind and (refuses or said.form in ("json", "none") or KINDS[kind].billed != "no"):
        return kind  # else a gateway's page speaks of what it does not know
    if status in STATUS_KINDS:
        return STATUS_KINDS[status]
    if status in OWN_FAULT_STATUSES and is_own_json:
        return "service_failing"
    if 400 <= status < 500:
        return "refused_by_service"
    if 200 <= status < 300:
        if read_json(answer) is not None:
            return "no_image"
        # What breaks off may have been the answer with the picture; what is of another kind is no answer at all.
        return "outcome_unknown" if looks_cut(answer.body) else "answer_unusable"
    return "outcome_unknown"


def found_elsewhere(answer: HttpAnswer, body: dict[str, Any] | None, default: dt.datetime) -> Generated | None:
    """A picture that is in an answer, though not where the service has agreed to put it; None where none is.

    `default`: when its link dies, where that does not say so. An answer that says no is not searched, and one that
    says that something failed only for what is called as a picture file is.
    """
    if not (answer.status < 300 or answer.status == 429 or answer.status >= 500):
        return None
    if answer.status < 300 and answer.whole and answer.body.startswith((b"\x89PNG\r\n", b"\xff\xd8\xff", b"RIFF")):
        return Generated(content=answer.body, request_id=request_id(answer, {}))
    traces = traces_in(body)
    if traces.task_status not in ("", *ENDED_WELL):
        return None
    links = [link for link in traces.pictures if answer.status < 300 or OF_A_PICTURE.search(urlsplit(link).path)]
    content = b"" if links else next(filter(None, map(_decoded, traces.contents)), b"")
    if not links and not content:
        return None
    return Generated(
        image_url=links[0] if links else "",
        content=content,
        expires_at=link_expiry(links[0], default) if links else None,
        request_id=request_id(answer, body or {}),
        other_urls=tuple(links[1:]),
        warnings=("the picture stood in another place of the answer than is documented",),
    )


def links_in(field: Any) -> list[str]:
    """The links in a field of pictures: texts, or objects with a `url`; what cannot be a link is left out."""
    items = field if isinstance(field, list) else [field]
    texts = [at(item, "url") if isinstance(item, dict) else item for item in items]
    return [text.strip() for text in texts if isinstance(text, str) and re.match(r"\s*https?://", text)]


def _decoded(text: str) -> bytes:
    """The bytes of base64, which may be a data: link; none where it is not whole."""
    import base64

    try:
        return base64.b64decode(re.sub(r"\s", "", text[text.find(",") + 1 :]), validate=True)
    except ValueError:
        return b""


URL_SAFE = str.maketrans("-_", "+/")  # some servers write base64 so


def is_data(link: str) -> bool:
    return link.lstrip()[:5].lower() == "data:"


def base64_picture(text: str) -> bytes:
    """The bytes of a picture that is handed over in base64, or as a data: link, in whatever spelling of both.

    Raises:
        ValueError: where it is not whole, or empty.
    """
    import base64

    head, comma, data = text.partition(",")
    if comma and is_data(head) and not head.lower().endswith(";base64"):
        return unquote_to_bytes(data) or b"\0"  # none of it is a picture
    plain = re.sub(r"\s", "", data if comma else head).rstrip("=").translate(URL_SAFE)
    content = base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    if not content:
        raise ValueError("empty")
    return content


def bearer(key: str) -> dict[str, str]:
    """The headers of a call whose answer is JSON; without a key, none of it. A login names its own scheme."""
    credentials = key if key.startswith(BASIC) else f"Bearer {key}"
    return {"Accept": "application/json"} | ({"Authorization": credentials} if key else {})


def json_post(url: str, payload: Mapping[str, Any], headers: dict[str, str]) -> HttpCall:
    """A POST of a JSON body in UTF-8."""
    body = json.dumps(payload, ensure_ascii=False).encode()
    return HttpCall("POST", url, headers | {"Content-Type": "application/json"}, body)


_LENIENT = json.JSONDecoder(strict=False, parse_int=lambda digits: int(digits) if len(digits) < 20 else None)


def read_json(answer: HttpAnswer) -> dict[str, Any] | None:
    """The JSON object in an answer; None where there is none, whatever stands there instead.

    Small faults of form are forgiven: behind them may be the link to a picture that has been paid for.
    """
    return _object_in(answer.body.decode("utf-8-sig", "replace"))


def read_begun_json(answer: HttpAnswer) -> dict[str, Any] | None:
    """As `read_json`; of a good answer that broke off within its JSON, what had come whole by then.

    Only to find a picture in: what is missing tells nothing.
    """
    body = read_json(answer)
    return body if body is not None or not 200 <= answer.status < 300 else _object_in(_completed(answer))


_AN_EVENT = re.compile(r"\s{0,99}(?:data|event|id|retry|):")


def _object_in(text: str) -> dict[str, Any] | None:
    """The JSON object that a text is; of a stream of events the last, and those before it as `events`."""
    if _AN_EVENT.match(text):
        lines = (line[5:] for line in text.splitlines() if line.startswith("data:"))
        *earlier, last = [None, *filter(None, map(_plain_object_in, lines))]
        return last and (last | {"events": earlier[1:]} if earlier[1:] else last)
    return _plain_object_in(text)


def _plain_object_in(text: str) -> dict[str, Any] | None:
    try:
        body = json_of(text, _LENIENT)
    except ValueError:
        return None
    return body if isinstance(body, dict) else None


_JSON_SIGN = re.compile(r'[{}\[\],:]|"[^"\\]*(?:\\.[^"\\]*)*(?:"|\\?\Z)', re.DOTALL)


def _completed(answer: HttpAnswer) -> str:
    """JSON that broke off, up to the last value that had come whole, and all that is open closed."""
    text = answer.body.decode("utf-8-sig", "replace")
    opened: list[str] = []  # what will close it
    end = depth = 0  # of the part to keep
    before = ""
    for found in _JSON_SIGN.finditer(text):
        sign = found[0]
        if sign in "{[":
            opened.append("}" if sign == "{" else "]")
        elif sign in "}]":
            if opened[-1:] != [sign]:
                return ""
            opened.pop()
        is_value = len(sign) > 1 and sign[-1] == '"' and (before == ":" or opened[-1:] == ["]"])
        if is_value or sign in "}],":
            end, depth = found.start() if sign == "," else found.end(), len(opened)
        before = sign
    return text[:end] + "".join(reversed(opened[:depth]))


def looks_cut(body: bytes) -> bool:
    """Whether a body that is not JSON may be the beginning of some."""
    return not body.strip() or body.lstrip()[:1] == b"{"


def request_id(answer: HttpAnswer, body: dict[str, Any]) -> str:
    said = body.get("request_id")
    return outside_text(said if isinstance(said, str) and said else answer.headers.get("x-request-id"), 200)


def retry_after(answer: HttpAnswer) -> float | None:
    """Seconds that the answer's Retry-After asks to wait (a number or an HTTP date); None where it says nothing."""
    import email.utils

    said = answer.headers.get("retry-after", "").strip()
    if re.fullmatch(r"[0-9]{1,15}(\.[0-9]{1,9})?", said):
        return float(said)
    try:
        moment = email.utils.parsedate_to_datetime(said)
        return max(0.0, round(moment.timestamp() - time.time(), 1))
    except (ValueError, TypeError, IndexError, OverflowError):
        return None


def link_expiry(link: str, default: dt.datetime) -> dt.datetime:
    """When a signed OSS link dies, by its own parameters in the older or newer signature."""
    try:
        query = {name.lower(): values[0] for name, values in parse_qs(urlsplit(link).query).items()}
        if "expires" in query:
            seconds = int(query["expires"])
        else:
            signed = calendar.timegm(time.strptime(query["x-oss-date"], "%Y%m%dT%H%M%SZ"))
            seconds = signed + int(query["x-oss-expires"])
        return dt.datetime.fromtimestamp(seconds, dt.timezone.utc)
    except (KeyError, ValueError, OverflowError, OSError):
        return default
