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

ROOT = Path(__file__).parent.parent.parent
SHAPES = ("8x1x1", "1x8x1", "1x1x8", "2x2x2", "4x2x1", "1x4x2")
# A quantised layer and one in the host's memory; layers there alone, as codes.
ON_HOST = "tailorkv:bits=2,group=8,residual=16,roles=quantised+sparse,tokens=24,channels=4,sink=2,recent=5,block=8"
CODES_ON_HOST = "tailorkv:roles=sparse*2,host=vecinfer-4,tokens=24,channels=4,sink=2,recent=5,block=8"
METHODS = (
    "full",
    "vecinfer:bits=2,residual=16,sink=1",
    "vecinfer:bits=2,residual=0,transform=metric,sink=3",
    "kvquant:bits=3,outliers=0.01,residual=8",
    "kvquant:bits=2,outliers=0.02,keys=per-token",
    "kivi:bits=2,group=32,residual=16",
    "hadamard-int:bits=2,residual=16",
    "plain-vq:bits=2,residual=16",
    ON_HOST,
    CODES_ON_HOST,
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
            for claim in ("a_step_sends_what_the_design_says", "weights_are_where_they_belong", "biases_count_once")
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


@pytest.mark.slow
def test_two_processes_generate_what_one_does():
    """Each with two devices of a mesh of four, over the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"

    def start(index, count):
        devices = f"--xla_force_host_platform_device_count={4 // count}"
        environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": devices, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-m", "tests.parallel.two_processes", str(index), str(count), address]
        return subprocess.Popen(command, env=environment, cwd=ROOT, stdout=PIPE, stderr=PIPE, text=True)

    runs = [start(0, 2), start(1, 2), start(0, 1)]
    outs = [run.communicate(timeout=500) for run in runs]
    assert all(run.returncode == 0 for run in runs), [err[-2000:] for _, err in outs]
    first, second, alone = (json.loads(out.splitlines()[-1]) for out, _ in outs)
    assert first == second == alone


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_the_distribution_is_that_of_one_device(method):
    on_eight_devices("the_distribution_of_one_device", method, *SHAPES)
