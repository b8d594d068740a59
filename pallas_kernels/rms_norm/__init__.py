"""The root-mean-square norm of a residual stream, with the addition in front of it (arXiv 1910.07467, equation 4)."""

from jaxtyping import Array, Float

from pallas_kernels import dispatch


def rms_norm(
    x: Float[Array, "*rows W"],
    weight: Float[Array, "width"],
    *,
    epsilon: float,
    delta: Float[Array, "..."] | None = None,
    implementation: str | None = None,
) -> tuple[Float[Array, "*rows W"], Float[Array, "*rows W"]]:
    """x + delta, and weight * (x + delta) / sqrt(mean((x + delta)^2) + epsilon), both in x's dtype.

    The sum is rounded to x's dtype, the statistics are float32, and what they leave is rounded before it is multiplied
    by the weight, as the models of the Llama family do it.

    Args:
        x: any leading shape; delta: what is added first, if anything.
        weight: of the norm, in x's dtype; epsilon: keeps the root from 0.
        implementation: "mosaic_gpu" (16-bit rows, few of them: a decoding step), "xla", or None for the best on the
            default device.

    Raises:
        ValueError: shapes or dtypes that do not belong together.
        NotImplementedError: the named implementation does not serve these rows.
    """
    if x.ndim == 0 or weight.shape != x.shape[-1:] or weight.dtype != x.dtype:
        raise ValueError(
            f"rms_norm: weight must be {x.dtype}{list(x.shape[-1:])} for x {x.shape}, "
            f"got {weight.dtype}{list(weight.shape)}"
        )
    if delta is not None and (delta.shape != x.shape or delta.dtype != x.dtype):
        raise ValueError(f"rms_norm: delta must be {x.dtype}{list(x.shape)} as x, got {delta.dtype}{list(delta.shape)}")
    return dispatch.call("rms_norm", implementation, False, x, weight, epsilon=float(epsilon), delta=delta)
