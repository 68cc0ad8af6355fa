#!/usr/bin/env python3
"""Turn a list of prompts into verified pictures with Z-Image Turbo, and lose nothing on the way.

All rows are validated before the first is paid for. The state of every picture lies in a SQLite database in the
output folder, on disk before a request leaves and when its link arrives, so that the run can be killed at any
moment and started again with the same command. One pacer keeps all workers just under the account's rate limit.

This file is the command line. Beside it lies zimage/, which knows how one picture is asked for, paid, verified and
saved, and in it batch/, a module a concern:

    contract -> rows -> plan      the input, validated and held against the folder, before anything is paid
    quote                         what that would make and cost, for a dry run
    folder, names, resume         the output folder: its database and lock, its files, what a dead run has left
    run -> pacer, work, journal   one decision loop, many workers, one writer
    results, gallery, progress    what is told
"""

# /// script
# requires-python = ">=3.10"
# dependencies = [
#   "requests>=2.32.3,<3",
#   "urllib3>=2.6.3,<3",
#   "jsonschema>=4.18,<5",
#   "Pillow>=10.3,<14",
#   "truststore>=0.10,<1",
#   "tqdm>=4.66,<5",
# ]
# ///
from __future__ import annotations

import os
import sys

if __name__ == "__main__":  # no module on PYTHONPATH stands in for one of the standard library
    _standard = os.path.dirname(os.__file__)
    sys.path.sort(key=lambda folder: folder not in (_standard, os.path.join(_standard, "lib-dynload")))

import signal
import types


def _wants_json() -> bool:
    return True


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

import time
from collections.abc import Sequence

from zimage.batch.commands import leave_at_once, run_command
from zimage.batch.contract import BATCH_REQUIREMENTS
from zimage.batch.options import read_options
from zimage.console import Console, carry_out, leave
from zimage.contract import SCRIPTS
from zimage.errors import Failure
from zimage.waiting import WATCHER, Stop


def main(argv: Sequence[str] | None = None, stop: Stop | None = None) -> int:
    """Run the command line; returns the exit code of the contract. Signals end `stop`, at the second one at once."""
    stop = stop or Stop()
    began = time.monotonic()
    arguments = list(sys.argv[1:] if argv is None else argv)
    console = Console(json_mode=True, quiet="--quiet" in arguments)

    def work() -> Failure | None:
        WATCHER.listen(stop, leave_at_once)
        return run_command(read_options(arguments, os.environ), stop, console, os.environ, began)

    return carry_out(
        work,
        console,
        os.environ,
        requirements=BATCH_REQUIREMENTS,
        script=SCRIPTS / "generate_batch.py",
    )


if __name__ == "__main__":
    _stop = Stop()
    leave(main(stop=_stop), _stop)
