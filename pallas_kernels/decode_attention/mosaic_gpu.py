"""`decode_attention` in Mosaic GPU: `pallas_kernels.mosaic_gpu.decode_attention` over tokens as they are."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import dispatch, split_k
from pallas_kernels.mosaic_gpu import decode_attention as skeleton
from pallas_kernels.mosaic_gpu import lanes
from pallas_kernels.mosaic_gpu.lanes import Pointer, Reg

_WARPGROUPS = 2


@dataclasses.dataclass(frozen=True)
class Elements:
    """16-bit elements, one token after the other."""

    dim: int
    operand: str

    extras, shared_end = 0, 0

    @property
    def pitch(self) -> int:
        return 2 * self.dim

    def fill(self, shared: Pointer, threads: int, head: Reg) -> None:
        """Heads share nothing."""

    def reader(self, shared: Pointer, part: Reg, parts: int, lane: Reg) -> "LaneElements":
        return LaneElements(part, self.pitch // parts)


class LaneElements:
    """`size` bytes of a token, those of part `part`."""

    def __init__(self, part: Reg, size: int):
        self.word_offset, self.size = part * size, size

    def load(self, pointer: Pointer, offset: int) -> list[Reg]:
        return [word for i in range(0, self.size, 16) for word in lanes.load_stream(pointer, offset + i, 4)]

    def pairs(self, words: list[Reg]) -> list[Reg]:
        return words


def decode_attention(
    q: Float[Array, "B Hq D"],
    keys: Float[Array, "B Hkv S D"],
    values: Float[Array, "B Hkv S D"],
    lengths: Int32[Array, "B"],
    *,
    scale: float,
    out_dtype: Any = jnp.float32,
    interpret: bool = False,
    config: skeleton.Config | None = None,
) -> tuple[Array, Array]:
    """`pallas_kernels.decode_attention` for 16-bit elements, D 64 or 128, groups to 16."""
    batch, query_heads, dim = q.shape
    kv_heads, tokens = keys.shape[1:3]
    group = query_heads // kv_heads
    if interpret:
        raise NotImplementedError("decode_attention: mosaic_gpu has no interpret mode")
    if dim not in skeleton.HEAD_DIMS or group > skeleton.MOST_HEADS or jnp.dtype(q.dtype).itemsize != 2 or scale == 0:
        raise NotImplementedError(
            f"decode_attention: the mosaic_gpu kernel serves 16-bit elements, D in {skeleton.HEAD_DIMS} and up to "
            f"{skeleton.MOST_HEADS} query heads a KV head, not {q.dtype}, D={dim}, {group} heads"
        )
    if batch * group * tokens == 0:
        return jnp.zeros(q.shape, out_dtype), jnp.full((batch, query_heads), split_k.EMPTY)
    source = Elements(dim, skeleton.operand_of(q.dtype))
    config = config or choose_config(batch * kv_heads, tokens, dim)
    return skeleton.attend(
        "decode_attention",
        q,
        (source, keys, ()),
        (source, values, ()),
        lengths,
        scale=scale,
        config=config,
        out_dtype=out_dtype,
    )


def choose_config(rows: int, tokens: int, dim: int) -> skeleton.Config:
    """Every multiprocessor takes its share of the tokens, 8 KiB of them a warp at a time."""
    groups = 256 // dim
    tiles = rows * -(-tokens // (skeleton.BLOCK * groups))
    return skeleton.Config(groups, _WARPGROUPS, max(1, min(dispatch.multiprocessors(), tiles)))
