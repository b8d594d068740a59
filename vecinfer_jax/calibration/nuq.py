"""Codebooks of scalars (KVQuant, arXiv 2401.18079): weighted k-means in one dimension, solved exactly, and Q-Norm.

On a line the clusters of an optimal k-means are intervals, so dynamic programming over where they end finds the
optimum; no start is drawn and no seed matters.
"""

import numpy as np
from jaxtyping import Float

from vecinfer_jax.calibration.codebooks import are_drawn

# Points are first gathered in so many intervals of equal length, where there are more; each keeps its own mean.
INTERVALS = 1024
# Of all weight; what weighs less would be lost in the sums.
NEGLIGIBLE = 1e-12


def weighted_codebook(
    points: Float[np.ndarray, "n"], weights: Float[np.ndarray, "n"], entries: int
) -> Float[np.ndarray, "entries"]:
    """The ascending entries Q that minimise sum_i w_i min_Q (x_i - Q)^2 over points of [-1, 1].

    Weights are 0 or more; where all are 0 they count as 1. With fewer distinct points than entries the last is
    repeated.
    """
    if are_drawn():
        return uniform_codebook(entries)
    counts = np.isfinite(points) & (weights > 0)
    if not counts.any():
        counts, weights = np.isfinite(points), np.ones_like(weights)
    if not counts.any():
        return np.linspace(-1, 1, entries, dtype=np.float32)
    x, w = points[counts].astype(np.float64), weights[counts].astype(np.float64)
    if len(x) > INTERVALS:
        place = np.clip(((x + 1) * (INTERVALS / 2)).astype(np.int64), 0, INTERVALS - 1)
    else:
        place = np.unique(x, return_inverse=True)[1]
    mass, moment = np.bincount(place, w), np.bincount(place, w * x)
    heavy = mass > NEGLIGIBLE * mass.sum()
    return _optimal(moment[heavy] / mass[heavy], mass[heavy], entries).astype(np.float32)


def _optimal(x: Float[np.ndarray, "n"], w: Float[np.ndarray, "n"], entries: int) -> Float[np.ndarray, "entries"]:
    """The optimal entries for ascending points."""
    n = len(x)
    if n <= entries:
        return np.concatenate([x, np.full(entries - n, x[-1])])
    mass, moment, square = (np.concatenate([[0.0], np.cumsum(w * x**power)]) for power in (0, 1, 2))
    # cost[i, j]: points i ... j in one cluster, squared distances from their mean.
    start, end = np.arange(n)[:, None], np.arange(1, n + 1)[None, :]
    held = np.where(end > start, mass[end] - mass[start], 1.0)
    cost = square[end] - square[start] - (moment[end] - moment[start]) ** 2 / held
    cost = np.where(end > start, np.maximum(cost, 0.0), np.inf)
    best, starts = cost[0], []
    for _ in range(entries - 1):  # best[j]: points 0 ... j in one cluster more
        total = np.concatenate([[np.inf], best[:-1]])[:, None] + cost
        starts.append(np.argmin(total, axis=0))
        best = np.take_along_axis(total, starts[-1][None], axis=0)[0]
    found, last = [], n
    for chosen in [*reversed(starts), np.zeros(n, np.int64)]:
        first = int(chosen[last - 1])
        found.append((moment[last] - moment[first]) / (mass[last] - mass[first]))
        last = first
    return np.asarray(found[::-1])


def uniform_codebook(entries: int) -> Float[np.ndarray, "entries"]:
    """Integers by minimum and maximum, as entries on [-1, 1]."""
    return np.linspace(-1, 1, entries, dtype=np.float32)


def q_norm(codebook: Float[np.ndarray, "entries"], points: Float[np.ndarray, "n"]) -> Float[np.ndarray, "entries"]:
    """Q-Norm (KVQuant, section 3.5): entries to decode with, c' = c s1/s2 + (m1 - m2 s1/s2).

    m1, s1 are mean and deviation of the points, m2, s2 of what `codebook` makes of them, so that what is decoded has
    the points' mean and deviation.
    """
    quantised = codebook[np.searchsorted((codebook[1:] + codebook[:-1]) / 2, points)]
    mean, deviation = points.mean(dtype=np.float64), points.std(dtype=np.float64)
    held_mean, held_deviation = quantised.mean(dtype=np.float64), quantised.std(dtype=np.float64)
    if held_deviation == 0:
        return codebook
    factor = deviation / held_deviation
    return (codebook * factor + (mean - held_mean * factor)).astype(np.float32)
