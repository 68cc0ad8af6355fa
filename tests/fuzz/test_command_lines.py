"""Command lines: any options with any values, for all three commands, and request files of any bytes."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from hypothesis import strategies as st

import fill_template
from fuzz.conftest import cases
from fuzz.place import Place
from fuzz.services import GOOD_ANSWER, Service
from fuzz.strategies import as_body, changed, changed_bytes, near_requests, texts, valid_requests
from fuzz.test_templates import EXAMPLES
from zimage import options
from zimage.batch import options as batch_options
from zimage.calls import HttpAnswer
from zimage.registry import provider_class, provider_names

# What some option takes; each may be tried on any.
VALUES = [
    "512x512",
    "16:9",
    "7",
    "-1",
    "0",
    "1.5",
    "fox.png",
    "a/fox.jpg",
    "fox.png",
    "out",
    "rows.jsonl",
    "rows.csv",
    "rows.txt",
]
VALUES += [
    "request.json",
    "-",
    ".",
    "..",
    "~",
    "beijing",
    "singapore",
    "request",
    "evidence",
    "127.0.0.1",
    "example.com",
    "{}",
]
VALUES += [
    *provider_names(),
    "http://127.0.0.1:1/api/v1",
    "https://dashscope.aliyuncs.com/api/v1",
    '{"prompt": "a fox"}',
]


def tables_of(parser: argparse.ArgumentParser) -> tuple[list[str], list[str]]:
    """The options of a command, those with a value first."""
    actions = [action for action in parser._actions if action.option_strings]
    valued = [name for action in actions if action.nargs is None for name in action.option_strings]
    flags = [name for action in actions if action.nargs == 0 for name in action.option_strings]
    return valued, flags


# What the system can hand over: a command line has no zero byte in it. Nothing may be named that lies elsewhere.
words = texts.filter(lambda text: "\0" not in text and "/" not in text and text.isprintable())
words |= st.sampled_from(["\n", "\r\nnext: x", "\x1b[2J", "\udcff\udcfe", "x" * 5000])


def argument_lists(parser: argparse.ArgumentParser) -> st.SearchStrategy[list[str]]:
    valued, flags = tables_of(parser)
    values = st.sampled_from(VALUES) | words
    one = st.one_of(
        st.builds(lambda name, value: [f"{name}={value}"], st.sampled_from(valued), values),
        st.builds(lambda name, value: [name, value], st.sampled_from(valued), values),
        st.sampled_from(flags).map(lambda name: [name]),
        st.just(["--prompt", "a fox"]),
        values.map(lambda value: [value]),
    )
    return st.lists(one, max_size=6).map(lambda parts: [word for part in parts for word in part])


single = argument_lists(options.build_parser(provider_class("openai"))) | argument_lists(options.build_parser())
batch = argument_lists(batch_options.build_parser()).map(lambda found: [*found])
templates = argument_lists(fill_template.build_parser()) | st.sampled_from(list(EXAMPLES)).flatmap(
    lambda name: argument_lists(fill_template.build_parser()).map(lambda found: [name, *found])
)


def furnished(place: Place) -> dict[str, bytes]:
    """A project with an input of each kind; returns what lies in the place."""
    place.clear()
    (place.project / "rows.jsonl").write_text('{"prompt": "a fox", "size": "512x512"}\n{"prompt": "an owl"}\n')
    (place.project / "rows.csv").write_text("prompt,seed\na fox,1\n")
    (place.project / "rows.txt").write_text("a fox\nan owl\n")
    (place.project / "request.json").write_text('{"prompt": "a fox", "seed": 7}')
    (place.project / "values.json").write_text(json.dumps(EXAMPLES["poster"]))
    return place.files()


def assert_nothing_lost(place: Place, before: dict[str, bytes], *, overwrites: bool = False) -> None:
    after = place.files()
    for name, content in before.items():
        assert after.get(name) == content or (overwrites and name.endswith((".png", ".jpg", ".webp"))), name


@cases(60, 2_500, arguments=single, stdin=st.sampled_from([b"", b'{"prompt": "x"}', b"\xff"]), paid=st.booleans())
def test_one_picture_by_any_command_line(place: Place, arguments: list[str], stdin: bytes, paid: bool) -> None:
    before = furnished(place)
    service = Service([GOOD_ANSWER] if paid else [HttpAnswer(401, {}, b"{}")])
    done = place.run("generate_image.py", *arguments, stdin=stdin, service=service)
    assert len(service.paid) <= 1
    assert_nothing_lost(place, before)
    if {"--dry-run", "--check", "--schema", "--recover", "--help", "--version"} & set(arguments):
        assert not service.paid
    if done.code == 2 and not service.paid:
        assert place.files() == before, "what is refused before sending leaves nothing"
    if any(word.startswith(options_with_json) for word in arguments) and done.code:
        assert done.error is not None


options_with_json = ("--print-response", "--check", "--dry-run", "--schema")


@cases(
    40,
    1_500,
    arguments=batch,
    stdin=st.sampled_from([b"", b'{"prompt": "x"}\n', b"\xff"]),
    kind=st.sampled_from(["--dry-run", "--status=out", "--gallery-only=out", "--no-gallery"]),
)
def test_a_batch_by_any_command_line(place: Place, arguments: list[str], stdin: bytes, kind: str) -> None:
    """The key is refused at once: what a whole run does is the matter of other tests."""
    before = furnished(place)
    done = place.run("generate_batch.py", *arguments, kind, stdin=stdin)
    assert_nothing_lost(place, before)
    if kind != "--no-gallery":
        assert not done.service.paid and place.files() == before
    if done.code:
        assert done.error is not None


@cases(25, 1_000, arguments=templates, stdin=st.sampled_from([b"", b"{}", json.dumps(EXAMPLES["poster"]).encode()]))
def test_a_template_by_any_command_line(place: Place, arguments: list[str], stdin: bytes) -> None:
    before = furnished(place)
    place.run("fill_template.py", *arguments, stdin=stdin)
    assert place.files() == before


REQUEST = json.dumps({"prompt": "a fox", "size": "1280x720", "seed": 7}, indent=1).encode()
files = st.one_of(
    valid_requests.map(as_body),
    near_requests.map(as_body),
    changed({"prompt": "a fox", "size": "1280x720", "seed": 7}).map(as_body),
    changed_bytes(REQUEST),
    st.binary(max_size=100),
    st.sampled_from([b"", b" " * 2**20 + b"{}", REQUEST.decode().encode("utf-16")]),
)


@cases(30, 1_500, content=files, by=st.sampled_from(["file", "stdin", "text"]))
def test_a_request_of_any_bytes_is_planned_or_refused(place: Place, content: bytes, by: str) -> None:
    place.clear()
    (place.project / "request.json").write_bytes(content)
    text = os.fsdecode(content).replace("\0", "")[:100_000]
    way = {"file": ["--file", "request.json"], "stdin": ["--file", "-"], "text": [f"--request={text}"]}[by]
    before = place.files()
    done = place.run("generate_image.py", *way, "--dry-run", stdin=content)
    assert place.files() == before
    plan: dict[str, Any] = json.loads(done.out)
    if done.code == 0:
        again = place.run("generate_image.py", f"--request={json.dumps(plan['request'])}", "--dry-run")
        assert json.loads(again.out)["request"] == plan["request"], "a plan is itself a request that changes no more"
