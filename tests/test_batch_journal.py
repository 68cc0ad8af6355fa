"""The journal of a batch in this process: every step of every picture on disk before the next, and read back as it was.

What a run finds in a folder is what it may send, ask after and fetch: no more, and with no other key.
"""

from __future__ import annotations

import datetime as dt
import json
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from batch_folder import BLANK, AtWork, Folder
from zimage.batch import journal as room
from zimage.batch.contract import DATABASE, RESERVE, TICK
from zimage.batch.folder import Reserve, open_database
from zimage.batch.jobs import Feed, Job, Jobs, read_services
from zimage.batch.journal import Backlog, Journal, JournalRow, RunRow
from zimage.calls import Generated, Submitted
from zimage.errors import Failure, Fault, Left
from zimage.evidence import timestamp
from zimage.trust import choose_endpoint

LOCAL, NEIGHBOUR = "http://127.0.0.1:9/v1", "http://127.0.0.1:10/v1"
LINK = "https://x.aliyuncs.com/1.png"
FULL = Failure("disk", "full")
NOW = dt.datetime(2026, 1, 1, 12, tzinfo=dt.timezone.utc)
EARLIER = {"at": "2026-01-01T00:00:00.000Z", "outcome": "rate_limited", "billed": "no"}


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out")


def numbers(jobs: list[Job]) -> list[int]:
    return [job.number for job in jobs]


# What a row of the database means ------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_a_picture_is_asked_for_as_its_row_says(folder: Folder) -> None:
    folder.plan(
        "first",
        {"prompt": "a fox", "size": "1024*512", "seed": 7, "prompt_extend": True, "output": "a/fox.png", "id": "x"},
        variants=2,
    )
    folder.put(3, paid=2)
    folder.place = folder.place._replace(workspace="ws")
    with folder.at_work() as work:
        *_, job = work.jobs.to_send(("pending",), (-1, -1))
    assert (job.number, job.position, job.line, job.id, job.paid, job.tries) == (3, (1, 1), 2, "x", 2, 0)
    assert (job.state, job.state_before, job.task) == ("pending", "pending", None)
    assert job.began == 0 and job.give_up_at > time.monotonic() + 1e9  # until somebody says when
    assert job.plan.request.as_dict() == {"prompt": "a fox", "size": "1024*512", "seed": 8, "prompt_extend": True}
    assert job.plan.provider is folder.place.provider and job.plan.endpoint == folder.place.endpoint
    assert job.plan.output == folder.path / "a" / "fox-2.png" and job.plan.workspace == "ws"
    assert job.plan.evidence_path == folder.path / "evidence" / "0000" / "000003.json"
    assert not job.plan.overwrite  # nothing in the folder is
    assert job.evidence.path == job.plan.evidence_path and job.evidence.data["request"]["seed"] == 8
    assert (job.evidence.status, job.facts_before) == ("pending", {})


def test_no_seed_is_sent_where_there_is_none(folder: Folder) -> None:
    folder.at("zimageturbo")
    folder.plan({"prompt": "a", "size": "1024*1024"})
    with folder.at_work() as work:
        assert work.job(0).plan.request.seed is None


def test_a_seed_of_nought_is_one(folder: Folder) -> None:
    folder.plan({"prompt": "a", "seed": 0})
    with folder.at_work() as work:
        assert work.job(0).plan.request.seed == 0


@pytest.mark.parametrize(
    ("state", "steps"),
    [
        ("pending", 8),
        ("failed", 8),
        ("unknown", 8),
        ("submitting", 4),
        ("submitted", 4),
        ("generated", 4),
        ("saved", 4),
    ],
)
def test_what_was_made_keeps_the_settings_that_it_was_made_with(tmp_path: Path, state: str, steps: int) -> None:
    folder = Folder(tmp_path / "out", "openai", url=LOCAL)
    folder.plan("a")
    folder.put(0, state=state, facts={"settings": {"steps": 4, "guidance": 0.0}})
    with folder.at_work() as work:
        job = work.job(0)
    assert job.plan.provider.settings["steps"] == steps
    assert type(job.plan.provider) is type(folder.place.provider)


@pytest.mark.parametrize("state", ["generated", "failed"])
def test_without_noted_settings_those_of_the_run_hold(tmp_path: Path, state: str) -> None:
    folder = Folder(tmp_path / "out", "openai", url=LOCAL, settings={"steps": 5})
    folder.plan("a")
    folder.put(0, state=state)
    with folder.at_work() as work:
        assert work.job(0).plan.provider is folder.place.provider


def test_of_earlier_tries_only_the_attempts_are_true_of_the_next(folder: Folder) -> None:
    facts = {"attempts": [EARLIER], "error": {"code": "blocked"}, "response": {"request_id": "r"}, "task_id": "t"}
    folder.plan("a", "b", "c", "d")
    for number, state in enumerate(("pending", "failed", "unknown", "generated")):
        folder.put(number, state=state, facts=facts)
    with folder.at_work() as work:
        *again, made = map(work.job, range(4))
    for job, state in zip(again, ("pending", "failed", "unknown"), strict=True):
        said = job.evidence.data
        assert (said["status"], said["attempts"], job.facts_before) == (state, [EARLIER], facts)
        assert not {"error", "response", "task_id"} & set(said)
    assert made.evidence.status == "generated" and made.evidence.said["request_id"] == "r"
    kept = json.loads(made.facts)
    assert {name: kept[name] for name in facts} == facts


@pytest.mark.parametrize(
    ("columns", "name"),
    [
        ({"line": 3, "id": None}, "line 3"),
        ({"line": 3, "id": "a\nb"}, "line 3 (a b)"),
        ({"line": None, "id": "x"}, "picture 0"),
        ({"line": None, "id": None}, "picture 0"),
    ],
)
def test_how_messages_call_a_picture(folder: Folder, columns: dict[str, Any], name: str) -> None:
    folder.plan("a")
    folder.put(0, **columns)
    with folder.at_work() as work:
        assert work.job(0).name == name


@pytest.mark.parametrize(
    ("provider", "url"),
    [("dashscope", None), ("zimageturbo", None), ("openai", LOCAL), ("openai", "https://images.example/v1")],
)
def test_a_place_is_read_back_as_it_was_chosen(tmp_path: Path, provider: str, url: str | None) -> None:
    folder = Folder(tmp_path / "out", provider, url=url)
    folder.plan({"prompt": "a", "size": "1024*1024"})
    with folder.database() as database:
        ((name, place),) = ((who.name, there) for who, there in read_services(database).values())
    assert (name, place) == (provider, folder.place.endpoint._replace(source=""))


def test_what_is_made_in_this_process_has_no_host(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out", "diffusers")
    folder.plan({"prompt": "a", "size": "1024*1024"})
    with folder.database() as database:
        ((_, place),) = read_services(database).values()
    known = choose_endpoint(
        folder.place.provider, flag=None, request_url=None, region=None, env={}, trusted=frozenset()
    )
    assert (place.url, place.host, place.region) == (known.url, "", known.region)


# What a run may do ----------------------------------------------------------------------------------------------------


def test_pictures_are_sent_in_the_order_of_the_input_once(folder: Folder) -> None:
    folder.plan("a", "b", variants=2)
    folder.plan("b", BLANK, "c", "a", variants=2)
    with folder.at_work() as work:
        first = work.jobs.to_send(("pending",), (-1, -1))
        assert [(job.plan.request.prompt, job.position) for job in first] == [
            (prompt, (position, variant)) for position, prompt in enumerate("bca") for variant in (0, 1)
        ]
        assert [job.position for job in work.jobs.to_send(("pending",), (1, 0))] == [(1, 1), (2, 0), (2, 1)]


def test_only_what_was_asked_for_is_sent(folder: Folder) -> None:
    states = ("pending", "submitting", "submitted", "generated", "saved", "failed", "unknown")
    folder.plan(*[f"{state}" for state in states], "gone")
    for number, state in enumerate((*states, "failed")):
        folder.put(number, state=state)
    folder.put(7, position=None)
    with folder.at_work() as work:
        for asked in (("pending",), ("pending", "failed"), ("pending", "unknown"), ("pending", "failed", "unknown")):
            assert {job.state for job in work.jobs.to_send(asked, (-1, -1))} == set(asked)
            assert 7 not in numbers(work.jobs.to_send(asked, (-1, -1)))


def test_a_long_input_is_read_in_parts(folder: Folder) -> None:
    folder.plan(*map(str, range(230)))
    with folder.at_work() as work:
        first = work.jobs.to_send(("pending",), (-1, -1))
        rest = work.jobs.to_send(("pending",), first[-1].position)
    assert 0 < len(first) < 230 and numbers(first) + numbers(rest) == list(range(230))


@pytest.fixture
def elsewhere(folder: Folder) -> Folder:
    """Pictures 0 to 3 were asked for at one place, 4 to 7 at the place of this run."""
    folder.plan(*map(str, range(4)))
    for number in range(4):
        folder.put(number, state="saved", paid=1)
    folder.at("dashscope", url="https://dashscope-intl.aliyuncs.com/api/v1")
    folder.plan(*map(str, range(4)))
    return folder


def put_all(folder: Folder, **columns: Any) -> None:
    for number in range(8):
        folder.put(number, position=number, **columns)


def test_nothing_is_asked_of_a_service_that_another_one_knows(elsewhere: Folder) -> None:
    """Calls carry a key, and each service knows its own tasks alone."""
    put_all(elsewhere, facts={"task_id": "t"}, state="submitted")
    with elsewhere.at_work() as work:
        assert numbers(work.jobs.submitted()) == [4, 5, 6, 7]
    put_all(elsewhere, state="unknown")
    with elsewhere.at_work() as work:
        assert numbers(work.jobs.to_send(("unknown",), (-1, -1))) == [4, 5, 6, 7]
        assert numbers(work.jobs.lost(with_dead_link=True)) == [4, 5, 6, 7]


@pytest.mark.parametrize("state", ["pending", "saved", "failed", "generated", "unknown"])
def test_only_open_tasks_are_asked_after(folder: Folder, state: str) -> None:
    folder.plan("a", "b")
    folder.put(0, state=state, facts={"task_id": "t"})
    folder.put(1, state="submitted", facts={"task_id": "t"})
    with folder.at_work() as work:
        assert numbers(work.jobs.submitted()) == [1]


LOST: list[tuple[str, dict[str, Any], bool, bool]] = [
    # the state, the facts, whether it is looked for, whether it is where dead links are
    ("unknown", {"task_id": "t"}, True, True),
    ("unknown", {}, False, False),
    ("unknown", {"response": {"usage": {"task_id": "t"}}}, False, False),
    ("failed", {"task_id": "t", "error": {"code": "link_expired"}}, False, True),
    ("failed", {"task_id": "t", "error": {"code": "link_refused"}}, False, True),
    ("failed", {"task_id": "t", "error": {"code": "blocked"}}, False, False),
    ("failed", {"task_id": "t", "error": {}}, False, False),
    ("failed", {"task_id": "t"}, False, False),
    ("failed", {"error": {"code": "link_expired"}, "response": {"usage": {"task_id": "t"}}}, False, False),
    ("pending", {"task_id": "t", "error": {"code": "link_expired"}}, False, False),
    ("saved", {"task_id": "t", "error": {"code": "link_expired"}}, False, False),
]


def test_a_task_that_was_lost_is_looked_for_free(folder: Folder) -> None:
    folder.plan(*map(str, range(len(LOST))))
    for number, (state, facts, _, _) in enumerate(LOST):
        folder.put(number, state=state, facts=facts)
    with folder.at_work() as work:
        for column, with_dead_link in ((2, False), (3, True)):
            looked_for = [number for number, row in enumerate(LOST) if row[column]]
            assert numbers(work.jobs.lost(with_dead_link=with_dead_link)) == looked_for


def test_what_is_paid_is_fetched_in_parts_whoever_made_it(elsewhere: Folder) -> None:
    put_all(elsewhere, state="generated", facts={"response": {"image_url": LINK}})
    with elsewhere.at_work() as work:
        assert numbers(work.jobs.paid(-1)) == list(range(8))
        assert numbers(work.jobs.paid(5)) == [6, 7] and numbers(work.jobs.paid(7)) == []
        assert {job.plan.endpoint.region for job in work.jobs.paid(-1)} == {"beijing", "singapore"}
        assert work.jobs.out_of_reach() == []
    elsewhere.put(2, state="saved")
    elsewhere.put(5, state="unknown")
    with elsewhere.at_work() as work:
        assert numbers(work.jobs.paid(-1)) == [0, 1, 3, 4, 6, 7]
    elsewhere.plan(*map(str, range(20)))
    for number in range(20):
        elsewhere.put(number, state="generated")
    with elsewhere.at_work() as work:
        part = numbers(work.jobs.paid(2))
        assert 0 < len(part) < 17 and part == list(range(3, 3 + len(part)))


PUBLIC, OTHER = "https://images.example/v1", "https://other.example/v1"
REACH = [  # where pictures were asked for, where this run asks, whether it fetches them
    (("openai", LOCAL), ("openai", LOCAL), True),
    (("openai", LOCAL), ("openai", NEIGHBOUR), True),  # both are this machine
    (("openai", LOCAL), ("openai", PUBLIC), False),
    (("openai", LOCAL), ("dashscope", None), False),
    (("openai", PUBLIC), ("openai", PUBLIC), True),
    (("openai", PUBLIC), ("openai", OTHER), False),  # it may link to itself, which need not be public
    (("openai", PUBLIC), ("openai", LOCAL), False),
    (("openai", PUBLIC), ("dashscope", None), False),
    (("dashscope", None), ("openai", LOCAL), True),
    (("dashscope", None), ("openai", PUBLIC), True),
    (("dashscope", None), ("zimageturbo", None), True),
    (("dashscope", "http://127.0.0.1:9/api/v1"), ("dashscope", None), False),
]


@pytest.mark.parametrize(("there", "here", "is_fetched"), REACH)
def test_a_link_leads_to_this_machine_or_an_own_server_only_where_the_run_names_it(
    folder: Folder, there: Any, here: Any, is_fetched: bool
) -> None:
    folder.at(there[0], url=there[1])
    folder.plan({"prompt": "a", "size": "1024*1024"}, {"prompt": "b", "size": "1024*1024"})
    url = folder.place.endpoint.url
    for number in (0, 1):
        folder.put(number, state="generated", paid=1)
    folder.at(here[0], url=here[1])
    folder.plan({"prompt": "c", "size": "1024*1024"})
    with folder.at_work() as work:
        assert numbers(work.jobs.paid(-1)) == ([0, 1] if is_fetched else [])
        told = f"2 paid pictures wait at {url}: only a run that names it fetches them"
        assert work.jobs.out_of_reach() == ([] if is_fetched else [told])


# Several servers of one's own -----------------------------------------------------------------------------------------


@pytest.fixture
def own(folder: Folder) -> Folder:
    """Four pictures that a server of one's own was asked for."""
    folder.at("openai", url=LOCAL)
    folder.plan("a", "b", "c", "d")
    return folder


def test_what_is_asked_for_elsewhere_says_where_it_was_asked_for_before(own: Folder) -> None:
    own.put(0, facts={"attempts": [EARLIER]})
    before = own.place
    with own.at_work() as work:
        job = work.job(0)
    first, started = job.plan, job.evidence.data["started_at"]
    job.ask_at(job.service, before)
    assert job.plan is first and job.evidence.data["attempts"] == [EARLIER]
    own.at("openai", url=NEIGHBOUR, settings={"steps": 4})
    job.ask_at(7, own.place)
    assert job.service == 7 and job.plan.provider is own.place.provider and job.plan.endpoint is own.place.endpoint
    same = ("output", "overwrite", "evidence_path", "workspace")
    assert [getattr(job.plan, name) for name in same] == [getattr(first, name) for name in same]
    said = job.evidence.data
    assert said["endpoint"] == own.place.endpoint.url and said["started_at"] == started
    assert said["payload"] == job.plan.payload and said["settings"]["steps"] == 4
    assert said["attempts"] == [{"endpoint": before.endpoint.url, **EARLIER}]
    job.ask_at(7, before)  # under its number another provider may be set up
    assert job.plan.provider is before.provider and job.evidence.data["settings"]["steps"] == 8


def test_what_was_learnt_of_a_server_is_in_the_next_call(own: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    with own.at_work() as work:
        job = work.job(0)
    first = job.plan
    job.renew()
    assert job.plan is first
    monkeypatch.setattr(type(first.provider), "payload", lambda provider, request: {"plain": True})
    job.renew()
    assert job.plan.payload == job.evidence.data["payload"] == {"plain": True}


STRANDED = [  # the state, the link, whether it is only there: where this machine is asked, where another is
    ("submitted", "", (True, True)),
    ("generated", "http://127.0.0.1:9/a.png", (True, True)),  # of the server that was asked
    ("generated", LINK, (False, True)),
    ("saved", "", (False, False)),
]


@pytest.mark.parametrize(("here", "column"), [(NEIGHBOUR, 0), (PUBLIC, 1)])
def test_what_only_a_server_has_that_is_not_named_any_more(own: Folder, here: str, column: int) -> None:
    for number, (state, link, _) in enumerate(STRANDED):
        own.put(number, state=state, paid=1, facts={"task_id": "t", "response": {"image_url": link} if link else {}})
    only_there = [number for number, row in enumerate(STRANDED) if row[2][column]]
    with own.at_work() as work:
        assert work.jobs.stranded() == []  # it is named
    own.at("openai", url=here)
    with own.at_work() as work:
        assert numbers(work.jobs.stranded()) == only_there
        assert [number for number in range(4) if work.jobs.is_only_there(work.job(number))] == only_there
    own.put(0, position=None)
    with own.at_work() as work:
        assert numbers(work.jobs.stranded()) == only_there[1:]  # what is in the input


def test_where_users_name_servers_any_of_them_sends_what_is_left(own: Folder) -> None:
    own.at("openai", url=NEIGHBOUR)
    with own.at_work() as work:
        assert numbers(work.jobs.to_send(("pending",), (-1, -1))) == [0, 1, 2, 3]
    own.at("dashscope")
    with own.at_work() as work:
        assert work.jobs.to_send(("pending",), (-1, -1)) == []


def test_of_several_servers_each_is_asked_for_its_own_tasks(own: Folder) -> None:
    first = own.place
    own.at("openai", url=NEIGHBOUR)
    with own.database() as database:
        jobs = Jobs(database, own.path, [first, own.place])
        one, other = jobs.places
    assert [place.endpoint for place in jobs.places.values()] == [first.endpoint, own.place.endpoint]
    for number in range(4):
        own.put(number, state="submitted", service=one if number < 2 else other, facts={"task_id": "t"})
    with own.database() as database:
        jobs = Jobs(database, own.path, [own.place, first])
        assert [job.plan.endpoint for job in jobs.submitted()] == [first.endpoint] * 2 + [own.place.endpoint] * 2
        assert numbers(Jobs(database, own.path, [own.place]).submitted()) == [2, 3]


# The order of a run ---------------------------------------------------------------------------------------------------


def test_pictures_are_fed_once_and_again_when_their_time_has_come(own: Folder) -> None:
    with own.at_work() as work:
        feed = Feed(work.jobs, ("pending",))
        first = feed.next(0.0)
        assert first is not None and first.number == 0 and feed.due_at is None
        feed.again(first, 100.0)
        assert feed.due_at == 100.0
        second = feed.next(99.9)
        assert second is not None and second.number == 1
        assert feed.next(100.0) is first and feed.due_at is None
        feed.back(second)
        assert feed.next(100.0) is second
        feed.again(second, 102.0)
        feed.again(first, 101.0)
        assert feed.due_at == 101.0
        order = [job.number if (job := feed.next(now)) else None for now in (100.0, 100.0, 100.0, 101.5, 101.5, 102.0)]
        assert order == [2, 3, None, 0, None, 1]


def test_what_is_pending_again_is_fed_where_its_turn_is_over(own: Folder) -> None:
    own.put(0, state="submitted")
    with own.at_work() as work:
        feed = Feed(work.jobs, ("pending",))
        early, late = work.job(0), work.job(3)
        own.put(0, state="pending")
        feed.anew(late)  # it comes anyway
        assert feed.due_at is None
        assert [job.number for job in iter(lambda: feed.next(0.0), None)] == [1, 2, 3]  # 0 was out: by `anew` alone
        own.put(0, state="unknown")
        feed.anew(early)
        assert feed.next(0.0) is None and feed.due_at is not None
        again = feed.next(time.monotonic())
        assert again is not None and (again.number, again.state) == (0, "unknown")  # as the database has it now


# What is written is on disk, or it is told ----------------------------------------------------------------------------


@pytest.fixture
def work(folder: Folder) -> Any:
    folder.plan("a", "b", "c")
    with folder.at_work() as work:
        yield work


PAY = "UPDATE pictures SET paid = paid + 1 WHERE number = ?"
WRONG = "UPDATE pictures SET state = 'x' WHERE number = ?"


@pytest.mark.smoke
def test_what_is_told_to_be_written_is_seen_by_everybody(folder: Folder, work: AtWork) -> None:
    for number in (0, 2):
        work.journal.write(PAY, (number,)).result(10)
        assert folder.picture(number)["paid"] == 1
    assert folder.picture(1)["paid"] == 0


def test_what_contradicts_the_rules_undoes_nothing_else(folder: Folder, work: AtWork) -> None:
    futures = [work.journal.write(*entry) for entry in ((PAY, (0,)), (WRONG, (1,)), (PAY, (2,)))]
    assert futures[0].result(10) is None and futures[2].result(10) is None
    end = futures[1].exception(10)
    assert isinstance(end, Failure) and (end.code, str(folder.path) in end.message) == ("batch_unreadable", True)
    assert [picture["paid"] for picture in folder.pictures()] == [1, 0, 1]


def test_what_comes_together_is_committed_together(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, work: AtWork
) -> None:
    """A commit waits for the disk: a call for each of them would hold up hundreds of workers."""
    said: list[str] = []

    def opened(path: Path) -> Any:
        database = open_database(path)
        database.set_trace_callback(said.append)
        return database

    monkeypatch.setattr(room, "open_database", opened)
    journal = Journal(folder.path)
    work.database.execute("BEGIN IMMEDIATE")  # it has to wait with the first
    futures = [journal.write(PAY, (0,)) for _ in range(1200)]
    work.database.execute("ROLLBACK")
    for future in futures:
        future.result(10)
    journal.close()
    assert folder.picture(0)["paid"] == 1200
    assert 3 <= said.count("COMMIT") <= 8 and said.count("BEGIN IMMEDIATE") == said.count("COMMIT")


GROW = "UPDATE pictures SET facts = printf('%.*c', 900000, 'x') WHERE number = ?"
NO_ROOM = "PRAGMA max_page_count = 1"  # sqlite takes the pages that there are


def test_a_full_disk_is_told_to_each_and_takes_nothing_by_halves(folder: Folder, work: AtWork) -> None:
    work.journal.write(NO_ROOM, ()).result(10)
    work.database.execute("BEGIN IMMEDIATE")  # so that the three come together
    futures = [work.journal.write(*entry) for entry in ((PAY, (0,)), (PAY, (0,)), (GROW, (1,)), (PAY, (2,)))]
    work.database.execute("ROLLBACK")
    ends = [future.exception(10) for future in futures]
    assert all(isinstance(end, Failure) and end.code == "disk" for end in ends[1:])
    assert [picture["paid"] for picture in folder.pictures()] == [int(ends[0] is None), 0, 0]
    work.journal.write(PAY, (1,)).result(10)  # it goes on
    assert folder.picture(1)["paid"] == 1
    assert not (folder.path / RESERVE).exists()


def test_on_a_full_disk_there_is_room_for_the_answers_that_are_out(
    folder: Folder, work: AtWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = Reserve.release

    def release(reserve: Reserve) -> bool:
        work.journal._database.execute("PRAGMA max_page_count = 100000")
        return given(reserve)

    monkeypatch.setattr(Reserve, "release", release)
    assert (folder.path / RESERVE).stat().st_size >= 1_000_000
    work.journal.write(NO_ROOM, ()).result(10)
    work.journal.write(GROW, (1,)).result(10)
    assert len(folder.picture(1)["facts"]) == 900_000 and not (folder.path / RESERVE).exists()


def test_only_a_full_disk_takes_the_room_that_is_kept(folder: Folder, work: AtWork) -> None:
    with pytest.raises(Failure):
        work.journal.write(WRONG, (1,)).result(10)
    assert (folder.path / RESERVE).exists()


def test_a_database_that_cannot_be_opened_for_writing_is_told(
    folder: Folder, work: AtWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another program's lock, for longer than anybody waits."""
    work.journal._database.execute("PRAGMA busy_timeout = 1")
    work.database.execute("BEGIN IMMEDIATE")
    with pytest.raises(Failure, match="locked") as caught:
        work.journal.write(PAY, (0,)).result(10)
    assert caught.value.code == "disk"
    work.database.execute("ROLLBACK")
    work.journal.write(PAY, (0,)).result(10)
    assert folder.picture(0)["paid"] == 1


@pytest.mark.parametrize(("error", "code"), [(RuntimeError(), "internal_error"), (FULL, "disk")])
def test_nobody_waits_for_ever(work: AtWork, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str) -> None:
    def breaks(*_: Any) -> Any:
        raise error

    monkeypatch.setattr(work.journal, "_commit", breaks)
    end = work.journal.write(PAY, (0,)).exception(10)
    assert isinstance(end, Failure) and end.code == code


def test_a_journal_that_is_closed_has_written_all_and_leaves_one_file(folder: Folder) -> None:
    folder.plan("a")
    journal = Journal(folder.path)
    (writer,) = (thread for thread in threading.enumerate() if thread.name == "journal")
    assert writer.daemon  # a run that breaks ends all the same
    futures = [journal.write(PAY, (0,)) for _ in range(700)]
    journal.close()
    assert all(future.done() and future.exception() is None for future in futures)
    assert not writer.is_alive()
    assert sorted(path.name for path in folder.path.iterdir()) == [".gitignore", DATABASE]
    assert folder.picture(0)["paid"] == 700


def test_a_database_is_whole_in_its_own_file_while_somebody_still_reads_it(folder: Folder) -> None:
    """Whoever copies the folder then copies what has been paid for."""
    folder.plan("a")
    with folder.database() as reader:
        journal = Journal(folder.path)
        journal.write(PAY, (0,)).result(10)
        assert reader.execute("SELECT paid FROM pictures").fetchall()[0][0] == 1
        journal.close()
        assert (folder.path / f"{DATABASE}-wal").stat().st_size == 0


# The row of a picture -------------------------------------------------------------------------------------------------


def row_of(work: AtWork, number: int = 0) -> tuple[Job, JournalRow]:
    job = work.job(number)
    return job, JournalRow(job, work.journal)


def made(row: JournalRow, link: str = LINK) -> None:
    row.evidence.generated(Generated(image_url=link), (), 1.0)


@pytest.mark.smoke
def test_an_attempt_is_on_disk_with_its_price_before_it_leaves(folder: Folder, work: AtWork) -> None:
    folder.put(0, state="failed", paid=3, facts={"attempts": [EARLIER], "error": {"code": "x"}})
    job, row = row_of(work)
    row.begin()
    held = folder.picture(0)
    facts = json.loads(held["facts"])
    assert (held["state"], held["paid"], job.state, job.paid, job.tries) == ("submitting", 4, "submitting", 4, 1)
    assert facts["attempts"][0] == EARLIER and list(facts["attempts"][1]) == ["at"] and "error" not in facts
    assert row.evidence.status == "submitting" and not row.evidence.path.exists()


def test_an_earlier_refusal_is_not_told_of_a_try_that_is_out(folder: Folder, work: AtWork) -> None:
    _, row = row_of(work)
    row.begin()
    row.ended(Fault.of("rate_limited", "busy"))
    row.settled(Left.AGAIN, Fault.of("rate_limited", "busy"))
    assert json.loads(folder.picture(0)["facts"])["error"]["code"] == "rate_limited"
    row.begin()
    assert "error" not in json.loads(folder.picture(0)["facts"])


def test_the_first_try_of_a_run_is_when_a_picture_was_begun(work: AtWork, monkeypatch: pytest.MonkeyPatch) -> None:
    job, row = row_of(work)
    for hour in (1, 2, 3):
        monkeypatch.setattr(room, "utc_now", lambda hour=hour: NOW.replace(hour=hour))
        row.begin()
        row.ended(Fault.of("rate_limited", "busy"))
        assert (job.tries, job.paid) == (hour, 0)
        assert row.evidence.data["started_at"] == timestamp(NOW.replace(hour=1))
    assert len(row.evidence.data["attempts"]) == 3


def test_an_attempt_that_is_not_on_disk_is_none(folder: Folder, work: AtWork, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.put(0, facts={"attempts": [EARLIER]}, paid=1)
    job, row = row_of(work)
    unwritable(work, monkeypatch)
    with pytest.raises(Failure, match="full"):
        row.begin()
    assert job.paid == 1 and row.evidence.data["attempts"] == [EARLIER]
    assert folder.picture(0)["state"] == "pending"


def unwritable(work: AtWork, monkeypatch: pytest.MonkeyPatch, failure: Failure = FULL) -> None:
    """From now on the database takes nothing."""

    def write(statement: str, values: Any) -> Future[None]:
        future: Future[None] = Future()
        future.set_exception(failure)
        return future

    monkeypatch.setattr(work.journal, "write", write)


@pytest.mark.parametrize(("billed", "paid"), [("no", 0), ("unknown", 1), ("yes", 1)])
def test_only_what_surely_was_not_billed_does_not_count(work: AtWork, billed: str, paid: int) -> None:
    job, row = row_of(work)
    row.begin()
    row.ended(Fault.of("blocked", "x", billed=billed, http_status=400))
    (attempt,) = row.evidence.data["attempts"]
    assert job.paid == paid
    assert (attempt["billed"], attempt["outcome"], attempt["http_status"]) == (billed, "blocked", 400)


def test_a_link_is_on_disk_as_soon_as_it_is_known(folder: Folder, work: AtWork) -> None:
    _, row = row_of(work)
    row.begin()
    row.evidence.generated(Generated(image_url=LINK, rewritten_prompt="一只狐狸"), (), 1.0)
    row.keep()
    held = folder.picture(0)
    assert (held["state"], json.loads(held["facts"])["response"]["image_url"]) == ("generated", LINK)
    assert "一只狐狸" in held["facts"]  # for whoever looks into it
    assert row.behind is None and row.leads_back and not row.evidence.path.exists()


def saved(row: JournalRow, path: Path) -> None:
    made(row)
    row.evidence.saved({"path": str(path), "sha256": "0", "bytes": 1, "format": "PNG", "width": 1, "height": 1}, 1, 1)
    row.keep()


def test_a_saved_picture_is_on_record_where_it_lies(folder: Folder, work: AtWork) -> None:
    job, row = row_of(work)
    row.begin()
    saved(row, folder.path / "a" / "Second.png")  # its own name was taken
    held = folder.picture(0)
    assert [held[name] for name in ("state", "paid", "output", "output_key")] == [
        "saved",
        1,
        "a/Second.png",
        "a/second.png",
    ]
    assert job.plan.output == folder.path / "a" / "Second.png"
    assert json.loads(row.evidence.path.read_bytes())["status"] == "saved"
    assert folder.picture(1)["output"] == "images/000001-b.png"


def test_a_name_that_two_pictures_have_keeps_neither_from_being_saved(folder: Folder, work: AtWork) -> None:
    """The second name of one may be the one that another row wants and has not got yet."""
    _, row = row_of(work)
    row.begin()
    saved(row, folder.path / "images" / "000001-B.png")
    assert row.behind is None
    assert [folder.picture(number)["output"] for number in (0, 1)] == ["images/000001-B.png", "images/000001-b.png"]
    _, other = row_of(work, 1)
    other.begin()
    assert (folder.picture(1)["state"], folder.picture(1)["output_key"]) == ("submitting", "images/000001-b.png")


SETTLED = [  # what is left, the state of the row, whether an evidence file tells of it
    (Left.REFUSED, "failed", True),
    (Left.OPEN, "submitted", True),
    (Left.PAID, "generated", True),
    (Left.SPENT, "failed", True),
    (Left.UNKNOWN, "unknown", True),
    (Left.AGAIN, "pending", False),
]


@pytest.mark.parametrize(("left", "state", "is_told"), SETTLED, ids=lambda value: getattr(value, "value", None))
def test_what_a_failure_leaves_is_on_disk(folder: Folder, work: AtWork, left: Left, state: str, is_told: bool) -> None:
    job, row = row_of(work)
    row.begin()
    row.settled(left, Fault.of("blocked", "no such thing"))
    held = folder.picture(0)
    assert (held["state"], job.state, json.loads(held["facts"])["error"]["code"]) == (state, state, "blocked")
    assert row.evidence.path.exists() == is_told
    if is_told:
        assert json.loads(row.evidence.path.read_bytes())["error"]["message"] == "no such thing"


@pytest.mark.parametrize("state", ["failed", "unknown"])
def test_a_try_that_was_not_billed_takes_back_nothing_that_is_known(folder: Folder, work: AtWork, state: str) -> None:
    facts = {"error": {"code": "blocked"}, "started_at": "2026-01-01T00:00:00.000Z", "task_id": "t"}
    folder.put(0, state=state, paid=1, facts=facts | {"attempts": [EARLIER]})
    job, row = row_of(work)
    row.begin()
    row.ended(Fault.of("rate_limited", "busy"))
    row.settled(Left.AGAIN, Fault.of("rate_limited", "busy"))
    held = folder.picture(0)
    now = json.loads(held["facts"])
    assert (held["state"], held["paid"], job.state) == (state, 1, state)
    assert {name: now[name] for name in facts} == facts
    assert now["attempts"][0] == EARLIER
    assert [attempt["outcome"] for attempt in now["attempts"][1:]] == ["rate_limited"]


def test_tries_are_forgotten_where_they_cost_nothing(work: AtWork) -> None:
    """A row that is sent again needs no evidence of each refusal."""
    assert row_of(work)[1].forgets_tries


# What the database cannot take ----------------------------------------------------------------------------------------


def test_what_the_database_cannot_take_is_told_and_kept_beside_it(
    folder: Folder, work: AtWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    job, row = row_of(work)
    row.begin()
    with monkeypatch.context() as broken:
        unwritable(work, broken, FULL.but(image_url="of another"))
        made(row)
        row.keep()
    assert row.behind is not None and not row.leads_back
    fault = row.behind.fault
    assert (fault.code, fault.message, fault.billed, fault.image_url) == ("disk", "full", "yes", LINK)
    assert json.loads(row.evidence.path.read_bytes())["response"]["image_url"] == LINK
    assert folder.picture(0)["state"] == "submitting" and job.state == "generated"
    row.catch_up()
    assert row.behind is None and row.leads_back
    assert folder.picture(0)["state"] == "generated"


@pytest.mark.parametrize("name", ["t-1", "t\n2", "t" * 300])
def test_a_task_that_the_database_cannot_take_is_named(
    work: AtWork, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    _, row = row_of(work)
    row.begin()
    unwritable(work, monkeypatch)
    row.evidence.submitted(Submitted(name))
    row.keep()
    assert row.behind is not None
    assert row.behind.message == f"full; the service works on task {name}".replace("\n", " ")
    assert (row.behind.fault.billed, row.behind.fault.image_url) == ("unknown", None)


@pytest.mark.parametrize("attempts", [[EARLIER], []], ids=["tried", "a stranger's"])
def test_a_task_that_leads_nowhere_and_cost_nothing_is_made_anew(
    folder: Folder, work: AtWork, monkeypatch: pytest.MonkeyPatch, attempts: list[Any]
) -> None:
    folder.put(0, state="submitted", paid=1, facts={"task_id": "t", "attempts": attempts})
    job, row = row_of(work)
    row.evidence.data["billable"] = False
    dropped: list[bool] = []
    monkeypatch.setattr(row.evidence, "drop_held", lambda: dropped.append(True))
    row.forgotten(Fault.of("outcome_unknown", "the service does not know it"))
    assert (job.state, folder.picture(0)["state"], dropped) == ("pending", "pending", [True])
    assert folder.picture(0)["paid"] == (0 if attempts else 1)
    tried = json.loads(folder.picture(0)["facts"]).get("attempts", [])
    assert [attempt["outcome"] for attempt in tried] == ["outcome_unknown"] * len(attempts)


def test_what_leads_nowhere_is_held_where_that_cannot_be_written(
    folder: Folder, work: AtWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder.put(0, state="submitted", paid=1, facts={"task_id": "t", "attempts": [EARLIER]})
    _, row = row_of(work)
    monkeypatch.setattr(row.evidence, "drop_held", lambda: pytest.fail("it is all that there is"))
    unwritable(work, monkeypatch)
    row.forgotten(Fault.of("outcome_unknown", "the service does not know it"))
    assert row.behind is not None


class Late:
    """A record that its disk takes at the n-th try."""

    def __init__(self, tries: int) -> None:
        self.tries = tries
        self.behind: Failure | None = FULL if tries else None

    def catch_up(self) -> None:
        self.tries -= 1
        self.behind = self.behind if self.tries else None


def test_a_disk_that_failed_is_given_time_and_only_what_it_lacks_is_written(monkeypatch: pytest.MonkeyPatch) -> None:
    late, never, heard, sound = Late(2), Late(99), Late(99), Late(0)
    backlog = Backlog()
    for number, record in enumerate((late, never, heard, sound)):
        backlog.heard(number, record)  # type: ignore[arg-type]
    backlog.heard(2, None)
    clock = [100.0]
    slept = SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda seconds: clock.append(clock.pop() + seconds))
    monkeypatch.setattr(room, "time", slept)
    backlog.catch_up(1.0)
    assert late.tries == 0 and sound.tries == 0 and heard.tries == 99
    assert never.tries == 99 - round(1.0 / TICK) and clock[0] == pytest.approx(101.0)
    backlog.heard(1, sound)  # type: ignore[arg-type]
    backlog.catch_up(1.0)
    assert clock[0] == pytest.approx(101.0)  # there is nothing to wait for
    backlog.heard(1, never)  # type: ignore[arg-type]
    backlog.catch_up(1000.0)
    assert clock[0] == pytest.approx(106.0)  # a run is not held for longer


# The row of a run -----------------------------------------------------------------------------------------------------


def runs(work: AtWork) -> list[dict[str, Any]]:
    return [dict(row) for row in work.database.execute("SELECT * FROM runs ORDER BY number")]


def wait_for(journal: Journal) -> None:
    """Until all is on disk that it was told so far."""
    journal.write("SELECT 1", ()).result(10)


def begun(work: AtWork, monkeypatch: pytest.MonkeyPatch, moment: dt.datetime = NOW) -> RunRow:
    monkeypatch.setattr(room, "utc_now", lambda: moment)
    return RunRow(work.database, work.journal)


@pytest.mark.smoke
def test_a_run_is_on_record_from_its_start_to_its_end(work: AtWork, monkeypatch: pytest.MonkeyPatch) -> None:
    first = begun(work, monkeypatch)
    start, end = timestamp(NOW), timestamp(NOW.replace(hour=13))
    running = {"number": 1, "started_at": start, "finished_at": None, "exit_code": None, "latency_s": None}
    assert runs(work) == [running | {"updated_at": start, "progress": "{}"}]
    monkeypatch.setattr(room, "utc_now", lambda: NOW.replace(hour=13))
    first.keep({"saved": 2})
    wait_for(work.journal)
    assert runs(work) == [running | {"updated_at": end, "progress": '{"saved": 2}'}]
    second = begun(work, monkeypatch, NOW.replace(hour=14))
    second.keep({"saved": 3})
    first.close(7, 1.5)
    wait_for(work.journal)
    ended, other = runs(work)
    after = timestamp(NOW.replace(hour=14))
    assert ended == running | {
        "updated_at": after,
        "finished_at": after,
        "exit_code": 7,
        "latency_s": 1.5,
        "progress": '{"saved": 2}',
    }
    assert (other["number"], other["progress"], other["finished_at"]) == (2, '{"saved": 3}', None)


def test_a_run_knows_how_long_pictures_took_in_the_last_one_that_knew(
    work: AtWork, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert begun(work, monkeypatch).latency_before is None
    for latency, known in ((3.5, 3.5), (2.5, 2.5), (None, 2.5), (4.5, 4.5)):
        begun(work, monkeypatch).close(0, latency)
        wait_for(work.journal)
        assert begun(work, monkeypatch).latency_before == known


@pytest.mark.parametrize(
    ("rpm", "age", "least", "most"),
    [
        (120.0, 0.0, 0.5, 0.525),  # the minute of the earlier run counts at the service too
        (120.0, 0.2, 0.3, 0.325),
        (60.0, 0.9, 0.1, 0.15),
        (120.0, 0.6, 0.0, 0.0),
        (120.0, -3600.0, 0.5, 0.525),  # the clock was set back
        (0.01, 0.0, 60.0, 60.0),  # never more than a minute
        (0.0, 0.0, 0.0, 0.0),
    ],
)
def test_the_first_call_keeps_its_distance_from_the_last_run(
    work: AtWork, monkeypatch: pytest.MonkeyPatch, rpm: float, age: float, least: float, most: float
) -> None:
    first = begun(work, monkeypatch)
    monkeypatch.setattr(time, "monotonic", lambda: 1000.0)
    assert first.first_start(rpm) == 1000.0
    second = begun(work, monkeypatch)
    monkeypatch.setattr(room, "utc_now", lambda: NOW + dt.timedelta(seconds=age))
    assert least <= round(second.first_start(rpm) - 1000.0, 9) <= most


def test_a_run_row_counts_the_runs_of_the_folder(work: AtWork, monkeypatch: pytest.MonkeyPatch) -> None:
    work.database.execute("INSERT INTO runs (number, started_at, updated_at) VALUES (5, 'x', 'x')")
    begun(work, monkeypatch)
    assert [run["number"] for run in runs(work)] == [5, 6]


def test_a_place_that_the_folder_does_not_know_has_no_jobs(folder: Folder, work: AtWork) -> None:
    """A run must not take another place's: that one's key would go elsewhere."""
    folder.at("zimageturbo")
    jobs = Jobs(work.database, folder.path, [folder.place])
    assert jobs.to_send(("pending", "failed", "unknown"), (-1, -1)) == jobs.submitted() == []
