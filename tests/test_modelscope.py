"""ModelScope: quota in place of money, tasks, accounts that are not ready, and a key that has many names.

What holds for every provider stands in test_providers.py.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from batch_helpers import BATCH
from conftest import Shell
from fault_server import PICTURE, Answer, FaultServer, Received, json_answer, png
from provider_cases import KEYS, MODELSCOPE, NO_WAIT, NOT_NOW, Lab, changed
from zimage.calls import HttpAnswer
from zimage.endpoint import Endpoint
from zimage.quota import QUOTA_WORDS, Quota, in_quota_words
from zimage.registry import provider_class, provider_named
from zimage.trust import parse_base_url

PROVIDER = provider_named("modelscope")
PACE = type(PROVIDER).poll_pause
BALANCE = "/openapi/v1/magicubes/balance"
LEFT, MODEL_LEFT = "modelscope-ratelimit-requests-remaining", "modelscope-ratelimit-model-requests-remaining"
TODAY = "You have exceeded today's quota for this model"
BUSY = "Too many requests, rate limit exceeded for this model"


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def ms(shell: Shell, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """All in this process, where tasks are asked after at once."""
    shell.is_first_row = False
    monkeypatch.setattr(provider_class("modelscope"), "poll_pause", lambda self, asked: 0.05)
    lab = Lab(MODELSCOPE, shell, server)
    yield lab
    lab.assert_keys_kept()


def said(message: str, status: int, **fields: Any) -> Answer:
    return json_answer(MODELSCOPE.said(status, "", message), status, **fields)


def told(lab: Lab, *more: str) -> dict[str, Any]:
    """The error of a command that makes a picture."""
    return lab.make(*more).error


# What a 429 means


@pytest.mark.parametrize(
    ("headers", "message", "exit_code"),
    [
        ({MODEL_LEFT: 0, LEFT: 1800}, BUSY, 4),
        ({LEFT: 0}, "request limit", 4),
        ({MODEL_LEFT: 0}, "", 4),
        ({}, TODAY, 4),
        ({}, "daily request quota reached", 4),
        ({}, "您今天的额度已用完", 4),
        ({MODEL_LEFT: 150, LEFT: 1900}, TODAY, 6),
        ({LEFT: 7}, BUSY, 6),
        ({}, BUSY, 6),
        ({}, "request limit", 6),
        ({MODEL_LEFT: "soon"}, BUSY, 6),
        ({MODEL_LEFT: 150}, "insufficient balance (1008)", 4),
        ({}, "Insufficient Balance", 4),
    ],
)  # fmt: skip
def test_the_headers_tell_a_quota_that_is_used_up_from_too_many_at_once(
    ms: Lab, headers: dict[str, Any], message: str, exit_code: int
) -> None:
    ms.answers(said(message, 429, headers=(*((name, str(value)) for name, value in headers.items()), *NOT_NOW)))
    error = told(ms)
    assert (error["exit_code"], error["billed"], len(ms.paid)) == (exit_code, "no", 1), error
    assert error["retryable"] == (exit_code == 6)


@pytest.mark.smoke
def test_a_quota_comes_back_tomorrow_and_no_hour_is_named(ms: Lab) -> None:
    ms.answers(said(TODAY, 429, headers=((MODEL_LEFT, "0"), (LEFT, "1800"))))
    error = told(ms)
    assert error["code"] == "quota" and "tomorrow" in error["hint"]
    assert "retry_after_s" not in error
    assert "0 for this model, 1800 in all" in error["message"]


def test_too_many_at_once_are_waited_for(ms: Lab) -> None:
    ms.answers(said(BUSY, 429, headers=((LEFT, "9"), *NO_WAIT)), ms.good)
    assert ms.make().code == 0
    assert len(ms.paid) == 2
    ms.answers(said(BUSY, 429))
    assert told(ms, "--max-retries", "0", "--output", "other.png")["retry_after_s"] == 10


# Accounts that are not ready, models that are gone


@pytest.mark.parametrize(
    ("status", "message", "code", "hint"),
    [
        (401, "Please bind your Alibaba Cloud account before use", "access_denied", "bound to an Alibaba"),
        (401, "please bind your alibabacloud account first", "access_denied", "no fault of the key"),
        (403, "the associated Aliyun account is not real name verified", "access_denied", "real-name verification"),
        (403, "you must accept the terms of this model", "access_denied", "terms of the model"),
        (401, "Authentication failed, please make sure that a valid ModelScope token is supplied", "key_rejected", ""),
        (400, "Model Tongyi-MAI/Z-Image-Turbo does not exist", "not_found", "retired"),
        (400, "no provider supported for this model", "not_found", "retired"),
        (404, "not here", "not_found", "retired"),
        (400, "size must be WxH", "rejected_by_service", ""),
        (400, "the input did not pass the inspection", "blocked", ""),
        (400, "prompt contains risky words", "blocked", ""),
    ],
)  # fmt: skip
def test_what_the_user_has_to_do_is_told(ms: Lab, status: int, message: str, code: str, hint: str) -> None:
    ms.answers(said(message, status))
    error = told(ms)
    assert (error["code"], error["billed"], error["retryable"]) == (code, "no", False)
    assert hint in error["hint"]
    assert len(ms.paid) == 1


@pytest.mark.parametrize("form", ["error", "errors", "detail", "html"])
def test_a_busy_server_has_made_nothing(ms: Lab, form: str) -> None:
    words = "Server is busy, please try again later"
    body = {form: words if form == "detail" else {"message": words}}
    busy = json_answer(body, 503, headers=NOT_NOW)
    ms.answers(
        busy if form != "html" else Answer(503, body=b"<html><body>Server is busy</body></html>", headers=NOT_NOW)
    )
    error = told(ms)
    assert (error["exit_code"], error["billed"]) == ((6, "no") if form != "html" else (7, "unknown"))
    assert len(ms.paid) == 1


# Tasks


def test_a_submission_asks_for_a_task_and_a_question_says_of_what_kind(ms: Lab) -> None:
    assert ms.make("--seed", "5").code == 0
    (call,), (question,) = ms.paid, ms.questions
    assert call.header("x-modelscope-async-mode") == "true"
    assert question.header("x-modelscope-task-type") == "image_generation"
    assert question.target == "/v1/tasks/5075000"


@pytest.mark.parametrize("task", [5075521, "5075521", "a/b?c=1", 0])
def test_a_task_is_asked_after_by_its_name_whatever_kind_that_is(ms: Lab, task: object) -> None:
    ms.answers(json_answer({"task_id": task}))
    ms.server.play("/v1/tasks/", lambda request: ms.book.working("0"))
    error = told(ms, "--timeout", "2")
    assert (error["exit_code"], error["code"]) == (7, "paid_not_downloaded")
    assert ms.shell.evidence()["task_id"] == str(task)
    assert "--recover" in error["next_command"]


@pytest.mark.parametrize("word", ["SUCCEED", "SUCCESS", "SUCCEEDED", "succeed"])
def test_a_task_ends_well_in_any_spelling(ms: Lab, word: str) -> None:
    ms.book.play(lambda task, request: ms.book.working(task, "QUEUED_ELSEWHERE"), lambda task, request: json_answer(
        ms.book.data(task, word, request.root + PICTURE)))  # fmt: skip
    assert ms.make().code == 0
    assert (len(ms.paid), len(ms.questions)) == (1, 2)


@pytest.mark.parametrize("word", ["SUCCEED", "SUCCESS"])
@pytest.mark.parametrize("images", [[], None, [""], [None], "none"])
def test_a_task_that_ended_well_without_a_picture_is_no_success(ms: Lab, word: str, images: object) -> None:
    ms.book.play(lambda task, request: json_answer(ms.book.data(task, word) | {"output_images": images}))
    error = told(ms)
    assert (error["exit_code"], error["code"]) == (8, "no_image")


@pytest.mark.parametrize("word", ["FAILED", "CANCELED", "CANCELLED"])
@pytest.mark.parametrize(
    "reason",
    [
        {"errors": {"message": "GPU fell off"}}, {"errors": [{"message": "GPU fell off"}]}, {"error": "GPU fell off"},
        {"error": {"message": "GPU fell off"}}, {"error_message": "GPU fell off"}, {"error_msg": "GPU fell off"},
        {"message": "GPU fell off"},
    ],
    ids=lambda reason: json.dumps(reason),
)  # fmt: skip
def test_a_failed_task_says_why_wherever_that_stands(ms: Lab, word: str, reason: dict[str, Any]) -> None:
    ms.book.play(lambda task, request: json_answer(ms.book.data(task, word) | reason))
    error = told(ms)
    assert (error["code"], error["billed"]) == ("task_failed", "no")
    assert "GPU fell off" in error["message"]


@pytest.mark.parametrize(
    "words", ["data inspection failed", "Sensitive content", "inappropriate", "content risk", "违规"]
)
def test_a_task_that_failed_for_its_content_is_blocked(ms: Lab, words: str) -> None:
    ms.book.play(lambda task, request: ms.book.failed(task, words))
    assert told(ms)["exit_code"] == 5


@pytest.mark.parametrize(
    "trouble", [said("busy", 429, headers=NO_WAIT), said("oops", 500), Answer(body=b"not json"), said("no", 404)]
)
def test_a_question_that_comes_to_nothing_is_asked_again_and_no_picture_is_made_anew(ms: Lab, trouble: Answer) -> None:
    ms.book.play(lambda task, request: trouble, ms.book.done)
    assert ms.make().code == 0
    assert (len(ms.paid), len(ms.questions)) == (1, 2)


def test_the_answer_of_the_call_without_tasks_is_understood_too(ms: Lab) -> None:
    ms.answers(lambda request: json_answer({"images": [{"url": request.root + PICTURE}], "request_id": "r"}))
    assert ms.make().code == 0
    assert (len(ms.paid), ms.questions) == (1, [])


def test_a_task_is_asked_after_every_five_seconds_and_from_a_minute_on_every_fifteen() -> None:
    pauses = [PACE(PROVIDER, asked) for asked in range(20)]
    assert pauses == [5.0] * 12 + [15.0] * 8
    assert PACE(PROVIDER, 10**9) == 15.0


# Quota as a price


def quota_headers(left: int) -> tuple[tuple[str, str], ...]:
    limits = (("modelscope-ratelimit-requests-limit", "2000"), ("modelscope-ratelimit-model-requests-limit", "200"))
    return (*limits, (LEFT, "1900"), (MODEL_LEFT, str(left)))


def test_a_lost_answer_of_a_submission_is_told_in_quota_and_not_sent_again(ms: Lab) -> None:
    ms.answers(Answer(hang_up="after-reading", bills=True))
    error = told(ms)
    assert (error["code"], error["exit_code"], error["billed"], error["estimated_cost"]) == (
        "outcome_unknown", 7, "unknown", 0.0)  # fmt: skip
    assert "ask the user before using quota again" in error["hint"] and "costs quota again" in error["hint"]
    assert "pay" not in error["hint"] and "US$" not in json.dumps(error)
    assert len(ms.paid) == 1


def test_what_is_left_is_told_with_the_picture_and_kept(ms: Lab) -> None:
    ms.answers(changed(ms.good, headers=quota_headers(187)))
    answer = ms.make().json
    left = {"calls_left": 1900, "calls_limit": 2000, "model_calls_left": 187, "model_calls_limit": 200}
    assert answer["quota"] == left == ms.shell.evidence()["response"]["quota"]
    assert answer["estimated_cost"] == 0
    ms.answers(ms.good)
    assert "quota" not in ms.make("--output", "other.png").json  # nothing was told


def test_the_price_is_quota_in_a_dry_run(ms: Lab) -> None:
    plan = ms.make("--dry-run").json
    assert (plan["billable"], plan["estimated_cost"]) == (True, 0)
    assert "daily quota" in plan["cost_basis"]


def test_a_batch_makes_one_picture_at_a_time_and_keeps_count_of_the_quota(ms: Lab) -> None:
    open_, most, lock = 0, 0, threading.Lock()

    def submit(request: Received) -> Answer:
        nonlocal open_, most
        with lock:
            open_ += 1
            most = max(most, open_)
        return changed(ms.good, headers=quota_headers(3 - len(ms.book.tasks)))(request)

    def done(task: str, request: Received) -> Answer:
        nonlocal open_
        with lock:
            open_ -= 1
        return ms.book.done(task, request)

    ms.answers(submit)
    ms.book.play(done)
    (ms.shell.folder / "rows.txt").write_text("a\nb\nc\n")
    ms.shell.script = BATCH
    command = ("--provider", "modelscope", "--input", "rows.txt", "--output-dir", "out")
    plan = ms.call(*command, "--dry-run").json
    assert "quota" not in plan and "daily quota" in plan["cost_basis"] and "count, quota" in plan["next"]
    summary = ms.call(*command).json
    assert (summary["saved"], most, len(ms.paid)) == (3, 1, 3)
    assert (summary["quota"]["model_calls_left"], summary["estimated_cost"]) == (1, 0)
    assert not any("price" in text for text in summary.get("warnings", ()))
    plan = ms.call(*command, "--dry-run", "--variants", "3").json
    assert plan["quota"]["model_calls_left"] == 1 and plan["quota"]["told_at"]
    assert any("6 pictures are to be made" in text and "1 of 200 for this model" in text for text in plan["warnings"])


def test_a_batch_ends_with_the_quota_and_goes_on_another_day(ms: Lab) -> None:
    ms.answers(ms.good, said(TODAY, 429, headers=((MODEL_LEFT, "0"),)))
    (ms.shell.folder / "rows.txt").write_text("a\nb\nc\n")
    ms.shell.script = BATCH
    command = ("--provider", "modelscope", "--input", "rows.txt", "--output-dir", "out", "--quiet")
    result = ms.call(*command)
    assert (result.code, result.json["saved"], result.json["pending"]) == (4, 1, 2)
    assert "tomorrow" in result.json["error"]["hint"]
    ms.answers(ms.good)
    assert ms.call(*command).json["saved"] == 3
    assert len(ms.book.tasks) == 3


def test_calls_are_counted_where_only_the_first_answer_told_what_is_left(ms: Lab) -> None:
    ms.answers(changed(ms.good, headers=((MODEL_LEFT, "8"),)), ms.good)
    (ms.shell.folder / "rows.txt").write_text("a\nb\nc\n")
    ms.shell.script = BATCH
    command = ("--provider", "modelscope", "--input", "rows.txt", "--output-dir", "out")
    assert ms.call(*command).json["quota"] == {"model_calls_left": 6}
    assert Quota(calls_left=0, calls_limit=5).after_a_call() == Quota(calls_left=0, calls_limit=5)


@pytest.mark.parametrize(
    ("text", "calls"),
    [("12", 12), ("0", 0), (" 7 ", 7), ("", None), ("-1", None), ("1e3", None), ("soon", None), ("9" * 30, None)],
)
def test_a_header_that_is_no_number_tells_nothing(text: str, calls: int | None) -> None:
    provider = provider_named("modelscope")
    provider.read_query(HttpAnswer(200, {MODEL_LEFT: text}, b'{"data": []}'))
    assert provider.quota.model_calls_left == calls
    assert Quota.of({"calls_left": calls, "calls_limit": True, "model_calls_left": "5"}).told == (
        {} if calls is None else {"calls_left": calls})  # fmt: skip


def test_every_word_for_money_has_one_for_quota() -> None:
    assert in_quota_words("; ".join(QUOTA_WORDS)) == "; ".join(QUOTA_WORDS.values())


# The key


NAMES = ("MODELSCOPE_API_KEY", "MODELSCOPE_SDK_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_TOKEN",
         "MODELSCOPE_ACCESS_TOKEN")  # fmt: skip


@pytest.mark.parametrize("place", ["environment", ".env"])
def test_the_key_is_found_under_every_name_the_commonest_first(ms: Lab, place: str) -> None:
    key = ms.shell.env.pop("MODELSCOPE_API_KEY")
    others = list(NAMES)
    for name in NAMES:
        values = {other: f"ms-other-{number}-0a1b" for number, other in enumerate(others)} | {name: key}
        if place == "environment":
            ms.shell.env |= values
        else:
            (ms.shell.folder / ".env").write_text("".join(f"{n}={v}\n" for n, v in reversed(values.items())))
        assert ms.call("--check", "--provider", "modelscope").json["ok"]
        for other in others:
            ms.shell.env.pop(other, None)
        (ms.shell.folder / ".env").unlink(missing_ok=True)
        others.remove(name)
    assert {request.header("authorization") for request in ms.server.requests} == {f"Bearer {key}"}


def test_the_environment_goes_before_the_file_whatever_the_name(ms: Lab) -> None:
    key = ms.shell.env.pop("MODELSCOPE_API_KEY")
    (ms.shell.folder / ".env").write_text("MODELSCOPE_API_KEY=ms-other-0a1b2c3d\n")
    ms.shell.env["MODELSCOPE_ACCESS_TOKEN"] = key
    assert ms.call("--check", "--provider", "modelscope").json["key_source"] == "environment MODELSCOPE_ACCESS_TOKEN"
    (ms.shell.folder / ".env").unlink()


def test_a_key_with_the_word_bearer_before_it_is_told(ms: Lab) -> None:
    ms.shell.env["MODELSCOPE_API_KEY"] = f"Bearer {KEYS['MODELSCOPE_API_KEY']}"
    error = told(ms)
    assert (error["code"], error["exit_code"]) == ("key_malformed", 3) and "Bearer" in error["message"]
    assert ms.server.connections == 0


@pytest.mark.parametrize("key", ["ms-1e6f03b8-test-4d2a-9c57-a0b1c2d3e4f5", "1e6f03b8-4d2a-9c57-beef-a0b1c2d3e4f5"])
def test_a_key_has_no_form(ms: Lab, key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(KEYS, "MODELSCOPE_API_KEY", key)
    ms.shell.env["MODELSCOPE_API_KEY"] = key
    assert ms.make().code == 0


@pytest.mark.parametrize(
    ("root", "url"),
    [
        ("https://api-inference.modelscope.cn/v1", f"https://modelscope.cn{BALANCE}"),
        ("https://api-inference.modelscope.ai/v1", f"https://modelscope.ai{BALANCE}"),
        ("https://proxy.example.com/ms/v1", f"https://proxy.example.com/ms{BALANCE}"),
        ("http://127.0.0.1:8080/v1", f"http://127.0.0.1:8080{BALANCE}"),
    ],
)
def test_the_key_is_checked_where_it_was_given_out(root: str, url: str) -> None:
    call = PROVIDER.key_query(parse_base_url(root, "test", PROVIDER), "ms-key")
    assert call is not None
    assert (call.method, call.url, call.headers["Authorization"]) == ("GET", url, "Bearer ms-key")


@pytest.mark.parametrize("host", ["modelscope.cn.example.com", "xapi-inference.modelscope.cn", "modelscope.cn",
                                  "evil.api-inference.modelscope.cn", "api-inference.modelscope.com"])  # fmt: skip
def test_no_other_host_owns_the_key(host: str) -> None:
    assert not PROVIDER.owns(host)


# The check


def check(ms: Lab, code: int = 0) -> dict[str, Any]:
    result = ms.call("--check", "--provider", "modelscope", "--max-retries", "0")
    assert result.code == code, result.stdout
    assert ms.paid == []
    return result.json


def test_a_check_tells_points_quota_and_whether_the_model_is_listed(ms: Lab) -> None:
    ms.server.play(MODELSCOPE.free_path, json_answer({"data": [{"id": "Qwen/Qwen-Image"}]}, headers=quota_headers(9)))
    ms.server.play(BALANCE, json_answer({"success": True, "data": {"available_balance": 12.5}}))
    answer = check(ms)
    assert (answer["ok"], answer["model_listed"], answer["key_checked"]) == (True, False, True)
    assert (answer["account"], answer["quota"]["model_calls_left"]) == ({"magicubes": 12.5}, 9)


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        (
            said("Authentication failed, please make sure that a valid ModelScope token is supplied", 401),
            "key_rejected",
        ),
        (said("invalid", 401), "key_rejected"),
        (said("Please bind your Alibaba Cloud account before use", 401), "access_denied"),
        (said("no", 403), "access_denied"),
    ],
)
def test_a_check_finds_a_bad_key_although_models_are_shown_to_anybody(ms: Lab, answer: Answer, code: str) -> None:
    ms.server.play(BALANCE, answer)
    told = check(ms, 3)
    assert (told["ok"], told["model_listed"], told["error"]["code"]) == (False, True, code)
    assert told["error"]["billed"] == "no"
    assert "MODELSCOPE_API_KEY" in told["error"]["message"]


@pytest.mark.parametrize(
    "answer",
    [
        said("no such path", 404), Answer(404, body=b"<html>no</html>"), Answer(403, body=b"<html>a firewall</html>"),
        said("oops", 500), Answer(hang_up="after-reading"), json_answer({"success": False, "message": "later"}),
        Answer(body=b"[]"),
    ],
)  # fmt: skip
def test_a_check_that_cannot_tell_of_the_key_says_that(ms: Lab, answer: Answer) -> None:
    ms.server.play(BALANCE, answer)
    told = check(ms)
    assert (told["ok"], told["key_checked"], told["model_listed"]) == (True, False, True)


# Requests


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        (("--size", "480x1024"), "size"),
        (("--size", "1000x1000"), "size"),
        (("--size", "2304x1024"), "size"),
        (("--prompt-extend",), "prompt_extend"),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_anything_is_sent(
    ms: Lab, arguments: tuple[str, ...], field: str
) -> None:
    error = told(ms, *arguments)
    assert (error["code"], error["exit_code"]) == ("invalid_request", 2)
    assert error["message"].startswith(field)
    assert ms.server.connections == 0


@pytest.mark.parametrize(("length", "code"), [(1999, 0), (2000, 2)])
def test_a_prompt_has_under_two_thousand_characters(ms: Lab, length: int, code: int) -> None:
    result = ms.call("--provider", "modelscope", "--prompt", "x" * length, "--output", "out.png")
    assert (result.code, len(ms.paid)) == (code, 1 - code // 2)


def test_a_picture_is_fetched_without_the_key_and_kept_as_it_is(ms: Lab) -> None:
    ms.picture(png(768, 1024))
    assert ms.make("--size", "768x1024").code == 0
    assert (Path(ms.shell.folder) / "out.png").read_bytes() == png(768, 1024)
    assert [r.header("authorization") for r in ms.server.requests if r.path == PICTURE] == [None]


@pytest.mark.parametrize("host", ["muse-ai.oss-cn-hangzhou.aliyuncs.com", "other.oss-cn-beijing.aliyuncs.com"])
def test_a_link_without_tls_is_fetched_with_it(host: str) -> None:
    from zimage.download import checked_link

    assert checked_link(f"http://{host}/img/a.png", loopback=False, provider=PROVIDER)[0] == f"https://{host}/img/a.png"


def test_regions_are_told_by_the_host() -> None:
    endpoint: Endpoint = parse_base_url("api-inference.modelscope.ai", "test", PROVIDER)
    assert (endpoint.root, endpoint.region) == ("https://api-inference.modelscope.ai/v1", "international")
    assert re.fullmatch(r"https://api-inference\.modelscope\.cn/v1", PROVIDER.roots[PROVIDER.default_region])
