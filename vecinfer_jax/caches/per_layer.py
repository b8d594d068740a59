"""Different methods in different layers."""

import abc
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from vecinfer_jax.caches.base import CacheMethod, LayerCalibration, LayerShape, joined_text
from vecinfer_jax.errors import InputError


class LayeredMethod(CacheMethod):
    """Base of methods that are another method in every layer."""

    @abc.abstractmethod
    def for_layer(self, index: int, num_layers: int) -> CacheMethod:
        """The method of one layer."""

    def init(self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None) -> Any:
        return self._of(layer).init(layer, batch, capacity, calibration)

    def prefill(self, q, k, v, chunk, cache):  # type: ignore[no-untyped-def]
        return self._of(chunk.layer).prefill(q, k, v, chunk, cache)

    def decode(self, q, k, v, chunk, cache):  # type: ignore[no-untyped-def]
        return self._of(chunk.layer).decode(q, k, v, chunk, cache)

    def bits_per_element(self, layer: LayerShape) -> float:
        return self._of(layer).bits_per_element(layer)

    def _of(self, layer: LayerShape) -> CacheMethod:
        return self.for_layer(layer.index, layer.num_layers)


@dataclasses.dataclass(frozen=True)
class PerLayer(LayeredMethod):
    """`default` in every layer but those named in `overrides`: ((layer index, method), ...).

    PerLayer(VecInfer(bits=2), ((0, FullPrecision()), (1, VecInfer(bits=4)))) keeps layer 0 exact.
    """

    default: CacheMethod
    overrides: tuple[tuple[int, CacheMethod], ...] = ()

    name: ClassVar[str] = "per-layer"

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return any(m.needs_calibration for m in self._methods)

    @property
    def _methods(self) -> tuple[CacheMethod, ...]:
        return self.default, *dict(self.overrides).values()

    def for_layer(self, index: int, num_layers: int) -> CacheMethod:
        outside = [i for i, _ in self.overrides if not 0 <= i < num_layers]
        if outside:
            raise InputError(f"PerLayer overrides layer {outside[0]}, but the model has layers 0 to {num_layers - 1}")
        return dict(self.overrides).get(index, self.default).for_layer(index, num_layers)

    def calibration_key(self) -> dict[str, Any]:
        overrides = {str(i): m.calibration_key() for i, m in self.overrides}
        return {"method": self.name, "default": self.default.calibration_key(), "overrides": overrides}

    def wanted_statistics(self) -> frozenset[str]:
        return frozenset().union(*(m.wanted_statistics() for m in self._methods))

    def survey(self, statistics: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        surveys = [m.survey(statistics) for m in self._methods]
        return [{k: v for one in layer for k, v in one.items()} for layer in zip(*surveys, strict=True)]

    @property
    def calibration_text(self) -> tuple[int, int] | None:
        return joined_text(m.calibration_text for m in self._methods)

    @property
    def calibration_repeated(self) -> float:
        return max(m.calibration_repeated for m in self._methods)

    @property
    def bound_to_positions(self) -> bool:
        return any(m.bound_to_positions for m in self._methods)

    def findings(self, layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        return {name: found for m in self._methods for name, found in m.findings(layers).items()}

    @property
    def compiler_options(self) -> dict[str, Any]:
        return {name: value for m in self._methods for name, value in m.compiler_options.items()}

    def resolved(self, layers: Sequence[Mapping[str, Any]]) -> "PerLayer":
        return PerLayer(self.default.resolved(layers), tuple((i, m.resolved(layers)) for i, m in self.overrides))
