"""Networks and statistics that turn a sound into a vector, for distances between sets of sounds."""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Protocol

import torch
from torch import nn
from torchaudio.transforms import MelSpectrogram
from transformers import (
    ASTFeatureExtractor,
    ASTForAudioClassification,
    ClapModel,
    ClapProcessor,
    FeatureExtractionMixin,
    PreTrainedModel,
)

from .sound_classifier import HOP_LENGTH, SoundClassifier

# Of a shorter sound there is too little to say: the spectrograms below would have next to no frames.
MIN_SECONDS = 0.1
CHECKPOINTS = {"clap": "laion/larger_clap_general", "ast": "MIT/ast-finetuned-audioset-10-10-0.4593"}


@dataclass(frozen=True)
class EmbeddingInfo:
    """
    What makes an embedding: numbers of two sets of sounds compare only where all of it is the same.

    Args:
        name (`str`): `"clap"`, `"ast"`, `"log_mel"` or `"classifier"`.
        version (`str`): the definition's number, or the digest of a network's weights and of its feature extractor.
        width (`int`): numbers per sound.
        sampling_rate (`int`): of the sounds, in Hz.
    """

    name: str
    version: str
    width: int
    sampling_rate: int

    def __str__(self) -> str:
        return f"{self.name} {self.version} ({self.width} wide, {self.sampling_rate} Hz)"


class Embedding(Protocol):
    """
    Turns waveforms `(batch_size, num_samples)` at `info.sampling_rate` into a `torch.FloatTensor` of shape
    `(batch_size, info.width)`. A batch gives what its sounds give one by one. Raises a `ValueError` for sounds that
    last less than `MIN_SECONDS`.
    """

    info: EmbeddingInfo

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor: ...


class LogMelEmbedding:
    """
    Mean and standard deviation over time of 64 log-mel bands, 128 numbers that need no network.

    Version 1: 24 kHz, Hann windows of 1024 samples every 256 without padding, power, triangular bands on the HTK mel
    scale from 0 Hz to 12 kHz, natural logarithm of at least 1e-5; all means, then all (biased) standard deviations.
    """

    info = EmbeddingInfo("log_mel", "1", width=128, sampling_rate=24_000)

    def __init__(self):
        self._spectrogram = MelSpectrogram(
            self.info.sampling_rate, n_fft=1024, hop_length=256, n_mels=self.info.width // 2, center=False
        )

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        _check_waveforms(waveforms, self.info)
        log_mel = self._spectrogram.to(waveforms.device)(waveforms.float()).clamp_min(1e-5).log()
        return torch.cat([log_mel.mean(-1), log_mel.std(-1, correction=0)], dim=-1)


class ClapEmbedding:
    """
    CLAP's (arXiv 2211.06687) unit vectors of sounds, and those of texts in the same space. Of a sound that is longer
    than CLAP's ten seconds the first ten count, where the library would choose a part at random.

    Args:
        model ([`ClapModel`]): such as `laion/larger_clap_general`; it is put into evaluation mode.
        processor ([`ClapProcessor`]): the model's.
    """

    def __init__(self, model: ClapModel, processor: ClapProcessor):
        self.model = model.eval()
        self.processor = processor
        extractor = processor.feature_extractor
        version = _fingerprint(model, extractor.to_json_string())
        self.info = EmbeddingInfo("clap", version, model.config.projection_dim, extractor.sampling_rate)

    @torch.no_grad()
    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        _check_waveforms(waveforms, self.info)
        extractor = self.processor.feature_extractor
        features = _extract_features(extractor, waveforms[:, : extractor.nb_max_samples], "input_features", self.model)
        # a fusing CLAP must be told; the extractor would count one sound at random as long
        is_longer = torch.zeros(len(waveforms), 1, dtype=torch.bool, device=self.model.device)
        return self.model.get_audio_features(features, is_longer=is_longer).pooler_output.float()

    @torch.no_grad()
    def embed_texts(self, texts: Sequence[str]) -> torch.Tensor:
        """Vectors of texts, `torch.FloatTensor` of shape `(len(texts), info.width)`."""
        inputs = self.processor.tokenizer(list(texts), padding=True, truncation=True, return_tensors="pt")
        inputs = {name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")}
        return self.model.get_text_features(**inputs).pooler_output.float()


class AstEmbedding:
    """
    What the Audio Spectrogram Transformer (arXiv 2104.01778) hands to its classifier: the mean of its two first tokens
    after the last layer. Of a sound that is longer than its spectrogram, 10.24 s, the beginning counts.

    Args:
        model ([`ASTForAudioClassification`]): such as `MIT/ast-finetuned-audioset-10-10-0.4593`; it is put into
            evaluation mode.
        feature_extractor ([`ASTFeatureExtractor`]): the model's.
    """

    def __init__(self, model: ASTForAudioClassification, feature_extractor: ASTFeatureExtractor):
        self.model = model.eval()
        self.feature_extractor = feature_extractor
        version = _fingerprint(model, feature_extractor.to_json_string())
        self.info = EmbeddingInfo("ast", version, model.config.hidden_size, feature_extractor.sampling_rate)

    @torch.no_grad()
    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        _check_waveforms(waveforms, self.info)
        features = _extract_features(self.feature_extractor, waveforms, "input_values", self.model)
        return self.model.audio_spectrogram_transformer(features).pooler_output.float()

    @torch.no_grad()
    def classify(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Logits `(batch_size, num_labels)` of AudioSet's classes, of sounds with embeddings `(batch_size, width)`."""
        return self.model.classifier(embeddings.to(self.model.device, self.model.dtype)).float()


class ClassifierEmbedding:
    """
    What a classifier of this package's own decides by. It knows the sounds that it was trained on and no others, but
    takes neither a download nor minutes.

    Args:
        classifier ([`SoundClassifier`]): it is put into evaluation mode.
    """

    def __init__(self, classifier: SoundClassifier):
        self.classifier = classifier.eval()
        version = _fingerprint(classifier, f"hop length {HOP_LENGTH}")
        self.info = EmbeddingInfo("classifier", version, classifier.num_features, classifier.sampling_rate)

    def __call__(self, waveforms: torch.Tensor) -> torch.Tensor:
        _check_waveforms(waveforms, self.info)
        return self.classifier.features(waveforms.float())


def load_embedding(name: str, checkpoint: str | None = None, device: str | torch.device = "cpu") -> Embedding:
    """
    Args:
        name (`str`): `"clap"`, `"ast"`, `"log_mel"` or `"classifier"`.
        checkpoint (`str`, *optional*): the network's folder or repository, by default that in `CHECKPOINTS`. Of
            `"classifier"` it is a folder that `train_classifier.py` wrote, and must be given.
        device (`str` or `torch.device`, defaults to `"cpu"`): where the network runs.

    Raises:
        ValueError: for another name, a checkpoint of `"log_mel"`, which has none, and `"classifier"` without one.
        OSError: when the checkpoint is neither there nor to be had.
    """
    if name == "log_mel" and checkpoint is None:
        return LogMelEmbedding()
    if name == "classifier" and checkpoint is not None:
        return ClassifierEmbedding(SoundClassifier.load(checkpoint).to(device))
    if name not in CHECKPOINTS:
        raise ValueError(
            f"There is no embedding {name!r} with checkpoint {checkpoint!r}: take clap, ast or log_mel, or "
            "classifier=FOLDER."
        )
    checkpoint = checkpoint or CHECKPOINTS[name]
    if name == "clap":
        return ClapEmbedding(
            ClapModel.from_pretrained(checkpoint).to(device), ClapProcessor.from_pretrained(checkpoint)
        )
    model = ASTForAudioClassification.from_pretrained(checkpoint).to(device)
    return AstEmbedding(model, ASTFeatureExtractor.from_pretrained(checkpoint))


def embed_sounds(
    embedding: Embedding, waveforms: Iterable[torch.Tensor], batch_size: int = 32
) -> Iterator[torch.Tensor]:
    """
    Embeds any number of sounds, in batches of those that follow one another with equal lengths.

    Args:
        embedding ([`Embedding`]): what turns sounds into vectors.
        waveforms (`Iterable[torch.Tensor]`): sounds `(num_samples,)` at the embedding's rate.
        batch_size (`int`, defaults to 32): sounds per batch at most.

    Yields:
        `torch.FloatTensor` of shape `(batch_size, width)`, in the order of the sounds.
    """
    for _, group in groupby(waveforms, key=len):
        while batch := list(islice(group, batch_size)):
            yield embedding(torch.stack(batch))


def _check_waveforms(waveforms: torch.Tensor, info: EmbeddingInfo) -> None:
    if waveforms.ndim != 2 or waveforms.shape[1] < MIN_SECONDS * info.sampling_rate:
        raise ValueError(
            f"{info.name} takes waveforms of shape (batch_size, num_samples) that last at least {MIN_SECONDS} s at "
            f"{info.sampling_rate} Hz, got {tuple(waveforms.shape)}."
        )


def _extract_features(
    extractor: FeatureExtractionMixin, waveforms: torch.Tensor, name: str, model: PreTrainedModel
) -> torch.Tensor:
    sounds = list(waveforms.float().cpu().numpy())
    features = extractor(sounds, sampling_rate=extractor.sampling_rate, return_tensors="pt")[name]
    return features.to(model.device, model.dtype)


def _fingerprint(model: nn.Module, settings: str) -> str:
    """First 12 hexadecimal digits of the SHA-256 of a network's weights and of what else makes its features."""
    digest = hashlib.sha256(settings.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:12]
