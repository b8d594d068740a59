"""RULER (Hsieh et al., 2024, arXiv 2404.06654): thirteen synthetic tasks of any length.

| tasks | section | what is asked |
| --- | --- | --- |
| niah_single_1 2 3 | 3.1 | a key's value, hidden in repeated sentences, in essays, or (a UUID) in essays |
| niah_multikey_1 2 3 | 3.1 | the value of one key among four, or as many as fill the text (2: numbers; 3: UUIDs) |
| niah_multivalue, niah_multiquery | 3.1 | all four values of a key; the values of four keys |
| vt | 3.2 | all variables that a chain of assignments gives one value |
| cwe, fwe | 3.3 | the ten common words of a list; the three most frequent coded words of a Zipf-like text |
| qa_1 qa_2 | 3.4 | a question about one (SQuAD) or two (HotpotQA) of many paragraphs |

Numbers, sizes and metrics are the paper's (appendices A and B); prompts are worded here. Each ends with the beginning
of the answer, as the paper's do, so that models which cannot follow a format can still answer. What differs: essays
begin at another sentence in every case, keys of a text are distinct, and where a HotpotQA question's ten paragraphs do
not fit, the two that answer it are kept.
"""

import dataclasses
import functools
import json
import math
import random
import re
import string
import uuid
from collections.abc import Callable
from typing import Any, ClassVar

from vecinfer_jax import assets
from vecinfer_jax.errors import InputError, check_seed
from vecinfer_jax.evaluation import haystack as haystacks
from vecinfer_jax.evaluation.cases import (
    Case,
    chat_prompt,
    check_context,
    check_whole,
    largest,
    tokenizer_of,
    with_gold,
)
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.tokenizer import Tokenizer

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
# From here on a list of words repeats each more often (appendix B).
LONG = 4096
# Of writing a case that fits: a question's own paragraphs may be too long.
ATTEMPTS = 8
_WORD = re.compile(r"[a-z]+(-[a-z]+)*")


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt in words.

    message: what is asked, with its context. beginning: of the answer; belongs to the prompt. gold: how the answer
    goes on. answers: what it is judged by.
    """

    message: str
    beginning: str
    gold: str
    answers: tuple[str, ...]


# Writes a question of some size (sentences, lines, words, paragraphs), given all its random numbers and the length
# in tokens aimed at. The same numbers give the same answers at any size. None: larger than there is material for.
Writer = Callable[[random.Random, int, int], Question | None]


@dataclasses.dataclass(frozen=True)
class _Kind:
    """How a task is written, its smallest size, the tokens of its answer (appendix B), and whether one of the answers
    is enough (else their fraction counts)."""

    write: Writer
    smallest: int
    new_tokens: int
    any_answer: bool = False


@dataclasses.dataclass(frozen=True)
class Ruler:
    """RULER's tasks at one length.

    tasks:   names, in the order of the cases.
    length:  tokens of prompt and answer together, at most; a prompt is filled with whole sentences, words, ...
    samples: cases of each task.
    seed:    decides all that is random.
    chat:    whether the question goes through the model's chat template, after which the answer begins; if not, the
             prompt is text to be continued. Default: where the model has one.

    A case is the same whatever other tasks are asked for. Its labels: task, length, sample.
    """

    tasks: tuple[str, ...] = ()
    length: int = 4096
    samples: int = 20
    seed: int = 0
    chat: bool | None = None

    name: ClassVar[str] = "ruler"

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(self.tasks) or TASKS)
        for task in self.tasks:
            if task not in _KINDS:
                raise InputError(f"RULER has no task {task!r}; it has {', '.join(TASKS)}")
        check_whole("length", self.length)
        check_whole("samples", self.samples)
        check_seed(self.seed)

    def cases(self, lm: LanguageModel) -> list[Case]:
        """By task, then sample.

        Raises `InputError` where the length is too short for a task, `CapacityError` where it exceeds the model's
        context.
        """
        tokenizer = tokenizer_of(lm)
        check_context(lm, self.length)
        return [self._case(tokenizer, task, sample) for task in self.tasks for sample in range(self.samples)]

    def judge(self, case: Case, text: str) -> float:
        """The fraction of the answers that the text contains, in any case of letters; for questions about paragraphs,
        1 where it contains one of them."""
        text = text.lower()
        found = [answer.lower() in text for answer in case.answers]
        return float(any(found)) if _KINDS[case.labels["task"]].any_answer else sum(found) / len(found)

    def _case(self, tokenizer: Tokenizer, task: str, sample: int) -> Case:
        kind = _KINDS[task]
        chat = tokenizer.template is not None if self.chat is None else self.chat
        labels = {"task": task, "length": self.length, "sample": sample}

        def write(attempt: int, size: int) -> Case | None:
            rng = random.Random(f"ruler {self.seed} {task} {self.length} {sample} {attempt}")
            question = kind.write(rng, self.length, size)
            if question is None:
                return None
            if chat:
                prompt = chat_prompt(tokenizer, question.message, question.beginning)
            else:
                prompt = f"{question.message} {question.beginning}"
            ids, gold = with_gold(tokenizer, prompt, question.gold, add_special_tokens=not chat)
            return Case(ids, gold, question.answers, kind.new_tokens, labels)

        def fits(attempt: int, size: int) -> bool:
            case = write(attempt, size)
            return case is not None and case.tokens <= self.length

        for attempt in range(ATTEMPTS):
            size = largest(functools.partial(fits, attempt), kind.smallest)
            case = None if size is None else write(attempt, size)
            if case is not None:
                return case
        raise InputError(f"length={self.length} is too short for {task}: give more, or leave the task out")


@functools.cache
def words(*parts: str) -> tuple[str, ...]:
    """English words of the kinds nouns, adjectives and verbs, in the order of the alphabet; fetched on first use."""
    lines = [line for part in parts for line in assets.fetch(f"english-{part}").read_text("utf-8").split("\n")]
    return tuple(sorted({line for line in lines if _WORD.fullmatch(line)}))


# Needles (3.1) ------------------------------------------------------------------------------------------------------


def _number(rng: random.Random) -> str:
    return str(rng.randrange(10**6, 10**7))


def _uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))


def _two_words(rng: random.Random) -> str:
    return f"{rng.choice(words('adjectives'))}-{rng.choice(words('nouns'))}"


def _distinct(draw: Callable[[random.Random], str], rng: random.Random, count: int, taken: set[str]) -> list[str]:
    """`count` strings that are not in `taken`; they are then."""
    found: list[str] = []
    while len(found) < count:
        text = draw(rng)
        if text not in taken:
            taken.add(text)
            found.append(text)
    return found


@dataclasses.dataclass(frozen=True)
class _Niah:
    """Needles of a key and a value each. `hay`: "noise", "essays", or "needles" with other keys."""

    hay: str = "essays"
    key: Callable[[random.Random], str] = _two_words
    value: Callable[[random.Random], str] = _number
    keys: int = 1
    values: int = 1
    queries: int = 1

    def __call__(self, rng: random.Random, length: int, size: int) -> Question:
        what = "uuid" if self.value is _uuid else "number"
        taken: set[str] = set()
        keys = _distinct(self.key, rng, self.keys, taken)
        pairs = [(key, value) for key in keys for value in _distinct(self.value, rng, self.values, taken)]
        asked = rng.sample(keys, self.queries)
        rng.shuffle(pairs)
        context = self._context(rng, size, pairs, what, taken)

        answers = tuple(value for key in asked for k, value in pairs if k == key)
        many = "s" if len(answers) > 1 else ""
        of = f"special magic {what}{many} for {_listed(asked)} mentioned in the provided text"
        message = (
            f"The text below hides {f'some special magic {what}s' if many else f'a special magic {what}'}. "
            f"Memorize {'them' if many else 'it'}: I will ask you for {'them' if many else 'it'} afterwards.\n"
            f"{context}\nWhat {'are all' if many else 'is'} the {of}?"
        )
        # With the needles' colon, because a model writes it before the value otherwise.
        beginning = f"The {of} {'are' if many else 'is'}:"
        return Question(message, beginning, f" {_listed(answers)}", answers)

    def _context(self, rng: random.Random, size: int, pairs: list[tuple[str, str]], what: str, taken: set[str]) -> str:
        def needle(key: str, value: str) -> str:
            return f"One of the special magic {what}s for {key} is: {value}."

        needles = [needle(key, value) for key, value in pairs]
        if self.hay == "essays":
            # Forty depths, none of them twice.
            depths = sorted((i / 39 for i in rng.sample(range(40), len(needles))), reverse=True)
            essays = haystacks.essays()
            parts = haystacks.passage(essays, rng.randrange(len(essays)), size)
            slots = [haystacks.slot_at(parts, depth) for depth in depths]
        else:
            places = [rng.random() for _ in needles]
            if self.hay == "noise":
                parts = [NOISE] * size
            else:
                others, values = (_distinct(draw, rng, size, taken) for draw in (self.key, self.value))
                parts = [needle(key, value) for key, value in zip(others, values, strict=True)]
            slots = sorted((round(place * size) for place in places), reverse=True)
        # The deepest first, so that the others' places stay: needles appear in the order of the pairs.
        for slot, sentence in zip(slots, reversed(needles), strict=True):
            parts.insert(slot, sentence)
        return (" " if self.hay == "essays" else "\n").join(parts)


def _listed(texts: list[str] | tuple[str, ...]) -> str:
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])}, and {texts[-1]}"


# Tracing variables (3.2) --------------------------------------------------------------------------------------------

HOPS = 4


def _variables(rng: random.Random, length: int, size: int) -> Question:
    """One chain of assignments among `size` lines of noise, after a short example."""

    def chain(letters: int, lines: int) -> tuple[str, str, list[str]]:
        names = _distinct(lambda r: "".join(r.choices(string.ascii_uppercase, k=letters)), rng, HOPS + 1, set())
        value = str(rng.randrange(10000, 100000))
        assigned = [value, *(f"VAR {name}" for name in names)]
        parts = [NOISE] * lines
        slots = sorted(rng.sample(range(max(lines, HOPS + 1)), HOPS + 1))
        for already, slot in enumerate(slots):
            parts.insert(slot + already, f"VAR {names[already]} = {assigned[already]}")
        message = (
            "Memorize and track the variables that the following text assigns values to.\n\n"
            + "\n".join(parts)
            + f"\nQuestion: Which variables are assigned the value {value} in the text above? Find all of them."
        )
        beginning = (
            f"Answer: According to the assignments in the text above, {HOPS + 1} variables are assigned the value "
            f"{value}, they are:"
        )
        return message, beginning, names

    # The example first: its text must not depend on the size.
    message, beginning, names = chain(3, HOPS + 1)
    example = f"{message} {beginning} {' '.join(names)}\n\n"
    message, beginning, names = chain(5, size)
    return Question(example + message, beginning, f" {' '.join(names)}", tuple(names))


# Counting words (3.3) -----------------------------------------------------------------------------------------------

COMMON = 10


def _common_words(rng: random.Random, length: int, size: int) -> Question | None:
    """A numbered list of `size` different words, ten of them more often than the others, after a short example."""
    vocabulary = words("nouns", "adjectives", "verbs")
    if size > len(vocabulary):
        return None

    def listed(texts: list[str]) -> str:
        return " ".join(f"{i}. {text}" for i, text in enumerate(texts, 1))

    def one(different: int, often: int, seldom: int) -> tuple[str, str, list[str]]:
        chosen = _distinct(lambda r: r.choice(vocabulary), rng, different, set())
        common = chosen[:COMMON]
        everything = common * often + chosen[COMMON:] * seldom
        rng.shuffle(everything)
        message = (
            "Below is a numbered list of words, some of which appear more often than others. Memorize those that "
            f"appear most often.\n{listed(everything)}\nQuestion: What are the {COMMON} most common words in the above "
            "list?"
        )
        return message, f"Answer: The top {COMMON} words that appear most often in the list are:", common

    message, beginning, common = one(*((40, 10, 3) if length >= LONG else (20, 3, 1)))
    example = f"{message} {beginning} {listed(common)}\n"
    message, beginning, common = one(size, *((30, 3) if length >= LONG else (6, 1)))
    return Question(example + message, beginning, f" {listed(common)}", tuple(common))


def _frequent_words(rng: random.Random, length: int, size: int) -> Question:
    """About `size` coded words; the word of rank k appears size / (zeta(2) k²) times. The first rank is dots."""
    vocabulary = _distinct(lambda r: "".join(r.choices(string.ascii_lowercase, k=6)), rng, max(length // 50, 5), set())
    zeta = math.pi**2 / 6
    counts = [int(size / (zeta * rank**2)) for rank in range(1, len(vocabulary) + 1)]
    answers = vocabulary[1:4]
    everything = [word for word, count in zip(["...", *vocabulary[1:]], counts, strict=True) for _ in range(count)]
    rng.shuffle(everything)
    message = (
        "Read the following coded text and keep track of how often each coded word appears. Find the three that appear "
        f"most often.\n{' '.join(everything)}\nQuestion: Ignore the dots '...' and do not explain. What are the three "
        "most frequently appeared words in the above coded text?"
    )
    beginning = "Answer: According to the coded text above, the three most frequently appeared words are:"
    return Question(message, beginning, f" {_listed(answers)}", tuple(answers))


# Questions about paragraphs (3.4) -----------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Quiz:
    """paragraphs: all there are. questions: (question, answers, paragraphs that answer it, those that are alike), the
    paragraphs by their numbers."""

    paragraphs: tuple[str, ...]
    questions: tuple[tuple[str, tuple[str, ...], tuple[int, ...], tuple[int, ...]], ...]


@functools.cache
def squad() -> Quiz:
    """SQuAD 2.0's development set, without the questions that have no answer. Alike: of the same article."""
    with assets.fetch("squad-questions").open(encoding="utf-8") as file:
        articles = json.load(file)["data"]
    numbers: dict[str, int] = {}
    questions = []
    for article in articles:
        there = [numbers.setdefault(paragraph["context"], len(numbers)) for paragraph in article["paragraphs"]]
        for number, paragraph in zip(there, article["paragraphs"], strict=True):
            alike = tuple(other for other in there if other != number)
            for question in paragraph["qas"]:
                if not question["is_impossible"]:
                    answers = tuple(dict.fromkeys(answer["text"] for answer in question["answers"]))
                    questions.append((question["question"].strip(), answers, (number,), alike))
    return Quiz(tuple(numbers), tuple(questions))


@functools.cache
def hotpotqa() -> Quiz:
    """HotpotQA's development set. Alike: the eight that its authors chose to distract."""
    with assets.fetch("hotpotqa-paragraphs").open(encoding="utf-8") as file:
        entries: list[dict[str, Any]] = json.load(file)
    numbers: dict[str, int] = {}
    questions = []
    for entry in entries:
        supporting = {title for title, _ in entry["supporting_facts"]}
        answering: list[int] = []
        alike: list[int] = []
        for title, sentences in entry["context"]:
            number = numbers.setdefault(f"{title}\n{''.join(sentences)}", len(numbers))
            (answering if title in supporting else alike).append(number)
        questions.append((entry["question"].strip(), (entry["answer"],), tuple(answering), tuple(alike)))
    return Quiz(tuple(numbers), tuple(questions))


def _about(quiz: Callable[[], Quiz]) -> Writer:
    def write(rng: random.Random, length: int, size: int) -> Question | None:
        """`size` paragraphs besides those that answer the question: first those alike, then any."""
        paragraphs, questions = quiz().paragraphs, quiz().questions
        text, answers, answering, alike = rng.choice(questions)
        # Few paragraphs have less than sixteen tokens.
        anything = rng.sample(range(len(paragraphs)), min(len(paragraphs), length // 16 + 16))
        others = [*rng.sample(alike, len(alike)), *(n for n in anything if n not in {*answering, *alike})]
        if size > len(others):
            return None
        chosen = [*answering, *others[:size]]
        rng.shuffle(chosen)
        documents = "\n\n".join(f"Document {i}:\n{paragraphs[n]}" for i, n in enumerate(chosen, 1))
        rule = "Answer the question from the given documents. Give only the answer and no other words."
        message = f"{rule}\n\nThese are the documents.\n\n{documents}\n\n{rule}\n\nQuestion: {text}"
        return Question(message, "Answer:", f" {answers[0]}", answers)

    return write


_KINDS: dict[str, _Kind] = {
    "niah_single_1": _Kind(_Niah(hay="noise"), 1, 128),
    "niah_single_2": _Kind(_Niah(), 1, 128),
    "niah_single_3": _Kind(_Niah(value=_uuid), 1, 128),
    "niah_multikey_1": _Kind(_Niah(keys=4), 4, 128),
    "niah_multikey_2": _Kind(_Niah(hay="needles"), 1, 128),
    "niah_multikey_3": _Kind(_Niah(hay="needles", key=_uuid, value=_uuid), 1, 128),
    "niah_multivalue": _Kind(_Niah(values=4), 4, 128),
    "niah_multiquery": _Kind(_Niah(keys=4, queries=4), 4, 128),
    "vt": _Kind(_variables, HOPS + 1, 30),
    "cwe": _Kind(_common_words, COMMON + 1, 120),
    "fwe": _Kind(_frequent_words, 100, 50),
    "qa_1": _Kind(_about(lambda: squad()), 0, 32, any_answer=True),
    "qa_2": _Kind(_about(lambda: hotpotqa()), 0, 32, any_answer=True),
}
TASKS = tuple(_KINDS)
