"""The tasks by which a model is judged, by name; each is one file with `Options` and `evaluate`."""

from plan_jax.tasks import (
    classification,
    detection,
    grounding,
    report_generation,
    retrieval,
    segmentation,
    zero_shot,
)

TASKS = {
    "grounding": grounding,
    "retrieval": retrieval,
    "zero_shot": zero_shot,
    "classification": classification,
    "segmentation": segmentation,
    "detection": detection,
    "report_generation": report_generation,
}
