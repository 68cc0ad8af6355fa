"""Quote: what a run would make, what that costs, and what to do with the answer; nothing is changed."""

from __future__ import annotations

import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from zimage.batch.contract import LONGEST_PROMPT_TOLD, PROBLEMS_TOLD, PROMPTS_TOLD
from zimage.batch.ending import ASK_ABOUT_UNKNOWN
from zimage.batch.folder import FolderLock
from zimage.batch.forecast import duration
from zimage.batch.inputs import Reading
from zimage.batch.options import BatchOptions
from zimage.batch.plan import Stage, made_kinds
from zimage.contract import DEFAULT_SIZE
from zimage.endpoint import Endpoint
from zimage.errors import Failure
from zimage.evidence import moment_of, utc_now
from zimage.files import check_space, nearest_folder
from zimage.keys import Key
from zimage.quota import Quota, in_quota_words
from zimage.request import ImageRequest
from zimage.transport import check_way
from zimage.trust import key_for

ANY_PICTURE = ImageRequest("x", DEFAULT_SIZE, None)


class Alike(NamedTuple):
    """Pictures that are made at the same price, US$ each."""

    pictures: int
    price: float
    prompt_extend: bool


class Unknown(NamedTuple):
    """Pictures whose outcome stays unknown: how many, lines of the input (the first), US$ to send them again."""

    pictures: int
    lines: list[int]
    retry_cost: float

    def told(self, is_priced: bool) -> dict[str, Any]:
        """As JSON; without the cost where no price is known."""
        return {name: value for name, value in self._asdict().items() if is_priced or name != "retry_cost"}


def first_of(stage: Stage, limit: int, budget: float, *, with_changed: bool) -> list[Alike]:
    """The pictures that would be made by a run that sends at most `limit` for at most `budget` US$."""
    kinds = made_kinds(with_changed=with_changed)
    groups = stage.db.execute(
        f"""
        SELECT count(*), price, prompt_extend FROM (
          SELECT plan.price, prompt_extend,
            sum(plan.price) OVER (ORDER BY position, variant ROWS UNBOUNDED PRECEDING) AS running
          FROM plan JOIN rows USING (position) WHERE kind IN {kinds} ORDER BY position, variant LIMIT ?
        ) WHERE running <= ? + 1e-9 GROUP BY price, prompt_extend ORDER BY price, prompt_extend
        """,
        (limit, budget),
    )
    return [Alike(pictures, price, bool(extended)) for pictures, price, extended in groups]


def first_prompts(stage: Stage, *, with_changed: bool) -> list[str]:
    """The prompts of the first rows whose pictures would be made, as they are sent."""
    kinds = made_kinds(with_changed=with_changed)
    prompts = stage.db.execute(
        "SELECT DISTINCT position, substr(prompt, 1, ?) FROM plan JOIN rows USING (position) "
        f"WHERE kind IN {kinds} ORDER BY position LIMIT ?",
        (LONGEST_PROMPT_TOLD + 1, PROMPTS_TOLD),
    ).fetchall()
    return [text if len(text) <= LONGEST_PROMPT_TOLD else text[:-1] + "…" for _, text in prompts]


def extended_rows(stage: Stage) -> int:
    """How many rows ask for a rewritten prompt."""
    return int(stage.db.execute("SELECT count(*) FROM rows WHERE prompt_extend").fetchone()[0])


def saved_before(stage: Stage) -> int:
    """How many pictures the folder holds already."""
    return int(stage.db.execute("SELECT count(*) FROM folder.pictures WHERE state = 'saved'").fetchone()[0])


LONGEST_TRUE = 24 * 3600.0  # seconds; a quota of a day says nothing of another day


def quota_told(stage: Stage) -> tuple[Quota, str]:
    """What was left of the quota when the service told it last, in an earlier run of this folder, and when."""
    last = "SELECT progress, updated_at FROM folder.runs WHERE progress LIKE '%\"quota\"%' ORDER BY number DESC LIMIT 1"
    progress, told_at = stage.db.execute(last).fetchone() or ("{}", "")
    is_true = (utc_now() - moment_of(told_at)).total_seconds() < LONGEST_TRUE
    return Quota.of(json.loads(progress).get("quota")) if is_true else Quota(), told_at


def staying_unknown(stage: Stage) -> Unknown:
    """The pictures of the input that may have been billed, and are sent again only where that is asked for.

    Those whose requests were out when a run died are among them; what costs nothing is not.
    """
    those = (
        "FROM plan JOIN folder.pictures p ON p.number = plan.number JOIN rows ON rows.position = plan.position "
        "WHERE kind = 'settled' AND p.state IN ('unknown', 'submitting') AND NOT is_held(p.number)"
    )
    pictures, cost = stage.db.execute(f"SELECT count(*), coalesce(sum(plan.price), 0.0) {those}").fetchone()
    lines = stage.db.execute(f"SELECT DISTINCT rows.line {those} ORDER BY 1 LIMIT ?", (PROBLEMS_TOLD,)).fetchall()
    return Unknown(int(pictures), [line for (line,) in lines], round(cost, 6))


def next_step(problems: int, pictures: int, left: int, unknown: int, *, is_first: bool) -> str:
    """What to do after a dry run that found so many problems, pictures to make, left pending, and staying unknown."""
    if problems:
        return "mend what problems names, each as its hint says; nothing has been sent"
    if pictures > 1 and is_first:
        step = "tell the user count, cost and duration; make one first (--limit 1 in place of --dry-run) and look at it"
    elif pictures:
        step = "tell the user count, cost and duration; then the same command without --dry-run"
    elif left:
        step = "--max-cost or --limit keeps every picture from being made: ask the user"
    else:
        step = "nothing is left to make; the same command without --dry-run fetches what is paid, free"
    return f"{step}; {ASK_ABOUT_UNKNOWN}" if unknown else step


def check_price(options: BatchOptions, endpoints: Sequence[Endpoint]) -> None:
    """A ceiling holds only where it is known what a picture costs.

    Raises:
        Failure: usage.
    """
    prices = ((endpoint, options.provider.price_at(ANY_PICTURE, endpoint)) for endpoint in endpoints)
    unknown = next((endpoint.host for endpoint, price in prices if price.estimate is None), None)
    if options.max_cost is not None and unknown is not None:
        what = f"--max-cost: what a picture costs at {unknown} is not known"
        raise Failure("usage", what, hint="give its price too: --price USD, 0 where it is a server of the user's own")


def dry_run(options: BatchOptions, stage: Stage, reading: Reading, env: Mapping[str, str]) -> dict[str, Any]:
    """What a run would make and cost, and everything that would stop it; nothing is sent, asked for or written."""
    endpoints, several = stage.endpoints, len(stage.endpoints) > 1
    prices = [options.provider.price_at(ANY_PICTURE, endpoint) for endpoint in endpoints]
    is_priced = all(price.estimate is not None for price in prices)
    price = next((price for price in prices if price.estimate is None), prices[0])
    survey = stage.survey(retry_failed=options.retry_failed, retry_unknown=options.retry_unknown, read_only=True)
    changed = stage.changed_rows(survey)
    problems = []
    keys: list[Key] = []
    checks: tuple[Callable[[], object], ...] = (
        lambda: keys.extend(key_for(options.provider, endpoint, options.trusted, env) for endpoint in endpoints),
        options.provider.preflight,
        *(functools.partial(check_way, endpoint) for endpoint in endpoints),
        lambda: check_space(options.folder),
        FolderLock(nearest_folder(options.folder)).check,
    )
    for check in checks:
        try:
            check()
        except Failure as failure:
            if (told := failure.fault.as_json()) not in problems:  # of several servers often the same
                problems.append(told)
    if changed and not options.accept_changes:
        problems.append(changed.fault.as_json())
    limit = sys.maxsize if options.limit is None else options.limit
    budget = math.inf if options.max_cost is None else options.max_cost - survey.spent
    made = first_of(stage, limit, budget, with_changed=options.accept_changes)
    pictures = sum(alike.pictures for alike in made)
    extended = sum(alike.pictures for alike in made if alike.prompt_extend)
    unknown = staying_unknown(stage)
    left = survey.made(with_changed=options.accept_changes)[0] - pictures
    quota, told_at = quota_told(stage) if options.provider.costs_quota else (Quota(), "")
    lack = f"{pictures} pictures are to be made, and of the quota were left at {told_at}: {quota}"
    is_lacking = quota.least_left is not None and quota.least_left < pictures
    warnings = [text for endpoint in endpoints for text in endpoint.warnings]
    warnings += [key.warning for key in keys if several and key.warning]
    words = in_quota_words if options.provider.costs_quota else str
    plan = {
        "ok": not problems,
        "rows": survey.rows,
        "variants": options.variants,
        "pictures": survey.rows * options.variants,
        "to_make": pictures,
        "first_prompts": first_prompts(stage, with_changed=options.accept_changes) or None,
        "prices": [alike._asdict() for alike in made] if is_priced else None,
        "rows_with_prompt_extend": extended_rows(stage),
        "estimated_cost": round(sum(alike.pictures * alike.price for alike in made), 6) if is_priced else None,
        "cost_basis": None if is_priced and not options.provider.costs_quota else price.basis,
        "quota": quota.told | {"told_at": told_at} if quota.told else None,
        "estimated_duration_s": round(
            duration(pictures, options.rpm, options.concurrency, extended, servers=len(endpoints))
        ),
        "left_pending": left,
        "stays_unknown": unknown.told(is_priced) if unknown.pictures else None,
        "spent_before": survey.spent,
        "max_cost": options.max_cost,
        "rpm": options.rpm,
        "provider": options.provider.name,
        "region": endpoints[0].region,
        "endpoint": endpoints[0].url,
        "endpoints": [endpoint.url for endpoint in endpoints] if several else None,
        "endpoint_source": endpoints[0].source,
        "settings": options.provider.known_settings or None,
        "output_dir": str(options.folder),
        "billable": stage.is_billable and pictures > 0,
        "warnings": [*warnings, *reading.remarks, *[lack] * is_lacking] or None,
        "problems": problems,
        "next": words(next_step(len(problems), pictures, left, unknown.pictures, is_first=saved_before(stage) == 0)),
    }
    return {name: value for name, value in plan.items() if value is not None}
