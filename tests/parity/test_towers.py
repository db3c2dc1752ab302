"""Our towers against torchvision, timm and Hugging Face: outputs, gradients, statistics, files."""

import argparse
import os
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from timm.layers import resample_abs_pos_embed
from transformers import BertConfig, BertModel

from plan_jax.encoders.dual_encoder import make_image_tower, make_text_tower
from plan_jax.layers.resize import resize_align_corners
from plan_jax.types import UserError
from plan_jax.weights import load_tower, read_arrays
from plan_jax.weights.convert import resize_bicubic

NEAR = 1e-4  # of the largest entry, float32


@pytest.fixture
def near(record_property, request):
    """Compare arrays by the largest difference over the largest entry; tell the figures."""
    figures = {}

    def compare(name, ours, theirs, limit=NEAR):
        theirs = theirs.detach().numpy() if isinstance(theirs, torch.Tensor) else theirs
        ours = np.asarray(ours)
        assert ours.shape == theirs.shape, name
        off = float(np.abs(ours - theirs).max() / np.abs(theirs).max())
        figures[name] = max(off, figures.get(name, 0.0))
        record_property(name, off)
        assert off < limit, (name, off)

    yield compare
    told = "  ".join(f"{name} {figure:.1e}" for name, figure in figures.items())
    print(f"\n{request.node.name}: {told}")


def stirred(module, apart=0.0):
    """Move every array off its initial value, so that no zero and no one hides a mistake.

    `apart` moves the biases of BatchNorm up and down by turns.
    """
    torch.manual_seed(0)
    for name, value in module.state_dict().items():
        if value.ndim == 1 and value.is_floating_point():
            scale = 0.5 if name.endswith(("running_var", "bn.weight")) else 0.1
            value.add_(scale * torch.rand_like(value))
            if "bn" in name and name.endswith(".bias"):
                value.add_(apart * (1 - 2 * (torch.arange(len(value)) % 2)))
    return module


def settled(model, image):
    """Make the running statistics those of this batch."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(as_torch(image))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def kept(module, path):
    """Save a module's state dict as torch or safetensors; give the path."""
    path = str(path)
    if path.endswith(".safetensors"):
        save_file(module.state_dict(), path)
    else:
        torch.save({"state_dict": module.state_dict(), "epoch": 3}, path)
    return path


def variables(held, tower, path, **more):
    """Load a tower; nothing needs to be said of weights that fit."""
    held = {"params": held["params"], "batch_stats": held.get("batch_stats", {})}
    return load_tower(tower, path, held, log=pytest.fail, **more)


def images(batch, size, seed=0):
    return np.random.default_rng(seed).normal(size=(batch, size, size, 3)).astype(np.float32)


def weights(*shape, seed=1):
    """What a scalar is made of outputs with."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def as_torch(image):
    return torch.from_numpy(np.moveaxis(image, -1, 1).copy()).requires_grad_()


def last(array):
    """Channels last, as we have them."""
    return np.moveaxis(array.detach().numpy(), 1, -1)


def seen_by_torch(model, image):
    """The pooled vector, the map after the third stage, and the image's gradient."""
    held = {}
    model.fc = torch.nn.Identity()
    model.layer3.register_forward_hook(lambda module, given, out: held.update(local=out))
    x = as_torch(image)
    pooled, local = model(x), held["local"]
    scalar = (pooled * torch.from_numpy(weights(*pooled.shape))).sum()
    upon_map = torch.from_numpy(np.moveaxis(weights(*last(local).shape), -1, 1).copy())
    (scalar + (local * upon_map).mean()).backward()
    return pooled.detach().numpy(), last(local), last(x.grad)


def seen_by(module, train):
    """The image's gradient, what is seen and the new statistics, of our trees and an image."""

    def scalar(image, held):
        seen, new = module.apply(held, image, train, mutable=["batch_stats"])
        upon_map = (seen.local * weights(*seen.local.shape)).mean()
        return (seen.pooled * weights(*seen.pooled.shape)).sum() + upon_map, (seen, new)

    return jax.jit(jax.grad(scalar, has_aux=True))


@pytest.mark.parametrize("train", (False, True))
@pytest.mark.parametrize(
    ("name", "size", "dilated"),
    [("resnet50", 64, 0), ("resnet50", 48, 1), ("resnet18", 48, 0), ("resnet18", 96, 0)],
)
def test_resnet(name, size, dilated, train, near, tmp_path):
    options = {"replace_stride_with_dilation": [False, False, True]} if dilated else {}
    image = images(4 if train else 2, size)
    module = make_image_tower(name, None, jnp.float32, dilated=dilated)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(image))
    run = seen_by(module, train)
    # Of a million ReLUs some lie within rounding of their kink, and their image's gradient flips:
    # torch's own in float32 and float64 differ by 3 % (ResNet-50, batch statistics), and by 3e-6
    # with biases that keep all from it. So gradients are compared sharply there, else roughly.
    for case, limit in (("apart", NEAR), ("plain", 0.1)):
        apart = 4.0 if case == "apart" else 0.0
        model = stirred(getattr(torchvision.models, name)(weights=None, **options), apart)
        model = settled(model, image) if apart and not train else model.train(train)
        held = variables(
            shapes, "vision", kept(model, tmp_path / ("r.pth" if train else "r.safetensors"))
        )
        pooled, local, gradient = seen_by_torch(model, image)
        ours, (seen, new) = run(jnp.asarray(image), held)
        near(f"{case} pooled", seen.pooled, pooled)
        near(f"{case} local", seen.local, local)
        near(f"{case} gradient", ours, gradient, limit)
        if train:
            after = variables(shapes, "vision", kept(model, tmp_path / "after.safetensors"))
            trees = (tree["batch_stats"] for tree in (new, after, held))
            for ours, theirs, before in zip(*map(jax.tree.leaves, trees), strict=True):
                near(f"{case} statistics", ours, theirs)
                assert np.abs(theirs - before).max() > 0


@pytest.mark.parametrize(("size", "depth", "scan"), [(224, 12, True), (64, 3, False)])
def test_vit(size, depth, scan, near, tmp_path):
    model = timm.create_model(
        "vit_base_patch16_224", num_classes=0, depth=depth, img_size=size, pretrained=False
    )
    model = stirred(model).eval()
    held = {}
    model.blocks[-1].attn.qkv.register_forward_hook(lambda m, x, out: held.update(qkv=out))
    image = images(1 if size == 224 else 2, size)
    x = as_torch(image)
    tokens = model.forward_features(x)
    (tokens * torch.from_numpy(weights(*tokens.shape))).sum().backward()
    q, k, _ = held["qkv"].reshape(*tokens.shape[:2], 3, 12, 64).permute(2, 0, 3, 1, 4)
    attention = (q[:, :, :1] @ k.transpose(-1, -2) / 8).softmax(-1).mean(1)[:, 0, 1:]

    module = make_image_tower("vit_b16", None, jnp.float32, depth=depth, scan=scan)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(image))
    params = variables(shapes, "vision", kept(model, tmp_path / "vit.safetensors"))

    @jax.jit
    def run(params, image):
        def scalar(x):
            seen = module.apply(params, x)
            flat = seen.local.reshape(len(x), -1, 768)
            both = jnp.concatenate([seen.pooled[:, None], flat], 1)
            return (both * weights(*both.shape)).sum(), (both, seen)

        return jax.grad(scalar, has_aux=True)(image)

    gradient, (both, seen) = run(params, jnp.asarray(image))
    near("tokens", both, tokens)
    near("pooled", seen.pooled, model.forward_head(tokens))
    near("attention", seen.attention, attention)
    near("gradient", gradient, last(x.grad))


def texts(batch, length, vocab, seed=0):
    """Random pieces, each text of another length, the rest padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocab, (batch, length))
    for row in range(batch):
        tokens[row, length - 3 * row :] = 0
    return tokens.astype(np.int32)


def read_by_us(module, held, tokens):
    """Hidden states, the first, its attention, and what the pieces' rows feel."""
    real = tokens > 0
    own_word = np.where(real, np.arange(tokens.shape[1]), -1).astype(np.int32)
    sentence = np.where(real, 0, -1).astype(np.int32)

    @jax.jit
    def run(held, *inputs):
        def scalar(rows):
            params = held["params"] | {"token": {"embedding": rows}}
            out = module.apply({"params": params}, *inputs)
            upon = (out.words * weights(*out.words.shape)).sum()
            return upon + (out.pooled * weights(*out.pooled.shape)).sum(), out

        return jax.grad(scalar, has_aux=True)(held["params"]["token"]["embedding"])

    return run(held, *map(jnp.asarray, (tokens, own_word, sentence)))


@pytest.mark.parametrize(
    ("name", "length", "scan"), [("bert_base", 24, True), ("bert_small", 40, False)]
)
def test_bert(name, length, scan, near, tmp_path):
    module = make_text_tower(name, 500, jnp.float32, scan=scan)
    config = BertConfig(
        vocab_size=500,
        hidden_size=module.width,
        num_hidden_layers=module.depth,
        num_attention_heads=module.heads,
        intermediate_size=4 * module.width,
        attn_implementation="eager",
    )
    model = stirred(BertModel(config)).eval()
    model.save_pretrained(tmp_path)
    tokens = texts(3, length, 500)
    real = tokens > 0
    out = model(
        torch.from_numpy(tokens).long(), torch.from_numpy(real).long(), output_attentions=True
    )
    hidden = out.last_hidden_state * torch.from_numpy(real)[..., None]
    upon = (hidden * torch.from_numpy(weights(*hidden.shape))).sum()
    pooled = hidden[:, 0]
    (upon + (pooled * torch.from_numpy(weights(*pooled.shape))).sum()).backward()

    zeros = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), zeros, zeros, zeros)
    held = variables(shapes, "text", str(tmp_path), num_heads=module.heads)
    gradient, ours = read_by_us(module, held, tokens)
    near("hidden", ours.words, hidden)
    near("pooled", ours.pooled, pooled)
    near("attention", ours.attention, out.attentions[-1][:, :, 0].mean(1))
    near("gradient", gradient, model.embeddings.word_embeddings.weight.grad)


@pytest.mark.parametrize(("old", "new"), [(14, 19), (14, 7), (4, 9)])
def test_grids_are_scaled_as_torch_and_nearly_as_timm_do(old, new, near):
    grid = weights(old, old, 8)
    x = torch.from_numpy(np.moveaxis(grid, -1, 0)[None].copy())
    scaled = torch.nn.functional.interpolate(x, (new, new), mode="bicubic", align_corners=False)
    near("bicubic", resize_bicubic(grid, new), last(scaled)[0])
    position = torch.from_numpy(grid.reshape(1, old * old, 8))
    told = {"new_size": [new, new], "num_prefix_tokens": 0, "verbose": False}
    plain = resample_abs_pos_embed(position, antialias=False, **told)
    near("timm", resize_bicubic(grid, new).reshape(1, -1, 8), plain)
    smooth = resample_abs_pos_embed(position, antialias=True, **told).numpy().reshape(new, new, 8)
    off = np.abs(resize_bicubic(grid, new) - smooth).max() / np.abs(smooth).max()
    print(f"\ntimm with antialias, {old} to {new}: {off:.1e}")


@pytest.mark.parametrize(("old", "new"), [(224, 299), (40, 32)])
def test_images_are_scaled_as_torch_does(old, new, near):
    image = images(1, old)
    up = torch.nn.Upsample(size=(new, new), mode="bilinear", align_corners=True)(as_torch(image))
    near("resize", resize_align_corners(jnp.asarray(image), (new, new)), last(up))


class Evil:
    """A pickle that runs a command when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_files_that_are_more_than_tensors_or_less(tmp_path):
    marker, path = tmp_path / "it-ran", tmp_path / "weights.pth"
    tensors = {"conv1.weight": torch.ones(2)}
    for write in (
        lambda: path.write_bytes(pickle.dumps(Evil(marker), 2)),
        lambda: torch.save({"state_dict": tensors, "more": Evil(marker)}, path),
        lambda: torch.save({"model": tensors, "args": argparse.Namespace(lr=1)}, path),
    ):
        write()
        with pytest.raises(UserError) as caught:
            read_arrays(str(path))
        assert not marker.exists()
        assert "contain more than tensors" in str(caught.value)
        assert "save its state dict alone" in str(caught.value) and "\n" not in str(caught.value)
    torch.save(tensors, path)
    whole = path.read_bytes()
    for damaged in (whole[:-40], b"hello", b"", pickle.dumps(Evil(marker), 4)):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="damaged or not a torch file") as caught:
            read_arrays(str(path))
        assert not marker.exists() and "\n" not in str(caught.value)
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="hold no arrays"):
        read_arrays(str(path))


def test_training_checkpoints_and_half_precision(tmp_path):
    tensors = {"a": torch.full((2,), 1.5, dtype=torch.bfloat16), "n": torch.tensor(3)}
    for wrapped in ({"state_dict": tensors, "lr": 1.0}, {"model": tensors, "args": {}}, tensors):
        path = tmp_path / "last.ckpt"
        torch.save(wrapped, path)
        state = read_arrays(str(path))
        assert set(state) == {"a", "n"} and state["a"].dtype == np.float32
        assert state["a"].tolist() == [1.5, 1.5]
