"""Fits a head to examples, epoch by epoch, and resumes an interrupted fit."""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import msgpack
import numpy as np
import optax
from flax import serialization
from jaxtyping import Array, Float, PyTree
from tqdm import tqdm

from plan_jax.heads.examples import StoredRows, count_examples, list_batches, read_batches
from plan_jax.logger import report_write_errors, write_atomically
from plan_jax.parallel import BatchFunction, from_main, is_main, own_rows, print_once
from plan_jax.types import DivergedError, UserError

HISTORY = ("losses", "scores")  # lists of a fit's state: one number for each epoch


class FitResult(NamedTuple):
    """The parameters and statistics of the best epoch on validation, and the course of the fit.

    `score` is that of the best epoch; `history` has `epoch`, `loss` and `score` of each epoch.
    """

    params: PyTree
    stats: PyTree
    score: float
    history: list[dict[str, float]]


def fit_head(
    loss: Callable[..., tuple[Float[Array, ""], PyTree]],
    params: PyTree,
    stats: PyTree,
    train: PyTree,
    validation: PyTree,
    optimiser: optax.GradientTransformation,
    *,
    batch: int,
    epochs: int,
    patience: int,
    seed: int,
    score: Callable[[PyTree, PyTree], float] | None = None,
    name: str = "head",
    option: str = "learning_rate",
    description: str = "",
    folder: Path | None = None,
    check_stop: Callable[[], None] = lambda: None,
) -> FitResult:
    """Fits a head (or a whole model) to examples, and returns the best epoch on validation.

    An epoch visits the examples in an order drawn from (seed, epoch), in batches; the last
    incomplete batch is dropped. The fit stops early after `patience` epochs without a new best
    score. With a `folder` the state is saved after every epoch, under a name that is a hash of the
    settings and the data. The same call then resumes an interrupted fit and returns the same
    result; so does one on other devices, where features have a `source` (see `HeadOnTower`).

    A batch is divided among all devices in use, see `parallel.BatchFunction`. Each of several
    hosts reads its part of it, and the main one saves the state.

    Args:
      loss: `loss(params, stats, examples, key, train)` returns the mean loss of the examples and
        the new `stats`.
      params: the initial parameters.
      stats: what changes without a gradient, as BatchNorm's statistics.
      train: examples to fit to, see `heads.examples`; those on disk are read in every epoch.
      validation: examples of the same kind, from which the best epoch is selected.
      optimiser: the optimiser of `params`.
      batch: examples in a batch; all of them where there are fewer.
      epochs: the largest number of epochs.
      patience: epochs without a new best score after which the fit stops.
      seed: of orders and dropout.
      score: `score(params, stats)`, the larger the better; by default minus the validation loss.
      name: the name of the fit, in the progress bar, the file and errors.
      option: the name of the learning rate, which an error tells to lower.
      description: whatever else identifies the fit; a part of the hash.
      folder: where the state is saved; None for nowhere.
      check_stop: called after each epoch; ends the fit by an exception.

    Raises:
      UserError: there are no examples, or the loss or the score is not a number.
    """
    num_examples = _require_examples(train, name)
    _require_examples(validation, name)
    batch = min(batch, num_examples)
    evaluate_loss = compile_loss(loss)
    score = score or (lambda p, s: -mean_loss(evaluate_loss, p, s, validation, batch))
    update = _compile_update(loss, optimiser)
    state = {
        "params": params,
        "stats": stats,
        "optimiser": optimiser.init(params),
        "best_params": params,
        "best_stats": stats,
        "best_score": -math.inf,
        "epoch": 0,
        "epochs_since_best": 0,
        "losses": [],
        "scores": [],
    }
    path = None
    if folder is not None:
        settings = (name, description, batch, epochs, patience, seed)
        data = [_without(train, "features"), _without(validation, "features")]
        # Statistics of the head are initial ones, or those of features.
        digest = _hash_of(settings, params, _without(stats, "head"), *data)
        path = folder / f"{name}-{digest}.msgpack"
        state = _restore_state(state, path)
    names = ("params", "stats", "optimiser")
    state |= zip(names, update.place([state[name] for name in names]), strict=True)
    with tqdm(
        total=epochs,
        initial=state["epoch"],
        desc=name,
        unit="epoch",
        file=sys.stderr,
        # A log file keeps every refresh as a line of its own.
        mininterval=0.5 if sys.stderr.isatty() else 20.0,
        dynamic_ncols=True,
        disable=not is_main(),
    ) as bar:
        while state["epoch"] < epochs and state["epochs_since_best"] < patience:
            start_time = time.monotonic()
            trained, epoch_loss = _run_epoch(update, state, train, batch, seed)
            _record_epoch(state, trained, epoch_loss, score, name, option)
            if path is not None and is_main():
                try:
                    _save_state(state, path)
                except UserError as error:  # a fit needs no disk; a disk may be full or read-only
                    print_once(f"{error}; the fit of {name} goes on but cannot be resumed")
                    path = None
            rate = num_examples // batch * batch / (time.monotonic() - start_time)
            bar.set_postfix_str(f"loss {epoch_loss:.3g}, {rate:.0f} examples/s", refresh=False)
            bar.update()
            check_stop()
    values = zip(state["losses"], state["scores"], strict=True)
    history = [{"epoch": n + 1, "loss": a, "score": b} for n, (a, b) in enumerate(values)]
    return FitResult(state["best_params"], state["best_stats"], state["best_score"], history)


def compile_loss(loss: Callable[..., tuple[Float[Array, ""], PyTree]]) -> BatchFunction:
    """Returns a loss as `mean_loss` reads it, without dropout; see `fit_head`."""

    def evaluate_loss(state: Sequence[PyTree], examples: PyTree) -> Float[Array, ""]:
        return loss(*state, examples, jax.random.key(0), False)[0]

    return BatchFunction(evaluate_loss)


def mean_loss(
    evaluate_loss: BatchFunction,
    params: PyTree,
    stats: PyTree,
    examples: PyTree,
    batch: int,
) -> float:
    """Returns the mean loss over all examples, those of an incomplete last batch included."""
    num_examples, total = count_examples(examples), 0.0
    batches = list_batches(num_examples, batch)
    own_batches = [indices[own_rows(len(indices))] for indices in batches]
    for indices, part in zip(batches, read_batches(examples, own_batches), strict=True):
        value = evaluate_loss((params, stats), part, len(indices))
        total += len(indices) * float(value)
    return total / num_examples


def _require_examples(examples: PyTree, name: str) -> int:
    num_examples = count_examples(examples)
    if not num_examples:
        raise UserError(
            f"{name} has no examples to fit to; give more records, or a larger share of them"
        )
    return num_examples


def _compile_update(loss: Callable, optimiser: optax.GradientTransformation) -> BatchFunction:
    """Returns the compiled step of an optimiser on one batch."""

    def update(state, examples, epoch_key_data, step):
        params, stats, optimiser_state = state
        key = jax.random.fold_in(jax.random.wrap_key_data(epoch_key_data), step)

        def batch_loss(params):
            return loss(params, stats, examples, key, True)

        (value, new_stats), gradient = jax.value_and_grad(batch_loss, has_aux=True)(params)
        updates, optimiser_state = optimiser.update(gradient, optimiser_state, params)
        return (optax.apply_updates(params, updates), new_stats, optimiser_state), value

    return BatchFunction(update)


def _run_epoch(
    update: BatchFunction, state: dict, train: PyTree, batch: int, seed: int
) -> tuple[Sequence[PyTree], float]:
    """Runs one epoch; returns the new (params, stats, optimiser state), and the mean loss."""
    num_examples = count_examples(train)
    # Drawn from (seed, epoch), not from a running generator: a resumed fit continues with the same
    # orders and keys.
    order = np.random.default_rng((seed, state["epoch"])).permutation(num_examples)
    epoch_key = jax.random.fold_in(jax.random.key(seed), state["epoch"])
    # In numpy, since a key on one device is no argument of a step on the devices of several hosts.
    key_data = np.asarray(jax.random.key_data(epoch_key))
    trained: Sequence[PyTree] = (state["params"], state["stats"], state["optimiser"])
    # The losses are summed on the device: reading each would wait for every step.
    total_loss, num_steps = 0.0, num_examples // batch
    batches = order[: num_steps * batch].reshape(num_steps, batch)
    own_batches = list(batches[:, own_rows(batch)])
    for step, examples in enumerate(read_batches(train, own_batches)):
        trained, value = update(trained, examples, batch, key_data, np.uint32(step))
        total_loss = total_loss + value
    return trained, float(total_loss) / num_steps


def _record_epoch(
    state: dict, trained: Sequence[PyTree], loss: float, score: Callable, name: str, option: str
) -> None:
    """Scores an epoch and writes it into the state of the fit.

    Raises:
      DivergedError: the loss is not finite, or the score is NaN.
    """
    epoch = state["epoch"] + 1
    if not math.isfinite(loss):
        raise DivergedError(f"the loss of {name} is {loss} in epoch {epoch}; lower {option}")
    state["params"], state["stats"], state["optimiser"] = trained
    # That of the main process, so that all hosts select the same epoch.
    content = from_main(np.float64(score(state["params"], state["stats"])).tobytes())
    value = float(np.frombuffer(content, np.float64)[0])
    if math.isnan(value):
        raise DivergedError(f"the score of {name} is nan in epoch {epoch}; lower {option}")
    state["losses"].append(loss)
    state["scores"].append(value)
    is_best = value > state["best_score"]
    # The first epoch is always saved, also with a score of minus infinity.
    if is_best or epoch == 1:
        state["best_params"], state["best_stats"] = state["params"], state["stats"]
        state["best_score"] = value
    state["epochs_since_best"] = 0 if is_best else state["epochs_since_best"] + 1
    state["epoch"] = epoch


def _without(tree: PyTree, name: str) -> PyTree:
    """Returns a tree without what the devices compute: a part of a head on a tower by its name."""
    is_known = isinstance(tree, Mapping) and {"source", "tower"} & tree.keys()
    return {key: x for key, x in tree.items() if key != name} if is_known else tree


def _hash_of(settings: tuple, *trees: PyTree) -> str:
    """Returns a hash of settings and arrays, so that other data never resume a fit."""
    digest = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    for leaf in jax.tree.leaves(trees):
        if isinstance(leaf, StoredRows):
            digest.update(f"{leaf.shape}{leaf.dtype}{leaf.identify()}".encode())
            continue
        array = np.ascontiguousarray(leaf)
        # Shape and type too: the bytes alone do not tell [2, 3] from [3, 2].
        digest.update(f"{array.shape}{array.dtype}".encode())
        digest.update(array.reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def _restore_state(state: dict, path: Path) -> dict:
    """Returns the state saved at `path`; the given initial one if there is none, or a broken one.

    `state` also serves as the structure of what is read. Of several hosts the main one reads.
    """
    content = b""
    try:
        if is_main():
            content = path.read_bytes()
    except FileNotFoundError:
        pass
    except OSError as error:
        print_once(f"{path} cannot be read ({error.strerror}); fitting the head again")
    content = from_main(content)
    if not content:
        return state
    try:
        tree = serialization.msgpack_restore(content)
        history = {key: [float(x) for x in tree.pop(key)] for key in HISTORY}
        arrays = {key: value for key, value in state.items() if key not in HISTORY}
        return serialization.from_state_dict(arrays, tree) | history
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        print_once(f"{path} is broken ({type(error).__name__}); fitting the head again")
        return state


def _save_state(state: dict, path: Path) -> None:
    # Lists of growing length would not match the structure of the initial state; arrays do.
    history = {key: np.asarray(state[key], np.float64) for key in HISTORY}
    arrays = serialization.to_state_dict({k: v for k, v in state.items() if k not in HISTORY})
    with report_write_errors(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, serialization.msgpack_serialize(jax.device_get(arrays) | history))
