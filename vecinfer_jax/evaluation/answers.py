"""Answering a task's cases from a cache: log-likelihood of the gold continuation, and greedy answers.

With prefill="coded" the prompt is read as decoding would read it, with "exact" as generation reads it; gold and
answer tokens always read what decoding reads.
"""

import dataclasses
from collections.abc import Iterator, Sequence
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
from vecinfer_jax.errors import CapacityError
from vecinfer_jax.evaluation.cases import Case, Task, check_whole
from vecinfer_jax.evaluation.perplexity import bits_per_element, check_prefill
from vecinfer_jax.generation.engine import bucket, round_up
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.layerwise import Layerwise

CAPACITY_STEP = 128
# Tokens generated between two looks at whether all sequences of a batch have ended.
STOP_CHECK = 8


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model made of a case.

    gold_nll: negative log-likelihood of the gold continuation, nats, summed over its tokens; gold_tokens: how many.
    text:     the greedy answer; None where none was asked for. score: the task's judgement of it, 0 to 1.
    """

    labels: dict[str, Any]
    gold_nll: float
    gold_tokens: int
    text: str | None
    score: float | None


@dataclasses.dataclass(frozen=True)
class TaskResult:
    """What was measured of a task.

    gold_nll:           mean over cases of the gold's negative log-likelihood, nats.
    gold_nll_per_token: over all cases' gold tokens.
    score, answered:    sum of the judgements of the generated answers, and how many there were.
    bits_per_element:   true bits of a cached element outside window and sinks.
    """

    task: str
    cases: int
    gold_nll: float
    gold_nll_per_token: float
    score: float
    answered: int
    bits_per_element: float
    prefill: str
    answers: tuple[Answer, ...]


def answer(
    lm: LanguageModel,
    task: Task,
    method: CacheMethod | None = None,
    calibration: Calibration | None = None,
    *,
    prefill: str = "coded",
    batch: int = 8,
    cases: Sequence[Case] | None = None,
    progress: bool = True,
) -> TaskResult:
    """Scores and answers every case of a task, `batch` cases at a time.

    `cases`: what `task.cases(lm)` gave, where several methods answer the same.

    Raises:
        InputError: settings of the task that make no sense. CapacityError: a case does not fit the model's context.
    """
    check_prefill(prefill)
    check_whole("batch", batch)
    cases = task.cases(lm) if cases is None else cases
    method = method or FullPrecision()
    longest = max(case.tokens for case in cases)
    if longest > lm.config.max_position:
        raise CapacityError(f"a case of {longest} tokens exceeds the model's context of {lm.config.max_position}")
    model = Layerwise(lm, method, resolve_calibration(lm, method, calibration, tokens=longest, progress=progress))
    answers: dict[int, Answer] = {}
    with tqdm(total=len(cases), desc=task.name, disable=not progress, unit="case") as bar:
        for indices in _batches(cases, batch):
            rows = [cases[i] for i in indices]
            nll, texts = _answer_batch(model, rows, batch, prefill)
            for index, case, cost, text in zip(indices, rows, nll, texts, strict=True):
                score = None if text is None else task.judge(case, text)
                answers[index] = Answer(dict(case.labels), cost, len(case.gold), text, score)
            bar.update(len(rows))
    ordered = tuple(answers[i] for i in range(len(cases)))
    judged = [a.score for a in ordered if a.score is not None]
    return TaskResult(
        task=task.name,
        cases=len(cases),
        gold_nll=float(np.mean([a.gold_nll for a in ordered])),
        gold_nll_per_token=sum(a.gold_nll for a in ordered) / max(sum(a.gold_tokens for a in ordered), 1),
        score=float(sum(judged)),
        answered=len(judged),
        bits_per_element=bits_per_element(lm, model.method),
        prefill=prefill,
        answers=ordered,
    )


def _batches(cases: Sequence[Case], size: int) -> Iterator[list[int]]:
    """Indices of cases that are run together: of similar length, and alike in whether they are generated."""
    order = sorted(range(len(cases)), key=lambda i: (not cases[i].generates, bucket(len(cases[i].prompt)), i))
    start = 0
    while start < len(order):
        first = cases[order[start]]
        alike = [i for i in order[start : start + size] if cases[i].generates == first.generates]
        yield alike
        start += len(alike)


def _answer_batch(model: Layerwise, cases: list[Case], size: int, prefill: str) -> tuple[list[float], list[str | None]]:
    """Of up to `size` cases: the golds' negative log-likelihoods, and the greedy answers."""
    padded = cases + [cases[0]] * (size - len(cases))  # one batch size, one program
    tokens, lengths = _pad([case.prompt for case in padded], bucket)
    golds, gold_lengths = _pad([case.gold for case in padded], lambda n: round_up(n, 16))
    capacity = round_up(max(tokens.shape[1], int(lengths.max()) + golds.shape[1]), CAPACITY_STEP)
    steps = max(case.max_new_tokens for case in cases)
    capacity = max(capacity, round_up(int(lengths.max()) + steps, CAPACITY_STEP))
    read: Any = "coded" if prefill == "coded" else "exact"
    hidden, caches = model.prefill(model.init(size, capacity), tokens, lengths, read=read)
    last = _last(hidden, jnp.asarray(lengths))
    after, _ = model.prefill(caches, golds, gold_lengths, start=lengths, read="coded")
    before_each = jnp.concatenate([last[:, None], after[:, :-1]], axis=1)
    nll = np.stack([_nll(model.logits(h), g, n) for h, g, n in zip(before_each, golds, gold_lengths, strict=True)])
    texts: list[str | None] = [None] * len(cases)
    if steps:
        texts = list(_greedy(model, caches, last, lengths, [case.max_new_tokens for case in padded])[: len(cases)])
    return [float(x) for x in nll[: len(cases)]], texts


def _pad(rows: Sequence[Sequence[int]], width_of: Any) -> tuple[Int[np.ndarray, "B T"], Int[np.ndarray, "B"]]:
    lengths = np.asarray([len(row) for row in rows], np.int32)
    tokens = np.zeros((len(rows), width_of(int(lengths.max()))), np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens, lengths


@jax.jit
def _last(hidden: Float[Array, "B T hidden"], lengths: Int[Array, "B"]) -> Float[Array, "B hidden"]:
    return jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)[:, 0]


@jax.jit
def _nll(logits: Float32[Array, "T V"], tokens: Int[Array, "T"], length: Int[Array, ""]) -> Float32[Array, ""]:
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, None], axis=1)[:, 0]
    return -jnp.sum(jnp.where(jnp.arange(tokens.shape[0]) < length, chosen, 0.0))


@jax.jit
def _choose(logits: Float32[Array, "B V"]) -> Int[Array, "B"]:
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def _greedy(
    model: Layerwise, caches: Any, last: Float[Array, "B hidden"], lengths: np.ndarray, wanted: list[int]
) -> list[str]:
    """The greedy continuation of each row, up to the model's end token or its wanted number of tokens."""
    stops = set(model.lm.config.eos_token_ids)
    tokenizer = model.lm.tokenizer
    assert tokenizer is not None
    position, token, steps = jnp.asarray(lengths), _choose(model.logits(last)), []
    for step in range(max(wanted)):
        steps.append(token)
        if step % STOP_CHECK == STOP_CHECK - 1:
            so_far = np.stack([np.asarray(t) for t in steps], axis=1)
            if all(stops & set(row[:n].tolist()) or n <= len(row) for row, n in zip(so_far, wanted, strict=True)):
                break
        if step + 1 < max(wanted):
            hidden, caches = model.decode(caches, token, position)
            token, position = _choose(model.logits(hidden)), position + 1
    texts = []
    for row, count in zip(np.stack([np.asarray(t) for t in steps], axis=1), wanted, strict=True):
        ids = row[:count].tolist()
        end = next((i for i, t in enumerate(ids) if t in stops), len(ids))
        texts.append(tokenizer.decode(ids[:end]))
    return texts
