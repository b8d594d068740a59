"""A decoder as generation calls it: empty caches, a chunk of prompts, a step."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float32, Int

from vecinfer_jax.caches.base import ReadMode
from vecinfer_jax.models.decoder import Decoder


class Network:
    """A decoder on one device. `vecinfer_jax.parallel.SplitNetwork` is one over several.

    All but `init_caches` are called under `jit`.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder

    def init(self, batch: int, capacity: int, calibration: Any) -> Any:
        """Empty caches of every layer."""
        decoder, n = self.decoder, self.decoder.config.num_layers
        return tuple(
            decoder.method.for_layer(i, n).init(decoder.layer_shape(i), batch, capacity, calibration[i] or None)
            for i in range(n)
        )

    def init_caches(self, calibration: Any, batch: int, capacity: int) -> tuple[Callable[..., Any], Any]:
        """What to compile to get empty caches from a calibration, and where they go (None: anywhere)."""

        def init(calibration: Any) -> Any:
            return self.init(batch, capacity, calibration)

        return init, None

    def prefill(
        self,
        params: Any,
        tokens: Int[Array, "B T"],
        start: Int[Array, ""],
        caches: Any,
        lengths: Int[Array, "B"],
        first: bool,
        read: ReadMode,
    ) -> tuple[Float32[Array, "B V"], Any]:
        """A chunk of prompts from position `start` on, of which `lengths` tokens count -> logits of each row's last,
        and the caches. A row whose prompt ended earlier has length 0, and logits without meaning."""
        positions = start + jnp.broadcast_to(jnp.arange(tokens.shape[1], dtype=jnp.int32), tokens.shape)
        return self.decoder.apply(
            {"params": params}, tokens, positions, caches, lengths=lengths, first=first, read=read, logits="last"
        )

    def step(
        self, params: Any, token: Int[Array, "B"], position: Int[Array, "B"], caches: Any
    ) -> tuple[Float32[Array, "B V"], Any]:
        """One token a row -> logits, and the caches."""
        logits, caches = self.decoder.apply({"params": params}, token[:, None], position[:, None], caches, decode=True)
        return logits[:, 0], caches

    def settled(self, state: Any) -> Any:
        """The decode loop's state where it is to stay from call to call."""
        return state

    def whole(self, arrays: Any) -> Any:
        """Where to put arrays so that every process has all of them; None where it has."""
        del arrays
        return None
