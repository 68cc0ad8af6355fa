"""What a service or a network can do wrong, and what must hold then: pay once, lose nothing, keep the key.

Every test runs the script as a process against a server that plays the fault. The tables say how the run ends; what
holds for every run (no leftovers, true evidence, a key in no output, the form of errors) is checked by `failed` and
`succeeded` for all of them.
"""

from __future__ import annotations

import email.utils
import functools
import gzip
import io
import json
import os
import re
import shlex
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jsonschema
import pytest
from PIL import Image

from conftest import GENERATE as SCRIPT
from conftest import Result, Shell
from fault_server import (
    BLOCK,
    GENERATE,
    PICTURE,
    Answer,
    Behaviour,
    FaultServer,
    Received,
    drawn,
    error,
    file,
    good,
    good_body,
    good_text,
    html,
    json_answer,
    oss_error,
    png,
    png_chunk,
    png_of,
    redirect,
    typed,
)

KEY = "plain.KEY-0123456789+/=abc"  # of no known form: what hides it must know it, not recognize it
GZIP = (("Content-Encoding", "gzip"),)
OLD_PICTURE = b"what lay there before"
BILLED_BY_STATUS = {"failed": "no", "unknown": "unknown", "generated": "yes"}
SLACK_S = 3.0  # beyond --timeout: starting Python and ending well
PEAK_BYTES = 400 * 1024 * 1024


@pytest.fixture
def service(shell: Shell, service: FaultServer) -> FaultServer:
    """The shared one, with this file's key."""
    shell.env["DASHSCOPE_API_KEY"] = KEY
    return service


@pytest.fixture
def elsewhere() -> Iterator[FaultServer]:
    """A second server that nothing may ever reach."""
    with FaultServer() as server:
        yield server


def run(shell: Shell, *more: str, timeout: float = 10, retries: int = 0) -> Result:
    flags = ("--print-response", "--timeout", f"{timeout:g}", "--max-retries", str(retries))
    started = time.monotonic()
    result = shell.call("--prompt", "x", "--output", "out.png", *flags, *more)
    assert time.monotonic() - started < timeout + SLACK_S, "--timeout is for the whole command"
    return result


@functools.cache
def schema(name: str) -> Any:
    done = subprocess.run([sys.executable, str(SCRIPT), "--schema", name], capture_output=True, check=True)
    return json.loads(done.stdout)


def strict_json(text: str) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(text, parse_constant=refuse)


def always(shell: Shell, result: Result) -> dict[str, Any]:
    """What holds after every run that sent something; returns the evidence."""
    (path,) = shell.evidence_files()
    texts = {"stdout": result.stdout, "stderr": result.stderr, "evidence": path.read_text(encoding="utf-8")}
    for place, text in texts.items():
        for form in (KEY, quote(KEY, safe=""), quote(KEY)):
            assert form not in text, f"the key stands in {place}"
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f-\x9f]", result.stderr), "control characters reach the terminal"
    assert "Traceback" not in result.stderr
    assert "Warning:" not in result.stderr, "a warning of Python or a library, not of this tool"
    known = {
        "out.png",
        str(path.relative_to(shell.folder)),
        str((path.parent / ".gitignore").relative_to(shell.folder)),
    }
    assert set(shell.files()) <= known, "a file was left behind"
    strict_json(result.stdout)
    evidence = strict_json(texts["evidence"])
    jsonschema.validate(evidence, schema("evidence"))
    assert isinstance(evidence, dict)
    return evidence


def failed(
    shell: Shell,
    service: FaultServer,
    result: Result,
    *,
    exit: int,
    code: str | None,
    status: str,
    before: bytes | None = None,
) -> dict[str, Any]:
    """Check a run that must have failed; returns the error object."""
    error = result.error
    assert (result.code, error["code"]) == (exit, code or error["code"]), error
    jsonschema.validate(error, schema("response")["$defs"]["error"])
    evidence = always(shell, result)
    assert (evidence["status"], error["billed"]) == (status, BILLED_BY_STATUS[status])
    assert evidence["error"]["code"] == error["code"]
    assert error["evidence_path"] == str(shell.evidence_files()[0])
    if service.billed:
        assert status != "failed", "a picture was billed, and the evidence says that none was"
    if status == "generated":
        assert service.billed == 1
        assert evidence["response"]["image_url"] == error["image_url"]
    output = shell.folder / "out.png"
    assert (output.read_bytes() if output.exists() else None) == before, "a failing run touched the output"
    return error


def succeeded(shell: Shell, service: FaultServer, result: Result, *, posts: int = 1) -> dict[str, Any]:
    """Check a run that must have saved its picture; returns the response."""
    assert result.code == 0, (result.stdout, result.stderr)
    response = result.json
    jsonschema.validate(response, schema("response"))
    evidence = always(shell, result)
    assert evidence["status"] == "saved"
    assert "error" not in evidence
    assert (len(service.posts), service.billed) == (posts, 1)
    with Image.open(response["image_path"]) as image:
        image.load()
        assert image.size == (response["width"], response["height"])
    assert response["image_path"] == str(shell.folder / "out.png")
    return response


@dataclass(frozen=True)
class Fault:
    """Behaviours, and how the run must end: exit code, error code (None: any), evidence status, and the money."""

    name: str
    plays: tuple[Behaviour, ...]
    exit: int
    code: str | None
    status: str
    billed: int = 0  # pictures that the service made
    posts: int = 1
    timeout: float = 10
    retries: int = 0


def by_name(fault: Fault) -> str:
    return fault.name.replace(" ", "-")


# ---------------------------------------------------------------------------------------------------------------------
# The call that costs money: statuses, codes, bodies
# ---------------------------------------------------------------------------------------------------------------------


def refused(name: str, answer: Behaviour, exit: int, code: str, **more: Any) -> Fault:
    """An answer after which nothing was billed."""
    return Fault(name, (answer,), exit, code, "failed", **more)


def unknown(name: str, answer: Behaviour, exit: int = 7, code: str | None = "outcome_unknown", **more: Any) -> Fault:
    """An answer, or none, after which nobody knows whether a picture was billed."""
    return Fault(name, (answer,), exit, code, "unknown", **more)


def no_image(name: str, answer: Behaviour) -> Fault:
    """An answer of the service that holds no usable picture."""
    return unknown(name, answer, 8, "no_image")


def choices(value: object) -> Answer:
    return json_answer({"request_id": "r", "output": {"choices": value}})


def content(value: object) -> Answer:
    return choices([{"finish_reason": "stop", "message": {"role": "assistant", "content": value}}])


FREE_GONE = "Free allocated quota exceeded."
STATUSES = [
    refused("400 of the service", error(400, "InvalidParameter"), 2, "rejected_by_service"),
    refused("400 of a gateway", html(400), 2, "rejected_by_service"),
    refused("400 with nothing", Answer(400), 2, "rejected_by_service"),
    refused("401 of the service", error(401, "InvalidApiKey"), 3, "key_rejected"),
    refused("401 of a gateway", html(401), 3, "key_rejected"),
    refused("402 with an unknown code", error(402, "PaymentRequired"), 8, "refused_by_service"),
    refused("402 of a gateway", html(402), 8, "refused_by_service"),
    refused("403 of the service", error(403, "AccessDenied.Unpurchased"), 3, "access_denied"),
    refused("403 for the model", error(403, "Model.AccessDenied"), 3, "access_denied"),
    refused("403 of a gateway", html(403), 3, "access_denied"),
    refused("404 of the service", error(404, "ModelNotFound"), 2, "not_found"),
    refused("404 of a gateway", html(404), 2, "not_found"),
    refused("405", error(405, "MethodNotAllowed"), 8, "refused_by_service"),
    unknown("408 of a gateway", html(408)),
    refused("413", html(413), 8, "refused_by_service"),
    refused("418", html(418), 8, "refused_by_service"),
    refused("422", error(422, "Unprocessable"), 8, "refused_by_service"),
    refused("429 of the service", error(429, "Throttling.RateQuota"), 6, "rate_limited"),
    refused("429 of a gateway", html(429), 6, "rate_limited"),
    refused("451", html(451), 8, "refused_by_service"),
    refused("499 with nothing", Answer(499), 8, "refused_by_service"),
    refused("500 of the service", error(500, "InternalError.Algo"), 6, "service_failing"),
    refused("503 of the service", error(503, "ServiceUnavailable"), 6, "service_failing"),
    refused("503 for the model", error(503, "ModelServingError"), 6, "service_failing"),
    unknown("500 of a gateway", html(500), retries=2),
    unknown("500 with nothing", Answer(500), retries=2),
    unknown("500 with another JSON", json_answer({"error": "oops"}, 500), retries=2),
    unknown("500 with a code that is a number", json_answer({"code": 500, "message": "no"}, 500), retries=2),
    unknown("501", html(501), retries=2),
    unknown("502", html(502), retries=2),
    unknown("503 of a gateway", html(503), retries=2),
    unknown("503 of a gateway that asks to retry", html(503, headers=(("Retry-After", "1"),)), retries=2),
    unknown("504", html(504), retries=2),
    unknown("504 of the service", error(504, "RequestTimeOut"), retries=2),
    unknown("520", html(520), retries=2),
    unknown("599", Answer(599), retries=2),
    unknown("300 with nothing", Answer(300), retries=2),
    unknown("304", Answer(304, framing="close"), retries=2),
    unknown("103 and then nothing", Answer(raw=b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n"), retries=2),
]

CODES = [
    refused("200 with Throttling", error(200, "Throttling"), 6, "rate_limited"),
    refused("200 with InvalidApiKey", error(200, "InvalidApiKey"), 3, "key_rejected"),
    refused("200 with DataInspectionFailed", error(200, "DataInspectionFailed"), 5, "blocked"),
    refused("400 with DataInspectionFailed", error(400, "DataInspectionFailed"), 5, "blocked"),
    refused("400 with Arrearage", error(400, "Arrearage"), 4, "balance"),
    refused("400 with InternalError", error(400, "InternalError"), 6, "service_failing"),
    refused("403 with a used up quota", error(403, "AllocationQuota.FreeTierOnly"), 4, "quota"),
    refused("429 with a used up quota", error(429, "Throttling.AllocationQuota", FREE_GONE), 4, "quota", retries=3),
    refused("429 with insufficient_quota", error(429, "insufficient_quota", FREE_GONE), 4, "quota", retries=3),
    refused("500 with InvalidApiKey", error(500, "InvalidApiKey"), 3, "key_rejected", retries=3),
    refused("500 with Arrearage", error(500, "Arrearage"), 4, "balance", retries=3),
    refused("503 with DataInspectionFailed", error(503, "DataInspectionFailed"), 5, "blocked", retries=3),
    refused("404 with Throttling", error(404, "Throttling.BurstRate"), 6, "rate_limited"),
    unknown("408 with RequestTimeOut", error(408, "RequestTimeOut"), retries=3),
    unknown("500 with RequestTimeOut", error(500, "RequestTimeOut"), retries=3),
    unknown("503 with RequestTimeOut", error(503, "RequestTimeOut"), retries=3),
]

BODIES = [
    unknown("HTML with 200", html(200), 8, "answer_unusable", retries=2),
    unknown("text with 200", typed(b"OK", "text/plain"), 8, "answer_unusable"),
    unknown("a list", json_answer([1, 2]), 8, "answer_unusable"),
    unknown("a number", json_answer(1), 8, "answer_unusable"),
    unknown("null", json_answer(None), 8, "answer_unusable"),
    no_image("a job instead of a picture", json_answer({"output": {"job_id": "t", "status": "PENDING"}})),
    no_image("output is null", json_answer({"request_id": "r", "output": None})),
    no_image("output is a list", json_answer({"request_id": "r", "output": [1]})),
    no_image("choices is an object", choices({"0": 1})),
    no_image("choices is empty", choices([])),
    no_image("choices of null", choices([None])),
    no_image("choices of strings", choices(["picture"])),
    no_image("message is a string", choices([{"message": "https://example.com/a.png"}])),
    no_image("content is a string", content("https://example.com/a.png")),
    no_image("content is an object", content({"image": "a.png"})),
    no_image("content is empty", content([])),
    no_image("content of a blocked picture", content([{"text": "I cannot draw that"}])),
    no_image("image is a number", content([{"image": 1}])),
    no_image("image is null", content([{"image": None}])),
    no_image("image is a list", content([{"image": [["a.png"]]}])),
    no_image("image is empty", content([{"image": ""}])),
    no_image("image is blank", content([{"image": " \n"}])),
    no_image(
        "all of it is of a wrong type", json_answer({"code": [], "message": {}, "request_id": 1, "output": 1e300})
    ),
    unknown("nothing with 200", Answer()),
    unknown("nothing with 204", Answer(204, framing="close")),
    unknown("JSON that breaks off", good_text(lambda text: text[:60]), billed=1),
    unknown(
        "5 MiB of an answer", typed(b'{"a": "' + b"x" * (5 << 20) + b'"}', "application/json"), 8, "answer_unusable"
    ),
]


@pytest.mark.smoke
@pytest.mark.parametrize("fault", STATUSES + CODES + BODIES, ids=by_name)
def test_an_answer_without_a_picture_means_what_the_contract_says(
    shell: Shell, service: FaultServer, fault: Fault
) -> None:
    service.play(GENERATE, *fault.plays)
    result = run(shell, timeout=fault.timeout, retries=fault.retries)
    assert len(service.posts) == fault.posts
    failed(shell, service, result, exit=fault.exit, code=fault.code, status=fault.status)
    assert service.billed == fault.billed
    assert service.connections == fault.posts, "something else was connected to"


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_of_the_paid_call_is_never_followed_with_the_key(
    shell: Shell, service: FaultServer, elsewhere: FaultServer, status: int
) -> None:
    service.play(GENERATE, redirect(elsewhere.root + GENERATE, status))
    result = run(shell, retries=2)
    failed(shell, service, result, exit=7, code="outcome_unknown", status="unknown")
    assert len(service.posts) == 1
    assert elsewhere.connections == 0


def test_the_paid_call_carries_the_key_once_and_asks_for_no_compression(shell: Shell, service: FaultServer) -> None:
    succeeded(shell, service, run(shell))
    (post,) = service.posts
    assert [value for name, value in post.headers if name == "authorization"] == [f"Bearer {KEY}"]
    assert post.header("accept-encoding") in (None, "identity")
    assert json.loads(post.body)["model"] == "z-image-turbo"


@pytest.mark.parametrize("status", [302, 404, 429, 500, 502])
def test_a_picture_that_is_there_was_made_whatever_status_stands_beside_it(
    shell: Shell, service: FaultServer, status: int
) -> None:
    service.play(GENERATE, good(how=Answer(status)))
    assert run(shell, retries=2).code == 0
    assert [attempt["http_status"] for attempt in shell.evidence()["attempts"]] == [status]
    assert len(service.posts) == 1


@pytest.mark.parametrize("depth", [10_000, 100_000])
def test_an_answer_nested_without_end_is_no_picture(shell: Shell, service: FaultServer, depth: int) -> None:
    """Whether it can be parsed depends on the Python: unknown outcome or no image, both without paying again."""
    service.play(GENERATE, Answer(body=b'{"output":' * depth + b"1" + b"}" * depth))
    result = run(shell, retries=2)
    assert result.code in (7, 8)  # 8 where it can be parsed
    failed(shell, service, result, exit=result.code, code=None, status="unknown")
    assert len(service.posts) == 1


# ---------------------------------------------------------------------------------------------------------------------
# The call that costs money: what the network does
# ---------------------------------------------------------------------------------------------------------------------

CUT = [
    unknown("hang up after reading", good(how=Answer(hang_up="after-reading")), billed=1),
    unknown("reset after reading", good(how=Answer(hang_up="after-reading", reset=True)), billed=1),
    unknown("hang up after the headers", good(how=Answer(cut_after=0)), billed=1),
    unknown("hang up in the body", good(how=Answer(cut_after=60)), billed=1),
    unknown("reset in the body", good(how=Answer(cut_after=60, reset=True)), billed=1),
    unknown("hang up in a chunk", good(how=Answer(cut_after=60, framing="chunked-without-end")), billed=1),
    unknown("a body without length cut", good(how=Answer(cut_after=60, framing="close")), billed=1),
    unknown("Content-Length too short", good(how=Answer(claimed_length=60)), billed=1),
    unknown("Content-Length too long", Answer(body=b'{"output": ', claimed_length=5000, bills=True), billed=1),
    unknown("500 cut in its JSON", replace(error(500, "InternalError"), cut_after=20)),
    unknown("half a status line", Answer(raw=b"HTTP/1.1 20", bills=True), billed=1),
    unknown("garbage for a status line", Answer(raw=b"\x00\xff garbage\r\n\r\n", bills=True), billed=1),
    unknown("a status that is no status", Answer(raw=b"HTTP/1.1 OK 200\r\n\r\n{}", bills=True), billed=1),
    unknown("a status of five digits", Answer(raw=b"HTTP/1.1 20000 OK\r\n\r\n{}", bills=True), billed=1),
    unknown("an unknown HTTP", Answer(raw=b"HTTP/9.9 200 OK\r\n\r\n{}", bills=True), billed=1),
    unknown("HTTP 0.9", Answer(raw=b"<html>hello</html>", bills=True), billed=1),
    unknown("headers without an end", Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Type: a", bills=True), billed=1),
    unknown(
        "too many headers", Answer(raw=b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 500 + b"\r\n{}", bills=True), billed=1
    ),
    unknown("a header without an end", Answer(raw=b"HTTP/1.1 200 OK\r\nA: ", repeat=BLOCK, bills=True), billed=1),
    unknown(
        "100 Continue without an end",
        Answer(raw=b"", repeat=b"HTTP/1.1 100 C\r\n\r\n", bills=True),
        7,
        timeout=2,
        billed=1,
    ),
    unknown("two lengths", good(how=Answer(headers=(("Content-Length", "7"),))), billed=1),
    unknown("chunks of no size", Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n{}")),
    unknown("chunks of a negative size", Answer(raw=b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-5\r\n{}")),
    unknown("gzip that is none", good_text(lambda body: b"\x1f\x8b" + body, headers=GZIP), billed=1),
    unknown("an answer after the timeout", good(how=Answer(delay_s=30)), timeout=1.5, billed=1),
    unknown("dribbled headers", good(how=Answer(dribble_head_s=0.2, quick=30)), timeout=1.5, billed=1),
    unknown("a dribbled body", good(how=Answer(dribble_body_s=0.2)), timeout=1.5, billed=1),
    unknown("dribbled chunks", good(how=Answer(dribble_body_s=0.2, framing="chunked")), timeout=1.5, billed=1),
]


@pytest.mark.smoke
@pytest.mark.parametrize("fault", CUT, ids=by_name)
def test_a_cut_answer_is_unknown_and_never_sent_twice(shell: Shell, service: FaultServer, fault: Fault) -> None:
    service.play(GENERATE, *fault.plays)
    result = run(shell, timeout=fault.timeout, retries=3)
    assert len(service.posts) == fault.posts
    failed(shell, service, result, exit=fault.exit, code=fault.code, status=fault.status)
    assert service.billed == fault.billed
    assert service.connections == 1


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_connection_that_ends_before_the_request_is_read_is_not_tried_again(
    shell: Shell, service: FaultServer, reset: bool
) -> None:
    """From here nobody can tell whether the service had read it."""
    shell.is_first_row = True  # a process: beside the server's threads the reset may come before connect() is over
    service.at_connection(Answer(hang_up="before-reading", reset=reset))
    result = run(shell, retries=3)
    failed(shell, service, result, exit=7, code="outcome_unknown", status="unknown")
    assert service.connections == 1


def test_an_answer_that_comes_before_the_request_is_read_is_believed(shell: Shell, service: FaultServer) -> None:
    service.at_connection(error(401, "InvalidApiKey"))
    failed(shell, service, run(shell), exit=3, code="key_rejected", status="failed")


def test_a_refused_connection_fails_in_seconds_and_costs_nothing(shell: Shell, service: FaultServer) -> None:
    service.close()
    before = service.connections
    result = run(shell, timeout=20, retries=50)
    failed(shell, service, result, exit=6, code="unreachable", status="failed")
    assert service.connections == before


def test_a_service_that_speaks_tls_on_a_plain_port_is_no_picture(shell: Shell, service: FaultServer) -> None:
    shell.env["DASHSCOPE_BASE_URL"] = service.base_url.replace("http:", "https:")
    result = run(shell, timeout=2)
    failed(shell, service, result, exit=6, code="unreachable", status="failed")
    assert not service.posts


# ---------------------------------------------------------------------------------------------------------------------
# Odd answers that still hold a picture: it was paid for, and must not be lost
# ---------------------------------------------------------------------------------------------------------------------


def in_usage(value: bytes) -> Callable[[Received], Answer]:
    return good_text(lambda text: text.replace(b'"image_count": 1', b'"image_count": ' + value))


def gzipped(request: Received) -> Answer:
    body = gzip.compress(json.dumps(good_body(request.root + PICTURE)).encode())
    return Answer(headers=GZIP, body=body, bills=True)


ODD = {
    "status 201": good(how=Answer(201)),
    "chunked": good(how=Answer(framing="chunked")),
    "chunked without an end": good(how=Answer(framing="chunked-without-end")),
    "without a length": good(how=Answer(framing="close")),
    "a length too long": good(how=Answer(claimed_length=100_000)),
    "a length that is no number": good(how=Answer(framing="close", headers=(("Content-Length", "many"),))),
    "gzip that nobody asked for": gzipped,
    "plain, and called gzip": good(how=Answer(headers=GZIP)),
    "a BOM": good_text(lambda text: b"\xef\xbb\xbf" + text),
    "blank lines before": good_text(lambda text: b"\r\n\r\n " + text),
    "a content type of text": good(how=Answer(headers=(("Content-Type", "text/plain"),))),
    "NaN": in_usage(b"NaN"),
    "Infinity": in_usage(b"-Infinity"),
    "1e999": in_usage(b"1e999"),
    "a huge number": in_usage(b"9" * 400),
    "a number of 5000 digits": in_usage(b"9" * 5000),
    "usage is a list": good(usage=[1]),
    "usage nested deeply": in_usage(b"[" * 500 + b"]" * 500),
    "lone surrogates": good_text(lambda text: text.replace(b"req-0001", rb"\ud800x\udfff")),
    "lone surrogates in the text": good(content=[{"image": "LINK"}, {"text": "\ud83d"}]),
    "bytes that are no UTF-8": good_text(lambda text: text.replace(b"req-0001", b"\xff\xfe")),
    "a raw newline in a string": good_text(lambda text: text.replace(b"req-0001", b"a\nb")),
    "a NUL in a string": good_text(lambda text: text.replace(b"req-0001", rb"a\u0000b")),
    "a field twice": good_text(lambda text: text.replace(b'"usage"', b'"request_id": "again", "usage"')),
    "no request id": good(request_id=None),
    "a request id that is an object": good(request_id={"a": 1}),
    "reasoning that is a list": good(reasoning_content=["a", 1]),
    "reasoning as an item": good(content=[{"reasoning_content": "hm"}, {"image": "LINK"}]),
    "items that are no objects": good(content=[None, 1, "a", {"image": None}, {"image": "LINK"}]),
    "blanks around the link": good(content=[{"image": " LINK\n"}]),
    "an empty code beside the picture": good_text(lambda text: b'{"code": "", ' + text[1:]),
    "100 Continue before": lambda request: Answer(
        raw=b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"
        + json.dumps(good_body(request.root + PICTURE)).encode(),
        bills=True,
    ),
}


def with_link(behaviour: Behaviour) -> Behaviour:
    """The behaviour with the word LINK in its body replaced by the link to the picture."""

    def answer(request: Received) -> Answer:
        made = behaviour if isinstance(behaviour, Answer) else behaviour(request)
        return replace(made, body=made.body.replace(b"LINK", (request.root + PICTURE).encode()))

    return answer


@pytest.mark.parametrize("name", ODD, ids=[name.replace(" ", "-") for name in ODD])
def test_an_odd_answer_that_holds_a_picture_is_a_picture(shell: Shell, service: FaultServer, name: str) -> None:
    service.play(GENERATE, with_link(ODD[name]))
    succeeded(shell, service, run(shell))


def test_of_two_pictures_the_first_is_saved_and_a_warning_says_so(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, with_link(good(content=[{"image": "LINK"}, {"image": "LINK?second"}])))
    response = succeeded(shell, service, run(shell))
    assert len(response["warnings"]) == 1
    assert [download.target for download in service.downloads] == [PICTURE]


# ---------------------------------------------------------------------------------------------------------------------
# Trying again
# ---------------------------------------------------------------------------------------------------------------------

UNBILLED = {
    "429": error(429, "Throttling"),
    "429 of a gateway": html(429),
    "500 of the service": error(500, "InternalError"),
    "503 of the service": error(503, "ServiceUnavailable"),
}


@pytest.mark.parametrize("name", UNBILLED)
def test_what_was_surely_not_billed_is_tried_again(shell: Shell, service: FaultServer, name: str) -> None:
    service.play(GENERATE, UNBILLED[name], good())
    succeeded(shell, service, run(shell, retries=1), posts=2)
    attempts = shell.evidence()["attempts"]
    assert [attempt["billed"] for attempt in attempts] == ["no", "yes"]
    assert attempts[0]["wait_s"] > 0


def test_no_more_than_max_retries_are_made(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, error(429, "Throttling"))
    failed(shell, service, run(shell, retries=2), exit=6, code="rate_limited", status="failed")
    assert len(service.posts) == 3
    assert len(shell.evidence()["attempts"]) == 3


def test_no_attempt_starts_that_cannot_end_in_time(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, error(500, "InternalError"))
    started = time.monotonic()
    failed(shell, service, run(shell, timeout=2, retries=100), exit=6, code="service_failing", status="failed")
    assert service.posts[-1].at < started + 2 + SLACK_S / 2
    assert 1 <= len(service.posts) <= 4


def test_an_unknown_outcome_after_a_retry_is_not_hidden_by_it(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, error(429, "Throttling"), good(how=Answer(hang_up="after-reading")), good())
    result = run(shell, retries=4)
    failed(shell, service, result, exit=7, code="outcome_unknown", status="unknown")
    assert (len(service.posts), service.billed) == (2, 1)
    assert [attempt["billed"] for attempt in shell.evidence()["attempts"]] == ["no", "unknown"]


def test_retry_after_in_seconds_is_obeyed(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, error(429, "Throttling", headers=(("Retry-After", "2"),)), good())
    succeeded(shell, service, run(shell, retries=1), posts=2)
    first, second = service.posts
    assert 2 <= second.at - first.at < 6


def test_retry_after_as_a_date_is_obeyed(shell: Shell, service: FaultServer) -> None:
    def answer(_: Received) -> Answer:
        return error(503, "ServiceUnavailable", headers=(("Retry-After", email.utils.formatdate(time.time() + 3)),))

    service.play(GENERATE, answer, good())
    succeeded(shell, service, run(shell, retries=1), posts=2)
    first, second = service.posts
    assert 1.5 <= second.at - first.at < 7


@pytest.mark.parametrize("wait", ["60", "3600", "100000000000", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_a_retry_after_that_does_not_fit_ends_the_run_at_once(shell: Shell, service: FaultServer, wait: str) -> None:
    service.play(GENERATE, error(429, "Throttling", headers=(("Retry-After", wait),)), good())
    started = time.monotonic()
    result = run(shell, timeout=20, retries=4)
    assert time.monotonic() - started < 5
    error_object = failed(shell, service, result, exit=6, code="rate_limited", status="failed")
    assert error_object["retry_after_s"] >= 60
    assert len(service.posts) == 1


@pytest.mark.parametrize("wait", ["soon", "-5", "", "nan", "1e9", "Fri, 99 Foo", "Sat, 01 Jan 2000 00:00:00 GMT"])
def test_a_retry_after_that_says_nothing_useful_does_not_stop_the_retry(
    shell: Shell, service: FaultServer, wait: str
) -> None:
    service.play(GENERATE, error(429, "Throttling", headers=(("Retry-After", wait),)), good())
    succeeded(shell, service, run(shell, retries=1), posts=2)


# ---------------------------------------------------------------------------------------------------------------------
# Texts from outside
# ---------------------------------------------------------------------------------------------------------------------


def escaped(text: str) -> bytes:
    return "".join(f"\\u{ord(sign):04x}" for sign in text).encode()


ECHOES: dict[str, Behaviour] = {
    "message": error(401, "InvalidApiKey", f"Incorrect API key provided: {KEY}."),
    "message of escapes": typed(
        b'{"code": "InvalidApiKey", "message": "%s", "request_id": "r"}' % escaped(KEY), "application/json", 401
    ),
    "percent-encoded": error(400, "InvalidParameter", f"?key={quote(KEY, safe='')}"),
    "code": error(400, f"Invalid.{KEY}"),
    "request id": json_answer({"code": "InvalidApiKey", "message": "no", "request_id": KEY}, 401),
    "request id in a header": html(401, headers=(("X-Request-Id", KEY),)),
    "headers": html(401, headers=(("WWW-Authenticate", f"Bearer {KEY}"), ("Retry-After", KEY))),
    "HTML": html(500, f"Authorization: Bearer {KEY}"),
    "at the cut": error(400, "InvalidParameter", "x" * 490 + KEY + "y" * 490),
    "twice in a row": error(400, "InvalidParameter", KEY + KEY),
    "inside a word": error(400, "InvalidParameter", f"aaa{KEY}zzz"),
    "answer without a picture": json_answer({"output": {"choices": []}, "message": KEY, "request_id": KEY}),
}


@pytest.mark.parametrize("name", ECHOES, ids=[name.replace(" ", "-") for name in ECHOES])
def test_a_service_that_echoes_the_key_in_an_error_does_not_get_it_printed(
    shell: Shell, service: FaultServer, name: str
) -> None:
    service.play(GENERATE, ECHOES[name])
    result = run(shell)
    assert result.code != 0
    assert result.error["evidence_path"]
    always(shell, result)
    assert KEY[:12] not in result.stdout + result.stderr, "the first half of a key is half of a secret"


def test_a_service_that_echoes_the_key_beside_a_picture_does_not_get_it_written(
    shell: Shell, service: FaultServer
) -> None:
    echo = good(
        request_id=KEY,
        usage={KEY: KEY, "deep": [{"a": [KEY]}]},
        reasoning_content=f"I was given {KEY} and\n{quote(KEY, safe='')}",
        content=[{"image": "LINK"}, {"text": f"a cat named {KEY}"}],
    )
    service.play(GENERATE, with_link(echo))
    response = succeeded(shell, service, run(shell, "--prompt-extend"))
    assert response["reasoning"].startswith("I was given ***")
    assert response["rewritten_prompt"] == "a cat named ***"


TRICKS = {
    "colours": "\x1b[31mred\x1b[0m",
    "a title": "\x1b]0;title\x07",
    "eight-bit control": "\x9b31mred",
    "a faked line": "all is well\nnext: rm -rf ~",
    "a carriage return": "all is well\rnext: rm -rf ~",
    "unicode lines": "all is well\u2028next: rm -rf ~\u2029\x85next: more",
    "reversed text": "\u202egnp.exe\u2066",
    "NUL and backspace": "a\x00b\x08\x7f",
    "lone surrogates": "\ud800 and \udfff",
}


@pytest.mark.parametrize("name", TRICKS, ids=[name.replace(" ", "-") for name in TRICKS])
def test_a_message_cannot_play_tricks_on_the_terminal_or_fake_advice(
    shell: Shell, service: FaultServer, name: str
) -> None:
    service.play(GENERATE, error(400, "InvalidParameter", TRICKS[name]))
    result = run(shell)
    said = failed(shell, service, result, exit=2, code="rejected_by_service", status="failed")
    assert not re.search("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]", said["message"])
    assert not re.search("[\u2028-\u202e\u2066-\u2069\x85]", result.stderr)
    assert sum(line.startswith("next: ") for line in result.stderr.splitlines()) == 1


@pytest.mark.parametrize("place", ["message", "code", "request_id"])
def test_a_text_of_a_megabyte_is_cut(shell: Shell, service: FaultServer, place: str) -> None:
    body = {"code": "InvalidParameter", "message": "no", "request_id": "r"}
    body[place] += "Q" * 1_000_000
    service.play(GENERATE, json_answer(body, 400))
    result = run(shell)
    failed(shell, service, result, exit=2, code="rejected_by_service", status="failed")
    written = shell.evidence_files()[0].read_text(encoding="utf-8")
    for text in (result.stdout, result.stderr, written):
        assert max(map(len, re.findall("Q+", text)), default=0) <= 500


# ---------------------------------------------------------------------------------------------------------------------
# The download: it is free, so it is tried again; what it brings is believed only when whole
# ---------------------------------------------------------------------------------------------------------------------


def lost(name: str, *plays: Behaviour, **more: Any) -> Fault:
    """Paid, and not fetched yet: the next command may still get it."""
    return Fault(name, plays, 7, "paid_not_downloaded", "generated", 1, timeout=more.pop("timeout", 2), **more)


def useless(name: str, play: Behaviour, code: str = "image_unusable") -> Fault:
    """Paid, and nothing usable lies behind the link."""
    return Fault(name, (play,), 8, code, "generated", 1)


def as_file(content: bytes) -> Answer:
    return file(content)


EXPIRED = oss_error(403, "AccessDenied", "Request has expired.")
HALF = len(png()) // 2
IEND = 12  # bytes of the last chunk
FLIPPED = bytearray(png())
FLIPPED[HALF] ^= 0xFF
WRONG_CRC = png()[:-16] + bytes([png()[-16] ^ 1]) + png()[-15:]  # of the last IDAT chunk
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 1024 1024\n%%EndComments\nshowpage\n%%EOF\n"

DOWNLOADS = [
    useless("403 expired", EXPIRED, "link_expired"),
    useless("410 expired", oss_error(410, "Gone", "The link has expired"), "link_expired"),
    useless("403 for another reason", oss_error(403, "SignatureDoesNotMatch", "wrong signature"), "link_refused"),
    useless("401", html(401), "link_refused"),
    useless("404", oss_error(404, "NoSuchKey", "no such key"), "link_refused"),
    useless("410", html(410), "link_refused"),
    useless("304", Answer(304, framing="close"), "link_refused"),
    useless("302 without a target", Answer(302), "link_refused"),
    lost("503 always", html(503)),
    lost("hang up always", Answer(hang_up="after-reading")),
    lost("cut always", Answer(body=png(), cut_after=HALF)),
    lost("cut in a chunk always", Answer(body=png(), cut_after=HALF, framing="chunked-without-end")),
    lost("garbage for a status line", Answer(raw=b"\x00\x01\x02\r\n\r\n")),
    lost("headers that break off", Answer(raw=b"HTTP/1.1 200 OK\r\nContent-Type: image/png\r\nConte")),
    lost("no answer in time", Answer(delay_s=30)),
    lost("dribbled headers", Answer(body=png(), dribble_head_s=0.2, quick=30)),
    lost("a dribbled body", Answer(body=png(), dribble_body_s=0.2)),
    lost("gzip that is none", file(b"\x1f\x8b" + png(), headers=GZIP)),
    useless("nothing", Answer()),
    useless("HTML", html(200)),
    useless("text", typed(b"your picture is ready", "text/plain")),
    useless("JSON", json_answer({"image": "here"})),
    useless("random bytes", as_file(bytes(range(256)) * 40)),
    useless("a signature and nothing else", as_file(png()[:8])),
    useless("half a PNG, well framed", as_file(png()[:HALF])),
    useless("half a PNG without a length", Answer(body=png(), cut_after=HALF, framing="close")),
    useless("a PNG without its last byte", as_file(png()[:-1])),
    useless("a PNG without IEND", as_file(png()[:-IEND])),
    useless("a PNG with a flipped byte", as_file(bytes(FLIPPED))),
    useless("a PNG with a wrong checksum", as_file(WRONG_CRC)),
    useless("a PNG that lacks rows", as_file(png_of(1024, 1024, pixels=zlib.compress(bytes(1025 * 500))))),
    useless("a PNG of no pixels", as_file(png_of(0, 0, pixels=b""))),
    useless("half a JPEG", as_file(drawn("JPEG")[: len(drawn("JPEG")) // 2])),
    useless("a JPEG without its end", as_file(drawn("JPEG")[:-2])),
    useless("half a WEBP", as_file(drawn("WEBP")[: len(drawn("WEBP")) // 2])),
    useless("half a GIF", as_file(drawn("GIF")[: len(drawn("GIF")) // 2])),
    useless("a program for Ghostscript", as_file(EPS)),
]


@pytest.mark.smoke
@pytest.mark.parametrize("fault", DOWNLOADS, ids=by_name)
def test_a_failing_download_costs_nothing_more_and_touches_nothing(
    shell: Shell, service: FaultServer, fault: Fault
) -> None:
    (shell.folder / "out.png").write_bytes(OLD_PICTURE)
    service.play(PICTURE, *fault.plays)
    result = run(shell, "--overwrite", timeout=fault.timeout)
    said = failed(shell, service, result, exit=fault.exit, code=fault.code, status=fault.status, before=OLD_PICTURE)
    assert len(service.posts) == 1
    assert 1 <= len(service.downloads) <= 5
    assert said["retryable"] is False, "the same command would pay again"
    assert ("next_command" in said) or fault.exit == 8
    assert all(download.header("authorization") is None for download in service.downloads)


GOOD_IN_THE_END = {
    "500": html(500),
    "429": html(429),
    "a hang up": Answer(hang_up="after-reading"),
    "a reset": Answer(hang_up="after-reading", reset=True),
    "a cut": Answer(body=png(), cut_after=HALF),
    "broken bytes": as_file(png()[:HALF]),
    "HTML": html(200),
}


@pytest.mark.parametrize("name", GOOD_IN_THE_END, ids=[name.replace(" ", "-") for name in GOOD_IN_THE_END])
def test_a_download_that_fails_once_is_tried_again_free(shell: Shell, service: FaultServer, name: str) -> None:
    service.play(PICTURE, GOOD_IN_THE_END[name], file(png()))
    succeeded(shell, service, run(shell))
    assert len(service.downloads) == 2


@pytest.mark.parametrize(
    "play", [html(503), Answer(body=png(), cut_after=HALF), as_file(png()[:HALF])], ids=["503", "cut", "broken"]
)
def test_the_next_command_of_an_error_fetches_the_picture_free_and_without_a_key(
    shell: Shell, service: FaultServer, play: Answer
) -> None:
    service.play(PICTURE, play)
    said = run(shell, timeout=2).error
    service.play(PICTURE, file(png()))
    del shell.env["DASHSCOPE_API_KEY"], shell.env["DASHSCOPE_BASE_URL"]
    words = shlex.split(said["next_command"])
    assert os.path.isabs(words[1])
    done = subprocess.run(
        said["next_command"], shell=True, cwd=shell.home, env=shell.environment(), capture_output=True, timeout=60
    )
    succeeded(shell, service, Result(done.returncode, done.stdout.decode(), done.stderr.decode()))
    assert (shell.folder / "out.png").read_bytes() == png()
    assert all(download.header("authorization") is None for download in service.downloads)


def test_the_download_carries_neither_key_nor_workspace(shell: Shell, service: FaultServer) -> None:
    shell.env["DASHSCOPE_WORKSPACE"] = "ws-secret"
    succeeded(shell, service, run(shell))
    (download,) = service.downloads
    assert KEY not in str(download.headers)
    assert "ws-secret" not in str(download.headers)
    assert download.header("authorization") is None


@pytest.mark.parametrize(("width", "height"), [(1, 1), (512, 512), (1024, 1536), (2048, 2048)])
def test_a_picture_of_another_size_is_saved_with_a_warning(
    shell: Shell, service: FaultServer, width: int, height: int
) -> None:
    service.play(PICTURE, file(png(width, height)))
    response = succeeded(shell, service, run(shell))
    assert (response["width"], response["height"], response["size"]) == (width, height, "1024*1024")
    assert len(response["warnings"]) == 1


@pytest.mark.parametrize("kind", ["JPEG", "WEBP", "GIF"])
def test_a_picture_of_another_format_is_converted_and_both_hashes_are_kept(
    shell: Shell, service: FaultServer, kind: str
) -> None:
    service.play(PICTURE, file(drawn(kind), f"image/{kind.lower()}"))
    response = succeeded(shell, service, run(shell))
    image = shell.evidence()["image"]
    assert (image["format"], image["source_format"]) == ("PNG", kind)
    assert image["sha256"] != image["source_sha256"]
    with Image.open(response["image_path"]) as picture:
        assert picture.format == "PNG"


def test_what_stands_behind_the_end_of_a_png_is_kept_with_it(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, file(png() + b"trailer"))
    succeeded(shell, service, run(shell))
    assert (shell.folder / "out.png").read_bytes() == png() + b"trailer"


def test_no_program_is_started_for_what_a_service_sends(shell: Shell, service: FaultServer) -> None:
    """Pillow hands PostScript to Ghostscript, which is a programming language."""
    tools, called = shell.home / "bin", shell.home / "called"
    tools.mkdir()
    for name in ("gs", "gswin32c", "gswin64c"):
        (tools / name).write_text(f"#!/bin/sh\ntouch {shlex.quote(str(called))}\n")
        (tools / name).chmod(0o755)
    shell.env["PATH"] = f"{tools}{os.pathsep}{os.environ['PATH']}"
    service.play(PICTURE, file(EPS))
    failed(shell, service, run(shell), exit=8, code="image_unusable", status="generated")
    assert not called.exists()


# ---------------------------------------------------------------------------------------------------------------------
# The download: where a link may lead
# ---------------------------------------------------------------------------------------------------------------------

LEADS = {  # links that are refused; PORT is that of a server which must not be reached
    "http to a public host": "http://example.com:PORT/a.png",
    "http to a name like the vendor's": "http://aliyuncs.com.example.com:PORT/a.png",
    "http to a name that ends like the vendor's": "http://evilaliyuncs.com:PORT/a.png",
    "file": "file:///etc/passwd",
    "data": "data:image/png;base64,iVBORw0KGgo=",
    "ftp": "ftp://127.0.0.1:PORT/a.png",
    "no scheme": "picture.png",
    "no host": "https:///a.png",
    "10.x": "https://10.0.0.1:PORT/a.png",
    "192.168.x": "https://192.168.1.1:PORT/a.png",
    "cloud metadata": "http://169.254.169.254/latest/meta-data",
    "the vendor's metadata": "http://100.100.100.200/latest/meta-data",
    "the vendor's metadata over https": "https://100.100.100.200:PORT/a.png",
    "IPv4 in IPv6": "https://[::ffff:10.0.0.1]:PORT/a.png",
    "loopback in IPv6": "http://[::ffff:127.0.0.1]:PORT/a.png",
    "unique local IPv6": "https://[fd00::1]:PORT/a.png",
    "link local IPv6": "https://[fe80::1]:PORT/a.png",
    "0.0.0.0": "http://0.0.0.0:PORT/a.png",
    "unspecified IPv6": "http://[::]:PORT/a.png",
    "loopback as a number": "https://2130706433:PORT/a.png",
    "loopback in short": "https://127.1:PORT/a.png",
    "loopback in octal": "https://0177.0.0.1:PORT/a.png",
    "loopback in hex": "http://0x7f000001:PORT/a.png",
    "multicast": "https://224.0.0.1:PORT/a.png",
    "user info": "http://user:secret@127.0.0.1:PORT/a.png",
    "user info before a public host": "https://dashscope.aliyuncs.com@127.0.0.1:PORT/a.png",
    "a backslash": "http://127.0.0.1:PORT\\@example.com/a.png",
    "a port of no number": "http://127.0.0.1:x/a.png",
    "a port too large": "http://127.0.0.1:99999/a.png",
    "a newline inside": "http://127.0.0.1:PORT/a\nb.png",
    "a blank inside": "http://127.0.0.1:PORT/a b.png",
    "a lone surrogate": "http://127.0.0.1:PORT/\ud800.png",
    "an escape": "http://127.0.0.1:PORT/\x1b[31m.png",
}
REDIRECTED = (
    "http to a public host",
    "file",
    "data",
    "ftp",
    "10.x",
    "cloud metadata",
    "IPv4 in IPv6",
    "0.0.0.0",
    "loopback as a number",
    "user info",
    "a backslash",
)


def refused_before_any_connection(shell: Shell, service: FaultServer, elsewhere: FaultServer) -> None:
    asked = service.connections
    failed(shell, service, run(shell), exit=8, code="hop_refused", status="generated")
    assert elsewhere.connections == 0
    assert len(service.posts) == 1
    assert service.connections - asked == 1 + len(service.downloads)


@pytest.mark.parametrize("name", LEADS, ids=[name.replace(" ", "-") for name in LEADS])
def test_a_link_that_leads_astray_is_refused_before_any_connection(
    shell: Shell, service: FaultServer, elsewhere: FaultServer, name: str
) -> None:
    service.play(GENERATE, good(LEADS[name].replace("PORT", str(elsewhere.port))))
    refused_before_any_connection(shell, service, elsewhere)
    assert not service.downloads


@pytest.mark.parametrize("name", REDIRECTED, ids=[name.replace(" ", "-") for name in REDIRECTED])
def test_a_redirect_that_leads_astray_is_refused_before_any_connection(
    shell: Shell, service: FaultServer, elsewhere: FaultServer, name: str
) -> None:
    service.play(PICTURE, redirect(LEADS[name].replace("PORT", str(elsewhere.port))))
    refused_before_any_connection(shell, service, elsewhere)
    assert len(service.downloads) == 1


@pytest.mark.parametrize(
    "name", ["http to a public host", "cloud metadata", "the vendor's metadata over https", "IPv4 in IPv6", "0.0.0.0"]
)
def test_a_proxy_does_not_open_the_way_to_a_link_that_leads_astray(
    shell: Shell, service: FaultServer, elsewhere: FaultServer, name: str
) -> None:
    shell.env |= dict.fromkeys(("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy"), elsewhere.root)
    service.play(GENERATE, good(LEADS[name].replace("PORT", "443")))
    failed(shell, service, run(shell), exit=8, code="hop_refused", status="generated")
    assert elsewhere.connections == 0


def test_an_http_link_to_the_vendors_storage_is_fetched_over_https(
    shell: Shell, service: FaultServer, elsewhere: FaultServer
) -> None:
    """Seen through a proxy, which refuses: nothing leaves this machine."""
    shell.env |= {"https_proxy": elsewhere.root, "http_proxy": elsewhere.root}
    service.play(GENERATE, good("http://result.oss-cn-beijing.aliyuncs.com/a.png?Expires=4102444800&Signature=s"))
    result = run(shell, timeout=2)
    failed(shell, service, result, exit=7, code="paid_not_downloaded", status="generated")
    asked = {(request.method, request.target) for request in elsewhere.downloads}
    assert asked == {("CONNECT", "result.oss-cn-beijing.aliyuncs.com:443")}
    assert all(KEY not in str(request.headers) for request in elsewhere.downloads)


def hops(service: FaultServer, count: int) -> None:
    """A picture behind `count` redirects."""
    for number in range(1, count):
        service.play(f"/hop/{number}", redirect(f"/hop/{number + 1}", (301, 302, 303, 307, 308)[number % 5]))
    service.play(f"/hop/{count}", file(png()))
    service.play(PICTURE, redirect("/hop/1"))


@pytest.mark.parametrize("count", [1, 5])
def test_a_few_redirects_lead_to_the_picture(shell: Shell, service: FaultServer, count: int) -> None:
    hops(service, count)
    succeeded(shell, service, run(shell))
    assert len(service.downloads) == count + 1
    assert all(download.header("authorization") is None for download in service.downloads)


def test_six_redirects_are_too_many(shell: Shell, service: FaultServer) -> None:
    hops(service, 6)
    failed(shell, service, run(shell), exit=8, code="hop_refused", status="generated")
    assert len(service.downloads) == 6


def test_a_redirect_in_a_circle_ends(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, redirect(PICTURE))
    failed(shell, service, run(shell), exit=8, code="hop_refused", status="generated")
    assert len(service.downloads) == 6


def test_a_redirect_without_scheme_stays_where_it_may(
    shell: Shell, service: FaultServer, elsewhere: FaultServer
) -> None:
    service.play(PICTURE, redirect(f"//127.0.0.1:{elsewhere.port}/img/a.png"))
    succeeded(shell, service, run(shell))
    assert elsewhere.connections == 1


# ---------------------------------------------------------------------------------------------------------------------
# Bombs: time and memory stay bounded
# ---------------------------------------------------------------------------------------------------------------------


# A child's peak begins with the memory of the process that forked it: a small one stands between it and the tests.
MEASURE = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[2:], timeout=90).returncode
with open(sys.argv[1], "w") as report:
    report.write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(code)
"""


def run_measured(shell: Shell, folder: Path, timeout: float) -> tuple[Result, int]:
    """The run, and the most memory that it ever held, in bytes."""
    command = shell.command("--prompt", "x", "--output", "out.png", "--print-response", "--timeout", f"{timeout:g}")
    report = folder / "peak"
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(report), *command],
        cwd=shell.folder,
        env=shell.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=timeout + 30,
        check=False,
    )
    peak = int(report.read_text(encoding="utf-8")) * (1 if sys.platform == "darwin" else 1024)
    return Result(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8")), peak


def ztxt_bomb() -> bytes:
    return png_of(1024, 1024, png_chunk(b"zTXt", b"Comment\0\0" + zlib.compress(bytes(200 << 20))))


def iccp_bomb() -> bytes:
    return png_of(1024, 1024, png_chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(200 << 20))))


def gzip_bomb(size: int) -> bytes:
    target = io.BytesIO()
    with gzip.GzipFile(fileobj=target, mode="wb", compresslevel=9) as packer:
        for _ in range(size >> 20):
            packer.write(bytes(1 << 20))
    return target.getvalue()


BOMBS: dict[str, tuple[Callable[[], Answer], str]] = {
    "a PNG of 50000*50000": (lambda: file(png_of(50_000, 50_000, pixels=zlib.compress(b"\0"))), "image_unusable"),
    "a PNG just below Pillow's own limit": (
        lambda: file(png_of(10_000, 9_500, pixels=zlib.compress(b"\0"))),
        "image_unusable",
    ),
    "a PNG of 2 billion columns": (lambda: file(png_of(2**31 - 1, 1, pixels=zlib.compress(b"\0"))), "image_unusable"),
    "a PNG whose pixels never end": (
        lambda: file(png_of(1024, 1024, pixels=zlib.compress(bytes(300 << 20)))),
        "image_unusable",
    ),
    "a compressed comment": (lambda: file(ztxt_bomb()), ""),  # it is not read, and the picture is whole
    "a compressed colour profile": (lambda: file(iccp_bomb()), "image_unusable"),
    "65 MiB with a length": (lambda: file(BLOCK * 1040), "image_too_large"),
    "a length of 10 GiB": (lambda: Answer(claimed_length=10 << 30, repeat=BLOCK), "image_too_large"),
    "a stream without an end": (lambda: Answer(framing="close", body=png(), repeat=BLOCK), "image_too_large"),
    "gzip of 300 MiB": (
        lambda: Answer(headers=GZIP, body=gzip_bomb(300 << 20)),
        "image_too_large",
    ),
}


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="memory of a process is measured by wait4")
@pytest.mark.parametrize("name", BOMBS, ids=[name.replace(" ", "-") for name in BOMBS])
def test_a_bomb_is_no_picture_and_takes_little_memory(
    shell: Shell, service: FaultServer, tmp_path: Path, name: str
) -> None:
    make, code = BOMBS[name]
    service.play(PICTURE, make())
    result, peak = run_measured(shell, tmp_path, timeout=20)
    if not code:
        assert result.code == 0, result.stderr
    elif name == "a PNG whose pixels never end" and result.code == 0:
        succeeded(shell, service, result)  # a decoder that stops where the picture is full is right, too
    else:
        failed(shell, service, result, exit=8, code=code, status="generated")
    assert peak < PEAK_BYTES, f"{peak >> 20} MiB"
    assert len(service.posts) == 1


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="memory of a process is measured by wait4")
@pytest.mark.parametrize("framing", ["gzip", "endless"])
def test_an_answer_without_an_end_takes_little_memory(
    shell: Shell, service: FaultServer, tmp_path: Path, framing: str
) -> None:
    bomb = Answer(headers=GZIP, body=gzip_bomb(300 << 20))
    endless = Answer(framing="close", body=b'{"output": "', repeat=b"x" * len(BLOCK))
    service.play(GENERATE, bomb if framing == "gzip" else endless)
    result, peak = run_measured(shell, tmp_path, timeout=20)
    failed(shell, service, result, exit=8, code="answer_unusable", status="unknown")
    assert peak < PEAK_BYTES, f"{peak >> 20} MiB"
    assert len(service.posts) == 1
