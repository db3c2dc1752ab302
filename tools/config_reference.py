"""Writes the page of all fields of a config: name, type, default and meaning, from the source.

    python tools/config_reference.py

The page is part of the documentation (`make docs`). Nothing is imported: types, defaults and the
comments beside them are read from the text of the dataclasses, so no JAX is needed. A field takes
its meaning from the comment beside or above it, from `Attributes` or a sentence in the
docstring of its class, or from the comment in `configs/base.py`.
"""

import ast
import copy
import io
import re
import tokenize
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "plan_jax"

# The sections of a config: dotted name, file and class, in the order of the page.
SECTIONS = (
    ("", "config.py", "Config"),
    ("data", "config.py", "DataConfig"),
    ("data.augment", "data/augmentation.py", "Augmentation"),
    ("heads", "config.py", "HeadsConfig"),
    ("weights", "config.py", "WeightsConfig"),
    ("optim", "config.py", "OptimConfig"),
    ("hard_negatives", "config.py", "HardNegativesConfig"),
    ("parallel", "config.py", "ParallelConfig"),
    ("checkpoint", "config.py", "CheckpointConfig"),
    ("eval", "config.py", "EvalConfig"),
)
METHODS = ("convirt", "gloria", "mgca", "asg", "place", "plan")
TOWERS = (
    ("vision", "encoders/resnet.py", "ResNet"),
    ("vision", "encoders/vit.py", "ViT"),
    ("text", "encoders/bert.py", "Bert"),
)
# Fields of an encoder that a config does not set.
INTERNAL = ("dtype", "axis", "frozen_layers", "vocab_size")
# Fields that are sections of their own, or are filled from them.
HIDDEN = {"": ("hyper",), "eval": ("options",)}


@dataclass(frozen=True)
class Field:
    """A field of a config: type, default and meaning as texts, "" where there is none."""

    name: str
    kind: str
    default: str
    meaning: str


def read_fields(path: Path, class_name: str) -> list[Field]:
    """Returns the fields of a dataclass, read from the source."""
    docstring = ast.get_docstring(_find_class(path, class_name)) or ""
    described = _read_attributes(docstring) | read_field_comments(path, class_name)
    fields = []
    for name, item in _list_fields(path, class_name).items():
        meaning = described.get(name) or _find_sentence(docstring, name)
        default = _default_text(item.value, path)
        fields.append(Field(name, ast.unparse(item.annotation), default, meaning))
    return fields


def read_field_comments(path: Path, class_name: str) -> dict[str, str]:
    """Returns the comments beside or above the fields of a class, by name."""
    comments = _read_comments(path)
    meanings = {}
    for name, item in _list_fields(path, class_name).items():
        # A formatter may have moved the comment beside a long value inside of it.
        lines = range(item.lineno, (item.end_lineno or item.lineno) + 1)
        beside = " ".join(comments[line] for line in lines if line in comments)
        if meaning := beside or _read_above(comments, item.lineno):
            meanings[name] = meaning
    return meanings


def read_docstring(path: Path, class_name: str) -> str:
    """Returns the docstring of a class up to its `Attributes` or `Raises`."""
    docstring = ast.get_docstring(_find_class(path, class_name)) or ""
    return re.split(r"\n\n(?:Attributes|Raises):", docstring)[0]


def write_page() -> str:
    """Returns the page in Markdown."""
    base_comments = read_base_comments()
    parts = [_INTRODUCTION]
    for prefix, path, class_name in SECTIONS:
        title = f"config.{prefix}" if prefix else "config"
        parts += [f"## `{title}`", read_docstring(PACKAGE / path, class_name)]
        fields = [
            field
            for field in read_fields(PACKAGE / path, class_name)
            # A section has a table of its own.
            if field.name not in HIDDEN.get(prefix, ()) and field.default != f"{field.kind}()"
        ]
        parts.append(_format_table(fields, prefix, base_comments))
    parts += ["## `config.hyper`", "Constants of the method that `config.method` names."]
    for method in METHODS:
        path = PACKAGE / "methods" / f"{method}.py"
        parts += [f"### `hyper` of {method}", read_docstring(path, "Hyper")]
        parts.append(_format_table(read_fields(path, "Hyper"), "hyper"))
    parts += [
        "## `config.vision` and `config.text`",
        "`name` chooses the encoder, see [weights.md](../weights.md); the other fields are options "
        "of its class. A field without a default has that of the chosen encoder.",
    ]
    for section, path, class_name in TOWERS:
        fields = [
            field for field in read_fields(PACKAGE / path, class_name) if field.name not in INTERNAL
        ]
        parts += [f"### `{section}`: {class_name}", read_docstring(PACKAGE / path, class_name)]
        parts.append(_format_table(fields, section))
    parts += ["## `config.eval.<task>`", "Options of the tasks in `config.eval.tasks`."]
    for path in sorted((PACKAGE / "tasks").glob("*.py")):
        if _has_class(path, "Options"):
            task = path.stem
            parts += [f"### `eval.{task}`", read_docstring(path, "Options")]
            parts.append(_format_table(read_fields(path, "Options"), f"eval.{task}"))
    parts += ["## `config.data.builder`", "Fields of the dataset that `config.data.name` names."]
    public = PACKAGE / "data/public/config.py"
    parts += ["### `data.builder` of every public dataset", read_docstring(public, "PublicConfig")]
    parts.append(_format_table(read_fields(public, "PublicConfig"), "data.builder"))
    for path in sorted((PACKAGE / "data/builders").glob("*.py")):
        for class_name in _config_classes(path):
            fields = read_fields(path, class_name)
            if fields:
                parts += [f"### `data.builder` of {path.stem}", read_docstring(path, class_name)]
                parts.append(_format_table(fields, "data.builder"))
    return "\n\n".join(part for part in parts if part) + "\n"


_INTRODUCTION = """# Every field of a config

Set a field in a file of `configs/`, or on the command line as `--config.optim.learning_rate=1e-4`.
A misspelt field or a value out of range stops the run with one sentence. This page is made from the
dataclasses that check the fields."""


@cache
def _parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text("utf-8"))


def _find_class(path: Path, class_name: str) -> ast.ClassDef:
    for node in _parse(path).body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            return node
    raise LookupError(f"{path} has no class {class_name}")


def _list_fields(path: Path, class_name: str) -> dict[str, ast.AnnAssign]:
    return {
        item.target.id: item
        for item in _find_class(path, class_name).body
        if isinstance(item, ast.AnnAssign)
        and isinstance(item.target, ast.Name)
        and not ast.unparse(item.annotation).startswith("ClassVar")
    }


def _has_class(path: Path, class_name: str) -> bool:
    return any(
        isinstance(node, ast.ClassDef) and node.name == class_name for node in _parse(path).body
    )


def _config_classes(path: Path) -> Iterator[str]:
    for node in _parse(path).body:
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            yield node.name


@cache
def _read_comments(path: Path) -> Mapping[int, str]:
    """Returns the comments of a file by their line; one on a line of its own starts with "# "."""
    text = path.read_text("utf-8")
    comments = {}
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT:
            is_alone = not token.line[: token.start[1]].strip()
            content = token.string.lstrip("# ")
            comments[token.start[0]] = f"# {content}" if is_alone else content
    return comments


def _read_above(comments: Mapping[int, str], line: int) -> str:
    """Returns the comment on the lines right above a field."""
    lines: list[str] = []
    while comments.get(line - 1, "").startswith("# "):
        line -= 1
        lines.insert(0, comments[line].removeprefix("# "))
    return " ".join(lines)


def _read_attributes(docstring: str) -> dict[str, str]:
    """Returns the meanings in the section `Attributes` of a docstring."""
    match = re.search(r"^Attributes:\n(.*?)(?:\n\n|\Z)", docstring, re.M | re.S)
    meanings: dict[str, str] = {}
    names: list[str] = []
    for line in match[1].split("\n") if match else ():
        entry = re.match(r"  (\w+(?:, \w+)*): (.*)", line)
        if entry:
            names = entry[1].split(", ")
            meanings |= dict.fromkeys(names, entry[2])
        else:
            meanings |= {name: f"{meanings[name]} {line.strip()}" for name in names}
    return meanings


def _find_sentence(docstring: str, name: str) -> str:
    """Returns the first sentence of a docstring that names a field, "" if there is none."""
    text = " ".join(docstring.partition("\n\nRaises:")[0].split())
    sentences = (part.rstrip(".") for part in re.split(r"(?<=\.) (?=[A-Z`])", text))
    return next((sentence for sentence in sentences if f"`{name}`" in sentence), "")


def read_base_comments() -> dict[str, str]:
    """Returns the comments of `configs/base.py` by the dotted name of the field they stand at."""
    path = ROOT / "configs/base.py"
    comments = _read_comments(path)
    fields = {}
    for node in ast.walk(_parse(path)):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Attribute):
            name = ast.unparse(node.targets[0]).removeprefix("config.")
            if node.lineno in comments:
                # The first one counts: `get_config` comes before the settings of papers.
                fields.setdefault(name, comments[node.lineno])
    return fields


@cache
def _constants(path: Path) -> Mapping[str, ast.expr]:
    """Returns the constants of a file and those it imports, which may be defaults, by name."""
    constants = {}
    for node in _parse(path).body:
        if isinstance(node, ast.Assign):
            target, value = node.targets[0], node.value
            pairs = [(target, value)]
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                pairs = list(zip(target.elts, value.elts, strict=True))
            constants |= {t.id: v for t, v in pairs if isinstance(t, ast.Name)}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plan_jax."):
            file = ROOT.joinpath(*(node.module or "").split(".")).with_suffix(".py")
            own = _constants(file) if file.is_file() else {}
            names = (alias.name for alias in node.names)
            constants |= {name: own[name] for name in names if name in own}
    return constants


class _Resolver(ast.NodeTransformer):
    """Replaces names of constants, also of other modules of the package, by their values."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def visit_Name(self, node: ast.Name) -> ast.expr:
        return _constants(self.path).get(node.id, node)

    def visit_Attribute(self, node: ast.Attribute) -> ast.expr:
        module = _imports(self.path).get(ast.unparse(node.value))
        return _constants(module).get(node.attr, node) if module else node


@cache
def _imports(path: Path) -> Mapping[str, Path]:
    """Returns the modules of the package that a file imports by name."""
    modules = {}
    for node in _parse(path).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("plan_jax"):
            folder = ROOT.joinpath(*(node.module or "").split("."))
            for alias in node.names:
                for file in (folder / f"{alias.name}.py", folder / alias.name / "__init__.py"):
                    if file.is_file():
                        modules[alias.name] = file
    return modules


def _default_text(value: ast.expr | None, path: Path) -> str:
    if value is None:
        return ""
    if isinstance(value, ast.Call) and ast.unparse(value.func).endswith("field"):
        keywords = {keyword.arg: keyword.value for keyword in value.keywords}
        if "default" in keywords:
            return ast.unparse(keywords["default"])
        factory = keywords["default_factory"]
        if isinstance(factory, ast.Lambda):
            return ast.unparse(factory.body)
        name = ast.unparse(factory)
        return "{}" if name == "dict" else f"{name}()"
    return ast.unparse(_Resolver(path).visit(copy.deepcopy(value)))


def _format_table(
    fields: list[Field], prefix: str, base_comments: Mapping[str, str] | None = None
) -> str:
    lines = ["| field | type | default | meaning |", "|---|---|---|---|"]
    for field in fields:
        name = f"{prefix}.{field.name}" if prefix else field.name
        meaning = field.meaning or (base_comments or {}).get(name, "")
        if not meaning and not field.default:
            meaning = "that of the chosen encoder"
        cells = (
            f"`{name}`",
            f"`{field.kind}`",
            f"`{field.default}`" if field.default else "",
            meaning,
        )
        # A bar would begin a new cell, and an angle bracket a tag.
        lines.append(f"| {' | '.join(_escape(cell) for cell in cells)} |")
    return "\n".join(lines)


def _escape(cell: str) -> str:
    return re.sub(r"(?<!`)<(?!`)(?=[a-z])", "&lt;", cell.replace("|", r"\|"))


if __name__ == "__main__":
    print(write_page(), end="")
