"""Random boxes and the assignment of their targets by a plain loop, for the tests of detection."""

import math

import numpy as np

SIZE = (64, 96)  # rows, columns: not square, so that swapped axes show
GRID = (4, 6)


def random_boxes(random, count, size=SIZE):
    """Boxes of 2 to 40 pixels anywhere in an image."""
    centre = random.uniform((0, 0), size[::-1], (count, 2))
    half = random.uniform(1, 20, (count, 2))
    return np.concatenate([centre - half, centre + half], 1).astype(np.float32)


def literal_targets(boxes, mask, classes, anchors, num_classes, published):
    """The assignment, box by box, in plain Python."""
    rows, columns = GRID
    step_x, step_y = SIZE[1] / columns, SIZE[0] / rows
    shape = (*GRID, len(anchors))
    assigned, background = np.zeros(shape, bool), np.ones(shape, bool)
    offset, log_sides = np.zeros((*shape, 2)), np.zeros((*shape, 2))
    one_hot = np.zeros((*shape, num_classes))
    for (x0, y0, x1, y1), is_real, k in zip(boxes.astype(float), mask, classes, strict=True):
        if not is_real:
            continue
        gx, gy, gw, gh = (
            (x0 + x1) / 2 / step_x,
            (y0 + y1) / 2 / step_y,
            (x1 - x0) / step_x,
            (y1 - y0) / step_y,
        )
        i, j = min(int(gx), columns - 1), min(int(gy), rows - 1)
        scores = []
        for aw, ah in np.asarray(anchors, float) / (step_x, step_y):
            inter = (min(gw, aw) + 1) * (min(gh, ah) + 1)
            scores.append(inter / ((gw + 1) * (gh + 1) + (aw + 1) * (ah + 1) - inter))
        best = int(np.argmax(scores))
        for a, score in enumerate(scores):
            if score > 0.5 or (a == best and not published):
                background[j, i, a] = False
        assigned[j, i, best] = True
        offset[j, i, best] = gx - i, gy - j
        aw, ah = np.asarray(anchors, float)[best] / (step_x, step_y)
        log_sides[j, i, best] = math.log(gw / aw), math.log(gh / ah)
        one_hot[j, i, best, k] = 1
    return assigned, background, offset, log_sides, one_hot
