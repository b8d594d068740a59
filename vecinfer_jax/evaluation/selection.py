"""How much of the attention goes to the tokens that a layer in the host's memory chooses to read (TailorKV)."""

import dataclasses
from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int
from tqdm import tqdm

from vecinfer_jax.caches.attention import MASKED, Tokens, causal_attention, scores
from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerCalibration, LayerShape, array_field, total
from vecinfer_jax.caches.full_precision import FullPrecision
from vecinfer_jax.caches.host_tier import SparseLayer
from vecinfer_jax.caches.windowed import WindowedCache
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.calibration.store import resolve_calibration
from vecinfer_jax.errors import InputError
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.layerwise import Layerwise
from vecinfer_jax.rope import apply_rope


@dataclasses.dataclass(frozen=True)
class SelectionResult:
    """Shares of a query's attention, means over heads and over the queries that cannot read everything.

    kept:   what goes to tokens that are read: sinks, recent and chosen ones.
    best:   what could go to as many, had the most attended (by a KV head's query heads together) been chosen.
    recall: of what goes to the host's tokens, that to the chosen ones over that to the most attended.
    *_by_layer: of each layer; None in layers that are not in the host's memory. The others are means of layers.
    queries: how many queries a layer's shares are means of.
    """

    kept: float
    best: float
    recall: float
    kept_by_layer: tuple[float | None, ...]
    best_by_layer: tuple[float | None, ...]
    recall_by_layer: tuple[float | None, ...]
    queries: int


@struct.dataclass
class _Masses:
    """sums: float32[3], attention to near, chosen and most attended tokens, over queries; queries: how many."""

    inner: WindowedCache
    sums: Float32[Array, "3"] = array_field("state")
    queries: Int[Array, ""] = array_field("state")


@dataclasses.dataclass(frozen=True)
class _Selection(CacheMethod):
    """Attends exactly and measures what a sparse layer would have read."""

    method: SparseLayer
    name: ClassVar[str] = "selection"
    splits_tokens: ClassVar[bool] = False

    def init(self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None) -> _Masses:
        inner = self.method.init(layer, batch, capacity, calibration)
        return _Masses(inner, jnp.zeros((3,), jnp.float32), jnp.int32(0))

    def prefetch(
        self,
        hidden: Float[Array, "B T hidden"],
        project_query: Callable[[jax.Array], jax.Array],
        chunk: Chunk,
        cache: _Masses,
    ) -> _Masses:
        return dataclasses.replace(cache, inner=self.method.prefetch(hidden, project_query, chunk, cache.inner))

    def prefill(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: _Masses,
    ) -> tuple[Float[Array, "B T Hq D"], _Masses]:
        masses, inner = self.method.prefill_as_decoding(q, k, v, chunk, cache.inner, self._masses)
        q, k = apply_rope(q, chunk.cos, chunk.sin), apply_rope(k, chunk.cos, chunk.sin)
        out = causal_attention(q, k, v, chunk.lengths, chunk.layer.scale)
        counts = self.method.coded_count(chunk.positions + 1) > self.method.tokens
        axes = chunk.layer.axes
        heads = total(jnp.int32(masses.shape[2]), axes.model)
        sums = jnp.sum(jnp.where(counts[:, :, None, None], masses, 0.0), axis=(0, 1, 2)) / heads
        sums, queries = total(sums, axes.data, axes.model), total(jnp.sum(counts), axes.data)
        return out, _Masses(inner, cache.sums + sums, cache.queries + queries)

    def _masses(
        self, q: Any, tokens: Tokens, near: Any, there: Any, chosen: Any, layer: LayerShape
    ) -> Float[Array, "B T Hq 3"]:
        p = jax.nn.softmax(jnp.where((near | there)[:, :, None], scores(q, tokens.keys, layer.scale), MASKED), axis=-1)
        mean = jnp.mean(jnp.where(there[:, :, None], p, 0.0), axis=2)
        best = jax.lax.top_k(mean, min(self.method.tokens, mean.shape[-1]))[0]
        best = jnp.broadcast_to(jnp.sum(best, axis=-1)[:, :, None], p.shape[:-1])
        near, chosen = (jnp.sum(jnp.where(mask[:, :, None], p, 0.0), axis=-1) for mask in (near, chosen))
        found = jnp.stack([near, chosen, best], axis=-1)  # [B, Hkv, G, T, 3]
        return jnp.moveaxis(found, 3, 1).reshape(q.shape[0], q.shape[1], -1, 3)

    def decode(self, q, k, v, chunk, cache):  # type: ignore[no-untyped-def]
        raise NotImplementedError("selections are measured over texts, not while decoding")

    def bits_per_element(self, layer: LayerShape) -> float:
        return self.method.bits_per_element(layer)


def selection_recall(
    lm: LanguageModel,
    method: CacheMethod,
    calibration: Calibration | None,
    windows: Int[np.ndarray, "W T"],
    *,
    progress: bool = True,
) -> SelectionResult:
    """What layers in the host's memory would read of a text, while the model itself attends exactly everywhere.

    Raises `InputError` where no layer is in the host's memory, or windows are so short that every token is read.
    """
    calibration = resolve_calibration(lm, method, calibration, tokens=windows.shape[1], progress=progress)
    model = _Measured(lm, method, calibration)
    measured = model.measured
    if not any(measured):
        raise InputError(f"{method!r} keeps no layer in the host's memory: there is nothing to choose")
    totals, queries = np.zeros((len(measured), 3)), 0
    for tokens in tqdm(windows, "windows", disable=not progress, unit="window"):
        _, caches = model.prefill(model.init(1, len(tokens)), tokens[None], read="coded")
        totals += np.asarray([cache.sums if isinstance(cache, _Masses) else np.zeros(3) for cache in caches])
        queries += next(int(cache.queries) for cache in caches if isinstance(cache, _Masses))
    if not queries:
        raise InputError(f"windows of {windows.shape[1]} tokens are read whole: make them longer or the budget smaller")
    near, chosen, best = (totals / queries).T

    def by_layer(values: np.ndarray) -> tuple[float | None, ...]:
        return tuple(float(x) if here else None for x, here in zip(values, measured, strict=True))

    recall = chosen / np.maximum(best, 1e-30)
    shares: dict[str, np.ndarray] = {"kept": near + chosen, "best": near + best, "recall": recall}
    means: dict[str, Any] = {name: float(np.mean(values[measured])) for name, values in shares.items()}
    of_layers: dict[str, Any] = {f"{name}_by_layer": by_layer(values) for name, values in shares.items()}
    return SelectionResult(**means, **of_layers, queries=queries)


class _Measured(Layerwise):
    """Sparse layers measured, the others exact."""

    def __init__(self, lm: LanguageModel, method: CacheMethod, calibration: Calibration) -> None:
        super().__init__(lm, method, calibration)
        self.measured = np.asarray([isinstance(m, SparseLayer) for m in self._methods])
        self._methods = [_Selection(m) if isinstance(m, SparseLayer) else FullPrecision() for m in self._methods]
