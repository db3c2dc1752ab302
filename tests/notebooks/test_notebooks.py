"""Every notebook runs from the first cell to the last, as in Colab and elsewhere.

`make notebooks` runs these tests on Python 3.13 with the versions of Colab's runtime. The pictures
that the notebooks show are kept in `build/notebooks`, to be looked at.
"""

import csv
import json
import re
import shutil
from pathlib import Path

import pytest
from PIL import Image
from run_notebook import ROOT, execute

PICTURES = ROOT / "build" / "notebooks"
# The encoders, data and sizes of configs/testing.py.
TINY = (
    "--config.batch=8 --config.log_every=1 --config.checkpoint.every=2 --config.embed_dim=8 "
    "--config.head_hidden_dim=16 --config.vision.name=resnet_tiny --config.text.name=bert_tiny "
    "--config.data.size=32 --config.data.max_tokens=24 --config.data.max_words=20 "
    "--config.eval.limit=8 --config.eval.num_prior_records=16 --config.eval.batch=4"
)
TINY_PHANTOMS = " ".join(
    f"--config.data.builder.{name}" for name in ("size=32", "train=48", "val=8", "test=8")
)


def run(name, folder, *, drive=None, **parameters):
    """Executes a notebook and keeps its pictures; returns what it shows."""
    executed = execute(ROOT / f"colab/{name}.ipynb", folder, parameters, drive=drive)
    PICTURES.mkdir(parents=True, exist_ok=True)
    for path in PICTURES.glob(f"{name}-*.png"):
        path.unlink()
    for i, content in enumerate(executed.pictures):
        (PICTURES / f"{name}-{i:02d}.png").write_bytes(content)
    (PICTURES / f"{name}.html").write_text(executed.html, "utf-8")
    print(f"\n{name}: {executed.seconds:.0f} s")
    return executed


def sizes(executed):
    """Returns the sizes of the pictures, and checks that none is a constant."""
    found = []
    for i, content in enumerate(executed.pictures):
        path = PICTURES / "size.png"
        path.write_bytes(content)
        with Image.open(path) as picture:
            low, high = picture.convert("L").getextrema()
            assert low < high, f"picture {i} is empty"
            found.append(picture.size)
        path.unlink()
    return found


def test_compare(tmp_path):
    """Without Colab; the second method continues nothing of the first."""
    options = f"{TINY} {TINY_PHANTOMS}"
    shown = run("compare", tmp_path, first="convirt", second="gloria", steps=2, options=options)
    lines = shown.markdown.splitlines()
    assert [line.split(" | ")[0] for line in lines[:4]] == [
        "| run",
        "| ---",
        "| convirt",
        "| gloria",
    ]
    assert "pointing game" in lines[0] and "random map" in shown.markdown
    assert len(sizes(shown)) == 2
    assert shown.html.count("<iframe srcdoc=") == 2
    assert shown.text.count("params_sha256") == 2


def test_tpu(tmp_path):
    """On Colab, with two devices in place of a TPU's."""
    drive = tmp_path / "drive"
    parameters = {"config": "testing", "batch": 8, "microbatch": 2, "steps": 4, "platform": "cpu"}
    shown = run("tpu", tmp_path / "machine", drive=drive, **parameters)
    assert "2 cpu" in shown.text and "newest step: None" in shown.text
    assert re.search(r"\| 2 devices \| 1 \| .*\n\| 1 device \| 1 \| ", shown.markdown)
    assert "<iframe srcdoc=" in shown.html
    copies = {path.name for path in (drive / "MyDrive/plan_jax/tpu").iterdir()}
    assert {"run.zip", "step-4.zip"} <= copies
    assert (drive / "calls.txt").read_text().split() == ["mount", "flush_and_unmount"]
    config = json.loads((tmp_path / "machine/runs/tpu/config.json").read_text())
    assert config["dtype"] == "bfloat16" and config["microbatch"] == 2


def write_study(folder):
    """Writes a study of drawn films: bright above or below, and said so in the report."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(40):
        picture = Image.new("L", (40, 48), 60)
        upper = i % 2 == 0
        picture.paste(200, (5 + i % 7, 4 if upper else 30, 25, 16 if upper else 42))
        picture.save(folder / f"images/{i:03d}.png")
        place = "upper" if upper else "lower"
        rows.append((f"images/{i:03d}.png", f"Consolidation in the left {place} zone."))
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "text"), *rows])


def test_your_data_survives_the_end_of_its_machine(tmp_path):
    """On Colab; the second machine has nothing but the drive, and ends with the same weights."""
    drive = tmp_path / "drive"
    write_study(drive / "MyDrive/study")
    options = f"{TINY} --config.data.builder.size=32 --config.data.max_shift=0"
    parameters = {"source": "study", "copies": "copies", "steps": 4, "options": options}
    first = run("your_data", tmp_path / "first", drive=drive, **parameters)
    assert "newest step: None" in first.text and "data/study has 41 files" in first.text
    assert "Consolidation" not in first.text  # notebooks are shared, and reports are of patients
    assert "<iframe srcdoc=" in first.html
    copies = drive / "MyDrive/copies"
    assert {"run.zip", "step-2.zip", "step-4.zip"} <= {path.name for path in copies.iterdir()}
    (copies / "step-4.zip").unlink()  # the machine has ended before
    shutil.rmtree(tmp_path / "first")
    second = run("your_data", tmp_path / "second", drive=drive, **parameters)
    assert "newest step: 2" in second.text and "resumed at step 2 of 4" in second.text
    weights = [re.search("params_sha256 ([0-9a-f]{64})", x.text)[1] for x in (first, second)]
    assert weights[0] == weights[1]
    assert (copies / "step-4.zip").exists()


def test_quickstart(tmp_path):
    """Without Colab: the model of the package, a run, TensorBoard and the page."""
    shown = run("quickstart", tmp_path, config="testing", steps=2)
    pictures = sizes(shown)
    assert len(pictures) >= 3  # the phrase, the phrases of the report, the phrase again
    assert "Grounding(peak x " in shown.text
    assert "tensorboard" in shown.html.lower() and shown.html.count("<iframe srcdoc=") == 1


def test_evaluate(tmp_path):
    """Without Colab: the model of the package."""
    options = "--config.eval.limit=16 --config.eval.num_prior_records=16 " + " ".join(
        f"--config.data.builder.{name}" for name in ("train=48", "val=8", "test=16")
    )
    tasks = "--config.eval.tasks=('grounding','retrieval')"
    shown = run("evaluate", tmp_path, options=f"{tasks} {options}")
    assert "| Phrase grounding | CNR, signed | " in shown.markdown
    assert len(sizes(shown)) >= 3 and "<iframe srcdoc=" in shown.html
    assert {"eval/all_phantom", "published/biovil"} <= set(shown.text.split())


@pytest.mark.parametrize("benchmark", ["eval/ms_cxr_grounding:biovil_t", "eval/all_phantom"])
def test_evaluate_reads_the_folder_that_main_writes(benchmark):
    """A benchmark may have an argument."""
    from plan_jax import main

    source = (ROOT / "colab/evaluate.py").read_text("utf-8")
    assert "Path(main.default_workdir(benchmark)).name" in source
    name = Path(main.default_workdir(benchmark)).name
    assert name == benchmark.removeprefix("eval/").replace(":", "_")


@pytest.mark.parametrize("path", sorted((ROOT / "colab").glob("*.ipynb")), ids=lambda p: p.stem)
def test_every_notebook_has_a_test(path):
    assert f'run("{path.stem}"' in Path(__file__).read_text()
