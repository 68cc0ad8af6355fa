"""Tasks: what a submission starts, and how it goes on as the questions after it tell."""

from __future__ import annotations

import math
import threading
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from zimage_mock.drawing import Picture
from zimage_mock.errors import Dialect
from zimage_mock.exchange import Order, Reply, Request, html_page
from zimage_mock.faults import Course, Fault
from zimage_mock.limits import Recent
from zimage_mock.provider import Provider, Studio

TASKS_KEPT = 10_000  # so that a long run does not eat the memory


def task_faults(dialect: Dialect) -> Mapping[str, Fault]:
    """The faults of every service that works by tasks."""
    lost = dialect.refused("404", "Task not found.")
    return {
        "task-failed": Fault("FAILED, not billed", task=Course("FAILED", "Image generation failed.")),
        "task-blocked": Fault(
            "FAILED for sensitive content, not billed",
            task=Course("FAILED", "The prompt may contain sensitive content."),
        ),
        "task-lost": Fault(
            "404 to every status query, not billed",
            task=Course("FAILED", early=lost, early_queries=math.inf),
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
            task=Course(early=dialect.refused("429-wait"), early_queries=1),
        ),
        "two-pictures": Fault("two links, billed once", task=Course(pictures=2)),
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


class ByTask(Provider):
    """A service that answers a submission at once with a task, which is then asked for."""

    def __init__(self, studio: Studio) -> None:
        super().__init__(studio)
        self._tasks: Recent[Task] = Recent(TASKS_KEPT)
        self._lock = threading.Lock()

    @abstractmethod
    def _new_id(self) -> str:
        """The name of the next task."""

    @abstractmethod
    def _submitted(self, task: Task, *, billed: bool) -> Reply:
        """The answer that names a task."""

    @abstractmethod
    def _picture(self, order: Order) -> Picture:
        """The picture that a task makes."""

    @abstractmethod
    def _told(self, task: Task, status: str, links: Sequence[str], code: str) -> Reply:
        """The answer to a question: the status is SUCCESS, FAILED, IN_PROGRESS or the word of a fault."""

    def _make(self, order: Order, fault: str) -> Reply:
        due = time.monotonic() + self._studio.latency_s
        created_at = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        task = Task(self._new_id(), order, fault, due, created_at)
        with self._lock:
            self._tasks[task.id] = task
        billed = self._faults[fault].task.billed
        if billed:
            self._studio.ledger.bill(due=due)
        return self._submitted(task, billed=billed)

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
            return self._now(task)

    def _now(self, task: Task) -> Reply:
        fault = self._faults[task.fault]
        course = fault.task
        status: str = course.end if time.monotonic() >= task.due else "IN_PROGRESS"
        if task.queries <= course.early_queries:
            if isinstance(course.early, Reply):
                return replace(course.early, code=course.early.code or task.fault)
            status = course.early
        done = status == "SUCCESS"
        if done and not task.links:
            for _ in range(course.pictures):
                task.links.append(self._studio.gallery.issue(self._picture(task.order), fault))
        links = task.links if done else []
        return self._told(task, status, links, "" if links or status == "IN_PROGRESS" else task.fault)
