"""A provider: an image service, with what all of them share from the key to the fault."""

from __future__ import annotations

import hmac
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NoReturn

from zimage_mock.errors import ERRORS, Dialect
from zimage_mock.exchange import Order, Refusal, Reply, Request
from zimage_mock.faults import COMMON_FAULTS, Fault
from zimage_mock.gallery import Gallery
from zimage_mock.ledger import Ledger
from zimage_mock.limits import RateLimit
from zimage_mock.rules import Rule
from zimage_mock.service import Routes, route


@dataclass(frozen=True)
class Studio:
    """What all image services work with."""

    api_key: str
    plan: Iterator[str]  # the faults to come, by name
    rpm: int  # for each service, as each vendor counts for itself
    gallery: Gallery
    ledger: Ledger
    latency_s: float  # how long a picture is said to take
    pause: Callable[[], object]  # waits as long


class Provider(ABC):
    """An image service: from the key to the fault all do the same, in their own dialect."""

    prefix: str
    dialect: Dialect
    own_faults: Mapping[str, Fault] = {}  # beside those that befall every service
    limited = True
    _routes: Routes

    def __init__(self, studio: Studio) -> None:
        self._studio = studio
        self._faults = self.faults()
        self._rate = RateLimit(studio.rpm if self.limited else 0)

    @classmethod
    def faults(cls) -> Mapping[str, Fault]:
        """The faults that this service knows; any other means "ok" to it."""
        foreign = ERRORS.keys() - cls.dialect.codes.keys()
        known = {name: fault for name, fault in COMMON_FAULTS.items() if name not in foreign}
        return {**known, **cls.own_faults}

    def answer(self, request: Request) -> Reply:
        """Answer one request under the prefix."""
        try:
            return route(self._routes, request, self.dialect)
        except Refusal as refusal:
            return refusal.reply

    @abstractmethod
    def _order(self, body: object) -> Order:
        """The request's body, checked field by field like the service does it. Raises Refusal."""

    @abstractmethod
    def _make(self, order: Order, fault: str) -> Reply:
        """The good answer, and what it costs in the ledger. Of the faults it minds its own, and "no-image"."""

    def _generate(self, request: Request) -> Reply:
        ledger = self._studio.ledger
        ledger.count("generate_requests")
        self._authorize(request)
        if wait := self._rate.admit():
            raise self._refusal("429", retry_after_s=wait)
        name = next(self._studio.plan)
        if name not in self._faults:
            name = "ok"
        if name in ERRORS and not ERRORS[name].made:
            raise self._refusal(name)
        if instead := self._faults[name].instead:
            return replace(instead, code=name)
        order = self._order(self._body(request))
        ledger.payload(self.dialect.service, order)
        if "mock:blocked-empty" in order.prompt:
            name = "no-image"
        elif "mock:blocked" in order.prompt:
            raise self._refusal("blocked")
        reply = self._make(order, name)
        if name in ERRORS:
            return replace(self.dialect.refused(name), billed=reply.billed)
        if suffer := self._faults[name].answer:
            reply = suffer(reply)
            return replace(reply, code=reply.code or name)
        return reply

    def _authorize(self, request: Request) -> None:
        given = request.headers.get("authorization", "")
        if not hmac.compare_digest(given.encode(), f"Bearer {self._studio.api_key}".encode()):
            raise self._refusal("401")

    def _refusal(self, name: str, message: str = "", retry_after_s: int = 0) -> Refusal:
        return Refusal(self.dialect.refused(name, message, retry_after_s))

    def _body(self, request: Request) -> object:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise self._refusal("400", "Content-Type must be application/json")
        try:
            return json.loads(request.body.decode(), parse_constant=_no_constant)
        except (ValueError, RecursionError):
            raise self._refusal("400", "the body must be one JSON object in UTF-8") from None

    def _object(self, value: object, where: str, required: set[str], *optional: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self._refusal("400", f"{where} must be an object")
        if missing := sorted(required - value.keys()):
            raise self._refusal("400", f"{where} lacks {', '.join(missing)}")
        if unknown := sorted(value.keys() - required - set(optional)):
            raise self._refusal("400", f"{where} has unknown fields: {', '.join(unknown)[:200]}")
        return value

    def _fields(self, value: object, where: str, rules: Mapping[str, Rule], *required: str) -> dict[str, Any]:
        """An object whose fields all have a rule and keep to it."""
        fields = self._object(value, where, set(required), *rules)
        for name, item in fields.items():
            valid, rule = rules[name]
            if not valid(item):
                raise self._refusal("400", f"{where}.{name} must be {rule}")
        return fields


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")
