import pytest

from esft.text import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain \u00e9 \u4e2d \U0001f600", "plain \u00e9 \u4e2d \U0001f600"),
        ("a\x1b[2Jb\x00", "a\\x1b[2Jb\\x00"),
        ("a\nb\tc\r", "a\\nb\\tc\\r"),
        ("\u2028\u2029\x85", "\\u2028\\u2029\\x85"),
        ("half \ud800", "half \\ud800"),
        ("\x7f\x9b", "\\x7f\\x9b"),
        ("a\u202eb\u2066c", "a\\u202eb\\u2066c"),
        ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u200c\u062e"),  # Persian needs its joiners
    ],
)
def test_what_is_not_seen_or_turns_a_line_is_shown_as_an_escape(text: str, shown: str):
    assert printable(text) == shown


def test_what_is_to_be_kept_stays():
    assert printable("a\nb\tc\x00", kept="\n\t") == "a\nb\tc\\x00"
