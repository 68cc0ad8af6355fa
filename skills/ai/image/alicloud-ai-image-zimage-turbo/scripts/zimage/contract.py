"""Contract: the numbers, names and schemas that users and their scripts rely on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).parent.parent  # the folder of the command lines, or the one file that holds all
GENERATE_IMAGE = SCRIPTS if SCRIPTS.is_file() else SCRIPTS / "generate_image.py"  # what runs this code again

VERSION = "0.4.0"
SKILL = "alicloud-ai-image-zimage-turbo"
REQUIREMENTS = {
    "requests": "requests>=2.32.3,<3",
    "urllib3": "urllib3>=2.6.3,<3",
    "jsonschema": "jsonschema>=4.18,<5",
    "PIL": "Pillow>=10.3,<14",
    "truststore": "truststore>=0.10,<1",
}
CAN_BE_WITHOUT = ("truststore",)  # the store of macOS and Windows is then not asked, only what `certifi` brings

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

# As people write a size and a ratio: with blanks, with the signs of a Chinese or Japanese keyboard. JSON Schema and
# Python read both patterns alike.
_SIDE, _SMALL, _BLANK = "([1-9１-９][0-9０-９]{0,6})", "([0-9０-９]{1,2})", "[ \t\u00a0\u3000]"
_BLANKS = f"{_BLANK}{{0,20}}"  # a bound, so that no search goes through all of them again and again
SIZE_FORM = f"{_BLANKS}{_SIDE}(?:{_BLANKS}[*xX×＊ｘＸ,，]{_BLANKS}|{_BLANK}{_BLANKS}){_SIDE}{_BLANKS}"
RATIO_FORM = f"{_BLANKS}{_SMALL}{_BLANKS}[:：]{_BLANKS}{_SMALL}{_BLANKS}"

MIB = 1024 * 1024
MAX_REQUEST_BYTES = 1 * MIB
MAX_ANSWER_BYTES = 4 * MIB
MAX_IMAGE_BYTES = 64 * MIB
MAX_ERROR_BYTES = 1 * MIB  # of an answer that says no
MAX_EVIDENCE_BYTES = 16 * MIB  # more than what is written: a prompt of 1 MiB twice, each byte escaped by six
MAX_SAVED_BYTES = 512 * MIB  # the largest picture that is decoded, saved without compression
MAX_JSON_VALUES, MAX_JSON_DEPTH = 100_000, 600  # of JSON that somebody else wrote: `{},{},` takes 30 times its size
MAX_LINK_LENGTH, MAX_OTHER_LINKS = 8192, 20  # characters of a link; links beside the first that are kept
BASIC = "Basic "  # how a login stands in the header (RFC 7617): no key has a blank
MAX_TASK_ID = 500  # characters of the name that a service gives to a task
MAX_KEPT_ANSWER = 4000  # characters of an answer in which no picture was found
MAX_USAGE_BYTES = 64 * 1024  # of what a service says of its own usage
MAX_DECODED_PIXELS = 50_000_000  # ten times the largest picture the model makes: more is a bomb
DECODER_BYTES = 1024 * MIB  # for all pictures that are decoded, converted and made small at the same time
DECODED_BYTES = {"WEBP": 24}  # per pixel, with the copies that verifying, converting and thumbnails need; measured
DECODED_BYTES_ELSE = 20
MAX_JPEG_SCANS = 100  # encoders make about ten; each costs as much as decoding the whole picture
MAX_METADATA_BYTES = 1 * MIB  # of what an image file holds beside its pixels: more is not read
LAST_WORK = 1.0  # seconds for the pixels of a picture that came whole: beyond the time limit, in a batch after a signal
MIN_FREE_BYTES = 16 * MIB  # the largest picture, uncompressed, is 12 MiB
MAX_HOPS = 5
OUTSIDE_TEXT = 500  # characters of a text from outside that an error repeats

DEFAULT_TIMEOUT = 100.0  # seconds; agents' shells cut a command at 120 s
TIMEOUT_RANGE = (1.0, 86_400.0)
GENERATE_SHARE = 0.8  # of the timeout; the last fifth is kept for the download
ASKING_TIME, ASKING_SHARE = 3.0, 0.1  # seconds, at most of the time left, in which a server may say what it is
SHORTEST_ATTEMPT_SHARE = 0.1  # of the timeout; with less time than that left, no paid attempt starts
CONNECT_TIMEOUT = 10.0  # seconds for one address
DEFAULT_MAX_RETRIES = 4
MAX_RETRIES_RANGE = (0, 100)
UNREACHABLE_RETRIES = 2  # a refused connection or a missing name fails in seconds
BACKOFF_BASE, BACKOFF_CAP = 0.5, 20.0  # seconds
DOWNLOAD_RETRIES = 4  # free, so --max-retries does not count them
CORRUPT_DOWNLOAD_RETRIES = 1  # the same bytes twice will not get better
POLL_PAUSES = (1.0, 1.5, 2.25, 3.375, 5.0)  # seconds before each question after a task, the last for all that follow
LAST_POLL = 0.5  # seconds before the end, in which no further question is worth it
POLL_TIMEOUT, POLL_SHARE = 10.0, 0.3  # seconds for one question, and of the time left: the next may be answered
LOST_AFTER = 3  # questions in a row to which the service does not know the task: it may learn of it a moment late
RATIO_TOLERANCE = 0.02  # where only the ratio of a size can be asked for

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
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

Schema = dict[str, Any]


def described(text: str, kind: str = "string", **rules: Any) -> Schema:
    """The schema of a field that needs a word of explanation."""
    return {"type": kind, **rules, "description": text}


def record(fields: Schema, **rules: Any) -> Schema:
    """The schema of an object; a field whose name ends in ? may be left out."""
    required = [name for name in fields if not name.endswith("?")]
    properties = {name.rstrip("?"): schema for name, schema in fields.items()}
    return {**rules, "type": "object", **({"required": required} if required else {}), "properties": properties}


DRAFT: Schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
TEXT, NUMBER, INTEGER = {"type": "string"}, {"type": "number"}, {"type": "integer"}
MOMENT = TEXT | {"format": "date-time"}
TEXTS = {"type": "array", "items": TEXT}
BILLED = {"enum": ["no", "yes", "unknown"]}
ABSOLUTE = described("Absolute.")
OF_SAVED_FILE = described("Pixels of the saved file.", "integer")
IF_CONVERTED = described("Where the picture was converted.")

CALLS = INTEGER | {"minimum": 0}
QUOTA_SCHEMA = record(
    {"calls_left?": CALLS, "calls_limit?": CALLS, "model_calls_left?": CALLS, "model_calls_limit?": CALLS},
    description="Of a free allowance, as the service told when the picture came: in all, and of the model alone.",
)

REQUEST_SCHEMA = DRAFT | record(
    {
        "prompt": described("What to draw, in English or Chinese. Over 800 characters gives a warning.", pattern=r"\S"),
        "size?": described(
            "width*height in pixels; total pixels from 512*512 to 2048*2048. A ratio works as aspect_ratio.",
            pattern=f"^(?:{SIZE_FORM}|{RATIO_FORM})$",
            default=DEFAULT_SIZE,
        ),
        "aspect_ratio?": {
            "enum": list(RATIO_SIZES),
            "description": "Instead of size: picks the recommended size of about 1024*1024 pixels.",
        },
        "seed?": described(
            "-1 or left out: one is picked, sent and recorded.", "integer", minimum=-1, maximum=MAX_SEED
        ),
        "prompt_extend?": described(
            "Let the service rewrite the prompt first: slower, billed at about twice the price.",
            "boolean",
            default=False,
        ),
        "base_url?": described(
            "Whole endpoint, API root or bare host; the key goes to trusted hosts only.", minLength=1
        ),
    },
    title="image.generate request",
    additionalProperties=False,
    **{"not": {"required": ["size", "aspect_ratio"]}},
)

ERROR_SCHEMA = record(
    {
        "code": TEXT | {"pattern": "^[a-z][a-z0-9_]*$"},
        "message": TEXT,
        "hint": described("What to do next, one line."),
        "exit_code": INTEGER,
        "retryable": described("The same command may be run again without paying twice.", "boolean"),
        "billed": BILLED,
        "problems?": TEXTS,
        "problem_count?": described("Where problems holds only the first of many (batch).", "integer"),
        "changes?": described("What would be made again, and for how many US$ (batch).", "object"),
        "progress?": described("How far the running batch is.", "object"),
        "next_command?": described("Free of charge, shell-quoted, absolute paths."),
        "retry_after_s?": NUMBER | {"minimum": 0},
        "http_status?": INTEGER,
        "service_code?": TEXT,
        "request_id?": TEXT,
        "evidence_path?": TEXT,
        "image_url?": TEXT,
        "seed?": described("That was sent, or would have been.", "integer"),
        "estimated_cost?": described("US$ that were, or may have been, billed for this picture.", "number"),
        "prompt?": described("That was refused; its first 800 characters."),
        "refused?": {"enum": ["input", "output"], "description": "By content safety: the prompt, or the picture."},
    },
)

RESPONSE_SCHEMA = DRAFT | record(
    {
        "image_url?": described("Signed link, dies soon. None where bytes are handed over."),
        "width": OF_SAVED_FILE,
        "height": OF_SAVED_FILE,
        "prompt": TEXT,
        "rewritten_prompt?": TEXT,
        "reasoning?": TEXT,
        "request_id": TEXT,
        "seed?": described("None where none can be sent.", "integer", minimum=0, maximum=MAX_SEED),
        "size": described("As asked, width*height."),
        "provider": TEXT,
        "region": TEXT,
        "image_path": ABSOLUTE,
        "evidence_path": ABSOLUTE,
        "estimated_cost?": described("US$ by the price list; none where the price is not known.", "number"),
        "quota?": QUOTA_SCHEMA,
        "paid_before?": {"const": True, "description": "Of a recovery: the cost is that of an earlier command."},
        "warnings?": TEXTS | {"minItems": 1},
    },
    title="image.generate response",
    description='What --print-response prints; on failure {"error": …} with the shape of $defs/error.',
    **{"$defs": {"error": ERROR_SCHEMA}},
)

STATUSES = ["submitting", "submitted", "generated", "saved", "failed", "unknown"]
ATTEMPT_SCHEMA = record(
    {
        "at": MOMENT,
        "http_status?": INTEGER,
        "service_code?": TEXT,
        "outcome?": described("generated, submitted, or the code of the error."),
        "billed?": BILLED,
        "wait_s?": described("Pause before the next attempt, in seconds.", "number"),
        "endpoint?": described("Where it went, where that is not the endpoint of the evidence."),
    },
)
ANSWER_SCHEMA = record(
    {
        "request_id?": TEXT,
        "usage?": {"type": "object"},
        "quota?": QUOTA_SCHEMA,
        "image_url?": TEXT,
        "other_image_urls?": TEXTS,
        "expires_at?": MOMENT,
        "rewritten_prompt?": TEXT,
        "reasoning?": TEXT,
        "seed?": described("That it was drawn from, where it says so.", "integer", minimum=0, maximum=MAX_SEED),
    },
)
UNREAD_SCHEMA = record(
    {
        "http_status": INTEGER,
        "content_type?": TEXT,
        "task_ids?": TEXTS,
        "links?": TEXTS,
        "body?": described(f"Its first {MAX_KEPT_ANSWER} characters, without the key."),
    },
    description="The answer in which no picture was found, where it does not prove that none was billed.",
)
IMAGE_SCHEMA = record(
    {
        "path": TEXT,
        "sha256": TEXT,
        "bytes": INTEGER,
        "format": {"enum": list(MAX_SIDE)},
        "width": INTEGER,
        "height": INTEGER,
        "source_format?": IF_CONVERTED,
        "source_sha256?": IF_CONVERTED,
        "warnings?": TEXTS,
    },
)
COST_SCHEMA = record(
    {
        "estimate?": described("None where it is not known.", "number"),
        "currency": {"const": "USD"},
        "basis": TEXT,
        "price_list_date": TEXT,
    }
)

EVIDENCE_SCHEMA = DRAFT | record(
    {
        "schema_version": {"const": 1},
        "tool": record({"name": TEXT, "version": TEXT}),
        "status": {"enum": STATUSES},
        "provider": TEXT | {"pattern": "^[a-z][a-z0-9_]*$"},
        "region": TEXT,
        "endpoint": TEXT,
        "endpoint_source?": described("What named it: an option, a field, variables, a file, or default."),
        "operation": {"const": "image.generate"},
        "billable": {"type": "boolean"},
        "request": described("Normalized: itself a valid request.", "object"),
        "payload": described("The body that was sent.", "object"),
        "settings?": described("The provider's own options.", "object"),
        "unused?": TEXTS
        | {"description": "What was asked for and is not used: the server ignores it, or it was left out."},
        "output": described("Absolute path that was asked for."),
        "started_at": MOMENT,
        "generated_at?": MOMENT,
        "finished_at?": MOMENT,
        "timings_ms?": {"type": "object", "additionalProperties": NUMBER},
        "attempts": {"type": "array", "items": ATTEMPT_SCHEMA},
        "task_id?": TEXT | {"minLength": 1},
        "response?": ANSWER_SCHEMA,
        "answer?": UNREAD_SCHEMA,
        "image?": IMAGE_SCHEMA,
        "cost": COST_SCHEMA,
        "warnings?": TEXTS,
        "error?": ERROR_SCHEMA,
    },
    title="evidence of one picture",
)

RESULT_SCHEMA: dict[str, Any] = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "title": "line of a batch's results.jsonl",
    "description": "One picture of the input, or of an earlier one that was paid for. It holds no link.",
    "type": "object",
    "required": ["number", "state", "prompt", "size", "prompt_extend", "output", "attempts"],
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
        "endpoint": {"type": "string", "description": "Where it was asked for last; none before."},
        "estimated_cost": {
            "type": "number",
            "description": "US$ of all tries that were, or may have been, billed; none where the price is not known.",
        },
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
