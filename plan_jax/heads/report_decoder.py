"""A Transformer that generates a report from the patches of an image, with a cache for decoding.

The encoder-decoder on which R2Gen (Chen et al., arXiv 2010.16056) is built, by its published code,
without R2Gen's own method: no relational memory, and plain instead of conditional layer norms.
Norms precede attention and feed-forward (pre-norm); words have sinusoidal positions.

Ours: the channels of each patch are standardised, since towers differ in scale, and patches have
sinusoidal positions of row and column; dropout acts on the output of attention and not on its
weights (which would cost a CPU as much again as attention itself).
Deviation: R2Gen's patches have no position, so left and right can be distinguished only by what a
tower encodes of them; `positions=False` does as R2Gen.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from jax import lax
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from plan_jax.heads.beam_search import Sequences, beam_search, greedy_search
from plan_jax.heads.vocabulary import BEGIN, END, PAD
from plan_jax.layers.transformer import KeyValue, TransformerLayer

KERNEL_INIT = nn.initializers.xavier_uniform()


def sinusoidal_encoding(length: int, width: int) -> Float[np.ndarray, "{length} {width}"]:
    """Returns the position encodings of the Transformer.

    Even channels hold sines and odd ones cosines: *sin(p / 10000^(2i / width)), cos(...)*
    (Vaswani et al., arXiv 1706.03762, section 3.5).
    """
    rate = 10000.0 ** (-np.arange(0, width, 2) / width)
    angle = np.arange(length)[:, None] * rate
    return np.stack([np.sin(angle), np.cos(angle)], -1).reshape(length, -1)[:, :width]


def grid_encoding(grid: tuple[int, int], width: int) -> Float[np.ndarray, "P {width}"]:
    """Returns position encodings of patches, row-major over (Y, X).

    Half of the channels encode the row, the other half the column.
    """
    rows, columns = grid
    half = width // 2
    down = np.repeat(sinusoidal_encoding(rows, half), columns, 0)
    return np.concatenate([down, np.tile(sinusoidal_encoding(columns, width - half), (rows, 1))], 1)


def _dense(width: int) -> nn.Dense:
    return nn.Dense(width, kernel_init=KERNEL_INIT)


class ReportDecoder(nn.Module):
    """Generates a report of an image: logits of the next of `vocabulary` tokens after each token.

    Attributes:
      vocabulary: the number of ids, special ones included.
      length: the largest number of tokens of a report, its end included.
      width: channels of all layers.
      feed_forward: hidden channels of the feed-forward layers.
      heads: attention heads.
      encoder_layers: layers over the patches.
      layers: layers over the words.
      dropout: rate of dropout in the layers and of the embedded words.
      visual_dropout: rate of dropout of the embedded patches.
      positions: whether patches have positions.
      summary: whether the tower's vector for the whole image, `features["pooled"]` Float[B E], is
        read next to the patches (ours).
    """

    vocabulary: int
    length: int
    width: int = 512
    feed_forward: int = 512
    heads: int = 8
    encoder_layers: int = 3
    layers: int = 3
    dropout: float = 0.1
    visual_dropout: float = 0.5
    positions: bool = True
    summary: bool = False

    def setup(self):
        def layer(cross_attention: bool) -> TransformerLayer:
            return TransformerLayer(
                self.width,
                self.heads,
                self.feed_forward,
                cross_attention=cross_attention,
                activation=nn.relu,
                dropout=self.dropout,
                hidden_dropout=self.dropout,
                kernel_init=KERNEL_INIT,
            )

        self.patch = _dense(self.width)
        self.whole = _dense(self.width) if self.summary else None
        self.patch_drop = nn.Dropout(self.visual_dropout)
        self.encoder = [layer(cross_attention=False) for _ in range(self.encoder_layers)]
        self.encoder_norm = nn.LayerNorm()
        self.word = nn.Embed(self.vocabulary, self.width, embedding_init=KERNEL_INIT)
        self.word_drop = nn.Dropout(self.dropout)
        self.decoder = [layer(cross_attention=True) for _ in range(self.layers)]
        self.decoder_norm = nn.LayerNorm()
        self.logit = _dense(self.vocabulary)

    def __call__(
        self, features: Mapping[str, Array], examples: Mapping[str, Any], train: bool = False
    ) -> Float[Array, "B T V"]:
        """Returns the logits of each of `examples["tokens"]` Int[B T], given those before it.

        `features["map"]` is Float[B Y X E]; T is at most `length`.
        """
        tokens = examples["tokens"]
        inputs = jnp.concatenate([jnp.full_like(tokens[:, :1], BEGIN), tokens[:, :-1]], 1)
        count = tokens.shape[1]
        x = self.word_drop(self._embed(inputs, 0), deterministic=not train)
        causal_TT = jnp.tril(jnp.ones((count, count), bool))
        keys = self._dropout_keys(len(self.decoder), train)
        for layer, memory, key in zip(
            self.decoder, self.encode(features, train), keys, strict=True
        ):
            x = layer(x, causal_TT, key, memory).x
        return self.logit(self.decoder_norm(x)).astype(jnp.float32)

    def encode(self, features: Mapping[str, Array], train: bool = False) -> list[KeyValue]:
        """Encodes the patches `features["map"]` Float[B Y X E].

        Returns the keys and values of the image in each layer of the decoder.
        """
        maps = features["map"].astype(jnp.float32)
        x = maps.reshape(len(maps), -1, maps.shape[-1])
        x = jax.nn.standardize(x, -1, epsilon=1e-6)
        x = self.patch_drop(jax.nn.relu(self.patch(x)), deterministic=not train)
        if self.positions:
            x = x + jnp.asarray(grid_encoding((maps.shape[1], maps.shape[2]), self.width), x.dtype)
        if self.whole is not None:
            pooled = jax.nn.standardize(features["pooled"].astype(jnp.float32), -1, epsilon=1e-6)
            x = jnp.concatenate([self.whole(pooled)[:, None], x], 1)
        keys = self._dropout_keys(len(self.encoder), train)
        for layer, key in zip(self.encoder, keys, strict=True):
            x = layer(x, key=key).x
        x = self.encoder_norm(x)
        return [layer.project_memory(x) for layer in self.decoder]

    def _dropout_keys(self, count: int, train: bool) -> list[PRNGKeyArray | None]:
        if not train or not self.dropout:
            return [None] * count
        return list(jax.random.split(self.make_rng("dropout"), count))

    def empty_cache(self, count: int) -> list[KeyValue]:
        """Returns the cache of `count` reports without any token yet."""
        shape = (count, self.length, self.heads, self.width // self.heads)
        return [KeyValue(jnp.zeros(shape), jnp.zeros(shape)) for _ in range(self.layers)]

    def step(
        self,
        memory: list[KeyValue],
        cache: list[KeyValue],
        tokens: Int[Array, " N"],
        position: Int[Array, ""],
    ) -> tuple[Float[Array, "N V"], list[KeyValue]]:
        """Returns the logits after one more token of each report, at `position`, and the new cache.

        N is a multiple of the images in `memory`, which `encode` returns: the beams of an image
        follow each other.
        """
        x, new_cache = self._embed(tokens[:, None], position), []
        # The cache has the full length from the start; places after `position` are still empty.
        mask = (jnp.arange(self.length) <= position)[None]
        for layer, image, past in zip(self.decoder, memory, cache, strict=True):
            x, words, _ = layer(x, mask, None, image, cache=past, position=position)
            new_cache.append(KeyValue(words.key, words.value))
        return self.logit(self.decoder_norm(x))[:, 0].astype(jnp.float32), new_cache

    def _embed(
        self, tokens: Int[Array, "N T"], position: Int[Array, ""] | int
    ) -> Float[Array, "N T D"]:
        table = jnp.asarray(sinusoidal_encoding(self.length, self.width), jnp.float32)
        positions = lax.dynamic_slice_in_dim(table, position, tokens.shape[1])
        return self.word(tokens) * self.width**0.5 + positions


def token_loss(logits: Float[Array, "B T V"], tokens: Int[Array, "B T"]) -> Float[Array, ""]:
    """Computes the mean cross-entropy over the real tokens of a batch, their ends included."""
    mask = tokens != PAD
    losses = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), tokens)
    return jnp.where(mask, losses, 0).sum() / jnp.maximum(mask.sum(), 1)


def generate(
    head: ReportDecoder,
    params: PyTree,
    features: Mapping[str, Array],
    *,
    beam_size: int = 1,
    no_repeat_ngram: int = 0,
    length_penalty: float = 0.0,
) -> Sequences:
    """Generates a report for each image, by greedy search (`beam_size` 1) or beam search.

    `features` are those of `ReportDecoder`. `no_repeat_ngram` and `length_penalty` (beam search
    only) are those of `heads.beam_search`. Padding and beginning are never generated.
    """
    variables = {"params": params}
    memory = head.apply(variables, features, method="encode")
    start = jnp.full(len(features["map"]), BEGIN, jnp.int32)

    def step(cache: PyTree, tokens: Array, position: Array) -> tuple[Array, PyTree]:
        logits, cache = head.apply(variables, memory, cache, tokens, position, method="step")
        return logits.at[:, jnp.array([PAD, BEGIN])].set(-jnp.inf), cache

    cache = head.empty_cache(len(start))
    options = {
        "max_length": head.length,
        "end": END,
        "pad": PAD,
        "no_repeat_ngram": no_repeat_ngram,
    }
    if beam_size == 1:
        return greedy_search(step, cache, start, **options)
    return beam_search(
        step, cache, start, beam_size=beam_size, length_penalty=length_penalty, **options
    )
