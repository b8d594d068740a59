"""A batch job from JSONL to JSONL that goes on where it stopped."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool
from tqdm import tqdm

from vecinfer_jax.caches.base import CacheMethod
from vecinfer_jax.calibration.artefact import Calibration
from vecinfer_jax.calibration.store import resolve_calibration
from vecinfer_jax.errors import InputError, VecInferError
from vecinfer_jax.generation.engine import check_capacity
from vecinfer_jax.generation.generate import encode_prompt, generate, stop_texts
from vecinfer_jax.generation.sampling import Sampling
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.parallel.mesh import Layout
from vecinfer_jax.parallel.processes import leads, told_by_first

# How every answer begins: what stands after the last whole line is only removed if it begins like this.
_ANSWER_START = b'{"index": '


def run_job(
    lm: LanguageModel,
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    method: CacheMethod,
    calibration: Calibration | None = None,
    batch_size: int = 8,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int = 0,
    stop: Sequence[str] = (),
    logprobs: bool = False,
    chat: bool = False,
    progress: bool = True,
    mesh: Mesh | Layout | None = None,
) -> int:
    """Generates for every line of `source` that `destination` has no answer to; returns how many it did.

    A line of the source is {"prompt": text}, {"messages": [...]} or {"tokens": [...]}, with any "id" copied to the
    answer; with `chat`, a "prompt" goes through the chat template as a user's message. A line of the destination is
    {"index", "id", "text", "tokens", "finish_reason", "run"} and, if asked for, "logprobs". `index` is the line of the
    source, and decides with `seed` what is random, so an interrupted job ends with the answers of an uninterrupted
    one. `run` is a digest of prompt and settings: an answer made with others is never taken for one of this job.
    `mesh` is `generate`'s, and none of the settings. Of several processes, the first alone reads and writes
    `destination`.

    Raises:
        InputError: a bad line (by number; nothing is generated then), or answers of another job in `destination`.
    """
    sampling = sampling or Sampling()
    if batch_size < 1:
        raise InputError(f"batch_size={batch_size} must be 1 or more")
    destination = Path(destination)
    if leads() and destination.exists() and destination.samefile(source):
        raise InputError(f"{destination} is the input: choose another output")
    records = _read_prompts(lm, Path(source), max_new_tokens, chat)
    longest = max((len(ids) for _, ids in records), default=0)
    calibration = resolve_calibration(lm, method, calibration, tokens=longest + max_new_tokens - 1, progress=progress)
    settings = {
        "model": lm.fingerprint,
        "dtype": str(jnp.dtype(lm.dtype)),
        "method": repr(method),
        "calibration": calibration.digest,
        "max_new_tokens": max_new_tokens,
        "sampling": repr(sampling),
        "seed": seed,
        "stop": stop_texts(stop),
        "logprobs": logprobs,
    }
    digests = [_digest(settings, ids) for _, ids in records]
    answered = told_by_first(lambda: _read_answers(destination, digests), np.zeros(len(records), bool))
    todo = np.flatnonzero(~answered).tolist()
    if not todo:
        return 0
    with (
        open(destination if leads() else os.devnull, "a", encoding="utf-8") as out,
        tqdm(total=len(records), initial=len(records) - len(todo), desc="prompts", disable=not progress) as bar,
    ):
        for at in range(0, len(todo), batch_size):
            indices = todo[at : at + batch_size]
            result = generate(
                lm,
                [records[i][1] for i in indices],
                method=method,
                calibration=calibration,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=seed,
                seeds=indices,
                stop=stop,
                batch_size=batch_size,
                progress=progress,
                mesh=mesh,
            )
            for row, index in enumerate(indices):
                answer = {
                    "index": index,
                    "id": records[index][0],
                    "text": result.texts[row],
                    "tokens": result.tokens[row],
                    "finish_reason": result.finish_reasons[row],
                    "run": digests[index],
                }
                if logprobs:
                    answer["logprobs"] = result.logprobs[row]
                out.write(json.dumps(answer, ensure_ascii=False) + "\n")
            out.flush()
            if leads():
                os.fsync(out.fileno())
            bar.update(len(indices))
    return len(todo)


def _read_prompts(lm: LanguageModel, path: Path, max_new_tokens: int, chat: bool) -> list[tuple[Any, list[int]]]:
    """(id, token ids) of every line; all are checked before anything runs."""
    try:
        # Not splitlines(): a JSON string may hold other characters that end a line.
        lines = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {error}") from None
    if lines == [""]:
        lines = []
    records: list[tuple[Any, list[int]]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            raise InputError(f"{path}, line {number} is empty: give one JSON object a line")
        try:
            record = json.loads(line)
            ids = encode_prompt(lm, _prompt_of(record, chat))
            check_capacity(len(ids), max_new_tokens, None, lm.config.max_position)
            json.dumps(record.get("id"), ensure_ascii=False).encode("utf-8")
        except (ValueError, TypeError, OverflowError, RecursionError, VecInferError) as error:
            raise InputError(f"{path}, line {number}: {error}") from None
        records.append((record.get("id"), ids))
    if not records:
        raise InputError(f"{path} holds no prompts: give one JSON object a line")
    return records


def _prompt_of(record: Any, chat: bool) -> Any:
    """The prompt of one line, of the type that its key promises."""
    if not isinstance(record, dict):
        raise InputError("not a JSON object")
    given = [key for key in ("prompt", "messages", "tokens") if key in record]
    if len(given) != 1:
        raise InputError('give exactly one of "prompt", "messages" and "tokens"')
    key, value = given[0], record[given[0]]
    if key == "prompt":
        if not isinstance(value, str):
            raise InputError('"prompt" must be a text')
        return [{"role": "user", "content": value}] if chat and value else value
    if not isinstance(value, list) or (key == "messages" and not all(isinstance(m, dict) for m in value)):
        raise InputError(f'"{key}" must be a list of ' + ("messages" if key == "messages" else "token ids"))
    return value


def _read_answers(path: Path, digests: list[str]) -> Bool[np.ndarray, "lines"]:
    """Which are answered already. A last line cut short by an interruption is removed."""
    done = np.zeros(len(digests), bool)
    if not path.exists():
        return done
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    start = content[len(whole) :][: len(_ANSWER_START)]
    if not _ANSWER_START.startswith(start):
        raise InputError(f"{path} does not end like the output of a job: choose another output")
    for number, line in enumerate(whole.split(b"\n")[:-1], 1):
        try:
            answer = json.loads(line)
            index, run = answer["index"], answer["run"]
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path}, line {number} is no answer of a job: choose another output") from None
        if not (isinstance(index, int) and 0 <= index < len(digests)) or run != digests[index]:
            raise InputError(
                f"{path}, line {number} was made from other prompts, model or settings: choose another output"
            )
        done[index] = True
    if len(whole) < len(content):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    return done


def _digest(settings: Mapping[str, Any], ids: list[int]) -> str:
    text = json.dumps([settings, ids], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
