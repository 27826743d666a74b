"""The built-in efficiencies, from measured kernel tables.

python benchmarks/plan/build_pack.py DIR     # DIR/h100_sxm/gemm/vllm/VERSION/gemm_perf.parquet and so on

Writes llmtool/hardware/packs/*.npz and prints how far the coarse grids are from the rows they were fitted to. The
tables come with the aiconfigurator-core wheel (Apache-2.0, NVIDIA); what is kept are efficiencies on a coarse grid.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from llmtool.hardware import find_device
from llmtool.sim.importer import import_tables

DEVICES = {"h100": "h100_sxm", "h200": "h200_sxm", "b200": "b200_sxm", "a100": "a100_sxm", "l40s": "l40s"}
PACKS = Path(__file__).parents[2] / "llmtool" / "hardware" / "packs"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("directory", type=Path)
    args = parser.parse_args()
    for name, folder in DEVICES.items():
        tables = import_tables(args.directory / folder, find_device(name), coarse=True)
        path = PACKS / f"{name}.npz"
        tables.save(path)
        print(name, len(tables.grids), "grids", path.stat().st_size // 1024, "KiB;", tables.source)


if __name__ == "__main__":
    main()
