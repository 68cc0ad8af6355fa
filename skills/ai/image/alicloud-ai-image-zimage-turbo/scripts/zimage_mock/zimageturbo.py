"""zimageturbo.ai, another vendor of the model."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from zimage_mock import rules
from zimage_mock.drawing import Picture
from zimage_mock.errors import BALANCE_NAMES, RATE_NAMES, Dialect
from zimage_mock.exchange import Order, Reply, json_reply
from zimage_mock.faults import Fault
from zimage_mock.provider import Studio
from zimage_mock.rules import Rule
from zimage_mock.tasks import ByTask, Task, task_faults

ASPECT_SIZES = {
    "1:1": (1024, 1024),
    "4:3": (1152, 864),
    "3:4": (864, 1152),
    "16:9": (1280, 720),
    "9:16": (720, 1280),
}
CREDITS = 15  # what a task costs that has a picture
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
    **task_faults(DIALECT),
    **{
        f"envelope-{name}": Fault(
            f"HTTP 200, but {name} in the envelope; no task",
            instead=replace(DIALECT.refused(name), status=200),
        )
        for name in ("401", "402", "429", "500")
    },
}


class ZImageTurbo(ByTask):
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

    def _order(self, body: object) -> Order:
        fields = self._fields(body, "body", self.fields, *self.fields)
        return Order("z-image-turbo", fields["prompt"], {"aspect_ratio": fields["aspect_ratio"]})

    def _new_id(self) -> str:
        return f"task_{secrets.token_hex(8)}"

    def _submitted(self, task: Task, *, billed: bool) -> Reply:
        return self._envelope({"task_id": task.id, "status": "IN_PROGRESS"}, billed=billed)

    def _picture(self, order: Order) -> Picture:
        return Picture(order.prompt, rules.random_seed(), *ASPECT_SIZES[order.parameters["aspect_ratio"]], "jpeg")

    def _told(self, task: Task, status: str, links: Sequence[str], code: str) -> Reply:
        width, height = ASPECT_SIZES[task.order.parameters["aspect_ratio"]]
        data = {
            "status": status,
            "task_id": task.id,
            "request": {
                "prompt": task.order.prompt,
                "size": f"{width}*{height}",
                "seed": "-1",
                **task.order.parameters,
            },
            "response": list(links),
            "consumed_credits": CREDITS if links else 0,
            "created_at": task.created_at,
            "error_message": self._faults[task.fault].task.error_message if status == "FAILED" else None,
        }
        return self._envelope(data, code=code)

    @staticmethod
    def _envelope(data: object, **fields: Any) -> Reply:
        return json_reply({"code": 200, "message": "success", "data": data}, **fields)
