"""The documents say what the program does: tables, examples and commands in them are held against it."""

from __future__ import annotations

import datetime as dt
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

import zimage.batch.contract
import zimage.batch.options as batch_options
from conftest import ROOT, SKILL, TEST_KEY, Shell
from fault_server import PICTURE, Answer, FaultServer, Received, file, json_answer, png
from mock_server import MockServer
from providers.dashscope import CODES, DashScope
from zimage import options
from zimage.calls import Generated, HttpAnswer
from zimage.codes import COMMON_CODES
from zimage.contract import ERROR_SCHEMA, RATIO_SIZES, VERSION
from zimage.errors import KINDS
from zimage.options import EPILOG
from zimage.request import normalize

SKILL_MD = (SKILL / "SKILL.md").read_text(encoding="utf-8")
README = (ROOT / "README.md").read_text(encoding="utf-8")
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
REFERENCES = {path.name: path.read_text(encoding="utf-8") for path in sorted((SKILL / "references").glob("*.md"))}
DOCUMENTS = {"SKILL.md": SKILL_MD, "README.md": README} | REFERENCES
SOURCES = "".join(path.read_text(encoding="utf-8") for path in sorted((SKILL / "scripts").rglob("*.py")))
# Each command, the reference that describes it, and options that are described in words there.
COMMANDS = [
    (options, "command_line.md", {"--version", "--region", "--base-url", "--provider", "--help"}),
    (batch_options, "batch.md", {"--version", "--help"}),
]


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"(?ms)^```{language}\n(.*?)^```", text)


def rows(text: str, columns: int) -> Iterator[list[str]]:
    """The cells of every table row that has this many columns, without headings."""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == columns and not set(line) <= set("|-: "):
            yield cells


def code_spans(cell: str) -> list[str]:
    return re.findall("`([^`]+)`", cell)


# SKILL.md ------------------------------------------------------------------------------------------------------------


def test_skill_md_is_short_enough_for_an_agent() -> None:
    assert 150 <= len(SKILL_MD.splitlines()) <= 200
    # Measured with two public tokenizers: 3.6 characters a token. Fewer are counted here, to be on the safe side.
    assert len(SKILL_MD) / 3.3 <= 3000


def test_skill_md_frontmatter_keeps_the_rules_of_the_format() -> None:
    frontmatter = SKILL_MD.split("---\n")[1]
    keys = re.findall(r"(?m)^([a-z-]+):", frontmatter)
    assert keys == ["name", "description", "license", "compatibility", "metadata"]
    # One line in quotes: an installer reads the form of several lines (`>-`) as that text.
    description = re.search(r'(?m)^description: "([^"\\]*)"$', frontmatter)[1]  # type: ignore[index]
    assert 300 <= len(description) <= 1024
    assert not set("<>") & set(description)
    for what, when, when_not in (("Make pictures", "Use when", "Do NOT use for"), ("文字变成图片", "时使用", "不用于")):
        assert what in description and when in description and when_not in description
    assert len(re.search(r"(?m)^compatibility: (.*)$", frontmatter)[1]) <= 500  # type: ignore[index]


def test_versions_in_script_skill_and_changelog_are_one() -> None:
    version = re.search(r'(?m)^  version: "(.*)"$', SKILL_MD)
    newest = re.search(r"(?m)^## (\S+)$", CHANGELOG)
    assert version and newest
    assert version[1] == newest[1] == VERSION


@pytest.mark.parametrize(
    "said",
    [
        "Category: provider",
        "z-image-turbo",
        "# Model Studio Z-Image Turbo",
        "## Critical model name",
        "## Prerequisites",
        "## Regions",
        "## Normalized interface (`image.generate`)",
        "## Quick start (curl)",
        "## Size notes",
        "## Cost notes",
        "## Output location",
        "## Validation",
        "## Output and evidence",
        "## Workflow",
        "## References",
        "## Gotchas",
        "dashscope_api_key",
        "~/.alibabacloud/credentials",
        "OUTPUT_DIR",
        "read-only",
    ],
)
def test_skill_md_keeps_what_the_project_came_from(said: str) -> None:
    assert said in SKILL_MD


def test_skill_md_names_each_reference_with_when_to_read_it() -> None:
    for name in REFERENCES:
        line = re.search(rf"(?m)^- `references/{re.escape(name)}`: when .+", SKILL_MD)
        assert line, name


def test_skill_md_tells_what_to_do_after_every_exit_code() -> None:
    told = {int(number) for cells in rows(SKILL_MD, 3) for number in re.findall(r"\b\d+\b", cells[0])}
    assert told == {0, 130, 143} | {kind.exit_code for kind in KINDS.values()} - {128}


@pytest.mark.smoke
def test_every_file_a_document_names_exists() -> None:
    for text in (README, SKILL_MD):
        for name in re.findall(r"\]\(([^)#:]+)\)|src=\"([^\"]+)\"", text):
            assert (ROOT / (name[0] or name[1])).exists(), name
    for name in re.findall(r"`((?:references|scripts)/[\w.]+)`", SKILL_MD):
        assert (SKILL / name).exists(), name


# Tables against the program ------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_errors_md_has_a_row_for_every_error_code_and_none_else() -> None:
    documented = {code_spans(cells[0])[0]: cells for cells in rows(REFERENCES["errors.md"], 4) if code_spans(cells[0])}
    assert set(documented) == set(KINDS)
    for code, kind in KINDS.items():
        if code in ("interrupted", "internal_error", "machine_limit"):  # these depend on when
            assert documented[code][2] == "as said"
            continue
        assert documented[code][1] == str(kind.exit_code), code
        assert documented[code][2] == kind.billed, code


def test_api_reference_lists_the_services_codes_as_the_script_reads_them() -> None:
    listed = [
        (code_spans(cells[0]), code_spans(cells[1]), int(cells[3]), cells[4], cells[5])
        for cells in rows(REFERENCES["api_reference.md"], 6)
        if cells[3].isdecimal()
    ]
    own = CODES[: -len(COMMON_CODES)]
    assert own + COMMON_CODES == CODES
    expected = []
    for row in own:
        kind = KINDS[row.kind]
        again = "yes" if kind.retryable else "never" if kind.billed == "unknown" else "no"
        text = [text.replace("(allocated )?", "") for text in row.text.split("|") if text]
        expected.append((row.names.split(), text, kind.exit_code, kind.billed, again))
    assert listed == expected


def test_api_reference_lists_the_sizes_that_aspect_ratio_picks() -> None:
    listed: dict[str, Any] = {}
    for ratios, near_1024, _, _ in rows(REFERENCES["api_reference.md"], 4):
        if re.fullmatch(r"[\d: ·]+", ratios):
            listed.update(zip(ratios.split(" · "), near_1024.replace("\\", "").split(" · "), strict=True))
    assert listed == RATIO_SIZES


def test_documented_prices_are_the_ones_that_are_estimated() -> None:
    listed = {
        cells[0].lower(): tuple(float(cell.removeprefix("US$")) for cell in cells[1:3])
        for cells in rows(REFERENCES["api_reference.md"], 4)
        if cells[1].startswith("US$")
    }
    assert listed == DashScope.prices
    assert f"US${DashScope.prices['beijing'][0]}" in SKILL_MD
    assert f"US${DashScope.prices['singapore'][0]}" in SKILL_MD


@pytest.mark.smoke
@pytest.mark.parametrize(("command", "reference", "in_words"), COMMANDS, ids=["image", "batch"])
def test_reference_and_help_name_the_same_options(command: Any, reference: str, in_words: set[str]) -> None:
    in_help = set(re.findall(r"--[a-z][a-z-]+", command.build_parser().format_help()))
    usage, *_ = blocks(REFERENCES[reference], "")
    in_usage = set(re.findall(r"--[a-z][a-z-]+", usage)) | {"--help"}
    assert in_usage == in_help
    described = set(re.findall(r"`(--[a-z][a-z-]+)", REFERENCES[reference]))
    assert in_help - described <= in_words


def test_batch_md_describes_every_state_of_a_picture() -> None:
    described = [code_spans(cells[0])[0] for cells in rows(REFERENCES["batch.md"], 3) if code_spans(cells[0])]
    schema = zimage.batch.contract.DATABASE_SCHEMA.partition("CHECK (state IN")[2]
    stated = re.findall(r"'(\w+)'", schema.partition("))")[0])
    assert described == stated


def test_batch_md_has_the_exit_codes_of_help() -> None:
    documented = [
        number for cells in rows(REFERENCES["batch.md"], 2) for number in re.findall(r"^\d[\d, ]*$", cells[0])
    ]
    told = re.findall(r"\b\d+\b", batch_options.EPILOG.partition("exit codes:")[2].partition("\n\n")[0])
    assert sorted({n for cell in documented for n in re.findall(r"\d+", cell)}) == sorted(set(told))


def test_the_summary_example_has_the_fields_of_a_summary(shell: Shell, mock: MockServer) -> None:
    example = json.loads(blocks(REFERENCES["batch.md"], "json")[0])
    shell.use(mock)
    shell.script = SKILL / "scripts" / "generate_batch.py"
    summary = shell.run("--prompt", "a fox", "--variants", "2", "--output-dir", "foxes").json
    assert list(summary) == list(example)
    assert list(summary["this_run"]) == list(example["this_run"])
    assert {name: summary[name] for name in ("total", "saved", "estimated_cost")} == {
        name: example[name] for name in ("total", "saved", "estimated_cost")
    }


def test_documented_environment_variables_are_the_ones_that_are_read() -> None:
    for cells in rows(REFERENCES["command_line.md"], 2):
        for name in code_spans(cells[0]):
            if re.fullmatch("[A-Z_]{6,}", name) and not name.endswith("_PROXY"):  # those requests reads
                assert f'"{name}"' in SOURCES, name


def test_readme_has_the_exit_codes_of_help() -> None:
    epilog = EPILOG + batch_options.EPILOG
    for cells in rows(README, 2):
        if re.fullmatch(r"\d[\d, ]*", cells[0]):
            assert re.search(rf"\b{re.escape(cells[0])}\b", epilog), cells


# Examples ------------------------------------------------------------------------------------------------------------


def test_the_request_example_is_what_is_sent() -> None:
    example = json.loads(blocks(REFERENCES["api_reference.md"], "json")[0])
    prompt = example["input"]["messages"][0]["content"][0]["text"]
    request = normalize({"prompt": prompt, "size": "1024*1024", "seed": 1234})
    assert DashScope().payload(request) == example


def test_the_response_example_is_understood() -> None:
    body = blocks(REFERENCES["api_reference.md"], "json")[1].encode()
    request = normalize({"prompt": "a calm lake at dawn", "prompt_extend": True})
    answer = HttpAnswer(200, {}, body)
    generated = DashScope().read(answer, request, dt.datetime.now(dt.timezone.utc))
    assert isinstance(generated, Generated)
    assert generated.image_url.startswith("https://dashscope-result-")
    assert generated.rewritten_prompt == "the prompt that was drawn"
    assert generated.request_id == "bf37…"


def test_the_error_example_is_valid() -> None:
    example = json.loads(blocks(REFERENCES["errors.md"], "json")[0])
    jsonschema.validate(example["error"], ERROR_SCHEMA)
    kind = KINDS[example["error"]["code"]]
    assert (kind.exit_code, kind.billed) == (example["error"]["exit_code"], example["error"]["billed"])


@pytest.fixture
def clone(shell: Shell) -> Shell:
    """A working folder laid out like a clone of the repository, `python` and `python3` being this interpreter."""
    shutil.copytree(ROOT / "skills", shell.folder / "skills", ignore=shutil.ignore_patterns("__pycache__"))
    bin_folder = shell.home / "bin"
    bin_folder.mkdir()
    for name in ("python", "python3"):
        launcher = bin_folder / name
        launcher.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n', encoding="utf-8")
        launcher.chmod(0o755)
    shell.env["PATH"] = f"{bin_folder}{os.pathsep}{os.environ['PATH']}"
    shell.env["SKILL_DIR"] = str(shell.folder / "skills/ai/image/alicloud-ai-image-zimage-turbo")
    return shell


def bash(shell: Shell, script: str) -> subprocess.CompletedProcess[bytes]:
    command = ["bash", "-euc", script]
    return subprocess.run(
        command, cwd=shell.folder, env=shell.environment(), capture_output=True, timeout=60, check=False
    )


def shell_examples() -> Iterator[tuple[str, str]]:
    """Every bash block of the documents but those that set the machine up (`make`, copying, activating)."""
    for name, text in DOCUMENTS.items():
        for number, block in enumerate(blocks(text, "bash")):
            if not re.search(r"(?m)^make |^cp -R", block):
                yield f"{name} {number}", block.replace("source .venv/bin/activate\n", "")


@pytest.mark.smoke
@pytest.mark.skipif(os.name == "nt", reason="the examples are for a POSIX shell")
@pytest.mark.parametrize(("name", "script"), list(shell_examples()), ids=lambda value: value if len(value) < 40 else "")
def test_every_shell_example_runs_against_the_mock(clone: Shell, mock: MockServer, name: str, script: str) -> None:
    clone.use(mock)
    (clone.folder / "products.csv").write_text('name,colour\nTeapot,"blue, glazed"\n', encoding="utf-8")  # a user's own
    script = script.replace(
        "https://dashscope.aliyuncs.com/api/v1/services/aigc/multimodal-generation/generation", mock.endpoint
    )
    done = bash(clone, script)
    assert done.returncode == 0, (script, done.stderr.decode())
    if "curl" in script:
        assert "image" in json.loads(done.stdout)["output"]["choices"][0]["message"]["content"][0]
    if "--print-response" in script:
        response = json.loads(done.stdout[done.stdout.rindex(b"\n{") if b"\n{" in done.stdout else 0 :])
        assert Path(response["image_path"]).stat().st_size > 1000
        assert mock.stats()["billed"] == 1
    if "py_compile" in script:
        marker = clone.folder / "output/alicloud-ai-image-zimage-turbo/validate.txt"
        assert marker.read_text(encoding="utf-8") == "py_compile_ok\n"


@pytest.mark.skipif(os.name == "nt", reason="the commands are for a POSIX shell")
@pytest.mark.parametrize("name", ["AGENTS.md", "CONTRIBUTING.md", "README.md"])
def test_the_commands_for_those_who_work_on_it_are_there(name: str) -> None:
    """`make` targets exist (other tests run them); what calls Python directly runs."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for block in blocks((ROOT / name).read_text(encoding="utf-8"), "bash"):
        for line in block.splitlines():
            if target := re.match(r"make ([a-z-]+)", line):
                assert re.search(rf"(?m)^{target[1]}:", makefile), line
            if line.startswith(".venv/bin/python "):
                words = line.partition("#")[0].replace(".venv/bin/python", sys.executable).split()
                done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
                assert done.returncode == 0, (line, done.stdout[-500:], done.stderr[-500:])


def test_there_are_shell_examples() -> None:
    assert len(list(shell_examples())) >= 5


@pytest.mark.skipif(os.name == "nt", reason="the examples are for a POSIX shell")
def test_the_copied_skill_folder_makes_a_picture_on_its_own(clone: Shell, mock: MockServer) -> None:
    clone.use(mock)
    copies = [block for block in blocks(README, "bash") if "cp -R" in block]
    assert len(copies) == 1
    assert bash(clone, copies[0]).returncode == 0
    for folder in (clone.home / ".claude/skills", clone.home / ".codex/skills", clone.folder / ".agents/skills"):
        clone.script = folder / "alicloud-ai-image-zimage-turbo/scripts/generate_image.py"
        assert clone.run("--prompt", "a red fox").code == 0


def test_agents_md_names_only_things_that_exist() -> None:
    text = (ROOT / "AGENTS.md").read_text(encoding="utf-8")
    for cells in rows(text, 2):
        for name in code_spans(cells[1]):
            if "/" in name or name.endswith((".py", ".md", ".json")):
                places = [*SKILL.rglob(Path(name).name), *(ROOT / "tests").rglob(Path(name).name)]
                found = any(path.as_posix().endswith(f"/{name}") for path in places)
            else:
                found = bool(re.search(rf"\b{re.escape(name.split('.')[-1])}\b", SOURCES))
            assert found, name


def test_the_provider_that_the_reference_writes_makes_a_picture(shell: Shell, tmp_path: Path) -> None:
    (source,) = blocks(REFERENCES["providers.md"], "python")
    scripts = tmp_path / "scripts"
    shutil.copytree(SKILL / "scripts", scripts, ignore=shutil.ignore_patterns("__pycache__"))
    (scripts / "providers" / "example.py").write_text(source, encoding="utf-8")
    shell.script = scripts / "generate_image.py"
    assert "example" in shell.run("--help").stdout
    with FaultServer() as server:

        def answer(request: Received) -> Answer:
            return json_answer({"id": "p-1", "image": request.root + PICTURE})

        server.play("/v1/images", answer)
        server.play(PICTURE, file(png(1024, 1024)))
        shell.env |= {"EXAMPLE_API_KEY": TEST_KEY, "EXAMPLE_BASE_URL": f"{server.root}/v1"}
        response = shell.run("--provider", "example", "--prompt", "a fox", "--seed", "7", "--print-response").json
        assert (response["request_id"], response["estimated_cost"]) == ("p-1", 0.01)
        assert json.loads(server.posts[0].body) == {"prompt": "a fox", "width": 1024, "height": 1024, "seed": 7}
        server.play("/v1/images", json_answer({"error": "no"}, 400))
        assert shell.run("--provider", "example", "--prompt", "a fox", "--print-response").error["exit_code"] == 2
