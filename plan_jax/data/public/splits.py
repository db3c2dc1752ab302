"""Division of patients into splits, and the count of those that a rule puts into two."""

import hashlib
from collections.abc import Iterable, Mapping, Sequence

from plan_jax.types import UserError


def assign_by_hash(patient_id: str, val_fraction: float, test_fraction: float) -> str:
    """Returns the split of a patient: uniform over patients, and the same in every run.

    A patient's split depends neither on other patients nor on the order of rows.

    >>> assign_by_hash("7", 0.0, 0.0), assign_by_hash("7", 1.0, 0.0)
    ('train', 'val')
    """
    digest = hashlib.sha256(patient_id.encode()).digest()
    position = int.from_bytes(digest[:8], "big") / 2**64
    if position < val_fraction:
        return "val"
    return "test" if position < val_fraction + test_fraction else "train"


def count_leaks(assignments: Iterable[tuple[str, str]]) -> Mapping[str, int]:
    """Returns for val and test how many of their images share a patient with train.

    >>> dict(count_leaks([("a", "train"), ("a", "test"), ("b", "test"), ("b", "val")]))
    {'val': 0, 'test': 1}

    Args:
      assignments: patient and split of each image.
    """
    pairs = list(assignments)
    trained = {patient for patient, split in pairs if split == "train"}
    return {
        name: sum(split == name and patient in trained for patient, split in pairs)
        for name in ("val", "test")
    }


def hold_out(
    num_items: int, fraction: float | int, seed: int, classes: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Returns the indices that are kept and held out by scikit-learn, in its order.

    Many published splits are calls of its `train_test_split` on the rows of a table.

    >>> hold_out(4, 0.5, 0)
    ([1, 0], [2, 3])

    Args:
      num_items: how many items there are.
      fraction: of the items that are held out, rounded up; or how many, as an int.
      seed: its `random_state`.
      classes: its `stratify`: the class of each item, of which the fraction is held out.

    Raises:
      UserError: there are too few items, as in a part of a dataset.
    """
    # Slow to import, and few splits need it.
    from sklearn.model_selection import train_test_split

    try:
        train_indices, test_indices = train_test_split(
            range(num_items), test_size=fraction, random_state=seed, stratify=classes
        )
    except ValueError:
        raise UserError(
            f"the tables have {num_items} rows, too few for a published split; complete them, or "
            "use split hash"
        ) from None
    return train_indices, test_indices
