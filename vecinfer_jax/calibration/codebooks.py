"""Codebooks from samples of keys or values."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float

from vecinfer_jax.calibration.kmeans import kmeans
from vecinfer_jax.errors import CalibrationError

# Sub-vectors that one codebook is fitted to: four of each sampled token, but at least so many, and 32 a centroid.
PER_TOKEN = 4
MIN_SAMPLES = 32768


def codebook_of(
    vectors: Float[np.ndarray, "N Hkv D"], *, length: int, entries: int, per_head: bool, seed: int
) -> Float[np.ndarray, "groups K d"]:
    """k-means over the sub-vectors of all positions: one codebook a head, or one for all heads of the layer."""
    groups = subvectors(vectors, length)
    if not per_head:
        groups = groups.reshape(1, -1, length)
    return _fitted(_sampled(groups, _wanted(entries, len(vectors)), seed), entries, seed)


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


def _fitted(groups: Float[np.ndarray, "groups n d"], entries: int, seed: int) -> Float[np.ndarray, "groups K d"]:
    if groups.shape[1] < entries:
        raise CalibrationError(
            f"the calibration text gives {groups.shape[1]} sub-vectors for a codebook of {entries}: give more text"
        )
    centroids, _ = kmeans(groups, clusters=entries, seed=seed)
    return np.asarray(centroids)
