"""Grade-school mathematics, GSM8K (Cobbe et al., 2021, arXiv 2110.14168): reasoning in steps from a compressed cache.

Zero-shot, through the model's chat template. The problems come from a file, one JSON object a line, as the authors
publish them: {"question": ..., "answer": "steps with <<3*4=12>>12 calculator marks\\n#### 12"}.
"""

import dataclasses
import json
import re
from decimal import Decimal
from pathlib import Path
from typing import ClassVar

from vecinfer_jax.errors import CapacityError, InputError
from vecinfer_jax.evaluation.cases import Case, chat_prompt, check_whole, tokenizer_of, with_gold
from vecinfer_jax.models import LanguageModel

MESSAGE = "{question}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
ANSWER = "The answer is \\boxed{{{number}}}."
_CALCULATOR = re.compile(r"<<[^<>]*>>")
_FINAL = "####"
# A minus is a sign only where nothing stands before it that could be subtracted from.
_NUMBER = re.compile(
    r"(?P<sign>(?<![\w)])(?:-\$?|\$-))?(?P<size>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)", re.ASCII
)


@dataclasses.dataclass(frozen=True)
class GSM8K:
    """The first `problems` of a file; the first `generated` of them are answered too, all others only scored.

    path:           JSONL with question and answer.
    problems:       how many; all of a shorter file.
    generated:      of how many the model writes its own solution.
    max_new_tokens: of such a solution, at most.

    The gold is the published solution without its calculator marks, ended as the question asks. Labels: problem, the
    line number in the file.
    """

    path: str | Path
    problems: int = 100
    generated: int = 24
    max_new_tokens: int = 320

    name: ClassVar[str] = "gsm8k"

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", Path(self.path))
        check_whole("problems", self.problems)
        check_whole("generated", self.generated, 0)
        check_whole("max_new_tokens", self.max_new_tokens)

    def cases(self, lm: LanguageModel) -> list[Case]:
        """In the order of the file.

        Raises `InputError` where the file cannot be read, a line is not a problem, or the model has no chat template;
        `CapacityError` where a problem and its solution do not fit the model's context.
        """
        tokenizer = tokenizer_of(lm)
        cases: list[Case] = []
        for line, question, answer in read_problems(Path(self.path), self.problems):
            steps, number = solution(answer)
            prompt, gold = with_gold(
                tokenizer,
                chat_prompt(tokenizer, MESSAGE.format(question=question)),
                f"{steps}\n{ANSWER.format(number=number)}",
                add_special_tokens=False,
            )
            new_tokens = self.max_new_tokens if len(cases) < self.generated else 0
            case = Case(prompt, gold, (number,), new_tokens, {"problem": line})
            if case.tokens > lm.config.max_position:
                raise CapacityError(
                    f"line {line} of {self.path} needs {case.tokens} tokens with its solution, "
                    f"more than the model's context of {lm.config.max_position}"
                )
            cases.append(case)
        return cases

    def judge(self, case: Case, text: str) -> float:
        """1 where the last number of the text is the solution's."""
        found = last_number(text)
        return float(found is not None and found == last_number(case.answers[0]))


def read_problems(path: Path, count: int) -> list[tuple[int, str, str]]:
    """(line number, question, answer) of the first problems; blank lines are passed over.

    Raises `InputError`, with the number of the line, where one is not what it should be.
    """
    problems: list[tuple[int, str, str]] = []
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if len(problems) == count:
                    break
                if line.strip():
                    problems.append((number, *_problem(line, f"line {number} of {path}")))
    except OSError as error:
        raise InputError(f"the problems cannot be read from {path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: give JSON lines with question and answer") from None
    if not problems:
        raise InputError(f"{path} has no problems: give JSON lines with question and answer")
    return problems


def _problem(line: str, where: str) -> tuple[str, str]:
    try:
        problem = json.loads(line)
    except ValueError as error:
        raise InputError(f"{where} is not JSON: {error}") from None
    question, answer = (problem.get(key) if isinstance(problem, dict) else None for key in ("question", "answer"))
    if not (isinstance(question, str) and isinstance(answer, str) and question.strip() and answer.strip()):
        raise InputError(f"{where} is no problem: it needs the texts question and answer")
    if _FINAL not in answer or last_number(answer.rpartition(_FINAL)[2]) is None:
        raise InputError(f"{where} has no final answer: its answer must end with '{_FINAL} number'")
    return question, answer


def solution(answer: str) -> tuple[str, str]:
    """(steps without calculator marks, final number) of a published answer."""
    steps, _, number = _CALCULATOR.sub("", answer).rpartition(_FINAL)
    return steps.strip(), number.strip()


def last_number(text: str) -> Decimal | None:
    """The last number that a text says: 1,234 and $1234.00 are 1234, a full stop after it is none of it."""
    matches = list(_NUMBER.finditer(text.replace("\u2212", "-")))  # a typographer's minus
    if not matches:
        return None
    size = Decimal(matches[-1]["size"].replace(",", ""))
    return -size if matches[-1]["sign"] else size
