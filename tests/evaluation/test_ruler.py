"""RULER's cases: never too long, the same every time, with their answers in the text."""

import collections
import dataclasses
import functools
import re

import pytest

from tests.small import letter_tokenizer, model
from vecinfer_jax.errors import AssetError, CapacityError, InputError
from vecinfer_jax.evaluation import haystack, ruler
from vecinfer_jax.evaluation.cases import Case
from vecinfer_jax.evaluation.ruler import NOISE, TASKS, Quiz, Ruler

LENGTH = 2500  # one token a letter
NIAH = tuple(task for task in TASKS if task.startswith("niah"))
WORDS = {
    "nouns": tuple(f"n{a}{b}{c}" for a in "abcdefgh" for b in "abcdefgh" for c in "abcdefgh"),
    "adjectives": tuple(f"a{a}{b}" for a in "abcdefgh" for b in "abcdefgh"),
    "verbs": ("go", "do"),
}
PARAGRAPHS = tuple(f"Paragraph {i} says that the colour of thing {i} is shade{i}x." for i in range(80))
QUIZ = Quiz(
    PARAGRAPHS,
    tuple((f"What colour is thing {i}?", (f"shade{i}x", f"Shade {i}"), (i,), (i - 1, i + 1)) for i in range(1, 40)),
)
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"


@pytest.fixture(autouse=True)
def material(monkeypatch):
    """Small stand-ins for what is fetched."""
    monkeypatch.setattr(ruler, "words", lambda *parts: tuple(word for part in parts for word in WORDS[part]))
    monkeypatch.setattr(ruler, "squad", lambda: QUIZ)
    monkeypatch.setattr(ruler, "hotpotqa", lambda: QUIZ)
    monkeypatch.setattr(haystack, "essays", lambda: tuple(f"This is sentence {i} of an essay." for i in range(70)))


def lm(template: str | None = None, context: int = 8192):
    small = model()
    return dataclasses.replace(
        small,
        tokenizer=dataclasses.replace(letter_tokenizer(), template=template),
        config=dataclasses.replace(small.config, max_position=context),
    )


@functools.cache
def cases(task: str, length: int = LENGTH, samples: int = 2, **settings) -> list[Case]:
    return Ruler((task,), length, samples, **settings).cases(lm())


def text_of(case: Case) -> str:
    return lm().tokenizer.decode(case.prompt)


def context_of(case: Case) -> str:
    """The prompt without its last question."""
    return text_of(case).rpartition("\n")[0]


@pytest.mark.parametrize("task", TASKS)
def test_cases_are_the_same_every_time_and_fill_the_length(task):
    made = cases(task)
    assert made == Ruler((task,), LENGTH, 2).cases(lm())
    assert [case.labels["sample"] for case in made] == [0, 1]
    for case in made:
        assert LENGTH - 300 < case.tokens <= LENGTH
        assert case.labels["task"] == task and case.labels["length"] == LENGTH
    other = cases(task, samples=1, seed=1)
    assert len({case.prompt for case in (*made, *other)}) == 3


@pytest.mark.parametrize("task", TASKS)
def test_the_gold_is_a_right_answer(task):
    for case in cases(task):
        gold = lm().tokenizer.decode(case.gold)
        assert Ruler().judge(case, gold) == 1 and Ruler().judge(case, gold.upper()) == 1
        assert Ruler().judge(case, "") == 0
        assert gold.startswith(" ") and not text_of(case).endswith(" ")


@pytest.mark.parametrize("task", NIAH)
def test_needles_are_in_the_text_with_their_keys(task):
    for case in cases(task):
        context, _, question = text_of(case).rpartition("\n")
        hidden = re.findall(r"One of the special magic \w+ for (\S+) is: (\S+)\.", context)
        asked = {key: [value for k, value in hidden if k == key] for key, _ in hidden if key in question}
        assert sorted(value for values in asked.values() for value in values) == sorted(case.answers)
        assert all(context.count(answer) == 1 for answer in case.answers)
        counts = {"niah_multikey_1": (4, 1, 1), "niah_multivalue": (4, 1, 4), "niah_multiquery": (4, 4, 1)}
        if task in ("niah_multikey_2", "niah_multikey_3"):
            assert len(hidden) > 10 and len(asked) == 1
            assert len({key for key, _ in hidden}) == len(hidden)
        else:
            needles, keys, values = counts.get(task, (1, 1, 1))
            assert len(hidden) == needles and len(asked) == keys
            assert all(len(found) == values for found in asked.values())


def test_values_are_numbers_or_uuids():
    assert all(re.fullmatch(r"\d{7}", case.answers[0]) for case in cases("niah_single_1"))
    uuid = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert all(re.fullmatch(uuid, case.answers[0]) for case in cases("niah_single_3") + cases("niah_multikey_3"))


def test_answers_are_in_the_order_that_the_gold_has():
    case = cases("niah_multiquery")[0]
    question = text_of(case).rpartition("\n")[2]
    needles = dict(re.findall(r"for (\S+) is: (\S+)\.", context_of(case)))
    keys = sorted(needles, key=question.index)
    assert [needles[key] for key in keys] == list(case.answers)
    case = cases("niah_multivalue")[0]
    assert [value for _, value in re.findall(r"for (\S+) is: (\S+)\.", context_of(case))] == list(case.answers)


def test_variables_lead_back_to_the_value():
    for case in cases("vt"):
        text = text_of(case)
        value = re.findall(r"assigned the value (\d+)", text)[-1]
        assigned = dict(re.findall(r"^VAR ([A-Z]+) = (.*)$", text, re.MULTILINE))
        assert len(assigned) == 10  # five of the example, five of the question
        found = [name for name, source in assigned.items() if source == value]
        while names := [name for name, source in assigned.items() if source == f"VAR {found[-1]}"]:
            found += names
        assert tuple(found) == case.answers and len(found) == 5
        assert NOISE in text


@pytest.mark.parametrize(("length", "often", "seldom"), [(2500, 6, 1), (8000, 30, 3)])
def test_common_words_are_the_most_common(length, often, seldom):
    case = cases("cwe", length, 1)[0]
    listed = re.findall(r"\d+\. (\w+)", text_of(case).rpartition("Below is")[2])
    counts = collections.Counter(listed)
    assert sorted(case.answers) == sorted(word for word, count in counts.items() if count == often)
    assert set(counts.values()) == {often, seldom} and len(case.answers) == 10


def test_the_list_of_words_ends_with_the_vocabulary(monkeypatch):
    monkeypatch.setattr(ruler, "words", lambda *parts: WORDS["nouns"][:30])
    (case,) = Ruler(("cwe",), 2500, 1).cases(lm())
    assert len(set(re.findall(r"\d+\. (\w+)", text_of(case).rpartition("Below is")[2]))) == 30


def test_frequent_words_are_the_most_frequent():
    for case in cases("fwe"):
        words = collections.Counter(re.findall(r"\b[a-z]{6}\b|\.{3}", text_of(case).split("\n")[1]))
        assert [word for word, _ in words.most_common(4)] == ["...", *case.answers]
        ranked = [count for _, count in words.most_common(5)]
        assert len(set(ranked)) == 5


def test_questions_come_with_their_paragraphs_and_others():
    for case in cases("qa_1"):
        text = text_of(case)
        assert text.count(case.answers[0]) == 1
        shown = [int(i) for i in re.findall(r"Paragraph (\d+) says", text)]
        number = int(re.search(r"What colour is thing (\d+)\?", text)[1])
        assert {number - 1, number, number + 1} < set(shown) and len(set(shown)) == len(shown)
        assert shown != sorted(shown)


def test_without_room_only_what_answers_stays():
    (case,) = cases("qa_2", 390, 1)
    assert len(re.findall(r"Document \d+", text_of(case))) == 1


def test_a_question_whose_paragraphs_are_too_long_is_passed_over(monkeypatch):
    questions = (("Long?", ("a",), (0,), ()), ("Short?", ("b",), (1,), ()))
    monkeypatch.setattr(ruler, "squad", lambda: Quiz(("x" * 9000, "b"), questions))
    made = Ruler(("qa_1",), LENGTH, 6).cases(lm())
    assert {case.answers for case in made} == {("b",)}


def test_one_answer_is_enough_for_questions_and_not_for_lists():
    def judge(task, text):
        return Ruler().judge(Case((), (), ("Denver", "Denver Broncos"), 1, {"task": task}), text)

    assert judge("qa_1", "the denver team") == 1 and judge("qa_2", "none") == 0
    assert judge("cwe", "the denver team") == 0.5 and judge("cwe", "Denver Broncos") == 1


def test_a_case_does_not_depend_on_the_other_tasks():
    together = Ruler(("fwe", "vt"), LENGTH, 1).cases(lm())
    assert together == cases("fwe")[:1] + cases("vt")[:1]
    assert Ruler().tasks == TASKS and len(TASKS) == 13


def test_the_chat_template_is_put_around_the_question():
    (case,) = Ruler(("vt",), LENGTH, 1).cases(lm(TEMPLATE))
    text = text_of(case)
    assert text.startswith("<user>Memorize") and "Find all of them.</><assistant>Answer: According" in text
    assert case.tokens <= LENGTH
    with pytest.raises(InputError, match="no chat template"):
        Ruler(("vt",), LENGTH, 1, chat=True).cases(lm())
    plain = Ruler(("vt",), LENGTH, 1, chat=False)
    assert plain.cases(lm(TEMPLATE)) == plain.cases(lm()) == cases("vt")[:1]


@pytest.mark.parametrize("task", TASKS)
def test_too_short_a_length_names_the_task(task):
    with pytest.raises(InputError, match=f"length=150 is too short for {task}"):
        cases(task, 150)


def test_settings_without_meaning_are_refused():
    with pytest.raises(InputError, match="no task 'niah'; it has niah_single_1"):
        Ruler(("niah",))
    for settings in ({"length": 0}, {"samples": 0}, {"seed": -1}):
        with pytest.raises(InputError, match=next(iter(settings))):
            Ruler(**settings)
    with pytest.raises(CapacityError, match="length=9000 exceeds the model's context of 8192"):
        cases("vt", 9000)


def test_real_material_is_what_it_should_be(monkeypatch):
    monkeypatch.undo()
    try:
        nouns, everything = ruler.words("nouns"), ruler.words("nouns", "adjectives", "verbs")
        quiz = ruler.squad()
    except AssetError as error:
        pytest.skip(f"REAL TEXTS NOT TESTED: {error}")
    assert len(nouns) > 6000 and set(nouns) < set(everything) and "contact lens" not in nouns
    assert len(quiz.questions) == 5928 and len(quiz.paragraphs) == 1204
    for _, answers, answering, alike in quiz.questions:
        assert all(any(answer in quiz.paragraphs[n] for n in answering) for answer in answers)
        assert not set(answering) & set(alike)
