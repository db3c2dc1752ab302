"""ConVIRT, as its paper trains it on MIMIC-CXR; with `:phantom`, on a laptop.

python -m plan_jax.main --config configs/convirt.py:phantom
python -m plan_jax.main --config configs/convirt.py --config.data.builder.manifest=DIR/manifest.csv
"""

from ml_collections import ConfigDict

from configs import base


def get_config(size: str = "paper") -> ConfigDict:
    """Return the experiment; the constants are of arXiv 2010.00747, section 3.4 and appendix A.

    Deviation: a whole report instead of one random sentence; a cosine instead of a plateau; MGCA's
    heads and width instead of two layers to 512.
    """
    config = base.sized(size)
    config.method = "convirt"
    config.fine = False
    config.heads.image_local = config.heads.text_local = "shared"
    if size == "phantom":
        config.vision.pool = "mean"
    else:
        config.text.name = "bert_base"
        config.batch = 32
        config.optim.update(rate=1e-4, weight_decay=1e-6, warmup=0.01)
    return config
