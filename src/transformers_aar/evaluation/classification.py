"""
Figures from what a classifier or CLAP hears in sounds.

Class probabilities are the softmax over all classes, though AudioSet's sounds have several: so does AudioGen
(arXiv 2209.15352), which defines the divergence with the PaSST classifier, AudioCraft's `kld` and the
`kullback_leibler_divergence_softmax` and inception score of audioldm_eval (PANNs). Figures of different classifiers
don't compare.
"""

import math

import torch
import torch.nn.functional as F


def kl_divergence(predictions: torch.Tensor, references: torch.Tensor) -> torch.Tensor:
    """
    KL(reference ‖ prediction) = Σ p log(p / q) of the class probabilities of each pair of sounds, in nats; 0 where
    they agree. It is exact, where AudioCraft and audioldm_eval add 1e-6 to q.

    Args:
        predictions (`torch.FloatTensor` of shape `(num_sounds, num_classes)`): logits of the generated sounds.
        references (`torch.FloatTensor` of the same shape): logits of the real sounds, one for each.

    Returns:
        `torch.DoubleTensor` of shape `(num_sounds,)`; the figure is their mean.

    Raises:
        ValueError: for different shapes.
    """
    _check_pairs(predictions, references)
    predictions, references = predictions.double().log_softmax(-1), references.double().log_softmax(-1)
    return F.kl_div(predictions, references, reduction="none", log_target=True).sum(-1)


def inception_score(predictions: torch.Tensor, num_splits: int = 10, seed: int = 0) -> torch.Tensor:
    """
    exp(mean KL(p(class | sound) ‖ p(class))) of parts of the sounds (Salimans et al. 2016, arXiv 1606.03498): from 1,
    where all sounds have the same classes, to the number of classes, where each has one and all occur equally often.

    Args:
        predictions (`torch.FloatTensor` of shape `(num_sounds, num_classes)`): logits.
        num_splits (`int`, defaults to 10): parts that the sounds are dealt to at random.
        seed (`int`, defaults to 0): of that.

    Returns:
        `torch.DoubleTensor` of shape `(num_splits,)`, the scores of the parts; their mean and standard deviation are
        the figures. They grow with the sounds per part.

    Raises:
        ValueError: for fewer sounds than parts.
    """
    if len(predictions) < num_splits:
        raise ValueError(f"An inception score of {num_splits} parts takes as many sounds, got {len(predictions)}.")
    order = torch.randperm(len(predictions), generator=torch.Generator().manual_seed(seed))
    log_probabilities = predictions.double().log_softmax(-1)[order.to(predictions.device)]
    scores = []
    for part in log_probabilities.tensor_split(num_splits):
        marginal = part.logsumexp(0) - math.log(len(part))
        scores.append((part.exp() * (part - marginal)).sum(-1).mean().exp())
    return torch.stack(scores)


def clap_score(audio_embeddings: torch.Tensor, text_embeddings: torch.Tensor) -> torch.Tensor:
    """
    Cosine of the angle between each sound's and its text's embedding, −1 to 1.

    Args:
        audio_embeddings (`torch.FloatTensor` of shape `(num_sounds, width)`): see [`ClapEmbedding`].
        text_embeddings (`torch.FloatTensor` of the same shape): `ClapEmbedding.embed_texts` of the prompts.

    Returns:
        `torch.DoubleTensor` of shape `(num_sounds,)`; the figure is their mean.

    Raises:
        ValueError: for different shapes.
    """
    _check_pairs(audio_embeddings, text_embeddings)
    return F.cosine_similarity(audio_embeddings.double(), text_embeddings.double(), dim=-1)


def _check_pairs(first: torch.Tensor, second: torch.Tensor) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise ValueError(
            f"Give one row for each sound and as many on both sides, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}."
        )
