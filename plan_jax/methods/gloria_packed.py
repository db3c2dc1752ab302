"""Word-region scores of all images with all texts, on packed words: padding costs nothing.

The real words of all texts lie in blocks of Z slots, no text in two blocks. One image after the
other meets one block after the other, as many as are filled; that number is known only while the
program runs, so JAX cannot derive the loop, and the backward pass is written here. It makes the
tables [Z P] of a block again: nothing of [I T W P] is ever held.

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

With `kind="max"` the score is the largest `factor cos_n`, and h_n is g factor for that word.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from plan_jax.methods import contrastive


class Form(NamedTuple):
    """Constants of the score, and how many words meet an image at a time."""

    sharpness: float  # of a word's attention over pixels
    factor: float  # on cosines, before the sum over words
    kind: Literal["sum", "max"] = "sum"
    slots: int = 128  # of a block; never fewer than a text has, nor more than all texts have


class Packing(NamedTuple):
    """Where the real words of T texts of W slots lie in K blocks of Z slots.

    For each slot of a block: `source` numbers its word among all T W (T W where there is none),
    `text` is its text (T where none) and `first` the slot of that text's first word (Z where none).
    For each text: its `block`, the slot of its first word there as `start`, and its `length` in
    words. The first `count` blocks are in use.
    """

    source: Int[Array, "K Z"]
    text: Int[Array, "K Z"]
    first: Int[Array, "K Z"]
    block: Int[Array, " T"]
    start: Int[Array, " T"]
    length: Int[Array, " T"]
    count: Int[Array, ""]


def pack(mask: Bool[Array, "T W"], slots: int) -> Packing:
    """Put each text into the first block with room for all its real words.

    >>> packed = pack(jnp.array([[1, 1, 1], [1, 1, 0], [0, 1, 0]], bool), 4)
    >>> packed.text.tolist()  # text 2 fits beside text 0, text 1 does not; one block stays empty
    [[0, 0, 0, 2], [1, 1, 3, 3], [3, 3, 3, 3]]
    """
    texts, words = mask.shape
    slots = max(min(slots, texts * words), words)
    blocks = min(texts, 2 * texts * words // slots + 1)  # all but one are more than half full
    length = mask.sum(1, dtype=jnp.int32)

    def place(used: Array, count: Array) -> tuple[Array, tuple[Array, Array]]:
        block = jnp.argmax(used + count <= slots)
        return used.at[block].add(count), (block, used[block])

    used, (block, start) = lax.scan(place, jnp.zeros(blocks, jnp.int32), length)
    offset = block * slots + start
    slot = offset[:, None] + jnp.cumsum(mask, 1) - 1
    slot = jnp.where(mask, slot, blocks * slots)

    def spread(value: Array, none: int) -> Array:
        empty = jnp.full(blocks * slots, none, jnp.int32)
        value = jnp.broadcast_to(value, mask.shape)
        return empty.at[slot].set(value, mode="drop").reshape(blocks, slots)

    number = jnp.arange(texts * words).reshape(mask.shape)
    return Packing(
        source=spread(number, texts * words),
        text=spread(jnp.arange(texts)[:, None], texts),
        first=spread(start[:, None], slots),
        block=block,
        start=start,
        length=length,
        count=jnp.sum(used > 0),
    )


def scores(
    pixels: Float[Array, "I P D"],
    words: Float[Array, "T W D"],
    mask: Bool[Array, "T W"],
    form: Form,
) -> Float[Array, "I T"]:
    """Score every image with every text; about -1e9 for a text without words.

    Memory grows with the features, not with the pairs.
    """
    pixels, words = pixels.astype(jnp.float32), words.astype(jnp.float32)
    packing = pack(mask, form.slots)
    flat = words.reshape(-1, words.shape[-1])
    packed = flat.at[packing.source].get(mode="fill", fill_value=0)
    return _scores(pixels, packed, packing, form)


class _Look(NamedTuple):
    """What Z words see in one image: tables b and a [Z P], contexts c [Z D], the rest [Z]."""

    b: Array
    a: Array
    c: Array
    over_w: Array  # 1 / |w|
    over_c: Array
    cosine: Array


def _by_text(reduce: Callable, x: Array, first: Array) -> Array:
    """Reduce over the words of each text: [Z ...], at the slot of its first word."""
    return reduce(x, first, len(x) + 1, indices_are_sorted=True)


def _look(pixels: Array, words: Array, first: Array, form: Form) -> _Look:
    s = words @ pixels.T
    b = jnp.exp(s - _by_text(jax.ops.segment_max, s, first)[first])
    b = b / _by_text(jax.ops.segment_sum, b, first)[first]
    a = jax.nn.softmax(form.sharpness * b, -1)
    c = a @ pixels
    over_w, over_c = (lax.rsqrt(jnp.sum(x * x, -1) + 1e-12) for x in (words, c))  # as align.unit
    return _Look(b, a, c, over_w, over_c, jnp.sum(words * c, -1) * over_w * over_c)


def _score(pixels: Array, words: Array, first: Array, form: Form) -> Array:
    """Score one image with the texts of a block: [Z], at the slot of each text's first word."""
    match = form.factor * _look(pixels, words, first, form).cosine
    most = _by_text(jax.ops.segment_max, match, first)
    if form.kind == "max":
        return most[:-1]
    return (most + jnp.log(_by_text(jax.ops.segment_sum, jnp.exp(match - most[first]), first)))[:-1]


def _pull(
    pixels: Array, words: Array, first: Array, score: Array, grad: Array, form: Form
) -> tuple[Array, Array]:
    """Give d pixels [P D] and d words [Z D] of a block, from score and gradient of each slot's."""
    b, a, c, over_w, over_c, cosine = _look(pixels, words, first, form)
    match = form.factor * cosine
    part = jnp.exp(match - score) if form.kind == "sum" else match > score - 1e-5
    h = (grad * form.factor * part)[:, None]
    cross, cosine = h * (over_w * over_c)[:, None], h * cosine[:, None]
    dc = cross * words - cosine * (over_c**2)[:, None] * c
    da = dc @ pixels.T
    db = form.sharpness * a * (da - jnp.sum(a * da, -1, keepdims=True))
    ds = b * (db - _by_text(jax.ops.segment_sum, b * db, first)[first])
    dw = cross * c - cosine * (over_w**2)[:, None] * words + ds @ pixels
    return a.T @ dc + ds.T @ words, dw


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def _scores(pixels: Array, words: Array, packing: Packing, form: Form) -> Array:
    """Score [I P D] with packed words [K Z D]: [I T]."""
    slots = words.shape[1]

    def one(pixels: Array) -> Array:
        def block(k: Array, table: Array) -> Array:
            return table.at[k].set(_score(pixels, words[k], packing.first[k], form))

        table = lax.fori_loop(0, packing.count, block, jnp.zeros(words.shape[:2]))
        found = table[packing.block, jnp.minimum(packing.start, slots - 1)]
        return jnp.where(packing.length > 0, found, contrastive.NEG)

    return lax.map(one, pixels)


def _forward(pixels: Array, words: Array, packing: Packing, form: Form) -> tuple[Array, tuple]:
    out = _scores(pixels, words, packing, form)
    return out, (pixels, words, packing, out)


def _backward(form: Form, kept: tuple, grad: Array) -> tuple[Array, Array, None]:
    pixels, words, packing, score = kept

    def one(dwords: Array, image: tuple[Array, Array, Array]) -> tuple[Array, Array]:
        def block(k: Array, total: tuple[Array, Array]) -> tuple[Array, Array]:
            of_slot = partial(jnp.take, indices=packing.text[k], mode="fill", fill_value=0)
            score, grad = of_slot(image[1]), of_slot(image[2])
            found = _pull(image[0], words[k], packing.first[k], score, grad, form)
            return total[0] + found[0], total[1].at[k].add(found[1])

        total = jnp.zeros_like(image[0]), dwords
        dpixels, dwords = lax.fori_loop(0, packing.count, block, total)
        return dwords, dpixels

    dwords, dpixels = lax.scan(one, jnp.zeros_like(words), (pixels, score, grad))
    return dpixels, dwords, None


_scores.defvjp(_forward, _backward)
