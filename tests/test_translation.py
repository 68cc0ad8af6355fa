"""README.zh-CN.md says what README.md says: whatever can be compared without reading either language is compared."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from conftest import ROOT

ENGLISH = (ROOT / "README.md").read_text(encoding="utf-8")
CHINESE = (ROOT / "README.zh-CN.md").read_text(encoding="utf-8")

BLOCK = re.compile(r"(?ms)^```(\w*)\n(.*?)^```\n")
QUOTED_OR_COMMENT = re.compile(r"""(?m)('[^']*'|"[^"]*")|(?:^|[ \t]+)#[^\n]*""")
LANGUAGE_LINKS = ["README.md", "README.zh-CN.md"]


def sections(text: str) -> Iterator[tuple[int, str]]:
    """The level of each heading, and what stands below it up to the next one. A `#` in a block is no heading."""
    hidden = BLOCK.sub(lambda block: re.sub("(?m)^#", "\0", block[0]), text)
    _, *parts = re.split(r"(?m)^(#+) .*\n", hidden)
    for level, body in zip(parts[::2], parts[1::2], strict=True):
        yield len(level), body.replace("\0", "#")


def commands(body: str) -> list[tuple[str, str]]:
    """Each block with its language: a bash block without its comments, of any other what stands left of the words."""
    found = []
    for language, block in BLOCK.findall(body):
        if language == "bash":
            kept = QUOTED_OR_COMMENT.sub(lambda match: match[1] or "", block)
        else:
            kept = "\n".join(re.sub(r"(?<=\S)\s{2,}\S.*", "", line) for line in block.splitlines())
        found.append((language, kept))
    return found


def facts(text: str) -> list[str]:
    """Code spans and the numbers outside of them: what is the same in every language, in any order."""
    words = re.sub("`[^`]*`", " ", text)
    return sorted(re.findall("`[^`]+`", text) + re.findall(r"\d+(?:[.,]\d+)*%?", words))


def table(body: str) -> list[list[list[str]]]:
    """Of each row of each table the facts in each cell."""
    lines = [line for line in BLOCK.sub("", body).splitlines() if line.startswith("|")]
    return [[facts(cell) for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]


def targets(body: str) -> list[str]:
    """Where links lead and which pictures are shown, in any order, without the link to the other language."""
    links = re.findall(r"\]\(([^)]+)\)", body) + re.findall(r'<img src="([^"]+)" width="\d+"', body)
    return sorted(link for link in links if link not in LANGUAGE_LINKS)


def prose(body: str) -> list[str]:
    """The facts outside of blocks, tables, link targets and tags."""
    text = re.sub(r"(?m)^\|.*$|<[^>]*>|\]\([^)]*\)", "", BLOCK.sub("", body))
    return facts(text)


def differences(english: str, chinese: str) -> list[str]:
    """What one of the two says and the other does not."""
    ours, theirs = list(sections(english)), list(sections(chinese))
    found = []
    if [level for level, _ in ours] != [level for level, _ in theirs]:
        found.append(f"headings: levels {[level for level, _ in ours]} and {[level for level, _ in theirs]}")
    headings = re.findall(r"(?m)^#+ .*", BLOCK.sub("", english))
    for heading, (_, one), (_, other) in zip(headings, ours, theirs, strict=False):
        for compared in (commands, table, targets, prose):
            if compared(one) != compared(other):
                found.append(f"{heading}: {compared.__name__}: {compared(one)} and {compared(other)}")
    return found


@pytest.mark.smoke
def test_the_chinese_readme_says_what_the_english_one_says() -> None:
    assert differences(ENGLISH, CHINESE) == []


def test_each_readme_leads_to_the_other_at_its_top() -> None:
    assert ENGLISH.splitlines()[2] == "[中文](README.zh-CN.md)"
    assert CHINESE.splitlines()[2] == "[English](README.md)"


def test_the_chinese_readme_is_chinese() -> None:
    for line in re.findall(r"(?m)^#+ .*|^\|.*", BLOCK.sub("", CHINESE)):
        assert re.search("[\u4e00-\u9fff]", line) or set(line) <= set("|- "), line
    for _, body in sections(CHINESE):
        assert re.search("[\u4e00-\u9fff]", BLOCK.sub("", body))


@pytest.mark.parametrize(
    ("old", "new", "compared"),
    [
        ("\n## 两条命令", "\n## 多出来的一节\n\n## 两条命令", "headings"),
        ("\n## 两条命令", "\n### 两条命令", "headings"),
        ("make check   #", "make bench\nmake check   #", "commands"),
        ("--max-cost 0.05", "--max-cost 0.50", "commands"),
        ("a red fox in fresh snow'", "一只红狐'", "commands"),
        ("  references/  ", "  reference/  ", "commands"),
        ("| 9 | 本地磁盘 |\n", "", "table"),
        ("| 9 | 本地磁盘 |\n", "| 9 | 本地磁盘 | 更多 |\n", "table"),
        ("| `openai` | 自己", "| `diffusers` | 自己", "table"),
        ("US$0.02 |", "US$0.03 |", "table"),
        ("references/batch.md)", "references/errors.md)", "targets"),
        (".github/gallery.webp", ".github/demo.webp", "targets"),
        ("`--check` 免费", "检查免费", "prose"),
        ("Python 3.10", "Python 3.11", "prose"),
    ],
)
def test_a_difference_is_found_on_either_side(old: str, new: str, compared: str) -> None:
    changed = CHINESE.replace(old, new, 1)
    assert changed != CHINESE
    assert any(compared in found for found in differences(ENGLISH, changed))
    assert any(compared in found for found in differences(changed, CHINESE))


def test_only_comments_of_a_command_may_be_in_another_language() -> None:
    one, other = (
        "```bash\nmake demo   # free\necho '# kept' \"$#\" a#b\n```\n",
        "```bash\nmake demo # 免费\n{}\n```\n",
    )
    same = "echo '# kept' \"$#\" a#b"
    assert commands(one) == commands(other.format(same))
    for different in ("echo '# 保留' \"$#\" a#b", "echo '# kept' \"$#\" a#c", "echo '# kept' \"$@\" a#b"):
        assert commands(one) != commands(other.format(different))
