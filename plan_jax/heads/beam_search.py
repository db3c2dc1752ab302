"""Greedy and beam search over any step function, under jit: static shapes, a batch at a time.

Deviation: R2Gen's code blocks repeated trigrams in its greedy search only (and halves their
probability twice instead of ruling them out); its beam search, which produced the published
numbers, blocks nothing. Here both rule out what `no_repeat_ngram` says; 0 is what R2Gen does in
effect.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

# step(cache, tokens of N rows, their position) returns the logits [N V] of the next token of each
# row and the new cache, whose leaves have N rows too.
StepFunction = Callable[
    [PyTree, Int[Array, " N"], Int[Array, ""]], tuple[Float[Array, "N V"], PyTree]
]


class Sequences(NamedTuple):
    """Decoded sequences without the start token, and their scores.

    A sequence ends with the end token, unless it reached the maximum length, and is padded after
    it. A score is the sum of the log-probabilities of a sequence's tokens, the end token included
    (beam search divides it by length^length_penalty).
    """

    tokens: Int[Array, "B L"]
    scores: Float[Array, " B"]


def greedy_search(
    step: StepFunction,
    cache: PyTree,
    start: Int[Array, " B"],
    *,
    max_length: int,
    end: int,
    pad: int = 0,
    no_repeat_ngram: int = 0,
) -> Sequences:
    """Decodes by the likeliest next token; the first one among equals.

    Args:
      step: the step function.
      cache: that of B rows before the first token.
      start: the first input of each row.
      max_length: the largest number of tokens.
      end: the id that ends a sequence.
      pad: the id after the end.
      no_repeat_ngram: a token that would repeat an n-gram of this length is ruled out; 0 rules out
        nothing.
    """

    def extend(state: tuple) -> tuple:
        position, tokens, last, done, scores, cache = state
        logits, cache = step(cache, last, position)
        log_probs = _next_log_probs(logits, tokens, position, no_repeat_ngram)
        last = jnp.where(done, pad, log_probs.argmax(1).astype(tokens.dtype))
        scores += jnp.where(done, 0, log_probs.max(1))
        tokens = lax.dynamic_update_slice(tokens, last[:, None], (0, position))
        return position + 1, tokens, last, done | (last == end), scores, cache

    batch = len(start)
    tokens = jnp.full((batch, max_length), pad, start.dtype)
    state = (jnp.int32(0), tokens, start, jnp.zeros(batch, bool), jnp.zeros(batch), cache)
    state = lax.while_loop(lambda s: (s[0] < max_length) & ~s[3].all(), extend, state)
    return Sequences(state[1], state[4])


def beam_search(
    step: StepFunction,
    cache: PyTree,
    start: Int[Array, " B"],
    *,
    beam_size: int,
    max_length: int,
    end: int,
    pad: int = 0,
    no_repeat_ngram: int = 0,
    length_penalty: float = 0.0,
) -> Sequences:
    """Decodes by beam search, and returns the best finished sequence of each row.

    *score = sum of log p / length^length_penalty*: 0 is the plain sum (R2Gen's default), 1 the mean
    log-probability; never negative.

    Of the best `beam_size` continuations of all beams, those that end (or reach `max_length`) leave
    the beam, and the next iteration fills it from the others. The search stops when no live beam
    can exceed the best finished sequence. Among equal continuations the first one wins, by beam,
    then by token.

    Args:
      step: the step function, called with B x beam_size rows, the beams of one row together.
      cache: that of B rows before the first token.
      start: the first input of each row.
      beam_size: the number of beams.
      max_length: the largest number of tokens.
      end: the id that ends a sequence.
      pad: the id after the end.
      no_repeat_ngram: as in `greedy_search`.
      length_penalty: the exponent of the length in the score.
    """
    # Live scores are sums of log-probabilities, which only fall: divided by the largest length they
    # bound all scores that a beam can still reach.
    batch, largest_divisor = len(start), float(max_length) ** length_penalty
    # All beams are equal at first: only one is live, or they would stay copies of each other.
    first_scores = jnp.where(jnp.arange(beam_size) == 0, 0.0, -jnp.inf)
    no_tokens = jnp.full((batch, max_length), pad, start.dtype)
    state = _BeamState(
        position=jnp.int32(0),
        tokens=jnp.full((batch, beam_size, max_length), pad, start.dtype),
        last_tokens=jnp.repeat(start[:, None], beam_size, 1),
        live_scores=jnp.tile(first_scores, (batch, 1)),
        best=Sequences(no_tokens, jnp.full(batch, -jnp.inf)),
        cache=jax.tree.map(lambda x: jnp.repeat(x, beam_size, 0), cache),
    )

    def can_improve(state: _BeamState) -> Bool[Array, ""]:
        bound = state.live_scores.max(1) / largest_divisor
        return (state.position < max_length) & (bound > state.best.scores).any()

    def extend(state: _BeamState) -> _BeamState:
        logits, cache = step(state.cache, state.last_tokens.reshape(-1), state.position)
        prefixes = state.tokens.reshape(batch * beam_size, max_length)
        log_probs = _next_log_probs(logits, prefixes, state.position, no_repeat_ngram)
        totals_BKV = state.live_scores[..., None] + log_probs.reshape(batch, beam_size, -1)
        scores, indices = lax.top_k(totals_BKV.reshape(batch, -1), beam_size)
        parents, last = jnp.divmod(indices, logits.shape[1])
        last = last.astype(start.dtype)
        # Rows of the flat [B K] axis from which each new beam continues.
        rows = (parents + beam_size * jnp.arange(batch)[:, None]).reshape(-1)
        tokens = prefixes[rows].reshape(batch, beam_size, max_length)
        tokens = lax.dynamic_update_slice(tokens, last[..., None], (0, 0, state.position))
        ended = (last == end) | (state.position == max_length - 1)
        final_scores = scores / (state.position + 1.0) ** length_penalty
        return _BeamState(
            position=state.position + 1,
            tokens=tokens,
            last_tokens=last,
            live_scores=jnp.where(ended, -jnp.inf, scores),
            best=_update_best(state.best, tokens, jnp.where(ended, final_scores, -jnp.inf)),
            cache=jax.tree.map(lambda x: x[rows], cache),
        )

    return lax.while_loop(can_improve, extend, state).best


class _BeamState(NamedTuple):
    """The state of a beam search; `live_scores` is minus infinity where a place is empty."""

    position: Int[Array, ""]
    tokens: Int[Array, "B K L"]
    last_tokens: Int[Array, "B K"]
    live_scores: Float[Array, "B K"]
    best: Sequences
    cache: PyTree


def _update_best(
    best: Sequences, tokens: Int[Array, "B K L"], scores: Float[Array, "B K"]
) -> Sequences:
    """Returns the better of `best` and the best of K new sequences; the former among equals."""
    index = scores.argmax(1)[:, None]
    new_scores = jnp.take_along_axis(scores, index, 1)[:, 0]
    new_tokens = jnp.take_along_axis(tokens, index[..., None], 1)[:, 0]
    is_better = new_scores > best.scores
    return Sequences(
        jnp.where(is_better[:, None], new_tokens, best.tokens),
        jnp.where(is_better, new_scores, best.scores),
    )


def _next_log_probs(
    logits: Float[Array, "N V"],
    tokens: Int[Array, "N L"],
    position: Int[Array, ""],
    no_repeat_ngram: int,
) -> Float[Array, "N V"]:
    """Returns log-probabilities, minus infinity for ruled-out tokens, not normalised again."""
    log_probs = jax.nn.log_softmax(logits.astype(jnp.float32))
    if not no_repeat_ngram:
        return log_probs
    repeats = repeats_ngram(tokens, position, logits.shape[1], no_repeat_ngram)
    return jnp.where(repeats, -jnp.inf, log_probs)


def repeats_ngram(
    tokens: Int[Array, "N L"], position: Int[Array, ""], vocabulary_size: int, order: int
) -> Bool[Array, "N V"]:
    """Returns which next tokens would repeat an n-gram of the first `position` tokens, n = `order`.

    With order 1 these are all tokens so far. N-grams may overlap themselves (a a a). Never true
    while there are fewer than `order` tokens.
    """
    batch, length = tokens.shape
    num_starts = length - order + 1  # starts of n-grams that fit into the sequence
    if num_starts < 1:
        return jnp.zeros((batch, vocabulary_size), bool)
    # An n-gram counts if it lies within the tokens so far, and begins with the most recent ones.
    matches = jnp.arange(num_starts) + order - 1 < position
    for n in range(order - 1):
        recent = lax.dynamic_index_in_dim(tokens, position - (order - 1) + n, 1)
        matches = matches & (tokens[:, n : n + num_starts] == recent)
    matches = jnp.broadcast_to(matches, (batch, num_starts))
    last_tokens = tokens[:, order - 1 :]
    repeats = jnp.zeros((batch, vocabulary_size), bool)
    return repeats.at[jnp.arange(batch)[:, None], last_tokens].max(matches)
