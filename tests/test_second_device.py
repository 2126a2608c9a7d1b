"""
Generation, codec, training and evaluation on a device that isn't the CPU: nothing is left behind on the CPU, results
are the CPU's, and no number is read back where that would keep a GPU waiting.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import second_device
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, attach_execution_device_hook
from clips import write_clips
from forking import Forked, read_lines
from second_device import NAME, there, waits
from torch import nn
from transformers import AutoModel

from transformers_aar import BUNDLED_CHECKPOINT, AarPreviewStreamer
from transformers_aar.data.token_cache import load_token_cache

TOLERANCE = {"rtol": 1e-4, "atol": 1e-4}


def arrays(tensors) -> list[np.ndarray]:
    return [tensor.detach().cpu().numpy() for tensor in tensors]


def assert_same(one: list[np.ndarray], other: list[np.ndarray]) -> None:
    for left, right in zip(one, other, strict=True):
        np.testing.assert_allclose(left, right, **TOLERANCE)


# --- the device itself


def mix(device: str) -> None:
    nn.Linear(4, 4).to(device)(torch.randn(2, 4))


def draw_by_the_cpu(device: str) -> None:
    torch.rand(3, device=device, generator=torch.Generator())


def read_back(device: str) -> list[str]:
    waits.clear()
    numbers = torch.arange(6.0, device=device)
    assert numbers.sum().item() == 15
    numbers[numbers > 2].cpu()
    numbers.unique()
    numbers.repeat_interleave(numbers.long())
    return list(waits)


def learn(device: str) -> list[np.ndarray]:
    torch.manual_seed(0)
    layers = nn.LSTM(4, 4, num_layers=2).to(device), nn.Conv1d(4, 2, 3).to(device)
    window = torch.hann_window(8, device=device)
    sequence = layers[0](torch.randn(9, 3, 4).to(device))[0]
    spectra = torch.stft(layers[1](sequence.permute(1, 2, 0)).flatten(0, 1), 8, window=window, return_complex=True)
    spectra.abs().sum().backward()
    return arrays([spectra.abs(), *(weight.grad for layer in layers for weight in layer.parameters())])


def test_it_refuses_tensors_and_generators_of_the_cpu():
    with pytest.raises(RuntimeError, match="on the CPU"):
        there(mix, NAME)
    with pytest.raises(RuntimeError, match="generator of the CPU"):
        there(draw_by_the_cpu, NAME)


def test_it_tells_what_waits():
    assert there(read_back, NAME) == [
        *("aten._local_scalar_dense.default", "aten.index.Tensor", "aten._to_copy.default"),
        *("aten._unique2.default", "aten.repeat_interleave.Tensor"),
    ]


def test_it_computes_what_the_cpu_does():
    assert_same(there(learn, NAME), learn("cpu"))


# --- models


def generate(device: str, model, arguments: dict) -> tuple[list[np.ndarray], list[str]]:
    """Codes, scores and sounds; and what would have waited from the first scale's pass on."""
    model = model.to(device)
    arguments = {name: value.to(device) if torch.is_tensor(value) else value for name, value in arguments.items()}
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    loop = model._generate_rows

    def watched(*args):
        waits.clear()
        return loop(*args)

    model._generate_rows = watched
    output = model.generate(
        **arguments, generator=generators, return_dict_in_generate=True, output_scores=True, output_logits=True
    )
    waiting = list(waits)
    return arrays([output.audio_codes, output.audio, *output.scores, *output.logits]), waiting


EMBEDS = torch.randn(2, 32, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[1], [0]])


@pytest.mark.parametrize(
    "fields, arguments",
    [
        ({}, {"conditioning_embeds": EMBEDS}),
        ({"adaln": "shared"}, {"conditioning_embeds": EMBEDS, "num_windows": 3, "max_batch_rows": 8}),
        ({"adaln": "none", "use_qk_norm": False}, {"conditioning_embeds": EMBEDS, "do_sample": False}),
        ({}, {"conditioning_embeds": EMBEDS, "negative_conditioning_embeds": EMBEDS[:1]}),
        ({}, {"conditioning_embeds": EMBEDS, "gumbel_smoothing": True}),
        ({}, {"conditioning_embeds": EMBEDS, "unguided_scales": 2, "max_scales": 3}),
        ({}, {"conditioning_embeds": EMBEDS, "audio_codes": torch.tensor([[[3, 1, 4]]])}),
        ({"conditioning": "label", "labels": ["Dog", "Cat"]}, {"input_ids": LABELS}),
        ({"conditioning": "none"}, {"input_ids": LABELS, "guidance_scale": 0.0}),
    ],
)
def test_generation(build_generator, fields, arguments):
    """A sound per generator of the CPU is the same on every device."""
    model = build_generator(**fields)
    results, waiting = there(generate, NAME, model, arguments)
    assert waiting == []
    assert_same(results, generate("cpu", model, arguments)[0])


def spread(model, ends: str, middle: str):
    """The parts of a model on two devices, as `device_map` leaves them; codec and first block are with `ends`."""
    last = ("model.layers.1", "model.norm", "lm_head")
    first = ("codec_model", "model.conditioning_mlp", "model.embeddings", "model.layers.0")
    for names, device in ((first, ends), (last, middle)):
        for name in names:
            attach_execution_device_hook(model.get_submodule(name).to(device), torch.device(device))
    model.model.uncond_embedding = model.model.uncond_embedding.to(ends)
    if model.config.adaln == "shared":
        attach_execution_device_hook(model.model.shared_modulation.to(ends), torch.device(ends))
    add_hook_to_module(model, AlignDevicesHook(execution_device=torch.device(ends), io_same_device=True))
    return model


def use_spread(ends: str, middle: str, model) -> list[np.ndarray]:
    if ends != middle:
        spread(model, ends, middle)
    sounds = []
    streamer = AarPreviewStreamer(model.codec_model, lambda _, sound: sounds.append(sound))
    embeds, codes = EMBEDS.to(ends), torch.arange(13).expand(2, 1, -1)
    outputs = [model(conditioning_embeds=embeds, audio_codes=codes.to(ends)).loss[None]]
    for arguments in ({}, {"audio_codes": codes[:1, :, :3]}, {"gumbel_smoothing": True}, {"streamer": streamer}):
        generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
        outputs.append(model.generate(conditioning_embeds=embeds, generator=generators, **arguments))
    return arrays(outputs + sounds)


@pytest.mark.parametrize("adaln", ["per_block", "shared"])
@pytest.mark.parametrize("ends, middle", [("cpu", NAME), (NAME, "cpu")])
def test_a_model_on_two_devices(build_generator, adaln, ends, middle):
    """Losses and sounds are those of one device; given codes may be anywhere."""
    model = build_generator(adaln=adaln).requires_grad_(False)
    assert_same(there(use_spread, ends, middle, model), use_spread("cpu", "cpu", model))


def preview(device: str, model) -> list[np.ndarray]:
    sounds, model = [], model.to(device)
    streamer = AarPreviewStreamer(model.codec_model, lambda _, sound: sounds.append(sound))
    generators = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    model.generate(conditioning_embeds=EMBEDS.to(device), streamer=streamer, generator=generators)
    return arrays(sounds)


def test_previews(build_generator):
    model = build_generator()
    assert_same(there(preview, NAME, model), preview("cpu", model))


def code(device: str, codec) -> list[np.ndarray]:
    codec = codec.to(device)
    audio = torch.randn(2, 1, 5000, generator=torch.Generator().manual_seed(3)).to(device)
    mask = (torch.arange(5000) < torch.tensor([[5000], [2500]])).long().to(device)
    encoded = codec.encode(audio, mask)
    coarse = codec.encode(audio, max_scales=2)
    sounds = [codec.decode(each.audio_codes).audio_values for each in (encoded, coarse)]
    return arrays([encoded.audio_codes, encoded.audio_codes_mask, coarse.audio_codes, *sounds])


def test_codec(build_codec):
    assert_same(there(code, NAME, build_codec()), code("cpu", build_codec()))


def learn_from_raw_audio(device: str, model) -> list[np.ndarray]:
    model = model.to(device).train()
    audio = torch.randn(2, 1, 1920, generator=torch.Generator().manual_seed(3)).to(device)
    draws = torch.rand(2, 5, generator=torch.Generator().manual_seed(4)).to(device)
    output = model(conditioning_embeds=EMBEDS.to(device), input_values=audio, dropout_draws=draws)
    output.loss.backward()
    gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
    return arrays([output.loss, output.logits, *gradients])


def test_teacher_forcing(build_generator):
    model = build_generator(drop_path_rate=0.3)
    assert_same(there(learn_from_raw_audio, NAME, model), learn_from_raw_audio("cpu", model))


# --- scripts


def on_cpu(script: str, options: dict, folder: Path) -> None:
    finished = Forked(script, options | {"use_cpu": True}, folder).wait()
    assert finished.status == 0, finished.stderr


def on_second_device(script: str, options: dict, folder: Path) -> None:
    """In a process that has one, and whose Accelerate puts everything on it."""
    environment = {"ACCELERATE_TORCH_DEVICE": f"{NAME}:0"}
    finished = Forked(script, options, folder, prepare=second_device.start, environment=environment).wait()
    assert finished.status == 0, finished.stderr


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("audioset")
    write_clips(folder, "unbalanced_train", 11, strong=True)
    write_clips(folder, "eval", 5, strong=True)
    return folder


@pytest.fixture(scope="module")
def trainings(tmp_path_factory, data_dir, build_codec, short_codec_fields) -> dict[str, dict]:
    """Options of both stages in small, with everything in them that touches a device."""
    codec_dir = tmp_path_factory.mktemp("codec")
    build_codec().save_pretrained(codec_dir)
    common = {
        **{"data_dir": data_dir, "num_validation_examples": 4, "dataloader_num_workers": 0, "logging_steps": 1},
        **{"per_device_batch_size": 4, "gradient_accumulation_steps": 2, "learning_rate": 1e-3, "report_to": "none"},
        **{"max_steps": 2, "validation_steps": 2, "save_steps": 1, "mixed_precision": "no"},
    }
    codec_config = short_codec_fields | {"dead_code_threshold": 0.3, "codebook_decay": 0.8}
    discriminators = {"stft": {"n_ffts": [256, 128], "num_filters": 2}}
    model_config = {
        **{"conditioning": "label", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"adaln": "shared", "drop_path_rate": 0.3, "conditioning_dropout": 0.3},
    }
    sat = {"codec_config": json.dumps(codec_config), "discriminators": json.dumps(discriminators)}
    sat["data_dependent_init"] = True
    aar = {"codec": codec_dir, "model_config": json.dumps(model_config), "ema_decay": 0.9, "loss_average": "scales"}
    return {"sat": common | sat, "aar": common | aar}


@pytest.mark.parametrize("stage", ["sat", "aar"])
def test_training(tmp_path, trainings, stage):
    """Start, steps, validation, sounds, checkpoints and going on from one; the figures are the CPU's."""
    script, options = f"train_{stage}.py", trainings[stage]
    on_cpu(script, options | {"output_dir": tmp_path / "here"}, tmp_path)
    for name, given in (("stopped", {"max_minutes": 1e-6}), ("resumed", {"resume": "latest"})):
        on_second_device(script, options | {"output_dir": tmp_path / "there"} | given, tmp_path / name)
    lines = {name: read_lines(tmp_path / name / "metrics.jsonl") for name in ("here", "there")}
    for one, other in zip(lines["here"], lines["there"], strict=True):
        assert one.keys() == other.keys()
        for name in one.keys() - {"seconds"}:
            assert other[name] == pytest.approx(one[name], rel=1e-3, abs=1e-4), name


@pytest.mark.slow
@pytest.mark.parametrize("script", ["evaluate_sat.py", "evaluate_aar.py"])
def test_evaluation(tmp_path, data_dir, script):
    """Listeners, metrics and sounds; but for seconds and rounding the figures are the CPU's."""
    figures = []
    for folder, run in ((tmp_path / "here", on_cpu), (tmp_path / "there", on_second_device)):
        options = {
            **{"model": BUNDLED_CHECKPOINT, "data_dir": data_dir, "num_examples": 4, "batch_size": 2},
            **{"num_samples": 1, "classifier": "bundled", "output_dir": folder / "report"},
        }
        run(script, options, folder)
        figures.append(json.loads((folder / "report" / "report.json").read_text())["figures"])
    here, there = figures
    for name in [name for name in here if "seconds_per" not in name]:
        assert there[name]["value"] == pytest.approx(here[name]["value"], rel=1e-2, abs=1e-3), name


def test_tokens(tmp_path, data_dir):
    codec = AutoModel.from_pretrained(BUNDLED_CHECKPOINT).codec_model
    codes = []
    for folder, run in ((tmp_path / "here", on_cpu), (tmp_path / "there", on_second_device)):
        options = {"codec": BUNDLED_CHECKPOINT, "data_dir": data_dir, "split": "eval", "output_dir": folder / "tokens"}
        run("tokenize_dataset.py", options, folder)
        codes.append(np.array(load_token_cache(folder / "tokens", codec)["codes"]))
    assert codes[0].shape == codes[1].shape
    assert np.mean(codes[0] == codes[1]) > 0.99
