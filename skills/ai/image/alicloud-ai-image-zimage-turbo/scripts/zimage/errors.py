"""Errors: every way in which a command can end other than well."""

from __future__ import annotations

import contextlib
import importlib.util
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from zimage.contract import (
    ERROR_SCHEMA,
    EXIT_BALANCE,
    EXIT_BLOCKED,
    EXIT_DISK,
    EXIT_INVALID,
    EXIT_KEY,
    EXIT_SIGNAL,
    EXIT_UNAVAILABLE,
    EXIT_UNKNOWN,
    EXIT_UNUSABLE,
    REQUIREMENTS,
)
from zimage.contract import GENERATE_IMAGE as GENERATE_IMAGE
from zimage.outside import mask


class Kind(NamedTuple):
    """What one error code means: exit code, whether the same command may run again, billing, advice."""

    exit_code: int
    retryable: bool
    billed: str  # no | yes | unknown
    hint: str


INSTALL_HINT = (
    "run it with `uv run --script {script} …`, or make an environment: python3 -m venv .venv && "
    ".venv/bin/pip install {packages} (then call .venv/bin/python)"
)
ASK_BEFORE_PAYING = (
    "ask the user before paying again: --replay EVIDENCE makes the same request once more and costs again"
)
MAKE_ANEW = "the picture may have been made; --replay EVIDENCE makes it once more, which costs only time"
RECOVER_FREE = "run next_command: it fetches the picture without paying again"
GO_ON_FREE = "run next_command: it goes on waiting for the picture without paying again"

KINDS: dict[str, Kind] = {
    # Refused here, before anything is sent.
    "usage": Kind(EXIT_INVALID, False, "no", "correct the arguments named above; --help lists them all"),
    "invalid_request": Kind(
        EXIT_INVALID, False, "no", "correct every field named above; --schema request has the rules"
    ),
    "file_unreadable": Kind(EXIT_INVALID, False, "no", "give the path of a readable JSON file in UTF-8 or UTF-16"),
    "invalid_output": Kind(EXIT_INVALID, False, "no", "give --output a file name that ends in .png, .jpg or .webp"),
    "output_exists": Kind(EXIT_INVALID, False, "no", "choose another --output, or add --overwrite to replace the file"),
    "invalid_base_url": Kind(
        EXIT_INVALID, False, "no", "give the whole endpoint, the API root or the bare host, over https"
    ),
    "host_not_trusted": Kind(
        EXIT_INVALID,
        False,
        "no",
        "use the provider's own host; --trust-host is only for a host that the user owns and names: ask them first",
    ),
    "region_mismatch": Kind(EXIT_INVALID, False, "no", "leave out --region, or give the base URL of that region"),
    "missing_package": Kind(EXIT_INVALID, False, "no", INSTALL_HINT),
    "invalid_evidence": Kind(EXIT_INVALID, False, "no", "give the path of an evidence file that this tool wrote"),
    "nothing_to_recover": Kind(
        EXIT_INVALID, False, "no", "nothing was billed; make the request again (--replay EVIDENCE), which costs"
    ),
    "missing_weights": Kind(EXIT_INVALID, False, "no", "fetch the model first, or name the folder that holds it"),
    "too_little_memory": Kind(EXIT_INVALID, False, "no", "free memory, take a smaller size, or use another provider"),
    "internal_error": Kind(EXIT_INVALID, False, "no", "this is a fault of the tool: report it with this message"),
    "key_missing": Kind(EXIT_KEY, False, "no", "tell the user; a key never belongs in the chat or on a command line"),
    "key_malformed": Kind(EXIT_KEY, False, "no", "tell the user to store the key again, alone and without spaces"),
    "disk": Kind(EXIT_DISK, False, "no", "make the folder writable and free some space, then run it again"),
    # Answered by the service, and not billed.
    "rejected_by_service": Kind(EXIT_INVALID, False, "no", "correct the request as the service's message says"),
    "not_found": Kind(EXIT_INVALID, False, "no", "check region and base URL: the model or path is not there"),
    "key_rejected": Kind(
        EXIT_KEY, False, "no", "tell the user; it may be the key of another region (--region) or another account"
    ),
    "access_denied": Kind(
        EXIT_KEY, False, "no", "tell the user to activate the model and check permissions in the provider's console"
    ),
    "balance": Kind(EXIT_BALANCE, False, "no", "tell the user to settle the account; do not retry"),
    "quota": Kind(EXIT_BALANCE, False, "no", "tell the user that the quota is used up; do not retry"),
    "blocked": Kind(EXIT_BLOCKED, False, "no", "tell the user; reword the prompt only with their consent"),
    "rate_limited": Kind(
        EXIT_UNAVAILABLE, True, "no", "wait retry_after_s, or a minute where it is not given, then run it once more"
    ),
    "service_failing": Kind(EXIT_UNAVAILABLE, True, "no", "wait a minute, then run it once more"),
    "unreachable": Kind(
        EXIT_UNAVAILABLE, True, "no", "check network, proxy, certificates and base URL, then run it once more"
    ),
    "task_failed": Kind(EXIT_UNAVAILABLE, True, "no", "nothing was billed; run it once more, then tell the user"),
    "too_slow": Kind(EXIT_UNAVAILABLE, False, "no", "give a longer --timeout or a smaller size; nothing was billed"),
    "refused_by_service": Kind(EXIT_UNUSABLE, False, "no", "report the status and message; do not rerun unasked"),
    # After the request has left.
    "outcome_unknown": Kind(EXIT_UNKNOWN, False, "unknown", ASK_BEFORE_PAYING),
    "paid_not_downloaded": Kind(EXIT_UNKNOWN, False, "yes", RECOVER_FREE),
    "no_image": Kind(
        EXIT_UNUSABLE,
        False,
        "unknown",
        "tell the user: no picture came back (often content safety); do not rerun unasked",
    ),
    "answer_unusable": Kind(EXIT_UNUSABLE, False, "unknown", "report it; do not rerun unasked, it may cost again"),
    "image_unusable": Kind(
        EXIT_UNUSABLE,
        False,
        "yes",
        "run next_command once, free; then report it, and do not pay again unasked",
    ),
    "image_too_large": Kind(EXIT_UNUSABLE, False, "yes", "report it; do not pay again unasked"),
    "hop_refused": Kind(
        EXIT_UNUSABLE, False, "yes", "report it: the link leads where no picture should be fetched from"
    ),
    "link_expired": Kind(
        EXIT_UNUSABLE, False, "yes", "the picture can only be made again: ask the user, then --replay EVIDENCE (costs)"
    ),
    "link_refused": Kind(
        EXIT_UNUSABLE, False, "yes", "run next_command once, free; then report it, and do not pay again unasked"
    ),
    "disk_after_paying": Kind(EXIT_DISK, False, "yes", "free space or mend the folder, then run next_command, free"),
    "interrupted": Kind(EXIT_SIGNAL, False, "no", "nothing was billed; run it again when you like"),
}


class Failure(Exception):
    """An end of a command that its user must know about.

    `code` is a key of KINDS, which gives exit code, retryable, billed and hint unless `facts` overrides them;
    the other facts are fields of the error object (ERROR_SCHEMA).
    """

    def __init__(self, code: str, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.facts = {name: value for name, value in facts.items() if value is not None}

    def fact(self, name: str) -> Any:
        """The named fact, from this failure or else from its kind."""
        return self.facts.get(name, getattr(KINDS[self.code], name, None))

    @property
    def exit_code(self) -> int:
        return int(self.fact("exit_code"))

    @property
    def billed(self) -> str:
        return str(self.fact("billed"))

    def object(self) -> dict[str, Any]:
        """The error object of the contract. Key-like text is masked; paths, links and commands stay whole."""
        result = {
            "code": self.code,
            "message": mask(self.message),
            "hint": mask(self.fact("hint")),
            "exit_code": self.exit_code,
            "retryable": self.fact("retryable"),
            "billed": self.billed,
        }
        for name in ERROR_SCHEMA["properties"]:
            if name not in result and name in self.facts:
                result[name] = self.facts[name]
        if "problems" in result:
            result["problems"] = [mask(problem) for problem in result["problems"]]
        return result


class Problem(NamedTuple):
    """One thing wrong with what the user gave: its error code, a sentence naming the field, special advice."""

    code: str
    text: str
    hint: str | None = None


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise all problems as one Failure; none raises nothing."""
    if not problems:
        return
    if len(problems) == 1:
        code, text, hint = problems[0]
        raise Failure(code, text, hint=hint, problems=[text])
    codes = {problem.code for problem in problems}
    texts = [problem.text for problem in problems]
    code = codes.pop() if len(codes) == 1 else "invalid_request"
    raise Failure(code, f"{len(texts)} problems: {'; '.join(texts)}", problems=texts)


@contextlib.contextmanager
def noting(problems: list[Problem]) -> Iterator[None]:
    """Add a failure to the problems instead of stopping at it, so that all are told at once."""
    try:
        yield
    except Failure as failure:
        problems.append(Problem(failure.code, failure.message, failure.facts.get("hint")))


def os_reason(error: Exception) -> str:
    """The plain reason of an OSError or ValueError, without the path."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


def missing_packages(requirements: Mapping[str, str] = REQUIREMENTS, script: Path = GENERATE_IMAGE) -> None:
    """Stop before anything else where a package is missing.

    Raises:
        Failure: missing_package, with how to install all of them.
    """
    missing = [name for name in requirements if importlib.util.find_spec(name) is None]
    if missing:
        raise missing_package(", ".join(requirements[name] for name in missing), requirements, script)


def missing_package(
    what: str, requirements: Mapping[str, str] = REQUIREMENTS, script: Path = GENERATE_IMAGE
) -> Failure:
    packages = " ".join(f"'{requirement}'" for requirement in requirements.values())
    hint = INSTALL_HINT.format(script=shlex.quote(str(script)), packages=packages)
    return Failure("missing_package", f"missing Python package: {what}", hint=hint)


def internal_error(error: Exception, **facts: Any) -> Failure:
    """A fault of this tool: named with its place, without a traceback (its values could hold the key)."""
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    place_of = f" at line {frame.tb_lineno} of {Path(frame.tb_frame.f_code.co_filename).name}" if frame else ""
    return Failure("internal_error", f"{type(error).__name__}{place_of}", **facts)
