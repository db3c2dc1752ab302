"""Measures the CPU kernels in whole towers: `tools/benchmark.py kernels`.

Forward and backward to all parameters, float32, random weights: with all kernels, with one of them
replaced by XLA's own operation, and with none, in turns.
"""

import statistics
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from plan_jax.encoders.dual_encoder import make_image_tower, make_text_tower
from plan_jax.layers.cpu import attention, convolution, layer_norm, product

# Kernel -> the module, the name of its switch, and the value that switches the kernel off.
SWITCHES: dict[str, tuple[Any, str, Any]] = {
    "attention": (attention, "is_enabled", lambda: False),
    "convolution": (convolution, "is_enabled", lambda: False),
    "layer_norm": (layer_norm, "is_enabled", lambda: False),
    "product": (product, "is_enabled", lambda: False),
    "winograd": (convolution, "MIN_WINOGRAD_CHANNELS", float("inf")),
}
TRANSFORMER = ("layer_norm", "product")
# Tower -> batch, pixels of an image's side or pieces of a text, the kernels that the tower uses.
TOWERS: dict[str, tuple[int, int, tuple[str, ...]]] = {
    "resnet50": (8, 224, ("convolution", "winograd")),
    "vit_s16": (8, 224, ("attention", "convolution", *TRANSFORMER)),
    "bert_base_6": (8, 112, ("attention", *TRANSFORMER)),
    "resnet_small": (32, 96, ("convolution", "winograd")),
    "vit_small": (32, 96, ("attention", "convolution", *TRANSFORMER)),
    "bert_small": (32, 64, TRANSFORMER),
}
HEADER = (
    "| tower | kernels | min ms | median ms | min ratio | median ratio |\n|---|---|---|---|---|---|"
)


def draw_inputs(name: str, batch: int, size: int) -> tuple[Any, tuple[jax.Array, ...]]:
    """Returns a tower and random inputs for it."""
    rng = np.random.default_rng(0)
    if name.startswith("bert"):
        # Each piece but the first is a word of its own.
        index = np.tile(np.arange(-1, size - 1, dtype=np.int32), (batch, 1))
        tokens = rng.integers(5, 30522, (batch, size)).astype(np.int32)
        arrays = tokens, index, np.zeros((batch, size - 1), np.int32)
        return make_text_tower(name, 30522, jnp.float32), tuple(map(jnp.asarray, arrays))
    images = rng.normal(size=(batch, size, size, 3)).astype(np.float32)
    return make_image_tower(name, None, jnp.float32), (jnp.asarray(images),)


def compile_without(names: Sequence[str], tower: Any, inputs: Any) -> Callable[[], Any]:
    """Returns a function that computes a tower's gradient with the named kernels switched off."""
    variables = jax.jit(tower.init)(jax.random.key(0), *inputs)
    stats = {"batch_stats": variables.get("batch_stats", {})}

    def loss(params: Any, *inputs: Any) -> Any:
        variables = {"params": params, **stats}
        output, _ = tower.apply(variables, *inputs, train=True, mutable=["batch_stats"])
        return sum((x**2).sum() for x in output[:2])

    with ExitStack() as stack:
        for name in names:
            stack.enter_context(mock.patch.object(*SWITCHES[name]))
        # Lowered in this context, because the switches are read while the program is traced.
        function = jax.jit(jax.grad(loss)).lower(variables["params"], *inputs).compile()
    return lambda: jax.block_until_ready(function(variables["params"], *inputs))


def main(repeats: int, clock: Callable[[], float], towers: Sequence[str] = ()) -> None:
    """Prints the table for the named towers (all if none)."""
    print(HEADER)
    for name in towers or tuple(TOWERS):
        batch, size, kernels = TOWERS[name]
        tower, inputs = draw_inputs(name, batch, size)
        variants = {"all": ()} | {f"no {kernel}": (kernel,) for kernel in kernels}
        variants["none"] = kernels
        runs = {label: compile_without(names, tower, inputs) for label, names in variants.items()}
        times: dict[str, list[float]] = {label: [] for label in runs}
        for turn in range(repeats + 1):
            for label, run in runs.items():
                start = clock()
                run()
                if turn:  # the first turn warms up
                    times[label].append(1e3 * (clock() - start))
        min_with_all, median_with_all = min(times["all"]), statistics.median(times["all"])
        for label, values in times.items():
            min_ms, median_ms = min(values), statistics.median(values)
            ratios = f"{min_ms / min_with_all:.2f} | {median_ms / median_with_all:.2f}"
            print(f"| {name} | {label} | {min_ms:.0f} | {median_ms:.0f} | {ratios} |", flush=True)
