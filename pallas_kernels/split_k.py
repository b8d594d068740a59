"""Split-K attention: how a row of tokens is cut, and the exact merge of what the parts return.

A part is attention over some of the tokens: its normalised output and the natural-log log-sum-exp of its
scores. Any partition merges to the whole, so the same function joins the splits of a kernel, the coded tokens
with the residual window, and the devices of a mesh.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float

# The log-sum-exp of no tokens: large and finite, because -inf - -inf is NaN.
EMPTY = -1e30
# Real scores never come near this; anything below it is an empty part.
_EMPTY_BELOW = 0.5 * EMPTY


def merge(
    outputs: Float[Array, "*rows P D"], lses: Float[Array, "*rows P"]
) -> tuple[Float[Array, "*rows D"], Float[Array, "*rows"]]:
    """Merge P independently normalised partial results over disjoint sets of tokens.

    Args:
        outputs: attention output of each part.
        lses: natural-log log-sum-exp of each part's scaled scores; `EMPTY` for a part without tokens, whose
            output is ignored, whatever it holds.

    Returns:
        The output and log-sum-exp over all parts, in float32; 0 and `EMPTY` where every part is empty.

    Raises:
        ValueError: the shapes of outputs and lses do not belong together.
    """
    if outputs.ndim < 2 or outputs.shape[:-1] != lses.shape:
        raise ValueError(f"merge: outputs {outputs.shape} need lses {outputs.shape[:-1]}, got {lses.shape}")
    outputs, lses = outputs.astype(jnp.float32), lses.astype(jnp.float32)
    full = lses > _EMPTY_BELOW
    top = jnp.max(lses, axis=-1, initial=EMPTY)
    weights = jnp.where(full, jnp.exp(lses - top[..., None]), 0.0)
    total = jnp.sum(weights, axis=-1)
    # The mask on the outputs keeps a NaN in an empty part's unwritten memory out (0 * NaN is NaN).
    weighted = jnp.sum(jnp.where(full[..., None], outputs * weights[..., None], 0.0), axis=-2)
    some = jnp.any(full, axis=-1)
    safe = jnp.where(some, total, 1.0)
    return weighted / safe[..., None], jnp.where(some, top + jnp.log(safe), EMPTY)


def num_splits(*, rows: int, tokens: int, tile: int, programs: int, most: int = 256) -> int:
    """How many programs share one row of tokens: enough to give the device `programs` of them at once.

    Args:
        rows: independent rows (batch times KV heads).
        tokens: capacity of a row; a split shorter than four tiles costs more in the merge than it saves.
        tile: tokens a program handles per step.
        programs: programs that the device runs at the same time.
        most: upper bound, which keeps the partial results small.
    """
    wanted = max(1, round(programs / max(rows, 1)))
    useful = max(1, tokens // (4 * tile))
    return min(wanted, useful, most)
