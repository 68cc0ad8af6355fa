"""Write docs/reliability.md from what the last long runs have counted.

    make check torture fuzz mutants
    .venv/bin/python tests/benchmarks/batch_kills.py --rows 5000 --kills 500
    .venv/bin/python tests/reliability.py

Each run leaves its counts below `output/` (`figures.py`); nothing is typed by hand. A run that is missing is an error:
a document with a hole would be read as one without faults.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DOCUMENT = ROOT / "docs" / "reliability.md"

sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "skills/ai/image/alicloud-ai-image-zimage-turbo/scripts")]

import figures

HEAD = """# Reliability: what was tried, and what came of it

Written by `tests/reliability.py` from the counts that the runs leave; each command repeats its figures. Everything runs
against servers on loopback that break on purpose.

| what | how much | command |
|---|---|---|
"""
PEERS = {
    "client": "the official client's library, as its documentation calls it",
    "pool": "a thread pool around it, three tries",
    "ours": "this skill, and what its own errors advise, free of charge",
}


def main() -> int:
    try:
        text = document(*map(figures.kept, ("searched", "fuzz", "torture", "torture_peers", "kills", "mutants")))
    except FileNotFoundError as error:
        print(f"no counts: {error.filename}; run what the first lines of this file name", file=sys.stderr)
        return 1
    DOCUMENT.parent.mkdir(exist_ok=True)
    DOCUMENT.write_text(text, encoding="utf-8")
    print(DOCUMENT.relative_to(ROOT))
    return 0


def document(
    searched: Mapping[str, Any],
    fuzz: Mapping[str, Any],
    torture: Mapping[str, Any],
    peers: Mapping[str, Mapping[str, int]],
    kills: Mapping[str, Any],
    mutants: Mapping[str, Any],
) -> str:
    return "".join([
        HEAD,
        *(f"| {what} | {how_much} | `{command}` |\n" for what, how_much, command in [
            fuzzed(fuzz), tortured(torture), *killed(torture, kills), *hostile(), leaks(searched), mutated(mutants),
        ]),
        "\n## Promises in the cells of `make torture`\n\n",
        table([("promise", "broken")], [(name.replace("_", " "), torture[name]) for name in PROMISES]),
        "\n## Others in the same cells\n\n",
        NOTE,
        table(
            [("", "cells", "paid", "saved", "wrong file", "paid again", "lost", "late")],
            [
                (PEERS[who], *(counts[name] for name in COLUMNS))
                for who, counts in peers.items()
            ],
        ),
        "\n## Mutants\n\n",
        "Small faults put into the rooms that hold money and trust: how many do the tests notice? "
        f"{sampled(mutants)}\n\n",
        table(
            [("room", "mutants", "judged", "killed", "survived", "explained", "score")],
            [
                (f"`{room}`", *(counts[name] for name in JUDGED), percent(counts))
                for room, counts in {**mutants["rooms"], "all": mutants["all"]}.items()
            ],
        ),
    ])  # fmt: skip


NOTE = """The cells of the default provider in which nothing is killed. Most breaks are for good, so a picture that
comes by an error's advice comes after the fault is gone; the others have no such step. *Paid again*: payments beyond
the first that nobody asked for. *Lost*: paid for, its link had arrived, and nothing on disk leads to it.

"""
JUDGED = ("mutants", "judged", "killed", "survived", "of_them_explained")
COLUMNS = ("cells", "paid", "saved", "wrong", "paid_twice", "lost", "late")
PROMISES = ("lost", "paid_twice", "leak", "hang", "traceback", "untrue", "image", "exit_code", "advice", "files")
Line = tuple[str, str, str]


def fuzzed(counts: Mapping[str, Any]) -> Line:
    how_much = f"{counts['cases']:,} cases of {len(counts['properties'])} properties, {len(counts['failed'])} failed"
    return "Properties of what reads something foreign", how_much, "make fuzz"


def tortured(counts: Mapping[str, Any]) -> Line:
    broken = sum(counts[name] for name in PROMISES)
    how_much = f"{counts['cells']:,} cells, {counts['commands']:,} commands, {broken} promises broken"
    return "The byte stream broken at each kind of position", how_much, "make torture"


def killed(torture: Mapping[str, Any], kills: Mapping[str, Any]) -> list[Line]:
    of_batches = (
        f"{kills['kills']} kills of a batch of {kills['rows']:,} rows, {kills['billed']:,} pictures paid: "
        f"{kills['paid_twice']} paid twice, {kills['lost']} lost"
    )
    command = f"tests/benchmarks/batch_kills.py --rows {kills['rows']} --kills {kills['kills']}"
    how_much = f"{torture['killed']} kills: {torture['paid_twice']} paid twice, {torture['lost']} lost"
    return [
        ("Killed where the byte stream breaks", how_much, "make torture"),
        ("Killed at random", of_batches, command),
    ]


def hostile() -> list[Line]:
    import test_hostile_folders
    import test_surroundings

    folders = len(test_hostile_folders.DATABASES) + len(test_hostile_folders.PLACES)
    around = len(test_surroundings.SURROUNDINGS)
    return [
        ("Folders of strangers", f"{folders} hostile folders, each under four commands", "make check"),
        ("Surroundings that fail", f"{around} of disk, machine, clock and interpreter", "make check-all"),
    ]


def leaks(counts: Mapping[str, Any]) -> Line:
    how_much = f"{counts['bytes'] / 1e9:.2f} GB in {counts['files']:,} files of {counts['runs']:,} runs, 0 keys"
    return "Output and files searched for keys", how_much, "make check"


def mutated(mutants: Mapping[str, Any]) -> Line:
    counts = mutants["all"]
    return "Mutants", f"{counts['judged']:,} judged, {percent(counts)} noticed or explained", "make mutants"


def sampled(mutants: Mapping[str, Any]) -> str:
    part = mutants["all"]["judged"] < mutants["all"]["mutants"]
    which = "A random part of them was tried, so the score is an estimate" if part else "All of them were tried"
    return f"{which}; only the quick tests were asked, so it is a lower bound." if mutants["stages"] else f"{which}."


def percent(counts: Mapping[str, Any]) -> str:
    return "–" if counts["score"] is None else f"{100 * counts['score']:.0f}%"


def table(head: list[tuple[str, ...]], rows: list[tuple[Any, ...]]) -> str:
    lines = [*head, tuple("---" for _ in head[0]), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


if __name__ == "__main__":
    sys.exit(main())
