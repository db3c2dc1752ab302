"""Decoding against exhaustive and literal searches; the report decoder against its own cache."""

import itertools
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.heads import report_decoder
from plan_jax.heads import vocabulary as report_vocabulary
from plan_jax.heads.beam_search import beam_search, greedy, repeats
from plan_jax.heads.report_decoder import ReportDecoder, attend, places, token_loss, write

END = 0


def toy(seed, rows, vocabulary, length, sharp=2.0):
    """A language model of the last two tokens and the place, another one for each row.

    Returns its step (the cache holds row and last token, so that it must follow the beams), its
    first cache, and the log-probabilities as a function of a row and what was said.
    """
    shape = (rows, vocabulary + 1, vocabulary + 1, length, vocabulary)
    table = np.random.default_rng(seed).normal(size=shape).astype(np.float32) * sharp
    table = np.asarray(jax.nn.log_softmax(table))

    def step(cache, token, position):
        row, last = cache
        return jnp.asarray(table)[row, last, token, position] + 3, (row, token)

    def ahead(row, said):
        one, two = ([vocabulary, vocabulary, *said])[-2:]
        return table[row, one, two, len(said)].astype(np.float64)

    start = jnp.full(rows, vocabulary)
    return step, (jnp.arange(rows), start), start, ahead


def blocked(said, token, block):
    """Whether the token would make a run of `block` tokens that was said before."""
    if not block:
        return False
    runs = {tuple(said[i : i + block]) for i in range(len(said) - block + 1)}
    return (*said, token)[-block:] in runs and len(said) >= block


def padded(said, length, pad):
    return [*said, *[pad] * (length - len(said))]


def literal_greedy(ahead, row, length, block):
    said, score = [], 0.0
    while len(said) < length and END not in said:
        options = ahead(row, said)
        banned = [blocked(tuple(said), v, block) for v in range(len(options))]
        options = np.where(banned, -np.inf, options)
        said.append(int(options.argmax()))
        score += options.max()
    return said, score


def literal_beam(ahead, row, vocabulary, beam, length, penalty, block):
    """The same search with lists: what ended leaves the beam, and counts by its score."""
    live, done = [((), 0.0)], []
    while live and len(live[0][0]) < length:
        ahead_of = [ahead(row, said) for said, _ in live]
        options = [
            ((*said, v), score + values[v])
            for (said, score), values in zip(live, ahead_of, strict=True)
            for v in range(vocabulary)
            if not blocked(said, v, block)
        ]
        options = sorted(options, key=lambda x: -x[1])[:beam]
        ends = [said[-1] == END or len(said) == length for said, _ in options]
        done += [x for x, end in zip(options, ends, strict=True) if end]
        live = [x for x, end in zip(options, ends, strict=True) if not end]
    return max(((s, x / len(s) ** penalty) for s, x in done), key=lambda x: x[1])


def exhaustive(ahead, row, vocabulary, length, penalty):
    """The best of all sequences that end, or are of full length."""
    best = ((), -math.inf)
    for size in range(1, length + 1):
        for said in itertools.product(range(vocabulary), repeat=size):
            if END in said[:-1] or (size < length and said[-1] != END):
                continue
            score = sum(ahead(row, said[:n])[said[n]] for n in range(size)) / size**penalty
            best = max(best, (said, score), key=lambda x: x[1])
    return best


@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_a_beam_of_everything_is_exhaustive(penalty):
    step, cache, start, ahead = toy(1, 6, 4, 3)
    found = beam_search(
        step, cache, start, beam=16, length=3, end=END, pad=9, length_penalty=penalty
    )
    for row in range(6):
        said, score = exhaustive(ahead, row, 4, 3, penalty)
        assert found.tokens[row].tolist() == padded(said, 3, 9)
        assert found.score[row] == pytest.approx(score, abs=1e-4)


def test_a_beam_as_wide_as_the_vocabulary_is_exhaustive_for_two_tokens():
    step, cache, start, ahead = toy(2, 8, 5, 2)
    found = beam_search(step, cache, start, beam=5, length=2, end=END)
    for row in range(8):
        said, score = exhaustive(ahead, row, 5, 2, 0)
        assert found.tokens[row].tolist() == padded(said, 2, 0)
        assert found.score[row] == pytest.approx(score, abs=1e-4)


@pytest.mark.parametrize(("block", "penalty", "beam"), [(0, 0, 3), (2, 0, 3), (3, 1, 2)])
def test_beam_search_is_the_literal_one(block, penalty, beam):
    step, cache, start, ahead = toy(3, 12, 5, 9, sharp=1.0)
    search = partial(beam_search, step, beam=beam, length=9, end=END, pad=7)
    found = search(cache, start, block=block, length_penalty=float(penalty))
    lengths = set()
    for row in range(12):
        said, score = literal_beam(ahead, row, 5, beam, 9, penalty, block)
        assert found.tokens[row].tolist() == padded(said, 9, 7)
        assert found.score[row] == pytest.approx(score, abs=1e-4)
        lengths.add(len(said))
    assert len(lengths) > 2


@pytest.mark.parametrize("block", [0, 1, 2, 3])
def test_greedy_is_a_loop_of_the_likeliest(block):
    step, cache, start, ahead = toy(4, 10, 4, 12)
    found = greedy(step, cache, start, length=12, end=END, pad=8, block=block)
    narrow = beam_search(step, cache, start, beam=1, length=12, end=END, pad=8, block=block)
    for row in range(10):
        said, score = literal_greedy(ahead, row, 12, block)
        assert found.tokens[row].tolist() == padded(said, 12, 8)
        assert found.score[row] == pytest.approx(score, abs=1e-4)
    np.testing.assert_array_equal(found.tokens, narrow.tokens)
    np.testing.assert_allclose(found.score, narrow.score, atol=1e-4)


@pytest.mark.parametrize("block", [1, 2, 3, 4, 9])
def test_repeats_are_those_of_a_loop(block):
    tokens = np.random.default_rng(5).integers(0, 3, (6, 8))
    tokens[0] = 1  # runs that overlap themselves
    find = jax.jit(lambda position: repeats(jnp.asarray(tokens), position, 3, block))
    for position in range(8):
        found = np.asarray(find(jnp.int32(position)))
        for row, token in itertools.product(range(6), range(3)):
            said = tuple(tokens[row, :position].tolist())
            assert bool(found[row, token]) == blocked(said, token, block)


def test_a_search_stops_when_nothing_can_become_better():
    calls = []

    def step(cache, token, position):
        jax.debug.callback(lambda p: calls.append(int(p)), position)
        return jnp.where(jnp.arange(3) == END, 9.0, 0.0) + jnp.zeros((len(token), 1)), cache

    for search in (greedy, partial(beam_search, beam=2)):
        calls.clear()
        found = search(step, jnp.zeros(2), jnp.ones(2, jnp.int32), length=50, end=END, pad=1)
        jax.effects_barrier()
        assert max(calls) == 0 and found.tokens[:, :2].tolist() == [[0, 1], [0, 1]]


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


full = jax.jit(lambda params, *a: HEAD.apply({"params": params}, *a))
remember = jax.jit(lambda params, seen: HEAD.apply({"params": params}, seen, method="remember"))
step_of_head = jax.jit(lambda params, *a: HEAD.apply({"params": params}, *a, method="step"))


@pytest.fixture(scope="module")
def written():
    """Images, tokens, parameters that are not small, and the logits by one full pass."""
    random = np.random.default_rng(6)
    seen = {"map": jnp.asarray(random.normal(size=(3, 2, 4, 5)), jnp.float32)}
    seen["pooled"] = jnp.asarray(random.normal(size=(3, 7)), jnp.float32)
    rows = {"tokens": jnp.asarray(random.integers(3, 11, (3, 6)))}
    shapes = jax.eval_shape(HEAD.init, jax.random.key(0), seen, rows)["params"]
    params = jax.tree.map(lambda x: 0.6 * random.normal(size=x.shape).astype(np.float32), shapes)
    params = jax.tree.map(jnp.asarray, params)
    return seen, rows, params, full(params, seen, rows)


def test_the_cache_gives_what_the_full_pass_gives(written):
    seen, rows, params, logits = written
    memory = remember(params, seen)
    cache, token = HEAD.empty(3), jnp.full(3, report_decoder.BEGIN)
    for position in range(6):
        found, cache = step_of_head(params, memory, cache, token, jnp.int32(position))
        np.testing.assert_allclose(found, logits[:, position], atol=1e-5)
        token = rows["tokens"][:, position]
    assert np.abs(logits[0] - logits[1]).max() > 0.1


def test_the_summary_of_the_image_is_read(written):
    seen, rows, params, logits = written
    other = full(params, seen | {"pooled": seen["pooled"][::-1]}, rows)
    assert np.abs(other[0] - logits[0]).max() > 0.01
    np.testing.assert_allclose(other[1], logits[1], atol=1e-6)


def test_beams_of_one_image_share_what_it_remembers(written):
    seen, rows, params, _ = written
    memory, tokens = remember(params, seen), rows["tokens"].reshape(-1)[:6]
    twice = jax.tree.map(lambda x: jnp.repeat(x, 2, 0), memory)
    shared, apart = (
        step_of_head(params, m, HEAD.empty(6), tokens, jnp.int32(0))[0] for m in (memory, twice)
    )
    np.testing.assert_allclose(shared, apart, atol=1e-5)
    assert np.abs(shared[0] - shared[1]).max() > 0.01


@pytest.mark.parametrize(("beam", "block", "penalty"), [(1, 2, 0.0), (3, 2, 0.5)])
def test_reports_are_those_of_a_search_by_full_passes(written, beam, block, penalty):
    seen, _, params, _ = written

    def ahead(row, said):
        tokens = np.zeros((3, 6), np.int32)
        tokens[row, : len(said)] = said
        logits = full(params, seen, {"tokens": jnp.asarray(tokens)})[row, len(said)]
        ids = [2, 0, 1, *range(3, 11)]  # END of this file is 0
        forbidden = np.isin(ids, [report_decoder.PAD, report_decoder.BEGIN])
        return np.asarray(
            jax.nn.log_softmax(jnp.where(forbidden, -jnp.inf, logits[jnp.array(ids)]))
        )

    def exchanged(row, said):
        return ahead(row, [{0: 2, 1: 0, 2: 1}.get(v, v) for v in said])

    options = {"beam": beam, "block": block, "length_penalty": penalty}
    found = jax.jit(lambda p, s: write(HEAD, p, s, **options))(params, seen)
    for row in range(3):
        said, score = literal_beam(exchanged, row, 11, beam, 6, penalty, block)
        said = [{0: 2}.get(v, v) for v in said]
        assert found.tokens[row].tolist() == padded(said, 6, 0)
        assert found.score[row] == pytest.approx(score, abs=1e-4)


def test_no_word_sees_what_comes_after_it(written):
    seen, rows, params, logits = written
    later = rows["tokens"].at[:, 3].set(3 + (rows["tokens"][:, 3] - 2) % 8)
    changed = full(params, seen, {"tokens": later})
    np.testing.assert_allclose(changed[:, :4], logits[:, :4], atol=1e-5)
    assert np.abs(changed[:, 4:] - logits[:, 4:]).max() > 0.01


def test_patches_have_places_unless_told_otherwise(written):
    seen, rows, params, logits = written
    flipped = seen | {"map": seen["map"][:, :, ::-1]}
    assert np.abs(full(params, flipped, rows) - logits).max() > 0.01
    plain = jax.jit(HEAD.clone(positions=False).apply)
    one, other = (plain({"params": params}, x, rows) for x in (seen, flipped))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_dropout_acts_in_training_only(written):
    seen, rows, params, logits = written
    drop = jax.jit(
        lambda key: HEAD.apply({"params": params}, seen, rows, True, rngs={"dropout": key})
    )
    noisy = [drop(jax.random.key(n)) for n in (0, 0, 1)]
    np.testing.assert_array_equal(noisy[0], noisy[1])
    assert np.abs(noisy[0] - noisy[2]).max() > 0.01
    assert np.abs(noisy[0] - logits).max() > 0.01


def test_places_are_row_major_sinusoids():
    table = places((2, 3), 8)
    for p, (y, x) in enumerate(itertools.product(range(2), range(3))):
        wanted = [f(z * r) for z in (y, x) for r in (1, 0.01) for f in (math.sin, math.cos)]
        np.testing.assert_allclose(table[p], wanted)


@pytest.mark.parametrize("size", [5, 40])
def test_attention_is_that_of_jax_whichever_way_it_runs(size):
    random = np.random.default_rng(7)
    q, k, v = (jnp.asarray(random.normal(size=(2, size, 3, 4)), jnp.float32) for _ in range(3))
    mask = jnp.tril(jnp.ones((size, size), bool))
    assert (size * size >= report_decoder.LARGE) == (size == 40)

    def total(function, q, k, v):
        return jnp.sin(function(q, k, v)).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(partial(total, f), (0, 1, 2)))(q, k, v)
        for f in (lambda *a: attend(*a, mask), partial(jax.nn.dot_product_attention, mask=mask))
    )
    assert ours[0] == pytest.approx(float(theirs[0]), abs=1e-4)
    for one, other in zip(ours[1], theirs[1], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_the_loss_is_the_mean_over_real_tokens():
    random = np.random.default_rng(8)
    logits = random.normal(size=(2, 4, 6)).astype(np.float32)
    tokens, each = np.array([[4, 5, 2, 0], [3, 2, 0, 0]]), []
    for b, t in itertools.product(range(2), range(4)):
        if tokens[b, t]:
            each.append(np.log(np.exp(logits[b, t]).sum()) - logits[b, t, tokens[b, t]])
    assert len(each) == 5
    loss = jax.jit(token_loss)
    assert loss(logits, tokens) == pytest.approx(np.mean(each), abs=1e-5)
    other = np.where(tokens[..., None] == 0, 99, logits).astype(np.float32)
    assert loss(other, tokens) == loss(logits, tokens)
    assert loss(logits, np.zeros_like(tokens)) == 0


def test_ids_mean_the_same_to_texts_and_decoder():
    for name in ("PAD", "BEGIN", "END"):
        assert getattr(report_vocabulary, name) == getattr(report_decoder, name)
