"""Notebooks are what their sources say: short, without outputs, the same from every build."""

import ast
import json
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tools"))

import build_notebooks  # noqa: E402

MAX_CODE_LINES = 60
SOURCES = build_notebooks.list_sources()
PROJECT = build_notebooks.read_project()
ACCELERATORS = {"tpu": ("TPU", "V5E1")}  # Colab's free TPU; the others run on a T4


@pytest.fixture(params=SOURCES, ids=lambda path: path.stem)
def source(request):
    """The source of a notebook."""
    return request.param


def code_cells(text):
    return [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]


def test_all_five_are_there():
    names = [path.stem for path in SOURCES]
    assert names == ["compare", "evaluate", "quickstart", "tpu", "your_data"]


def test_a_notebook_is_built_from_its_source(source):
    """`python tools/build_notebooks.py` writes it anew."""
    built = build_notebooks.build(source, PROJECT)
    assert source.with_suffix(".ipynb").read_text("utf-8") == built
    assert build_notebooks.build(source, PROJECT) == built


def test_a_notebook_has_no_outputs_and_names_its_runtime(source):
    notebook = json.loads(source.with_suffix(".ipynb").read_text("utf-8"))
    assert notebook["nbformat"] == 4
    for cell in notebook["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
    accelerator, kind = ACCELERATORS.get(source.stem, ("GPU", "T4"))
    assert notebook["metadata"]["accelerator"] == accelerator
    assert notebook["metadata"]["colab"]["gpuType"] == kind
    assert notebook["metadata"]["colab"]["name"] == f"{source.stem}.ipynb"
    identifiers = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identifiers)) == len(identifiers)


def test_a_notebook_is_short_and_defines_nothing(source):
    """What is longer, or has a function, belongs into the library."""
    lines = [
        line
        for cell in code_cells(source.with_suffix(".ipynb").read_text("utf-8"))
        for line in "".join(cell["source"]).splitlines()
        if line.strip() and not line.strip().startswith("#")
    ]
    assert len(lines) <= MAX_CODE_LINES, f"{source.stem}: {len(lines)} lines of code"
    tree = ast.parse(source.read_text("utf-8"))
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Lambda, ast.Try)
    assert not [node for node in ast.walk(tree) if isinstance(node, kinds)]


def test_fields_and_installation_come_first(source):
    """Colab shows the fields as a form. Nothing imports JAX before pip is done."""
    install, parameters, *others = code_cells(source.with_suffix(".ipynb").read_text("utf-8"))
    assert install["metadata"]["tags"] == ["install"]
    assert parameters["metadata"]["tags"] == ["parameters"]
    assert all("# @param " in line for line in parameters["source"])
    assert "%pip install -q {package}" in install["source"][-1]
    assert not any("pip" in "".join(cell["source"]) for cell in others)


def test_one_process_does_everything(source):
    """A second process finds the TPU in use, or three quarters of the memory of the GPU."""
    for cell in code_cells(source.with_suffix(".ipynb").read_text("utf-8")):
        text = "".join(cell["source"])
        assert not text.startswith("!") and "subprocess" not in text and "%%bash" not in text


def test_the_address_of_the_repository_makes_badges(source):
    urls = {"Repository": "https://github.com/somebody/plan_jax"}
    built = build_notebooks.build(source, {**PROJECT, "urls": urls})
    first, install = json.loads(built)["cells"][:2]
    link = f"/github/somebody/plan_jax/blob/main/colab/{source.stem}.ipynb)"
    assert first["source"][0].startswith("[![Open in Colab](https://colab.research.google.com/")
    assert first["source"][0].strip().endswith(link)
    assert 'package = "git+https://github.com/somebody/plan_jax"' in install["source"][0]


def test_without_an_address_the_wheel_is_installed(source):
    built = build_notebooks.build(source, {**PROJECT, "urls": {}})
    first, install = json.loads(built)["cells"][:2]
    assert "Open in Colab" not in "".join(first["source"])
    wheel = f"plan_jax-{PROJECT['version']}-py3-none-any.whl"
    assert f'package = "{wheel}"' in install["source"][0]
