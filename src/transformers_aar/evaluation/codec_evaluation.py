"""A codec's figures on held-out sounds: what it loses, what its codes cost, and how well they are used."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from accelerate import Accelerator

from ..layers_sat import at_least_fp32
from ..modeling_sat import SatModel
from ..training.losses import relative_error
from .bootstrap import Estimate, bootstrap_interval
from .codebook_usage import CodebookUsage
from .held_out import HeldOutCrops
from .listeners import Listeners, Rows
from .plots import plot_by_scale
from .reconstruction import MIN_SAMPLES, mel_distance, multi_resolution_stft_distance, si_sdr, tokens_per_second
from .reports import Report, Sample, noted_warnings, write_samples

Result = TypeVar("Result")


@dataclass
class CodecMeasurements:
    """
    Args:
        rows (`dict[str, torch.Tensor]`): what was measured of each sound, in their order.
        usage ([`CodebookUsage`]): of all their codes.
    """

    rows: Rows
    usage: CodebookUsage


@torch.no_grad()
def measure_codec(
    codec: SatModel, crops: HeldOutCrops, listeners: Listeners, accelerator: Accelerator
) -> CodecMeasurements:
    """
    Encodes and decodes held-out sounds, shared out to the processes; each gets the measurements of all.

    Raises:
        ValueError: for windows that are too short to compare spectra of, and as [`HeldOutCrops`].
    """
    config = codec.config
    if config.window_length < MIN_SAMPLES:
        raise ValueError(f"The codec's windows have {config.window_length} samples: figures take {MIN_SAMPLES} each.")
    usage = CodebookUsage(config.scales, config.codebook_size, accelerator.device)
    # the first pass takes longer
    codec(stack_waveforms([crops.read(0)]).to(codec.device, codec.dtype))

    def measure(examples: list[dict]) -> Rows:
        rows, codes = measure_batch(codec, stack_waveforms(examples).to(codec.device, codec.dtype), listeners)
        usage.update(codes)
        return rows

    rows = crops.measure(measure, "held-out sounds")
    usage.counts = accelerator.reduce(usage.counts)
    return CodecMeasurements(rows, usage)


def measure_batch(codec: SatModel, waveforms: torch.Tensor, listeners: Listeners) -> tuple[Rows, torch.LongTensor]:
    """Rows of sounds `(batch_size, 1, num_samples)`, one window each, and their codes."""
    rate = codec.config.sampling_rate
    codes, encode_seconds = timed(lambda: codec.encode(waveforms).audio_codes)
    decoded, decode_seconds = timed(lambda: codec.decode(codes).audio_values)
    references, reconstructed = waveforms[:, 0].float(), decoded[:, 0, : waveforms.shape[-1]].float()
    pairs = zip(reconstructed[:, None, None], references[:, None, None])
    rows = {
        "mel_distance": mel_distances_by_scale(codec, codes, references),
        "stft_distance": multi_resolution_stft_distance(reconstructed, references),
        "si_sdr_db": si_sdr(reconstructed, references),
        "relative_error": torch.stack([relative_error(*pair) for pair in pairs]),
        "encode_seconds": torch.full((len(waveforms),), encode_seconds / waveforms[:, 0].numel() * rate),
        "decode_seconds": torch.full((len(waveforms),), decode_seconds / waveforms[:, 0].numel() * rate),
    }
    rows |= latent_errors(codec, waveforms)
    rows |= listeners.hear("original", references) | listeners.hear("reconstruction", reconstructed)
    return rows, codes


def mel_distances_by_scale(codec: SatModel, codes: torch.LongTensor, references: torch.Tensor) -> torch.Tensor:
    """Mel distances `(batch_size, num_scales)` when only the first 1, 2, … scales of the codes are decoded."""
    distances = []
    for count in range(1, codec.config.num_scales + 1):
        decoded = codec.decode(codes, max_scales=count).audio_values[:, 0, : references.shape[-1]]
        distances.append(mel_distance(decoded.float(), references, codec.config.sampling_rate))
    return torch.stack(distances, dim=-1)


def latent_errors(codec: SatModel, waveforms: torch.Tensor) -> Rows:
    """
    Of each sound the mean square of the quantizer's residual after 1, 2, … scales, `latent_residual` `(batch_size,
    num_scales)`; and of its latents the mean square, `latent_power` `(batch_size,)`, and the mean over time,
    `latent_mean` `(batch_size, codebook_dim)`, which together give the variance of all.
    """
    quantizer, hidden = codec.quantizer, codec.encoder(waveforms)
    latents = quantizer.project_in(at_least_fp32(hidden).transpose(1, 2)).transpose(1, 2)
    f_hat, residuals = quantizer.empty_f_hat(len(hidden)), []
    for scale, codes in enumerate(quantizer.split(quantizer.encode(hidden))):
        f_hat, _ = quantizer.accumulate(f_hat, codes, scale)
        residuals.append((latents - f_hat).square().mean((1, 2)))
    return {
        "latent_residual": torch.stack(residuals, dim=-1),
        "latent_power": latents.square().mean((1, 2)),
        "latent_mean": latents.mean(-1),
    }


def codec_report(codec: SatModel, measured: CodecMeasurements, listeners: Listeners, title: str) -> Report:
    """The figures and tables; more settings, pictures and sounds are the caller's to add."""
    config, rows, notes = codec.config, measured.rows, []
    names = ("stft_distance", "si_sdr_db", "relative_error")
    figures = {"mel_distance": bootstrap_interval(rows["mel_distance"][:, -1], clips=rows["clip"])}
    figures |= {name: bootstrap_interval(rows[name], clips=rows["clip"]) for name in names}
    with noted_warnings(notes):
        figures |= listeners.frechet_distances(rows, "reconstruction", rows, "original")
    figures |= listeners.named_rightly(rows, "original") | listeners.named_rightly(rows, "reconstruction")
    figures |= {
        "tokens_per_second": tokens_per_second(config),
        "bitrate_kbps": config.bandwidth,
        "encode_seconds_per_second": rows["encode_seconds"].mean().item(),
        "decode_seconds_per_second": rows["decode_seconds"].mean().item(),
    }
    settings = {"held-out sounds": len(rows["index"])}
    return Report(title, settings, figures, {"Scales": scale_table(codec, measured)}, notes=notes)


def scale_table(codec: SatModel, measured: CodecMeasurements) -> list[dict]:
    """Use of each scale's codes, and the errors when all scales up to it are decoded."""
    usage, curves = measured.usage, error_curves(measured.rows)
    return [
        {"scales": scale + 1, "tokens": length}
        | {"codes in use": usage.used[scale].item(), "perplexity": usage.perplexity[scale].item()}
        | {name: estimates[scale] for name, estimates in curves.items()}
        for scale, length in enumerate(codec.config.scales)
    ]


def error_curves(rows: Rows) -> dict[str, list[Estimate]]:
    """Mel distance and latent error (residual over the latents' variance) against the number of scales."""
    variance = rows["latent_power"].double().mean() - rows["latent_mean"].double().mean(0).square().mean()
    curves = {"latent error": rows["latent_residual"].double() / variance, "mel distance": rows["mel_distance"]}
    return {
        name: [bootstrap_interval(column, clips=rows["clip"]) for column in values.T]
        for name, values in curves.items()
    }


@torch.no_grad()
def illustrate_codec(
    report: Report, codec: SatModel, measured: CodecMeasurements, crops: HeldOutCrops, count: int, folder: Path
) -> None:
    """Adds pictures, and so many sounds beside what the codec makes of them."""
    plot_by_scale(folder / "scales.png", error_curves(measured.rows))
    index = measured.rows["index"].tolist()
    count = min(count, len(index))
    examples = [crops.read(index[len(index) * place // count]) for place in range(count)]
    samples = [Sample(crops.title(example), with_reconstruction(codec, example, "original")) for example in examples]
    report.samples = write_samples(samples, codec.config.sampling_rate, folder, "reconstructions.png")
    report.pictures = {
        "scales.png": "Errors by the number of scales decoded",
        "reconstructions.png": "Reconstructions beside the originals",
    }


def with_reconstruction(codec: SatModel, example: dict, name: str) -> dict[str, torch.Tensor]:
    """A sound `(num_samples,)` by that name, and its reconstruction."""
    waveforms = stack_waveforms([example])
    codes = codec.encode(waveforms.to(codec.device, codec.dtype)).audio_codes
    decoded = codec.decode(codes).audio_values[0, 0, : waveforms.shape[-1]]
    return {name: waveforms[0, 0], "reconstruction": decoded.float().cpu()}


def stack_waveforms(examples: list[dict]) -> torch.Tensor:
    """Waveforms `(batch_size, 1, num_samples)` of examples, at the first of their rates."""
    return torch.stack([example["waveforms"][0] for example in examples])


def timed(function: Callable[[], Result]) -> tuple[Result, float]:
    """A function's result and the seconds that it took, on a GPU to the end of its work there."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, time.perf_counter() - start
