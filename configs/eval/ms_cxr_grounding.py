"""MS-CXR, phrase grounding: BioViL's protocol, CNR and mIoU, by category and macro.

plan-jax --config eval/ms_cxr_grounding --checkpoint runs/plan

`ms_cxr_grounding.py:biovil_t` and `:afloc` crop as these two do. The metric `miou_afloc` is AFLoc's
mIoU; the others name how a map is scaled.

You create the manifest from MS_CXR_Local_Alignment_v1.1.0.json, one row an image. Its columns are
`image`, `patient_id`, `text` (the report), `split` (test) and `boxes`, JSON [{"box": [x0, y0, x1,
y1], "phrase": label_text, "label": category}, ..]. Its patients are among those of MIMIC-CXR:
exclude them from pre-training.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, manifest

# Of 512 pixels, the central part that the model sees and that is scored.
CROPS = {"biovil": 480, "biovil_t": 448, "afloc": 448}


def get_config(protocol: str = "biovil") -> ConfigDict:
    """Returns the benchmark.

    Raises:
      ValueError: another protocol.
    """
    if protocol not in CROPS:
        raise ValueError(f"protocol {protocol!r} is unknown; use one of {', '.join(CROPS)}")
    data = manifest("ms_cxr/manifest.csv", size=512)
    options = {"crop": CROPS[protocol] / 512, "smooth": 1.5}
    return benchmark("grounding", data, limit=1200, num_prior_records=0, options=options)
