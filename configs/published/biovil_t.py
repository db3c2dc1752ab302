"""BioViL-T: its image model for images without a previous one, and its CXR-BERT.

plan-jax --config published/biovil_t
plan-jax --config eval/ms_cxr_grounding:biovil_t --checkpoint runs/biovil_t

Both are fetched from the hub: microsoft/BiomedVLP-BioViL-T. Reading them needs torch.

Sources: those of `biovil.py`, image/utils.py (448 of 512 pixels) and image/model/encoder.py:
without a previous image, a learned vector stands in place of the change, and the transformer that
compares two images is not used. The linear layer that follows the ResNet becomes part of the head,
which changes no score. Tasks that fit a head see the ResNet's 2048 channels, not the 512 after it.

Deviation: two images of a patient are not compared.
"""

from ml_collections import ConfigDict

from configs.published.biovil import get_biovil

REPOSITORY = "microsoft/BiomedVLP-BioViL-T"


def get_config() -> ConfigDict:
    """Returns the checkpoint."""
    return get_biovil(REPOSITORY, f"hub:{REPOSITORY}/biovil_t_image_model_proj_size_128.pt", 448)
