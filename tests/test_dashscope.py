"""The DashScope provider: what is sent, what each answer means, what is sent again. `responses` plays HTTP."""

from __future__ import annotations

import datetime as dt
import json
from typing import Any

import pytest
import requests
import responses

import zimage.outside
from conftest import TEST_KEY
from providers.dashscope import DashScope
from zimage.calls import Generated, HttpAnswer
from zimage.errors import KINDS, Failure
from zimage.evidence import said_of, timestamp
from zimage.keys import Key
from zimage.outside import remember_secret
from zimage.request import ImageRequest, normalize
from zimage.settle import retry_wait
from zimage.transport import ask
from zimage.trust import parse_base_url
from zimage.waiting import Stop, backoff

PROVIDER = DashScope()
ROOT = "https://dashscope.aliyuncs.com/api/v1"
URL = f"{ROOT}/services/aigc/multimodal-generation/generation"
LINK = (
    "https://dashscope-result-bj.oss-cn-beijing.aliyuncs.com/x.png?Expires=1767000000&OSSAccessKeyId=a&Signature=b%3D"
)
NOW = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)
REQUEST = normalize({"prompt": "a calm lake", "seed": 7})
ENDPOINT = parse_base_url(ROOT, "test", PROVIDER)


def body(*content: dict[str, Any], **message: Any) -> dict[str, Any]:
    choice = {"finish_reason": "stop", "message": {"role": "assistant", "content": list(content)} | message}
    return {"request_id": "r-1", "output": {"choices": [choice]}, "usage": {"image_count": 1}}


def answer(status: int, value: Any, **headers: str) -> HttpAnswer:
    content = value if isinstance(value, bytes) else json.dumps(value).encode()
    return HttpAnswer(status, {name.replace("_", "-"): text for name, text in headers.items()}, content)


def read(status: int, value: Any, request: ImageRequest = REQUEST) -> Generated:
    made = PROVIDER.read(answer(status, value), request, NOW)
    assert isinstance(made, Generated)
    return made


def failure(status: int, value: Any, **headers: str) -> Failure:
    with pytest.raises(Failure) as caught:
        PROVIDER.read(answer(status, value, **headers), REQUEST, NOW)
    return caught.value


# What is sent --------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@responses.activate
def test_sends_exactly_the_documented_request() -> None:
    responses.post(URL, json=body({"image": LINK}))
    call = PROVIDER.submit(PROVIDER.payload(REQUEST), ENDPOINT, TEST_KEY, "ws-1")
    ask(call, lambda a: PROVIDER.read(a, REQUEST, NOW), Stop(10), ENDPOINT)
    (sent,) = responses.calls
    assert json.loads(sent.request.body or b"") == {
        "model": "z-image-turbo",
        "input": {"messages": [{"role": "user", "content": [{"text": "a calm lake"}]}]},
        "parameters": {"size": "1024*1024", "prompt_extend": False, "seed": 7},
    }
    assert sent.request.headers["Authorization"] == f"Bearer {TEST_KEY}"
    assert sent.request.headers["Content-Type"] == "application/json"
    assert sent.request.headers["X-DashScope-WorkSpace"] == "ws-1"


@responses.activate
def test_queries_the_model_as_the_official_client_does() -> None:
    responses.get(f"{ROOT}/models", json={"output": {"models": [{"model": "z-image-turbo"}], "total": 1}})
    call = PROVIDER.query(ENDPOINT, TEST_KEY, None)
    assert ask(call, PROVIDER.read_query, Stop(10), ENDPOINT) is True
    assert responses.calls[0].request.url == f"{ROOT}/models?model=z-image-turbo&page_no=1&page_size=1"
    assert responses.calls[0].request.method == "GET"


@pytest.mark.parametrize("models", [[], [{"model": "z-image"}], None, {}, "z-image-turbo"])
def test_a_query_that_does_not_list_the_model_is_no_error(models: Any) -> None:
    assert PROVIDER.read_query(answer(200, {"output": {"models": models}})) is False


# What a good answer means --------------------------------------------------------------------------------------------


def test_reads_link_request_id_and_usage() -> None:
    generated = read(200, body({"image": LINK}, {"text": "a calm lake"}, reasoning_content=""))
    assert (generated.image_url, generated.request_id, generated.usage) == (LINK, "r-1", {"image_count": 1})
    assert (generated.rewritten_prompt, generated.reasoning) == ("", "")


def test_a_repeated_prompt_is_no_rewritten_one() -> None:
    assert read(200, body({"image": LINK}, {"text": "a calm lake"})).rewritten_prompt == ""
    assert read(200, body({"image": LINK}, {"text": "a wide, calm lake"})).rewritten_prompt == "a wide, calm lake"
    extended = normalize({"prompt": "a calm lake", "prompt_extend": True})
    assert read(200, body({"image": LINK}, {"text": "a calm lake"}), extended).rewritten_prompt == "a calm lake"


def test_reasoning_is_found_on_the_message_and_among_the_content() -> None:
    assert read(200, body({"image": LINK}, reasoning_content="thought")).reasoning == "thought"
    assert read(200, body({"image": LINK}, {"reasoning_content": "thought"})).reasoning == "thought"


@pytest.mark.parametrize(
    ("query", "expires"),
    [
        ("Expires=1767000000&Signature=x", "2025-12-29T09:20:00.000Z"),
        ("x-oss-date=20260101T120000Z&x-oss-expires=86400&x-oss-signature=x", "2026-01-02T12:00:00.000Z"),
        ("X-Oss-Date=20260101T120000Z&X-Oss-Expires=3600", "2026-01-01T13:00:00.000Z"),
        ("Expires=soon", "2026-01-02T00:00:00.000Z"),
        ("Expires=99999999999999999999", "2026-01-02T00:00:00.000Z"),
        ("x-oss-date=yesterday&x-oss-expires=1", "2026-01-02T00:00:00.000Z"),
        ("", "2026-01-02T00:00:00.000Z"),
    ],
)
def test_a_link_tells_when_it_dies_and_else_24_hours_count(query: str, expires: str) -> None:
    generated = read(200, body({"image": f"https://x.aliyuncs.com/a.png?{query}"}))
    assert generated.expires_at is not None
    assert timestamp(generated.expires_at) == expires


def test_of_several_pictures_the_first_is_taken_with_a_warning() -> None:
    generated = read(200, body({"image": LINK}, {"image": "https://x.aliyuncs.com/2.png"}))
    assert generated.image_url == LINK
    assert generated.other_urls == ("https://x.aliyuncs.com/2.png",)
    assert said_of(generated)["other_image_urls"] == ["https://x.aliyuncs.com/2.png"]


# What a bad answer means ---------------------------------------------------------------------------------------------

ERROR_ROWS = [  # HTTP status, code, exit, billed, sent again: facts of the vendor's error table
    (400, "InvalidParameter", 2, "no", False),
    (400, "InvalidParameter.DataInspection", 2, "no", False),
    (400, "BadRequest.TooLarge", 2, "no", False),
    (400, "InvalidURL", 2, "no", False),
    (400, "DataInspectionFailed", 5, "no", False),
    (400, "Arrearage", 4, "no", False),
    (401, "InvalidApiKey", 3, "no", False),
    (401, "invalid_api_key", 3, "no", False),
    (403, "AccessDenied.Unpurchased", 3, "no", False),
    (403, "Model.AccessDenied", 3, "no", False),
    (403, "AllocationQuota.FreeTierOnly", 4, "no", False),
    (403, "Throttling.AllocationQuota", 4, "no", False),
    (429, "Throttling.AllocationQuota", 6, "no", True),  # of a second or a minute; the free one is told by its words
    (429, "insufficient_quota", 6, "no", True),
    (404, "ModelNotFound", 2, "no", False),
    (404, "NotFound", 2, "no", False),
    (429, "Throttling", 6, "no", True),
    (429, "Throttling.RateQuota", 6, "no", True),
    (429, "Throttling.BurstRate", 6, "no", True),
    (500, "InternalError", 6, "no", True),
    (500, "InternalError.Algo", 6, "no", True),
    (503, "ServiceUnavailable", 6, "no", True),
    (503, "ModelServingError", 6, "no", True),
    (500, "RequestTimeOut", 7, "unknown", False),
    (504, "RequestTimeOut", 7, "unknown", False),
    # The code outranks the status.
    (200, "Throttling", 6, "no", True),
    (500, "InvalidApiKey", 3, "no", False),
    (400, "InternalError", 6, "no", True),
    (502, "DataInspectionFailed", 5, "no", False),
    # A code that nobody documented: the status counts.
    (400, "Strange", 2, "no", False),
    (401, "Strange", 3, "no", False),
    (500, "Strange", 6, "no", True),
    (503, "Strange", 6, "no", True),
    (402, "Strange", 8, "no", False),
    (418, "Strange", 8, "no", False),
    (502, "Strange", 7, "unknown", False),
    (520, "Strange", 7, "unknown", False),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("status", "code", "exit_code", "billed", "again"), ERROR_ROWS)
def test_every_error_row_has_its_exit_code(status: int, code: str, exit_code: int, billed: str, again: bool) -> None:
    error = failure(status, {"code": code, "message": "said", "request_id": "r-9"})
    assert (error.fault.exit_code, error.fault.billed, error.fault.retryable) == (exit_code, billed, again)
    assert error.fault.service_code == code
    assert error.fault.http_status == status
    assert error.fault.request_id == "r-9"
    assert "said" in error.message


@pytest.mark.parametrize(
    ("status", "content", "exit_code", "billed"),
    [
        (200, b"<html>busy</html>", 8, "unknown"),
        (200, b"", 7, "unknown"),
        (200, b'{"request_id": "r-1", "output": {"cho', 7, "unknown"),
        (200, b"[]", 8, "unknown"),
        (200, b'{"request_id": "r-1", "output": {"choices": []}}', 8, "unknown"),
        (500, b"<html>Internal Server Error</html>", 7, "unknown"),
        (500, b'{"error": "x"}', 7, "unknown"),
        (503, b"<html>busy</html>", 7, "unknown"),
        (502, b"<html>Bad Gateway</html>", 7, "unknown"),
        (504, b"", 7, "unknown"),
        (302, b"", 7, "unknown"),
        (429, b"<html>slow down</html>", 6, "no"),
        (404, b"<html>not found</html>", 2, "no"),
        (451, b"", 8, "no"),
    ],
)
def test_an_answer_that_is_not_the_services_json(status: int, content: bytes, exit_code: int, billed: str) -> None:
    error = failure(status, content)
    assert (error.fault.exit_code, error.fault.billed) == (exit_code, billed)


# What is sent again --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("retry_after", "waits"),
    [
        ("0", 0.5),  # never below the first step
        ("0.05", 0.5),
        ("1", 1.0),
        ("69", 69.0),  # of 100 s, 80 are for generating, and the last attempt needs 10
        ("71", None),
        ("3600", None),
        ("1.5", 1.5),
    ],
)
def test_retry_after_is_obeyed_where_it_fits(retry_after: str, waits: float | None) -> None:
    stop = Stop(100)
    error = failure(429, {"code": "Throttling"}, retry_after=retry_after)
    assert error.fault.retry_after_s == float(retry_after)
    assert retry_wait(error, 0, 4, stop.generating) == waits


@pytest.mark.parametrize("garbage", ["soon", "-5", "", "1e9", "٣", "Thu, 99 Foo 2026 00:00:00 GMT"])
def test_a_retry_after_that_says_nothing_is_left_aside(garbage: str) -> None:
    assert failure(429, {"code": "Throttling"}, retry_after=garbage).fault.retry_after_s is None


def test_waits_grow_twofold_with_jitter_up_to_twenty_seconds() -> None:
    for attempt in range(12):
        longest = min(20.0, 0.5 * 2**attempt)
        waits = {backoff(attempt) for _ in range(50)}
        assert len(waits) > 1
        assert all(longest * 0.7 <= wait <= longest for wait in waits)


OF_A_WHOLE_BATCH = {"already_running", "incomplete", "time_limit"}


@pytest.mark.parametrize("code", sorted(KINDS.keys() - OF_A_WHOLE_BATCH))
def test_what_may_have_been_billed_is_never_sent_again(code: str) -> None:
    stop = Stop(100)
    wait = retry_wait(Failure(code, "x"), 0, 4, stop.generating)
    if KINDS[code].billed != "no":
        assert wait is None
    assert (wait is not None) == (code in ("rate_limited", "service_failing", "unreachable"))


def test_max_retries_counts_the_retries() -> None:
    stop = Stop(100)
    error = Failure("rate_limited", "x")
    assert [retry_wait(error, n, 2, stop.generating) is None for n in range(4)] == [
        False,
        False,
        True,
        True,
    ]
    assert retry_wait(error, 0, 0, stop.generating) is None


@responses.activate
@pytest.mark.parametrize(
    "broken", [requests.ReadTimeout(), requests.ConnectionError("Connection aborted."), requests.exceptions.SSLError()]
)
def test_a_connection_that_breaks_after_the_request_left_is_unknown(broken: Exception) -> None:
    responses.post(URL, body=broken)
    call = PROVIDER.submit(PROVIDER.payload(REQUEST), ENDPOINT, TEST_KEY, None)
    with pytest.raises(Failure) as caught:
        ask(call, lambda a: PROVIDER.read(a, REQUEST, NOW), Stop(10), ENDPOINT)
    assert (caught.value.code, caught.value.fault.billed) == ("outcome_unknown", "unknown")
    assert len(responses.calls) == 1


# The key in what comes back ------------------------------------------------------------------------------------------


def test_a_key_that_the_service_echoes_is_masked_before_the_text_is_cut(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zimage.outside, "_secrets", set())
    key = "plain/Key+0123456789"
    remember_secret(key)
    encoded = key.replace("/", "%2F").replace("+", "%2B")
    message = "x" * 490 + key + encoded
    error = failure(400, {"code": f"Invalid{key}", "message": message, "request_id": key})
    shown = json.dumps(error.fault.as_json())
    assert key not in shown
    assert "plain" not in shown
    generated = read(
        200, body({"image": LINK}, {"text": f"drawn {key}"}, reasoning_content=key) | {"usage": {key: key}}
    )
    assert key not in repr((generated.rewritten_prompt, generated.reasoning, generated.usage))


def test_neither_a_key_nor_a_call_shows_the_key_when_printed() -> None:
    call = PROVIDER.submit(PROVIDER.payload(REQUEST), ENDPOINT, TEST_KEY, None)
    assert TEST_KEY not in repr(call)
    assert TEST_KEY not in repr(Key(TEST_KEY, "environment"))
