"""A run at an address that is killed in the middle of an upload resumes on another host."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import portpicker
import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 16
TRAIN = """
import sys
from bucket import BucketFileSystem
from plan_jax import main
from plan_jax.checkpoint import mirror

if __name__ == "__main__":
    BucketFileSystem.pause = 0.0005
    mirror.SECONDS = 0.1
    main.run_process(sys.argv[1:])
"""
TRAIN_OFTEN = TRAIN.replace("0.0005", "0.0001")


def launch(script, data, workdir, host, fields=None, **environment):
    fields = {
        **{"steps": STEPS, "checkpoint.every": 3, "data.dir": data, "eval.tasks": "()"},
        **(fields or {}),
    }
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    return subprocess.Popen(
        [sys.executable, script, "--config=testing", f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "PLAN_JAX_CACHE": str(host),
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_exit(process):
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def find_time(path):
    """Returns when a file was written; 0 for a file that has been deleted meanwhile."""
    with contextlib.suppress(FileNotFoundError):
        return path.stat().st_mtime
    return 0


def wait_for_upload(process, bucket, step, began, num_whole):
    """Waits until a step at least this one is being uploaded, and so many are whole.

    What a run that was killed before has left is older than `began`.
    """
    deadline = time.monotonic() + 600
    while True:
        folders = [path for path in bucket.glob("checkpoints/*") if int(path.name) >= step]
        partial = [path for path in folders if not (path / "config/metadata").exists()]
        files = [file for path in partial for file in path.rglob("*")]
        is_uploading = any(find_time(file) > began for file in files)
        if is_uploading and len(list(bucket.glob("checkpoints/*/config/metadata"))) >= num_whole:
            return
        assert process.poll() is None, wait_for_exit(process)
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("data", ["local", "bucket"])
def test_a_run_that_is_killed_while_it_uploads_resumes_elsewhere(data, tmp_path):
    script, bucket = tmp_path / "train.py", tmp_path / "bucket/run"
    script.write_text(TRAIN)
    places = {"local": tmp_path / "data", "bucket": f"bucket://{tmp_path}/bucket/data"}
    whole = launch(script, places[data], tmp_path / "whole", tmp_path / "host")
    code, output = wait_for_exit(whole)
    assert code == 0, output
    address = f"bucket://{bucket}"
    resumed = []
    for number, step in enumerate((1, 6, 10)):
        began = time.time()
        run = launch(script, places[data], address, tmp_path / f"host_{number}")
        wait_for_upload(run, bucket, step, began, num_whole=min(number, 1))
        run.send_signal(signal.SIGKILL)
        _, output = wait_for_exit(run)
        assert "Traceback" not in output and "broken" not in output, output
        resumed.append("resumed at step" in output)
    run = launch(script, places[data], address, tmp_path / "last")
    code, output = wait_for_exit(run)
    assert code == 0 and "resumed at step" in output and "broken" not in output, output
    assert resumed[0] is False and resumed[-1] is True
    require_same_run(bucket, tmp_path / "whole")


def require_same_run(*folders):
    """Checks that two runs have the same parameters and the same rows of metrics."""
    metrics = [json.loads((path / "metrics.json").read_text()) for path in folders]
    assert metrics[0]["params_sha256"] == metrics[1]["params_sha256"]
    rows = [
        [{k: v for k, v in json.loads(line).items() if "per_s" not in k} for line in lines]
        for lines in ((path / "metrics.jsonl").read_text().splitlines() for path in folders)
    ]
    assert rows[0] == rows[1]


def wait_for_step(run, bucket, step):
    """Waits until a step at least this one is complete at the address."""
    deadline = time.monotonic() + 600
    while not any(
        int(path.parent.parent.name) >= step
        for path in bucket.glob("checkpoints/*/config/metadata")
    ):
        assert run.poll() is None, wait_for_exit(run)
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_hosts_share_a_run_at_an_address(tmp_path):
    """Its bucket is all that they share. Each start is on new machines, with empty disks."""
    script, bucket = tmp_path / "train.py", tmp_path / "bucket/run"
    script.write_text(TRAIN_OFTEN)
    fields = {"steps": 160, "checkpoint.every": 20, "eval.tasks": "('retrieval',)"}

    def start(workdir, machines):
        port = portpicker.pick_unused_port()
        cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
        cluster |= {"XLA_FLAGS": ""}  # one device each
        disks = [tmp_path / f"{machines}_{i}" for i in range(2)]
        return [
            launch(
                script, tmp_path / "data", workdir, disk, fields, JAX_PROCESS_ID=str(i), **cluster
            )
            for i, disk in enumerate(disks)
        ]

    results = [wait_for_exit(run) for run in start(tmp_path / "whole", "whole")]
    assert [code for code, _ in results] == [0, 0], results

    runs = start(f"bucket://{bucket}", "first")
    wait_for_step(runs[0], bucket, 20)
    runs[1].kill()
    code, output = wait_for_exit(runs[0])
    assert code == 2 and "host 1 (" in output and "has ended" in output, output
    assert "Traceback" not in output, output
    wait_for_exit(runs[1])

    runs = start(f"bucket://{bucket}", "second")
    wait_for_step(runs[0], bucket, 80)
    runs[1].send_signal(signal.SIGTERM)
    results = [wait_for_exit(run) for run in runs]
    assert [code for code, _ in results] == [0, 0], results
    assert "stopped at step" in results[0][1] and "is copied to bucket" in results[0][1], results

    results = [wait_for_exit(run) for run in start(f"bucket://{bucket}", "third")]
    assert [code for code, _ in results] == [0, 0], results
    assert "resumed at step" in results[0][1] and "broken" not in results[0][1], results
    assert (bucket / "report.html").stat().st_size > 1000
    assert not list(tmp_path.glob("*_1/runs/*"))
    require_same_run(bucket, tmp_path / "whole")
