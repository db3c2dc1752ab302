"""Grounding of a trained PLAN with and without guided maps (equation 11), and what guides them.

    python tools/compare_guides.py --model phantom-plan --seed 1

The phantoms are of another world than those of `configs/demo.py` if the seed is not 0, so that no
choice is made on its test set. A model whose rounds are guided too (`guide_round_steps`) has the
affinities of a row in its rounds as well.
"""

import argparse
import dataclasses
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plan_jax import model as models  # noqa: E402
from plan_jax.data import phantom  # noqa: E402
from plan_jax.metrics import slug  # noqa: E402
from plan_jax.page.comparison import to_markdown  # noqa: E402
from plan_jax.tasks import grounding  # noqa: E402

FREE = 1e9  # temperature of a distance that does not count
SETTINGS = {
    "not guided after the rounds": {"guide_steps": 0},
    "smoothed by place only, 2 steps": {"tau_guide": FREE, "tau_grey": FREE},
    "by pixels of the encoder, 2 steps": {"tau_grey": FREE},
    "by grey values, 2 steps": {"tau_guide": FREE},
    "by both, 1 step": {"guide_steps": 1},
    "by both, 2 steps": {"guide_steps": 2},
    "by both, 4 steps": {"guide_steps": 4},
}
KEYS = ("cnr_signed", "pointing", "pointing_box", "pointing_near", "miou_z")


def main() -> None:
    """Prints a table of all settings, and one of pointing by finding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="phantom-plan", help="a run, a saved model or a name")
    parser.add_argument("--seed", type=int, default=1, help="world of the phantoms")
    parser.add_argument("--count", type=int, default=300, help="number of phantoms")
    flags = parser.parse_args()
    variables = models.load_variables(flags.model)
    config = variables["config"]
    size = config.data.size
    records = [phantom.draw_study(flags.seed, i, size) for i in range(flags.count)]
    rows, findings = [], []
    for label, changes in SETTINGS.items():
        hyper = dataclasses.replace(config.hyper, **changes)
        changed = dataclasses.replace(config, hyper=hyper)
        model = models.make_model(models.build_components(changed), changed, variables)
        metrics, _ = grounding.score_phrases(model, records, phantom.FINDINGS)
        rows.append([label, *(f"{metrics[key]:.3f}" for key in KEYS)])
        by_finding = [metrics[f"{slug(name)}/pointing"] for name in phantom.FINDINGS]
        findings.append([label, *(f"{value:.2f}" for value in by_finding)])
        print(label, file=sys.stderr, flush=True)
    print(to_markdown(["maps", *KEYS], rows))
    print(to_markdown(["pointing", *phantom.FINDINGS], findings), end="")


if __name__ == "__main__":
    main()
