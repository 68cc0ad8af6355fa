"""Requests: JSON of any shape is refused by name, or normalized once and for all."""

from __future__ import annotations

import json
import re
from typing import Any

import jsonschema
from hypothesis import strategies as st

from closed import assert_closed
from fuzz.conftest import cases
from fuzz.promises import assert_failure, assert_one_line, plain_json
from fuzz.strategies import (
    changed,
    changed_bytes,
    json_values,
    near_requests,
    nested,
    odd_sizes,
    sizes,
    texts,
    valid_requests,
)
from zimage.contract import MAX_PIXELS, MIN_PIXELS, REQUEST_SCHEMA
from zimage.errors import Failure
from zimage.outside import without_surrogates
from zimage.plan import problems_for
from zimage.registry import provider_named, provider_names
from zimage.request import (
    decode_json_file,
    is_plainly_valid,
    normalize,
    parse_json,
    parse_size,
    request_problems,
    size_sentences,
)

SCHEMA = jsonschema.Draft202012Validator(REQUEST_SCHEMA)
PROVIDERS = [provider_named(name) for name in provider_names()]
SAMPLE = {"prompt": "a fox", "size": "1280x720", "seed": 7, "prompt_extend": True, "base_url": "127.0.0.1"}
requests = st.one_of(near_requests, near_requests, changed(SAMPLE), json_values())


@cases(150, 4_000, raw=requests)
def test_a_request_is_refused_by_name_or_normalized(raw: Any) -> None:
    problems = request_problems(raw)
    for problem in problems:
        assert problem.code == "invalid_request"
        assert_one_line(problem.text)
    if problems:
        return
    assert SCHEMA.is_valid(raw)
    assert_closed("request", plain_json(normalize(raw).as_dict()))


@cases(150, 4_000, raw=requests)
def test_the_short_way_never_lets_through_what_the_schema_refuses(raw: Any) -> None:
    if is_plainly_valid(raw):
        assert SCHEMA.is_valid(raw)
        width, height = parse_size(normalize(raw).size)
        assert MIN_PIXELS <= width * height <= MAX_PIXELS


@cases(100, 3_000, raw=valid_requests)
def test_normalizing_twice_changes_nothing(raw: Any) -> None:
    if request_problems(raw):  # of its size alone
        assert "size" in raw and size_sentences(raw["size"])
        return
    once = normalize(raw)
    assert normalize(once.as_dict()) == once
    assert normalize(json.loads(json.dumps(once.as_dict()))) == once
    unseeded = normalize(raw, with_seed=False)
    assert normalize(unseeded.as_dict(), with_seed=False) == unseeded
    assert once.prompt == raw["prompt"]
    assert raw.get("seed", -1) in (-1, once.seed)


@cases(100, 2_000, size=sizes | odd_sizes)
def test_a_size_is_pixels_within_the_bounds(size: str) -> None:
    faults = size_sentences(size)
    for fault in faults:
        assert_one_line(fault)
    if not faults and ":" not in size:  # a ratio is taken for one
        width, height = parse_size(size)
        assert [int(number) for number in re.findall(r"\d+", size)] == [width, height]
        assert MIN_PIXELS <= width * height <= MAX_PIXELS


@cases(75, 2_000, raw=requests)
def test_every_provider_says_what_it_cannot_do(raw: Any) -> None:
    """And builds its call of what it can."""
    for provider in PROVIDERS:
        problems = problems_for(provider, raw)
        for problem in problems:
            assert_one_line(problem.text)
        if not problems:
            request = normalize(raw, with_seed=provider.takes_seed)
            plain_json(provider.payload(request))
            assert provider.price(request, provider.default_region).counted >= 0


encodings = st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "latin-1"])


@cases(
    150,
    4_000,
    data=st.one_of(
        st.binary(max_size=200),
        nested,
        texts.map(lambda text: text.encode("utf-8", "surrogatepass")),
        requests.map(lambda raw: json.dumps(raw).encode()),
        st.builds(
            lambda raw, encoding: json.dumps(raw, ensure_ascii=False).encode(encoding, "replace"), requests, encodings
        ),
        changed_bytes(json.dumps(SAMPLE, indent=1).encode()),
    ),
    name=texts,
)
def test_a_file_of_any_bytes_is_json_or_told_to_be_none(data: bytes, name: str) -> None:
    try:
        value = decode_json_file(name, data)
    except Failure as failure:
        assert failure.code == "invalid_request"
        assert_failure(failure)
        return
    # What is taken is what Python's own reader makes of it; that one takes more.
    assert json.dumps(value) == json.dumps(json.loads(data, parse_int=lambda digits: int(digits[:300])))
    for problem in request_problems(value):
        assert_one_line(problem.text)


@cases(75, 2_000, text=texts | requests.map(json.dumps))
def test_json_on_the_command_line_is_read_or_refused(text: str) -> None:
    try:
        value = parse_json(text)
    except ValueError as error:
        assert (str(error) and without_surrogates(str(error)).isprintable()) or "\\" in str(error)
        return
    request_problems(value)
