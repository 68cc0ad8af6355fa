"""Faults that an audit of the providers found: what a paid answer may look like, and what must not cost again.

One table of providers and the rules that hold for all of them are in `test_providers.py`; here is what broke.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import sqlite3
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, urlsplit

import pytest

from batch_helpers import SMALL_PNG
from conftest import Result, Shell
from fault_server import PICTURE, Answer, FaultServer, Received, drawn, html, json_answer, noise_png, png
from provider_cases import DASHSCOPE, OPENAI, ZIMAGETURBO, Lab, assert_keys_at, envelope
from test_providers import (
    ONCE,
    SILENT,
    Elsewhere,
    ProviderBatch,
    advised,
    assert_error,
    assert_saved,
    needs_kill,
    own_address,
)
from zimage.errors import Failure
from zimage.keys import NO_KEY
from zimage.trust import telling_of_withheld

Course = Callable[[str, Received], Answer]
UNKNOWN_TASK = json_answer({"code": 404, "message": "task not found", "data": None}, 404)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def zt(shell: Shell, server: FaultServer) -> Iterator[Lab]:
    lab = Lab(ZIMAGETURBO, shell, server)
    yield lab
    lab.assert_keys_kept()


@pytest.fixture
def oa(shell: Shell, server: FaultServer) -> Iterator[Lab]:
    lab = Lab(OPENAI, shell, server)
    yield lab
    lab.assert_keys_kept()


@pytest.fixture
def batch(zt: Lab) -> ProviderBatch:
    return ProviderBatch(ZIMAGETURBO, zt.shell, zt)


@pytest.fixture
def elsewhere() -> Iterator[FaultServer]:
    """This machine under another address than loopback: over http no key goes there."""
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address beyond loopback")
    with Elsewhere(address) as server:
        yield server
    assert_keys_at(server, None)


def makes_together(lab: Lab, *names: str, options: tuple[str, ...] = ()) -> dict[str, Result]:
    """A command for each name, which is its prompt and file name, all at once: they share the waits."""
    started = {name: lab.start("--prompt", name, "--output", f"{name}.png", *options) for name in names}
    return {name: lab.finish(process) for name, process in started.items()}


def by_prompt(lab: Lab, table: Mapping[str, Course]) -> None:
    """What is told of a task, by its prompt."""
    lab.book.course = lambda book, task, request: table[book.tasks[task]](task, request)


def assert_made(lab: Lab, results: Mapping[str, Result]) -> None:
    for name, result in results.items():
        assert result.code == 0, (name, result.stdout)
        assert (lab.shell.folder / f"{name}.png").read_bytes() == png(), name


def evidence_of(result: Result) -> dict[str, Any]:
    data = json.loads(Path(result.error["evidence_path"]).read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def submitted_evidence(zt: Lab) -> Path:
    """That of a task which was not done in time."""
    zt.book.play(lambda task, request: zt.book.working(task))
    assert_error(zt.make("--timeout", "1"), 7, "unknown", code="paid_not_downloaded")
    assert zt.status() == "submitted"
    (path,) = zt.shell.evidence_files()
    zt.book.course = None
    return path


def with_files_up_to(lab: Lab, size: int, *arguments: str) -> Result:
    """The command on a disk that takes no file larger than `size` bytes."""
    resource = pytest.importorskip("resource")
    done = subprocess.run(
        lab.shell.command(*arguments),
        cwd=lab.shell.folder,
        env=lab.shell.environment() | {"PYTHONDONTWRITEBYTECODE": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=60,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size, size)),
    )
    return lab.noted(Result(done.returncode, done.stdout.decode(), done.stderr.decode()))


# ---------------------------------------------------------------------------------------------------------------------
# zimageturbo: what is told of a task
# ---------------------------------------------------------------------------------------------------------------------


def test_an_answer_that_says_nothing_of_the_task_does_not_end_it(zt: Lab) -> None:
    codes = {"number": 200, "null": None, "minus": -1, "text": "200"}

    def course(name: str) -> Course:
        return lambda task, request: zt.book.done(task, request) if zt.book.asked[task] > 1 else nothing(name)

    def nothing(name: str) -> Answer:
        return envelope(None, codes[name])

    by_prompt(zt, {name: course(name) for name in codes})
    assert_made(zt, makes_together(zt, *codes))
    assert len(zt.paid) == len(codes)


def test_a_task_of_which_nothing_is_ever_said_is_left_open(zt: Lab) -> None:
    zt.book.play(lambda task, request: envelope(None))
    error = assert_error(zt.make("--timeout", "3"), 7, "unknown", code="paid_not_downloaded")
    assert zt.status() == "submitted"
    zt.book.course = None
    assert_saved(zt, advised(zt, error), png())
    assert len(zt.paid) == 1


def test_a_link_in_any_form_is_taken_and_what_is_none_is_passed_over(zt: Lab) -> None:
    link = zt.server.root + PICTURE
    forms: dict[str, object] = {"string": link, "object": [{"url": link}], "second": ["file:///etc/passwd", link]}

    def course(name: str) -> Course:
        return lambda task, request: zt.book.done(task, request, response=forms[name])

    def explains(task: str, request: Received) -> Answer:
        return zt.book.done(task, request, response=[], error_message="the GPU was unplugged")

    by_prompt(zt, {name: course(name) for name in forms} | {"none": explains})
    results = makes_together(zt, *forms, "none")
    error = assert_error(results.pop("none"), 8, "unknown", code="no_image")
    assert "the GPU was unplugged" in error["message"]
    assert_made(zt, results)


def names_tasks(zt: Lab, ids: Mapping[str, object]) -> None:
    """Tasks are named as given, by prompt; all are done."""
    names = {str(name): prompt for prompt, name in ids.items()}

    def submit(request: Received) -> Answer:
        return envelope({"task_id": ids[json.loads(request.body)["prompt"]]}, bills=True)

    def status(request: Received) -> Answer:
        task = parse_qs(urlsplit(request.target).query, keep_blank_values=True).get("task_id", [""])[0]
        done = {"task_id": task, "status": "SUCCESS", "response": [request.root + PICTURE]}
        return envelope(done) if task in names else UNKNOWN_TASK

    zt.answers(submit)
    zt.server.play(ZIMAGETURBO.free_path, status)


def test_whatever_a_service_calls_its_task_is_asked_after_by_that_name(zt: Lab) -> None:
    ids: dict[str, object] = {"number": 12345, "letters": "任务-ß", "blanks": "a b&c=d#e", "long": "x" * 300}
    names_tasks(zt, ids)
    assert_made(zt, makes_together(zt, *ids))
    targets = {f"/api/status?task_id={quote(str(name), safe='')}" for name in ids.values()}
    assert {question.target for question in zt.questions} == targets


def test_a_name_that_cannot_be_kept_is_an_answer_that_cannot_be_used(zt: Lab) -> None:
    """None of them, and above all not the key in one, is written down or asked after."""
    ids: dict[str, object] = {
        "empty": "",
        "huge": "x" * 3000,
        "float": 1.5,
        "surrogate": "\ud800",
        "key": f"task-{ZIMAGETURBO.key}",
    }
    names_tasks(zt, ids)
    for name, result in makes_together(zt, *ids).items():
        assert_error(result, 8, "unknown", code="answer_unusable")
        assert evidence_of(result)["status"] == "unknown", name
    assert (len(zt.paid), zt.questions) == (len(ids), [])


def test_a_question_that_is_told_to_wait_too_long_says_how_long(zt: Lab) -> None:
    busy = json_answer({"code": 429, "message": "slow down", "data": None}, 429, headers=(("Retry-After", "60"),))
    zt.book.play(lambda task, request: busy)
    error = assert_error(zt.make("--timeout", "4"), 7, "unknown", code="paid_not_downloaded")
    assert error["retry_after_s"] == pytest.approx(60, abs=2)
    assert zt.status() == "submitted"
    assert len(zt.questions) == 1


def test_a_question_that_is_never_answered_leaves_time_for_the_next(zt: Lab) -> None:
    zt.book.play(lambda task, request: SILENT, zt.book.done)
    start = time.monotonic()
    assert_saved(zt, zt.make("--timeout", "12"), png())
    assert time.monotonic() - start < 11
    assert len(zt.paid) == 1


@pytest.mark.parametrize(
    ("dead", "code"),
    [(html(403, "Request has expired."), "link_expired"), (html(404), "link_refused")],
    ids=["expired", "gone"],
)
def test_of_a_dead_link_the_service_names_a_new_one_free(zt: Lab, dead: Answer, code: str) -> None:
    zt.server.play(PICTURE, dead)
    assert_error(zt.make(), 8, "yes", code=code)
    questions = len(zt.questions)
    key = zt.shell.env.pop("ZIMAGETURBO_API_KEY")
    assert_error(zt.recover(), 8, "yes", code=code)
    assert len(zt.questions) == questions
    zt.shell.env["ZIMAGETURBO_API_KEY"] = key
    zt.book.play(lambda task, request: zt.book.done(task, request, response=[f"{zt.server.root}/img/new.png"]))
    assert assert_saved(zt, zt.recover(), png())["image_url"].endswith("/img/new.png")
    assert (len(zt.paid), len(zt.questions)) == (1, questions + 1)


# ---------------------------------------------------------------------------------------------------------------------
# Recovery of a task
# ---------------------------------------------------------------------------------------------------------------------


def test_edited_evidence_of_a_task_is_refused_and_nobody_is_asked(zt: Lab) -> None:
    path = submitted_evidence(zt)
    data = zt.shell.evidence()
    connections = zt.server.connections
    edits: list[tuple[dict[str, str], str]] = [
        ({"task_id": "\ud800"}, "invalid_evidence"),
        ({"task_id": ""}, "invalid_evidence"),
        ({"provider": "openai"}, "invalid_evidence"),  # which has no tasks
        ({"provider": "dashscope"}, "host_not_trusted"),  # whose endpoint is another
    ]
    for edit, code in edits:
        path.write_text(json.dumps(data | edit))
        error = zt.recover().error
        assert (error["exit_code"], error["code"]) == (2, code), edit
        assert zt.server.connections == connections, edit


@pytest.mark.parametrize(("key", "code"), [(None, "key_missing"), ("a b", "key_malformed")])
def test_without_a_good_key_a_task_is_recovered_later(zt: Lab, key: str | None, code: str) -> None:
    path = submitted_evidence(zt)
    before = path.read_bytes()
    good = zt.shell.env.pop("ZIMAGETURBO_API_KEY")
    if key is not None:
        zt.shell.env["ZIMAGETURBO_API_KEY"] = key
    connections = zt.server.connections
    error = assert_error(zt.recover(), 3, "unknown", code=code)
    assert (zt.server.connections, path.read_bytes()) == (connections, before)
    zt.shell.env["ZIMAGETURBO_API_KEY"] = good
    if code == "key_missing":  # the second would wait once more for the same
        assert_saved(zt, advised(zt, error), png())
    else:
        assert str(path) in error["next_command"]
    assert len(zt.paid) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Batches of tasks
# ---------------------------------------------------------------------------------------------------------------------


def loses_tasks(zt: Lab, batch: ProviderBatch, *prompts: str) -> tuple[dict[str, str], set[str]]:
    """A batch whose tasks the service does not know; returns them by prompt, and the set of those that it knows."""
    known: set[str] = set()
    zt.book.course = lambda book, task, request: book.done(task, request) if task in known else UNKNOWN_TASK
    batch.rows(*prompts)
    assert batch.run().code == 1
    assert batch.states() == dict.fromkeys(prompts, "unknown")
    return {prompt: task for task, prompt in zt.book.tasks.items()}, known


def test_a_task_that_was_lost_is_asked_after_before_it_is_paid_for_again(zt: Lab, batch: ProviderBatch) -> None:
    tasks, known = loses_tasks(zt, batch, "found", "gone", "recovered")
    known |= {tasks["found"], tasks["recovered"], "task_0003"}
    (path,) = (path for path in batch.out.glob("evidence/*/*.json") if '"recovered"' in path.read_text())
    recovered = zt.noted(batch.single("--recover", str(path), "--print-response"))
    assert recovered.code == 0, recovered.stdout
    asked = zt.book.asked.copy()
    result = batch.run("--retry-unknown")
    assert result.code == 0, result.stdout
    assert batch.states() == dict.fromkeys(tasks, "saved")
    assert Counter(zt.prompts) == {"found": 1, "gone": 2, "recovered": 1}
    assert zt.book.asked - asked == Counter({tasks["found"]: 1, tasks["gone"]: 1, "task_0003": 1})
    assert batch.picture("found")["estimated_cost"] == pytest.approx(0.02)
    assert result.json["this_run"]["estimated_cost"] == pytest.approx(0.02)
    assert {prompt: data["task_id"] for prompt, data in batch.evidence().items()} == tasks | {"gone": "task_0003"}


def test_a_lost_task_that_is_known_again_is_saved_by_the_same_command(zt: Lab, batch: ProviderBatch) -> None:
    tasks, known = loses_tasks(zt, batch, "gone", *"abc")
    known |= {tasks[prompt] for prompt in "abc"}
    result = batch.run()
    assert (result.code, result.json["error"]["code"]) == (1, "incomplete"), result.stdout
    assert batch.states() == dict.fromkeys("abc", "saved") | {"gone": "unknown"}
    assert len(zt.paid) == 4


def test_tasks_that_are_worked_on_are_counted(zt: Lab, batch: ProviderBatch) -> None:
    zt.book.play(lambda task, request: zt.book.working(task))
    batch.prompts(3)
    summary = batch.run("--timeout", "1").json
    for counted in (summary, batch.status()):
        assert (counted["submitted"], counted["total"], counted["unknown"]) == (3, 3, 0)


# ---------------------------------------------------------------------------------------------------------------------
# openai: bytes in the answer
# ---------------------------------------------------------------------------------------------------------------------


def test_base64_in_the_other_alphabet_and_without_padding_is_taken(oa: Lab) -> None:
    contents = [drawn("JPEG", 512 + 16 * n, 512) for n in range(20)]
    codes = {content: base64.urlsafe_b64encode(content).decode() for content in contents}
    content = next(c for c, code in codes.items() if code.endswith("=") and "-" in code and "_" in code)
    oa.answers(json_answer({"data": [{"b64_json": codes[content].rstrip("=")}]}))
    assert_saved(oa, oa.make("--output", "out.jpg"), content)


def test_beside_broken_bytes_the_link_is_taken(oa: Lab) -> None:
    oa.answers(json_answer({"data": [{"b64_json": "iVBOR!!", "url": oa.server.root + PICTURE}]}))
    assert assert_saved(oa, oa.make(), png())["image_url"] == oa.server.root + PICTURE


def test_of_several_pictures_as_bytes_the_others_are_not_dropped_silently(oa: Lab) -> None:
    codes = [base64.b64encode(png(colour=colour)).decode() for colour in ("red", "teal", "blue")]
    oa.answers(json_answer({"data": [{"b64_json": code} for code in codes]}))
    (warning,) = assert_saved(oa, oa.make(), png(colour="red"))["warnings"]
    assert "3 pictures" in warning


@needs_kill
def test_a_picture_that_no_disk_takes_is_said_to_be_lost(oa: Lab) -> None:
    """No file may grow beyond the evidence of the request: neither the bytes nor the last word of the evidence."""
    sizes: list[int] = []

    def answer(request: Received) -> Answer:
        sizes.extend(path.stat().st_size for path in oa.shell.evidence_files())
        return oa.good(request)

    oa.answers(answer)
    assert_saved(oa, oa.make("--seed", "1"))
    (path,) = oa.shell.evidence_files()
    path.unlink()
    (limit,) = sizes
    result = with_files_up_to(oa, limit, *oa.request, "--seed", "1", "--output", "two.png")
    error = assert_error(result, 9, "yes", code="disk_after_paying")
    assert "lost" in error["hint"]
    assert "next_command" not in error
    assert len(oa.paid) == 2


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def test_a_replay_knows_the_settings_of_its_evidence_without_the_providers_name(oa: Lab) -> None:
    assert_saved(oa, oa.make("--steps", "9"))
    (path,) = oa.shell.evidence_files()
    for number, more in enumerate(((), ("--steps", "4"))):
        result = oa.call("--replay", str(path), "--output", f"{number}.png", "--print-response", *more)
        assert result.code == 0, result.stdout
    assert [payload["num_inference_steps"] for payload in oa.payloads] == [9, 9, 4]


def test_what_is_wrong_and_what_the_provider_cannot_do_are_told_at_once(zt: Lab) -> None:
    error = assert_error(zt.make("--size", "100x100", "--seed", "3", "--prompt-extend"), 2, "no")
    assert [problem.partition(":")[0] for problem in error["problems"]] == ["size", "seed", "prompt_extend"]
    assert (zt.server.connections, zt.shell.files()) == (0, [])


@pytest.mark.parametrize("body", [{"error": {"message": "no"}}, {"code": 401}, {"data": 5}], ids=json.dumps)
def test_a_check_that_is_answered_with_no_list_of_models_is_not_good(oa: Lab, body: object) -> None:
    oa.server.play(OPENAI.free_path, json_answer(body))
    assert assert_error(oa.call("--check", "--provider", "openai", *ONCE), 8, "no")["code"] != ""


def test_a_refusal_without_the_key_that_was_kept_back_says_so() -> None:
    key = NO_KEY._replace(warning="THE_KEY is not sent there")
    for code, told in (("key_rejected", True), ("balance", False)):
        with pytest.raises(Failure) as caught, telling_of_withheld(key):
            raise Failure(code, "no")
        assert (caught.value.fault.hint == key.warning) == told
    with pytest.raises(Failure) as caught, telling_of_withheld(NO_KEY):
        raise Failure("key_rejected", "no")
    assert "THE_KEY" not in caught.value.fault.hint


def test_a_key_that_is_kept_back_is_told_wherever_it_may_matter(oa: Lab, elsewhere: FaultServer) -> None:
    there = ("--provider", "openai", "--base-url", elsewhere.root)
    elsewhere.play(OPENAI.paid_path, oa.good, OPENAI.refusal("key"))
    made = oa.call("--prompt", "a fox", "--output", "out.png", "--print-response", *there)
    assert any("OPENAI_API_KEY" in warning for warning in assert_saved(oa, made, png())["warnings"])
    refused = oa.call("--prompt", "a fox", "--output", "b.png", "--print-response", *there)
    assert "OPENAI_API_KEY" in assert_error(refused, 3, "no", code="key_rejected")["hint"]
    elsewhere.play(OPENAI.free_path, json_answer(OPENAI.listed()), OPENAI.refusal("key"))
    (warning,) = oa.call("--check", *there).json["warnings"]
    assert "OPENAI_API_KEY" in warning
    assert "OPENAI_API_KEY" in assert_error(oa.call("--check", *there, *ONCE), 3, "no")["hint"]


def test_help_names_the_key_of_the_provider_that_is_named(shell: Shell) -> None:
    text = shell.run("--provider", "zimageturbo", "--help").stdout
    assert "ZIMAGETURBO_API_KEY" in text
    assert "DASHSCOPE_API_KEY" not in text


def test_each_provider_has_its_own_longest_prompt(zt: Lab) -> None:
    def planned(provider: str, length: int) -> Result:
        return zt.call("--provider", provider, "--prompt", "x" * length, "--dry-run")

    def told(provider: str, length: int) -> list[str]:
        return [text for text in planned(provider, length).json["warnings"] if text.startswith("prompt")]

    zt.shell.env[DASHSCOPE.url_variable] = zt.server.root + DASHSCOPE.root
    assert told("zimageturbo", 900) == []
    assert "1001" in assert_error(planned("zimageturbo", 1001), 2, "no")["message"]
    (warning,) = told("dashscope", 900)
    assert "900" in warning


# ---------------------------------------------------------------------------------------------------------------------
# Found beside the audit
# ---------------------------------------------------------------------------------------------------------------------


def test_a_batch_does_not_wait_longer_than_told_for_a_task(zt: Lab, batch: ProviderBatch) -> None:
    """Whatever wait the service asks for."""
    busy = json_answer({"code": 429, "message": "slow down", "data": None}, 429, headers=(("Retry-After", "12"),))
    zt.book.play(lambda task, request: busy)
    batch.rows("a")
    start = time.monotonic()
    assert batch.run("--timeout", "3").code == 1
    assert time.monotonic() - start < 9
    assert batch.stored_states() == {"a": "submitted"}


@pytest.mark.smoke
@pytest.mark.parametrize(
    "picture",
    [{"b64_json": "="}, {"b64_json": "=", "url": None}, {"url": "data:image/png;base64,"}, {"url": "data:,"}],
    ids=json.dumps,
)
def test_bytes_that_are_none_are_an_answer_that_cannot_be_used(oa: Lab, picture: dict[str, str | None]) -> None:
    oa.answers(json_answer({"data": [picture]}))
    error = oa.make().error
    assert (error["exit_code"], error["billed"] != "no", error.get("image_url")) == (8, True, None), error


def test_a_file_that_is_nested_without_end_is_no_evidence(shell: Shell) -> None:
    (shell.folder / "deep.json").write_text("[" * 200_000)
    assert_error(shell.run("--replay", "deep.json", "--print-response"), 2, "no", code="invalid_evidence")


def test_a_link_with_half_a_character_loses_no_task(zt: Lab) -> None:
    link = zt.server.root + PICTURE
    forms: dict[str, list[str]] = {"first": [link + "?\ud800"], "second": [link, link + "?\ud800"]}
    zt.book.course = lambda book, task, request: book.done(task, request, response=forms[book.tasks[task]])
    for name, result in makes_together(zt, *forms).items():
        if result.code:
            assert result.code == 8, (name, result.stdout)
            assert result.error["billed"] != "no", name


@needs_kill
def test_a_task_whose_name_no_disk_took_is_not_called_recoverable(zt: Lab) -> None:
    sizes: list[int] = []

    def submit(request: Received) -> Answer:
        sizes.extend(path.stat().st_size for path in zt.shell.evidence_files())
        return zt.book.submit(request)

    zt.answers(submit)
    submitted_evidence(zt).unlink()
    zt.book.play(lambda task, request: zt.book.working(task))
    error = with_files_up_to(zt, sizes[0], *zt.request, "--timeout", "3").error
    assert (error["exit_code"], error["billed"]) == (7, "unknown")
    assert "task_0001" in error["message"]
    zt.book.course = None
    if "next_command" in error:
        assert advised(zt, error).code == 0, error
    else:
        assert "next_command" not in error["hint"]


def test_a_batch_does_not_pay_again_for_a_dead_link_that_its_task_replaces(zt: Lab, batch: ProviderBatch) -> None:
    zt.server.play(PICTURE, html(403, "Request has expired."))
    batch.rows("a")
    batch.run()
    fresh = f"{zt.server.root}/img/new.png"
    zt.book.play(lambda task, request: zt.book.done(task, request, response=[fresh]))
    batch.run("--retry-failed")
    assert (batch.states(), len(zt.paid)) == ({"a": "saved"}, 1)


def test_a_row_with_a_dead_link_that_was_recovered_alone_is_taken_over(zt: Lab, batch: ProviderBatch) -> None:
    zt.server.play(PICTURE, html(403, "Request has expired."))
    batch.rows("a")
    batch.run()
    fresh = f"{zt.server.root}/img/new.png"
    zt.book.play(lambda task, request: zt.book.done(task, request, response=[fresh]))
    (path,) = batch.out.glob("evidence/*/*.json")
    assert batch.single("--recover", str(path), "--print-response").code == 0
    assert batch.run("--retry-failed").code == 0
    assert (batch.states(), len(zt.paid)) == ({"a": "saved"}, 1)


def test_a_submitted_row_that_was_recovered_alone_is_not_lost_with_its_task(zt: Lab, batch: ProviderBatch) -> None:
    zt.book.play(lambda task, request: zt.book.working(task))
    batch.rows("a")
    assert batch.run("--timeout", "1").code == 1
    zt.book.course = None
    (path,) = batch.out.glob("evidence/*/*.json")
    assert batch.single("--recover", str(path), "--print-response").code == 0
    zt.book.course = lambda book, task, request: UNKNOWN_TASK
    batch.run()
    assert json.loads(path.read_text())["status"] == "saved"
    assert batch.states() == {"a": "saved"}


def test_a_dead_link_of_a_task_is_not_said_to_cost_again(zt: Lab) -> None:
    zt.server.play(PICTURE, html(403, "Request has expired."))
    error = assert_error(zt.make(), 8, "yes", code="link_expired")
    assert "can only be made again" not in error["hint"]


def lost_tasks(zt: Lab, batch: ProviderBatch, count: int) -> None:
    """A batch of tasks that are open, noted as if the service had forgotten them."""
    zt.book.play(lambda task, request: zt.book.working(task))
    batch.prompts(count)
    batch.run("--time-limit", "3")
    with contextlib.closing(sqlite3.connect(batch.out / "batch.sqlite3")) as database, database:
        database.execute("UPDATE pictures SET state = 'unknown' WHERE state = 'submitted'")
    assert Counter(batch.stored_states().values()) == {"unknown": count}


def test_a_found_picture_is_not_saved_by_two_at_once(zt: Lab, batch: ProviderBatch) -> None:
    """While the pictures of an earlier run are still handed on to be downloaded."""
    prompts = batch.prompts(20)
    assert batch.run().code == 0
    with contextlib.closing(sqlite3.connect(batch.out / "batch.sqlite3")) as database, database:
        database.execute("UPDATE pictures SET state = CASE WHEN number < 19 THEN 'generated' ELSE 'unknown' END")
    shutil.rmtree(batch.out / "images")
    zt.picture(SMALL_PNG, delay_s=0.5)
    before = len(zt.server.downloads) - len(zt.questions)
    result = batch.run()
    assert result.code == 0, result.stdout
    assert batch.states() == dict.fromkeys(prompts, "saved")
    assert len(zt.server.downloads) - len(zt.questions) == before + 20


def test_interrupted_lost_tasks_are_not_all_asked_after(zt: Lab, batch: ProviderBatch) -> None:
    lost_tasks(zt, batch, 40)
    zt.book.play(lambda task, request: SILENT)
    before = len(zt.questions)
    process = batch.start("--timeout", "4")
    zt.server.wait_until(lambda: len(zt.questions) > before)
    start = time.monotonic()
    process.terminate()
    batch.finish(process)
    assert time.monotonic() - start < 3


def test_many_lost_tasks_that_failed_are_failed(zt: Lab, batch: ProviderBatch) -> None:
    lost_tasks(zt, batch, 12)
    zt.book.play(lambda task, request: zt.book.failed(task, "GPU fell off"))
    result = batch.run()
    assert result.json["error"]["code"] != "internal_error", result.stdout
    batch.run()
    assert set(batch.states().values()) == {"failed"}
    assert len(zt.paid) == 12


def test_lost_tasks_that_stay_lost_do_not_keep_new_rows_from_being_made(zt: Lab, batch: ProviderBatch) -> None:
    lost_tasks(zt, batch, 6)
    lost = set(zt.book.tasks)
    zt.book.course = lambda book, task, request: (
        book.done(task, request, response=[]) if task in lost else book.done(task, request)
    )
    batch.rows(*(f"picture {number}" for number in range(6)), "new")
    for _ in range(2):
        batch.run()
    assert batch.states() == {f"picture {number}": "unknown" for number in range(6)} | {"new": "saved"}


def test_a_batch_is_not_stuck_for_ever_at_a_picture_that_no_disk_took(oa: Lab) -> None:
    batch = ProviderBatch(OPENAI, oa.shell, oa)
    noise = noise_png()
    oa.picture(noise)
    batch.rows({"prompt": "a", "size": "1024*1024"})
    result = with_files_up_to(oa, 512 * 1024, *batch.arguments("--concurrency", "1"))
    assert result.code == 9, result.stdout
    oa.picture(SMALL_PNG)
    batch.run()
    result = batch.run("--retry-failed", "--retry-unknown")
    assert (result.code, batch.states()) == (0, {"a": "saved"}), result.stdout


def test_a_task_is_found_free_whatever_the_most_that_may_be_paid(zt: Lab, batch: ProviderBatch) -> None:
    lost_tasks(zt, batch, 1)
    zt.book.course = None
    batch.run("--retry-unknown", "--max-cost", "0.02")
    assert (batch.states(), len(zt.paid)) == ({"picture 0": "saved"}, 1)


def test_tasks_that_take_long_do_not_end_the_run_as_unknown(zt: Lab, batch: ProviderBatch) -> None:
    zt.book.play(lambda task, request: zt.book.working(task))
    batch.prompts(7)
    error = batch.run("--timeout", "1").json["error"]
    assert error["retryable"], error
