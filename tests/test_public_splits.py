"""Divisions of patients by published rules."""

import pytest

from plan_jax.data.public.splits import hold_out
from plan_jax.types import UserError


@pytest.mark.parametrize(
    ("num_rows", "fraction", "classes"),
    [(0, 0.3, None), (80, 10_674, None), (4, 0, None), (3, 0.5, [0, 0, 1])],
)
def test_too_few_rows_for_a_published_split_are_one_sentence(num_rows, fraction, classes):
    with pytest.raises(UserError, match=f"the tables have {num_rows} rows, too few"):
        hold_out(num_rows, fraction, 0, classes)
