"""What passes between the parts of the mock: requests, replies, and what a valid request orders."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple


@dataclass(frozen=True)
class Request:
    """One HTTP request, read whole. `target` is path and query as sent."""

    method: str
    target: str
    path: str
    query: Mapping[str, str]
    headers: Mapping[str, str]  # names in lower case
    body: bytes


@dataclass(frozen=True)
class Reply:
    """One HTTP answer, and how it is to reach the client. `code` is the service's error code, for the statistics."""

    status: int
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    code: str = ""
    billed: bool = False
    delivery: Literal["whole", "half", "dribble", "hangup"] = "whole"


class Refusal(Exception):
    """Ends the handling of a request with an error reply."""

    def __init__(self, reply: Reply) -> None:
        super().__init__(reply.code)
        self.reply = reply


class Order(NamedTuple):
    """A valid generation request, in the words of the service."""

    model: str
    prompt: str
    parameters: Mapping[str, Any]


def json_reply(value: object, **fields: Any) -> Reply:
    """A 200 with a JSON body; `fields` are further fields of the Reply."""
    return Reply(200, json.dumps(value, ensure_ascii=False).encode(errors="replace"), **fields)


def xml_error(status: int, code: str, message: str) -> Reply:
    """An error in the form of OSS, the vendor's file storage."""
    body = (
        f'<?xml version="1.0" encoding="UTF-8"?>\n<Error>\n  <Code>{code}</Code>\n  <Message>{message}</Message>\n'
        f"  <RequestId>{uuid.uuid4().hex[:24].upper()}</RequestId>\n</Error>\n"
    )
    return Reply(status, body.encode(), "application/xml", code=code)


def html_page(status: int, title: str) -> Reply:
    """What a gateway or a captive portal says in place of the service."""
    body = f"<html><head><title>{title}</title></head><body><h1>{title}</h1></body></html>\n"
    return Reply(status, body.encode(), "text/html")
