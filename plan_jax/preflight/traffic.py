"""Bytes between the memory of a chip and its cores in one execution of a compiled program.

XLA's own count takes the body of a loop once. Here it counts as often as it runs, and what stays in
the scratchpad of a TPU's core counts as nothing.
"""

from collections.abc import Mapping

from plan_jax.preflight.hlo import Instruction, Module, called_names, shape_bytes

# They move nothing: names, views, and calls whose computations count by themselves.
_FREE = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "while"),
    *("conditional", "call", "partition-id", "replica-id", "opt-barrier"),
}
# Calls of a TPU's compiler that stand for a view or a buffer.
_FREE_CALLS = ("ConcatBitcast", "AllocateBuffer", "AssumeGatherIndicesInBound")
_SLICES = ("dynamic-slice", "gather", "slice")
# Their computations are run one by one; that of a fusion, a reduction or a sort moves nothing.
_RUN = ("while", "conditional", "call")


def count_traffic(module: Module) -> int:
    """Returns the bytes that the instructions of a program read and write.

    A fusion reads its operands and writes its result, and what is between stays in registers. Of an
    operand that it only slices, the slices count, and of a result that it updates in place, the
    update. Loops and branches count as in `hlo.Module.total`.
    """

    def cost(instruction: Instruction, _: tuple[Instruction, ...]) -> Mapping[str, int]:
        return {"bytes": _bytes(instruction, module)}

    return module.total(cost, enter=lambda item: item.opcode in _RUN).get("bytes", 0)


def _bytes(instruction: Instruction, module: Module) -> int:
    opcode = instruction.opcode
    if opcode in _FREE or opcode.endswith(("-done", "-update")):
        return 0
    if opcode == "custom-call" and any(f'"{x}"' in instruction.attributes for x in _FREE_CALLS):
        return 0
    if opcode == "fusion":
        return _fusion_bytes(instruction, module)
    if opcode in _SLICES:
        return 2 * _main(instruction.shape)
    if opcode == "dynamic-update-slice":
        return 2 * _main(instruction.operand_shapes[1])
    if opcode == "scatter":
        return 3 * _main(instruction.operand_shapes[-1])
    written = instruction.shape
    if opcode == "slice-start":  # of a TPU, into its scratchpad
        taken = shape_bytes(written) - sum(map(shape_bytes, instruction.operand_shapes))
        return max(taken, 0)
    if opcode.endswith("-start") and opcode != "all-reduce-start":
        return _main(written)  # which names the operands beside the result
    return _main(written) + sum(map(_main, instruction.operand_shapes))


def _fusion_bytes(instruction: Instruction, module: Module) -> int:
    called = called_names(instruction)
    body = module.computations.get(called[0], ()) if called else ()
    parameters = {
        int(item.operands[0]): item
        for item in body
        if item.opcode == "parameter" and item.operands and item.operands[0].isdecimal()
    }
    root = next((item for item in body if item.is_root), None)
    total, updated = 0, 0
    for index, shape in enumerate(instruction.operand_shapes):
        parameter = parameters.get(index)
        size = _main(shape)
        if parameter is not None and size:
            users = [item for item in body if parameter.name in item.operands]
            if users and all(
                item.opcode in _SLICES and item.operands[0] == parameter.name for item in users
            ):
                size = min(size, sum(shape_bytes(item.shape) for item in users))
            elif users and all(
                item.opcode == "dynamic-update-slice" and item.operands[0] == parameter.name
                for item in users
            ):
                # In place: the rest of the array is neither read nor written.
                size = 0
                updated += sum(shape_bytes(item.operand_shapes[1]) for item in users)
        total += size
    if updated and root is not None:
        return total + updated
    return total + _main(instruction.shape)


def _main(shape: str) -> int:
    return shape_bytes(shape, space="main")
