"""Answers: what services have in common when they answer, well or not."""

from __future__ import annotations

import calendar
import datetime as dt
import json
import re
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlsplit

from zimage.errors import KINDS, Failure
from zimage.outside import json_of, outside_text
from zimage.provider import HttpCall

if TYPE_CHECKING:
    from zimage.errors import Side
    from zimage.provider import HttpAnswer


# What HTTP statuses mean where the service's own code does not say more.
STATUS_KINDS = {
    400: "rejected_by_service",
    401: "key_rejected",
    403: "access_denied",
    404: "not_found",
    429: "rate_limited",
}
SIDES: dict[Side, re.Pattern[str]] = {  # the words by which services name what content safety has refused
    "input": re.compile(r"\b(?:input|prompt)\b|输入|提示词", re.IGNORECASE),
    "output": re.compile(r"\b(?:output|generated)\b|输出|生成的", re.IGNORECASE),
}
GATEWAY_STATUSES = (502, 504)  # whatever their body says, the call is not sent again on its own
OWN_FAULT_STATUSES = (500, 503)  # not billed, but only where the service itself says so in its JSON
UNSAID = {  # what an answer without a message lacks
    "no_image": "no picture is in the answer",
    "answer_unusable": "what came back is not the service's JSON",
    "outcome_unknown": "no answer from which the outcome can be told",
}


def service_failure(
    answer: HttpAnswer,
    *,
    message: object,
    code: str = "",
    kind: str | None = None,
    is_own_json: bool,
    status: int | None = None,
    request_id: str = "",
) -> Failure:
    """What an answer without a picture means: one error table for all services.

    `kind` is what the service's own code means, and outranks the status; `is_own_json`: the body is what this service
    says, not a gateway. `status`: where the service names another one than HTTP did.
    """
    status = status or answer.status
    kind = _kind_of(answer, status, kind, is_own_json)
    code = outside_text(code, 100)
    redirect = "a redirect, which is not followed with the key" if 300 <= status < 400 else ""
    what = outside_text(message) or redirect or UNSAID.get(kind, "")
    doubtful = answer.status in GATEWAY_STATUSES and KINDS[kind].retryable
    return Failure(
        kind,
        " ".join(filter(None, ("the service answered", str(status), code))) + (f": {what}" if what else ""),
        http_status=answer.status,
        service_code=code or None,
        request_id=request_id or None,
        retry_after_s=retry_after(answer),
        retryable=False if doubtful else None,
        refused=refused_side(what) if kind == "blocked" else None,
    )


def refused_side(said: str) -> Side | None:
    """Which side content safety has refused, by the service's words; None where they name none, or both."""
    named = [side for side, words in SIDES.items() if words.search(said)]
    return named[0] if len(named) == 1 else None


def _kind_of(answer: HttpAnswer, status: int, kind: str | None, is_own_json: bool) -> str:
    if not answer.whole and not 400 <= status < 500:
        return "outcome_unknown"
    if kind:
        return kind
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


def bearer(key: str) -> dict[str, str]:
    """The headers of a call whose answer is JSON; without a key, none of it."""
    return {"Accept": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})


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


def _object_in(text: str) -> dict[str, Any] | None:
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
