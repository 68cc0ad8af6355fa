"""Whole-process time of one picture: our script, the official client's library, and curl twice, side by side.

Run with `make bench`. All three ask the mock service of this repository for the same picture (about 1 MB, drawn
once and then kept by the mock), download it and save it; ours also validates, verifies and writes evidence. The
contestants take turns, so that a slow moment of the machine hits all of them; medians and ratios are printed.
A benchmark, not a test: nothing fails when a number is bad.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "skills/ai/image/alicloud-ai-image-zimage-turbo/scripts"
PROMPT, SIZE, SEED = "a fishing scene at dawn, cinematic, realistic", "1024*1024", 1234

OFFICIAL_CLIENT = """
import sys
import dashscope, requests
answer = dashscope.MultiModalConversation.call(
    model="z-image-turbo",
    messages=[{"role": "user", "content": [{"text": sys.argv[1]}]}],
    size=sys.argv[2], seed=int(sys.argv[3]), prompt_extend=False,
)
assert answer.status_code == 200, answer
link = answer.output.choices[0].message.content[0]["image"]
image = requests.get(link, timeout=60)
image.raise_for_status()
with open("official.png", "wb") as target:
    target.write(image.content)
"""

CURL = """
set -e
curl -sS "$ENDPOINT" -H "Authorization: Bearer $DASHSCOPE_API_KEY" -H 'Content-Type: application/json' \
  -d "$BODY" -o answer.json
link=$(sed -n 's/.*"image": *"\\([^"]*\\)".*/\\1/p' answer.json)
curl -sS "$link" -o curl.png
"""


def contestants() -> dict[str, list[str]]:
    ours = [sys.executable, str(SCRIPTS / "generate_image.py"), "--output", "ours.png", "--overwrite"]
    request = json.dumps({"prompt": PROMPT, "size": SIZE, "seed": SEED})
    return {
        "our script": [*ours, "--request", request, "--print-response"],
        "official client": [sys.executable, "-c", OFFICIAL_CLIENT, PROMPT, SIZE, str(SEED)],
        "curl twice": ["sh", "-c", CURL],
    }


def body() -> str:
    return json.dumps(
        {
            "model": "z-image-turbo",
            "input": {"messages": [{"role": "user", "content": [{"text": PROMPT}]}]},
            "parameters": {"size": SIZE, "seed": SEED, "prompt_extend": False},
        }
    )


def seconds(command: list[str], folder: str, env: dict[str, str]) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, check=False)
    elapsed = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"{command[0]} failed: {done.stderr.decode(errors='replace')}")
    return elapsed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=15, help="counted runs of each, after one that is not counted")
    runs = parser.parse_args().runs
    if not shutil.which("curl"):
        sys.exit("this benchmark needs curl")
    server = subprocess.Popen(
        [sys.executable, str(SCRIPTS / "mock_server.py"), "--rpm", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
    )
    try:
        assert server.stdout is not None
        mock = json.loads(server.stdout.readline())
        with tempfile.TemporaryDirectory() as folder:
            env = {
                "PATH": os.environ["PATH"],
                "HOME": folder,
                "DASHSCOPE_API_KEY": mock["api_key"],
                "DASHSCOPE_HTTP_BASE_URL": mock["base_url"],
                "ENDPOINT": mock["endpoint"],
                "BODY": body(),
            }
            times: dict[str, list[float]] = {name: [] for name in contestants()}
            for round_ in range(runs + 1):
                for name, command in contestants().items():
                    elapsed = seconds(command, folder, env)
                    if round_:
                        times[name].append(elapsed)
            size = Path(folder, "ours.png").stat().st_size
    finally:
        server.terminate()
        server.wait()
    print(f"one picture of {size / 1e6:.2f} MB, whole process, {runs} runs each, in turns")
    reference = statistics.median(times["official client"])
    print(f"{'':18}{'median':>9}{'min':>9}{'max':>9}   ratio to the official client")
    for name, values in times.items():
        median = statistics.median(values)
        print(f"{name:18}{median:8.3f}s{min(values):8.3f}s{max(values):8.3f}s   {median / reference:.2f}")
    ratios = [ours / other for ours, other in zip(times["our script"], times["official client"], strict=True)]
    print(f"our script / official client, turn by turn: median {statistics.median(ratios):.2f}")


if __name__ == "__main__":
    main()
