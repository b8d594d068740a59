"""GGUF files, read by the `gguf` package; whatever it trips over becomes one line that names the file."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float32

from vecinfer_jax.errors import WeightsError

# Each string is two, each number one: 262,144 tokens with merges, scores and types come to about two million.
_MAX_HEADER_PARTS = 1 << 22


class GgufFile:
    """Metadata and tensors of one GGUF file; tensors are mapped, and read one at a time.

    metadata: what each field of the header holds: numbers, strings, lists of them.
    shapes:   row-major shape of each tensor.

    Raises `WeightsError`, naming the file, where it is not a GGUF file, breaks off early or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with np.errstate(over="raise"):  # an offset that wraps around would point into the header
                reader = _Reader(self.path)
            if reader.byte_order != "I":
                raise ValueError("the bytes of its numbers are in the other order")
            # Not kept: its fields have an array for each string, 200 MB for a vocabulary of 150,000.
            self.metadata: dict[str, Any] = {name: field.contents() for name, field in reader.fields.items()}
            self.shapes = {tensor.name: tuple(reversed(tensor.shape.tolist())) for tensor in reader.tensors}
            for name, shape in self.shapes.items():
                if not (shape and name.isprintable()):
                    raise ValueError(f"tensor {name!r} of shape {shape}")
            self._tensors = {tensor.name: tensor for tensor in reader.tensors}
        except OSError as error:
            raise WeightsError(f"{self.path} cannot be read: {error}") from None
        except EOFError:
            raise WeightsError(
                f"{self.path} is truncated or damaged: it describes more than its bytes hold; fetch it again"
            ) from None
        except Exception as error:  # of many kinds: the reader takes what it reads at its word
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise WeightsError(f"{self.path} is not a GGUF file that can be read ({reason}); fetch it again") from None

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.shapes

    def read(self, name: str) -> Float32[np.ndarray, "*shape"]:
        """float32 values of a tensor, in its row-major shape; they may be anything, also not finite."""
        tensor = self._tensors[name]
        try:
            with np.errstate(all="ignore"):
                values = gguf.dequantize(tensor.data, tensor.tensor_type)
        except NotImplementedError:
            raise WeightsError(
                f"{self.path}: tensor {name!r} is {tensor.tensor_type.name}, which the gguf package cannot "
                "dequantise; use a file of another quantisation"
            ) from None
        # A copy: float32 is not dequantised, and a view of the mapped file must not become a parameter.
        return np.array(values, np.float32)


class _Reader(gguf.GGUFReader):
    """The package's reader, which alone would take less than it asked for at the end of a file, and loop through
    whatever number of values a damaged header claims.
    """

    data: Any
    _parts = 0

    def _get(self, offset: int, dtype: Any, count: int = 1, override_order: Any = None) -> np.ndarray:
        if isinstance(self.data, np.memmap):
            self.data = self.data.view(np.ndarray)  # still mapped; views of it are made three times faster
        if offset + np.dtype(dtype).itemsize * int(count) > self.data.size:
            raise EOFError
        self._parts += 1
        if self._parts > _MAX_HEADER_PARTS:
            raise ValueError(f"its header has more than {_MAX_HEADER_PARTS} parts")
        return super()._get(offset, dtype, count, override_order)
