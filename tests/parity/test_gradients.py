"""Own gradients inside whole compiled towers: values and gradients are those of XLA's operations.

A gradient that is right for an operation alone can be wrong inside a compiled tower. XLA may
compute an activation twice and round it differently, and then a backward pass that compares floats
finds no match. Hence towers and training steps are compared as a whole, on activations whose means
are far from 0, behind ReLU and BatchNorm in training mode, at sizes that are no powers of two.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import traverse_util
from test_gloria_packed import dense_scores

from plan_jax.data.phantom import draw_study
from plan_jax.encoders.dual_encoder import DualEncoder, make_image_tower, make_text_tower
from plan_jax.layers import cpu
from plan_jax.layers.batch_norm import BatchNorm
from plan_jax.layers.cpu import attention, convolution, layer_norm, product
from plan_jax.methods import gloria, mgca
from plan_jax.types import Batch, MethodContext, TextBatch

KEY = jax.random.key(0)
LIMIT = 1e-3  # of the norm of a parameter's gradient
# The same where activations are rounded differently, so that a ReLU may open or close: when every
# parameter of the step of MGCA changes by 1e-7, XLA's own gradients change by up to 8e-3.
FLIP_LIMIT = 0.03
# What moves all inputs of a BatchNorm alike has a gradient of zero in exact arithmetic: a bias in
# front of it and, but for words of several pieces, the last bias of the text tower. So have keys.
ZERO_GRADIENTS = (
    "head']['fc2']['bias']",
    "['text_tower']['layer1']['norm2']['bias']",
    "['key']['bias']",
)
VOCABULARY = 200


def disable_kernels(monkeypatch):
    """Does what PLAN_JAX_CPU_KERNELS=0 does."""
    for module in (cpu, attention, convolution, layer_norm, product):
        monkeypatch.setattr(module, "is_enabled", lambda: False)


def differentiate_by_xla(monkeypatch):
    """Keeps the kernels' values, and takes the gradients of XLA's operations."""

    def attention_gradients(query, key, value, mask, *rest):
        plain = partial(jax.nn.dot_product_attention, mask=mask)
        return jax.vjp(plain, query, key, value)[1](rest[-1])

    monkeypatch.setattr(attention, "_cpu_backward", attention_gradients)
    monkeypatch.setattr(convolution, "_cpu_gradients", convolution._xla_gradients)
    monkeypatch.setattr(product, "_cpu_gradients", product._xla_gradients)
    monkeypatch.setattr(layer_norm, "_cpu_gradients", layer_norm._xla_gradients)


def draw_images(count, size):
    """Phantoms, whose grey values are smooth and far from 0."""
    return np.stack([draw_study(0, index, size).image for index in range(count)])


def draw_text(pairs, length):
    """Ragged texts of words of one and two pieces, in sentences of seven words; text 0 is full."""
    rng = np.random.default_rng(0)
    num_pieces = np.append(length - 2, rng.integers(length // 4, length - 2, pairs - 1))
    tokens = np.zeros((pairs, length), np.int32)
    word_index = np.full((pairs, length), -1, np.int32)
    word_id, sentence = tokens[:, 2:].copy(), word_index[:, 2:].copy()
    for row, count in enumerate(num_pieces):
        tokens[row, : count + 2] = [2, *rng.integers(5, VOCABULARY, count), 3]
        words = np.maximum(np.arange(count) - 1, 0)  # the first word has two pieces
        word_index[row, 1 : count + 1] = words
        word_id[row, : count - 1] = tokens[row, 2 : count + 1]
        sentence[row, : count - 1] = np.arange(count - 1) // 7
    return TextBatch(tokens=tokens, word_index=word_index, word_id=word_id, sentence=sentence)


def shift_parameters(params):
    """Moves scales off 1 and biases off 0, so that activations have means far from 0.

    The branches of residual blocks get a fifth of their scale, or a random ResNet amplifies
    rounding errors from block to block.
    """
    rng = np.random.default_rng(1)
    flat = traverse_util.flatten_dict(params)
    for path, leaf in flat.items():
        *block, module, name = path if len(path) > 1 else ("", *path)
        if name == "scale":
            last = "norm3" if (*block, "norm3", name) in flat else "norm2"
            is_branch = module == last and "_" in block[-1]  # layer1_0: a block of a ResNet
            flat[path] = leaf * rng.uniform(0.7, 1.4, leaf.shape) * (0.2 if is_branch else 1)
        elif name == "bias" or name.endswith("_bias"):
            flat[path] = leaf + 0.3 + 0.3 * rng.normal(size=leaf.shape)
    return jax.tree.map(partial(jnp.asarray, dtype=jnp.float32), traverse_util.unflatten_dict(flat))


def relative_errors(actual, expected):
    """Returns the norm of the difference of each gradient, as a share of the gradient's norm."""
    whole = np.sqrt(sum(np.sum(grad**2) for grad in expected.values()))
    errors = {}
    for name, grad in expected.items():
        norm = whole if name.endswith(ZERO_GRADIENTS) else np.linalg.norm(grad)
        errors[name] = np.linalg.norm(actual[name] - grad) / norm
    return errors


def compare_gradients(compute, params, arguments, monkeypatch, plain_functions):
    """Compares value and gradients of `compute(params, ...)` with those of XLA's operations.

    First with the gradients of XLA for the same values, then without any kernel. `compute` returns
    a value and other outputs. `plain_functions` are what else has a gradient of its own: module,
    name, and a function that JAX differentiates.
    """

    def make_run():
        # A new function, or jit would return the program that it has.
        run = jax.jit(jax.value_and_grad(partial(compute), has_aux=True))

        def compute_named(params):
            (value, other), grads = run(params, *arguments)
            leaves = jax.tree_util.tree_leaves_with_path(grads)
            grads = {jax.tree_util.keystr(path): np.asarray(x, np.float64) for path, x in leaves}
            return (float(value), jax.tree.map(np.asarray, other)), grads

        return compute_named

    def tell(comparison, errors):
        worst = max(errors, key=errors.__getitem__)
        print(f"{comparison}: {errors[worst]:.1e} of {worst} at most, of {len(errors)}")

    outputs, actual = make_run()(params)
    for setting in plain_functions:
        monkeypatch.setattr(*setting)
    differentiate_by_xla(monkeypatch)
    errors = relative_errors(actual, make_run()(params)[1])
    tell("gradients of XLA for the same values", errors)
    assert max(errors.values()) < LIMIT, errors

    disable_kernels(monkeypatch)
    expected_outputs, expected = make_run()(params)
    for a, b in zip(*map(jax.tree.leaves, (outputs, expected_outputs)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-4 * np.abs(b).max())
    errors = relative_errors(actual, expected)
    tell("no kernel", errors)
    assert max(errors.values()) < FLIP_LIMIT, errors


def test_max_pooling_passes_the_gradient_of_every_window():
    """The smallest input where a largest tap, computed again, had no equal: 4 windows, bias 1."""
    x = jnp.asarray(np.random.default_rng(0).normal(3, 1, (1, 3, 3, 1)), jnp.float32)
    norm = BatchNorm(None)
    variables = norm.init(KEY, x, True)

    def total(params):
        y = norm.apply({**variables, "params": params}, x, True, mutable=["batch_stats"])[0]
        return nn.max_pool(nn.relu(y), (3, 3), (2, 2), [(1, 1), (1, 1)]).sum()

    params = {"scale": jnp.ones(1), "bias": jnp.ones(1)}
    np.testing.assert_allclose(jax.jit(jax.grad(total))(params)["bias"], [4.0])


@pytest.mark.parametrize(
    ("name", "size", "options"),
    [
        ("resnet18", 77, {}),  # a stem of 7x7, max-pooling and Winograd at odd sizes
        ("resnet_small", 90, {"position": True, "pool": "mean_max"}),
        ("vit_small", 104, {"depth": 2}),  # 170 tokens: attention by the kernel
    ],
)
def test_image_towers(name, size, options, monkeypatch):
    tower = make_image_tower(name, None, jnp.float32, **options)
    x = jnp.asarray(draw_images(3, size), jnp.float32) / 255
    variables = jax.jit(tower.init)(KEY, x)
    weights = np.random.default_rng(2).normal(size=(2, 10**5)).astype(np.float32)

    def compute(params, x):
        held = {**variables, "params": params}
        output, updated = tower.apply(held, x, True, mutable=["batch_stats"])
        total = sum(
            jnp.vdot(y, np.resize(w, y.shape)) for y, w in zip(output[:2], weights, strict=True)
        )
        return total, (output.pooled, updated)

    params = shift_parameters(variables["params"])
    compare_gradients(compute, params, (x,), monkeypatch, [])


@pytest.mark.parametrize("block_diagonal", [False, True])
def test_text_towers(block_diagonal, monkeypatch):
    options = {"width": 96, "heads": 4, "depth": 2, "block_diagonal": block_diagonal}
    tower = make_text_tower("bert_small", VOCABULARY, jnp.float32, **options)
    text = draw_text(3, 111)
    assert attention.MIN_TABLE_SIZE < 111 * 111 * 4
    inputs = text.tokens, text.word_index, text.sentence
    variables = jax.jit(tower.init)(KEY, *inputs)
    weights = np.random.default_rng(2).normal(size=(3, 109, 96)).astype(np.float32)

    def compute(params, *inputs):
        output = tower.apply({"params": params}, *inputs)
        return jnp.vdot(output.words, weights) + jnp.sum(output.pooled**3), output

    params = shift_parameters(variables["params"])
    compare_gradients(compute, params, inputs, monkeypatch, [])


def make_step(method, hyper, encoder, batch):
    """Returns the loss of a training step as a function of all parameters, and these."""
    variables = jax.jit(encoder.init)(KEY, batch)
    context = MethodContext(dim=encoder.embed_dim, width=1, tags=None, ema_decay=0.0)
    method_params, memory = method.init(KEY, context, hyper)
    step = jnp.asarray(getattr(hyper, "freeze_prototype_steps", 0))  # nothing is frozen any more

    def compute(params, batch):
        features, updated = encoder.apply(
            {**variables, "params": params["encoders"]}, batch, True, mutable=["batch_stats"]
        )
        value, (metrics, _) = method.loss(
            params["method"], memory, *features, {}, key=KEY, step=step, hyper=hyper
        )
        return value, (metrics, updated)

    return compute, {"encoders": shift_parameters(variables["params"]), "method": method_params}


def make_encoder(vision, **changes):
    settings = {
        "vision": vision,
        "text": {"name": "bert_small", "width": 96, "heads": 4},
        "heads": dict.fromkeys(("image_global", "image_local", "text_global", "text_local"), "mlp"),
        "vocab_size": VOCABULARY,
        "embed_dim": 128,
        "head_hidden_dim": 256,
        "normalisation": "fixed",
        "channels": 3,
        "fine_map": False,
    }
    return DualEncoder(**settings | changes)


def plain_token_losses(images, texts, hyper):
    """MGCA's token losses, differentiated by JAX."""

    def pair_loss(pixels, words, mask, word_weight, patch_weight):
        items = pixels, words, words @ pixels.T
        value = mgca.word_loss(*items, mask, word_weight, hyper)
        return value + mgca.patch_loss(*items, mask, patch_weight, True, hyper)

    unit = mgca.contrastive.l2_normalise
    weights = mgca.word_attention_weights(texts, hyper), mgca.patch_attention_weights(images)
    return jax.vmap(pair_loss)(unit(images.local), unit(texts.local), texts.mask, *weights)


def test_a_step_of_mgca_with_resnet50_at_299_pixels(monkeypatch):
    batch = Batch(image=draw_images(6, 224), text=draw_text(6, 112), extra={})
    encoder = make_encoder({"name": "resnet50", "resize": 299})
    compute, params = make_step(mgca, mgca.Hyper(), encoder, batch)
    plain = [(mgca, "token_losses", plain_token_losses)]
    compare_gradients(compute, params, (batch,), monkeypatch, plain)


@pytest.mark.parametrize("normalise", [False, True])
def test_a_step_of_gloria(normalise, monkeypatch):
    batch = Batch(image=draw_images(5, 76), text=draw_text(5, 40), extra={})
    vision = {"name": "resnet_small", "pool": "mean_max"}
    encoder = make_encoder(vision, normalisation="image", channels=1, embed_dim=24)
    hyper = gloria.Hyper(normalise_attention=normalise)
    compute, params = make_step(gloria, hyper, encoder, batch)
    plain = [(gloria, "local_scores", dense_scores)]
    compare_gradients(compute, params, (batch,), monkeypatch, plain)
