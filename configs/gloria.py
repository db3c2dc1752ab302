"""GLoRIA, as its code trains it; with `:phantom`, on a laptop.

python -m plan_jax.main --config configs/gloria.py:phantom
python -m plan_jax.main --config configs/gloria.py --config.data.builder.manifest=DIR/manifest.csv
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "paper") -> ConfigDict:
    """Return the experiment; the constants are of github.com/marshuang80/gloria at 416466a.

    Deviation: a whole report instead of one random sentence, whose vector is the mean of its pieces
    instead of all slots; a cosine instead of a plateau; the text side has linear heads instead of
    none.
    """
    config = base.sized(size)
    config.method = "gloria"
    config.fine = False
    if size == "phantom":
        config.hyper = ConfigDict({"normalise": True})
    else:
        config.text.update(name="bert_base", pool="mean", last=4)
        for head in config.heads:
            config.heads[head] = "linear"
        config.dim = 768
        config.batch = 48
        config.data.length, config.data.words = 97, 95
        config.optim.update(rate=5e-5, weight_decay=1e-6, warmup=0.01, b1=0.5, clip=0.25)
    return config
