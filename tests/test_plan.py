"""PLAN's equations against slow literal loops, and the properties that pin its refinement."""

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from plan_jax.methods import plan, plan_contrast
from plan_jax.types import MethodContext

HYPER = plan.Hyper(num_sampled_words=5, tile_size=2, num_candidates=3, rounds=2, eta=0.5)
LOSS = jax.jit(plan.loss, static_argnames="hyper")
RNG = np.random.default_rng(1)


def unit(x):
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def draw(*shape):
    return jnp.asarray(unit(RNG.normal(size=shape)), jnp.float32)


def slow_gate(values, kappa):
    return sigmoid((values - values.mean()) / (kappa * values.std() + 1e-9))


def slow_grounding(maps, pixels, words, hyper):
    """Equations 2-5, word by word and pixel by pixel, on real words only."""
    count, size = maps.shape
    tau = hyper.tau_importance
    e = np.array([tau * np.log(np.mean(np.exp(maps[n] / tau))) for n in range(count)])
    f = np.array([tau * np.log(np.mean(np.exp(maps[:, p] / tau))) for p in range(size)])
    alpha, beta = slow_gate(e, hyper.kappa), slow_gate(f, hyper.kappa)
    if count == 1:
        alpha = np.array([0.5])
    match, regions = [], []
    for n in range(count):
        logit = np.array([4 * alpha[n] * beta[p] * maps[n, p] for p in range(size)])
        share = np.exp(logit / hyper.tau_region)
        share /= share.sum()
        vector = unit(sum(share[p] * pixels[p] for p in range(size)))
        regions.append(vector)
        match.append(float(words[n] @ vector))
    return alpha, np.array(regions), np.array(match)


def slow_alignment(pixels, fine, words, hyper, rounds):
    """Equations 1-6 as a Python loop; `fine` is on the same grid here."""
    maps = np.array([[u @ z for z in pixels] for u in words])
    alpha, regions, match = slow_grounding(maps, pixels, words, hyper)
    matches = [match]
    for _ in range(rounds):
        query = unit(words + hyper.eta * alpha[:, None] * regions)
        similarity = np.array([[q @ z for z in fine] for q in query])
        maps = (1 - hyper.rho) * similarity + hyper.rho * maps
        alpha, regions, match = slow_grounding(maps, fine, words, hyper)
        matches.append(match)
    return np.array(matches), maps, alpha


@pytest.mark.parametrize("real", [1, 2, 4])
@pytest.mark.parametrize("rounds", [0, 1, 3])
def test_alignment_is_the_literal_loop(real, rounds):
    pixels, fine, words = draw(9, 6), draw(9, 6), draw(4, 6)
    ids = jnp.arange(1, 5) * (jnp.arange(4) < real)
    matches, maps, alpha = slow_alignment(
        *map(np.asarray, (pixels, fine, words[:real])), HYPER, rounds
    )
    grids = ((3, 3), (3, 3))
    align = jax.jit(plan.align, static_argnums=(2, 3, 4))
    got, got_maps, alpha_ = align(
        plan.ImageSide(pixels, fine), plan.TextSide(words, ids), grids, HYPER, rounds
    )
    np.testing.assert_allclose(got[:, :real], matches, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(got_maps[:real], maps, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(alpha_[:real], alpha, rtol=2e-3, atol=2e-5)


def test_one_real_word_has_finite_gradients():
    pixels, words = draw(9, 6), draw(3, 6)
    ids = jnp.array([4, 0, 0])

    def objective(pixels, words):
        out = plan.align(plan.ImageSide(pixels), plan.TextSide(words, ids), (), HYPER, 2)
        return jnp.sum(out[0]) + jnp.sum(out[1])

    for grad in jax.grad(objective, (0, 1))(pixels, words):
        assert np.isfinite(grad).all()


def test_full_history_keeps_the_first_map():
    hyper = plan.Hyper(rounds=4, rho=1.0)
    pixels, words, ids = draw(9, 6), draw(3, 6), jnp.array([1, 2, 3])
    maps = plan.align(plan.ImageSide(pixels), plan.TextSide(words, ids), (), hyper, 4)[1]
    np.testing.assert_allclose(maps, words @ pixels.T, rtol=1e-5, atol=1e-6)


def test_neutral_gates_leave_the_map_alone():
    maps = draw(3, 9)
    hyper = plan.Hyper(kappa=1e9)
    word, pixel = plan.importance_gates(maps, jnp.ones(3, bool), hyper)
    np.testing.assert_allclose(4 * word[:, None] * pixel, 1.0, atol=1e-5)


def test_alignment_is_equivariant_to_the_order_of_words_and_pixels():
    pixels, words, ids = draw(9, 6), draw(4, 6), jnp.array([1, 2, 3, 0])
    rows, cells = np.array([2, 0, 3, 1]), RNG.permutation(9)
    match, maps, _ = plan.align(plan.ImageSide(pixels), plan.TextSide(words, ids), (), HYPER, 2)
    match_, maps_, _ = plan.align(
        plan.ImageSide(pixels[cells]), plan.TextSide(words[rows], ids[rows]), (), HYPER, 2
    )
    np.testing.assert_allclose(match_, match[:, rows], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(maps_, maps[rows][:, cells], rtol=1e-4, atol=1e-5)


def slow_loss(images, texts, memory, key, hyper):
    """Equations 7-10 with loops over pairs, words and candidates."""
    weight = plan.history_weights(memory, texts.word_id, hyper)
    weight, sample = (
        np.asarray(weight),
        np.asarray(plan_contrast.sample_words(weight, key, hyper.num_sampled_words)),
    )
    z, f, u = (unit(np.asarray(x)) for x in (images.local, images.fine, texts.local))
    ids, size = np.asarray(texts.word_id), len(z)
    up = np.asarray(plan.upsample_maps(jnp.eye(z.shape[1]), images.grid, images.fine_grid))
    match = np.zeros((hyper.rounds + 1, size, size, sample.shape[1]))
    for i in range(size):
        for j in range(size):
            slots = [n for n in range(sample.shape[1]) if ids[j, sample[j, n]] > 0]
            words = u[j, sample[j, slots]]
            maps = words @ z[i].T
            alpha, regions, match[0, i, j, slots] = slow_grounding(maps, z[i], words, hyper)
            maps = maps @ up
            for t in range(hyper.rounds):
                query = unit(words + hyper.eta * alpha[:, None] * regions)
                maps = (1 - hyper.rho) * query @ f[i].T + hyper.rho * maps
                alpha, regions, match[t + 1, i, j, slots] = slow_grounding(maps, f[i], words, hyper)
    total, omega = (
        0.0,
        np.array([hyper.gamma ** (hyper.rounds - t) for t in range(hyper.rounds + 1)]),
    )
    for t in range(hyper.rounds + 1):
        count = hyper.num_candidates if t else size
        report, word = slow_contrast(match[t], weight, sample, ids, hyper, count)
        total += omega[t] / omega.mean() * (hyper.weight_report * report + hyper.weight_word * word)
    x, y = unit(np.asarray(images.pooled)), unit(np.asarray(texts.pooled))
    cosines = x @ y.T / hyper.tau
    return total + hyper.weight_global * (nce(cosines) + nce(cosines.T)) / 2


def nce(table):
    return np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(table)])


def slow_contrast(match, weight, sample, ids, hyper, candidates):
    size = len(match)
    w = np.take_along_axis(weight, sample, 1)
    report = (match * w[None]).sum(-1) / w.sum(-1)[None] / hyper.tau_local  # [image, text]
    near = [[(i - j) % size < candidates for j in range(size)] for i in range(size)]
    by_text, by_image, by_word = [], [], []
    for j in range(size):
        candidates_of_text = [i for i in range(size) if near[i][j]]
        by_text.append(np.log(sum(np.exp(report[i, j]) for i in candidates_of_text)) - report[j, j])
        candidates_of_image = [t for t in range(size) if near[j][t]]
        by_image.append(
            np.log(sum(np.exp(report[j, t]) for t in candidates_of_image)) - report[j, j]
        )
        total = 0.0
        for n, place in enumerate(sample[j]):
            word = ids[j, place]
            allowed = [i for i in candidates_of_text if i == j or word not in ids[i]]
            scores = [np.exp(match[i, j, n] / hyper.tau_local) for i in allowed]
            own = match[j, j, n] / hyper.tau_local
            total += w[j, n] / w[j].sum() * (np.log(sum(scores)) - own)
        by_word.append(total)
    return np.mean(by_text) + np.mean(by_image), np.mean(by_word)


@pytest.mark.parametrize("pairs", [2, 5])
def test_loss_is_the_literal_loop(pairs):
    images, texts = features.make(pairs=pairs)
    hyper = plan.Hyper(
        num_sampled_words=4, tile_size=2, num_candidates=min(3, pairs), rounds=2, eta=0.5
    )
    key = jax.random.key(3)
    params, memory = plan.init(key, MethodContext(8, ema_decay=0.9), hyper)
    memory = {
        "similarity_margin": jnp.linspace(-1, 1, hyper.history_size),
        "count": jnp.ones(hyper.history_size),
    }
    got, _ = LOSS(params, memory, images, texts, {}, key=key, step=jnp.array(0), hyper=hyper)
    np.testing.assert_allclose(got, slow_loss(images, texts, memory, key, hyper), rtol=1e-3)


def test_history_moves_only_the_words_drawn():
    hyper = plan.Hyper(history_size=16, history_decay=0.9)
    memory = {"similarity_margin": jnp.full(16, 1.0), "count": jnp.zeros(16).at[3].set(2.0)}
    ids, gap = jnp.array([[3, 5, 0], [3, 21, 0]]), jnp.array([[0.0, 4.0, 9.0], [2.0, 6.0, 9.0]])
    got = plan.update_history(memory, gap, ids, hyper)
    np.testing.assert_allclose(
        got["similarity_margin"][3], 0.9 * 1.0 + 0.1 * 1.0
    )  # mean of 0 and 2
    np.testing.assert_allclose(
        got["similarity_margin"][5], 5.0
    )  # first seen: 5 and 21 share a slot
    np.testing.assert_allclose(got["similarity_margin"][0], 1.0)  # padding is no word
    assert got["count"].tolist()[:6] == [0, 0, 0, 4, 0, 2]


def test_words_of_longer_history_are_drawn_more_often():
    hyper = plan.Hyper(num_sampled_words=1, history_size=8)
    memory = {"similarity_margin": jnp.array([0, -2.0, 2.0, 0, 0, 0, 0, 0]), "count": jnp.ones(8)}
    ids = jnp.tile(jnp.array([[1, 2, 0]]), (400, 1))
    weight = plan.history_weights(memory, ids, hyper)
    drawn = np.asarray(
        plan_contrast.sample_words(weight, jax.random.key(0), hyper.num_sampled_words)
    )[:, 0]
    share = float(weight[0, 1] / weight[0].sum())
    assert (drawn != 2).all(), "padding was drawn"
    assert abs((drawn == 1).mean() - share) < 0.08


def test_choice_of_words_does_not_look_at_images():
    images, texts = features.make()
    swapped = images.replace(local=images.local[::-1], pooled=images.pooled[::-1])
    hyper, key = plan.Hyper(num_sampled_words=2, rounds=0), jax.random.key(0)
    params, memory = plan.init(key, MethodContext(8, ema_decay=0.9), hyper)
    memories = [
        LOSS(params, memory, side, texts, {}, key=key, step=jnp.array(0), hyper=hyper)[1][1]
        for side in (images, swapped)
    ]
    np.testing.assert_array_equal(memories[0]["count"], memories[1]["count"])


def test_ema_progress_mixes_in_the_averaged_model():
    images, texts = features.make()
    teacher = features.make(seed=5)
    hyper = plan.Hyper(num_sampled_words=4, rounds=0, progress="ema", ema_ramp_steps=10)
    key = jax.random.key(0)
    params, memory = plan.init(key, MethodContext(8, ema_decay=0.9), hyper)

    def value(step, hyper):
        extra = {"teacher": teacher}
        return LOSS(
            params, memory, images, texts, extra, key=key, step=jnp.array(step), hyper=hyper
        )[0]

    plain = plan.Hyper(num_sampled_words=4, rounds=0)
    np.testing.assert_allclose(value(0, hyper), value(0, plain), rtol=1e-5)
    assert abs(value(10, hyper) - value(10, plain)) > 1e-2
    np.testing.assert_allclose(value(10, hyper), value(99, hyper), rtol=1e-6)


def test_enlarging_keeps_the_mean_of_a_smooth_map():
    ramp = jnp.broadcast_to(jnp.arange(4.0), (4, 4)).reshape(1, -1)
    large = plan.upsample_maps(ramp, (4, 4), (8, 8)).reshape(8, 8)
    np.testing.assert_allclose(large.mean(), ramp.mean(), rtol=1e-5)
    assert np.all(np.diff(np.asarray(large)[0]) >= 0)


def test_gate_is_a_standardised_sigmoid():
    x, mask = jnp.asarray(RNG.normal(size=7), jnp.float32), jnp.array([1, 1, 0, 1, 1, 0, 1], bool)
    kept = np.asarray(x)[np.asarray(mask)]
    want = 1 / (1 + np.exp(-(kept - kept.mean()) / (2.0 * kept.std())))
    got = np.asarray(plan.gate(x, mask, 2.0))
    np.testing.assert_allclose(got[mask], want, rtol=1e-4)
    assert (got[~mask] == 0).all()
    np.testing.assert_allclose(plan.gate(x, mask, 1e9)[mask], 0.5, atol=1e-6)
