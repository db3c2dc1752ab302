"""A disk that is full while a run prepares, saves, logs or writes its page: a sentence, no loss."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
STEPS = 6
# A small disk of this test's own, in a namespace of its own, so that nobody has to be root.
SCRIPT = """
mount -t tmpfs -o size=64m none "$1/disk" || exit 3
cd "$1" && shift
PYTHON="$1" && shift
"$PYTHON" fill.py "$@" > out 2> err; echo $? > code
ls disk/run/checkpoints > steps 2>&1
rm -f disk/ballast
"$PYTHON" -m plan_jax.main "${@:2}" > out_2 2> err_2; echo $? > code_2
cp disk/run/metrics.json disk/run/report.html .
"""
FILL = """
import os, sys
from plan_jax import checkpoint, evaluate, main, train

def fill(leave):
    status = os.statvfs("disk")
    size = status.f_bavail * status.f_frsize - leave
    with open("disk/ballast", "wb") as file:
        os.posix_fallocate(file.fileno(), 0, size)

def fill_before(owner, name, leave, is_due=lambda *_: True):
    function = getattr(owner, name)
    def call(*arguments, **options):
        if is_due(*arguments):
            fill(leave)
        return function(*arguments, **options)
    setattr(owner, name, call)

def is_step(number, step, manager):
    if step == number:
        manager.wait_until_finished()  # the earlier step is whole before the disk is full
    return step == number

def fill_page(path):
    # The next row needs a page of the disk of its own. A line that is no row is dropped later.
    with open(path, "a") as file:
        file.write(" " * (-os.path.getsize(path) % 4096 - 1) + chr(10))
    return True

if __name__ == "__main__":
    scenario = sys.argv[1]
    if scenario == "prepare":
        fill(20_000)
    elif scenario == "save":
        fill_before(checkpoint, "save", 20_000, lambda manager, step, *_: is_step(4, step, manager))
    elif scenario == "log":
        fill_before(train, "log_metrics", 0, lambda run, step, *_: (
            is_step(5, step, run.manager) and fill_page(run.logger.metrics_path)
        ))
    elif scenario == "page":
        fill_before(evaluate, "write_results", 16_384)
    main.run_process(sys.argv[2:])
"""
SENTENCES = {
    "prepare": "data folder .*disk/data.* cannot be written .No space left on.*free the disk",
    "save": "checkpoint could not be written to .*run/checkpoints .No space left.*free the disk",
    "log": "disk/run/.* cannot be written .No space left on device.; free disk space",
    "page": "disk/run/.* cannot be written .No space left on device.; free disk space",
}


def command(folder):
    fields = {
        "steps": STEPS,
        "data.dir": folder / "data",
        "eval.tasks": "('retrieval',)",
        "checkpoint.every": 2,
    }
    return [
        "--config=configs/testing.py",
        f"--workdir={folder}/run",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


@pytest.fixture(scope="module")
def fingerprint(tmp_path_factory):
    """That of the parameters of a run on a disk with space."""
    folder = tmp_path_factory.mktemp("whole")
    process = subprocess.run(
        [sys.executable, "-m", "plan_jax.main", *command(folder)], cwd=ROOT, capture_output=True
    )
    assert process.returncode == 0, process.stderr
    return json.loads((folder / "run/metrics.json").read_text())["params_sha256"]


@pytest.mark.parametrize("scenario", SENTENCES)
def test_a_full_disk_is_a_sentence_and_the_run_resumes(scenario, fingerprint, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "fill.py").write_text(FILL)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shell = ["bash", "-c", SCRIPT, "bash", tmp_path, sys.executable]
    subprocess.run(
        ["unshare", "-rm", *map(str, shell), scenario, *command(Path("disk"))],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
    )
    error = (tmp_path / "err").read_text()
    assert (tmp_path / "code").read_text() == "2\n" and "Traceback" not in error, error
    # Progress and other notices come before it.
    assert re.search(SENTENCES[scenario], error.splitlines()[-1]), error
    steps = [name for name in (tmp_path / "steps").read_text().split() if name.isdigit()]
    assert steps[-1:] == {"prepare": [], "save": ["2"], "log": ["4"], "page": ["6"]}[scenario]
    error = (tmp_path / "err_2").read_text()
    assert (tmp_path / "code_2").read_text() == "0\n" and "broken" not in error, error
    if steps:
        assert f"resumed at step {steps[-1]} of {STEPS}" in error
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["params_sha256"] == fingerprint
    assert (tmp_path / "report.html").stat().st_size > 1000
