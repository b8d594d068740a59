"""Formats of vector-quantised codes: how long sub-vectors are and how many bits their codes have."""

import dataclasses
import re

from pallas_kernels import packing
from vecinfer_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class CodeFormat:
    """dXbY: sub-vectors of X elements, Y-bit codes."""

    length: int
    code_bits: int

    @classmethod
    def parse(cls, text: str) -> "CodeFormat":
        match = re.fullmatch(r"d(1|2|4|8|16)b(\d+)", text)
        if match is None or not 1 <= int(match[2]) <= 16:
            raise InputError(f"code format {text!r} is not dXbY with X in 1, 2, 4, 8, 16 and Y from 1 to 16, like d4b8")
        return cls(int(match[1]), int(match[2]))

    def __str__(self) -> str:
        return f"d{self.length}b{self.code_bits}"

    @property
    def bits(self) -> float:
        """Bits per element."""
        return self.code_bits / self.length

    @property
    def entries(self) -> int:
        """Centroids of the codebook."""
        return 2**self.code_bits

    def bytes_per_token(self, head_dim: int) -> int:
        """Bytes of one token's codes in one KV head."""
        return packing.num_bytes(head_dim // self.length, self.code_bits)

    def check(self, which: str, head_dim: int) -> None:
        """Raises `InputError` unless heads of this width take whole codes and whole bytes; `which` names the format."""
        if head_dim % self.length or head_dim // self.length * self.code_bits % 8:
            raise InputError(f"{which} format {self} does not divide head_dim {head_dim} into whole bytes")


# VecInfer, section 4.1: average bits -> formats of keys and values.
PAPER_FORMATS: dict[float, tuple[str, str]] = {
    4: ("d2b8", "d2b8"),
    3: ("d4b12", "d4b12"),
    2: ("d4b8", "d4b8"),
    1.5: ("d8b12", "d8b12"),
    1.25: ("d8b12", "d8b8"),
    1: ("d8b8", "d8b8"),
}


def check_bits(method: str, bits: float) -> None:
    """Raises `InputError` unless `bits` is one of the paper's averages."""
    if bits not in PAPER_FORMATS:
        raise InputError(
            f"bits={bits} is not a {method} width; choose 4, 3, 2, 1.5, 1.25 or 1, or give key= and value="
        )
