"""ChestX-Det, names of 13 findings as phrases: pointing game, CNR and mIoU, by finding and macro.

plan-jax --config eval/chestx_det_grounding --config.data.source=chestx_det --checkpoint runs/plan

The source is the folder as downloaded. The 553 films of test are evaluated; the metric is
`pointing`, how often the hottest pixel lies inside the truth. The truth of a finding is the union
of its outlines. With train.json and test.json of ChestX-Det10 in place of the lists of ChestX-Det,
it is the union of the boxes of 10 findings on 542 films. The mean masks that the heat maps are
compared with are those of train.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

DATA = public("chestx_det", size=512)


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    return benchmark("grounding", DATA, limit=553)
