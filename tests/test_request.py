"""The normalized interface: what a request may be, what every wrong one is told, and what comes back.

Nothing wrong ever reaches the service: each refusal is exit 2, one clear error, no file and no request.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import unicodedata
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from conftest import Result, Shell
from mock_server import MockServer
from zimage.contract import MAX_PIXELS, MIN_PIXELS, REQUEST_SCHEMA
from zimage.request import normalize, request_problems

MAX_SEED = 2147483647
MIB = 1024 * 1024
LONE = "\ud800"  # half of a surrogate pair: no text
REQUEST_FIELDS = {"prompt", "size", "aspect_ratio", "seed", "prompt_extend", "base_url"}
RATIO_SIZES = {  # facts.md, the column of about 1024*1024 pixels
    "1:1": "1024*1024",
    "2:3": "832*1248",
    "3:2": "1248*832",
    "3:4": "864*1152",
    "4:3": "1152*864",
    "7:9": "896*1152",
    "9:7": "1152*896",
    "9:16": "720*1280",
    "16:9": "1280*720",
    "9:21": "576*1344",
    "21:9": "1344*576",
}


def problems(raw: Any) -> list[str]:
    return [problem.text for problem in request_problems(raw)]


def normalized(raw: dict[str, Any]) -> dict[str, Any]:
    assert problems(raw) == []
    return dict(normalize(raw).as_dict())


def refusal(result: Result) -> dict[str, Any]:
    """The error of a run that was refused before anything was sent, for what holds for all of them."""
    assert result.code == 2, (result.stdout, result.stderr)
    error = result.error
    assert error["billed"] == "no"
    assert not error["retryable"]
    assert "evidence_path" not in error
    assert error["hint"]
    return error


def said(error: dict[str, Any]) -> str:
    return "\n".join([error["message"], *error.get("problems", [])])


def short(value: Any) -> str:
    """A test's name from one of its values."""
    return ascii(" ".join(map(str, value)) if isinstance(value, list) else value)[:60]


# -- What is accepted, and what it becomes -----------------------------------------------------------------------------


def test_only_a_prompt_is_required_and_the_rest_is_filled_in() -> None:
    request = normalized({"prompt": "a cat"})
    assert 0 <= request.pop("seed") <= MAX_SEED
    assert request == {"prompt": "a cat", "size": "1024*1024", "prompt_extend": False}


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1024*1024", "1024*1024"),
        ("1280x720", "1280*720"),
        ("1280X720", "1280*720"),
        ("1280×720", "1280*720"),
        ("512*512", "512*512"),
        ("2048*2048", "2048*2048"),
        ("256*1024", "256*1024"),
        ("4096*1024", "4096*1024"),
        ("1024 * 1024", "1024*1024"),
        (" 1280x720\u3000", "1280*720"),
        ("1280, 720", "1280*720"),
        ("1280 720", "1280*720"),
        ("１０２４＊７６８", "1024*768"),
        ("16:9", "1280*720"),
        ("9 ： 21", "576*1344"),
        ("02:03", "832*1248"),
    ],
)
def test_sizes_within_the_bounds_are_accepted_in_every_spelling(size: str, expected: str) -> None:
    assert normalized({"prompt": "a cat", "size": size})["size"] == expected


@pytest.mark.parametrize(
    "size",
    [
        *("", " ", "1024", "1024*", "*1024", "x", "1024*1024*1024", "1024**1024", "1024,,1024", "1024:1024"),
        *("1024 x x 1024", "1024\n1024", "10 24*1024", "1024*1024\n", "1024*1024\r\n", "\n1024*1024", "1024*1024\x00"),
        *("-1024*-1024", "+1024*1024", "1024.0*1024", "1e3*1024", "0x400*1024", "1_024*1024", "1024⨯1024"),
        *("5:4", "16:9:1", "161:9", "１６：８", ":9", "16:9\n", "١٠٢٤*١٠٢٤", "0*1024", "1024*0", "0*0", "00*00"),
        *("512*511", "511*512", "2048*2049", "2049*2048", "1*262143", "4194305*1", "1*1"),
        *("99999999999999999999*1", "9" * 5000 + "*1", "1024*" + "1" * 5000, LONE, f"1024*1024{LONE}"),
    ],
    ids=short,
)
def test_every_other_size_is_refused_by_name(size: str) -> None:
    found = problems({"prompt": "a cat", "size": size})
    assert found
    assert all(text.startswith("size:") for text in found)
    assert all(len(text) < 400 for text in found)


@pytest.mark.parametrize("size", ["512*511", "2048*2049"])
def test_a_size_out_of_bounds_is_told_the_bounds_and_its_own_pixels(size: str) -> None:
    (text,) = problems({"prompt": "a cat", "size": size})
    width, height = size.split("*")
    assert str(int(width) * int(height)) in text
    assert "512*512" in text
    assert "2048*2048" in text


@pytest.mark.parametrize(("ratio", "size"), RATIO_SIZES.items())
def test_every_ratio_of_the_vendor_picks_its_recommended_size(ratio: str, size: str) -> None:
    request = normalized({"prompt": "a cat", "aspect_ratio": ratio})
    assert request["size"] == size
    assert "aspect_ratio" not in request


def test_no_other_ratios_exist() -> None:
    schema = REQUEST_SCHEMA["properties"]["aspect_ratio"]
    assert sorted(schema["enum"]) == sorted(RATIO_SIZES)


@pytest.mark.parametrize(
    "ratio", ["5:4", "1:1 ", "1:1\n", "16/9", "16x9", "1.5", "", "１:１", "01:01", 1, True, None, []]
)
def test_every_other_ratio_is_refused_by_name(ratio: Any) -> None:
    (text,) = problems({"prompt": "a cat", "aspect_ratio": ratio})
    assert text.startswith("aspect_ratio:")
    assert "16:9" in text, "the choices are named"


def test_size_and_ratio_do_not_go_together() -> None:
    (text,) = problems({"prompt": "a cat", "size": "1024*1024", "aspect_ratio": "1:1"})
    assert "size" in text
    assert "aspect_ratio" in text


@pytest.mark.parametrize("seed", [0, 1, MAX_SEED - 1, MAX_SEED])
def test_a_seed_is_kept(seed: int) -> None:
    assert normalized({"prompt": "a cat", "seed": seed})["seed"] == seed


@pytest.mark.parametrize("request_", [{}, {"seed": -1}, {"seed": -1.0}])
def test_without_a_seed_one_is_picked_at_random(request_: dict[str, Any]) -> None:
    picked = [normalized({"prompt": "a cat"} | request_)["seed"] for _ in range(20)]
    assert all(type(seed) is int and 0 <= seed <= MAX_SEED for seed in picked)
    assert len(set(picked)) > 10


@pytest.mark.parametrize(
    "seed",
    [-2, MAX_SEED + 1, 2**63, -(2**63), 10**400, 1.5, 1e300, float("inf"), True, False, "5", "", None, [5], {}],
    ids=short,
)
def test_every_other_seed_is_refused_by_name(seed: Any) -> None:
    found = problems({"prompt": "a cat", "seed": seed})
    assert found
    assert all(text.startswith("seed:") for text in found)
    assert all(len(text) < 400 for text in found)


@pytest.mark.parametrize(
    "prompt", ["", " ", "\n", "\t \r\n", "\u3000", "\u3000\u3000 \u00a0", "\u2028", 5, 1.5, True, None, [], ["x"], {}]
)
def test_a_prompt_must_be_a_text_that_is_not_blank(prompt: Any) -> None:
    (text,) = problems({"prompt": prompt})
    assert text.startswith("prompt:")


@pytest.mark.parametrize("prompt", [LONE, f"a{LONE}cat", "\udfff", "\udc80\udcff", "\udc00\ud800"])
def test_a_lone_surrogate_is_no_text(prompt: str) -> None:
    (text,) = problems({"prompt": prompt})
    assert text.startswith("prompt:")
    assert "surrogate" in text
    text.encode()


@pytest.mark.parametrize("prompt", ["猫", "a \"quoted\" 'cat'\n$HOME `id`", "🐈", "\U0010ffff", "e\u0301", " a cat "])
def test_a_prompt_is_never_changed(prompt: str) -> None:
    assert normalized({"prompt": prompt})["prompt"] == prompt


@pytest.mark.parametrize("value", ["yes", "true", 0, 1, None, [], "false"])
def test_prompt_extend_is_true_or_false(value: Any) -> None:
    (text,) = problems({"prompt": "a cat", "prompt_extend": value})
    assert text.startswith("prompt_extend:")


@pytest.mark.parametrize("value", [5, None, True, [], {}, "", LONE])
def test_a_base_url_is_a_text(value: Any) -> None:
    (text,) = problems({"prompt": "a cat", "base_url": value})
    assert text.startswith("base_url:")


@pytest.mark.parametrize(
    "name", ["n", "negative_prompt", "Prompt", "size ", "", "imageSize", "watermark", "𝓈ize", LONE]
)
def test_an_unknown_field_is_refused_by_name_and_told_the_known_ones(name: str) -> None:
    (text,) = problems({"prompt": "a cat", name: 1})
    assert "unknown field" in text
    assert name.encode("utf-8", "replace").decode() in text
    assert all(known in text for known in REQUEST_FIELDS)


@pytest.mark.parametrize("raw", [[], ["prompt"], "a cat", "", 5, 1.5, True, False, None])
def test_a_request_is_an_object(raw: Any) -> None:
    (text,) = problems(raw)
    assert "object" in text


def test_all_faults_of_a_request_are_named_at_once() -> None:
    raw = {
        "prompt": " ",
        "size": "10*10",
        "aspect_ratio": "5:4",
        "seed": True,
        "prompt_extend": "yes",
        "base_url": 7,
        "steps": 8,
        "n": 2,
    }
    text = "\n".join(problems(raw))
    for name in raw:
        assert name in text, name
    assert len(problems(raw)) == len(raw) + 1, "each of its own, and that size and aspect_ratio exclude each other"


def valid_requests(count: int) -> list[dict[str, Any]]:
    """Valid requests of every shape, the same in every run."""
    rng = random.Random(20260101)
    prompts = ["a cat", "猫" * 801, "🐈 \n\t", "\x00", "e\u0301", "sk-like but a prompt", "x" * 5000]
    found = []
    for _ in range(count):
        raw: dict[str, Any] = {"prompt": rng.choice(prompts)}
        shape = rng.choice(["size", "ratio", "neither"])
        if shape == "size":
            width = rng.randint(256, 4096)
            heights = -(-MIN_PIXELS // width), MAX_PIXELS // width
            raw["size"] = f"{width}{rng.choice('*xX×')}{rng.choice([*heights, rng.randint(*heights)])}"
        if shape == "ratio":
            raw["aspect_ratio"] = rng.choice(list(RATIO_SIZES))
        if rng.random() < 0.7:
            raw["seed"] = rng.choice([-1, 0, MAX_SEED, 7.0, rng.randint(0, MAX_SEED)])
        if rng.random() < 0.5:
            raw["prompt_extend"] = rng.random() < 0.5
        if rng.random() < 0.3:
            raw["base_url"] = "https://dashscope.aliyuncs.com"
        found.append(raw)
    return found


def test_the_normalized_form_is_valid_and_normalizing_it_changes_nothing() -> None:
    schema = jsonschema.Draft202012Validator(REQUEST_SCHEMA)
    for raw in valid_requests(300):
        once = normalized(raw)
        schema.validate(once)
        assert normalized(once) == once
        assert json.dumps(normalized(json.loads(json.dumps(once)))) == json.dumps(once), "types hold, too: 7, not 7.0"
        assert {"prompt", "size", "seed", "prompt_extend"} <= set(once) <= REQUEST_FIELDS - {"aspect_ratio"}


def hostile_requests(count: int) -> list[dict[str, Any]]:
    """Requests of which most are wrong somewhere, the same in every run."""
    rng = random.Random(20260102)
    values: dict[str, list[Any]] = {
        "prompt": ["a cat", "", " \u3000", LONE, "\x1f\x1c", "\u200b", None, 5, True, ["x"]],
        "size": ["1024*1024", "1*1", "1024*1024\n", "", None, 1024, "９*9", LONE, ["1024*1024"]],
        "aspect_ratio": ["1:1", "5:4", "1:1\n", "", None, 1, ["1:1"], {}],
        "seed": [-2, -1, 0, MAX_SEED, MAX_SEED + 1, True, False, 1.0, -1.0, 1.5, float("inf"), "5", None, 10**30],
        "prompt_extend": [True, False, 0, 1, 1.0, "true", None],
        "base_url": ["https://dashscope.aliyuncs.com", "", None, 5, LONE],
        "n": [1, None],
        "Prompt": ["a cat"],
    }
    return [
        {
            name: rng.choice(values[name])
            for name in rng.sample(list(values), rng.randint(0, 4)) + ["prompt"] * (i % 9 > 0)
        }
        for i in range(count)
    ]


def test_nothing_passes_that_the_schema_refuses() -> None:
    schema = jsonschema.Draft202012Validator(REQUEST_SCHEMA)
    blanks = [
        chr(code) for code in range(0x110000) if not chr(code).strip() or unicodedata.category(chr(code))[0] == "Z"
    ]
    requests = hostile_requests(2000) + [{"prompt": blank * 2} for blank in blanks]
    passed = [raw for raw in requests if not problems(raw)]
    assert 50 < len(passed) < len(requests) // 2
    for raw in passed:
        schema.validate(raw)
        once = normalized(raw)
        schema.validate(once)
        assert type(once["seed"]) is int
        json.dumps(once, ensure_ascii=False).encode()


# -- Malformed requests and arguments, as users give them --------------------------------------------------------------

MALFORMED_REQUESTS: list[tuple[str, str]] = [  # the text behind --request, and a word that the error must hold
    ("", "JSON"),
    (" ", "JSON"),
    ("{", "JSON"),
    ("{'prompt': 'a cat'}", "JSON"),
    ('{"prompt": "a cat",}', "JSON"),
    ('{"prompt": "a cat"} x', "JSON"),
    ('{"prompt": "a\ncat"}', "JSON"),
    ("a cat", "JSON"),
    ("@request.json", "JSON"),
    ("[]", "object"),
    ('["prompt"]', "object"),
    ('"a cat"', "object"),
    ("null", "object"),
    ("5", "object"),
    ("{}", "prompt"),
    ('{"prompt": null}', "prompt"),
    ('{"prompt": "\u3000"}', "prompt"),
    ('{"prompt": "\\ud800"}', "prompt"),
    ('{"prompt": ["a cat"]}', "prompt"),
    ('{"prompt": "a cat", "prompt": "a dog"}', "prompt"),
    ('{"prompt": "a cat", "seed": 1, "seed": 1}', "seed"),
    ('{"prompt": "a cat", "seed": NaN}', "NaN"),
    ('{"prompt": "a cat", "seed": Infinity}', "Infinity"),
    ('{"prompt": "a cat", "seed": -Infinity}', "Infinity"),
    ('{"prompt": "a cat", "seed": 1e999}', "seed"),
    ('{"prompt": "a cat", "seed": -2}', "seed"),
    ('{"prompt": "a cat", "seed": 2147483648}', "seed"),
    ('{"prompt": "a cat", "seed": 1.5}', "seed"),
    ('{"prompt": "a cat", "seed": true}', "seed"),
    ('{"prompt": "a cat", "seed": "5"}', "seed"),
    ('{"prompt": "a cat", "seed": ' + "9" * 4000 + "}", "seed"),
    ('{"prompt": "a cat", "size": "512*511"}', "size"),
    ('{"prompt": "a cat", "size": "2048*2049"}', "size"),
    ('{"prompt": "a cat", "size": "1024*1024\\n"}', "size"),
    ('{"prompt": "a cat", "size": "٥١٢*٥١٢"}', "size"),
    ('{"prompt": "a cat", "size": 1024}', "size"),
    ('{"prompt": "a cat", "size": "1024*1024", "aspect_ratio": "1:1"}', "aspect_ratio"),
    ('{"prompt": "a cat", "aspect_ratio": "5:4"}', "aspect_ratio"),
    ('{"prompt": "a cat", "prompt_extend": 1}', "prompt_extend"),
    ('{"prompt": "a cat", "base_url": 5}', "base_url"),
    ('{"prompt": "a cat", "base_url": "https://example.com"}', "base_url"),
    ('{"prompt": "a cat", "n": 2}', "n"),
    ('{"prompt": "a cat", "\\ud800": 2}', "unknown field"),
    ('{"prompt": "a cat", "negative_prompt": "a dog"}', "negative_prompt"),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("text", "word"), MALFORMED_REQUESTS, ids=short)
def test_refuses_a_malformed_request_before_anything_is_sent(
    shell: Shell, mock: MockServer, text: str, word: str
) -> None:
    shell.use(mock)
    if word == "base_url":
        del shell.env["DASHSCOPE_BASE_URL"]
    assert word in said(refusal(shell.call("--request", text, "--print-response")))
    assert mock.stats()["requests"] == []
    assert shell.files() == []


MALFORMED_ARGUMENTS: list[tuple[list[str], str]] = [
    ([], "--prompt"),
    (["--dry-run"], "--prompt"),
    (["--prompt", "a cat", "--file", "request.json"], "--file"),
    (["--prompt", "a cat", "--check"], "--check"),
    (["--prompt"], "--prompt"),
    (["--prompt", ""], "prompt"),
    (["--prompt", "\u3000"], "prompt"),
    (["--prompt", "not text: \udcff"], "prompt"),
    (["--prompt", "a", "cat"], "cat"),
    (["--promp", "a cat"], "--promp"),
    (["--prompt", "a cat", "--siz", "1024x1024"], "--siz"),
    (["--prompt", "a cat", "--size", "10x10"], "size"),
    (["--prompt", "a cat", "--size", ""], "size"),
    (["--prompt", "a cat", "--size", "1024x1024", "--aspect-ratio", "1:1"], "aspect_ratio"),
    (["--prompt", "a cat", "--aspect-ratio", "5:4"], "aspect_ratio"),
    (["--prompt", "a cat", "--seed", "abc"], "seed"),
    (["--prompt", "a cat", "--seed", "1.5"], "seed"),
    (["--prompt", "a cat", "--seed", "-2"], "seed"),
    (["--prompt", "a cat", "--seed", "2147483648"], "seed"),
    (["--prompt", "a cat", "--seed", "５"], "seed"),
    (["--prompt", "a cat", "--seed", ""], "seed"),
    (["--prompt", "a cat", "--seed", "9" * 6000], "seed"),
    (["--prompt", "a cat", "--timeout", "0"], "--timeout"),
    (["--prompt", "a cat", "--timeout", "-5"], "--timeout"),
    (["--prompt", "a cat", "--timeout", "nan"], "--timeout"),
    (["--prompt", "a cat", "--timeout", "inf"], "--timeout"),
    (["--prompt", "a cat", "--timeout", "soon"], "--timeout"),
    (["--prompt", "a cat", "--max-retries", "-1"], "--max-retries"),
    (["--prompt", "a cat", "--max-retries", "1.5"], "--max-retries"),
    (["--prompt", "a cat", "--max-retries", "many"], "--max-retries"),
    (["--prompt", "a cat", "--region", "mars"], "--region"),
    (["--prompt", "a cat", "--region", ""], "--region"),
    (["--prompt", "a cat", "--provider", "nobody"], "--provider"),
    (["--prompt", "a cat", "--provider", "../dashscope"], "--provider"),
    (["--prompt", "a cat", "--provider", ""], "--provider"),
    (["--prompt", "a cat", "--base-url", ""], "--base-url"),
    (["--prompt", "a cat", "--trust-host", "*.example.com"], "--trust-host"),
    (["--prompt", "a cat", "--output", ""], "--output"),
    (["--prompt", "a cat", "--output", "cat.gif"], "--output"),
    (["--prompt", "a cat", "--overwrite=yes"], "--overwrite"),
    (["--schema", "everything"], "--schema"),
    (["--check", "--size", "1024x1024"], "--size"),
    (["--check", "--output", "cat.png"], "--output"),
    (["--recover", "evidence.json", "--seed", "5"], "--seed"),
    (["--recover", "evidence.json"], "evidence.json"),
    (["--replay", "evidence.json"], "evidence.json"),
    (["--file", "missing.json"], "missing.json"),
    (["--file", "."], "folder"),
    (["--file", ""], "--file"),
]


@pytest.mark.parametrize(("arguments", "word"), MALFORMED_ARGUMENTS, ids=short)
def test_refuses_malformed_arguments_before_anything_is_sent(
    shell: Shell, mock: MockServer, arguments: list[str], word: str
) -> None:
    shell.use(mock)
    assert word in said(refusal(shell.call(*arguments, "--print-response")))
    assert mock.stats()["requests"] == []
    assert shell.files() == []


def test_names_all_faults_of_request_and_arguments_at_once(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    request = {"prompt": " ", "size": "1*1", "seed": -5, "n": 2, "base_url": "https://example.com"}
    result = shell.run("--request", json.dumps(request), "--output", "cat.gif", "--print-response")
    found = refusal(result)["problems"]
    for name in ("prompt", "size", "seed", "n", "base_url", "--output"):
        assert sum(text.startswith((f"{name}:", f'"{name}":')) for text in found) == 1, (name, found)
    for text in found:
        assert text in result.stderr
    assert mock.stats()["requests"] == []
    assert shell.files() == []


def test_names_all_faults_of_the_command_line_at_once(shell: Shell) -> None:
    wrong = ["--timeout", "0", "--max-retries", "x", "--region", "mars", "--provider", "nobody", "--trust-host", "*"]
    found = refusal(shell.run("--prompt", "a cat", *wrong, "--bogus", "--print-response"))["problems"]
    for name in ("--timeout", "--max-retries", "--region", "--provider", "--trust-host", "--bogus"):
        assert sum(text.startswith(f"{name}:") for text in found) == 1, (name, found)


# -- Requests in files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_reads_a_file_in_every_promised_encoding(shell: Shell, encoding: str) -> None:
    text = json.dumps({"prompt": "一只猫 🐈", "seed": 5}, ensure_ascii=False)
    (shell.folder / "request.json").write_bytes(text.encode(encoding))
    request = shell.call("--file", "request.json", "--dry-run").json["request"]
    assert (request["prompt"], request["seed"]) == ("一只猫 🐈", 5)


def test_reads_a_request_from_standard_input(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    text = json.dumps({"prompt": 'a "cat"\n$HOME', "size": "512x512"})
    response = shell.run("--file", "-", "--print-response", stdin=text.encode("utf-8-sig")).json
    assert response["prompt"] == 'a "cat"\n$HOME'
    assert mock.stats()["payloads"][0]["prompt"] == 'a "cat"\n$HOME'


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"\xef\xbb\xbf", id="BOM alone"),
        pytest.param('{"prompt": "café"}'.encode("latin-1"), id="latin-1"),
        pytest.param(b'{"prompt": "\xed\xa0\x80"}', id="surrogate in UTF-8"),
        pytest.param('{"prompt": "a cat"}'.encode("utf-16")[:-1], id="odd UTF-16"),
        pytest.param(b'{"prompt": "a cat"' + b" " * MIB + b"}", id="over 1 MiB"),
        pytest.param(b"[" * 100_000, id="nested, open"),
        pytest.param(b'{"prompt":' + b"[" * 50_000 + b"]" * 50_000 + b"}", id="nested, closed"),
        pytest.param(b"\x00" * 50, id="zeros"),
        pytest.param(bytes(range(256)), id="all bytes"),
        pytest.param(b"\x89PNG\r\n\x1a\n", id="picture"),
    ],
)
@pytest.mark.parametrize("place", ["request.json", "-"])
def test_refuses_a_file_that_holds_no_request(shell: Shell, mock: MockServer, content: bytes, place: str) -> None:
    shell.use(mock)
    if place != "-":
        (shell.folder / place).write_bytes(content)
    refusal(shell.call("--file", place, "--print-response", stdin=content if place == "-" else None))
    assert mock.stats()["requests"] == []
    assert shell.files() == ([] if place == "-" else [place])


@pytest.mark.parametrize(
    ("name", "depth"),
    [
        *(("prompt", depth) for depth in (50, 400, 800, 900, 940, 960, 980, 990, 1000, 3000, 20_000)),
        *((name, depth) for name in ("size", "unknown") for depth in (900, 980)),
    ],
)
def test_no_depth_of_nesting_breaks_the_error(shell: Shell, name: str, depth: int) -> None:
    nested = '{"a":[' * (depth // 2) + "]}" * (depth // 2)
    (shell.folder / "request.json").write_text(f'{{"{name}": {nested}}}')
    assert refusal(shell.call("--file", "request.json", "--print-response"))["code"] == "invalid_request"


def test_a_request_of_exactly_1_mib_is_not_too_large(shell: Shell) -> None:
    content = b'{"prompt": "a cat"'.ljust(MIB - 1) + b"}"
    (shell.folder / "request.json").write_bytes(content)
    assert shell.run("--file", "request.json", "--dry-run").code == 0
    (shell.folder / "request.json").write_bytes(content + b"\n")
    assert "1 MiB" in refusal(shell.run("--file", "request.json", "--print-response"))["message"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_that_nobody_writes_to_does_not_hang_the_command(shell: Shell) -> None:
    os.mkfifo(shell.folder / "request.json")
    error = refusal(shell.run("--file", "request.json", "--timeout", "1", "--print-response", timeout=15))
    assert "request.json" in error["message"]


def test_a_position_leads_to_the_fault_in_a_file(shell: Shell) -> None:
    (shell.folder / "request.json").write_text('{\n  "prompt": "a cat",\n  size: "1024*1024"\n}')
    message = refusal(shell.run("--file", "request.json", "--print-response"))["message"]
    assert "request.json" in message
    assert "line 3" in message


# -- Flags win ---------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], {"size": "1280*720", "seed": 5, "prompt_extend": True}),
        (["--seed", "6"], {"seed": 6}),
        (["--seed", "0"], {"seed": 0}),
        (["--size", "512x512"], {"size": "512*512"}),
        (["--aspect-ratio", "9:16"], {"size": "720*1280"}),
        (["--no-prompt-extend"], {"prompt_extend": False}),
        (["--prompt-extend"], {"prompt_extend": True}),
        (["--seed", "7", "--size", "640x640"], {"seed": 7, "size": "640*640", "prompt_extend": True}),
    ],
)
@pytest.mark.parametrize("shape", [{"size": "1280*720"}, {"aspect_ratio": "16:9"}])
def test_flags_win_over_the_request(
    shell: Shell, flags: list[str], expected: dict[str, Any], shape: dict[str, str]
) -> None:
    request = json.dumps({"prompt": "a cat", "seed": 5, "prompt_extend": True} | shape)
    plan = shell.call("--request", request, *flags, "--dry-run").json
    assert expected.items() <= plan["request"].items()
    parameters = {name: plan["request"][name] for name in ("size", "seed", "prompt_extend")}
    assert plan["payload"]["parameters"] == parameters


@pytest.mark.parametrize(
    ("wrong", "flags"),
    [
        ({"size": "1*1"}, ["--size", "512x512"]),
        ({"size": "1*1"}, ["--aspect-ratio", "1:1"]),
        ({"aspect_ratio": "5:4"}, ["--size", "512x512"]),
        ({"aspect_ratio": "1:1", "size": "1024*1024"}, ["--size", "512x512"]),
        ({"seed": "many"}, ["--seed", "5"]),
        ({"prompt_extend": "yes"}, ["--no-prompt-extend"]),
    ],
)
def test_a_fault_that_a_flag_replaces_is_none(shell: Shell, wrong: dict[str, Any], flags: list[str]) -> None:
    request = json.dumps({"prompt": "a cat"} | wrong)
    refusal(shell.call("--request", request, "--print-response"))
    assert shell.call("--request", request, *flags, "--dry-run").code == 0


def test_seed_minus_one_on_the_command_line_replaces_the_requests_seed(shell: Shell) -> None:
    request = json.dumps({"prompt": "a cat", "seed": 5})
    seeds = [shell.run("--request", request, "--seed", "-1", "--dry-run").json["request"]["seed"] for _ in range(2)]
    assert seeds != [5, 5]


# -- Long prompts ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("length", "warned"), [(800, False), (801, True)])
def test_a_prompt_over_800_characters_is_sent_whole_with_a_warning(
    shell: Shell, mock: MockServer, length: int, warned: bool
) -> None:
    shell.use(mock)
    result = shell.call("--prompt", "猫" * length, "--size", "512x512", "--print-response")
    assert result.code == 0
    assert any("800" in text for text in result.json.get("warnings", [])) is warned
    assert ("warning: prompt: " in result.stderr) is warned
    assert result.json["prompt"] == mock.stats()["payloads"][0]["prompt"] == "猫" * length


# -- Schemas and what they describe ------------------------------------------------------------------------------------

ALWAYS = {"width", "height", "prompt", "request_id", "seed", "size", "provider", "region"} | {
    "image_url",
    "image_path",
    "evidence_path",
    "estimated_cost",
}


def schema(shell: Shell, name: str) -> dict[str, Any]:
    return shell.run("--schema", name).json


def conforms(schema_: dict[str, Any], value: Any) -> None:
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    jsonschema.Draft202012Validator(schema_, format_checker=checker).validate(value)


@pytest.mark.parametrize("name", ["request", "response", "evidence"])
def test_prints_valid_schemas(shell: Shell, name: str) -> None:
    printed = schema(shell, name)
    assert printed["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(printed)
    assert not jsonschema.Draft202012Validator(printed).is_valid({})
    assert shell.files() == []


def test_the_request_schema_alone_refuses_what_it_can(shell: Shell) -> None:
    printed = schema(shell, "request")
    assert set(printed["properties"]) == REQUEST_FIELDS
    for name, value in itertools.chain(
        [("seed", seed) for seed in (-2, MAX_SEED + 1, 1.5, True, "5")],
        [("size", size) for size in ("1024", "x", "", 1024)],
        [("prompt", prompt) for prompt in ("", " ", "\u3000", 5)],
        [("aspect_ratio", "5:4"), ("prompt_extend", "yes"), ("base_url", 5), ("n", 2)],
    ):
        with pytest.raises(jsonschema.ValidationError):
            conforms(printed, {"prompt": "a cat"} | {name: value})
    for raw in valid_requests(50):
        conforms(printed, raw)


@pytest.mark.parametrize(
    ("flags", "optional"),
    [([], set()), (["--prompt-extend"], {"rewritten_prompt", "reasoning"})],
)
def test_the_response_has_exactly_the_promised_fields(
    shell: Shell, mock: MockServer, flags: list[str], optional: set[str]
) -> None:
    shell.use(mock)
    response = shell.call("--prompt", "a cat", "--size", "640x512", "--seed", "5", *flags, "--print-response").json
    assert set(response) == ALWAYS | optional
    conforms(schema(shell, "response"), response)
    conforms(schema(shell, "evidence"), shell.evidence())
    assert (response["width"], response["height"], response["size"]) == (640, 512, "640*512")
    assert (response["prompt"], response["seed"]) == ("a cat", 5)
    assert (response["provider"], response["region"]) == ("dashscope", "unknown")
    assert response["image_url"].startswith("http://127.0.0.1:")
    assert Path(response["image_path"]).is_absolute()
    assert Path(response["image_path"]).is_file()
    assert [Path(response["evidence_path"])] == shell.evidence_files()
    assert response["estimated_cost"] == (0.02868 if optional else 0.01434)
    for name in optional:
        assert response[name].strip()


def test_every_schema_field_of_the_response_is_one_of_the_contract(shell: Shell) -> None:
    optional = {"rewritten_prompt", "reasoning", "warnings", "paid_before", "quota"}
    assert set(schema(shell, "response")["properties"]) == ALWAYS | optional


@pytest.mark.parametrize(
    ("faults", "code", "status"),
    [
        ("400", 2, "failed"),
        ("blocked", 5, "failed"),
        ("hangup-after", 7, "unknown"),
        ("image-corrupt", 8, "generated"),
    ],
)
def test_evidence_and_error_of_a_failed_run_keep_to_their_schemas(
    shell: Shell, faults: str, code: int, status: str
) -> None:
    with MockServer(rpm=0, faults=faults) as mock:
        shell.use(mock)
        result = shell.call("--prompt", "a cat", "--size", "512x512", "--print-response")
    assert result.code == code
    error_schema = schema(shell, "response")["$defs"]["error"]
    conforms(error_schema, result.error)
    evidence = shell.evidence()
    conforms(schema(shell, "evidence"), evidence)
    assert evidence["status"] == status
    conforms(error_schema, evidence["error"])
    assert evidence["error"]["code"] == result.error["code"]


def test_errors_before_sending_keep_to_their_schema(shell: Shell) -> None:
    error_schema = schema(shell, "response")["$defs"]["error"]
    for arguments in (["--bogus"], ["--prompt", ""], ["--prompt", "a cat"], ["--replay", "none.json"]):
        conforms(error_schema, shell.run(*arguments, "--print-response").error)


def test_the_request_in_the_evidence_is_a_request_that_makes_the_same_payload(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    assert shell.run("--prompt", "a cat", "--aspect-ratio", "9:21").code == 0
    evidence = shell.evidence()
    conforms(schema(shell, "request"), evidence["request"])
    plan = shell.run("--request", json.dumps(evidence["request"]), "--dry-run").json
    assert plan["request"] == evidence["request"]
    assert plan["payload"] == evidence["payload"]
    assert evidence["payload"]["parameters"]["size"] == "576*1344"
    assert mock.stats()["payloads"][0]["parameters"] == evidence["payload"]["parameters"]


def test_of_many_problems_the_first_are_told_and_the_rest_are_counted(shell: Shell) -> None:
    fields = {f"field_{number}": 1 for number in range(5000)}
    (shell.folder / "request.json").write_text(json.dumps({"prompt": "a cat"} | fields), encoding="utf-8")
    error = shell.run("--file", "request.json", "--print-response").error
    assert (error["exit_code"], len(error["problems"])) == (2, 101)
    assert error["message"].startswith("5000 problems") and error["message"].endswith("and 4900 more")
