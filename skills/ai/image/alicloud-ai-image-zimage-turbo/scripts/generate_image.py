#!/usr/bin/env python3
"""Turn words into one verified picture with Z-Image Turbo, and prove what was asked and paid.

A request (flags or JSON) is validated and normalized, sent once to the provider, and the picture is
downloaded, verified and saved beside an evidence file from which it can be recovered or made again.
Only one call costs money; everything that can be checked is checked before it, and everything that is
known after it is on disk before the next step.

This file is the command line. Beside it lie zimage/, a module a concern, and providers/, a file for each
way to the model, loaded when it is named.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "requests>=2.32.3,<3",
#   "urllib3>=2.6.3,<3",
#   "jsonschema>=4.18,<5",
#   "Pillow>=10.3,<14",
#   "truststore>=0.10,<1",
# ]
# ///
from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # no module on PYTHONPATH stands in for one of the standard library
    _standard = os.path.dirname(os.__file__)
    sys.path.sort(key=lambda folder: folder not in (_standard, os.path.join(_standard, "lib-dynload")))

import gc
import signal
import types

JSON_FLAGS = ("--print-response", "--check", "--dry-run", "--schema")


def _wants_json() -> bool:
    return any(text.partition("=")[0] in JSON_FLAGS for text in sys.argv[1:])


def _end_early(exit_code: int, code: str, message: str, hint: str) -> None:
    """Tell an error before anything of zimage can be used, and end at once: nothing has been done yet."""
    told = f'"code": "{code}", "message": "{message}", "hint": "{hint}", "exit_code": {exit_code}'
    answer = f'{{"error": {{{told}, "retryable": false, "billed": "no"}}}}\n'
    for stream, text in ((2, f"error: {code}: {message}\nnext: {hint}\n"), (1, answer if _wants_json() else "")):
        try:  # noqa: SIM105  contextlib would be one import more before signals are heard
            os.write(stream, text.encode())
        except OSError:
            pass  # nobody reads it
    os._exit(exit_code)


def _leave_early(number: int, _frame: object) -> None:
    """What a signal does until main() installs its handlers."""
    hint = "nothing was billed; run it again when you like"
    _end_early(128 + number, "interrupted", "interrupted before anything was sent", hint)


if __name__ == "__main__":
    for _signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(_signum, _leave_early)
    _here = os.path.dirname(os.path.realpath(__file__))
    if not os.path.isfile(_here) and not os.path.exists(os.path.join(_here, "zimage")):  # a file: `make standalone`
        _end_early(2, "missing_package", "this script needs zimage/ beside it", "copy the whole folder of the skill")
    _zimage = types.ModuleType("zimage")  # without an __init__.py any other package of that name would win
    _zimage.__path__ = [os.path.join(_here, "zimage")]
    sys.modules["zimage"] = _zimage
    gc.disable()  # one short run leaves nothing worth collecting, and imports are faster without

if sys.version_info < (3, 10):
    sys.stderr.write("error: Python 3.10 or newer is needed\nnext: run it with `uv run --script`, or a newer python3\n")
    sys.exit(2)

from collections.abc import Mapping, Sequence

from zimage.check import check, dry_run
from zimage.console import Console, carry_out, leave
from zimage.contract import SCHEMAS
from zimage.errors import Failure, missing_packages
from zimage.files import check_working_folder
from zimage.make import generate
from zimage.options import read_options
from zimage.plan import make_plan
from zimage.recover import recover
from zimage.waiting import WATCHER, Stop


def run(arguments: Sequence[str], stop: Stop, console: Console, env: Mapping[str, str]) -> Failure | None:
    """Do what the arguments say and print its answer; returns a failure that has been told."""
    WATCHER.listen(stop)
    options = read_options(arguments, env)
    if options.mode == "schema":
        console.answer(SCHEMAS[options.source])
        return None
    stop = Stop(options.timeout, stop)
    missing_packages()
    check_working_folder()
    if options.mode == "check":
        findings, failure = check(options, stop, env)
        if failure is None and options.deep:
            from zimage.trial import Trial

            trial = Trial(options, stop, console, env)
            findings["held"] = trial.told
            try:
                trial.run()
            except Failure as ended:
                failure = ended
                findings |= {"ok": False, "error": failure.fault.as_json()}
        if failure is not None:
            console.tell(failure)
        console.answer(findings)
        return failure
    if options.mode == "recover":
        response = recover(options, stop, console, env)
    else:
        plan = make_plan(options, stop, env)
        if options.dry_run:
            console.answer(dry_run(plan, options.trusted, env))
            return None
        response = generate(plan, options, stop, console, env)
    console.warn(response.get("warnings", ()))
    if "paid_before" in response:
        console.note("paid before: this has cost nothing more")
    told = console.data(response) if console.json_mode else console.path(response["image_path"])
    if not told:
        console.note(f"warning: standard output cannot be written; the image is {response['image_path']}")
    return None


def main(argv: Sequence[str] | None = None, stop: Stop | None = None) -> int:
    """Run the command line; returns the exit code of the contract. Signals end `stop`."""
    stop = stop or Stop()
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = any(text.partition("=")[0] in JSON_FLAGS for text in arguments)
    console = Console(json_mode=as_json, quiet="--quiet" in arguments)
    return carry_out(lambda: run(arguments, stop, console, os.environ), console, os.environ)


if __name__ == "__main__":
    _stop = Stop()
    leave(main(stop=_stop), _stop)
