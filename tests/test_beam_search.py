"""Greedy and beam search against exhaustive and literal searches."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from literal_search import END, literal_beam, padded, repeats

from plan_jax.heads.beam_search import beam_search, greedy_search, repeats_ngram


def trigram_model(seed, rows, vocabulary_size, length, scale=2.0):
    """A language model of the last two tokens and the position, a different one for each row.

    Returns its step (the cache holds row and last token, so that it must follow the beams), its
    first cache, its start tokens, and the log-probabilities as a function of a row and a prefix.
    """
    size = vocabulary_size
    shape = (rows, size + 1, size + 1, length, size)
    table = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * scale
    table = np.asarray(jax.nn.log_softmax(table))

    def step(cache, token, position):
        row, last = cache
        # A constant on all logits, which a softmax must remove.
        return jnp.asarray(table)[row, last, token, position] + 3, (row, token)

    def log_probs(row, prefix):
        previous, last = ([size, size, *prefix])[-2:]
        return table[row, previous, last, len(prefix)].astype(np.float64)

    start = jnp.full(rows, size)
    return step, (jnp.arange(rows), start), start, log_probs


def literal_greedy(log_probs, row, length, order):
    tokens, score = [], 0.0
    while len(tokens) < length and END not in tokens:
        values = log_probs(row, tokens)
        blocked = [repeats(tuple(tokens), v, order) for v in range(len(values))]
        values = np.where(blocked, -np.inf, values)
        tokens.append(int(values.argmax()))
        score += values.max()
    return tokens, score


def exhaustive(log_probs, row, vocabulary_size, length, penalty):
    """Returns the best of all sequences that end, or are of full length, with its score."""
    best = ((), -math.inf)
    for size in range(1, length + 1):
        for tokens in itertools.product(range(vocabulary_size), repeat=size):
            if END in tokens[:-1] or (size < length and tokens[-1] != END):
                continue
            score = sum(log_probs(row, tokens[:n])[tokens[n]] for n in range(size))
            best = max(best, (tokens, score / size**penalty), key=lambda x: x[1])
    return best


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_a_beam_of_everything_is_exhaustive(penalty):
    step, cache, start, log_probs = trigram_model(1, 6, 4, 3)
    sizes = {"beam_size": 16, "max_length": 3}
    decoded = beam_search(step, cache, start, **sizes, end=END, pad=9, length_penalty=penalty)
    for row in range(6):
        tokens, score = exhaustive(log_probs, row, 4, 3, penalty)
        assert decoded.tokens[row].tolist() == padded(tokens, 3, 9)
        assert decoded.scores[row] == pytest.approx(score, abs=1e-4)


def test_a_beam_as_wide_as_the_vocabulary_is_exhaustive_for_two_tokens():
    step, cache, start, log_probs = trigram_model(2, 8, 5, 2)
    decoded = beam_search(step, cache, start, beam_size=5, max_length=2, end=END)
    for row in range(8):
        tokens, score = exhaustive(log_probs, row, 5, 2, 0)
        assert decoded.tokens[row].tolist() == padded(tokens, 2, 0)
        assert decoded.scores[row] == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(("order", "penalty", "beam_size"), [(0, 0, 3), (2, 0, 3), (3, 1, 2)])
def test_beam_search_is_the_literal_one(order, penalty, beam_size):
    step, cache, start, log_probs = trigram_model(3, 12, 5, 9, scale=1.0)
    search = partial(beam_search, step, beam_size=beam_size, max_length=9, end=END, pad=7)
    decoded = search(cache, start, no_repeat_ngram=order, length_penalty=float(penalty))
    lengths = set()
    for row in range(12):
        tokens, score = literal_beam(log_probs, row, 5, beam_size, 9, penalty, order)
        assert decoded.tokens[row].tolist() == padded(tokens, 9, 7)
        assert decoded.scores[row] == pytest.approx(score, abs=1e-4)
        lengths.add(len(tokens))
    assert len(lengths) > 2


@pytest.mark.parametrize("order", [0, 1, 2, 3])
def test_greedy_search_is_a_loop_of_the_likeliest(order):
    step, cache, start, log_probs = trigram_model(4, 10, 4, 12)
    options = {"max_length": 12, "end": END, "pad": 8, "no_repeat_ngram": order}
    decoded = greedy_search(step, cache, start, **options)
    single_beam = beam_search(step, cache, start, beam_size=1, **options)
    for row in range(10):
        tokens, score = literal_greedy(log_probs, row, 12, order)
        assert decoded.tokens[row].tolist() == padded(tokens, 12, 8)
        assert decoded.scores[row] == pytest.approx(score, abs=1e-4)
    np.testing.assert_array_equal(decoded.tokens, single_beam.tokens)
    np.testing.assert_allclose(decoded.scores, single_beam.scores, atol=1e-4)


@pytest.mark.parametrize("order", [1, 2, 3, 4, 9])
def test_repeated_ngrams_are_those_of_a_loop(order):
    tokens = np.random.default_rng(5).integers(0, 3, (6, 8))
    tokens[0] = 1  # n-grams that overlap themselves
    find = jax.jit(lambda position: repeats_ngram(jnp.asarray(tokens), position, 3, order))
    for position in range(8):
        table = np.asarray(find(jnp.int32(position)))
        for row, token in itertools.product(range(6), range(3)):
            prefix = tuple(tokens[row, :position].tolist())
            assert bool(table[row, token]) == repeats(prefix, token, order)


def test_a_search_stops_when_no_beam_can_improve():
    calls = []

    def step(cache, token, position):
        jax.debug.callback(lambda p: calls.append(int(p)), position)
        return jnp.where(jnp.arange(3) == END, 9.0, 0.0) + jnp.zeros((len(token), 1)), cache

    for search in (greedy_search, partial(beam_search, beam_size=2)):
        calls.clear()
        start = jnp.ones(2, jnp.int32)
        decoded = search(step, jnp.zeros(2), start, max_length=50, end=END, pad=1)
        jax.effects_barrier()
        assert max(calls) == 0 and decoded.tokens[:, :2].tolist() == [[0, 1], [0, 1]]
