"""The downstream tasks by name; each is one module that follows `types.Task`."""

import importlib
from collections.abc import Mapping
from typing import cast

from plan_jax.metrics import Catalogue
from plan_jax.types import Task

# The modules of this package that are tasks, in the order in which results list them.
NAMES = (
    "grounding",
    "retrieval",
    "zero_shot",
    "classification",
    "segmentation",
    "detection",
    "report_generation",
)
# Imported by name, so that a new task is one line; tests check each module against the protocol.
TASKS: dict[str, Task] = {
    name: cast(Task, importlib.import_module(f"{__name__}.{name}")) for name in NAMES
}
CATALOGUE: Catalogue = {name: task.METRICS for name, task in TASKS.items()}
TITLES: Mapping[str, str] = {name: task.TITLE for name, task in TASKS.items()}
