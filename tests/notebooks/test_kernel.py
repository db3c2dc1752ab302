"""What a kernel adds to a process: flags, a running event loop, earlier runs, interruptions."""

import re

import nbformat
from jupyter_client.manager import start_new_kernel
from run_notebook import execute_cells, kernel_environment

CHECK_KERNEL = """
import asyncio, os, sys
import plan_jax
from plan_jax import main
assert "-f" in sys.argv, sys.argv
assert asyncio.get_event_loop().is_running()
assert os.environ["MPLBACKEND"].startswith("module://")
"""
DRAW = """
import matplotlib.pyplot as plt
assert "inline" in plt.get_backend(), plt.get_backend()
plt.plot([0, 1])
plt.show()
"""

# Steps take half a second, so that there is one to interrupt.
SLOW_STEPS = """
import time
from plan_jax import main, train
advance_bar = train.Logger.advance
def advance(logger):
    time.sleep(0.5)
    advance_bar(logger)
train.Logger.advance = advance
"""


def train(workdir, *options):
    """Returns the call that trains configs/testing.py."""
    arguments = ["--config", "testing", "--config.eval.tasks=retrieval", *options]
    return f"main.run({[*arguments, '--workdir', workdir]!r})"


def test_one_kernel_trains_loads_and_draws(tmp_path):
    """One process for everything, in any order: workers, a coroutine, a loaded model, figures."""
    cells = [
        CHECK_KERNEL,
        f"print('first', {train('runs/a', '--config.steps=2', '--config.data.workers=2')})",
        "model = plan_jax.load('runs/a')",
        f"async def again():\n    return {train('runs/b', '--config.steps=2')}\n"
        "print('second', await again())",
        DRAW,
        f"print('third', {train('runs/a', '--config.steps=2')})",
        "print('mistake', main.run(['--config', 'testing', '--config.stepps=3']))",
        "plan_jax.load('runs/missing')",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(x) for x in cells])
    shown = execute_cells(notebook, tmp_path, allow_errors=True)
    results = re.findall(r"^(first|second|third|mistake) (\d+)$", shown.text, re.M)
    assert results == [("first", "0"), ("second", "0"), ("third", "0"), ("mistake", "2")]
    weights = re.findall(r"params_sha256 (\w+)", shown.text)
    assert len(weights) == 3 and len(set(weights)) == 1
    assert "config.stepps is not a field; did you mean config.steps?" in shown.text
    assert "resumed at step 2 of 2" in shown.text
    assert len(shown.pictures) == 1
    # A mistake is one sentence, without a traceback.
    assert len(shown.errors) == 1
    assert re.fullmatch(r"checkpoint runs/missing does not exist; [^\n]+", shown.errors[0])
    assert "Warning" not in shown.text.replace("WARNING", "")


def test_an_interrupted_cell_saves_and_the_same_cell_resumes(tmp_path):
    """The button that stops a cell is Ctrl-C of a terminal."""
    manager, client = start_new_kernel(
        kernel_name="python3", cwd=str(tmp_path), env=kernel_environment()
    )
    options = ("--config.steps=6", "--config.checkpoint.every=1000")

    def run_cell(interrupt_at=None):
        """Executes the cell; returns its output, having interrupted it at a text."""
        output, is_interrupted = "", False
        request = client.execute(f"print('code', {train('runs/c', *options)})")
        while True:
            message = client.get_iopub_msg(timeout=300)
            if message["parent_header"].get("msg_id") != request:
                continue
            content = message["content"]
            output += content.get("text", "") + "\n".join(content.get("traceback", []))
            if interrupt_at and interrupt_at in output and not is_interrupted:
                is_interrupted = True
                manager.interrupt_kernel()
            if content.get("execution_state") == "idle":
                return output

    try:
        client.execute(SLOW_STEPS)
        first = run_cell(interrupt_at="first step after")
        assert "stopping after this step, whose state is saved" in first
        assert re.search(r"stopped at step [1-5] and saved; the same command resumes", first)
        assert re.search(r"^code 130$", first, re.M) and "Traceback" not in first
        second = run_cell()
        assert re.search(r"resumed at step [1-5] of 6", second)
        assert re.search(r"^code 0$", second, re.M)
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)
