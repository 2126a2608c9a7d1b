"""Inception score as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from transformers_aar.evaluation.classification import inception_score
from transformers_aar.evaluation.embeddings import embed_sounds

INPUTS = """
Args:
    predictions (list of lists of float): mono waveforms of any lengths at `classifier.info.sampling_rate`.
    classifier (`AstEmbedding`): what names the classes; see `load_embedding`.
    num_splits (int, defaults to 10): parts that the sounds are dealt to at random.
Returns:
    inception_score (float), the mean of the parts; inception_score_std (float), their standard deviation; and the
    classifier's name and version (str).
"""


class InceptionScore(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="How sure a classifier is of each sound, and how varied the sounds are; larger is better.",
            citation="Salimans et al., Improved Techniques for Training GANs, arXiv 1606.03498",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions, classifier, num_splits=10):
        embeddings = torch.cat(list(embed_sounds(classifier, map(torch.tensor, predictions))))
        scores = inception_score(classifier.classify(embeddings), num_splits)
        return {
            "inception_score": float(scores.mean()),
            "inception_score_std": float(scores.std(correction=0)),
            "classifier": classifier.info.name,
            "classifier_version": classifier.info.version,
        }
