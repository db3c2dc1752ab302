"""GLoRIA: global contrast beside attention-weighted word-region contrast.

PAPER: Huang et al., GLoRIA: A Multimodal Global-Local Representation Learning Framework for
Label-efficient Medical Image Recognition, ICCV 2021; code github.com/marshuang80/gloria.
Established, paper and code: every equation and constant below.

Deviation: retrieval uses the similarity of the loss; the code trains with the sum over words of
exp(5 cos) and retrieves with the maximum (`retrieve="max"` gives the latter).
Deviation: scores are computed tile by tile instead of in a loop over captions with the regions
repeated, and negatives come from all devices.
Deviation: [CLS] is not counted as a word (the code slices its words from it).
`normalise=True` (ours) takes cosines instead of raw products in the attention: with a shared space
of 64 and BatchNorm in the heads, raw products saturate both of its softmaxes.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray

from plan_jax import align
from plan_jax.types import Features, Memory, Metrics, Params

PAPER = "ICCV 2021, github.com/marshuang80/gloria"
NEEDS: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hyper:
    """Constants of the code's configuration: three temperatures (as factors) and two weights."""

    attention: float = 4.0  # temp1: sharpness of a word's attention over regions
    words: float = 5.0  # temp2: sharpness of the soft maximum over words
    scale: float = 10.0  # temp3: factor on similarities in the contrast
    weight_local: float = 1.0
    weight_global: float = 1.0
    normalise: bool = False
    retrieve: str = "sum"  # or "max"
    tile: int = 4  # texts at a time


def init(key: PRNGKeyArray, dim: int, hyper: Hyper) -> tuple[Params, Memory]:
    """Make the method's own parameters and memory: GLoRIA has none beside its heads."""
    return {}, {}


def attend(
    pixels: Float[Array, "P D"], words: Float[Array, "W D"], mask: Bool[Array, "W"], hyper: Hyper
) -> tuple[Float[Array, "W P"], Float[Array, "W D"]]:
    """Give each word its attention over the pixels and the region it attends to.

    *Paper eq. 4-5 as in the code:* softmax over words of `<w, p>`, times 4, softmax over pixels.
    """
    if hyper.normalise:
        pixels, words = align.unit(pixels), align.unit(words)
    products = words @ pixels.T
    shares = jax.nn.softmax(jnp.where(mask[:, None], products, align.NEG), 0)
    attention = jax.nn.softmax(shares * hyper.attention, -1)
    return attention, attention @ pixels


def local_score(
    pixels: Float[Array, "P D"], words: Float[Array, "W D"], mask: Bool[Array, "W"], hyper: Hyper,
    kind: str = "sum",
) -> Float[Array, ""]:  # fmt: skip
    """Score one text on one image: *eq. 6-7:* `log sum_w exp(5 cos(w, region_w))`, or its max."""
    _, regions = attend(pixels, words, mask, hyper)
    match = hyper.words * jnp.sum(align.unit(words) * align.unit(regions), -1)
    if kind == "max":
        return jnp.max(jnp.where(mask, match, align.NEG))
    return align.masked_lse(match, mask)


def _local_scores(
    images: Features, texts: Features, hyper: Hyper, kind: str
) -> Float[Array, "I T"]:
    def score(pixels: Array, text: tuple[Array, Array]) -> Array:
        return local_score(pixels, *text, hyper, kind)

    return align.all_pairs(score, images.local, (texts.local, texts.mask), hyper.tile)


def similarity(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper,
    axis: str | None = None,
) -> dict[str, Float[Array, "I T"]]:  # fmt: skip
    """Compare all images with all texts: `global` cosine, `local` score, `both` their mean."""
    cosines = align.cosines(images.pooled, texts.pooled)
    local = _local_scores(images, texts, hyper, hyper.retrieve)
    return {"global": cosines, "local": local, "both": (cosines + local) / 2}


def heatmap(
    params: Params, memory: Memory, images: Features, texts: Features, hyper: Hyper
) -> tuple[Float[Array, "B W P"], Float[Array, "B W"]]:
    """Map the cosine of each word with each pixel; all words weigh the same."""
    maps = jnp.einsum("bwd,bpd->bwp", align.unit(texts.local), align.unit(images.local))
    return maps * texts.mask[..., None], texts.mask.astype(jnp.float32)


def loss(
    params: Params, memory: Memory, images: Features, texts: Features, extra: dict[str, Any], *,
    key: PRNGKeyArray, step: Array, hyper: Hyper, axis: str | None = None,
) -> tuple[Float[Array, ""], tuple[Metrics, Memory]]:  # fmt: skip
    """Contrast the pairs of the whole batch, locally and globally.

    *Paper eq. 3, 8, 9:* both directions of InfoNCE on 10 x local score and on 10 x cosine, summed.
    """
    texts = align.gather(texts, axis)
    cosines = align.cosines(align.gather(images.pooled, axis), texts.pooled)
    local = align.gather(_local_scores(images, texts, hyper, "sum"), axis)
    total_local = sum(align.info_nce(hyper.scale * local))
    total_global = sum(align.info_nce(hyper.scale * cosines))
    value = hyper.weight_local * total_local + hyper.weight_global * total_global
    return value, ({"loss_local": total_local, "loss_global": total_global}, memory)
