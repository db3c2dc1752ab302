"""Phantoms that the page offers as films, and the mean masks of their findings."""

import dataclasses
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8

from plan_jax.data import phantom, report_parser
from plan_jax.tasks.grounding_targets import Priors, Target, fit_priors, null_maps
from plan_jax.types import Model, Record

NUM_PRIOR_RECORDS = 120
PRIOR_SIDE = 64  # pixels of the mean masks, finer than any map
SIDE = 384  # pixels of a phantom, four times those of the model in the box
SEED = 0
NULL_NAMES = {
    "mean_finding": "mean mask of the finding in {count} phantoms",
    "prior": "mean lungs of {count} phantoms",
    "centre": "a spot in the middle of the film",
}


@dataclass(frozen=True, eq=False)
class Example:
    """A phantom: its film, the phrases that are true in it, and its report."""

    title: str
    pixels: UInt8[np.ndarray, "Y X"]
    phrases: tuple[str, ...]
    report: str


class NullMaps:
    """Maps that do not look at the film: of a model of phantoms, where its findings usually are.

    For other models it is known of no finding, and the map is a spot in the middle.
    """

    def __init__(self, priors: Priors | None, findings: tuple[str, ...], count: int) -> None:
        """Keeps the mean masks of `count` records, whose findings have these names."""
        self.priors, self.findings, self.count = priors, findings, count

    def find(self, text: str) -> tuple[str, Float[np.ndarray, "y x"]]:
        """Returns what the null map of a phrase is, and the map [y x] of a model's input."""
        named = [finding for _, finding, _ in report_parser.extract_triplets(text)]
        known = [self.findings.index(finding) for finding in named if finding in self.findings]
        finding = known[0] if known else -1
        size = PRIOR_SIDE, PRIOR_SIDE
        target = Target(0, text, finding, "", np.zeros(size, bool))
        banks = null_maps([target], self.priors, size=size, grid=(1, 1), bare=True)
        has_mask = self.priors is not None and finding in self.priors.finding
        name = "mean_finding" if has_mask else "prior" if "prior" in banks else "centre"
        return NULL_NAMES[name].format(count=self.count), banks[name].maps[0]


def draws_phantoms(model: Model) -> bool:
    """Returns whether a model was trained on phantoms."""
    return model.config is not None and model.config.data.name == "phantom"


def draw_examples(model: Model, count: int) -> list[Example]:
    """Returns phantoms that no model was trained on."""
    return [
        Example(
            title=_describe(number, record),
            pixels=record.image[..., 0],
            phrases=tuple(phrase.text for phrase in record.phrases),
            report=record.text,
        )
        for number, record in enumerate(_draw(model, "test", count, SIDE), 1)
    ]


def fit_nulls(model: Model) -> NullMaps:
    """Returns the null maps of a model, for which phantoms are drawn if it knows them."""
    if not draws_phantoms(model):
        return NullMaps(None, (), 0)
    records = _draw(model, "train", NUM_PRIOR_RECORDS, PRIOR_SIDE)
    return NullMaps(fit_priors(records), _find_difficulty(model).findings, len(records))


def _draw(model: Model, split: str, count: int, side: int) -> list[Record]:
    difficulty = _find_difficulty(model)
    seed = model.config.data.builder.get("seed", SEED) if draws_phantoms(model) else SEED
    return [
        phantom.draw_study(seed, index, side, difficulty)
        for index in phantom.split_range(split, count)
    ]


def _find_difficulty(model: Model) -> phantom.Difficulty:
    """Returns the kind of phantoms that a model was trained on, else the usual one."""
    if not draws_phantoms(model):
        return phantom.Difficulty()
    builder = model.config.data.builder
    names = [
        field.name for field in dataclasses.fields(phantom.Difficulty) if field.name in builder
    ]
    values = {name: builder[name] for name in names} | {
        "findings": tuple(builder.get("findings", phantom.FINDINGS)),
        "hard": builder.get("difficulty") == "hard",
    }
    return phantom.Difficulty(**values)


def _describe(number: int, record: Record) -> str:
    names = [phrase.bare for phrase in record.phrases]
    return f"Phantom {number}: {', '.join(dict.fromkeys(names)) or 'no finding'}"
