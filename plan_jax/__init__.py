"""plan_jax: medical image-text pre-training in JAX.

The public names are `load`, which returns a trained model, and the tables `METHODS` and `TASKS`.
"""

from typing import Any

__all__ = ["METHODS", "TASKS", "load"]


def __getattr__(name: str) -> Any:
    """Imports a public name at its first use, because importing them all takes seconds."""
    if name == "load":
        from plan_jax.model import load

        return load
    if name == "METHODS":
        from plan_jax.methods import METHODS

        return METHODS
    if name == "TASKS":
        from plan_jax.tasks import TASKS

        return TASKS
    raise AttributeError(f"module 'plan_jax' has no attribute {name!r}")
