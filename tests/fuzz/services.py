"""Services: what they say, well and otherwise, and one that stands in for the network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field

from hypothesis import strategies as st

from fault_server import PICTURE, Received, drawn
from fuzz.strategies import answers, as_body, changed, changed_bytes, json_values, nested, scalars
from provider_cases import BOOKS, CASES, OPENAI_LINK, REFUSALS, TaskBook
from zimage.calls import HttpAnswer, HttpCall
from zimage.errors import NotSent
from zimage.transport import AnswerLost, AnswerTooLarge
from zimage.waiting import Stop

ROOT = "https://dashscope-result-bj.oss-cn-beijing.aliyuncs.com"
LINK = ROOT + PICTURE
ASKED = Received("POST", "/", (), b"{}", ROOT, 0.0)
TASK_ID = "task_0000"
TASK = TaskBook(tasks={TASK_ID: "a fox"}).data(TASK_ID, "SUCCESS", LINK)
# What services say where all is well, and where it is not: links and bytes, tasks, refusals.
GOOD = {case.id: case.made(ASKED, b"bytes") for case in (*CASES, OPENAI_LINK) if not case.by_task}
GOOD |= {
    case.id: json.loads(BOOKS.get(case.provider, TaskBook)(tasks={TASK_ID: "a fox"}).done(TASK_ID, ASKED).body)
    for case in CASES
    if case.by_task
}
GOOD |= {"submitted": {"code": 200, "message": "success", "data": {"task_id": "task_1", "status": "IN_PROGRESS"}}}
SAID = [*GOOD.values(), *(case.empty() for case in CASES), *(case.listed() for case in CASES)]
SAID += [case.said(*case.refused_as[name], "it did not work") for case in CASES for name in REFUSALS]
GOOD_ANSWER = HttpAnswer(200, {}, as_body(GOOD["dashscope"]))
SMALL = drawn("PNG", 16, 16)
PICTURE_ANSWER = HttpAnswer(200, {"content-type": "image/png"}, SMALL)

leaves = st.one_of(
    scalars,
    st.sampled_from([LINK, "data:image/png;base64,AAAA", "data:,x", "//x", "javascript:1", "http://[", "FAILED"]),
    st.sampled_from(
        ["SUCCESS", "IN_PROGRESS", 200, 404, 500, "500", "Arrearage", "InternalError", "DataInspectionFailed"]
    ),
)
bodies = st.one_of(
    st.sampled_from(SAID).flatmap(lambda said: changed(said, leaves=leaves)).map(as_body),
    st.sampled_from(SAID).flatmap(lambda said: changed_bytes(as_body(said))),
    json_values(leaves).map(as_body),
    st.binary(max_size=200),
    nested,
    st.sampled_from(
        [b"", b"<html>502</html>", b'{"output": ', b"data: {}\n\n", b"[]", b'{"a": NaN}', b"\xef\xbb\xbf{}"]
    ),
)


@dataclass
class Service:
    """Stands in for the network. What each kind of call gets, one after the other, the last one for ever.

    An exception is raised instead. A call is paid for where it is a POST, asked where it is a question after a task.
    """

    paid_answers: Sequence[HttpAnswer | Exception] = (HttpAnswer(401, {}, b"{}"),)
    task_answers: Sequence[HttpAnswer | Exception] = (HttpAnswer(404, {}, b"{}"),)
    picture_answers: Sequence[HttpAnswer | Exception] = (PICTURE_ANSWER,)
    paid: list[HttpCall] = field(default_factory=list)
    asked: list[HttpCall] = field(default_factory=list)
    fetched: list[HttpCall] = field(default_factory=list)

    def exchange(self, call: HttpCall, stop: Stop, *, limit: int, reach: str) -> HttpAnswer:
        stop.check()
        if call.method == "POST":
            calls, answers = self.paid, self.paid_answers
        elif "Authorization" in call.headers or "task_id=" in call.url:
            calls, answers = self.asked, self.task_answers
        else:
            calls, answers = self.fetched, self.picture_answers
            assert call.headers.keys() == {"Accept"}
        calls.append(call)
        answer = answers[min(len(calls), len(answers)) - 1]
        if isinstance(answer, Exception):
            raise answer
        if len(answer.body) > limit and answer.status < 300:
            raise AnswerTooLarge
        return answer


ACROSS = [AnswerLost("it broke"), AnswerTooLarge(), NotSent("refused"), NotSent("no name", lasting=True)]
good = st.sampled_from([as_body(body) for body in GOOD.values()])
said = st.one_of(
    answers(bodies), answers(good, st.just(200)), answers(good, st.just(200)), answers(good), st.sampled_from(ACROSS)
)
pictures = st.one_of(
    answers(st.one_of(st.just(SMALL), changed_bytes(SMALL), bodies)),
    st.just(PICTURE_ANSWER),
    st.just(PICTURE_ANSWER),
    st.builds(
        lambda target: HttpAnswer(302, {"location": target}, b""), st.sampled_from([LINK, "/", "http://10.0.0.1/", ""])
    ),
    st.sampled_from(ACROSS),
)
services = st.builds(
    Service,
    st.lists(said, min_size=1, max_size=3),
    st.lists(said, min_size=1, max_size=3),
    st.lists(pictures, min_size=1, max_size=3),
)
