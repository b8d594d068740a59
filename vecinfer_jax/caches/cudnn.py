"""cuDNN's flash attention, whole or as a part that is merged with others.

`jax.nn.dot_product_attention` rounds the log-sum-exp to the queries' dtype, in 16 bits to about 1 part in 32 of a
part's weight. Parts are therefore asked for one level below it, in a module that JAX does not promise to keep; nothing
else here touches it. They are not for training: the log-sum-exp has no gradient.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int

from pallas_kernels import split_k


def cudnn_serves(q: Float[Array, "*batch D"]) -> bool:
    """Whether cuDNN's flash attention runs on this device for queries like these."""
    return jax.default_backend() == "gpu" and q.dtype in (jnp.bfloat16, jnp.float16) and q.shape[-1] <= 128


def cudnn_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    lengths: Int[Array, "B"],
    scale: float,
    causal: bool = False,
) -> Float[Array, "B T Hq D"]:
    """Attention over the first `lengths` tokens."""
    lengths = lengths.astype(jnp.int32)
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        scale=scale,
        is_causal=causal,
        query_seq_lengths=lengths if causal else None,
        key_value_seq_lengths=lengths,
        implementation="cudnn",
    )


def partial_cudnn_attention(
    q: Float[Array, "B T Hq D"],
    k: Float[Array, "B S Hkv D"],
    v: Float[Array, "B S Hkv D"],
    lengths: Int[Array, "B"],
    scale: float,
    causal: bool = False,
) -> tuple[Float[Array, "B T Hq D"], Float32[Array, "B T Hq"]]:
    """The same and the natural-log log-sum-exp, ready to be merged: `split_k.EMPTY` for padding and where nothing is
    read, whose output is not to be looked at."""
    from jax._src.cudnn import fused_attention_stablehlo as private  # only where it is needed

    some = jnp.maximum(lengths.astype(jnp.int32), 1)  # what reads no token at all is undefined
    mask = private.MaskType.PADDING_CAUSAL if causal else private.MaskType.PADDING
    rows = some if causal else jnp.full_like(some, q.shape[1])
    out, lse = private.dot_product_attention(
        q, k, v, q_seqlen=rows, kv_seqlen=some, scale=scale, mask_type=mask, return_residual=True
    )
    reads = jnp.arange(q.shape[1])[None, :] < jnp.where(lengths > 0, rows, 0)[:, None]
    return out, jnp.where(reads[:, :, None], lse.swapaxes(1, 2).astype(jnp.float32), split_k.EMPTY)
