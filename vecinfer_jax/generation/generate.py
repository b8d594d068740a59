"""Text in, text out: `generate`, `stream`."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vecinfer_jax.caches.base import CacheMethod, allocated_bytes
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.calibration.store import resolve_calibration
from vecinfer_jax.errors import InputError
from vecinfer_jax.generation.engine import DecodeState, Engine, bucket, check_capacity, engine_for, round_up
from vecinfer_jax.generation.sampling import Sampling
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.decoder import Decoder
from vecinfer_jax.models.folding import fold_values
from vecinfer_jax.models.tokenizer import IncrementalDecoder

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

# Decoding looks at the text this often when stop strings are given.
STOP_CHECK = 16
TOKEN_BUFFER_STEP = 64


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """What a run cost. Seconds exclude compilation, which is `compile_seconds`.

    cache_bytes: bytes allocated for all layers by kind: codes, codebooks, window, state, total.
    capacity:    tokens a sequence the caches were allocated for.
    """

    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    prompt_tokens: int
    new_tokens: int
    decode_steps: int
    capacity: int
    cache_bytes: Mapping[str, int]

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens of all sequences a second (the first of each comes from the prefill)."""
        decoded = self.new_tokens * self.decode_steps / max(self.decode_steps + 1, 1)
        return decoded / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclasses.dataclass(frozen=True)
class Generation:
    """What came out, one entry a prompt.

    texts:          decoded new text (without the prompt; special tokens and stop strings left out).
    tokens:         new token ids, the stop token included.
    logprobs:       log-probability of each new token under the model, before temperature and filters.
    finish_reasons: "stop" (a stop token or string) or "length".
    prompt_tokens:  ids the model was given.
    """

    texts: list[str]
    tokens: list[list[int]]
    logprobs: list[list[float]]
    finish_reasons: list[str]
    prompt_tokens: list[list[int]]
    stats: GenerationStats


@dataclasses.dataclass
class _Run:
    """One batch on its way."""

    engine: Engine
    params: Any
    state: DecodeState
    settings: Any
    stops: jax.Array
    prompts: list[list[int]]
    capacity: int
    prefill_seconds: float
    compile_seconds_before: float
    decode_seconds: float = 0.0

    def advance(self, until: int) -> None:
        compiled = self.engine.compile_seconds
        begin = time.perf_counter()
        self.state = self.engine.decode(self.params, self.state, until, self.settings, self.stops)
        jax.block_until_ready(self.state.step)
        self.decode_seconds += time.perf_counter() - begin - (self.engine.compile_seconds - compiled)

    def rows(self) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
        """tokens, logprobs, done, step on the host, of the real rows."""
        n = len(self.prompts)
        return (
            np.asarray(self.state.tokens)[:n],
            np.asarray(self.state.logprobs)[:n],
            np.asarray(self.state.done)[:n],
            int(self.state.step),
        )


def generate(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    method: CacheMethod | None = None,
    calibration: Calibration | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    stop_token_ids: Sequence[int] | None = None,
    capacity: int | None = None,
    prefill_chunk: int | None = None,
    batch_size: int | None = None,
    seeds: Sequence[int] | None = None,
    progress: bool = True,
) -> Generation:
    """Continues prompts.

    Args:
        lm: the model.
        prompts: each a text, a list of token ids, or a list of chat messages (put through the chat template).
        method: how keys and values are kept; default `FullPrecision()`.
        calibration: of the method; default: one that ships or was kept for this model, else one made now and kept.
        max_new_tokens: at most this many a prompt.
        sampling: default greedy.
        seed: with a prompt's place in the list it decides all that is random; the same seed gives the same tokens.
        stop: texts that end a sequence (left out of its text).
        stop_token_ids: ids that end a sequence; default: the model's end-of-sequence ids.
        capacity: tokens a sequence to allocate caches for; default: what this call needs, rounded up.
        prefill_chunk: run prompts this many tokens at a time; later chunks then read earlier ones from the cache.
            Default: whole, so that attention within the prompt is exact.
        batch_size: rows to pad the batch to, so that a smaller last batch recompiles nothing.
        seeds: place of each prompt for the purposes of `seed` (default 0, 1, 2, ...).
        progress: tell of calibration on first use.

    Raises:
        InputError: an empty prompt, an unknown setting. CapacityError: a prompt longer than fits.
    """
    prompts = _as_list(prompts)
    run = _prefill(
        lm, prompts, method, calibration, max_new_tokens, sampling, seed, stop_token_ids, capacity,
        prefill_chunk, batch_size, seeds, progress,
    )  # fmt: skip
    cut: dict[int, tuple[int, str]] = {}
    step = 1
    while True:
        tokens, _, done, step = run.rows()
        if stop:
            found = _find_stops(lm, tokens, stop, cut)
            if found:
                mask = np.zeros(run.state.done.shape, bool)
                mask[found] = True
                run.state = dataclasses.replace(run.state, done=run.state.done | mask)
                done = done | mask[: len(done)]
        if done.all() or step >= max_new_tokens:
            break
        run.advance(min(step + STOP_CHECK, max_new_tokens) if stop else max_new_tokens)
    return _collect(lm, run, cut, max_new_tokens)


def stream(
    lm: LanguageModel, prompt: Prompt, *, chunk: int = 8, max_new_tokens: int = 128, **options: Any
) -> Iterator[str]:
    """Yields pieces of the continuation, `chunk` tokens at a time; together they are `generate`'s text.

    Takes `generate`'s options except `batch_size` and `seeds`.
    """
    stop = tuple(options.pop("stop", ()))
    run = _prefill(
        lm,
        [prompt],
        options.pop("method", None),
        options.pop("calibration", None),
        max_new_tokens,
        options.pop("sampling", None),
        options.pop("seed", 0),
        options.pop("stop_token_ids", None),
        options.pop("capacity", None),
        options.pop("prefill_chunk", None),
        None,
        None,
        options.pop("progress", True),
    )
    if options:
        raise InputError(f"stream: unknown options {', '.join(sorted(options))}")
    decoder = IncrementalDecoder(_tokenizer(lm))
    shown, pending = 0, ""
    hold = max((len(s) for s in stop), default=1) - 1
    while True:
        tokens, _, done, step = run.rows()
        row = tokens[0]
        fresh = [int(t) for t in row[shown:step] if t >= 0]
        shown = step
        finished = bool(done[0]) or step >= max_new_tokens
        pending += decoder.push(fresh) + (decoder.finish() if finished else "")
        at = min((i for i in (pending.find(s) for s in stop) if i >= 0), default=-1)
        if at >= 0:
            if pending[:at]:
                yield pending[:at]
            return
        # Text that may be the beginning of a stop string is held back.
        ready = pending if finished or not hold else pending[:-hold]
        if ready:
            yield ready
            pending = pending[len(ready) :]
        if finished:
            return
        run.advance(min(step + chunk, max_new_tokens))


def encode_prompt(lm: LanguageModel, prompt: Prompt) -> list[int]:
    """Token ids of a text, of chat messages (through the chat template), or the ids themselves."""
    if isinstance(prompt, str):
        ids = _tokenizer(lm).encode(prompt)
        if not prompt:
            ids = []
    elif prompt and isinstance(prompt[0], Mapping):
        text = _tokenizer(lm).apply_chat_template(list(prompt))
        ids = _tokenizer(lm).encode(text, add_special_tokens=False)
    else:
        ids = [int(token) for token in prompt]  # type: ignore[arg-type, call-overload]
        bad = [token for token in ids if not 0 <= token < lm.config.vocab_size]
        if bad:
            raise InputError(f"token id {bad[0]} is outside the vocabulary of {lm.config.vocab_size}")
    if not ids:
        raise InputError("the prompt is empty: give it at least one token of text")
    return ids


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    prompts = list(prompts)
    if not prompts:
        raise InputError("no prompts were given")
    # A list of ids, or of chat messages, is one prompt.
    if isinstance(prompts[0], int | np.integer | Mapping):
        return [prompts]
    return prompts


def _tokenizer(lm: LanguageModel) -> Any:
    if lm.tokenizer is None:
        raise InputError(f"model {lm.name!r} has no tokenizer: give prompts as token ids")
    return lm.tokenizer


def _prefill(
    lm: LanguageModel,
    prompts: list[Prompt],
    method: CacheMethod | None,
    calibration: Calibration | None,
    max_new_tokens: int,
    sampling: Sampling | None,
    seed: int,
    stop_token_ids: Sequence[int] | None,
    capacity: int | None,
    prefill_chunk: int | None,
    batch_size: int | None,
    seeds: Sequence[int] | None,
    progress: bool,
) -> _Run:
    from vecinfer_jax.caches.full_precision import FullPrecision

    method = method or FullPrecision()
    sampling = sampling or Sampling()
    encoded = [encode_prompt(lm, prompt) for prompt in prompts]
    longest = max(len(ids) for ids in encoded)
    capacity = check_capacity(longest, max_new_tokens, capacity, lm.config.max_position)
    if prefill_chunk is not None and prefill_chunk < 1:
        raise InputError(f"prefill_chunk={prefill_chunk} must be 1 or more")
    calibration = resolve_calibration(lm, method, calibration, progress=progress)
    rows = max(batch_size or 0, len(encoded))
    width = min(bucket(longest), capacity)
    tokens = np.zeros((rows, width), np.int32)
    lengths = np.ones((rows,), np.int32)
    for i, ids in enumerate(encoded):
        tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    wanted = np.arange(rows) < len(encoded)
    if stop_token_ids is None:
        stop_token_ids = lm.config.eos_token_ids
    stops = jnp.asarray([*stop_token_ids] or [-1], jnp.int32)
    places = list(range(rows)) if seeds is None else [*seeds, *([0] * (rows - len(encoded)))]
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.key(seed), jnp.asarray(places, jnp.uint32))

    engine = engine_for(Decoder(lm.config, method, lm.dtype))
    params = fold_values(lm, method, calibration)
    before = engine.compile_seconds
    settings = sampling.settings()
    begin = time.perf_counter()
    caches = engine.init_caches(calibration.layers, rows, capacity)
    logits, caches = engine.prefill(params, caches, tokens, lengths, prefill_chunk)
    buffer = round_up(max_new_tokens, TOKEN_BUFFER_STEP)
    state = engine.start(logits, caches, lengths, keys, wanted, buffer, settings, stops)
    jax.block_until_ready(state.step)
    seconds = time.perf_counter() - begin - (engine.compile_seconds - before)
    return _Run(engine, params, state, settings, stops, encoded, capacity, seconds, before)


def _find_stops(
    lm: LanguageModel, tokens: np.ndarray, stop: Sequence[str], cut: dict[int, tuple[int, str]]
) -> list[int]:
    """Rows whose text now contains a stop string; `cut` records how many tokens and what text are kept."""
    found = []
    tokenizer = _tokenizer(lm)
    for row in range(tokens.shape[0]):
        if row in cut:
            continue
        ids = [int(t) for t in tokens[row] if t >= 0]
        text = tokenizer.decode(ids)
        at = min((i for i in (text.find(s) for s in stop) if i >= 0), default=-1)
        if at < 0:
            continue
        kept = next(n for n in range(1, len(ids) + 1) if any(s in tokenizer.decode(ids[:n]) for s in stop))
        cut[row] = (kept, text[:at])
        found.append(row)
    return found


def _collect(lm: LanguageModel, run: _Run, cut: dict[int, tuple[int, str]], max_new_tokens: int) -> Generation:
    tokens, logprobs, done, step = run.rows()
    ids = [[int(t) for t in row[:max_new_tokens] if t >= 0] for row in tokens]
    for row, (kept, _) in cut.items():
        ids[row] = ids[row][:kept]
    texts = ["" for _ in ids] if lm.tokenizer is None else [lm.tokenizer.decode(row) for row in ids]
    for row, (_, text) in cut.items():
        texts[row] = text
    stats = GenerationStats(
        prefill_seconds=run.prefill_seconds,
        decode_seconds=run.decode_seconds,
        compile_seconds=run.engine.compile_seconds - run.compile_seconds_before,
        prompt_tokens=sum(len(p) for p in run.prompts),
        new_tokens=sum(len(row) for row in ids),
        decode_steps=step - 1,
        capacity=run.capacity,
        cache_bytes=allocated_bytes(run.state.caches),
    )
    return Generation(
        texts=texts,
        tokens=ids,
        logprobs=[[float(x) for x in row[: len(kept)]] for row, kept in zip(logprobs, ids, strict=True)],
        finish_reasons=["stop" if d else "length" for d in done],
        prompt_tokens=run.prompts,
        stats=stats,
    )
