"""The mock service, as a specification: what a client of the real one may rely on, and what it must survive.

Here DashScope, and what all services share; test_mock_protocols.py has the other two services.
"""

from __future__ import annotations

import copy
import http.client
import io
import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
import requests
from PIL import Image

import mock_server
from mock_server import FAULTS, MockServer
from zimage_mock.drawing import PICTURES_KEPT, Picture, draw, draw_file
from zimage_mock.faults import fault_plan
from zimage_mock.limits import RateLimit

SCRIPT = Path(mock_server.__file__)
PROMPT = "A red panda reading a book"
PAYLOAD: dict[str, Any] = {
    "model": "z-image-turbo",
    "input": {"messages": [{"role": "user", "content": [{"text": PROMPT}]}]},
    "parameters": {"size": "512*512", "prompt_extend": False, "seed": 7},
}


def payload(path: str = "", value: Any = None) -> dict[str, Any]:
    """The good payload with one place changed: "input.messages.0.role"; the value `...` removes it."""
    changed = copy.deepcopy(PAYLOAD)
    if path:
        *steps, last = (int(step) if step.isdigit() else step for step in path.split("."))
        place: Any = changed
        for step in steps:
            place = place[step]
        if value is ...:
            del place[last]
        else:
            place[last] = value
    return changed


def post(mock: MockServer, body: Any = None, **options: Any) -> requests.Response:
    headers = {"Authorization": f"Bearer {mock.api_key}", "Content-Type": "application/json"}
    headers |= options.pop("headers", {})
    data = body if isinstance(body, bytes) else json.dumps(PAYLOAD if body is None else body).encode()
    options.setdefault("timeout", 10)
    return requests.post(mock.endpoint, data=data, headers=headers, allow_redirects=False, **options)


def link(mock: MockServer, body: Any = None) -> str:
    url = post(mock, body).json()["output"]["choices"][0]["message"]["content"][0]["image"]
    assert isinstance(url, str)
    return url


@pytest.fixture(scope="module")
def mock() -> Any:
    """One service without limit or faults, for tests that look at answers only."""
    with MockServer(rpm=0) as server:
        yield server


class TestGeneration:
    def test_a_success_has_exactly_the_documented_body(self, mock: MockServer) -> None:
        reply = post(mock)
        body = reply.json()
        assert (reply.status_code, reply.headers["Content-Type"]) == (200, "application/json")
        assert body.keys() == {"request_id", "output", "usage"}
        (choice,) = body["output"]["choices"]
        image, text = choice["message"].pop("content")
        assert choice == {"finish_reason": "stop", "message": {"role": "assistant", "reasoning_content": ""}}
        assert image.keys() == {"image"} and text == {"text": PROMPT}
        tokens = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
        assert body["usage"] == {"width": 512, "height": 512, "image_count": 1, **tokens}

    def test_prompt_extend_gives_a_rewritten_prompt_and_the_reasoning(self, mock: MockServer) -> None:
        message = post(mock, payload("parameters.prompt_extend", True)).json()["output"]["choices"][0]["message"]
        text = message["content"][1]["text"]
        assert text.startswith(PROMPT) and text != PROMPT
        assert message["reasoning_content"]

    def test_parameters_may_be_left_out_and_the_default_size_is_1024_by_1536(self, mock: MockServer) -> None:
        usage = post(mock, payload("parameters", ...)).json()["usage"]
        assert (usage["width"], usage["height"]) == (1024, 1536)

    @pytest.mark.parametrize(
        "name, value",
        [("n", 1), ("max_images", 1), ("watermark", False), ("negative_prompt", "blurry"), ("seed", None), ("n", None)],
    )
    def test_what_clients_of_other_models_send_along_is_taken_where_it_asks_for_nothing_else(
        self, mock: MockServer, name: str, value: Any
    ) -> None:
        assert link(mock, payload(f"parameters.{name}", value))

    @pytest.mark.parametrize(
        "size", ["512*512", "1024*256", "256*1024", "2048*2048", "8192*512", "1344*576", "777*999"]
    )
    def test_sizes_within_the_bounds_are_taken(self, mock: MockServer, size: str) -> None:
        assert post(mock, payload("parameters.size", size)).status_code == 200

    @pytest.mark.parametrize("key", ["Bearer sk-other", "", "Basic abc", "bearer", "Bearer"])
    def test_another_key_or_none_is_401(self, mock: MockServer, key: str) -> None:
        reply = post(mock, headers={"Authorization": key})
        assert (reply.status_code, reply.json()["code"]) == (401, "InvalidApiKey")

    def test_another_model_is_404(self, mock: MockServer) -> None:
        reply = post(mock, payload("model", "z-image"))
        assert (reply.status_code, reply.json()["code"]) == (404, "ModelNotFound")

    @pytest.mark.parametrize(
        "path, value",
        [
            ("model", ...), ("model", None), ("model", ["z-image-turbo"]),
            ("input", ...), ("input", []), ("input.prompt", "a cat"), ("n", 1), ("\ud800", 1),
            ("input.messages", []), ("input.messages", {}), ("input.messages", PAYLOAD["input"]["messages"] * 2),
            ("input.messages.0", "a cat"), ("input.messages.0.role", "system"), ("input.messages.0.name", "x"),
            ("input.messages.0.content", "a cat"), ("input.messages.0.content", []),
            ("input.messages.0.content", [{"text": "a"}, {"text": "b"}]), ("input.messages.0.content.0", "a cat"),
            ("input.messages.0.content.0.image", "x"), ("input.messages.0.content.0.text", ...),
            ("input.messages.0.content.0.text", ""), ("input.messages.0.content.0.text", " \n"),
            ("input.messages.0.content.0.text", 5), ("input.messages.0.content.0.text", "\ud83d"),
            ("parameters", None), ("parameters", []),
            ("parameters.size", "1024x1024"), ("parameters.size", "511*512"), ("parameters.size", "2049*2048"),
            ("parameters.size", "1024*255"), ("parameters.size", "0512*512"), ("parameters.size", " 512*512"),
            ("parameters.size", "512*512\n"), ("parameters.size", "٥١٢*512"), ("parameters.size", 512),
            ("parameters.size", "16384*256"),
            ("parameters.seed", -1), ("parameters.seed", 2**31), ("parameters.seed", True), ("parameters.seed", 1.0),
            ("parameters.seed", "7"), ("parameters.seed", float("nan")),
            ("parameters.prompt_extend", 0), ("parameters.prompt_extend", "false"),
            ("parameters.n", 2), ("parameters.max_images", 4), ("parameters.negative_prompt", 1),
            ("parameters.watermark", 0),
        ],
    )  # fmt: skip
    def test_a_request_that_is_not_exactly_right_is_400(self, mock: MockServer, path: str, value: Any) -> None:
        reply = post(mock, payload(path, value))
        assert (reply.status_code, reply.json()["code"]) == (400, "InvalidParameter")
        assert reply.json().keys() == {"code", "message", "request_id"}

    @pytest.mark.parametrize(
        "body", [b"", b"{", b"[]", b"null", b'"text"', b"\xff\xfe{}", b"\xef\xbb\xbf{}", b"[" * 100_000, b"9" * 5000]
    )
    def test_a_body_that_is_no_json_object_is_400(self, mock: MockServer, body: bytes) -> None:
        assert post(mock, body).json()["code"] == "InvalidParameter"

    @pytest.mark.parametrize("kind", ["text/plain", "", "application/x-www-form-urlencoded"])
    def test_another_content_type_is_400(self, mock: MockServer, kind: str) -> None:
        assert post(mock, headers={"Content-Type": kind}).json()["code"] == "InvalidParameter"

    def test_a_charset_beside_the_content_type_is_fine(self, mock: MockServer) -> None:
        assert post(mock, headers={"Content-Type": "application/json; charset=utf-8"}).status_code == 200

    def test_a_body_over_1_mib_is_400(self, mock: MockServer) -> None:
        room = 1024 * 1024 - len(json.dumps(PAYLOAD)) + len(PROMPT)
        assert post(mock, payload("input.messages.0.content.0.text", "x" * room)).status_code == 200
        reply = post(mock, payload("input.messages.0.content.0.text", "x" * (room + 1)))
        assert (reply.status_code, reply.json()["code"]) == (400, "InvalidParameter")

    def test_a_chunked_body_is_400(self, mock: MockServer) -> None:
        headers = {"Authorization": f"Bearer {mock.api_key}"}
        reply = requests.post(mock.endpoint, data=iter([b"{}"]), headers=headers, timeout=5)
        assert reply.json()["code"] == "InvalidParameter"

    def test_content_safety_can_be_rehearsed_by_prompt(self) -> None:
        with MockServer(rpm=0) as mock:
            refused = post(mock, payload("input.messages.0.content.0.text", "now mock:blocked please"))
            assert (refused.status_code, refused.json()["code"]) == (400, "DataInspectionFailed")
            empty = post(mock, payload("input.messages.0.content.0.text", "mock:blocked-empty"))
            assert empty.status_code == 200 and "image" not in json.dumps(empty.json()["output"])
            assert mock.stats()["billed"] == 0

    def test_the_answer_comes_after_the_latency(self) -> None:
        with MockServer(rpm=0, latency=0.3) as mock:
            assert post(mock).elapsed.total_seconds() >= 0.3
            with pytest.raises(requests.ReadTimeout):
                post(mock, timeout=0.1)
            assert mock.stats()["billed"] == 2, "who gives up has paid all the same"


class TestPaths:
    def test_the_models_query_lists_the_model_and_is_free(self) -> None:
        with MockServer(rpm=0) as mock:
            url, headers = f"{mock.base_url}/models", {"Authorization": f"Bearer {mock.api_key}"}
            query = {"model": "z-image-turbo", "page_no": "1", "page_size": "1"}
            body = requests.get(url, params=query, headers=headers, timeout=5).json()
            assert body["output"]["models"][0]["model"] == "z-image-turbo" and body["output"]["total"] == 1
            other = requests.get(url, params=query | {"model": "other"}, headers=headers, timeout=5).json()
            assert other["output"] == {"models": [], "total": 0}
            wrong = requests.get(url, params=query | {"page_no": "0"}, headers=headers, timeout=5)
            assert wrong.json()["code"] == "InvalidParameter"
            assert requests.get(url, params=query, timeout=5).status_code == 401
            assert (mock.stats()["billed"], mock.stats()["model_queries"]) == (0, 3)

    def test_the_quotas_query_tells_the_rate_limit_and_is_free(self) -> None:
        with MockServer(rpm=90) as mock:
            url, headers = f"{mock.base_url}/quotas", {"Authorization": f"Bearer {mock.api_key}"}
            output = requests.get(url, params={"model": "z-image-turbo"}, headers=headers, timeout=5).json()["output"]
            (quota,) = output.pop("quotas")
            assert output == {"page_no": 1, "page_size": 1, "total": 1} and quota["model"] == "z-image-turbo"
            assert quota["model_limit"] == {"request_limit": 90, "request_limit_period": 60, "usage_limit": None}
            other = requests.get(url, params={"model": "other"}, headers=headers, timeout=5).json()["output"]
            assert other["quotas"] == []
            assert requests.get(url, timeout=5).status_code == 401
            assert (mock.stats()["billed"], mock.stats()["quota_queries"]) == (0, 2)

    @pytest.mark.parametrize("path", ["/api/v1", "/api/v1/nothing", "/api/v1/models/", "/", "/favicon.ico"])
    def test_an_unknown_path_is_404_in_json(self, mock: MockServer, path: str) -> None:
        reply = requests.get(mock.base_url.removesuffix("/api/v1") + path, timeout=5)
        assert (reply.status_code, reply.json()["code"]) == (404, "NotFound")

    @pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
    def test_a_wrong_method_is_405_in_json(self, mock: MockServer, method: str) -> None:
        reply = requests.request(method, mock.endpoint, timeout=5)
        assert (reply.status_code, reply.json()["code"]) == (405, "MethodNotAllowed")

    def test_the_statistics_need_no_key_and_tell_none(self) -> None:
        with MockServer(rpm=0, faults="ok,500") as mock:
            requests.get(link(mock), timeout=5)
            post(mock)
            text = requests.get(mock.stats_url, timeout=5).text
            assert mock.api_key not in text
            stats = json.loads(text)
            assert stats == mock.stats()
            counters = ("generate_requests", "billed", "downloads", "model_queries", "throttled", "errors")
            assert [stats[name] for name in counters] == [2, 1, 1, 0, 0, {"InternalError": 1}]
            assert stats["payloads"] == [
                {
                    "service": "dashscope",
                    "model": "z-image-turbo",
                    "prompt": PROMPT,
                    "parameters": PAYLOAD["parameters"],
                }
            ]
            seen = [(r["method"], r["status"], r["code"], r["billed"], r["authorization"]) for r in stats["requests"]]
            assert seen == [
                ("POST", 200, "", True, True),
                ("GET", 200, "", False, False),
                ("POST", 500, "InternalError", False, True),
            ]


class TestLinks:
    def test_a_link_gives_the_png_of_exactly_the_asked_size_and_needs_no_key(self, mock: MockServer) -> None:
        reply = requests.get(link(mock, payload("parameters.size", "776*512")), timeout=5)
        assert reply.headers["Content-Type"] == "image/png"
        assert int(reply.headers["Content-Length"]) == len(reply.content)
        image = Image.open(io.BytesIO(reply.content))
        image.load()
        assert (image.format, image.size) == ("PNG", (776, 512))

    def test_head_tells_the_length_without_the_picture(self, mock: MockServer) -> None:
        url = link(mock)
        reply = requests.head(url, timeout=5)
        assert reply.status_code == 200 and not reply.content
        assert int(reply.headers["Content-Length"]) == len(requests.get(url, timeout=5).content)

    def test_a_link_lives_24_hours(self, mock: MockServer) -> None:
        query = parse_qs(urlsplit(link(mock)).query)
        assert int(query["Expires"][0]) - time.time() == pytest.approx(24 * 3600, abs=5)
        assert query.keys() == {"Expires", "OSSAccessKeyId", "Signature"}

    @pytest.mark.parametrize(
        "tamper",
        [
            lambda url: url.partition("?")[0],
            lambda url: url.replace("Expires=", "Expires=9"),
            lambda url: url.replace("Signature=", "Signature=A"),
            lambda url: url.replace("Signature=", "Signature=%F0%9F%A6%80"),
            lambda url: url.partition("&Signature")[0],
        ],
    )
    def test_an_unsigned_or_tampered_link_answers_403_with_oss_xml(self, mock: MockServer, tamper: Any) -> None:
        reply = requests.get(tamper(link(mock)), timeout=5)
        assert (reply.status_code, reply.headers["Content-Type"]) == (403, "application/xml")
        assert "<Code>AccessDenied</Code>" in reply.text and "expired" not in reply.text

    def test_an_expired_link_answers_403_with_oss_xml(self) -> None:
        with MockServer(rpm=0, link_ttl=0) as mock:
            reply = requests.get(link(mock), timeout=5)
            assert reply.status_code == 403
            assert "<Code>AccessDenied</Code>" in reply.text
            assert "<Message>Request has expired.</Message>" in reply.text
            assert mock.stats()["downloads"] == 0

    def test_an_unknown_file_is_404_with_oss_xml(self, mock: MockServer) -> None:
        reply = requests.get(mock.base_url.replace("/api/v1", "/files/none.png"), timeout=5)
        assert reply.status_code == 404 and "<Code>NoSuchKey</Code>" in reply.text


class TestPictures:
    def test_the_same_prompt_seed_and_size_give_the_same_bytes(self, mock: MockServer) -> None:
        first = requests.get(link(mock), timeout=5).content
        draw_file.cache_clear()
        assert requests.get(link(mock), timeout=5).content == first

    def test_another_seed_or_prompt_gives_another_picture(self) -> None:
        pictures = [Picture("a", 1, 512, 512), Picture("a", 2, 512, 512), Picture("b", 1, 512, 512)]
        assert len({draw_file(picture) for picture in pictures}) == 3

    @pytest.mark.parametrize(
        "prompt", ["雪山下的湖", "\u0301", "🦀🦀", "a\x00b\u202ec", "x" * 3000, "سلام", "word " * 400]
    )
    def test_any_prompt_can_be_captioned(self, prompt: str) -> None:
        for width, height in ((512, 512), (256, 1024)):
            assert Image.open(io.BytesIO(draw_file(Picture(prompt, 1, width, height)))).size == (width, height)

    @pytest.mark.parametrize("width, height", [(256, 1024), (1024, 256), (512, 8192), (8192, 512)])
    def test_every_landscape_fits_every_shape(self, width: int, height: int) -> None:
        for seed in range(6):
            assert draw(Picture("a bay", seed, width, height)).size == (width, height)

    def test_the_cache_is_bounded(self) -> None:
        assert draw_file.cache_info().maxsize == PICTURES_KEPT


class TestRate:
    def test_a_burst_gets_429_with_retry_after_and_costs_nothing(self) -> None:
        with MockServer(rpm=120) as mock:
            replies = [post(mock) for _ in range(6)]
            assert [reply.status_code for reply in replies[:2]] == [200, 200]
            refused = [reply for reply in replies if reply.status_code == 429]
            assert len(refused) >= 3
            assert refused[0].json()["code"] == "Throttling.RateQuota" and refused[0].headers["Retry-After"] == "1"
            stats = mock.stats()
            assert (stats["throttled"], stats["billed"]) == (len(refused), 6 - len(refused))

    @pytest.mark.parametrize("per_minute, spacing", [(120, 0.5), (120, 0.55), (60, 1.0), (240, 0.25)])
    def test_an_even_pace_at_the_limit_is_never_refused(self, per_minute: int, spacing: float) -> None:
        now = [0.0]
        limit = RateLimit(per_minute, clock=lambda: now[0])
        for call in range(300):
            now[0] = call * spacing
            assert limit.admit() == 0

    def test_the_minute_is_a_sliding_window(self) -> None:
        now = [0.0]
        limit = RateLimit(30, clock=lambda: now[0])
        for second in range(30):
            now[0] = float(second)
            assert limit.admit() == 0, "below one a second only the minute counts"
        now[0] = 30.0
        assert limit.admit() == 30
        now[0] = 60.0
        assert limit.admit() == 0
        assert limit.admit() == 1

    def test_zero_means_no_limit(self) -> None:
        limit = RateLimit(0)
        assert not any(limit.admit() for _ in range(1000))

    def test_a_throttled_request_does_not_use_up_a_fault(self) -> None:
        with MockServer(rpm=60, faults="ok,500") as mock:
            assert [post(mock).status_code for _ in range(3)] == [200, 429, 429]
            time.sleep(1.05)
            assert post(mock).status_code == 500


ERRORS = [
    ("400", 400, "InvalidParameter"),
    ("blocked", 400, "DataInspectionFailed"),
    ("402", 400, "Arrearage"),
    ("arrearage", 400, "Arrearage"),
    ("401", 401, "InvalidApiKey"),
    ("403", 403, "Model.AccessDenied"),
    ("quota", 403, "AllocationQuota.FreeTierOnly"),
    ("quota-429", 429, "Throttling.AllocationQuota"),
    ("404", 404, "ModelNotFound"),
    ("429", 429, "Throttling.RateQuota"),
    ("429-wait", 429, "Throttling.RateQuota"),
    ("429-long", 429, "Throttling.RateQuota"),
    ("500", 500, "InternalError"),
    ("503", 503, "ServiceUnavailable"),
    ("timeout", 500, "RequestTimeOut"),
]


class TestFaults:
    @pytest.mark.smoke
    @pytest.mark.parametrize("name, status, code", ERRORS)
    def test_each_documented_error_has_its_row(self, name: str, status: int, code: str) -> None:
        with MockServer(rpm=0, faults=name) as mock:
            reply = post(mock)
            assert (reply.status_code, reply.json()["code"]) == (status, code)
            assert reply.json().keys() == {"code", "message", "request_id"}
            wait = {"429-wait": "1", "429-long": "3600"}.get(name)
            assert reply.headers.get("Retry-After") == wait
            assert mock.stats()["billed"] == (1 if name == "timeout" else 0)
            assert post(mock).status_code == 200, "one entry, one request"

    @pytest.mark.parametrize("name, status", [("500-html", 500), ("502", 502), ("504", 504)])
    def test_a_gateway_answers_html_when_the_picture_is_made_and_billed(self, name: str, status: int) -> None:
        with MockServer(rpm=0, faults=name) as mock:
            reply = post(mock)
            assert (reply.status_code, reply.headers["Content-Type"]) == (status, "text/html")
            assert mock.stats()["billed"] == 1

    @pytest.mark.parametrize("name, billed", [("hangup-before", 0), ("hangup-after", 1)])
    def test_a_hangup_gives_no_answer_and_is_billed_only_after(self, name: str, billed: int) -> None:
        with MockServer(rpm=0, faults=name) as mock:
            with pytest.raises(requests.ConnectionError):
                post(mock)
            assert mock.stats()["billed"] == billed
            assert mock.stats()["requests"][0]["status"] is None
            assert mock.stats()["errors"] == {name: 1}

    def test_a_cut_answer_is_billed_and_ends_within_the_json(self) -> None:
        with MockServer(rpm=0, faults="cut-answer") as mock:
            with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
                post(mock)
            assert mock.stats()["billed"] == 1

    def test_a_slow_answer_dribbles(self) -> None:
        with MockServer(rpm=0, faults="slow") as mock:
            reply = post(mock, stream=True)
            started = time.monotonic()
            assert len(reply.raw.read(10)) == 10
            assert 0.3 < time.monotonic() - started < 3
            reply.close()

    def test_200_without_json_is_billed_and_200_without_image_is_not(self) -> None:
        with MockServer(rpm=0, faults="not-json,no-image") as mock:
            with pytest.raises(ValueError):
                post(mock).json()
            assert "image" not in json.dumps(post(mock).json()["output"])
            assert mock.stats()["billed"] == 1

    def test_a_redirect_leads_to_a_path_where_a_key_would_be_seen(self) -> None:
        with MockServer(rpm=0, faults="redirect") as mock:
            reply = post(mock)
            assert reply.status_code == 307 and mock.stats()["billed"] == 0
            root = mock.base_url.removesuffix("/api/v1")
            requests.post(root + reply.headers["Location"], headers={"Authorization": "Bearer x"}, timeout=5)
            assert mock.stats()["requests"][-1]["authorization"] is True

    @pytest.mark.parametrize(
        "name, status, content",
        [
            ("image-403", 403, "AccessDenied"),
            ("image-expired", 403, "Request has expired"),
            ("image-404", 404, "NoSuchKey"),
            ("image-html", 200, "<html>"),
        ],
    )
    def test_a_link_can_refuse(self, name: str, status: int, content: str) -> None:
        with MockServer(rpm=0, faults=name) as mock:
            url = link(mock)
            for _ in range(2):
                reply = requests.get(url, timeout=5)
                assert reply.status_code == status and content in reply.text
            assert mock.stats()["billed"] == 1

    @pytest.mark.parametrize("name", ["image-500", "image-cut", "image-redirect"])
    def test_a_link_can_fail_once_and_then_work(self, name: str) -> None:
        with MockServer(rpm=0, faults=name) as mock:
            url = link(mock)
            if name == "image-cut":
                with pytest.raises((requests.ConnectionError, requests.exceptions.ChunkedEncodingError)):
                    _ = requests.get(url, timeout=5).content
            else:
                status = requests.get(url, timeout=5, allow_redirects=False).status_code
                assert status == (500 if name == "image-500" else 302)
            Image.open(io.BytesIO(requests.get(url, timeout=5).content)).load()

    def test_a_link_can_redirect_for_ever(self) -> None:
        with MockServer(rpm=0, faults="image-redirect-loop") as mock, pytest.raises(requests.TooManyRedirects):
            requests.get(link(mock), timeout=5)

    def test_a_link_can_hand_out_a_damaged_picture(self) -> None:
        with MockServer(rpm=0, faults="image-corrupt") as mock:
            data = requests.get(link(mock), timeout=5).content
            with pytest.raises((OSError, SyntaxError)):
                Image.open(io.BytesIO(data)).load()

    def test_a_link_can_hand_out_a_decompression_bomb(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 50_000_000)  # another test's program may have taken it away
        with MockServer(rpm=0, faults="image-bomb") as mock:
            data = requests.get(link(mock), timeout=5).content
            assert len(data) < 200
            with pytest.raises(Image.DecompressionBombError):
                Image.open(io.BytesIO(data))

    def test_a_link_can_hand_out_another_size_or_format(self) -> None:
        with MockServer(rpm=0, faults="image-big-size,image-jpeg") as mock:
            assert Image.open(io.BytesIO(requests.get(link(mock), timeout=5).content)).size == (576, 576)
            reply = requests.get(link(mock), timeout=5)
            assert reply.headers["Content-Type"] == "image/jpeg"
            assert Image.open(io.BytesIO(reply.content)).format == "JPEG"

    def test_a_plan_is_used_up_entry_by_entry(self) -> None:
        plan = fault_plan("429, 500*2 ,ok,hangup-after", FAULTS)
        assert [next(plan) for _ in range(7)] == ["429", "500", "500", "ok", "hangup-after", "ok", "ok"]
        for_ever = fault_plan("429,503*inf", FAULTS)
        assert [next(for_ever) for _ in range(50)] == ["429"] + ["503"] * 49

    @pytest.mark.parametrize("spec", ["no-such", "429*", "429*0", "429*-1", "429*x", "*3", "429;500"])
    def test_a_wrong_plan_is_a_value_error(self, spec: str) -> None:
        with pytest.raises(ValueError):
            fault_plan(spec, FAULTS)

    def test_an_invalid_request_is_never_billed_by_a_fault(self) -> None:
        with MockServer(rpm=0, faults="hangup-after") as mock:
            assert post(mock, payload("parameters.seed", -5)).status_code == 400
            assert mock.stats()["billed"] == 0


class TestRobustness:
    @pytest.mark.parametrize(
        "data",
        [
            b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc",
            b"\x00" * 5000 + b"\r\n\r\n",
            b"GET\r\n\r\n",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET http://[ HTTP/1.1\r\n\r\n",
            b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\n\r\n",
            b"GET / HTTP/1.1\r\n" + b"X: y\r\n" * 200 + b"\r\n",
            b"POST /api/v1/models HTTP/1.1\r\nContent-Length: -5\r\n\r\n",
            b"POST /api/v1/models HTTP/1.1\r\nContent-Length: " + b"9" * 5000 + b"\r\n\r\n",
            b"POST /api/v1/models HTTP/1.1\r\nContent-Length: 500\r\n\r\nshort",
            b"GET /\x1b[31m\xff HTTP/1.1\r\n\r\n",
        ],
    )
    def test_garbage_stops_nothing_and_prints_no_traceback(
        self, mock: MockServer, data: bytes, capfd: pytest.CaptureFixture[str]
    ) -> None:
        address = ("127.0.0.1", mock.server_port)
        with socket.create_connection(address, timeout=5) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(65536):
                pass
        with socket.create_connection(address) as connection:  # hangs up with a reset, in the middle of a request
            connection.setsockopt(
                socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("hh" if os.name == "nt" else "ii", 1, 0)
            )
            connection.sendall(data[:40])
        assert post(mock).status_code == 200
        assert "Traceback" not in "".join(capfd.readouterr())

    def test_one_connection_serves_many_requests_without_delay(self, mock: MockServer) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", mock.server_port, timeout=5)
        started = time.monotonic()
        for _ in range(30):
            connection.request("GET", "/mock/stats")
            assert connection.getresponse().read()
        connection.close()
        assert time.monotonic() - started < 1.0

    @pytest.mark.parametrize(
        "settings",
        [{"host": "0.0.0.0"}, {"host": "example.com"}, {"port": 70000}, {"latency": float("nan")}, {"rpm": -1},
         {"link_ttl": -1}, {"api_key": "two words"}, {"faults": "nonsense"}],
    )  # fmt: skip
    def test_settings_out_of_bounds_are_value_errors(self, settings: dict[str, Any]) -> None:
        with pytest.raises(ValueError):
            MockServer(**settings)

    def test_closing_lets_a_waiting_answer_go(self) -> None:
        started = time.monotonic()
        with MockServer(rpm=0, latency=60) as mock, pytest.raises(requests.ReadTimeout):
            post(mock, timeout=0.2)
        assert time.monotonic() - started < 5


@contextmanager
def launch(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    """The script as a process, which does not outlive a test that fails."""
    command = [sys.executable, str(SCRIPT), *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


class TestCommandLine:
    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
    @pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send to another program")
    def test_the_first_line_says_where_and_a_signal_ends_it_quietly(self, number: signal.Signals) -> None:
        with launch("--port", "0", "--fault", "ok,429") as process:
            assert process.stdout
            where = json.loads(process.stdout.readline())
            assert where.keys() == {"base_url", "endpoint", "api_key", "stats_url", "providers", "pid"}
            assert where["pid"] == process.pid
            assert where["api_key"].startswith("sk-mock-")
            assert where["endpoint"] == f"{where['base_url']}/services/aigc/multimodal-generation/generation"
            root = where["base_url"].removesuffix("/api/v1")
            assert where["providers"] == {
                "zimageturbo": {"base_url": f"{root}/api", "api_key": where["api_key"]},
                "openai": {"base_url": f"{root}/v1", "api_key": where["api_key"]},
                "modelscope": {"base_url": f"{root}/modelscope/v1", "api_key": where["api_key"]},
                "sdapi": {"base_url": f"{root}/sdapi/v1", "api_key": where["api_key"]},
                "comfyui": {"base_url": f"{root}/comfyui", "api_key": where["api_key"]},
            }
            for status in (200, 429):
                headers = {"Authorization": f"Bearer {where['api_key']}"}
                assert requests.post(where["endpoint"], json=PAYLOAD, headers=headers, timeout=5).status_code == status
            assert requests.get(where["stats_url"], timeout=5).json()["billed"] == 1
            process.send_signal(number)
            rest, log = process.communicate(timeout=5)
        assert (process.returncode, rest) == (0, "")
        assert len(log.splitlines()) == 2 and "Throttling.RateQuota" in log and where["api_key"] not in log

    @pytest.mark.parametrize(
        "arguments",
        [
            ["--port", "x"], ["--port", "70000"], ["--latency", "-1"], ["--latency", "inf"], ["--rpm", "1.5"],
            ["--fault", "nonsense"], ["--link-ttl", "nan"], ["--host", "0.0.0.0"], ["--api-key", "a b"],
            ["--lat", "1"], ["extra"],
        ],
    )  # fmt: skip
    def test_a_wrong_value_is_one_line_and_exit_2(
        self, arguments: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            mock_server.main(arguments)
        out, err = capsys.readouterr()
        assert (ended.value.code, out, len(err.splitlines())) == (2, "", 1)

    def test_a_port_that_is_taken_is_one_line_and_exit_2(
        self, mock: MockServer, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            mock_server.main(["--port", str(mock.server_port)])
        err = capsys.readouterr().err
        assert ended.value.code == 2 and str(mock.server_port) in err and len(err.splitlines()) == 1

    def test_fault_list_names_every_fault_and_the_service_that_alone_knows_it(
        self, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert mock_server.main(["--fault", "list"]) == 0
        lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
        assert list(lines) == list(FAULTS)
        assert lines["task-lost"].endswith("(zimageturbo, modelscope only)") and lines["bad-base64"].endswith(
            "(openai only)"
        )
        assert "only" not in lines["hangup-after"]


@pytest.mark.parametrize(
    "program", [[str(SCRIPT)], ["-c", f"import sys; sys.path.append({str(SCRIPT.parent)!r}); import mock_server"]]
)
def test_no_package_of_the_same_name_is_loaded_in_place_of_its_parts(tmp_path: Path, program: list[str]) -> None:
    """A package with an __init__.py wins over a folder without one, wherever in the path it lies."""
    for name in ("zimage_mock", "mock"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('the decoy was loaded')")
    done = subprocess.run(
        [sys.executable, *program, "--fault", "list"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


OFFICIAL_CLIENT = """
import json, dashscope
from dashscope.aigc.image_generation import ImageGeneration
messages = [{"role": "user", "content": [{"text": "a lighthouse"}]}]
wanted = dict(model="z-image-turbo", messages=messages, size="512*512", seed=3, prompt_extend=False)
calls = [dashscope.MultiModalConversation.call(**wanted), ImageGeneration.call(**wanted)]
model = dashscope.Models.get("z-image-turbo")
print(json.dumps({
    "links": [call.output.choices[0].message.content[0]["image"] for call in calls],
    "statuses": [call.status_code for call in (*calls, model)],
    "width": calls[0].usage["width"], "model": model.output["model"],
    "refused": dashscope.MultiModalConversation.call(**{**wanted, "seed": -1}).code,
}))
"""


def test_the_official_client_works_unchanged(tmp_path: Path) -> None:
    with MockServer(rpm=0) as mock:
        environment = {
            **os.environ,
            "DASHSCOPE_HTTP_BASE_URL": mock.base_url,
            "DASHSCOPE_API_KEY": mock.api_key,
            "HOME": str(tmp_path),
            "NO_PROXY": "127.0.0.1",
        }
        command = [sys.executable, "-c", OFFICIAL_CLIENT]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30, check=False)
        assert done.returncode == 0, done.stderr
        said = json.loads(done.stdout.splitlines()[-1])
        assert said["statuses"] == [200, 200, 200]
        assert (said["width"], said["model"], said["refused"]) == (512, "z-image-turbo", "InvalidParameter")
        first, second = (requests.get(url, timeout=5).content for url in said["links"])
        assert first == second and Image.open(io.BytesIO(first)).size == (512, 512)
