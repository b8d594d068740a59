"""Needle cases: the same every time, never too long, the needle where it is said to be."""

import pytest

from tests.small import model
from vecinfer_jax.errors import AssetError, CapacityError, InputError
from vecinfer_jax.evaluation import haystack
from vecinfer_jax.evaluation.cases import Case, largest, with_gold
from vecinfer_jax.evaluation.needle import NEEDLE, QUESTION, Needle
from vecinfer_jax.generation.generate import generate

HAY = " ".join(f"Line {'x' * (i % 9)} of the text says number {i}." for i in range(60))


def needle(**settings) -> Needle:
    return Needle(**{"lengths": (512, 1024), "depths": (0.0, 0.4, 1.0), "samples": 2, "haystack": HAY, **settings})


def text_of(case: Case) -> str:
    return model().tokenizer.decode(case.prompt)


def test_the_grid_is_whole_and_the_same_every_time():
    cases = needle().cases(model())
    assert cases == needle().cases(model())
    labels = [(case.labels["length"], case.labels["depth"], case.labels["sample"]) for case in cases]
    assert labels == [(n, d, s) for n in (512, 1024) for d in (0.0, 0.4, 1.0) for s in (0, 1)]
    assert len({case.answers for case in cases}) == len(cases)
    assert needle(seed=1).cases(model())[0] != cases[0]


def test_a_case_does_not_depend_on_the_rest_of_the_grid():
    assert needle(lengths=(1024,), depths=(0.4,)).cases(model()) == needle().cases(model())[8:10]


def test_prompts_fill_the_length_and_never_exceed_it():
    for case in needle().cases(model()):
        length = case.labels["length"]
        assert length - 64 < case.tokens <= length


def test_the_needle_is_at_its_depth_once():
    for case in needle(lengths=(1024,)).cases(model()):
        text = text_of(case)
        assert text.endswith(QUESTION)
        sentence = NEEDLE.format(value=case.answers[0])
        before, after = text.removesuffix(QUESTION).split(sentence)
        assert case.answers[0] not in before + after
        depth = len(before) / (len(before) + len(after))
        assert abs(depth - case.labels["depth"]) < 0.04
        if case.labels["depth"] in (0, 1):
            assert not (after if case.labels["depth"] else before)


def test_the_gold_is_the_number():
    for case in needle().cases(model()):
        assert model().tokenizer.decode(case.gold) == f" {case.answers[0]}"
        assert len(case.answers[0]) == 7


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" 1234567.", 1),
        ("It is 1,234,567, I think", 1),
        ("1234567", 1),
        ("1234567, 7654321", 1),
        ("12345678", 0),
        ("01234567", 0),
        ("1234 567", 0),
        ("123456", 0),
        ("", 0),
    ],
)
def test_an_answer_is_right_where_the_number_is_in_it(text, score):
    assert needle().judge(Case((), (), ("1234567",), 16, {}), text) == score


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": ()}, "lengths is empty"),
        ({"lengths": (0,)}, "length=0"),
        ({"depths": ()}, "depths is empty"),
        ({"depths": (1.5,)}, "depth=1.5"),
        ({"depths": (float("nan"),)}, "depth=nan"),
        ({"samples": 0}, "samples=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_settings_without_meaning_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        needle(**settings)


def test_lengths_that_cannot_be_are_refused():
    with pytest.raises(InputError, match="length=100 is too short"):
        needle(lengths=(100,)).cases(model())
    with pytest.raises(CapacityError, match="length=2048 exceeds the model's context of 1024"):
        needle(lengths=(2048,)).cases(model())
    with pytest.raises(InputError, match="the haystack is empty"):
        needle(haystack=" \n").cases(model())


def test_sentences_are_split_where_they_end():
    text = 'Pi is 3.14, e.g. here.\nA "quoted one." (Another!) Is it?Yes.No white space i.e. between.'
    assert haystack.sentences(text) == (
        "Pi is 3.14, e.g. here.",
        'A "quoted one."',
        "(Another!)",
        "Is it?",
        "Yes.",
        "No white space i.e. between.",
    )


def test_the_text_begins_again_after_its_end():
    assert haystack.passage(("a", "b", "c"), 2, 5) == ["c", "a", "b", "c", "a"]


def test_largest_tries_nothing_much_larger():
    for limit in range(1, 40):
        tried = []
        assert largest(lambda n: tried.append(n) or n <= limit, 1) == limit  # noqa: B023
        assert max(tried) <= 2 * limit + 1
        assert largest(lambda n: n <= limit, 1, 7) == min(limit, 7)  # noqa: B023
    assert largest(lambda n: False, 3) is None


def test_real_prompts_end_where_the_number_begins(smollm2):
    case = Needle(lengths=(256,), depths=(0.5,), samples=1, haystack=HAY).cases(smollm2)[0]
    prompt, gold = smollm2.tokenizer.decode(case.prompt), smollm2.tokenizer.decode(case.gold)
    assert gold == f" {case.answers[0]}"
    assert smollm2.tokenizer.encode(prompt + gold) == [*case.prompt, *case.gold]


def test_a_seam_inside_a_token_is_encoded_apart(smollm2):
    prompt, gold = with_gold(smollm2.tokenizer, "an answ", "er")
    assert smollm2.tokenizer.decode(prompt) == "an answ" and smollm2.tokenizer.decode(gold) == "er"


@pytest.mark.slow
def test_a_small_model_finds_the_needle(smollm2):
    task = Needle(lengths=(512,), samples=1)
    try:
        cases = task.cases(smollm2)
    except AssetError as error:
        pytest.skip(f"ESSAYS NOT TESTED: {error}")
    prompts = [list(case.prompt) for case in cases]
    texts = generate(smollm2, prompts, max_new_tokens=cases[0].max_new_tokens, progress=False).texts
    assert [task.judge(case, text) for case, text in zip(cases, texts, strict=True)] == [1.0] * 8
