"""Options: the command line of one picture."""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from zimage.contract import (
    DEFAULT_MAX_RETRIES,
    DEFAULT_TIMEOUT,
    MAX_EVIDENCE_BYTES,
    MAX_RETRIES_RANGE,
    MAX_SEED,
    RATIO_SIZES,
    SCHEMAS,
    TIMEOUT_RANGE,
    VERSION,
)
from zimage.errors import Failure, Problem, noting, os_reason, raise_problems
from zimage.files import read_file
from zimage.outside import argument_text, at, json_of, outside_text, shown
from zimage.paths import user_path
from zimage.plan import Options
from zimage.registry import DEFAULT_PROVIDER, provider_class, provider_names
from zimage.request import ratio_in, seed_in
from zimage.settings import number
from zimage.trust import trusted_hosts

if TYPE_CHECKING:
    from zimage.provider import Provider
    from zimage.settings import Setting


MODES = ("request", "file", "prompt", "replay", "recover", "check", "schema")
PATHS = ("file", "replay", "recover", "output")
TEXT_FILES = (".txt", ".md", ".json", ".jsonl", ".ndjson", ".csv", ".tsv", ".xlsx")
REQUEST_FLAGS = ("size", "aspect_ratio", "seed", "prompt_extend", "base_url")
ALWAYS_ALLOWED = {"print_response", "quiet"}
ALLOWED: dict[str, set[str]] = {  # the flags that mean something in a mode; those not named here allow all
    "recover": ALWAYS_ALLOWED | {"output", "overwrite", "timeout", "trust_host", "base_url"},
    "check": ALWAYS_ALLOWED
    | {"base_url", "region", "provider", "timeout", "max_retries", "trust_host", "deep", "accept_cost"},
    "schema": ALWAYS_ALLOWED,
}

DESCRIPTION = (
    "Turn words into one picture with Z-Image Turbo. Only --request, --file, --prompt and --replay cost money."
)
EPILOG = """\
exit codes:
  0  image saved                        6  rate limited, failing or not reachable
  2  invalid request, usage or file     7  outcome unknown, or paid and not downloaded yet
  3  key missing, wrong, no permission  8  the answer or the image cannot be used
  4  balance or quota used up           9  the local disk
  5  refused by content safety          130, 143  interrupted

stdout carries data only: the path of the saved image, or one JSON object. The last line on stderr
of every error says what to do next. Key: {key}.
"""


class Parser(argparse.ArgumentParser):
    """argparse whose errors are failures like all others."""

    def __init__(self, prog: str = "", description: str = "", epilog: str = "", *, add_help: bool = True) -> None:
        kind = argparse.RawDescriptionHelpFormatter
        super().__init__(prog, None, description, epilog, formatter_class=kind, add_help=add_help, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse does. Where that drops the value of `--option=--` (Python before 3.13), it is put back."""
        found, unknown = super().parse_known_args(args, namespace)
        for name, value in vars(found).items():
            if isinstance(value, list):
                setattr(found, name, [item or "--" for item in value] or "--")
        return found, unknown

    def error(self, message: str) -> NoReturn:
        hint = None
        if "expected one argument" in message:
            hint = "give it a value; one that begins with - goes behind an equals sign: --prompt=-text"
        raise Failure("usage", outside_text(message), hint=hint)


def build_parser(provider: type[Provider] | None = None) -> Parser:
    """The command line of the contract. Values stay text here: `read_options` checks them all at once."""
    key = (provider or provider_class(DEFAULT_PROVIDER)).key_hint()
    parser = Parser("generate_image.py", DESCRIPTION, EPILOG.format(key=key))
    mode = parser.add_argument_group("what to do (exactly one)")
    mode.add_argument("--request", metavar="JSON", type=argument_text, help="the request as a JSON object")
    mode.add_argument("--file", metavar="PATH", help="the request in a JSON file, - for standard input")
    mode.add_argument("--prompt", metavar="TEXT", type=argument_text, help="the request's prompt alone")
    mode.add_argument("--replay", metavar="EVIDENCE", help="make the picture of an evidence file again (paid again)")
    mode.add_argument("--recover", metavar="EVIDENCE", help="finish a paid picture without paying")
    mode.add_argument("--check", action="store_true", help="one free query: does host, key and permission work?")
    mode.add_argument("--schema", metavar="WHAT", help="print a JSON Schema: request, response, evidence or result")

    request = parser.add_argument_group("request (wins over the request's own fields)")
    request.add_argument(
        "--size", metavar="W*H", help="pixels, such as 1280x720, or a ratio; 512*512 to 2048*2048 in total"
    )
    request.add_argument("--aspect-ratio", metavar="R", help=f"one of {' '.join(RATIO_SIZES)}")
    request.add_argument("--seed", metavar="N", help=f"0 to {MAX_SEED}; -1 or left out: one is picked and recorded")
    request.add_argument(
        "--prompt-extend",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="let the service rewrite the prompt: slower, about twice the price",
    )
    request.add_argument("--base-url", metavar="URL", action="append", help="whole endpoint, API root or bare host")

    service = parser.add_argument_group("service")
    add_service_options(service, provider)
    service.add_argument("--timeout", metavar="S", help=f"seconds for the whole command (default {DEFAULT_TIMEOUT:g})")
    service.add_argument(
        "--max-retries", metavar="N", help=f"of calls surely not billed (default {DEFAULT_MAX_RETRIES})"
    )

    service.add_argument("--deep", action="store_true", help="with --check: draw 2 to 4 small pictures, say what holds")
    service.add_argument("--accept-cost", action="store_true", help="with --deep: the user agrees to what these cost")

    result = parser.add_argument_group("result")
    result.add_argument("--output", metavar="PATH", help="file to save: .png, .jpg or .webp")
    result.add_argument("--overwrite", action="store_true", help="replace the file if it exists")
    result.add_argument("--print-response", action="store_true", help="print the response as JSON instead of the path")
    result.add_argument(
        "--dry-run", action="store_true", help="print the whole plan and its cost; send and write nothing"
    )
    result.add_argument("--quiet", action="store_true", help="no warnings and no evidence path on stderr")
    parser.add_argument("--version", action="version", version=f"%(prog)s {VERSION}")
    return parser


def add_service_options(group: Any, provider: type[Provider] | None) -> None:
    """The options that say which service is asked, the same for one picture and for many."""
    group.add_argument(
        "--provider",
        metavar="NAME",
        help=f"one of {', '.join(provider_names())} (default {DEFAULT_PROVIDER}); with --help, its own options too",
    )
    regions = list((provider or provider_class(DEFAULT_PROVIDER)).roots)
    default = f"{regions[0]} (default)" + "".join(f" or {region}" for region in regions[1:])
    one = "; a key belongs to one" if regions[1:] else ""
    group.add_argument("--region", metavar="REGION", help=default + one)
    group.add_argument(
        "--trust-host", metavar="HOST", action="append", help="send the key to this host too; repeatable"
    )
    for setting in provider.own_settings if provider else ():
        default = "" if setting.default is None else f" (default {setting.default})"
        options: dict[str, Any] = {"action": "append" if setting.repeatable else "store", "metavar": setting.metavar}
        if setting.is_switch:
            options = {"action": "store_true"}
        group.add_argument(flag(setting.name), help=f"{setting.help}{default}", **options)


def provider_in(argv: Sequence[str]) -> type[Provider] | None:
    """The provider that arguments name, or that of a replayed evidence file, so that its own options are known.

    What is wrong with name or file is told later.
    """
    named = Parser(add_help=False)
    for option in ("--provider", "--replay"):
        named.add_argument(option)
    with contextlib.suppress(Failure, OSError, ValueError):
        said = named.parse_known_args(argv)[0]
        if said.provider is None and said.replay is not None:
            evidence = read_file(user_path("--replay", said.replay), MAX_EVIDENCE_BYTES)
            said.provider = at(json_of(evidence.decode()), "provider")
        return None if said.provider is None else provider_class(str(said.provider))
    return None


def read_settings(provider: type[Provider], given: Mapping[str, Any], problems: list[Problem]) -> dict[str, Any]:
    """The provider's own options that are given, as values."""
    return {
        setting.name: read_value(setting.name, given, reader_of(setting), setting.default, problems)
        for setting in provider.own_settings
        if setting.name in given
    }


def reader_of(setting: Setting) -> Callable[[Any], Any]:
    """How the text of a provider's option is read: where it names a file, what that holds."""

    def read_named(name: str) -> Any:
        try:
            content = read_file(user_path(flag(setting.name), name), setting.max_bytes)
        except Failure as failure:
            raise ValueError(f"a file ({failure.message})") from None
        except OSError as error:
            raise ValueError(f"a file that can be read ({os_reason(error)})") from None
        return setting.read(content)

    return read_named if setting.max_bytes else setting.read


Value = TypeVar("Value")


def read_value(
    name: str, given: Mapping[str, Any], read: Callable[[Any], Value], default: Value, problems: list[Problem]
) -> Value:
    """What the text of an option means; the default where it is not given, or where what is wrong is noted."""
    if name in given:
        try:
            return read(given[name])
        except ValueError as error:
            said = given[name] if isinstance(given[name], str) else " ".join(given[name])
            problems.append(Problem("usage", f"{flag(name)}: must be {error}, got {shown(said)}"))
    return default


def read_paths(arguments: argparse.Namespace, names: Sequence[str], problems: list[Problem]) -> None:
    """Have the options of these names mean what their user means.

    Raises:
        Failure: usage where one cannot be, with the problems found before.
    """
    wrong: list[Problem] = []
    for name in names:
        if (text := getattr(arguments, name)) is not None:
            with noting(wrong):
                setattr(arguments, name, user_path(flag(name), text))
    if wrong:
        raise_problems([*problems, *wrong])


def prompt_problems(text: str | None, other: str) -> list[Problem]:
    """What is no prompt, though `--prompt` takes it: the name of a file, or of standard input. `other` reads those."""
    name = (text or "").removeprefix("@")
    if name == "-":
        return [Problem("usage", f"--prompt: - is no prompt; {other} - reads standard input")]
    if os.path.splitext(name)[1].lower() in TEXT_FILES and os.path.isfile(name):
        return [Problem("usage", f"--prompt: {shown(text)} is a file; {other} reads one, --prompt takes the words")]
    return []


def chosen_mode(given: Mapping[str, Any], modes: Sequence[str], problems: Sequence[Problem]) -> str:
    """The one mode that is given.

    Raises:
        Failure: usage where it is none or several, with the problems found before.
    """
    named = [name for name in modes if name in given]
    if len(named) != 1:
        names = " ".join(flag(name) for name in named or modes)
        text = f"give only one of {names}" if named else f"give one of {names}"
        raise_problems([*problems, Problem("usage", text)])
    return named[0]


def read_options(argv: Sequence[str], env: Mapping[str, str]) -> Options:
    """Check the command line as a whole; what is wrong with it is raised now, or with what is wrong with the request.

    Raises:
        Failure: usage, naming every problem.
    """
    asked = provider_in(argv)
    arguments, unknown = build_parser(asked).parse_known_args(argv)
    given = {
        name: value
        for name, value in vars(arguments).items()
        if value is not None and (value is not False or name == "prompt_extend")  # which can be switched off
    }
    problems = [Problem("usage", text) for text in unknown_sentences(unknown)]
    mode = chosen_mode(given, MODES, problems)
    read_paths(arguments, PATHS, problems)
    problems += prompt_problems(arguments.prompt, "--file")
    allowed = ALLOWED.get(mode)
    if allowed is not None:
        allowed = allowed | ({setting.name for setting in asked.own_settings} if asked else set())
        strange = [name for name in given if name not in allowed and name not in MODES]
        problems += [Problem("usage", f"{flag(name)} does not go with {flag(mode)}") for name in strange]
    for name, other in (("deep", "check"), ("accept_cost", "deep")):
        if name in given and other not in given:
            problems.append(Problem("usage", f"{flag(name)} goes with {flag(other)} only"))
    if mode == "schema" and arguments.schema not in SCHEMAS:
        problems.append(
            Problem("usage", f"--schema: must be one of {', '.join(SCHEMAS)}, got {shown(arguments.schema)}")
        )
    timeout = read_value("timeout", given, number(float, *TIMEOUT_RANGE), DEFAULT_TIMEOUT, problems)
    retries: Callable[[str], int | None] = number(int, *MAX_RETRIES_RANGE)
    max_retries = read_value("max_retries", given, retries, None, problems)
    settings = read_settings(asked, given, problems) if asked else {}
    provider, region = None, None
    with noting(problems):
        provider = None if arguments.provider is None else provider_class(arguments.provider)
    with noting(problems):
        region = region_option(arguments.region, asked or provider_class(DEFAULT_PROVIDER))
    trusted, more = trusted_hosts(arguments.trust_host or [], env)
    problems += more
    urls = list(dict.fromkeys(given.get("base_url", [])))
    if len(urls) > 1:
        what = f"--base-url: given {len(urls)} times; one picture is asked for at one address"
        problems.append(Problem("usage", what, "name one of them; a batch takes several: generate_batch.py"))
    if urls:
        given["base_url"] = urls[0]
    if mode in ALLOWED:
        raise_problems(problems)
    return Options(
        mode=mode,
        source="" if mode == "check" else getattr(arguments, mode),
        overrides=request_overrides(given),
        base_url=given.get("base_url"),
        region=region,
        provider=provider,
        settings=settings,
        output=arguments.output,
        overwrite=arguments.overwrite,
        dry_run=arguments.dry_run,
        timeout=timeout,
        max_retries=max_retries,
        trusted=trusted,
        deep=arguments.deep,
        accept_cost=arguments.accept_cost,
        problems=tuple(problems),
    )


def flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def unknown_sentences(unknown: Sequence[str]) -> list[str]:
    """Arguments that are not known. What may be an unknown option's value could be a key: it is not repeated."""
    sentences = []
    previous = ""
    for text in unknown:
        if text.startswith("-"):
            sentences.append(f"{outside_text(text.partition('=')[0], 60)}: unknown option")
        elif not previous.startswith("-") or "=" in previous:
            advice = "a prompt must be quoted; shells expand *, use x in sizes"
            sentences.append(f"{shown(text)}: stray argument ({advice})")
        previous = text
    return sentences


def region_option(name: str | None, provider: type[Provider]) -> str | None:
    """The provider's own name for the region that --region gives.

    Raises:
        Failure: usage.
    """
    if name is None:
        return None
    try:
        return provider.region_named(name)
    except ValueError as error:
        raise Failure("usage", f"--region: {error}") from None


def request_overrides(given: Mapping[str, Any]) -> dict[str, Any]:
    """The request fields that flags set."""
    overrides: dict[str, Any] = {name: given[name] for name in REQUEST_FLAGS if name in given}
    if "seed" in overrides:
        overrides["seed"] = seed_in(overrides["seed"])
    if "aspect_ratio" in overrides:
        overrides["aspect_ratio"] = ratio_in(overrides["aspect_ratio"].replace("/", ":")) or overrides["aspect_ratio"]
    return overrides
