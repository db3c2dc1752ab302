"""CheXpert, zero-shot by pairs of prompts, X and no X: CheXzero's way.

python -m plan_jax.main --config configs/eval/chexpert_zero_shot.py --checkpoint runs/plan

The manifest is that of `chexpert_linear.py`.
"""

from ml_collections import ConfigDict

from configs.eval import chexpert_linear


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = chexpert_linear.get_config()
    config.eval = ConfigDict(
        {"tasks": ("zero_shot",), "split": "test", "limit": 5000, "prompts": "chexzero"}
    )
    config.eval.zero_shot = ConfigDict({"scoring": "pair", "validate": True})
    return config
