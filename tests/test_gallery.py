"""The gallery as people see it: a real batch against the mock service, its page opened from the disk in Chromium."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import SCRIPTS, Shell, cannot
from mock_server import MockServer

HAVE_SELENIUM = importlib.util.find_spec("selenium") is not None
if HAVE_SELENIUM:  # `make check` does without, and only collects these tests
    from selenium import webdriver
    from selenium.common.exceptions import StaleElementReferenceException
    from selenium.webdriver.chrome.service import Service
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.by import By
    from selenium.webdriver.common.keys import Keys

FLAGS = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--window-size=1280,900",
]
HOSTILE = [
    "</script><img src=x onerror=\"document.title='run'\"><b>fox</b>",
    "\"><svg onload=\"document.title='run'\"> 'quoted' & <!-- fox",
    "javascript:document.title='run'",
    "a fox \u202e reversed \u2028 line separators \u2029 and \\u003c backslashes",
    "狐狸在雪地里,写着“早安”的招牌",
    "x" * 300 + " " + "long " * 400,
]
Page = Callable[[Path], "webdriver.Chrome"]


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[webdriver.Chrome]:
    """A headless Chromium, one for all tests of this file; `make browser` installs Debian's packages where it may."""
    if not HAVE_SELENIUM:
        cannot("drive a browser: `make browser` installs selenium")
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if program is None or driver is None:
        cannot("find Chromium with chromedriver (Debian: chromium chromium-driver)")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for flag in [*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    chrome = webdriver.Chrome(options, Service(driver))
    yield chrome
    chrome.quit()


@pytest.fixture
def page(browser: webdriver.Chrome) -> Iterator[Page]:
    """Opens a folder's gallery; at the end nothing may have been complained about in the console."""

    def open_gallery(folder: Path) -> webdriver.Chrome:
        browser.get("about:blank")
        browser.get((folder / "index.html").as_uri())
        wait_until(lambda: browser.find_elements(By.CSS_SELECTOR, ".card"))
        return browser

    log: Any = browser.get_log  # selenium gives it no types
    log("browser")
    yield open_gallery
    complaints = [entry["message"] for entry in log("browser")]
    assert complaints == []


def wait_until(condition: Callable[[], Any], seconds: float = 10) -> Any:
    """The first truthy value of the condition; a page that is just being drawn anew is looked at again."""
    until = time.monotonic() + seconds
    while True:
        with contextlib.suppress(StaleElementReferenceException):
            if result := condition():
                return result
        assert time.monotonic() < until, "it did not come to pass"
        time.sleep(0.02)


@pytest.fixture(scope="module")
def batch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of a batch of hostile prompts: all saved, but one that the service refuses and one unknown."""
    base = tmp_path_factory.mktemp("gallery")
    shell = Shell(base, base, script=SCRIPTS / "generate_batch.py")
    rows = [{"prompt": prompt, "size": "512*512", "seed": 10 + n} for n, prompt in enumerate(HOSTILE)]
    rows += [{"prompt": "a plain cat", "id": "cat", "aspect_ratio": "16:9", "output": "odd names/cat #1?100%.png"}]
    rows += [{"prompt": "refused", "size": "512*512"}, {"prompt": "lost", "size": "512*512"}]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (base / "rows.jsonl").write_text(text, encoding="utf-8")
    with MockServer(rpm=0, faults="ok*7,blocked,hangup-after") as mock:
        shell.use(mock)
        done = shell.run("--input", "rows.jsonl", "--output-dir", "out", "--rpm", "0", "--concurrency", "1")
    assert done.code == 1, done.stderr
    yield base / "out"


def cards(browser: webdriver.Chrome) -> list[Any]:
    return [card for card in browser.find_elements(By.CSS_SELECTOR, ".card") if card.is_displayed()]


def test_every_picture_has_a_card_and_its_thumbnail_loads_from_the_disk(page: Page, batch: Path) -> None:
    browser = page(batch)
    assert len(cards(browser)) == 9
    states = [card.get_attribute("data-state") for card in cards(browser)]
    assert states == ["saved"] * 7 + ["failed", "unknown"]
    script = "return [...document.querySelectorAll('.card img')].filter(i => i.complete && i.naturalWidth > 0).length"
    wait_until(lambda: browser.execute_script(script) == 7)


def test_nothing_in_a_prompt_runs_or_becomes_markup(page: Page, batch: Path) -> None:
    browser = page(batch)
    assert browser.title != "run"
    shown = [card.text for card in cards(browser)]
    for prompt in HOSTILE[:3]:
        assert any(prompt in text for text in shown), prompt
    for card in cards(browser):
        assert card.find_elements(By.CSS_SELECTOR, "script, b, svg[onload], img[onerror]") == []


def test_the_page_asks_for_nothing_but_its_own_files(page: Page, batch: Path) -> None:
    browser = page(batch)
    names = "return performance.getEntriesByType('resource').map(entry => entry.name)"
    for name in browser.execute_script(names):
        assert name.startswith((batch / "thumbs").as_uri()) or name.startswith(batch.as_uri()), name
    content = (batch / "index.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in content


def test_search_filters_by_every_word_and_says_how_many_are_left(page: Page, batch: Path) -> None:
    browser = page(batch)
    browser.find_element(By.ID, "search").send_keys("PLAIN cat")
    wait_until(lambda: len(cards(browser)) == 1)
    assert "a plain cat" in cards(browser)[0].text
    wait_until(lambda: "1" in browser.find_element(By.ID, "count").text)
    browser.find_element(By.ID, "search").clear()
    browser.find_element(By.ID, "search").send_keys("nothing is called so")
    wait_until(lambda: browser.find_element(By.ID, "empty").is_displayed())


def test_states_can_be_filtered(page: Page, batch: Path) -> None:
    browser = page(batch)
    chips = browser.find_elements(By.CSS_SELECTOR, "#states label, #states button")
    next(chip for chip in chips if "failed" in chip.text.lower()).click()
    wait_until(lambda: {card.get_attribute("data-state") for card in cards(browser)} == {"failed"})


def test_the_large_view_is_worked_by_keyboard_and_gives_the_focus_back(page: Page, batch: Path) -> None:
    browser = page(batch)
    wait_until(lambda: len(cards(browser)) == 9)
    first = cards(browser)[0]
    target = first if first.tag_name in ("button", "a") else first.find_element(By.CSS_SELECTOR, "button, a")
    target.send_keys(Keys.ENTER)
    viewer = browser.find_element(By.ID, "viewer")
    wait_until(viewer.is_displayed)
    wait_until(lambda: HOSTILE[0] in viewer.text)
    ActionChains(browser).send_keys(Keys.ARROW_RIGHT).perform()
    wait_until(lambda: HOSTILE[1] in viewer.text)
    assert "11" in viewer.text, "the seed"
    ActionChains(browser).send_keys(Keys.END).perform()
    wait_until(lambda: "outcome_unknown" in viewer.text)
    ActionChains(browser).send_keys(Keys.HOME).perform()
    wait_until(lambda: HOSTILE[0] in viewer.text)
    ActionChains(browser).send_keys(Keys.ESCAPE).perform()
    wait_until(lambda: not viewer.is_displayed())
    focused = browser.switch_to.active_element
    assert focused == target or focused.find_elements(By.XPATH, "ancestor-or-self::*[@data-number='0']")


def test_a_picture_with_an_odd_name_opens_in_full(page: Page, batch: Path) -> None:
    browser = page(batch)
    browser.find_element(By.ID, "search").send_keys("plain cat")
    wait_until(lambda: len(cards(browser)) == 1)
    opened = (
        "const c = document.querySelector('.card'); (c.matches('a, button') ? c : c.querySelector('a, button')).click()"
    )
    browser.execute_script(opened)
    full = "return [...document.querySelectorAll('#stage img')].some(i => i.complete && i.naturalWidth === 1280)"
    wait_until(lambda: browser.execute_script(full))


def test_the_copied_command_makes_the_picture_again(page: Page, batch: Path) -> None:
    """The page offers a command with the evidence, never with the prompt in it."""
    data = (batch / "index.html").read_text(encoding="utf-8")
    inline = json.loads(data.split('id="batch-data">')[1].split("</script>")[0])
    for picture in inline["pictures"]:
        assert "--replay" in picture["replay"]
        assert str(batch / picture["evidence"]) in picture["replay"]
        assert picture["prompt"][:20] not in picture["replay"]


def test_thousands_open_quickly_and_scroll_to_the_end(page: Page, batch: Path, tmp_path: Path) -> None:
    """5,000 pictures in under three seconds on a quiet machine (`make bench` measures); here only that they come."""
    content = (batch / "index.html").read_text(encoding="utf-8")
    before, rest = content.split('id="batch-data">')
    inline, after = rest.split("</script>", 1)
    data = json.loads(inline)
    pictures = [data["pictures"][0] | {"number": n, "prompt": f"picture {n}"} for n in range(5000)]
    text = json.dumps(data | {"total": 5000, "saved": 5000, "pictures": pictures}).replace("<", "\\u003c")
    shutil.copytree(batch / "thumbs", tmp_path / "thumbs")
    (tmp_path / "index.html").write_text(f'{before}id="batch-data">{text}</script>{after}', encoding="utf-8")
    browser = page(tmp_path)
    wait_until(lambda: len(browser.find_elements(By.CSS_SELECTOR, ".card")) == 5000, 30)
    browser.execute_script("window.scrollTo(0, document.documentElement.scrollHeight)")
    last = browser.find_elements(By.CSS_SELECTOR, ".card")[-1]
    wait_until(lambda: last.is_displayed() and "picture 4999" in last.text)
