"""Reads the text of a compiled program: computations of one instruction per line.

The body of a loop is printed once, however often it runs, so that all costs are summed here along
the calls, times the number of runs.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache

# The name of a type ends with its bits; an element of fewer than 8 counts as a byte.
_BITS = re.compile(r"[a-z]+(\d+)")
# A computation opens with its name at the start of a line.
_HEADER = re.compile(r"(ENTRY )?%?([\w.-]+) (?:\([^\n]*\) -> |\{)")
_INSTRUCTION = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)")
_OPCODE = re.compile(r"([a-z][a-z0-9-]*)\(")
_BRACKETS = re.compile(r"[()]")
# A layout names the memory space: S(1) is the scratchpad of a TPU's core.
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?")
_CALLS = re.compile(
    r"\b(?:calls|to_apply|body|true_computation|false_computation)=%?([\w.-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_CONDITION = re.compile(r"\bcondition=%?([\w.-]+)")
_TRIP_COUNT = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclass(frozen=True)
class Instruction:
    """One line of a computation.

    Attributes:
      name: its name, unique within the computation.
      shape: what it returns, as XLA prints it.
      opcode: what it does, such as `fusion`.
      operands: names of its arguments; for a constant or a parameter, what stands in the brackets.
      attributes: the rest of the line.
      operand_shapes: shapes of its arguments.
      is_root: whether it is what the computation returns.
    """

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    attributes: str
    operand_shapes: tuple[str, ...] = ()
    is_root: bool = False


@dataclass(frozen=True)
class Module:
    """The computations of a program by name, and the name of the first one to run."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    def total(
        self,
        cost: Callable[[Instruction, tuple[Instruction, ...]], Mapping[str, int]],
        enter: Callable[[Instruction], bool] = lambda _: True,
    ) -> dict[str, int]:
        """Returns the sum of a cost over one execution of the program.

        Args:
          cost: costs by name of an instruction of a computation.
          enter: whether the computations that an instruction calls count too. An asynchronous call
            is printed three times, and counts once.

        Returns:
          name -> cost. The body of a loop counts as often as it runs, if the compiler knows the
          number or it stands in the loop's condition; once otherwise. All branches of a conditional
          count.
        """

        @cache
        def visit(name: str) -> dict[str, int]:
            totals: dict[str, int] = defaultdict(int)
            instructions = self.computations.get(name, ())
            for instruction in instructions:
                for key, value in cost(instruction, instructions).items():
                    totals[key] += value
                is_repeated = instruction.opcode in ("async-update", "async-done")
                if is_repeated or not enter(instruction):
                    continue
                times = self.trip_count(instruction)
                for called in called_names(instruction):
                    for key, value in visit(called).items():
                        totals[key] += times * value
            return totals

        return dict(visit(self.entry))

    def trip_count(self, instruction: Instruction) -> int:
        """Returns how often the body of a loop runs; 1 for what is not a loop."""
        if instruction.opcode != "while":
            return 1
        if count := _TRIP_COUNT.search(instruction.attributes):
            return int(count.group(1))
        # A scan of JAX counts from 0 in steps of 1 as long as `counter < constant`.
        condition = _CONDITION.search(instruction.attributes)
        instructions = self.computations.get(condition.group(1), ()) if condition else ()
        constants = {
            item.name: int(item.operands[0])
            for item in instructions
            if item.opcode == "constant" and item.operands and item.operands[0].isdecimal()
        }
        for item in instructions:
            if item.opcode == "compare" and "direction=LT" in item.attributes:
                for name in item.operands:
                    if name in constants:
                        return constants[name]
        return 1


def parse(text: str) -> Module:
    """Returns the module that `jax.stages.Compiled.as_text` prints."""
    computations: dict[str, list[Instruction]] = {}
    shapes: dict[str, str] = {}
    entry, current = "", ""
    for line in text.splitlines():
        if not line[:1].isspace():
            header = _HEADER.match(line)
            current = header.group(2) if header and line.endswith("{") else ""
            if current:
                computations[current], shapes = [], {}
                entry = current if line.startswith("ENTRY ") else entry
        elif current and (match := _INSTRUCTION.match(line)):
            instruction = _parse_instruction(match.group(2), match.group(3), shapes, bool(match[1]))
            shapes[instruction.name] = instruction.shape
            computations[current].append(instruction)
    return Module({name: tuple(lines) for name, lines in computations.items()}, entry)


def called_names(instruction: Instruction) -> list[str]:
    """Returns the names of the computations that an instruction calls."""
    names = []
    for name, branches in _CALLS.findall(instruction.attributes):
        names += [name] if name else re.findall(r"[\w.-]+", branches)
    return names


def shape_bytes(shape: str, space: str = "") -> int:
    """Returns the bytes of a shape as XLA prints it, such as `(f32[8,128]{1,0}, u32[])`.

    Args:
      shape: an array or a tuple of arrays.
      space: "main" counts only what is not in a memory space of its own, as `S(1)`.
    """
    total = 0
    for kind, sizes, layout in _SHAPE.findall(shape):
        if space and "S(" in layout:
            continue
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


def _parse_instruction(
    name: str, text: str, shapes: Mapping[str, str], is_root: bool
) -> Instruction:
    # A tuple of shapes is in brackets, and a layout such as {1,0:T(8,128)} contains some.
    end = _closing(text, 0) + 1 if text.startswith("(") else 0
    space = text.find(" ", end)
    opcode = _OPCODE.search(text, max(space, end))
    if not opcode:
        return Instruction(name, text, "", (), "")
    close = _closing(text, opcode.end() - 1)
    inside = re.sub(r"/\*.*?\*/", "", text[opcode.end() : close])
    operands = tuple(_split(inside))
    names = tuple(operand.rpartition(" ")[2].removeprefix("%") for operand in operands)
    # Some versions of XLA print the shape of an operand before its name.
    operand_shapes = tuple(
        operand.rpartition(" ")[0] or shapes.get(name, "")
        for operand, name in zip(operands, names, strict=True)
    )
    return Instruction(
        name=name,
        shape=text[: opcode.start()].rstrip(),
        opcode=opcode.group(1),
        operands=names,
        attributes=text[close + 1 :],
        operand_shapes=operand_shapes,
        is_root=is_root,
    )


def _split(text: str) -> list[str]:
    """Splits operands at the commas that are not inside of brackets."""
    parts, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        if letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
        elif letter == "," and not depth:
            parts.append(text[start:position].strip())
            start = position + 1
    last = text[start:].strip()
    return [*parts, last] if last else parts


def _closing(text: str, start: int) -> int:
    """Returns the position of the bracket that closes the one at `start`."""
    depth = 0
    for match in _BRACKETS.finditer(text, start):
        depth += 1 if match.group() == "(" else -1
        if not depth:
            return match.start()
    return len(text)
