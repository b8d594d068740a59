"""Text in, text out: `generate`, `stream`."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vecinfer_jax.caches.base import NO_AXES, CacheMethod, allocated_bytes
from vecinfer_jax.caches.full_precision import FullPrecision
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.calibration.store import resolve_calibration
from vecinfer_jax.errors import InputError, check_seed
from vecinfer_jax.generation.engine import DecodeState, Engine, bucket, check_capacity, engine_for, round_up
from vecinfer_jax.generation.sampling import Sampling
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.decoder import Decoder
from vecinfer_jax.models.folding import fold_values
from vecinfer_jax.models.tokenizer import IncrementalDecoder
from vecinfer_jax.parallel.mesh import Layout, layout_of
from vecinfer_jax.parallel.shardings import place_params

Prompt = str | Sequence[int] | Sequence[Mapping[str, str]]

# Decoding looks at the text this often when stop strings are given.
STOP_CHECK = 16
TOKEN_BUFFER_STEP = 64
# Prompt tokens a row that are run, and attend to each other exactly, at one time: what bounds a prompt's memory.
PREFILL_CHUNK = 32768


@dataclasses.dataclass(frozen=True)
class _Options:
    """What `generate` and `stream` take alike; see `generate`."""

    method: CacheMethod | None = None
    calibration: Calibration | None = None
    max_new_tokens: int = 128
    sampling: Sampling | None = None
    seed: int = 0
    stop: Sequence[str] | str = ()
    stop_token_ids: Sequence[int] | None = None
    capacity: int | None = None
    prefill_chunk: int = PREFILL_CHUNK
    prefill: str = "exact"
    progress: bool = True
    mesh: Mesh | Layout | None = None


def stop_texts(stop: Sequence[str] | str) -> tuple[str, ...]:
    """The stop strings, one string being one of them. Raises `InputError` for an empty one."""
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if any(not isinstance(text, str) or not text for text in stops):
        raise InputError("a stop text is empty: give at least one character, or leave stop out")
    return stops


@dataclasses.dataclass(frozen=True)
class GenerationStats:
    """What a run cost. Seconds exclude compilation, which is `compile_seconds`.

    cache_bytes: bytes allocated for all layers by kind: codes, codebooks, window, state, total.
    capacity:    tokens a sequence the caches were allocated for.
    peak_bytes:  the most that was held on the device at once: weights, caches and temporaries (the compiler's account).
    """

    prefill_seconds: float
    decode_seconds: float
    compile_seconds: float
    prompt_tokens: int
    new_tokens: int
    decode_steps: int
    sequences: int
    capacity: int
    cache_bytes: Mapping[str, int]
    peak_bytes: int

    @property
    def tokens_per_second(self) -> float:
        """Decoded tokens of all sequences a second (the first of each comes from the prefill)."""
        decoded = self.new_tokens - self.sequences
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
    stops: np.ndarray
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
        n, state = len(self.prompts), self.state
        tokens, logprobs, done, step = self.engine.fetch((state.tokens, state.logprobs, state.done, state.step))
        return tokens[:n], logprobs[:n], done[:n], int(step)


def generate(
    lm: LanguageModel,
    prompts: Prompt | Sequence[Prompt],
    *,
    method: CacheMethod | None = None,
    calibration: Calibration | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[str] | str = (),
    stop_token_ids: Sequence[int] | None = None,
    capacity: int | None = None,
    prefill_chunk: int = PREFILL_CHUNK,
    prefill: str = "exact",
    batch_size: int | None = None,
    seeds: Sequence[int] | None = None,
    progress: bool = True,
    mesh: Mesh | Layout | None = None,
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
        prefill_chunk: run prompts this many tokens at a time, which bounds their memory. Within a chunk attention is
            exact; what was encoded before a chunk is read from its codes.
        prefill: "exact", or "coded": the whole prompt too is read from codes, as decoding would (evaluation).
        batch_size: rows to pad the batch to, so that a smaller last batch recompiles nothing.
        seeds: place of each prompt for the purposes of `seed` (default 0, 1, 2, ...).
        progress: tell of calibration on first use.
        mesh: run on several devices (`vecinfer_jax.parallel.make_mesh`, or a `Layout` with its settings); default: the
            mesh that the model was loaded for (`load(mesh=)`), whose weights stay where they are. The batch is padded
            to a multiple of its data axis.

    Raises:
        InputError: an empty prompt, an unknown setting, a mesh that does not fit the model.
        CapacityError: a prompt longer than fits.
    """
    options = _Options(
        method,
        calibration,
        max_new_tokens,
        sampling,
        seed,
        stop,
        stop_token_ids,
        capacity,
        prefill_chunk,
        prefill,
        progress,
        mesh,
    )
    stops = stop_texts(stop)
    run = _prefill(lm, _as_list(prompts), options, batch_size, seeds)
    cut: dict[int, tuple[int, str]] = {}
    searched = 0
    while True:
        tokens, _, done, step = run.rows()
        if stops:
            found = _find_stops(lm, tokens, stops, searched, cut)
            searched = step
            if found:
                mask = np.zeros(run.state.done.shape, bool)
                mask[found] = True
                run.state = run.engine.stop(run.state, mask)
                done = done | mask[: len(done)]
        if done.all() or step >= max_new_tokens:
            break
        run.advance(min(step + STOP_CHECK, max_new_tokens) if stops else max_new_tokens)
    return _collect(lm, run, cut, max_new_tokens)


def stream(lm: LanguageModel, prompt: Prompt, *, chunk: int = 8, **options: Any) -> Iterator[str]:
    """Yields pieces of the continuation, `chunk` tokens at a time; together they are `generate`'s text.

    Takes `generate`'s options except `batch_size` and `seeds`. Raises as `generate` does, before anything runs.
    """
    known = {field.name for field in dataclasses.fields(_Options)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise InputError(f"stream has no option {unknown[0]!r}; it takes {', '.join(sorted(known))}")
    if not isinstance(chunk, int) or chunk < 1:
        raise InputError(f"chunk={chunk} must be a whole number of tokens, 1 or more")
    return _stream(lm, prompt, chunk, _Options(**options))


def _stream(lm: LanguageModel, prompt: Prompt, chunk: int, options: _Options) -> Iterator[str]:
    stops = stop_texts(options.stop)
    decoder = IncrementalDecoder(_tokenizer(lm))
    run = _prefill(lm, [prompt], options, None, None)
    hold = max((len(text) for text in stops), default=1) - 1
    shown, pending = 0, ""
    while True:
        tokens, _, done, step = run.rows()
        finished = bool(done[0]) or step >= options.max_new_tokens
        pieces = [decoder.push([int(token)]) for token in tokens[0][shown:step] if token >= 0]
        shown = step
        for piece in [*pieces, decoder.finish()] if finished else pieces:
            pending += piece
            at = _first_of(pending, stops)
            if at is not None:
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
        run.advance(min(step + chunk, options.max_new_tokens))


def encode_prompt(lm: LanguageModel, prompt: Any) -> list[int]:
    """Token ids of a text, of chat messages (through the chat template), or the ids themselves.

    Raises `InputError` for an empty prompt, one that is none of these, and ids outside the vocabulary.
    """
    if isinstance(prompt, np.ndarray | jax.Array):
        prompt = np.asarray(prompt).tolist()
    if isinstance(prompt, str):
        _check_text(prompt)
        ids = _tokenizer(lm).encode(prompt) if prompt else []
    elif not isinstance(prompt, Sequence):
        raise InputError(f"a prompt is a text, a list of token ids or a list of messages, not {type(prompt).__name__}")
    elif prompt and isinstance(prompt[0], Mapping):
        text = _tokenizer(lm).apply_chat_template(list(prompt))
        _check_text(text)
        ids = _tokenizer(lm).encode(text, add_special_tokens=False)
    else:
        ids = []
        for token in prompt:
            if isinstance(token, bool) or not isinstance(token, int | np.integer):
                raise InputError(f"{token!r} is no token id: give whole numbers")
            if not 0 <= token < lm.config.vocab_size:
                raise InputError(f"token id {token} is outside the vocabulary of {lm.config.vocab_size}")
            ids.append(int(token))
    if not ids:
        raise InputError("the prompt is empty: give it at least one token of text")
    return ids


def _check_text(text: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise InputError("the prompt is not valid UTF-8: give it as UTF-8 text") from None


def _as_list(prompts: Any) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, np.ndarray | jax.Array):
        prompts = np.asarray(prompts).tolist()
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
    options: _Options,
    batch_size: int | None,
    seeds: Sequence[int] | None,
) -> _Run:
    method = options.method or FullPrecision()
    sampling = options.sampling or Sampling()
    max_new_tokens, prefill_chunk = options.max_new_tokens, options.prefill_chunk
    check_seed(options.seed)
    encoded = [encode_prompt(lm, prompt) for prompt in prompts]
    longest = max(len(ids) for ids in encoded)
    capacity = check_capacity(longest, max_new_tokens, options.capacity, lm.config.max_position)
    if not isinstance(prefill_chunk, int) or prefill_chunk < 1:
        raise InputError(f"prefill_chunk={prefill_chunk} must be a whole number of tokens, 1 or more")
    if options.prefill not in ("exact", "coded"):
        raise InputError(f"prefill={options.prefill!r} is unknown; choose exact or coded")
    places = list(range(len(encoded))) if seeds is None else list(seeds)
    if len(places) != len(encoded) or any(not 0 <= place < 2**32 for place in places):
        raise InputError(f"seeds must be {len(encoded)} whole numbers, one a prompt, from 0 to {2**32 - 1}")
    stop_ids = lm.config.eos_token_ids if options.stop_token_ids is None else list(options.stop_token_ids)
    if any(not 0 <= token < lm.config.vocab_size for token in stop_ids):
        raise InputError(f"a stop token id is outside the vocabulary of {lm.config.vocab_size}")
    calibration = resolve_calibration(
        lm, method, options.calibration, tokens=longest + max_new_tokens - 1, progress=options.progress
    )
    method = method.resolved(calibration.layers)
    layout = lm.layout if options.mesh is None else layout_of(options.mesh)
    rows = max(batch_size or 0, len(encoded))
    rows = rows if layout is None else round_up(rows, layout.size("data"))
    width = min(bucket(longest), capacity)
    tokens = np.zeros((rows, width), np.int32)
    lengths = np.ones((rows,), np.int32)
    for i, ids in enumerate(encoded):
        tokens[i, : len(ids)], lengths[i] = ids, len(ids)
    wanted = np.arange(rows) < len(encoded)
    stops = np.asarray([*stop_ids] or [-1], np.int32)
    places += [0] * (rows - len(encoded))

    axes = NO_AXES if layout is None else layout.axes(rows, capacity)
    engine = engine_for(Decoder(lm.config, method, lm.dtype, axes), layout)
    params = fold_values(lm, method, calibration)
    if layout is not None:
        params = place_params(params, lm.config, layout)
    before, engine.peak_bytes = engine.compile_seconds, 0
    settings = jax.tree.map(np.asarray, sampling.settings())
    keys = engine.keys(options.seed, np.asarray(places, np.uint32))
    begin = time.perf_counter()
    caches = engine.init_caches(calibration.layers, rows, capacity)
    logits, caches = engine.prefill(
        params, caches, tokens, lengths, prefill_chunk, "coded" if options.prefill == "coded" else "exact"
    )
    buffer = round_up(max_new_tokens, TOKEN_BUFFER_STEP)
    state = engine.start(logits, caches, lengths, keys, wanted, buffer, settings, stops)
    jax.block_until_ready(state.step)
    seconds = time.perf_counter() - begin - (engine.compile_seconds - before)
    return _Run(engine, params, state, settings, stops, encoded, capacity, seconds, before)


def _find_stops(
    lm: LanguageModel, tokens: np.ndarray, stops: tuple[str, ...], searched: int, cut: dict[int, tuple[int, str]]
) -> list[int]:
    """Rows whose text has come to contain a stop string since `searched` tokens.

    `cut` records, per row, the number of tokens with which the first one was complete and the text before it.
    """
    found = []
    tokenizer = _tokenizer(lm)
    for row in range(tokens.shape[0]):
        ids = [int(token) for token in tokens[row] if token >= 0]
        if row in cut or _first_of(tokenizer.decode(ids), stops) is None:
            continue
        for count in range(searched + 1, len(ids) + 1):
            text = tokenizer.decode(ids[:count])
            at = _first_of(text, stops)
            if at is not None:
                cut[row] = (count, text[:at])
                found.append(row)
                break
    return found


def _first_of(text: str, stops: tuple[str, ...]) -> int | None:
    """Where the first of the stop strings begins in a text."""
    return min((at for at in (text.find(stop) for stop in stops) if at >= 0), default=None)


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
        sequences=len(ids),
        capacity=run.capacity,
        cache_bytes=allocated_bytes(run.state.caches),
        peak_bytes=run.engine.peak_bytes,
    )
    return Generation(
        texts=texts,
        tokens=ids,
        logprobs=[[float(x) for x in row[: len(kept)]] for row, kept in zip(logprobs, ids, strict=True)],
        finish_reasons=["stop" if d else "length" for d in done],
        prompt_tokens=run.prompts,
        stats=stats,
    )
