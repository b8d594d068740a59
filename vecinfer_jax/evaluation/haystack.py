"""Text in which needles are hidden: Paul Graham's essays, as the needle-in-a-haystack tests use them."""

import functools
import json
import re

from vecinfer_jax import assets
from vecinfer_jax.errors import InputError

ESSAYS = "paul-graham-essays"

# A sentence ends at one of .!? (and a closing quote or bracket), before something that can begin one. The collected
# essays lack the white space between paragraphs, so that a small letter, a stop and a capital are an end as well.
_SENTENCE_END = re.compile(
    r"(?:(?<=[.!?])|(?<=[.!?][\"'\u201d\u2019)\]]))\s+(?=[\"'\u201c\u2018(\[]?[A-Z0-9])"
    r"|(?<=[a-z][.!?])(?=[A-Z])"
)


def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text, white space within them made single spaces.

    Raises `InputError` where there are none.
    """
    found = tuple(s for s in (s.strip() for s in _SENTENCE_END.split(" ".join(text.split()))) if s)
    if not found:
        raise InputError("the haystack is empty: give a text of some sentences")
    return found


@functools.cache
def essays() -> tuple[str, ...]:
    """Sentences of the essays, in their order; fetched on first use."""
    with assets.fetch(ESSAYS).open(encoding="utf-8") as file:
        return sentences(json.load(file)["text"])


def passage(haystack: tuple[str, ...], start: int, count: int) -> list[str]:
    """`count` sentences from `start` on; after the last comes the first again."""
    return [haystack[(start + i) % len(haystack)] for i in range(count)]


def slot_at(parts: list[str], depth: float) -> int:
    """Before which of `parts` something goes that is to stand at a depth (0 the beginning, 1 the end) of them all.

    The boundary between parts that is nearest by characters.
    """
    ends = [0]
    for part in parts:
        ends.append(ends[-1] + len(part) + 1)
    return min(range(len(ends)), key=lambda i: abs(ends[i] - depth * ends[-1]))
