"""ModelScope API-Inference: free within a daily quota, by tasks."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace

from zimage_mock import rules
from zimage_mock.drawing import Picture
from zimage_mock.errors import BALANCE_NAMES, RATE_NAMES, Dialect
from zimage_mock.exchange import Order, Refusal, Reply, Request, json_reply
from zimage_mock.faults import Fault
from zimage_mock.provider import Studio
from zimage_mock.rules import Rule
from zimage_mock.tasks import ByTask, Task, task_faults

MODEL = "Tongyi-MAI/Z-Image-Turbo"
QUOTA, MODEL_QUOTA = 2000, 200  # calls of a day: of the account, and usually of a model
MAGICUBES = 1200.5  # points
FIRST_TASK = 5_075_521  # tasks are named by numbers, told as a text and as a number in turn
WORDS = {"IN_PROGRESS": "RUNNING", "SUCCESS": "SUCCEED"}  # of the service, for those of the mock
DIALECT = Dialect(
    "modelscope",
    lambda status, code, message: {"errors": {"message": message}, "request_id": str(uuid.uuid4())},
    {
        **{name: (int(name), name) for name in ("400", "401", "403", "404", "500", "503")},
        "blocked": (400, "blocked"),
        **dict.fromkeys(BALANCE_NAMES, (429, "1008")),
        "quota-429": (429, "quota"),
        **dict.fromkeys(RATE_NAMES, (429, "429")),
        "timeout": (504, "504"),
    },
    {
        "401": "Authentication failed, please make sure that a valid ModelScope token is supplied.",
        **dict.fromkeys(BALANCE_NAMES, "insufficient balance (1008)"),
        "quota-429": "You have exceeded today's quota for this model, please try again tomorrow.",
        **dict.fromkeys(RATE_NAMES, "Too many requests, rate limit exceeded for this model."),
    },
)
UNBOUND = "Please bind your Alibaba Cloud account before use."
UNNAMED = "Please make sure that the associated Aliyun account is real name verified."
OWN_FAULTS = {
    **task_faults(DIALECT),
    "unbound": Fault("401: no Alibaba Cloud account is bound", instead=DIALECT.error(401, "unbound", UNBOUND)),
    "unnamed": Fault("403: no real-name verification", instead=DIALECT.error(403, "unnamed", UNNAMED)),
    "retired": Fault("400: no such model", instead=DIALECT.error(400, "retired", f"Model {MODEL} does not exist.")),
}


class ModelScope(ByTask):
    """A submission is answered with a task; it is taken off two daily quotas, which headers of answers tell."""

    prefix = "/modelscope/"
    root = "/modelscope/v1"
    dialect = DIALECT
    own_faults = OWN_FAULTS
    fields: Mapping[str, Rule] = {
        "model": rules.text(),
        "prompt": rules.text(longest=1999),
        "negative_prompt": rules.string(),  # taken, without effect
        "size": rules.size("x"),
        "seed": rules.integer(0, rules.MAX_SEED),
        "steps": rules.integer(1, 100),
        "guidance": (lambda value: type(value) in (int, float) and 1.5 <= value <= 20, "a number from 1.5 to 20"),
    }

    def __init__(self, studio: Studio) -> None:
        super().__init__(studio)
        self._tasks_path = f"{self.root}/tasks/"
        self._routes = {
            f"{self.root}/images/generations": {"POST": self._submit},
            self._tasks_path: {"GET": self._asked},
            f"{self.root}/models": {"GET": self._models},
            f"{self.prefix}openapi/v1/magicubes/balance": {"GET": self._balance},
        }
        self._numbers = itertools.count(FIRST_TASK)
        self._calls = 0

    def answer(self, request: Request) -> Reply:
        """Answer one request; a task is named by its path."""
        if name := request.path.removeprefix(self._tasks_path) if request.path.startswith(self._tasks_path) else "":
            request = replace(request, path=self._tasks_path, query={"task_id": name})
        return super().answer(request)

    def _submit(self, request: Request) -> Reply:
        try:
            if request.headers.get("x-modelscope-async-mode") != "true":
                raise self._refusal("400", "this mock answers with tasks only: X-ModelScope-Async-Mode: true")
            reply = self._generate(request)
        except Refusal as refusal:
            reply = refusal.reply
        return self._with_quota(reply)

    def _asked(self, request: Request) -> Reply:
        if request.headers.get("x-modelscope-task-type") != "image_generation":
            raise self._refusal("400", "X-ModelScope-Task-Type must be image_generation")
        return self._with_quota(self._status(request))

    def _with_quota(self, reply: Reply) -> Reply:
        """The reply with what is left of the day's calls; those that were refused have used none."""
        used_up = reply.code == "quota"
        left = {
            "requests-limit": QUOTA,
            "requests-remaining": max(0, QUOTA - self._calls),
            "model-requests-limit": MODEL_QUOTA,
            "model-requests-remaining": 0 if used_up else max(0, MODEL_QUOTA - self._calls),
        }
        told = {f"modelscope-ratelimit-{name}": str(count) for name, count in left.items()}
        return replace(reply, headers={**reply.headers, **told})

    def _models(self, request: Request) -> Reply:
        """Also for a key that nobody has given out."""
        self._studio.ledger.count("model_queries")
        return json_reply({"object": "list", "data": [{"id": MODEL, "object": "model"}]})

    def _balance(self, request: Request) -> Reply:
        self._authorize(request)
        self._studio.ledger.count("quota_queries")
        return json_reply({"success": True, "data": {"total_balance": MAGICUBES, "available_balance": MAGICUBES}})

    def _order(self, body: object) -> Order:
        fields = self._fields(body, "body", self.fields, "model", "prompt")
        if fields["model"] != MODEL:
            raise self._refusal("400", f"Model {fields['model'][:200]} does not exist.")
        parameters = {name: value for name, value in fields.items() if name not in ("model", "prompt")}
        return Order(MODEL, fields["prompt"], parameters)

    def _new_id(self) -> str:
        number = next(self._numbers)
        self._calls = number - FIRST_TASK + 1
        return str(number)

    def _submitted(self, task: Task, *, billed: bool) -> Reply:
        name = int(task.id) if int(task.id) % 2 else task.id
        return json_reply({"task_id": name, "request_id": str(uuid.uuid4())}, billed=billed)

    def _picture(self, order: Order) -> Picture:
        width, height = map(int, order.parameters.get("size", "1024x1024").split("x"))
        return Picture(order.prompt, order.parameters.get("seed", rules.random_seed()), width, height)

    def _told(self, task: Task, status: str, links: Sequence[str], code: str) -> Reply:
        said = {"task_status": WORDS.get(status, status), "task_id": task.id, "request_id": str(uuid.uuid4())}
        if status == "SUCCESS":
            return json_reply({**said, "output_images": list(links), "time_taken": 18812.86}, code=code)
        if status == "FAILED":
            return json_reply({**said, "errors": {"message": self._faults[task.fault].task.error_message}}, code=code)
        return json_reply(said, code=code)
