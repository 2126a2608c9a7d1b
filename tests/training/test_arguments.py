"""Options from YAML files and the command line: same rules for both, and one sentence for each mistake."""

from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from transformers_aar import AarConfig, SatConfig
from transformers_aar.training.arguments import (
    AarArguments,
    DataArguments,
    LoopArguments,
    SatArguments,
    make_arguments,
    parse_arguments,
)
from transformers_aar.training.discriminators import AudioDiscriminator
from transformers_aar.training.losses import SAT_LOSS_WEIGHTS

CONFIGS = Path(__file__).parents[2] / "scripts" / "configs"
SAT_TYPES = (DataArguments, LoopArguments, SatArguments)
AAR_TYPES = (DataArguments, LoopArguments, AarArguments)


@pytest.fixture
def recipe(tmp_path):
    """Writes a YAML file and returns its path."""

    def write(text: str) -> str:
        path = tmp_path / "recipe.yaml"
        path.write_text(text)
        return str(path)

    return write


@pytest.fixture
def refused(capsys):
    """The one sentence that a command line is refused with."""

    def run(*words: str, types: tuple[type, ...] = SAT_TYPES) -> str:
        with pytest.raises(SystemExit) as stopped:
            parse_arguments(words, *types)
        assert stopped.value.code == 2
        output = capsys.readouterr()
        assert output.out == ""
        assert output.err.startswith("Error: ") and output.err.count("\n") == 1
        return output.err

    return run


def test_file_and_command_line_are_read_alike(recipe):
    """Every kind of field, from either side."""
    path = recipe(
        "output_dir: runs/1\nmax_steps: 30\nlearning_rate: 1e-4\nuse_cpu: true\nadam_betas: [0.9, 99e-2]\n"
        "mixed_precision: no\nmax_minutes: null\ncodec_config: {num_filters: 8, dead_code_threshold: 1e-2}\n"
    )
    words = [
        *("--output_dir", "runs/1", "--max_steps", "30", "--learning_rate", "1e-4", "--use_cpu", "true"),
        *("--adam_betas", "0.9", "99e-2", "--mixed_precision", "no"),
        *("--codec_config", '{"num_filters": 8, "dead_code_threshold": 0.01}'),
    ]
    from_file, from_words = parse_arguments([path], *SAT_TYPES), parse_arguments(words, *SAT_TYPES)
    assert from_file == from_words
    _, loop, sat = from_file
    assert (loop.max_steps, loop.learning_rate, loop.use_cpu, loop.max_minutes) == (30, 1e-4, True, None)
    assert sat.adam_betas == [0.9, 0.99]
    assert sat.codec_config == {"num_filters": 8, "dead_code_threshold": 0.01}


def test_command_line_has_the_last_word(recipe):
    """It replaces lists as a whole."""
    path = recipe("output_dir: a\nseed: 1\nadam_betas: [0.1, 0.2]\n")
    words = ["--seed=2", "--adam-betas", "0.3", "0.4"]
    _, loop, sat = parse_arguments([path, *words], *SAT_TYPES)
    assert (loop.output_dir, loop.seed) == ("a", 2)
    assert sat.adam_betas == [0.3, 0.4]


def test_mappings_are_overridden_field_by_field(recipe):
    """What the command line doesn't name stays the recipe's, but for a choice of parts, which it replaces."""
    path = recipe(
        "output_dir: a\ncodec_config: {num_filters: 8, codebook_size: 32}\nloss_weights: {wave: 0.0}\n"
        "discriminators: {stft: {num_filters: 2}}\n"
    )
    words = ["--codec_config", '{"codebook_size": 16}', '--loss_weights={"mel": 2.0}', "--discriminators", "{}"]
    *_, sat = parse_arguments([path, *words], *SAT_TYPES)
    assert sat.codec_config == {"num_filters": 8, "codebook_size": 16}
    assert (sat.loss_weights["wave"], sat.loss_weights["mel"]) == (0.0, 2.0)
    assert sat.discriminators == {}

    path = recipe("output_dir: a\ncodec: b\nmodel_config: {conditioning: label, num_hidden_layers: 4}\n")
    *_, aar = parse_arguments([path, '--model-config={"conditioning": "none"}'], *AAR_TYPES)
    assert aar.model_config == {"conditioning": "none", "num_hidden_layers": 4}
    path = recipe("output_dir: a\ncodec_config: {num_filters: 8}\n")
    *_, sat = parse_arguments([path, "--codec_config", "{}"], *SAT_TYPES)
    assert sat.codec_config == {}


def test_a_mapping_that_is_none_is_refused_beside_a_recipe(recipe, refused):
    path = recipe("output_dir: a\ncodec_config: {num_filters: 8}\n")
    for text in ("{num", "[]", "8"):
        assert "`codec_config` must be a dictionary" in refused(path, "--codec_config", text)


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("", "required: --output_dir"),
        ("--output_dir a --lerning_rate 1", "`lerning_rate` is no option: the nearest is `learning_rate`"),
        ("--output_dir a --max_step 1", "`max_step` is no option: the nearest is `max_steps`"),
        ("--output_dir a --max_steps ten", "--max_steps: invalid int value: 'ten'"),
        ("--output_dir a --max_steps 0", "`max_steps` must be a positive whole number"),
        ("--output_dir a --warmup_share 1.5", "`warmup_share` must be"),
        ("--output_dir a --lr_schedule linear", "`lr_schedule` must be one of lin0, cosine"),
        ("--output_dir a --max_skipped_share -0.1", "`max_skipped_share` must be a number between 0 and 1"),
        ("--output_dir a --seed", "--seed: expected one argument"),
        ("--output_dir a b", "'b' belongs to no option"),
        ("nowhere.yaml --output_dir a", "nowhere.yaml can't be read"),
        ("--output_dir a --codec_config {num_filters:8}", "`codec_config` must be a dictionary, in JSON"),
        ('--output_dir a --codec_config {"num_filter":8}', "the nearest is `num_filters`"),
        ('--output_dir a --codec_config {"num_filters":-8}', "`num_filters` must be a positive whole number"),
        ('--output_dir a --discriminators {"sftf":{}}', "the nearest is `stft`"),
        ('--output_dir a --discriminators {"stft":{"n_fft":[64]}}', "the nearest is `n_ffts`"),
        ('--output_dir a --discriminators {"stft":8}', "must have a dictionary of arguments for stft"),
        ('--output_dir a --loss_weights {"mle":1}', "the nearest is `mel`"),
        ('--output_dir a --loss_weights {"mel":"big"}', "a number of at least 0 for mel"),
        ("--output_dir a --adam_betas 0.5", "`adam_betas` must be two numbers"),
        ("--output_dir a --discriminator_skip_interval 1", "`discriminator_skip_interval` of 1"),
        ("--output_dir a --dataset_config_name b", "`dataset_name`: give both or neither"),
    ],
)
def test_mistakes_are_named(refused, words, sentence):
    """By the field they are in, with what would be right."""
    assert sentence in refused(*words.split())


@pytest.mark.parametrize(
    "text, sentence",
    [
        ("outputdir: a\n", "`outputdir` is no option in"),
        ("output_dir: a\nmax_steps: many\n", "--max_steps: invalid int value: 'many'"),
        ("output_dir: a\nuse_cpu: maybe\n", "--use_cpu"),
        ("output_dir: a\nmax_steps: [1, 2]\n", "'2' belongs to no option"),
        ("- output_dir\n", "must have lines of `field: value`"),
        ("", "must have lines of `field: value`"),
        ("output_dir: [a\n", "is no YAML"),
    ],
)
def test_mistakes_in_the_file_are_named(refused, recipe, text, sentence):
    """Like those on the command line."""
    assert sentence in refused(recipe(text))


def test_folder_in_place_of_the_file(refused, tmp_path):
    """A folder isn't read as an empty file."""
    assert "can't be read" in refused(str(tmp_path))


def test_help_names_the_fields(capsys):
    """And isn't an error."""
    with pytest.raises(SystemExit) as stopped:
        parse_arguments(["--help"], *SAT_TYPES)
    assert stopped.value.code == 0
    assert "--learning_rate" in capsys.readouterr().out


def test_loss_weights_are_those_that_differ():
    """Without a discriminator its losses don't exist."""
    assert SatArguments().loss_weights == SAT_LOSS_WEIGHTS
    assert SatArguments(loss_weights={"mel": 2.0}).loss_weights == SAT_LOSS_WEIGHTS | {"mel": 2.0}
    plain = SatArguments(discriminators={}, loss_weights={"wave": 10.0})
    assert plain.loss_weights == {"wave": 10.0, "mel": 1.0, "commitment": 1.0}


def test_discriminators_without_arguments_have_the_defaults(recipe):
    """A name by itself is enough."""
    *_, sat = parse_arguments([recipe("output_dir: a\ndiscriminators: {stft: , period: {}}\n")], *SAT_TYPES)
    assert sat.discriminators == {"stft": {}, "period": {}}


def test_arguments_can_be_written_down_and_read_again():
    """What a checkpoint says about its run makes the same run."""
    sat = SatArguments(discriminators={"scale": {"num_rates": 2}}, loss_weights={"mel": 2.0})
    assert SatArguments(**asdict(sat)) == sat
    aar = AarArguments(codec="codec", model_config={"conditioning": "label", "hidden_size": 64})
    assert AarArguments(**asdict(aar)) == aar


@pytest.mark.parametrize(
    "words, sentence",
    [
        ("--token_cache a --codec c", "`token_cache` and `validation_token_cache` belong together"),
        ("--codec c", "Conditioning by clap needs a `conditioner`"),
        ('--codec c --conditioner d --model_config {"conditioning":"label"}', "`model_config` says label"),
        ('--codec c --model_config {"codec_config":{}}', "`codec_config` is no field of AarConfig in `model_config`"),
        ('--codec c --model_config {"conditioning":"none","hidden_size":0}', "`hidden_size` must be"),
        ("--conditioner d", "required: --codec"),
        ("--codec c --conditioner d --attn_implementation flash", "`attn_implementation` must be one of"),
    ],
)
def test_what_a_generator_needs(refused, words, sentence):
    """Fields that don't fit each other are refused before anything is loaded."""
    assert sentence in refused("--output_dir", "a", *words.split(), types=AAR_TYPES)


def test_generator_to_go_on_from_brings_its_conditioner():
    """Nothing is asked for that the folder may have."""
    assert AarArguments(codec="codec", model_name_or_path="generator").conditioner is None


def test_there_are_recipes_of_both_stages():
    """So that the tests below have something to read."""
    names = {path.name for path in CONFIGS.glob("*.yaml")}
    assert names >= {"sat_c64.yaml", "sat_c128.yaml", "sat_small.yaml", "sat_gpu.yaml"}
    assert names >= {"aar_d16.yaml", "aar_small.yaml", "aar_gpu.yaml"}


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("sat_*.yaml")), ids=lambda path: path.stem)
def test_tokenizer_recipes(path):
    """They parse, and build a codec's configuration and its discriminators."""
    _, _, sat = parse_arguments([str(path), "--output_dir", "a"], *SAT_TYPES)
    assert SatConfig(**sat.codec_config).tokens_per_window == 455
    with torch.device("meta"):
        AudioDiscriminator(sat.discriminators)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("aar_*.yaml")), ids=lambda path: path.stem)
def test_generator_recipes(path):
    """They parse, and build a generator's configuration."""
    _, _, aar = parse_arguments([str(path), "--output_dir", "a", "--codec", "c"], *AAR_TYPES)
    labels = ["Dog"] if aar.model_config["conditioning"] == "label" else None
    config = AarConfig(labels=labels, **aar.model_config)
    assert config.hidden_size == 64 * config.num_hidden_layers or path.stem == "aar_small"


def test_published_batches():
    """1536 and 2048 sounds on the eight processes that the recipes are written for; depth and width of the paper."""
    for name in ("sat_c64", "sat_c128"):
        _, loop, sat = parse_arguments([str(CONFIGS / f"{name}.yaml"), "--output_dir", "a"], *SAT_TYPES)
        assert 8 * loop.per_device_batch_size * loop.gradient_accumulation_steps == 1536
        num_discriminators = len(sat.discriminators["stft"]["n_ffts"])
        assert sat.loss_weights["adversarial"] * num_discriminators == pytest.approx(SAT_LOSS_WEIGHTS["adversarial"])
    words = [str(CONFIGS / "aar_d16.yaml"), "--output_dir", "a", "--codec", "c"]
    _, loop, aar = parse_arguments(words, *AAR_TYPES)
    assert 8 * loop.per_device_batch_size * loop.gradient_accumulation_steps == 2048
    assert AarConfig(**aar.model_config).to_dict() == AarConfig().to_dict()


def test_options_of_a_program_are_read_as_a_files():
    data, loop, sat = make_arguments({"output_dir": "runs/1", "max_steps": 3, "discriminators": {}}, *SAT_TYPES)
    assert (loop.output_dir, loop.max_steps, sat.discriminators) == ("runs/1", 3, {})
    assert data == DataArguments()
    with pytest.raises(ValueError, match="`max_step` is no option: the nearest is `max_steps`"):
        make_arguments({"output_dir": "runs/1", "max_step": 3}, *SAT_TYPES)
    with pytest.raises(ValueError, match="`max_steps` must be a positive whole number, or nothing"):
        make_arguments({"output_dir": "runs/1", "max_steps": 0}, *SAT_TYPES)
