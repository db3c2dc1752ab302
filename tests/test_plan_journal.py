"""The journal's ingredients of PLAN: equations 13 and 14 against literal loops, and the step."""

import dataclasses
from functools import cache

import features
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from test_train import random_batch

from configs import testing
from plan_jax import parallel
from plan_jax.config import Config
from plan_jax.methods import plan, plan_concise
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
    towers = {
        "method": "plan",
        "vision": {"name": "vit_tiny"},
        "text": {"name": "bert_tiny", "dropout": 0.3},
        "heads": {
            "image_global": "mlp_ln",
            "image_local": "linear",
            "text_global": "mlp_ln",
            "text_local": "linear",
        },
        "fine_map": False,
        "hyper": {"concise_start_step": start, "concise_words": 3, "rounds": 0, "tile_size": 16},
    }
    config = Config.from_dict(testing.get_config().to_dict() | towers)
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
