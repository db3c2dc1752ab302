"""The ceiling of grounding: the image tower of a config, trained with masks instead of reports.

    python tools/measure_ceiling.py --config configs/demo.py --steps 800

The tower and the head of the finer map are those of the config, untrained. Each finding on each
side has a vector that the pixels are multiplied with, and its logits are fitted to the share of
every cell that its mask covers. A phrase has the map of its finding and side. What is missing from
1 is what the map cannot show: small findings between the cells, and the outline of a mask.
"""

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import trange

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plan_jax import evaluate  # noqa: E402
from plan_jax.command.arguments import local_path  # noqa: E402
from plan_jax.command.config_files import load_config_file  # noqa: E402
from plan_jax.config import Config  # noqa: E402
from plan_jax.layers.pooling import mean_cells  # noqa: E402
from plan_jax.methods import contrastive, plan  # noqa: E402
from plan_jax.metrics import slug  # noqa: E402
from plan_jax.model import build_components  # noqa: E402
from plan_jax.optim import make_optimiser  # noqa: E402
from plan_jax.tasks import grounding  # noqa: E402
from plan_jax.types import Features, Model  # noqa: E402

NAMES = dict[str, tuple[int, ...]]  # words of a phrase -> the channels that it may name


def list_channels(records: list) -> dict[tuple[int, str], int]:
    """Returns the number of each finding on each side that some record has."""
    kinds = {read_kind(phrase) for record in records for phrase in record.phrases}
    return {kind: number for number, kind in enumerate(sorted(kinds))}


def read_kind(phrase: Any) -> tuple[int, str]:
    """Returns the finding of a phrase and its side, "" for none."""
    return phrase.finding, phrase.key.split("|")[1]


def read_names(records: list, channels: dict[tuple[int, str], int]) -> NAMES:
    """Returns the channels of all phrases; a bare one may be on any side."""
    names: NAMES = {}
    for record in records:
        for phrase in record.phrases:
            finding, side = read_kind(phrase)
            names[phrase.text] = (channels[finding, side],)
            names[phrase.bare] = tuple(n for (kind, _), n in channels.items() if kind == finding)
    return names


def draw_targets(records: list, channels: dict[tuple[int, str], int]) -> np.ndarray:
    """Returns the masks of each channel, Bool[B Y X channels]."""
    targets = np.zeros((len(records), *records[0].image.shape[:2], len(channels)), bool)
    for row, record in enumerate(records):
        for phrase in record.phrases:
            targets[row, ..., channels[read_kind(phrase)]] |= phrase.mask
    return targets


def train(config: Config, records: list, channels: dict[tuple[int, str], int]) -> Any:
    """Returns the encoder, its variables with the vectors of the channels, and the grid."""
    encoder = build_components(config).encoder
    rng, key = np.random.default_rng(config.seed), jax.random.key(config.seed)
    images = np.stack([record.image for record in records])
    targets = draw_targets(records, channels)
    variables = encoder.init(key, images[:2], True, method="encode_image")
    params = {
        "encoder": variables["params"],
        "channels": 0.1 * jax.random.normal(key, (config.embed_dim, len(channels))),
        "bias": jnp.full(len(channels), -4.0),
    }
    optimiser = make_optimiser(params, steps=config.steps, **vars(config.optim))
    state = params, variables["batch_stats"], optimiser.init(params)

    @jax.jit
    def step(state: Any, image: jax.Array, masks: jax.Array) -> tuple[Any, jax.Array]:
        params, stats, moments = state

        def compute(params: Any) -> tuple[jax.Array, Any]:
            features, updated = encoder.apply(
                {"params": params["encoder"], "batch_stats": stats},
                image,
                True,
                method="encode_image",
                mutable=["batch_stats"],
            )
            logits = features.fine @ params["channels"] + params["bias"]
            cells = mean_cells(masks.astype(jnp.float32), features.fine_grid)
            shares = cells.reshape(logits.shape)
            loss = optax.sigmoid_binary_cross_entropy(logits, shares).sum(-1).mean()
            return loss, updated["batch_stats"]

        (loss, stats), grads = jax.value_and_grad(compute, has_aux=True)(params)
        updates, moments = optimiser.update(grads, moments, params)
        return (optax.apply_updates(params, updates), stats, moments), loss

    progress = trange(config.steps, disable=None)
    for _ in progress:
        rows = rng.choice(len(records), config.batch, replace=False)
        state, loss = step(state, images[rows], targets[rows])
        progress.set_postfix(loss=float(loss))
    return encoder, state[0], state[1]


def make_model(
    config: Config, encoder: Any, params: Any, stats: Any, names: NAMES, hyper: plan.Hyper
) -> Model:
    """Returns a model whose map of a phrase is the largest probability of its channels."""
    texts: list[str] = []

    @jax.jit
    def encode(images: jax.Array) -> Features:
        variables = {"params": params["encoder"], "batch_stats": stats}
        return encoder.apply(variables, images, method="encode_image")

    def encode_image(images: Any) -> Features:
        parts = [encode(np.asarray(images[i : i + 64])) for i in range(0, len(images), 64)]
        return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)

    def encode_text(batch: list[str]) -> Features:
        start = len(texts)
        texts.extend(batch)
        index = np.arange(start, len(texts), dtype=np.float32)[:, None]
        return Features(index, index[:, None], np.ones((len(batch), 1), bool))

    def heatmap(images: Features, words: Features, rounds: int | None = None) -> Any:
        mask = np.zeros((len(images.fine), params["bias"].shape[0]), bool)
        for row, number in enumerate(np.asarray(words.pooled)[:, 0].astype(int)):
            mask[row, list(names[texts[number]])] = True
        return compute_maps(images, mask), np.ones((len(mask), 1), np.float32)

    @jax.jit
    def compute_maps(images: Features, mask: jax.Array) -> jax.Array:
        logits = images.fine @ params["channels"] + params["bias"]
        maps = jnp.where(mask[:, None], jax.nn.sigmoid(logits), 0).max(-1)[:, None]
        pixels = contrastive.l2_normalise(images.fine)

        def guide(image: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
            maps, pixels, grey = image
            affinity = plan.compute_affinity(pixels, grey, images.fine_grid, hyper)
            return plan.guide_maps(maps, affinity, hyper.guide_steps)

        return jax.lax.map(guide, (maps, pixels, images.guide))

    size = config.data.size
    grid = jax.eval_shape(encode, jnp.zeros((1, size, size, 1), jnp.uint8)).fine_grid
    return Model("ceiling", grid, 0, size, encode_image, encode_text, heatmap, heatmap)


def main() -> None:
    """Trains the tower with masks and prints the metrics of grounding."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/demo.py")
    parser.add_argument(
        "--data", type=local_path, default="data", help="folder of prepared datasets"
    )
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args()
    values = load_config_file(flags.config)
    values |= {"steps": flags.steps, "seed": flags.seed}
    values["data"] = dict(values["data"]) | {"dir": flags.data}
    config = Config.from_dict(values)
    data = evaluate.open_eval_data(config, "test")
    records = list(data.train)
    test = list(data.test)
    channels = list_channels([*records, *test])
    encoder, params, stats = train(config, records, channels)
    names = read_names([*records, *test], channels)
    for steps in (0, config.hyper.guide_steps):
        hyper = dataclasses.replace(config.hyper, guide_steps=steps)
        model = make_model(config, encoder, params, stats, names, hyper)
        metrics, _ = grounding.score_phrases(model, test, data.findings)
        print(f"\n{flags.steps} steps with masks, {steps} guide steps:")
        for key in ("cnr_signed", "pointing", "pointing_box", "pointing_near", "miou_z"):
            of_finding = ", ".join(
                f"{name} {metrics[f'{slug(name)}/{key}']:.2f}" for name in data.findings
            )
            print(f"{key} {metrics[key]:.3f} ({of_finding})")


if __name__ == "__main__":
    main()
