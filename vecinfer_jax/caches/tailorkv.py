"""TailorKV (arXiv 2505.19586): layers that look everywhere are quantised to 1 or 2 bits, the others move to the host.

Which is which a calibration says (section 3.1, `vecinfer_jax.calibration.roles`). Quantised layers are `KIVI`'s
integers (section 3.2), or any other method's codes; the others are `SparseLayer`s (section 3.3).
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from vecinfer_jax.caches.base import CacheMethod, joined_text
from vecinfer_jax.caches.host_tier import CodedSparseLayer, SparseLayer
from vecinfer_jax.caches.kivi import KIVI
from vecinfer_jax.caches.per_layer import LayeredMethod
from vecinfer_jax.calibration.roles import dense_preference
from vecinfer_jax.errors import CalibrationError, InputError

ROLES = ("quantised", "sparse")
HOSTS = ("exact", "vecinfer-4")
# Long prompts: which tokens are attended to most is asked of their last queries.
CALIBRATION_TEXT = (8, 4096)


@dataclasses.dataclass(frozen=True)
class TailorKV(LayeredMethod):
    """Quantised layers and host-offloaded layers with top-k retrieval.

    bits, group, residual: of the quantised layers, as `KIVI` has them (paper: 1 or 2, 64, 128).
    quantised:  what to quantise them with instead, such as VecInfer(bits=2).
    tokens:     that a query of a sparse layer reads from the host, for each KV head (paper: 128 or 896).
    sink, recent: first and recent tokens that sparse layers hold on the device (paper: 8 and 56, or 64 and 64).
    channels:   of the keys, by which those tokens are chosen (paper: 8 or 12).
    block:      tokens that move to the host at one time, so that recent to recent + block - 1 are held.
    roles:      "quantised" or "sparse" for every layer; an entry may stand for several, "sparse*31". None: by
        calibration, quantised where the dense preference exceeds `threshold` (paper: 0.2).
    top:        share of the tokens that counts as few in the dense preference (paper: 0.05).
    host:       what lies on the host: "exact" keys and values, or ours, "vecinfer-4": VecInfer's 4-bit codes, a quarter
        of 16 bits to hold and to fetch; `channels` then counts pairs of channels.
    basis:      whose channels those are: the model's own, "channels" (paper), or ours, "principal" (`SparseLayer`).
    heads:      how query heads that share a KV head choose: by their mean, "mean" (paper), or ours, "each"
        (`SparseLayer`).
    implementation: of the operations on the host's memory; interpret: run Pallas kernels in interpret mode (tests).

    The defaults are the paper's for LongBench; `TailorKV.long_context()` has those for InfiniteBench and RULER.
    """

    bits: int = 1
    group: int = 64
    residual: int = 128
    tokens: int = 128
    sink: int = 8
    recent: int = 56
    channels: int = 8
    block: int = 64
    roles: tuple[str, ...] | None = None
    threshold: float = 0.2
    top: float = 0.05
    quantised: CacheMethod | None = None
    host: str = "exact"
    basis: str = dataclasses.field(default="channels", metadata={"later": True})
    heads: str = dataclasses.field(default="mean", metadata={"later": True})
    implementation: str | None = None
    interpret: bool = False

    name: ClassVar[str] = "tailorkv"

    def __post_init__(self) -> None:
        if self.quantised is not None and (
            not isinstance(self.quantised, CacheMethod) or isinstance(self.quantised, LayeredMethod)
        ):
            raise InputError(f"quantised={self.quantised!r} must be one method for a layer, such as VecInfer(bits=2)")
        if self.quantised is not None and self.quantised.refines_model:
            raise InputError(
                "quantised: refine='kl' runs through the whole model, whose other layers lie on the host: use "
                "refine='attention'"
            )
        if isinstance(self.recent, bool) or not isinstance(self.recent, int) or self.recent < 1:
            raise InputError(f"recent={self.recent!r} must be a whole number of tokens, 1 or more")
        if self.host not in HOSTS:
            raise InputError(f"host={self.host!r} is unknown; choose from {', '.join(HOSTS)}")
        for name, least in (("threshold", 0.0), ("top", 0.0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= 1:
                raise InputError(f"{name}={value!r} must be a number from 0 to 1")
        if self.roles is not None:
            object.__setattr__(self, "roles", _spelt_out(self.roles))
        _ = self.quantised_layer, self.sparse_layer  # their settings are checked there

    @classmethod
    def long_context(cls, **settings: Any) -> "TailorKV":
        """The paper's for InfiniteBench and RULER: 128 tokens on the device, 896 from the host by 12 channels."""
        return cls(**{"tokens": 896, "sink": 64, "recent": 64, "channels": 12} | settings)

    @property
    def quantised_layer(self) -> CacheMethod:
        """The method of layers that look everywhere."""
        return self.quantised or KIVI(bits=self.bits, group=self.group, residual=self.residual)

    @property
    def sparse_layer(self) -> CacheMethod:
        """The method of layers that look at few tokens."""
        kind = SparseLayer if self.host == "exact" else CodedSparseLayer
        return kind(
            tokens=self.tokens,
            channels=self.channels,
            block=self.block,
            residual=self.recent,
            sink=self.sink,
            basis=self.basis,
            heads=self.heads,
            implementation=self.implementation,
            interpret=self.interpret,
        )

    def for_layer(self, index: int, num_layers: int) -> CacheMethod:
        if self.roles is None:
            raise InputError(
                "TailorKV's layers have no roles yet: calibrate, or give them, such as roles=quantised+sparse*31"
            )
        if len(self.roles) != num_layers:
            raise InputError(f"roles are of {len(self.roles)} layers, but the model has {num_layers}")
        layer = self.quantised_layer if self.roles[index] == "quantised" else self.sparse_layer
        return layer.for_layer(index, num_layers)

    @property
    def compiler_options(self) -> Mapping[str, Any]:
        return self.sparse_layer.compiler_options

    # -- calibration (section 3.1)

    @property
    def needs_calibration(self) -> bool:  # type: ignore[override]
        return self.roles is None or any(m.needs_calibration for m in self._used)

    @property
    def _used(self) -> list[CacheMethod]:
        """The methods that layers have, or may come to have."""
        methods = {"quantised": self.quantised_layer, "sparse": self.sparse_layer}
        return [methods[role] for role in ROLES if self.roles is None or role in self.roles]

    @property
    def calibration_text(self) -> tuple[int, int] | None:
        own = CALIBRATION_TEXT if self.roles is None else None
        return joined_text([own, *(m.calibration_text for m in self._used if m.needs_calibration)])

    @property
    def bound_to_positions(self) -> bool:
        return any(m.bound_to_positions for m in self._used)

    def calibration_key(self) -> dict[str, Any]:
        key: dict[str, Any] = {"method": self.name}
        key |= {"top": self.top} if self.roles is None else {"roles": list(self.roles)}
        fitted = [m.calibration_key() for m in self._used if m.needs_calibration]
        if fitted and self.roles is None:  # codebooks are of those layers only that the threshold gives the role
            key["threshold"] = self.threshold
        return key | ({"layers": fitted} if fitted else {})

    def wanted_statistics(self) -> frozenset[str]:
        shares = frozenset({"shares"} if self.roles is None else ())
        return shares.union(*(m.wanted_statistics() for m in self._used))

    def survey(self, statistics: Sequence[Any]) -> list[dict[str, np.ndarray]]:
        if self.roles is not None:
            return [{} for _ in statistics]
        found = [dense_preference(s.attention_shares, s.share_queries, self.top) for s in statistics]
        return [{"dense_preference": np.asarray(score, np.float32)} for score in found]

    def resolved(self, layers: Sequence[Mapping[str, Any]]) -> "TailorKV":
        if self.roles is not None:
            return self
        if any("dense_preference" not in layer for layer in layers):
            raise CalibrationError("this calibration has no dense preference of every layer: calibrate again")
        dense = [float(layer["dense_preference"]) > self.threshold for layer in layers]
        return dataclasses.replace(self, roles=tuple("quantised" if d else "sparse" for d in dense))

    def findings(self, layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Any]]:
        if self.roles is not None:
            return {}
        scores = [round(float(layer["dense_preference"]), 4) for layer in layers]
        return {"dense_preference": scores, "role": list(self.resolved(layers).roles or ())}


def _spelt_out(roles: Sequence[str]) -> tuple[str, ...]:
    """One entry a layer. Raises `InputError` for what is no role."""
    layers: list[str] = []
    if isinstance(roles, str) or not roles:
        raise InputError(
            f"roles={roles!r} must be a tuple with an entry a layer, or such as ('quantised', 'sparse*31')"
        )
    for entry in roles:
        match = re.fullmatch(rf"({'|'.join(ROLES)})(?:\*(\d+))?", entry) if isinstance(entry, str) else None
        if match is None or match[2] == "0":
            raise InputError(f"roles: {entry!r} is no role; choose from {', '.join(ROLES)}, or such as sparse*31")
        layers += [match[1]] * int(match[2] or 1)
    return tuple(layers)
