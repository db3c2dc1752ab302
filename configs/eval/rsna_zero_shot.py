"""RSNA pneumonia, zero-shot by prompts for and against: AUROC, and F1 and accuracy at a threshold.

python -m plan_jax.main --config configs/eval/rsna_zero_shot.py --checkpoint runs/plan

The manifest is that of `rsna_linear.py`; the threshold is chosen on its validation split. BioViL's
way: four phrasings for and four against, their embeddings averaged.
"""

from ml_collections import ConfigDict

from configs.eval import rsna_linear


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = rsna_linear.get_config()
    config.eval = ConfigDict(
        {"tasks": ("zero_shot",), "split": "test", "limit": 4003, "prompts": "biovil"}
    )
    config.eval.zero_shot = ConfigDict({"ensemble": "embeddings", "validate": True})
    return config
