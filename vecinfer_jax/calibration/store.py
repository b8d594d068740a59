"""Where calibrations are found: given, shipped with the project, or kept in the user's cache."""

import hashlib
import json
import re
import sys
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from vecinfer_jax import assets
from vecinfer_jax.caches.base import CacheMethod
from vecinfer_jax.calibration.artefact import Calibration, read_calibration, read_metadata
from vecinfer_jax.calibration.collect import SAMPLES, calibrate, text_of
from vecinfer_jax.errors import CalibrationError, CalibrationWarning, InputError, check_seed
from vecinfer_jax.models import LanguageModel


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
    calibrated on (`CacheMethod.fits_positions`) are calibrated on passages as long; a given calibration of shorter ones
    is used with a `CalibrationWarning`.
    `seed` asks for one made with that seed and `calibrate`'s defaults, so that seeds can be compared; without it any
    will do, also one made from more text.
    """
    if seed is not None:
        check_seed(seed)
    if not method.needs_calibration:
        return Calibration(tuple({} for _ in range(lm.config.num_layers)), {"method": method.calibration_key()})
    if calibration is not None:
        calibration.check(lm.fingerprint, method.calibration_key())
        if not _reaches(calibration.metadata, method, tokens):
            length = text_of(lm, method, tokens)[1]
            warnings.warn(
                f"sequences of {tokens:,} tokens, but {method.name} is calibrated on passages of "
                f"{calibration.metadata['passage_length']:,}: quality falls beyond them; calibrate with "
                f"passage_length={length}",
                CalibrationWarning,
                stacklevel=3,
            )
        return calibration
    found = find_calibration(lm, method, seed, tokens)
    if found is not None:
        return found
    passages, length = text_of(lm, method, tokens)
    destination = kept_directory(lm, method, seed, length)
    if progress:
        _say(
            f"no calibration of {lm.name} for {method.name} on passages of {length:,} tokens yet: calibrating once, "
            f"kept in {destination}"
        )
    made = calibrate(lm, method, passages=passages, passage_length=length, seed=seed or 0, progress=progress)
    try:
        made.save(destination, force=True)
    except InputError as error:
        _say(f"the calibration is used but not kept: {error}")
    return made


def _reaches(metadata: Mapping[str, Any], method: CacheMethod, tokens: int | None) -> bool:
    """Whether a calibration serves sequences of so many tokens."""
    length = metadata.get("passage_length")
    return tokens is None or length is None or tokens <= length or not method.fits_positions


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
    lengths = dict.fromkeys(min(length << i, lm.config.max_position) for i in range(32))  # longer ones serve, too
    kept = [kept_directory(lm, method, seed, each) for each in lengths]
    default = {"seed": seed, "passages": passages, "passage_length": length, "samples": SAMPLES}
    for directory in [*shipped(), *(each for each in kept if each.is_dir())]:
        try:
            metadata = read_metadata(directory)
            seeded = seed is None or {name: metadata.get(name) for name in default} == default
            ours = metadata["model"]["fingerprint"] == lm.fingerprint and metadata["method"] == key
            if ours and seeded and _reaches(metadata, method, tokens):
                return load_calibration(directory, lm, method)
        except CalibrationError as error:
            _say(f"passed over: {error}")
    return None


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
