"""ASG: regions aligned with sentences, and tags within an image and between pairs.

PAPER: Li et al., Anatomical Structure-Guided Medical Vision-Language Pre-training, MICCAI 2024,
arXiv 2403.09294; code github.com/ASGMVLP/ASGMVLP_CODE.
Established, code: the four losses, their weights and every constant below. Not released, and so
ours (`data/reports.py`, the dataset's boxes): what finds triplets in reports, what gives a sentence
to a region, where boxes come from.

(1) IRA   `s_ij = <x_i, y_j> / tau`, cross-entropy in both directions, their sum
(2) ARSA  region `rho_r` = RoIAlign of the unit pixels in box r, `sigma_r` = mean of the unit words
          of its sentences; cross-entropy of `rho sigma^T / tau` over the regions of one image, rows
          and columns, on the diagonal; mean over all regions of the batch
(3) IRL   frozen text features of F tags ask a decoder over the pixels which of them are there;
          binary cross-entropy, weight 5
(4) ERL   soft targets `Y = rows of 0.8 I + 0.2 <l_i, l_j> + 1e-6, to sum 1`, l the tags as a unit
          vector; `(KL(Y || p) + KL(p || Y)) / 2` with `p = softmax s`, in both directions

Deviation: boxes stay with their images; the code's collate function sorts a batch after numbering
the boxes' images.
Deviation: negatives of (1) and (4) come from all devices; the code's stay on their own.
Deviation: RoIAlign takes a pixel's centre at +1/2; `aligned=False` gives the code's, half a pixel
off.
Deviation: the texts of the tags are read once, not again in every step; by the model's own text
tower as it was at the start, mean over words, instead of a second, whole BERT's [CLS].
Deviation: where the widths of tags and pixels differ, pixels are projected (the released decoder
fits ViT only).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int8, PRNGKeyArray

from plan_jax.layers.transformer import TransformerLayer
from plan_jax.methods import contrastive
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params

PAPER = "arXiv 2403.09294, github.com/ASGMVLP/ASGMVLP_CODE"
REQUIRES: tuple[str, ...] = ("labels", "regions", "region_words")


@dataclass(frozen=True)
class Hyper:
    """Constants of the code (main.py, irl_model.py); the paper's are the same where it tells."""

    tau: float = 0.07
    soft: float = 0.2  # share of tag similarity in the soft targets
    smooth: float = 1e-6  # added to every soft target
    weight_region: float = 1.0
    weight_tags: float = 5.0
    weight_soft: float = 1.0
    layers: int = 4  # of the tag decoder
    heads: int = 4
    hidden: int = 1024
    dropout: float = 0.1
    aligned: bool = True  # RoIAlign with pixel centres at +1/2


class TagDecoder(nn.Module):
    """Asks an image for F tags: pre-norm transformer decoder, one logit a tag (equation 3)."""

    layers: int
    heads: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(
        self, tags: Float[Array, "F E"], pixels: Float[Array, "P C"], train: bool
    ) -> Float[Array, " F"]:
        """Give the logit of each tag for one image."""
        width = tags.shape[-1]
        if pixels.shape[-1] != width:
            pixels = nn.Dense(width, name="project")(pixels)
        key = self.make_rng("dropout") if train and self.dropout else None
        x = tags
        for n in range(self.layers):
            layer = TransformerLayer(
                width,
                self.heads,
                self.hidden,
                cross_attention=True,
                activation=nn.relu,
                epsilon=1e-5,
                dropout=self.dropout,
                hidden_dropout=self.dropout,
                attention_dropout=self.dropout,
                name=f"layer{n}",
            )
            layer_key = None if key is None else jax.random.fold_in(key, n)
            x = layer(x, key=layer_key, memory=layer.project_memory(pixels)).x
        x = nn.LayerNorm(1e-5, name="norm")(x)
        x = nn.Dropout(self.dropout, deterministic=not train)(x)
        return nn.Dense(1, name="logit")(x)[:, 0]


def decoder(hyper: Hyper) -> TagDecoder:
    """Make the tag decoder of these constants."""
    return TagDecoder(hyper.layers, hyper.heads, hyper.hidden, hyper.dropout)


def encode_tags(
    encode_names: Callable[[Sequence[str]], Features], findings: Sequence[str]
) -> Float[Array, "F E"]:
    """Returns the features of the dataset's findings as tags, before projection.

    A tag is the mean over the words of its name.
    """
    names = encode_names(findings)
    return jnp.sum(names.raw * names.mask[..., None], 1) / names.mask.sum(1, keepdims=True)


def init(key: PRNGKeyArray, setting: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Make the tag decoder; the memory holds the frozen features of the tags, [F E]."""
    pixels = jnp.zeros((1, setting.width))
    params = decoder(hyper).init(key, setting.tags, pixels, False)["params"]
    return {"decoder": params}, {"tags": setting.tags}


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
    """Map the cosine of each word with each pixel; all words weigh the same."""
    return contrastive.word_pixel_maps(texts, images), texts.mask.astype(jnp.float32)


def roi_weights(
    low: Float[Array, " R"], high: Float[Array, " R"], count: int, aligned: bool
) -> Float[Array, "R {count}"]:
    """Give how much each of `count` cells of one axis counts in RoIAlign to a single cell.

    *He et al., arXiv 1703.06870:* the mean of bilinear samples at `ceil(high - low)` even places;
    low and high are in cells. With `aligned=False` a box is at least one cell long.
    """
    length = high - low if aligned else jnp.maximum(high - low, 1.0)
    samples = jnp.clip(jnp.ceil(length), 1, count)[:, None]
    place = jnp.arange(count) + 0.5
    at = low[:, None] + place * length[:, None] / samples - 0.5 * aligned
    taken = (jnp.arange(count) < samples) & (at >= -1) & (at <= count)
    at = jnp.clip(at, 0, count - 1)
    hat = jnp.maximum(1 - jnp.abs(at[..., None] - jnp.arange(count)), 0)
    return jnp.sum(hat * taken[..., None], 1) / samples


def roi_align(
    pixels: Float[Array, "P D"], boxes: Float[Array, "R 4"], grid: tuple[int, int], aligned: bool
) -> Float[Array, "R D"]:
    """Average the pixels of each box (x0, y0, x1, y1; shares of the image): RoIAlign to 1 x 1."""
    rows, columns = grid
    across = roi_weights(boxes[:, 0] * columns, boxes[:, 2] * columns, columns, aligned)
    down = roi_weights(boxes[:, 1] * rows, boxes[:, 3] * rows, rows, aligned)
    return jnp.einsum("ry,rx,yxd->rd", down, across, pixels.reshape(rows, columns, -1))


def region_loss(
    pixels: Float[Array, "P D"],
    words: Float[Array, "W D"],
    boxes: Float[Array, "R 4"],
    said: Bool[Array, "R W"],
    grid: tuple[int, int],
    hyper: Hyper,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Contrast the regions of one image with their sentences: *equation 2*, (sum, regions).

    A region without a box (lost by a crop, or never given) or without a sentence does not take
    part; an image without any contributes nothing.
    """
    real = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1]) & said.any(-1)
    region = roi_align(pixels, boxes, grid, hyper.aligned)
    sentence = said @ words / jnp.maximum(said.sum(-1, keepdims=True), 1)
    logits = region @ sentence.T / hyper.tau
    mask = jnp.broadcast_to(real, logits.shape)
    target = jnp.arange(len(real))
    both = contrastive.cross_entropy(logits, target, mask) + contrastive.cross_entropy(
        logits.T, target, mask
    )
    return jnp.sum(jnp.where(real, both, 0.0)), real.sum().astype(jnp.float32)


def soft_targets(labels: Int8[Array, "B F"], hyper: Hyper) -> Float[Array, "B B"]:
    """Make the targets of equation 4 from the tags: rows sum to 1."""
    tags = contrastive.l2_normalise((labels > 0).astype(jnp.float32))
    soft = hyper.soft * tags @ tags.T + hyper.smooth
    target = (1 - hyper.soft) * jnp.eye(len(tags)) + soft
    return target / target.sum(-1, keepdims=True)


def soft_loss(logits: Float[Array, "B B"], target: Float[Array, "B B"]) -> Float[Array, ""]:
    """Compare rows of softmax with soft targets: *equation 4*, `(KL(Y||p) + KL(p||Y)) / 2`."""
    log_p, log_y = jax.nn.log_softmax(logits, -1), jnp.log(target)
    return jnp.sum((target - jnp.exp(log_p)) * (log_y - log_p), -1).mean() / 2


def tag_loss(
    params: Params,
    tags: Float[Array, "F E"],
    pixels: Float[Array, "b P C"],
    labels: Int8[Array, "b F"],
    key: PRNGKeyArray,
    hyper: Hyper,
    axis: str | None,
) -> Float[Array, " b"]:
    """Ask each image for its tags: *equation 3*, mean over tags; -1 counts as absent."""
    model = decoder(hyper)

    def one(pixels: Array, label: Array, number: Array) -> Array:
        rngs = {"dropout": jax.random.fold_in(key, number)}
        logits = model.apply({"params": params}, tags, pixels, True, rngs=rngs)
        return jnp.mean(jax.nn.softplus(logits) - (label > 0) * logits)

    return jax.vmap(one)(pixels, labels, contrastive.global_indices(len(pixels), axis))


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
    """Sum the four losses: *equations 1-4*, weights 1, 1, 5, 1."""
    everywhere = contrastive.all_gather((images.pooled, texts.pooled, extra["labels"]), axis)
    logits = contrastive.cosine_similarity(*everywhere[:2]) / hyper.tau
    whole = sum(contrastive.info_nce(logits))
    target = soft_targets(everywhere[2], hyper)
    soft = (soft_loss(logits, target) + soft_loss(logits.T, target)) / 2
    regions = jax.vmap(lambda *pair: region_loss(*pair, images.grid, hyper))(
        contrastive.l2_normalise(images.local),
        contrastive.l2_normalise(texts.local),
        extra["regions"],
        extra["region_words"],
    )
    total, count = (x.sum() for x in contrastive.all_gather(regions, axis))
    region = total / jnp.maximum(count, 1.0)
    tags = tag_loss(
        params["decoder"], memory["tags"], images.raw, extra["labels"], key, hyper, axis
    )
    tags = contrastive.all_gather(tags, axis).mean()
    value = whole + hyper.weight_region * region
    value += hyper.weight_tags * tags + hyper.weight_soft * soft
    metrics = {"loss_global": whole, "loss_region": region, "loss_tags": tags, "loss_soft": soft}
    return value, (metrics, memory)
