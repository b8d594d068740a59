"""The errors a person can cause, each one line: what is wrong and what to do about it."""


class VecInferError(Exception):
    """Base of every error that the caller can put right; the command line prints it as one line."""


class UnsupportedModelError(VecInferError):
    """A configuration that is not implemented (and is never approximated)."""


class WeightsError(VecInferError):
    """Missing, unexpected, misshapen or unreadable weights."""


class AssetError(VecInferError):
    """Something to be fetched is unknown, could not be fetched, or is not what it should be."""


class CalibrationError(VecInferError):
    """A calibration artefact is missing, damaged, or belongs to another model or method."""


class CalibrationWarning(UserWarning):
    """A calibration is used for longer sequences than it was made from."""


class CapacityError(VecInferError):
    """More tokens than the cache, or the model, can hold."""


class InputError(VecInferError, ValueError):
    """An argument that makes no sense, named together with what would."""


def check_seed(seed: int) -> None:
    """Raises `InputError` for a seed that the random numbers cannot take."""
    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise InputError(f"seed={seed!r} must be a whole number from 0 to {2**32 - 1}")
