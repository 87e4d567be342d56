"""Find words that the house style bans, in docstrings, comments, messages and docs: ``python -m tests.plain_english``.

The list, each word with its replacement, is the table under "Plain English" in CONTRIBUTING.md. Names in code are not
looked at, and neither is text in backquotes. A phrase is found across the end of a line, too.
"""

from __future__ import annotations

import argparse
import io
import re
import sys
import tokenize
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACES = ("nitrous_ema", "README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md", "docs", "examples", "bench")
_ROW = re.compile(r"^\| (?P<words>[^|]+) \| (?P<instead>[^|]+) \|$", re.MULTILINE)
_CODE = re.compile(r"``[^`]*``|`[^`]*`")
_BRACES = re.compile(r"\{[^{}]*\}")
_QUOTES = re.compile(r"^[a-zA-Z]*(?:\"\"\"|'''|[\"'])|(?:\"\"\"|'''|[\"'])$")


def banned_words() -> dict[str, str]:
    """Each banned word or phrase, with what to write instead, as CONTRIBUTING.md lists them."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Plain English", 1)[1].split("\n## ", 1)[0]
    rows = list(_ROW.finditer(section))[1:]  # without the head of the table
    return {word.strip(): row["instead"].strip() for row in rows for word in row["words"].split(",")}


def findings(path: Path, words: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Lines of one file that hold a banned word, and the word."""
    phrases = (re.escape(word).replace(r"\ ", r"[\s#]+") for word in sorted(words, key=len, reverse=True))
    pattern = re.compile(rf"\b({'|'.join(phrases)})\b", re.IGNORECASE)
    for first_line, text in _texts(path):
        blank = _CODE.sub(_blank, text)
        for found in pattern.finditer(blank):
            word = " ".join(found[1].lower().replace("#", " ").split())
            yield first_line + blank.count("\n", 0, found.start()), word


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    source = path.read_text()
    if path.suffix == ".md":
        # The table itself, and blocks of code, are not prose.
        source = re.sub(r"^```.*?^```", _blank, source, flags=re.M | re.S)
        if path.name == "CONTRIBUTING.md":
            source = _ROW.sub(" ", source)
        yield 1, source
        return
    group: list[tokenize.TokenInfo] = []  # comments of one paragraph, or pieces of one message
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = _kind(token)
        if group and kind != _kind(group[-1]) and kind != "between":
            yield group[0].start[0], _joined(group)
            group = []
        if kind in ("string", "comment"):
            group.append(token)
    assert not group, "the last token ends the file"


def _kind(token: tokenize.TokenInfo) -> str:
    """Whether a token is a string, a comment, stands between the pieces of one text, or ends a text."""
    if token.type in (tokenize.STRING, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)):
        return "string"
    names = {"COMMENT": "comment", "NL": "between", "FSTRING_START": "between", "FSTRING_END": "between"}
    return names.get(tokenize.tok_name[token.type], "end")


def _joined(group: list[tokenize.TokenInfo]) -> str:
    """The text of successive strings or comments, without quotes, in as many lines as they take."""
    text, line = "", group[0].start[0]
    for token in group:
        text += "\n" * (token.start[0] - line) + _content(token)
        line = token.end[0]
    return text


def _content(token: tokenize.TokenInfo) -> str:
    if token.type != tokenize.STRING:
        return token.string
    text = _QUOTES.sub("", token.string)
    # Before Python 3.12 an f-string is one token, with the code in its braces.
    is_f_string = "f" in token.string.split(token.string[-1], 1)[0].lower()
    while is_f_string and (inner := _BRACES.sub(_blank, text)) != text:
        text = inner
    return text


def _blank(found: re.Match[str]) -> str:
    """Bars in the place of the text that was found: line numbers stay, and no phrase reaches across."""
    return re.sub(r"[^\n]", "|", found[0])


def files(places: list[Path]) -> list[Path]:
    """The Python files and pages in these places."""
    found: list[Path] = []
    for place in places:
        inside = sorted(place.rglob("*")) if place.is_dir() else [place]
        found += [path for path in inside if path.suffix in (".py", ".md")]
    return found


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("places", nargs="*", type=Path, default=[ROOT / place for place in PLACES])
    words, count = banned_words(), 0
    for path in files(options.parse_args().places):
        for line, word in findings(path, words):
            shown = path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path
            print(f"{shown}:{line}: {word!r}; instead: {words[word]}")
            count += 1
    return 1 if count else 0


if __name__ == "__main__":
    sys.exit(main())
