"""AudioSet's layout in small."""

from pathlib import Path

import numpy as np
import soundfile

RATE = 24_000
LABELS = ["/m/0bt9lr", "/m/03kmc9", "/m/06mb1"]  # Dog, Siren, Rain
SOUNDS = {"unbalanced_train": "audioset_unbalanced_train_mp3", "eval": "audioset_eval_raw_mp3"}


def write_clips(folder: Path, split: str, count: int, strong: bool = False) -> None:
    """
    Writes sounds of 100 to 300 ms, a tone and noise, with one to three labels, and the CSV file that lists them; with
    strong labels the first one's event lasts from the beginning to the end, and the others' the last 10 ms.
    """
    rng = np.random.default_rng(count)
    (folder / SOUNDS[split]).mkdir(parents=True)
    lines = ["# one", "# two", "# YTID, start_seconds, end_seconds, positive_labels"]
    events = ["segment_id\tstart_time_seconds\tend_time_seconds\tlabel"]
    for number in range(count):
        name = f"{split}-{number:02d}"
        times = np.arange(RATE * (1 + number % 3) // 10) / RATE
        sound = 0.3 * np.sin(2 * np.pi * rng.uniform(100, 2000) * times) + 0.1 * rng.standard_normal(len(times))
        soundfile.write(folder / SOUNDS[split] / f"Y{name}.wav", sound, RATE)
        labels, end = LABELS[: 1 + number % 3], len(times) / RATE
        lines.append(f'{name}, 0.000, 1.000, "{",".join(labels)}"')
        events += [f"{name}_0\t{0 if label == LABELS[0] else end - 0.01:.3f}\t{end:.3f}\t{label}" for label in labels]
    (folder / f"{split}_segments.csv").write_text("\n".join(lines) + "\n")
    if strong:
        (folder / f"audioset_{split}_strong.tsv").write_text("\n".join(events) + "\n")
