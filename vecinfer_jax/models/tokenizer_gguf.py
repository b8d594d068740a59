"""Rebuilds a tokenizer from the metadata of a GGUF file.

Such a file names its pre-tokeniser instead of describing it; the patterns here are those of the tokenizers
that llama.cpp gives these names to. Names that are not in the table are refused: a wrong split changes every
prompt.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import Int
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

from vecinfer_jax.errors import WeightsError
from vecinfer_jax.models.gguf_file import GgufFile
from vecinfer_jax.models.tokenizer import TOKENIZER, Tokenizer, put_around, tokenizer_from_directory

_PREFIX = "tokenizer.ggml."
# Token types of the GGUF format.
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 2, 3, 4, 5, 6

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3 = _QWEN2.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclasses.dataclass(frozen=True)
class _Split:
    """How text is cut before byte-level BPE: patterns one after the other, each match a piece."""

    patterns: tuple[str, ...]
    nfc: bool = False
    ignore_merges: bool = False
    add_bos: bool = False


_SMOLLM = _Split((r"\p{N}", _GPT2))
_QWEN = _Split((_QWEN2,), nfc=True)
_LLAMA_BPE = _Split((_LLAMA3,), ignore_merges=True, add_bos=True)

SPLITS: Mapping[str, _Split] = {
    "default": _Split((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
    "gpt-2": _Split((_GPT2,)),
    "mpt": _Split((_GPT2,)),
    "olmo": _Split((_GPT2,)),
    "smollm": _SMOLLM,
    "starcoder": _SMOLLM,
    "refact": _SMOLLM,
    "codeshell": _SMOLLM,
    "qwen2": _QWEN,
    "deepseek-r1-qwen": _QWEN,
    "llama-bpe": _LLAMA_BPE,
    "llama3": _LLAMA_BPE,
    "llama-v3": _LLAMA_BPE,
    "tekken": _Split((_TEKKEN,), ignore_merges=True, add_bos=True),
}


def tokenizer_from_gguf(file: GgufFile) -> Tokenizer:
    """The tokenizer of a GGUF file: a tokenizer.json beside it if there is one, otherwise rebuilt.

    Raises `WeightsError`, saying what to put where, for a kind of tokenizer that cannot be rebuilt.
    """
    meta = {key.removeprefix(_PREFIX): value for key, value in file.metadata.items() if key.startswith(_PREFIX)}
    template = file.metadata.get("tokenizer.chat_template")
    if (file.path.parent / TOKENIZER).is_file():
        beside = tokenizer_from_directory(file.path.parent)
        assert beside is not None
        return beside if beside.template else dataclasses.replace(beside, template=template)
    kind = meta.get("model")
    builders: Mapping[Any, Callable[..., tokenizers.Tokenizer]] = {
        "gpt2": _byte_level,
        "llama": _sentencepiece,
    }
    if kind not in builders or "tokens" not in meta:
        raise WeightsError(
            f"{file.path}: a tokenizer of kind {kind!r} cannot be rebuilt; put the model's {TOKENIZER} beside the file"
        )
    tokens: Sequence[str] = meta["tokens"]
    try:
        backend = builders[kind](file, meta, tokens)
        named = {}
        for name, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            index = meta.get(f"{key}_token_id")
            if index is not None and index < len(tokens):
                named[f"{name}_token"] = tokens[index]
        eos = (meta.get("eos_token_id"), meta.get("eot_token_id"))
        ends = tuple(dict.fromkeys(int(i) for i in eos if i is not None))
    except WeightsError:
        raise
    except Exception as error:  # of many kinds, from a damaged vocabulary; tokenizers raises bare ones
        reason = " ".join(str(error).split())[:200]
        raise WeightsError(
            f"{file.path}: its tokenizer is damaged ({reason}); fetch the file again or put the model's {TOKENIZER} "
            "beside it"
        ) from None
    return Tokenizer(backend=backend, special_tokens=named, template=template, eos_token_ids=ends)


def _byte_level(file: GgufFile, meta: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """Byte-level BPE (GPT-2's, with the pre-tokeniser that `pre` names)."""
    name = meta.get("pre", "qwen2" if file.metadata.get("general.architecture") != "llama" else "default")
    if name not in SPLITS or "merges" not in meta:
        raise WeightsError(
            f"{file.path}: pre-tokeniser {name!r} is not known; put the model's {TOKENIZER} beside the file"
        )
    split = SPLITS[name]
    types = _types(meta, tokens)
    vocabulary = {token: i for i, token in enumerate(tokens) if types[i] != _UNUSED}
    merges = [tuple(merge.split(" ", 1)) for merge in meta["merges"]]
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=merges, fuse_unk=False, ignore_merges=split.ignore_merges)
    )
    if split.nfc:
        backend.normalizer = normalizers.NFC()
    pieces: list[Any] = [pre_tokenizers.Split(Regex(p), behavior="isolated") for p in split.patterns]
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [*pieces, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    backend.decoder = decoders.ByteLevel()
    _add_tokens(backend, tokens, types)
    _add_ends(backend, meta, tokens, add_bos=split.add_bos)
    return backend


def _sentencepiece(file: GgufFile, meta: Mapping[str, Any], tokens: Sequence[str]) -> tokenizers.Tokenizer:
    """SentencePiece BPE with byte fallback (Llama 1 and 2, Mistral): merges in the order of their scores."""
    if "scores" not in meta:
        raise WeightsError(f"{file.path} has no token scores; put the model's {TOKENIZER} beside the file")
    types = _types(meta, tokens)
    scores = np.asarray(meta["scores"], np.float32)
    vocabulary = {token: i for i, token in enumerate(tokens)}
    mergeable = {token: i for token, i in vocabulary.items() if types[i] in (_NORMAL, _USER_DEFINED)}
    merges = []
    for token, i in mergeable.items():
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            if left in mergeable and right in mergeable:
                merges.append((-float(scores[i]), mergeable[left], mergeable[right], left, right))
    merges.sort()
    unknown = tokens[meta.get("unknown_token_id", 0)]
    backend = tokenizers.Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[merge[3:] for merge in merges],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    prefix = bool(meta.get("add_space_prefix", True))
    start = [normalizers.Prepend("▁")] if prefix else []
    backend.normalizer = normalizers.Sequence([*start, normalizers.Replace(" ", "▁")])
    strip = [decoders.Strip(" ", 1, 0)] if prefix else []
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    _add_tokens(backend, tokens, types)
    _add_ends(backend, meta, tokens, add_bos=True)
    return backend


def _types(meta: Mapping[str, Any], tokens: Sequence[str]) -> Int[np.ndarray, "tokens"]:
    return np.asarray(meta.get("token_type", np.full(len(tokens), _NORMAL)))


def _add_tokens(backend: tokenizers.Tokenizer, tokens: Sequence[str], types: Int[np.ndarray, "tokens"]) -> None:
    """Tokens matched in the text before anything else: control tokens (special) and user-defined ones."""
    for kind, special in ((_UNKNOWN, True), (_CONTROL, True), (_USER_DEFINED, False)):
        added = [
            AddedToken(tokens[i], special=special, normalized=False) for i in np.flatnonzero(types == kind).tolist()
        ]
        (backend.add_special_tokens if special else backend.add_tokens)(added)


def _add_ends(backend: tokenizers.Tokenizer, meta: Mapping[str, Any], tokens: Sequence[str], *, add_bos: bool) -> None:
    """What `encode` puts around a text: bos and eos where the file asks for them."""
    bos, eos = meta.get("bos_token_id"), meta.get("eos_token_id")
    before = tokens[bos] if bos is not None and meta.get("add_bos_token", add_bos) else None
    after = tokens[eos] if eos is not None and meta.get("add_eos_token", False) else None
    if before is not None or after is not None:
        put_around(backend, before, after)
