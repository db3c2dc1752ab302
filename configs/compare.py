"""One of the runs of docs/plan.md and docs/methods.md: equal data, steps and data order.

plan-jax --config compare:plan --config.seed=1

`tools/compare.py` runs all of them and writes the table.
"""

from ml_collections import ConfigDict

from configs import asg, convirt, gloria, mgca, place, plan

STEPS = 800
METHODS = {
    "convirt": "ConVIRT",
    "gloria": "GLoRIA",
    "mgca": "MGCA",
    "asg": "ASG",
    "place": "PLACE",
    "plan": "PLAN, T = 1",
}
ABLATION = {
    "plan_0": "PLAN, T = 0",
    "plan_2": "PLAN, T = 2",
    "plan_late": "PLAN, T = 1 from step 400 on",
    "plan_reading": "PLAN, T = 1 on the coarse map in evaluation only",
    "plan_same": "PLAN, T = 1, rounds stay on the coarse map",
    "plan_same_pull": "PLAN, T = 1, coarse map, words pulled to their regions (eta 0.5)",
    "plan_forget": "PLAN, T = 1, no history of the map (rho 0)",
    "plan_no_gates": "PLAN, T = 1, no word and pixel importance",
    "plan_no_history": "PLAN, T = 1, no history of words",
    "plan_all_negatives": "PLAN, T = 1, same word is a negative too",
}
VARIANTS = METHODS | ABLATION
_HYPER = {
    "plan_0": {"rounds": 0},
    "plan_2": {"rounds": 2},
    "plan_late": {"refinement_start_step": STEPS // 2},
    "plan_reading": {"eta": 0.5, "refinement_start_step": STEPS},
    "plan_same_pull": {"eta": 0.5},
    "plan_forget": {"rho": 0.0},
    "plan_no_gates": {"use_gates": False},
    "plan_no_history": {"use_history": False},
    "plan_all_negatives": {"negatives": "all"},
}
_COARSE = ("plan_0", "plan_reading", "plan_same", "plan_same_pull")  # without the finer map


def get_config(variant: str = "plan") -> ConfigDict:
    """Returns the run called `variant`, a key of VARIANTS."""
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r} is unknown; use one of {', '.join(VARIANTS)}")
    modules = {"convirt": convirt, "gloria": gloria, "mgca": mgca, "asg": asg, "place": place}
    config = modules.get(variant, plan).get_config("phantom")
    config.steps = STEPS
    config.checkpoint.every = 400
    if variant in _HYPER:
        config.hyper = ConfigDict(_HYPER[variant])
    if variant in _COARSE:
        config.fine_map = False
    return config
