"""Options of towers that must not change parameters or values, and the freezing of layers."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_train
from test_encoders import draw_images, draw_texts, make_encoder

from configs import testing
from plan_jax import optim, parallel
from plan_jax.config import Config
from plan_jax.encoders import resnet
from plan_jax.encoders.dual_encoder import make_image_tower, make_text_tower
from plan_jax.layers.resize import resize_align_corners
from plan_jax.model import build_components
from plan_jax.state import init_state
from plan_jax.step import make_step
from plan_jax.types import TextBatch, UserError

KEY = jax.random.key(0)
BERT = {"depth": 3, "dropout": 0.3}
CHANGES = [{"scan": True}, {"scan": True, "remat": True}]


def largest_difference(a, b):
    """Returns the largest difference of gradients, relative to the largest entry of all.

    The first leaf, the value, is left out: it is much larger than the gradients.
    """
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))[1:]
    scale = max(float(jnp.abs(x).max()) for x, _ in pairs)
    return max(float(jnp.abs(x - y).max()) for x, y in pairs) / scale


def assert_same_shapes(a, b):
    """Asserts that two trees have the same structure, shapes and dtypes."""
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (a, b)]
    assert shapes[0] == shapes[1]


def image_tower_gradients(tower, variables, x):
    """Returns a scalar of a tower's outputs in training, its gradients and the new statistics."""

    def scalar(params, x):
        tower_variables = {**variables, "params": params}
        output, new_stats = tower.apply(tower_variables, x, True, mutable=["batch_stats"])
        return (output.pooled**2).sum() + (output.local**2).mean(), new_stats

    return jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(variables["params"], x)


def text_tower_gradients(tower, variables, *keys):
    """Returns a scalar of a tower's outputs in training with its gradients, for each key."""
    tokens, index, _, sentence = draw_texts()

    def scalar(params, key):
        rngs = {"dropout": key}
        outputs = tower.apply({"params": params}, tokens, index, sentence, True, rngs=rngs)
        return sum((leaf**2).sum() for leaf in outputs)

    gradient = jax.jit(jax.value_and_grad(scalar))
    return [gradient(variables["params"], key) for key in keys]


@cache
def bert_without_changes():
    """Returns the variables of a BERT, and its gradients for two dropout keys."""
    tower = make_text_tower("bert_tiny", 30, jnp.float32, **BERT)
    tokens, index, _, sentence = draw_texts()
    variables = tower.init(KEY, tokens, index, sentence)
    return variables, text_tower_gradients(tower, variables, KEY, jax.random.key(1))


@cache
def vit_without_changes():
    """Returns images, the variables of a ViT, and its gradients."""
    tower = make_image_tower("vit_tiny", None, jnp.float32, depth=3)
    x = jax.random.normal(KEY, (2, 16, 16, 3))
    variables = tower.init(KEY, x)
    return x, variables, image_tower_gradients(tower, variables, x)


@pytest.mark.parametrize("changes", CHANGES)
def test_scan_and_rematerialisation_change_no_value_of_bert(changes):
    variables, (expected, with_other_dropout) = bert_without_changes()
    tower = make_text_tower("bert_tiny", 30, jnp.float32, **BERT, **changes)
    tokens, index, _, sentence = draw_texts()
    assert_same_shapes(variables, jax.eval_shape(tower.init, KEY, tokens, index, sentence))
    (actual,) = text_tower_gradients(tower, variables, KEY)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    assert largest_difference(expected, actual) < 2e-5
    assert largest_difference(expected, with_other_dropout) > 1e-2  # dropout is on


@pytest.mark.parametrize("changes", CHANGES)
def test_scan_and_rematerialisation_change_no_value_of_vit(changes):
    x, variables, expected = vit_without_changes()
    tower = make_image_tower("vit_tiny", None, jnp.float32, depth=3, **changes)
    assert_same_shapes(variables, jax.eval_shape(tower.init, KEY, x))
    assert largest_difference(expected, image_tower_gradients(tower, variables, x)) < 2e-5


def test_rematerialisation_changes_no_value_of_resnet():
    plain = make_image_tower("resnet_tiny", None, jnp.float32, position=True)
    remat = make_image_tower("resnet_tiny", None, jnp.float32, position=True, remat=True)
    x = jax.random.normal(KEY, (2, 16, 16, 3))
    variables = plain.init(KEY, x)
    assert_same_shapes(variables, remat.init(KEY, x))
    expected, actual = (image_tower_gradients(tower, variables, x) for tower in (plain, remat))
    assert largest_difference(expected, actual) < 2e-5


def test_scan_makes_a_smaller_program_and_remat_needs_less_memory():
    tokens, index, _, sentence = draw_texts(16)

    def program_size_and_memory(**changes):
        tower = make_text_tower("bert_tiny", 30, jnp.float32, depth=8, width=64, **changes)
        shapes = jax.eval_shape(tower.init, KEY, tokens, index, sentence)

        def total(variables):
            return sum(x.sum() for x in tower.apply(variables, tokens, index, sentence))

        lowered = jax.jit(jax.grad(total)).lower(shapes)
        return len(lowered.as_text()), lowered.compile().memory_analysis().temp_size_in_bytes

    plain_size, _ = program_size_and_memory()
    scan_size, scan_memory = program_size_and_memory(scan=True)
    _, remat_memory = program_size_and_memory(scan=True, remat=True)
    assert scan_size < plain_size / 1.5
    assert remat_memory < scan_memory / 1.3


@pytest.mark.parametrize("changes", [{}, {"scan": True}])
def test_parameters_are_the_same_in_half_precision(changes):
    tokens, index, _, sentence = draw_texts()
    full = make_text_tower("bert_tiny", 30, jnp.float32, depth=3)
    half = make_text_tower("bert_tiny", 30, jnp.bfloat16, depth=3, **changes)
    variables = full.init(KEY, tokens, index, sentence)
    assert_same_shapes(variables, half.init(KEY, tokens, index, sentence))
    expected, actual = (
        tower.apply(variables, tokens, index, sentence).words for tower in (full, half)
    )
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, atol=0.15)


def test_the_last_layers_are_summed():
    tokens, index, _, sentence = draw_texts()
    tower = make_text_tower("bert_tiny", 30, jnp.float32, depth=3)
    variables = tower.init(KEY, tokens, index, sentence)
    layers = []
    for depth in (2, 3):  # a tower of depth 2 has the first two layers of the other one
        shorter = make_text_tower("bert_tiny", 30, jnp.float32, depth=depth)
        layers.append(shorter.apply(variables, tokens, index, sentence).words)
    summed = make_text_tower("bert_tiny", 30, jnp.float32, depth=3, sum_last_layers=2, scan=True)
    actual = summed.apply(variables, tokens, index, sentence).words
    np.testing.assert_allclose(actual, layers[0] + layers[1], rtol=1e-5, atol=1e-5)


def test_mean_pooling_is_over_all_pieces():
    tokens, _, _, _ = draw_texts()
    word_index = jnp.where(tokens > 0, jnp.arange(9), -1)  # each piece is a word of its own
    sentence = jnp.where(tokens > 0, 0, -1)
    tower = make_text_tower("bert_tiny", 30, jnp.float32, pool="mean")
    actual, _ = tower.init_with_output(KEY, tokens, word_index, sentence)
    expected = [actual.words[b][tokens[b] > 0].mean(0) for b in range(3)]
    np.testing.assert_allclose(actual.pooled, expected, rtol=1e-5, atol=1e-6)


def test_resizing_to_299_gives_the_map_sizes_of_the_papers():
    tower = make_image_tower("resnet50", None, jnp.float32, resize=299)
    output, _ = jax.eval_shape(tower.init_with_output, KEY, jnp.zeros((1, 224, 224, 3)))
    assert output.local.shape == (1, 19, 19, 1024) and output.pooled.shape == (1, 2048)


def test_resizing_is_the_literal_formula():
    x = jax.random.normal(KEY, (1, 5, 4, 2))
    actual = resize_align_corners(x, (7, 7))
    for y in range(7):
        for c in range(7):
            v, u = y * 4 / 6, c * 3 / 6
            i, j = min(int(v), 3), min(int(u), 2)
            a, b = v - i, u - j
            top = (1 - b) * x[0, i, j] + b * x[0, i, j + 1]
            low = (1 - b) * x[0, i + 1, j] + b * x[0, i + 1, j + 1]
            np.testing.assert_allclose(actual[0, y, c], (1 - a) * top + a * low, atol=1e-5)


def test_dilation_replaces_strides():
    plain = make_image_tower("resnet50", None, jnp.float32)
    dilated = make_image_tower("resnet50", None, jnp.float32, dilated=1, local_stage=3)
    x = jnp.zeros((1, 64, 64, 3))
    trees = [jax.eval_shape(t.init, KEY, x) for t in (plain, dilated)]
    assert_same_shapes(*trees)
    output, _ = jax.eval_shape(dilated.init_with_output, KEY, x)
    assert output.local.shape == (1, 4, 4, 2048)


def test_every_second_pixel_of_a_dilated_tower_is_that_of_the_strided_one():
    sizes = {"widths": (4, 8), "depths": (1, 1), "bottleneck": True, "stem": "patch4"}
    x = jax.random.normal(KEY, (1, 64, 64, 1))
    plain, dilated = (resnet.ResNet(**sizes, dilated=n, local_stage=1) for n in (0, 1))
    variables = plain.init(KEY, x)
    expected, actual = (t.apply(variables, x).local for t in (plain, dilated))
    assert actual.shape[1:3] == (16, 16)
    np.testing.assert_allclose(actual[:, ::2, ::2], expected, rtol=1e-4, atol=1e-5)


def run_frozen_steps(freeze):
    """Returns the state before and after two steps of training with `optim.freeze`."""
    content = testing.get_config().to_dict()
    content |= {"method": "convirt", "hyper": {}, "fine_map": False}
    content["text"] |= {"depth": 3}
    content["optim"] |= {"freeze": freeze, "weight_decay": 0.1}
    config = Config.from_dict(content)
    components = build_components(config, parallel.AXIS)
    mesh = parallel.make_mesh(1)
    state, optimiser = init_state(components, config, test_train.random_batch())
    step = parallel.parallelise(make_step(components, optimiser, 0.0, parallel.AXIS), mesh)
    state = parallel.replicate(state, mesh)
    before = parallel.to_host(state)
    for n in range(2):
        state, _ = step(state, parallel.shard(test_train.random_batch(seed=n), mesh))
    return before, parallel.to_host(state)


@pytest.mark.parametrize(
    ("freeze", "frozen", "trained"),
    [
        (("text",), ("text_tower/",), ("text_global_head/", "image_tower/")),
        (
            ("text:2", "vision:1"),
            (
                "text_tower/layer0",
                "text_tower/layer1",
                "text_tower/token",
                "text_tower/position",
                "image_tower/stem",
                "image_tower/layer1_",
            ),
            ("text_tower/layer2", "text_tower/pool", "image_tower/layer2_", "image_global_head/"),
        ),
    ],
)
def test_frozen_parameters_and_statistics_do_not_change(freeze, frozen, trained):
    before, after = run_frozen_steps(freeze)

    def find_changes(name):
        trees = [
            getattr(state, name)["encoders"] if name == "params" else getattr(state, name)
            for state in (before, after)
        ]
        flat = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in trees]
        return {
            optim.path_name(path): not np.array_equal(a, b)
            for (path, a), (_, b) in zip(*flat, strict=True)
        }

    for name, is_changed in {**find_changes("params"), **find_changes("batch_stats")}.items():
        if name.startswith(frozen):
            assert not is_changed, name
        if name.startswith(trained):
            assert is_changed, name
    # The optimiser keeps no moments of frozen parameters.
    moments = [
        optim.path_name(path)
        for path, _ in jax.tree_util.tree_flatten_with_path(before.opt_state)[0]
    ]
    assert not [name for name in moments if any(prefix in name for prefix in frozen)]
    assert [name for name in moments if "text_global_head" in name]


@pytest.mark.parametrize(
    "side, name", [("text", "bert_tiny"), ("vision", "vit_tiny"), ("vision", "resnet_tiny")]
)
def test_frozen_layers_have_no_gradient_and_no_backward_pass(side, name):
    """The compiled program has fewer operations the more layers are frozen."""
    flops, num_zero = [], []
    for frozen_layers in (0, 1, 99):
        sizes = {"name": name, "frozen_layers": frozen_layers} | (
            {} if name == "resnet_tiny" else {"depth": 2}
        )
        model = make_encoder(**{side: sizes, "fine_map": False})
        tokens, index, ids, sentence = draw_texts()
        text = TextBatch(tokens, index, ids, sentence)
        inputs = (draw_images(),) if side == "vision" else (text,)
        method = "encode_image" if side == "vision" else "encode_text"
        variables = model.init(KEY, *inputs, method=method)

        def scalar(params, model=model, variables=variables, inputs=inputs, method=method):
            all_variables = {**variables, "params": params}
            options = {"method": method, "mutable": ["batch_stats"]}
            output, _ = model.apply(all_variables, *inputs, True, **options)
            return (output.pooled**2).sum() + (output.local**2).sum()

        gradient = jax.jit(jax.grad(scalar))
        flops.append(gradient.lower(variables["params"]).compile().cost_analysis()["flops"])
        flat = jax.tree_util.tree_flatten_with_path(gradient(variables["params"]))[0]
        for path, leaf in flat:
            assert not (model.is_frozen(optim.path_name(path)) and np.abs(leaf).max()), path
        num_zero.append(sum(not np.abs(leaf).max() for _, leaf in flat))
    assert flops[0] > flops[1] > flops[2]
    assert num_zero[0] < num_zero[1] < num_zero[2]


@pytest.mark.parametrize(
    ("freeze", "message"),
    [
        ("text:7", "optim.freeze is 'text:7'; use text:1 to text:3"),
        ("vision:0", "optim.freeze is 'vision:0'; use vision:1 to vision:2"),
        ("encoders/text_tower", "is in a tower; use text or text:N"),
        (
            "heads",
            "names no parameter; use some of vision, text, vision:N, text:N, encoders/image_",
        ),
    ],
)
def test_freezing_what_does_not_exist_is_refused(freeze, message):
    with pytest.raises(UserError, match=message):
        run_frozen_steps((freeze,))
