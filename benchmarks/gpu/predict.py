"""What each case would take at least on two GPUs, by their published peaks. Nothing here is measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .case import Case
from .table import row
from .work import work

# NVIDIA's data sheets of the H100 and the H200 Tensor Core GPU, SXM: memory bandwidth in bytes a second, and dense
# bfloat16 operations a second (the sheets' larger figures are with sparsity).
PEAKS = {"H100 SXM": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}
HEAD = ("case", "MB", "GFLOP", *(f"{gpu}: least ms, predicted" for gpu in PEAKS), "measured ms")
ABOUT = """\
# Predicted least times

Computed from shapes by `python -m benchmarks.gpu --predict`, not measured: no kernel ran. A case's bytes (what repeats
counts once; distinct ids as their distribution makes expect) over a GPU's published memory bandwidth, or its products
(attention's masked pairs left out) over the published dense bfloat16 peak, whichever takes longer. Float32 models,
whose products run as TF32, are held against the same peak, which is twice that of TF32. Launches and all else a GPU
does are left out: small cases will be much slower. The last column is for measurements and is empty.
"""


def predictions(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """A dictionary a case; numbers are rounded, so that equal sources give equal files."""
    found = []
    for case in cases:
        needed = work(case)
        least = {
            gpu: max(needed.bytes / moved, needed.flops / computed)
            for gpu, (moved, computed) in PEAKS.items()
        }
        rounded = {gpu: _rounded(seconds * 1e3) for gpu, seconds in least.items()}
        amounts = {"bytes": _rounded(needed.bytes), "flops": _rounded(needed.flops)}
        found.append({"case": case.name, **amounts, "predicted_least_ms": rounded, "measured_ms": None})
    return found


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """The predictions as a table."""
    lines = [ABOUT, *row(HEAD), *row(["---"] * len(HEAD))]
    for found in rows:
        amounts = [f"{found['bytes'] / 1e6:.3g}", f"{found['flops'] / 1e9:.3g}"]
        lines += row(
            [found["case"], *amounts, *(f"{ms:.3g}" for ms in found["predicted_least_ms"].values()), ""]
        )
    return "\n".join(lines) + "\n"


def write(cases: Sequence[Case], folder: Path) -> list[Path]:
    """`predicted.md` and `predicted.json`."""
    rows = predictions(cases)
    folder.mkdir(parents=True, exist_ok=True)
    texts = {"predicted.md": markdown(rows), "predicted.json": json.dumps(rows, indent=1) + "\n"}
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [folder / name for name in texts]


def _rounded(number: float) -> float:
    return float(f"{number:.4g}")
