"""AudioSet's layout in small."""

from pathlib import Path

import numpy as np
import soundfile

RATE = 24_000
LABELS = ["/m/0bt9lr", "/m/03kmc9", "/m/06mb1"]  # Dog, Siren, Rain
SOUNDS = {"unbalanced_train": "audioset_unbalanced_train_mp3", "eval": "audioset_eval_raw_mp3"}


def write_clips(folder: Path, split: str, count: int) -> None:
    """Writes sounds of 100 to 300 ms, a tone and noise, with one to three labels, and the CSV file that lists them."""
    rng = np.random.default_rng(count)
    (folder / SOUNDS[split]).mkdir(parents=True)
    lines = ["# one", "# two", "# YTID, start_seconds, end_seconds, positive_labels"]
    for number in range(count):
        name = f"{split}-{number:02d}"
        times = np.arange(RATE * (1 + number % 3) // 10) / RATE
        sound = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 2000) * times) + 0.1 * rng.standard_normal(len(times))
        soundfile.write(folder / SOUNDS[split] / f"Y{name}.wav", sound, RATE)
        lines.append(f'{name}, 0.000, 1.000, "{",".join(LABELS[: 1 + number % 3])}"')
    (folder / f"{split}_segments.csv").write_text("\n".join(lines) + "\n")
