"""The text tower: BERT in Flax linen; a size is a row of data, not a class.

Source: Devlin et al., arXiv 1810.04805, with Hugging Face's semantics (post-norm, LayerNorm eps
1e-12, exact GELU, no pooler). Words are sums of their pieces, as in GLoRIA and MGCA.
Deviation: dropout falls on embeddings and the two branches of a layer, not on attention weights.
"""

from typing import Any, Literal

import jax
import jax.numpy as jnp
from einops import rearrange
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PRNGKeyArray

from plan_jax.encoders.outputs import TextOutput
from plan_jax.layers.cpu.attention import attend
from plan_jax.layers.cpu.gelu import gelu
from plan_jax.layers.transformer import (
    Dense,
    LayerNorm,
    dropout,
    first_attention,
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


def attention_mask(
    word_index: Int[Array, "B L"],
    sentence: Int[Array, "B W"],
    real: Bool[Array, "B L"],
    blocked: bool,
) -> Bool[Array, "B 1 L L"]:
    """Say which piece may look at which: any real one or, if blocked, its own sentence only.

    Pieces that belong to no word ([CLS], [SEP], punctuation) look at everything real, but if
    blocked no word looks at them, so that a word's vector cannot tell of other sentences.
    """
    if not blocked:
        return real[:, None, None, :] & real[:, None, :, None]
    owner = jnp.take_along_axis(sentence, jnp.maximum(word_index, 0), 1)
    owner = jnp.where(word_index >= 0, owner, -1)
    same = (owner[:, :, None] == owner[:, None, :]) | (owner[:, :, None] < 0)
    return (same & real[:, None, :] & real[:, :, None])[:, None]


def pieces_to_words(
    pieces: Float[Array, "B L E"], word_index: Int[Array, "B L"], words: int
) -> Float[Array, "B W E"]:
    """Sum the pieces of each word; pieces with index -1 belong to none.

    >>> pieces_to_words(jnp.ones((1, 4, 1)), jnp.array([[-1, 0, 0, 1]]), 3)[0, :, 0].tolist()
    [2.0, 1.0, 0.0]
    """
    member = jax.nn.one_hot(word_index, words, dtype=pieces.dtype)
    return jnp.einsum("ble,blw->bwe", pieces, member)


class TextLayer(nn.Module):
    """A post-norm BERT layer."""

    heads: int
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(
        self, x: Float[Array, "B L E"], mask: Bool[Array, "B 1 L L"], key: PRNGKeyArray | None
    ) -> tuple[Float[Array, "B L E"], Float[Array, "B L"]]:
        """Apply it; also give the attention of the first piece, mean over heads."""
        width = x.shape[-1]
        keys = (None, None) if key is None else jax.random.split(key)

        def heads(name: str) -> Array:
            y = Dense(width, dtype=self.dtype, name=name)(x)
            return rearrange(y, "b l (h e) -> b l h e", h=self.heads)

        q, k = heads("query"), heads("key")
        y = attend(q, k, heads("value"), mask)
        y = Dense(width, dtype=self.dtype, name="out")(rearrange(y, "b l h e -> b l (h e)"))
        y = dropout(y, self.dropout, keys[0])
        x = LayerNorm(1e-12, name="norm1")(x + y).astype(self.dtype)
        y = gelu(Dense(4 * width, dtype=self.dtype, name="fc1")(x))
        y = Dense(width, dtype=self.dtype, name="fc2")(y)
        y = dropout(y, self.dropout, keys[1])
        x = LayerNorm(1e-12, name="norm2")(x + y).astype(self.dtype)
        return x, first_attention(q, k, mask[:, 0, 0])


class Bert(nn.Module):
    """BERT; the first `depth` layers of a deeper one, if its weights are taken.

    `pool` is `cls` (the first piece), `mean` (of all pieces) or `attention` (a learned weighting of
    the words). `last` adds up the last so many layers (GLoRIA: 4). `blocked` keeps the attention of
    words within their sentence: a report is a list of sentences in no particular order, and a word
    that has seen its neighbours' sentences grounds in them too. `scan`, `remat` and `hold` are
    those of `run_layers`; `hold` > 0 freezes the embeddings too.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    positions: int = 512
    dropout: float = 0.0
    blocked: bool = False
    pool: Literal["cls", "mean", "attention"] = "cls"
    last: int = 1
    scan: bool = False
    remat: bool = False
    hold: int = 0
    dtype: Any = jnp.float32

    def is_frozen(self, name: str) -> bool:
        """Say whether the parameters called `name` in this tower are frozen by `hold`."""
        return self.hold >= self.depth if name == "pool" else is_frozen_layer(name, self.hold)

    @nn.compact
    def __call__(
        self,
        tokens: Int[Array, "B L"],
        word_index: Int[Array, "B L"],
        sentence: Int[Array, "B W"],
        train: bool = False,
    ) -> TextOutput:
        """Read B texts; token 0 is padding."""
        real = tokens > 0
        key = self.make_rng("dropout") if train and self.dropout else None
        x = self._embed(tokens, None if self.hold else key)
        mask = attention_mask(word_index, sentence, real, self.blocked)
        settings = {"heads": self.heads, "dropout": self.dropout, "dtype": self.dtype}
        x, attention = run_layers(self, TextLayer, settings, x, mask, key=key, last=self.last)
        words = pieces_to_words(x, word_index, sentence.shape[1])
        if self.pool == "attention":
            weight = nn.Dense(1, name="pool")(words)[..., 0]
            weight = jax.nn.softmax(jnp.where(sentence >= 0, weight, -1e9), -1)
            weight = lax.stop_gradient(weight) if self.hold >= self.depth else weight
            return TextOutput(jnp.einsum("bwe,bw->be", words, weight), words, weight)
        attention = pieces_to_words(attention[..., None], word_index, sentence.shape[1])[..., 0]
        if self.pool == "mean":
            share = (real / real.sum(1, keepdims=True)).astype(x.dtype)
            return TextOutput(jnp.einsum("ble,bl->be", x, share), words, attention)
        return TextOutput(x[:, 0], words, attention)

    def _embed(self, tokens: Int[Array, "B L"], key: PRNGKeyArray | None) -> Float[Array, "B L E"]:
        """Add up the embeddings of piece, place and kind (always the first of two)."""
        init = nn.initializers.normal(0.02)
        x = nn.Embed(self.vocab, self.width, embedding_init=init, name="token")(tokens)
        place = self.param("position", init, (self.positions, self.width))
        kind = self.param("type", init, (2, self.width))
        x = x + place[: tokens.shape[1]] + kind[0]
        x = LayerNorm(1e-12, name="norm")(x)
        key = None if key is None else jax.random.fold_in(key, self.depth)
        return dropout(x, self.dropout, key).astype(self.dtype)


def make_text_tower(name: str, vocab: int, dtype: Any, **changes: Any) -> Bert:
    """Make the tower called `name` (a row of BERTS), with some of its sizes changed."""
    return Bert(vocab=vocab, dtype=dtype, **{**BERTS[name], **changes})
