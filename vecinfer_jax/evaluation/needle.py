"""Needle in a haystack (G. Kamradt, 2023), with the value that RULER gives it (arXiv 2404.06654, section 3): a
sentence with a seven-digit number, hidden at a given depth of a long text that has nothing to do with it.

The prompt is plain text to be continued, without a chat template, and ends with the beginning of the answer, so that
the number comes next: base and instruct models of 0.1B parameters find it, and what is lost is the cache's doing. The
number is the gold, and the greedy answer is right where the number is in it.
"""

import dataclasses
import math
import random
import re
from typing import ClassVar

from vecinfer_jax.errors import InputError, check_seed
from vecinfer_jax.evaluation import haystack as haystacks
from vecinfer_jax.evaluation.cases import Case, check_context, check_whole, largest, tokenizer_of, with_gold
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.tokenizer import Tokenizer

NEEDLE = "The special magic number is {value}."
QUESTION = "\n\nQuestion: What is the special magic number? Answer: The special magic number is"
DEPTHS = tuple(i / 7 for i in range(8))
DIGITS = 7
# A tokenizer may give every digit a token; the rest leaves room for words before the number.
NEW_TOKENS = 16


@dataclasses.dataclass(frozen=True)
class Needle:
    """A grid of depths and lengths; by default the 24 cases at 2,048 tokens that tables report.

    lengths:  tokens of prompt and answer together, at most; a prompt is filled with whole sentences.
    depths:   0 (the beginning of the text) to 1 (its end, right before the question); default eight, evenly.
    samples:  cases at each depth and length, each with its own number and its own part of the text.
    seed:     decides the numbers and the parts.
    haystack: the text to hide in; default: Paul Graham's essays, fetched on first use.

    A case is the same whatever other lengths and depths are asked for. Its labels: length, depth, sample.
    """

    lengths: tuple[int, ...] = (2048,)
    depths: tuple[float, ...] = DEPTHS
    samples: int = 3
    seed: int = 0
    haystack: str | None = dataclasses.field(default=None, repr=False)

    name: ClassVar[str] = "needle"

    def __post_init__(self) -> None:
        if not self.lengths:
            raise InputError("lengths is empty: give at least one, such as 2048")
        for length in self.lengths:
            check_whole("length", length)
        if not self.depths:
            raise InputError("depths is empty: give at least one, from 0 to 1")
        for depth in self.depths:
            if not (math.isfinite(depth) and 0 <= depth <= 1):
                raise InputError(f"depth={depth!r} must be from 0 (the beginning) to 1 (the end)")
        check_whole("samples", self.samples)
        check_seed(self.seed)

    def cases(self, lm: LanguageModel) -> list[Case]:
        """By length, then depth, then sample.

        Raises `InputError` where a length is too short for the needle and its question, `CapacityError` where it
        exceeds the model's context.
        """
        tokenizer = tokenizer_of(lm)
        for length in self.lengths:
            check_context(lm, length)
        hay = haystacks.essays() if self.haystack is None else haystacks.sentences(self.haystack)
        return [
            self._case(tokenizer, hay, length, depth, sample)
            for length in self.lengths
            for depth in self.depths
            for sample in range(self.samples)
        ]

    def judge(self, case: Case, text: str) -> float:
        """1 where the number, and not only a longer one that contains it, is in the text."""
        value = case.answers[0]
        return float(re.search(rf"(?<!\d)({value}|{int(value):,})(?!\d)", text) is not None)

    def _case(self, tokenizer: Tokenizer, hay: tuple[str, ...], length: int, depth: float, sample: int) -> Case:
        # Another number and another beginning in every cell of the grid: its cells are independent.
        rng = random.Random(f"needle {self.seed} {length} {depth:.6f} {sample}")
        value = str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
        start = rng.randrange(len(hay))

        def encode(count: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
            parts = haystacks.passage(hay, start, count)
            parts.insert(haystacks.slot_at(parts, depth), NEEDLE.format(value=value))
            return with_gold(tokenizer, " ".join(parts) + QUESTION, f" {value}")

        count = largest(lambda n: len(encode(n)[0]) + NEW_TOKENS <= length, 1)
        if count is None:
            raise InputError(f"length={length} is too short for a needle, a question and an answer: give more")
        prompt, gold = encode(count)
        labels = {"length": length, "depth": float(depth), "sample": sample}
        return Case(prompt, gold, (value,), NEW_TOKENS, labels)
