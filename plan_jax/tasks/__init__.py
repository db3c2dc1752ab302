"""The tasks by which a model is judged, by name; each is one file with a function `evaluate`."""

from plan_jax.tasks import grounding, retrieval, zero_shot

TASKS = {"grounding": grounding, "retrieval": retrieval, "zero_shot": zero_shot}
