"""What a batch leaves for programs and for people: results.jsonl, the page, and its thumbnails."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import shlex
import signal
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from batch_helpers import PRICE, SMALL_PNG, Batch, Gate, by_prompt
from conftest import Shell
from fault_server import GENERATE, PICTURE, Answer, Behaviour, FaultServer, error, file, good, noise_png, png

LOST = good(how=Answer(hang_up="after-reading"))
BLOCKED = error(400, "DataInspectionFailed", "this was <b>refused</b>")
HOSTILE = [
    "</script><img src=x onerror=alert(1)>",
    "<!-- <script>",
    "]]><svg onload=alert(1)>",
    '"><iframe src="https://example.com">',
    "'; alert(1); '",
    "{{constructor.constructor('alert(1)')()}} ${alert(1)} `",
    "&lt;script&gt; &amp; &#60;",
    "line\u2028separator\u2029 and \x00 and \ufeff and \u202eturned",
    "__BATCH_DATA__ __SCRIPT_HASH__ \\1 \\g<0>",
]


@pytest.fixture
def batch(shell: Shell, service: FaultServer) -> Batch:
    return Batch(shell, service)


class Page(HTMLParser):
    """What a browser would make of the page: its elements with their attributes, and the text of its scripts."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.text = text
        self._in_script = False
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        self._in_script = tag == "script"
        if self._in_script:
            self.scripts.append((dict(attrs), ""))

    def handle_endtag(self, tag: str) -> None:
        self._in_script = False

    def handle_data(self, data: str) -> None:
        if self._in_script:
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)

    @property
    def data_text(self) -> str:
        (text,) = (text for attributes, text in self.scripts if "json" in (attributes.get("type") or ""))
        return text

    @property
    def data(self) -> dict[str, Any]:
        value = json.loads(self.data_text)
        assert isinstance(value, dict)
        return value

    @property
    def policy(self) -> str:
        (policy,) = (
            attributes["content"]
            for tag, attributes in self.elements
            if tag == "meta" and (attributes.get("http-equiv") or "").lower() == "content-security-policy"
        )
        return policy or ""


def page_of(batch: Batch) -> Page:
    return Page((batch.out / "index.html").read_text(encoding="utf-8"))


def mixed(batch: Batch) -> None:
    """A picture in every state that the end of a run can leave."""
    batch.service.play("/img/missing.png", error(404, "NoSuchKey"))
    batch.service.play(GENERATE, by_prompt({"failed": BLOCKED, "unknown": LOST, "generated": good("/img/missing.png")}))
    batch.rows("saved", "failed", "unknown", "generated", "pending")
    batch.run("--concurrency", "1", "--limit", "4")


# ---------------------------------------------------------------------------------------------------------------------
# results.jsonl
# ---------------------------------------------------------------------------------------------------------------------


@pytest.mark.smoke
def test_every_picture_has_its_line_whatever_became_of_it(batch: Batch) -> None:
    mixed(batch)
    entries = batch.results()
    assert [(entry["prompt"], entry["state"]) for entry in entries] == [
        (state, state) for state in ("saved", "failed", "unknown", "generated", "pending")
    ]
    saved, failed, unknown, generated, pending = entries
    assert Path(saved["image_path"]).read_bytes() == SMALL_PNG
    assert saved["sha256"] == hashlib.sha256(SMALL_PNG).hexdigest()
    assert (saved["width"], saved["height"], saved["size"]) == (512, 512, "512*512")
    assert saved["estimated_cost"] == PRICE and "error" not in saved
    assert failed["error"]["message"] and unknown["error"]["message"]
    assert failed["estimated_cost"] == 0 and unknown["estimated_cost"] == PRICE == generated["estimated_cost"]
    assert pending["estimated_cost"] == 0
    assert [entry["line"] for entry in entries] == [1, 2, 3, 4, 5]
    assert all(isinstance(entry["seed"], int) for entry in entries)
    assert all("image_path" not in entry for entry in entries[1:])
    assert all(Path(entry["evidence_path"]).is_file() for entry in (saved, failed, unknown))


def test_lines_are_in_the_order_of_the_input(batch: Batch) -> None:
    prompts = [f"p{number}" for number in (3, 1, 2, 0, 4)]
    batch.service.play(GENERATE, by_prompt({"p3": good(how=Answer(delay_s=0.3))}))
    batch.rows(*prompts)
    assert batch.run("--variants", "2").code == 0
    assert [entry["prompt"] for entry in batch.results()] == [prompt for prompt in prompts for _ in range(2)]
    assert [entry["variant"] for entry in batch.results()] == [0, 1] * 5
    batch.rows(*prompts[::-1])
    assert batch.run("--variants", "2").code == 0
    assert [entry["prompt"] for entry in batch.results()] == [prompt for prompt in prompts[::-1] for _ in range(2)]


@pytest.mark.parametrize("ending", ["stopped", "storm", "interrupted", "time", "cost"])
def test_the_results_are_written_at_every_end(batch: Batch, ending: str) -> None:
    batch.prompts(8)
    assert batch.run("--limit", "1").code == 1
    (batch.out / "results.jsonl").unlink()
    (batch.out / "index.html").unlink()
    gate = Gate()
    answers: dict[str, Behaviour] = {
        "stopped": error(401, "InvalidApiKey"),
        "storm": LOST,
        "interrupted": gate,
        "time": good(),
        "cost": good(),
    }
    batch.service.play(GENERATE, answers[ending])
    options = {"time": ("--time-limit", "2", "--rpm", "1"), "cost": ("--max-cost", "0.02")}.get(ending, ())
    process = batch.start("--concurrency", "1", *options)
    if ending == "interrupted":
        batch.service.wait_until(lambda: gate.arrived)
        process.send_signal(signal.SIGINT)
        gate.open()
    result = batch.finish(process)
    assert result.code == {"stopped": 3, "storm": 7, "interrupted": 130, "time": 11, "cost": 1}[ending], result.stdout
    entries = batch.results()
    assert [entry["prompt"] for entry in entries] == [f"picture {number}" for number in range(8)]
    assert sum(entry["state"] == "saved" for entry in entries) == result.json["saved"]
    assert len(page_of(batch).data["pictures"]) == 8


def test_prompts_stand_in_the_results_as_they_were_given(batch: Batch) -> None:
    prompts = [prompt for prompt in HOSTILE if "\x00" not in prompt] + ["雪\n🦊\r\n\u2028\u0085end"]
    batch.rows(*prompts)
    assert batch.run().code == 0
    assert [entry["prompt"] for entry in batch.results()] == prompts


def test_rewritten_prompts_are_kept(batch: Batch) -> None:
    link = batch.service.root + PICTURE
    rewritten = good(content=[{"image": link}, {"text": "a better <fox>"}], reasoning_content="thought")
    batch.service.play(GENERATE, rewritten)
    batch.rows({"prompt": "a fox", "prompt_extend": True})
    assert batch.run().code == 0
    (entry,) = batch.results()
    assert (entry["rewritten_prompt"], entry["estimated_cost"]) == ("a better <fox>", pytest.approx(2 * PRICE))
    (shown,) = page_of(batch).data["pictures"]
    assert shown["rewritten_prompt"] == "a better <fox>"


# ---------------------------------------------------------------------------------------------------------------------
# The page
# ---------------------------------------------------------------------------------------------------------------------


def test_the_page_holds_all_that_it_shows(batch: Batch) -> None:
    mixed(batch)
    page = page_of(batch)
    data = page.data
    assert [picture["prompt"] for picture in data["pictures"]] == [entry["prompt"] for entry in batch.results()]
    saved, failed, unknown, *_ = data["pictures"]
    result = batch.results()[0]
    assert (saved["seed"], saved["size"], saved["cost"]) == (result["seed"], "512*512", PRICE)
    assert (batch.out / saved["image"]).read_bytes() == SMALL_PNG
    assert (batch.out / saved["thumb"]).is_file()
    for picture in (failed, unknown):
        assert picture["error"]["message"]
        assert "image" not in picture and "thumb" not in picture


def test_the_page_needs_no_network(batch: Batch) -> None:
    batch.rows("a")
    assert batch.run().code == 0
    page = page_of(batch)
    for tag, attributes in page.elements:
        for name in ("src", "href", "srcset", "action", "data", "poster"):
            value = attributes.get(name) or ""
            assert not re.match(r"(?i)\s*(https?:|//|ftp:|wss?:)", value), (tag, name, value)
    style_and_script = re.sub(r"http://www\.w3\.org/[\w/.]+", "", page.text.replace(page.data_text, ""))
    assert re.findall(r"(?i)(?:https?:)?//[a-z0-9-]+\.[a-z]{2,}[^\s'\"]*", style_and_script) == []
    assert not re.search(r"@import|\bfetch\(|XMLHttpRequest|WebSocket|sendBeacon", style_and_script)
    assert not [tag for tag, attributes in page.elements if tag == "script" and "src" in attributes]
    assert batch.service.root not in page.text, "the signed link has no business in a page that is passed on"


def test_the_policy_lets_only_the_pages_own_script_run(batch: Batch) -> None:
    batch.rows("a")
    assert batch.run().code == 0
    page = page_of(batch)
    rules = dict(part.strip().partition(" ")[::2] for part in page.policy.split(";") if part.strip())
    assert rules["default-src"] == "'none'"
    script = rules["script-src"]
    assert "unsafe" not in script and "*" not in script
    own = [text for attributes, text in page.scripts if "json" not in (attributes.get("type") or "")]
    hashes = {f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in own}
    assert hashes and hashes == set(script.split())
    assert not re.search(r"https?:", page.policy)
    assert [name for _, attributes in page.elements for name in attributes if name.startswith("on")] == []


def test_hostile_texts_change_nothing_but_the_texts(batch: Batch) -> None:
    """The page of hostile texts has the same elements as that of harmless ones, and all its data."""
    answers = {prompt: error(400, "InvalidParameter", prompt) for prompt in HOSTILE[:2]}
    ids = [f"{number} {prompt}"[:150].strip() for number, prompt in enumerate(HOSTILE)]
    clean = [re.sub(r"[\x00-\x1f\u2028\u2029\ufeff\u202e]", "", name) for name in ids]
    batch.service.play(GENERATE, by_prompt(answers))
    batch.rows(*({"prompt": prompt, "id": name} for prompt, name in zip(HOSTILE, clean, strict=True)))
    batch.out = batch.shell.folder / "<img src=x onerror=alert(1)>"
    result = batch.run()
    assert result.code == 1, result.stdout
    hostile = page_of(batch)
    assert "<" not in hostile.data_text
    assert [picture["prompt"] for picture in hostile.data["pictures"]] == HOSTILE
    batch.service.play(GENERATE, good())
    batch.out = batch.shell.folder / "harmless"
    batch.prompts(len(HOSTILE))
    assert batch.run().code == 0
    harmless = page_of(batch)
    assert hostile.elements == harmless.elements
    assert [text for _, text in hostile.scripts][1:] == [text for _, text in harmless.scripts][1:]


def test_the_data_is_valid_json_with_any_text(batch: Batch) -> None:
    batch.rows(*HOSTILE)
    assert batch.run().code == 0
    assert [picture["prompt"] for picture in page_of(batch).data["pictures"]] == HOSTILE
    assert "\u2028" not in page_of(batch).text


def test_the_command_that_makes_a_picture_again_works_and_holds_no_prompt(batch: Batch) -> None:
    batch.out = batch.shell.folder / "it's a $(touch pwned) `folder`"
    batch.rows({"prompt": "$(touch pwned); 'x'", "seed": 9})
    assert batch.run().code == 0
    (picture,) = page_of(batch).data["pictures"]
    texts = [value for value in picture.values() if isinstance(value, str) and "--replay" in value]
    assert len(texts) == 1
    words = shlex.split(texts[0])
    assert words[-2:] == ["--replay", str(batch.out / picture["evidence"])]
    done = subprocess.run(
        ["sh", "-c", texts[0]],
        cwd=batch.shell.folder,
        env=batch.shell.environment(),
        capture_output=True,
        timeout=20,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list(batch.shell.folder.rglob("pwned"))
    first, second = batch.service.posts
    assert json.loads(first.body) == json.loads(second.body)


def test_a_page_is_replaced_at_every_end(batch: Batch) -> None:
    batch.rows("a")
    assert batch.run().code == 0
    batch.rows("a", "b")
    assert batch.run().code == 0
    assert [picture["prompt"] for picture in page_of(batch).data["pictures"]] == ["a", "b"]
    assert [path.name for path in batch.out.iterdir() if path.name.startswith(".")] in ([], [".gitignore"])


# ---------------------------------------------------------------------------------------------------------------------
# Thumbnails
# ---------------------------------------------------------------------------------------------------------------------


def test_thumbnails_are_small_jpegs_in_the_shape_of_their_pictures(batch: Batch) -> None:
    batch.service.play("/img/wide.png", file(png(1280, 720)))
    batch.service.play("/img/noise.png", file(noise_png()))
    batch.service.play("/img/glass.png", file(glass()))
    batch.service.play(
        GENERATE,
        by_prompt({"wide": good("/img/wide.png"), "noise": good("/img/noise.png"), "glass": good("/img/glass.png")}),
    )
    rows = [{"prompt": "wide", "size": "1280*720"}, {"prompt": "noise", "size": "1024*1024"}, {"prompt": "glass"}]
    batch.rows(*rows, {"prompt": "web", "output": "a.webp"})
    assert batch.run().code == 0
    for picture in page_of(batch).data["pictures"]:
        content = (batch.out / picture["thumb"]).read_bytes()
        with Image.open(io.BytesIO(content)) as thumb, Image.open(batch.out / picture["image"]) as image:
            assert thumb.format == "JPEG"
            assert max(thumb.size) <= 640
            assert thumb.width / thumb.height == pytest.approx(image.width / image.height, rel=0.02)
        assert len(content) < 120_000
        assert picture["thumb"].startswith("thumbs/")


def glass() -> bytes:
    """A picture that one can see through."""
    target = io.BytesIO()
    Image.new("RGBA", (512, 512), (200, 30, 30, 90)).save(target, "PNG")
    return target.getvalue()


def test_thumbnails_that_are_missing_are_made_again(batch: Batch) -> None:
    batch.rows("a", "b")
    assert batch.run().code == 0
    thumbs = sorted(batch.out.glob("thumbs/**/*.jpg"))
    assert len(thumbs) == 2
    thumbs[0].unlink()
    assert batch.call("--gallery-only", str(batch.out)).code == 0
    assert sorted(batch.out.glob("thumbs/**/*.jpg")) == thumbs
    thumbs[1].unlink()
    assert batch.run().code == 0
    assert sorted(batch.out.glob("thumbs/**/*.jpg")) == thumbs
    assert len(batch.sent) == 2


def test_a_thumbnail_shows_the_picture_that_replaced_another(batch: Batch) -> None:
    batch.service.play("/img/red.png", file(png(512, 512, "red")))
    batch.service.play(GENERATE, by_prompt({"red": good("/img/red.png")}))
    batch.rows({"prompt": "teal", "id": "one", "output": "one.png"})
    assert batch.run().code == 0
    batch.rows({"prompt": "red", "id": "one", "output": "one.png"})
    assert batch.run("--accept-changes").code == 0
    pictures = {picture["prompt"]: picture for picture in page_of(batch).data["pictures"]}
    for prompt, colour in (("red", (255, 0, 0)), ("teal", (0, 128, 128))):
        with Image.open(batch.out / pictures[prompt]["thumb"]) as thumb:
            pixel = thumb.convert("RGB").getpixel((20, 20))
            assert isinstance(pixel, tuple)
            assert all(abs(seen - meant) < 40 for seen, meant in zip(pixel, colour, strict=True)), (prompt, pixel)
