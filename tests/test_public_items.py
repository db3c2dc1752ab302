"""Images of public datasets as objects of JSON."""

import json

from plan_jax.data.public.items import Box, Item, Shape, from_json, to_json


def test_an_item_is_the_same_after_json():
    runs = Shape("runs", [[0, 3]], "Pneumothorax", size=(4, 2))
    item = Item(
        image_id="a",
        image="a.png",
        labels={"Mass": 1},
        sections={"findings": "clear"},
        boxes=[Box((0.0, 0.0, 1.0, 1.0), "Mass")],
        shapes=[runs, Shape("file", "mask.png")],
        anatomy={"left lung": [runs]},
        triplets=[("left lung", "Mass", 1)],
        shape=(4, 2),
    )
    restored = from_json(json.loads(json.dumps(to_json(item))))
    assert restored == item
