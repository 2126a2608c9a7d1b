"""scripts/evaluate_sat.py and scripts/evaluate_aar.py as a user runs them: on a folder of AudioSet."""

import json
import math
from pathlib import Path

import pytest
import soundfile
from clips import write_clips
from forking import Finished, Forked, rank_environments

from transformers_aar import AarProcessor, SatFeatureExtractor
from transformers_aar.hub.label_tokenizer import label_tokenizer
from transformers_aar.linear_aar import has_int8_products

# long enough for spectral distances
CODEC_FIELDS = {"window_length_s": 0.16, "scales": [1, 3, 6, 12]}
LABELS = ["Dog", "Siren", "Rain", "Cat"]
NUM_SOUNDS = 9
SECONDS = ("encode_seconds_per_second", "decode_seconds_per_second", "seconds_per_clip", "seconds_per_clip_alone")


@pytest.fixture(scope="module")
def audioset_dir(tmp_path_factory) -> Path:
    """Nine sounds, of which every third has the label Dog alone."""
    folder = tmp_path_factory.mktemp("audioset")
    write_clips(folder, "eval", NUM_SOUNDS)
    return folder


@pytest.fixture(scope="module")
def codec_dir(build_codec, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("codec")
    build_codec(**CODEC_FIELDS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def generator_dir(build_generator, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("generator")
    build_generator(codec_fields=CODEC_FIELDS, conditioning="label", labels=LABELS).save_pretrained(folder)
    AarProcessor(SatFeatureExtractor(), label_tokenizer(LABELS), labels=LABELS).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def text_generator_dir(build_generator, build_clap_processor, clap_config, tmp_path_factory) -> Path:
    from transformers import ClapModel

    folder = tmp_path_factory.mktemp("text_generator")
    model = build_generator(codec_fields=CODEC_FIELDS, conditioning="clap")
    model.attach_conditioner(ClapModel(clap_config))
    model.save_pretrained(folder)
    clap = build_clap_processor()
    AarProcessor(SatFeatureExtractor(), clap.tokenizer, clap.feature_extractor).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clap_dir(build_clap_processor, clap_config, tmp_path_factory) -> Path:
    from transformers import ClapModel

    folder = tmp_path_factory.mktemp("clap")
    ClapModel(clap_config).save_pretrained(folder)
    build_clap_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def ast_dir(tmp_path_factory) -> Path:
    from transformers import ASTConfig, ASTFeatureExtractor, ASTForAudioClassification

    folder = tmp_path_factory.mktemp("ast")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = ASTConfig(**sizes, max_length=64, num_mel_bins=16, num_labels=5)
    ASTForAudioClassification(config).save_pretrained(folder)
    ASTFeatureExtractor(max_length=64, num_mel_bins=16).save_pretrained(folder)
    return folder


class Evaluations:
    """Runs the scripts on the folder of AudioSet."""

    def __init__(self, audioset_dir: Path):
        self.audioset_dir = audioset_dir

    def run(self, script: str, model: Path, folder: Path, num_processes: int = 1, **options) -> list[Finished]:
        options = {
            **{"model": model, "data_dir": self.audioset_dir, "num_examples": NUM_SOUNDS, "batch_size": 4},
            **{"num_samples": 2, "use_cpu": True, "output_dir": folder / "report"},
            **options,
        }
        environments = rank_environments(num_processes)
        started = [
            Forked(script, options, folder / f"process-{rank}", environment=environment)
            for rank, environment in enumerate(environments)
        ]
        return [process.wait() for process in started]

    def report(self, script: str, model: Path, folder: Path, num_processes: int = 1, **options) -> dict:
        for finished in self.run(script, model, folder, num_processes, **options):
            assert finished.status == 0, finished.stderr
        return json.loads((folder / "report" / "report.json").read_text())


@pytest.fixture(scope="module")
def evaluations(audioset_dir) -> Evaluations:
    return Evaluations(audioset_dir)


@pytest.fixture(scope="module")
def codec_report(evaluations, codec_dir, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("sat")
    return folder / "report", evaluations.report("evaluate_sat.py", codec_dir, folder)


@pytest.fixture(scope="module")
def generator_report(evaluations, generator_dir, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("aar")
    return folder / "report", evaluations.report("evaluate_aar.py", generator_dir, folder)


def figures_but_seconds(report: dict) -> dict[str, float]:
    figures = {name: entry for name, entry in report["figures"].items() if name not in SECONDS}
    return {f"{name}/{end}": value for name, entry in figures.items() for end, value in entry.items()}


def check_files(folder: Path, report: dict) -> None:
    """Everything that the report names is there, nothing else is, and the Markdown shows the same figures."""
    sounds = [path for sample in report["samples"] for path in sample["files"].values()]
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {"report.json", "report.md", *report["pictures"], *sounds}
    markdown = (folder / "report.md").read_text()
    for name in (*sounds, *report["pictures"]):
        assert f"({name})" in markdown
    for name, entry in report["figures"].items():
        assert f"| {name.replace('_', ' ')} | {entry['value']:.4g} |" in markdown


def test_report_of_a_codec(codec_report):
    folder, report = codec_report
    check_files(folder, report)
    figures = report["figures"]
    for name in ("mel_distance", "stft_distance", "si_sdr_db", "relative_error", "frechet_distance/log_mel"):
        assert figures[name]["low"] < figures[name]["value"] < figures[name]["high"]
    # 22 codes of 4 bits in 0.16 s
    assert figures["tokens_per_second"]["value"] == 137.5
    assert figures["bitrate_kbps"]["value"] == pytest.approx(0.55)
    assert all(figures[name]["value"] > 0 for name in SECONDS[:2])
    table = report["tables"]["Scales"]
    assert [row["tokens"] for row in table] == CODEC_FIELDS["scales"]
    assert table[-1]["mel distance"] == figures["mel_distance"]
    assert all(0 < row["codes in use"] <= 1 <= row["perplexity"] <= 16 for row in table)
    assert report["settings"]["held-out sounds"] == NUM_SOUNDS and report["settings"]["processes"] == 1
    assert "log_mel 1" in report["settings"]["embeddings"]
    # 9 sounds are too few for 128 numbers
    assert "biased upwards" in report["notes"][0]
    rates = {soundfile.info(path).samplerate for path in (folder / "sounds").iterdir()}
    assert rates == {24_000}


def test_report_of_a_generator(generator_report):
    folder, report = generator_report
    check_files(folder, report)
    figures = report["figures"]
    for pair in ("to_held_out", "to_reconstruction", "reconstruction_to_held_out"):
        assert figures[f"frechet_distance/log_mel/{pair}"]["value"] > 0
    assert figures["forward_passes"]["value"] == 4
    # of random weights; 16 codes at random would be log 16 = 2.8
    assert figures["loss"]["value"] > math.log(16)
    assert figures["loss"]["value"] != figures["loss_with_neighbours_conditioning"]["value"]
    # of at most nine different codes in a scale of a single token, and of 16 in any
    assert 0 < figures["entropy_of_single_codes"]["value"] < math.log(16)
    table = report["tables"]["Scales"]
    mean = sum(row["loss"]["value"] * row["tokens"] for row in table) / 22
    assert mean == pytest.approx(figures["loss"]["value"])
    assert report["settings"]["generated sounds"] == NUM_SOUNDS
    assert report["settings"]["guidance_scale"] == 4.0
    assert list(report["samples"][0]["files"]) == ["real", "reconstruction", "generated", "generated again"]


def test_two_processes_report_the_figures_of_one(evaluations, codec_dir, codec_report, tmp_path):
    report = evaluations.report("evaluate_sat.py", codec_dir, tmp_path, num_processes=2)
    assert report["settings"]["processes"] == 2
    assert figures_but_seconds(report) == pytest.approx(figures_but_seconds(codec_report[1]), rel=1e-5)
    assert report["tables"] == codec_report[1]["tables"]


@pytest.mark.slow
def test_two_processes_generate_the_same(evaluations, generator_dir, generator_report, tmp_path):
    report = evaluations.report("evaluate_aar.py", generator_dir, tmp_path, num_processes=2)
    assert figures_but_seconds(report) == pytest.approx(figures_but_seconds(generator_report[1]), rel=1e-5)


@pytest.mark.slow
def test_sounds_for_labels(evaluations, generator_dir, ast_dir, tmp_path):
    options = {"num_per_label": 2, "embeddings": f"ast={ast_dir}", "temperature": 0.5, "guidance_scale": 0.0}
    report = evaluations.report("evaluate_aar.py", generator_dir, tmp_path, **options)
    assert [sample["title"] for sample in report["samples"]] == ["Dog", "Rain"]
    # only of the dog alone there is a real sound
    assert [len(sample["files"]) for sample in report["samples"]] == [4, 2]
    settings = report["settings"]
    assert (settings["generated sounds"], settings["temperature"], settings["guidance_scale"]) == (8, 0.5, 0.0)
    assert report["figures"]["inception_score"]["value"] >= 1
    assert "kl_divergence" not in report["figures"]


@pytest.mark.slow
def test_faster_sounds(evaluations, generator_dir, generator_report, tmp_path):
    """What makes generation faster, and what it costs."""
    options = {"max_scales": 3, "unguided_scales": 1, "int8": has_int8_products()}
    report = evaluations.report("evaluate_aar.py", generator_dir, tmp_path, **options)
    assert report["settings"] | options == report["settings"]
    _, slow = generator_report
    assert report["figures"]["forward_passes"]["value"] == 3 < slow["figures"]["forward_passes"]["value"]
    losses = [each["figures"]["loss"]["value"] for each in (report, slow)]
    assert losses[0] == pytest.approx(losses[1], rel=0.01) and (losses[0] != losses[1]) == has_int8_products()


@pytest.mark.slow
def test_sounds_like_those_that_are_held_out(evaluations, generator_dir, ast_dir, tmp_path):
    report = evaluations.report("evaluate_aar.py", generator_dir, tmp_path, embeddings=f"ast={ast_dir}")
    assert report["figures"]["kl_divergence"]["value"] > 0
    assert report["settings"]["embeddings"].startswith("ast ")


@pytest.mark.slow
def test_sounds_for_texts(evaluations, text_generator_dir, clap_dir, tmp_path):
    options = {"prompts": "a dog", "num_per_label": 3, "embeddings": f"clap={clap_dir}"}
    report = evaluations.report("evaluate_aar.py", text_generator_dir, tmp_path / "text", **options)
    assert -1 <= report["figures"]["clap_score"]["value"] <= 1
    assert [list(sample["files"]) for sample in report["samples"]] == [["generated", "generated again"]] * 2
    # and for what CLAP hears in held-out sounds
    report = evaluations.report("evaluate_aar.py", text_generator_dir, tmp_path / "audio")
    assert report["settings"]["generated sounds"] == NUM_SOUNDS
    assert "real" in report["samples"][0]["files"]


@pytest.mark.parametrize(
    "script, changed, message",
    [
        ("evaluate_sat.py", {"data_dir": "nowhere"}, "nowhere"),
        ("evaluate_sat.py", {"num_examples": 1}, "`num_examples` must be a whole number of at least 2"),
        ("evaluate_sat.py", {"embeddings": "vgg"}, "take clap, ast or log_mel"),
        ("evaluate_sat.py", {"modle": "x"}, "`modle` is no option: the nearest is `model`"),
        ("evaluate_aar.py", {"prompts": "Dgo", "num_per_label": 2}, "the nearest it knows are 'Dog'"),
        ("evaluate_aar.py", {"temperature": 0}, "`temperature` must be a positive number"),
        ("evaluate_aar.py", {"max_scales": 99}, "`max_scales` must lie between 1 and 4"),
        ("evaluate_aar.py", {"unguided_scales": 2, "guidance_scale": 0}, "`unguided_scales` has no effect"),
        ("evaluate_aar.py", {"dataset_config_name": "x"}, "give both or neither"),
    ],
)
def test_mistakes_end_in_one_sentence(evaluations, generator_dir, tmp_path, script, changed, message):
    (finished,) = evaluations.run(script, generator_dir, tmp_path, **changed)
    assert finished.status in (1, 2)
    assert finished.stderr.splitlines()[-1].startswith("Error: ") and message in finished.stderr.splitlines()[-1]
    assert "Traceback" not in finished.stderr
    assert not (tmp_path / "report" / "report.json").exists()


def test_a_codec_generates_nothing(evaluations, codec_dir, tmp_path):
    (finished,) = evaluations.run("evaluate_aar.py", codec_dir, tmp_path)
    assert finished.status == 1 and "evaluate it with evaluate_sat.py" in finished.stderr
