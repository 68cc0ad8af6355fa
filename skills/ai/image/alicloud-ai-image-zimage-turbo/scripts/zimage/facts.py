"""Facts: what is remembered of one picture, field by field, as types; EVIDENCE_SCHEMA says what they mean.

For the type checker: nothing imports this when a command runs. Python 3.10 has no NotRequired, so what is always
there is a class of its own, below the one with the rest.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, TypedDict

if TYPE_CHECKING:
    from zimage.errors import Billed, Side

# Of an evidence file, and of a row of a batch; `pending` is of a row alone.
State = Literal["pending", "submitting", "submitted", "generated", "saved", "failed", "unknown"]


class _Request(TypedDict):
    prompt: str
    size: str
    prompt_extend: bool


class Request(_Request, total=False):
    seed: int
    base_url: str


class AttemptEnd(TypedDict, total=False):
    """What is added to an attempt; None adds nothing."""

    http_status: int | None
    service_code: str | None
    outcome: str
    billed: Billed
    wait_s: float


class _Attempt(AttemptEnd):
    at: str


class Attempt(_Attempt, total=False):
    endpoint: str


class Response(TypedDict, total=False):
    request_id: str
    usage: dict[str, Any]
    quota: dict[str, int]
    image_url: str
    other_image_urls: list[str]
    expires_at: str
    rewritten_prompt: str
    reasoning: str
    seed: int


class _Unread(TypedDict):
    http_status: int


class Unread(_Unread, total=False):
    content_type: str
    task_ids: list[str]
    links: list[str]
    body: str


class _Image(TypedDict):
    path: str
    sha256: str
    bytes: int
    format: str
    width: int
    height: int


class Image(_Image, total=False):
    source_format: str
    source_sha256: str
    warnings: list[str]


class Timings(TypedDict, total=False):
    generate: float
    download: float
    total: float


class _Cost(TypedDict):
    currency: Literal["USD"]
    basis: str
    price_list_date: str


class Cost(_Cost, total=False):
    estimate: float


class _Error(TypedDict):
    code: str
    message: str
    hint: str
    exit_code: int
    retryable: bool
    billed: Billed


class Error(_Error, total=False):
    """The fields of `Fault` that are told."""

    problems: list[str]
    problem_count: int
    changes: dict[str, Any]
    progress: dict[str, Any]
    next_command: str
    retry_after_s: float
    http_status: int
    service_code: str
    request_id: str
    evidence_path: str
    image_url: str
    seed: int
    estimated_cost: float
    prompt: str
    refused: Side


class _Lasting(TypedDict, total=False):
    started_at: str
    generated_at: str
    finished_at: str
    timings_ms: Timings
    attempts: list[Attempt]
    task_id: str
    image: Image


class Facts(_Lasting, total=False):
    """What a row of a batch remembers (KEPT_FACTS)."""

    billable: bool
    unused: list[str]
    settings: dict[str, Any]
    response: Response
    answer: Unread
    warnings: list[str]
    error: Error


class Sent(TypedDict, total=False):
    """What is known of a call before it is sent."""

    billable: bool
    request: Request
    payload: dict[str, Any]
    settings: dict[str, Any] | None
    unused: list[str] | None


class AskedAt(TypedDict, total=False):
    """Where a picture is asked for, and at what price."""

    region: str
    endpoint: str
    endpoint_source: str | None
    cost: Cost


class Changes(_Lasting, Sent, AskedAt, total=False):
    """What `Evidence.update` takes; None removes."""

    status: State
    response: Response | None
    answer: Unread | None
    warnings: list[str] | None
    error: Error | None


class Tool(TypedDict):
    name: str
    version: str


class _Content(TypedDict):
    schema_version: Literal[1]
    tool: Tool
    status: State
    provider: str
    region: str
    endpoint: str
    operation: Literal["image.generate"]
    request: Request
    payload: dict[str, Any]
    output: str
    cost: Cost


class Content(_Content, Facts, total=False):
    """What an evidence file holds; `started_at`, `attempts` and `billable` are always there."""

    endpoint_source: str
