"""Options: the command line of a batch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from zimage.batch.contract import DATABASE
from zimage.contract import DEFAULT_MAX_RETRIES, DEFAULT_TIMEOUT, MAX_RETRIES_RANGE, TIMEOUT_RANGE, VERSION
from zimage.errors import Failure, Problem, noting, os_reason, raise_problems
from zimage.options import (
    Parser,
    Value,
    add_service_options,
    chosen_mode,
    flag,
    prompt_problems,
    provider_in,
    read_paths,
    read_settings,
    read_value,
    region_option,
    unknown_sentences,
)
from zimage.outside import argument_text, outside_text, without_surrogates
from zimage.provider import Provider
from zimage.registry import DEFAULT_PROVIDER, provider_class
from zimage.settings import number
from zimage.trust import trusted_hosts


class BatchOptions(NamedTuple):
    """The command line after checking: typed, defaults filled in. US$ and seconds; None is no bound."""

    mode: str  # make | status | gallery
    input: str | None
    sheet: str | None
    prompt: str | None
    folder: Path
    variants: int
    concurrency: int | None
    rpm: float  # the published limit, unless it is given
    rpm_is_given: bool
    max_cost: float | None
    time_limit: float | None
    limit: int | None
    provider: Provider
    region: str | None
    base_urls: tuple[str, ...]  # as given; none leaves it to the environment
    trusted: frozenset[str]
    timeout: float
    max_retries: int | None  # None: as often as the table of `settle` says
    retry_failed: bool
    retry_unknown: bool
    accept_changes: bool
    dry_run: bool
    gallery: bool
    prompt_extend: bool | None  # of all rows; None leaves it to each

    @property
    def sends(self) -> tuple[str, ...]:
        """The states from which pictures are sent."""
        return ("pending", *["failed"] * self.retry_failed, *["unknown"] * self.retry_unknown)


DESCRIPTION = "Turn a list of prompts into pictures with Z-Image Turbo. Run it again to go on; --dry-run costs nothing."


EPILOG = """\
input: .jsonl or .ndjson (an object a line: prompt, size or aspect_ratio, seed, prompt_extend, id, output), .json (an
array of such), .csv, .tsv or .xlsx (the same names as columns), .txt (a prompt a line; # begins a comment), or - for
JSON lines on standard input.

exit codes:
  0  every picture saved                 6  rate limited, failing or not reachable
  1  some are not; run it again          7  too many unknown outcomes in a row
  2  invalid rows, usage or folder       9  the local disk
  3  key missing, wrong, no permission   11 time limit reached: run the same command again
  4  balance or quota used up            130, 143  interrupted: run the same command again

stdout carries one JSON object, the summary or the error. Progress and warnings go to stderr; after an error its
last line says what to do next.
"""


def build_parser(provider: type[Provider] | None = None) -> Parser:
    """The command line of the contract. Values stay text here: `read_options` checks them all at once."""
    parser = Parser("generate_batch.py", DESCRIPTION, EPILOG)
    mode = parser.add_argument_group("what to do (exactly one)")
    mode.add_argument("--input", metavar="FILE", help="the rows: .jsonl, .json, .csv, .xlsx, .txt; - is JSON on stdin")
    mode.add_argument("--prompt", metavar="TEXT", type=argument_text, help="one row: this prompt (see --variants)")
    mode.add_argument("--status", metavar="DIR", help="how far the batch in this folder is; also while it runs")
    mode.add_argument("--gallery-only", metavar="DIR", help="write the gallery of this folder again")

    what = parser.add_argument_group("pictures")
    what.add_argument("--sheet", metavar="NAME", help="of the workbook that --input names (default: the first)")
    what.add_argument("--output-dir", metavar="DIR", help="folder for state, images, results and gallery")
    what.add_argument("--variants", metavar="N", help="pictures of each row, with seed, seed+1, … (default 1)")
    what.add_argument(
        "--prompt-extend",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let the service rewrite the prompt of every row: slower, about twice the price",
    )
    what.add_argument("--limit", metavar="N", help="send at most N pictures in this run")
    what.add_argument("--max-cost", metavar="USD", help="never spend more on this folder, over all its runs")
    what.add_argument("--retry-failed", action="store_true", help="make failed pictures again (costs)")
    what.add_argument("--retry-unknown", action="store_true", help="pay again for pictures whose outcome is unknown")
    what.add_argument("--accept-changes", action="store_true", help="make pictures of changed rows again (costs)")

    pace = parser.add_argument_group("pace")
    pace.add_argument("--rpm", metavar="N", help="requests a minute; 0: no limit (default: the account's limit)")
    pace.add_argument("--concurrency", metavar="N", help="requests out at once (default: as the rate needs)")
    pace.add_argument("--time-limit", metavar="S", help="end within S seconds, exit 11; the same command goes on")
    pace.add_argument("--timeout", metavar="S", help=f"seconds for one picture (default {DEFAULT_TIMEOUT:g})")
    pace.add_argument("--max-retries", metavar="N", help=f"of a call surely not billed (default {DEFAULT_MAX_RETRIES})")

    service = parser.add_argument_group("service")
    service.add_argument(
        "--base-url",
        metavar="URL",
        action="append",
        help="whole endpoint, API root or bare host; repeatable, where servers of the user's own share the work",
    )
    add_service_options(service, provider)

    result = parser.add_argument_group("result")
    result.add_argument("--dry-run", action="store_true", help="count, cost and duration; send and write nothing")
    result.add_argument("--no-gallery", action="store_true", help="no index.html and no thumbnails")
    result.add_argument("--quiet", action="store_true", help="no progress and no warnings on stderr")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


MODES = ("input", "prompt", "status", "gallery_only")
PATHS = ("input", "status", "gallery_only", "output_dir")


def read_options(argv: Sequence[str], env: Mapping[str, str]) -> BatchOptions:
    """Check the command line as a whole.

    Raises:
        Failure: usage, naming every problem.
    """
    chosen = provider_in(argv)
    arguments, unknown = build_parser(chosen).parse_known_args(argv)
    given = {name: value for name, value in vars(arguments).items() if value is not None and value is not False}
    problems = [Problem("usage", text) for text in unknown_sentences(unknown)]
    mode = chosen_mode(given, MODES, problems)
    read_paths(arguments, PATHS, problems)
    problems += prompt_problems(arguments.prompt, "--input")
    looking = mode in ("status", "gallery_only")
    if looking:
        strange = [name for name in given if name not in (mode, "quiet")]
        problems += [Problem("usage", f"{flag(name)} does not go with {flag(mode)}") for name in strange]
    elif not arguments.output_dir:
        problems.append(Problem("usage", "--output-dir: required, the folder for state, images, results and gallery"))

    def value(name: str, read: Callable[[str], Value], default: Value) -> Value:
        return read_value(name, given, read, default, problems)

    kind, region = provider_class(DEFAULT_PROVIDER), None
    with noting(problems):
        kind = provider_class(DEFAULT_PROVIDER if arguments.provider is None else arguments.provider)
    with noting(problems):
        region = region_option(arguments.region, kind)
    provider = kind(read_settings(kind, given, problems))
    trusted, more = trusted_hosts(arguments.trust_host or [], env)
    problems += more
    name = getattr(arguments, mode) if looking else arguments.output_dir
    folder = Path(os.path.abspath(name or "."))
    with noting(problems):
        if name is not None:
            check_folder_name(flag(mode) if looking else "--output-dir", name, folder)
    retries: Callable[[str], int | None] = number(int, *MAX_RETRIES_RANGE)
    options = BatchOptions(
        mode={"status": "status", "gallery_only": "gallery"}.get(mode, "make"),
        input=arguments.input,
        sheet=arguments.sheet,
        prompt=arguments.prompt,
        folder=folder,
        variants=value("variants", number(int, 1, 10_000), 1),
        concurrency=value("concurrency", number(int, 1, 256), provider.calls_at_once),
        limit=value("limit", number(int, 0, 10**9 - 1), None),
        rpm=value("rpm", number(float, 0, 1_000_000), provider.requests_per_minute),
        rpm_is_given="rpm" in given,
        max_cost=value("max_cost", number(float, 0, 1_000_000), None),
        time_limit=value("time_limit", number(float, 1, 10_000_000), None),
        provider=provider,
        region=region,
        base_urls=tuple(dict.fromkeys(arguments.base_url or ())),
        trusted=trusted,
        timeout=value("timeout", number(float, *TIMEOUT_RANGE), DEFAULT_TIMEOUT),
        max_retries=value("max_retries", retries, None),
        retry_failed=arguments.retry_failed,
        retry_unknown=arguments.retry_unknown,
        accept_changes=arguments.accept_changes,
        dry_run=arguments.dry_run,
        gallery=not arguments.no_gallery,
        prompt_extend=arguments.prompt_extend,
    )
    raise_problems(problems)
    return options


def check_folder_name(option: str, name: str, folder: Path) -> None:
    """Raise `usage` for what cannot be a folder here, or would make paths that no JSON and no database can hold."""
    if not name or name != outside_text(name, len(name) + 1) or str(folder) != without_surrogates(str(folder)):
        hint = "use a name in UTF-8 without control characters, or set PYTHONUTF8=1"
        raise Failure("usage", f"{option}: must be the path of a folder, in plain text", hint=hint)
    try:
        os.lstat(folder / f"{DATABASE}-journal")  # the longest name in it that every mode looks for
    except FileNotFoundError:
        pass
    except NotADirectoryError:
        raise Failure("usage", f"{option}: {folder} is not a folder") from None
    except OSError as error:
        raise Failure("usage", f"{option}: {outside_text(name, 200)}: {os_reason(error)}") from None
