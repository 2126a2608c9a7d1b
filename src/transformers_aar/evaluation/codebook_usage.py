"""How evenly a codec uses its codebooks, which also says how well codes can be guessed without any context."""

from collections.abc import Sequence

import torch


class CodebookUsage:
    """
    Counts how often every code of every scale occurs.

    Args:
        scales (`Sequence[int]`): tokens per scale, as in the codec's configuration.
        codebook_size (`int`): entries per codebook.
        device (`str` or `torch.device`, defaults to `"cpu"`): where the counts live; that of the codes.

    Attributes:
        counts (`torch.LongTensor` of shape `(num_scales, codebook_size)`): occurrences so far. Those of several
            processes add up: `usage.counts = accelerator.reduce(usage.counts)`.
    """

    def __init__(self, scales: Sequence[int], codebook_size: int, device: str | torch.device = "cpu"):
        self.counts = torch.zeros(len(scales), codebook_size, dtype=torch.long, device=device)
        self._lengths = torch.tensor(scales, device=device)
        # where each token's scale begins in the flattened counts
        self._offsets = torch.repeat_interleave(torch.arange(len(scales), device=device), self._lengths)
        self._offsets = self._offsets * codebook_size

    def update(self, audio_codes: torch.Tensor) -> None:
        """Counts whole numbers `(..., tokens_per_window)`, the codes of any number of windows."""
        index = (audio_codes.long() + self._offsets).flatten()
        self.counts.view(-1).index_add_(0, index, torch.ones_like(index))

    @property
    def used(self) -> torch.Tensor:
        """Share of each scale's codes that occurred at all, float64 `(num_scales,)`."""
        return (self.counts > 0).double().mean(-1)

    @property
    def entropy(self) -> torch.Tensor:
        """
        Entropy −Σ p log p of each scale's codes in nats, float64 `(num_scales,)`: the cross-entropy of a model that
        knows how often each code occurs and nothing else. 0 before the first update.
        """
        shares = self.counts.double() / self.counts.sum(-1, keepdim=True).clamp(min=1)
        return torch.special.entr(shares).sum(-1)

    @property
    def perplexity(self) -> torch.Tensor:
        """exp(entropy), float64 `(num_scales,)`: how many equally frequent codes would be as hard to guess."""
        return self.entropy.exp()

    @property
    def entropy_per_token(self) -> torch.Tensor:
        """Mean of `entropy` over the tokens of a window, float64 `()`: each scale weighs as much as it has tokens."""
        return (self.entropy * self._lengths).sum() / self._lengths.sum()
