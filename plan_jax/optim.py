"""The optimiser (AdamW, warm-up, cosine, clipping, accumulation, frozen subtrees); `fit_head`."""

import hashlib
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import msgpack
import numpy as np
import optax
from flax import serialization
from jaxtyping import Array, Float, Int, PyTree
from tqdm import tqdm

from plan_jax.types import Params, UserError


def schedule(rate: float, steps: int, warmup: float, end: float) -> optax.Schedule:
    """Rise linearly over the first `warmup` share of the steps, then fall by a cosine to rate*end.

    >>> [round(float(schedule(1.0, 100, 0.1, 0.0)(n)), 2) for n in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    rise = max(1, round(steps * warmup))
    return optax.warmup_cosine_decay_schedule(0.0, rate, rise, max(steps, rise + 1), rate * end)


def path_name(path: tuple) -> str:
    """Name a leaf by its path: `vision/stem/kernel`."""
    return "/".join(str(getattr(p, "key", getattr(p, "name", p))) for p in path)


def decays(params: Params) -> PyTree:
    """Say which leaves are decayed: matrices and kernels, not biases, norms or temperatures."""
    return jax.tree.map(lambda x: x.ndim > 1, params)


def frozen(
    params: Params, prefixes: tuple[str, ...], held: Callable[[str], bool] = lambda name: False
) -> PyTree:
    """Label each leaf `frozen` if it lies under one of the prefixes or is `held`, else `train`.

    Raises:
      UserError: if a prefix matches nothing.
    """
    names = [path_name(path) for path, _ in jax.tree_util.tree_flatten_with_path(params)[0]]
    under = tuple(f"{prefix.rstrip('/')}/" for prefix in prefixes)
    for prefix, found in zip(prefixes, under, strict=True):
        if not any(f"{name}/".startswith(found) for name in names):
            tops = sorted({"/".join(name.split("/")[:2]) for name in names if "_tower" not in name})
            there = ", ".join(["vision", "text", "vision:N", "text:N", *tops])
            raise UserError(f"optim.freeze {prefix!r} names no parameter; there are {there}")

    def label(path: tuple, _: object) -> str:
        name = path_name(path)
        return "frozen" if held(name) or f"{name}/".startswith(under) else "train"

    return jax.tree_util.tree_map_with_path(label, params)


def make_optimiser(
    params: Params,
    *,
    steps: int,
    rate: float,
    warmup: float,
    end: float,
    weight_decay: float,
    b1: float,
    b2: float,
    clip: float,
    accumulate: int,
    freeze: tuple[str, ...],
    held: Callable[[str], bool] = lambda name: False,
) -> optax.GradientTransformation:
    """Make AdamW (*Loshchilov and Hutter, arXiv 1711.05101*) for `params`.

    `clip` bounds the global norm of the gradient (0: no bound); `accumulate` batches are averaged
    into one update. Parameters under a path in `freeze`, and those whose path is `held` (frozen
    towers), stay as they are and carry no optimiser state.
    """
    chain = optax.chain(
        optax.clip_by_global_norm(clip) if clip else optax.identity(),
        optax.adamw(
            schedule(rate, max(1, steps // accumulate), warmup, end),
            b1,
            b2,
            weight_decay=weight_decay,
            mask=decays,
        ),
    )
    labels = frozen(params, tuple(freeze), held)
    if "frozen" in jax.tree.leaves(labels):
        chain = optax.multi_transform({"train": chain, "frozen": optax.set_to_zero()}, labels)
    if accumulate > 1:
        chain = optax.MultiSteps(chain, accumulate).gradient_transformation()
    return chain


class Fit(NamedTuple):
    """A fitted head: what was best on the validation rows, and how it came there."""

    params: PyTree
    stats: PyTree
    best: float
    history: list[dict[str, float]]


def fit_head(
    loss: Callable[..., tuple[Float[Array, ""], PyTree]],
    params: PyTree,
    stats: PyTree,
    train: PyTree,
    validation: PyTree,
    tx: optax.GradientTransformation,
    *,
    batch: int,
    epochs: int,
    patience: int,
    seed: int,
    judge: Callable[[PyTree, PyTree], float] | None = None,
    name: str = "head",
    about: str = "",
    folder: Path | None = None,
) -> Fit:
    """Fit a head (or a whole model) to rows, and keep the epoch that is best on validation.

    `train` and `validation` are trees of numpy arrays with one leading axis of rows;
    `loss(params, stats, rows, key, train)` gives the mean loss of some rows and the new `stats`.
    An epoch is a permutation drawn from (seed, epoch), in batches of `batch` (all rows, if there
    are fewer), the rest left out. It ends early after `patience` epochs in which
    `judge(params, stats)`, by default minus the validation loss, did not rise. With a `folder`
    every epoch is kept there, under a name drawn from `about`, the settings and the data, so that
    the same call goes on where a stopped one was, to the same result.

    Raises:
      UserError: if there are no rows, or the loss or score is not a number.
    """
    count, batch = _count(train, name), min(batch, _count(train, name))
    _count(validation, name)
    score = judge or (lambda p, s: -_mean_loss(evaluated, p, s, validation, batch))
    evaluated = jax.jit(lambda p, s, rows: loss(p, s, rows, jax.random.key(0), False)[0])
    update = _updater(loss, tx)
    state = {
        "params": params,
        "stats": stats,
        "optimiser": tx.init(params),
        "best_params": params,
        "best_stats": stats,
        "best": -math.inf,
        "epoch": 0,
        "waited": 0,
        "losses": [],
        "scores": [],
    }
    settings = (name, about, batch, epochs, patience, seed)
    path = (
        folder and folder / f"{name}-{_digest(settings, params, stats, train, validation)}.msgpack"
    )
    state = _resumed(state, path)
    with tqdm(
        total=epochs,
        initial=state["epoch"],
        desc=name,
        unit="epoch",
        file=sys.stderr,
        mininterval=0.5 if sys.stderr.isatty() else 20.0,
        dynamic_ncols=True,
    ) as bar:
        while state["epoch"] < epochs and state["waited"] < patience:
            began = time.monotonic()
            current, value = _epoch(update, state, train, count, batch, seed)
            _note(state, current, value, score, name)
            _keep(state, path)
            rate = count // batch * batch / (time.monotonic() - began)
            bar.set_postfix_str(f"loss {value:.3g}, {rate:.0f} rows/s", refresh=False)
            bar.update()
    rows = zip(state["losses"], state["scores"], strict=True)
    history = [{"epoch": n + 1, "loss": a, "score": b} for n, (a, b) in enumerate(rows)]
    return Fit(state["best_params"], state["best_stats"], state["best"], history)


def take(rows: PyTree, chosen: Int[np.ndarray, " N"]) -> PyTree:
    """Take some rows of every array of a tree."""
    return jax.tree.map(lambda x: x[chosen], rows)


def _count(rows: PyTree, name: str) -> int:
    count = len(jax.tree.leaves(rows)[0])
    if not count:
        raise UserError(f"{name} has no rows to be fitted to; give more records, or a larger share")
    return count


def _updater(loss: Callable, tx: optax.GradientTransformation) -> Callable:
    """Compile one step of the optimiser."""

    @jax.jit
    def update(params, stats, optimiser, rows, key):
        gradient = jax.value_and_grad(lambda p: loss(p, stats, rows, key, True), has_aux=True)
        (value, stats), grads = gradient(params)
        updates, optimiser = tx.update(grads, optimiser, params)
        return optax.apply_updates(params, updates), stats, optimiser, value

    return update


def _epoch(
    update: Callable, state: dict, train: PyTree, count: int, batch: int, seed: int
) -> tuple[Sequence[PyTree], float]:
    """Go through the rows once; give the new parameters, statistics, optimiser and mean loss."""
    order = np.random.default_rng((seed, state["epoch"])).permutation(count)
    key = jax.random.fold_in(jax.random.key(seed), state["epoch"])
    current: Sequence[PyTree] = (state["params"], state["stats"], state["optimiser"])
    total, steps = jnp.zeros(()), count // batch
    for n in range(steps):
        rows = take(train, order[n * batch : (n + 1) * batch])
        *current, value = update(*current, rows, jax.random.fold_in(key, n))
        total = total + value
    return current, float(total) / steps


def _note(state: dict, current: Sequence[PyTree], loss: float, score: Callable, name: str) -> None:
    """Enter an epoch into the state of a fit."""
    if not math.isfinite(loss):
        raise UserError(f"loss of {name} is {loss} in epoch {state['epoch'] + 1}; lower its rate")
    state["params"], state["stats"], state["optimiser"] = current
    found = float(score(state["params"], state["stats"]))
    state["losses"].append(loss)
    state["scores"].append(found)
    if math.isnan(found):
        raise UserError(f"score of {name} is nan in epoch {state['epoch'] + 1}; lower its rate")
    better = found > state["best"]
    if better or not state["epoch"]:
        state["best_params"], state["best_stats"] = state["params"], state["stats"]
        state["best"] = found
    state["waited"] = 0 if better else state["waited"] + 1
    state["epoch"] += 1


def _mean_loss(
    evaluated: Callable, params: PyTree, stats: PyTree, rows: PyTree, batch: int
) -> float:
    count, total = len(jax.tree.leaves(rows)[0]), 0.0
    for start in range(0, count, batch):
        some = np.arange(start, min(start + batch, count))
        total += len(some) * float(evaluated(params, stats, take(rows, some)))
    return total / count


def _digest(settings: tuple, *trees: PyTree) -> str:
    """Name settings and arrays by a hash."""
    found = hashlib.blake2b(repr(settings).encode(), digest_size=8)
    for leaf in jax.tree.leaves(trees):
        rows = np.ascontiguousarray(leaf)
        found.update(f"{rows.shape}{rows.dtype}".encode())
        found.update(rows.reshape(-1).view(np.uint8).data)
    return found.hexdigest()


def _resumed(state: dict, path: Path | None) -> dict:
    """Go on from what was kept, if anything whole was."""
    if path is None or not path.exists():
        return state
    try:
        tree = serialization.msgpack_restore(path.read_bytes())
        lists = {name: [float(x) for x in tree.pop(name)] for name in ("losses", "scores")}
        arrays = {name: value for name, value in state.items() if name not in lists}
        return serialization.from_state_dict(arrays, tree) | lists
    except (ValueError, KeyError, TypeError, msgpack.UnpackException) as error:
        print(f"{path} is broken ({type(error).__name__}); fitting again", file=sys.stderr)
        return state


def _keep(state: dict, path: Path | None) -> None:
    """Write the state whole or not at all."""
    if path is not None:
        lists = {name: np.asarray(state[name], np.float64) for name in ("losses", "scores")}
        tree = serialization.to_state_dict({k: v for k, v in state.items() if k not in lists})
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_bytes(serialization.msgpack_serialize(jax.device_get(tree) | lists))
        part.replace(path)
