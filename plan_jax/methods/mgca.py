"""MGCA: contrast of reports, of tokens within a pair, and of prototypes across the batch.

PAPER: Wang et al., Multi-Granularity Cross-modal Alignment for Generalized Medical Visual
Representation Learning, NeurIPS 2022, arXiv 2210.06044; code github.com/HKU-MedAI/MGCA.
Established, from the code: every equation and constant below; the three weights of the loss are
those of its published command. Ours: the heat map (cosine of word and patch) and, where a text
tower gives no attention, words that all weigh the same.

z unit patches, u unit words, v and t unit images and texts, c unit prototypes:
(1) reports     `CE(v t' / tau) + CE(t v' / tau)`, the sum of both directions
(2) words       `a_n = softmax_p(<u_n, z_p> / tau_token)`, `r_n = unit(sum_p a_np z_p)`; the word n
    with its own region r_n among those of the same pair, and back, weighted by the attention of the
    text's summary
(3) patches     the same with the sides exchanged, weighted by the attention of the image's summary
    or, for a ResNet, all alike
(4) prototypes  Sinkhorn's codes of one side are the soft targets of the other's
    `softmax_k(<v, c_k> / tau_prototype)`; computed in logarithms, with the same result

Deviation: negatives of (1) and the batch of Sinkhorn's codes come from all devices, not from one
(`per_device=True` gives the code's).
Deviation: padded words are no candidates in (2); in the code they are, with no weight of their own
(`padded_columns=True`; there a padded word is what the head makes of nothing, here what `local`
holds).
Deviation: a word weighs what the text's summary pays to it; in the code what is paid to the token
after it (`word_weight_shift=True` takes the next word's, and the last word's own).
Deviation: [SEP] is no word (the code appends it to the words of a report), and a caption that fills
every slot keeps its last word.
Deviation: a patch's context is scaled to unit length for every tower; the code leaves a ViT's as it
is (`normalise_patch_context=False`).
Deviation: prototypes are scaled to unit length inside the forward pass, so their gradient lies in
the sphere; the code overwrites them before each step.
Deviation: the prototypes stay as they are for `freeze` steps; the code counts one epoch.
Deviation: the code's other attention, multi-head and off by default, is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from plan_jax.methods import contrastive
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params

PAPER = "arXiv 2210.06044, github.com/HKU-MedAI/MGCA"
REQUIRES: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hyper:
    """Constants of the code; the weights are its command's (its class says 1, 0.7 and 0.5)."""

    tau: float = 0.07
    tau_token: float = 0.1  # of the attention and of the contrast
    tau_prototype: float = 0.2
    prototypes: int = 500
    epsilon: float = 0.05  # Sinkhorn's regularisation
    sinkhorn_rounds: int = 3
    freeze: int = 1500  # steps without a gradient of the prototypes: 217,000 pairs by 144
    weight_global: float = 1.0
    weight_token: float = 1.0
    weight_prototype: float = 1.0
    per_device: bool = False
    padded_columns: bool = False
    word_weight_shift: bool = False
    normalise_patch_context: bool = True  # False: only a ResNet's
    tile: int = 4  # pairs at a time


def init(key: PRNGKeyArray, setting: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Make the prototypes, Float[K D], of unit length and in random directions."""
    drawn = jax.random.normal(key, (hyper.prototypes, setting.dim))
    return {"prototypes": contrastive.l2_normalise(drawn)}, {}


def clipped(attention: Float[Array, "*B N"], mask: Bool[Array, "*B N"]) -> Float[Array, "*B N"]:
    """Clip what is not zero to its own 10th and 90th percentile and scale it to sum to 1.

    No gradient; all zeros where nothing is real.

    >>> weight = clipped(jnp.array([0.1, 0.3, 0.0]), jnp.array([True, True, False]))
    >>> (100 * weight).round().astype(int).tolist()
    [30, 70, 0]
    """
    real = mask & (attention > 0)
    attention = lax.stop_gradient(attention.astype(jnp.float32))
    ordered = jnp.sort(jnp.where(real, attention, jnp.finfo(jnp.float32).max), -1)
    last = jnp.maximum(real.sum(-1, keepdims=True) - 1, 0)

    def percentile(share: float) -> Array:
        place = share * last.astype(jnp.float32)
        below = jnp.floor(place).astype(jnp.int32)
        above = jnp.minimum(below + 1, last)
        low, high = (jnp.take_along_axis(ordered, n, -1) for n in (below, above))
        return low + (place - below) * (high - low)

    weight = jnp.where(real, jnp.clip(attention, percentile(0.1), percentile(0.9)), 0.0)
    return weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-9)


def word_weight(texts: Features, hyper: Hyper) -> Float[Array, "B W"]:
    """Weigh the words of each text by its summary's attention, clipped; 0 at padding, sum 1."""
    attention, mask = texts.attention, texts.mask
    if attention is None:
        return clipped(mask.astype(jnp.float32), mask)
    if hyper.word_weight_shift:
        follows = jnp.pad(mask[:, 1:], ((0, 0), (0, 1)))
        attention = jnp.where(follows, jnp.roll(attention, -1, 1), attention)
    return clipped(attention, mask)


def patch_weight(images: Features) -> Float[Array, "B P"]:
    """Weigh the patches of each image: a ViT's by its summary's attention, clipped; sum 1."""
    if images.attention is None:
        return clipped(images.mask.astype(jnp.float32), images.mask)
    return clipped(images.attention, images.mask)


def own_contrast(
    logits: Float[Array, "N N"], kept: Bool[Array, " N"], weight: Float[Array, " N"]
) -> Float[Array, ""]:
    """Contrast each item with its own context, both ways: the weighted sum, halved.

    Cross-entropy among the items kept, along the rows and down the columns.
    """
    there = contrastive.masked_logsumexp(logits, kept[None, :])
    back = contrastive.masked_logsumexp(logits, kept[:, None], 0)
    return jnp.sum(weight * (there + back - 2 * jnp.diagonal(logits))) / 2


def word_side(
    pixels: Float[Array, "P D"],
    words: Float[Array, "W D"],
    products: Float[Array, "W P"],
    mask: Bool[Array, " W"],
    weight: Float[Array, " W"],
    hyper: Hyper,
) -> Float[Array, ""]:
    """Contrast the words of one pair, of unit length, with the regions they see: *equation 2*."""
    attention = jax.nn.softmax(products / hyper.tau_token, -1)
    regions = contrastive.l2_normalise(attention @ pixels)
    return own_contrast(words @ regions.T / hyper.tau_token, mask | hyper.padded_columns, weight)


def patch_side(
    pixels: Float[Array, "P D"],
    words: Float[Array, "W D"],
    products: Float[Array, "W P"],
    mask: Bool[Array, " W"],
    weight: Float[Array, " P"],
    scale: bool,
    hyper: Hyper,
) -> Float[Array, ""]:
    """Contrast the patches of one pair, of unit length, with the words they see: *equation 3*.

    `scale` says whether contexts are scaled to unit length.
    """
    attention = jax.nn.softmax(
        jnp.where(mask[:, None], products / hyper.tau_token, contrastive.NEG), 0
    )
    contexts = attention.T @ words
    contexts = contrastive.l2_normalise(contexts) if scale else contexts
    kept = jnp.ones(len(pixels), bool)
    return own_contrast(pixels @ contexts.T / hyper.tau_token, kept, weight)


def token_losses(images: Features, texts: Features, hyper: Hyper) -> Float[Array, "B"]:
    """Give *equations 2 and 3*, summed, for each pair.

    `tile` pairs at a time: the tables [W W] and [P P] of no more pairs than that are ever held. A
    pair's gradient depends on nothing outside it but a factor, so it is taken along with its value,
    and no table is made twice.
    """
    scale = hyper.normalise_patch_context or images.attention is None
    tile = min(hyper.tile, len(texts.mask))

    def pair(pixels: Array, words: Array, rest: tuple[Array, Array, Array]) -> Array:
        mask, by_word, by_patch = rest
        items = pixels, words, words @ pixels.T
        value = word_side(*items, mask, by_word, hyper)
        return value + patch_side(*items, mask, by_patch, scale, hyper)

    def each(function: Callable, parts: tuple) -> Any:
        return lax.map(lambda part: function(*part), parts, batch_size=tile)

    @jax.custom_vjp
    def values(*parts: Any) -> Array:
        return each(pair, parts)

    def backward(grads: tuple[Array, Array], factor: Array) -> tuple[Array, Array, None]:
        pixels, words = (grad * factor[:, None, None] for grad in grads)
        return pixels, words, None

    values.defvjp(lambda *parts: each(jax.value_and_grad(pair, (0, 1)), parts), backward)
    rest = texts.mask, word_weight(texts, hyper), patch_weight(images)
    return values(
        contrastive.l2_normalise(images.local), contrastive.l2_normalise(texts.local), rest
    )


def codes(scores: Float[Array, "B K"], hyper: Hyper) -> Float[Array, "B K"]:
    """Assign each item softly to prototypes, all prototypes about equally: no gradient.

    *Sinkhorn and Knopp's rounds on exp(scores / epsilon):* every prototype's share of the batch is
    made equal, then every item's shares are made to sum to 1.
    """
    log = lax.stop_gradient(scores) / hyper.epsilon
    for _ in range(hyper.sinkhorn_rounds):
        log = jax.nn.log_softmax(jax.nn.log_softmax(log, 0), 1)
    return jnp.exp(log)


def prototype_loss(
    prototypes: Float[Array, "K D"],
    images: Float[Array, "B D"],
    texts: Float[Array, "B D"],
    step: Array,
    hyper: Hyper,
) -> Float[Array, ""]:
    """Predict each side's codes from the other side: *equation 4*, the mean of both directions."""
    held = jnp.where(step < hyper.freeze, lax.stop_gradient(prototypes), prototypes)
    seen, said = (
        contrastive.cosine_similarity(images, held),
        contrastive.cosine_similarity(texts, held),
    )

    def predict(scores: Array, target: Array) -> Array:
        log = jax.nn.log_softmax(scores / hyper.tau_prototype, -1)
        return -jnp.sum(target * log, -1).mean()

    return (predict(said, codes(seen, hyper)) + predict(seen, codes(said, hyper))) / 2


def similarity(
    params: Params,
    memory: Memory,
    images: Features,
    texts: Features,
    hyper: Hyper,
    axis: str | None = None,
) -> dict[str, Float[Array, "I T"]]:
    """Compare all images with all texts: cosine of the global embeddings, in [-1, 1]."""
    return {"global": contrastive.cosine_similarity(images.pooled, texts.pooled)}


def heatmap(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B W P"], Float[Array, "B W"]]:
    """Map the cosine of each word with each patch; words weigh what they weigh in the loss."""
    return contrastive.word_pixel_maps(texts, images), word_weight(texts, hyper)


def loss(
    params: Params,
    memory: Memory,
    images: Features,
    texts: Features,
    extra: dict[str, Any],
    *,
    key: PRNGKeyArray,
    step: Array,
    hyper: Hyper,
    axis: str | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, Memory]]:
    """Contrast reports, tokens and prototypes: the weighted sum of *equations 1, 2 + 3 and 4*."""
    token = contrastive.all_gather(token_losses(images, texts, hyper), axis).mean()
    group = None if hyper.per_device else axis
    images, texts = (
        x.replace(pooled=contrastive.all_gather(x.pooled, group)) for x in (images, texts)
    )
    cosines = similarity(params, memory, images, texts, hyper)["global"]
    report = sum(contrastive.info_nce(cosines / hyper.tau))
    prototype = prototype_loss(params["prototypes"], images.pooled, texts.pooled, step, hyper)
    if hyper.per_device:
        report, prototype = contrastive.all_gather(jnp.stack([report, prototype])[None], axis).mean(
            0
        )
    value = hyper.weight_global * report + hyper.weight_token * token
    value += hyper.weight_prototype * prototype
    metrics = {"loss_global": report, "loss_token": token, "loss_prototype": prototype}
    return value, (metrics, memory)
