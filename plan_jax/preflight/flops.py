"""Counts the floating-point operations of matrix products and convolutions of a function.

XLA's own count takes the body of a loop once, so that it misses most of a step with microbatches or
tiles. Here a scan counts as often as it runs.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import core


def count_flops(function: Callable[..., Any], *arguments: Any) -> float:
    """Returns the operations of one call of a function, see `count_jaxpr_flops`.

    Args:
      function: a function of arrays.
      *arguments: arrays or `jax.ShapeDtypeStruct`.
    """
    return count_jaxpr_flops(jax.make_jaxpr(function)(*arguments).jaxpr)


def count_jaxpr_flops(jaxpr: core.Jaxpr) -> float:
    """Returns the operations of `dot_general` and `conv_general_dilated` in a traced function.

    A product of [M K] and [K N] has 2 M N K operations. A convolution has two for each element of
    its output, each tap of its window and each channel that it sums; zeros that a stride inserts
    into the input of its gradient are not counted, taps in the padding are. Of a conditional, the
    branch with the most operations counts. Elementwise operations are not counted: on matrix units
    they run beside the products. Inside of a `shard_map`, the operations of one device count.
    """
    total = 0.0
    for equation in jaxpr.eqns:
        name, parameters = equation.primitive.name, equation.params
        if name == "dot_general":
            total += _count_product(equation)
        elif name == "conv_general_dilated":
            total += _count_convolution(equation)
        elif name == "scan":
            total += parameters["length"] * count_jaxpr_flops(parameters["jaxpr"].jaxpr)
        elif name == "cond":
            total += max(count_jaxpr_flops(branch.jaxpr) for branch in parameters["branches"])
        else:
            total += sum(map(count_jaxpr_flops, _inner_jaxprs(parameters)))
    return total


def _inner_jaxprs(parameters: dict[str, Any]) -> list[Any]:
    """Returns the jaxprs among the parameters of a primitive that runs each of them once."""
    items: list[Any] = []
    for name, value in parameters.items():
        if name in ("cond_jaxpr", "update_jaxpr"):  # of a loop or a scatter: elementwise
            continue
        items += value if isinstance(value, list | tuple) else [value]
    jaxprs = (item.jaxpr if isinstance(item, core.ClosedJaxpr) else item for item in items)
    return [item for item in jaxprs if isinstance(item, core.Jaxpr)]


def _count_product(equation: Any) -> float:
    (summed_axes, _), _ = equation.params["dimension_numbers"]
    summed = math.prod(equation.invars[0].aval.shape[axis] for axis in summed_axes)
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * summed


def _count_convolution(equation: Any) -> float:
    numbers = equation.params["dimension_numbers"].rhs_spec  # (out, in, spatial...)
    kernel = equation.invars[1].aval.shape
    taps = math.prod(kernel[axis] for axis in numbers[1:])
    # A gradient puts stride - 1 zeros between the elements of its input.
    zeros = math.prod(equation.params["lhs_dilation"])
    # The batch is summed as well in groups, each of which makes its own channels of the output.
    return 2.0 * math.prod(equation.outvars[0].aval.shape) * taps / zeros
