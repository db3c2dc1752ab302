"""Heat maps in the pixels of the original image: enlarging, and the boxes of their hot areas.

Boxes are (x0, y0, x1, y1) in pixels; x1 and y1 are not included.
"""

import numpy as np
from jaxtyping import Bool, Float
from scipy import ndimage

from plan_jax.data import transforms
from plan_jax.metrics import grounding as grounding_metrics


def combine_words(
    maps: Float[np.ndarray, "B W P"], weights: Float[np.ndarray, "B W"]
) -> Float[np.ndarray, "B P"]:
    """Computes the map of each text: *sum_n w_n S_np / sum_n w_n* over its words n.

    A text whose words all have weight 0 has the map 0.
    """
    total = weights.sum(1, keepdims=True)
    return np.einsum("bwp,bw->bp", maps, weights) / np.where(total == 0, 1, total)


def enlarge_map(
    heat_map: Float[np.ndarray, "y x"],
    shape: tuple[int, int],
    size: int,
    stored_shape: tuple[int, int] | None = None,
) -> Float[np.ndarray, "Y X"]:
    """Returns the map of a model's input as a map of the original image.

    The input is the image as `transforms.fit_image` fits it to a square. The value of a pixel of
    the image is that of the map at the pixel's centre, interpolated bilinearly between the centres
    of the cells; beyond the outer centres the outer cells are repeated.

    Args:
      heat_map: the map, whose cells divide the square evenly.
      shape: Y and X, the rows and columns of the image.
      size: side of the square in pixels.
      stored_shape: rows and columns of the image when it was fitted to the square, if it was
        resized before; rounding them moves it by up to a pixel of the square.
    """
    rows, columns, top, left = transforms.content_area(stored_shape or shape, size)
    y = ((np.arange(shape[0]) + 0.5) * rows / shape[0] + top) / size
    x = ((np.arange(shape[1]) + 0.5) * columns / shape[1] + left) / size
    rows_Yy = grounding_metrics.interpolation_matrix(y, heat_map.shape[0])
    columns_Xx = grounding_metrics.interpolation_matrix(x, heat_map.shape[1])
    return rows_Yy @ (heat_map.astype(np.float32) @ columns_Xx.T)


def threshold_map(
    heat_map: Float[np.ndarray, "Y X"],
    threshold: float,
    normalisation: grounding_metrics.Normalisation,
) -> Bool[np.ndarray, "Y X"]:
    """Returns where a map exceeds a threshold after `metrics.grounding.normalise`."""
    level = grounding_metrics.normalise(heat_map.reshape(1, -1), normalisation)
    return (level > threshold).reshape(heat_map.shape)


def find_boxes(
    mask: Bool[np.ndarray, "Y X"], heat_map: Float[np.ndarray, "Y X"], min_area: float = 0.0
) -> tuple[Bool[np.ndarray, "Y X"], Float[np.ndarray, "N 4"], Float[np.ndarray, " N"]]:
    """Returns the mask without small areas, the box of each area, and the largest heat in it.

    An area is a set of pixels that are connected by their sides. The hottest area comes first.

    >>> mask = np.array([[True, True, False], [False, False, True]])
    >>> _, boxes, scores = find_boxes(mask, np.array([[1.0, 2, 0], [0, 0, 3]]))
    >>> boxes.tolist(), scores.tolist()
    ([[2.0, 1.0, 3.0, 2.0], [0.0, 0.0, 2.0, 1.0]], [3.0, 2.0])

    Args:
      mask: the mask.
      heat_map: the heat map.
      min_area: the smallest area that is kept, as a fraction of the image.
    """
    labels, _ = ndimage.label(mask)
    kept, boxes, scores = mask.copy(), [], []
    # Part by part: the functions of scipy for all labels at once sort every pixel of the image.
    for number, (rows, columns) in enumerate(ndimage.find_objects(labels), 1):
        is_inside = labels[rows, columns] == number
        if is_inside.sum() < min_area * mask.size:
            kept[rows, columns][is_inside] = False
            continue
        boxes.append([columns.start, rows.start, columns.stop, rows.stop])
        scores.append(heat_map[rows, columns][is_inside].max())
    scores_N = np.asarray(scores, np.float64)
    order = np.argsort(-scores_N, kind="stable")
    return kept, np.asarray(boxes, np.float64).reshape(-1, 4)[order], scores_N[order]
