"""What others do in the same cells: the official client, and the loop around it that people write.

Run `python tests/torture/peers.py` after the cells of `make torture`. Two programs meet every cell of DashScope in
which nothing is killed, each in a process of its own, through the same proxy and against the same mock service:

- `client`: `dashscope.MultiModalConversation.call`, then the picture by `requests.get`, written to a file. Both get
  the cell's time-out. The program tries nothing again; what the client does on its own is the client's.
- `pool`: the same in a thread pool, up to three times where it raises or does not answer 200, half a second apart.

Counted are the pictures that were paid for, those on disk as they were drawn, files that are something else, how often
a picture was paid for again though nobody asked, and what is lost: paid for, its link had arrived, and neither the
picture nor a word that leads to it is on disk. Late is what goes on for 30 s after the cell's time-out: it is ended.
Ours is read from the file that the cells have left; of it a cell ends with what its advice says, free of charge.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import sys
import tempfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import figures

TRIES, PAUSE_S = 3, 0.5
LATE_S = 30.0
AT_ONCE = 8
COLUMNS = ("cells", "paid", "saved", "wrong", "paid_twice", "lost", "late")


def one_picture(settings: dict[str, Any]) -> None:
    """A call, a download, a file. Raises whatever goes wrong."""
    import dashscope
    import requests

    dashscope.base_http_api_url = settings["base_url"]
    answer: Any = dashscope.MultiModalConversation.call(
        model="z-image-turbo",
        messages=[{"role": "user", "content": [{"text": settings["prompt"]}]}],
        api_key=settings["key"],
        size="512*512",
        seed=settings["seed"],
        prompt_extend=False,
        request_timeout=settings["timeout"],
    )
    if answer.status_code != 200:
        raise RuntimeError(answer.message)
    link = answer.output.choices[0].message.content[0]["image"]
    image = requests.get(link, timeout=settings["timeout"])
    image.raise_for_status()
    Path(settings["output"]).write_bytes(image.content)


def with_tries(settings: dict[str, Any]) -> None:
    import time

    for left in reversed(range(TRIES)):
        try:
            return one_picture(settings)
        except Exception:
            if not left:
                raise
            time.sleep(PAUSE_S)
    return None


def peer(how: str, settings: dict[str, Any]) -> None:
    """The program, in its own process: quiet."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    os.environ["REQUESTS_CA_BUNDLE"] = settings["ca"]
    if how == "client":
        one_picture(settings)
    else:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(with_tries, [settings]))


def play(how: str, cell: Any) -> Counter[str]:
    from torture import story
    from torture.proxy import Proxy

    with tempfile.TemporaryDirectory() as folder, story.mock_for(cell.way) as mock:
        with Proxy(mock, cell.fault, story.server_context(cell.tls)) as proxy:
            output, ca = Path(folder, "out.png"), Path(folder, "ca.pem")
            story.authority().cert_pem.write_to_path(str(ca))
            settings: dict[str, Any] = {"base_url": f"{proxy.root}/api/v1", "key": story.KEY, "prompt": story.PROMPT}
            settings |= {"seed": story.SEED, "timeout": cell.timeout, "output": str(output), "ca": str(ca)}
            process = CONTEXT.Process(target=peer, args=(how, settings), daemon=how == "client")
            process.start()
            process.join(cell.timeout + LATE_S)
            late = process.is_alive()
            if late:
                process.kill()
                process.join()
        paid = mock.stats()["billed"]
        made = output.read_bytes() if output.exists() else b""
    saved = made == story.drawn(cell.way)
    return Counter(
        cells=1,
        paid=paid,
        saved=saved,
        wrong=bool(made) and not saved,
        paid_twice=max(0, paid - 1),
        lost=bool(proxy.arrived) and not saved,
        late=late,
    )


def ours(cells: list[str]) -> Counter[str]:
    """The same cells, as `make torture` has counted them. Raises FileNotFoundError where it has not run."""
    counts: Counter[str] = Counter()
    for record in figures.kept("torture")["each"]:
        if record["cell"] in cells:
            counts += Counter(cells=1, paid=record["paid"], saved=record["saved"], wrong=record.get("image", 0))
            counts += Counter(paid_twice=record.get("paid_twice", 0), lost=record.get("lost", 0))
            counts += Counter(late=record.get("hang", 0))
    return counts


def main() -> None:
    import conftest  # it knows where the skill's scripts are
    from torture.cells import CELLS

    assert conftest.SCRIPTS.is_dir()
    cells = [cell for cell in CELLS if cell.way.id == "dashscope" and not cell.signum]
    table: dict[str, Counter[str]] = {}
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for how in ("client", "pool"):
            table[how] = sum(pool.map(play, repeat(how), cells), Counter())
    table["ours"] = ours([str(cell) for cell in cells])
    counts = {name: {column: found[column] for column in COLUMNS} for name, found in table.items()}
    figures.keep("torture_peers", counts)
    print(json.dumps(counts))


CONTEXT = multiprocessing.get_context("forkserver")

if __name__ == "__main__":
    CONTEXT.set_forkserver_preload(["dashscope", "requests", "dashscope.aigc.multimodal_conversation"])
    main()
