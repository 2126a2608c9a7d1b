"""A start for SAT that already codes sounds, taken from a few of them.

SEANet's blocks, started at random, pass on so little of a sound that hundreds of steps go by before anything is
learned. Here encoder and decoder start as a linear transform coder, with four ingredients:

- Layers look linear (Balduzzi et al. 2017, arXiv 1702.08591, section 5): every convolution yields pairs (u, -u), and
  the next one sees only the difference elu(u) - elu(-u), which is 2u as long as u is small.
- The encoder is a Karhunen-Loève transform in stages: the weights of a strided convolution are the principal
  components of the patches that it replaces, as many as it has pairs of channels.
- A quarter of the latents are magnitudes of such components. What is left when frames are pooled for a coarse scale
  are magnitudes, since signed components average out: without them coarse codes would tell next to nothing, and a
  generator would choose fine ones that don't agree.
- The decoder is the least-squares way back, layer by layer.

Residual branches start small, and φ starts as the identity. Nothing of this is kept while the weights are trained.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.encodec.modeling_encodec import (
    EncodecConv1d,
    EncodecConvTranspose1d,
    EncodecLSTM,
    EncodecResnetBlock,
)

from ..modeling_sat import SatModel

# Standard deviation of u. A smaller one makes layers more linear, and biases too sensitive for common learning rates.
AMPLITUDE = 0.1
# What residual branches and LSTMs start with, of what they start with otherwise.
BRANCH_SHARE = 0.02
LSTM_SHARE = 0.1
# The latents that are magnitudes.
SLOW_SHARE = 1 / 4
# Share of the mean power that least squares take for noise. Without it they amplify what hardly exists.
NOISE_SHARE = 1e-4


@torch.no_grad()
def initialize_from_data(codec: SatModel, input_values: torch.Tensor) -> None:
    """
    Starts the codec's encoder, decoder and φ from sounds; the codebooks are left for k-means.

    Args:
        codec ([`SatModel`]): a fresh one.
        input_values (`torch.Tensor` of shape `(batch_size, audio_channels, num_samples)`): some dozens of sounds,
            whole hops long.

    Raises:
        ValueError: for an odd number of filters, and for group norm, whose layers aren't linear.
    """
    config = codec.config
    if config.norm_type != "weight_norm" or config.num_filters % 2:
        raise ValueError(
            "`data_dependent_init` needs weight norm and an even number of filters, but the codec has "
            f"`norm_type={config.norm_type!r}` and `num_filters={config.num_filters}`."
        )
    input_values = input_values.to(codec.dtype)
    for phi in codec.quantizer.phi:
        nn.init.dirac_(phi.weight)
        nn.init.zeros_(phi.bias)
    num_slow = int(SLOW_SHARE * min(config.hidden_size, config.codebook_dim))
    levels, latents = _start_encoder(codec.encoder.layers, input_values, num_slow)
    latents = _start_projections(codec.quantizer, latents.transpose(1, 2)).transpose(1, 2)
    _start_decoder(codec.decoder.layers, latents, levels, input_values)


def _start_projections(quantizer: nn.Module, latents: torch.Tensor) -> torch.Tensor:
    """
    Keeps the strongest of the components `(batch_size, frames, hidden_size)`, with a variance of 1 where the quantizer
    is: of a larger one the commitment loss would outweigh all others. Returns what comes out of the quantizer's place.
    """
    if isinstance(quantizer.project_in, nn.Linear):
        for projection in (quantizer.project_in, quantizer.project_out):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)
        std = quantizer.project_in(latents).std()
        quantizer.project_in.weight.div_(std)
        quantizer.project_out.weight.mul_(std)
    return quantizer.project_out(quantizer.project_in(latents))


def _start_encoder(
    layers: nn.ModuleList, sounds: torch.Tensor, num_slow: int
) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The u of each level that the decoder has to find again, fine to coarse, and the encoder's output."""
    levels, hidden = [], sounds
    for number, layer in enumerate(layers):
        if isinstance(layer, nn.ELU):
            levels.append(hidden.chunk(2, dim=1)[0])
        elif isinstance(layer, EncodecConv1d) and number == len(layers) - 1:
            _start_latents(layer, hidden, num_slow)
        elif isinstance(layer, EncodecConv1d):
            _start_analysis(layer, hidden, is_first=number == 0)
        else:
            _quieten(layer)
        hidden = layer(hidden)
    return levels, hidden


def _start_analysis(layer: EncodecConv1d, hidden: torch.Tensor, is_first: bool) -> None:
    """Pairs of principal components of patches of `(batch_size, channels, length)`."""
    conv = layer.conv
    kernel_size, stride = conv.kernel_size[0], conv.stride[0]
    signal = hidden if is_first else _difference(hidden)
    # the first layer sees its whole kernel, since nothing has gathered a sample's surroundings yet
    taps = slice(0, kernel_size) if is_first else _own_taps(layer)
    patches = _surroundings(signal, layer) if is_first else _patches(signal, stride)
    components = _principal_components(patches, conv.out_channels // 2)
    weight = conv.weight.new_zeros(len(components), signal.shape[1], kernel_size)
    weight[..., taps] = components.unflatten(1, (signal.shape[1], -1)) * AMPLITUDE / (patches @ components.T).std()
    if not is_first:
        weight = torch.cat([weight, -weight], dim=1)
    _set_weight(conv, torch.cat([weight, -weight]))


def _start_latents(layer: EncodecConv1d, hidden: torch.Tensor, num_slow: int) -> None:
    """
    The encoder's last layer: principal components of its frames `(batch_size, channels, frames)`, which turn with the
    phase of what is heard, after `num_slow` of their magnitudes, which stay.
    """
    conv = layer.conv
    kernel_size = conv.kernel_size[0]
    # elu(u) + elu(-u), an even function
    magnitudes = F.avg_pool1d(torch.stack(hidden.chunk(2, dim=1)).sum(0), kernel_size, 1, kernel_size // 2)
    magnitudes = _patches(magnitudes, 1)
    mean = magnitudes.mean(0)
    slow = _principal_components(magnitudes - mean, num_slow)
    deviations = ((magnitudes - mean) @ slow.T).std(0)
    # of heavy tails the strongest component alone would be heard
    slow = slow / (deviations + 1e-3 * deviations.max()).sqrt()[:, None]
    slow = slow / ((magnitudes - mean) @ slow.T).std()
    frames = _patches(_difference(hidden), 1)
    fast = _principal_components(frames, conv.out_channels - num_slow)
    fast = fast / (frames @ fast.T).std()
    weight = conv.weight.new_zeros(conv.out_channels, conv.in_channels, kernel_size)
    weight[:num_slow] = torch.cat([slow, slow], dim=1)[..., None] / kernel_size
    weight[num_slow:, :, _own_taps(layer)] = torch.cat([fast, -fast], dim=1)[..., None]
    _set_weight(conv, weight)
    conv.bias[:num_slow] = -slow @ mean


def _start_decoder(
    layers: nn.ModuleList, hidden: torch.Tensor, levels: list[torch.Tensor], sounds: torch.Tensor
) -> None:
    """Fits each convolution to what the encoder had there: `levels` from the end, then the sounds."""
    targets = [*levels[::-1], sounds]
    for number, layer in enumerate(layers):
        if isinstance(layer, EncodecConv1d | EncodecConvTranspose1d):
            _start_synthesis(layer, hidden, targets.pop(0), is_first=number == 0, is_last=number == len(layers) - 1)
        elif not isinstance(layer, nn.ELU):
            _quieten(layer)
        hidden = layer(hidden)


def _start_synthesis(
    layer: nn.Module, hidden: torch.Tensor, target: torch.Tensor, is_first: bool, is_last: bool
) -> None:
    """Least squares from a frame of `(batch_size, channels, frames)` to what belongs to it of the target."""
    conv = layer.conv
    kernel_size, stride = conv.kernel_size[0], conv.stride[0]
    signal = hidden if is_first else _difference(hidden)
    inputs = _surroundings(signal, layer) if is_last else _patches(signal, 1)
    fit = _least_squares(inputs, _patches(target, stride))
    weight = conv.weight.new_zeros(signal.shape[1], target.shape[1], kernel_size)
    if is_last:
        weight[:] = fit.unflatten(0, (signal.shape[1], kernel_size)).transpose(1, 2)
    else:
        weight[..., _own_taps(layer)] = fit.unflatten(1, (target.shape[1], stride))
    if not is_first:
        weight = torch.cat([weight, -weight])
    if not is_last:
        weight = torch.cat([weight, -weight], dim=1)
    _set_weight(conv, weight if isinstance(conv, nn.ConvTranspose1d) else weight.transpose(0, 1))


def _quieten(layer: EncodecResnetBlock | EncodecLSTM) -> None:
    """What goes around a block's shortcut becomes small, and the shortcut the identity."""
    if isinstance(layer, EncodecLSTM):
        for parameter in layer.parameters():
            parameter.mul_(LSTM_SHARE)
        return
    if isinstance(layer.shortcut, EncodecConv1d):
        _set_weight(layer.shortcut.conv, nn.init.dirac_(torch.empty_like(layer.shortcut.conv.weight)))
    branch = layer.block[-1].conv
    branch.parametrizations.weight.original0.mul_(BRANCH_SHARE)
    nn.init.zeros_(branch.bias)


def _set_weight(conv: nn.Module, weight: torch.Tensor) -> None:
    """For a weight-normed convolution, and no bias. Directions get length 1, since Adam's steps have one size."""
    magnitude = weight.flatten(1).norm(dim=1)[:, None, None]
    direction = torch.where(magnitude > 0, weight, torch.randn_like(weight))
    conv.parametrizations.weight.original0.copy_(magnitude)
    conv.parametrizations.weight.original1.copy_(direction / direction.flatten(1).norm(dim=1)[:, None, None])
    nn.init.zeros_(conv.bias)


def _own_taps(layer: nn.Module) -> slice:
    """Where a kernel meets the samples of its own frame; what else it sees belongs to the frames beside."""
    kernel_size, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
    padding = kernel_size - stride
    if isinstance(layer, EncodecConvTranspose1d):
        after = math.ceil(padding * layer.trim_right_ratio) if layer.causal else padding // 2
    else:
        after = 0 if layer.causal else padding // 2
    return slice(padding - after, padding - after + stride)


def _difference(hidden: torch.Tensor) -> torch.Tensor:
    """elu(u) - elu(-u) of pairs `(batch_size, 2 · channels, length)`, as an ELU has left them."""
    first, second = hidden.chunk(2, dim=1)
    return first - second


def _patches(signal: torch.Tensor, length: int) -> torch.Tensor:
    """`(batch_size · frames, channels · length)` of `(batch_size, channels, frames · length)`."""
    return signal.unflatten(2, (-1, length)).transpose(1, 2).flatten(2).flatten(0, 1)


def _surroundings(signal: torch.Tensor, layer: EncodecConv1d) -> torch.Tensor:
    """As [`_patches`], but all that the layer's kernel sees around each sample; beyond the ends there are zeros."""
    kernel_size, before = layer.conv.kernel_size[0], _own_taps(layer).start
    padded = F.pad(signal, (before, kernel_size - 1 - before))
    return padded.unfold(2, kernel_size, 1).transpose(1, 2).flatten(2).flatten(0, 1)


def _principal_components(patches: torch.Tensor, count: int) -> torch.Tensor:
    """`(count, dim)`, the strongest first; random directions where there are more than dimensions."""
    covariance = patches.double().T @ patches.double() / len(patches)
    components = torch.linalg.eigh(covariance).eigenvectors.flip(1).T[:count].to(patches.dtype)
    extra = torch.randn(count - len(components), patches.shape[1]).to(patches)
    return torch.cat([components, F.normalize(extra, dim=1)])


def _least_squares(inputs: torch.Tensor, outputs: torch.Tensor) -> torch.Tensor:
    """W of `inputs @ W ≈ outputs`, `(input_dim, output_dim)`."""
    dtype = inputs.dtype
    inputs, outputs = inputs.double(), outputs.double()
    power = inputs.T @ inputs
    power.diagonal().add_(NOISE_SHARE * power.diagonal().mean())
    return torch.linalg.solve(power, inputs.T @ outputs).to(dtype)
