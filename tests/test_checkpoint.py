"""Checkpoints: what goes in comes out, a broken one is walked around, nothing fails in silence."""

import json
import shutil
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import struct

from plan_jax import checkpoint, parallel
from plan_jax.checkpoint import checksums
from plan_jax.types import UserError

CONFIG = {"method": "plan", "steps": 7, "optim": {"rate": 1e-3, "betas": (0.9, 0.99)}}


@struct.dataclass
class State:
    """A toy of everything that a training state can hold."""

    step: jax.Array
    params: dict
    opt_state: tuple
    batch_stats: dict
    memory: dict
    key: jax.Array


def toy(step=0, width=30, devices=1):
    """A state whose arrays do not compress, so that every byte of them lies on the disk."""
    keys = jax.random.split(jax.random.key(step), 3)
    params = {
        "vision": {"kernel": jax.random.normal(keys[0], (40, width)), "bias": jnp.zeros(width)},
        "text": {
            "half": jax.random.normal(keys[1], (50,), jnp.bfloat16),
            "flag": jnp.ones(3, bool),
        },
    }
    memory = {"importance": jax.random.normal(keys[2], (20,))}
    opt_state = optax.adamw(1e-3).init(params)
    state = State(jnp.int32(step), params, opt_state, {}, memory, keys[0])
    return parallel.replicate(state, parallel.make_mesh(devices))


def run(folder, steps=(1, 2, 3), **options):
    """A folder of checkpoints as a run leaves it."""
    manager = checkpoint.open_manager(folder, **options)
    for step in steps:
        checkpoint.save(manager, step, toy(step), {"next": step}, CONFIG)
    checkpoint.close(manager)
    return folder


def same(a, b):
    """Whether two trees agree bit for bit."""
    return checkpoint.fingerprint(a) == checkpoint.fingerprint(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Three whole checkpoints, to be copied before they are broken."""
    return run(tmp_path_factory.mktemp("whole") / "checkpoints")


@pytest.fixture
def copy(whole, tmp_path):
    """A copy of the three checkpoints."""
    return shutil.copytree(whole, tmp_path / "checkpoints")


def test_everything_comes_back(whole, capfd):
    manager = checkpoint.open_manager(whole)
    like = toy(0)
    back = checkpoint.restore(manager, like)
    assert same(back.state, toy(3))
    assert jax.tree.structure(back.state) == jax.tree.structure(like)
    assert jax.tree.map(lambda x: x.sharding, back.state) == jax.tree.map(
        lambda x: x.sharding, like
    )
    assert (back.step, back.data) == (3, {"next": 3})
    assert back.config == json.loads(json.dumps(CONFIG))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "data", [b"\x00\xff grain", {"worker": {"0": b"\x01"}, "n": np.int64(3)}, {}, [1, "a", None]]
)
def test_any_iterator_state_comes_back(tmp_path, data):
    manager = checkpoint.open_manager(tmp_path)
    config = {"a": {"b": 1}}
    checkpoint.save(manager, 0, {"params": {"a": jnp.ones(2)}}, data, config)
    checkpoint.close(manager)
    back = checkpoint.restore(checkpoint.open_manager(tmp_path), {"params": {"a": jnp.ones(2)}})
    assert back.data == data and back.config == {"a": {"b": 1}}


def test_from_one_device_to_eight_and_back(tmp_path):
    for devices, other in ((1, 8), (8, 1)):
        folder = tmp_path / str(devices)
        manager = checkpoint.open_manager(folder)
        checkpoint.save(manager, 5, toy(5, devices=devices), {}, CONFIG)
        checkpoint.close(manager)
        back = checkpoint.restore(checkpoint.open_manager(folder), toy(0, devices=other))
        assert same(back.state, toy(5))
        assert len(back.state.params["vision"]["kernel"].sharding.device_set) == other


def test_nothing_saved_is_none(tmp_path):
    assert checkpoint.restore(checkpoint.open_manager(tmp_path), toy()) is None


def test_state_may_be_donated_while_it_is_written(tmp_path):
    mesh = parallel.make_mesh(1)
    state = parallel.replicate({"params": {"a": jnp.zeros((1000, 1000))}}, mesh)
    step = parallel.parallelise(
        lambda s, b: (jax.tree.map(lambda x: x + b.mean(), s), {}), mesh, donate=True
    )
    batch = parallel.shard(np.ones(1, np.float32), mesh)
    manager = checkpoint.open_manager(tmp_path)
    for number in range(4):
        checkpoint.save(manager, number, state, {}, {})
        for _ in range(5):
            state, _ = step(state, batch)
    checkpoint.close(manager)
    back = checkpoint.restore(checkpoint.open_manager(tmp_path), state)
    assert back.step == 3 and (np.asarray(back.state["params"]["a"]) == 15).all()


def largest(folder):
    """The file of the folder that holds most bytes: an array."""
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate(at):
    largest(at).write_bytes(largest(at).read_bytes()[:200])


def flip_one_bit(at):
    raw = bytearray(largest(at).read_bytes())
    raw[len(raw) // 2] ^= 1
    largest(at).write_bytes(raw)


def clear(at):
    shutil.rmtree(at)
    at.mkdir()


BREAKS = {
    "truncated array": truncate,
    "one bit flipped": flip_one_bit,
    "deleted array": lambda at: largest(at).unlink(),
    "emptied array": lambda at: largest(at).write_bytes(b""),
    "emptied manifest": lambda at: (at / "state/manifest.ocdbt").write_bytes(b""),
    "emptied metadata": lambda at: (at / "state/_METADATA").write_bytes(b""),
    "emptied config": lambda at: (at / "config/metadata").write_bytes(b""),
    "deleted data": lambda at: shutil.rmtree(at / "data"),
    "empty folder": clear,
}


@pytest.mark.parametrize("how", BREAKS)
def test_a_broken_step_is_walked_around(copy, how, capfd):
    BREAKS[how](copy / "3")
    assert same(checkpoint.restore_params(copy)["params"], toy(2).params) or how == "deleted data"
    capfd.readouterr()
    manager = checkpoint.open_manager(copy)
    back = checkpoint.restore(manager, toy(0))
    out, err = capfd.readouterr()
    assert back.step == 2 and same(back.state, toy(2)) and back.data == {"next": 2}
    assert out == "" and err.count("\n") == 1, err
    assert err.startswith("checkpoint 3 is broken (") and err.endswith("; using step 2\n")
    assert (copy / "broken-3").is_dir()
    assert checkpoint.save(manager, 3, toy(3), {}, CONFIG)  # the name is free again
    checkpoint.close(manager)
    assert checkpoint.restore(checkpoint.open_manager(copy), toy(0)).step == 3


def test_all_broken_says_so(copy, capfd):
    for step in "123":
        truncate(copy / step)
    with pytest.raises(UserError, match="has no whole step; train again"):
        checkpoint.restore_params(copy)
    capfd.readouterr()
    assert checkpoint.restore(checkpoint.open_manager(copy), toy(0)) is None
    assert "there is no older one" in capfd.readouterr().err


def test_what_a_killed_save_leaves_is_swept(copy):
    (copy / "4.orbax-checkpoint-tmp").mkdir()
    manager = checkpoint.open_manager(copy)
    assert checkpoint.restore(manager, toy(0)).step == 3
    assert not list(copy.glob("*tmp*"))


def test_other_arrays_are_no_broken_file(copy):
    with pytest.raises(UserError, match=r"vision.bias \(30,\) where \(31,\) is expected; use ano"):
        checkpoint.restore(checkpoint.open_manager(copy), toy(0, width=31))
    assert sorted(at.name for at in copy.iterdir()) == ["1", "2", "3"]


def test_the_last_and_the_best_are_kept(tmp_path):
    manager = checkpoint.open_manager(tmp_path, keep=2, best_metric="cnr")
    for step, cnr in enumerate([0.5, float("nan"), 0.9, 0.7, None, 0.1]):
        metrics = None if cnr is None else {"cnr": cnr}
        checkpoint.save(manager, step, {"params": {"a": jnp.full(3, step)}}, {}, {}, metrics)
    assert not checkpoint.save(manager, 5, {"params": {"a": jnp.zeros(3)}}, {}, {})
    checkpoint.close(manager)
    assert sorted(at.name for at in tmp_path.iterdir()) == ["2", "4", "5"]
    assert checkpoint.restore_params(tmp_path, best="cnr")["step"] == 2
    assert checkpoint.restore_params(tmp_path)["step"] == 5
    assert checkpoint.restore_params(tmp_path, step=4)["params"]["a"].tolist() == [4, 4, 4]
    (tmp_path / "2" / "metrics" / "metrics").write_text("")
    assert checkpoint.restore_params(tmp_path, best="cnr")["step"] == 5
    checkpoint.open_manager(tmp_path, best_metric="cnr")
    assert (tmp_path / "broken-2").is_dir()


def test_weights_need_no_optimiser(whole, monkeypatch):
    for folder in (whole, whole.parent, whole / "3"):
        monkeypatch.chdir(whole.parent.parent)
        held = checkpoint.restore_params(folder.relative_to(whole.parent.parent))
        assert set(held) == {"params", "average", "batch_stats", "memory", "config", "step"}
        assert same(held["params"], toy(3).params) and same(held["memory"], toy(3).memory)
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(held["params"]))
        assert held["batch_stats"] == held["average"] == {} and held["step"] == 3
    assert checkpoint.restore_params(whole / "2")["step"] == 2
    assert checkpoint.read_config(whole)["optim"] == {"rate": 1e-3, "betas": [0.9, 0.99]}


@pytest.mark.parametrize(
    ("folder", "step", "sentence"),
    [
        ("nowhere", None, "checkpoint .*nowhere is not there; give the folder of a run"),
        ("", None, "holds no checkpoint; give the folder of a run"),
        ("checkpoints", 9, "has no step 9; use one of 1, 2, 3"),
    ],
)
def test_what_is_not_there(whole, tmp_path, folder, step, sentence):
    root = whole.parent if folder == "checkpoints" else tmp_path
    with pytest.raises(UserError, match=sentence):
        checkpoint.restore_params(root / folder, step)


def test_a_file_in_the_way(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used .*; choose another workdir"):
        checkpoint.open_manager(tmp_path / "file" / "checkpoints")


def test_an_error_in_the_background_surfaces(tmp_path, monkeypatch):
    manager = checkpoint.open_manager(tmp_path / "checkpoints")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", full)
    assert checkpoint.save(manager, 1, toy(1), {}, CONFIG)
    with pytest.raises(UserError, match="could not be written .*No space left.*free the disk"):
        checkpoint.save(manager, 2, toy(1), {}, CONFIG)
        checkpoint.close(manager)


def test_positions_of_other_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert checkpoint._mine(["a", "b"], 1) == "b"
    assert checkpoint._mine(["a", "a", "a"], 1) == "a"
    with pytest.raises(UserError, match="saved by 3 processes.* there are 2 now; resume with 3"):
        checkpoint._mine(["a", "b", "b"], 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int32", "bool", "uint8"])
def test_a_checksum_sees_every_element(dtype):
    rng = np.random.default_rng(0)
    value = jnp.asarray(rng.integers(0, 2, (3, 5)), dtype)
    plain = checksums.by_leaf({"a": value})
    for place in np.ndindex(value.shape):
        other = value.at[place].set(value[place] == 0)
        assert checksums.by_leaf({"a": other}) != plain
    assert checksums.by_leaf({"a": value[::-1]}) != plain
    assert checksums.by_leaf({"a": parallel.replicate(value)}) == plain


def test_names_are_the_same_on_disk(whole):
    held = ocp.StandardCheckpointer().metadata(whole / "3" / "state").item_metadata.tree
    assert checksums.difference(held, toy()) == ""
    assert checksums.difference(held, jax.eval_shape(lambda: toy())) == ""
    params = SimpleNamespace(shape=(2,))
    assert checksums.difference({"a": params}, {}) == "a (2,) where nothing is expected"
