"""KIVI (arXiv 2402.02750): integers by minimum and maximum, keys per channel and values per token.

Keys have channels that are large in every token, so a channel of a group of g tokens shares a scale and a zero (after
RoPE, as in the authors' code); values have not, so g channels of a token do. A group of tokens is encoded when all of
it has left the residual window.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float16, Int, UInt8

from pallas_kernels import packing
from vecinfer_jax.caches import uniform
from vecinfer_jax.caches.base import LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.rows import read_slots, write_chunk
from vecinfer_jax.caches.uniform import Scaling
from vecinfer_jax.caches.windowed import WindowedMethod
from vecinfer_jax.errors import InputError

WIDTHS = (1, 2, 3, 4)


@struct.dataclass
class KIVIStore:
    """Codes, a token's contiguous, and what reads them.

    key_codes, value_codes:   uint8[B, Hkv, S, bytes].
    key_scale, key_zero:      float16[B, Hkv, S / g, D], of each channel of a group of tokens.
    value_scale, value_zero:  float16[B, Hkv, S, ceil(D / g)], of each group of channels of a token.
    """

    key_codes: UInt8[Array, "B Hkv S bytes"] = array_field("codes")
    key_scale: Float16[Array, "B Hkv groups D"] = array_field("codes")
    key_zero: Float16[Array, "B Hkv groups D"] = array_field("codes")
    value_codes: UInt8[Array, "B Hkv S bytes"] = array_field("codes")
    value_scale: Float16[Array, "B Hkv S parts"] = array_field("codes")
    value_zero: Float16[Array, "B Hkv S parts"] = array_field("codes")


@dataclasses.dataclass(frozen=True)
class KIVI(WindowedMethod):
    """Integer cache.

    bits:     of a code: 1, 2, 3 or 4; scales and zeros add 32 / group.
    group:    tokens of a channel (keys) and channels of a token (values) that share a scale and a zero. Where heads
              are narrower, values take the whole head; where it does not divide them, the last part is shorter.
    residual: exact recent tokens; the tail is up to group - 1 tokens longer. sink: exact first tokens.
    """

    bits: int = 2
    group: int = 32

    name: ClassVar[str] = "kivi"

    def __post_init__(self) -> None:
        super().__post_init__()
        uniform.check_bits("KIVI", self.bits, WIDTHS)
        if not isinstance(self.group, int) or self.group < 1:
            raise InputError(f"group={self.group!r} must be a whole number of tokens, 1 or more")

    @property
    def token_group(self) -> int:
        return self.group

    def bits_per_element(self, layer: LayerShape) -> float:
        key_scales = uniform.BITS_OF_SCALE_AND_ZERO / self.group
        value_scales = uniform.BITS_OF_SCALE_AND_ZERO * self._parts(layer.head_dim) / layer.head_dim
        return uniform.code_bits(layer.head_dim, self.bits) + (key_scales + value_scales) / 2

    def _parts(self, head_dim: int) -> int:
        """Groups of channels of a token's value."""
        return -(-head_dim // self.group)

    def init_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> KIVIStore:
        dim = layer.head_dim

        def zeros(tokens: int, width: int, dtype: Any) -> Array:
            return jnp.zeros((batch, layer.num_kv_heads, tokens, width), dtype)

        groups, parts, width = slots // self.group, self._parts(dim), packing.num_bytes(dim, self.bits)
        return KIVIStore(
            key_codes=zeros(slots, width, jnp.uint8),
            key_scale=zeros(groups, dim, jnp.float16),
            key_zero=zeros(groups, dim, jnp.float16),
            value_codes=zeros(slots, width, jnp.uint8),
            value_scale=zeros(slots, parts, jnp.float16),
            value_zero=zeros(slots, parts, jnp.float16),
        )

    def append(
        self,
        store: KIVIStore,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        slots: Int[Array, "B T"],
        layer: LayerShape,
    ) -> KIVIStore:
        b, t, heads, dim = k.shape
        grouped = k.reshape(b, t // self.group, self.group, heads, dim)
        of_keys = uniform.fit(grouped, 2, self.bits)
        key_codes = uniform.encode(grouped, of_keys, self.bits).reshape(b, t, heads, -1)
        first = slots[:, :: self.group]
        groups = jnp.where(first < 0, -1, first // self.group)

        parts, width = self._parts(dim), min(self.group, dim)
        # The last channel again fills up the last part: neither minimum nor maximum changes.
        padded = jnp.pad(v, ((0, 0), (0, 0), (0, 0), (0, parts * width - dim)), mode="edge")
        of_values = uniform.fit(padded.reshape(b, t, heads, parts, width), 4, self.bits)
        value_codes = uniform.encode(v, self._by_channel(of_values, dim), self.bits)
        return KIVIStore(
            write_chunk(store.key_codes, key_codes, slots),
            write_chunk(store.key_scale, of_keys.scale[:, :, 0], groups),
            write_chunk(store.key_zero, of_keys.zero[:, :, 0], groups),
            write_chunk(store.value_codes, value_codes, slots),
            write_chunk(store.value_scale, of_values.scale[..., 0], slots),
            write_chunk(store.value_zero, of_values.zero[..., 0], slots),
        )

    def _by_channel(self, scaling: Scaling, dim: int) -> Scaling:
        """[..., parts, 1] -> [..., D]."""
        scale, zero = (jnp.repeat(part[..., 0], min(self.group, dim), axis=-1)[..., :dim] for part in scaling)
        return Scaling(scale, zero)

    def read(
        self, store: KIVIStore, start: Int[Array, ""], size: int, layer: LayerShape
    ) -> tuple[Float[Array, "B Hkv size D"], Float[Array, "B Hkv size D"]]:
        dim = layer.head_dim
        codes = read_slots(store.key_codes, start, size)
        b, heads, _, width = codes.shape
        groups = size // self.group
        scale, zero = (
            read_slots(part, start // self.group, groups)[:, :, :, None] for part in (store.key_scale, store.key_zero)
        )
        codes = codes.reshape(b, heads, groups, self.group, width)
        keys = uniform.decode(codes, Scaling(scale, zero), self.bits, dim).reshape(b, heads, size, dim)
        scale, zero = (read_slots(part, start, size)[..., None] for part in (store.value_scale, store.value_zero))
        of_values = self._by_channel(Scaling(scale, zero), dim)
        values = uniform.decode(read_slots(store.value_codes, start, size), of_values, self.bits, dim)
        return keys.astype(layer.dtype), values.astype(layer.dtype)
