"""From a config to a model: the tower of random weights, and texts that it cannot read."""

import dataclasses
import math

import jax
import numpy as np
import pytest

from configs import testing
from plan_jax import checkpoint
from plan_jax import model as models
from plan_jax.config import Config
from plan_jax.data.tokenizer import tokenize_batch
from plan_jax.types import Batch, UserError


def test_a_random_tower_depends_on_the_seed_alone():
    components = models.build_components(Config.from_dict(testing.get_config().to_dict()))
    images = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 1)).astype(np.uint8)
    towers = [models.random_tower(components, 32, seed) for seed in (1, 1, 2)]
    pooled = [jax.device_get(tower.apply(tower.variables, images)[0].pooled) for tower in towers]
    np.testing.assert_array_equal(pooled[0], pooled[1])
    assert towers[0].name == towers[1].name != towers[2].name
    assert np.abs(pooled[0] - pooled[2]).max() > 1e-3


def make_parts(**changes):
    """Returns components, config and parameters of zeros, as `make_model` takes them."""
    config = Config.from_dict(testing.get_config().to_dict() | changes)
    components = models.build_components(config)
    text = tokenize_batch(components.tokenizer, ["No effusion."], 24, 20)
    batch = Batch(image=np.zeros((1, 32, 32, 1), np.uint8), text=text)
    encoder = components.encoder.clone(axis=None)
    shapes = jax.eval_shape(encoder.init, jax.random.key(0), batch)
    weights = jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)
    variables = {
        "params": {"encoders": weights["params"], "method": {}},
        "batch_stats": weights["batch_stats"],
        "memory": {},
    }
    return components, config, variables


@pytest.fixture(scope="module")
def model_parts():
    return make_parts()


def test_rounds_of_a_method_without_rounds_are_refused():
    model = models.make_model(*make_parts(method="convirt", hyper={}, fine_map=False))
    images = model.encode_image(np.zeros((1, 32, 32, 1), np.uint8))
    texts = model.encode_text(["effusion"])
    with pytest.raises(UserError, match="rounds is 1, and convirt has none; leave it out"):
        model.heatmap(images, texts, rounds=1)


def test_maps_of_a_method_without_rounds_are_on_the_coarse_grid():
    model = models.make_model(*make_parts(method="convirt", hyper={}, fine_map=True))
    images = model.encode_image(np.zeros((1, 32, 32, 1), np.uint8))
    assert images.fine_grid != images.grid == model.grid
    maps, _ = model.heatmap(images, model.encode_text(["effusion"]))
    assert maps.shape[-1] == math.prod(model.grid)


def test_a_text_in_another_script_is_refused(model_parts):
    model = models.make_model(*model_parts)
    message = "100% of the pieces of the text are unknown to tokenizer 'phantom'; write them in"
    with pytest.raises(UserError, match=message):
        model.encode_text(["\u80f8\u8154\u79ef\u6db2"])


@pytest.mark.parametrize("change", [-1, 1])
def test_a_tokenizer_that_changed_after_training_is_refused(change, model_parts):
    """Ids beyond the embedding's rows would be NaN, and rows would mean other pieces."""
    components, config, variables = model_parts
    size = components.tokenizer.vocab_size
    tokenizer = dataclasses.replace(components.tokenizer, vocab_size=size + change)
    message = f"has {size + change} pieces, and the run was trained with {size}; put the file back"
    with pytest.raises(UserError, match=message):
        models.make_model(components._replace(tokenizer=tokenizer), config, variables)


def test_weights_that_are_not_finite_are_refused(tmp_path):
    params = {"tower": {"kernel": np.array([1, np.nan], np.float32)}}
    manager = checkpoint.open_manager(tmp_path / "run" / checkpoint.FOLDER)
    checkpoint.save(manager, 3, {"params": params}, {}, {})
    checkpoint.close(manager)
    message = r"run has values in params.tower.kernel that are not finite; use an older step, or"
    with pytest.raises(UserError, match=message):
        models.load(tmp_path / "run")
