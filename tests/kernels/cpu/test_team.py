"""The team of threads where threads are not to be had."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from llmtool_kernels.cpu.linear import PackedLinear
from llmtool_kernels.cpu.native import Native
from llmtool_kernels.cpu.weights import pack

NO_THREADS = """
import resource, sys
import torch
from llmtool_kernels.cpu.linear import PackedLinear
from llmtool_kernels.cpu.native import load
from llmtool_kernels.cpu.weights import pack

native = load(sys.argv[1])
torch.set_num_threads(1)
linear = PackedLinear(pack(torch.ones(256, 8), native), native)
x, out = torch.ones(4, 8), torch.zeros(4, 256)
torch.set_num_threads(4)
with open("/proc/self/statm") as f:
    pages = int(f.read().split()[0])
limit = pages * resource.getpagesize() + (2 << 20)  # less than a thread's stack
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
linear.add_to(x, out)
assert (out == 8).all()
"""


FORKED = """
import os, sys, threading
import torch
from llmtool_kernels.cpu.linear import PackedLinear
from llmtool_kernels.cpu.native import load
from llmtool_kernels.cpu.weights import pack

native = load(sys.argv[1])
torch.set_num_threads(3)
linear = PackedLinear(pack(torch.ones(2048, 512), native), native)
x = torch.ones(40, 512)
expected = linear(x)
if int(sys.argv[2]):
    threading.Thread(target=lambda: [linear(x) for _ in range(10**9)], daemon=True).start()
for _ in range(20):
    pid = os.fork()
    if pid == 0:
        alone, y, team = len(os.listdir("/proc/self/task")), linear(x), len(os.listdir("/proc/self/task"))
        torch.set_num_threads(1)  # those of torch are gone for good
        os._exit(0 if (alone, team) == (1, 3) and torch.equal(y, expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
os._exit(0)
"""


def test_a_limit_of_threads_is_no_end(native: Native) -> None:
    variant = "portable" if native.isa == "portable" else "native"
    done = subprocess.run([sys.executable, "-c", NO_THREADS, variant], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("busy", [False, True])
def test_a_forked_process_has_a_team_of_its_own(native: Native, busy: bool) -> None:
    """Of as many threads, also where the fork came while another thread's work held its parent's team."""
    variant = "portable" if native.isa == "portable" else "native"
    done = subprocess.run(
        [sys.executable, "-c", FORKED, variant, str(int(busy))], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_a_forked_process_works_alone(native: Native, threads: int) -> None:
    weight, x = torch.randn(256, 8), torch.randn(4, 8)
    linear = PackedLinear(pack(weight, native), native)
    expected = linear(x)
    pid = os.fork()
    if pid == 0:
        os._exit(0 if torch.equal(linear(x), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
