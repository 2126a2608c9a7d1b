"""The command line, run as a user runs it: on real files, with tiny models."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from transformers_aar import (
    AarConfig,
    AarForConditionalGeneration,
    AarProcessor,
    SatConfig,
    SatFeatureExtractor,
    SatModel,
)
from transformers_aar.cli import main
from transformers_aar.data import streaming
from transformers_aar.hub import publishing
from transformers_aar.hub.label_tokenizer import label_tokenizer

RATE = 1000
CODEC = {
    "sampling_rate": RATE,
    "upsampling_ratios": [5, 4],
    "num_filters": 2,
    "num_lstm_layers": 1,
    "hidden_size": 8,
    "codebook_dim": 4,
    "codebook_size": 16,
    "scales": [1, 5, 50],
    "phi_kernel_sizes": [3],
}


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command line in a folder of its own; returns the exit status and what it wrote on stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capsys.readouterr()
        monkeypatch.setattr(sys, "argv", ["transformers-aar", *map(str, arguments)])
        with pytest.raises(SystemExit) as ending:
            main()
        return ending.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture
def fails(run):
    """Runs the command line and returns the one sentence with which it must fail."""

    def fails(*arguments):
        status, _, stderr = run(*arguments)
        assert status in (1, 2)
        assert stderr.startswith("Error: ") and stderr.count("\n") == 1, stderr
        return stderr

    return fails


@pytest.fixture(scope="session")
def codec_dir(tmp_path_factory):
    """A random codec whose codebooks lie where its encoder's vectors do, so that codes differ."""
    torch.manual_seed(0)
    model = SatModel(SatConfig(**CODEC)).eval()
    model.start_codebooks(torch.rand(20, 1, RATE) - 0.5)
    folder = tmp_path_factory.mktemp("models") / "codec"
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def generator_dir(codec_dir):
    """A random generator of three labels around that codec."""
    torch.manual_seed(1)
    labels = ["Dog", "Rain", "Civil defense siren"]
    config = AarConfig(
        codec_config=CODEC,
        conditioning="label",
        labels=labels,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    model = AarForConditionalGeneration(config)
    with torch.no_grad():
        # as initialised, the condition hardly matters
        for parameter in [*model.model.parameters(), *model.lm_head.parameters()]:
            parameter.normal_(std=0.1)
    model.codec_model.load_state_dict(SatModel.from_pretrained(codec_dir).state_dict())
    folder = codec_dir.with_name("generator")
    model.save_pretrained(folder)
    extractor = SatFeatureExtractor(sampling_rate=RATE)
    AarProcessor(extractor, label_tokenizer(labels), labels=labels).save_pretrained(folder)
    return folder


def write_noise(path, num_samples, rate=RATE, channels=1, seed=0, **kwargs):
    noise = np.random.default_rng(seed).uniform(-0.5, 0.5, (num_samples, channels))
    soundfile.write(path, noise, rate, **kwargs)


def read_tokens(path):
    with safe_open(path, "pt") as file:
        return file.get_tensor("audio_codes"), file.metadata()


def is_picture(path):
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


@torch.no_grad()
def test_reconstruct(run, codec_dir, tmp_path):
    """Sounds of any length and format come back in their length, as the model reconstructs them."""
    write_noise("long.wav", 40_123, subtype="FLOAT")
    write_noise("short.flac", 1)
    status, stdout, stderr = run("reconstruct", "long.wav", "short.flac", "-o", "out", "--model", codec_dir, "--plot")
    assert (status, stderr) == (0, "")
    assert stdout.startswith("out/long.wav: 40.12 s\n")
    for name in ("long", "short"):
        assert is_picture(tmp_path / "out" / f"{name}.png")

    model = SatModel.from_pretrained(codec_dir).eval()
    sound = torch.from_numpy(soundfile.read("long.wav", dtype="float32")[0])[None, None]
    mask = torch.ones(1, sound.shape[-1])
    expected = model.decode(model.encode(sound).audio_codes, padding_mask=mask).audio_values
    written, rate = soundfile.read("out/long.wav", dtype="float32")
    assert rate == RATE
    np.testing.assert_allclose(written, expected[0, 0] / expected.abs().max().clamp(min=1), atol=2 / 32768)
    assert len(soundfile.read("out/short.wav")[0]) == 1


def test_loud_sounds_are_scaled_and_that_is_said(run, codec_dir, monkeypatch):
    decode_blocks = streaming.decode_blocks

    def loud_blocks(*arguments):
        for block in decode_blocks(*arguments):
            block[:, 100:101] = 4.0
            yield block

    monkeypatch.setattr(streaming, "decode_blocks", loud_blocks)
    write_noise("sound.wav", 500)
    _, stdout, _ = run("reconstruct", "sound.wav", "-o", "out", "--model", codec_dir)
    assert stdout == "out/sound.wav: 0.50 s, scaled down as a whole from a peak of 4.00\n"
    assert np.flatnonzero(np.abs(soundfile.read("out/sound.wav")[0]) > 0.999).tolist() == [100]


@pytest.mark.filterwarnings("error:Glyph:UserWarning")
def test_pictures_of_files_in_any_script(run, codec_dir):
    """Whether matplotlib's font has the letters of the title or not."""
    write_noise("鳥の声.wav", 500)
    status, _, stderr = run("reconstruct", "鳥の声.wav", "-o", "out", "--model", codec_dir, "--plot")
    assert (status, stderr) == (0, "")
    assert is_picture(Path("out/鳥の声.png"))


def test_reconstruct_mixes_down_and_resamples(run, codec_dir):
    write_noise("stereo.ogg", 30_000, rate=8000, channels=2)
    status, _, _ = run("reconstruct", "stereo.ogg", "-o", "out", "--model", codec_dir, "--format", "flac")
    written = soundfile.info("out/stereo.flac")
    assert status == 0
    assert (written.frames, written.samplerate, written.channels) == (3750, RATE, 1)


@torch.no_grad()
def test_tokens_there_and_back(run, codec_dir):
    """A token file holds the model's codes, and decodes to the very file that `reconstruct` writes."""
    write_noise("sound.wav", 40_123, subtype="FLOAT")
    assert run("tokenize", "sound.wav", "-o", "tokens", "--model", codec_dir)[0] == 0
    assert run("detokenize", "tokens/sound.safetensors", "-o", "decoded", "--model", codec_dir, "--plot")[0] == 0
    assert run("reconstruct", "sound.wav", "-o", "reconstructed", "--model", codec_dir)[0] == 0
    assert Path("decoded/sound.wav").read_bytes() == Path("reconstructed/sound.wav").read_bytes()
    assert is_picture(Path("decoded/sound.png"))

    model = SatModel.from_pretrained(codec_dir).eval()
    sound = torch.from_numpy(soundfile.read("sound.wav", dtype="float32")[0])[None, None]
    codes, metadata = read_tokens("tokens/sound.safetensors")
    assert torch.equal(codes.long(), model.encode(sound).audio_codes[0])
    assert len(codes.unique()) > 4
    assert metadata["fingerprint"] == model.fingerprint()
    assert (metadata["num_samples"], metadata["sampling_rate"]) == ("40123", str(RATE))
    assert json.loads(metadata["config"])["scales"] == CODEC["scales"]


def test_detokenize_refuses_what_does_not_belong(run, fails, codec_dir, tmp_path):
    write_noise("sound.wav", 2500)
    run("tokenize", "sound.wav", "-o", ".", "--model", codec_dir)
    codes, metadata = read_tokens("sound.safetensors")

    def complaint(name, tensors, **changes):
        save_file(tensors, f"{name}.safetensors", metadata | changes)
        return fails("detokenize", f"{name}.safetensors", "-o", "out", "--model", codec_dir)

    assert "0 to 15" in complaint("large", {"audio_codes": codes + 16})
    assert "0 to 15" in complaint("negative", {"audio_codes": codes - 16})
    assert "(3, 56)" in complaint("narrow", {"audio_codes": codes[:, :-1].contiguous()})
    assert "(3, 56)" in complaint("few", {"audio_codes": codes[:2].contiguous()})
    assert "(3, 56)" in complaint("float", {"audio_codes": codes.float()})
    assert "no token file" in complaint("nameless", {"codes": codes})
    assert "no token file" in complaint("foreign", {"audio_codes": codes}, format="pt")
    assert "another codec" in complaint("other", {"audio_codes": codes}, fingerprint="0" * 64)
    assert "version 9" in complaint("newer", {"audio_codes": codes}, version="9")
    assert "(3, 56)" in complaint("bool", {"audio_codes": codes.bool()})
    assert "torch.int64" in complaint("long", {"audio_codes": codes.long()})
    for number, samples in enumerate(("x", "", "-5", "1.5", "9" * 5000)):
        assert "no number of samples" in complaint(f"samples-{number}", {"audio_codes": codes}, num_samples=samples)
    for name in ("version", "fingerprint", "num_samples"):
        metadata.pop(name)
        assert f"doesn't tell its {name}" in complaint(f"no-{name}", {"audio_codes": codes})
        metadata = read_tokens("sound.safetensors")[1]

    data = Path("sound.safetensors").read_bytes()
    Path("truncated.safetensors").write_bytes(data[:-100])
    assert "truncated" in fails("detokenize", "truncated.safetensors", "-o", "out", "--model", codec_dir)
    assert "doesn't exist" in fails("detokenize", "missing.safetensors", "-o", "out", "--model", codec_dir)
    assert "no token file" in fails("detokenize", "sound.wav", "-o", "out", "--model", codec_dir)
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["reconstruct", "tokenize"])
def test_bad_sounds_are_refused_before_anything_is_written(fails, codec_dir, command):
    write_noise("good.wav", 500)
    write_noise("whole.wav", 5000)
    Path("text.wav").write_text("no sound")
    Path("nothing.wav").touch()
    Path("truncated.wav").write_bytes(Path("whole.wav").read_bytes()[:5000])
    soundfile.write("empty.wav", np.zeros(0), RATE)
    for name, complaint in {
        "missing.wav": "doesn't exist",
        "text.wav": "no sound file",
        "nothing.wav": "empty",
        "empty.wav": "empty",
        "truncated.wav": "truncated",
        ".": "folder",
    }.items():
        sentence = fails(command, "good.wav", name, "-o", "out", "--model", codec_dir)
        assert complaint in sentence and name in sentence
        assert not Path("out").exists()


@pytest.mark.parametrize("command", ["reconstruct", "tokenize"])
def test_what_shows_only_while_reading_leaves_no_half_file(fails, codec_dir, command):
    """A NaN and a truncated FLAC after the first hundred windows; the file before them stays."""
    write_noise("good.wav", 500)
    samples = np.random.default_rng(0).uniform(-0.5, 0.5, 100_001)
    soundfile.write("whole.flac", samples, RATE)
    data = Path("whole.flac").read_bytes()
    Path("cut.flac").write_bytes(data[:-1000])
    samples[-1] = np.nan
    soundfile.write("nan.wav", samples, RATE, subtype="FLOAT")
    suffix = {"reconstruct": "wav", "tokenize": "safetensors"}[command]
    assert "NaN" in fails(command, "good.wav", "nan.wav", "-o", "out", "--model", codec_dir)
    assert "truncated" in fails(command, "cut.flac", "-o", "out", "--model", codec_dir)
    assert [path.name for path in Path("out").iterdir()] == [f"good.{suffix}"]


def test_inputs_are_never_overwritten(fails, codec_dir):
    write_noise("sound.wav", 500)
    before = Path("sound.wav").read_bytes()
    Path("other").mkdir()
    write_noise("other/sound.flac", 500)
    assert "one of the files to read" in fails("reconstruct", "sound.wav", "-o", ".", "--model", codec_dir)
    assert "out/sound.wav" in fails("reconstruct", "sound.wav", "other/sound.flac", "-o", "out", "--model", codec_dir)
    assert Path("sound.wav").read_bytes() == before
    assert not Path("out").exists()


@pytest.mark.parametrize("command, suffix", [("reconstruct", "wav"), ("tokenize", "safetensors")])
def test_existing_files_are_kept(run, fails, codec_dir, command, suffix):
    """A refusal comes before any work, and names the file; `--overwrite` is how to replace it."""
    write_noise("good.wav", 500)
    write_noise("sound.wav", 500)
    Path("out").mkdir()
    existing = Path(f"out/sound.{suffix}")
    existing.write_text("mine")
    arguments = (command, "good.wav", "sound.wav", "-o", "out", "--model", codec_dir)
    assert f"{existing} exists: name another folder with -o, or pass --overwrite." in fails(*arguments)
    assert existing.read_text() == "mine" and list(Path("out").iterdir()) == [existing]
    assert run(*arguments, "--overwrite")[0] == 0
    assert existing.read_bytes() != b"mine"


def test_detokenize_keeps_the_recording_and_pictures(run, fails, codec_dir):
    write_noise("sound.wav", 500)
    assert run("tokenize", "sound.wav", "-o", ".", "--model", codec_dir)[0] == 0
    assert "sound.wav exists" in fails("detokenize", "sound.safetensors", "-o", ".", "--model", codec_dir)
    Path("sound.png").write_text("mine")
    arguments = ("detokenize", "sound.safetensors", "-o", ".", "--model", codec_dir, "--format", "flac")
    assert "sound.png exists" in fails(*arguments, "--plot")
    assert run(*arguments)[0] == 0
    assert Path("sound.png").read_text() == "mine"


def test_generate_numbers_on(run, generator_dir):
    """Sounds and pictures that are there stay, in whatever format; `--overwrite` counts from 1 again."""
    arguments = ("generate", "Dog", "-o", "out", "--model", generator_dir)
    Path("out").mkdir()
    Path("out/dog-2.png").write_text("mine")
    run(*arguments, "--seed", 0)
    first = Path("out/dog-3.wav").read_bytes()
    run(*arguments, "--seed", 1, "--format", "flac", "--num-return-sequences", 2)
    assert {path.name for path in Path("out").iterdir()} == {"dog-2.png", "dog-3.wav", "dog-4.flac", "dog-5.flac"}
    run(*arguments, "--seed", 0, "--overwrite")
    assert Path("out/dog-3.wav").read_bytes() == Path("out/dog-1.wav").read_bytes() == first


def test_unwritable_output(fails, codec_dir):
    write_noise("sound.wav", 500)
    Path("file").touch()
    for folder in ("file", "file/inside"):
        assert f"{folder} is a file, or lies below one" in fails(
            "reconstruct", "sound.wav", "-o", folder, "--model", codec_dir
        )


def test_bad_models(fails, codec_dir):
    config = json.loads((codec_dir / "config.json").read_text())
    weights = (codec_dir / "model.safetensors").read_bytes()

    def make(name, model=weights, **changes):
        Path(name).mkdir()
        Path(name, "config.json").write_text(json.dumps(config | changes))
        Path(name, "model.safetensors").write_bytes(model)
        return name

    tensors = load_file(codec_dir / "model.safetensors")
    tensors.pop("quantizer.codebook")
    save_file(tensors, "partial.safetensors", {"format": "pt"})
    assert "can't be loaded" in fails("info", make("truncated", weights[:1000]))
    assert "`scales`" in fails("info", make("impossible", scales=[5, 1, 50]))
    assert "`sampling_rate`" in fails("info", make("nonsense", sampling_rate="high"))
    assert "bert" in fails("info", make("other", model_type="bert"))
    assert "quantizer.codebook" in fails("info", make("partial", Path("partial.safetensors").read_bytes()))
    assert "quantizer.c" in fails("info", make("smaller", codebook_size=8))
    assert "missing is no folder" in fails("info", "missing")
    assert "can't be loaded" in fails("info", "no/where")
    Path("empty").mkdir()
    assert "can't be loaded" in fails("info", "empty")


DAMAGES = {
    "config.json": ["[]", "{", '{"model_type": 5}', {"codec_config": []}, {"dtype": "float17"}],
    "generation_config.json": ["[]"],
    "processor_config.json": ["[]", "{", {"feature_extractor": 5}, {"processor_class": "Other"}],
    "tokenizer_config.json": ["[]"],
    "tokenizer.json": ["", "{}"],
}


@pytest.mark.parametrize("name, damage", [(name, damage) for name in DAMAGES for damage in DAMAGES[name]], ids=str)
def test_damaged_folder(fails, generator_dir, name, damage):
    """Whatever error the library stumbles over, what the user reads is one sentence that ends as one."""
    shutil.copytree(generator_dir, "damaged")
    file = Path("damaged", name)
    if isinstance(damage, dict):
        damage = json.dumps(json.loads(file.read_text()) | damage)
    file.write_text(damage)
    sentence = fails("generate", "Dog", "-o", "out", "--model", "damaged")
    assert "damaged can't be loaded" in sentence and not sentence.rstrip().endswith(":")


def test_folder_without_tokenizer(fails, generator_dir):
    """The library spreads this sentence over several lines."""
    shutil.copytree(generator_dir, "damaged")
    Path("damaged/tokenizer.json").unlink()
    assert "tokenizer" in fails("generate", "Dog", "-o", "out", "--model", "damaged").split("one of:")[-1]


@pytest.mark.parametrize("device", ["toaster", "meta", "xla"])
def test_devices_that_compute_nothing(fails, codec_dir, device):
    write_noise("sound.wav", 500)
    arguments = ("--model", codec_dir, "--device", device)
    assert f"device {device} can't be used" in fails("reconstruct", "sound.wav", "-o", "out", *arguments)


LIMITED = """
import resource, sys
import soundfile, torch, torchaudio, transformers_aar
from transformers_aar.cli import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**31, used + 2**31))
main()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space by /proc")
def test_too_little_memory(tmp_path):
    """A codec whose window, a day, takes more memory than there is."""
    seconds = 86_400
    fields = CODEC | {"window_length_s": seconds, "sampling_rate": 8000, "scales": [1, 400 * seconds]}
    SatModel(SatConfig(**fields)).save_pretrained(tmp_path / "codec")
    write_noise(tmp_path / "sound.wav", 500)
    arguments = ["reconstruct", tmp_path / "sound.wav", "-o", tmp_path / "out", "--model", tmp_path / "codec"]
    result = subprocess.run([sys.executable, "-c", LIMITED, *arguments], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Error: There isn't enough memory") and result.stderr.count("\n") == 1


def test_programming_errors_keep_their_traceback(tmp_path, codec_dir):
    """Only what the user can put right becomes a sentence: a module that is missing inside the package is none."""
    write_noise(tmp_path / "sound.wav", 500)
    program = (
        "import sys; sys.modules['transformers_aar.data.streaming'] = None\n"
        "from transformers_aar.cli import main; main()"
    )
    arguments = ["reconstruct", tmp_path / "sound.wav", "-o", tmp_path / "out", "--model", codec_dir]
    result = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.startswith("Traceback") and "transformers_aar.data.streaming" in result.stderr


def test_usage_errors(fails, codec_dir):
    write_noise("sound.wav", 500)
    assert "--output-dir" in fails("reconstruct", "sound.wav")
    assert "FILE" in fails("reconstruct", "-o", "out")
    assert "'mp3'" in fails("reconstruct", "sound.wav", "-o", "out", "--format", "mp3")
    assert "device" in fails("reconstruct", "sound.wav", "-o", "out", "--model", codec_dir, "--device", "toaster")
    assert "--windows" in fails("generate", "Siren", "-o", "out", "--windows", "0")
    for seed in ("-1", 2**63, 10**40, "x"):
        assert "--seed" in fails("generate", "Siren", "-o", "out", "--seed", seed)
    assert "1,2,4" in fails("convert", "--sat", "sat.pth", "--scales", "1,x", "-o", "out")
    assert "--help" in fails()
    assert not Path("out").exists()


def test_info_of_a_codec(run, codec_dir):
    status, stdout, _ = run("info", codec_dir)
    assert status == 0
    lines = dict(line.split(maxsplit=1) for line in stdout.splitlines())
    assert lines["class"] == "SatModel"
    assert lines["scales"] == "1, 5, 50"
    assert lines["tokens"] == "56 per window, 56 per second"
    assert lines["bandwidth"] == "0.22 kbit/s"
    assert lines["fingerprint"] == SatModel.from_pretrained(codec_dir).fingerprint()


def test_generate(run, generator_dir):
    """Names, lengths and pictures; a sound depends on its seed alone, whatever is made with it."""
    arguments = ("--model", generator_dir, "--num-return-sequences", 2, "--windows", 3)
    prompts = ("Dog; Rain", "civil defense siren")
    status, stdout, stderr = run("generate", *prompts, "-o", "out", *arguments, "--seed", 5, "--plot")
    assert (status, stderr) == (0, "")
    names = [f"{slug}-{number}" for slug in ("dog-rain", "civil-defense-siren") for number in (1, 2)]
    expected = {f"{name}{suffix}" for name in names for suffix in (".wav", ".png", "-tokens.png")}
    assert {path.name for path in Path("out").iterdir()} == expected
    assert stdout.startswith("out/dog-rain-1.wav: 3.00 s")
    for name in names:
        assert soundfile.info(f"out/{name}.wav").frames == 3 * RATE
        assert is_picture(Path(f"out/{name}.png")) and is_picture(Path(f"out/{name}-tokens.png"))

    # the third sound had the seed 5 + 2
    run("generate", prompts[1], "-o", "alone", "--model", generator_dir, "--windows", 3, "--seed", 7)
    run("generate", prompts[1], "-o", "other", "--model", generator_dir, "--windows", 3, "--seed", 8)
    sound = Path("out/civil-defense-siren-1.wav").read_bytes()
    assert Path("alone/civil-defense-siren-1.wav").read_bytes() == sound
    assert Path("other/civil-defense-siren-1.wav").read_bytes() != sound


def test_generate_follows_the_guidance_scale(run, fails, generator_dir):
    sounds = []
    for scale in (0, 4, 20):
        arguments = ("--model", generator_dir, "--seed", 0, "--guidance-scale", scale, "--format", "flac")
        assert run("generate", "Dog", "-o", f"out{scale}", *arguments)[0] == 0
        sounds.append(Path(f"out{scale}/dog-1.flac").read_bytes())
    assert len(set(sounds)) == 3
    for scale in ("-1", "nan", "inf"):
        refused = fails("generate", "Dog", "-o", "out", "--model", generator_dir, "--guidance-scale", scale)
        assert "guidance_scale" in refused


def test_generate_follows_the_sampling_options(run, fails, generator_dir):
    sounds = []
    for name, options in enumerate(((), ("--temperature", 0.3), ("--top-k", 3), ("--top-p", 0.3))):
        assert run("generate", "Dog", "-o", f"{name}", "--model", generator_dir, "--seed", 0, *options)[0] == 0
        sounds.append(Path(f"{name}/dog-1.wav").read_bytes())
    assert len(set(sounds)) == 4
    for option, value in (("temperature", -1), ("top_k", -1), ("top_p", 2)):
        words = ("--model", generator_dir, f"--{option.replace('_', '-')}", value)
        assert option in fails("generate", "Dog", "-o", "out", *words)


def test_models_without_conditioning_take_no_prompts(run, fails, generator_dir, codec_dir):
    model = AarForConditionalGeneration(
        AarConfig(codec_config=CODEC, conditioning="none", hidden_size=32, num_hidden_layers=1, num_attention_heads=2)
    )
    model.save_pretrained("plain")
    AarProcessor(SatFeatureExtractor(sampling_rate=RATE), label_tokenizer()).save_pretrained("plain")
    assert "no conditioning" in fails("generate", "Dog", "-o", "out", "--model", "plain")
    assert "give at least one" in fails("generate", "-o", "out", "--model", generator_dir)
    assert not Path("out").exists()
    assert run("generate", "-o", "out", "--model", "plain", "--num-return-sequences", 2)[0] == 0
    assert {path.name for path in Path("out").iterdir()} == {"sound-1.wav", "sound-2.wav"}


def test_long_sounds_are_made_one_by_one(run, generator_dir):
    """Names and seeds are those of sounds that are made together."""
    arguments = ("--model", generator_dir, "--windows", 33)
    run("generate", "Dog", "Rain", "-o", "out", *arguments, "--num-return-sequences", 2, "--seed", 5)
    for number, name in enumerate(("dog-1", "dog-2", "rain-1", "rain-2")):
        prompt = name.split("-")[0]
        run("generate", prompt, "-o", name, *arguments, "--seed", 5 + number)
        assert Path(f"out/{name}.wav").read_bytes() == Path(name, f"{prompt}-1.wav").read_bytes()
    assert len(list(Path("out").iterdir())) == 4


def test_largest_seed(run, generator_dir):
    status, _, stderr = run("generate", "Dog", "Rain", "-o", "out", "--model", generator_dir, "--seed", 2**63 - 1)
    assert (status, stderr) == (0, "")


def test_equal_prompts_get_different_files(run, generator_dir):
    run("generate", "Dog", "dog", "-o", "out", "--model", generator_dir, "--seed", 0)
    assert Path("out/dog-1.wav").read_bytes() != Path("out/dog-2.wav").read_bytes()


def test_unknown_labels_are_refused_before_anything_is_made(fails, generator_dir):
    sentence = fails("generate", "Dog", "Rane", "-o", "out", "--model", generator_dir)
    assert "'Rane'" in sentence and "'Rain'" in sentence
    assert not Path("out").exists()


def test_a_generator_serves_as_its_codec(run, codec_dir, generator_dir):
    write_noise("sound.wav", 2500)
    run("tokenize", "sound.wav", "-o", "first", "--model", codec_dir)
    run("tokenize", "sound.wav", "-o", "second", "--model", generator_dir)
    codes, metadata = read_tokens("first/sound.safetensors")
    assert torch.equal(read_tokens("second/sound.safetensors")[0], codes)
    assert read_tokens("second/sound.safetensors")[1] == metadata


def test_info_of_a_generator(run, codec_dir, generator_dir):
    status, stdout, _ = run("info", generator_dir)
    assert status == 0
    for line in ("depth, width, heads  2, 32, 2", "labels               Dog; Rain; Civil defense siren"):
        assert line in stdout
    assert "guidance_scale 4.0, top_k 900" in stdout
    assert SatModel.from_pretrained(codec_dir).fingerprint() in stdout


def test_convert(run, fails, fixtures_dir):
    """A converted generator without CLAP says what it lacks; the wrong file is named."""
    tiny = fixtures_dir / "tiny"
    checkpoints = ("--sat", tiny / "sat_upstream.pth", "--aar", tiny / "aar_upstream.pth")
    status, stdout, stderr = run("convert", *checkpoints, "-o", "model")
    assert (status, stdout, stderr) == (0, "model: AarForConditionalGeneration\n", "")
    assert "clap" in run("info", "model")[1]
    assert "attach_conditioner" in fails("generate", "a dog barks", "-o", "out", "--model", "model")
    assert "aar_upstream.pth" in fails("convert", "--sat", tiny / "aar_upstream.pth", "-o", "other")
    assert "doesn't exist" in fails("convert", "--sat", "missing.pth", "-o", "other")
    assert not Path("other").exists()


def test_push_refuses_what_is_no_model(fails):
    Path("empty").mkdir()
    assert "config.json" in fails("push", "empty", "me/model")


@pytest.mark.parametrize("options, private", [((), False), (("--private",), True)])
def test_push_is_public_unless_private(run, monkeypatch, options, private):
    calls = []
    monkeypatch.setattr(publishing, "push", lambda *arguments: calls.append(arguments) or "address")
    assert run("push", "model", "me/model", *options)[:2] == (0, "address\n")
    assert calls == [(Path("model"), "me/model", private)]


def test_generate_refuses_a_codec(fails, codec_dir):
    assert "is a codec" in fails("generate", "Siren", "-o", "out", "--model", codec_dir)


def test_help_is_quick():
    """`--help` loads nothing heavy beyond what importing the package does."""
    program = (
        "import sys, transformers_aar; before = set(sys.modules)\n"
        "from transformers_aar.cli import main; sys.argv = ['transformers-aar', '--help']\n"
        "try: main()\n"
        "except SystemExit as ending: assert not ending.code\n"
        "heavy = {'torch', 'torchaudio', 'matplotlib', 'soundfile', 'tqdm', 'transformers_aar.evaluation'}\n"
        "print(*(heavy & (set(sys.modules) - before)), sep='', end='', file=sys.stderr)"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "reconstruct" in result.stdout


def test_python_dash_m(codec_dir):
    command = [sys.executable, "-m", "transformers_aar", "info", codec_dir]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert "SatModel" in result.stdout


# Peak resident memory of this very program: getrusage would count the process that started it.
MEASURE = """
import re, sys
from transformers_aar.cli import main
try:
    main()
finally:
    print(re.search(r"VmHWM:\\s+(\\d+) kB", open("/proc/self/status").read())[1])
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_three_hours_within_bounded_memory(tmp_path):
    """
    Three hours take hardly more memory than a minute; at the codec's rate they alone would be 173 MB of float32. With
    overlap and resampling, the path with the most buffers.
    """
    config = SatConfig(
        sampling_rate=4000,
        upsampling_ratios=[10, 8],
        num_filters=1,
        compress=1,
        num_lstm_layers=1,
        hidden_size=4,
        codebook_dim=4,
        codebook_size=8,
        scales=[1, 50],
        phi_kernel_sizes=[],
        overlap=0.25,
    )
    SatModel(config).save_pretrained(tmp_path / "codec")
    minute = np.random.default_rng(0).uniform(-0.5, 0.5, 60 * 8000)
    peaks = {}
    for minutes in (1, 180):
        sound, tokens = tmp_path / f"{minutes}.flac", tmp_path / f"{minutes}.safetensors"
        with soundfile.SoundFile(sound, "w", 8000, 1) as file:
            for _ in range(minutes):
                file.write(minute)
        for command in (["reconstruct", sound], ["tokenize", sound], ["detokenize", tokens]):
            result = subprocess.run(
                [
                    sys.executable,
                    "-c",
                    MEASURE,
                    *command,
                    "-o",
                    tmp_path,
                    "--overwrite",
                    "--model",
                    tmp_path / "codec",
                ],
                capture_output=True,
                text=True,
            )
            assert result.returncode == 0, result.stderr
            peaks[command[0], minutes] = int(result.stdout.split()[-1]) / 1024
        assert soundfile.info(tmp_path / f"{minutes}.wav").frames == minutes * 60 * 4000
    for command in ("reconstruct", "tokenize", "detokenize"):
        assert peaks[command, 180] < peaks[command, 1] + 100, peaks
    print({key: f"{peak:.0f} MB" for key, peak in peaks.items()})
