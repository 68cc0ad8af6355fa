"""Errors: every way in which a command can end other than well."""

from __future__ import annotations

import contextlib
import errno
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, cast

from zimage.contract import (
    CAN_BE_WITHOUT,
    EXIT_BALANCE,
    EXIT_BLOCKED,
    EXIT_DISK,
    EXIT_INCOMPLETE,
    EXIT_INVALID,
    EXIT_KEY,
    EXIT_SIGNAL,
    EXIT_TIME_LIMIT,
    EXIT_UNAVAILABLE,
    EXIT_UNKNOWN,
    EXIT_UNUSABLE,
    GENERATE_IMAGE,
    REQUIREMENTS,
)
from zimage.outside import mask, mask_known
from zimage.quoting import quoted

if TYPE_CHECKING:
    from zimage.facts import Error

Billed = Literal["no", "unknown", "yes"]  # in this order: what is known to be paid outranks whatever fails later
BILLED: tuple[Billed, ...] = ("no", "unknown", "yes")
Side = Literal["input", "output"]  # what content safety has refused: the words, or the picture made of them
# What else would fail: nothing, the next calls, every other picture that this server is asked for, or any at all.
Concerns = Literal["picture", "service", "server", "run"]


class Left(Enum):
    """What a failure leaves of a picture."""

    AGAIN = "again"  # not billed, and it may be sent as it is
    REFUSED = "refused"  # not billed, and it would be refused again
    OPEN = "open"  # the service works on its task
    PAID = "paid"  # it can be fetched, free
    SPENT = "spent"  # paid, and past help
    UNKNOWN = "unknown"  # it may have been billed
    ANEW = "anew"  # it may have been made, which cost nothing: it may be sent as it is


class Kind(NamedTuple):
    """What one error code means. `retryable`: the same command may run again without paying twice."""

    exit_code: int
    retryable: bool
    billed: Billed
    hint: str
    concerns: Concerns = "picture"
    leaves: Left = Left.REFUSED  # of a picture that is not billed; SPENT also of one that is


INSTALL_HINT = (
    "run it with `uv run {how} …`, or make an environment: python3 -m venv .venv && "
    ".venv/bin/pip install {packages} (then call .venv/bin/python)"
)
ASK_BEFORE_PAYING = (
    "ask the user before paying again: --replay EVIDENCE makes the same request once more and costs again"
)
RECOVER_FREE = "run next_command: it fetches the picture without paying again"
PICTURE_BLOCKED = (
    "tell the user: the picture was refused, not the prompt; another seed may pass, but ask before another try"
)
GO_ON_FREE = "run next_command: it goes on waiting for the picture without paying again"


# Of memory, processes and open files.
NO_MORE = (errno.ENOMEM, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOBUFS)


def _invalid(hint: str) -> Kind:
    return Kind(EXIT_INVALID, False, "no", hint)


def _stops(exit_code: int, hint: str) -> Kind:
    """What would stop every other picture too."""
    return Kind(exit_code, False, "no", hint, "run", Left.AGAIN)


def _denies(exit_code: int, hint: str) -> Kind:
    """What this server would say to every other picture too; another may not."""
    return _stops(exit_code, hint)._replace(concerns="server")


def _later(hint: str) -> Kind:
    """What may be over in a while."""
    return Kind(EXIT_UNAVAILABLE, True, "no", hint, "service", Left.AGAIN)


def _spent(hint: str) -> Kind:
    """Paid, and past help."""
    return Kind(EXIT_UNUSABLE, False, "yes", hint, leaves=Left.SPENT)


KINDS: dict[str, Kind] = {
    # Refused here, before anything is sent.
    "usage": _invalid("correct the arguments named above; --help lists them all"),
    "invalid_request": _invalid("correct every field named above; --schema request has the rules"),
    "file_unreadable": _invalid("give the path of a readable JSON file in UTF-8 or UTF-16"),
    "invalid_output": _invalid("give --output a file name that ends in .png, .jpg or .webp"),
    "output_exists": _invalid("choose another --output, or add --overwrite to replace the file"),
    "invalid_base_url": _invalid("give the whole endpoint, the API root or the bare host, over https"),
    "host_not_trusted": _invalid(
        "tell the user: the key goes to the provider's hosts only; --trust-host is for one that they own and name"
    ),
    "invalid_account": _invalid(
        "tell the user which settings these are: variables and configuration file must name one account, readably"
    ),
    "region_mismatch": _invalid("leave out --region; or ask the user which region the key belongs to"),
    "missing_package": _invalid(INSTALL_HINT),
    "invalid_evidence": _invalid("give the path of an evidence file that this tool wrote"),
    "nothing_to_recover": _invalid("nothing was billed; make the request again (--replay EVIDENCE), which costs"),
    "missing_weights": _invalid("fetch the model first, or name the folder that holds it"),
    "too_little_memory": _invalid("free memory, take a smaller size, or use another provider"),
    "internal_error": _stops(EXIT_INVALID, "this is a fault of the tool: report it with this message"),
    "machine_limit": _stops(
        EXIT_INVALID, "end other programs, or raise the limits of memory, processes and open files; then run it again"
    ),
    "key_missing": _stops(EXIT_KEY, "tell the user; a key never belongs in the chat or on a command line"),
    "key_malformed": _stops(EXIT_KEY, "tell the user to store the key again, alone and without spaces"),
    "disk": _stops(EXIT_DISK, "make the folder writable and free some space, then run it again"),
    # Answered by the service, and not billed.
    "rejected_by_service": _invalid("correct the request as the service's message says"),
    "not_found": _denies(
        EXIT_INVALID, "tell the user: the model or path is not there; region and base URL are theirs to change"
    ),
    "key_rejected": _denies(EXIT_KEY, "tell the user; it may be the key of another region or another account"),
    "access_denied": _denies(
        EXIT_KEY, "tell the user to activate the model and check permissions in the provider's console"
    ),
    "balance": _denies(EXIT_BALANCE, "tell the user to settle the account; do not retry"),
    "quota": _denies(EXIT_BALANCE, "tell the user that the quota is used up; do not retry"),
    "blocked": Kind(
        EXIT_BLOCKED, False, "no", "show the user the prompt that was refused; reword it only with their consent"
    ),
    "rate_limited": _later("wait retry_after_s, or a minute where it is not given, then run it once more"),
    "service_failing": _later("wait a minute, then run it once more"),
    "unreachable": _later("check network, proxy, certificates and base URL, then run it once more"),
    "task_failed": Kind(
        EXIT_UNAVAILABLE, True, "no", "nothing was billed; run it once more, then tell the user", "service"
    ),
    "too_slow": _later("give a longer --timeout or a smaller size; nothing was billed")._replace(retryable=False),
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
    "image_unusable": _spent("run next_command once, free; then report it, and do not pay again unasked"),
    "image_too_large": _spent("report it; do not pay again unasked"),
    "hop_refused": _spent("report it: the link leads where no picture should be fetched from"),
    "link_expired": _spent("the picture can only be made again: ask the user, then --replay EVIDENCE (costs)"),
    "link_refused": Kind(
        EXIT_UNUSABLE, False, "yes", "run next_command once, free; then report it, and do not pay again unasked"
    ),
    "disk_after_paying": Kind(
        EXIT_DISK, False, "yes", "free space or mend the folder, then run next_command, free", "run", Left.AGAIN
    ),
    "interrupted": Kind(EXIT_SIGNAL, False, "no", "nothing was billed; run it again when you like"),
    # Of a batch.
    "invalid_rows": _invalid("correct the rows named above; nothing has been sent"),
    "changed_rows": _invalid(
        "undo the change, use another --output-dir, or, if the user agrees to the cost, add --accept-changes"
    ),
    "already_running": Kind(
        EXIT_INVALID, True, "no", "wait for it: --status DIR tells how far it is; never start a second one"
    ),
    "no_batch": _invalid("give the --output-dir of a batch that has been started"),
    "batch_unreadable": _invalid("use another --output-dir; pictures and evidence in this one stay as they are"),
    "incomplete": Kind(EXIT_INCOMPLETE, True, "no", "run the same command again"),
    "time_limit": Kind(EXIT_TIME_LIMIT, True, "no", "run the same command again, until it ends with another exit code"),
}


NOT_TOLD = ("lasting", "everywhere", "answer")  # fields of Fault


class Fault(NamedTuple):
    """What went wrong, with all its facts: fields of the error object (ERROR_SCHEMA). A value, never changed."""

    code: str
    message: str
    hint: str
    exit_code: int
    retryable: bool
    billed: Billed
    problems: Sequence[str] | None = None
    problem_count: int | None = None
    changes: Mapping[str, Any] | None = None
    progress: Mapping[str, Any] | None = None
    next_command: str | None = None
    retry_after_s: float | None = None
    http_status: int | None = None
    service_code: str | None = None
    request_id: str | None = None
    evidence_path: str | None = None
    image_url: str | None = None
    seed: int | None = None  # that was sent, or would have been
    estimated_cost: float | None = None  # US$ that were, or may have been, billed for the picture
    prompt: str | None = None  # that was refused
    refused: Side | None = None
    lasting: bool = False  # what is free now will not help later either; not told
    everywhere: bool = False  # it would end so for every other picture there too; not told
    answer: Mapping[str, Any] | None = None  # of the service, for the evidence (UNREAD_SCHEMA); not told

    @classmethod
    def of(cls, code: str, message: str, **given: Any) -> Fault:
        """A fault of a kind, whose facts hold where none is given (None gives none). An unknown fact is a TypeError."""
        kind = KINDS[code]
        facts: dict[str, Any] = kind._asdict()
        del facts["concerns"], facts["leaves"]
        return cls(code, message, **facts | {name: value for name, value in given.items() if value is not None})

    @property
    def concerns(self) -> Concerns:
        """Whom it concerns: as its kind does, unless more is known of this one."""
        return "server" if self.everywhere else KINDS[self.code].concerns

    def as_json(self) -> Error:
        """The error object of the contract. Paths, links and commands stay whole, in hints too."""
        told = {name: value for name, value in self._asdict().items() if value is not None and name not in NOT_TOLD}
        told |= {"message": mask(self.message), "hint": mask_known(self.hint)}
        if self.problems is not None:
            told["problems"] = [mask(problem) for problem in self.problems]
        return cast("Error", told)


class Failure(Exception):
    """An end of a command that its user must know about: it carries a fault, and decides nothing."""

    def __init__(self, code: str, message: str, **given: Any) -> None:
        super().__init__(message)
        self._fault = Fault.of(code, message, **given)

    @property
    def fault(self) -> Fault:
        return self._fault

    @property
    def code(self) -> str:
        return self._fault.code

    @property
    def message(self) -> str:
        return self._fault.message

    def but(self, **changes: Any) -> Failure:
        """The same failure with other facts: for whoever knows more."""
        other = Failure.__new__(Failure, self.message)
        other._fault = self._fault._replace(**changes)
        return other


class NotSent(Exception):
    """The request surely did not reach the service.

    `lasting`: trying again at once will not help, nor will it go better for another picture. `refused`: by our own
    rules, not by the network. `hint`: what to do, where more is known than that the network failed.
    """

    def __init__(self, reason: str, *, lasting: bool = False, refused: bool = False, hint: str | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting
        self.refused = refused
        self.hint = hint


class Problem(NamedTuple):
    """One thing wrong with what the user gave: its error code, a sentence naming the field, special advice."""

    code: str
    text: str
    hint: str | None = None


MOST_TOLD = 100  # problems of one request: a stranger's may have any number


def raise_problems(problems: Sequence[Problem]) -> None:
    """Raise all problems as one Failure; none raises nothing."""
    problems = list(dict.fromkeys(problems))
    if not problems:
        return
    if len(problems) == 1:
        code, text, hint = problems[0]
        raise Failure(code, text, hint=hint, problems=[text])
    codes = {problem.code for problem in problems}
    texts = [problem.text for problem in problems]
    code, hint = codes.pop() if len(codes) == 1 else "invalid_request", None
    for problem in problems:
        if problem.code == "host_not_trusted":  # else "correct every field" would lead there
            code, hint = (
                problem.code,
                f"{problem.hint or KINDS[problem.code].hint}; then correct what else is named above",
            )
    told = texts if len(texts) <= MOST_TOLD else [*texts[:MOST_TOLD], f"and {len(texts) - MOST_TOLD} more"]
    raise Failure(code, f"{len(texts)} problems: {'; '.join(told)}", hint=hint, problems=told)


@contextlib.contextmanager
def noting(problems: list[Problem]) -> Iterator[None]:
    """Add a failure to the problems instead of stopping at it, so that all are told at once."""
    try:
        yield
    except Failure as failure:
        problems.append(Problem(failure.code, failure.message, failure.fault.hint))


def os_reason(error: Exception) -> str:
    """The plain reason of an OSError or ValueError, without the path."""
    return (getattr(error, "strerror", None) or str(error) or type(error).__name__).lower()


def missing_packages(requirements: Mapping[str, str] = REQUIREMENTS, script: Path = GENERATE_IMAGE) -> None:
    """Stop before anything else where a package is missing.

    Raises:
        Failure: missing_package, with how to install all of them.
    """
    needed = [name for name in requirements if name not in CAN_BE_WITHOUT]
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise missing_package(", ".join(requirements[name] for name in missing), requirements, script)


def missing_package(what: str, requirements: Mapping[str, str], script: Path, beyond: Sequence[str] = ()) -> Failure:
    """The failure that says how to install what is required; `beyond` is what the script's own list does not name."""
    packages = [name for name in map(quoted, requirements.values()) if name]
    name = quoted(str(script)) or script.name
    # In an archive uv finds no list of packages.
    more = [word for package in beyond for word in ("--with", quoted(package) or package)]
    how = (
        [*more, "--script"]
        if script.suffix == ".py"
        else ["--no-project", *(f"--with {p}" for p in packages), "python"]
    )
    hint = INSTALL_HINT.format(how=" ".join([*how, name]), packages=" ".join(packages))
    return Failure("missing_package", f"missing Python package: {what}", hint=hint)


def internal_error(error: Exception, **facts: Any) -> Failure:
    """A fault of this tool: named with its place, without a traceback (its values could hold the key).

    Where the machine gives no more, which may show anywhere, that is no fault.
    """
    if isinstance(error, MemoryError) or getattr(error, "errno", None) in NO_MORE:
        return Failure("machine_limit", f"this machine gives no more: {os_reason(error)}", **facts)
    frame = error.__traceback__
    while frame and frame.tb_next:
        frame = frame.tb_next
    place_of = f" at line {frame.tb_lineno} of {Path(frame.tb_frame.f_code.co_filename).name}" if frame else ""
    return Failure("internal_error", f"{type(error).__name__}{place_of}", **facts)
