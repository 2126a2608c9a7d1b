"""scripts/pack_checkpoint.py as a user runs it."""

import json

import pytest
import torch
from forking import Forked
from safetensors import safe_open
from transformers import AutoModel, AutoProcessor

from transformers_aar import AarProcessor, SatFeatureExtractor
from transformers_aar.hub.label_tokenizer import label_tokenizer

LABELS = ["Dog", "Rain"]


@pytest.fixture(scope="module")
def generator_dir(build_generator, tmp_path_factory):
    folder = tmp_path_factory.mktemp("generator")
    build_generator(conditioning="label", labels=LABELS).save_pretrained(folder)
    AarProcessor(SatFeatureExtractor(), label_tokenizer(LABELS), labels=LABELS).save_pretrained(folder)
    return folder


def pack(generator_dir, tmp_path, **options):
    options = {"generator": generator_dir, "output_dir": tmp_path / "packed", **options}
    return Forked("pack_checkpoint.py", options, tmp_path).wait()


def test_what_is_packed(generator_dir, tmp_path):
    (tmp_path / "report").mkdir()
    figures = {"mel_distance": {"value": 7.1234567, "low": 7.0, "high": 7.25}, "seconds_per_clip": {"value": 1.0}}
    (tmp_path / "report" / "report.json").write_text(json.dumps({"figures": figures}))
    (tmp_path / "loss_curve.png").write_bytes(b"PNG")
    options = {"temperature": 0.5, "reports": tmp_path / "report", "limits": "It is a test."}
    finished = pack(generator_dir, tmp_path, pictures=tmp_path / "loss_curve.png", **options)
    assert finished.status == 0, finished.stderr

    folder = tmp_path / "packed"
    assert not list(folder.glob("*.py"))
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert not [name for name in weights.keys() if name.endswith("codebook_sum")]
        assert weights.get_tensor("codec_model.quantizer.codebook").dtype == torch.float32
        assert weights.get_tensor("model.label_embeddings.weight").dtype == torch.float16
        encoder = [name for name in weights.keys() if name.startswith("codec_model.encoder")]
        assert encoder and all(weights.get_tensor(name).dtype == torch.float32 for name in encoder)
    card = (folder / "README.md").read_text()
    assert "| mel distance of held-out sounds' reconstructions | 7.123 (7 to 7.25) |" in card
    assert "It is a test." in card and "seconds" not in card
    assert card.endswith("## Loss curve\n\n![Loss curve](loss_curve.png)")
    assert (folder / "loss_curve.png").read_bytes() == b"PNG"

    packed, original = AutoModel.from_pretrained(folder), AutoModel.from_pretrained(generator_dir)
    assert packed.dtype == torch.float32 and packed.generation_config.temperature == 0.5
    for name, tensor in packed.state_dict().items():
        if not name.endswith("codebook_sum"):
            torch.testing.assert_close(tensor, original.state_dict()[name], rtol=1e-3, atol=1e-4, check_dtype=False)
    inputs = AutoProcessor.from_pretrained(folder)(["Rain"], return_tensors="pt")
    assert packed.generate(**inputs).isfinite().all()


def test_mistakes(generator_dir, build_codec, tmp_path):
    (tmp_path / "packed").mkdir()
    (tmp_path / "packed" / "mine.txt").write_text("mine")
    finished = pack(generator_dir, tmp_path)
    assert finished.status == 1
    assert finished.stderr.splitlines()[-1].startswith(f"Error: {tmp_path / 'packed'} holds files already")
    assert [path.name for path in (tmp_path / "packed").iterdir()] == ["mine.txt"]

    finished = pack(generator_dir, tmp_path, output_dir=tmp_path / "new", pictures=tmp_path / "none.png")
    assert finished.status == 1 and "none.png is no PNG file" in finished.stderr.splitlines()[-1]
    assert not (tmp_path / "new").exists()

    build_codec().save_pretrained(tmp_path / "codec")
    for options, sentence in (
        ({"generator": tmp_path / "nowhere"}, "nowhere is no folder: name one that holds a model"),
        ({"generator": tmp_path / "codec"}, "codec is a codec: name the folder of a generator"),
        ({"reports": tmp_path / "nowhere"}, "report.json doesn't exist: name folders of reports"),
    ):
        finished = pack(generator_dir, tmp_path, **{"output_dir": tmp_path / "new"} | options)
        assert finished.status == 1
        assert (
            finished.stderr.startswith("Error: ") and sentence in finished.stderr and finished.stderr.count("\n") == 1
        )
        assert not (tmp_path / "new").exists()
