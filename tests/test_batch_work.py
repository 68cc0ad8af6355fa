"""One picture of a batch in this process, from a row to a file: what is paid stays paid, and what is lost is told.

Calls are scripted where they would leave: the paid one, the question after a task, and the download.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeAlias

import pytest

from batch_folder import AtWork, Folder
from conftest import TEST_KEY
from fault_server import png
from zimage import download, make
from zimage.batch import work as room
from zimage.batch.jobs import Job
from zimage.batch.journal import Journal
from zimage.batch.names import thumb_name
from zimage.batch.work import Outcome, own_fault
from zimage.calls import Generated, HttpAnswer, HttpCall, Submitted
from zimage.errors import Failure, Left
from zimage.keys import Key
from zimage.plan import Plan
from zimage.task import Task
from zimage.waiting import Stop

PNG, OTHER = png(512, 512), png(512, 512, "red")
LINK = "https://dashscope-result.aliyuncs.com/1.png?Expires=1"
MADE = Generated(image_url=LINK, request_id="r", http_status=200)
HERE = {"response": {"image_url": LINK, "request_id": "r"}, "attempts": [{"at": "2026-01-01T00:00:00Z"}]}
FULL = Failure("disk", "full")
BUSY = Failure("rate_limited", "busy", http_status=429)
LOCAL, PUBLIC = "http://127.0.0.1:9/v1", "https://images.example/v1"
Play: TypeAlias = Callable[..., list[Any]]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out")


@pytest.fixture
def work(folder: Folder) -> Iterator[AtWork]:
    folder.plan("a fox", "an owl")
    with folder.at_work() as work:
        yield work


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Have the paid calls end so, one after the other; gives what each of them was sent with."""

    def play(*ends: Any) -> list[Any]:
        left: list[Any] = []

        def sent(plan: Plan, key: Key, stop: Stop) -> Any:
            left.append((plan, key, stop))
            end = ends[len(left) - 1]
            if isinstance(end, BaseException):
                raise end
            return end

        monkeypatch.setattr(make, "send", sent)
        return left

    return play


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Have a question after a task end so; gives the tasks that were asked after."""

    def asked(end: Any) -> list[Any]:
        tasks: list[Any] = []

        def ask(task: Task, stop: Stop) -> Any:
            tasks.append((task, stop))
            if isinstance(end, BaseException):
                raise end
            return end

        monkeypatch.setattr(Task, "ask", ask)
        return tasks

    return asked


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Play:
    """Have downloads be answered so; gives the links that were fetched."""

    def served(content: bytes = PNG, status: int = 200) -> list[Any]:
        links: list[Any] = []

        def exchange(call: HttpCall, stop: Stop, **_: Any) -> HttpAnswer:
            assert TEST_KEY not in str(dict(call.headers))
            links.append(call.url)
            return HttpAnswer(status, {}, content)

        monkeypatch.setattr(download, "exchange", exchange)
        return links

    return served


def facts_on_disk(folder: Folder, number: int = 0) -> dict[str, Any]:
    facts = json.loads(folder.picture(number)["facts"])
    assert isinstance(facts, dict)
    return facts


PAGE = Failure("service_failing", "away", http_status=502)
GONE = Failure("outcome_unknown", "lost")
HOLDS = [  # the step, its failure, what that has left, whether all calls wait where they are free, and where they cost
    ("generate", None, None, False, False),
    ("generate", BUSY, Left.AGAIN, True, True),
    ("ask", BUSY, Left.OPEN, True, True),
    ("generate", PAGE, Left.AGAIN, True, False),
    ("generate", GONE, Left.ANEW, True, False),
    ("generate", GONE, Left.UNKNOWN, False, False),
    ("generate", Failure("blocked", "no"), Left.REFUSED, False, False),
    ("ask", PAGE, Left.OPEN, False, False),
    ("save", PAGE, Left.PAID, False, False),
]


@pytest.mark.parametrize(("step", "failure", "left", "free", "paid"), HOLDS)
def test_all_calls_wait_at_a_limit_and_where_a_free_server_is_away(
    tmp_path: Path, step: str, failure: Failure | None, left: Left | None, free: bool, paid: bool
) -> None:
    for provider, url, holds in (("openai", LOCAL, free), ("dashscope", None, paid)):
        folder = Folder(tmp_path / provider, provider, url=url)
        folder.plan("a fox")
        with folder.at_work() as work:
            assert Outcome(step, work.job(0), failure, 0.0, left=left).holds is holds


def test_what_was_learnt_of_a_server_is_in_the_call(work: AtWork, play: Play, monkeypatch: pytest.MonkeyPatch) -> None:
    left, job = play(MADE), work.job(0)
    monkeypatch.setattr(type(job.plan.provider), "payload", lambda provider, request: {"plain": True})
    work.worker().generate(job)
    assert left[0][0].payload == job.evidence.data["payload"] == {"plain": True}


def told(outcome: Outcome) -> tuple[str, str, str]:
    """What a failure is called, what of the money is known, and what is left."""
    assert outcome.failure is not None and outcome.left is not None
    return outcome.failure.code, outcome.failure.fault.billed, outcome.left.value


def breaks(work: AtWork, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the database takes no state of a picture."""
    monkeypatch.setattr(work.journal, "keep", lambda job, state: Journal.write(work.journal, "UPDATE nothing", ()))


# The paid call --------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_paid_picture_is_on_disk_with_its_link(folder: Folder, work: AtWork, play: Play) -> None:
    left = play(MADE)
    folder.place = folder.place._replace(workspace="ws")
    job, began = work.job(0), time.monotonic()
    outcome = work.worker(timeout=50.0).generate(job)
    ((plan, key, stop),) = left
    assert (plan.request.prompt, plan.workspace, key) == ("a fox", "ws", folder.place.key)
    assert 25 < stop.timeout < 50  # what is left is kept for the download
    assert (outcome.step, outcome.job, outcome.failure, outcome.left) == ("generate", job, None, None)
    assert outcome.record is not None and outcome.record.evidence is job.evidence
    assert began <= outcome.began <= time.monotonic() and 0 <= outcome.seconds <= time.monotonic() - began
    held = folder.picture(0)
    assert (held["state"], held["paid"], facts_on_disk(folder)["response"]["image_url"]) == ("generated", 1, LINK)
    assert 0 <= facts_on_disk(folder)["timings_ms"]["generate"] < 60_000


def test_a_task_that_was_taken_is_on_disk_and_asked_after_with_the_key_of_its_service(
    folder: Folder, work: AtWork, play: Play
) -> None:
    play(Submitted("t-1", "r"))
    job = work.job(0)
    outcome = work.worker().generate(job)
    assert (outcome.step, outcome.failure, job.state) == ("generate", None, "submitted")
    assert job.task is not None and (job.task.id, job.task._key) == ("t-1", folder.place.key)
    assert (job.task._endpoint, job.task._request) == (job.plan.endpoint, job.plan.request)
    assert (folder.picture(0)["state"], facts_on_disk(folder)["task_id"]) == ("submitted", "t-1")


ENDS: list[tuple[Exception, tuple[str, str, str], str, int]] = [
    # how the call ends, what is told, the state of the row, how often it counts as paid
    (BUSY, ("rate_limited", "no", "again"), "pending", 0),
    (Failure("blocked", "x"), ("blocked", "no", "refused"), "failed", 0),
    (Failure("outcome_unknown", "x"), ("outcome_unknown", "unknown", "unknown"), "unknown", 1),
    (Failure("no_image", "x"), ("no_image", "unknown", "unknown"), "unknown", 1),
    (KeyError("x"), ("internal_error", "unknown", "unknown"), "unknown", 1),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("end", "said", "state", "paid"), ENDS, ids=[row[1][0] for row in ENDS])
def test_what_a_call_that_failed_leaves(
    folder: Folder, work: AtWork, play: Play, end: Exception, said: Any, state: str, paid: int
) -> None:
    play(end)
    job = work.job(0)
    outcome = work.worker().generate(job)
    assert (outcome.step, outcome.job, told(outcome)) == ("generate", job, said)
    assert 0 <= outcome.seconds < 60 and outcome.record is not None
    held = folder.picture(0)
    assert (held["state"], held["paid"]) == (state, paid)
    assert held["paid"] == job.paid and facts_on_disk(folder)["error"]["code"] == said[0]


@pytest.mark.parametrize(
    ("code", "hint"),
    [("outcome_unknown", "--retry-unknown"), ("link_expired", "--retry-failed")],
)
def test_the_way_back_is_the_batch_not_a_picture_beside_it(work: AtWork, play: Play, code: str, hint: str) -> None:
    """--replay of the evidence would pay for it, and the batch once more."""
    play(Failure(code, "x"))
    outcome = work.worker().generate(work.job(0))
    assert outcome.failure is not None
    assert f"the batch with {hint}" in outcome.failure.fault.hint and "--replay" not in outcome.failure.fault.hint


@pytest.mark.parametrize("billed", ["unknown", "yes"])
def test_a_fault_of_the_tool_says_what_may_have_been_billed(billed: Any) -> None:
    fault = own_fault(KeyError("x"), billed).fault
    assert (fault.code, fault.billed, fault.exit_code) == ("internal_error", billed, 7)


def test_a_fault_of_the_tool_after_the_request_left_is_no_usage_error(work: AtWork, play: Play) -> None:
    play(KeyError("x"))
    outcome = work.worker().generate(work.job(0))
    assert outcome.failure is not None and outcome.failure.fault.exit_code == 7


def test_the_way_back_names_the_server_that_was_asked(tmp_path: Path, play: Play, served: Play) -> None:
    folder = Folder(tmp_path / "out", "openai", url=PUBLIC)
    folder.plan("a fox")
    served(b"", 403)
    with folder.at_work() as work:
        outcome = work.worker().save(paid(work, play, f"{PUBLIC}/1.png"))
    assert outcome.failure is not None and f"--base-url {PUBLIC}" in str(outcome.failure.fault.next_command)


def test_the_way_back_to_another_server_is_not_that_of_this_one(tmp_path: Path, served: Play) -> None:
    folder = Folder(tmp_path / "out")
    folder.plan("a fox")
    folder.put(0, state="generated", paid=1, facts=HERE)
    folder.at("openai", url=PUBLIC)
    folder.plan("an owl")
    served(b"", 403)
    with folder.at_work() as work:
        outcome = work.worker().save(work.job(0))
    assert outcome.failure is not None and "--recover" in str(outcome.failure.fault.next_command)
    assert "--base-url" not in str(outcome.failure.fault.next_command)


def test_what_the_disk_did_not_take_is_told_with_the_link(
    folder: Folder, work: AtWork, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(MADE)
    job = work.job(0)
    kept = Journal.keep

    def keep(journal: Journal, job: Job, state: Any) -> Any:
        return kept(journal, job, state) if state == "submitting" else journal.write("UPDATE nothing", ())

    monkeypatch.setattr(Journal, "keep", keep)
    outcome = work.worker().generate(job)
    assert outcome.failure is not None and outcome.record is not None
    assert (outcome.failure.fault.image_url, outcome.failure.fault.billed) == (LINK, "yes")
    assert outcome.record.behind is outcome.failure
    play(Failure("outcome_unknown", "x"))
    outcome = work.worker().generate(work.job(1))
    assert outcome.failure is not None and outcome.failure.code == "disk"  # it ends the run: nothing else is sent
    assert outcome.failure.fault.billed == "unknown"


def test_nothing_is_sent_that_is_not_on_disk(
    folder: Folder, work: AtWork, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = play(MADE)
    with monkeypatch.context() as broken:
        breaks(work, broken)
        outcome = work.worker().generate(work.job(0))
    assert left == [] and outcome.failure is not None and outcome.failure.fault.exit_code == 9
    assert (folder.picture(0)["state"], folder.picture(0)["paid"]) == ("pending", 0)


def test_a_halt_of_the_run_cuts_no_call_that_is_paid_for(work: AtWork, play: Play) -> None:
    calls = Stop(60)
    left = play(MADE)
    work.worker(calls=calls, timeout=30.0).generate(work.job(0))
    calls.request("disk")
    (_, _, stop) = left[0]
    assert stop.reason is None
    stop.wait(30)  # waits end
    assert time.monotonic() - stop.start < 10


def test_no_call_outlives_the_run(work: AtWork, play: Play) -> None:
    left = play(MADE)
    work.worker(calls=Stop(5)).generate(work.job(0))
    assert left[0][2].left_s <= 5


# Questions after a task -----------------------------------------------------------------------------------------------


def submitted(work: AtWork, play: Play, worker: Any = None) -> Job:
    play(Submitted("t-1"))
    job = work.job(0)
    (worker or work.worker()).generate(job)
    return job


def test_a_task_that_is_worked_on_stays_open(folder: Folder, work: AtWork, play: Play, asked: Play) -> None:
    job = submitted(work, play)
    tasks = asked(None)
    outcome = work.worker(timeout=50.0).ask(job)
    ((task, stop),) = tasks
    assert task is job.task and 25 < stop.timeout < 50
    assert outcome[:3] == ("ask", job, None) and outcome.seconds == 0.0  # it says nothing of how long one takes
    assert (job.state, folder.picture(0)["state"]) == ("submitted", "submitted")


def test_a_picture_that_a_task_has_brought_is_on_disk(folder: Folder, work: AtWork, play: Play, asked: Play) -> None:
    job = submitted(work, play)
    job.began -= 30.0
    asked(MADE)
    outcome = work.worker().ask(job)
    assert (outcome.step, outcome.failure, job.state) == ("ask", None, "generated")
    facts = facts_on_disk(folder)
    assert (folder.picture(0)["state"], facts["response"]["image_url"]) == ("generated", LINK)
    assert 30_000 <= facts["timings_ms"]["generate"] < 60_000  # since its request left
    assert [attempt["billed"] for attempt in facts["attempts"]] == ["yes"]


ANSWERS: list[tuple[Exception, str, int, int]] = [
    # how the question ends, the state of the row, how often it counts as paid, the exit code
    (Failure("task_failed", "x", billed="no"), "failed", 0, 6),
    (Failure("blocked", "x"), "failed", 0, 5),
    (Failure("outcome_unknown", "x"), "unknown", 1, 7),
    (Failure("key_rejected", "x", billed="unknown"), "submitted", 1, 3),
    (KeyError("x"), "submitted", 1, 7),
]


@pytest.mark.parametrize(("end", "state", "paid", "exit_code"), ANSWERS)
def test_only_the_end_of_a_task_ends_it(
    folder: Folder, work: AtWork, play: Play, asked: Play, end: Exception, state: str, paid: int, exit_code: int
) -> None:
    job = submitted(work, play)
    asked(end)
    outcome = work.worker().ask(job)
    assert (outcome.step, outcome.job) == ("ask", job) and outcome.failure is not None
    fault, held, (attempt,) = outcome.failure.fault, folder.picture(0), facts_on_disk(folder)["attempts"]
    assert (held["state"], held["paid"], fault.exit_code) == (state, paid, exit_code)
    assert attempt["outcome"] == ("submitted" if state == "submitted" else fault.code)
    assert fault.billed == ("no" if state == "failed" else "unknown")


@pytest.mark.parametrize(
    ("late_s", "is_held", "end", "questions", "is_left"),
    [
        (-30.0, False, None, 1, False),
        (-30.0, True, None, 1, False),
        (0.0, False, None, 1, True),
        (0.0, True, None, 0, True),  # the service asked not to be asked so soon
        (30.0, False, None, 1, True),
        (30.0, False, MADE, 1, False),  # a last question has brought it
    ],
)
def test_a_task_is_left_to_the_next_run_only_after_a_last_question(
    work: AtWork,
    play: Play,
    asked: Play,
    monkeypatch: pytest.MonkeyPatch,
    late_s: float,
    is_held: bool,
    end: Any,
    questions: int,
    is_left: bool,
) -> None:
    job = submitted(work, play)
    tasks = asked(end)
    now = time.monotonic()
    job.give_up_at = now - late_s
    monkeypatch.setattr(room, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(Task, "is_held", is_held)
    outcome = work.worker().ask(job)
    assert len(tasks) == questions
    if is_left:
        assert outcome.failure is not None and outcome.failure.code == "paid_not_downloaded"
        assert (outcome.left, job.state) == (Left.OPEN, "submitted")
    else:
        assert outcome.failure is None and job.state == ("generated" if end else "submitted")


def test_a_task_is_asked_after_as_long_as_nobody_gives_it_up(work: AtWork, play: Play, asked: Play) -> None:
    job = submitted(work, play)
    asked(None)
    assert work.worker().ask(job).failure is None


def test_only_a_task_can_be_asked_after(work: AtWork) -> None:
    with pytest.raises(AssertionError):
        work.worker().ask(work.job(0))


# Tasks that were lost -------------------------------------------------------------------------------------------------

LOST = {
    "task_id": "t-9",
    "attempts": [{"at": "2026-01-01T00:00:00Z", "outcome": "outcome_unknown"}],
    "error": {"code": "outcome_unknown"},
    "started_at": "2026-01-01T00:00:00.000Z",
}


def lost(folder: Folder, work: AtWork, **columns: Any) -> Job:
    folder.put(0, **({"state": "unknown", "paid": 1, "facts": LOST} | columns))
    return work.job(0)


@pytest.mark.parametrize("how", ["strange", "unreachable", "key_rejected"])
def test_what_is_not_found_stays_as_it_was(
    folder: Folder, work: AtWork, asked: Play, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    job = lost(folder, work)
    before = folder.picture(0)
    tasks = asked(None if how == "strange" else Failure(how, "x", billed="unknown"))
    monkeypatch.setattr(Task, "is_strange", how == "strange")
    outcome = work.worker(timeout=50.0).find(job)
    ((task, stop),) = tasks
    assert (task.id, task._key, stop.timeout) == ("t-9", folder.place.key, 50.0)
    assert outcome[:3] == ("find", job, None) and outcome.seconds == 0.0
    assert folder.picture(0) == before and job.state == "unknown"


def test_a_task_that_is_known_again_is_open_again(folder: Folder, work: AtWork, asked: Play) -> None:
    job = lost(folder, work)
    asked(None)
    outcome = work.worker().find(job)
    assert outcome[:3] == ("find", job, None) and outcome.seconds == 0.0
    facts = facts_on_disk(folder)
    assert (folder.picture(0)["state"], folder.picture(0)["paid"], job.state) == ("submitted", 1, "submitted")
    assert facts == {"billable": True} | {name: value for name, value in LOST.items() if name != "error"}


def test_a_picture_that_was_lost_is_had_without_paying(folder: Folder, work: AtWork, asked: Play) -> None:
    job = lost(folder, work)
    asked(MADE)
    outcome = work.worker().find(job)
    assert (outcome.step, outcome.failure, job.state, job.paid) == ("find", None, "generated", 1)
    facts = facts_on_disk(folder)
    assert facts["response"]["image_url"] == LINK and facts["started_at"] == LOST["started_at"]
    assert "error" not in facts and 0 <= facts["timings_ms"]["generate"] < 60_000
    assert [attempt["billed"] for attempt in facts["attempts"]] == ["yes"]


@pytest.mark.parametrize("code", ["task_failed", "outcome_unknown"])
def test_a_task_that_had_failed_is_told(folder: Folder, work: AtWork, asked: Play, code: str) -> None:
    job = lost(folder, work)
    asked(Failure(code, "why", billed="no" if code == "task_failed" else None))
    outcome = work.worker().find(job)
    state, paid = ("failed", 0) if code == "task_failed" else ("unknown", 1)
    assert outcome.step == "find" and outcome.failure is not None and outcome.failure.code == code
    assert (folder.picture(0)["state"], folder.picture(0)["paid"]) == (state, paid)
    assert facts_on_disk(folder)["error"]["message"] == "why"
    assert facts_on_disk(folder)["attempts"][0]["outcome"] == code


def test_what_is_found_and_the_disk_does_not_take_is_told(
    folder: Folder, work: AtWork, asked: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = lost(folder, work)
    asked(None)
    breaks(work, monkeypatch)
    outcome = work.worker().find(job)
    assert outcome.failure is not None and "task t-9" in outcome.failure.message


# Saving ---------------------------------------------------------------------------------------------------------------


def paid(work: AtWork, play: Play, link: str = LINK) -> Job:
    play(MADE._replace(image_url=link))
    job = work.job(0)
    work.worker().generate(job)
    return job


@pytest.mark.smoke
def test_a_picture_is_saved_with_its_thumbnail_and_its_evidence(
    folder: Folder, work: AtWork, play: Play, served: Play
) -> None:
    links, job, began = served(), paid(work, play), time.monotonic()
    outcome = work.worker(thumbs=True).save(job)
    assert (outcome.step, outcome.job, outcome.failure) == ("save", job, None)
    assert 0 < outcome.seconds <= time.monotonic() - began and outcome.record is not None
    assert links == [LINK] and job.plan.output.read_bytes() == PNG
    assert folder.picture(0)["state"] == "saved" and (folder.path / thumb_name(0)).exists()
    assert json.loads(job.evidence.path.read_bytes())["status"] == "saved"


def test_no_thumbnail_is_made_where_none_is_wanted(folder: Folder, work: AtWork, play: Play, served: Play) -> None:
    served()
    work.worker().save(paid(work, play))
    assert not (folder.path / "thumbs").exists()


@pytest.mark.parametrize(
    ("status", "code", "state"), [(403, "link_refused", "generated"), (410, "link_expired", "failed")]
)
def test_a_download_that_fails_is_paid_all_the_same(
    folder: Folder, work: AtWork, play: Play, served: Play, status: int, code: str, state: str
) -> None:
    served(b"expired" if status == 410 else b"", status)
    job = paid(work, play)
    outcome = work.worker().save(job)
    assert outcome.step == "save" and told(outcome)[:2] == (code, "yes")
    assert (folder.picture(0)["state"], folder.picture(0)["paid"]) == (state, 1)


def test_a_fault_of_the_tool_loses_no_picture(
    folder: Folder, work: AtWork, play: Play, served: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(*_: Any) -> None:
        raise KeyError("x")

    served()
    job = paid(work, play)
    monkeypatch.setattr(room, "write_thumb", breaks)
    outcome = work.worker(thumbs=True).save(job)
    assert outcome.step == "save" and told(outcome) == ("internal_error", "yes", "paid")
    assert outcome.failure is not None and outcome.failure.fault.exit_code == 7
    assert folder.picture(0)["state"] == "generated"


def test_a_saved_picture_that_the_database_does_not_take_is_told(
    folder: Folder, work: AtWork, play: Play, served: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    served()
    job = paid(work, play)
    breaks(work, monkeypatch)
    outcome = work.worker().save(job)
    assert outcome.failure is not None and outcome.record is not None and outcome.record.behind is outcome.failure
    assert job.plan.output.read_bytes() == PNG


@pytest.mark.parametrize(
    ("state", "content", "is_second"),
    [("pending", PNG, True), ("pending", OTHER, True), ("generated", PNG, False), ("generated", OTHER, True)],
)
def test_a_file_that_is_there_is_taken_for_the_picture_only_where_an_earlier_run_may_have_put_it(
    folder: Folder, work: AtWork, play: Play, served: Play, state: str, content: bytes, is_second: bool
) -> None:
    served()
    folder.put(0, state=state, facts=HERE if state == "generated" else {})
    job = work.job(0) if state == "generated" else paid(work, play)
    wanted = job.plan.output
    wanted.parent.mkdir(parents=True)
    wanted.write_bytes(content)
    assert work.worker().save(job).failure is None
    assert wanted.read_bytes() == content and job.plan.output.read_bytes() == PNG
    assert (job.plan.output != wanted) == is_second


@pytest.mark.parametrize("first", ["link_refused", "none"])
def test_a_dead_link_is_asked_for_anew_only_of_the_service_that_named_it(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, asked: Play, served: Play, first: str
) -> None:
    """A question carries the key: another service must not get this one's."""
    folder.at("zimageturbo")
    folder.plan({"prompt": "a", "size": "1024*1024"})
    folder.put(0, state="generated", paid=1, facts=HERE | {"task_id": "t-1"})
    served(b"expired", 403)
    tasks = asked(None)
    if first == "none":
        folder.at("dashscope")
        folder.plan({"prompt": "b", "size": "1024*1024"})
    with folder.at_work() as work:
        outcome = work.worker().save(work.job(0))
    assert outcome.failure is not None and outcome.failure.code == "link_expired"
    assert [(task.id, task._key) for task, _ in tasks] == ([] if first == "none" else [("t-1", folder.place.key)])


THIS_MACHINE = "http://127.0.0.1:10/1.png"
HOMES = [  # where the picture was asked for, the link, whether this run has made it, what becomes of it
    (LOCAL, THIS_MACHINE, True, None),
    (LOCAL, "http://127.0.0.1:9/1.png", True, None),
    (LOCAL, "http://127.0.0.1:9/1.png", False, None),  # the user's own flag names it
    (LOCAL, THIS_MACHINE, False, "host_not_trusted"),  # only the folder does, which may be a stranger's
    (PUBLIC, THIS_MACHINE, True, "hop_refused"),
    (PUBLIC, THIS_MACHINE, False, "hop_refused"),
    (PUBLIC, "https://elsewhere.example/1.png", False, None),
]


@pytest.mark.parametrize(("url", "link", "is_new", "code"), HOMES)
def test_a_link_of_a_folder_leads_to_this_machine_only_where_the_user_names_it(
    tmp_path: Path, play: Play, served: Play, url: str, link: str, is_new: bool, code: str | None
) -> None:
    folder = Folder(tmp_path / "out", "openai", url=url)
    folder.plan("a fox")
    links = served()
    if not is_new:
        folder.put(0, state="generated", paid=1, facts=HERE | {"response": {"image_url": link}})
    with folder.at_work() as work:
        job = paid(work, play, link) if is_new else work.job(0)
        outcome = work.worker().save(job)
    assert (outcome.failure.code if outcome.failure else None) == code
    assert links == ([] if code else [link])


def test_a_link_from_another_server_leads_to_this_machine_never(tmp_path: Path, served: Play) -> None:
    """What was asked for elsewhere comes from the folder, also where this run has not begun with it."""
    folder = Folder(tmp_path / "out", "openai", url="http://127.0.0.1:10/v1")
    folder.plan("a fox")
    folder.put(0, state="unknown", paid=1, facts=HERE | {"response": {"image_url": THIS_MACHINE}})
    folder.at("openai", url=LOCAL)
    folder.plan("an owl")
    links = served()
    with folder.at_work() as work:
        job = work.job(0)
        job.evidence.update(status="generated", response={"image_url": THIS_MACHINE})
        outcome = work.worker().save(job)
    assert outcome.failure is not None and outcome.failure.code == "host_not_trusted" and links == []
