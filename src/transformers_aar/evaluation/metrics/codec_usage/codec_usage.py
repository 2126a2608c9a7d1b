"""What a codec's codes cost and how evenly they are used, as a module of the `evaluate` library."""

import datasets
import evaluate
import torch

from transformers_aar.evaluation.codebook_usage import CodebookUsage
from transformers_aar.evaluation.reconstruction import tokens_per_second

INPUTS = """
Args:
    predictions (list of lists of int): the codes of any number of windows, `config.tokens_per_window` each.
    config (`SatConfig`): the codec's.
Returns:
    used and perplexity (lists of float), one number per scale; tokens_per_second and bandwidth_kbps (float).
"""


class CodecUsage(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Share of the codes in use and perplexity of each scale, and the codes' rate.",
            citation="",
            inputs_description=INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("int64"))}),
        )

    def _compute(self, predictions, config):
        usage = CodebookUsage(config.scales, config.codebook_size)
        usage.update(torch.tensor(predictions))
        return {
            "used": usage.used.tolist(),
            "perplexity": usage.perplexity.tolist(),
            "tokens_per_second": tokens_per_second(config),
            "bandwidth_kbps": config.bandwidth,
        }
