"""How many cases each property is tried on, and the count of them.

@cases(100, 5_000, raw=json_values())     # 100 in `make check`, 5,000 in `make fuzz`
def test_something_holds(raw: Any) -> None: ...
"""

from __future__ import annotations

import functools
import os
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.configuration import set_hypothesis_home_dir
from hypothesis.strategies import SearchStrategy

import figures
from fuzz.place import Place
from provider_cases import KEYS
from zimage import outside

TIMES = float(os.environ.get("ZIMAGE_FUZZ", "0"))  # so many times the cases of `make fuzz`; 0: those of `make check`
COUNTED = "fuzz_cases"

# These start from what only POSIX has: its paths, its links, its quoting.
collect_ignore_glob = ["test_*.py"] if os.name == "nt" else []

set_hypothesis_home_dir(figures.FOLDER / "hypothesis")
settings.register_profile(
    "fuzz",
    derandomize=not TIMES,
    database=None,
    deadline=None,  # a loaded machine is no fault; what may hang is timed by its property
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("fuzz")


def cases(quick: int, long: int, **strategies: SearchStrategy[Any]) -> Callable[[Callable[..., None]], Any]:
    """Try a property on so many cases in `make check` and in `make fuzz`."""

    def decorate(test: Callable[..., None]) -> Any:
        return settings(max_examples=round(long * TIMES) or quick)(given(**strategies)(test))

    return decorate


@pytest.fixture(autouse=True)
def known_keys() -> Iterator[None]:
    """The keys of the tests are known as such, as they are once a command has read them."""
    for key in KEYS.values():
        outside.remember_secret(key)
    yield
    outside._secrets.clear()


@pytest.fixture(scope="module")
def place() -> Iterator[Place]:
    with Place() as place:
        yield place


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Any:
    """Count the cases of a property; the number travels with its report, from whatever process."""
    hypothesis = getattr(getattr(item, "obj", None), "hypothesis", None)
    if hypothesis is None:
        return (yield)
    test, count = hypothesis.inner_test, 0

    @functools.wraps(test)
    def counted(*arguments: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        return test(*arguments, **named)

    hypothesis.inner_test = counted
    try:
        return (yield)
    finally:
        hypothesis.inner_test = test
        item.user_properties.append((COUNTED, count))


_counts: Counter[str] = Counter()


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.when == "call":
        _counts[report.nodeid] += sum(int(str(value)) for name, value in report.user_properties if name == COUNTED)


def pytest_terminal_summary(terminalreporter: Any, exitstatus: int) -> None:
    """The cases of every property and in all, on the terminal and in output/…/fuzz.json. Not in `make check`."""
    if not TIMES:
        return
    failed = sorted(report.nodeid for report in terminalreporter.getreports("failed"))
    summary: dict[str, Any] = {"cases": _counts.total(), "properties": dict(sorted(_counts.items())), "failed": failed}
    figures.keep("fuzz", summary)
    terminalreporter.section("cases")
    for name, count in summary["properties"].items():
        terminalreporter.write_line(f"{count:>9,}  {name.rpartition('/')[2]}")
    terminalreporter.write_line(f"{summary['cases']:>9,}  in all, of {len(_counts)} properties")
