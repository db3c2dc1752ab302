"""Models of random weights to save, and what they answer."""

import jax
import jax.numpy as jnp
import numpy as np

from configs import testing
from plan_jax import model as models
from plan_jax.config import Config
from plan_jax.data.tokenizer import tokenize_batch
from plan_jax.types import Batch, MethodContext

IMAGES = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 1)).astype(np.uint8)
TEXTS = ["effusion on the left", "no pneumothorax. heart is normal"]
TAGS = np.random.default_rng(0).normal(size=(2, 32)).astype(np.float32)  # of the text tower


def make_config(**changes):
    """Returns the testing config, with some fields changed."""
    return Config.from_dict(testing.get_config().to_dict() | changes)


def make_variables(components, seed=0):
    """Returns random parameters of components, whose initialisation need not be compiled."""
    random = np.random.default_rng(seed)

    def fill(path, leaf):
        name = jax.tree_util.keystr(path)
        noise = random.normal(size=leaf.shape) / max(np.prod(leaf.shape[:-1]), 4) ** 0.5
        return np.asarray(1 + abs(noise) if "scale" in name or "var" in name else noise, leaf.dtype)

    text = tokenize_batch(components.tokenizer, TEXTS, 24, 20)
    encoder = components.encoder.clone(axis=None)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), Batch(IMAGES, text))
    variables = jax.tree_util.tree_map_with_path(fill, shapes)
    images, _ = jax.eval_shape(encoder.apply, shapes, Batch(IMAGES, text))
    context = MethodContext(encoder.embed_dim, images.raw.shape[-1], jnp.asarray(TAGS))
    shapes = jax.eval_shape(
        lambda key: components.method.init(key, context, components.hyper), jax.random.key(0)
    )
    params, memory = jax.tree_util.tree_map_with_path(fill, shapes)
    return {
        "params": {"encoders": variables["params"], "method": params},
        "batch_stats": variables["batch_stats"],
        "memory": memory,
    }


def make_model(seed=0, **changes):
    """Returns a model of random weights, with the testing config and some fields changed."""
    config = make_config(**changes)
    components = models.build_components(config)
    return models.make_model(components, config, make_variables(components, seed))


def answer(model):
    """Returns the arrays that a model computes for two images and two texts."""
    images, texts = model.encode_image(IMAGES), model.encode_text(TEXTS)
    arrays = {"image": images.pooled, "text": texts.pooled, "pixels": images.local}
    maps, weights = model.heatmap(images, texts)
    arrays |= {"maps": maps, "weights": weights} | model.similarity(images, texts)
    return jax.device_get(arrays)


def assert_equal_answers(model, other, tolerance=0.0):
    """Checks that two models compute the same, within an absolute and relative tolerance."""
    expected, actual = answer(model), answer(other)
    assert expected.keys() == actual.keys()
    for name, array in expected.items():
        np.testing.assert_allclose(
            actual[name], array, atol=tolerance, rtol=tolerance, err_msg=name
        )
