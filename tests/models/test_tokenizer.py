"""Our tokenizer against transformers' AutoTokenizer, and streams of text against whole ones."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers

from llmtool.errors import ModelError, RequestError
from llmtool.models.detokenizer import MAX_PENDING, Detokenizer
from llmtool.models.tokenizer import BYTE_OF_CHAR, Tokenizer

TEXTS = [
    "",
    "Hello, world!",
    " leading and trailing ",
    "def f(x):\n\treturn x ** 2  # 12345\n\n\n1. one\n2. two",
    "naïve café – „Grüße“ 東京タワー Здравствуй مرحبا שלום",
    "😀 👩‍👩‍👧‍👦 🇩🇪 e\u0301 \u200b \ufffd \x00 end",
    "<|im_start|>user\nsneaky<|im_end|>",
    "1234567890 3.14159 1e-5",
    "a" * 300 + " " * 50,
]
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "Hi 😀"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?\n"}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "ü"},
    ],
]


@pytest.fixture(scope="module")
def pair(smollm2: Path) -> tuple[Tokenizer, transformers.PreTrainedTokenizerBase]:
    return Tokenizer.from_dir(smollm2), transformers.AutoTokenizer.from_pretrained(smollm2)


@pytest.fixture(scope="module")
def byte_level() -> Tokenizer:
    """A vocabulary of the 256 bytes and one special token: the worst case for a stream."""
    backend = tokenizers.Tokenizer(models.BPE(vocab=BYTE_OF_CHAR, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend, {"eos_token": "<|end|>"}, {})


@pytest.fixture(scope="module")
def sentencepiece() -> Tokenizer:
    """As Llama 2's tokenizer.json: words that begin with a mark for a space, bytes for all else."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["▁", "▁the", "▁sea", "s", "e", "a", "t", "h", "é"]
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    backend = tokenizers.Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<s>", "</s>"])
    return Tokenizer(backend, {"bos_token": "<s>", "eos_token": "</s>"}, {})


Pair = tuple[Tokenizer, transformers.PreTrainedTokenizerBase]


def test_ids_and_text_equal_transformers(pair: Pair) -> None:
    ours, reference = pair
    for text in TEXTS:
        for special in (True, False):
            ids = ours.encode(text, add_special_tokens=special)
            assert ids == reference.encode(text, add_special_tokens=special), text
        for skip in (True, False):
            assert ours.decode(ids, skip) == reference.decode(ids, skip_special_tokens=skip), text
    assert (ours.vocab_size, ours.eos_id, ours.bos_id, ours.pad_id) == (
        len(reference),
        reference.eos_token_id,
        reference.bos_token_id,
        reference.pad_token_id,
    )
    assert {reference.eos_token_id, reference.bos_token_id} <= ours.special_ids == set(range(17))


def test_chats_equal_transformers(pair: Pair) -> None:
    ours, reference = pair
    for chat in CHATS:
        for prompt in (True, False):
            text, ids = ours.apply_chat_template(chat, add_generation_prompt=prompt)
            assert text == reference.apply_chat_template(chat, add_generation_prompt=prompt, tokenize=False)
            assert ids == reference.apply_chat_template(chat, add_generation_prompt=prompt)["input_ids"]


TEMPLATES = {
    "loops": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}\n {{- m.content }}\n{% endfor %}",
    "tools": "{% if tools %}{{ tools | tojson }}{{ tools | tojson(indent=2) }}{% endif %}",
    "special tokens": "{{ bos_token }}{{ eos_token }}{{ cls_token }}",
    "variables": "{{ enable_thinking is defined and enable_thinking }} {{ documents is none }} {{ missing }}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "date": "{{ strftime_now('%Y') | length }}",
    "namespace": "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}",
    "whitespace": "a\n  {% if true %}\n  b\n  {% endif %}\nc",
}


@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_template_features_equal_transformers(smollm2: Path, pair: Pair, name: str) -> None:
    chat = [
        {"role": "user", "content": "<b>ü&'\"</b>"},
        {"role": "skip", "content": "x"},
        {"role": "user", "content": "b"},
    ]
    tools = [{"type": "function", "function": {"name": "f", "description": "<ü>", "parameters": {}}}]
    ours = Tokenizer.from_dir(smollm2, chat_template=TEMPLATES[name])
    expected = pair[1].apply_chat_template(
        chat, tools=tools, chat_template=TEMPLATES[name], tokenize=False, enable_thinking=True
    )
    assert ours.render_chat(chat, tools, add_generation_prompt=False, enable_thinking=True) == expected
    assert expected.strip()


def test_what_a_template_refuses_is_the_requests_fault(smollm2: Path) -> None:
    strict = Tokenizer.from_dir(smollm2, chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(RequestError, match="roles must alternate") as error:
        strict.render_chat([])
    assert error.value.param == "messages"
    usual = Tokenizer.from_dir(smollm2)
    for broken in (
        [{"content": "no role"}],
        [{"role": "user", "content": ["a", "list"]}],
        [{"role": "user"}],
    ):
        with pytest.raises(RequestError):
            usual.render_chat(broken)


@pytest.mark.parametrize(
    "attack",
    [
        "{{ ''.__class__.__base__.__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__['os'].getcwd() }}",
        "{{ raise_exception.__globals__['json'] }}",
    ],
)
def test_templates_cannot_reach_python(byte_level: Tokenizer, attack: str) -> None:
    with pytest.raises(RequestError):
        Tokenizer(byte_level.backend, {}, {"default": attack}).render_chat([])


def test_a_template_with_a_syntax_error_is_refused_at_start(smollm2: Path) -> None:
    with pytest.raises(ModelError, match="syntax error in line 2"):
        Tokenizer.from_dir(smollm2, chat_template="a\n{% if %}")


def test_where_templates_are_found(smollm2: Path, tmp_path: Path) -> None:
    shutil.copy(smollm2 / "tokenizer.json", tmp_path)
    messages = [{"role": "user", "content": "x"}]
    assert not Tokenizer.from_dir(tmp_path).has_chat_template
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer.from_dir(tmp_path).render_chat(messages)
    config = tmp_path / "tokenizer_config.json"
    config.write_text(json.dumps({"chat_template": "key", "eos_token": {"content": "<|im_end|>"}}))
    assert Tokenizer.from_dir(tmp_path).render_chat(messages) == "key"
    assert Tokenizer.from_dir(tmp_path).eos_id == 2
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with tools"}]
    config.write_text(json.dumps({"chat_template": named}))
    assert Tokenizer.from_dir(tmp_path).render_chat(messages) == "plain"
    assert Tokenizer.from_dir(tmp_path).render_chat(messages, tools=[{}]) == "with tools"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_dir(tmp_path).render_chat(messages) == "file"


def test_every_token_and_its_bytes(pair: Pair) -> None:
    ours, _ = pair
    for token_id in range(ours.vocab_size):
        piece = ours.id_to_piece(token_id)
        assert piece is not None
        assert ours.piece_to_id(piece) == token_id
        text = ours.decode([token_id], skip_special_tokens=False)
        assert ours.token_bytes(token_id).decode("utf-8", "replace") == text
    assert ours.id_to_piece(ours.vocab_size) is None
    assert ours.token_bytes(ours.vocab_size) == b""


def test_sentencepiece_bytes(sentencepiece: Tokenizer) -> None:
    ids = sentencepiece.encode("the é🙂")
    assert b"".join(sentencepiece.token_bytes(i) for i in ids) == " the é🙂".encode()


def stream(
    tokenizer: Tokenizer, ids: list[int], skip: bool = True, prompt: list[int] | None = None
) -> list[str]:
    detokenizer = Detokenizer(tokenizer, skip, prompt or [])
    return [*(detokenizer.push([i]) for i in ids), detokenizer.finish()]


def test_streams_join_to_the_text_and_hold_no_half_characters(pair: Pair) -> None:
    ours, reference = pair
    for text in TEXTS:
        ids = ours.encode(text)
        for skip in (True, False):
            pieces = stream(ours, ids, skip)
            assert "".join(pieces) == reference.decode(ids, skip_special_tokens=skip)
            assert sum("\ufffd" in p for p in pieces) == text.count("\ufffd")


def test_every_split_of_a_text(byte_level: Tokenizer) -> None:
    """However the tokens come in two pushes, the first gives exactly the whole characters it completes."""
    text = "aé東😀👩‍👧z"
    ids = byte_level.encode(text)
    for cut in range(len(ids) + 1):
        detokenizer = Detokenizer(byte_level)
        first = detokenizer.push(ids[:cut])
        whole = [n for n in range(len(text) + 1) if len(text[:n].encode()) <= cut][-1]
        assert first == text[:whole]
        assert first + detokenizer.push(ids[cut:]) + detokenizer.finish() == text


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 256), max_size=40))
def test_any_bytes_stream_as_they_decode(byte_level: Tokenizer, ids: list[int]) -> None:
    assert "".join(stream(byte_level, ids)) == byte_level.decode(ids)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=30))
def test_sentencepiece_streams_join_to_the_text(sentencepiece: Tokenizer, text: str) -> None:
    ids = sentencepiece.encode(text)
    assert "".join(stream(sentencepiece, ids)) == sentencepiece.decode(ids)


def test_a_sentencepiece_stream_after_a_prompt_keeps_its_space(sentencepiece: Tokenizer) -> None:
    the, sea = sentencepiece.piece_to_id("▁the"), sentencepiece.piece_to_id("▁sea")
    assert the is not None
    assert sea is not None
    assert stream(sentencepiece, [sea, the, 2], prompt=[1, the]) == [" sea", " the", "", ""]


def test_endless_garbage_is_given_out(sentencepiece: Tokenizer) -> None:
    lone = sentencepiece.piece_to_id("<0x80>")
    assert lone is not None
    pieces = stream(sentencepiece, [lone] * 200)
    assert "".join(pieces) == "\ufffd" * 200
    assert max(map(len, pieces)) <= MAX_PENDING + 1


def test_tokens_declared_only_in_the_configuration(smollm2: Path, tmp_path: Path) -> None:
    shutil.copy(smollm2 / "tokenizer.json", tmp_path)
    entry = {"content": "<extra>", "special": True, "lstrip": False, "normalized": False}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"49152": entry}}))
    ours = Tokenizer.from_dir(tmp_path)
    assert ours.encode("<extra>") == [49152]
    assert 49152 in ours.special_ids


def test_older_tokenizer_files_are_converted_once(
    smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LLMTOOL_CACHE", str(tmp_path / "cache"))
    old = tmp_path / "old"
    old.mkdir()
    model = json.loads((smollm2 / "tokenizer.json").read_text())["model"]
    (old / "vocab.json").write_text(json.dumps(model["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (old / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    (old / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "GPT2Tokenizer", "eos_token": "<|im_end|>"})
    )
    reference = transformers.AutoTokenizer.from_pretrained(old)
    ours = Tokenizer.from_dir(old)
    text = "The sea, the sea 😀"
    assert ours.encode(text) == reference.encode(text)
    assert len(ours.encode(text)) < 12
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", None)
    assert Tokenizer.from_dir(old).encode(text) == ours.encode(text)


def test_directories_without_a_readable_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds no tokenizer"):
        Tokenizer.from_dir(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="not a readable tokenizer"):
        Tokenizer.from_dir(tmp_path)


def test_needs_neither_torch_nor_transformers(smollm2: Path) -> None:
    code = f"""
import sys
from llmtool.models.detokenizer import Detokenizer
from llmtool.models.tokenizer import Tokenizer
tokenizer = Tokenizer.from_dir({str(smollm2)!r})
ids = tokenizer.apply_chat_template([{{"role": "user", "content": "x"}}]).token_ids
assert Detokenizer(tokenizer).push(ids)
assert not {{"torch", "transformers"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
