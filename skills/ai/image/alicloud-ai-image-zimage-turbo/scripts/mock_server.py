#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["Pillow>=10.3,<14"]
# ///
"""The image services on loopback: offline, free, and as strict as the real ones.

For rehearsals, demos and tests. Each of the ways to the model answers with its own bodies and errors: DashScope below
/api/v1, zimageturbo.ai below /api, a server of one's own (OpenAI's Images API) below /v1; ModelScope, whose /v1 is
taken, below /modelscope/v1, and ComfyUI, which has no path of its own, below /comfyui.
The mock hands out signed links that expire, limits the rate, fails on request (--fault), and keeps count of what
would have been paid for. Its pictures are drawn from prompt, seed and size, and say in their caption that no model
made them.

    python3 mock_server.py --port 8080 --fault 429,hangup-after
    with MockServer(rpm=0, faults="429") as mock: ...      # in a test

This file is the command line. Its parts lie in zimage_mock/ beside it, and import one way:

    exchange -> errors -> service      requests and replies, how refusals are worded, who answers for a path
    drawing -> faults                  the pictures, and what can befall them or the answer
    limits, ledger, gallery            rate and memory, the counters, pictures behind links
    rules -> provider                  what a field may hold, what the image services share
    tasks                              what the services share that answer with a task
    dashscope, zimageturbo, openai, …  a file a protocol
    server                             all of them on one port
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import types
from collections.abc import Sequence
from typing import NoReturn

# Bound to the folder beside this file: by its name alone, a package that lies elsewhere in the path could be loaded.
_parts = types.ModuleType("zimage_mock")
_parts.__path__ = [os.path.join(os.path.dirname(os.path.realpath(__file__)), "zimage_mock")]
sys.modules["zimage_mock"] = _parts

from zimage_mock.exchange import Reply, Request, json_reply
from zimage_mock.server import (
    DEFAULT_LINK_TTL_S,
    DEFAULT_RPM,
    FAULTS,
    PROVIDERS,
    MockServer,
    services_that_know,
)

__all__ = ["FAULTS", "MockServer", "Reply", "Request", "json_reply", "main", "services_that_know"]


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")


def _parser() -> argparse.ArgumentParser:
    about = "The image services on 127.0.0.1, offline and free. The first line on stdout says where, as JSON."
    fault = "how the next requests fail, NAME[*COUNT|*inf],... then normal service; 'list' names all faults"
    parser = _Parser(prog="mock_server.py", description=about, allow_abbrev=False)
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="a loopback address (default: %(default)s)")
    add("--port", type=int, default=0, help="default: a free one")
    add("--latency", type=float, default=0.0, metavar="S", help="seconds that a picture takes")
    add(
        "--rpm",
        type=int,
        default=DEFAULT_RPM,
        metavar="N",
        help="requests a minute to each vendor, 0: no limit (default: %(default)s)",
    )
    add("--fault", dest="faults", default="", metavar="SPEC", help=fault)
    add("--link-ttl", type=float, default=DEFAULT_LINK_TTL_S, metavar="S", help="life of image links (default: 24 h)")
    add("--api-key", default="", metavar="KEY", help="the only key that is right (default: a random one)")
    return parser


def _log(line: str) -> None:
    try:
        sys.stderr.write(line + "\n")
        sys.stderr.flush()
    except OSError:
        pass  # nobody reads the log any more


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve until SIGINT or SIGTERM; returns the exit status."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.faults == "list":
        for name, fault in FAULTS.items():
            services = services_that_know(name)
            only = f" ({', '.join(services)} only)" if len(services) < len(PROVIDERS) else ""
            print(f"{name:20} {fault.help}{only}")
        return 0
    try:
        mock = MockServer(**vars(options), log=_log)
    except ValueError as problem:
        parser.error(str(problem))
    except OSError as problem:
        parser.error(f"cannot listen on {options.host}:{options.port}: {problem.strerror}; --port 0 picks a free port")
    done = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: done.set())
    with mock:
        where = {name: getattr(mock, name) for name in ("base_url", "endpoint", "api_key", "stats_url")}
        providers = {
            name: {"base_url": url, "api_key": mock.api_key}
            for name, url in (
                ("zimageturbo", mock.zimageturbo_url),
                ("openai", mock.openai_url),
                ("modelscope", mock.modelscope_url),
                ("sdapi", mock.sdapi_url),
                ("comfyui", mock.comfyui_url),
            )
        }
        print(json.dumps(where | {"providers": providers, "pid": os.getpid()}), flush=True)
        while not done.wait(0.5):  # with a limit: on Windows an endless wait hears no Ctrl-C
            pass
    return 0


if __name__ == "__main__":
    sys.exit(main())
