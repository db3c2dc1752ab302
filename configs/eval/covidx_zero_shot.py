"""COVIDx, zero-shot among normal, pneumonia and COVID-19: accuracy and macro F1.

python -m plan_jax.main --config configs/eval/covidx_zero_shot.py --checkpoint runs/plan

The manifest is that of `covidx_linear.py`. No repository publishes its prompts; these are ours.
"""

from ml_collections import ConfigDict

from configs.eval import covidx_linear


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = covidx_linear.get_config()
    config.eval = ConfigDict(
        {"tasks": ("zero_shot",), "split": "test", "limit": 10_000, "prompts": "covid"}
    )
    config.eval.zero_shot = ConfigDict({"scoring": "max", "kind": "multiclass"})
    return config
