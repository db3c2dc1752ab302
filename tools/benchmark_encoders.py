"""Compares the speed of the towers with torch's: `tools/benchmark.py encoders`.

The forward and backward pass of the sum of squares of a tower's outputs, to all parameters, in
float32 with random weights: ResNet-50 against torchvision's (BatchNorm in training mode), ViT
against timm's (fused attention), BERT-base against transformers' (sdpa, texts without padding). The
towers of both libraries have the same sizes but not the same weights: tests compare their values.
"""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch

from plan_jax.encoders.dual_encoder import make_image_tower, make_text_tower

VOCAB_SIZE = 30522
NUM_PIECES = 112  # of each text
HEADER = (
    "| case | batch | JAX ms | median | torch ms | median | ratio | median | compile s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


class CompiledGradient(NamedTuple):
    """A function that runs a tower forward and backward, and the seconds of its compilation."""

    run: Callable[[], Any]
    compile_seconds: float


class Case(NamedTuple):
    """A tower in both libraries, each run forward and backward."""

    name: str
    batch: int
    jax: CompiledGradient
    run_torch: Callable[[], Any]


def compile_gradient(loss: Callable, variables: Any, *inputs: Any) -> CompiledGradient:
    """Compiles the value and gradient of `loss(params, collections, *inputs)`.

    Args:
      loss: a function of the parameters, the other collections of variables, and the inputs.
      variables: `params` and the other collections, such as `batch_stats`.
      *inputs: arrays.
    """
    collections = dict(variables)
    params = collections.pop("params")
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, collections, *inputs)
    start = time.perf_counter()
    gradient = lowered.compile()
    seconds = time.perf_counter() - start
    return CompiledGradient(
        lambda: jax.block_until_ready(gradient(params, collections, *inputs)), seconds
    )


def make_torch_runner(module: torch.nn.Module, loss: Callable, *inputs: Any) -> Callable[[], Any]:
    """Returns a function that runs a module forward and backward."""
    module.train()

    def run() -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        value = loss(module, *inputs)
        value.backward()
        return value

    return run


def draw_images(batch: int) -> np.ndarray:
    """Returns random images as Float32[B 224 224 3]."""
    return np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype(np.float32)


def to_torch(images: np.ndarray, layout: torch.memory_format) -> torch.Tensor:
    """Returns images as a tensor [B 3 Y X] with the given memory layout."""
    return torch.tensor(images).permute(0, 3, 1, 2).contiguous(memory_format=layout)


def sum_of_squares(*arrays: Any) -> Any:
    """Returns the sum of squares of all entries of arrays or tensors."""
    return sum((array**2).sum() for array in arrays)


def load_torchvision() -> Any:
    """Imports torchvision, which timm and transformers import too, even without its binary.

    The binary of torchvision for GPUs does not load with torch for CPUs, and then importing
    torchvision fails, because two operators are missing. No model here uses them, so they are
    declared without an implementation.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
        import torchvision
    return torchvision


def compile_image_tower(name: str, batch: int) -> CompiledGradient:
    """Compiles an image tower in training mode."""
    # The last map, as torch's models return it.
    options = {"local_stage": 3} if name.startswith("resnet") else {}
    tower = make_image_tower(name, None, jnp.float32, **options)
    images = jnp.asarray(draw_images(batch))
    variables = jax.jit(tower.init)(jax.random.key(0), images[:1])

    def loss(params: Any, collections: Any, images: Any) -> Any:
        variables = {"params": params, **collections}
        output, _ = tower.apply(variables, images, train=True, mutable=["batch_stats"])
        return sum_of_squares(output.pooled, output.local)

    return compile_gradient(loss, variables, images)


def select_fastest(runs: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Returns the function with the least CPU time, after a first call of each to warm up."""
    seconds = []
    for run in runs:
        run()
        start = time.process_time()
        run()
        seconds.append(time.process_time() - start)
    return runs[seconds.index(min(seconds))]


def make_resnet_case(batch: int) -> Case:
    """Returns ResNet-50 with its last map and the mean of that, in torch's faster layout."""
    resnet = load_torchvision().models.resnet50(weights=None)
    trunk = torch.nn.Sequential(*list(resnet.children())[:-2])  # without pooling and classifier

    def loss(module: torch.nn.Module, images: torch.Tensor) -> torch.Tensor:
        local = module(images)
        return sum_of_squares(local.mean((2, 3)), local)

    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        module = copy.deepcopy(trunk).to(memory_format=layout)
        runs.append(make_torch_runner(module, loss, to_torch(draw_images(batch), layout)))
    return Case("ResNet-50", batch, compile_image_tower("resnet50", batch), select_fastest(runs))


def make_vit_case(name: str, batch: int) -> Case:
    """Returns a ViT with patches of 16 pixels, with its class token and all patches."""
    size = {"vit_s16": "small", "vit_b16": "base"}[name]
    load_torchvision()
    import timm

    module = timm.create_model(f"vit_{size}_patch16_224", pretrained=False, num_classes=0)
    images = to_torch(draw_images(batch), torch.contiguous_format)
    run = make_torch_runner(
        module, lambda module, images: sum_of_squares(module.forward_features(images)), images
    )
    return Case(f"ViT-{size[0].upper()}/16", batch, compile_image_tower(name, batch), run)


def make_bert_case(batch: int) -> Case:
    """Returns BERT-base with its first piece and all others, each of them a word of its own."""
    load_torchvision()
    from transformers import BertConfig, BertModel

    tokens = np.random.default_rng(0).integers(5, VOCAB_SIZE, (batch, NUM_PIECES))
    word_index = np.tile(np.arange(-1, NUM_PIECES - 1), (batch, 1))
    sentence = np.zeros((batch, NUM_PIECES - 1))
    inputs = [jnp.asarray(array, jnp.int32) for array in (tokens, word_index, sentence)]
    tower = make_text_tower("bert_base", VOCAB_SIZE, jnp.float32)
    variables = jax.jit(tower.init)(jax.random.key(0), *inputs)

    def loss(params: Any, collections: Any, *inputs: Any) -> Any:
        output = tower.apply({"params": params, **collections}, *inputs, train=True)
        return sum_of_squares(output.pooled, output.words)

    config = BertConfig(
        vocab_size=VOCAB_SIZE,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    module = BertModel(config, add_pooling_layer=False)
    ids = torch.tensor(tokens, dtype=torch.long)

    def torch_loss(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        hidden = module(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return sum_of_squares(hidden)

    run = make_torch_runner(module, torch_loss, ids)
    return Case("BERT-base", batch, compile_gradient(loss, variables, *inputs), run)


CASES: dict[str, Callable[[int], Case]] = {
    "resnet50": make_resnet_case,
    "vit_s16": lambda batch: make_vit_case("vit_s16", batch),
    "vit_b16": lambda batch: make_vit_case("vit_b16", batch),
    "bert_base": make_bert_case,
}


def measure(case: Case, repeats: int, clock: Callable[[], float]) -> None:
    """Runs both libraries in turns and prints one row of the table."""
    jax_ms: list[float] = []
    torch_ms: list[float] = []
    for turn in range(repeats + 1):
        for run, readings in ((case.jax.run, jax_ms), (case.run_torch, torch_ms)):
            start = clock()
            run()
            if turn:  # the first turn warms up
                readings.append(1e3 * (clock() - start))
    jax_min, torch_min = min(jax_ms), min(torch_ms)
    jax_median, torch_median = statistics.median(jax_ms), statistics.median(torch_ms)
    cells = [
        case.name,
        str(case.batch),
        *(f"{ms:.0f}" for ms in (jax_min, jax_median, torch_min, torch_median)),
        *(f"{ratio:.2f}" for ratio in (jax_min / torch_min, jax_median / torch_median)),
        f"{case.jax.compile_seconds:.0f}",
    ]
    print(f"| {' | '.join(cells)} |", flush=True)


def main(repeats: int, threads: int, cases: tuple[str, ...] = (), batch: int = 16) -> None:
    """Prints the table for the named cases (all if none) with `batch` images or texts.

    With one thread the clock is CPU time, which other processes disturb less.
    """
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    print(f"jax {jax.__version__}, torch {torch.__version__}, {threads} thread(s), {repeats} turns")
    print("forward and backward, least and median; ratio: JAX's time by torch's\n")
    print(HEADER)
    for name in cases or tuple(CASES):
        measure(CASES[name](batch), repeats, clock)
