"""One contract, held by every provider: the same tests over all rows of the table in `provider_cases.py`.

Everything runs through the real command lines, against a server that speaks the provider's own protocol. After every
test the keys of all providers, which are all set, are looked for in every file, stream and request.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import hashlib
import io
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from PIL import Image

import generate_image
import zimage.outside
import zimage_mock.faults
from batch_helpers import BATCH, SMALL_PNG, Batch, assert_counts
from conftest import GENERATE as SCRIPT
from conftest import SCRIPTS, Result, Shell
from fault_server import (
    Answer,
    Behaviour,
    FaultServer,
    Received,
    drawn,
    file,
    html,
    json_answer,
    png,
    redirect,
)
from mock_server import MockServer
from mock_server import Request as MockRequest
from provider_cases import (
    CASES,
    COMFYUI,
    DASHSCOPE,
    KEYS,
    LINKED_CASES,
    MODELSCOPE,
    NO_WAIT,
    NOT_NOW,
    OPENAI,
    OPENAI_LINK,
    OTHER_TABLES,
    REFUSALS,
    RETRIED,
    ZIMAGETURBO,
    Case,
    Lab,
    assert_keys_at,
    changed,
    envelope,
)
from zimage.calls import Generated, HttpAnswer
from zimage.contract import ERROR_SCHEMA, EVIDENCE_SCHEMA, RATIO_SIZES, RESPONSE_SCHEMA
from zimage.endpoint import Endpoint
from zimage.errors import Failure
from zimage.evidence import utc_now
from zimage.keys import NO_KEY, find_key
from zimage.picture import size_warning, verified
from zimage.registry import provider_class, provider_named, provider_names
from zimage.request import ImageRequest, normalize
from zimage.task import Task
from zimage.trust import check_trust, key_for, parse_base_url
from zimage.waiting import Stop

over_all = pytest.mark.parametrize("case", CASES, ids=str)
# Tests of whole processes, which ask after tasks as patiently as users do.
in_time = [
    pytest.param(case, marks=[pytest.mark.heavy] if case in (MODELSCOPE, COMFYUI) else [])
    for case in (*CASES, OPENAI_LINK)
]
over_all_in_time = pytest.mark.parametrize("case", in_time[:-1], ids=str)
over_both_forms_in_time = pytest.mark.parametrize("case", in_time, ids=str)
over_all_with_links = pytest.mark.parametrize("case", LINKED_CASES, ids=str)
over_billed = pytest.mark.parametrize("case", [case for case in CASES if case.is_billed], ids=str)
over_both_forms = pytest.mark.parametrize("case", [*CASES, OPENAI_LINK], ids=str)
needs_kill = pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
ONCE = ("--max-retries", "0")
SILENT = Answer(delay_s=60)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        yield server


@pytest.fixture
def lab(case: Case, shell: Shell, server: FaultServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[Lab]:
    """What runs in this process asks some services after tasks sooner than users do."""
    if case in (MODELSCOPE, COMFYUI):
        monkeypatch.setattr(provider_class(case.provider), "poll_pause", lambda self, asked: 0.1)
    lab = Lab(case, shell, server)
    yield lab
    lab.assert_keys_kept()


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
def other() -> Iterator[FaultServer]:
    """A server that no key belongs to."""
    with FaultServer() as other:
        yield other
    assert_keys_at(other, None)


def own_address() -> str | None:
    """This machine's address beyond loopback; nothing is sent to find it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, contextlib.suppress(OSError):
        probe.connect(("192.0.2.1", 9))
        address = str(probe.getsockname()[0])
        return None if address.startswith(("127.", "0.")) else address
    return None


class Elsewhere(FaultServer):
    """A server that can be reached under an address that is not loopback."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self._listener.close()
        self._listener = socket.create_server(("", 0), backlog=64)  # also on loopback, where close() wakes it
        self.port = self._listener.getsockname()[1]
        self.root = f"http://{address}:{self.port}"


@pytest.fixture
def elsewhere() -> Iterator[FaultServer]:
    address = own_address()
    if address is None:
        pytest.skip("this machine has no address beyond loopback")
    with Elsewhere(address) as server:
        yield server
    assert_keys_at(server, None)


def assert_error(result: Result, exit_code: int, billed: str, *, code: str | None = None) -> dict[str, Any]:
    """The run ended with an error of this kind, in the contract's form."""
    error = result.error
    jsonschema.validate(error, ERROR_SCHEMA)
    assert (error["exit_code"], error["billed"]) == (exit_code, billed), error
    assert code is None or error["code"] == code, error
    return error


def assert_saved(lab: Lab, result: Result, content: bytes | None = None) -> dict[str, Any]:
    """The picture is there and whole, evidence and response agree, and one call was paid for."""
    assert result.code == 0, (result.stdout, result.stderr)
    response = result.json
    jsonschema.validate(response, RESPONSE_SCHEMA)
    evidence = lab.shell.evidence()
    jsonschema.validate(evidence, EVIDENCE_SCHEMA)
    assert evidence["status"] == "saved"
    path = Path(response["image_path"])
    with Image.open(path) as image:
        image.load()
        assert image.size == (response["width"], response["height"])
    assert evidence["image"]["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert content is None or path.read_bytes() == content
    return response


def advised(lab: Lab, error: dict[str, Any]) -> Result:
    """Run an error's next_command as it stands, from anywhere."""
    done = subprocess.run(
        error["next_command"], shell=True, cwd="/", env=lab.shell.environment(), capture_output=True, check=False
    )
    return lab.noted(Result(done.returncode, done.stdout.decode(), done.stderr.decode()))


def assert_recovers_free(lab: Lab, calls: int = 1) -> dict[str, Any]:
    """What was paid for comes, and no more is paid; once more, and nothing is even asked."""
    response = assert_saved(lab, lab.recover(), png())
    assert len(lab.paid) == calls
    requests = len(lab.server.requests)
    assert_saved(lab, lab.recover(), png())
    assert len(lab.server.requests) == requests
    return response


def killed_in(lab: Lab, function: str, body: str = "die()") -> None:
    """Make a picture with a script that dies, as by kill -9, where it would call a function of zimage."""
    module = "evidence" if "." in function else "make"
    wrapper = lab.shell.home / "dying.py"
    lines = [
        "import os, signal, sys",
        f"sys.path.insert(0, {str(SCRIPTS)!r})",
        "import generate_image",
        f"import zimage.{module} as module",
        "def die(): os.kill(os.getpid(), signal.SIGKILL)",
        f"real = module.{function}",
        f"def instead(*arguments, **options):\n    {body}\n    return real(*arguments, **options)",
        f"module.{function} = instead",
        "sys.exit(generate_image.main())",
    ]
    wrapper.write_text("\n".join(lines))
    lab.shell.script = wrapper
    assert lab.make().code == -signal.SIGKILL
    lab.shell.script = SCRIPT


# ---------------------------------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------------------------------


def test_every_provider_has_a_row_or_a_table_of_its_own() -> None:
    assert {case.provider for case in CASES} | OTHER_TABLES >= set(provider_names())
    assert set(provider_names()) >= {case.provider for case in CASES}


@pytest.mark.parametrize("name", sorted(provider_names()))
def test_what_a_provider_says_of_itself_fits_the_contract(name: str) -> None:
    kind = provider_class(name)
    provider = kind()
    assert (kind.name, kind.default_region in kind.roots) == (name, True)
    assert not any(provider.owns(host) for host in ("example.com", "localhost", "127.0.0.1", ""))
    request = ImageRequest("x", "1024*1024", 5 if kind.takes_seed else None)
    assert provider.cannot(request) == []
    assert (provider.price(request, kind.default_region).counted > 0) == (kind.billable and not kind.costs_quota)
    json.dumps(provider.payload(request))
    for setting in kind.own_settings:
        if setting.default is not None:
            assert setting.read(str(setting.default)) == setting.default, setting.name
    roots = [root for root in kind.roots.values() if root]
    for root in roots:
        assert provider.owns(parse_base_url(root, "root", provider).host)


# ---------------------------------------------------------------------------------------------------------------------
# Success
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@over_both_forms
def test_a_picture_is_made_saved_and_accounted_for(lab: Lab, case: Case) -> None:
    response = assert_saved(lab, lab.make(), png())
    assert response["estimated_cost"] == case.cost
    assert (response["provider"], response["size"], response["prompt"]) == (case.provider, "1024*1024", "a fox")
    assert (response["width"], response["height"]) == (1024, 1024)
    assert ("seed" in response) == case.takes_seed
    assert "warnings" not in response
    link = lab.server.root + case.picture if case.by_link else None
    assert response.get("image_url") == link
    assert len(lab.paid) == 1
    assert lab.payloads == [case.expected_payload("a fox", response.get("seed"))]
    assert lab.paid[0].header("authorization") == f"Bearer {case.key}"
    asked = len(case.free_paths) * case.key_is_optional + case.by_task  # what the server is, and after the task
    assert [request.header("authorization") for request in lab.questions] == [f"Bearer {case.key}"] * asked
    evidence = lab.shell.evidence()
    assert (evidence["provider"], evidence["endpoint"]) == (case.provider, lab.server.root + case.paid_path)
    assert (evidence["cost"]["estimate"], evidence["billable"]) == (case.cost, case.is_billed)
    assert case.without_name(evidence["payload"]) == lab.payloads[0]
    assert [attempt.get("billed") for attempt in evidence["attempts"]] == ["yes"]
    assert evidence["response"].get("image_url") == link
    name = evidence["payload"]["prompt_id"] if case.names_tasks else case.first_task or None
    assert evidence.get("task_id") == name
    (path,) = lab.shell.evidence_files()
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, ".gitignore"}
    requests = len(lab.server.requests)
    assert_saved(lab, lab.recover(), png())
    assert len(lab.server.requests) == requests


@over_all
def test_a_seed_is_sent_where_there_is_one_and_refused_before_sending_where_there_is_none(lab: Lab, case: Case) -> None:
    result = lab.make("--seed", "77")
    if case.takes_seed:
        assert assert_saved(lab, result)["seed"] == 77
        assert lab.payloads == [case.expected_payload("a fox", 77)]
    else:
        assert "seed" in assert_error(result, 2, "no", code="invalid_request")["message"]
        assert (lab.server.requests, lab.shell.files()) == ([], [])


@over_all
def test_another_size_than_asked_is_saved_with_a_warning(lab: Lab) -> None:
    lab.picture(png(1280, 720))
    (warning,) = assert_saved(lab, lab.make(), png(1280, 720))["warnings"]
    assert "1280*720" in warning
    assert "1024*1024" in warning


@over_all
def test_the_bytes_are_kept_in_their_own_format_and_converted_to_another(lab: Lab) -> None:
    jpeg = drawn("JPEG")
    lab.picture(jpeg)
    assert_saved(lab, lab.make("--output", "kept.jpg"), jpeg)
    assert "source_format" not in lab.shell.evidence()["image"]
    (path,) = lab.shell.evidence_files()
    path.unlink()
    response = assert_saved(lab, lab.make("--output", "made.png"))
    with Image.open(response["image_path"]) as image:
        assert image.format == "PNG"
    image_facts = lab.shell.evidence()["image"]
    assert image_facts["source_format"] == "JPEG"
    assert image_facts["source_sha256"] == hashlib.sha256(jpeg).hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# Refusals and faults of the paid call
# ---------------------------------------------------------------------------------------------------------------------


@over_all
@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_costs_nothing_and_has_its_exit_code(lab: Lab, case: Case, name: str) -> None:
    lab.answers(case.refusal(name, f"said of {case.key}", headers=NOT_NOW if name in RETRIED else ()))
    error = assert_error(lab.make(), REFUSALS[name], "no")
    assert error["retryable"] == (name in RETRIED)
    assert error.get("retry_after_s") == (600 if name in RETRIED else None)
    assert error["http_status"] == case.refused_as[name][0]
    assert "said of ***" in error["message"]
    assert "next_command" not in error
    assert len(lab.paid) == 1
    assert lab.status() == "failed"
    assert not (lab.shell.folder / "out.png").exists()


@over_all
def test_of_a_refused_request_there_is_nothing_to_recover(lab: Lab, case: Case) -> None:
    lab.answers(case.refusal("blocked"))
    lab.make()
    error = assert_error(lab.recover(), 2, "no", code="nothing_to_recover")
    assert "--replay" not in error["hint"]
    assert len(lab.paid) == 1


@over_all
@pytest.mark.parametrize("name", RETRIED)
def test_what_surely_was_not_billed_is_sent_again_on_its_own(lab: Lab, case: Case, name: str) -> None:
    lab.answers(case.refusal(name, headers=NO_WAIT), lab.good)
    assert_saved(lab, lab.make(), png())
    assert len(lab.paid) == 2
    assert lab.payloads[0] == lab.payloads[1]
    assert [attempt["billed"] for attempt in lab.shell.evidence()["attempts"]] == ["no", "yes"]


@over_all
def test_what_fails_for_ever_ends_after_the_retries(lab: Lab, case: Case) -> None:
    lab.answers(case.refusal("busy", headers=NO_WAIT))
    error = assert_error(lab.make("--max-retries", "2"), 6, "no", code="rate_limited")
    assert error["retryable"]
    assert len(lab.paid) == 3


def lost(lab: Lab, name: str) -> Behaviour:
    """A paid call whose answer does not come, or not whole."""
    ways: dict[str, Behaviour] = {
        "502": html(502, headers=NO_WAIT),
        "504": html(504),
        "html-500": html(500, headers=NO_WAIT),
        "unlisted-5xx": html(520),
        "hangup": Answer(hang_up="after-reading", bills=True),
        "cut": changed(lab.good, cut_after=10),
        "empty": Answer(bills=True, framing="close"),
        "redirect": redirect(lab.case.paid_path, 307),
    }
    return ways[name]


@pytest.mark.smoke
@over_billed
@pytest.mark.parametrize("name", ["502", "504", "html-500", "unlisted-5xx", "hangup", "cut", "empty", "redirect"])
def test_an_answer_that_is_lost_is_unknown_and_never_sent_again(lab: Lab, name: str) -> None:
    lab.answers(lost(lab, name))
    error = assert_error(lab.make(), 7, "unknown", code="outcome_unknown")
    assert not error["retryable"]
    assert "--replay" in error["hint"]
    assert "next_command" not in error
    assert len(lab.server.requests) == 1
    assert lab.status() == "unknown"


@over_billed
def test_of_a_lost_answer_a_recovery_knows_no_more_and_asks_nobody(lab: Lab) -> None:
    lab.answers(lost(lab, "hangup"))
    lab.make()
    assert_error(lab.recover(), 7, "unknown", code="outcome_unknown")
    assert len(lab.server.requests) == 1
    assert lab.status() == "unknown"


@over_billed
@pytest.mark.parametrize("status", [502, 504])
def test_a_gateways_status_is_never_sent_again_whatever_its_body_says(lab: Lab, case: Case, status: int) -> None:
    lab.answers(replace(case.refusal("failing", headers=NO_WAIT), status=status))
    assert not lab.make().error["retryable"]
    assert len(lab.paid) == 1


@over_all
def test_a_good_answer_without_a_picture_is_no_success(lab: Lab, case: Case) -> None:
    lab.answers(json_answer(case.empty(), bills=True))
    if case.names_tasks:  # it is looked up, and is nowhere
        error = assert_error(lab.make(*ONCE), 7, "unknown", code="outcome_unknown")
    else:
        error = assert_error(lab.make(), 8, "unknown")
        assert error["code"] in ("no_image", "answer_unusable")
        assert not error["retryable"]
    assert len(lab.paid) == 1
    assert lab.status() == "unknown"
    assert not (lab.shell.folder / "out.png").exists()


@over_both_forms
@pytest.mark.parametrize("name", ["invalid", "busy", "failing", "moved"])
def test_a_picture_beside_an_error_is_taken_and_not_paid_again(lab: Lab, name: str) -> None:
    """Whatever the status and the code beside it say: it was made."""
    case, by_task = lab.case, lab.case.by_task
    status, code = (302, "Moved") if name == "moved" else case.refused_as[name]

    def beside(answer: Answer) -> Answer:
        said = case.said(status, code, "it did not work")
        assert isinstance(said, dict)
        return json_answer(said | json.loads(answer.body) | {"code": said.get("code")}, status, bills=not by_task)

    if by_task:
        lab.book.play(lambda task, request: beside(lab.book.done(task, request)))
    else:
        lab.answers(lambda request: beside(lab.good(request)))
    assert lab.make().code == 0
    assert len(lab.paid) == 1 and lab.status() == "saved"


@over_both_forms
def test_a_broken_picture_is_no_success_and_not_paid_again(lab: Lab) -> None:
    lab.picture(png()[:-200])
    error = assert_error(lab.make(), 8, "yes", code="image_unusable")
    assert not error["retryable"]
    assert len(lab.paid) == 1
    assert lab.status() == "generated"
    assert lab.shell.evidence()["error"]["code"] == "image_unusable"
    assert not (lab.shell.folder / "out.png").exists()
    if not lab.case.by_link:  # the same bytes do not get better, but they were made, and are kept
        assert "next_command" not in error
        (path,) = lab.shell.evidence_files()
        assert path.with_suffix(".picture").read_bytes() == png()[:-200]
        assert str(path.with_suffix(".picture")) in error["hint"]


@over_all
def test_a_service_that_refuses_connections_is_not_reached_and_not_paid(lab: Lab) -> None:
    lab.server.close()
    error = assert_error(lab.make(*ONCE), 6, "no", code="unreachable")
    assert error["retryable"]
    assert lab.status() == "failed"


# ---------------------------------------------------------------------------------------------------------------------
# Paid, and not saved yet
# ---------------------------------------------------------------------------------------------------------------------


@over_all_with_links
def test_a_picture_that_cannot_be_fetched_now_is_fetched_later_free(lab: Lab) -> None:
    lab.server.play(lab.case.picture_path, Answer(status=503, headers=NOT_NOW))
    error = assert_error(lab.make(), 7, "yes", code="paid_not_downloaded")
    assert lab.status() == "generated"
    lab.server.play(lab.case.picture_path, file(png()))
    assert_saved(lab, advised(lab, error), png())
    assert_recovers_free(lab)


@over_both_forms
def test_a_disk_that_fails_after_paying_loses_nothing(lab: Lab) -> None:
    """The folder of the picture becomes a file while the request is out."""
    folder = lab.shell.folder / "pictures"

    def spoil(request: Received) -> Answer:
        shutil.rmtree(folder)
        folder.write_bytes(b"in the way")
        return lab.good(request)

    lab.answers(spoil)
    error = assert_error(lab.make("--output", "pictures/out.png"), 9, "yes", code="disk_after_paying")
    assert lab.status() == "generated"
    folder.unlink()
    assert_saved(lab, advised(lab, error), png())
    assert_recovers_free(lab)
    (path,) = lab.shell.evidence_files()
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, ".gitignore"}


@over_all
def test_a_name_that_was_taken_while_the_request_was_out_is_not_overwritten(lab: Lab) -> None:
    def take(request: Received) -> Answer:
        (lab.shell.folder / "out.png").write_bytes(b"another picture")
        return lab.good(request)

    lab.answers(take)
    response = assert_saved(lab, lab.make(), png())
    assert (lab.shell.folder / "out.png").read_bytes() == b"another picture"
    (path,) = lab.shell.evidence_files()
    assert Path(response["image_path"]).name == f"out-{path.stem}.png"
    assert len(response["warnings"]) == 1


@pytest.mark.smoke
@needs_kill
@over_both_forms_in_time
@pytest.mark.parametrize("moment", ["collect", "Evidence.saved"])
def test_a_kill_after_the_answer_loses_nothing(lab: Lab, moment: str) -> None:
    """Before the picture gets its name, and between that and the last word of the evidence."""
    killed_in(lab, moment)
    assert lab.status() == "generated"
    assert (lab.shell.folder / "out.png").exists() == (moment == "Evidence.saved")
    assert_recovers_free(lab)
    assert [name for name in lab.shell.files() if not name.startswith("output/")] == ["out.png"]
    (path,) = lab.shell.evidence_files()
    assert {entry.name for entry in path.parent.iterdir()} == {path.name, ".gitignore"}


@needs_kill
@over_all_in_time
def test_a_kill_between_the_answer_and_its_note_never_pays_again(lab: Lab, case: Case) -> None:
    """What can be had again, bytes on disk or a task, is had; a link that nobody wrote down is gone, and told so."""
    killed_in(lab, "EvidenceFile.keep", "if arguments[0].evidence.data['status'] == 'generated': die()")
    assert lab.status() == ("submitted" if case.by_task else "submitting")
    if case.by_link and not case.by_task:
        assert_error(lab.recover(), 7, "unknown", code="outcome_unknown")
        assert len(lab.paid) == 1
    else:
        assert_recovers_free(lab)


@needs_kill
@over_all
def test_a_kill_while_the_request_is_out_is_unknown_and_never_paid_again(lab: Lab, case: Case) -> None:
    lab.answers(changed(lab.good, delay_s=60))
    process = lab.start()
    lab.server.wait_until(lambda: lab.paid)
    process.kill()
    lab.finish(process)
    assert lab.status() == "submitting"
    if case.names_tasks:
        assert_recovers_free(lab)
        return
    error = assert_error(lab.recover(), 7, "unknown", code="outcome_unknown")
    assert "--replay" in error["hint"]
    assert len(lab.paid) == 1


@needs_kill
@over_all
def test_a_signal_while_the_request_is_out_ends_the_command_and_says_what_is_known(lab: Lab, case: Case) -> None:
    lab.answers(changed(lab.good, delay_s=60))
    process = lab.start()
    lab.server.wait_until(lambda: lab.paid)
    process.terminate()
    assert_error(lab.finish(process), 143, "unknown", code="interrupted")
    if case.names_tasks:
        assert lab.status() == "submitted"
        assert_recovers_free(lab)
        return
    assert lab.status() == "unknown"
    assert_error(lab.recover(), 7, "unknown", code="outcome_unknown")
    assert len(lab.paid) == 1


# ---------------------------------------------------------------------------------------------------------------------
# Replay, dry run, check
# ---------------------------------------------------------------------------------------------------------------------

SETTINGS = dict.fromkeys(("openai", "sdapi"), ("--steps", "4", "--guidance", "1.5", "--model", "my/model"))


@over_all
def test_a_replay_pays_once_for_the_very_same_request(lab: Lab, case: Case) -> None:
    assert_saved(lab, lab.make("--size", "1280x720", *SETTINGS.get(case.provider, ())))
    (path,) = lab.shell.evidence_files()
    first = lab.shell.evidence()
    url = lab.shell.env.pop(case.url_variable)
    arguments = ("--replay", str(path), "--output", "again.png", "--print-response")
    assert lab.call(*arguments).error["code"] == "host_not_trusted", "a file alone does not say where"
    lab.shell.env[case.url_variable] = url
    result = lab.call(*arguments)
    assert result.code == 0, result.stdout
    before, after = lab.payloads
    assert after == before
    second = json.loads(Path(result.json["evidence_path"]).read_text())
    for field in ("provider", "endpoint", "request", "settings", "cost"):
        assert first.get(field) == second.get(field), field
    assert case.without_name(first["payload"]) == case.without_name(second["payload"])
    assert (lab.shell.folder / "out.png").exists()


@over_all
@pytest.mark.parametrize("region", ["singapore", "nowhere"])
def test_a_replay_takes_the_regions_of_the_provider_that_it_asks(lab: Lab, case: Case, region: str) -> None:
    lab.make()
    (path,) = lab.shell.evidence_files()
    result = lab.call("--replay", str(path), "--region", region, "--dry-run")
    if region in provider_class(case.provider).roots:
        assert result.code == 0 and result.json["region"] == region
    else:
        assert result.code == 2 and result.error["code"] == "usage" and region in result.error["message"]


@over_all
def test_a_dry_run_sends_nothing_writes_nothing_and_needs_no_key(lab: Lab, case: Case) -> None:
    for name in KEYS:
        del lab.shell.env[name]
    plan = lab.make("--dry-run").json
    assert lab.server.connections == 0
    assert lab.shell.files() == []
    assert plan["provider"] == case.provider
    assert plan["endpoint"] == lab.server.root + case.paid_path
    assert plan["estimated_cost"] == case.cost
    assert plan["billable"] == case.is_billed
    assert plan["payload"] == case.unasked_payload("a fox", plan["request"].get("seed"))
    assert [problem["code"] for problem in plan["problems"]] == ([] if case.key_is_optional else ["key_missing"])
    assert plan["ok"] == case.key_is_optional


@over_all
def test_a_missing_key_stops_before_anything_is_sent_unless_it_is_optional(lab: Lab, case: Case) -> None:
    del lab.shell.env[case.key_variable]
    result = lab.make()
    if case.key_is_optional:
        assert_saved(lab, result)
        assert lab.paid[0].header("authorization") is None
    else:
        assert case.key_variable in assert_error(result, 3, "no", code="key_missing")["hint"]
        assert lab.server.connections == 0
        assert lab.shell.files() == []


@over_all
def test_a_check_is_free_questions_with_the_key(lab: Lab, case: Case) -> None:
    lab.server.play(case.free_path, json_answer(case.listed(), 200 if case.lists_models else 404))
    answer = lab.call("--check", "--provider", case.provider).json
    assert (answer["ok"], answer["provider"], answer["model_listed"]) == (True, case.provider, case.lists_models)
    asked = [(request.method, request.path, request.header("authorization")) for request in lab.server.requests]
    assert asked == [("GET", path, f"Bearer {case.key}") for path in case.free_paths]
    assert lab.shell.files() == []


@over_all
@pytest.mark.parametrize(("name", "exit"), [("key", 3), ("balance", 4), ("failing", 6), ("overloaded", 6), ("busy", 6)])
def test_a_check_that_is_refused_says_so_and_is_never_billed(lab: Lab, case: Case, name: str, exit: int) -> None:
    lab.server.play(case.free_path, case.refusal(name))
    assert_error(lab.call("--check", "--provider", case.provider, *ONCE), exit, "no")
    assert len(lab.server.requests) == 1


@over_all
def test_a_check_of_what_is_not_the_service_fails(lab: Lab, case: Case) -> None:
    lab.server.play(case.free_path, html(200))
    assert_error(lab.call("--check", "--provider", case.provider, *ONCE), 8, "no")
    lab.server.play(case.free_path, html(404))
    assert lab.call("--check", "--provider", case.provider, *ONCE).code != 0
    lab.server.close()
    assert_error(lab.call("--check", "--provider", case.provider, *ONCE), 6, "no", code="unreachable")


# ---------------------------------------------------------------------------------------------------------------------
# The key goes to its owner only
# ---------------------------------------------------------------------------------------------------------------------

STRANGERS = [
    "https://example.com",
    "https://example.com{root}",
    "https://example.com{root}{paid}",
    "https://{owner}.example.com{root}",
    "https://not{owner}{root}",
    "https://{owner}.{root}",
    "http://{owner}{root}",
    "https://user@{owner}{root}",
    "https://example.com\\@{owner}{root}",
    "https://{owner}@example.com{root}",
    "https://{owner}:443@example.com{root}",
    "https://{owner}%2eexample.com{root}",
    "https://{owner}{root}?x=1",
    "https://{owner}{root}#x",
    "http://192.0.2.1{root}",
    "https://[::ffff:127.0.0.1]{root}",
    "http://127.0.0.1.example.com{root}",
    "http://localhost.example.com{root}",
]
OWNERS = {
    "dashscope": "dashscope.aliyuncs.com",
    "zimageturbo": "zimageturbo.ai",
    "modelscope": "api-inference.modelscope.cn",
}


def in_process(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], env: dict[str, str], *arguments: str
) -> tuple[Result, list[Any]]:
    """The command in this process, cut off from every network; also what it would have connected to."""
    reached: list[Any] = []

    def unreachable(*arguments: Any, **options: Any) -> Any:
        reached.append(arguments)
        raise OSError("this test has no network")

    handlers = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}
    with monkeypatch.context() as patch:
        for name in os.environ:
            own = ("COMFYUI_", "DASHSCOPE_", "MODELSCOPE_", "OPENAI_", "SDAPI_", "ZIMAGE")
            if name.lower().endswith("_proxy") or name.startswith(own):
                patch.delenv(name)
        for name, value in (KEYS | env).items():
            patch.setenv(name, value)
        patch.setattr(zimage.outside, "_secrets", set())
        patch.setattr(socket.socket, "connect", unreachable)
        patch.setattr(socket, "getaddrinfo", unreachable)
        capsys.readouterr()
        code = generate_image.main(list(arguments))
        result = Result(code, *capsys.readouterr())
    for signum, handler in handlers.items():
        signal.signal(signum, handler)
    assert not any(key in result.stdout + result.stderr for key in KEYS.values())
    return result, reached


@pytest.mark.parametrize("case", [DASHSCOPE, ZIMAGETURBO, MODELSCOPE], ids=str)
@pytest.mark.parametrize("way", ["flag", "environment", "request"])
def test_no_base_url_leads_the_key_to_a_stranger(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: Case, way: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for form in STRANGERS:
        url = form.format(owner=OWNERS[case.provider], root=case.root, paid=case.paid)
        request = json.dumps({"prompt": "x"} | ({"base_url": url} if way == "request" else {}))
        more = ["--base-url", url] if way == "flag" else []
        env = {case.url_variable: url} if way == "environment" else {}
        command = ("--provider", case.provider, "--request", request, "--print-response", *ONCE, *more)
        result, reached = in_process(monkeypatch, capsys, env, *command)
        assert (result.code, result.error["billed"], reached) == (2, "no", []), url
        assert result.error["code"] in ("host_not_trusted", "invalid_base_url"), url
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("case", [DASHSCOPE, ZIMAGETURBO, MODELSCOPE], ids=str)
def test_the_owner_is_asked_over_https(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], case: Case
) -> None:
    """The other half of the test above: its network trap would have caught a call."""
    monkeypatch.chdir(tmp_path)
    owner = OWNERS[case.provider]
    for url in (None, owner, f"https://{owner}", f"https://{owner}{case.root}", f"https://{owner}{case.paid_path}"):
        more = ["--base-url", url] if url else []
        command = ("--provider", case.provider, "--prompt", "x", "--print-response", *ONCE, *more)
        result, reached = in_process(monkeypatch, capsys, {}, *command)
        assert (result.code, result.error["code"]) == (6, "unreachable"), url
        assert [arguments[:2] for arguments in reached] == [(owner, 443)], url


def test_zimageturbo_trusts_one_host_and_none_below_it() -> None:
    provider = provider_named("zimageturbo")
    assert provider.owns("zimageturbo.ai")
    strangers = ("www.zimageturbo.ai", "api.zimageturbo.ai", "zimageturbo.ai.", "zimageturbo.aix", "xzimageturbo.ai")
    assert not any(provider.owns(host) for host in (*strangers, "zimageturbo", "dashscope.aliyuncs.com"))


GPU = "gpu.example.com"
KEY_GOES = [  # endpoint, OPENAI_BASE_URL, --trust-host, whether the key goes
    ("http://127.0.0.1:8000/v1", None, "", True),
    ("http://localhost:8000/v1", None, "", True),
    (f"https://{GPU}/v1", None, "", False),
    (f"https://{GPU}/v1", f"https://{GPU}/v1", "", True),
    (f"https://{GPU}/v1", GPU, "", True),
    (f"https://{GPU}/v1", f"https://{GPU}/v1/images/generations", "", True),
    (f"http://{GPU}/v1", f"http://{GPU}/v1", "", False),
    (f"https://{GPU}/v1", None, GPU, True),
    (f"https://{GPU}/v1", None, f"x.{GPU}", False),
    (f"https://x.{GPU}/v1", None, GPU, False),
    (f"http://{GPU}/v1", None, GPU, False),
    (f"http://{GPU}/v1", f"https://{GPU}/v1", GPU, False),
    (f"https://x.{GPU}/v1", f"https://{GPU}/v1", "", False),
    (f"https://{GPU}.evil.com/v1", f"https://{GPU}/v1", "", False),
    ("https://zimageturbo.ai/v1", None, "", False),
    ("https://dashscope.aliyuncs.com/v1", None, "", False),
    ("https://api.openai.com/v1", None, "", False),
    (f"https://{GPU}/v1", f"https://user@{GPU}/v1", "", False),
    ("http://192.0.2.7:8000/v1", "http://192.0.2.7:8000/v1", "", False),
    ("http://10.0.0.5:8000/v1", None, "10.0.0.5", False),
]


@pytest.mark.parametrize(("url", "named", "trusted", "goes"), KEY_GOES)
def test_an_optional_key_goes_only_where_the_user_sent_it(
    url: str, named: str | None, trusted: str, goes: bool
) -> None:
    provider = provider_named("openai")
    endpoint = parse_base_url(url, "--base-url", provider)
    hosts = frozenset(filter(None, [trusted]))
    check_trust(endpoint, "--base-url", provider, hosts)
    env = KEYS | ({"OPENAI_BASE_URL": named} if named else {})
    key = key_for(provider, endpoint, hosts, env)
    if goes:
        assert (key.value, key.source) == (KEYS["OPENAI_API_KEY"], "environment OPENAI_API_KEY")
    else:
        assert key.value == ""
        assert "OPENAI_API_KEY" in key.warning
        assert endpoint.host in key.warning
        assert (f"--trust-host {endpoint.host}" in key.warning) == url.startswith("https:")


def test_no_key_and_no_warning_where_there_is_no_key() -> None:
    provider = provider_named("openai")
    endpoint = parse_base_url(f"https://{GPU}/v1", "--base-url", provider)
    others = {name: key for name, key in KEYS.items() if name != "OPENAI_API_KEY"}
    assert key_for(provider, endpoint, frozenset(), others) == NO_KEY


@pytest.mark.parametrize("name", sorted(provider_names()))
def test_no_key_of_another_provider_steps_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    provider = provider_named(name)
    places = provider.key_places
    if places is None:
        assert key_for(provider, Endpoint("", "", "127.0.0.1", ""), frozenset(), KEYS) == NO_KEY
        return
    others = {variable: key for variable, key in KEYS.items() if variable != places.variable}
    assert len(others) == len(KEYS) - 1
    with pytest.raises(Failure) as caught:
        find_key(places, others | {"HOME": str(tmp_path)})
    assert caught.value.code == "key_missing"


@over_all
def test_a_base_url_in_a_request_does_not_take_the_key_along(lab: Lab, case: Case, elsewhere: FaultServer) -> None:
    """To this machine's own address, as another machine's: over http no key goes there, or no call."""
    elsewhere.play(case.paid_path, lab.good)
    elsewhere.play("/history/", lab.book.status)  # of whom asks there after tasks
    elsewhere.play(lab.case.picture_path, file(png()))
    request = json.dumps({"prompt": "a fox", "base_url": elsewhere.root + case.root})
    command = ("--provider", case.provider, "--request", request, "--output", "out.png", "--print-response")
    result = lab.call(*command)
    if case.key_is_optional:
        assert any(case.key_variable in warning for warning in re.findall("(?m)^warning: (.*)", result.stderr))
        assert_saved(lab, result, png())
        assert {request.header("authorization") for request in elsewhere.requests} == {None}
        assert len(elsewhere.posts) == 1
    else:
        assert_error(result, 2, "no", code="host_not_trusted")
        assert elsewhere.connections == 0
        assert lab.shell.files() == []
    assert lab.server.connections == 0


@over_all
@pytest.mark.parametrize("mode", ["--replay", "--recover"])
def test_an_edited_evidence_file_does_not_take_the_key_along(
    lab: Lab, case: Case, elsewhere: FaultServer, mode: str
) -> None:
    lab.answers(case.refusal("busy", headers=NOT_NOW))
    lab.make()
    (path,) = lab.shell.evidence_files()
    calls = len(lab.server.requests)
    data = lab.shell.evidence() | {"status": "submitted", "task_id": case.first_task or "task_0000"}
    data["endpoint"] = elsewhere.root + case.paid_path
    data["request"]["base_url"] = elsewhere.root + case.root
    path.write_text(json.dumps(data))
    elsewhere.play(case.paid_path, lab.good)
    result = lab.call(mode, str(path), "--output", "again.png", "--print-response", "--timeout", "5")
    assert result.error["exit_code"] == 2
    assert elsewhere.connections == 0
    assert len(lab.server.requests) == calls
    assert "Traceback" not in result.stderr


@over_all
@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_no_redirect_is_followed_with_the_key(lab: Lab, case: Case, other: FaultServer, status: int) -> None:
    lab.answers(redirect(other.root + case.paid_path, status))
    assert_error(lab.make(), 7, "unknown", code="outcome_unknown")
    lab.server.play(case.free_path, redirect(other.root + case.free_path, status))
    assert lab.call("--check", "--provider", case.provider, *ONCE).code == 8
    assert other.connections == 0


@over_all_with_links
def test_the_download_carries_no_key_wherever_it_leads(lab: Lab, other: FaultServer) -> None:
    lab.server.play(lab.case.picture_path, redirect(other.root + "/img/there.png"))
    assert_saved(lab, lab.make(), png())
    assert [request.path for request in other.requests] == ["/img/there.png"]
    for request in [*other.requests, *(r for r in lab.server.requests if r.path == lab.case.picture_path)]:
        assert request.header("authorization") is None


@over_all
def test_a_key_that_a_service_echoes_is_masked_in_errors(lab: Lab, case: Case) -> None:
    """The keys of other providers too: they stand in the same environment."""
    echo = f"bad {' '.join(KEYS.values())}"
    if case.by_task:
        lab.book.play(lambda task, request: lab.book.failed(task, echo))
    else:
        lab.answers(case.refusal("invalid", echo))
    assert "bad *** *** ***" in lab.make().error["message"]
    assert "bad *** *** ***" in lab.shell.evidence()["error"]["message"]


@over_all
def test_a_key_that_a_service_echoes_is_masked_in_what_is_kept_of_a_picture(lab: Lab, case: Case) -> None:
    def echoing(behaviour: Callable[[Received], Answer]) -> Callable[[Received], Answer]:
        def answer(request: Received) -> Answer:
            made = behaviour(request)
            extra = {"request_id": f"id {case.key}", "usage": {f"a {case.key}": f"b {case.key}"}}
            return replace(made, body=json.dumps(json.loads(made.body) | extra).encode())

        return answer

    if case.by_task:
        lab.about_tasks(echoing(lab.book.status))
    else:
        lab.answers(echoing(lab.good))
    response = assert_saved(lab, lab.make(), png())
    assert response["request_id"] == (lab.shell.evidence()["task_id"] if case.names_tasks else "id ***")
    if not case.by_task:
        assert lab.shell.evidence()["response"]["usage"].items() >= {"a ***": "b ***"}.items()


# ---------------------------------------------------------------------------------------------------------------------
# zimageturbo: a task that is submitted and asked after
# ---------------------------------------------------------------------------------------------------------------------


def test_a_task_is_asked_after_until_it_is_done_and_its_id_is_on_disk_before_the_first_question(zt: Lab) -> None:
    seen: list[dict[str, Any]] = []

    def working(task: str, request: Received) -> Answer:
        seen.append(zt.shell.evidence())
        return zt.book.working(task, ["IN_PROGRESS", "QUEUED_SOMEWHERE"][len(seen) - 1])

    zt.book.play(working, working, zt.book.done)
    assert_saved(zt, zt.make(), png())
    assert [(evidence["status"], evidence["task_id"]) for evidence in seen] == [("submitted", "task_0000")] * 2
    (submitted,), questions = zt.paid, zt.questions
    moments = [submitted.at, *(question.at for question in questions)]
    first, second, third = (after - before for before, after in itertools.pairwise(moments))
    assert first >= 0.99
    assert second >= 1.2 * 0.99
    assert third >= 1.2 * second or third >= 2
    assert {question.target for question in questions} == {"/api/status?task_id=task_0000"}


def test_questions_begin_after_a_second_and_come_to_be_five_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zimage.task.ask_all", lambda *arguments: None)
    provider = provider_named("zimageturbo")
    endpoint = parse_base_url("http://127.0.0.1:9/api", "test", provider)
    task = Task(provider, endpoint, NO_KEY, ImageRequest("x", "1024*1024", None), "t")
    pauses = [task.pause_s]
    for _ in range(8):
        assert task.ask(Stop(60)) is None
        pauses.append(task.pause_s)
    assert pauses[0] == 1
    assert pauses[-1] == 5
    assert all(before < after for before, after in itertools.pairwise(pauses) if before < 5)
    assert max(pauses) == 5


def test_a_task_that_is_not_done_in_time_is_asked_after_later_and_never_submitted_again(zt: Lab) -> None:
    zt.book.play(lambda task, request: zt.book.working(task))
    start = time.monotonic()
    error = assert_error(zt.make("--timeout", "2"), 7, "unknown")
    assert time.monotonic() - start < 20
    assert "task_0000" in error["message"]
    assert "without paying" in error["hint"]
    assert zt.status() == "submitted"
    assert zt.questions
    again = assert_error(zt.recover("--timeout", "2"), 7, "unknown")
    assert zt.status() == "submitted"
    zt.book.course = None
    assert_saved(zt, advised(zt, again), png())
    assert zt.shell.evidence()["task_id"] == "task_0000"
    assert_recovers_free(zt)


@needs_kill
@pytest.mark.parametrize(
    ("signum", "exit"), [(getattr(signal, "SIGKILL", 9), -9), (signal.SIGTERM, 143)], ids=["KILL", "TERM"]
)
def test_a_task_survives_the_end_of_the_command_that_waits_for_it(zt: Lab, signum: int, exit: int) -> None:
    zt.book.play(lambda task, request: zt.book.working(task))
    process = zt.start()
    zt.server.wait_until(lambda: zt.questions)
    process.send_signal(signum)
    result = zt.finish(process)
    assert result.code == exit
    assert (zt.status(), zt.shell.evidence()["task_id"]) == ("submitted", "task_0000")
    if signum == signal.SIGTERM:
        error = assert_error(result, exit, "unknown", code="interrupted")
        assert "--recover" in shlex.split(error["next_command"])
    zt.book.course = None
    assert_recovers_free(zt)


def test_a_task_that_failed_is_not_charged_and_not_sent_again(zt: Lab) -> None:
    zt.book.play(lambda task, request: zt.book.failed(task, "GPU fell off"))
    error = assert_error(zt.make(), 6, "no", code="task_failed")
    assert "GPU fell off" in error["message"]
    assert "next_command" not in error
    assert zt.status() == "failed"
    assert [attempt["billed"] for attempt in zt.shell.evidence()["attempts"]] == ["no"]
    assert len(zt.paid) == 1
    assert_error(zt.recover(), 2, "no", code="nothing_to_recover")
    assert len(zt.paid) == 1


def test_a_task_that_failed_for_its_content_is_blocked(zt: Lab) -> None:
    zt.book.play(lambda task, request: zt.book.failed(task, "The prompt contains sensitive content"))
    assert_error(zt.make(), 5, "no", code="blocked")
    assert (zt.status(), len(zt.paid)) == ("failed", 1)


def read_poll(**data: Any) -> Generated | None:
    """What the provider makes of an answer to a question after a task."""
    body = json.dumps({"code": 200, "message": "success", "data": data}).encode()
    request = ImageRequest("x", "1024*1024", None)
    return provider_named("zimageturbo").read_poll(HttpAnswer(200, {}, body), request, utc_now())


@pytest.mark.parametrize(
    ("text", "code"),
    [("NSFW detected", "blocked"), ("内容违规", "blocked"), ("GPU fell off", "task_failed"), (None, "task_failed")],
)
def test_why_a_task_failed(text: str | None, code: str) -> None:
    with pytest.raises(Failure) as caught:
        read_poll(status="FAILED", error_message=text)
    assert (caught.value.code, caught.value.fault.billed) == (code, "no")


@pytest.mark.parametrize("status", ["IN_PROGRESS", "in_progress", "PENDING", "QUEUED", "", None, 7])
def test_an_undocumented_status_is_a_task_that_runs(status: object) -> None:
    assert read_poll(status=status, error_message=None, response=[]) is None


def test_a_failure_in_other_words_is_one_and_a_message_beside_work_is_none(zt: Lab) -> None:
    """The documents name no word for a failed task: an error message under an unknown word is one."""
    warned = {"error_message": "slow today"}
    zt.book.play(
        lambda task, request: envelope(zt.book.data(task, "IN_PROGRESS") | warned),
        lambda task, request: envelope(zt.book.data(task, "ERROR") | {"error_message": "out of memory"}),
    )
    assert_error(zt.make(), 6, "no", code="task_failed")
    assert len(zt.questions) == 2


def test_a_task_that_the_service_has_lost_is_unknown_but_one_strange_answer_is_not_the_end(zt: Lab) -> None:
    zt.book.play(lambda task, request: json_answer({"code": 404, "message": "task not found", "data": None}))
    error = assert_error(zt.make(), 7, "unknown", code="outcome_unknown")
    assert "task_0000" in error["message"]
    assert zt.status() == "unknown"
    assert (len(zt.questions), len(zt.paid)) == (3, 1)
    zt.book.course = None  # what was lost is found again
    assert_recovers_free(zt)


def test_questions_that_fail_are_asked_again_and_never_paid_for(zt: Lab) -> None:
    zt.book.play(
        lambda task, request: json_answer({"code": 404, "message": "task not found", "data": None}, 404),
        lambda task, request: Answer(hang_up="after-reading"),
        zt.book.done,
    )
    assert_saved(zt, zt.make(), png())
    assert (len(zt.questions), len(zt.paid)) == (3, 1)


@pytest.mark.parametrize(("status", "exit"), [(401, 3), (402, None)])
def test_a_refused_question_leaves_the_task_open(zt: Lab, status: int, exit: int | None) -> None:
    """A key that is not good any more ends the command at once; what may pass is waited for."""
    zt.book.play(lambda task, request: json_answer({"code": status, "message": "no", "data": None}, status))
    result = zt.make("--timeout", "2")
    error = assert_error(result, exit or 7, "unknown")
    assert zt.status() == "submitted"
    zt.book.course = None
    assert_saved(zt, advised(zt, error), png())
    assert len(zt.paid) == 1


def test_a_question_is_not_redirected_with_the_key(zt: Lab, other: FaultServer) -> None:
    zt.book.play(lambda task, request: redirect(other.root + "/api/status?task_id=task_0000")(request))
    assert_error(zt.make("--timeout", "2"), 7, "unknown")
    assert (other.connections, zt.status()) == (0, "submitted")


WORSE = [  # HTTP status, code in the envelope, exit code, sent again
    (200, 400, 2, False),
    (400, 200, 2, False),
    (200, 401, 3, False),
    (401, 200, 3, False),
    (200, 402, 4, False),
    (402, 200, 4, False),
    (200, "402", 4, False),
    (200, 429, 6, True),
    (429, 200, 6, True),
    (200, 500, 6, True),
    (500, 200, 6, True),
    (200, 503, 6, True),
    (401, 500, 6, True),
    (200, 502, 7, False),
    (200, 504, 7, False),
    (504, 200, 7, False),
    (200, 418, 8, False),
]


@pytest.mark.parametrize(("status", "code", "exit", "again"), WORSE)
def test_where_status_and_envelope_disagree_the_worse_one_counts(
    zt: Lab, status: int, code: object, exit: int, again: bool
) -> None:
    zt.answers(envelope(None, code, status=status, headers=NO_WAIT))
    error = assert_error(zt.make("--max-retries", "1"), exit, "unknown" if exit == 7 else "no")
    assert len(zt.paid) == 1 + again
    assert zt.questions == []
    assert error["http_status"] == status


@pytest.mark.parametrize("status", [429, 500, 502])
def test_a_task_that_is_named_beside_a_fault_is_asked_after_and_not_submitted_again(zt: Lab, status: int) -> None:
    def faulty(request: Received) -> Answer:
        said = json.loads(zt.good(request).body)
        return json_answer(said | {"code": status, "message": "oops"}, status, headers=NO_WAIT)

    zt.answers(faulty)
    assert_saved(zt, zt.make(), png())
    assert len(zt.paid) == 1


@pytest.mark.parametrize("data", [None, {"status": "IN_PROGRESS"}, {"task_id": ""}, {"task_id": ["t"]}, [1]])
def test_a_good_answer_without_a_task_is_no_success(zt: Lab, data: object) -> None:
    zt.answers(envelope(data))
    error = assert_error(zt.make(), 8, "unknown")
    assert error["code"] in ("no_image", "answer_unusable")
    assert (len(zt.paid), zt.questions, zt.status()) == (1, [], "unknown")


def test_a_task_that_succeeded_without_a_picture_is_no_success(zt: Lab) -> None:
    zt.book.play(lambda task, request: envelope(zt.book.data(task, "SUCCESS")))
    assert_error(zt.make(), 8, "unknown", code="no_image")
    assert (len(zt.paid), zt.status()) == (1, "unknown")


@pytest.mark.parametrize("response", [[], None, [""], "", [None], 7, ["no link"]])
def test_a_success_without_links_is_none(response: object) -> None:
    with pytest.raises(Failure) as caught:
        read_poll(status="SUCCESS", response=response)
    assert caught.value.code == "no_image"


def test_of_several_pictures_the_first_is_saved_and_the_links_of_all_are_kept(zt: Lab) -> None:
    links = [f"{zt.server.root}/img/{name}.png" for name in ("first", "second", "third")]
    zt.server.play("/img/first.png", file(png(colour="red")))
    zt.book.play(lambda task, request: envelope(zt.book.data(task, "SUCCESS", *links)))
    response = assert_saved(zt, zt.make(), png(colour="red"))
    assert "3 pictures" in response["warnings"][0]
    assert zt.shell.evidence()["response"]["other_image_urls"] == links[1:]
    assert response["image_url"] == links[0]


def test_of_a_size_only_the_ratio_is_asked_for(zt: Lab) -> None:
    zt.picture(png(1920, 1080))
    assert "warnings" not in assert_saved(zt, zt.make("--size", "1280x720"), png(1920, 1080))
    assert zt.payloads == [{"prompt": "a fox", "aspect_ratio": "16:9"}]


@pytest.mark.parametrize(
    ("size", "width", "height", "fits"),
    [
        ("1024*1024", 1536, 1536, True),
        ("1280*720", 1344, 768, True),  # as near to the ratio as multiples of 64 get
        ("1280*720", 1024, 1024, False),
        ("1280*720", 720, 1280, False),
        ("1024*1024", 1152, 1024, False),
    ],
)
def test_only_the_ratio_of_the_size_is_checked(size: str, width: int, height: int, fits: bool) -> None:
    picture = verified(png(width, height), Stop())
    has = (picture.width, picture.height)
    assert (size_warning(size, has, provider_named("zimageturbo")) is None) == fits
    for name in ("dashscope", "openai"):
        assert size_warning(size, has, provider_named(name)) is not None


def test_all_that_zimageturbo_cannot_do_is_told_at_once_before_anything_is_sent(zt: Lab) -> None:
    request = {"prompt": "x" * 1001, "size": "1248x832", "seed": 3, "prompt_extend": True}
    error = assert_error(
        zt.call("--provider", "zimageturbo", "--request", json.dumps(request), "--print-response"), 2, "no"
    )
    assert [problem.partition(":")[0] for problem in error["problems"]] == ["prompt", "size", "seed", "prompt_extend"]
    assert (zt.server.connections, zt.shell.files()) == (0, [])


RATIOS = {"1:1", "4:3", "3:4", "16:9", "9:16"}


@pytest.mark.parametrize("ratio", RATIO_SIZES)
def test_zimageturbo_draws_five_ratios_and_refuses_the_others(ratio: str) -> None:
    provider = provider_named("zimageturbo")
    request = normalize({"prompt": "x" * 1000, "aspect_ratio": ratio}, with_seed=provider.takes_seed)
    sentences = provider.cannot(request)
    if ratio in RATIOS:
        assert sentences == []
        assert provider.payload(request) == {"prompt": "x" * 1000, "aspect_ratio": ratio}
    else:
        (sentence,) = sentences
        assert all(known in sentence for known in RATIOS)


def test_minus_one_is_no_seed_for_zimageturbo(zt: Lab) -> None:
    assert "seed" not in assert_saved(zt, zt.make("--seed", "-1"))
    assert "seed" not in zt.shell.evidence()["request"]


ROOTS = [
    ("zimageturbo", "https://zimageturbo.ai", "https://zimageturbo.ai/api/generate"),
    ("zimageturbo", "https://zimageturbo.ai/", "https://zimageturbo.ai/api/generate"),
    ("zimageturbo", "https://zimageturbo.ai/api", "https://zimageturbo.ai/api/generate"),
    ("zimageturbo", "https://zimageturbo.ai/api/generate", "https://zimageturbo.ai/api/generate"),
    ("zimageturbo", "https://zimageturbo.ai/other", None),
    ("openai", "http://127.0.0.1:8000", "http://127.0.0.1:8000/v1/images/generations"),
    ("openai", "127.0.0.1:8000", "http://127.0.0.1:8000/v1/images/generations"),
    ("openai", "http://127.0.0.1:8000/v1/", "http://127.0.0.1:8000/v1/images/generations"),
    ("openai", "http://127.0.0.1:8000/v1/images/generations", "http://127.0.0.1:8000/v1/images/generations"),
    ("openai", "https://h.example.com/x/v1", "https://h.example.com/x/v1/images/generations"),
    ("dashscope", "https://dashscope.aliyuncs.com", "https://dashscope.aliyuncs.com" + DASHSCOPE.paid_path),
    ("dashscope", "https://dashscope.aliyuncs.com/compatible-mode/v1", None),
]


@pytest.mark.parametrize(("name", "url", "endpoint"), ROOTS)
def test_a_base_url_is_the_endpoint_the_root_or_the_host(name: str, url: str, endpoint: str | None) -> None:
    provider = provider_named(name)
    if endpoint is None:
        with pytest.raises(Failure) as caught:
            parse_base_url(url, "--base-url", provider)
        assert caught.value.code == "invalid_base_url"
    else:
        assert parse_base_url(url, "--base-url", provider).url == endpoint


# ---------------------------------------------------------------------------------------------------------------------
# openai: any server with OpenAI's Images API
# ---------------------------------------------------------------------------------------------------------------------


def test_openai_needs_a_server_and_says_how_to_name_one(oa: Lab) -> None:
    del oa.shell.env["OPENAI_BASE_URL"]
    error = assert_error(oa.make(), 2, "no", code="invalid_base_url")
    assert "OPENAI_BASE_URL" in error["hint"]
    assert "--base-url" in error["hint"]


def test_openai_sends_the_models_settings_and_those_that_are_given_instead(oa: Lab) -> None:
    assert_saved(oa, oa.make("--seed", "1"))
    oa.shell.evidence_files()[0].unlink()
    flags = ("--steps", "20", "--guidance", "3.5", "--model", "org/other")
    assert_saved(oa, oa.make("--seed", "1", "--overwrite", *flags, "--image-format", "webp"))
    first, second = oa.payloads
    assert (first["num_inference_steps"], first["guidance_scale"], "model" in first) == (9, 0, False)
    others = {"model": "org/other", "output_format": "webp"}
    assert second == first | {"num_inference_steps": 20, "guidance_scale": 3.5} | others
    settings = {"steps": 20, "guidance": 3.5, "model": "org/other", "image_format": "webp"}
    assert oa.shell.evidence()["settings"] == settings


def test_a_flag_of_a_replay_wins_over_the_settings_of_the_evidence(oa: Lab) -> None:
    assert_saved(oa, oa.make("--steps", "20", "--guidance", "3.5"))
    (path,) = oa.shell.evidence_files()
    result = oa.call("--replay", str(path), "--provider", "openai", "--steps", "9", "--output", "b.png")
    assert result.code == 0, result.stderr
    first, second = oa.payloads
    assert second == first | {"num_inference_steps": 9}


@pytest.mark.parametrize(
    "flags",
    [
        ("--steps", "0"),
        ("--steps", "201"),
        ("--steps", "8.5"),
        ("--guidance", "-1"),
        ("--guidance", "nan"),
        ("--guidance", "101"),
        ("--image-format", "gif"),
        ("--model", "a b"),
        ("--model", ""),
        ("--size", "1000x1000"),
        ("--prompt-extend",),
    ],
    ids=" ".join,
)
def test_what_openai_cannot_send_is_refused_before_sending(oa: Lab, flags: tuple[str, ...]) -> None:
    error = assert_error(oa.make(*flags), 2, "no")
    assert flags[0].lstrip("-").replace("-", "_") in error["message"].replace("-", "_")
    assert (oa.server.connections, oa.shell.files()) == (0, [])


@pytest.mark.parametrize("name", ["dashscope", "zimageturbo"])
def test_the_settings_of_one_provider_are_unknown_to_another(shell: Shell, name: str) -> None:
    result = shell.run("--provider", name, "--prompt", "x", "--steps", "8", "--dry-run")
    assert "--steps: unknown option" in assert_error(result, 2, "no", code="usage")["message"]


@pytest.mark.parametrize("form", ["b64_json", "wrapped", "data-link", "data-in-b64"])
def test_bytes_in_any_form_are_the_picture_and_no_data_link_is_kept_or_told(oa: Lab, form: str) -> None:
    code = base64.b64encode(png()).decode()
    forms: dict[str, dict[str, str | None]] = {
        "b64_json": {"b64_json": code},
        "wrapped": {"b64_json": "\n".join(code[start : start + 76] for start in range(0, len(code), 76)) + "\n"},
        "data-link": {"url": f"data:image/png;base64,{code}", "b64_json": None},
        "data-in-b64": {"b64_json": f"data:image/png;base64,{code}"},
    }
    oa.answers(json_answer({"created": 1, "data": [forms[form] | {"revised_prompt": "a red fox"}]}))
    result = oa.make()
    response = assert_saved(oa, result, png())
    assert "image_url" not in response
    assert response["rewritten_prompt"] == "a red fox"
    (path,) = oa.shell.evidence_files()
    for text in (result.stdout, result.stderr, path.read_text()):
        assert "data:" not in text
        assert code[:60] not in text


@pytest.mark.parametrize(
    "text", ["!!!!", "iVBORw0KGgo", base64.b64encode(png()).decode()[:-7]], ids=["no", "odd", "cut"]
)
def test_what_is_not_whole_base64_is_an_answer_that_cannot_be_used(oa: Lab, text: str) -> None:
    oa.answers(json_answer({"created": 1, "data": [{"b64_json": text}]}))
    error = oa.make().error
    assert (error["exit_code"], error["code"] in ("answer_unusable", "image_unusable")) == (8, True)
    assert error["billed"] != "no"
    assert len(oa.paid) == 1


def test_openai_takes_an_answer_that_is_larger_than_those_of_other_services(oa: Lab) -> None:
    """Four MiB is no limit where the picture itself is in the answer."""
    content = io.BytesIO()
    Image.effect_noise((1536, 1536), 120).convert("RGB").save(content, "BMP")
    assert len(content.getvalue()) > 5 * 2**20
    oa.picture(content.getvalue())
    assert_saved(oa, oa.make("--size", "1536x1536"))


def test_of_several_pictures_in_an_answer_the_first_is_saved(oa: Lab) -> None:
    links = [f"{oa.server.root}/img/{name}.png" for name in ("first", "second")]
    oa.server.play("/img/first.png", file(png(colour="red")))
    oa.answers(json_answer({"data": [{"url": link} for link in links]}))
    response = assert_saved(oa, oa.make(), png(colour="red"))
    assert oa.shell.evidence()["response"]["other_image_urls"] == links[1:]
    assert "2 pictures" in response["warnings"][0]


ENGINES_SAY = [  # what vLLM, SGLang and their web framework answer, and the exit code that it means
    (400, {"error": {"message": "bad size", "type": "BadRequestError", "param": None, "code": 400}}, 2),
    (400, {"object": "error", "message": "bad size", "type": "BadRequestError", "param": None, "code": 400}, 2),
    (422, {"detail": [{"loc": ["body", "size"], "msg": "field required", "type": "missing"}]}, 2),
    (404, {"detail": "Not Found"}, 2),
    (401, {"error": "Unauthorized"}, 3),
    (402, {"error": {"message": "pay first", "code": None}}, 4),
    (400, {"error": {"message": "no", "type": "invalid_request_error", "code": "moderation_blocked"}}, 5),
    (500, {"error": {"message": "CUDA error", "type": "InternalServerError", "param": None, "code": 500}}, 6),
    (503, {"detail": "warming up"}, 6),
]


@pytest.mark.parametrize(("status", "body", "exit"), ENGINES_SAY)
def test_the_errors_of_the_engines_are_understood(oa: Lab, status: int, body: object, exit: int) -> None:
    oa.answers(json_answer(body, status))
    error = assert_error(oa.make(*ONCE), exit, "no")
    assert error["http_status"] == status
    assert len(oa.paid) == 1


def test_a_link_that_names_only_a_path_leads_to_the_server_itself(oa: Lab) -> None:
    oa.answers(json_answer({"data": [{"url": "/img/own.png?a=%2F"}]}))
    oa.server.play("/img/own.png", Answer(status=503, headers=NOT_NOW))
    error = assert_error(oa.make(), 7, "yes", code="paid_not_downloaded")
    assert error["image_url"] == f"{oa.server.root}/img/own.png?a=%2F"
    oa.server.play("/img/own.png", file(png()))
    assert_recovers_free(oa)
    assert {request.target for request in oa.server.downloads} - {"/v1/models"} == {"/img/own.png?a=%2F"}


@pytest.mark.parametrize("form", ["//{there}/img/x.png", "/\\{there}/img/x.png", "///{there}/img/x.png"])
def test_a_path_that_is_none_leads_nowhere_else(oa: Lab, elsewhere: FaultServer, form: str) -> None:
    oa.answers(json_answer({"data": [{"url": form.format(there=elsewhere.root.partition("//")[2])}]}))
    assert oa.make().code == 8
    assert elsewhere.connections == 0


def test_a_server_of_ones_own_may_link_to_itself_over_http(oa: Lab, elsewhere: FaultServer) -> None:
    elsewhere.play("/v1/images/generations", json_answer({"data": [{"url": f"{elsewhere.root}/img/own.png"}]}))
    result = oa.make("--base-url", elsewhere.root)
    response = assert_saved(oa, result, png())
    assert response["image_url"] == f"{elsewhere.root}/img/own.png"
    assert "warning" in result.stderr


@pytest.mark.parametrize("case", LINKED_CASES, ids=str)
def test_no_server_links_into_the_network_around(lab: Lab, case: Case, elsewhere: FaultServer) -> None:
    """Neither to another address of this machine, nor to a private one by a redirect."""
    lab.server.play(lab.case.picture_path, redirect(elsewhere.root + "/img/inside.png"))
    assert_error(lab.make(), 8, "yes", code="hop_refused")
    assert elsewhere.connections == 0


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


class ProviderBatch(Batch):
    """A batch of one case's provider. `service` plays its protocol where a lab is given."""

    def __init__(self, case: Case, shell: Shell, lab: Lab | None = None) -> None:
        self.case = case
        self.shell = shell
        shell.script = BATCH
        self.input = shell.folder / "rows.jsonl"
        self.out = shell.folder / "out"
        self.lab = lab
        if lab is not None:
            self.service = lab.server
            lab.picture(SMALL_PNG)

    def arguments(self, *options: str) -> tuple[str, ...]:
        return (*super().arguments(*options), "--provider", self.case.provider, "--no-gallery")

    def call(self, *arguments: str, stdin: bytes | None = None, timeout: float = 60) -> Result:
        result = super().call(*arguments, stdin=stdin, timeout=timeout)
        return self.lab.noted(result) if self.lab else result

    def by_prompt(self, **table: Sequence[Behaviour]) -> None:
        """What the paid calls for a prompt get, one after the other, then pictures; others get their picture."""
        assert self.lab is not None
        lab, waiting = self.lab, {prompt: list(behaviours) for prompt, behaviours in table.items()}

        def answer(request: Received) -> Answer:
            script = waiting.get(lab.case.prompt_in(json.loads(request.body)), [])
            return changed(script.pop(0) if script else lab.good)(request)

        lab.answers(answer)

    @property
    def tasks(self) -> dict[str, str]:
        """Prompt to task id, of the pictures that the service works on."""
        rows = self.query("SELECT prompt, facts FROM pictures WHERE state = 'submitted'")
        return {prompt: json.loads(facts)["task_id"] for prompt, facts in rows}


@pytest.fixture
def batch(lab: Lab) -> ProviderBatch:
    return ProviderBatch(lab.case, lab.shell, lab)


only_zimageturbo = pytest.mark.parametrize("case", [ZIMAGETURBO], ids=str)
only_openai = pytest.mark.parametrize("case", [OPENAI], ids=str)


@over_all_in_time
def test_a_batch_settles_every_row_by_the_same_rules(lab: Lab, case: Case, batch: ProviderBatch) -> None:
    batch.by_prompt(
        invalid=[case.refusal("invalid")],
        blocked=[case.refusal("blocked")],
        busy=[case.refusal("busy", headers=NO_WAIT)],
        failing=[case.refusal("failing", headers=NO_WAIT)],
        lost=[Answer(hang_up="after-reading", bills=True)],
    )
    batch.rows("fine", "invalid", "blocked", "busy", "failing", "lost")
    result = batch.run("--concurrency", "1")
    assert result.code == 1
    is_free = not case.is_billed  # what was lost is made again unasked
    assert_counts(result, saved=3 + is_free, failed=2, unknown=1 - is_free)
    states = dict.fromkeys(["fine", "busy", "failing"], "saved") | {"lost": "saved" if is_free else "unknown"}
    assert batch.states() == states | {"invalid": "failed", "blocked": "failed"}
    calls = {"fine": 1, "invalid": 1, "blocked": 1, "busy": 2, "failing": 2, "lost": 1 + is_free}
    assert Counter(lab.prompts) == calls
    assert result.json["estimated_cost"] == pytest.approx(4 * case.cost)
    assert batch.run().code == 1
    assert Counter(lab.prompts) == calls
    assert len({json.dumps(payload) for payload in lab.payloads}) == 6  # what is sent again is the same to the seed
    assert batch.run("--retry-unknown", "--retry-failed").code == 0
    assert Counter(lab.prompts) == calls | {"invalid": 2, "blocked": 2, "lost": 2}
    for evidence in batch.evidence().values():
        jsonschema.validate(evidence, EVIDENCE_SCHEMA)
        assert (evidence["status"], evidence["provider"]) == ("saved", case.provider)
    assert_nothing_half(batch)


@over_all
@pytest.mark.parametrize(("name", "exit"), [("key", 3), ("balance", 4)])
def test_a_batch_stops_at_what_would_refuse_every_row(
    lab: Lab, case: Case, batch: ProviderBatch, name: str, exit: int
) -> None:
    lab.answers(case.refusal(name, f"said of {case.key}"))
    batch.prompts(9)
    result = batch.run("--concurrency", "1")
    assert result.code == exit
    assert_counts(result, pending=9)
    assert len(lab.paid) == 1
    assert result.json["estimated_cost"] == 0


@over_all
def test_the_dry_run_of_a_batch_tells_its_cost_and_sends_nothing(lab: Lab, case: Case, batch: ProviderBatch) -> None:
    for name in KEYS:
        del lab.shell.env[name]
    batch.prompts(7)
    plan = batch.run("--dry-run", "--variants", "2").json
    assert (plan["to_make"], plan["provider"]) == (14, case.provider)
    assert plan["estimated_cost"] == pytest.approx(14 * case.cost)
    assert lab.server.connections == 0
    assert lab.shell.files() == ["rows.jsonl"]


@needs_kill
@over_all_in_time
@pytest.mark.parametrize("state", ["generated", "saved"])
def test_a_batch_killed_between_a_step_and_its_note_never_pays_again(
    lab: Lab, case: Case, batch: ProviderBatch, state: str
) -> None:
    """Dead as by kill -9 where the database would hear of the answer, or of the picture that lies in its place."""
    wrapper = lab.shell.home / "dying.py"
    lines = [
        "import os, signal, sys",
        f"sys.path.insert(0, {str(SCRIPTS)!r})",
        "import generate_batch, zimage.batch.journal as journal",
        "real = journal.Journal.keep",
        "def keep(self, job, state):",
        f"    if state == {state!r}: os.kill(os.getpid(), signal.SIGKILL)",
        "    return real(self, job, state)",
        "journal.Journal.keep = keep",
        "sys.exit(generate_batch.main())",
    ]
    wrapper.write_text("\n".join(lines))
    batch.rows("a fox")
    lab.shell.script = wrapper
    assert lab.shell.run(*batch.arguments()).code == -signal.SIGKILL
    before = "generated" if state == "saved" else "submitted" if case.by_task else "submitting"
    assert batch.stored_states() == {"a fox": before}
    lab.shell.script = BATCH
    lost = case.by_link and not case.by_task and state == "generated"  # nobody wrote the link down
    result = batch.run()
    assert batch.states() == {"a fox": "unknown" if lost else "saved"}
    assert result.code == (1 if lost else 0)
    assert len(lab.paid) == 1
    assert_nothing_half(batch)


def assert_nothing_half(batch: ProviderBatch) -> None:
    """No file in the making is left, and no bytes that a provider handed over."""
    assert [name for name in batch.shell.files() if name.endswith((".picture", ".part"))] == []


class Watched(MockServer):
    """The mock service, which also keeps every request."""

    def __init__(self, **options: Any) -> None:
        self.seen: list[MockRequest] = []
        super().__init__(rpm=0, **options)

    def __enter__(self) -> Watched:
        self.start()
        return self

    def answer(self, request: MockRequest) -> Any:
        self.seen.append(request)
        return super().answer(request)

    def paid(self, case: Case) -> list[str]:
        """The prompts of all paid calls so far."""
        requests = [request for request in list(self.seen) if request.method == "POST"]
        assert all(request.path.endswith(case.paid_path) for request in requests)
        return [case.prompt_in(json.loads(request.body)) for request in requests]


def wait_for(condition: Callable[[], object], timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, "what the test waits for did not happen"
        time.sleep(0.005)


@needs_kill
@over_all_in_time
def test_fifty_rows_killed_and_resumed_are_all_made_and_none_is_paid_for_twice(
    shell: Shell, case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the mock service: killed while requests are out, twice, and once more while tasks are asked after."""
    monkeypatch.setattr(zimage_mock.faults, "draw_file", lambda made: drawn(made.kind.upper(), made.width, made.height))
    batch = ProviderBatch(case, shell)
    prompts = batch.prompts(50)
    at_once = "25" if case is MODELSCOPE else "5"  # whose tasks are asked after every five seconds
    options = ("--concurrency", at_once, "--quiet", *(["--rpm", "1200"] if case.by_task else []))  # time to kill it
    tasks: dict[str, str] = {}
    unknown: set[str] = set()

    def killed_when(condition: Callable[[], object]) -> None:
        process = batch.start(*options)
        wait_for(lambda: condition() or process.poll() is not None)
        assert process.poll() is None, process.communicate()
        batch.kill(process)
        states = batch.stored_states()
        assert set(states.values()) - {"saved"}, "the kill came too late to show anything"
        unknown.update(prompt for prompt, state in states.items() if state == "submitting")
        tasks.update(batch.tasks)

    with Watched(latency=1.5 if case.by_task and not case.names_tasks else 0.15) as mock:
        shell.use(mock)
        shell.env[case.key_variable] = mock.api_key
        killed_when(lambda: len(mock.paid(case)) >= 12)
        killed_when(lambda: len(mock.paid(case)) >= 30)
        assert len(mock.paid(case)) < 50
        if case.by_task:
            assert tasks
            asked = mock.stats()["status_queries"]
            killed_when(lambda: mock.stats()["status_queries"] > asked)
        result = batch.run(*options)
        for _ in range(3):
            if result.code in (0, 1):
                break
            result = batch.run(*options)  # many unknown outcomes in a row end a run
        calls = Counter(mock.paid(case))
        left = {prompt for prompt, state in batch.states().items() if state == "unknown"}
        assert left <= unknown
        assert batch.states() == {prompt: "unknown" if prompt in left else "saved" for prompt in prompts}
        assert result.code == (1 if left else 0)
        again = set() if case.is_billed or case.names_tasks else unknown
        assert all(calls[prompt] == 1 for prompt in prompts if prompt not in left | again)
        assert all(calls[prompt] <= 1 for prompt in left)
        seen = len(mock.seen)
        assert batch.run(*options).code == result.code
        assert len(mock.seen) == seen
        if left:
            assert batch.run(*options, "--retry-unknown").code == 0
        assert Counter(mock.paid(case)) == calls + Counter(left)
        assert batch.states() == dict.fromkeys(prompts, "saved")
        evidence = batch.evidence()
        assert {prompt: evidence[prompt]["task_id"] for prompt in tasks} == tasks
        for picture in batch.results():
            with Image.open(batch.out / picture["output"]) as image:
                image.load()
        assert_nothing_half(batch)


@only_zimageturbo
def test_a_task_that_is_worked_on_holds_neither_a_worker_nor_the_next_request(lab: Lab, batch: ProviderBatch) -> None:
    """No task is done before all twelve are submitted, and one request may be out at a time."""

    def course(book: Any, task: str, request: Received) -> Answer:
        done: Answer = book.done(task, request) if len(book.tasks) == 12 else book.working(task)
        return done

    lab.book.course = course
    batch.prompts(12)
    result = batch.run("--concurrency", "1", "--timeout", "15")
    assert result.code == 0, result.stdout
    assert_counts(result, saved=12)
    assert len(lab.paid) == 12


@only_zimageturbo
def test_a_failed_task_of_a_batch_is_not_charged_and_not_sent_again_on_its_own(lab: Lab, batch: ProviderBatch) -> None:
    def course(book: Any, task: str, request: Received) -> Answer:
        fails = task in ("task_0000", "task_0001")
        answer: Answer = book.failed(task, "GPU fell off") if fails else book.done(task, request)
        return answer

    lab.book.course = course
    batch.prompts(4)
    result = batch.run("--concurrency", "1")
    assert result.code == 1
    assert_counts(result, saved=2, failed=2)
    assert result.json["estimated_cost"] == pytest.approx(2 * 0.02)
    assert batch.picture("picture 0")["error"]["code"] == "task_failed"
    assert batch.run().code == 1
    assert len(lab.paid) == 4
    assert batch.run("--retry-failed").code == 0
    assert Counter(lab.prompts) == {"picture 0": 2, "picture 1": 2, "picture 2": 1, "picture 3": 1}
    assert batch.status()["estimated_cost"] == pytest.approx(4 * 0.02)


@only_zimageturbo
def test_tasks_that_take_too_long_wait_for_the_next_run(lab: Lab, batch: ProviderBatch) -> None:
    lab.book.play(lambda task, request: lab.book.working(task))
    batch.prompts(3)
    result = batch.run("--timeout", "2")
    assert result.code == 1
    assert result.json["error"]["retryable"]
    tasks = batch.tasks
    assert len(tasks) == 3
    lab.book.course = None
    assert batch.run().code == 0
    assert len(lab.paid) == 3
    assert {prompt: evidence["task_id"] for prompt, evidence in batch.evidence().items()} == tasks


@only_zimageturbo
def test_open_tasks_of_one_provider_are_nothing_to_another(lab: Lab, batch: ProviderBatch, shell: Shell) -> None:
    """The folder asks first; and then neither the questions nor the key of the one go to the other."""
    lab.book.play(lambda task, request: lab.book.working(task))
    batch.prompts(2)
    assert batch.run("--timeout", "2").code == 1
    questions = len(lab.questions)
    with FaultServer() as second:
        shell.env["DASHSCOPE_BASE_URL"] = second.base_url
        batch.case = DASHSCOPE
        assert batch.run().error["code"] == "changed_rows"
        assert second.connections == 0
        batch.run("--accept-changes")
        assert len(second.posts) == 2
        assert_keys_at(second, DASHSCOPE)
    assert (len(lab.questions), len(lab.paid)) == (questions, 2)


@only_zimageturbo
def test_a_batch_refuses_all_rows_that_the_provider_cannot_do_before_anything_is_sent(
    lab: Lab, batch: ProviderBatch
) -> None:
    batch.rows("fine", {"prompt": "a", "seed": 5}, {"prompt": "b" * 1001}, {"prompt": "c", "size": "1248x832"})
    error = batch.run().error
    assert (error["exit_code"], error["code"]) == (2, "invalid_rows")
    assert [problem.split(":")[:2] for problem in error["problems"]] == [
        ["line 2", " seed"],
        ["line 3", " prompt"],
        ["line 4", " size"],
    ]
    assert lab.server.connections == 0
    assert not batch.out.exists()


@only_zimageturbo
def test_variants_without_seeds_are_pictures_of_their_own(lab: Lab, batch: ProviderBatch) -> None:
    batch.prompts(2)
    assert batch.run("--variants", "2").code == 0
    assert Counter(lab.prompts) == {"picture 0": 2, "picture 1": 2}
    assert all("seed" not in result for result in batch.results())
    assert batch.run("--variants", "3").code == 0
    assert Counter(lab.prompts) == {"picture 0": 3, "picture 1": 3}


@only_openai
def test_other_settings_on_an_existing_folder_ask_instead_of_paying_again(lab: Lab, batch: ProviderBatch) -> None:
    batch.prompts(3)
    assert batch.run("--steps", "8").code == 0
    assert batch.run().code == 0  # 8 is what is sent without the option
    for options in (("--steps", "4"), ("--guidance", "1"), ("--model", "m")):
        error = batch.run(*options).error
        assert (error["exit_code"], error["code"]) == (2, "changed_rows"), options
        assert error["changes"]["made_again"] == 3
    assert len(lab.paid) == 3
    assert batch.run("--steps", "4", "--accept-changes").code == 0
    assert [payload["num_inference_steps"] for payload in lab.payloads] == [8] * 3 + [4] * 3
    assert batch.run("--steps", "4").code == 0
    assert batch.run().error["code"] == "changed_rows"
    assert len(lab.paid) == 6
    evidence = [json.loads(path.read_text()) for path in batch.out.glob("evidence/*/*.json")]
    assert Counter(data["settings"]["steps"] for data in evidence) == {8: 3, 4: 3}


# ---------------------------------------------------------------------------------------------------------------------
# Shared code knows no provider, and one more is one file more
# ---------------------------------------------------------------------------------------------------------------------


def shared_lines(path: Path) -> dict[int, str]:
    """The lines of a module by number, without the one that says which provider is the default."""
    text = path.read_text(encoding="utf-8")
    lines = dict(enumerate(text.splitlines(), 1))
    for node in ast.parse(text).body:
        targets = (
            [node.target] if isinstance(node, ast.AnnAssign) else node.targets if isinstance(node, ast.Assign) else []
        )
        if {target.id for target in targets if isinstance(target, ast.Name)} & {"DEFAULT_PROVIDER"}:
            for number in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                del lines[number]
    return lines


SHARED = [SCRIPT, BATCH, *sorted((SCRIPTS / "zimage").rglob("*.py"))]


@pytest.mark.parametrize("path", SHARED, ids=lambda path: path.name)
def test_no_providers_name_stands_in_the_shared_code(path: Path) -> None:
    """Not as a word, not inside an identifier, an environment variable or a host name, in no case."""
    names = set(provider_names()) | OTHER_TABLES
    variables = {name for case in CASES for name in (case.key_variable, case.url_variable)}
    hosts = {*OWNERS.values(), "aliyuncs.com"}
    pattern = re.compile("|".join(re.escape(word) for word in sorted({*names, *variables, *hosts})), re.IGNORECASE)
    assert pattern.search("x = os.environ['OpenAI_API_KEY']")
    found = [f"{path.name}:{number}: {line}" for number, line in shared_lines(path).items() if pattern.search(line)]
    assert found == []


PIGEON = '''
"""A made-up service: it answers with the picture in hexadecimal digits."""
from zimage.answers import json_post, read_json, service_failure
from zimage.keys import KeyPlaces
from zimage.calls import Generated
from zimage.provider import Price, Provider


class Pigeon(Provider):
    name = "pigeon"
    key_places = KeyPlaces(variable="PIGEON_API_KEY")
    roots = {"loft": "https://pigeon.example/loft"}
    default_region = "loft"
    base_url_variables = ("PIGEON_BASE_URL",)
    default_root = "/loft"
    generate_path = "/coo"

    def owns(self, host):
        return host == "pigeon.example"

    def price(self, request, region):
        return Price(0.5, "a handful of corn", "2026")

    def payload(self, request):
        return {"coo": request.prompt, "wings": list(request.width_height), "seed": request.seed}

    def submit(self, payload, endpoint, key, workspace):
        return json_post(endpoint.url, payload, {"X-Corn": key})

    def read(self, answer, request, now):
        body = read_json(answer) or {}
        if "egg" not in body:
            raise service_failure(answer, message=body.get("croak"), is_own_json="croak" in body)
        return Generated(content=bytes.fromhex(body["egg"]))


PROVIDER = Pigeon
'''
CORN = "corn-0123456789abcdef"


@pytest.fixture
def copied(shell: Shell, tmp_path: Path) -> Path:
    """The scripts in a folder of their own, and the shell set to use them."""
    copy = tmp_path / "copy"
    shutil.copytree(SCRIPTS, copy, ignore=shutil.ignore_patterns("__pycache__", "mock_server.py", "zimage_mock"))
    shell.script = copy / SCRIPT.name
    return copy


def test_one_more_provider_is_one_more_file(shell: Shell, copied: Path, server: FaultServer) -> None:
    (copied / "providers" / "pigeon.py").write_text(PIGEON)
    shell.env |= KEYS | {"PIGEON_API_KEY": CORN, "PIGEON_BASE_URL": server.root}
    server.play("/loft/coo", json_answer({"egg": SMALL_PNG.hex()}, bills=True))
    command = ("--provider", "pigeon", "--size", "512x512", "--seed", "7", "--print-response")
    response = shell.run("--prompt", "a dove", "--output", "dove.png", *command).json
    assert (shell.folder / "dove.png").read_bytes() == SMALL_PNG
    assert (response["provider"], response["region"], response["estimated_cost"]) == ("pigeon", "loft", 0.5)
    (request,) = server.requests
    assert json.loads(request.body) == {"coo": "a dove", "wings": [512, 512], "seed": 7}
    assert request.header("x-corn") == CORN
    assert shell.run("--recover", response["evidence_path"]).code == 0
    assert shell.run("--replay", response["evidence_path"], "--output", "b.png").code == 0
    assert [json.loads(request.body) for request in server.requests] == [json.loads(request.body)] * 2
    stranger = shell.run("--prompt", "x", *command, "--base-url", "https://example.com")
    assert stranger.error["code"] == "host_not_trusted"
    server.play("/loft/coo", json_answer({"croak": f"no corn but {CORN}"}, 401))
    refused = shell.run("--prompt", "x", *command)
    assert (refused.code, CORN in refused.stdout + refused.stderr) == (3, False)

    server.play("/loft/coo", json_answer({"egg": SMALL_PNG.hex()}, bills=True))
    (shell.folder / "rows.txt").write_text("one\ntwo\nthree\n")
    shell.script = copied / BATCH.name
    done = shell.run("--input", "rows.txt", "--output-dir", "out", "--rpm", "0", "--provider", "pigeon", "--no-gallery")
    assert (done.code, done.json["saved"], done.json["estimated_cost"]) == (0, 3, 1.5), done.stdout
    for script in (SCRIPT.name, BATCH.name):
        shell.script = copied / script
        assert re.search(r"--provider NAME\s+one of [^(]*\bpigeon\b", " ".join(shell.run("--help").stdout.split(" ")))
    assert CORN.encode() not in b"".join(path.read_bytes() for path in shell.folder.rglob("*") if path.is_file())


def test_help_lists_every_provider_and_the_settings_of_the_one_that_is_named(shell: Shell) -> None:
    for script in (SCRIPT, BATCH):
        shell.script = script
        text = shell.run("--help").stdout
        listed = re.search(r"one of ([a-z0-9_,\s]+)\(default", text)
        assert listed
        assert sorted(name.strip() for name in listed[1].split(",")) == sorted(provider_names())
        assert "--steps" not in text
        assert "--steps" in shell.run("--provider", "openai", "--help").stdout


BROKEN = {
    "syntax": "def (:\n",
    "raises": "raise RuntimeError('no')\n",
    "import": "import there_is_no_such_module_at_all\n",
    "empty": "",
    "misnamed": PIGEON,
    "leaves": "import sys\nsys.exit(0)\n",
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_provider_file_that_cannot_be_used_is_named_and_spoils_nothing_else(
    shell: Shell, copied: Path, how: str
) -> None:
    (copied / "providers" / "broken.py").write_text(BROKEN[how])
    error = assert_error(shell.run("--prompt", "x", "--provider", "broken", "--print-response"), 2, "no")
    assert "providers/broken.py" in error["message"]
    assert shell.run("--prompt", "x", "--dry-run").code == 0
    assert shell.run("--help").code == 0
    shell.script = copied / BATCH.name
    error = assert_error(shell.run("--prompt", "x", "--output-dir", "o", "--provider", "broken"), 2, "no")
    assert "providers/broken.py" in error["message"]
    assert shell.files() == []


NO_NAMES = ["../x", "Foo", "os", "", "providers/openai", "openai.py", "OpenAI", "__init__", "-x", "openai\n", "ｏpenai"]


def test_a_name_that_is_no_provider_loads_nothing(shell: Shell, copied: Path) -> None:
    marker = shell.home / "was-loaded"
    trap = f"open({str(marker)!r}, 'w').close()\nPROVIDER = None\n"
    for path in (copied / "x.py", copied / "providers" / "Foo.py", copied / "providers" / "__init__.py"):
        path.write_text(trap)
    (shell.folder / "os.py").write_text(trap)
    for script, names, more in ((SCRIPT.name, NO_NAMES, ()), (BATCH.name, NO_NAMES[:4], ("--output-dir", "o"))):
        shell.script = copied / script
        for name in names:
            result = shell.run("--prompt", "x", f"--provider={name}", *more, *([] if more else ["--print-response"]))
            error = assert_error(result, 2, "no", code="usage")
            assert all(known in error["message"] for known in ("--provider", "dashscope", "zimageturbo", "openai")), (
                name
            )
    assert not marker.exists()
    assert shell.files() == ["os.py"]


def test_evidence_that_names_no_provider_loads_nothing(oa: Lab) -> None:
    assert_saved(oa, oa.make())
    (path,) = oa.shell.evidence_files()
    data = oa.shell.evidence()
    for name in ("../x", "os", "nowhere", 7):
        path.write_text(json.dumps(data | {"provider": name, "status": "submitted", "task_id": "t"}))
        for mode in ("--recover", "--replay"):
            result = oa.call(mode, str(path), "--output", "b.png", "--print-response")
            assert_error(result, 2, "no")
    assert len(oa.paid) == 1
