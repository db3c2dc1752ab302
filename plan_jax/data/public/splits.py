"""Division of patients into splits, and the count of those that a rule puts into two."""

import hashlib
from collections.abc import Iterable, Mapping


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
