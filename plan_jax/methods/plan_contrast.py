"""Contrasts of PLAN over a batch: equations 8 and 9 for any score of one image and one text.

The methods' rule for memory holds: nothing of size [T I K] is ever stored. There are two ways:
`contrast_all_images` compares every text with all images of all devices, for round 0;
`contrast_candidates` compares it with a few images each, for later rounds, whose finer map costs
more per pair. Equations and symbols are those of `plan.py`.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from plan_jax.methods import contrastive


class PairScores(NamedTuple):
    """The output of a score function for one image and one text of K words."""

    matches: Float[Array, "K *N"]  # C_n, of one round or of N rounds
    in_report: Bool[Array, " K"]  # whether the image's own report has the word too


class AllImagesContrast(NamedTuple):
    """Contrast of T texts with all images: both losses, and the margin of each of K words."""

    report_loss: Float[Array, ""]
    word_loss: Float[Array, ""]
    similarity_margin: Float[Array, "T K"]


class CandidateContrast(NamedTuple):
    """Contrast of texts with their candidate images: both losses of each of N rounds."""

    report_losses: Float[Array, " N"]
    word_losses: Float[Array, " N"]


Score = Callable[[PyTree, PyTree], PairScores]


def sample_words(
    weight: Float[Array, "T W"], key: PRNGKeyArray, count: int
) -> Int[Array, "T {count}"]:
    """Samples `count` words of each text without replacement, with probabilities ~ weight.

    By Gumbel's trick (*Kool et al., arXiv 1903.06059*): the largest of `log w_n + Gumbel noise`.
    Words of weight 0 (padding) come last.
    """
    # Clamped only to avoid log 0; padding is masked below.
    noisy = jnp.log(jnp.maximum(weight, 1e-9)) + jax.random.gumbel(key, weight.shape)
    return lax.top_k(jnp.where(weight > 0, noisy, contrastive.MASKED_LOGIT), count)[1]


def contrast_all_images(
    score: Score,
    images: PyTree,
    texts: PyTree,
    normalised_weight: Float[Array, "T K"],
    *,
    tau: float,
    same_word_is_negative: bool,
    tile_size: int,
    axis: str | None,
) -> AllImagesContrast:
    """Computes the contrast of all texts with all images of the batch: *equations 8 and 9*.

        (8)  s_ij = sum_n w_jn C_ijn
             L_report = - mean_i log softmax_j(s_ij / tau)[j = i]
                        - mean_j log softmax_i(s_ij / tau)[i = j]
        (9)  L_word = - mean_j sum_n w_jn log softmax_{i in A_jn}(C_ijn / tau)[i = j]
             margin_jn = C_jjn - mean_{i in A_jn, i != j} C_ijn

    C_ijn is the match of word n of text j in image i, and w_jn its normalised weight. The allowed
    images A_jn are j and those whose report does not have word n: where it has the word too, a
    high match is right. With `same_word_is_negative` they are all images.

    Args:
      score: computes the matches [K] of one image and one text.
      images: this device's b images, leaves [b ...].
      texts: the T texts of all devices, leaves [T ...].
      normalised_weight: w, which sums to 1 over the words of a text.
      tau: temperature.
      same_word_is_negative: whether images whose report has a word are its negatives too.
      tile_size: texts at a time.
      axis: the mapped device axis.
    """
    num_images = jax.tree.leaves(images)[0].shape[0]
    image_index = contrastive.global_indices(num_images, axis)

    def contrast_tile(tile: tuple[PyTree, Array, Array]) -> tuple[Array, ...]:
        texts, text_index, weight_tK = tile
        score_images = jax.vmap(score, (0, None))
        matches_tbK, in_report_tbK = jax.vmap(score_images, (None, 0))(images, texts)
        is_own = (text_index[:, None] == image_index)[..., None]
        allowed = is_own | ~in_report_tbK | same_word_is_negative
        is_negative = allowed & ~is_own
        return (
            jnp.einsum("tbk,tk->tb", matches_tbK, weight_tK),
            contrastive.masked_logsumexp(matches_tbK / tau, allowed, 1),
            jnp.sum(matches_tbK * is_own, 1),
            jnp.sum(matches_tbK * is_negative, 1),
            jnp.sum(is_negative, 1),
        )

    # The sums over images are taken tile by tile, so only [t b K] matches exist at a time.
    tiles = texts, jnp.arange(len(normalised_weight)), normalised_weight
    scores_Tb, *sums = contrastive.map_tiles(contrast_tile, tiles, tile_size)
    scores_IT = contrastive.all_gather(scores_Tb.T, axis)
    # Each device has summed over its own images: the sums are joined as [devices T K].
    sums = contrastive.all_gather([sums_TK[None] for sums_TK in sums], axis)
    logsumexp, positives, negatives, num_negatives = sums
    # Only the device that holds image j has added C_jjn; the other devices have added 0.
    positives, logsumexp = positives.sum(0), jax.nn.logsumexp(logsumexp, 0)
    word_loss = jnp.sum((logsumexp - positives / tau) * normalised_weight, -1).mean()
    margin = positives - negatives.sum(0) / jnp.maximum(num_negatives.sum(0), 1)
    return AllImagesContrast(jnp.add(*contrastive.info_nce(scores_IT / tau)), word_loss, margin)


def contrast_candidates(
    score: Score,
    images: PyTree,
    texts: PyTree,
    normalised_weight: Float[Array, "T K"],
    *,
    num_candidates: int,
    tau: float,
    same_word_is_negative: bool,
    tile_size: int,
    axis: str | None,
) -> CandidateContrast:
    """Computes the contrast of texts with a few candidate images each: *equations 8 and 9*.

    The equations are those of `contrast_all_images`, with i and j restricted to candidates of each
    other: image i and text j are candidates if (i - j) mod T < num_candidates. Batches are
    shuffled, so neighbours in the batch are random pairs, and each image and each text has exactly
    `num_candidates`, its own among them.

    Args:
      score: computes the matches [K N] of one image and one text in N rounds.
      images, texts, normalised_weight, tau, same_word_is_negative, axis: as there.
      num_candidates: at most T are used.
      tile_size: images at a time.
    """
    num_candidates = min(num_candidates, len(normalised_weight))
    num_images = jax.tree.leaves(images)[0].shape[0]
    first = contrastive.global_indices(num_images, axis)[0]
    pairs_bC = score_nearby_pairs(
        score, images, texts, num_candidates=num_candidates, first=first, tile_size=tile_size
    )
    pairs_TC = order_by_text(contrastive.all_gather(pairs_bC, axis))
    is_own = (jnp.arange(num_candidates) == 0)[:, None]  # candidate 0 of a text is its own image
    allowed = is_own | ~pairs_TC.in_report | same_word_is_negative
    return candidate_losses(pairs_TC.matches / tau, allowed, normalised_weight)


def score_nearby_pairs(
    score: Callable[[PyTree, PyTree], PyTree],
    images: PyTree,
    texts: PyTree,
    *,
    num_candidates: int,
    first: Int[Array, ""] | int = 0,
    tile_size: int = 8,
) -> PyTree:
    """Scores each image with its own text and the texts before it: leaves [b num_candidates ...].

    Image i has index first + i in the batch; entry [i, r] is its score with text
    (first + i - r) mod T, so entry [i, 0] is that of its own. The work is linear in the batch,
    where that of `contrastive.score_all_pairs` is quadratic.
    """
    num_texts = jax.tree.leaves(texts)[0].shape[0]
    num_images = jax.tree.leaves(images)[0].shape[0]
    index = first + jnp.arange(num_images)[:, None] - jnp.arange(num_candidates)[None, :]

    def score_tile(tile: tuple[PyTree, Array]) -> PyTree:
        images, text_index = tile
        candidates = jax.tree.map(lambda x: x[text_index], texts)
        return jax.vmap(jax.vmap(score, (None, 0)))(images, candidates)

    return contrastive.map_tiles(score_tile, (images, index % num_texts), tile_size)


def order_by_text(pairs: PyTree) -> PyTree:
    """Reorders the pairs of `score_nearby_pairs`: entry [j, r] becomes text j with image j + r.

    >>> order_by_text(jnp.array([[0, 2], [1, 0], [2, 1]])).tolist()  # entry [i, r]: text i - r
    [[0, 0], [1, 1], [2, 2]]
    """
    size, num_candidates = jax.tree.leaves(pairs)[0].shape[:2]
    text, offset = jnp.arange(size)[:, None], jnp.arange(num_candidates)[None, :]
    return jax.tree.map(lambda x: x[(text + offset) % size, offset], pairs)


def candidate_losses(
    logits: Float[Array, "T C K N"],
    allowed: Bool[Array, "T C K"],
    normalised_weight: Float[Array, "T K"],
) -> CandidateContrast:
    """Computes the losses of `contrast_candidates` from the logits `C_ijn / tau` of N rounds.

    Entry [j, r] is text j with image j + r (modulo T), so its own image is the first.
    """
    size, num_candidates = logits.shape[:2]
    text_NTC = jnp.einsum("tckn,tk->ntc", logits, normalised_weight)
    # The same scores by image: image i is candidate r of text i - r.
    image, offset = jnp.arange(size)[:, None], jnp.arange(num_candidates)[None, :]
    image_NIC = text_NTC[:, (image - offset) % size, offset]
    labels = jnp.zeros(text_NTC.shape[:2], jnp.int32)
    cross_entropy = optax.softmax_cross_entropy_with_integer_labels
    text_loss, image_loss = cross_entropy(text_NTC, labels), cross_entropy(image_NIC, labels)
    logsumexp_TKN = contrastive.masked_logsumexp(logits, allowed[..., None], 1)
    word_losses = jnp.einsum("tkn,tk->n", logsumexp_TKN - logits[:, 0], normalised_weight) / size
    return CandidateContrast(text_loss.mean(1) + image_loss.mean(1), word_losses)
