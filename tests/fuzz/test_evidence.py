"""Evidence files: of any state, by this version or an earlier one, as they are or changed by whoever handed them on."""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import strategies as st

from fuzz.conftest import cases
from fuzz.place import Place
from fuzz.promises import assert_failure
from fuzz.services import GOOD, LINK, PICTURE_ANSWER, SMALL, TASK, Service, pictures, said
from fuzz.strategies import as_body, changed, changed_bytes, json_values, scalars, texts
from restored import FIXTURES, fixture_names
from zimage.calls import HttpAnswer
from zimage.contract import EVIDENCE_SCHEMA, STATUSES
from zimage.errors import Failure
from zimage.evidence import Evidence
from zimage.waiting import Stop

VALID = jsonschema.Draft202012Validator(EVIDENCE_SCHEMA)
NAME = "20261001T120000Z-0123abcd"
DONE = HttpAnswer(200, {}, as_body(GOOD["zimageturbo"]))
NAMES = [*fixture_names("dashscope"), *fixture_names("openai"), *fixture_names("zimageturbo")]
services = st.builds(
    lambda task, picture: Service((), task, picture),
    st.lists(said, min_size=1, max_size=2) | st.just([DONE]),
    st.lists(pictures, min_size=1, max_size=2) | st.just([PICTURE_ANSWER]),
)


@functools.cache
def fixture(name: str) -> str:
    """The evidence of a fixture as JSON; `{FOLDER}` stands for the project."""
    files = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))["files"]
    (content,) = (entry["json"] for path, entry in files.items() if "/evidence/" in path and "json" in entry)
    text = json.dumps(content).replace("{{FOLDER}}", "{FOLDER}").replace("{{SERVER}}", "http://127.0.0.1:9")
    return text.replace("{{EXPIRES_AT}}", "2099-01-01T00:00:00.000Z").replace("{{EXPIRES}}", "4070908800")


def in_place(place: Place, name: str) -> Any:
    return json.loads(fixture(name).replace("{FOLDER}", str(place.project)))


leaves = st.one_of(
    scalars,
    st.sampled_from(
        [*STATUSES, LINK, "http://127.0.0.1:9/x.png", "https://evil.example/x.png", "zimageturbo", "openai"]
    ),
    st.sampled_from(
        ["diffusers", "2099-01-01T00:00:00Z", "2000-01-01", "no", "yes", "unknown", TASK["task_id"], "x.png"]
    ),
)


def put(place: Place, content: bytes, held: bytes | None) -> Path:
    """An evidence file where it is expected, and the bytes that were handed over beside it."""
    place.clear()
    path = place.project / "output" / "alicloud-ai-image-zimage-turbo" / "evidence" / f"{NAME}.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    if held is not None:
        path.with_suffix(".picture").write_bytes(held)
    return path


def assert_recovers_or_says_why(place: Place, path: Path, service: Service) -> None:
    before = place.files()
    done = place.run("generate_image.py", "--recover", str(path), "--print-response", service=service)
    assert not service.paid, "a recovery never pays"
    after = place.files()
    if done.code == 0:
        image = Path(json.loads(done.out)["image_path"])
        assert image.is_file()
    else:
        assert done.error is not None
        # What was there is there: but for the evidence, and bytes of a picture that is saved.
        for name, content in before.items():
            assert after.get(name) == content or name == str(path.relative_to(place.folder)), name
    # What a recovery leaves can be read by the next one.
    if done.error is None or done.error["code"] != "invalid_evidence":
        VALID.validate(json.loads(path.read_bytes()))
        again = place.run("generate_image.py", "--recover", str(path), "--print-response", service=Service(()))
        assert again.error is None or again.error["code"] != "invalid_evidence"
        assert again.code == 0 or done.code != 0


@pytest.mark.parametrize("state", STATUSES)
@cases(
    8,
    250,
    name=st.sampled_from(NAMES),
    service=services,
    held=st.sampled_from([None, SMALL, b"", b"x"]),
    image=st.sampled_from(["", "good", "other"]),
)
def test_an_evidence_file_of_any_state_recovers_or_says_why(
    place: Place, state: str, name: str, service: Service, held: bytes | None, image: str
) -> None:
    """Whatever else it holds, and whatever lies beside it."""
    content = in_place(place, name) | {"status": state}
    path = put(place, as_body(content), held)
    if image and "image" in content:
        Path(content["image"]["path"]).parent.mkdir(parents=True, exist_ok=True)
        Path(content["image"]["path"]).write_bytes(SMALL)
        content["image"]["sha256"] = hashlib.sha256(SMALL if image == "good" else b"").hexdigest()
        path.write_bytes(as_body(content))
    assert_recovers_or_says_why(place, path, service)


@cases(40, 1_500, name=st.sampled_from(NAMES), data=st.data(), service=services, held=st.sampled_from([None, SMALL]))
def test_a_changed_evidence_file_recovers_or_says_why(
    place: Place, name: str, data: st.DataObject, service: Service, held: bytes | None
) -> None:
    """`output` alone stays: the picture goes where it says, and a test writes nowhere else."""
    content = data.draw(changed(in_place(place, name), leaves=leaves, keep=["output"]))
    assert_recovers_or_says_why(place, put(place, as_body(content), held), service)


@cases(25, 1_000, name=st.sampled_from(NAMES), data=st.data())
def test_an_evidence_file_of_any_bytes_is_read_or_refused(place: Place, name: str, data: st.DataObject) -> None:
    whole = json.dumps(in_place(place, name), indent=1).encode()
    path = put(
        place, data.draw(st.one_of(changed_bytes(whole), st.binary(max_size=60), json_values().map(as_body))), None
    )
    try:
        evidence = Evidence.load("--recover", str(path), Stop(5))
    except Failure as failure:
        assert failure.code == "invalid_evidence"
        assert_failure(failure)
        return
    assert VALID.is_valid(evidence.data)
    assert evidence.have.billed in ("no", "yes", "unknown")


@cases(
    25,
    1_000,
    name=st.sampled_from(NAMES),
    data=st.data(),
    more=st.lists(
        st.sampled_from(
            ["--seed=1", "--size=512x512", "--region=singapore", "--provider=openai", "--base-url=127.0.0.1"]
        ),
        max_size=1,
    ),
)
def test_a_changed_evidence_file_is_planned_again_or_refused(
    place: Place, name: str, data: st.DataObject, more: list[str]
) -> None:
    """Nothing is sent or written by a plan, and it leads the key to nobody new."""
    path = put(place, as_body(data.draw(changed(in_place(place, name), leaves=leaves))), None)
    before = place.files()
    done = place.run("generate_image.py", "--replay", str(path), "--dry-run", *more)
    assert place.files() == before
    assert not (done.service.paid or done.service.asked or done.service.fetched)


@cases(20, 500, output=texts, name=st.sampled_from(["dashscope-generated", "openai-generated-held"]))
def test_a_picture_is_recovered_only_to_a_possible_file(place: Place, output: str, name: str) -> None:
    content = in_place(place, name)
    content["output"] = f"{place.project}/{output.replace('..', '__')}.png"
    path = put(place, as_body(content), SMALL)
    assert_recovers_or_says_why(place, path, Service(()))
