"""The words for whoever reads only them: errors, dry run and check say the right step, and never one that costs twice.

An agent runs a command blind and does what the last line says; so these tests read what it reads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from batch_helpers import Batch, Gate, by_prompt, parameters_of
from conftest import ROOT, SKILL, TEST_KEY, Shell
from fault_server import GENERATE, PICTURE, Answer, Behaviour, FaultServer, error, file, good, html, oss_error, png
from mock_server import MockServer
from zimage.answers import refused_side
from zimage.batch.ending import billed_in
from zimage.errors import KINDS, Failure
from zimage.evidence import Evidence
from zimage.settle import explained

PRICE = 0.01434
RUN = ("--prompt", "a red fox", "--seed", "7", "--output", "fox.png", "--print-response")


# An error is enough to report --------------------------------------------------------------------------------------

ENDS: dict[str, tuple[Behaviour, Behaviour, float | None]] = {  # generation, picture, US$ told
    "answer lost": (good(how=Answer(hang_up="after-reading")), file(png()), PRICE),
    "page of a gateway": (html(502), file(png()), PRICE),
    "no picture behind the link": (good(), oss_error(404, "NoSuchKey", "not there"), PRICE),
    "refused": (error(400, "InvalidParameter"), file(png()), None),
}


@pytest.mark.smoke
@pytest.mark.parametrize("end", ENDS)
def test_an_error_tells_seed_and_what_may_be_billed(shell: Shell, service: FaultServer, end: str) -> None:
    generation, picture, cost = ENDS[end]
    service.play(GENERATE, generation)
    service.play(PICTURE, picture)
    result = shell.call(*RUN, "--timeout", "20")
    told = result.error
    assert (told["seed"], told.get("estimated_cost")) == (7, cost)
    assert "seed: 7" in result.stderr
    assert (told["billed"] == "no") == (cost is None)


@pytest.mark.parametrize("arguments", [["--recover"], ["--recover", "--output", "copy.webp"]], ids=["same", "copy"])
def test_a_recovery_says_that_its_cost_was_paid_before(
    shell: Shell, service: FaultServer, arguments: list[str]
) -> None:
    service.play(PICTURE, oss_error(404, "NoSuchKey", "not there"), file(png()))
    shell.call(*RUN, "--timeout", "20")
    option, *more = arguments
    for _ in range(2):  # the second time it lies there already
        result = shell.call(option, str(shell.evidence_files()[0]), *more, "--overwrite", "--print-response")
        answer = result.json
        assert (answer["estimated_cost"], answer["paid_before"], len(service.posts)) == (PRICE, True, 1)
        assert "cost nothing more" in result.stderr


def test_what_is_paid_now_is_not_called_paid_before(shell: Shell, service: FaultServer) -> None:
    service.play(PICTURE, file(png()))
    assert "paid_before" not in shell.call(*RUN).json


CHECKS: dict[str, tuple[dict[str, str], Behaviour, set[str]]] = {  # environment, answer, what is known
    "key of another account": ({}, error(401, "InvalidApiKey"), {"provider", "region", "endpoint", "key_source"}),
    "page of a gateway": ({}, html(502), {"provider", "region", "endpoint", "key_source"}),
    "no key": ({"DASHSCOPE_API_KEY": ""}, good(), {"provider", "region", "endpoint"}),
    "no URL": ({"DASHSCOPE_BASE_URL": "https://user:pass@dashscope.aliyuncs.com"}, good(), {"provider"}),
}


@pytest.mark.parametrize("case", CHECKS)
def test_a_failed_check_says_where_and_with_which_key(shell: Shell, service: FaultServer, case: str) -> None:
    env, answer, known = CHECKS[case]
    service.play("/api/v1/models", answer)
    shell.env |= env
    result = shell.call("--check", "--max-retries", "0")
    assert result.error["billed"] == "no"
    told = result.json
    assert told["ok"] is False and "model_listed" not in told
    assert known == told.keys() & {"provider", "region", "endpoint", "key_source"}
    assert told.get("key_source", "") in ("", "environment DASHSCOPE_API_KEY")
    assert TEST_KEY not in result.stdout


# Content safety ----------------------------------------------------------------------------------------------------

REFUSED = {
    "Input data may contain inappropriate content.": "input",
    "Input text data may contain inappropriate content": "input",
    "The prompt contains sensitive words": "input",
    "输入的提示词不合规": "input",
    "Output data may contain inappropriate content.": "output",
    "The generated image was filtered": "output",
    "输出内容不合规": "output",
    "Input or output data may contain inappropriate content.": None,
    "Content safety.": None,
}


@pytest.mark.parametrize(("said", "side"), REFUSED.items())
def test_which_side_was_refused_is_read_from_the_services_words(said: str, side: str | None) -> None:
    assert refused_side(said) == side


@pytest.mark.parametrize(
    ("said", "side"), [("Input text data may contain inappropriate content.", "input"), ("Output data …", "output")]
)
def test_a_refusal_shows_prompt_and_side(shell: Shell, service: FaultServer, said: str, side: str) -> None:
    service.play(GENERATE, error(400, "DataInspectionFailed", said))
    result = shell.call(*RUN)
    told = result.error
    assert (told["exit_code"], told["prompt"], told["refused"], told["billed"]) == (5, "a red fox", side, "no")
    assert "prompt: a red fox" in result.stderr
    assert ("picture was refused, not the prompt" in told["hint"]) == (side == "output")
    assert "user" in told["hint"]


def test_a_refused_prompt_is_shown_in_bounds(shell: Shell, service: FaultServer) -> None:
    service.play(GENERATE, error(400, "DataInspectionFailed"))
    told = shell.run("--prompt", "龙" * 5000, "--print-response").error
    assert told["prompt"] == "龙" * 799 + "…"
    assert "refused" not in told


# Hosts that somebody else names --------------------------------------------------------------------------------------

FOREIGN = [  # in a request; what is told as foreign
    ("http://pictures.example/api/v1", "pictures.example"),
    ("https://pictures.example/api/v1", "pictures.example"),
    ("https://pictures.example/some/other/path", "pictures.example"),
    ("https://pictures.example/api/v1?region=beijing", "pictures.example"),
    ("http://somebody:secret@pictures.example:8080", "pictures.example"),
    ("ftp://pictures.example", "pictures.example"),
    ("pictures.example", "pictures.example"),
    ("http://203.0.113.7/api/v1", "203.0.113.7"),
    ("https://dashscope.aliyuncs.com@pictures.example/api/v1", "pictures.example"),
    ("https://pictures.example\\@dashscope.aliyuncs.com/api/v1", "pictures.example"),
    ("https://dashscope.aliyuncs.com.pictures.example/api/v1", "dashscope.aliyuncs.com.pictures.example"),
    ("http://dashscope-evil.example/api/v1", "dashscope-evil.example"),
]
LEADS_THERE = ("https", "--trust-host", "--base-url", "secret")  # words that advice on a foreign host must not have


@pytest.mark.parametrize(("url", "host"), FOREIGN)
@pytest.mark.parametrize("more", [{}, {"size": "9*9", "quality": "hd"}], ids=["alone", "with other faults"])
def test_a_foreign_host_in_a_request_is_told_as_foreign(
    shell: Shell, service: FaultServer, url: str, host: str, more: dict[str, Any]
) -> None:
    (shell.folder / "brief.json").write_text(json.dumps({"prompt": "a fox", "base_url": url} | more))
    told = shell.call("--file", "brief.json", "--print-response").error
    assert (told["code"], told["exit_code"]) == ("host_not_trusted", 2)
    assert any(f"base_url: {host} is not a host of dashscope" in text for text in told["problems"])
    assert "leave base_url out" in told["hint"] and "tell the user" in told["hint"]
    assert not [word for word in LEADS_THERE if word in told["hint"]]
    assert ("correct what else is named" in told["hint"]) == bool(more)
    assert (service.posts, len(told["problems"])) == ([], 1 + len(more))


@pytest.mark.parametrize("host", ["gpu.example", "192.0.2.7", "dashscope.aliyuncs.com.gpu.example"])
def test_where_a_request_sends_its_prompt_is_told_where_any_server_may_be_asked(shell: Shell, host: str) -> None:
    request = json.dumps({"prompt": "a fox", "base_url": f"https://{host}/v1"})
    plan = shell.call("--provider", "openai", "--request", request, "--dry-run").json
    assert any(f"base_url leads to {host}" in warning for warning in plan["warnings"])
    shell.env["OPENAI_BASE_URL"] = f"https://{host}/v1"
    plan = shell.call("--provider", "openai", "--prompt", "a fox", "--dry-run").json
    assert not any("base_url leads" in warning for warning in plan.get("warnings", ()))


def test_what_is_wrong_with_an_own_host_in_a_request_is_no_reason_to_ask(shell: Shell) -> None:
    for url in ("http://dashscope.aliyuncs.com/api/v1", "https://dashscope.aliyuncs.com/api/v9", "https://"):
        told = shell.run("--request", json.dumps({"prompt": "a fox", "base_url": url}), "--dry-run").error
        assert (told["code"], "leave base_url out" in told["hint"]) == ("invalid_base_url", True)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.csv"])
def test_a_row_that_names_a_host_is_told_so(shell: Shell, name: str) -> None:
    table = "prompt,base_url\na fox,http://pictures.example\n"
    row = json.dumps({"prompt": "a fox", "base_url": "http://pictures.example"})
    (shell.folder / name).write_text(table if name.endswith("csv") else row, encoding="utf-8")
    shell.script = shell.script.with_name("generate_batch.py")
    (told,) = shell.run("--input", name, "--output-dir", "out", "--dry-run").error["problems"]
    assert "base_url: leave it out" in told and "tell the user" in told


@pytest.mark.parametrize(
    "url", ["http://pictures.example/api/v1/x", "https://a:b@pictures.example/", "https://pictures.example"]
)
@pytest.mark.parametrize("option", ["--replay", "--recover"])
def test_a_foreign_host_in_evidence_is_the_users_to_name(
    shell: Shell, service: FaultServer, option: str, url: str
) -> None:
    service.play(PICTURE, oss_error(404, "NoSuchKey", "not there"))
    shell.call(*RUN, "--timeout", "20")
    (path,) = shell.evidence_files()
    data = json.loads(path.read_text(encoding="utf-8")) | {"endpoint": url}
    data |= {"status": "submitted", "task_id": "t-1", "provider": "zimageturbo", "attempts": []}
    del data["response"]
    path.write_text(json.dumps(data), encoding="utf-8")
    shell.env["ZIMAGETURBO_API_KEY"] = TEST_KEY
    told = shell.call(option, str(path), "--print-response").error
    assert (told["code"], "ask the user" in told["hint"], len(service.posts)) == ("host_not_trusted", True, 1)


def test_no_advice_moves_the_key_elsewhere() -> None:
    """To another region or host than the user set: only the user changes that."""
    for code, kind in KINDS.items():
        assert not re.search("own host;|give the base URL|(?<!leave out )--region|--base-url", kind.hint), code
        if "--trust-host" in kind.hint or "region" in kind.hint:
            assert "user" in kind.hint, code


@pytest.mark.parametrize("code", ["InvalidApiKey", "AccessDenied.Unpurchased", "ModelNotFound"])
def test_a_refused_key_is_tried_nowhere_else(shell: Shell, service: FaultServer, code: str) -> None:
    service.play(GENERATE, error(401 if "Key" in code else 403 if "Denied" in code else 404, code))
    hint = shell.call(*RUN).error["hint"]
    assert "tell the user" in hint and "--region" not in hint and "--base-url" not in hint


# Many pictures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("header", ["name;colour;price", "SKU,Title\n"])
def test_columns_of_ones_own_are_told_the_way(shell: Shell, header: str) -> None:
    (shell.folder / "products.csv").write_text(f"{header}\na;b;c\n", encoding="utf-8")
    shell.script = shell.script.with_name("generate_batch.py")
    (told,) = shell.run("--input", "products.csv", "--output-dir", "out", "--dry-run").error["problems"]
    assert "references/batch.md" in told and "new file" in told and "prompt: required" in told


@pytest.fixture
def batch(shell: Shell, service: FaultServer) -> Batch:
    return Batch(shell, service)


def test_a_dry_run_tells_prices_rewriting_and_the_longer_time(batch: Batch) -> None:
    batch.rows("a fox", {"prompt": "an owl", "prompt_extend": True}, "a hare")
    plan = batch.run("--dry-run").json
    assert plan["prices"] == [
        {"pictures": 2, "price": PRICE, "prompt_extend": False},
        {"pictures": 1, "price": 2 * PRICE, "prompt_extend": True},
    ]
    assert (plan["rows_with_prompt_extend"], plan["estimated_cost"]) == (1, round(4 * PRICE, 6))
    plain, extended = (batch.run("--dry-run", flag).json for flag in ("--no-prompt-extend", "--prompt-extend"))
    assert [group["price"] for group in plain["prices"] + extended["prices"]] == [PRICE, 2 * PRICE]
    assert (plain["rows_with_prompt_extend"], extended["rows_with_prompt_extend"]) == (0, 3)
    assert plain["estimated_duration_s"] < plan["estimated_duration_s"] < extended["estimated_duration_s"]
    one = batch.run("--dry-run", "--prompt-extend", "--limit", "1").json["prices"]
    assert one == [{"pictures": 1, "price": 2 * PRICE, "prompt_extend": True}]


@pytest.mark.parametrize(("flag", "sent"), [("--prompt-extend", True), ("--no-prompt-extend", False)])
def test_rewriting_of_a_whole_batch_is_a_flag(batch: Batch, flag: str, sent: bool) -> None:
    batch.rows("a fox", {"prompt": "an owl", "prompt_extend": not sent})
    assert batch.run(flag).code == 0
    assert [parameters_of(post)["prompt_extend"] for post in batch.service.posts] == [sent, sent]
    changed = batch.run().json["error"]  # what was paid for with the flag is not paid for again without it
    assert (changed["code"], len(batch.service.posts)) == ("changed_rows", 2)
    assert batch.run(flag).code == 0 and len(batch.service.posts) == 2


def test_rewriting_is_refused_where_nobody_does_it(batch: Batch) -> None:
    batch.rows("a fox")
    batch.shell.env["OPENAI_BASE_URL"] = "http://127.0.0.1:9/v1"
    told = batch.run("--provider", "openai", "--prompt-extend", "--dry-run").json["error"]
    assert told["code"] == "invalid_rows" and "prompt_extend" in told["message"]


def test_the_first_picture_is_looked_at_before_the_rest(batch: Batch) -> None:
    batch.prompts(5)
    assert "--limit 1" in batch.run("--dry-run").json["next"]
    first = batch.run("--limit", "1")
    assert (first.code, len(batch.service.posts)) == (1, 1)
    assert "look at what was made" in first.json["error"]["hint"] and "without --limit" in first.json["error"]["hint"]
    after = batch.run("--dry-run").json
    assert after["to_make"] == 4 and "--limit 1" not in after["next"] and "tell the user" in after["next"]
    assert batch.run().code == 0
    assert "nothing is left to make" in batch.run("--dry-run").json["next"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--max-cost", "0.001"), "ask the user"),
        (("--limit", "0"), "ask the user"),
        (("--limit", "1"), "then the same"),
    ],
)
def test_a_dry_run_says_what_is_next(batch: Batch, options: tuple[str, ...], said: str) -> None:
    batch.prompts(3)
    assert said in batch.run("--dry-run", *options).json["next"]


def test_a_dry_run_with_problems_leads_to_them(batch: Batch) -> None:
    batch.prompts(3)
    batch.shell.env["DASHSCOPE_API_KEY"] = ""
    plan = batch.run("--dry-run").json
    assert not plan["ok"] and "problems" in plan["next"] and "--limit" not in plan["next"]


def test_what_a_kill_left_unknown_is_told_before_it_is_paid_again(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, by_prompt({"picture 1": gate, "picture 2": gate}))
    batch.prompts(4)
    process = batch.start("--concurrency", "4")
    batch.service.wait_until(lambda: "saved saved" in " ".join(sorted(batch.stored_states().values())))
    batch.kill(process)
    gate.open()
    status = batch.status()
    assert (status["running"], status["unknown"], status.get("in_flight")) == (False, 2, None)
    assert "cut off: 2" in status["next"] and "ask the user" in status["next"]
    before = batch.files()
    plan = batch.run("--dry-run").json
    assert batch.files() == before
    assert plan["stays_unknown"] == {"pictures": 2, "lines": [2, 3], "retry_cost": 2 * PRICE}
    assert plan["to_make"] == 0 and "ask the user" in plan["next"]
    retry = batch.run("--dry-run", "--retry-unknown").json
    assert ("stays_unknown" in retry, retry["to_make"], retry["estimated_cost"]) == (False, 2, 2 * PRICE)
    result = batch.run()
    told = result.json["error"]
    assert (told["billed"], "may have been billed" in told["hint"], len(batch.service.posts)) == ("unknown", True, 4)
    assert "ask the user before --retry-unknown" in result.stderr
    assert batch.run("--dry-run").json["stays_unknown"]["lines"] == [2, 3]


# What a row suffers; what the error of the run says of the money.
LEFT: dict[str, tuple[Behaviour, Behaviour, str]] = {
    "answer lost": (good(how=Answer(hang_up="after-reading")), file(png(512, 512)), "unknown"),
    "not downloaded": (good(), oss_error(404, "NoSuchKey", "not there"), "yes"),
    "refused": (error(400, "DataInspectionFailed"), file(png(512, 512)), "no"),
}


@pytest.mark.parametrize("case", LEFT)
def test_the_error_of_a_batch_is_true_of_the_money(batch: Batch, case: str) -> None:
    generation, picture, billed = LEFT[case]
    batch.service.play(GENERATE, generation)
    batch.service.play(PICTURE, picture)
    batch.rows("a fox")
    told = batch.run("--timeout", "10").json["error"]
    assert (told["code"], told["billed"]) == ("incomplete", billed)
    assert ("may have been billed" in told["hint"]) == (billed == "unknown")


@pytest.mark.parametrize(
    ("states", "billed"),
    [({"saved": 3, "pending": 1}, "no"), ({"generated": 1, "unknown": 1}, "unknown"), ({"submitted": 1}, "unknown")],
)
def test_what_is_left_says_what_is_billed(states: dict[str, int], billed: str) -> None:
    assert billed_in(states) == billed


def test_a_folder_on_which_nobody_works_says_what_is_next(batch: Batch) -> None:
    batch.service.play(GENERATE, error(400, "DataInspectionFailed"), good())
    batch.rows("a fox", "an owl", "a hare")
    batch.run("--limit", "1")
    assert "the same command goes on" in batch.status()["next"]
    batch.run()
    assert "say" in batch.status()["next"] and "goes on" not in batch.status()["next"]


def test_where_nothing_costs_no_word_is_of_money(shell: Shell) -> None:
    with MockServer(rpm=0, faults="hangup-after*inf") as mock:
        shell.use(mock)
        told = shell.run(*RUN, "--provider", "openai", "--max-retries", "0").error
    assert (told["billed"], told["seed"], "estimated_cost" in told) == ("unknown", 7, False)


def test_an_unknown_price_is_told_as_none(tmp_path: Path) -> None:
    data: Any = {"status": "unknown", "billable": True, "attempts": [{"at": "2026-01-01T00:00:00.000Z"}]}
    data |= {"request": {"prompt": "a fox", "seed": 7}, "cost": {"basis": "price unknown"}}
    told = explained(Evidence(tmp_path / "x.json", data), Failure("outcome_unknown", "lost")).fault.as_json()
    assert (told["seed"], "estimated_cost" in told) == (7, False)


def test_what_a_kill_left_at_a_free_server_is_simply_made_again(batch: Batch) -> None:
    with MockServer(rpm=0, latency=30) as slow:
        batch.shell.env["OPENAI_BASE_URL"] = slow.openai_url
        batch.prompts(2)
        process = batch.start("--provider", "openai", "--concurrency", "1")
        batch.service.wait_until(lambda: "submitting" in batch.stored_states().values())
        batch.kill(process)
        status, plan = batch.status(), batch.run("--provider", "openai", "--dry-run").json
    assert (status["pending"], status["unknown"], "billed" in status["next"]) == (2, 0, False)
    assert (plan["to_make"], "stays_unknown" in plan, "billed" in plan["next"]) == (2, False, False)


# What an agent reads first -------------------------------------------------------------------------------------------

SKILL_MD = " ".join((SKILL / "SKILL.md").read_text(encoding="utf-8").split())
SAID = {  # what has misled agents: what SKILL.md says of it now
    "a stranger's host": ["`host_not_trusted`: leave that `base_url` out, tell the user"],
    "an endpoint from a variable": ["pass on a warning about the endpoint before paying"],
    "another region": [
        "A key belongs to one (401 in the other): the user says which",
        "no `--region` or `--base-url` unasked",
    ],
    "a wrong subject": ["Wrong subject or a placeholder: stop, say so, ask before a second"],
    "many at once": ["One first:", "--limit 1`", "Look. Wrong: stop, ask."],
    "columns of one's own": ["Other columns: make prompts of them in a new file (`references/batch.md`)"],
    "rewriting of many": ["`--prompt-extend` (of a batch too) costs double"],
    "unknown rows": ["what stays unknown", "`--retry-unknown` only with the user's consent"],
    "an unknown outcome": ["tell seed and cost, ask before paying again"],
    "a recovery's cost": ["`paid_before`: not again"],
    "a refusal": ["show the user `prompt` and `refused` side; reword only with consent"],
    "a file of the user's": ["`zimage-request-1.json` (a name that no file has)"],
    "editing": [
        "a picture edited, upscaled or read; video | cannot be done here: say so, offer a new picture from words"
    ],
}


@pytest.mark.parametrize("subject", SAID)
def test_skill_md_says_what_to_do(subject: str) -> None:
    assert [words for words in SAID[subject] if words not in SKILL_MD] == []


def test_no_document_writes_to_a_name_that_may_be_the_users() -> None:
    """What an example writes has a name of this skill's own, or lies in its folder."""
    for path in [SKILL / "SKILL.md", *sorted((SKILL / "references").glob("*.md")), *sorted(ROOT.glob("README*.md"))]:
        text = path.read_text(encoding="utf-8")
        blocks = "".join(re.findall(r"(?ms)^```bash\n(.*?)^```", text))
        written = re.findall(r"(?<![-=])> ?([\w./$-]+\.\w+)", blocks)
        written += re.findall(r'open\("([^"]+)", "w"', text) + re.findall(r"write `([^`]+)` \(", text)
        assert [name for name in written if not name.startswith(("zimage-", "output/"))] == [], path.name
        assert "request.json" not in text.replace("zimage-request", "")
