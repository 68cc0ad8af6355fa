"""The service's words: what every form of answer says and means, and what is kept of one that holds no picture.

Tables of answers, read by the providers themselves; below them, what the commands make of some.
"""

from __future__ import annotations

import base64
import datetime as dt
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from batch_helpers import SMALL_PNG, assert_counts
from closed import assert_closed
from conftest import Shell
from fault_server import PICTURE, Answer, FaultServer, Received, file, html, json_answer, oss_error, png, typed
from provider_cases import DASHSCOPE, OPENAI, ZIMAGETURBO, Lab
from test_providers import ProviderBatch, advised, assert_error, assert_saved
from zimage.answers import kept_answer
from zimage.calls import Generated, HttpAnswer, Submitted
from zimage.contract import MAX_KEPT_ANSWER
from zimage.errors import Failure
from zimage.provider import Provider
from zimage.registry import provider_named
from zimage.request import normalize
from zimage.traces import traces_in

NOW = dt.datetime(2026, 1, 1, tzinfo=dt.timezone.utc)
REQUEST = normalize({"prompt": "a calm lake", "seed": 7})
LINK = "https://img.example.com/1.png?Expires=1767000000&Signature=b%3D"
ONE = "{}/img/one.png"
NATIVE, OWN_SERVER, TASKS = (provider_named(name) for name in ("dashscope", "openai", "zimageturbo"))
BUSY = "Allocated quota exceeded, please increase your quota limit."
CHECK_PLAN = "You exceeded your current quota, please check your plan and billing details."
FREE_GONE = "Free allocated quota exceeded."


STORAGE = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>bad &amp; gone</Message></Error>"
PAGE = b"<html><head><title>502 Bad\nGateway</title></head><h1>x</h1></html>"
EVENT = b'id:1\nevent:error\n:HTTP_STATUS/400\ndata:{"code":"InvalidParameter","message":"streamed"}\n\n'
PICTURE_EVENT = (
    b'id:1\ndata:{"output":{"results":[{"url":"%s"}]}}\n\ndata:{"usage":{}}\n\ndata:[DONE]\n' % LINK.encode()
)


def answered(status: int, body: object, content_type: str = "application/json") -> HttpAnswer:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return HttpAnswer(status, {"content-type": content_type}, content)


def failure(status: int, body: object, provider: Provider = NATIVE) -> Failure:
    with pytest.raises(Failure) as caught:
        provider.read(answered(status, body), REQUEST, NOW)
    return caught.value


def made(body: object, provider: Provider = NATIVE, status: int = 200) -> Generated:
    found = provider.read(answered(status, body), REQUEST, NOW)
    assert isinstance(found, Generated)
    return found


def native(code: str, message: str = "it did not work") -> dict[str, Any]:
    return {"code": code, "message": message, "request_id": "r"}


def gateway(code: object, message: str = "it did not work", kind: str = "some_type") -> dict[str, Any]:
    return {"error": {"code": code, "message": message, "type": kind, "param": None}, "request_id": "r"}


# Codes ---------------------------------------------------------------------------------------------------------------

CODES: Sequence[tuple[int, dict[str, Any], str]] = [
    # The last part counts, in code and message alike.
    (400, native("InternalError.Algo.InvalidParameter"), "rejected_by_service"),
    (400, native("InternalError.Algo.DataInspectionFailed"), "blocked"),
    (500, native("InternalError.Algo.DataInspectionFailed"), "blocked"),
    (400, native("InternalError.Algo.Text.InvalidParameter.Size"), "rejected_by_service"),
    (400, native("InternalError.Algo.SomethingElse"), "rejected_by_service"),
    (500, native("InternalError.Algo.SomethingElse"), "service_failing"),
    (500, native("InternalError.Algo"), "service_failing"),
    (500, native("InternalError.FileUpload"), "service_failing"),
    (500, native("InternalError.Timeout"), "outcome_unknown"),
    (400, gateway("400", "<400> InternalError.Algo.InvalidParameter: size is wrong"), "rejected_by_service"),
    (400, gateway("invalid_parameter_error", "<400> InternalError.Algo.DataInspectionFailed: Output data"), "blocked"),
    (400, gateway(None, "<400> InternalError.Algo.DataInspectionFailed: Input text data"), "blocked"),
    # Money that is gone, whatever the status.
    (429, native("PostpaidBillOverdue"), "balance"),
    (429, native("PrepaidBillOverdue"), "balance"),
    (429, native("CommodityNotPurchased"), "balance"),
    (400, native("Arrearage"), "balance"),
    (400, gateway("arrearage"), "balance"),
    # The allocated quota is a rate; only the free one ends.
    (429, native("Throttling.AllocationQuota", BUSY), "rate_limited"),
    (429, native("Throttling.AllocationQuota", CHECK_PLAN), "rate_limited"),
    (429, gateway("insufficient_quota", CHECK_PLAN), "rate_limited"),
    (
        429,
        native("Throttling.AllocationQuota", "Too many requests. Batch requests are being throttled"),
        "rate_limited",
    ),
    (429, native("Throttling.AllocationQuota", FREE_GONE), "quota"),
    (400, native("throttling.allocationquota", FREE_GONE.upper()), "quota"),
    (429, gateway("insufficient_quota", FREE_GONE), "quota"),
    (429, gateway("429", FREE_GONE), "quota"),
    (403, native("AllocationQuota.FreeTierOnly"), "quota"),
    (429, native("limit_requests"), "rate_limited"),
    (429, gateway("limit_burst_rate"), "rate_limited"),
    (429, gateway("LimitRequests"), "rate_limited"),
    # What is called like something else.
    (400, native("InvalidParameter.DataInspection"), "rejected_by_service"),
    (400, native("ServiceUnavailableError"), "rejected_by_service"),
    (400, native("InvalidURL.Timeout"), "rejected_by_service"),
    (400, native("BadRequestException"), "rejected_by_service"),
    (413, native("RequestTooLargeError"), "rejected_by_service"),
    (409, native("Conflict"), "rejected_by_service"),
    (400, native("ClientDisconnect"), "outcome_unknown"),
    (400, gateway("APIConnectionError"), "outcome_unknown"),
    (504, native("GatewayTimeoutError"), "outcome_unknown"),
    (408, {"message": "timeout"}, "outcome_unknown"),
    (400, native("IPInfringementSuspect"), "blocked"),
    (400, native("CustomRoleBlocked"), "blocked"),
    (400, gateway("data_inspection_failed"), "blocked"),
    # Keys and rights.
    (401, native("NOT AUTHORIZED"), "key_rejected"),
    (401, gateway("invalid_api_key"), "key_rejected"),
    (401, gateway(None, "no", "invalid_request_error"), "key_rejected"),
    (403, native("AccessDenied"), "access_denied"),
    (403, native("AccessDenied", "current user api does not support asynchronous calls."), "rejected_by_service"),
    (403, gateway("access_denied", "it does not support Asynchronous calls"), "rejected_by_service"),
    (403, native("App.AccessDenied"), "access_denied"),
    (403, native("Workspace.AccessDenied"), "access_denied"),
    (200, native("BailianGateway.Workspace.NotAuthorised"), "access_denied"),
    (404, gateway("model_not_found"), "not_found"),
    (400, native("model_not_supported"), "not_found"),
    (404, native("WorkSpaceNotFound"), "not_found"),
    # The service's own faults.
    (500, native("RewriteFailed"), "service_failing"),
    (500, native("SystemError"), "service_failing"),
    (503, native("ModelUnavailable"), "service_failing"),
    (503, gateway("ModelServingError", "Too many requests"), "service_failing"),
    (500, gateway("internal_error"), "service_failing"),
    # What a gateway says of itself proves nothing.
    (500, gateway("do_request_failed"), "outcome_unknown"),
    (500, gateway("500", "something went wrong", "server_error"), "outcome_unknown"),
    (503, {"detail": "upstream is away"}, "outcome_unknown"),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("status", "body", "code"), CODES)
def test_a_code_means_the_same_in_every_form(status: int, body: dict[str, Any], code: str) -> None:
    assert failure(status, body).code == code


WRAPPED: Sequence[tuple[Provider, int, object, str, str]] = [
    # LiteLLM: the status as a text, the backend's exception in words.
    (
        OWN_SERVER,
        429,
        gateway("429", "litellm.RateLimitError: OpenAIException - slow", "throttling"),
        "rate_limited",
        "",
    ),
    (OWN_SERVER, 401, gateway("401", "Authentication Error, no key", "auth_error"), "key_rejected", "no key"),
    (
        OWN_SERVER,
        500,
        gateway("500", "litellm.UnsupportedParamsError: Setting `seed`"),
        "rejected_by_service",
        "`seed`",
    ),
    (OWN_SERVER, 400, gateway("400", "litellm.ContentPolicyViolationError: no"), "blocked", ""),
    (OWN_SERVER, 400, gateway("400", "Budget has been exceeded!", "budget_exceeded"), "balance", "Budget"),
    (OWN_SERVER, 408, gateway("408", "litellm.Timeout: APITimeoutError"), "outcome_unknown", ""),
    (OWN_SERVER, 500, gateway("500", "litellm.InternalServerError: it broke"), "outcome_unknown", "it broke"),
    (OWN_SERVER, 503, gateway("503", "litellm.ServiceUnavailableError: away"), "outcome_unknown", "away"),
    (
        OWN_SERVER,
        400,
        gateway("400", "litellm.BadRequestError: X - {'code': 'DataInspectionFailed', 'message': 'no'}"),
        "blocked",
        "DataInspectionFailed",
    ),
    (
        NATIVE,
        400,
        gateway("400", "litellm.BadRequestError: X - <400> InternalError.Algo.Arrearage: pay"),
        "balance",
        "pay",
    ),
    # Web frameworks.
    (
        OWN_SERVER,
        422,
        {"detail": [{"loc": ["body", "size"], "msg": "bad", "type": "x"}]},
        "rejected_by_service",
        "body.size: bad",
    ),
    (OWN_SERVER, 404, {"detail": "Not Found"}, "not_found", "Not Found"),
    (NATIVE, 403, {"detail": {"msg": "no such user", "type": "forbidden"}}, "access_denied", "no such user"),
    (
        OWN_SERVER,
        500,
        {"error": "server_error", "message": "out of memory"},
        "service_failing",
        "server_error: out of memory",
    ),
    (OWN_SERVER, 400, {"error": "invalid_request", "detail": "n must be 1"}, "rejected_by_service", "n must be 1"),
    (
        OWN_SERVER,
        500,
        {"error": "OutOfMemoryError", "detail": "", "errors": "CUDA out of memory"},
        "service_failing",
        "CUDA out",
    ),
    (NATIVE, 400, {"error": "text only"}, "rejected_by_service", "text only"),
    # Other vendors.
    (
        OWN_SERVER,
        400,
        {"errors": {"message": "Model x does not exist"}, "request_id": "r"},
        "rejected_by_service",
        "not exist",
    ),
    (TASKS, 401, {"errors": [{"message": "bind your account"}]}, "key_rejected", "bind your account"),
    (OWN_SERVER, 401, b'"Invalid token"', "key_rejected", "Invalid token"),
    (OWN_SERVER, 401, b"Invalid token", "key_rejected", "Invalid token"),
    (TASKS, 429, b"slow down, please", "rate_limited", "slow down"),
    (NATIVE, 500, {"code": "500", "message": "a number is no code of the service's"}, "outcome_unknown", "a number"),
    (
        OWN_SERVER,
        403,
        {"code": 30001, "message": "Sorry, your account balance is insufficient", "data": None},
        "balance",
        "Sorry",
    ),
    (OWN_SERVER, 503, {"code": 50505, "message": "Model overloaded"}, "service_failing", "overloaded"),
    (TASKS, 402, {"code": 402, "message": "no credits"}, "balance", "no credits"),
    (TASKS, 400, {"code": 400, "error": {"message": "prompt is sensitive"}}, "blocked", "sensitive"),
    (NATIVE, 400, [{"code": "InvalidParameter", "message": "in a list"}], "rejected_by_service", "in a list"),
    # No JSON.
    (NATIVE, 500, b"upstream connect error", "outcome_unknown", "upstream connect error"),
    (NATIVE, 503, b"Throttling: no healthy upstream", "outcome_unknown", "no healthy upstream"),
    (NATIVE, 403, STORAGE, "access_denied", "AccessDenied: bad & gone"),
    (NATIVE, 502, PAGE, "outcome_unknown", ": 502 Bad Gateway x"),
    (
        TASKS,
        200,
        b"<!DOCTYPE html><html><body><h1 class=a>Sign in</h1></body></html>",
        "answer_unusable",
        "JSON: application/json: Sign in",
    ),
    (NATIVE, 200, b"<html><script>x</script><body>come <b>back</b> later</body>", "answer_unusable", "come back later"),
    (NATIVE, 400, EVENT, "rejected_by_service", "streamed"),
    (NATIVE, 200, b'data: {"code":"DataInspectionFailed","message":"no"}\n\ndata: [DONE]\n', "blocked", "no"),
]


@pytest.mark.parametrize(("provider", "status", "body", "code", "words"), WRAPPED)
def test_whatever_a_gateway_writes_is_understood_and_its_words_are_shown(
    provider: Provider, status: int, body: object, code: str, words: str
) -> None:
    found = failure(status, body, provider)
    assert found.code == code
    assert words in found.message
    assert found.message.startswith(f"the service answered {status}")


def test_words_are_cut_cleaned_and_told_once() -> None:
    long = failure(400, gateway("x", "a\x1b[31m\n" + "b" * 2000))
    assert len(long.message) < 560 and "\x1b" not in long.message and "\n" not in long.message
    assert failure(401, {"error": "Unauthorized"}).message == "the service answered 401 Unauthorized"
    coded = failure(400, native("InternalError.Algo.InvalidParameter", "<400> InternalError.Algo.InvalidParameter: x"))
    assert coded.message == "the service answered 400: <400> InternalError.Algo.InvalidParameter: x"
    assert coded.fault.service_code == "InternalError.Algo.InvalidParameter"
    twice = failure(400, {"message": "once", "error": {"message": "once"}})
    assert twice.message == "the service answered 400: once"
    nothing = failure(400, b"\x00\x01\xff")
    assert nothing.message == "the service answered 400"


# Where nothing is proved ---------------------------------------------------------------------------------------------

UNPROVED: Sequence[tuple[Provider, int, dict[str, Any]]] = [
    (NATIVE, 200, native("Throttling") | {"usage": {"image_count": 1}}),
    (NATIVE, 500, native("InternalError") | {"output": {"task_id": "t-1", "task_status": "RUNNING"}}),
    (NATIVE, 429, native("Throttling") | {"output": {"task_id": "t-1"}}),
    (OWN_SERVER, 500, gateway("server_error") | {"job_id": 7}),
    (OWN_SERVER, 200, gateway("rate_limit_exceeded") | {"task_id": "t-1"}),
    (NATIVE, 200, {"output": {"choices": [{"message": {"content": [{"text": FREE_GONE}]}}]}}),
    (OWN_SERVER, 200, {"choices": [{"message": {"content": "Your account balance is insufficient."}}]}),
]


@pytest.mark.parametrize(("provider", "status", "body"), UNPROVED)
def test_no_code_proves_that_nothing_was_billed_where_work_is_named(
    provider: Provider, status: int, body: dict[str, Any]
) -> None:
    try:
        found = provider.read(answered(status, body), REQUEST, NOW)
    except Failure as failed:
        assert (failed.fault.billed, failed.fault.retryable) == ("unknown", False)
        assert failed.fault.answer is not None
    else:
        assert isinstance(found, Submitted)  # it is asked after


def test_a_task_that_failed_says_why_and_is_not_charged() -> None:
    def failed(**output: str) -> Failure:
        return failure(200, {"request_id": "r", "output": {"task_id": "t", "task_status": "FAILED", **output}})

    assert failed(code="DataInspectionFailed", message="no").code == "blocked"
    told = failed(code="InternalError.Timeout", message="the GPU was unplugged")
    assert (told.code, told.fault.billed) == ("task_failed", "no")
    assert "the GPU was unplugged" in told.message


# Pictures in other places --------------------------------------------------------------------------------------------

ELSEWHERE: Mapping[str, object] = {
    "results": {"output": {"results": [{"url": LINK}]}, "request_id": "r"},
    "images": {"images": [{"url": LINK}], "timings": {"inference": 1}, "seed": 3},
    "texts": {"output": {"images": [LINK]}},
    "of a task": {
        "output": {"task_id": "t", "task_status": "SUCCEEDED", "results": [{"orig_prompt": "x", "url": LINK}]}
    },
    "chat": {"output": {"choices": [{"message": {"content": [{"image_url": {"url": LINK}}]}}]}},
    "modelscope": {"task_id": 5, "task_status": "SUCCEED", "output_images": [LINK]},
    "plain": {"image_url": LINK},
    "an object": {"output": {"choices": [{"message": {"content": {"image": LINK}}}]}},
    "a list": {"output": {"choices": [{"message": {"content": [{"image": [LINK]}]}}]}},
    "result": {"result": {"url": LINK}},
    "event": PICTURE_EVENT,
}


@pytest.mark.parametrize("provider", [NATIVE, OWN_SERVER, TASKS], ids=lambda provider: provider.name)
@pytest.mark.parametrize("form", ELSEWHERE)
def test_a_picture_in_another_place_is_taken(form: str, provider: Provider) -> None:
    if provider is TASKS and form in ("of a task", "modelscope"):
        pytest.skip("there a task that is named is asked after")
    if provider is OWN_SERVER and form == "images":
        pytest.skip("there it is the place of a known host")
    found = made(ELSEWHERE[form], provider)
    assert found.image_url == LINK
    assert any("another place" in warning for warning in found.warnings)


def test_a_finished_task_whose_picture_is_elsewhere_is_done() -> None:
    data = {"task_id": "t", "status": "SUCCESS", "images": [{"url": LINK}]}
    found = TASKS.read_poll(answered(200, {"code": 200, "data": data}), REQUEST, NOW)
    assert found is not None and found.image_url == LINK


def test_of_several_in_another_place_all_links_are_kept() -> None:
    found = made({"images": [{"url": LINK}, {"url": "https://img.example.com/2.png"}]})
    assert (found.image_url, found.other_urls) == (LINK, ("https://img.example.com/2.png",))


def test_bytes_in_another_place_are_taken_as_base64_or_as_they_are() -> None:
    coded = base64.b64encode(SMALL_PNG).decode()
    assert made({"data": [{"b64_json": coded}]}).content == SMALL_PNG
    assert made({"images": [{"b64_json": f"data:image/png;base64,{coded}"}]}, TASKS).content == SMALL_PNG
    assert made(SMALL_PNG, OWN_SERVER).content == SMALL_PNG


NO_PICTURES: Sequence[tuple[int, dict[str, Any]]] = [
    (400, {"code": "InvalidParameter", "message": "see", "data": {"url": "https://help.example.com/x.png"}}),
    (422, {"detail": [{"msg": "missing", "url": "https://errors.pydantic.dev/2/v/missing"}]}),
    (500, {"error": {"message": "no", "url": "https://help.example.com/1.png"}}),
    (500, {"message": "pay", "data": {"url": "https://billing.example.com/pay"}}),
    (200, {"request": {"image": LINK}}),
    (200, {"output": {"doc_url": "https://help.example.com/x"}}),
    (200, {"output": {"url": "file:///etc/passwd"}}),
    (200, {"output": {"url": "not a link at all"}}),
]


@pytest.mark.parametrize(("status", "body"), NO_PICTURES)
def test_a_link_to_something_else_is_no_picture(status: int, body: dict[str, Any]) -> None:
    found = failure(status, body)
    assert found.fault.billed == ("no" if 400 <= status < 500 else "unknown")


def test_what_is_kept_of_an_answer_is_bounded_and_without_the_key() -> None:
    body = {
        "task_id": {"a": "no"},
        "x": [{"job_id": n, "y": f"https://e.example/{n}"} for n in range(99)],
        "z": "y" * 9999,
    }
    kept = kept_answer(answered(200, body), traces_in(body))
    assert kept["task_ids"] == [str(n) for n in range(20)]
    assert len(kept["links"]) == 20 and len(kept["body"]) == MAX_KEPT_ANSWER
    secret = {"task_id": "sk-0123456789abcdef", "text": "key sk-0123456789abcdef"}
    assert "0123456789" not in json.dumps(kept_answer(answered(200, secret), traces_in(secret)))
    endless: Any = {"a": None}
    for _ in range(500):
        endless = {"a": [endless, endless]}
    assert traces_in(endless).links == ()


# The commands --------------------------------------------------------------------------------------------------------


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture(params=[DASHSCOPE, OPENAI, ZIMAGETURBO], ids=lambda case: str(case))
def lab(request: pytest.FixtureRequest, shell: Shell, server: FaultServer) -> Lab:
    return Lab(request.param, shell, server)


@pytest.fixture
def ds(shell: Shell, server: FaultServer) -> Lab:
    return Lab(DASHSCOPE, shell, server)


def kept(lab: Lab) -> dict[str, Any]:
    data = lab.shell.evidence()
    assert_closed("evidence", data)
    answer = data["answer"]
    assert isinstance(answer, dict)
    return answer


FORMS: Mapping[str, tuple[Answer, int, str]] = {
    "text": (typed(b"the model is being moved", "text/plain", 503), 7, "the model is being moved"),
    "other JSON": (json_answer({"status": "error", "reason": "moved away"}, 520), 7, "moved away"),
    "page": (html(502), 7, "502"),
    "storage": (oss_error(403, "AccessDenied", "Request has expired."), 3, "Request has expired."),
    "spoken": (
        json_answer({"output": {"choices": [{"message": {"content": [{"text": "I cannot draw that."}]}}]}}),
        8,
        "I cannot draw that.",
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_the_services_words_are_shown_and_kept_whoever_says_them(lab: Lab, form: str) -> None:
    answer, exit_code, words = FORMS[form]
    lab.answers(answer)
    error = assert_error(lab.make("--max-retries", "0"), exit_code, "no" if exit_code == 3 else "unknown")
    assert words in error["message"]
    evidence = lab.shell.evidence()
    assert words in evidence["error"]["message"]
    if exit_code != 3:
        assert kept(lab)["http_status"] == answer.status and words in kept(lab)["body"]
    assert len(lab.paid) == 1


def test_what_only_repeats_the_prompt_says_nothing(ds: Lab) -> None:
    ds.answers(json_answer({"output": {"choices": [{"message": {"content": [{"text": "a fox"}]}}]}}))
    error = assert_error(ds.make(), 8, "unknown", code="no_image")
    assert error["message"].endswith("no picture is in the answer")


def test_a_picture_in_another_place_is_saved_with_a_warning(lab: Lab) -> None:
    def elsewhere(request: Received) -> Answer:
        return json_answer({"output": {"results": [{"url": request.root + PICTURE}]}}, bills=True)

    lab.answers(elsewhere)
    response = assert_saved(lab, lab.make(), png())
    assert "another place" in response["warnings"][0]
    assert len(lab.paid) == 1


def test_a_task_that_a_gateway_names_is_asked_after_and_its_picture_saved(ds: Lab) -> None:
    ds.answers(json_answer({"request_id": "r", "output": {"task_id": "t-77", "task_status": "PENDING"}}, bills=True))
    path = "/api/v1/tasks/t-77"
    running = json_answer({"output": {"task_id": "t-77", "task_status": "RUNNING"}})
    ds.server.play(path, running)
    error = assert_error(ds.make("--timeout", "4"), 7, "unknown", code="paid_not_downloaded")
    assert "t-77" in error["message"] and ds.shell.evidence()["task_id"] == "t-77"

    def done(request: Received) -> Answer:
        output = {"task_id": "t-77", "task_status": "SUCCEEDED", "results": [{"url": request.root + PICTURE}]}
        return json_answer({"request_id": "r", "output": output, "usage": {"image_count": 1}})

    ds.server.play(path, done)
    assert_saved(ds, advised(ds, error), png())
    assert len(ds.paid) == 1


def test_a_task_that_nobody_can_ask_after_is_kept_and_named(shell: Shell, server: FaultServer) -> None:
    lab = Lab(OPENAI, shell, server)
    lab.answers(json_answer({"task_id": "5075521", "request_id": "r", "status": "queued"}, bills=True))
    error = assert_error(lab.make(), 8, "unknown", code="no_image")
    assert "task 5075521" in error["message"]
    assert kept(lab)["task_ids"] == ["5075521"]
    assert "5075521" in assert_error(lab.recover(), 7, "unknown")["message"]
    assert len(lab.paid) == 1


def unread(lab: Lab, name: str = "download") -> dict[str, Any]:
    """The error of an answer whose link stands under a name that says nothing."""
    lab.answers(lambda request: json_answer({"output": {name: f"{request.root}{PICTURE}?Signature=x"}}, bills=True))
    return assert_error(lab.make(), 8, "unknown", code="no_image")


def test_a_link_that_may_be_the_pictures_is_kept_and_tried_by_a_recovery(ds: Lab) -> None:
    error = unread(ds)
    assert error["image_url"] == kept(ds)["links"][0] and "Signature" not in error["message"]
    assert "free" in error["hint"]
    assert_saved(ds, advised(ds, error), png())
    data = ds.shell.evidence()
    assert (data["status"], data["attempts"][0]["billed"]) == ("saved", "yes")
    assert len(ds.paid) == 1


@pytest.mark.parametrize("broken", [html(404), file(b"no picture"), html(200, "sign in")], ids=["gone", "text", "page"])
def test_a_link_that_leads_to_no_picture_leaves_the_outcome_unknown(ds: Lab, broken: Answer) -> None:
    error = unread(ds)
    before = Path(error["evidence_path"]).read_bytes()
    ds.server.play(PICTURE, broken)
    told = assert_error(advised(ds, error), 7, "unknown", code="outcome_unknown")
    assert "leads to no picture" in told["message"] and "next_command" not in told
    assert Path(error["evidence_path"]).read_bytes() == before
    assert len(ds.paid) == 1


# A batch -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def batch(ds: Lab) -> ProviderBatch:
    return ProviderBatch(DASHSCOPE, ds.shell, ds)


ENDS: Sequence[tuple[int, dict[str, Any], int]] = [
    (429, native("PostpaidBillOverdue"), 4),
    (429, native("Throttling.AllocationQuota", FREE_GONE), 4),
    (429, gateway("429", FREE_GONE), 4),
    (403, native("AllocationQuota.FreeTierOnly"), 4),
    (400, gateway("Arrearage"), 4),
    (401, gateway("invalid_api_key"), 3),
    (200, native("BailianGateway.Workspace.NotAuthorised"), 3),
]


@pytest.mark.parametrize(("status", "body", "exit_code"), ENDS)
def test_what_ends_things_stops_a_batch_at_its_first_answer(
    batch: ProviderBatch, ds: Lab, status: int, body: dict[str, Any], exit_code: int
) -> None:
    ds.answers(json_answer(body, status))
    batch.prompts(30)
    result = batch.run("--concurrency", "1")
    assert result.code == exit_code
    assert_counts(result, pending=30)
    assert len(ds.paid) == 1 and result.json["estimated_cost"] == 0


def test_a_refused_row_is_marked_and_the_others_go_on(batch: ProviderBatch, ds: Lab) -> None:
    wrong = json_answer(native("InternalError.Algo.InvalidParameter", "the prompt is wrong"), 400)
    batch.by_prompt(p1=[wrong] * 9)
    batch.rows(*({"prompt": f"p{number}"} for number in range(4)))
    result = batch.run()
    assert result.code == 1
    assert_counts(result, saved=3, failed=1)
    assert len(ds.paid) == 4
    assert_counts(batch.run(), saved=3, failed=1)
    assert len(ds.paid) == 4


def test_an_allocated_quota_is_waited_for_and_every_row_is_made(batch: ProviderBatch, ds: Lab) -> None:
    busy = json_answer(native("Throttling.AllocationQuota", BUSY), 429, headers=(("Retry-After", "1"),))
    ds.answers(ds.good, busy, ds.good)
    batch.prompts(3)
    result = batch.run()
    assert result.code == 0
    assert_counts(result, saved=3)


def test_an_answer_without_a_picture_is_kept_with_its_row(batch: ProviderBatch, ds: Lab) -> None:
    ds.answers(json_answer({"output": {"download": "https://e.example/x?Signature=secret"}, "job_id": 9}))
    batch.prompts(1)
    assert_counts(batch.run(), unknown=1)
    (entry,) = batch.results()
    assert "task 9" in entry["error"]["message"] and "Signature" not in json.dumps(entry)
    evidence = json.loads(Path(entry["evidence_path"]).read_text(encoding="utf-8"))
    assert evidence["answer"]["links"] == ["https://e.example/x?Signature=secret"]
    assert_counts(batch.run(), unknown=1)
    assert len(ds.paid) == 1
