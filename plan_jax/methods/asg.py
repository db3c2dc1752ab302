"""ASG: regions aligned with sentences, and tags within an image and between pairs.

PAPER: Li et al., Anatomical Structure-Guided Medical Vision-Language Pre-training, MICCAI 2024,
arXiv 2403.09294; code github.com/ASGMVLP/ASGMVLP_CODE.
Established, code: the four losses, their weights and every constant below. Not released, and so
ours (`data/report_parser`, the dataset's boxes): how triplets are extracted from reports, how a
sentence is assigned to a region, where boxes come from.

(1) IRA   `s_ij = <x_i, y_j> / tau`, cross-entropy in both directions, their sum
(2) ARSA  region `rho_r` = RoIAlign of the unit pixels in box r, `sigma_r` = mean of the unit words
          of its sentences; cross-entropy of `rho sigma^T / tau` over the regions of one image, rows
          and columns, on the diagonal; mean over all regions of the batch
(3) IRL   frozen text features of F tags query a decoder over the pixels for which of them are
          present; binary cross-entropy, weight 5
(4) ERL   soft targets `Y_ij = 0.8 I_ij + 0.2 <l_i, l_j> + 1e-6`, rows scaled to sum 1, l the tags
          as a unit vector; `(KL(Y || p) + KL(p || Y)) / 2` with `p = softmax s`, in both directions

Deviation: the text tower has positions and a type embedding, as BERT has. The code took MGCA's,
which gives every token the first position and has no type embedding.
Deviation: an image without any region adds nothing to (2), which is 0 for a batch without regions;
in the code it is NaN.
Deviation: boxes stay with their images; the code's collate function sorts a batch after numbering
the boxes' images.
Deviation: negatives of (1) and (4) come from all devices; the code's stay on their own.
Deviation: RoIAlign takes a pixel's centre at +1/2; `aligned=False` restores the code's, half a
pixel off.
Deviation: the texts of the tags are encoded once, not again in every step; by the model's own text
encoder as it was at the start, mean over words, instead of a second, whole BERT's [CLS].
Deviation: where the widths of tags and pixels differ, pixels are projected (the released decoder
fits ViT only).
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int8, PRNGKeyArray

from plan_jax.layers.transformer import TransformerLayer
from plan_jax.methods import contrastive
from plan_jax.methods.ranges import BLOCKS, COUNT, FRACTION, TEMPERATURE, WEIGHT, Range, check_hyper
from plan_jax.types import Features, Memory, MethodContext, Metrics, Params, UserError

PAPER = (
    "Li et al., Anatomical Structure-Guided Medical Vision-Language Pre-training, MICCAI 2024, "
    "arXiv 2403.09294, github.com/ASGMVLP/ASGMVLP_CODE"
)
REQUIRES: tuple[str, ...] = ("labels", "regions", "region_words")
IMAGE_FEATURES = ("pooled", "local", "raw")
TEXT_FEATURES = ("pooled", "local")


@dataclass(frozen=True)
class Hyper:
    """Constants of the code (main.py, irl_model.py); the paper's are the same, where given."""

    tau: float = 0.07  # temperature of (1), (2) and (4)
    contrast: Literal["softmax", "sigmoid"] = "softmax"  # of (1); sigmoid: SigLIP's, without tau
    soft_share: float = 0.2  # share of tag similarity in the soft targets
    target_smoothing: float = 1e-6  # added to every soft target, whose logarithm is taken
    weight_region: float = 1.0  # of (2)
    weight_tags: float = 5.0  # of (3)
    weight_soft: float = 1.0  # of (4)
    num_layers: int = 4  # of the tag decoder
    num_heads: int = 4  # of its attention
    hidden_dim: int = 1024  # of the decoder's MLPs
    dropout_rate: float = 0.1  # of the decoder
    aligned: bool = True  # RoIAlign with pixel centres at +1/2
    tile_size: int = 16  # images at a time, in the tag decoder and for regions

    def __post_init__(self) -> None:
        check_hyper(
            self,
            tau=TEMPERATURE,
            soft_share=FRACTION,
            target_smoothing=Range(1e-12, 1),
            weight_region=WEIGHT,
            weight_tags=WEIGHT,
            weight_soft=WEIGHT,
            num_layers=BLOCKS,
            num_heads=COUNT,
            hidden_dim=Range(1, 2**16),
            dropout_rate=Range(0, 0.99),  # at 1, attention weights would be divided by 0
            tile_size=COUNT,
        )


class TagDecoder(nn.Module):
    """A pre-norm transformer decoder of F tags over the pixels, one logit a tag (equation 3)."""

    layers: int
    heads: int
    hidden: int
    dropout: float

    @nn.compact
    def __call__(
        self, tags: Float[Array, "F E"], pixels: Float[Array, "P C"], train: bool
    ) -> Float[Array, " F"]:
        """Returns the logit of each tag for one image."""
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


def build_decoder(hyper: Hyper) -> TagDecoder:
    """Builds the tag decoder of these constants."""
    return TagDecoder(hyper.num_layers, hyper.num_heads, hyper.hidden_dim, hyper.dropout_rate)


def encode_tags(
    encode_names: Callable[[Sequence[str]], Features], findings: Sequence[str]
) -> Float[Array, "F E"]:
    """Returns the features of the dataset's findings as tags, before projection.

    A tag is the mean over the words of its name.
    """
    names = encode_names(findings)
    return jnp.sum(names.raw * names.mask[..., None], 1) / names.mask.sum(1, keepdims=True)


def init(key: PRNGKeyArray, context: MethodContext, hyper: Hyper) -> tuple[Params, Memory]:
    """Returns the tag decoder's parameters; the memory holds the frozen tag features, [F E].

    Parameters of the sigmoid loss are beside the decoder's, if it is chosen.

    Raises:
      UserError: the width of the tags is not divisible by the number of heads.
    """
    width = context.tags.shape[-1]
    if width % hyper.num_heads:
        raise UserError(
            f"hyper.num_heads is {hyper.num_heads}, which does not divide the width {width} of the "
            f"text encoder; use a divisor of {width}"
        )
    pixels = jnp.zeros((1, context.width))
    params = build_decoder(hyper).init(key, context.tags, pixels, False)["params"]
    params = {"decoder": params} | contrastive.init_sigmoid(hyper.contrast)
    return params, {"tags": context.tags}


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
    """Returns the cosine of each word with each pixel, and equal weights for all words."""
    return contrastive.word_pixel_maps(texts, images), texts.mask.astype(jnp.float32)


def roi_weights(
    low: Float[Array, " R"], high: Float[Array, " R"], count: int, aligned: bool
) -> Float[Array, "R {count}"]:
    """Returns the weight of each of `count` cells of one axis in RoIAlign to a single cell.

    *He et al., arXiv 1703.06870:* the mean of bilinear samples at `ceil(high - low)` evenly spaced
    positions; low and high are in cells. With `aligned=False` a box is at least one cell long.
    """
    length = high - low if aligned else jnp.maximum(high - low, 1.0)
    # The number of samples depends on the box, and shapes may not: there are `count` candidate
    # samples, of which the first `num_samples` are used.
    num_samples = jnp.clip(jnp.ceil(length), 1, count)[:, None]
    offset = jnp.arange(count) + 0.5
    position = low[:, None] + offset * length[:, None] / num_samples - 0.5 * aligned
    # Samples more than a cell outside count as 0, as in torchvision; nearer ones are clamped.
    used = (jnp.arange(count) < num_samples) & (position >= -1) & (position <= count)
    position = jnp.clip(position, 0, count - 1)
    bilinear = jnp.maximum(1 - jnp.abs(position[..., None] - jnp.arange(count)), 0)
    return jnp.sum(bilinear * used[..., None], 1) / num_samples


def roi_align(
    pixels: Float[Array, "P D"], boxes: Float[Array, "R 4"], grid: tuple[int, int], aligned: bool
) -> Float[Array, "R D"]:
    """Computes RoIAlign to 1 x 1: the mean of the pixels of each box.

    Boxes are (x0, y0, x1, y1) in fractions of the image.
    """
    rows, columns = grid
    # A bilinear sample is a product of weights in x and y, so the mean over a box is one too.
    weights_RX = roi_weights(boxes[:, 0] * columns, boxes[:, 2] * columns, columns, aligned)
    weights_RY = roi_weights(boxes[:, 1] * rows, boxes[:, 3] * rows, rows, aligned)
    pixels_YXD = pixels.reshape(rows, columns, -1)
    return jnp.einsum("ry,rx,yxd->rd", weights_RY, weights_RX, pixels_YXD)


def region_loss(
    pixels: Float[Array, "P D"],
    words: Float[Array, "W D"],
    boxes: Float[Array, "R 4"],
    region_words: Bool[Array, "R W"],
    grid: tuple[int, int],
    hyper: Hyper,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Computes the contrast of the regions of one image with their sentences: *equation 2*.

    A region without a box (lost by a crop, or unknown) or without a sentence does not take part; an
    image without any contributes nothing.

    Returns:
      The sum over regions, and the number of regions that take part.
    """
    has_box = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
    real = has_box & region_words.any(-1)
    regions = roi_align(pixels, boxes, grid, hyper.aligned)
    num_words = jnp.maximum(region_words.sum(-1, keepdims=True), 1)
    sentences = region_words @ words / num_words
    logits_RR = regions @ sentences.T / hyper.tau
    candidates = jnp.broadcast_to(real, logits_RR.shape)
    target = jnp.arange(len(real))
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    total = cross_entropy(logits_RR, target, where=candidates)
    total += cross_entropy(logits_RR.T, target, where=candidates)
    return jnp.sum(jnp.where(real, total, 0.0)), real.sum().astype(jnp.float32)


def region_losses(
    images: Features,
    texts: Features,
    boxes: Float[Array, "b R 4"],
    region_words: Bool[Array, "b R W"],
    hyper: Hyper,
) -> Float[Array, "2"]:
    """Computes the sums of `region_loss` over the pairs, `tile_size` pairs at a time."""
    pair_loss = functools.partial(region_loss, grid=images.grid, hyper=hyper)

    def tile_losses(tile: tuple[Array, ...]) -> tuple[Array, Array]:
        pixels, words, *regions = tile
        sides = contrastive.l2_normalise(pixels), contrastive.l2_normalise(words)
        return jax.vmap(pair_loss)(*sides, *regions)

    items = images.local, texts.local, boxes, region_words
    return jnp.stack(contrastive.map_tiles(tile_losses, items, hyper.tile_size)).sum(1)


def soft_targets(
    labels: Int8[Array, "b F"], hyper: Hyper, axis: str | None = None
) -> tuple[Float[Array, "b B"], Float[Array, "b B"]]:
    """Computes targets of *equation 4* from the tags; -1 (unknown) counts as absent.

    Returns:
      Y_ij for the texts j of all devices as targets of this device's images i, whose rows sum to 1,
      and Y_ji for this device's images i as targets of all texts j.
    """
    labels_B = contrastive.all_gather(labels, axis)
    tags = contrastive.l2_normalise((labels > 0).astype(jnp.float32))
    tags_B = contrastive.l2_normalise((labels_B > 0).astype(jnp.float32))
    is_own = jax.nn.one_hot(contrastive.global_indices(len(tags), axis), len(tags_B))
    soft = hyper.soft_share * tags @ tags_B.T + hyper.target_smoothing
    target_bB = (1 - hyper.soft_share) * is_own + soft
    # The table before scaling is symmetric. Its rows are linear in the tags, so that the sums of
    # all of them need no table of the whole batch.
    sums_B = (1 - hyper.soft_share) + hyper.soft_share * tags_B @ tags_B.sum(0)
    sums_B += hyper.target_smoothing * len(tags_B)
    return target_bB / target_bB.sum(-1, keepdims=True), target_bB / sums_B


def soft_loss(
    log_p: Float[Array, "b B"], target: Float[Array, "b B"], axis: str | None = None
) -> Float[Array, ""]:
    """Computes `(KL(Y||p) + KL(p||Y)) / 2` of each item of the batch: *equation 4*; the mean.

    A device passes the part of its b images; the mean is over all B items.
    """
    # Both divergences share one sum: KL(Y||p) + KL(p||Y) = sum (Y - p) (log Y - log p).
    terms_bB = (target - jnp.exp(log_p)) * (jnp.log(target) - log_p)
    return contrastive.mean(jnp.sum(terms_bB, -1), axis) / 2


def tag_losses(
    params: Params,
    tags: Float[Array, "F E"],
    pixels: Float[Array, "b P C"],
    labels: Int8[Array, "b F"],
    key: PRNGKeyArray,
    hyper: Hyper,
    axis: str | None,
) -> Float[Array, " b"]:
    """Computes the tag loss of each image: *equation 3*, mean over tags; -1 counts as absent.

    The decoder runs on `tile_size` images at a time.
    """
    decoder = build_decoder(hyper)

    def image_loss(pixels: Array, labels: Array, index: Array) -> Array:
        # The index in the whole batch makes dropout the same on any number of devices.
        rngs = {"dropout": jax.random.fold_in(key, index)}
        logits = decoder.apply({"params": params}, tags, pixels, True, rngs=rngs)
        return optax.sigmoid_binary_cross_entropy(logits, labels > 0).mean()

    items = pixels, labels, contrastive.global_indices(len(pixels), axis)
    return contrastive.map_tiles(lambda tile: jax.vmap(image_loss)(*tile), items, hyper.tile_size)


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
    """Computes the weighted sum of the four losses: *equations 1-4*, weights 1, 1, 5, 1.

    With `contrast="sigmoid"`, `contrastive.sigmoid_loss` replaces equation 1. Equation 4 stays, and
    with it the softmax of `cosine / tau`.
    """
    text_pooled = contrastive.all_gather(texts.pooled, axis)
    logits_bB = contrastive.cosine_similarity(images.pooled, text_pooled) / hyper.tau
    by_image = jax.nn.log_softmax(logits_bB, 1)
    by_text = logits_bB - contrastive.logsumexp_of_columns(logits_bB, axis)
    if hyper.contrast == "sigmoid":
        loss_global = contrastive.sigmoid_loss(images.pooled, texts.pooled, params, axis)
    else:
        own_log_p = contrastive.own_entries(by_image, axis) + contrastive.own_entries(by_text, axis)
        loss_global = -contrastive.mean(own_log_p, axis)
    image_targets, text_targets = soft_targets(extra["labels"], hyper, axis)
    loss_soft = soft_loss(by_image, image_targets, axis) + soft_loss(by_text, text_targets, axis)
    loss_soft /= 2
    region_sums = region_losses(images, texts, extra["regions"], extra["region_words"], hyper)
    # Images have different numbers of regions: sums are divided, so that each region counts alike.
    total, count = contrastive.total(region_sums, axis)
    loss_region = total / jnp.maximum(count, 1.0)
    losses_b = tag_losses(
        params["decoder"], memory["tags"], images.raw, extra["labels"], key, hyper, axis
    )
    loss_tags = contrastive.mean(losses_b, axis)
    value = loss_global + hyper.weight_region * loss_region
    value += hyper.weight_tags * loss_tags + hyper.weight_soft * loss_soft
    metrics = {
        "loss_global": loss_global,
        "loss_region": loss_region,
        "loss_tags": loss_tags,
        "loss_soft": loss_soft,
    }
    return value, (metrics, memory)
