"""Draws the curves of a training from its output folder: `python scripts/plot_training.py RUN OUTPUT.png`. Every
figure of the log that has no scale in its name gets a panel; what training and validation share is drawn in one."""

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import typer

from transformers_aar.data.staging import staged_file
from transformers_aar.training.loop import LOG_FILE

COLUMNS = 3


def read_curves(run: Path) -> dict[str, dict[str, list[tuple[int, float]]]]:
    """Points (step, value) by figure and then by `"train"` or `"validation"`."""
    curves = {}
    for line in (run / LOG_FILE).read_text().splitlines():
        entry = json.loads(line)
        for name, value in entry.items():
            phase, _, figure = name.partition("/")
            if figure and "/" not in figure:  # the others are those of single scales
                curves.setdefault(figure, {}).setdefault(phase, []).append((entry["step"], value))
    return curves


def main(run: Path, output: Path) -> None:
    """Writes the curves of RUN as a picture to OUTPUT."""
    if not (run / LOG_FILE).is_file():
        raise typer.BadParameter(f"{run} has no {LOG_FILE}: name the output folder of a training.")
    curves = read_curves(run)
    rows = -(-len(curves) // COLUMNS)
    size = 4.2 * COLUMNS, 2.6 * rows
    figure, axes = plt.subplots(rows, COLUMNS, figsize=size, layout="constrained", squeeze=False)
    for panel, (name, phases) in zip(axes.flat, curves.items()):
        for phase, points in phases.items():
            panel.plot(*zip(*points), label=phase, linewidth=1)
        panel.set_title(name.replace("_", " "))
        panel.set_xlabel("step")
        panel.legend(frameon=False)
    for panel in axes.flat[len(curves) :]:
        panel.axis("off")
    with staged_file(output) as staged:
        figure.savefig(staged, dpi=80)


if __name__ == "__main__":
    typer.run(main)
