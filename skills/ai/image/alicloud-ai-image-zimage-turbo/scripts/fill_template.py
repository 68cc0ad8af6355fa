#!/usr/bin/env python3
"""Fill a template of assets/templates with values and print the request, or the rows of a batch. Sends nothing.

A template is a JSON file: `fields`, each with a description and an example, and the `request` with {field} where a
value goes. The kind of a field is that of its example: text, a list of texts, or a whole number. With `each`, the
request is a row of a batch, printed once for every item of the list field of that name; {number} counts them.
Values come from a JSON object with exactly these fields, so that nothing is drawn with a hole in it.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = []
# ///
from __future__ import annotations

import json
import os
import re
import sys
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_folder = os.path.dirname(os.path.realpath(__file__))
if __name__ == "__main__":
    _zimage = types.ModuleType("zimage")  # without an __init__.py any other package of that name would win
    _zimage.__path__ = [os.path.join(_folder, "zimage")]
    sys.modules["zimage"] = _zimage

from zimage.console import Console, carry_out, leave
from zimage.contract import DEFAULT_TIMEOUT, MAX_REQUEST_BYTES, MAX_SEED
from zimage.errors import Failure
from zimage.options import Parser
from zimage.outside import json_kind, shown, without_surrogates
from zimage.paths import user_path
from zimage.request import decode_json_file, read_input
from zimage.waiting import WATCHER, Stop

TEMPLATES = Path(_folder).parent / "assets" / "templates"
PLACEHOLDER = re.compile(r"\{([a-z_]+)\}")


def load_templates() -> dict[str, dict[str, Any]]:
    """Every template by its name.

    Raises:
        Failure: file_unreadable.
    """
    paths = sorted(TEMPLATES.glob("*.json"))
    if not paths:
        hint = "copy the whole folder of the skill"
        raise Failure("file_unreadable", f"{TEMPLATES}: holds no templates", hint=hint)
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}


def described(template: Mapping[str, Any]) -> dict[str, Any]:
    """What someone must know who fills the template in."""
    makes = f"a row for each of `{template['each']}`, for generate_batch.py" if "each" in template else "one request"
    return {"title": template["title"], "makes": makes, "fields": template["fields"]}


def value_sentences(name: str, value: Any, template: Mapping[str, Any]) -> list[str]:
    """What is wrong with the value of a field."""
    example = template["fields"][name]["example"]
    if type(value) is not type(example):
        return [f"{name}: must be of type {json_kind(example)}, got {json_kind(value)}"]
    if isinstance(value, int):
        return [] if 0 <= value <= MAX_SEED else [f"{name}: must be from 0 to {MAX_SEED}, got {value}"]
    texts = value if isinstance(value, list) else [value]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        return [f"{name}: must hold texts, none of them blank" if isinstance(value, list) else f"{name}: is blank"]
    if any(text != without_surrogates(text) for text in texts):
        return [f"{name}: holds a lone surrogate, which is not text; write it again in UTF-8"]
    if repeated := [text for text in texts if texts.count(text) > 1]:
        return [f"{name}: {shown(repeated[0])} stands in it twice, and would be paid for twice"]
    if f'"{{{name}}}"' in template["request"]["prompt"] and '"' in value:
        return [f'{name}: stands in quotes already; leave the " out, or write “ and ” where they shall be drawn']
    return []


def fill(template: Mapping[str, Any], values: Any) -> list[dict[str, Any]]:
    """The requests that a template becomes with these values: one, or a row for each item.

    Raises:
        Failure: invalid_request, with every problem of the values.
    """
    if not isinstance(values, dict):
        raise Failure("invalid_request", f"values: must be a JSON object, got {json_kind(values)}")
    fields = template["fields"]
    problems = [f"{name}: missing ({rule['description']})" for name, rule in fields.items() if name not in values]
    for name, value in values.items():
        if name not in fields:
            problems.append(f"{shown(name)}: unknown field; known are {', '.join(fields)}")
        else:
            problems += value_sentences(name, value, template)
    if problems:
        hint = "mend the values; fill_template.py --list shows every field with an example"
        raise Failure("invalid_request", "; ".join(problems), problems=problems, hint=hint)
    each = template.get("each")
    items = [{"number": f"{number:02}", each: item} for number, item in enumerate(values[each], 1)] if each else [{}]
    return [{name: filled(text, values | item) for name, text in template["request"].items()} for item in items]


def filled(value: str, known: Mapping[str, Any]) -> Any:
    """A field of the request with the values in it; one that is nothing but a placeholder keeps the value's type."""
    if whole := PLACEHOLDER.fullmatch(value):
        return known[whole[1]]
    return PLACEHOLDER.sub(lambda hole: str(known[hole[1]]), value)


def build_parser() -> Parser:
    what = "Fill a template; print the request as JSON, or the rows of a batch as JSON lines. Sends nothing."
    parser = Parser("fill_template.py", what)
    parser.add_argument("template", nargs="?", metavar="TEMPLATE", help="its name, as --list shows it")
    parser.add_argument("--file", metavar="PATH", help="the values: a JSON object in a file, - for standard input")
    parser.add_argument("--list", action="store_true", help="print every template with its fields and examples")
    return parser


def run(arguments: list[str], stop: Stop) -> str:
    """What the command prints.

    Raises:
        Failure: usage, file_unreadable, invalid_request.
    """
    options = build_parser().parse_args(arguments)
    templates = load_templates()
    if options.list:
        if options.template or options.file:
            raise Failure("usage", "--list: stands alone")
        listed = {name: described(template) for name, template in templates.items()}
        return json.dumps(listed, ensure_ascii=False, indent=2)
    if options.template not in templates:
        given = "no template named" if options.template is None else f"no template {shown(options.template)}"
        raise Failure("usage", f"{given}; there are {', '.join(templates)}", hint="name one of them")
    if options.file is None:
        raise Failure("usage", "--file: required: the values as a JSON object")
    name = user_path("--file", options.file)
    content = read_input("--file", name, MAX_REQUEST_BYTES, Stop(DEFAULT_TIMEOUT, stop))
    values = decode_json_file(name, content)
    template = templates[options.template]
    rows = fill(template, values)
    if "each" not in template:
        return json.dumps(rows[0], ensure_ascii=False, indent=2)
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


def main(stop: Stop) -> int:
    """Exit 0 with the result on stdout, else the error and its advice on stderr. Signals end `stop`."""
    WATCHER.listen(stop)
    console = Console(json_mode=False)
    return carry_out(lambda: console.answer(run(sys.argv[1:], stop)), console, os.environ)


if __name__ == "__main__":
    _stop = Stop()
    leave(main(_stop), _stop)
