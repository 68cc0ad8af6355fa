"""Contract: the numbers, names and errors that users and their scripts rely on."""

from __future__ import annotations

import re
from typing import Any

from zimage.contract import MIB, REQUEST_SCHEMA, REQUIREMENTS, SKILL

BATCH_REQUIREMENTS = REQUIREMENTS | {"tqdm": "tqdm>=4.66,<5"}
OPENPYXL = "openpyxl>=3.1.2,<4"  # for .xlsx alone

DATABASE, LOCK, RESULTS, GALLERY = "batch.sqlite3", "batch.lock", "results.jsonl", "index.html"
IMAGES, THUMBS, EVIDENCE, REPLACED = "images", "thumbs", "evidence", "replaced"
RESERVE = ".batch.reserve"  # room kept free for a full disk
DATABASE_VERSION = 1
FOLDER_SIZE = 1000  # files a folder: more make listings slow
PRIVATE_FILES = f"{DATABASE}*\n{RESERVE}\n{LOCK}\n{EVIDENCE}/\n"  # for .gitignore: they hold signed links
# What the batch calls its own files and folders, in the folded form of `output_key`; the second those of pictures.
OWN_FILES = re.compile(rf"({THUMBS}|{EVIDENCE}|{LOCK}|{RESULTS}|{GALLERY}|{re.escape(RESERVE)}|{DATABASE}[^/]*)(/|$)")
OWN_NAMES = re.compile(rf"{OWN_FILES.pattern}|({IMAGES}|{REPLACED})/(\d{{4,}}/)?\d{{6,}}")

MAX_LINE_BYTES = 1 * MIB
MAX_ID_LENGTH = 200
PROBLEMS_TOLD = 50
NAMES_A_HOST = "base_url: leave it out, rows do not say where they go; tell the user that the file names a host"
OWN_COLUMNS = "to make prompts of columns of your own, write rows into a new file: references/batch.md shows how"
PROMPTS_TOLD, LONGEST_PROMPT_TOLD = 3, 2000  # of a dry run; characters
MAX_JSON_BYTES, MAX_WORKBOOK_BYTES = 16 * MIB, 64 * MIB  # of an input that is read whole

SPACING = 1.035  # of the published limit: services count in sliding windows, and calls arrive a little unevenly

CONCURRENCY_RANGE = (4, 64)  # by default, for rate times latency
DOWNLOADS_AT_ONCE = 8

NO_SEED = -1  # in the database, of pictures whose provider takes none

TICK = 0.25  # seconds between looks at the clock while nothing happens

_row_fields = {name: rule for name, rule in REQUEST_SCHEMA["properties"].items() if name != "base_url"}
ROW_SCHEMA: dict[str, Any] = REQUEST_SCHEMA | {
    "title": "row of a batch",
    "properties": _row_fields
    | {
        "id": {"type": "string", "pattern": r"\S", "description": "Names the row, whatever becomes of its content."},
        "output": {"type": "string", "pattern": r"\S", "description": "File in the output folder: .png, .jpg, .webp."},
    },
}

DATABASE_SCHEMA = f"""
CREATE TABLE about (topic TEXT PRIMARY KEY, text TEXT NOT NULL);
INSERT INTO about VALUES
 ('what', 'The state of a batch of pictures, written by generate_batch.py of {SKILL}.'),
 ('pictures', 'A row a picture. Prompt, seed and size are what is sent; output is the file in this folder.'),
 ('states', 'pending: not sent. submitting: the request is out. submitted: the service works on it (task_id in facts). '
  || 'generated: paid, the link is in facts. saved: the verified image is in output. failed: refused or unusable, '
  || 'facts say why. unknown: the request left and no answer came; it may have been billed.'),
 ('go on', 'Run the same command again. --retry-failed and --retry-unknown send those rows once more (costs).'),
 ('careful', 'Do not edit while a batch runs. facts hold signed links: they open the pictures for a day.');

CREATE TABLE services (  -- where pictures were asked for
  number   INTEGER PRIMARY KEY,
  provider TEXT NOT NULL,
  region   TEXT NOT NULL,
  endpoint TEXT NOT NULL,
  UNIQUE (provider, region, endpoint)
);

CREATE TABLE pictures (
  number        INTEGER PRIMARY KEY,         -- given once; names image, thumbnail and evidence
  identity      TEXT NOT NULL,               -- of the row: 'id:...', or 'row:' fingerprint ':' occurrence
  variant       INTEGER NOT NULL,            -- from 0
  position      INTEGER,                     -- of the row in the last input, from 0; NULL: not in it any more
  line          INTEGER,                     -- of the row in the last input, from 1
  id            TEXT,
  fingerprint   TEXT NOT NULL,               -- of the row as written
  service       INTEGER NOT NULL REFERENCES services (number),
  prompt        TEXT NOT NULL,
  size          TEXT NOT NULL,               -- width*height in pixels
  seed          INTEGER NOT NULL,            -- variant k has the row's seed + k, modulo 2^31; -1: none can be sent
  prompt_extend INTEGER NOT NULL,            -- 0 or 1
  output        TEXT NOT NULL,               -- file in this folder
  output_key    TEXT NOT NULL UNIQUE,        -- the same, folded: file systems may ignore case and Unicode form
  price         REAL NOT NULL,               -- US$ a try
  paid          INTEGER NOT NULL DEFAULT 0,  -- tries that were, or may have been, billed
  state         TEXT NOT NULL DEFAULT 'pending' CHECK (state IN
                ('pending', 'submitting', 'submitted', 'generated', 'saved', 'failed', 'unknown')),
  facts         TEXT NOT NULL DEFAULT '{{}}',  -- JSON, fields of the evidence file: attempts, response, image, error
  moved_from    TEXT,                        -- where it lay before its row was changed, until that is done
  UNIQUE (identity, variant)
);
CREATE INDEX pictures_to_do ON pictures (state, position, variant);

CREATE TABLE runs (
  number      INTEGER PRIMARY KEY,
  started_at  TEXT NOT NULL,
  updated_at  TEXT NOT NULL,
  finished_at TEXT,
  exit_code   INTEGER,
  latency_s   REAL,                          -- seconds from request to answer
  progress    TEXT NOT NULL DEFAULT '{{}}'     -- JSON
);

CREATE VIEW progress AS
  SELECT state, count(*) AS pictures, round(sum(price * paid), 5) AS usd FROM pictures GROUP BY state;
"""

# Pictures that a summary, the results and the gallery speak of: those of the input, and those that were paid for.
LISTED = "(position IS NOT NULL OR state IN ('submitting', 'submitted', 'generated', 'saved', 'unknown'))"
KEPT_FACTS = (
    "started_at",
    "generated_at",
    "finished_at",
    "timings_ms",
    "attempts",
    "billable",
    "unused",
    "settings",
    "task_id",
    "response",
    "answer",
    "image",
    "warnings",
    "error",
)
