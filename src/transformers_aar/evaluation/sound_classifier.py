"""An independent classifier of sounds, which names what a codec or a generator has made."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn
from torchaudio.transforms import MelSpectrogram
from transformers import ResNetConfig, ResNetForImageClassification
from transformers.utils import logging

SAMPLING_RATE = 24_000
NUM_BANDS = 64
HOP_LENGTH = 256
# In the package: of the sounds that it synthesises, trained on them as train_classifier.py's options say by default.
BUNDLED_CLASSIFIER = Path(__file__).parent / "pretrained_classifier"


class SoundClassifier(nn.Module):
    """
    The library's residual network (He et al. 2015) on log-mel spectrograms, as one looks at pictures. It hears no
    levels: every spectrogram has mean 0 and variance 1.

    In training mode spectrograms get what recordings and codecs add: another timbre, a noise floor, no treble.

    Args:
        network ([`ResNetForImageClassification`]): with one channel; its labels are the classifier's.
    """

    sampling_rate = SAMPLING_RATE

    def __init__(self, network: ResNetForImageClassification):
        super().__init__()
        self.network = network
        self.spectrogram = MelSpectrogram(
            SAMPLING_RATE, n_fft=1024, hop_length=HOP_LENGTH, n_mels=NUM_BANDS, center=False
        )

    @classmethod
    def new(cls, labels: Sequence[str]) -> "SoundClassifier":
        """An untrained one, 1.2 million parameters large."""
        config = ResNetConfig(
            num_channels=1,
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 256],
            depths=[1, 1, 1, 1],
            layer_type="basic",
            id2label=dict(enumerate(labels)),
            label2id={label: index for index, label in enumerate(labels)},
        )
        return cls(ResNetForImageClassification(config))

    @classmethod
    def load(cls, folder: str | Path) -> "SoundClassifier":
        """
        Args:
            folder (`str` or `Path`): where one was saved, or `"bundled"` for the one in the package.

        Raises:
            ValueError: for a folder that holds no classifier of sounds.
        """
        folder = BUNDLED_CLASSIFIER if folder == "bundled" else folder
        verbosity = logging.get_verbosity()
        logging.set_verbosity_error()
        try:
            network = ResNetForImageClassification.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise ValueError(f"{folder} holds no classifier of sounds: name one of train_classifier.py's.") from error
        finally:
            logging.set_verbosity(verbosity)
        if network.config.num_channels != 1:
            raise ValueError(f"{folder} holds a classifier of pictures: name one of train_classifier.py's.")
        return cls(network).eval()

    def save(self, folder: str | Path) -> None:
        self.network.save_pretrained(folder)

    @property
    def labels(self) -> list[str]:
        names = self.network.config.id2label
        return [names[index] for index in range(len(names))]

    def forward(self, waveforms: torch.Tensor, labels: torch.LongTensor | None = None) -> dict[str, torch.Tensor]:
        """
        Args:
            waveforms (`torch.FloatTensor` of shape `(batch_size, num_samples)`): at 24 kHz, half a second or more.
            labels (`torch.LongTensor` of shape `(batch_size,)`, *optional*): the right ones.

        Returns:
            `logits` of shape `(batch_size, num_labels)`, and with labels the cross-entropy as `loss`.
        """
        output = self.network(self._pictures(waveforms), labels=labels)
        return {name: output[name] for name in ("loss", "logits") if output.get(name) is not None}

    @torch.no_grad()
    def features(self, waveforms: torch.Tensor) -> torch.Tensor:
        """
        What the last layer decides by, `torch.FloatTensor` of shape `(batch_size, num_features)`, of waveforms
        `(batch_size, num_samples)` at 24 kHz.
        """
        return self.network.resnet(self._pictures(waveforms)).pooler_output.flatten(1)

    @property
    def num_features(self) -> int:
        return self.network.config.hidden_sizes[-1]

    @torch.no_grad()
    def predict(self, waveforms: torch.Tensor) -> torch.LongTensor:
        """The likeliest label `(batch_size,)` of waveforms `(batch_size, num_samples)` at 24 kHz."""
        return self(waveforms)["logits"].argmax(-1)

    def _pictures(self, waveforms: torch.Tensor) -> torch.Tensor:
        """Log-mel spectrograms `(batch_size, 1, bands, frames)` of mean 0 and variance 1."""
        power = self.spectrogram(waveforms)
        power = power / power.mean((1, 2), keepdim=True).clamp_min(1e-12)
        if self.training:
            power = distort(power)
        pictures = power.clamp_min(1e-6).log()
        std, mean = torch.std_mean(pictures, (1, 2), keepdim=True)
        return ((pictures - mean) / (std + 1e-3))[:, None]


def distort(power: torch.Tensor) -> torch.Tensor:
    """
    Mel spectrograms `(batch_size, bands, frames)` of mean power 1, each with a random tilt of up to 6 dB to the edges,
    every other one duller by up to 30 dB from a random band on, over a white noise floor 15 to 60 dB down.
    """

    def draw(*shape: int) -> torch.Tensor:
        return torch.rand(len(power), *shape, device=power.device)

    bands = torch.linspace(-1, 1, power.shape[1], device=power.device)[:, None]
    decibels = (12 * draw(1, 1) - 6) * bands
    is_dull = (bands > draw(1, 1)) & (draw(1, 1) < 0.5)
    decibels = decibels - 30 * draw(1, 1) * is_dull
    noise = 10 ** (-(1.5 + 4.5 * draw(1, 1))) * -torch.log(draw(*power.shape[1:]).clamp_min(1e-9))
    return power * 10 ** (decibels / 10) + noise
