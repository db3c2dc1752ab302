"""Greedy and beam search over any step function, in pure lax: static shapes, a batch at a time.

Deviation: R2Gen's code blocks repeated trigrams in its greedy search only (and halves their
probability twice instead of ruling them out); its beam search, which gave the published numbers,
blocks nothing. Here both rule out what `block` says; 0 is what R2Gen does in effect.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

# step(cache, tokens of N rows, their position) gives the logits [N V] of the next token of each row
# and the new cache, whose leaves have N rows too.
Step = Callable[[PyTree, Int[Array, " N"], Int[Array, ""]], tuple[Float[Array, "N V"], PyTree]]


class Decoded(NamedTuple):
    """Sequences, without the start: `end` is their last token, unless they were cut, then `pad`.

    `score` is the sum of the log-probabilities of a sequence's tokens, its end among them (beam
    search divides it by length^penalty).
    """

    tokens: Int[Array, "B L"]
    score: Float[Array, " B"]


def greedy(
    step: Step,
    cache: PyTree,
    start: Int[Array, " B"],
    *,
    length: int,
    end: int,
    pad: int = 0,
    block: int = 0,
) -> Decoded:
    """Take the likeliest next token until the end, or `length` tokens; the first one among equals.

    `cache` is that of B rows before anything was said, `start` their first input. A token that
    would repeat a run of `block` tokens is never taken (0: anything goes).
    """

    def go(state: tuple) -> tuple:
        position, tokens, last, done, score, cache = state
        logits, cache = step(cache, last, position)
        ahead = _log_probabilities(logits, tokens, position, block)
        last = jnp.where(done, pad, ahead.argmax(1).astype(tokens.dtype))
        score += jnp.where(done, 0, ahead.max(1))
        tokens = lax.dynamic_update_slice(tokens, last[:, None], (0, position))
        return position + 1, tokens, last, done | (last == end), score, cache

    count = len(start)
    tokens = jnp.full((count, length), pad, start.dtype)
    state = (jnp.int32(0), tokens, start, jnp.zeros(count, bool), jnp.zeros(count), cache)
    state = lax.while_loop(lambda s: (s[0] < length) & ~s[3].all(), go, state)
    return Decoded(state[1], state[4])


def beam_search(
    step: Step,
    cache: PyTree,
    start: Int[Array, " B"],
    *,
    beam: int,
    length: int,
    end: int,
    pad: int = 0,
    block: int = 0,
    length_penalty: float = 0.0,
) -> Decoded:
    """Keep the `beam` likeliest beginnings of each row, and give the best finished sequence.

    *score = sum of log p / length^length_penalty*: 0 is the plain sum (R2Gen's default), 1 the mean
    log-probability; never negative. What ends (or reaches `length`) among the best `beam` of all
    continuations leaves the beam, its place is taken by continuations of the others; the search
    stops when none of these can become better than the best that ended. `cache` is that of B rows
    before anything was said; `step` is called with B x beam rows, those of one row together. Of
    equal continuations the first one counts, by beginning, then by token. `block` as in `greedy`.
    """
    count, farthest = len(start), float(length) ** length_penalty
    first = jnp.where(jnp.arange(beam) == 0, 0.0, -jnp.inf)  # or the beam were one, many times
    state = _Beams(
        jnp.int32(0),
        jnp.full((count, beam, length), pad, start.dtype),
        jnp.repeat(start[:, None], beam, 1),
        jnp.tile(first, (count, 1)),
        Decoded(jnp.full((count, length), pad, start.dtype), jnp.full(count, -jnp.inf)),
        jax.tree.map(lambda x: jnp.repeat(x, beam, 0), cache),
    )

    def open_still(state: _Beams) -> Bool[Array, ""]:
        hope = state.live.max(1) / farthest > state.best.score
        return (state.position < length) & hope.any()

    def go(state: _Beams) -> _Beams:
        logits, cache = step(state.cache, state.last.reshape(-1), state.position)
        said = state.tokens.reshape(count * beam, length)
        ahead = _log_probabilities(logits, said, state.position, block)
        total = state.live[..., None] + ahead.reshape(count, beam, -1)
        scores, chosen = lax.top_k(total.reshape(count, -1), beam)
        parent, last = jnp.divmod(chosen, logits.shape[1])
        last = last.astype(start.dtype)
        rows = (parent + beam * jnp.arange(count)[:, None]).reshape(-1)
        tokens = said[rows].reshape(count, beam, length)
        tokens = lax.dynamic_update_slice(tokens, last[..., None], (0, 0, state.position))
        ended = (last == end) | (state.position == length - 1)
        final = jnp.where(ended, scores / (state.position + 1.0) ** length_penalty, -jnp.inf)
        return _Beams(
            state.position + 1,
            tokens,
            last,
            jnp.where(ended, -jnp.inf, scores),
            _better(state.best, tokens, final),
            jax.tree.map(lambda x: x[rows], cache),
        )

    return lax.while_loop(open_still, go, state).best


class _Beams(NamedTuple):
    """The state of a beam search; `live` is minus infinity where a place is empty."""

    position: Int[Array, ""]
    tokens: Int[Array, "B K L"]
    last: Int[Array, "B K"]
    live: Float[Array, "B K"]
    best: Decoded
    cache: PyTree


def _better(best: Decoded, tokens: Int[Array, "B K L"], final: Float[Array, "B K"]) -> Decoded:
    """Keep the best of what has ended so far, the older one among equals."""
    pick = final.argmax(1)[:, None]
    score = jnp.take_along_axis(final, pick, 1)[:, 0]
    found = jnp.take_along_axis(tokens, pick[..., None], 1)[:, 0]
    rises = score > best.score
    return Decoded(
        jnp.where(rises[:, None], found, best.tokens), jnp.where(rises, score, best.score)
    )


def _log_probabilities(
    logits: Float[Array, "N V"], tokens: Int[Array, "N L"], position: Int[Array, ""], block: int
) -> Float[Array, "N V"]:
    """Give log-probabilities, minus infinity for blocked tokens, not normalised again."""
    ahead = jax.nn.log_softmax(logits.astype(jnp.float32))
    if not block:
        return ahead
    return jnp.where(repeats(tokens, position, logits.shape[1], block), -jnp.inf, ahead)


def repeats(
    tokens: Int[Array, "N L"], position: Int[Array, ""], vocabulary: int, block: int
) -> Bool[Array, "N V"]:
    """Say which next tokens would repeat a run of `block` tokens of the first `position` ones.

    With `block` 1 these are all tokens said so far; runs may overlap themselves (a a a). Never
    true while fewer than `block` tokens have been said.
    """
    count, length = tokens.shape
    runs = length - block + 1  # beginnings of runs that fit into the sequence
    if runs < 1:
        return jnp.zeros((count, vocabulary), bool)
    same = jnp.arange(runs) + block - 1 < position
    for n in range(block - 1):  # the run's tokens but the last
        recent = lax.dynamic_index_in_dim(tokens, position - (block - 1) + n, 1)
        same = same & (tokens[:, n : n + runs] == recent)
    same = jnp.broadcast_to(same, (count, runs))
    last = tokens[:, block - 1 :]
    return jnp.zeros((count, vocabulary), bool).at[jnp.arange(count)[:, None], last].max(same)
