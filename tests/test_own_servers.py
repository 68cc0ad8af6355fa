"""Servers of one's own and gateways in front of them: what costs nothing is made again, and the record is true."""

from __future__ import annotations

import base64
import contextlib
import json
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from batch_helpers import BATCH, Batch, Gate, assert_counts, posix
from conftest import TEST_KEY, Result, Shell
from fault_server import Answer, Behaviour, FaultServer, Received, drawn, file, html, json_answer, redirect, typed

POST, MODELS = "/v1/images/generations", "/v1/models"
COST_WORDS = ("cost", "paid", "pay", "bill", "US$")


@pytest.fixture
def server() -> Iterator[FaultServer]:
    with FaultServer() as server:
        server.play(POST, picture)
        yield server


@pytest.fixture
def own(shell: Shell, server: FaultServer) -> Own:
    shell.env["OPENAI_BASE_URL"] = f"{server.root}/v1"
    return Own(shell, server)


def picture_of(seed: int) -> bytes:
    return drawn("PNG", 512, 512, f"#{seed % 2**24:06x}")


def picture(request: Received) -> Answer:
    """What an honest server answers: another seed, another picture."""
    content = picture_of(json.loads(request.body).get("seed", 0))
    return json_answer({"created": 1, "data": [{"b64_json": base64.b64encode(content).decode()}]})


@dataclass
class Own:
    """The command for one picture, and that for many, at a server of one's own."""

    shell: Shell
    server: FaultServer
    count: int = 0

    def make(self, *options: str, prompt: str = "a fox") -> Result:
        self.count += 1
        name = f"{self.count}.png"
        size = ("--size", "512x512")
        return self.shell.call(
            "--provider", "openai", "--prompt", prompt, *size, "--output", name, "--print-response", *options
        )

    def batch(self, *options: str, variants: int = 3) -> Result:
        batch = Batch(self.shell, self.server)
        batch.rows({"prompt": "a fox", "id": "fox"})
        return batch.run("--provider", "openai", "--variants", str(variants), *options)

    @property
    def results(self) -> list[dict[str, Any]]:
        return Batch(self.shell, self.server).results()

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [json.loads(request.body) for request in self.server.posts]


@dataclass
class OneByOne:
    """A server that works on so many calls at once and lets all others wait; it goes on where nobody waits any more."""

    seconds: float
    slots: int = 1
    line: threading.Semaphore = field(init=False)

    def __post_init__(self) -> None:
        self.line = threading.Semaphore(self.slots)

    def __call__(self, request: Received) -> Answer:
        with self.line:
            time.sleep(self.seconds)
        return picture(request)


# What costs nothing is made again -------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("slots", [1, 3])
def test_a_server_that_works_one_by_one_loses_none_of_thirty(own: Own, slots: int) -> None:
    """Ten seconds a picture and the usual 100 s of time-out, a hundred and twenty times as fast."""
    own.server.play(POST, OneByOne(0.08, slots))
    result = own.batch("--timeout", "1", "--no-gallery", variants=30)
    assert_counts(result, saved=30)
    assert (result.code, len(own.server.posts)) == (0, 30)


LOST: dict[str, Behaviour] = {
    "hang-up": Answer(hang_up="after-reading"),
    "502": html(502),
    "503": html(503, "Service Temporarily Unavailable"),
    "504": typed(b"upstream request timeout", "text/plain", 504),
    "500 of no server": html(500),
    "cut": Answer(body=b'{"created": 1, "da', claimed_length=500),
}


@pytest.mark.parametrize("name", LOST)
def test_an_answer_that_is_lost_is_asked_for_again_where_that_is_free(own: Own, name: str) -> None:
    own.server.play(POST, LOST[name], picture)
    result = own.make("--timeout", "20")
    assert (result.code, len(own.server.posts)) == (0, 2)
    evidence = own.shell.evidence()
    assert [attempt["outcome"] for attempt in evidence["attempts"]] == ["outcome_unknown", "generated"]
    assert not any(word in result.stderr.lower() for word in COST_WORDS)


@pytest.mark.parametrize("name", ["hang-up", "503"])
def test_a_row_that_is_lost_is_sent_again_in_the_same_run(own: Own, name: str) -> None:
    own.server.play(POST, LOST[name], LOST[name], picture)
    result = own.batch("--timeout", "20")
    assert_counts(result, saved=3)
    assert (result.code, len(own.server.posts)) == (0, 5)


def test_more_gateway_pages_than_there_are_retries_are_waited_out(own: Own) -> None:
    own.server.play(POST, *[html(502, headers=(("Retry-After", "0"),))] * 7, picture)
    assert own.make("--timeout", "60").code == 0
    assert len(own.server.posts) == 8


@pytest.mark.parametrize(("retries", "calls"), [("0", 1), ("1", 2)])
def test_the_users_number_of_retries_holds_for_them_too(own: Own, retries: str, calls: int) -> None:
    own.server.play(POST, html(502))
    error = own.make("--max-retries", retries, "--timeout", "20").error
    assert (error["exit_code"], error["code"], error["retryable"]) == (7, "outcome_unknown", True)
    assert not any(word in error["hint"] + error["message"] for word in ("US$", "pay", "bill"))
    assert len(own.server.posts) == calls
    assert own.shell.evidence()["status"] == "unknown"


def test_a_run_against_a_server_that_stays_away_leaves_all_to_the_next(own: Own) -> None:
    own.server.play(POST, html(502))
    result = own.batch("--time-limit", "5", "--timeout", "4")
    assert result.code == 11
    assert_counts(result, pending=3)
    own.server.play(POST, picture)
    assert_counts(own.batch(), saved=3)


def test_a_run_that_was_killed_makes_what_was_out_again_without_a_question(own: Own) -> None:
    gate = Gate(picture)
    own.server.play(POST, gate)
    batch = Batch(own.shell, own.server)
    batch.rows({"prompt": "a fox", "id": "fox"})
    options = ("--provider", "openai", "--variants", "3")
    process = batch.start(*options)
    own.server.wait_until(lambda: gate.arrived)
    batch.kill(process)
    gate.open()
    own.server.play(POST, picture)
    result = batch.run(*options)
    assert_counts(result, saved=3)
    assert not any(word in result.stderr for word in ("billed", "costs", "unknown;"))


def test_rows_that_an_older_version_left_unknown_are_made_again(own: Own) -> None:
    own.server.play(POST, LOST["hang-up"])
    own.batch("--max-retries", "0", "--timeout", "3")
    own.shell.script = BATCH
    with sqlite(own) as database:
        database.execute("UPDATE pictures SET state = 'unknown', paid = 1, facts = '{}'")
    own.server.play(POST, picture)
    assert_counts(own.batch(), saved=3)


def sqlite(own: Own) -> Any:

    return contextlib.closing(sqlite3.connect(own.shell.folder / "out" / "batch.sqlite3", isolation_level=None))


@posix
def test_a_signal_while_the_request_is_out_speaks_of_no_cost_either(own: Own) -> None:
    gate = Gate(picture)
    own.server.play(POST, gate)
    process = own.shell.start("--provider", "openai", "--prompt", "a fox", "--output", "fox.png", "--print-response")
    own.server.wait_until(lambda: gate.arrived)
    process.terminate()
    result = own.shell.finish(process, 30)
    gate.open()
    assert result.code == 143
    (path,) = own.shell.evidence_files()
    recovered = own.shell.run("--recover", str(path), "--base-url", f"{own.server.root}/v1", "--print-response")
    for error in (result.error, recovered.error):
        assert not any(word in error["hint"] + error["message"] for word in ("pay", "bill", "US$"))


@pytest.mark.parametrize("answer", [json_answer({"created": 1, "data": []}), typed(b"<html>hello</html>", "text/html")])
def test_what_would_be_answered_so_again_is_not_sent_again(own: Own, answer: Answer) -> None:
    own.server.play(POST, answer)
    assert own.make("--timeout", "10").error["exit_code"] == 8
    assert len(own.server.posts) == 1


# What a server says it is, and what it uses ---------------------------------------------------------------------------


def models(owner: str | None, *ids: str, **fields: Any) -> Answer:
    listed = [{"id": name, "object": "model"} | ({"owned_by": owner} if owner else {}) for name in ids]
    return json_answer({"object": "list", "data": listed}, **fields)


def tagged(body: dict[str, Any]) -> dict[str, Any]:
    """What stands in stable-diffusion.cpp's tag."""
    text = body["prompt"].partition("<sd_cpp_extra_args>")[2].removesuffix("</sd_cpp_extra_args>")
    said = json.loads(text)
    assert isinstance(said, dict)
    return said


def in_kwargs(body: dict[str, Any]) -> dict[str, Any]:
    said = json.loads(body["kwargs"])
    assert isinstance(said, dict)
    return said


MADE_FOR = {"seed": 7, "num_inference_steps": 9, "guidance_scale": 0.0}
OTHER_GETS: dict[str, dict[str, Behaviour]] = {
    "localai": {"/readyz": Answer(body=b"OK")},
    "sd-server": {"/sdcpp/v1/capabilities": json_answer({"model": {}, "limits": {"max": 4096}})},
}
DIALECTS: dict[str, tuple[Answer, Callable[[dict[str, Any]], dict[str, Any]], dict[str, Any]]] = {
    "vllm": (models("vllm", "Tongyi-MAI/Z-Image-Turbo"), dict, MADE_FOR),
    "sglang": (models("sglang", "Tongyi-MAI/Z-Image-Turbo"), dict, MADE_FOR | {"output_format": "png"}),
    "xinference": (models("xinference", "my-z-image", "qwen"), in_kwargs, MADE_FOR),
    "sd-server": (
        Answer(404),
        tagged,
        {"seed": 7, "sample_params": {"sample_steps": 8, "guidance": {"txt_cfg": 1.0}}},
    ),
    "sd-server by its model": (
        json_answer({"data": [{"id": "sd-cpp-local", "object": "model", "owned_by": "local"}]}),
        tagged,
        {"seed": 7, "sample_params": {"sample_steps": 8, "guidance": {"txt_cfg": 1.0}}},
    ),
    "localai": (models(None, "z-image", "whisper"), dict, {"seed": 7, "step": 8, "model": "z-image"}),
    "koboldcpp": (models("koboldcpp", "koboldcpp/z"), dict, {"seed": 7, "steps": 8, "cfg_scale": 1.0}),
}


@pytest.mark.parametrize("name", DIALECTS)
def test_a_server_gets_the_models_settings_in_its_own_words(own: Own, name: str) -> None:
    listed, read, expected = DIALECTS[name]
    own.server.play(MODELS, listed)
    own.server.play(POST, Answer(body=picture_answer()))
    for path, behaviour in OTHER_GETS.get(name, {}).items():
        own.server.play(path, behaviour)
    response = own.make("--seed", "7").json
    (body,) = own.bodies
    sent = read(body)
    assert sent | expected == sent
    assert response["seed"] == 7
    assert ["sdapi" in text for text in response.get("warnings", [])] == [True] * name.startswith("sd-server")
    if name in ("localai", "koboldcpp"):
        assert "num_inference_steps" not in body


def picture_answer() -> bytes:
    content = base64.b64encode(picture_of(7)).decode()
    return json.dumps({"created": 1, "data": [{"b64_json": content}]}).encode()


def test_a_server_that_takes_no_seed_leaves_none_on_record(own: Own) -> None:
    own.server.play(MODELS, models("mfluxible", "z-image-turbo"))
    response = own.make("--seed", "7").json
    (body,) = own.bodies
    assert body["model"] == "z-image-turbo"
    assert not {"seed", "num_inference_steps", "guidance_scale"} & body.keys()
    assert "seed" not in response
    assert "seed" in response["warnings"][0]
    evidence = own.shell.evidence()
    assert "seed" not in evidence["request"]
    assert evidence["unused"] == ["seed", "steps", "guidance"]
    assert not {"steps", "guidance"} & evidence.get("settings", {}).keys()


def test_in_a_batch_neither(own: Own) -> None:
    own.server.play(MODELS, models("mfluxible", "z-image-turbo"))
    assert own.batch().code == 0
    assert all("seed" not in result and result["state"] == "saved" for result in own.results)
    assert [request.path for request in own.server.requests].count(MODELS) == 1


@pytest.mark.parametrize(
    "listed",
    [Answer(404), models("somebody", "z-image"), html(200), Answer(hang_up="after-reading"), Answer(401), Answer(302)],
)
def test_of_an_unknown_server_the_seed_is_told_as_not_confirmed(own: Own, listed: Answer) -> None:
    own.server.play(MODELS, listed)
    response = own.make("--seed", "7").json
    assert own.bodies[0]["seed"] == response["seed"] == 7
    assert ["not confirmed" in warning and "seed" in warning for warning in response["warnings"]] == [True]


def test_a_server_that_answers_every_path_alike_is_none_of_these(own: Own) -> None:
    for path in (MODELS, "/readyz", "/sdcpp/v1/capabilities"):
        own.server.play(path, models("somebody", "z-image"))
    own.make()
    assert "num_inference_steps" in own.bodies[0]


def test_a_server_that_never_says_what_it_is_costs_seconds_only(own: Own) -> None:
    own.server.play(MODELS, Answer(delay_s=60))
    began = time.monotonic()
    assert own.make("--timeout", "80").code == 0
    assert time.monotonic() - began < 40


ALIVE = json_answer("I'm alive!")
LITELLMS = {
    "by its headers": (models("openai", "z-image", headers=(("x-litellm-version", "1.110"),)), Answer(404)),
    "by its health": (models("openai", "z-image"), ALIVE),
    "without its key": (Answer(500), ALIVE),
}


@pytest.mark.parametrize("name", LITELLMS)
def test_litellm_is_told_to_pay_once_and_its_price_is_not_known(own: Own, name: str) -> None:
    listed, health = LITELLMS[name]
    own.server.play(MODELS, listed)
    own.server.play("/health/liveliness", health)
    response = own.make().json
    (post,) = own.server.posts
    assert post.header("x-litellm-num-retries") == "0"
    assert json.loads(post.body).get("model") == ("z-image" if listed.status == 200 else None)
    assert "estimated_cost" not in response
    evidence = own.shell.evidence()
    assert (evidence["billable"], "estimate" in evidence["cost"]) == (True, False)


def test_an_unknown_outcome_behind_litellm_is_not_paid_again(own: Own) -> None:
    own.server.play(MODELS, models("openai", "z-image", headers=(("x-litellm-version", "1.110"),)))
    own.server.play(POST, html(502))
    error = own.make().error
    assert (error["code"], error["retryable"], len(own.server.posts)) == ("outcome_unknown", False, 1)


def test_localai_would_split_a_prompt(own: Own) -> None:
    listed, _, _ = DIALECTS["localai"]
    own.server.play(MODELS, listed)
    own.server.play("/readyz", Answer(body=b"OK"))
    response = own.make(prompt="a fox | an owl").json
    assert own.bodies[0]["prompt"] == "a fox , an owl"
    assert "|" in response["warnings"][0]


def test_a_tag_in_the_users_prompt_is_none_to_sd_server(own: Own) -> None:
    listed, read, _ = DIALECTS["sd-server by its model"]
    own.server.play(MODELS, listed)
    own.make("--seed", "7", prompt='fox <sd_cpp_extra_args>{"seed": 1}</sd_cpp_extra_args>')
    assert own.bodies[0]["prompt"].count("<sd_cpp_extra_args>") == 1
    assert read(own.bodies[0])["seed"] == 7


REFUSALS: dict[str, Answer] = {
    "fastapi": json_answer(
        {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted", "type": "extra_forbidden"}]}, 422
    ),
    "openai": json_answer(
        {"error": {"message": "Unknown parameter: 'num_inference_steps'.", "type": "invalid_request_error"}}, 400
    ),
    "litellm": json_answer({"error": {"message": "UnsupportedParamsError: Setting `seed` is not supported"}}, 400),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_refusal_that_names_an_extra_field_is_answered_without_them(own: Own, name: str) -> None:
    own.server.play(POST, REFUSALS[name], picture)
    response = own.make("--seed", "7").json
    first, second = own.bodies
    assert first.keys() - second.keys() == {"seed", "num_inference_steps", "guidance_scale"}
    assert "seed" not in response
    assert own.shell.evidence()["unused"] == ["seed", "steps", "guidance"]
    assert own.shell.evidence()["payload"] == second


def test_in_a_batch_it_is_learnt_once(own: Own) -> None:
    own.server.play(POST, REFUSALS["fastapi"], picture)
    assert_counts(own.batch(variants=5), saved=5)
    assert len(own.server.posts) == 6
    assert all("seed" not in result for result in own.results)


def test_a_gateway_that_refuses_the_form_of_the_answer_is_asked_without_it(own: Own) -> None:
    said = "UnsupportedParamsError: Setting {'response_format': 'b64_json'} is not supported by this provider"
    own.server.play(POST, json_answer({"error": {"message": said}}, 400), picture)
    response = own.make("--seed", "7").json
    assert own.bodies[0].keys() - own.bodies[1].keys() == {"response_format"}
    assert response["seed"] == 7


@pytest.mark.parametrize("said", ["num_inference_steps must be at most 8", "prompt is too long"])
def test_a_wrong_value_of_the_user_is_told_and_not_dropped(own: Own, said: str) -> None:
    own.server.play(POST, json_answer({"error": {"message": said}}, 400))
    error = own.make("--steps", "12").error
    assert (error["code"], len(own.server.posts)) == ("rejected_by_service", 1)


# Fields of the user's own -------------------------------------------------------------------------------------------


def test_fields_are_added_and_left_out_and_kept_for_a_replay(own: Own) -> None:
    options = ("--body", "quality=high", "--body", 'lora={"name": "ink"}', "--omit", "response_format")
    plan = own.make(*options, "--dry-run").json
    assert plan["payload"] | {"quality": "high", "lora": {"name": "ink"}} == plan["payload"]
    assert "response_format" not in plan["payload"]
    own.make(*options)
    (path,) = own.shell.evidence_files()
    own.shell.run("--replay", str(path), "--output", "again.png")
    first, second = own.bodies
    assert first == second and first["quality"] == "high" and "response_format" not in first


@pytest.mark.parametrize("option", ["seed", "num_inference_steps", "guidance_scale"])
def test_what_is_left_out_is_not_recorded_as_used(own: Own, option: str) -> None:
    response = own.make("--omit", option, "--seed", "7").json
    evidence = own.shell.evidence()
    assert option not in own.bodies[0]
    name = {"num_inference_steps": "steps", "guidance_scale": "guidance"}.get(option, option)
    assert evidence["unused"] == [name]
    assert name not in evidence["settings"]
    assert ("seed" in response) == (name != "seed")


@pytest.mark.parametrize(
    ("option", "value", "way"),
    [
        ("--body", "prompt=an owl", "prompt"),
        ("--body", "model=x", "--model"),
        ("--body", "seed=5", "--seed"),
        ("--body", "n=4", "one picture"),
        ("--body", "quality", "NAME=JSON"),
        ("--body", 'user="\\ud800"', "plain text"),
        ("--body", "a b=1", "name of a field"),
        ("--body", "api_key=sk-x", "no key"),
        ("--omit", "prompt", "without"),
        ("--price", "-1", "price"),
    ],
)
def test_what_they_may_not_touch_is_said(own: Own, option: str, value: str, way: str) -> None:
    error = own.make(f"{option}={value}").error
    assert (error["exit_code"], error["code"]) == (2, "usage")
    assert way in error["message"]
    assert not own.server.requests


def test_another_field_is_another_picture_for_a_batch_and_another_price_is_not(own: Own) -> None:
    assert own.batch("--body", "quality=high").code == 0
    assert own.batch("--body", "quality=high", "--price", "0").code == 0
    assert own.batch("--body", "quality=low").json["error"]["code"] == "changed_rows"


# What a picture costs ------------------------------------------------------------------------------------------------

PLACES = [
    ("http://127.0.0.1:8000/v1", 0.0),
    ("http://localhost:8000/v1", 0.0),
    ("http://[::1]:8000/v1", 0.0),
    ("http://192.168.1.20:8000/v1", 0.0),
    ("http://10.0.0.3/v1", 0.0),
    ("http://169.254.3.4/v1", 0.0),
    ("http://[fe80::1]/v1", 0.0),
    ("http://gpu-box.local:8000/v1", 0.0),
    ("https://api.siliconflow.com/v1", None),
    ("https://gateway.example.com/v1", None),
    ("http://8.8.8.8/v1", None),
    ("http://local/v1", None),
    ("https://notlocal.example/v1", None),
]


@pytest.mark.parametrize(("url", "cost"), PLACES)
def test_only_a_machine_of_ones_own_is_free(shell: Shell, url: str, cost: float | None) -> None:
    options = ("--provider", "openai", "--base-url", url, "--prompt", "a fox", "--dry-run")
    plan = shell.run(*options).json
    assert (plan["estimated_cost"], plan["billable"]) == (cost, cost is None)
    assert ("--price" in plan["cost_basis"]) == (cost is None)
    plan = shell.run(*options, "--price", "0.005").json
    assert (plan["estimated_cost"], plan["billable"]) == (0.005, True)
    plan = shell.run(*options, "--price", "0").json
    assert (plan["estimated_cost"], plan["billable"]) == (0.0, False)


def test_a_ceiling_needs_the_price(own: Own) -> None:
    own.shell.env["OPENAI_BASE_URL"] = "https://gateway.example.com/v1"
    error = own.batch("--max-cost", "1", "--dry-run").error
    assert (error["exit_code"], error["code"]) == (2, "usage")
    assert "--price" in error["hint"]
    plan = own.batch("--max-cost", "1", "--dry-run", "--price", "0.3", variants=5).json
    assert (plan["to_make"], plan["billable"]) == (3, True)
    assert "estimated_cost" not in own.batch("--dry-run").json


def test_a_ceiling_before_litellm_on_this_machine_too(own: Own) -> None:
    own.server.play(MODELS, models("openai", "z-image", headers=(("x-litellm-version", "1.110"),)))
    assert own.batch("--max-cost", "1").json["error"]["code"] == "usage"
    assert not own.server.posts
    assert own.batch("--max-cost", "1", "--price", "0.25").json["estimated_cost"] == 0.75


def test_a_batch_tells_what_it_does_not_know(own: Own) -> None:
    own.server.play(MODELS, models("openai", "z-image", headers=(("x-litellm-version", "1.110"),)))
    result = own.batch()
    assert result.code == 0, result.stdout
    assert not {"estimated_cost"} & {*result.json, *result.json["this_run"]}
    assert "--price" in " ".join(result.json["warnings"])
    assert all("estimated_cost" not in row for row in own.results)


# Addresses, models, links --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", ["/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models"])
def test_the_address_of_another_call_is_named_as_that(own: Own, ending: str) -> None:
    error = own.make("--base-url", own.server.root + ending).error
    assert (error["exit_code"], error["code"]) == (2, "invalid_base_url")
    assert ending in error["message"] and f"{own.server.root}/v1 " in error["hint"] + " "
    assert not own.server.requests


@pytest.mark.parametrize(
    "answer",
    [
        json_answer({"error": {"message": "no such model", "code": "model_not_found"}}, 404),
        json_answer({"detail": "Model mismatch: expected my-z-image"}, 400),
        json_answer({"error": {"message": "Model `x` does not exist", "type": "NotFoundError"}}, 404),
    ],
)
def test_a_missing_model_leads_to_the_option(own: Own, answer: Answer) -> None:
    own.server.play(MODELS, models("vllm", "my-z-image", "other"))
    own.server.play(POST, answer)
    error = own.make().error
    assert error["exit_code"] == 2
    assert "--model" in error["hint"] and "my-z-image" in error["hint"]


def guarded(request: Received) -> Answer:
    """A picture behind a key, as LocalAI's are."""
    if request.header("authorization") != f"Bearer {TEST_KEY}":
        return json_answer({"error": {"message": "missing key"}}, 401)
    return file(picture_of(1))


def linked(request: Received) -> Answer:
    return json_answer({"created": 1, "data": [{"url": f"{request.root}/generated/1.png"}]})


@pytest.mark.parametrize("many", [False, True])
def test_a_link_of_the_server_that_needs_the_key_gets_it(own: Own, many: bool) -> None:
    own.shell.env["OPENAI_API_KEY"] = TEST_KEY
    own.server.play(POST, linked)
    own.server.play("/generated/1.png", guarded)
    assert (own.batch(variants=1) if many else own.make()).code == 0


def test_its_recovery_gets_the_key_too(own: Own) -> None:
    own.shell.env["OPENAI_API_KEY"] = TEST_KEY
    own.server.play(POST, linked)
    own.server.play("/generated/1.png", Answer(404))
    assert own.make().error["code"] == "link_refused"
    own.server.play("/generated/1.png", guarded)
    (path,) = own.shell.evidence_files()
    assert own.shell.run("--recover", str(path)).code == 0


def test_a_link_to_a_neighbour_does_not_get_the_key(own: Own) -> None:
    own.shell.env["OPENAI_API_KEY"] = TEST_KEY
    with FaultServer() as neighbour:
        neighbour.play("/1.png", guarded)
        link = f"{neighbour.root}/1.png"
        own.server.play(POST, json_answer({"created": 1, "data": [{"url": link}]}))
        assert own.make("--timeout", "5").error["code"] == "link_refused"
        own.server.play(POST, linked)
        own.server.play("/generated/1.png", redirect(link))
        assert own.make("--timeout", "5").error["code"] == "link_refused"
        assert {request.header("authorization") for request in neighbour.requests} == {None}


# Equal bytes --------------------------------------------------------------------------------------------------------


def test_equal_pictures_of_different_seeds_are_told(own: Own) -> None:
    own.server.play(POST, Answer(body=picture_answer()))
    result = own.batch()
    (warning,) = [text for text in result.json["warnings"] if "same to the byte" in text]
    assert warning.startswith("3 pictures") and f"warning: {warning}" in result.stderr
    assert all(warning in row["warnings"] for row in own.results)


def test_an_honest_server_and_one_seed_twice_are_not_told_of(own: Own) -> None:
    batch = Batch(own.shell, own.server)
    batch.rows({"prompt": "a fox", "seed": 5}, {"prompt": "a fox", "seed": 5}, {"prompt": "a fox", "seed": 6})
    result = batch.run("--provider", "openai")
    assert result.code == 0 and "same to the byte" not in result.stdout + result.stderr


def test_they_are_told_across_runs_and_formats(own: Own) -> None:
    """Also where the picture is converted: the same bytes become the same file."""
    own.server.play(POST, Answer(body=picture_answer()))
    batch = Batch(own.shell, own.server)
    rows = [{"prompt": "a fox", "seed": seed, "output": f"{seed}.jpg"} for seed in (5, 6)]
    batch.rows(*rows)
    assert "same to the byte" not in batch.run("--provider", "openai", "--limit", "1").stderr
    assert "same to the byte" in batch.run("--provider", "openai").stderr
