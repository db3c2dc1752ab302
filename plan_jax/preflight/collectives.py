"""Collectives of a compiled program: how often the devices communicate, and how much.

A collective may be one instruction (on a CPU), a pair of `-start` and `-done` (on a GPU), or a
chain of fusions that all repeat the instruction (on a TPU).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from plan_jax.preflight.hlo import Instruction, Module, parse, shape_bytes

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
# The first fusion of a chain on a TPU contains this call, and the others repeat the collective.
_CHAIN, _CHAIN_START = "chain_id=", '"AsyncCollectiveStart"'


@dataclass(frozen=True)
class Collective:
    """How often one device takes part in a kind of collective, and the bytes of its operands."""

    count: int
    bytes: int


def list_collectives(hlo_text: str) -> dict[str, Collective]:
    """Returns the collectives of one execution of a compiled program, by kind.

    Args:
      hlo_text: what `jax.stages.Compiled.as_text` returns.

    Returns:
      kind -> how often it runs, and the bytes that one device gives to it, over all of its runs.
      Kinds that do not occur are left out. Loops and branches count as in `hlo.Module.total`.
    """
    return count_collectives(parse(hlo_text))


def count_collectives(module: Module) -> dict[str, Collective]:
    """Returns the collectives of one execution of a module, as `list_collectives`."""
    totals = module.total(_cost)
    return {
        kind: Collective(totals[f"{kind} count"], totals[f"{kind} bytes"])
        for kind in KINDS
        if f"{kind} count" in totals
    }


def _cost(instruction: Instruction, computation: tuple[Instruction, ...]) -> Mapping[str, int]:
    kind = instruction.opcode.removesuffix("-start")
    if kind not in KINDS:
        return {}
    if _CHAIN in instruction.attributes and not any(
        _CHAIN_START in item.attributes for item in computation
    ):
        return {}
    size = sum(map(shape_bytes, instruction.operand_shapes))
    return {f"{kind} count": 1, f"{kind} bytes": size}
