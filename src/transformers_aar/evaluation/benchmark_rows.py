"""The rows of the benchmark: what is measured, and what it is compared with, all with random weights."""

import copy
import itertools
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import soundfile
import torch
from accelerate.utils import compile_regions
from torch import nn
from torchaudio.functional import resample
from transformers import (
    CompileConfig,
    DacConfig,
    DacModel,
    EncodecConfig,
    EncodecModel,
    MusicgenConfig,
    MusicgenDecoderConfig,
    MusicgenForConditionalGeneration,
    PreTrainedModel,
    T5Config,
)

from ..configuration_aar import AarConfig
from ..configuration_sat import SatConfig
from ..data.crops import read_crop
from ..linear_aar import has_int8_products, has_packed_products
from ..modeling_aar import AarForConditionalGeneration
from ..modeling_sat import SatModel
from ..training.arguments import read_recipe
from ..training.noise_stages import make_stage
from .benchmark import Comparison, Contender
from .next_token import NextTokenModel
from .plain_loop import plain_generate

NUM_CODEBOOKS = 10  # of the codecs that SAT is compared with, at its frame rate
SHORT_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


@dataclass
class Setting:
    """
    Args:
        sat_recipe, aar_recipe (`Path`): YAML files of the trainings; their models are the sizes of everything.
        device (`torch.device`): where models run.
        folder (`Path`): an empty folder for files.
    """

    sat_recipe: Path
    aar_recipe: Path
    device: torch.device
    folder: Path

    @property
    def codec_fields(self) -> dict:
        return read_recipe(self.sat_recipe).get("codec_config", {})

    def aar_config(self, **codec_fields) -> AarConfig:
        """The generator, with these fields of its codec other than the recipe's."""
        return AarConfig(codec_config=self.codec_fields | codec_fields, **read_recipe(self.aar_recipe)["model_config"])


def in_dtypes(
    name: str, model: PreTrainedModel, dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16)
) -> Iterator[tuple[str, PreTrainedModel]]:
    """A model of fp32 in each of these dtypes, with names for them."""
    for dtype in dtypes:
        yield f"{name}, {SHORT_NAMES[dtype]}", model if dtype == model.dtype else copy.deepcopy(model).to(dtype)


def ready(model: PreTrainedModel, setting: Setting) -> PreTrainedModel:
    return model.to(setting.device).eval().requires_grad_(False)


# --- generation ------------------------------------------------------------------------------------------------------


def make_generator(
    setting: Setting, model_class: type[AarForConditionalGeneration] = AarForConditionalGeneration, **codec_fields
) -> AarForConditionalGeneration:
    """With a head of the usual size: near-uniform predictions would be an unusual load for top-k and top-p."""
    torch.manual_seed(0)
    model = ready(model_class(setting.aar_config(**codec_fields)), setting)
    model.lm_head.weight.mul_(50)
    return model


def make_baseline(setting: Setting) -> NextTokenModel:
    """The generator's transformer, token by token over a plain residual codec."""
    frames = setting.aar_config().codec_config.scales[-1]
    return make_generator(setting, NextTokenModel, scales=[frames] * NUM_CODEBOOKS, phi_kernel_sizes=[])


def generators(
    name: str, model: AarForConditionalGeneration, dtypes: Sequence[torch.dtype] = tuple(SHORT_NAMES)
) -> Iterator[tuple[str, AarForConditionalGeneration]]:
    """A model of fp32 in those of these dtypes that it can generate in, as it is and laid out for a CPU; and int8."""
    is_on_cpu = model.device.type == "cpu"
    if not is_on_cpu or not has_packed_products(torch.float16):
        dtypes = [dtype for dtype in dtypes if dtype != torch.float16]
    for full_name, each in in_dtypes(name, model, dtypes):
        yield full_name, each
        if is_on_cpu and has_packed_products(each.dtype):
            yield f"{full_name}, packed", copy.deepcopy(each).prepack()
    if is_on_cpu and has_int8_products():
        yield f"{name}, int8", copy.deepcopy(model).to_int8()


def conditioning(model: AarForConditionalGeneration, batch_size: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch_size, model.config.conditioning_dim, generator=generator).to(model.device, model.dtype)


def generation(name: str, model: AarForConditionalGeneration, batch_size: int, **kwargs) -> Contender:
    run = partial(model.generate, conditioning_embeds=conditioning(model, batch_size), **kwargs)
    seconds = kwargs.get("num_windows", 1) * model.config.codec_config.window_length_s
    return Contender(name, run, batch_size * seconds)


def generate_in_batches(setting: Setting, batch_size: int, has_plain_loop: bool = True) -> Comparison:
    """With guidance, one window a sound."""
    comparison = Comparison("seconds of audio")
    model = make_generator(setting)
    if has_plain_loop:
        run = partial(plain_generate, model, conditioning(model, batch_size))
        amount = batch_size * model.config.codec_config.window_length_s
        comparison.contenders.append(Contender("plain loop, fp32", run, amount))
    for name, generator in generators("generate", model):
        comparison.contenders.append(generation(name, generator, batch_size))
    return comparison


def generate_unguided(setting: Setting) -> Comparison:
    """Guidance off, which halves the rows."""
    model = make_generator(setting).to(torch.bfloat16)
    guided = generation("guided, bf16", model, 1)
    return Comparison("seconds of audio", [guided, generation("unguided, bf16", model, 1, guidance_scale=0.0)])


def generate_partly_guided(setting: Setting, unguided_scales: int = 4) -> Comparison:
    """Guidance in all scales, and in all but the last, which are the largest."""
    model = make_generator(setting).to(torch.bfloat16)
    guided = generation("guided, bf16", model, 1)
    partly = generation(f"last {unguided_scales} unguided, bf16", model, 1, unguided_scales=unguided_scales)
    return Comparison("seconds of audio", [guided, partly])


def generate_coarse(setting: Setting) -> Comparison:
    """All scales, and all but the last two."""
    model = make_generator(setting).to(torch.bfloat16)
    num_scales = model.config.codec_config.num_scales
    contenders = [
        generation(f"{count} scales, bf16", model, 1, max_scales=count) for count in (num_scales, num_scales - 2)
    ]
    return Comparison("seconds of audio", contenders)


def generate_compiled(setting: Setting) -> Comparison:
    """Without and with `torch.compile`, whose first call compiles; on a GPU 64 sounds at once, too."""
    model = make_generator(setting).to(torch.bfloat16)
    comparison = Comparison("seconds of audio")
    for batch_size in (1,) if model.device.type == "cpu" else (1, 64):
        eager = generation(f"eager, bf16, {batch_size} at once", model, batch_size)
        compiled = generation(
            f"compiled, bf16, {batch_size} at once", model, batch_size, compile_config=CompileConfig()
        )
        # counting would keep PyTorch from compiling, now and later
        compiled.has_floor = False
        comparison.contenders += [eager, compiled]
    return comparison


def generate_windows(setting: Setting) -> Comparison:
    """One window and ten."""
    model = make_generator(setting).to(torch.bfloat16)
    contenders = [generation(f"{count} windows, bf16", model, 1, num_windows=count) for count in (1, 10)]
    return Comparison("seconds of audio", contenders)


def generate_with_others(setting: Setting) -> Comparison:
    """Batch 1 against models that generate token by token."""
    comparison = Comparison("seconds of audio")
    for name, model in generators("generate", make_generator(setting)):
        comparison.contenders.append(generation(name, model, 1))
    # which takes minutes in the slower precisions
    for name, model in generators("next-token baseline", make_baseline(setting), [torch.bfloat16]):
        comparison.contenders.append(generation(name, model, 1))
    for name, model in in_dtypes("MusicGen", make_musicgen(setting)):
        comparison.contenders.append(musicgen_second(name, model))
    return comparison


def make_musicgen(setting: Setting) -> MusicgenForConditionalGeneration:
    """As wide as the generator and half as deep again: MusicGen-small at the published size. Hardly a text encoder."""
    config = setting.aar_config()
    text = T5Config(vocab_size=32, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    decoder = MusicgenDecoderConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=3 * config.num_hidden_layers // 2,
        num_attention_heads=config.num_attention_heads,
        ffn_dim=4 * config.hidden_size,
    )
    codec = EncodecConfig(
        sampling_rate=32_000,
        upsampling_ratios=[8, 5, 4, 4],
        num_filters=2 * config.codec_config.num_filters,
        codebook_size=2048,
        target_bandwidths=[2.2],
        use_causal_conv=False,
    )
    parts = {"text_encoder": text.to_dict(), "decoder": decoder.to_dict(), "audio_encoder": codec.to_dict()}
    return ready(MusicgenForConditionalGeneration(MusicgenConfig(**parts)), setting)


def musicgen_second(name: str, model: MusicgenForConditionalGeneration) -> Contender:
    """A second of audio: 50 frames, and three more passes for the delays between its codebooks."""
    input_ids = torch.zeros(1, 4, dtype=torch.long, device=model.device)
    kwargs = {"max_new_tokens": 53, "min_new_tokens": 53, "guidance_scale": 3.0, "do_sample": True}
    return Contender(name, partial(model.generate, input_ids=input_ids, **kwargs))


# --- codec -----------------------------------------------------------------------------------------------------------


def make_codecs(setting: Setting) -> dict[str, PreTrainedModel]:
    """SAT; EnCodec of the same blocks; and DAC with as many weights, give or take a few per cent."""
    config = SatConfig(**setting.codec_fields)
    ratios, filters = list(config.upsampling_ratios), config.num_filters
    torch.manual_seed(0)
    codecs = {
        "EncodecModel": EncodecModel(
            EncodecConfig(
                sampling_rate=config.sampling_rate,
                upsampling_ratios=ratios,
                num_filters=filters,
                hidden_size=config.hidden_size,
                num_lstm_layers=config.num_lstm_layers,
                target_bandwidths=[NUM_CODEBOOKS * config.frame_rate / 100],
                use_causal_conv=False,
            )
        ),
        "SatModel": SatModel(config),
        "DacModel": DacModel(
            DacConfig(
                sampling_rate=config.sampling_rate,
                downsampling_ratios=ratios[::-1],
                encoder_hidden_size=5 * filters // 4,
                decoder_hidden_size=16 * filters,
                n_codebooks=NUM_CODEBOOKS,
            )
        ),
    }
    return {name: ready(model, setting) for name, model in codecs.items()}


def encoding(setting: Setting, batch_size: int) -> Comparison:
    """Eight one-second clips to codes."""
    comparison = Comparison("seconds of audio")
    for name, model in make_codecs(setting).items():
        for full_name, codec in in_dtypes(name, model):
            clips = noise(setting, batch_size).to(codec.dtype)
            run = torch.no_grad()(partial(codec.encode, clips))
            comparison.contenders.append(Contender(full_name, run, batch_size))
    return comparison


def decoding(setting: Setting, batch_size: int) -> Comparison:
    """Codes to eight one-second clips."""
    comparison = Comparison("seconds of audio")
    for name, model in make_codecs(setting).items():
        with torch.no_grad():
            encoded = model.encode(noise(setting, batch_size))
        arguments = {"audio_codes": encoded.audio_codes}
        if name == "EncodecModel":
            arguments["audio_scales"] = encoded.audio_scales
        for full_name, codec in in_dtypes(name, model):
            run = torch.no_grad()(partial(codec.decode, **arguments))
            comparison.contenders.append(Contender(full_name, run, batch_size))
    return comparison


def noise(setting: Setting, batch_size: int) -> torch.Tensor:
    config = SatConfig(**setting.codec_fields)
    clips = torch.randn(batch_size, 1, config.window_length, generator=torch.Generator().manual_seed(0))
    return clips.to(setting.device)


# --- training --------------------------------------------------------------------------------------------------------


def training_step(setting: Setting, recipe: Path, batch_size: int) -> Comparison:
    """Steps of a recipe's training, in its precision."""
    stage, loop, steps = make_stage(recipe, batch_size, setting.folder)
    batches = [stage.stream.read(range(batch_size))]
    numbers = itertools.cycle(steps)

    def step_of(model: nn.Module) -> None:
        stage.model = model
        stage.step(batches, next(numbers))

    contenders = [Contender(f"training step, {loop.mixed_precision}", partial(step_of, stage.model), batch_size)]
    if stage.name == "aar":  # of the same weights, as `accelerate launch` would compile them
        compiled = partial(step_of, compile_regions(stage.model))
        contenders.append(Contender(f"compiled, {loop.mixed_precision}", compiled, batch_size, has_floor=False))
    return Comparison("sounds", contenders)


# --- data, import, loading -------------------------------------------------------------------------------------------


def reading(setting: Setting, num_files: int = 10) -> Comparison:
    """Crops of one second out of ten-second stereo files, in one process."""
    times, generator = np.arange(441_000) / 44_100, np.random.default_rng(0)
    paths = [setting.folder / f"{number}.mp3" for number in range(num_files)]
    for path in paths:
        tone = 0.3 * np.sin(2 * np.pi * generator.uniform(100, 1000) * times * (1 + times))
        soundfile.write(path, tone[:, None] + 0.1 * generator.standard_normal((len(times), 2)), 44_100)

    def read_whole_files() -> None:
        for path in paths:
            samples, rate = soundfile.read(path, dtype="float32")
            resample(torch.from_numpy(samples.mean(-1)), rate, 24_000)

    def read_crops(*rates: int) -> None:
        for number, path in enumerate(paths):
            read_crop({"path": str(path), "bytes": None}, 1.0, rates, number / num_files)

    def read_with_librosa() -> None:
        import librosa

        for path, rate in itertools.product(paths, (24_000, 48_000)):
            librosa.load(path, sr=rate)

    readers = {
        "whole files at 24 kHz": read_whole_files,
        "read_crop at 24 kHz": partial(read_crops, 24_000),
        "read_crop at 24 and 48 kHz": partial(read_crops, 24_000, 48_000),
    }
    if find_spec("librosa") is not None:  # with which the paper's code reads
        readers["librosa, whole files at 24 and 48 kHz"] = read_with_librosa
    return Comparison("crops", [Contender(name, run, num_files, has_floor=False) for name, run in readers.items()])


def importing(setting: Setting) -> Comparison:
    """The library that the package can't do without, and the package, each in a fresh process."""
    statements = {
        "transformers' model classes": "from transformers import PreTrainedModel, AutoModel",
        "transformers_aar": "import transformers_aar",
    }
    contenders = [
        Contender(f"import {name}", partial(subprocess.run, [sys.executable, "-c", statement], check=True), 1.0, False)
        for name, statement in statements.items()
    ]
    return Comparison("imports", contenders)


def loading(setting: Setting) -> Comparison:
    """The published sizes from safetensors, as they were saved and in bf16."""
    make_generator(setting).save_pretrained(setting.folder)
    load = partial(AarForConditionalGeneration.from_pretrained, setting.folder, device_map=setting.device)
    contenders = [
        Contender(f"from_pretrained, {name}", partial(load, dtype=dtype), has_floor=False)
        for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ]
    return Comparison("models", contenders)


ROWS: dict[str, Callable[[Setting], Comparison]] = {
    "generate-1": partial(generate_in_batches, batch_size=1),
    "generate-8": partial(generate_in_batches, batch_size=8),
    # the plain loop would take minutes
    "generate-64": partial(generate_in_batches, batch_size=64, has_plain_loop=False),
    "unguided": generate_unguided,
    "partly-guided": generate_partly_guided,
    "coarse": generate_coarse,
    "compiled": generate_compiled,
    "windows": generate_windows,
    "others": generate_with_others,
    "encode": partial(encoding, batch_size=8),
    "decode": partial(decoding, batch_size=8),
    "train-aar": lambda setting: training_step(setting, setting.aar_recipe, batch_size=4),
    "train-sat": lambda setting: training_step(setting, setting.sat_recipe, batch_size=4),
    "read": reading,
    "import": importing,
    "load": loading,
}


@contextmanager
def prepared(row: str, sat_recipe: Path, aar_recipe: Path, device: torch.device) -> Iterator[Comparison]:
    """A row's comparison, ready to be measured, and its files for as long."""
    with TemporaryDirectory() as folder:
        yield ROWS[row](Setting(sat_recipe, aar_recipe, device, Path(folder)))
