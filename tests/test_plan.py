"""The plan in this process: all that is decided before money is spent, and all that is wrong told at once.

What each field of a request may be is held by test_request.py, where the key may go by test_trust.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from closed import assert_closed
from conftest import TEST_KEY
from records import evidence_file
from zimage.contract import MAX_REQUEST_BYTES, SKILL, VERSION
from zimage.errors import Failure
from zimage.evidence import utc_now
from zimage.options import read_options
from zimage.plan import Options, Plan, make_plan
from zimage.waiting import Stop

SERVER = "http://127.0.0.1:8000/v1"
CALL = "/api/v1/services/aigc/multimodal-generation/generation"
BEIJING, SINGAPORE = f"https://dashscope.aliyuncs.com{CALL}", f"https://dashscope-intl.aliyuncs.com{CALL}"

Planned = Callable[..., Plan]
Refused = Callable[..., list[str]]


@pytest.fixture
def env(tmp_path: Path) -> dict[str, str]:
    return {"HOME": str(tmp_path), "DASHSCOPE_API_KEY": TEST_KEY, "OUTPUT_DIR": str(tmp_path / "out")}


@pytest.fixture
def planned(env: dict[str, str]) -> Planned:
    """The plan of a command line; `given` are further variables."""

    def planned(*words: str, **given: str) -> Plan:
        return make_plan(read_options(words, env | given), Stop(60), env | given)

    return planned


@pytest.fixture
def refused(planned: Planned) -> Refused:
    """All that is wrong with a command line, each in a sentence; the code of the failure comes first."""

    def refused(*words: str, **given: str) -> list[str]:
        with pytest.raises(Failure) as caught:
            planned(*words, **given)
        fault = caught.value.fault
        assert (fault.exit_code, fault.billed) == (2, "no")
        return [fault.code, *(fault.problems or [fault.message])]

    return refused


def saved(folder: Path, provider: str = "openai", **changes: Any) -> str:
    """The path of an evidence file of an earlier picture."""
    own = {"endpoint": f"{SERVER}/images/generations", "region": "self-hosted"} if provider == "openai" else {}
    return str(evidence_file(folder, **{"provider": provider} | own | changes))


# What is planned ------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_the_evidence_of_a_plan_says_what_is_sent_where_and_what_it_costs(planned: Planned, tmp_path: Path) -> None:
    plan = planned("--prompt", "a fox", "--size", "512x768", "--seed", "7", "--prompt-extend")
    content: dict[str, Any] = json.loads(json.dumps(plan.evidence(utc_now())))
    assert_closed("evidence", content)
    assert content["schema_version"] == 1 and content["operation"] == "image.generate"
    assert (content["tool"], content["status"]) == ({"name": SKILL, "version": VERSION}, "submitting")
    assert (content["provider"], content["region"], content["endpoint"]) == ("dashscope", "beijing", BEIJING)
    assert content["endpoint_source"] == "default"
    assert plan._replace(endpoint=plan.endpoint._replace(source="")).asked_at["endpoint_source"] is None
    assert content["request"] == {"prompt": "a fox", "size": "512*768", "seed": 7, "prompt_extend": True}
    assert content["payload"] == plan.payload and "a fox" in json.dumps(plan.payload)
    assert content["billable"] is True and content["attempts"] == [] and "settings" not in content
    assert (content["cost"]["estimate"], content["cost"]["currency"]) == (0.02868, "USD")
    assert content["cost"]["basis"] and content["cost"]["price_list_date"]
    assert content["output"] == str(plan.output)


def test_the_price_is_that_of_the_region(planned: Planned) -> None:
    prices = [planned("--prompt", "a fox", "--region", name).price.estimate for name in ("beijing", "singapore")]
    assert prices == [0.01434, 0.015]


def test_the_providers_own_settings_are_in_the_evidence(planned: Planned) -> None:
    plan = planned("--prompt", "a fox", "--provider", "openai", "--steps", "12", OPENAI_BASE_URL=SERVER)
    content = plan.evidence(utc_now())
    assert content["settings"]["steps"] == 12 and content["billable"] is plan.provider.billable


def test_what_the_picture_will_not_be_made_with_is_in_the_evidence(planned: Planned) -> None:
    words = "--prompt", "a fox", "--provider", "openai"
    assert "seed" in (planned(*words, "--omit", "seed", OPENAI_BASE_URL=SERVER).sent["unused"] or ())
    assert planned("--prompt", "a fox").sent["unused"] is None


def test_a_setting_that_is_of_use_in_a_batch_only_is_told_where_it_is_given(planned: Planned) -> None:
    words = "--prompt", "a fox", "--provider", "diffusers"
    assert not planned(*words).warnings and not planned(*words, "--steps", "9").warnings
    (told,) = planned(*words, "--at-once", "2").warnings
    assert told.startswith("--at-once is for a batch")


def test_a_plan_that_is_made_anew_keeps_what_was_to_be_told(planned: Planned) -> None:
    plan = planned("--prompt", "a fox", "--provider", "diffusers", "--at-once", "2")
    assert plan.warnings and plan.anew() == plan


def test_who_says_nothing_of_it_agrees_to_no_cost() -> None:
    options = read_options(["--prompt", "a fox"], {})
    assert (options.deep, options.accept_cost) == (False, False)
    assert Options._field_defaults == {"deep": False, "accept_cost": False}


def test_a_picture_lies_beside_its_evidence_and_is_named_as_it(planned: Planned, tmp_path: Path) -> None:
    plan = planned("--prompt", "A red fox!")
    assert plan.evidence_path.parent == tmp_path / "out" / SKILL / "evidence"
    name = f"{plan.evidence_path.stem}-a-red-fox.png"
    assert plan.output == tmp_path / "out" / "ai-image-zimage-turbo" / "images" / name
    assert planned("--prompt", "!?").output.name.count("-") == 1  # of the evidence: nothing of the prompt is left
    assert not (tmp_path / "out").exists()


def test_an_output_that_is_named_is_taken_as_it_is_named(planned: Planned, tmp_path: Path) -> None:
    plan = planned("--prompt", "a fox", "--output", str(tmp_path / "fox.webp"), "--overwrite")
    assert (plan.output, plan.overwrite) == (tmp_path / "fox.webp", True)
    assert planned("--prompt", "a fox").overwrite is False


# Where the request comes from -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", ["--request", "--file"])
def test_flags_win_over_what_is_written(planned: Planned, tmp_path: Path, source: str) -> None:
    text = json.dumps({"prompt": "a fox", "aspect_ratio": "16:9", "seed": 5, "prompt_extend": True})
    (tmp_path / "r.json").write_text(text)
    given = text if source == "--request" else str(tmp_path / "r.json")
    written = {"prompt": "a fox", "size": "1280*720", "seed": 5, "prompt_extend": True}
    assert planned(source, given).request.as_dict() == written
    changed = planned(source, given, "--size", "512x512", "--seed", "9", "--no-prompt-extend").request.as_dict()
    assert changed == {"prompt": "a fox", "size": "512*512", "seed": 9, "prompt_extend": False}


def test_a_ratio_by_flag_replaces_the_size_that_is_written(planned: Planned) -> None:
    plan = planned("--request", json.dumps({"prompt": "a fox", "size": "512*512"}), "--aspect-ratio", "1:1")
    assert plan.request.as_dict()["size"] == "1024*1024"


def test_the_size_that_is_written_stands_beside_other_flags(planned: Planned) -> None:
    plan = planned("--request", json.dumps({"prompt": "a fox", "size": "512*512"}), "--seed", "3")
    assert (plan.request.size, plan.request.seed) == ("512*512", 3)


@pytest.mark.parametrize("source", ["--request", "--file"])
@pytest.mark.parametrize("more", [0, 1])
def test_a_request_may_be_a_mebibyte_and_not_a_byte_more(
    planned: Planned, refused: Refused, tmp_path: Path, source: str, more: int
) -> None:
    text = json.dumps({"prompt": "a fox"}).ljust(MAX_REQUEST_BYTES + more)
    (tmp_path / "r.json").write_text(text)
    words = source, text if source == "--request" else str(tmp_path / "r.json")
    if not more:
        assert planned(*words).request.prompt == "a fox"
    else:
        _, said = refused(*words)
        assert said.startswith(source) and "larger than 1 MiB" in said


def test_what_is_no_json_is_advised_to_be_quoted_or_written_to_a_file(planned: Planned) -> None:
    with pytest.raises(Failure, match="--request: is not valid JSON") as caught:
        planned("--request", "{prompt: a fox}")
    fault = caught.value.fault
    assert fault.code == "invalid_request" and "quote" in fault.hint and "--file" in fault.hint


@pytest.mark.parametrize("text", ["[]", '"a fox"', "null", "7"])
def test_a_request_that_is_no_object_is_told_with_all_the_rest(refused: Refused, text: str) -> None:
    words = "--request", text, "--size", "512x512", "--output", "fox.bmp"
    code, *problems = refused(*words, DASHSCOPE_BASE_URL="https://x.example/a?b")
    assert code == "invalid_request" and len(problems) == 3
    assert "object" in problems[0]
    assert [problem.partition(":")[0] for problem in problems[1:]] == ["--output", "DASHSCOPE_BASE_URL"]


def test_a_file_that_cannot_be_read_is_told_with_what_is_wrong_with_the_arguments(
    refused: Refused, tmp_path: Path
) -> None:
    _, *problems = refused("--file", str(tmp_path / "none.json"), "--timeout", "x")
    assert len(problems) == 2 and "--timeout" in problems[0] and "none.json" in problems[1]


# What is wrong --------------------------------------------------------------------------------------------------------


def test_everything_wrong_is_told_at_once(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "taken.png").write_bytes(b"mine")
    words = ["--request", '{"prompt": " "}', "--output", str(tmp_path / "taken.png"), "--timeout", "x"]
    given = {"DASHSCOPE_WORKSPACE": "a b"}
    code, *problems = refused(*words, **given)
    *told, taken = (problem.partition(":")[0] for problem in problems)
    assert code == "invalid_request" and told == ["--timeout", "prompt", *given]
    assert "taken.png" in taken + problems[-1]


def test_a_name_that_is_taken_does_not_hide_the_plan(planned: Planned, tmp_path: Path) -> None:
    (tmp_path / "taken.png").write_bytes(b"mine")
    assert planned("--prompt", "a fox", "--output", str(tmp_path / "taken.png")).output == tmp_path / "taken.png"


def test_a_name_that_is_taken_and_may_be_replaced_is_no_problem_beside_others(refused: Refused, tmp_path: Path) -> None:
    taken = tmp_path / "taken.png"
    taken.write_bytes(b"mine")
    _, *problems = refused("--prompt", " ", "--output", str(taken), "--overwrite")
    assert len(problems) == 1


def test_what_a_provider_cannot_do_is_told_beside_what_is_wrong_anyway(refused: Refused) -> None:
    request = json.dumps({"prompt": "", "prompt_extend": True, "size": "1025*1024"})
    code, *problems = refused("--provider", "diffusers", "--request", request)
    assert code == "invalid_request"
    assert [problem.partition(":")[0] for problem in problems] == ["prompt", "size", "prompt_extend"]


def test_what_a_provider_cannot_do_is_wrong_with_the_request(refused: Refused) -> None:
    code, problem = refused("--prompt", "a fox", "--provider", "diffusers", "--prompt-extend")
    assert code == "invalid_request" and problem.startswith("prompt_extend:")


def test_a_provider_that_takes_no_seed_is_asked_without_one(planned: Planned, refused: Refused) -> None:
    words = "--prompt", "a fox", "--provider", "zimageturbo"
    assert "seed" not in planned(*words).request.as_dict()
    code, problem = refused(*words, "--seed", "5")
    assert code == "invalid_request" and problem.startswith("seed:")


def test_no_plan_of_such_a_provider_has_a_seed(planned: Planned) -> None:
    plan, seeded = planned("--prompt", "a fox", "--provider", "zimageturbo"), planned("--prompt", "a fox").request
    assert seeded.seed is not None and plan._replace(request=seeded).anew().request.seed is None


def test_no_field_that_is_wrong_is_judged_twice(refused: Refused) -> None:
    request = json.dumps({"prompt": "a fox", "prompt_extend": "yes", "size": "1*1"})
    _, *problems = refused("--provider", "diffusers", "--request", request)
    assert sorted(problem.partition(":")[0] for problem in problems) == ["prompt_extend", "size"]


@pytest.mark.parametrize("variable", ["OUTPUT_DIR", "--output"])
def test_a_path_that_cannot_be_is_told_by_where_it_was_given(planned: Planned, refused: Refused, variable: str) -> None:
    long = "x" * 300
    if variable == "OUTPUT_DIR":
        code, problem = refused("--prompt", "a fox", OUTPUT_DIR=f"/{long}")
        with pytest.raises(Failure) as caught:
            planned("--prompt", "a fox", OUTPUT_DIR=f"/{long}")
        assert "OUTPUT_DIR" in caught.value.fault.hint
    else:
        code, problem = refused("--prompt", "a fox", "--output", f"/{long}.png")
    assert code == "invalid_output" and problem.startswith(f"{variable}:")


@pytest.mark.parametrize(
    ("name", "size", "fits"),
    [
        ("a.webp", "16383*256", True),
        ("a.webp", "256*16383", True),
        ("a.webp", "16384*256", False),
        ("a.WEBP", "256*16384", False),
        ("a.jpg", "65500*64", True),
        ("a.jpg", "65501*64", False),
        ("a.png", "65501*64", True),
    ],
)
def test_a_picture_that_its_format_cannot_hold_is_not_paid_for(
    planned: Planned, refused: Refused, tmp_path: Path, name: str, size: str, fits: bool
) -> None:
    words = "--prompt", "a fox", "--size", size.replace("*", "x"), "--output", str(tmp_path / name)
    if fits:
        assert planned(*words).request.size == size
    else:
        code, problem = refused(*words)
        assert code == "invalid_output" and ".png" in problem and problem.startswith("--output:")


@pytest.mark.parametrize(("length", "warned"), [(800, False), (801, True)])
def test_a_prompt_that_the_service_may_cut_is_a_warning(planned: Planned, length: int, warned: bool) -> None:
    warnings = planned("--prompt", "x" * length).warnings
    assert bool(warnings) is warned
    if warned:
        assert "801" in warnings[0] and "800" in warnings[0]


# The workspace --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ws-1a2b", "A_c-9", "x" * 63])
def test_a_workspace_is_taken_from_its_variable(planned: Planned, name: str) -> None:
    assert planned("--prompt", "a fox", DASHSCOPE_WORKSPACE=name).workspace == name


def test_no_workspace_is_none(planned: Planned) -> None:
    assert planned("--prompt", "a fox", DASHSCOPE_WORKSPACE="").workspace is None
    openai = planned("--prompt", "a fox", "--provider", "openai", OPENAI_BASE_URL=SERVER, DASHSCOPE_WORKSPACE="ws-1")
    assert openai.workspace is None


@pytest.mark.parametrize("name", ["a b", "ws\r\nX: 1", "ü", "A.b", "x" * 65])
def test_a_workspace_that_is_no_header_is_refused_by_its_variable(refused: Refused, name: str) -> None:
    code, problem = refused("--prompt", "a fox", DASHSCOPE_WORKSPACE=name)
    assert code == "invalid_account" and problem.startswith("DASHSCOPE_WORKSPACE:") and name not in problem
    _, *problems = refused("--prompt", "a fox", "--base-url", "https://x.example/a?b", DASHSCOPE_WORKSPACE=name)
    assert [text.partition(":")[0] for text in problems] == ["DASHSCOPE_WORKSPACE", "--base-url"]


# Replay ---------------------------------------------------------------------------------------------------------------


def test_a_replay_is_the_same_request_by_the_same_provider_at_the_same_place(planned: Planned, tmp_path: Path) -> None:
    request = {"prompt": "a cat", "size": "512*512", "seed": 5, "prompt_extend": True}
    old = saved(tmp_path, "dashscope", region="singapore", endpoint=SINGAPORE, request=request)
    plan = planned("--replay", old, DASHSCOPE_BASE_URL="http://127.0.0.1:1/api/v1")
    assert (plan.provider.name, plan.endpoint.region, plan.endpoint.url) == ("dashscope", "singapore", SINGAPORE)
    assert plan.request.as_dict() == request and plan.price.estimate == 0.03
    assert plan.endpoint.source == "--replay"
    assert str(plan.evidence_path) != old


@pytest.mark.parametrize(("response", "seed"), [({"seed": 31}, 31), ({"seed": 0}, 0), ({}, 5)])
def test_a_replay_asks_for_the_seed_that_the_picture_was_drawn_from(
    planned: Planned, tmp_path: Path, response: dict[str, Any], seed: int
) -> None:
    """A server may say that it was another than the one it was asked for."""
    assert planned("--replay", saved(tmp_path, "dashscope", response=response)).request.seed == seed


def test_flags_win_over_what_is_replayed(planned: Planned, tmp_path: Path) -> None:
    old = saved(tmp_path, "dashscope", region="singapore", endpoint=SINGAPORE)
    assert planned("--replay", old, "--seed", "9").request.seed == 9
    assert planned("--replay", old, "--region", "beijing").endpoint.url == BEIJING
    here = planned("--replay", old, "--base-url", "http://127.0.0.1:1").endpoint
    assert (here.host, here.region) == ("127.0.0.1", "unknown")


def test_a_replay_by_another_provider_takes_its_request_alone(planned: Planned, tmp_path: Path) -> None:
    old = saved(tmp_path, settings={"steps": 12}, request={"prompt": "a cat", "size": "512*512", "base_url": SERVER})
    plan = planned("--replay", old, "--provider", "dashscope")
    assert (plan.provider.name, plan.endpoint.url) == ("dashscope", BEIJING)
    assert plan.request.size == "512*512" and plan.provider.known_settings == {}


def test_the_base_url_of_a_replayed_request_is_not_looked_at(planned: Planned, tmp_path: Path) -> None:
    request = {"prompt": "a cat", "size": "512*512", "base_url": "https://elsewhere.example"}
    assert planned("--replay", saved(tmp_path, "dashscope", request=request)).endpoint.url == BEIJING


def test_a_replay_takes_the_settings_of_then_and_flags_win(planned: Planned, tmp_path: Path) -> None:
    old = saved(tmp_path, settings={"steps": 12, "guidance": 1.5})
    here = {"OPENAI_BASE_URL": SERVER}
    then = planned("--replay", old, **here).provider.known_settings
    assert (then["steps"], then["guidance"]) == (12, 1.5)
    now = planned("--replay", old, "--steps", "20", **here).provider.known_settings
    assert (now["steps"], now["guidance"]) == (20, 1.5)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"stepz": 12}, "settings.stepz: is not known"),
        ({"x" * 60: 1}, f"settings.{'x' * 60}: is not known"),
        ({"x" * 61: 1}, f"settings.{'x' * 59}…: is not known"),
        ({"steps": 0}, "settings.steps: must be a whole number from 1 to 200"),
        ({"steps": "many"}, "settings.steps: must be a whole number from 1 to 200"),
        ({"steps": "12"}, "settings.steps: must be as the command line reads it: 12"),  # a text
        ({"steps": True}, "settings.steps: must be"),
        ({"steps": 12.0}, "settings.steps: must be"),
        ({"guidance": 1}, "settings.guidance: must be as the command line reads it: 1.0"),
        ({"image_format": "PNG"}, "settings.image_format: must be"),
    ],
)
def test_settings_of_an_evidence_file_that_no_command_line_gives_are_refused(
    refused: Refused, tmp_path: Path, settings: dict[str, Any], told: str
) -> None:
    code, problem = refused("--replay", saved(tmp_path, settings=settings), OPENAI_BASE_URL=SERVER)
    assert code == "invalid_evidence" and problem.startswith(told) and len(problem) < 200


def test_a_setting_that_a_flag_replaces_is_not_looked_at(planned: Planned, tmp_path: Path) -> None:
    words = "--replay", saved(tmp_path, settings={"steps": 0}), "--steps", "20"
    assert planned(*words, OPENAI_BASE_URL=SERVER).provider.known_settings["steps"] == 20


def test_a_folder_of_an_evidence_file_is_not_one_of_where_it_is_replayed(refused: Refused, tmp_path: Path) -> None:
    old = saved(tmp_path, "diffusers", endpoint="in-process", region="local", settings={"model_path": "."})
    code, problem = refused("--replay", old)
    assert code == "invalid_evidence" and problem.startswith("settings.model_path: must be as the command line reads")


def test_a_flag_leads_elsewhere_than_an_evidence_file_that_may_not(planned: Planned, tmp_path: Path) -> None:
    plan = planned("--replay", saved(tmp_path), "--base-url", "http://127.0.0.1:1")
    assert plan.endpoint.root == "http://127.0.0.1:1/v1"


def test_where_a_server_is_named_by_an_evidence_file_alone_the_user_is_asked(refused: Refused, tmp_path: Path) -> None:
    code, problem = refused("--replay", saved(tmp_path))
    assert code == "host_not_trusted" and SERVER.removesuffix("/v1") in problem


def test_the_region_of_an_evidence_file_counts_where_the_provider_has_it(planned: Planned, tmp_path: Path) -> None:
    here = {"endpoint": f"http://127.0.0.1:1{CALL}", "region": "singapore"}
    given = {"DASHSCOPE_BASE_URL": "http://127.0.0.1:1"}
    assert planned("--replay", saved(tmp_path, "dashscope", **here), **given).endpoint.region == "singapore"
    strange = saved(tmp_path, "dashscope", **here | {"region": "mars"})
    assert planned("--replay", strange, **given).endpoint.region == "unknown"


def test_what_is_made_in_this_process_is_replayed_in_it(planned: Planned, tmp_path: Path) -> None:
    old = saved(tmp_path, "diffusers", endpoint="in-process", region="local", billable=False)
    plan = planned("--replay", old)
    assert (plan.provider.name, plan.endpoint.url) == ("diffusers", "in-process") and plan.price.estimate == 0


@pytest.mark.parametrize("url", ["", 7, None, [], {}])
def test_a_base_url_that_is_no_text_leads_nowhere(refused: Refused, url: Any) -> None:
    _, *problems = refused("--request", json.dumps({"prompt": "a fox", "base_url": url}))
    assert len(problems) == 1 and problems[0].startswith("base_url:")


def test_a_base_url_that_is_written_counts_before_the_environment(planned: Planned) -> None:
    words = "--request", json.dumps({"prompt": "a fox", "base_url": "http://127.0.0.1:2"})
    endpoint = planned(*words, DASHSCOPE_BASE_URL="http://127.0.0.1:1").endpoint
    assert (endpoint.root, endpoint.source) == ("http://127.0.0.1:2/api/v1", "base_url")
    flagged = planned(*words, "--base-url", "http://127.0.0.1:3").endpoint.root
    assert flagged == "http://127.0.0.1:3/api/v1"
