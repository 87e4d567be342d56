from __future__ import annotations

import pytest

from nitrous_ema.errors import NitrousError, NitrousWarning, printable, warn


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain ä 漢", "plain ä 漢"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("a\r\nb", "a\\r\\nb"),
        ("\u202egnp\u2066", "\\u202egnp\\u2066"),
        ("\x9b2J", "\\x9b2J"),
        ("caf\udce9", "caf\\udce9"),
    ],
)
def test_nothing_that_a_terminal_interprets_is_left(text, shown):
    assert printable(text) == shown


def test_messages_of_errors_and_warnings_are_printable():
    assert str(NitrousError("host \x1b[2J\nand \u202e")) == "host \\x1b[2J\nand \\u202e"
    with pytest.warns(NitrousWarning, match=r"^host \\x1b$"):
        warn("host \x1b")
