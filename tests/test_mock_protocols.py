"""The mock's two further services as a specification: zimageturbo.ai below /api, OpenAI's Images API below /v1."""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest
import requests
from PIL import Image

from mock_server import FAULTS, MockServer, services_that_know
from zimage_mock.errors import ERRORS
from zimage_mock.server import MAX_BODY_BYTES
from zimage_mock.zimageturbo import ASPECT_SIZES

PROMPT = "A red panda reading a book"
TASK = {"prompt": PROMPT, "aspect_ratio": "4:3"}
IMAGE = {"prompt": PROMPT, "size": "512x512", "seed": 7}
OTHER_KEY = {"Authorization": "Bearer sk-other"}


@pytest.fixture(scope="module")
def mock() -> Iterator[MockServer]:
    """One server without limit or faults, for tests that look at answers only."""
    with MockServer(rpm=0) as server:
        yield server


@pytest.fixture
def faulty() -> Iterator[Callable[..., MockServer]]:
    """Starts a server with faults, which ends with the test."""
    started: list[MockServer] = []

    def start(faults: str = "", **settings: Any) -> MockServer:
        started.append(MockServer(**{"rpm": 0, "faults": faults, **settings}).start())
        return started[-1]

    yield start
    for server in started:
        server.close()


def send(mock: MockServer, method: str, url: str, body: Any = None, **options: Any) -> requests.Response:
    options.setdefault("headers", {"Authorization": f"Bearer {mock.api_key}"})
    return requests.request(method, url, json=body, timeout=10, allow_redirects=False, **options)


def submit(mock: MockServer, body: Any = TASK, **options: Any) -> requests.Response:
    return send(mock, "POST", f"{mock.zimageturbo_url}/generate", body, **options)


def task_id(mock: MockServer, body: Any = TASK) -> str:
    return str(submit(mock, body).json()["data"]["task_id"])


def status(mock: MockServer, task: str, **options: Any) -> requests.Response:
    return send(mock, "GET", f"{mock.zimageturbo_url}/status", params={"task_id": task}, **options)


def task_data(mock: MockServer, task: str) -> dict[str, Any]:
    data = status(mock, task).json()["data"]
    assert isinstance(data, dict)
    return data


def draw(mock: MockServer, body: Any = IMAGE, **options: Any) -> requests.Response:
    return send(mock, "POST", f"{mock.openai_url}/images/generations", body, **options)


def image_of(data: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(data))
    image.load()
    return image


def bytes_of(item: dict[str, str]) -> bytes:
    return base64.b64decode(item["b64_json"], validate=True)


def assert_envelope(reply: requests.Response, code: int) -> None:
    assert (reply.status_code, reply.json()["code"], reply.json()["data"]) == (code, code, None)
    assert reply.json().keys() == {"code", "message", "data"} and reply.json()["message"]


def assert_openai_error(reply: requests.Response, code: int) -> None:
    assert reply.status_code == code and reply.json().keys() == {"error"}
    error = reply.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"} and error["message"]
    assert reply.headers["x-request-id"]


SERVICES: list[tuple[Callable[..., requests.Response], Callable[[requests.Response, int], None]]] = [
    (submit, assert_envelope),
    (draw, assert_openai_error),
]
both = pytest.mark.parametrize("call, assert_error", SERVICES, ids=["zimageturbo", "openai"])


class TestPaths:
    def test_each_service_has_its_natural_root_on_the_same_port(self, mock: MockServer) -> None:
        root = f"http://127.0.0.1:{mock.server_port}"
        assert [mock.base_url, mock.zimageturbo_url, mock.openai_url] == [f"{root}/api/v1", f"{root}/api", f"{root}/v1"]

    @pytest.mark.parametrize(
        "path, form",
        [
            ("/api", assert_envelope), ("/api/", assert_envelope), ("/api/v2/models", assert_envelope),
            ("/api/generate/", assert_envelope), ("/api/v1x", assert_envelope),
            ("/v1", assert_openai_error), ("/v1/nothing", assert_openai_error),
        ],
    )  # fmt: skip
    def test_an_unknown_path_is_404_in_the_form_of_its_service(self, mock: MockServer, path: str, form: Any) -> None:
        form(requests.get(f"http://127.0.0.1:{mock.server_port}{path}", timeout=5), 404)

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PROPFIND"])
    def test_a_wrong_method_is_405_in_the_form_of_its_service(self, mock: MockServer, method: str) -> None:
        reply = requests.request(method, f"{mock.zimageturbo_url}/generate", timeout=5)
        assert_envelope(reply, 405)
        reply = requests.request(method, f"{mock.openai_url}/images/generations", timeout=5)
        assert (reply.status_code, reply.json().keys()) == (405, {"error"})

    @both
    @pytest.mark.parametrize(
        "data, kind", [(b"{", "application/json"), (b"[]", "application/json"), (b"{}", "text/plain")]
    )
    def test_a_body_that_is_no_json_object_is_400(
        self, mock: MockServer, call: Any, assert_error: Any, data: bytes, kind: str
    ) -> None:
        headers = {"Authorization": f"Bearer {mock.api_key}", "Content-Type": kind}
        assert_error(call(mock, None, data=data, headers=headers), 400)

    def test_a_body_that_cannot_be_read_is_400_in_the_form_of_its_service(self, mock: MockServer) -> None:
        body = b"x" * (MAX_BODY_BYTES + 1)
        assert_envelope(submit(mock, None, data=body), 400)
        reply = draw(mock, None, data=body)
        assert (reply.status_code, reply.json().keys()) == (400, {"error"})


class TestSharedFaults:
    @pytest.mark.smoke
    @both
    @pytest.mark.parametrize(
        "name, code",
        [
            ("400", 400), ("blocked", 400), ("402", 402), ("arrearage", 402), ("401", 401), ("403", 403), ("404", 404),
            ("429", 429), ("429-wait", 429), ("429-long", 429), ("500", 500), ("503", 503), ("timeout", 504),
        ],
    )  # fmt: skip
    def test_each_error_comes_in_the_form_of_its_service(
        self, faulty: Any, call: Any, assert_error: Any, name: str, code: int
    ) -> None:
        mock = faulty(name)
        reply = call(mock)
        assert_error(reply, code)
        assert reply.headers.get("Retry-After") == {"429-wait": "1", "429-long": "3600"}.get(name)
        stats = mock.stats()
        assert stats["billed"] == (1 if name == "timeout" else 0)
        assert (stats["throttled"], sum(stats["errors"].values())) == (int(code == 429), 1)
        assert call(mock).status_code == 200, "one entry, one request"

    @both
    @pytest.mark.parametrize("name, code", [("500-html", 500), ("502", 502), ("504", 504), ("not-json", 200)])
    def test_the_answer_of_a_gateway_hides_a_picture_that_is_billed(
        self, faulty: Any, call: Any, assert_error: Any, name: str, code: int
    ) -> None:
        mock = faulty(name)
        reply = call(mock)
        assert reply.status_code == code
        with pytest.raises(ValueError):
            reply.json()
        assert (mock.stats()["billed"], mock.stats()["requests"][0]["billed"]) == (1, True)

    @both
    @pytest.mark.parametrize("name, billed", [("hangup-before", 0), ("hangup-after", 1), ("cut-answer", 1)])
    def test_who_gets_no_answer_pays_if_the_picture_is_made(
        self, faulty: Any, call: Any, assert_error: Any, name: str, billed: int
    ) -> None:
        mock = faulty(name)
        with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
            call(mock)
        assert (mock.stats()["billed"], mock.stats()["errors"]) == (billed, {name: 1})

    @both
    def test_a_redirect_makes_nothing(self, faulty: Any, call: Any, assert_error: Any) -> None:
        mock = faulty("redirect")
        assert (call(mock).status_code, mock.stats()["billed"]) == (307, 0)

    @both
    def test_content_safety_can_be_rehearsed_by_prompt(self, mock: MockServer, call: Any, assert_error: Any) -> None:
        body = TASK if call is submit else IMAGE
        assert_error(call(mock, body | {"prompt": "now mock:blocked please"}), 400)
        assert call(mock, body | {"prompt": "mock:blocked-empty"}).status_code == 200

    @pytest.mark.parametrize("name", ["task-failed", "envelope-500", "quota", "data-url"])
    def test_a_fault_that_a_service_does_not_know_is_none(self, faulty: Any, name: str) -> None:
        mock = faulty(f"{name}*3")
        headers = {"Authorization": f"Bearer {mock.api_key}"}
        content = [{"text": PROMPT}]
        body = {"model": "z-image-turbo", "input": {"messages": [{"role": "user", "content": content}]}}
        replies = {
            "dashscope": requests.post(mock.endpoint, json=body, headers=headers, timeout=5),
            "zimageturbo": submit(mock),
            "openai": draw(mock),
        }
        for service in replies.keys() - set(services_that_know(name)):
            reply = replies[service]
            assert reply.status_code == 200
            if service == "zimageturbo":
                assert task_data(mock, reply.json()["data"]["task_id"])["status"] == "SUCCESS"
            if service == "openai":
                assert image_of(bytes_of(reply.json()["data"][0])).format == "PNG"

    def test_every_fault_says_who_knows_it(self) -> None:
        own = {"zimageturbo": {name for name in FAULTS if name.startswith("envelope-")}}
        own |= {"modelscope": {"unbound", "unnamed", "retired"}}
        own |= {"openai": {"url", "data-url", "bad-base64"}, "dashscope": {"quota"}}
        for service, names in own.items():
            assert {name for name in FAULTS if services_that_know(name) == [service]} == names
        assert services_that_know("quota-429") == ["dashscope", "modelscope", "openai"]
        tasks = {"two-pictures", *(name for name in FAULTS if re.match("task-|status-", name))}
        assert {name for name in FAULTS if services_that_know(name) == ["zimageturbo", "modelscope"]} == tasks
        assert (len(own["zimageturbo"]), len(tasks)) == (4, 8)


class TestStatistics:
    def test_all_services_are_counted_in_one_place(self, faulty: Any) -> None:
        mock = faulty()
        task = task_id(mock)
        for _ in range(2):
            link = task_data(mock, task)["response"][0]
        requests.get(link, timeout=5)
        draw(mock, IMAGE | {"n": 2, "model": "some/model"})
        requests.get(f"{mock.openai_url}/models", timeout=5)
        stats = mock.stats()
        counters = ("generate_requests", "billed", "downloads", "model_queries", "status_queries", "throttled")
        assert [stats[name] for name in counters] == [2, 3, 1, 1, 2, 0]
        assert stats["payloads"] == [
            {
                "service": "zimageturbo",
                "model": "z-image-turbo",
                "prompt": PROMPT,
                "parameters": {"aspect_ratio": "4:3"},
            },
            {
                "service": "openai",
                "model": "some/model",
                "prompt": PROMPT,
                "parameters": {"size": "512x512", "seed": 7, "n": 2},
            },
        ]
        assert stats["errors"] == {} and mock.api_key not in json.dumps(stats)


class TestZImageTurbo:
    def test_a_submission_is_answered_with_a_task(self, mock: MockServer) -> None:
        body = submit(mock).json()
        assert re.fullmatch("task_[0-9a-f]+", body["data"].pop("task_id"))
        assert body == {"code": 200, "message": "success", "data": {"status": "IN_PROGRESS"}}

    @pytest.mark.parametrize("ratio, size", ASPECT_SIZES.items())
    def test_a_success_has_exactly_the_documented_form_and_leads_to_a_jpeg(
        self, mock: MockServer, ratio: str, size: tuple[int, int]
    ) -> None:
        task = task_id(mock, TASK | {"aspect_ratio": ratio})
        body = status(mock, task).json()
        assert re.fullmatch(r"20\d\d-\d\d-\d\d \d\d:\d\d:\d\d", body["data"].pop("created_at"))
        (link,) = body["data"].pop("response")
        assert body == {
            "code": 200,
            "message": "success",
            "data": {
                "status": "SUCCESS",
                "task_id": task,
                "request": {
                    "prompt": PROMPT,
                    "size": "{}*{}".format(*size),
                    "seed": "-1",
                    "aspect_ratio": ratio,
                },
                "consumed_credits": 15,
                "error_message": None,
            },
        }
        assert urlsplit(link).path.endswith(".jpeg")
        reply = requests.get(link, timeout=5)
        image = image_of(reply.content)
        assert (reply.headers["Content-Type"], image.format, image.size) == ("image/jpeg", "JPEG", size)
        assert task_data(mock, task)["response"] == [link], "asked again, the same link"

    def test_a_task_succeeds_and_is_billed_after_the_latency(self, faulty: Any) -> None:
        mock = faulty(latency=0.4)
        started = time.monotonic()
        task = task_id(mock)
        data = task_data(mock, task)
        assert (data["status"], data["response"], data["consumed_credits"]) == ("IN_PROGRESS", [], 0)
        assert mock.stats()["billed"] == 0 and time.monotonic() - started < 0.4, "nothing waits"
        while task_data(mock, task)["status"] == "IN_PROGRESS":
            time.sleep(0.02)
        assert time.monotonic() - started >= 0.4
        assert mock.stats()["billed"] == 1
        task_data(mock, task)
        assert mock.stats()["billed"] == 1, "once"

    def test_a_task_whose_id_was_lost_is_billed_all_the_same_when_it_succeeds(self, faulty: Any) -> None:
        mock = faulty("hangup-after", latency=0.3)
        with pytest.raises(requests.ConnectionError):
            submit(mock)
        assert mock.stats()["billed"] == 0
        time.sleep(0.35)
        assert mock.stats()["billed"] == 1

    @pytest.mark.parametrize("key", ["Bearer sk-other", "Basic abc", "Bearer", None])
    def test_both_calls_need_the_key(self, mock: MockServer, key: str | None) -> None:
        headers = {"Authorization": key} if key else {}
        assert_envelope(submit(mock, headers=headers), 401)
        assert_envelope(status(mock, task_id(mock), headers=headers), 401)

    @pytest.mark.parametrize(
        "change",
        [
            {"prompt": ...}, {"prompt": ""}, {"prompt": " \n"}, {"prompt": 5}, {"prompt": None}, {"prompt": "x" * 1001},
            {"prompt": "\ud83d"}, {"aspect_ratio": ...}, {"aspect_ratio": "1024x1024"}, {"aspect_ratio": "3:2"},
            {"aspect_ratio": " 1:1"}, {"aspect_ratio": None}, {"aspect_ratio": ["1:1"]}, {"seed": 1}, {"size": "1*1"},
            {"n": 1},
        ],
    )  # fmt: skip
    def test_a_request_that_is_not_exactly_right_is_400(self, mock: MockServer, change: dict[str, Any]) -> None:
        body = {name: value for name, value in (TASK | change).items() if value is not ...}
        reply = submit(mock, body)
        assert_envelope(reply, 400)
        assert next(iter(change)) in reply.json()["message"]

    def test_a_prompt_may_have_1000_characters(self, mock: MockServer) -> None:
        assert submit(mock, TASK | {"prompt": "猫" * 1000}).status_code == 200

    @pytest.mark.parametrize("task, code", [("task_0", 404), ("", 400)])
    def test_a_task_that_is_not_known_is_404_and_none_is_400(self, mock: MockServer, task: str, code: int) -> None:
        assert_envelope(status(mock, task), code)

    def test_the_rate_limit_is_for_submissions_only(self, faulty: Any) -> None:
        mock = faulty(rpm=60)
        task = task_id(mock)
        refused = submit(mock)
        assert_envelope(refused, 429)
        assert refused.headers["Retry-After"] == "1"
        assert [status(mock, task).status_code for _ in range(20)] == [200] * 20
        stats = mock.stats()
        assert [stats[name] for name in ("generate_requests", "throttled", "status_queries", "billed")] == [2, 1, 20, 1]

    def test_many_at_once_are_billed_once_each(self, faulty: Any) -> None:
        mock = faulty(latency=0.05)
        with ThreadPoolExecutor(8) as pool:
            tasks = list(pool.map(lambda _: task_id(mock), range(24)))
            time.sleep(0.06)
            links = [data["response"][0] for data in pool.map(lambda task: task_data(mock, task), tasks * 2)]
        assert (len(set(tasks)), len(set(links)), mock.stats()["billed"]) == (24, 24, 24)


class TestZImageTurboFaults:
    @pytest.mark.parametrize("name, word", [("task-failed", "failed"), ("task-blocked", "sensitive")])
    def test_a_task_can_fail_and_is_not_billed(self, faulty: Any, name: str, word: str) -> None:
        mock = faulty(name)
        task = task_id(mock)
        for _ in range(2):
            data = task_data(mock, task)
            assert (data["status"], data["response"], data["consumed_credits"]) == ("FAILED", [], 0)
            assert word in data["error_message"]
        assert (mock.stats()["billed"], mock.stats()["errors"]) == (0, {name: 2})

    def test_a_task_fails_after_the_latency(self, faulty: Any) -> None:
        mock = faulty("task-failed", latency=30)
        data = task_data(mock, task_id(mock))
        assert (data["status"], data["error_message"]) == ("IN_PROGRESS", None)

    def test_a_task_can_be_lost(self, faulty: Any) -> None:
        mock = faulty("task-lost")
        task = task_id(mock)
        for _ in range(5):
            assert_envelope(status(mock, task), 404)
        assert mock.stats()["billed"] == 0

    def test_a_task_can_never_end(self, faulty: Any) -> None:
        mock = faulty("task-slow")
        task = task_id(mock)
        assert {task_data(mock, task)["status"] for _ in range(5)} == {"IN_PROGRESS"}
        assert mock.stats()["billed"] == 0

    def test_a_status_can_be_one_that_is_not_documented(self, faulty: Any) -> None:
        mock = faulty("task-status")
        task = task_id(mock)
        seen = [task_data(mock, task)["status"] for _ in range(3)]
        assert seen == ["PENDING_REVIEW", "PENDING_REVIEW", "SUCCESS"]
        assert mock.stats()["billed"] == 1

    def test_a_status_query_can_fail_twice_at_a_gateway(self, faulty: Any) -> None:
        mock = faulty("status-500")
        task = task_id(mock)
        replies = [status(mock, task) for _ in range(3)]
        assert [reply.status_code for reply in replies] == [500, 500, 200]
        assert replies[0].headers["Content-Type"] == "text/html"

    def test_a_status_query_can_be_throttled_once(self, faulty: Any) -> None:
        mock = faulty("status-429")
        task = task_id(mock)
        first = status(mock, task)
        assert_envelope(first, 429)
        assert first.headers["Retry-After"] == "1"
        assert task_data(mock, task)["status"] == "SUCCESS"

    @pytest.mark.parametrize("code", [401, 402, 429, 500])
    def test_the_envelope_can_disagree_with_the_http_status(self, faulty: Any, code: int) -> None:
        mock = faulty(f"envelope-{code}")
        reply = submit(mock)
        assert (reply.status_code, reply.json()["code"], reply.json()["data"]) == (200, code, None)
        assert (mock.stats()["billed"], mock.stats()["errors"]) == (0, {f"envelope-{code}": 1})

    def test_a_success_can_have_two_pictures_or_none(self, faulty: Any) -> None:
        mock = faulty("two-pictures,no-image")
        links = task_data(mock, task_id(mock))["response"]
        assert len(set(links)) == 2 and all(image_of(requests.get(link, timeout=5).content) for link in links)
        assert mock.stats()["billed"] == 1
        data = task_data(mock, task_id(mock))
        assert (data["status"], data["response"], data["consumed_credits"]) == ("SUCCESS", [], 0)
        assert mock.stats()["billed"] == 1

    def test_a_fault_stays_with_its_task(self, faulty: Any) -> None:
        mock = faulty("task-failed,ok,task-slow")
        tasks = [task_id(mock) for _ in range(4)]
        seen = [task_data(mock, task)["status"] for task in reversed(tasks)]
        assert seen == ["SUCCESS", "IN_PROGRESS", "SUCCESS", "FAILED"]

    @pytest.mark.parametrize("name, code", [("image-403", 403), ("image-expired", 403), ("image-404", 404)])
    def test_a_link_can_refuse(self, faulty: Any, name: str, code: int) -> None:
        mock = faulty(name)
        (link,) = task_data(mock, task_id(mock))["response"]
        assert [requests.get(link, timeout=5).status_code for _ in range(2)] == [code, code]

    def test_a_link_can_fail_once_and_the_same_link_works_then(self, faulty: Any) -> None:
        mock = faulty("image-500")
        task = task_id(mock)
        codes = [requests.get(task_data(mock, task)["response"][0], timeout=5).status_code for _ in range(2)]
        assert codes == [500, 200]

    def test_a_link_can_hand_out_another_size_or_damaged_bytes(self, faulty: Any) -> None:
        mock = faulty("image-big-size,image-corrupt*8")
        (link,) = task_data(mock, task_id(mock))["response"]
        image = image_of(requests.get(link, timeout=5).content)
        assert (image.format, image.size) == ("JPEG", (1152 + 64, 864 + 64))
        for _ in range(8):
            (link,) = task_data(mock, task_id(mock))["response"]
            data = requests.get(link, timeout=5).content
            assert data.startswith(b"\xff\xd8\xff") and data.endswith(b"\xff\xd9")
            with pytest.raises(OSError):
                image_of(data)

    def test_a_link_can_cut_the_jpeg_off(self, faulty: Any) -> None:
        mock = faulty("image-cut")
        (link,) = task_data(mock, task_id(mock))["response"]
        with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
            requests.get(link, timeout=5)
        assert image_of(requests.get(link, timeout=5).content).format == "JPEG"


class TestOpenAI:
    def test_the_answer_holds_the_picture(self, mock: MockServer) -> None:
        reply = draw(mock)
        assert reply.json().keys() == {"created", "data"} and reply.json()["created"] == pytest.approx(
            time.time(), abs=5
        )
        (item,) = reply.json()["data"]
        image = image_of(bytes_of(item))
        assert (item.keys(), image.format, image.size) == ({"b64_json"}, "PNG", (512, 512))
        assert reply.headers["x-request-id"] != draw(mock).headers["x-request-id"]

    def test_what_is_left_out_has_the_defaults(self, mock: MockServer) -> None:
        bodies = [draw(mock, {"prompt": PROMPT}).json() for _ in range(2)]
        first, second = (bytes_of(body["data"][0]) for body in bodies)
        assert image_of(first).size == (1024, 1024) and first != second, "the seed is random"

    def test_null_stands_for_what_is_left_out(self, mock: MockServer) -> None:
        nothing = dict.fromkeys(("n", "size", "seed", "response_format", "negative_prompt", "num_inference_steps"))
        assert draw(mock, {"prompt": PROMPT} | nothing).status_code == 200

    def test_further_pictures_have_the_seeds_that_follow(self, mock: MockServer) -> None:
        three = draw(mock, IMAGE | {"n": 3}).json()["data"]
        assert three[2] == draw(mock, IMAGE | {"seed": 9}).json()["data"][0]
        assert len({item["b64_json"] for item in three}) == 3

    @pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
    @pytest.mark.parametrize("form", ["b64_json", "url"])
    def test_the_picture_comes_in_the_format_and_the_form_asked_for(
        self, mock: MockServer, kind: str, form: str
    ) -> None:
        (item,) = draw(mock, IMAGE | {"output_format": kind, "response_format": form}).json()["data"]
        assert item.keys() == {form}
        data = bytes_of(item) if form == "b64_json" else requests.get(item["url"], timeout=5).content
        image = image_of(data)
        assert (image.format, image.size) == (kind.upper(), (512, 512))

    def test_all_that_the_engines_take_is_taken(self, mock: MockServer) -> None:
        fields = {"num_inference_steps": 8, "guidance_scale": 0.0, "negative_prompt": "", "user": "u", "style": "vivid"}
        assert draw(mock, IMAGE | fields | {"quality": "hd", "background": "auto", "model": "x"}).status_code == 200

    @pytest.mark.parametrize(
        "change",
        [
            {"prompt": ...}, {"prompt": None}, {"prompt": " "}, {"prompt": ["a"]}, {"prompt": "\ud83d"}, {"model": 5},
            {"n": 0}, {"n": 11}, {"n": True}, {"n": 1.0}, {"n": "1"},
            {"size": "512*512"}, {"size": "1000x1000"}, {"size": "496x512"}, {"size": "2048x2064"}, {"size": "auto"},
            {"response_format": "png"}, {"output_format": "gif"}, {"seed": -1}, {"seed": 1.5}, {"seed": False},
            {"num_inference_steps": 0}, {"num_inference_steps": 201}, {"guidance_scale": -0.1},
            {"guidance_scale": True}, {"guidance_scale": "0"}, {"negative_prompt": 5}, {"user": []}, {"quality": 1},
            {"steps": 8}, {"stream": False}, {"width": None},
        ],
    )  # fmt: skip
    def test_a_request_that_is_not_exactly_right_is_400(self, mock: MockServer, change: dict[str, Any]) -> None:
        body = {name: value for name, value in (IMAGE | change).items() if value is not ...}
        reply = draw(mock, body)
        assert_openai_error(reply, 400)
        assert next(iter(change)) in reply.json()["error"]["message"]

    def test_a_number_beyond_all_numbers_is_400(self, mock: MockServer) -> None:
        headers = {"Content-Type": "application/json"}
        for number in ("1e999", "Infinity", "NaN"):
            assert_openai_error(
                draw(mock, None, data=f'{{"prompt": "a", "guidance_scale": {number}}}', headers=headers), 400
            )

    def test_a_key_is_optional_but_a_wrong_one_is_401(self, mock: MockServer) -> None:
        models = f"{mock.openai_url}/models"
        assert draw(mock, headers={}).status_code == requests.get(models, timeout=5).status_code == 200
        assert_openai_error(draw(mock, headers=OTHER_KEY), 401)
        assert_openai_error(requests.get(models, headers=OTHER_KEY, timeout=5), 401)

    def test_the_models_are_listed(self, mock: MockServer) -> None:
        body = requests.get(f"{mock.openai_url}/models", timeout=5).json()
        (model,) = body["data"]
        assert (body["object"], model["id"], model["object"]) == ("list", "Tongyi-MAI/Z-Image-Turbo", "model")

    def test_nothing_limits_the_rate(self, faulty: Any) -> None:
        mock = faulty(rpm=1)
        assert [draw(mock).status_code for _ in range(5)] == [200] * 5

    def test_the_answer_comes_after_the_latency(self, faulty: Any) -> None:
        mock = faulty(latency=0.3)
        assert draw(mock).elapsed.total_seconds() >= 0.3
        with pytest.raises(requests.ReadTimeout):
            requests.post(f"{mock.openai_url}/images/generations", json=IMAGE, timeout=0.1)
        assert mock.stats()["billed"] == 2, "who gives up has paid all the same"


class TestOpenAIFaults:
    @pytest.mark.parametrize("name, start", [("url", "http://127.0.0.1:"), ("data-url", "data:image/png;base64,")])
    def test_a_link_can_stand_where_base64_was_asked_for(self, faulty: Any, name: str, start: str) -> None:
        mock = faulty(name)
        (item,) = draw(mock).json()["data"]
        assert item.keys() == {"url"} and item["url"].startswith(start)
        code = item["url"].partition(",")[2]
        data = base64.b64decode(code) if name == "data-url" else requests.get(item["url"], timeout=5).content
        assert data == bytes_of(draw(mock).json()["data"][0])

    def test_base64_can_be_bad_for_a_decoder_that_forgives_too(self, faulty: Any) -> None:
        (item,) = draw(faulty("bad-base64")).json()["data"]
        for strict in (True, False):
            with pytest.raises(binascii.Error):
                base64.b64decode(item["b64_json"], validate=strict)

    def test_there_can_be_no_picture(self, faulty: Any) -> None:
        mock = faulty("no-image")
        assert (draw(mock).json()["data"], mock.stats()["billed"]) == ([], 0)

    @pytest.mark.parametrize("kind", ["png", "jpeg", "webp"])
    def test_the_bytes_can_be_damaged(self, faulty: Any, kind: str) -> None:
        data = bytes_of(draw(faulty("image-corrupt"), IMAGE | {"output_format": kind}).json()["data"][0])
        with pytest.raises((OSError, SyntaxError)):
            image_of(data)

    def test_the_bytes_can_be_something_else(self, faulty: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000_000)  # another test's program may have taken it away
        mock = faulty("image-bomb,image-big-size,image-jpeg,image-html")
        bomb, bigger, jpeg, html = (bytes_of(draw(mock).json()["data"][0]) for _ in range(4))
        with pytest.raises(Image.DecompressionBombError):
            Image.open(io.BytesIO(bomb))
        assert (image_of(bigger).size, image_of(jpeg).format) == ((576, 576), "JPEG")
        assert b"<html>" in html

    @pytest.mark.parametrize("name", ["image-403", "image-expired", "image-404", "image-500", "image-cut",
                                      "image-redirect", "image-redirect-loop"])  # fmt: skip
    def test_what_can_only_befall_a_link_does_not_befall_bytes(self, faulty: Any, name: str) -> None:
        assert image_of(bytes_of(draw(faulty(name)).json()["data"][0])).size == (512, 512)

    def test_a_link_that_was_asked_for_suffers_like_any_other(self, faulty: Any) -> None:
        (item,) = draw(faulty("image-403"), IMAGE | {"response_format": "url"}).json()["data"]
        assert requests.get(item["url"], timeout=5).status_code == 403


class TestOfficialOpenAIClient:
    WANTED: dict[str, Any] = {  # noqa: RUF012
        "prompt": PROMPT,
        "size": "1024x1024",
        "n": 1,
        "response_format": "b64_json",
        "extra_body": {"seed": 1, "num_inference_steps": 8, "guidance_scale": 0.0},
    }

    @pytest.mark.parametrize("form", ["b64_json", "url"])
    def test_it_works_unchanged(self, mock: MockServer, form: str) -> None:
        with openai.OpenAI(base_url=mock.openai_url, api_key=mock.api_key, max_retries=0) as client:
            answer = client.images.generate(**{**self.WANTED, "response_format": form})
            assert answer.data
            (item,) = answer.data
            data = base64.b64decode(item.b64_json) if item.b64_json else requests.get(item.url or "", timeout=5).content
            assert image_of(data).size == (1024, 1024)
            assert [model.id for model in client.models.list()] == ["Tongyi-MAI/Z-Image-Turbo"]

    @pytest.mark.parametrize(
        "name, error, code",
        [
            ("400", openai.BadRequestError, "invalid_value"),
            ("401", openai.AuthenticationError, "invalid_api_key"),
            ("403", openai.PermissionDeniedError, "insufficient_permissions"),
            ("404", openai.NotFoundError, "model_not_found"),
            ("429-wait", openai.RateLimitError, "rate_limit_exceeded"),
            ("500", openai.InternalServerError, "server_error"),
        ],
    )
    def test_an_error_arrives_as_what_it_is(
        self, faulty: Any, name: str, error: type[openai.APIStatusError], code: str
    ) -> None:
        mock = faulty(name)
        with openai.OpenAI(base_url=mock.openai_url, api_key=mock.api_key, max_retries=0) as client:
            with pytest.raises(error) as raised:
                client.images.generate(**self.WANTED)
            assert (raised.value.code, raised.value.request_id is not None) == (code, True)
            assert ERRORS[name].message in str(raised.value)

    def test_a_wrong_key_and_a_wrong_field_are_told_apart(self, mock: MockServer) -> None:
        with openai.OpenAI(base_url=mock.openai_url, api_key="sk-other", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError):
                client.images.generate(**self.WANTED)
            right = client.with_options(api_key=mock.api_key)
            with pytest.raises(openai.BadRequestError, match="num_steps"):
                right.images.generate(**{**self.WANTED, "extra_body": {"num_steps": 8}})
