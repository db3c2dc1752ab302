"""Our towers against torchvision, timm and transformers: outputs, gradients, statistics, files."""

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

TOLERANCE = 1e-4  # relative to the largest entry, in float32


@pytest.fixture
def assert_near(record_property, request):
    """Returns a function that compares arrays, and prints the errors at the end of a test.

    Errors are largest differences, relative to the largest entry.
    """
    errors = {}

    def compare(name, actual, expected, tolerance=TOLERANCE):
        expected = expected.detach().numpy() if isinstance(expected, torch.Tensor) else expected
        actual = np.asarray(actual)
        assert actual.shape == expected.shape, name
        error = float(np.abs(actual - expected).max() / np.abs(expected).max())
        errors[name] = max(error, errors.get(name, 0.0))
        record_property(name, error)
        assert error < tolerance, (name, error)

    yield compare
    summary = "  ".join(f"{name} {error:.1e}" for name, error in errors.items())
    print(f"\n{request.node.name}: {summary}")


def perturb_parameters(module, bias_shift=0.0):
    """Returns the module with its vectors perturbed: exact zeros and ones could hide a mistake.

    `bias_shift` is added to and subtracted from the biases of BatchNorm in turns.
    """
    torch.manual_seed(0)
    for name, value in module.state_dict().items():
        if value.ndim == 1 and value.is_floating_point():
            scale = 0.5 if name.endswith(("running_var", "bn.weight")) else 0.1
            value.add_(scale * torch.rand_like(value))
            if "bn" in name and name.endswith(".bias"):
                value.add_(bias_shift * (1 - 2 * (torch.arange(len(value)) % 2)))
    return module


def set_running_statistics(model, image):
    """Returns the model in evaluation mode, with the statistics of this batch as running ones."""
    norms = [m for m in model.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    model.train()(to_torch(image))
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


def save_module(module, path):
    """Saves a module's state dict in the format of the path's suffix; returns the path."""
    path = str(path)
    if path.endswith(".safetensors"):
        save_file(module.state_dict(), path)
    else:
        torch.save({"state_dict": module.state_dict(), "epoch": 3}, path)
    return path


def load_variables(shapes, tower, path, **options):
    """Returns the loaded tower; any message, such as one about missing weights, is a failure."""
    template = {"params": shapes["params"], "batch_stats": shapes.get("batch_stats", {})}
    return load_tower(tower, path, template, log=pytest.fail, **options)


def draw_images(batch, size):
    """Returns random normalised images as Float32[batch size size 3]."""
    return draw_normal(batch, size, size, 3, seed=0)


def draw_normal(*shape, seed=1):
    """Returns standard normal numbers as Float32[shape]."""
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def to_torch(image):
    """Returns images with channels first, as a torch tensor that has a gradient."""
    return torch.from_numpy(np.moveaxis(image, -1, 1).copy()).requires_grad_()


def channels_last(array):
    """Returns a torch tensor as an array with channels last."""
    return np.moveaxis(array.detach().numpy(), 1, -1)


def run_torch_resnet(model, image):
    """Returns the pooled vector, the map after the third stage, and the image's gradient.

    The gradient is that of a randomly weighted sum of both outputs.
    """
    outputs = {}
    model.fc = torch.nn.Identity()
    model.layer3.register_forward_hook(lambda module, inputs, output: outputs.update(local=output))
    x = to_torch(image)
    pooled, local = model(x), outputs["local"]
    pooled_term = (pooled * torch.from_numpy(draw_normal(*pooled.shape))).sum()
    map_weights = np.moveaxis(draw_normal(*channels_last(local).shape), -1, 1)
    map_term = (local * torch.from_numpy(map_weights.copy())).mean()
    (pooled_term + map_term).backward()
    return pooled.detach().numpy(), channels_last(local), channels_last(x.grad)


def make_gradient_function(module, train):
    """Returns a function of an image and variables, with the same weighted sum as for torch.

    It computes the image's gradient, the output and the new statistics.
    """

    def weighted_sum(image, variables):
        output, new_stats = module.apply(variables, image, train, mutable=["batch_stats"])
        map_term = (output.local * draw_normal(*output.local.shape)).mean()
        pooled_term = (output.pooled * draw_normal(*output.pooled.shape)).sum()
        return pooled_term + map_term, (output, new_stats)

    return jax.jit(jax.grad(weighted_sum, has_aux=True))


@pytest.mark.parametrize("train", (False, True))
@pytest.mark.parametrize(
    ("name", "size", "dilated"),
    [("resnet50", 64, 0), ("resnet50", 48, 1), ("resnet18", 48, 0), ("resnet18", 96, 0)],
)
def test_resnet(name, size, dilated, train, assert_near, tmp_path):
    options = {"replace_stride_with_dilation": [False, False, True]} if dilated else {}
    image = draw_images(4 if train else 2, size)
    module = make_image_tower(name, None, jnp.float32, dilated=dilated)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(image))
    run = make_gradient_function(module, train)
    # Of a million ReLUs some lie within rounding of their kink, and the image's gradient flips:
    # torch's own in float32 and float64 differ by 3 % (ResNet-50, batch statistics). They differ
    # by 3e-6 with biases that keep all ReLUs off the kink, so only there is the tolerance small.
    for case, bias_shift, tolerance in (("shifted", 4.0, TOLERANCE), ("plain", 0.0, 0.1)):
        model = getattr(torchvision.models, name)(weights=None, **options)
        model = perturb_parameters(model, bias_shift)
        if bias_shift and not train:
            model = set_running_statistics(model, image)
        else:
            model = model.train(train)
        path = save_module(model, tmp_path / ("r.pth" if train else "r.safetensors"))
        variables = load_variables(shapes, "vision", path)
        pooled, local, expected_gradient = run_torch_resnet(model, image)
        gradient, (output, new_stats) = run(jnp.asarray(image), variables)
        assert_near(f"{case} pooled", output.pooled, pooled)
        assert_near(f"{case} local", output.local, local)
        assert_near(f"{case} gradient", gradient, expected_gradient, tolerance)
        if train:
            path = save_module(model, tmp_path / "after.safetensors")
            expected_stats = load_variables(shapes, "vision", path)
            trees = (tree["batch_stats"] for tree in (new_stats, expected_stats, variables))
            for actual, expected, before in zip(*map(jax.tree.leaves, trees), strict=True):
                assert_near(f"{case} statistics", actual, expected)
                assert np.abs(expected - before).max() > 0


@pytest.mark.parametrize(("size", "depth", "scan"), [(224, 12, True), (64, 3, False)])
def test_vit(size, depth, scan, assert_near, tmp_path):
    model = timm.create_model(
        "vit_base_patch16_224", num_classes=0, depth=depth, img_size=size, pretrained=False
    )
    model = perturb_parameters(model).eval()
    outputs = {}
    last_qkv = model.blocks[-1].attn.qkv
    last_qkv.register_forward_hook(lambda module, inputs, output: outputs.update(qkv=output))
    image = draw_images(1 if size == 224 else 2, size)
    x = to_torch(image)
    tokens = model.forward_features(x)
    (tokens * torch.from_numpy(draw_normal(*tokens.shape))).sum().backward()
    q, k, _ = outputs["qkv"].reshape(*tokens.shape[:2], 3, 12, 64).permute(2, 0, 3, 1, 4)
    attention = (q[:, :, :1] @ k.transpose(-1, -2) / 8).softmax(-1).mean(1)[:, 0, 1:]

    module = make_image_tower("vit_b16", None, jnp.float32, depth=depth, scan=scan)
    shapes = jax.eval_shape(module.init, jax.random.key(0), jnp.asarray(image))
    params = load_variables(shapes, "vision", save_module(model, tmp_path / "vit.safetensors"))

    @jax.jit
    def run(params, image):
        def weighted_sum(x):
            output = module.apply(params, x)
            patches = output.local.reshape(len(x), -1, 768)
            tokens = jnp.concatenate([output.pooled[:, None], patches], 1)
            return (tokens * draw_normal(*tokens.shape)).sum(), (tokens, output)

        return jax.grad(weighted_sum, has_aux=True)(image)

    gradient, (actual_tokens, output) = run(params, jnp.asarray(image))
    assert_near("tokens", actual_tokens, tokens)
    assert_near("pooled", output.pooled, model.forward_head(tokens))
    assert_near("attention", output.attention, attention)
    assert_near("gradient", gradient, channels_last(x.grad))


def draw_tokens(batch, length, vocab, seed=0):
    """Returns random pieces; each text is 3 pieces shorter than the one before, then padding."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(1, vocab, (batch, length))
    for row in range(batch):
        tokens[row, length - 3 * row :] = 0
    return tokens.astype(np.int32)


def run_text_tower(module, variables, tokens):
    """Returns the gradient of the table of embeddings, and the output.

    Each piece is a word of its own, so that `words` are the hidden states.
    """
    is_real = tokens > 0
    word_index = np.where(is_real, np.arange(tokens.shape[1]), -1).astype(np.int32)
    sentence = np.where(is_real, 0, -1).astype(np.int32)

    @jax.jit
    def run(variables, *inputs):
        def weighted_sum(embedding):
            params = variables["params"] | {"token": {"embedding": embedding}}
            output = module.apply({"params": params}, *inputs)
            words_term = (output.words * draw_normal(*output.words.shape)).sum()
            pooled_term = (output.pooled * draw_normal(*output.pooled.shape)).sum()
            return words_term + pooled_term, output

        return jax.grad(weighted_sum, has_aux=True)(variables["params"]["token"]["embedding"])

    return run(variables, *map(jnp.asarray, (tokens, word_index, sentence)))


@pytest.mark.parametrize(
    ("name", "length", "scan"), [("bert_base", 24, True), ("bert_small", 40, False)]
)
def test_bert(name, length, scan, assert_near, tmp_path):
    module = make_text_tower(name, 500, jnp.float32, scan=scan)
    config = BertConfig(
        vocab_size=500,
        hidden_size=module.width,
        num_hidden_layers=module.depth,
        num_attention_heads=module.heads,
        intermediate_size=4 * module.width,
        attn_implementation="eager",
    )
    model = perturb_parameters(BertModel(config)).eval()
    model.save_pretrained(tmp_path)
    tokens = draw_tokens(3, length, 500)
    ids, is_real = torch.from_numpy(tokens).long(), torch.from_numpy(tokens > 0)
    expected = model(ids, is_real.long(), output_attentions=True)
    hidden = expected.last_hidden_state * is_real[..., None]
    pooled = hidden[:, 0]
    hidden_term = (hidden * torch.from_numpy(draw_normal(*hidden.shape))).sum()
    pooled_term = (pooled * torch.from_numpy(draw_normal(*pooled.shape))).sum()
    (hidden_term + pooled_term).backward()

    zeros = jnp.zeros((1, 4), jnp.int32)
    shapes = jax.eval_shape(module.init, jax.random.key(0), zeros, zeros, zeros)
    variables = load_variables(shapes, "text", str(tmp_path), num_heads=module.heads)
    gradient, actual = run_text_tower(module, variables, tokens)
    assert_near("hidden", actual.words, hidden)
    assert_near("pooled", actual.pooled, pooled)
    assert_near("attention", actual.attention, expected.attentions[-1][:, :, 0].mean(1))
    assert_near("gradient", gradient, model.embeddings.word_embeddings.weight.grad)


@pytest.mark.parametrize(("old", "new"), [(14, 19), (14, 7), (4, 9)])
def test_grids_are_resized_as_by_torch_and_nearly_as_by_timm(old, new, assert_near):
    grid = draw_normal(old, old, 8)
    x = torch.from_numpy(np.moveaxis(grid, -1, 0)[None].copy())
    resized = torch.nn.functional.interpolate(x, (new, new), mode="bicubic", align_corners=False)
    assert_near("bicubic", resize_bicubic(grid, new), channels_last(resized)[0])
    position = torch.from_numpy(grid.reshape(1, old * old, 8))
    options = {"new_size": [new, new], "num_prefix_tokens": 0, "verbose": False}
    plain = resample_abs_pos_embed(position, antialias=False, **options)
    assert_near("timm", resize_bicubic(grid, new).reshape(1, -1, 8), plain)
    # With antialiasing timm's values differ by design: the difference is only printed.
    smooth = resample_abs_pos_embed(position, antialias=True, **options).numpy()
    smooth = smooth.reshape(new, new, 8)
    error = np.abs(resize_bicubic(grid, new) - smooth).max() / np.abs(smooth).max()
    print(f"\ntimm with antialias, {old} to {new}: {error:.1e}")


@pytest.mark.parametrize(("old", "new"), [(224, 299), (40, 32)])
def test_images_are_resized_as_by_torch(old, new, assert_near):
    image = draw_images(1, old)
    upsample = torch.nn.Upsample(size=(new, new), mode="bilinear", align_corners=True)
    expected = channels_last(upsample(to_torch(image)))
    assert_near("resize", resize_align_corners(jnp.asarray(image), (new, new)), expected)


class MaliciousPickle:
    """A pickle that runs a command when it is read."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_files_with_code_or_without_arrays_are_refused(tmp_path):
    marker, path = tmp_path / "it-ran", tmp_path / "weights.pth"
    tensors = {"conv1.weight": torch.ones(2)}
    for write in (
        lambda: path.write_bytes(pickle.dumps(MaliciousPickle(marker), 2)),
        lambda: torch.save({"state_dict": tensors, "more": MaliciousPickle(marker)}, path),
        lambda: torch.save({"model": tensors, "args": argparse.Namespace(lr=1)}, path),
    ):
        write()
        with pytest.raises(UserError) as error:
            read_arrays(str(path))
        assert not marker.exists()
        assert "contain more than tensors" in str(error.value)
        assert "save its state dict alone" in str(error.value) and "\n" not in str(error.value)
    torch.save(tensors, path)
    intact_content = path.read_bytes()
    for damaged_content in (
        intact_content[:-40],
        b"hello",
        b"",
        pickle.dumps(MaliciousPickle(marker), 4),
    ):
        path.write_bytes(damaged_content)
        with pytest.raises(UserError, match="damaged or not a torch file") as error:
            read_arrays(str(path))
        assert not marker.exists() and "\n" not in str(error.value)
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="hold no arrays"):
        read_arrays(str(path))


def test_training_checkpoints_and_half_precision_are_read(tmp_path):
    tensors = {"a": torch.full((2,), 1.5, dtype=torch.bfloat16), "n": torch.tensor(3)}
    for content in ({"state_dict": tensors, "lr": 1.0}, {"model": tensors, "args": {}}, tensors):
        path = tmp_path / "last.ckpt"
        torch.save(content, path)
        arrays = read_arrays(str(path))
        assert set(arrays) == {"a", "n"} and arrays["a"].dtype == np.float32
        assert arrays["a"].tolist() == [1.5, 1.5]
