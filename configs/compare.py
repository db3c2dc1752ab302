"""One of the runs behind docs/plan.md: equal data, towers and steps; what differs is named.

python -m plan_jax.main --config configs/compare.py:plan --config.seed=1

`tools/compare.py` runs all of them and writes the table.
"""

from ml_collections import ConfigDict

from configs import base

STEPS = 800
VARIANTS = {
    "convirt": "ConVIRT",
    "gloria": "GLoRIA",
    "plan_0": "PLAN, T = 0",
    "plan": "PLAN, T = 1",
    "plan_2": "PLAN, T = 2",
    "plan_same": "PLAN, T = 1, rounds stay on the coarse map",
    "plan_same_pull": "PLAN, T = 1, coarse map, words pulled to their regions (eta 0.5)",
    "plan_no_gates": "PLAN, T = 1, no word and pixel importance",
    "plan_no_history": "PLAN, T = 1, no history of words",
    "plan_all_negatives": "PLAN, T = 1, same word is a negative too",
    "plan_forget": "PLAN, T = 1, no history of the map (rho 0)",
}


def get_config(variant: str = "plan") -> ConfigDict:
    """Return the run called `variant`, a key of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; use one of {', '.join(VARIANTS)}")
    config = base.get_config()
    config.steps = STEPS
    config.checkpoint.every = 400
    config.method = variant.split("_")[0]
    if variant == "convirt":
        config.heads.image_local = config.heads.text_local = "shared"
        config.vision.pool = "mean"
        config.fine = False
    elif variant == "gloria":
        config.hyper = ConfigDict({"normalise": True})
        config.fine = False
    else:
        config.hyper = ConfigDict(_plan(variant))
        config.fine = variant not in ("plan_0", "plan_same", "plan_same_pull")
    return config


def _plan(variant: str) -> dict:
    changes = {
        "plan_0": {"rounds": 0},
        "plan_2": {"rounds": 2},
        "plan_same_pull": {"eta": 0.5},
        "plan_no_gates": {"gates": False},
        "plan_no_history": {"history": False},
        "plan_all_negatives": {"negatives": "all"},
        "plan_forget": {"rho": 0.0},
    }
    return changes.get(variant, {})
