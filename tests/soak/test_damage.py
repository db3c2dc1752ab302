"""Each file of the newest step cut off, changed in a bit, or missing: the newest whole step."""

import random
import re
import shutil

import jax
import pytest
from test_checkpoint import is_identical, make_state, save_run

from plan_jax import checkpoint


def truncate(path, seed):
    path.write_bytes(path.read_bytes()[: random.Random(seed).randrange(path.stat().st_size)])


def flip_bit(path, seed):
    content, generator = bytearray(path.read_bytes()), random.Random(seed)
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)


def remove(path, seed):
    path.unlink()


@pytest.fixture(scope="module")
def complete(tmp_path_factory):
    """Three complete checkpoints, to be copied before they are damaged."""
    return save_run(tmp_path_factory.mktemp("complete") / "checkpoints")


def list_names(folder):
    """Returns the names of the files of a step."""
    return sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("damage", [truncate, flip_bit, remove])
@pytest.mark.parametrize("seed", [0, 1])
def test_the_newest_whole_step_is_restored(complete, tmp_path, damage, seed, capfd):
    names = list_names(complete / "3")
    assert len(names) * 3 >= 30
    outcomes = {}
    for number, name in enumerate(names):
        folder = shutil.copytree(complete, tmp_path / str(number) / "checkpoints")
        if not (folder / "3" / name).stat().st_size:
            continue
        damage(folder / "3" / name, f"{seed} {name}")
        capfd.readouterr()
        manager = checkpoint.open_manager(folder)
        restored = checkpoint.restore(manager, jax.tree.map(jax.numpy.zeros_like, make_state(0)))
        checkpoint.close(manager)
        error = capfd.readouterr().err
        assert is_identical(restored.state, make_state(restored.step))
        assert restored.data == {"next": restored.step}
        if restored.step == 3:  # nothing that a restoration reads, and all arrays are whole
            assert error == "", error
        else:
            assert restored.step == 2
            assert re.fullmatch(
                r"checkpoint 3 is broken \(.*\), renamed to broken-3; using step 2\n", error
            )
        outcomes[str(name)] = restored.step
    # Some files are left by orbax and read by nobody.
    assert {"config/metadata", "data/metadata", "state/manifest.ocdbt"} <= {
        name for name, step in outcomes.items() if step == 2
    }, outcomes
