"""SatModel: windows, batches, scales, precision, gradients and what keeps inference fast."""

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers.models.encodec.modeling_encodec import EncodecEncoder

from transformers_aar import SatConfig, SatModel


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def padded_batch(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise of several lengths, zero-padded to the longest, and its mask."""
    mask = torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]
    return noise(len(lengths), 1, max(lengths)) * mask[:, None], mask


@pytest.fixture(scope="module")
def codec(build_codec) -> SatModel:
    """Windows of 1920 samples in scales 1, 2, 4, 6; not to be changed."""
    return build_codec().requires_grad_(False)


# --- windows and batches ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 319, 1919, 1920, 1921, 3840, 5000])
def test_any_length_comes_back(codec, length):
    """Audio of any length gives whole windows of codes, and with its mask exactly its length."""
    audio, mask = noise(1, 1, length), torch.ones(1, length, dtype=torch.long)
    encoded = codec.encode(audio, mask)
    assert encoded.audio_codes.shape == (1, -(-length // 1920), 13)
    assert encoded.audio_codes.dtype == torch.long
    assert encoded.audio_codes_mask.all()
    assert codec.decode(encoded.audio_codes, padding_mask=mask).audio_values.shape == (1, 1, length)
    assert codec.decode(encoded.audio_codes).audio_values.shape[-1] == encoded.audio_codes.shape[1] * 1920
    assert codec(audio, mask).audio_values.shape == (1, 1, length)
    assert torch.equal(codec.encode(audio).audio_codes, encoded.audio_codes)


def test_last_window_is_padded_with_zeros(codec):
    """The remainder of a sound is coded as if silence followed it."""
    audio = noise(1, 1, 2500)
    silence = F.pad(audio, (0, 2 * 1920 - 2500))
    assert torch.equal(codec.encode(audio).audio_codes, codec.encode(silence).audio_codes)
    assert not torch.equal(codec.encode(audio).audio_codes[:, 1], codec.encode(noise(1, 1, 3840)).audio_codes[:, 1])


@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.5])
def test_batch_gives_what_each_item_gives_alone(build_codec, overlap):
    """Clips of different lengths in one batch: codes, mask and decoded sound are those of each clip alone."""
    model = build_codec(overlap=overlap).requires_grad_(False)
    lengths = [1, 900, 1920, 1921, 6000, 14000, 9601]
    audio, mask = padded_batch(lengths)
    encoded = model.encode(audio, mask)
    decoded = model.decode(encoded.audio_codes, padding_mask=mask).audio_values
    same = total = 0
    for index, length in enumerate(lengths):
        alone = model.encode(audio[index : index + 1, :, :length])
        windows = alone.audio_codes.shape[1]
        assert encoded.audio_codes_mask[index].tolist() == [
            step < windows for step in range(encoded.audio_codes.shape[1])
        ]
        assert not encoded.audio_codes[index, windows:].any()
        same += (encoded.audio_codes[index, :windows] == alone.audio_codes[0]).sum()
        total += alone.audio_codes.numel()
        sound = model.decode(encoded.audio_codes[index : index + 1, :windows], mask[index : index + 1, :length])
        torch.testing.assert_close(decoded[index, :, :length], sound.audio_values[0], atol=1e-5, rtol=1e-4)
        assert not decoded[index, :, length:].any()
    assert same / total >= 0.999


def test_published_scales_in_a_ragged_batch(build_codec, codec_fields):
    """The same with windows of a second in 16 scales, and enough codes for a share of 99.9 % to mean something."""
    model = build_codec(codec_fields).requires_grad_(False)
    lengths = [24000, 30000, 60000, 100]
    audio, mask = padded_batch(lengths)
    together = model.encode(audio, mask).audio_codes
    same = [
        together[index, : -(-length // 24000)] == model.encode(audio[index : index + 1, :, :length]).audio_codes[0]
        for index, length in enumerate(lengths)
    ]
    assert together.shape == (4, 3, 455)
    assert torch.cat([entry.flatten() for entry in same]).double().mean() >= 0.999
    assert all(len(scale.unique()) > 1 for scale in model.split_scales(together))


def test_garbage_in_the_padding_does_not_matter(codec):
    audio, mask = padded_batch([700, 5000])
    garbage = torch.where(mask[:, None], audio, torch.full_like(audio, 1e4))
    clean, dirty = codec(audio, mask), codec(garbage, mask)
    assert torch.equal(clean.audio_codes, dirty.audio_codes)
    assert torch.equal(clean.audio_values, dirty.audio_values)
    assert torch.isfinite(dirty.loss) and torch.equal(codec.encode(garbage, mask).audio_codes, clean.audio_codes)


def test_loss_ignores_the_padding(codec):
    """The mean absolute error counts samples of the sounds only."""
    audio, mask = padded_batch([700, 5000])
    output = codec(audio, mask)
    expected = (output.audio_values - audio).abs()[mask[:, None]].mean() + output.commitment_loss
    torch.testing.assert_close(output.loss, expected)


def test_windows_per_batch_changes_nothing(build_codec):
    model = build_codec(overlap=0.25).requires_grad_(False)
    audio, mask = padded_batch([9000, 4000, 100])
    codes = model.encode(audio, mask).audio_codes
    sound = model.decode(codes, mask).audio_values
    model.windows_per_batch = 2
    assert torch.equal(model.encode(audio, mask).audio_codes, codes)
    torch.testing.assert_close(model.decode(codes, mask).audio_values, sound, atol=1e-6, rtol=1e-5)


def test_half_precision_audio_gives_the_codes_of_the_same_samples(codec):
    """Audio of another dtype than the model is taken as it is."""
    audio = noise(1, 1, 4000).half()
    assert torch.equal(codec.encode(audio).audio_codes, codec.encode(audio.float()).audio_codes)


# --- overlapping windows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("overlap", [0.25, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cross_fade_keeps_a_constant(build_codec, overlap, dtype):
    """When every window decodes to the same constant so does their join, first and last sample included."""
    model = build_codec(overlap=overlap).requires_grad_(False)
    last = model.decoder.layers[-1].conv
    last.parametrizations.weight.original0.zero_()
    last.bias.fill_(0.375)
    model.to(dtype)
    for windows in (1, 2, 5):
        sound = model.decode(torch.randint(16, (2, windows, 13))).audio_values
        assert sound.shape == (2, 1, 1920 + (windows - 1) * model.config.window_stride)
        torch.testing.assert_close(sound, torch.full_like(sound, 0.375))


@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_cross_fade_is_linear(build_codec, overlap):
    """In the overlap the weight moves evenly from one window to the next; elsewhere one window speaks alone."""
    model = build_codec(overlap=overlap).requires_grad_(False)
    codes = torch.randint(16, (1, 2, 13), generator=torch.Generator().manual_seed(0))
    first, second = (model.decode(codes[:, [index]]).audio_values[0, 0] for index in (0, 1))
    joined, shared = model.decode(codes).audio_values[0, 0], round(1920 * overlap)
    weight = (torch.arange(shared) + 0.5) / shared
    torch.testing.assert_close(joined[: 1920 - shared], first[: 1920 - shared])
    torch.testing.assert_close(joined[1920:], second[shared:])
    mixed = (1 - weight) * first[-shared:] + weight * second[:shared]
    torch.testing.assert_close(joined[1920 - shared : 1920], mixed)
    assert (first[-shared:] - second[:shared]).abs().max() > 1e-3


@torch.no_grad()
def test_cross_fade_in_half_precision(build_codec):
    """The ends of long windows, whose weights are below what fp16 holds, come out as the windows have them."""
    model = build_codec(overlap=0.5)
    windows = noise(1, 2, 1, 24_000)
    model.config.window_length_s = 1.0
    model.config.sampling_rate = 24_000
    assert model.config.window_stride == 12_000
    joined = model._join_windows(windows.half(), None)
    assert joined.dtype == torch.float16
    torch.testing.assert_close(joined[..., :100].float(), windows[:, 0, :, :100], atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(joined[..., -100:].float(), windows[:, 1, :, -100:], atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_encode_and_decode_are_exported(codec):
    """Without a padding mask nothing depends on numbers."""

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.codec = codec

        def forward(self, audio):
            codes = self.codec.encode(audio, return_dict=True).audio_codes
            return codes, self.codec.decode(codes, return_dict=True).audio_values

    audio = noise(2, 1, 5000)
    exported = torch.export.export(Both().eval(), (audio,)).module()
    for ours, theirs in zip(exported(audio), Both()(audio), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_overlap_covers_every_sample(build_codec):
    """Overlapping windows start every stride, and each is coded like a sound of its own."""
    model = build_codec(overlap=0.5).requires_grad_(False)
    audio = noise(1, 1, 4800)
    codes = model.encode(audio).audio_codes
    assert codes.shape[1] == 4
    for index in range(4):
        alone = model.encode(audio[..., index * 960 : index * 960 + 1920]).audio_codes[:, 0]
        assert torch.equal(codes[:, index], alone)


# --- scales ----------------------------------------------------------------------------------------------------------


def test_max_scales(codec):
    """The first scales can be encoded and decoded alone; a prefix of the codes means the same."""
    audio = noise(2, 1, 3000)
    codes = codec.encode(audio).audio_codes
    sounds = []
    for scales, tokens in enumerate((1, 3, 7, 13), start=1):
        coarse = codec.encode(audio, max_scales=scales).audio_codes
        assert torch.equal(coarse, codes[..., :tokens])
        sounds.append(codec.decode(coarse).audio_values)
        assert torch.equal(codec.decode(codes, max_scales=scales).audio_values, sounds[-1])
        assert sounds[-1].shape == (2, 1, 3840)
    assert all(not torch.allclose(one, other) for one, other in zip(sounds, sounds[1:], strict=False))


def test_every_scale_takes_error_away(build_codec, codec_fields):
    """With codebooks that fit the data, the running sum comes closer to the latents with more scales."""
    model = build_codec(codec_fields, phi_kernel_sizes=[]).requires_grad_(False)
    hidden = model.encoder(noise(8, 1, 24000))
    codes = model.quantizer.encode(hidden)
    scales = (1, 4, 8, 12, 16)
    tokens = [sum(model.config.scales[:count]) for count in scales]
    quantized = [model.quantizer.decode(codes[:, :count]) for count in tokens]
    latents = model.quantizer.project_out(model.quantizer.project_in(hidden.mT)).mT
    errors = [F.mse_loss(sum_, latents).item() for sum_ in quantized]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.5 * errors[0]


def test_accumulating_equals_decoding(codec):
    """A generator's running sum over the scales ends in what decoding the codes gives."""
    codes = torch.randint(16, (3, 2, 13), generator=torch.Generator().manual_seed(1))
    f_hat, inputs = codec.quantizer.empty_f_hat(6), []
    for scale, tokens in enumerate(codec.quantizer.split(codes.flatten(0, 1))):
        f_hat, next_input = codec.quantizer.accumulate(f_hat, tokens, scale)
        inputs.append(next_input)
    assert inputs.pop() is None
    torch.testing.assert_close(codec.quantizer.next_scale_inputs(codes), torch.cat(inputs, dim=1))
    sound = codec.decode_f_hat(f_hat.unflatten(0, (3, 2)))
    torch.testing.assert_close(sound, codec.decode(codes).audio_values)


def test_split_and_merge(codec):
    codes = torch.arange(26).view(1, 2, 13)
    scales = codec.split_scales(codes)
    assert [entry.shape for entry in scales] == [(1, 2, 1), (1, 2, 2), (1, 2, 4), (1, 2, 6)]
    assert scales[2].tolist() == [[[3, 4, 5, 6], [16, 17, 18, 19]]]
    assert torch.equal(codec.merge_scales(scales), codes)
    assert torch.equal(codec.merge_scales(scales[:2]), codes[..., :3])
    with pytest.raises(ValueError, match="whole scales"):
        codec.merge_scales(scales[1:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.decode(torch.full((1, 1, 13), 16)), "between 0 and 15, got 16 to 16"),
        (lambda model: model.decode(torch.full((1, 1, 13), -1)), "between 0 and 15"),
        (lambda model: model.decode(torch.zeros(1, 1, 12, dtype=torch.long)), "12 codes is not a number of whole"),
        (lambda model: model.decode(torch.zeros(1, 13, dtype=torch.long)), "must have the shape"),
        (lambda model: model.decode(torch.zeros(1, 1, 13)), "whole numbers"),
        (lambda model: model.decode(torch.zeros(1, 0, 13, dtype=torch.long)), "at least one window"),
        (lambda model: model.decode(torch.zeros(1, 2, 13, dtype=torch.long), torch.ones(1, 1920)), "belongs to"),
        (lambda model: model.decode(torch.zeros(1, 1, 13, dtype=torch.long), torch.ones(2, 1920)), "belongs to"),
        (lambda model: model.decode(torch.zeros(1, 1, 13, dtype=torch.long), max_scales=5), "`max_scales`"),
        (lambda model: model.encode(noise(1, 1, 100), max_scales=0), "`max_scales`"),
        (lambda model: model.encode(noise(1, 100)), "must have the shape"),
        (lambda model: model.encode(noise(1, 2, 100)), "must have the shape"),
        (lambda model: model.encode(noise(1, 1, 0)), "at least one sample"),
        (lambda model: model.encode(noise(2, 1, 100), torch.ones(2, 99)), "`padding_mask` must have the shape"),
        (lambda model: model.encode(noise(2, 1, 100), torch.ones(1, 100)), "`padding_mask` must have the shape"),
    ],
)
def test_bad_input_is_refused(codec, call, message):
    with pytest.raises(ValueError, match=message):
        call(codec)


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"scales": [1, 2, 4, 5]}, "scales"),
        ({"scales": [1, 4, 2, 6]}, "scales"),
        ({"scales": []}, "scales"),
        ({"phi_kernel_sizes": [3] * 5}, "phi_kernel_sizes"),
        ({"phi_kernel_sizes": [4]}, "phi_kernel_sizes"),
        ({"window_length_s": 0.081}, "window_length_s"),
        ({"overlap": 0.6}, "overlap"),
        ({"codebook_size": 0}, "codebook_size"),
        ({"codebook_decay": 1.0}, "codebook_decay"),
    ],
)
def test_impossible_configurations_are_refused(short_codec_fields, fields, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        SatConfig(**{**short_codec_fields, **fields})


def test_given_codes_are_decoded_by_forward(codec):
    audio = noise(1, 1, 2500)
    codes = torch.randint(16, (1, 2, 13))
    output = codec(audio, audio_codes=codes)
    assert output.loss is None
    assert torch.equal(output.audio_values, codec.decode(codes).audio_values[..., :2500])
    as_tuple = copy.deepcopy(codec)
    as_tuple.config.return_dict = False
    assert torch.equal(as_tuple(audio, audio_codes=codes)[1], output.audio_values)


def test_tuples(codec):
    audio = noise(1, 1, 2500)
    encoded = codec.encode(audio, return_dict=False)
    assert isinstance(encoded, tuple) and torch.equal(encoded[0], codec.encode(audio).audio_codes)
    decoded = codec.decode(encoded[0], return_dict=False)
    assert isinstance(decoded, tuple) and torch.equal(decoded[0], codec.decode(encoded[0]).audio_values)
    assert torch.equal(codec(audio, return_dict=False)[2], codec(audio).audio_values)


# --- variants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"window_length_s": 1.0, "scales": [75] * 10, "phi_kernel_sizes": []},
        {"use_causal_conv": True},
        {"codebook_dim": 8},
        {"norm_type": "time_group_norm"},
        {"use_conv_shortcut": False, "num_residual_layers": 2, "num_lstm_layers": 2},
        {"upsampling_ratios": [4, 3], "window_length_s": 0.01, "scales": [5, 20], "phi_kernel_sizes": [9]},
        {"scales": [6], "phi_kernel_sizes": [3]},
        {"scales": [1, 6, 6], "phi_kernel_sizes": [3]},
        {"audio_channels": 2},
    ],
    ids=lambda fields: "-".join(fields),
)
def test_variants_work_end_to_end(build_codec, fields):
    """Every architecture trains a step, and encodes and decodes 1.5 windows to their length."""
    model = build_codec(**fields)
    config = model.config
    audio = noise(2, config.audio_channels, config.window_length * 3 // 2)
    model.train()(audio).loss.backward()
    missing = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert missing == []
    with torch.no_grad():
        codes = model.eval().encode(audio).audio_codes
        sound = model.decode(codes, torch.ones(2, audio.shape[-1])).audio_values
    assert codes.shape == (2, 2, sum(config.scales)) and len(codes.unique()) > 1
    assert sound.shape == audio.shape and sound.std() > 0


def test_causal_codec_never_looks_ahead(build_codec):
    """With causal convolutions a window's beginning doesn't change with its end; without them it does."""
    for is_causal in (True, False):
        model = build_codec(use_causal_conv=is_causal).requires_grad_(False)
        audio = noise(1, 1, 60 * 320)
        changed = audio.clone()
        changed[..., 50 * 320 :] = 0
        same = torch.allclose(model.encoder(audio)[..., :50], model.encoder(changed)[..., :50], atol=1e-5)
        assert same == is_causal


# --- precision -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantizer_stays_fp32(build_codec, tmp_path, dtype):
    """`.to(dtype)`, `.half()` and `dtype=` lower the convolutions, never the codebooks, φ and projections."""
    original = build_codec()
    original.save_pretrained(tmp_path)
    short = {torch.bfloat16: lambda model: model.bfloat16(), torch.float16: lambda model: model.half()}[dtype]
    lowered = [build_codec().to(dtype), short(build_codec()), SatModel.from_pretrained(tmp_path, dtype=dtype).eval()]
    for model in lowered:
        assert model.dtype == dtype
        assert {tensor.dtype for tensor in model.encoder.parameters()} == {dtype}
        for name, tensor in model.quantizer.state_dict().items():
            assert torch.equal(tensor, original.quantizer.state_dict()[name]), name
            assert tensor.dtype == original.quantizer.state_dict()[name].dtype, name
        audio = noise(2, 1, 3000)
        with torch.no_grad():
            codes = model.encode(audio).audio_codes
            sound = model.decode(codes, torch.ones(2, 3000)).audio_values
            reference = original.decode(codes, torch.ones(2, 3000)).audio_values
        assert codes.shape == (2, 2, 13) and sound.dtype == dtype and sound.shape == (2, 1, 3000)
        torch.testing.assert_close(sound.float(), reference, atol=0.05, rtol=0.05)


def test_double_precision(build_codec):
    """`.double()` takes everything along: codes agree with fp32, and gradients are fp64."""
    model = build_codec()
    audio = noise(2, 1, 3000)
    with torch.no_grad():
        codes = model.encode(audio).audio_codes
    model.double()
    assert model.quantizer.codebook.dtype == torch.float64
    assert (model.encode(audio.double()).audio_codes == codes).double().mean() > 0.99
    output = model.train()(audio.double())
    output.loss.backward()
    assert output.audio_values.dtype == torch.float64
    assert model.encoder.layers[0].conv.bias.grad.dtype == torch.float64


def test_autocast_does_not_reach_the_quantizer(build_codec):
    model = build_codec().requires_grad_(False)
    hidden = model.encoder(noise(4, 1, 1920))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model.quantizer(hidden)
        codes, decoded = model.quantizer.encode(hidden), model.quantizer.decode(output.audio_codes)
    assert output.quantized.dtype == decoded.dtype == torch.float32
    assert torch.equal(codes, model.quantizer.encode(hidden))
    assert torch.equal(output.quantized, model.quantizer(hidden).quantized)


# --- gradients and training mode -------------------------------------------------------------------------------------


@pytest.mark.parametrize("codebook_dim", [4, 8])
def test_encoder_gets_the_gradient_once(build_codec, codebook_dim):
    """Straight-through applies to the whole sum: the latents' gradient is the output's, not S times that."""
    quantizer = build_codec(codebook_dim=codebook_dim).quantizer
    hidden = noise(2, 8, 6).requires_grad_()
    weights = noise(2, 8, 6, seed=1)
    (gradient,) = torch.autograd.grad((quantizer(hidden).quantized * weights).sum(), hidden)
    expected = weights
    if codebook_dim == 4:
        expected = (weights.mT @ quantizer.project_out.weight @ quantizer.project_in.weight).mT
    torch.testing.assert_close(gradient, expected)


def test_commitment_gradient(build_codec):
    """mse(sg(h), r) trains the encoder with 2(r − h)/N per scale; mse(h, sg(r)) trains φ."""
    model = build_codec(codebook_dim=8)
    quantizer, hidden = model.quantizer, noise(2, 8, 6).requires_grad_()
    output = quantizer(hidden)
    phi = list(quantizer.phi.parameters())
    gradient, *phi_gradients = torch.autograd.grad(output.commitment_losses.sum(), [hidden, *phi])
    residual, expected, losses = hidden.detach(), 0, []
    with torch.no_grad():
        for scale, codes in enumerate(quantizer.split(output.audio_codes)):
            vectors = F.interpolate(quantizer.codebook[scale][codes].mT, size=6, mode="linear")
            contribution = vectors / 2 + quantizer.phi[quantizer.phi_of_scale[scale]](vectors) / 2
            expected += 2 * (residual - contribution) / residual.numel()
            losses.append(2 * F.mse_loss(contribution, residual))
            residual = residual - contribution
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(output.commitment_losses, torch.stack(losses))
    assert all(entry.abs().sum() > 0 for entry in phi_gradients)


def test_reconstruction_gives_phi_no_gradient(build_codec):
    model = build_codec()
    model(noise(1, 1, 1920)).audio_values.square().sum().backward()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in model.quantizer.phi.parameters())
    assert model.encoder.layers[0].conv.parametrizations.weight.original1.grad.abs().sum() > 0


def test_evaluation_leaves_codebooks_alone(short_codec_fields):
    """In evaluation mode no forward starts or moves codebooks; in training mode the first does both."""
    torch.manual_seed(0)
    model = SatModel(SatConfig(**short_codec_fields)).eval()
    before = copy.deepcopy(model.state_dict())
    audio = noise(4, 1, 4000)
    model(audio).loss.backward()
    model.encode(audio)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert not model.quantizer.initialized
    model.train().encode(audio)
    assert not model.quantizer.initialized
    model(audio)
    assert model.quantizer.initialized
    started = model.quantizer.codebook.clone()
    assert not torch.equal(started, before["quantizer.codebook"])
    model(audio)
    assert not torch.equal(started, model.quantizer.codebook)


# --- speed -----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_nothing_waits_for_the_device(codec, host_sync_counter):
    """Encoder, decoder and quantizer read no number back to the host; EnCodec's own convolutions do."""
    audio = noise(2, 1, 1920)
    with host_sync_counter:
        hidden = codec.encoder(audio)
        codes = codec.quantizer.encode(hidden)
        codec.decoder(codec.quantizer.decode(codes))
        codec.quantizer.next_scale_inputs(codes)
    assert host_sync_counter.operations == []
    with host_sync_counter:
        EncodecEncoder(codec.config)(audio)
    assert host_sync_counter.operations


def test_training_rarely_waits_for_the_device(short_codec_fields, host_sync_counter):
    """Micro-batches read nothing once the codebooks are started; a step asks once whether codes are dead."""
    model = SatModel(SatConfig(**short_codec_fields)).train()
    model(noise(4, 1, 1920)).loss.backward()
    model(noise(4, 1, 1920))
    with host_sync_counter, model.accumulate_codebook_statistics():
        model(noise(4, 1, 1920, seed=1)).loss.backward()
    assert host_sync_counter.operations == []
    with host_sync_counter:
        model(noise(4, 1, 1920, seed=1)).loss.backward()
    assert host_sync_counter.operations == ["aten._local_scalar_dense.default"]
    model.quantizer.initialized.fill_(False)
    model.quantizer.codebook.fill_(5.0)
    model(noise(4, 1, 1920, seed=2))
    assert model.quantizer.initialized and model.quantizer.codebook.max() < 4


def test_every_trainable_parameter_gets_a_gradient(short_codec_fields):
    """With seven scales two of the published five φ are no scale's, and processes would wait for their gradients."""
    fields = short_codec_fields | {"scales": [1, 2, 3, 4, 5, 5, 6], "phi_kernel_sizes": [9] * 5}
    model = SatModel(SatConfig(**fields)).train()
    model(noise(4, 1, 1920))
    model(noise(4, 1, 1920)).loss.backward()
    parameters = dict(model.named_parameters())
    assert not [name for name, one in parameters.items() if one.requires_grad and one.grad is None]
    frozen = {name.split(".")[2] for name, one in parameters.items() if not one.requires_grad}
    assert len(set(model.quantizer.phi_of_scale)) + len(frozen) == 5


# --- fingerprint -----------------------------------------------------------------------------------------------------


def test_fingerprint(build_codec, tmp_path):
    """It tells codecs apart whose codes mean different things, and no others."""
    model = build_codec()
    fingerprint = model.fingerprint()
    assert len(fingerprint) == 64 and int(fingerprint, 16) >= 0
    assert build_codec().fingerprint() == fingerprint
    model.save_pretrained(tmp_path)
    assert SatModel.from_pretrained(tmp_path, dtype=torch.bfloat16).fingerprint() == fingerprint
    assert build_codec().half().fingerprint() == build_codec().double().fingerprint() == fingerprint
    others = [build_codec(seed=3), build_codec(overlap=0.25), build_codec(scales=[1, 2, 5, 6])]
    others += [build_codec(sampling_rate=48000, window_length_s=0.04)]
    model.quantizer.codebook[0, 0, 0] += 1e-3
    prints = [other.fingerprint() for other in (*others, model)]
    assert len({fingerprint, *prints}) == 6


def test_padding_belongs_at_the_end(codec):
    """A mask that begins with padding would drop the window with the sound."""
    length = 2 * codec.config.window_length
    mask = torch.arange(length)[None] > length // 2
    with pytest.raises(ValueError, match="padding before sound"):
        codec.encode(torch.zeros(1, 1, length), mask)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32])
def test_codes_of_any_whole_number_type_decode(codec, dtype):
    codes = torch.arange(codec.config.tokens_per_window).remainder(16)[None, None]
    with torch.no_grad():
        expected = codec.decode(codes).audio_values
        assert torch.equal(codec.decode(codes.to(dtype)).audio_values, expected)
    with pytest.raises(ValueError, match="whole numbers"):
        codec.decode(codes.bool())
