"""Quota: a free allowance of calls in place of money, what is left of it, and how it is spoken of."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

LARGEST = 10**9  # calls; a larger number is none


class Quota(NamedTuple):
    """Calls that are left, and that there are in all: of the account, and of the model alone. None: not told."""

    calls_left: int | None = None
    calls_limit: int | None = None
    model_calls_left: int | None = None
    model_calls_limit: int | None = None

    @classmethod
    def of(cls, told: Any) -> Quota:
        """What JSON that was written as `told` says; whatever else stands there says nothing."""
        fields = told if isinstance(told, dict) else {}
        values = {name: fields.get(name) for name in cls._fields}
        return cls(**{name: v for name, v in values.items() if type(v) is int and 0 <= v <= LARGEST})

    @property
    def least_left(self) -> int | None:
        """How many calls can be made at most; None where that is not told."""
        return min((left for left in (self.calls_left, self.model_calls_left) if left is not None), default=None)

    def after_a_call(self) -> Quota:
        """The same with one call less, of what is known."""
        left = {name: max(0, getattr(self, name) - 1) for name in self.told if name.endswith("_left")}
        return self._replace(**left)

    @property
    def told(self) -> dict[str, int]:
        """As JSON; empty where nothing is told."""
        return {name: value for name, value in self._asdict().items() if value is not None}

    def __str__(self) -> str:
        parts = (
            (self.model_calls_left, self.model_calls_limit, "for this model"),
            (self.calls_left, self.calls_limit, "in all"),
        )
        words = [
            f"{left}{'' if limit is None else f' of {limit}'} {of_what}"
            for left, limit, of_what in parts
            if left is not None
        ]
        return f"calls left: {', '.join(words)}" if words else ""


# How this tool speaks of money, and what it says where a call costs quota.
QUOTA_WORDS = {
    "paying again": "using quota again",
    "pay again": "use quota again",
    "pays for them again": "uses quota for them again",
    "costs again": "costs quota again",
    "cost again": "cost quota again",
    "which costs": "which costs quota",
    "(costs)": "(costs quota)",
    "may have been billed": "may have cost quota",
    "tells lines and price": "tells their lines",
    "is paid for": "is made",
    "are paid": "are made",
    "count, cost and duration": "count, quota and duration",
}


def in_quota_words(text: str) -> str:
    """Words of this tool, as they are said where a picture costs quota and no money."""
    return re.sub("|".join(map(re.escape, QUOTA_WORDS)), lambda found: QUOTA_WORDS[found[0]], text)
