"""PLACE's equations against slow literal loops, and what its extractor and decoder must not see."""

from dataclasses import replace
from functools import partial

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from plan_jax import parallel
from plan_jax.methods import place
from plan_jax.types import MethodContext, UserError

# These tests are about values: compiling quickly matters more to them than running quickly.
jit = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})
HYPER = place.Hyper(num_queries=4, num_heads=2, tile_size=2)
MATCHES = ("max", "soft", "attn")
ATTN = replace(HYPER, match="attn", num_decoder_blocks=0)
KEY = jax.random.key(0)
RNG = np.random.default_rng(1)
PARAMS, _ = jit(place.init, static_argnums=(1, 2))(KEY, MethodContext(8), HYPER)
SIMILARITY = jit(place.similarity, static_argnums=4)
HEATMAP = jit(place.heatmap, static_argnums=4)
EXTRACT = jit(place.extract_observations, static_argnums=2)
SCORES = jit(place.late_interaction, static_argnums=3)
SAMPLE_MASK = jit(place.sample_patch_mask, static_argnums=(1, 2, 3))
POSITIONS = jit(place.sinusoidal_positions, static_argnums=(0, 1))
DECODE = jit(lambda hyper, *given: place.Decoder(hyper).apply(*given), static_argnums=0)


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def draw(*shape):
    return RNG.normal(size=shape).astype(np.float32)


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


def batch(pairs=16, raw=True):
    """Ragged texts of up to two sentences, one full and one of a single word, and raw pixels."""
    images, texts = features.make(pairs=pairs, fine=False)
    return images.replace(raw=jnp.asarray(draw(pairs, 9, 5)) if raw else None), texts


def value(params, images, texts, axis=None, hyper=HYPER):
    """The loss of a batch and its parts."""
    out, (metrics, _) = place.loss(
        params, {}, images, texts, {}, key=KEY, step=jnp.array(0), hyper=hyper, axis=axis
    )
    return out, metrics


VALUE = jit(value, static_argnames=("axis", "hyper"))
BOTH = jax.value_and_grad(value, (0, 1, 2), has_aux=True, allow_int=True)
GRADIENT = jit(BOTH, static_argnames=("axis", "hyper"))


def slow_sentences(texts, hyper):
    """Equation 2: a list of sentences, each a unit vector, for each text."""
    head = {name: np.asarray(x) for name, x in PARAMS["sentence"].items()}
    out = []
    for local, sentence in zip(np.asarray(texts.local), np.asarray(texts.sentence), strict=True):
        sentences = []
        for m in range(hyper.max_sentences):
            words = [local[n] for n in range(len(local)) if sentence[n] == m]
            if words:
                sentences.append(unit(np.mean(words, 0) @ head["kernel"] + head["bias"]))
        out.append(sentences)
    return out


def slow_score(observations, sentences, hyper):
    """Equation 3 for one image and one text."""
    total = []
    for t in sentences:
        table = np.array([t @ o for o in observations])
        if hyper.match == "attn":
            total.append(t @ unit(softmax(table / hyper.tau_match) @ observations))
        elif hyper.match == "soft":
            total.append(hyper.tau_match * np.log(np.mean(np.exp(table / hyper.tau_match))))
        else:
            total.append(table.max())
    return np.mean(total)


def nce(table):
    return np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(table)])


def slow_correlations(tokens):
    """Equation 6, pair by pair."""
    away = (tokens - tokens.mean(0)) / tokens.std(0)
    return np.array([[unit(p) @ unit(q) for q in away] for p in away])


def slow_loss(images, texts, hyper):
    """Equations 4-10 with loops over pairs, sentences and patches; the towers' parts are given."""
    observations = np.asarray(EXTRACT(PARAMS, images.local, HYPER)[0])
    sentences, size, pixels = slow_sentences(texts, hyper), len(observations), images.local.shape[1]
    x, y = unit(np.asarray(images.pooled)), unit(np.asarray(texts.pooled))
    total = nce(x @ y.T / hyper.tau) + nce(y @ x.T / hyper.tau)
    if hyper.match == "attn":
        items = [(i, t) for i in range(size) for t in sentences[i]]
        mixtures = [
            unit(softmax(observations[i] @ t / hyper.tau_match) @ observations[i]) for i, t in items
        ]
        table = np.array([[t @ v for v in mixtures] for _, t in items]) / hyper.tau_local
    else:
        table = (
            np.array([[slow_score(o, t, hyper) for t in sentences] for o in observations])
            / hyper.tau_local
        )
    total += nce(table) + nce(table.T)
    hidden = np.asarray(SAMPLE_MASK(KEY, size, pixels, HYPER))
    code = POSITIONS(images.grid, x.shape[1])
    tokens = images.local if images.raw is None else images.raw
    variables = {"params": PARAMS["decoder"]}
    guesses = DECODE(hyper, variables, images.local, hidden, texts.local, texts.mask, code)
    for i in range(size):
        alike = [
            o @ p
            for k, o in enumerate(observations[i])
            for n, p in enumerate(observations[i])
            if k != n
        ]
        total += hyper.weight_variety * np.mean(np.square(alike)) / size
        true = slow_correlations(np.asarray(tokens[i]))
        guessed = unit(np.asarray(guesses[i]) - np.asarray(guesses[i]).mean(0))
        errors = [
            (guessed[p] @ guessed[q] - true[p, q]) ** 2
            for p in range(pixels)
            for q in range(pixels)
            if p != q and hidden[i, [p, q]].any()
        ]
        total += np.mean(errors) / size
    return total


@pytest.mark.parametrize("pairs, match", [(2, "max"), *((16, match) for match in MATCHES)])
def test_scores_are_the_literal_loop(pairs, match):
    images, texts = batch(pairs)
    hyper = replace(HYPER, match=match)
    observations = np.asarray(EXTRACT(PARAMS, images.local, HYPER)[0])
    want = [[slow_score(o, t, hyper) for t in slow_sentences(texts, hyper)] for o in observations]
    got = SIMILARITY(PARAMS, {}, images, texts, hyper)
    np.testing.assert_allclose(got["local"], want, rtol=1e-4, atol=1e-5)
    cosines = unit(np.asarray(images.pooled)) @ unit(np.asarray(texts.pooled)).T
    both = cosines / hyper.tau + np.array(want) / hyper.tau_local
    np.testing.assert_allclose(got["both"], both, rtol=1e-4, atol=1e-4)


def test_a_late_interaction_worked_out_by_hand():
    observations = jnp.array([[[1.0, 0.0], [0.0, 1.0]]])
    sentences = jnp.array([[[0.6, 0.8], [1.0, 0.0], [0.0, 1.0]]])
    real = jnp.array([[True, True, False]])
    np.testing.assert_allclose(
        SCORES(observations, sentences, real, HYPER), [[(0.8 + 1.0) / 2]], rtol=1e-5
    )


@pytest.mark.parametrize(
    "pairs, hyper", [(16, HYPER), (16, ATTN), (2, replace(HYPER, match="soft"))]
)
def test_loss_is_the_literal_loop(pairs, hyper):
    images, texts = batch(pairs, raw=pairs > 2)
    if pairs == 2:
        got, metrics = VALUE(PARAMS, images, texts, hyper=hyper)
    else:
        (got, metrics), _ = GRADIENT(PARAMS, images, texts, hyper=hyper)
    np.testing.assert_allclose(got, slow_loss(images, texts, hyper), rtol=1e-3)
    assert set(metrics) == {"loss_global", "loss_pcma", "loss_cce", "loss_variety"}


def test_sentences_after_the_last_that_counts_are_left_out():
    images, texts = batch()
    hyper = replace(HYPER, max_sentences=1)
    first = texts.sentence == 0
    alone = texts.replace(mask=first, sentence=jnp.where(first, 0, -1))
    want = SIMILARITY(PARAMS, {}, images, alone, HYPER)["local"]
    got = SIMILARITY(PARAMS, {}, images, texts, hyper)["local"]
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    maps, weight = HEATMAP(PARAMS, {}, images, texts, hyper)
    assert (np.asarray(weight) == np.asarray(first)).all()
    assert (np.asarray(maps)[~np.asarray(first)] == 0).all()


@pytest.mark.parametrize("match", MATCHES)
def test_the_order_of_sentences_does_not_matter(match):
    images, texts = batch()
    hyper = replace(HYPER, match=match)
    count = texts.sentence.max(1, keepdims=True)
    turned = texts.replace(sentence=jnp.where(texts.mask, count - texts.sentence, -1))
    want, got = (SIMILARITY(PARAMS, {}, images, t, hyper)["local"] for t in (texts, turned))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    want, got = (HEATMAP(PARAMS, {}, images, t, HYPER)[0] for t in (texts, turned))
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_permuting_queries_permutes_observations_and_leaves_scores():
    images, texts = batch()
    hyper, order = replace(HYPER, num_blocks=2), np.array([2, 0, 3, 1])
    extractor = PARAMS["extractor"] | {"block1": PARAMS["extractor"]["block0"]}
    moved = extractor | {"queries": extractor["queries"][order]}
    observations, attention = EXTRACT({"extractor": extractor}, images.local, hyper)
    observations_, attention_ = EXTRACT({"extractor": moved}, images.local, hyper)
    np.testing.assert_allclose(observations_, observations[:, order], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(attention_, attention[:, order], rtol=1e-4, atol=1e-5)
    sentences, real = unit(draw(16, 2, 8)), np.ones((16, 2), bool)
    for match in MATCHES:
        hyper = replace(HYPER, match=match)
        want, got = (SCORES(o, sentences, real, hyper) for o in (observations, observations_))
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_looks_are_shares_of_the_pixels_and_move_with_them():
    images, _ = batch()
    order = RNG.permutation(9)
    observations, attention = EXTRACT(PARAMS, images.local, HYPER)
    observations_, attention_ = EXTRACT(PARAMS, images.local[:, order], HYPER)
    np.testing.assert_allclose(attention.sum(-1), 1.0, rtol=1e-5)
    np.testing.assert_allclose(observations_, observations, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(attention_, attention[..., order], rtol=1e-4, atol=1e-5)


def test_variety_is_0_for_orthogonal_and_1_for_equal_observations():
    turned, _ = np.linalg.qr(draw(4, 4))
    same = np.repeat(unit(draw(1, 4)), 4, 0)
    paired = turned[[0, 0, 1, 1]]
    got = place.observation_overlap(jnp.asarray(np.stack([turned, same, paired])))
    np.testing.assert_allclose(got, [0, 1, 4 / 12], atol=1e-5)
    assert place.observation_overlap(jnp.ones((1, 1, 4))) == 0


def test_correlations_are_symmetric_positive_and_1_with_themselves():
    tokens = draw(9, 5) * np.array([1, 9, 0.1, 3, 1], np.float32) + 4
    got = np.asarray(jit(place.patch_correlations)(tokens))
    np.testing.assert_allclose(got, slow_correlations(tokens), rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(got, got.T, atol=1e-6)
    np.testing.assert_allclose(np.diag(got), 1.0, rtol=1e-5)
    assert np.linalg.eigvalsh(got.astype(float)).min() > -1e-5


def test_mismatch_counts_only_pairs_that_touch_a_hidden_patch():
    true, hidden = jnp.asarray(draw(4, 4)), jnp.array([True, False, False, False])
    mismatch = jit(place.correlation_error)
    assert mismatch(true, true, hidden) == 0
    off = jnp.zeros((4, 4)).at[(0, 1), (0, 2)].set(9.0)  # a patch with itself; a pair in sight
    assert mismatch(true + off, true, hidden) == 0
    off = jnp.zeros((4, 4)).at[0, 1].set(3.0)
    np.testing.assert_allclose(mismatch(true + off, true, hidden), 9 / 6, rtol=1e-5)


@pytest.mark.parametrize("share, count", [(0.5, 4), (0.0, 1), (1.0, 9)])
def test_hidden_patches_are_as_many_in_each_image_and_differ(share, count):
    hidden = np.asarray(SAMPLE_MASK(KEY, 16, 9, replace(HYPER, mask_ratio=share)))
    assert (hidden.sum(1) == count).all()
    assert len({tuple(row) for row in hidden}) > 1 or share == 1.0
    other = np.asarray(SAMPLE_MASK(jax.random.key(1), 16, 9, replace(HYPER, mask_ratio=share)))
    assert (hidden != other).any() or share == 1.0


def test_the_decoder_does_not_see_what_is_hidden():
    images, texts = batch(2)
    hidden, code = SAMPLE_MASK(KEY, 2, 9, HYPER), POSITIONS(images.grid, 8)

    def total(pixels, words):
        variables = {"params": PARAMS["decoder"]}
        y = place.Decoder(HYPER).apply(variables, pixels, hidden, words, texts.mask, code)
        return jnp.sum(jnp.sin(y))

    pixels, words = jit(jax.grad(total, (0, 1)))(images.local, texts.local)
    assert ((np.abs(pixels).max(-1) > 0) == ~np.asarray(hidden)).all()
    assert ((np.abs(words).max(-1) > 0) == np.asarray(texts.mask)).all()


def test_the_target_of_cce_gives_no_gradient_where_it_is_made_of_the_same_pixels():
    images, texts = batch(2, raw=False)
    hidden = SAMPLE_MASK(KEY, 2, 9, HYPER)

    def total(local):
        return place.correlation_losses(
            PARAMS, images.replace(local=local), texts, hidden, HYPER
        ).sum()

    grads = jit(jax.grad(total))(images.local)
    assert ((np.abs(grads).max(-1) > 0) == ~np.asarray(hidden)).all()


def test_places_have_different_codes():
    code = np.asarray(POSITIONS((3, 4), 8))
    assert code.shape == (12, 8) and len(np.unique(code.round(4), axis=0)) == 12
    np.testing.assert_allclose(code[5], [*np.sin([1, 0.01] * 2), *np.cos([1, 0.01] * 2)], rtol=1e-5)
    assert POSITIONS((3, 3), 6).shape == (9, 6)


@pytest.mark.parametrize("hyper", [HYPER, ATTN])
def test_padded_words_change_nothing(hyper):
    images, texts = batch()
    padded = features.pad(texts)
    (want, _), _ = GRADIENT(PARAMS, images, texts, hyper=hyper)
    got, _ = VALUE(PARAMS, images, padded, hyper=hyper)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    maps, weight = HEATMAP(PARAMS, {}, images, texts, HYPER)
    maps_, weight_ = HEATMAP(PARAMS, {}, images, padded, HYPER)
    np.testing.assert_allclose(maps_[:, :5], maps, rtol=1e-4, atol=1e-5)
    assert (np.asarray(weight) == np.asarray(texts.mask)).all()
    assert (np.asarray(weight_) == np.asarray(padded.mask)).all()


def test_the_map_of_a_word_is_where_the_queries_of_its_sentence_look():
    images, texts = batch()
    observations, attention = (np.asarray(x) for x in EXTRACT(PARAMS, images.local, HYPER))
    maps, _ = HEATMAP(PARAMS, {}, images, texts, HYPER)
    for i, sentences in enumerate(slow_sentences(texts, HYPER)):
        for n, m in enumerate(np.asarray(texts.sentence)[i]):
            level = (
                0 * attention[i, 0]
                if m < 0
                else softmax(observations[i] @ sentences[m] / 0.1) @ attention[i] * 9
            )
            np.testing.assert_allclose(maps[i, n], level / (1 + level), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("hyper", [HYPER, ATTN])
def test_everything_gets_a_gradient_but_the_target_and_padding(hyper):
    images, texts = batch()
    _, (own, observations, sentences) = GRADIENT(PARAMS, images, texts, hyper=hyper)
    if hyper == ATTN:  # its decoder is short, and hears no words
        own["decoder"] = {name: own["decoder"][name] for name in ("token", "norm_out", "out")}
    for path, leaf in jax.tree_util.tree_leaves_with_path(own):
        assert np.isfinite(leaf).all() and np.abs(leaf).max() > 1e-6, path
    for side in (observations, sentences):
        assert np.abs(side.pooled).max() > 0 and np.isfinite(side.local).all()
    assert (np.abs(observations.local).max(-1) > 0).all() and (
        np.asarray(observations.raw) == 0
    ).all()
    assert ((np.abs(sentences.local).max(-1) > 0) == np.asarray(texts.mask)).all()


@pytest.mark.parametrize("hyper", [HYPER, ATTN])
def test_empty_texts_stay_finite(hyper):
    images, texts = batch()
    texts = texts.replace(mask=jnp.zeros_like(texts.mask), sentence=-jnp.ones_like(texts.sentence))
    for leaf in jax.tree.leaves(GRADIENT(PARAMS, images, texts, hyper=hyper)):
        assert leaf.dtype == jax.dtypes.float0 or np.isfinite(leaf).all()


@pytest.mark.parametrize("hyper", [ATTN])  # the contract's test has the default
def test_eight_devices_equal_one(hyper):
    images, texts = batch()
    mesh, cut, same = parallel.make_mesh(8), PartitionSpec(parallel.AXIS), PartitionSpec()

    def part(params, images, texts):
        (out, _), (own, *sides) = BOTH(params, images, texts, axis=parallel.AXIS, hyper=hyper)
        own = parallel.mean(own, parallel.AXIS)
        return out[None], own, [(side.pooled / 8, side.local / 8) for side in sides]

    spread = jax.shard_map(
        part, mesh=mesh, in_specs=(same, cut, cut), out_specs=(cut, same, cut), check_vma=False
    )
    got, own_, sides_ = jit(spread)(PARAMS, images, texts)
    (want, _), (own, *sides) = GRADIENT(PARAMS, images, texts, hyper=hyper)
    np.testing.assert_allclose(got, np.full(8, want), rtol=1e-5)
    sides = [(side.pooled, side.local) for side in sides]
    for a, b in zip(*map(jax.tree.leaves, ((own, sides), (own_, sides_))), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-3, atol=2e-5)


def test_heads_that_do_not_divide_are_refused():
    with pytest.raises(
        UserError, match="hyper.num_heads is 3.*config.embed_dim 8; use a divisor of 8"
    ):
        place.init(KEY, MethodContext(8), place.Hyper(num_heads=3))
