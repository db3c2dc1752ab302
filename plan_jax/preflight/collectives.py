"""Collectives of a compiled program: how often the devices communicate, and how much.

XLA prints a program as computations of one instruction per line. A collective may be one
instruction (on a CPU), a pair of `-start` and `-done` (on a GPU), or a chain of fusions that all
repeat the instruction (on a TPU). The body of a loop is printed once, however often it runs.
"""

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "collective-permute", "all-to-all")
# The name of a type ends with its bits; an element of fewer than 8 counts as a byte.
_BITS = re.compile(r"[a-z]+(\d+)")
# A computation opens with its name at the start of a line.
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\([^\n]*\) -> |\{)")
_INSTRUCTION = re.compile(r"\s+(?:ROOT )?%?([\w.-]+) = (.*)")
_OPCODE = re.compile(r"([a-z][a-z0-9-]*)\(")
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\]")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# The first fusion of a chain on a TPU contains this call, and the others repeat the collective.
_CHAIN, _CHAIN_START = "chain_id=", '"AsyncCollectiveStart"'


@dataclass(frozen=True)
class Collective:
    """How often one device takes part in a kind of collective, and the bytes of its operands."""

    count: int
    bytes: int


@dataclass(frozen=True)
class _Instruction:
    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str


def list_collectives(hlo_text: str) -> dict[str, Collective]:
    """Returns the collectives of one execution of a compiled program, by kind.

    Args:
      hlo_text: what `jax.stages.Compiled.as_text` returns.

    Returns:
      kind -> how often it runs, and the bytes that one device gives to it, over all of its runs.
      Kinds that do not occur are left out. The body of a loop counts as often as it runs, if the
      number is known to the compiler or stands in the loop's condition; once otherwise. Of a
      conditional, all branches count.
    """
    computations, entry = _parse(hlo_text)

    @cache
    def count(name: str) -> Mapping[str, tuple[int, int]]:
        totals: dict[str, tuple[int, int]] = defaultdict(lambda: (0, 0))
        instructions = computations.get(name, ())
        shapes = {instruction.name: instruction.shape for instruction in instructions}
        is_repeated = not any(_CHAIN_START in item.attributes for item in instructions)
        for instruction in instructions:
            kind = instruction.opcode.removesuffix("-start")
            if kind in KINDS:
                if _CHAIN in instruction.attributes and is_repeated:
                    continue
                number, size = totals[kind]
                totals[kind] = number + 1, size + _operand_bytes(instruction, shapes)
            # An asynchronous call is printed three times.
            elif instruction.opcode not in ("async-update", "async-done"):
                times = _trip_count(instruction, computations)
                for called in _called(instruction):
                    for kind, (number, size) in count(called).items():
                        before = totals[kind]
                        totals[kind] = before[0] + times * number, before[1] + times * size
        return totals

    totals = count(entry)
    return {kind: Collective(*totals[kind]) for kind in KINDS if kind in totals}


def shape_bytes(shape: str) -> int:
    """Returns the bytes of a shape as XLA prints it, such as `(f32[8,128]{1,0}, u32[])`."""
    total = 0
    for kind, sizes in _SHAPE.findall(shape):
        bits = _BITS.fullmatch(kind)
        if kind == "pred" or kind.startswith("f8"):
            width = 8
        elif bits:
            width = max(int(bits.group(1)), 8)
        else:
            width = 0  # a token
        elements = 1
        for size in filter(None, sizes.split(",")):
            elements *= int(size.removeprefix("<="))
        total += elements * width // 8
    return total


def _parse(text: str) -> tuple[dict[str, list[_Instruction]], str]:
    """Returns the instructions of each computation, and the name of the first one to run."""
    computations: dict[str, list[_Instruction]] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if not line[:1].isspace():
            header = _HEADER.match(line)
            current = header.group(2) if header and line.endswith("{") else ""
            if current:
                computations[current] = []
                entry = current if line.startswith("ENTRY ") else entry
        elif current and (match := _INSTRUCTION.match(line)):
            computations[current].append(_parse_instruction(*match.groups()))
    return computations, entry


def _parse_instruction(name: str, text: str) -> _Instruction:
    # A tuple of shapes is in brackets, and a layout such as {1,0:T(8,128)} contains some.
    end = _closing(text, 0) + 1 if text.startswith("(") else 0
    opcode = _OPCODE.search(text, _end_of_layout(text, end))
    if not opcode:
        return _Instruction(name, text, "", "", "")
    close = _closing(text, opcode.end() - 1)
    operands, attributes = text[opcode.end() : close], text[close + 1 :]
    return _Instruction(name, text[: opcode.start()], opcode.group(1), operands, attributes)


def _end_of_layout(text: str, start: int) -> int:
    """Returns where a shape without brackets ends: at the first space."""
    end = text.find(" ", start)
    return end if end >= 0 else start


def _closing(text: str, start: int) -> int:
    """Returns the position of the bracket that closes the one at `start`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.start()
    return len(text)


def _operand_bytes(instruction: _Instruction, shapes: Mapping[str, str]) -> int:
    # Some versions of XLA print the shape of an operand before its name.
    if inline := shape_bytes(instruction.operands):
        return inline
    names = re.findall(r"%?([\w.-]+)", re.sub(r"/\*.*?\*/", "", instruction.operands))
    return sum(shape_bytes(shapes.get(name, "")) for name in names)


def _called(instruction: _Instruction) -> list[str]:
    names = []
    for name, branches in _CALLS.findall(instruction.attributes):
        names += [name] if name else re.findall(r"[\w.-]+", branches)
    return names


def _trip_count(
    instruction: _Instruction, computations: Mapping[str, Sequence[_Instruction]]
) -> int:
    """Returns how often the body of a loop runs; 1 for what is not a loop."""
    if instruction.opcode != "while":
        return 1
    if known := _TRIP_COUNT.search(instruction.attributes):
        return int(known.group(1))
    # A scan of JAX counts from 0 in steps of 1 as long as `counter < constant`.
    condition = _CONDITION.search(instruction.attributes)
    instructions = computations.get(condition.group(1), ()) if condition else ()
    constants = {
        item.name: int(item.operands)
        for item in instructions
        if item.opcode == "constant" and item.operands.isdecimal()
    }
    for item in instructions:
        if item.opcode == "compare" and "direction=LT" in item.attributes:
            for name in re.findall(r"[\w.-]+", item.operands):
                if name in constants:
                    return constants[name]
    return 1
