"""Word-region scores of all images with all texts, on packed words: padding costs nothing.

The real words of all texts lie in blocks of Z slots, and no text is split over two blocks. The
loops run over images, and for each image over the blocks in use. How many are in use is known only
while the program runs. JAX cannot differentiate such a loop in reverse, so the backward pass is
written here. It recomputes the tables [Z P] of a block: no table [I T W P] is ever stored.

*Forward*, words w_n of one text, pixels v_p of one image, softmax over n inside the text:

    s_np = <w_n, v_p>    b_np = softmax_n s_np    a_np = softmax_p(sharpness b_np)
    c_n = sum_p a_np v_p    cos_n = <w_n, c_n> / |w_n| |c_n|    score = log sum_n exp(factor cos_n)

*Backward*, from the gradient g of a score; `d x` is the gradient of x:

    d cos_n = h_n = g factor exp(factor cos_n - score)
    d c_n   = h_n (w_n / |w_n| |c_n| - cos_n c_n / |c_n|^2), and w_n the same with the sides changed
    d a_np  = <d c_n, v_p>
    d b_np  = sharpness a_np (d a_np - sum_q a_nq d a_nq)
    d s_np  = b_np (d b_np - sum_m b_mp d b_mp), m in the text of n
    d w_n  += sum_p d s_np v_p
    d v_p   = sum_n (a_np d c_n + d s_np w_n)

Here `sharpness` is `attention_sharpness` and `factor` is `word_sharpness`. With `kind="max"` the
score is the largest `factor cos_n`, and h_n is g factor for that word, the first of equals.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from plan_jax.methods import contrastive


class ScoreSettings(NamedTuple):
    """Constants of the score, and the number of words that are compared with an image at a time."""

    attention_sharpness: float  # of a word's attention over pixels
    word_sharpness: float  # factor on cosines, before the sum over words
    kind: Literal["sum", "max"] = "sum"
    block_size: int = 128  # slots; at least those of one text, at most those of all texts


class Packing(NamedTuple):
    """Where the real words of T texts of W slots lie in K blocks of Z slots.

    For each slot of a block: `word` is the index of its word among all T W (T W in an empty slot),
    `text` is its text (T if empty) and `first_slot` the slot of that text's first word (Z if
    empty). For each text: its `block`, the slot of its first word in it as `start`, and its
    `length` in words. The first `num_blocks` blocks are in use.
    """

    word: Int[Array, "K Z"]
    text: Int[Array, "K Z"]
    first_slot: Int[Array, "K Z"]
    block: Int[Array, " T"]
    start: Int[Array, " T"]
    length: Int[Array, " T"]
    num_blocks: Int[Array, ""]


def pack_words(mask: Bool[Array, "T W"], block_size: int) -> Packing:
    """Returns a packing that puts each text into the first block with room for all its real words.

    >>> packing = pack_words(jnp.array([[1, 1, 1], [1, 1, 0], [0, 1, 0]], bool), 4)
    >>> packing.text.tolist()  # text 2 fits beside text 0, text 1 does not; one block stays empty
    [[0, 0, 0, 2], [1, 1, 3, 3], [3, 3, 3, 3]]
    """
    num_texts, num_words = mask.shape
    slots = max(min(block_size, num_texts * num_words), num_words)
    # First fit leaves at most one block half empty or emptier, so the sum of the lengths bounds the
    # number of blocks; shapes have to be known before the lengths are.
    blocks = min(num_texts, 2 * num_texts * num_words // slots + 1)
    length = mask.sum(1, dtype=jnp.int32)

    def place_text(fill: Array, count: Array) -> tuple[Array, tuple[Array, Array]]:
        block = jnp.argmax(fill + count <= slots)  # the first True
        return fill.at[block].add(count), (block, fill[block])

    fill, (block, start) = lax.scan(place_text, jnp.zeros(blocks, jnp.int32), length)
    offset = block * slots + start
    slot_TW = offset[:, None] + jnp.cumsum(mask, 1) - 1
    slot_TW = jnp.where(mask, slot_TW, blocks * slots)  # padding goes out of bounds, to be dropped

    def scatter(value: Array, empty: int) -> Array:
        slots_KZ = jnp.full(blocks * slots, empty, jnp.int32)
        value = jnp.broadcast_to(value, mask.shape)
        return slots_KZ.at[slot_TW].set(value, mode="drop").reshape(blocks, slots)

    word_TW = jnp.arange(num_texts * num_words).reshape(mask.shape)
    return Packing(
        word=scatter(word_TW, num_texts * num_words),
        text=scatter(jnp.arange(num_texts)[:, None], num_texts),
        first_slot=scatter(start[:, None], slots),
        block=block,
        start=start,
        length=length,
        num_blocks=jnp.sum(fill > 0),
    )


def word_region_scores(
    pixels: Float[Array, "I P D"],
    words: Float[Array, "T W D"],
    mask: Bool[Array, "T W"],
    settings: ScoreSettings,
) -> Float[Array, "I T"]:
    """Computes the score of every image with every text; about -1e9 for a text without words.

    Memory grows with the features, not with the pairs.
    """
    pixels, words = pixels.astype(jnp.float32), words.astype(jnp.float32)
    packing = pack_words(mask, settings.block_size)
    words_ND = words.reshape(-1, words.shape[-1])
    # Gathering outside the custom gradient lets JAX route it back to the padded layout.
    words_KZD = words_ND.at[packing.word].get(mode="fill", fill_value=0)
    return _packed_scores(pixels, words_KZD, packing, settings)


class _Attention(NamedTuple):
    """The attention of Z words over the pixels of one image, named as in the equations."""

    b: Float[Array, "Z P"]
    a: Float[Array, "Z P"]
    c: Float[Array, "Z D"]
    inverse_norm_w: Float[Array, " Z"]  # 1 / |w|
    inverse_norm_c: Float[Array, " Z"]
    cosine: Float[Array, " Z"]


def _reduce_texts(reduce: Callable, x: Array, first_slot: Array) -> Array:
    """Reduces [Z ...] over the words of each text; the result is at the slot of its first word.

    Empty slots have `first_slot` Z and reduce into an extra last row, which nothing reads.
    """
    # Texts lie one after the other and empty slots at the end, so the indices are sorted.
    return reduce(x, first_slot, len(x) + 1, indices_are_sorted=True)


def _attend(pixels: Array, words: Array, first_slot: Array, settings: ScoreSettings) -> _Attention:
    """Computes the attention of the words [Z D] of a block over the pixels [P D] of one image."""
    s = words @ pixels.T
    # Softmax over the words of a text, less its maximum, since products may be in the hundreds.
    b = jnp.exp(s - _reduce_texts(jax.ops.segment_max, s, first_slot)[first_slot])
    b = b / _reduce_texts(jax.ops.segment_sum, b, first_slot)[first_slot]
    a = jax.nn.softmax(settings.attention_sharpness * b, -1)
    c = a @ pixels
    # The same eps as in `contrastive.l2_normalise`, so that the scores equal those of cosines.
    inverse_norms = (lax.rsqrt(jnp.sum(x * x, -1) + 1e-12) for x in (words, c))
    inverse_norm_w, inverse_norm_c = inverse_norms
    cosine = jnp.sum(words * c, -1) * inverse_norm_w * inverse_norm_c
    return _Attention(b, a, c, inverse_norm_w, inverse_norm_c, cosine)


def _block_scores(pixels: Array, words: Array, first_slot: Array, settings: ScoreSettings) -> Array:
    """Computes the scores of one image with the texts of a block, [Z] at their first slots."""
    logits = settings.word_sharpness * _attend(pixels, words, first_slot, settings).cosine
    largest = _reduce_texts(jax.ops.segment_max, logits, first_slot)
    if settings.kind == "max":
        return largest[:-1]
    shifted = jnp.exp(logits - largest[first_slot])
    return (largest + jnp.log(_reduce_texts(jax.ops.segment_sum, shifted, first_slot)))[:-1]


def _is_first_largest(logits: Array, first_slot: Array) -> Array:
    """Returns whether the word in each slot [Z] is the first of the largest of its text.

    Indices are compared, not logits with their maximum: logits are computed again here and may
    round differently, so that no word or several words would pass.
    """
    slots = jnp.arange(len(logits))
    candidates = jnp.where(first_slot == slots[:, None], logits, -jnp.inf)  # a row for each text
    largest = jnp.argmax(candidates, 1)
    return largest.at[first_slot].get(mode="clip") == slots


def _block_gradients(
    pixels: Array,
    words: Array,
    first_slot: Array,
    score: Array,
    grad: Array,
    settings: ScoreSettings,
) -> tuple[Array, Array]:
    """Computes the gradients of pixels [P D] and words [Z D] of a block: the backward equations.

    `score` and `grad` [Z] are the score of each slot's text and the gradient of that score.
    """
    b, a, c, inverse_norm_w, inverse_norm_c, cosine = _attend(pixels, words, first_slot, settings)
    logits = settings.word_sharpness * cosine
    if settings.kind == "sum":
        share = jnp.exp(logits - score)
    else:
        share = _is_first_largest(logits, first_slot).astype(jnp.float32)
    h = (grad * settings.word_sharpness * share)[:, None]
    cross, along = h * (inverse_norm_w * inverse_norm_c)[:, None], h * cosine[:, None]
    d_c = cross * words - along * (inverse_norm_c**2)[:, None] * c
    d_a = d_c @ pixels.T
    d_b = settings.attention_sharpness * a * (d_a - jnp.sum(a * d_a, -1, keepdims=True))
    d_s = b * (d_b - _reduce_texts(jax.ops.segment_sum, b * d_b, first_slot)[first_slot])
    d_w = cross * c - along * (inverse_norm_w**2)[:, None] * words + d_s @ pixels
    return a.T @ d_c + d_s.T @ words, d_w


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _packed_scores(pixels: Array, words: Array, packing: Packing, settings: ScoreSettings) -> Array:
    """Computes the scores [I T] of pixels [I P D] with packed words [K Z D]."""
    slots = words.shape[1]

    def score_image(pixels: Array) -> Array:
        def score_block(k: Array, table: Array) -> Array:
            scores = _block_scores(pixels, words[k], packing.first_slot[k], settings)
            return table.at[k].set(scores)

        table = lax.fori_loop(0, packing.num_blocks, score_block, jnp.zeros(words.shape[:2]))
        # A text without words may start at slot Z, one behind the last.
        scores = table[packing.block, jnp.minimum(packing.start, slots - 1)]
        return jnp.where(packing.length > 0, scores, contrastive.MASKED_LOGIT)

    return lax.map(score_image, pixels)


def _packed_scores_forward(
    pixels: Array, words: Array, packing: Packing, settings: ScoreSettings
) -> tuple[Array, tuple]:
    scores = _packed_scores(pixels, words, packing, settings)
    return scores, (pixels, words, packing, scores)


def _packed_scores_backward(
    settings: ScoreSettings, residuals: tuple, grad: Array
) -> tuple[Array, Array, None]:
    pixels, words, packing, scores = residuals

    # One image after the other adds to the gradient of the words, so that memory holds it once.
    def add_image(d_words: Array, image: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        image_pixels, image_scores, image_grad = image

        def add_block(k: Array, totals: tuple[Array, Array]) -> tuple[Array, Array]:
            take_text = partial(jnp.take, indices=packing.text[k], mode="fill", fill_value=0)
            d_block_pixels, d_block_words = _block_gradients(
                image_pixels,
                words[k],
                packing.first_slot[k],
                take_text(image_scores),
                take_text(image_grad),  # 0 in empty slots, which therefore contribute nothing
                settings,
            )
            d_pixels, d_words = totals
            return d_pixels + d_block_pixels, d_words.at[k].add(d_block_words)

        totals = jnp.zeros_like(image_pixels), d_words
        d_pixels, d_words = lax.fori_loop(0, packing.num_blocks, add_block, totals)
        return d_words, d_pixels

    d_words, d_pixels = lax.scan(add_image, jnp.zeros_like(words), (pixels, scores, grad))
    return d_pixels, d_words, None


_packed_scores.defvjp(_packed_scores_forward, _packed_scores_backward)
