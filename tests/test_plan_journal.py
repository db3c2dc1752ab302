"""The journal's ingredients of PLAN: equations 13 to 15 against literal loops, and the step."""

import dataclasses
from functools import cache

import features
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import random_batch
from tiny_models import TOWERS

from configs import testing
from plan_jax import parallel
from plan_jax.config import Config
from plan_jax.methods import contrastive, plan, plan_concise, plan_contrast
from plan_jax.model import build_components
from plan_jax.state import init_state
from plan_jax.step import make_step
from plan_jax.types import MethodContext, TextBatch, UserError

HYPER = plan.Hyper(num_sampled_words=4, tile_size=8, rounds=0)
KEY = jax.random.key(3)

# Concise reports --------------------------------------------------------------------------------


def test_the_heaviest_words_are_chosen_and_padding_never():
    weight = jnp.array([[0.2, 0.9, 0.5, 0.5, 0.5], [0.3, 0.0, 0.0, 0.0, 0.0]])
    expected = [[False, True, True, True, False], [True, False, False, False, False]]
    np.testing.assert_array_equal(plan_concise.choose_words(weight, 3), expected)
    np.testing.assert_array_equal(plan_concise.choose_words(weight, 9), weight > 0)


def test_a_concise_report_has_the_pieces_of_its_words_in_their_order():
    text = TextBatch(  # [CLS] 0 0 1 . 2 3 3 [SEP] and padding
        tokens=jnp.array([[101, 7, 8, 9, 4, 10, 11, 12, 102, 0]]),
        word_index=jnp.array([[-1, 0, 0, 1, -1, 2, 3, 3, -1, -1]]),
        word_id=jnp.array([[21, 22, 23, 24, 0]]),
        sentence=jnp.array([[0, 0, 1, 1, -1]]),
    )
    concise = plan_concise.rebuild_texts(text, jnp.array([[True, False, False, True, False]]))
    assert concise.tokens[0].tolist() == [101, 7, 8, 11, 12, 102, 0, 0, 0, 0]
    assert concise.word_index[0].tolist() == [-1, 0, 0, 1, 1, -1, -1, -1, -1, -1]
    assert concise.word_id[0].tolist() == [21, 24, 0, 0, 0]
    assert concise.sentence[0].tolist() == [0, 1, -1, -1, -1]


def test_concise_reports_are_those_of_a_literal_loop():
    text = jax.tree.map(jnp.asarray, random_batch(6).text)
    hyper = plan.Hyper(concise_start_step=1, concise_words=3, history_size=64)
    margin = jax.random.normal(KEY, (64,))
    memory = {"similarity_margin": margin, "count": jnp.ones(64)}
    concise = jax.jit(plan.shorten_texts, static_argnums=2)(memory, text, hyper)
    weight = np.asarray(plan.history_weights(memory, text.word_id, hyper))
    for row in range(6):
        by_weight = sorted(range(10), key=lambda n, row=row: (-weight[row, n], n))
        words = sorted(n for n in by_weight[:3] if weight[row, n] > 0)
        last = int((text.tokens[row] > 0).sum()) - 1
        tokens, index = [], []
        for place in range(last + 1):
            word = int(text.word_index[row, place])
            if word in words or place in (0, last):
                tokens.append(int(text.tokens[row, place]))
                index.append(words.index(word) if word in words else -1)
        fill = 12 - len(tokens)
        assert concise.tokens[row].tolist() == tokens + [0] * fill
        assert concise.word_index[row].tolist() == index + [-1] * fill
        assert concise.word_id[row, :3].tolist() == text.word_id[row, jnp.array(words)].tolist()
        assert not concise.word_id[row, 3:].any() and (concise.sentence[row, 3:] == -1).all()


def unit(x):
    return x / jnp.sqrt(jnp.sum(x * x))


def literal_concise_loss(params, images, texts, concise):
    """Computes equation 14 pair by pair."""
    size, scale = len(images), jnp.exp(params["log_scale"])
    total = 0.0
    for i in range(size):
        rows = [scale * unit(images[i]) @ unit(concise[j]) for j in range(size)]
        columns = [scale * unit(images[j]) @ unit(concise[i]) for j in range(size)]
        for logits in (rows, columns):
            total += (jnp.log(sum(jnp.exp(x) for x in logits)) - logits[i]) / 2
        total += 1 - unit(texts[i]) @ jax.lax.stop_gradient(unit(concise[i]))
    return total / size


def make_objective(hyper, images, texts):
    """Returns parameters, and PLAN's loss as a function of them and of three pooled arrays."""
    params, memory = plan.init(KEY, MethodContext(8), hyper)
    concise = features.draw_features(len(images.pooled), seed=4)[1]

    def objective(params, image, text, short, step=5):
        sides = images.replace(pooled=image), texts.replace(pooled=text)
        extra = {"concise": concise.replace(pooled=short)}
        options = {"key": KEY, "step": jnp.array(step), "hyper": hyper}
        return plan.loss(params, memory, *sides, extra, **options)[0]

    return (params, images.pooled, texts.pooled, concise.pooled), objective


def test_the_loss_adds_equation_14_with_its_gradient():
    images, texts = features.draw_features(pairs=4)
    hyper = dataclasses.replace(HYPER, concise_start_step=5, weight_concise=0.7)
    arguments, objective = make_objective(hyper, images, texts)
    _, plain = make_objective(HYPER, images, texts)

    def literal(*arguments):
        return plain(*arguments) + 0.7 * literal_concise_loss(*arguments)

    expected, actual = (
        jax.jit(jax.value_and_grad(function, (0, 1, 2, 3)))(*arguments)
        for function in (literal, objective)
    )
    for x, y in zip(*map(jax.tree.leaves, (expected, actual)), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-5)
    before = jax.jit(objective, static_argnums=4)(*arguments, 4)
    np.testing.assert_allclose(before, jax.jit(plain)(*arguments), rtol=1e-6)


def test_concise_reports_need_the_history():
    with pytest.raises(UserError, match=r"set hyper.use_history to True"):
        plan.Hyper(concise_start_step=1, use_history=False)


@cache
def take_step(devices, microbatch, start=1):
    """Returns the metrics and the gradients of a step with towers without BatchNorm."""
    hyper = {"concise_start_step": start, "concise_words": 3, "rounds": 0, "tile_size": 16}
    changes = TOWERS | {"method": "plan", "hyper": hyper}
    config = Config.from_dict(testing.get_config().to_dict() | changes)
    components, batch = build_components(config, parallel.AXIS), random_batch(16)
    state, _ = init_state(components, config, batch)
    optimiser, before = optax.sgd(1.0), parallel.to_host(state.params)
    size = config.hyper.history_size
    memory = {"similarity_margin": jax.random.normal(KEY, (size,)), "count": jnp.ones(size)}
    state = state.replace(
        opt_state=optimiser.init(state.params), memory=memory, step=jnp.ones((), jnp.int32)
    )
    mesh = parallel.make_mesh(devices)
    step = make_step(components, optimiser, 0.0, parallel.AXIS, microbatch)
    step = parallel.parallelise(step, mesh)
    state, metrics = step(parallel.replicate(state, mesh), parallel.shard(batch, mesh))
    after, metrics = parallel.to_host((state.params, metrics))
    return metrics, jax.tree.map(np.subtract, before, after)


def test_devices_and_microbatches_do_not_change_a_step_with_concise_reports():
    (expected, expected_grads), (metrics, grads) = take_step(1, 0), take_step(8, 1)
    assert metrics["loss_concise"] > 0
    for name in ("loss", "loss_concise"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    error, norm = (
        float(optax.tree.norm(tree))
        for tree in (jax.tree.map(np.subtract, grads, expected_grads), expected_grads)
    )
    assert error <= 1e-5 * norm


# Alike reports ----------------------------------------------------------------------------------

ALIKE = ({0, 3}, {2, 4})  # of `draw_alike_features`


def draw_alike_features():
    """Returns features of six pairs: texts 0 and 3 are close, 2 and 4 have the same words."""
    images, texts = features.draw_features(pairs=6)
    pooled = texts.pooled.at[3].set(2 * texts.pooled[0] + 0.01)
    word_id = texts.word_id.at[2].set(jnp.array([5, 6, 5, 0, 0]))
    word_id = word_id.at[4].set(jnp.array([6, 5, 0, 0, 0]))
    return images, texts.replace(pooled=pooled, word_id=word_id, mask=word_id > 0)


def test_alike_reports_are_close_or_have_the_same_words():
    _, texts = draw_alike_features()
    actual = plan_contrast.alike_reports(texts.pooled, texts.word_id, 0.95, None)
    expected = np.zeros((6, 6), bool)
    for i, j in ALIKE:
        expected[i, j] = expected[j, i] = True
    np.testing.assert_array_equal(actual, expected)


def literal_unlike_loss(params, images, texts, hyper):
    """Computes equation 10 without its words' part, and without alike pairs, pair by pair."""
    size, grids = len(images.pooled), (images.grid, images.fine_grid)
    sides = plan.TextSide(contrastive.l2_normalise(texts.local), texts.word_id)

    def align(image):
        return jax.vmap(lambda text: plan.align(image, text, grids, hyper, 1).matches)(sides)

    matches = jax.vmap(align)(plan.unit_image_sides(images))  # image, text, round, word
    x, y = jax.vmap(unit)(images.pooled), jax.vmap(unit)(texts.pooled)

    def contrast(logits, count):
        total = 0.0
        for i in range(size):
            others = [j for j in range(size) if {i, j} not in ALIKE]
            rows = [j for j in others if (i - j) % size < count]
            columns = [k for k in others if (k - i) % size < count]
            total += jnp.log(sum(jnp.exp(logits[i, j]) for j in rows)) - logits[i, i]
            total += jnp.log(sum(jnp.exp(logits[k, i]) for k in columns)) - logits[i, i]
        return total / size

    omega = plan.round_weights(jnp.array(5), hyper)
    total = hyper.weight_global * contrast(jnp.exp(params["log_scale"]) * x @ y.T, size) / 2
    real = texts.word_id > 0
    for t, count in enumerate((size, hyper.num_candidates)):
        scores = (matches[:, :, t] * real).sum(-1) / real.sum(-1)
        total += omega[t] * contrast(scores / hyper.tau_local, count)
    return total


def test_alike_reports_are_no_negatives_in_the_loss_and_its_gradient():
    images, texts = draw_alike_features()
    hyper = plan.Hyper(
        num_sampled_words=5, rounds=1, num_candidates=4, weight_word=0.0, tile_size=8
    )
    unlike = dataclasses.replace(hyper, report_negatives="unlike")
    params, memory = plan.init(KEY, MethodContext(8), hyper)

    def replace(arrays):
        pooled, local, fine, text_pooled, text_local = arrays
        sides = images.replace(pooled=pooled, local=local, fine=fine)
        return sides, texts.replace(pooled=text_pooled, local=text_local)

    def literal(params, arrays):
        return literal_unlike_loss(params, *replace(arrays), unlike)

    def actual(params, arrays, hyper=unlike):
        options = {"key": KEY, "step": jnp.array(5), "hyper": hyper}
        return plan.loss(params, memory, *replace(arrays), {}, **options)[0]

    arrays = images.pooled, images.local, images.fine, texts.pooled, texts.local
    (expected, expected_grads), (value, grads) = (
        jax.jit(jax.value_and_grad(function, (0, 1)))(params, arrays)
        for function in (literal, actual)
    )
    np.testing.assert_allclose(value, expected, rtol=1e-4)
    for x, y in zip(*map(jax.tree.leaves, (expected_grads, grads)), strict=True):
        assert np.linalg.norm(x - y) <= 1e-3 * np.linalg.norm(x) + 1e-6
    assert value < jax.jit(lambda *sides: actual(*sides, hyper))(params, arrays) - 0.01


def test_alike_reports_need_the_softmax():
    with pytest.raises(UserError, match=r"set hyper.contrast to softmax"):
        plan.Hyper(report_negatives="unlike", contrast="sigmoid")
