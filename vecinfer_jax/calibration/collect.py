"""`calibrate`: text in, calibration out."""

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from vecinfer_jax import assets
from vecinfer_jax.caches.base import CacheMethod
from vecinfer_jax.calibration.artefact import Calibration, versions
from vecinfer_jax.calibration.distil import refine_model
from vecinfer_jax.calibration.fisher import GradientSampler
from vecinfer_jax.calibration.statistics import LayerStatistics, Statistics, Windows
from vecinfer_jax.errors import CalibrationError, InputError, check_seed
from vecinfer_jax.models import LanguageModel
from vecinfer_jax.models.decoder import layer_shape
from vecinfer_jax.models.folding import fold_values
from vecinfer_jax.models.layerwise import Layerwise

DEFAULT_TEXT = "hotpotqa-paragraphs"
# What a calibration is made from unless it is said otherwise.
PASSAGES, PASSAGE_LENGTH, SAMPLES = 64, 512, 32768
# Where passages are as long as what will be read: how many at least, and how long at most, also where descent goes
# through whole ones. What is read beyond is warned of.
FEWEST_PASSAGES, LONGEST, LONGEST_DESCENT = 2, 32768, 4096
# Passages that are kept as a whole, for methods that want them.
WINDOWS = 32


@dataclasses.dataclass(frozen=True, eq=False)
class Activations:
    """What a model's keys, queries and values are like on a text: any method can be fitted to it.

    statistics: one a layer; metadata: of the model, the text and the run, goes into every calibration made from it;
    passages: the tokens they are of.
    """

    statistics: list[LayerStatistics]
    metadata: dict[str, Any]
    passages: list[list[int]] = dataclasses.field(default_factory=list)


def calibrate(
    lm: LanguageModel,
    method: CacheMethod,
    texts: Iterable[str] | None = None,
    *,
    passages: int | None = None,
    passage_length: int | None = None,
    samples: int = SAMPLES,
    repeated: float | None = None,
    batch: int = 4,
    seed: int = 0,
    progress: bool = True,
) -> Calibration:
    """Fits a method's codebooks and scales to a model's activations on text: `fit` to what `collect` finds.

    Args:
        lm: the model.
        method: what to calibrate; methods that need nothing get an empty calibration.
        texts: documents, streamed and joined until `passages` are full; default: Wikipedia paragraphs in random
            order (see `vecinfer_jax.assets`).
        passages, passage_length: how many passages of how many tokens (VecInfer, section 4.1: 256 of 512); default: 64
            of 512, or what the method asks for.
        samples: tokens, drawn from all of them, whose keys and values are kept of each layer to fit codebooks to. More
            are better and take memory: what is rare, such as the first tokens of passages, is then drawn more often.
        repeated: share of the passages, 0 to 1 and rounded down to whole ones, whose second half says again what the
            first does, its documents in another order, so that the best prediction of it reads the cache exactly;
            default: 0, or what the method asks for.
        batch: passages run at a time.
        seed: of everything random; the same seed gives the same calibration on the same device.
        progress: show progress bars.

    Raises:
        CalibrationError: the text is empty or too short, or an activation is not finite.
        InputError: a number is out of its range, or the method's layers do not go together.
    """
    text = text_of(lm, method)
    activations = collect(
        lm,
        texts,
        passages=text[0] if passages is None else passages,
        passage_length=text[1] if passage_length is None else passage_length,
        samples=samples,
        repeated=method.calibration_repeated if repeated is None else repeated,
        batch=batch,
        seed=seed,
        wanted=method.wanted_statistics(),
        progress=progress,
    )
    return fit(lm, method, activations, progress=progress)


def text_of(lm: LanguageModel, method: CacheMethod, tokens: int | None = None) -> tuple[int, int]:
    """Passages, and tokens of one, that a method is calibrated on unless it is said otherwise; where it serves no later
    positions than the text has, in passages of `tokens` tokens or more, fewer of them."""
    passages, length = method.calibration_text or (PASSAGES, PASSAGE_LENGTH)
    if tokens is not None and method.bound_to_positions:
        longest = LONGEST_DESCENT if "windows" in method.wanted_statistics() else LONGEST
        longer = min(1 << (tokens - 1).bit_length(), longest, lm.config.max_position)
        if longer > length:
            passages, length = max(passages * length // longer, FEWEST_PASSAGES), longer
    return passages, min(length, lm.config.max_position)


def collect(
    lm: LanguageModel,
    texts: Iterable[str] | None = None,
    *,
    passages: int = PASSAGES,
    passage_length: int = PASSAGE_LENGTH,
    samples: int = SAMPLES,
    repeated: float = 0.0,
    batch: int = 4,
    seed: int = 0,
    wanted: frozenset[str] = frozenset(),
    progress: bool = True,
) -> Activations:
    """Runs a model over text and keeps what calibrations need; takes and raises what `calibrate` does.

    `wanted`: what is kept beside what every method needs (`CacheMethod.wanted_statistics`); all else is the same with
    and without. Gradients take several times as long.
    """
    if passages < 1 or batch < 1 or samples < 1:
        raise InputError(f"passages={passages}, samples={samples} and batch={batch} must be 1 or more")
    if not 2 <= passage_length <= lm.config.max_position:
        raise InputError(
            f"passage_length={passage_length} must be from 2 to the model's context of {lm.config.max_position}"
        )
    if not 0 <= repeated <= 1:
        raise InputError(f"repeated={repeated} must be a share of the passages, from 0 to 1")
    check_seed(seed)
    digest = hashlib.sha256()
    text_name = "given" if texts is not None else DEFAULT_TEXT
    if texts is None:
        texts = default_texts(seed)
    if isinstance(texts, str):
        raise InputError("texts must be an iterable of documents, not one string; use [text]")

    def hashed() -> Iterator[str]:
        for text in texts:
            digest.update(text.encode())
            digest.update(b"\0")
            yield text

    rows: list[list[int]] = []

    def kept() -> Iterator[list[int]]:
        for row in passages_of(lm, hashed(), passage_length, repeated, seed):
            rows.append(row)
            yield row

    count, statistics = collect_statistics(
        lm,
        kept(),
        passages=passages,
        samples=min(samples, passages * passage_length),
        batch=batch,
        seed=seed,
        weights="weights" in wanted,
        windows=min(passages, WINDOWS) if "windows" in wanted else 0,
        length=passage_length,
        progress=progress,
        gradients="gradients" in wanted,
        shares="shares" in wanted,
    )
    metadata = {
        "model": {"name": lm.name, "fingerprint": lm.fingerprint},
        "text": {"name": text_name, "sha256": digest.hexdigest()},
        "passages": count,
        "passage_length": passage_length,
        "longest_passage": max(map(len, rows[:count])),
        "samples": samples,
        "repeated": repeated,
        "seed": seed,
        "dtype": str(jnp.dtype(lm.dtype)),
        "device": jax.devices()[0].device_kind,
        "versions": versions(),
    }
    return Activations(statistics, metadata, rows[:count])


def fit(lm: LanguageModel, method: CacheMethod, activations: Activations, *, progress: bool = True) -> Calibration:
    """A method's calibration from a model's activations.

    Raises `CalibrationError` where the activations are another model's, too few, or not finite.
    """
    if activations.metadata["model"]["fingerprint"] != lm.fingerprint:
        raise CalibrationError(
            f"these activations are of model {activations.metadata['model']['name']!r}: collect again"
        )
    seed, statistics, n = activations.metadata["seed"], activations.statistics, lm.config.num_layers
    shapes = [layer_shape(lm.config, index, lm.dtype) for index in range(n)]
    key, surveyed = method.calibration_key(), method.survey(statistics)
    unresolved, method = method, method.resolved(surveyed)
    methods = [method.for_layer(index, n) for index in range(n)]
    shared = {}
    keys = [json.dumps(one.calibration_key(), sort_keys=True) for one in methods]  # a window needs no calibration
    for each in dict.fromkeys(keys):
        served = [index for index, other in enumerate(keys) if other == each]
        shared[each] = methods[served[0]].shared_calibration(
            [shapes[i] for i in served],
            [statistics[i] for i in served],
            seed=(seed * 1_000_003 + 500_000 + served[0]) % 2**31,
        )
    layers = []
    shown = tqdm(enumerate(statistics), "codebooks", total=n, disable=not progress, unit="layer")
    for index, layer_statistics in shown:
        fitted = methods[index].calibrate_layer(
            shapes[index],
            layer_statistics,
            seed=(seed * 1_000_003 + 2 * index) % 2**31,
            shared=shared[keys[index]],
        )
        for field, array in fitted.items():
            if not np.all(np.isfinite(array)):
                raise CalibrationError(f"layer {index}: {field} came out not finite; is the model's output finite?")
        layers.append({**surveyed[index], **fitted})
    if any(one.refines_model for one in methods):
        layers = _refined(lm, method, methods, layers, activations, progress)
    found = unresolved.findings(layers)
    return Calibration(tuple(layers), {**activations.metadata, "method": key, **({"findings": found} if found else {})})


def _refined(
    lm: LanguageModel,
    method: CacheMethod,
    methods: list[CacheMethod],
    layers: list[dict[str, np.ndarray]],
    activations: Activations,
    progress: bool,
) -> list[dict[str, np.ndarray]]:
    """Every layer's arrays after descent on the model's predictions."""
    if not all(one.refines_model for one in methods):
        raise InputError("refine='kl' runs through the whole model: give it to every layer's method")
    seed = activations.metadata["seed"]
    params = fold_values(lm, method, Calibration(tuple(layers), {"method": method.calibration_key()}))
    sinks = [int(getattr(one, "sink", 0)) for one in methods]
    refined = refine_model(lm, params, layers, sinks, activations.passages, seed=seed, progress=progress)
    if not all(np.all(np.isfinite(array)) for layer in refined for array in layer.values()):
        raise CalibrationError("the refinement came out not finite: use refine='attention'")
    return refined


def collect_statistics(
    lm: LanguageModel,
    passages_in: Iterable[list[int]],
    *,
    passages: int,
    samples: int = SAMPLES,
    batch: int,
    seed: int,
    progress: bool,
    gradients: bool = False,
    weights: bool = False,
    windows: int = 0,
    length: int = 0,
    shares: bool = False,
) -> tuple[int, list[LayerStatistics]]:
    """Runs the model over at most `passages` passages of tokens -> (how many, statistics per layer).

    weights, windows, length, shares: what `Statistics` keeps beside.
    """
    model = Layerwise(lm, Statistics(samples, seed, weights, windows, length if windows else 0, shares))
    caches = model.init(batch, 0)
    fisher = GradientSampler(lm, samples, seed) if gradients else None
    source = itertools.islice(iter(passages_in), passages)
    done = 0
    name = "activations and gradients" if gradients else "activations"
    with tqdm(total=passages, desc=name, disable=not progress, unit="passage") as bar:
        while rows := list(itertools.islice(source, batch)):
            width = max(len(row) for row in rows)
            tokens = np.zeros((batch, width), np.int32)
            lengths = np.zeros((batch,), np.int32)
            for i, row in enumerate(rows):
                tokens[i, : len(row)], lengths[i] = row, len(row)
            inputs: list[jax.Array] | None = None if fisher is None else []
            out, caches = model.prefill(caches, tokens, lengths, donate=True, inputs=inputs)
            if fisher is not None and inputs is not None:
                fisher.add(tokens, lengths, inputs, out)
            done += len(rows)
            bar.update(len(rows))
    if not done:
        raise CalibrationError("the calibration text is empty: give --text a file with some text in it")
    if fisher is not None:
        caches = [
            dataclasses.replace(layer, key_gradients=sample.keys, value_gradients=sample.values)
            for layer, sample in zip(caches, fisher.layers, strict=True)
        ]
    return done, [jax.tree.map(np.asarray, _trim(layer)) for layer in caches]


def _trim(layer: LayerStatistics) -> LayerStatistics:
    """Drops sample slots that a short text left empty."""
    filled = np.asarray(layer.positions) >= 0
    sampled = ("keys", "values", "positions", "priority", "key_gradients", "value_gradients", "key_weights")
    held = {name: getattr(layer, name) for name in (*sampled, "value_weights")}
    return dataclasses.replace(
        layer,
        **{name: x[filled] for name, x in held.items() if x is not None},
        windows=None if layer.windows is None else _used(layer.windows),
    )


def _used(windows: Windows) -> Windows:
    """Without the places for passages that did not come."""
    used = np.asarray(windows.at)[:, 0] >= 0
    return jax.tree.map(lambda x: x[used], windows)


def passages_of(
    lm: LanguageModel, texts: Iterable[str], length: int, repeated: float = 0.0, seed: int = 0
) -> Iterator[list[int]]:
    """Token ids of consecutive documents, a blank line between them, cut into passages of `length` tokens.

    Of the passages a share `repeated`, evenly spread, consist of half as much text and the same once more, its
    documents (the first and the last of them cut, and joined as they were cut) in an order given by `seed`; where one
    document is longer than that, it alone again. The last passage of the text is given out even if it is shorter.
    """
    if lm.tokenizer is None:
        raise InputError(f"model {lm.name!r} has no tokenizer to read the calibration text with")
    rng = np.random.default_rng(seed)
    waiting: list[list[int]] = []  # documents, or what is left of the first
    start = lm.tokenizer.encode("")  # what the tokenizer puts in front of every text, if anything
    body = max(length - len(start), 1)
    count = 0
    for text in texts:
        if not text.strip():
            continue
        text = text if not (count or waiting) else "\n\n" + text
        waiting.append(lm.tokenizer.encode(text, add_special_tokens=False))
        while True:
            twice = int((count + 1) * repeated) > int(count * repeated)
            wanted = body - body // 2 if twice else body
            if sum(map(len, waiting)) < wanted:
                break
            said, waiting = _cut(waiting, wanted)
            again = [said[i] for i in rng.permutation(len(said))] if twice else []
            yield start + list(itertools.chain(*said, *again))[:body]
            count += 1
    if any(waiting):
        yield start + list(itertools.chain(*waiting))


def _cut(documents: list[list[int]], tokens: int) -> tuple[list[list[int]], list[list[int]]]:
    """The first `tokens` tokens of documents, and the rest."""
    first: list[list[int]] = []
    for i, document in enumerate(documents):
        if tokens <= len(document):
            rest = [document[tokens:]] if tokens < len(document) else []
            return [*first, document[:tokens]], [*rest, *documents[i + 1 :]]
        first.append(document)
        tokens -= len(document)
    return first, []


def default_texts(seed: int) -> Iterator[str]:
    """The default calibration text in an order given by `seed`."""
    paragraphs = list(assets.paragraphs(DEFAULT_TEXT))
    for index in np.random.default_rng(seed).permutation(len(paragraphs)):
        yield paragraphs[index]
