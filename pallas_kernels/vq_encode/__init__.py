"""RoPE, transform and vector quantisation (VecInfer, section 3.2-3.3: arXiv 2510.06175)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from pallas_kernels import dispatch, packing
from pallas_kernels.vq_encode import reference

_DTYPES = ("float32", "bfloat16", "float16")


def vq_encode(
    x: Float[Array, "B S H D"],
    codebook: Float[Array, "Hc K d"],
    *,
    rope: tuple[Float[Array, "B S half"], Float[Array, "B S half"]] | None = None,
    mean: Float[Array, "H D"] | None = None,
    scale: Float[Array, "H D"] | None = None,
    matrix: Float[Array, "H D D"] | None = None,
    hadamard: bool = False,
    implementation: str | None = None,
    interpret: bool = False,
) -> UInt8[Array, "B H S bytes"]:
    """Encode keys or values, as a projection gives them, into a cache's codes.

    1. With rope=(cos, sin): the half-split rotation (Hugging Face's rotate_half) in float32, rounded to
       x.dtype, so that encoding a key before RoPE equals encoding the rotated key that attention reads (if
       that was rotated in the same arithmetic: a compiler may fuse a multiply-add, which moves one bfloat16
       rounding in some 10^4).
    2. In float32: y = (x - mean) * scale, then y @ matrix, or y @ H with hadamard=True (H the normalised
       Walsh-Hadamard matrix).
    3. The index of the centroid nearest in L2 to each of the D/d sub-vectors, ties to the lowest index. The
       chosen centroid's distance exceeds the least one by at most 1e-5 of it.
    4. Codes of log2(K) bits, packed as `pallas_kernels.packing` says, a token's codes contiguous.

    Args:
        x: keys or values of S tokens, a token's heads contiguous.
        codebook: K centroids of d elements for every head, or for all heads at once (Hc = 1).
        rope: cosines and sines of each position, half = D/2.
        mean, scale, matrix: the transform of each head; None leaves the step out.
        hadamard: apply the Walsh-Hadamard transform in the matrix's place.
        implementation: "mosaic_gpu" (for few tokens), "triton", "xla", or None for the best on the default device.
        interpret: run the Pallas kernel in interpret mode (on a CPU, for tests).

    Raises:
        ValueError: shapes or dtypes that do not belong together, matrix and hadamard at once.
        NotImplementedError: the named implementation does not serve this format.
    """
    check("vq_encode", x, codebook, rope, mean, scale, matrix, hadamard)
    without: tuple[str, ...] = ()
    if implementation is None and not interpret and x.shape[1] == 1:
        # A decoded token: a program of the Triton kernel would wait for itself at every step, one fusion is faster.
        batch, _, heads, dim = x.shape
        if reference.is_direct(batch, heads, dim, codebook.shape):
            without = ("triton",)
    return dispatch.call(
        "vq_encode", implementation, interpret, x, codebook,
        rope=rope, mean=mean, scale=scale, matrix=matrix, hadamard=hadamard, without=without,
    )  # fmt: skip


def check(operation: str, x, codebook, rope=None, mean=None, scale=None, matrix=None, hadamard=False) -> None:
    """Raises ValueError, in one line, where arguments of an encoding do not belong together."""
    if x.ndim != 4 or jnp.dtype(x.dtype).name not in _DTYPES:
        raise ValueError(f"{operation}: x must be [B, S, H, D] of {_DTYPES}, got {x.dtype}{list(x.shape)}")
    batch, tokens, heads, dim = x.shape
    if codebook.ndim != 3 or codebook.shape[0] not in (1, heads):
        raise ValueError(f"{operation}: codebook must be [{heads} or 1, K, d] for x {x.shape}, got {codebook.shape}")
    entries, length = codebook.shape[1:]
    bits = entries.bit_length() - 1
    if entries != 2**bits or not 1 <= bits <= packing.MAX_BITS:
        raise ValueError(f"{operation}: K must be a power of two, 2 to 65536, got codebook {codebook.shape}")
    if length < 1 or dim % length:
        raise ValueError(f"{operation}: D={dim} is no multiple of d={length}; take a codebook that divides it")
    if matrix is not None and hadamard:
        raise ValueError(f"{operation}: matrix and hadamard=True exclude each other; multiply the matrix by H")
    if hadamard and dim & (dim - 1):
        raise ValueError(f"{operation}: hadamard=True needs a power-of-two head dimension, got x {x.shape}")
    if rope is not None:
        angles = (batch, tokens, dim // 2)
        if dim % 2 or len(rope) != 2 or any(part.shape != angles for part in rope):
            raise ValueError(f"{operation}: rope must be (cos, sin) of {angles}, got {[p.shape for p in rope]}")
    for name, array, want in (
        ("mean", mean, (heads, dim)),
        ("scale", scale, (heads, dim)),
        ("matrix", matrix, (heads, dim, dim)),
    ):
        if array is not None and array.shape != want:
            raise ValueError(f"{operation}: {name} must have shape {want} for x {x.shape}, got {array.shape}")
