"""Counts the bytes that the methods' losses exchange: `tools/benchmark.py traffic`.

Each method's loss and gradient is compiled at the paper's shapes, from the encoders' outputs on,
for 8 devices. It is not run. The bytes are those that one device gives to all collectives of a kind
in one step, in KiB; `needed` is `plan_jax/preflight/minimum.py`. The last column is the whole step
of the same config at its minimum, in MiB: with the gradients' mean and BatchNorm.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from plan_jax import main as plan_jax_main
from plan_jax import parallel
from plan_jax.config import Config
from plan_jax.methods import METHODS
from plan_jax.preflight import minimum
from plan_jax.preflight.collectives import KINDS, list_collectives
from plan_jax.preflight.shapes import Shapes, make_shapes

DEVICES = 8


def compile_loss(shapes: Shapes) -> str:
    """Returns the text of the compiled loss and gradient of a config."""
    state, batch = shapes.state, shapes.batch
    encoder, method, hyper, _ = shapes.components
    variables = {"params": state.params["encoders"], "batch_stats": state.batch_stats}
    images, texts = jax.eval_shape(encoder.apply, variables, batch)
    sides = images.select(method.IMAGE_FEATURES), texts.select(method.TEXT_FEATURES)

    def compute(params: Any, sides: Any, extra: Any, memory: Any, step: Any) -> Any:
        def loss(params: Any, sides: Any) -> Any:
            options = {"key": jax.random.key(0), "step": step, "hyper": hyper}
            return method.loss(params, memory, *sides, extra, **options, axis=parallel.AXIS)

        function = jax.value_and_grad(loss, (0, 1), has_aux=True, allow_int=True)
        (value, (_, memory)), (_, gradients) = function(params, sides)
        # The gradients of the method's parameters are averaged in the step, with all others.
        leaves = [leaf for leaf in jax.tree.leaves(gradients) if leaf.dtype != jax.dtypes.float0]
        return (value, memory), leaves

    sharded, replicated = PartitionSpec(parallel.AXIS), PartitionSpec()
    mapped = jax.shard_map(
        compute,
        mesh=parallel.make_mesh(DEVICES),
        in_specs=(replicated, sharded, sharded, replicated, replicated),
        out_specs=(replicated, sharded),
        check_vma=False,
    )
    step = jax.ShapeDtypeStruct((), jnp.int32)
    arguments = state.params["method"], sides, batch.extra, state.memory, step
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def main(overrides: dict[str, str]) -> None:
    """Prints a table in Markdown: KiB of each kind, of all and the least; MiB of a whole step."""
    kinds = [kind for kind in KINDS if kind != "all-to-all"]
    print(f"| method | {' | '.join(kinds)} | all | needed | whole step, MiB |")
    print("|---|" + "---|" * (len(kinds) + 3))
    for name in sorted(METHODS):
        content = plan_jax_main.load_config_file(name)
        config = Config.from_dict(plan_jax_main.apply_overrides(content, overrides))
        shapes = make_shapes(config)
        collectives = list_collectives(compile_loss(shapes))
        sizes = minimum.read_sizes(config, shapes.components, shapes.state, DEVICES)
        needed = sum(minimum.loss_bytes(config.method, config.hyper, sizes).values())
        step = sum(minimum.minimum_bytes(config.method, config.hyper, sizes).values())
        counts = [collectives[kind].bytes if kind in collectives else 0 for kind in kinds]
        cells = [f"{count / 2**10:,.1f}" for count in (*counts, sum(counts), needed)]
        cells.append(f"{step / 2**20:,.1f}")
        print(f"| {name} | {' | '.join(cells)} |", flush=True)
