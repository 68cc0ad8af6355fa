"""zimageturbo.ai, another vendor of the model."""

from __future__ import annotations

import math
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from zimage_mock import rules
from zimage_mock.drawing import Picture
from zimage_mock.errors import BALANCE_NAMES, RATE_NAMES, Dialect
from zimage_mock.exchange import Order, Reply, Request, html_page, json_reply
from zimage_mock.faults import Course, Fault
from zimage_mock.limits import Recent
from zimage_mock.provider import Provider, Studio
from zimage_mock.rules import Rule

ASPECT_SIZES = {
    "1:1": (1024, 1024),
    "4:3": (1152, 864),
    "3:4": (864, 1152),
    "16:9": (1280, 720),
    "9:16": (720, 1280),
}
CREDITS = 15  # what a task costs that has a picture
TASKS_KEPT = 10_000  # so that a long run does not eat the memory
DIALECT = Dialect(
    "zimageturbo",
    lambda status, code, message: {"code": status, "message": message, "data": None},
    {
        **{name: (int(name), name) for name in ("400", "401", "403", "404", "500", "503")},
        "blocked": (400, "400"),
        **dict.fromkeys(BALANCE_NAMES, (402, "402")),
        **dict.fromkeys(RATE_NAMES, (429, "429")),
        "timeout": (504, "504"),
    },
)
TASK_FAULTS = {
    "task-failed": Fault("FAILED, not billed", task=Course("FAILED", "Image generation failed.")),
    "task-blocked": Fault(
        "FAILED for sensitive content, not billed",
        task=Course("FAILED", "The prompt may contain sensitive content."),
    ),
    "task-lost": Fault(
        "404 to every status query, not billed",
        task=Course("FAILED", early=DIALECT.refused("404", "Task not found."), early_queries=math.inf),
    ),
    "task-status": Fault(
        "two status queries are told an undocumented status",
        task=Course(early="PENDING_REVIEW", early_queries=2),
    ),
    "task-slow": Fault("IN_PROGRESS for ever, not billed", task=Course("IN_PROGRESS")),
    "status-500": Fault(
        "two status queries get 500 HTML of a gateway",
        task=Course(early=html_page(500, "Internal Server Error"), early_queries=2),
    ),
    "status-429": Fault(
        "the first status query gets 429, Retry-After: 1",
        task=Course(early=DIALECT.refused("429-wait"), early_queries=1),
    ),
    "two-pictures": Fault("two links, billed once", task=Course(pictures=2)),
    **{
        f"envelope-{name}": Fault(
            f"HTTP 200, but {name} in the envelope; no task",
            instead=replace(DIALECT.refused(name), status=200),
        )
        for name in ("401", "402", "429", "500")
    },
}


@dataclass
class Task:
    """What a submission started. How it ends is settled then; the status queries only tell it."""

    id: str
    order: Order
    fault: str
    due: float  # of time.monotonic()
    created_at: str
    queries: int = 0
    links: list[str] = field(default_factory=list)  # signed when the task is first seen to be done


class ZImageTurbo(Provider):
    """Another vendor of the model: a submission is answered at once with a task, which is then asked for."""

    prefix = "/api/"
    dialect = DIALECT
    own_faults = TASK_FAULTS
    fields: Mapping[str, Rule] = {"prompt": rules.text(longest=1000), "aspect_ratio": rules.one_of(*ASPECT_SIZES)}

    def __init__(self, studio: Studio) -> None:
        super().__init__(studio)
        self._routes = {
            f"{self.prefix}generate": {"POST": self._generate},
            f"{self.prefix}status": {"GET": self._status},
        }
        self._tasks: Recent[Task] = Recent(TASKS_KEPT)
        self._lock = threading.Lock()

    def _order(self, body: object) -> Order:
        fields = self._fields(body, "body", self.fields, *self.fields)
        return Order("z-image-turbo", fields["prompt"], {"aspect_ratio": fields["aspect_ratio"]})

    def _make(self, order: Order, fault: str) -> Reply:
        due = time.monotonic() + self._studio.latency_s
        created_at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        task = Task(f"task_{secrets.token_hex(8)}", order, fault, due, created_at)
        with self._lock:
            self._tasks[task.id] = task
        billed = self._faults[fault].task.billed
        if billed:
            self._studio.ledger.bill(due=due)
        return self._envelope({"task_id": task.id, "status": "IN_PROGRESS"}, billed=billed)

    def _status(self, request: Request) -> Reply:
        self._authorize(request)
        self._studio.ledger.count("status_queries")
        task_id = request.query.get("task_id")
        if not task_id:
            raise self._refusal("400", "task_id is required")
        with self._lock:
            task = self._tasks.get(task_id)
            if task is None:
                raise self._refusal("404", "Task not found.")
            task.queries += 1
            return self._told(task)

    def _told(self, task: Task) -> Reply:
        fault = self._faults[task.fault]
        course = fault.task
        status: str = course.end if time.monotonic() >= task.due else "IN_PROGRESS"
        if task.queries <= course.early_queries:
            if isinstance(course.early, Reply):
                return replace(course.early, code=course.early.code or task.fault)
            status = course.early
        done = status == "SUCCESS"
        width, height = ASPECT_SIZES[task.order.parameters["aspect_ratio"]]
        if done and not task.links:
            for _ in range(course.pictures):
                picture = Picture(task.order.prompt, rules.random_seed(), width, height, "jpeg")
                task.links.append(self._studio.gallery.issue(picture, fault))
        links = task.links if done else []
        data = {
            "status": status,
            "task_id": task.id,
            "request": {
                "prompt": task.order.prompt,
                "size": f"{width}*{height}",
                "seed": "-1",
                **task.order.parameters,
            },
            "response": links,
            "consumed_credits": CREDITS if links else 0,
            "created_at": task.created_at,
            "error_message": course.error_message if status == "FAILED" else None,
        }
        return self._envelope(data, code="" if links or status == "IN_PROGRESS" else task.fault)

    @staticmethod
    def _envelope(data: object, **fields: Any) -> Reply:
        return json_reply({"code": 200, "message": "success", "data": data}, **fields)
