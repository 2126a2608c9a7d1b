"""The quantizer of SAT: codes in scales, coarse to fine, and the training of their codebooks (arXiv 2408.09027)."""

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.utils import ModelOutput

from .configuration_sat import SatConfig
from .layers_sat import AtLeastFp32, ChannelsLastConv1d


@dataclass
class SatQuantizerOutput(ModelOutput):
    """
    Args:
        audio_codes (`torch.LongTensor` of shape `(batch_size, tokens_per_window)`):
            Codes of all scales, coarse first.
        quantized (`torch.FloatTensor` of shape `(batch_size, hidden_size, num_frames)`):
            Sum of the scales' contributions, projected to the decoder's width; gradients pass straight through.
        commitment_losses (`torch.FloatTensor` of shape `(num_scales,)`):
            Commitment loss of each scale.
    """

    audio_codes: torch.LongTensor | None = None
    quantized: torch.FloatTensor | None = None
    commitment_losses: torch.FloatTensor | None = None


@dataclass
class _ScaleStep:
    """What the residual quantization of one scale yields; see `SatQuantizer._quantize`."""

    codes: torch.LongTensor
    pooled: torch.Tensor
    residual: torch.Tensor
    contribution: torch.Tensor


def nearest_phi(num_scales: int, num_phi: int) -> list[int]:
    """
    Index of the convolution φ that each scale uses: the one whose tick lies nearest to s/(S − 1) ("partially shared").

    Args:
        num_scales (`int`): S. num_phi (`int`): K, at least 1.

    Returns:
        `list[int]` of length S. Exact ties are decided by float64 rounding; published checkpoints depend on it.
    """
    # the reference spaces its ticks differently for K = 4
    margin = 1 / (3 * num_phi) if num_phi == 4 else 1 / (2 * num_phi)
    ticks = torch.linspace(margin, 1 - margin, num_phi, dtype=torch.float64, device="cpu").tolist()
    positions = [scale / max(num_scales - 1, 1) for scale in range(num_scales)]
    return [min(range(num_phi), key=lambda index: abs(ticks[index] - position)) for position in positions]  # noqa: B023


def in_full_precision(method):
    """Runs a quantizer's method without autocast: nearest codes and running sums don't survive half precision."""

    @functools.wraps(method)
    def wrapper(self, *args, **kwargs):
        with torch.autocast(self.codebook.device.type, enabled=False):
            return method(self, *args, **kwargs)

    return wrapper


class SatQuantizer(AtLeastFp32, nn.Module):
    """
    MSRQ, multi-scale residual quantization (paper, section 3.1). Scale s pools the residual r to n_s vectors, replaces
    each by the nearest of its own codebook, interpolates them back to H frames and subtracts h = φ_s(…) from r. All of
    it runs in fp32 or wider, whatever the dtype of the model around it.

    In training mode every forward also moves the codebooks: k-means on the first batch, then exponential moving
    averages of the pooled vectors, and a restart of codes that hardly any vector chooses. Sums are taken over all
    processes, and random choices are drawn alike on each, so that codebooks never drift apart.
    """

    def __init__(self, config: SatConfig):
        super().__init__()
        self.scales = list(config.scales)
        self.codebook_size = config.codebook_size
        self.codebook_decay = config.codebook_decay
        self.dead_code_threshold = config.dead_code_threshold
        self.kmeans_iterations = config.kmeans_iterations
        num_scales, dim = config.num_scales, config.codebook_dim

        has_projections = config.hidden_size != dim
        self.project_in = nn.Linear(config.hidden_size, dim) if has_projections else nn.Identity()
        self.project_out = nn.Linear(dim, config.hidden_size) if has_projections else nn.Identity()
        self.phi = nn.ModuleList(
            ChannelsLastConv1d(dim, dim, size, padding=size // 2) for size in config.phi_kernel_sizes
        )
        self.phi_of_scale = nearest_phi(num_scales, len(self.phi)) if len(self.phi) else []
        for index, phi in enumerate(self.phi):
            # with few scales some are no scale's; processes that train together would wait for their gradients
            phi.requires_grad_(index in self.phi_of_scale)

        self.register_buffer("codebook", torch.empty(num_scales, config.codebook_size, dim))
        self.register_buffer("codebook_sum", torch.empty(num_scales, config.codebook_size, dim))
        self.register_buffer("cluster_size", torch.empty(num_scales, config.codebook_size))
        self.register_buffer("initialized", torch.tensor(False))
        self.register_buffer("num_updates", torch.tensor(0))
        self._initialized_when_read: tuple[tuple | None, bool] = (None, False)

        # (pooled vectors of every scale, codes of every scale) of each forward since the last codebook update
        self._pending: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
        self._defer_update = False

    # --- from vectors to codes and back ------------------------------------------------------------------------------

    def _nearest(self, vectors: torch.Tensor, scale: int) -> torch.LongTensor:
        """Codes `(batch_size, n_s)` of vectors `(batch_size, n_s, codebook_dim)`: argmin_k ‖u − e_k‖²."""
        codebook = self.codebook[scale]
        # ‖u‖² is the same for all entries
        similarity = torch.addmm(codebook.square().sum(-1) / -2, vectors.flatten(0, 1), codebook.T)
        return similarity.argmax(-1).view(vectors.shape[:-1])

    @staticmethod
    def _pool(hidden: torch.Tensor, length: int) -> torch.Tensor:
        """Area interpolation of `(batch_size, codebook_dim, num_frames)` to `(batch_size, length, codebook_dim)`."""
        if hidden.shape[-1] != length:
            hidden = F.interpolate(hidden, size=length, mode="area")
        return hidden.transpose(1, 2)

    def _contribution(self, vectors: torch.Tensor, scale: int, num_frames: int) -> torch.Tensor:
        """h = φ_s(v), `(batch_size, codebook_dim, num_frames)`, of code vectors `(batch_size, n_s, codebook_dim)`."""
        hidden = vectors.transpose(1, 2)
        if hidden.shape[-1] != num_frames:
            hidden = F.interpolate(hidden, size=num_frames, mode="linear", align_corners=False)
        if not self.phi_of_scale:
            return hidden
        return 0.5 * hidden + 0.5 * self.phi[self.phi_of_scale[scale]](hidden)

    def _quantize(self, latents: torch.Tensor, num_scales: int, start_codebooks: bool = False) -> Iterator[_ScaleStep]:
        """Residual quantization of `(batch_size, codebook_dim, num_frames)`, scale by scale (paper, section 3.1)."""
        residual = latents
        for scale, length in enumerate(self.scales[:num_scales]):
            pooled = self._pool(residual, length)
            if start_codebooks:
                self._start_codebook(scale, pooled.flatten(0, 1))
            codes = self._nearest(pooled.detach(), scale)
            contribution = self._contribution(self.codebook[scale][codes], scale, latents.shape[-1])
            yield _ScaleStep(codes, pooled, residual, contribution)
            residual = residual - contribution.detach()

    def _project_in(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.project_in(hidden.to(self.codebook.dtype).transpose(1, 2)).transpose(1, 2)

    @in_full_precision
    def project_f_hat(self, f_hat: torch.Tensor) -> torch.Tensor:
        """The decoder's input `(batch_size, hidden_size, num_frames)` of a running sum."""
        return self.project_out(f_hat.transpose(1, 2)).transpose(1, 2)

    @in_full_precision
    def encode(self, hidden: torch.Tensor, max_scales: int | None = None) -> torch.LongTensor:
        """
        Codes of the encoder's output.

        Args:
            hidden (`torch.Tensor` of shape `(batch_size, hidden_size, num_frames)`).
            max_scales (`int`, *optional*): stop after this many scales.

        Returns:
            `torch.LongTensor` of shape `(batch_size, tokens)`, coarse scales first.
        """
        steps = self._quantize(self._project_in(hidden), max_scales or len(self.scales))
        return torch.cat([step.codes for step in steps], dim=-1)

    @in_full_precision
    def decode(self, codes: torch.LongTensor) -> torch.Tensor:
        """
        The decoder's input from codes `(batch_size, tokens)` of all or of the first scales.

        Returns:
            `torch.Tensor` of shape `(batch_size, hidden_size, num_frames)`.
        """
        f_hat = self.empty_f_hat(codes.shape[0])
        for scale, scale_codes in enumerate(self.split(codes)):
            f_hat = f_hat + self._contribution(self.codebook[scale][scale_codes], scale, self.scales[-1])
        return self.project_f_hat(f_hat)

    @in_full_precision
    def forward(self, hidden: torch.Tensor) -> SatQuantizerOutput:
        """
        Quantizes `(batch_size, hidden_size, num_frames)` with gradients, and in training mode moves the codebooks.

        The commitment loss of a scale is mse(sg(h), r) + mse(h, sg(r)): the first term trains the encoder, the second
        φ. The output passes its gradient straight through to the encoder, once.
        """
        latents = self._project_in(hidden)
        if self.training and not self._has_codebooks():
            self.start_codebooks(hidden)
        f_hat, codes, pooled, losses = 0.0, [], [], []
        for step in self._quantize(latents, len(self.scales)):
            f_hat = f_hat + step.contribution.detach()
            codes.append(step.codes)
            pooled.append(step.pooled.detach())
            losses.append(
                F.mse_loss(step.contribution.detach(), step.residual)
                + F.mse_loss(step.contribution, step.residual.detach())
            )
        straight_through = latents + (f_hat - latents).detach()
        output = SatQuantizerOutput(
            audio_codes=torch.cat(codes, dim=-1),
            quantized=self.project_f_hat(straight_through),
            commitment_losses=torch.stack(losses),
        )
        if self.training:
            self._pending.append((pooled, codes))
            if not self._defer_update:
                self._update_codebooks()
        return output

    # --- scale by scale, for a generator -----------------------------------------------------------------------------

    def split(self, codes: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Splits the last axis, which holds all or the first few whole scales, into one tensor per scale."""
        num_scales = len(self._whole_scales(codes.shape[-1]))
        return codes.split(self.scales[:num_scales], dim=-1)

    def _whole_scales(self, num_tokens: int) -> list[int]:
        """The scales that `num_tokens` tokens fill; a `ValueError` when the last one isn't complete."""
        for count in range(1, len(self.scales) + 1):
            if sum(self.scales[:count]) == num_tokens:
                return self.scales[:count]
        lengths = [sum(self.scales[: count + 1]) for count in range(len(self.scales))]
        raise ValueError(
            f"A window of {num_tokens} codes is not a number of whole scales; give one of {lengths} codes per window."
        )

    def empty_f_hat(self, batch_size: int) -> torch.Tensor:
        """Zeros `(batch_size, codebook_dim, num_frames)`: the running sum before the first scale."""
        return self.codebook.new_zeros(batch_size, self.codebook.shape[-1], self.scales[-1])

    @in_full_precision
    def accumulate(
        self, f_hat: torch.Tensor, tokens: torch.Tensor, scale: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Adds one scale to the running sum.

        Args:
            f_hat (`torch.FloatTensor` of shape `(batch_size, codebook_dim, num_frames)`): sum of the scales before.
            tokens (`torch.LongTensor` of shape `(batch_size, n_s)`, or `torch.FloatTensor` of shape
                `(batch_size, n_s, codebook_dim)`): codes of the scale, or mixtures of its code vectors.
            scale (`int`): s, counted from 0.

        Returns:
            The new sum, and the sum pooled to `(batch_size, n_{s+1}, codebook_dim)`, from which the next scale is
            predicted; `None` after the last scale.
        """
        vectors = tokens if tokens.is_floating_point() else self.codebook[scale][tokens]
        f_hat = f_hat + self._contribution(vectors, scale, f_hat.shape[-1])
        if scale + 1 == len(self.scales):
            return f_hat, None
        return f_hat, self._pool(f_hat, self.scales[scale + 1])

    @in_full_precision
    def mix(self, weights: torch.Tensor, scale: int) -> torch.Tensor:
        """Mixtures `(batch_size, n_s, codebook_dim)` of a scale's code vectors, by weights `(…, codebook_size)`."""
        return weights.to(self.codebook) @ self.codebook[scale]

    @in_full_precision
    def next_scale_inputs(self, audio_codes: torch.LongTensor) -> torch.Tensor:
        """
        What a generator sees of codes when it is trained on them (teacher forcing): before each scale but the first
        the sum of all earlier scales, pooled to the scale's length.

        Args:
            audio_codes (`torch.LongTensor` of shape `(..., tokens_per_window)`).

        Returns:
            `torch.FloatTensor` of shape `(windows, tokens_per_window − n_0, codebook_dim)`, leading axes flattened.
        """
        codes = audio_codes.flatten(0, -2)
        f_hat, inputs = self.empty_f_hat(codes.shape[0]), []
        for scale, scale_codes in enumerate(self.split(codes)[:-1]):
            f_hat, next_input = self.accumulate(f_hat, scale_codes, scale)
            inputs.append(next_input)
        if not inputs:
            return f_hat.new_zeros(codes.shape[0], 0, f_hat.shape[1])
        return torch.cat(inputs, dim=1)

    # --- codebook training -------------------------------------------------------------------------------------------

    @in_full_precision
    @torch.no_grad()
    def start_codebooks(self, hidden: torch.Tensor) -> None:
        """
        k-means start of all codebooks, coarse scales first, from encoder outputs `(batch_size, hidden_size,
        num_frames)` of this process and all others. Training mode calls it with its first batch; call it yourself to
        start from more than that.
        """
        for _ in self._quantize(self._project_in(hidden), len(self.scales), start_codebooks=True):
            pass
        self.initialized.fill_(True)

    def _has_codebooks(self) -> bool:
        """What `initialized` says; it is read where it has changed only, since an accelerator would be waited for."""
        state = self.initialized.data_ptr(), self.initialized._version
        if self._initialized_when_read[0] != state:
            self._initialized_when_read = state, bool(self.initialized)
        return self._initialized_when_read[1]

    def _start_codebook(self, scale: int, vectors: torch.Tensor) -> None:
        vectors = _gather(vectors)
        generator = torch.Generator().manual_seed(scale)
        means, counts = _kmeans(vectors, self.codebook_size, self.kmeans_iterations, generator)
        for tensor in (means, counts):  # sums on a GPU depend on their order: all processes take the first one's
            if _is_distributed():
                dist.broadcast(tensor, src=0)
        self.codebook[scale] = means
        self.cluster_size[scale] = counts
        self.codebook_sum[scale] = means * counts[:, None]

    @torch.no_grad()
    def _update_codebooks(self) -> None:
        """
        One step of the moving averages from every vector quantized since the last step, on all processes:
        N ← decay·N + (1 − decay)·n, m ← decay·m + (1 − decay)·Σu, e = m / N with Laplace-smoothed N. Codes whose N is
        below a share of the scale's mean then restart from vectors of the batch.
        """
        pooled = [torch.cat(parts) for parts in zip(*(entry[0] for entry in self._pending), strict=True)]
        codes = [torch.cat(parts) for parts in zip(*(entry[1] for entry in self._pending), strict=True)]
        self._pending.clear()

        counts = torch.zeros_like(self.cluster_size)
        sums = torch.zeros_like(self.codebook_sum)
        for scale, (scale_vectors, scale_codes) in enumerate(zip(pooled, codes, strict=True)):
            index = scale_codes.flatten()
            counts[scale].index_add_(0, index, counts.new_ones(len(index)))
            sums[scale].index_add_(0, index, scale_vectors.flatten(0, 1))
        if _is_distributed():
            for tensor in (counts, sums):
                dist.all_reduce(tensor)

        self.cluster_size.lerp_(counts, 1 - self.codebook_decay)
        self.codebook_sum.lerp_(sums, 1 - self.codebook_decay)
        epsilon = 1e-5
        total = self.cluster_size.sum(-1, keepdim=True)
        smoothed = (self.cluster_size + epsilon) / (total + self.codebook_size * epsilon) * total
        self.codebook.copy_(self.codebook_sum / smoothed[..., None])

        mean_size = self.cluster_size.mean(-1, keepdim=True).expand_as(self.cluster_size)
        dead = self.cluster_size < self.dead_code_threshold * mean_size
        # sampling takes the host far longer than asking; of summed counts all processes get the same answer
        if dead.any():
            samples = self._sample_vectors(pooled)
            self.codebook.copy_(torch.where(dead[..., None], samples, self.codebook))
            self.codebook_sum.copy_(torch.where(dead[..., None], samples * mean_size[..., None], self.codebook_sum))
            self.cluster_size.copy_(torch.where(dead, mean_size, self.cluster_size))
        self.num_updates += 1

    def _sample_vectors(self, pooled: list[torch.Tensor]) -> torch.Tensor:
        """
        One random vector of the batch per code, `(num_scales, codebook_size, codebook_dim)`. The choice is made over
        the batch of all processes, of which each fills in the vectors that it owns. Where a vector is drawn again it
        gets a little noise: which of two equal codes is nearer would be left to rounding, and that depends on how a
        batch is shared by processes.
        """
        batch_sizes = _gather(torch.tensor([len(pooled[0])], device=self.codebook.device))
        rank = dist.get_rank() if _is_distributed() else 0
        first, total = int(batch_sizes[:rank].sum()), int(batch_sizes.sum())
        generator = torch.Generator().manual_seed(int(self.num_updates))
        draws = torch.rand(len(self.scales), self.codebook_size, generator=generator, dtype=torch.float64)
        noise = torch.randn(self.codebook.shape, generator=generator, dtype=torch.float64)
        samples = torch.zeros_like(self.codebook_sum)
        for scale, vectors in enumerate(pooled):
            length = vectors.shape[1]
            drawn = (draws[scale] * total * length).long()
            index = drawn.to(vectors.device) - first * length
            owned = (index >= 0) & (index < len(vectors) * length)
            chosen = vectors.flatten(0, 1)[index.clamp(0, len(vectors) * length - 1)]
            factors = 1 + 0.01 * noise[scale] * _is_repeated(drawn)[:, None]
            samples[scale] = chosen * owned[:, None] * factors.to(chosen)
        if _is_distributed():
            dist.all_reduce(samples)
        return samples


def _is_repeated(values: torch.Tensor) -> torch.BoolTensor:
    """Which entries of a vector have occurred before in it."""
    order = values.argsort(stable=True)
    repeated = torch.zeros_like(values, dtype=torch.bool)
    repeated[order[1:]] = values[order[1:]] == values[order[:-1]]
    return repeated


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def _gather(tensor: torch.Tensor) -> torch.Tensor:
    """Concatenates every process's tensor along the first axis, in the order of the ranks; lengths may differ."""
    if not _is_distributed():
        return tensor
    length = torch.tensor([len(tensor)], device=tensor.device)
    lengths = [torch.zeros_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(lengths, length)
    longest = max(int(entry) for entry in lengths)
    padded = torch.cat([tensor, tensor.new_zeros(longest - len(tensor), *tensor.shape[1:])])
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[: int(entry)] for part, entry in zip(parts, lengths, strict=True)])


def _kmeans(
    vectors: torch.Tensor, num_clusters: int, iterations: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Means `(num_clusters, dim)` and sizes `(num_clusters,)` of vectors `(num_vectors, dim)`. Clusters that stay empty
    (always, when there are fewer vectors than clusters) are given a sampled vector with a little noise and size 1.
    """

    def sample() -> torch.Tensor:
        if len(vectors) >= num_clusters:
            index = torch.randperm(len(vectors), generator=generator)[:num_clusters]
        else:
            index = torch.randint(len(vectors), (num_clusters,), generator=generator)
        return vectors[index.to(vectors.device)]

    means = sample()
    for _ in range(iterations):
        nearest = (vectors @ means.T - means.square().sum(-1) / 2).argmax(-1)
        counts = vectors.new_zeros(num_clusters).index_add_(0, nearest, vectors.new_ones(len(vectors)))
        sums = torch.zeros_like(means).index_add_(0, nearest, vectors)
        means = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], means)
    noise = torch.randn(means.shape, generator=generator, dtype=torch.float64).to(means)
    spread = vectors.std(0, correction=0) if len(vectors) > 1 else torch.ones_like(means[0])
    empty = counts == 0
    means = torch.where(empty[:, None], sample() + 0.01 * spread * noise, means)
    return means, torch.where(empty, torch.ones_like(counts), counts)


__all__ = ["SatQuantizer", "SatQuantizerOutput", "nearest_phi"]
