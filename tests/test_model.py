"""From a config to a model: the tower of random weights."""

import jax
import numpy as np

from configs import testing
from plan_jax import model as models
from plan_jax.config import Config


def test_a_random_tower_depends_on_the_seed_alone():
    components = models.build_components(Config.from_dict(testing.get_config().to_dict()))
    images = np.random.default_rng(0).integers(0, 255, (2, 32, 32, 1)).astype(np.uint8)
    towers = [models.random_tower(components, 32, seed) for seed in (1, 1, 2)]
    pooled = [jax.device_get(tower.apply(tower.variables, images)[0].pooled) for tower in towers]
    np.testing.assert_array_equal(pooled[0], pooled[1])
    assert towers[0].name == towers[1].name != towers[2].name
    assert np.abs(pooled[0] - pooled[2]).max() > 1e-3
