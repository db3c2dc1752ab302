"""The configs of configs/published: each fits the arrays that its authors published, by shapes.

No array is computed: towers are traced, and files are zeros of two bytes.
"""

import dataclasses
import functools
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from published import publish

from plan_jax import model as models
from plan_jax.command import config_files
from plan_jax.config import Config, fill_defaults
from plan_jax.types import Batch, TextBatch, UserError
from plan_jax.weights import find_normalisation
from plan_jax.weights.convert import (
    adapt_arrays,
    adapt_head,
    check_match,
    flatten_shapes,
    rename_arrays,
)
from plan_jax.weights.layouts import recognise_head, recognise_layout

NAMES = [
    "biovil",
    "biovil_t",
    "convirt_benchx",
    "gloria",
    "medclip",
    "medklip",
    "mflag",
    "mgca_resnet50",
    "mgca_vit",
    "mrm",
    "rad_dino",
    "radjepa",
    "refers",
    "xray_dinov2",
]
VOCABULARIES = {
    "phantom": 128,
    "emilyalsentzer/Bio_ClinicalBERT": 28996,
    "microsoft/BiomedVLP-CXR-BERT-specialized": 30522,
    "microsoft/BiomedVLP-CXR-BERT-general": 30522,
    "microsoft/BiomedVLP-BioViL-T": 30522,
}
# The names under which the original stores its towers, and whose layout that is.
TOWERS = {
    "biovil": ("BioViL encoder.encoder.", "Hugging Face bert."),
    "biovil_t": ("BioViL-T encoder.encoder.", "Hugging Face bert."),
    "convirt_benchx": ("ConVIRT visual.model.", "ConVIRT linguistic.encoder."),
    "gloria": ("GLoRIA gloria.img_encoder.model.", "GLoRIA gloria.text_encoder.model."),
    "medclip": ("MedCLIP vision_model.model.", ""),
    "medklip": ("MedKLIP module.res_features.", ""),
    "mflag": ("M-FLAG encoder.", "M-FLAG lm_model.bert."),
    "mgca_resnet50": ("MGCA img_encoder_q.model.", "MGCA text_encoder_q.model."),
    "mgca_vit": ("MGCA img_encoder_q.model.", "MGCA text_encoder_q.model."),
    "mrm": ("MRM ", ""),
    "refers": ("REFERS visual.vit.transformer.", ""),
}
NORMALISATIONS = {
    "biovil": "unit",
    "biovil_t": "unit",
    "convirt_benchx": "imagenet",
    "gloria": "fixed",
    "medclip": "medclip",
    "medklip": "imagenet",
    "mflag": "fixed",
    "mgca_resnet50": "fixed",
    "mgca_vit": "fixed",
    "mrm": "mrm",
    "rad_dino": "rad_dino",  # by the preprocessor_config.json beside it
    "radjepa": "imagenet",  # the file does not tell
    "refers": "imagenet",
    "xray_dinov2": "imagenet",  # as DINOv2; the preprocessor_config.json beside it tells
}

# Patches along a side of the map that phrases are grounded in.
GRIDS = {
    "biovil": 15,
    "biovil_t": 14,
    "convirt_benchx": 7,
    "gloria": 19,
    "medclip": 14,
    "medklip": 14,
    "mflag": 7,
    "mgca_resnet50": 19,
    "mgca_vit": 14,
    "mrm": 14,
    "rad_dino": 37,
    "radjepa": 16,
    "refers": 14,
    "xray_dinov2": 16,
}


def mlp_shapes(prefix, width, out, tail=()):
    """Returns the shapes of MGCA's and M-FLAG's head; `tail` follows those of matrices."""
    norms = {
        f"{n}.{name}": (2048 if n == 1 else out,)
        for n in (1, 4)
        for name in ("running_mean", "running_var")
    }
    return {
        f"{prefix}{name}": shape
        for name, shape in (
            norms
            | {"0.weight": (2048, width, *tail), "0.bias": (2048,), "1.weight": (2048,)}
            | {"1.bias": (2048,), "3.weight": (out, 2048, *tail), "3.bias": (out,)}
            | {"4.num_batches_tracked": ()}
        ).items()
    }


def biovil_shapes(width):
    """Returns the shapes of BioViL's projector and of CXR-BERT's projection."""
    image = {"0.weight": (128, width, 1, 1), "3.weight": (128, 128, 1, 1), "3.bias": (128,)}
    image |= {f"1.{name}": (128,) for name in ("weight", "bias", "running_mean", "running_var")}
    text = {"dense_to_hidden.weight": (128, 768), "dense_to_output.weight": (128, 128)}
    modules = ("dense_to_hidden", "dense_to_output", "LayerNorm")
    text |= {f"{module}.bias": (128,) for module in modules} | {"LayerNorm.weight": (128,)}
    return {f"projector.model.{name}": shape for name, shape in image.items()} | {
        f"cls_projection_head.{name}": shape for name, shape in text.items()
    }


def mgca_shapes(pooled, local):
    """Returns the shapes of MGCA's four heads."""
    return (
        mlp_shapes("img_encoder_q.global_embed.head.", pooled, 128)
        | mlp_shapes("img_encoder_q.local_embed.head.", local, 128, (1,))
        | mlp_shapes("text_encoder_q.global_embed.head.", 768, 128)
        | mlp_shapes("text_encoder_q.local_embed.head.", 768, 128, (1,))
    )


# The shapes of the heads, and of what shows whose file it is, as the original declares them.
OTHERS = {
    "biovil": biovil_shapes(2048),
    "biovil_t": biovil_shapes(512)
    | {
        "encoder.backbone_to_vit.weight": (256, 2048, 1, 1),
        "encoder.missing_previous_emb": (1, 256, 1, 1),
        "encoder.vit_pooler.norm_post.weight": (256,),
    },
    "convirt_benchx": {
        f"{side}_proj.{name}": shape
        for side, width in (("vis", 2048), ("lin", 768))
        for name, shape in (
            ("0.weight", (768, width)),
            ("0.bias", (768,)),
            ("2.weight", (768, 768)),
            ("2.bias", (768,)),
        )
    },
    "gloria": {
        "gloria.img_encoder.global_embedder.weight": (768, 2048),
        "gloria.img_encoder.global_embedder.bias": (768,),
        "gloria.img_encoder.local_embedder.weight": (768, 1024, 1, 1),
    },
    "medclip": {
        "vision_model.model.fc.weight": (512, 2048),
        "text_model.model.embeddings.LayerNorm.bias": (768,),
        "text_model.projection_head.weight": (512, 768),
        "logit_scale": (),
    },
    "medklip": {"module.res_l1.weight": (1024, 1024), "module.classifier.bias": (2,)},
    "mflag": mlp_shapes("proj_v.", 2048, 1024)
    | mlp_shapes("proj_t.", 768, 1024)
    | {"lm_model.cls_projection_head.dense_to_hidden.bias": (128,)},
    "mgca_resnet50": mgca_shapes(2048, 1024) | {"prototype_layer.weight": (500, 128)},
    "mgca_vit": mgca_shapes(768, 768) | {"prototype_layer.weight": (500, 128)},
    "mrm": {"bert_encoder.model.bert.pooler.dense.bias": (768,), "decoder_norm.bias": (512,)},
    "refers": {"textual.output.bias": (30522,), "fusion.fc.bias": (768,)},
}


@functools.cache
def load_config(name):
    """Returns the config of a published model."""
    return Config.from_dict(fill_defaults(config_files.load_config_file(f"published/{name}")))


@functools.cache
def initialise(name):
    """Returns the shapes of our encoders for a config; nothing is computed."""
    config = load_config(name)
    config = dataclasses.replace(config, normalisation=NORMALISATIONS[name])
    original = models.load_tokenizer
    models.load_tokenizer = lambda name: SimpleNamespace(vocab_size=VOCABULARIES[name])
    try:
        encoder = models.build_components(config).encoder
    finally:
        models.load_tokenizer = original
    pieces, words = (
        jax.ShapeDtypeStruct((1, n), jnp.int32)
        for n in (config.data.max_tokens, config.data.max_words)
    )
    image = jax.ShapeDtypeStruct((1, config.data.size, config.data.size, 1), jnp.uint8)
    batch = Batch(image, TextBatch(pieces, pieces, words, words))
    return jax.eval_shape(encoder.init_with_output, jax.random.key(0), batch)


def number_children(key):
    """Returns a ResNet's key as MedKLIP has it, by the number of the child."""
    key = re.sub(r"^layer(\d)", lambda match: str(int(match[1]) + 3), key)
    return key.replace("conv1.weight", "0.weight", key.startswith("conv1")).replace(
        "bn1", "1", key.startswith("bn1")
    )


def rename_as_refers(state):
    """Returns a ViT's state dict under the names of REFERS' code."""
    renamed = {}
    for key, value in state.items():
        if ".qkv." in key:
            stem, leaf = key.replace("blocks", "encoder.layer").split("qkv.")
            parts = zip(("query", "key", "value"), np.split(value, 3), strict=True)
            renamed |= {f"{stem}{part}.{leaf}": piece for part, piece in parts}
            continue
        for old, new in (
            ("patch_embed.proj", "embeddings.patch_embeddings"),
            ("cls_token", "embeddings.cls_token"),
            ("pos_embed", "embeddings.position_embeddings"),
            ("norm1", "attention_norm"),
            ("norm2", "ffn_norm"),
            ("attn.proj", "attn.out"),
            ("mlp", "ffn"),
            ("blocks", "encoder.layer"),
        ):
            key = key.replace(old, new)
        renamed["encoder.encoder_" + key if key.startswith("norm.") else key] = value
    return renamed


def publish_zeros(name):
    """Returns the state dict of a published model as zeros of two bytes, both towers in one."""
    config, (_, variables) = load_config(name), initialise(name)
    state = {key: np.zeros(shape, np.float16) for key, shape in OTHERS[name].items()}
    for tower, entry in zip(("image_tower", "text_tower"), TOWERS[name], strict=True):
        if not entry:
            continue
        prefix = entry.rpartition(" ")[2]
        kind = "bert" if tower == "text_tower" else config.vision["name"].partition("_")[0]
        kind = {"resnet50": "resnet"}.get(kind, kind)
        trees = {collection: part.get(tower, {}) for collection, part in variables.items()}
        trees = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float16), trees)
        pooler = trees["params"].pop("pooler", None)
        tower_state = publish(kind, trees)
        if pooler:
            tower_state["pooler.dense.weight"] = pooler["kernel"].T
            tower_state["pooler.dense.bias"] = pooler["bias"]
        if name == "medklip":
            tower_state = {number_children(key): value for key, value in tower_state.items()}
        if name == "refers":
            tower_state = rename_as_refers(tower_state)
        if name.startswith("mgca") and kind == "bert":
            del tower_state["embeddings.token_type_embeddings.weight"]
        state |= {prefix + key: value for key, value in tower_state.items()}
    return state


def test_every_published_config_is_listed():
    names = [name for name in config_files.list_names() if name.startswith("published/")]
    assert names == [f"published/{name}" for name in NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_a_published_config_initialises_and_trains_nothing(name):
    config, ((images, texts), _) = load_config(name), initialise(name)
    assert config.steps == 0 and config.eval.tasks == ()
    assert images.pooled.shape == texts.pooled.shape == (1, config.embed_dim)
    assert images.local.shape[1] == np.prod(images.grid)
    assert images.grid == (GRIDS[name],) * 2


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_published_arrays_fit_the_config(name):
    config, (_, variables) = load_config(name), initialise(name)
    state = publish_zeros(name)
    for side, tower, entry in zip(
        ("vision", "text"), ("image_tower", "text_tower"), TOWERS[name], strict=True
    ):
        # CXR-BERT is in a file of its own.
        is_folder = name.startswith("biovil")
        own = {
            key: value
            for key, value in state.items()
            if not is_folder or key.startswith(("bert.", "cls_")) == (side == "text")
        }
        layout = recognise_layout(own, side)
        if not entry:
            assert layout is None
            continue
        origin, _, prefix = entry.rpartition(" ")
        assert (layout.origin, layout.prefix) == (origin, prefix)
        trees = {collection: part.get(tower, {}) for collection, part in variables.items()}
        conversion, shapes = rename_arrays(own, layout), flatten_shapes(trees)
        adapt_arrays(conversion.arrays, shapes, layout, name)
        check_match(conversion, shapes, name)
    for head, kind in vars(config.heads).items():
        if f"{head}_head" not in variables["params"] or not config.weights.heads:
            continue
        layout = recognise_head(state, head)
        assert layout.kind == kind
        own = {key: value for key, value in state.items() if key.startswith(layout.prefix)}
        trees = {collection: part.get(f"{head}_head", {}) for collection, part in variables.items()}
        conversion, shapes = rename_arrays(own, layout), flatten_shapes(trees)
        adapt_head(conversion.arrays, shapes, layout, state)
        check_match(conversion, shapes, name)


@pytest.mark.parametrize("name", sorted(TOWERS))
def test_the_scale_of_images_follows_from_whose_weights_they_are(name):
    state = dict.fromkeys(publish_zeros(name))
    assert find_normalisation("file", read=lambda source: state) == NORMALISATIONS[name]
    stated = "imagenet" if name == "refers" else "weights"
    assert load_config(name).normalisation == stated


@pytest.mark.parametrize(
    "name", ["medclip", "medklip", "mrm", "rad_dino", "radjepa", "refers", "xray_dinov2"]
)
def test_models_of_images_alone_compare_no_texts(name):
    content = load_config(name).to_dict()
    content["eval"]["tasks"] = ("classification", "zero_shot")
    with pytest.raises(
        UserError, match=r"config.eval.tasks .* zero_shot would compare images with"
    ):
        Config.from_dict(content)
