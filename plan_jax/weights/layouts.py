"""The names of published weights: tables from the arrays of a file to the arrays of our towers.

The names are those of torchvision (ResNet), timm and DeiT (ViT), Hugging Face (BERT) and of the
checkpoints of MGCA, GLoRIA, BioViL and CXR-BERT. Ours are flat: `params/layer1_0/conv1/kernel`.
Torch stores convolutions as [E C H W] and matrices as [out in], we as [H W C E] and [in out].

Established from the originals' code, not from their files: MGCA's and ASG's text tower has no type
embedding, so ours becomes zero. It has no positions either: its encoder passes the token types, all
0, as the numbers of the positions, in training and after, so every token gets the first row of the
table, and so do ours. MGCA's heads have a bias before the first BatchNorm. Not covered: GLoRIA's
heads (linear) and BioViL's and CXR-BERT's projections, which have no counterpart in
`ProjectionHead`.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

# Kind of torch module -> suffix of its arrays -> our name ({}: our name of the module).
ARRAY_NAMES = {
    "plain": {"": "params/{}"},
    "table": {".weight": "params/{}"},
    "conv": {".weight": "params/{}/kernel"},
    "patch": {".weight": "params/{}/kernel", ".bias": "params/{}_bias"},
    "dense": {".weight": "params/{}/kernel", ".bias": "params/{}/bias"},
    "layer_norm": {
        ".weight": "params/{}/scale",
        ".bias": "params/{}/bias",
        # Files of 2018, converted from TensorFlow, have its names.
        ".gamma": "params/{}/scale",
        ".beta": "params/{}/bias",
    },
    "batch_norm": {
        ".weight": "params/{}/scale",
        ".bias": "params/{}/bias",
        ".running_mean": "batch_stats/{}/mean",
        ".running_var": "batch_stats/{}/var",
    },
}

# Kind of tower -> (pattern of torch's module, our module, kind of module).
MODULE_NAMES = {
    "resnet": (
        (r"conv1", r"stem", "conv"),
        (r"bn1", r"stem_norm", "batch_norm"),
        (r"layer(\d+)\.(\d+)\.conv(\d)", r"layer\1_\2/conv\3", "conv"),
        (r"layer(\d+)\.(\d+)\.bn(\d)", r"layer\1_\2/norm\3", "batch_norm"),
        (r"layer(\d+)\.(\d+)\.downsample\.0", r"layer\1_\2/conv_skip", "conv"),
        (r"layer(\d+)\.(\d+)\.downsample\.1", r"layer\1_\2/norm_skip", "batch_norm"),
    ),
    "vit": (
        (r"patch_embed\.proj", r"embed", "patch"),
        (r"cls_token", r"token", "plain"),
        (r"pos_embed", r"position", "plain"),
        (r"blocks\.(\d+)\.norm([12])", r"layer\1/norm\2", "layer_norm"),
        (r"blocks\.(\d+)\.attn\.qkv", r"layer\1/attention/qkv", "dense"),
        (r"blocks\.(\d+)\.attn\.proj", r"layer\1/attention/out", "dense"),
        (r"blocks\.(\d+)\.mlp\.fc([12])", r"layer\1/fc\2", "dense"),
        (r"norm", r"norm", "layer_norm"),
    ),
    "bert": (
        (r"embeddings\.word_embeddings", r"token/embedding", "table"),
        (r"embeddings\.position_embeddings", r"position", "table"),
        (r"embeddings\.token_type_embeddings", r"type", "table"),
        (r"embeddings\.LayerNorm", r"norm", "layer_norm"),
        (
            r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)",
            r"layer\1/attention/\2",
            "dense",
        ),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"layer\1/attention/out", "dense"),
        (r"encoder\.layer\.(\d+)\.attention\.output\.LayerNorm", r"layer\1/norm1", "layer_norm"),
        (r"encoder\.layer\.(\d+)\.intermediate\.dense", r"layer\1/fc1", "dense"),
        (r"encoder\.layer\.(\d+)\.output\.dense", r"layer\1/fc2", "dense"),
        (r"encoder\.layer\.(\d+)\.output\.LayerNorm", r"layer\1/norm2", "layer_norm"),
    ),
    "head": (
        (r"0", r"fc1", "dense"),
        (r"1", r"norm1", "batch_norm"),
        (r"3", r"fc2", "dense"),
        (r"4", r"norm2", "batch_norm"),
    ),
}

# Kind of tower -> patterns of arrays below its prefix that our towers have no use for.
IGNORED_ARRAYS = {
    "resnet": (r"fc\.(weight|bias)", r".*\.num_batches_tracked"),
    "vit": (r"head\.(weight|bias)", r"pre_logits\.fc\.(weight|bias)"),
    "bert": (
        r"pooler\.dense\.(weight|bias)",
        r"embeddings\.(position|token_type)_ids",
        r"encoder\.layer\.\d+\.crossattention\..*",  # created but never used in MGCA
    ),
    "head": (r".*\.num_batches_tracked",),
}

TOWER_KINDS = {"vision": ("resnet", "vit"), "text": ("bert",)}
# Kind of tower -> arrays that show, below some prefix, that a file holds one.
SIGNATURES = {
    "resnet": ("conv1.weight", "layer1.0.conv1.weight"),
    "vit": ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    "bert": ("embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"),
}
# The same for our own names, in files that `tools/convert_weights.py` wrote and in our towers.
OWN_SIGNATURES = {
    "resnet": "params/stem/kernel",
    "vit": "params/token",
    "bert": "params/token/embedding",
}

# Prefix of a tower's arrays -> whose checkpoint it is, and a pattern of the file's other parts.
MGCA_PARTS = r"(img|text)_encoder_q\.|prototype_layer\.|\w+_atten_layer\.|irl\.|text_encoder\."
GLORIA_PARTS = r"gloria\.(img|text)_encoder\."
BIOVIL_PARTS = r"projector\.|classifier\.|encoder\.(backbone_to_vit|vit_pooler|missing_prev)"
PREFIXES: dict[str, tuple[str, str | None]] = {
    "img_encoder_q.model.": ("MGCA", MGCA_PARTS),
    "text_encoder_q.model.": ("MGCA", MGCA_PARTS),
    "gloria.img_encoder.model.": ("GLoRIA", GLORIA_PARTS),
    "gloria.text_encoder.model.": ("GLoRIA", GLORIA_PARTS),
    "encoder.encoder.": ("BioViL", BIOVIL_PARTS),
    "bert.": ("Hugging Face", r"cls\.|cls_projection_head\.|classifier\."),
    "module.": ("several devices", None),
    "backbone.": ("a backbone", None),
    "model.": ("a model", None),
    "encoder.": ("an encoder", None),
    "": ("plain", None),
}
# Prefix of text towers without a type embedding, which give every token the first position.
POSITIONLESS_PREFIX = "text_encoder_q.model."
# ASG's checkpoints have MGCA's names, and a decoder of tags under this prefix.
ASG_PREFIX = "irl."
# Origin -> the normalisation of the images that its image tower was trained on.
NORMALISATION_OF_ORIGIN = {
    "MGCA": "fixed",
    "ASG": "imagenet",
    "GLoRIA": "fixed",
    "BioViL": "unit",
}
# Our heads -> prefix of their arrays in MGCA's checkpoints.
HEAD_PREFIXES = {
    "image_global": "img_encoder_q.global_embed.head.",
    "image_local": "img_encoder_q.local_embed.head.",
    "text_global": "text_encoder_q.global_embed.head.",
    "text_local": "text_encoder_q.local_embed.head.",
}


class Layout(NamedTuple):
    """Whose names a file has, the prefix of the tower's arrays in it, and the kind of tower."""

    origin: str
    prefix: str
    kind: str

    def __str__(self) -> str:
        location = f" under `{self.prefix}`" if self.prefix else ""
        return f"{self.kind} ({self.origin}){location}"


def recognise_layout(keys: Iterable[str], tower: str) -> Layout | None:
    """Returns how a file with these keys stores its `vision` or `text` tower; None if unknown.

    >>> recognise_layout(["bert.embeddings.word_embeddings.weight",
    ...                   "bert.encoder.layer.0.attention.self.query.weight"], "text")
    Layout(origin='Hugging Face', prefix='bert.', kind='bert')
    """
    available = set(keys)
    for kind in TOWER_KINDS[tower]:
        if OWN_SIGNATURES[kind] in available:
            return Layout("plan_jax", "", kind)
    # The longest prefix, which is the most specific, wins in a file that holds several towers.
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        for kind in TOWER_KINDS[tower]:
            if all(prefix + key in available for key in SIGNATURES[kind]):
                origin = PREFIXES[prefix][0]
                if origin == "MGCA" and any(key.startswith(ASG_PREFIX) for key in available):
                    origin = "ASG"
                return Layout(origin, prefix, kind)
    return None


def translate_name(key: str, kind: str) -> str | None:
    """Returns our flat name of an array of a tower; None if a tower of this kind has none.

    >>> translate_name("layer3.1.downsample.1.running_var", "resnet")
    'batch_stats/layer3_1/norm_skip/var'
    """
    for pattern, module, module_kind in MODULE_NAMES[kind]:
        for suffix, template in ARRAY_NAMES[module_kind].items():
            if match := re.fullmatch(pattern + re.escape(suffix), key):
                return template.format(match.expand(module))
    return None


def is_ignored(key: str, layout: Layout) -> bool:
    """Returns whether an array of the file is known, but not part of the tower.

    >>> is_ignored("bert.pooler.dense.bias", Layout("Hugging Face", "bert.", "bert"))
    True
    """
    if key.startswith(layout.prefix):
        patterns = IGNORED_ARRAYS[layout.kind]
        return any(re.fullmatch(p, key.removeprefix(layout.prefix)) for p in patterns)
    other_parts = PREFIXES[layout.prefix][1]
    return other_parts is not None and bool(re.match(other_parts, key))
