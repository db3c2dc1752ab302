"""Measure losses against the originals' way of computing them: `tools/benchmark.py losses`.

GLoRIA's and MGCA's losses are written here once more, in torch, from the steps of their code: for
GLoRIA a loop over captions at their true lengths, each caption's words repeated for every image;
for MGCA all pairs of the batch at once. Both sides get the same numbers, forward and backward, and
have to agree before anything is timed. Word weights of MGCA are given to torch ready made.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from torch.nn import functional

from plan_jax.methods import contrastive, gloria, mgca
from plan_jax.types import Features

PIXELS = 361  # 19 x 19, of a ResNet-50 at 299
HEAD = (
    f"{'loss':<8}{'B':>4}{'JAX ms':>9}{'median':>8}{'torch ms':>10}{'median':>8}"
    f"{'ratio':>8}{'median':>8}{'compile s':>11}{'temp MB':>9}{'dense MB':>10}{'share':>8}"
)


@dataclass(frozen=True)
class Case:
    """A loss in both libraries: `jax` and `torch` run it once, forward and backward."""

    name: str
    pairs: int
    jax: Callable[[], Any]
    torch: Callable[[], Any]
    compiling: float  # seconds
    memory: int  # bytes between the features and the gradients
    dense: int  # the same where every table of the batch is made at once


def draw(pairs: int, dim: int, words: int, longest: int) -> tuple[Features, Features]:
    """Draw features on maps of 361 pixels, and texts of 8 to `longest` words in `words` slots."""
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        """Draw Float[...] of the given shape."""
        return rng.normal(size=shape).astype(np.float32)

    mask = np.arange(words) < rng.integers(8, longest + 1, pairs)[:, None]
    images = Features(
        normal(pairs, dim), 0.05 * normal(pairs, PIXELS, dim), np.ones((pairs, PIXELS), bool)
    )
    return images, Features(normal(pairs, dim), normal(pairs, words, dim), mask)


def contrast(table: torch.Tensor) -> torch.Tensor:
    """Contrast rows and columns of [B B], the pairs on the diagonal."""
    target = torch.arange(len(table))
    cross_entropy = functional.cross_entropy
    return cross_entropy(table, target) + cross_entropy(table.T, target)


def torch_gloria(
    image: torch.Tensor,
    text: torch.Tensor,
    regions: torch.Tensor,
    words: torch.Tensor,
    lengths: list[int],
) -> torch.Tensor:
    """Loop over captions: image, text [B D], regions [B D P], words [B D W], true lengths."""
    pairs, _, pixels = regions.shape
    columns = []
    for caption, count in zip(words, lengths, strict=True):
        query = caption[:, :count].unsqueeze(0).contiguous().repeat(pairs, 1, 1)
        match = torch.bmm(regions.transpose(1, 2).contiguous(), query)
        share = functional.softmax(match.view(pairs * pixels, count), -1)
        share = share.view(pairs, pixels, count).transpose(1, 2).contiguous()
        attention = functional.softmax(4.0 * share.view(pairs * count, pixels), -1)
        attention = attention.view(pairs, count, pixels).transpose(1, 2).contiguous()
        context = torch.bmm(regions, attention)
        flat = (x.transpose(1, 2).contiguous().view(pairs * count, -1) for x in (query, context))
        cosine = functional.cosine_similarity(*flat, dim=1).view(pairs, count)
        columns.append((5.0 * cosine).exp().sum(1, keepdim=True).log())
    whole = functional.normalize(image, dim=-1) @ functional.normalize(text, dim=-1).T
    return contrast(10.0 * torch.cat(columns, 1)) + contrast(10.0 * whole)


def torch_codes(scores: torch.Tensor) -> torch.Tensor:
    """Assign [B K] softly to prototypes: three rounds on exp."""
    with torch.no_grad():
        codes = torch.exp(scores / 0.05).T
        codes /= codes.sum()
        for _ in range(3):
            codes /= codes.sum(1, keepdim=True)
            codes /= len(codes)
            codes /= codes.sum(0, keepdim=True)
            codes /= codes.shape[1]
        return (codes * codes.shape[1]).T


def torch_own(items: torch.Tensor, contexts: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Contrast items [B N D] with their contexts inside each pair, both ways, weights [B N]."""
    pairs, count, _ = items.shape
    table = torch.bmm(items, functional.normalize(contexts, dim=-1).transpose(1, 2)) / 0.1
    target, total = torch.arange(count).repeat(pairs), 0.0
    for side in (table, table.transpose(1, 2)):
        flat = side.reshape(pairs * count, count)
        each = functional.cross_entropy(flat, target, reduction="none").view(pairs, count)
        total = total + (each * weight).sum() / pairs
    return total / 2


def torch_mgca(
    image: torch.Tensor,
    text: torch.Tensor,
    patches: torch.Tensor,
    words: torch.Tensor,
    prototypes: torch.Tensor,
    padding: torch.Tensor,
    weight: torch.Tensor,
) -> torch.Tensor:
    """Computes all pairs at once: [B D], [B D], [B P D], [B W D], [K D], [B W], [B W]."""
    image, text, patches, words, prototypes = (
        functional.normalize(x, dim=-1) for x in (image, text, patches, words, prototypes)
    )
    report = contrast(image @ text.T / 0.07)
    seen = functional.softmax(torch.bmm(words, patches.transpose(1, 2)) / 0.1, -1)
    token = torch_own(words, torch.bmm(seen, patches), weight)
    match = torch.bmm(patches, words.transpose(1, 2)) / 0.1
    said = functional.softmax(match.masked_fill(padding[:, None], float("-inf")), -1)
    alike = torch.full(patches.shape[:2], 1 / patches.shape[1])
    token = token + torch_own(patches, torch.bmm(said, words), alike)
    sides, prototype = (image @ prototypes.T, text @ prototypes.T), 0.0
    for one, other in (sides, sides[::-1]):
        log = functional.log_softmax(other / 0.2, 1)
        prototype = prototype - (torch_codes(one) * log).sum(1).mean() / 2
    return report + token + prototype


def dense_scores(pixels: Any, words: Any, mask: Any) -> Any:
    """GLoRIA's scores [I T] with everything of [I T W P] made at once, for its memory."""
    products = jnp.einsum("ipd,twd->itwp", pixels, words)
    shares = jax.nn.softmax(jnp.where(mask[:, :, None], products, contrastive.MASKED_LOGIT), 2)
    regions = jnp.einsum("itwp,ipd->itwd", jax.nn.softmax(4.0 * shares, -1), pixels)
    cosines = jnp.einsum(
        "twd,itwd->itw", contrastive.l2_normalise(words), contrastive.l2_normalise(regions)
    )
    return contrastive.masked_logsumexp(5.0 * cosines, mask)


def compiled(loss: Callable, learned: tuple, masks: tuple) -> tuple[Any, float]:
    """Compile a loss of arrays and masks with its gradients; return it and the seconds it took."""
    lowered = jax.jit(jax.value_and_grad(loss)).lower(learned, masks)
    started = time.perf_counter()
    return lowered.compile(), time.perf_counter() - started


def torch_runner(loss: Callable, learned: list[torch.Tensor], *fixed: Any) -> Callable[[], Any]:
    """Returns a function that runs a loss and its backward pass: value and gradients."""
    for leaf in learned:
        leaf.requires_grad_()

    def run() -> tuple[torch.Tensor, list[torch.Tensor]]:
        for leaf in learned:
            leaf.grad = None
        value = loss(*learned, *fixed)
        value.backward()
        return value, [leaf.grad for leaf in learned]

    return run


def make_case(
    name: str,
    sides: tuple[Features, Features],
    run_torch: Callable,
    loss: Callable,
    dense: Callable,
    own: tuple = (),
    turned: bool = False,
) -> Case:
    """Compile a case and see that both libraries give the same value and gradients.

    `own` are parameters of the method; `turned` says that torch's local items are [B D N].
    """
    learned = (*(x.pooled for x in sides), *(x.local for x in sides), *own)
    learned, masks = jax.tree.map(jnp.asarray, (learned, tuple(x.mask for x in sides)))
    function, seconds = compiled(loss, learned, masks)
    rough, _ = compiled(dense, learned, masks)
    memory, most = (f.memory_analysis().temp_size_in_bytes for f in (function, rough))

    def run() -> Any:
        return jax.block_until_ready(function(learned, masks))

    (got, grads), (want, grads_) = run(), run_torch()
    np.testing.assert_allclose(got, want.item(), rtol=1e-4)
    for one, other in zip(grads, grads_, strict=True):
        other = other.transpose(1, 2) if turned and other.ndim == 3 else other
        np.testing.assert_allclose(one, other, atol=1e-4 * float(other.abs().max()))
    return Case(name, len(learned[0]), run, run_torch, seconds, memory, most)


def gloria_case(pairs: int) -> Case:
    """GLoRIA as published: D = 768, sentences of 8 to 40 words in 97 slots."""
    images, texts = draw(pairs, 768, 97, 40)

    def loss(learned: tuple, masks: tuple) -> Any:
        seen = Features(learned[0], learned[2], masks[0])
        said = Features(learned[1], learned[3], masks[1])
        about = {"key": None, "step": None, "hyper": gloria.Hyper()}
        return gloria.loss({}, {}, seen, said, {}, **about)[0]

    def dense(learned: tuple, masks: tuple) -> Any:
        local = dense_scores(*learned[2:], masks[1])
        whole = contrastive.cosine_similarity(*learned[:2])
        return sum(contrastive.info_nce(10.0 * local) + contrastive.info_nce(10.0 * whole))

    arrays = images.pooled, texts.pooled, *(x.local.transpose(0, 2, 1) for x in (images, texts))
    learned = [torch.tensor(np.ascontiguousarray(x)) for x in arrays]
    run = torch_runner(torch_gloria, learned, texts.mask.sum(1).tolist())
    return make_case("gloria", (images, texts), run, loss, dense, turned=True)


def mgca_case(pairs: int) -> Case:
    """MGCA with a ResNet-50: D = 128, reports of 8 to 111 words in 111 slots, 500 prototypes."""
    images, texts = draw(pairs, 128, 111, 111)
    own = np.random.default_rng(1).normal(size=(500, 128)).astype(np.float32)

    published = mgca.Hyper(padded_negatives=True, freeze_prototype_steps=0)

    def loss(learned: tuple, masks: tuple, hyper: mgca.Hyper = published) -> Any:
        seen = Features(learned[0], learned[2], masks[0])
        said = Features(learned[1], learned[3], masks[1])
        about = {"key": None, "step": jnp.array(0), "hyper": hyper}
        return mgca.loss({"prototypes": learned[4]}, {}, seen, said, {}, **about)[0]

    dense = partial(loss, hyper=replace(published, tile_size=pairs))

    arrays = images.pooled, texts.pooled, images.local, texts.local, own
    weight = texts.mask / texts.mask.sum(1, keepdims=True)
    fixed = torch.tensor(~texts.mask), torch.tensor(weight, dtype=torch.float32)
    run = torch_runner(torch_mgca, [torch.tensor(x) for x in arrays], *fixed)
    return make_case("mgca", (images, texts), run, loss, dense, (own,))


def measure(case: Case, repeats: int, clock: Callable[[], float]) -> None:
    """Run both libraries in turns and print one row of the table."""
    times: tuple[list[float], list[float]] = [], []
    for _ in range(repeats):
        for run, seconds in zip((case.torch, case.jax), times[::-1], strict=True):
            started = clock()
            run()
            seconds.append(1e3 * (clock() - started))
    (least, least_), (middle, middle_) = (
        [of(seconds) for seconds in times] for of in (min, statistics.median)
    )
    print(
        f"{case.name:<8}{case.pairs:>4}{least:>9.0f}{middle:>8.0f}{least_:>10.0f}{middle_:>8.0f}"
        f"{least / least_:>8.2f}{middle / middle_:>8.2f}{case.compiling:>11.1f}"
        f"{case.memory / 1e6:>9.1f}{case.dense / 1e6:>10.1f}{case.dense / case.memory:>7.0f}x",
        flush=True,
    )


def main(repeats: int, threads: int) -> None:
    """Print the table. With one thread the clock is CPU time, which other work disturbs less."""
    torch.set_num_threads(threads)
    clock = time.process_time if threads == 1 else time.perf_counter
    print(f"jax {jax.__version__}, torch {torch.__version__}, {threads} thread(s), {repeats} turns")
    print("forward and backward, least and median; ratio: JAX's time by torch's")
    print(HEAD)
    for make, pairs in ((gloria_case, 32), (gloria_case, 48), (mgca_case, 48)):
        measure(make(pairs), repeats, clock)
