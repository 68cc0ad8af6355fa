"""Plan: everything that is decided before money is spent."""

from __future__ import annotations

import datetime as dt
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from zimage.account import Account
from zimage.contract import FORMATS, MAX_REQUEST_BYTES, MAX_SIDE, MIB, REQUEST_SCHEMA, SKILL, VERSION
from zimage.errors import Failure, Problem, noting, raise_problems
from zimage.evidence import Evidence, Folders, new_evidence_id, timestamp, utc_now
from zimage.files import check_free_name, permissions_warning
from zimage.outside import outside_text, shown
from zimage.paths import checked_output, slug_of
from zimage.registry import DEFAULT_PROVIDER, provider_class, provider_named
from zimage.request import decode_json_file, normalize, parse_json, read_input, request_problems
from zimage.trust import Own, choose_endpoint, recorded_endpoint

if TYPE_CHECKING:
    from zimage.endpoint import Endpoint
    from zimage.facts import AskedAt, Content, Cost, Sent
    from zimage.provider import Price, Provider
    from zimage.request import ImageRequest
    from zimage.waiting import Stop


class Options(NamedTuple):
    """The command line after checking: typed, defaults filled in."""

    mode: str  # request | file | prompt | replay | recover | check | schema
    source: str  # the mode's argument
    overrides: dict[str, Any]  # request fields that flags set
    base_url: str | None
    region: str | None
    provider: type[Provider] | None
    settings: dict[str, Any]  # the provider's own options that are given
    output: str | None
    overwrite: bool
    dry_run: bool
    timeout: float
    max_retries: int | None  # None: as often as the table of `settle` says
    trusted: frozenset[str]
    problems: tuple[Problem, ...]  # of the arguments, to be told together with those of the request
    deep: bool = False  # --check draws pictures
    accept_cost: bool = False


class Plan(NamedTuple):
    """Everything about one paid call that is decided before it is made."""

    provider: Provider
    endpoint: Endpoint
    request: ImageRequest
    payload: dict[str, Any]
    price: Price
    workspace: str | None
    output: Path
    overwrite: bool
    evidence_path: Path
    warnings: tuple[str, ...]

    @property
    def billable(self) -> bool:
        """Whether the call can cost money or quota, also where nobody knows how much."""
        return self.provider.is_billable_at(self.endpoint)

    @classmethod
    def of(cls, provider: Provider, endpoint: Endpoint, request: ImageRequest, **decided: Any) -> Plan:
        """The plan of a request; `decided` are the fields that do not follow from it."""
        if not provider.takes_seed:
            request = request._replace(seed=None)
        return cls(
            provider=provider,
            endpoint=endpoint,
            request=request,
            payload=provider.payload(request),
            price=provider.price_at(request, endpoint),
            warnings=(*request_warnings(request, provider), *provider.notes(request)),
            **decided,
        )

    def anew(self) -> Plan:
        """The same plan with what its provider has learnt of the server since."""
        renewed = Plan.of(
            self.provider,
            self.endpoint,
            self.request,
            workspace=self.workspace,
            output=self.output,
            overwrite=self.overwrite,
            evidence_path=self.evidence_path,
        )
        return renewed._replace(warnings=tuple(dict.fromkeys((*self.warnings, *renewed.warnings))))

    @property
    def sent(self) -> Sent:
        """What the evidence says of the call itself. None: it says nothing."""
        return {
            "billable": self.billable,
            "request": self.request.as_dict(),
            "payload": self.payload,
            "settings": self.provider.known_settings or None,
            "unused": list(self.provider.unused()) or None,
        }

    @property
    def asked_at(self) -> AskedAt:
        """What the evidence says of where it is asked for, and at what price. None: it says nothing."""
        cost: Cost = {
            "currency": "USD",
            "basis": self.price.basis,
            "price_list_date": self.price.price_list_date,
        }
        if self.price.estimate is not None:
            cost["estimate"] = self.price.estimate
        return {
            "region": self.endpoint.region,
            "endpoint": self.endpoint.url,
            "endpoint_source": self.endpoint.source or None,
            "cost": cost,
        }

    def evidence(self, now: dt.datetime) -> Content:
        """The content of the evidence file at the moment when the request leaves."""
        content: dict[str, Any] = {
            "schema_version": 1,
            "tool": {"name": SKILL, "version": VERSION},
            "status": "submitting",
            "provider": self.provider.name,
            "operation": "image.generate",
            "output": str(self.output),
            "started_at": timestamp(now),
            "attempts": [],
        }
        content |= {**self.asked_at, **self.sent}
        return cast("Content", {name: value for name, value in content.items() if value is not None})


def make_plan(options: Options, stop: Stop, env: Mapping[str, str]) -> Plan:
    """Validate everything about a request, name every problem at once, and decide what would be sent where.

    Raises:
        Failure: of exit code 2.
    """
    problems = list(options.problems)
    raw, recorded = None, None
    with noting(problems):
        raw, recorded = read_request(options, stop)
    if raw is None:
        raise_problems(problems)
    provider = planned_provider(options, recorded)
    problems += problems_for(provider, raw)
    workspace, more = workspace_of(provider, env)
    problems += more
    evidence_id = new_evidence_id(utc_now())
    output, endpoint = None, None
    with noting(problems):
        if options.output is not None:
            output = checked_output(options.output, "--output")
        else:
            hint = "set OUTPUT_DIR to the path of a folder, or unset it"
            output = checked_output(str(default_output(raw, evidence_id, env)), "OUTPUT_DIR", hint)
    with noting(problems):
        endpoint = planned_endpoint(options, raw, recorded, provider, env)
    if problems and output:
        with noting(problems):  # told with the others; alone, it is a local check
            check_free_name(output, options.overwrite)
    raise_problems(problems)
    if endpoint is None or output is None:  # each of them has left a problem
        raise AssertionError
    request = normalize(raw, with_seed=provider.takes_seed)
    raise_problems(format_problems(request, output))
    folder = Folders.of(env).evidence
    plan = Plan.of(
        provider,
        endpoint,
        request,
        workspace=workspace,
        output=output,
        overwrite=options.overwrite,
        evidence_path=folder / f"{evidence_id}.json",
    )
    more_warnings = (*alone_warnings(provider), *filter(None, [permissions_warning(folder)]))
    return plan._replace(warnings=(*plan.warnings, *more_warnings))


def read_request(options: Options, stop: Stop) -> tuple[Any, Content | None]:
    """The request as written, flags applied; and, for --replay, the evidence that it comes from."""
    recorded = None
    if options.mode == "replay":
        recorded = Evidence.load("--replay", options.source, stop).data
        raw: Any = {name: value for name, value in recorded["request"].items() if name != "base_url"}
        if (drawn_from := recorded.get("response", {}).get("seed")) is not None:
            raw["seed"] = drawn_from
    elif options.mode == "prompt":
        raw = {"prompt": options.source}
    elif options.mode == "file":
        raw = decode_json_file(options.source, read_input("--file", options.source, MAX_REQUEST_BYTES, stop))
    else:
        if len(options.source) > MAX_REQUEST_BYTES:
            raise Failure("invalid_request", f"--request: larger than {MAX_REQUEST_BYTES // MIB} MiB")
        try:
            raw = parse_json(options.source)
        except ValueError as error:
            hint = "quote the JSON for your shell, or write it to a file and use --file FILE"
            raise Failure(
                "invalid_request", f"--request: is not valid JSON: {outside_text(error)}", hint=hint
            ) from None
    if not isinstance(raw, dict):
        return raw, recorded
    if {"size", "aspect_ratio"} & set(options.overrides):
        raw = {name: value for name, value in raw.items() if name not in ("size", "aspect_ratio")}
    return raw | options.overrides, recorded


def problems_for(provider: Provider, raw: Any) -> list[Problem]:
    """Everything wrong with a request for this provider: with the request as such, and with what is sound of it."""
    problems = request_problems(raw)
    if not isinstance(raw, dict):
        return problems
    wrong = {name for problem in problems for name in problem.text.partition(":")[0].split(", ")}
    sound = {name: raw[name] for name in REQUEST_SCHEMA["properties"] if name in raw and name not in wrong}
    sentences = provider.cannot(normalize({"prompt": "x"} | sound, with_seed=provider.takes_seed))
    return problems + [Problem("invalid_request", text) for text in sentences]


def planned_provider(options: Options, recorded: Content | None) -> Provider:
    """The provider that a flag names, else that of the evidence that is replayed, set up as it was then."""
    name = options.provider.name if options.provider else recorded["provider"] if recorded else DEFAULT_PROVIDER
    earlier = recorded.get("settings", {}) if recorded and recorded["provider"] == name else {}
    earlier = {name: value for name, value in earlier.items() if name not in options.settings}
    return provider_named(name, checked_settings(provider_class(name), earlier) | options.settings)


def checked_settings(provider: type[Provider], recorded: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that an evidence file holds, each read as the command line would.

    Raises:
        Failure: invalid_evidence.
    """
    known = {setting.name: setting for setting in provider.own_settings}
    settings = {}
    for name, value in recorded.items():
        try:
            settings[name] = known[name].read(known[name].said(value))
            if settings[name] != value or type(settings[name]) is not type(value):
                raise ValueError(f"as the command line reads it: {shown(settings[name])}")
        except (KeyError, ValueError) as error:
            what = "is not known" if isinstance(error, KeyError) else f"must be {error}"
            raise Failure("invalid_evidence", f"settings.{outside_text(name, 60)}: {what}") from None
    return settings


def planned_endpoint(
    options: Options, raw: Any, recorded: Content | None, provider: Provider, env: Mapping[str, str]
) -> Endpoint:
    """The endpoint of a request; a replayed one goes where the first one went unless a flag says otherwise."""
    request_url = raw.get("base_url") if isinstance(raw, dict) else None
    if not isinstance(request_url, str) or not request_url:
        request_url = None  # where it is of another type or empty, the schema says so
    region = options.region
    replayed = recorded is not None and recorded["provider"] == provider.name and region is None
    if recorded and replayed:
        request_url = recorded["endpoint"]
        if not options.base_url and not provider.in_process:
            recorded_endpoint(request_url, provider, Own(None, options.trusted, env))
        region = recorded["region"] if recorded["region"] in provider.roots and not options.base_url else None
    return choose_endpoint(
        provider,
        flag=options.base_url,
        request_url=request_url,
        request_source="--replay" if replayed else "base_url",
        region=region,
        env=env,
        trusted=options.trusted,
    )


def workspace_of(provider: Provider, env: Mapping[str, str]) -> tuple[str | None, list[Problem]]:
    """The workspace that calls name in a header, and what is wrong with what the user's settings say of it."""
    problems: list[Problem] = []
    with noting(problems):
        workspace = Account(provider, env).workspace
        return workspace.value if workspace else None, []
    return None, problems


def default_output(raw: Any, evidence_id: str, env: Mapping[str, str]) -> Path:
    """Where a picture goes that was given no name: named as its evidence, plus a slug of the prompt."""
    prompt = raw.get("prompt") if isinstance(raw, dict) else None
    slug = slug_of(prompt) if isinstance(prompt, str) else ""
    return Folders.of(env).images / ("-".join(filter(None, (evidence_id, slug))) + ".png")


def format_problems(request: ImageRequest, output: Path) -> list[Problem]:
    """A picture that the output's format cannot hold is refused before it is paid for."""
    limit = MAX_SIDE[FORMATS[output.suffix.lower()]]
    if max(request.width_height) <= limit:
        return []
    return [Problem("invalid_output", f"--output: {output.suffix} holds sides up to {limit} pixels; use .png")]


def alone_warnings(provider: Provider) -> list[str]:
    """What is told of settings that are of use in a batch only."""
    known = provider.known_settings
    return [setting.alone for setting in provider.own_settings if setting.alone and setting.name in known]


def request_warnings(request: ImageRequest, provider: Provider) -> tuple[str, ...]:
    if len(request.prompt) <= provider.long_prompt:
        return ()
    return (f"prompt: {len(request.prompt)} characters; the service may cut it at {provider.long_prompt}",)
