"""A service: whoever answers for the paths below a prefix."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol

from zimage_mock.errors import Dialect
from zimage_mock.exchange import Reply, Request

Routes = Mapping[str, Mapping[str, Callable[[Request], Reply]]]


class Service(Protocol):
    """Whoever answers for all paths under `prefix`, which ends in a slash or is empty."""

    prefix: str
    dialect: Dialect  # for what the server itself has to say about a request

    def answer(self, request: Request) -> Reply:
        """Answer one request."""


def route(routes: Routes, request: Request, dialect: Dialect) -> Reply:
    """Call what a table of path and method names; 404 or 405 where it names nothing."""
    methods = routes.get(request.path)
    if methods is None:
        return dialect.error(404, "NotFound", f"No such path: {request.path[:200]}")
    if request.method not in methods:
        allowed = ", ".join(methods)
        return dialect.error(405, "MethodNotAllowed", f"Use {allowed}.", headers={"Allow": allowed})
    return methods[request.method](request)
