"""A small record with every kind of annotation, for tests of the data pipeline."""

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
