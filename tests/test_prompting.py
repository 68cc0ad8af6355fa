"""Prompt craft: every worked prompt and every template becomes a request that the program takes, and pays for once."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fill_template
from conftest import GENERATE, SCRIPTS, SKILL, Result, Shell
from mock_server import MockServer
from zimage.contract import LONG_PROMPT, RATIO_SIZES
from zimage.errors import Failure
from zimage.request import request_problems

FILL = SCRIPTS / "fill_template.py"
BATCH = SCRIPTS / "generate_batch.py"
GUIDE = (SKILL / "references" / "prompting.md").read_text(encoding="utf-8")
WORKED = re.findall(r"(?ms)^> ([^\n]+)\n\n```json\n(.*?)^```", GUIDE)
REQUESTS: list[dict[str, Any]] = [json.loads(block) for _, block in WORKED]
TEMPLATES = fill_template.load_templates()
SINGLE = sorted(name for name, template in TEMPLATES.items() if "each" not in template)
SETS = sorted(name for name, template in TEMPLATES.items() if "each" in template)
EVERY_FIELD = [(name, field) for name, template in TEMPLATES.items() for field in template["fields"]]


def examples(name: str) -> dict[str, Any]:
    """The example values of a template."""
    return {field: rule["example"] for field, rule in TEMPLATES[name]["fields"].items()}


def is_chinese(text: str) -> bool:
    return len(re.findall(r"[\u4e00-\u9fff]", text)) > len(text) / 2


def fill(shell: Shell, name: str, values: Any, *, encoding: str = "utf-8") -> Result:
    path = shell.folder / "values.json"
    path.write_bytes((values if isinstance(values, str) else json.dumps(values, ensure_ascii=False)).encode(encoding))
    shell.script = FILL
    return shell.run(name, "--file", path.name)


def problem_of(result: Result) -> str:
    """What is wrong with the values: exit 2, nothing on stdout, and one line of advice."""
    assert result.code == 2
    assert result.stdout == ""
    result.assert_one_line_of_advice()
    return result.stderr


def rows_of(result: Result) -> list[dict[str, Any]]:
    assert result.code == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


def dry_run(shell: Shell, request: str) -> dict[str, Any]:
    (shell.folder / "request.json").write_text(request, encoding="utf-8")
    shell.script = GENERATE
    plan = shell.run("--file", "request.json", "--dry-run")
    assert plan.code == 0, plan.stderr
    assert plan.json["problems"] == []
    assert "warning" not in plan.stderr
    return plan.json


def batch(shell: Shell, rows: str, *arguments: str) -> dict[str, Any]:
    (shell.folder / "rows.jsonl").write_text(rows, encoding="utf-8")
    shell.script = BATCH
    done = shell.run("--input", "rows.jsonl", "--output-dir", "set", "--rpm", "0", *arguments)
    assert done.code == 0, done.stderr
    return done.json


# The worked prompts --------------------------------------------------------------------------------------------------


def test_there_are_a_dozen_worked_prompts_in_both_languages() -> None:
    assert len(WORKED) >= 12
    assert len(WORKED) == GUIDE.count("```json"), "a block without its brief"
    chinese = [request for request in REQUESTS if is_chinese(request["prompt"])]
    assert 5 <= len(chinese) <= len(REQUESTS) - 5
    for (brief, _), request in zip(WORKED, REQUESTS, strict=True):
        assert is_chinese(brief) or not is_chinese(request["prompt"]), "not the user's language"


@pytest.mark.parametrize("request_", REQUESTS, ids=range(len(REQUESTS)))
def test_a_worked_prompt_is_a_valid_request(shell: Shell, mock: MockServer, request_: dict[str, Any]) -> None:
    shell.use(mock)
    assert request_problems(request_) == []
    assert set(request_) <= {"prompt", "aspect_ratio", "prompt_extend"}
    plan = dry_run(shell, json.dumps(request_, ensure_ascii=False))
    assert plan["request"]["size"] == RATIO_SIZES[request_["aspect_ratio"]]


@pytest.mark.parametrize("request_", REQUESTS, ids=range(len(REQUESTS)))
def test_a_worked_prompt_follows_the_guide(request_: dict[str, Any]) -> None:
    prompt = request_["prompt"]
    assert prompt.count('"') % 2 == 0
    assert not set("“”‘’「」") & set(prompt), "lettering stands between straight double quotes"
    if request_.get("prompt_extend"):
        return  # short on purpose: the service writes the rest
    if is_chinese(prompt):
        assert 120 <= len(prompt) <= 300
    else:
        assert 60 <= len(prompt.split()) <= 130
    assert len(prompt) <= LONG_PROMPT


def test_one_example_shows_when_prompt_extend_is_worth_double() -> None:
    assert sum(request.get("prompt_extend", False) for request in REQUESTS) == 1


def test_the_mock_draws_every_worked_prompt(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    rows = "\n".join(json.dumps(request, ensure_ascii=False) for request in REQUESTS)
    assert batch(shell, rows, "--no-gallery")["saved"] == len(REQUESTS)
    assert mock.stats()["billed"] == len(REQUESTS)


def test_the_guide_names_only_ratios_that_exist_and_all_of_them() -> None:
    assert set(re.findall(r"\b\d+:\d+\b", GUIDE)) == set(RATIO_SIZES)


def test_negative_prompts_are_nowhere_a_field() -> None:
    texts = [GUIDE, FILL.read_text(encoding="utf-8")]
    texts += [path.read_text(encoding="utf-8") for path in (SKILL / "assets" / "templates").iterdir()]
    for text in texts:
        assert "negative_prompt" not in text


def test_the_guide_names_every_template() -> None:
    named = GUIDE.partition("## Templates")[2]
    for name in TEMPLATES:
        assert f"`{name}`" in named


def test_the_guide_stays_short_enough_to_be_read() -> None:
    assert len(GUIDE.splitlines()) <= 160


# The templates -------------------------------------------------------------------------------------------------------


def test_the_templates_are_these() -> None:
    assert SINGLE == ["hero-banner", "portrait", "poster", "product"]
    assert SETS == ["icon-set", "story-panels"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_uses_every_field_that_it_describes_and_no_other(name: str) -> None:
    template = TEMPLATES[name]
    used = {hole for value in template["request"].values() for hole in fill_template.PLACEHOLDER.findall(value)}
    assert used - {"number"} == set(template["fields"])
    assert set(template) <= {"title", "fields", "request", "each"}
    for rule in template["fields"].values():
        assert set(rule) == {"description", "example"}
    leftovers = "".join(template["request"].values())
    assert not set("{}") & set(fill_template.PLACEHOLDER.sub("", leftovers)), "a placeholder that is none"


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_examples_of_a_template_become_valid_requests_of_good_length(name: str) -> None:
    for row in fill_template.fill(TEMPLATES[name], examples(name)):
        request = {field: value for field, value in row.items() if field not in ("id", "output")}
        assert request_problems(request) == []
        assert 350 <= len(row["prompt"]) <= LONG_PROMPT
        assert row["prompt"].count('"') % 2 == 0


@pytest.mark.smoke
@pytest.mark.parametrize("name", SINGLE)
def test_a_template_of_one_picture_is_planned_and_drawn(shell: Shell, mock: MockServer, name: str) -> None:
    shell.use(mock)
    filled = fill(shell, name, examples(name))
    assert filled.code == 0, filled.stderr
    assert dry_run(shell, filled.stdout)["request"]["prompt"] == filled.json["prompt"]
    drawn = shell.run("--file", "-", "--print-response", stdin=filled.stdout.encode())
    assert drawn.code == 0, drawn.stderr
    size = f"{drawn.json['width']}*{drawn.json['height']}"
    assert size == RATIO_SIZES[filled.json["aspect_ratio"]]
    assert mock.stats()["billed"] == 1


@pytest.mark.parametrize("name", SETS)
def test_a_template_of_a_set_is_planned_and_drawn(shell: Shell, mock: MockServer, name: str) -> None:
    shell.use(mock)
    filled = fill(shell, name, examples(name))
    count = len(rows_of(filled))
    assert batch(shell, filled.stdout, "--dry-run")["pictures"] == count
    assert mock.stats()["billed"] == 0
    assert batch(shell, filled.stdout, "--no-gallery")["saved"] == count
    assert mock.stats()["billed"] == count
    for row in rows_of(filled):
        assert Path(shell.folder, "set", row["output"]).stat().st_size > 1000


@pytest.mark.parametrize("name", SETS)
def test_the_rows_of_a_set_share_all_but_what_they_show(name: str) -> None:
    values = examples(name)
    items = values[TEMPLATES[name]["each"]]
    rows = fill_template.fill(TEMPLATES[name], values)
    assert len(rows) == len(items) > 1
    assert len({row["prompt"].replace(item, "") for row, item in zip(rows, items, strict=True)}) == 1
    assert {row["seed"] for row in rows} == {values["seed"]}
    assert [row["id"][-2:] for row in rows] == [f"{number:02}" for number in range(1, len(rows) + 1)]
    assert len({row["output"] for row in rows}) == len(rows)


# What is refused -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "field"), EVERY_FIELD)
def test_a_missing_field_is_named(name: str, field: str) -> None:
    values = examples(name)
    del values[field]
    with pytest.raises(Failure, match=rf"^{field}: missing \(") as caught:
        fill_template.fill(TEMPLATES[name], values)
    assert caught.value.fault.exit_code == 2


def test_all_that_is_wrong_with_the_values_is_told_at_once(shell: Shell) -> None:
    values = examples("poster") | {"subtitle": "x", "scene": "  ", "style": 3}
    del values["title"]
    told = problem_of(fill(shell, "poster", values))
    for sentence in (
        "title: missing (the title, exactly",
        '"subtitle": unknown field; known are title, line,',
        "scene: is blank",
        "style: must be of type string, got integer",
    ):
        assert sentence in told
    assert "--list" in told.splitlines()[-1]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("icons", "a bell", "icons: must be of type array, got string"),
        ("icons", [], "icons: must hold texts, none of them blank"),
        ("icons", ["a bell", " "], "icons: must hold texts, none of them blank"),
        ("icons", ["a bell", 7], "icons: must hold texts, none of them blank"),
        ("icons", ["a bell", "a bell"], 'icons: "a bell" stands in it twice, and would be paid for twice'),
        ("seed", -1, "seed: must be from 0 to 2147483647, got -1"),
        ("seed", 2**31, "seed: must be from 0 to 2147483647"),
        ("seed", True, "seed: must be of type integer, got boolean"),
        ("seed", "7", "seed: must be of type integer, got string"),
        ("style", None, "style: must be of type string, got null"),
        ("style", "half \ud83d", "style: holds a lone surrogate"),
    ],
)
def test_a_wrong_value_is_named(field: str, value: Any, told: str) -> None:
    with pytest.raises(Failure) as caught:
        fill_template.fill(TEMPLATES["icon-set"], examples("icon-set") | {field: value})
    assert caught.value.message.startswith(told)


def test_a_quote_inside_quoted_lettering_is_refused(shell: Shell) -> None:
    told = problem_of(fill(shell, "poster", examples("poster") | {"title": '"春茶市集"'}))
    assert "title: stands in quotes already" in told


@pytest.mark.parametrize("values", ["", "[]", '{"title": ', '{"title": "a", "title": "b"}', "null"])
def test_values_that_are_no_json_object_are_refused(shell: Shell, values: str) -> None:
    assert "error: invalid_request: " in problem_of(fill(shell, "poster", values))


@pytest.mark.parametrize(
    "arguments",
    [(), ("poster",), ("banner", "--file", "-"), ("--list", "poster"), ("../x", "--file", "-"), ("--lis",)],
)
def test_a_wrong_command_line_is_refused(shell: Shell, arguments: tuple[str, ...]) -> None:
    shell.script = FILL
    problem_of(shell.run(*arguments))


def test_a_wrong_name_is_answered_with_the_right_ones(shell: Shell) -> None:
    assert ", ".join(TEMPLATES) in problem_of(fill(shell, "banner", {}))


def test_a_missing_file_is_refused(shell: Shell) -> None:
    shell.script = FILL
    assert "error: file_unreadable: " in problem_of(shell.run("poster", "--file", "none.json"))


# What survives -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_quotes_braces_newlines_and_chinese_survive(shell: Shell, encoding: str) -> None:
    odd = '罐上写着"春",\\ 旁边 {title} and {0} \n $HOME “é” 🍵'
    filled = fill(shell, "poster", examples("poster") | {"scene": odd, "title": "{line} “春”"}, encoding=encoding)
    assert filled.code == 0, filled.stderr
    assert odd in filled.json["prompt"]
    assert '"{line} “春”"' in filled.json["prompt"], "a value is not filled in turn"
    rows = rows_of(fill(shell, "icon-set", examples("icon-set") | {"icons": [odd, "茶"]}))
    assert odd in rows[0]["prompt"] and "茶" in rows[1]["prompt"]


def listed_fields(listed: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for template in listed.values():
        yield from template["fields"].values()


def test_list_tells_all_that_filling_takes(shell: Shell) -> None:
    shell.script = FILL
    listed = shell.run("--list")
    assert listed.code == 0
    assert list(listed.json) == list(TEMPLATES)
    assert all(rule["description"] and rule["example"] for rule in listed_fields(listed.json))
    assert "generate_batch.py" in listed.json["icon-set"]["makes"]
    assert listed.json["poster"]["makes"] == "one request"


def test_filling_writes_no_file_and_needs_no_package(shell: Shell) -> None:
    for package in ("requests", "jsonschema", "PIL"):
        (shell.home / f"{package}.py").write_text("raise ImportError", encoding="utf-8")
    shell.env["PYTHONPATH"] = str(shell.home)
    assert fill(shell, "poster", examples("poster")).code == 0
    assert problem_of(fill(shell, "poster", {"x": "y"}))
    assert shell.files() == ["values.json"]
