"""Devices: eight give what one gives, both ways of spreading agree, mistakes are sentences."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import portpicker
import pytest
from flax import linen as nn

from plan_jax import parallel
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
OPTIMISER = optax.adamw(1e-2)


class Tower(nn.Module):
    """A tower with batch statistics, which have to be those of all devices."""

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(6, use_bias=False)(x)  # Adam would blow up the rounding of a zero gradient
        x = nn.BatchNorm(use_running_average=False, axis_name=parallel.AXIS)(x)
        return nn.Dense(4)(jnp.tanh(x))


def contrast(images, texts):
    """InfoNCE of this device's pairs against the pairs of all devices."""
    images, texts = (x / jnp.linalg.norm(x, axis=-1, keepdims=True) for x in (images, texts))
    everyone = [jax.lax.all_gather(x, parallel.AXIS, tiled=True) for x in (images, texts)]
    target = jax.lax.axis_index(parallel.AXIS) * len(images) + jnp.arange(len(images))
    scores = jnp.stack([images @ everyone[1].T, texts @ everyone[0].T]) * 5
    return optax.softmax_cross_entropy_with_integer_labels(scores, jnp.stack([target] * 2)).mean()


def step(state, batch):
    """A training step as `train.py` writes it: gradients, statistics and loss are averaged."""

    def loss(params):
        variables = {"params": params, "batch_stats": state["batch_stats"]}
        images, new = Tower().apply(variables, batch["image"], mutable=["batch_stats"])
        return contrast(images, batch["text"] @ params["Dense_1"]["kernel"][:3]), new

    (value, new), gradients = jax.value_and_grad(loss, has_aux=True)(state["params"])
    value, gradients = parallel.mean((value, gradients))
    updates, opt_state = OPTIMISER.update(gradients, state["opt_state"], state["params"])
    params = optax.apply_updates(state["params"], updates)
    state = {**new, "params": params, "opt_state": opt_state}
    return state, {"loss": value, "gradients": gradients}


def data():
    """Sixteen pairs."""
    rng = np.random.default_rng(0)
    shapes = {"image": (16, 5), "text": (16, 3)}
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def train(devices, implementation="shard_map", steps=3):
    """State and metrics after some steps on some devices, on the host."""
    mesh = parallel.make_mesh(devices)
    variables = Tower().init(jax.random.key(0), jnp.ones((2, 5)))
    state = {**variables, "opt_state": OPTIMISER.init(variables["params"])}
    state = parallel.replicate(state, mesh)
    spread = parallel.parallelise(step, mesh, implementation=implementation)
    for _ in range(steps):
        state, metrics = spread(state, parallel.shard(data(), mesh))
    return parallel.to_host(state), parallel.to_host(metrics)


def close(a, b, tolerance):
    """Assert that all leaves of two trees are close."""
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=tolerance), a, b)


@pytest.mark.parametrize("implementation", parallel.IMPLEMENTATIONS)
def test_eight_devices_equal_one(implementation):
    one, eight = train(1, implementation), train(8, implementation)
    close(one, eight, 2e-6)
    sizes = [float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(one[1]["gradients"])]
    assert max(sizes) > 1e-2  # or the tolerance would hide a gradient that is 8 times too large


@pytest.mark.parametrize("devices", [1, 8])
def test_both_implementations_agree(devices):
    close(train(devices, "shard_map"), train(devices, "pmap"), 1e-7)


def test_one_device_without_any_axis_gives_the_same():
    _, metrics = train(8, steps=1)
    variables = Tower().init(jax.random.key(0), jnp.ones((2, 5)))
    batch = data()

    def loss(params):
        bound = {"params": params, "batch_stats": variables["batch_stats"]}
        images, _ = Tower().apply(bound, batch["image"], mutable=["batch_stats"])
        images = images / jnp.linalg.norm(images, axis=-1, keepdims=True)
        texts = batch["text"] @ params["Dense_1"]["kernel"][:3]
        texts = texts / jnp.linalg.norm(texts, axis=-1, keepdims=True)
        scores = images @ texts.T * 5
        rows, columns = (-jnp.diag(jax.nn.log_softmax(scores, axis)).mean() for axis in (0, 1))
        return (rows + columns) / 2

    value, gradients = jax.vmap(
        jax.value_and_grad(loss), axis_size=1, axis_name=parallel.AXIS, in_axes=None
    )(variables["params"])
    close(metrics["loss"], value[0], 1e-6)
    close(metrics["gradients"], jax.tree.map(lambda x: x[0], gradients), 1e-6)


@pytest.mark.parametrize("implementation", parallel.IMPLEMENTATIONS)
def test_donated_state_is_gone_and_what_it_was_copied_from_is_not(implementation):
    source = jnp.arange(3.0)
    spread = parallel.parallelise(lambda s, b: (s + b.sum(), {}), implementation=implementation)
    state = parallel.replicate(source)
    after, _ = spread(state, parallel.shard(np.ones(8, np.float32)))
    assert state.is_deleted() and not source.is_deleted()
    assert after.sharding.is_fully_replicated and after.tolist() == [1, 2, 3]


def test_steps_are_compiled_once():
    spread = parallel.parallelise(lambda s, b: (jax.tree.map(lambda x: x + b.mean(), s), {}))
    state = parallel.replicate((jnp.zeros(3), 2.0, jnp.log(2.0)))  # the last two are weakly typed
    for _ in range(3):
        state, _ = spread(state, parallel.shard(np.ones(16, np.float32)))
    assert spread._cache_size() == 1


def test_keys():
    key = jax.random.key(1)

    def draw(state, batch):
        same = jax.random.uniform(parallel.step_key(state, 3))
        own = jax.random.uniform(parallel.device_key(parallel.step_key(state, 3)))
        return state, {"same": same, "own": jax.lax.all_gather(own, parallel.AXIS)}

    metrics = parallel.parallelise(draw)(parallel.replicate(key), parallel.shard(np.ones(8)))[1]
    assert metrics["same"] == jax.random.uniform(parallel.step_key(key, 3))
    assert len(set(metrics["own"].tolist())) == 8
    alone = jax.random.uniform(parallel.device_key(parallel.step_key(key, 3), None))
    assert alone == metrics["own"][0]
    assert (parallel.step_key(key, 3) != parallel.step_key(key, 4)).all()


def test_host_and_one_process():
    batch = parallel.shard({"a": np.arange(16)})
    assert batch["a"].sharding.shard_shape((16,)) == (2,)
    assert parallel.to_host(batch)["a"].tolist() == list(range(16))
    assert parallel.is_main() and parallel.any_process(True) and not parallel.any_process(False)
    assert parallel.gather_strings("ä") == ["ä"]
    parallel.barrier()
    parallel.initialize()


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (
            lambda: parallel.split_batch(30, 8),
            "batch 30 is not divisible by 8 devices; use 24 or 32",
        ),
        (lambda: parallel.split_batch(4, 8), "batch 4 is not divisible by 8 devices; use 8$"),
        (lambda: parallel.split_batch(0, 8), "batch 0 is not divisible by 8 devices; use 8$"),
        (lambda: parallel.split_batch(-3, 2), "batch -3 is not divisible by 2 devices; use 2$"),
        (
            lambda: parallel.shard(np.ones(12)),
            "batch 12 is not divisible by 8 devices; use 8 or 16",
        ),
        (lambda: parallel.make_mesh(9), "parallel.devices is 9 but there are 8; use 1 to 8, or 0"),
        (lambda: parallel.make_mesh(-1), "parallel.devices is -1 but"),
        (
            lambda: parallel.parallelise(step, implementation="xmap"),
            "'xmap'; use shard_map or pmap",
        ),
    ],
)
def test_mistakes_are_sentences(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


@pytest.mark.parametrize(("name", "value"), [("JAX_PROCESS_ID", "one"), ("JAX_NUM_PROCESSES", "")])
def test_half_a_cluster_is_a_mistake(monkeypatch, name, value):
    names = {"JAX_COORDINATOR_ADDRESS": "h:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "0"}
    for each, good in {**names, name: value}.items():
        monkeypatch.setenv(each, good)
    with pytest.raises(UserError, match=f"{name} is (one|not set); a run on several hosts needs"):
        parallel.initialize()


PROGRAM = """
    import jax, numpy as np
    from plan_jax import parallel
    parallel.initialize()
    mine = jax.process_index()
    def step(state, batch):
        everyone = jax.lax.all_gather(batch, parallel.AXIS, tiled=True)
        return state + parallel.mean(batch.mean()), {"all": everyone}
    for implementation in parallel.IMPLEMENTATIONS:
        state = parallel.replicate(np.zeros(2, np.float32))
        spread = parallel.parallelise(step, implementation=implementation)
        batch = np.arange(4, dtype=np.float32) + 4 * mine
        for _ in range(2):
            state, metrics = spread(state, parallel.shard(batch))
        assert parallel.to_host(state).tolist() == [7, 7]
        assert parallel.to_host(metrics)["all"].tolist() == list(range(8))
        assert parallel.to_host(parallel.shard(batch)).tolist() == list(range(8))
    assert parallel.any_process(mine == 1) and not parallel.any_process(False)
    assert parallel.gather_strings("x" * (mine + 1)) == ["x", "xx"]
    parallel.barrier()
    print("fine", parallel.is_main())
"""


def test_two_processes():
    port = portpicker.pick_unused_port()
    flags = "--xla_force_host_platform_device_count=2"
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(PROGRAM)],
            cwd=ROOT,
            env={**os.environ, **cluster, "XLA_FLAGS": flags, "JAX_PROCESS_ID": str(index)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(2)
    ]
    said = [run.communicate(timeout=60) for run in runs]
    assert [out.splitlines()[-1:] for out, _ in said] == [["fine True"], ["fine False"]], said
