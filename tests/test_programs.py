"""Programs of a model: loaded in a process without plan_jax and flax, they answer as the model."""

import dataclasses
import json
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import traverse_util
from jax import export
from PIL import Image
from published import assert_identical
from saved_models import IMAGES, assert_equal_answers, make_config, make_model, make_variables

from plan_jax import model as models
from plan_jax.data.tokenizer import load_tokenizer, tokenize_batch
from plan_jax.export import __main__ as export_command
from plan_jax.export import folder as folders
from plan_jax.export import reader
from plan_jax.export.programs import (
    DEFAULT_PLATFORMS,
    FIELDS,
    SIGNATURES,
    add_programs,
    check_platforms,
    trace_programs,
)
from plan_jax.export.reader import Reader, check_jax
from plan_jax.layers import cpu
from plan_jax.layers.cpu import attention, convolution, product
from plan_jax.methods import METHODS
from plan_jax.types import UserError
from plan_jax.weights import load_tower

PLAIN = {"hyper": {}, "fine_map": False}
CHANGES = {
    "plan": {},
    "convirt": PLAIN | {"method": "convirt"},
    "gloria": PLAIN | {"method": "gloria"},
    "mgca": PLAIN | {"method": "mgca"},
    "asg": PLAIN | {"method": "asg"},
    "place": PLAIN | {"method": "place"},
}
# The last has punctuation, a word of several pieces and one that is unknown.
SENTENCES = [
    ["effusion on the left"],
    ["no pneumothorax.", "heart is normal"],
    ["retrocardiac: opacity, 5.2 cm \u00e9\u00df"],
]

# Runs in a process that can import neither flax nor plan_jax.
CHILD = """
    import importlib.util, json, sys
    from pathlib import Path

    class Blocker:
        def find_spec(self, name, path=None, target=None):
            if name.partition(".")[0] in ("flax", "plan_jax"):
                raise ImportError(f"{name} is blocked")

    sys.meta_path.insert(0, Blocker())
    import numpy as np

    out, *folders = sys.argv[1:]
    inputs = np.load(out + "/inputs.npz")
    for folder in folders:
        sys.path.insert(0, folder + "/programs")
        sys.modules.pop("reader", None)
        from reader import Reader
        sys.path.pop(0)
        reader = Reader(folder)
        texts = reader.tokenize(json.loads(str(inputs["sentences"])))
        images = reader.encode_image(inputs["images"])
        features = reader.encode_text(texts)
        maps, weights = reader.heatmap(images, features)
        arrays = {f"token/{name}": x for name, x in texts.items()}
        arrays |= {f"image/{name}": x for name, x in images.items()}
        arrays |= {f"text/{name}": x for name, x in features.items()}
        arrays |= {"maps": maps, "weights": weights}
        assert not {"flax", "plan_jax"} & set(sys.modules)
        np.savez(f"{out}/{Path(folder).name}.npz", **arrays)
"""


def make_saved_model(method, parent, dtype="float32"):
    """Saves a model of random weights with its programs; returns the loaded one and its folder."""
    config = make_config(**CHANGES[method])
    components = models.build_components(config)
    model = models.make_model(components, config, make_variables(components))
    folder = model.save_pretrained(parent / method, dtype=dtype)
    add_programs(folder)
    return models.load(folder), folder


def test_all_methods_are_tested():
    assert CHANGES.keys() == METHODS.keys()


def run_child(parent, folders, images):
    """Returns what the programs in each folder compute of images and as many texts."""
    sentences = json.dumps(SENTENCES[: len(images)])
    np.savez(parent / "inputs.npz", images=images, sentences=sentences)
    command = [sys.executable, "-c", textwrap.dedent(CHILD), parent, *folders]
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return {folder.name: dict(np.load(parent / f"{folder.name}.npz")) for folder in folders}


def expect(model, images):
    """Returns what a model of the library computes of the same images and texts."""
    texts, data = [" ".join(text) for text in SENTENCES[: len(images)]], model.config.data
    tokenizer = load_tokenizer(data.tokenizer)
    tokens = tokenize_batch(tokenizer, texts, data.max_tokens, data.max_words)
    arrays = {f"token/{name}": array for name, array in vars(tokens).items()}
    features = {"image": model.encode_image(images), "text": model.encode_text(texts)}
    for side, values in features.items():
        fields = {name: getattr(values, name) for name in FIELDS}
        arrays |= {f"{side}/{name}": x for name, x in fields.items() if x is not None}
    maps, weights = model.heatmap(*features.values())
    return arrays | {"maps": maps, "weights": weights}


def assert_near(actual, expected, tolerance=1e-5):
    assert actual.keys() == expected.keys()
    for name, array in expected.items():
        assert actual[name].dtype == array.dtype and actual[name].shape == array.shape, name
        bound = tolerance * max(1.0, float(np.abs(np.float64(array)).max()))
        assert np.abs(np.float64(actual[name]) - array).max() <= bound, name


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Returns a model of each method, and its folder with programs."""
    parent = tmp_path_factory.mktemp("programs")
    return {method: make_saved_model(method, parent) for method in CHANGES}


@pytest.fixture(scope="module")
def answers(saved, tmp_path_factory):
    """Returns three images, and what the programs of each method answer in another process."""
    images = np.concatenate([IMAGES, IMAGES[:1] // 2])
    parent = tmp_path_factory.mktemp("answers")
    return images, run_child(parent, [folder for _, folder in saved.values()], images)


@pytest.mark.parametrize("method", CHANGES)
def test_programs_answer_as_the_model_without_flax(saved, answers, method):
    images, actual = answers
    assert_near(actual[method], expect(saved[method][0], images))


def test_weights_of_half_precision_and_another_batch_are_read(tmp_path):
    model, folder = make_saved_model("plan", tmp_path, dtype="float16")
    actual = run_child(tmp_path, [folder], IMAGES[:1])["plan"]
    assert_near(actual, expect(model, IMAGES[:1]))


def fail(*_, **__):
    raise AssertionError("a kernel for CPUs was traced")


@pytest.fixture(scope="module")
def traced():
    """Returns the programs of PLAN, traced where any kernel fails that is wanted for every size."""
    config = make_config()
    vision = {"name": "vit_tiny", "scan": True, "depth": 3}
    config = dataclasses.replace(config, vision=vision, fine_map=False)
    components = models.build_components(config)
    weights = traverse_util.flatten_dict(make_variables(components), sep="/")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "MIN_TABLE_SIZE", 1)
        patch.setattr(attention, "_cpu_forward", fail)
        patch.setattr(convolution, "_cpu_conv", fail)
        patch.setattr(product, "_multiply", fail)
        # Each kernel would be traced, were it not for the switch.
        x, kernel = np.zeros((2, 8, 8, 32), np.float32), np.zeros((3, 3, 32, 32), np.float32)
        calls = (convolution.conv2d, (x, kernel)), (attention.attend, (x, x, x))
        for function, inputs in (*calls, (product.multiply, (x, kernel[0, 0]))):
            with pytest.raises(AssertionError, match="kernel"):
                export.export(jax.jit(function), platforms=DEFAULT_PLATFORMS)(*inputs)
        return trace_programs(components, config, weights, DEFAULT_PLATFORMS)


@pytest.mark.parametrize("platform", DEFAULT_PLATFORMS)
@pytest.mark.parametrize("name", SIGNATURES)
def test_programs_are_lowered_for_each_platform_without_kernels(traced, name, platform):
    programs, grid = traced
    program = programs[name]
    assert program.platforms == DEFAULT_PLATFORMS and grid == (4, 4)
    assert cpu.is_enabled()
    inputs = [jax.ShapeDtypeStruct(fix_batch(x.shape), x.dtype) for x in program.in_avals]
    args, _ = jax.tree.unflatten(program.in_tree, inputs)
    # The module for one platform is lowered as it would be where the program is called.
    lowered = jax.jit(program.call).trace(*args).lower(lowering_platforms=(platform,))
    assert "stablehlo." in lowered.as_text()


def fix_batch(shape):
    return tuple(size if isinstance(size, int) else 2 for size in shape)


def test_programs_hold_no_path_of_this_machine(traced):
    for program in traced[0].values():
        assert not re.findall(rb"[\w./]+\.py", program.serialize())


def test_the_signature_names_every_input_and_output(saved):
    model, folder = saved["plan"]
    signature = json.loads((folder / "programs/signature.json").read_text())
    programs = signature["programs"]
    assert programs["encode_image"]["arguments"] == {"images": "uint8[batch, 32, 32, 1]"}
    assert programs["encode_text"]["arguments"]["texts"] == {
        "sentence": "int32[batch, 20]",
        "tokens": "int32[batch, 24]",
        "word_id": "int32[batch, 20]",
        "word_index": "int32[batch, 24]",
    }
    assert programs["encode_text"]["outputs"] == programs["heatmap"]["arguments"]["texts"]
    assert programs["encode_text"]["outputs"]["local"] == "float32[batch, 20, 8]"
    assert signature["grid"] == list(model.grid) and signature["size"] == model.size
    assert signature["platforms"] == ["cpu", "cuda", "tpu"]
    assert signature["weights"] == folders.WEIGHTS and signature["method"] == "plan"
    area = model.grid[0] * model.grid[1]
    assert programs["heatmap"]["outputs"] == {
        "maps": f"float32[batch, 20, {area}]",
        "weights": "float32[batch, 20]",
    }


def test_the_reader_is_a_command(saved, tmp_path):
    model, folder = saved["plan"]
    film = np.random.default_rng(0).integers(0, 256, (60, 40), np.uint8)
    Image.fromarray(film).save(tmp_path / "film.png")
    heat = Reader(folder).ground(Image.open(tmp_path / "film.png"), SENTENCES[0][0])
    expected = model.ground(film, SENTENCES[0][0], check=False).heat_map
    assert heat.shape == film.shape
    np.testing.assert_allclose(heat, expected, atol=1e-5 * np.abs(expected).max())

    script = str(folder / "programs/reader.py")
    arguments = [str(tmp_path / "film.png"), SENTENCES[0][0], str(tmp_path / "heat.png")]
    result = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    y, x = np.unravel_index(int(heat.argmax()), heat.shape)
    assert f"highest at x {x}, y {y} of 40 x 60" in result.stdout
    assert np.asarray(Image.open(tmp_path / "heat.png"))[y, x] == 255


def test_the_reader_refuses_16_bits_and_its_own_input(tmp_path, capsys):
    film = Image.fromarray(np.full((8, 6), 40000, np.uint16))
    with pytest.raises(ValueError, match="image has pixels of mode I;16; scale it to 8 bits first"):
        reader.fit_image(film, 8)
    film.save(tmp_path / "film.png")
    content = (tmp_path / "film.png").read_bytes()
    arguments = [str(tmp_path / "film.png"), "effusion", f"{tmp_path}/x/../film.png"]
    assert reader.main(arguments) == 2
    assert "film.png is the image itself; write the picture" in capsys.readouterr().err
    assert (tmp_path / "film.png").read_bytes() == content


def test_the_code_in_the_documentation_runs(saved, tmp_path):
    _, section = (
        Path(models.__file__)
        .parent.parent.joinpath("docs/sharing.md")
        .read_text()
        .split("## Programs without this library")
    )
    blocks = re.findall(r"```python\n(.*?)```", section.split("\n## ")[0], re.DOTALL)
    assert len(blocks) == 2
    (tmp_path / "models").mkdir()
    (tmp_path / "models/phantom").symlink_to(saved["plan"][1])
    start = "import numpy as np; from PIL import Image\n"
    start += "images = np.zeros((2, 32, 32, 1), np.uint8); film = Image.new('L', (40, 50))\n"
    checks = ("assert features['pooled'].shape == (2, 8)\n", "assert heat_map.shape == (50, 40)\n")
    code = start + "".join(block + check for block, check in zip(blocks, checks, strict=True))
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"jax": "99.0.1"}, "written by jax 99.0.1 .* install a newer jax"),
        ({"calling_convention_version": 999}, "install a newer jax"),
        ({"calling_convention_version": 1}, "export the model again"),
        ({"platforms": ["tpu"]}, "programs are for tpu and this is cpu"),
    ],
)
def test_a_jax_that_cannot_run_the_programs_says_so(change, sentence):
    version = export.maximum_supported_calling_convention_version
    signature = {
        "jax": jax.__version__,
        "calling_convention_version": version,
        "platforms": ["cpu"],
    }
    check_jax(signature)
    with pytest.raises(ValueError, match=sentence) as error:
        check_jax(signature | change)
    assert "\n" not in str(error.value)


def test_long_phrases_are_cut_and_empty_ones_refused(saved):
    reader = Reader(saved["convirt"][1])
    with pytest.warns(
        UserWarning, match="a text has 90 words of 90 pieces; .* first 20 words and 22"
    ):
        texts = reader.tokenize([["effusion left lung " * 30]])
    assert texts["tokens"].shape == (1, 24) and texts["tokens"].all()
    assert texts["word_index"].max() == 19 and (texts["sentence"] == 0).all()
    assert texts["tokens"][0, -1] == reader.signature["sep_id"]
    with pytest.raises(ValueError, match="has no word; pass a phrase"):
        reader.tokenize([["?!"]])


@pytest.mark.parametrize("platforms", [("metal",), (), ("cpu", "gpu")])
def test_unknown_platforms_are_refused(platforms):
    with pytest.raises(UserError, match="use some of cpu, cuda, tpu, rocm"):
        check_platforms(platforms)


def test_the_command_adds_programs_and_the_image_tower(tmp_path, capsys):
    vision = {"name": "vit_tiny", "depth": 2}
    changes = PLAIN | {
        "method": "convirt",
        "vision": vision,
        "channels": 3,
        "normalisation": "unit",
    }
    model = make_model(**changes)
    source, out = model.save_pretrained(tmp_path / "source"), tmp_path / "out"
    arguments = [str(source), "--out", str(out), "--programs", "tpu, cpu", "--torch"]
    assert export_command.run(arguments) == 0, capsys.readouterr()
    signature = json.loads((out / "programs/signature.json").read_text())
    assert signature["platforms"] == ["tpu", "cpu"]
    config = json.loads((out / "image_tower/config.json").read_text())
    assert config["model_args"]["depth"] == 2 and config["pretrained_cfg"]["mean"] == [0.0] * 3
    template = {"batch_stats": {}, "params": model.tower.variables["params"]["image_tower"]}
    tower = load_tower("vision", str(out / "image_tower"), template, log=pytest.fail)
    assert_identical(tower, template)
    listed = json.loads((out / "checksums.json").read_text())["files"]
    assert {"programs/reader.py", "image_tower/model.safetensors"} <= listed.keys()
    assert_equal_answers(models.load(out), model)


def test_programs_without_flatbuffers_are_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "flatbuffers", None)
    with pytest.raises(UserError, match="pip install flatbuffers"):
        add_programs("nowhere")
