"""The paid step in this process: what is on disk before and after each call, and what every answer makes of it.

The call itself is scripted. What it does to a network is held by the tests that run the program.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from closed import assert_closed
from conftest import TEST_KEY
from fault_server import png
from zimage import make as room
from zimage import waiting
from zimage.calls import Generated, HttpAnswer, LocalCall, Submitted
from zimage.console import Console
from zimage.contract import SKILL
from zimage.errors import Failure, Fault
from zimage.evidence import Evidence, EvidenceFile, utc_now
from zimage.keys import Key
from zimage.make import generate, make, save, send, settling
from zimage.options import read_options
from zimage.picture import Picture
from zimage.plan import Plan, make_plan
from zimage.provider import Provider
from zimage.task import Task
from zimage.trust import Home
from zimage.waiting import Stop, Stopped

PNG = png(512, 512)
MADE = Generated(content=PNG, request_id="r", http_status=200)
BUSY = Failure("rate_limited", "busy", http_status=429)
Play: TypeAlias = Callable[..., list[dict[str, Any]]]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "BACKOFF_BASE", 0.01)


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "DASHSCOPE_API_KEY": TEST_KEY, "OUTPUT_DIR": str(tmp_path / "out")}


def planned(env: dict[str, str], *more: str) -> Plan:
    words = ["--prompt", "a fox", "--size", "512x512", *more]
    return make_plan(read_options(words, env), Stop(60), env)


@pytest.fixture
def plan(env: dict[str, str]) -> Plan:
    return planned(env)


@pytest.fixture
def record(plan: Plan) -> Iterator[EvidenceFile]:
    record = EvidenceFile(Evidence(plan.evidence_path, plan.evidence(utc_now())))
    yield record
    if record.evidence.path.exists():
        assert_closed("evidence", on_disk(record))


def on_disk(record: EvidenceFile) -> dict[str, Any]:
    content = json.loads(record.evidence.path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


@pytest.fixture
def play(record: EvidenceFile, monkeypatch: pytest.MonkeyPatch) -> Play:
    """Have the calls end so, one after the other; gives what was on disk when each of them left."""

    def play(*ends: Generated | Submitted | BaseException) -> list[dict[str, Any]]:
        left: list[dict[str, Any]] = []

        def sent(plan: Plan, key: Key, stop: Stop) -> Generated | Submitted:
            left.append(on_disk(record))
            end = ends[len(left) - 1]
            if isinstance(end, BaseException):
                raise end
            return end

        monkeypatch.setattr(room, "send", sent)
        return left

    return play


def made_of(plan: Plan, record: EvidenceFile, retries: int = 3, console: Console | None = None) -> Any:
    return make(plan, Key(TEST_KEY, "x"), record, Stop(60), retries, console)


@pytest.mark.smoke
def test_every_attempt_is_on_disk_before_it_leaves(
    plan: Plan, record: EvidenceFile, play: Play, capsys: pytest.CaptureFixture[str]
) -> None:
    left = play(BUSY, MADE)
    image = made_of(plan, record, console=Console(json_mode=False))
    first, second = left
    assert first["status"] == second["status"] == "submitting"
    assert [list(attempt) for attempt in first["attempts"]] == [["at"]]
    earlier, last = second["attempts"]
    assert (earlier["outcome"], earlier["billed"], earlier["http_status"]) == ("rate_limited", "no", 429)
    assert 0 < earlier["wait_s"] < 1 and list(last) == ["at"]
    assert capsys.readouterr().err == f"evidence: {plan.evidence_path}\n"  # once
    assert Path(image["path"]).read_bytes() == PNG
    end = on_disk(record)
    assert (end["status"], end["image"]) == ("saved", image)
    assert [attempt["billed"] for attempt in end["attempts"]] == ["no", "yes"]
    assert end["attempts"][1]["http_status"] == 200
    assert 0 <= end["timings_ms"]["download"] <= end["timings_ms"]["total"] < 60_000
    assert 0 <= end["timings_ms"]["generate"] <= end["timings_ms"]["total"]
    assert not record.evidence.held.exists()


@pytest.mark.parametrize("retries", [1, 2])
def test_retries_end_and_are_counted(plan: Plan, record: EvidenceFile, play: Play, retries: int) -> None:
    left = play(*[BUSY] * 9)
    with pytest.raises(Failure) as caught:
        made_of(plan, record, retries=retries)
    assert len(left) == retries + 1 and caught.value.message == f"busy (tried {retries + 1} times)"
    assert [attempt["outcome"] for attempt in record.evidence.data["attempts"]] == ["rate_limited"] * (retries + 1)


def test_what_is_tried_once_is_not_counted(plan: Plan, record: EvidenceFile, play: Play) -> None:
    play(Failure("blocked", "no such thing"))
    with pytest.raises(Failure) as caught:
        made_of(plan, record)
    assert caught.value.message == "no such thing"


def test_a_retry_is_on_disk_while_it_is_waited_for(
    plan: Plan, record: EvidenceFile, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(BUSY.but(retry_after_s=0.0123), MADE)
    seen: list[Any] = []
    monkeypatch.setattr(Stop, "wait", lambda stop, seconds: seen.append((seconds, on_disk(record)["attempts"])))
    made_of(plan, record)
    ((seconds, attempts),) = seen
    assert seconds == 0.0123 and (attempts[0]["billed"], attempts[0]["wait_s"]) == ("no", 0.012)


@pytest.mark.parametrize(
    ("request_left", "ended"), [(False, {"outcome": "interrupted", "billed": "no"}), (True, {})], ids=["not out", "out"]
)
def test_a_signal_is_held_against_the_moment_when_the_request_left(
    plan: Plan, record: EvidenceFile, play: Play, request_left: bool, ended: dict[str, str]
) -> None:
    play(Stopped("SIGINT", request_left=request_left))
    with pytest.raises(Stopped):
        made_of(plan, record)
    (attempt,) = record.evidence.data["attempts"]
    assert {name: value for name, value in attempt.items() if name != "at"} == ended
    assert record.evidence.have.billed == ended.get("billed", "unknown")


def test_what_a_refusal_teaches_is_asked_for_once_more_and_told_once(
    env: dict[str, str], record: EvidenceFile, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that says what it does not take is asked without it: nothing was billed."""
    learnt: list[str] = []

    def learns(provider: Provider, failure: Failure) -> bool:
        learnt.append(failure.code)
        return failure.code == "rejected_by_service"

    kind, asked = type(planned(env).provider), record.evidence.data["payload"]
    monkeypatch.setattr(kind, "learns_from", learns)
    monkeypatch.setattr(kind, "payload", lambda provider, request: {"tries": len(learnt)})
    monkeypatch.setattr(kind, "notes", lambda provider, request: ("as before", *["it is plainer"] * len(learnt)))
    left = play(Failure("rejected_by_service", "no such field", http_status=400), MADE)
    made_of(planned(env), record)
    assert [content["payload"] for content in left] == [asked, {"tries": 1}]
    assert [attempt["billed"] for attempt in on_disk(record)["attempts"]] == ["no", "yes"]
    assert on_disk(record)["warnings"] == ["as before", "it is plainer"]


def test_a_refusal_that_teaches_nothing_is_the_end(
    env: dict[str, str], record: EvidenceFile, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    left = play(Failure("blocked", "no such thing"), MADE)
    plan = planned(env)
    monkeypatch.setattr(type(plan.provider), "payload", lambda provider, request: {"is": "another"})
    with pytest.raises(Failure, match="no such thing"):
        made_of(plan, record)
    assert len(left) == 1


def test_the_key_goes_along_to_the_server_that_the_picture_was_asked_of(
    plan: Plan, record: EvidenceFile, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    homes: list[Home] = []
    monkeypatch.setattr(room, "save", lambda record, provider, output, stop, home, **how: homes.append(home))
    play(MADE)
    made_of(plan, record)
    assert [home.key for home in homes] == [TEST_KEY]


def test_a_lost_answer_is_no_task_where_the_call_had_no_name(plan: Plan, record: EvidenceFile, play: Play) -> None:
    play(Failure("outcome_unknown", "no answer"), MADE)
    with pytest.raises(Failure, match="no answer"):
        made_of(plan, record)
    assert not record.evidence.have.task and record.evidence.data["attempts"][0]["outcome"] == "outcome_unknown"


def test_work_in_this_process_has_no_status_of_http(plan: Plan, record: EvidenceFile, play: Play) -> None:
    play(MADE._replace(http_status=None))
    made_of(plan, record)
    assert "http_status" not in record.evidence.data["attempts"][0]


# Tasks ----------------------------------------------------------------------------------------------------------------


def test_a_task_is_on_disk_before_it_is_waited_for(
    plan: Plan, record: EvidenceFile, play: Play, monkeypatch: pytest.MonkeyPatch
) -> None:
    play(Submitted("t", "of the task"))
    seen: list[Any] = []

    def waited(task: Task, stop: Stop) -> Generated:
        seen.extend([task.id, on_disk(record), stop.left_s])
        return MADE

    monkeypatch.setattr(Task, "wait_for", waited)
    image = made_of(plan, record)
    name, content, left_s = seen
    assert (name, content["status"], content["task_id"]) == ("t", "submitted", "t")
    assert content["attempts"][0]["outcome"] == "submitted" and left_s < 59  # time is kept for the download
    assert on_disk(record)["image"] == image and on_disk(record)["attempts"][0]["billed"] == "yes"


@pytest.mark.parametrize(
    ("code", "outcome"), [("task_failed", "task_failed"), ("blocked", "blocked"), ("key_rejected", "submitted")]
)
def test_only_the_end_of_a_task_ends_its_attempt(
    plan: Plan, record: EvidenceFile, play: Play, monkeypatch: pytest.MonkeyPatch, code: str, outcome: str
) -> None:
    left = play(Submitted("t"))

    def waited(task: Task, stop: Stop) -> Generated:
        raise Failure(code, "x")

    monkeypatch.setattr(Task, "wait_for", waited)
    with pytest.raises(Failure):
        made_of(plan, record)
    assert record.evidence.data["attempts"][0]["outcome"] == outcome and len(left) == 1


# Saving ---------------------------------------------------------------------------------------------------------------


class Behind(EvidenceFile):
    """A record whose disk takes nothing."""

    def keep(self) -> None:
        self.behind = Failure("disk", "full")


def came(record: EvidenceFile) -> EvidenceFile:
    record.begin()
    record.evidence.generated(MADE, (), 1.0)
    return record


def saved(record: EvidenceFile, plan: Plan, **how: Any) -> Any:
    return save(record, plan.provider, plan.output, Stop(60), Home(), **how)


def test_bytes_that_were_handed_over_stay_until_the_saved_picture_is_on_record(plan: Plan) -> None:
    record = Behind(Evidence(plan.evidence_path, plan.evidence(utc_now())))
    saved(came(record), plan)
    assert record.evidence.held.read_bytes() == PNG and plan.output.read_bytes() == PNG


def test_what_else_is_done_with_a_picture_is_done_before_it_is_on_record(plan: Plan, record: EvidenceFile) -> None:
    seen: list[Any] = []

    def also(picture: Picture) -> None:
        seen.append((picture.sha256, record.evidence.status, plan.output.exists()))

    saved(came(record), plan, also=also)
    assert seen == [(hashlib.sha256(PNG).hexdigest(), "generated", True)]
    assert on_disk(record)["status"] == "saved"


def test_only_where_a_task_can_be_asked_after_is_a_new_link_asked_for(
    plan: Plan, record: EvidenceFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    def asked(*given: Any) -> Picture:
        raise Failure("link_expired", given[4])

    monkeypatch.setattr(room, "fetch_anew", asked)
    with pytest.raises(Failure, match="the task"):
        saved(came(record), plan, task="the task")
    assert saved(record, plan)["path"] == str(plan.output)


@pytest.mark.parametrize(
    ("how", "content", "path"),
    [
        ({}, b"other", "second"),
        ({}, PNG, "second"),  # another's, even where it is the same
        ({"again": True}, b"other", "second"),
        ({"again": True}, PNG, "own"),
        ({"overwrite": True}, b"other", "own"),
    ],
)
def test_a_name_that_is_taken(
    plan: Plan, record: EvidenceFile, how: dict[str, bool], content: bytes, path: str
) -> None:
    plan.output.parent.mkdir(parents=True)
    plan.output.write_bytes(content)
    image = saved(came(record), plan, **how)
    if path == "own":
        assert image["path"] == str(plan.output) and "warnings" not in image
        assert plan.output.read_bytes() == PNG
    else:
        assert image["path"] != str(plan.output) and Path(image["path"]).read_bytes() == PNG
        assert image["warnings"] == [f"{plan.output} is taken by another file; the picture is saved as {image['path']}"]
        assert plan.output.read_bytes() == content


def test_the_facts_of_a_picture(plan: Plan, record: EvidenceFile) -> None:
    image = saved(came(record), plan)
    facts = {"path": str(plan.output), "sha256": hashlib.sha256(PNG).hexdigest(), "bytes": len(PNG)}
    assert image == facts | {"format": "PNG", "width": 512, "height": 512}


def test_the_facts_of_a_picture_that_was_converted(env: dict[str, str], tmp_path: Path) -> None:
    plan = planned(env, "--output", str(tmp_path / "fox.jpg"))
    record = came(EvidenceFile(Evidence(plan.evidence_path, plan.evidence(utc_now()))))
    image = saved(record, plan)
    content = (tmp_path / "fox.jpg").read_bytes()
    assert (image["sha256"], image["bytes"]) == (hashlib.sha256(content).hexdigest(), len(content))
    assert (image["format"], image["source_format"]) == ("JPEG", "PNG")
    assert image["source_sha256"] == hashlib.sha256(PNG).hexdigest()


def test_a_picture_of_another_size_is_told(plan: Plan, record: EvidenceFile) -> None:
    record.begin()
    record.evidence.generated(Generated(content=png(640, 512)), (), 1.0)
    image = saved(record, plan)
    assert (image["width"], image["height"]) == (640, 512)
    (warning,) = image["warnings"]
    assert "640" in warning and "512" in warning


# The end --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "code", "exit_code"),
    [(Failure("disk", "x"), "disk", 9), (ValueError(), "internal_error", 7), (Stopped("SIGTERM"), "interrupted", 143)],
)
@pytest.mark.parametrize("how", [{}, {"saved": True}], ids=["not saved", "saved"])
def test_whatever_ends_the_work_is_on_record_and_leads_back(
    record: EvidenceFile, error: BaseException, code: str, exit_code: int, how: dict[str, bool]
) -> None:
    came(record).keep()
    before = on_disk(record)
    with (
        pytest.raises(Failure) as caught,
        settling(record, flags=["--overwrite"], place=["--region", "singapore"], **how),
    ):
        raise error
    fault = caught.value.fault
    assert (fault.code, fault.exit_code, fault.billed) == (code, exit_code, "yes")
    assert fault.evidence_path == str(record.evidence.path) and caught.value.__cause__ is None
    assert fault.next_command is not None
    assert fault.next_command.endswith(" --region singapore --overwrite --print-response")
    assert on_disk(record) == before if how else on_disk(record)["error"] == fault.as_json()


class Asked:
    """A provider that answers in this process."""

    links_to_itself = True
    links_elsewhere = False
    max_answer_bytes = 1000

    def __init__(self, made: Generated | Submitted) -> None:
        self.made = made
        self.given: tuple[Any, ...] = ()

    def submit(self, *given: Any) -> LocalCall:
        self.given = given
        return LocalCall(lambda until: self.made)


@pytest.mark.parametrize(
    ("link", "links_to_itself", "whole"),
    [
        ("/a.png", True, "https://dashscope.aliyuncs.com/a.png"),
        ("/a.png", False, "/a.png"),
        ("https://x.example/a.png", True, "https://x.example/a.png"),
        ("", True, ""),
    ],
)
def test_a_link_without_a_host_is_of_the_server_that_links_to_itself(
    plan: Plan, link: str, links_to_itself: bool, whole: str
) -> None:
    provider = Asked(Generated(image_url=link))
    provider.links_to_itself = links_to_itself
    made = send(plan._replace(provider=provider, workspace="ws"), Key(TEST_KEY, "x"), Stop(60))  # type: ignore[arg-type]
    assert isinstance(made, Generated) and made.image_url == whole
    assert provider.given == (plan.payload, plan.endpoint, TEST_KEY, "ws")


def test_the_status_of_an_answer_is_kept_and_its_links_are_taken_as_the_provider_says(
    plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"output": {"choices": [{"message": {"content": [{"image": "https://x.aliyuncs.com/a.png"}]}}]}}
    answer = HttpAnswer(202, {"content-type": "application/json"}, json.dumps(body).encode())
    rules: dict[str, Any] = {}

    def ask(call: Any, read: Any, *given: Any, **how: Any) -> Any:
        rules.update(how)
        return read(answer)

    monkeypatch.setattr(room, "ask", ask)
    monkeypatch.setattr(type(plan.provider), "links_elsewhere", "as it says")
    made = send(plan, Key(TEST_KEY, "x"), Stop(60))
    assert isinstance(made, Generated) and rules == {"links_elsewhere": "as it says"}
    assert (made.image_url, made.http_status) == ("https://x.aliyuncs.com/a.png", 202)


def test_a_task_is_handed_on_as_it_came(plan: Plan) -> None:
    provider = Asked(Submitted("/t"))
    assert send(plan._replace(provider=provider), Key("", ""), Stop(60)) == Submitted("/t")  # type: ignore[arg-type]


# What is checked before -----------------------------------------------------------------------------------------------


def generated(env: dict[str, str], plan: Plan, *more: str, retries: str = "0") -> dict[str, Any]:
    options = read_options(["--prompt", "a fox", "--max-retries", retries, *more], env)
    return generate(plan, options, Stop(60), Console(json_mode=False), env)


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Key]:
    """The keys of the calls, each of which makes a picture."""
    keys: list[Key] = []

    def send(plan: Plan, key: Key, stop: Stop) -> Generated:
        keys.append(key)
        return MADE

    monkeypatch.setattr(room, "send", send)
    return keys


def test_a_taken_name_is_found_before_anything_is_paid(env: dict[str, str], plan: Plan, sent: list[Key]) -> None:
    plan.output.parent.mkdir(parents=True)
    plan.output.write_bytes(b"mine")
    with pytest.raises(Failure) as caught:
        generated(env, plan)
    assert caught.value.code == "output_exists" and not sent and plan.output.read_bytes() == b"mine"
    response = generated(env, plan._replace(overwrite=True))
    assert response["image_path"] == str(plan.output) and plan.output.read_bytes() == PNG


@pytest.mark.parametrize(
    "check", ["check_space", "check_writable", "wired_adapter", "get_ready", "get_to_know", "key_for"]
)
def test_every_check_comes_before_the_call(
    env: dict[str, str], plan: Plan, sent: list[Key], monkeypatch: pytest.MonkeyPatch, check: str
) -> None:
    def fails(*_: Any) -> None:
        raise Failure("disk", check)

    monkeypatch.setattr(room, check, fails)
    with pytest.raises(Failure, match=f"^{check}$"):
        generated(env, plan)
    assert not sent and not plan.evidence_path.exists()


def test_any_time_is_enough_that_the_call_may_take(
    env: dict[str, str], plan: Plan, sent: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[float] = []

    def room_after(stop: Stop, seconds: float) -> bool:
        asked.append(seconds)
        return True

    monkeypatch.setattr(Stop, "room_for_attempt_after", room_after)
    generated(env, plan)
    assert asked == [0] and len(sent) == 1


def test_nothing_is_paid_where_too_little_time_is_left_for_it(env: dict[str, str], plan: Plan, sent: list[Key]) -> None:
    slept = Stop(60)
    slept.start -= 50
    with pytest.raises(Failure) as caught:
        generate(plan, read_options(["--prompt", "a fox"], env), slept, Console(json_mode=False), env)
    assert (caught.value.code, caught.value.fault.billed) == ("too_slow", "no")
    assert not sent and not plan.evidence_path.exists()


@pytest.mark.parametrize("in_process", [False, True])
def test_what_works_in_this_process_is_loaded_before_and_in_time_and_all_else_is_only_looked_at(
    plan: Plan, monkeypatch: pytest.MonkeyPatch, in_process: bool
) -> None:
    done: list[str] = []
    for name in ("preflight", "prepare"):
        monkeypatch.setattr(type(plan.provider), name, lambda _, name=name: done.append(name))
    monkeypatch.setattr(type(plan.provider), "in_process", in_process)
    room.get_ready(plan.provider, Stop(60))
    assert done == ["prepare" if in_process else "preflight"]  # which looks for itself, while its time is measured


def test_both_folders_are_looked_at(
    env: dict[str, str], tmp_path: Path, sent: list[Key], monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[Path] = []
    monkeypatch.setattr(room, "check_space", looked.append)
    monkeypatch.setattr(room, "check_writable", lambda folder, _: looked.append(folder))
    plan = planned(env, "--output", str(tmp_path / "elsewhere" / "fox.png"))
    generated(env, plan)
    assert looked == [plan.evidence_path.parent, tmp_path / "elsewhere"]


def test_what_killed_runs_have_left_is_removed(env: dict[str, str], plan: Plan, sent: list[Key]) -> None:
    name = "20260101T000000Z-00000000"
    left = [
        plan.evidence_path.parent / f".{name}.json.999999999.part",
        plan.output.parent / f".{SKILL}-{name}.999999999.part",
    ]
    others = [plan.output.parent / ".mine.999999999.part"]
    for path in [*left, *others]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    generated(env, plan)
    assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_a_warning_of_the_key_is_told_and_kept(
    env: dict[str, str],
    plan: Plan,
    sent: list[Key],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    key = Key("", "", "it is withheld")
    monkeypatch.setattr(room, "key_for", lambda *_: key)
    response = generated(env, plan._replace(warnings=("first",)))
    assert sent == [key] and response["warnings"] == ["first", "it is withheld"]
    assert capsys.readouterr().err.startswith("warning: first\nwarning: it is withheld\nevidence: ")


def test_a_failure_names_the_way_back_to_where_it_was_asked_for(
    env: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = planned(env, "--output", str(tmp_path / "fox.png"), "--overwrite")
    monkeypatch.setattr(room, "send", lambda *_: MADE)

    def full(*_: Any, **__: Any) -> None:
        raise Failure("disk_after_paying", "full")

    monkeypatch.setattr(room, "place", full)
    with pytest.raises(Failure) as caught:
        generated(env, plan)
    fault: Fault = caught.value.fault
    assert fault.billed == "yes" and fault.next_command is not None
    assert fault.next_command.endswith(f"--recover {plan.evidence_path} --overwrite --print-response")
    assert Evidence.load("--recover", str(plan.evidence_path), Stop(60)).status == "generated"
