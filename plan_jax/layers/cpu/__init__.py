"""Faster implementations for a CPU; `docs/cpu_kernels.md` has what they gain and how to switch.

This module alone decides whether a kernel or XLA's own operation runs: `is_enabled` is the switch,
and `dispatch` chooses by platform.
"""

import contextlib
import os
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from typing import Any

from jax import lax

# PLAN_JAX_CPU_KERNELS=0 switches all kernels off. Read once, because programs that are compiled
# already would not follow a later change.
_enabled = ContextVar("enabled", default=os.environ.get("PLAN_JAX_CPU_KERNELS", "1") != "0")


def is_enabled() -> bool:
    """Returns whether programs that are traced now may use the kernels."""
    return _enabled.get()


@contextlib.contextmanager
def use_xla_only() -> Iterator[None]:
    """Switches the kernels off for functions that are traced for the first time inside.

    A program for several platforms would hold both implementations and a branch, and the kernels
    need to know the batch.
    """
    token = _enabled.set(False)
    try:
        yield
    finally:
        _enabled.reset(token)


def dispatch(cpu_kernel: Callable[..., Any], plain: Callable[..., Any], *arrays: Any) -> Any:
    """Calls `cpu_kernel` where a program is lowered for a CPU, `plain` on all other platforms.

    `lax.platform_dependent` decides when the program is lowered. Unlike `jax.default_backend()` it
    is right for a CPU next to an accelerator too, and with a single platform it leaves no branch in
    the program.
    """
    if not is_enabled():
        return plain(*arrays)
    return lax.platform_dependent(*arrays, cpu=cpu_kernel, default=plain)
