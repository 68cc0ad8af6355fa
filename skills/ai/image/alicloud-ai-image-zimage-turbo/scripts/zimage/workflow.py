"""Workflow: a graph of nodes that a server runs, and where in it a request stands."""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from zimage.outside import at, json_of, outside_text

Graph = dict[str, dict[str, Any]]  # node id -> class_type, inputs; an input that is [node id, output] is a link
Hole = tuple[str, str]  # node id and name of an input

MARK = re.compile(r"\{\{\s*(prompt|negative|seed|width|height|steps|guidance)\s*\}\}")
FORM = "a workflow in API format: in the editor Workflow > Export (API)"
HASH = re.compile("[0-9a-f]{64}")
SECRET_INPUT = re.compile("api_?key|auth_?token|access_?token|password|secret", re.IGNORECASE)
SEEDS = {"KSampler": "seed", "KSamplerAdvanced": "noise_seed", "SamplerCustom": "noise_seed"}
SAMPLERS = (*SEEDS, "SamplerCustomAdvanced")  # the last takes its seed from a node of its own
VALUES = ("value", "text", "string", "seed", "noise_seed", "int", "number")  # inputs of nodes that only hand one on


class Workflow(NamedTuple):
    """A graph and where in it prompt, seed, size and steps stand: as marks in its texts, else at `holes`."""

    graph: Graph
    sha256: str
    holes: Mapping[str, Hole]
    marks: frozenset[str]

    @property
    def takes(self) -> frozenset[str]:
        """What it has a place for."""
        return self.marks | self.holes.keys()

    def filled(self, values: Mapping[str, Any]) -> Graph:
        """The graph with the values in their places; those that are None stay as the graph has them."""
        graph: Graph = _filled(self.graph, values) if self.marks else json.loads(json.dumps(self.graph))
        for name, (node, field) in self.holes.items():
            if values.get(name) is not None:
                graph[node]["inputs"][field] = values[name]
        return graph


def _filled(value: Any, values: Mapping[str, Any]) -> Any:
    """A tree with its marks filled in, each once: what a prompt says is not searched for marks."""
    if isinstance(value, dict):
        return {name: _filled(item, values) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, values) for item in value]
    if not isinstance(value, str):
        return value
    if whole := MARK.fullmatch(value.strip()):
        return values[whole[1]]  # a number stays one
    return MARK.sub(lambda mark: str(values[mark[1]]), value)


def workflow_in(content: bytes | str) -> Workflow | str:
    """The workflow in a file; of one that a record names only the hash is known.

    Raises:
        ValueError: with what it must be.
    """
    if isinstance(content, str):
        if not HASH.fullmatch(content):
            raise ValueError("the SHA-256 of a workflow, in hex")
        return content
    graph = _graph_in(content)
    marks = frozenset(marks_in([node["inputs"] for node in graph.values()]))
    holes = {} if marks else _holes_in(graph)
    if "prompt" not in marks | holes.keys():
        raise ValueError("a workflow with a place for the prompt: put {{prompt}} where it belongs, {{seed}} too")
    return Workflow(graph, hashlib.sha256(content).hexdigest(), holes, marks)


def _graph_in(content: bytes) -> Graph:
    """The graph in a JSON file, or in a picture that such a server has made. Raises ValueError."""
    text = _text_in_png(content) if content.startswith(b"\x89PNG") else content.decode("utf-8-sig", "replace")
    try:
        graph = json_of(text)
    except ValueError:
        raise ValueError(f"{FORM}, as JSON") from None
    if isinstance(graph, dict) and isinstance(graph.get("nodes"), list):
        raise ValueError(f"{FORM}; this one is in the editor's own format")
    if isinstance(graph, dict) and isinstance(graph.get("prompt"), dict) and "class_type" not in graph["prompt"]:
        graph = graph["prompt"]
    is_graph = (
        isinstance(graph, dict)
        and graph != {}
        and all(
            isinstance(at(node, "class_type"), str) and isinstance(at(node, "inputs"), dict) for node in graph.values()
        )
    )
    if not is_graph:
        raise ValueError(FORM)
    for name, node in graph.items():
        for field, value in node["inputs"].items():
            if is_link(value) and value[0] not in graph:
                raise ValueError(
                    f"a whole workflow: node {shown_id(name)} takes {field!r} from a node that is not there"
                )
            if isinstance(value, str) and value and SECRET_INPUT.search(field):
                raise ValueError(
                    f"a workflow without keys: {field!r} of node {shown_id(name)} would be kept in evidence"
                )
    return {name: {**node, "inputs": dict(node["inputs"])} for name, node in graph.items()}


def _text_in_png(content: bytes) -> str:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            text = image.info.get("prompt")
            if text is None:
                image.load()  # it may stand behind the pixels
                text = image.info.get("prompt")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{FORM}, or a PNG that was made by one; this picture holds none")
    return text


def marks_in(value: Any) -> Iterator[str]:
    """The names in the marks of a tree."""
    if isinstance(value, str):
        yield from (mark[1] for mark in MARK.finditer(value))
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from marks_in(item)


def is_link(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and isinstance(value[0], str) and isinstance(value[1], int)


def shown_id(node: str) -> str:
    return outside_text(node, 40)


def _holes_in(graph: Graph) -> dict[str, Hole]:
    """Where prompt, seed, size and steps stand in a graph without marks, found by its shape.

    Raises:
        ValueError: where there is not exactly one place for the prompt.
    """
    samplers = [name for name, node in graph.items() if node["class_type"] in SAMPLERS]
    if len(samplers) != 1:
        how = f"it has {len(samplers)} samplers" if samplers else "it has no sampler that is known"
        raise ValueError(f"a workflow with marks: put {{{{prompt}}}}, {{{{seed}}}}, … where they belong; {how}")
    sampler = graph[samplers[0]]
    inputs = sampler["inputs"]
    found: dict[str, Hole | None] = {}
    texts = set(_texts_behind(graph, inputs.get("positive", inputs.get("guider")), set()))
    if len(texts) != 1:
        how = f"{len(texts)} texts lead to its sampler" if texts else "no text leads to its sampler"
        raise ValueError(f"a workflow with marks: put {{{{prompt}}}}, {{{{seed}}}}, … where they belong; {how}")
    found["prompt"] = texts.pop()
    if sampler["class_type"] in SEEDS:
        found["seed"] = _value_hole(graph, samplers[0], SEEDS[sampler["class_type"]], int)
    elif is_link(inputs.get("noise")):
        found["seed"] = _value_hole(graph, inputs["noise"][0], "noise_seed", int)
    found["steps"] = _value_hole(graph, samplers[0], "steps", int)
    found["guidance"] = _value_hole(graph, samplers[0], "cfg", (int, float))
    latent = inputs.get("latent_image")
    if is_link(latent) and re.match("Empty.*Latent", graph[latent[0]]["class_type"]):
        found["width"] = _value_hole(graph, latent[0], "width", int)
        found["height"] = _value_hole(graph, latent[0], "height", int)
    return {name: hole for name, hole in found.items() if hole is not None}


def _value_hole(graph: Graph, node: str, field: str, kind: Any, depth: int = 8) -> Hole | None:
    """The input that holds a value, through nodes that only hand one on; None where none does."""
    inputs = graph[node]["inputs"]
    value = inputs.get(field)
    if isinstance(value, kind) and not isinstance(value, bool):
        return node, field
    if not is_link(value) or depth == 0:
        return None
    behind = [name for name in VALUES if name in graph[value[0]]["inputs"]]
    return _value_hole(graph, value[0], behind[0], kind, depth - 1) if len(behind) == 1 else None


def _texts_behind(graph: Graph, link: Any, seen: set[str]) -> Iterator[Hole]:
    """The texts that a sampler's conditioning is made of, back through the nodes that change it."""
    if not is_link(link) or link[0] in seen:
        return
    seen.add(link[0])
    inputs = graph[link[0]]["inputs"]
    if "text" in inputs:
        hole = _value_hole(graph, link[0], "text", str)
        if hole is not None:
            yield hole
        return
    for name, value in inputs.items():
        if name == "positive" or name.startswith("conditioning"):
            yield from _texts_behind(graph, value, seen)
