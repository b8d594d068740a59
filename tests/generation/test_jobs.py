"""A batch job goes on where it stopped and ends with the same answers; bad lines are named before anything runs."""

import json

import pytest

import vecinfer_jax as vj
from tests import small
from vecinfer_jax.errors import InputError
from vecinfer_jax.generation.jobs import run_job

OPTIONS = {
    "method": vj.FullPrecision(),
    "batch_size": 2,
    "max_new_tokens": 6,
    "sampling": vj.Sampling(temperature=1.0),
    "seed": 5,
    "progress": False,
}


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"prompt": f"question number {i}", "id": f"q{i}"} for i in range(4)] + [{"tokens": [1, 2, 3]}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def answers(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_interrupted_job_ends_with_the_answers_of_a_whole_one(source, tmp_path):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    assert run_job(small.model(), source, whole, **OPTIONS) == 5
    lines = whole.read_text().splitlines(keepends=True)
    cut.write_text("".join(lines[:2]) + lines[2][:20])  # interrupted in the middle of writing the third
    assert run_job(small.model(), source, cut, **OPTIONS) == 3
    assert answers(cut) == answers(whole)
    assert [a["index"] for a in answers(cut)] == [0, 1, 2, 3, 4]
    assert [a["id"] for a in answers(cut)] == ["q0", "q1", "q2", "q3", None]
    assert run_job(small.model(), source, cut, **OPTIONS) == 0


def test_answers_do_not_depend_on_the_batch_size(source, tmp_path):
    a, b = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    run_job(small.model(), source, a, **OPTIONS)
    run_job(small.model(), source, b, **(OPTIONS | {"batch_size": 5}))
    assert answers(a) == answers(b)


def test_logprobs_on_request(source, tmp_path):
    out = tmp_path / "a.jsonl"
    run_job(small.model(), source, out, logprobs=True, **OPTIONS)
    assert all(len(a["logprobs"]) == len(a["tokens"]) for a in answers(out))


def test_answers_of_another_job_are_not_mixed_in(source, tmp_path):
    out = tmp_path / "a.jsonl"
    run_job(small.model(), source, out, **OPTIONS)
    before = out.read_bytes()
    with pytest.raises(InputError, match="other prompts, model or settings"):
        run_job(small.model(), source, out, **(OPTIONS | {"seed": 6}))
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("", "line 2"),
        ("not json", "line 2"),
        ("[1]", "line 2"),
        ('{"text": "x"}', "exactly one"),
        ('{"prompt": ""}', "empty"),
        ('{"prompt": "x", "tokens": [1]}', "exactly one"),
        ('{"tokens": [9999]}', "vocabulary"),
        (json.dumps({"prompt": "x" * 2000}), "context"),
        ('{"tokens": "text"}', "list of token ids"),
        ('{"tokens": [1.7, true]}', "no token id"),
        ('{"messages": "hi"}', "list of messages"),
        ('{"prompt": {"a": 1}}', "must be a text"),
        ('{"tokens": [1e400]}', "no token id"),
        ('{"prompt": "fine", "id": "\\ud800"}', "line 2"),
        ('{"prompt": "\\ud800"}', "UTF-8"),
        ("[" * 100_000, "line 2"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_written(tmp_path, line, message):
    source, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    source.write_text('{"prompt": "fine"}\n' + line + "\n" + '{"prompt": "fine"}\n')
    with pytest.raises(InputError, match=message) as error:
        run_job(small.model(), source, out, **OPTIONS)
    assert "\n" not in str(error.value)
    assert not out.exists()


def test_missing_and_empty_inputs_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read"):
        run_job(small.model(), tmp_path / "none.jsonl", tmp_path / "a.jsonl", **OPTIONS)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(InputError, match="no prompts"):
        run_job(small.model(), tmp_path / "empty.jsonl", tmp_path / "a.jsonl", **OPTIONS)


@pytest.mark.parametrize("content", ["important notes without a newline", "two lines\nof notes\n", '{"other": 1}\n'])
def test_a_file_that_is_no_output_of_a_job_stays_as_it_is(source, tmp_path, content):
    out = tmp_path / "notes.txt"
    out.write_text(content)
    with pytest.raises(InputError) as error:
        run_job(small.model(), source, out, **OPTIONS)
    assert "\n" not in str(error.value)
    assert out.read_text() == content


def test_the_input_is_never_the_output(source):
    before = source.read_bytes()
    with pytest.raises(InputError, match="is the input"):
        run_job(small.model(), source, source, **OPTIONS)
    assert source.read_bytes() == before


@pytest.mark.slow
def test_answers_with_another_calibration_are_not_mixed_in(source, tmp_path):
    from vecinfer_jax.calibration.collect import calibrate

    method = vj.VecInfer(bits=2, residual=4, transform="smooth-hadamard")
    out, options = tmp_path / "a.jsonl", OPTIONS | {"method": method}
    run_job(small.model(), source, out, calibration=small.calibration_of(method), **options)
    other = calibrate(small.model(), method, small.texts(), passages=5, passage_length=64, seed=9, progress=False)
    with pytest.raises(InputError, match="other prompts, model or settings"):
        run_job(small.model(), source, out, calibration=other, **options)
    with pytest.raises(InputError, match="other prompts, model or settings"):
        run_job(small.model(), source, out, calibration=small.calibration_of(method), logprobs=True, **options)


def test_a_json_string_may_hold_any_line_separator(tmp_path):
    source, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    source.write_text('\ufeff{"prompt": "a\u2028b\x85c"}\n{"prompt": "d"}', encoding="utf-8")
    assert run_job(small.model(), source, out, **OPTIONS) == 2


@pytest.mark.slow
def test_chat_puts_prompts_through_the_template(smollm2, tmp_path):
    source, out = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    source.write_text('{"prompt": "Say hello."}\n')
    options = OPTIONS | {"max_new_tokens": 2, "sampling": vj.Sampling()}
    run_job(smollm2, source, out, chat=True, **options)
    want = vj.generate(smollm2, [{"role": "user", "content": "Say hello."}], max_new_tokens=2)
    assert answers(out)[0]["tokens"] == want.tokens[0]
