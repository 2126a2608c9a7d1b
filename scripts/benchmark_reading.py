"""Compares reading one-second crops with decoding the whole clip twice, as the reference's training does:
`python scripts/benchmark_reading.py`. One thread, on 10-second stereo MP3 files made for this."""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
import torch

from transformers_aar.data.crops import read_crop

NUM_FILES = 20
NUM_ROUNDS = 5
FILE_RATE = 44_100
WHOLE_CLIPS = "librosa, whole clip at 24 and at 48 kHz"


def main() -> None:
    """Prints crops per second and core as a Markdown table."""
    try:
        import librosa
    except ImportError:
        sys.exit("librosa is missing, which this compares with: pip install librosa")
    torch.set_num_threads(1)

    def read_whole_clips(path: Path, position: float) -> None:
        for rate in (24_000, 48_000):
            librosa.load(path, sr=rate)

    def crop_reader(*rates: int) -> Callable[[Path, float], None]:
        return lambda path, position: read_crop({"path": str(path), "bytes": None}, 1.0, rates, position)

    readers = {
        WHOLE_CLIPS: read_whole_clips,
        "read_crop, 1 s at 24 kHz": crop_reader(24_000),
        "read_crop, 1 s at 24 and at 48 kHz": crop_reader(24_000, 48_000),
    }
    with TemporaryDirectory() as folder:
        speeds = measure(readers, write_clips(Path(folder)))
    print("| way of reading | crops per second | ratio |\n|---|---:|---:|")
    for name, speed in speeds.items():
        print(f"| {name} | {speed:.1f} | {speed / speeds[WHOLE_CLIPS]:.1f} |")


def write_clips(folder: Path) -> list[Path]:
    """MP3 files of a glide in noise."""
    generator = np.random.default_rng(0)
    times = np.arange(10 * FILE_RATE) / FILE_RATE
    paths = [folder / f"{number}.mp3" for number in range(NUM_FILES)]
    for path in paths:
        tone = 0.3 * np.sin(2 * np.pi * generator.uniform(100, 1000) * times * (1 + times))
        soundfile.write(path, tone[:, None] + 0.1 * generator.standard_normal((len(times), 2)), FILE_RATE)
    return paths


def measure(readers: dict[str, Callable[[Path, float], None]], paths: list[Path]) -> dict[str, float]:
    """Median files per second of each reader, which take turns, so that a busy machine slows all of them."""
    for reader in readers.values():
        reader(paths[0], 0.5)
    speeds = {name: [] for name in readers}
    for _ in range(NUM_ROUNDS):
        for name, reader in readers.items():
            start = time.perf_counter()
            for number, path in enumerate(paths):
                reader(path, number / len(paths))
            speeds[name].append(len(paths) / (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in speeds.items()}


if __name__ == "__main__":
    main()
