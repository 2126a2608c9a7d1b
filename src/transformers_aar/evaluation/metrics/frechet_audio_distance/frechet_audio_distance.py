"""Fréchet audio distance as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from transformers_aar.evaluation.embeddings import embed_sounds
from transformers_aar.evaluation.frechet import FrechetStatistics, frechet_distance

INPUTS = """
Args:
    predictions (list of lists of float): mono waveforms of any lengths at `embedding.info.sampling_rate`.
    statistics (`FrechetStatistics`): of the reference sounds, made with the same embedding.
    embedding (`Embedding`): what turns sounds into vectors; see `load_embedding`.
Returns:
    frechet_audio_distance (float), num_sounds (int), and the embedding's name and version (str).
"""


class FrechetAudioDistance(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Distance of two sets of sounds as Gaussians of their embeddings; smaller is better.",
            citation="Kilgour et al., Fréchet Audio Distance, arXiv 1812.08466",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions, statistics, embedding):
        generated = FrechetStatistics(embedding.info)
        for embeddings in embed_sounds(embedding, map(torch.tensor, predictions)):
            generated.update(embeddings)
        return {
            "frechet_audio_distance": frechet_distance(generated, statistics),
            "num_sounds": generated.count,
            "embedding": embedding.info.name,
            "embedding_version": embedding.info.version,
        }
