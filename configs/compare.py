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
# What `tools/compare.py --tune` tries beside the default: of every method two values of each of two
# constants, and one of the learning rate. So each method has the same number of trials.
LEARNING_RATE_FACTOR = 1 / 3
TUNED = {
    # The contrast is all of ConVIRT, and these are its constants.
    "convirt": {"tau": (0.05, 0.2), "image_to_text": (0.5, 0.9)},
    # With cosines a word attends nearly evenly at 4; the scale is that of both contrasts.
    "gloria": {"attention_sharpness": (16.0, 64.0), "logit_scale": (5.0, 20.0)},
    # Only the token losses reach the heat map: how sharp they are, and how much they count.
    "mgca": {"tau_token": (0.05, 0.2), "weight_token": (0.3, 3.0)},
    # The temperature of three of four losses, and the weight of the one that grounds words.
    "asg": {"tau": (0.04, 0.15), "weight_region": (0.3, 3.0)},
    # Of the local contrast, and of the match and the queries that make the heat map.
    "place": {"tau_local": (0.04, 0.15), "tau_match": (0.05, 0.2)},
    # How sharp the region of a word is, and how many words of a report are contrasted.
    "plan": {"tau_region": (0.05, 0.2), "num_sampled_words": (6, 24)},
}
# On hard phantoms: the longest of 150 reports has 18 sentences, and PLACE's default reads 12.
HARD_HYPER = {"place": {"max_sentences": 24}}
ABLATION = {
    "plan_0": "PLAN, T = 0",
    "plan_2": "PLAN, T = 2",
    "plan_late": "PLAN, T = 1 from step 400 on",
    "plan_reading": "PLAN, T = 1 on the coarse map in evaluation only",
    "plan_same": "PLAN, T = 1, rounds stay on the coarse map",
    "plan_same_pull": "PLAN, T = 1, coarse map, words pulled to their regions (eta 0.5)",
    "plan_forget": "PLAN, T = 1, no history of the map (rho 0)",
    "plan_unguided": "PLAN, T = 1, rounds not guided by the image",
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
    "plan_unguided": {"guide_round_steps": 0},
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
    if variant in _COARSE:
        config.fine_map = False
        config.hyper.guide_round_steps = 0  # guides rounds on the finer map
    config.hyper.update(_HYPER.get(variant, {}))
    return config
