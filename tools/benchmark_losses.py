"""Compares the losses with the originals' way of computing them: `tools/benchmark.py losses`.

GLoRIA's and MGCA's losses are written here once more in torch, after the steps of their published
code. GLoRIA's is a loop over captions at their true lengths, with each caption's words repeated for
every image; MGCA's computes all pairs of the batch at once. Both sides get the same inputs and must
agree in value and gradients before their times are measured. Torch is given MGCA's word weights, so
their computation is measured in JAX only.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from plan_jax.methods import contrastive, gloria, mgca
from plan_jax.types import Features

NUM_PIXELS = 361  # 19 x 19, the map of a ResNet-50 at 299 pixels
HEADER = (
    f"{'loss':<8}{'B':>4}{'JAX ms':>9}{'median':>8}{'torch ms':>10}{'median':>8}"
    f"{'ratio':>8}{'median':>8}{'compile s':>11}{'temp MB':>9}{'dense MB':>10}{'factor':>8}"
)


class CompiledLoss(NamedTuple):
    """A compiled loss with gradients, and the seconds of its compilation."""

    function: Any
    compile_seconds: float

    @property
    def temp_bytes(self) -> int:
        """Returns the memory between the features and the gradients."""
        return self.function.memory_analysis().temp_size_in_bytes


class Case(NamedTuple):
    """A loss in both libraries, each run forward and backward.

    `dense_bytes` is the memory of the loss in JAX with all tables of the batch computed at once.
    """

    name: str
    num_pairs: int
    run_jax: Callable[[], Any]
    run_torch: Callable[[], Any]
    compile_seconds: float
    temp_bytes: int
    dense_bytes: int


def draw_features(
    num_pairs: int, dim: int, num_slots: int, max_words: int
) -> tuple[Features, Features]:
    """Returns random images of 361 pixels, and texts of 8 to `max_words` words in `num_slots`."""
    rng = np.random.default_rng(0)

    def draw_normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    mask = np.arange(num_slots) < rng.integers(8, max_words + 1, num_pairs)[:, None]
    images = Features(
        draw_normal(num_pairs, dim),
        0.05 * draw_normal(num_pairs, NUM_PIXELS, dim),
        np.ones((num_pairs, NUM_PIXELS), bool),
    )
    texts = Features(draw_normal(num_pairs, dim), draw_normal(num_pairs, num_slots, dim), mask)
    return images, texts


# The originals' losses in torch ------------------------------------------------------------------


def info_nce(logits: torch.Tensor) -> torch.Tensor:
    """Returns the sum of the cross-entropies of rows and columns of [B B]; pairs are diagonal."""
    labels = torch.arange(len(logits), device=logits.device)
    return functional.cross_entropy(logits, labels) + functional.cross_entropy(logits.T, labels)


def torch_gloria(
    image: torch.Tensor,
    text: torch.Tensor,
    regions: torch.Tensor,
    words: torch.Tensor,
    lengths: list[int],
) -> torch.Tensor:
    """Computes GLoRIA's loss of image and text [B D], regions [B D P], words [B D W]."""
    num_pairs, _, num_pixels = regions.shape
    columns = []
    for caption, count in zip(words, lengths, strict=True):
        query = caption[:, :count].unsqueeze(0).contiguous().repeat(num_pairs, 1, 1)
        products = torch.bmm(regions.transpose(1, 2).contiguous(), query)
        over_words = functional.softmax(products.view(num_pairs * num_pixels, count), -1)
        over_words = over_words.view(num_pairs, num_pixels, count).transpose(1, 2).contiguous()
        attention = functional.softmax(4.0 * over_words.view(num_pairs * count, num_pixels), -1)
        attention = attention.view(num_pairs, count, num_pixels).transpose(1, 2).contiguous()
        context = torch.bmm(regions, attention)
        rows = (
            side.transpose(1, 2).contiguous().view(num_pairs * count, -1)
            for side in (query, context)
        )
        cosine = functional.cosine_similarity(*rows, dim=1).view(num_pairs, count)
        columns.append((5.0 * cosine).exp().sum(1, keepdim=True).log())
    cosines = functional.normalize(image, dim=-1) @ functional.normalize(text, dim=-1).T
    return info_nce(10.0 * torch.cat(columns, 1)) + info_nce(10.0 * cosines)


def torch_sinkhorn_codes(scores: torch.Tensor) -> torch.Tensor:
    """Computes MGCA's soft assignments [B K] to prototypes: three iterations on exp."""
    with torch.no_grad():
        codes = torch.exp(scores / 0.05).T
        codes /= codes.sum()
        for _ in range(3):
            codes /= codes.sum(1, keepdim=True)
            codes /= len(codes)
            codes /= codes.sum(0, keepdim=True)
            codes /= codes.shape[1]
        return (codes * codes.shape[1]).T


def torch_context_contrast(
    items: torch.Tensor, contexts: torch.Tensor, weight: torch.Tensor
) -> torch.Tensor:
    """Computes MGCA's contrast of items [B N D] with their own contexts, weighted by [B N]."""
    num_pairs, count, _ = items.shape
    table = torch.bmm(items, functional.normalize(contexts, dim=-1).transpose(1, 2)) / 0.1
    labels, total = torch.arange(count, device=items.device).repeat(num_pairs), 0.0
    for logits in (table, table.transpose(1, 2)):
        rows = logits.reshape(num_pairs * count, count)
        losses = functional.cross_entropy(rows, labels, reduction="none").view(num_pairs, count)
        total = total + (losses * weight).sum() / num_pairs
    return total / 2


def torch_mgca(
    image: torch.Tensor,
    text: torch.Tensor,
    patches: torch.Tensor,
    words: torch.Tensor,
    prototypes: torch.Tensor,
    padding: torch.Tensor,
    weight: torch.Tensor,
    patch_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Computes MGCA's loss of [B D], [B D], [B P D], [B W D], [K D], [B W] and [B W].

    `patch_weight` [B P] are the weights of patches; None weights all alike, as for a ResNet.
    """
    image, text, patches, words, prototypes = (
        functional.normalize(x, dim=-1) for x in (image, text, patches, words, prototypes)
    )
    report_loss = info_nce(image @ text.T / 0.07)
    over_patches = functional.softmax(torch.bmm(words, patches.transpose(1, 2)) / 0.1, -1)
    token_loss = torch_context_contrast(words, torch.bmm(over_patches, patches), weight)
    logits = torch.bmm(patches, words.transpose(1, 2)) / 0.1
    over_words = functional.softmax(logits.masked_fill(padding[:, None], float("-inf")), -1)
    if patch_weight is None:
        patch_weight = patches.new_full(patches.shape[:2], 1 / patches.shape[1])
    contexts = torch.bmm(over_words, words)
    token_loss = token_loss + torch_context_contrast(patches, contexts, patch_weight)
    sides, prototype_loss = (image @ prototypes.T, text @ prototypes.T), 0.0
    for source, predicted in (sides, sides[::-1]):
        log_softmax = functional.log_softmax(predicted / 0.2, 1)
        codes = torch_sinkhorn_codes(source)
        prototype_loss = prototype_loss - (codes * log_softmax).sum(1).mean() / 2
    return report_loss + token_loss + prototype_loss


def make_torch_runner(
    loss: Callable, inputs: list[torch.Tensor], *constants: Any
) -> Callable[[], Any]:
    """Returns a function that computes a loss and its gradients with respect to `inputs`."""
    for tensor in inputs:
        tensor.requires_grad_()

    def run() -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        for tensor in inputs:
            tensor.grad = None
        value = loss(*inputs, *constants)
        value.backward()
        return value, [tensor.grad for tensor in inputs]

    return run


# Cases -------------------------------------------------------------------------------------------


def dense_gloria_scores(pixels: Any, words: Any, mask: Any) -> Any:
    """Computes GLoRIA's scores [I T] with dense tables [I T W P], to compare their memory."""
    products = jnp.einsum("ipd,twd->itwp", pixels, words)
    over_words = jax.nn.softmax(jnp.where(mask[:, :, None], products, contrastive.MASKED_LOGIT), 2)
    regions = jnp.einsum("itwp,ipd->itwd", jax.nn.softmax(4.0 * over_words, -1), pixels)
    cosines = jnp.einsum(
        "twd,itwd->itw", contrastive.l2_normalise(words), contrastive.l2_normalise(regions)
    )
    return contrastive.masked_logsumexp(5.0 * cosines, mask)


def compile_loss(loss: Callable, inputs: tuple, masks: tuple) -> CompiledLoss:
    """Compiles the value and the gradients of `loss(inputs, masks)` with respect to `inputs`."""
    lowered = jax.jit(jax.value_and_grad(loss)).lower(inputs, masks)
    start = time.perf_counter()
    return CompiledLoss(lowered.compile(), time.perf_counter() - start)


def make_features(inputs: tuple, masks: tuple) -> tuple[Features, Features]:
    """Returns images and texts from the arrays of `make_case`."""
    image, text, pixels, words = inputs[:4]
    return Features(image, pixels, masks[0]), Features(text, words, masks[1])


def make_case(
    name: str,
    sides: tuple[Features, Features],
    run_torch: Callable,
    loss: Callable,
    dense_loss: Callable,
    params: tuple = (),
    torch_has_channels_first: bool = False,
) -> Case:
    """Compiles a case, and checks that both libraries compute the same value and gradients.

    Args:
      name: printed in the table.
      sides: images and texts.
      run_torch: computes the value and the gradients in torch.
      loss: a function of (image, text, pixels, words, *params) and both masks.
      dense_loss: the same function with dense tables.
      params: the method's own parameters.
      torch_has_channels_first: whether torch's pixels and words are [B D N].

    Raises:
      AssertionError: the values or gradients differ.
    """
    arrays = (*(side.pooled for side in sides), *(side.local for side in sides), *params)
    inputs, masks = jax.tree.map(jnp.asarray, (arrays, tuple(side.mask for side in sides)))
    compiled = compile_loss(loss, inputs, masks)
    dense = compile_loss(dense_loss, inputs, masks)

    def run_jax() -> Any:
        return jax.block_until_ready(compiled.function(inputs, masks))

    (value, gradients), (torch_value, torch_gradients) = run_jax(), run_torch()
    np.testing.assert_allclose(value, torch_value.item(), rtol=1e-4)
    for actual, expected in zip(gradients, torch_gradients, strict=True):
        if torch_has_channels_first and expected.ndim == 3:
            expected = expected.transpose(1, 2)
        np.testing.assert_allclose(actual, expected, atol=1e-4 * float(expected.abs().max()))
    return Case(
        name,
        len(inputs[0]),
        run_jax,
        run_torch,
        compiled.compile_seconds,
        compiled.temp_bytes,
        dense.temp_bytes,
    )


def make_gloria_case(num_pairs: int) -> Case:
    """Returns GLoRIA as published: D = 768, sentences of 8 to 40 words in 97 slots."""
    images, texts = draw_features(num_pairs, 768, 97, 40)

    def loss(inputs: tuple, masks: tuple) -> Any:
        options = {"key": None, "step": None, "hyper": gloria.Hyper()}
        return gloria.loss({}, {}, *make_features(inputs, masks), {}, **options)[0]

    def dense_loss(inputs: tuple, masks: tuple) -> Any:
        image, text, pixels, words = inputs
        local = dense_gloria_scores(pixels, words, masks[1])
        cosines = contrastive.cosine_similarity(image, text)
        return sum(contrastive.info_nce(10.0 * local) + contrastive.info_nce(10.0 * cosines))

    channels_first = (side.local.transpose(0, 2, 1) for side in (images, texts))
    arrays = images.pooled, texts.pooled, *map(np.ascontiguousarray, channels_first)
    lengths = texts.mask.sum(1).tolist()
    run_torch = make_torch_runner(torch_gloria, [torch.tensor(array) for array in arrays], lengths)
    return make_case(
        "gloria", (images, texts), run_torch, loss, dense_loss, torch_has_channels_first=True
    )


def make_mgca_case(num_pairs: int) -> Case:
    """Returns MGCA with a ResNet-50: D = 128, 8 to 111 words in 111 slots, 500 prototypes."""
    images, texts = draw_features(num_pairs, 128, 111, 111)
    prototypes = np.random.default_rng(1).normal(size=(500, 128)).astype(np.float32)
    published = mgca.Hyper(padded_negatives=True, freeze_prototype_steps=0)

    def loss(inputs: tuple, masks: tuple, hyper: mgca.Hyper = published) -> Any:
        params = {"prototypes": inputs[4]}
        options = {"key": None, "step": jnp.array(0), "hyper": hyper}
        return mgca.loss(params, {}, *make_features(inputs, masks), {}, **options)[0]

    dense_loss = partial(loss, hyper=replace(published, tile_size=num_pairs))
    arrays = images.pooled, texts.pooled, images.local, texts.local, prototypes
    weight = texts.mask / texts.mask.sum(1, keepdims=True)
    constants = torch.tensor(~texts.mask), torch.tensor(weight, dtype=torch.float32)
    run_torch = make_torch_runner(torch_mgca, [torch.tensor(array) for array in arrays], *constants)
    return make_case("mgca", (images, texts), run_torch, loss, dense_loss, (prototypes,))


def measure(case: Case, repeats: int, clock: Callable[[], float]) -> None:
    """Runs both libraries in turns and prints one row of the table."""
    jax_ms: list[float] = []
    torch_ms: list[float] = []
    for _ in range(repeats):
        for run, readings in ((case.run_torch, torch_ms), (case.run_jax, jax_ms)):
            start = clock()
            run()
            readings.append(1e3 * (clock() - start))
    jax_min, torch_min = min(jax_ms), min(torch_ms)
    jax_median, torch_median = statistics.median(jax_ms), statistics.median(torch_ms)
    print(
        f"{case.name:<8}{case.num_pairs:>4}"
        f"{jax_min:>9.0f}{jax_median:>8.0f}{torch_min:>10.0f}{torch_median:>8.0f}"
        f"{jax_min / torch_min:>8.2f}{jax_median / torch_median:>8.2f}{case.compile_seconds:>11.1f}"
        f"{case.temp_bytes / 1e6:>9.1f}{case.dense_bytes / 1e6:>10.1f}"
        f"{case.dense_bytes / case.temp_bytes:>7.0f}x",
        flush=True,
    )


def main(repeats: int, threads: int) -> None:
    """Prints the table; with one thread times are CPU time, which other processes disturb less."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    print(f"jax {jax.__version__}, torch {torch.__version__}, {threads} thread(s), {repeats} turns")
    print("forward and backward, least and median; ratio: JAX's time by torch's")
    print(HEADER)
    for make, num_pairs in ((make_gloria_case, 32), (make_gloria_case, 48), (make_mgca_case, 48)):
        measure(make(num_pairs), repeats, clock)
