"""Choosing the next token."""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float, Float32, Int

from vecinfer_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the default is greedy.

    temperature: 0 is greedy. top_k: keep the k likeliest (0: all). top_p: then the smallest set of at least this
    probability. min_p: then those at least this fraction as likely as the likeliest.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise InputError(f"temperature={self.temperature} must be a number, 0 (greedy) or more")
        if not 0 <= self.top_k < 2**31:
            raise InputError(f"top_k={self.top_k} must be 0 (no limit) or more, below 2**31")
        if not 0 < self.top_p <= 1:
            raise InputError(f"top_p={self.top_p} must be above 0 and at most 1")
        if not 0 <= self.min_p <= 1:
            raise InputError(f"min_p={self.min_p} must be from 0 to 1")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def filters(self) -> bool:
        """Whether any token can be ruled out (which needs the vocabulary sorted)."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    def settings(self) -> "SamplingSettings":
        """The numbers as arrays, so that a new value does not recompile anything."""
        return SamplingSettings(
            jnp.float32(self.temperature),
            jnp.int32(self.top_k),
            jnp.float32(self.top_p),
            jnp.float32(self.min_p),
            greedy=self.greedy,
            filters=self.filters,
        )


@struct.dataclass
class SamplingSettings:
    """`Sampling` as a pytree; only whether it is greedy and whether it filters are static."""

    temperature: Float[Array, ""]
    top_k: Int[Array, ""]
    top_p: Float[Array, ""]
    min_p: Float[Array, ""]
    greedy: bool = struct.field(pytree_node=False)
    filters: bool = struct.field(pytree_node=False)


def sample(
    logits: Float32[Array, "B V"], keys: jax.Array, settings: SamplingSettings
) -> tuple[Int[Array, "B"], Float32[Array, "B"]]:
    """One token a sequence and its log-probability under the model (before temperature and filters).

    `keys` holds one random key a sequence, so that a sequence's tokens do not depend on the batch it is in.
    """
    logprobs = jax.nn.log_softmax(logits, axis=-1)
    if settings.greedy:
        tokens = jnp.argmax(logits, axis=-1)
    else:
        scaled = logprobs / jnp.maximum(settings.temperature, 1e-6)
        if settings.filters:
            tokens = jax.vmap(_draw_filtered, in_axes=(0, 0, None))(keys, scaled, settings)
        else:
            tokens = jax.vmap(jax.random.categorical)(keys, scaled)
    tokens = tokens.astype(jnp.int32)
    return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]


def _draw_filtered(key: jax.Array, scaled: Float32[Array, "V"], s: SamplingSettings) -> Int[Array, ""]:
    order = jnp.argsort(-scaled)  # stable: equal logits keep the order of their ids
    ranked = scaled[order]
    rank = jnp.arange(ranked.shape[0])
    ranked = jnp.where((s.top_k == 0) | (rank < s.top_k), ranked, -jnp.inf)
    probability = jax.nn.softmax(ranked)
    before = jnp.cumsum(probability) - probability
    ranked = jnp.where((rank == 0) | (before < s.top_p), ranked, -jnp.inf)
    ranked = jnp.where((rank == 0) | (probability >= s.min_p * probability[0]), ranked, -jnp.inf)
    return order[jax.random.categorical(key, ranked)]
