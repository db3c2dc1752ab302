"""PLACE: alignment of pathology observations, beside correlations among patches given the report.

PAPER: Wang, Zhu, Yu, Bhalerao, He, PLACE, arXiv 2506.10573. Only its abstract and a summary by
others are public: this is a PLACE-style reconstruction, not checked against the authors' code.

Established (abstract): pathological-level cross-modal alignment (PCMA), so that the pathology
observations of image and report agree, without disease labels; a Visual Pathology Observation
Extractor (VPOE), which makes the image's from localised tokens; a proxy task of correlations among
patches. Established by a summary only: pathology query tokens in the extractor; the proxy task
(CCE) predicts the covariance of patches conditioned on the report.

Ours, equation by equation (p, q pixels or patches, n words, m sentences, k queries, i image,
j text; x local pixels, w local words, r pixels before their head, or x if the tower gives none):
(1) VPOE                `o_k = unit(head(blocks(Q, x)_k))`: K learned queries; a block is
    self-attention, cross-attention to the pixels with weights `A_kp`, and an MLP, pre-norm
(2) said observation    `t_m = unit(head(mean of w_n over the words n of sentence m))`: a sentence
    is one observation; those after the first `sentences` are left out
(3) late interaction    `s_ij = mean_m max_k <t_jm, o_ik>`; "soft": a soft maximum; "attn": cosine
    of t_jm with `sum_k a_mk o_ik`, `a_mk = softmax_k(<t_jm, o_ik> / tau_match)`
(4) PCMA                InfoNCE of `s_ij / tau_local`, both directions summed; with "attn", among
    all sentences, each with what it chose in its own image (which can give the pairing away)
(5) variety             `mean_{k != l} <o_k, o_l>^2`, so that the queries do not all become one
(6) correlations        `C_pq` = correlation over channels of r_p and r_q, after each channel has
    been standardised over the pixels; no gradient
(7) prediction          a learned token hides some patches; a decoder (blocks as in (1), from pixels
    to words, told each place) gives y_p, and `G_pq = cos(y_p - mean y, y_q - mean y)`
(8) CCE                 mean of `(G_pq - C_pq)^2` over pairs p != q that touch a hidden patch
(9) ITA                 InfoNCE of the global cosines / tau, both directions summed, as in MGCA
(10) loss               ITA + PCMA + CCE + 0.1 variety
(11) heat map           `h / (1 + h)`, `h_mp = P sum_k a_mk A_kp` (last block, mean over heads): how
    much the observations that a word's sentence m chooses look at p, relative to an even look.
    No loss ties single words to pixels, so their cosines would say nothing.
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
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params, UserError

PAPER = "arXiv 2506.10573"
REQUIRES: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hyper:
    """All constants; every one is ours, since the paper's are not public."""

    queries: int = 8  # K
    blocks: int = 1  # of the extractor
    decoder_blocks: int = 1
    heads: int = 4  # of every attention; they divide D
    sentences: int = 12  # of a report, at most
    match: Literal["max", "soft", "attn"] = "max"
    tau: float = 0.07  # of ITA
    tau_local: float = 0.07  # of PCMA
    tau_match: float = 0.1  # of "soft" and "attn", and of the heat map's choice of queries
    hidden: float = 0.5  # share of the patches hidden in CCE
    weight_pcma: float = 1.0  # ITA weighs 1
    weight_cce: float = 1.0
    weight_variety: float = 0.1
    tile: int = 4  # texts (scores) or images (CCE) at a time


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
    """Makes K observations of an image from its pixels: *equation 1*."""

    hyper: Hyper

    @nn.compact
    def __call__(
        self, pixels: Float[Array, "*B P D"]
    ) -> tuple[Float[Array, "*B K D"], Float[Array, "*B K P"]]:
        """Returns the observations, and their weights of the last block, averaged over heads."""
        dim = pixels.shape[-1]
        memory = nn.LayerNorm(name="norm")(pixels)
        x = self.param("queries", nn.initializers.normal(1.0), (self.hyper.queries, dim))
        x = jnp.broadcast_to(x, (*pixels.shape[:-2], *x.shape))
        for n in range(self.hyper.blocks):
            layer = _layer(dim, self.hyper.heads, f"block{n}")
            x, _, cross = layer(x, memory=layer.project_memory(memory))
        x = nn.Dense(dim, name="head")(nn.LayerNorm(name="norm_out")(x))
        weights = attention_weights(cross.query, cross.key).mean(-3)
        return contrastive.l2_normalise(x), weights


class Decoder(nn.Module):
    """Guesses a vector for each patch from the patches left and the words: *equation 7*.

    Nothing after the last block has a bias: the guesses are centred over the patches.
    """

    hyper: Hyper

    @nn.compact
    def __call__(
        self,
        pixels: Float[Array, "*B P D"],
        hidden: Bool[Array, "*B P"],
        words: Float[Array, "*B W D"],
        mask: Bool[Array, "*B W"],
        place: Float[Array, "P D"],
    ) -> Float[Array, "*B P D"]:
        """Apply it; `place` encodes where each patch is."""
        dim = pixels.shape[-1]
        token = self.param("token", nn.initializers.normal(0.02), (dim,))
        x = jnp.where(hidden[..., None], token, nn.LayerNorm(name="norm_pixels")(pixels)) + place
        memory = nn.LayerNorm(name="norm_words")(words) * mask[..., None]
        for n in range(self.hyper.decoder_blocks):
            layer = _layer(dim, self.hyper.heads, f"block{n}")
            word_mask = mask[..., None, None, :]
            x = layer(x, memory=layer.project_memory(memory), memory_mask=word_mask).x
        x = nn.LayerNorm(use_bias=False, name="norm_out")(x)
        return nn.Dense(dim, False, name="out")(x)


def init(key: PRNGKeyArray, setting: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Make extractor, head of sentences and decoder, all of width D; there is no memory.

    Raises:
      UserError: the heads do not divide D.
    """
    dim = setting.dim
    if dim % hyper.heads:
        raise UserError(f"hyper.heads {hyper.heads} do not divide dim {dim}; choose a divisor")
    keys = jax.random.split(key, 3)
    x, mask = jnp.zeros((1, dim)), jnp.ones(1, bool)
    made = {
        "extractor": Extractor(hyper).init(keys[0], x),
        "sentence": nn.Dense(dim).init(keys[1], x),
        "decoder": Decoder(hyper).init(keys[2], x, mask, x, mask, x),
    }
    return {name: variables["params"] for name, variables in made.items()}, {}


def observe(
    params: Params, pixels: Float[Array, "B P D"], hyper: Hyper
) -> tuple[Float[Array, "B K D"], Float[Array, "B K P"]]:
    """Make the K observations of each image and the weights of their looks: *equation 1*."""
    return Extractor(hyper).apply({"params": params["extractor"]}, pixels)


def members(texts: Features, hyper: Hyper) -> Float[Array, "B W M"]:
    """Say which sentence each word belongs to, 0 or 1; all 0 for padding and what is left out."""
    count = min(hyper.sentences, texts.mask.shape[1])
    return jax.nn.one_hot(texts.sentence, count) * texts.mask[..., None]


def say(
    params: Params, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B M D"], Bool[Array, "B M"]]:
    """Make the observation of each sentence, and say which are there: *equation 2*."""
    member = members(texts, hyper)
    size = member.sum(1)
    mean = jnp.einsum("bwd,bwm->bmd", texts.local, member) / jnp.maximum(size, 1)[..., None]
    said = nn.Dense(mean.shape[-1]).apply({"params": params["sentence"]}, mean)
    return contrastive.l2_normalise(said) * (size > 0)[..., None], size > 0


def choose(
    seen: Float[Array, "*B K D"], said: Float[Array, "*B M D"], hyper: Hyper
) -> Float[Array, "*B M K"]:
    """Give the share of each query in each sentence: the `a_mk` of *equation 3*."""
    return jax.nn.softmax(jnp.einsum("...md,...kd->...mk", said, seen) / hyper.tau_match, -1)


def scores(
    seen: Float[Array, "I K D"], said: Float[Array, "T M D"], real: Bool[Array, "T M"], hyper: Hyper
) -> Float[Array, "I T"]:
    """Score every text on every image, in [-1, 1]: *equation 3*; 0 for an empty text."""

    def one(seen: Array, text: tuple[Array, Array]) -> Array:
        said, real = text
        if hyper.match == "attn":
            match = jnp.sum(said * contrastive.l2_normalise(choose(seen, said, hyper) @ seen), -1)
        elif hyper.match == "soft":
            match = contrastive.soft_maximum(said @ seen.T, hyper.tau_match)
        else:
            match = jnp.max(said @ seen.T, -1)
        return contrastive.masked_mean(match, real)

    return contrastive.score_all_pairs(one, seen, (said, real), hyper.tile)


def contrast_sentences(
    seen: Float[Array, "B K D"], said: Float[Array, "B M D"], real: Bool[Array, "B M"], hyper: Hyper
) -> Float[Array, ""]:
    """Contrast the sentences of the batch with what each chose in its own image: *equation 4*."""
    found = contrastive.l2_normalise(choose(seen, said, hyper) @ seen)
    logits = jnp.einsum("bmd,cnd->bmcn", said, found).reshape(real.size, -1) / hyper.tau_local
    own, among = jnp.arange(real.size), jnp.broadcast_to(real.ravel(), logits.shape)
    both = contrastive.cross_entropy(logits, own, among) + contrastive.cross_entropy(
        logits.T, own, among
    )
    return contrastive.masked_mean(both, real.ravel())


def overlap(seen: Float[Array, "B K D"]) -> Float[Array, " B"]:
    """Measure how alike an image's observations are: *equation 5*; 1: all one, 0: orthogonal."""
    squares = jnp.einsum("bkd,bld->bkl", seen, seen) ** 2
    others = 1 - jnp.eye(seen.shape[1])
    return jnp.sum(squares * others, (1, 2)) / jnp.maximum(others.sum(), 1)


def correlations(tokens: Float[Array, "P E"]) -> Float[Array, "P P"]:
    """Correlate the patches of an image: *equation 6*; no gradient."""
    tokens = lax.stop_gradient(tokens.astype(jnp.float32))
    away = tokens - tokens.mean(0)
    return contrastive.cosine_similarity(*[away * lax.rsqrt(jnp.mean(away**2, 0) + 1e-8)] * 2)


def place_code(grid: tuple[int, int], dim: int) -> Float[Array, "P D"]:
    """Encode the row and column of each patch by sines and cosines (D/4 frequencies each)."""
    wave = 10000.0 ** (-jnp.arange(0, 1, 4 / dim))
    angle = jnp.concatenate([x.reshape(-1, 1) * wave for x in jnp.indices(grid)], -1)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], -1)[:, :dim]


def mismatch(
    guessed: Float[Array, "P P"], true: Float[Array, "P P"], hidden: Bool[Array, "P"]
) -> Float[Array, ""]:
    """Compare correlations over the pairs of patches that touch a hidden one: *equation 8*."""
    counts = (hidden[:, None] | hidden[None, :]) & ~jnp.eye(len(hidden), dtype=bool)
    return contrastive.masked_mean((guessed - true) ** 2, counts)


def hide(
    key: PRNGKeyArray, count: int, pixels: int, hyper: Hyper, axis: str | None = None
) -> Bool[Array, "B P"]:
    """Draw each image's patches to hide, the same on any number of devices."""
    keys = jax.vmap(lambda n: jax.random.fold_in(key, n))(contrastive.global_indices(count, axis))
    noise = jax.vmap(lambda k: jax.random.uniform(k, (pixels,)))(keys)
    chosen = lax.top_k(noise, min(max(round(hyper.hidden * pixels), 1), pixels))[1]
    return jax.nn.one_hot(chosen, pixels, dtype=bool).any(1)


def explore(
    params: Params, images: Features, texts: Features, hidden: Bool[Array, "B P"], hyper: Hyper
) -> Float[Array, " B"]:
    """Measure each image's CCE, `tile` images at a time: *equations 6-8*."""
    place = place_code(images.grid, images.local.shape[-1])

    def one(item: tuple[Array, ...]) -> Array:
        *given, tokens = item
        y = Decoder(hyper).apply({"params": params["decoder"]}, *given, place)
        guessed = contrastive.cosine_similarity(*[y - y.mean(0)] * 2)
        return mismatch(guessed, correlations(tokens), given[1])

    tokens = images.local if images.raw is None else images.raw
    items = (images.local, hidden, texts.local, texts.mask, tokens)
    return contrastive.map_tiles(jax.vmap(one), items, hyper.tile)


def similarity(
    params: Params,
    memory: Memory,
    images: Features,
    texts: Features,
    hyper: Hyper,
    axis: str | None = None,
) -> dict[str, Float[Array, "I T"]]:
    """Compare all: `global` cosine, `local` *equation 3*, `both` their sum at the loss's taus."""
    seen, _ = observe(params, images.local, hyper)
    local = scores(seen, *say(params, texts, hyper), hyper)
    table = {"global": contrastive.cosine_similarity(images.pooled, texts.pooled), "local": local}
    return table | {"both": table["global"] / hyper.tau + local / hyper.tau_local}


def heatmap(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B W P"], Float[Array, "B W"]]:
    """Map where the observations look that each word's sentence chooses, in [0, 1): *equation 11*.

    1/2 is an even look; words of sentences left out have a map and a weight of 0.
    """
    seen, look = observe(params, images.local, hyper)
    said, _ = say(params, texts, hyper)
    level = choose(seen, said, hyper) @ look * look.shape[-1]
    member = members(texts, hyper)
    return member @ (level / (1 + level)), member.sum(-1)


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
    """Align pairs and their observations over the whole batch, and explore each: *equation 10*."""
    seen, _ = observe(params, images.local, hyper)
    pooled, said, real = contrastive.all_gather((texts.pooled, *say(params, texts, hyper)), axis)
    ita = sum(
        contrastive.info_nce(
            contrastive.cosine_similarity(contrastive.all_gather(images.pooled, axis), pooled)
            / hyper.tau
        )
    )
    if hyper.match == "attn":
        pcma = contrast_sentences(contrastive.all_gather(seen, axis), said, real, hyper)
    else:
        local = contrastive.all_gather(scores(seen, said, real, hyper), axis)
        pcma = sum(contrastive.info_nce(local / hyper.tau_local))
    hidden = hide(key, *images.local.shape[:2], hyper, axis)
    each = overlap(seen), explore(params, images, texts, hidden, hyper)
    variety, cce = (x.mean() for x in contrastive.all_gather(each, axis))
    value = ita + hyper.weight_pcma * pcma + hyper.weight_cce * cce + hyper.weight_variety * variety
    metrics = {"loss_global": ita, "loss_pcma": pcma, "loss_cce": cce, "loss_variety": variety}
    return value, (metrics, memory)
