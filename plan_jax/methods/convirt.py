"""ConVIRT: global image-report contrast, the reference without any local alignment.

PAPER: Zhang et al., Contrastive Learning of Medical Visual Representations from Paired Images and
Text, arXiv 2010.00747. Established: both equations of the loss and its constants. Ours: the heat
map (the paper has none), a class activation map: each pixel through the global head against the
embedding of the whole phrase.

Deviation: negatives come from all devices, not from one.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from plan_jax.methods import contrastive
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params

PAPER = "arXiv 2010.00747"
REQUIRES: tuple[str, ...] = ()


@dataclass(frozen=True)
class Hyper:
    """Constants of the paper (section 3.4): temperature and the weight of image to text."""

    tau: float = 0.1
    image_to_text: float = 0.75


def init(key: PRNGKeyArray, setting: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Make the method's own parameters and memory: ConVIRT has none."""
    return {}, {}


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
    """Map each pixel's cosine with the whole text; the same map for every word, equal weights."""
    cam = jnp.einsum(
        "bpd,bd->bp", contrastive.l2_normalise(images.local), contrastive.l2_normalise(texts.pooled)
    )
    words = texts.mask.astype(jnp.float32)
    return cam[:, None, :] * words[..., None], words


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
    """Contrast the pairs of the whole batch.

    *Paper eq. 2-4:* `lambda l_image_to_text + (1 - lambda) l_text_to_image` on cosines / tau.
    """
    images, texts = contrastive.all_gather((images, texts), axis)
    cosines = similarity(params, memory, images, texts, hyper)["global"]
    forward, backward = contrastive.info_nce(cosines / hyper.tau)
    value = hyper.image_to_text * forward + (1 - hyper.image_to_text) * backward
    return value, ({"loss_global": value}, memory)
