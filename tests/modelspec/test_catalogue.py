"""The catalogue of models: every config.json gives the size that was published with the weights."""

import json
from pathlib import Path

import pytest

from llmtool.errors import ModelError
from llmtool.modelspec.catalogue import hub_name, names, published, read_config
from llmtool.sim.ir import MoE, Recurrent, read_ir

PARAMETERS = {
    "llama-2-7b": 6_738_415_616,
    "llama-2-13b": 13_015_864_320,
    "llama-2-70b": 68_976_648_192,
    "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496,
    "llama-3.1-405b": 405_853_388_800,
    "llama-3.2-1b": 1_235_814_400,
    "llama-3.2-3b": 3_212_749_824,
    "mistral-7b": 7_241_732_096,
    "mixtral-8x7b": 46_702_792_704,
    "mixtral-8x22b": 140_620_634_112,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-72b": 72_706_203_648,
    "qwen3-8b": 8_190_735_360,
    "qwen3-32b": 32_762_123_264,
    "qwen3-30b-a3b": 30_532_122_624,
    "qwen3-235b-a22b": 235_093_634_560,
    "gemma-2-27b": 27_227_128_320,
    "phi-4": 14_659_507_200,
    "gpt-oss-20b": 20_914_757_184,
    "gpt-oss-120b": 116_829_156_672,
    "smollm2-135m": 134_515_008,
    "deepseek-v3": 671_026_419_200,
}
# Hybrids, whose small parts are not all counted: billions as published, total and (where known) active.
ABOUT = {
    "qwen3-next-80b-a3b": 80.0,
    "qwen3.5-397b-a17b": 397.0,
    "minimax-m2": 228.7,
    "jamba-1.5-mini": 51.6,
    "lfm2-1.2b": 1.17,
    "kimi-k2": 1026.0,
}


@pytest.mark.parametrize("name", names())
def test_the_published_size(name: str) -> None:
    config = published(name)
    assert config is not None
    ir = read_ir(config, name)
    if name in PARAMETERS:
        assert ir.num_parameters == PARAMETERS[name]
    if name in ABOUT:
        assert ir.num_parameters / 1e9 == pytest.approx(ABOUT[name], rel=0.02)
    assert ir.active_parameters <= ir.num_parameters or ir.tied
    if ir.spec is not None:
        assert ir.num_parameters == ir.spec.num_parameters


def test_hybrid_layers() -> None:
    config = published("qwen3-next-80b-a3b")
    assert config is not None
    kinds = [isinstance(b.mixer, Recurrent) for b in read_ir(config).blocks]
    assert kinds == [True, True, True, False] * 12
    jamba = published("jamba-1.5-mini")
    assert jamba is not None
    blocks = read_ir(jamba).blocks
    assert [i for i, b in enumerate(blocks) if not isinstance(b.mixer, Recurrent)] == [4, 12, 20, 28]
    assert sum(isinstance(b.mlp, MoE) for b in blocks) == 16


def test_names_aliases_and_hub_ids() -> None:
    assert published("DeepSeek-R1") == published("deepseek-v3") == published("deepseek-ai/DeepSeek-V3")
    assert published("nobody/nothing") is None
    assert hub_name("llama-3.1-8b") == "meta-llama/Llama-3.1-8B" and hub_name("./x") == "./x"


def test_files_and_directories(tmp_path: Path) -> None:
    config = published("smollm2-135m")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_config(str(tmp_path)) == read_config(str(tmp_path / "config.json")) == config
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ModelError, match="JSON object"):
        read_config(str(tmp_path))
    with pytest.raises(ModelError, match="neither in the catalogue"):
        read_config("no-such-model")
