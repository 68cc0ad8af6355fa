"""The batch with very many rows, with very many saved pictures, and its gallery in a real browser.

Run `python tests/benchmarks/batch_scale.py` (some five minutes, most of them to make 20,000 small pictures), or parts
of it with `--part rows --part gallery`:

- rows: 200,000 rows with --dry-run, and a first start on them with --limit 20: seconds and peak memory of the process;
- gallery: `index.html` of 5,000 saved pictures, opened from the file system in headless Chromium (skipped where none
  is on the PATH): seconds from going to the page, in a running browser with a fresh profile, until all thumbnails
  in the window are drawn, and until all cards are there; then the longest frame while the page scrolls, and how long
  the thumbnails take where it stops;
- saved: the same command again in a folder with 20,000 saved pictures, which has nothing to do: seconds and memory.

The pictures come from a service in this process, flat and 512*512. A measurement, not a test: a bad figure fails
nothing. A count that is wrong does: of rows, of calls, of saved pictures, of cards in the page.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import select
import shutil
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    Ended,
    Service,
    batch_command,
    fail,
    flats,
    run,
    table,
    working_folder,
    write_rows,
)

PARTS = ("rows", "gallery", "saved")
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PATIENCE_S = 60.0  # for a page that does not come
LIMIT = 20


def rows(count: int) -> Iterator[dict[str, Any]]:
    for number in range(count):
        yield {"prompt": f"picture {number} of a catalogue, on white, soft light, no shadow", "size": "512*512"}


class Line(NamedTuple):
    """One line of the table."""

    what: str
    seconds: list[float]
    more: str

    def cells(self) -> tuple[str, ...]:
        several = f"{min(self.seconds):.2f} to {max(self.seconds):.2f}" if len(self.seconds) > 1 else ""
        return (self.what, f"{statistics.median(self.seconds):.2f} s", several, self.more)


def line(what: str, runs: list[Ended], more: str = "") -> Line:
    memory = f"{max(ended.peak_mb for ended in runs):.0f} MB at most"
    return Line(what, [ended.seconds for ended in runs], f"{memory}{more and ', '}{more}")


def expect(ended: Ended, code: int, **counts: int) -> Ended:
    """A run that ended with this code and these counts in its summary."""
    said = ended.json if ended.stdout else {}
    found = {name: said.get(name) for name in counts}
    if ended.code != code or found != counts:
        fail(f"a run ended with {ended.code} and {found}, not {code} and {counts}: {ended.stderr[-2000:]}")
    return ended


# ---------------------------------------------------------------------------------------------------------------------
# The parts
# ---------------------------------------------------------------------------------------------------------------------


def many_rows(count: int, rounds: int, service: Service, parent: str | None) -> list[Line]:
    with working_folder(parent) as folder:
        write_rows(folder / "rows.jsonl", rows(count))
        env = service.environment(folder)
        dry, started = [], []
        for number in range(rounds):
            common = ("--input", "rows.jsonl", "--output-dir", f"out{number}")
            ended = run(batch_command(*common, "--dry-run"), env, folder)
            dry.append(expect(ended, 0, rows=count, to_make=count))
            if (folder / f"out{number}").exists():
                fail("--dry-run made a folder")
            calls = len(service.calls)
            ended = run(batch_command(*common, "--limit", str(LIMIT), "--rpm", "0"), env, folder)
            started.append(expect(ended, 1, total=count, saved=LIMIT, pending=count - LIMIT))
            if len(service.calls) != calls + LIMIT:
                fail(f"--limit {LIMIT} sent {len(service.calls) - calls}")
        again = run(batch_command(*common, "--limit", "0", "--rpm", "0"), env, folder)
        expect(again, 1, saved=LIMIT, pending=count - LIMIT)
    return [
        line(f"{count:,} rows, --dry-run", dry),
        line(f"{count:,} rows, start with --limit {LIMIT}", started),
        line("the same command again, --limit 0", [again]),
    ]


def saved_pictures(
    counts: tuple[int, int], parts: list[str], rounds: int, service: Service, parent: str | None
) -> list[Line]:
    """A folder that grows to the first count for the gallery, then to the second for the restart."""
    lines = []
    with working_folder(parent) as folder:
        env = service.environment(folder)
        command = batch_command("--input", "rows.jsonl", "--output-dir", "out", "--rpm", "0")
        wanted = [count for part, count in zip(("gallery", "saved"), counts, strict=True) if part in parts]
        for count in wanted:
            write_rows(folder / "rows.jsonl", rows(count))
            calls = len(service.calls)
            made = expect(run(command, env, folder), 0, saved=count)
            sent = len(service.calls) - calls
            lines.append(line(f"make {sent:,} pictures of 512*512", [made], f"{sent / made.seconds:.0f} a second"))
            calls = len(service.calls)
            again = [expect(run(command, env, folder), 0, saved=count) for _ in range(rounds)]
            lines.append(line(f"the same command again, {count:,} saved", again))
            if len(service.calls) != calls:
                fail(f"a folder with {count} saved pictures sent {len(service.calls) - calls}")
            if count == counts[0] and "gallery" in parts:
                lines += gallery(folder / "out" / "index.html", count, rounds)
    return lines


def gallery(page: Path, count: int, rounds: int) -> list[Line]:
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        print(f"SKIPPED: no Chromium on the PATH (tried {', '.join(BROWSERS)}); the gallery is not measured")
        return []
    views = [look_at(page, count, browser) for _ in range(rounds)]
    return [
        Line(
            f"gallery of {count:,}: thumbnails in the window", [view.thumbs for view in views], f"{views[0].seen} seen"
        ),
        Line(f"gallery of {count:,}: all cards", [view.cards for view in views], f"{views[0].images:,} cards"),
        Line(
            "the same: frame while scrolling, longest",
            [view.longest for view in views],
            f"{views[0].median:.3f} s median",
        ),
        Line(
            "the same: thumbnails where it stops",
            [view.stopped for view in views],
            f"at {views[0].depth:.0%} of the page",
        ),
    ]


# ---------------------------------------------------------------------------------------------------------------------
# The browser
# ---------------------------------------------------------------------------------------------------------------------


class Browser:
    """Headless Chromium with a fresh profile, spoken to over its pipe (DevTools protocol, JSON that ends in a zero)."""

    FLAGS = (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-sync",
        "--remote-debugging-pipe",
        "--window-size=1280,900",
    )

    def __init__(self, program: str) -> None:
        self._profile = tempfile.TemporaryDirectory(prefix="chromium-", ignore_cleanup_errors=True)
        (child_in, self._to), (self._from, child_out) = os.pipe(), os.pipe()
        # Chromium reads from 3 and writes to 4; the originals must not be one of these.
        high_in, high_out = (fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10) for end in (child_in, child_out))
        nowhere = os.open(os.devnull, os.O_RDWR)
        moves = [(os.POSIX_SPAWN_DUP2, source, to) for source, to in ((nowhere, 0), (nowhere, 1), (nowhere, 2))]
        moves += [(os.POSIX_SPAWN_DUP2, high_in, 3), (os.POSIX_SPAWN_DUP2, high_out, 4)]
        arguments = [program, *self.FLAGS, f"--user-data-dir={self._profile.name}", "about:blank"]
        self._pid = os.posix_spawn(program, arguments, os.environ | {"HOME": self._profile.name}, file_actions=moves)
        for end in (child_in, child_out, high_in, high_out, nowhere):
            os.close(end)
        self._buffer = b""
        self._number = 0
        self._session: str | None = None

    def __enter__(self) -> Browser:
        try:
            target = self.call("Target.createTarget", url="about:blank")["targetId"]
            self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        os.close(self._to)  # the end of the pipe ends it
        os.close(self._from)
        until = time.monotonic() + 10
        while os.waitpid(self._pid, os.WNOHANG) == (0, 0):
            if time.monotonic() > until:
                os.kill(self._pid, signal.SIGKILL)
                os.waitpid(self._pid, 0)
                break
            time.sleep(0.02)
        self._profile.cleanup()

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """The result of a method of the protocol."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._number:
                if "error" in answer:
                    fail(f"the browser says to {method}: {answer['error']}")
                result = answer["result"]
                assert isinstance(result, dict)
                return result

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], PATIENCE_S)
            block = os.read(self._from, 1 << 20) if ready else b""
            if not block:
                fail("the browser does not answer")
            self._buffer += block
        message, _, self._buffer = self._buffer.partition(b"\0")
        value = json.loads(message)
        assert isinstance(value, dict)
        return value

    def value(self, expression: str) -> dict[str, Any]:
        """What an expression of JavaScript, or the promise that it is, comes to in the page."""
        result = self.call("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            fail(f"the page says: {result['exceptionDetails']}")
        value = result["result"]["value"]
        assert isinstance(value, dict)
        return value


LOOK = """(() => {
  const images = [...document.images];
  const seen = images.filter((image) => {
    const box = image.getBoundingClientRect();
    return box.width > 0 && box.bottom > 0 && box.top < innerHeight;
  });
  const drawn = seen.filter((image) => image.complete && image.naturalWidth > 0);
  return { address: location.href, images: images.length, seen: seen.length, drawn: drawn.length };
})()"""

SCROLL = """new Promise((done) => {
  const frames = [], height = document.documentElement.scrollHeight, steps = 120;
  let last = performance.now(), step = 0;
  function next(now) {
    frames.push(now - last);
    last = now;
    if (step++ < steps) { scrollTo(0, height * 0.8 * step / steps); requestAnimationFrame(next); }
    else done({ longest: Math.max(...frames), median: frames.sort((a, b) => a - b)[frames.length >> 1],
                depth: scrollY / height });
  }
  requestAnimationFrame(next);
})"""


class View(NamedTuple):
    """What was seen of a page, in seconds."""

    thumbs: float
    seen: int
    cards: float
    images: int
    longest: float
    median: float
    depth: float
    stopped: float


def look_at(page: Path, count: int, program: str) -> View:
    with Browser(program) as browser:
        start = time.perf_counter()
        browser.call("Page.navigate", url=page.as_uri())
        look = wait_for_thumbs(browser, page.as_uri(), start)
        thumbs, seen = time.perf_counter() - start, look["seen"]
        cards, images, quiet = time.perf_counter() - start, look["images"], 0
        while quiet < 20 and images < count:
            time.sleep(0.02)
            look = browser.value(LOOK)
            quiet += 1
            if look["images"] > images:
                cards, images, quiet = time.perf_counter() - start, look["images"], 0
        if images > count:
            fail(f"{images} pictures in the page of {count}")
        scrolled = browser.value(SCROLL)
        start = time.perf_counter()
        wait_for_thumbs(browser, page.as_uri(), start)
        stopped = time.perf_counter() - start
        frames = (scrolled["longest"] / 1000, scrolled["median"] / 1000, scrolled["depth"])
        return View(thumbs, seen, cards, images, *frames, stopped)


def wait_for_thumbs(browser: Browser, address: str, start: float) -> dict[str, Any]:
    """Look until every picture in the window is drawn."""
    while time.perf_counter() - start < PATIENCE_S:
        look = browser.value(LOOK)
        if look["address"] == address and look["drawn"] == look["seen"] > 0:
            return look
        time.sleep(0.005)
    fail(f"the gallery does not show its pictures within {PATIENCE_S:.0f} s: {look}")


# ---------------------------------------------------------------------------------------------------------------------
# The command line
# ---------------------------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--part", action="append", choices=PARTS, help="repeatable (default: all)")
    parser.add_argument("--rows", type=int, default=200_000, help="rows of the part of this name")
    parser.add_argument("--gallery", type=int, default=5_000, help="pictures in the gallery")
    parser.add_argument("--saved", type=int, default=20_000, help="saved pictures for the restart")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of what is quick")
    parser.add_argument("--folder", help="where to work (default: the folder for temporary files)")
    arguments = parser.parse_args()
    parts = arguments.part or list(PARTS)
    lines: list[Line] = []
    with Service(flats()) as service:
        if "rows" in parts:
            lines += many_rows(arguments.rows, arguments.rounds, service, arguments.folder)
        if {"gallery", "saved"} & set(parts):
            counts = (arguments.gallery, arguments.saved)
            lines += saved_pictures(counts, parts, arguments.rounds, service, arguments.folder)
    table(("", "median", "from to", ""), [each.cells() for each in lines])


if __name__ == "__main__":
    main()
