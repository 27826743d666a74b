from __future__ import annotations

import json
import subprocess
import sys

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from llmtool.core.request import Grammar
from llmtool.errors import ModelError, RequestError
from llmtool.runtime.structured import GrammarCompiler, accept, grammar_tokenizer, validate_grammar

VOCAB = 300  # the model's; the tokenizer has fewer, as padded vocabularies do
EOS = 0
MERGES = [("t", "r"), ("u", "e"), ("tr", "ue"), ('"', ":")]


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE: two special tokens, all bytes, a few merges."""
    vocab = {"<eos>": 0, "<end>": 1}
    for character in sorted(ByteLevel.alphabet()):
        vocab[character] = len(vocab)
    for a, b in MERGES:
        vocab[a + b] = len(vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=MERGES))
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<eos>", "<end>"])
    return tokenizer


TOKENIZER = byte_tokenizer()


def ids(text: str) -> list[int]:
    return list(TOKENIZER.encode(text).ids)


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(grammar_tokenizer(TOKENIZER.to_str(), VOCAB, [EOS]))


def allowed(compiler: GrammarCompiler, *matchers: object) -> list[set[int]]:
    words = compiler.words(matchers)
    assert words.shape == (len(matchers), 10)
    bits = np.unpackbits(words.view(np.uint8), axis=1, bitorder="little")
    return [set(np.flatnonzero(row).tolist()) for row in bits]


SCHEMA = json.dumps(
    {
        "type": "object",
        "properties": {"ok": {"type": "boolean"}, "n": {"type": "integer"}},
        "required": ["ok", "n"],
        "additionalProperties": False,
    }
)


def walk(compiler: GrammarCompiler, grammar: Grammar, pick: np.random.Generator, limit: int = 200) -> str:
    """Text of a random walk through what the grammar allows, until only the end is."""
    matcher, out = compiler.matcher(grammar), []
    for _ in range(limit):
        (choices,) = allowed(compiler, matcher)
        assert choices, "a live grammar allows something"
        if EOS in choices and (len(choices) == 1 or pick.random() < 0.2):
            break
        token = int(pick.choice(sorted(choices - {EOS})))
        assert accept(matcher, [token]) == ""
        out.append(token)
    return TOKENIZER.decode(out)


def test_any_walk_through_a_schema_is_an_instance(compiler: GrammarCompiler) -> None:
    pick = np.random.default_rng(0)
    for _ in range(20):
        value = json.loads(walk(compiler, Grammar("json_schema", SCHEMA), pick))
        assert set(value) == {"ok", "n"}
        assert isinstance(value["ok"], bool)
        assert isinstance(value["n"], int)


def test_any_walk_through_choices_is_a_choice(compiler: GrammarCompiler) -> None:
    choices = ["yes", "yes, but", 'a "quoted" é', "line\nbreak"]
    pick = np.random.default_rng(1)
    seen = {walk(compiler, Grammar("choice", json.dumps(choices)), pick) for _ in range(60)}
    assert seen == set(choices)


@pytest.mark.parametrize(
    ("grammar", "text"),
    [
        (Grammar("json_object", ""), '{"a": [1, 2, {"b": null}]}'),
        (Grammar("regex", "[0-9]{4}-[0-9]{2}"), "2026-11"),
        (Grammar("lark", 'start: "x" NUMBER\nNUMBER: /[0-9]+/'), "x123"),
        (Grammar("json_schema", '{"oneOf": [{"type": "string"}, {"type": "integer"}]}'), "12"),
        (Grammar("json_schema", SCHEMA), '{"ok": true, "n": 3}'),
    ],
)
def test_kinds_accept_their_texts_and_allow_the_end_after_them(
    compiler: GrammarCompiler, grammar: Grammar, text: str
) -> None:
    tokens = ids(text)
    matcher = compiler.matcher(grammar)
    for token in tokens:
        (choices,) = allowed(compiler, matcher)
        assert token in choices
        assert accept(matcher, [token]) == ""
    assert EOS in allowed(compiler, matcher)[0]
    resumed = compiler.matcher(grammar, tokens)
    assert allowed(compiler, resumed) == allowed(compiler, matcher)


def test_a_complete_grammar_allows_the_end_only_and_then_anything_follows(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("regex", "ab"), ids("ab"))
    assert allowed(compiler, matcher) == [{EOS}]
    assert accept(matcher, [EOS, *ids("zz")]) == ""
    assert allowed(compiler, matcher) == [{EOS}]


def test_every_end_token_of_the_model_ends() -> None:
    compiler = GrammarCompiler(grammar_tokenizer(TOKENIZER.to_str(), VOCAB, [EOS, 1]))
    assert allowed(compiler, compiler.matcher(Grammar("regex", "ab"), ids("ab"))) == [{EOS, 1}]


def test_matchers_of_one_grammar_move_apart(compiler: GrammarCompiler) -> None:
    grammar = Grammar("regex", "ab|cd")
    first, second = compiler.matcher(grammar), compiler.matcher(grammar)
    assert accept(first, ids("a")) == ""
    assert allowed(compiler, first, second) == [set(ids("b")), {*ids("a"), *ids("c")}]


def test_a_token_the_grammar_forbids_is_told(compiler: GrammarCompiler) -> None:
    matcher = compiler.matcher(Grammar("regex", "ab"))
    assert "does not allow token" in accept(matcher, ids("b"))
    with pytest.raises(RequestError, match="does not allow"):
        compiler.matcher(Grammar("regex", "ab"), ids("ac"))


BAD = [
    Grammar("json_schema", "{bad"),
    Grammar("json_schema", "[1]"),
    Grammar("json_schema", '{"type": "nope"}'),
    Grammar("json_schema", '{"$ref": "#/nowhere"}'),
    Grammar("json_schema", "false"),
    Grammar("json_schema", "[" * 5000 + "]" * 5000),
    Grammar("regex", "(("),
    Grammar("lark", "start: nothing"),
    Grammar("choice", "[]"),
    Grammar("choice", '"yes"'),
    Grammar("choice", '["yes", 3]'),
    Grammar("choice", "yes"),
    Grammar("xml", "<a/>"),
    Grammar("regex", "a" * 200_000),
]


@pytest.mark.parametrize("grammar", BAD, ids=lambda g: f"{g.kind}-{g.text[:12]}")
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_bad_grammars_are_refused_with_one_line(
    compiler: GrammarCompiler, grammar: Grammar, with_tokenizer: bool
) -> None:
    with pytest.raises(RequestError) as refusal:
        validate_grammar(grammar, compiler.tokenizer if with_tokenizer else None)
    assert refusal.value.param in ("response_format", "structured_outputs")
    assert "\n" not in refusal.value.message
    assert len(refusal.value.message) < 500
    with pytest.raises(RequestError):
        compiler.matcher(grammar)


def test_good_grammars_pass_validation(compiler: GrammarCompiler) -> None:
    for grammar in (Grammar("json_schema", SCHEMA), Grammar("json_object", ""), Grammar("choice", '["a"]')):
        validate_grammar(grammar)
        validate_grammar(grammar, compiler.tokenizer)


def test_compiled_grammars_are_kept_within_bounds(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmtool.runtime.structured.MAX_COMPILED", 3)
    fresh = GrammarCompiler(compiler.tokenizer)
    for i in range(6):
        fresh.matcher(Grammar("regex", f"x{i}"))
        fresh.matcher(Grammar("regex", "kept"))
    assert len(fresh._compiled) == 3
    assert Grammar("regex", "kept") in fresh._compiled


def test_vocabularies_of_different_sizes() -> None:
    assert grammar_tokenizer(TOKENIZER.to_str(), VOCAB, [EOS]).vocab_size == VOCAB
    assert grammar_tokenizer(TOKENIZER.to_str(), 100, [EOS]).vocab_size == TOKENIZER.get_vocab_size()


def test_an_unreadable_tokenizer_is_told() -> None:
    with pytest.raises(ModelError, match="structured output"):
        grammar_tokenizer("{}", VOCAB, [EOS])


def test_validation_needs_no_torch() -> None:
    code = (
        "import sys; from llmtool.core.request import Grammar;"
        "from llmtool.runtime.structured import validate_grammar;"
        "validate_grammar(Grammar('regex', 'a+')); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
