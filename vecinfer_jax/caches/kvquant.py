"""KVQuant (arXiv 2401.18079): keys per channel before RoPE, values per token, non-uniform codes and sparse outliers.

Keys have channels that are large in every token, which RoPE would mix two by two: each channel is quantised before it,
by a range that is calibrated (section 3.1, 3.2). A token's values share a range that is found online. What is left in
[-1, 1] is coded by one non-uniform codebook a layer (nuqX, section 3.3), fitted where the loss is sensitive. The few
elements beyond their range are outliers and kept beside the codes (section 3.4). The first token attracts much
attention and stays exact (section 3.5), and at 2 bits codes are decoded with entries that keep mean and deviation
(Q-Norm).
"""

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Bool, Float, Float16, Float32, Int, UInt8, UInt32

from pallas_kernels import dispatch, nuq, nuq_decode_attention, packing
from vecinfer_jax.caches import uniform
from vecinfer_jax.caches.base import LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.rows import read_slots, write_chunk
from vecinfer_jax.caches.windowed import WindowedCache, WindowedMethod
from vecinfer_jax.calibration.nuq import q_norm, uniform_codebook, weighted_codebook
from vecinfer_jax.errors import CalibrationError, InputError

WIDTHS = (2, 3, 4)
CHOICES = {"keys": ("per-channel", "per-token"), "rope": ("pre", "post"), "codebook": ("nuq", "int")}
MOST_OUTLIERS = 0.05


@struct.dataclass
class KVQuantStore:
    """Codes, outliers and what reads them; `pallas_kernels.nuq` says how they are stored. S is whole tiles.

    key_codes, value_codes:       uint8[B, Hkv, S, bytes]; keys in `nuq.pair_order`.
    key_outliers, value_outliers: uint32[B, Hkv, S / 64, slots], filled in token order, where there are outliers.
    key_residual, value_residual: float16[B, Hkv, S, D], outliers' differences as arrays, where they are not capped.
    value_scale_zero:             float16[B, S, 2], of a token's values in all KV heads.
    key_scale_zero:               the same of its keys, where these are quantised per token.
    key_scale, key_zero:          float32[Hkv, D], of each channel, where keys are quantised per channel.
    key_codebook, value_codebook: float32[2^bits], on [-1, 1], which codes are chosen by.
    key_entries, value_entries:   float32[2^bits], which they are read with (Q-Norm; else the same); values' rounded to
                                  bfloat16 in 16-bit models (`nuq.value_entries`).
    reach:                        float32[2], how far beyond the rest a token's keys, values are outliers, in widths.
    key_overflow, value_overflow: int32[B, Hkv, shards], outliers that found no slot and were clipped to the range; of
                                  every device by itself.
    """

    key_codes: UInt8[Array, "B Hkv S bytes"] = array_field("codes")
    value_codes: UInt8[Array, "B Hkv S bytes"] = array_field("codes")
    key_outliers: UInt32[Array, "B Hkv tiles slots"] | None = array_field("codes")
    value_outliers: UInt32[Array, "B Hkv tiles slots"] | None = array_field("codes")
    key_residual: Float16[Array, "B Hkv S D"] | None = array_field("codes")
    value_residual: Float16[Array, "B Hkv S D"] | None = array_field("codes")
    value_scale_zero: Float16[Array, "B S 2"] = array_field("codes")
    key_scale_zero: Float16[Array, "B S 2"] | None = array_field("codes")
    key_scale: Float32[Array, "Hkv D"] | None = array_field("codebooks")
    key_zero: Float32[Array, "Hkv D"] | None = array_field("codebooks")
    key_codebook: Float32[Array, "K"] = array_field("codebooks")
    value_codebook: Float32[Array, "K"] = array_field("codebooks")
    key_entries: Float32[Array, "K"] = array_field("codebooks")
    value_entries: Float32[Array, "K"] = array_field("codebooks")
    reach: Float32[Array, "2"] = array_field("codebooks")
    key_overflow: Int[Array, "B Hkv shards"] = array_field("state")
    value_overflow: Int[Array, "B Hkv shards"] = array_field("state")


@dataclasses.dataclass(frozen=True)
class KVQuant(WindowedMethod):
    """Non-uniformly quantised cache with sparse outliers.

    bits:     of a code: 4, 3 or 2.
    outliers: share of the elements that is kept beside the codes; the paper's are 0, 0.001, 0.005 and 0.01.
    qnorm:    decode with entries that keep mean and deviation; none: at 2 bits.
    fisher:   weigh errors by the Fisher information (`vecinfer_jax.calibration.fisher`); false: all alike.
    residual: exact recent tokens (paper: none); sink: exact first tokens, which are no part of the calibration.

    For ablations, not served by the fused kernel unless it says so:
    keys:     "per-channel" or, as values are quantised, "per-token".
    rope:     quantise keys "pre" or "post" RoPE (fused).
    codebook: "nuq", or "int": entries at equal distances (fused).
    capped:   false: as many outliers as there are, held in arrays of the keys' own size, for evaluation.

    implementation: of the cache's attention ("xla"; None: the best that serves the device and the model); interpret:
        run Pallas kernels in interpret mode (tests).
    """

    bits: int = 3
    outliers: float = 0.01
    qnorm: bool | None = None
    fisher: bool = True
    keys: str = "per-channel"
    rope: str = "pre"
    codebook: str = "nuq"
    capped: bool = True
    implementation: str | None = None
    interpret: bool = False
    residual: int = dataclasses.field(default=0, kw_only=True)
    sink: int = dataclasses.field(default=1, kw_only=True)

    name: ClassVar[str] = "kvquant"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        uniform.check_bits("KVQuant", self.bits, WIDTHS)
        if isinstance(self.outliers, bool) or not 0 <= self.outliers <= MOST_OUTLIERS:
            raise InputError(f"outliers={self.outliers!r} must be a share from 0 to {MOST_OUTLIERS}, like 0.01")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; choose from {', '.join(choices)}")
        for name in ("fisher", "capped"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r} must be true or false")
        if not isinstance(self.qnorm, bool | None):
            raise InputError(f"qnorm={self.qnorm!r} must be true, false or none")
        known = dispatch.TABLE["nuq_decode_attention"]
        if self.implementation is not None and self.implementation not in known:
            raise InputError(f"implementation={self.implementation!r} is unknown; choose from {', '.join(known)}")

    @property
    def normed(self) -> bool:
        """Whether codes are decoded with Q-Norm's entries."""
        return self.bits == 2 if self.qnorm is None else self.qnorm

    @property
    def needs_gradients(self) -> bool:
        """Whether the Fisher information is wanted."""
        return self.fisher and self.codebook == "nuq"

    def wanted_statistics(self) -> frozenset[str]:
        return frozenset({"gradients"} if self.needs_gradients else ())

    @property
    def pooled(self) -> bool:
        """Whether outliers lie in pools of fixed size."""
        return self.outliers > 0 and self.capped

    @property
    def fused(self) -> bool:
        """Whether the attention kernels know these settings."""
        return self.keys == "per-channel" and (self.capped or not self.outliers)

    def validate(self, layer: LayerShape) -> None:
        if layer.head_dim % 8 or layer.head_dim > nuq.MAX_DIM:
            raise InputError(
                f"KVQuant needs head_dim a multiple of 8 up to {nuq.MAX_DIM}, this model has {layer.head_dim}"
            )

    def slots(self, head_dim: int) -> int:
        """Outlier slots of 64 tokens of a KV head, keys' and values' each."""
        return outlier_slots(self.outliers, head_dim) if self.outliers else 0

    def bits_per_element(self, layer: LayerShape) -> float:
        """Codes, scales and zeros, and every slot of the pools; without a cap, 32 bits for the share of outliers."""
        per_token = 2 if self.keys == "per-token" else 1
        scales = uniform.BITS_OF_SCALE_AND_ZERO * per_token / (2 * layer.num_kv_heads * layer.head_dim)
        outliers = self.slots(layer.head_dim) / (nuq.TILE * layer.head_dim) if self.capped else self.outliers
        return uniform.code_bits(layer.head_dim, self.bits) + scales + 32 * outliers

    def reading(self) -> str:
        rest = [f"outliers={self.outliers:g}", *([] if self.fused else ["unfused"])]
        rest += [] if self.rope == "pre" else ["post-rope"]
        return " ".join([super().reading(), *rest])

    def calibration_key(self) -> dict[str, Any]:
        return {
            "method": self.name,
            "bits": self.bits,
            "outliers": float(self.outliers),
            "first": self.sink,
            "keys": self.keys,
            "rope": self.rope,
            "codebook": self.codebook,
            "fisher": self.needs_gradients,
        }

    def init_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> KVQuantStore:
        if calibration is None:
            raise InputError("KVQuant needs a calibration: vj.calibrate(lm, method), or `vecinfer calibrate`")
        heads, dim, tokens = layer.num_kv_heads, layer.head_dim, nuq.whole_tiles(slots)
        per_token = self.keys == "per-token"

        def codes() -> UInt8[Array, "B Hkv S bytes"]:
            return jnp.zeros((batch, heads, tokens, packing.num_bytes(dim, self.bits)), jnp.uint8)

        def pool() -> UInt32[Array, "B Hkv tiles slots"] | None:
            shape = (batch, heads, tokens // nuq.TILE, self.slots(dim))
            return jnp.zeros(shape, jnp.uint32) if self.pooled else None

        def residual() -> Float16[Array, "B Hkv S D"] | None:
            everything = self.outliers and not self.capped
            return jnp.zeros((batch, heads, tokens, dim), jnp.float16) if everything else None

        def scale_zero() -> Float16[Array, "B S 2"]:
            return jnp.zeros((batch, tokens, 2), jnp.float16)

        def fitted(name: str) -> Array:
            return jnp.asarray(calibration[name], jnp.float32)

        def entries(which: str) -> Float32[Array, "K"]:
            return fitted(f"{which}_entries" if self.normed else f"{which}_codebook")

        return KVQuantStore(
            key_codes=codes(),
            value_codes=codes(),
            key_outliers=pool(),
            value_outliers=pool(),
            key_residual=residual(),
            value_residual=residual(),
            value_scale_zero=scale_zero(),
            key_scale_zero=scale_zero() if per_token else None,
            key_scale=None if per_token else fitted("key_scale"),
            key_zero=None if per_token else fitted("key_zero"),
            key_codebook=fitted("key_codebook"),
            value_codebook=fitted("value_codebook"),
            key_entries=entries("key"),
            value_entries=nuq.value_entries(entries("value"), layer.dtype),
            reach=fitted("reach"),
            key_overflow=jnp.zeros((batch, heads, layer.axes.shards), jnp.int32),
            value_overflow=jnp.zeros((batch, heads, layer.axes.shards), jnp.int32),
        )

    # -- encoding

    def append(
        self,
        store: KVQuantStore,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        slots: Int[Array, "B T"],
        layer: LayerShape,
    ) -> KVQuantStore:
        most = self.most_outliers(layer)
        keys, values = k.astype(jnp.float32), v.astype(jnp.float32)
        if self.rope == "pre":  # slot n holds position sink + n
            cos, sin = layer.rope.cos_sin(self.stripes(layer).slot(jnp.maximum(slots, 0)) + self.sink)
            keys = nuq.rotate(keys, cos[:, :, None], -sin[:, :, None])
        changes: dict[str, Any] = {}

        def code(
            which: str, x: Array, scale: Array, zero: Array, outside: Bool[Array, "B T Hkv D"] | None
        ) -> Int[Array, "B T Hkv D"]:
            """Codes of x; its outliers, those marked or else all beyond [-1, 1], go to where the store keeps them."""
            relative = (x - zero) / jnp.where(scale > 0, scale, 1.0)
            index = nuq.nearest(relative, getattr(store, f"{which}_codebook"))
            if self.outliers:
                outside = jnp.abs(relative) > 1 if outside is None else outside
                read = nuq.looked_up(index, getattr(store, f"{which}_entries")) * scale + zero
                difference = jnp.clip(x - read, -nuq.LARGEST, nuq.LARGEST).astype(jnp.float16)
                difference = jnp.where(outside & (slots >= 0)[:, :, None, None], difference, 0)
                if self.capped:
                    pool, lost = put_outliers(getattr(store, f"{which}_outliers"), difference, slots)
                    changes[f"{which}_outliers"] = pool
                    changes[f"{which}_overflow"] = getattr(store, f"{which}_overflow") + lost[..., None]
                else:
                    name = f"{which}_residual"
                    changes[name] = write_chunk(getattr(store, name), difference, slots)
            return index

        def code_tokens(which: str, x: Array, reach: Array) -> Int[Array, "B T Hkv D"]:
            """The same by a range for each token."""
            flat = jnp.clip(x, -nuq.LARGEST, nuq.LARGEST).reshape(*x.shape[:2], -1)
            scale_zero, outside = token_ranges(flat, most, reach, layer.axes.model)
            held = getattr(store, f"{which}_scale_zero")
            changes[f"{which}_scale_zero"] = write_chunk(held[:, None], scale_zero[:, :, None], slots)[:, 0]
            scale, zero = (scale_zero[:, :, None, i, None].astype(jnp.float32) for i in range(2))
            return code(which, flat.reshape(x.shape), scale, zero, outside.reshape(x.shape))

        if store.key_scale is None or store.key_zero is None:
            key_index = code_tokens("key", keys, store.reach[0])
        else:
            key_index = code("key", keys, store.key_scale, store.key_zero, None)
        value_index = code_tokens("value", values, store.reach[1])
        return dataclasses.replace(
            store,
            key_codes=write_chunk(store.key_codes, nuq.pack_keys(key_index, self.bits), slots),
            value_codes=write_chunk(store.value_codes, packing.pack(value_index, self.bits), slots),
            **changes,
        )

    def most_outliers(self, layer: LayerShape) -> int:
        """Outliers that a token may have at each end of its range, over all KV heads, those of other devices too."""
        devices = 1 if layer.axes.model is None else jax.lax.axis_size(layer.axes.model)
        return most_outliers(self.outliers, devices * layer.num_kv_heads * layer.head_dim)

    # -- reading

    def read(
        self, store: KVQuantStore, start: Int[Array, ""], size: int, layer: LayerShape
    ) -> tuple[Float[Array, "B Hkv size D"], Float[Array, "B Hkv size D"]]:
        dim = layer.head_dim
        key_codes, value_codes = (read_slots(codes, start, size) for codes in (store.key_codes, store.value_codes))

        def scale_zero(held: Float16[Array, "B S 2"]) -> Float16[Array, "B size 2"]:
            return read_slots(held[:, None], start, size)[:, 0]

        if store.key_scale is None or store.key_zero is None:
            assert store.key_scale_zero is not None
            keys = nuq.dense_tokens(
                nuq.unpack_keys(key_codes, self.bits, dim), scale_zero(store.key_scale_zero), store.key_entries
            )
        else:
            keys = nuq.dense_keys(key_codes, store.key_scale, store.key_zero, store.key_entries)
        values = nuq.dense_values(value_codes, scale_zero(store.value_scale_zero), store.value_entries, dim)
        if store.key_outliers is not None and store.value_outliers is not None:
            keys += nuq.read_outliers(store.key_outliers, start, size, dim)
            values += nuq.read_outliers(store.value_outliers, start, size, dim)
        if store.key_residual is not None and store.value_residual is not None:
            keys += read_slots(store.key_residual, start, size).astype(jnp.float32)
            values += read_slots(store.value_residual, start, size).astype(jnp.float32)
        if self.rope == "pre":
            slots = self.stripes(layer).slot(start + jnp.arange(size))
            keys = nuq.rotate(keys, *layer.rope.cos_sin(self.sink + slots))
        return keys.astype(layer.dtype), values.astype(layer.dtype)

    def attend_cache(
        self, q: Float[Array, "B Hq D"], cache: WindowedCache, layer: LayerShape, dtype: Any
    ) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
        store, dealt = cache.store, self.stripes(layer)
        if not self.fused:
            return super().attend_cache(q, cache, layer, dtype)
        pre, split = self.rope == "pre", dealt.axis is not None
        firsts = tuple(self.sink + i * nuq.TILE for i in range(dealt.shards))  # stripes are tiles
        return nuq_decode_attention(
            q,
            store.key_codes,
            store.value_codes,
            store.key_scale,
            store.key_zero,
            store.key_entries,
            store.value_entries,
            store.value_scale_zero,
            store.key_outliers,
            store.value_outliers,
            self.held(cache, layer),
            scale=layer.scale,
            inverse_frequencies=tuple(layer.rope.inverse_frequencies().tolist()) if pre else None,
            first_position=firsts if split else self.sink,
            tile_stride=dealt.shards,
            shard=dealt.index if split else None,
            exact=self.exact_tokens(cache, layer),
            out_dtype=dtype,
            implementation=self.implementation,
            interpret=self.interpret,
        )

    def outliers_held(self, store: KVQuantStore) -> Int[Array, "2"]:
        held = [store.key_outliers, store.value_outliers, store.key_residual, store.value_residual]
        kept = sum((jnp.sum(x != 0, dtype=jnp.int32) for x in held if x is not None), jnp.int32(0))
        return jnp.stack([kept, jnp.sum(store.key_overflow) + jnp.sum(store.value_overflow)])

    # -- calibration

    def calibrate_layer(
        self, layer: LayerShape, statistics: Any, seed: int, shared: Any = None
    ) -> dict[str, np.ndarray]:
        del seed, shared
        positions = np.asarray(statistics.positions)
        coded = positions >= self.sink  # sinks are never coded
        if not coded.any():
            raise CalibrationError(
                f"no passage has a token after its first {self.sink}: give longer ones or fewer sinks"
            )
        if self.needs_gradients and statistics.key_gradients is None:
            raise CalibrationError("KVQuant(fisher=True) needs gradients: collect(..., wanted={'gradients'})")

        def sampled(x: Any) -> Float32[np.ndarray, "N Hkv D"] | None:
            return np.asarray(x)[coded].astype(np.float32) if x is not None and self.needs_gradients else None

        keys, values = (np.asarray(x)[coded].astype(np.float32) for x in (statistics.keys, statistics.values))
        key_gradients, value_gradients = sampled(statistics.key_gradients), sampled(statistics.value_gradients)
        cos, sin = (x[:, None] for x in layer.rope.cos_sin(jnp.asarray(positions[coded])))
        if self.rope == "pre":  # the sampled keys are after RoPE, their gradients before
            keys = np.asarray(nuq.rotate(jnp.asarray(keys), cos, -sin))
        elif key_gradients is not None:
            key_gradients = np.asarray(nuq.rotate(jnp.asarray(key_gradients), cos, sin))

        arrays: dict[str, np.ndarray] = {}
        reach = np.zeros(2, np.float32)
        if self.keys == "per-channel":
            low, high = np.quantile(keys, [self.outliers / 2, 1 - self.outliers / 2], axis=0)
            scale = np.maximum((high - low) / 2, np.finfo(np.float32).tiny).astype(np.float32)
            zero = ((high + low) / 2).astype(np.float32)
            arrays |= {"key_scale": scale, "key_zero": zero}
            relative = (keys - zero) / scale
            arrays |= self._codebooks("key", relative, np.abs(relative) <= 1, scale, key_gradients)
        else:
            reach[0] = self._reach(layer, keys)
            arrays |= self._token_codebooks("key", layer, keys, reach[0], key_gradients)
        reach[1] = self._reach(layer, values)
        arrays |= self._token_codebooks("value", layer, values, reach[1], value_gradients)
        return {**arrays, "reach": reach}

    def _reach(self, layer: LayerShape, x: Float32[np.ndarray, "N Hkv D"]) -> float:
        """How far beyond the rest of its token an element is an outlier, so that `outliers` of all are."""
        most = self.most_outliers(layer)
        if not most:
            return 0.0
        return float(outlier_reach(jnp.asarray(x.reshape(len(x), -1)), most, self.outliers))

    def _token_codebooks(
        self,
        which: str,
        layer: LayerShape,
        x: Float32[np.ndarray, "N Hkv D"],
        reach: float,
        gradients: Float32[np.ndarray, "N Hkv D"] | None,
    ) -> dict[str, np.ndarray]:
        scale_zero, outside = token_ranges(jnp.asarray(x.reshape(len(x), -1)), self.most_outliers(layer), reach)
        scale, zero = (np.asarray(scale_zero)[:, i, None, None].astype(np.float32) for i in range(2))
        relative = (x - zero) / np.where(scale > 0, scale, 1.0)
        inside = ~np.asarray(outside).reshape(x.shape)
        return self._codebooks(which, relative, inside, scale, gradients)

    def _codebooks(
        self,
        which: str,
        relative: Float32[np.ndarray, "N Hkv D"],
        inside: Bool[np.ndarray, "N Hkv D"],
        scale: Float32[np.ndarray, "..."],
        gradients: Float32[np.ndarray, "N Hkv D"] | None,
    ) -> dict[str, np.ndarray]:
        """The codebook that minimises sum F_ii s_i^2 (A_norm - Q)^2 over what is not an outlier (Eq. 7), and Q-Norm's.

        Without gradients every F_ii counts as 1: the squared error of what is read back.
        """
        points = relative[inside]
        if self.codebook == "int":
            codebook = uniform_codebook(2**self.bits)
        else:
            sensitivity = scale if gradients is None else gradients * scale
            largest = max(float(np.abs(sensitivity).max()), np.finfo(np.float32).tiny)
            weights = np.broadcast_to((sensitivity / largest).astype(np.float64) ** 2, relative.shape)
            codebook = weighted_codebook(points, weights[inside], 2**self.bits)
        return {f"{which}_codebook": codebook, f"{which}_entries": q_norm(codebook, points)}


def outlier_slots(outliers: float, head_dim: int) -> int:
    """Slots of a pool for a share of outliers, in fours: half as many again as there are on average, and two.

    Tiles are uneven and so are heads, a token's outliers most of all: with so many a few in a hundred find no slot
    (`outliers_lost` of the code-error task counts them), and every further slot would be empty in most pools.
    """
    return 4 * math.ceil((1.5 * outliers * nuq.TILE * head_dim + 2) / 4)


def most_outliers(outliers: float, elements: int) -> int:
    """Whole outliers at each end of a token's range for a share of its elements, rounded up."""
    return math.ceil(outliers / 2 * elements - 1e-9)


def token_ranges(
    x: Float32[Array, "*tokens n"], most: int, reach: Float32[Array, ""] | float, axis: str | None = None
) -> tuple[Float16[Array, "*tokens 2"], Bool[Array, "*tokens n"]]:
    """Scale and zero of each token's range and which elements are its outliers, at most `most` at each end.

    The range without the `most` largest and smallest elements is what an outlier must exceed, by `reach` times its
    width. Where the wanted share is not a whole number of outliers a token (0.1% of 192 elements is 0.096 at each end),
    the reach is calibrated (`outlier_reach`): tokens that have elements far out keep them, and others keep none.
    `axis`: a mesh axis whose devices hold the tokens' other elements.
    """
    largest, smallest = _extremes(x, most, axis)
    high, low = largest[..., -1:], smallest[..., -1:]
    beyond = reach * (high - low)
    above, below = high + beyond, low - beyond
    top = jnp.max(jnp.where(largest > above, -jnp.inf, largest), axis=-1)
    bottom = jnp.min(jnp.where(smallest < below, jnp.inf, smallest), axis=-1)
    scale_zero = jnp.stack([(top - bottom) / 2, (top + bottom) / 2], axis=-1).astype(jnp.float16)
    return scale_zero, (x > above) | (x < below)


def outlier_reach(x: Float32[Array, "N n"], most: int, outliers: float) -> Float32[Array, ""]:
    """The `reach` with which a share `outliers` of the elements of these tokens are outliers."""
    largest, smallest = _extremes(x, most)
    high, low = largest[..., -1:], smallest[..., -1:]
    width = jnp.maximum(high - low, jnp.finfo(jnp.float32).tiny)
    above = (largest[..., :-1] - high) / width
    below = (low - smallest[..., :-1]) / width
    share = min(outliers / 2 * x.shape[-1] / most, 1.0)
    return jnp.maximum(jnp.quantile(jnp.stack([above, below]), 1 - share), 0.0)


def _extremes(x: Float32[Array, "*tokens n"], most: int, axis: str | None = None) -> tuple[Array, Array]:
    """The most + 1 largest elements of each token, falling, and the smallest, rising: [*tokens, most + 1]."""
    ends = jnp.stack([x, -x], axis=-2)
    found = jax.lax.top_k(ends, min(most + 1, x.shape[-1]))[0]
    if axis is not None:  # the largest of all are among the largest of each device
        found = jax.lax.all_gather(found, axis, axis=found.ndim - 1, tiled=True)
        found = jax.lax.top_k(found, most + 1)[0]
    return found[..., 0, :], -found[..., 1, :]


def put_outliers(
    pool: UInt32[Array, "B Hkv tiles slots"], difference: Float16[Array, "B T Hkv D"], slots: Int[Array, "B T"]
) -> tuple[UInt32[Array, "B Hkv tiles slots"], Int[Array, "B Hkv"]]:
    """The pools with the differences that are not 0 in the next free slots of their tiles, in token order and then by
    channel; and how many of each row and head found none.

    A row's tokens stand in consecutive slots of the cache, from slots[b, 0] on; those of slot -1 have no differences.
    """
    (b, t, heads, dim), (tiles, size) = difference.shape, pool.shape[2:]
    held = (difference != 0).swapaxes(1, 2)
    counts = jnp.sum(held, axis=-1, dtype=jnp.int32)
    before = jnp.cumsum(counts, axis=-1) - counts
    # Outliers of this call that stand before a token's tile, and those that lay in the first tile already.
    inside = jnp.maximum(slots, 0) % nuq.TILE
    first = jnp.maximum(jnp.arange(t) - inside, 0)
    earlier = jnp.take_along_axis(before, first[:, None], axis=-1)
    tile = jnp.where(slots < 0, tiles, slots // nuq.TILE)
    begun = jnp.clip(tile[:, 0], 0, tiles - 1)
    lay = jnp.sum(jnp.take_along_axis(pool, begun[:, None, None, None], axis=2)[:, :, 0] != 0, axis=-1)
    lay = jnp.where((tile == tile[:, :1])[:, None], lay[..., None], 0)
    # Of the same token, by a product: a running sum of 0 and 1 that any type holds exactly.
    earlier_channels = jnp.triu(jnp.ones((dim, dim), jnp.float32), 1)
    rank = (held.astype(jnp.float32) @ earlier_channels).astype(jnp.int32) + (before - earlier + lay)[..., None]
    place = inside[:, None, :, None] * dim + jnp.arange(dim)
    words = nuq.outlier_words(jnp.broadcast_to(place, rank.shape), difference.swapaxes(1, 2))
    rows, columns = jnp.arange(b)[:, None, None, None], jnp.arange(heads)[None, :, None, None]
    slot = jnp.where(held, rank, size)
    pool = pool.at[rows, columns, tile[:, None, :, None], slot].set(words, mode="drop")
    return pool, jnp.sum(held & (rank >= size), axis=(2, 3))
