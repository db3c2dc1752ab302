"""Runs at an address: whatever happens, what is there resumes elsewhere with the same steps."""

import contextlib
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import portpicker
import pytest
from bucket import BucketFileSystem
from test_checkpoint import CONFIG, flip_one_bit, is_identical, make_state
from test_checkpoint_copies import contents, make_run

from plan_jax import checkpoint, storage
from plan_jax.checkpoint import address_lock, mirror
from plan_jax.checkpoint.address_lock import AddressLock
from plan_jax.checkpoint.fetch import fetch_source
from plan_jax.checkpoint.mirror import open_run
from plan_jax.storage import place as places
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def settings(tmp_path, monkeypatch):
    monkeypatch.setattr(places, "PAUSE", 0.0)
    monkeypatch.setattr(mirror, "SECONDS", 0.2)
    monkeypatch.setattr(address_lock, "SETTLE", 0.0)
    monkeypatch.setattr(address_lock, "BEAT", 0.2)
    monkeypatch.setattr(BucketFileSystem, "failures", [])
    use_host(monkeypatch, tmp_path, 1)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of three steps, to be copied before it is changed."""
    return make_run(tmp_path_factory.mktemp("finished") / "run")


@pytest.fixture
def address(tmp_path):
    return f"bucket://{tmp_path}/bucket/run"


@pytest.fixture
def uploaded(finished, address, tmp_path):
    """The address of a run of three steps, by another host."""
    with pytest.MonkeyPatch.context() as patch:
        use_host(patch, tmp_path, 0)
        write_run(address, finished)
    return address


def use_host(monkeypatch, tmp_path, number):
    """Gives this process the disk of another host."""
    monkeypatch.setenv("PLAN_JAX_CACHE", str(tmp_path / f"host_{number}"))


def objects(address):
    """Returns the bytes of all objects below an address, without the lists of checksums."""
    folder = Path(address.removeprefix("bucket://"))
    files = contents(folder)
    return {name: x for name, x in files.items() if not name.endswith("uploaded.json")}


def write_run(address, source, steps=(1, 2, 3)):
    with open_run(address) as run:
        for path in source.iterdir():
            if path.name == "checkpoints":
                for step in steps:
                    shutil.copytree(path / str(step), run / f"checkpoints/{step}")
            elif path.is_dir():
                shutil.copytree(path, run / path.name)
            elif path.name != ".lock":
                run.mkdir(exist_ok=True)
                shutil.copy2(path, run)


def save(run, step, keep=3):
    manager = checkpoint.open_manager(run / "checkpoints", keep)
    checkpoint.save(manager, step, make_state(step), {"next": step}, CONFIG)
    checkpoint.close(manager)


def restore(run):
    manager = checkpoint.open_manager(run / "checkpoints")
    restored = checkpoint.restore(manager, jax.tree.map(jax.numpy.zeros_like, make_state(3)))
    checkpoint.close(manager)
    assert is_identical(restored.state, make_state(restored.step))
    return restored.step


def wait_for(condition):
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# A run and its copy ------------------------------------------------------------------------------


def test_a_local_run_is_its_own_folder(tmp_path):
    with open_run(tmp_path / "run") as run:
        assert run == tmp_path / "run"
    assert not list(tmp_path.iterdir())


def test_a_run_resumes_on_another_host_bit_for_bit(finished, uploaded, tmp_path, capsys):
    assert objects(uploaded) == contents(finished)
    with open_run(uploaded) as run:
        resumed = contents(run)
        assert restore(run) == 3
    expected = contents(finished)
    del expected["tensorboard/events"]  # nothing reads it
    assert resumed == expected
    assert run.is_relative_to(tmp_path / "host_1")
    assert capsys.readouterr().err == f"run {run} is copied to {uploaded}\n"


def test_steps_appear_at_the_address_while_a_run_trains(address, tmp_path):
    folder = Path(address.removeprefix("bucket://"))
    with open_run(address) as run:
        for step in range(1, 6):
            save(run, step, keep=2)
            (run / "metrics.jsonl").write_text(f'{{"step": {step}}}\n')
            wait_for(lambda step=step: (folder / f"checkpoints/{step}/config/metadata").exists())
        wait_for(lambda: not (folder / "checkpoints/3/config/metadata").exists())
    assert {name.split("/")[1] for name in objects(address) if "/" in name} == {"4", "5"}
    assert not (run.parent / "hold").exists()
    assert not (folder / ".lock").exists()


def test_rows_of_metrics_arrive_before_their_step(address, finished, monkeypatch):
    monkeypatch.setattr(BucketFileSystem, "log", [])
    write_run(address, finished)
    names = [name for action, name in BucketFileSystem.log if action == "write"]
    assert names.index("metrics.jsonl") < names.index("_METADATA")


def test_what_is_equal_is_neither_fetched_nor_uploaded_again(uploaded, monkeypatch):
    for _ in range(2):
        monkeypatch.setattr(BucketFileSystem, "log", [])
        with open_run(uploaded) as run:
            assert restore(run) == 3
    names = {name for _, name in BucketFileSystem.log}
    assert names <= {".lock", "config.json", "metrics.jsonl", "uploaded.json", "events"}


def test_metrics_that_a_step_gets_later_are_added(uploaded):
    with open_run(uploaded) as run:
        manager = checkpoint.open_manager(run / "checkpoints", best_metric="cnr")
        checkpoint.add_metrics(manager, 3, {"cnr": 0.5})
        checkpoint.close(manager)
    assert objects(uploaded)["checkpoints/3/metrics/metrics"] == b'{"cnr": 0.5}'
    shutil.rmtree(run)
    with open_run(uploaded) as run:
        assert (run / "checkpoints/3/metrics/metrics").read_text() == '{"cnr": 0.5}'


def test_a_step_that_is_saved_again_replaces_the_other(uploaded, finished):
    with open_run(uploaded) as run:
        shutil.rmtree(run / "checkpoints/3")
        manager = checkpoint.open_manager(run / "checkpoints")
        checkpoint.save(manager, 3, make_state(3), {"next": 9}, CONFIG)
        checkpoint.close(manager)
        new = contents(run / "checkpoints/3")
    names = {f"checkpoints/3/{name}": content for name, content in new.items()}
    assert names.items() <= objects(uploaded).items()
    assert set(names) == {name for name in objects(uploaded) if name.startswith("checkpoints/3/")}


def test_a_broken_step_is_not_uploaded(address, finished, capsys):
    with open_run(address) as run:
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns(".lock"))
        (run / "checkpoints/3/state/_METADATA").unlink()
    assert not any(name.startswith("checkpoints/3/") for name in objects(address))


HOSTS = """
import sys
sys.path.insert(0, "tests")
import jax, numpy as np
import bucket
from plan_jax import checkpoint, command, parallel, storage
from plan_jax.checkpoint import address_lock
from plan_jax.checkpoint.mirror import open_run
from plan_jax.types import UserError

def make_state(step):
    return parallel.replicate({"a": np.array([-0.0, step, np.nan], np.float32), "b": np.int32(3)})

def run():
    parallel.initialize()
    address_lock.SETTLE = 0.0
    for step in (1, 2):
        with open_run(sys.argv[1]) as folder:
            assert folder.parent.exists() == parallel.is_main()
            manager = checkpoint.open_manager(folder / "checkpoints")
            restored = checkpoint.restore(manager, make_state(5))
            assert (restored.step if restored else 0) == step - 1
            if restored:
                prints = map(checkpoint.fingerprint, (restored.state, make_state(1)))
                assert len(set(prints)) == 1
                assert restored.data == {"host": jax.process_index()}
                assert restored.state["a"].sharding == make_state(1)["a"].sharding
            data = {"host": jax.process_index()} if step == 1 else {"next": 2}
            saves = checkpoint.save(manager, step, make_state(step), data, {})
            assert saves == parallel.is_main()
            checkpoint.close(manager)
            if parallel.is_main():
                (folder / "config.json").touch()
    try:
        with open_run(sys.argv[1]):
            parallel.ask_main(lambda: storage.find_place("workdir", sys.argv[1]).write(
                ".lock", b'{"pid": 7, "host": "other", "token": "x"}'))
    except UserError as error:
        print(error)

parallel.leave(command.run(run))
"""


def test_the_main_one_of_two_hosts_has_the_run(address, tmp_path):
    """Each has a disk of its own; what the first cannot upload, both say."""
    port = portpicker.pick_unused_port()
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    hosts = [
        subprocess.Popen(
            [sys.executable, "-c", HOSTS, address],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={
                **os.environ,
                **cluster,
                "JAX_PROCESS_ID": str(index),
                "PLAN_JAX_CACHE": str(tmp_path / f"host_{index + 2}"),
            },
        )
        for index in range(2)
    ]
    outputs = [host.communicate(timeout=300) for host in hosts]
    assert [host.returncode for host in hosts] == [0, 0], outputs
    sentence = f"run {address} is not copied completely: .* is in use by process 7 on other"
    assert all(re.search(sentence, out.splitlines()[-1]) for out, _ in outputs), outputs
    assert not list(tmp_path.glob("host_3/*"))
    storage.find_place("workdir", address).delete([".lock"])
    with open_run(address) as run:
        manager = checkpoint.open_manager(run / "checkpoints")
        template = {"a": jax.numpy.zeros(3), "b": jax.numpy.int32(0)}
        restored = checkpoint.restore(manager, template)
        checkpoint.close(manager)
    assert (restored.step, restored.data, restored.state["a"][1]) == (2, {"next": 2}, 2)


# Kills and failures ------------------------------------------------------------------------------

UPLOAD = """
import shutil, sys
sys.path.insert(0, "tests")
from bucket import BucketFileSystem
from plan_jax.checkpoint import address_lock, mirror
address_lock.SETTLE, mirror.SECONDS = 0.0, 0.01
put = BucketFileSystem._do
def count(self, action, path):
    print(action, flush=True)
    return put(self, action, path)
BucketFileSystem._do, BucketFileSystem.pause = count, 0.0005
with mirror.open_run(sys.argv[1]) as run:
    source = sys.argv[2]
    shutil.copytree(source, run, ignore=shutil.ignore_patterns(".lock", "checkpoints"))
    for step in (1, 2, 3):
        shutil.copytree(f"{source}/checkpoints/{step}", f"{run}/checkpoints/{step}.part")
        shutil.move(f"{run}/checkpoints/{step}.part", f"{run}/checkpoints/{step}")
"""


def upload_until(lines, address, finished, cache):
    """Kills a process that uploads a run after a number of writes; returns whether it lived."""
    process = subprocess.Popen(
        [sys.executable, "-c", UPLOAD, address, str(finished)],
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PLAN_JAX_CACHE": str(cache)},
    )
    for _ in range(lines):
        if not process.stdout.readline():
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()


@pytest.mark.parametrize("lines", [25, 40])
def test_a_killed_upload_leaves_whole_steps(address, finished, tmp_path, lines, capsys):
    upload_until(lines, address, finished, tmp_path / "killed")
    with open_run(address) as run:
        steps = sorted(int(path.name) for path in run.glob("checkpoints/*"))
        for step in steps:
            assert contents(run / f"checkpoints/{step}") == contents(
                finished / f"checkpoints/{step}"
            )
        if steps:
            assert restore(run) == max(steps)
        # Training goes on from there.
        for name in ("checkpoints", "tensorboard"):
            shutil.rmtree(run / name, ignore_errors=True)
        shutil.copytree(finished, run, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    assert objects(address) == contents(finished)
    # Only here, and not in a bucket, can the kill leave a part of a step's last file.
    error = capsys.readouterr().err
    assert "broken" not in error.replace("is broken (config/metadata has", "")


def test_an_upload_that_fails_does_not_end_the_training(address, finished, monkeypatch, capsys):
    error = OSError(errno.EIO, os.strerror(errno.EIO))
    with open_run(address) as run:
        BucketFileSystem.failures += [error] * 100
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns(".lock"))
        wait_for(lambda: not BucketFileSystem.failures)
        wait_for(lambda: (Path(address[9:]) / "checkpoints/1/config/metadata").exists())
    assert objects(address) == contents(finished)
    assert "not copied, to be tried again: bucket://" in capsys.readouterr().err


def test_an_upload_that_fails_forever_is_one_sentence_and_loses_nothing(
    address, finished, monkeypatch
):
    def fail(self, *arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    put = BucketFileSystem.put_file
    sentence = "run bucket://.* is not copied completely: .*Input/output error.*; it is in"
    with pytest.raises(UserError, match=sentence) as error, open_run(address) as run:
        monkeypatch.setattr(BucketFileSystem, "put_file", fail)
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns(".lock"))
    assert "\n" not in str(error.value)
    # The same command has all steps, and copies them.
    monkeypatch.setattr(BucketFileSystem, "put_file", put)
    with open_run(address) as run:
        assert restore(run) == 3
    assert objects(address).items() >= contents(finished).items()


def test_an_address_that_cannot_be_written_is_refused_before_the_training(tmp_path):
    (tmp_path / "bucket").write_text("a file")
    with (
        pytest.raises(UserError, match="run/.lock cannot be read .Not a directory"),
        open_run(f"bucket://{tmp_path}/bucket/run"),
    ):
        raise AssertionError("the body must not begin")


def test_a_mistake_leaves_nothing_at_the_address(address):
    with pytest.raises(UserError, match="mistake"), open_run(address):
        raise UserError("mistake")
    assert objects(address) == {}


def test_a_run_that_fails_is_copied_first(address, finished):
    with pytest.raises(KeyboardInterrupt), open_run(address) as run:
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns(".lock"))
        raise KeyboardInterrupt
    assert objects(address) == contents(finished)


def test_the_address_counts_if_another_host_went_further(uploaded, tmp_path, monkeypatch):
    with open_run(uploaded) as run:
        pass
    with monkeypatch.context() as patch:
        use_host(patch, tmp_path, 2)
        with open_run(uploaded) as other:
            save(other, 4)
            save(other, 5)
            (other / "metrics.jsonl").write_text('{"step": 5}\n')
    save(run, 4)  # a step that this host did not upload
    with open_run(uploaded) as run:
        assert contents(run / "checkpoints") == contents(other / "checkpoints")
        assert restore(run) == 5 and (run / "metrics.jsonl").read_text() == '{"step": 5}\n'


def test_steps_that_were_not_uploaded_go_on(uploaded):
    with open_run(uploaded) as run:
        pass
    save(run, 4)
    with open_run(uploaded) as run:
        assert restore(run) == 4
    assert "checkpoints/4/config/metadata" in objects(uploaded)


def test_a_run_that_was_deleted_begins_anew(uploaded, capsys):
    with open_run(uploaded) as run:
        pass
    shutil.rmtree(uploaded.removeprefix("bucket://"))
    with open_run(uploaded) as run:
        assert not run.exists()
    # Should that have been a mistake, the steps are still there.
    assert (run.parent / "replaced/3/config/metadata").exists()
    assert "step 3 of this host does not continue the run at bucket://" in capsys.readouterr().err


def fail_to_fetch(address, monkeypatch):
    """Opens a run while the reads of its bucket fail."""

    def fail(self, path, *arguments, **options):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(BucketFileSystem, "get_file", fail)
        with pytest.raises(UserError, match="cannot be read .Input/output"), open_run(address):
            raise AssertionError("the body must not begin")


def test_a_fetch_that_fails_leaves_the_steps_of_this_host(uploaded, tmp_path, monkeypatch):
    with open_run(uploaded) as run:
        pass
    with monkeypatch.context() as patch:
        use_host(patch, tmp_path, 2)
        with open_run(uploaded) as other:
            save(other, 4)
    save(run, 5)
    before = contents(run)

    fail_to_fetch(uploaded, monkeypatch)
    assert contents(run) == before
    with open_run(uploaded) as run:
        assert restore(run) == 4
    assert (run.parent / "replaced/5/config/metadata").exists()


@pytest.mark.parametrize("steps", [(3,), (1, 2, 3)])
def test_damaged_checksums_at_the_address_cost_no_step_of_this_host(uploaded, steps, capsys):
    with open_run(uploaded) as run:
        pass
    folder = Path(uploaded.removeprefix("bucket://"))
    for step in steps:
        (folder / f"checkpoints/{step}/uploaded.json").write_text("[]")
    save(run, 4)  # which could not be uploaded
    with open_run(uploaded) as run:
        assert restore(run) == 4
    assert "checkpoints/3 is broken (uploaded.json is not what" in capsys.readouterr().err
    shutil.rmtree(run.parent)
    with open_run(uploaded) as run:
        assert {path.name for path in run.glob("checkpoints/?")} >= {"2", "3", "4"}
    assert "broken" not in capsys.readouterr().err


# Damage at the address ---------------------------------------------------------------------------


def newest_array(address, step):
    folder = Path(address.removeprefix("bucket://")) / f"checkpoints/{step}"
    return max(folder.rglob("*/d/*"), key=lambda path: path.stat().st_size)


FAULTS = {
    "has another checksum": lambda address: flip_one_bit(
        Path(address.removeprefix("bucket://")) / "checkpoints/3/state"
    ),
    "has 100 of": lambda address: os.truncate(newest_array(address, 3), 100),
    "is missing": lambda address: newest_array(address, 3).unlink(),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_an_older_step_is_taken_and_said_so(uploaded, fault, capsys):
    FAULTS[fault](uploaded)
    with open_run(uploaded) as run:
        assert restore(run) == 2
        save(run, 3)
    error = capsys.readouterr().err
    pattern = (
        rf"checkpoint bucket://\S+/run/checkpoints/3 is broken \(.* {fault}.*\); using step 2\n"
    )
    assert len(re.findall(pattern, error)) == 1, error
    with open_run(uploaded) as run:
        assert restore(run) == 3
    assert "broken" not in capsys.readouterr().err


def test_a_read_that_fails_sets_nothing_aside(uploaded, monkeypatch):
    before = objects(uploaded)

    fail_to_fetch(uploaded, monkeypatch)
    assert objects(uploaded) == before
    with open_run(uploaded) as run:
        assert restore(run) == 3


# The lock ----------------------------------------------------------------------------------------


def owner(**changes):
    values = {"pid": os.getpid(), "host": os.uname().nodename, "time": time.time(), "token": "x"}
    return json.dumps(values | changes).encode()


def test_a_second_run_is_refused(address, tmp_path, monkeypatch):
    with open_run(address):
        for host in (1, 2):
            use_host(monkeypatch, tmp_path, host)
            sentence = f"is in use by process {os.getpid()} on .*; pass another --workdir"
            with pytest.raises(UserError, match=sentence), open_run(address):
                raise AssertionError("the body must not begin")


@pytest.mark.parametrize(
    "changes",
    [{"pid": 2**22 + 1}, {"host": "other", "time": 0}, {"host": "other"}, {"pid": "none"}],
)
def test_the_lock_of_a_process_that_has_ended_is_taken(address, changes, monkeypatch):
    place = storage.find_place("workdir", address)
    place.write(".lock", owner(**changes))
    with AddressLock(place) as lock:
        lock.require()
        assert json.loads(place.read(".lock"))["token"] == lock.token
    assert place.read(".lock") is None


def test_a_process_of_another_host_that_still_writes_keeps_the_lock(address, capsys):
    place, ended = storage.find_place("workdir", address), threading.Event()
    place.write(".lock", owner(host="other"))

    def beat():
        while not ended.wait(0.02):
            with contextlib.suppress(UserError):
                place.write(".lock", owner(host="other"))

    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match="in use by process .* on other"), AddressLock(place):
            raise AssertionError("the lock must not be taken")
    finally:
        ended.set()
        thread.join()
    assert "waiting 1 s to see whether it still is" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b'{"pid": 7, "ho'])
def test_a_lock_that_is_being_written_is_held_and_a_damaged_one_is_taken(address, content):
    place = storage.find_place("workdir", address)
    place.write(".lock", content)
    timer = threading.Timer(0.2, place.write, (".lock", owner(host="other")))
    timer.start()
    with pytest.raises(UserError, match="in use by process .* on other"), AddressLock(place):
        raise AssertionError("the lock must not be taken")
    timer.join()
    place.write(".lock", content)
    with AddressLock(place):
        assert json.loads(place.read(".lock"))["pid"] == os.getpid()


def test_a_run_whose_lock_is_taken_uploads_no_more(address, finished):
    place = storage.find_place("workdir", address)
    sentence = "is not copied completely: workdir .* is in use by process 7 on other"
    with pytest.raises(UserError, match=sentence), open_run(address) as run:
        place.write(".lock", owner(host="other", pid=7))
        time.sleep(0.5)
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns(".lock"))
    assert objects(address) == {} and json.loads(place.read(".lock"))["pid"] == 7


def test_a_run_that_was_frozen_leaves_the_steps_of_the_next_one(address, finished, monkeypatch):
    place = storage.find_place("workdir", address)
    monkeypatch.setattr(address_lock, "BEAT", 60.0)
    monkeypatch.setattr(mirror, "SECONDS", 60.0)
    with pytest.raises(UserError, match="in use by process 7 on other"), open_run(address) as run:
        place.write(".lock", owner(host="other", pid=7))
        place.write("checkpoints/4/state/part", b"")  # which the other run is uploading
        shutil.copytree(finished, run, ignore=shutil.ignore_patterns(".lock"))
    assert objects(address) == {"checkpoints/4/state/part": b""}


# Readers -----------------------------------------------------------------------------------------


def test_a_reader_fetches_the_newest_step(uploaded, finished, monkeypatch):
    assert fetch_source("runs/demo") == "runs/demo"
    path = fetch_source(uploaded)
    assert contents(path) == contents(finished / "checkpoints/3")
    assert (path.parent.parent / "metrics.jsonl").exists()
    assert is_identical(checkpoint.load_weights(path)["params"], make_state(3).params)
    monkeypatch.setattr(BucketFileSystem, "log", [])
    assert fetch_source(uploaded) == path
    assert len(BucketFileSystem.log) == 1  # the rows of metrics
    step = fetch_source(f"{uploaded}/checkpoints/2")
    assert contents(step) == contents(finished / "checkpoints/2")
    assert fetch_source(f"{uploaded}/checkpoints").name == "3"


READ = """
import sys
sys.path.insert(0, "tests")
import bucket
from plan_jax.checkpoint.fetch import fetch_source
print(fetch_source(sys.argv[1]), flush=True)
sys.stdin.read()
"""


def test_a_step_that_another_process_reads_is_not_deleted(uploaded):
    folder = Path(uploaded.removeprefix("bucket://")) / "checkpoints"
    reader = subprocess.Popen(
        [sys.executable, "-c", READ, uploaded],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    path = Path(reader.stdout.readline().strip())
    assert path.name == "3"
    shutil.copytree(folder / "3", folder / "4")
    assert fetch_source(uploaded).name == "4" and (path / "config/metadata").exists()
    reader.communicate()
    shutil.copytree(folder / "3", folder / "5")
    assert fetch_source(uploaded).name == "5" and not path.exists()


def test_a_reader_takes_an_older_step_and_says_so(uploaded, capsys):
    FAULTS["has 100 of"](uploaded)
    assert fetch_source(uploaded).name == "2"
    assert re.search("checkpoints/3 is broken .*100 of.*; using step 2", capsys.readouterr().err)
    with pytest.raises(UserError, match="run has no complete step; train again"):
        fetch_source(f"{uploaded}/checkpoints/3")


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("/nothing", "run/nothing does not exist; pass the folder of a run"),
        ("/tensorboard", "holds neither a run nor a saved model; pass the folder"),
        ("/checkpoints/9", "run has no step 9; use one of 1, 2, 3"),
    ],
)
def test_what_is_no_checkpoint_is_one_sentence(uploaded, name, sentence):
    with pytest.raises(UserError, match=sentence):
        fetch_source(uploaded + name)


def test_a_step_that_its_run_deletes_meanwhile_is_not_broken(uploaded, monkeypatch, capsys):
    folder, get = Path(uploaded.removeprefix("bucket://")), BucketFileSystem.get_file

    def replace(self, source, target, **options):
        if "/checkpoints/3/" in source and (folder / "checkpoints/3").exists():
            shutil.copytree(folder / "checkpoints/3", folder / "checkpoints/4")
            shutil.rmtree(folder / "checkpoints/3")
        get(self, source, target, **options)

    monkeypatch.setattr(BucketFileSystem, "get_file", replace)
    assert fetch_source(uploaded).name == "4"
    assert "broken" not in capsys.readouterr().err
