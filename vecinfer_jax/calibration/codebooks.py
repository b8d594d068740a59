"""Codebooks of a layer from a sample of its keys or values."""

import numpy as np
from jaxtyping import Float

from vecinfer_jax.calibration.kmeans import kmeans
from vecinfer_jax.errors import CalibrationError

# Sub-vectors that one codebook is fitted to: 128 a centroid for the 256-entry books, at least 32 for larger ones.
MIN_SAMPLES = 32768


def codebook_of(
    vectors: Float[np.ndarray, "N Hkv D"], *, length: int, entries: int, per_head: bool, seed: int
) -> Float[np.ndarray, "groups K d"]:
    """k-means over the sub-vectors of all positions: one codebook a head, or one for all heads of the layer."""
    n, heads, dim = vectors.shape
    sub = vectors.reshape(n, heads, dim // length, length)
    groups = sub.transpose(1, 0, 2, 3).reshape(heads, -1, length)
    if not per_head:
        groups = groups.reshape(1, -1, length)
    if groups.shape[1] < entries:
        raise CalibrationError(
            f"the calibration text gives {groups.shape[1]} sub-vectors for a codebook of {entries}: give more text"
        )
    wanted = max(MIN_SAMPLES, 32 * entries)
    if groups.shape[1] > wanted:
        chosen = np.random.default_rng(seed).choice(groups.shape[1], wanted, replace=False)
        groups = groups[:, np.sort(chosen)]
    centroids, _ = kmeans(groups, clusters=entries, seed=seed)
    return np.asarray(centroids)
