"""Codebooks from samples of keys or values."""

import contextlib
import contextvars
from collections.abc import Iterator, Sequence

import numpy as np
from jaxtyping import Float

from vecinfer_jax.calibration.kmeans import kmeans
from vecinfer_jax.errors import CalibrationError

# Sub-vectors that one codebook is fitted to: four of each sampled token, but at least so many, and 32 a centroid.
PER_TOKEN = 4
MIN_SAMPLES = 32768

_drawn = contextvars.ContextVar("drawn", default=False)


@contextlib.contextmanager
def drawn_codebooks() -> Iterator[None]:
    """Within, codebooks are drawn and not fitted: for plans and timings, where only their shapes matter."""
    token = _drawn.set(True)
    try:
        yield
    finally:
        _drawn.reset(token)


def are_drawn() -> bool:
    """Whether codebooks need only be of the right shape."""
    return _drawn.get()


def codebook_of(
    vectors: Float[np.ndarray, "N Hkv D"],
    weights: Float[np.ndarray, "N Hkv"] | None = None,
    *,
    length: int,
    entries: int,
    per_head: bool,
    seed: int,
    restarts: int = 1,
) -> Float[np.ndarray, "groups K d"]:
    """k-means over the sub-vectors of all positions: one codebook a head, or one for all heads of the layer.

    weights: of the vectors' squared errors; restarts: starts of k-means, of which each codebook takes the best end.
    """
    n, heads, dim = vectors.shape
    groups = subvectors(vectors, length)
    each = None
    if weights is not None:
        each = np.repeat(weights[:, :, None], dim // length, axis=2).transpose(1, 0, 2).reshape(heads, -1, 1)
    if not per_head:
        groups = groups.reshape(1, -1, length)
        each = None if each is None else each.reshape(1, -1, 1)
    count = _wanted(entries, n)
    if each is not None:  # the same ones
        each = _sampled(each, count, seed)[..., 0]
    return _fitted(_sampled(groups, count, seed), entries, seed, each, restarts)


def codebook_by_position(
    vectors: Float[np.ndarray, "N Hkv D"], *, length: int, entries: int, seed: int
) -> Float[np.ndarray, "groups K d"]:
    """Product quantisation: a codebook for every sub-vector position of every head, position fastest."""
    n, heads, dim = vectors.shape
    groups = np.moveaxis(vectors.reshape(n, heads * dim // length, length), 0, 1)
    return _fitted(_sampled(groups, _wanted(entries, n), seed), entries, seed)


def pooled_codebook(
    layers: Sequence[np.ndarray], *, length: int, entries: int, seed: int
) -> Float[np.ndarray, "1 K d"]:
    """One codebook for several layers' [N, Hkv, D], every head of every layer giving equally many sub-vectors.

    Layers may differ in N and Hkv.
    """
    heads = sum(vectors.shape[1] for vectors in layers)
    share = -(-_wanted(entries, max(len(v) for v in layers)) // heads)
    share = min(share, *(vectors.shape[0] * vectors.shape[2] // length for vectors in layers))
    pooled = [_sampled(subvectors(v, length), share, seed + i).reshape(-1, length) for i, v in enumerate(layers)]
    return _fitted(np.concatenate(pooled)[None], entries, seed)


def subvectors(vectors: Float[np.ndarray, "N Hkv D"], length: int) -> Float[np.ndarray, "Hkv n d"]:
    """The sub-vectors of each head, all positions together."""
    n, heads, dim = vectors.shape
    return vectors.reshape(n, heads, dim // length, length).transpose(1, 0, 2, 3).reshape(heads, -1, length)


def _wanted(entries: int, tokens: int) -> int:
    return max(MIN_SAMPLES, PER_TOKEN * tokens, 32 * entries)


def _sampled(groups: Float[np.ndarray, "groups n d"], count: int, seed: int) -> Float[np.ndarray, "groups m d"]:
    """At most `count` of each group's sub-vectors, the same ones of each."""
    if groups.shape[1] <= count:
        return groups
    chosen = np.random.default_rng(seed).choice(groups.shape[1], count, replace=False)
    return groups[:, np.sort(chosen)]


def _fitted(
    groups: Float[np.ndarray, "groups n d"],
    entries: int,
    seed: int,
    weights: Float[np.ndarray, "groups n"] | None = None,
    restarts: int = 1,
) -> Float[np.ndarray, "groups K d"]:
    if groups.shape[1] < entries:
        raise CalibrationError(
            f"the calibration text gives {groups.shape[1]} sub-vectors for a codebook of {entries}: give more text"
        )
    if are_drawn():
        return groups[:, np.sort(np.random.default_rng(seed).choice(groups.shape[1], entries, replace=False))]
    best, least = (np.asarray(array) for array in kmeans(groups, weights, clusters=entries, seed=seed))
    for restart in range(1, restarts):
        again = (seed + 7_919 * restart) % 2**31
        centroids, error = (np.asarray(array) for array in kmeans(groups, weights, clusters=entries, seed=again))
        best = np.where((error < least)[:, None, None], centroids, best)
        least = np.minimum(error, least)
    return best
