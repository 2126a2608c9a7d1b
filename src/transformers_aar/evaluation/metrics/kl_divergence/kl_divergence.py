"""KL divergence of class probabilities as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from transformers_aar.evaluation.classification import kl_divergence
from transformers_aar.evaluation.embeddings import embed_sounds

INPUTS = """
Args:
    predictions (list of lists of float): mono waveforms of any lengths at `classifier.info.sampling_rate`.
    references (list of lists of float): one real sound for each.
    classifier (`AstEmbedding`): what names the classes; see `load_embedding`.
Returns:
    kl_divergence (float), in nats, and the classifier's name and version (str).
"""


class KlDivergence(evaluate.Metric):
    def _info(self):
        waveforms = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="KL(reference ‖ prediction) of a classifier's softmax probabilities; smaller is better.",
            citation="Kreuk et al., AudioGen, arXiv 2209.15352",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": waveforms, "references": waveforms}),
        )

    def _compute(self, predictions, references, classifier):
        embeddings = [embed_sounds(classifier, map(torch.tensor, sounds)) for sounds in (predictions, references)]
        logits = [classifier.classify(torch.cat(list(batches))) for batches in embeddings]
        divergences = kl_divergence(*logits)
        return {
            "kl_divergence": float(divergences.mean()),
            "classifier": classifier.info.name,
            "classifier_version": classifier.info.version,
        }
