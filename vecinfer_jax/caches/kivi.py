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

from pallas_kernels import dispatch, group_int_append, group_int_decode_attention
from pallas_kernels.group_int import Layout
from vecinfer_jax.caches import uniform
from vecinfer_jax.caches.base import LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.rows import read_slots, write_chunk
from vecinfer_jax.caches.windowed import WindowedCache, WindowedMethod
from vecinfer_jax.errors import InputError

WIDTHS = (1, 2, 3, 4)


@struct.dataclass
class KIVIStore:
    """Codes and what reads them, as `pallas_kernels.group_int.Layout` stores them.

    key_codes, value_codes: uint8[B, Hkv, tiles, bytes], a tile of tokens after the other.
    key_scale_zero:         float16[B, Hkv, S / g, 2 D], of each channel of a group of tokens.
    value_scale_zero:       float16[B, Hkv, tiles, ...], of each group of channels of a tile's tokens.
    """

    key_codes: UInt8[Array, "B Hkv tiles bytes"] = array_field("codes")
    key_scale_zero: Float16[Array, "B Hkv groups kscales"] = array_field("codes")
    value_codes: UInt8[Array, "B Hkv tiles bytes"] = array_field("codes")
    value_scale_zero: Float16[Array, "B Hkv tiles vscales"] = array_field("codes")


@dataclasses.dataclass(frozen=True)
class KIVI(WindowedMethod):
    """Integer cache.

    bits:     of a code: 1, 2, 3 or 4; scales and zeros add 32 / group.
    group:    tokens of a channel (keys) and channels of a token (values) that share a scale and a zero. Where heads
              are narrower, values take the whole head; where it does not divide them, the last part is shorter.
    channels: of a token, if they are not as many: values' group.
    residual: exact recent tokens; the tail is up to group - 1 tokens longer. sink: exact first tokens.

    The fused kernels serve 1, 2 and 4 bits, heads of 64 and 128, and groups of whole 32 tokens and channels.
    implementation: of the cache's attention ("xla"; None: the best that serves the device and the model); interpret:
        run Pallas kernels in interpret mode (tests).
    """

    bits: int = 2
    group: int = 32
    channels: int | None = dataclasses.field(default=None, kw_only=True, metadata={"later": True})
    implementation: str | None = dataclasses.field(default=None, kw_only=True, metadata={"later": True})
    interpret: bool = dataclasses.field(default=False, kw_only=True, metadata={"later": True})

    name: ClassVar[str] = "kivi"

    def __post_init__(self) -> None:
        super().__post_init__()
        uniform.check_bits("KIVI", self.bits, WIDTHS)
        if not isinstance(self.group, int) or self.group < 1:
            raise InputError(f"group={self.group!r} must be a whole number of tokens, 1 or more")
        if self.channels is not None and (not isinstance(self.channels, int) or self.channels < 1):
            raise InputError(f"channels={self.channels!r} must be a whole number, 1 or more, or none")
        known = dispatch.TABLE["group_int_decode_attention"]
        if self.implementation is not None and self.implementation not in known:
            raise InputError(f"implementation={self.implementation!r} is unknown; choose from {', '.join(known)}")

    @property
    def token_group(self) -> int:
        return self.group

    def layout(self, head_dim: int) -> Layout:
        """How a head of so many elements is stored."""
        return Layout(head_dim, self.bits, self.group, min(self.channels or self.group, head_dim))

    def bits_per_element(self, layer: LayerShape) -> float:
        layout = self.layout(layer.head_dim)
        keys = uniform.BITS_OF_SCALE_AND_ZERO / layout.token_group
        values = uniform.BITS_OF_SCALE_AND_ZERO * layout.parts / layout.dim
        return 8 * layout.tile_bytes / (layout.tile * layout.dim) + (keys + values) / 2

    def reading(self) -> str:
        rest = [] if self.channels in (None, self.group) else [f"channels={self.channels}"]
        rest += [] if self.implementation in (None, "mosaic_gpu") else [self.implementation]
        return " ".join([super().reading(), *rest])

    def init_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> KIVIStore:
        layout = self.layout(layer.head_dim)
        shapes = *layout.key_shapes(slots), *layout.value_shapes(slots)
        kinds = jnp.uint8, jnp.float16, jnp.uint8, jnp.float16
        rows = batch, layer.num_kv_heads
        return KIVIStore(*(jnp.zeros((*rows, *shape), kind) for shape, kind in zip(shapes, kinds, strict=True)))

    def append(
        self,
        store: KIVIStore,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        slots: Int[Array, "B T"],
        layer: LayerShape,
    ) -> KIVIStore:
        layout = self.layout(layer.head_dim)

        def written(held: Array, new: Array, tokens: int) -> Array:
            """`new`, whose every row is of so many tokens, in its place."""
            first = slots[:, ::tokens]
            return write_chunk(held, new.swapaxes(1, 2), jnp.where(first < 0, -1, first // tokens))

        key_codes, key_scale_zero = layout.encode_keys(k.swapaxes(1, 2))
        value_codes, value_scale_zero = layout.encode_values(v.swapaxes(1, 2))
        return KIVIStore(
            written(store.key_codes, key_codes, layout.tile),
            written(store.key_scale_zero, key_scale_zero, layout.token_group),
            written(store.value_codes, value_codes, layout.tile),
            written(store.value_scale_zero, value_scale_zero, layout.tile),
        )

    def push_token(
        self,
        cache: WindowedCache,
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        at: Int[Array, "B"],
        layer: LayerShape,
    ) -> WindowedCache:
        if self.stripes(layer).axis is not None:  # the kernel knows the slots of a whole cache only
            return super().push_token(cache, k, v, at, layer)
        store = cache.store
        ring_keys, ring_values, *rest = group_int_append(
            k,
            v,
            at.astype(jnp.int32),
            cache.ring_keys,
            cache.ring_values,
            store.key_codes,
            store.key_scale_zero,
            store.value_codes,
            store.value_scale_zero,
            layout=self.layout(layer.head_dim),
            sink=self.sink,
            sinks=(cache.sink_keys, cache.sink_values),
            implementation=dispatch.named("group_int_append", self.implementation),
            interpret=self.interpret,
        )
        return dataclasses.replace(
            cache,
            store=KIVIStore(*rest[:4]),
            ring_keys=ring_keys,
            ring_values=ring_values,
            sink_keys=rest[4],
            sink_values=rest[5],
        )

    def read(
        self, store: KIVIStore, start: Int[Array, ""], size: int, layer: LayerShape
    ) -> tuple[Float[Array, "B Hkv size D"], Float[Array, "B Hkv size D"]]:
        layout = self.layout(layer.head_dim)

        def of_tokens(held: Array, tokens: int) -> Array:
            return read_slots(held, start // tokens, size // tokens)

        keys = layout.decode_keys(
            of_tokens(store.key_codes, layout.tile), of_tokens(store.key_scale_zero, layout.token_group)
        )
        values = layout.decode_values(
            of_tokens(store.value_codes, layout.tile), of_tokens(store.value_scale_zero, layout.tile)
        )
        return keys.astype(layer.dtype), values.astype(layer.dtype)

    def attend_cache(
        self, q: Float[Array, "B Hq D"], cache: WindowedCache, layer: LayerShape, dtype: Any
    ) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
        store = cache.store
        return group_int_decode_attention(
            q,
            store.key_codes,
            store.key_scale_zero,
            store.value_codes,
            store.value_scale_zero,
            self.held(cache, layer),
            layout=self.layout(layer.head_dim),
            scale=layer.scale,
            exact=self.exact_tokens(cache, layer),
            out_dtype=dtype,
            implementation=self.implementation,
            interpret=self.interpret,
        )
