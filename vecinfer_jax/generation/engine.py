"""The two compiled programs of generation: one prefill, one decode loop.

Prompt lengths are rounded up to buckets and everything else that varies (lengths, sampling, stop tokens, how many
steps to run) is data, so within a bucket nothing recompiles. Caches are donated from call to call.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import NamedSharding
from jaxtyping import Array, Bool, Float32, Int, UInt32

from vecinfer_jax.caches.base import CacheMethod, ReadMode, allocated_bytes
from vecinfer_jax.errors import CapacityError, InputError
from vecinfer_jax.generation.sampling import SamplingSettings, sample
from vecinfer_jax.models.decoder import Decoder
from vecinfer_jax.models.network import Network
from vecinfer_jax.parallel.mesh import Layout
from vecinfer_jax.parallel.network import SplitNetwork

CAPACITY_STEP = 128
SMALLEST_BUCKET = 32
# The environment variable that says how many GiB of the host's memory XLA may pin for a GPU (default 64).
HOST_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"


@struct.dataclass
class DecodeState:
    """What goes round the decode loop.

    caches:     one pytree a layer.
    token:      int32[B], the token to be fed next; position: int32[B], where it goes.
    step:       int32, tokens chosen so far; row `step` of `tokens` is written next.
    done:       bool[B], sequences that have produced a stop token (or were never wanted).
    tokens:     int32[B, N], logprobs: float32[B, N]; -1 and 0 beyond a sequence's end.
    keys:       one random key a sequence.
    """

    caches: Any
    token: Int[Array, "B"]
    position: Int[Array, "B"]
    step: Int[Array, ""]
    done: Bool[Array, "B"]
    tokens: Int[Array, "B N"]
    logprobs: Float32[Array, "B N"]
    keys: jax.Array


def bucket(length: int) -> int:
    """The padded length of a prompt: powers of two and one and a half times them."""
    size = SMALLEST_BUCKET
    while size < length:
        if size * 3 // 2 >= length:
            return size * 3 // 2
        size *= 2
    return size


def round_up(value: int, step: int) -> int:
    return -(-value // step) * step


def check_capacity(longest_prompt: int, new_tokens: int, capacity: int | None, max_position: int) -> int:
    """The capacity to allocate; raises `CapacityError` where the tokens cannot fit."""
    if not isinstance(new_tokens, int) or new_tokens < 1:
        raise InputError(f"max_new_tokens={new_tokens} must be a whole number, 1 or more")
    needed = longest_prompt + new_tokens
    if needed > max_position:
        raise CapacityError(
            f"a prompt of {longest_prompt} tokens and {new_tokens} new ones exceed the model's context of "
            f"{max_position}: shorten the prompt or lower max_new_tokens"
        )
    if capacity is None:
        return round_up(bucket(longest_prompt) + new_tokens, CAPACITY_STEP)
    if needed > capacity:
        raise CapacityError(
            f"a prompt of {longest_prompt} tokens and {new_tokens} new ones need a capacity of {needed}, "
            f"got {capacity}: raise capacity or shorten the prompt"
        )
    return capacity


class Engine:
    """Compiled programs of one model and method, kept by shape. Compilation is timed apart from running.

    peak_bytes: the most that any program run so far holds at once by the compiler's account (weights, caches and
    temporaries); set it to 0 to begin anew.
    """

    def __init__(self, decoder: Decoder, layout: Layout | None = None) -> None:
        """With a layout, over its mesh; the decoder's axes are then the layout's."""
        self.decoder = decoder
        self.network = Network(decoder) if layout is None else SplitNetwork(decoder, layout)
        self._programs: dict[Any, tuple[Any, int]] = {}
        self.compile_seconds = 0.0
        self.peak_bytes = 0

    @property
    def method(self) -> CacheMethod:
        return self.decoder.method

    def init_caches(self, calibration: Any, batch: int, capacity: int) -> Any:
        """Empty caches of every layer."""
        calibration = jax.tree.map(np.asarray, calibration)
        init, placed = self.network.init_caches(calibration, batch, capacity)
        try:
            return self._call(("init", batch, capacity), init, (), calibration, placed=placed)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) and "allocate" not in str(error):
                raise
            held = allocated_bytes(jax.eval_shape(init, calibration))
            host = f" or the host's pinned memory ({held['host'] / 2**30:,.1f} GiB)" if held["host"] else ""
            raise CapacityError(
                f"a cache of {batch} x {capacity} tokens does not fit the device's memory{host}: lower the batch or "
                "capacity" + (f", or raise {HOST_LIMIT}" if host else "")
            ) from None

    def prefill(
        self,
        params: Any,
        caches: Any,
        tokens: np.ndarray,
        lengths: Int[np.ndarray, "B"],
        chunk: int | None = None,
        read: ReadMode = "exact",
    ) -> tuple[Float32[Array, "B V"], Any]:
        """Runs padded prompts [B, T] into empty caches -> logits of each row's last token, and the caches.

        `chunk` bounds how many tokens of a row are run at a time; later chunks read what earlier ones left in the
        cache. With read="coded" all of the prompt is read as decoding would read it.
        """
        total = tokens.shape[1]
        size = min(chunk or total, total)
        logits = None
        for start in range(0, total, size):
            piece = tokens[:, start : start + size]
            here = np.clip(lengths - start, 0, piece.shape[1]).astype(np.int32)
            run = functools.partial(_prefill, self.network, start == 0, read)
            name = ("prefill", start == 0, read)
            new, caches = self._call(name, run, (1,), params, caches, piece, np.int32(start), here)
            ends_here = (lengths > start) & (lengths <= start + piece.shape[1])
            logits = new if logits is None else self._call("choose", jnp.where, (), ends_here[:, None], new, logits)
        assert logits is not None
        return logits, caches

    def start(
        self,
        logits: Float32[Array, "B V"],
        caches: Any,
        lengths: Int[np.ndarray, "B"],
        keys: jax.Array,
        wanted: Bool[np.ndarray, "B"],
        max_new_tokens: int,
        settings: SamplingSettings,
        stops: Int[np.ndarray, "n"] | Array,
    ) -> DecodeState:
        """Chooses the first token after the prompts."""
        run = functools.partial(_start, self.network, max_new_tokens)
        return self._call(
            ("start", max_new_tokens),
            run,
            (1,),
            logits,
            caches,
            lengths.astype(np.int32),
            keys,
            wanted,
            settings,
            stops,
        )

    def decode(
        self,
        params: Any,
        state: DecodeState,
        until: int,
        settings: SamplingSettings,
        stops: Int[np.ndarray, "n"] | Array,
    ) -> DecodeState:
        """Runs until `until` tokens are chosen or every sequence is done."""
        run = functools.partial(_decode_loop, self.network)
        return self._call("decode", run, (1,), params, state, np.int32(until), settings, stops)

    def settle(self, state: DecodeState) -> DecodeState:
        """A state made by hand, where one that came out of a call is, so that the next compiles nothing new."""
        if self.network.whole(0) is None:  # on one device its arrays are where they belong
            return state
        return self._call("settle", self.network.settled, (0,), state)

    def keys(self, seed: int, places: UInt32[np.ndarray, "B"]) -> jax.Array:
        """A random key for each place."""
        return self._call("keys", _keys, (), np.uint32(seed), places, placed=self.network.whole(0))

    def stop(self, state: DecodeState, rows: Bool[np.ndarray, "B"]) -> DecodeState:
        """The state with these rows done."""
        return dataclasses.replace(state, done=self._call("stop", jnp.logical_or, (), state.done, rows))

    def fetch(self, arrays: Any) -> Any:
        """The arrays on the host, whole, whichever devices and processes hold parts of them."""
        whole = self.network.whole(arrays)
        return jax.tree.map(
            np.asarray, arrays if whole is None else self._call("fetch", _same, (), arrays, placed=whole)
        )

    def _call(
        self, name: Any, function: Callable[..., Any], donate: tuple[int, ...], *args: Any, placed: Any = None
    ) -> Any:
        leaves, tree = jax.tree.flatten(args)
        signature = (name, tree, tuple((np.shape(x), jnp.result_type(x), _placement(x)) for x in leaves))
        if signature not in self._programs:
            begin = time.perf_counter()
            lowered = jax.jit(function, donate_argnums=donate, out_shardings=placed).lower(*args)
            options = self.method.compiler_options if jax.default_backend() == "gpu" else {}
            program = lowered.compile(compiler_options=dict(options))
            self.compile_seconds += time.perf_counter() - begin
            self._programs[signature] = program, _bytes_of(program)
        program, held = self._programs[signature]
        self.peak_bytes = max(self.peak_bytes, held)
        return program(*args)


def _bytes_of(program: Any) -> int:
    """Bytes that a compiled program holds while it runs; 0 where the backend does not say."""
    use = program.memory_analysis()
    if use is None:
        return 0
    given = use.argument_size_in_bytes + use.output_size_in_bytes - use.alias_size_in_bytes
    return int(given + use.temp_size_in_bytes)


def _placement(x: Any) -> Any:
    """Where an array was put on purpose: a program is compiled for the placement of its inputs."""
    if not isinstance(x, jax.Array):
        return None
    if not x.committed or x.sharding.device_set == {jax.devices()[0]}:  # results are committed where one argument is
        return x.sharding.memory_kind
    if not isinstance(x.sharding, NamedSharding):
        return x.sharding
    # The same placement may be written with and without axes that split nothing.
    if any(isinstance(axis, tuple) for axis in x.sharding.spec):
        return x.sharding
    split = [axis if axis is not None and x.sharding.mesh.shape[axis] > 1 else None for axis in x.sharding.spec]
    while split and split[-1] is None:
        split.pop()
    return x.sharding.mesh, tuple(split), x.sharding.memory_kind


@functools.lru_cache(maxsize=8)
def engine_for(decoder: Decoder, layout: Layout | None = None) -> Engine:
    """Engines are kept, so that a second call with the same model, method and layout compiles nothing."""
    return Engine(decoder, layout)


def _keys(seed: Any, places: Any) -> jax.Array:
    return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), places)


def _same(x: Any) -> Any:
    return x


def _prefill(
    network: Network, first: bool, read: ReadMode, params: Any, caches: Any, tokens: Any, start: Any, lengths: Any
) -> Any:
    return network.prefill(params, tokens, start, caches, lengths, first, read)


def _choose(logits: Any, state_keys: Any, step: Any, settings: SamplingSettings, stops: Any) -> tuple[Any, Any, Any]:
    keys = jax.vmap(jax.random.fold_in, in_axes=(0, None))(state_keys, step)
    token, logprob = sample(logits, keys, settings)
    return token, logprob, jnp.any(token[:, None] == stops[None, :], axis=-1)


def _start(
    network: Network,
    max_new_tokens: int,
    logits: Any,
    caches: Any,
    lengths: Any,
    keys: Any,
    wanted: Any,
    settings: Any,
    stops: Any,
) -> DecodeState:
    token, logprob, stopped = _choose(logits, keys, 0, settings, stops)
    batch = token.shape[0]
    state = DecodeState(
        caches=caches,
        token=token,
        position=lengths,
        step=jnp.int32(1),
        done=stopped | ~wanted,
        tokens=jnp.full((batch, max_new_tokens), -1, jnp.int32).at[:, 0].set(jnp.where(wanted, token, -1)),
        logprobs=jnp.zeros((batch, max_new_tokens), jnp.float32).at[:, 0].set(jnp.where(wanted, logprob, 0.0)),
        keys=keys,
    )
    return network.settled(state)


def _decode_loop(
    network: Network, params: Any, state: DecodeState, until: Any, settings: SamplingSettings, stops: Any
) -> DecodeState:
    def running(state: DecodeState) -> Any:
        return (state.step < until) & ~jnp.all(state.done)

    def body(state: DecodeState) -> DecodeState:
        logits, caches = network.step(params, state.token, state.position, state.caches)
        token, logprob, stopped = _choose(logits, state.keys, state.step, settings, stops)
        # A finished sequence goes on feeding its last token at its last position: it stays within capacity.
        token = jnp.where(state.done, state.token, token)
        write = functools.partial(jax.lax.dynamic_update_slice_in_dim, start_index=state.step, axis=1)
        return DecodeState(
            caches=caches,
            token=token,
            position=jnp.where(state.done, state.position, state.position + 1),
            step=state.step + 1,
            done=state.done | stopped,
            tokens=write(state.tokens, jnp.where(state.done, -1, token)[:, None]),
            logprobs=write(state.logprobs, jnp.where(state.done, 0.0, logprob)[:, None]),
            keys=state.keys,
        )

    return network.settled(jax.lax.while_loop(running, body, network.settled(state)))
