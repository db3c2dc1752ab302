"""PLAN's equations against literal loops, and properties of its refinement."""

import dataclasses
import functools

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from formulas import info_nce, l2_normalise
from test_sparsemax import literal_sparsemax

from plan_jax.methods import plan, plan_contrast
from plan_jax.types import MethodContext

HYPER = plan.Hyper(num_sampled_words=5, tile_size=2, num_candidates=3, rounds=2, eta=0.5)
LOSS = jax.jit(plan.loss, static_argnames="hyper")
RNG = np.random.default_rng(1)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def draw_unit_vectors(*shape):
    """Returns random vectors of length 1 as Float32[shape]."""
    return jnp.asarray(l2_normalise(RNG.normal(size=shape)), jnp.float32)


def literal_gate(values, kappa):
    """Computes equation 2's gate: the sigmoid of the values' z-scores, divided by kappa."""
    return sigmoid((values - values.mean()) / (kappa * values.std() + 1e-9))


def literal_grounding(maps, pixels, words, hyper):
    """Computes equations 2-5 or 12, word by word and pixel by pixel, on real words only."""
    num_words, num_pixels = maps.shape
    tau = hyper.tau_importance
    e = np.array([tau * np.log(np.mean(np.exp(maps[n] / tau))) for n in range(num_words)])
    f = np.array([tau * np.log(np.mean(np.exp(maps[:, p] / tau))) for p in range(num_pixels)])
    alpha, beta = literal_gate(e, hyper.kappa), literal_gate(f, hyper.kappa)
    if num_words == 1:  # a single word cannot be compared with others
        alpha = np.array([0.5])
    matches, regions = [], []
    for n in range(num_words):
        logits = np.array([4 * alpha[n] * beta[p] * maps[n, p] for p in range(num_pixels)])
        if hyper.regions == "sparsemax":
            attention = literal_sparsemax(logits / hyper.tau_region)
        else:
            attention = np.exp(logits / hyper.tau_region)
            attention /= attention.sum()
        region = l2_normalise(sum(attention[p] * pixels[p] for p in range(num_pixels)))
        regions.append(region)
        matches.append(float(words[n] @ region))
    return alpha, np.array(regions), np.array(matches)


def literal_guide(maps, pixels, guide, grid, hyper, steps):
    """Computes equation 11, cell by cell."""
    radius = int(np.ceil(2 * hyper.guide_sigma))
    cells = [(y, x) for y in range(grid[0]) for x in range(grid[1])]
    for _ in range(steps):
        smoothed = np.zeros_like(maps)
        for p, (y, x) in enumerate(cells):
            total = 0.0
            for q, (v, u) in enumerate(cells):
                if max(abs(v - y), abs(u - x)) > radius:
                    continue
                distance = sum((pixels[p] - pixels[q]) ** 2) / hyper.tau_guide
                distance += sum((guide[p] - guide[q]) ** 2) / hyper.tau_grey
                distance += ((v - y) ** 2 + (u - x) ** 2) / (2 * hyper.guide_sigma**2)
                smoothed[:, p] += np.exp(-distance) * maps[:, q]
                total += np.exp(-distance)
            smoothed[:, p] /= total
        maps = smoothed
    return maps


def literal_alignment(pixels, fine, words, hyper, rounds, guide, grid):
    """Computes equations 1-6 as a Python loop; `fine` is on the same grid here."""
    maps = np.array([[u @ z for z in pixels] for u in words])
    alpha, regions, match = literal_grounding(maps, pixels, words, hyper)
    matches = [match]
    for _ in range(rounds):
        query = l2_normalise(words + hyper.eta * alpha[:, None] * regions)
        similarity = np.array([[q @ z for z in fine] for q in query])
        maps = (1 - hyper.rho) * similarity + hyper.rho * maps
        maps = literal_guide(maps, fine, guide, grid, hyper, hyper.guide_round_steps)
        alpha, regions, match = literal_grounding(maps, fine, words, hyper)
        matches.append(match)
    return np.array(matches), maps, alpha


@pytest.mark.parametrize(
    ("num_words", "rounds", "steps"), [(1, 3, 0), (2, 0, 1), (4, 1, 0), (4, 3, 2)]
)
def test_alignment_is_the_literal_loop(num_words, rounds, steps):
    pixels, fine, words = draw_unit_vectors(9, 6), draw_unit_vectors(9, 6), draw_unit_vectors(4, 6)
    guide = jnp.asarray(RNG.normal(size=(9, 2)), jnp.float32)
    hyper = dataclasses.replace(HYPER, guide_round_steps=steps, guide_sigma=0.7)
    ids = jnp.arange(1, 5) * (jnp.arange(4) < num_words)
    arrays = map(np.asarray, (pixels, fine, words[:num_words]))
    grids = ((3, 3), (3, 3))
    matches, maps, alpha = literal_alignment(*arrays, hyper, rounds, np.asarray(guide), grids[1])
    align = jax.jit(plan.align, static_argnums=(2, 3, 4))
    actual_matches, actual_maps, actual_alpha = align(
        plan.ImageSide(pixels, fine, guide=guide), plan.TextSide(words, ids), grids, hyper, rounds
    )
    np.testing.assert_allclose(actual_matches[:, :num_words], matches, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(actual_maps[:num_words], maps, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(actual_alpha[:num_words], alpha, rtol=2e-3, atol=2e-5)


def test_one_real_word_has_finite_gradients():
    pixels, words = draw_unit_vectors(9, 6), draw_unit_vectors(3, 6)
    ids = jnp.array([4, 0, 0])

    def objective(pixels, words):
        image, text = plan.ImageSide(pixels), plan.TextSide(words, ids)
        matches, maps, _ = plan.align(image, text, (), HYPER, 2)
        return jnp.sum(matches) + jnp.sum(maps)

    for gradient in jax.grad(objective, (0, 1))(pixels, words):
        assert np.isfinite(gradient).all()


def test_rho_1_keeps_the_first_map():
    hyper = plan.Hyper(rounds=4, rho=1.0)
    pixels, words, ids = draw_unit_vectors(9, 6), draw_unit_vectors(3, 6), jnp.array([1, 2, 3])
    maps = plan.align(plan.ImageSide(pixels), plan.TextSide(words, ids), (), hyper, 4)[1]
    np.testing.assert_allclose(maps, words @ pixels.T, rtol=1e-5, atol=1e-6)


def test_a_large_kappa_makes_the_gates_neutral():
    maps = draw_unit_vectors(3, 9)
    hyper = plan.Hyper(kappa=1e9)
    word, pixel = plan.importance_gates(maps, jnp.ones(3, bool), hyper)
    np.testing.assert_allclose(4 * word[:, None] * pixel, 1.0, atol=1e-5)


def test_alignment_is_equivariant_to_the_order_of_words_and_pixels():
    pixels, words, ids = draw_unit_vectors(9, 6), draw_unit_vectors(4, 6), jnp.array([1, 2, 3, 0])
    rows, cells = np.array([2, 0, 3, 1]), RNG.permutation(9)
    image, text = plan.ImageSide(pixels), plan.TextSide(words, ids)
    matches, maps, _ = plan.align(image, text, (), HYPER, 2)
    image, text = plan.ImageSide(pixels[cells]), plan.TextSide(words[rows], ids[rows])
    permuted_matches, permuted_maps, _ = plan.align(image, text, (), HYPER, 2)
    np.testing.assert_allclose(permuted_matches, matches[:, rows], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(permuted_maps, maps[rows][:, cells], rtol=1e-4, atol=1e-5)


def literal_loss(images, texts, memory, key, hyper):
    """Computes equations 7-10 with loops over pairs, words and candidates."""
    weight = plan.history_weights(memory, texts.word_id, hyper)
    sample = np.asarray(plan_contrast.sample_words(weight, key, hyper.num_sampled_words))
    weight = np.asarray(weight)
    z, f, u = (l2_normalise(np.asarray(x)) for x in (images.local, images.fine, texts.local))
    ids, size, guide = np.asarray(texts.word_id), len(z), np.asarray(images.guide)
    upsampling = np.asarray(plan.upsample_maps(jnp.eye(z.shape[1]), images.grid, images.fine_grid))
    match = np.zeros((hyper.rounds + 1, size, size, sample.shape[1]))
    for i in range(size):
        for j in range(size):
            slots = [n for n in range(sample.shape[1]) if ids[j, sample[j, n]] > 0]
            words = u[j, sample[j, slots]]
            maps = words @ z[i].T
            alpha, regions, match[0, i, j, slots] = literal_grounding(maps, z[i], words, hyper)
            maps = maps @ upsampling
            for t in range(hyper.rounds):
                query = l2_normalise(words + hyper.eta * alpha[:, None] * regions)
                maps = (1 - hyper.rho) * query @ f[i].T + hyper.rho * maps
                maps = literal_guide(
                    maps, f[i], guide[i], images.fine_grid, hyper, hyper.guide_round_steps
                )
                grounding = literal_grounding(maps, f[i], words, hyper)
                alpha, regions, match[t + 1, i, j, slots] = grounding
    total = 0.0
    omega = np.array([hyper.gamma ** (hyper.rounds - t) for t in range(hyper.rounds + 1)])
    for t in range(hyper.rounds + 1):
        count = hyper.num_candidates if t else size
        report, word = literal_contrast(match[t], weight, sample, ids, hyper, count)
        total += omega[t] / omega.mean() * (hyper.weight_report * report + hyper.weight_word * word)
    x, y = l2_normalise(np.asarray(images.pooled)), l2_normalise(np.asarray(texts.pooled))
    cosines = x @ y.T / hyper.tau
    return total + hyper.weight_global * (info_nce(cosines) + info_nce(cosines.T)) / 2


def literal_contrast(match, weight, sample, ids, hyper, num_candidates):
    """Computes the report and the word loss of one round from its matches."""
    size = len(match)
    w = np.take_along_axis(weight, sample, 1)
    report = (match * w[None]).sum(-1) / w.sum(-1)[None] / hyper.tau_local  # [image, text]
    is_candidate = [[(i - j) % size < num_candidates for j in range(size)] for i in range(size)]
    by_text, by_image, by_word = [], [], []
    for j in range(size):
        candidates_of_text = [i for i in range(size) if is_candidate[i][j]]
        by_text.append(np.log(sum(np.exp(report[i, j]) for i in candidates_of_text)) - report[j, j])
        candidates_of_image = [t for t in range(size) if is_candidate[j][t]]
        by_image.append(
            np.log(sum(np.exp(report[j, t]) for t in candidates_of_image)) - report[j, j]
        )
        total = 0.0
        for n, slot in enumerate(sample[j]):
            word = ids[j, slot]
            allowed = [i for i in candidates_of_text if i == j or word not in ids[i]]
            scores = [np.exp(match[i, j, n] / hyper.tau_local) for i in allowed]
            positive = match[j, j, n] / hyper.tau_local
            total += w[j, n] / w[j].sum() * (np.log(sum(scores)) - positive)
        by_word.append(total)
    return np.mean(by_text) + np.mean(by_image), np.mean(by_word)


@pytest.mark.parametrize(("pairs", "regions"), [(2, "softmax"), (5, "softmax"), (5, "sparsemax")])
def test_loss_is_the_literal_loop(pairs, regions):
    images, texts = features.draw_features(pairs=pairs)
    hyper = plan.Hyper(
        num_sampled_words=4,
        tile_size=2,
        num_candidates=min(3, pairs),
        rounds=2,
        eta=0.5,
        guide_round_steps=2,
        guide_sigma=1.2,
        regions=regions,
    )
    key = jax.random.key(3)
    params, memory = plan.init(key, MethodContext(8, ema_decay=0.9), hyper)
    memory = {
        "similarity_margin": jnp.linspace(-1, 1, hyper.history_size),
        "count": jnp.ones(hyper.history_size),
    }
    actual, _ = LOSS(params, memory, images, texts, {}, key=key, step=jnp.array(0), hyper=hyper)
    np.testing.assert_allclose(actual, literal_loss(images, texts, memory, key, hyper), rtol=1e-3)


def test_only_sampled_words_update_the_history():
    hyper = plan.Hyper(history_size=16, history_decay=0.9)
    memory = {"similarity_margin": jnp.full(16, 1.0), "count": jnp.zeros(16).at[3].set(2.0)}
    ids = jnp.array([[3, 5, 0], [3, 21, 0]])
    margin = jnp.array([[0.0, 4.0, 9.0], [2.0, 6.0, 9.0]])
    actual = plan.update_history(memory, margin, ids, hyper)
    # The new margin of slot 3 is the mean of 0 and 2.
    np.testing.assert_allclose(actual["similarity_margin"][3], 0.9 * 1.0 + 0.1 * 1.0)
    # Words 5 and 21 share a slot that is empty so far, so its margin is their mean.
    np.testing.assert_allclose(actual["similarity_margin"][5], 5.0)
    np.testing.assert_allclose(actual["similarity_margin"][0], 1.0)  # padding is not a word
    assert actual["count"].tolist()[:6] == [0, 0, 0, 4, 0, 2]


def test_words_with_a_larger_margin_are_sampled_more_often():
    hyper = plan.Hyper(num_sampled_words=1, history_size=8)
    memory = {"similarity_margin": jnp.array([0, -2.0, 2.0, 0, 0, 0, 0, 0]), "count": jnp.ones(8)}
    ids = jnp.tile(jnp.array([[1, 2, 0]]), (400, 1))
    weight = plan.history_weights(memory, ids, hyper)
    sample = plan_contrast.sample_words(weight, jax.random.key(0), hyper.num_sampled_words)
    first = np.asarray(sample)[:, 0]
    probability = float(weight[0, 1] / weight[0].sum())
    assert (first != 2).all(), "padding was sampled"
    assert abs((first == 1).mean() - probability) < 0.08


def test_the_sample_of_words_does_not_depend_on_the_images():
    images, texts = features.draw_features()
    swapped = images.replace(local=images.local[::-1], pooled=images.pooled[::-1])
    hyper, key = plan.Hyper(num_sampled_words=2, rounds=0), jax.random.key(0)
    params, memory = plan.init(key, MethodContext(8, ema_decay=0.9), hyper)
    memories = [
        LOSS(params, memory, side, texts, {}, key=key, step=jnp.array(0), hyper=hyper)[1][1]
        for side in (images, swapped)
    ]
    np.testing.assert_array_equal(memories[0]["count"], memories[1]["count"])


def test_ema_progress_adds_the_averaged_model_over_the_ramp():
    images, texts = features.draw_features()
    teacher = features.draw_features(seed=5)
    hyper = plan.Hyper(num_sampled_words=4, rounds=0, progress="ema", ema_ramp_steps=10)
    key = jax.random.key(0)
    params, memory = plan.init(key, MethodContext(8, ema_decay=0.9), hyper)

    def loss(step, hyper):
        extra = {"teacher": teacher}
        return LOSS(
            params, memory, images, texts, extra, key=key, step=jnp.array(step), hyper=hyper
        )[0]

    plain = plan.Hyper(num_sampled_words=4, rounds=0)
    np.testing.assert_allclose(loss(0, hyper), loss(0, plain), rtol=1e-5)
    assert abs(loss(10, hyper) - loss(10, plain)) > 1e-2
    np.testing.assert_allclose(loss(10, hyper), loss(99, hyper), rtol=1e-6)


def test_upsampling_keeps_the_mean_of_a_smooth_map():
    ramp = jnp.broadcast_to(jnp.arange(4.0), (4, 4)).reshape(1, -1)
    large = plan.upsample_maps(ramp, (4, 4), (8, 8)).reshape(8, 8)
    np.testing.assert_allclose(large.mean(), ramp.mean(), rtol=1e-5)
    assert np.all(np.diff(np.asarray(large)[0]) >= 0)


def test_gate_is_a_standardised_sigmoid():
    x, mask = jnp.asarray(RNG.normal(size=7), jnp.float32), jnp.array([1, 1, 0, 1, 1, 0, 1], bool)
    real_entries = np.asarray(x)[np.asarray(mask)]
    expected = 1 / (1 + np.exp(-(real_entries - real_entries.mean()) / (2.0 * real_entries.std())))
    actual = np.asarray(plan.gate(x, mask, 2.0))
    np.testing.assert_allclose(actual[mask], expected, rtol=1e-4)
    assert (actual[~mask] == 0).all()
    np.testing.assert_allclose(plan.gate(x, mask, 1e9)[mask], 0.5, atol=1e-6)


# Hidden pixels and guided maps -------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(3, 4, 5))
def guide_maps(maps, pixels, guide, grid, hyper, steps):
    """Returns maps smoothed along the affinities of their image."""
    return plan.guide_maps(maps, plan.compute_affinity(pixels, guide, grid, hyper), steps)


@pytest.mark.parametrize(("steps", "sigma"), [(1, 0.5), (3, 0.9), (1, 2.5)])
def test_guided_maps_are_the_literal_loop(steps, sigma):
    grid = (4, 5)
    maps = jnp.asarray(RNG.normal(size=(3, 20)), jnp.float32)
    pixels, guide = draw_unit_vectors(20, 6), jnp.asarray(RNG.normal(size=(20, 2)), jnp.float32)
    hyper = plan.Hyper(guide_sigma=sigma, tau_grey=1.0)
    actual = guide_maps(maps, pixels, guide, grid, hyper, steps)
    expected = literal_guide(*map(np.asarray, (maps, pixels, guide)), grid, hyper, steps)
    np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-5)


def test_guidance_keeps_constant_maps_and_can_be_turned_off():
    pixels, guide = draw_unit_vectors(9, 6), jnp.zeros((9, 2))
    flat = jnp.full((2, 9), 0.3)
    actual = guide_maps(flat, pixels, guide, (3, 3), HYPER, 2)
    np.testing.assert_allclose(actual, flat, rtol=1e-5)
    maps = jnp.asarray(RNG.normal(size=(2, 9)), jnp.float32)
    np.testing.assert_array_equal(guide_maps(maps, pixels, guide, (3, 3), HYPER, 0), maps)


def test_heat_does_not_cross_an_edge_of_the_image():
    """Two halves of another grey: the heat of one cell stays in its half."""
    grid, pixels = (4, 6), jnp.ones((24, 1))
    half = jnp.tile(jnp.repeat(jnp.array([-2.0, 2.0]), 3), 4)
    maps = jnp.zeros((1, 24)).at[0, 8].set(1.0)
    smoothed = guide_maps(maps, pixels, jnp.stack([half, half], -1), grid, HYPER, 2)
    np.testing.assert_allclose(smoothed[0, half > 0], 0, atol=1e-6)
    assert (smoothed[0, half < 0] > 0.02).all()


@pytest.mark.parametrize("regions", ["softmax", "sparsemax"])
def test_hidden_pixels_have_no_share_in_a_region(regions):
    pixels, words, ids = draw_unit_vectors(9, 6), draw_unit_vectors(3, 6), jnp.array([1, 2, 3])
    kept = jnp.arange(9) != 4
    image, text = plan.ImageSide(pixels, is_kept=kept), plan.TextSide(words, ids)
    # Shares of all pixels that are kept, if the temperature is high.
    hyper = dataclasses.replace(HYPER, regions=regions, tau_region=10.0)

    def matches(pixels):
        return plan.align(image._replace(pixels=pixels), text, (), hyper, 2).matches.sum()

    gradient = jax.grad(matches)(pixels)
    # A hidden pixel counts in the gates, which have no gradient, and nowhere else.
    assert not gradient[4].any() and all(gradient[p].any() for p in range(9) if p != 4)


def test_hidden_pixels_are_the_same_on_any_number_of_devices():
    images = plan.ImageSide(jnp.zeros((8, 50, 4)), jnp.zeros((8, 200, 4)))
    hyper, key = plan.Hyper(pixel_dropout=0.4), jax.random.key(5)
    whole = plan.hide_pixels(images, key, hyper, None)
    parts = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), images)
    split = jax.vmap(
        lambda part: plan.hide_pixels(part, key, hyper, "devices"), axis_name="devices"
    )
    for name in ("is_kept", "is_fine_kept"):
        kept = getattr(whole, name)
        np.testing.assert_array_equal(kept, getattr(split(parts), name).reshape(kept.shape))
        assert 0.5 < kept.mean() < 0.7 and not (kept[0] == kept[1]).all()


def test_the_loss_with_hidden_pixels_differs_and_is_a_function_of_the_key():
    images, texts = features.draw_features(pairs=4)
    hyper = plan.Hyper(num_sampled_words=4, tile_size=4, num_candidates=3, pixel_dropout=0.5)
    key = jax.random.key(3)
    params, memory = plan.init(key, MethodContext(8), hyper)
    options = {"key": key, "step": jnp.array(0)}
    losses = [
        LOSS(params, memory, images, texts, {}, hyper=constants, **options)[0]
        for constants in (
            hyper,
            hyper,
            plan.Hyper(num_sampled_words=4, tile_size=4, num_candidates=3),
        )
    ]
    assert losses[0] == losses[1] != losses[2] and np.isfinite(losses).all()
