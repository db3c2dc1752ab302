"""Writes colab/*.ipynb from their sources colab/*.py (py:percent), without outputs.

    python tools/build_notebooks.py

People edit the sources. `[project.urls] Repository` of pyproject.toml is the one place where the
address of the repository stands: if it is on GitHub, every notebook gets a badge that opens it in
Colab, and the first cell installs from there. Without it the first cell names the wheel, which has
to lie beside the notebook.
"""

import re
import tomllib
from pathlib import Path
from typing import Any

import jupytext
import nbformat

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "colab"
BADGE = "https://colab.research.google.com/assets/colab-badge.svg"
OPEN = "https://colab.research.google.com/github"
# In the first cell of every source.
PACKAGE = 'package = "plan_jax"'


def build(source: Path, project: dict[str, Any]) -> str:
    """Returns a notebook as text, the same for the same source and project.

    Args:
      source: the py:percent file.
      project: the table `project` of pyproject.toml.
    """
    notebook = jupytext.read(source, fmt="py:percent")
    repository = project.get("urls", {}).get("Repository", "").removesuffix(".git").rstrip("/")
    installed = f"git+{repository}" if repository else wheel_name(project)
    first, install = notebook.cells[0], notebook.cells[1]
    if match := re.fullmatch(r"https://github\.com/([\w.-]+/[\w.-]+)", repository):
        address = f"{OPEN}/{match[1]}/blob/main/{FOLDER.name}/{source.stem}.ipynb"
        first.source = f"[![Open in Colab]({BADGE})]({address})\n\n{first.source}"
    install.source = install.source.replace(PACKAGE, f'package = "{installed}"')
    for i, cell in enumerate(notebook.cells):
        cell.id = f"{source.stem}-{i:02d}"
    metadata = {name: notebook.metadata[name] for name in ("accelerator", "colab")}
    metadata["colab"] = {**metadata["colab"], "name": f"{source.stem}.ipynb", "provenance": []}
    notebook.metadata = metadata | {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    nbformat.validate(notebook)
    return nbformat.writes(notebook).rstrip("\n") + "\n"


def wheel_name(project: dict[str, Any]) -> str:
    """Returns the name of the file that `python -m build` writes."""
    return f"{project['name'].replace('-', '_')}-{project['version']}-py3-none-any.whl"


def read_project() -> dict[str, Any]:
    """Returns the table `project` of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def list_sources() -> list[Path]:
    """Returns the sources of all notebooks, sorted."""
    return sorted(FOLDER.glob("*.py"))


def main() -> None:
    """Writes every notebook whose source or project has changed."""
    project = read_project()
    for source in list_sources():
        path, content = source.with_suffix(".ipynb"), build(source, project)
        if not path.exists() or path.read_text("utf-8") != content:
            path.write_text(content, "utf-8")
            print(f"wrote {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
