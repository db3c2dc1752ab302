"""The rules of the house, read from the source: imports, sizes, docstrings, what is forbidden."""

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

# Who may import whom inside plan_jax; `methods` stands for the package and all files in it.
MAY_IMPORT = {
    "": "types model methods tasks",
    "types": "",
    "metrics*": "metrics* types",
    "layers*": "layers* types",
    "heads*": "heads* layers* metrics* logger parallel types",
    "parallel": "types",
    "optim": "types",
    "logger": "parallel types",
    "checkpoint*": "checkpoint* parallel types",
    "page*": "page* metrics* logger types",
    "weights*": "weights* types",
    "encoders*": "encoders* layers* types",
    "data*": "data* weights.sources types",
    "methods": "methods.* types",
    "methods.contrastive": "types",
    "methods.gloria_packed": "methods.contrastive types",
    "methods.*": "methods.contrastive methods.gloria_packed layers* types",
    "tasks": "tasks.* metrics types",
    "tasks.*": "metrics* tasks.grounding_targets heads* types",
    "model": "encoders* methods* data* heads* checkpoint* types",
    "evaluate": "model tasks* data* checkpoint* logger page* metrics* types",
    "train": "model evaluate state step data* parallel checkpoint* logger types",
    "step": "model data* encoders* weights* optim parallel types",
    "predict": "model data* page.figures types",
    "fields": "data* encoders* methods* tasks* parallel types",
    "config": "fields types",
    "main": "config train evaluate checkpoint* parallel metrics tasks* types",
}
# Which files may import these libraries.
ONLY_IN = {
    "tensorflow": (),
    "torch": (
        "plan_jax/weights/sources.py",
        "tools/benchmark_losses.py",
        "tools/benchmark_encoders.py",
    ),
    "pickle": (),
    "cloudpickle": (),
    "marshal": (),
    "dill": (),
    "importlib.util": (),
    "importlib.import_module": (),
    "transformers": ("plan_jax/data/tokenizer.py", "tools/benchmark_encoders.py"),
    "safetensors": ("plan_jax/weights/sources.py", "tools/convert_weights.py"),
    "absl.flags": ("plan_jax/main.py", "tests/conftest.py"),
    "ml_collections": ("plan_jax/main.py", "plan_jax/train.py", "plan_jax/evaluate.py"),
}
FORBIDDEN_NAMES = re.compile(r"(^|/)(utils?|common|helpers?|misc|base_\w+)(\.py)?(/|$)")
ARRAYS = {"Array", "ndarray", "ArrayLike"}
SHAPE = re.compile(r"\[[A-Za-z0-9][\w .*]*\]|\([A-Z0-9]\w*(, [A-Z0-9]\w*)+\)")  # "[B P]", "(Y, X)"
SCALARS = {"key", "step"}
SKIPS = {"skip", "xfail", "importorskip"}  # `skipif` with a reason is for data that is not ours


def sources(*folders):
    """Paths of the Python files under the folders, relative to the root, in order."""
    found = [p for folder in folders for p in (ROOT / folder).rglob("*.py")]
    return sorted(str(p.relative_to(ROOT)) for p in found)


LIBRARY = sources("plan_jax")
EVERYTHING = sources("plan_jax", "configs", "tools", "tests")


@cache
def tree(path):
    """The parsed file."""
    return ast.parse((ROOT / path).read_text())


def module(path):
    """`plan_jax/data/loader.py` -> `plan_jax.data.loader`; a package is called by its folder."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports(path):
    """Full names of everything the file imports, at any depth, relative imports resolved."""
    package = module(path) if path.endswith("__init__.py") else module(path).rpartition(".")[0]
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            up = package.split(".")[: len(package.split(".")) - node.level + 1]
            stem = ".".join(up * bool(node.level) + [node.module] * bool(node.module))
            yield from (f"{stem}.{alias.name}" for alias in node.names)


def inner(path):
    """Modules of plan_jax that the file imports, without the leading `plan_jax.`."""
    known = {module(p) for p in LIBRARY}
    for name in imports(path):
        while name not in known and "." in name:
            name = name.rpartition(".")[0]
        if name in known:
            yield name.removeprefix("plan_jax").removeprefix(".")


def functions(path, public=False):
    """Functions and classes of the file with dotted names; `public` ones are of use outside it."""

    def walk(node, prefix):
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                if public and (child.name.startswith("_") or child.name == "setup"):
                    continue
                yield f"{prefix}{child.name}", child
                if not public or isinstance(child, ast.ClassDef):
                    yield from walk(child, f"{prefix}{child.name}.")
            elif not public:
                yield from walk(child, prefix)

    yield from walk(tree(path), "")


def bare_array(annotation):
    """Whether the annotation is an array type that says nothing of its shape."""
    name = getattr(annotation, "id", getattr(annotation, "attr", None))
    return name in ARRAYS


@pytest.mark.parametrize("path", LIBRARY)
def test_imports_point_downwards(path):
    name = module(path).removeprefix("plan_jax").removeprefix(".")
    rules = [r for p, r in MAY_IMPORT.items() if fnmatch(name, p)]
    assert rules, f"{path} has no line in MAY_IMPORT: say who may use it and what it may use"
    wrong = sorted({i for i in inner(path) if not any(fnmatch(i, r) for r in rules[0].split())})
    assert not wrong, f"{path} imports {wrong}; it may import only: {rules[0] or 'nothing'}"


def test_no_import_circle():
    graph = {module(p).removeprefix("plan_jax").removeprefix("."): set(inner(p)) for p in LIBRARY}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            path.append(name)
            for other in graph[name] - {name}:
                visit(other)
            done.add(path.pop())

    for name in graph:
        visit(name)


@pytest.mark.parametrize("path", sources("configs"))
def test_configs_are_data(path):
    allowed = ("ml_collections", "configs")
    wrong = [i for i in imports(path) if i.split(".")[0] not in allowed]
    assert not wrong, f"{path} imports {wrong}; a config may import only {allowed}"


@pytest.mark.parametrize("path", sources("plan_jax", "tools"))
def test_libraries_stay_where_they_belong(path):
    for name in imports(path):
        for library, homes in ONLY_IN.items():
            if name == library or name.startswith(f"{library}."):
                assert path in homes, f"{path} imports {name}; only {homes or 'nobody'} may"


@pytest.mark.parametrize("path", EVERYTHING)
def test_a_file_says_what_it_is(path):
    first = (ROOT / path).read_text().split("\n", 1)[0]
    assert re.match(r'r?"""\w', first), f"{path} begins with {first!r}, not with its docstring"
    assert not FORBIDDEN_NAMES.search(path), f"{path}: name a file for what is in it"


@pytest.mark.parametrize("path", sources("plan_jax", "configs", "tools"))
def test_public_things_are_explained(path):
    for name, node in functions(path, public=True):
        text = ast.get_docstring(node) or ""
        assert text, f"{path}: {name} has no docstring"
        if isinstance(node, ast.ClassDef):
            continue
        slots = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        notes = [a.annotation for a in slots if a.arg not in SCALARS]
        notes += [node.returns] * (not name.endswith("_key"))
        silent = any(bare_array(n) for n in notes) and not SHAPE.search(text)
        assert not silent, f"{path}: {name} takes or gives an array of a shape it does not tell"


@pytest.mark.parametrize("path", EVERYTHING)
def test_nothing_is_evaluated_unfinished_or_skipped(path):
    for node in ast.walk(tree(path)):
        called = getattr(node, "func", None)
        if isinstance(called, ast.Name):
            assert called.id not in {"eval", "exec", "__import__"}, f"{path}: {called.id}()"
        if isinstance(node, ast.keyword):
            assert node.arg != "allow_pickle", f"{path}: pickles run code when they are read"
        name = getattr(node, "id", getattr(node, "attr", ""))
        assert name != "NotImplementedError", f"{path}:{node.lineno} is not finished"
        assert name != "import_module", f"{path}:{node.lineno} imports what a string says"
        pytest_says = isinstance(node, ast.Attribute) and ast.unparse(node).startswith("pytest.")
        assert not (pytest_says and name in SKIPS), f"{path}:{node.lineno} hides a test"
    text = (ROOT / path).read_text()
    unfinished = re.findall(r"#.*\b(?:TO" + r"DO|FIX" + r"ME|X" + r"XX)\b|\+SK" + r"IP\b", text)
    assert not unfinished, f"{path}: {unfinished}"


def test_the_wheel_has_what_it_needs():
    assert (ROOT / "LICENSE").read_text().split()[:2] == ["Apache", "License"]
    assert (ROOT / "plan_jax" / "py.typed").exists()  # its types count for those who import it
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60
    versions = (ROOT / "constraints.txt").read_text()
    assert not re.search(r"^(tensorflow|torch)==", versions, re.M)


@pytest.mark.parametrize("path", [*EVERYTHING, "README.md", "CONTRIBUTING.md", "Makefile"])
def test_no_path_of_one_machine(path):
    text = (ROOT / path).read_text()
    assert not re.findall(r"(?<![\w.])/(?:" + "home|root|Users|mnt" + r")/\w+", text), path


def test_shapes_are_checked_while_tests_run():
    with pytest.raises(TypeCheckError):
        contrastive.cosine_similarity(jnp.zeros((3, 4)), jnp.zeros((3, 5)))
