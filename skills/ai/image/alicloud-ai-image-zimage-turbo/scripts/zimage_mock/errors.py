"""The ways to be refused, as one table, and how a service words them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from zimage_mock.exchange import Reply, json_reply


class ErrorRow(NamedTuple):
    """One way to be refused, whichever service it is. Nothing is made or billed, unless `made`."""

    help: str
    message: str
    retry_after_s: int = 0  # 0: the header is not sent
    made: bool = False


NO_BALANCE = ErrorRow(
    "402, the account is overdue (dashscope: 400 Arrearage)",
    "Access denied, please make sure your account is in good standing.",
)
TOO_MANY = ErrorRow("rate limit, no Retry-After", "Requests rate limit exceeded, please try again later.")
ERRORS = {
    "400": ErrorRow("the request is wrong", "Required parameter is missing or invalid, please check the request."),
    "blocked": ErrorRow("400, refused by content safety", "Input or output data may contain inappropriate content."),
    "402": NO_BALANCE,
    "arrearage": NO_BALANCE,
    "401": ErrorRow("the key is wrong", "Invalid API-key provided."),
    "403": ErrorRow("no permission for the model", "Model access denied."),
    "quota": ErrorRow("403, the free quota is used up", "The free tier of the model has been exhausted."),
    "quota-429": ErrorRow("429, the quota is used up", "Free allocated quota exceeded."),
    "404": ErrorRow("no such model", "Model not exist."),
    "429": TOO_MANY,
    "429-wait": TOO_MANY._replace(help="rate limit, Retry-After: 1", retry_after_s=1),
    "429-long": TOO_MANY._replace(help="rate limit, Retry-After: 3600", retry_after_s=3600),
    "500": ErrorRow("a fault of the service", "An internal error has occurred, please try again later."),
    "503": ErrorRow("overloaded", "The service is overloaded, please try again later."),
    "timeout": ErrorRow(
        "picture made and billed, the service says that it timed out",
        "Request timed out, please try again later.",
        made=True,
    ),
}
BALANCE_NAMES = ("402", "arrearage")
RATE_NAMES = ("429", "429-wait", "429-long")


@dataclass(frozen=True)
class Dialect:
    """How one service words its errors: the body of HTTP status, code and message, and the errors that it knows."""

    service: str
    body: Callable[[int, str, str], object]
    codes: Mapping[str, tuple[int, str]]  # HTTP status and code, by the names of ERRORS
    messages: Mapping[str, str] = field(default_factory=dict)  # its own words, by the same names

    def error(self, status: int, code: str, message: str, **fields: Any) -> Reply:
        """An error in the service's form; `fields` are further fields of the Reply."""
        return replace(json_reply(self.body(status, code, message), **fields), status=status, code=code)

    def refused(self, name: str, message: str = "", retry_after_s: int = 0) -> Reply:
        """The error of this name. Message and wait are those of its row unless given."""
        row = ERRORS[name]
        wait = retry_after_s or row.retry_after_s
        return self.error(
            *self.codes[name],
            message or self.messages.get(name, row.message),
            headers={"Retry-After": str(wait)} if wait else {},
        )
