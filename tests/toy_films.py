"""A small public dataset, which is read like the real ones, for tests of what they share."""

import csv
import dataclasses
import json
from typing import ClassVar

import numpy as np
from PIL import Image

from plan_jax.data.public.builder import PublicBuilder
from plan_jax.data.public.config import PublicConfig
from plan_jax.data.public.facts import Facts
from plan_jax.data.public.items import Box, Item, Shape
from plan_jax.data.tfds import tfds

COLUMNS = ("id", "path", "patient", "split", "view", "effusion", "report", "boxes", "shapes")
FACTS = Facts(
    name="toy_films",
    title="Toy films",
    content="a few drawn squares",
    page="example.org/toy",
    licence="none",
    citation="Nobody, 2026",
    files="films.csv and the folder films/",
    provides=("labels", "boxes", "masks", "reports"),
    patients="the column `patient`",
    splits={"official": "the column `split`", "leaky": "the column `split`, which leaks"},
    leaks={"leaky": "one patient"},
    findings=("effusion",),
)


@dataclasses.dataclass(eq=False)
class ToyFilmsConfig(PublicConfig):
    """Where the toy films are."""

    facts: ClassVar[Facts] = FACTS


class ToyFilms(PublicBuilder, skip_registration=True):
    """Builds the toy films."""

    VERSION = tfds.core.Version("1.0.0")
    facts = FACTS
    builder_config: ToyFilmsConfig

    def read_items(self, source):
        """Yields the films of films.csv."""
        for row in source.read_csv(source.require("films.csv"), COLUMNS):
            yield Item(
                image_id=row["id"],
                image=row["path"],
                patient_id=row["patient"],
                split=row["split"],
                view=row["view"],
                labels={"effusion": int(row["effusion"])},
                sections={"findings": row["report"]},
                boxes=[Box(tuple(corners), "effusion") for corners in json.loads(row["boxes"])],
                shapes=[Shape(kind, part, "effusion") for kind, part in json.loads(row["shapes"])],
            )


def make_row(number, **fields):
    """Returns the row of a film; two films in a row are of one patient."""
    patient = number // 2
    row = {
        "id": f"film-{number}",
        "path": f"films/{number}.png",
        "patient": f"p{patient}",
        "split": ("train", "train", "val", "test")[patient % 4],
        "view": "PA",
        "effusion": number % 2,
        "report": f"Effusion of degree {number}.",
        "boxes": "[]",
        "shapes": "[]",
    }
    return row | fields


def write(folder, rows, shape=(40, 60)):
    """Writes the table, and a film for each row whose path does not exist yet."""
    folder.mkdir(exist_ok=True)
    with (folder / "films.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    for row in rows:
        path = folder / row["path"]
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(np.full(shape, 7, np.uint8)).save(path)
