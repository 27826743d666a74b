"""What a controller has learned outlives its engine, and a bad file costs nothing."""

from __future__ import annotations

from pathlib import Path

import pytest

from llmtool.core.speculation.auto import AutoController
from llmtool.core.speculation.controllers import FixedController, SmartSpecController
from llmtool.runtime.parts import EngineInfo
from llmtool.runtime.spec_state import Learned
from tests.core.speculation.world import World, steep


def info(model: str = "./my/model", threads: int = 2) -> EngineInfo:
    return EngineInfo(
        model=model,
        served_model_name="m",
        tokenizer_dir="",
        device="cpu",
        dtype="float32",
        max_model_len=128,
        vocab_size=300,
        eos_token_ids=(0,),
        max_num_seqs=4,
        max_num_batched_tokens=64,
        max_waiting=10,
        num_pages=10,
        tokens_per_page=16,
        page_bytes=1024,
        host_pages=0,
        num_parameters=0,
        weight_bytes=0,
        activation_bytes=0,
        num_threads=threads,
    )


def test_it_starts_where_the_last_one_ended(tmp_path: Path) -> None:
    cold = AutoController()
    state = Learned(tmp_path, info(), cold, "suffix")
    World(steep, [(2, 20, 0.9)]).run(cold, 200)
    state.keep()
    warm = AutoController()
    Learned(tmp_path, info(), warm, "suffix")
    assert warm.state_dict() == cold.state_dict() and warm.cost.known
    for other in (
        Learned(tmp_path, info(threads=4), AutoController(), "suffix"),
        Learned(tmp_path, info("other"), AutoController(), "suffix"),
        Learned(tmp_path, info(), AutoController(), "pruned"),
        Learned(tmp_path, info(), SmartSpecController(), "suffix"),
    ):
        assert other.path != state.path and not other.path.exists()
    assert [path.name for path in state.path.parent.iterdir()] == [state.path.name], (
        "nothing half written is left"
    )


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"name": "off"}', '{"name": "auto", "cost": {"cells": [[1]]}}']
)
def test_a_bad_file_is_learned_anew(tmp_path: Path, text: str) -> None:
    state = Learned(tmp_path, info(), AutoController(), "suffix")
    state.path.parent.mkdir()
    state.path.write_text(text)
    controller = AutoController()
    Learned(tmp_path, info(), controller, "suffix")
    assert not controller.cost.known
    World(steep, [(2, 20, 0.9)]).run(controller, 50)


def test_a_disk_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "speculation").write_text("in the way")
    Learned(tmp_path, info(), AutoController(), "suffix").keep()


def test_what_learns_nothing_leaves_no_file(tmp_path: Path) -> None:
    Learned(tmp_path, info(), FixedController(3), "suffix").keep()
    assert not list(tmp_path.iterdir())
