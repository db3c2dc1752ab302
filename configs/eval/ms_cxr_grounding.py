"""MS-CXR, phrase grounding by BioViL's protocol: CNR and mIoU, per category and macro.

python -m plan_jax.main --config configs/eval/ms_cxr_grounding.py --checkpoint runs/plan

The manifest is yours to make from MS_CXR_Local_Alignment_v1.1.0.json, one row an image: `image`,
`patient_id`, `text` (its report), `split` (test) and `boxes`, JSON [{"box": [x0, y0, x1, y1],
"phrase": label_text, "label": category}, ..]. Its patients are among those of MIMIC-CXR: leave them
out of pre-training. BioViL's dark corners are those outside of its central crop, 448 of 512 pixels.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
    """Return what differs from the run that is evaluated."""
    config = ConfigDict()
    config.data = ConfigDict({"name": "pairs"})
    config.data.builder = ConfigDict(
        {"manifest": "ms_cxr/manifest.csv", "text_optional": True, "size": 512}
    )
    config.eval = ConfigDict({"tasks": ("grounding",), "split": "test", "limit": 1200, "prior": 0})
    config.eval.grounding = ConfigDict({"crop": 0.875, "smooth": 1.5})
    return config
