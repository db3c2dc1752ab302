"""The blocks of code in the documentation, run in one folder and in their order, at small sizes."""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from plan_jax.data import phantom

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from code_blocks import ROOT, list_blocks  # noqa: E402

# The smallest models in place of those of the documentation.
SMALL = (
    "--config.steps=4 --config.log_every=1 --config.data.size=32 --config.vision.name=resnet_tiny"
)
SMALL += " --config.text.name=bert_tiny --config.parallel.cpu_devices=1"
REPLACEMENTS = (
    (r"--config demo\b", "--config testing --workdir runs/demo"),
    (r"--config pairs\b", f"--config pairs {SMALL} --config.batch=8"),
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder that a reader would have: a film, some films, and a table of pairs."""
    folder = tmp_path_factory.mktemp("reader")
    (folder / "films").mkdir()
    for index, name in enumerate(("film.png", "films/a.png", "films/b.png")):
        film = phantom.draw_study(seed=1, index=7 + index).image[..., 0]
        Image.fromarray(film).save(folder / name)
    (folder / "pairs.csv").write_text("image,text\nfilm.png,effusion on the left\n")
    return folder


def test_the_blocks_run(folder):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
    }
    # Compilation is most of the time, so LLVM optimises as little as possible.
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=1"
    python = {}
    for block in list_blocks():
        if not block.is_run:
            continue
        code = block.code
        for pattern, replacement in REPLACEMENTS:
            code = re.sub(pattern, replacement, code)
        if block.language == "python":
            # Blocks of a page are one program.
            code = python[block.page] = python.get(block.page, "import plan_jax\n") + code
            command = [sys.executable, "-c", code]
        else:
            command = ["bash", "-euo", "pipefail", "-c", code]
        start = time.monotonic()
        result = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600
        )
        place = f"docs/{block.page}.md, block {block.number}"
        assert result.returncode == 0, f"{place}:\n{code}\n{result.stdout}\n{result.stderr}"
        print(f"{place}: {time.monotonic() - start:.0f} s", flush=True)
    written = {str(path.relative_to(folder)) for path in folder.rglob("*.*")}
    assert written >= {
        *("heat.png", "map.png", "mine.png", "comparison.html", "results.csv", "maps.npz"),
        *("runs/demo/report.html", "runs/mine/report.html", "models/mine/model.safetensors"),
    }
    page = (folder / "comparison.html").read_text()
    assert "The same phrases" in page and "no scores of single examples" not in page
