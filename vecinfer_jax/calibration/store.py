"""Where calibrations are found: given, shipped with the project, or kept in the user's cache."""

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from vecinfer_jax import assets
from vecinfer_jax.caches.base import CacheMethod
from vecinfer_jax.calibration.artefact import Calibration, read_calibration, read_metadata
from vecinfer_jax.calibration.collect import SAMPLES, calibrate, text_of
from vecinfer_jax.errors import AssetError, CalibrationError, CalibrationWarning, InputError, check_seed
from vecinfer_jax.models import LanguageModel

# Tokens that are run at a time where passages are long.
BATCH_TOKENS = 2**14


def load_calibration(directory: str | Path, lm: LanguageModel, method: CacheMethod | None = None) -> Calibration:
    """Reads an artefact made from `lm` (and, if given, for `method`); any other is refused.

    Raises `CalibrationError`.
    """
    calibration = read_calibration(directory)
    key = calibration.method_key if method is None else method.calibration_key()
    calibration.check(lm.fingerprint, key)
    return calibration


def resolve_calibration(
    lm: LanguageModel,
    method: CacheMethod,
    calibration: Calibration | None = None,
    *,
    tokens: int | None = None,
    seed: int | None = None,
    progress: bool = True,
) -> Calibration:
    """The calibration to use: the given one (checked), a shipped or kept one, or one made now and kept.

    `tokens`: how long the longest sequence will be. Methods that serve no later positions than those they were
    calibrated on (`CacheMethod.bound_to_positions`) are calibrated on passages as long, up to 32,768 tokens. One of
    shorter passages that is given, or that is all there is where none can be made, is used with a `CalibrationWarning`.
    `seed` asks for one made with that seed and `calibrate`'s defaults, so that seeds can be compared; without it any
    will do, also one made from more text.
    """
    if seed is not None:
        check_seed(seed)
    tokens = None if tokens is None else min(tokens, lm.config.max_position)
    if not method.needs_calibration:
        return Calibration(tuple({} for _ in range(lm.config.num_layers)), {"method": method.calibration_key()})
    if calibration is not None:
        calibration.check(lm.fingerprint, method.calibration_key())
        return _reaching(calibration, lm, method, tokens)
    found = find_calibration(lm, method, seed, tokens)
    if found is not None:
        return _reaching(found, lm, method, tokens)
    if tokens is not None and _several_processes():  # where none can be made
        shorter = find_calibration(lm, method, seed)
        if shorter is not None:
            return _reaching(shorter, lm, method, tokens)
    passages, length = text_of(lm, method, tokens)
    destination = kept_directory(lm, method, seed, length)
    if progress:
        _say(
            f"no calibration of {lm.name} for {method.name} on passages of {length:,} tokens yet: calibrating once, "
            f"kept in {destination}"
        )
    batch = max(1, min(4, BATCH_TOKENS // length))
    try:
        made = calibrate(
            lm, method, passages=passages, passage_length=length, batch=batch, seed=seed or 0, progress=progress
        )
    except AssetError:  # no text
        shorter = None if tokens is None else find_calibration(lm, method, seed)
        if shorter is None:
            raise
        return _reaching(shorter, lm, method, tokens)
    try:
        made.save(destination, force=True)
    except InputError as error:
        _say(f"the calibration is used but not kept: {error}")
    return _reaching(made, lm, method, tokens)


def _reaching(calibration: Calibration, lm: LanguageModel, method: CacheMethod, tokens: int | None) -> Calibration:
    """The calibration, with a warning where it does not reach that far."""
    reach = calibration.metadata.get("longest_passage", calibration.metadata.get("passage_length"))
    if method.bound_to_positions and None not in (tokens, reach) and tokens > reach:
        passages, length = text_of(lm, method, tokens)
        warnings.warn(
            f"{method.name} is calibrated on passages of {reach:,} tokens, but {tokens:,} are "
            f"read: quality falls beyond; calibrate with passages={passages}, passage_length={length} or longer",
            CalibrationWarning,
            stacklevel=4,
        )
    return calibration


def find_calibration(
    lm: LanguageModel, method: CacheMethod, seed: int | None = None, tokens: int | None = None
) -> Calibration | None:
    """A shipped or kept artefact for this model and method (made with that seed, if one is given) that serves sequences
    of `tokens` tokens, or None.

    A damaged one is reported and passed over.
    """
    key = method.calibration_key()
    # What artefacts of different seeds have in common that can be compared.
    passages, length = text_of(lm, method, tokens)
    kept = kept_directory(lm, method, seed, length)
    needed = min(tokens, length) if tokens is not None and method.bound_to_positions else 0
    default: dict[str, Any] = {"seed": seed, "passages": passages, "passage_length": length, "samples": SAMPLES}
    default["repeated"] = method.calibration_repeated
    for directory in [*shipped(), *([kept] if kept.is_dir() else [])]:
        try:
            metadata = read_metadata(directory)
            made = {"repeated": 0.0} | metadata  # older ones do not say it
            seeded = seed is None or {name: made.get(name) for name in default} == default
            ours = metadata["model"]["fingerprint"] == lm.fingerprint and metadata["method"] == key
            if ours and seeded and metadata["passage_length"] >= needed:
                return load_calibration(directory, lm, method)
        except CalibrationError as error:
            _say(f"passed over: {error}")
    return None


def _several_processes() -> bool:
    return jax.process_count() > 1


def _say(message: str) -> None:
    print(message, file=sys.stderr)


def shipped() -> Iterator[Path]:
    """Artefacts that come with the project: inside an installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for root in (package / "checkpoints", package.parent / "checkpoints"):
        if root.is_dir():
            yield from sorted(path.parent for path in root.glob("*/*/metadata.json"))
            return


def kept_directory(lm: LanguageModel, method: CacheMethod, seed: int | None = None, length: int | None = None) -> Path:
    """Where the user's cache keeps the calibration of this model and method (and seed, where one is asked for) on
    passages of `length` tokens."""
    key = json.dumps(method.calibration_key(), sort_keys=True)
    digest = hashlib.sha256(key.encode()).hexdigest()[:8]
    suffix = f"-seed{seed}" if seed else ""
    suffix += f"-{length}" if length not in (None, text_of(lm, method)[1]) else ""
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", lm.name).strip("-.") or "model"
    return assets.cache_directory() / "calibrations" / f"{name}-{lm.fingerprint}" / f"{method.name}-{digest}{suffix}"
