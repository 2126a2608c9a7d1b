"""Feature extractor of SAT: checks waveforms and pads them into a batch."""

from numbers import Number

import numpy as np
import torch
from transformers.feature_extraction_sequence_utils import SequenceFeatureExtractor
from transformers.feature_extraction_utils import BatchFeature


class SatFeatureExtractor(SequenceFeatureExtractor):
    """
    Turns waveforms into the `input_values` and `padding_mask` of a [`SatModel`]. It neither resamples nor normalises.

    Args:
        feature_size (`int`, defaults to 1): channels of the audio.
        sampling_rate (`int`, defaults to 24000): samples per second that the codec expects, in Hz.
        padding_value (`float`, defaults to 0.0): value of the padding at the end of shorter sounds.
    """

    model_input_names = ["input_values", "padding_mask"]

    def __init__(self, feature_size: int = 1, sampling_rate: int = 24_000, padding_value: float = 0.0, **kwargs):
        super().__init__(feature_size=feature_size, sampling_rate=sampling_rate, padding_value=padding_value, **kwargs)

    def __call__(
        self,
        raw_audio,
        sampling_rate: int | None = None,
        padding: bool = True,
        return_tensors: str | None = "pt",
    ) -> BatchFeature:
        """
        Args:
            raw_audio (`np.ndarray`, `torch.Tensor`, `list[float]`, or a list of them):
                One sound, of shape `(num_samples,)` or `(channels, num_samples)`, or several of any lengths; floats
                that lie within ±1.
            sampling_rate (`int`):
                Rate of the sounds in Hz; it must be this extractor's.
            padding (`bool`, defaults to `True`):
                Whether to pad to the longest sound of the batch.
            return_tensors (`str`, *optional*, defaults to `"pt"`):
                `"pt"` or `"np"`; `None` for lists of arrays, which may differ in length.

        Returns:
            [`BatchFeature`] with `input_values`, float32 of shape `(batch_size, channels, num_samples)`, and
            `padding_mask`, int64 of shape `(batch_size, num_samples)`, 0 in the padding.

        Raises:
            ValueError: for another rate, another number of channels, whole numbers, empty, NaN or infinite audio, and
                sounds of different lengths that are to be one tensor without padding.
        """
        if sampling_rate is None:
            raise ValueError(f"Pass `sampling_rate` (this codec expects {self.sampling_rate} Hz).")
        if sampling_rate != self.sampling_rate:
            raise ValueError(
                f"The audio has {sampling_rate} Hz but this codec expects {self.sampling_rate} Hz; resample it first: "
                f"torchaudio.functional.resample(torch.as_tensor(audio), {sampling_rate}, {self.sampling_rate})."
            )
        sounds = check_sounds(raw_audio, self.feature_size)
        lengths = {sound.shape[1] for sound in sounds}
        if not padding and return_tensors is not None and len(lengths) > 1:
            raise ValueError("The sounds differ in length; pass `padding=True`, or `return_tensors=None` for lists.")
        longest = max(lengths)
        missing = [longest - sound.shape[1] if padding else 0 for sound in sounds]
        values = [
            np.pad(sound, ((0, 0), (0, count)), constant_values=self.padding_value)
            for sound, count in zip(sounds, missing, strict=True)
        ]
        masks = [
            np.pad(np.ones(sound.shape[1], dtype=np.int64), (0, count))
            for sound, count in zip(sounds, missing, strict=True)
        ]
        return BatchFeature({"input_values": values, "padding_mask": masks}, tensor_type=return_tensors)

    def to_dict(self) -> dict:
        output = super().to_dict()
        # a processor that is saved with this object inside notes its own class here, too
        output.get("auto_map", {}).pop("AutoProcessor", None)
        return output


def check_sounds(raw_audio, channels: int) -> list[np.ndarray]:
    """
    The sounds of a batch, or of one sound without a batch around it, as float32 `(channels, num_samples)` each.

    Raises:
        ValueError: for no sounds, for sounds without samples or with another number of channels, and for whole, NaN
            or infinite numbers.
    """
    sounds = [_check_sound(sound, number, channels) for number, sound in enumerate(_as_list(raw_audio))]
    if not sounds:
        raise ValueError("There is no sound; give at least one.")
    return sounds


def _check_sound(sound, number: int, channels: int) -> np.ndarray:
    """One sound as float32 of shape `(channels, num_samples)`."""
    if isinstance(sound, torch.Tensor):
        sound = sound.detach().cpu()
        # NumPy knows no bfloat16
        sound = sound.float() if sound.is_floating_point() else sound
    try:
        sound = np.asarray(sound)
    except (TypeError, ValueError) as error:
        raise ValueError(f"Sound {number} is no array of numbers; give its samples.") from error
    if sound.ndim == 0 or sound.dtype.kind not in "iuf":
        raise ValueError(f"Sound {number} is no array of numbers; give its samples.")
    if sound.dtype.kind != "f":
        raise ValueError(
            f"Sound {number} holds whole numbers ({sound.dtype}); scale it to floats within ±1 first, for "
            "example 16-bit audio with audio / 32768."
        )
    sound = sound.astype(np.float32, copy=False)
    sound = sound[None] if sound.ndim == 1 else sound
    if sound.ndim == 2 and sound.shape[0] != channels and sound.shape[1] <= 8 < sound.shape[0]:
        raise ValueError(
            f"Sound {number} has the shape {sound.shape}, with its channels last, as soundfile reads; {channels} "
            f"channel(s) are expected, as ({channels}, num_samples): mix it down with audio.mean(1), or transpose it."
        )
    if sound.ndim != 2 or sound.shape[0] != channels:
        raise ValueError(
            f"Sound {number} has the shape {sound.shape}, but {channels} channel(s) are expected, as "
            f"({channels}, num_samples); mix it down first, for example with audio.mean(0)."
        )
    if sound.shape[1] == 0:
        raise ValueError(f"Sound {number} is empty; give at least one sample.")
    if not np.isfinite(sound).all():
        raise ValueError(f"Sound {number} holds NaN or infinite samples; clean it first.")
    return sound


def _as_list(raw_audio) -> list:
    """The sounds of a batch, which may be one sound without a batch around it."""
    if isinstance(raw_audio, (list, tuple)):
        is_sound = len(raw_audio) > 0 and isinstance(raw_audio[0], Number)
        return [raw_audio] if is_sound else list(raw_audio)
    return list(raw_audio) if np.ndim(raw_audio) == 3 else [raw_audio]


SatFeatureExtractor.register_for_auto_class()

__all__ = ["SatFeatureExtractor"]
