"""Reports, and what they are assembled from: held-out crops, rows of several processes, a codec's measurements."""

import json
import re
import warnings

import numpy as np
import pytest
import soundfile
import torch
from clips import write_clips
from datasets import Dataset

from transformers_aar.evaluation.bootstrap import Estimate
from transformers_aar.evaluation.codec_evaluation import latent_errors, mel_distances_by_scale
from transformers_aar.evaluation.held_out import EvaluationArguments, HeldOutCrops, gather_rows, own_batches
from transformers_aar.evaluation.listeners import Listeners
from transformers_aar.evaluation.reconstruction import mel_distance
from transformers_aar.evaluation.reports import Report, Sample, noted_warnings, write_report, write_samples

RATE = 24_000
DURATION_S = 0.1


class Processes:
    """One of several processes, as Accelerate tells."""

    def __init__(self, process_index: int = 0, num_processes: int = 1):
        self.process_index, self.num_processes = process_index, num_processes
        self.is_main_process = process_index == 0

    def main_process_first(self):
        return torch.no_grad()


@pytest.fixture(scope="module")
def audioset_dir(tmp_path_factory):
    """Five healthy sounds of 100 to 300 ms."""
    folder = tmp_path_factory.mktemp("audioset")
    write_clips(folder, "eval", 5)
    return folder


@pytest.fixture
def make_crops(audioset_dir):
    def make(data_dir=audioset_dir, processes=Processes(), known_labels=None, needs_labels=False, **options):
        args = EvaluationArguments(model="m", output_dir="o", data_dir=str(data_dir), batch_size=2, **options)
        return HeldOutCrops(args, processes, DURATION_S, [RATE], known_labels, needs_labels)

    return make


def peaks(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {"peak": torch.stack([example["waveforms"][0].abs().max() for example in examples])}


def read_table(markdown: str, first_cell: str) -> list[list[str]]:
    """The rows of a Markdown table, whose first column has this name."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in markdown.splitlines() if "|" in line]
    start = next(index for index, row in enumerate(rows) if row[0] == first_cell)
    return [row for row in rows[start + 2 :] if len(row) == len(rows[start])]


def test_markdown_and_json_hold_the_same_figures(tmp_path):
    figures = {"mel_distance": Estimate(12.34567, 11.0, 13.5), "tokens_per_second": 455.0, "forward_passes": 16}
    table = [{"scale": 1, "share": 0.123456, "loss": Estimate(1.5, 1.0, 2.0)}]
    settings = {"model": "a | b"}
    texts = {"notes": ["Mind the gap."], "conclusions": ["It follows."]}
    write_report(Report("Title", settings, figures, {"Scales": table}, **texts), tmp_path)

    content = json.loads((tmp_path / "report.json").read_text())
    assert content["figures"]["mel_distance"] == {"value": 12.34567, "low": 11.0, "high": 13.5}
    assert content["figures"]["forward_passes"] == {"value": 16}
    assert content["tables"]["Scales"] == [
        {"scale": 1, "share": 0.123456, "loss": {"value": 1.5, "low": 1.0, "high": 2.0}}
    ]
    assert content["environment"]["torch"] == torch.__version__ and content["command"].startswith("python ")

    markdown = (tmp_path / "report.md").read_text()
    assert markdown.startswith("# Title\n") and "Mind the gap." in markdown and "a \\| b" in markdown
    assert content["conclusions"] == ["It follows."]
    assert markdown.index("Mind the gap.") < markdown.index("| scale |") < markdown.index("It follows.")
    assert content["command"] in markdown and str(content["environment"]["processor"]) in markdown
    assert read_table(markdown, "figure")[:3] == [
        ["mel distance", "12.35", "11 to 13.5"],
        ["tokens per second", "455", ""],
        ["forward passes", "16", ""],
    ]
    assert read_table(markdown, "scale")[0] == ["1", "0.1235", "1.5 (1 to 2)"]


def test_a_figure_that_is_no_number_leaves_no_report(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_report(Report("Title", {"model": "m"}, {"loss": float("nan")}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_samples_are_written_with_their_spectrograms(tmp_path, sounds):
    pair = {"original": sounds(1, 2400)[0], "generated again": 3 * sounds(1, 2400, seed=1)[0]}
    listed = write_samples(
        [Sample("Dog; $5", pair), Sample("Rain", {"original": pair["original"]})], RATE, tmp_path, "p.png"
    )
    assert listed[0] == {
        "title": "Dog; $5",
        "files": {"original": "sounds/01-original.wav", "generated again": "sounds/01-generated-again.wav"},
    }
    for name, path in listed[0]["files"].items():
        written, rate = soundfile.read(tmp_path / path, dtype="float32")
        assert rate == RATE
        np.testing.assert_allclose(written, pair[name] / max(1, pair[name].abs().max()), atol=1e-4)
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {"p.png", "sounds"}


def test_warnings_become_notes_and_pass():
    notes = []
    with pytest.warns(UserWarning, match="few sounds"):
        with noted_warnings(notes):
            warnings.warn("few sounds", stacklevel=1)
    assert notes == ["few sounds"]


@pytest.mark.parametrize("count", [2, 7, 8, 9])
def test_batches_are_the_same_for_any_number_of_processes(count):
    alone = own_batches(range(count), 4, Processes())
    shared = [own_batches(range(count), 4, Processes(rank, 3)) for rank in range(3)]
    assert sorted(map(list, alone)) == sorted(list(batch) for batches in shared for batch in batches)
    assert [place for batch in alone for place in batch] == list(range(count))
    assert all(2 <= len(batch) <= 4 for batch in alone)


def test_rows_are_gathered_in_the_order_of_the_sounds():
    batches = [
        {"index": torch.tensor(places), "clip": torch.tensor(clips), "x": torch.tensor(places)[:, None].double()}
        for places, clips in (([4, 5], [7, 7]), ([0, 2], [7, 9]))
    ]
    rows = gather_rows(batches)
    assert rows["index"].tolist() == [0, 2, 4, 5] and rows["x"].flatten().tolist() == [0, 2, 4, 5]
    for of_one_clip in ([], batches[:1]):
        with pytest.raises(ValueError, match="at least 2 usable sounds"):
            gather_rows(of_one_clip)


def test_crops_are_fixed_and_spread_over_the_sounds(make_crops):
    crops = make_crops(num_examples=3)
    assert [crops.read(index)["name"][-6:] for index in range(3)] == ["00.wav", "01.wav", "03.wav"]
    rows = crops.measure(peaks, "crops")
    assert torch.equal(rows["peak"], make_crops(num_examples=3).measure(peaks, "crops")["peak"])
    assert rows["index"].tolist() == [0, 1, 2]
    assert crops.title(crops.read(1)) == "Dog, Siren"
    # the first and the fourth have one label, Dog; the second has two
    dog = crops.label_names.index("Dog")
    assert rows["label"].tolist() == [dog, -1, dog]


def test_more_crops_than_sounds_are_others_of_the_same(make_crops):
    crops = make_crops(num_examples=10)
    assert crops.read(2)["name"] == crops.read(7)["name"]
    assert not torch.equal(crops.read(2)["waveforms"][0], crops.read(7)["waveforms"][0])
    first, second = crops.measure(peaks, "crops")["clip"].chunk(2)
    assert torch.equal(first, second) and len(first.unique()) == 5


def test_sounds_of_one_name_are_several(make_crops, audioset_dir, tmp_path):
    """Tables that hold their sounds often call all of them alike."""
    files = sorted(audioset_dir.rglob("*.wav"))[:3]
    sounds = [{"path": "audio.wav", "bytes": file.read_bytes()} for file in files]
    Dataset.from_dict({"audio": sounds}).to_parquet(tmp_path / "data.parquet")
    crops = make_crops(tmp_path, dataset_name="parquet", split="train", num_examples=6)
    assert crops.measure(peaks, "crops")["clip"].tolist() == [0, 1, 2, 0, 1, 2]


def test_labels_are_those_of_the_model(make_crops):
    crops = make_crops(num_examples=5, known_labels=["Siren", "Cat"], needs_labels=True)
    rows = crops.measure(peaks, "crops")
    assert rows["index"].tolist() == [1, 2, 4] and rows["label"].tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="none of the model's labels"):
        make_crops(known_labels=["Purring of stones"], needs_labels=True)


@pytest.mark.parametrize(
    "samples, message",
    [
        (np.zeros(4800), "is silent where it was cut"),
        (np.full(4800, np.nan), "holds NaN or infinite samples"),
        (np.zeros(0), "is empty"),
    ],
)
def test_unusable_crops_are_named(make_crops, tmp_path, samples, message):
    write_clips(tmp_path, "eval", 4)
    unusable = next(tmp_path.rglob("Yeval-02.wav"))
    soundfile.write(unusable, samples, RATE, "FLOAT")
    with pytest.raises(ValueError, match=f"{re.escape(unusable.name)} {message}.* --max_skipped_share"):
        make_crops(tmp_path, num_examples=4).measure(peaks, "crops")
    crops = make_crops(tmp_path, num_examples=4, max_skipped_share=0.25)
    assert crops.measure(peaks, "crops")["index"].tolist() == [0, 1, 3]
    assert [str(unusable) in name for name, _ in crops.left_out] == [True]


class LoudnessClassifier:
    """Hears a cat in loud sounds, at half the rate, and a dog in others."""

    labels = ["Cat", "Dog"]
    sampling_rate = RATE // 2

    def predict(self, waveforms: torch.Tensor) -> torch.LongTensor:
        assert waveforms.shape[1] == 1200
        return (waveforms.square().mean(1) < 1).long()


def test_shares_named_rightly(sounds):
    listeners = Listeners(["log_mel"], None, ["Dog", "Rain", "Cat"], RATE, torch.device("cpu"))
    listeners.classifier = LoudnessClassifier()
    loud = torch.tensor([0, 1, 1, 0, 1, 0])
    rows = listeners.hear("generated", sounds(6, 2400) * (1 + 99 * loud[:, None]))
    assert rows["generated/heard"].tolist() == [0, 2, 2, 0, 2, 0]
    assert rows["generated/log_mel"].shape == (6, 128)
    # the last sound has several labels, of which none can be the right one
    rows |= {"label": torch.tensor([0, 2, 1, 0, 2, -1]), "clip": torch.arange(6)}
    figures = listeners.named_rightly(rows, "generated")
    assert figures["named_rightly/generated"].value == pytest.approx(0.8)
    assert listeners.shares_named_rightly(rows, "generated") == {"Dog": 1.0, "Rain": 0.0, "Cat": 1.0}
    assert listeners.named_rightly({**rows, "label": torch.full((6,), -1)}, "generated") == {}
    assert listeners.named_rightly({**rows, "clip": torch.zeros(6)}, "generated") == {}


@torch.no_grad()
def test_latent_errors_are_the_quantizers_residuals(build_codec):
    codec = build_codec()
    waveforms = 0.3 * torch.randn(3, 1, codec.config.window_length, generator=torch.Generator().manual_seed(0))
    rows = latent_errors(codec, waveforms)
    for number, waveform in enumerate(waveforms):
        # without gradients both terms of the commitment loss are the residual that a scale leaves
        losses = codec.quantizer(codec.encoder(waveform[None])).commitment_losses
        torch.testing.assert_close(rows["latent_residual"][number], losses / 2)


@torch.no_grad()
def test_mel_distance_falls_back_to_coarse_scales(build_codec, sounds):
    codec = build_codec(window_length_s=0.16, scales=[1, 3, 6, 12])
    waveforms = sounds(2, codec.config.window_length)
    codes = codec.encode(waveforms[:, None]).audio_codes
    distances = mel_distances_by_scale(codec, codes, waveforms)
    assert distances.shape == (2, 4)
    for count, expected in ((4, codes), (2, codes[..., :4])):
        decoded = codec.decode(expected).audio_values[:, 0]
        torch.testing.assert_close(distances[:, count - 1], mel_distance(decoded, waveforms, RATE))
