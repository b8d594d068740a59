"""Rotate, transform and quantise in plain JAX: the meaning of `vq_encode`, and what runs without a GPU."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import packing
from pallas_kernels.hadamard import reference as hadamard_reference

# Sub-vectors handled at a time: enough to fill a device, few enough to stay in a CPU's cache.
_CHUNK_SUBVECTORS = 2**17
# Centroids per loop step.
_UNROLL = 16
# Distances that may exist at one time; up to here (one decoded token, say) no loop over centroids is needed.
_DIRECT_DISTANCES = 2**22


def vq_encode(
    x: Float[Array, "B S H D"],
    codebook: Float[Array, "Hc K d"],
    *,
    rope: tuple[Array, Array] | None = None,
    mean: Float[Array, "H D"] | None = None,
    scale: Float[Array, "H D"] | None = None,
    matrix: Float[Array, "H D D"] | None = None,
    hadamard: bool = False,
    interpret: bool = False,
) -> UInt8[Array, "B H S bytes"]:
    """The meaning of `pallas_kernels.vq_encode`."""
    del interpret
    if rope is not None:
        x = rotate(x, *rope)
    codes = nearest(transform(x, mean, scale, matrix, hadamard), codebook.astype(jnp.float32))
    return packing.pack(jnp.swapaxes(codes, 1, 2), codebook.shape[1].bit_length() - 1)


def rotate(
    x: Float[Array, "B S H D"], cos: Float[Array, "B S half"], sin: Float[Array, "B S half"]
) -> Float[Array, "B S H D"]:
    """The half-split rotation, in float32, rounded to x.dtype."""
    low, high = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos.astype(jnp.float32)[:, :, None], sin.astype(jnp.float32)[:, :, None]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def transform(
    x: Float[Array, "B S H D"],
    mean: Float[Array, "H D"] | None,
    scale: Float[Array, "H D"] | None,
    matrix: Float[Array, "H D D"] | None,
    hadamard: bool,
) -> Float[Array, "B S H D"]:
    """((x - mean) * scale) @ (matrix or H), in float32."""
    y = x.astype(jnp.float32)
    if mean is not None:
        y = y - mean.astype(jnp.float32)
    if scale is not None:
        y = y * scale.astype(jnp.float32)
    if matrix is not None:
        y = jnp.einsum("bshi,hij->bshj", y, matrix.astype(jnp.float32), precision=lax.Precision.HIGHEST)
    return hadamard_reference.hadamard(y) if hadamard else y


def is_direct(rows: int, heads: int, dim: int, codebook_shape: tuple[int, ...]) -> bool:
    """Whether so few sub-vectors are encoded that all their distances are computed at once."""
    _, entries, length = codebook_shape
    return rows * heads * (dim // length) * entries <= _DIRECT_DISTANCES


def nearest(y: Float[Array, "B S H D"], codebook: Float[Array, "Hc K d"]) -> Int[Array, "B S H M"]:
    """The index of the nearest centroid of every sub-vector, a bounded number of tokens at a time."""
    batch, tokens, heads, dim = y.shape
    length = codebook.shape[-1]
    count = dim // length
    rows = batch * tokens
    chunk = max(1, min(rows, _CHUNK_SUBVECTORS // max(1, heads * count)))
    chunks = -(-rows // chunk)
    y = jnp.pad(y.reshape(rows, heads, count, length), ((0, chunks * chunk - rows), (0, 0), (0, 0), (0, 0)))
    codes = lax.map(lambda part: _nearest(part, codebook), y.reshape(chunks, chunk, heads, count, length))
    return codes.reshape(chunks * chunk, heads, count)[:rows].reshape(batch, tokens, heads, count)


def _nearest(y: Float[Array, "N H M d"], codebook: Float[Array, "Hc K d"]) -> Int[Array, "N H M"]:
    """Walk over the centroids, holding each sub-vector's best distance so far: no array has a K axis.

    The distance is the sum of squared differences, not |c|^2 - 2 y.c: that cancels where |y| is large beside
    the distance, and keys with a static mean are just that.
    """
    rows, heads, count, length = y.shape
    entries = codebook.shape[1]
    if is_direct(rows, heads, count * length, codebook.shape):
        difference = y[:, :, :, None] - codebook[:, None]
        return jnp.argmin(jnp.sum(difference**2, axis=-1), axis=-1).astype(jnp.int32)
    step = min(entries, _UNROLL)
    elements = jnp.transpose(y, (3, 1, 0, 2)).reshape(length, heads, rows * count)
    centroids = jnp.transpose(codebook, (2, 0, 1))[..., None]  # [d, Hc, K, 1]

    def visit(i, carry):
        best, index = carry
        block = lax.dynamic_slice_in_dim(centroids, i * step, step, axis=2)
        for k in range(step):
            distance = sum((elements[r] - block[r, :, k]) ** 2 for r in range(length))
            closer = distance < best  # strict: a tie stays with the lower index
            best = jnp.where(closer, distance, best)
            index = jnp.where(closer, i * step + k, index)
        return best, index

    start = jnp.full(elements.shape[1:], jnp.inf), jnp.zeros(elements.shape[1:], jnp.int32)
    _, index = lax.fori_loop(0, entries // step, visit, start)
    return jnp.swapaxes(index.reshape(heads, rows, count), 0, 1)
