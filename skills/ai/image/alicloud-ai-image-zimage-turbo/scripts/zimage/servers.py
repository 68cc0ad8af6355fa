"""Servers: the open model behind a server of the user's own, a gateway or a paid host: who it is, what it costs."""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import urljoin

from zimage.answers import bearer
from zimage.calls import HttpAnswer, HttpCall
from zimage.endpoint import is_own_machine
from zimage.provider import OpenModel, Price
from zimage.settings import Setting, number

if TYPE_CHECKING:
    from zimage.endpoint import Endpoint
    from zimage.request import ImageRequest

THIS_MODEL = re.compile("z[-_ ]?image", re.IGNORECASE)  # in the names that servers have for it

PRICE = Setting(
    "price",
    "USD",
    "what a picture costs at this host; 0 where it is a server of the user's own",
    None,
    number(float, 0, 1000, "a price"),
    shapes_picture=False,
)


def only_fitting(names: Sequence[str]) -> str | None:
    """The one name of a server's models that is this model's, or the only one that there is."""
    fitting = [name for name in names if THIS_MODEL.search(name)] or names
    return fitting[0] if len(fitting) == 1 else None


class Sign(NamedTuple):
    """A path that only one kind of server answers so; `anywhere`: also asked of a public host."""

    path: str  # below the root of the host, or of the proxy's path
    dialect: Any  # of the provider: what is so of this server
    says_so: Callable[[HttpAnswer], bool]
    anywhere: bool = False


def first_sign(
    signs: Sequence[Sign], base: str, key: str
) -> Generator[HttpCall, HttpAnswer | None, tuple[Any, HttpAnswer] | None]:
    """Ask for one sign after the other; returns the dialect of the first that is there, with what was answered."""
    for sign in signs:
        answer = yield HttpCall("GET", urljoin(base, sign.path), bearer(key))
        if answer is not None and answer.status == 200 and sign.says_so(answer):
            return sign.dialect, answer
    return None


class OpenServer(OpenModel):
    """The open model behind a server: free on a machine of the user's own, else at the price that they name."""

    @property
    def passes_on(self) -> bool:
        """Whether the server hands requests on to others, who may be paid."""
        return False

    def is_billable_at(self, endpoint: Endpoint) -> bool:
        return self._price_at(endpoint) != 0

    def _price_at(self, endpoint: Endpoint) -> float | None:
        """US$ a picture; None where it is not known, as that of any host that is not surely the user's own."""
        if self.settings["price"] is not None:
            return float(self.settings["price"])
        return 0.0 if is_own_machine(endpoint.host) and not self.passes_on else None

    def price_at(self, request: ImageRequest, endpoint: Endpoint) -> Price:
        price = self._price_at(endpoint)
        if self.settings["price"] is not None:
            return Price(price, "--price", "none")
        return Price(price, "own hardware" if price == 0 else "not known; --price USD names it", "none")

    @property
    def known_settings(self) -> dict[str, Any]:
        unused = self.unused()
        return {name: value for name, value in super().known_settings.items() if name not in unused}
