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
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray, PyTree

from plan_jax.methods import contrastive

IMAGE_TILE = 256  # images that a tile of texts is compared with at a time


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
    weight: Float[Array, "b W"], key: PRNGKeyArray, count: int, axis: str | None = None
) -> Int[Array, "b {count}"]:
    """Samples `count` words of each text without replacement, with probabilities ~ weight.

    By Gumbel's trick (*Kool et al., arXiv 1903.06059*): the largest of `log w_n + Gumbel noise`.
    Words of weight 0 (padding) come last. A device samples those of its own b texts; they are the
    same on any number of devices.
    """
    num_texts, num_words = weight.shape
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(
        contrastive.global_indices(num_texts, axis)
    )
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (num_words,)))(keys)
    # Clamped only to avoid log 0; padding is masked below.
    noisy = jnp.log(jnp.maximum(weight, 1e-9)) + noise
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
    is_alike: Bool[Array, "b T"] | None = None,
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
      is_alike: pairs that are no negatives in (8), see `alike_reports`; None: there are none.
    """
    num_images = jax.tree.leaves(images)[0].shape[0]
    image_index = contrastive.global_indices(num_images, axis)

    def contrast_tile(tile: tuple[PyTree, Array, Array]) -> tuple[Array, ...]:
        texts, text_index, weight_tK = tile
        score_images = jax.vmap(jax.vmap(score, (0, None)), (None, 0), out_axes=1)
        scores = contrastive.map_tiles(
            lambda images: score_images(images, texts), images, IMAGE_TILE
        )
        matches_tbK, in_report_tbK = jax.tree.map(lambda x: x.swapaxes(0, 1), scores)
        is_own = (text_index[:, None] == image_index)[..., None]
        allowed = is_own | ~in_report_tbK | same_word_is_negative
        is_negative = allowed & ~is_own
        return (
            jnp.einsum("tbk,tk->tb", matches_tbK, weight_tK),
            contrastive.masked_logsumexp(matches_tbK / tau, allowed, 1),
            jnp.sum(matches_tbK * is_own, 1),
            jnp.sum(matches_tbK * is_negative, 1),
            jnp.sum(is_negative, 1, dtype=jnp.float32),
        )

    # The sums over images are taken tile by tile, so only [t b K] matches exist at a time.
    tiles = texts, jnp.arange(len(normalised_weight)), normalised_weight
    scores_Tb, logsumexp, *sums = contrastive.map_tiles(contrast_tile, tiles, tile_size)
    # Each device has summed over its own images; only the one with image j has added C_jjn.
    logsumexp = contrastive.logsumexp_over_devices(logsumexp, axis)
    positive = contrastive.total(jnp.sum(sums[0] * normalised_weight), axis)
    word_loss = (jnp.sum(logsumexp * normalised_weight) - positive / tau) / len(logsumexp)
    # The margins enter the history, which has no gradient.
    sums = contrastive.total(lax.stop_gradient(jnp.stack(sums)), axis)
    margin = sums[0] - sums[1] / jnp.maximum(sums[2], 1)
    reports_bT = remove_alike(scores_Tb.T / tau, is_alike)
    report_loss = jnp.add(*contrastive.info_nce(reports_bT, axis))
    return AllImagesContrast(report_loss, word_loss, margin)


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
    is_alike: Bool[Array, "b T"] | None = None,
) -> CandidateContrast:
    """Computes the contrast of texts with a few candidate images each: *equations 8 and 9*.

    The equations are those of `contrast_all_images`, with i and j restricted to candidates of each
    other: image i and text j are candidates if (i - j) mod T < num_candidates. Batches are
    shuffled, so neighbours in the batch are random pairs, and each image and each text has exactly
    `num_candidates`, its own among them. The candidates of an image are on its device. Those of a
    text may lie on others, which exchange their log-sum-exps.

    Args:
      score: computes the matches [K N] of one image and one text in N rounds.
      images, texts, normalised_weight, tau, same_word_is_negative, axis, is_alike: as there.
      num_candidates: at most T are used.
      tile_size: images at a time.
    """
    num_texts = len(normalised_weight)
    num_candidates = min(num_candidates, num_texts)
    num_images = jax.tree.leaves(images)[0].shape[0]
    image_index = contrastive.global_indices(num_images, axis)
    pairs_bC = score_nearby_pairs(
        score,
        images,
        texts,
        num_candidates=num_candidates,
        first=image_index[0],
        tile_size=tile_size,
    )
    # Candidate 0 of an image is its own text, and candidate 0 of a text is its own image.
    text_index_bC = (image_index[:, None] - jnp.arange(num_candidates)) % num_texts
    is_own = (jnp.arange(num_candidates) == 0)[:, None]
    allowed_bCK = is_own | ~pairs_bC.in_report | same_word_is_negative
    words_bCKN = pairs_bC.matches / tau
    reports_bCN = jnp.einsum("bckn,bck->bcn", words_bCKN, normalised_weight[text_index_bC])
    if is_alike is not None:
        is_alike = jnp.take_along_axis(is_alike, text_index_bC, 1)[..., None]
    reports_bCN = remove_alike(reports_bCN, is_alike)
    by_text = order_by_text((words_bCKN, allowed_bCK, reports_bCN), image_index[0], num_texts)
    (words_TCKN, allowed_TCK, reports_TCN), is_here_TC = by_text

    def combine(logits: Array, mask: Array) -> Array:
        partial = contrastive.masked_logsumexp(logits, mask[..., None], 1)
        return contrastive.logsumexp_over_devices(partial, axis)

    image_losses = contrastive.mean(jax.nn.logsumexp(reports_bCN, 1), axis)
    text_losses = combine(reports_TCN, is_here_TC).mean(0)
    positives = contrastive.mean(reports_bCN[:, 0], axis)
    logsumexp_TKN = combine(words_TCKN, allowed_TCK & is_here_TC[..., None])
    word_losses = jnp.einsum("tkn,tk->n", logsumexp_TKN, normalised_weight) / num_texts
    # The positives of the words, weighted and summed over the words, are those of the reports.
    return CandidateContrast(image_losses + text_losses - 2 * positives, word_losses - positives)


def alike_reports(
    texts: Float[Array, "b D"], word_id: Int[Array, "b K"], alike: float, axis: str | None
) -> Bool[Array, "b T"]:
    """Returns which texts of all devices are as good as those of this device: *equation 15*.

        (15)  i ~ j  if  cos(t_i, t_j) > alike  or  W_i = W_j,  i != j

    t are the vectors of whole texts, which get no gradient here, and W the sets of their sampled
    words. *Ours; the idea that alike reports are false negatives is common.*
    """
    all_texts, all_word_id = contrastive.all_gather((texts, word_id), axis)

    def is_same_set(own: Int[Array, " K"], other: Int[Array, " K"]) -> Bool[Array, ""]:
        equal = own[:, None] == other
        return jnp.all(equal.any(1) | (own == 0)) & jnp.all(equal.any(0) | (other == 0))

    has_same_words = contrastive.score_all_pairs(is_same_set, word_id, all_word_id, IMAGE_TILE)
    is_close = contrastive.cosine_similarity(texts, all_texts) > alike
    is_own = contrastive.global_indices(len(texts), axis)[:, None] == jnp.arange(len(all_texts))
    return (is_close | has_same_words) & ~is_own


def remove_alike(
    logits: Float[Array, "b T *N"], is_alike: Bool[Array, "b T *#N"] | None
) -> Float[Array, "b T *N"]:
    """Returns logits in which pairs that are alike count for nothing."""
    return logits if is_alike is None else jnp.where(is_alike, contrastive.MASKED_LOGIT, logits)


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


def order_by_text(
    pairs: PyTree, first: Int[Array, ""] | int, num_texts: int
) -> tuple[PyTree, Bool[Array, "T C"]]:
    """Reorders the pairs of `score_nearby_pairs`: entry [j, r] becomes text j with image j + r.

    Args:
      pairs: leaves [b C ...], whose images have indices from `first` on in the batch.
      first: index of the first image.
      num_texts: T.

    Returns:
      Leaves [T C ...], and which of their entries are pairs of these images; others have no
      meaning.

    >>> order_by_text(jnp.array([[0, 2], [1, 0], [2, 1]]), 0, 3)[0].tolist()  # [i, r]: text i - r
    [[0, 0], [1, 1], [2, 2]]
    """
    num_images, num_candidates = jax.tree.leaves(pairs)[0].shape[:2]
    text, offset = jnp.arange(num_texts)[:, None], jnp.arange(num_candidates)[None, :]
    image = (text + offset - first) % num_texts
    is_here, image = image < num_images, jnp.minimum(image, num_images - 1)
    return jax.tree.map(lambda x: x[image, offset], pairs), is_here
