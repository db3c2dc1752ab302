"""VinDr-CXR, zero-shot: AUROC of the 28 labels, by one prompt for and one against each.

plan-jax --config eval/vindr_zero_shot --config.data.source=vindr --checkpoint runs/plan

The source is the folder as downloaded from PhysioNet. Its 3,000 films of test are evaluated, whose
labels are a consensus; thresholds are chosen on films of train, where two of three readers decide.
The films of a paper that takes any reader need `--config.data.builder.min_readers=1`. No repository
publishes prompts for these labels; these are ours.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

DATA = public("vindr_cxr")


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    options = {"scoring": "pair", "validate": True}
    return benchmark("zero_shot", DATA, limit=3000, options=options)
