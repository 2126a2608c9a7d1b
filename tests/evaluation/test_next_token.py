"""The next-token baseline: what predicts what, that its cache changes nothing, and that it learns."""

import math
from functools import partial

import pytest
import torch
from torch.utils.data import Dataset
from transformers import CompileConfig

from transformers_aar import AarConfig
from transformers_aar.evaluation.next_token import NextTokenModel, to_frame_major, to_level_major
from transformers_aar.training.aar_training import AarStage, collate_generation_examples, num_draws
from transformers_aar.training.arguments import AarArguments, LoopArguments
from transformers_aar.training.loop import make_accelerator
from transformers_aar.training.runs import make_processor
from transformers_aar.training.sampling import ExampleStream, ValidationSet
from transformers_aar.training.schedules import weight_decay_groups

NUM_LEVELS, NUM_FRAMES, CODEBOOK_SIZE = 3, 6, 16


@pytest.fixture(scope="module")
def build_baseline(build_codec):
    """Builds a NextTokenModel (64 wide, 2 blocks) for windows of 6 frames with 3 codes each, in evaluation mode."""

    def build(scales=(NUM_FRAMES,) * NUM_LEVELS, lively: bool = True, codec_fields: dict | None = None, **fields):
        codec = build_codec(**{"scales": list(scales), "phi_kernel_sizes": []} | (codec_fields or {}))
        sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "conditioning_dim": 32}
        torch.manual_seed(1)
        model = NextTokenModel(AarConfig(codec_config=codec.config.to_dict(), **sizes | fields)).eval()
        model.codec_model.load_state_dict(codec.state_dict())
        if lively:  # freshly initialised blocks are too close to identities to show anything
            with torch.no_grad():
                for parameter in (*model.model.parameters(), *model.lm_head.parameters()):
                    parameter.add_(0.2 * torch.randn(parameter.shape))
        return model

    return build


@pytest.fixture(scope="module")
def model(build_baseline) -> NextTokenModel:
    return build_baseline().requires_grad_(False)


def random_embeds(count: int) -> torch.Tensor:
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(0))


def random_codes(count: int) -> torch.LongTensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(CODEBOOK_SIZE, (count, NUM_LEVELS * NUM_FRAMES), generator=generator)


def generate(model, embeds: torch.Tensor, **kwargs):
    kwargs = {"return_dict_in_generate": True, "output_logits": True, "guidance_scale": 0.0} | kwargs
    return model.generate(conditioning_embeds=embeds, **kwargs)


# --- order -----------------------------------------------------------------------------------------------------------


def test_frames_come_one_after_the_other():
    levels = torch.tensor([[[1, 2, 3], [10, 20, 30]]])  # 2 levels of 3 frames
    frame_major = to_frame_major(levels.flatten(1), 2)
    assert frame_major.tolist() == [[1, 10, 2, 20, 3, 30]]
    assert torch.equal(to_level_major(frame_major, 2), levels.flatten(1))


def test_a_token_sees_those_before_it_and_no_other(model):
    """A changed code changes the predictions of all later tokens, and neither its own nor an earlier one."""
    codes, embeds = random_codes(1), random_embeds(1)
    before = to_frame_major(model(audio_codes=codes, conditioning_embeds=embeds).logits, NUM_LEVELS)[0]
    for slot in (0, 4, NUM_LEVELS * NUM_FRAMES - 2):
        changed = to_frame_major(codes, NUM_LEVELS).clone()
        changed[0, slot] = (changed[0, slot] + 1) % CODEBOOK_SIZE
        changed = to_level_major(changed, NUM_LEVELS)
        after = to_frame_major(model(audio_codes=changed, conditioning_embeds=embeds).logits, NUM_LEVELS)[0]
        differs = (after - before).abs().amax(-1) > 1e-5
        assert differs.tolist() == [index > slot for index in range(len(differs))]


def test_tokens_of_a_level_have_its_embedding(model):
    embeddings = model.model.embeddings
    _, slots = embeddings(torch.zeros(1, 64))
    of_levels = to_level_major((slots - embeddings.positions)[None], NUM_LEVELS)[0].unflatten(0, (NUM_LEVELS, -1))
    torch.testing.assert_close(of_levels, embeddings.levels.weight[:, None].expand_as(of_levels))


# --- generation ------------------------------------------------------------------------------------------------------


def test_cached_steps_equal_the_teacher_forced_pass(model):
    """Steps with a cache give the logits of one pass over all tokens, and greedy choices are their maxima."""
    embeds = random_embeds(3)
    output = generate(model, embeds, do_sample=False)
    codes = output.audio_codes[:, 0]
    expected = model(audio_codes=codes, conditioning_embeds=embeds).logits
    stepwise = to_level_major(torch.cat(output.logits, dim=1), NUM_LEVELS)
    torch.testing.assert_close(stepwise, expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(codes, expected.argmax(-1))
    assert len(codes.unique(dim=0)) == 3  # three sounds from three conditionings


def test_guidance_is_the_same_for_every_token(model):
    embeds = random_embeds(2)
    output = generate(model, embeds, guidance_scale=3.0, generator=torch.Generator().manual_seed(0))
    codes = output.audio_codes[:, 0]
    conditional = model(audio_codes=codes, conditioning_embeds=embeds).logits
    unconditional = model.model.uncond_embedding.expand(2, -1)
    unconditional = model(audio_codes=codes, conditioning_embeds=unconditional).logits
    stepwise = to_level_major(torch.cat(output.logits, dim=1), NUM_LEVELS)
    torch.testing.assert_close(stepwise, 4 * conditional - 3 * unconditional, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("guidance_scale", "expected"), [(0.0, 2), (3.0, 4)])
def test_guidance_doubles_the_rows_and_none_does_not(model, guidance_scale, expected):
    rows = []
    hook = model.lm_head.register_forward_pre_hook(lambda _, inputs: rows.append(inputs[0].shape[:2]))
    generate(model, random_embeds(2), guidance_scale=guidance_scale)
    hook.remove()
    assert rows == [(expected, 1)] * (NUM_LEVELS * NUM_FRAMES)


def test_the_codes_are_the_sound(model):
    """Codes come in the codec's order, and it decodes them to what `generate` returns."""
    output = generate(model, random_embeds(2), num_windows=2)
    assert output.audio_codes.shape == (2, 2, NUM_LEVELS * NUM_FRAMES)
    decoded = model.codec_model.decode(output.audio_codes).audio_values
    torch.testing.assert_close(output.audio, decoded)


def test_a_generator_per_sound_makes_it_independent_of_its_batch(model):
    embeds = random_embeds(2)
    generators = [torch.Generator().manual_seed(seed) for seed in (5, 6)]
    together = generate(model, embeds, guidance_scale=3.0, generator=generators).audio_codes
    alone = generate(model, embeds[1:], guidance_scale=3.0, generator=[torch.Generator().manual_seed(6)]).audio_codes
    assert torch.equal(together[1:], alone)
    assert torch.equal(generate(model, embeds, top_k=1).audio_codes, generate(model, embeds, top_k=1).audio_codes)


def test_a_second_takes_750_passes_and_no_wait_for_the_device(build_baseline, host_sync_counter):
    """Whatever waits for the device does so once per call, not once per token."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    syncs = {}
    for name, scales, seconds in (("second", [75] * 10, 1.0), ("short", [NUM_FRAMES] * NUM_LEVELS, 0.08)):
        model = build_baseline(scales, codec_fields={"window_length_s": seconds}, **sizes)
        passes = []
        model.lm_head.register_forward_hook(lambda *_, passes=passes: passes.append(1))
        with host_sync_counter:
            output = generate(model, random_embeds(1), guidance_scale=2.0)
        assert len(passes) == output.audio_codes.shape[-1] == (750 if name == "second" else 18)
        syncs[name] = len(host_sync_counter.operations)
        host_sync_counter.operations.clear()
        assert output.audio.shape[-1] == round(seconds * 24_000)
    assert syncs["second"] == syncs["short"]


@pytest.mark.parametrize("adaln", ["per_block", "shared", "none"])
def test_half_precision_generates(build_baseline, adaln):
    model = build_baseline(adaln=adaln).to(torch.bfloat16)
    output = generate(model, random_embeds(2), guidance_scale=2.0)
    assert output.logits[0].dtype == torch.float32 and output.audio.isfinite().all()


# --- training --------------------------------------------------------------------------------------------------------


class LabelledCodes(Dataset):
    """Two windows of codes with a label each, as examples of AAR's training."""

    def __len__(self) -> int:
        return 2

    def __getitem__(self, key: tuple[int, int]) -> dict:
        _, index = key
        example = {"codes": random_codes(2)[index], "labels": [index], "draws": torch.ones(num_draws(2))}
        return example | {"name": f"clip {index}", "skipped": []}


collate = partial(collate_generation_examples, conditioning="label")


@pytest.fixture
def untrained(build_baseline) -> NextTokenModel:
    """A new model of two labels, without lively weights."""
    return build_baseline(lively=False, conditioning="label", labels=["Dog", "Rain"], conditioning_dropout=0.0)


def test_it_learns_what_it_is_shown(untrained):
    """Two clips and their labels are learned by heart."""
    model, dataset = untrained, LabelledCodes()
    inputs = collate([dataset[0, index] for index in range(2)])["inputs"]
    optimizer = torch.optim.AdamW(weight_decay_groups(model.train()), lr=1e-2)
    losses = []
    for _ in range(60):
        losses.append(model(**inputs).loss)
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[0].item() == pytest.approx(math.log(CODEBOOK_SIZE), abs=0.05)
    assert losses[-1].item() < 0.2 * math.log(CODEBOOK_SIZE)
    model.eval()
    kwargs = {"do_sample": False, "guidance_scale": 0.0, "return_dict_in_generate": True}
    output = model.generate(input_ids=inputs["input_ids"], **kwargs)
    assert (output.audio_codes[:, 0] == inputs["audio_codes"]).float().mean() > 0.9


def test_the_stage_of_aar_trains_it(untrained, tmp_path):
    """Steps, figures per level and sounds come from the very training that AAR has."""
    loop = LoopArguments(str(tmp_path), max_steps=8, per_device_batch_size=2, learning_rate=1e-2, use_cpu=True)
    args = AarArguments(codec="codec", model_config={"conditioning": "label"}, ema_decay=0.5)
    accelerator = make_accelerator(loop)
    stream = ExampleStream(LabelledCodes(), collate, loop, accelerator, num_workers=0)
    held_out = ValidationSet(LabelledCodes(), collate, 2, 2, accelerator)
    stage = AarStage(accelerator, args, loop, untrained, make_processor(args, untrained), stream, held_out, 8)
    before = stage.validate()
    for step, batch in enumerate(stream.loader(range(8))):
        stage.step([batch], step)
    after = stage.validate()
    assert after["loss"] < before["loss"] - 0.1
    assert {f"loss/{level}" for level in range(NUM_LEVELS)} < after.keys()
    assert {title: sound.shape for title, sound in stage.sounds().items()} == {"Dog": (1, 1920), "Rain": (1, 1920)}


def test_dropped_rows_have_no_conditioning(build_baseline):
    """Training drops the conditioning of the rows whose draw is low enough."""
    model = build_baseline(drop_path_rate=0.0).requires_grad_(False)
    inputs = {"audio_codes": random_codes(2)}
    kept = model(**inputs, conditioning_embeds=random_embeds(2)).logits
    dropped = model(**inputs, conditioning_embeds=model.model.uncond_embedding.expand(2, -1)).logits
    draws = torch.ones(2, num_draws(model.config.num_hidden_layers))
    draws[0, 0] = 0.0
    trained = model.train()(**inputs, conditioning_embeds=random_embeds(2), dropout_draws=draws).logits
    torch.testing.assert_close(trained, torch.stack([dropped[0], kept[1]]))


# --- files and mistakes ----------------------------------------------------------------------------------------------


def test_saved_and_loaded_it_is_the_same(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = NextTokenModel.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == model.state_dict().keys()
    inputs = {"audio_codes": random_codes(2), "conditioning_embeds": random_embeds(2)}
    torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    assert not list(tmp_path.glob("modeling_*.py"))


def test_it_has_no_more_weights_than_aar(build_baseline, build_generator):
    """But for positions and levels, which depend on the number of tokens, it has AAR's tensors."""

    def shapes(model) -> dict:
        tables = ("positions", "start_position", "levels.weight")
        parameters = (*model.model.named_parameters(), *model.lm_head.named_parameters())
        return {name: tuple(value.shape) for name, value in parameters if not name.endswith(tables)}

    assert shapes(build_baseline()) == shapes(build_generator())


def test_what_makes_no_sense_is_refused(model, build_baseline):
    with pytest.raises(ValueError, match="plain residual codec"):
        build_baseline([1, 2, 4, 6])
    with pytest.raises(ValueError, match="plain residual codec"):
        build_baseline(codec_fields={"phi_kernel_sizes": [3]})
    with pytest.raises(ValueError, match="shape"):
        model(audio_codes=random_codes(1)[:, :-1], conditioning_embeds=random_embeds(1))
    with pytest.raises(ValueError, match="knows no scales"):
        generate(model, random_embeds(1), audio_codes=random_codes(1)[:, None, :NUM_FRAMES])
    for arguments in (
        {"gumbel_smoothing": True},
        {"unguided_scales": 1, "guidance_scale": 2.0},
        {"max_scales": 1},
        {"compile_config": CompileConfig()},
    ):
        with pytest.raises(ValueError, match="knows no scales"):
            generate(model, random_embeds(1), **arguments)
