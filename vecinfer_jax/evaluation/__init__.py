"""What a compressed cache costs in quality."""

from vecinfer_jax.evaluation.answers import Answer, TaskResult, answer
from vecinfer_jax.evaluation.cases import Case, Task
from vecinfer_jax.evaluation.code_error import CodeErrorResult, code_error
from vecinfer_jax.evaluation.gsm8k import GSM8K
from vecinfer_jax.evaluation.needle import Needle
from vecinfer_jax.evaluation.perplexity import PerplexityResult, perplexity
from vecinfer_jax.evaluation.ruler import Ruler
from vecinfer_jax.evaluation.selection import SelectionResult, selection_recall

__all__ = [
    "GSM8K",
    "Answer",
    "Case",
    "CodeErrorResult",
    "Needle",
    "PerplexityResult",
    "Ruler",
    "SelectionResult",
    "Task",
    "TaskResult",
    "answer",
    "code_error",
    "perplexity",
    "selection_recall",
]
