"""What the package says of itself: dependencies, classifiers, citation."""

import ast
import re
import runpy
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image

from plan_jax.command.config_files import list_names, locate

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
RUNTIMES = ("cpu", "gpu", "tpu")
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md"))]


def read_versions(path):
    """Returns the versions of a list of packages, by canonical name."""
    lines = [line for line in path.read_text().splitlines() if "==" in line and line[0] != "#"]
    return {
        canonicalize_name(name): version for name, _, version in (x.partition("==") for x in lines)
    }


@pytest.mark.parametrize("runtime", RUNTIMES)
def test_the_versions_of_colab_are_accepted(runtime):
    """Otherwise pip replaces them; a JAX of another version than its plugin runs on the CPU."""
    versions = read_versions(ROOT / f"colab/runtime/{runtime}.txt")
    assert {"jax", "jaxlib", "flax", "numpy"} <= set(versions)
    requirements = [Requirement(line) for line in PROJECT["dependencies"]]
    refused = {
        f"{requirement} {versions[name]}"
        for requirement in requirements
        if (name := canonicalize_name(requirement.name)) in versions
        and versions[name] not in requirement.specifier
    }
    assert refused == {"tensorflow-metadata<1.18,>=1.17.3 1.21.0"}


def test_the_tested_versions_are_accepted():
    versions = read_versions(ROOT / "constraints.txt")
    extras = [
        PROJECT["optional-dependencies"][name] for name in ("test", "dicom", "demo", "matrix")
    ]
    for line in sum(extras, PROJECT["dependencies"]):
        requirement = Requirement(line)
        version = versions.get(canonicalize_name(requirement.name))
        assert version and version in requirement.specifier, f"{line}, not {version}"


def test_every_import_is_declared():
    """A package that only another one brings disappears with it."""
    imported = set()
    for path in (ROOT / "plan_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(node.module.partition(".")[0])
    modules = {
        "absl": "absl-py",
        "PIL": "pillow",
        "orbax": "orbax-checkpoint",
        "sklearn": "scikit-learn",
        "rouge_score": "rouge-score",
    }
    extras = sum(PROJECT["optional-dependencies"].values(), [])
    optional = {Requirement(line).name for line in extras}
    others = {"plan_jax", "jaxlib", *sys.stdlib_module_names}  # jax depends on one jaxlib
    names = {modules.get(name, name) for name in imported - optional - others}
    declared = {canonicalize_name(Requirement(line).name) for line in PROJECT["dependencies"]}
    assert {canonicalize_name(name) for name in names} - declared == set()


def test_the_python_versions_agree():
    assert PROJECT["requires-python"] == ">=3.11"
    versions = [line.split()[-1] for line in PROJECT["classifiers"] if ":: 3." in line]
    assert versions == ["3.11", "3.12", "3.13"]


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software"
    assert citation["version"] == PROJECT["version"]
    assert citation["license"] == PROJECT["license"]
    assert citation["authors"] == PROJECT["authors"]
    assert all(key in citation for key in ("message", "title", "abstract"))
    for reference in citation["references"]:
        assert (
            reference["authors"]
            and reference["title"]
            and reference["url"] in (ROOT / "README.md").read_text()
        )


def list_headings(path):
    """Returns the anchors of a document's headings."""
    headings = re.findall(r"^#+ (.+)$", path.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files_and_headings(document):
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", document.read_text()):
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in list_headings(path), f"{document.name} links to {target}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_name_configs_that_exist(document):
    """The wheel has no folder `configs` beside it, so names have to suffice."""
    places = {"MODEL", "BENCHMARK", "NAME", "..."}  # for the reader to fill in
    for config in re.findall(r"--config[ =]([\w./]+)", document.read_text()):
        name = config.removeprefix("configs/").removesuffix(".py")
        if name.rpartition("/")[2] not in places:
            assert name in list_names(), f"{document.name} runs --config {config}"
            assert locate(config)


def test_the_first_example_of_the_readme_locates_a_phrase(tmp_path, monkeypatch):
    (example, *_) = re.findall(
        r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.M | re.S
    )
    (tmp_path / "example.py").write_text(example)
    monkeypatch.chdir(tmp_path)
    with pytest.warns(UserWarning, match="trained on phantoms"):
        runpy.run_path("example.py")
    with Image.open("heat.png") as picture:
        low, high = picture.convert("L").getextrema()
    assert low < high
