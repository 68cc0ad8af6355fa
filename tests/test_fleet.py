"""One batch at several servers of one's own: least busy first, each at its own pace, a dead one left out and told.

What was surely not sent, or cost nothing, is made by the others; what may have cost something never is.
"""

from __future__ import annotations

import functools
import json
import socket
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from batch_helpers import BATCH, Batch, Gate, assert_counts
from conftest import TEST_KEY, Result, Shell
from fault_server import Answer, FaultServer, file, json_answer
from mock_server import MockServer
from test_comfyui import Comfy
from test_own_servers import MODELS, POST, OneByOne, models, picture

NAMES = ("a", "b", "c")
HANG_UP = Answer(hang_up="after-reading")


@pytest.fixture
def fleet(shell: Shell) -> Iterator[Fleet]:
    fleet = Fleet(shell)
    yield fleet
    for server in fleet.servers.values():
        server.close()


class Fleet:
    """Servers on loopback by the names a, b and c, and a batch at some of them."""

    provider = "openai"

    def __init__(self, shell: Shell) -> None:
        shell.script = BATCH
        self.shell = shell
        self.servers: dict[str, FaultServer] = {}
        self.batch: Batch | None = None

    def start(self, count: int = 2, **behaviours: Any) -> None:
        """Have so many servers make pictures at once; `behaviours` are of those that do otherwise."""
        for name in NAMES[:count]:
            server = self.servers[name] = FaultServer()
            server.__enter__()
            server.play(POST, behaviours.get(name, picture))
        self.batch = Batch(self.shell, self.servers["a"])

    def add(self, name: str, server: FaultServer) -> None:
        self.servers[name] = server
        server.__enter__()
        self.batch = self.batch or Batch(self.shell, server)

    def url(self, name: str) -> str:
        return f"{self.servers[name].root}/v1" if self.provider == "openai" else self.servers[name].root

    def addresses(self, names: str) -> list[str]:
        return [word for name in names for word in ("--base-url", self.url(name))]

    def options(self, names: str, *more: str) -> list[str]:
        return ["--provider", self.provider, *self.addresses(names), "--no-gallery", *more]

    def rows(self, count: int) -> list[str]:
        assert self.batch is not None
        return self.batch.prompts(count)

    def run(self, names: str, *more: str, timeout: float = 60) -> Result:
        assert self.batch is not None
        return self.batch.run(*self.options(names, *more), timeout=timeout)

    def dry_run(self, names: str, *more: str) -> dict[str, Any]:
        return self.run(names, "--dry-run", *more).json

    def posts(self, name: str) -> list[str]:
        """The prompts that a server was asked for."""
        return [json.loads(request.body)["prompt"] for request in self.servers[name].posts]

    @property
    def asked(self) -> Counter[str]:
        """How often each prompt was asked for, of any server."""
        return Counter(prompt for name in self.servers for prompt in self.posts(name))

    def made_at(self) -> Counter[str]:
        """How many saved pictures the results name each server for."""
        assert self.batch is not None
        roots = {server.root: name for name, server in self.servers.items()}
        return Counter(
            next(name for root, name in roots.items() if result["endpoint"].startswith(root))
            for result in self.batch.results()
            if result["state"] == "saved"
        )


def told(result: Result) -> list[str]:
    """The codes for which servers were left out, in the order of the addresses."""
    return [server["left_out"]["code"] if "left_out" in server else "" for server in result.json["servers"]]


def dead_url() -> str:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    return f"http://127.0.0.1:{port}/v1"


# Sharing the work -----------------------------------------------------------------------------------------------------


@pytest.mark.smoke
@pytest.mark.parametrize("count", [2, 3])
def test_servers_that_are_alike_share_the_work(fleet: Fleet, count: int) -> None:
    fleet.start(count, **{name: OneByOne(0.05) for name in NAMES})
    fleet.rows(24)
    result = fleet.run("abc"[:count])
    assert_counts(result, saved=24)
    assert (result.code, set(fleet.asked.values())) == (0, {1})
    shares = [len(fleet.posts(name)) for name in "abc"[:count]]
    assert min(shares) >= 24 / count / 2, shares
    assert fleet.made_at() == dict(zip(NAMES, shares, strict=False))
    servers = result.json["servers"]
    assert [server["pictures"] for server in servers] == shares
    assert [server["endpoint"] for server in servers] == [f"{fleet.url(n)}/images/generations" for n in "abc"[:count]]


def test_a_slow_one_gets_less_and_each_has_a_pace_of_its_own(fleet: Fleet) -> None:
    fleet.start(2, a=OneByOne(0.04, slots=4), b=OneByOne(0.4))
    fleet.rows(40)
    result = fleet.run("ba")
    assert_counts(result, saved=40)
    slow, quick = (server["pictures"] for server in result.json["servers"])
    assert 0 < slow < quick / 2
    assert result.json["servers"][0]["at_once"] < result.json["servers"][1]["at_once"]


def test_each_is_asked_what_it_is_and_gets_its_own_words(fleet: Fleet) -> None:
    fleet.start(2, a=OneByOne(0.05), b=OneByOne(0.05))
    fleet.servers["a"].play(MODELS, models("vllm", "Tongyi-MAI/Z-Image-Turbo"))
    fleet.servers["b"].play(MODELS, models("koboldcpp", "z-image-turbo-q4"))
    fleet.rows(8)
    result = fleet.run("ab")
    fields = {name: [json.loads(request.body) for request in fleet.servers[name].posts] for name in "ab"}
    assert all(body["num_inference_steps"] == 9 and "steps" not in body for body in fields["a"])
    assert all(body["steps"] == 8 and "num_inference_steps" not in body for body in fields["b"])
    assert "Tongyi-MAI/Z-Image-Turbo" in result.stderr and "z-image-turbo-q4" in result.stderr  # not the same model
    assert fleet.batch is not None
    for prompt, evidence in fleet.batch.evidence().items():
        name = next(name for name in "ab" if prompt in fleet.posts(name))
        assert evidence["endpoint"] == f"{fleet.url(name)}/images/generations"
        assert evidence["settings"]["steps"] == {"a": 9, "b": 8}[name]


def test_of_servers_with_one_model_none_is_told(fleet: Fleet) -> None:
    fleet.start(2)
    for name in "ab":
        fleet.servers[name].play(MODELS, models("vllm", "Tongyi-MAI/Z-Image-Turbo"))
    fleet.rows(2)
    assert "model" not in fleet.run("ab").stderr


# One that fails -------------------------------------------------------------------------------------------------------


def test_one_that_is_dead_from_the_start_is_left_out_and_told(fleet: Fleet) -> None:
    fleet.start(1)
    fleet.rows(6)
    assert fleet.batch is not None
    result = fleet.batch.run(*fleet.options(""), "--base-url", dead := dead_url(), *fleet.addresses("a"))
    assert_counts(result, saved=6)
    assert (result.code, told(result), set(fleet.asked.values())) == (0, ["unreachable", ""], {1})
    assert f"left out: {dead}" in result.stderr


def test_one_that_dies_has_its_pictures_made_by_the_other_once(fleet: Fleet) -> None:
    gate = Gate(HANG_UP)
    fleet.start(2, a=OneByOne(0.03), b=gate)
    fleet.rows(20)
    b = fleet.servers["b"]

    def die() -> None:
        b.wait_until(lambda: gate.arrived)
        b.close()

    threading.Thread(target=die).start()
    result = fleet.run("ab")
    gate.open()
    assert_counts(result, saved=20)
    assert result.code == 0 and told(result) in (["", "unreachable"], ["", "service_failing"])
    lost = [json.loads(request.body)["prompt"] for request in gate.arrived]
    assert lost and set(Counter(fleet.posts("a")).values()) == {1} and set(lost) <= set(fleet.posts("a"))
    assert fleet.made_at() == {"a": 20}
    assert fleet.batch is not None
    for prompt in lost:  # the evidence says where the lost one went
        first, second = fleet.batch.evidence()[prompt]["attempts"]
        assert (first["endpoint"], first["outcome"]) == (f"{fleet.url('b')}/images/generations", "outcome_unknown")
        assert "endpoint" not in second


def test_where_a_picture_costs_what_the_dead_one_had_is_not_asked_for_again(fleet: Fleet) -> None:
    fleet.start(2, a=OneByOne(0.03), b=HANG_UP)
    fleet.rows(20)
    result = fleet.run("ab", "--price", "0.01")
    lost = fleet.posts("b")
    assert 0 < len(lost) <= 5 and set(fleet.asked.values()) == {1}
    assert_counts(result, saved=20 - len(lost), unknown=len(lost))
    assert (result.code, told(result)) == (1, ["", "service_failing"])


REFUSALS: dict[str, tuple[Answer, str]] = {
    "the key": (json_answer({"error": {"message": "Invalid API key"}}, 401), "key_rejected"),
    "the model": (json_answer({"error": {"message": "not found", "code": "model_not_found"}}, 404), "not_found"),
    "for money": (json_answer({"error": {"message": "insufficient balance"}}, 402), "balance"),
    "failing": (json_answer({"error": {"message": "CUDA error"}}, 500), "service_failing"),
    "a gateway": (Answer(502), "service_failing"),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_one_that_refuses_is_left_out_and_the_other_makes_all(fleet: Fleet, name: str) -> None:
    answer, code = REFUSALS[name]
    fleet.start(2, a=OneByOne(0.05), b=answer)
    fleet.rows(12)
    result = fleet.run("ab", "--timeout", "30")
    assert_counts(result, saved=12)
    assert (result.code, told(result)) == (0, ["", code])
    assert Counter(fleet.posts("a")) == dict.fromkeys((f"picture {number}" for number in range(12)), 1)
    assert len(fleet.posts("b")) <= 4


@pytest.mark.parametrize("name", ["the key", "failing"])
def test_where_all_refuse_the_batch_ends_as_with_one(fleet: Fleet, name: str) -> None:
    fleet.start(2, a=REFUSALS[name][0], b=REFUSALS[name][0])
    fleet.rows(12)
    both = fleet.run("ab", "--timeout", "30")
    assert fleet.batch is not None
    fleet.batch.out = fleet.shell.folder / "alone"
    alone = fleet.run("a", "--timeout", "30")
    assert (both.code, both.json["error"]["code"]) == (alone.code, alone.json["error"]["code"])
    assert_counts(both, pending=12)
    assert "servers" not in alone.json and len(both.json["servers"]) == 2


def test_where_all_are_dead_too(fleet: Fleet) -> None:
    fleet.start(1)
    fleet.rows(3)
    assert fleet.batch is not None
    addresses = ("--base-url", dead_url(), "--base-url", dead_url())
    result = fleet.batch.run(*fleet.options(""), *addresses, "--timeout", "10")
    assert result.code == 6
    assert_counts(result, pending=3)


def test_a_row_that_is_refused_is_not_asked_for_elsewhere(fleet: Fleet) -> None:
    bad = json_answer({"error": {"message": "the prompt is too strange"}}, 400)
    fleet.start(2, a=bad, b=bad)
    fleet.rows(4)
    assert_counts(fleet.run("ab"), failed=4)
    assert set(fleet.asked.values()) == {1}


def test_one_that_is_busy_is_waited_for_while_the_other_works(fleet: Fleet) -> None:
    busy = json_answer({"error": {"message": "slow down"}}, 429, headers=(("Retry-After", "1"),))
    fleet.start(2, a=OneByOne(0.1), b=busy)
    fleet.servers["b"].play(POST, busy, picture)
    fleet.rows(30)
    result = fleet.run("ba")
    assert_counts(result, saved=30)
    assert told(result) == ["", ""] and fleet.made_at()["b"] > 0


# Runs that follow -----------------------------------------------------------------------------------------------------


def killed(fleet: Fleet, names: str, *more: str, after: Callable[[], object]) -> None:
    assert fleet.batch is not None
    process = fleet.batch.start(*fleet.options(names, *more))
    fleet.servers[names[0]].wait_until(after)
    fleet.batch.kill(process)


def has_asked(fleet: Fleet, count: int) -> bool:
    return sum(fleet.asked.values()) >= count


@pytest.mark.parametrize("price", ["0", "0.01"])
def test_fifty_rows_killed_three_times_lose_none_and_pay_for_none_twice(fleet: Fleet, price: str) -> None:
    fleet.start(2, a=OneByOne(0.04, slots=2), b=OneByOne(0.07, slots=2))
    fleet.rows(50)
    for count, names in zip((8, 20, 32), ("ab", "ba", "b"), strict=True):
        killed(fleet, names, "--price", price, after=functools.partial(has_asked, fleet, count))
    result = fleet.run("ab", "--price", price)
    unknown = result.json["unknown"]
    assert_counts(result, saved=50 - unknown, unknown=unknown)
    again = sum(fleet.asked.values()) - len(fleet.asked)
    if price == "0":
        assert (result.code, unknown, len(fleet.asked)) == (0, 0, 50) and again <= 3 * 12
    else:  # one that was noted, and killed before it left, is unknown too
        assert again == 0 and unknown <= 3 * 12 and len(fleet.asked) >= 50 - unknown
    assert sum(fleet.made_at().values()) == 50 - unknown


def test_what_is_saved_stays_whichever_servers_are_named_later(fleet: Fleet) -> None:
    fleet.start(3, a=OneByOne(0.05), b=OneByOne(0.05))
    fleet.rows(8)
    assert_counts(fleet.run("ab", "--limit", "6"), saved=6, pending=2)
    assert fleet.dry_run("c")["to_make"] == 2
    assert_counts(fleet.run("c"), saved=8)
    assert (len(fleet.posts("c")), set(fleet.asked.values())) == (2, {1})
    assert fleet.run("b").code == 0


# Tasks and links ------------------------------------------------------------------------------------------------------


@pytest.fixture
def comfy(fleet: Fleet) -> Fleet:
    fleet.provider = "comfyui"
    for name in "ab":
        fleet.add(name, Comfy())
    return fleet


def names_at(server: FaultServer) -> set[str]:
    assert isinstance(server, Comfy)
    return set(server.jobs)


def looked_up(server: FaultServer) -> set[str]:
    paths = [request.path for request in server.requests if request.method == "GET"]
    return {path.rpartition("/")[2] for path in paths if path.startswith("/history/")}


@pytest.mark.smoke
def test_each_task_is_looked_up_and_fetched_where_it_is(comfy: Fleet) -> None:
    comfy.rows(8)
    result = comfy.run("ab")
    assert_counts(result, saved=8)
    for server in comfy.servers.values():
        assert len(names_at(server)) >= 2 and names_at(server) == looked_up(server)
        assert len([request for request in server.requests if request.path == "/view"]) == len(names_at(server))


def holding(server: FaultServer) -> None:
    assert isinstance(server, Comfy)
    server.waits = 10**6


def releasing(server: FaultServer) -> None:
    assert isinstance(server, Comfy)
    server.waits = 0


def started(comfy: Fleet) -> None:
    """Killed while both servers have two tasks each in the queue."""
    for server in comfy.servers.values():
        holding(server)
    comfy.rows(4)
    assert comfy.batch is not None
    batch = comfy.batch
    killed(comfy, "ab", after=lambda: list(batch.stored_states().values()).count("submitted") == 4)
    for server in comfy.servers.values():
        releasing(server)


def test_tasks_of_a_killed_run_are_looked_up_where_they_are_in_whatever_order(comfy: Fleet) -> None:
    started(comfy)
    before = {name: names_at(server) for name, server in comfy.servers.items()}
    result = comfy.run("ba")
    assert_counts(result, saved=4)
    for name, server in comfy.servers.items():
        assert names_at(server) == before[name] == looked_up(server)
        assert len(server.posts) == 2


def test_tasks_of_a_server_that_is_not_named_any_more_are_made_anew(comfy: Fleet) -> None:
    """They cost nothing; and a server that only a folder names is asked nothing."""
    started(comfy)
    asked = len(comfy.servers["b"].requests)
    result = comfy.run("a")
    assert_counts(result, saved=4)
    assert (len(comfy.servers["a"].posts), len(comfy.servers["b"].requests)) == (4, asked)
    assert comfy.made_at() == {"a": 4}


def test_links_to_a_server_that_is_not_named_any_more_too(comfy: Fleet) -> None:
    for server in comfy.servers.values():
        assert isinstance(server, Comfy)
        server.view = Answer(503)
    comfy.rows(4)
    assert_counts(comfy.run("ab", "--timeout", "4"), generated=4)
    for server in comfy.servers.values():
        assert isinstance(server, Comfy)
        server.view = file(server.picture)
    asked = len(comfy.servers["b"].requests)
    result = comfy.run("a")
    assert_counts(result, saved=4)
    assert len(comfy.servers["b"].requests) == asked and comfy.made_at() == {"a": 4}


@pytest.mark.parametrize("when", ["before the start", "in the middle"])
def test_tasks_of_one_that_dies_are_made_by_the_other(comfy: Fleet, when: str) -> None:
    started(comfy)
    b = comfy.servers["b"]
    if when == "in the middle":
        holding(b)
        asked = len(b.requests)

        def die() -> None:
            b.wait_until(lambda: len(b.requests) > asked + 6)
            b.close()

        threading.Thread(target=die).start()
    else:
        b.close()
    result = comfy.run("ab", "--timeout", "40")
    assert_counts(result, saved=4)
    assert (told(result), comfy.made_at()) == (["", "unreachable"], {"a": 4})


# Which addresses may be named -----------------------------------------------------------------------------------------


def test_the_plan_names_all_of_them_and_one_written_twice_once(fleet: Fleet) -> None:
    fleet.start(2)
    fleet.rows(20)
    plan = fleet.dry_run("ab", "--base-url", fleet.servers["a"].root + "/", "--concurrency", "1")
    endpoints = [f"{fleet.url(name)}/images/generations" for name in "ab"]
    assert (plan["endpoints"], plan["endpoint"]) == (endpoints, endpoints[0])
    alone = fleet.dry_run("a", "--base-url", fleet.servers["a"].root, "--concurrency", "1")
    assert "endpoints" not in alone and plan["estimated_duration_s"] < 0.7 * alone["estimated_duration_s"]
    assert not fleet.asked


@pytest.mark.parametrize("provider", ["dashscope", "zimageturbo", "modelscope"])
def test_a_service_has_one_address(shell: Shell, mock: MockServer, provider: str) -> None:
    shell.use(mock)
    shell.script = BATCH
    run = ("--provider", provider, "--prompt", "a fox", "--output-dir", "out")
    urls = {"dashscope": mock.base_url, "zimageturbo": mock.zimageturbo_url, "modelscope": mock.modelscope_url}
    other = urls[provider].replace("127.0.0.1", "localhost")
    error = shell.run(*run, "--base-url", urls[provider], "--base-url", other).error
    assert (error["code"], error["exit_code"]) == ("usage", 2)
    assert "2 addresses" in error["message"] and "openai" in error["hint"]
    assert shell.files() == []


@pytest.mark.parametrize("mode", [("--prompt", "a fox"), ("--check",)])
def test_one_picture_is_asked_for_at_one_address(shell: Shell, fleet: Fleet, mode: tuple[str, ...]) -> None:
    fleet.start(2)
    shell.script = BATCH.with_name("generate_image.py")
    error = shell.run("--provider", "openai", *mode, *fleet.addresses("ab"), "--print-response").error
    assert (error["code"], error["exit_code"]) == ("usage", 2)
    assert "--base-url" in error["message"] and "generate_batch.py" in error["hint"]
    assert not any(server.requests for server in fleet.servers.values())


def test_every_wrong_address_is_told_before_anything_is_sent(fleet: Fleet) -> None:
    fleet.start(1)
    fleet.rows(1)
    wrong = ("--base-url", "https://u:p@gpu.example", "--base-url", "https://gpu.example/v1?x=1")
    assert fleet.batch is not None
    error = fleet.batch.run(*fleet.options("a"), *wrong).error
    assert (error["code"], len(error["problems"])) == ("invalid_base_url", 2)
    assert not fleet.servers["a"].requests


def test_the_key_goes_only_to_those_that_may_have_it(fleet: Fleet) -> None:
    """Each is judged by itself; that one does not get it is told before anything is sent."""
    fleet.start(1)
    fleet.rows(2)
    fleet.shell.env["OPENAI_API_KEY"] = TEST_KEY
    plan = fleet.dry_run("a", "--base-url", "http://gpu.example/v1")
    assert any("gpu.example" in warning and "not sent" in warning for warning in plan["warnings"])
    result = fleet.run("a", "--base-url", "http://gpu.invalid/v1", "--price", "0")
    assert "not sent to gpu.invalid" in result.stderr.split("left out")[0]
    assert all(request.header("authorization") == f"Bearer {TEST_KEY}" for request in fleet.servers["a"].posts)
    assert result.json["saved"] == 2


def test_a_ceiling_needs_a_price_at_each(fleet: Fleet) -> None:
    fleet.start(1)
    fleet.rows(1)
    assert fleet.batch is not None
    error = fleet.batch.run(*fleet.options("a"), "--base-url", "https://gpu.example/v1", "--max-cost", "1").error
    assert error["code"] == "usage" and "gpu.example" in error["message"]


@pytest.mark.parametrize("host", ["api-inference.modelscope.cn", "api-inference.modelscope.ai"])
@pytest.mark.parametrize("script", ["generate_image.py", "generate_batch.py"])
def test_modelscope_is_led_to_its_own_provider(shell: Shell, host: str, script: str) -> None:
    shell.script = BATCH.with_name(script)
    where = ("--output-dir", "out") if "batch" in script else ("--print-response",)
    url = f"https://{host}/v1"
    error = shell.run("--provider", "openai", "--prompt", "a fox", "--base-url", url, *where).error
    assert (error["code"], error["exit_code"]) == ("invalid_base_url", 2)
    assert "--provider modelscope" in error["message"]


def test_sdapi_takes_several_too(shell: Shell, mock: MockServer) -> None:
    shell.use(mock)
    shell.script = BATCH
    with MockServer() as other:
        addresses = ("--base-url", mock.sdapi_url, "--base-url", other.sdapi_url)
        where = ("--output-dir", "out", "--no-gallery", "--concurrency", "1")
        run = ("--provider", "sdapi", "--prompt", "a fox", "--variants", "6", *addresses, *where)
        result = shell.run(*run)
        assert_counts(result, saved=6)
        assert all(server["pictures"] > 0 for server in result.json["servers"])
