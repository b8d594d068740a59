"""Pictures of docs/better-than-the-paper.md, from keys of SmolLM2 and Qwen2.5-Coder-0.5B on Wikipedia paragraphs.

    python benchmarks/key_pictures.py [--passages 8] [--output docs/images]

What they show is also written, as numbers, to benchmarks/results/<device>/keys-<model>.json.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import results

import vecinfer_jax as vj
from vecinfer_jax.calibration.collect import Activations, collect
from vecinfer_jax.calibration.statistics import LayerStatistics
from vecinfer_jax.models.decoder import layer_shape

MODELS = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")
TRANSFORMS = {"smooth-hadamard": "the paper", "mean-smooth-hadamard": "mean off, then the paper", "metric": "metric"}
# Layers whose codebooks are fitted for the second picture.
EVERY = 6


def static_share(layer: LayerStatistics) -> float:
    """Share of the keys' energy that is in the constant part, tokens after the first."""
    keys = np.asarray(layer.keys, np.float32)[np.asarray(layer.positions) > 0]
    return float(np.sum(keys.mean(axis=0) ** 2) / np.mean(np.sum(keys**2, axis=(1, 2))))


def first_distance(layer: LayerStatistics) -> float:
    """How far first tokens' keys are from the mean of the others, over how far those are (root mean squares)."""
    keys, first = np.asarray(layer.keys, np.float32), np.asarray(layer.positions) == 0
    centred = keys - keys[~first].mean(axis=0)
    return float(np.sqrt(np.mean(centred[first] ** 2) / np.mean(centred[~first] ** 2)))


def score_errors(lm: vj.LanguageModel, layer: LayerStatistics, index: int) -> dict[str, float]:
    """E (q . e)^2 of 2-bit keys over Var(q . k), tokens after the first, by transform: what the softmax can see."""
    shape = layer_shape(lm.config, index, lm.dtype)
    keys = np.asarray(layer.keys, np.float32)[np.asarray(layer.positions) > 0][:2048]
    errors = {}
    for transform in TRANSFORMS:
        method = vj.VecInfer(bits=2, transform=transform, sink=1, residual=0)
        store = method.init(shape, 1, len(keys) + 1, method.calibrate_layer(shape, layer, 0)).store
        centred = method.centred(keys[None], store)
        store = method.append(store, centred, centred, np.arange(len(keys))[None], shape)
        read = np.asarray(method.read(store, np.int32(0), len(keys), shape)[0])[0].swapaxes(0, 1)

        def seen(x: np.ndarray) -> float:
            x = x - x.mean(axis=0)
            return float(np.einsum("nhd,hde,nhe->", x, np.asarray(layer.query_moment), x))

        errors[transform] = seen(read - np.asarray(centred)[0]) / seen(keys)
    return errors


def facts(lm: vj.LanguageModel, activations: Activations) -> dict[str, Any]:
    layers = activations.statistics
    return {
        "model": lm.name,
        "passages": activations.metadata["passages"],
        "passage_length": activations.metadata["passage_length"],
        "static_share": [round(static_share(layer), 4) for layer in layers],
        "first_distance": [round(first_distance(layer), 3) for layer in layers],
        "score_error": {
            str(i): {name: round(value, 4) for name, value in score_errors(lm, layers[i], i).items()}
            for i in range(0, len(layers), EVERY)
        },
    }


def picture_of_keys(layer: LayerStatistics, index: int, path: Path) -> None:
    """Keys of one head, by position and channel: stripes are constant parts, the first row is the sink."""
    order = np.lexsort((np.asarray(layer.priority), np.asarray(layer.positions)))
    positions = np.asarray(layer.positions)[order]
    keys = np.asarray(layer.keys, np.float32)[order]
    first = np.concatenate([[True], positions[1:] != positions[:-1]])  # one token of each position
    keys = keys[first][:64]
    head = int(np.argmax(np.abs(keys[1:].mean(axis=0)).max(axis=1)))
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.2), dpi=90, sharey=True, layout="constrained")
    limit = np.quantile(np.abs(keys[:, head]), 0.99)
    shown = {"keys after RoPE": keys[:, head], "their mean taken off": keys[:, head] - keys[1:, head].mean(axis=0)}
    for axis, (title, x) in zip(axes, shown.items(), strict=True):
        image = axis.imshow(x, aspect="auto", cmap="RdBu_r", vmin=-limit, vmax=limit, interpolation="nearest")
        axis.set_title(f"{title}, layer {index}, head {head}", fontsize=10)
        axis.set_xlabel("channel")
    axes[0].set_ylabel("position")
    figure.colorbar(image, ax=axes, extend="both")
    save(figure, path)


def picture_of_errors(every: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, len(every), figsize=(9, 3.2), dpi=90, layout="constrained")
    for axis, found in zip(axes, every, strict=True):
        layers = list(found["score_error"])
        for at, (transform, title) in enumerate(TRANSFORMS.items()):
            heights = [found["score_error"][layer][transform] for layer in layers]
            axis.bar(np.arange(len(layers)) + 0.27 * (at - 1), heights, width=0.25, label=title)
        axis.set_xticks(range(len(layers)), layers)
        axis.set_yscale("log")
        axis.set_xlabel("layer")
        axis.set_title(found["model"], fontsize=10)
    axes[0].set_ylabel("error of scores at 2 bits,\nrelative to their variance")
    axes[-1].legend(loc="upper right", frameon=False, fontsize=8)
    save(figure, path)


def picture_of_means(every: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(1, 2, figsize=(9, 3), dpi=90, layout="constrained")
    for found in every:
        axes[0].plot(found["static_share"], marker=".", label=found["model"])
        axes[1].plot(found["first_distance"], marker=".", label=found["model"])
    axes[0].set_ylabel("share of the keys' energy\nin their mean")
    axes[0].set_ylim(0, 1)
    axes[1].set_ylabel("first key's distance from the mean\n/ usual distance")
    axes[1].set_ylim(0)
    for axis in axes:
        axis.set_xlabel("layer")
    axes[0].legend(frameon=False, fontsize=8)
    save(figure, path)


def save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Software": None})
    plt.close(figure)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--passages", type=int, default=8)
    parser.add_argument("--passage-length", type=int, default=512)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent.parent / "docs" / "images")
    args = parser.parse_args()
    folder = results.ROOT / results.device_name()
    folder.mkdir(parents=True, exist_ok=True)
    every = []
    for name in MODELS:
        lm = vj.load(name, "float32", progress=False)
        activations = collect(lm, passages=args.passages, passage_length=args.passage_length, progress=False)
        every.append(facts(lm, activations))
        path = folder / f"keys-{name}.json"
        path.write_text(json.dumps(every[-1], indent=1) + "\n", encoding="utf-8")
        print(path)
        if name == MODELS[0]:
            index = int(np.argmax(every[-1]["static_share"]))
            picture_of_keys(activations.statistics[index], index, args.output / "keys.png")
    picture_of_means(every, args.output / "key-means.png")
    picture_of_errors(every, args.output / "key-errors.png")


if __name__ == "__main__":
    main()
