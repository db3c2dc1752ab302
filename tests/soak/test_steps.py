"""The training step of every method, with encoders and BatchNorm, on sixteen phantoms.

On eight devices: the numbers of one device, the bytes that it sends against the least it needs, and
that it learns. Compiling takes most of the time, so one program serves all three.
"""

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
from plan_jax.preflight import minimum
from plan_jax.preflight.collectives import list_collectives
from plan_jax.state import init_state
from plan_jax.step import make_step

PAIRS, STEPS = 16, 160
HYPER = {
    "plan": {"num_sampled_words": 4, "tile_size": 4},
    "mgca": {"num_prototypes": 8, "freeze_prototype_steps": 0},
    "asg": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8, "dropout_rate": 0.0},
    "place": {"num_queries": 4},
}
OPTIM = {"learning_rate": 1e-2, "end_lr_factor": 0.1, "weight_decay": 0.0}


@cache
def make_dataset():
    """Returns the first sixteen phantoms whose reports differ."""
    record_by_text = {
        (record := phantom.draw_study(0, i, 32)).text: record for i in range(PAIRS + 8)
    }
    source = [schema.serialize(record) for record in list(record_by_text.values())[:PAIRS]]
    assert len(source) == PAIRS
    return datasets.Dataset(source, phantom.FINDINGS, phantom.ANATOMY, phantom.ANATOMY, cache=True)


def prepare(name, devices, **hyper):
    """Returns the first state, the step, a batch, the components and the config of a method."""
    content = testing.get_config().to_dict() | {
        "method": name,
        "hyper": HYPER.get(name, {}) | hyper,
    }
    content |= {"steps": STEPS, "batch": PAIRS, "fine_map": name == "plan", "embed_dim": 32}
    content["data"] |= {"max_tokens": 64, "max_words": 48}
    content["optim"] |= OPTIM
    if name == "convirt" and not hyper:
        content["heads"] |= {"image_local": "shared", "text_local": "shared"}
        content["vision"] |= {"pool": "mean"}
    config = Config.from_dict(content)
    mesh, components = parallel.make_mesh(devices), build_components(config, parallel.AXIS)
    batches = loader.train_batches(
        make_dataset(),
        components.tokenizer,
        batch_size=PAIRS,
        size=32,
        max_tokens=64,
        max_words=48,
        seed=0,
        max_shift=0,
        extra=METHODS[name].REQUIRES,
    )
    batch = next(batches)
    batches.close()

    state, optimiser = init_state(components, config, batch, make_dataset().findings)
    step = parallel.parallelise(make_step(components, optimiser, 0.0, parallel.AXIS), mesh)
    return parallel.replicate(state, mesh), step, parallel.shard(batch, mesh), components, config


def check_traffic(program, state, components, config, devices):
    """Checks that a compiled step sends what it needs, and at most a tenth more."""
    sizes = minimum.read_sizes(config, components, state, devices)
    least = minimum.minimum_bytes(config.method, config.hyper, sizes)
    actual = {kind: item.bytes for kind, item in list_collectives(program.as_text()).items()}
    assert set(actual) == set(least), (actual, least)
    for kind, size in least.items():
        assert size <= actual[kind] <= size * 1.1, (kind, actual, least)


def first_moments(state):
    """Returns Adam's first moments; after one step, a tenth of the clipped gradients."""
    leaves = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    return [leaf for path, leaf in leaves if "mu" in str(path)]


def retrieve(components, variables, batch):
    """Returns the scores images x texts of a batch in evaluation mode, and their transpose."""

    @jax.jit
    def compute_scores(variables, batch):
        params = variables["params"]
        encoders = {"params": params["encoders"], "batch_stats": variables["batch_stats"]}
        images, texts = components.encoder.apply(encoders, batch)
        tables = components.method.similarity(
            params["method"], variables["memory"], images, texts, components.hyper
        )
        return tables["global"]

    scores = np.asarray(compute_scores(variables, batch))
    return scores, scores.T


@pytest.mark.parametrize("name", sorted(METHODS))
def test_eight_devices_step_like_one_and_sixteen_pairs_are_memorised(name):
    results = {}  # number of devices -> state and metrics after one step
    for devices in (1, 8):
        state, step, batch, components, config = prepare(name, devices)
        program = step.lower(state, batch).compile()
        if devices > 1:
            check_traffic(program, state, components, config, devices)
        state, metrics = program(state, batch)
        results[devices] = parallel.to_host((state, metrics))
    (state_1, metrics_1), (state_8, metrics_8) = results[1], results[8]
    np.testing.assert_allclose(metrics_8["loss"], metrics_1["loss"], rtol=1e-5)
    a, b = (
        np.concatenate([x.ravel() for x in first_moments(state)]) for state in (state_1, state_8)
    )
    # BatchNorm over 16 small images amplifies rounding: on one device, the last digit of each
    # parameter changes PLAN's gradient by up to 1e-5. `test_method_devices.py` compares to 1e-5.
    assert np.linalg.norm(a - b) <= 3e-5 * np.linalg.norm(a), "the gradients differ"
    for a, b in zip(
        *(jax.tree.leaves(state.batch_stats) for state in (state_1, state_8)), strict=True
    ):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
    for a, b in zip(*(jax.tree.leaves(state.memory) for state in (state_1, state_8)), strict=True):
        np.testing.assert_allclose(b, a, rtol=1e-4, atol=1e-5)
    # Those of eight devices. A program refuses a state of other shapes, so nothing compiles again.
    for _ in range(STEPS - 1):
        state, metrics = program(state, batch)
    for scores in retrieve(components, train.model_variables(state), parallel.to_host(batch)):
        assert (scores.argmax(-1) == np.arange(PAIRS)).all(), float(metrics["loss"])


def test_the_sigmoid_loss_sends_at_most_a_tenth_more_than_it_needs():
    """Its texts go around the ring of devices."""
    state, step, batch, components, config = prepare("convirt", 8, contrast="sigmoid")
    check_traffic(step.lower(state, batch).compile(), state, components, config, 8)
