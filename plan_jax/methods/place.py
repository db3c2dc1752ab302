"""PLACE: alignment of pathology observations, and correlations among patches given the report.

PAPER: Wang, Zhu, Yu, Bhalerao, He, PLACE, arXiv 2506.10573. Only its abstract and a summary by
others are public: this is a PLACE-style reconstruction, not checked against the authors' code.

Established (abstract): pathological-level cross-modal alignment (PCMA), so that the pathology
observations of image and report agree, without disease labels; a Visual Pathology Observation
Extractor (VPOE), which computes the image's from localised tokens; a proxy task of correlations
among patches. Established by a summary only: pathology query tokens in the extractor; the proxy
task (CCE) predicts the covariance of patches conditioned on the report.

Ours, equation by equation (p, q pixels or patches, n words, m sentences, k queries, i image,
j text; x local pixels, w local words, r pixels before their head, or x if the encoder has none):
(1) VPOE                `o_k = unit(head(blocks(Q, x)_k))`: K learned queries; a block is
    self-attention, cross-attention to the pixels with weights `A_kp`, and an MLP, pre-norm
(2) text observation    `t_m = unit(head(mean of w_n over the words n of sentence m))`: a sentence
    is one observation; those after the first `max_sentences` are left out
(3) late interaction    `s_ij = mean_m max_k <t_jm, o_ik>`; "soft": a soft maximum; "attn": cosine
    of t_jm with `sum_k a_mk o_ik`, `a_mk = softmax_k(<t_jm, o_ik> / tau_match)`
(4) PCMA                InfoNCE of `s_ij / tau_local`, both directions summed; with "attn", among
    all sentences, each with its observation of its own image (which can give the pairing away)
(5) variety             `mean_{k != l} <o_k, o_l>^2`, so that the queries do not all become one
(6) correlations        `C_pq` = cosine of r_p and r_q, after each channel has been standardised
    over the pixels; no gradient
(7) prediction          a learned token hides some patches; a decoder (blocks as in (1), from pixels
    to words, with a code of each position) returns y_p, and
    `G_pq = cos(y_p - mean y, y_q - mean y)`
(8) CCE                 mean of `(G_pq - C_pq)^2` over pairs p != q that touch a hidden patch
(9) ITA                 InfoNCE of the global cosines / tau, both directions summed, as in MGCA
(10) loss               ITA + PCMA + CCE + 0.1 variety
(11) heat map           `h / (1 + h)`, `h_mp = P sum_k a_mk A_kp` (last block, mean over heads): how
    much the observations that match a word's sentence m attend to p, relative to uniform
    attention. No loss ties single words to pixels, so their cosines would mean nothing.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from plan_jax.layers.transformer import TransformerLayer, attention_weights
from plan_jax.methods import contrastive
from plan_jax.methods.ranges import BLOCKS, COUNT, FRACTION, TEMPERATURE, WEIGHT, Range, check_hyper
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params, UserError

PAPER = (
    "Wang, Zhu, Yu, Bhalerao, He, PLACE, arXiv 2506.10573; reconstructed here from what is public, "
    "without the authors' code"
)
REQUIRES: tuple[str, ...] = ()
IMAGE_FEATURES = ("pooled", "local", "raw")
TEXT_FEATURES = ("pooled", "local", "mask", "sentence")
IMAGE_TILE = 64  # images whose observations are extracted at a time


@dataclass(frozen=True)
class Hyper:
    """All constants; every one is ours, since the paper's are not public."""

    num_queries: int = 8  # K
    num_blocks: int = 1  # of the extractor
    num_decoder_blocks: int = 1  # of the decoder of (7)
    num_heads: int = 4  # of every attention; D has to be divisible by it
    max_sentences: int = 12  # of a report; later ones are left out
    match: Literal["max", "soft", "attn"] = "max"  # how a sentence meets the observations (3)
    contrast: Literal["softmax", "sigmoid"] = "softmax"  # of ITA; sigmoid: SigLIP's, without tau
    tau: float = 0.07  # of ITA
    tau_local: float = 0.07  # of PCMA
    tau_match: float = 0.1  # of "soft" and "attn", and of the weights of queries in the heat map
    mask_ratio: float = 0.5  # share of the patches hidden in CCE; at least one patch is hidden
    weight_pcma: float = 1.0  # ITA has weight 1
    weight_cce: float = 1.0  # of (8)
    weight_variety: float = 0.1  # of (5)
    tile_size: int = 4  # texts (scores) or images (CCE) at a time

    def __post_init__(self) -> None:
        check_hyper(
            self,
            num_queries=Range(1, 2**12),
            num_blocks=BLOCKS,
            num_decoder_blocks=BLOCKS._replace(low=0),
            num_heads=COUNT,
            max_sentences=COUNT,
            tau=TEMPERATURE,
            tau_local=TEMPERATURE,
            tau_match=TEMPERATURE,
            mask_ratio=FRACTION,
            weight_pcma=WEIGHT,
            weight_cce=WEIGHT,
            weight_variety=WEIGHT,
            tile_size=COUNT,
        )


def _layer(width: int, num_heads: int, name: str) -> TransformerLayer:
    """Returns a pre-norm block: self-attention, cross-attention and an MLP.

    The attentions have no bias: that of the keys would never get a gradient.
    """
    return TransformerLayer(
        width,
        num_heads,
        4 * width,
        cross_attention=True,
        activation=nn.gelu,
        attention_bias=False,
        name=name,
    )


class Extractor(nn.Module):
    """K observations of an image from its pixels: *equation 1*."""

    hyper: Hyper

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "*B P D"]
    ) -> tuple[Float[Array, "*B K D"], Float[Array, "*B K P"]]:
        """Returns the observations, and their weights of the last block, averaged over heads."""
        dim = pixels.shape[-1]
        memory = nn.LayerNorm(name="norm")(pixels)
        x = self.param("queries", nn.initializers.normal(1.0), (self.hyper.num_queries, dim))
        x = jnp.broadcast_to(x, (*pixels.shape[:-2], *x.shape))
        for n in range(self.hyper.num_blocks):
            layer = _layer(dim, self.hyper.num_heads, f"block{n}")
            x, _, cross = layer(x, memory=layer.project_memory(memory))
        x = nn.Dense(dim, name="head")(nn.LayerNorm(name="norm_out")(x))
        weights = attention_weights(cross.query, cross.key).mean(-3)
        return contrastive.l2_normalise(x), weights


class Decoder(nn.Module):
    """A vector for each patch, from the visible patches and the words: *equation 7*.

    Nothing after the last block has a bias, because the predictions are centred over the patches.
    """

    hyper: Hyper

    @nn.compact
    def __call__(
        self,
        pixels: Float[Array, "*B P D"],
        hidden: Bool[Array, "*B P"],
        words: Float[Array, "*B W D"],
        mask: Bool[Array, "*B W"],
        position_code: Float[Array, "P D"],
    ) -> Float[Array, "*B P D"]:
        """Returns the prediction; the patches in `hidden` are replaced by a learned token."""
        dim = pixels.shape[-1]
        token = self.param("token", nn.initializers.normal(0.02), (dim,))
        x = jnp.where(hidden[..., None], token, nn.LayerNorm(name="norm_pixels")(pixels))
        x = x + position_code
        memory = nn.LayerNorm(name="norm_words")(words) * mask[..., None]
        for n in range(self.hyper.num_decoder_blocks):
            layer = _layer(dim, self.hyper.num_heads, f"block{n}")
            word_mask = mask[..., None, None, :]
            x = layer(x, memory=layer.project_memory(memory), memory_mask=word_mask).x
        x = nn.LayerNorm(use_bias=False, name="norm_out")(x)
        return nn.Dense(dim, False, name="out")(x)


def init(key: PRNGKeyArray, context: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Returns the parameters of extractor, sentence head and decoder, all of width D; no memory.

    Parameters of the sigmoid loss are beside them, if it is chosen.

    Raises:
      UserError: D is not divisible by the number of heads.
    """
    dim = context.dim
    if dim % hyper.num_heads:
        raise UserError(
            f"hyper.num_heads is {hyper.num_heads}, which does not divide config.embed_dim {dim}; "
            f"use a divisor of {dim}"
        )
    keys = jax.random.split(key, 3)
    x, mask = jnp.zeros((1, dim)), jnp.ones(1, bool)
    variables = {
        "extractor": Extractor(hyper).init(keys[0], x),
        "sentence": nn.Dense(dim).init(keys[1], x),
        "decoder": Decoder(hyper).init(keys[2], x, mask, x, mask, x),
    }
    params = {name: module["params"] for name, module in variables.items()}
    return params | contrastive.init_sigmoid(hyper.contrast), {}


def extract_observations(
    params: Params, pixels: Float[Array, "B P D"], hyper: Hyper
) -> tuple[Float[Array, "B K D"], Float[Array, "B K P"]]:
    """Computes the K observations of each image and their attention over pixels: *equation 1*."""
    observations: Any = Extractor(hyper).apply({"params": params["extractor"]}, pixels)
    return observations


def sentence_membership(texts: Features, hyper: Hyper) -> Float[Array, "B W M"]:
    """Returns 1 where a word belongs to a sentence, else 0; padding and late sentences have 0."""
    # A text of W words has at most W sentences. one_hot of a larger index, or of -1, is all 0.
    count = min(hyper.max_sentences, texts.mask.shape[1])
    return jax.nn.one_hot(texts.sentence, count) * texts.mask[..., None]


def sentence_observations(
    params: Params, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B M D"], Bool[Array, "B M"]]:
    """Computes the observation of each sentence, and which sentences exist: *equation 2*."""
    membership_BWM = sentence_membership(texts, hyper)
    num_words = membership_BWM.sum(1)
    totals = jnp.einsum("bwd,bwm->bmd", texts.local, membership_BWM)
    means = totals / jnp.maximum(num_words, 1)[..., None]
    projected: Any = nn.Dense(means.shape[-1]).apply({"params": params["sentence"]}, means)
    real = num_words > 0
    return contrastive.l2_normalise(projected) * real[..., None], real


def query_weights(
    observations: Float[Array, "*B K D"], sentences: Float[Array, "*B M D"], hyper: Hyper
) -> Float[Array, "*B M K"]:
    """Computes the weight of each query for each sentence: the `a_mk` of *equation 3*."""
    products = jnp.einsum("...md,...kd->...mk", sentences, observations)
    return jax.nn.softmax(products / hyper.tau_match, -1)


def late_interaction(
    observations: Float[Array, "I K D"],
    sentences: Float[Array, "T M D"],
    real: Bool[Array, "T M"],
    hyper: Hyper,
) -> Float[Array, "I T"]:
    """Computes the score of every text on every image: *equation 3*; 0 for an empty text.

    Scores are in [-1, 1].
    """

    def score(observations: Array, text: tuple[Array, Array]) -> Array:
        sentences, real = text
        if hyper.match == "attn":
            mixtures = query_weights(observations, sentences, hyper) @ observations
            matches_M = jnp.sum(sentences * contrastive.l2_normalise(mixtures), -1)
        elif hyper.match == "soft":
            matches_M = contrastive.soft_maximum(sentences @ observations.T, hyper.tau_match)
        else:
            matches_M = jnp.max(sentences @ observations.T, -1)
        return contrastive.masked_mean(matches_M, real)

    return contrastive.score_all_pairs(score, observations, (sentences, real), hyper.tile_size)


def contrast_sentences(
    observations: Float[Array, "b K D"],
    sentences: Float[Array, "b M D"],
    real: Bool[Array, "b M"],
    hyper: Hyper,
    axis: str | None = None,
) -> Float[Array, ""]:
    """Computes the contrast of all sentences of the batch for "attn": *equation 4*.

    A sentence is paired with the mixture of the observations of its own image, weighted by itself.
    Each device compares the mixtures of its own b images with the sentences of all devices.
    """
    mixtures = query_weights(observations, sentences, hyper) @ observations
    mixtures = contrastive.l2_normalise(mixtures).reshape(real.size, -1)
    items = sentences.reshape(real.size, -1), real.ravel()
    all_sentences, all_real = contrastive.all_gather(items, axis)
    losses = contrastive.pair_cross_entropies(
        mixtures @ all_sentences.T / hyper.tau_local, axis, real.ravel(), all_real
    )
    total = contrastive.total(jnp.sum(jnp.add(*losses) * real.ravel()), axis)
    return total / jnp.maximum(all_real.sum(), 1)


def observation_overlap(observations: Float[Array, "B K D"]) -> Float[Array, " B"]:
    """Computes how similar an image's observations are: *equation 5*; 1: equal, 0: orthogonal."""
    squares = jnp.einsum("bkd,bld->bkl", observations, observations) ** 2
    off_diagonal = 1 - jnp.eye(observations.shape[1])
    return jnp.sum(squares * off_diagonal, (1, 2)) / jnp.maximum(off_diagonal.sum(), 1)


def patch_correlations(tokens: Float[Array, "P E"]) -> Float[Array, "P P"]:
    """Computes the correlations of the patches of an image: *equation 6*; no gradient."""
    tokens = lax.stop_gradient(tokens.astype(jnp.float32))
    centred = tokens - tokens.mean(0)
    standardised = centred * lax.rsqrt(jnp.mean(centred**2, 0) + 1e-8)
    return contrastive.cosine_similarity(standardised, standardised)


def sinusoidal_positions(grid: tuple[int, int], dim: int) -> Float[Array, "P D"]:
    """Returns sines and cosines of the row and column of each patch (D/4 frequencies each)."""
    frequencies = 10000.0 ** (-jnp.arange(0, 1, 4 / dim))
    angles = jnp.concatenate(
        [index.reshape(-1, 1) * frequencies for index in jnp.indices(grid)], -1
    )
    # D need not be divisible by 4: what is too much is cut off.
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], -1)[:, :dim]


def correlation_error(
    predicted: Float[Array, "P P"], true: Float[Array, "P P"], hidden: Bool[Array, "P"]
) -> Float[Array, ""]:
    """Computes the mean squared error over the pairs that touch a hidden patch: *equation 8*."""
    # Visible pairs would only teach the decoder to copy; the diagonal is 1 by definition.
    mask = (hidden[:, None] | hidden[None, :]) & ~jnp.eye(len(hidden), dtype=bool)
    return contrastive.masked_mean((predicted - true) ** 2, mask)


def sample_patch_mask(
    key: PRNGKeyArray, count: int, num_pixels: int, hyper: Hyper, axis: str | None = None
) -> Bool[Array, "B P"]:
    """Samples the patches to hide in each of `count` images, the same on any number of devices."""
    indices = contrastive.global_indices(count, axis)
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(indices)
    noise_BP = jax.vmap(lambda key: jax.random.uniform(key, (num_pixels,)))(keys)
    # An exact number, so that images count alike; at least one, so that there is an error at all.
    num_hidden = min(max(round(hyper.mask_ratio * num_pixels), 1), num_pixels)
    patches = lax.top_k(noise_BP, num_hidden)[1]
    return jax.nn.one_hot(patches, num_pixels, dtype=bool).any(1)


def correlation_losses(
    params: Params, images: Features, texts: Features, hidden: Bool[Array, "B P"], hyper: Hyper
) -> Float[Array, " B"]:
    """Computes each image's CCE, `tile_size` images at a time: *equations 6-8*."""
    position_code = sinusoidal_positions(images.grid, images.local.shape[-1])

    def image_loss(item: tuple[Array, ...]) -> Array:
        pixels, hidden, words, mask, tokens = item
        predictions: Any = Decoder(hyper).apply(
            {"params": params["decoder"]}, pixels, hidden, words, mask, position_code
        )
        centred = predictions - predictions.mean(0)
        predicted = contrastive.cosine_similarity(centred, centred)
        return correlation_error(predicted, patch_correlations(tokens), hidden)

    tokens = images.local if images.raw is None else images.raw
    items = (images.local, hidden, texts.local, texts.mask, tokens)
    return contrastive.map_tiles(jax.vmap(image_loss), items, hyper.tile_size)


def similarity(
    params: Params,
    memory: Memory,
    images: Features,
    texts: Features,
    hyper: Hyper,
    axis: str | None = None,
) -> dict[str, Float[Array, "I T"]]:
    """Returns `global`, the cosine; `local`, *equation 3*; `both`, their sum at the loss's taus."""
    observations, _ = extract_observations(params, images.local, hyper)
    sentences, real = sentence_observations(params, texts, hyper)
    local = late_interaction(observations, sentences, real, hyper)
    cosines = contrastive.cosine_similarity(images.pooled, texts.pooled)
    is_sigmoid = hyper.contrast == "sigmoid"
    scale = jnp.exp(params["log_scale"]) if is_sigmoid else 1 / hyper.tau
    total = scale * cosines + local / hyper.tau_local
    return {"global": cosines, "local": local, "both": total}


def heatmap(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B W P"], Float[Array, "B W"]]:
    """Returns a map in [0, 1) for each word, that of its sentence, and weights: *equation 11*.

    1/2 means uniform attention; words of sentences left out have a map and a weight of 0.
    """
    observations, attention_BKP = extract_observations(params, images.local, hyper)
    sentences, _ = sentence_observations(params, texts, hyper)
    weights_BMK = query_weights(observations, sentences, hyper)
    level_BMP = weights_BMK @ attention_BKP * attention_BKP.shape[-1]
    membership_BWM = sentence_membership(texts, hyper)
    return membership_BWM @ (level_BMP / (1 + level_BMP)), membership_BWM.sum(-1)


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
    """Computes ITA, PCMA, CCE and variety over the whole batch, and their sum: *equation 10*.

    With `contrast="sigmoid"`, ITA is `contrastive.sigmoid_loss`.
    """
    observations = contrastive.map_tiles(
        lambda pixels: extract_observations(params, pixels, hyper)[0], images.local, IMAGE_TILE
    )
    sentences, real = sentence_observations(params, texts, hyper)
    if hyper.contrast == "sigmoid":
        ita = contrastive.sigmoid_loss(images.pooled, texts.pooled, params, axis)
    else:
        text_pooled = contrastive.all_gather(texts.pooled, axis)
        cosines = contrastive.cosine_similarity(images.pooled, text_pooled)
        ita = jnp.add(*contrastive.info_nce(cosines / hyper.tau, axis))
    if hyper.match == "attn":
        pcma = contrast_sentences(observations, sentences, real, hyper, axis)
    else:
        # Each device scores its own images with the sentences of all texts.
        sentences, real = contrastive.all_gather((sentences, real), axis)
        local = late_interaction(observations, sentences, real, hyper)
        pcma = jnp.add(*contrastive.info_nce(local / hyper.tau_local, axis))
    batch, num_pixels = images.local.shape[:2]
    hidden = sample_patch_mask(key, batch, num_pixels, hyper, axis)
    variety = contrastive.mean(observation_overlap(observations), axis)
    cce = contrastive.mean(correlation_losses(params, images, texts, hidden, hyper), axis)
    value = ita + hyper.weight_pcma * pcma + hyper.weight_cce * cce + hyper.weight_variety * variety
    metrics = {"loss_global": ita, "loss_pcma": pcma, "loss_cce": cce, "loss_variety": variety}
    return value, (metrics, memory)
