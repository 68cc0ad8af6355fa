"""The workflow that is queued for this model is the official template's: nodes, links, values, files and their folders.

The template comes from the package that ComfyUI itself installs for its users, the newest one there is.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conftest import cannot
from zimage.registry import provider_class, provider_named
from zimage.request import ImageRequest

PACKAGE = "comfyui-workflow-templates-json"
# What stands in `widgets_values` of a node, in this order; None is of the editor alone, or ours to choose.
WIDGETS: dict[str, tuple[str | None, ...]] = {
    "UNETLoader": ("unet_name", "weight_dtype"),
    "CLIPLoader": ("clip_name", "type", "device"),
    "VAELoader": ("vae_name",),
    "ModelSamplingAuraFlow": ("shift",),
    "CLIPTextEncode": (None,),
    "ConditioningZeroOut": (),
    "EmptySD3LatentImage": ("width", "height", "batch_size"),
    "KSampler": (None, None, "steps", "cfg", "sampler_name", "scheduler", "denoise"),
    "VAEDecode": (),
    "SaveImage": ("filename_prefix",),
}


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the templates, from a package index."""
    target = tmp_path_factory.mktemp("templates")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    done = subprocess.run([*pip, "--target", str(target), PACKAGE], capture_output=True, timeout=300, check=False)
    if done.returncode:
        cannot(f"install {PACKAGE}")
    return target / "comfyui_workflow_templates_json" / "templates"


def nodes_in(path: Path) -> list[dict[str, Any]]:
    """All nodes of a template, those of its subgraphs too; notes are for people."""
    content = json.loads(path.read_text(encoding="utf-8"))
    subgraphs = content["definitions"]["subgraphs"]
    drawn = {subgraph["id"] for subgraph in subgraphs}
    nodes = [node for part in (content, *subgraphs) for node in part["nodes"]]
    return [node for node in nodes if node["type"] not in {"MarkdownNote", "Note", *drawn}]


def links_in(path: Path) -> set[tuple[str, str, str]]:
    """What leads where within the subgraph: the type of a node, that of the next, and the input there."""
    (subgraph,) = json.loads(path.read_text(encoding="utf-8"))["definitions"]["subgraphs"]
    nodes = {node["id"]: node for node in subgraph["nodes"]}
    return {
        (nodes[link["origin_id"]]["type"], target["type"], target["inputs"][link["target_slot"]]["name"])
        for link in subgraph["links"]
        if link["origin_id"] in nodes and (target := nodes.get(link["target_id"]))
    }


@pytest.fixture(scope="module")
def graph() -> dict[str, Any]:
    """What we queue, by the types of its nodes."""
    queued = provider_named("comfyui").payload(ImageRequest("a fox", "1024*1024", 5))["prompt"]
    by_type = {node["class_type"]: node["inputs"] for node in queued.values()}
    assert len(by_type) == len(queued)
    kinds = {name: node["class_type"] for name, node in queued.items()}
    return {
        kind: {
            name: (kinds[value[0]], value[1]) if isinstance(value, list) else value for name, value in fields.items()
        }
        for kind, fields in by_type.items()
    }


@pytest.mark.heavy
def test_the_nodes_and_values_are_the_templates(templates: Path, graph: dict[str, Any]) -> None:
    nodes = nodes_in(templates / "image_z_image_turbo.json")
    assert sorted(node["type"] for node in nodes) == sorted(graph) == sorted(WIDGETS)
    for node in nodes:
        names = WIDGETS[node["type"]]
        values = dict(zip(names, node["widgets_values"], strict=True))
        ours = graph[node["type"]]
        assert {name: ours[name] for name in values if name} == {name: said for name, said in values.items() if name}


@pytest.mark.heavy
def test_the_links_are_the_templates(templates: Path, graph: dict[str, Any]) -> None:
    links = {
        (value[0], kind, name)
        for kind, fields in graph.items()
        for name, value in fields.items()
        if isinstance(value, tuple) and kind != "SaveImage"  # which stands outside of the subgraph
    }
    assert links == links_in(templates / "image_z_image_turbo.json")
    assert graph["SaveImage"]["images"] == ("VAEDecode", 0)


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["image_z_image_turbo", "image_z_image_turbo_int8"])
def test_its_files_are_known_with_their_folders(templates: Path, name: str) -> None:
    """Also those of the other build, which is taken where the usual one is not there."""
    parts = sys.modules[provider_class("comfyui").__module__].__dict__["PARTS"]
    by_loader = {part.loader: part for part in parts}
    found = {}
    for node in nodes_in(templates / f"{name}.json"):
        for model in node.get("properties", {}).get("models", ()):
            part = by_loader[node["type"]]
            found[part.setting] = model["name"]
            assert model["directory"] == part.folder and part.other.search(model["name"])
            assert "Comfy-Org/z_image_turbo" in model["url"] or part.setting != "model"
    assert found.keys() == {part.setting for part in parts}
    if name == "image_z_image_turbo":
        assert found == {part.setting: part.usual for part in parts}
