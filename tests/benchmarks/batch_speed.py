"""Pictures a second without a rate limit: our batch, and a thread pool around the official client's library.

Run `python tests/benchmarks/batch_speed.py` (some minutes). A service in this process, which costs little, hands out
photo-like pictures of about 1 MB (1024*1024, RGB). The contestants are processes, with as many requests out at once:

- ours: `generate_batch.py --rpm 0`, with everything it does (state on disk before and after each call, pictures
  verified and synced to disk, evidence, thumbnails, results, gallery);
- the pool that decodes: ThreadPoolExecutor, `dashscope.MultiModalConversation.call`, `requests.get(…).content`,
  Pillow's `load()`, and the bytes written to a file;
- the pool that does not decode: the same without Pillow, so that a broken picture would be taken for a good one.

They take turns in one run, so that a slow moment of the machine hits all of them. Printed are medians of the rounds
and ratios turn by turn; more than 1 means that ours is faster. Ours is measured as a whole process. For the pools
both are given: as a whole process, and without their start-up (imports), which is to our disadvantage. A measurement,
not a test: a bad figure fails nothing. A contestant that does not bring all pictures does.
"""

from __future__ import annotations

import argparse
import importlib.util
import io
import os
import random
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from benchmarks.common import Service, batch_command, fail, mark_of, run, table, working_folder, write_rows

SIDE = 1024
NOISE = 0.011  # of 1: makes files of 1.1 MB
OURS, DECODES, PLAIN = "our batch", "pool that decodes", "pool that does not"

OFFICIAL_POOL = """
import io, json, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
import dashscope, requests
from PIL import Image

rows = [json.loads(line) for line in open(sys.argv[1], encoding="utf-8")]
target, workers, decodes = Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4] == "decodes"
target.mkdir()

def make(number, row):
    answer = dashscope.MultiModalConversation.call(
        model="z-image-turbo",
        messages=[{"role": "user", "content": [{"text": row["prompt"]}]}],
        size=row["size"], seed=row["seed"], prompt_extend=False,
    )
    assert answer.status_code == 200, answer
    reply = requests.get(answer.output.choices[0].message.content[0]["image"], timeout=60)
    reply.raise_for_status()
    content = reply.content
    if decodes:
        Image.open(io.BytesIO(content)).load()
    (target / f"{number:05}.png").write_bytes(content)

start = time.perf_counter()
with ThreadPoolExecutor(workers) as pool:
    list(pool.map(make, range(len(rows)), rows))
print(time.perf_counter() - start)
"""


def photo(seed: int) -> bytes:
    """A PNG of about 1.1 MB: a soft image under the noise of a sensor, always the same for a seed."""
    chance = random.Random(seed)
    soft = Image.frombytes("RGB", (6, 6), chance.randbytes(3 * 6 * 6)).resize((SIDE, SIDE), Image.Resampling.BICUBIC)
    noise = Image.frombytes("RGB", (SIDE, SIDE), chance.randbytes(3 * SIDE * SIDE))
    target = io.BytesIO()
    Image.blend(soft, noise, NOISE).save(target, "PNG")
    return target.getvalue()


def commands(rows: Path, folder: Path, concurrency: int) -> dict[str, list[str]]:
    options = ["--rpm", "0", "--concurrency", str(concurrency), "--quiet"]
    pool = [sys.executable, "-c", OFFICIAL_POOL, str(rows)]
    return {
        OURS: batch_command("--input", rows, "--output-dir", folder / OURS, *options),
        DECODES: [*pool, str(folder / DECODES), str(concurrency), "decodes"],
        PLAIN: [*pool, str(folder / PLAIN), str(concurrency), "plain"],
    }


def check(folder: Path, prompts: list[str], service: Service) -> None:
    """All pictures are there, each that of its prompt, and none was paid twice."""
    files = sorted(folder.rglob("*.png"))
    if len(files) != len(prompts):
        fail(f"{folder.name}: {len(files)} pictures for {len(prompts)} rows")
    for path, prompt in zip(files, prompts, strict=True):
        if mark_of(prompt) not in path.read_bytes()[:200]:
            fail(f"{folder.name}: {path.name} is not the picture of its prompt")
    billed = service.billed()
    if any(billed[prompt] != 1 for prompt in prompts):
        fail(f"{folder.name}: not every prompt was billed once")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=7, help="counted turns of each, after one that is not counted")
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--latency", type=float, default=0.0, help="seconds before a picture is answered")
    parser.add_argument("--folder", help="where to work (default: the folder for temporary files)")
    arguments = parser.parse_args()
    if importlib.util.find_spec("dashscope") is None:
        sys.exit("this benchmark needs the official client's library: pip install dashscope")
    count = arguments.pictures
    photos = [photo(seed) for seed in range(8)]
    seconds: dict[str, list[float]] = {name: [] for name in (OURS, DECODES, PLAIN)}
    inside: dict[str, list[float]] = {name: [] for name in seconds}
    cpu: dict[str, list[float]] = {name: [] for name in seconds}
    served: dict[str, list[float]] = {name: [] for name in seconds}
    for round_ in range(arguments.rounds + 1):
        with working_folder(arguments.folder) as folder:
            prompts = [f"photo {number}" for number in range(count)]
            rows = [{"prompt": prompt, "size": f"{SIDE}*{SIDE}", "seed": n} for n, prompt in enumerate(prompts)]
            write_rows(folder / "rows.jsonl", iter(rows))
            for name, command in commands(folder / "rows.jsonl", folder, arguments.concurrency).items():
                with Service(photos, latency_s=lambda: arguments.latency) as service:
                    os.sync()
                    before = time.process_time()
                    ended = run(command, service.environment(folder), folder)
                    after = time.process_time()
                if ended.code:
                    fail(f"{name} ended with {ended.code}: {ended.stderr[-2000:]}")
                check(folder / name, prompts, service)
                if round_:
                    seconds[name].append(ended.seconds)
                    inside[name].append(ended.seconds if name == OURS else float(ended.stdout))
                    cpu[name].append(ended.cpu_s)
                    served[name].append(after - before)
    sizes = sum(map(len, photos)) / len(photos) / 1e6
    print(
        f"{count} pictures of {sizes:.2f} MB, {arguments.concurrency} at once, {arguments.rounds} rounds in turns, "
        f"{os.cpu_count()} cores; medians"
    )
    lines: list[tuple[object, ...]] = []
    for name in seconds:
        median = statistics.median(seconds[name])
        lines.append(
            (
                name,
                f"{count / median:.1f}",
                f"{median:.2f} s",
                f"{min(seconds[name]):.2f} s",
                f"{max(seconds[name]):.2f} s",
                f"{1000 * statistics.median(cpu[name]) / count:.1f} ms",
                f"{1000 * statistics.median(served[name]) / count:.1f} ms",
                *(f"{ratio(times[name], seconds[OURS]):.2f}" for times in (seconds, inside)),
            )
        )
    header = ("", "pictures/s", "median", "min", "max", "CPU each", "service", "ratio", "without start-up")
    table(header, lines)


def ratio(theirs: list[float], ours: list[float]) -> float:
    """How many times as fast ours is, turn by turn."""
    return statistics.median(their / our for their, our in zip(theirs, ours, strict=True))


if __name__ == "__main__":
    main()
