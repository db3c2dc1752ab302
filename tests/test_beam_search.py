"""Decoding against exhaustive and literal searches; the report decoder against its own cache."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.heads import report_decoder
from plan_jax.heads.beam_search import beam_search, greedy_search, repeats_ngram
from plan_jax.heads.report_decoder import ReportDecoder, generate, grid_encoding, token_loss

END = 0


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


def repeats(prefix, token, order):
    """Whether the token would complete an n-gram that is in the prefix already."""
    if not order:
        return False
    ngrams = {tuple(prefix[i : i + order]) for i in range(len(prefix) - order + 1)}
    return (*prefix, token)[-order:] in ngrams and len(prefix) >= order


def padded(tokens, length, pad):
    return [*tokens, *[pad] * (length - len(tokens))]


def literal_greedy(log_probs, row, length, order):
    tokens, score = [], 0.0
    while len(tokens) < length and END not in tokens:
        values = log_probs(row, tokens)
        blocked = [repeats(tuple(tokens), v, order) for v in range(len(values))]
        values = np.where(blocked, -np.inf, values)
        tokens.append(int(values.argmax()))
        score += values.max()
    return tokens, score


def literal_beam(log_probs, row, vocabulary_size, beam_size, length, penalty, order):
    """The same search with lists: finished sequences leave the beam, and count by their score."""
    live, finished = [((), 0.0)], []
    while live and len(live[0][0]) < length:
        tables = [log_probs(row, prefix) for prefix, _ in live]
        candidates = [
            ((*prefix, v), score + values[v])
            for (prefix, score), values in zip(live, tables, strict=True)
            for v in range(vocabulary_size)
            if not repeats(prefix, v, order)
        ]
        candidates = sorted(candidates, key=lambda x: -x[1])[:beam_size]
        ends = [tokens[-1] == END or len(tokens) == length for tokens, _ in candidates]
        finished += [x for x, end in zip(candidates, ends, strict=True) if end]
        live = [x for x, end in zip(candidates, ends, strict=True) if not end]
    return max(((s, x / len(s) ** penalty) for s, x in finished), key=lambda x: x[1])


def exhaustive(log_probs, row, vocabulary_size, length, penalty):
    """The best of all sequences that end, or are of full length."""
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


HEAD = ReportDecoder(
    vocabulary=11,
    length=6,
    width=16,
    feed_forward=12,
    heads=2,
    encoder_layers=1,
    layers=2,
    summary=True,
)


full_pass = jax.jit(lambda params, *a: HEAD.apply({"params": params}, *a))
encode = jax.jit(lambda params, x: HEAD.apply({"params": params}, x, method="encode"))
decoder_step = jax.jit(lambda params, *a: HEAD.apply({"params": params}, *a, method="step"))


@pytest.fixture(scope="module")
def decoder_case():
    """Features, examples, parameters that are not small, and the logits by one full pass."""
    random = np.random.default_rng(6)
    features = {"map": jnp.asarray(random.normal(size=(3, 2, 4, 5)), jnp.float32)}
    features["pooled"] = jnp.asarray(random.normal(size=(3, 7)), jnp.float32)
    examples = {"tokens": jnp.asarray(random.integers(3, 11, (3, 6)))}
    shapes = jax.eval_shape(HEAD.init, jax.random.key(0), features, examples)["params"]
    params = jax.tree.map(lambda x: 0.6 * random.normal(size=x.shape).astype(np.float32), shapes)
    params = jax.tree.map(jnp.asarray, params)
    return features, examples, params, full_pass(params, features, examples)


def test_steps_with_a_cache_equal_a_full_pass(decoder_case):
    features, examples, params, logits = decoder_case
    memory = encode(params, features)
    cache, token = HEAD.empty_cache(3), jnp.full(3, report_decoder.BEGIN)
    for position in range(6):
        step_logits, cache = decoder_step(params, memory, cache, token, jnp.int32(position))
        np.testing.assert_allclose(step_logits, logits[:, position], atol=1e-5)
        token = examples["tokens"][:, position]
    assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_the_summary_of_the_image_is_read(decoder_case):
    features, examples, params, logits = decoder_case
    swapped = full_pass(params, features | {"pooled": features["pooled"][::-1]}, examples)
    assert np.abs(swapped[0] - logits[0]).max() > 0.01
    np.testing.assert_allclose(swapped[1], logits[1], atol=1e-6)


def test_beams_of_one_image_share_its_memory(decoder_case):
    features, examples, params, _ = decoder_case
    memory, tokens = encode(params, features), examples["tokens"].reshape(-1)[:6]
    repeated = jax.tree.map(lambda x: jnp.repeat(x, 2, 0), memory)
    shared_logits, repeated_logits = (
        decoder_step(params, m, HEAD.empty_cache(6), tokens, jnp.int32(0))[0]
        for m in (memory, repeated)
    )
    np.testing.assert_allclose(shared_logits, repeated_logits, atol=1e-5)
    assert np.abs(shared_logits[0] - shared_logits[1]).max() > 0.01


@pytest.mark.parametrize(("beam_size", "order", "penalty"), [(1, 2, 0.0), (3, 2, 0.5)])
def test_reports_are_those_of_a_search_by_full_passes(decoder_case, beam_size, order, penalty):
    features, _, params, _ = decoder_case

    def log_probs(row, prefix):
        tokens = np.zeros((3, 6), np.int32)
        tokens[row, : len(prefix)] = prefix
        logits = full_pass(params, features, {"tokens": jnp.asarray(tokens)})[row, len(prefix)]
        ids = [2, 0, 1, *range(3, 11)]  # the literal search ends at 0, the decoder at 2
        forbidden = np.isin(ids, [report_decoder.PAD, report_decoder.BEGIN])
        logits = jnp.where(forbidden, -jnp.inf, logits[jnp.array(ids)])
        return np.asarray(jax.nn.log_softmax(logits))

    def permuted_log_probs(row, prefix):
        return log_probs(row, [{0: 2, 1: 0, 2: 1}.get(v, v) for v in prefix])

    options = {"beam_size": beam_size, "no_repeat_ngram": order, "length_penalty": penalty}
    decoded = jax.jit(lambda p, x: generate(HEAD, p, x, **options))(params, features)
    for row in range(3):
        tokens, score = literal_beam(permuted_log_probs, row, 11, beam_size, 6, penalty, order)
        tokens = [{0: 2}.get(v, v) for v in tokens]
        assert decoded.tokens[row].tolist() == padded(tokens, 6, 0)
        assert decoded.scores[row] == pytest.approx(score, abs=1e-4)


def test_logits_depend_on_earlier_tokens_only(decoder_case):
    features, examples, params, logits = decoder_case
    later = examples["tokens"].at[:, 3].set(3 + (examples["tokens"][:, 3] - 2) % 8)
    changed = full_pass(params, features, {"tokens": later})
    np.testing.assert_allclose(changed[:, :4], logits[:, :4], atol=1e-5)
    assert np.abs(changed[:, 4:] - logits[:, 4:]).max() > 0.01


def test_patches_have_positions_unless_switched_off(decoder_case):
    features, examples, params, logits = decoder_case
    flipped = features | {"map": features["map"][:, :, ::-1]}
    assert np.abs(full_pass(params, flipped, examples) - logits).max() > 0.01
    plain = jax.jit(HEAD.clone(positions=False).apply)
    upright_logits, flipped_logits = (
        plain({"params": params}, x, examples) for x in (features, flipped)
    )
    np.testing.assert_allclose(upright_logits, flipped_logits, atol=1e-5)


def test_dropout_acts_in_training_only(decoder_case):
    features, examples, params, logits = decoder_case
    train_pass = jax.jit(
        lambda key: HEAD.apply({"params": params}, features, examples, True, rngs={"dropout": key})
    )
    noisy = [train_pass(jax.random.key(n)) for n in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - noisy[2]).max() > 0.01
    assert np.abs(noisy[0] - logits).max() > 0.01


def test_positions_are_row_major_sinusoids():
    table = grid_encoding((2, 3), 8)
    for p, (y, x) in enumerate(itertools.product(range(2), range(3))):
        expected = [f(z * r) for z in (y, x) for r in (1, 0.01) for f in (math.sin, math.cos)]
        np.testing.assert_allclose(table[p], expected)


def test_the_loss_is_the_mean_over_real_tokens():
    random = np.random.default_rng(8)
    logits = random.normal(size=(2, 4, 6)).astype(np.float32)
    tokens, losses = np.array([[4, 5, 2, 0], [3, 2, 0, 0]]), []
    for b, t in itertools.product(range(2), range(4)):
        if tokens[b, t]:
            losses.append(np.log(np.exp(logits[b, t]).sum()) - logits[b, t, tokens[b, t]])
    assert len(losses) == 5
    loss = jax.jit(token_loss)
    assert loss(logits, tokens) == pytest.approx(np.mean(losses), abs=1e-5)
    changed_padding = np.where(tokens[..., None] == 0, 99, logits).astype(np.float32)
    assert loss(changed_padding, tokens) == loss(logits, tokens)
    assert loss(logits, np.zeros_like(tokens)) == 0
