"""A step in microbatches is the step of the whole batch: losses, gradients, dropout, memory.

Compiling takes most of the time, so all six methods have a small encoder of features, one of them
has real towers, and tests share programs.
"""

from functools import cache

import features
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen as nn
from test_train import random_batch
from tiny_models import TOWERS

from configs import testing
from plan_jax import parallel
from plan_jax.config import Config
from plan_jax.layers.batch_norm import BatchNorm
from plan_jax.layers.transformer import dropout, fold_in
from plan_jax.methods import METHODS
from plan_jax.model import Components, build_components
from plan_jax.state import State, init_state
from plan_jax.step import make_step, split_microbatches
from plan_jax.types import Batch, UserError

PAIRS = 16
# Tiles of the whole batch, so that the losses have no loops to compile.
HYPER = {
    # With a teacher, which is encoded in microbatches too.
    "plan": {"num_sampled_words": 4, "tile_size": 16, "progress": "ema", "ema_ramp_steps": 6},
    "mgca": {"num_prototypes": 8, "freeze_prototype_steps": 0, "tile_size": 16},
    "asg": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "dropout_rate": 0.1},
    "place": {"num_queries": 4, "num_blocks": 1, "num_decoder_blocks": 1, "tile_size": 16},
}
FEATURES = features.draw_features(PAIRS, words=10)


class Encoder(nn.Module):
    """Encodes an example by its place, its image or tokens, and dropout.

    Attributes:
      axis: the mapped device axis of BatchNorm.
      has_batch_norm: whether there is any.
      hidden: channels of the layer that the features do not show.
    """

    axis: str | None = None
    has_batch_norm: bool = False
    hidden: int = 16

    @nn.compact
    def __call__(self, batch, train, index):
        """Returns features with the shapes of `FEATURES`."""
        key = fold_in(self.make_rng("dropout"), index)
        shades = batch.image.mean((1, 2, 3)) / 255, batch.text.tokens.mean(1) / 99
        images, texts = (jax.tree.map(lambda x: x[index % PAIRS], side) for side in FEATURES)

        def encode(name, x, shade):
            x = (x.T * (1 + shade)).T
            y = jnp.tanh(nn.Dense(self.hidden, name=f"{name}_in")(x))
            y = dropout(y, 0.3, key)
            if self.has_batch_norm:
                y = BatchNorm(self.axis, name=f"{name}_norm")(y, train)
            return x + nn.Dense(x.shape[-1], name=f"{name}_out")(y)

        return tuple(
            side.replace(
                attention=nn.softmax(encode(f"{kind}_attention", side.attention, shade)),
                **{
                    name: encode(f"{kind}_{name}", getattr(side, name), shade)
                    for name in ("pooled", "local", "raw", "fine")
                    if getattr(side, name) is not None
                },
            )
            for kind, side, shade in zip(("image", "text"), (images, texts), shades, strict=True)
        )


def make_batch(method, pairs=PAIRS):
    batch, extra = random_batch(pairs), features.draw_extra(FEATURES[1])
    return Batch(batch.image, batch.text, {name: extra[name] for name in METHODS[method].REQUIRES})


@optax.inject_hyperparams
def descend(rate):
    """Returns plain gradient descent, whose rate is in its state and not in the program."""
    return optax.sgd(rate)


@cache
def prepare(method, kind="features"):
    """Returns components and a state; the encoders are `features`, `batch_norm` or `towers`."""
    hyper = HYPER.get(method, {})
    if kind == "towers":
        content = testing.get_config().to_dict() | TOWERS | {"method": method, "hyper": hyper}
        config = Config.from_dict(content)
        components = build_components(config, parallel.AXIS)
        state, _ = init_state(components, config, make_batch(method))
        return components, state.replace(step=jnp.int32(3))
    module, key = METHODS[method], jax.random.key(0)
    hyper = module.Hyper(**hyper)
    encoder = Encoder(has_batch_norm=kind == "batch_norm")
    init = jax.jit(encoder.init, static_argnums=2)
    batch = jax.tree.map(lambda x: x[:2], make_batch(method))
    variables = init({"params": key, "dropout": key}, batch, True, np.arange(2))
    method_params, memory = module.init(key, features.make_context(), hyper)
    params = {"encoders": variables["params"], "method": method_params}
    # A teacher that differs from its student.
    teacher = jax.tree.map(lambda x: 0.8 * x, params) if method == "plan" else {}
    stats, key = variables.get("batch_stats", {}), jax.random.key_data(key)
    state = State(jnp.int32(3), key, params, stats, (), memory, teacher)
    return Components(encoder.clone(axis=parallel.AXIS), module, hyper, None), state


@cache
def build_step(method, devices, microbatch, kind="features"):
    """Returns a step, which JAX compiles at its first call."""
    components, _ = prepare(method, kind)
    step = make_step(components, descend(1.0), 0.5, parallel.AXIS, microbatch)
    return parallel.parallelise(step, parallel.make_mesh(devices))


def run_steps(method, devices, microbatch, kind="features", count=1, seed=0, rate=1.0):
    """Returns the first state, that after `count` steps, and the last metrics, on the host.

    With a rate of 1 the parameters tell the gradients.
    """
    step, mesh = build_step(method, devices, microbatch, kind), parallel.make_mesh(devices)
    state = prepare(method, kind)[1]
    key, opt_state = jax.random.key_data(jax.random.key(seed)), descend(rate).init(state.params)
    state = state.replace(key=key, opt_state=opt_state)
    before = parallel.to_host(state)
    state, batch = parallel.replicate(state, mesh), parallel.shard(make_batch(method), mesh)
    for _ in range(count):
        state, metrics = step(state, batch)
    assert step._cache_size() == 1, "compiled again"
    return before, *parallel.to_host((state, metrics))


def assert_same_leaves(expected, actual):
    """Compares the norms of two trees to 1e-5, and those of each leaf less strictly.

    The gradient of a bias is a sum of terms of both signs: it has the rounding errors of terms that
    are larger than the sum. A leaf that is 0 in theory is compared by the largest leaf.
    """
    pairs = list(zip(jax.tree.leaves(expected), jax.tree.leaves(actual), strict=True))
    norms = np.array([np.linalg.norm(x) for x, _ in pairs])
    errors = np.array([np.linalg.norm(x - y) for x, y in pairs])
    assert norms.max() > 0 and np.linalg.norm(errors) <= 1e-5 * np.linalg.norm(norms)
    assert (errors <= 5e-5 * np.maximum(norms, 1e-2 * norms.max())).all()


def assert_same_step(whole, parts):
    """Compares gradients, metrics and the memory of two steps."""
    grads = [
        jax.tree.map(np.subtract, before.params, after.params)
        for before, after, _ in (whole, parts)
    ]
    assert_same_leaves(*grads)
    for x, y in zip(*(jax.tree.leaves((s.memory, m)) for _, s, m in (whole, parts)), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-6)


@cache
def whole_step(method):
    return run_steps(method, 1, 0)


@pytest.mark.parametrize(("devices", "microbatch"), [(1, 4), (8, 1)])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_microbatches_have_the_gradients_of_the_whole_batch(method, devices, microbatch):
    """On one device and eight, with dropout; features of words, pixels and a teacher included."""
    assert_same_step(whole_step(method), run_steps(method, devices, microbatch))


def test_steps_of_real_towers_are_those_of_the_whole_batch():
    """By plain descent: Adam turns rounding errors of gradients into steps of its rate."""
    splits, steps = ((1, 0), (8, 1)), {"count": 3, "rate": 0.01}
    assert_same_step(*(run_steps("gloria", *split, "towers") for split in splits))
    states = [run_steps("gloria", *split, "towers", **steps)[1] for split in splits]
    # A change is known to the digits of its parameter only.
    assert_same_leaves(*(state.params for state in states))


def test_dropout_is_on():
    for kind, method in (("features", "convirt"), ("towers", "gloria")):
        losses = [run_steps(method, 1, 0, kind, seed=seed)[2]["loss"] for seed in (0, 9)]
        assert abs(losses[0] - losses[1]) > 1e-3


def step_by_loop(method, devices, microbatch):
    """Returns gradients, running statistics and loss by a literal loop over microbatches.

    A microbatch has `microbatch` pairs of each device, which BatchNorm averages over. Here a single
    device encodes them together.
    """
    (encoder, module, hyper, _), state = prepare(method, "batch_norm")
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


def test_batch_norm_uses_the_statistics_of_microbatches():
    grads, statistics, loss = step_by_loop("gloria", 2, 4)
    before, after, metrics = run_steps("gloria", 2, 4, "batch_norm")
    np.testing.assert_allclose(metrics["loss"], loss, rtol=1e-5)
    assert_same_leaves(grads, jax.tree.map(np.subtract, before.params, after.params))
    for x, y in zip(*map(jax.tree.leaves, (statistics, after.batch_stats)), strict=True):
        np.testing.assert_allclose(y, x, rtol=1e-4, atol=1e-6)


def test_memory_grows_with_the_features_and_not_with_the_activations_of_the_encoders():
    components, state = prepare("gloria", "towers")
    components = components._replace(encoder=components.encoder.clone(axis=None))
    optimiser = descend(1.0)
    state = state.replace(opt_state=optimiser.init(state.params))

    def measure(pairs, microbatch):
        step = jax.jit(make_step(components, optimiser, 0.0, None, microbatch))
        compiled = step.lower(state, make_batch("gloria", pairs)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    parts, whole = measure(128, 8), measure(128, 0)
    assert parts <= whole / 4, (parts, whole)


@pytest.mark.parametrize(
    ("count", "microbatch", "remedy"), [(64, 24, "16 or 32"), (7, 3, "1 or 7"), (8, 9, "8")]
)
def test_a_batch_that_does_not_divide_is_refused(count, microbatch, remedy):
    sentence = f"is {microbatch}, which does not divide the {count} pairs .*; use {remedy}$"
    with pytest.raises(UserError, match=sentence):
        split_microbatches(count, microbatch)
