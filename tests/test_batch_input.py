"""What generate_batch.py makes of its input and its command line: everything is checked before anything is paid."""

from __future__ import annotations

import json
import os
import subprocess
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from batch_helpers import PRICE, SMALL, SMALL_PNG, Batch, Gate, by_prompt, parameters_of, prompt_of
from conftest import Result, Shell
from fault_server import GENERATE, PICTURE, Answer, FaultServer, Received, error, file

MIB = 1024 * 1024
BOM = b"\xef\xbb\xbf"
GOOD = b'{"prompt": "good", "size": "512*512"}\n'


@pytest.fixture
def batch(shell: Shell, service: FaultServer) -> Batch:
    batch = Batch(shell, service)
    batch.is_in_tables = True  # no row of a table here runs twice on a folder
    return batch


def refused(batch: Batch, result: Result) -> dict[str, Any]:
    """The error of a run that was refused before anything happened: nothing is sent, nothing is written."""
    assert result.code == 2, (result.stdout, result.stderr)
    assert batch.service.connections == 0
    assert batch.files() == {}
    assert not batch.out.exists()
    assert result.error["billed"] == "no"
    return result.error


def run_file(batch: Batch, name: str, content: bytes, *options: str) -> Result:
    batch.input = batch.shell.folder / name
    batch.input.write_bytes(content)
    return batch.run(*options)


def problem_with(batch: Batch, result: Result, line: int, field: str = "") -> str:
    """The problem that is told of a line and a field, in the error object and on stderr."""
    problems = refused(batch, result)["problems"]
    assert isinstance(problems, list)
    texts = [text for text in map(str, problems) if f"line {line}:" in text and field in text]
    assert texts, problems
    assert f"line {line}:" in result.stderr
    return texts[0]


# ---------------------------------------------------------------------------------------------------------------------
# Formats: what a file means
# ---------------------------------------------------------------------------------------------------------------------

SIZED = '{{"prompt": "{}", "size": "512*512"}}'
A, B = SIZED.format("a").encode(), SIZED.format("b").encode()
FORMATS: dict[str, tuple[str, bytes, list[str]]] = {
    "an object a line": ("r.jsonl", A + b"\n" + B + b"\n", ["a", "b"]),
    "the last line without an end": ("r.jsonl", A + b"\n" + B, ["a", "b"]),
    "a byte order mark": ("r.jsonl", BOM + A + b"\n" + B, ["a", "b"]),
    "lines of Windows": ("r.jsonl", A + b"\r\n" + B + b"\r\n", ["a", "b"]),
    "blank lines": ("r.jsonl", b"\n  \n" + A + b"\n\t\n\r\n" + B + b"\n\n", ["a", "b"]),
    "a mark before a blank line": ("r.jsonl", BOM + b"\n" + A, ["a"]),
    "Unicode, written and escaped": ("r.jsonl", '{"prompt": "雪\\u96ea🦊"}'.encode(), ["雪雪🦊"]),
    "a newline in a prompt": ("r.jsonl", b'{"prompt": "a\\nb"}', ["a\nb"]),
    "a prompt a line": ("r.txt", b"a fox\nan owl\n", ["a fox", "an owl"]),
    "text with a mark and lines of Windows": ("r.txt", BOM + b"a fox\r\n\r\nan owl", ["a fox", "an owl"]),
    "text that looks like more": (
        "r.txt",
        b"# no\n{a fox}\na,b\n[owl: a]\n\\# 1\n\\a",
        ["{a fox}", "a,b", "[owl: a]", "# 1", "\\a"],
    ),
    "columns": ("r.csv", b"prompt,size\na,512*512\nb,512x512\n", ["a", "b"]),
    "columns in any order": ("r.csv", b"size,prompt\n512*512,a\n", ["a"]),
    "columns with a mark": ("r.csv", BOM + b"prompt,size\r\na,512*512\r\n\r\nb,\r\n", ["a", "b"]),
    "a mark before a quoted header": ("r.csv", BOM + b'"prompt","size"\na,512*512\n', ["a"]),
    "a quoted comma": ("r.csv", b'prompt\n"a, and b"\n', ["a, and b"]),
    "a quoted newline": ("r.csv", b'prompt,size\n"a\nb",512*512\nc,\n', ["a\nb", "c"]),
    "a quoted blank line": ("r.csv", b'prompt,size\n"a\n\nb",512*512\nc,\n', ["a\n\nb", "c"]),
    "quoted quotes": ("r.csv", b'prompt\n"say ""a"""\n', ['say "a"']),
    "semicolons": ("r.csv", b"prompt;size\na, b;512*512\n", ["a, b"]),
    "a prompt alone": ("r.csv", b"prompt\na\nb\n", ["a", "b"]),
}


@pytest.mark.smoke
@pytest.mark.parametrize("case", FORMATS)
def test_every_form_of_a_list_gives_its_prompts(batch: Batch, case: str) -> None:
    name, content, prompts = FORMATS[case]
    result = run_file(batch, name, content)
    assert result.code == 0, result.stdout
    assert sorted(batch.sent) == sorted(prompts)
    assert [entry["prompt"] for entry in batch.results()] == prompts


@pytest.mark.parametrize("mark", [b"", BOM], ids=["plain", "marked"])
def test_standard_input_is_json_lines(batch: Batch, mark: bytes) -> None:
    result = batch.call("--input", "-", "--output-dir", "out", "--rpm", "0", stdin=mark + A + b"\r\n\n" + B)
    assert result.code == 0, result.stdout
    assert sorted(batch.sent) == ["a", "b"]


ROW = {"prompt": "a", "size": "640*512", "seed": 7, "prompt_extend": True, "id": "one", "output": "o.png"}


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", json.dumps(ROW).encode()),
        ("r.csv", b"prompt,size,seed,prompt_extend,id,output\na,640*512,7,true,one,o.png\n"),
        ("r.csv", b"prompt,size,aspect_ratio,seed,prompt_extend,id,output\na,640*512,,7,true,one,o.png\n"),
        ("r.csv", b"output;id;prompt_extend;seed;size;prompt\no.png;one;true;7;640x512;a\n"),
    ],
    ids=["json", "csv", "csv with an empty cell", "csv with semicolons"],
)
def test_every_field_of_a_row_is_heeded(batch: Batch, name: str, content: bytes) -> None:
    assert run_file(batch, name, content).code == 0
    (request,) = batch.service.posts
    assert prompt_of(request) == "a"
    assert parameters_of(request) == {"size": "640*512", "seed": 7, "prompt_extend": True}
    (entry,) = batch.results()
    assert (entry["id"], entry["output"]) == ("one", "o.png")
    assert (batch.out / "o.png").is_file()


def test_an_empty_cell_is_a_field_not_given(batch: Batch) -> None:
    content = b"prompt,size,aspect_ratio,seed,prompt_extend,id,output\na,,,,,,\nb,,16:9,,,,\n"
    assert run_file(batch, "r.csv", content).code == 0
    sizes = {prompt_of(request): parameters_of(request)["size"] for request in batch.service.posts}
    assert sizes == {"a": "1024*1024", "b": "1280*720"}
    assert all("id" not in entry for entry in batch.results())


def test_a_pipe_with_a_name_is_read_like_a_file(batch: Batch) -> None:
    batch.input = batch.shell.folder / "r.jsonl"
    os.mkfifo(batch.input)

    def feed() -> None:
        with open(batch.input, "wb") as pipe:
            pipe.write(A + b"\n" + B + b"\n")

    threading.Thread(target=feed, daemon=True).start()
    result = batch.run()
    assert result.code == 0, result.stdout
    assert sorted(batch.sent) == ["a", "b"]


def test_a_prompt_on_the_command_line_is_one_row(batch: Batch) -> None:
    result = batch.call("--prompt", "a fox", "--output-dir", "out", "--rpm", "0", "--variants", "3")
    assert result.code == 0, result.stdout
    assert batch.sent == ["a fox"] * 3
    first, *others = [entry["seed"] for entry in batch.results()]
    assert others == [(first + 1) % 2**31, (first + 2) % 2**31]
    assert len({entry["output"] for entry in batch.results()}) == 3


def test_a_long_prompt_is_warned_about_and_made(batch: Batch) -> None:
    batch.rows("x" * 900)
    result = batch.run()
    assert result.code == 0
    assert "800" in result.stderr + json.dumps(batch.results())


# ---------------------------------------------------------------------------------------------------------------------
# Wrong rows
# ---------------------------------------------------------------------------------------------------------------------


def row(**fields: Any) -> bytes:
    return json.dumps({"prompt": "p"} | fields).encode()


WRONG_ROWS: dict[str, tuple[bytes, str]] = {
    "no prompt": (b'{"size": "512*512"}', "prompt"),
    "an empty prompt": (row(prompt=""), "prompt"),
    "a blank prompt": (row(prompt=" \u3000\t"), "prompt"),
    "a number as prompt": (row(prompt=7), "prompt"),
    "null as prompt": (row(prompt=None), "prompt"),
    "half a character in the prompt": (b'{"prompt": "a \\ud83e b"}', "prompt"),
    "an unknown field": (row(promt="x"), "promt"),
    "an empty unknown field": (b'{"prompt": "p", "": 1}', ""),
    "a base_url": (row(base_url="https://dashscope.aliyuncs.com/api/v1"), "base_url"),
    "a base_url of null": (row(base_url=None), "base_url"),
    "a size too small": (row(size="100*100"), "size"),
    "a size too large": (row(size="4096*4096"), "size"),
    "no size at all": (row(size="large"), "size"),
    "size and ratio": (row(size="1024*1024", aspect_ratio="1:1"), "aspect_ratio"),
    "an unknown ratio": (row(aspect_ratio="5:1"), "aspect_ratio"),
    "a seed below": (row(seed=-2), "seed"),
    "a seed above": (row(seed=2**31), "seed"),
    "a seed between": (row(seed=1.5), "seed"),
    "a seed of text": (row(seed="7"), "seed"),
    "a seed of true": (row(seed=True), "seed"),
    "a huge seed": (b'{"prompt": "p", "seed": 1' + b"0" * 400 + b"}", ""),
    "an endless seed": (b'{"prompt": "p", "seed": 1e999}', ""),
    "a boolean of text": (row(prompt_extend="yes"), "prompt_extend"),
    "an empty id": (row(id=""), "id"),
    "an id that is a list": (row(id=["a"]), "id"),
    "an id that is null": (row(id=None), "id"),
    "half a character in the id": (b'{"prompt": "p", "id": "\\ud83e"}', "id"),
    "an empty output": (row(output=""), "output"),
    "an output that is a number": (row(output=7), "output"),
    "not JSON": (b"{prompt: 1}", ""),
    "half an object": (b'{"prompt": "p"', ""),
    "two objects": (b'{"prompt": "p"} {"prompt": "q"}', ""),
    "a list": (b'["p"]', ""),
    "a text": (b'"p"', ""),
    "null": (b"null", ""),
    "not a number": (b'{"prompt": "p", "seed": NaN}', ""),
    "deep": (b"[" * 100_000, ""),
    "not UTF-8": (b'{"prompt": "caf\xe9"}', ""),
    "UTF-16": ('{"prompt": "p"}'.encode("utf-16-le"), ""),
}


@pytest.mark.smoke
@pytest.mark.parametrize("case", WRONG_ROWS)
def test_a_wrong_row_is_told_with_its_line_and_field(batch: Batch, case: str) -> None:
    content, field = WRONG_ROWS[case]
    result = run_file(batch, "r.jsonl", GOOD + b"\n" + content + b"\n" + GOOD)
    problem_with(batch, result, 3, field)
    assert "line 1:" not in result.stderr and "line 4:" not in result.stderr


WRONG_CSV: dict[str, tuple[bytes, int, str]] = {
    "no column of prompts": (b"text,size\na,512*512\n", 1, "prompt"),
    "an unknown column": (b"prompt,colour\na,red\n", 1, "colour"),
    "a column base_url": (b"prompt,base_url\na,\n", 1, "base_url"),
    "a column twice": (b"prompt,size,size\na,512*512,512*512\n", 1, "size"),
    "a cell too many": (b"prompt,size\na,512*512\na, b,512*512\n", 3, ""),
    "a row without prompt": (b"prompt,size\na,512*512\n,512*512\n", 3, "prompt"),
    "a seed that is none": (b"prompt,seed\na,7\nb,seven\n", 3, "seed"),
    "a seed out of range": (b"prompt,seed\na,7\nb,2147483648\n", 3, "seed"),
    "a boolean that is none": (b"prompt,prompt_extend\na,true\nb,maybe\n", 3, "prompt_extend"),
    "a size that is none, behind a quoted newline": (b'prompt,size\n"a\nb",512*512\nc,big\n', 4, "size"),
    "a quote that is not closed": (b'prompt,size\na,512*512\n"b,512*512\n', 3, ""),
    "text behind a quote": (b'prompt,size\na,512*512\n"b"c,512*512\n', 3, ""),
    "not UTF-8": (b"prompt,size\na,512*512\ncaf\xe9,512*512\n", 3, ""),
}


@pytest.mark.parametrize("case", WRONG_CSV)
def test_a_wrong_csv_is_told_with_its_line_and_field(batch: Batch, case: str) -> None:
    content, line, field = WRONG_CSV[case]
    problem_with(batch, run_file(batch, "r.csv", content), line, field)


def test_text_that_is_not_utf_8_is_told_with_its_line(batch: Batch) -> None:
    problem_with(batch, run_file(batch, "r.txt", b"a fox\ncaf\xe9\n"), 2)


def test_a_field_that_stands_twice_among_very_many_is_found_at_once(batch: Batch) -> None:
    fields = ["prompt", *(f"f{number}" for number in range(80_000)), "f79999", "prompt"]
    began = time.monotonic()
    result = run_file(batch, "r.jsonl", GOOD + "{{{}}}".format(",".join(f'"{name}":1' for name in fields)).encode())
    assert '"f79999" stands in it twice' in problem_with(batch, result, 2)
    assert time.monotonic() - began < 10  # comparing each with all before it takes half a minute


def test_all_that_is_wrong_with_a_row_is_told_at_once(batch: Batch) -> None:
    result = run_file(batch, "r.jsonl", row(seed=-5, size="tiny", prompt=""))
    for field in ("seed", "size", "prompt"):
        problem_with(batch, result, 1, field)


def test_the_first_fifty_are_told_and_all_are_counted(batch: Batch) -> None:
    lines = [row(seed=-5) if number % 2 else GOOD.strip() for number in range(140)]
    result = run_file(batch, "r.jsonl", b"\n".join(lines))
    problems = refused(batch, result)["problems"]
    assert len(problems) == 50
    assert [f"line {2 * number}:" in text for number, text in enumerate(problems, 1)] == [True] * 50
    assert "70" in result.error["message"] and "70" in result.stderr


def test_fifty_are_told_in_full(batch: Batch) -> None:
    result = run_file(batch, "r.jsonl", b"\n".join([row(seed=-5)] * 50))
    assert len(refused(batch, result)["problems"]) == 50
    assert "50" in result.error["message"]


def test_a_terrible_row_does_not_fill_the_screen(batch: Batch) -> None:
    result = run_file(batch, "r.jsonl", row(size="x" * 500_000, output="y" * 100_000))
    refused(batch, result)
    assert len(result.stdout) + len(result.stderr) < 10_000


def test_control_characters_of_a_row_do_not_reach_the_terminal(batch: Batch) -> None:
    result = run_file(batch, "r.jsonl", row(size="\x1b[31mred\x07", id="\x1b]0;title\x07"))
    refused(batch, result)
    assert "\x1b" not in result.stderr and "\x07" not in result.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", GOOD + b'{"prompt": "' + b"x" * MIB + b'"}\n'),
        ("r.jsonl", GOOD + b" " * (3 * MIB)),
        ("r.txt", b"a\n" + b"x" * (MIB + 1) + b"\n"),
        ("r.csv", b"prompt\n" + b"x" * (MIB + 1) + b"\n"),
        ("r.csv", b'prompt\n"' + b"xxx\n" * (MIB // 2) + b'"\n'),
    ],
    ids=["json", "blank", "text", "csv", "a quoted cell of many lines"],
)
def test_a_line_of_more_than_a_mebibyte_is_refused_with_its_number(batch: Batch, name: str, content: bytes) -> None:
    result = run_file(batch, name, content)
    refused(batch, result)
    assert "line 2" in result.error["message"]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("r.jsonl", b""),
        ("r.jsonl", b"\n \r\n"),
        ("r.jsonl", BOM),
        ("r.txt", b"\n"),
        ("r.txt", BOM),
        ("r.csv", b""),
        ("r.csv", b"prompt,size\n\n"),
    ],
)
def test_an_input_without_rows_is_refused(batch: Batch, name: str, content: bytes) -> None:
    message = refused(batch, run_file(batch, name, content))["message"]
    assert "has no rows" in message or (name == "r.csv" and not content)  # that one has not even a header


def test_standard_input_without_rows_is_refused(batch: Batch) -> None:
    refused(batch, batch.call("--input", "-", "--output-dir", "out", stdin=b""))


@pytest.mark.parametrize("name", ["missing.jsonl", "r.pdf", "rows", "folder.jsonl", "a\0b.jsonl", "loop.jsonl"])
def test_an_input_that_cannot_be_read_is_refused(batch: Batch, name: str) -> None:
    (batch.shell.folder / "folder.jsonl").mkdir()
    (batch.shell.folder / "loop.jsonl").symlink_to("loop.jsonl")
    if "\0" in name:
        name = "n" * 5000 + ".jsonl"  # no system passes a NUL; a name too long for it is the next worst
    result = batch.call("--input", name, "--output-dir", "out")
    assert result.code == 2, result.stdout
    assert "--input" in result.error["message"]
    assert not batch.out.exists() and not batch.service.connections


# ---------------------------------------------------------------------------------------------------------------------
# Input that does not come
# ---------------------------------------------------------------------------------------------------------------------


def test_a_terminal_is_not_waited_for(batch: Batch) -> None:
    leader, follower = os.openpty()
    try:
        process = subprocess.Popen(
            batch.shell.command("--input", "-", "--output-dir", "out"),
            cwd=batch.shell.folder,
            env=batch.shell.environment(),
            stdin=follower,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        batch.shell.keep(process)
        result = batch.finish(process, timeout=10)
    finally:
        os.close(leader)
        os.close(follower)
    refused(batch, result)


def piped(batch: Batch, *options: str) -> subprocess.Popen[bytes]:
    """A run whose standard input is a pipe."""
    process = subprocess.Popen(
        batch.shell.command("--input", "-", "--output-dir", "out", "--rpm", "0", *options),
        cwd=batch.shell.folder,
        env=batch.shell.environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    batch.shell.keep(process)
    return process


def ended(process: subprocess.Popen[bytes], timeout: float) -> Result:
    """Wait without closing its standard input before its end."""
    try:
        process.wait(timeout)
    finally:
        process.kill()
        stdout, stderr = process.communicate(timeout=5)
    return Result(process.returncode, stdout.decode(), stderr.decode())


@pytest.mark.parametrize("option", ["--timeout", "--time-limit"])
def test_a_pipe_that_is_never_fed_does_not_hang_the_command(batch: Batch, option: str) -> None:
    process = piped(batch, option, "1")
    result = batch.checked(ended(process, 4))
    assert result.code == (2 if option == "--timeout" else 11), result.stdout
    assert batch.sent == [] and not batch.out.exists()


def test_a_pipe_that_is_fed_too_slowly_does_not_outlast_the_time_limit(batch: Batch) -> None:
    process = piped(batch, "--time-limit", "1")
    stop = threading.Event()

    def feed() -> None:
        assert process.stdin
        try:
            while not stop.wait(0.2):
                process.stdin.write(GOOD)
        except (OSError, ValueError):  # the process, or its pipe, is gone
            pass

    feeder = threading.Thread(target=feed, daemon=True)
    feeder.start()
    try:
        result = batch.checked(ended(process, 3.5))
    finally:
        stop.set()
        feeder.join(5)
    assert result.code == 11, result.stdout
    assert batch.sent == []


def test_a_fifo_that_nobody_writes_to_does_not_hang_the_command(batch: Batch) -> None:
    batch.input = batch.shell.folder / "r.jsonl"
    os.mkfifo(batch.input)
    result = batch.run("--timeout", "1", timeout=5)
    assert result.code == 2, result.stdout
    assert batch.sent == [] and not batch.out.exists()


# ---------------------------------------------------------------------------------------------------------------------
# Names: ids and outputs
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ids", [("a", "a"), (1, "1"), ("é", "é")])
def test_an_id_given_twice_is_an_error(batch: Batch, ids: tuple[object, object]) -> None:
    result = run_file(batch, "r.jsonl", row(id=ids[0]) + b"\n" + GOOD + row(id=ids[1]))
    text = problem_with(batch, result, 3, "id")
    assert "1" in text


def test_a_row_that_is_given_twice_is_two_pictures(batch: Batch) -> None:
    batch.rows("same", "same")
    assert batch.run().code == 0
    assert batch.sent == ["same", "same"]
    assert len({entry["output"] for entry in batch.results()}) == 2


COLLISIONS: dict[str, tuple[str, str]] = {
    "the same name": ("a.png", "a.png"),
    "another case": ("a.png", "A.PNG"),
    "another case of a folder": ("Cats/a.png", "cats/a.png"),
    "another Unicode form": ("caf\u00e9.png", "cafe\u0301.png"),
    "both": ("CAF\u00c9.png", "cafe\u0301.png"),
    "a compatible letter": ("\u212b.png", "\u00e5.png"),  # the Ångström sign is canonically Å
    "a dot in the path": ("a.png", "./a.png"),
    "a slash too many": ("b/a.png", "b//a.png"),
    "a file that is a folder": ("a.png", "a.png/b.png"),
    "a folder that is a file": ("a.png/b.png", "a.png"),
    "a folder that is a file of another case": ("A.png/b/c.png", "a.PNG"),
}


@pytest.mark.parametrize("case", COLLISIONS)
def test_outputs_that_collide_are_an_error(batch: Batch, case: str) -> None:
    first, second = COLLISIONS[case]
    result = run_file(batch, "r.jsonl", row(output=first) + b"\n" + row(output=second))
    problems = refused(batch, result)["problems"]
    assert any("output" in text and ("line 1" in text or "line 2" in text) for text in problems)


def test_outputs_that_differ_do_not_collide(batch: Batch) -> None:
    batch.rows(*({"prompt": name, "output": name} for name in ("a.png", "a-.png", "b/a.png", "b.jpg", "b.webp")))
    assert batch.run().code == 0
    assert all((batch.out / name).is_file() for name in ("a.png", "a-.png", "b/a.png", "b.jpg", "b.webp"))


def test_outputs_collide_over_all_variants(batch: Batch, tmp_path: Path) -> None:
    """What the second variant of a row is called is learnt from a run."""
    batch.rows({"prompt": "a", "output": "a.png"})
    assert batch.run("--variants", "3").code == 0
    names = [entry["output"] for entry in batch.results()]
    assert names[0] == "a.png" and len(set(names)) == 3
    sent = len(batch.sent)
    for name in names[1:]:
        batch.rows({"prompt": "a", "output": "a.png"}, {"prompt": "b", "output": name.upper()})
        result = batch.run("--variants", "3", "--output-dir", str(tmp_path / "other"))
        assert result.code == 2, (name, result.stdout)
        assert len(batch.sent) == sent


@pytest.mark.parametrize("position", [0, 1])
def test_an_output_may_not_be_the_name_that_another_row_gets_by_itself(
    batch: Batch, tmp_path: Path, position: int
) -> None:
    """The name that a row without output gets is learnt from a run."""
    batch.rows(*["a fox"] * 2)
    assert batch.run().code == 0
    names = [entry["output"] for entry in batch.results()]
    for name in names:
        other = {"prompt": "b", "output": name}
        batch.rows("a fox", other) if position else batch.rows(other, "a fox")
        result = batch.run("--output-dir", str(tmp_path / "other"))
        assert result.code == 2, result.stdout


OUTSIDE = [
    "../a.png",
    "a/../../a.png",
    "..\\a.png",
    "/tmp/a.png",
    "//host/a.png",
    "C:\\a.png",
    "C:/a.png",
    "link/a.png",
    "link/b/a.png",
    "images/../link/a.png",
]


@pytest.mark.parametrize("output", OUTSIDE)
def test_an_output_may_not_leave_the_folder(batch: Batch, tmp_path: Path, output: str) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    batch.out.mkdir()
    (batch.out / "link").symlink_to(elsewhere)
    result = run_file(batch, "r.jsonl", GOOD + row(output=output))
    assert result.code == 2, result.stdout
    assert any("line 2:" in text and "output" in text for text in result.error["problems"])
    assert not batch.service.connections
    assert list(elsewhere.iterdir()) == [] and [path.name for path in batch.out.iterdir()] == ["link"]


def test_the_folders_own_links_may_not_leave_it(batch: Batch, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    for name in ("images", "evidence"):
        (elsewhere / name).mkdir(parents=True)
        batch.out.mkdir(exist_ok=True)
        (batch.out / name).symlink_to(elsewhere / name)
        batch.rows("a")
        result = batch.run()
        assert result.code == 2, (name, result.stdout)
        assert not batch.service.connections
        assert not any(path.is_file() for path in elsewhere.rglob("*"))
        (batch.out / name).unlink()


USELESS = [
    "a.gif",
    "..png",
    "a/...webp",
    "a",
    ".",
    "a/",
    "a.png/",
    ".png",
    " a.png",
    "a.png ",
    "a\0.png",
    "a\n.png",
    "\ud83e.png",
    "thumbs/0000/000000.jpg",
    "THUMBS/a.png",
    "thumbs/../thumbs/a.png",
    "evidence/a.png",
    "results.jsonl/a.png",
    "index.html/a.png",
    "Index.HTML/a.png",
    "batch.sqlite3/a.png",
    "batch.sqlite3-wal/a.png",
]


@pytest.mark.parametrize("output", USELESS, ids=ascii)
def test_an_output_that_is_no_name_for_a_picture_is_refused(batch: Batch, output: str) -> None:
    result = run_file(batch, "r.jsonl", GOOD + row(output=output))
    problem_with(batch, result, 2, "output")


TOO_LONG = {
    "a name": "x" * 300 + ".png",
    "a folder": "x" * 300 + "/a.png",
    "a folder in the middle": "a/" + "é" * 130 + "/b/a.png",
    "a path of long folders": ("x" * 240 + "/") * 17 + "a.png",
    "a path of short folders": "a/" * 2100 + "a.png",
}


@pytest.mark.parametrize("case", TOO_LONG)
@pytest.mark.parametrize("mode", [(), ("--dry-run",)], ids=["run", "dry run"])
def test_an_output_too_long_for_the_disk_is_refused_before_paying(
    batch: Batch, case: str, mode: tuple[str, ...]
) -> None:
    result = run_file(batch, "r.jsonl", GOOD + row(output=TOO_LONG[case]), *mode)
    problem_with(batch, result, 2, "output")


def test_a_folder_too_deep_for_the_names_that_the_batch_gives_is_refused_before_paying(batch: Batch) -> None:
    batch.out = batch.out.joinpath("x/" * ((4000 - len(str(batch.out))) // 2))
    error = refused(batch, run_file(batch, "r.jsonl", GOOD))
    assert (error["code"], error["message"].partition(":")[0]) == ("invalid_output", "--output-dir")


@pytest.mark.parametrize("mode", ["--status", "--gallery-only"])
@pytest.mark.parametrize("spare", [13, 25, 1, 0, -5])
def test_a_folder_too_deep_for_a_database_holds_none(batch: Batch, mode: str, spare: int) -> None:
    room = 4096 - 1 - spare - len(str(batch.out))
    folder = f"{batch.out}/" + "x/" * (room // 2 - 1) + "x" * (1 + room % 2)
    error = batch.call(mode, folder).error
    assert (error["exit_code"], error["code"]) in {(2, "no_batch"), (2, "usage")}


def test_the_longest_path_that_is_taken_can_be_saved(batch: Batch) -> None:
    """With a foreign file under its name meanwhile: then it needs the longer one."""
    name = "y" * 200 + ".png"
    room = 4096 - 2 - 230 - len(str(batch.out)) - 1
    folder = ("x" * 99 + "/") * (room // 100 - 1) + "x" * (room % 100 + 100)  # 100 to a level, the rest in the last
    longest = f"{folder}/{name}"

    def take_the_name(request: Received) -> Answer:
        os.makedirs(batch.out / folder, exist_ok=True)
        (batch.out / longest).write_bytes(b"foreign")
        return file(SMALL_PNG)

    problem_with(batch, run_file(batch, "r.jsonl", row(output=f"x{longest}")), 1, "output")
    batch.service.play(PICTURE, take_the_name)
    batch.rows({"prompt": "a", "output": longest})
    assert batch.run().code == 0
    assert batch.results()[0]["output"] == f"{folder}/{'y' * 200}-000000.png"


def test_the_longest_name_of_a_row_still_leaves_room(batch: Batch) -> None:
    """A prompt or id of any length and kind gives a name that the disk takes."""
    batch.rows(
        "雪" * 700, {"prompt": "b", "id": "é/../" * 20}, {"prompt": "c", "id": "CON"}, {"prompt": "..", "id": ".."}
    )
    result = batch.run()
    assert result.code == 0, result.stdout
    assert all((batch.out / entry["output"]).resolve().is_relative_to(batch.out.resolve()) for entry in batch.results())


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------

RUN = ["--prompt", "p", "--output-dir", "out"]
USAGE: dict[str, tuple[list[str], str]] = {
    "nothing": ([], "--input"),
    "nothing to do": (["--output-dir", "out"], "--input"),
    "no folder": (["--prompt", "p"], "--output-dir"),
    "an empty folder name": (["--prompt", "p", "--output-dir", ""], "--output-dir"),
    "two inputs": ([*RUN, "--input", "rows.jsonl"], "--input"),
    "a look and a run": ([*RUN, "--status", "out"], "--status"),
    "two looks": (["--status", "out", "--gallery-only", "out"], "--status"),
    "a look that is to be rehearsed": (["--status", "out", "--dry-run"], "--dry-run"),
    "a look with a price": (["--gallery-only", "out", "--max-cost", "1"], "--max-cost"),
    "a look at nothing": (["--status"], "--status"),
    "a look at an empty name": (["--status", ""], ""),
    "an empty prompt": (["--prompt", "", "--output-dir", "out"], "prompt"),
    "a blank prompt": (["--prompt", " ", "--output-dir", "out"], "prompt"),
    "an abbreviated option": ([*RUN, "--var", "2"], "--var"),
    "an unknown option": ([*RUN, "--seed", "2"], "--seed"),
    "a stray word": ([*RUN, "more"], "more"),
    "a region that is none": ([*RUN, "--region", "mars"], "--region"),
    "a provider that is none": ([*RUN, "--provider", "nosuch"], "--provider"),
    "a provider with a path": ([*RUN, "--provider", "../x"], "--provider"),
    "a URL that is none": ([*RUN, "--base-url", "nonsense:"], "--base-url"),
    "a URL with a password": ([*RUN, "--base-url", "https://u:p@dashscope.aliyuncs.com/api/v1"], "--base-url"),
    "a URL of somebody": ([*RUN, "--base-url", "https://example.com/api/v1"], "example.com"),
    "a URL without a lock": ([*RUN, "--base-url", "http://dashscope.aliyuncs.com/api/v1"], ""),
    "a URL against the region": (
        [*RUN, "--base-url", "https://dashscope.aliyuncs.com/api/v1", "--region", "singapore"],
        "region",
    ),
    "a host that is none": ([*RUN, "--trust-host", "a b"], "--trust-host"),
    **{f"--{option} without a value": ([*RUN, f"--{option}"], f"--{option}") for option in ("variants", "base-url")},
}


@pytest.mark.parametrize("case", USAGE)
def test_a_wrong_command_line_is_refused_by_name(batch: Batch, case: str) -> None:
    arguments, named = USAGE[case]
    result = batch.call(*arguments)
    assert named in refused(batch, result)["message"]


WRONG_NUMBERS = {
    "variants": ("0", "-1", "1.5", "x", "", "nan", "99999999999"),
    "concurrency": ("0", "-1", "1.5", "x", "", "nan", "1000000"),
    "rpm": ("-1", "x", "nan", "inf", "", "1e999", "0x10"),
    "max-cost": ("-0.01", "x", "nan", "inf", "", "1,5", "$1"),
    "time-limit": ("0", "-1", "x", "nan", "", "inf", "1s"),
    "limit": ("-1", "1.5", "x", "nan", "", "inf", "1e3"),
    "timeout": ("0", "-1", "x", "nan", "", "inf", "1m"),
    "max-retries": ("-1", "1.5", "x", "nan", "", "inf", "1_0x"),
}


@pytest.mark.parametrize("place", range(7))
def test_a_number_that_is_none_is_refused_by_its_option(batch: Batch, place: int) -> None:
    """One wrong number of each option at a time: all of them are told."""
    given = [f"--{option}={values[place]}" for option, values in WRONG_NUMBERS.items()]
    message = refused(batch, batch.call(*RUN, *given))["message"]
    assert [option for option in WRONG_NUMBERS if f"--{option}:" not in message] == []


def test_all_that_is_wrong_with_a_command_line_is_told_at_once(batch: Batch) -> None:
    result = batch.call(*RUN, "--variants", "0", "--rpm", "x", "--region", "mars", "--bogus")
    for named in ("--variants", "--rpm", "--region", "--bogus"):
        assert named in refused(batch, result)["message"]


def test_an_output_folder_that_is_a_file_is_refused(batch: Batch) -> None:
    batch.rows("a")
    batch.out.write_bytes(b"a file")
    result = batch.run()
    assert result.code == 2, result.stdout
    assert batch.out.read_bytes() == b"a file" and not batch.service.connections


def test_the_options_of_the_contract_are_all_there(batch: Batch) -> None:
    options = (
        "input prompt output-dir variants concurrency rpm max-cost time-limit limit region provider base-url "
        "trust-host timeout max-retries retry-failed retry-unknown accept-changes dry-run no-gallery quiet status "
        "gallery-only"
    )
    help = batch.shell.run("--help")
    assert help.code == 0
    assert [name for name in options.split() if f"--{name} " not in help.stdout.replace("\n", " ") + " "] == []


def test_without_a_key_nothing_happens(batch: Batch) -> None:
    del batch.shell.env["DASHSCOPE_API_KEY"]
    batch.rows("a")
    result = batch.run()
    assert result.code == 3, result.stdout
    assert not batch.service.connections and batch.files() == {}


def test_wrong_rows_are_told_before_a_missing_key(batch: Batch) -> None:
    """What costs nothing to mend comes first."""
    del batch.shell.env["DASHSCOPE_API_KEY"]
    problem_with(batch, run_file(batch, "r.jsonl", row(seed=-5)), 1, "seed")


def test_wrong_rows_leave_an_existing_batch_as_it_is(batch: Batch) -> None:
    batch.rows("a")
    assert batch.run().code == 0
    before = batch.files()
    batch.rows("a", {"prompt": "b", "seed": -5})
    assert batch.run().code == 2
    assert batch.files() == before
    assert batch.sent == ["a"]


# ---------------------------------------------------------------------------------------------------------------------
# Dry run
# ---------------------------------------------------------------------------------------------------------------------

DRY: dict[str, tuple[list[dict[str, Any]], tuple[str, ...], int, float]] = {
    "one": ([{}], (), 1, PRICE),
    "three": ([{}, {}, {}], (), 3, 3 * PRICE),
    "variants": ([{}, {}], ("--variants", "5"), 10, 10 * PRICE),
    "rewritten": ([{}, {"prompt_extend": True}], (), 2, 3 * PRICE),
    "another region": ([{}, {"prompt_extend": True}], ("--region", "singapore"), 2, 0.015 + 0.03),
    "a limit": ([{}, {}, {}], ("--limit", "2"), 2, 2 * PRICE),
    "a limit above": ([{}, {}, {}], ("--limit", "20"), 3, 3 * PRICE),
}


@pytest.mark.smoke
@pytest.mark.parametrize("case", DRY)
def test_a_dry_run_counts_and_prices_what_would_be_made(batch: Batch, case: str) -> None:
    rows, options, pictures, cost = DRY[case]
    batch.rows(*({"prompt": f"p{number}"} | fields for number, fields in enumerate(rows)))
    result = batch.run("--dry-run", *options)
    assert result.code == 0, result.stdout
    assert result.json["to_make"] == pictures
    assert result.json["estimated_cost"] == pytest.approx(cost)
    assert batch.service.connections == 0
    assert batch.files() == {} and not batch.out.exists()


def test_a_dry_run_tells_how_long_it_will_take(batch: Batch) -> None:
    """At the account's published limit, and a few per cent wider: 2 a second."""
    batch.prompts(300)
    arguments = ("--input", str(batch.input), "--output-dir", str(batch.out), "--dry-run")
    result = batch.call(*arguments)
    assert 150 <= result.json["estimated_duration_s"] <= 200
    assert batch.call(*arguments, "--rpm", "1200").json["estimated_duration_s"] < 100


@pytest.mark.parametrize("kind", ["stdin", "prompt", "csv"])
def test_a_dry_run_takes_every_input(batch: Batch, kind: str) -> None:
    batch.input = batch.shell.folder / "r.csv"
    batch.input.write_bytes(b"prompt,seed\na,1\nb,2\n")
    source = {"stdin": ["--input", "-"], "prompt": ["--prompt", "p"], "csv": ["--input", "r.csv"]}[kind]
    result = batch.call(*source, "--output-dir", "out", "--dry-run", stdin=GOOD + GOOD)
    assert result.code == 0, result.stdout
    assert result.json["to_make"] == (1 if kind == "prompt" else 2)
    assert batch.files() == {}


def test_a_dry_run_needs_no_key(batch: Batch) -> None:
    del batch.shell.env["DASHSCOPE_API_KEY"]
    batch.rows("a", "b")
    result = batch.run("--dry-run")
    assert result.code == 0, result.stdout
    assert result.json["to_make"] == 2
    assert "DASHSCOPE_API_KEY" in result.stdout  # what would stop the run is told


def test_a_dry_run_finds_wrong_rows(batch: Batch) -> None:
    problem_with(batch, run_file(batch, "r.jsonl", GOOD + row(seed=-5), "--dry-run"), 2, "seed")


def test_a_dry_run_on_a_folder_counts_what_is_missing_and_changes_nothing(batch: Batch) -> None:
    batch.service.play(GENERATE, by_prompt({"bad": error(400, "DataInspectionFailed")}))
    batch.rows("a", "bad", "c")
    assert batch.run().code == 1
    requests = len(batch.service.requests)
    before = batch.files()
    times = {path: path.stat().st_mtime_ns for path in [batch.out, *batch.out.rglob("*")]}
    batch.rows("new", "a", "bad", "c", "newer")
    assert batch.run("--dry-run").json["to_make"] == 2
    assert batch.run("--dry-run", "--retry-failed").json["to_make"] == 3
    assert batch.run("--dry-run", "--variants", "2").json["to_make"] == 2 + 5
    assert batch.files() == before
    assert {path: path.stat().st_mtime_ns for path in [batch.out, *batch.out.rglob("*")]} == times
    assert len(batch.service.requests) == requests


def test_a_dry_run_on_a_finished_folder_costs_nothing(batch: Batch) -> None:
    batch.rows("a")
    assert batch.run().code == 0
    result = batch.run("--dry-run")
    assert (result.code, result.json["to_make"], result.json["estimated_cost"]) == (0, 0, 0)


def test_a_dry_run_heeds_what_is_left_of_the_ceiling(batch: Batch) -> None:
    """The ceiling is for the folder's life: what was spent counts."""
    batch.rows("a", "b")
    assert batch.run().code == 0
    batch.rows("a", "b", "c", "d", "e")
    plan = batch.run("--dry-run", "--max-cost", f"{3.5 * PRICE:.5f}").json
    assert (plan["to_make"], plan["estimated_cost"]) == (1, pytest.approx(PRICE))


def test_a_dry_run_beside_a_running_batch_disturbs_nothing(batch: Batch) -> None:
    gate = Gate()
    batch.service.play(GENERATE, gate)
    batch.rows("a", "b")
    process = batch.start()
    batch.service.wait_until(lambda: len(gate.arrived) == 2)
    result = batch.run("--dry-run")
    assert result.code == 0, result.stdout
    gate.open()
    assert batch.finish(process).code == 0
    assert sorted(batch.sent) == ["a", "b"]


def test_many_rows_are_read_quickly(batch: Batch) -> None:
    """The figure of the contract is 200,000 in 20 s; a tenth of it here, with much room for a slow machine."""
    lines = (
        json.dumps({"prompt": f"picture {number}", "size": SMALL, "id": f"id-{number}"}) for number in range(20_000)
    )
    batch.input.write_text("\n".join(lines), encoding="utf-8")
    began = time.monotonic()
    result = batch.run("--dry-run", "--variants", "2")
    assert result.json["to_make"] == 40_000
    assert time.monotonic() - began < 4
