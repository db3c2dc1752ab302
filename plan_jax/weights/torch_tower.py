"""Writes an image tower under the names of torchvision and timm, to be used in PyTorch.

The two files are a model folder of timm's, which builds and fills the tower by
`timm.create_model("local-dir:FOLDER", pretrained=True)`. A ResNet's state dict is torchvision's
too. `layouts` holds the tables of names, which are read backwards here.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from flax import traverse_util
from jaxtyping import PyTree

from plan_jax.types import UserError
from plan_jax.weights.layouts import ARRAY_NAMES, MODULE_NAMES
from plan_jax.weights.sources import Arrays

# Depths of the stages, whether blocks are bottlenecks -> the ResNet of torchvision and timm.
RESNETS = {
    ((2, 2, 2, 2), False): "resnet18",
    ((3, 4, 6, 3), False): "resnet34",
    ((3, 4, 6, 3), True): "resnet50",
    ((3, 4, 23, 3), True): "resnet101",
    ((3, 8, 36, 3), True): "resnet152",
}
# What all of these have in common.
RESNET_SIZES: dict[str, Any] = {"widths": (64, 128, 256, 512), "stem": "conv7", "stem_width": 64}
# Width -> the ViT of timm. It takes other sizes as arguments, so any of them could stand for all.
VITS = {
    192: "vit_tiny_patch16_224",
    384: "vit_small_patch16_224",
    768: "vit_base_patch16_224",
    1024: "vit_large_patch16_224",
}
# The same with patches of 14 and LayerScale; that of 1536 has SwiGLU.
DINOV2S = {
    384: "vit_small_patch14_dinov2",
    768: "vit_base_patch14_dinov2",
    1024: "vit_large_patch14_dinov2",
    1536: "vit_giant_patch14_dinov2",
}
# What torch has to compute before the tower.
NORMALISE = "(x - mean) / std"
NORMALISE_EACH = "(x - x.mean()) / (x.std(correction=0) + 1e-3), for each image by itself"
RESIZE = "F.interpolate(x, ({side}, {side}), mode='bilinear', align_corners=True)"
# Number of axes of our kernel -> torch's order: [H W in out] -> [out in H W], [in out] -> [out in].
TORCH_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}


class TorchTower(NamedTuple):
    """An image tower in PyTorch: how timm and torchvision build it.

    `arguments` are those of `timm.create_model(architecture, ...)`, and `torchvision_arguments`
    those of `torchvision.models.get_model(architecture, ...)`, None if torchvision has no such
    model.
    """

    architecture: str
    arguments: dict[str, Any]
    torchvision_arguments: dict[str, Any] | None = None


def encode_tower(
    variables: Mapping[str, PyTree],
    sizes: Mapping[str, Any],
    *,
    channels: int,
    image_size: int,
    mean_and_std: tuple[Any, Any] | None,
) -> dict[str, bytes]:
    """Returns the files of an image tower for PyTorch, by their names.

    `model.safetensors` is the state dict, without a classifier. `config.json` is timm's, with an
    entry `plan_jax` about what no library of torch computes by itself.

    Args:
      variables: the tower's {"params", "batch_stats"}.
      sizes: all sizes and options of the tower, its `name` among them.
      channels: how many channels its images have.
      image_size: the side of its images in pixels.
      mean_and_std: mean and deviation of the grey values from 0 to 1, of all channels or of each;
        None if each image is scaled to mean 0 and variance 1 by itself.

    Raises:
      UserError: neither timm nor torchvision can build the tower.
    """
    from safetensors.numpy import save

    kind = "resnet" if "widths" in sizes else "vit"
    if kind == "resnet":
        tower = describe_resnet(sizes, channels)
    else:
        _check_grid(variables, sizes, image_size)
        tower = describe_vit(sizes, channels, image_size)
    arrays = name_arrays(variables, kind)
    mean, std = (
        np.broadcast_to(np.asarray(value, float), channels).tolist()
        for value in mean_and_std or (0.0, 1.0)
    )
    side = sizes.get("resize") or image_size
    config = {
        "architecture": tower.architecture,
        "num_classes": 0,
        "model_args": tower.arguments,
        "pretrained_cfg": {
            "input_size": [channels, side, side],
            "fixed_input_size": kind == "vit",
            "mean": mean,
            "std": std,
            "crop_pct": 1.0,
            "crop_mode": "border",
            "num_classes": 0,
            "first_conv": "conv1" if kind == "resnet" else "patch_embed.proj",
            "classifier": "fc" if kind == "resnet" else "head",
        },
        "plan_jax": {
            "image_size": image_size,
            "channels": "the grey value x from 0 to 1, in each channel",
            "normalise": NORMALISE if mean_and_std else NORMALISE_EACH,
            "resize": RESIZE.format(side=side) if side != image_size else "",
            "torchvision_arguments": tower.torchvision_arguments,
        },
    }
    # The format tells readers that the names and axes are torch's.
    return {
        "model.safetensors": save(arrays, {"format": "pt"}),
        "config.json": json.dumps(config, indent=2).encode() + b"\n",
    }


def _check_grid(variables: Mapping[str, PyTree], sizes: Mapping[str, Any], image_size: int) -> None:
    """Raises UserError if the positions of a ViT are not those of images of this size."""
    grid = image_size // sizes["patch"]
    count = variables["params"]["position"].shape[1] - int(sizes.get("class_token", True))
    if count != grid**2:
        raise UserError(
            f"image tower {sizes['name']} has positions of {count} patches and images of"
            f" {image_size} pixels have {grid**2}, which timm would resize in its own way; set"
            f" data.size to {math.isqrt(count) * sizes['patch']} and save the model again"
        )


# Architectures -----------------------------------------------------------------------------------


def describe_resnet(sizes: Mapping[str, Any], channels: int) -> TorchTower:
    """Returns the ResNet of torchvision and timm that has these sizes.

    Raises:
      UserError: there is none.
    """
    depths, is_bottleneck = tuple(sizes["depths"]), sizes["bottleneck"]
    fixed = {name: sizes.get(name, value) for name, value in RESNET_SIZES.items()}
    fixed["widths"] = tuple(fixed["widths"])  # a list, where a config overrides them
    differences = [f"{name} {x}" for name, x in fixed.items() if x != RESNET_SIZES[name]]
    if (depths, is_bottleneck) not in RESNETS:
        differences.append(f"depths {depths}")
    if sizes.get("position"):
        differences.append("a position embedding")
    dilated = sizes.get("dilated", 0)
    # torchvision dilates bottlenecks only, and timm's other blocks have two different dilations.
    # timm dilates at most two stages.
    if dilated > (2 if is_bottleneck else 0):
        differences.append(f"{dilated} dilated stages")
    if differences:
        raise UserError(
            f"image tower {sizes['name']} has {', '.join(differences)}, which no ResNet of"
            " torchvision or timm has; export programs instead, which need no library of models"
        )
    arguments: dict[str, Any] = {"in_chans": channels}
    torchvision_arguments = {}
    if dilated:
        arguments["output_stride"] = 32 // 2**dilated
        is_dilated = [stage >= 3 - dilated for stage in range(3)]
        torchvision_arguments["replace_stride_with_dilation"] = is_dilated
    if sizes.get("pool") == "mean_max":
        # The mean and the maximum of the last map, one after the other.
        arguments["global_pool"] = "catavgmax"
    return TorchTower(RESNETS[depths, is_bottleneck], arguments, torchvision_arguments)


def describe_vit(sizes: Mapping[str, Any], channels: int, image_size: int) -> TorchTower:
    """Returns the ViT of timm that has these sizes."""
    width = sizes["width"]
    arguments = {
        "img_size": image_size,
        "in_chans": channels,
        "patch_size": sizes["patch"],
        "embed_dim": width,
        "depth": sizes["depth"],
        "num_heads": sizes["heads"],
    }
    architecture = VITS.get(width, VITS[192])
    if sizes.get("layer_scale"):
        architecture = DINOV2S.get(width, DINOV2S[384])
        arguments["init_values"] = sizes["layer_scale"]
    if sizes.get("swiglu"):
        architecture = DINOV2S[1536]  # the only one of timm with this MLP, whatever its width
        arguments.setdefault("init_values", None)
        arguments["mlp_ratio"] = _mlp_ratio(width)
    if sizes.get("registers"):
        arguments |= {"reg_tokens": sizes["registers"], "no_embed_class": True}
    if not sizes.get("class_token", True):
        arguments |= {"class_token": False, "global_pool": "avg", "fc_norm": False}
    return TorchTower(architecture, arguments)


def _mlp_ratio(width: int) -> float:
    """Returns the ratio whose product with `width` timm rounds down to the channels of SwiGLU.

    >>> int(16 * _mlp_ratio(16)), int(1536 * _mlp_ratio(1536))
    (96, 8192)
    """
    # Two halves of two thirds of 4 `width` each, rounded up to a multiple of 8, as in DINOv2.
    channels = 2 * math.ceil(int(4 * width * 2 / 3) / 8) * 8
    ratio = channels / width
    while int(width * ratio) < channels:
        ratio = math.nextafter(ratio, math.inf)
    return ratio


# Names and axes ----------------------------------------------------------------------------------


def name_arrays(variables: Mapping[str, PyTree], kind: str) -> Arrays:
    """Returns the arrays of a tower under torch's names and with its axes, as float32.

    BatchNorm's `num_batches_tracked` is 0. torch reads it only where momentum is None.

    Args:
      variables: the tower's {"params", "batch_stats"}.
      kind: `resnet` or `vit`.
    """
    flat = traverse_util.flatten_dict(dict(variables), sep="/")
    arrays: Arrays = {}
    renamed = _join_qkv({name: np.asarray(flat[name]) for name in flat})
    if "params/registers" in renamed and "params/token" in renamed:
        # Where there are registers, timm has no position for the class token: it is added here.
        position = renamed["params/position"]
        renamed["params/token"] = renamed["params/token"] + position[:, :1]
        renamed["params/position"] = position[:, 1:]
    for name, array in renamed.items():
        key = torch_name(name, kind)
        if name.endswith("/kernel"):
            array = array.transpose(TORCH_AXES[array.ndim])
        arrays[key] = np.ascontiguousarray(array, np.float32)
        if key.endswith(".running_mean"):
            counter = key.replace(".running_mean", ".num_batches_tracked")
            arrays[counter] = np.zeros((), np.int64)
    return arrays


def _join_qkv(arrays: Arrays) -> Arrays:
    """Joins the projections to queries, keys and values to one, as in timm; others stay."""
    joined = {}
    for name, array in arrays.items():
        if "/attention/query/" in name:
            parts = [arrays[name.replace("/query/", f"/{part}/")] for part in ("key", "value")]
            joined[name.replace("/query/", "/qkv/")] = np.concatenate([array, *parts], -1)
        elif not re.search("/attention/(key|value)/", name):
            joined[name] = array
    return joined


def torch_name(name: str, kind: str) -> str:
    """Returns torch's name of an array of a tower: `layouts.translate_name` backwards.

    >>> torch_name("batch_stats/layer3_1/norm_skip/var", "resnet")
    'layer3.1.downsample.1.running_var'

    Raises:
      UserError: a tower of this kind has no such array in torch.
    """
    for pattern, module, module_kind in MODULE_NAMES[kind]:
        # A group of the pattern, as (\d+), is a number like \1 in our name of the module.
        groups = re.findall(r"\([^()]*\)", pattern)
        own_pattern, torch_module = module, pattern.replace(r"\.", ".")
        for number, group in enumerate(groups, 1):
            own_pattern = own_pattern.replace(rf"\{number}", group)
            torch_module = torch_module.replace(group, rf"\{number}", 1)
        for suffix, template in ARRAY_NAMES[module_kind].items():
            if match := re.fullmatch(template.format(own_pattern), name):
                return match.expand(torch_module) + suffix
    raise UserError(
        f"image tower has an array {name}, which no {kind} of torch has; export programs"
    )
