"""Tokenizers: the true ids, exact streaming, chat templates as transformers renders them."""

import json
import pickle

import gguf
import pytest
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from tests.conftest import GOLDENS
from vecinfer_jax import assets
from vecinfer_jax.errors import AssetError, InputError, WeightsError
from vecinfer_jax.models import IncrementalDecoder, Tokenizer
from vecinfer_jax.models.gguf_file import GgufFile
from vecinfer_jax.models.tokenizer import tokenizer_from_directory
from vecinfer_jax.models.tokenizer_gguf import SPLITS, tokenizer_from_gguf

SENTENCEPIECE = json.loads((GOLDENS / "sentencepiece.json").read_text(encoding="utf-8"))
REAL = ("smollm2-135m-instruct", "qwen2.5-coder-0.5b-instruct")


@pytest.fixture(scope="session")
def real_tokenizer():
    """real_tokenizer(name) -> the tokenizer of a real model, without loading its weights."""
    made = {}

    def get(name: str) -> Tokenizer:
        if name not in made:
            try:
                path = assets.fetch(name, progress=False)
            except AssetError as error:
                pytest.skip(f"REAL TOKENIZER NOT TESTED: {error}")
            made[name] = tokenizer_from_gguf(GgufFile(path))
        return made[name]

    return get


def reference(name: str) -> dict:
    return json.loads((GOLDENS / name / "reference.json").read_text(encoding="utf-8"))


@pytest.fixture(params=[REAL[0], pytest.param(REAL[1], marks=pytest.mark.slow)])
def case(request, real_tokenizer):
    """-> (tokenizer, what transformers says of it)."""
    return real_tokenizer(request.param), reference(request.param)


def test_ids_and_text_are_transformers(case):
    tokenizer, golden = case
    for text in golden["texts"]:
        assert tokenizer.encode(text["text"], add_special_tokens=False) == text["ids"], text["text"]
        assert tokenizer.decode(text["ids"], skip_special_tokens=False) == text["decoded"]


def test_neither_model_adds_special_tokens(case):
    tokenizer, _ = case
    assert tokenizer.encode("Hello") == tokenizer.encode("Hello", add_special_tokens=False)


def test_special_tokens_are_left_out_of_text(case):
    tokenizer, _ = case
    ids = tokenizer.encode("<|im_start|>user\nHi<|im_end|>")
    assert tokenizer.decode(ids) == "user\nHi"


def test_chat_template(case):
    tokenizer, golden = case
    for prompt, text in golden["chat"]["rendered"].items():
        messages = golden["chat"]["messages"]
        assert tokenizer.apply_chat_template(messages, add_generation_prompt=prompt == "True") == text


def test_ends(case):
    tokenizer, golden = case
    assert golden["eos_token_id"] in tokenizer.eos_token_ids
    assert tokenizer.backend.id_to_token(tokenizer.eos_token_ids[0]) == "<|im_end|>"


def test_digits_of_smollm2_are_tokens_of_their_own(real_tokenizer):
    tokenizer = real_tokenizer(REAL[0])
    assert [tokenizer.decode([i]) for i in tokenizer.encode("in 1969, 12")] == [
        *("in", " ", "1", "9", "6", "9", ",", " ", "1", "2")
    ]


def test_pickles(real_tokenizer):
    tokenizer = real_tokenizer(REAL[0])
    again = pickle.loads(pickle.dumps(tokenizer))
    assert again.encode("Hello, world") == tokenizer.encode("Hello, world")


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, 49151), max_size=24), cut=st.integers(1, 5), skip=st.booleans())
def test_streamed_text_adds_up(real_tokenizer, ids, cut, skip):
    tokenizer = real_tokenizer(REAL[0])
    stream = IncrementalDecoder(tokenizer, skip_special_tokens=skip)
    pieces = [stream.push(ids[at : at + cut]) for at in range(0, len(ids), cut)]
    assert "".join([*pieces, stream.finish()]) == tokenizer.decode(ids, skip_special_tokens=skip)


@settings(deadline=None, max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=st.text(max_size=30))
def test_streamed_characters_are_whole(real_tokenizer, text):
    tokenizer = real_tokenizer(REAL[0])
    stream = IncrementalDecoder(tokenizer, skip_special_tokens=False)
    ids = tokenizer.encode(text)
    whole = tokenizer.decode(ids, skip_special_tokens=False)  # not `text`: a few rare bytes have no token
    pieces = [stream.push([i]) for i in ids]
    assert "".join([*pieces, stream.finish()]) == whole
    if "\ufffd" not in whole:
        assert "\ufffd" not in "".join(pieces)


def write_tokenizer(path, kind, tokens, types, **fields):
    """A GGUF file that holds nothing but a tokenizer."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    for name, value in fields.items():
        getattr(writer, f"add_{name}")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path)


@pytest.fixture
def sentencepiece(tmp_path):
    """The SentencePiece tokenizer of the goldens, by way of a GGUF file."""
    file = write_tokenizer(
        tmp_path / "spm.gguf",
        "llama",
        SENTENCEPIECE["tokens"],
        SENTENCEPIECE["token_type"],
        token_scores=SENTENCEPIECE["scores"],
        bos_token_id=1,
        eos_token_id=2,
        unk_token_id=0,
    )
    return tokenizer_from_gguf(file)


def test_sentencepiece_is_rebuilt_from_scores(sentencepiece):
    for case in SENTENCEPIECE["texts"]:
        if "<|" in case["text"] or not case["text"]:
            continue
        assert sentencepiece.encode(case["text"], add_special_tokens=False) == case["ids"], case["text"]
        assert sentencepiece.decode(case["ids"]) == case["decoded"]


def test_sentencepiece_adds_bos_unless_told_otherwise(sentencepiece):
    assert sentencepiece.encode("Hello")[0] == 1
    assert sentencepiece.bos_token_id == 1


@settings(deadline=None, max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ids=st.lists(st.integers(0, len(SENTENCEPIECE["tokens"]) - 1), max_size=16))
def test_streamed_byte_fallback_adds_up(sentencepiece, ids):
    stream = IncrementalDecoder(sentencepiece)
    pieces = [stream.push([i]) for i in ids]
    assert "".join([*pieces, stream.finish()]) == sentencepiece.decode(ids)


def byte_level(path, pre, **fields):
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = [*alphabet, "12", "Ġa", "<bos>", "<think>"]
    types = [1] * (len(alphabet) + 2) + [3, 4]
    return write_tokenizer(
        path,
        "gpt2",
        tokens,
        types,
        token_merges=["1 2", "Ġ a"],
        tokenizer_pre=pre,
        bos_token_id=len(tokens) - 2,
        **fields,
    )


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["12", "Ġa"]),
        ("smollm", ["1", "2", "Ġa"]),
        ("qwen2", ["1", "2", "Ġa"]),
        ("llama-bpe", ["<bos>", "12", "Ġa"]),
        ("tekken", ["<bos>", "1", "2", "Ġa"]),
        ("default", ["12", "Ġa"]),
    ],
)
def test_pre_tokenisers_differ_in_digits_and_bos(tmp_path, pre, pieces):
    tokenizer = tokenizer_from_gguf(byte_level(tmp_path / "a.gguf", pre))
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("12 a")] == pieces


@pytest.mark.parametrize("pre", sorted(SPLITS))
def test_every_pre_tokeniser_loses_nothing(tmp_path, pre):
    tokenizer = tokenizer_from_gguf(byte_level(tmp_path / "a.gguf", pre))
    for text in json.loads((GOLDENS / "inputs.json").read_text(encoding="utf-8"))["texts"]:
        if "e\u0301" not in text:  # which NFC composes
            assert tokenizer.decode(tokenizer.encode(text)) == text


def test_bos_is_the_files_to_decide(tmp_path):
    without = tokenizer_from_gguf(byte_level(tmp_path / "a.gguf", "llama-bpe", add_bos_token=False))
    assert without.backend.id_to_token(without.encode("a")[0]) == "a"
    with_bos = tokenizer_from_gguf(byte_level(tmp_path / "b.gguf", "gpt-2", add_bos_token=True))
    assert with_bos.decode(with_bos.encode("a")[:1], skip_special_tokens=False) == "<bos>"


def test_user_defined_tokens_are_whole_and_visible(tmp_path):
    tokenizer = tokenizer_from_gguf(byte_level(tmp_path / "a.gguf", "gpt-2"))
    ids = tokenizer.encode("a<think>b")
    assert len(ids) == 3
    assert tokenizer.decode(ids) == "a<think>b"


@pytest.mark.parametrize(("kind", "pre"), [("gpt2", "mystery"), ("bert", "gpt-2")])
def test_unknown_tokenizers_are_refused(tmp_path, kind, pre):
    file = write_tokenizer(tmp_path / "a.gguf", kind, ["a"], [1], tokenizer_pre=pre, token_merges=["a a"])
    with pytest.raises(WeightsError, match=r"put the model's tokenizer\.json beside the file") as error:
        tokenizer_from_gguf(file)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("damage", [{"token_merges": ["a x"]}, {"bos_token_id": 9, "add_bos_token": True}])
def test_damaged_vocabularies_are_refused(tmp_path, damage):
    fields = {"token_merges": ["a a"], **damage}
    file = write_tokenizer(tmp_path / "a.gguf", "gpt2", ["a", "aa"], [1, 1], tokenizer_pre="gpt-2", **fields)
    with pytest.raises(WeightsError, match=r"a\.gguf: its tokenizer is damaged") as error:
        tokenizer_from_gguf(file)
    assert "\n" not in str(error.value)


def hugging_face(directory, **config):
    """A directory with a word-level tokenizer.json and a tokenizer_config.json."""
    vocabulary = {"[UNK]": 0, "hello": 1, "world": 2, "<s>": 3, "</s>": 4}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<s>", "</s>"])
    backend.enable_truncation(2)
    backend.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


def test_hugging_face_directory(tmp_path):
    directory = hugging_face(
        tmp_path, bos_token={"content": "<s>", "lstrip": False}, eos_token="</s>", chat_template="{{ eos_token }}"
    )
    tokenizer = tokenizer_from_directory(directory)
    assert tokenizer.encode("hello world hello") == [1, 2, 1]  # a saved truncation is not applied
    assert (tokenizer.bos_token_id, tokenizer.eos_token_ids) == (3, (4,))
    assert tokenizer.apply_chat_template([]) == "</s>"
    (directory / "chat_template.jinja").write_text("{{ bos_token }}", encoding="utf-8")
    assert tokenizer_from_directory(directory).apply_chat_template([]) == "<s>"


def test_hugging_face_bos_and_eos_on_request(tmp_path):
    directory = hugging_face(tmp_path, bos_token="<s>", eos_token="</s>", add_bos_token=True, add_eos_token=True)
    tokenizer = tokenizer_from_directory(directory)
    assert tokenizer.encode("hello") == [3, 1, 4]
    assert tokenizer.encode("hello", add_special_tokens=False) == [1]


def test_tokenizer_json_beside_a_gguf_file_wins(tmp_path):
    file = byte_level(tmp_path / "a.gguf", "mystery")
    hugging_face(tmp_path)
    assert tokenizer_from_gguf(file).encode("hello world") == [1, 2]


def test_named_chat_templates(tmp_path):
    templates = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    tokenizer = tokenizer_from_directory(hugging_face(tmp_path, chat_template=templates))
    assert tokenizer.apply_chat_template([]) == "plain"


def test_no_tokenizer_at_all(tmp_path):
    assert tokenizer_from_directory(tmp_path) is None


def test_tokenizers_in_other_forms_are_refused(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(WeightsError, match=r"tokenizer\.model but no tokenizer\.json"):
        tokenizer_from_directory(tmp_path)


def test_damaged_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text('{"model": {}}')
    with pytest.raises(WeightsError) as error:
        tokenizer_from_directory(tmp_path)
    assert "tokenizer.json" in str(error.value) and "\n" not in str(error.value)


def chat(template: str, messages=(), **variables) -> str:
    backend = tokenizers.Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    return Tokenizer(backend, template=template).apply_chat_template(messages, **variables)


def test_no_template():
    with pytest.raises(InputError, match="no chat template"):
        chat(None)


def test_template_features():
    assert chat("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert chat("{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
                [{"content": "a"}, {"content": "b"}]) == "b"  # fmt: skip
    assert chat("a\n  {% if tools is none %}\nb\n  {% endif %}\nc") == "a\nb\nc"
    assert chat("{% generation %}x{% endgeneration %}") == "x"
    assert chat("{{ enable_thinking }}", enable_thinking=False) == "False"
    assert len(chat("{{ strftime_now('%Y') }}")) == 4


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must\nalternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}{{ ''.__class__.__subclasses__() }}",
        "{% if %}",
        "{{ undefined.attribute }}",
        "{{ 1 + 'a' }}",
    ],
)
def test_template_errors_are_one_line(template):
    with pytest.raises(InputError) as error:
        chat(template, [{"role": "user", "content": "a"}])
    assert "\n" not in str(error.value)
