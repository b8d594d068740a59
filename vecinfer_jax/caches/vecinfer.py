"""VecInfer (arXiv 2510.06175): smoothed and Hadamard-rotated keys, and values as they are, vector-quantised.

Per KV head, after RoPE (section 3.2): q <- (q * lambda) H and k <- (k / lambda) H leave every score unchanged; the
static factors lambda_i = sqrt(max |k_i|) flatten channel outliers and H spreads what is left, so that one codebook
of short sub-vectors serves every position. A code is the index of the L2-nearest of 2^b centroids (section 3.3).
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Int, UInt8

from pallas_kernels import ExactTokens, dispatch, hadamard, vq_append, vq_decode_attention, vq_encode
from pallas_kernels.exact import product
from pallas_kernels.vq_decode_attention.queries import transform_queries
from pallas_kernels.vq_decode_attention.reference import dequantise
from vecinfer_jax.caches.base import LayerCalibration, LayerShape, array_field
from vecinfer_jax.caches.formats import CodeFormat
from vecinfer_jax.caches.rows import read_slots, write_chunk
from vecinfer_jax.caches.vector_quantised import VectorQuantisedMethod
from vecinfer_jax.caches.windowed import WindowedCache
from vecinfer_jax.calibration.codebooks import codebook_of, pooled_codebook
from vecinfer_jax.calibration.metric import metric_map, principal_rotation
from vecinfer_jax.calibration.refine import refine_layer
from vecinfer_jax.errors import CalibrationError, InputError

# The paper's and its ablation, then those that take the keys' mean off first.
PAPER_TRANSFORMS = ("smooth-hadamard", "hadamard-smooth", "smooth", "hadamard", "none")
CENTRING_TRANSFORMS = ("metric", "rotation", "mean-smooth-hadamard")
TRANSFORMS = (*PAPER_TRANSFORMS, *CENTRING_TRANSFORMS)
SCOPES = ("layer_head", "layer", "global")
WEIGHTED = MIXED = ("none", "keys", "values", "both")
REFINEMENTS = ("none", "attention", "kl")
# Elements of a centroid in fp8, which the kernels read 4 bytes at a time; and what the largest value is scaled to, of a
# type that goes from 2^-6 to 448 without losing bits.
FEWEST_FP8, FP8_PEAK_LOG2 = 4, 8
# Passages and tokens of one: a head's mean depends on positions, which RoPE turns.
CENTRED_TEXT = (64, 1024)
# What the model's predictions are refined on, and the share of it that says everything twice: what is said again is
# best predicted by reading the first time exactly.
REFINED_TEXT, REPEATED = (64, 2048), 0.5


@struct.dataclass
class VecInferStore:
    """Codes and what reads them.

    key_codes, value_codes:         uint8[B, Hkv, S, bytes], a token's packed codes contiguous.
    key_codebook, value_codebook:   [Hkv or 1, 2^b, d], in the model's dtype; codes are chosen with these values.
    smooth, inverse_smooth:         float32[Hkv, D], lambda and 1 / lambda; ones where the transform does not smooth.
    value_table:                    the values' codebook in float8_e4m3fn, for decoding to read (fp8_values); what
        value_codebook holds is then rounded to it.
    mean:                           float32[Hkv, D], taken off every key, where the transform centres.
    key_map, query_map:             float32[Hkv, D, D], k' = k key_map and q' = q query_map, where it is a dense map.
    """

    key_codes: UInt8[Array, "B Hkv S kbytes"] = array_field("codes")
    value_codes: UInt8[Array, "B Hkv S vbytes"] = array_field("codes")
    key_codebook: Float[Array, "Hk K d"] = array_field("codebooks")
    value_codebook: Float[Array, "Hv K d"] = array_field("codebooks")
    smooth: Float[Array, "Hkv D"] = array_field("codebooks")
    inverse_smooth: Float[Array, "Hkv D"] = array_field("codebooks")
    value_table: Float[Array, "Hv K d"] | None = array_field("codebooks")
    mean: Float[Array, "Hkv D"] | None = array_field("codebooks")
    key_map: Float[Array, "Hkv D D"] | None = array_field("codebooks")
    query_map: Float[Array, "Hkv D D"] | None = array_field("codebooks")


@dataclasses.dataclass(frozen=True)
class VecInfer(VectorQuantisedMethod):
    """Vector-quantised cache.

    bits:       4, 3, 2, 1.5, 1.25 or 1: the paper's formats for that average.
    key, value: formats such as "d4b10", "d8b12" in place of the paper's.
    transform:  of the keys. "metric" is ours (`vecinfer_jax.calibration.metric`): the mean of a head's keys taken off,
        and a dense map that weighs errors as queries see them. "rotation" is the same without the queries,
        "mean-smooth-hadamard" the paper's on keys without their mean. "smooth-hadamard" is the paper,
        "hadamard-smooth", "smooth", "hadamard" and "none" its ablation.
    rotate_values: turn values to their principal directions, in serpentine order; folded into W_v and W_o.
    mixed:      "keys", "values" or "both": their principal directions are turned so that all sub-vectors have the same
        covariance, or groups of them where their number is no power of two (`metric.spread`); "none". Left out: those
        that have a rotation and sub-vectors of 2.
    fp8_values: values' centroids in float8_e4m3fn, half the bytes to look up, which makes decoding faster
        (docs/performance.md). A head's values are scaled to that type's range by a power of two, folded into W_v and
        W_o, which loses bits in float16 models alone.
    scope:      one codebook of keys and one of values per "layer_head", per "layer", or for the whole model ("global").
    residual:   exact recent tokens (paper: 128).
    sink:       exact first tokens. Left out, 0 with the paper's transforms, as there, and 1 with those that take off
        the mean, since the first token's key is far from every other.
    weighted:   "keys", "values" or "both": tokens count in k-means by the square root of what their error does to the
        attention's output on the calibration text (`statistics.attention_received`); "none": all alike.
    restarts:   starts of k-means, the best of which is kept.
    refine:     "attention": codebooks and the queries' map end with gradient descent on the error of the attention's
        output, layer by layer (`vecinfer_jax.calibration.refine`); "kl": and then on the divergence of the model's
        predictions (`distil`), on text of which half is said twice (`calibrate`), so that what is there is found
        again. With transform="metric" or "rotation"; decoding costs the same.
    implementation: of the cache's kernels ("mosaic_gpu" for decoding in 16 bits on Hopper, "triton", "xla"; None: the
        best that serves the device and the model); interpret: run Pallas kernels in interpret mode (tests).
    """

    sink: int = dataclasses.field(default=None, kw_only=True)  # type: ignore[assignment]
    transform: str = "metric"
    scope: str = "layer_head"
    implementation: str | None = None
    interpret: bool = False
    rotate_values: bool = dataclasses.field(default=False, kw_only=True, metadata={"later": True})
    weighted: str = dataclasses.field(default="none", kw_only=True, metadata={"later": True})
    restarts: int = dataclasses.field(default=1, kw_only=True, metadata={"later": True})
    refine: str = dataclasses.field(default="none", kw_only=True, metadata={"later": True})
    fp8_values: bool = dataclasses.field(default=False, kw_only=True, metadata={"later": True})
    mixed: str = dataclasses.field(  # not `| None`: mixed=none is a setting, and not the same as nothing
        default=None,  # type: ignore[assignment]
        kw_only=True,
        metadata={"later": True, "meaning": "mixes", "before": "none"},
    )

    name: ClassVar[str] = "vecinfer"
    needs_calibration: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.sink is None:
            object.__setattr__(self, "sink", int(self.transform in CENTRING_TRANSFORMS))
        super().__post_init__()
        kernels = dispatch.TABLE["vq_decode_attention"]
        if self.implementation is not None and self.implementation not in kernels:
            raise InputError(f"implementation={self.implementation!r} is unknown; choose from {', '.join(kernels)}")
        if self.transform not in TRANSFORMS:
            raise InputError(f"transform={self.transform!r} is unknown; choose from {', '.join(TRANSFORMS)}")
        for name in ("rotate_values", "fp8_values"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r} must be true or false")
        if self.fp8_values and self.value_format.length < FEWEST_FP8:
            raise InputError(
                f"fp8_values=true needs values of sub-vectors of {FEWEST_FP8} or more, such as value='d4b12', "
                f"not {self.value_format}"
            )
        for name, known in (("scope", SCOPES), ("weighted", WEIGHTED), ("refine", REFINEMENTS)):
            if getattr(self, name) not in known:
                raise InputError(f"{name}={getattr(self, name)!r} is unknown; choose from {', '.join(known)}")
        if not isinstance(self.restarts, int) or self.restarts < 1:
            raise InputError(f"restarts={self.restarts!r} must be a whole number, 1 or more")
        if self.mixes not in MIXED:
            raise InputError(f"mixed={self.mixed!r} is unknown; choose from {', '.join(MIXED)}")
        for which, (turned, _) in self._rotated.items():
            if self._mixed(which) and not turned:
                needed = "transform=metric or rotation" if which == "keys" else "rotate_values=true"
                raise InputError(f"mixed={self.mixed!r} needs {needed}")
        if self.refine != "none" and not self.maps:
            raise InputError(f"refine={self.refine!r} needs transform=metric or rotation, not {self.transform}")
        if self.scope == "global" and (self.refine, self.weighted, self.restarts) != ("none", "none", 1):
            raise InputError("scope='global' has no weighted, restarts or refine: choose scope layer_head or layer")

    @classmethod
    def refined(cls, **settings: Any) -> "VecInfer":
        """weighted="both", rotate_values=True and refine="kl", unless `settings` say otherwise.

        The best codebooks there are here, for a calibration that takes a GPU: minutes for a model of 0.1B parameters.
        Raises what `VecInfer` does.
        """
        chosen: dict[str, Any] = {"weighted": "both", "rotate_values": True, "refine": "kl"}
        return cls(**chosen | settings)

    @property
    def _rotated(self) -> dict[str, tuple[bool, CodeFormat]]:
        """Whether keys, and values, go through a rotation that is fitted to them, and their formats."""
        return {"keys": (self.maps, self.key_format), "values": (self.rotate_values, self.value_format)}

    @property
    def mixes(self) -> str:
        """What `mixed` says, or stands for where it is left out."""
        if self.mixed is not None:
            return self.mixed
        pairs = [which for which, (turned, form) in self._rotated.items() if turned and form.length == 2]
        return "both" if len(pairs) == 2 else (*pairs, "none")[0]

    def _mixed(self, which: str) -> bool:
        return self.mixes in (which, "both")

    @property
    def rotates(self) -> bool:
        """Whether keys go through the Hadamard matrix."""
        return "hadamard" in self.transform

    @property
    def smooths(self) -> bool:
        """Whether keys are divided by lambda."""
        return "smooth" in self.transform

    @property
    def centres(self) -> bool:
        """Whether a head's mean is taken off its keys, exact ones included."""
        return self.transform in CENTRING_TRANSFORMS

    @property
    def fuses_queries(self) -> bool:
        """Whether the attention kernels transform queries: they know a scale and then a Hadamard matrix, or a map."""
        return self.transform != "hadamard-smooth"

    @property
    def maps(self) -> bool:
        """Whether keys go through a dense matrix."""
        return self.transform in ("metric", "rotation")

    def validate(self, layer: LayerShape) -> None:
        super().validate(layer)
        if self.rotates and layer.head_dim & (layer.head_dim - 1):
            raise InputError(
                f"transform={self.transform!r} needs head_dim a power of two, this model has {layer.head_dim}"
            )

    def reading(self) -> str:
        rest = [] if self.fuses_queries else [self.transform]
        rest += ["fp8"] if self.fp8_values else []
        rest += [] if self.implementation in (None, "mosaic_gpu") else [self.implementation]
        return " ".join([super().reading(), *rest])

    @property
    def calibration_text(self) -> tuple[int, int] | None:
        if self.refines_model:
            return REFINED_TEXT
        return CENTRED_TEXT if self.centres else None

    @property
    def calibration_repeated(self) -> float:
        return REPEATED if self.refines_model else 0.0

    @property
    def bound_to_positions(self) -> bool:
        return self.centres

    def calibration_key(self) -> dict[str, Any]:
        key = super().calibration_key() | {"transform": self.transform, "scope": self.scope}
        if self.centres:  # sinks are no part of what is fitted
            key["first"] = self.sink
        if self.rotate_values:
            key["values"] = "rotated"
        if self.fp8_values:
            key["value_table"] = "fp8"
        for name, default in (("weighted", "none"), ("restarts", 1), ("refine", "none")):
            if getattr(self, name) != default:
                key[name] = getattr(self, name)
        if self.mixes != "none":
            key["mixed"] = self.mixes
        if self.refine != "none":
            key["first"] = self.sink
            if max(self.key_format.bits, self.value_format.bits) > 2:
                key["rates"] = "by width"  # and not one for all, as there once was
        return key

    def wanted_statistics(self) -> frozenset[str]:
        wanted = {"weights": self.weighted != "none", "windows": self.refine != "none"}
        return frozenset(name for name, needed in wanted.items() if needed)

    @property
    def refines_model(self) -> bool:
        return self.refine == "kl"

    def init_store(self, layer: LayerShape, batch: int, slots: int, calibration: LayerCalibration) -> VecInferStore:
        empty = self.empty_store(layer, batch, slots, calibration)
        assert calibration is not None
        table = None
        if self.fp8_values:
            most = float(jnp.finfo(jnp.float8_e4m3fn).max)  # beyond it casts give NaN
            table = jnp.clip(jnp.asarray(calibration["value_codebook"]), -most, most).astype(jnp.float8_e4m3fn)
            empty["value_codebook"] = table.astype(layer.dtype)
        smooth = jnp.asarray(calibration["smooth"], jnp.float32)
        wanted = {"mean": self.centres, "key_map": self.maps, "query_map": self.maps}
        maps: dict[str, Any] = {
            name: jnp.asarray(calibration[name], jnp.float32) if has else None for name, has in wanted.items()
        }
        return VecInferStore(**empty, **maps, value_table=table, smooth=smooth, inverse_smooth=1.0 / smooth)

    # -- transforms (section 3.2); scores are invariant: transform_query(q) . transform_key(k) = q . k

    def centred(self, k: Float[Array, "*B Hkv D"], store: VecInferStore) -> Float[Array, "*B Hkv D"]:
        return k if store.mean is None else (k.astype(jnp.float32) - store.mean).astype(k.dtype)

    def transform_query(self, q: Float[Array, "*B Hq D"], store: VecInferStore) -> Float[Array, "*B Hq D"]:
        """q after RoPE, into the space of the coded keys; float32 arithmetic, q's dtype out."""
        rows = q.reshape(-1, *q.shape[-2:])
        if self.transform != "hadamard-smooth":
            how = self._how("hadamard")
            return transform_queries(rows, store.smooth, self.rotates, store.query_map, **how).reshape(q.shape)
        heads, dim = store.smooth.shape
        rotated = self._rotate(rows.astype(jnp.float32)).reshape(rows.shape[0], heads, -1, dim)
        return (rotated * store.smooth[:, None]).reshape(q.shape).astype(q.dtype)

    def restore_key(self, k: Float[Array, "B Hkv S D"], store: VecInferStore) -> Float[Array, "B Hkv S D"]:
        """A decoded key back into the model's space (the inverse of the keys' transform), but for the mean."""
        if store.query_map is not None:  # the inverse of key_map is query_map's transpose
            return product("bhsj,hij->bhsi", k.astype(jnp.float32), store.query_map)
        x, smooth = k.astype(jnp.float32), store.smooth[:, None, :]
        if self.transform == "hadamard-smooth":
            return self._rotate(x * smooth)
        return (self._rotate(x) if self.rotates else x) * smooth

    def _rotate(self, x: Float[Array, "*rows D"]) -> Float[Array, "*rows D"]:
        return hadamard(x, **self._how("hadamard"))

    def _how(self, operation: str) -> dict[str, Any]:
        """How an operation is to run."""
        name = dispatch.named(operation, self.implementation)
        return {"implementation": name, "interpret": self.interpret}

    # -- the windowed protocol

    def append(
        self,
        store: VecInferStore,
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        slots: Int[Array, "B T"],
        layer: LayerShape,
    ) -> VecInferStore:
        key_codes, value_codes = self.encode(store, k, v)
        return dataclasses.replace(
            store,
            key_codes=write_chunk(store.key_codes, key_codes.swapaxes(1, 2), slots),
            value_codes=write_chunk(store.value_codes, value_codes.swapaxes(1, 2), slots),
        )

    def encode(
        self, store: VecInferStore, k: Float[Array, "B T Hkv D"], v: Float[Array, "B T Hkv D"]
    ) -> tuple[UInt8[Array, "B Hkv T kbytes"], UInt8[Array, "B Hkv T vbytes"]]:
        """Codes of keys (after RoPE) and values."""
        how = self._how("vq_encode")
        return (
            vq_encode(k, store.key_codebook, **self._key_transform(store), **how),
            vq_encode(v, store.value_codebook, **how),
        )

    def push_token(
        self,
        cache: WindowedCache,
        k: Float[Array, "B Hkv D"],
        v: Float[Array, "B Hkv D"],
        at: Int[Array, "B"],
        layer: LayerShape,
    ) -> WindowedCache:
        store, dealt = cache.store, self.stripes(layer)
        slots = None if dealt.axis is None else dealt.place(at - self.residual - self.sink).astype(jnp.int32)
        ring_keys, ring_values, key_codes, value_codes, *sinks = vq_append(
            k,
            v,
            at.astype(jnp.int32),
            cache.ring_keys,
            cache.ring_values,
            store.key_codes,
            store.value_codes,
            store.key_codebook,
            store.value_codebook,
            sink=self.sink,
            sinks=(cache.sink_keys, cache.sink_values),
            slots=slots,
            **self._key_transform(store),
            **self._how("vq_append"),
        )
        return dataclasses.replace(
            cache,
            store=dataclasses.replace(store, key_codes=key_codes, value_codes=value_codes),
            ring_keys=ring_keys,
            ring_values=ring_values,
            sink_keys=sinks[0],
            sink_values=sinks[1],
        )

    def _key_transform(self, store: VecInferStore) -> dict[str, Any]:
        """As the kernels that encode keys take it."""
        if self.transform == "hadamard-smooth":
            rotation = jnp.asarray(hadamard(jnp.eye(store.smooth.shape[1], dtype=jnp.float32)))
            return {"matrix": rotation[None] / store.smooth[:, None, :]}
        if store.key_map is not None:
            return {"matrix": store.key_map}
        return {"scale": store.inverse_smooth, "hadamard": self.rotates}

    def read(
        self, store: VecInferStore, start: Int[Array, ""], size: int, layer: LayerShape
    ) -> tuple[Float[Array, "B Hkv size D"], Float[Array, "B Hkv size D"]]:
        key_codes, value_codes = (read_slots(codes, start, size) for codes in (store.key_codes, store.value_codes))
        keys = dequantise(key_codes, store.key_codebook, layer.head_dim, layer.dtype)
        values = dequantise(value_codes, store.value_codebook, layer.head_dim, layer.dtype)
        return self.restore_key(keys, store).astype(layer.dtype), values.astype(layer.dtype)

    def attend_cache(
        self, q: Float[Array, "B Hq D"], cache: WindowedCache, layer: LayerShape, dtype: Any
    ) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
        exact = self.exact_tokens(cache, layer)
        return self.attend_codes(q, cache.store, self.held(cache, layer), exact, layer, dtype)

    def attend_codes(
        self,
        q: Float[Array, "B Hq D"],
        store: VecInferStore,
        count: Int[Array, "B"],
        exact: Sequence[ExactTokens],
        layer: LayerShape,
        dtype: Any,
    ) -> tuple[Float[Array, "B Hq D"], Float[Array, "B Hq"]]:
        """One query (after RoPE) a sequence over its first count[b] codes and the exact ones: output, log-sum-exp."""
        fused = self.fuses_queries
        return vq_decode_attention(
            q if fused else self.transform_query(q, store),
            store.key_codes,
            store.value_codes,
            store.key_codebook,
            store.value_codebook if store.value_table is None else store.value_table,
            count.astype(jnp.int32),
            scale=layer.scale,
            query_scale=store.smooth if fused and self.smooths else None,
            query_hadamard=fused and self.rotates,
            query_map=store.query_map,
            exact=exact,
            exact_q=q,
            out_dtype=dtype,
            **self._how("vq_decode_attention"),
        )

    # -- calibration (section 4.1)

    def shared_calibration(self, layers: Sequence[LayerShape], statistics: Sequence[Any], seed: int) -> Any:
        if self.scope != "global":
            return None

        def codebook(vectors: list[np.ndarray], form: CodeFormat, seed: int) -> np.ndarray:
            return pooled_codebook(vectors, length=form.length, entries=form.entries, seed=seed)

        keys = [self._coded_keys(layer, s)[1] for layer, s in zip(layers, statistics, strict=True)]
        values = [self._coded_values(s)[1] for s in statistics]
        return {
            "key_codebook": codebook(keys, self.key_format, seed),
            "value_codebook": codebook(values, self.value_format, seed + 1),
        }

    def calibrate_layer(
        self, layer: LayerShape, statistics: Any, seed: int, shared: Any = None
    ) -> dict[str, np.ndarray]:
        arrays, keys = self._coded_keys(layer, statistics)
        rotation, values = self._coded_values(statistics)
        arrays |= rotation
        if self.scope == "global":
            return {**arrays, **shared}

        def codebook(vectors: np.ndarray, weights: np.ndarray | None, form: CodeFormat, seed: int) -> np.ndarray:
            return codebook_of(
                vectors,
                weights,
                length=form.length,
                entries=form.entries,
                per_head=self.scope == "layer_head",
                seed=seed,
                restarts=self.restarts,
            )

        key_weights, value_weights = self._weights("key", statistics), self._weights("value", statistics)
        arrays = {
            **arrays,
            "key_codebook": codebook(keys, key_weights, self.key_format, seed),
            "value_codebook": codebook(values, value_weights, self.value_format, seed + 1),
        }
        if self.refine == "none":
            return arrays
        windows = statistics.windows
        if self.folds_values:
            turned = np.einsum(
                "wthi,hij->wthj", np.asarray(windows.values, np.float32), np.asarray(value_fold(arrays, layer)[0])
            )
            windows = dataclasses.replace(windows, values=turned)
        return refine_layer(arrays, windows, self.sink, seed)

    def _weights(self, which: str, statistics: Any) -> np.ndarray | None:
        """Of the sampled keys or values in k-means, of mean 1 in each head."""
        if self.weighted not in (f"{which}s", "both"):
            return None
        weights = np.asarray(getattr(statistics, f"{which}_weights"), np.float32)
        weights = np.sqrt(sampled_after(self.sink, weights, statistics) if self.centres else weights)
        mean = weights.mean(axis=0)
        return weights / np.where(mean > 0, mean, 1.0)

    def _coded_keys(self, layer: LayerShape, statistics: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The arrays of the keys' transform by their names, and the sampled keys [N, Hkv, D] as they are encoded."""
        keys = np.asarray(statistics.keys, np.float32)
        arrays: dict[str, np.ndarray] = {"smooth": np.ones((layer.num_kv_heads, layer.head_dim), np.float32)}
        if self.centres:
            power = 0.25 if self.transform == "metric" else 0.0
            arrays |= (
                centred_maps(statistics, self.key_format.length, power, self._mixed("keys"))
                if self.maps
                else centre(statistics)
            )
            keys = sampled_after(self.sink, keys, statistics) - arrays["mean"]
            if self.maps:
                return arrays, np.einsum("nhi,hij->nhj", keys, arrays["key_map"])

        def rotate(x: np.ndarray) -> np.ndarray:
            return np.asarray(hadamard(jnp.asarray(x), implementation="xla"))

        if self.smooths:
            peak = statistics.rotated_key_abs_max if self.transform == "hadamard-smooth" else statistics.key_abs_max
            if self.centres:
                peak = np.abs(keys).max(axis=0)
            arrays["smooth"] = smoothing_factors(np.asarray(peak, np.float32))
        smooth = arrays["smooth"]
        if self.transform == "hadamard-smooth":
            return arrays, rotate(keys) / smooth
        return arrays, rotate(keys / smooth) if self.rotates else keys / smooth

    def _coded_values(self, statistics: Any) -> tuple[dict[str, np.ndarray], np.ndarray]:
        """The arrays of what is folded of the values, if anything is, and the sampled values as they are encoded."""
        values = np.asarray(statistics.values, np.float32)
        if self.centres:
            values = sampled_after(self.sink, values, statistics)
        arrays: dict[str, np.ndarray] = {}
        if self.rotate_values:
            turned = principal_rotation(values.astype(np.float64), self.value_format.length, self._mixed("values"))
            arrays["value_map"] = turned.astype(np.float32)
            values = np.einsum("nhi,hij->nhj", values, arrays["value_map"])
        if self.fp8_values:
            arrays["value_scale"] = fp8_scale(values)
            values = values * arrays["value_scale"][:, None]
        return arrays, values

    # -- the values' rotation and scale

    @property
    def folds_values(self) -> bool:
        return self.rotate_values or self.fp8_values

    def fold_values(
        self,
        layer: LayerShape,
        calibration: LayerCalibration,
        v_kernel: Float[Array, "hidden Hkv D"],
        v_bias: Float[Array, "Hkv D"] | None,
        o_kernel: Float[Array, "Hq D hidden"],
    ) -> tuple[Array, Array | None, Array]:
        """v R s for every head's values, and R^T / s before W_o; R and s are 1 where nothing rotates or scales."""
        assert calibration is not None
        into, back = value_fold(calibration, layer)
        out = jnp.repeat(back, layer.num_query_heads // layer.num_kv_heads, axis=0)
        exact = jax.lax.Precision.HIGHEST
        return (
            jnp.einsum("xhi,hij->xhj", v_kernel, into, precision=exact),
            None if v_bias is None else jnp.einsum("hi,hij->hj", v_bias, into, precision=exact),
            jnp.einsum("hij,hix->hjx", out, o_kernel, precision=exact),
        )


def value_fold(
    calibration: Mapping[str, Any], layer: LayerShape
) -> tuple[Float[Array, "Hkv D D"], Float[Array, "Hkv D D"]]:
    """R s and R / s: what a layer's values are multiplied by, and by the transpose of which that is undone."""
    heads, dim = layer.num_kv_heads, layer.head_dim
    rotation = jnp.asarray(calibration.get("value_map", jnp.tile(jnp.eye(dim), (heads, 1, 1))), jnp.float32)
    scale = jnp.asarray(calibration.get("value_scale", jnp.ones(heads)), jnp.float32)[:, None, None]
    return rotation * scale, rotation / scale


def fp8_scale(values: Float[np.ndarray, "N Hkv D"]) -> Float[np.ndarray, "Hkv"]:
    """The power of two of each head by which its largest value comes to 2^7 to 2^8."""
    peak = np.abs(values).max(axis=(0, 2))
    return np.where(peak > 0, np.exp2(FP8_PEAK_LOG2 - np.ceil(np.log2(np.maximum(peak, 1e-30)))), 1.0).astype(
        np.float32
    )


def sampled_after(first: int, vectors: np.ndarray, statistics: Any) -> np.ndarray:
    """Those of a layer's sampled vectors that stood at position `first` of their passage or later."""
    after = vectors[np.asarray(statistics.positions) >= first]
    if not len(after):
        raise CalibrationError(f"no passage has a token after its first {first}: give longer ones or fewer sinks")
    return after


def centre(statistics: Any) -> dict[str, np.ndarray]:
    """The mean of a layer's keys, but for a passage's first, which is far from every other."""
    return {"mean": sampled_after(1, np.asarray(statistics.keys, np.float32), statistics).mean(axis=0)}


def centred_maps(statistics: Any, length: int, power: float = 0.25, mixed: bool = False) -> dict[str, np.ndarray]:
    """That mean, and the maps of `metric_map` for sub-vectors of `length`."""
    keys = sampled_after(1, np.asarray(statistics.keys, np.float32), statistics)
    arrays = centre(statistics)
    moment = np.asarray(statistics.query_moment, np.float64) / max(int(statistics.count), 1)
    arrays["key_map"], arrays["query_map"] = metric_map(moment, keys - arrays["mean"], length, power, mixed)
    return arrays


def smoothing_factors(key_abs_max: Float[np.ndarray, "Hkv D"]) -> Float[np.ndarray, "Hkv D"]:
    """lambda_i = sqrt(max over calibration tokens of |k_i|), VecInfer section 3.2, with a positive floor."""
    factors = np.sqrt(key_abs_max)
    floor = 1e-3 * np.max(factors, axis=-1, keepdims=True)
    return np.maximum(factors, np.maximum(floor, 1e-6)).astype(np.float32)
