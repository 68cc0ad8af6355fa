"""Tasks that have a name before their call leaves: a lost answer is looked up by it, and nothing is queued twice.

The calls are scripted where they would leave; a kill is an exception that nobody catches, and what it leaves is what
was on disk by then. tests/test_comfyui.py plays the same with the command line and a server.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias
from uuid import UUID

import pytest

from batch_folder import Folder
from conftest import TEST_KEY
from fault_server import png
from zimage import evidence as evidence_room
from zimage import make as room
from zimage import registry, waiting
from zimage.batch.jobs import Feed
from zimage.batch.resume import clean_up
from zimage.calls import Generated, Submitted
from zimage.console import Console
from zimage.errors import Failure, Left
from zimage.evidence import Evidence, EvidenceFile, utc_now
from zimage.keys import Key
from zimage.make import make, settling
from zimage.options import read_options
from zimage.plan import Plan, make_plan
from zimage.provider import OpenModel, Price, Provider
from zimage.registry import provider_class, provider_named
from zimage.settle import Have
from zimage.task import Task
from zimage.waiting import Stop, Stopped

PNG = png(512, 512)
MADE = Generated(content=PNG, request_id="r", http_status=200)
LOST = Failure("outcome_unknown", "no answer came in time")
BUSY = Failure("rate_limited", "busy", http_status=429)
UNKNOWN = Failure("outcome_unknown", "the service does not know it any more")
Play: TypeAlias = Callable[..., list[dict[str, Any]]]
BASE = provider_class("zimageturbo")


class Killed(BaseException):
    """The process is gone."""


class Paid(BASE):  # type: ignore[misc, valid-type]
    """A service whose tasks are named by who sends them, and cost something."""

    names_tasks = True

    def named(self, payload: dict[str, Any], task_id: str) -> dict[str, Any]:
        return payload | {"name": task_id}


class Free(Paid):
    """The same on a machine of one's own."""

    billable = False
    requests_per_minute = 0.0

    def price(self, request: Any, region: str) -> Price:
        return OpenModel.price(self, request, region)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "BACKOFF_BASE", 0.01)


@pytest.fixture(params=[Free, Paid], ids=["free", "paid"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> type[Provider]:
    monkeypatch.setitem(registry._loaded, "zimageturbo", request.param)
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(registry._loaded, "zimageturbo", Free)


@pytest.fixture
def record(tmp_path: Path, kind: type[Provider]) -> EvidenceFile:
    env = {"HOME": str(tmp_path), "ZIMAGETURBO_API_KEY": TEST_KEY, "OUTPUT_DIR": str(tmp_path / "out")}
    words = ["--provider", "zimageturbo", "--prompt", "a fox", "--size", "1:1"]
    plan = make_plan(read_options(words, env), Stop(60), env)
    record = EvidenceFile(Evidence(plan.evidence_path, plan.evidence(utc_now())))
    record.plan = plan  # type: ignore[attr-defined]
    return record


def on_disk(record: EvidenceFile) -> dict[str, Any]:
    content = json.loads(record.evidence.path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.fixture
def play(record: EvidenceFile, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Have the calls end so, and the questions after tasks; gives what was on disk when each of the calls left."""

    def play(*ends: Generated | Submitted | BaseException, found: Any = ()) -> list[dict[str, Any]]:
        left: list[dict[str, Any]] = []
        answers = iter(found)

        def sent(plan: Plan, key: Key, stop: Stop) -> Any:
            left.append(on_disk(record) | {"sent": plan.payload})
            return said(ends[len(left) - 1])

        def said(end: Any) -> Any:
            if isinstance(end, BaseException):
                raise end
            return end

        monkeypatch.setattr(room, "send", sent)
        monkeypatch.setattr(Task, "wait_for", lambda task, stop: said(next(answers)))
        return left

    return play


def made_of(record: EvidenceFile) -> Any:
    return make(record.plan, Key(TEST_KEY, "x"), record, Stop(60), 3)  # type: ignore[attr-defined]


def name_in(left: dict[str, Any]) -> str:
    """The name under which a call left: the same in the payload that was sent and on disk, and a UUID of version 4."""
    name = left["task_id"]
    assert left["sent"] == left["payload"] and left["payload"]["name"] == name
    assert str(UUID(name)) == name and UUID(name).version == 4
    return str(name)


@pytest.mark.smoke
def test_the_name_is_on_disk_before_the_call_leaves(record: EvidenceFile, play: Play) -> None:
    (left,) = [play(Submitted(""), found=[MADE])]
    made_of(record)
    name = name_in(left[0])
    assert left[0]["status"] == "submitting"
    end = on_disk(record)
    assert (end["status"], end["task_id"], len(left)) == ("saved", name, 1)


def test_a_service_that_gives_another_name_is_asked_by_that(record: EvidenceFile, play: Play) -> None:
    play(Submitted("of the service"), found=[MADE])
    made_of(record)
    assert on_disk(record)["task_id"] == "of the service"


@pytest.mark.parametrize(("end", "is_sure"), [(Submitted(""), True), (LOST, False)], ids=["answered", "lost"])
def test_whether_the_service_has_named_a_task_is_known_to_who_asks_after_it(
    record: EvidenceFile, play: Play, monkeypatch: pytest.MonkeyPatch, end: Any, is_sure: bool
) -> None:
    play(end, found=[MADE])
    asked: list[Any] = []
    console = Console(json_mode=False, quiet=True)

    def task(*where: Any, **how: Any) -> Task:
        asked.append(how)
        return Task(*where, **how)

    monkeypatch.setattr(room, "Task", task)
    make(record.plan, Key(TEST_KEY, "x"), record, Stop(60), 3, console)  # type: ignore[attr-defined]
    assert asked == [{"is_sure": is_sure, "tell": console.note}]


LOSSES = [LOST, Failure("answer_unusable", "no JSON"), Failure("no_image", "nothing in it"), LOST.but(http_status=502)]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: f"{loss.code}-{loss.fault.http_status}")
def test_a_lost_answer_is_looked_up_and_not_sent_again(record: EvidenceFile, play: Play, loss: Failure) -> None:
    waited_for: list[Any] = []

    def found() -> Iterator[Generated]:
        waited_for.extend(on_disk(record)["attempts"])
        yield MADE

    left = play(loss, found=found())
    made_of(record)
    assert len(left) == 1
    assert [attempt.get("http_status") for attempt in waited_for] == [loss.fault.http_status]
    end = on_disk(record)
    assert (end["status"], end["task_id"]) == ("saved", name_in(left[0]))
    assert [attempt["billed"] for attempt in end["attempts"]] == ["yes"]


def test_what_never_came_is_sent_again_by_the_same_name_where_it_is_free(
    record: EvidenceFile, play: Play, kind: type[Provider]
) -> None:
    left = play(LOST, Submitted(""), found=[UNKNOWN, MADE])
    if kind is Free:
        made_of(record)
        assert name_in(left[0]) == name_in(left[1])  # a service that has got both makes one
        assert on_disk(record)["status"] == "saved"
    else:
        with pytest.raises(Failure) as caught:
            made_of(record)
        assert (caught.value.code, len(left)) == ("outcome_unknown", 1)


def test_a_refused_call_takes_its_name_along(record: EvidenceFile, play: Play) -> None:
    left = play(BUSY, Failure("balance", "no money"))
    with pytest.raises(Failure), settling(record, flags=(), place=()):
        made_of(record)
    assert name_in(left[0]) != name_in(left[1])
    end = on_disk(record)
    assert end["status"] == "failed" and "task_id" not in end


@pytest.mark.parametrize("left_it", [False, True])
def test_a_signal_leaves_a_name_only_where_the_request_has_left(
    record: EvidenceFile, play: Play, left_it: bool
) -> None:
    left = play(Stopped("SIGTERM", request_left=left_it))
    with pytest.raises(Failure) as caught, settling(record, flags=(), place=()):
        made_of(record)
    end = on_disk(record)
    if left_it:
        assert (end["status"], end["task_id"]) == ("submitted", name_in(left[0]))
        assert "--recover" in str(caught.value.fault.next_command)
    else:
        assert end["status"] == "failed" and "task_id" not in end
        assert caught.value.fault.next_command is None


def test_where_the_name_cannot_be_written_nothing_leaves(
    record: EvidenceFile, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = play(MADE)

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(evidence_room, "write_new", full)
    with pytest.raises(Failure) as caught:
        made_of(record)
    assert (caught.value.code, left, record.evidence.task_id) == ("disk", [], "")
    assert record.evidence.have.billed == "no" and not record.evidence.have.is_task_open


def test_a_kill_leaves_what_is_asked_after(record: EvidenceFile, play: Play) -> None:
    """While the request is out; and while its task is waited for, whose submission is on disk by then."""
    left = play(Killed())
    with pytest.raises(Killed):
        made_of(record)
    end = on_disk(record)
    assert (end["status"], end["task_id"]) == ("submitting", name_in(left[0]))
    found = Evidence(record.evidence.path, end)  # type: ignore[arg-type]
    assert found.have.is_task_open and found.have.billed == "unknown"


@pytest.mark.parametrize("status", ["submitting", "submitted"])
def test_an_open_task_is_one_that_may_have_come(status: Any) -> None:
    have = Have("unknown", status, task=True, link="", held=False, billable=False)
    assert have.is_task_open and not have._replace(task=False).is_task_open


# In a batch -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, free: None) -> Iterator[Folder]:
    folder = Folder(tmp_path / "out", "zimageturbo")
    folder.plan({"prompt": "a fox", "size": "1024*1024"})
    yield folder


def killed(folder: Folder, monkeypatch: pytest.MonkeyPatch, *ends: Any) -> list[dict[str, Any]]:
    """Send the picture, and die where the ends are over; gives what was in the database as each call left."""
    left: list[dict[str, Any]] = []

    def sent(plan: Plan, key: Key, stop: Stop) -> Any:
        left.append(folder.picture(0) | {"sent": plan.payload})
        if len(left) > len(ends):
            raise Killed
        if isinstance(ends[len(left) - 1], BaseException):
            raise ends[len(left) - 1]
        return ends[len(left) - 1]

    monkeypatch.setattr(room, "send", sent)
    with folder.at_work() as work, contextlib.suppress(Killed):
        work.worker().generate(work.job(0))
    return left


def facts(picture: dict[str, Any]) -> dict[str, Any]:
    found = json.loads(picture["facts"])
    assert isinstance(found, dict)
    return found


def test_the_name_of_a_row_is_in_the_database_before_its_call_leaves(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (left,) = killed(folder, monkeypatch)
    assert left["state"] == "submitting"
    assert facts(left)["task_id"] == left["sent"]["name"]


def test_a_row_that_was_out_at_a_kill_is_asked_after_and_not_sent(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    (left,) = killed(folder, monkeypatch)
    clean_up(folder.path, Console(json_mode=False, quiet=True), Stop(60))
    picture = folder.picture(0)
    assert (picture["state"], facts(picture)["task_id"]) == ("submitted", left["sent"]["name"])
    with folder.at_work() as work:
        (job,) = work.jobs.submitted()
        assert job.evidence.data["payload"] == left["sent"]  # as it was sent
        job.task = work.worker().task(job, job.evidence.task_id)
        monkeypatch.setattr(Task, "ask", lambda task, stop: MADE)
        outcome = work.worker().ask(job)
    assert outcome.failure is None and folder.picture(0)["state"] == "generated"


@pytest.mark.parametrize("tells_attempts", [True, False])
def test_a_row_whose_task_never_came_is_pending_again(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, tells_attempts: bool
) -> None:
    (left,) = killed(folder, monkeypatch)
    if not tells_attempts:  # a folder from elsewhere
        folder.put(0, facts={"task_id": facts(left)["task_id"]})
    clean_up(folder.path, Console(json_mode=False, quiet=True), Stop(60))

    def unknown(task: Task, stop: Stop) -> None:
        raise UNKNOWN

    monkeypatch.setattr(Task, "ask", unknown)
    with folder.at_work() as work:
        (job,) = work.jobs.submitted()
        job.task = work.worker().task(job, job.evidence.task_id)
        outcome = work.worker().ask(job)
    assert (outcome.left, job.state) == (Left.ANEW, "pending")
    picture = folder.picture(0)
    assert (picture["state"], picture["paid"]) == ("pending", 0)


@pytest.mark.parametrize("lost", [(0,), (2,), (0, 1, 2), (1, 3)])
def test_a_task_of_an_earlier_run_that_never_came_is_sent_once(folder: Folder, lost: tuple[int, ...]) -> None:
    """The input may come to its row only after it is pending again."""
    folder.plan(*({"prompt": f"fox {number}", "size": "1024*1024"} for number in range(1, 5)))
    numbers = [picture["number"] for picture in folder.pictures() if picture["position"] is not None]
    for index in lost:
        folder.put(numbers[index], state="submitted", facts={"task_id": str(UUID(int=index))})
    with folder.at_work() as work:
        feed = Feed(work.jobs, ("pending",))
        back = [work.job(numbers[index]) for index in lost]
        for index in lost:
            folder.put(numbers[index], state="pending", facts={})
        feed.again(back[0], 1.0)
        for job in back[1:]:
            feed.anew(job)
        sent = [job.number for job in iter(lambda: feed.next(math.inf), None) if job]
        assert sorted(sent) == numbers


def test_a_row_whose_answer_was_lost_is_submitted(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    (left,) = killed(folder, monkeypatch, LOST)
    picture = folder.picture(0)
    assert (picture["state"], facts(picture)["task_id"]) == ("submitted", left["sent"]["name"])


def test_a_provider_without_names_has_none() -> None:
    assert not provider_named("zimageturbo").names_tasks and provider_class("zimageturbo").has_tasks()
    assert not provider_class("openai").has_tasks()
