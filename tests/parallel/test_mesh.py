"""Meshes of eight devices: the claims of `tests.parallel.claims`, in processes of their own, since this one has a
single device."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from subprocess import PIPE

import pytest

import vecinfer_jax as vj
from tests import small
from vecinfer_jax.errors import InputError
from vecinfer_jax.parallel import processes as several

ROOT = Path(__file__).parent.parent.parent
SHAPES = ("8x1x1", "1x8x1", "1x1x8", "2x2x2", "4x2x1", "1x4x2")
# A quantised layer and one in the host's memory; layers there alone, as codes.
ON_HOST = "tailorkv:bits=2,group=8,residual=16,roles=quantised+sparse,tokens=24,channels=4,sink=2,recent=5,block=8"
CODES_ON_HOST = "tailorkv:roles=sparse*2,host=vecinfer-4,tokens=24,channels=4,sink=2,recent=5,block=8"
IN_BASIS = "tailorkv:roles=sparse*2,basis=principal,tokens=24,channels=4,sink=2,recent=5,block=8"
BY_EACH = IN_BASIS.replace("basis=principal", "heads=each")
CODES_IN_BASIS = CODES_ON_HOST + ",basis=principal"
METHODS = (
    "full",
    "vecinfer:bits=2,residual=16,sink=1,transform=smooth-hadamard",
    "vecinfer:bits=2,residual=0,transform=metric,sink=3,fp8_values=true",
    "kvquant:bits=3,outliers=0.01,residual=8",
    "kvquant:bits=2,outliers=0.02,keys=per-token",
    "kivi:bits=2,group=32,residual=16",
    "hadamard-int:bits=2,residual=16",
    "plain-vq:bits=2,residual=16",
    ON_HOST,
    CODES_ON_HOST,
    IN_BASIS,
    BY_EACH,
    CODES_IN_BASIS,
)


def on_eight_devices(claim, *arguments):
    environment = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", "tests.parallel.claims", claim, *arguments]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.parametrize(
    "claims",
    [
        "every_merge_is_one_softmax,what_does_not_fit_is_said_in_one_line,short_caches_are_not_split",
        *(
            pytest.param(claim, marks=pytest.mark.slow)
            for claim in (
                "a_step_sends_what_the_design_says",
                "weights_are_where_they_belong",
                "biases_count_once",
                "the_command_takes_a_mesh",
            )
        ),
    ],
)
def test_of_a_mesh(claims):
    on_eight_devices(claims)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["full", "vecinfer:bits=2,residual=16", ON_HOST])
def test_generation_gives_the_tokens_of_one_device(method):
    on_eight_devices("the_tokens_of_one_device", method, *SHAPES)


def test_tokens_of_the_host_are_those_of_one_device():
    on_eight_devices("the_codes_of_one_device", ON_HOST, "2x2x2")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_codes_are_those_of_one_device(method):
    on_eight_devices("the_codes_of_one_device", method, *SHAPES)


def of_processes(*commands):
    """(stdout, stderr) of Python commands, given as (arguments, devices), that run at the same time."""

    def start(arguments, devices):
        flags = f"--xla_force_host_platform_device_count={devices}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", *arguments]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True)

    runs = [start(*command) for command in commands]
    outs = [run.communicate(timeout=500) for run in runs]
    assert all(run.returncode == 0 for run in runs), [err[-2000:] for _, err in outs]
    return outs


def free_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


@pytest.mark.slow
def test_two_processes_generate_what_one_does():
    """Each with two devices of a mesh of four, over the loopback."""
    address = free_address()

    def command(index, count):
        return ["tests.parallel.two_processes", str(index), str(count), address], 4 // count

    outs = of_processes(command(0, 2), command(1, 2), command(0, 1))
    first, second, alone = (json.loads(out.splitlines()[-1]) for out, _ in outs)
    assert first == second == alone


@pytest.mark.slow
def test_the_command_in_two_processes_prints_and_writes_once(tmp_path):
    lm, method = small.model(), vj.KIVI(bits=2, group=8, residual=16)
    directory, prompts = lm.save(tmp_path / "model"), ["The first prompt", "and one more", "the last"]
    texts = vj.generate(lm, prompts, method=method, max_new_tokens=12).texts
    source, answers = tmp_path / "prompts.jsonl", tmp_path / "answers.jsonl"
    source.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))

    def both(*arguments):
        address = free_address()
        shared = f"generate --model {directory} --method kivi:bits=2,group=8,residual=16 --max-new-tokens 12".split()
        shared += ["--mesh", "data=2,model=2", "--coordinator", address, "--processes", "2", *arguments]
        return of_processes(*((["vecinfer_jax", *shared, "--process", str(i)], 2) for i in range(2)))

    written = tmp_path / "answers.json"
    outs = [out for out, _ in both(*prompts, "--json", str(written))]
    first, second = ([line for line in out.splitlines() if not line.startswith("[Gloo]")] for out in outs)
    assert len(first) >= 3 and not second
    assert [answer["text"] for answer in json.loads(written.read_text())["answers"]] == texts
    job = "--input", str(source), "--output", str(answers), "--batch-size", "2"
    (_, told), (_, silent) = both(*job)
    assert "3 answers written" in told and "answers" not in silent
    assert [json.loads(line)["text"] for line in answers.read_text().splitlines()] == texts
    answers.write_text("".join(answers.read_text().splitlines(keepends=True)[:2]))
    both(*job)
    assert [json.loads(line)["text"] for line in answers.read_text().splitlines()] == texts


@pytest.mark.parametrize(
    ("coordinator", "processes", "process", "message"),
    [
        ("nowhere", 2, 0, "host:port"),
        ("nowhere:1", 2, None, "which this one is"),
        ("nowhere:1", 2, 2, "from 0 to 1"),
        ("127.0.0.1:1", 2, 1, "no process 0 at 127.0.0.1:1"),
    ],
)
def test_processes_that_cannot_meet_are_told_so(monkeypatch, coordinator, processes, process, message):
    monkeypatch.setattr(several, "PATIENCE", 0.1)
    with pytest.raises(InputError, match=message) as error:
        several.join(coordinator, processes, process)
    assert "\n" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_distribution_is_that_of_one_device(method):
    on_eight_devices("the_distribution_of_one_device", method, *SHAPES)


@pytest.mark.slow
def test_activations_are_those_of_one_device():
    on_eight_devices("activations_are_those_of_one_device", "2x2x2", "1x1x8", "8x1x1", "4x1x2")


@pytest.mark.slow
def test_perplexity_is_that_of_one_device():
    on_eight_devices("perplexity_is_that_of_one_device", "kivi:bits=2,group=8,residual=16", "2x2x2")


@pytest.mark.slow
@pytest.mark.parametrize("method", [METHODS[0], METHODS[1], METHODS[3], ON_HOST, CODES_ON_HOST])
def test_evaluation_is_that_of_one_device(method):
    on_eight_devices("evaluation_is_that_of_one_device", method, "2x2x2", "1x8x1", "1x1x8", "4x1x2")


@pytest.mark.slow
@pytest.mark.parametrize("method", [ON_HOST, CODES_ON_HOST])
def test_the_selection_is_that_of_one_device(method):
    on_eight_devices("selection_is_that_of_one_device", method, "2x2x2", "1x1x8")


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["vecinfer:bits=2,transform=smooth-hadamard", "vecinfer:bits=2,transform=metric,refine=kl,rotate_values=true"],
)
def test_calibrations_of_a_mesh_serve_as_well(method):
    on_eight_devices("calibrations_of_a_mesh_serve_as_well", method + ",residual=8", "2x2x2")


@pytest.mark.slow
def test_descent_is_that_of_one_device():
    method = "vecinfer:bits=2,transform=metric,rotate_values=true,residual=8"
    on_eight_devices("descent_is_that_of_one_device", method, "2x2x2", "1x1x8")
