"""The notebooks: what is stored can be read as it is, and all of it runs."""

import json
import os
import re
import sys
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent
# Each with how many plots it has.
NOTEBOOKS = {"quickstart": 2, "better_than_the_paper": 1}
KERNEL = "vecinfer-tests"

# Run after a notebook's last cell: what the test wants to know, as JSON.
BETTER_FACTS = """
import json

print(json.dumps({"share": share, "errors": errors, "descent": descent}))
"""
FACTS = """
import json

print(json.dumps({
    "residual": method.residual,
    "prompt_lengths": [len(ids) for ids in full.prompt_tokens],
    "first_tokens": [[row[0] for row in out.tokens] for out in (full, coded)],
    "new_tokens": [[len(row) for row in out.tokens] for out in (full, coded)],
    "texts": [full.texts, coded.texts],
    "passages": fitted.metadata["passages"],
    "reloaded": bool(same),
    "refusal": refusal,
    "ratios": list(ratios.values()),
    "static_share": list(static_share.values()),
    "score_error": [errors.tolist() for errors in score_error.values()],
    "memory": [[name, context, sizes] for (name, context), sizes in memory.items()],
    "quality": {residual: vars(result) for residual, result in quality.items()},
}))
"""


def path_of(name: str) -> Path:
    return ROOT / "notebooks" / f"{name}.ipynb"


def outputs(notebook) -> list:
    return [output for cell in notebook.cells for output in cell.get("outputs", [])]


def check_outputs(notebook, plots: int) -> None:
    """No cell failed or wrote to stderr, and the plots are there."""
    for output in outputs(notebook):
        assert output.output_type != "error", output.get("evalue")
        assert output.get("name") != "stderr", output.text
    assert sum("image/png" in output.get("data", {}) for output in outputs(notebook)) == plots


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_stored_outputs(name):
    """The file was run from top to bottom, is small, and says nothing about the machine it ran on."""
    notebook = nbformat.read(path_of(name), as_version=4)
    nbformat.validate(notebook)
    assert path_of(name).stat().st_size < 400_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all("execution" not in cell.metadata for cell in notebook.cells)  # no time stamps
    check_outputs(notebook, NOTEBOOKS[name])
    text = json.dumps([*notebook.cells, notebook.metadata])
    text = re.sub(r'"image/png": "[^"]*"', "", text)
    assert not re.search(r"[\s\"'(=](?:/(?:home|Users|root|tmp|private|work|var|opt|usr|mnt)/|[A-Z]:\\\\)", text)


@pytest.fixture
def run(smollm2, tmp_path, monkeypatch):
    """Runs every cell of a notebook in a fresh kernel of this interpreter, on the CPU -> what its facts say."""
    assert smollm2.name == "smollm2-135m-instruct"  # fetched, or the test is skipped and says so
    kernel = tmp_path / "kernels" / KERNEL / "kernel.json"
    kernel.parent.mkdir(parents=True)
    argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
    kernel.write_text(json.dumps({"argv": argv, "display_name": KERNEL, "language": "python"}))
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    for name, value in {
        "JUPYTER_PATH": str(tmp_path),  # where the kernel is looked up, with no other kernel of this name
        "JUPYTER_PLATFORM_DIRS": "1",
        "IPYTHONDIR": str(tmp_path / "ipython"),  # no start-up files of the user
        "JAX_PLATFORMS": "cpu",  # a GPU's memory belongs to the test process
        "PYTHONPATH": os.pathsep.join(paths),
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("MPLBACKEND", raising=False)

    def execute(name: str, facts: str) -> dict:
        notebook = nbformat.read(path_of(name), as_version=4)
        notebook.cells.append(nbformat.v4.new_code_cell(facts))
        resources = {"metadata": {"path": str(tmp_path)}}
        NotebookClient(notebook, timeout=600, kernel_name=KERNEL, resources=resources).execute()
        check_outputs(notebook, NOTEBOOKS[name])
        return json.loads(notebook.cells[-1].outputs[0].text)

    return execute


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_keys_with_a_mean(run):
    facts = run("better_than_the_paper", BETTER_FACTS)
    assert max(facts["share"]) > 0.5
    paper, centred, metric = (np.array(errors) for errors in facts["errors"].values())
    assert np.all(metric < centred) and np.all(centred < paper)
    before, after = facts["descent"]["seen"]
    assert after < 0.95 * before


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_quickstart(run):
    """The results of every section make sense."""
    facts = run("quickstart", FACTS)

    # Generation: something to read from codes, and a first token that comes from exact attention in both.
    assert min(facts["prompt_lengths"]) > facts["residual"] == 128
    assert facts["first_tokens"][0] == facts["first_tokens"][1]
    assert all(1 < count <= 40 for counts in facts["new_tokens"] for count in counts)
    assert all(text.strip() for texts in facts["texts"] for text in texts)

    # Calibration: kept and read back, and refused for another format.
    assert facts["passages"] == 4 and facts["reloaded"]
    assert "d4b4" in facts["refusal"] and "d4b8" in facts["refusal"]

    # Outliers: flatter with each stage; a rotation keeps the energy of the mean.
    raw, smoothed, rotated = facts["ratios"]
    assert raw > 4 and raw / 2 > smoothed > rotated > 1
    assert facts["static_share"][1] == pytest.approx(facts["static_share"][2], abs=1e-3)
    errors = np.array(facts["score_error"])
    assert errors.shape == (6, 15) and np.all((errors > 0) & (errors < 2))

    # Memory: 16 bits against 2 for every token outside the window.
    sizes = {(name, context): size for name, context, size in facts["memory"]}
    contexts = {context for _, context in sizes}
    assert len(contexts) == 3
    for context in contexts:
        full, coded = sizes["full precision", context], sizes["VecInfer 2 bit", context]
        assert full["codes"] * (context - 128) == 8 * coded["codes"] * context
        assert coded["total"] < full["total"] and coded["window"] > 0 and coded["codebooks"] > 0

    # Quality: the window helps, and nothing is free.
    windowed, bare = facts["quality"]["128"], facts["quality"]["0"]
    assert windowed["full_perplexity"] == pytest.approx(bare["full_perplexity"])
    assert 0 < windowed["kl"] < bare["kl"] < 3
    assert 1 > windowed["top1_agreement"] > bare["top1_agreement"] > 0.1
    assert windowed["prefill"] == "coded" and windowed["predictions"] == 255
