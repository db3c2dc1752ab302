"""Checkpoints: a round trip is exact, a broken step is skipped, and every failure is reported."""

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
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
from plan_jax.checkpoint.silence import silence_orbax
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
CONFIG = {"method": "plan", "steps": 7, "optim": {"learning_rate": 1e-3, "betas": (0.9, 0.99)}}


@struct.dataclass
class State:
    """A small tree with everything that a training state can hold."""

    step: jax.Array
    params: dict
    opt_state: tuple
    batch_stats: dict
    memory: dict
    key: jax.Array


def make_state(step=0, width=30, devices=1):
    """Returns a state of arrays that do not compress, so that damage to the file hits them."""
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


def save_run(folder, steps=(1, 2, 3), config=CONFIG):
    """Writes a folder of checkpoints as a run leaves it, and returns it."""
    manager = checkpoint.open_manager(folder)
    for step in steps:
        checkpoint.save(manager, step, make_state(step), {"next": step}, config)
    checkpoint.close(manager)
    return folder


def is_identical(a, b):
    """Returns whether two trees agree bit for bit."""
    return checkpoint.fingerprint(a) == checkpoint.fingerprint(b)


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Three complete checkpoints, to be copied before they are damaged."""
    return save_run(tmp_path_factory.mktemp("complete") / "checkpoints")


@pytest.fixture
def damaged(complete, tmp_path):
    """A damaged of the three checkpoints, to be damaged."""
    return shutil.copytree(complete, tmp_path / "checkpoints")


def test_round_trip_is_exact(complete, capfd):
    manager = checkpoint.open_manager(complete)
    template = make_state(0)
    restored = checkpoint.restore(manager, template)
    assert is_identical(restored.state, make_state(3))
    assert jax.tree.structure(restored.state) == jax.tree.structure(template)
    assert jax.tree.map(lambda x: x.sharding, restored.state) == jax.tree.map(
        lambda x: x.sharding, template
    )
    assert (restored.step, restored.data) == (3, {"next": 3})
    assert restored.config == json.loads(json.dumps(CONFIG))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    "data", [b"\x00\xff grain", {"worker": {"0": b"\x01"}, "n": np.int64(3)}, {}, [1, "a", None]]
)
def test_round_trip_of_any_iterator_state(tmp_path, data):
    manager = checkpoint.open_manager(tmp_path)
    config = {"a": {"b": 1}}
    checkpoint.save(manager, 0, {"params": {"a": jnp.ones(2)}}, data, config)
    checkpoint.close(manager)
    restored = checkpoint.restore(checkpoint.open_manager(tmp_path), {"params": {"a": jnp.ones(2)}})
    assert restored.data == data and restored.config == {"a": {"b": 1}}


def test_restores_on_another_number_of_devices(tmp_path):
    for devices, new_devices in ((1, 8), (8, 1)):
        folder = tmp_path / str(devices)
        manager = checkpoint.open_manager(folder)
        checkpoint.save(manager, 5, make_state(5, devices=devices), {}, CONFIG)
        checkpoint.close(manager)
        restored = checkpoint.restore(
            checkpoint.open_manager(folder), make_state(0, devices=new_devices)
        )
        assert is_identical(restored.state, make_state(5))
        assert len(restored.state.params["vision"]["kernel"].sharding.device_set) == new_devices


def test_restore_of_an_empty_folder_is_none(tmp_path):
    assert checkpoint.restore(checkpoint.open_manager(tmp_path), make_state()) is None


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
    restored = checkpoint.restore(checkpoint.open_manager(tmp_path), state)
    assert restored.step == 3 and (np.asarray(restored.state["params"]["a"]) == 15).all()


def largest_file(folder):
    """Returns the file of most bytes in a folder, which holds an array."""
    return max((f for f in folder.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)


def truncate_array(folder):
    largest_file(folder).write_bytes(largest_file(folder).read_bytes()[:200])


def flip_one_bit(folder):
    raw = bytearray(largest_file(folder).read_bytes())
    raw[len(raw) // 2] ^= 1
    largest_file(folder).write_bytes(raw)


def replace_by_folder(path):
    path.unlink()
    path.mkdir()


def clear_folder(folder):
    shutil.rmtree(folder)
    folder.mkdir()


DAMAGES = {
    "truncated array": truncate_array,
    "one bit flipped": flip_one_bit,
    "deleted array": lambda folder: largest_file(folder).unlink(),
    "emptied array": lambda folder: largest_file(folder).write_bytes(b""),
    "emptied manifest": lambda folder: (folder / "state/manifest.ocdbt").write_bytes(b""),
    "emptied metadata": lambda folder: (folder / "state/_METADATA").write_bytes(b""),
    "emptied config": lambda folder: (folder / "config/metadata").write_bytes(b""),
    "folder in place of a file": lambda folder: replace_by_folder(folder / "state/_METADATA"),
    "deleted data": lambda folder: shutil.rmtree(folder / "data"),
    "empty folder": clear_folder,
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_broken_step_is_skipped(damaged, damage, capfd):
    DAMAGES[damage](damaged / "3")
    assert (
        is_identical(checkpoint.load_weights(damaged)["params"], make_state(2).params)
        or damage == "deleted data"
    )
    capfd.readouterr()
    manager = checkpoint.open_manager(damaged)
    restored = checkpoint.restore(manager, make_state(0))
    out, err = capfd.readouterr()
    assert (
        restored.step == 2
        and is_identical(restored.state, make_state(2))
        and restored.data == {"next": 2}
    )
    assert out == "" and err.count("\n") == 1, err
    assert err.startswith("checkpoint 3 is broken (") and err.endswith("; using step 2\n")
    assert (damaged / "broken-3").is_dir()
    assert checkpoint.save(manager, 3, make_state(3), {}, CONFIG)  # the number is free again
    checkpoint.close(manager)
    assert checkpoint.restore(checkpoint.open_manager(damaged), make_state(0)).step == 3


def test_all_steps_broken(damaged, capfd):
    for step in "123":
        truncate_array(damaged / step)
    with pytest.raises(
        UserError, match="has no complete step; train again, or pass another folder"
    ):
        checkpoint.load_weights(damaged)
    capfd.readouterr()
    assert checkpoint.restore(checkpoint.open_manager(damaged), make_state(0)) is None
    assert "there is no other one" in capfd.readouterr().err


def test_files_of_a_killed_save_are_removed(damaged):
    (damaged / "4.orbax-checkpoint-tmp").mkdir()
    manager = checkpoint.open_manager(damaged)
    assert checkpoint.restore(manager, make_state(0)).step == 3
    assert not list(damaged.glob("*tmp*"))


def test_other_arrays_are_not_a_broken_file(damaged):
    with pytest.raises(
        UserError, match=r"vision.bias \(30,\) where \(31,\) is expected; use another workdir"
    ):
        checkpoint.restore(checkpoint.open_manager(damaged), make_state(0, width=31))
    assert sorted(path.name for path in damaged.iterdir()) == ["1", "2", "3"]


def test_the_newest_and_the_best_steps_are_kept(tmp_path):
    manager = checkpoint.open_manager(tmp_path, keep=2, best_metric="cnr")
    for step, cnr in enumerate([0.5, float("nan"), 0.9, 0.7, None, 0.1]):
        metrics = None if cnr is None else {"cnr": cnr}
        checkpoint.save(manager, step, {"params": {"a": jnp.full(3, step)}}, {}, {}, metrics)
    assert not checkpoint.save(manager, 5, {"params": {"a": jnp.zeros(3)}}, {}, {})
    checkpoint.close(manager)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["2", "4", "5"]
    assert checkpoint.load_weights(tmp_path)["step"] == 5
    assert checkpoint.load_weights(tmp_path / "4")["params"]["a"].tolist() == [4, 4, 4]
    (tmp_path / "2" / "metrics" / "metrics").write_text("")
    checkpoint.open_manager(tmp_path, best_metric="cnr")
    assert (tmp_path / "broken-2").is_dir()


def test_metrics_are_added_to_a_step_that_stays_whole(tmp_path):
    manager = checkpoint.open_manager(tmp_path, keep=1, best_metric="cnr")
    for step in range(3):
        checkpoint.save(manager, step, {"params": {"a": jnp.full(3, step)}}, {}, {})
        manager.wait_until_finished()
        if step == 1:
            (tmp_path / "1" / "metrics.part").mkdir()  # of a process that was killed
            checkpoint.add_metrics(manager, 1, {"cnr": 0.5})
            checkpoint.add_metrics(manager, 1, {"cnr": 0.7})  # it has some already
    checkpoint.close(manager)
    # Step 1 is kept as the best one, and can still be read.
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]
    assert checkpoint.load_weights(tmp_path / "1")["params"]["a"].tolist() == [1, 1, 1]
    assert (tmp_path / "1" / "metrics" / "metrics").read_text() == '{"cnr": 0.5}'


def test_weights_are_loaded_without_the_optimiser(complete, monkeypatch):
    for folder in (complete, complete.parent, complete / "3"):
        monkeypatch.chdir(complete.parent.parent)
        weights = checkpoint.load_weights(folder.relative_to(complete.parent.parent))
        assert set(weights) == {"params", "ema_params", "batch_stats", "memory", "config", "step"}
        assert is_identical(weights["params"], make_state(3).params) and is_identical(
            weights["memory"], make_state(3).memory
        )
        assert all(isinstance(x, np.ndarray) for x in jax.tree.leaves(weights["params"]))
        assert weights["batch_stats"] == weights["ema_params"] == {} and weights["step"] == 3
    assert checkpoint.load_weights(complete / "2")["step"] == 2
    assert checkpoint.read_config(complete)["optim"] == {
        "learning_rate": 1e-3,
        "betas": [0.9, 0.99],
    }


@pytest.mark.parametrize(
    ("folder", "sentence"),
    [
        ("nowhere", "checkpoint .*nowhere does not exist; pass the folder of a run"),
        ("", "holds no checkpoint; pass the folder of a run"),
        ("checkpoints/\u00b2", "\u00b2 does not exist; pass the folder of a run"),
        ("checkpoints/9", "checkpoint .*checkpoints has no step 9; use one of 1, 2, 3"),
    ],
)
def test_missing_checkpoints(complete, tmp_path, folder, sentence):
    root = complete.parent if folder.startswith("checkpoints") else tmp_path
    with pytest.raises(UserError, match=sentence):
        checkpoint.load_weights(root / folder)


def test_a_checkpoint_of_0_1_is_refused(damaged):
    for step in "123":
        path = damaged / step / "config" / "metadata"
        about = json.loads(path.read_text())
        assert about.pop("format") == checkpoint.FORMAT
        path.write_text(json.dumps(about | {"version": "0.1.0"}))
    sentence = (
        "checkpoint .*/3 was written by plan_jax 0.1.0 in format 1, and this version reads format"
        " 2; train again, or use the version that wrote it"
    )
    # Its parameters and config fields have other names, which nobody needs to read about.
    template = {"params": {"image_tower": jnp.zeros(2)}}
    for read in (
        lambda: checkpoint.read_config(damaged),
        lambda: checkpoint.load_weights(damaged),
        lambda: checkpoint.restore(checkpoint.open_manager(damaged), template),
    ):
        with pytest.raises(UserError, match=sentence):
            read()
    assert sorted(path.name for path in damaged.iterdir()) == ["1", "2", "3"]


def test_a_file_in_place_of_the_folder(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="/checkpoints cannot be written .Not a dir.*; choose an"):
        checkpoint.open_manager(tmp_path / "file" / "checkpoints")


def test_an_error_in_the_background_surfaces(tmp_path, monkeypatch):
    manager = checkpoint.open_manager(tmp_path / "checkpoints")

    def raise_disk_full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ocp.StandardCheckpointHandler, "finalize", raise_disk_full)
    assert checkpoint.save(manager, 1, make_state(1), {}, CONFIG)
    with pytest.raises(UserError, match="could not be written .*No space left.*free the disk"):
        checkpoint.save(manager, 2, make_state(1), {}, CONFIG)
        checkpoint.close(manager)


SAVE_ON_A_FULL_DISK = """
import resource, sys
import numpy as np
from plan_jax import checkpoint
from plan_jax.types import UserError

rng = np.random.default_rng(0)
state = {"params": {str(i): rng.normal(size=9000) for i in range(40)}}
manager = checkpoint.open_manager(sys.argv[1], keep=1)
checkpoint.save(manager, 1, state, {}, {})
manager.wait_until_finished()
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]), -1))
try:
    checkpoint.save(manager, 2, state, {}, {})
    checkpoint.close(manager)
except UserError as error:
    sys.exit(str(error))
"""


@pytest.mark.parametrize("num_bytes", [100, 50_000])
def test_a_failed_save_is_one_line_and_keeps_the_last_checkpoint(tmp_path, num_bytes):
    """No line of orbax, of its threads or of those that the exit of Python finds abandoned."""
    command = [sys.executable, "-c", SAVE_ON_A_FULL_DISK, str(tmp_path), str(num_bytes)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    sentence = f"checkpoint could not be written to {tmp_path} (File too large); free the disk"
    assert run.stderr.startswith(sentence) and run.stderr.count("\n") == 1, run.stderr
    assert (run.stdout, run.returncode) == ("", 1)
    assert checkpoint.load_weights(tmp_path)["step"] == 1


def test_each_run_hides_the_warnings_of_orbax():
    """The first run ends with the filters as they were before it."""
    for _ in range(2):
        with warnings.catch_warnings(record=True) as rows:
            warnings.simplefilter("always")
            silence_orbax()
            warnings.warn("coroutine 'run_sync.<locals>' was never awaited", stacklevel=1)
            assert not rows


def test_positions_of_another_number_of_processes(monkeypatch):
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    assert checkpoint._select_position(["a", "b"], 1) == "b"
    assert checkpoint._select_position(["a", "a", "a"], 1) == "a"
    with pytest.raises(UserError, match="saved by 3 processes.* there are 2 now; resume with 3"):
        checkpoint._select_position(["a", "b", "b"], 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int32", "bool", "uint8"])
def test_a_checksum_depends_on_every_element(dtype):
    rng = np.random.default_rng(0)
    value = jnp.asarray(rng.integers(0, 2, (3, 5)), dtype)
    original = checksums.leaf_checksums({"a": value})
    for index in np.ndindex(value.shape):
        changed = value.at[index].set(value[index] == 0)
        assert checksums.leaf_checksums({"a": changed}) != original
    assert checksums.leaf_checksums({"a": value[::-1]}) != original
    assert checksums.leaf_checksums({"a": parallel.replicate(value)}) == original


def test_names_are_the_same_on_disk(complete):
    metadata = ocp.StandardCheckpointer().metadata(complete / "3" / "state").item_metadata.tree
    assert checksums.describe_difference(metadata, make_state()) == ""
    assert checksums.describe_difference(metadata, jax.eval_shape(make_state)) == ""
    leaf = SimpleNamespace(shape=(2,))
    assert checksums.describe_difference({"a": leaf}, {}) == "a (2,) where nothing is expected"


# Steps that cannot be read, and are not broken for that -------------------------------------------

PASSING = {
    "memory": MemoryError("Unable to allocate 3.00 GiB"),
    "memory of the device": RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes"),
    "open files": ValueError("Failed to open: Too many open files [os_error_code='24']"),
    "locale": RuntimeError("Unable to cast Python instance of type <class 'str'> to C++ type"),
    "library": ImportError("libzstd.so.1: cannot open shared object file"),
    "disk": OSError(5, "Input/output error"),
}


@pytest.mark.parametrize("name", PASSING)
def test_a_passing_failure_breaks_no_checkpoint(damaged, name, monkeypatch, capfd):
    """All files are whole, so whatever stops orbax is not the fault of the checkpoint."""

    def fail(*_, **__):
        raise PASSING[name]

    monkeypatch.setattr(ocp.PyTreeCheckpointer, "restore", fail)
    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", fail)
    reason = re.escape(str(PASSING[name]).removeprefix("[Errno 5] ").partition(" [")[0])
    reason = reason.removeprefix("Failed\\ to\\ open:\\ ")
    sentence = f"/3 cannot be read .{reason}.*, which does not prove it broken; remove the cause"
    for read in (
        lambda: checkpoint.load_weights(damaged),
        lambda: checkpoint.load_weights(damaged / "3"),
        lambda: checkpoint.restore(checkpoint.open_manager(damaged), make_state(0)),
    ):
        with pytest.raises(UserError, match=sentence):
            read()
    assert sorted(path.name for path in damaged.iterdir()) == ["1", "2", "3"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", ["config/metadata", "data/metadata", "state/_METADATA"])
def test_a_file_without_permission_breaks_no_checkpoint(damaged, name, monkeypatch):
    read_bytes = Path.read_bytes

    def refuse(path):
        if path == damaged / "3" / name:
            raise PermissionError(13, "Permission denied", str(path))
        return read_bytes(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(UserError, match="/3 cannot be read .Permission denied.*remove the cause"):
        checkpoint.open_manager(damaged)
    if name == "config/metadata":
        with pytest.raises(UserError, match="/3 cannot be read .Permission denied"):
            checkpoint.read_config(damaged)
    assert sorted(path.name for path in damaged.iterdir()) == ["1", "2", "3"]


def test_arrays_that_cannot_be_opened_break_no_checkpoint(damaged):
    """Orbax fails by an error of its own; the reason is that of the second look at the files."""
    (damaged / "3/state/manifest.ocdbt").unlink()
    (damaged / "3/state/manifest.ocdbt").symlink_to("manifest.ocdbt")
    with pytest.raises(UserError, match="/3 cannot be read .Too many levels of symbolic links"):
        checkpoint.load_weights(damaged)


def test_arrays_in_a_folder_without_permission_break_no_checkpoint(damaged, monkeypatch):
    """To orbax the files in it are missing, and to a search for files the folder is empty."""
    scandir = os.scandir

    def refuse(path):
        if Path(path) == damaged / "3/state/d":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    largest_file(damaged / "3/state/d").rename(damaged / "3/hidden")
    monkeypatch.setattr("os.scandir", refuse)
    with pytest.raises(UserError, match="/3 cannot be read .Permission denied"):
        checkpoint.load_weights(damaged)


def test_a_folder_without_permission(damaged, monkeypatch):
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir", refuse)
    for read in (checkpoint.load_weights, checkpoint.open_manager):
        with pytest.raises(UserError, match="cannot be read .Permission denied.; remove the cause"):
            read(damaged)


@pytest.mark.parametrize(
    ("old", "new"),
    [("NamedSharding", "NamedShardinf"), ("partition_spec", "partition_spdc"), ("cGFy", "cGFz")],
)
def test_a_wrong_character_in_the_places_of_arrays(damaged, old, new):
    """One of many equal descriptions differs, or has the name of no array."""
    path = damaged / "3/state/_sharding"
    path.write_text(path.read_text().replace(old, new, 1))
    assert checkpoint.restore(checkpoint.open_manager(damaged), make_state(0)).step == 2
    assert (damaged / "broken-3").exists()


def test_content_that_means_nothing(damaged, capfd):
    """It is JSON, but orbax cannot restore: no checksum proves that the step is broken."""
    path = damaged / "3/state/_sharding"
    path.write_text(path.read_text().replace("NamedSharding", "NamedShardinf"))
    with pytest.raises(UserError, match="/3 cannot be read .*does not prove it broken; remove the"):
        checkpoint.restore(checkpoint.open_manager(damaged), make_state(0))
    assert sorted(path.name for path in damaged.iterdir()) == ["1", "2", "3"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("content", ["[]", '"plan"', "3"])
def test_a_config_that_is_no_object_is_broken(damaged, content):
    (damaged / "3/config/metadata").write_text(content)
    assert checkpoint.read_config(damaged)["steps"] == CONFIG["steps"]
    assert checkpoint.restore(checkpoint.open_manager(damaged), make_state(0)).step == 2
    assert (damaged / "broken-3").exists()


def test_memory_that_is_short_once_breaks_no_checkpoint(damaged, monkeypatch, capfd):
    """An older step, which is read next, would fit; the newest is still good."""
    restore, errors = ocp.StandardCheckpointer.restore, [PASSING["memory of the device"]]

    def fail_once(*arguments, **options):
        if errors:
            raise errors.pop()
        return restore(*arguments, **options)

    monkeypatch.setattr(ocp.StandardCheckpointer, "restore", fail_once)
    with pytest.raises(UserError, match="/3 cannot be read .RESOURCE_EXHAUSTED.*remove the cause"):
        checkpoint.restore(checkpoint.open_manager(damaged), make_state(0))
    assert sorted(path.name for path in damaged.iterdir()) == ["1", "2", "3"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("config/metadata", "0.001", "0.003"),
        ("config/metadata", "steps", "stops"),
        ("data/metadata", "3}", "7}"),
        ("state/_METADATA", "kernel", "kornel"),
    ],
)
def test_a_wrong_character_in_valid_json(damaged, name, old, new):
    """A checksum finds what a parser does not: a digit, a letter of a name."""
    path = damaged / "3" / name
    content = path.read_text()
    path.write_text(content.replace(old, new))
    assert path.read_text() != content and json.loads(path.read_text())
    restored = checkpoint.restore(checkpoint.open_manager(damaged), make_state(0))
    assert (restored.step, restored.data) == (2, {"next": 2})
    assert (damaged / "broken-3").exists()


def test_a_checkpoint_without_checksums_of_its_json(damaged):
    """The first checkpoints of this format have none."""
    path = damaged / "3/config/metadata"
    about = json.loads(path.read_text())
    del about["checksum"], about["data_checksum"]
    path.write_text(json.dumps(about))
    assert checkpoint.restore(checkpoint.open_manager(damaged), make_state(0)).step == 3


# Reading while the run trains ---------------------------------------------------------------------


def replace_step(folder, step, is_partial=False):
    """Does what a run with `keep=1` does: the next step appears, and then this one is deleted."""
    shutil.copytree(folder / str(step), folder / str(step + 1))
    shutil.rmtree(folder / str(step) / "state" if is_partial else folder / str(step))


@pytest.mark.parametrize("is_partial", [False, True])
@pytest.mark.parametrize("num_replacements", [1, 5])
def test_a_step_that_is_replaced_is_not_broken(
    damaged, is_partial, num_replacements, monkeypatch, capfd
):
    """Only steps that still exist can be broken; the newest is read instead, without a word."""
    read_weights = checkpoint._read_weights
    newest = 3 + num_replacements

    def read_slowly(step_folder):
        if int(step_folder.name) < newest:
            replace_step(damaged, int(step_folder.name), is_partial)
        return read_weights(step_folder)

    monkeypatch.setattr(checkpoint, "_read_weights", read_slowly)
    assert checkpoint.load_weights(damaged)["step"] == newest
    assert capfd.readouterr() == ("", "")


def test_a_named_step_that_is_deleted(damaged, monkeypatch):
    def read_slowly(step_folder):
        replace_step(damaged, 3)
        return (step_folder / "config/metadata").read_bytes()

    monkeypatch.setattr(checkpoint, "_read_weights", read_slowly)
    with pytest.raises(UserError, match="has no step 3; use one of 1, 2, 4"):
        checkpoint.load_weights(damaged / "3")


def test_steps_that_are_replaced_faster_than_they_are_read(damaged, monkeypatch):
    def read_slowly(step_folder):
        replace_step(damaged, int(step_folder.name))
        return (step_folder / "config/metadata").read_bytes()

    monkeypatch.setattr(checkpoint, "_read_weights", read_slowly)
    monkeypatch.setattr(checkpoint, "MAX_READS", 5)
    with pytest.raises(UserError, match="is replaced by its run before it can be read; wait for"):
        checkpoint.load_weights(damaged)


# What else lies in the folder ---------------------------------------------------------------------


def test_files_and_folders_that_are_no_steps(damaged):
    """A number in another script, a leading zero, and a file whose name is a number."""
    for name in ("\u0664", "\u00b2", "007", "3.5", "-1", "best"):
        (damaged / name).mkdir()
    (damaged / "9").write_text("notes")
    names = {path.name for path in damaged.iterdir()}
    manager = checkpoint.open_manager(damaged)
    assert checkpoint.restore(manager, make_state(0)).step == 3
    assert checkpoint.load_weights(damaged)["step"] == 3
    assert checkpoint.save(manager, 4, make_state(4), {}, CONFIG)
    checkpoint.close(manager)
    assert {path.name for path in damaged.iterdir()} == names - {"1"} | {"4"}


def test_a_step_whose_deletion_is_interrupted_is_no_broken_one(tmp_path, monkeypatch, capfd):
    """A run that is killed while it deletes an old step deletes the rest of it when it resumes."""

    def kill(folder):
        (folder / "1/config/metadata").unlink()
        raise KeyboardInterrupt

    manager = checkpoint.open_manager(tmp_path, keep=1)
    for step in (1, 2):
        checkpoint.save(manager, step, make_state(step), {}, CONFIG)
    manager.wait_until_finished()
    monkeypatch.setattr("shutil.rmtree", kill)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.close(manager)
    monkeypatch.undo()
    assert (tmp_path / ".deleted/1").is_dir()
    assert checkpoint.load_weights(tmp_path)["step"] == 2
    assert checkpoint.restore(checkpoint.open_manager(tmp_path), make_state(0)).step == 2
    assert [path.name for path in tmp_path.iterdir()] == ["2"]
    assert capfd.readouterr() == ("", "")


def test_old_steps_do_not_fill_the_disk(tmp_path):
    """What a run does not keep is deleted while it trains, and not only at its end."""
    manager = checkpoint.open_manager(tmp_path, keep=1)
    for step in range(4):
        checkpoint.save(manager, step, {"params": {"a": jnp.ones(2)}}, {}, {})
        manager.wait_until_finished()
        steps = [path.name for path in tmp_path.glob(".deleted/*")]
        assert steps == ([str(step - 1)] if step else [])
    checkpoint.close(manager)
    assert [path.name for path in tmp_path.iterdir()] == ["3"]


@pytest.mark.parametrize(
    "error",
    [
        jax.errors.JaxRuntimeError("UNAVAILABLE: barrier timed out, connection reset"),
        ValueError("UNAVAILABLE: Gloo AllGather failed: connection reset"),  # in the background
    ],
)
def test_a_lost_host_is_not_a_full_disk(error, tmp_path, monkeypatch):
    def lose_host(*_, **__):
        raise error

    manager, state = checkpoint.open_manager(tmp_path), make_state(1)
    monkeypatch.setattr(manager, "save", lose_host)
    with pytest.raises(UserError, match="could not be written to .*UNAVAILABLE.*; free the disk"):
        checkpoint.save(manager, 1, state, {}, CONFIG)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(parallel, "gather_strings", lambda text: [text, text])
    monkeypatch.setattr(parallel, "to_host", lambda tree: tree)
    with pytest.raises(UserError, match="another host of this run has ended .*repeat the command"):
        checkpoint.save(manager, 1, state, {}, CONFIG)


def test_a_broken_step_that_cannot_be_renamed(damaged, monkeypatch):
    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    flip_one_bit(damaged / "3")
    with pytest.raises(UserError, match="broken-3 cannot be written .Read-only file system"):
        checkpoint.restore(checkpoint.open_manager(damaged), make_state(0))
