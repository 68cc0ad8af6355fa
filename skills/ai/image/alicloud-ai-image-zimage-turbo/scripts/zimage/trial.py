"""Trial: a few small pictures that show what a server does with seed, steps and size, whatever it says of itself."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zimage.errors import Failure
from zimage.evidence import Evidence
from zimage.make import generate
from zimage.outside import at
from zimage.plan import make_plan, planned_provider
from zimage.transport import get_to_know
from zimage.trust import key_for

if TYPE_CHECKING:
    from zimage.console import Console
    from zimage.plan import Options, Plan
    from zimage.waiting import Stop

MOST = 4  # pictures
PROMPT = "a red fox in fresh snow"
SIZE, SQUARE = "640*512", "512*512"  # small, and the first is nobody's own choice
SEED, OTHER_SEED = 7, 8
NEARLY = 5.0  # of 255, the mean difference of two pictures that a GPU has made of the same numbers
EXACTLY = 0.0


class Trial:
    """The pictures of one trial. `told` is what is known so far, to be printed as JSON.

    Two pictures of one request always; further ones only where these and the words of the server do not decide.
    """

    def __init__(self, options: Options, stop: Stop, console: Console, env: Mapping[str, str]) -> None:
        self._options, self._stop, self._console, self._env = options, stop, console, env
        self._provider = planned_provider(options, None)
        self.told: dict[str, Any] = {"pictures": 0, "size": None, "seed": None, "steps": None, "image_paths": []}
        self._cost: float | None = 0.0

    def run(self) -> None:
        """Draw, and tell.

        Raises:
            Failure: usage where a picture costs something and the user has not agreed; else as `generate`. Stopped.
        """
        self._ask_for_consent()
        first = self._draw()
        told = self.told
        evidence = Evidence.load("evidence", first["evidence_path"], self._stop).data
        told["size"] = f"{first['width']}*{first['height']}" == first["size"]
        unused, usage = evidence.get("unused", []), at(evidence, "response", "usage")
        again = self._draw()
        told["same_request_same_picture"] = alike(first, again, NEARLY)
        if self._provider.takes_seed:
            told["seed"] = self._holds_seed(first, unused, at(evidence, "response", "seed"))
        if "steps" in evidence.get("settings", {}) or "steps" in unused:
            told["steps"] = self._holds_steps(first, again, evidence.get("settings", {}).get("steps"), unused, usage)

    def _holds_seed(self, first: dict[str, Any], unused: list[str], said: int | None) -> bool:
        if said is not None:
            return said == SEED
        if "seed" in unused or not self.told["same_request_same_picture"]:
            return False
        return not alike(first, self._draw(seed=OTHER_SEED), EXACTLY)  # else it draws all from one seed

    def _holds_steps(
        self, first: dict[str, Any], again: dict[str, Any], steps: int | None, unused: list[str], usage: Any
    ) -> bool | None:
        """None: pictures of one request differ, so that nothing can be seen."""
        if "steps" in unused or steps is None:
            return False
        if at(usage, "steps") is not None:
            return bool(at(usage, "steps") == steps)
        if not alike(first, again, EXACTLY):
            return None
        return not alike(first, self._draw(steps=max(1, steps // 2)), EXACTLY)

    def _plan(self, seed: int, **settings: Any) -> Plan:
        overrides: dict[str, Any] = {"size": SQUARE if self._provider.sizes_are_ratios else SIZE}
        if self._provider.takes_seed:
            overrides["seed"] = seed
        settings = self._options.settings | settings
        options = self._options._replace(mode="prompt", source=PROMPT, overrides=overrides, settings=settings)
        return make_plan(options, self._stop, self._env)

    def _ask_for_consent(self) -> None:
        plan = self._plan(SEED)
        key = key_for(plan.provider, plan.endpoint, self._options.trusted, self._env)
        get_to_know(plan.provider, plan.endpoint, key, self._stop)
        plan = plan.anew()
        if plan.billable and not self._options.accept_cost:
            each = f"US${plan.price.estimate:g}" if plan.price.estimate is not None else "a price that is not known"
            raise Failure(
                "usage",
                f"--deep draws 2 to {MOST} pictures, each at {each}",
                hint="ask the user; with their yes, add --accept-cost",
            )

    def _draw(self, seed: int = SEED, **settings: Any) -> dict[str, Any]:
        began, told = time.monotonic(), self.told
        response = generate(self._plan(seed, **settings), self._options, self._stop, self._console, self._env)
        told["pictures"] += 1
        told["image_paths"].append(response["image_path"])
        told.setdefault("seconds", []).append(round(time.monotonic() - began, 1))
        each = response.get("estimated_cost")
        self._cost = None if each is None or self._cost is None else round(self._cost + each, 6)
        told |= {"estimated_cost": self._cost}
        return response


def alike(one: Mapping[str, Any], other: Mapping[str, Any], most: float) -> bool:
    """Whether the pictures of two responses differ by no more than so much of 255 in the mean."""
    from PIL import Image, ImageChops, ImageStat

    with Image.open(Path(one["image_path"])) as first, Image.open(Path(other["image_path"])) as second:
        if first.size != second.size:
            return False
        difference = ImageChops.difference(first.convert("RGB"), second.convert("RGB"))
        return max(ImageStat.Stat(difference).mean) <= most
