"""
Measures how fast everything is, beside what else there is and beside what the machine allows:

    python scripts/benchmark.py --output-dir benchmark
    python scripts/benchmark.py --output-dir benchmark --rows generate-1 --rows encode

The table is written anew after every row, as `benchmark.md` and `benchmark.json`. On a GPU fp32 means fp32: without
TF32, in which PyTorch computes convolutions otherwise, but not the matrix products that floors are reckoned by.
"""

import json
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated

import torch
import typer
from transformers.utils import logging

from transformers_aar.data.staging import staged_file
from transformers_aar.evaluation.benchmark import measure
from transformers_aar.evaluation.benchmark_rows import ROWS, prepared
from transformers_aar.evaluation.floors import Ceilings, measure_ceilings
from transformers_aar.evaluation.reports import environment, markdown_table
from transformers_aar.memory import keep_freed_memory

RECIPES = Path(__file__).parent / "configs"


def measure_row(
    row: str, sat_recipe: Path, aar_recipe: Path, ceilings: Ceilings, rounds: int, max_seconds: float
) -> list[dict]:
    """The table's lines of a row."""
    keep_freed_memory()  # as commands and trainings do
    torch.backends.cudnn.allow_tf32 = False
    logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with prepared(row, sat_recipe, aar_recipe, device) as comparison:
        return [{"row": row} | line for line in measure(comparison, ceilings, rounds, max_seconds)]


def write(lines: list[dict], ceilings: Ceilings, folder: Path) -> None:
    """The table so far, for people and for programs."""
    best = {f"{str(dtype)[6:]} matrix products (GFLOP/s)": flops / 1e9 for dtype, flops in ceilings.flops.items()}
    best["reading memory (GB/s)"] = ceilings.bandwidth / 1e9
    settings = environment() | best
    pairs = [{"": name, " ": value} for name, value in settings.items()]
    text = f"# Benchmark\n\n{markdown_table(lines)}\n\n## Machine\n\n{markdown_table(pairs)}\n"
    content = json.dumps({"settings": settings, "rows": lines}, indent=2) + "\n"
    for name, written in (("benchmark.md", text), ("benchmark.json", content)):
        with staged_file(folder / name) as staged:
            staged.write_text(written, encoding="utf-8")


def main(
    output_dir: Annotated[Path, typer.Option(help="Folder for the table.")],
    rows: Annotated[
        list[str] | None, typer.Option(help=f"What to measure, all by default: {', '.join(ROWS)}.")
    ] = None,
    sat_recipe: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Recipe of the codec.")] = RECIPES
    / "sat_c128.yaml",
    aar_recipe: Annotated[Path, typer.Option(exists=True, dir_okay=False, help="Recipe of the generator.")] = RECIPES
    / "aar_d16.yaml",
    rounds: Annotated[int, typer.Option(min=1, help="Turns of everything that is compared.")] = 5,
    max_seconds: Annotated[float, typer.Option(help="No further turn begins after so many seconds of a row.")] = 60.0,
) -> None:
    """Measures rows one by one and prints the table."""
    rows = rows or list(ROWS)
    if unknown := [row for row in rows if row not in ROWS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(ROWS)}.", param_hint="--rows")
    output_dir.mkdir(parents=True, exist_ok=True)
    ceilings = measure_ceilings(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    lines = []
    for row in rows:
        # in a process of its own, which brings no memory and no settings of the rows before
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            words = row, sat_recipe, aar_recipe, ceilings, rounds, max_seconds
            lines += pool.submit(measure_row, *words).result()
        write(lines, ceilings, output_dir)
        print(f"{row} is measured, see {output_dir / 'benchmark.md'}", flush=True)
    print((output_dir / "benchmark.md").read_text())


if __name__ == "__main__":
    typer.run(main)
