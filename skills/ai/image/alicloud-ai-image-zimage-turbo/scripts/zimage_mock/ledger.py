"""The ledger: what happened, and what would have been paid for."""

from __future__ import annotations

import heapq
import threading
import time
from collections import Counter, deque
from collections.abc import Collection
from typing import Any

from zimage_mock.errors import Dialect
from zimage_mock.exchange import Order, Reply, Request, json_reply
from zimage_mock.service import route

REQUESTS_KEPT = 100  # so that a long run does not eat the memory


class Ledger:
    """What happened, for GET /mock/stats: counters, the last requests, the last payloads. Never a key."""

    prefix = ""  # all paths that no other service claims: 404
    stats_path = "/mock/stats"

    def __init__(self, dialect: Dialect, rate_codes: Collection[str]) -> None:
        self.dialect, self._rate_codes = dialect, rate_codes
        self._lock = threading.Lock()
        names = ("generate_requests", "billed", "downloads", "model_queries", "quota_queries", "status_queries")
        self._counts = Counter(dict.fromkeys(names, 0))
        self._due: list[float] = []  # a heap: when the pictures that are not finished yet will be
        self._errors: Counter[str] = Counter()
        self._requests: deque[dict[str, Any]] = deque(maxlen=REQUESTS_KEPT)
        self._payloads: deque[dict[str, Any]] = deque(maxlen=REQUESTS_KEPT)

    def count(self, name: str) -> None:
        """Add one to a counter."""
        with self._lock:
            self._counts[name] += 1

    def bill(self, pictures: int = 1, due: float = 0.0) -> None:
        """Count pictures as paid for: at once, or from that time of time.monotonic() on."""
        with self._lock:
            for _ in range(pictures):
                heapq.heappush(self._due, due)
            self._settle()

    def _settle(self) -> None:
        while self._due and self._due[0] <= time.monotonic():
            heapq.heappop(self._due)
            self._counts["billed"] += 1

    def payload(self, service: str, order: Order) -> None:
        """Note what a valid generation request asked for."""
        parameters = dict(order.parameters)
        entry = {"service": service, "model": order.model, "prompt": order.prompt[:2000], "parameters": parameters}
        with self._lock:
            self._payloads.append(entry)

    def record(self, request: Request, reply: Reply) -> None:
        """Note a request and how it ended. Called before the answer leaves, so that the client can ask at once."""
        entry = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "method": request.method,
            "path": request.path[:200],
            "status": reply.status or None,
            "code": reply.code,
            "billed": reply.billed,
            "authorization": "authorization" in request.headers,
        }
        with self._lock:
            self._requests.append(entry)
            if reply.code:
                self._errors[reply.code] += 1

    def answer(self, request: Request) -> Reply:
        """Answer the statistics."""
        return route({self.stats_path: {"GET": lambda _: json_reply(self.snapshot())}}, request, self.dialect)

    def snapshot(self) -> dict[str, Any]:
        """All of it as JSON-able values."""
        with self._lock:
            self._settle()
            return {
                **self._counts,
                "throttled": sum(self._errors[code] for code in self._rate_codes),
                "errors": dict(self._errors),
                "requests": list(self._requests),
                "payloads": list(self._payloads),
            }
