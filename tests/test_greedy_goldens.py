"""Greedy generation with the full-precision cache gives transformers' tokens, one prompt at a time and in a
batch."""

import json

import pytest

import vecinfer_jax as vj
from tests.conftest import GOLDENS

CASES = json.loads((GOLDENS / "smollm2-135m-instruct" / "greedy.json").read_text(encoding="utf-8"))
NEW_TOKENS = 32


def test_prompts_are_tokenised_alike(smollm2):
    for case in CASES:
        assert smollm2.tokenizer.encode(case["prompt"]) == case["ids"]
        assert smollm2.tokenizer.decode(case["continuation"]) == case["text"]


@pytest.mark.parametrize("cases", [CASES[::10], pytest.param(CASES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_one_prompt_at_a_time(smollm2, cases):
    for case in cases:
        assert greedy(smollm2, [case["ids"]])[0] == case["continuation"], case["prompt"]


@pytest.mark.slow
def test_a_padded_batch(smollm2):
    continuations = greedy(smollm2, [case["ids"] for case in CASES])
    assert continuations == [case["continuation"] for case in CASES]


def greedy(lm, prompts):
    """32 tokens after each prompt."""
    return vj.generate(lm, prompts, max_new_tokens=NEW_TOKENS, stop_token_ids=[]).tokens
