"""Labels as CheXpert's labeller writes them: 1, 0, -1 for doubt, and a blank cell."""

from collections.abc import Mapping, Sequence

from plan_jax.data import quoting
from plan_jax.types import UserError

# A blank cell is a finding that the report does not mention.
_VALUES = {"1": 1, "1.0": 1, "0": 0, "0.0": 0, "-1": -1, "-1.0": -1}


def read_labels(
    row: Mapping[str, str], findings: Sequence[str], blank: int, place: str
) -> tuple[int, ...]:
    """Returns the labels of a row in the order of the findings.

    >>> read_labels({"Edema": "1.0", "Hernia": "-1.0", "Mass": ""}, ("Mass", "Edema"), 0, "row 1")
    (0, 1)

    Args:
      row: the cell of each finding.
      findings: names of columns.
      blank: value of a finding that is not mentioned.
      place: table and row, for messages.

    Raises:
      UserError: a cell is none of the four.
    """
    labels = []
    for finding in findings:
        cell = row[finding]
        if cell and cell not in _VALUES:
            raise UserError(
                f"label {quoting.quote(cell)} of {finding} in {place} is not 1, 0, -1 or blank; "
                "correct it"
            )
        labels.append(_VALUES[cell] if cell else blank)
    return tuple(labels)


def check_blank(blank: int, name: str) -> None:
    """Raises UserError if a blank cell is given a value that is no label."""
    if blank not in (-1, 0):
        raise UserError(
            f"label_blank {blank} of dataset {name} is not a label; use -1 (unknown) or 0 (absent)"
        )
