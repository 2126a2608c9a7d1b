"""Pictures of sounds and of the codes they are made of."""

import math
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torchaudio
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ..data.staging import staged_file
from .bootstrap import Estimate

DYNAMIC_RANGE_DB = 80.0
FREQUENCY_TICKS_HZ = (0, 250, 500, 1000, 2000, 4000, 8000, 16_000)


def plot_sounds(path: str | Path, sounds: Mapping[str, torch.Tensor], sampling_rate: int) -> None:
    """
    Writes a PNG with the waveform and the mel spectrogram of each sound, one below the other on one time axis. The
    spectrograms share their levels: 0 dB is the loudest point of all.

    Args:
        path (`str` or `Path`): the picture.
        sounds (`Mapping[str, torch.Tensor]`): waveforms `(channels, num_samples)` by their titles; only the first
            channel is shown.
        sampling_rate (`int`): samples per second, in Hz.
    """
    figure = Figure(figsize=(10, 4.2 * len(sounds)), layout="constrained")
    rows = figure.subplots(2 * len(sounds), sharex=True, height_ratios=[1, 2] * len(sounds))
    spectrograms = [mel_decibels(sound[0], sampling_rate) for sound in sounds.values()]
    loudest = max(float(spectrogram.max()) for spectrogram in spectrograms)
    peak = max(1e-3, max(float(sound.abs().max()) for sound in sounds.values()))
    for index, (title, sound) in enumerate(sounds.items()):
        wave_axes, mel_axes = rows[2 * index : 2 * index + 2]
        wave_axes.set_title(title, parse_math=False)
        _draw_waveform(wave_axes, sound[0], sampling_rate, 1.05 * peak)
        image = _draw_spectrogram(
            mel_axes, spectrograms[index] - loudest, sound.shape[-1] / sampling_rate, sampling_rate
        )
        figure.colorbar(image, ax=mel_axes, label="level (dB)", pad=0.01)
    rows[-1].set_xlabel("time (s)")
    _save(figure, path)


def plot_token_pyramid(
    path: str | Path,
    audio_codes: torch.Tensor,
    scales: Sequence[int],
    codebook_size: int,
    window_stride_s: float,
    title: str,
) -> None:
    """
    Writes a PNG of a sound's codes: one row per scale, coarse at the top, each token as wide as the time it stands
    for, its code as the colour.

    Args:
        path (`str` or `Path`): the picture.
        audio_codes (`torch.LongTensor` of shape `(num_windows, tokens_per_window)`): codes of one sound.
        scales (`Sequence[int]`): tokens per scale in a window.
        codebook_size (`int`): number of codes, which is where the colours end.
        window_stride_s (`float`): seconds from the start of one window to the start of the next.
        title (`str`): what to write above.
    """
    num_windows = len(audio_codes)
    duration = num_windows * window_stride_s
    figure = Figure(figsize=(10, 1.6 + 0.26 * len(scales)), layout="constrained")
    axes = figure.subplots()
    limits = {"vmin": 0, "vmax": codebook_size - 1}
    for row, codes in enumerate(audio_codes.cpu().split(list(scales), dim=1)):
        edges = torch.linspace(0, duration, codes.numel() + 1)
        image = axes.pcolormesh(edges, [row + 0.04, row + 0.96], codes.reshape(1, -1), cmap="viridis", **limits)
    for window in range(1, num_windows):
        axes.axvline(window * window_stride_s, color="white", linewidth=1)
    axes.set_title(title, parse_math=False)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("tokens per window")
    axes.set_yticks([row + 0.5 for row in range(len(scales))], scales)
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    figure.colorbar(image, ax=axes, label="code", pad=0.01)
    _save(figure, path)


def plot_spectrogram_sheet(
    path: str | Path, rows: Sequence[tuple[str, Mapping[str, torch.Tensor]]], sampling_rate: int
) -> None:
    """
    Writes a PNG with mel spectrograms side by side: one row per title, one column per kind of sound, such as
    "original" and "reconstruction". The sounds of a row share their levels: 0 dB is the loudest point of the row.

    Args:
        path (`str` or `Path`): the picture.
        rows (`Sequence[tuple[str, Mapping[str, torch.Tensor]]]`): titles, and mono waveforms `(num_samples,)` by kind;
            a row that lacks a kind leaves its place empty.
        sampling_rate (`int`): samples per second, in Hz.
    """
    kinds = list(dict.fromkeys(kind for _, sounds in rows for kind in sounds))
    figure = Figure(figsize=(1.6 + 2.8 * len(kinds), 0.5 + 1.5 * len(rows)), layout="constrained")
    grid = figure.subplots(len(rows), len(kinds), squeeze=False)
    for axes_row, (title, sounds) in zip(grid, rows):
        spectrograms = {kind: mel_decibels(sound, sampling_rate) for kind, sound in sounds.items()}
        loudest = max(float(spectrogram.max()) for spectrogram in spectrograms.values())
        for axes, kind in zip(axes_row, kinds):
            if kind in sounds:
                duration = len(sounds[kind]) / sampling_rate
                _draw_spectrogram(axes, spectrograms[kind] - loudest, duration, sampling_rate)
            axes.set(xticks=[], yticks=[], ylabel=None)
        axes_row[0].set_ylabel(textwrap.fill(title, 18), rotation=0, ha="right", va="center", parse_math=False)
    for axes, kind in zip(grid[0], kinds):
        axes.set_title(kind, parse_math=False)
    _save(figure, path)


def plot_by_scale(path: str | Path, curves: Mapping[str, Sequence[Estimate]]) -> None:
    """
    Writes a PNG with a panel for each curve against the number of scales, from 1, and its confidence intervals.

    Args:
        path (`str` or `Path`): the picture.
        curves (`Mapping[str, Sequence[Estimate]]`): a value per number of scales, by the curve's name.
    """
    figure = Figure(figsize=(4.6 * len(curves), 3.6), layout="constrained")
    for axes, (name, estimates) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items()):
        counts = range(1, len(estimates) + 1)
        axes.fill_between(counts, [each.low for each in estimates], [each.high for each in estimates], alpha=0.25)
        axes.plot(counts, [each.value for each in estimates], marker="o", markersize=3)
        axes.set(xlabel="scales", ylabel=name, ylim=(0, None))
    _save(figure, path)


def mel_decibels(waveform: torch.Tensor, sampling_rate: int) -> torch.Tensor:
    """
    Log-mel power spectrogram in dB, `(num_mels, num_frames)`, of a waveform `(num_samples,)`: windows of 20 to 40 ms,
    a quarter of that as the hop, bands equally spaced in mel from 0 Hz to half the sampling rate.
    """
    num_fft = 2 ** int(math.log2(0.043 * sampling_rate))
    mel = torchaudio.transforms.MelSpectrogram(
        sampling_rate, num_fft, hop_length=max(1, num_fft // 4), n_mels=max(1, num_fft // 13)
    )
    waveform = waveform.detach().float().cpu()
    # the edges are mirrored, which takes a sound longer than they are
    power = mel(torch.nn.functional.pad(waveform, (0, max(0, num_fft - len(waveform)))))
    return 10 * power.clamp(min=1e-10).log10()


def _draw_waveform(axes: Axes, waveform: torch.Tensor, sampling_rate: int, limit: float) -> None:
    """Every sample where there are few, and the range of each column where there are more than can be seen."""
    waveform = waveform.detach().float().cpu()
    per_column = math.ceil(len(waveform) / 4000)
    columns = torch.nn.functional.pad(waveform, (0, -len(waveform) % per_column)).view(-1, per_column)
    times = torch.arange(len(columns)) * per_column / sampling_rate
    if per_column == 1:
        axes.plot(times, waveform, linewidth=0.7)
    else:
        axes.fill_between(times, columns.amin(1), columns.amax(1), linewidth=0.4, edgecolor="C0")
    axes.set_ylim(-limit, limit)
    axes.set_ylabel("amplitude")


def _draw_spectrogram(axes: Axes, decibels: torch.Tensor, duration: float, sampling_rate: int):
    top = _mel(sampling_rate / 2)
    image = axes.imshow(
        decibels,
        origin="lower",
        aspect="auto",
        interpolation="nearest",
        cmap="magma",
        extent=(0, duration, 0, top),
        vmin=-DYNAMIC_RANGE_DB,
        vmax=0,
    )
    ticks = [frequency for frequency in FREQUENCY_TICKS_HZ if frequency <= sampling_rate / 2]
    axes.set_yticks([_mel(frequency) for frequency in ticks], ticks)
    axes.set_ylabel("frequency (Hz)")
    return image


def _mel(frequency: float) -> float:
    """The mel scale of torchaudio's default ("htk")."""
    return 2595 * math.log10(1 + frequency / 700)


def _save(figure: Figure, path: str | Path) -> None:
    with staged_file(path) as staged:
        figure.savefig(staged, dpi=120)
