"""Records and models for tests of tasks: the answers of the models are known."""

import numpy as np

from plan_jax.tasks.grounding_targets import collect_targets
from plan_jax.types import Features, Model, Phrase, Record

SIZE, GRID = 32, (8, 8)
FINDINGS = ("nodule", "pleural effusion")


def make_records(count, seed=0):
    """Returns studies with 0 to 2 findings, each a square somewhere in one half of the image."""
    random, records = np.random.default_rng(seed), []
    for i in range(count):
        phrases, labels = [], np.zeros(2, np.int8)
        for finding in np.flatnonzero(random.random(2) < 0.6).tolist():
            side, y = random.integers(2), random.integers(2, 22)
            x = int(16 * side + random.integers(2, 8))
            mask = np.zeros((SIZE, SIZE), bool)
            mask[y : y + 6 + 2 * finding, x : x + 6] = True
            location, name = ("right", "left")[side], FINDINGS[finding]
            key = f"{name}|{location}"
            phrases.append(Phrase(f"{location} {name}", finding, key, name, mask=mask))
            labels[finding] = 1
        lungs = np.zeros((SIZE, SIZE), bool)
        lungs[4:28, 2:30] = True
        image = random.integers(0, 255, (SIZE, SIZE, 1), np.uint8)
        text = f"study {i}. " + ". ".join(phrase.text for phrase in phrases)
        records.append(Record(image, text, str(i), labels, tuple(phrases), {"lung": lungs}))
    return records


def make_model(heat_map=None, score=None, rounds=0, log=None):
    """Returns a model with known answers.

    `heat_map(image bytes, text, rounds)` returns a map [8 8]; `score(image bytes, text)` returns
    the global similarity, whose opposite is the local one. `log` receives the encoded texts and the
    numbers of pairs of a call.
    """
    images, texts = [], []
    log = [] if log is None else log

    def remember(store, items):
        # The features of an item are its index in the store.
        start = len(store)
        store.extend(items)
        index = np.arange(start, len(store), dtype=np.float32)[:, None]
        return Features(index, index[:, None], np.ones((len(items), 1), bool))

    def encode_image(batch):
        return remember(images, [image.tobytes() for image in batch])

    def encode_text(batch):
        log.append(("encode_text", tuple(batch)))
        return remember(texts, batch)

    def recall(image_features, text_features):
        return (
            [images[int(i)] for i in image_features.pooled[:, 0]],
            [texts[int(i)] for i in text_features.pooled[:, 0]],
        )

    def heatmap(image_features, text_features, rounds=None):
        pairs = list(zip(*recall(image_features, text_features), strict=True))
        log.append(("heatmap", len(pairs)))
        maps = np.stack([heat_map(image, text, rounds) for image, text in pairs])
        maps = maps.reshape(len(pairs), 1, -1).astype(np.float32)
        # A second word with another map and weight 0 must not change anything.
        weightless = np.arange(maps.size, dtype=np.float32).reshape(maps.shape)
        weights = np.tile(np.float32([2, 0]), (len(pairs), 1))
        return np.concatenate([maps, weightless], 1), weights

    def similarity(image_features, text_features):
        rows, columns = recall(image_features, text_features)
        table = np.array([[score(image, text) for text in columns] for image in rows], np.float32)
        return {"global": table, "local": -table}

    return Model("fake", GRID, rounds, SIZE, encode_image, encode_text, similarity, heatmap)


def make_oracle(records):
    """Returns the heat maps of a model that knows the truth, averaged to its grid."""
    table = {}
    for bare in (False, True):
        for target in collect_targets(records, bare)[0]:
            image = records[target.record_index].image.tobytes()
            table[image, target.text] = target.truth.reshape(8, 4, 8, 4).mean((1, 3))
    return lambda image, text, rounds: table[image, text]


def make_numbered_record(number, labels=(), text="", **fields):
    """Returns a study whose image is its number, in grey."""
    image = np.full((4, 4, 1), number, np.uint8)
    return Record(image, text, str(number), np.int8(labels), **fields)


def make_class_records(classes, num_classes=3):
    """Returns numbered studies, each of one class, with the report `report <number>`."""
    return [
        make_numbered_record(i, [int(c == k) for k in range(num_classes)], f"report {i}")
        for i, c in enumerate(classes)
    ]


def make_numbered_model(score, kinds=("global",)):
    """Returns a model with the global similarity `score(number of the image, text)`.

    Other kinds of similarity are its opposite.
    """
    texts = []

    def to_features(index):
        index = np.asarray(index, np.float32).reshape(-1, 1)
        return Features(index, index[:, None], np.ones((len(index), 1), bool))

    def encode_image(images):
        return to_features(images[:, 0, 0, 0])

    def encode_text(batch):
        texts.extend(batch)
        return to_features(range(len(texts) - len(batch), len(texts)))

    def similarity(image_features, text_features):
        numbers, indices = (
            features.pooled[:, 0].astype(int).tolist()
            for features in (image_features, text_features)
        )
        table = np.array([[score(i, texts[t]) for t in indices] for i in numbers], np.float64)
        return {kind: table if kind == "global" else -table for kind in kinds}

    return Model("fake", (1, 1), 0, 4, encode_image, encode_text, similarity, lambda *_: None)


def make_random_scores(seed=0, scale=1.0):
    """Returns a function from image and text to a normal number that stays the same."""
    random, table = np.random.default_rng(seed), {}
    return lambda image, text: table.setdefault((image, text), scale * random.normal())
