"""MGCA: contrast of reports, of tokens within a pair, and of prototypes across the batch.

PAPER: Wang et al., Multi-Granularity Cross-modal Alignment for Generalized Medical Visual
Representation Learning, NeurIPS 2022, arXiv 2210.06044; code github.com/HKU-MedAI/MGCA.
Established, from the code: every equation and constant below; the three weights of the loss are
those of its published command. Ours: the heat map (cosine of word and patch) and, where a text
encoder returns no attention, equal weights for all words.

z unit patches, u unit words, v and t unit images and texts, c unit prototypes:
(1) reports     `CE(v t' / tau) + CE(t v' / tau)`, the sum of both directions
(2) words       `a_n = softmax_p(<u_n, z_p> / tau_token)`, `r_n = unit(sum_p a_np z_p)`; the word n
    with its own region r_n among those of the same pair, and back, weighted by the attention of the
    text's summary token
(3) patches     the same with the sides exchanged, weighted by the attention of the image's summary
    token or, for a ResNet, all alike
(4) prototypes  Sinkhorn's codes of one side are the soft targets of the other side's
    `softmax_k(<v, c_k> / tau_prototype)`; computed in logarithms, with the same result

Deviation: negatives of (1) and the batch of Sinkhorn's codes come from all devices, not from one
(`per_device=True` restores the code's).
Deviation: padded words are no candidates in (2); in the code they are, with no weight of their own
(`padded_negatives=True`; there a padded word is what the head computes from nothing, here what
`local` holds).
Deviation: a word's weight is the attention that the text's summary token pays to its pieces; in the
code it is the attention paid to the piece after each of them, [SEP] after the last
(`shift_word_weights=True`).
Deviation: the text tower has positions and a type embedding, as BERT has. The code passes the token
types, all 0, as the numbers of the positions, so every token gets the first position, and it has no
type embedding (`weights/layouts.py` loads its checkpoints as they were trained).
Deviation: [SEP] is no word (the code appends it to the words of a report), and a caption that fills
every slot keeps its last word.
Deviation: a patch's context is scaled to unit length for every encoder; the code leaves a ViT's as
it is (`normalise_patch_context=False`).
Deviation: prototypes are scaled to unit length inside the forward pass, so their gradient lies in
the sphere; the code overwrites them before each step.
Deviation: the prototypes are frozen for `freeze_prototype_steps` steps; the code counts one epoch.
Deviation: the code's other attention, multi-head and off by default, is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from plan_jax.methods import contrastive
from plan_jax.methods.ranges import BLOCKS, COUNT, STEPS, TEMPERATURE, WEIGHT, Range, check_hyper
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params, UserError

PAPER = (
    "Wang et al., Multi-Granularity Cross-modal Alignment for Generalized Medical Visual "
    "Representation Learning, NeurIPS 2022, arXiv 2210.06044, github.com/HKU-MedAI/MGCA"
)
REQUIRES: tuple[str, ...] = ()
IMAGE_FEATURES = ("pooled", "local", "mask", "attention")
TEXT_FEATURES = ("pooled", "local", "mask", "attention", "next_attention")


@dataclass(frozen=True)
class Hyper:
    """Constants of the code; the weights are its command's (its class has 1, 0.7, 0.5)."""

    tau: float = 0.07  # temperature of (1)
    tau_token: float = 0.1  # of the attention and of the contrast
    tau_prototype: float = 0.2  # of (4)
    num_prototypes: int = 500  # K of (4)
    epsilon: float = 0.05  # Sinkhorn's regularisation
    sinkhorn_iterations: int = 3  # of (4)
    freeze_prototype_steps: int = 1500  # one epoch: 217,000 pairs in batches of 144
    weight_global: float = 1.0  # of (1)
    weight_token: float = 1.0  # of (2) and (3)
    weight_prototype: float = 1.0  # of (4)
    contrast: Literal["softmax", "sigmoid"] = "softmax"  # of (1); sigmoid: SigLIP's, without tau
    per_device: bool = False  # negatives and codes of one device, as in the code
    padded_negatives: bool = False  # padded words are candidates in (2), as in the code
    shift_word_weights: bool = False  # by the piece after a word's own, as in the code
    normalise_patch_context: bool = True  # False: only a ResNet's
    tile_size: int = 4  # pairs at a time

    def __post_init__(self) -> None:
        check_hyper(
            self,
            tau=TEMPERATURE,
            tau_token=TEMPERATURE,
            tau_prototype=TEMPERATURE,
            num_prototypes=Range(1, 2**16),
            epsilon=TEMPERATURE,
            sinkhorn_iterations=BLOCKS,
            freeze_prototype_steps=STEPS,
            weight_global=WEIGHT,
            weight_token=WEIGHT,
            weight_prototype=WEIGHT,
            tile_size=COUNT,
        )


def init(key: PRNGKeyArray, context: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Returns the prototypes, Float[K D], of unit length and in random directions.

    Parameters of the sigmoid loss are beside them, if it is chosen.
    """
    directions = jax.random.normal(key, (hyper.num_prototypes, context.dim))
    params = {"prototypes": contrastive.l2_normalise(directions)}
    return params | contrastive.init_sigmoid(hyper.contrast), {}


def clip_attention(
    attention: Float[Array, "*B N"], mask: Bool[Array, "*B N"]
) -> Float[Array, "*B N"]:
    """Clips non-zero attention to its own 10th and 90th percentile and scales it to sum to 1.

    There is no gradient. The result is all zeros where nothing is real.

    >>> weight = clip_attention(jnp.array([0.1, 0.3, 0.0]), jnp.array([True, True, False]))
    >>> (100 * weight).round().astype(int).tolist()
    [30, 70, 0]
    """
    real = mask & (attention > 0)
    attention = lax.stop_gradient(attention.astype(jnp.float32))
    # Sorting moves what is not real to the end, where the percentiles do not reach.
    ordered = jnp.sort(jnp.where(real, attention, jnp.finfo(jnp.float32).max), -1)
    last = jnp.maximum(real.sum(-1, keepdims=True) - 1, 0)

    def percentile(fraction: float) -> Array:
        position = fraction * last.astype(jnp.float32)
        below = jnp.floor(position).astype(jnp.int32)
        above = jnp.minimum(below + 1, last)
        low, high = (jnp.take_along_axis(ordered, index, -1) for index in (below, above))
        return low + (position - below) * (high - low)

    weight = jnp.where(real, jnp.clip(attention, percentile(0.1), percentile(0.9)), 0.0)
    return weight / jnp.maximum(weight.sum(-1, keepdims=True), 1e-9)


def word_attention_weights(texts: Features, hyper: Hyper) -> Float[Array, "B W"]:
    """Returns the weight of each word: the clipped attention of its text's summary token.

    Weights sum to 1 and are 0 at padding.

    Raises:
      UserError: `shift_word_weights` with a text encoder that pools by learned weights of words,
        which has no attention to pieces.
    """
    attention, mask = texts.attention, texts.mask
    if attention is None:
        return clip_attention(mask.astype(jnp.float32), mask)
    if hyper.shift_word_weights:
        attention = texts.next_attention
        if attention is None:
            raise UserError(
                "hyper.shift_word_weights is True, and the text encoder pools by weights of words, "
                "which are not of pieces; use config.text.pool cls, or set it to False"
            )
    return clip_attention(attention, mask)


def patch_attention_weights(images: Features) -> Float[Array, "B P"]:
    """Returns the weight of each patch: a ViT's clipped attention of the class token; sum 1."""
    if images.attention is None:
        return clip_attention(images.mask.astype(jnp.float32), images.mask)
    return clip_attention(images.attention, images.mask)


def contrast_contexts(
    logits: Float[Array, "N N"], candidates: Bool[Array, " N"], weight: Float[Array, " N"]
) -> Float[Array, ""]:
    """Computes the contrast of each item with its own context, both ways: weighted sum, halved.

    `logits_nm` compares item n with context m. The cross-entropy among the candidates is taken
    along the rows and down the columns.
    """
    rows = contrastive.masked_logsumexp(logits, candidates[None, :])
    columns = contrastive.masked_logsumexp(logits, candidates[:, None], 0)
    return jnp.sum(weight * (rows + columns - 2 * jnp.diagonal(logits))) / 2


def word_loss(
    pixels: Float[Array, "P D"],
    words: Float[Array, "W D"],
    products: Float[Array, "W P"],
    mask: Bool[Array, " W"],
    weight: Float[Array, " W"],
    hyper: Hyper,
) -> Float[Array, ""]:
    """Computes the contrast of the unit words of one pair with their regions: *equation 2*."""
    attention_WP = jax.nn.softmax(products / hyper.tau_token, -1)
    regions = contrastive.l2_normalise(attention_WP @ pixels)
    candidates = mask | hyper.padded_negatives
    return contrast_contexts(words @ regions.T / hyper.tau_token, candidates, weight)


def patch_loss(
    pixels: Float[Array, "P D"],
    words: Float[Array, "W D"],
    products: Float[Array, "W P"],
    mask: Bool[Array, " W"],
    weight: Float[Array, " P"],
    normalise: bool,
    hyper: Hyper,
) -> Float[Array, ""]:
    """Computes the contrast of the unit patches of one pair with their contexts: *equation 3*.

    `normalise` scales the contexts to unit length.
    """
    logits_WP = jnp.where(mask[:, None], products / hyper.tau_token, contrastive.MASKED_LOGIT)
    contexts = jax.nn.softmax(logits_WP, 0).T @ words
    contexts = contrastive.l2_normalise(contexts) if normalise else contexts
    candidates = jnp.ones(len(pixels), bool)
    return contrast_contexts(pixels @ contexts.T / hyper.tau_token, candidates, weight)


def token_losses(images: Features, texts: Features, hyper: Hyper) -> Float[Array, "B"]:
    """Computes the sum of *equations 2 and 3* for each pair, `tile_size` pairs at a time."""
    normalise = hyper.normalise_patch_context or images.attention is None
    tile_size = min(hyper.tile_size, len(texts.mask))

    def pair_loss(pixels: Array, words: Array, constants: tuple[Array, Array, Array]) -> Array:
        mask, word_weight, patch_weight = constants
        items = pixels, words, words @ pixels.T
        value = word_loss(*items, mask, word_weight, hyper)
        return value + patch_loss(*items, mask, patch_weight, normalise, hyper)

    def map_pairs(function: Callable, arguments: tuple) -> Any:
        return lax.map(lambda pair: function(*pair), arguments, batch_size=tile_size)

    # A pair's gradient depends on nothing outside the pair but a factor. So the forward pass
    # computes it along with the value: no table [W W] or [P P] is stored for the backward pass, and
    # none is computed twice.
    @jax.custom_vjp
    def pair_losses(*arguments: Any) -> Array:
        return map_pairs(pair_loss, arguments)

    def forward(*arguments: Any) -> tuple[Array, tuple[Array, Array]]:
        return map_pairs(jax.value_and_grad(pair_loss, (0, 1)), arguments)

    def backward(grads: tuple[Array, Array], factor: Array) -> tuple[Array, Array, None]:
        pixels, words = (grad * factor[:, None, None] for grad in grads)
        return pixels, words, None

    pair_losses.defvjp(forward, backward)
    constants = texts.mask, word_attention_weights(texts, hyper), patch_attention_weights(images)
    pixels = contrastive.l2_normalise(images.local)
    return pair_losses(pixels, contrastive.l2_normalise(texts.local), constants)


def sinkhorn_codes(
    scores: Float[Array, "b *S K"], hyper: Hyper, axis: str | None = None
) -> Float[Array, "b *S K"]:
    """Computes soft assignments of items to prototypes, all prototypes used about equally.

    *Sinkhorn and Knopp's iteration on exp(scores / epsilon):* every prototype's share of the batch
    is made equal, then every item's shares are made to sum to 1. The batch is that of all devices,
    which exchange one sum for each prototype. There is no gradient.
    """
    # In logarithms, since exp(scores / epsilon) overflows for a small epsilon.
    log_codes = lax.stop_gradient(scores) / hyper.epsilon
    for _ in range(hyper.sinkhorn_iterations):
        shares = contrastive.logsumexp_over_devices(jax.nn.logsumexp(log_codes, 0), axis)
        log_codes = jax.nn.log_softmax(log_codes - shares, -1)
    return jnp.exp(log_codes)


def prototype_loss(
    prototypes: Float[Array, "K D"],
    images: Float[Array, "b D"],
    texts: Float[Array, "b D"],
    step: Array,
    hyper: Hyper,
    axis: str | None = None,
) -> Float[Array, ""]:
    """Computes the prediction of each side's codes from the other side: *equation 4*.

    The result is the mean of both directions, over the pairs of all devices.
    """
    frozen = step < hyper.freeze_prototype_steps
    prototypes = jnp.where(frozen, lax.stop_gradient(prototypes), prototypes)
    # The codes of both sides are computed at once, so that each exchange carries both.
    scores_b2K = contrastive.cosine_similarity(jnp.stack([images, texts], 1), prototypes)
    targets_b2K = sinkhorn_codes(scores_b2K, hyper, axis)[:, ::-1]
    losses_b2 = optax.softmax_cross_entropy(scores_b2K / hyper.tau_prototype, targets_b2K)
    return contrastive.mean(losses_b2.mean(1), axis)


def similarity(
    params: Params,
    memory: Memory,
    images: Features,
    texts: Features,
    hyper: Hyper,
    axis: str | None = None,
) -> dict[str, Float[Array, "I T"]]:
    """Returns `global`, the cosine of all images with all texts, in [-1, 1]."""
    return {"global": contrastive.cosine_similarity(images.pooled, texts.pooled)}


def heatmap(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B W P"], Float[Array, "B W"]]:
    """Returns the cosine of each word with each patch, and the words' weights in the loss."""
    return contrastive.word_pixel_maps(texts, images), word_attention_weights(texts, hyper)


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
    """Computes the weighted sum of *equations 1, 2 + 3 and 4*.

    With `contrast="sigmoid"`, `contrastive.sigmoid_loss` replaces equation 1; with `per_device` its
    negatives are those of one device too.
    """
    token = contrastive.mean(token_losses(images, texts, hyper), axis)
    # Without an axis nothing is exchanged: each device then has its own negatives and codes.
    group = None if hyper.per_device else axis
    if hyper.contrast == "sigmoid":
        report = contrastive.sigmoid_loss(images.pooled, texts.pooled, params, group)
    else:
        text_pooled = contrastive.all_gather(texts.pooled, group)
        cosines = contrastive.cosine_similarity(images.pooled, text_pooled)
        report = jnp.add(*contrastive.info_nce(cosines / hyper.tau, group))
    prototype = prototype_loss(
        params["prototypes"], images.pooled, texts.pooled, step, hyper, group
    )
    if hyper.per_device:
        report, prototype = contrastive.mean(jnp.stack([report, prototype])[None], axis)
    value = hyper.weight_global * report + hyper.weight_token * token
    value += hyper.weight_prototype * prototype
    metrics = {"loss_global": report, "loss_token": token, "loss_prototype": prototype}
    return value, (metrics, memory)
