"""Formulas in numpy that the literal loops of several methods share."""

import numpy as np


def l2_normalise(x):
    """Returns the vectors of the last axis scaled to length 1; zeros stay zeros."""
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def softmax(x):
    """Returns the softmax over the last axis."""
    exponentials = np.exp(x - np.max(x, -1, keepdims=True))
    return exponentials / exponentials.sum(-1, keepdims=True)


def info_nce(table):
    """Returns the mean cross-entropy of the rows, whose right classes are on the diagonal."""
    return np.mean([np.log(np.exp(row).sum()) - row[i] for i, row in enumerate(table)])
