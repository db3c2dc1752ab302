"""A published checkpoint in a run of ours: towers and heads begin there, or are only evaluated."""

import json

import jax
import numpy as np
import optax
import pytest
from flax import traverse_util
from published import filled, published
from safetensors.numpy import save_file
from test_train import batch

from configs import testing
from plan_jax import config as configs
from plan_jax import main
from plan_jax import model as assembly
from plan_jax.step import init_state
from plan_jax.types import UserError

SIDES = {
    "image_tower": ("resnet", "img_encoder_q.model."),
    "text_tower": ("bert", "text_encoder_q.model."),
}
HEADS = {"image": "img_encoder_q", "text": "text_encoder_q"}


def settings(**weights):
    """The testing run with towers and heads as MGCA has them."""
    config = testing.get_config().to_dict()
    config["vision"] = {"name": "resnet_tiny"}
    config["text"] = {"name": "bert_tiny", "pool": "cls"}
    config["heads"] = dict.fromkeys(config["heads"], "mlp")
    config |= {"method": "convirt", "hyper": {}, "fine": False, "steps": 0}
    config["weights"] |= weights
    return config


def state_of(config, seed=0):
    system = assembly.build_components(config)
    return init_state(
        system, batch(2), lambda _: optax.sgd(0.1), seed, False, weights=config["weights"]
    )[0]


def as_mgca(params, stats):
    """The arrays of both towers and four heads as MGCA's checkpoint would hold them."""
    state = {"prototype_layer.weight": np.zeros((3, 8), np.float32)}
    for tower, (kind, prefix) in SIDES.items():
        trees = {"params": params[tower], "batch_stats": stats.get(tower, {})}
        state |= published(kind, trees, prefix)
    for side, top in HEADS.items():
        for reach in ("global", "local"):
            name, under = f"{side}_{reach}_head", f"{top}.{reach}_embed.head."
            flat = traverse_util.flatten_dict(
                {"params": params[name], "batch_stats": stats[name]}, sep="/"
            )
            kernels = {k: flat[f"params/fc{n}/kernel"].T for k, n in (("0", 1), ("3", 2))}
            if reach == "local":  # 1x1 convolutions over tokens
                kernels = {key: value[..., None] for key, value in kernels.items()}
            state |= {f"{under}{key}.weight": value for key, value in kernels.items()}
            width = len(flat["params/norm1/scale"])
            state |= {
                f"{under}0.bias": np.zeros(width, np.float32),
                f"{under}1.weight": flat["params/norm1/scale"],
                f"{under}1.bias": flat["params/norm1/bias"],
                f"{under}1.running_mean": flat["batch_stats/norm1/mean"],
                f"{under}1.running_var": flat["batch_stats/norm1/var"],
                f"{under}3.bias": flat["params/fc2/bias"],
                f"{under}4.running_mean": flat["batch_stats/norm2/mean"],
                f"{under}4.running_var": flat["batch_stats/norm2/var"],
            }
    return {key: np.ascontiguousarray(value) for key, value in state.items()}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What somebody else trained, and the file that they published."""
    first = state_of(settings())
    trained = filled({"params": first.params["encoders"], "batch_stats": first.batch_stats})
    trained["batch_stats"] = jax.tree.map(np.abs, trained["batch_stats"])
    path = str(tmp_path_factory.mktemp("published") / "mgca.safetensors")
    save_file(as_mgca(trained["params"], trained["batch_stats"]), path)
    return trained, path


def test_a_run_begins_with_what_was_published(checkpoint):
    trained, path = checkpoint
    state = state_of(settings(vision=path, text=path, heads=path), seed=1)
    jax.tree.map(np.testing.assert_array_equal, state.params["encoders"], trained["params"])
    jax.tree.map(np.testing.assert_array_equal, state.batch_stats, trained["batch_stats"])


def test_one_tower_alone_leaves_the_other_as_it_was(checkpoint):
    trained, path = checkpoint
    plain, given = state_of(settings()), state_of(settings(text=path))
    for name, want in (
        ("text_tower", trained["params"]),
        ("image_tower", plain.params["encoders"]),
    ):
        jax.tree.map(np.testing.assert_array_equal, given.params["encoders"][name], want[name])


def test_a_published_checkpoint_is_evaluated_without_training(checkpoint, tmp_path, monkeypatch):
    _, path = checkpoint
    monkeypatch.chdir(tmp_path)
    config = settings(vision=path, text=path, heads=path)
    config["eval"]["tasks"] = ("retrieval",)
    ours = ("vision", "text", "heads", "weights")
    flags = [f"--config.{k}={v}" for k, v in configs.flat(config) if v and k.startswith(ours)]
    (tmp_path / "mgca.py").write_text(
        "from configs import testing\n\n\ndef get_config():\n    config = testing.get_config()\n"
        "    config.vision, config.text = {'name': ''}, {'name': ''}\n"
        "    config.method, config.hyper, config.fine, config.steps = 'convirt', {}, False, 0\n"
        "    config.eval.tasks = ('retrieval',)\n    return config\n"
    )
    assert main.run(["--config", "mgca.py", "--workdir", "run", *flags]) == 0
    first = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert main.run(["--mode", "eval", "--checkpoint", "run"]) == 0
    again = json.loads((tmp_path / "run" / "eval" / "test" / "metrics.json").read_text())
    assert first["retrieval/i2t_r1"] == again["retrieval/i2t_r1"] and first["steps"] == 0
    assert first["params_sha256"] == again["params_sha256"]


def test_heads_of_another_kind_are_refused(checkpoint):
    config = settings(heads=checkpoint[1])
    config["heads"]["text_local"] = "norm"
    with pytest.raises(UserError, match="weights.heads is for heads of kind mlp"):
        configs.check(config)
