"""The type checker that tests wrap around every annotated function of the library."""

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """Returns a function that checks arguments and results at each call, except for constructors.

    jax constructs the dataclasses that it maps over itself, from whatever the map returned: shapes,
    shardings or placeholders as well as arrays.
    """
    return function if function.__name__ == "__init__" else beartype(function)
