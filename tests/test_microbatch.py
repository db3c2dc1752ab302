"""A step in microbatches is the step of the whole batch: losses, gradients, dropout, memory."""

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
from plan_jax.methods import METHODS
from plan_jax.model import build_components
from plan_jax.state import init_state
from plan_jax.step import make_step, split_microbatches
from plan_jax.types import Batch, UserError

PAIRS = 16
HYPER = {
    "plan": {"num_sampled_words": 4, "tile_size": 4},
    "gloria": {"tile_size": 4},
    "mgca": {"num_prototypes": 8, "freeze_prototype_steps": 0},
    "asg": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "dropout_rate": 0.1},
    "place": {"num_queries": 4},
}
# Encoders without BatchNorm, and with dropout.
LAYER_NORM = {
    "vision": {"name": "vit_tiny"},
    "text": {"name": "bert_tiny", "dropout": 0.3},
    "heads": {
        "image_global": "mlp_ln",
        "image_local": "linear",
        "text_global": "mlp_ln",
        "text_local": "linear",
    },
    "fine_map": False,
}


def make_batch(method, pairs=PAIRS):
    batch = random_batch(pairs)
    extra = features.draw_extra(features.draw_features(pairs, words=10)[1])
    return Batch(batch.image, batch.text, {name: extra[name] for name in METHODS[method].REQUIRES})


@cache
def prepare(method, has_batch_norm=False, teaches=False):
    """Returns components, the first state, plain gradient descent and the config of a method."""
    content = testing.get_config().to_dict() | {"method": method, "hyper": HYPER.get(method, {})}
    content |= {"steps": 9}
    content |= {"fine_map": False} if has_batch_norm else LAYER_NORM
    if has_batch_norm:
        content["text"] |= {"dropout": 0.3}
    if teaches:
        hyper = {"progress": "ema", "ema_ramp_steps": 1, "rounds": 0}
        content["hyper"] = content["hyper"] | hyper
        content["ema_decay"] = 0.5
    config = Config.from_dict(content)
    components = build_components(config, parallel.AXIS)
    findings = [f"finding {n}" for n in range(4)]
    state, _ = init_state(components, config, make_batch(method), findings)
    # With a rate of 1 the parameters tell the gradients.
    sgd = optax.sgd(1.0)
    state = state.replace(opt_state=sgd.init(state.params), step=jnp.int32(3))
    return components, state, sgd, config


def run_steps(prepared, batch, devices, microbatch, count=1, implementation="shard_map"):
    """Returns the first state, that after `count` steps, and the last metrics, on the host."""
    components, state, optimiser, config = prepared
    mesh = parallel.make_mesh(devices)
    step = make_step(components, optimiser, config.ema_decay, parallel.AXIS, microbatch)
    step = parallel.parallelise(step, mesh, implementation=implementation)
    before = parallel.to_host(state)
    state, batch = parallel.replicate(state, mesh), parallel.shard(batch, mesh)
    for _ in range(count):
        state, metrics = step(state, batch)
    if implementation == "shard_map":
        assert step._cache_size() == 1, "compiled again after the first step"
    return before, *parallel.to_host((state, metrics))


def assert_same_gradients(expected, actual):
    """Compares trees leaf by leaf; a leaf of rounding errors is compared with the whole."""
    pairs = list(zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True))
    scale = max(np.abs(x).max() for x, _ in pairs)
    assert scale > 0
    for x, y in pairs:
        assert np.abs(x - y).max() <= 1e-5 * max(np.abs(x).max(), 1e-2 * scale)


def assert_same_step(whole, parts):
    """Compares gradients, metrics and the memory of two steps."""
    grads = [
        jax.tree.map(np.subtract, before.params, after.params)
        for before, after, _ in (whole, parts)
    ]
    assert_same_gradients(*grads)
    for x, y in zip(*(jax.tree.leaves((s.memory, m)) for _, s, m in (whole, parts)), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


@cache
def whole_step(method):
    return run_steps(prepare(method), make_batch(method), 1, 0)


@pytest.mark.parametrize(("devices", "microbatch"), [(1, 4), (8, 1)])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_microbatches_have_the_gradients_of_the_whole_batch(method, devices, microbatch):
    """On one device and eight, with dropout; features of words and pixels included."""
    parts = run_steps(prepare(method), make_batch(method), devices, microbatch)
    assert_same_step(whole_step(method), parts)


def test_dropout_is_on_and_the_same_on_any_number_of_devices():
    prepared, batch = prepare("convirt"), make_batch("convirt")
    assert_same_step(whole_step("convirt"), run_steps(prepared, batch, 8, 0))
    components, state, *others = prepared
    other_key = state.replace(key=jax.random.key_data(jax.random.key(9)))
    _, _, metrics = run_steps((components, other_key, *others), batch, 1, 0)
    assert abs(metrics["loss"] - whole_step("convirt")[2]["loss"]) > 1e-3


def test_a_teacher_is_encoded_in_microbatches_too():
    prepared, batch = prepare("plan", teaches=True), make_batch("plan")
    whole, parts = (run_steps(prepared, batch, 1, microbatch, count=2) for microbatch in (0, 4))
    assert_same_step(whole, parts)
    assert_same_gradients(whole[1].ema_params, parts[1].ema_params)


def step_by_loop(method, devices, microbatch):
    """Returns gradients, running statistics and loss by a literal loop over microbatches.

    A microbatch has `microbatch` pairs of each device, which BatchNorm averages over. Here a single
    device encodes them together.
    """
    (encoder, module, hyper, _), state, *_ = prepare(method, has_batch_norm=True)
    encoder, batch = encoder.clone(axis=None), make_batch(method)
    key = jax.random.fold_in(jax.random.wrap_key_data(state.key), state.step)
    places = np.arange(PAIRS).reshape(devices, -1, microbatch).swapaxes(0, 1)
    rows = [part.ravel() for part in places]
    order = np.argsort(np.concatenate(rows))

    @jax.jit
    def encode(params, rows):
        part = jax.tree.map(lambda x: jnp.asarray(x)[rows], Batch(batch.image, batch.text))
        (images, texts), updated = encoder.apply(
            {"params": params, "batch_stats": state.batch_stats},
            part,
            True,
            rows,
            rngs={"dropout": jax.random.fold_in(key, 0)},
            mutable=["batch_stats"],
        )
        sides = images.select(module.IMAGE_FEATURES), texts.select(module.TEXT_FEATURES)
        return sides, updated["batch_stats"]

    outputs = [encode(state.params["encoders"], row) for row in rows]
    sides = jax.tree.map(lambda *x: jnp.concatenate(x)[order], *(side for side, _ in outputs))
    statistics = jax.tree.map(lambda *x: sum(x) / len(x), *(stats for _, stats in outputs))

    @jax.jit
    def compute(params, sides):
        return module.loss(
            params,
            state.memory,
            *sides,
            batch.extra,
            key=jax.random.fold_in(key, 1),
            step=state.step,
            hyper=hyper,
        )

    (loss, _), (method_grads, cotangents) = jax.value_and_grad(
        compute, (0, 1), has_aux=True, allow_int=True
    )(state.params["method"], sides)
    total = jax.tree.map(jnp.zeros_like, state.params["encoders"])
    for row in rows:
        _, pull_back = jax.vjp(lambda p, row=row: encode(p, row)[0], state.params["encoders"])
        part = jax.tree.map(lambda x, row=row: x[row], cotangents)
        total = jax.tree.map(jnp.add, total, pull_back(part)[0])
    return {"encoders": total, "method": method_grads}, statistics, loss


@pytest.mark.parametrize(("devices", "microbatch"), [(1, 4), (8, 1)])
def test_batch_norm_uses_the_statistics_of_microbatches(devices, microbatch):
    grads, statistics, loss = step_by_loop("gloria", devices, microbatch)
    prepared, batch = prepare("gloria", has_batch_norm=True), make_batch("gloria")
    before, after, metrics = run_steps(prepared, batch, devices, microbatch)
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_same_gradients(grads, jax.tree.map(np.subtract, before.params, after.params))
    for x, y in zip(*map(jax.tree.leaves, (statistics, after.batch_stats)), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-6)


def test_memory_grows_with_the_features_and_not_with_the_activations_of_the_encoders():
    components, state, optimiser, _ = prepare("convirt")

    def measure(pairs, microbatch):
        step = jax.jit(
            make_step(components._replace(encoder=encoder), optimiser, 0.0, None, microbatch)
        )
        compiled = step.lower(state, make_batch("convirt", pairs)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    encoder = components.encoder.clone(axis=None)
    whole, parts = (measure(128, m) - measure(32, m) for m in (0, 8))
    assert parts <= whole / 8, (parts, whole)


@pytest.mark.parametrize(
    ("count", "microbatch", "remedy"), [(64, 24, "16 or 32"), (7, 3, "1 or 7"), (8, 9, "8")]
)
def test_a_batch_that_does_not_divide_is_refused(count, microbatch, remedy):
    sentence = f"is {microbatch}, which does not divide the {count} pairs .*; use {remedy}$"
    with pytest.raises(UserError, match=sentence):
        split_microbatches(count, microbatch)
