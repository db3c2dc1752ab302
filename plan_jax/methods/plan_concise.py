"""Concise reports of PLAN: equation 13, as texts that the text tower reads again.

*Abstract only, form ours.*
"""

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from plan_jax.types import TextBatch


def choose_words(weight: Float[Array, "B W"], count: int) -> Bool[Array, "B W"]:
    """Returns which words a concise report has: the `count` of largest weight, *equation 13*.

        (13)  a word n is kept if it is among the `count` of largest w_n

    Of words of equal weight the first ones are kept. Words of weight 0 (padding) never are.
    """
    rows = jnp.arange(len(weight))[:, None]
    chosen_BK = lax.top_k(weight, min(count, weight.shape[1]))[1]
    return jnp.zeros(weight.shape, bool).at[rows, chosen_BK].set(True) & (weight > 0)


def rebuild_texts(text: TextBatch, is_kept: Bool[Array, "B W"]) -> TextBatch:
    """Returns texts of the kept words in their order, with the shapes [B L] and [B W] of before.

    The first and the last piece, [CLS] and [SEP], stay. Other pieces that belong to no word, as
    punctuation, go. Words keep the number of their sentence.
    """

    def rebuild(text: TextBatch, is_kept: Bool[Array, " W"]) -> TextBatch:
        position, slot = jnp.arange(len(text.tokens)), jnp.arange(len(is_kept))
        last = jnp.sum(text.tokens > 0) - 1
        is_end = (position == 0) | (position == last)
        is_piece = is_end | ((text.word_index >= 0) & is_kept[text.word_index])
        # What goes is sorted behind what stays, and is cleared there.
        piece_order = jnp.argsort(~is_piece, stable=True)
        word_order = jnp.argsort(~is_kept, stable=True)
        is_real_piece, is_real_word = position < is_piece.sum(), slot < is_kept.sum()
        old_index = text.word_index[piece_order]
        new_slot = jnp.cumsum(is_kept) - 1
        return TextBatch(
            jnp.where(is_real_piece, text.tokens[piece_order], 0),
            jnp.where(is_real_piece & (old_index >= 0), new_slot[old_index], -1),
            jnp.where(is_real_word, text.word_id[word_order], 0),
            jnp.where(is_real_word, text.sentence[word_order], -1),
        )

    return jax.vmap(rebuild)(text, is_kept)
