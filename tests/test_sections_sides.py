"""Left and right exchanged in a text."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from plan_jax.data.sections.sides import names_side, swap_sides


@pytest.mark.parametrize(
    ("text", "swapped"),
    [
        ("left Left LEFT", "right Right RIGHT"),
        ("Left-sided effusion, right-sided pacer", "Right-sided effusion, left-sided pacer"),
        ("(left>right), leftward, rightmost", "(right>left), rightward, leftmost"),
        ("LLL and RUL collapse, RML", "RLL and LUL collapse, LML"),
        ("L base, R pleural effusion, L-sided", "R base, L pleural effusion, R-sided"),
        ("L > R, L>R, R >> L", "R > L, R>L, L >> R"),
        ("Lt base, rt effusion", "Rt base, lt effusion"),
        ("Dextroscoliosis, levo-convex, levocardia", "Levoscoliosis, dextro-convex, dextrocardia"),
        ("left internal jugular line", "right internal jugular line"),
    ],
)
def test_sides_are_exchanged(text, swapped):
    assert swap_sides(text) == swapped
    assert swap_sides(swapped) == text
    assert names_side(text) and names_side(swapped)


@pytest.mark.parametrize(
    "text",
    [
        "Bilateral effusions",
        "upright film, brightness, cleft",
        "L1 fracture, L-spine, T12-L1, L4/5",
        "R/O pneumonia. Dr. R. Smith, L. Jones",
        "dextrose, levofloxacin",
        "lingula and middle lobe",
        "RT for cancer, SVT, 5 &lt; 6",
        "l base",
        "",
    ],
)
def test_what_names_no_side_stays(text):
    assert swap_sides(text) == text
    assert not names_side(text)


WORDS = [
    "left",
    "Right",
    "LEFT",
    "bilateral",
    "RLL",
    "L",
    "R",
    ">",
    "base",
    "Lt",
    "levo-convex",
    "\n",
]


@given(st.lists(st.sampled_from([*WORDS, "dextroscoliosis", "L1", ".", "-sided", "lung"])))
def test_two_flips_are_none(words):
    for joined in (" ".join(words), "".join(words)):
        assert swap_sides(swap_sides(joined)) == joined
        assert names_side(joined) == (swap_sides(joined) != joined)
