"""What version 0.4.0 left on disk, put into a test's working folder, and the services that it had asked.

    restored = Restored(shell, service, "batch-half-run")               # tests/fixtures/v040/batch-half-run.json
    restored = Restored(shell, service, "dashscope-generated", links="dead")
    restored.paid                                                       # prompts of all paid requests since then

The service knows the links and tasks of the fixture: a link is answered only byte by byte as it was signed, and not
after its end. What is paid for anew is answered as well, each time with another picture. How the fixtures are made,
and what their placeholders mean: tests/fixtures/make_v040.py.
"""

from __future__ import annotations

import base64
import contextlib
import datetime as dt
import hashlib
import json
import os
import shutil
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

from conftest import SCRIPTS, TEST_KEY, Shell
from fault_server import GENERATE, Answer, FaultServer, Received, file, good_body, json_answer, oss_error, png

FIXTURES = Path(__file__).resolve().parent / "fixtures" / "v040"
COLOURS = ("red", "green", "blue", "gold", "navy", "pink", "teal", "gray", "lime", "plum", "tan", "olive")
DAY = 24 * 3600
TYPES = {"png": "image/png", "jpg": "image/jpeg", "webp": "image/webp"}


def fixture_names(beginning: str) -> list[str]:
    return sorted(path.stem for path in FIXTURES.glob(f"{beginning}*.json"))


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class Restored:
    """A fixture in the working folder of `shell`, and its services at `service`.

    `links`: whether those on record are still good. A task that the service knows always names one that is.
    """

    def __init__(
        self, shell: Shell, service: FaultServer, name: str, *, links: Literal["alive", "dead"] = "alive"
    ) -> None:
        self.shell = shell
        self.service = service
        said = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
        self.command: list[str] = said["command"]
        self.tasks: dict[str, Any] = {}
        self.paid: list[str] = []
        self._lock = threading.Lock()
        now = int(time.time())
        self._alive = self._placeholders(now + DAY)
        self._on_record = self._alive if links == "alive" else self._placeholders(now - DAY)
        self.pictures: dict[str, bytes] = {
            link: (FIXTURES / picture).read_bytes() for link, picture in said["links"].items()
        }
        for link, content in self.pictures.items():
            service.play(urlsplit(self._filled(link, self._alive)).path, self._behind(link, content))
        self.tasks = {name: self._filled_json(data, self._alive) for name, data in said["tasks"].items()}
        service.play(GENERATE, self._dashscope)
        service.play("/api/generate", self._submit)
        service.play("/api/status", self._status)
        service.play("/v1/images/generations", self._openai)
        shell.env |= {
            "DASHSCOPE_API_KEY": TEST_KEY,
            "DASHSCOPE_BASE_URL": service.base_url,
            "ZIMAGETURBO_API_KEY": TEST_KEY,
            "ZIMAGETURBO_BASE_URL": f"{service.root}/api",
            "OPENAI_BASE_URL": f"{service.root}/v1",
        }
        for path, entry in said["files"].items():
            self._put(shell.folder / self._filled(path, self._on_record), entry)
        self.held = [path.read_bytes() for path in shell.folder.rglob("*.picture")]

    # The folder

    @property
    def evidence_path(self) -> Path:
        (path,) = self.shell.evidence_files()
        return path

    @property
    def evidence(self) -> dict[str, Any]:
        return self.shell.evidence()

    @property
    def picture(self) -> bytes:
        """The only picture that was paid for, as the service sent it."""
        contents: set[bytes] = {*self.pictures.values(), *self.held}
        (content,) = contents
        return content

    def _put(self, path: Path, entry: dict[str, Any]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if "picture" in entry:
            path.write_bytes((FIXTURES / entry["picture"]).read_bytes())
        elif "sql" in entry:
            text = (FIXTURES / entry["sql"]).read_text(encoding="utf-8")
            self._put_database(path, self._filled(text, self._on_record), not_written_back=entry["wal"])
        elif "json" in entry:
            content = self._filled_json(entry["json"], self._on_record)
            path.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")
        else:
            path.write_text(self._filled("\n".join(entry["text"]), self._on_record), encoding="utf-8")
        path.chmod(0o600)

    @staticmethod
    def _put_database(path: Path, text: str, *, not_written_back: bool) -> None:
        """`not_written_back`: a killed process leaves what it has committed in a file beside the database."""
        with tempfile.TemporaryDirectory() as place:
            made = Path(place) / path.name
            with contextlib.closing(sqlite3.connect(made, isolation_level=None)) as database:
                database.execute("PRAGMA journal_mode = WAL")
                database.execute("PRAGMA synchronous = OFF")
                database.executescript(text)
                if not not_written_back:
                    database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
                for file_name in (path.name, *[f"{path.name}-wal"] * not_written_back):
                    shutil.copy(made.with_name(file_name), path.parent)

    def _placeholders(self, expires: int) -> dict[str, str]:
        moment = dt.datetime.fromtimestamp(expires, dt.timezone.utc)
        return {
            "{{FOLDER}}": str(self.shell.folder),
            "{{SERVER}}": self.service.root,
            "{{EXPIRES}}": str(expires),
            "{{EXPIRES_AT}}": moment.isoformat(timespec="milliseconds").replace("+00:00", "Z"),
            "{{DEAD_PID}}": str(dead_pid()),
            "{{PYTHON}}": sys.executable,
            "{{SCRIPTS}}": str(SCRIPTS),
        }

    @staticmethod
    def _filled(text: str, values: dict[str, str]) -> str:
        for placeholder, value in values.items():
            text = text.replace(placeholder, value)
        assert "{{" not in text, text
        return text

    def _filled_json(self, value: Any, values: dict[str, str]) -> Any:
        if isinstance(value, dict):
            return {name: self._filled_json(part, values) for name, part in value.items()}
        if isinstance(value, list):
            return [self._filled_json(part, values) for part in value]
        return self._filled(value, values) if isinstance(value, str) else value

    # The services

    def _behind(self, link: str, content: bytes) -> Any:
        """Who follows a link: only as it was signed, and only until its end."""
        kind = "png" if content.startswith(b"\x89PNG") else "jpg"
        targets = {self._filled(link, values) for values in (self._alive, self._on_record)}

        def answer(request: Received) -> Answer:
            if request.root + request.target not in targets:
                return oss_error(403, "SignatureDoesNotMatch", "The request signature does not match.")
            if int(parse_qs(urlsplit(request.target).query)["Expires"][0]) <= time.time():
                return oss_error(403, "AccessDenied", "Request has expired.")
            return file(content, TYPES[kind])

        return answer

    def _new(self, prompt: str, size: str) -> bytes:
        """One more picture, unlike all others."""
        width, height = map(int, size.replace("x", "*").split("*"))
        with self._lock:
            self.paid.append(prompt)
            return png(width, height, COLOURS[len(self.paid) - 1])

    def _new_link(self, prompt: str, size: str) -> str:
        content = self._new(prompt, size)
        path = f"/img/{sha256(content)[:16]}.png"
        self.service.play(path, file(content))
        return self.service.root + path

    def _dashscope(self, request: Received) -> Answer:
        body = json.loads(request.body)
        prompt = body["input"]["messages"][0]["content"][0]["text"]
        return json_answer(good_body(self._new_link(prompt, body["parameters"]["size"])), bills=True)

    def _openai(self, request: Received) -> Answer:
        body = json.loads(request.body)
        text = base64.b64encode(self._new(body["prompt"], body["size"])).decode()
        return json_answer({"created": 1767000000, "data": [{"b64_json": text}]}, bills=True)

    def _submit(self, request: Received) -> Answer:
        prompt = json.loads(request.body)["prompt"]
        link = self._new_link(prompt, "1024*1024")
        task = f"task_new_{len(self.tasks)}"
        self.tasks[task] = {"status": "SUCCESS", "task_id": task, "request": {"prompt": prompt}, "response": [link]}
        said = {"task_id": task, "status": "IN_PROGRESS"}
        return json_answer({"code": 200, "message": "success", "data": said}, bills=True)

    def _status(self, request: Received) -> Answer:
        data = self.tasks.get(parse_qs(urlsplit(request.target).query)["task_id"][0])
        if data is None:
            return json_answer({"code": 404, "message": "Task not found.", "data": None}, 404)
        return json_answer({"code": 200, "message": "success", "data": data})


def dead_pid() -> int:
    """The number of a process that was and is not."""
    process = subprocess.Popen([sys.executable, "-c", ""] if os.name == "nt" else ["true"])
    process.wait()
    return process.pid
