"""Towers of tests, and a model of the testing config with random weights and all of its parts."""

from functools import cache

import numpy as np

from configs import testing
from plan_jax import model as models
from plan_jax.config import Config
from plan_jax.data.tokenizer import tokenize_batch
from plan_jax.state import init_state
from plan_jax.types import Batch

# Of a config: towers without BatchNorm, and with dropout.
TOWERS = {
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


@cache
def make_tiny_model():
    """Returns PLAN with tiny encoders: images of 32 pixels, batches of 4."""
    config = Config.from_dict(testing.get_config().to_dict())
    components = models.build_components(config)
    text = tokenize_batch(components.tokenizer, ["No effusion."] * 2, 24, 20)
    batch = Batch(image=np.zeros((2, 32, 32, 1), np.uint8), text=text)
    state, _ = init_state(components, config, batch)
    parts = ("params", "batch_stats", "memory")
    return models.make_model(components, config, {name: getattr(state, name) for name in parts})


def draw_film(rows=48, columns=40, seed=0):
    """Returns a film of noise that is about symmetric, UInt8[Y X]."""
    half = np.random.default_rng(seed).integers(0, 256, (rows, columns)).astype(np.float64)
    return ((half + half[:, ::-1]) / 2).astype(np.uint8)
