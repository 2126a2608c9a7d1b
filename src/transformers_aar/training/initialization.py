"""A start for SAT that already codes sounds: a channel vocoder, computed from some of them.

SEANet's blocks, started at random, pass on so little of a sound that hundreds of steps go by before anything is
learned. Here encoder and decoder start as the two halves of a vocoder (Dudley 1939): the latents are the levels of
frequency bands, frame by frame, and the decoder lets carriers sound at these levels. Levels change slowly, so that
coarse scales keep most of them, and no scale has to carry phases, which a generator could not choose consistently.

- Layers look linear where they have to be (Balduzzi et al. 2017, arXiv 1702.08591, section 5): convolutions yield
  pairs (u, -u), and the next one sees the difference elu(u) - elu(-u), which is 2u as long as u is small.
- The encoder's strided convolutions are cosine transforms of ever longer blocks. The sum elu(u) + elu(-u) of the last
  but one is a magnitude m; elu(-m / q) saturates where m exceeds q, and with a few q per band a logarithm is nearly a
  weighted sum of these. Low bands are narrower than that transform resolves: sines and cosines of a whole frame, which
  the LSTM saturates, tell them apart. The last convolution is the least-squares fit from all that to the levels.
- The decoder's first ELU turns levels into amplitudes: elu(x) - elu(x - 8) is the exponential for x < 0, but for a
  factor of nearly 1. Its second term is almost always -1, as a constant would be; but in a channel of its own for each
  band it cancels the first one of silence exactly, in half precision, too. The carriers are harmonics of the frame
  rate, which go on from frame to frame without a break.

Residual branches start small, and φ starts as the identity. Nothing of this is kept while the weights are trained.
"""

import math
import warnings
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torchaudio.functional import create_dct, melscale_fbanks
from transformers.models.encodec.modeling_encodec import (
    EncodecConv1d,
    EncodecConvTranspose1d,
    EncodecLSTM,
    EncodecResnetBlock,
)

from ..layers_sat import at_least_fp32
from ..modeling_sat import SatModel

NUM_BANDS = 64
# Power of a band that counts as silence, -74 dB.
FLOOR = 4e-8
# Standard deviation of u where layers look linear, and its mean size where magnitudes are wanted.
LINEAR, LOUD = 0.03, 30.0
# Levels that detectors saturate at, as quantiles of a band's magnitudes; the second one's for low bands.
QUANTILES = (0.1, 0.4, 0.8)
LOW_QUANTILE = 0.6
# Share of the bands, and of the channels of the encoder's LSTM, that is kept for the narrow low ones.
LOW_SHARE = 3 / 8
# What goes into the LSTM there is this small, so that hardly anything but what comes out of it is heard.
LOW_INPUT = 0.05
# Half levels this far below the loudest one aren't heard, -69 dB.
SILENCE = 8.0
# What residual branches and the decoder's LSTM start with, of what they start with otherwise.
BRANCH_SHARE = 0.02
LSTM_SHARE = 0.1
# Sounds that the convolutions are fitted to; the latents are fitted to all.
NUM_FITTED = 128
BATCH_SIZE = 32
# Shares of the mean power that least squares take for noise: of detectors, and where there is an exact solution.
DETECTOR_NOISE, NOISE = 1e-4, 1e-6


class ChannelVocoder:
    """
    Levels of frequency bands, and sounds of such levels.

    Args:
        sampling_rate (`int`): in Hz.
        hop_length (`int`): samples per frame; what is heard or sounds in one is twice as long.
        num_bands (`int`): bands from 0 Hz to Nyquist, spaced as Slaney's mel scale.
        starts (`tuple[int, int]`): samples before a frame that are heard, and that sound.
    """

    def __init__(self, sampling_rate: int, hop_length: int, num_bands: int, starts: tuple[int, int]):
        self.sampling_rate = sampling_rate
        self.hop_length = hop_length
        self.starts = starts
        self.window = torch.hann_window(2 * hop_length)
        # half as far apart as the window resolves, so that every band has some
        self.filters = _triangles(2 * hop_length + 1, num_bands, sampling_rate)
        harmonics = self.filters[::4]
        number = torch.arange(len(harmonics))
        phases = torch.rand(len(harmonics), generator=torch.Generator().manual_seed(0))
        time = torch.arange(2 * hop_length) / hop_length
        carriers = math.sqrt(2) * torch.cos(2 * math.pi * (number[:, None] * time + phases[:, None]))
        shares = harmonics / harmonics.sum(1, keepdim=True).clamp_min(1e-6)
        self.sounds = shares.T @ carriers * self.window

    def levels(self, sounds: torch.Tensor) -> torch.Tensor:
        """Natural logarithms of power `(batch_size, num_bands, frames)` in sounds `(batch_size, 1, num_samples)`."""
        frames = _frames(sounds, self.hop_length, 2 * self.hop_length, self.starts[0]) * self.window.to(sounds)
        spectrum = torch.fft.rfft(at_least_fp32(frames), 4 * self.hop_length).abs() / (self.hop_length / 2)
        filters = self.filters.to(spectrum)
        return (spectrum.square() @ (filters / filters.sum(0)) + FLOOR).log().mT.to(sounds.dtype)

    def synthesize(self, levels: torch.Tensor) -> torch.Tensor:
        """The inverse, as far as there is one: phases are fixed."""
        frames = self.sounds.to(levels).T @ (levels / 2).exp()
        num_samples = levels.shape[2] * self.hop_length
        length = num_samples + self.hop_length
        sounds = F.fold(frames, (1, length), (1, 2 * self.hop_length), stride=(1, self.hop_length))[:, 0]
        return sounds[:, :, self.starts[1] :][:, :, :num_samples]

    def sines(self, count: int) -> torch.Tensor:
        """`(2 · count, 2 · hop_length)`, cosines and sines in the middle of the lowest bands, with the window."""
        bins = torch.arange(len(self.filters)).to(self.filters)
        centres = (self.filters.T @ bins / self.filters.sum(0))[:count, None]
        angles = 2 * math.pi * centres * torch.arange(2 * self.hop_length) / (4 * self.hop_length)
        return torch.cat([angles.cos(), angles.sin()]) * self.window


@torch.no_grad()
def initialize_from_data(codec: SatModel, input_values: torch.Tensor) -> None:
    """
    Starts the codec's encoder, decoder and φ from sounds; the codebooks are left for k-means.

    Args:
        codec ([`SatModel`]): a fresh one.
        input_values (`torch.Tensor` of shape `(batch_size, 1, num_samples)`): hundreds of sounds, whole hops long.

    Raises:
        ValueError: for stereo, an odd number of filters, a single stride, frames too short for as many bands as
            latents, and group norm, whose layers aren't linear.
    """
    config = codec.config
    wanted = {
        "norm_type": (config.norm_type == "weight_norm", "weight_norm"),
        "num_filters": (config.num_filters % 2 == 0, "an even number"),
        "audio_channels": (config.audio_channels == 1, "1"),
        "upsampling_ratios": (len(config.upsampling_ratios) > 1, "two or more"),
    }
    for name, (is_right, expected) in wanted.items():
        if not is_right:
            raise ValueError(f"`data_dependent_init` needs `{name}` to be {expected}, got {getattr(config, name)!r}.")
    input_values = input_values.to(codec.dtype)
    if input_values[:NUM_FITTED].std() == 0:
        raise ValueError(
            "`data_dependent_init` needs sounds, and these are all silent: mend the dataset, or leave it out."
        )
    for phi in codec.quantizer.phi:
        nn.init.dirac_(phi.weight)
        nn.init.zeros_(phi.bias)
    for projection in (codec.quantizer.project_in, codec.quantizer.project_out):
        if isinstance(projection, nn.Linear):
            nn.init.eye_(projection.weight)
            nn.init.zeros_(projection.bias)
    encoder, decoder = codec.encoder.layers, codec.decoder.layers
    first = next(layer for layer in decoder if isinstance(layer, EncodecConvTranspose1d))
    last = [layer for layer in encoder if isinstance(layer, EncodecConv1d)][-2]
    starts = tuple(_own_taps(layer).start * config.hop_length // layer.conv.stride[0] for layer in (last, first))
    num_bands = min(config.hidden_size, config.codebook_dim, NUM_BANDS, first.conv.in_channels // 2)
    vocoder = ChannelVocoder(config.sampling_rate, config.hop_length, num_bands, starts)
    levels = torch.cat([vocoder.levels(sounds) for sounds in input_values.split(BATCH_SIZE)])
    mean, std = levels.mean((0, 2)), levels.std()
    _start_encoder(encoder, input_values[:NUM_FITTED], vocoder)
    _start_latents(encoder, input_values, (levels - mean[:, None]) / std)
    _start_decoder(decoder, levels[:NUM_FITTED], mean, std, vocoder)


# --- encoder ---------------------------------------------------------------------------------------------------------


def _start_encoder(layers: nn.ModuleList, sounds: torch.Tensor, vocoder: ChannelVocoder) -> None:
    """All but the last layer."""
    strided = [layer for layer in layers if isinstance(layer, EncodecConv1d) and layer.conv.stride[0] > 1]
    hidden, hop_length, num_low = sounds, 1, 0
    for number, layer in enumerate(layers[:-1]):
        if number == 0:
            _start_copies(layer, sounds)
        elif layer is strided[-1]:
            num_low = _start_detectors(layer, hidden, sounds, vocoder)
        elif layer in strided:
            _start_transform(layer, hidden, sounds, hop_length, is_loud=layer is strided[-2])
        elif isinstance(layer, EncodecLSTM):
            _saturate(layer, hidden[:, : 4 * num_low])
        elif not isinstance(layer, nn.ELU):
            _quieten(layer)
        hop_length *= layer.conv.stride[0] if layer in strided else 1
        hidden = layer(hidden)


def _start_copies(layer: EncodecConv1d, sounds: torch.Tensor) -> None:
    """Pairs of copies of each sample and its neighbours."""
    conv = layer.conv
    num_pairs, kernel_size = conv.out_channels // 2, conv.kernel_size[0]
    weight = conv.weight.new_zeros(num_pairs, 1, kernel_size)
    pair = torch.arange(num_pairs)
    weight[pair, 0, (_own_taps(layer).start + pair) % kernel_size] = LINEAR / sounds.std()
    _set_weight(conv, torch.cat([weight, -weight]))


def _start_transform(
    layer: EncodecConv1d, hidden: torch.Tensor, sounds: torch.Tensor, hop_length: int, is_loud: bool
) -> None:
    """
    Pairs of a cosine transform's components, as many as there are: of blocks, or for magnitudes, which are `is_loud`,
    of frames twice as long (MDCT, Princen & Bradley 1986), which leak less.
    """
    conv = layer.conv
    start, hop_length = _own_taps(layer).start * hop_length, hop_length * conv.stride[0]
    num_pairs = conv.out_channels // 2
    count = min(num_pairs, hop_length)
    basis = (_mdct(hop_length, count) if is_loud else create_dct(count, hop_length, "ortho").T).to(sounds)
    target = _frames(sounds, hop_length, basis.shape[1], start if is_loud else 0) @ basis.T
    weight = _fit_convolution(layer, _difference(hidden), target)
    sizes = target.abs().mean((0, 1)) / LOUD if is_loud else target.std() / LINEAR
    weight = F.pad(weight / sizes.clamp_min(1e-6).view(-1, 1, 1), (0, 0, 0, 0, 0, num_pairs - len(weight)))
    _set_weight(conv, _paired(weight))


def _start_detectors(layer: EncodecConv1d, hidden: torch.Tensor, sounds: torch.Tensor, vocoder: ChannelVocoder) -> int:
    """
    What levels are told from: twice two channels for each of the low bands, whose number is returned, and saturating
    magnitudes of all bands, which a Hann window averages over the kernel.
    """
    conv = layer.conv
    num_bands = vocoder.filters.shape[1]
    num_low = int(LOW_SHARE * min(num_bands, conv.out_channels / 4))
    components = _frames(sounds, vocoder.hop_length, 2 * vocoder.hop_length, vocoder.starts[0])
    components = components @ vocoder.sines(num_low).to(sounds).T
    low = _fit_convolution(layer, _difference(hidden), components)
    low = _paired(low * (LOW_INPUT / components.abs().mean((0, 1)).clamp_min(1e-6))[:, None, None])

    magnitudes = torch.stack(hidden.chunk(2, dim=1)).sum(0)
    num_groups = min(num_bands, (conv.out_channels - len(low)) // len(QUANTILES))
    groups = _groups(vocoder.hop_length // conv.stride[0], num_groups, vocoder.sampling_rate).to(sounds)
    num_pairs = magnitudes.shape[1]  # there may be more of them than bins, or fewer
    groups = F.pad(groups[:num_pairs], (0, 0, 0, max(0, num_pairs - len(groups))))
    window = torch.hann_window(conv.kernel_size[0] + 2).to(sounds)[1:-1]
    averaged = torch.einsum("btck,k,cg->btg", _inputs(layer, magnitudes), window / window.sum(), groups)
    detectors = []
    for quantile in _quantiles(averaged.flatten(0, 1), QUANTILES):
        weight = -(groups / quantile).T[:, :, None] * window / window.sum()
        detectors.append(torch.cat([weight, weight], dim=1))
    weight = torch.cat([low, *detectors])
    _set_weight(conv, F.pad(weight, (0, 0, 0, 0, 0, conv.out_channels - len(weight))))
    return num_low


def _saturate(layer: EncodecLSTM, hidden: torch.Tensor) -> None:
    """An LSTM without memory: tanh(tanh(x / q)) of the first channels `(batch_size, channels, frames)`, else 0."""
    lstm, count = layer.lstm, hidden.shape[1]
    size = lstm.hidden_size
    for parameter in lstm.parameters():
        parameter.zero_()
    if count == 0:
        return
    (quantile,) = _quantiles(hidden.abs().mT.flatten(0, 1), (LOW_QUANTILE,))
    for number in range(lstm.num_layers):
        bias = getattr(lstm, f"bias_ih_l{number}")
        bias[:size], bias[size : 2 * size], bias[3 * size :] = 8.0, -8.0, 8.0  # gates: in, forget, out
        gain = 1 / quantile if number == 0 else torch.ones_like(quantile)
        getattr(lstm, f"weight_ih_l{number}")[2 * size : 2 * size + count, :count] = gain.diag()


def _start_latents(layers: nn.ModuleList, sounds: torch.Tensor, levels: torch.Tensor) -> None:
    """The encoder's last layer: least squares from the detectors to the levels `(batch_size, num_bands, frames)`."""
    conv = layers[-1].conv

    def detectors(part: torch.Tensor) -> torch.Tensor:
        for layer in layers[:-1]:
            part = layer(part)
        return F.pad(_inputs(layers[-1], part).flatten(2), (0, 1), value=1.0)

    fit = _least_squares(detectors, sounds, levels.mT, DETECTOR_NOISE).T
    weight = fit[:, :-1].unflatten(1, (conv.in_channels, conv.kernel_size[0]))
    _set_weight(conv, F.pad(weight, (0, 0, 0, 0, 0, conv.out_channels - len(weight))))
    conv.bias[: len(fit)] = fit[:, -1]


# --- decoder ---------------------------------------------------------------------------------------------------------


def _start_decoder(
    layers: nn.ModuleList, levels: torch.Tensor, mean: torch.Tensor, std: torch.Tensor, vocoder: ChannelVocoder
) -> None:
    """Fits layer after layer to the cosine transforms of what shall sound, in ever shorter blocks."""
    sounds = torch.cat([vocoder.synthesize(part) for part in levels.split(BATCH_SIZE)])
    hidden, hop_length = (levels - mean[:, None]) / std, vocoder.hop_length
    hidden = F.pad(hidden, (0, 0, 0, layers[0].conv.in_channels - len(mean)))
    for number, layer in enumerate(layers):
        if number == 0:
            _start_amplitudes(layer, mean, std, levels.max())
        elif isinstance(layer, EncodecConvTranspose1d):
            hop_length //= layer.conv.stride[0]
            basis = create_dct(min(hop_length, layer.conv.out_channels // 2), hop_length, "ortho").to(sounds)
            target = _frames(sounds, hop_length, hop_length, 0) @ basis
            weight = _fit_transposed(layer, _difference(hidden), target * (LINEAR / target.std()))
            weight = F.pad(weight, (0, 0, 0, layer.conv.out_channels // 2 - weight.shape[1]))
            _set_weight(layer.conv, _paired(weight))
        elif isinstance(layer, EncodecConv1d):
            weight = _fit_convolution(layer, _difference(hidden), sounds.mT)
            _set_weight(layer.conv, torch.cat([weight, -weight], dim=1))
        elif not isinstance(layer, nn.ELU):
            _quieten(layer)
        hidden = layer(hidden)


def _start_amplitudes(layer: EncodecConv1d, mean: torch.Tensor, std: torch.Tensor, loudest: torch.Tensor) -> None:
    """
    From latents to pairs (x, x - 8) of half their levels x below the loudest one, of which the ELU makes amplitudes.
    """
    conv = layer.conv
    num_bands, num_pairs = len(mean), conv.out_channels // 2
    weight = conv.weight.new_zeros(num_pairs, conv.in_channels, conv.kernel_size[0])
    weight[:num_bands, :num_bands, _own_taps(layer)] = torch.eye(num_bands).to(weight)[..., None] * std / 2
    _set_weight(conv, torch.cat([weight, weight]))
    conv.bias[:num_bands] = (mean - loudest) / 2
    conv.bias[num_pairs : num_pairs + num_bands] = (mean - loudest) / 2 - SILENCE


# --- both ------------------------------------------------------------------------------------------------------------


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


def _inputs(layer: EncodecConv1d, signal: torch.Tensor) -> torch.Tensor:
    """What the kernel sees of `(batch_size, channels, length)`: `(batch_size, frames, channels, kernel_size)`."""
    kernel_size, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
    before = _own_taps(layer).start
    return F.pad(signal, (before, kernel_size - stride - before)).unfold(2, kernel_size, stride).transpose(1, 2)


def _difference(hidden: torch.Tensor) -> torch.Tensor:
    """elu(u) - elu(-u) of pairs `(batch_size, 2 · channels, length)`, as an ELU has left them."""
    first, second = hidden.chunk(2, dim=1)
    return first - second


def _paired(weight: torch.Tensor) -> torch.Tensor:
    """A convolution, transposed or not, that sees differences of pairs, and yields pairs."""
    weight = torch.cat([weight, -weight], dim=1)
    return torch.cat([weight, -weight])


def _frames(sounds: torch.Tensor, hop_length: int, length: int, start: int) -> torch.Tensor:
    """`(batch_size, frames, length)` of `(batch_size, 1, num_samples)`, each from `start` samples before its hop."""
    return F.pad(sounds[:, 0], (start, length - hop_length - start)).unfold(1, length, hop_length)


def _mdct(hop_length: int, count: int) -> torch.Tensor:
    """The lowest `count` components of the orthonormal MDCT with a sine window, `(count, 2 · hop_length)`."""
    time = torch.arange(2 * hop_length) + 0.5
    angles = math.pi / hop_length * (time + hop_length / 2) * (torch.arange(count)[:, None] + 0.5)
    return math.sqrt(2 / hop_length) * (math.pi * time / (2 * hop_length)).sin() * angles.cos()


def _triangles(num_bins: int, num_bands: int, sampling_rate: int) -> torch.Tensor:
    """Filters `(num_bins, num_bands)` of bands on Slaney's mel scale, 1 in the middle of each."""
    nyquist = sampling_rate / 2
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="At least one mel filterbank")  # which is an error here
        filters = melscale_fbanks(num_bins, 0.0, nyquist, num_bands, sampling_rate, norm=None, mel_scale="slaney")
    if not filters.any(0).all():
        raise ValueError(
            f"`data_dependent_init` can't tell {num_bands} bands of {sampling_rate} Hz apart in frames this short: "
            "give `upsampling_ratios` a larger product and a smaller first one, or fewer latents."
        )
    return filters.to(torch.get_default_dtype())


def _groups(num_bins: int, num_groups: int, sampling_rate: int) -> torch.Tensor:
    """
    Averages `(num_bins, num_groups)` of bins that share the frequencies up to Nyquist. Groups are spaced as on
    Slaney's mel scale; one that is narrower than a bin takes from the two nearest.
    """
    resolution = 8
    triangles = _triangles(resolution * num_bins + 1, num_groups, sampling_rate)
    centres = torch.arange(len(triangles)).to(triangles) @ triangles / triangles.sum(0) / resolution
    widths = (triangles.sum(0) / resolution).clamp_min(1.0)
    groups = (1 - (torch.arange(num_bins)[:, None] + 0.5 - centres).abs() / widths).clamp_min(0)
    return groups / groups.sum(0)


def _quantiles(values: torch.Tensor, shares: tuple[float, ...]) -> torch.Tensor:
    """
    Quantiles `(len(shares), channels)` of some thousands of the values `(count, channels)`: -60 dB below the mean at
    least, since values that are 0 half of the time are still to be told apart.
    """
    some = values[:: max(1, len(values) // 4000)]
    least = 1e-3 * some.mean(0).clamp_min(1e-3)
    return torch.maximum(torch.quantile(some, torch.tensor(shares).to(some), dim=0), least)


def _fit_convolution(layer: EncodecConv1d, signal: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Least squares from `(batch_size, in, length)` to `(batch_size, frames, out)`: `(out, in, kernel_size)`."""
    fit = _least_squares(lambda part: _inputs(layer, part).flatten(2), signal, target)
    return fit.T.unflatten(1, (signal.shape[1], layer.conv.kernel_size[0]))


def _fit_transposed(layer: EncodecConvTranspose1d, signal: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The same for a transposed convolution, whose overlapping taps are fitted together: `(in, out, kernel_size)`."""
    kernel_size, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
    start, num_channels = _own_taps(layer).start, signal.shape[1]
    weight = signal.new_zeros(num_channels, target.shape[2], kernel_size)
    for phase in range(stride):
        taps = {frame: start + phase - frame * stride for frame in (-1, 0, 1)}
        taps = {frame: tap for frame, tap in taps.items() if 0 <= tap < kernel_size}
        fit = _least_squares(partial(_neighbours, frames=list(taps)), signal, target[:, phase::stride])
        weight[..., list(taps.values())] = torch.stack(fit.split(num_channels), dim=-1)
    return weight


def _neighbours(signal: torch.Tensor, frames: list[int]) -> torch.Tensor:
    """Each frame's neighbours at these distances, -1 to 1: `(batch_size, length, len(frames) · channels)`."""
    shifted = F.pad(signal, (1, 1)).unfold(2, signal.shape[2], 1)
    return torch.cat([shifted[:, :, frame + 1].mT for frame in frames], dim=-1)


def _least_squares(
    features: Callable[[torch.Tensor], torch.Tensor], signal: torch.Tensor, target: torch.Tensor, noise: float = NOISE
) -> torch.Tensor:
    """
    W of `features(signal) @ W ≈ target`, `(input_dim, output_dim)`; features are `(batch_size, frames, input_dim)`,
    and made of so few sounds at a time that memory is no matter.
    """
    power = cross = 0
    for part, wanted in zip(signal.split(BATCH_SIZE), target.split(BATCH_SIZE), strict=True):
        inputs = features(part).flatten(0, 1).double()
        power = power + inputs.T @ inputs
        cross = cross + inputs.T @ wanted.flatten(0, 1).double()
    power.diagonal().add_(noise * power.diagonal().mean())
    return torch.linalg.solve(power, cross).to(signal.dtype)
