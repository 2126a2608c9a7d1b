"""Token files: the codes of one sound as safetensors, with what it takes to decode them."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .staging import staged_file

if TYPE_CHECKING:
    from ..modeling_sat import SatModel

FORMAT = "transformers-aar tokens"
VERSION = "1"
# Fields of the codec's configuration that tell a reader of the file what the codes are.
DESCRIPTION = ("audio_channels", "upsampling_ratios", "scales", "codebook_size", "window_length_s", "overlap")


def save_tokens(path: str | Path, codec: "SatModel", audio_codes: torch.Tensor, num_samples: int) -> None:
    """
    Args:
        path (`str` or `Path`): the file, usually `….safetensors`.
        codec ([`SatModel`]): the codec that made the codes.
        audio_codes (`torch.LongTensor` of shape `(num_windows, tokens_per_window)`): codes of one sound; the file has
            them as int32.
        num_samples (`int`): length of the sound in samples at the codec's rate.
    """
    metadata = {
        "format": FORMAT,
        "version": VERSION,
        "fingerprint": codec.fingerprint(),
        "num_samples": str(num_samples),
        "sampling_rate": str(codec.config.sampling_rate),
        "config": json.dumps({name: getattr(codec.config, name) for name in DESCRIPTION}),
    }
    with staged_file(path) as staged:
        save_file({"audio_codes": audio_codes.to("cpu", torch.int32).contiguous()}, staged, metadata)


def load_tokens(path: str | Path, codec: "SatModel") -> tuple[torch.IntTensor, int]:
    """
    Returns:
        The codes, int32 of shape `(num_windows, tokens_per_window)`, and the length of the sound in samples.

    Raises:
        ValueError: when the file is missing, truncated or no token file, when its metadata is incomplete, when another
            codec made it, and for codes out of range or of the wrong type or length.
    """
    metadata, audio_codes = _read(Path(path))
    for name in ("version", "fingerprint", "num_samples"):
        if name not in metadata:
            raise ValueError(f"{path} doesn't tell its {name}: name a token file that tokenize wrote.")
    if metadata["version"] != VERSION:
        raise ValueError(f"{path} has version {metadata['version']}, and this package reads version {VERSION}.")
    if metadata["fingerprint"] != codec.fingerprint():
        raise ValueError(f"{path} was made by another codec, to which its codes belong: name that one with --model.")
    if not re.fullmatch("[0-9]{1,15}", metadata["num_samples"]):
        raise ValueError(f"{path} has num_samples {metadata['num_samples']!r}, which is no number of samples.")
    config, num_samples = codec.config, int(metadata["num_samples"])
    expected = (config.num_windows(num_samples), config.tokens_per_window)
    if audio_codes.shape != expected or audio_codes.dtype != torch.int32 or num_samples < 1:
        raise ValueError(
            f"{path} holds codes of shape {tuple(audio_codes.shape)} and type {audio_codes.dtype}, and {num_samples} "
            f"samples need {expected} (windows, tokens) of torch.int32."
        )
    low, high = torch.stack(torch.aminmax(audio_codes)).tolist()
    if low < 0 or high >= config.codebook_size:
        raise ValueError(
            f"{path} holds codes from {low} to {high}, and they must lie in 0 to {config.codebook_size - 1}."
        )
    return audio_codes, num_samples


def _read(path: Path) -> tuple[dict[str, str], torch.Tensor]:
    if not path.is_file():
        raise ValueError(f"{path} doesn't exist or is no file: name a token file that tokenize wrote.")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != FORMAT or "audio_codes" not in file.keys():
                raise ValueError(f"{path} is no token file: name one that tokenize wrote.")
            return metadata, file.get_tensor("audio_codes")
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no token file: name one that tokenize wrote.") from error
