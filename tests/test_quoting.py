"""Messages quote a cell in at most 60 characters, and the text of a report not at all."""

import pytest

from plan_jax.data import quoting

REPORT = "Mr Miller has a large effusion on the left. He was told so by telephone."


@pytest.mark.parametrize("quote", [quoting.quote, quoting.quote_path])
@pytest.mark.parametrize(
    "cell",
    [
        REPORT,
        REPORT * 1000,
        "Miller: effusion.",
        "左侧胸腔积液。心影增大。",
        REPORT.encode(),
        [REPORT] * 3,
        {"findings": REPORT, REPORT: 1},
        {"bytes": b"\x89PNG" * 9999, "path": REPORT},
        10**5000,
        [10**5000],
        ["x" * 10**6],
        "x" * 10**6,
        "\x1b[2J\x07" * 50,
    ],
    ids=range(13),
)
def test_a_quotation_is_short_printable_and_shows_no_report(quote, cell):
    shown = quote(cell)
    assert 0 < len(shown) <= quoting.MAX_CHARACTERS + 2 and shown.isprintable()
    assert not [word for word in ("Miller", "effusion", "积液", "telephone") if word in shown]


@pytest.mark.parametrize(
    "cell",
    [
        "双肺纹理清晰，心影不大，左侧胸腔积液",
        "ปอดทั้งสองข้างปกติไม่พบสิ่งผิดปกติ",
        "Seen and agreed by Dr.Smith",
        "No focal consolidation.Clear",
    ],
)
def test_a_report_without_blanks_or_with_an_end_like_a_suffix_is_not_shown(cell):
    assert quoting.quote_path(cell) == f"a text of {len(cell)} characters"


def test_a_path_of_many_words_shows_the_name_of_its_file():
    path = "My Drive/Study of the year/Chest films from both sites/001 front.png"
    assert quoting.is_path(path) and quoting.quote_path(path) == ".../001 front.png"
    assert quoting.quote_path(f"{REPORT} x.png") == f"a text of {len(REPORT) + 6} characters"


def test_short_values_and_ends_of_paths_are_shown():
    assert quoting.quote("held out") == "'held out'" and quoting.quote(0.5) == "0.5"
    assert quoting.quote_path("a b/c.png") == "a b/c.png"
    long_path = quoting.quote_path("folder/" * 30 + "001.png")
    assert long_path.startswith("...") and long_path.endswith("/001.png") and len(long_path) == 60
    assert quoting.shorten("a  b\n c\x1b") == "a b c\ufffd"
