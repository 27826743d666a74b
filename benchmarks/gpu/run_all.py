"""All GPU benchmarks in one run of at most ten minutes; results under benchmarks/h200/.

python benchmarks/gpu/run_all.py [--dry-run] [--seconds 560]

Runs from a checkout, installed or not, with torch 2.11, triton 3.6 and transformers 5.17 or later.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

# A machine with a GPU may have torch and no more: the checkout is then what runs.
sys.path[:0] = [str(Path(__file__).parents[2] / part) for part in (".", "kernels")]

import attention  # noqa: E402
import decode  # noqa: E402
from measure import RESULTS, Budget  # noqa: E402

SHARE = 0.45  # of the time for attention; decoding has what is left


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU: that all of it runs")
    parser.add_argument("--seconds", type=float, default=560)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    whole = Budget(args.seconds)
    attention.main(args.dry_run, Budget(SHARE * args.seconds), args.out)
    decode.main(args.dry_run, Budget(whole.left - 10), args.out)


if __name__ == "__main__":
    main()
