"""Processes without a GPU carry no Triton."""

import logging
import subprocess
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from llmtool_kernels import dispatch


@pytest.fixture
def on_cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """As much of a CUDA tensor as a choice looks at."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (8, 0))
    dispatch._runs_triton.cache_clear()
    yield SimpleNamespace(is_cuda=True, device=torch.device("cuda", 0))
    dispatch._runs_triton.cache_clear()


@pytest.mark.parametrize("lacking", ["triton", "capability"])
def test_a_gpu_without_triton_is_said_once_and_torch_serves(
    on_cuda: Any, lacking: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    if lacking == "triton":
        monkeypatch.setitem(sys.modules, "triton", None)
    else:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    with caplog.at_level(logging.WARNING):
        assert not dispatch.on_gpu(on_cuda)
        assert not dispatch.on_gpu(on_cuda)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert lacking in caplog.text and "PyTorch" in caplog.text


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
