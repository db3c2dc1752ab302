"""Runs that are killed, stopped, or spread over processes end as if nothing had happened."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import portpicker
import pytest

from plan_jax import checkpoint

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 50
TWO = """
from configs import testing


def get_config():
    config = testing.get_config()
    config.steps = 3
    return config
"""
PATIENCE = 600  # seconds for anything to happen on a machine that is busy with other tests


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A function that begins a tiny run on one device; all share data, none outlives the test."""
    data, runs = tmp_path_factory.mktemp("data"), []

    def begin(*args, **options):
        runs.append(launch(data, *args, **options))
        return runs[-1]

    yield begin
    for run in runs:
        run.kill()


def launch(data, workdir, *changes, config="configs/testing.py", **environment):
    """Begin a tiny run in a process of its own."""
    fields = {"data.dir": data, "log_every": 1, "checkpoint.every": 5, "eval.tasks": "()"}
    argv = [f"--config.{name}={value}" for name, value in fields.items()]
    argv += [f"--config.{change}" for change in changes]
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "plan_jax.main",
            f"--config={config}",
            f"--workdir={workdir}",
            *argv,
        ],
        cwd=ROOT,
        env={**os.environ, "XLA_FLAGS": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(run):
    """Wait until a run ends; return its exit code and what it said."""
    out, err = run.communicate(timeout=PATIENCE)
    return run.returncode, out + err


def rows(workdir):
    """The rows of metrics so far, but for what depends on the clock."""
    path = Path(workdir) / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [{k: v for k, v in row.items() if "per_s" not in k} for row in found]


def wait(run, workdir, step):
    """Wait until a run has logged a step."""
    deadline = time.monotonic() + PATIENCE
    while not any(row["step"] >= step for row in rows(workdir)[-1:]):
        assert run.poll() is None, end(run)
        assert time.monotonic() < deadline, "nothing happens"
        time.sleep(0.01)


def sha(workdir):
    """The fingerprint of the parameters at the end of a run."""
    return json.loads((Path(workdir) / "metrics.json").read_text())["params_sha256"]


def test_a_killed_run_ends_like_one_that_was_not(tmp_path, start):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    reference = start(whole, f"steps={STEPS}")
    moments = [random.SystemRandom().randint(a, a + 9) for a in (3, 14, 25, 36)]
    signals = [signal.SIGKILL, signal.SIGTERM, signal.SIGKILL, signal.SIGKILL]
    for moment, number in zip(moments, signals, strict=True):
        run = start(killed, f"steps={STEPS}")
        wait(run, killed, moment)
        run.send_signal(number)
        code, said = end(run)
        assert "Traceback" not in said, said
        if number == signal.SIGTERM:
            assert code == 0 and "and saved; the same command resumes" in said, said
            saved = checkpoint.load_weights(killed)["step"]
            assert f"stopped at step {saved} " in said
        else:
            assert code == -signal.SIGKILL, said
    code, said = end(start(killed, f"steps={STEPS}"))
    assert code == 0 and "resumed at step" in said, said
    code, said = end(reference)
    assert code == 0, said
    assert sha(killed) == sha(whole), moments
    by_step = {row["step"]: row for row in rows(whole)}
    steps = [row["step"] for row in rows(killed)]
    assert steps == sorted(set(steps)) and len(steps) > STEPS - 10, moments
    assert all(row == by_step[row["step"]] for row in rows(killed)), moments


def test_two_processes_train_and_save_one_checkpoint(tmp_path, start):
    port = portpicker.pick_unused_port()
    cluster = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": "2"}
    config = tmp_path / "two.py"
    config.write_text(TWO)
    runs = [start(tmp_path, config=config, JAX_PROCESS_ID=str(i), **cluster) for i in range(2)]
    ends = [end(run) for run in runs]
    assert [code for code, _ in ends] == [0, 0], ends
    held = checkpoint.load_weights(tmp_path)
    steps = [at.name for at in (tmp_path / checkpoint.FOLDER).iterdir()]
    assert (steps, held["step"]) == (["3"], 3)
    assert checkpoint.fingerprint(held["params"]) == sha(tmp_path)
    assert len(rows(tmp_path)) == 3
