"""Draws mel spectrograms of the synthetic sounds, three seconds of three seeds per kind, two kinds per row:
`python scripts/plot_sound_sheet.py OUTPUT.png`."""

import io
import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torchaudio
import typer
from PIL import Image

from transformers_aar.data.staging import staged_file
from transformers_aar.data.synthesis import SOUND_KINDS, synthesize

SAMPLING_RATE = 24_000
DURATION_SECONDS = 3.0
NUM_SEEDS = 3
KINDS_PER_ROW = 2
# noise doesn't compress; few colours keep the picture small
NUM_COLORS = 32


def main(output: Path) -> None:
    """Writes the sheet as a picture to OUTPUT."""
    mel = torchaudio.transforms.MelSpectrogram(SAMPLING_RATE, n_fft=1024, hop_length=240, n_mels=80, f_min=30)
    num_rows = math.ceil(len(SOUND_KINDS) / KINDS_PER_ROW)
    figure = plt.figure(figsize=(14, 1.05 * num_rows), layout="constrained")
    axes = iter(figure.subplots(num_rows, KINDS_PER_ROW * NUM_SEEDS).ravel())
    for kind in SOUND_KINDS:
        for seed in range(NUM_SEEDS):
            axis = next(axes)
            power = mel(torch.from_numpy(synthesize(kind, seed, DURATION_SECONDS, SAMPLING_RATE)))
            decibels = torchaudio.functional.amplitude_to_DB(power, 10.0, 1e-8, 0.0, top_db=70.0)
            axis.imshow(decibels, origin="lower", aspect="auto", cmap="magma")
            axis.set(xticks=[], yticks=[])
            if seed == 0:
                axis.set_ylabel(kind.replace(", ", ",\n", 1), rotation=0, ha="right", va="center", fontsize=10)
    for axis in axes:
        axis.set_axis_off()
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=75)
    with staged_file(output) as staged:
        Image.open(drawn).convert("RGB").quantize(NUM_COLORS).save(staged, optimize=True)


if __name__ == "__main__":
    typer.run(main)
