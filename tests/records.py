"""A small record with every kind of annotation, and the comparison of two records."""

import numpy as np

from plan_jax.types import Phrase, Record

SENTENCES = ("No effusion.", "Heart is normal.", "Lungs are clear.")
FINDINGS = ("effusion", "oedema")
ANATOMY_NAMES = ("lung", "heart")
REGION_NAMES = ("left lung", "heart", "right lung")


def make_record(number, rows=20, columns=24):
    """Returns a record whose image has the grey value `number` everywhere."""
    mask = np.zeros((rows, columns), bool)
    mask[2:5, 3 : 9 + number % 5] = True
    return Record(
        image=np.full((rows, columns, 1), number, np.uint8),
        text=" ".join(SENTENCES),
        patient_id=f"patient {number // 2}",
        labels=np.asarray([number % 2, -1], np.int8),
        phrases=(
            Phrase("no effusion", 0, "effusion|", "effusion", ((1.0, 2.0, 3.5, 4.0),), mask),
            Phrase("heart", boxes=((0.0, 0.0, 4.0, 4.0), (2.0, 2.0, 8.0, 8.0))),
        ),
        anatomy={"lung": mask, "heart": ~mask},
        triplets=(("left lung", "effusion", 0), ("", "é", 1)),
        # The last region is unknown.
        regions=np.asarray([[12, 2, 20, 18], [8, 9, 16, 17], [0, 0, 0, 0]], np.float32),
    )


def are_equal(first, second):
    """Returns whether two records agree in every field, bit for bit."""
    phrases_agree = len(first.phrases) == len(second.phrases) and all(
        (a.text, a.key, a.bare, a.finding, a.boxes) == (b.text, b.key, b.bare, b.finding, b.boxes)
        and np.array_equal(a.mask, b.mask)
        for a, b in zip(first.phrases, second.phrases, strict=True)
    )
    anatomy_agrees = list(first.anatomy) == list(second.anatomy) and all(
        np.array_equal(first.anatomy[name], second.anatomy[name]) for name in first.anatomy
    )
    names = ("text", "patient_id", "triplets", "record_id", "study_id", "view", "sections")
    texts_agree = all(getattr(first, name) == getattr(second, name) for name in names)
    arrays_agree = all(
        np.array_equal(getattr(first, name), getattr(second, name))
        for name in ("image", "labels", "regions")
    )
    return texts_agree and phrases_agree and anatomy_agrees and arrays_agree
