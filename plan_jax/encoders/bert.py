"""The text tower: BERT in Flax linen; a size is a row of data, not a class.

Source: Devlin et al., arXiv 1810.04805, with Hugging Face's semantics (post-norm, LayerNorm eps
1e-12, exact GELU). Words are sums of their pieces, as in GLoRIA and MGCA.
Deviation: dropout is applied to the embeddings and the two branches of a layer, not to attention
weights.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int, Key

from plan_jax.encoders import TextOutput
from plan_jax.layers.dense import Dense
from plan_jax.layers.transformer import (
    MASKED_LOGIT,
    LayerNorm,
    dropout,
    fold_in,
    is_frozen_layer,
    run_layers,
)

BERTS = {
    "bert_base": {"width": 768, "depth": 12, "heads": 12},
    "bert_base_6": {"width": 768, "depth": 6, "heads": 12},
    "minilm": {"width": 384, "depth": 6, "heads": 12},
    "bert_small": {"width": 64, "depth": 2, "heads": 4},
    "bert_tiny": {"width": 16, "depth": 1, "heads": 2},
}
EPSILON = 1e-12  # of every LayerNorm, as in Hugging Face's BERT


def attention_mask(
    word_index: Int[Array, "B L"],
    sentence: Int[Array, "B W"],
    is_real: Bool[Array, "B L"],
    block_diagonal: bool,
) -> Bool[Array, "B 1 L L"]:
    """Returns which piece (row) attends to which (column).

    A piece attends to all real pieces or, if `block_diagonal`, to those of its own sentence. Pieces
    that belong to no word ([CLS], [SEP], punctuation) attend to all real pieces, but if
    `block_diagonal` no word attends to them, so that no other sentence can leak into the vector of
    a word.
    """
    if not block_diagonal:
        return is_real[:, None, None, :] & is_real[:, None, :, None]
    # The sentence of each piece; -1 for a piece that belongs to no word.
    piece_sentence = jnp.take_along_axis(sentence, jnp.maximum(word_index, 0), 1)
    piece_sentence = jnp.where(word_index >= 0, piece_sentence, -1)
    row_sentence, column_sentence = piece_sentence[:, :, None], piece_sentence[:, None, :]
    allowed = (row_sentence == column_sentence) | (row_sentence < 0)
    return (allowed & is_real[:, None, :] & is_real[:, :, None])[:, None]


def sum_pieces(
    pieces: Float[Array, "B L E"], word_index: Int[Array, "B L"], num_words: int
) -> Float[Array, "B W E"]:
    """Sums the pieces of each word; pieces with index -1 belong to no word.

    >>> sum_pieces(jnp.ones((1, 4, 1)), jnp.array([[-1, 0, 0, 1]]), 3)[0, :, 0].tolist()
    [2.0, 1.0, 0.0]
    """
    # An index of -1 gives a row of zeros.
    membership = jax.nn.one_hot(word_index, num_words, dtype=pieces.dtype)
    return jnp.einsum("ble,blw->bwe", pieces, membership)


class Bert(nn.Module):
    """BERT; with a smaller `depth` than a published model it has the first layers of that model.

    `pool` is `cls` (the first piece), `mean` (of all pieces), `attention` (a learned weighting of
    the words) or `pooler` (BERT's own: tanh of a linear layer on the first piece).
    `sum_last_layers` is the number of last layers whose outputs are summed (GLoRIA: 4).
    `block_diagonal` restricts the attention of words to their sentence: a report is a list of
    sentences in no particular order, and a word that attends to neighbouring sentences grounds in
    their findings too. `scan`, `remat` and `frozen_layers` are those of `run_layers`; with any
    frozen layer the embeddings are frozen too.
    """

    vocab_size: int
    width: int
    depth: int
    heads: int
    positions: int = 512  # word pieces of the longest text
    dropout: float = 0.0  # share of activations and attention weights
    block_diagonal: bool = False
    pool: Literal["cls", "mean", "attention", "pooler"] = "cls"
    sum_last_layers: int = 1
    scan: bool = False
    remat: bool = False
    frozen_layers: int = 0
    dtype: Any = jnp.float32

    def is_frozen(self, name: str) -> bool:
        """Returns whether `frozen_layers` freezes this tower's parameters called `name`."""
        if name in ("pool", "pooler"):
            return self.frozen_layers >= self.depth
        return is_frozen_layer(name, self.frozen_layers)

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B L"],
        word_index: Int[Array, "B L"],
        sentence: Int[Array, "B W"],
        train: bool = False,
        index: Int[Array, " B"] | None = None,
    ) -> TextOutput:
        """Encodes B texts; token 0 is padding.

        With `index`, the place of each text in the whole batch, dropout of a text depends on its
        place and the key alone, and not on the part of the batch that is encoded at a time.
        """
        is_real = tokens > 0
        num_words = sentence.shape[1]
        key = self.make_rng("dropout") if train and self.dropout else None
        key = key if key is None or index is None else fold_in(key, index)
        # Frozen layers run as in evaluation, so they have no dropout either.
        embeddings = self._embed(tokens, None if self.frozen_layers else key)
        mask = attention_mask(word_index, sentence, is_real, self.block_diagonal)
        options = {
            "width": self.width,
            "num_heads": self.heads,
            "hidden": 4 * self.width,
            "pre_norm": False,
            "epsilon": EPSILON,
            "dropout": self.dropout,
            "dtype": self.dtype,
        }
        pieces, attention = run_layers(self, options, embeddings, mask, key, self.sum_last_layers)
        words = sum_pieces(pieces, word_index, num_words)
        if self.pool == "attention":
            logits = nn.Dense(1, name="pool")(words)[..., 0]
            weights = jax.nn.softmax(jnp.where(sentence >= 0, logits, MASKED_LOGIT), -1)
            if self.frozen_layers >= self.depth:
                weights = lax.stop_gradient(weights)
            return TextOutput(jnp.einsum("bwe,bw->be", words, weights), words, weights)
        # Of each piece, and of the piece that follows it.
        attentions = jnp.stack([attention, jnp.pad(attention[:, 1:], ((0, 0), (0, 1)))], -1)
        word_attentions = sum_pieces(attentions, word_index, num_words)
        word_attention, next_attention = word_attentions[..., 0], word_attentions[..., 1]
        if self.pool == "mean":
            weights = is_real / is_real.sum(1, keepdims=True)
            pooled = jnp.einsum("ble,bl->be", pieces, weights)
            return TextOutput(pooled, words, word_attention, next_attention)
        pooled = pieces[:, 0]
        if self.pool == "pooler":
            pooled = Dense(self.width, dtype=self.dtype, name="pooler")(pooled)
            pooled = nn.tanh(pooled.astype(jnp.float32))
            if self.frozen_layers >= self.depth:
                pooled = lax.stop_gradient(pooled)
        return TextOutput(pooled, words, word_attention, next_attention)

    def _embed(
        self, tokens: Int[Array, "B L"], key: Key[Array, "*R"] | None
    ) -> Float[Array, "B L E"]:
        """Returns the normalised sum of the embeddings of piece, position and type."""
        initializer = nn.initializers.normal(0.02)
        embed = nn.Embed(self.vocab_size, self.width, embedding_init=initializer, name="token")
        position = self.param("position", initializer, (self.positions, self.width))
        # Published models have two types, for pairs of texts. A report is a single text, of type 0.
        token_type = self.param("type", initializer, (2, self.width))
        embeddings = embed(tokens) + position[: tokens.shape[1]] + token_type[0]
        embeddings = LayerNorm(EPSILON, name="norm")(embeddings)
        # Layer n folds n < depth into the key, so depth itself is free.
        key = None if key is None else fold_in(key, self.depth)
        return dropout(embeddings, self.dropout, key).astype(self.dtype)
