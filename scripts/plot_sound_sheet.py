"""Draws mel spectrograms of the synthetic sounds, one row per kind and one column per seed:
`python scripts/plot_sound_sheet.py OUTPUT.png`."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
import torchaudio
import typer

from transformers_aar.data.synthesis import SOUND_KINDS, synthesize

SAMPLING_RATE = 24_000
NUM_SEEDS = 4


def main(output: Path) -> None:
    """Writes the sheet as a picture to OUTPUT."""
    mel = torchaudio.transforms.MelSpectrogram(SAMPLING_RATE, n_fft=1024, hop_length=128, n_mels=96, f_min=30)
    figure, axes = plt.subplots(
        len(SOUND_KINDS), NUM_SEEDS, figsize=(14, 1.7 * len(SOUND_KINDS)), layout="constrained"
    )
    for row, kind in zip(axes, SOUND_KINDS, strict=True):
        for seed, axis in enumerate(row):
            power = mel(torch.from_numpy(synthesize(kind, seed, sampling_rate=SAMPLING_RATE)))
            decibels = torchaudio.functional.amplitude_to_DB(power, 10.0, 1e-8, 0.0, top_db=70.0)
            axis.imshow(decibels, origin="lower", aspect="auto", cmap="magma")
            axis.set(xticks=[], yticks=[])
        row[0].set_title(kind, loc="left", fontsize=10)
    # Written aside and renamed, so that a failure leaves no half-written picture.
    partial = output.with_name(f".{output.name}.partial")
    figure.savefig(partial, format=output.suffix.lstrip(".") or "png", dpi=80)
    partial.replace(output)


if __name__ == "__main__":
    typer.run(main)
