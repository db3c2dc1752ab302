"""The type checker that tests put around every annotated function of the library."""

from collections.abc import Callable

from beartype import beartype


def check(function: Callable) -> Callable:
    """Returns a function that checks its arguments and its result at each call.

    Constructors of dataclasses are not checked: jax constructs the dataclasses that it maps over
    with whatever the map returned, which may be shapes, shardings or placeholders.
    """
    return function if function.__name__ == "__init__" else beartype(function)
