"""The rules of the architecture, read from the source: imports, docstrings, what is forbidden."""

import ast
import re
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError

from plan_jax.methods import contrastive

ROOT = Path(__file__).resolve().parent.parent

# What each module of plan_jax may import from plan_jax. The first matching line counts; `methods*`
# stands for the package and all modules in it.
MAY_IMPORT = {
    "": "types model methods tasks",
    "types": "",
    "metrics*": "metrics* types",
    "layers*": "layers* types",
    "heads*": "heads* layers* metrics* logger parallel types",
    "parallel": "parallel.cluster types",
    "parallel.cluster": "parallel.hosts types",
    "parallel.hosts": "types",
    "optim": "types",
    "logger": "parallel types",
    "storage*": "storage* logger types",
    "checkpoint*": "checkpoint* storage logger parallel types",
    "page.__main__": "page* command* logger tasks types",
    "page*": "page* metrics* logger types",
    "weights*": "weights* layers.resize types",
    "encoders*": "encoders* layers* types",
    "data*": "data* weights.sources storage* logger types",
    "methods": "methods.* types",
    "methods.contrastive": "types",
    "methods.ranges": "types",
    "methods.gloria": "methods.contrastive methods.gloria_packed methods.ranges types",
    "methods.plan_contrast": "methods.contrastive layers* types",
    "methods.plan": (
        "methods.contrastive methods.plan_concise methods.plan_contrast methods.ranges layers*"
        " types"
    ),
    "methods.*": "methods.contrastive methods.ranges layers* types",
    "tasks": "tasks.* metrics types",
    "tasks.*": "metrics* tasks.grounding_targets tasks.report_variants heads* types",
    "config": "data* encoders* methods tasks parallel types",
    "export.__main__": "model export* command* types",
    "export.programs": "config data.tokenizer export.folder layers* model types",
    "export.reader": "",
    "export.image_tower": "encoders* types weights.torch_tower",
    "export*": (
        "export* checkpoint.checksums config data.tokenizer logger methods metrics page.tables"
        " parallel tasks types"
    ),
    "model": "config encoders* methods data* export* heads* checkpoint* parallel prediction types",
    "prediction*": "prediction* data* metrics* page.figures logger types",
    "state": "config model encoders* data* weights* optim parallel types",
    "step": "config methods.contrastive methods.hard_negatives model state parallel types",
    "evaluate": "config model tasks data* checkpoint* logger page metrics* parallel types",
    "train": "config model evaluate state step data* parallel checkpoint* logger command types",
    "demo": "demo.server",
    "demo.__main__": "demo.server command* types",
    "demo.server": "demo.page demo.render demo.service demo.uploads command parallel types",
    "demo*": (
        "demo.* data* logger metrics* model page.figures prediction* tasks.grounding_targets types"
    ),
    "command.scripts": "command demo.__main__ export.__main__ main predict prepare",
    "command*": "types",
    "predict": "model prediction* data* parallel logger command* types",
    "prepare": "data.preparation data.public.document command* types",
    "preflight": "preflight.*",
    "preflight.hlo": "",
    "preflight.shapes": "config data.phantom data.preparation data.public.builder model parallel "
    "state types",
    "preflight*": "preflight.* config parallel step types",
    "main": "config train evaluate model export.sources checkpoint* data.processes parallel "
    "storage metrics tasks command command.config_files preflight types",
}
# The only files that may import these libraries.
ONLY_IN = {
    "tensorflow": (),
    "torch": (
        "plan_jax/weights/sources.py",
        "tools/benchmark_losses.py",
        "tools/benchmark_device.py",
        "tools/benchmark_device_torch.py",
        "tools/benchmark_encoders.py",
        "tools/benchmark_records.py",
    ),
    "pickle": (),
    "cloudpickle": (),
    "marshal": (),
    "dill": (),
    "importlib.util": (),
    "importlib.import_module": ("plan_jax/tasks/__init__.py",),
    "transformers": (
        "plan_jax/data/tokenizer.py",
        "tools/benchmark_device_torch.py",
        "tools/benchmark_encoders.py",
    ),
    "safetensors": (
        "plan_jax/export/folder.py",
        "plan_jax/export/reader.py",
        "plan_jax/weights/sources.py",
        "plan_jax/weights/torch_tower.py",
        "tools/convert_weights.py",
    ),
    "absl.flags": ("plan_jax/main.py", "plan_jax/data/processes.py", "tests/conftest.py"),
    "tensorflow_datasets": ("plan_jax/data/tfds.py",),
    "ml_collections": ("plan_jax/main.py",),
    "gradio": ("plan_jax/demo/page.py",),
}
FORBIDDEN_NAMES = re.compile(r"(^|/)(utils?|common|helpers?|misc|base_\w+)(\.py)?(/|$)")
ARRAYS = {"Array", "ndarray", "ArrayLike"}
# A shape in a docstring: "[B P]" or "(Y, X)".
SHAPE = re.compile(r"\[[A-Za-z0-9][\w .*]*\]|\([A-Z0-9]\w*(, [A-Z0-9]\w*)+\)")
SCALARS = {"key", "step"}
# `skipif` with a reason is allowed for data that does not belong to this project.
SKIPS = {"skip", "xfail", "importorskip"}
DIALECT_OPENERS = {"Give", "Make", "Say", "Tell", "Let", "Whether", "What", "Take"}


def list_sources(*folders):
    """Returns the paths of the Python files in folders, relative to the root, sorted."""
    paths = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    return sorted(str(path.relative_to(ROOT)) for path in paths)


LIBRARY = list_sources("plan_jax")
ALL_SOURCES = list_sources("plan_jax", "configs", "tools", "tests")


@cache
def parse(path):
    return ast.parse((ROOT / path).read_text())


def module_name(path):
    """Returns `plan_jax.data.loader` for `plan_jax/data/loader.py`, and a package's own name."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imported_names(path):
    """Yields the full names of all imports in a file, with relative imports resolved."""
    is_package = path.endswith("__init__.py")
    package = module_name(path) if is_package else module_name(path).rpartition(".")[0]
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1]
            stem = ".".join(parents * bool(node.level) + [node.module] * bool(node.module))
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def imported_modules(path):
    """Yields the modules of plan_jax that a file imports, without the leading `plan_jax.`."""
    modules = {module_name(source) for source in LIBRARY}
    for name in imported_names(path):
        while name not in modules and "." in name:
            name = name.rpartition(".")[0]
        if name in modules:
            yield name.removeprefix("plan_jax").removeprefix(".")


def public_definitions(path):
    """Yields the public functions and classes of a file with their dotted names."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                continue
            if child.name.startswith("_") or child.name == "setup":
                continue
            yield f"{prefix}{child.name}", child
            if isinstance(child, ast.ClassDef):
                yield from walk(child, f"{prefix}{child.name}.")

    yield from walk(parse(path), "")


def is_bare_array(annotation):
    """Returns whether an annotation is an array type without a shape."""
    name = getattr(annotation, "id", getattr(annotation, "attr", None))
    return name in ARRAYS


@pytest.mark.parametrize("path", LIBRARY)
def test_imports_point_downwards(path):
    name = module_name(path).removeprefix("plan_jax").removeprefix(".")
    rules = [rule for pattern, rule in MAY_IMPORT.items() if fnmatch(name, pattern)]
    assert rules, f"{path} has no line in MAY_IMPORT; add what it may import"
    allowed = rules[0].split()
    wrong = sorted(
        module
        for module in set(imported_modules(path))
        if not any(fnmatch(module, pattern) for pattern in allowed)
    )
    assert not wrong, f"{path} imports {wrong}; it may import only: {rules[0] or 'nothing'}"


def test_there_is_no_import_circle():
    graph = {
        module_name(path).removeprefix("plan_jax").removeprefix("."): set(imported_modules(path))
        for path in LIBRARY
    }
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path, module])
        if module not in done:
            path.append(module)
            for imported in graph[module] - {module}:
                visit(imported)
            done.add(path.pop())

    for module in graph:
        visit(module)


def test_the_top_level_has_few_modules():
    top_level = [path for path in LIBRARY if path.count("/") == 1]
    assert len(top_level) <= 14, f"{top_level}: move one into the package of its subject"


@pytest.mark.parametrize("path", list_sources("configs"))
def test_configs_are_data(path):
    allowed = ("ml_collections", "configs")
    wrong = [name for name in imported_names(path) if name.split(".")[0] not in allowed]
    assert not wrong, f"{path} imports {wrong}; a config may import only {allowed}"


@pytest.mark.parametrize("path", list_sources("plan_jax", "tools"))
def test_libraries_stay_where_they_belong(path):
    for name in imported_names(path):
        for library, homes in ONLY_IN.items():
            if name == library or name.startswith(f"{library}."):
                assert path in homes, f"{path} imports {name}; only {homes or 'no file'} may"


@pytest.mark.parametrize("path", ALL_SOURCES)
def test_a_file_has_a_docstring_and_a_specific_name(path):
    first_line = (ROOT / path).read_text().split("\n", 1)[0]
    assert re.match(r'r?"""\w', first_line), f"{path} starts with {first_line!r}, not a docstring"
    assert not FORBIDDEN_NAMES.search(path), f"{path}: name a file after its content"


@pytest.mark.parametrize("path", list_sources("plan_jax", "configs", "tools"))
def test_public_definitions_are_documented(path):
    for name, node in public_definitions(path):
        docstring = ast.get_docstring(node) or ""
        assert docstring, f"{path}: {name} has no docstring"
        if isinstance(node, ast.ClassDef):
            continue
        arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        annotations = [a.annotation for a in arguments if a.arg not in SCALARS]
        annotations += [node.returns] * (not name.endswith("_key"))
        lacks_shape = any(map(is_bare_array, annotations)) and not SHAPE.search(docstring)
        assert not lacks_shape, f"{path}: {name} takes or returns an array of unknown shape"


@pytest.mark.parametrize("path", list_sources("plan_jax", "configs", "tools"))
def test_docstrings_open_with_a_verb_of_the_field(path):
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.Module):
            words = (ast.get_docstring(node) or "").split()
            opener = words[0].strip(".,:;`") if words else ""
            assert opener not in DIALECT_OPENERS, f"{path}: {opener!r}; use Returns or Computes"


@pytest.mark.parametrize("path", ALL_SOURCES)
def test_nothing_is_evaluated_unfinished_or_skipped(path):
    for node in ast.walk(parse(path)):
        function = getattr(node, "func", None)
        if isinstance(function, ast.Name):
            assert function.id not in {"eval", "exec", "__import__"}, f"{path}: {function.id}()"
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", f"{path}: reading a pickle runs code"
        name = getattr(node, "id", getattr(node, "attr", ""))
        assert name != "NotImplementedError", f"{path}:{node.lineno} is not finished"
        is_allowed = path in ONLY_IN["importlib.import_module"]
        assert name != "import_module" or is_allowed, f"{path}:{node.lineno} imports by a string"
        is_pytest = isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pytest.")
        assert not (is_pytest and name in SKIPS), f"{path}:{node.lineno} hides a test"
    text = (ROOT / path).read_text()
    unfinished = re.findall(r"#.*\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b|\+SK" + r"IP\b", text)
    assert not unfinished, f"{path}: {unfinished}"


def test_the_distribution_is_complete():
    assert (ROOT / "LICENSE").read_text().split()[:2] == ["Apache", "License"]
    assert (ROOT / "plan_jax/py.typed").exists()
    versions = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"^(tensorflow|torch)==", versions, re.M)


@pytest.mark.parametrize("path", [*ALL_SOURCES, "README.md", "CONTRIBUTING.md", "Makefile"])
def test_no_file_names_a_path_of_one_machine(path):
    text = (ROOT / path).read_text()
    assert not re.findall(r"(?<![\w.])/(?:" + "home|root|Users|mnt" + r")/\w+", text), path


def test_shapes_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        contrastive.cosine_similarity(jnp.zeros((3, 4)), jnp.zeros((3, 5)))
