"""The plan of a batch in this process: what rows mean for a folder, what that costs, and what becomes of the folder."""

from __future__ import annotations

import contextlib
import itertools
import os
import sqlite3
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from batch_folder import BLANK, Folder
from zimage.batch import plan as room
from zimage.batch.contract import DATABASE
from zimage.batch.plan import Stage, Survey
from zimage.batch.quote import first_of
from zimage.contract import MAX_SEED
from zimage.errors import Failure
from zimage.provider import Price
from zimage.registry import provider_class
from zimage.request import ImageRequest
from zimage.waiting import Stop, Stopped

LOCAL = "http://127.0.0.1:9/v1"


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path / "out")


@pytest.fixture
def prices(monkeypatch: pytest.MonkeyPatch) -> dict[str, float]:
    """US$ for a picture by its prompt: 1, where it is not named."""
    table: dict[str, float] = {}

    def price(provider: Any, request: ImageRequest, region: str) -> Price:
        return Price(table.get(request.size, 1.0), "list price", "2026-01")

    monkeypatch.setattr(provider_class("dashscope"), "price", price)
    return table


def refused(folder: Folder, *rows: str | Mapping[str, Any], variants: int = 1) -> Failure:
    with pytest.raises(Failure) as caught:
        folder.stage(*rows, variants=variants)
    assert caught.value.code in ("invalid_rows", "invalid_output") and not folder.path.exists()
    return caught.value


def first(stage: Stage, limit: int, budget: float, *, with_changed: bool) -> tuple[int, float]:
    """Pictures and US$ of a run that sends at most `limit` for at most `budget`."""
    groups = first_of(stage, limit, budget, with_changed=with_changed)
    return sum(each.pictures for each in groups), round(sum(each.pictures * each.price for each in groups), 6)


def kinds(survey: Survey) -> dict[str, int]:
    return dict(survey.pictures)


# What is wrong with an input is told before anything is paid for or written ------------------------------------------


def test_an_input_without_rows_is_told(folder: Folder) -> None:
    failure = refused(folder)
    assert failure.message == "--input: has no rows" and "at least one prompt" in failure.fault.hint


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([{"prompt": ""}], "1 wrong row: line 1: prompt: must not be blank"),
        (
            ["a fox", {"prompt": ""}, {"size": "1"}],
            "2 wrong rows: line 2: prompt: must not be blank; line 3: prompt: required; "
            'line 3: size: must be width*height such as 1024*1024, got "1"',
        ),
        (
            [{"prompt": "a", "id": "x"}, {"prompt": "c", "id": "z"}, {"prompt": "b", "id": "z"}],
            '1 wrong row: line 3: id: "z" is that of line 2 too',
        ),
        (
            [{"prompt": "a", "output": name} for name in ("z.png", "A.png", "a.PNG")],
            "1 wrong row: line 3: output: a.PNG is that of line 2 too",
        ),
        (
            [{"prompt": "a", "output": "a.png"}, {"prompt": "b", "output": "a.png/b/c.png"}],
            "1 wrong row: line 2: output: its folder is a file of line 1",
        ),
        ([{"prompt": "a", "output": "../a.png"}, "b"], "1 wrong row: line 1: output: must be a path in the output "),
        ([{"prompt": "a", "output": "a/b.png"}, {"prompt": "b", "output": "a/c.png"}], ""),
    ],
    ids=["one", "two", "ids", "outputs", "a folder that is a file", "outside", "two in a folder"],
)
def test_all_wrong_rows_are_told_with_their_lines(folder: Folder, rows: list[Any], told: str) -> None:
    if told:
        failure = refused(folder, *rows)
        assert failure.message.startswith(told)
        texts = failure.fault.problems or []
        assert failure.message.endswith(": " + "; ".join(texts)) and failure.fault.problem_count is None
    else:
        assert folder.stage(*rows).count == len(rows)


@pytest.mark.parametrize("count", [50, 51, 60])
@pytest.mark.parametrize("kind", ["rows", "several a row", "rows and folders"])
def test_of_many_problems_the_first_fifty_are_told_and_all_are_counted(folder: Folder, count: int, kind: str) -> None:
    wrong: list[dict[str, Any]] = [{"prompt": ""}] * count
    if kind == "several a row":
        wrong = [{"prompt": "", "seed": -5}] * count
    if kind == "rows and folders":
        names = [name for number in range(count - 20) for name in (f"{number}.png", f"{number}.png/a.png")]
        wrong = wrong[:20] + [{"prompt": "a", "output": name} for name in names]
    failure = refused(folder, *wrong)
    assert len(failure.fault.problems or []) == 50
    if count == 50:
        assert failure.message.startswith("50 wrong rows: ") and failure.fault.problem_count is None
    else:
        assert failure.message.startswith(f"{count} wrong rows; the first 50 problems: line 1: ")
        assert failure.fault.problem_count == count


def test_variants_are_names_that_no_other_row_may_have(folder: Folder) -> None:
    rows = [{"prompt": "a", "output": "a.png"}, {"prompt": "b", "output": "a-2.png"}]
    assert "line 2: output: a-2.png is that of line 1 too" in refused(folder, *rows, variants=2).message
    assert folder.stage(*rows).count == 2


def test_what_the_provider_cannot_do_is_told(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out", "openai", url=LOCAL)
    assert refused(folder, "a", {"prompt": "b", "size": "520*520"}).message.startswith("1 wrong row: line 2: size: 520")


def test_a_folder_too_deep_for_the_names_of_its_pictures_is_refused(tmp_path: Path) -> None:
    """Only where the batch names pictures itself: 40 signs of a row's id may have three bytes each."""
    name = "n" * 200
    deep = tmp_path.joinpath(*[name] * 30)
    with pytest.raises(Failure) as caught:
        Folder(deep).stage("a fox")
    assert caught.value.code == "invalid_output" and "--output-dir" in caught.value.message
    shallow = Folder(tmp_path / "out")
    assert shallow.stage("a fox").count == 1


# What rows mean for a folder ------------------------------------------------------------------------------------------


def test_a_look_at_a_folder_that_is_not_there_makes_nothing(folder: Folder) -> None:
    survey = folder.survey(folder.stage("a", "b", variants=3), looks=True)
    assert (survey.rows, kinds(survey), survey.spent) == (2, {"new": 6}, 0.0)
    assert not folder.path.exists()


def test_a_look_at_a_folder_changes_no_byte(folder: Folder) -> None:
    folder.plan("a", "b")
    before = {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()}
    survey = folder.survey(folder.stage("a", "c"), looks=True)
    assert kinds(survey) == {"pending": 1, "new": 1}
    assert {path: path.read_bytes() for path in folder.path.rglob("*") if path.is_file()} == before


ROW: dict[str, Any] = {"prompt": "a fox", "id": "x", "output": "fox.png", "seed": 7}
SENT = {"paid": 1}
MEANT: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, bool], str]] = [
    # a name, what the database holds, the fields of the row that are others now, the flags, what becomes of the picture
    ("not sent", {}, {}, {}, "pending"),
    ("refused before", {"paid": 1}, {}, {}, "pending"),
    ("saved", SENT | {"state": "saved"}, {}, {}, "settled"),
    ("saved, all again", SENT | {"state": "saved"}, {}, {"failed": True, "unknown": True}, "settled"),
    ("generated", SENT | {"state": "generated"}, {}, {"failed": True, "unknown": True}, "settled"),
    ("submitted", SENT | {"state": "submitted"}, {}, {"failed": True, "unknown": True}, "settled"),
    ("failed", {"state": "failed"}, {}, {}, "settled"),
    ("failed, unknown again", {"state": "failed"}, {}, {"unknown": True}, "settled"),
    ("failed, again", {"state": "failed"}, {}, {"failed": True}, "retried"),
    ("unknown", SENT | {"state": "unknown"}, {}, {}, "settled"),
    ("unknown, failed again", SENT | {"state": "unknown"}, {}, {"failed": True}, "settled"),
    ("unknown, again", SENT | {"state": "unknown"}, {}, {"unknown": True}, "retried"),
    ("out", SENT | {"state": "submitting"}, {}, {}, "settled"),
    ("out, again", SENT | {"state": "submitting"}, {}, {"unknown": True}, "retried"),
    ("edited", {}, {"prompt": "an owl"}, {}, "edited"),
    ("edited output", {}, {"output": "owl.png"}, {}, "edited"),
    ("edited after a try", SENT, {"prompt": "an owl"}, {}, "changed"),
    ("edited and failed", {"state": "failed"}, {"prompt": "an owl"}, {}, "changed"),
    ("edited and saved", SENT | {"state": "saved"}, {"prompt": "an owl"}, {}, "changed"),
    ("saved elsewhere", SENT | {"state": "saved", "output": "mine.png"}, {}, {}, "settled"),
    ("to be saved elsewhere", SENT | {"output": "mine.png"}, {}, {}, "pending"),
    # A stranger's database: the fingerprint of the row is right, what would be sent is not.
    ("another prompt", {"prompt": "an owl"}, {}, {}, "edited"),
    ("another size", {"size": "1024*1024"}, {}, {}, "edited"),
    ("another seed", {"seed": 8}, {}, {}, "edited"),
    ("rewritten", {"prompt_extend": 1}, {}, {}, "edited"),
    ("another output", {"output": "owl.png"}, {}, {}, "edited"),
    ("another fingerprint", {"fingerprint": "0"}, {}, {}, "edited"),
    ("another prompt, saved", SENT | {"state": "saved", "prompt": "an owl"}, {}, {}, "changed"),
    ("another size, failed", {"state": "failed", "size": "1024*1024"}, {}, {"failed": True}, "changed"),
    ("another seed, unknown", SENT | {"state": "unknown", "seed": 8}, {}, {"unknown": True}, "changed"),
]


@pytest.mark.smoke
@pytest.mark.parametrize(("holds", "now", "flags", "kind"), [row[1:] for row in MEANT], ids=[row[0] for row in MEANT])
def test_what_a_row_means_for_its_picture(
    folder: Folder, holds: dict[str, Any], now: dict[str, Any], flags: dict[str, bool], kind: str
) -> None:
    folder.plan("first", ROW)
    folder.put(0, state="saved", paid=1)
    folder.put(1, **holds)
    survey = folder.survey(folder.stage("first", ROW | now), **flags)
    expected: dict[str, int] = {"settled": 1}
    expected[kind] = expected.get(kind, 0) + 1
    assert {name: count for name, count in kinds(survey).items() if name != "displaced"} == expected


@pytest.mark.parametrize(("state", "kind"), [("unknown", "retried"), ("submitting", "retried"), ("failed", "settled")])
def test_where_nothing_costs_what_is_not_known_is_made_again_unasked(tmp_path: Path, state: str, kind: str) -> None:
    folder = Folder(tmp_path / "out", "openai", url=LOCAL)
    folder.plan("a")
    folder.put(0, state=state, paid=1)
    assert kinds(folder.survey(folder.stage("a"))) == {kind: 1}


def test_a_variant_with_its_own_name_is_not_edited(folder: Folder) -> None:
    folder.plan(ROW, variants=3)
    assert kinds(folder.survey(folder.stage(ROW, variants=3))) == {"pending": 3}


@pytest.mark.parametrize("state", ["pending", "saved"])
def test_another_place_is_a_change_of_every_row(folder: Folder, state: str) -> None:
    folder.plan("a", "b")
    for number in (0, 1):
        folder.put(number, state=state, paid=int(state == "saved"))
    folder.at("dashscope", url="https://dashscope-intl.aliyuncs.com/api/v1")
    assert kinds(folder.survey(folder.stage("a", "b"))) == {"edited" if state == "pending" else "changed": 2}
    folder.at("dashscope", url="https://dashscope-us.aliyuncs.com/api/v1")
    assert kinds(folder.survey(folder.stage("a", "b"))) == {"edited" if state == "pending" else "changed": 2}


@pytest.mark.parametrize("other", ["provider", "region", "endpoint"])
def test_a_place_is_provider_region_and_endpoint(folder: Folder, other: str) -> None:
    folder.plan("a")
    with folder.database() as database:
        database.execute(f"UPDATE services SET number = 0, {other} = 'x'")
        database.execute("UPDATE pictures SET service = 0, state = 'saved', paid = 1")
    assert kinds(folder.plan("a")) == {"changed": 1}
    with folder.database() as database:
        assert database.execute("SELECT count(*) FROM services").fetchone()[0] == 2
    assert [picture["service"] for picture in folder.pictures()] == [0, 1]


def test_equal_rows_are_pictures_of_their_own_wherever_they_stand(folder: Folder) -> None:
    folder.plan("a", "a", "b")
    assert kinds(folder.survey(folder.stage("b", "a", "a"))) == {"pending": 3}
    assert kinds(folder.survey(folder.stage("a", "b", "a", "a"))) == {"pending": 3, "new": 1}
    assert len({picture["identity"] for picture in folder.pictures()}) == 3
    folder.plan(*["a"] * 6)
    assert listed(folder, "number", "position") == [(number, number) for number in range(6)]


def test_a_row_with_an_id_is_that_row_whatever_it_says_beside(folder: Folder) -> None:
    folder.plan({"prompt": "a", "id": "x"}, "b")
    folder.put(0, state="saved", paid=1)
    assert kinds(folder.survey(folder.stage("b", {"prompt": "c", "id": "x"}))) == {"changed": 1, "pending": 1}


def test_variants_are_known_again_by_the_seed_that_their_row_gives(folder: Folder) -> None:
    rows = [{"prompt": "a", "seed": 5}, {"prompt": "b", "seed": MAX_SEED}]
    folder.plan(*rows, variants=3)
    for number in range(6):
        folder.put(number, state="saved", paid=1)
    assert kinds(folder.survey(folder.stage(*rows, variants=4))) == {"settled": 6, "new": 2}


def test_settings_are_a_part_of_what_a_picture_is(tmp_path: Path) -> None:
    folder = Folder(tmp_path / "out", "openai", url=LOCAL)
    folder.plan("a")
    folder.put(0, state="saved")
    assert kinds(folder.survey(folder.stage("a"))) == {"settled": 1}
    folder.at("openai", url=LOCAL, settings={"steps": 4})
    assert kinds(folder.survey(folder.stage("a"))) == {"changed": 1}


def test_a_folder_of_an_earlier_version_is_known_again(tmp_path: Path) -> None:
    """These are in the databases of users: another way to work them out would pay for every picture once more."""
    folder = Folder(tmp_path / "a")
    folder.plan("a fox", "a fox", {"prompt": "a fox", "id": "x"})
    plain = "a87117965126b7e0655702f035fb91d7"
    assert [picture["identity"] for picture in folder.pictures()] == [f"row:{plain}:1", f"row:{plain}:2", "id:x"]
    assert [picture["fingerprint"] for picture in folder.pictures()][:2] == [plain] * 2
    local = Folder(tmp_path / "b", "openai", url=LOCAL, settings={"model": "m"})
    local.plan("a fox")
    assert local.picture(0)["fingerprint"] == "f90dd1ca320eca260d54e54d8a93086f"


# What that costs ------------------------------------------------------------------------------------------------------


def test_what_was_spent_before_counts_every_try(folder: Folder) -> None:
    folder.plan("a", "b", "c")
    for number, paid in enumerate((0, 1, 2)):
        folder.put(number, paid=paid, price=0.0123456)
    assert folder.survey(folder.stage("a", "b", "c")).spent == 0.037037  # to a millionth


def test_what_would_be_made_is_what_is_new_edited_pending_or_asked_for_again(
    folder: Folder, prices: dict[str, float]
) -> None:
    sizes = [f"{512 + 16 * number}*512" for number in range(6)]
    for number, size in enumerate(sizes):
        prices[size] = 0.0000001 + 10.0**number
    rows = [{"prompt": "a", "id": str(number), "size": size} for number, size in enumerate(sizes)]
    folder.plan(*rows[1:])
    folder.put(0, output="edited.png")  # 1
    folder.put(2, state="failed")  # 3: asked for again
    folder.put(3, state="saved", paid=1, prompt="b")  # 4: changed
    folder.put(4, state="saved", paid=1)  # 5: settled
    rows[1]["output"] = "given.png"
    survey = folder.survey(folder.stage(*rows), failed=True)
    assert kinds(survey) == {"new": 1, "edited": 1, "pending": 1, "retried": 1, "changed": 1, "settled": 1}
    assert survey.made(with_changed=False) == (4, 1111.0)
    assert survey.made(with_changed=True) == (5, 11111.000001)  # to a millionth: 5 times a tenth of that is left


@pytest.mark.parametrize(
    ("limit", "budget", "made"),
    [
        (9, 9.0, (3, 3.5)),
        (9, 3.5, (3, 3.5)),
        (9, 3.4999, (2, 1.5)),
        (9, 1.0, (1, 1.0)),
        (9, 0.99, (0, 0.0)),
        (2, 9.0, (2, 1.5)),
        (0, 9.0, (0, 0.0)),
    ],
)
def test_the_first_that_the_limit_and_the_budget_allow(
    folder: Folder, prices: dict[str, float], limit: int, budget: float, made: tuple[int, float]
) -> None:
    prices |= {"512*512": 1.0, "528*512": 0.5, "544*512": 2.0, "560*512": 40.0}
    rows = [{"prompt": "a", "id": size, "size": size} for size in prices]
    folder.plan(rows[3])
    folder.put(0, state="saved", paid=1, prompt="other")
    stage = folder.stage(*rows)
    folder.survey(stage)
    assert first(stage, limit, budget, with_changed=False) == made


def test_what_changed_counts_only_where_that_is_accepted(folder: Folder, prices: dict[str, float]) -> None:
    prices["512*512"] = 0.1234567
    folder.plan("a", {"prompt": "b", "id": "x"})
    folder.put(1, state="saved", paid=1)
    stage = folder.stage("a", {"prompt": "c", "id": "x"})
    folder.survey(stage)
    assert first(stage, 9, 9.0, with_changed=False) == (1, 0.123457)
    assert first(stage, 9, 9.0, with_changed=True) == (2, 0.246913)


# Changes are asked for before anything is replaced --------------------------------------------------------------------


def test_nothing_is_asked_where_nothing_that_was_sent_is_changed(folder: Folder) -> None:
    folder.plan("a", {"prompt": "b", "id": "x"})
    stage = folder.stage({"prompt": "c", "id": "x"}, "d")
    assert stage.changed_rows(folder.survey(stage)) is None


@pytest.mark.parametrize(("count", "lines"), [(1, "2"), (5, "2, 3, 4, 5, 6"), (6, "2, 3, 4, 5, 6, …")])
def test_changed_rows_are_told_with_their_lines_and_their_price(
    folder: Folder, prices: dict[str, float], count: int, lines: str
) -> None:
    prices["512*512"] = 0.0123456
    rows = [{"prompt": "a", "id": str(number)} for number in range(count)]
    folder.plan(*rows)
    for number in range(count):
        folder.put(number, state="saved", paid=1)
    stage = folder.stage("new", *[row | {"prompt": "b"} for row in rows])
    changed = stage.changed_rows(folder.survey(stage))
    assert changed is not None and changed.code == "changed_rows"
    pictures = "1 picture" if count == 1 else f"{count} pictures"
    assert changed.message == (
        f"{pictures} of this folder would be replaced, because rows (line {lines}) or provider, region or endpoint "
        f"are not those of before: {count} would be made again for US${count * 0.0123456:.5g}, "
        f"{count + 1} in all for US${(count + 1) * 0.0123456:.5g}"
    )
    assert changed.fault.changes == {
        "replaced": count,
        "made_again": count,
        "made_again_cost": round(count * 0.0123456, 6),
        "to_make": count + 1,
        "to_make_cost": round((count + 1) * 0.0123456, 6),
    }


def test_a_picture_whose_name_another_row_wants_is_told_too(folder: Folder) -> None:
    folder.plan({"prompt": "a", "output": "a.png"}, {"prompt": "b", "output": "b.png"})
    folder.put(0, state="saved", paid=1)
    stage = folder.stage({"prompt": "c", "output": "A.png"})
    survey = folder.survey(stage)
    assert kinds(survey) == {"new": 1, "displaced": 1} and survey.cost["displaced"] == 0.0
    changed = stage.changed_rows(survey)
    assert changed is not None and "because rows or provider" in changed.message
    assert changed.message.startswith("1 picture of this folder would be replaced")
    assert changed.fault.changes is not None and changed.fault.changes["made_again"] == 0
    assert kinds(folder.survey(folder.stage({"prompt": "a", "output": "a.png"}))) == {"settled": 1}  # its own name


def test_nobody_is_asked_for_the_name_of_a_picture_that_was_never_sent(folder: Folder) -> None:
    folder.plan({"prompt": "a", "output": "a.png"})
    stage = folder.stage({"prompt": "b", "output": "a.png"})
    survey = folder.survey(stage)
    assert kinds(survey) == {"new": 1} and stage.changed_rows(survey) is None


# What becomes of the folder -------------------------------------------------------------------------------------------


def listed(folder: Folder, *columns: str) -> list[tuple[Any, ...]]:
    return [tuple(picture[column] for column in columns) for picture in folder.pictures()]


@pytest.mark.smoke
def test_a_new_row_is_in_the_database_as_it_will_be_sent(folder: Folder) -> None:
    folder.plan(
        {"prompt": "A Fox", "seed": MAX_SEED, "prompt_extend": True, "size": "512x1024"},
        {"prompt": "an owl", "id": "Owl 1", "output": "birds/owl.jpg", "seed": 3},
        variants=2,
    )
    names = ("number", "variant", "position", "line", "id", "prompt", "size", "seed", "prompt_extend", "output")
    plain, extended = 0.01434, 0.02868
    assert listed(folder, *names) == [
        (0, 0, 0, 1, None, "A Fox", "512*1024", MAX_SEED, 1, "images/000000-a-fox.png"),
        (1, 1, 0, 1, None, "A Fox", "512*1024", 0, 1, "images/000001-a-fox.png"),
        (2, 0, 1, 2, "Owl 1", "an owl", "512*512", 3, 0, "birds/owl.jpg"),
        (3, 1, 1, 2, "Owl 1", "an owl", "512*512", 4, 0, "birds/owl-2.jpg"),
    ]
    assert listed(folder, "price") == [(extended,), (extended,), (plain,), (plain,)]
    assert listed(folder, "state", "paid", "facts", "moved_from") == [("pending", 0, "{}", None)] * 4
    assert [key for (key,) in listed(folder, "output_key")][2:] == ["birds/owl.jpg", "birds/owl-2.jpg"]
    folder.plan({"prompt": "x", "id": "Named"})
    assert folder.pictures()[-1]["output"] == "images/000000-named.png"  # the others were not sent


def test_variants_of_a_row_without_a_seed_follow_one_that_is_picked(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    picked = itertools.count(MAX_SEED)
    monkeypatch.setattr(room, "pick_seed", lambda: next(picked) % (MAX_SEED + 1))
    folder.plan("a", variants=3)
    assert listed(folder, "seed") == [(MAX_SEED,), (0,), (1,)]
    folder.plan("a", variants=4)
    assert listed(folder, "seed") == [(MAX_SEED,), (0,), (1,), (2,)]


@pytest.mark.parametrize("seed", [0, 1, 40, MAX_SEED])
def test_a_seed_stays_that_of_the_variants_that_are_there(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    monkeypatch.setattr(room, "pick_seed", lambda: 0)
    folder.plan("other", "a", variants=2)
    folder.put(3, state="saved", paid=1, seed=(seed + 1) % (MAX_SEED + 1))
    folder.plan("other", variants=2)  # of the row only what was made is left
    assert listed(folder, "number", "position") == [(0, 0), (1, 0), (3, None)]
    folder.plan("a", variants=3)
    seeds = {picture["variant"]: picture["seed"] for picture in folder.pictures() if picture["prompt"] == "a"}
    assert seeds == {k: (seed + k) % (MAX_SEED + 1) for k in range(3)}


def test_no_seed_is_noted_where_none_can_be_sent(folder: Folder) -> None:
    folder.plan("a", variants=2)
    for number in (0, 1):
        folder.put(number, state="saved", paid=1)
    folder.at("zimageturbo")
    rows = [{"prompt": "a", "size": "1024*1024"}]
    assert kinds(folder.plan(*rows, variants=3))["new"] == 3
    assert [seed for (seed,) in listed(folder, "seed")][2:] == [-1] * 3
    assert kinds(folder.plan(*rows, variants=3)) == {"pending": 3}


def test_where_a_seed_can_be_sent_again_one_is_picked(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(room, "pick_seed", lambda: 5)
    folder.at("zimageturbo")
    folder.plan({"prompt": "a", "size": "1024*1024"})
    folder.put(0, state="saved", paid=1)
    folder.at("dashscope")
    assert kinds(folder.plan({"prompt": "a", "size": "1024*1024"}, variants=2)) == {"changed": 1, "new": 1}
    assert [seed for (seed,) in listed(folder, "seed")] == [-1, 5, 6]


def test_rows_that_move_change_nothing_but_their_place(folder: Folder) -> None:
    folder.plan("a", "b", BLANK, "c", "d")
    folder.put(0, state="saved", paid=1)
    folder.put(1, state="failed")
    before = folder.pictures()
    assert listed(folder, "position", "line") == [(0, 1), (1, 2), (2, 4), (3, 5)]
    folder.plan("d", "c", BLANK, "b", "a", failed=True)
    assert listed(folder, "position", "line") == [(3, 5), (2, 4), (1, 2), (0, 1)]
    moved = [picture | {"position": None, "line": None} for picture in folder.pictures()]
    assert moved == [picture | {"position": None, "line": None} for picture in before]
    folder.plan(BLANK, "d", "c", "b", "a", failed=True)  # the lines alone
    assert listed(folder, "position", "line") == [(3, 5), (2, 4), (1, 3), (0, 2)]
    folder.plan("new", "d", "c", "b", "a", failed=True)  # the places alone
    assert listed(folder, "position", "line")[:4] == [(4, 5), (3, 4), (2, 3), (1, 2)]


def test_what_leaves_the_input_is_forgotten_only_where_it_was_never_sent(folder: Folder) -> None:
    folder.plan("a", "b", "c", "d", "e", "stays")
    folder.put(1, state="saved", paid=1)
    folder.put(2, state="unknown", paid=1)
    folder.put(3, paid=1)  # refused, and perhaps billed
    folder.put(4, state="failed")
    folder.plan("stays")
    assert listed(folder, "number", "position") == [(1, None), (2, None), (3, None), (4, None), (5, 0)]
    folder.plan("stays", "b")
    assert folder.picture(1)["position"] == 1 and len(folder.pictures()) == 5


def test_an_edited_row_that_was_never_sent_takes_the_place_of_the_old_one(folder: Folder) -> None:
    folder.plan({"prompt": "a", "id": "x", "output": "a.png"}, "b")
    folder.plan({"prompt": "c", "id": "x", "output": "a.png"}, "b")
    assert listed(folder, "number", "prompt", "position", "output") == [
        (1, "b", 1, "images/000001-b.png"),
        (2, "c", 0, "a.png"),
    ]


@pytest.mark.smoke
def test_a_changed_row_is_another_picture_and_the_old_one_keeps_its_file(folder: Folder) -> None:
    folder.plan({"prompt": "a", "id": "x", "output": "a/fox.png"}, {"prompt": "b", "output": "b.png"})
    path = folder.path / "a" / "fox.png"
    path.parent.mkdir()
    path.write_bytes(b"the old one")
    folder.put(0, state="saved", paid=1, facts={"image": {"path": str(path)}})
    folder.plan({"prompt": "c", "id": "x", "output": "a/fox.png"}, {"prompt": "b", "output": "b.png"})
    names = ("number", "identity", "prompt", "position", "line", "output", "output_key", "state", "paid", "moved_from")
    old, other, new = listed(folder, *names)
    kept = "replaced/000000-fox.png"
    assert old == (0, "id:x@0", "a", None, None, kept, kept, "saved", 1, None)
    assert new == (2, "id:x", "c", 0, 1, "a/fox.png", "a/fox.png", "pending", 0, None)
    assert other[0] == 1 and other[7] == "pending"
    assert (folder.path / kept).read_bytes() == b"the old one" and not path.exists()


def test_a_picture_whose_name_another_row_takes_keeps_its_file(folder: Folder) -> None:
    folder.plan({"prompt": "a", "output": "a.png"})
    (folder.path / "a.png").write_bytes(b"the old one")
    folder.put(0, state="saved", paid=1)
    folder.plan({"prompt": "b", "output": "a.png"})
    assert listed(folder, "output", "position") == [("replaced/000000-a.png", None), ("a.png", 0)]
    assert (folder.path / "replaced/000000-a.png").read_bytes() == b"the old one"


@pytest.mark.parametrize(
    ("holds", "raised"),
    [({}, True), ({"state": "failed"}, True), (SENT | {"state": "saved"}, False), (SENT | {"state": "unknown"}, False)],
    ids=["pending", "asked for again", "saved", "unknown"],
)
def test_a_price_that_rose_counts_before_it_is_paid(folder: Folder, holds: dict[str, Any], raised: bool) -> None:
    folder.plan("a", "b", "c")
    folder.put(0, price=0.001, **holds)
    folder.put(1, price=7.0)  # was dearer
    folder.plan("a", "b", "c", failed=True)
    assert listed(folder, "price") == [(0.01434 if raised else 0.001,), (7.0,), (0.01434,)]


def test_numbers_are_given_once(folder: Folder) -> None:
    folder.plan("a", "b")
    folder.put(1, state="saved", paid=1, number=7)
    folder.plan("a", "c", "d")
    assert [number for (number,) in listed(folder, "number")] == [0, 7, 8, 9]


def assert_free(folder: Folder) -> None:
    """Nothing holds the database."""
    with folder.database() as other:
        other.execute("PRAGMA busy_timeout = 1")
        other.execute("BEGIN IMMEDIATE")
        other.execute("ROLLBACK")


def test_names_that_collide_with_another_picture_leave_the_folder_as_it_was(folder: Folder) -> None:
    folder.plan("a", "b")
    folder.put(0, state="saved", paid=1, output_key="images/000003-c.png")
    before = folder.pictures()
    stage = folder.stage("d", "c", "b")
    folder.survey(stage)
    with pytest.raises(Failure) as caught:
        stage.merge()
    assert caught.value.code == "output_exists"
    assert_free(folder)
    assert folder.pictures() == before


@pytest.mark.parametrize("error", [KeyError("x"), Stopped("SIGINT")])
def test_whatever_breaks_a_plan_leaves_the_folder_as_it_was(
    folder: Folder, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    folder.plan("a", {"prompt": "b", "id": "x"})
    folder.put(1, state="saved", paid=1)
    before = folder.pictures()
    stage = folder.stage("c", {"prompt": "d", "id": "x"})
    folder.survey(stage)
    levels: list[int] = []

    def breaks(number: int, name: str) -> str:
        levels.extend(stage.db.execute("PRAGMA folder.synchronous").fetchone())
        raise error

    monkeypatch.setattr(room, "default_output_name", breaks)
    with pytest.raises(type(error)):
        stage.merge()
    assert levels == [2]  # FULL: what is planned is on the disk before anything is paid for
    assert_free(folder)
    assert folder.pictures() == before


def test_after_the_plan_nothing_holds_the_database(folder: Folder) -> None:
    stage = folder.stage("a")
    folder.survey(stage)
    stage.merge()
    assert sorted(os.listdir(folder.path)) == [".gitignore", DATABASE]
    with pytest.raises(sqlite3.ProgrammingError):
        stage.db.execute("SELECT 1")


def test_a_long_plan_ends_with_its_command(folder: Folder) -> None:
    stop = Stop(60)
    stage = folder.stage(*["a"] * 3000, stop=stop)
    stop.request("SIGTERM")
    with pytest.raises(Stopped):
        folder.survey(stage)


def test_what_a_strangers_database_does_by_itself_runs_nothing_of_ours(folder: Folder) -> None:
    folder.plan("a")
    with folder.database() as database:
        database.execute("CREATE TRIGGER t AFTER INSERT ON pictures BEGIN SELECT replaced_name(1, 'x'); END")
    before = folder.pictures()
    stage = folder.stage("a", "b")
    folder.survey(stage)
    with pytest.raises(Failure), contextlib.closing(stage.db):
        stage.merge()
    assert folder.pictures() == before
