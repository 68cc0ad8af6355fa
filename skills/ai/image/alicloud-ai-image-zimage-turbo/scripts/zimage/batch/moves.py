"""Moves: pictures whose rows were changed go to where the database says they are."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zimage.batch.contract import DATABASE
from zimage.batch.folder import database_failures, facts_of, open_database
from zimage.batch.names import Names, evidence_name
from zimage.contract import MAX_EVIDENCE_BYTES
from zimage.errors import Failure, os_reason
from zimage.files import DISK, file_hash, read_file, replace_private, to_json
from zimage.request import parse_json
from zimage.waiting import Stop


def settle_moves(folder: Path, stop: Stop) -> None:
    """Finish what `Stage.merge` began: pictures whose rows were changed move to where the database says they are.

    Killed at any moment, it goes on at the next start. Version 0.4.0 gave the file its second name before.

    Raises:
        Failure: disk.
    """
    names = Names(folder)
    database = open_database(folder, stop=stop)
    with contextlib.closing(database), database_failures(folder / DATABASE, stop):
        moved = "SELECT number, state, output, moved_from, facts FROM pictures WHERE moved_from IS NOT NULL"
        for number, state, output, moved_from, said in database.execute(moved).fetchall():
            path, evidence = folder / output, folder / evidence_name(number)
            if state == "saved" and names.holds(output) and names.holds(moved_from):
                move_file(folder / moved_from, path)
            with contextlib.suppress(OSError, ValueError):  # there is none, or it cannot be read: no reason to stop
                content = parse_json(read_file(evidence, MAX_EVIDENCE_BYTES, follow=False).decode())
                if isinstance(content, dict):
                    replace_private(evidence, to_json(with_image_at(path, content) | {"output": str(path)}))
            facts = json.dumps(with_image_at(path, facts_of(said)), ensure_ascii=False)
            database.execute("UPDATE pictures SET moved_from = NULL, facts = ? WHERE number = ?", (facts, number))


def move_file(old: Path, new: Path) -> None:
    """Move a file to a name that is free, or has the same content already."""
    try:
        new.parent.mkdir(parents=True, exist_ok=True)
        if old.is_symlink() or not old.is_file():
            return
        if DISK.claim(old, new) or file_hash(old) == file_hash(new):
            old.unlink(missing_ok=True)
    except OSError as error:
        raise Failure("disk", f"{old} cannot be moved to {new}: {os_reason(error)}") from None


def with_image_at(path: Path, content: Mapping[str, Any]) -> dict[str, Any]:
    """Facts, or the content of an evidence file, of a picture that lies there."""
    image = content.get("image")
    return {**content, "image": image | {"path": str(path)}} if isinstance(image, dict) else dict(content)
