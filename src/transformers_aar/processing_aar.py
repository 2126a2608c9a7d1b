"""Processor of AAR: text, label names or a reference sound in, waveforms out."""

import difflib
import re

import numpy as np
from transformers import BatchFeature, ClapFeatureExtractor
from transformers.processing_utils import ProcessorMixin

from .feature_extraction_sat import check_sounds


class AarProcessor(ProcessorMixin):
    """
    Prepares the conditioning of an [`AarForConditionalGeneration`], and cuts its waveforms out of a batch.

    Args:
        feature_extractor ([`SatFeatureExtractor`]): the codec's.
        tokenizer ([`PreTrainedTokenizerBase`]): CLAP's, or one whose tokens are whole label names.
        conditioner_feature_extractor ([`ClapFeatureExtractor`], *optional*): CLAP's, for reference sounds.
        labels (`list[str]`, *optional*): names that a label model knows, in the order of their ids.
    """

    def __init__(self, feature_extractor, tokenizer, conditioner_feature_extractor=None, labels=None):
        super().__init__(feature_extractor, tokenizer)
        # parts that aren't always there are no attributes in the library's sense: they come back from disk as a dict
        if isinstance(conditioner_feature_extractor, dict):
            conditioner_feature_extractor = ClapFeatureExtractor.from_dict(conditioner_feature_extractor)
        self.conditioner_feature_extractor = conditioner_feature_extractor
        self.labels = labels

    @classmethod
    def get_attributes(cls) -> list[str]:
        return ["feature_extractor", "tokenizer"]

    def to_dict(self) -> dict:
        output = super().to_dict()
        if self.conditioner_feature_extractor is not None:
            output["conditioner_feature_extractor"] = self.conditioner_feature_extractor.to_dict()
        return output

    def save_pretrained(self, save_directory, **kwargs):
        # the library notes here how a tokenizer was loaded, which is no property of what is saved
        for name in ("is_local", "local_files_only"):
            self.tokenizer.init_kwargs.pop(name, None)
        return super().save_pretrained(save_directory, **kwargs)

    def __call__(
        self,
        text: str | list[str] | None = None,
        audio=None,
        sampling_rate: int | None = None,
        return_tensors: str | None = "pt",
        **kwargs,
    ) -> BatchFeature:
        """
        Args:
            text (`str` or `list[str]`, *optional*):
                Free text for a CLAP model. Label names for a label model, where `"Dog; Rain"` are two labels of one
                sound; upper and lower case don't matter.
            audio (`np.ndarray` or `torch.Tensor` of shape `(num_samples,)`, or a list of them, *optional*):
                Reference sounds for a CLAP model, mono.
            sampling_rate (`int`):
                Rate of the reference sounds in Hz; CLAP's (48000).
            return_tensors (`str`, defaults to `"pt"`):
                `"pt"` or `"np"`.
            kwargs:
                Passed on to the tokenizer.

        Returns:
            [`BatchFeature`] with `input_ids` and `attention_mask` `(batch_size, length)`, or with `input_features` and
            `is_longer`: what `generate` takes.

        Raises:
            ValueError: unless exactly one of text and audio is given, for unknown labels, and for another rate.
        """
        if (text is None) == (audio is None):
            raise ValueError("Give exactly one of `text` and `audio`.")
        if audio is not None:
            return self._process_reference(audio, sampling_rate, return_tensors)
        texts = [text] if isinstance(text, str) else list(text)
        if not texts:
            raise ValueError("`text` is an empty list; give at least one prompt.")
        if self.labels is not None:
            texts = ["; ".join(self._known_labels(entry)) for entry in texts]
        kwargs = {"padding": True, **kwargs}
        if self.labels is None and self.conditioner_feature_extractor is not None:
            kwargs.setdefault("truncation", True)
        encoded = self.tokenizer(texts, return_tensors=return_tensors, **kwargs)
        return BatchFeature({name: encoded[name] for name in ("input_ids", "attention_mask")})

    def batch_decode(self, audio, padding_mask=None) -> list[np.ndarray]:
        """
        Waveforms `(batch_size, channels, num_samples)` as a list of fp32 arrays `(channels, length)`, without the
        samples that `padding_mask` `(batch_size, num_samples)` marks as padding.
        """
        waveforms = [np.asarray(sound.detach().float().cpu()) for sound in audio]
        if padding_mask is None:
            return waveforms
        return [sound[:, : int(mask.sum())] for sound, mask in zip(waveforms, padding_mask, strict=True)]

    def _known_labels(self, text: str) -> list[str]:
        """The labels that a text names, as the model spells them."""
        spelling = {label.lower(): label for label in self.labels}
        names = [name.strip() for name in text.split(";") if name.strip()]
        if not names:
            raise ValueError(f"A prompt names no label; give one or several of: {'; '.join(self.labels)}.")
        for name in names:
            if name.lower() not in spelling:
                raise ValueError(
                    f"This model doesn't know the label {name!r}; the nearest it knows are "
                    f"{'; '.join(map(repr, self._nearest_labels(name)))}. It takes labels only, several of them with "
                    "semicolons in between; transformers-aar info MODEL lists them."
                )
        return [spelling[name.lower()] for name in names]

    def _nearest_labels(self, name: str) -> list[str]:
        """The three labels one of whose words is most like one of a name's, and among equals those most like it."""

        def likeness(label: str) -> tuple[float, float]:
            pairs = [(a, b) for a in re.findall(r"\w+", name.lower()) for b in re.findall(r"\w+", label.lower())]
            return max((_ratio(*pair) for pair in pairs), default=0.0), _ratio(name.lower(), label.lower())

        return sorted(self.labels, key=likeness, reverse=True)[:3]

    def _process_reference(self, audio, sampling_rate: int | None, return_tensors: str | None) -> BatchFeature:
        extractor = self.conditioner_feature_extractor
        if extractor is None:
            raise ValueError("Only a model that is conditioned on CLAP takes reference sounds; give `text`.")
        if sampling_rate != extractor.sampling_rate:
            raise ValueError(
                f"Reference sounds must have CLAP's {extractor.sampling_rate} Hz, got {sampling_rate}; resample them "
                f"and pass `sampling_rate={extractor.sampling_rate}`."
            )
        sounds = [sound[0] for sound in check_sounds(audio, channels=1)]
        return extractor(sounds, sampling_rate=sampling_rate, return_tensors=return_tensors)


def _ratio(first: str, second: str) -> float:
    return difflib.SequenceMatcher(None, first, second).ratio()


AarProcessor.register_for_auto_class()

__all__ = ["AarProcessor"]
