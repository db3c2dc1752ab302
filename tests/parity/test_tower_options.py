"""Options that leave a tower's parameters and values as they are, and what freezing leaves out."""

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


def largest(a, b):
    """The largest difference of two trees, relative to the largest entry of all."""
    pairs = list(zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))
    scale = max(float(jnp.abs(x).max()) for x, _ in pairs[1:])
    return max(float(jnp.abs(x - y).max()) for x, y in pairs[1:]) / scale


def same_tree(a, b):
    shapes = [jax.tree.map(lambda x: (x.shape, x.dtype), tree) for tree in (a, b)]
    assert shapes[0] == shapes[1]


def see(tower, variables, x):
    """The value and gradients of a scalar of all that a tower sees, in training."""

    def scalar(params, x):
        held = {**variables, "params": params}
        seen, changed = tower.apply(held, x, True, mutable=["batch_stats"])
        return (seen.pooled**2).sum() + (seen.local**2).mean(), changed

    return jax.jit(jax.value_and_grad(scalar, (0, 1), has_aux=True))(variables["params"], x)


def read(tower, variables, *keys):
    """The value and gradients of a scalar of all that is read, in training, for each key."""
    tokens, index, _, sentence = draw_texts()

    def scalar(params, key):
        rngs = {"dropout": key}
        actual = tower.apply({"params": params}, tokens, index, sentence, True, rngs=rngs)
        return sum((leaf**2).sum() for leaf in actual)

    gradient = jax.jit(jax.value_and_grad(scalar))
    return [gradient(variables["params"], key) for key in keys]


@cache
def plain_bert():
    tower = make_text_tower("bert_tiny", 30, jnp.float32, **BERT)
    tokens, index, _, sentence = draw_texts()
    variables = tower.init(KEY, tokens, index, sentence)
    return variables, read(tower, variables, KEY, jax.random.key(1))


@cache
def plain_vit():
    tower = make_image_tower("vit_tiny", None, jnp.float32, depth=3)
    x = jax.random.normal(KEY, (2, 16, 16, 3))
    variables = tower.init(KEY, x)
    return x, variables, see(tower, variables, x)


@pytest.mark.parametrize("changes", CHANGES)
def test_scan_and_rematerialisation_change_no_value_of_bert(changes):
    variables, (expected, other) = plain_bert()
    tower = make_text_tower("bert_tiny", 30, jnp.float32, **BERT, **changes)
    tokens, index, _, sentence = draw_texts()
    same_tree(variables, jax.eval_shape(tower.init, KEY, tokens, index, sentence))
    (actual,) = read(tower, variables, KEY)
    np.testing.assert_allclose(actual[0], expected[0], rtol=1e-5)
    assert largest(expected, actual) < 2e-5
    assert largest(expected, other) > 1e-2  # dropout is on


@pytest.mark.parametrize("changes", CHANGES)
def test_scan_and_rematerialisation_change_no_value_of_vit(changes):
    x, variables, expected = plain_vit()
    tower = make_image_tower("vit_tiny", None, jnp.float32, depth=3, **changes)
    same_tree(variables, jax.eval_shape(tower.init, KEY, x))
    assert largest(expected, see(tower, variables, x)) < 2e-5


def test_rematerialisation_changes_no_value_of_resnet():
    plain = make_image_tower("resnet_tiny", None, jnp.float32, position=True)
    other = make_image_tower("resnet_tiny", None, jnp.float32, position=True, remat=True)
    x = jax.random.normal(KEY, (2, 16, 16, 3))
    variables = plain.init(KEY, x)
    same_tree(variables, other.init(KEY, x))
    assert largest(see(plain, variables, x), see(other, variables, x)) < 2e-5


def test_scan_makes_a_smaller_program_and_remat_keeps_less():
    tokens, index, _, sentence = draw_texts(16)

    def compiled(**changes):
        tower = make_text_tower("bert_tiny", 30, jnp.float32, depth=8, width=64, **changes)
        held = jax.eval_shape(tower.init, KEY, tokens, index, sentence)
        whole = lambda p: sum(x.sum() for x in tower.apply(p, tokens, index, sentence))  # noqa: E731
        lowered = jax.jit(jax.grad(whole)).lower(held)
        return len(lowered.as_text()), lowered.compile().memory_analysis().temp_size_in_bytes

    plain, scan, both = compiled(), compiled(scan=True), compiled(scan=True, remat=True)
    assert scan[0] < plain[0] / 1.5
    assert both[1] < scan[1] / 1.3


@pytest.mark.parametrize("changes", [{}, {"scan": True}])
def test_parameters_are_the_same_in_half_precision(changes):
    tokens, index, _, sentence = draw_texts()
    trees = [
        make_text_tower("bert_tiny", 30, dtype, depth=3, **some).init(KEY, tokens, index, sentence)
        for dtype, some in ((jnp.float32, {}), (jnp.bfloat16, changes))
    ]
    same_tree(*trees)
    half = make_text_tower("bert_tiny", 30, jnp.bfloat16, depth=3, **changes)
    full = make_text_tower("bert_tiny", 30, jnp.float32, depth=3)
    expected, actual = (t.apply(trees[0], tokens, index, sentence).words for t in (full, half))
    np.testing.assert_allclose(np.asarray(actual, np.float32), expected, atol=0.15)


def test_the_last_layers_are_added_up():
    tokens, index, _, sentence = draw_texts()
    tower = make_text_tower("bert_tiny", 30, jnp.float32, depth=3)
    variables = tower.init(KEY, tokens, index, sentence)
    each = []
    for depth in (2, 3):
        first = make_text_tower("bert_tiny", 30, jnp.float32, depth=depth)
        each.append(first.apply(variables, tokens, index, sentence).words)
    both = make_text_tower("bert_tiny", 30, jnp.float32, depth=3, sum_last_layers=2, scan=True)
    actual = both.apply(variables, tokens, index, sentence).words
    np.testing.assert_allclose(actual, each[0] + each[1], rtol=1e-5, atol=1e-5)


def test_the_mean_is_that_of_all_pieces():
    tokens, _, _, _ = draw_texts()
    own = jnp.where(tokens > 0, jnp.arange(9), -1)  # every piece its own word
    sentence = jnp.where(tokens > 0, 0, -1)
    tower = make_text_tower("bert_tiny", 30, jnp.float32, pool="mean")
    actual, _ = tower.init_with_output(KEY, tokens, own, sentence)
    expected = [actual.words[b][tokens[b] > 0].mean(0) for b in range(3)]
    np.testing.assert_allclose(actual.pooled, expected, rtol=1e-5, atol=1e-6)


def test_a_resized_image_gives_the_maps_of_the_papers():
    tower = make_image_tower("resnet50", None, jnp.float32, resize=299)
    seen, _ = jax.eval_shape(tower.init_with_output, KEY, jnp.zeros((1, 224, 224, 3)))
    assert seen.local.shape == (1, 19, 19, 1024) and seen.pooled.shape == (1, 2048)


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


def test_dilation_takes_the_place_of_strides():
    plain = make_image_tower("resnet50", None, jnp.float32)
    dilated = make_image_tower("resnet50", None, jnp.float32, dilated=1, local_stage=3)
    x = jnp.zeros((1, 64, 64, 3))
    trees = [jax.eval_shape(t.init, KEY, x) for t in (plain, dilated)]
    same_tree(*trees)
    seen, _ = jax.eval_shape(dilated.init_with_output, KEY, x)
    assert seen.local.shape == (1, 4, 4, 2048)


def test_a_dilated_tower_at_a_stride_is_the_strided_one():
    """Every second pixel of a dilated stage is the strided stage, away from the border."""
    sizes = {"widths": (4, 8), "depths": (1, 1), "bottleneck": True, "stem": "patch4"}
    x = jax.random.normal(KEY, (1, 64, 64, 1))
    plain, dilated = (resnet.ResNet(**sizes, dilated=n, local_stage=1) for n in (0, 1))
    variables = plain.init(KEY, x)
    expected, actual = (t.apply(variables, x).local for t in (plain, dilated))
    assert actual.shape[1:3] == (16, 16)
    np.testing.assert_allclose(actual[:, ::2, ::2], expected, rtol=1e-4, atol=1e-5)


def frozen_step(freeze, vision_=None, **changes):
    """The state before and after two steps with some of it frozen, and the compiled step."""
    content = testing.get_config().to_dict()
    content |= {"method": "convirt", "hyper": {}, "fine_map": False, **changes}
    content["text"] |= {"depth": 3}
    content["vision"] = vision_ or content["vision"]
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
    "freeze, frozen, moved",
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
def test_what_is_frozen_stays_as_it_is(freeze, frozen, moved):
    before, after = frozen_step(freeze)

    def changed(name):
        trees = [
            getattr(state, name)["encoders"] if name == "params" else getattr(state, name)
            for state in (before, after)
        ]
        flat = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in trees]
        return {
            optim.path_name(path): not np.array_equal(a, b)
            for (path, a), (_, b) in zip(*flat, strict=True)
        }

    params, stats = changed("params"), changed("batch_stats")
    for name, is_changed in {**params, **stats}.items():
        if name.startswith(frozen):
            assert not is_changed, name
        if name.startswith(moved):
            assert is_changed, name
    held = [
        optim.path_name(path)
        for path, _ in jax.tree_util.tree_flatten_with_path(before.opt_state)[0]
    ]
    assert not [name for name in held if any(part in name for part in frozen)]
    assert [name for name in held if "text_global_head" in name]


@pytest.mark.parametrize(
    "side, name", [("text", "bert_tiny"), ("vision", "vit_tiny"), ("vision", "resnet_tiny")]
)
def test_what_is_frozen_gets_no_gradient_and_costs_none(side, name):
    """The backward pass of a frozen tower is not even computed."""
    costs, zero = [], []
    for frozen_layers in (0, 1, 99):
        sizes = {"name": name, "frozen_layers": frozen_layers} | (
            {} if name == "resnet_tiny" else {"depth": 2}
        )
        model = make_encoder(**{side: sizes, "fine_map": False})
        tokens, index, ids, sentence = draw_texts()
        text = TextBatch(tokens, index, ids, sentence)
        inputs = (draw_images(),) if side == "vision" else (text,)
        verb = "encode_image" if side == "vision" else "encode_text"
        variables = model.init(KEY, *inputs, method=verb)

        def scalar(params, model=model, variables=variables, inputs=inputs, verb=verb):
            held = {**variables, "params": params}
            out = model.apply(held, *inputs, True, method=verb, mutable=["batch_stats"])[0]
            return (out.pooled**2).sum() + (out.local**2).sum()

        gradient = jax.jit(jax.grad(scalar))
        costs.append(gradient.lower(variables["params"]).compile().cost_analysis()["flops"])
        flat = jax.tree_util.tree_flatten_with_path(gradient(variables["params"]))[0]
        for path, leaf in flat:
            assert not (model.is_frozen(optim.path_name(path)) and np.abs(leaf).max()), path
        zero.append(sum(not np.abs(leaf).max() for _, leaf in flat))
    assert costs[0] > costs[1] > costs[2]
    assert zero[0] < zero[1] < zero[2]


@pytest.mark.parametrize(
    "freeze, words",
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
def test_freezing_what_is_not_there(freeze, words):
    with pytest.raises(UserError, match=words):
        frozen_step((freeze,))
