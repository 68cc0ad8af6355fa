"""What GitHub reads: the workflow, Dependabot's settings and the forms for issues, held against the program."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml  # type: ignore[import-untyped]  # PyYAML comes with responses

from conftest import ROOT, SCRIPTS

GITHUB = ROOT / ".github"
FORMS = ["bug.yml", "idea.yml"]
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
WORKFLOW = (GITHUB / "workflows" / "check.yml").read_text(encoding="utf-8")


def read(path: Path) -> dict[Any, Any]:
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


def form(name: str) -> dict[str, dict[str, Any]]:
    """The fields of a form by their ids."""
    return {field["id"]: field for field in read(GITHUB / "ISSUE_TEMPLATE" / name)["body"] if "id" in field}


@pytest.fixture(scope="module")
def workflow() -> dict[Any, Any]:
    return read(GITHUB / "workflows" / "check.yml")


@pytest.fixture(scope="module")
def job(workflow: dict[Any, Any]) -> dict[str, Any]:
    (job,) = workflow["jobs"].values()
    assert isinstance(job, dict)
    return job


@pytest.mark.smoke
def test_every_yaml_file_is_valid() -> None:
    paths = sorted(GITHUB.rglob("*.yml"))
    assert len(paths) == 5
    for path in paths:
        assert read(path), path


def test_the_workflow_runs_both_checks_on_all_systems_and_pythons(job: dict[str, Any]) -> None:
    matrix = job["strategy"]["matrix"]
    assert [name.split("-")[0] for name in matrix["os"]] == ["ubuntu", "macos", "windows"]
    assert not [name for name in matrix["os"] if name.endswith("-latest")]
    oldest = re.search(r'(?m)^# requires-python = ">=3\.(\d+)"$', (SCRIPTS / "generate_image.py").read_text("utf-8"))
    assert oldest
    assert matrix["python"] == [f"3.{minor}" for minor in range(int(oldest[1]), 16)]
    assert job["strategy"]["fail-fast"] is False
    light, heavy, audit = job["steps"][-3:]
    assert [step["run"] for step in (light, heavy, audit)] == ["make check", "make check-all", "make audit"]
    assert "CI" in heavy["env"]
    assert "if" not in light and "if" not in heavy  # the audit asks the same of every system: once is enough


def test_the_workflow_has_no_more_rights_and_time_than_it_needs(workflow: dict[Any, Any], job: dict[str, Any]) -> None:
    assert set(workflow[True]) == {"push", "pull_request"}  # `on` is a truth value in YAML 1.1
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["cancel-in-progress"] is True
    assert workflow["defaults"]["run"]["shell"] == "bash"
    assert 0 < job["timeout-minutes"] <= 60
    assert "secrets." not in WORKFLOW
    (checkout,) = [step for step in job["steps"] if step.get("uses", "").startswith("actions/checkout@")]
    assert checkout["with"]["persist-credentials"] is False


def test_every_action_is_pinned_and_says_its_version() -> None:
    used = re.findall(r"(?m)^ +(?:- )?uses: (.*)$", WORKFLOW)
    assert len(used) == 3
    for action in used:
        assert re.fullmatch(r"actions/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_dependabot_looks_after_packages_and_actions() -> None:
    settings = read(GITHUB / "dependabot.yml")
    assert settings["version"] == 2
    assert [update["package-ecosystem"] for update in settings["updates"]] == ["pip", "github-actions"]
    for update in settings["updates"]:
        assert update["directory"] == "/" and update["schedule"]["interval"]


@pytest.mark.parametrize("name", FORMS)
def test_a_form_has_what_github_needs(name: str) -> None:
    content = read(GITHUB / "ISSUE_TEMPLATE" / name)
    assert set(content) == {"name", "description", "labels", "body"}
    assert {field["type"] for field in content["body"]} <= {"markdown", "input", "textarea", "dropdown", "checkboxes"}
    for field in content["body"]:
        assert field["attributes"]["value" if field["type"] == "markdown" else "label"]
        assert ("id" in field) == (field["type"] != "markdown")
    first = content["body"][0]["attributes"]["value"]
    assert "no key" in first and "no signed link" in first and "密钥" in first


def test_the_bug_form_asks_for_what_tells_most() -> None:
    fields = form("bug.yml")
    for name in ("version", "provider", "exit_code", "command"):
        assert fields[name]["validations"]["required"] is True, name
    assert fields["error"]["attributes"]["render"] == "json"
    assert "image_url" in fields["error"]["attributes"]["description"]
    assert fields["clean"]["attributes"]["options"][0]["required"] is True


def test_the_bug_form_lists_the_providers_that_there_are() -> None:
    files = sorted(path.stem for path in (SCRIPTS / "providers").glob("*.py"))
    assert sorted(form("bug.yml")["provider"]["attributes"]["options"]) == sorted(["mock_server.py", *files])


def test_issues_come_by_a_form_and_accounts_go_to_their_providers() -> None:
    settings = read(GITHUB / "ISSUE_TEMPLATE" / "config.yml")
    assert settings["blank_issues_enabled"] is False
    for link in settings["contact_links"]:
        assert set(link) == {"name", "url", "about"}
        assert link["url"].startswith("https://")


def test_contributing_names_only_files_that_exist() -> None:
    for name in re.findall(r"\]\(([^)]+)\)", CONTRIBUTING):
        assert (ROOT / name).exists(), name
    for name in re.findall(r"`(?:[\w.]+ )?((?:scripts|tests|references)/[\w./]*)`", CONTRIBUTING):
        assert (ROOT / name).exists() or (SCRIPTS.parent / name).exists(), name
    assert "make check" in CONTRIBUTING and "AGENTS.md" in CONTRIBUTING
