"""A task for the small random model: nothing is fetched, nothing takes long."""

import dataclasses
from typing import ClassVar

from tests import small
from vecinfer_jax.evaluation.cases import Case


@dataclasses.dataclass(frozen=True)
class StandIn:
    """Random prompts of different lengths; the first `generated` are answered. A text is worth its letters' share."""

    generated: int = 3
    lengths: tuple[int, ...] = (30, 22, 41, 17, 33)

    name: ClassVar[str] = "stand-in"

    def cases(self, lm) -> list[Case]:
        return [
            Case(
                prompt=tuple(small.prompts([n], seed=n)[0]),
                gold=tuple(small.prompts([4 + i], seed=i)[0]),
                answers=("a",),
                max_new_tokens=8 if i < self.generated else 0,
                labels={"length": n, "task": "even" if i % 2 == 0 else "odd", "depth": i / 4},
            )
            for i, n in enumerate(self.lengths)
        ]

    def judge(self, case: Case, text: str) -> float:
        return sum(c.isalpha() for c in text) / max(len(text), 1)
