"""ConVIRT: global image-report contrast, the reference without any local alignment.

PAPER: Zhang et al., Contrastive Learning of Medical Visual Representations from Paired Images and
Text, arXiv 2010.00747. Established: both equations of the loss and its constants. Ours: the heat
map, since the paper has none. It is a class activation map: the cosine of each pixel, sent through
the global head, with the embedding of the whole phrase.

Deviation: negatives come from all devices, not from one.
"""

from dataclasses import dataclass
from typing import Any, Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, PRNGKeyArray

from plan_jax.methods import contrastive
from plan_jax.methods.ranges import FRACTION, TEMPERATURE, check_hyper
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params

PAPER = (
    "Zhang et al., Contrastive Learning of Medical Visual Representations from Paired Images and "
    "Text, arXiv 2010.00747"
)
REQUIRES: tuple[str, ...] = ()
IMAGE_FEATURES = ("pooled",)
TEXT_FEATURES = ("pooled",)


@dataclass(frozen=True)
class Hyper:
    """Constants of the paper (section 3.4)."""

    tau: float = 0.1  # temperature of the contrast
    image_to_text: float = 0.75  # lambda: weight of image to text; text to image has the rest
    contrast: Literal["softmax", "sigmoid"] = "softmax"  # sigmoid: SigLIP's, without tau and lambda

    def __post_init__(self) -> None:
        check_hyper(self, tau=TEMPERATURE, image_to_text=FRACTION)


def init(key: PRNGKeyArray, context: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Returns the parameters of the sigmoid loss, if chosen; ConVIRT has none of its own."""
    return contrastive.init_sigmoid(hyper.contrast), {}


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
    """Returns each pixel's cosine with the whole text, the same map for every word, weights 1."""
    pixels = contrastive.l2_normalise(images.local)
    maps_BP = jnp.einsum("bpd,bd->bp", pixels, contrastive.l2_normalise(texts.pooled))
    weight_BW = texts.mask.astype(jnp.float32)
    return maps_BP[:, None, :] * weight_BW[..., None], weight_BW


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
    """Computes the contrast of the pairs of the whole batch.

    *Paper eq. 2-4:* `lambda L_image_to_text + (1 - lambda) L_text_to_image`, each InfoNCE of the
    cosines / tau. With `contrast="sigmoid"` it is `contrastive.sigmoid_loss` instead.
    """
    if hyper.contrast == "sigmoid":
        value = contrastive.sigmoid_loss(images.pooled, texts.pooled, params, axis)
        return value, ({"loss_global": value}, memory)
    text_pooled = contrastive.all_gather(texts.pooled, axis)
    cosines = contrastive.cosine_similarity(images.pooled, text_pooled)
    image_to_text, text_to_image = contrastive.info_nce(cosines / hyper.tau, axis)
    value = hyper.image_to_text * image_to_text + (1 - hyper.image_to_text) * text_to_image
    return value, ({"loss_global": value}, memory)
