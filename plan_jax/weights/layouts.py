"""How published weights call and lay out what our towers hold: tables of names, no arrays read.

The names are those of torchvision (ResNet), timm and DeiT (ViT), Hugging Face (BERT) and of the
checkpoints of MGCA, GLoRIA, BioViL and CXR-BERT; our own are flat, `params/layer1_0/conv1/kernel`.
Torch has convolutions as [E C H W] and matrices as [out in], we have [H W C E] and [in out].

Established from the originals' code, not from their files: MGCA's text tower has no type embedding
(nothing is added, so ours becomes zero), and its heads have a bias before the first BatchNorm. Not
here: GLoRIA's heads (linear) and BioViL's and CXR-BERT's projections, which have no like in `Head`.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

# A torch module's kind -> the names of its arrays -> ours ({}: our name of the module).
LEAVES = {
    "plain": {"": "params/{}"},
    "table": {".weight": "params/{}"},
    "conv": {".weight": "params/{}/kernel"},
    "patch": {".weight": "params/{}/kernel", ".bias": "params/{}_bias"},
    "dense": {".weight": "params/{}/kernel", ".bias": "params/{}/bias"},
    "layer_norm": {
        ".weight": "params/{}/scale",
        ".bias": "params/{}/bias",
        ".gamma": "params/{}/scale",
        ".beta": "params/{}/bias",  # as files of 2018 have them
    },
    "batch_norm": {
        ".weight": "params/{}/scale",
        ".bias": "params/{}/bias",
        ".running_mean": "batch_stats/{}/mean",
        ".running_var": "batch_stats/{}/var",
    },
}

# A tower's kind -> (torch's name of a module, ours, the module's kind).
MODULES = {
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
        (r"blocks\.(\d+)\.attn\.(qkv|proj)", r"layer\1/\2", "dense"),
        (r"blocks\.(\d+)\.mlp\.fc([12])", r"layer\1/fc\2", "dense"),
        (r"norm", r"norm", "layer_norm"),
    ),
    "bert": (
        (r"embeddings\.word_embeddings", r"token/embedding", "table"),
        (r"embeddings\.position_embeddings", r"position", "table"),
        (r"embeddings\.token_type_embeddings", r"type", "table"),
        (r"embeddings\.LayerNorm", r"norm", "layer_norm"),
        (r"encoder\.layer\.(\d+)\.attention\.self\.(query|key|value)", r"layer\1/\2", "dense"),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"layer\1/out", "dense"),
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
# What a tower's own part of a file may hold besides, and is left out knowingly.
DROPPED = {
    "resnet": (r"fc\.(weight|bias)", r".*\.num_batches_tracked"),
    "vit": (r"head\.(weight|bias)", r"pre_logits\.fc\.(weight|bias)"),
    "bert": (
        r"pooler\.dense\.(weight|bias)",
        r"embeddings\.(position|token_type)_ids",
        r"encoder\.layer\.\d+\.crossattention\..*",  # made but never used in MGCA
    ),
    "head": (r".*\.num_batches_tracked",),
}
# Without these arrays a part of a file is no tower of this kind.
ANCHORS = {
    "resnet": ("conv1.weight", "layer1.0.conv1.weight"),
    "vit": ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    "bert": ("embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"),
}
KINDS = {"vision": ("resnet", "vit"), "text": ("bert",)}
# The same for our own names: they tell which kind of tower an own file or a held tree is.
OWN = {"resnet": "params/stem/kernel", "vit": "params/token", "bert": "params/token/embedding"}
# What a tower's keys begin with -> whose checkpoint that is, and its other parts.
PREFIXES = {
    "img_encoder_q.model.": ("MGCA", r"(img|text)_encoder_q\.|prototype_layer\.|\w+_atten_layer\."),
    "text_encoder_q.model.": (
        "MGCA",
        r"(img|text)_encoder_q\.|prototype_layer\.|\w+_atten_layer\.",
    ),
    "gloria.img_encoder.model.": ("GLoRIA", r"gloria\.(img|text)_encoder\."),
    "gloria.text_encoder.model.": ("GLoRIA", r"gloria\.(img|text)_encoder\."),
    "encoder.encoder.": (
        "BioViL",
        r"projector\.|classifier\.|encoder\.(backbone_to_vit|vit_pooler|missing_prev)",
    ),
    "bert.": ("Hugging Face", r"cls\.|cls_projection_head\.|classifier\."),
    "module.": ("several devices", None),
    "backbone.": ("a backbone", None),
    "model.": ("a model", None),
    "encoder.": ("an encoder", None),
    "": ("plain", None),
}
# What a checkpoint does without, which zeros stand for exactly.
ZERO = {"text_encoder_q.model.": ("params/type",)}
# Our heads -> what their keys begin with in MGCA's checkpoints.
HEADS = {
    "image_global": "img_encoder_q.global_embed.head.",
    "image_local": "img_encoder_q.local_embed.head.",
    "text_global": "text_encoder_q.global_embed.head.",
    "text_local": "text_encoder_q.local_embed.head.",
}


class Layout(NamedTuple):
    """Where a file keeps a tower, under which prefix, and of which kind it is."""

    whose: str
    prefix: str
    kind: str

    def __str__(self) -> str:
        under = f" under `{self.prefix}`" if self.prefix else ""
        return f"{self.kind} ({self.whose}){under}"


def recognise(keys: Iterable[str], tower: str) -> Layout | None:
    """Say where a file with these keys keeps its `vision` or `text` tower; None: nowhere known.

    >>> recognise(["bert.embeddings.word_embeddings.weight",
    ...            "bert.encoder.layer.0.attention.self.query.weight"], "text")
    Layout(whose='Hugging Face', prefix='bert.', kind='bert')
    """
    held = set(keys)
    own = [kind for kind in KINDS[tower] if OWN[kind] in held]
    if own:
        return Layout("plan_jax", "", own[0])
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        for kind in KINDS[tower]:
            if all(prefix + key in held for key in ANCHORS[kind]):
                return Layout(PREFIXES[prefix][0], prefix, kind)
    return None


def our_name(key: str, kind: str) -> str | None:
    """Give our flat name of an array of a tower; None if it is none of its arrays.

    >>> our_name("layer3.1.downsample.1.running_var", "resnet")
    'batch_stats/layer3_1/norm_skip/var'
    """
    for pattern, ours, module in MODULES[kind]:
        for leaf, name in LEAVES[module].items():
            if match := re.fullmatch(pattern + re.escape(leaf), key):
                return name.format(match.expand(ours))
    return None


def is_dropped(key: str, layout: Layout) -> bool:
    """Say whether this key of the file is left out knowingly.

    >>> is_dropped("bert.pooler.dense.bias", Layout("Hugging Face", "bert.", "bert"))
    True
    """
    if key.startswith(layout.prefix):
        patterns = DROPPED[layout.kind]
        return any(re.fullmatch(p, key.removeprefix(layout.prefix)) for p in patterns)
    return bool(re.match(PREFIXES[layout.prefix][1] or "(?!)", key))
