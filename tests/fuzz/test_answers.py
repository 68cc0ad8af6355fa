"""Answers of services: any status, headers and body, and good ones of which a little was changed."""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from closed import assert_closed
from fuzz.conftest import cases
from fuzz.promises import assert_failure, plain_json
from fuzz.services import GOOD, LINK, TASK_ID, bodies
from fuzz.strategies import (
    answers,
    as_body,
    changed,
    header_texts,
    statuses,
    texts,
)
from provider_cases import CASES, OPENAI_LINK, Case
from zimage.answers import link_expiry, looks_cut, read_json, retry_after
from zimage.calls import Generated, HttpAnswer, HttpCall, Submitted, Working
from zimage.endpoint import Endpoint
from zimage.errors import Failure
from zimage.evidence import Evidence, utc_now
from zimage.outside import at
from zimage.plan import Plan
from zimage.provider import Provider
from zimage.registry import provider_named
from zimage.request import normalize
from zimage.trust import parse_base_url

NOW = utc_now()
REQUESTS = {case.provider: normalize({"prompt": "a fox"}, with_seed=case.takes_seed) for case in CASES}
providers = st.sampled_from([case.provider for case in CASES]).map(provider_named)


def read_by(provider: Provider, answer: HttpAnswer) -> Generated | Submitted | Failure:
    """What the provider makes of the answer to a paid call; a failure is one of the contract."""
    try:
        return provider.read(answer, REQUESTS[provider.name], NOW)
    except Failure as failure:
        assert_failure(failure)
        return failure


def endpoint_of(provider: Provider) -> Endpoint:
    own = next(f"https://example.com{case.root}" for case in CASES if case.provider == provider.name)
    return parse_base_url(next(iter(provider.roots.values())) or own, "test", provider)


def told(questions: Generator[HttpCall, HttpAnswer, Any], answer: HttpAnswer) -> Any:
    """What comes of questions that all have the same answer; a failure is one of the contract."""
    try:
        next(questions)
        while True:
            questions.send(answer)
    except StopIteration as end:
        return end.value
    except Failure as failure:
        assert_failure(failure)
        return failure


def looked_up(provider: Provider, answer: HttpAnswer) -> Generated | Working | Failure | None:
    """What the provider makes of the answers about a task."""
    found: Generated | Working | Failure | None = told(
        provider.look_up(TASK_ID, endpoint_of(provider), "", REQUESTS[provider.name], NOW), answer
    )
    return found


def made_by(case: Case, answer: HttpAnswer) -> Generated | Submitted | Working | Failure | None:
    """What is made of the answer that brings the picture."""
    provider = provider_named(case.provider)
    return looked_up(provider, answer) if case.by_task else read_by(provider, answer)


def kept(provider: Provider, made: Generated | Submitted) -> Evidence:
    """The evidence of what was made, held to its schema."""
    decided: dict[str, Any] = {"workspace": None, "output": Path("/x.png"), "overwrite": False, "evidence_path": Path()}
    plan = Plan.of(provider, endpoint_of(provider), REQUESTS[provider.name], **decided)
    evidence = Evidence(Path("/nowhere/x.json"), plan.evidence(NOW))
    evidence.begin_attempt()
    if isinstance(made, Submitted):
        evidence.submitted(made)
    else:
        evidence.generated(made._replace(content=b""), (), 1.0)
    content = plain_json(evidence.data)
    assert_closed("evidence", content)
    return evidence


@cases(200, 5_000, provider=providers, answer=answers(bodies))
def test_the_answer_to_a_paid_call_is_understood_or_told(provider: Provider, answer: HttpAnswer) -> None:
    found = read_by(provider, answer)
    if isinstance(found, (Generated, Submitted)):
        kept(provider, found)
    if isinstance(found, Generated):
        assert found.image_url or found.content
        assert (found.image_url == "") != (found.content == b"")
    if isinstance(found, Submitted):
        assert found.task_id or provider.names_tasks


@cases(200, 5_000, provider=providers.filter(lambda provider: provider.has_tasks()), answer=answers(bodies))
def test_the_answer_after_a_task_is_understood_or_told(provider: Provider, answer: HttpAnswer) -> None:
    found = looked_up(provider, answer)
    assert found is None or isinstance(found, (Generated, Working, Failure))
    if isinstance(found, Generated):
        assert kept(provider, found).have.link


@cases(100, 2_500, provider=providers, answer=answers(bodies))
def test_the_answer_to_a_check_is_yes_no_or_told(provider: Provider, answer: HttpAnswer) -> None:
    query = provider.query(endpoint_of(provider), "", None)
    if isinstance(query, Generator):
        found = told(query, answer)
        assert found is True or isinstance(found, Failure)
        return
    try:
        assert provider.read_query(answer) in (True, False)
    except Failure as failure:
        assert_failure(failure)


@pytest.mark.parametrize("case", [*CASES, OPENAI_LINK], ids=str)
@cases(
    50,
    750,
    code=statuses,
    more=changed({"code": "InternalError", "message": "x", "error": None}),
    whole=st.booleans(),
)
def test_what_has_the_picture_is_never_told_as_not_billed(case: Case, code: int, more: Any, whole: bool) -> None:
    """Whatever status, code and message stand beside it: a second try would pay again."""
    body = GOOD[case.id]
    assert isinstance(body, dict)
    answer = HttpAnswer(code, {}, as_body(more | body if isinstance(more, dict) else body), whole)
    found = made_by(case, answer)
    if isinstance(found, Failure):
        assert found.fault.billed != "no", found.fault


@cases(75, 1_500, code=st.sampled_from([200, 201]), more=changed({"code": "InternalError", "message": "x"}))
def test_a_picture_in_a_good_answer_is_taken(code: int, more: Any) -> None:
    for case in (*CASES, OPENAI_LINK):
        body = GOOD[case.id]
        if isinstance(more, dict) and isinstance(body, dict):
            found = made_by(case, HttpAnswer(code, {}, as_body({**more, **body})))
            link = f"{endpoint_of(provider_named(case.provider)).root}{case.picture}" if case.names_tasks else LINK
            assert isinstance(found, Generated) and (found.image_url == link or found.content == b"bytes")


@cases(100, 2_000, answer=answers(bodies))
def test_the_json_of_an_answer_is_an_object_or_none(answer: HttpAnswer) -> None:
    body = read_json(answer)
    assert body is None or isinstance(body, dict)
    assert at(body, "output", "choices", 0, "message") is None or body
    looks_cut(answer.body)


@cases(100, 2_000, said=header_texts | st.datetimes().map(lambda moment: f"{moment:%a, %d %b %Y %H:%M:%S GMT}"))
def test_a_pause_that_is_asked_for_is_seconds(said: str) -> None:
    seconds = retry_after(HttpAnswer(429, {"retry-after": said}, b""))
    assert seconds is None or seconds >= 0
    assert seconds is None or json.loads(json.dumps(seconds, allow_nan=False)) == seconds


pairs = st.tuples(st.sampled_from(["Expires", "expires", "x-oss-date", "X-OSS-Expires", "x"]), texts | st.integers())


@cases(
    100,
    2_000,
    link=texts | st.lists(pairs, max_size=3).map(lambda query: LINK + "?" + "&".join(f"{a}={b}" for a, b in query)),
)
def test_the_end_of_a_link_is_a_moment(link: str) -> None:
    end = link_expiry(link, NOW)
    assert end.tzinfo is not None and end.utcoffset() == dt.timedelta(0)
