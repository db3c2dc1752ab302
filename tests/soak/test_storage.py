"""A run at an address that is killed in the middle of an upload resumes on another host."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 16
TRAIN = """
import sys
from bucket import BucketFileSystem
from plan_jax import main

if __name__ == "__main__":
    BucketFileSystem.pause = 0.0005
    main.run_process(sys.argv[1:])
"""


def launch(script, data, workdir, host):
    fields = {"steps": STEPS, "checkpoint.every": 3, "data.dir": data, "eval.tasks": "()"}
    arguments = [f"--config.{name}={value}" for name, value in fields.items()]
    return subprocess.Popen(
        [sys.executable, script, "--config=testing", f"--workdir={workdir}", *arguments],
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}",
            "PLAN_JAX_CACHE": str(host),
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_for_exit(process):
    output, _ = process.communicate(timeout=600)
    return process.returncode, output


def wait_for_upload(process, bucket, step):
    """Waits until a step at least this one is being uploaded."""
    deadline = time.monotonic() + 600
    while True:
        folders = [path for path in bucket.glob("checkpoints/*") if int(path.name) >= step]
        if any(not (path / "config/metadata").exists() for path in folders):
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
        run = launch(script, places[data], address, tmp_path / f"host_{number}")
        wait_for_upload(run, bucket, step)
        run.send_signal(signal.SIGKILL)
        _, output = wait_for_exit(run)
        assert "Traceback" not in output and "broken" not in output, output
        resumed.append("resumed at step" in output)
    run = launch(script, places[data], address, tmp_path / "last")
    code, output = wait_for_exit(run)
    assert code == 0 and "resumed at step" in output and "broken" not in output, output
    assert resumed[0] is False and resumed[-1] is True
    metrics = [
        json.loads((path / "metrics.json").read_text()) for path in (bucket, tmp_path / "whole")
    ]
    assert metrics[0]["params_sha256"] == metrics[1]["params_sha256"]
    rows = [
        [{k: v for k, v in json.loads(line).items() if "per_s" not in k} for line in lines]
        for lines in (
            (path / "metrics.jsonl").read_text().splitlines()
            for path in (bucket, tmp_path / "whole")
        )
    ]
    assert rows[0] == rows[1]
