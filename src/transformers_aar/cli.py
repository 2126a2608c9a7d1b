"""The command `transformers-aar`: make sounds, take them apart and put them together, convert and share models, look
after datasets."""

import re
import sys
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from . import BUNDLED_CHECKPOINT
from .memory import keep_freed_memory

# what only some commands need is imported inside them, so that the others and --help are quick
if TYPE_CHECKING:
    import torch
    from tqdm import tqdm
    from transformers import PreTrainedModel, ProcessorMixin

    from .data.streaming import Excerpt
    from .modeling_aar import AarForConditionalGeneration
    from .modeling_sat import SatModel

PLOTTED_SECONDS = 30
# more than this are made sound by sound, so that the first is there soon and the bar moves
WINDOWS_AT_ONCE = 64
OUT_OF_MEMORY = re.compile(r"out of memory|allocate memory|ALLOC_FAILED|bad_alloc")

app = typer.Typer(
    help="Text-to-audio by next-scale prediction: the codec SAT and the generator AAR.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
dataset_app = typer.Typer(help="Folders of sounds in AudioSet's layout.")
app.add_typer(dataset_app, name="dataset")


class SoundFormat(str, Enum):
    wav = "wav"
    flac = "flac"


class ClipFormat(str, Enum):
    mp3 = "mp3"
    flac = "flac"


OutputDir = Annotated[Path, typer.Option("--output-dir", "-o", help="Folder for the results; made when missing.")]
Sounds = Annotated[list[Path], typer.Argument(metavar="FILE", help="WAV, FLAC, OGG or MP3 files.")]
Plot = Annotated[bool, typer.Option("--plot", help="Also write pictures (PNG).")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace files of these names that are there already.")]
Format = Annotated[SoundFormat, typer.Option("--format", help="Format of the sounds that are written.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, …; a GPU by default where there is one.")]
Codec = Annotated[
    str,
    typer.Option("--model", show_default="the bundled one", help="Folder or repository of a codec or a generator."),
]
Generator = Annotated[
    str, typer.Option("--model", show_default="the bundled one", help="Folder or repository of a generator.")
]


def main() -> None:
    """Runs the command line. What the user can put right ends in one sentence on stderr and a non-zero exit status."""
    from safetensors import SafetensorError

    keep_freed_memory()
    try:
        sys.exit(app(standalone_mode=False))
    except typer.TyperException as error:
        _fail(f"{error.format_message()} See --help.", status=2)
    except (ValueError, OSError, SafetensorError) as error:
        _fail(str(error), status=1)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, RuntimeError) and not OUT_OF_MEMORY.search(str(error)):
            raise
        _fail("There isn't enough memory: make fewer or shorter sounds, or name another --device.", status=1)


def _fail(message: str, status: int) -> None:
    print("Error:", " ".join(message.split()), file=sys.stderr)
    sys.exit(status)


# --- Making sounds ---------------------------------------------------------------------------------------------------


@app.command()
def generate(
    output_dir: OutputDir,
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT", help="A label, or text with a CLAP model; none without conditioning."),
    ] = None,
    model: Generator = BUNDLED_CHECKPOINT,
    seed: Annotated[
        int | None, typer.Option(min=0, max=2**63 - 1, help="The sounds are drawn with the seeds N, N + 1, …")
    ] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt; 0 is freest.")
    ] = None,
    temperature: Annotated[
        float | None, typer.Option(help="Below 1 the likelier tokens are drawn more often.")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many likeliest tokens.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens of this share in all.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Length of each sound in windows of the codec.")] = 1,
    num_return_sequences: Annotated[int, typer.Option(min=1, help="Sounds per prompt.")] = 1,
    sound_format: Format = SoundFormat.wav,
    plot: Plot = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Number the sounds from 1 again, in place of those that are there.")
    ] = False,
    device: Device = None,
) -> None:
    """Make sounds from prompts. They are numbered on from those in the folder, and drawn by the model's settings where
    none are given."""
    from tqdm import tqdm

    generator, processor = _load_generator(model, device)
    prompts = _check_prompts(prompts or [], generator)
    # every prompt is checked before the first sound is made
    inputs = [processor(text=[prompt], return_tensors="pt").to(generator.device) for prompt in prompts]
    sounds_at_once = num_return_sequences if windows * num_return_sequences <= WINDOWS_AT_ONCE else 1
    sampling = {"guidance_scale": guidance_scale, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    options = {name: value for name, value in sampling.items() if value is not None}
    options |= {"num_windows": windows, "num_return_sequences": sounds_at_once}
    _make_folder(output_dir)
    numbers = Counter() if overwrite else _highest_numbers(output_dir)
    num_sounds = len(prompts) * num_return_sequences
    with tqdm(total=num_sounds, unit="sound", disable=None, leave=False) as progress:
        for first in range(0, num_sounds, sounds_at_once):
            index = first // num_return_sequences
            prompt = prompts[index]
            if seed is not None:
                options["generator"] = _generators(seed + first, sounds_at_once)
            output = generator.generate(**inputs[index], **options, return_dict_in_generate=True)
            for audio, codes, length in zip(output.audio, output.audio_codes, output.lengths):
                numbers[_slug(prompt)] += 1
                target = output_dir / f"{_slug(prompt)}-{numbers[_slug(prompt)]}.{sound_format.value}"
                excerpt = _save_sound(target, [audio[:, :length]], generator.codec_model)
                if plot:
                    _plot_sounds(target, {prompt: excerpt}, generator.codec_model)
                    _plot_tokens(target, prompt, codes, generator.codec_model)
            progress.update(sounds_at_once)


@app.command()
def reconstruct(
    files: Sounds,
    output_dir: OutputDir,
    model: Codec = BUNDLED_CHECKPOINT,
    sound_format: Format = SoundFormat.wav,
    plot: Plot = False,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Send sounds through the codec: what it keeps of them."""
    from .data.audio import inspect_sound
    from .data.streaming import decode_blocks

    targets = _name_targets(files, output_dir, [f".{sound_format.value}", *([".png"] if plot else [])], overwrite)
    sounds = [inspect_sound(path) for path in files]
    codec = _load_codec(model, device)
    _make_folder(output_dir)
    for sound, target in zip(sounds, targets):
        length = sound.length_at(codec.config.sampling_rate)
        original = _excerpt(codec)
        with _window_progress(codec, length, sound.path.name) as progress:
            codes = _encode_file(codec, sound.path, original, progress)
            reconstruction = _save_sound(target, decode_blocks(codec, codes, length), codec)
        if plot:
            pictured = {f"{sound.path.name}, original": original, f"{sound.path.name}, reconstruction": reconstruction}
            _plot_sounds(target, pictured, codec)


@app.command()
def tokenize(
    files: Sounds,
    output_dir: OutputDir,
    model: Codec = BUNDLED_CHECKPOINT,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Turn sounds into token files (safetensors)."""
    import torch

    from .data.audio import inspect_sound
    from .data.token_files import save_tokens

    targets = _name_targets(files, output_dir, [".safetensors"], overwrite)
    sounds = [inspect_sound(path) for path in files]
    codec = _load_codec(model, device)
    _make_folder(output_dir)
    for sound, target in zip(sounds, targets):
        length = sound.length_at(codec.config.sampling_rate)
        with _window_progress(codec, length, sound.path.name) as progress:
            codes = torch.cat(
                [codes.int().cpu() for codes in _encode_file(codec, sound.path, _excerpt(codec), progress)]
            )
        save_tokens(target, codec, codes, length)
        typer.echo(f"{target}: {len(codes)} windows, {codes.numel()} tokens")


@app.command()
def detokenize(
    files: Annotated[list[Path], typer.Argument(metavar="FILE", help="Token files that tokenize wrote.")],
    output_dir: OutputDir,
    model: Codec = BUNDLED_CHECKPOINT,
    sound_format: Format = SoundFormat.wav,
    plot: Plot = False,
    overwrite: Overwrite = False,
    device: Device = None,
) -> None:
    """Turn token files back into sounds."""
    from .data.streaming import decode_blocks
    from .data.token_files import load_tokens

    targets = _name_targets(files, output_dir, [f".{sound_format.value}", *([".png"] if plot else [])], overwrite)
    codec = _load_codec(model, device)
    tokens = [load_tokens(path, codec) for path in files]
    _make_folder(output_dir)
    for path, target, (codes, length) in zip(files, targets, tokens):
        with _window_progress(codec, length, path.name) as progress:
            batches = _count(codes.split(codec.windows_per_batch), progress)
            excerpt = _save_sound(target, decode_blocks(codec, batches, length), codec)
        if plot:
            _plot_sounds(target, {path.name: excerpt}, codec)


# --- Models ----------------------------------------------------------------------------------------------------------


@app.command()
def convert(
    sat: Annotated[Path, typer.Option(help="The reference's checkpoint of a codec (.pth).")],
    output_dir: OutputDir,
    aar: Annotated[Path | None, typer.Option(help="The reference's checkpoint of a generator (.pth).")] = None,
    scales: Annotated[str | None, typer.Option(help="Tokens per scale, as in 1,2,4, where not the published.")] = None,
    upsampling_ratios: Annotated[str | None, typer.Option(help="Strides of the decoder, as in 8,5,4,2.")] = None,
    conditioner: Annotated[str | None, typer.Option(help="Folder or repository of a CLAP model to include.")] = None,
) -> None:
    """Convert the reference's checkpoints: a codec, or with --aar a complete generator."""
    numbers = {
        "scales": _numbers(scales, "--scales"),
        "upsampling_ratios": _numbers(upsampling_ratios, "--upsampling-ratios"),
    }
    _quiet_transformers()
    from .hub.conversion import convert_checkpoint

    model = convert_checkpoint(sat, output_dir, aar_path=aar, conditioner=conditioner, **numbers)
    typer.echo(f"{output_dir}: {type(model).__name__}")


@app.command()
def push(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a codec or a generator.")],
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Name on the Hub, as in me/my-model.")],
    private: Annotated[bool, typer.Option("--private", help="A new repository is private.")] = False,
) -> None:
    """Publish a model on the Hugging Face Hub, for all to see unless --private."""
    from .hub.publishing import push as publish

    _quiet_transformers()
    typer.echo(publish(folder, repository, private))


@app.command()
def info(
    model: Annotated[str, typer.Argument(metavar="[DIR]", show_default="the bundled one")] = BUNDLED_CHECKPOINT,
) -> None:
    """Describe a codec or a generator."""
    loaded = _load_model(model, "cpu")
    codec = getattr(loaded, "codec_model", loaded)
    lines = {
        "class": type(loaded).__name__,
        "parameters": f"{_num_parameters(loaded):,}",
        "dtype": str(loaded.dtype).removeprefix("torch."),
    }
    if loaded is not codec:
        lines |= _describe_generator(loaded)
    lines |= _describe_codec(codec)
    for name, value in lines.items():
        typer.echo(f"{name:<20} {value}")


def _describe_generator(generator: "AarForConditionalGeneration") -> dict[str, str]:
    config, defaults = generator.config, generator.generation_config
    sampling = ("guidance_scale", "top_k", "top_p", "temperature", "do_sample")
    description = {
        "depth, width, heads": f"{config.num_hidden_layers}, {config.hidden_size}, {config.num_attention_heads}",
        "conditioning": config.conditioning,
        "generation defaults": ", ".join(f"{name} {getattr(defaults, name)}" for name in sampling),
    }
    if config.labels is not None:
        description["labels"] = "; ".join(config.labels)
    return description


def _describe_codec(codec: "SatModel") -> dict[str, str]:
    config = codec.config
    tokens_per_second = config.tokens_per_window * config.sampling_rate / config.window_stride
    return {
        "codec": f"{_num_parameters(codec):,} parameters",
        "audio": f"{config.sampling_rate} Hz, {config.audio_channels} channel(s)",
        "frames": f"{config.frame_rate:g} per second, hop {config.hop_length}",
        "windows": f"{config.window_length_s:g} s, overlap {config.overlap:g}",
        "scales": ", ".join(map(str, config.scales)),
        "tokens": f"{config.tokens_per_window} per window, {tokens_per_second:g} per second",
        "bandwidth": f"{config.bandwidth:.2f} kbit/s",
        "codebooks": f"{config.num_scales} of {config.codebook_size} x {config.codebook_dim}",
        "fingerprint": codec.fingerprint(),
    }


def _num_parameters(model: "PreTrainedModel") -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# --- Datasets --------------------------------------------------------------------------------------------------------


@dataset_app.command()
def synth(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="New folder, or one that was begun before.")],
    hours: Annotated[float, typer.Option(help="Length of the training split.")],
    eval_hours: Annotated[float, typer.Option(help="Length of the evaluation split.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Another seed makes other sounds.")] = 0,
    audio_format: Annotated[
        ClipFormat, typer.Option("--format", help="MP3 as AudioSet's, or FLAC without loss, four times as large.")
    ] = ClipFormat.mp3,
    processes: Annotated[int, typer.Option(min=1, help="Number of processes that make clips.")] = 1,
) -> None:
    """Synthesise sounds into a folder in AudioSet's layout, for want of recordings."""
    from .data.synthetic_audioset import write_audioset

    write_audioset(folder, hours, eval_hours, seed, audio_format.value, processes)
    typer.echo(f"{folder}: {hours:g} hours to train on, {eval_hours:g} to evaluate")


@dataset_app.command()
def check(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Folder in AudioSet's layout.")],
    decode: Annotated[bool, typer.Option("--decode", help="Decode every sound, not only its header.")] = False,
    report: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also write all missing, refused and unreadable clips there.")
    ] = None,
) -> None:
    """Say what a folder of sounds holds, and what is wrong with it, before training."""
    from .data.dataset_check import check_audioset, describe_split, write_report

    if report is not None:
        _make_folder(report.parent)
    splits = check_audioset(folder, decode)
    for split in splits:
        typer.echo("\n".join(describe_split(split)))
    if report is not None:
        write_report(report, splits)
        typer.echo(f"{report}: {sum(len(split.problems()) for split in splits)} clips")
    if not any(split.sounds for split in splits):
        raise ValueError(f"{folder} holds no sound that can be used.")


# --- Loading ---------------------------------------------------------------------------------------------------------


def _load_generator(source: str, device: str | None) -> tuple["AarForConditionalGeneration", "ProcessorMixin"]:
    from transformers import AutoProcessor

    from .hub.loading import explained

    model = _load_model(source, device)
    if model.config.model_type != "aar":
        raise ValueError(f"{source} is a codec, which generates nothing by itself: name a generator's folder.")
    with explained(f"{source} can't be loaded as a processor"):
        return model, AutoProcessor.from_pretrained(source, trust_remote_code=False)


def _load_codec(source: str, device: str | None) -> "SatModel":
    model = _load_model(source, device)
    return getattr(model, "codec_model", model).requires_grad_(False)  # which lets weights be folded


def _load_model(source: str, device: str | None) -> "PreTrainedModel":
    """A codec or a generator from a folder or the Hub; a `ValueError` in one sentence where there is none."""
    import torch

    _quiet_transformers()

    from .hub.loading import explained, load_model

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    with explained(f"The device {device} can't be used"):
        # some only fail, or hold no numbers, once something is computed there
        torch.ones(1, device=device).add(1).item()
    model = load_model(source)
    with explained(f"The device {device} can't be used"):
        return model.to(device)


def _quiet_transformers() -> None:
    import huggingface_hub
    import transformers

    import transformers_aar  # noqa: F401 (registers the Auto classes)

    huggingface_hub.logging.set_verbosity_error()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


# --- Files in and out ------------------------------------------------------------------------------------------------


def _name_targets(files: Sequence[Path], output_dir: Path, suffixes: Sequence[str], overwrite: bool) -> list[Path]:
    """
    A file in `output_dir` for each input, with the first of the suffixes. Refuses two of one name, to write over an
    input, and without `overwrite` over any file, be it only a picture beside it with another of the suffixes.
    """
    targets = [output_dir / f"{path.stem}{suffixes[0]}" for path in files]
    name, count = Counter(targets).most_common(1)[0]
    if count > 1:
        raise ValueError(f"{count} of the files would be written to {name}: rename them, or use a folder for each.")
    inputs = {path.resolve() for path in files}
    for target in targets:
        if target.resolve() in inputs:
            raise ValueError(f"{target} is one of the files to read: name another folder with -o.")
        for path in (target.with_name(target.stem + suffix) for suffix in suffixes):
            if path.exists() and not overwrite:
                raise ValueError(f"{path} exists: name another folder with -o, or pass --overwrite.")
    return targets


def _highest_numbers(folder: Path) -> Counter[str]:
    """The highest number of each name among the files `NAME-NUMBER.suffix` of a folder."""
    highest = Counter()
    for path in folder.iterdir():
        if match := re.fullmatch(r"(.+)-(\d+)", path.stem):
            highest[match[1]] = max(highest[match[1]], int(match[2]))
    return highest


def _make_folder(folder: Path) -> None:
    """Makes the folder and tries to write there, so that this doesn't fail after the work."""
    from tempfile import TemporaryFile

    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except (FileExistsError, NotADirectoryError) as error:
        raise ValueError(f"{folder} is a file, or lies below one: name a folder with -o.") from error
    except OSError as error:
        raise OSError(f"The folder {folder} can't be written: {error.strerror}.") from error


def _encode_file(codec: "SatModel", path: Path, excerpt: "Excerpt", progress: "tqdm") -> Iterator["torch.LongTensor"]:
    """Codes `(num_windows, tokens_per_window)` of a sound file, some windows at a time."""
    from .data.audio import read_sound
    from .data.streaming import encode_blocks

    blocks = excerpt.watch(read_sound(path, codec.config.sampling_rate, codec.config.audio_channels))
    return _count(encode_blocks(codec, blocks), progress)


def _save_sound(path: Path, blocks: Iterable["torch.Tensor"], codec: "SatModel") -> "Excerpt":
    """Writes blocks `(channels, num_samples)`, says so, and returns the beginning of the sound for a picture."""
    from .data.audio import write_sound

    excerpt = _excerpt(codec)
    with write_sound(path, codec.config.sampling_rate, codec.config.audio_channels) as writer:
        for block in excerpt.watch(blocks):
            writer.write(block)
    seconds = writer.num_samples / codec.config.sampling_rate
    scaled = f", scaled down as a whole from a peak of {writer.peak:.2f}" if writer.peak > 1 else ""
    typer.echo(f"{path}: {seconds:.2f} s{scaled}")
    return excerpt


def _excerpt(codec: "SatModel") -> "Excerpt":
    from .data.streaming import Excerpt

    return Excerpt(PLOTTED_SECONDS * codec.config.sampling_rate)


def _plot_sounds(target: Path, excerpts: dict[str, "Excerpt"], codec: "SatModel") -> None:
    """Writes a picture of sounds beside the sound file `target`."""
    from .evaluation.plots import plot_sounds

    sounds = {}
    for title, excerpt in excerpts.items():
        if excerpt.num_samples > excerpt.max_samples:
            title = f"{title} (first {PLOTTED_SECONDS} s of {excerpt.num_samples / codec.config.sampling_rate:.0f} s)"
        sounds[title] = excerpt.samples
    picture = target.with_suffix(".png")
    with _without_glyph_warnings():
        plot_sounds(picture, sounds, codec.config.sampling_rate)
    typer.echo(picture)


def _plot_tokens(target: Path, prompt: str, codes: "torch.LongTensor", codec: "SatModel") -> None:
    """Writes a picture of the token pyramid beside the sound file `target`."""
    from .evaluation.plots import plot_token_pyramid

    config = codec.config
    stride_s = config.window_stride / config.sampling_rate
    codes = codes[: max(1, int(PLOTTED_SECONDS / stride_s))]
    picture = target.with_name(f"{target.stem}-tokens.png")
    title = f"{prompt}: {codes.numel()} tokens in {config.num_scales} scales"
    with _without_glyph_warnings():
        plot_token_pyramid(picture, codes, config.scales, config.codebook_size, stride_s, title)
    typer.echo(picture)


@contextmanager
def _without_glyph_warnings() -> Iterator[None]:
    """A title in letters that matplotlib's font lacks has boxes in their place, which is no mistake of the user's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+", UserWarning)
        yield


def _window_progress(codec: "SatModel", num_samples: int, name: str) -> "tqdm":
    from tqdm import tqdm

    return tqdm(desc=name, total=codec.config.num_windows(num_samples), unit="window", disable=None, leave=False)


def _count(batches: Iterable["torch.Tensor"], progress: "tqdm") -> Iterator["torch.Tensor"]:
    for batch in batches:
        yield batch
        progress.update(len(batch))


# --- Arguments -------------------------------------------------------------------------------------------------------


def _generators(first_seed: int, count: int) -> list["torch.Generator"]:
    """One generator per sound, so that a sound is the same whatever is made with it."""
    import torch

    return [torch.Generator().manual_seed(first_seed + index) for index in range(count)]


def _check_prompts(prompts: list[str], generator: "AarForConditionalGeneration") -> list[str]:
    """The prompts, which a model without conditioning must not get; it has one of no meaning, for file names."""
    if generator.config.conditioning == "none":
        if prompts:
            raise ValueError("This model has no conditioning, so that it takes no prompt: leave the prompts out.")
        return ["sound"]
    if not prompts:
        raise ValueError("This model takes a prompt: give at least one.")
    return prompts


def _slug(prompt: str) -> str:
    """A file name made of the words of a prompt."""
    return re.sub(r"\W+", "-", prompt.lower()).strip("-_")[:60] or "sound"


def _numbers(text: str | None, option: str) -> list[int] | None:
    if text is None:
        return None
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise typer.BadParameter(f"{option} takes whole numbers with commas between them, as in 1,2,4, got {text!r}.")
    return [int(number) for number in text.split(",")]
