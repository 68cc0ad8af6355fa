"""The skill installed in every way that README tells, listed by its agent, and used from where it was put.

The agents are the real ones, where `make clients` puts them: in an empty home, without an account, with no way out of
this machine. What they install from is a git repository of what would be committed here.
"""

from __future__ import annotations

import ast
import filecmp
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from conftest import ROOT, SCRIPTS, SKILL, Result, Shell, cannot
from mock_server import MockServer
from package import members
from standalone import build
from zimage.contract import VERSION

NAME = SKILL.name
PLUGIN = "zimage-turbo@zimage-skills"
OPENAI_YAML = (SKILL / "agents" / "openai.yaml").read_text(encoding="utf-8")
CLIENTS = ROOT / ".venv" / "clients" / "node_modules" / ".bin"
REPOSITORY = "https://github.invalid/owner/zimage.git"
SOURCES = ["./", REPOSITORY]
FOR_BOTH = ["--agent", "claude-code", "codex"]
NOWHERE = "http://127.0.0.1:9"
QUIET = {
    "HTTP_PROXY": NOWHERE,
    "HTTPS_PROXY": NOWHERE,
    "NO_PROXY": "127.0.0.1",
    "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
    "DISABLE_TELEMETRY": "1",
}

pytestmark = pytest.mark.skipif(os.name == "nt", reason="make, bash, and the clients' places on POSIX")


def manifest(name: str) -> dict[str, Any]:
    data = json.loads((ROOT / name).read_text(encoding="utf-8"))
    assert isinstance(data, dict)
    return data


CLAUDE_MARKETPLACE = manifest(".claude-plugin/marketplace.json")
CODEX_MARKETPLACE = manifest(".agents/plugins/marketplace.json")
CODEX_PLUGIN = manifest("skills/.codex-plugin/plugin.json")


def command(shell: Shell, *words: str, folder: Path | None = None) -> Result:
    """Run a command in the shell's folder, home and environment, with an empty standard input."""
    done = subprocess.run(
        words,
        cwd=folder or shell.folder,
        env=shell.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=120,
        check=False,
    )
    return Result(done.returncode, done.stdout.decode("utf-8"), done.stderr.decode("utf-8"))


def output(shell: Shell, *words: str, folder: Path | None = None) -> str:
    done = command(shell, *words, folder=folder)
    assert done.code == 0, (words, done)
    return done.stdout


def assert_whole(folder: Path) -> None:
    """The folder is the skill: the same files with the same bytes, no more and no fewer."""
    names = list(members(SKILL))
    assert list(members(folder)) == names
    assert filecmp.cmpfiles(SKILL.parent, folder.parent, names, shallow=False)[1:] == ([], [])


def assert_draws(shell: Shell, mock: MockServer, folder: Path, *python: str) -> None:
    """Both commands of a folder, run by `python`, make a picture and need nothing beside it."""
    shell.use(mock)
    one = output(shell, *python, str(folder / "scripts/generate_image.py"), "--prompt", "a red fox", "--quiet").strip()
    with Image.open(one) as picture:
        assert picture.size == (1024, 1024)
    batch = folder / "scripts/generate_batch.py"
    summary = output(shell, *python, str(batch), "--prompt", "a fox", "--variants", "2", "--output-dir", "foxes")
    assert json.loads(summary)["saved"] == 2
    assert mock.stats()["billed"] == 3


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of this project: what a commit of the working tree would hold, so nothing that git ignores."""
    if not shutil.which("git"):
        cannot("run git")
    clone = tmp_path_factory.mktemp("repository") / "zimage"
    for name in (".agents", ".claude-plugin", "skills", "tests"):
        shutil.copytree(ROOT / name, clone / name)
    for name in (".gitignore", "Makefile", "README.md"):
        shutil.copy(ROOT / name, clone)
    who = ["-c", "user.name=test", "-c", "user.email=test@example.invalid", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "-A"], [*who, "commit", "-qm", "all"], ["clean", "-qfdX"]):
        subprocess.run(["git", *words], cwd=clone, check=True, capture_output=True)
    return clone


@pytest.fixture
def agents(shell: Shell, repository: Path, tmp_path: Path) -> Shell:
    """The shell with the agents' programs in its PATH, and `REPOSITORY` leading to the clone."""
    if not all((CLIENTS / name).exists() for name in ("claude", "codex", "skills")):
        cannot("run the agents: `make clients` installs them, with npm")
    (shell.home / ".gitconfig").write_text(f'[url "{repository.as_uri()}"]\n  insteadOf = {REPOSITORY}\n')
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    shell.env |= QUIET | {"PATH": f"{CLIENTS}{os.pathsep}{os.environ['PATH']}", "TMPDIR": str(temporary)}
    return shell


def claude_skills(shell: Shell) -> list[str]:
    """The skills that Claude Code has: it names them when it starts, before it finds that nobody is logged in."""
    done = command(shell, "claude", "-p", "hello", "--output-format", "stream-json", "--verbose")
    started = json.loads(done.stdout.splitlines()[0])
    assert (started["subtype"], started["apiKeySource"]) == ("init", "none")
    return [name for name in started["skills"] if NAME in name]


def codex_skills(shell: Shell) -> list[dict[str, Any]]:
    """The skills that Codex has, as it describes them to its windows; what it tells the model must name each."""
    requests: list[dict[str, Any]] = [
        {"id": 1, "method": "initialize", "params": {"clientInfo": {"name": "test", "version": "1"}}},
        {"method": "initialized"},
        {"id": 2, "method": "skills/list", "params": {"cwds": [str(shell.folder)]}},
    ]
    process = subprocess.Popen(
        ["codex", "app-server"],
        cwd=shell.folder,
        env=shell.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    shell.keep(process)
    assert process.stdin and process.stdout
    watchdog = threading.Timer(60, process.kill)
    watchdog.daemon = True
    watchdog.start()
    process.stdin.write("".join(json.dumps(request) + "\n" for request in requests).encode())
    process.stdin.flush()
    answer = next(answer for answer in map(json.loads, process.stdout) if answer.get("id") == 2)
    watchdog.cancel()
    process.communicate(timeout=60)
    (listed,) = answer["result"]["data"]
    assert listed["errors"] == []
    skills = [skill for skill in listed["skills"] if NAME in skill["name"]]
    told = output(shell, "codex", "debug", "prompt-input", "hello")
    assert all(f"- {skill['name']}: Make pictures from text prompts" in told for skill in skills)
    return skills


# One version, and manifests that keep their rules ---------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("script", ["generate_image.py", "generate_batch.py"])
def test_the_manifests_have_the_version_of_the_program(shell: Shell, script: str) -> None:
    shell.script = SCRIPTS / script
    version = shell.run("--version").stdout.split()[-1]
    (entry,) = CLAUDE_MARKETPLACE["plugins"]
    assert [CLAUDE_MARKETPLACE["metadata"]["version"], entry["version"], CODEX_PLUGIN["version"]] == [version] * 3
    assert version == VERSION  # test_documents.py holds it against SKILL.md and CHANGELOG.md


def test_the_manifests_name_one_marketplace_and_one_plugin() -> None:
    plugins = [(place["plugins"][0]["name"], place["name"]) for place in (CLAUDE_MARKETPLACE, CODEX_MARKETPLACE)]
    assert {"@".join(names) for names in plugins} == {PLUGIN}
    assert CODEX_PLUGIN["name"] == PLUGIN.split("@")[0]


def test_the_texts_for_codex_have_the_lengths_that_it_shows() -> None:
    prompts = CODEX_PLUGIN["interface"]["defaultPrompt"]
    assert 1 <= len(prompts) <= 3 and all(len(prompt) <= 128 for prompt in prompts)
    fields = dict(re.findall(r'(?m)^  (\w+): "(.*)"$', OPENAI_YAML))
    assert 25 <= len(fields["short_description"]) <= 64
    assert f"${NAME} " in fields["default_prompt"]


def test_the_skill_needs_no_file_that_some_installers_drop() -> None:
    dropped = re.compile(r"_.*|README\.md|metadata\.json")
    assert [name for name in members(SKILL) if dropped.fullmatch(Path(name).name)] == []


def test_readme_tells_the_commands_that_are_tested_here() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    (skills,) = re.findall(r"skills@[\d.]+", (ROOT / "Makefile").read_text(encoding="utf-8"))
    for told in (
        f"claude plugin marketplace add ./ && claude plugin install {PLUGIN}",
        f"codex plugin marketplace add ./ && codex plugin add {PLUGIN}",
        f"npx {skills} add ./ --global",
        "make install-skill DEST=~/.claude/skills",
        "make package",
    ):
        assert told in readme


# Agents ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", SOURCES)
def test_claude_code_installs_the_plugin(agents: Shell, mock: MockServer, repository: Path, source: str) -> None:
    output(agents, "claude", "plugin", "validate", "--strict", str(repository))
    assert claude_skills(agents) == []
    output(agents, "claude", "plugin", "marketplace", "add", source, folder=repository)
    output(agents, "claude", "plugin", "install", PLUGIN)
    (plugin,) = json.loads(output(agents, "claude", "plugin", "list", "--json"))
    assert (plugin["id"], plugin["version"], plugin["enabled"]) == (PLUGIN, VERSION, True)
    assert claude_skills(agents) == [f"zimage-turbo:{NAME}"]
    installed = Path(plugin["installPath"])
    assert [path.name for path in installed.iterdir() if not path.name.startswith(".")] == [NAME]
    assert_whole(installed / NAME)
    assert_draws(agents, mock, installed / NAME, sys.executable)


@pytest.mark.parametrize("source", SOURCES)
def test_codex_installs_the_plugin(agents: Shell, mock: MockServer, repository: Path, source: str) -> None:
    assert codex_skills(agents) == []
    output(agents, "codex", "plugin", "marketplace", "add", source, folder=repository)
    plugin = json.loads(output(agents, "codex", "plugin", "add", PLUGIN, "--json"))
    assert (plugin["pluginId"], plugin["version"]) == (PLUGIN, VERSION)
    (skill,) = codex_skills(agents)
    assert (skill["name"], skill["enabled"]) == (f"zimage-turbo:{NAME}", True)
    shown = skill["interface"]
    assert [shown["displayName"], shown["shortDescription"], shown["defaultPrompt"]] == re.findall(
        r'(?m)^  \w+: "(.*)"$', OPENAI_YAML
    )
    folder = Path(skill["path"]).parent
    assert folder.is_relative_to(plugin["installedPath"])
    assert_whole(folder)
    assert_draws(agents, mock, folder, sys.executable)


@pytest.mark.parametrize("scope", ["global", "project"])
def test_npx_skills_installs_it_for_both(agents: Shell, mock: MockServer, repository: Path, scope: str) -> None:
    if scope == "global":
        above, asked = agents.home, ["--global"]
        output(agents, "skills", "add", "./", *asked, "--yes", *FOR_BOTH, folder=repository)
    else:
        above, asked = agents.folder, []
        output(agents, "skills", "add", REPOSITORY, "--yes", *FOR_BOTH)
    (listed,) = json.loads(output(agents, "skills", "list", *asked, "--json"))
    assert (listed["name"], listed["scope"]) == (NAME, scope)
    assert claude_skills(agents) == [NAME]
    (skill,) = codex_skills(agents)
    assert Path(skill["path"]).parent == Path(listed["path"])
    for place in (".agents", ".claude"):
        assert_whole(above / place / "skills" / NAME)
    assert_draws(agents, mock, above / ".claude/skills" / NAME, sys.executable)


@pytest.mark.parametrize("place", ["~/.claude/skills", ".claude/skills"])
def test_claude_code_finds_a_copy(agents: Shell, place: str) -> None:
    shutil.copytree(SKILL, expanded(agents, place) / NAME)
    assert claude_skills(agents) == [NAME]


@pytest.mark.parametrize("place", ["~/.codex/skills", "~/.agents/skills", ".agents/skills"])
def test_codex_finds_a_copy(agents: Shell, place: str) -> None:
    shutil.copytree(SKILL, expanded(agents, place) / NAME)
    (skill,) = codex_skills(agents)
    assert Path(skill["path"]) == expanded(agents, place) / NAME / "SKILL.md"


def expanded(shell: Shell, place: str) -> Path:
    return shell.home / place[2:] if place.startswith("~/") else shell.folder / place


# Without an agent -----------------------------------------------------------------------------------------------------


def packed(shell: Shell, clone: Path) -> Path:
    """The zip that `make package` leaves in the clone."""
    output(shell, "make", "package", folder=clone)
    (archive,) = (clone / "dist").glob("*.zip")
    assert archive.name == f"{NAME}-{VERSION}.zip"
    return archive


def test_packages_have_the_same_bytes_wherever_and_whenever_they_are_made(
    shell: Shell, repository: Path, tmp_path: Path
) -> None:
    shutil.copytree(repository, tmp_path / "other")
    skill = tmp_path / "other" / SKILL.relative_to(ROOT)
    for number, path in enumerate(sorted(skill.rglob("*"), reverse=True)):
        path.chmod(0o700)
        os.utime(path, (number, number + 1_000_000_000))
    for unwanted in (".env", "output/evidence.json", "scripts/__pycache__/generate_image.pyc"):
        (skill / unwanted).parent.mkdir(exist_ok=True)
        (skill / unwanted).write_text("private")
    archives = [packed(shell, clone) for clone in (repository, tmp_path / "other")]
    first, second = (hashlib.sha256(archive.read_bytes()).hexdigest() for archive in archives)
    assert first == second


def test_the_package_is_the_whole_skill(shell: Shell, mock: MockServer, repository: Path) -> None:
    shutil.unpack_archive(packed(shell, repository), shell.folder)
    assert [path.name for path in shell.folder.iterdir()] == [NAME]
    assert_whole(shell.folder / NAME)
    assert_draws(shell, mock, shell.folder / NAME, sys.executable)


def test_the_package_holds_nothing_that_only_its_makers_need(shell: Shell, repository: Path) -> None:
    """Of the evals what other tools read. How they are graded is of no use to users, and tells an agent the answers."""
    with zipfile.ZipFile(packed(shell, repository)) as archive:
        names = archive.namelist()
    told = json.loads((SKILL / "evals" / "evals.json").read_text(encoding="utf-8"))
    evals = {"evals/evals.json", "evals/triggers.json"}.union(*(one["files"] for one in told["evals"]))
    assert {name for name in names if name.startswith(f"{NAME}/evals/")} == {f"{NAME}/{name}" for name in evals}
    assert not [name for name in names if re.search(r"checks|solutions|wrong|run_evals|test", name.removeprefix(NAME))]
    assert len([name for name in names if not name.endswith(".py")]) <= 40  # modules are counted by nobody


@pytest.mark.parametrize("place", ["~/.claude/skills", "my agents/skills"])
def test_make_install_skill_puts_the_folder_directly_there(shell: Shell, repository: Path, place: str) -> None:
    relative = place if place.startswith("~") else str(shell.folder / place)
    output(shell, "make", "install-skill", f"DEST={relative}", folder=repository)
    assert_whole(expanded(shell, place) / NAME)
    assert [path.name for path in expanded(shell, place).iterdir()] == [NAME]


def test_make_install_skill_leaves_nothing_of_an_older_version_but_its_pictures(shell: Shell, repository: Path) -> None:
    old = shell.folder / NAME
    for name in ("scripts/providers/gone.py", "SKILL.md", "output/fishing.png"):
        (old / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).write_text("older")
    output(shell, "make", "install-skill", f"DEST={shell.folder}", folder=repository)
    assert (old / "output/fishing.png").read_text() == "older"
    shutil.rmtree(old / "output")
    assert_whole(old)


def test_make_install_skill_asks_where_to(shell: Shell, repository: Path) -> None:
    done = command(shell, "make", "install-skill", folder=repository)
    assert done.code == 2
    assert "make install-skill DEST=" in done.stderr


# The packages it needs ------------------------------------------------------------------------------------------------


def package_index() -> dict[str, str]:
    """How pip reaches its index on this machine, for pip and uv in an empty home."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    of_pip = {}
    for line in listed.stdout.splitlines():
        name, _, value = line.partition("=")
        of_pip[name.rpartition(".")[2]] = ast.literal_eval(value)
    for_uv = {
        "UV_DEFAULT_INDEX": of_pip.get("index-url"),
        "UV_INDEX": of_pip.get("extra-index-url"),
        "UV_FIND_LINKS": ",".join(of_pip.get("find-links", "").split()),
        "SSL_CERT_FILE": of_pip.get("cert"),
    }
    proxies = {name: value for name, value in os.environ.items() if name.lower().endswith("_proxy")}
    for_pip = {f"PIP_{name.upper().replace('-', '_')}": value for name, value in of_pip.items()}
    return proxies | for_pip | {name: value for name, value in for_uv.items() if value}


@pytest.fixture(scope="module")
def uv(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """uv from the package index. Where it can be had, the skill's packages can: a failure after this one is ours."""
    folder = tmp_path_factory.mktemp("uv")
    words = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(folder), "uv"]
    if subprocess.run(words, capture_output=True, check=False).returncode:
        cannot("reach a package index")
    yield folder / "bin" / "uv"
    shutil.rmtree(folder)


@pytest.fixture
def installed(shell: Shell, repository: Path) -> Path:
    """The skill's folder with nothing around it, in a shell that reaches the package index."""
    output(shell, "make", "install-skill", f"DEST={shell.home}", folder=repository)
    shell.env |= package_index()
    return shell.home / NAME


def test_uv_brings_the_packages_by_itself(shell: Shell, mock: MockServer, installed: Path, uv: Path) -> None:
    shell.env |= {"UV_PYTHON": sys.executable, "UV_PYTHON_DOWNLOADS": "never"}
    assert_draws(shell, mock, installed, str(uv), "run", "--quiet", "--script")


def test_uv_runs_the_one_file_as_its_error_says(shell: Shell, uv: Path) -> None:
    """In an archive uv finds no list of packages: they are named on the command line."""
    script = shell.home / "my tools" / "generate_image.pyz"
    build(SCRIPTS, script)
    shell.env |= package_index() | {"UV_PYTHON": sys.executable, "UV_PYTHON_DOWNLOADS": "never"}
    shell.env["PATH"] = f"{uv.parent}{os.pathsep}{os.environ['PATH']}"
    dry_run = ["--prompt", "x", "--dry-run"]
    bare = [sys.executable, "-I", "-S", str(script), *dry_run]
    done = subprocess.run(bare, cwd=shell.folder, env=shell.environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    advised = re.search("`(uv run .*) …`", done.stderr)
    assert advised is not None, done.stderr
    words = [*shlex.split(advised[1]), *dry_run]
    assert str(script) in words
    assert subprocess.run(words, cwd=shell.folder, env=shell.environment(), check=False).returncode == 0


def test_pip_installs_what_the_error_names(shell: Shell, mock: MockServer, installed: Path, uv: Path) -> None:
    bare = shell.home / "bare"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", bare], check=True)
    shell.env["PATH"] = f"{bare / 'bin'}{os.pathsep}{os.environ['PATH']}"
    refused = command(
        shell, "python3", str(installed / "scripts/generate_batch.py"), "--prompt", "a fox", "--output-dir", "x"
    )
    assert refused.code == 2
    advice = re.search(r"(?m)^next: .*(python3 -m venv .*) \(then call (.*)\)$", refused.stderr)
    assert advice, refused.stderr
    output(shell, "bash", "-euc", advice[1])
    assert_draws(shell, mock, installed, advice[2])
