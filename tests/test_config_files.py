"""Config files: found by path and by name, and imported by each other from any folder."""

import sys
from pathlib import Path

import pytest

from plan_jax.command.config_files import list_names, load_config_file, locate
from plan_jax.types import UserError

ROOT = Path(__file__).resolve().parent.parent
MINE = "from configs import plan\n\n\ndef get_config():\n    return plan.get_config('phantom')\n"


@pytest.fixture(autouse=True)
def empty_folder(monkeypatch, tmp_path):
    """Runs in an empty folder, without the checkout on the path of imports."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [path for path in sys.path if path not in ("", str(ROOT))])


@pytest.mark.parametrize("name", ["demo", "eval/all_phantom", "eval/benchx_rsna"])
@pytest.mark.parametrize("form", ["{}", "{}.py", "configs/{}", "configs/{}.py", "./configs/{}.py"])
def test_a_name_is_found_from_any_folder(name, form):
    assert locate(form.format(name)) == ROOT / "configs" / f"{name}.py"


def test_an_argument_follows_a_name():
    by_name = load_config_file("gloria:phantom")
    assert by_name == load_config_file(f"{ROOT}/configs/gloria.py:phantom")
    assert by_name != load_config_file("gloria")


BUILDERS = ("benchmark", "checkpoint")  # files of functions that build configs


def test_all_configs_have_names():
    names = list_names()
    files = [path for path in (ROOT / "configs").rglob("*.py") if path.stem not in BUILDERS]
    assert len(names) == len(files) and names == sorted(names)
    assert all(locate(name) in files for name in names)


@pytest.mark.parametrize("path", ["demo.py", "configs/demo.py"])
def test_a_file_has_precedence_over_a_name(path):
    Path(path).parent.mkdir(exist_ok=True)
    Path(path).write_text(MINE.replace("return", "raise ValueError('mine') #"))
    with pytest.raises(UserError, match=f"config file {path} line 5 raises ValueError: mine"):
        load_config_file(path)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("demoo", "did you mean demo?"),
        ("demo.yp", "did you mean demo?"),
        ("all_phantom", "did you mean eval/all_phantom"),
        ("eval/rsna_liner", "did you mean eval/rsna_linear"),
        ("my_studdy.py", "did you mean my_study.py?"),
        ("xyzzy", "there are asg, base, "),
        ("eval/xyzzy", "there are eval/all_phantom, "),
        ("eval/benchmark", "did you mean eval/benchx_rsna"),
        ("../configs/demo.py", "did you mean demo?"),
        ("", "pass the path of a file"),
        ("a\0b", "pass the path of a file"),
        ("x" * 5000, "pass the path of a file"),
    ],
)
def test_a_name_that_does_not_exist(name, remedy):
    Path("my_study.py").write_text(MINE)
    with pytest.raises(UserError) as error:
        load_config_file(name)
    sentence = str(error.value)
    assert sentence.startswith(f"config file {name} does not exist; ") and remedy in sentence
    assert "\n" not in sentence


@pytest.mark.parametrize("path", ["mine.py", "configs/mine.py", "a/configs/b/mine.py"])
def test_a_file_anywhere_imports_the_configs_of_the_package(path, tmp_path):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(MINE)
    before = list(sys.path)
    assert load_config_file(path)["method"] == "plan"
    assert load_config_file(str(tmp_path / path)) == load_config_file("plan:phantom")
    assert sys.path == before


def test_the_configs_of_a_user_come_before_those_of_the_package():
    for folder, steps in (("configs", 1), ("study/configs", 2)):
        Path(folder).mkdir(parents=True)
        Path(folder, "ours.py").write_text(f"STEPS = {steps}\n")
        Path(folder, "mine.py").write_text(
            "from configs import ours, plan\n\n\ndef get_config():\n"
            "    config = plan.get_config('phantom')\n    config.steps = ours.STEPS\n"
            "    return config\n"
        )
    assert load_config_file("configs/mine.py")["steps"] == 1
    assert load_config_file("study/configs/mine.py")["steps"] == 2
    Path("configs/ours.py").write_text("STEPS = 3  # as somebody edits it in a notebook\n")
    assert load_config_file("configs/mine.py")["steps"] == 3


def test_a_config_of_the_package_never_imports_those_of_a_user():
    Path("configs").mkdir()
    Path("configs/plan.py").write_text("raise ValueError('not asked for')\n")
    assert load_config_file("demo")["steps"] == 1800


def test_modules_that_are_called_configs_are_kept(monkeypatch):
    def submodules():
        return {name: x for name, x in sys.modules.items() if name.startswith("configs.")}

    module, before = type(sys)("configs"), submodules()
    monkeypatch.setitem(sys.modules, "configs", module)
    load_config_file("demo")
    assert sys.modules["configs"] is module
    with pytest.raises(UserError):
        Path("wrong.py").write_text("from configs import absent\n")
        load_config_file("wrong.py")
    assert sys.modules["configs"] is module
    assert submodules() == before


def test_a_config_leaves_no_trace_for_the_next_one():
    """A notebook loads several in one process."""
    for folder in ("a", "b"):
        Path(folder).mkdir()
    Path("a/demo.py").write_text(MINE)
    Path("b/demo.py").write_text("STEPS = 1\n")
    before = set(sys.modules)
    assert load_config_file("a/demo.py")["method"] == "plan"
    with pytest.raises(UserError, match=r"config file b/demo.py has no function get_config\(\)"):
        load_config_file("b/demo.py")
    assert not [name for name in set(sys.modules) - before if "demo" in name or "configs" in name]


def test_a_file_of_the_name_of_the_config_that_it_imports():
    Path("plan.py").write_text(MINE)
    assert load_config_file("plan.py") == load_config_file("plan:phantom")


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("    return open('absent.txt').read()\n", "line 2 raises FileNotFoundError: "),
        ("    raise SystemExit(3)\n", "line 2 raises SystemExit: 3"),
        ("    pass\nraise SystemExit\n", "line 3 raises SystemExit: "),
        ("    return None\n", "returns None; "),
    ],
)
def test_what_a_file_raises_is_one_sentence(body, reason):
    Path("mine.py").write_text(f"def get_config():\n{body}")
    with pytest.raises(UserError) as error:
        load_config_file("mine.py")
    assert str(error.value).startswith(f"config file mine.py {reason}")
