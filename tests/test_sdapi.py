"""Servers with the API of A1111's web UI: which one it is, what each makes of a request, and what it tells."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from batch_helpers import Batch, assert_counts
from conftest import Result, Shell
from fault_server import Answer, Behaviour, FaultServer, Received, html, json_answer
from mock_server import MockServer
from provider_cases import NO_WAIT
from zimage.calls import HttpAnswer
from zimage.formats import png_text
from zimage.registry import provider_named
from zimage.request import ImageRequest
from zimage.trust import parse_base_url

ROOT = "/sdapi/v1"
POST = f"{ROOT}/txt2img"
LOGIN = {"SDAPI_USER": "fox", "SDAPI_PASSWORD": "hole-7Gq2-den"}
PAIR = "Basic Zm94OmhvbGUtN0dxMi1kZW4="


def png(text: str = "", width: int = 512, height: int = 512, color: str = "#304050") -> bytes:
    """A picture with A1111's text in it."""
    file, info = io.BytesIO(), PngInfo()
    if text:
        info.add_text("parameters", text)
    Image.new("RGB", (width, height), color).save(file, "png", pnginfo=info)
    return file.getvalue()


def text_of(**told: object) -> str:
    """A1111's text of a picture; `told` are settings by their names there, blanks as _."""
    pairs = {"Steps": 8, "Sampler": "Euler", "CFG scale": 1} | {k.replace("_", " "): v for k, v in told.items()}
    return "a fox\nunder a tree, Seed: 99, Steps: 3\n" + ", ".join(f"{name}: {value}" for name, value in pairs.items())


def asked_for(request: Received) -> dict[str, Any]:
    body = json.loads(request.body)
    assert isinstance(body, dict)
    return body


def with_info(**changes: Any) -> Callable[[Received], Answer]:
    """An answer that tells what the picture was drawn from; `changes` are what it says otherwise."""

    def answer(request: Received) -> Answer:
        asked = asked_for(request)
        told = {name: asked.get(name) for name in ("prompt", "seed", "steps", "cfg_scale", "sampler_name")} | changes
        return made(png(), json.dumps(told))

    return answer


def made(content: bytes, info: Any = "", prefix: str = "") -> Answer:
    return json_answer({"images": [prefix + base64.b64encode(content).decode()], "parameters": {}, "info": info})


@dataclass
class Own:
    """The command for one picture at a server of one's own."""

    shell: Shell
    server: FaultServer
    count: int = 0

    def make(self, *options: str, prompt: str = "a fox") -> Result:
        self.count += 1
        request = ("--prompt", prompt, "--size", "512x512", "--output", f"{self.count}.png", "--print-response")
        return self.shell.call("--provider", "sdapi", *request, *options)

    def check(self, *options: str) -> Result:
        return self.shell.call("--check", "--provider", "sdapi", *options)

    def batch(self, *options: str, variants: int = 3) -> Result:
        batch = Batch(self.shell, self.server)
        batch.rows({"prompt": "a fox", "id": "fox"})
        return batch.run("--provider", "sdapi", "--variants", str(variants), *options)

    def is_a(self, name: str) -> Server:
        server = SERVERS[name]
        for path, answer in server.says.items():
            self.server.play(path, answer)
        return server

    @property
    def bodies(self) -> list[dict[str, Any]]:
        return [asked_for(request) for request in self.server.posts]


@pytest.fixture
def own(shell: Shell) -> Iterator[Own]:
    with FaultServer() as server:
        for path in ("", "/health", "/v1/models"):
            server.play(path or "/", Answer(404))
        server.play(POST, with_info())
        shell.env["SDAPI_BASE_URL"] = server.root
        yield Own(shell, server)


# Which server it is ---------------------------------------------------------------------------------------------------


class Server(NamedTuple):
    says: Mapping[str, Answer]  # what it answers, by path
    sampler: str | None
    scheduler: str | None = None
    steps: int = 8
    no_guidance: float = 1.0
    info: str = "told"  # what its answers tell of the seed: told, nothing (but it is used), unknown
    fields: Mapping[str, object] = {}  # further ones that it gets


MODEL_LIST = {"title": "z_image_turbo.safetensors", "model_name": "z_image_turbo", "hash": "abcdef1234"}
SD_CPP_LIST = {"title": "z_image_turbo-Q4_0", "model_name": "z_image_turbo-Q4_0", "hash": "8888888888"}
LISTED = {f"{ROOT}/sd-models": json_answer([MODEL_LIST])}
SD_CPP_LISTED = {f"{ROOT}/sd-models": json_answer([SD_CPP_LIST])}
XINFERENCE_MODELS = [
    {"id": "qwen", "owned_by": "xinference", "model_type": "LLM"},
    {"id": "Z-Image-Turbo", "owned_by": "xinference", "model_type": "image"},
]
SERVERS = {
    "forge": Server(
        {**LISTED, f"{ROOT}/sd-modules": json_answer([]), f"{ROOT}/cmd-flags": json_answer({})}, "Euler", "Simple"
    ),
    "a1111": Server({**LISTED, f"{ROOT}/cmd-flags": json_answer({"api": True})}, "Euler"),
    "sd.next by version": Server(
        {**LISTED, f"{ROOT}/version": json_answer({"app": "sd.next"}), f"{ROOT}/cmd-flags": json_answer({})}, "Default"
    ),
    "sd.next by jobs": Server({**LISTED, "/sdapi/v2/jobs": json_answer({"items": []})}, "Default"),
    "sd-server": Server(
        {**SD_CPP_LISTED, "/sdcpp/v1/capabilities": json_answer({"limits": {"min": 64}})}, "euler", "simple"
    ),
    "older sd-server": Server(
        {**SD_CPP_LISTED, "/v1/models": json_answer({"data": [{"id": "sd-cpp-local", "owned_by": "local"}]})},
        "euler",
        "simple",
        info="nothing",
    ),
    "koboldcpp": Server(
        {**SD_CPP_LISTED, "/.well-known/serviceinfo": json_answer({"software": {"name": "KoboldCpp"}})},
        "euler",
        "default",
        info="nothing",
    ),
    "mfluxible": Server(
        {"/health": json_answer({"version": "0.9", "model": {"name": "z-image-turbo", "default_steps": 9}})},
        None,
        steps=9,
    ),
    "xinference": Server(
        {"/v1/models": json_answer({"data": XINFERENCE_MODELS})},
        None,
        steps=9,
        no_guidance=0.0,
        info="nothing",
        fields={"model": "Z-Image-Turbo"},
    ),
    "draw things": Server(
        {"/": json_answer({"model": "z_image_turbo_1.0_q6p.ckpt", "guidance_scale": 1, "steps": 8})},
        None,
        info="unknown",
        fields={"guidance_scale": 1.0},
    ),
    "no word": Server({}, "Euler", info="unknown"),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", SERVERS)
def test_each_server_gets_every_number_in_its_own_words(own: Own, name: str) -> None:
    server = own.is_a(name)
    own.make("--seed", "7")
    (body,) = own.bodies
    numbers = {"seed": 7, "steps": server.steps, "cfg_scale": server.no_guidance, "width": 512, "height": 512}
    assert body.items() >= {**numbers, "batch_size": 1, "n_iter": 1, **server.fields}.items()
    assert (body.get("sampler_name"), body.get("scheduler")) == (server.sampler, server.scheduler)
    assert ("guidance_scale" in body, "model" in body) == (name == "draw things", name == "xinference")


@pytest.mark.parametrize("name", SERVERS)
def test_a_seed_that_no_answer_names_is_recorded_where_the_server_is_known_to_use_it(own: Own, name: str) -> None:
    server = own.is_a(name)
    own.server.play(POST, made(png(), {"created": 5} if name == "xinference" else ""))
    response, evidence = own.make("--seed", "7").json, own.shell.evidence()
    assert response.get("seed") == (None if server.info == "unknown" else 7)
    assert ("seed" in evidence.get("unused", [])) == (server.info == "unknown")
    assert any("seed" in text for text in response.get("warnings", [])) == (server.info == "unknown")
    assert evidence["payload"]["seed"] == 7


@pytest.mark.parametrize("name", SERVERS)
def test_a_seed_that_the_answer_names_is_the_true_one_anywhere(own: Own, name: str) -> None:
    own.is_a(name)
    own.server.play(POST, with_info(seed=4242))
    response = own.make("--seed", "7").json
    assert response["seed"] == 4242
    assert any("4242" in text and "7" in text for text in response["warnings"])


@pytest.mark.parametrize("name", SERVERS)
def test_a_check_asks_what_each_server_has(own: Own, name: str) -> None:
    own.is_a(name)
    result = own.check()
    if name == "no word":
        assert (result.code, result.json["error"]["code"]) == (2, "not_found")
        assert "--api" in result.json["error"]["hint"]
    else:
        assert (result.code, result.json["model_listed"]) == (0, True)
    assert not own.server.posts


def test_a_server_whose_signs_are_all_alike_is_none_of_them(own: Own) -> None:
    """A page for every path, as of a web UI without its API."""
    for path in {path for server in SERVERS.values() for path in server.says}:
        own.server.play(path, html(200, "Welcome"))
    assert own.make().code == 0
    assert "does not say what it is" in own.make().stderr


def test_signs_lie_below_the_path_of_a_proxy(own: Own) -> None:
    own.server.play(f"/forge{ROOT}/sd-models", json_answer([MODEL_LIST]))
    own.server.play("/forge/sdcpp/v1/capabilities", json_answer({"limits": {}}))
    own.server.play(f"/forge{POST}", with_info())
    assert own.make("--base-url", f"{own.server.root}/forge{ROOT}").code == 0
    assert own.bodies[0]["sampler_name"] == "euler"


# What the answer tells ------------------------------------------------------------------------------------------------

TELLING: dict[str, tuple[Any, str, int | None]] = {  # info, text in the picture, the seed of the record
    "info": (json.dumps({"seed": 31}), "", 31),
    "info as an object": ({"seed": 31}, "", 31),
    "all_seeds": (json.dumps({"seed": -1, "all_seeds": [31]}), "", 31),
    "info before the picture": (json.dumps({"seed": 31}), text_of(Seed=5), 31),
    "the picture": ("", text_of(Seed=31, Size="512x512"), 31),
    "the picture of sd-server": ("", text_of(Seed=31) + ', SDCPP: {"seed": 8, "x": [1, 2]}', 31),
    "the picture beside other info": (json.dumps({"created": 5}), text_of(Seed=31), 31),
    "not what looks alike in the prompt": ("", "a fox, Seed: 31", None),
    "no JSON": ("Seed: 31", "", None),
    "too large to be asked for": (json.dumps({"seed": 2**32 - 1}), "", None),
    "an echo alone": (json.dumps({"seed": -1}), "", None),
    "no number": (json.dumps({"seed": "31"}), "", None),
}


@pytest.mark.parametrize("name", TELLING)
def test_the_true_seed_is_found(own: Own, name: str) -> None:
    info, text, seed = TELLING[name]
    own.server.play(POST, made(png(text), info))
    response = own.make("--seed", "7").json
    assert response.get("seed") == seed
    assert own.shell.evidence()["response"].get("seed") == seed


def test_a_replay_sends_the_seed_that_the_picture_was_drawn_from(own: Own) -> None:
    own.server.play(POST, with_info(seed=31), with_info())
    own.make("--seed", "7")
    (path,) = own.shell.evidence_files()
    assert own.shell.call("--replay", str(path), "--output", "b.png", "--print-response").json["seed"] == 31
    assert [body["seed"] for body in own.bodies] == [7, 31]


def test_a_batch_records_the_true_seeds_too(own: Own) -> None:
    seeds = iter((31, 32, 33))
    own.server.play(POST, lambda request: with_info(seed=next(seeds))(request))
    assert_counts(own.batch(), saved=3)
    assert sorted(row["seed"] for row in Batch(own.shell, own.server).results()) == [31, 32, 33]


@pytest.mark.parametrize(
    ("options", "said", "name"),
    [
        (("--steps", "150"), {"steps": 80}, "steps"),
        ((), {"steps": 20}, "steps"),
        (("--guidance", "30"), {"cfg_scale": 25.0}, "guidance"),
        (("--guidance", "2.5"), {"cfg_scale": None}, "guidance"),
        (("--sampler", "Res 2S"), {"sampler_name": "Euler a"}, "sampler"),
    ],
)
def test_what_the_server_changes_is_told_and_not_recorded_as_used(
    own: Own, options: tuple[str, ...], said: dict[str, Any], name: str
) -> None:
    own.server.play(POST, with_info(**said))
    response, evidence = own.make(*options).json, own.shell.evidence()
    assert evidence["unused"] == [name] and name not in evidence["settings"]
    assert any(text.startswith(f"{name}: the server says") for text in response["warnings"])


def test_no_guidance_in_any_words_is_what_was_asked_for(own: Own) -> None:
    for word in (None, 1, 1.0):
        own.server.play(POST, with_info(cfg_scale=word))
        own.is_a("forge")
        assert "warnings" not in own.make().json


def test_guidance_is_never_recorded_of_a_server_that_drops_it(own: Own) -> None:
    own.is_a("mfluxible")
    own.server.play(POST, with_info(cfg_scale=None))
    response, evidence = own.make("--guidance", "3", "--sampler", "euler").json, own.shell.evidence()
    assert evidence["unused"] == ["guidance", "sampler"]
    assert not {"guidance", "sampler"} & evidence["settings"].keys()
    assert any("guidance, sampler; mfluxible drops it" in text for text in response["warnings"])
    assert response["seed"] == evidence["request"]["seed"]


def test_a_prompt_that_the_server_has_changed_is_told(own: Own) -> None:
    own.server.play(POST, with_info(prompt="masterpiece, a fox"))
    assert own.make().json["rewritten_prompt"] == "masterpiece, a fox"


@pytest.mark.parametrize("prefix", ["data:image/png;base64,", "DATA:image/png;base64,", ""])
def test_the_picture_comes_with_or_without_a_prefix(own: Own, prefix: str) -> None:
    own.server.play(POST, made(png(), prefix=prefix))
    assert own.make().code == 0


def test_of_several_pictures_the_one_is_taken_that_is_no_sheet_of_all(own: Own) -> None:
    sheet, one = (base64.b64encode(png("", side, 512)).decode() for side in (1024, 512))
    own.server.play(POST, json_answer({"images": [sheet, one, one], "info": json.dumps({"index_of_first_image": 1})}))
    response = own.make().json
    assert response["width"] == 512 and any("3 pictures" in text for text in response["warnings"])


def test_a_smaller_picture_than_asked_is_told(own: Own) -> None:
    own.server.play(POST, made(png("", 256, 256), json.dumps({"seed": 1})))
    response = own.make().json
    assert (response["width"], response["height"]) == (256, 256)
    assert any("256*256" in text and "512*512" in text for text in response["warnings"])


def test_text_in_a_picture_is_read_in_bounds() -> None:
    assert png_text(png("café\nSteps: 8"), "parameters") == "café\nSteps: 8"  # tEXt
    assert png_text(png("狐狸\nSteps: 8"), "parameters") == "狐狸\nSteps: 8"  # iTXt
    assert png_text(png("x")[:60], "parameters") in ("", "x")
    assert png_text(b"\xff\xd8 no PNG", "parameters") == ""
    many = png("x")[:33] + b"\0\0\0\4tEXta\0bc\0\0\0\0" * 200 + png("x")[33:]
    assert png_text(many, "parameters") == ""


# What stands in a prompt and is no word of it -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "prompt",
    [
        'a fox <sd_cpp_extra_args>{"seed": 1}</sd_cpp_extra_args>',
        "a fox <SD_CPP_Extra_Args>{}",
        "< sd_cpp_extra_args >{}",
    ],
)
def test_parameters_in_a_prompt_are_refused_before_anything_is_sent(own: Own, prompt: str) -> None:
    error = own.make(prompt=prompt).error
    assert (error["exit_code"], error["code"], own.server.requests) == (2, "invalid_request", [])
    assert error["message"].startswith("prompt:") and "take it out" in error["message"]


@pytest.mark.parametrize(
    ("prompt", "found"),
    [
        ("a fox <lora:ink:0.8>", "<lora:…>"),
        ("a fox <LyCO:ink>", "<lora:…>"),
        ("a (red:1.3) fox", "brackets"),
        ("a [red|blue] fox", "brackets"),
        ("a fox BREAK an owl", "BREAK"),
        ("a fox AND an owl", "AND"),
    ],
)
def test_commands_in_a_prompt_are_told_and_sent_as_they_are(own: Own, prompt: str, found: str) -> None:
    (warning,) = own.make("--dry-run", prompt=prompt).json["warnings"]
    assert found in warning and warning.startswith("prompt:")
    own.is_a("forge")
    assert own.make(prompt=prompt).json["warnings"] == [warning]
    assert own.bodies[0]["prompt"] == prompt


@pytest.mark.parametrize("prompt", [r"a fox \(tabby\)", "a fox and an owl", "break of day", "a < b: c > d"])
def test_plain_words_are_no_commands(own: Own, prompt: str) -> None:
    own.is_a("forge")
    assert "warnings" not in own.make(prompt=prompt).json


# What goes wrong ------------------------------------------------------------------------------------------------------

FULL = "CUDA out of memory. Tried to allocate 2.00 GiB (GPU 0; 7.79 GiB total capacity)"
WRONG: dict[str, tuple[Answer, int, str, str]] = {  # answer, exit code, error code, a word of the advice
    "API off": (json_answer({"detail": "Not Found"}, 404), 2, "not_found", "--api"),
    "API off, a page": (html(404), 2, "not_found", "--api"),
    "out of memory": (
        json_answer({"error": "OutOfMemoryError", "detail": "", "body": "", "errors": FULL}, 500),
        2,
        "too_little_memory",
        "--size",
    ),
    "out of memory, FastAPI": (json_answer({"detail": "CUDA out of memory"}, 500), 2, "too_little_memory", "--size"),
    "out of memory, Metal": (
        json_answer({"error": "server_error", "message": "MPS backend out of memory"}, 500),
        2,
        "too_little_memory",
        "--size",
    ),
    "koboldcpp busy": (
        json_answer(
            {"detail": {"msg": "Server is busy; please try again later.", "type": "service_unavailable"}}, 503
        ),
        6,
        "service_failing",
        "wait",
    ),
    "sd-server": (json_answer({"error": "generate_image returned no results"}, 500), 6, "service_failing", "wait"),
    "login": (
        json_answer({"detail": "Incorrect username or password"}, 401, headers=(("WWW-Authenticate", "Basic"),)),
        3,
        "key_rejected",
        "SDAPI_USER and SDAPI_PASSWORD",
    ),
    "password": (
        json_answer({"detail": {"msg": "no", "type": "not_authorized"}}, 401), 3, "key_rejected", "SDAPI_API_KEY"
    ),
    "mfluxible": (
        json_answer({"error": "invalid_request", "detail": "width must be a multiple of 16"}, 400),
        2,
        "rejected_by_service",
        "correct the request",
    ),
    "validation": (
        json_answer({"detail": [{"loc": ["body", "steps"], "msg": "must be at most 150", "type": "x"}]}, 422),
        2,
        "rejected_by_service",
        "correct the request",
    ),
    "model": (
        json_answer({"detail": "Model not found: qwen"}, 400), 2, "rejected_by_service", "--model NAME; it lists z_"
    ),
    "empty": (json_answer({"images": [], "info": ""}), 8, "no_image", "Draw Things"),
    "missing": (json_answer({"parameters": {}}), 8, "no_image", "model loaded"),
    "no base64": (json_answer({"images": ["*" * 200]}), 8, "answer_unusable", "report"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_is_told_with_what_helps(own: Own, name: str) -> None:
    answer, exit_code, code, word = WRONG[name]
    own.server.play(f"{ROOT}/sd-models", json_answer([MODEL_LIST]))
    own.server.play(POST, answer)
    error = own.make("--max-retries", "0").error
    assert (error["exit_code"], error["code"]) == (exit_code, code)
    assert word in error["hint"]
    assert code == "answer_unusable" or ("pay" not in error["hint"] and "cost" not in error["hint"])


@pytest.mark.parametrize(("name", "word"), [("draw things", "open a project"), ("sd.next by jobs", "model loaded")])
def test_no_picture_has_its_own_reason_at_each_server(own: Own, name: str, word: str) -> None:
    own.is_a(name)
    own.server.play(POST, json_answer({"images": []}))
    hint = own.make().error["hint"]
    assert word in hint and ("project" in hint) == (name == "draw things")


def test_without_a_project_a_batch_does_not_go_on(own: Own) -> None:
    own.is_a("draw things")
    own.server.play(POST, json_answer({"images": []}))
    result = own.batch(variants=30)
    assert result.code != 0 and len(own.server.posts) < 5
    assert "open a project" in result.stderr


@pytest.mark.parametrize("answer", [json_answer({"detail": "Sampler not found"}, status) for status in (404, 400)])
def test_a_sampler_of_ours_that_is_not_there_is_left_to_the_server(own: Own, answer: Answer) -> None:
    own.server.play(POST, answer, with_info())
    assert own.make().code == 0
    assert own.bodies[0].keys() - own.bodies[1].keys() == {"sampler_name"}


def test_a_sampler_of_the_users_that_is_not_there_is_told_with_those_that_are(own: Own) -> None:
    own.is_a("forge")
    own.server.play(f"{ROOT}/samplers", json_answer([{"name": "Euler", "aliases": []}, {"name": "UniPC"}]))
    own.server.play(POST, json_answer({"detail": "Sampler not found"}, 404))
    error = own.make("--sampler", "Heun++").error
    assert (error["exit_code"], error["code"], len(own.server.posts)) == (2, "rejected_by_service", 1)
    assert "--sampler NAME; it has Euler, UniPC" in error["hint"]


def test_a_sampler_that_would_silently_be_another_is_told(own: Own) -> None:
    own.is_a("sd-server")
    own.server.play(f"{ROOT}/samplers", json_answer([{"name": "euler"}, {"name": "res_multistep"}]))
    own.server.play(POST, with_info(sampler_name="euler"))
    before, after = own.make("--sampler", "UniPC").json["warnings"]
    assert "does not list UniPC" in before and "euler, res_multistep" in before
    assert after == "sampler: the server says that it drew with euler, not with UniPC"
    own.server.play(POST, with_info(sampler_name="Res Multistep"))
    assert "warnings" not in own.make("--sampler", "res_multistep").json
    assert own.bodies[-1]["sampler_name"] == "res_multistep" and "scheduler" not in own.bodies[-1]


def test_a_model_is_named_for_one_request_or_not_at_all(own: Own) -> None:
    own.is_a("forge")
    own.make("--model", "other.safetensors")
    assert own.bodies[-1]["override_settings"] == {"sd_model_checkpoint": "other.safetensors"}
    for path in (f"{ROOT}/sd-modules", f"{ROOT}/cmd-flags"):
        own.server.play(path, Answer(404))
    own.is_a("sd-server")
    result = own.make("--model", "other.safetensors")
    assert "override_settings" not in own.bodies[-1]
    assert any("--model is not sent" in text for text in result.json["warnings"])


# Money, addresses, keys -----------------------------------------------------------------------------------------------

LOST: dict[str, Behaviour] = {
    "hang-up": Answer(hang_up="after-reading"),
    "502": html(502, headers=NO_WAIT),
    "500 of no server": html(500, headers=NO_WAIT),
    "cut": Answer(body=b'{"images": ["iVBORw0', claimed_length=500),
}


@pytest.mark.parametrize("name", LOST)
def test_a_lost_answer_is_asked_for_again(own: Own, name: str) -> None:
    own.server.play(POST, LOST[name], with_info())
    assert (own.make("--timeout", "20").code, len(own.server.posts)) == (0, 2)
    assert len({request.body for request in own.server.posts}) == 1


def test_one_that_has_a_price_is_not(own: Own) -> None:
    own.server.play(POST, LOST["hang-up"])
    error = own.make("--price", "0.01").error
    assert (error["code"], error["billed"], len(own.server.posts)) == ("outcome_unknown", "unknown", 1)
    assert error["estimated_cost"] == 0.01


@pytest.mark.parametrize(
    ("url", "cost"),
    [
        ("http://127.0.0.1:7860", 0.0),
        ("http://192.168.1.20:7860/sdapi/v1", 0.0),
        ("http://mac.local:7860", 0.0),
        ("https://sd.example.com", None),
        ("https://sd.example.com/forge/sdapi/v1/txt2img", None),
    ],
)
def test_only_a_machine_of_ones_own_is_free(own: Own, url: str, cost: float | None) -> None:
    plan = own.make("--base-url", url, "--dry-run").json
    assert (plan["estimated_cost"], plan["billable"]) == (cost, cost is None)
    assert plan["endpoint"].endswith(POST)
    assert own.make("--base-url", url, "--dry-run", "--price", "0.02").json["estimated_cost"] == 0.02


@pytest.mark.parametrize(
    ("url", "advised"),
    [("/v1", ROOT), ("/v1/images/generations", ROOT), ("/forge/v1", f"/forge{ROOT}"), ("/sdapi", ROOT)],
)
def test_the_address_of_another_api_is_named_as_that(own: Own, url: str, advised: str) -> None:
    error = own.make("--base-url", own.server.root + url).error
    assert (error["exit_code"], error["code"]) == (2, "invalid_base_url")
    assert f"use {own.server.root}{advised} " in error["hint"] + " "


def behind_login(behaviour: Behaviour) -> Callable[[Received], Answer]:
    def answer(request: Received) -> Answer:
        if request.header("authorization") != PAIR:
            return json_answer({"detail": "Incorrect username or password"}, 401)
        return behaviour if isinstance(behaviour, Answer) else behaviour(request)

    return answer


@pytest.mark.parametrize("many", [False, True])
def test_a_login_opens_all_that_is_asked(own: Own, many: bool) -> None:
    own.shell.env |= LOGIN
    for path, answer in SERVERS["sd-server"].says.items():
        own.server.play(path, behind_login(answer))
    own.server.play(POST, behind_login(with_info()))
    result = own.batch(variants=1) if many else own.make()
    assert result.code == 0, result.stdout
    assert own.bodies[0]["sampler_name"] == "euler"
    if not many:
        own.server.play(f"{ROOT}/sd-models", behind_login(json_answer([SD_CPP_LIST])))
        assert own.check().json["key_source"] == "environment SDAPI_USER and SDAPI_PASSWORD"


def test_a_login_that_is_wrong_is_named_and_in_no_file_and_no_stream(own: Own) -> None:
    own.shell.env |= LOGIN
    echo = f"no: {PAIR}, fox:{LOGIN['SDAPI_PASSWORD']}"
    own.server.play(POST, json_answer({"detail": echo, "login": LOGIN["SDAPI_PASSWORD"]}, 401))
    result = own.make()
    assert "the login is that of environment SDAPI_USER and SDAPI_PASSWORD" in result.error["message"]
    own.server.play(POST, json_answer({"images": [], "info": echo}))
    assert own.make().code == 8
    files = [path.read_text() for path in own.shell.evidence_files()]
    assert not any(
        LOGIN["SDAPI_PASSWORD"] in text or PAIR[6:30] in text for text in [result.stdout, result.stderr, *files]
    )


def test_a_login_does_not_go_over_http_to_another_machine(own: Own) -> None:
    own.shell.env |= LOGIN
    result = own.make("--base-url", "http://192.0.2.7:7860", "--dry-run").json
    assert result["key_source"] is None
    assert any("SDAPI_USER and SDAPI_PASSWORD is not sent to 192.0.2.7" in text for text in result["warnings"])


# The mock, and the other way to such a server -------------------------------------------------------------------------


@pytest.mark.parametrize("password", ["", "key"])
def test_the_mock_speaks_it(shell: Shell, mock: MockServer, password: str) -> None:
    shell.use(mock)
    if password:
        shell.env |= {"SDAPI_USER": "fox", "SDAPI_PASSWORD": mock.api_key}
    options = ("--provider", "sdapi", "--prompt", "a fox", "--size", "512x512", "--seed", "7", "--print-response")
    response = shell.call(*options).json
    assert (response["seed"], response["width"], response.get("warnings")) == (7, 512, None)
    assert shell.evidence()["response"]["usage"]["sampler_name"] == "Euler"
    assert shell.call("--check", "--provider", "sdapi").json["model_listed"]


@pytest.mark.parametrize(
    ("fault", "exit_code", "code"),
    [
        ("out-of-memory", 2, "too_little_memory"),
        ("no-api", 2, "not_found"),
        ("401", 3, "key_rejected"),
        ("no-image", 8, "no_image"),
    ],
)
def test_the_mock_fails_as_such_servers_do(shell: Shell, fault: str, exit_code: int, code: str) -> None:
    with MockServer(faults=fault) as mock:
        shell.use(mock)
        error = shell.call("--provider", "sdapi", "--prompt", "x", "--size", "512x512", "--print-response").error
        assert (error["exit_code"], error["code"]) == (exit_code, code)


@pytest.mark.parametrize(("fault", "word"), [("seed-lost", "seed: the server says"), ("small", "256*256")])
def test_the_mock_does_other_than_asked_as_such_servers_do(shell: Shell, fault: str, word: str) -> None:
    with MockServer(faults=fault) as mock:
        shell.use(mock)
        request = ("--prompt", "x", "--size", "512x512", "--seed", "7", "--print-response")
        response = shell.call("--provider", "sdapi", *request).json
        assert any(word in text for text in response["warnings"])
        assert (response["seed"] == 7) == (fault == "small")


def test_the_images_api_of_sd_server_leads_here() -> None:
    provider = provider_named("openai")
    asked = provider.introduction(parse_base_url("http://127.0.0.1:1234/v1", "x", provider), "")
    next(asked)
    listed = {"data": [{"id": "sd-cpp-local", "owned_by": "local"}]}
    with pytest.raises(StopIteration):
        asked.send(HttpAnswer(200, {}, json.dumps(listed).encode()))
    (note,) = provider.notes(ImageRequest("a fox", "512*512", 7))
    assert "--provider sdapi" in note
