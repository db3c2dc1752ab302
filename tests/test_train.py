"""What the step does with its optimiser; `test_steps.py` has the step of every method."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import testing
from plan_jax import model as assembly
from plan_jax import optim, parallel
from plan_jax.step import init_state, make_step
from plan_jax.types import Batch, TextBatch

OPTIMISER = {
    "rate": 1e-3,
    "warmup": 0.1,
    "end": 0.1,
    "weight_decay": 1e-3,
    "b1": 0.9,
    "b2": 0.98,
    "clip": 1.0,
    "accumulate": 1,
    "freeze": (),
}


def batch(pairs=16, seed=0, size=32, length=12, words=10):
    rng = np.random.default_rng(seed)
    index = np.arange(length) - 1
    count = rng.integers(3, words + 1, (pairs, 1))
    index = np.where((index >= 0) & (index < count), index, -1)
    place = np.arange(words)
    image = rng.integers(0, 255, (pairs, size, size, 1), dtype=np.uint8)
    text = TextBatch(
        tokens=np.where(np.arange(length) < count + 2, rng.integers(5, 99, (pairs, length)), 0),
        word_index=index,
        word_id=np.where(place < count, rng.integers(5, 40, (pairs, words)), 0),
        sentence=np.where(place < count, place // 4, -1),
    )
    return Batch(image, text)


def prepared(devices=1, seed=0, ema=0.0, changes=None, **optimiser):
    plain = {"method": "convirt", "hyper": {}, "fine": False}  # which compiles soonest
    config = testing.get_config().to_dict() | (changes or plain)
    mesh = parallel.make_mesh(devices)
    system = assembly.build_components(config, parallel.AXIS)

    def tx_of(params):
        return optim.make_optimiser(params, steps=50, **OPTIMISER | optimiser)

    state, tx = init_state(system, batch(), tx_of, seed, ema > 0)
    step = parallel.parallelise(make_step(system, tx, ema, parallel.AXIS), mesh)
    return parallel.replicate(state, mesh), step, mesh


def largest(a, b):
    """Largest difference of two trees, relative to the largest entry of each leaf."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return max(float(np.abs(x - y).max() / (np.abs(x).max() + 1e-6)) for x, y in pairs)


def test_accumulation_updates_every_second_step():
    state, step, mesh = prepared(accumulate=2)
    seen = [parallel.to_host(state.params)]
    for n in range(4):
        state, _ = step(state, parallel.shard(batch(seed=n), mesh))
        seen.append(parallel.to_host(state.params))
    moved = [largest(a, b) > 0 for a, b in zip(seen, seen[1:], strict=False)]
    assert moved == [False, True, False, True] or moved == [False, False, False, True]


def test_the_average_follows_the_parameters_and_teaches():
    changes = {"hyper": {"words": 4, "tile": 2, "progress": "ema", "ramp": 1, "rounds": 0}}
    state, step, mesh = prepared(ema=0.9, changes=changes)
    start = parallel.to_host(state.average)
    state, _ = step(state, parallel.shard(batch(), mesh))
    average, params = parallel.to_host((state.average, state.params))
    want = jax.tree.map(lambda a, b: 0.9 * a + 0.1 * b, start, params)
    assert largest(want, average) < 1e-5


def test_gradients_are_clipped_by_their_norm():
    params = {"w": jnp.ones((2, 2))}
    tx = optim.make_optimiser(params, steps=10, **OPTIMISER | {"clip": 1.0, "weight_decay": 0.0})
    free = optim.make_optimiser(params, steps=10, **OPTIMISER | {"clip": 0.0, "weight_decay": 0.0})
    grads = [{"w": jnp.full((2, 2), value)} for value in (1.0, 100.0)]
    moved = []
    for optimiser in (tx, free):
        state = optimiser.init(params)
        for grad in (*grads, grads[0]):
            update, state = optimiser.update(grad, state, params)
        moved.append(float(jnp.abs(update["w"]).max()))
    assert moved[0] > 1.1 * moved[1], "a clipped outlier weighs no more in Adam's second moment"


def test_only_matrices_decay():
    params = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2), "log_scale": jnp.ones(())}
    assert optim.decays(params) == {"kernel": True, "bias": False, "log_scale": False}
