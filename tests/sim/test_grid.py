"""Tables of measured ratios: what was put in comes out, on the points and between them."""

from pathlib import Path

import numpy as np
import pytest

from llmtool.errors import UsageError
from llmtool.sim.grid import Tables, fit_grid, grid


def test_multilinear_in_the_logarithms() -> None:
    g = grid([[1, 10, 100], [1, 4]], np.array([[0.0, 1.0], [1.0, 2.0], [4.0, 5.0]]))
    assert g.ratio(1, 1) == pytest.approx(1.0)
    assert np.log(g.ratio(10**1.5, 2)) == pytest.approx(2.5 + 0.5)
    assert g.ratio(1e9, 1e9) == pytest.approx(np.exp(5.0)) and g.ratio(1e-9, 0.0) == pytest.approx(1.0)


def test_a_fit_finds_a_grid() -> None:
    rng = np.random.default_rng(0)
    axes = [[1, 4, 16, 64], [1, 8, 64]]
    true = grid(axes, rng.normal(size=(4, 3)) * 0.2)
    points = np.exp(rng.uniform(0, np.log(64), size=(2000, 2)))
    logs = np.log([true.ratio(*p) for p in points])
    found = fit_grid(axes, points, logs)
    errors = [found.ratio(*p) / true.ratio(*p) - 1 for p in points[:200]]
    assert max(map(abs, errors)) < 0.02


def test_where_nothing_was_measured_neighbours_stand_in() -> None:
    found = fit_grid([[1, 10, 100]], np.array([[1.0], [10.0]] * 5), np.array([0.5, 0.5] * 5))
    assert found.ratio(100) == pytest.approx(np.exp(0.5), rel=1e-3)


def test_files(tmp_path: Path) -> None:
    tables = Tables({"gemm/bf16": grid([[1, 2], [3, 4]], np.array([[0.1, 0.2], [0.3, 0.4]]))}, "toy", "here")
    tables.save(tmp_path / "t.npz")
    back = Tables.load(tmp_path / "t.npz")
    assert (back.device, back.source) == ("toy", "here")
    assert back.grids["gemm/bf16"].ratio(1.5, 3.5) == pytest.approx(
        tables.grids["gemm/bf16"].ratio(1.5, 3.5), rel=1e-3
    )
    for content in (b"nothing", b"", b"PK\x03\x04 cut short"):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(UsageError, match="no file of kernel tables"):
            Tables.load(tmp_path / "bad.npz")
