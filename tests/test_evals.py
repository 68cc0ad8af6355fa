"""The evals of the skill: reference solutions pass, wrong ones fail for the reason they name, files keep their form.

Everything is played by two workers while the tests look at one verdict after the other: most of it is waiting.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conftest import ROOT, SKILL, TEST_KEY

TOLD_IN = SKILL / "evals"
EVALS = ROOT / "tests" / "evals"
RUNNER = EVALS / "run_evals.py"

spec = importlib.util.spec_from_file_location("run_evals", RUNNER)
assert spec and spec.loader
run_evals: Any = importlib.util.module_from_spec(spec)
spec.loader.exec_module(run_evals)

TASKS: dict[str, Any] = run_evals.load_tasks()
TOLD = json.loads((TOLD_IN / "evals.json").read_text(encoding="utf-8"))
TRIGGERS = json.loads((TOLD_IN / "triggers.json").read_text(encoding="utf-8"))
WRONG: dict[tuple[str, str], Any] = {
    (path.stem, wrong["name"]): wrong
    for path in sorted((EVALS / "wrong").glob("*.json"))
    for wrong in json.loads(path.read_text(encoding="utf-8"))
}
G = 'python3 "$SKILL_DIR/scripts/generate_image.py"'
B = 'python3 "$SKILL_DIR/scripts/generate_batch.py"'
BOAT = '"prompt": "a paper boat on calm water, pastel colors", "seed": 7'
# Other ways that are as right as the reference solution: the checks must not ask for one way.
ALSO_RIGHT: dict[tuple[str, str], list[Any]] = {
    ("blog-header", "in Chinese, larger, looked at before"): [
        f'{G} --prompt "雪地里的红狐,晨光" --size 2048x1152 --output header.png --dry-run',
        f'{G} --check && {G} --prompt "雪地里的红狐,晨光" --size 2048x1152 --output header.png --print-response',
    ],
    ("brief-verbatim", "read by the shell"): [f'{G} --prompt "$(cat brief.txt)" --size 512x768 --output window.png'],
    ("three-sizes", "as a batch"): [
        {
            "file": "rows.jsonl",
            "text": "".join(
                f'{{{BOAT}, "size": "{size}", "output": "{name}.png"}}\n'
                for size, name in (("1024*1024", "square"), ("1280*720", "wide"), ("720*1280", "tall"))
            ),
        },
        f"{B} --input rows.jsonl --output-dir output/boat --max-cost 0.05 --rpm 0",
    ],
    ("four-variants", "one after the other"): [
        f'for n in 1 2 3 4; do {G} --prompt "a ceramic teapot on a linen cloth" --size 512x512 --output $n.png; done'
    ],
    ("webp-of-mine", "converted without the skill"): [
        ["python3", "-c", "from PIL import Image; Image.open('bamboo.png').save('bamboo.webp')"]
    ],
    ("name-taken", "another name at once"): [f'ls; {G} --prompt "秋天的银杏大道" --size 512x512 --output ginkgo.png'],
    ("wrong-key", "asked for free"): [f"{G} --check"],
    ("long-wait", "once more after a minute"): [f'for n in 1 2; do {G} --prompt "小木屋" --size 512x512; done'],
    ("killed-batch", "with the unknown one looked at"): [
        f"{B} --status output/animals; cat rows.jsonl",
        f"{B} --input rows.jsonl --output-dir output/animals --dry-run",
        f"{B} --input rows.jsonl --output-dir output/animals --max-cost 0.09 --time-limit 100",
        "cat output/animals/results.jsonl",
    ],
    ("video", "asked what is possible"): [f"{G} --help"],
}
# A range of numbers, or one.
NUMBER = {
    "oneOf": [
        {"type": "number", "minimum": 0},
        {"type": "array", "items": {"type": "number", "minimum": 0}, "minItems": 2, "maxItems": 2},
    ]
}
STEPS = {
    "type": "array",
    "minItems": 1,
    "items": {
        "oneOf": [
            {"type": "string", "minLength": 1},
            {"type": "array", "items": {"type": "string"}, "minItems": 1},
            {
                "type": "object",
                "properties": {"file": {"type": "string"}, "text": {"type": "string"}},
                "required": ["file", "text"],
                "additionalProperties": False,
            },
        ]
    },
}

posix = pytest.mark.skipif(os.name == "nt", reason="the steps are lines for sh")


def is_chinese(text: str) -> bool:
    return bool(re.search("[\u4e00-\u9fff]{2}", text))


def strict(required: dict[str, Any], **optional: Any) -> dict[str, Any]:
    """The schema of an object that has these fields and no others."""
    properties = required | optional
    return {"type": "object", "properties": properties, "required": list(required), "additionalProperties": False}


# The files ------------------------------------------------------------------------------------------------------------


def test_evals_json_has_the_shape_of_the_format_and_nothing_else() -> None:
    text = {"type": "string", "minLength": 1}
    one = {
        "id": {"type": "integer", "minimum": 1},
        "prompt": text,
        "expected_output": text,
        "files": {"type": "array", "items": {"type": "string", "pattern": "^evals/files/[^/]+$"}},
        "assertions": {"type": "array", "items": text, "minItems": 1},
    }
    jsonschema.validate(
        TOLD, strict({"skill_name": {"const": SKILL.name}, "evals": {"type": "array", "items": strict(one)}})
    )


def test_checks_json_has_a_scene_and_checks_for_every_task() -> None:
    extra = json.loads((EVALS / "checks.json").read_text(encoding="utf-8"))
    texts = {"type": "object", "additionalProperties": {"type": "string"}}
    mock = strict({}, latency=NUMBER, faults={"type": "string"}, link_ttl=NUMBER)
    setup = strict({}, env=texts, write=texts, before=STEPS, mock=mock, step_limit_s=NUMBER)
    checks = {"type": "object", "propertyNames": {"enum": list(run_evals.CHECKS)}, "required": ["billed"]}
    task = {"id": {"type": "integer"}, "name": {"pattern": "^[a-z0-9-]+$"}, "setup": setup, "checks": checks}
    jsonschema.validate(extra, strict({"tasks": {"type": "array", "items": strict(task)}}))
    assert [task["id"] for task in extra["tasks"]] == [told["id"] for told in TOLD["evals"]]


def test_there_are_tasks_of_all_kinds_in_both_languages() -> None:
    prompts = [told["prompt"] for told in TOLD["evals"]]
    ids = [told["id"] for told in TOLD["evals"]]
    assert len(prompts) >= 25
    assert len(set(ids)) == len(ids) == len(TASKS) == len(set(prompts))
    chinese = sum(map(is_chinese, prompts))
    assert chinese >= 10 and len(prompts) - chinese >= 10
    # What a person grades is said in the language of the user.
    for told in TOLD["evals"]:
        assert is_chinese(told["prompt"]) == is_chinese(told["expected_output"]), told["id"]


def test_every_file_belongs_to_a_task() -> None:
    used = {Path(file).name for told in TOLD["evals"] for file in told["files"]}
    assert {path.name for path in (TOLD_IN / "files").iterdir()} == used
    assert {path.stem for path in (EVALS / "solutions").iterdir()} == set(TASKS)
    assert {path.stem for path in (EVALS / "wrong").iterdir()} == set(TASKS)


def test_solutions_and_wrong_ones_keep_their_form() -> None:
    for name in TASKS:
        jsonschema.validate(run_evals.solution(TASKS[name]), STEPS)
    reasons = {"type": "array", "items": {"enum": list(run_evals.CHECKS)}, "minItems": 1, "uniqueItems": True}
    for wrong in WRONG.values():
        jsonschema.validate(wrong, strict({"name": {"type": "string"}, "fails": reasons, "steps": STEPS}))


def test_every_check_is_failed_by_some_wrong_solution() -> None:
    failed = {check for wrong in WRONG.values() for check in wrong["fails"]}
    assert failed == {check for task in TASKS.values() for check in run_evals.FOR_ALL | task.checks}


def test_triggers_have_both_answers_in_both_languages() -> None:
    one = strict({"query": {"type": "string", "minLength": 5}, "should_trigger": {"type": "boolean"}})
    jsonschema.validate(TRIGGERS, {"type": "array", "items": one, "minItems": 18, "maxItems": 30})
    assert len({trigger["query"] for trigger in TRIGGERS}) == len(TRIGGERS)
    kinds = [(trigger["should_trigger"], is_chinese(trigger["query"])) for trigger in TRIGGERS]
    for kind in ((True, True), (True, False), (False, True), (False, False)):
        assert kinds.count(kind) >= 4, kind


# The verdicts ---------------------------------------------------------------------------------------------------------

Play = Callable[[str, str], Any]


def steps_of(name: str, way: str) -> list[Any]:
    if not way:
        return list(run_evals.solution(TASKS[name]))
    return ALSO_RIGHT.get((name, way)) or list(WRONG[name, way]["steps"])


def play_once(shared: Path, name: str, way: str, *, wait: bool) -> Any:
    """The verdict, played here or by another process of this run; None where that one is not waited for."""
    folder = shared / hashlib.sha256(f"{name} {way}".encode()).hexdigest()[:16]
    told = folder / "verdict.json"
    try:
        folder.mkdir(parents=True)
    except FileExistsError:
        end = time.monotonic() + (300 if wait else 0)
        while not told.exists() and time.monotonic() < end:
            time.sleep(0.02)
        return json.loads(told.read_text(encoding="utf-8")) if told.exists() else None
    try:
        verdict = run_evals.played(TASKS[name], steps_of(name, way))
    except Exception as error:  # whoever waits for it is told
        verdict = {"passed": False, "failed": [repr(error)], "checks": [], "commands": []}
    (folder / "part.json").write_text(json.dumps(verdict), encoding="utf-8")
    (folder / "part.json").rename(told)
    return verdict


@pytest.fixture(scope="module")
def play(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Play]:
    """The verdict on one way to solve a task, by name; "" is the reference. All that were collected are under way.

    Every process of a run collects all: each case is played by the one that comes to it first.
    """
    cases: list[tuple[str, str]] = [
        (str(item.callspec.params["task"]), str(item.callspec.params.get("way", "")))
        for item in request.session.items
        if isinstance(item, pytest.Function) and item.module is request.module and "play" in item.fixturenames
    ]
    base = tmp_path_factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "verdicts"
    with ThreadPoolExecutor(2) as pool:
        for name, way in cases:
            pool.submit(play_once, shared, name, way, wait=False)
        yield lambda name, way: play_once(shared, name, way, wait=True)
        pool.shutdown(cancel_futures=True)


@pytest.mark.smoke
@posix
@pytest.mark.parametrize("task", TASKS)
def test_the_reference_solution_passes(play: Play, task: str) -> None:
    verdict = play(task, "")
    failed = [check for check in verdict["checks"] if not check["passed"]]
    assert verdict["passed"] and not failed, (failed, verdict["commands"])


@posix
@pytest.mark.parametrize(("task", "way"), ALSO_RIGHT)
def test_another_right_way_passes_too(play: Play, task: str, way: str) -> None:
    verdict = play(task, way)
    failed = [check for check in verdict["checks"] if not check["passed"]]
    assert verdict["passed"] and not failed, (failed, verdict["commands"])


LAST_IN_CHECK = 43  # of the tasks; the wrong ways of those after it are for `make check-all`


@posix
@pytest.mark.parametrize(
    ("task", "way"),
    [
        pytest.param(task, way, marks=[pytest.mark.heavy] * (TASKS[task].id > LAST_IN_CHECK), id=f"{task}-{way}")
        for task, way in WRONG
    ],
)
def test_a_wrong_solution_fails_for_the_reason_that_it_names(play: Play, task: str, way: str) -> None:
    verdict = play(task, way)
    assert set(verdict["failed"]) == set(WRONG[task, way]["fails"]), (verdict["checks"], verdict["commands"])
    assert not verdict["passed"]


# The runner -----------------------------------------------------------------------------------------------------------


def runner(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(RUNNER), *arguments]
    return subprocess.run(command, input="", capture_output=True, timeout=60, check=False, encoding="utf-8")


@posix
def test_the_runner_grades_a_kept_folder_again(tmp_path: Path) -> None:
    kept = tmp_path / "kept"
    done = runner("--task", "short-prompt", "--keep", str(kept))
    assert done.returncode == 0, done.stderr
    verdict = json.loads(done.stdout)
    again = runner("--after", str(kept))
    assert again.returncode == 0
    # Grading reads the folder only: what was played, said or returned is not in it.
    assert json.loads(again.stdout) == {name: value for name, value in verdict.items() if name != "commands"}
    for picture in kept.glob("project/output/ai-image-zimage-turbo/images/*"):
        picture.write_bytes(picture.read_bytes()[:-5000])
    broken = runner("--after", str(kept))
    assert broken.returncode == 1
    assert json.loads(broken.stdout)["failed"] == ["whole", "pictures"]


@posix
def test_the_runner_takes_commands_from_a_file(tmp_path: Path) -> None:
    commands = tmp_path / "commands.json"
    steps = [
        {"file": "notes/request.json", "text": '{"prompt": "一只猫", "size": "512*512"}'},
        ["python3", "$SKILL_DIR/scripts/generate_image.py", "--file", "notes/request.json", "--quiet"],
    ]
    commands.write_text(json.dumps(steps), encoding="utf-8")
    done = runner("--task", str(TASKS["short-prompt"].id), "--commands", str(commands))
    assert (done.returncode, json.loads(done.stdout)["passed"]) == (0, True), done.stdout
    commands.write_text('["exit 3", ["no-such-program"]]', encoding="utf-8")
    done = runner("--task", "short-prompt", "--commands", str(commands))
    assert (done.returncode, [step["exit_code"] for step in json.loads(done.stdout)["commands"]]) == (1, [3, 127])


@posix
def test_a_scene_can_be_played_live(tmp_path: Path) -> None:
    folder = tmp_path / "scene"
    command = [sys.executable, str(RUNNER), "--task", "short-prompt", "--live", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8") as process:
        assert process.stdin and process.stdout
        scene = json.loads(process.stdout.readline())
        assert scene["prompt"] == TASKS["short-prompt"].prompt
        skill = Path(scene["env"]["SKILL_DIR"])
        assert (skill / "SKILL.md").exists()
        assert not (skill / "evals").exists(), "the agent could look the solution up"
        script = [sys.executable, str(skill / "scripts" / "generate_image.py"), "--prompt", "猫", "--size", "512x512"]
        env = scene["env"] | {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
        subprocess.run(script, cwd=scene["cwd"], env=env, check=True, capture_output=True, timeout=60)
        verdict, _ = process.communicate(timeout=60)
    assert process.returncode == 0, verdict
    assert json.loads(verdict)["passed"]


@posix
def test_nothing_of_this_machine_is_in_a_scene(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DASHSCOPE_API_KEY", TEST_KEY)
    monkeypatch.setenv("OUTPUT_DIR", str(tmp_path / "elsewhere"))
    task = TASKS["short-prompt"]
    run_evals.played(task, ["env > env.txt", 'test -z "$(ls -A ~)" && test ! -t 0 && touch clean'], tmp_path / "kept")
    seen = (tmp_path / "kept/project/env.txt").read_text(encoding="utf-8")
    assert TEST_KEY not in seen
    assert "OUTPUT_DIR" not in seen
    assert (tmp_path / "kept/project/clean").exists()


@posix
def test_what_runs_on_in_the_background_is_ended(tmp_path: Path) -> None:
    run_evals.played(TASKS["short-prompt"], ["sleep 300 & echo $! > pid.txt"], tmp_path / "kept")
    pid = int((tmp_path / "kept/project/pid.txt").read_text(encoding="utf-8"))
    until = time.monotonic() + 30
    while not has_ended(pid):  # it was killed; a busy machine takes its time to carry that out
        assert time.monotonic() < until
        time.sleep(0.05)


def has_ended(pid: int) -> bool:
    status = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, check=False, text=True).stdout
    return status.strip() == "" or status.startswith("Z")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--task", "no-such-task"], "--list names them"),
        (["--commands", "x.json"], "need --task"),
        (["--task", "1", "--keep", "/"], "exists"),
    ],
)
def test_a_mistake_in_the_call_is_exit_2(arguments: list[str], said: str) -> None:
    done = runner(*arguments)
    assert done.returncode == 2
    assert said in done.stderr


def test_list_names_every_task() -> None:
    assert [line.split()[1] for line in runner("--list").stdout.splitlines() if line[:3].strip().isdigit()] == list(
        TASKS
    )


def test_values_are_compared_as_the_checks_say() -> None:
    assert run_evals.fits("A Fox\nin snow", ["fox", "snow|ice"])
    assert not run_evals.fits("a fox", ["fox", "snow"])
    assert run_evals.fits(" exact \n", "exact")
    assert not run_evals.fits("Exact", "exact")
    assert run_evals.within(3, [3, 4]) and not run_evals.within(5, [3, 4])
    assert run_evals.within(0.04302, 0.04302)


def test_the_runner_needs_no_package_that_the_scripts_do_not() -> None:
    def requirements(path: Path) -> str:
        found = re.search(r"# dependencies = \[\n(.*?)# \]\n", path.read_text(encoding="utf-8"), re.DOTALL)
        assert found
        return found[1]

    assert requirements(RUNNER) == requirements(SKILL / "scripts" / "generate_batch.py")
