"""What retrieval and reasoning tasks have in common: a task makes cases and judges answers, and runs no model.

A case is measured in two ways. The gold continuation's log-likelihood, teacher-forced after the prompt, grades a
cache finely: it falls long before an answer is lost. The greedy answer, judged by the task, is what a user sees.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Protocol, runtime_checkable

from vecinfer_jax.errors import CapacityError, InputError
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class Case:
    """One question.

    prompt:         token ids, special tokens included.
    gold:           token ids of the gold continuation, scored by log-likelihood after the prompt.
    answers:        strings that judge a generated text.
    max_new_tokens: how many tokens of the greedy answer are generated; 0 where only the gold is scored.
    labels:         what a table or a heatmap groups by: length, depth, task, ...
    """

    prompt: tuple[int, ...]
    gold: tuple[int, ...]
    answers: tuple[str, ...]
    max_new_tokens: int
    labels: Mapping[str, Any]

    @property
    def generates(self) -> bool:
        """Whether an answer is generated, besides scoring the gold."""
        return self.max_new_tokens > 0

    @property
    def tokens(self) -> int:
        """Positions that the case may need: its prompt and the longer of gold and answer."""
        return len(self.prompt) + max(len(self.gold), self.max_new_tokens)


@runtime_checkable
class Task(Protocol):
    """A frozen dataclass whose fields are its settings."""

    name: ClassVar[str]

    def cases(self, lm: LanguageModel) -> list[Case]:
        """The same settings and the same tokenizer give the same cases.

        Raises `InputError` for settings that make no sense and `CapacityError` where a case would not fit the model.
        """
        ...

    def judge(self, case: Case, text: str) -> float:
        """How right a generated text is, 0 to 1."""
        ...


def tokenizer_of(lm: LanguageModel) -> Tokenizer:
    """The model's tokenizer. Raises `InputError` where it has none."""
    if lm.tokenizer is None:
        raise InputError(f"model {lm.name!r} has no tokenizer to write prompts with")
    return lm.tokenizer


def check_whole(name: str, value: Any, least: int = 1) -> None:
    """Raises `InputError` unless a setting is a whole number that is large enough."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InputError(f"{name}={value!r} must be a whole number, {least} or more")


def check_context(lm: LanguageModel, length: int) -> None:
    """Raises `CapacityError` where `length` tokens do not fit the model's context."""
    if length > lm.config.max_position:
        raise CapacityError(f"length={length} exceeds the model's context of {lm.config.max_position}")


def chat_prompt(tokenizer: Tokenizer, message: str, beginning: str = "") -> str:
    """The text, special tokens written out, in which a user says `message` and the answer begins with `beginning`."""
    return tokenizer.apply_chat_template([{"role": "user", "content": message}]) + beginning


def with_gold(
    tokenizer: Tokenizer, prompt: str, gold: str, add_special_tokens: bool = True
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids of a prompt, and those with which the tokenizer itself would continue it to spell `gold`."""
    ids = tokenizer.encode(prompt, add_special_tokens)
    whole = tokenizer.encode(prompt + gold, add_special_tokens)
    if whole[: len(ids)] != ids:  # a token spans the seam, or a special token ends the text: encode each by itself
        return tuple(ids), tuple(tokenizer.encode(gold, add_special_tokens=False))
    return tuple(ids), tuple(whole[len(ids) :])


def largest(fits: Callable[[int], bool], low: int, high: int | None = None) -> int | None:
    """The largest n from `low` (to `high`) with fits(n), for `fits` that turns from true to false once.

    None if not even `low` fits. Nothing much larger than what fits is ever tried.
    """
    if not fits(low):
        return None
    step = 1
    while True:
        above = low + step if high is None else min(low + step, high)
        if above <= low:
            return low
        if not fits(above):
            break
        low, step = above, 2 * step
    while low + 1 < above:
        middle = (low + above) // 2
        if fits(middle):
            low = middle
        else:
            above = middle
    return low
