"""Next-scale generation: what is drawn, from what, and that no call leaves anything behind."""

import copy
import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
from transformers import CompileConfig, GenerationConfig, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

from transformers_aar import AarForConditionalGeneration, AarGenerateOutput, AarPreviewStreamer
from transformers_aar.generation_aar import AarGenerationMixin, AarTopKWarper

SCALES = [1, 2, 4, 6]
STARTS = [0, 1, 3, 7]


def random_embeds(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(seed))


def seeded(*seeds: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in seeds]


@pytest.fixture(scope="module")
def model(build_generator) -> AarForConditionalGeneration:
    """A model in scales 1, 2, 4, 6 with 16 codes each, conditioned on vectors of 32; not to be changed."""
    return build_generator().requires_grad_(False)


def draw(model, embeds: torch.Tensor, seed: int | None = 0, **kwargs) -> AarGenerateOutput:
    """Everything that one call returns."""
    kwargs = {"return_dict_in_generate": True, "output_scores": True, "output_logits": True, **kwargs}
    if seed is not None:
        kwargs.setdefault("generator", torch.Generator().manual_seed(seed))
    return model.generate(conditioning_embeds=embeds, **kwargs)


def teacher_forced(model, embeds: torch.Tensor, codes: torch.LongTensor) -> tuple[torch.Tensor, ...]:
    """Logits of the scales of codes `(sounds, windows, tokens)`, in one pass."""
    return model(conditioning_embeds=embeds, audio_codes=codes).logits.split(SCALES, dim=1)


# --- draws -----------------------------------------------------------------------------------------------------------


def test_greedy_takes_the_most_likely(model):
    """Greedy choices are deterministic, need no generator, and are the maxima of the teacher-forced logits."""
    embeds = random_embeds(3)
    first = draw(model, embeds, seed=None, do_sample=False, guidance_scale=0.0)
    assert torch.equal(first.audio, draw(model, embeds, seed=None, do_sample=False, guidance_scale=0.0).audio)
    logits = teacher_forced(model, embeds, first.audio_codes)
    assert torch.equal(torch.cat([entry.argmax(-1) for entry in logits], dim=1), first.audio_codes[:, 0])
    assert len({tuple(codes) for codes in first.audio_codes.flatten(1).tolist()}) == 3
    assert torch.equal(draw(model, embeds, top_k=1, guidance_scale=0.0).audio_codes, first.audio_codes)


def test_seeds(model):
    """The same generator state gives the same sounds, another one others, none the global one's."""
    embeds = random_embeds(2)
    first = draw(model, embeds, seed=1).audio_codes
    assert torch.equal(first, draw(model, embeds, seed=1).audio_codes)
    assert not torch.equal(first, draw(model, embeds, seed=2).audio_codes)
    torch.manual_seed(1)
    assert torch.equal(first, draw(model, embeds, seed=None).audio_codes)
    assert not torch.equal(first, draw(model, embeds, seed=None).audio_codes)


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"num_windows": 2},
        {"gumbel_smoothing": True},
        {"guidance_scale": 0.0},
        {"num_windows": 3, "max_batch_rows": 2},
    ],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
def test_a_sound_does_not_depend_on_its_batch(model, arguments):
    """With a generator of its own a sound is the same alone and among others."""
    embeds = random_embeds(4)
    together = draw(model, embeds, generator=seeded(10, 11, 12, 13), **arguments)
    for index in range(4):
        alone = draw(model, embeds[[index]], generator=seeded(10 + index), **arguments)
        assert torch.equal(alone.audio_codes[0], together.audio_codes[index])
        torch.testing.assert_close(alone.audio[0], together.audio[index], atol=1e-5, rtol=1e-4)
    assert not torch.equal(together.audio_codes[0], together.audio_codes[1])


def test_returned_sequences_have_generators_of_their_own(model):
    """Several sounds of one conditioning lie next to each other, and each follows its generator."""
    embeds = random_embeds(2)
    together = draw(model, embeds, generator=seeded(1, 2, 3, 4), num_return_sequences=2, num_windows=2)
    assert together.audio_codes.shape == (4, 2, 13)
    for sound, seed in enumerate((1, 2, 3, 4)):
        alone = draw(model, embeds[[sound // 2]], generator=seeded(seed), num_windows=2)
        assert torch.equal(alone.audio_codes[0], together.audio_codes[sound])
    with pytest.raises(ValueError, match=r"must be a `torch.Generator` or a list of them, got 1"):
        draw(model, embeds, generator=[1, 2])
    with pytest.raises(ValueError, match="Got 2 generators for 4 sounds"):
        draw(model, embeds, generator=seeded(1, 2), num_return_sequences=2)


@pytest.mark.parametrize("max_batch_rows", [1, 2, 3, 4, 8, 64])
def test_bounding_the_batch(model, max_batch_rows):
    """`max_batch_rows` bounds the rows of every pass; whole sounds stay what they are."""
    embeds, rows = random_embeds(5), []
    hook = model.model.norm.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    arguments = {"num_windows": 2, "guidance_scale": 0.0, "generator": seeded(*range(5))}
    bounded = draw(model, embeds, max_batch_rows=max_batch_rows, **arguments)
    hook.remove()
    assert max(rows) == min(max_batch_rows if max_batch_rows == 1 else max_batch_rows // 2 * 2, 10)
    assert sum(rows) == 10 * len(SCALES)
    assert bounded.audio_codes.shape == (5, 2, 13) and bounded.audio.shape == (5, 1, 3840)
    assert all(entry.shape == (10, size, 16) for entry, size in zip(bounded.scores, SCALES, strict=True))
    if max_batch_rows > 1:
        free = draw(model, embeds, **arguments | {"generator": seeded(*range(5))})
        assert torch.equal(free.audio_codes, bounded.audio_codes)
        torch.testing.assert_close(torch.cat(free.logits, 1), torch.cat(bounded.logits, 1), atol=1e-4, rtol=1e-4)


def test_one_draw_is_the_one_of_multinomial():
    """Noise in one piece gives exactly what `torch.multinomial` draws of the same state."""
    scores = 3 * torch.randn(5, 7, 200, generator=torch.Generator().manual_seed(0))
    scores[..., 100:].masked_fill_(scores[..., 100:] < 0, -torch.inf)
    for seed in range(20):
        ours = AarGenerationMixin._choose(scores, True, torch.Generator().manual_seed(seed))
        theirs = torch.multinomial(scores.softmax(-1).flatten(0, 1), 1, generator=torch.Generator().manual_seed(seed))
        assert torch.equal(ours.flatten(), theirs.flatten())


def test_draws_come_scale_by_scale(model):
    """One generator is used up in the order of the scales, all rows of a scale at once."""
    output = draw(model, random_embeds(2), seed=3, num_windows=2)
    generator = torch.Generator().manual_seed(3)
    for scores, codes in zip(output.scores, output.audio_codes.flatten(0, 1).split(SCALES, dim=1), strict=True):
        expected = torch.multinomial(scores.softmax(-1).flatten(0, 1), 1, generator=generator)
        assert torch.equal(codes.flatten(), expected.flatten())


def test_draws_follow_the_distribution(model):
    """Over many sounds the first token occurs as often as its probability says."""
    output = draw(model, random_embeds(1), num_return_sequences=2000, max_batch_rows=2000, guidance_scale=0.0)
    expected = output.scores[0][0, 0].softmax(-1)
    counts = torch.bincount(output.audio_codes[:, 0, 0], minlength=16) / 2000
    assert (counts - expected).abs().max() < 0.04
    assert (counts > 0).sum() > 3


# --- guidance --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("guidance_scale", "rows"), [(0.0, 3), (None, 6), (2.5, 6)])
def test_rows_of_a_pass(model, guidance_scale, rows):
    """Unconditional rows join the batch for guidance, and for nothing else."""
    seen = []
    hook = model.model.norm.register_forward_hook(lambda module, args, output: seen.append(output.shape[:2]))
    arguments = {} if guidance_scale is None else {"guidance_scale": guidance_scale}
    model.generate(conditioning_embeds=random_embeds(3), **arguments)
    hook.remove()
    assert seen == [(rows, size) for size in SCALES]


@pytest.mark.parametrize("guidance_scale", [0.0, 0.5, 4.0])
def test_guidance_is_a_ramp_over_the_scales(model, guidance_scale):
    """logits = (1 + t)·conditional − t·unconditional with t = guidance · s / (S − 1)."""
    embeds = random_embeds(2)
    output = draw(model, embeds, guidance_scale=guidance_scale, num_windows=2)
    conditional = teacher_forced(model, embeds, output.audio_codes)
    unconditional = teacher_forced(model, model.model.uncond_embedding.expand(2, -1), output.audio_codes)
    assert (conditional[3] - unconditional[3]).abs().max() > 0.1
    for scale, logits in enumerate(output.logits):
        weight = guidance_scale * scale / 3
        expected = (1 + weight) * conditional[scale] - weight * unconditional[scale]
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_negative_conditioning(model, build_generator):
    """It takes the place of "no conditioning": one for all, or one per sound; without guidance it is refused."""
    embeds, negative = random_embeds(2), random_embeds(2, seed=9)
    for count in (1, 2):
        output = draw(model, embeds, negative_conditioning_embeds=negative[:count], num_return_sequences=2)
        repeated = embeds.repeat_interleave(2, 0)
        conditional = teacher_forced(model, repeated, output.audio_codes)
        away = (negative if count == 2 else negative[:1].expand(2, -1)).repeat_interleave(2, 0)
        unconditional = teacher_forced(model, away, output.audio_codes)
        torch.testing.assert_close(output.logits[3], 5 * conditional[3] - 4 * unconditional[3], atol=2e-3, rtol=1e-3)
    with pytest.raises(ValueError, match="no effect without guidance"):
        draw(model, embeds, guidance_scale=0.0, negative_conditioning_embeds=negative)
    with pytest.raises(ValueError, match="Got 2 negative conditionings for 3 to generate"):
        draw(model, random_embeds(3), negative_conditioning_embeds=negative)
    with pytest.raises(ValueError, match="Got 2 negative conditionings for 4 to generate"):
        draw(model, random_embeds(4), negative_conditioning_embeds=negative)

    labelled = build_generator(conditioning="label", labels=["Dog", "Rain"]).requires_grad_(False)
    ids = {
        "input_ids": torch.tensor([[0]]),
        "do_sample": False,
        "return_dict_in_generate": True,
        "output_logits": True,
    }
    ours = labelled.generate(**ids, negative_input_ids=torch.tensor([[1]]))
    table = labelled.model.label_embeddings.weight
    theirs = labelled.generate(**ids, negative_conditioning_embeds=table[[1]])
    assert torch.equal(torch.cat(ours.logits, 1), torch.cat(theirs.logits, 1))
    assert not torch.equal(torch.cat(ours.logits, 1), torch.cat(labelled.generate(**ids).logits, 1))


def test_guidance_of_one_warns_once(model, caplog):
    """1.0 means "off" in the library's other models, so it is worth a word, but only one."""
    logging.enable_propagation()
    logging.get_logger("transformers").warning_once.cache_clear()
    for guidance_scale in (0.0, 0.99, 1.0, 1.0, 1.0):
        model.generate(conditioning_embeds=random_embeds(1), guidance_scale=guidance_scale)
    logging.disable_propagation()
    messages = [record.getMessage() for record in caplog.records if "guidance_scale=1.0" in record.getMessage()]
    assert len(messages) == 1 and "0.0 here" in messages[0]


def test_a_model_without_conditioning(build_generator):
    """It generates with no arguments, guidance off by default, and refuses guidance."""
    model = build_generator(conditioning="none").requires_grad_(False)
    assert model.generate().shape == (1, 1, 1920)
    assert model.generate(input_ids=torch.zeros(3, 1, dtype=torch.long)).shape == (3, 1, 1920)
    assert model.generate(num_return_sequences=2).shape == (2, 1, 1920)
    assert model.generate(audio_codes=torch.zeros(2, 1, 3, dtype=torch.long)).shape == (2, 1, 1920)
    with pytest.raises(ValueError, match="can't be guided; set `guidance_scale` to 0"):
        model.generate(guidance_scale=3.0)
    with pytest.raises(ValueError, match="leave out `conditioning_embeds`"):
        model.generate(conditioning_embeds=random_embeds(1))


@pytest.mark.parametrize("adaln", ["per_block", "shared", "none"])
@pytest.mark.parametrize("unguided_scales", [1, 3])
def test_unguided_scales(build_generator, adaln, unguided_scales):
    """The last scales go through the model, and come out, without the unconditional rows; those before are guided."""
    model = build_generator(adaln=adaln).requires_grad_(False)
    seen = []
    model.model.norm.register_forward_hook(lambda module, args, output: seen.append(len(output)))
    output = draw(model, random_embeds(2), unguided_scales=unguided_scales, num_windows=2)
    assert seen == [8] * (4 - unguided_scales) + [4] * unguided_scales
    conditional = teacher_forced(model, random_embeds(2), output.audio_codes)
    unconditional = teacher_forced(model, model.model.uncond_embedding.expand(2, -1), output.audio_codes)
    for scale, logits in enumerate(output.logits):
        weight = 4 * scale / 3 if scale < 4 - unguided_scales else 0
        expected = (1 + weight) * conditional[scale] - weight * unconditional[scale]
        torch.testing.assert_close(logits, expected, atol=1e-3, rtol=1e-3)


def test_all_scales_unguided_is_no_guidance(model):
    """And none of them unguided is the default, bit for bit."""
    embeds = random_embeds(3)
    greedy = {"do_sample": False, "seed": None}
    unguided = draw(model, embeds, guidance_scale=0.0, **greedy)
    assert torch.equal(draw(model, embeds, unguided_scales=4, **greedy).audio_codes, unguided.audio_codes)
    guided, same = draw(model, embeds), draw(model, embeds, unguided_scales=0)
    assert torch.equal(guided.audio, same.audio)
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(guided.logits, same.logits, strict=True))


def test_unguided_scales_around_given_ones(model):
    """Given scales may be among the unguided ones."""
    source = draw(model, random_embeds(2)).audio_codes
    output = draw(model, random_embeds(2), audio_codes=source[..., :7], unguided_scales=3)
    assert torch.equal(output.audio_codes[..., :7], source[..., :7])
    conditional = teacher_forced(model, random_embeds(2), output.audio_codes)
    torch.testing.assert_close(output.logits[0], conditional[3], atol=1e-3, rtol=1e-3)


# --- temperature, top-k, top-p ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"temperature": 0.7, "top_k": 5, "top_p": 0.8},
        {"temperature": 1.0, "top_k": 0, "top_p": 1.0},
        {"temperature": 2.0, "top_k": 0, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 3, "top_p": 1.0},
        {"temperature": 1.0, "top_k": 5000, "top_p": 1.0},
    ],
)
def test_scores_are_the_librarys_warped_logits(model, arguments):
    """Scores are the guided logits after the library's temperature, top-k and top-p; draws stay within them."""
    output = draw(model, random_embeds(3), **arguments)
    for logits, scores, start in zip(output.logits, output.scores, STARTS, strict=True):
        expected = logits.flatten(0, 1)
        expected = TemperatureLogitsWarper(arguments["temperature"])(None, expected)
        if arguments["top_k"]:
            expected = TopKLogitsWarper(arguments["top_k"])(None, expected)
        if arguments["top_p"] < 1:
            expected = TopPLogitsWarper(arguments["top_p"])(None, expected)
        assert torch.equal(scores, expected.view_as(scores))
        codes = output.audio_codes[:, 0, start : start + logits.shape[1]]
        assert torch.isfinite(scores.gather(-1, codes[..., None])).all()
    kept = torch.isfinite(torch.cat(output.scores, 1)).sum(-1)
    assert kept.max() <= (arguments["top_k"] or 16)
    assert (kept.min() < 16) == (0 < arguments["top_k"] < 16 or arguments["top_p"] < 1)


@pytest.mark.parametrize("top_k", [1, 3, 15, 16, 17, 100])
def test_top_k_is_the_librarys(top_k):
    """Bit for bit, with ties at the threshold."""
    scores = torch.randn(5, 16, generator=torch.Generator().manual_seed(0)).round(decimals=1)
    assert torch.equal(AarTopKWarper(top_k)(None, scores), TopKLogitsWarper(top_k)(None, scores))


@pytest.mark.parametrize("arguments", [{"temperature": 0.0}, {"top_p": 1.5}, {"top_k": -1}])
def test_impossible_sampling_is_refused(model, arguments):
    with pytest.raises(ValueError):
        draw(model, random_embeds(1), **arguments)


# --- windows and given codes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("overlap", "length"), [(0.0, 5760), (0.25, 4800)])
def test_windows_are_joined_by_the_codec(build_generator, overlap, length):
    """Several windows are independent draws, and sound as the codec joins them."""
    model = build_generator(codec_fields={"overlap": overlap}).requires_grad_(False)
    output = draw(model, random_embeds(2), num_windows=3)
    assert output.audio_codes.shape == (2, 3, 13) and output.audio.shape == (2, 1, length)
    assert output.lengths.tolist() == [length, length]
    torch.testing.assert_close(output.audio, model.codec_model.decode(output.audio_codes).audio_values)
    assert not torch.equal(output.audio_codes[:, 0], output.audio_codes[:, 1])


def test_given_scales_are_kept(model):
    """Codes of coarse scales stay, and what follows is drawn around them."""
    embeds = random_embeds(2)
    source = draw(model, embeds, num_windows=2).audio_codes
    for scales, tokens in ((1, 1), (2, 3), (3, 7)):
        output = draw(model, embeds, seed=5, audio_codes=source[..., :tokens])
        assert output.audio_codes.shape == (2, 2, 13)
        assert torch.equal(output.audio_codes[..., :tokens], source[..., :tokens])
        assert not torch.equal(output.audio_codes[..., tokens:], source[..., tokens:])
        assert len(output.scores) == len(output.logits) == 4 - scales
        conditional = teacher_forced(model, embeds, output.audio_codes)
        unconditional = teacher_forced(model, model.model.uncond_embedding.expand(2, -1), output.audio_codes)
        expected = 5 * conditional[3] - 4 * unconditional[3]
        torch.testing.assert_close(output.logits[-1], expected, atol=2e-3, rtol=1e-3)
        torch.testing.assert_close(output.audio, model.codec_model.decode(output.audio_codes).audio_values)


def test_given_codes_for_several_sounds(model):
    """One given sound serves all, or one per conditioning serves its returned sequences."""
    source = draw(model, random_embeds(2)).audio_codes[..., :3]
    shared = draw(model, random_embeds(2), audio_codes=source[:1], num_return_sequences=2).audio_codes[..., :3]
    assert torch.equal(shared, source[:1].expand(4, -1, -1))
    own = draw(model, random_embeds(2), audio_codes=source, num_return_sequences=2).audio_codes[..., :3]
    assert torch.equal(own, source.repeat_interleave(2, dim=0))


def test_all_scales_given_is_decoding(model):
    source = draw(model, random_embeds(2), num_windows=2).audio_codes
    output = draw(model, random_embeds(2, seed=4), audio_codes=source)
    assert torch.equal(output.audio_codes, source) and output.scores == () == output.logits
    torch.testing.assert_close(output.audio, model.codec_model.decode(source).audio_values)


@pytest.mark.parametrize(
    ("codes", "message"),
    [
        (torch.zeros(1, 1, 2, dtype=torch.long), "whole scales"),
        (torch.zeros(1, 3, dtype=torch.long), "must have the shape"),
        (torch.full((1, 1, 3), 16), "between 0 and 15"),
        (torch.zeros(2, 1, 3, dtype=torch.long), "Got 2 sounds in `audio_codes` for 3"),
        (torch.zeros(6, 1, 3, dtype=torch.long), "Got 6 sounds in `audio_codes` for 3"),
    ],
)
def test_bad_given_codes_are_refused(model, codes, message):
    with pytest.raises(ValueError, match=message):
        draw(model, random_embeds(3), audio_codes=codes)


@pytest.mark.parametrize("max_scales", [1, 3, 4])
@pytest.mark.parametrize("arguments", [{}, {"unguided_scales": 2}, {"num_windows": 3, "max_batch_rows": 6}])
def test_stopping_early(model, max_scales, arguments):
    """The first scales are those of the whole run, and sound as the codec decodes them."""
    whole = draw(model, random_embeds(2), generator=seeded(1, 2), **arguments)
    output = draw(model, random_embeds(2), generator=seeded(1, 2), max_scales=max_scales, **arguments)
    assert torch.equal(output.audio_codes, whole.audio_codes[..., : sum(SCALES[:max_scales])])
    assert len(output.scores) == len(output.logits) == max_scales
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(output.logits, whole.logits))
    decoded = model.codec_model.decode(whole.audio_codes, max_scales=max_scales).audio_values
    torch.testing.assert_close(output.audio, decoded)
    assert (max_scales == 4) == torch.equal(output.audio, whole.audio)


def test_stopping_after_given_scales(model):
    """Given scales count; as many of them as `max_scales` are decoded, and more are refused."""
    source = draw(model, random_embeds(2)).audio_codes
    output = draw(model, random_embeds(2), audio_codes=source[..., :3], max_scales=3)
    assert output.audio_codes.shape == (2, 1, 7) and len(output.logits) == 1
    assert torch.equal(output.audio_codes[..., :3], source[..., :3])
    decoded = draw(model, random_embeds(2), audio_codes=source[..., :7], max_scales=3)
    assert decoded.logits == () and torch.equal(decoded.audio_codes, source[..., :7])
    with pytest.raises(ValueError, match="holds 3 scales, more than `max_scales`, 2"):
        draw(model, random_embeds(2), audio_codes=source[..., :7], max_scales=2)


def test_gumbel_smoothing(model):
    """Smoothing changes the sound and not the kind of the codes: they are hard choices that don't decode to it."""
    embeds = random_embeds(2)
    smooth, hard = draw(model, embeds, gumbel_smoothing=True), draw(model, embeds)
    assert smooth.audio_codes.dtype == torch.long and smooth.audio_codes.shape == hard.audio_codes.shape
    assert torch.equal(smooth.audio_codes[..., 0], hard.audio_codes[..., 0])
    decoded = model.codec_model.decode(smooth.audio_codes).audio_values
    assert (smooth.audio - decoded).abs().max() > 1e-3
    torch.testing.assert_close(hard.audio, model.codec_model.decode(hard.audio_codes).audio_values)


def test_gumbel_smoothing_is_its_formula(model):
    """softmax((logits · (1 + r) + Gumbel) / τ) mixes code vectors, with τ = max(0.27 · (1 − 0.95 r), 0.005)."""
    output = draw(model, random_embeds(1), gumbel_smoothing=True, generator=seeded(5))
    quantizer, (generator,) = model.codec_model.quantizer, seeded(5)
    f_hat = quantizer.empty_f_hat(1)
    for scale, scores in enumerate(output.scores):
        progress = scale / (len(SCALES) - 1)
        # the first noise chooses the codes
        _, noise = (torch.empty_like(scores).exponential_(generator=generator) for _ in range(2))
        temperature = max(0.27 * (1 - 0.95 * progress), 0.005)
        weights = ((scores * (1 + progress) - noise.log()) / temperature).softmax(-1)
        f_hat, _ = quantizer.accumulate(f_hat, weights @ quantizer.codebook[scale], scale)
    torch.testing.assert_close(output.audio, model.codec_model.decode_f_hat(f_hat[:, None]), atol=1e-5, rtol=1e-4)


# --- output ----------------------------------------------------------------------------------------------------------


def test_output(model):
    plain = model.generate(conditioning_embeds=random_embeds(2), generator=seeded(1, 2))
    assert isinstance(plain, torch.Tensor) and plain.shape == (2, 1, 1920) and not plain.requires_grad
    output = draw(model, random_embeds(2), generator=seeded(1, 2), output_scores=False, output_logits=False)
    assert isinstance(output, AarGenerateOutput) and set(output) == {"audio", "audio_codes", "lengths"}
    assert torch.equal(output.audio, plain)
    assert output.audio_codes.shape == (2, 1, 13) and output.audio_codes.dtype == torch.long
    assert output.lengths.tolist() == [1920, 1920] and output.lengths.dtype == torch.long
    full = draw(model, random_embeds(2), num_windows=2, num_return_sequences=3)
    assert set(full) == {"audio", "audio_codes", "lengths", "scores", "logits"}
    for entries in (full.scores, full.logits):
        assert [entry.shape for entry in entries] == [(12, size, 16) for size in SCALES]


class Recorder(BaseStreamer):
    """Keeps what a streamer receives, and fails at a scale when it is told to."""

    def __init__(self, fail_at: int | None = None):
        self.scales, self.ended, self.fail_at = [], 0, fail_at

    def put(self, value):
        if len(self.scales) == self.fail_at:
            raise RuntimeError("the listener has gone")
        self.scales.append(value)

    def end(self):
        self.ended += 1


def test_streamer_receives_every_scale(build_generator, codec_fields):
    """Sixteen scales, in order, given ones included; then the end."""
    model = build_generator(codec_fields).requires_grad_(False)
    streamer = Recorder()
    output = draw(model, random_embeds(2), num_windows=2, streamer=streamer)
    assert [entry.shape for entry in streamer.scales] == [(2, 2, size) for size in model.config.codec_config.scales]
    assert len(streamer.scales) == 16 and streamer.ended == 1
    assert torch.equal(torch.cat(streamer.scales, dim=-1), output.audio_codes)
    again = Recorder()
    prefix = output.audio_codes[..., :3]
    continued = draw(model, random_embeds(2), audio_codes=prefix, streamer=again)
    assert torch.equal(torch.cat(again.scales, dim=-1), continued.audio_codes)


def test_streamer_needs_one_batch(model):
    with pytest.raises(ValueError, match="raise `max_batch_rows`, which is 3"):
        draw(model, random_embeds(2), num_windows=2, max_batch_rows=3, streamer=Recorder())


def test_previews(model):
    """The preview streamer decodes what is known after each scale; the last preview is the sound."""
    previews = []
    streamer = AarPreviewStreamer(model.codec_model, lambda scales, audio: previews.append((scales, audio)))
    for _ in range(2):
        previews.clear()
        output = draw(model, random_embeds(2), num_windows=2, streamer=streamer)
        assert [scales for scales, _ in previews] == [1, 2, 3, 4]
        for (_, audio), tokens in zip(previews, (1, 3, 7, 13), strict=True):
            decoded = model.codec_model.decode(output.audio_codes[..., :tokens]).audio_values
            torch.testing.assert_close(audio, decoded)
        torch.testing.assert_close(previews[-1][1], output.audio)


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_beams": 4},
        {"repetition_penalty": 1.2},
        {"no_repeat_ngram_size": 3},
        {"stop_strings": "x"},
        {"min_new_tokens": 5},
        {"typical_p": 0.9},
        {"min_p": 0.1},
        {"bad_words_ids": [[1]]},
        {"penalty_alpha": 0.6},
        {"cache_implementation": "static"},
        {"prompt": "Dog"},
        {"guidance": 3.0},
        {"logits_processor": [lambda ids, scores: scores]},
        {"past_key_values": "cache"},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_meaningless_arguments_are_refused_by_name(model, arguments):
    name = next(iter(arguments))
    with pytest.raises(ValueError, match=f"`{name}`"):
        model.generate(conditioning_embeds=random_embeds(1), **arguments)
    if name in GenerationConfig().to_dict():
        with pytest.raises(ValueError, match=f"`{name}`"):
            model.generate(conditioning_embeds=random_embeds(1), generation_config=GenerationConfig(**arguments))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"num_windows": 0}, "num_windows"),
        ({"num_windows": 1.5}, "num_windows"),
        ({"max_batch_rows": 0}, "max_batch_rows"),
        ({"num_return_sequences": 0}, "num_return_sequences"),
        ({"guidance_scale": -1.0}, "guidance_scale"),
        ({"unguided_scales": 5}, "unguided_scales"),
        ({"unguided_scales": -1}, "unguided_scales"),
        ({"unguided_scales": 0.5}, "unguided_scales"),
        ({"unguided_scales": 1, "guidance_scale": 0.0}, "unguided_scales"),
        ({"max_scales": 0}, "max_scales"),
        ({"max_scales": 5}, "max_scales"),
        ({"compile_config": CompileConfig(dynamic=True)}, "dynamic"),
        ({"compile_config": {"mode": "default"}}, "compile_config"),
    ],
)
def test_impossible_values_are_refused(model, arguments, name):
    with pytest.raises(ValueError, match=f"`{name}`"):
        model.generate(conditioning_embeds=random_embeds(1), **arguments)


@pytest.mark.parametrize(
    "arguments",
    [{"max_new_tokens": 256}, {"max_length": 20}, {"pad_token_id": 0}, {"num_beams": 1, "repetition_penalty": 1.0}],
    ids=lambda arguments: next(iter(arguments)),
)
def test_what_pipelines_pass_is_tolerated(model, arguments):
    """As arguments, inside a configuration, and with no effect."""
    expected = draw(model, random_embeds(1)).audio
    assert torch.equal(draw(model, random_embeds(1), **arguments).audio, expected)
    config = GenerationConfig.from_dict(model.generation_config.to_dict() | arguments)
    assert torch.equal(draw(model, random_embeds(1), generation_config=config).audio, expected)


def test_a_configuration_of_ones_own(model):
    """Its fields count, arguments count more, and neither it nor the model's is changed."""
    config = GenerationConfig(do_sample=True, num_windows=3, guidance_scale=0.0, top_k=4, max_batch_rows=2)
    ours, models = config.to_dict(), model.generation_config.to_dict()
    output = draw(model, random_embeds(1), generation_config=config)
    assert output.audio_codes.shape == (1, 3, 13)
    assert torch.isfinite(output.scores[2]).sum(-1).max() == 4
    output = draw(model, random_embeds(1), generation_config=config, num_windows=2, top_k=2)
    assert output.audio_codes.shape == (1, 2, 13) and torch.isfinite(output.scores[2]).sum(-1).max() == 2
    assert config.to_dict() == ours and model.generation_config.to_dict() == models


def test_saved_defaults_are_used(build_generator, tmp_path):
    """generation_config.json holds the defaults, custom ones too; whoever edits it changes what `generate` does."""
    model = build_generator()
    assert {name: getattr(model.generation_config, name) for name in ("guidance_scale", "top_k", "top_p")} == {
        "guidance_scale": 4.0,
        "top_k": 900,
        "top_p": 0.95,
    }
    model.generation_config.update(num_windows=2, guidance_scale=1.5, top_k=3)
    model.generation_config.max_batch_rows = 7
    model.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "generation_config.json").read_text())
    assert stored["num_windows"] == 2 and stored["max_batch_rows"] == 7 and stored["do_sample"] is True
    loaded = AarForConditionalGeneration.from_pretrained(tmp_path)
    assert loaded.generation_config.num_windows == 2 and loaded.generation_config.max_batch_rows == 7
    output = draw(loaded, random_embeds(1))
    assert output.audio_codes.shape == (1, 2, 13) and torch.isfinite(output.scores[2]).sum(-1).max() == 3
    explicit = {"num_windows": 2, "guidance_scale": 1.5, "top_k": 3}
    fresh = build_generator()
    assert torch.equal(output.audio_codes, draw(fresh, random_embeds(1), **explicit).audio_codes)
    assert not torch.equal(output.logits[3], draw(fresh, random_embeds(1), num_windows=2, top_k=3).logits[3])
    stored |= {"top_k": 1, "num_windows": 1}
    (tmp_path / "generation_config.json").write_text(json.dumps(stored))
    edited = AarForConditionalGeneration.from_pretrained(tmp_path)
    greedy = draw(fresh, random_embeds(1), do_sample=False, guidance_scale=1.5)
    assert torch.equal(draw(edited, random_embeds(1)).audio_codes, greedy.audio_codes)


# --- state and speed -------------------------------------------------------------------------------------------------


def test_an_exception_leaves_nothing_behind(build_generator):
    """After a call that broke off in the middle the next one, and teacher forcing, are those of a fresh model."""
    model, fresh = build_generator(), build_generator()
    with pytest.raises(RuntimeError, match="gone"):
        draw(model, random_embeds(2, seed=8), streamer=Recorder(fail_at=2))
    assert model.state_dict().keys() == fresh.state_dict().keys()
    for arguments in ({}, {"num_windows": 2, "guidance_scale": 0.0}):
        ours, theirs = draw(model, random_embeds(2), **arguments), draw(fresh, random_embeds(2), **arguments)
        assert torch.equal(ours.audio_codes, theirs.audio_codes) and torch.equal(ours.audio, theirs.audio)
    codes = ours.audio_codes
    after = model(conditioning_embeds=random_embeds(2), audio_codes=codes).logits
    assert torch.equal(after, fresh(conditioning_embeds=random_embeds(2), audio_codes=codes).logits)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_in_training(build_generator, checkpointing):
    """`generate` takes no gradients, leaves the mode and the codebooks alone, and keeps its cache."""
    model = build_generator(drop_path_rate=0.0).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    output = draw(model, random_embeds(2))
    assert model.training and model.model.training
    assert not output.audio.requires_grad and not output.logits[0].requires_grad
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(output.audio_codes, draw(model.eval(), random_embeds(2)).audio_codes)


@pytest.mark.parametrize("adaln", ["per_block", "shared", "none"])
@pytest.mark.parametrize("arguments", [{}, {"do_sample": False}, {"gumbel_smoothing": True}, {"generator": "list"}])
def test_the_loop_never_waits_for_the_device(build_generator, host_sync_counter, adaln, arguments):
    """From the first scale's pass to the last no number is read back to the host; arguments are checked before."""
    model = build_generator(adaln=adaln, num_hidden_layers=1).requires_grad_(False)
    if "generator" in arguments:
        arguments = {"generator": seeded(1, 2)}
    draw(model, random_embeds(2), **arguments)
    loop, calls = model._generate_rows, []

    def watched(*args):
        calls.append(args)
        with host_sync_counter:
            return loop(*args)

    model._generate_rows = watched
    draw(model, random_embeds(2), num_windows=2, **arguments)
    assert len(calls) == 1
    assert host_sync_counter.operations == []


@pytest.mark.parametrize("adaln", ["per_block", "shared"])
def test_modulation_is_computed_once_per_call(build_generator, adaln):
    """The conditioning goes through its layers once, whatever the number of scales."""
    model = build_generator(adaln=adaln).requires_grad_(False)
    calls = []
    watched = [model.model.conditioning_mlp, model.model.norm.modulation]
    watched += [layer.modulation for layer in model.model.layers] if adaln == "per_block" else []
    watched += [model.model.shared_modulation] if adaln == "shared" else []
    for module in watched:
        module.register_forward_hook(lambda module, args, output: calls.append(module))
    draw(model, random_embeds(2))
    assert sorted(map(id, calls)) == sorted(map(id, watched))


@pytest.mark.parametrize(
    "pyramid",
    [
        {"scales": [6], "phi_kernel_sizes": [3]},
        {"scales": [6, 6, 6], "phi_kernel_sizes": []},
        {"scales": [2, 6, 6], "phi_kernel_sizes": [3]},
    ],
    ids=["single", "residual", "start-of-two"],
)
def test_other_pyramids(build_generator, pyramid):
    """A single scale is guided in full; equal scales and a first scale of several tokens work."""
    model = build_generator(codec_fields=pyramid).requires_grad_(False)
    scales = pyramid["scales"]
    embeds = random_embeds(2)
    output = draw(model, embeds, num_windows=2)
    assert output.audio_codes.shape == (2, 2, sum(scales)) and output.audio.shape == (2, 1, 3840)
    conditional = model(conditioning_embeds=embeds, audio_codes=output.audio_codes).logits
    unconditional = model(
        conditioning_embeds=model.model.uncond_embedding.expand(2, -1), audio_codes=output.audio_codes
    ).logits
    expected = (5 * conditional - 4 * unconditional)[:, -6:]
    torch.testing.assert_close(output.logits[-1], expected, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(output.audio, model.codec_model.decode(output.audio_codes).audio_values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(build_generator, dtype):
    """Short models draw from fp32 scores, and their waveforms are fp32."""
    model = build_generator().to(dtype).requires_grad_(False)
    output = draw(model, random_embeds(2), num_windows=2)
    assert {entry.dtype for entry in (*output.scores, *output.logits)} == {torch.float32}
    assert output.audio.dtype == torch.float32 and torch.isfinite(output.audio).all()
    assert torch.equal(output.audio_codes, draw(model, random_embeds(2), num_windows=2).audio_codes)


# --- compilation -----------------------------------------------------------------------------------------------------


@pytest.fixture
def graphs():
    """A compiler that only counts: the graphs that it is given run as they are, and one graph must hold a pass."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    compiled_config = CompileConfig(fullgraph=True, backend=backend, mode="default")
    return compiled, compiled_config


@pytest.mark.parametrize(
    "arguments",
    [{}, {"unguided_scales": 2}, {"max_scales": 3}, {"num_windows": 3, "max_batch_rows": 6}],
    ids=lambda arguments: "-".join(arguments) or "plain",
)
def test_each_scale_is_compiled_once(build_generator, graphs, arguments):
    """Later calls use the same graphs, and give what comes without, but for rounding."""
    model, (compiled, config) = build_generator(num_hidden_layers=1).requires_grad_(False), graphs
    for seed in (1, 2):
        embeds = random_embeds(3, seed)
        expected = draw(model, embeds, **arguments)
        output = draw(model, embeds, compile_config=config, **arguments)
        assert torch.equal(output.audio_codes, expected.audio_codes)
        for logits, expected_logits in zip(output.logits, expected.logits, strict=True):
            torch.testing.assert_close(logits, expected_logits, atol=1e-4, rtol=1e-4)
        assert len(compiled) == arguments.get("max_scales", 4)


def test_many_batch_sizes_are_compiled(build_generator, graphs):
    """More graphs than PyTorch keeps of a function by default, and all of them stay."""
    model, (compiled, config) = build_generator(num_hidden_layers=1).requires_grad_(False), graphs
    arguments = {"guidance_scale": 0.0, "compile_config": config}
    for count in (1, 2, 3, 1, 2, 3):
        draw(model, random_embeds(count), **arguments)
    assert len(compiled) == 3 * 4
    draw(model, random_embeds(2), audio_codes=torch.zeros(1, 1, 3, dtype=torch.long), **arguments)
    assert len(compiled) == 3 * 4


def test_compiled_calls_within_each_other(build_generator, graphs):
    """A call from a streamer doesn't write into the cache of the call that it interrupts; nor does one that failed."""
    model, (_, config) = build_generator(num_hidden_layers=1).requires_grad_(False), graphs
    expected = draw(model, random_embeds(2))

    class Caller(BaseStreamer):
        def put(self, value):
            draw(model, random_embeds(2, seed=5), compile_config=config)

        def end(self):
            pass

    with pytest.raises(RuntimeError, match="gone"):
        draw(model, random_embeds(2, seed=8), compile_config=config, streamer=Recorder(fail_at=2))
    for streamer in (Caller(), None):
        output = draw(model, random_embeds(2), compile_config=config, streamer=streamer)
        assert torch.equal(output.audio_codes, expected.audio_codes)


def test_compiled_in_inference_mode_and_outside(build_generator, graphs):
    model, (_, config) = build_generator(num_hidden_layers=1).requires_grad_(False), graphs
    expected = draw(model, random_embeds(2))
    for inference in (True, False, True):
        with torch.inference_mode(inference):
            output = draw(model, random_embeds(2), compile_config=config)
            assert torch.equal(output.audio_codes, expected.audio_codes)


def test_a_compiled_model_can_be_copied_and_freed(build_generator, graphs):
    """Graphs and caches belong to one model: a changed copy has its own, and nothing keeps the model alive."""
    model, (_, config) = build_generator(num_hidden_layers=1).requires_grad_(False), graphs
    draw(model, random_embeds(2), compile_config=config)
    other = copy.deepcopy(model)
    other.lm_head.weight.neg_()
    expected = draw(other, random_embeds(2))
    assert torch.equal(draw(other, random_embeds(2), compile_config=config).audio_codes, expected.audio_codes)
    assert not torch.equal(draw(model, random_embeds(2), compile_config=config).audio_codes, expected.audio_codes)
    freed = weakref.ref(model)
    del model
    gc.collect()
    assert freed() is None


@pytest.mark.parametrize("when", ["at once", "in a scale"])
def test_generation_goes_on_where_compilation_fails(build_generator, caplog, when):
    """With the same result, and one warning that names the reason."""
    compiled = []

    def backend(graph, inputs):
        compiled.append(graph)
        if when == "at once" or len(compiled) == 3:
            raise OSError("there is no compiler")
        return graph.forward

    model = build_generator(num_hidden_layers=1).requires_grad_(False)
    config = CompileConfig(backend=backend, mode="default")
    expected = draw(model, random_embeds(2))
    logging.enable_propagation()
    outputs = [draw(model, random_embeds(2), compile_config=config) for _ in range(2)]
    logging.disable_propagation()
    for output in outputs:
        assert torch.equal(output.audio_codes, expected.audio_codes)
        assert torch.equal(output.audio, expected.audio)
    messages = [record.getMessage() for record in caplog.records if "torch.compile" in record.getMessage()]
    assert len(messages) == 1 and "there is no compiler" in messages[0]
    assert len(compiled) == (1 if when == "at once" else 3)


def test_errors_of_the_model_are_not_the_compilers(build_generator, graphs):
    """What fails without compilation, too, is not hidden by going on without."""
    model, (_, config) = build_generator(num_hidden_layers=1).requires_grad_(False), graphs
    model.lm_head = torch.nn.Linear(3, 16)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        draw(model, random_embeds(1), compile_config=config)


@pytest.mark.slow
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_compiled_by_inductor(build_generator, dtype, tolerance):
    """
    As anyone would call it: logits agree with those without compilation to the dtype's rounding, relative to their
    spread, and so do greedy tokens, unless the two most likely are as close as that.
    """
    model = build_generator(codec_fields={"scales": [1, 6]}).to(dtype).requires_grad_(False)
    arguments = {"seed": None, "do_sample": False, "guidance_scale": 0.5}
    # a given first scale, so that the second doesn't depend on how the first is rounded
    arguments["audio_codes"] = torch.zeros(1, 1, 1, dtype=torch.long)
    expected = draw(model, random_embeds(2), **arguments)
    margin = tolerance * expected.logits[0].std()
    best, second = expected.logits[0].topk(2).values.unbind(-1)
    is_clear = best - second > 2 * margin
    assert is_clear.sum() > 6
    for _ in range(2):
        output = draw(model, random_embeds(2), compile_config=CompileConfig(fullgraph=True), **arguments)
        assert (output.logits[0] - expected.logits[0]).abs().max() < margin
        assert torch.equal(output.audio_codes[:, 0, 1:][is_clear], expected.audio_codes[:, 0, 1:][is_clear])


@pytest.mark.slow
def test_without_a_cpp_compiler(build_generator, tmp_path):
    """A machine without one generates all the same."""
    build_generator().save_pretrained(tmp_path / "model")
    script = f"""if True:
        import torch
        from transformers import CompileConfig
        from transformers_aar import AarForConditionalGeneration

        model = AarForConditionalGeneration.from_pretrained({str(tmp_path / "model")!r})
        arguments = dict(conditioning_embeds=torch.ones(1, 32), do_sample=False)
        compiled = model.generate(compile_config=CompileConfig(), **arguments)
        assert torch.equal(compiled, model.generate(**arguments))
    """
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    finished = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=300
    )
    assert finished.returncode == 0, finished.stderr
    assert finished.stderr.count("`torch.compile` failed, so generation goes on without it") == 1


@pytest.mark.parametrize("ids, mask", [([[2]], None), ([[-1]], None), ([[0, 2]], [[1, 1]]), ([[0]], [[0]])])
def test_ids_that_are_no_labels_are_refused(build_generator, ids, mask):
    """They would be answered with the sound of no label at all."""
    model = build_generator(conditioning="label", labels=["Dog", "Rain"]).requires_grad_(False)
    with pytest.raises(ValueError, match="at least one label per sound, 0 to 1"):
        model.generate(torch.tensor(ids), attention_mask=None if mask is None else torch.tensor(mask))


def test_autocast_leaves_the_quantizer_alone(model):
    """Under autocast, too, the returned codes decode to the returned sound."""
    with torch.autocast("cpu", torch.bfloat16):
        output = draw(model, random_embeds(2))
        decoded = model.codec_model.decode(output.audio_codes).audio_values
    torch.testing.assert_close(output.audio, decoded, rtol=0, atol=1e-5)
    f_hat, _ = model.codec_model.quantizer.accumulate(
        model.codec_model.quantizer.empty_f_hat(2), output.audio_codes[:, 0, : model.codec_model.config.scales[0]], 0
    )
    with torch.autocast("cpu", torch.bfloat16):
        again, _ = model.codec_model.quantizer.accumulate(
            model.codec_model.quantizer.empty_f_hat(2),
            output.audio_codes[:, 0, : model.codec_model.config.scales[0]],
            0,
        )
    assert torch.equal(f_hat, again)


def test_a_failing_streamer_can_be_used_again(model):
    """Its scales are dropped when the call ends, however it ends."""
    seen = []

    def fail_once(count, audio):
        seen.append(count)
        if len(seen) == 2:
            raise RuntimeError("the listener left")

    streamer = AarPreviewStreamer(model.codec_model, fail_once)
    with pytest.raises(RuntimeError, match="the listener left"):
        draw(model, random_embeds(1), streamer=streamer)
    draw(model, random_embeds(1), streamer=streamer)
    assert seen[2:] == list(range(1, model.codec_model.config.num_scales + 1))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"guidance_scale": float("nan")}, "`guidance_scale` must be 0"),
        ({"guidance_scale": float("inf")}, "`guidance_scale` must be 0"),
        ({"gumbel_smoothing": True, "do_sample": False}, "`gumbel_smoothing` is random"),
        ({"conditioning_embeds": torch.full((1, 32), float("nan"))}, "NaN or infinite"),
        (
            {"negative_conditioning_embeds": torch.zeros(1, 32), "negative_input_ids": torch.zeros(1, 1)},
            "Give one of `negative_conditioning_embeds`",
        ),
    ],
)
def test_senseless_arguments_are_refused(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        model.generate(**({"conditioning_embeds": random_embeds(1)} | arguments))
