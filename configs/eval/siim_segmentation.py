"""SIIM pneumothorax, segmentation with a frozen tower: MGCA's protocol, Dice.

python -m plan_jax.main --config configs/eval/siim_segmentation.py --checkpoint runs/plan

The manifest is yours to make from train-rle.csv, one row an image: `image`, `patient_id`, `split`
(70 / 15 / 15) and `mask`, the path of its mask (empty: no pneumothorax), drawn from the RLE.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {"manifest": "siim/manifest.csv", "text_optional": True, "size": 256}
    )
    config.eval = ConfigDict({"tasks": ("segmentation",), "split": "test", "limit": 2000})
    config.eval.segmentation = ConfigDict(
        {"targets": ("findings",), "balance": True, "batch": 8, "learning_rate": 5e-4}
    )
    return config
