"""GSM8K cases and the judging of what a model writes."""

import dataclasses
import json
from decimal import Decimal

import pytest

from tests.small import letter_tokenizer, model
from vecinfer_jax.errors import CapacityError, InputError
from vecinfer_jax.evaluation.cases import Case
from vecinfer_jax.evaluation.gsm8k import GSM8K, last_number, solution

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}<assistant>"
ANSWER = "He has 3*4=<<3*4=12>>12 pens.\nThey cost $<<12*100=1200>>1,200.\n#### 1,200"


def chat_model():
    """The small model, with a chat template."""
    return dataclasses.replace(model(), tokenizer=dataclasses.replace(letter_tokenizer(), template=TEMPLATE))


def problems(tmp_path, *lines) -> str:
    path = tmp_path / "problems.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return str(path)


def problem(i: int = 0, answer: str = ANSWER) -> dict[str, str]:
    return {"question": f"Question {i}: how much?", "answer": answer}


def test_the_gold_is_the_solution_without_calculator_marks(tmp_path):
    case = GSM8K(problems(tmp_path, problem())).cases(chat_model())[0]
    gold = chat_model().tokenizer.decode(case.gold)
    assert gold == "He has 3*4=12 pens.\nThey cost $1,200.\nThe answer is \\boxed{1,200}."
    assert case.answers == ("1,200",)
    prompt = chat_model().tokenizer.decode(case.prompt)
    assert prompt.startswith("<user>Question 0: how much?") and prompt.endswith("</><assistant>")
    assert GSM8K("").judge(case, gold) == 1


def test_some_are_generated_and_all_are_scored(tmp_path):
    path = problems(tmp_path, problem(0), "", problem(1), problem(2), problem(3))
    task = GSM8K(path, problems=3, generated=2, max_new_tokens=40)
    cases = task.cases(chat_model())
    assert [case.max_new_tokens for case in cases] == [40, 40, 0]
    assert [case.labels["problem"] for case in cases] == [1, 3, 4]
    assert all(case.gold for case in cases)
    assert cases == task.cases(chat_model())
    assert len(GSM8K(path).cases(chat_model())) == 4


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("The answer is 18.", "18"),
        ("#### 1,234", "1234"),
        ("so $1,234.50", "1234.5"),
        ("18.00 dollars", "18"),
        ("first 3, then 4", "4"),
        ("3,4", "4"),
        ("1,2345", "2345"),
        ("He lost -5", "-5"),
        ("a change of -$5", "-5"),
        ("a change of $-5", "-5"),
        ("a change of \u22125", "-5"),
        ("20-5", "5"),
        ("20 - 5", "5"),
        ("(2)-5", "5"),
        ("about .5.", "0.5"),
        ("\\boxed{42}", "42"),
        ("**42**", "42"),
        ("75%", "75"),
        ("1,000,000", "1000000"),
        ("10,000.", "10000"),
    ],
)
def test_the_last_number_is_read_as_people_write_it(text, number):
    assert last_number(text) == Decimal(number)


def test_a_text_without_numbers_is_wrong():
    assert last_number("no idea.") is None
    assert GSM8K("").judge(Case((), (), ("0",), 1, {}), "") == 0


@pytest.mark.parametrize(("text", "score"), [("So 1200.", 1), ("$1,200.00", 1), ("1200 of 1300", 0), ("-1200", 0)])
def test_an_answer_is_right_where_its_last_number_is(text, score):
    assert GSM8K("").judge(Case((), (), ("1,200",), 1, {}), text) == score


def test_a_solution_without_steps():
    assert solution("#### 7") == ("", "7")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2 of .* is not JSON"),
        ("[1]", "line 2 of .* is no problem"),
        ({"question": "Why?"}, "line 2 of .* is no problem"),
        ({"question": " ", "answer": "#### 1"}, "line 2 of .* is no problem"),
        ({"question": "Why?", "answer": "4"}, "line 2 of .* has no final answer"),
        ({"question": "Why?", "answer": "4 #### none"}, "line 2 of .* has no final answer"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = problems(tmp_path, problem(), line)
    with pytest.raises(InputError, match=message) as error:
        GSM8K(path).cases(chat_model())
    assert "\n" not in str(error.value)
    assert len(GSM8K(path, problems=1).cases(chat_model())) == 1


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"cannot be read from .*: No such file"):
        GSM8K(tmp_path / "none").cases(chat_model())
    with pytest.raises(InputError, match=r"cannot be read from .*: Is a directory"):
        GSM8K(tmp_path).cases(chat_model())
    with pytest.raises(InputError, match="has no problems"):
        GSM8K(problems(tmp_path, "")).cases(chat_model())
    (tmp_path / "latin").write_bytes(b"\xff\xfe\n")
    with pytest.raises(InputError, match="not UTF-8"):
        GSM8K(tmp_path / "latin").cases(chat_model())


def test_models_and_settings_that_do_not_do(tmp_path):
    path = problems(tmp_path, problem())
    with pytest.raises(InputError, match="no chat template"):
        GSM8K(path).cases(model())
    with pytest.raises(CapacityError, match=r"line 1 of .* more than the model's context of 1024"):
        GSM8K(path, max_new_tokens=1000).cases(chat_model())
    for setting in ("problems", "max_new_tokens"):
        with pytest.raises(InputError, match=f"{setting}=0"):
            GSM8K(path, **{setting: 0})
    with pytest.raises(InputError, match="generated=-1"):
        GSM8K(path, generated=-1)
