"""The search for keys finds one in whatever form it was left."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path
from urllib.parse import quote

import pytest

from leaks import Search, keys_in

KEY = "zt/key+0a1b2c3d4e5f"

LEAKS: dict[str, Callable[[bytes], bytes]] = {
    "as it is": bytes,
    "percent-encoded": lambda key: quote(key, safe="").encode(),
    "hex": lambda key: key.hex().encode(),
    "base64": base64.b64encode,
    "basic authentication": lambda key: base64.b64encode(b":" + key),
    "basic authentication of a user": lambda key: base64.b64encode(b"me:" + key + b"\n"),
    "base64 of a header": lambda key: base64.b64encode(b"Bearer " + key),
    "amid other bytes": lambda key: b"\0\xff" + key + b"\xfe",
}


@pytest.mark.smoke
@pytest.mark.parametrize("leak", LEAKS)
@pytest.mark.parametrize("where", ["stream", "file"])
def test_a_key_is_found(tmp_path: Path, leak: str, where: str) -> None:
    search = Search([KEY], [tmp_path])
    search("nothing")
    content = LEAKS[leak](KEY.encode())
    streams = [content.decode("latin-1")] if where == "stream" else []
    if where == "file":
        (tmp_path / "deep").mkdir()
        (tmp_path / "deep" / ".hidden").write_bytes(content)
    with pytest.raises(AssertionError, match="the key is in"):
        search(*streams)


def test_a_key_in_the_name_of_a_file_is_found(tmp_path: Path) -> None:
    search = Search([KEY], [tmp_path])
    (tmp_path / f"{KEY.encode().hex()}.png").touch()
    with pytest.raises(AssertionError, match="in a name"):
        search()


def test_what_a_test_has_put_there_is_left_alone_until_it_changes(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(f"DASHSCOPE_API_KEY={KEY}\n")
    search = Search([KEY], [tmp_path])
    search()
    (tmp_path / ".env").write_text(f"DASHSCOPE_API_KEY={KEY}\nmore\n")
    with pytest.raises(AssertionError, match=r"\.env"):
        search()


def test_words_are_no_keys() -> None:
    assert keys_in({"OPENAI_API_KEY": "none", "DASHSCOPE_API_KEY": f" {KEY} ", "OTHER": KEY}) == [KEY]
