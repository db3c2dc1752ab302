"""GLoRIA: global contrast, and contrast of words with the regions they attend to.

PAPER: Huang et al., GLoRIA: A Multimodal Global-Local Representation Learning Framework for
Label-efficient Medical Image Recognition, ICCV 2021; code github.com/marshuang80/gloria.
Established, paper and code: every equation and constant below.

Deviation: retrieval uses the similarity of the loss; the code trains with the sum over words of
exp(5 cos) and retrieves with the maximum (`retrieval_score="max"` gives the latter).
Deviation: scores are computed on packed words (`gloria_packed.py`, equations 4 to 7) instead of in
a loop over captions with their words repeated, and negatives come from all devices.
Deviation: [CLS] is not counted as a word (the code slices its words from it).
`normalise_attention=True` (ours) uses cosines instead of raw products in the attention: with a
shared space of 64 and BatchNorm in the heads, raw products saturate both of its softmaxes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from plan_jax.methods import contrastive, gloria_packed
from plan_jax.methods.ranges import FACTOR, WEIGHT, Range, check_hyper
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params

PAPER = (
    "Huang et al., GLoRIA: A Multimodal Global-Local Representation Learning Framework for "
    "Label-efficient Medical Image Recognition, ICCV 2021, github.com/marshuang80/gloria"
)
REQUIRES: tuple[str, ...] = ()
IMAGE_FEATURES = ("pooled", "local")
TEXT_FEATURES = ("pooled", "local", "mask")


@dataclass(frozen=True)
class Hyper:
    """Constants of the code's configuration: three temperatures (as factors) and two weights."""

    attention_sharpness: float = 4.0  # temp1: of a word's attention over regions
    word_sharpness: float = 5.0  # temp2: of the soft maximum over words
    logit_scale: float = 10.0  # temp3: factor on similarities in the contrast
    weight_local: float = 1.0  # of the contrast of words with regions
    weight_global: float = 1.0  # of the contrast of whole images and reports
    normalise_attention: bool = False  # cosines in place of products in the attention (ours)
    retrieval_score: Literal["sum", "max"] = "sum"  # over the words of a text, in retrieval
    contrast: Literal["softmax", "sigmoid"] = "softmax"  # of the cosines; sigmoid: SigLIP's
    tile_size: int = 0  # words at a time, at least those of a text; 0: what suits the device

    def __post_init__(self) -> None:
        check_hyper(
            self,
            attention_sharpness=FACTOR,
            word_sharpness=FACTOR,
            logit_scale=FACTOR,
            weight_local=WEIGHT,
            weight_global=WEIGHT,
            tile_size=Range(0, 2**20),
        )


def init(key: PRNGKeyArray, context: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Returns the parameters of the sigmoid loss, if chosen; GLoRIA has only projection heads."""
    return contrastive.init_sigmoid(hyper.contrast), {}


def local_scores(
    pixels: Float[Array, "I P D"],
    words: Float[Array, "T W D"],
    mask: Bool[Array, "T W"],
    hyper: Hyper,
    kind: Literal["sum", "max"] = "sum",
) -> Float[Array, "I T"]:
    """Computes the local score of every text on every image.

    *Paper eq. 4-7:* `log sum_w exp(5 cos(w, c_w))`, or the largest `5 cos(w, c_w)` for
    `kind="max"`. *As in the code,* the region c_w of a word is the mean of the pixels with weights
    `softmax_p(4 softmax_w <w, p>)`.
    """
    if hyper.normalise_attention:
        pixels, words = contrastive.l2_normalise(pixels), contrastive.l2_normalise(words)

    def score_in_blocks(block_size: int, pixels: Array, words: Array, mask: Array) -> Array:
        settings = gloria_packed.ScoreSettings(
            hyper.attention_sharpness, hyper.word_sharpness, kind, block_size
        )
        return gloria_packed.word_region_scores(pixels, words, mask, settings)

    if hyper.tile_size:
        return score_in_blocks(hyper.tile_size, pixels, words, mask)
    # Small blocks stay in the caches of a CPU; large ones keep a GPU's or TPU's matrix units busy.
    # The device is that for which the program is compiled, not that of the machine that compiles.
    small, large = (partial(score_in_blocks, size) for size in (128, 2048))
    return lax.platform_dependent(pixels, words, mask, cpu=small, default=large)


def similarity(
    params: Params,
    memory: Memory,
    images: Features,
    texts: Features,
    hyper: Hyper,
    axis: str | None = None,
) -> dict[str, Float[Array, "I T"]]:
    """Returns `global`, the cosine of all images with all texts; `local`, the score; `both`, their
    mean.
    """
    cosines = contrastive.cosine_similarity(images.pooled, texts.pooled)
    local = local_scores(images.local, texts.local, texts.mask, hyper, hyper.retrieval_score)
    return {"global": cosines, "local": local, "both": (cosines + local) / 2}


def heatmap(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B W P"], Float[Array, "B W"]]:
    """Returns the cosine of each word with each pixel, and equal weights for all words."""
    return contrastive.word_pixel_maps(texts, images), texts.mask.astype(jnp.float32)


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
    """Computes the contrast of the pairs of the whole batch, locally and globally.

    *Paper eq. 3, 8, 9:* both directions of InfoNCE on 10 x local score and on 10 x cosine, summed.
    With `contrast="sigmoid"` the latter is `contrastive.sigmoid_loss`.
    """
    # Each device scores its own images with all texts, so only texts are gathered.
    words, mask = contrastive.all_gather((texts.local, texts.mask), axis)
    local = local_scores(images.local, words, mask, hyper)
    loss_local = jnp.add(*contrastive.info_nce(hyper.logit_scale * local, axis))
    if hyper.contrast == "sigmoid":
        loss_global = contrastive.sigmoid_loss(images.pooled, texts.pooled, params, axis)
    else:
        text_pooled = contrastive.all_gather(texts.pooled, axis)
        cosines = contrastive.cosine_similarity(images.pooled, text_pooled)
        loss_global = jnp.add(*contrastive.info_nce(hyper.logit_scale * cosines, axis))
    value = hyper.weight_local * loss_local + hyper.weight_global * loss_global
    return value, ({"loss_local": loss_local, "loss_global": loss_global}, memory)
