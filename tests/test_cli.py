"""The command line as a person meets it: what works, and one line and a non-zero exit for what does not."""

import json
import subprocess
import sys

import pytest

from tests import small
from vecinfer_jax import cli
from vecinfer_jax.caches import METHODS, VecInfer

# `smollm2` is asked for so that the model is there, or the test skips and says why.
pytestmark = pytest.mark.usefixtures("smollm2")


@pytest.fixture
def loaded(monkeypatch):
    """The small model stands in for every --model, so that most tests take no time."""
    monkeypatch.setattr("vecinfer_jax.models.load", lambda *args, **kwargs: small.model())


def run(capsys, *arguments):
    status = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def fails(capsys, *arguments) -> str:
    """Runs a command that must fail: non-zero status, nothing on stdout, one line on stderr."""
    status, out, err = run(capsys, *arguments)
    assert status != 0
    assert out == ""
    assert err.startswith("vecinfer: ")
    assert err.count("\n") == 1 and err.endswith("\n")
    return err


def test_generate_prints_the_text_and_writes_what_it_measured(capsys, tmp_path):
    out = tmp_path / "out.json"
    status, text, _ = run(
        capsys, "generate", "The capital of France is", "--max-new-tokens", 4, "--json", out, "--logprobs", "--quiet"
    )
    assert status == 0
    assert "Paris" in text
    content = json.loads(out.read_text())
    assert content["answers"][0]["text"] in text
    assert len(content["answers"][0]["logprobs"]) == 4
    assert content["cache_bytes"]["codes"] > 0
    assert content["method"].startswith("VecInfer(")


@pytest.mark.slow
def test_streaming_prints_the_same_text(capsys, smollm2, monkeypatch):
    monkeypatch.setattr("vecinfer_jax.models.load", lambda *args, **kwargs: smollm2)
    options = ["--method", "full", "--max-new-tokens", 8, "Hello, my name is", "--quiet"]
    _, whole, _ = run(capsys, "generate", *options)
    _, streamed, _ = run(capsys, "generate", *options, "--stream")
    assert streamed == whole


def test_a_batch_job_runs_from_file_to_file(capsys, loaded, tmp_path):
    source, answers = tmp_path / "p.jsonl", tmp_path / "a.jsonl"
    source.write_text('{"prompt": "one"}\n{"prompt": "two"}\n')
    options = ["generate", "--method", "full", "--max-new-tokens", 3, "--input", source, "--output", answers, "--quiet"]
    status, _, err = run(capsys, *options)
    assert status == 0
    assert "2 answers" in err
    assert len(answers.read_text().splitlines()) == 2
    assert "0 answers" in run(capsys, *options)[2]


def test_calibrate_then_generate_and_evaluate(capsys, loaded, tmp_path):
    text, artefact, out = tmp_path / "t.txt", tmp_path / "artefact", tmp_path / "r.json"
    text.write_text("\n\n".join(small.texts()))
    status, printed, _ = run(
        capsys, "calibrate", "--bits", 2, "--text", text, "--output", artefact, "--passages", 4,
        "--passage-length", 64, "--quiet",
    )  # fmt: skip
    assert status == 0
    assert printed.strip() == str(artefact)
    using = ["--bits", 2, "--calibration", artefact, "--quiet"]
    assert run(capsys, "generate", "hello", "--max-new-tokens", 3, *using)[0] == 0
    status, shown, _ = run(
        capsys, "evaluate", "perplexity", "--text", text, "--length", 64, "--windows", 2, "--residual", 0,
        "--json", out, *using,
    )  # fmt: skip
    assert status == 0
    assert "KL" in shown
    result = json.loads(out.read_text())
    assert {"perplexity", "kl", "top1_agreement", "bits_per_element"} <= set(result)
    assert "--bits" in fails(capsys, "generate", "x", *using, "--method", "full")
    assert "calibrate again" in fails(capsys, "generate", "x", "--calibration", artefact, "--bits", 4, "--quiet")


def test_calibrate_finds_and_prints_the_roles_of_layers(capsys, loaded, tmp_path):
    text, artefact = tmp_path / "t.txt", tmp_path / "artefact"
    text.write_text("\n\n".join(small.texts()))
    status, printed, _ = run(
        capsys, "calibrate", "--method", "tailorkv", "--text", text, "--output", artefact, "--passages", 2,
        "--passage-length", 64, "--quiet",
    )  # fmt: skip
    assert status == 0
    lines = printed.splitlines()
    found = json.loads((artefact / "metadata.json").read_text())["findings"]
    for index in range(3):
        score, role = found["dense_preference"][index], found["role"][index]
        assert lines[index].split() == ["layer", str(index), "dense", "preference", str(score), "role", role]
    assert lines[3] == str(artefact)
    assert "no roles yet" in fails(capsys, "plan", "tailorkv", "--gpu", "h100")
    status, printed, _ = run(capsys, "plan", "tailorkv:roles=quantised+sparse*31", "--gpu", "h100")
    assert status == 0 and "host" in printed


def test_convert_writes_what_load_reads(capsys, loaded, tmp_path, monkeypatch):
    import dataclasses

    bare = dataclasses.replace(small.model(), tokenizer=None)
    monkeypatch.setattr("vecinfer_jax.models.load", lambda *args, **kwargs: bare)
    assert run(capsys, "convert", "--output", tmp_path / "orbax", "--quiet")[0] == 0
    from vecinfer_jax.models.language_model import load

    assert load(tmp_path / "orbax", "float32", progress=False).fingerprint == bare.fingerprint


def test_fetch_lists_what_there_is(capsys):
    status, out, _ = run(capsys, "fetch")
    assert status == 0
    assert "smollm2-135m-instruct" in out.splitlines()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate"], "give a prompt"),
        (["generate", ""], "empty"),
        (["generate", "x", "--method", "magic"], "unknown method"),
        (["generate", "x", "--bits", "7"], "bits=7"),
        (["generate", "x", "--key", "d3b9"], "d3b9"),
        (["generate", "x", "--method", "full", "--residual", "3"], "--residual"),
        (["generate", "x", "--max-new-tokens", "9999"], "context"),
        (["generate", "word " * 300, "--method", "full"], "context"),
        (["generate", "word " * 20, "--method", "full", "--capacity", "64"], "capacity"),
        (["generate", "x", "--temperature", "-1"], "temperature"),
        (["generate", "x", "--input", "a.jsonl"], "--output"),
        (["generate", "--input", "a", "--output", "b", "--stream"], "--stream"),
        (["generate", "--input", "a", "--output", "b", "--capacity", "9"], "--capacity"),
        (["generate", "--input", "a", "--output", "/no/such/folder/b"], "/no/such/folder/b"),
        (["generate", "x", "--json", "/"], "directory"),
        (["generate", "x", "--bits", "nan"], "bits=nan"),
        (["generate", "x", "--seed", "99999999999999999999"], "seed"),
        (["generate", "x", "--method", "full", "--top-k", "99999999999"], "top_k"),
        (["generate", "\udcff"], "UTF-8"),
        (["calibrate", "--output", "/"], "no calibration"),
        (["calibrate", "--output", "/proc/x/y"], "/proc"),
        (["convert", "--output", "/proc/x"], "/proc/x"),
        (["generate", "x", "--calibration", "/nowhere"], "/nowhere"),
        (["generate", "--bogus"], "bogus"),
        (["generate", "x", "--max-new-tokens", "many"], "max-new-tokens"),
        (["calibrate", "--method", "full", "--output", "o"], "no calibration"),
        (["calibrate", "--text", "/nowhere.txt", "--output", "o", "--quiet"], "/nowhere.txt"),
        (["evaluate", "perplexity", "--text", "/nowhere.txt"], "/nowhere.txt"),
        (["evaluate", "perplexity"], "--text"),
        (["fetch", "nothing-like-it"], "no asset"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_what_cannot_be_done_is_one_line(capsys, loaded, arguments, says):
    assert says in fails(capsys, *arguments)


@pytest.mark.parametrize("model", ["no-such-model", "/no/such/dir", "missing.gguf"])
def test_an_unknown_model_is_one_line(capsys, model):
    fails(capsys, "generate", "x", "--model", model)


def test_a_truncated_model_file_is_one_line(capsys, tmp_path):
    from vecinfer_jax import assets

    whole = assets.fetch("smollm2-135m-instruct", progress=False)
    cut = tmp_path / "cut.gguf"
    with open(whole, "rb") as source:
        cut.write_bytes(source.read(50_000_000))
    assert "cut.gguf" in fails(capsys, "generate", "x", "--model", cut, "--quiet")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"sliding_window": 128, "model_type": "mistral"}, "sliding"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
        ({"model_type": "mamba"}, "mamba"),
    ],
)
def test_a_configuration_we_do_not_have_is_refused_by_name(capsys, tmp_path, change, says):
    config = {
        "model_type": "llama",
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rms_norm_eps": 1e-5,
        "rope_theta": 1e4,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config | change))
    assert says in fails(capsys, "generate", "x", "--model", tmp_path, "--quiet")


def test_the_installed_command_exits_with_the_status():
    command = [sys.executable, "-m", "vecinfer_jax", "generate", "--method", "magic", "x"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == f"vecinfer: unknown method 'magic': choose from {', '.join(METHODS)}\n"
    assert done.stdout == ""


def test_no_arguments_shows_help(capsys):
    status, out, _ = run(capsys)
    assert status == 0
    assert "generate" in out


def test_options_left_out_keep_the_methods_defaults():
    assert cli.make_method("vecinfer", bits=None, residual=None) == VecInfer()
    assert cli.make_method("vecinfer", bits=4.0, residual=7) == VecInfer(bits=4, residual=7)
