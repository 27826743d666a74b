"""The house rules that imports can break: light parts stay light, and `kernels` stays no package."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "module",
    [
        "llmtool",
        "llmtool.core.engine",
        "llmtool.core.steplog",
        "llmtool.core.memory.contiguous",
        "llmtool.core.memory.near",
        "llmtool.core.memory.arena",
        "llmtool.sim.executor",
        "llmtool.sim.cost",
        "llmtool.sim.catalogue",
        "llmtool.sim.simulate",
        "llmtool.plan.search",
        "llmtool.memprofile.profile",
        "llmtool.memprofile.live",
        "llmtool.cli.memprofile_run",
        "llmtool.cli.memprofile_html",
        "llmtool.hardware",
        "llmtool.cli.plan_run",
        "llmtool.workload.datasets",
        "llmtool.modelspec",
        "llmtool.parallel.shard",
        "llmtool.parallel.pages",
        "llmtool.config",
        "llmtool.cli.app",
        "llmtool.runtime.async_engine",
        "llmtool.runtime.aot.cost",
        "llmtool.runtime.aot.arena",
        "llmtool.runtime.aot.buckets",
        "llmtool.serve.server",
        "llmtool.bench.run",
        "llmtool.models.tokenizer",
    ],
)
def test_light_parts_import_no_torch(module: str) -> None:
    code = (
        f"import {module}, sys\n"
        "heavy = {'torch', 'transformers', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_core_needs_nothing_but_numpy() -> None:
    code = (
        "import sys, llmtool.core.engine, llmtool.core.steplog, llmtool.core.memory.contiguous\n"
        "tops = {name.split('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)\n"
        "foreign = {t for t in tops if not t.startswith('_')} - {'llmtool', 'numpy'}\n"
        "assert not foreign, foreign"
    )
    subprocess.run(
        [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}"],
        check=True,
    )


def test_kernels_is_a_source_root_and_no_package() -> None:
    # A package of that name would shadow the PyPI package that transformers imports.
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_help_lists_only_what_works() -> None:
    shown = subprocess.run(
        [sys.executable, "-m", "llmtool", "--help"], check=True, capture_output=True, text=True, cwd=ROOT
    ).stdout
    assert all(name in shown for name in ("serve", "bench", "plan", "prune", "memprofile"))
