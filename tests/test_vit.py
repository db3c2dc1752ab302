"""ViTs: registers, positions on other grids, a tower without class token, and refused sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from test_resize import interpolate_line

from plan_jax.config import Config
from plan_jax.encoders.dual_encoder import make_image_tower
from plan_jax.encoders.vit import EPSILON, check_patches
from plan_jax.layers.transformer import TransformerLayer, attention_weights
from plan_jax.types import UserError

KEY = jax.random.key(0)


def make_tower(size=56, **options):
    """Returns a small tower of patch 14, variables far from their initial values, and images."""
    tower = make_image_tower("vit_tiny14", None, jnp.float32, **options)
    x = jax.random.normal(KEY, (2, size, size, 1))
    variables = jax.jit(tower.init)(KEY, x)
    keys = iter(jax.random.split(jax.random.key(1), 100))
    variables = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(next(keys), a.shape), variables)
    return tower, variables, x


def encode_patch_by_patch(params, x, num_registers, position):
    """Returns the tokens, in order, and the class token's attention, by a literal computation.

    The last axes of images [B Y X C] are cut into patches in a loop, and the layers run in turn.
    """
    kernel, rows = np.asarray(params["embed"]["kernel"]), []
    for y in range(0, x.shape[1], 14):
        for u in range(0, x.shape[2], 14):
            patch = np.asarray(x[:, y : y + 14, u : u + 14])
            rows.append(np.einsum("byxc,yxce->be", patch, kernel) + params["embed_bias"])
    tokens = [np.tile(params["token"][0], (len(x), 1)) + position[0]]
    tokens += [np.tile(params["registers"][0, n], (len(x), 1)) for n in range(num_registers)]
    tokens += [row + position[1 + n] for n, row in enumerate(rows)]
    tokens = jnp.stack(tokens, 1)
    layer = TransformerLayer(16, 2, 64, epsilon=EPSILON, layer_scale=1.0)
    for n in range(2):
        output = layer.apply({"params": params[f"layer{n}"]}, tokens)
        tokens = output.x
    attended = output.attention
    attention = attention_weights(attended.query, attended.key).mean(1)[:, 0]
    norm = nn.LayerNorm(EPSILON)
    return norm.apply({"params": params["norm"]}, tokens), attention


@pytest.mark.parametrize("num_registers", [0, 3])
def test_registers_stand_between_class_token_and_patches_without_position(num_registers):
    tower, variables, x = make_tower(registers=num_registers)
    params = variables["params"]
    assert ("registers" in params) == (num_registers > 0)
    assert params["position"].shape == (1, 17, 16)
    expected, attention = encode_patch_by_patch(params, x, num_registers, params["position"][0])
    output = jax.jit(tower.apply)(variables, x)
    np.testing.assert_allclose(output.pooled, expected[:, 0], atol=2e-5)
    patches = expected[:, 1 + num_registers :].reshape(2, 4, 4, 16)
    np.testing.assert_allclose(output.local, patches, atol=2e-5)
    np.testing.assert_allclose(output.attention, attention[:, 1 + num_registers :], atol=1e-5)
    assert len(output.stages) == 1 and output.fine is None


@pytest.mark.parametrize("num_registers", [0, 2])
@pytest.mark.parametrize("shape", [(28, 28), (70, 42)])
def test_positions_are_interpolated_to_the_grid_of_the_images(shape, num_registers):
    """The class token keeps its position; with registers the interpolation is smooth."""
    tower, variables, _ = make_tower(registers=num_registers)
    params = variables["params"]
    x = jax.random.normal(KEY, (2, *shape, 1))
    grid = np.asarray(params["position"][0, 1:]).reshape(4, 4, 16)
    for axis, count in enumerate((shape[0] // 14, shape[1] // 14)):
        grid = np.apply_along_axis(interpolate_line, axis, grid, count, num_registers > 0)
    position = np.concatenate([params["position"][0, :1], grid.reshape(-1, 16)])
    expected, _ = encode_patch_by_patch(params, x, num_registers, position)
    output = jax.jit(tower.apply)(variables, x)
    assert output.local.shape == (2, shape[0] // 14, shape[1] // 14, 16)
    patches = expected[:, 1 + num_registers :].reshape(output.local.shape)
    np.testing.assert_allclose(output.local, patches, atol=5e-5)
    np.testing.assert_allclose(output.pooled, expected[:, 0], atol=5e-5)


def test_without_a_class_token_the_image_is_the_mean_of_its_patches():
    tower, variables, x = make_tower(class_token=False)
    assert "token" not in variables["params"]
    assert variables["params"]["position"].shape == (1, 16, 16)
    output = tower.apply(variables, x)
    np.testing.assert_allclose(output.pooled, output.local.mean((1, 2)), atol=1e-6)
    assert output.attention is None
    larger = tower.apply(variables, jax.random.normal(KEY, (1, 84, 84, 1)))
    assert larger.local.shape == (1, 6, 6, 16)


def test_scan_and_remat_change_neither_parameters_nor_gradients():
    plain, variables, x = make_tower(depth=3, registers=2, swiglu=True)
    assert variables["params"]["layer0"]["fc1"]["kernel"].shape == (16, 96)
    assert variables["params"]["layer0"]["fc2"]["kernel"].shape == (48, 16)
    other, _, _ = make_tower(depth=3, registers=2, swiglu=True, scan=True, remat=True)
    shapes = jax.eval_shape(other.init, KEY, x)
    assert jax.tree.map(jnp.shape, shapes) == jax.tree.map(jnp.shape, variables)

    def gradient(tower):
        def total(variables):
            output = tower.apply(variables, x)
            return (output.pooled**3).sum() + (output.local**2).sum()

        return jax.jit(jax.grad(total))(variables)

    for a, b in zip(*map(jax.tree.leaves, map(gradient, (plain, other))), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-5 * max(1.0, np.abs(a).max()))


@pytest.mark.parametrize("options", [{}, {"scan": True}, {"scan": True, "remat": True}])
def test_no_table_of_attention_is_kept_for_the_backward_pass(options):
    """518 pixels are 1369 patches: the tables of one layer are larger than all its activations."""
    tower = make_image_tower("vit_tiny14", None, jnp.float32, depth=4, **options)
    x = jax.ShapeDtypeStruct((2, 518, 518, 1), jnp.float32)
    variables = jax.eval_shape(tower.init, KEY, x)

    def keep(variables, x):
        return jax.vjp(lambda variables: tower.apply(variables, x)[:2], variables)[1]

    sizes = [leaf.size for leaf in jax.tree.leaves(jax.eval_shape(keep, variables, x))]
    assert max(sizes) < 1369**2
    if options.get("remat"):
        # Besides parameters and images, the tokens after each layer.
        assert sum(sizes) < 2 * 518**2 + 4 * 3 * 2 * 1370 * 16 + 3 * 1370 * 16


def test_frozen_layers_freeze_registers_positions_and_factors():
    tower, variables, x = make_tower(registers=2, frozen_layers=1)
    gradient = jax.jit(jax.grad(lambda v: (tower.apply(v, x).local ** 3).sum()))(variables)
    frozen = {"token", "registers", "position", "embed", "embed_bias", "layer0"}
    for name, tree in gradient["params"].items():
        is_zero = all(not np.abs(leaf).max() for leaf in jax.tree.leaves(tree))
        assert is_zero == (name in frozen) == tower.is_frozen(name), name


def test_bfloat16_keeps_float32_parameters_and_is_near():
    tower, variables, x = make_tower(registers=2)
    half = make_image_tower("vit_tiny14", None, jnp.bfloat16, registers=2)
    shapes = jax.eval_shape(half.init, KEY, x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    actual = half.apply(variables, x).local.astype(jnp.float32)
    np.testing.assert_allclose(actual, tower.apply(variables, x).local, atol=0.15)


@pytest.mark.parametrize(
    ("name", "registers", "count"),
    [("vit_s14", 0, 22_056_192), ("vit_b14", 0, 86_579_712), ("vit_g14", 4, 1_136_485_376)],
)
def test_sizes_have_the_numbers_of_parameters_of_dinov2(name, registers, count):
    """Those of transformers' models for images of 518 pixels, without the mask token."""
    tower = make_image_tower(name, None, jnp.float32, registers=registers)
    shapes = jax.eval_shape(tower.init, KEY, jnp.zeros((1, 518, 518, 3)))
    assert sum(np.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == count


def test_images_that_are_no_whole_patches_are_refused():
    tower, variables, _ = make_tower()
    message = "images of 60 pixels cannot be cut into patches of 14; set data.size to 56 or 70"
    with pytest.raises(UserError, match=message):
        tower.apply(variables, jnp.zeros((1, 56, 60, 1)))
    with pytest.raises(UserError, match="patches of 14; set data.size to 14$"):
        check_patches(13, 14)
    with pytest.raises(UserError, match="2 x 4 patches; use square images"):
        tower.init(KEY, jnp.zeros((1, 28, 56, 1)))
    content = {"vision": {"name": "vit_b14"}, "data": {"size": 224}}
    assert Config.from_dict(content).vision["layer_scale"] == 1.0
    for data, patch, message in ((96, 14, "set data.size to 84 or 98"), (224, 48, "192 or 240")):
        content = {"vision": {"name": "vit_b14", "patch": patch}, "data": {"size": data}}
        with pytest.raises(UserError, match=message):
            Config.from_dict(content)
