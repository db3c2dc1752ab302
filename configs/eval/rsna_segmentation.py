"""RSNA pneumonia, segmentation of the filled boxes with a frozen tower: MGCA's protocol, Dice.

python -m plan_jax.main --config configs/eval/rsna_segmentation.py --checkpoint runs/plan

The manifest is yours to make from stage_2_train_labels.csv, one row a patient: `image`,
`patient_id`, `split` (16,010 / 5,337 / 5,337) and `boxes`, JSON [[x0, y0, x1, y1], ..].
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {"manifest": "rsna_boxes/manifest.csv", "text_optional": True, "size": 256}
    )
    config.eval = ConfigDict({"tasks": ("segmentation",), "split": "test", "limit": 5337})
    config.eval.segmentation = ConfigDict(
        {"targets": ("findings",), "batch": 16, "learning_rate": 5e-4}
    )
    return config
