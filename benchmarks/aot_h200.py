"""Every GPU figure of ahead-of-time execution and of the kernels below it, in ten minutes each.

python benchmarks/aot_h200.py [--dry-run] [--seconds 560] [--kernels]

Results go to benchmarks/h200/: aot.json from `gpu/aot.py`, and with --kernels those of `gpu/run_all.py`.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny sizes on the CPU: that all of it runs")
    parser.add_argument("--seconds", type=float, default=560, help="of each script")
    parser.add_argument("--kernels", action="store_true", help="the kernels' script too")
    parser.add_argument("--out", type=Path, default=HERE / "h200")
    args = parser.parse_args()
    flags = ["--seconds", str(args.seconds), "--out", str(args.out), *(["--dry-run"] if args.dry_run else [])]
    for script in ("aot.py", *(["run_all.py"] if args.kernels else [])):
        subprocess.run([sys.executable, str(HERE / "gpu" / script), *flags], check=True)


if __name__ == "__main__":
    main()
