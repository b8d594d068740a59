"""From a checkpoint's tensors to the decoder's parameters, one tensor at a time.

A *source* (`hf.HfWeights`, `gguf.GgufWeights`) knows what a file holds; `load_params` checks it against the
table in `checkpoint_map`, reports everything that is wrong at once, and puts each tensor on the device in its
final type, so that the host never holds more than one tensor in float32.
"""

import hashlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from jaxtyping import Float
from tqdm import tqdm

from vecinfer_jax.errors import WeightsError
from vecinfer_jax.models.checkpoint_map import Weight, flatten, unflatten, weights_of
from vecinfer_jax.models.config import ModelConfig

Params = Any
ShardingOf = Callable[[str], jax.sharding.Sharding | None]

_SAMPLES = 512


@runtime_checkable
class WeightSource(Protocol):
    """The tensors of one checkpoint, under the names that checkpoint uses."""

    path: Path

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Shape of every tensor in the checkpoint."""

    def name_of(self, weight: Weight) -> str:
        """What this kind of checkpoint calls a weight."""

    def is_harmless(self, name: str) -> bool:
        """Whether a tensor the table does not know may be ignored."""

    def read(self, weight: Weight) -> Float[np.ndarray, "*stored"]:
        """A weight in its `stored_shape`, rows in half-split rotary order, in the type it is stored in."""


def load_params(
    source: WeightSource,
    config: ModelConfig,
    dtype: Any,
    *,
    sharding: ShardingOf | None = None,
    progress: bool = False,
) -> tuple[Params, str]:
    """-> (parameters as `param_shapes(config, dtype)` has them, digest of the weights as stored).

    `sharding` says, by path ("layers_0/attention/q_proj/kernel"), where a tensor goes. The digest does not
    depend on `dtype`, nor on whether the file holds the same values as bfloat16, float16 or float32. Raises
    `WeightsError` with every missing, unexpected or misshapen tensor by name, or the first that is not
    finite.
    """
    weights = weights_of(config)
    check_names(source, weights)
    digest = WeightDigest()
    flat = {}
    for weight in tqdm(weights, desc=f"loading {source.path.name}", unit="tensor", disable=not progress):
        stored = source.read(weight)
        digest.add(weight.path, stored, source.path)
        host = np.ascontiguousarray(weight.arrange(stored)).astype(dtype, copy=False)
        flat[weight.path] = jax.device_put(host, None if sharding is None else sharding(weight.path))
    return unflatten(flat), digest.hexdigest()


def check_names(source: WeightSource, weights: Iterable[Weight]) -> None:
    """Raises one `WeightsError` for everything by which a checkpoint differs from the table."""
    shapes = source.shapes()
    expected = {source.name_of(weight): weight for weight in weights}
    missing = [name for name in expected if name not in shapes]
    unexpected = [name for name in shapes if name not in expected and not source.is_harmless(name)]
    misshapen = [
        f"{name} is {list(shapes[name])}, not {list(weight.stored_shape)}"
        for name, weight in expected.items()
        if name in shapes and tuple(shapes[name]) != weight.stored_shape
    ]
    found = (("missing", missing), ("unexpected", unexpected), ("misshapen", misshapen))
    problems = [f"{what}: {', '.join(names)}" for what, names in found if names]
    if problems:
        raise WeightsError(
            f"{source.path} does not hold the weights that its configuration describes; " + "; ".join(problems)
        )


class WeightDigest:
    """SHA-256 over weights, cheap and exact: for each, its name, shape, samples, and the sum of all its bits.

    Values are digested as float32, so a checkpoint and its copy in a wider type agree. Adding the bit
    patterns as integers does not depend on the order or the machine, and notices any single weight that
    differs.
    """

    def __init__(self) -> None:
        self._hash = hashlib.sha256()

    def add(self, name: str, values: Float[np.ndarray, "*stored"], path: Path) -> None:
        """Raises `WeightsError` where a value is not finite; `path` is the file to name then."""
        flat = np.ascontiguousarray(values, np.float32).reshape(-1)
        if not np.isfinite(flat).all():
            raise WeightsError(f"{path}: weight {name} holds values that are not finite; fetch the file again")
        bits = flat.view(np.uint32)
        total = int(bits.sum(dtype=np.uint64))
        samples = bits[:: max(1, -(-bits.size // _SAMPLES))]
        self._hash.update(f"{name} {list(values.shape)} {total} ".encode())
        self._hash.update(samples.astype("<u4").tobytes())

    def hexdigest(self) -> str:
        return self._hash.hexdigest()


def digest_of(params: Params, config: ModelConfig, path: Path) -> str:
    """The digest that `load_params` gives for a checkpoint that holds these values."""
    digest = WeightDigest()
    flat = flatten(params)
    for weight in weights_of(config):
        digest.add(weight.path, weight.store(np.asarray(flat[weight.path], np.float32)), path)
    return digest.hexdigest()
