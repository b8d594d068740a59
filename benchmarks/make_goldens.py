"""Writes tests/goldens/: what transformers computes from tests/goldens/inputs.json, for the tests to compare
with.

Run by hand, in an environment of its own (the project does not depend on torch):

    pip install torch transformers accelerate sentencepiece
    python benchmarks/make_goldens.py --smollm2 A.gguf --qwen B.gguf --sentencepiece english.txt

A and B are what `vecinfer fetch smollm2-135m-instruct` and `... qwen2.5-coder-0.5b-instruct` put into the
cache folder; the text may be any, and a small tokenizer is trained on it. Without an argument its goldens are
left as they are. Everything is computed on a CPU in float32, with eager attention.
"""

import argparse
import json
import shutil
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
import transformers
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

GOLDENS = Path(__file__).resolve().parent.parent / "tests" / "goldens"
TOP = 20
NEW_TOKENS = 32

# Random models, small but awkward: odd numbers of query heads a KV head, head_dim apart from hidden / heads.
TINY: dict[str, dict[str, Any]] = {
    "llama": {
        "model_type": "llama",
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "attention_bias": True,
        "mlp_bias": True,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    "smollm2": {
        "model_type": "llama",
        "hidden_size": 72,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    "mistral": {
        "model_type": "mistral",
        "hidden_size": 48,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "sliding_window": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen2": {
        "model_type": "qwen2",
        "hidden_size": 56,
        "num_attention_heads": 7,
        "num_key_value_heads": 1,
        "tie_word_embeddings": True,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "qwen3": {
        "model_type": "qwen3",
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
}
TINY_COMMON = {
    "vocab_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY_LENGTH = 160

INPUTS = json.loads((GOLDENS / "inputs.json").read_text(encoding="utf-8"))
TEXTS, SCORED, PROMPTS = INPUTS["texts"], INPUTS["scored"], INPUTS["prompts"]
CONVERSATION, ROW_STRIDE = INPUTS["conversation"], INPUTS["row_stride"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smollm2", type=Path, help="the GGUF file")
    parser.add_argument("--qwen", type=Path, help="the GGUF file")
    parser.add_argument("--sentencepiece", type=Path, help="any English text, to train a small tokenizer on")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    for name, settings in TINY.items():
        tiny(name, settings)
    if arguments.smollm2:
        model, tokenizer = real(arguments.smollm2)
        tokenizer = individual_digits(tokenizer)
        write_real("smollm2-135m-instruct", model, tokenizer)
        write_greedy("smollm2-135m-instruct", model, tokenizer)
    if arguments.qwen:
        model, tokenizer = real(arguments.qwen)
        tokenizer.backend_tokenizer.normalizer = normalizers.NFC()
        write_real("qwen2.5-coder-0.5b-instruct", model, tokenizer)
    if arguments.sentencepiece:
        write_sentencepiece(arguments.sentencepiece)
    packages = ("torch", "transformers", "tokenizers", "safetensors", "sentencepiece", "numpy")
    made_with = {"python": sys.version.split()[0], **{package: version(package) for package in packages}}
    write_json("versions.json", made_with)


def tiny(name: str, settings: dict[str, Any]) -> None:
    """A random model as a Hugging Face directory, and its logits for two sequences."""
    settings = {**TINY_COMMON, **settings}
    config = transformers.AutoConfig.for_model(**settings)
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            # transformers starts biases at 0 and norms at 1, which would hide a bias that is not added.
            parameter.add_(0.15 * torch.randn(parameter.shape, generator=generator))
    directory = GOLDENS / "tiny" / name
    shutil.rmtree(directory, ignore_errors=True)
    model.save_pretrained(directory)
    ids = torch.randint(config.vocab_size, (2, TINY_LENGTH), generator=generator)
    with torch.no_grad():
        logits = model(ids).logits
    # All of the last positions, and a few of the others, keep the files small.
    positions = sorted({0, 1, 2, 17, 63, 64, 100, *range(TINY_LENGTH - 8, TINY_LENGTH)})
    np.savez_compressed(
        directory / "logits.npz",
        ids=ids.numpy().astype(np.int32),
        positions=np.asarray(positions, np.int32),
        logits=logits[:, positions].numpy(),
    )


def real(path: Path) -> tuple[Any, Any]:
    """Model (dequantised to float32) and tokenizer of a GGUF file, by transformers' own reading of it."""
    where = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32, attn_implementation="eager")
    return model.eval(), transformers.AutoTokenizer.from_pretrained(**where)


def individual_digits(tokenizer: Any) -> Any:
    """SmolLM2's own pre-tokeniser, which its GGUF file names ("smollm") and transformers does not rebuild."""
    backend: Tokenizer = tokenizer.backend_tokenizer
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    return tokenizer


def write_real(name: str, model: Any, tokenizer: Any) -> None:
    """Token ids of TEXTS, logits after SCORED, and a rendered conversation."""
    scored = []
    rows: dict[str, np.ndarray] = {}
    for index, text in enumerate(SCORED):
        ids = encode(tokenizer, text)
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0]
        best = torch.topk(logits[-1], TOP)
        scored.append({"text": text, "ids": ids, "top_ids": best.indices.tolist(), "top_logits": best.values.tolist()})
        if index < 2:
            rows[f"last_{index}"] = logits[-1, ::ROW_STRIDE].numpy()
    rendered = {
        str(prompt): tokenizer.apply_chat_template(CONVERSATION, tokenize=False, add_generation_prompt=prompt)
        for prompt in (True, False)
    }
    golden = {
        "texts": [{"text": text, "ids": encode(tokenizer, text), "decoded": decode(tokenizer, text)} for text in TEXTS],
        "scored": scored,
        "chat": {"messages": CONVERSATION, "rendered": rendered},
        "eos_token_id": tokenizer.eos_token_id,
    }
    (GOLDENS / name).mkdir(exist_ok=True)
    write_json(f"{name}/reference.json", golden)
    np.savez_compressed(GOLDENS / name / "logits.npz", **rows)


def write_greedy(name: str, model: Any, tokenizer: Any) -> None:
    """Greedy continuations of PROMPTS, one at a time, not stopping at an end-of-text token."""
    out = []
    for prompt in PROMPTS:
        ids = torch.tensor([encode(tokenizer, prompt)])
        start = ids.shape[1]
        margins = []
        with torch.no_grad():
            state = model(ids, use_cache=True)
            for _ in range(NEW_TOKENS):
                best = torch.topk(state.logits[0, -1], 2)
                margins.append(float(best.values[0] - best.values[1]))
                ids = torch.cat([ids, best.indices[None, :1]], dim=1)
                state = model(ids[:, -1:], past_key_values=state.past_key_values, use_cache=True)
        tokens = ids[0].tolist()
        out.append(
            {
                "prompt": prompt,
                "ids": tokens[:start],
                "continuation": tokens[start:],
                "text": tokenizer.decode(tokens[start:], skip_special_tokens=True),
                "smallest_margin": min(margins),
            }
        )
    write_json(f"{name}/greedy.json", out)


def write_sentencepiece(corpus: Path) -> None:
    """A small tokenizer of Llama 2's kind: its vocabulary as a GGUF file has it, and ids of TEXTS."""
    stem = str(corpus.with_suffix(".golden"))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus),
        model_prefix=stem,
        model_type="bpe",
        vocab_size=1000,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        character_coverage=0.999,
        minloglevel=2,
    )
    model = sentencepiece.SentencePieceProcessor(model_file=stem + ".model")
    types = []
    for i in range(model.vocab_size()):
        types.append(2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1)
    texts = [{"text": text, "ids": model.encode(text)} for text in TEXTS]
    golden = {
        "tokens": [model.id_to_piece(i) for i in range(model.vocab_size())],
        "scores": [model.get_score(i) for i in range(model.vocab_size())],
        "token_type": types,
        "texts": [{**case, "decoded": model.decode(case["ids"])} for case in texts],
    }
    write_json("sentencepiece.json", golden)


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids without anything around the text."""
    return tokenizer.backend_tokenizer.encode(text, add_special_tokens=False).ids


def decode(tokenizer: Any, text: str) -> str:
    """The text as its tokens give it back."""
    return tokenizer.backend_tokenizer.decode(encode(tokenizer, text), skip_special_tokens=False)


def write_json(name: str, data: Any) -> None:
    (GOLDENS / name).write_text(json.dumps(data, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
