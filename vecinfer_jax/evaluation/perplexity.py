"""Perplexity of a compressed cache, with KL divergence and top-1 agreement against full precision.

Each window is scored by itself, teacher-forced. With prefill="coded" (the strict figure) the query at position t
reads exactly what decoding at t would read: the sinks and the last `residual` tokens exactly, everything else from
the codes in the cache. With prefill="exact" prompt attention is exact and nothing is read from codes, so the two
differ only by what the cache costs.
"""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int
from tqdm import tqdm

from vecinfer_jax.caches.base import CacheMethod
from vecinfer_jax.caches.full_precision import FullPrecision
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.calibration.store import resolve_calibration
from vecinfer_jax.errors import CapacityError, InputError
from vecinfer_jax.evaluation.cases import check_whole
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.config import ModelConfig
from vecinfer_jax.models.decoder import layer_shape
from vecinfer_jax.models.layerwise import Layerwise, head_of, unembed

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
    batch: int | None = None,
    reference: Sequence[Float[np.ndarray, "T hidden"]] | None = None,
    progress: bool = True,
) -> PerplexityResult:
    """Scores the first `windows` non-overlapping windows of `length` tokens of a text (all whole ones by default).

    `batch`: windows run at a time, of the same length each by itself (an accelerator is not filled by one); default: 1,
    or one for each device of a mesh's data axis.
    `reference`: what `full_precision_hidden` gave for the same model and windows, where several methods are compared.

    Raises:
        InputError: the text is shorter than one window. CapacityError: length exceeds the model's context.
    """
    method = method or FullPrecision()
    check_prefill(prefill)
    if batch is None:
        batch = 1 if lm.layout is None else lm.layout.size("data")
    check_whole("batch", batch)
    texts = text_windows(lm, text, length, windows)
    calibration = resolve_calibration(lm, method, calibration, tokens=length, progress=progress)
    if reference is not None and [r.shape for r in reference] != [(length, lm.config.hidden_size)] * len(texts):
        raise InputError("reference is of other windows: compute it with full_precision_hidden for these")
    full = Layerwise(lm)
    ours = Layerwise(lm, method, calibration)
    compare = functools.partial(_compare, lm.config, jnp.dtype(lm.dtype), head_of(lm.params))

    totals = np.zeros(4, np.float64)
    with tqdm(total=len(texts), desc="windows", disable=not progress, unit="window") as bar:
        for start in range(0, len(texts), batch):
            tokens = texts[start : start + batch]
            if reference is None:
                expected = full.hidden(tokens)
            else:
                expected = jnp.asarray(np.stack(reference[start : start + batch]))
            if isinstance(method, FullPrecision):
                hidden = expected
            else:
                hidden = ours.hidden(tokens, read="coded" if prefill == "coded" else "exact")
            for row in range(len(tokens)):
                totals += np.asarray(compare(hidden[row], expected[row], jnp.asarray(tokens[row]), 1))
                bar.update()
    predictions = len(texts) * (length - 1)
    nll, full_nll, kl, agree = totals / predictions
    return PerplexityResult(
        perplexity=math.exp(nll),
        full_perplexity=math.exp(full_nll),
        kl=float(kl),
        top1_agreement=float(agree),
        bits_per_element=bits_per_element(lm, ours.method),
        windows=len(texts),
        length=length,
        predictions=predictions,
        prefill=prefill,
    )


def check_prefill(prefill: str) -> None:
    """Raises `InputError` unless `prefill` is "coded" or "exact"."""
    if prefill not in ("coded", "exact"):
        raise InputError(f"prefill={prefill!r} is unknown; choose coded or exact")


def text_windows(lm: LanguageModel, text: str, length: int, windows: int | None) -> Int[np.ndarray, "W T"]:
    """The first non-overlapping windows of `length` tokens of a text; raises as `perplexity` does."""
    check_whole("length", length, 2)
    if windows is not None:
        check_whole("windows", windows)
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
    return np.asarray(ids[: count * length], np.int32).reshape(count, length)


def full_precision_hidden(
    lm: LanguageModel, texts: Int[np.ndarray, "W T"], *, batch: int = 1, progress: bool = True
) -> list[Float[np.ndarray, "T hidden"]]:
    """The last layer's output of each window with the full-precision cache, `batch` windows at a time."""
    full = Layerwise(lm)
    starts = tqdm(range(0, len(texts), batch), "full precision", disable=not progress, unit="batch")
    return [row for start in starts for row in np.asarray(full.hidden(texts[start : start + batch]))]


def bits_per_element(lm: LanguageModel, method: CacheMethod) -> float:
    """True bits of a cached element, averaged over layers."""
    n = lm.config.num_layers
    bits = [method.for_layer(i, n).bits_per_element(layer_shape(lm.config, i, lm.dtype)) for i in range(n)]
    return sum(bits) / n


@functools.partial(jax.jit, static_argnums=(0, 1))
def _compare(
    config: ModelConfig,
    dtype: Any,
    head: Any,
    hidden: Float[Array, "T hidden"],
    reference: Float[Array, "T hidden"],
    tokens: Int[Array, "T"],
    start: Int[Array, ""] | int,
) -> Float32[Array, "4"]:
    """Sums over the predictions of tokens[start:] of nll, reference nll, KL(reference || ours), agreement.

    Logits exist a block of rows at a time.
    """
    predictions = tokens.shape[0] - 1
    padding = -predictions % LOGIT_ROWS

    def rows(x: jax.Array) -> jax.Array:
        x = jnp.pad(x, [(0, padding)] + [(0, 0)] * (x.ndim - 1))
        return x.reshape(-1, LOGIT_ROWS, *x.shape[1:])

    def block(args: tuple[jax.Array, ...]) -> jax.Array:
        ours, full, target, counts = args
        p, r = (jax.nn.log_softmax(unembed(config, dtype, head, x)) for x in (ours, full))
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
    blocks = (rows(hidden[:-1]), rows(reference[:-1]), rows(tokens[1:]), counts)
    return jnp.sum(jax.lax.map(block, blocks), axis=0)


def agreement(
    lm: LanguageModel, method: CacheMethod, calibration: Calibration, tokens: list[int], start: int
) -> tuple[float, float]:
    """(mean KL(full || method) in nats, top-1 agreement) over the predictions of tokens[start:], read from codes."""
    ids = jnp.asarray(tokens, jnp.int32)
    reference = Layerwise(lm).hidden(ids[None])[0]
    ours = Layerwise(lm, method, calibration).hidden(ids[None], read="coded")[0]
    head = head_of(lm.params)
    sums = _compare(lm.config, jnp.dtype(lm.dtype), head, ours, reference, ids, start)
    _, _, kl, agree = np.asarray(sums, np.float64)
    return float(kl / (len(tokens) - start)), float(agree / (len(tokens) - start))


def rescoring_kl(
    lm: LanguageModel, method: CacheMethod, calibration: Calibration, tokens: list[int], start: int
) -> float:
    """How far decoding token by token is from scoring the same tokens at once, both read from codes.

    The first `start` tokens are a prompt (prefill="coded" in scoring; here they are decoded one by one too), and
    the figure is the mean KL(decoded || scored) over the predictions of tokens[start:], nats. Not zero, because a
    rounding difference may flip a code.
    """
    return sum(rescoring_kls(lm, method, calibration, tokens)[start - 1 :]) / (len(tokens) - start)


def rescoring_kls(lm: LanguageModel, method: CacheMethod, calibration: Calibration, tokens: list[int]) -> list[float]:
    """KL(decoded || scored) of each prediction but the last token's; see `rescoring_kl`."""
    model = Layerwise(lm, method, calibration)
    ids = jnp.asarray(tokens, jnp.int32)[None]
    scored = jax.nn.log_softmax(model.logits(model.hidden(ids, read="coded")[0]))
    caches = model.init(1, len(tokens))
    kls = []
    for position in range(len(tokens) - 1):
        hidden, caches = model.decode(caches, ids[:, position], jnp.full((1,), position, jnp.int32))
        stepped = jax.nn.log_softmax(model.logits(hidden)[0])
        kls.append(float(jnp.sum(jnp.exp(stepped) * (stepped - scored[position]))))
    return kls
