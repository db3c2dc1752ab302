"""A published checkpoint in a run: towers and heads start from it, or are only evaluated."""

import json
import shutil

import jax
import numpy as np
import pytest
from flax import traverse_util
from published import fill_randomly, publish
from safetensors.numpy import save_file
from test_train import random_batch

from configs import testing
from plan_jax import main
from plan_jax.config import Config, flatten
from plan_jax.model import build_components, make_model
from plan_jax.state import choose_normalisation, init_state
from plan_jax.types import UserError

SIDES = {
    "image_tower": ("resnet", "img_encoder_q.model."),
    "text_tower": ("bert", "text_encoder_q.model."),
}
HEAD_ENCODERS = {"image": "img_encoder_q", "text": "text_encoder_q"}


def make_content(**weights):
    """Returns the testing config with the towers and heads of MGCA, as dicts."""
    config = testing.get_config().to_dict()
    config["vision"] = {"name": "resnet_tiny"}
    config["text"] = {"name": "bert_tiny", "pool": "cls"}
    config["heads"] = dict.fromkeys(config["heads"], "mlp")
    config |= {"method": "convirt", "hyper": {}, "fine_map": False, "steps": 0}
    config["normalisation"] = "fixed"
    config["weights"] |= weights
    return config


def init_from(content, seed=0):
    """Returns the initial training state of a config."""
    config = Config.from_dict(content | {"seed": seed})
    return init_state(build_components(config), config, random_batch(2))[0]


def publish_as_mgca(params, stats):
    """Returns the state dict of MGCA's checkpoint with these towers and heads."""
    state_dict = {"prototype_layer.weight": np.zeros((3, 8), np.float32)}
    for tower, (kind, prefix) in SIDES.items():
        trees = {"params": params[tower], "batch_stats": stats.get(tower, {})}
        state_dict |= publish(kind, trees, prefix)
    for side, encoder in HEAD_ENCODERS.items():
        for scope in ("global", "local"):
            name, prefix = f"{side}_{scope}_head", f"{encoder}.{scope}_embed.head."
            flat = traverse_util.flatten_dict(
                {"params": params[name], "batch_stats": stats[name]}, sep="/"
            )
            kernels = {k: flat[f"params/fc{n}/kernel"].T for k, n in (("0", 1), ("3", 2))}
            if scope == "local":  # 1x1 convolutions over tokens
                kernels = {key: value[..., None] for key, value in kernels.items()}
            state_dict |= {f"{prefix}{key}.weight": value for key, value in kernels.items()}
            width = len(flat["params/norm1/scale"])
            state_dict |= {
                f"{prefix}0.bias": np.zeros(width, np.float32),
                f"{prefix}1.weight": flat["params/norm1/scale"],
                f"{prefix}1.bias": flat["params/norm1/bias"],
                f"{prefix}1.running_mean": flat["batch_stats/norm1/mean"],
                f"{prefix}1.running_var": flat["batch_stats/norm1/var"],
                f"{prefix}3.bias": flat["params/fc2/bias"],
                f"{prefix}4.running_mean": flat["batch_stats/norm2/mean"],
                f"{prefix}4.running_var": flat["batch_stats/norm2/var"],
            }
    return {key: np.ascontiguousarray(value) for key, value in state_dict.items()}


@pytest.fixture(scope="module")
def mgca(tmp_path_factory):
    """Trees that somebody else trained, and the file that they published."""
    initial = init_from(make_content())
    trained = fill_randomly(
        {"params": initial.params["encoders"], "batch_stats": initial.batch_stats}
    )
    trained["batch_stats"] = jax.tree.map(np.abs, trained["batch_stats"])
    path = str(tmp_path_factory.mktemp("published") / "mgca.safetensors")
    save_file(publish_as_mgca(trained["params"], trained["batch_stats"]), path)
    return trained, path


def test_a_run_starts_from_published_weights(mgca):
    trained, path = mgca
    state = init_from(make_content(vision=path, text=path, heads=path), seed=1)
    jax.tree.map(np.testing.assert_array_equal, state.params["encoders"], trained["params"])
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, trained["batch_stats"])


def test_heads_that_are_stored_with_their_towers(mgca):
    trained, path = mgca
    state = init_from(make_content(vision=path, text=path, heads="towers"), seed=1)
    jax.tree.map(np.testing.assert_array_equal, state.params["encoders"], trained["params"])


def test_loading_one_tower_leaves_the_other_unchanged(mgca):
    trained, path = mgca
    plain, loaded = init_from(make_content()), init_from(make_content(text=path))
    for name, expected in (
        ("text_tower", trained["params"]),
        ("image_tower", plain.params["encoders"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, loaded.params["encoders"][name], expected[name])


def test_a_published_checkpoint_is_evaluated_without_training(mgca, tmp_path, monkeypatch):
    path = shutil.copy(mgca[1], tmp_path)
    monkeypatch.chdir(tmp_path)
    config = make_content(vision=path, text=path, heads="towers") | {"normalisation": "weights"}
    config["eval"]["tasks"] = ("retrieval",)
    prefixes = ("vision", "text", "heads", "weights", "normalisation")
    flags = [
        f"--config.{name}={value}"
        for name, value in flatten(config)
        if value and name.startswith(prefixes)
    ]
    (tmp_path / "mgca.py").write_text(
        "from configs import testing\n\n\ndef get_config():\n    config = testing.get_config()\n"
        "    config.vision, config.text = {}, {}\n"
        "    config.method, config.hyper, config.fine_map, config.steps = 'convirt', {}, False, 0\n"
        "    config.eval.tasks = ('retrieval',)\n    return config\n"
    )
    assert main.run(["--config", "mgca.py", "--workdir", "run", *flags]) == 0
    trained_metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert main.run(["--mode", "eval", "--checkpoint", "run"]) == 0
    metrics = json.loads((tmp_path / "run" / "eval" / "test" / "metrics.json").read_text())
    assert (
        trained_metrics["retrieval/i2t_r1"] == metrics["retrieval/i2t_r1"]
        and trained_metrics["steps"] == 0
    )
    assert trained_metrics["params_sha256"] == metrics["params_sha256"]
    # The run has the weights and their scale, so the same command needs the file no more.
    assert json.loads((tmp_path / "run" / "config.json").read_text())["normalisation"] == "fixed"
    (tmp_path / path).unlink()
    again = ["--config", "mgca.py", *flags]
    assert main.run([*again, "--workdir", "run"]) == 0
    assert main.run(["--mode", "eval", *again, "--checkpoint", "run"]) == 0


def test_weights_refuse_images_of_another_scale(mgca):
    """What an original computes and no array shows."""
    content = make_content(vision=mgca[1]) | {"normalisation": "image", "steps": 1}
    remedy = "normalisation is image; set it to fixed, or .*config.weights.any_normalisation=true"
    with pytest.raises(UserError, match=remedy):
        init_from(content)


def test_weights_of_another_scale_are_accepted_on_purpose(mgca, capsys):
    trained, path = mgca
    content = make_content(vision=path, any_normalisation=True)
    content |= {"normalisation": "image", "steps": 1}
    tower = init_from(content).params["encoders"]["image_tower"]
    jax.tree.map(np.testing.assert_array_equal, tower, trained["params"]["image_tower"])
    expected = "MGCA trained it on images of normalisation fixed, and config.normalisation is image"
    assert expected in capsys.readouterr().err


def test_the_scale_of_images_is_chosen_with_the_weights(mgca, capsys):
    content = make_content(vision=mgca[1], text=mgca[1], heads="towers")
    config = Config.from_dict(content | {"normalisation": "weights"})
    assert choose_normalisation(config).normalisation == "fixed"
    assert (
        f"config.normalisation is fixed, that of the weights {mgca[1]}" in capsys.readouterr().err
    )
    # A config that names one is not asked again.
    assert choose_normalisation(Config.from_dict(content)) == Config.from_dict(content)


def test_weights_that_do_not_tell_the_scale_are_refused(mgca, tmp_path):
    trained, path = mgca
    trees = {"params": trained["params"]["image_tower"]}
    trees["batch_stats"] = trained["batch_stats"]["image_tower"]
    plain = str(tmp_path / "plain.safetensors")
    save_file(publish("resnet", trees), plain)
    content = make_content(vision=plain, text=path, heads=path) | {"normalisation": "weights"}
    with pytest.raises(UserError, match=r"plain.safetensors are of no origin .*; set it to what"):
        choose_normalisation(Config.from_dict(content))
    content["weights"]["vision"] = ""
    with pytest.raises(UserError, match=r"config.weights.vision is ''; normalisation weights is"):
        Config.from_dict(content)


@pytest.mark.parametrize(
    ("weights", "empty"),
    [({}, "text"), ({"text": "t"}, "heads"), ({"heads": "h"}, "text")],
)
def test_images_are_not_compared_with_random_texts(weights, empty):
    content = make_content(vision="v", **weights)
    with pytest.raises(UserError, match=rf"config.eval.tasks is .*weights.{empty} is empty"):
        Config.from_dict(content)
    content["eval"]["tasks"] = ("classification", "segmentation")
    assert Config.from_dict(content).steps == 0
    # Training starts from whatever there is.
    content["eval"]["tasks"] = ("retrieval",)
    assert Config.from_dict(content | {"steps": 1}).steps == 1


def test_a_model_of_images_alone_refuses_texts(mgca):
    content = make_content(vision=mgca[1])
    content["eval"]["tasks"] = ("classification",)
    config = Config.from_dict(content)
    components, state = build_components(config), init_from(content)
    variables = {"params": state.params, "batch_stats": state.batch_stats, "memory": {}}
    model = make_model(components, config, variables)
    with pytest.raises(UserError, match=r"has the published image tower .* and no texts"):
        model.encode_text(["effusion"])
    size = config.data.size
    assert model.encode_image(np.zeros((1, size, size, 1), np.uint8)).pooled.shape == (1, 8)


def test_heads_of_another_kind_are_refused(mgca):
    content = make_content(vision=mgca[1], text=mgca[1], heads=mgca[1])
    content["heads"]["text_local"] = "norm"
    with pytest.raises(UserError, match="config.heads.text_local is norm; set it to mlp"):
        init_from(content)


def test_heads_that_cannot_be_are_refused():
    for changes, message in (
        ({"text_global": "none", "text_local": "none"}, "texts then have 16 dimensions and embed"),
        ({"text_global": "none", "text_local": "shared"}, "no global head to share"),
        ({"image_global": "mean", "image_local": "shared"}, "needs a head for them"),
        ({"image_local": "mean"}, "heads.image_local is 'mean'; use one of"),
        ({"image_local": "shared"}, "set vision.local_stage to 1 and vision.pool to mean"),
    ):
        content = make_content()
        content["heads"] |= changes
        content["vision"]["local_stage"] = 0
        with pytest.raises(UserError, match=message):
            Config.from_dict(content)
