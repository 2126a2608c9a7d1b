"""Distances of reconstructions from recordings as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from transformers_aar.evaluation.reconstruction import mel_distance, multi_resolution_stft_distance, si_sdr

INPUTS = """
Args:
    predictions (list of lists of float): reconstructed mono waveforms.
    references (list of lists of float): the recording of each, of the same length.
    sampling_rate (int): of all, in Hz.
Returns:
    mel_distance, multi_resolution_stft_distance (smaller is better) and si_sdr (dB, larger is better), each a float,
    the mean of the sounds.
"""


class ReconstructionDistance(evaluate.Metric):
    def _info(self):
        waveforms = datasets.Sequence(datasets.Value("float32"))
        return evaluate.MetricInfo(
            description="Mel distance, multi-resolution STFT distance and SI-SDR of reconstructed sounds.",
            citation="Yamamoto et al., arXiv 1910.11480; Le Roux et al., arXiv 1811.02508",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": waveforms, "references": waveforms}),
        )

    def _compute(self, predictions, references, sampling_rate):
        pairs = [(torch.tensor([fake]), torch.tensor([real])) for fake, real in zip(predictions, references)]
        figures = {
            "mel_distance": [mel_distance(*pair, sampling_rate) for pair in pairs],
            "multi_resolution_stft_distance": [multi_resolution_stft_distance(*pair) for pair in pairs],
            "si_sdr": [si_sdr(*pair) for pair in pairs],
        }
        return {name: float(torch.cat(values).mean()) for name, values in figures.items()}
