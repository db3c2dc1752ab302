"""The bytes that a training step exchanges on eight devices, against the least it needs."""

import jax.numpy as jnp
import pytest

from configs import testing
from plan_jax import parallel
from plan_jax.config import Config
from plan_jax.methods import METHODS
from plan_jax.model import build_components
from plan_jax.preflight import minimum
from plan_jax.preflight.collectives import list_collectives
from plan_jax.state import init_state
from plan_jax.step import make_step
from plan_jax.types import Batch, TextBatch

DEVICES, PAIRS, TAGS, REGIONS = 8, 16, 4, 2
HYPERS = {
    "plan": {"num_sampled_words": 4, "tile_size": 2},
    "mgca": {"num_prototypes": 8},
    "asg": {"num_layers": 1, "num_heads": 2, "hidden_dim": 8},
    "place": {"num_queries": 4, "max_sentences": 3},
}


def make_config(method, **hyper):
    content = testing.get_config().to_dict()
    content |= {"method": method, "batch": PAIRS, "hyper": HYPERS.get(method, {}) | hyper}
    content |= {"fine_map": method == "plan", "embed_dim": 32}
    return Config.from_dict(content)


def make_batch(config, requires):
    """Returns a batch of zeros; only its shapes matter."""
    data = config.data
    pieces = jnp.zeros((PAIRS, data.max_tokens), jnp.int32)
    words = jnp.zeros((PAIRS, data.max_words), jnp.int32)
    extra = {
        "labels": jnp.zeros((PAIRS, TAGS), jnp.int8),
        "regions": jnp.zeros((PAIRS, REGIONS, 4)),
        "region_words": jnp.zeros((PAIRS, REGIONS, data.max_words), bool),
    }
    return Batch(
        jnp.zeros((PAIRS, data.size, data.size, 1), jnp.uint8),
        TextBatch(tokens=pieces, word_index=pieces, word_id=words, sentence=words),
        {name: extra[name] for name in requires},
    )


def compile_step(config):
    """Returns the text of the compiled step on eight devices, its components and its state."""
    components = build_components(config, parallel.AXIS)
    batch = make_batch(config, components.method.REQUIRES)
    state, optimiser = init_state(components, config, batch, [f"tag {n}" for n in range(TAGS)])
    mesh = parallel.make_mesh(DEVICES)
    step = make_step(components, optimiser, config.ema_decay, parallel.AXIS)
    step = parallel.parallelise(step, mesh)
    return step.lower(state, parallel.shard(batch, mesh)).compile().as_text(), components, state


@pytest.mark.parametrize(
    ("method", "hyper"),
    [(name, {}) for name in sorted(METHODS)] + [("convirt", {"contrast": "sigmoid"})],
)
def test_a_step_sends_at_most_a_tenth_more_than_it_needs(method, hyper):
    config = make_config(method, **hyper)
    text, components, state = compile_step(config)
    sizes = minimum.read_sizes(config, components, state, DEVICES)
    least = minimum.minimum_bytes(method, config.hyper, sizes)
    actual = {kind: item.bytes for kind, item in list_collectives(text).items()}
    assert set(actual) == set(least), (actual, least)
    for kind, size in least.items():
        assert size <= actual[kind] <= size * 1.1, (kind, actual, least)
