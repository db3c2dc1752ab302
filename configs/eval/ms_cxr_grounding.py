"""MS-CXR, phrase grounding: BioViL's protocol, CNR and mIoU, by category and macro.

plan-jax --config eval/ms_cxr_grounding --config.data.source=ms_cxr \
  --config.data.builder.images=mimic_cxr --checkpoint runs/plan

`ms_cxr_grounding.py:biovil_t` and `:afloc` crop as these two do. The metric `miou_afloc` is AFLoc's
mIoU; the others name how a map is scaled.

The images are those of MIMIC-CXR-JPG, whose folder is `--config.data.builder.images`. All of them
are test, 1,162 phrases on 1,047 images. The patients are among those of MIMIC-CXR; the dataset
`mimic_cxr` leaves them out of training if it is told where MS-CXR is.
"""

from ml_collections import ConfigDict

from configs.eval.benchmark import benchmark, public

# Of 512 pixels, the central part that the model sees and that is scored.
CROPS = {"biovil": 480, "biovil_t": 448, "afloc": 448}


def get_config(protocol: str = "biovil") -> ConfigDict:
    """Returns the benchmark.

    Raises:
      ValueError: another protocol.
    """
    if protocol not in CROPS:
        raise ValueError(f"protocol {protocol!r} is unknown; use one of {', '.join(CROPS)}")
    data = public("ms_cxr", size=512)
    options = {"crop": CROPS[protocol] / 512, "smooth": 1.5}
    return benchmark("grounding", data, limit=1200, num_prior_records=0, options=options)
