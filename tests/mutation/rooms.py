"""Rooms: which tests hold each of them, the quickest first; and the mutants that no test needs to notice, and why."""

from __future__ import annotations

from typing import NamedTuple

# Words of pytest. A mutant that one stage has noticed is not shown to the next.
ONE_PICTURE = ("tests/test_cli.py", "tests/test_recovery.py", "tests/test_interruption.py")
FAULTS = ("tests/test_faults.py", "-k", "not bomb and not nested and not megabyte and not without_an_end")
PROVIDERS = ("tests/test_providers.py", "-k", "not diffusers")
TRUST = ("tests/test_entitled.py", "tests/test_trust.py")
EXCHANGE = ("tests/test_exchange.py",)
ACCOUNT = ("tests/test_account.py", "tests/test_words.py")
NETWORK = ("tests/test_network.py", "tests/test_service_words.py")
NAMED = "tests/test_named_tasks.py"
OWN = ("tests/test_words.py", "tests/test_own_servers.py")
BATCH_FIRST = ("tests/test_batch_results.py",)
BATCH_QUICK = ("tests/test_batch_state.py", "tests/test_batch_results.py")
BATCH_SLOW = (
    *("tests/test_batch_money.py", "tests/test_batch_run.py"),
    *("-k", "not time_limit and not every_few_seconds and not another_programs_lock"),
)
FLEET = ("tests/test_fleet.py", "-k", "not fifty_rows")
SEAM_ONE = ("tests/test_seam.py", "-k", "attempt_leaves or copy_that or impossible_output")
SEAM_MANY = ("tests/test_seam.py", "-k", "earlier_run or of_a_row or collides or saved_row or links_that")

ROOMS: dict[str, tuple[tuple[str, ...], ...]] = {
    "make": (("tests/test_paid.py", NAMED), OWN, ONE_PICTURE, FAULTS, SEAM_ONE, PROVIDERS),
    "settle": (("tests/test_settle.py", NAMED), OWN, ONE_PICTURE, FAULTS, BATCH_QUICK),
    "plan": (
        ("tests/test_plan.py",),
        ACCOUNT,
        ("tests/test_request.py", "tests/test_trust.py"),
        ONE_PICTURE,
        PROVIDERS,
    ),
    "trust": (TRUST, ACCOUNT, ("tests/test_credentials.py", "tests/test_strangers.py"), FAULTS, PROVIDERS),
    "keys": (
        ("tests/test_keys.py", "tests/test_entitled.py"),
        ACCOUNT,
        ("tests/test_credentials.py", "tests/test_trust.py"),
        PROVIDERS,
    ),
    "transport": (EXCHANGE, NETWORK, FAULTS, ("tests/test_trust.py", "tests/test_recovery.py"), ONE_PICTURE, PROVIDERS),
    "wire": (EXCHANGE, NETWORK, FAULTS, ("tests/test_trust.py", "tests/test_recovery.py"), ONE_PICTURE, PROVIDERS),
    "batch/work": (("tests/test_batch_work.py",), BATCH_FIRST, BATCH_QUICK, FLEET, BATCH_SLOW, SEAM_MANY),
    "batch/plan": (("tests/test_batch_plan.py",), BATCH_QUICK, ("tests/test_batch_input.py",), BATCH_SLOW, SEAM_MANY),
    "batch/jobs": (
        ("tests/test_batch_journal.py", "tests/test_batch_work.py"),
        FLEET,
        BATCH_FIRST,
        BATCH_QUICK,
        BATCH_SLOW,
        SEAM_MANY,
    ),
    "batch/journal": (("tests/test_batch_journal.py",), BATCH_FIRST, BATCH_QUICK, BATCH_SLOW, SEAM_MANY),
    "account": (("tests/test_keys.py", "tests/test_account.py"), ("tests/test_trust.py",)),
}


class Explained(NamedTuple):
    """A mutant that is no fault, or none that anybody could notice."""

    room: str
    was: str  # the changed lines, each without its indentation, as the report shows them
    became: str | None  # None: whatever it is
    why: str


EXPLAINED: tuple[Explained, ...] = (
    Explained(
        "settle",
        'FETCH = "fetch"  # by its link, or from the bytes that are here',
        None,
        "a way has a name, which is told nowhere",
    ),
    Explained("settle", 'NONE = "none"', None, "a way has a name, which is told nowhere"),
    Explained("settle", 'ASK = "ask"  # after its task', None, "a way has a name, which is told nowhere"),
    Explained(
        "settle",
        'nothing = Have("no", "submitting", False, "", False, True)',
        None,
        "the table of the reference is of what a failure leaves, and that does not look at these",
    ),
    Explained(
        "trust",
        'authority = re.split("[/?#]", re.sub("^[^/]*://|^/+", "", text), maxsplit=1)[0]',
        'authority = re.split("[/?#]", re.sub("^[^/]*://|^/+", "", text))[0]',
        "the first part is the same",
    ),
    Explained(
        "transport",
        "PIECE = 64 * 1024  # bytes of an answer that are read at once",
        None,
        "an answer is the same in smaller and in larger pieces",
    ),
    Explained(
        "transport",
        "response.raw.enforce_content_length = False",
        "pass",
        "the urllib3 of these tests hands out what had come before it complains; older ones do not",
    ),
    Explained(
        "transport",
        "if not wire.connecting and isinstance(error, (requests.exceptions.InvalidURL, "
        "requests.exceptions.InvalidSchema)):",
        "if isinstance(error, (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema)):",
        "both are raised before anything connects",
    ),
    Explained(
        "wire",
        "if self.proxy is None or not self.is_at_proxy or str(self.proxy) in error.reason:",
        "if not self.is_at_proxy or str(self.proxy) in error.reason:",
        "where there is no proxy nobody is at it; the types need it said",
    ),
    Explained(
        "wire",
        "if self._wire.expired or self._wire.stop.left_s <= 0:  # the machine may have slept",
        "if self._wire.expired or self._wire.stop.left_s < 0:  # the machine may have slept",
        "a time that is over to the nanosecond",
    ),
    Explained(
        "wire",
        'conn.cert_reqs = "CERT_REQUIRED"  # and no bundle beside the context, which knows whom to trust',
        None,
        "urllib3 requires a certificate where nothing is said; that is said here all the same",
    ),
    Explained(
        "plan",
        "raise AssertionError",
        "pass",
        "what is missing has left a problem, which was raised; the types need it said",
    ),
    Explained(
        "plan",
        "if endpoint is None or output is None:  # each of them has left a problem",
        None,
        "what is missing has left a problem, which was raised; the types need it said",
    ),
    Explained(
        "plan",
        'sentences = provider.cannot(normalize({"prompt": "x"} | sound, with_seed=provider.takes_seed))',
        'sentences = provider.cannot(normalize({"prompt": "xx"} | sound, with_seed=provider.takes_seed))',
        "any prompt that is right, where the request has none",
    ),
    Explained(
        "plan",
        "request = normalize(raw, with_seed=provider.takes_seed)",
        "request = normalize(raw)",
        "a plan takes away the seed that its provider does not take",
    ),
    Explained(
        "plan",
        "if recorded and replayed:",
        "if replayed:",
        "nothing is replayed of no record; the types need it said",
    ),
    Explained(
        "settle",
        "is_redirect = 300 <= (fault.http_status or 0) < 400",
        "is_redirect = 300 <= (fault.http_status or 1) < 400",
        "neither is a redirect",
    ),
    Explained(
        "settle",
        "is_redirect = 300 <= (fault.http_status or 0) < 400",
        "is_redirect = 300 <= (fault.http_status or -1) < 400",
        "neither is a redirect",
    ),
    Explained(
        "settle",
        'Advice(PICTURE_BLOCKED, code="blocked", refused="output"),',
        'Advice(PICTURE_BLOCKED, refused="output"),',
        "it is told of what is blocked alone which side was refused",
    ),
    Explained(
        "settle",
        "return max(known, key=BILLED.index)",
        "return max(known)",
        "the three words stand in this order by the alphabet, too",
    ),
    Explained(
        "batch/plan",
        'self.db = sqlite3.connect("", uri=True, isolation_level=None)',
        'self.db = sqlite3.connect("", uri=False, isolation_level=None)',
        "some builds of SQLite take a URI in ATTACH whatever is said here",
    ),
    Explained(
        "batch/plan",
        'self.db.execute("PRAGMA folder.synchronous = FULL")',
        "pass",
        "it is the default, but of some builds of SQLite",
    ),
    Explained(
        "batch/plan",
        'self.db.execute("CREATE INDEX plan_numbers ON plan (number) WHERE number IS NOT NULL")',
        "pass",
        "it changes how long a long plan takes, and no answer",
    ),
    Explained(
        "batch/plan",
        'self.db.create_function("pick_seed", 0, pick_seed if provider.takes_seed else lambda: NO_SEED)',
        'self.db.create_function("pick_seed", -1, pick_seed if provider.takes_seed else lambda: NO_SEED)',
        "any number of arguments, of which it gets none",
    ),
    Explained(
        "batch/journal",
        "self.latency_before: float | None = (database.execute(question).fetchone() or (None,))[0]",
        "self.latency_before: float | None = (database.execute(question).fetchone() or (None,))[ -1]",
        "the last of one is the first",
    ),
    Explained(
        "batch/plan",
        'return [f"output: {outside_text(output, 100)} is that of {self.unit} {taken[0]} too"]',
        'return [f"output: {outside_text(output, 100)} is that of {self.unit} {taken[ -1]} too"]',
        "the last of one is the first",
    ),
    Explained(
        "batch/plan",
        'texts = [f"{self.unit} {row.line}: {text}" for text in sentences[: max(0, room)]]',
        'texts = [f"{self.unit} {row.line}: {text}" for text in sentences[: max( -1, room)]]',
        "there is never less room than none",
    ),
    Explained(
        "batch/jobs",
        "self._workspace = places[0].workspace",
        "self._workspace = places[ -1].workspace",
        "of services that have workspaces one place is named",
    ),
    Explained(
        "batch/jobs",
        "self._alike = services_alike(database, places[0].provider, self.places)",
        "self._alike = services_alike(database, places[ -1].provider, self.places)",
        "all are of one provider",
    ),
    Explained(
        "batch/plan",
        'self.problems += [Problem("invalid_rows", text) for text in texts]',
        'self.problems += [Problem("xinvalid_rows", text) for text in texts]',
        "of these problems only the texts are told",
    ),
    Explained("batch/journal", "GROUP = 500  # statements a commit", None, "any number like it does"),
    Explained(
        "batch/journal",
        "for (_, _, done), end in zip(entries, ends, strict=True):",
        "for (_, _, done), end in zip(entries, ends):",
        "there is an end for each",
    ),
)
