"""Measure the towers against torch's: `tools/benchmark.py encoders`.

Forward and backward to all parameters of the sum of squares of what a tower gives, in float32, with
random weights: ResNet-50 against torchvision's (BatchNorm in training mode), ViT against timm's
(fused attention), BERT-base against transformers' (sdpa, texts of full length). Each tower has its
own random weights, of the same sizes; whether values agree is a matter for the tests.
"""

import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch

from plan_jax.encoders.dual_encoder import make_image_tower, make_text_tower

VOCAB = 30522
LENGTH = 112  # pieces of a text
HEAD = (
    "| case | batch | JAX ms | median | torch ms | median | ratio | median | compile s |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


@dataclass(frozen=True)
class Case:
    """A tower in both libraries: `jax` and `torch` run it once, forward and backward."""

    name: str
    batch: int
    jax: Callable[[], Any]
    torch: Callable[[], Any]
    compiling: float  # seconds


def compiled(loss: Callable, variables: Any, *inputs: Any) -> tuple[Callable[[], Any], float]:
    """Compile the gradient of a loss of parameters; return what runs it and the seconds it took.

    `variables` holds `params` and whatever else the tower keeps; `loss` takes both, then inputs.
    """
    params = variables["params"]
    kept = {name: value for name, value in variables.items() if name != "params"}
    lowered = jax.jit(jax.value_and_grad(loss)).lower(params, kept, *inputs)
    started = time.perf_counter()
    function = lowered.compile()
    seconds = time.perf_counter() - started
    return lambda: jax.block_until_ready(function(params, kept, *inputs)), seconds


def torch_runner(module: torch.nn.Module, loss: Callable, *inputs: Any) -> Callable[[], Any]:
    """Returns a function that runs a module forward and backward."""
    module.train()

    def run() -> torch.Tensor:
        module.zero_grad(set_to_none=True)
        value = loss(module, *inputs)
        value.backward()
        return value

    return run


def pixels(batch: int) -> np.ndarray:
    """Draw Float32[B 224 224 3]."""
    return np.random.default_rng(0).normal(size=(batch, 224, 224, 3)).astype(np.float32)


def squares(*arrays: Any) -> Any:
    """Sum the squares of all arrays or tensors."""
    return sum((x**2).sum() for x in arrays)


def load_torchvision() -> Any:
    """Import torchvision, also where it lacks its kernels; timm and transformers import it too.

    A wheel made for GPUs does not fit torch's wheel for CPUs: it finds none of its operators, which
    no model here needs, but wants two of them to exist.
    """
    try:
        import torchvision
    except RuntimeError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor a, Tensor b, float c) -> Tensor")
        import torchvision
    return torchvision


def jax_vision(name: str, batch: int) -> tuple[Callable[[], Any], float]:
    """Compile a tower of images in training mode."""
    last = {"local_stage": 3} if name.startswith("resnet") else {}  # what torch's side gives
    tower = make_image_tower(name, None, jnp.float32, **last)
    x = jnp.asarray(pixels(batch))
    variables = jax.jit(tower.init)(jax.random.key(0), x[:1])

    def loss(params: Any, kept: Any, x: Any) -> Any:
        seen, _ = tower.apply({"params": params, **kept}, x, train=True, mutable=["batch_stats"])
        return squares(seen.pooled, seen.local)

    return compiled(loss, variables, x)


def resnet_case(batch: int) -> Case:
    """ResNet-50: the last map and its mean."""
    module = load_torchvision().models.resnet50(weights=None)
    trunk = torch.nn.Sequential(*list(module.children())[:-2])  # neither pool nor classifier
    runs = []
    for layout in (torch.contiguous_format, torch.channels_last):
        x = torch.tensor(pixels(batch)).permute(0, 3, 1, 2).contiguous(memory_format=layout)
        runs.append((layout, x))

    def loss(module: torch.nn.Module, x: torch.Tensor) -> torch.Tensor:
        local = module(x)
        return squares(local.mean((2, 3)), local)

    run = faster([torch_runner(trunk_in(trunk, layout), loss, x) for layout, x in runs])
    return Case("ResNet-50", batch, *with_torch(jax_vision("resnet50", batch), run))


def trunk_in(trunk: torch.nn.Module, layout: torch.memory_format) -> torch.nn.Module:
    """Copy a module with its kernels in the given layout."""
    return copy.deepcopy(trunk).to(memory_format=layout)


def faster(runs: list[Callable[[], Any]]) -> Callable[[], Any]:
    """Choose the function that takes less time, after one turn to warm up."""
    times = []
    for run in runs:
        run()
        started = time.process_time()
        run()
        times.append(time.process_time() - started)
    return runs[times.index(min(times))]


def with_torch(made: tuple[Callable, float], run: Callable) -> tuple[Callable, Callable, float]:
    """Put the fields of a case into their order."""
    return made[0], run, made[1]


def vit_case(name: str, batch: int) -> Case:
    """ViT with patches of 16: the class token and all patches."""
    size = {"vit_s16": "small", "vit_b16": "base"}[name]
    load_torchvision()
    import timm

    module = timm.create_model(f"vit_{size}_patch16_224", pretrained=False, num_classes=0)
    x = torch.tensor(pixels(batch)).permute(0, 3, 1, 2).contiguous()
    run = torch_runner(module, lambda module, x: squares(module.forward_features(x)), x)
    label = f"ViT-{size[0].upper()}/16"
    return Case(label, batch, *with_torch(jax_vision(name, batch), run))


def bert_case(batch: int) -> Case:
    """BERT-base: the first piece and all others, each of them a word of its own."""
    load_torchvision()
    from transformers import BertConfig, BertModel

    tokens = np.random.default_rng(0).integers(5, VOCAB, (batch, LENGTH)).astype(np.int32)
    index = np.tile(np.arange(-1, LENGTH - 1, dtype=np.int32), (batch, 1))
    sentence = np.zeros((batch, LENGTH - 1), np.int32)
    tower = make_text_tower("bert_base", VOCAB, jnp.float32)
    inputs = tuple(map(jnp.asarray, (tokens, index, sentence)))
    variables = jax.jit(tower.init)(jax.random.key(0), *inputs)

    def loss(params: Any, kept: Any, *inputs: Any) -> Any:
        said = tower.apply({"params": params, **kept}, *inputs, train=True)
        return squares(said.pooled, said.words)

    settings = BertConfig(
        vocab_size=VOCAB,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        attn_implementation="sdpa",
    )
    module = BertModel(settings, add_pooling_layer=False)
    ids = torch.tensor(tokens, dtype=torch.long)

    def torch_loss(module: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
        hidden = module(ids, attention_mask=torch.ones_like(ids)).last_hidden_state
        return squares(hidden)

    run = torch_runner(module, torch_loss, ids)
    return Case("BERT-base", batch, *with_torch(compiled(loss, variables, *inputs), run))


CASES: dict[str, Callable[[int], Case]] = {
    "resnet50": resnet_case,
    "vit_s16": lambda batch: vit_case("vit_s16", batch),
    "vit_b16": lambda batch: vit_case("vit_b16", batch),
    "bert_base": bert_case,
}


def measure(case: Case, repeats: int, clock: Callable[[], float]) -> None:
    """Run both libraries in turns, after one to warm up, and print one row of the table."""
    times: tuple[list[float], list[float]] = [], []
    for turn in range(repeats + 1):
        for run, seconds in zip((case.jax, case.torch), times, strict=True):
            started = clock()
            run()
            if turn:
                seconds.append(1e3 * (clock() - started))
    (least, least_), (middle, middle_) = (
        [of(seconds) for seconds in times] for of in (min, statistics.median)
    )
    print(
        f"| {case.name} | {case.batch} | {least:.0f} | {middle:.0f} | {least_:.0f} | {middle_:.0f}"
        f" | {least / least_:.2f} | {middle / middle_:.2f} | {case.compiling:.0f} |",
        flush=True,
    )


def main(repeats: int, threads: int, cases: tuple[str, ...] = (), batch: int = 16) -> None:
    """Print the table for the named cases (all if none), at a batch of so many pairs.

    With one thread the clock is CPU time, which other work disturbs less.
    """
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    print(f"jax {jax.__version__}, torch {torch.__version__}, {threads} thread(s), {repeats} turns")
    print("forward and backward, least and median; ratio: JAX's time by torch's\n")
    print(HEAD)
    for name in cases or tuple(CASES):
        measure(CASES[name](batch), repeats, clock)
