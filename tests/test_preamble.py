"""The first milliseconds of the commands: before zimage can be used, errors are told in the same form already."""

from __future__ import annotations

import os
import re
import shutil
import signal
from pathlib import Path

import jsonschema
import pytest

from conftest import SCRIPTS, Result, Shell
from zimage.contract import ERROR_SCHEMA
from zimage.errors import KINDS

IMAGE, BATCH = "generate_image.py", "generate_batch.py"
ASKED = [  # script, arguments, whether JSON is asked for
    (IMAGE, ["--prompt", "x"], False),
    (IMAGE, ["--prompt", "x", "--print-response"], True),
    (IMAGE, ["--prompt", "x", "--dry-run"], True),
    (IMAGE, ["--check"], True),
    (BATCH, ["--prompt", "x", "--output-dir", "out"], True),
]
each_way = pytest.mark.parametrize(("script", "arguments", "as_json"), ASKED)


def assert_told(result: Result, code: str, exit_code: int, as_json: bool) -> None:
    result.assert_one_line_of_advice()
    assert result.code == exit_code
    if as_json:
        jsonschema.validate(result.error, ERROR_SCHEMA)
        assert (result.error["code"], result.error["billed"]) == (code, "no")
        assert result.error["retryable"] == KINDS[code].retryable
    else:
        assert result.stdout == ""


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@each_way
def test_a_signal_while_it_loads(
    shell: Shell, script: str, arguments: list[str], as_json: bool, number: signal.Signals
) -> None:
    shell.script = Path(shutil.copy(SCRIPTS / script, shell.home))
    for room in ("contract.py", "batch/commands.py", "check.py"):  # the first that is loaded sends it
        path = shell.home / "zimage" / room
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"import os, time\nos.kill(os.getpid(), {int(number)})\ntime.sleep(30)\n")
    assert_told(shell.run(*arguments), "interrupted", 128 + number, as_json)


@each_way
def test_the_rooms_are_missing(shell: Shell, script: str, arguments: list[str], as_json: bool) -> None:
    shell.script = Path(shutil.copy(SCRIPTS / script, shell.home))
    assert_told(shell.run(*arguments), "missing_package", 2, as_json)


@pytest.mark.smoke
def test_both_commands_begin_alike() -> None:
    texts = [(SCRIPTS / name).read_text(encoding="utf-8") for name in (IMAGE, BATCH)]
    one, other = (re.search(r'(?s)def _end_early.*?sys\.modules\["zimage"\] = _zimage\n', text) for text in texts)
    assert one and other and one[0] == other[0]
