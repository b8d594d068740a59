"""Perplexity of a compressed cache, with KL divergence and top-1 agreement against full precision.

Each window is scored by itself, teacher-forced. With prefill="coded" (the strict figure) the query at position t
reads exactly what decoding at t would read: the sinks and the last `residual` tokens exactly, everything else from
the codes in the cache. With prefill="exact" prompt attention is exact and nothing is read from codes, so the two
differ only by what the cache costs.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int
from tqdm import tqdm

from vecinfer_jax.caches.base import CacheMethod, ReadMode
from vecinfer_jax.caches.full_precision import FullPrecision
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.calibration.store import resolve_calibration
from vecinfer_jax.errors import CapacityError, InputError
from vecinfer_jax.generation.engine import Engine
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.decoder import Decoder, layer_shape
from vecinfer_jax.models.folding import fold_values

# Rows of the [tokens, vocabulary] logits that exist at one time.
LOGIT_ROWS = 256


@dataclasses.dataclass(frozen=True)
class PerplexityResult:
    """What was measured.

    perplexity:        exp(mean negative log-likelihood of the next token), method's cache.
    full_perplexity:   the same with the full-precision cache.
    kl:                mean KL(full || method) per predicted token, nats.
    top1_agreement:    fraction of predictions whose likeliest token is the same.
    bits_per_element:  true bits of a cached element outside window and sinks.
    windows, length, predictions: how much was scored.
    """

    perplexity: float
    full_perplexity: float
    kl: float
    top1_agreement: float
    bits_per_element: float
    windows: int
    length: int
    predictions: int
    prefill: str


def perplexity(
    lm: LanguageModel,
    method: CacheMethod | None = None,
    calibration: Calibration | None = None,
    text: str = "",
    *,
    length: int = 1024,
    windows: int | None = None,
    prefill: str = "coded",
    progress: bool = True,
) -> PerplexityResult:
    """Scores the first `windows` non-overlapping windows of `length` tokens of a text (all whole ones by default).

    Raises:
        InputError: the text is shorter than one window. CapacityError: length exceeds the model's context.
    """
    method = method or FullPrecision()
    if prefill not in ("coded", "exact"):
        raise InputError(f"prefill={prefill!r} is unknown; choose coded or exact")
    if length < 2:
        raise InputError(f"length={length} must be 2 or more")
    if length > lm.config.max_position:
        raise CapacityError(f"length={length} exceeds the model's context of {lm.config.max_position}")
    if lm.tokenizer is None:
        raise InputError(f"model {lm.name!r} has no tokenizer to read the text with")
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    available = len(ids) // length
    if available < 1:
        raise InputError(f"the text has {len(ids)} tokens, fewer than one window of {length}: give more text")
    if windows is not None and not 1 <= windows <= available:
        raise InputError(f"windows={windows}: the text has {available} windows of {length} tokens")
    count = windows or available
    calibration = resolve_calibration(lm, method, calibration, progress=progress)
    params = fold_values(lm, method, calibration)

    totals = np.zeros(4, np.float64)
    for index in tqdm(range(count), "windows", disable=not progress, unit="window"):
        tokens = jnp.asarray(ids[index * length : (index + 1) * length], jnp.int32)[None]
        reference = _hidden(Decoder(lm.config, FullPrecision(), lm.dtype), lm.params, tokens, None, "exact")
        if isinstance(method, FullPrecision):
            hidden = reference
        else:
            hidden = _hidden(
                Decoder(lm.config, method, lm.dtype),
                params,
                tokens,
                calibration.layers,
                "coded" if prefill == "coded" else "exact",
            )
        decoder = Decoder(lm.config, method, lm.dtype)
        totals += np.asarray(_compare(decoder, lm.params, hidden, reference, tokens, 1))
    predictions = count * (length - 1)
    nll, full_nll, kl, agree = totals / predictions
    return PerplexityResult(
        perplexity=math.exp(nll),
        full_perplexity=math.exp(full_nll),
        kl=float(kl),
        top1_agreement=float(agree),
        bits_per_element=bits_per_element(lm, method),
        windows=count,
        length=length,
        predictions=predictions,
        prefill=prefill,
    )


def bits_per_element(lm: LanguageModel, method: CacheMethod) -> float:
    """True bits of a cached element, averaged over layers."""
    n = lm.config.num_layers
    bits = [method.for_layer(i, n).bits_per_element(layer_shape(lm.config, i, lm.dtype)) for i in range(n)]
    return sum(bits) / n


@functools.partial(jax.jit, static_argnames=("decoder", "read"))
def _hidden(
    decoder: Decoder, params: Any, tokens: Int[Array, "1 T"], calibration: Any, read: ReadMode
) -> Float[Array, "1 T hidden"]:
    n = decoder.config.num_layers
    caches = tuple(
        decoder.method.for_layer(i, n).init(
            decoder.layer_shape(i), 1, tokens.shape[1], calibration[i] if calibration is not None else None
        )
        for i in range(n)
    )
    positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return decoder.apply({"params": params}, tokens, positions, caches, read=read, logits="hidden")[0]


@functools.partial(jax.jit, static_argnames="decoder")
def _compare(
    decoder: Decoder,
    params: Any,
    hidden: jax.Array,
    reference: jax.Array,
    tokens: Int[Array, "1 T"],
    start: Int[Array, ""] | int,
) -> Float32[Array, "4"]:
    """Sums over the predictions of tokens[start:] of nll, reference nll, KL(reference || ours), agreement.

    Logits exist a block of rows at a time.
    """
    predictions = tokens.shape[1] - 1
    padding = -predictions % LOGIT_ROWS

    def rows(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, LOGIT_ROWS, *x.shape[1:])

    def block(args: tuple[jax.Array, ...]) -> jax.Array:
        ours, full, target, counts = args
        p, r = _logprobs(decoder, params, ours), _logprobs(decoder, params, full)
        at = target[:, None]
        measures = jnp.stack(
            [
                -jnp.take_along_axis(p, at, 1)[:, 0],
                -jnp.take_along_axis(r, at, 1)[:, 0],
                jnp.sum(jnp.exp(r) * (r - p), axis=-1),
                (jnp.argmax(p, -1) == jnp.argmax(r, -1)).astype(jnp.float32),
            ]
        )
        return jnp.sum(jnp.where(counts, measures, 0.0), axis=1)

    counts = rows(jnp.arange(1, predictions + 1) >= start)
    blocks = (rows(hidden[0, :-1]), rows(reference[0, :-1]), rows(tokens[0, 1:]), counts)
    return jnp.sum(jax.lax.map(block, blocks), axis=0)


def _logprobs(decoder: Decoder, params: Any, hidden: Float[Array, "T hidden"]) -> Float32[Array, "T V"]:
    logits: Any = decoder.apply({"params": params}, hidden, method="unembed")
    return jax.nn.log_softmax(logits)


def agreement(
    lm: LanguageModel, method: CacheMethod, calibration: Calibration, tokens: list[int], start: int
) -> tuple[float, float]:
    """(mean KL(full || method) in nats, top-1 agreement) over the predictions of tokens[start:], read from codes."""
    ids = jnp.asarray(tokens, jnp.int32)[None]
    reference = _hidden(Decoder(lm.config, FullPrecision(), lm.dtype), lm.params, ids, None, "exact")
    decoder = Decoder(lm.config, method, lm.dtype)
    ours = _hidden(decoder, fold_values(lm, method, calibration), ids, calibration.layers, "coded")
    _, _, kl, agree = np.asarray(_compare(decoder, lm.params, ours, reference, ids, start), np.float64)
    return float(kl / (len(tokens) - start)), float(agree / (len(tokens) - start))


def rescoring_kl(
    lm: LanguageModel, method: CacheMethod, calibration: Calibration, tokens: list[int], start: int
) -> float:
    """How far decoding token by token is from scoring the same tokens at once, both read from codes.

    The first `start` tokens are a prompt (prefill="coded" in scoring; here they are decoded one by one too), and
    the figure is the mean KL(decoded || scored) over the predictions of tokens[start:], nats. Not zero, because a
    rounding difference may flip a code.
    """
    decoder = Decoder(lm.config, method, lm.dtype)
    params = fold_values(lm, method, calibration)
    ids = jnp.asarray(tokens, jnp.int32)[None]
    hidden = _hidden(decoder, params, ids, calibration.layers, "coded")
    scored = _logprobs(decoder, params, hidden[0])
    engine = Engine(decoder)
    caches = engine.init_caches(calibration.layers, 1, len(tokens))
    total = 0.0
    for position in range(len(tokens) - 1):
        token, at = ids[:, position], jnp.full((1,), position, jnp.int32)
        logits, caches = engine.step_logits(params, caches, token, at)
        if position + 1 >= start:
            stepped = jax.nn.log_softmax(logits[0])
            total += float(jnp.sum(jnp.exp(stepped) * (stepped - scored[position])))
    return total / (len(tokens) - start)
