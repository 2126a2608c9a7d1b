"""Evaluations as Markdown for people and as JSON for programs, with the same numbers in both."""

import json
import os
import platform
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import torchaudio
import transformers

from .. import __version__
from ..data.audio import write_sound
from ..data.staging import staged_file
from .bootstrap import Estimate
from .plots import plot_spectrogram_sheet

Cell = Estimate | float | int | str


@dataclass
class Report:
    """
    Args:
        title (`str`): what was evaluated.
        settings (`dict`): on what and how, by name.
        figures (`dict`): results by name, an [`Estimate`] or a plain number each; units are part of the names.
        tables (`dict`): rows by the table's title, each a dictionary with the same columns.
        pictures (`dict`): captions by the file's name in the report's folder.
        samples (`list`): the title and the files of each, see [`write_samples`].
        notes (`list[str]`): what a reader must know to judge the figures.
        conclusions (`list[str]`): sentences that follow from the tables.
    """

    title: str
    settings: dict[str, Cell]
    figures: dict[str, Cell]
    tables: dict[str, list[dict[str, Cell]]] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    samples: list[dict[str, str | dict[str, str]]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    conclusions: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Sample:
    """
    Args:
        title (`str`): what the sound is of.
        sounds (`dict[str, torch.Tensor]`): mono waveforms `(num_samples,)` by what they are, such as `"original"`.
    """

    title: str
    sounds: dict[str, torch.Tensor]


def write_report(report: Report, folder: Path) -> None:
    """
    Writes `report.json` and `report.md`, with the machine, the versions and the command line that made them.

    Raises:
        ValueError: for NaN and infinite figures.
        OSError: where the folder can't be written.
    """
    made_by = {"command": shlex.join(["python", *sys.argv]), "environment": environment()}
    content = asdict(report) | {"figures": {name: _entry(value) for name, value in report.figures.items()}} | made_by
    texts = {"report.json": json.dumps(content, indent=2, allow_nan=False) + "\n"}
    texts["report.md"] = render_markdown(report, **made_by)
    for name, text in texts.items():
        with staged_file(folder / name) as staged:
            staged.write_text(text, encoding="utf-8")


@contextmanager
def noted_warnings(notes: list[str]) -> Iterator[None]:
    """Adds the warnings in this block to a report's notes, for its readers, and lets them pass."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        notes.append(str(warning.message))
        warnings.warn(warning.message, stacklevel=3)


def render_markdown(report: Report, command: str, environment: dict[str, Cell]) -> str:
    """The report as Markdown; tables show four digits of each number."""
    parts = [f"# {report.title}", markdown_table(_pairs(report.settings))]
    parts += ["## Figures", markdown_table(_figure_rows(report.figures))]
    parts += [
        "Intervals are 95 % bootstrap confidence intervals over the clips that the sounds are of.",
        *report.notes,
    ]
    for title, rows in report.tables.items():
        parts += [f"## {title}", markdown_table(rows)]
    parts += report.conclusions
    for name, caption in report.pictures.items():
        parts += [f"## {caption}", f"![{caption}]({name})"]
    if report.samples:
        lines = []
        for sample in report.samples:
            links = ", ".join(f"[{name}]({path})" for name, path in sample["files"].items())
            lines.append(f"- {sample['title']}: {links}")
        parts += ["## Sounds", "\n".join(lines)]
    parts += ["## How it was made", f"```bash\n{command}\n```", markdown_table(_pairs(environment))]
    return "\n\n".join(parts) + "\n"


def environment() -> dict[str, Cell]:
    """The machine and the versions that figures, seconds above all, depend on."""
    return {
        "accelerator": torch.cuda.get_device_name() if torch.cuda.is_available() else "none",
        "processor": _processor_name(),
        "processor cores": os.cpu_count() or 1,
        "threads per process": torch.get_num_threads(),
        "system": platform.platform(),
        "python": platform.python_version(),
        "transformers-aar": __version__,
        **{package.__name__: package.__version__ for package in (torch, torchaudio, transformers)},
    }


def write_samples(samples: Sequence[Sample], sampling_rate: int, folder: Path, picture: str) -> list[dict]:
    """
    Writes each sample's sounds into `folder/sounds`, and one picture of all their spectrograms.

    Returns:
        `list[dict]`: the `title` and the `files` by what they are, relative to the folder, for [`Report`].
    """
    (folder / "sounds").mkdir(exist_ok=True)
    listed = []
    for number, sample in enumerate(samples, start=1):
        files = {name: f"sounds/{number:02d}-{name.replace(' ', '-')}.wav" for name in sample.sounds}
        for name, path in files.items():
            with write_sound(folder / path, sampling_rate) as writer:
                writer.write(sample.sounds[name][None])
        listed.append({"title": sample.title, "files": files})
    plot_spectrogram_sheet(folder / picture, [(sample.title, sample.sounds) for sample in samples], sampling_rate)
    return listed


def _entry(value: Cell) -> dict[str, Cell]:
    return asdict(value) if isinstance(value, Estimate) else {"value": value}


def _pairs(values: dict[str, Cell]) -> list[dict[str, Cell]]:
    return [{"": name.replace("_", " "), " ": value} for name, value in values.items()]


def _figure_rows(figures: dict[str, Cell]) -> list[dict[str, Cell]]:
    rows = []
    for name, value in figures.items():
        entry = _entry(value)
        interval = f"{_text(entry['low'])} to {_text(entry['high'])}" if "low" in entry else ""
        rows.append({"figure": name.replace("_", " "), "value": entry["value"], "95 % interval": interval})
    return rows


def markdown_table(rows: Sequence[dict[str, Cell | None]]) -> str:
    """Rows with the same columns as a Markdown table, four digits of each number, nothing where a cell is `None`."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *([_text(cell) for cell in row.values()] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _text(cell: Cell | None) -> str:
    if cell is None:
        return ""
    if isinstance(cell, Estimate):
        return f"{_text(cell.value)} ({_text(cell.low)} to {_text(cell.high)})"
    return f"{cell:.4g}" if isinstance(cell, float) else str(cell).replace("|", "\\|")


def _processor_name() -> str:
    """The model, which Linux tells in a file only."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
