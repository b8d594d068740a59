"""Hadamard rotation and uniform integers per token and head: what exllamav3, TurboQuant and their kin build on.

Keys (after RoPE) and values of a head are rotated by the normalised Walsh-Hadamard matrix, which spreads outlier
channels over all of them, and a token's head is quantised by its minimum and maximum. Queries are rotated as keys
are, and the output is rotated back, so the codes are never rotated in decoding.
"""

import dataclasses
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float16, Int, UInt8

from pallas_kernels import hadamard, packing
from vecinfer_jax.caches import uniform
from vecinfer_jax.caches.attention import coded_attention
from vecinfer_jax.caches.base import LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.rows import read_slots, write_chunk
from vecinfer_jax.caches.uniform import Scaling
from vecinfer_jax.caches.windowed import WindowedMethod
from vecinfer_jax.errors import InputError

WIDTHS = (2, 3, 4, 8)


@struct.dataclass
class HadamardIntStore:
    """Codes of rotated keys and values, uint8[B, Hkv, S, bytes], and a scale and a zero each, float16[B, Hkv, S, 1]."""

    key_codes: UInt8[Array, "B Hkv S bytes"] = array_field("codes")
    key_scale: Float16[Array, "B Hkv S 1"] = array_field("codes")
    key_zero: Float16[Array, "B Hkv S 1"] = array_field("codes")
    value_codes: UInt8[Array, "B Hkv S bytes"] = array_field("codes")
    value_scale: Float16[Array, "B Hkv S 1"] = array_field("codes")
    value_zero: Float16[Array, "B Hkv S 1"] = array_field("codes")


@dataclasses.dataclass(frozen=True)
class HadamardInt(WindowedMethod):
    """Rotated integer cache.

    bits:     of a code: 2, 3, 4 or 8; a scale and a zero add 32 / head_dim.
    residual: exact recent tokens; sink: exact first tokens.
    """

    bits: int = 2

    name: ClassVar[str] = "hadamard-int"

    def __post_init__(self) -> None:
        super().__post_init__()
        uniform.check_bits("HadamardInt", self.bits, WIDTHS)

    def validate(self, layer: LayerShape) -> None:
        if layer.head_dim & (layer.head_dim - 1):
            raise InputError(f"HadamardInt needs head_dim a power of two, this model has {layer.head_dim}")

    def bits_per_element(self, layer: LayerShape) -> float:
        return uniform.code_bits(layer.head_dim, self.bits) + uniform.BITS_OF_SCALE_AND_ZERO / layer.head_dim

    def init_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> HadamardIntStore:
        width = packing.num_bytes(layer.head_dim, self.bits)

        def zeros(width: int, dtype: Any) -> Array:
            return jnp.zeros((batch, layer.num_kv_heads, slots, width), dtype)

        return HadamardIntStore(
            key_codes=zeros(width, jnp.uint8),
            key_scale=zeros(1, jnp.float16),
            key_zero=zeros(1, jnp.float16),
            value_codes=zeros(width, jnp.uint8),
            value_scale=zeros(1, jnp.float16),
            value_zero=zeros(1, jnp.float16),
        )

    def append(
        self,
        store: HadamardIntStore,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        slots: Int[Array, "B T"],
        layer: LayerShape,
    ) -> HadamardIntStore:
        def parts(x: Float[Array, "B T Hkv D"]) -> tuple[Array, Array, Array]:
            rotated = hadamard(x.astype(jnp.float32))
            scaling = uniform.fit(rotated, -1, self.bits)
            return uniform.encode(rotated, scaling, self.bits), *scaling

        key_codes, key_scale, key_zero = parts(k)
        value_codes, value_scale, value_zero = parts(v)
        return HadamardIntStore(
            write_chunk(store.key_codes, key_codes, slots),
            write_chunk(store.key_scale, key_scale, slots),
            write_chunk(store.key_zero, key_zero, slots),
            write_chunk(store.value_codes, value_codes, slots),
            write_chunk(store.value_scale, value_scale, slots),
            write_chunk(store.value_zero, value_zero, slots),
        )

    def _read_rotated(
        self, store: HadamardIntStore, start: Int[Array, ""], size: int, dim: int
    ) -> tuple[Float[Array, "B Hkv size D"], Float[Array, "B Hkv size D"]]:
        """Rotated keys and values, float32."""

        def decoded(codes: Array, scale: Array, zero: Array) -> Array:
            codes, scale, zero = (read_slots(part, start, size) for part in (codes, scale, zero))
            return uniform.decode(codes, Scaling(scale, zero), self.bits, dim)

        keys = decoded(store.key_codes, store.key_scale, store.key_zero)
        return keys, decoded(store.value_codes, store.value_scale, store.value_zero)

    def read(
        self, store: HadamardIntStore, start: Int[Array, ""], size: int, layer: LayerShape
    ) -> tuple[Float[Array, "B Hkv size D"], Float[Array, "B Hkv size D"]]:
        keys, values = self._read_rotated(store, start, size, layer.head_dim)
        return hadamard(keys).astype(layer.dtype), hadamard(values).astype(layer.dtype)

    def attend(
        self, q: Float[Array, "B Hq D"], store: HadamardIntStore, count: Int[Array, "B"], slots: int, layer: LayerShape
    ) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
        def read(start: Int[Array, ""], size: int) -> tuple[Float[Array, "B Hkv S D"], Float[Array, "B Hkv S D"]]:
            keys, values = self._read_rotated(store, start, size, layer.head_dim)
            return keys.astype(layer.dtype), values.astype(layer.dtype)

        rotated = hadamard(q.astype(jnp.float32)).astype(layer.dtype)
        out, lse = coded_attention(rotated, read, slots, count, layer.num_kv_heads, layer.scale)
        return hadamard(out), lse
