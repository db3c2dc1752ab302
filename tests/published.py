"""Builds small towers, and the state dicts that the originals would publish of them."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from plan_jax.encoders.dual_encoder import make_image_tower, make_text_tower

TORCH_LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
QKV = ("query", "key", "value")
BERT_MODULES = {
    "attention/query": "attention.self.query",
    "attention/key": "attention.self.key",
    "attention/value": "attention.self.value",
    "attention/out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm2": "output.LayerNorm",
}


# transformers' DINOv2: our modules and arrays of a layer, and those beside the layers.
DINOV2_LAYER = {
    **{f"attention/{part}": f"attention.attention.{part}" for part in QKV},
    "attention/out": "attention.output.dense",
    "fc1": "mlp.fc1",
    "fc2": "mlp.fc2",
    "scale1": "layer_scale1.lambda1",
    "scale2": "layer_scale2.lambda1",
}
DINOV2_TOP_LEVEL = {
    "token": "embeddings.cls_token",
    "registers": "embeddings.register_tokens",
    "position": "embeddings.position_embeddings",
    "embed_bias": "embeddings.patch_embeddings.projection.bias",
    "embed": "embeddings.patch_embeddings.projection",
    "norm": "layernorm",
}


def tower_template(kind, size=32, channels=3, **options):
    """Returns the parameters and batch statistics of a small tower, as shapes."""
    image = jnp.zeros((1, size, size, channels))
    if kind == "bert":
        tokens = jnp.zeros((1, 4), jnp.int32)
        options = {"depth": 2, "positions": 16, "vocab_size": 30} | options
        tower, inputs = make_text_tower("bert_tiny", dtype=jnp.float32, **options), (tokens,) * 3
    else:
        options |= {"bottleneck": True} if kind == "bottleneck" else {}
        names = {"vit": "vit_tiny", "vit_dinov2": "vit_tiny14"}
        name = names.get(kind, "resnet_tiny")
        options |= {"depth": options.get("depth", 2)} if kind in names else {}
        tower, inputs = make_image_tower(name, None, jnp.float32, **options), (image,)
    variables = jax.eval_shape(tower.init, jax.random.key(0), *inputs)
    return {"params": variables["params"], "batch_stats": variables.get("batch_stats", {})}


def fill_randomly(template, seed=0):
    """Returns trees of the template's shapes, filled with normally distributed numbers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), template)


def publish(kind, trees, prefix=""):
    """Returns the state dict in which the original stores `trees`.

    Names and axes are written here once more, independently of the tables under test.
    """
    state_dict, qkv_parts = {}, {}
    for name, value in traverse_util.flatten_dict(trees, sep="/").items():
        _, *path, leaf = name.split("/")
        index = path[0].removeprefix("layer") if path else ""
        if leaf == "kernel":
            value = value.T if value.ndim == 2 else np.moveaxis(value, (3, 2), (0, 1))
        leaf = TORCH_LEAVES.get(leaf, leaf)
        if kind in ("resnet", "bottleneck"):
            module = {"stem": "conv1", "stem_norm": "bn1"}.get(path[0])
            if module is None:
                stage, block = index.split("_")
                skip = {"conv_skip": "downsample.0", "norm_skip": "downsample.1"}
                module = f"layer{stage}.{block}."
                module += skip.get(path[1], path[1].replace("norm", "bn"))
            if leaf == "running_mean":
                state_dict[f"{prefix}{module}.num_batches_tracked"] = np.zeros((), np.int64)
            key = f"{module}.{leaf}"
        elif kind == "vit":
            top_level = {"token": "cls_token", "position": "pos_embed"}
            top_level |= {"registers": "register_tokens"}
            top_level |= {"embed_bias": "patch_embed.proj.bias"}
            modules = {"attention/out": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
            # timm has one projection to queries, keys and values, in this order.
            modules |= dict.fromkeys([f"attention/{part}" for part in QKV], "attn.qkv")
            if not path:
                key = top_level[leaf]
            elif leaf in ("scale1", "scale2"):
                key = f"blocks.{index}.ls{leaf[-1]}.gamma"
            elif len(path) == 1:
                key = {"embed": "patch_embed.proj"}.get(path[0], path[0]) + f".{leaf}"
            else:
                module = "/".join(path[1:])
                key = f"blocks.{index}.{modules.get(module, module)}.{leaf}"
                if path[-1] in QKV:
                    qkv_parts.setdefault(key, {})[path[-1]] = value
                    value = np.concatenate([qkv_parts[key].get(part, value[:0]) for part in QKV])
        elif kind == "vit_dinov2":
            module = "/".join(path[1:])
            if index.isdigit():
                name = DINOV2_LAYER.get(module or leaf, module)
                key = f"encoder.layer.{index}.{name}" + (f".{leaf}" if module else "")
            else:
                key = DINOV2_TOP_LEVEL[path[0] if path else leaf] + (f".{leaf}" if path else "")
        elif not path or path[0] == "token":
            table = {"position": "position", "type": "token_type"}.get(leaf, "word")
            key = f"embeddings.{table}_embeddings.weight"
        else:
            module = "embeddings.LayerNorm" if path[0] == "norm" else ""
            key = (
                module or f"encoder.layer.{index}.{BERT_MODULES['/'.join(path[1:])]}"
            ) + f".{leaf}"
        state_dict[prefix + key] = np.ascontiguousarray(value)
    return state_dict


def assert_identical(actual, expected):
    """Asserts that two trees have the same structure and values, bit for bit, and are float32."""
    assert jax.tree.structure(actual) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(actual))
