"""The names of published weights: tables from the arrays of a file to the arrays of our towers.

The names are those of torchvision (ResNet), timm, DeiT and DINOv2 (ViT), Hugging Face (BERT and
DINOv2) and of the checkpoints of MGCA, ASG, GLoRIA, BioViL, BioViL-T, CXR-BERT, and of those that
BenchX published of ConVIRT, MedCLIP, MedKLIP, M-FLAG, MRM and REFERS. Ours are flat:
`params/layer1_0/conv1/kernel`. Torch stores convolutions as [E C H W] and matrices as [out in], we
as [H W C E] and [in out].

Established from the originals' code, not from their files: MGCA's and ASG's text tower has no type
embedding, so ours becomes zero. It has no positions either: its encoder passes the token types, all
0, as the numbers of the positions, in training and after, so every token gets the first row of the
table, and so do ours. MGCA's and M-FLAG's heads have a bias before the first BatchNorm, and
GLoRIA's local head has none. MedKLIP numbers the first children of a ResNet and has no last stage.
"""

import re
from collections.abc import Iterable
from typing import NamedTuple

# Kind of torch module -> suffix of its arrays -> our name ({}: our name of the module).
ARRAY_NAMES = {
    "plain": {"": "params/{}"},
    "table": {".weight": "params/{}"},
    "conv": {".weight": "params/{}/kernel"},
    "factor": {".gamma": "params/{}", ".lambda1": "params/{}"},
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

# Kind of names -> (pattern of torch's module, our module, kind of module).
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
        (r"blocks\.(\d+)\.ls([12])", r"layer\1/scale\2", "factor"),
        (r"reg_token", r"registers", "plain"),
        # In the code of DINOv2 alone.
        (r"register_tokens", r"registers", "plain"),
        (r"blocks\.(\d+)\.mlp\.w12", r"layer\1/fc1", "dense"),
        (r"blocks\.(\d+)\.mlp\.w3", r"layer\1/fc2", "dense"),
    ),
    "vit_dinov2": (
        (r"embeddings\.patch_embeddings\.projection", r"embed", "patch"),
        (r"embeddings\.cls_token", r"token", "plain"),
        (r"embeddings\.register_tokens", r"registers", "plain"),
        (r"embeddings\.position_embeddings", r"position", "plain"),
        (r"encoder\.layer\.(\d+)\.norm([12])", r"layer\1/norm\2", "layer_norm"),
        (
            r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)",
            r"layer\1/attention/\2",
            "dense",
        ),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense", r"layer\1/attention/out", "dense"),
        (r"encoder\.layer\.(\d+)\.layer_scale([12])", r"layer\1/scale\2", "factor"),
        (r"encoder\.layer\.(\d+)\.mlp\.fc([12])", r"layer\1/fc\2", "dense"),
        (r"encoder\.layer\.(\d+)\.mlp\.weights_in", r"layer\1/fc1", "dense"),
        (r"encoder\.layer\.(\d+)\.mlp\.weights_out", r"layer\1/fc2", "dense"),
        (r"layernorm", r"norm", "layer_norm"),
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
        (r"pooler\.dense", r"pooler", "dense"),
    ),
    "resnet_children": (
        (r"0", r"stem", "conv"),
        (r"1", r"stem_norm", "batch_norm"),
        *(
            (rf"{stage + 3}\.(\d+)\.{module}", rf"layer{stage}_\1/{name}", kind)
            for stage in (1, 2, 3, 4)
            for module, name, kind in (
                (r"conv(\d)", r"conv\2", "conv"),
                (r"bn(\d)", r"norm\2", "batch_norm"),
                (r"downsample\.0", "conv_skip", "conv"),
                (r"downsample\.1", "norm_skip", "batch_norm"),
            )
        ),
    ),
    "vit_refers": (
        (r"embeddings\.patch_embeddings", r"embed", "patch"),
        (r"embeddings\.cls_token", r"token", "plain"),
        (r"embeddings\.position_embeddings", r"position", "plain"),
        (r"encoder\.layer\.(\d+)\.attention_norm", r"layer\1/norm1", "layer_norm"),
        (r"encoder\.layer\.(\d+)\.ffn_norm", r"layer\1/norm2", "layer_norm"),
        (
            r"encoder\.layer\.(\d+)\.attn\.(query|key|value|out)",
            r"layer\1/attention/\2",
            "dense",
        ),
        (r"encoder\.layer\.(\d+)\.ffn\.fc([12])", r"layer\1/fc\2", "dense"),
        (r"encoder\.encoder_norm", r"norm", "layer_norm"),
    ),
    # The kinds of heads are those of `ProjectionHead`.
    "linear": ((r"", r"fc2", "dense"),),
    "mlp": (
        (r"0", r"fc1", "dense"),
        (r"1", r"norm1", "batch_norm"),
        (r"3", r"fc2", "dense"),
        (r"4", r"norm2", "batch_norm"),
    ),
    "mlp_bn": (
        (r"0", r"fc1", "dense"),
        (r"1", r"norm1", "batch_norm"),
        (r"3", r"fc2", "dense"),
    ),
    "mlp_relu": ((r"0", r"fc1", "dense"), (r"2", r"fc2", "dense")),
    "mlp_ln": (
        (r"dense_to_hidden", r"fc1", "dense"),
        (r"LayerNorm", r"norm1", "layer_norm"),
        (r"dense_to_output", r"fc2", "dense"),
    ),
}

# Kind of names -> patterns of arrays below a prefix that our towers and heads have no use for.
IGNORED_ARRAYS = {
    "resnet": (r"fc\.(weight|bias)", r".*\.num_batches_tracked"),
    "resnet_children": (r".*\.num_batches_tracked",),
    "vit": (r"head\.(weight|bias)", r"pre_logits\.fc\.(weight|bias)", r"mask_token"),
    "vit_dinov2": (r"embeddings\.mask_token",),
    "vit_refers": (r"head\.(weight|bias)",),
    "bert": (
        r"embeddings\.(position|token_type)_ids",
        r"encoder\.layer\.\d+\.crossattention\..*",  # created but never used in MGCA
    ),
    "mlp": (r".*\.num_batches_tracked",),
    "mlp_bn": (r".*\.num_batches_tracked",),
}

# Kind of names -> the kind of tower that they are names of.
TOWERS = {
    "resnet": "resnet",
    "resnet_children": "resnet",
    "vit": "vit",
    "vit_dinov2": "vit",
    "vit_refers": "vit",
    "bert": "bert",
}
TOWER_KINDS = {
    "vision": ("resnet", "resnet_children", "vit", "vit_dinov2", "vit_refers"),
    "text": ("bert",),
}
# Kind of names -> arrays that show, below some prefix, that a file holds a tower.
SIGNATURES = {
    "resnet": ("conv1.weight", "layer1.0.conv1.weight"),
    "resnet_children": ("0.weight", "4.0.conv1.weight"),
    "vit": ("patch_embed.proj.weight", "blocks.0.attn.qkv.weight"),
    "vit_dinov2": (
        "embeddings.patch_embeddings.projection.weight",
        "encoder.layer.0.layer_scale1.lambda1",
    ),
    "vit_refers": ("embeddings.patch_embeddings.weight", "encoder.layer.0.attention_norm.weight"),
    "bert": ("embeddings.word_embeddings.weight", "encoder.layer.0.attention.self.query.weight"),
}
# Kind of tower -> the same for our own names, in files that `tools/convert_weights.py` wrote and in
# our towers.
OWN_SIGNATURES = {
    "resnet": "params/stem/kernel",
    "vit": "params/embed/kernel",
    "bert": "params/token/embedding",
}

# Prefix of a tower's arrays -> whose checkpoint it is, and a pattern of the file's other parts.
MGCA_PARTS = r"(img|text)_encoder_q\.|prototype_layer\.|\w+_atten_layer\.|irl\.|text_encoder\."
GLORIA_PARTS = r"gloria\.(img|text)_encoder\."
BIOVIL_PARTS = r"projector\.|classifier\.|encoder\.(backbone_to_vit|vit_pooler|missing_prev)"
CONVIRT_PARTS = r"linguistic\.|visual\.|(vis|lin)_proj\."
MEDCLIP_PARTS = r"text_model\.|logit_scale"
MFLAG_PARTS = r"encoder\.|proj_[vt]\.|lm_model\."
REFERS_PARTS = r"(visual|fusion|contrastive_bert|textual|backward_textual|head)\."
PREFIXES: dict[str, tuple[str, str | None]] = {
    "img_encoder_q.model.": ("MGCA", MGCA_PARTS),
    "text_encoder_q.model.": ("MGCA", MGCA_PARTS),
    "gloria.img_encoder.model.": ("GLoRIA", GLORIA_PARTS),
    "gloria.text_encoder.model.": ("GLoRIA", GLORIA_PARTS),
    "encoder.encoder.": ("an encoder in an encoder", None),
    "visual.model.": ("ConVIRT", CONVIRT_PARTS),
    "linguistic.encoder.": ("ConVIRT", CONVIRT_PARTS),
    "lm_model.bert.": ("M-FLAG", MFLAG_PARTS),
    "module.res_features.": ("MedKLIP", r"module\.(?!res_features\.)"),
    "visual.vit.transformer.": ("REFERS", REFERS_PARTS),
    "visual.vit.": ("REFERS", REFERS_PARTS),
    # REFERS by its authors, and any other model that began from the code of its ViT.
    "transformer.": ("REFERS or another ViT", REFERS_PARTS),
    "dinov2.": ("transformers", r"classifier\."),
    "dinov2_with_registers.": ("transformers", r"classifier\."),
    "bert.": ("Hugging Face", r"cls\.|cls_projection_head\.|classifier\."),
    "vision_model.model.": ("a vision model", None),
    "module.": ("several devices", None),
    "backbone.": ("a backbone", None),
    "model.": ("a model", None),
    "encoder.": ("an encoder", None),
    "": ("plain", None),
}
# (Prefix, beginning of another array) -> the same, where the prefix alone does not tell.
MARKS: dict[tuple[str, str], tuple[str, str | None]] = {
    ("img_encoder_q.model.", "irl."): ("ASG", MGCA_PARTS),  # a decoder of tags
    ("text_encoder_q.model.", "irl."): ("ASG", MGCA_PARTS),
    ("encoder.encoder.", "encoder.backbone_to_vit."): ("BioViL-T", BIOVIL_PARTS),
    ("encoder.encoder.", "projector.model."): ("BioViL", BIOVIL_PARTS),
    ("dinov2.", "dinov2.layernorm."): ("DINOv2", r"classifier\."),
    ("dinov2_with_registers.", "dinov2_with_registers.layernorm."): ("DINOv2", r"classifier\."),
    ("vision_model.model.", "text_model.projection_head."): ("MedCLIP", MEDCLIP_PARTS),
    ("encoder.", "proj_v."): ("M-FLAG", MFLAG_PARTS),
    ("", "bert_encoder."): ("MRM", r"(decoder_|mask_token|bert_encoder|bert_mlp)"),
}
# (Prefix, origin) -> the pattern of the other parts.
OTHER_PARTS = {
    (prefix, origin): parts
    for prefix, (origin, parts) in (
        *PREFIXES.items(),
        *((prefix, entry) for (prefix, _), entry in MARKS.items()),
    )
}
# Prefix of text towers without a type embedding, which give every token the first position.
POSITIONLESS_PREFIX = "text_encoder_q.model."
# Origin -> the normalisation of the images that its image tower was trained on.
NORMALISATION_OF_ORIGIN = {
    "MGCA": "fixed",
    "ASG": "imagenet",
    "GLoRIA": "fixed",
    "BioViL": "unit",
    "BioViL-T": "unit",
    "ConVIRT": "imagenet",
    "MedCLIP": "medclip",
    "MedKLIP": "imagenet",
    "M-FLAG": "fixed",
    "MRM": "mrm",
    "REFERS": "imagenet",
}
# Mean and deviation in a preprocessor_config.json, of three colours -> the normalisation. It tells
# DINOv2 from RAD-DINO, whose arrays have the same names and shapes.
NORMALISATION_OF_MEAN_AND_STD = {
    ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)): "imagenet",
    ((0.5307,) * 3, (0.2583,) * 3): "rad_dino",
    ((0.5,) * 3, (0.5,) * 3): "fixed",
    ((0.0,) * 3, (1.0,) * 3): "unit",
}
# What shows that a file holds a tower that ours cannot compute, and why.
FOREIGN_TOWERS = {
    r"(.*\.)?transformer\.resblocks\.0\.attn\.in_proj_weight": (
        "CLIP's ViT (PTUnifier, CheXzero), which has a norm before its layers, QuickGELU and no"
        " bias of the patches"
    ),
    r"(.*\.)?layers\.0\.blocks\.0\.attention\.self\.relative_position_bias_table": (
        "a Swin transformer (of MedCLIP), whose patches are merged between its stages"
    ),
    r"(.*\.)?features\.denseblock1\.denselayer1\.conv1\.weight": "a DenseNet",
}


class Layout(NamedTuple):
    """Whose names a file has, the prefix of a tower's or head's arrays, and the kind of names."""

    origin: str
    prefix: str
    kind: str

    @property
    def tower(self) -> str:
        """Returns the kind of tower that the names are names of."""
        return TOWERS[self.kind]

    def __str__(self) -> str:
        location = f" under `{self.prefix}`" if self.prefix else ""
        return f"{self.kind} ({self.origin}){location}"


# Our heads -> how checkpoints store them. No two have the same prefix.
HEAD_LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "image_global": (
        Layout("MGCA", "img_encoder_q.global_embed.head.", "mlp"),
        Layout("GLoRIA", "gloria.img_encoder.global_embedder", "linear"),
        Layout("ConVIRT", "vis_proj.", "mlp_relu"),
        Layout("M-FLAG", "proj_v.", "mlp"),
    ),
    "image_local": (
        Layout("MGCA", "img_encoder_q.local_embed.head.", "mlp"),
        Layout("GLoRIA", "gloria.img_encoder.local_embedder", "linear"),
        Layout("BioViL", "projector.model.", "mlp_bn"),
    ),
    "text_global": (
        Layout("MGCA", "text_encoder_q.global_embed.head.", "mlp"),
        Layout("ConVIRT", "lin_proj.", "mlp_relu"),
        Layout("M-FLAG", "proj_t.", "mlp"),
        Layout("CXR-BERT", "cls_projection_head.", "mlp_ln"),
    ),
    "text_local": (Layout("MGCA", "text_encoder_q.local_embed.head.", "mlp"),),
}


def recognise_layout(keys: Iterable[str], tower: str) -> Layout | None:
    """Returns how a file with these keys stores its `vision` or `text` tower; None if unknown.

    >>> recognise_layout(["bert.embeddings.word_embeddings.weight",
    ...                   "bert.encoder.layer.0.attention.self.query.weight"], "text")
    Layout(origin='Hugging Face', prefix='bert.', kind='bert')
    """
    available = set(keys)
    for kind in TOWER_KINDS[tower]:
        if OWN_SIGNATURES[TOWERS[kind]] in available:
            return Layout("plan_jax", "", TOWERS[kind])
    # The longest prefix, which is the most specific, wins in a file that holds several towers.
    for prefix in sorted(PREFIXES, key=len, reverse=True):
        for kind in TOWER_KINDS[tower]:
            if all(prefix + key in available for key in SIGNATURES[kind]):
                origin = find_origin(prefix, available)
                return Layout("DINOv2" if kind == "vit_dinov2" else origin, prefix, kind)
    return None


def recognise_head(keys: Iterable[str], head: str) -> Layout | None:
    """Returns how a file with these keys stores one of our heads; None if it has none.

    >>> recognise_head(["vis_proj.0.weight"], "image_global").kind
    'mlp_relu'
    """
    keys = list(keys)
    layouts = (x for x in HEAD_LAYOUTS[head] if any(key.startswith(x.prefix) for key in keys))
    return next(layouts, None)


def find_origin(prefix: str, keys: Iterable[str]) -> str:
    """Returns whose checkpoint has a tower under a prefix, and these keys.

    >>> find_origin("img_encoder_q.model.", ["irl.mlp_head.0.weight"])
    'ASG'
    """
    keys = list(keys)
    for (marked, mark), (origin, _) in MARKS.items():
        if marked == prefix and any(key.startswith(mark) for key in keys):
            return origin
    # timm keeps DINOv2's names without the mask token, and MAE has one without LayerScale.
    if {f"{prefix}mask_token", f"{prefix}blocks.0.ls1.gamma"} <= set(keys):
        return "DINOv2"
    return PREFIXES[prefix][0]


def describe_foreign(keys: Iterable[str]) -> str:
    """Returns which tower of these keys ours cannot compute, and why; "" if none is known."""
    keys = list(keys)
    for pattern, description in FOREIGN_TOWERS.items():
        if any(re.fullmatch(pattern, key) for key in keys):
            return description
    return ""


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
    """Returns whether an array of the file is known, but not part of the tower or head.

    >>> is_ignored("fc.bias", Layout("plain", "", "resnet"))
    True
    """
    if key.startswith(layout.prefix):
        patterns = IGNORED_ARRAYS.get(layout.kind, ())
        if any(re.fullmatch(p, key.removeprefix(layout.prefix)) for p in patterns):
            return True
        # An empty prefix is that of everything in a file.
        if layout.prefix:
            return False
    parts = OTHER_PARTS.get((layout.prefix, layout.origin))
    return parts is not None and bool(re.match(parts, key))
