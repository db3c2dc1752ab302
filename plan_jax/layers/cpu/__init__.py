"""Faster implementations for a CPU; `docs/cpu_kernels.md` has what they gain and how to switch.

This module alone decides whether a kernel or XLA's own operation runs: `ENABLED` is the switch, and
`dispatch` chooses by platform.
"""

import os
from collections.abc import Callable
from typing import Any

from jax import lax

# PLAN_JAX_CPU_KERNELS=0 switches all kernels off. Read once, because programs that are compiled
# already would not follow a later change.
ENABLED = os.environ.get("PLAN_JAX_CPU_KERNELS", "1") != "0"


def dispatch(cpu_kernel: Callable[..., Any], plain: Callable[..., Any], *arrays: Any) -> Any:
    """Calls `cpu_kernel` where a program is lowered for a CPU, `plain` on all other platforms.

    `lax.platform_dependent` decides when the program is lowered. Unlike `jax.default_backend()` it
    is right for a CPU next to an accelerator too, and with a single platform it leaves no branch in
    the program.
    """
    if not ENABLED:
        return plain(*arrays)
    return lax.platform_dependent(*arrays, cpu=cpu_kernel, default=plain)
