"""BioViL: its image model, and CXR-BERT-specialized.

plan-jax --config published/biovil
plan-jax --config eval/ms_cxr_grounding --checkpoint runs/biovil

Both are fetched from the hub: microsoft/BiomedVLP-CXR-BERT-specialized. Reading them needs torch.

Sources: github.com/microsoft/hi-ml at b67c1d2, hi-ml-multimodal: image/model/model.py, modules.py
(the projector, applied to each patch; the global vector is their mean) and pretrained.py (names of
the files), text/model/modelling_cxrbert.py (projection of [CLS]), image/utils.py (480 of 512
pixels) and vlp/inference_engine.py (the cosine of images, and of patches, with a phrase).

These scores are those of method `convirt`: the cosine of whole images and texts, and for a heat map
the cosine of each patch with the whole phrase. `eval/ms_cxr_grounding` smooths the map and cuts the
image as hi-ml does. There is no method `biovil`, as its training needs masked words, which are not
part of this library.
Deviation: elsewhere the whole image is scaled to 480 pixels, instead of 480 of 512 from the centre.
Deviation: texts have at most 128 pieces, where hi-ml allows 512; full stops at their end stay.
"""

from ml_collections import ConfigDict

from configs.published.checkpoint import RESNET50, published

REPOSITORY = "microsoft/BiomedVLP-CXR-BERT-specialized"


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    return get_biovil(REPOSITORY, f"hub:{REPOSITORY}/biovil_image_resnet50_proj_size_128.pt", 480)


def get_biovil(repository: str, vision: str, size: int) -> ConfigDict:
    """Returns an image model of hi-ml with the text model of a repository."""
    return published(
        vision={**RESNET50, "local_stage": 3},
        size=size,
        weights=vision,
        text={"name": "bert_base"},
        text_weights=repository,
        heads=("mean", "mlp_bn", "mlp_ln", "shared"),
        embed_dim=128,
        head_hidden_dim=128,
        tokenizer=repository,
        max_tokens=128,
    )
