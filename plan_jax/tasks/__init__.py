"""The downstream tasks by name; each is one module that follows `types.Task`."""

from collections.abc import Mapping

from plan_jax.metrics import Catalogue
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
CATALOGUE: Catalogue = {name: task.METRICS for name, task in TASKS.items()}
TITLES: Mapping[str, str] = {name: task.TITLE for name, task in TASKS.items()}
