"""A table of methods x tasks: run, kept row by row, resumed, reported.

A directory holds `rows/` (one JSON file per finished row, so that an interrupted run loses one row at most and several
processes may share the work), `calibrations/`, and what `report` makes of the rows: `results.json`, `report.md` and
plots.
"""

import dataclasses
import hashlib
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
from tqdm import tqdm

from vecinfer_jax.caches.base import CacheMethod
from vecinfer_jax.calibration.artefact import Calibration, read_calibration, versions
from vecinfer_jax.calibration.collect import DEFAULT_TEXT, PASSAGE_LENGTH, PASSAGES, SAMPLES, Activations, collect, fit
from vecinfer_jax.calibration.store import resolve_calibration
from vecinfer_jax.errors import CalibrationError, InputError
from vecinfer_jax.evaluation.answers import answer
from vecinfer_jax.evaluation.cases import Task, check_whole
from vecinfer_jax.evaluation.code_error import code_error
from vecinfer_jax.evaluation.gsm8k import GSM8K
from vecinfer_jax.evaluation.needle import Needle
from vecinfer_jax.evaluation.perplexity import check_prefill, full_precision_hidden, perplexity, text_windows
from vecinfer_jax.evaluation.ruler import Ruler
from vecinfer_jax.models import LanguageModel

FORMAT = 1
# What a row is known by.
IDENTITY = ("format", "model", "fingerprint", "dtype", "method", "task", "prefill", "seed", "calibration")
# `batch` cases of so many tokens are run at a time; longer windows of text are run fewer at a time.
CASE_TOKENS = 1024
# Texts longer than this stand in a row as a hash.
LONGEST_SETTING = 200


@dataclasses.dataclass(frozen=True)
class TextTask:
    """Windows of a UTF-8 text file: `windows` of `length` tokens from its start (all whole ones by default)."""

    path: Path
    length: int = 1024
    windows: int | None = None

    name: ClassVar[str] = "perplexity"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))

    def text(self) -> str:
        """The file's content. Raises `InputError`."""
        try:
            return self.path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {self.path}: {error}") from None


@dataclasses.dataclass(frozen=True)
class CodeErrorTask(TextTask):
    """Relative L2 error of keys and values read from codes, over the same windows of a text."""

    name: ClassVar[str] = "code-error"


# Names on the command line.
TASKS: dict[str, type] = {task.name: task for task in (TextTask, CodeErrorTask, Needle, Ruler, GSM8K)}


@dataclasses.dataclass(frozen=True)
class Row:
    """One cell of the table: a method on a task. `seed` is of the calibration; None where the method has none."""

    method: CacheMethod
    task: Any
    prefill: str
    seed: int | None


class Table:
    """Runs rows of one model and keeps them in a directory."""

    def __init__(
        self,
        lm: LanguageModel,
        directory: str | Path,
        *,
        passages: int = PASSAGES,
        passage_length: int = PASSAGE_LENGTH,
        samples: int = SAMPLES,
        repeated: float = 0.0,
        texts: Sequence[str] | None = None,
        text_name: str | None = None,
        batch: int = 8,
        progress: bool = True,
    ) -> None:
        """passages, passage_length, samples, repeated, texts: `calibrate`'s; a seed also shuffles `texts`.

        `text_name` says in the rows what `texts` are, beside their hash.
        """
        check_whole("batch", batch)
        self.lm, self.directory, self.batch, self.progress = lm, Path(directory), batch, progress
        self._calibrate: dict[str, Any] = {"passages": passages, "passage_length": passage_length, "samples": samples}
        self._calibrate |= {"repeated": repeated} if repeated else {}  # rows from before it was there mean the same
        self._texts = texts
        self._references: dict[Any, Any] = {}
        text = DEFAULT_TEXT
        if texts is not None:
            digest = hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]
            text = f"{text_name} {digest}" if text_name else digest
        self._calibrated_on = self._calibrate | {"text": text}
        self._kept: dict[Any, Any] = {}
        try:
            (self.directory / "rows").mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(f"cannot write {self.directory}: {error.strerror}") from None

    def run(self, rows: Iterable[Row]) -> int:
        """Runs those rows that the directory does not hold yet -> how many were run."""
        rows = list(rows)
        for row in rows:
            check_prefill(row.prefill)
        count = 0
        with tqdm(total=len(rows), desc="rows", disable=not self.progress) as bar:
            for row in rows:
                path = self.path(row)
                if not path.exists():  # another process may have finished it since
                    bar.set_postfix_str(f"{row.method.name} {row.task.name}")
                    _write(path, self._measure(row))
                    count += 1
                bar.update()
        return count

    def identity(self, row: Row) -> dict[str, Any]:
        """What a row was measured on: a row with an equal identity is not measured again."""
        return {
            "format": FORMAT,
            "model": self.lm.name,
            "fingerprint": self.lm.fingerprint,
            "dtype": str(np.dtype(self.lm.dtype)),
            "method": {"name": row.method.name} | _settings(row.method),
            "task": {"name": row.task.name} | _settings(row.task),
            "prefill": row.prefill,
            "seed": row.seed,
            "calibration": self._calibrated_on if row.method.needs_calibration else None,
        }

    def path(self, row: Row) -> Path:
        """Where a finished row is kept."""
        return self._path_of(self.identity(row))

    def _path_of(self, identity: Mapping[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
        return self.directory / "rows" / f"{identity['task']['name']}-{identity['method']['name']}-{digest}.json"

    def restore(self, rows: Iterable[Mapping[str, Any]]) -> int:
        """Puts rows from elsewhere (a `results.json`) among those that are there -> how many are this model's."""
        count = 0
        for content in rows:
            identity = {key: content[key] for key in IDENTITY}
            if identity["format"] == FORMAT and identity["fingerprint"] == self.lm.fingerprint:
                _write(self._path_of(identity), content)
                count += 1
        return count

    def _measure(self, row: Row) -> dict[str, Any]:
        calibration = self._calibration(row)
        begin = time.perf_counter()
        result = self._result(row, calibration)
        return self.identity(row) | {
            "result": dataclasses.asdict(result),
            "seconds": round(time.perf_counter() - begin, 1),
            "calibration_digest": calibration.digest if row.method.needs_calibration else None,
            "device": jax.devices()[0].device_kind,
            "versions": versions(),
        }

    def _result(self, row: Row, calibration: Calibration) -> Any:
        lm, task = self.lm, row.task
        if isinstance(task, TextTask):
            text = task.text()
            batch = max(self.batch * CASE_TOKENS // task.length, 1)
            if isinstance(task, CodeErrorTask):
                windows = text_windows(lm, text, task.length, task.windows)
                return code_error(lm, row.method, calibration, windows, progress=False)

            def reference() -> Any:
                windows = text_windows(lm, text, task.length, task.windows)
                return full_precision_hidden(lm, windows, batch=batch, progress=False)

            return perplexity(
                lm,
                row.method,
                calibration,
                text,
                length=task.length,
                windows=task.windows,
                prefill=row.prefill,
                batch=batch,
                reference=self._kept_for(("reference", task), reference),
                progress=False,
            )
        cases = self._kept_for(("cases", task), lambda: task.cases(lm))
        options: dict[str, Any] = {"prefill": row.prefill, "batch": self.batch, "cases": cases}
        return answer(lm, task, row.method, calibration, progress=False, **options)

    def _calibration(self, row: Row) -> Calibration:
        if not row.method.needs_calibration:
            return resolve_calibration(self.lm, row.method)
        key = json.dumps([row.method.calibration_key(), row.seed, self._calibrated_on], sort_keys=True)
        dtype = np.dtype(self.lm.dtype)
        digest = hashlib.sha256(f"{self.lm.fingerprint} {dtype} {key}".encode()).hexdigest()[:12]
        directory = self.directory / "calibrations" / f"{row.method.name}-{digest}"

        def make() -> Calibration:
            if directory.exists():
                try:
                    kept = read_calibration(directory)
                    kept.check(self.lm.fingerprint, row.method.calibration_key())
                    return kept
                except CalibrationError:
                    pass  # damaged: made again
            seed = row.seed or 0
            activations = self._activations(seed, row.method.wanted_statistics())
            made = fit(self.lm, row.method, activations, progress=False)
            made.save(directory, force=True)
            return made

        return self._once(("calibration", digest), make)

    def _activations(self, seed: int, wanted: frozenset[str]) -> Activations:
        """With more, which changes nothing else, where a method before wanted more."""
        _, held_seed, held = self._kept.get("activations", (None,))[0] or (None, None, frozenset())
        if held_seed == seed and wanted <= held:
            wanted = held
        return self._once(("activations", seed, wanted), lambda: self._collect(seed, wanted))

    def _collect(self, seed: int, wanted: frozenset[str]) -> Activations:
        texts = self._texts
        if texts is not None:
            texts = [texts[i] for i in np.random.default_rng(seed).permutation(len(texts))]
        return collect(self.lm, texts, seed=seed, wanted=wanted, progress=False, **self._calibrate)

    def _kept_for(self, key: Any, make: Callable[[], Any]) -> Any:
        """What every method needs of a task."""
        if key not in self._references:
            self._references[key] = make()
        return self._references[key]

    def _once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The last thing made of a kind: rows that need the same stand together."""
        if self._kept.get(key[0], (None, None))[0] != key:
            self._kept[key[0]] = (key, make())
        return self._kept[key[0]][1]


def rows_of(
    methods: Sequence[CacheMethod], tasks: Sequence[Any], *, prefills: Sequence[str], seeds: Sequence[int]
) -> list[Row]:
    """Methods x tasks, in an order in which a seed's activations are collected and a calibration is made once."""
    rows = []
    for seed in seeds:
        for method in methods:
            for task, prefill in itertools.product(tasks, prefills):
                # How a text's prompt is read makes no difference to the error of the codes, nor to exact keys.
                how = "coded" if isinstance(task, CodeErrorTask) or method.name == "full" else prefill
                rows.append(Row(method, task, how, seed if method.needs_calibration else None))
    return list(dict.fromkeys(rows))


def _settings(instance: Any) -> dict[str, Any]:
    """A dataclass's fields as JSON; how a method's kernels run is none of its settings, a file is its content."""
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(instance):
        value = getattr(instance, field.metadata.get("meaning", field.name))  # of what may be left out
        if field.name in ("implementation", "interpret"):
            continue
        if field.metadata.get("later") and value == field.metadata.get("before", field.default):
            continue  # rows from before it was there mean the same
        if isinstance(value, Path):
            settings[field.name] = value.name
            try:
                settings[f"{field.name}_sha256"] = hashlib.sha256(value.read_bytes()).hexdigest()[:16]
            except OSError as error:
                raise InputError(f"cannot read {value}: {error.strerror}") from None
        elif isinstance(value, float) and value.is_integer():
            settings[field.name] = int(value)
        elif isinstance(value, str) and len(value) > LONGEST_SETTING:
            settings[f"{field.name}_sha256"] = hashlib.sha256(value.encode()).hexdigest()[:16]
        else:
            settings[field.name] = value if isinstance(value, int | float | str | None) else _jsonable(value)
    return settings


def _jsonable(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else repr(value)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    """Writes JSON so that the file is there whole or not at all."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=".", delete=False, encoding="utf-8") as file:
            json.dump(content, file, indent=1, ensure_ascii=False)
            file.write("\n")
        os.replace(file.name, path)
    except OSError as error:
        raise InputError(f"cannot write {path}: {error.strerror}") from None


def check_task(task: Any, lm: LanguageModel) -> None:
    """Raises `VecInferError` where a task cannot be run on a model, before anything else is."""
    if isinstance(task, TextTask):
        text_windows(lm, task.text(), task.length, task.windows)
    else:
        checked: Task = task
        checked.cases(lm)
