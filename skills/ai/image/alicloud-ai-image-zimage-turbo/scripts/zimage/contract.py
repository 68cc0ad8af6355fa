"""Contract: the numbers, names and schemas that users and their scripts rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent.parent  # the folder of the command lines, or the one file that holds all
GENERATE_IMAGE = SCRIPTS if SCRIPTS.is_file() else SCRIPTS / "generate_image.py"  # what runs this code again

VERSION = "0.4.0"
SKILL = "alicloud-ai-image-zimage-turbo"
REQUIREMENTS = {"requests": "requests>=2.32.3,<3", "jsonschema": "jsonschema>=4.18,<5", "PIL": "Pillow>=10.3,<14"}

MIN_PIXELS = 512 * 512
MAX_PIXELS = 2048 * 2048
DEFAULT_SIZE = "1024*1024"
MAX_SEED = 2**31 - 1
LONG_PROMPT = 800  # characters; sibling models of the vendor cut there
RATIO_SIZES = {  # the vendor's recommended size of about 1024*1024 pixels for each ratio
    "1:1": "1024*1024",
    "2:3": "832*1248",
    "3:2": "1248*832",
    "3:4": "864*1152",
    "4:3": "1152*864",
    "7:9": "896*1152",
    "9:7": "1152*896",
    "9:16": "720*1280",
    "16:9": "1280*720",
    "9:21": "576*1344",
    "21:9": "1344*576",
}

MIB = 1024 * 1024
MAX_REQUEST_BYTES = 1 * MIB
MAX_ANSWER_BYTES = 4 * MIB
MAX_IMAGE_BYTES = 64 * MIB
MAX_EVIDENCE_BYTES = 8 * MIB
MAX_DECODED_PIXELS = 50_000_000  # ten times the largest picture the model makes: more is a bomb
MIN_FREE_BYTES = 16 * MIB  # the largest picture, uncompressed, is 12 MiB
MAX_HOPS = 5
OUTSIDE_TEXT = 500  # characters of a text from outside that an error repeats

DEFAULT_TIMEOUT = 100.0  # seconds; agents' shells cut a command at 120 s
TIMEOUT_RANGE = (1.0, 86_400.0)
GENERATE_SHARE = 0.8  # of the timeout; the last fifth is kept for the download
SHORTEST_ATTEMPT_SHARE = 0.1  # of the timeout; with less time than that left, no paid attempt starts
CONNECT_TIMEOUT = 10.0  # seconds for one address
DEFAULT_MAX_RETRIES = 4
MAX_RETRIES_RANGE = (0, 100)
UNREACHABLE_RETRIES = 2  # a refused connection or a missing name fails in seconds
BACKOFF_BASE, BACKOFF_CAP = 0.5, 20.0  # seconds
DOWNLOAD_RETRIES = 4  # free, so --max-retries does not count them
CORRUPT_DOWNLOAD_RETRIES = 1  # the same bytes twice will not get better
POLL_FIRST, POLL_GROWTH, POLL_LONGEST = 1.0, 1.5, 5.0  # seconds between questions after a task
LAST_POLL = 0.5  # seconds before the end, in which no further question is worth it
POLL_TIMEOUT, POLL_SHARE = 10.0, 0.3  # seconds for one question, and of the time left: the next may be answered
LOST_AFTER = 3  # questions in a row to which the service does not know the task: it may learn of it a moment late
RATIO_TOLERANCE = 0.02  # where only the ratio of a size can be asked for

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".webp": "WEBP"}
MAX_SIDE = {"PNG": 2**31 - 1, "JPEG": 65_500, "WEBP": 16_383}  # pixels; limits of the file formats
READABLE_FORMATS = ["PNG", "JPEG", "WEBP", "GIF", "BMP"]  # others start programs or are not worth the risk
SAVE_OPTIONS: dict[str, dict[str, Any]] = {"PNG": {}, "JPEG": {"quality": 95}, "WEBP": {"quality": 95}}

EXIT_OK = 0
EXIT_INCOMPLETE = 1  # of a batch
EXIT_INVALID = 2
EXIT_KEY = 3
EXIT_BALANCE = 4
EXIT_BLOCKED = 5
EXIT_UNAVAILABLE = 6
EXIT_UNKNOWN = 7
EXIT_UNUSABLE = 8
EXIT_DISK = 9
EXIT_TIME_LIMIT = 11  # of a batch
EXIT_SIGNAL = 128  # plus the number of the signal

REQUEST_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "image.generate request",
    "type": "object",
    "additionalProperties": False,
    "required": ["prompt"],
    "properties": {
        "prompt": {
            "type": "string",
            "pattern": r"\S",
            "description": "What to draw, in English or Chinese. Over 800 characters gives a warning.",
        },
        "size": {
            "type": "string",
            "pattern": "^[1-9][0-9]{0,6}[*xX×][1-9][0-9]{0,6}$",
            "default": DEFAULT_SIZE,
            "description": "width*height in pixels; total pixels from 512*512 to 2048*2048.",
        },
        "aspect_ratio": {
            "enum": list(RATIO_SIZES),
            "description": "Instead of size: picks the recommended size of about 1024*1024 pixels.",
        },
        "seed": {
            "type": "integer",
            "minimum": -1,
            "maximum": MAX_SEED,
            "description": "-1 or left out: one is picked, sent and recorded.",
        },
        "prompt_extend": {
            "type": "boolean",
            "default": False,
            "description": "Let the service rewrite the prompt first: slower, billed at about twice the price.",
        },
        "base_url": {
            "type": "string",
            "minLength": 1,
            "description": "Whole endpoint, API root or bare host; the key goes to trusted hosts only.",
        },
    },
    "not": {"required": ["size", "aspect_ratio"]},
}

ERROR_SCHEMA: dict[str, Any] = {
    "type": "object",
    "required": ["code", "message", "hint", "exit_code", "retryable", "billed"],
    "properties": {
        "code": {"type": "string", "pattern": "^[a-z][a-z0-9_]*$"},
        "message": {"type": "string"},
        "hint": {"type": "string", "description": "What to do next, one line."},
        "exit_code": {"type": "integer"},
        "retryable": {"type": "boolean", "description": "The same command may be run again without paying twice."},
        "billed": {"enum": ["no", "yes", "unknown"]},
        "problems": {"type": "array", "items": {"type": "string"}},
        "problem_count": {"type": "integer", "description": "Where problems holds only the first of many (batch)."},
        "changes": {"type": "object", "description": "What would be made again, and for how many US$ (batch)."},
        "progress": {"type": "object", "description": "How far the running batch is."},
        "next_command": {"type": "string", "description": "Free of charge, shell-quoted, absolute paths."},
        "retry_after_s": {"type": "number", "minimum": 0},
        "http_status": {"type": "integer"},
        "service_code": {"type": "string"},
        "request_id": {"type": "string"},
        "evidence_path": {"type": "string"},
        "image_url": {"type": "string"},
    },
}

RESPONSE_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "image.generate response",
    "description": 'What --print-response prints; on failure {"error": …} with the shape of $defs/error.',
    "type": "object",
    "required": [
        "width",
        "height",
        "prompt",
        "request_id",
        "size",
        "provider",
        "region",
        "image_path",
        "evidence_path",
        "estimated_cost",
    ],
    "properties": {
        "image_url": {"type": "string", "description": "Signed link, dies soon. None where bytes are handed over."},
        "width": {"type": "integer", "description": "Pixels of the saved file."},
        "height": {"type": "integer", "description": "Pixels of the saved file."},
        "prompt": {"type": "string"},
        "rewritten_prompt": {"type": "string"},
        "reasoning": {"type": "string"},
        "request_id": {"type": "string"},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED, "description": "None where none can be sent."},
        "size": {"type": "string", "description": "As asked, width*height."},
        "provider": {"type": "string"},
        "region": {"type": "string"},
        "image_path": {"type": "string", "description": "Absolute."},
        "evidence_path": {"type": "string", "description": "Absolute."},
        "estimated_cost": {"type": "number", "description": "US$ by the price list."},
        "warnings": {"type": "array", "items": {"type": "string"}, "minItems": 1},
    },
    "$defs": {"error": ERROR_SCHEMA},
}

STATUSES = ["submitting", "submitted", "generated", "saved", "failed", "unknown"]

EVIDENCE_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "evidence of one picture",
    "type": "object",
    "required": [
        "schema_version",
        "tool",
        "status",
        "provider",
        "region",
        "endpoint",
        "operation",
        "billable",
        "request",
        "payload",
        "output",
        "started_at",
        "attempts",
        "cost",
    ],
    "properties": {
        "schema_version": {"const": 1},
        "tool": {
            "type": "object",
            "required": ["name", "version"],
            "properties": {"name": {"type": "string"}, "version": {"type": "string"}},
        },
        "status": {"enum": STATUSES},
        "provider": {"type": "string", "pattern": "^[a-z][a-z0-9_]*$"},
        "region": {"type": "string"},
        "endpoint": {"type": "string"},
        "operation": {"const": "image.generate"},
        "billable": {"type": "boolean"},
        "request": {"type": "object", "description": "Normalized: itself a valid request."},
        "payload": {"type": "object", "description": "The body that was sent."},
        "settings": {"type": "object", "description": "The provider's own options."},
        "output": {"type": "string", "description": "Absolute path that was asked for."},
        "started_at": {"type": "string", "format": "date-time"},
        "generated_at": {"type": "string", "format": "date-time"},
        "finished_at": {"type": "string", "format": "date-time"},
        "timings_ms": {"type": "object", "additionalProperties": {"type": "number"}},
        "attempts": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["at"],
                "properties": {
                    "at": {"type": "string", "format": "date-time"},
                    "http_status": {"type": "integer"},
                    "service_code": {"type": "string"},
                    "outcome": {"type": "string", "description": "generated, submitted, or the code of the error."},
                    "billed": {"enum": ["no", "yes", "unknown"]},
                    "wait_s": {"type": "number", "description": "Pause before the next attempt, in seconds."},
                },
            },
        },
        "task_id": {"type": "string", "minLength": 1},
        "response": {
            "type": "object",
            "properties": {
                "request_id": {"type": "string"},
                "usage": {"type": "object"},
                "image_url": {"type": "string"},
                "other_image_urls": {"type": "array", "items": {"type": "string"}},
                "expires_at": {"type": "string", "format": "date-time"},
                "rewritten_prompt": {"type": "string"},
                "reasoning": {"type": "string"},
            },
        },
        "image": {
            "type": "object",
            "required": ["path", "sha256", "bytes", "format", "width", "height"],
            "properties": {
                "path": {"type": "string"},
                "sha256": {"type": "string"},
                "bytes": {"type": "integer"},
                "format": {"enum": list(FORMATS.values())},
                "width": {"type": "integer"},
                "height": {"type": "integer"},
                "source_format": {"type": "string", "description": "Where the picture was converted."},
                "source_sha256": {"type": "string", "description": "Where the picture was converted."},
                "warnings": {"type": "array", "items": {"type": "string"}},
            },
        },
        "cost": {
            "type": "object",
            "required": ["estimate", "currency", "basis", "price_list_date"],
            "properties": {
                "estimate": {"type": "number"},
                "currency": {"const": "USD"},
                "basis": {"type": "string"},
                "price_list_date": {"type": "string"},
            },
        },
        "warnings": {"type": "array", "items": {"type": "string"}},
        "error": ERROR_SCHEMA,
    },
}

RESULT_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "line of a batch's results.jsonl",
    "description": "One picture of the input, or of an earlier one that was paid for. It holds no link.",
    "type": "object",
    "required": ["number", "state", "prompt", "size", "prompt_extend", "output", "estimated_cost", "attempts"],
    "properties": {
        "number": {"type": "integer", "minimum": 0, "description": "Names the picture, its thumbnail and evidence."},
        "id": {"type": "string", "description": "The row's own."},
        "line": {"type": "integer", "minimum": 1, "description": "Of the row in the last input it was in."},
        "variant": {"type": "integer", "minimum": 0, "description": "Where a row has several pictures."},
        "state": {"enum": ["pending", *STATUSES]},
        "prompt": {"type": "string"},
        "rewritten_prompt": {"type": "string"},
        "size": {"type": "string", "description": "As asked, width*height."},
        "seed": {"type": "integer", "minimum": 0, "maximum": MAX_SEED, "description": "None where none can be sent."},
        "prompt_extend": {"type": "boolean"},
        "output": {"type": "string", "description": "File in the output folder, also where it is not there yet."},
        "image_path": {"type": "string", "description": "Absolute; of a saved picture."},
        "width": {"type": "integer", "description": "Pixels of the saved file."},
        "height": {"type": "integer", "description": "Pixels of the saved file."},
        "bytes": {"type": "integer"},
        "sha256": {"type": "string"},
        "evidence_path": {"type": "string", "description": "Absolute."},
        "request_id": {"type": "string"},
        "estimated_cost": {"type": "number", "description": "US$ of all tries that were, or may have been, billed."},
        "attempts": {"type": "integer", "minimum": 0},
        "finished_at": {"type": "string", "format": "date-time"},
        "warnings": {"type": "array", "items": {"type": "string"}, "minItems": 1},
        "error": ERROR_SCHEMA
        | {"properties": {name: rule for name, rule in ERROR_SCHEMA["properties"].items() if name != "image_url"}},
        "in_input": {"const": False, "description": "Where the last input does not have its row any more."},
    },
}

SCHEMAS = {
    "request": REQUEST_SCHEMA,
    "response": RESPONSE_SCHEMA,
    "evidence": EVIDENCE_SCHEMA,
    "result": RESULT_SCHEMA,
}
