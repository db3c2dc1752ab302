"""Hooks of mkdocs: pages made from the source, links to files beside `docs/`, and equations.

`make docs` builds the site that `mkdocs.yml` describes. Equations become MathML here, at build
time, so that the pages need no script and no other server for them.
"""

import ast
import html
import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from tools.config_reference import write_page  # noqa: E402

# The modules of the reference, in the order of its navigation: a title and patterns of files.
REFERENCE = {
    "Models": (
        "model.py",
        "types.py",
        "config.py",
        "prediction/__init__.py",
        "export/pretrained.py",
    ),
    "Methods": ("methods/*.py",),
    "Tasks": ("tasks/*.py",),
    "Metrics": ("metrics/*.py",),
    "Encoders and heads": ("encoders/*.py", "layers/*.py", "heads/*.py"),
    "Data": (
        "data/*.py",
        "data/builders/pairs.py",
        "data/phantom/__init__.py",
        "data/sections/*.py",
    ),
    "Training": ("train.py", "step.py", "state.py", "optim.py", "parallel.py", "evaluate.py"),
    "Checkpoints and weights": ("checkpoint/*.py", "weights/*.py", "export/*.py"),
    "Pages": ("page/*.py", "prediction/*.py"),
}
# The commands, by the file whose docstring describes them.
COMMANDS = {
    "plan-jax": "main.py",
    "plan-jax-predict": "predict.py",
    "plan-jax-export": "export/__main__.py",
    "plan-jax-prepare": "prepare.py",
    "python -m plan_jax.page": "page/__main__.py",
}
# Pages that stand at the root of the repository.
ROOT_PAGES = {"contributing.md": "CONTRIBUTING.md", "changelog.md": "CHANGELOG.md"}
# The page that a link to a file leads to; in the repository the file itself can be read.
PAGES_OF_FILES = {source: page for page, source in ROOT_PAGES.items()} | {
    "configs/base.py": "reference/config.md"
}
# What may be linked from a page although it is not one; the site has a copy of it.
COPIED = (".ipynb", ".py", ".sh", ".txt", ".cff")


def on_config(config: Any, **_: Any) -> Any:
    """Adds the pages of the reference to the navigation."""
    reference = [
        {"Every field of a config": "reference/config.md"},
        {"Commands": "reference/commands.md"},
        *({title: [_page_of(path) for path in paths]} for title, paths in list_modules().items()),
    ]
    config.nav = [{"Reference": reference} if item == "Reference" else item for item in config.nav]
    return config


def list_modules() -> dict[str, list[Path]]:
    """Returns the files of the reference by title; each is in the first list that matches."""
    package = ROOT / "plan_jax"
    modules: dict[str, list[Path]] = {}
    listed: set[Path] = set()
    for title, patterns in REFERENCE.items():
        paths = [path for pattern in patterns for path in sorted(package.glob(pattern))]
        own = [p for p in paths if p not in listed and p.name != "__main__.py" and _has_content(p)]
        listed.update(own)
        modules[title] = list(dict.fromkeys(own))
    return modules


def on_files(files: Files, config: Any, **_: Any) -> Files:
    """Adds the pages that are made from the source."""
    pages = {"reference/config.md": write_page(), "reference/commands.md": write_commands()}
    for paths in list_modules().values():
        for path in paths:
            name = _module_name(path)
            pages[_page_of(path)] = f"# {name}\n\n::: {name}\n"
    for page, source in ROOT_PAGES.items():
        content = (ROOT / source).read_text("utf-8")
        pages[page] = content.replace("](docs/", "](")
    for page, content in pages.items():
        files.append(File.generated(config, page, content=content))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files, **_: Any) -> str:
    """Points links that leave `docs/` at the reference, or at a copy of the file in the site."""

    def redirect(match: re.Match) -> str:
        target = posixpath.normpath(posixpath.join("docs", match[1]))
        path = ROOT / target
        if target.startswith("docs/") or not path.is_file():
            return match[0]  # the build checks the others
        own_page = PAGES_OF_FILES.get(target, "")
        if target.startswith("plan_jax/"):
            own_page = _page_of(path)
        if own_page and files.get_file_from_path(own_page):
            return f"]({own_page})"
        if path.suffix in COPIED:
            if not files.get_file_from_path(target):
                files.append(File.generated(config, target, abs_src_path=str(path)))
            return f"]({target})"
        return match[0]

    def name_by_title(match: re.Match) -> str:
        path = ROOT / "docs" / match[1]
        title = re.search(r"^# (.+)$", path.read_text("utf-8"), re.M) if path.is_file() else None
        return f"[{title[1]}]({match[1]}{match[2] or ''})" if title else match[0]

    if "/" in page.file.src_uri:
        return markdown
    markdown = re.sub(r"\]\((\.\./[^)#\s]+)\)", redirect, markdown)
    # In the repository a link names the file, on the site the page.
    return re.sub(r"\[\w+\.md\]\((\w+\.md)(#[^)]*)?\)", name_by_title, markdown)


def on_page_content(content: str, **_: Any) -> str:
    """Renders equations, which arithmatex has marked, as MathML."""

    def render(match: re.Match) -> str:
        formula = html.unescape(match[2]).strip()
        is_block = match[1] == "div"
        inner = formula.removeprefix(r"\(").removesuffix(r"\)")
        if is_block:
            inner = formula.removeprefix(r"\[").removesuffix(r"\]")
        mathml = convert(inner.strip(), display="block" if is_block else "inline")
        # What it was written as is what is read aloud and copied.
        label = html.escape(" ".join(inner.split()), quote=True)
        mathml = mathml.replace("<math ", f'<math aria-label="{label}" ', 1)
        return f'<div class="equation" tabindex="0">{mathml}</div>' if is_block else mathml

    return re.sub(r'<(div|span) class="arithmatex">(.*?)</\1>', render, content, flags=re.S)


def write_commands() -> str:
    """Returns the page of the commands, from their docstrings."""
    parts = ["# Commands", "`--help` of a command lists its options."]
    for command, file in COMMANDS.items():
        docstring = ast.get_docstring(ast.parse((ROOT / "plan_jax" / file).read_text("utf-8")))
        parts += [f"## `{command}`", docstring or ""]
    return "\n\n".join(parts) + "\n"


def _module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _page_of(path: Path) -> str:
    return f"reference/{_module_name(path)}.md"


def _has_content(path: Path) -> bool:
    """Returns whether a module has more than its docstring."""
    return len(ast.parse(path.read_text("utf-8")).body) > 1
