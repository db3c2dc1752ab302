"""Tiny towers' trees and what a published state dict of them would look like."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import traverse_util

from plan_jax.encoders.bert import make_text_tower
from plan_jax.encoders.vision import make_image_tower

LEAVES = {
    "kernel": "weight",
    "scale": "weight",
    "bias": "bias",
    "mean": "running_mean",
    "var": "running_var",
}
BERT = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "norm1": "attention.output.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "norm2": "output.LayerNorm",
}


def shapes(kind, size=32, channels=3, **changes):
    """Shapes of a tiny tower's trees."""
    image = jnp.zeros((1, size, size, channels))
    if kind == "bert":
        tokens = jnp.zeros((1, 4), jnp.int32)
        changes = {"depth": 2, "positions": 16, "vocab": 30} | changes
        tower, inputs = make_text_tower("bert_tiny", dtype=jnp.float32, **changes), (tokens,) * 3
    else:
        changes |= {"bottleneck": True} if kind == "bottleneck" else {}
        name = "vit_tiny" if kind == "vit" else "resnet_tiny"
        changes |= {"depth": changes.get("depth", 2)} if kind == "vit" else {}
        tower, inputs = make_image_tower(name, None, jnp.float32, **changes), (image,)
    held = jax.eval_shape(tower.init, jax.random.key(0), *inputs)
    return {"params": held["params"], "batch_stats": held.get("batch_stats", {})}


def filled(held, seed=0):
    """The same trees with random numbers."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), held)


def published(kind, trees, prefix=""):
    """What the originals' state dict would be, written independently of the tables under test."""
    state = {}
    for name, value in traverse_util.flatten_dict(trees, sep="/").items():
        _, *path, leaf = name.split("/")
        at = path[0].removeprefix("layer") if path else ""
        if leaf == "kernel":
            value = value.T if value.ndim == 2 else np.moveaxis(value, (3, 2), (0, 1))
        leaf = LEAVES.get(leaf, leaf)
        if kind in ("resnet", "bottleneck"):
            module = {"stem": "conv1", "stem_norm": "bn1"}.get(path[0])
            if module is None:
                stage, n = at.split("_")
                part = {"conv_skip": "downsample.0", "norm_skip": "downsample.1"}
                module = f"layer{stage}.{n}." + part.get(path[1], path[1].replace("norm", "bn"))
            if leaf == "running_mean":
                state[f"{prefix}{module}.num_batches_tracked"] = np.zeros((), np.int64)
            key = f"{module}.{leaf}"
        elif kind == "vit":
            alone = {"token": "cls_token", "position": "pos_embed"}
            alone |= {"embed_bias": "patch_embed.proj.bias"}
            blocks = {"qkv": "attn.qkv", "proj": "attn.proj", "fc1": "mlp.fc1", "fc2": "mlp.fc2"}
            if not path:
                key = alone[leaf]
            elif len(path) == 1:
                key = {"embed": "patch_embed.proj"}.get(path[0], path[0]) + f".{leaf}"
            else:
                key = f"blocks.{at}.{blocks.get(path[1], path[1])}.{leaf}"
        elif not path or path[0] == "token":
            word = {"position": "position", "type": "token_type"}.get(leaf, "word")
            key = f"embeddings.{word}_embeddings.weight"
        else:
            inner = "embeddings.LayerNorm" if path[0] == "norm" else ""
            key = (inner or f"encoder.layer.{at}.{BERT[path[1]]}") + f".{leaf}"
        state[prefix + key] = np.ascontiguousarray(value)
    return state


def same(a, b):
    """Trees of one structure, equal to the last bit and float32."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)
    assert all(leaf.dtype == np.float32 for leaf in jax.tree.leaves(a))
