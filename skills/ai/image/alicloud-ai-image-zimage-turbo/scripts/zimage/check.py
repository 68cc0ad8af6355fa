"""Check: the free commands, dry run and connection check."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Mapping
from typing import TYPE_CHECKING, Any

from zimage.calls import HttpCall
from zimage.contract import EXIT_KEY
from zimage.errors import KINDS, Failure, raise_problems
from zimage.files import check_free_name, check_space
from zimage.keys import NO_KEY, Key
from zimage.plan import planned_endpoint, planned_provider, workspace_of
from zimage.settle import retry_wait
from zimage.transport import ask, ask_all, check_way, get_to_know
from zimage.trust import key_for, telling_of_refused, telling_of_withheld

if TYPE_CHECKING:
    from zimage.endpoint import Endpoint
    from zimage.plan import Options, Plan
    from zimage.provider import Provider, RateLimit
    from zimage.waiting import Stop


def dry_run(plan: Plan, trusted: frozenset[str], env: Mapping[str, str]) -> dict[str, Any]:
    """The whole plan, and everything that would stop it; nothing is sent, asked for or written."""
    checks: list[Callable[[], object]] = [
        lambda: key_for(plan.provider, plan.endpoint, trusted, env),
        plan.provider.preflight,
        lambda: check_way(plan.endpoint),
        lambda: check_free_name(plan.output, plan.overwrite),
        lambda: check_space(plan.output.parent),
        lambda: check_space(plan.evidence_path.parent),
    ]
    found: list[object] = []
    problems: list[Failure] = []
    for local_check in checks:
        try:
            found.append(local_check())
        except Failure as failure:
            if failure.message not in [problem.message for problem in problems]:
                problems.append(failure)
    key = next((result for result in found if isinstance(result, Key)), NO_KEY)
    plan_of_it = {
        "ok": not problems,
        "request": plan.request.as_dict(),
        "provider": plan.provider.name,
        "region": plan.endpoint.region,
        "endpoint": plan.endpoint.url,
        "endpoint_source": plan.endpoint.source,
        "payload": plan.payload,
        "settings": plan.provider.known_settings,
        "output": str(plan.output),
        "billable": plan.billable,
        "estimated_cost": plan.price.estimate,
        "cost_basis": plan.price.basis,
        "key_source": key.source or None,
        "warnings": [*plan.endpoint.warnings, *plan.warnings, *filter(None, [key.warning])],
        "problems": [failure.fault.as_json() for failure in problems],
    }
    return {name: value for name, value in plan_of_it.items() if value != {}}


def check(options: Options, stop: Stop, env: Mapping[str, str]) -> tuple[dict[str, Any], Failure | None]:
    """Free, read-only queries that show whether host, key and permission work, and what the account may send.

    Returns what is known, and the failure, never billed, that kept the rest from being known.
    """
    told: dict[str, Any] = {"ok": False}
    try:
        _look(options, stop, env, told)
    except Failure as failure:
        return told | {"error": failure.fault.as_json()}, failure
    return told | {"ok": True}, None


def _look(options: Options, stop: Stop, env: Mapping[str, str], told: dict[str, Any]) -> None:
    """Add to what is told, step by step, until something fails."""
    provider = planned_provider(options, None)
    told["provider"] = provider.name
    workspace, problems = workspace_of(provider, env)
    raise_problems(problems)
    endpoint = planned_endpoint(options, None, None, provider, env)
    told |= {"region": endpoint.region, "endpoint": endpoint.url, "endpoint_source": endpoint.source}
    key = key_for(provider, endpoint, options.trusted, env)
    told["key_source"] = key.source or None
    if warnings := [*endpoint.warnings, *filter(None, [key.warning])]:
        told["warnings"] = warnings
    provider.preflight()
    is_known = False
    attempt = 0
    while True:
        query = provider.query(endpoint, key.value, workspace)
        try:
            with telling_of_withheld(key), telling_of_refused(key, endpoint, provider):
                if isinstance(query, Generator):
                    told["model_listed"] = ask_all(query, stop, endpoint)
                else:
                    told["model_listed"] = ask(query, provider.read_query, stop, endpoint)
            break
        except Failure as error:
            if error.code == "not_found" and not is_known and isinstance(query, HttpCall):
                get_to_know(provider, endpoint, key, stop)  # servers that say what they are may be asked otherwise
                is_known = True
                if provider.query(endpoint, key.value, workspace) != query:
                    continue
            failure = free_of_charge(error)
            wait = retry_wait(failure, attempt, options.max_retries, stop)
            if wait is None:
                raise failure from None
        stop.wait(wait)
        attempt += 1
    with telling_of_refused(key, endpoint, provider):
        told |= account_facts(provider, endpoint, key, stop)
    if provider.quota.told:
        told["quota"] = provider.quota.told
    if limit := rate_limit(provider, endpoint, key, workspace, stop):
        told["rate_limit"] = limit._asdict()


LONGEST_LOOK = 5.0  # seconds for a question that may as well stay unanswered


def account_facts(provider: Provider, endpoint: Endpoint, key: Key, stop: Stop) -> dict[str, Any]:
    """Whether the key is good, where another question than that for the model tells; and what the account has.

    Raises:
        Failure: of exit code 3. Stopped.
    """
    call = provider.key_query(endpoint, key.value)
    if call is None:
        return {}
    try:
        account = ask(call, provider.read_key_query, stop.part(LONGEST_LOOK), endpoint)
    except Failure as failure:
        if failure.fault.exit_code == EXIT_KEY:
            raise free_of_charge(failure) from None
        return {"key_checked": False}
    return {"key_checked": True} | ({"account": account} if account else {})


def rate_limit(provider: Provider, endpoint: Endpoint, key: Key, workspace: str | None, stop: Stop) -> RateLimit | None:
    """What the account may send, as the service tells, asked once; None where it does not tell, whatever the reason.

    Raises:
        Stopped.
    """
    call = provider.limits(endpoint, key.value, workspace)
    if call is None:
        return None
    with contextlib.suppress(Failure):
        return ask(call, lambda answer: provider.read_limits(answer, workspace), stop.part(LONGEST_LOOK), endpoint)
    return None


def free_of_charge(failure: Failure) -> Failure:
    """The failure of a call that costs nothing: what would be unknown for a paid one is only a fault here."""
    fault = failure.fault
    code = fault.code
    if code == "outcome_unknown":
        code = "answer_unusable" if 300 <= (fault.http_status or 0) < 400 else "service_failing"
    kind = KINDS[code]
    hint = fault.hint if code == fault.code else kind.hint
    if code in ("answer_unusable", "no_image"):
        hint = "tell the user: what answers at this base URL is not the service"
    retryable = kind.retryable if code in ("service_failing", "answer_unusable") else fault.retryable
    return failure.but(code=code, billed="no", exit_code=kind.exit_code, hint=hint, retryable=retryable)
