"""What TailorKV finds in a model: each layer's dense preference, and how much attention its chosen tokens receive.

    python benchmarks/layer_roles.py --text wikitext2_detok_test.txt [--model smollm2-135m-instruct] [--calibration DIR]

Writes benchmarks/results/<device>/layer-roles-<model>.json, and docs/images/layer-roles.png from all such files.
"""

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import results

import vecinfer_jax as vj
from vecinfer_jax.evaluation.perplexity import text_windows

CHANNELS = (8, 12)
IMAGES = Path(__file__).parent.parent / "docs" / "images"


def facts(lm: vj.LanguageModel, calibration: vj.Calibration, windows: Any) -> dict[str, Any]:
    """The calibration's findings, and the selection with every layer on the host."""
    method = vj.TailorKV(roles=(f"sparse*{lm.config.num_layers}",))
    ours = dataclasses.replace(method, basis="principal")
    basis = vj.calibrate(lm, ours, passages=2**15 // windows.shape[1], passage_length=windows.shape[1])

    def recall(method: vj.TailorKV, calibration: vj.Calibration | None) -> dict[str, Any]:
        wanted = {str(n): dataclasses.replace(method, channels=n) for n in CHANNELS}
        found = {n: vj.evaluate.selection_recall(lm, one, calibration, windows) for n, one in wanted.items()}
        return {n: dataclasses.asdict(result) for n, result in found.items()}

    made = {name: calibration.metadata[name] for name in ("model", "text", "passages", "passage_length", "seed")}
    return {
        "calibration": made,
        **calibration.metadata["findings"],
        "threshold": method.threshold,
        "windows": list(windows.shape),
        "tokens": method.tokens,
        "by_channels": recall(method, None),
        "by_channels_in_principal_basis": recall(ours, basis),
        "by_channels_of_each_head": recall(dataclasses.replace(method, heads="each"), None),
        "by_channels_in_principal_basis_of_each_head": recall(dataclasses.replace(ours, heads="each"), basis),
    }


def draw(path: Path) -> None:
    """Scores on the left, shares of the best possible choice on the right, a line a model."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), dpi=90, layout="constrained")
    for file in sorted(results.ROOT.glob("*/layer-roles-*.json")):
        found = json.loads(file.read_text())
        name = found["calibration"]["model"]["name"]
        axes[0].plot(found["dense_preference"], marker=".", label=name)
        axes[0].axhline(found["threshold"], color="grey", linewidth=0.8, linestyle="--")
        for channels, measured in found["by_channels"].items():
            axes[1].plot(measured["recall_by_layer"], marker=".", label=f"{name}, {channels} channels")
    axes[0].set_ylabel("attention outside the top 5%")
    axes[1].set_ylabel("attention to chosen tokens\n/ to the most attended")
    for axis in axes:
        axis.set_xlabel("layer")
        axis.set_ylim(0, 1)
        axis.legend(frameon=False, fontsize=8)
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--model", default="smollm2-135m-instruct")
    parser.add_argument("--calibration", type=Path, help="an artefact of TailorKV; default: one is made")
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--windows", type=int, default=2)
    args = parser.parse_args()
    lm = vj.load(args.model, "float32", progress=False)
    windows = text_windows(lm, args.text.read_text(encoding="utf-8"), args.length, args.windows)
    method = vj.TailorKV()
    made = vj.calibrate(lm, method) if args.calibration is None else vj.load_calibration(args.calibration, lm, method)
    print(results.write(f"layer-roles-{args.model}", facts(lm, made, windows)))
    draw(IMAGES / "layer-roles.png")


if __name__ == "__main__":
    main()
