"""The checker of `make check` finds each banned word in prose, and none in code."""

from __future__ import annotations

import pytest

from tests.plain_english import PLACES, ROOT, banned_words, files, findings

WORDS = banned_words()


def found(tmp_path, name: str, text: str) -> list[tuple[int, str]]:
    (tmp_path / name).write_text(text)
    return list(findings(tmp_path / name, WORDS))


@pytest.mark.parametrize("word", WORDS)
def test_every_banned_word_is_found_in_prose_and_in_code_files(tmp_path, word):
    assert found(tmp_path, "page.md", f"The writer\n{word}.\n") == [(2, word)]
    assert found(tmp_path, "module.py", f'"""The writer {word}."""\n') == [(1, word)]
    assert found(tmp_path, "module.py", f"x = 1  # The writer {word.upper()}.\n") == [(1, word)]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.md", "\nThe slot is given\nup at last.\n"),
        ("module.py", '\n"""The slot is given\nup at last."""\n'),
        ("module.py", 'def f():\n    """Return nothing: the slot is given\n    up at last."""\n'),
        ("module.py", "\n# The slot is given\n# up at last.\n"),
        ("module.py", "if True:\n    # The slot is given\n    # up at last.\n    pass\n"),
        ("module.py", '\nx = ("The slot is given "\n     f"up at {1} last.")\n'),
        ("module.py", '\nx = (f"Slot {1} is given "\n     "up at last.")\n'),
    ],
)
def test_phrase_is_found_across_lines(tmp_path, name, text):
    assert found(tmp_path, name, text) == [(2, "given up")]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("page.md", "The argument `told` and ``given up`` are names; retold is a word.\n"),
        ("page.md", "```python\ntold = given, up\n```\n"),
        ("page.md", "The names given `x` up to here, and given.\n"),
        ("module.py", "told = tell(himself)\n"),
        ("module.py", "x = given + up  # the sum\n"),
        ("module.py", "x = f\"{told} and {told['he']} are given {1} up to here.\"\n"),
        ("module.py", 'x = {"given": 1, "up": 2}\n'),
        ("module.py", "x = given  # names that were given\nup = 1  # up to here\n"),
        ("module.py", 'x = f("given"), "up"\n'),
    ],
)
def test_names_in_code_and_texts_that_do_not_belong_together_pass(tmp_path, name, text):
    assert found(tmp_path, name, text) == []


def test_table_of_banned_words_itself_passes():
    assert list(findings(ROOT / "CONTRIBUTING.md", WORDS)) == []


def test_package_and_pages_hold_no_banned_word():
    for path in files([ROOT / place for place in PLACES]):
        assert list(findings(path, WORDS)) == [], path
