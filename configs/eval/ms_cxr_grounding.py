"""MS-CXR, phrase grounding: BioViL's protocol, CNR and mIoU, by category and macro.

python -m plan_jax.main --config configs/eval/ms_cxr_grounding.py --checkpoint runs/plan

You create the manifest from MS_CXR_Local_Alignment_v1.1.0.json, one row an image. Its columns are
`image`, `patient_id`, `text` (the report), `split` (test) and `boxes`, JSON [{"box": [x0, y0, x1,
y1], "phrase": label_text, "label": category}, ..]. Its patients are among those of MIMIC-CXR:
exclude them from pre-training.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest


def get_config() -> ConfigDict:
    """Returns the benchmark."""
    data = manifest("ms_cxr/manifest.csv", size=512)
    # BioViL sees the central 448 of 512 pixels, and smooths its maps.
    options = {"crop": 448 / 512, "smooth": 1.5}
    return benchmark("grounding", data, limit=1200, num_prior_records=0, options=options)
