"""CLAP score as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from transformers_aar.evaluation.classification import clap_score
from transformers_aar.evaluation.embeddings import embed_sounds

INPUTS = """
Args:
    predictions (list of lists of float): mono waveforms of any lengths at `embedding.info.sampling_rate`.
    references (list of str): the text that each was generated from.
    embedding (`ClapEmbedding`): CLAP; see `load_embedding`.
Returns:
    clap_score (float), −1 to 1, and the embedding's name and version (str).
"""


class ClapScore(evaluate.Metric):
    def _info(self):
        sounds, texts = datasets.Sequence(datasets.Value("float32")), datasets.Value("string")
        return evaluate.MetricInfo(
            description="Cosine similarity of CLAP's embeddings of sounds and their texts; larger is better.",
            citation="Wu et al., Large-scale Contrastive Language-Audio Pretraining, arXiv 2211.06687",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": sounds, "references": texts}),
        )

    def _compute(self, predictions, references, embedding):
        sounds = torch.cat(list(embed_sounds(embedding, map(torch.tensor, predictions))))
        return {
            "clap_score": float(clap_score(sounds, embedding.embed_texts(references)).mean()),
            "embedding": embedding.info.name,
            "embedding_version": embedding.info.version,
        }
