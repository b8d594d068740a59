"""How far keys and values read from codes are from those that went in."""

import dataclasses
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float, Float32, Int
from tqdm import tqdm

from vecinfer_jax.caches.attention import causal_attention
from vecinfer_jax.caches.base import CacheMethod, Chunk, LayerCalibration, LayerShape, array_field, total
from vecinfer_jax.caches.windowed import WindowedMethod
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.calibration.store import resolve_calibration
from vecinfer_jax.errors import InputError
from vecinfer_jax.evaluation.perplexity import bits_per_element
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.layerwise import Layerwise
from vecinfer_jax.rope import apply_rope


@dataclasses.dataclass(frozen=True)
class CodeErrorResult:
    """Relative L2 error sqrt(sum |x - x^|^2 / sum |x|^2), keys after RoPE in the model's space, and values.

    key_error, value_error: root mean square over layers of each layer's relative error.
    key_error_by_layer, value_error_by_layer: of each layer.
    outliers, outliers_lost: elements of all layers that methods with outliers kept beside the codes, and those that
        found no room and were clipped.
    """

    key_error: float
    value_error: float
    key_error_by_layer: tuple[float, ...]
    value_error_by_layer: tuple[float, ...]
    bits_per_element: float
    tokens: int
    outliers: int = 0
    outliers_lost: int = 0


@struct.dataclass
class _Sums:
    """float32[4]: squared error and squared length of keys, then of values; int32[2]: outliers kept and lost.

    store: the method's empty codes.
    """

    sums: Float32[Array, "4"] = array_field("state")
    outliers: Int[Array, "2"] = array_field("state")
    store: Any = None


@dataclasses.dataclass(frozen=True)
class _CodeError(CacheMethod):
    """Attends exactly and measures what a method's codes would have made of the tokens."""

    method: WindowedMethod
    name: ClassVar[str] = "code-error"
    splits_tokens: ClassVar[bool] = False

    def init(self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None) -> _Sums:
        self.method.validate(layer)
        empty = jnp.zeros((4,), jnp.float32), jnp.zeros((2,), jnp.int32)
        return _Sums(*empty, self.method.init_store(layer, batch, capacity, calibration))

    def prefill(
        self,
        q: Float[Array, "B T Hq D"],
        k: Float[Array, "B T Hkv D"],
        v: Float[Array, "B T Hkv D"],
        chunk: Chunk,
        cache: _Sums,
    ) -> tuple[Float[Array, "B T Hq D"], _Sums]:
        q, k = apply_rope(q, chunk.cos, chunk.sin), apply_rope(k, chunk.cos, chunk.sin)
        out = causal_attention(q, k, v, chunk.lengths, chunk.layer.scale)
        sink, group = self.method.sink, self.method.token_group
        count = (k.shape[1] - sink) // group * group  # sinks are never coded, all else in whole groups
        k, v = k[:, sink : sink + count], v[:, sink : sink + count]
        held = self.method.centred(k, cache.store)
        slots = chunk.positions[:, sink : sink + count] - sink
        store = self.method.append(cache.store, held, v, slots, chunk.layer)
        keys, values = self.method.read(store, jnp.int32(0), count, chunk.layer)

        def squares(x: jax.Array, given: jax.Array, coded: jax.Array) -> list[jax.Array]:
            """Of the error of what was `given` to be coded for x, and of x."""
            x, given = (a.swapaxes(1, 2).astype(jnp.float32) for a in (x, given))
            return [jnp.sum((given - coded.astype(jnp.float32)) ** 2), jnp.sum(x**2)]

        axes = chunk.layer.axes
        here = jnp.stack(squares(k, held, keys) + squares(v, v, values)), self.method.outliers_held(store)
        sums, outliers = (total(x, axes.data, axes.model) for x in here)
        return out, _Sums(cache.sums + sums, cache.outliers + outliers, cache.store)

    def decode(self, q, k, v, chunk, cache):  # type: ignore[no-untyped-def]
        raise NotImplementedError("code errors are measured over texts, not while decoding")

    def bits_per_element(self, layer: LayerShape) -> float:
        return self.method.bits_per_element(layer)


def code_error(
    lm: LanguageModel,
    method: CacheMethod,
    calibration: Calibration | None,
    windows: Int[np.ndarray, "W T"],
    *,
    progress: bool = True,
) -> CodeErrorResult:
    """Relative error of the keys and values of a text's tokens, by layer; 0 in layers that keep no codes.

    Of methods that group keys along tokens: of the tokens in whole groups. Raises `InputError` where there are none.
    """
    n = lm.config.num_layers
    calibration = resolve_calibration(lm, method, calibration, tokens=windows.shape[1], progress=progress)
    method = method.resolved(calibration.layers)
    methods = [method.for_layer(i, n) for i in range(n)]
    groups = [(getattr(one, "sink", 0), getattr(one, "token_group", 1)) for one in methods]
    if windows.shape[1] < max(map(sum, groups)):
        sink, group = max(groups, key=sum)
        what = f"whole group of {group}" + (f" after {sink} first ones" if sink else "")
        raise InputError(f"windows of {windows.shape[1]} tokens hold no {what}: make them longer")
    totals = np.zeros((n, 4), np.float64)
    totals[:, [1, 3]] = 1e-30
    outliers = np.zeros(2, np.int64)
    measured = _Measured(lm, method, calibration)
    for tokens in tqdm(windows, "windows", disable=not progress, unit="window"):
        _, caches = measured.prefill(measured.init(1, len(tokens)), tokens[None])
        totals += np.asarray([cache.sums if isinstance(cache, _Sums) else np.zeros(4) for cache in caches])
        outliers += sum(np.asarray(cache.outliers, np.int64) for cache in caches if isinstance(cache, _Sums))
    keys = np.sqrt(totals[:, 0] / totals[:, 1])
    values = np.sqrt(totals[:, 2] / totals[:, 3])
    return CodeErrorResult(
        key_error=float(np.sqrt(np.mean(keys**2))),
        value_error=float(np.sqrt(np.mean(values**2))),
        key_error_by_layer=tuple(float(x) for x in keys),
        value_error_by_layer=tuple(float(x) for x in values),
        bits_per_element=bits_per_element(lm, method),
        tokens=windows.shape[0] * min((windows.shape[1] - sink) // group * group for sink, group in groups),
        outliers=int(outliers[0]),
        outliers_lost=int(outliers[1]),
    )


class _Measured(Layerwise):
    """Every coded layer's method wrapped."""

    def __init__(self, lm: LanguageModel, method: CacheMethod, calibration: Calibration) -> None:
        super().__init__(lm, method, calibration)
        self._methods = [_CodeError(m) if isinstance(m, WindowedMethod) else m for m in self._methods]
