"""`make bench-gpu`: every case on this GPU against its target, in benchmarks/results/; run it again to go on.

python -m benchmarks.gpu --quick
python -m benchmarks.gpu --only HSTU --budget 3000
python -m benchmarks.gpu --compare one.json other.json
python -m benchmarks.gpu --predict
"""

from __future__ import annotations

import argparse
import datetime
import os
import re
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config

from . import predict
from .clock import Cuda
from .compare import compare
from .measure import Settings
from .record import Results, find
from .run import RESTART, ROOT, all_cases, facts, run
from .variants import variants

FOLDER = ROOT / "benchmarks" / "results"
FULL_S, QUICK_S = 540.0, 220.0
GRACE_S = 40.0  # for a worker to stop by itself, before it is ended


def main(argv: list[str]) -> int:
    """What the command line asks for; 0 also where a case falls short: the table says so."""
    args = _parser().parse_args(argv)
    if args.compare:
        print(compare(*map(Results.load, args.compare)))
        return 0
    if args.predict:
        print(*predict.write(all_cases(), FOLDER), sep="\n")
        return 0
    if not torch.cuda.is_available():
        print("There is no CUDA device that torch can use, so nothing can be measured; --predict needs none.")
        return 1
    budget = args.budget or (QUICK_S if args.quick else FULL_S)
    if args.until:
        return _work(args, budget)
    return _supervise([*argv, "--until", str(time.monotonic() + budget)], budget)


def _parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--only", default="", help="part of a case's name")
    parser.add_argument("--quick", action="store_true", help="few cases, no max-autotune, under 4 minutes")
    parser.add_argument(
        "--tune", action="store_true", help="tune our Triton schedules (RECOMPILE_AUTOTUNE=1)"
    )
    parser.add_argument("--budget", type=float, help="seconds to stop within (540; quick: 220)")
    parser.add_argument("--fresh", action="store_true", help="start over, in a new file")
    parser.add_argument("--compare", nargs=2, type=Path, metavar="JSON", help="two runs side by side")
    parser.add_argument(
        "--predict", action="store_true", help="least times by published peaks, without a GPU"
    )
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    return parser


def _supervise(argv: list[str], budget: float) -> int:
    """Runs workers until one is done: a case may take its process with it, and the next worker records that."""
    end = time.monotonic() + budget
    while True:
        command, left = [sys.executable, "-m", "benchmarks.gpu", *argv], end + GRACE_S - time.monotonic()
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=left, check=False).returncode
        except subprocess.TimeoutExpired:
            print("A case did not stop in time and was ended; the next run records it and goes on.")
            return 0
        if status >= 0 and status != RESTART:  # done, or an error that another worker would meet too
            return status
        argv = [arg for arg in argv if arg != "--fresh"]


def _work(args: argparse.Namespace, budget: float) -> int:
    if args.tune:
        os.environ["RECOMPILE_AUTOTUNE"] = "1"
    torch._inductor.config.force_disable_caches = True  # compile times are those of a first run
    torch.set_float32_matmul_precision("high")  # TF32 for float32 products, on all sides
    clock = Cuda()
    stem = re.sub(r"[^a-z0-9]+", "-", clock.name().lower()) + "-quick" * args.quick + "-tuned" * args.tune
    today = datetime.date.today().isoformat()
    results = find(FOLDER, stem, facts(clock, args.quick, args.tune), today, args.fresh)
    print(f"{results.path.relative_to(ROOT)}: {len(results.records)} cases so far", flush=True)
    say = partial(print, flush=True)
    settings, ways = Settings.within(budget), partial(variants, quick=args.quick)
    return run(all_cases(args.quick), ways, results, clock, settings, args.until, args.only, say)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
