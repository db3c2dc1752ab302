"""The type checker that tests put around every annotated function of the library."""

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """Check what goes in and out at each call, except where a dataclass is made.

    jax makes the dataclasses that it maps over itself, with whatever the map returned: shapes,
    shardings or placeholders as well as arrays.
    """
    return function if function.__name__ == "__init__" else beartype(function)
