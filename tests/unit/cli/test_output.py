import pytest

from fsmount.cli.output import escape, printable


@pytest.mark.parametrize(
    "name, shown",
    [
        (b"plain name-1.txt", "plain name-1.txt"),
        ("grün 日本 🎉".encode(), "grün 日本 🎉"),
        (b"back\\slash", r"back\\slash"),
        (b"line\nfeed\ttab\rreturn", r"line\nfeed\ttab\rreturn"),
        (b"\x1b[2Jred\x00\x7f", r"\033[2Jred\000\177"),
        ("C1 \x9b2J".encode(), r"C1 \302\2332J"),
        (b"latin-1 caf\xe9", r"latin-1 caf\351"),
        ("turned \u202e round".encode(), r"turned \342\200\256 round"),
        ("no-break\u00a0space".encode(), r"no-break\302\240space"),
        (b"", ""),
    ],
)
def test_a_name_is_shown_as_one_printable_line(name, shown):
    assert escape(name) == shown
    assert shown.isprintable()


def test_names_that_differ_are_shown_differently():
    assert escape(b"a\nb") != escape(rb"a\nb")
    assert escape(b"\xe9") != escape(rb"\351") != escape("é".encode())


def test_a_message_keeps_its_lines_and_backslashes_and_nothing_that_steers_a_terminal():
    assert (
        printable("two\nlines \\ and \x1b[31mred \udce9 \ud800")
        == "two\nlines \\ and \\033[31mred \\351 \\355\\240\\200"
    )
