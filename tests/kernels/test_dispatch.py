"""Processes without a GPU carry no Triton."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from llmtool_kernels import dispatch


@pytest.fixture
def on_cuda() -> Iterator[Any]:
    """As much of a CUDA tensor as a choice looks at."""
    dispatch._has_triton.cache_clear()
    yield SimpleNamespace(is_cuda=True)
    dispatch._has_triton.cache_clear()


def test_a_gpu_without_triton_is_said_once_and_torch_serves(
    on_cuda: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with caplog.at_level(logging.WARNING):
        assert not dispatch.on_gpu(on_cuda)
        assert not dispatch.on_gpu(on_cuda)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "triton" in caplog.text and "PyTorch" in caplog.text


def test_a_gpu_with_triton_runs_its_kernels(on_cuda: Any) -> None:
    pytest.importorskip("triton")
    assert dispatch.on_gpu(on_cuda)


def test_a_step_on_a_cpu_imports_no_triton() -> None:
    code = """
import sys
import torch
import llmtool.runtime.executor
from llmtool_kernels.attention import AttentionBatch, KVLayout, copy_pages, paged_attention
x = torch.randn(1, 1, 8)
batch = AttentionBatch.build([1], [1], [[0]], 4)
arena = torch.zeros(4096, dtype=torch.uint8)
paged_attention(x, x, x, arena, KVLayout(0, 4, 1, 8, 8), batch, 1.0)
copy_pages(arena, arena, [(0, 1)], 512)
found = [name for name in sys.modules if name == 'triton' or name.startswith('llmtool_kernels.gpu')]
assert not found, found
"""
    subprocess.run([sys.executable, "-c", code], check=True)
