"""Codes: what a service's own name for a fault means, as tables. HTTP statuses: `answers.STATUS_KINDS`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import chain
from typing import NamedTuple

from zimage.words import Said


class Code(NamedTuple):
    """A row of a table of codes: it holds where all its conditions do.

    `names`: words between blanks, in any case, `_`, `-` and blanks within a name left out; `*` stands for any rest, and
    none at all means whatever the code. `text`: a regular expression that the message must hold, in any case.
    """

    kind: str  # a key of KINDS
    names: str = ""
    text: str = ""
    statuses: Sequence[int] = ()

    def fits(self, name: str, message: str, status: int) -> bool:
        return (
            any(fnmatchcase(name, pattern) for pattern in self.names.lower().replace("_", "").split() or [""])
            and (not self.text or re.search(self.text, message, re.IGNORECASE) is not None)
            and (not self.statuses or status in self.statuses)
        )


# What stands around the code of another part of the service: what it wraps says more.
WRAPPERS = ("internalerror", "algo")

# Of gateways, and of the images API that most servers speak. LiteLLM's names: its documentation, "Exception Mapping".
# What it says of a failing backend does not prove that the backend made, and billed, nothing.
COMMON_CODES = (
    Code("blocked", "content_policy_violation moderation_blocked content_filter content_policy data_inspection_failed"),
    Code("blocked", "litellm.ContentPolicyViolationError"),
    Code("balance", "billing_hard_limit_reached insufficient_balance insufficient_user_quota budget_exceeded"),
    Code("balance", "litellm.BudgetExceededError InvalidBalance insufficient_credits"),
    Code("quota", "insufficient_quota"),
    Code("key_rejected", "invalid_api_key invalid_token litellm.AuthenticationError auth_error"),
    Code("access_denied", "permission_denied access_denied litellm.PermissionDeniedError"),
    Code("not_found", "model_not_found model_not_supported litellm.NotFoundError"),
    Code("rate_limited", "rate_limit_exceeded rate_limit_error too_many_requests litellm.RateLimitError"),
    Code("rejected_by_service", "litellm.BadRequestError litellm.UnprocessableEntityError litellm.InvalidRequestError"),
    Code("rejected_by_service", "litellm.UnsupportedParamsError litellm.ContextWindowExceededError"),
    Code("outcome_unknown", "litellm.Timeout litellm.APIConnectionError litellm.APIError litellm.BadGatewayError"),
    Code("outcome_unknown", "litellm.InternalServerError litellm.ServiceUnavailableError litellm.APIResponse*"),
    Code("outcome_unknown", "do_request_failed bad_response* upstream_error upstream_timeout gateway_timeout"),
    Code("quota", text="free allocated quota exceeded"),
    Code("balance", text=r"balance (is )?(insufficient|not enough)|insufficient[ _](account )?balance|余额不足"),
)


def kind_of(said: Said, status: int, codes: Sequence[Code]) -> str | None:
    """The kind that an answer's own words mean, a key of KINDS; None where the tables know none of them.

    The most telling name counts, and of it the first row that fits; words alone count last, and only beside a status
    that says no: in a good answer a model may have spoken them.
    """
    names = [*chain.from_iterable(map(_names_of, said.names)), *([""] if status >= 400 else [])]
    return next((row.kind for name in names for row in codes if row.fits(name, said.message, status)), None)


def _names_of(code: str) -> Iterator[str]:
    """The names by which a code may stand in a table, the most telling first.

    Of `A.B.C`: itself, `A.B`, `A`, `B.C`, `C`; of one that wraps another, the other's before its own beginnings.
    """
    parts = re.sub(r"[_\-\s]", "", code.lower())[:200].split(".")[:10]
    heads = [".".join(parts[:count]) for count in range(len(parts), 0, -1)]
    tails = [".".join(parts[count:]) for count in range(1, len(parts))]
    yield heads[0]
    if parts[0] in WRAPPERS:
        yield from _names_of(".".join(parts[1:])) if len(parts) > 1 else ()
        yield from heads[1:]
    else:
        yield from heads[1:]
        yield from tails
