"""What embeddings and a classifier hear in sounds, collected for the figures of whole sets."""

from collections.abc import Sequence

import torch
from torchaudio.functional import resample

from .bootstrap import Estimate, bootstrap_interval
from .embeddings import Embedding, load_embedding
from .frechet import FrechetStatistics, frechet_interval
from .sound_classifier import SoundClassifier

Rows = dict[str, torch.Tensor]


class Listeners:
    """
    Embeddings and a classifier, each hearing sounds at its own rate.

    Args:
        embeddings (`Sequence[str]`): names, or `NAME=CHECKPOINT`; see [`load_embedding`].
        classifier (`str`, *optional*): folder of a [`SoundClassifier`].
        label_names (`Sequence[str]`): labels by which sounds are known.
        sampling_rate (`int`): of the sounds, in Hz.
        device (`torch.device`): where the networks run.

    Raises:
        ValueError: for a name twice, and for a classifier that knows none of the labels.
    """

    def __init__(
        self,
        embeddings: Sequence[str],
        classifier: str | None,
        label_names: Sequence[str],
        sampling_rate: int,
        device: torch.device,
    ):
        self.embeddings: dict[str, Embedding] = {}
        for entry in embeddings:
            name, _, checkpoint = entry.partition("=")
            if name in self.embeddings:
                raise ValueError(f"`embeddings` names {name} twice: once is enough.")
            self.embeddings[name] = load_embedding(name, checkpoint or None, device)
        self.classifier = None
        if classifier is not None:
            self.classifier = SoundClassifier.load(classifier).to(device)
        self.label_names = list(label_names)
        self.sampling_rate = sampling_rate
        if self.classifier is not None and not set(self.classifier.labels) & set(self.label_names):
            raise ValueError(f"{classifier} knows none of the sounds' labels: take a classifier of the same sounds.")

    @torch.no_grad()
    def hear(self, source: str, waveforms: torch.Tensor) -> Rows:
        """
        Rows of waveforms `(batch_size, num_samples)`: `source/NAME`, their embeddings, and `source/heard`, the label
        that the classifier hears, −1 for one that isn't among `label_names`.
        """
        rows = {
            f"{source}/{name}": embedding(resample(waveforms, self.sampling_rate, embedding.info.sampling_rate))
            for name, embedding in self.embeddings.items()
        }
        if self.classifier is not None:
            heard = resample(waveforms, self.sampling_rate, self.classifier.sampling_rate)
            places = {name: place for place, name in enumerate(self.label_names)}
            of_class = torch.tensor([places.get(name, -1) for name in self.classifier.labels])
            rows[f"{source}/heard"] = of_class[self.classifier.predict(heard).cpu()]
        return rows

    def frechet_distances(self, predictions: Rows, source: str, references: Rows, reference: str) -> dict:
        """Fréchet distance of each embedding from one source's rows to another's, by `frechet_distance/NAME`."""
        distances, clips = {}, predictions["clip"]
        for name, embedding in self.embeddings.items():
            statistics = FrechetStatistics(embedding.info)
            statistics.update(references[f"{reference}/{name}"])
            distances[f"frechet_distance/{name}"] = frechet_interval(
                predictions[f"{source}/{name}"], statistics, clips
            )
        return distances

    def named_rightly(self, rows: Rows, source: str) -> dict[str, Estimate]:
        """
        `named_rightly/SOURCE`, the share of the sounds with just one label (`rows["label"]`, else −1) of which the
        classifier hears it. Nothing without a classifier, and where such sounds are of fewer than two clips.
        """
        is_single = rows["label"] >= 0
        clips = rows["clip"][is_single]
        if self.classifier is None or len(clips.unique()) < 2:
            return {}
        right = rows[f"{source}/heard"] == rows["label"]
        return {f"named_rightly/{source}": bootstrap_interval(right[is_single].double(), clips=clips)}

    def shares_named_rightly(self, rows: Rows, source: str) -> dict[str, float]:
        """The same for the sounds of each label that occurs, by its name."""
        right = rows[f"{source}/heard"] == rows["label"]
        labels = [label for label in rows["label"].unique().tolist() if label >= 0]
        return {self.label_names[label]: right[rows["label"] == label].double().mean().item() for label in labels}
