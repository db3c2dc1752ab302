"""Left and right exchanged in a text."""

import time

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
        ("leftsided, left_lung, Right_rib", "rightsided, right_lung, Left_rib"),
        ("RUQ clips, LUE PICC, RIJ line", "LUQ clips, RUE PICC, LIJ line"),
        ("R\n effusion, R\u00a0base, L 5th rib", "L\n effusion, L\u00a0base, R 5th rib"),
        ("R greater than L, worse on the L.", "L greater than R, worse on the R."),
        ("effusion (R), tube on L", "effusion (L), tube on R"),
        ("effusion on the right now larger", "effusion on the left now larger"),
        ("derrame izquierdo, hemitorax derech", "derrame derecho, hemitorax izquierd"),
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
        "The patient left the hospital, left AMA",
        "The tube was left in\n place. All right, right now.",
        "based on R/O, on L-spine, on L1, (LV)",
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


@pytest.mark.parametrize(
    "piece", ["L ", "L<", "left ", "was ", "all \n", "R greater ", "on ", "1st "]
)
def test_long_texts_are_read_in_linear_time(piece):
    start = time.process_time()
    swap_sides(piece * (100_000 // len(piece)))
    assert time.process_time() - start < 2


@given(st.lists(st.sampled_from([*WORDS, "dextroscoliosis", "L1", ".", "-sided", "lung"])))
def test_two_flips_are_none(words):
    for joined in (" ".join(words), "".join(words)):
        assert swap_sides(swap_sides(joined)) == joined
        assert names_side(joined) == (swap_sides(joined) != joined)
