"""Measures what `plan_jax.predict` assumes: the threshold of masks, and the checks of films.

    python tools/measure_prediction.py thresholds runs/demo --data data
    python tools/measure_prediction.py films covid_cxr/manifest.csv nih/manifest.csv
    python tools/measure_prediction.py photographs pictures/*.jpg

`thresholds` prints the overlap of masks with the truth of each phrase of the validation split,
mean over phrases. `films` reads tables with the columns `image` and `view` (PA, AP ...; L is
lateral), and prints how often the checks refuse a film, also after it was tinted and marked in
colour. `photographs` prints how many files are refused for their colour. Prints Markdown tables.
"""

import argparse
import dataclasses
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from plan_jax import evaluate, prediction  # noqa: E402
from plan_jax import model as models  # noqa: E402
from plan_jax.command.arguments import local_path  # noqa: E402
from plan_jax.data import images  # noqa: E402
from plan_jax.data.pairs import manifest  # noqa: E402
from plan_jax.heads.examples import open_images  # noqa: E402
from plan_jax.metrics import masks as mask_metrics  # noqa: E402
from plan_jax.prediction import films, maps  # noqa: E402
from plan_jax.tasks.grounding_targets import collect_targets  # noqa: E402
from plan_jax.types import UserError  # noqa: E402

THRESHOLDS = {
    "minmax": (0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.9),
    "raw": (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9),
    "z": (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8),
}
TINTS = {"sepia": (1, 0.87, 0.7), "blue": (0.4, 0.6, 1), "strong blue": (0.2, 0.4, 1)}
UNEVEN = 0.06  # by which red grows from the left to the middle and on to the right; blue falls
MAX_FILMS = 300  # that are tinted and marked


def measure_thresholds(folder: str, data_dir: str | None, split: str) -> Iterator[str]:
    """Yields the lines of a table of the overlap at each threshold."""
    model = models.load(folder)
    config = dataclasses.replace(
        model.config,
        data=dataclasses.replace(model.config.data, dir=data_dir or model.config.data.dir),
        eval=dataclasses.replace(model.config.eval, tasks=("grounding",), num_prior_records=0),
    )
    records = evaluate.open_eval_data(config, split).test
    targets, _ = collect_targets(records)
    features = model.encode_image(open_images(records))
    texts = sorted({target.text for target in targets})
    text_features = dict(zip(texts, _split(model.encode_text(texts)), strict=True))
    image_features = _split(features)
    ious: dict[tuple[str, float], list[float]] = {}
    counts: dict[tuple[str, float], list[int]] = {}
    for target in targets:
        pair = image_features[target.record_index], text_features[target.text]
        ((heat_map, _),) = prediction.compute_maps(model, *pair)
        heat_YX = maps.enlarge_map(heat_map, target.truth.shape, model.size)
        for normalisation, thresholds in THRESHOLDS.items():
            for threshold in thresholds:
                is_hot = maps.threshold_map(heat_YX, threshold, normalisation)
                mask, boxes, _ = maps.find_boxes(is_hot, heat_YX, prediction.MIN_AREA)
                iou = mask_metrics.iou(mask.reshape(1, -1), target.truth.reshape(1, -1))[0]
                ious.setdefault((normalisation, threshold), []).append(float(iou))
                counts.setdefault((normalisation, threshold), []).append(len(boxes))
    yield f"{len(targets)} phrases in {len(records)} images of {split}"
    yield "| normalisation | threshold | IoU | boxes |"
    yield "|---|---|---|---|"
    for (normalisation, threshold), values in ious.items():
        boxes_mean = np.mean(counts[normalisation, threshold])
        yield f"| {normalisation} | {threshold} | {np.mean(values):.3f} | {boxes_mean:.2f} |"


def _split(features):
    """Returns the features of single images or texts."""
    import jax

    count = len(jax.tree.leaves(features)[0])
    return [jax.tree.map(lambda x, i=i: np.asarray(x)[i : i + 1], features) for i in range(count)]


def measure_films(tables: list[str]) -> Iterator[str]:
    """Yields the lines of tables of the measures of films, and of how often they are refused."""
    rows = [
        (Path(table).parent / row["image"], str(row["view"]).upper().startswith("L"))
        for table in tables
        for row in manifest.read_manifest(Path(table))
    ]
    symmetry = {True: [], False: []}
    ranges = []
    for path, is_lateral in rows:
        stored, _ = images.read_image(path, 224)
        symmetry[is_lateral].append(films.measure_symmetry(stored))
        ranges.append(int(np.ptp(stored)))
    yield "| films | number | symmetry below " + f"{films.MIN_SYMMETRY} |"
    yield "|---|---|---|"
    for is_lateral, values in symmetry.items():
        share = np.mean(np.asarray(values) < films.MIN_SYMMETRY) if values else float("nan")
        name = "lateral" if is_lateral else "frontal"
        yield f"| {name} | {len(values)} | {share:.1%} |"
    yield f"\nThe smallest range of grey levels is {min(ranges)}.\n"
    yield "| films | number | largest spread of hues | refused |"
    yield "|---|---|---|---|"
    step = max(1, len(rows) // MAX_FILMS)
    spreads: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        for path, _ in rows[::step]:
            for name, content in _colour(images.read_image(path, 512)[0]):
                copy = Path(folder) / "film.jpg"
                copy.write_bytes(content)
                spreads.setdefault(name, []).append(images.measure_hue_spread(copy))
    for name, values in spreads.items():
        refused = np.mean(np.asarray(values) > films.MAX_HUE_SPREAD)
        yield f"| {name} | {len(values)} | {max(values):.1f} | {refused:.1%} |"


def measure_photographs(paths: list[str]) -> Iterator[str]:
    """Yields a line on the spread of hues of photographs."""
    spreads = np.sort([images.measure_hue_spread(Path(path)) for path in paths])
    refused = int((spreads > films.MAX_HUE_SPREAD).sum())
    values = ", ".join(f"{spread:.1f}" for spread in spreads)
    yield f"{refused} of {len(spreads)} photographs are refused; their hues spread by {values}"


def _colour(film: np.ndarray) -> Iterator[tuple[str, bytes]]:
    """Yields JPEG files of a film [Y X] in colours that films are found in."""
    grey = np.stack([film] * 3, axis=-1)
    for name, tint in TINTS.items():
        yield name, _encode((grey * np.asarray(tint)).astype(np.uint8))
    rows, columns = film.shape
    shift = UNEVEN * np.linspace(-1, 1, columns)[:, None] * np.asarray([1, 0, -1])
    uneven = np.clip(grey * (1 + shift), 0, 255).astype(np.uint8)
    yield f"red +-{UNEVEN:.0%} and blue -+{UNEVEN:.0%} across, as in a photograph", _encode(uneven)
    picture = Image.fromarray(grey)
    canvas = ImageDraw.Draw(picture)
    for number, colour in enumerate(("red", "lime", "yellow")):
        x, y = columns * (0.1 + 0.2 * number), rows * (0.2 + 0.15 * number)
        box = [x, y, x + columns * 0.35, y + rows * 0.3]
        canvas.rectangle(box, outline=colour, width=max(2, columns // 100))
    canvas.text((5, 5), "consolidation in the right lower zone", fill="cyan")
    yield "three boxes and a line of text", _encode(np.asarray(picture))
    filled = picture.copy()
    area = [columns * 0.5, rows * 0.4, columns * 0.85, rows * 0.83]
    ImageDraw.Draw(filled).rectangle(area, fill="red")
    yield "the same, and 15 % tinted red", _encode(np.asarray(Image.blend(picture, filled, 0.35)))


def _encode(pixels: np.ndarray) -> bytes:
    """Returns an image [Y X 3] as JPEG."""
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=75)
    return stream.getvalue()


def main() -> int:
    """Parses the arguments and prints the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    thresholds = commands.add_parser("thresholds", help="overlap with the truth by threshold")
    thresholds.add_argument("checkpoint", help="folder of a run")
    thresholds.add_argument("--data", type=local_path, help="folder of the prepared datasets")
    thresholds.add_argument("--split", default="val")
    commands.add_parser("films", help="checks of films").add_argument("tables", nargs="+")
    commands.add_parser("photographs", help="colour of photographs").add_argument(
        "images", nargs="+"
    )
    options = parser.parse_args()
    try:
        if options.command == "films":
            lines = measure_films(options.tables)
        elif options.command == "photographs":
            lines = measure_photographs(options.images)
        else:
            lines = measure_thresholds(options.checkpoint, options.data, options.split)
        for line in lines:
            print(line)
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
