"""A classifier with nothing to tune, for a first check of which kind of sound a sound is."""

import torch
from torchaudio.transforms import MelSpectrogram


class NearestCentroid:
    """
    Names the kind whose mean statistics lie nearest to a sound's: mean and standard deviation over time of 40 log-mel
    bands, each divided by its spread over the training sounds.

    Args:
        sounds (`torch.FloatTensor` of shape `(num_sounds, num_samples)`): training sounds.
        kinds (`torch.LongTensor` of shape `(num_sounds,)`): their kinds, 0 to the number of kinds less one.
        sampling_rate (`int`): of the sounds, in Hz.
    """

    def __init__(self, sounds: torch.Tensor, kinds: torch.LongTensor, sampling_rate: int):
        self.mel = MelSpectrogram(sampling_rate, n_fft=1024, hop_length=256, n_mels=40)
        statistics = self._statistics(sounds)
        self.scale = statistics.std(dim=0)
        statistics = statistics / self.scale
        self.centroids = torch.stack([statistics[kinds == kind].mean(0) for kind in range(int(kinds.max()) + 1)])

    def __call__(self, sounds: torch.Tensor) -> torch.LongTensor:
        """Kinds `(num_sounds,)` of sounds `(num_sounds, num_samples)`."""
        return torch.cdist(self._statistics(sounds) / self.scale, self.centroids).argmin(-1)

    def _statistics(self, sounds: torch.Tensor) -> torch.Tensor:
        log_mel = self.mel(sounds).clamp_min(1e-5).log()
        return torch.cat([log_mel.mean(-1), log_mel.std(-1)], dim=-1)
