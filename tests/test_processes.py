"""Reader processes: they start only where they can, and end with the run, however it ends."""

import errno
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from plan_jax.data import loader, processes, schema
from plan_jax.data import tokenizer as tokenization
from plan_jax.data.dataset import Dataset
from plan_jax.types import Record, UserError

ROOT = Path(__file__).resolve().parents[1]
RECORD = schema.serialize(Record(np.zeros((8, 8), np.uint8), "No effusion."))


def iterate(source, workers=1):
    return loader.train_batches(
        Dataset(source, name="pairs"),
        tokenization.load_tokenizer("phantom"),
        batch_size=2,
        size=8,
        max_tokens=8,
        max_words=4,
        seed=0,
        workers=workers,
    )


# A script that reads batches until it is stopped, in the two forms that people write.
SCRIPT = """
import signal, sys
sys.path.insert(0, {tests!r})
from test_processes import RECORD, UserError, iterate
def run():
    # A shell lets what it runs in the background ignore Ctrl-C, and this test with it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        batches = iterate([RECORD] * 4, workers=2)
        print("starting", flush=True)
        for _ in batches:
            print("a batch", flush=True)
    except (KeyboardInterrupt, UserError) as error:
        print("stopped:", error, flush=True)
        batches.close()
"""
GUARDED = SCRIPT + 'if __name__ == "__main__":\n    run()\n'


def start(tmp_path, text, *, from_stdin=False):
    """Starts a script in a process group of its own, as a terminal does."""
    path = tmp_path / "script.py"
    path.write_text(text.format(tests=str(ROOT / "tests")))
    return subprocess.Popen(
        [sys.executable, "-" if from_stdin else str(path)],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdin=path.open() if from_stdin else subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def remove_notices(err):
    """Returns standard error without what grain 0.2.17 says about the version of jaxlib."""
    lines = err.splitlines(keepends=True)
    return "".join(x for x in lines if "Grain multiprocess worker profiling requires" not in x)


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.02)


def test_readers_end_with_a_run_that_is_killed(tmp_path):
    parent = start(tmp_path, GUARDED)
    while parent.stdout.readline() != "a batch\n":
        assert parent.poll() is None, parent.stderr.read()
    family = psutil.Process(parent.pid).children(recursive=True)
    assert len(family) >= 2
    parent.kill()
    parent.communicate()
    _, alive = psutil.wait_procs(family, timeout=30)
    assert not alive, "processes were left behind"


def test_ctrl_c_shows_nothing_of_the_readers(tmp_path):
    """A terminal sends Ctrl-C to all processes, here while the readers are still starting."""
    parent = start(tmp_path, GUARDED)
    assert parent.stdout.readline() == "starting\n"
    readers = psutil.Process(parent.pid).children
    wait_for(lambda: len([p for p in readers() if "spawn_main" in str(p.cmdline())]) == 2)
    os.killpg(parent.pid, signal.SIGINT)
    out, err = parent.communicate(timeout=60)
    assert out.startswith("stopped:") and parent.returncode == 0
    assert remove_notices(err) == ""


def test_a_reader_that_is_killed_is_one_sentence():
    batches = iterate([RECORD] * 4, workers=2)
    next(batches)
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    message = r"one of 2 reader processes was ended \(SIGKILL, as for lack of memory\); .*workers=0"
    with pytest.raises(UserError, match=message) as raised:
        for _ in range(99):
            next(batches)
    assert "\n" not in str(raised.value) and not multiprocessing.active_children()
    batches.close()


def test_a_mistake_in_the_data_is_the_same_sentence_in_a_reader():
    batches = iterate([RECORD[:-9]] * 4)
    message = "the prepared records are damaged; delete the folder"
    with pytest.raises(UserError, match=message):
        next(batches)
    batches.close()


def test_a_script_without_a_main_guard_is_one_sentence(tmp_path):
    parent = start(tmp_path, SCRIPT + "run()\n")
    out, err = parent.communicate(timeout=120)
    last = out.splitlines()[-1]
    assert last.startswith("stopped: config.data.workers is 2") and "main" in last
    assert '`if __name__ == "__main__":`' in last and last.endswith("config.data.workers=0")
    assert remove_notices(err) == "" and parent.returncode == 0


def test_a_script_that_is_no_file_is_one_sentence(tmp_path):
    parent = start(tmp_path, GUARDED, from_stdin=True)
    out, err = parent.communicate(timeout=120)
    last = out.splitlines()[-1]
    assert last.startswith("stopped: config.data.workers is 2") and "<stdin> is not a file" in last
    assert remove_notices(err) == "" and parent.returncode == 0


def test_other_errors_are_not_explained():
    assert processes.explain(RuntimeError("out of range"), 2) is None
    sentence = str(processes.explain(RuntimeError(TERMINATED.format(7)), 2))
    assert "(exit code 7)" in sentence and "lack of" not in sentence
    sentence = str(processes.explain(RuntimeError(TERMINATED.format(-signal.SIGBUS)), 2))
    assert "(SIGBUS, as for lack of shared memory)" in sentence


def test_full_shared_memory_is_one_sentence():
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    sentence = str(processes.explain(full, 2))
    assert "the shared memory of 2 reader processes is full" in sentence
    assert "docker run --shm-size" in sentence and sentence.endswith("config.data.workers=0")
    assert processes.explain(full, 0) is None


def test_a_daemonic_process_is_refused(monkeypatch):
    monkeypatch.setitem(multiprocessing.current_process()._config, "daemon", True)
    with pytest.raises(UserError, match="workers is 1, and a daemonic process .*workers=0"):
        next(iterate([RECORD] * 4))


TERMINATED = "Worker process was terminated unexpectedly with exit code {}."
