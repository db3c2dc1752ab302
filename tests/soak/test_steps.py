"""Whole steps of every method, towers and BatchNorm included, on sixteen phantoms."""

from functools import cache

import jax
import numpy as np
import pytest

from configs import testing
from plan_jax import parallel, train
from plan_jax.config import Config
from plan_jax.data import dataset as datasets
from plan_jax.data import loader, phantom, schema
from plan_jax.methods import METHODS
from plan_jax.model import build_components
from plan_jax.state import init_state
from plan_jax.step import make_step

PAIRS, STEPS = 16, 160
HYPER = {
    "plan": {"words": 4, "tile": 4},
    "mgca": {"prototypes": 8, "freeze": 0},
    "asg": {"layers": 1, "heads": 2, "hidden": 8, "dropout": 0.0},
    "place": {"queries": 4},
}
OPTIM = {"learning_rate": 1e-2, "end_lr_factor": 0.1, "weight_decay": 0.0}


@cache
def dataset():
    """The first sixteen phantoms whose reports differ."""
    drawn = {(record := phantom.draw_study(0, i, 32)).text: record for i in range(PAIRS + 8)}
    source = [schema.serialize(record) for record in list(drawn.values())[:PAIRS]]
    assert len(source) == PAIRS
    return datasets.Dataset(source, phantom.FINDINGS, phantom.ANATOMY, phantom.ANATOMY, cache=True)


def prepared(name, devices):
    """The state, the step, the batch and what they are made of."""
    content = testing.get_config().to_dict() | {"method": name, "hyper": HYPER.get(name, {})}
    content |= {"steps": STEPS, "fine_map": name == "plan"}
    content["data"] |= {"max_tokens": 64, "max_words": 48}
    content["optim"] |= OPTIM
    if name == "convirt":
        content["heads"] |= {"image_local": "shared", "text_local": "shared"}
        content["vision"] |= {"pool": "mean"}
    config = Config.from_dict(content)
    mesh, components = parallel.make_mesh(devices), build_components(config, parallel.AXIS)
    stream = loader.train_batches(
        dataset(),
        components.tokenizer,
        batch_size=PAIRS,
        size=32,
        max_tokens=64,
        max_words=48,
        seed=0,
        max_shift=0,
        extra=METHODS[name].REQUIRES,
    )
    batch = next(stream)
    stream.close()

    state, optimiser = init_state(components, config, batch, dataset().findings)
    step = parallel.parallelise(make_step(components, optimiser, 0.0, parallel.AXIS), mesh)
    return parallel.replicate(state, mesh), step, parallel.shard(batch, mesh), components


def gradients(state):
    """Adam's first moments after the first step: a tenth of the clipped gradients."""
    found = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    return [leaf for path, leaf in found if "mu" in str(path)]


def recognise(components, held, batch):
    """Scores of the batch in evaluation, with the statistics of BatchNorm from training."""

    @jax.jit
    def table(held, batch):
        params = held["params"]
        towers = {"params": params["encoders"], "batch_stats": held["batch_stats"]}
        images, texts = components.encoder.apply(towers, batch)
        compare, own = components.method.similarity, (params["method"], held["memory"])
        return compare(*own, images, texts, components.hyper)["global"]

    scores = np.asarray(table(held, batch))
    return scores, scores.T


@pytest.mark.parametrize("name", sorted(METHODS))
def test_eight_devices_step_like_one_and_sixteen_pairs_are_learned_by_heart(name):
    first = {}
    for devices in (8, 1):
        state, step, batch, components = prepared(name, devices)
        state, seen = step(state, batch)
        first[devices] = parallel.to_host((state, seen))
    (one, seen_one), (eight, seen_eight) = first[1], first[8]
    np.testing.assert_allclose(seen_eight["loss"], seen_one["loss"], rtol=1e-5)
    a, b = (np.concatenate([x.ravel() for x in gradients(state)]) for state in (one, eight))
    assert np.linalg.norm(a - b) <= 1e-5 * np.linalg.norm(a), "the gradients differ"
    for a, b in zip(*(jax.tree.leaves(s.batch_stats) for s in (one, eight)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(jax.tree.leaves(s.memory) for s in (one, eight)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
    for _ in range(STEPS - 1):
        state, seen = step(state, batch)
    assert step._cache_size() == 1, "compiled again after the first step"
    for scores in recognise(components, train.model_variables(state), parallel.to_host(batch)):
        assert (scores.argmax(-1) == np.arange(PAIRS)).all(), float(seen["loss"])
