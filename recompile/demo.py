"""`recompile demo`: five real models against Inductor, checked against eager; results in `out/`."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import Progress

from . import compare
from .bench import OURS, Row, bench, table, terminal
from .measure import THREADS, processor
from .report import Report, collect
from .zoo import Built, build

MODELS = ("own.DLRM", "rechub.DeepFM", "rechub.DIN", "rechub.YoutubeDNN", "rechub.MMOE")
REPORTED = "own.DLRM"
BATCHES = (1, 64, 512, 2048)
GRADIENT_BATCH = 64
# Relative to the largest magnitude, float32: another order of summation over a few thousand rows costs 1e-6.
TOLERANCE = 1e-4


def demo(out: Path, *, scale: float = 1.0, seconds: float = 2.0, batches: tuple[int, ...] = BATCHES) -> int:
    """Run the demo, print it, and keep `demo.json` and `demo.txt` under `out`.

    Args:
        out: the folder for the results.
        scale: factor on the number of rows of every table.
        seconds: of measuring per model and batch size.
        batches: batch sizes.

    Returns:
        0 if every output and gradient agrees with eager within `TOLERANCE`, else 1.
    """
    console = terminal()
    torch.set_num_threads(THREADS)
    rows, gradients, report = _measure(console, scale, seconds, batches)
    console.print(table(rows, f"{THREADS} threads, inference, float32, torch {torch.__version__}"))
    wrong = _wrong(rows, gradients)
    console.print(_verdict(rows, gradients, wrong))
    console.print(f"\nWhat recompile did to {REPORTED}:\n{report.text()}", markup=False, highlight=False)
    _keep(out, console, rows, gradients)
    return int(bool(wrong))


def _measure(
    console: Console, scale: float, seconds: float, batches: tuple[int, ...]
) -> tuple[list[Row], dict[str, float], Report]:
    rows: list[Row] = []
    gradients: dict[str, float] = {}
    told = Report()
    per_model = 4 * len(batches) + 1  # three checks and a measurement per batch size, then the gradients
    with Progress(console=Console(stderr=True), transient=True) as progress:
        bar = progress.add_task("", total=per_model * len(MODELS))

        def step(what: str) -> None:
            progress.update(bar, description=what, advance=1)

        for name in MODELS:
            built = build(name, scale)
            with collect() as report:
                rows += bench(name, built.model, built.inputs, batches, seconds=seconds, step=step)
                step(f"{name}: gradients")
                gradients[name] = _gradient_error(built)
            told = report if name == REPORTED else told
    return rows, gradients, told


def _gradient_error(built: Built) -> float:
    """recompile's outputs and gradients against eager's, in evaluation mode: dropout differs by chance."""
    torch._dynamo.reset()
    model, inputs = built.model.eval(), built.inputs(GRADIENT_BATCH)
    expected = compare.run(model, model, inputs, grad=True)
    return compare.error(compare.run(torch.compile(model, backend=OURS), model, inputs, grad=True), expected)


def _wrong(rows: list[Row], gradients: dict[str, float]) -> list[str]:
    outputs = [
        f"{row.model} at batch {row.batch}" for row in rows if not (row.error[OURS] or 0.0) <= TOLERANCE
    ]
    return outputs + [f"{name}'s gradients" for name, error in gradients.items() if not error <= TOLERANCE]


def _verdict(rows: list[Row], gradients: dict[str, float], wrong: list[str]) -> str:
    if wrong:
        return f"[bold red]differs from eager by more than {TOLERANCE:.0e}:[/] {', '.join(wrong)}"
    outputs = max(row.error[OURS] or 0.0 for row in rows)
    return (
        f"[green]Outputs and gradients agree with eager:[/] outputs within {outputs:.0e}, "
        f"gradients at batch {GRADIENT_BATCH} within {max(gradients.values()):.0e}, of the largest magnitude."
    )


def _keep(out: Path, console: Console, rows: list[Row], gradients: dict[str, float]) -> None:
    machine = {"processor": processor(), "threads": THREADS}
    record = {"version": 1, "torch": torch.__version__, **machine, "gradient_errors": gradients}
    out.mkdir(parents=True, exist_ok=True)
    (out / "demo.json").write_text(json.dumps({**record, "rows": [asdict(row) for row in rows]}, indent=2))
    (out / "demo.txt").write_text(console.export_text())
