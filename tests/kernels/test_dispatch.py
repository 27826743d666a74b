"""Processes without a GPU carry no Triton."""

import subprocess
import sys


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
