"""What a training step computes in bfloat16: read from the operations of the traced step."""

import dataclasses
from functools import partial

import features
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax
from jax.extend import core
from test_train import make_config, random_batch

from plan_jax.encoders import dual_encoder
from plan_jax.layers.batch_norm import batch_statistics
from plan_jax.layers.dense import Dense, add_parameter, scale_by_parameter
from plan_jax.layers.pooling import max_pixel
from plan_jax.layers.resize import resize_align_corners
from plan_jax.layers.transformer import attention_weights, exact_gelu, swiglu
from plan_jax.methods import METHODS
from plan_jax.model import build_components
from plan_jax.state import init_state
from plan_jax.step import make_step

KEY = jax.random.key(0)
PAIRS = 16
# Operations that lose digits in bfloat16: sums of many terms, and functions that amplify rounding.
UNSAFE = {
    *("reduce_sum", "cumsum", "cumlogsumexp", "reduce_prod", "reduce_window_sum", "scatter-add"),
    *("exp", "exp2", "expm1", "log", "log1p", "logistic", "tanh", "erf", "erf_inv"),
    *("div", "rsqrt", "sqrt", "square", "pow", "integer_pow", "sin", "cos"),
}
# Every device adds the terms of a product in float32; only the result is rounded.
PRODUCTS = {"dot_general", "conv_general_dilated"}


def list_equations(jaxpr):
    """Yields all operations of a program, those of its functions and loops included."""
    programs = (core.Jaxpr, core.ClosedJaxpr)
    for equation in jaxpr.eqns:
        yield equation
        values = list(equation.params.values())
        for value in jax.tree.leaves(values, is_leaf=lambda x: isinstance(x, programs)):
            if isinstance(value, programs):
                yield from list_equations(getattr(value, "jaxpr", value))


def list_narrow(function, *arguments):
    """Returns the names of a function's operations that read or write bfloat16."""
    return {
        equation.primitive.name
        for equation in list_equations(jax.make_jaxpr(function)(*arguments).jaxpr)
        for variable in (*equation.invars, *equation.outvars)
        if getattr(variable.aval, "dtype", None) == jnp.bfloat16
    }


def list_float_types(tree):
    """Returns the types of a tree's floating leaves."""
    types = {np.dtype(leaf.dtype) for leaf in jax.tree.leaves(tree)}
    return {dtype for dtype in types if jnp.issubdtype(dtype, jnp.floating)}


def prepare(method):
    """Returns a step in bfloat16, and the shapes of its state and batch."""
    hyper = {"num_layers": 1, "num_heads": 2, "hidden_dim": 8} if method == "asg" else {}
    changes = {"method": method, "hyper": hyper, "fine_map": method == "plan"}
    config = make_config(changes | {"dtype": "bfloat16"})
    components = build_components(config)
    batch = random_batch(PAIRS)
    if components.method.REQUIRES:
        *_, texts = features.draw_features(PAIRS, words=batch.text.word_id.shape[1])
        batch = dataclasses.replace(batch, extra=features.draw_extra(texts))
    optimisers = []

    def init():
        names = ["a", "b", "c", "d"]
        state, optimiser = init_state(components, config, batch, names, load_weights=False)
        optimisers.append(optimiser)
        return state

    state = jax.eval_shape(init)  # nothing is compiled
    return make_step(components, optimisers[0], 0.0, None), state, batch, components


@pytest.mark.parametrize("method", METHODS)
def test_a_step_in_bfloat16_adds_and_normalises_in_float32(method):
    step, state, batch, components = prepare(method)
    narrow = list_narrow(step, state, batch)
    assert narrow >= PRODUCTS  # the encoders are in bfloat16
    assert not narrow & UNSAFE
    assert list_float_types((state, *jax.eval_shape(step, state, batch))) == {np.dtype("float32")}
    variables = {"params": state.params["encoders"], "batch_stats": state.batch_stats}
    outputs = jax.eval_shape(components.encoder.apply, variables, batch)
    assert list_float_types(outputs) == {np.dtype("float32")}  # so losses and metrics are, too


def differentiate(tower, *inputs):
    """Returns the loss's gradient and its shapes, for the sum of all outputs of a tower."""
    variables = jax.eval_shape(tower.init, KEY, *inputs)

    def loss(params, *inputs):
        state = {**variables, "params": params}
        if "batch_stats" in variables:
            state["batch_stats"] = jax.tree.map(lambda x: jnp.ones(x.shape), state["batch_stats"])
        rngs = {"dropout": KEY}
        output, _ = tower.apply(state, *inputs, True, rngs=rngs, mutable=["batch_stats"])
        return sum(leaf.astype(jnp.float32).sum() for leaf in jax.tree.leaves(output))

    return jax.grad(loss), variables["params"]


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("resnet_tiny", {"pool": "mean_max", "position": True, "remat": True}),
        ("resnet_tiny", {"stem": "conv7", "resize": 56, "bottleneck": True}),
        ("vit_tiny14", {"registers": 2, "swiglu": True}),
        ("vit_tiny14", {"class_token": False, "scan": True, "depth": 3}),
    ],
)
def test_image_towers(name, sizes):
    tower = dual_encoder.make_image_tower(name, None, jnp.bfloat16, **sizes)
    images = jnp.zeros((4, 28, 28, 1))
    gradient, params = differentiate(tower, images)
    # The gradient of maximum pooling adds at most four terms.
    assert not list_narrow(gradient, params, images) & UNSAFE
    assert list_float_types(jax.eval_shape(gradient, params, images)) == {np.dtype("float32")}


@pytest.mark.parametrize(
    "sizes",
    [
        {"pool": "cls", "sum_last_layers": 2, "depth": 3, "dropout": 0.1},
        {"pool": "mean", "scan": True, "depth": 3},
        {"pool": "attention", "remat": True},
        {"pool": "pooler"},
    ],
)
def test_text_towers(sizes):
    tower = dual_encoder.make_text_tower("bert_tiny", 99, jnp.bfloat16, **sizes)
    text = random_batch(4).text
    inputs = text.tokens, text.word_index, text.sentence
    gradient, params = differentiate(tower, *inputs)
    narrow = list_narrow(gradient, params, *inputs)
    # Dropout divides by a constant.
    assert not narrow & UNSAFE - ({"div"} if "dropout" in sizes else set())


def test_the_layers_add_what_bfloat16_cannot_hold():
    def loss(function, parameter, x):
        return function(x, parameter).astype(jnp.float32).sum()

    x, parameter = jnp.ones((1000, 3), jnp.bfloat16), jnp.ones(3)
    for function in (add_parameter, scale_by_parameter):
        gradient = partial(jax.grad(loss, 1), function)
        np.testing.assert_array_equal(gradient(parameter, x), [1000.0] * 3)
        assert "reduce_sum" not in list_narrow(gradient, parameter, x)
        assert function(x, parameter).dtype == jnp.bfloat16


def test_a_dense_layer_is_that_of_flax():
    x = jax.random.normal(KEY, (5, 7, 6))
    for use_bias in (False, True):
        ours, theirs = Dense(4, use_bias), nn.Dense(4, use_bias)
        variables = theirs.init(KEY, x)
        assert jax.tree.all(jax.tree.map(np.array_equal, variables, ours.init(KEY, x)))
        np.testing.assert_array_equal(ours.apply(variables, x), theirs.apply(variables, x))


def test_attention_weights_round_no_logits():
    query, key = jax.random.normal(KEY, (2, 2, 5, 2, 16)) * 5
    query, key = query.astype(jnp.bfloat16), key.astype(jnp.bfloat16)
    expected = attention_weights(query.astype(jnp.float32), key.astype(jnp.float32))
    np.testing.assert_allclose(attention_weights(query, key), expected, atol=1e-5)


def test_resizing_in_bfloat16_rounds_once():
    x = jax.random.uniform(KEY, (2, 7, 9, 3), minval=1.0, maxval=2.0).astype(jnp.bfloat16)
    expected = resize_align_corners(x.astype(jnp.float32), (12, 20))
    actual = resize_align_corners(x, (12, 20)).astype(jnp.float32)
    np.testing.assert_allclose(actual, expected, atol=2**-8 + 1e-6)  # half a digit between 1 and 2


def test_the_check_sees_sums_in_bfloat16():
    x = jnp.ones((4, 3), jnp.bfloat16)
    unsafe = {
        "reduce_sum": jax.grad(lambda bias, x: (x + bias.astype(x.dtype))[0, 0] * 1.0),
        "exp": lambda bias, x: jax.nn.softmax(x + bias.astype(x.dtype)),
    }
    for name, function in unsafe.items():
        assert name in list_narrow(function, jnp.ones(3), x) & UNSAFE
    for function in (exact_gelu, batch_statistics, lambda x: swiglu(jnp.tile(x, 2))):
        assert not list_narrow(function, x) & UNSAFE
    assert not list_narrow(jax.grad(lambda x: max_pixel(x)[0, 0]), x[:, None, None]) & UNSAFE
    loop = jax.jit(lambda x: lax.map(jnp.exp, x))
    assert "exp" in list_narrow(loop, x)
