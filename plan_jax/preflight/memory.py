"""Memory of one device by kind, whether it fits, and what would make it fit."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
from jaxtyping import PyTree

from plan_jax.config import Config

# Shares of the temporaries that remain with each remedy: assumptions, not measured. A bfloat16 has
# half of the bytes, and losses, norms and softmax stay in float32. With `remat` the inputs of the
# layers remain instead of all that is inside of them.
BFLOAT16_SHARE = 0.6
REMAT_SHARE = 0.4


@dataclass(frozen=True)
class Memory:
    """Bytes of one device.

    Attributes:
      kinds: what a training step has in memory at its peak, by kind: `parameters`, `optimiser
        state`, `moving average`, `other state`, `batch`, `padding`, `temporaries`, `outputs` and
        `program`. Padding is what the layout of arrays adds to their bytes. Temporaries are
        activations, gradients and scratch.
      limit: what a program may use; 0 if not known.
    """

    kinds: Mapping[str, int]
    limit: float

    @property
    def total(self) -> int:
        """Bytes of all kinds."""
        return sum(self.kinds.values())

    @property
    def temporaries(self) -> int:
        """Bytes of activations, gradients and scratch."""
        return self.kinds["temporaries"]

    @property
    def fits(self) -> bool | None:
        """True if the program fits; None if the limit is not known."""
        return self.total <= self.limit if self.limit else None


def measure_memory(statistics: Any, state: PyTree, batch: PyTree, limit: float) -> Memory:
    """Returns the memory of a compiled step.

    Args:
      statistics: what `jax.stages.Compiled.memory_analysis` returns.
      state: the shapes of the `State`, which is on each device.
      batch: the shapes of the batch of one device.
      limit: bytes that a program may use; 0 if not known.
    """
    sizes = state_bytes(state, batch)
    arguments = int(statistics.argument_size_in_bytes)
    # The step writes its new state over the old one, so the outputs in common count once.
    outputs = int(statistics.output_size_in_bytes) - int(statistics.alias_size_in_bytes)
    kinds = {
        **sizes,
        "padding": max(arguments - sum(sizes.values()), 0),
        "temporaries": int(statistics.temp_size_in_bytes),
        "outputs": max(outputs, 0),
        "program": int(statistics.generated_code_size_in_bytes),
    }
    return Memory(kinds, limit)


def overflow_memory(temporaries: int, state: PyTree, batch: PyTree, limit: float) -> Memory:
    """Returns the memory of a step that the compiler refused, by what it says of temporaries."""
    sizes = state_bytes(state, batch)
    rest = {"padding": 0, "temporaries": temporaries, "outputs": 0, "program": 0}
    return Memory({**sizes, **rest}, limit)


def state_bytes(state: PyTree, batch: PyTree) -> dict[str, int]:
    """Returns the bytes of a `State` and a batch by kind, without the padding of layouts."""
    other = (state.step, state.key, state.batch_stats, state.memory)
    return {
        "parameters": tree_bytes(state.params),
        "optimiser state": tree_bytes(state.opt_state),
        "moving average": tree_bytes(state.ema_params),
        "other state": tree_bytes(other),
        "batch": tree_bytes(batch),
    }


def tree_bytes(tree: PyTree) -> int:
    """Returns the bytes of all arrays of a tree."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


def suggest_remedies(memory: Memory, config: Config, pairs: int) -> list[str]:
    """Returns what would make a step fit, in the order in which to try it, in sentences.

    The estimates assume that the temporaries grow with the pairs that a device encodes at a time.

    Args:
      memory: the memory of the step, which does not fit.
      config: the config of the step.
      pairs: pairs of one device.
    """
    fixed = memory.total - memory.temporaries
    room = memory.limit - fixed
    if room <= 0:
        return [
            f"state, batch and program alone need {format_bytes(fixed)}: use smaller encoders,"
            " config.optim.freeze, or a chip with more memory"
        ]
    remedies = []
    microbatch = config.microbatch or pairs
    per_pair = memory.temporaries / microbatch
    fitting = [m for m in divisors(pairs) if m < microbatch and m * per_pair <= room]
    if fitting:
        remedies.append(
            f"config.microbatch={fitting[-1]}: about"
            f" {format_bytes(fixed + fitting[-1] * per_pair)}, with the same loss and gradients"
        )
    elif microbatch > 1:
        remedies.append(
            f"config.microbatch=1 alone is not enough: about {format_bytes(fixed + per_pair)}"
        )
    sides = [side for side in ("vision", "text") if not getattr(config, side).get("remat", False)]
    if sides:
        flags = " and ".join(f"config.{side}.remat=True" for side in sides)
        total = fixed + REMAT_SHARE * memory.temporaries
        remedies.append(
            f"{flags}: about {format_bytes(total)} if {REMAT_SHARE:.0%} of the temporaries remain,"
            " for a third more computation"
        )
    if config.dtype == "float32":
        total = fixed + BFLOAT16_SHARE * memory.temporaries
        remedies.append(
            f"config.dtype=bfloat16: about {format_bytes(total)} if {BFLOAT16_SHARE:.0%} of the"
            " temporaries remain"
        )
    smaller = int(room / (memory.temporaries / pairs))
    if smaller >= 1 and microbatch == pairs:  # otherwise the microbatch decides
        remedies.append(f"a batch of at most {smaller} pairs on each device, with fewer negatives")
    return remedies


def divisors(number: int) -> list[int]:
    """Returns the divisors of a number, smallest first.

    >>> divisors(12)
    [1, 2, 3, 4, 6, 12]
    """
    return [n for n in range(1, number + 1) if number % n == 0]


def format_bytes(size: float | int) -> str:
    """Returns a number of bytes with its unit.

    >>> format_bytes(512), format_bytes(3.2e6), format_bytes(17 * 2**30)
    ('512 B', '3.05 MiB', '17 GiB')
    """
    for unit, scale in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if size >= scale:
            return f"{size / scale:.3g} {unit}"
    return f"{size:.0f} B"
