"""How close does the batch come to a rate limit, how often is it refused, and does it settle under a lower one?

Run `python tests/benchmarks/batch_rate.py` (about nine minutes), or some cases with `--case 10 --case 20-true-10`. A
service in this process answers after a second, with a limit of R calls a second that holds in all the ways in which
services count: a bucket of a second's worth that refills steadily, R calls in any second, and 60 R in any minute. The
batch is a process; it is told the limit with --rpm 60 R, and at 2 a second nothing, for that is its own default. In
the cases named TOLD-true-R it is told more than the service lets through.

Printed are, between the first and the last call that was let through, the calls let through a second, as a share of
R; what share of all calls was refused with 429; and both again for the second half of that time, when the pace has
settled. Aims: at least 95% of R and at most 1% refused under a limit as told, and 95% of R in the second half under
a lower one. A measurement, not a test: a bad figure fails nothing. A picture that is missing or was paid twice does.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.common import (
    Call,
    Limit,
    Service,
    batch_command,
    fail,
    flats,
    run,
    table,
    working_folder,
    write_rows,
)

MOST_RUNS = 5  # of one case: a run that stops because of refusals is started again


class Case(NamedTuple):
    """A limit in calls a second, what the batch is told of it, and how many rows it is measured with."""

    limit: int
    told: int | None
    rows: int


CASES = {
    "2": Case(2, None, 130),
    "10": Case(10, 10, 500),
    "20": Case(20, 20, 1000),
    "20-true-10": Case(10, 20, 1000),
    "10-true-9": Case(9, 10, 700),
    "2-true-1": Case(1, None, 110),
}


class Figures(NamedTuple):
    """What one part of the time shows: calls let through a second as a share of the limit, share refused."""

    rate: float
    refused: float


def figures(calls: list[Call], limit: int, begin: float, end: float) -> Figures:
    """Of the time between two calls that were let through; the first of them begins it and does not count."""
    now = [call for call in calls if begin < call.arrived <= end]
    accepted = sum(call.billed for call in now)
    return Figures(accepted / (end - begin) / limit, 1 - accepted / len(now))


def measure(case: Case, latency_s: float, says_when: bool, parent: str | None) -> tuple[list[Call], int, float]:
    """All calls of a batch under a limit, the number of runs it took, and its seconds."""
    told = ("--rpm", str(60 * case.told)) if case.told else ()
    prompts = [f"picture {number}" for number in range(case.rows)]
    service = Service(flats(), latency_s=lambda: latency_s, limit=Limit(case.limit), says_when=says_when)
    with working_folder(parent) as folder, service:
        write_rows(folder / "rows.jsonl", ({"prompt": prompt, "size": "512*512"} for prompt in prompts))
        command = batch_command("--input", "rows.jsonl", "--output-dir", "out", "--quiet", *told)
        ended = run(command, service.environment(folder), folder)
        seconds, runs = ended.seconds, 1
        while ended.code == 6 and runs < MOST_RUNS:
            ended = run(command, service.environment(folder), folder)
            seconds, runs = seconds + ended.seconds, runs + 1
        if ended.code:
            fail(f"the batch ended with {ended.code}: {ended.stderr}")
        billed = service.billed()
        if sorted(billed) != sorted(prompts) or max(billed.values()) > 1:
            fail(f"{len(billed)} of {case.rows} prompts were billed, one of them {max(billed.values())} times")
        if ended.json["saved"] != case.rows:
            fail(f"the summary speaks of {ended.json['saved']} saved pictures of {case.rows}")
        return service.calls, runs, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=CASES, help="repeatable (default: all)")
    parser.add_argument("--rounds", type=int, default=1, help="measurements of each case")
    parser.add_argument("--latency", type=float, default=1.0, help="seconds before a picture is answered")
    parser.add_argument("--no-retry-after", action="store_true", help="429 without a word of how long to wait")
    parser.add_argument(
        "--scale", type=float, default=1.0, help="of the number of rows: for a quick look, or a long one"
    )
    parser.add_argument("--folder", help="where to work (default: the folder for temporary files)")
    arguments = parser.parse_args()
    rows: list[tuple[object, ...]] = []
    for name in arguments.case or CASES:
        case = CASES[name]._replace(rows=max(20, round(CASES[name].rows * arguments.scale)))
        for _ in range(arguments.rounds):
            calls, runs, seconds = measure(case, arguments.latency, not arguments.no_retry_after, arguments.folder)
            accepted = [call.arrived for call in calls if call.billed]
            first, last = accepted[0], accepted[-1]
            whole = figures(calls, case.limit, first, last)
            half = figures(calls, case.limit, (first + last) / 2, last)
            shares = (f"{share:.1%}" for share in (*whole, *half))
            told = case.told or "default"
            rows.append((name, case.limit, told, case.rows, f"{seconds:.0f} s", runs, *shares))
            print(f"{name}: {whole.rate:.1%} of the limit, {whole.refused:.1%} refused", file=sys.stderr, flush=True)
    header = ("case", "limit/s", "told/s", "rows", "took", "runs", "rate", "refused", "rate, 2nd half", "refused")
    table(header, rows)


if __name__ == "__main__":
    main()
