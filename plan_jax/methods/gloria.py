"""GLoRIA: global contrast beside attention-weighted word-region contrast.

PAPER: Huang et al., GLoRIA: A Multimodal Global-Local Representation Learning Framework for
Label-efficient Medical Image Recognition, ICCV 2021; code github.com/marshuang80/gloria.
Established, paper and code: every equation and constant below.

Deviation: retrieval uses the similarity of the loss; the code trains with the sum over words of
exp(5 cos) and retrieves with the maximum (`retrieve="max"` gives the latter).
Deviation: scores are computed on packed words (`packing.py`, equations 4 to 7) instead of in a loop
over captions with their words repeated, and negatives come from all devices.
Deviation: [CLS] is not counted as a word (the code slices its words from it).
`normalise=True` (ours) takes cosines instead of raw products in the attention: with a shared space
of 64 and BatchNorm in the heads, raw products saturate both of its softmaxes.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from plan_jax.methods import contrastive, gloria_packed
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params

PAPER = "ICCV 2021, github.com/marshuang80/gloria"
REQUIRES: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hyper:
    """Constants of the code's configuration: three temperatures (as factors) and two weights."""

    attention: float = 4.0  # temp1: sharpness of a word's attention over regions
    words: float = 5.0  # temp2: sharpness of the soft maximum over words
    scale: float = 10.0  # temp3: factor on similarities in the contrast
    weight_local: float = 1.0
    weight_global: float = 1.0
    normalise: bool = False
    retrieve: Literal["sum", "max"] = "sum"
    tile: int = 0  # words at a time, at least a text's; 0: what suits the device


def init(key: PRNGKeyArray, setting: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Make the method's own parameters and memory: GLoRIA has none beside its heads."""
    return {}, {}


def local_scores(
    pixels: Float[Array, "I P D"],
    words: Float[Array, "T W D"],
    mask: Bool[Array, "T W"],
    hyper: Hyper,
    kind: Literal["sum", "max"] = "sum",
) -> Float[Array, "I T"]:
    """Score every text on every image: *eq. 4-7:* `log sum_w exp(5 cos(w, region_w))`, or its max.

    *As in the code,* a word's region is the mean of the pixels with weights: the softmax over words
    of `<w, p>`, times 4, softmax over pixels.
    """
    if hyper.normalise:
        pixels, words = contrastive.l2_normalise(pixels), contrastive.l2_normalise(words)
    slots = hyper.tile or (128 if jax.default_backend() == "cpu" else 2048)
    form = gloria_packed.Form(hyper.attention, hyper.words, kind, slots)
    return gloria_packed.scores(pixels, words, mask, form)


def similarity(
    params: Params,
    memory: Memory,
    images: Features,
    texts: Features,
    hyper: Hyper,
    axis: str | None = None,
) -> dict[str, Float[Array, "I T"]]:
    """Compare all images with all texts: `global` cosine, `local` score, `both` their mean."""
    cosines = contrastive.cosine_similarity(images.pooled, texts.pooled)
    local = local_scores(images.local, texts.local, texts.mask, hyper, hyper.retrieve)
    return {"global": cosines, "local": local, "both": (cosines + local) / 2}


def heatmap(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B W P"], Float[Array, "B W"]]:
    """Map the cosine of each word with each pixel; all words weigh the same."""
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
    """Contrast the pairs of the whole batch, locally and globally.

    *Paper eq. 3, 8, 9:* both directions of InfoNCE on 10 x local score and on 10 x cosine, summed.
    """
    texts = contrastive.all_gather(texts, axis)
    cosines = contrastive.cosine_similarity(
        contrastive.all_gather(images.pooled, axis), texts.pooled
    )
    local = contrastive.all_gather(local_scores(images.local, texts.local, texts.mask, hyper), axis)
    total_local = sum(contrastive.info_nce(hyper.scale * local))
    total_global = sum(contrastive.info_nce(hyper.scale * cosines))
    value = hyper.weight_local * total_local + hyper.weight_global * total_global
    return value, ({"loss_local": total_local, "loss_global": total_global}, memory)
