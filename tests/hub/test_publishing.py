"""Publishing to a Hub on loopback through the real client, and loading back from it by name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import EncodecConfig

from transformers_aar import (
    AarConfig,
    AarForConditionalGeneration,
    AarProcessor,
    SatConfig,
    SatFeatureExtractor,
    SatModel,
)
from transformers_aar.hub.label_tokenizer import label_tokenizer
from transformers_aar.hub.publishing import push

SMALL_SAT = {"num_filters": 2, "hidden_size": 16, "codebook_dim": 8, "codebook_size": 32, "num_lstm_layers": 1}

PUSH = """
import sys
from transformers_aar.hub.publishing import push
repo_id, *folders = sys.argv[1:]
for folder in folders:
    print(push(folder, repo_id, private=True))
"""
PUSH_MODEL = """
import sys
from transformers_aar import SatModel
model = SatModel.from_pretrained(sys.argv[2])
model.push_to_hub(sys.argv[1], revision=sys.argv[3] if len(sys.argv) > 3 else None, tags=["mine"])
"""
LOAD = """
import json, sys
import transformers_aar
from transformers import AutoFeatureExtractor, AutoModel
for options in map(json.loads, sys.argv[2:]):
    model = AutoModel.from_pretrained(sys.argv[1], **options)
    feature_extractor = AutoFeatureExtractor.from_pretrained(sys.argv[1], **options)
    print(type(feature_extractor).__name__, model.fingerprint())
"""
LOAD_WITHOUT_PACKAGE = """
import sys
sys.modules["transformers_aar"] = None  # importing it fails
from transformers import AutoFeatureExtractor, AutoModel
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
feature_extractor = AutoFeatureExtractor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(feature_extractor).__name__, model.fingerprint())
"""
GENERATE_WITHOUT_PACKAGE = """
import sys
sys.modules["transformers_aar"] = None  # importing it fails
from transformers import AutoModel, AutoProcessor
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
processor = AutoProcessor.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(processor).__name__, *model.generate(**processor("Dog")).shape)
"""
REFUSED = """
import sys
from transformers_aar.hub.publishing import push
try:
    push(sys.argv[2], sys.argv[1], token="hf_wrong")
except ValueError as error:
    print(error)
"""


def saved_codec(folder: Path, seed: int = 0) -> SatModel:
    torch.manual_seed(seed)
    model = SatModel(SatConfig(**SMALL_SAT))
    model.save_pretrained(folder)
    SatFeatureExtractor().save_pretrained(folder)
    return model


def saved_generator(folder: Path) -> None:
    torch.manual_seed(0)
    config = AarConfig(
        codec_config=SMALL_SAT,
        conditioning="label",
        labels=["Dog", "Rain"],
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    AarForConditionalGeneration(config).save_pretrained(folder)
    AarProcessor(SatFeatureExtractor(), label_tokenizer(config.labels), labels=config.labels).save_pretrained(folder)


def drop_code(folder: Path) -> None:
    """Leaves a folder as the package carries one: neither code nor references to it, and another card."""
    for path in folder.glob("*.py"):
        path.unlink()
    for path in folder.glob("*.json"):
        text = json.loads(path.read_text())
        text.pop("auto_map", None)
        text.get("feature_extractor", {}).pop("auto_map", None)
        path.write_text(json.dumps(text))
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\nMy card.\n")


def test_pushed_folder_loads_by_name(loopback_hub, run_with_hub, tmp_path):
    """Every file arrives, weights as large files; the Auto classes load them, with the package and without."""
    model = saved_codec(tmp_path / "sat")
    url = run_with_hub(PUSH, "somebody/tiny-sat", tmp_path / "sat")
    commit, files = loopback_hub.find("somebody/tiny-sat", "main")
    local = {path.relative_to(tmp_path / "sat").as_posix() for path in (tmp_path / "sat").rglob("*") if path.is_file()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"} <= local == files.keys()
    assert files["model.safetensors"] in loopback_hub.large_files.values()
    assert loopback_hub.visibility["somebody/tiny-sat"] in ("private", True)
    assert url == f"{loopback_hub.endpoint}/somebody/tiny-sat/commit/{commit}"
    expected = f"SatFeatureExtractor {model.fingerprint()}"
    assert run_with_hub(LOAD, "somebody/tiny-sat", "{}") == expected
    assert run_with_hub(LOAD_WITHOUT_PACKAGE, "somebody/tiny-sat") == expected


def test_folder_without_code_gets_it(loopback_hub, run_with_hub, tmp_path):
    """What is uploaded loads without the package; weights, card and other files go as they are."""
    folder = tmp_path / "aar"
    saved_generator(folder)
    drop_code(folder)
    (folder / "inner").mkdir()
    (folder / "inner" / "config.json").write_text("{}")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    run_with_hub(PUSH, "somebody/tiny-aar", folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    files = loopback_hub.files("somebody/tiny-aar")
    for name in ("model.safetensors", "README.md", "inner/config.json"):
        assert files[name] == before[folder / name]
    printed = run_with_hub(GENERATE_WITHOUT_PACKAGE, "somebody/tiny-aar")
    assert printed == "AarProcessor 1 1 24000"


def test_push_to_hub_brings_the_card(loopback_hub, run_with_hub, tmp_path):
    """The library's own `push_to_hub` publishes our card with the caller's tags, not its stock one."""
    saved_codec(tmp_path / "sat")
    run_with_hub(PUSH_MODEL, "somebody/pushed", tmp_path / "sat")
    card = loopback_hub.files("somebody/pushed")["README.md"].decode()
    assert "# SAT, a scale-level audio tokenizer" in card
    assert "- mine\n" in card


def test_revisions_and_subfolders(loopback_hub, run_with_hub, tmp_path):
    """`revision=` takes a commit or a branch, `subfolder=` a model inside a repository."""
    names = ("first", "first/inner", "second", "branch")
    models = {name: saved_codec(tmp_path / name, seed) for seed, name in enumerate(names)}
    run_with_hub(PUSH, "somebody/several", tmp_path / "first", tmp_path / "second")
    # A new repository has one empty commit, then comes the first push.
    first_commit = loopback_hub.repos["somebody/several"]["main"][1][0]
    run_with_hub(PUSH_MODEL, "somebody/several", tmp_path / "branch", "trial")
    options = [{}, {"revision": first_commit}, {"revision": "trial"}, {"subfolder": "inner"}]
    printed = run_with_hub(LOAD, "somebody/several", *map(json.dumps, options)).splitlines()
    expected = [models[name].fingerprint() for name in ("second", "first", "branch", "first/inner")]
    assert printed == [f"SatFeatureExtractor {fingerprint}" for fingerprint in expected]


def test_refusal_of_the_hub_is_one_sentence(loopback_hub, run_with_hub, tmp_path):
    """A wrong token publishes nothing and says why."""
    saved_codec(tmp_path / "sat")
    printed = run_with_hub(REFUSED, "somebody/tiny-sat", tmp_path / "sat")
    assert "couldn't be published as somebody/tiny-sat" in printed and "\n" not in printed
    assert "Invalid credentials" in printed
    assert not loopback_hub.repos


def drop_tensor(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    del tensors["decoder.layers.0.conv.bias"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


BROKEN = {
    "has no config.json": lambda folder: (folder / "config.json").unlink(),
    "holds training.pt": lambda folder: torch.save({}, folder / "training.pt"),
    "describes a encodec": lambda folder: EncodecConfig().save_pretrained(folder),
    "lacks 1 tensors": drop_tensor,
    "doesn't load": truncate,
    "no file named": lambda folder: (folder / "model.safetensors").unlink(),
}


INCOMPLETE = {
    "lacks feature_extraction_sat.py, modeling_aar.py": ("modeling_aar.py", "feature_extraction_sat.py"),
    "lacks generation_aar.py": ("generation_aar.py",),
    "doesn't load": ("tokenizer.json",),
    "doesn't load: Can't load feature extractor": ("processor_config.json",),
}


@pytest.mark.parametrize("sentence", INCOMPLETE)
def test_incomplete_generator_is_not_published(sentence, tmp_path):
    """Its processor must load, and the code be there, modules that other modules import included."""
    saved_generator(tmp_path / "aar")
    for name in INCOMPLETE[sentence]:
        (tmp_path / "aar" / name).unlink()
    with pytest.raises(ValueError) as caught:
        push(tmp_path / "aar", "somebody/broken")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("sentence", BROKEN)
def test_folder_that_does_not_load_is_not_published(sentence, tmp_path):
    """Incomplete, damaged or foreign folders and pickles are refused before anything is sent."""
    saved_codec(tmp_path / "sat")
    BROKEN[sentence](tmp_path / "sat")
    with pytest.raises(ValueError) as caught:
        push(tmp_path / "sat", "somebody/broken")
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)
