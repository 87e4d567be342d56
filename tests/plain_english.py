"""Find words that the house style bans, in docstrings, comments, messages and docs: ``python -m tests.plain_english``.

The list, each word with its replacement, is the table under "Plain English" in CONTRIBUTING.md. Names in code are not
looked at, and neither is text in backquotes.
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
PLACES = ("nitrous_ema", "README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs", "examples", "bench")
_ROW = re.compile(r"^\| (?P<words>[^|]+) \| (?P<instead>[^|]+) \|$", re.MULTILINE)
_CODE = re.compile(r"``[^`]*``|`[^`]*`")
_BRACES = re.compile(r"\{[^{}]*\}")


def banned_words() -> dict[str, str]:
    """Each banned word or phrase, with what to write instead, as CONTRIBUTING.md lists them."""
    section = (ROOT / "CONTRIBUTING.md").read_text().split("## Plain English", 1)[1].split("\n## ", 1)[0]
    rows = list(_ROW.finditer(section))[1:]  # without the head of the table
    return {word.strip(): row["instead"].strip() for row in rows for word in row["words"].split(",")}


def findings(path: Path, words: dict[str, str]) -> Iterator[tuple[int, str]]:
    """Lines of one file that hold a banned word, and the word."""
    pattern = re.compile(rf"\b({'|'.join(map(re.escape, sorted(words, key=len, reverse=True)))})\b", re.IGNORECASE)
    for first_line, text in _texts(path):
        blank = _CODE.sub(_blank, text)
        for found in pattern.finditer(blank):
            yield first_line + blank.count("\n", 0, found.start()), found[1].lower()


def _texts(path: Path) -> Iterator[tuple[int, str]]:
    source = path.read_text()
    if path.suffix == ".md":
        # The table itself, and blocks of code, are not prose.
        source = re.sub(r"^```.*?^```", _blank, source, flags=re.M | re.S)
        if path.name == "CONTRIBUTING.md":
            source = _ROW.sub(" ", source)
        yield 1, source
        return
    kinds = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type in kinds:
            # Before Python 3.12 an f-string is one token, with the code in its braces.
            is_f_string = token.type == tokenize.STRING and "f" in token.string.split(token.string[-1], 1)[0].lower()
            text = token.string
            while is_f_string and (inner := _BRACES.sub(_blank, text)) != text:
                text = inner
            yield token.start[0], text


def _blank(found: re.Match[str]) -> str:
    """Spaces in the place of the text that was found; line numbers stay."""
    return re.sub(r"[^\n]", " ", found[0])


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
