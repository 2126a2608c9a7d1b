"""SAT's layers: convolutions as CPUs are fastest with, paddings in plain integers, folded weights."""

import copy

import pytest
import torch
from torch.nn.utils import parametrize
from transformers.models.encodec.modeling_encodec import EncodecConv1d

from transformers_aar import SatModel
from transformers_aar.layers_sat import ChannelsLastConv1d, ChannelsLastConvTranspose1d, FoldedWeightNorm, SatConv1d


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def folds(model: SatModel) -> list[FoldedWeightNorm]:
    return [module for module in model.modules() if isinstance(module, FoldedWeightNorm)]


@pytest.fixture(scope="module")
def codec(build_codec) -> SatModel:
    """Not to be changed."""
    return build_codec().requires_grad_(False)


# --- convolutions ----------------------------------------------------------------------------------------------------


def test_paddings_are_plain_integers(codec):
    convs = [module for module in codec.modules() if type(module).__name__ == "SatConv1d"]
    assert len(convs) > 10
    for conv in convs:
        assert all(type(value) is int for value in (conv.stride, conv.kernel_size, conv.padding_total))
        assert not list(conv.buffers())


@pytest.mark.parametrize(
    ("kernel_size", "arguments"),
    [(7, {}), (1, {}), (3, {"padding": 1}), (3, {"dilation": 2}), (4, {"stride": 2})],
    ids=lambda value: str(value),
)
@pytest.mark.parametrize("length", [12, 13])
def test_channels_last_convolutions(kernel_size, arguments, length):
    """They equal PyTorch's in values and gradients, and lay out what they return for the next one."""
    torch.manual_seed(0)
    ours, theirs = (cls(4, 6, kernel_size, **arguments) for cls in (ChannelsLastConv1d, torch.nn.Conv1d))
    theirs.load_state_dict(ours.state_dict())
    inputs = torch.randn(2, 4, length)
    output, expected = ours(inputs), theirs(inputs)
    torch.testing.assert_close(output, expected)
    assert output.stride(1) == 1
    for result in (output, expected):
        result.square().sum().backward()
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, atol=1e-5, rtol=1e-4)


def test_channels_last_transposed_convolution():
    torch.manual_seed(0)
    ours, theirs = (cls(4, 6, 8, 4) for cls in (ChannelsLastConvTranspose1d, torch.nn.ConvTranspose1d))
    theirs.load_state_dict(ours.state_dict())
    inputs = torch.randn(2, 4, 13)
    torch.testing.assert_close(ours(inputs), theirs(inputs))


@pytest.mark.parametrize("paddings", [(0, 0), (3, 3), (2, 0), (0, 2), (1, 4)])
@pytest.mark.parametrize("length", [3, 10])
@pytest.mark.parametrize("mode", ["reflect", "constant", "replicate"])
def test_padding_is_the_parents(paddings, length, mode):
    """Bit for bit, of sounds that are shorter than their padding, too."""
    sound = torch.randn(2, 4, length)
    assert torch.equal(SatConv1d._pad1d(sound, paddings, mode), EncodecConv1d._pad1d(sound, paddings, mode))


def test_all_convolutions_are_channels_last(codec):
    """Beneath their weight norm, too, and after it is removed."""
    convs = [module for module in codec.modules() if isinstance(module, (torch.nn.Conv1d, torch.nn.ConvTranspose1d))]
    assert all(isinstance(conv, (ChannelsLastConv1d, ChannelsLastConvTranspose1d)) for conv in convs)
    conv = copy.deepcopy(codec).encoder.layers[0].conv
    parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is ChannelsLastConv1d
    assert isinstance(codec.encoder.layers[0].conv, ChannelsLastConv1d)


# --- folded weight norm ----------------------------------------------------------------------------------------------


def test_trainable_weights_are_not_folded(build_codec):
    """They are made of their factors anew each time, and gradients reach both."""
    conv = build_codec().encoder.layers[0].conv
    with torch.no_grad():
        weight = conv.weight
        assert conv.weight is not weight
    conv.weight.square().sum().backward()
    factors = conv.parametrizations.weight
    assert factors.original0.grad.abs().sum() > 0 and factors.original1.grad is not None
    conv.requires_grad_(False)
    assert torch.equal(conv.weight, weight)


def test_frozen_weights_are_folded_under_gradients(build_codec):
    """A frozen codec folds while gradients flow through it to its input."""
    model = build_codec().requires_grad_(False)
    assert model.encoder.layers[0].conv.weight is model.encoder.layers[0].conv.weight
    audio = noise(1, 1, 1920).requires_grad_()
    model.encoder(audio).sum().backward()
    assert audio.grad.abs().sum() > 0


@pytest.mark.parametrize("change", ["load", "assign", "dtype", "in_place", "data", "unfrozen"])
def test_folded_weights_follow_changes(build_codec, change):
    """Whatever changes frozen factors changes the next inference."""
    model, other = build_codec().requires_grad_(False), build_codec(seed=7)
    audio = noise(1, 1, 1920)
    before = model.encoder(audio)
    factor = model.encoder.layers[0].conv.parametrizations.weight.original0
    if change in ("load", "assign"):
        model.load_state_dict(other.state_dict(), assign=change == "assign")
    elif change == "dtype":
        model.bfloat16().float()
    elif change == "in_place":
        factor.mul_(2)
    elif change == "data":
        factor.data = factor.data * 2
    else:
        model.requires_grad_(True)
        model.encoder(audio).square().sum().backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
        model.requires_grad_(False)
    after = model.encoder(audio)
    for fold in folds(model):
        fold.__init__()
    assert torch.equal(after, model.encoder(audio))
    assert not torch.equal(after, before)


@pytest.mark.parametrize("change", ["fused", "fused between", "data"])
def test_changes_of_trainable_weights_that_leave_no_trace(build_codec, change):
    """Fused optimizers, and averages of weights that are copied in, don't count as changes in place."""
    model, other = build_codec(), build_codec()
    audio = noise(1, 1, 1920)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01, fused=True)
    with torch.no_grad():
        before = model.encoder(audio)
    if change == "data":
        for parameter in model.parameters():
            parameter.data.copy_(parameter * 1.1)
    else:
        model.encoder(audio).square().sum().backward()
        with torch.no_grad():
            assert change == "fused" or torch.equal(model.encoder(audio), before)
        optimizer.step()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        after = model.encoder(audio)
        assert torch.equal(after, other.encoder(audio))
    assert not torch.equal(after, before)


def test_folding_in_inference_mode_leaves_usable_weights(build_codec):
    """After `torch.inference_mode` gradients can still flow through a frozen codec, and one made inside it works."""
    model = build_codec().requires_grad_(False)
    audio = noise(1, 1, 1920)
    with torch.inference_mode():
        assert torch.isfinite(SatModel(model.config).encoder(audio)).all()
        for fold in folds(model):
            fold.__init__()
        before = model.encoder(audio)
    leaf = audio.clone().requires_grad_()
    after = model.encoder(leaf)
    after.sum().backward()
    assert leaf.grad.abs().sum() > 0
    torch.testing.assert_close(after.detach(), before.clone())


def test_checkpoints_have_one_layout(build_codec):
    """Folding shows in no state dictionary: weight norm is always stored as its two factors."""
    model = build_codec().requires_grad_(False)
    names = set(model.state_dict())
    model.decode(model.encode(noise(1, 1, 100)).audio_codes)
    assert set(model.state_dict()) == names
    assert "encoder.layers.0.conv.parametrizations.weight.original0" in names
    assert "decoder.layers.0.conv.parametrizations.weight.original1" in names
    assert not any(name.endswith("conv.weight") or "folded" in name for name in names)
    copied = copy.deepcopy(model)
    assert len(folds(copied)) == len(folds(model)) > 10
    assert all(parametrize.is_parametrized(fold) is False for fold in folds(copied))
