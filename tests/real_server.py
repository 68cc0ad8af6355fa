"""Run the openai provider against a server that really runs, and say what held.

    .venv/bin/python tests/real_server.py http://127.0.0.1:30010/v1 [options of the provider, such as --steps 9]

Start the server first, as references/providers.md says; where there is no GPU, with a tiny random model
(`tests/tiny_model.py FOLDER`). Exit code 0 where everything held. Pictures of 512*512 are made: eight of them.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent.parent / "skills/ai/image/alicloud-ai-image-zimage-turbo/scripts"


class Client:
    """The two commands in a folder of their own, pointed at the server."""

    def __init__(self, folder: Path, base_url: str, options: Sequence[str]) -> None:
        self._folder = folder
        self._service = ["--provider", "openai", "--base-url", base_url, *options]

    def call(self, script: str, *arguments: str) -> tuple[int, dict[str, Any]]:
        """Exit code and the JSON on stdout."""
        command = [sys.executable, str(SCRIPTS / script), *arguments]
        done = subprocess.run(command, cwd=self._folder, capture_output=True, text=True, check=False, timeout=900)
        return done.returncode, json.loads(done.stdout)

    def image(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        return self.call("generate_image.py", *self._service, *arguments)

    def picture(self, *arguments: str) -> tuple[str, dict[str, Any]]:
        """The hash of a small picture, and the response."""
        size = ("--size", "512x512", "--print-response", "--timeout", "600")
        code, response = self.image("--prompt", "a red fox in fresh snow", *size, *arguments)
        assert code == 0, response
        return digest(response), response

    def replay(self, evidence: str) -> str:
        code, response = self.call("generate_image.py", "--replay", evidence, "--print-response", "--timeout", "600")
        assert code == 0, response
        return digest(response)

    def batch(self, *arguments: str) -> tuple[int, dict[str, Any]]:
        return self.call("generate_batch.py", *self._service, *arguments)


def digest(response: dict[str, Any]) -> str:
    return hashlib.sha256(Path(response["image_path"]).read_bytes()).hexdigest()


def run(client: Client, folder: Path) -> None:
    """Go through what a user does; an AssertionError says what did not hold."""
    code, said = client.image("--check")
    assert code == 0, said
    print(f"check: model listed: {said['model_listed']}, key: {said['key_source']}")
    first, response = client.picture("--seed", "7")
    assert (response["width"], response["height"], response["estimated_cost"]) == (512, 512, 0), response
    assert "image_url" not in response, response
    assert client.picture("--seed", "7")[0] == first, "the same seed made another picture"
    assert client.picture("--seed", "8")[0] != first, "another seed made the same picture"
    assert client.replay(response["evidence_path"]) == first, "a replay made another picture"
    print("one picture: same seed same bytes, replay same bytes")
    rows = folder / "rows.jsonl"
    rows.write_text("".join(f'{{"prompt": "fox {n}", "size": "512*512"}}\n' for n in range(4)), encoding="utf-8")
    code, summary = client.batch("--input", str(rows), "--output-dir", "out", "--concurrency", "2", "--timeout", "600")
    assert (code, summary["saved"]) == (0, 4), summary
    print(f"batch: 4 pictures in {summary['elapsed_s']} s")


def main(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0].startswith("-"):
        print(__doc__, file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as name:
        try:
            run(Client(Path(name), arguments[0], arguments[1:]), Path(name))
        except AssertionError as error:
            print(f"did not hold: {error}", file=sys.stderr)
            return 1
    print("everything held")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
