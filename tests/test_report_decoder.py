"""The report decoder against its own cache, literal searches and literal losses."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from literal_search import literal_beam, padded

from plan_jax.heads import report_decoder
from plan_jax.heads.report_decoder import ReportDecoder, generate, grid_encoding, token_loss

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
