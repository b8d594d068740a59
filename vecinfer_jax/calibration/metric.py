"""Maps of keys and values into spaces where one codebook of short sub-vectors fits every position.

A key's error matters as far as queries see it: the error of a score is q . e, its square in the mean e^T M e with the
queries' second moment M = E[q q^T]. Keys multiplied by M^(1/2) would have errors that count alike in every direction;
M^(1/4) goes half-way there. What is left of correlation and unequal variance goes by a rotation to the principal
directions of the mapped keys, dealt to the sub-vectors like cards, in serpentine order, so that element r of every
sub-vector has about the same variance. Or exactly the same: `spread` turns the directions of each element among
themselves, which loses what their variances differ by and gains that one codebook fits all sub-vectors alike. For
sub-vectors of 2 that is worth it.
"""

import numpy as np
from jaxtyping import Float

from pallas_kernels.hadamard.reference import signs

# Eigenvalues of the queries' moment are no smaller than this share of the largest: its root must be invertible.
FLOOR = 1e-5


def metric_map(
    query_moment: Float[np.ndarray, "H D D"],
    keys: Float[np.ndarray, "N H D"],
    length: int,
    power: float = 0.25,
    mixed: bool = False,
) -> tuple[Float[np.ndarray, "H D D"], Float[np.ndarray, "H D D"]]:
    """A and B with k' = k A and q' = q B, so that q' . k' = q . k, for sub-vectors of `length`.

    query_moment: E[q q^T] of each KV head's queries; keys: without their mean. A = Q U P with Q = M^power of mean
    diagonal 1, U the principal directions of the keys times Q, P the serpentine order; B = Q^-1 U P. power=0 leaves the
    queries out; mixed: then both times `spread`.
    """
    weights, vectors = np.linalg.eigh(query_moment.astype(np.float64))
    weights = np.maximum(weights, np.maximum(FLOOR * weights[:, -1:], np.finfo(np.float32).tiny)) ** power
    scale = np.mean(np.einsum("hij,hj,hij->hi", vectors, weights, vectors), axis=1)
    weights /= scale[:, None]
    root = np.einsum("hij,hj,hkj->hik", vectors, weights, vectors)
    inverse = np.einsum("hij,hj,hkj->hik", vectors, 1 / weights, vectors)
    mapped = np.einsum("nhi,hij->nhj", keys.astype(np.float64), root)
    rotation = principal_rotation(mapped, length, mixed)
    return (root @ rotation).astype(np.float32), (inverse @ rotation).astype(np.float32)


def principal_rotation(
    vectors: Float[np.ndarray, "N H D"], length: int, mixed: bool = False
) -> Float[np.ndarray, "H D D"]:
    """U P: the principal directions of each head's vectors, in serpentine order, as columns; `mixed`: times `spread`.

    Signs are such that every projection, before `spread`, is skewed to the positive side: elements that share a
    codebook are alike.
    """
    centred = vectors - vectors.mean(axis=0)
    moment = np.einsum("nhi,nhj->hij", centred, centred)
    directions = np.linalg.eigh(moment)[1][:, :, ::-1]
    skew = np.mean(np.einsum("nhi,hij->nhj", centred, directions) ** 3, axis=0)
    directions = directions * np.where(skew < 0, -1.0, 1.0)[:, None, :]
    ordered = directions[:, :, serpentine(vectors.shape[2], length)]
    return ordered @ spread(vectors.shape[2], length) if mixed else ordered


def serpentine(dim: int, length: int) -> np.ndarray:
    """Which direction, counted from the largest variance, element r of sub-vector j takes; at place j * length + r."""
    count = dim // length
    j, r = np.meshgrid(np.arange(count), np.arange(length), indexing="ij")
    return (r * count + np.where(r % 2 == 0, j, count - 1 - j)).reshape(-1)


def spread(dim: int, length: int) -> Float[np.ndarray, "D D"]:
    """The rotation that makes element r of every sub-vector a sum of that of the others, of equal weights: a
    Hadamard matrix of as many of them as the largest power of two that divides their number."""
    count = dim // length
    size = count & -count
    among = np.kron(signs(size) / np.sqrt(size), np.eye(count // size))
    return np.kron(among, np.eye(length))
