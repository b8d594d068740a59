"""Different methods in different layers."""

import dataclasses
from typing import Any, ClassVar

from vecinfer_jax.caches.base import CacheMethod, LayerCalibration, LayerShape
from vecinfer_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class PerLayer(CacheMethod):
    """`default` in every layer but those named in `overrides`: ((layer index, method), ...).

    PerLayer(VecInfer(bits=2), ((0, FullPrecision()), (1, VecInfer(bits=4)))) keeps layer 0 exact.
    """

    default: CacheMethod
    overrides: tuple[tuple[int, CacheMethod], ...] = ()

    name: ClassVar[str] = "per-layer"

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return any(m.needs_calibration for m in (self.default, *dict(self.overrides).values()))

    def for_layer(self, index: int, num_layers: int) -> CacheMethod:
        outside = [i for i, _ in self.overrides if not 0 <= i < num_layers]
        if outside:
            raise InputError(f"PerLayer overrides layer {outside[0]}, but the model has layers 0 to {num_layers - 1}")
        return dict(self.overrides).get(index, self.default).for_layer(index, num_layers)

    def calibration_key(self) -> dict[str, Any]:
        overrides = {str(i): m.calibration_key() for i, m in self.overrides}
        return {"method": self.name, "default": self.default.calibration_key(), "overrides": overrides}

    def wanted_statistics(self) -> frozenset[str]:
        return frozenset().union(*(m.wanted_statistics() for m in (self.default, *dict(self.overrides).values())))

    def init(self, layer: LayerShape, batch: int, capacity: int, calibration: LayerCalibration = None) -> Any:
        return self.for_layer(layer.index, layer.num_layers).init(layer, batch, capacity, calibration)

    def prefill(self, q, k, v, chunk, cache):  # type: ignore[no-untyped-def]
        return self.for_layer(chunk.layer.index, chunk.layer.num_layers).prefill(q, k, v, chunk, cache)

    def decode(self, q, k, v, chunk, cache):  # type: ignore[no-untyped-def]
        return self.for_layer(chunk.layer.index, chunk.layer.num_layers).decode(q, k, v, chunk, cache)

    def bits_per_element(self, layer: LayerShape) -> float:
        return self.for_layer(layer.index, layer.num_layers).bits_per_element(layer)
