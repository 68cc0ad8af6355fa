"""Templates: whatever the values are, a template becomes requests that are valid, or says what is wrong with them."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import strategies as st

import fill_template
from fuzz.conftest import cases
from fuzz.promises import assert_failure
from fuzz.strategies import changed, json_values, texts
from zimage.batch.rows import Row, checked_row
from zimage.errors import Failure
from zimage.request import normalize, request_problems

TEMPLATES = fill_template.load_templates()
EXAMPLES = {
    name: {field: rule["example"] for field, rule in template["fields"].items()} for name, template in TEMPLATES.items()
}
holes = st.sampled_from(["{number}", "{", "}", "{prompt}", "{{x}}", "{subject}", '"'])


@pytest.mark.parametrize("name", TEMPLATES)
@cases(30, 350, data=st.data())
def test_a_template_is_filled_with_anything_or_says_what_is_wrong(name: str, data: st.DataObject) -> None:
    values: Any = data.draw(changed(EXAMPLES[name], leaves=texts | holes) | json_values())
    template = TEMPLATES[name]
    try:
        found = fill_template.fill(template, values)
    except Failure as failure:
        assert failure.code == "invalid_request"
        assert_failure(failure)
        return
    assert len(found) == (len(values[template["each"]]) if "each" in template else 1)
    for number, made in enumerate(found, 1):
        if "each" in template:
            assert isinstance(checked_row(number, dict(made)), Row)
        else:
            assert request_problems(made) == []
            normalize(made)


@cases(60, 750, value=texts.filter(str.strip) | holes)
def test_what_stands_in_a_value_is_drawn_as_it_stands(value: str) -> None:
    """A hole in a value is none of the template's."""
    for template in TEMPLATES.values():
        known = dict.fromkeys(template["fields"], value) | {"number": "01"}
        for text in template["request"].values():
            filled = str(fill_template.filled(text, known))
            literal = fill_template.PLACEHOLDER.split(text)[::2]
            assert re.fullmatch("(.*)".join(map(re.escape, literal)), filled, re.DOTALL)
            assert filled.count(value) >= len(fill_template.PLACEHOLDER.findall(text.replace("{number}", "")))
