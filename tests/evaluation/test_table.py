"""A table keeps every finished row, runs only what is missing, and reports what it holds."""

import json

import pytest

import vecinfer_jax as vj
from tests import small
from tests.evaluation.stand_in import StandIn
from vecinfer_jax import cli
from vecinfer_jax.calibration.collect import collect as original_collect
from vecinfer_jax.calibration.collect import fit
from vecinfer_jax.errors import InputError
from vecinfer_jax.evaluation import report, table

CODED = vj.VecInfer(bits=1, residual=0, transform="smooth-hadamard")
METHODS = (vj.FullPrecision(), CODED)
TEXT = "".join(small.texts())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A table of two methods, three tasks and two seeds -> (directory, tasks)."""
    directory = tmp_path_factory.mktemp("table")
    text = directory / "text.txt"
    text.write_text(TEXT)
    tasks = [table.TextTask(text, 60, 2), table.CodeErrorTask(text, 60, 2), StandIn()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table, "collect", collect)
        assert run(directory, tasks) == 3 + 2 * 3
    return directory, tasks


def collect(lm, texts=None, seed=0, **_):
    """In place of the default text, which would be fetched."""
    return original_collect(lm, small.texts(), passages=4, passage_length=64, batch=2, seed=seed, progress=False)


def run(directory, tasks, methods=METHODS, seeds=(0, 1), **options):
    made = table.Table(small.model(), directory / "out", batch=2, progress=False, **options)
    return made.run(table.rows_of(methods, tasks, prefills=["coded"], seeds=seeds))


def test_rows_say_what_was_measured(finished):
    directory, _ = finished
    rows = report.read_rows(directory / "out")
    assert len(rows) == 9
    by_method = {(r["method"]["name"], r["task"]["name"], r["seed"]): r["result"] for r in rows}
    full, coded = by_method["full", "perplexity", None], by_method["vecinfer", "perplexity", 0]
    assert full["kl"] == 0 and coded["kl"] > 1e-4
    alone = vj.evaluate.perplexity(
        small.model(),
        CODED,
        fit(small.model(), CODED, collect(small.model()), progress=False),
        TEXT,
        length=60,
        windows=2,
        progress=False,
    )
    assert coded["perplexity"] == pytest.approx(alone.perplexity, rel=1e-6)
    assert by_method["vecinfer", "perplexity", 1]["perplexity"] != coded["perplexity"]
    assert by_method["full", "code-error", None]["key_error"] == 0
    assert 0.05 < by_method["vecinfer", "code-error", 0]["key_error"] < 1
    assert by_method["vecinfer", "stand-in", 0]["answered"] == 3
    assert all(r["device"] and r["versions"] and r["fingerprint"] == small.model().fingerprint for r in rows)


def test_what_is_there_is_not_run_again_and_what_is_lost_is(finished, monkeypatch):
    directory, tasks = finished
    monkeypatch.setattr(table, "collect", None)  # the calibrations are kept, too
    assert run(directory, tasks) == 0
    lost = next((directory / "out" / "rows").glob("perplexity-vecinfer-*.json"))
    before = json.loads(lost.read_text())
    lost.unlink()
    assert run(directory, tasks) == 1
    after = json.loads(lost.read_text())
    assert after["result"] == before["result"]


def test_rows_of_a_results_file_are_not_run_again(finished, tmp_path, monkeypatch):
    directory, tasks = finished
    report.write_report(directory / "out", plots=False)
    made = table.Table(small.model(), tmp_path / "out", batch=2, progress=False)
    assert made.restore(report.read_rows(directory / "out" / "results.json")) == 9
    monkeypatch.setattr(table, "collect", None)
    assert run(tmp_path, tasks) == 0
    assert report.read_rows(tmp_path / "out") == report.read_rows(directory / "out")


def test_an_interrupted_run_goes_on(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    tasks = [table.TextTask(text, 60, 1), table.TextTask(text, 50, 1)]
    original = table.Table._measure
    asked = []

    def interrupted(self, row):
        asked.append(row)
        if len(asked) == 2:
            raise KeyboardInterrupt
        return original(self, row)

    monkeypatch.setattr(table.Table, "_measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tasks, methods=[vj.FullPrecision()])
    assert len(list((tmp_path / "out" / "rows").iterdir())) == 1
    assert run(tmp_path, tasks, methods=[vj.FullPrecision()]) == 1
    assert asked[1] == asked[2]


def test_other_settings_or_another_text_are_other_rows(finished):
    directory, tasks = finished
    made = table.Table(small.model(), directory / "out", progress=False)
    row = table.Row(CODED, tasks[0], "coded", 0)
    identity = json.dumps(made.identity(row))
    other = table.Row(vj.VecInfer(bits=1, residual=4, transform="smooth-hadamard"), tasks[0], "coded", 0)
    assert json.dumps(made.identity(other)) != identity
    assert json.dumps(made.identity(table.Row(CODED, tasks[0], "exact", 0))) != identity
    fast = table.Row(
        vj.VecInfer(bits=1, residual=0, implementation="xla", transform="smooth-hadamard"), tasks[0], "coded", 0
    )
    assert json.dumps(made.identity(fast)) == identity
    # What a setting stands for where it is left out is what a row is told by, if that is not what it always was.
    mixed = [
        made.identity(table.Row(vj.VecInfer(bits=bits), tasks[0], "coded", 0))["method"].get("mixed") for bits in (4, 2)
    ]
    assert mixed == ["keys", None]
    for calibration in ({"samples": 5}, {"passages": 5}, {"texts": ["another"]}):
        otherwise = table.Table(small.model(), directory / "out", progress=False, **calibration)
        assert json.dumps(otherwise.identity(row)) != identity
        assert otherwise.identity(table.Row(vj.FullPrecision(), tasks[0], "coded", None))["calibration"] is None
    text = tasks[0].path
    content = text.read_text()
    text.write_text("another " + content)
    try:
        assert json.dumps(made.identity(row)) != identity
    finally:
        text.write_text(content)


def test_the_report_has_every_row_and_the_plots_are_drawn(finished):
    directory, _ = finished
    path = report.write_report(directory / "out")
    written = path.read_text()
    assert (
        written.count("| vecinfer 1 bit, residual=0, transform=smooth-hadamard | coded |") == 3 + 1
    )  # three tasks and the table by label
    assert "± " in written and "nan" not in written
    images = sorted(p.name for p in (directory / "out").glob("*.png"))
    assert len(images) == 2 and all(name in written for name in images)
    assert report.read_rows(directory / "out" / "results.json") == report.read_rows(directory / "out")


def test_heatmaps_are_drawn_from_grids(tmp_path):
    def perplexity_row(key, value):
        settings = {"name": "vecinfer", "key": key, "value": value, "bits": 2}
        task = {"name": "perplexity", "length": 8}
        result = {"perplexity": 20.0, "bits_per_element": 2.0, "kl": 0.1, "top1_agreement": 0.9}
        return ROW | {"method": settings, "task": task, "result": result}

    def needle_row():
        answers = [{"labels": {"length": n, "depth": d}, "score": d, "gold_nll": 1.0} for n in (8, 16) for d in (0, 1)]
        result = {"answers": answers, "bits_per_element": 2.0, "score": 2.0, "answered": 4, "gold_nll": 1.0}
        return ROW | {"task": {"name": "needle"}, "result": result | {"gold_nll_per_token": 0.1}}

    rows = [perplexity_row(k, v) for k in ("d4b8", "d8b8") for v in ("d4b8", "d8b8")] + [needle_row()]
    names = report.draw(rows, tmp_path)
    assert sum("key-value" in name for name in names) == 1
    assert sum("heatmap" in name for name in names) == 1
    assert all((tmp_path / name).stat().st_size > 1000 for name in names)


ROW = {
    "model": "org/m",
    "fingerprint": "f",
    "dtype": "float32",
    "seed": 0,
    "prefill": "coded",
    "device": "cpu",
    "method": {"name": "kivi"},
    "calibration": None,
}


def test_only_seeds_are_averaged():
    """Rows of another text, another format or another model are other lines, whatever their labels say."""

    def row(perplexity, seed=0, method=None, task=None, **more):
        result = {"perplexity": perplexity, "bits_per_element": 2.0, "kl": 0.1, "top1_agreement": 0.9}
        method = {"name": "vecinfer", "bits": 2, "key": None, "value": None} | (method or {})
        task = {"name": "perplexity", "path": "t.txt", "path_sha256": "a"} | (task or {})
        return ROW | {"seed": seed, "method": method, "task": task, "result": result, "calibration": {}} | more

    rows = [
        row(10.0),
        row(12.0, seed=1),
        row(20.0, method={"key": "d4b10"}),
        row(30.0, method={"bits": 1, "key": "d4b10"}),
    ]
    lines = report.task_table(rows)
    assert "| vecinfer 2 bit | coded | 2 | 2 | 11.00 ± 1.00 |" in lines
    assert "K d4b10 V 2 bit | coded | 1 | 2 | 20.00 |" in lines and "K d4b10 V 1 bit | coded | 1 | 2 | 30.00 |" in lines
    texts = report.markdown([row(10.0), row(12.0, task={"path_sha256": "b"}), row(14.0, fingerprint="other")])
    assert "±" not in texts.split("\n", 3)[3] and texts.count("## perplexity") == 3


def test_a_file_named_as_text_is_known_by_its_content(tmp_path):
    from vecinfer_jax.evaluation.gsm8k import GSM8K

    made = table.Table(small.model(), tmp_path, progress=False)
    path = tmp_path / "g.jsonl"
    identities = []
    for content in ("one", "two"):
        path.write_text(content)
        identities.append(made.identity(table.Row(CODED, GSM8K(str(path)), "coded", 0))["task"])
    assert identities[0] != identities[1] and identities[0]["path"] == "g.jsonl"


@pytest.mark.parametrize("options", [["--batch-size", "0"], ["--length", "0"]])
def test_numbers_that_cannot_be_are_one_line(options, capsys, monkeypatch):
    monkeypatch.setattr("vecinfer_jax.models.load", lambda *args, **kwargs: small.model())
    assert cli.main(["evaluate", "needle", "--method", "full", "--quiet", *options]) == 1
    assert capsys.readouterr().err.count("\n") == 1


def test_damaged_rows_are_named(tmp_path):
    (tmp_path / "rows").mkdir()
    with pytest.raises(InputError, match="no finished rows"):
        report.read_rows(tmp_path)
    for content in ("{", "[]", "{}", '{"rows": [1]}'):
        (tmp_path / "rows" / "x.json").write_text(content)
        with pytest.raises(InputError, match=r"x\.json cannot be read"):
            report.read_rows(tmp_path)


def test_the_command_runs_a_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vecinfer_jax.models.load", lambda *args, **kwargs: small.model())
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    command = ["evaluate", "table", "--output", tmp_path / "t", "--method", "full", "--quiet", "--no-plots"]
    command += ["--task", f"perplexity:path={text},length=60,windows=1"]
    assert cli.main([str(part) for part in command]) == 0
    assert "| full | coded |" in (tmp_path / "t" / "report.md").read_text()
    assert capsys.readouterr().out.strip() == str(tmp_path / "t" / "report.md")
    for wrong in (["--method", "magic"], ["--task", "perplexity:path=nowhere.txt"], ["--prefill", "magic"]):
        assert cli.main([str(part) for part in command + wrong]) == 1
        out, err = capsys.readouterr()
        assert not out and err.startswith("vecinfer: ") and err.count("\n") == 1


def test_the_command_runs_a_task(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("vecinfer_jax.models.load", lambda *args, **kwargs: small.model())
    monkeypatch.setattr("vecinfer_jax.evaluation.needle.Needle", lambda **settings: StandIn())
    out = tmp_path / "n.json"
    command = ["evaluate", "needle", "--method", "full", "--batch-size", "2", "--quiet", "--json", str(out)]
    assert cli.main(command) == 0
    printed = capsys.readouterr().out
    content = json.loads(out.read_text())
    assert f"of {content['answered']}" in printed and len(content["answers"]) == 5
