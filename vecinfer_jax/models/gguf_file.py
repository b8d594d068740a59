"""Reads GGUF files: the header here, the quantised blocks with the `gguf` package.

The package's own reader makes several numpy views for each string; a vocabulary of 150,000 tokens and as many
merges takes it about ten seconds. This one takes a fraction of a second and says where a file breaks off.
Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, versions 2 and 3, little-endian.
"""

import dataclasses
import math
import struct
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from jaxtyping import Float32

from vecinfer_jax.errors import WeightsError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MAX_DIMENSIONS = 8


@dataclasses.dataclass(frozen=True)
class GgufTensor:
    """Where a tensor lies: row-major shape, quantisation type, first and past-the-last byte in the file."""

    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    start: int
    stop: int


class GgufFile:
    """Metadata and tensors of one GGUF file; tensors are mapped, and read one at a time.

    Raises `WeightsError`, naming the file, where it is not a GGUF file, breaks off early or is damaged.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._bytes = np.memmap(self.path, np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise WeightsError(f"{self.path} cannot be read: {error}") from None
        cursor = _Cursor(self._bytes, self.path)
        if cursor.take(4) != b"GGUF":
            raise WeightsError(f"{self.path} is not a GGUF file")
        version = cursor.scalar("I")
        if version not in (2, 3):
            raise WeightsError(f"{self.path} is GGUF version {version}; versions 2 and 3 can be read")
        tensor_count, field_count = cursor.scalar("Q"), cursor.scalar("Q")
        try:
            self.metadata: dict[str, Any] = {}
            for _ in range(field_count):
                name = cursor.string()
                self.metadata[name] = cursor.value(cursor.scalar("I"))
            self.tensors = self._tensor_table(cursor, tensor_count)
        except (UnicodeDecodeError, KeyError, ValueError, OverflowError) as error:
            raise WeightsError(f"{self.path} is damaged near byte {cursor.position}: {error}") from None

    def _tensor_table(self, cursor: "_Cursor", count: int) -> dict[str, GgufTensor]:
        rows = []
        for _ in range(count):
            name = cursor.string()
            dimensions = cursor.scalar("I")
            if dimensions > _MAX_DIMENSIONS:
                raise ValueError(f"tensor {name!r} has {dimensions} dimensions")
            shape = tuple(reversed([cursor.scalar("Q") for _ in range(dimensions)]))
            rows.append((name, shape, gguf.GGMLQuantizationType(cursor.scalar("I")), cursor.scalar("Q")))
        alignment = int(self.metadata.get("general.alignment", gguf.GGUF_DEFAULT_ALIGNMENT))
        if alignment < 1:
            raise ValueError(f"general.alignment is {alignment}")
        data = -(-cursor.position // alignment) * alignment
        table = {}
        for name, shape, kind, offset in rows:
            block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
            elements = math.prod(shape)
            if name in table or not shape or shape[-1] % block:
                raise ValueError(f"the entry of tensor {name!r} is not valid")
            start, stop = data + offset, data + offset + elements // block * block_bytes
            if stop > self._bytes.size:
                raise WeightsError(
                    f"{self.path} is truncated: tensor {name!r} ends at byte {stop}, the file at "
                    f"{self._bytes.size}; fetch it again"
                )
            table[name] = GgufTensor(shape, kind, start, stop)
        return table

    def __contains__(self, tensor: str) -> bool:
        return tensor in self.tensors

    def read(self, name: str) -> Float32[np.ndarray, "*shape"]:
        """float32 values of a tensor, in its row-major shape."""
        tensor = self.tensors[name]
        raw = self._bytes[tensor.start : tensor.stop]
        rows = raw.reshape(*tensor.shape[:-1], -1)
        try:
            values = gguf.dequantize(rows, tensor.kind)
        except NotImplementedError:
            raise WeightsError(
                f"{self.path}: tensor {name!r} is {tensor.kind.name}, which the gguf package cannot "
                "dequantise; use a file of another quantisation"
            ) from None
        # A copy: float32 is not dequantised, and a view of the mapped file must not become a parameter.
        return np.array(values, np.float32).reshape(tensor.shape)


class _Cursor:
    """Walks the header; a read past the end is a truncated file."""

    def __init__(self, data: np.ndarray, path: Path) -> None:
        self.position = 0
        self._data, self._path = data, path

    def take(self, count: int) -> bytes:
        end = self.position + count
        if count < 0 or end > self._data.size:
            raise WeightsError(f"{self._path} is truncated: its header breaks off; fetch it again")
        piece = self._data[self.position : end].tobytes()
        self.position = end
        return piece

    def scalar(self, code: str) -> Any:
        code = "<" + code
        return struct.unpack(code, self.take(struct.calcsize(code)))[0]

    def string(self) -> str:
        return self.take(self.scalar("Q")).decode("utf-8")

    def value(self, kind: int) -> Any:
        """A scalar, a string, a list of strings, or a numpy array of scalars."""
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        item, count = self.scalar("I"), self.scalar("Q")
        if item == _STRING:
            return self._strings(count)
        if item == _ARRAY:
            return [self.value(_ARRAY) for _ in range(count)]
        dtype = np.dtype(_SCALARS[item]).newbyteorder("<")
        return np.frombuffer(self.take(count * dtype.itemsize), dtype)

    def _strings(self, count: int) -> list[str]:
        buffer, position, out = memoryview(self._data), self.position, []
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            try:
                (length,) = unpack(buffer, position)
            except struct.error:
                length = self._data.size
            end = position + 8 + length
            if end > self._data.size:
                raise WeightsError(f"{self._path} is truncated: its header breaks off; fetch it again")
            out.append(str(buffer[position + 8 : end], "utf-8"))
            position = end
        self.position = position
        return out
