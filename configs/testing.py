"""The smallest run there is, for tests.

plan-jax --config testing --workdir runs/testing
"""

from ml_collections import ConfigDict

from configs import plan


def get_config() -> ConfigDict:
    """Returns PLAN for a few seconds: tiny encoders, 48 phantoms, 6 steps."""
    config = plan.get_config("phantom")
    config.steps = 6
    config.batch = 8
    config.log_every = 1
    config.data.size = 32
    config.data.max_tokens = 24
    config.data.max_words = 20
    config.data.builder = ConfigDict({"size": 32, "train": 48, "val": 8, "test": 8})
    config.vision.name = "resnet_tiny"
    config.text.name = "bert_tiny"
    config.embed_dim = 8
    config.head_hidden_dim = 16
    config.hyper = ConfigDict({"num_sampled_words": 4, "tile_size": 2})
    config.optim.name = "adamw"  # compiles in less time than muon
    config.optim.learning_rate = 3e-3
    config.checkpoint.every = 2
    config.eval.limit = 8
    config.eval.num_prior_records = 16
    config.eval.batch = 4
    return config
