"""Range checks of the constants of a method, so that a wrong one costs a sentence and not a run."""

import math
import numbers
from dataclasses import fields
from typing import Any, Literal, NamedTuple, get_args, get_origin

from plan_jax.types import UserError


class Range(NamedTuple):
    """The closed interval [low, high] of a number."""

    low: float
    high: float


# Bounds are wide: they exclude what cannot work, not what is unwise. Float32 overflows beyond 3e38,
# so the bounds of factors leave room for products of several of them.
COUNT = Range(1, 2**20)
BLOCKS = Range(1, 100)  # unrolled when compiled: more would compile for hours
STEPS = Range(0, 2**31 - 1)  # the step counter is an int32
FRACTION = Range(0, 1)
WEIGHT = Range(0, 1e6)
FACTOR = Range(0, 1e4)  # on cosines, before a softmax
TEMPERATURE = Range(1e-4, 1e4)  # divides cosines, before a softmax


def check_hyper(hyper: Any, **ranges: Range) -> None:
    """Raises UserError unless every constant has the type of its field and lies in its range.

    Args:
      hyper: a dataclass whose fields are of type bool, int, float or a Literal of strings.
      **ranges: the range of each number.
    """
    for field in fields(hyper):
        value = getattr(hyper, field.name)
        # A number without a range is the author's mistake, hence a KeyError.
        limits = ranges[field.name] if field.type in (int, float) else None
        if remedy := _remedy(value, field.type, limits):
            raise UserError(f"hyper.{field.name} is {value!r}; {remedy}")


def _remedy(value: Any, kind: Any, limits: Range | None) -> str:
    """Returns what to use instead of a value, or an empty string if the value is right."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "" if value in choices else f"use one of {', '.join(choices)}"
    if kind is bool:
        return "" if isinstance(value, bool) else "use True or False"
    assert limits is not None, kind
    number = numbers.Integral if kind is int else numbers.Real
    # Python counts True as an int; comparisons with nan are False, which refuses nan.
    has_type = isinstance(value, number) and not isinstance(value, bool)
    if has_type and limits.low <= value <= limits.high and math.isfinite(value):
        return ""
    noun = "an int" if kind is int else "a number"
    return f"use {noun} from {limits.low:g} to {limits.high:.10g}"
