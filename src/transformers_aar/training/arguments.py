"""Options of the training scripts as dataclasses, read from a YAML file and the command line by the same rules."""

import argparse
import inspect
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from copy import deepcopy
from dataclasses import MISSING, dataclass, field, fields
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

import yaml
from datasets import Dataset
from transformers import HfArgumentParser

from ..configuration_aar import AarConfig
from ..configuration_sat import (
    POSITIVE_INTEGER,
    POSITIVE_NUMBER,
    SHARE_BELOW_ONE,
    Rule,
    SatConfig,
    check_fields,
    is_list,
    is_number,
    number_between,
    one_of,
)
from ..data.audioset import load_audio_dataset
from .discriminators import DISCRIMINATORS
from .losses import ADVERSARIAL_LOSSES, SAT_LOSS_WEIGHTS
from .schedules import LEARNING_RATE_SCHEDULES

COUNT: Rule = (
    lambda value: isinstance(value, int) and not isinstance(value, bool) and value >= 0,
    "a whole number of at least 0",
)
NUMBER_FROM_ZERO: Rule = (lambda value: is_number(value) and value >= 0, "a number of at least 0")
BETAS: Rule = (
    lambda values: is_list(values, SHARE_BELOW_ONE[0]) and len(values) == 2,
    "two numbers of at least 0 and below 1",
)
TEXT: Rule = (lambda value: isinstance(value, str) and value.strip() != "", "a text that isn't empty")


def optional(rule: Rule) -> Rule:
    is_possible, expected = rule
    return lambda value: value is None or is_possible(value), f"{expected}, or nothing"


class MergeMapping(argparse.Action):
    """
    Stores JSON; what the command line says of some of a mapping's fields leaves the recipe's others as they are. An
    empty mapping takes them all away.
    """

    def __call__(self, parser, namespace, values, option_string=None):
        before = getattr(namespace, self.dest)
        # a default is no text, and is replaced
        if isinstance(before, str):
            mappings = [_decode_mapping(text) for text in (before, values)]
            values = json.dumps(mappings[0] | mappings[1]) if None not in mappings and mappings[1] else values
        setattr(namespace, self.dest, values)


def option(help: str, default: Any = MISSING, **metadata: Any) -> Any:
    """A dataclass field with its help, and what else argparse is to know; without a default it must be given."""
    if isinstance(default, (dict, list)):
        return field(default_factory=partial(deepcopy, default), metadata={"help": help, **metadata})
    return field(default=default, metadata={"help": help, **metadata})


def fields_option(help: str) -> Any:
    """A dataclass field for a mapping in JSON whose fields can be overridden one by one."""
    return option(f"JSON: {help}. Overrides a recipe's field by field, and {{}} all of them.", {}, action=MergeMapping)


DATASET_RULES = {
    "audio_column": TEXT,
    **dict.fromkeys(("data_dir", "dataset_name", "dataset_config_name"), optional(TEXT)),
}


# by keyword, since others that derive from it have arguments without a default
@dataclass(kw_only=True)
class DatasetArguments:
    """Which sounds are read."""

    data_dir: str | None = option("Folder of AudioSet's clips and CSVs, or of the files of `dataset_name`.", None)
    dataset_name: str | None = option("Any dataset with sounds that `datasets` loads, in place of AudioSet.", None)
    dataset_config_name: str | None = option("Configuration of `dataset_name`.", None)
    audio_column: str = option("Column that holds the sounds.", "audio")

    def __post_init__(self):
        check_fields(self, DATASET_RULES)
        if self.dataset_config_name is not None and self.dataset_name is None:
            raise ValueError("`dataset_config_name` chooses among those of a `dataset_name`: give both or neither.")

    def load(self, split: str) -> Dataset:
        """A split of the dataset; see [`load_audio_dataset`]."""
        names = (each.name for each in fields(DatasetArguments))
        return load_audio_dataset(split, **{name: getattr(self, name) for name in names})


DATA_RULES = {
    **dict.fromkeys(("train_split", "validation_split"), TEXT),
    "num_validation_examples": POSITIVE_INTEGER,
    "max_skipped_share": number_between(0, 1),
    "dataloader_num_workers": COUNT,
}


@dataclass
class DataArguments(DatasetArguments):
    """Which sounds are read, and how."""

    train_split: str = option("Split to train on.", "unbalanced_train")
    validation_split: str = option("Split to validate on.", "eval")
    single_events: bool = option("Only parts in which one event is heard alone; takes strong labels.", False)
    num_validation_examples: int = option("Sounds that are validated on; the same every time.", 64)
    max_skipped_share: float = option("Largest share of missing and broken sounds that a run puts up with.", 0.01)
    dataloader_num_workers: int = option("Processes that read sounds, per training process; 0 reads in this one.", 2)

    def __post_init__(self):
        super().__post_init__()
        check_fields(self, DATA_RULES)


LOOP_RULES = {
    "output_dir": TEXT,
    "resume": optional(TEXT),
    "max_steps": optional(POSITIVE_INTEGER),
    **dict.fromkeys(("num_train_epochs", "learning_rate", "max_grad_norm"), POSITIVE_NUMBER),
    **dict.fromkeys(
        (
            *("per_device_batch_size", "gradient_accumulation_steps", "logging_steps"),
            *("validation_steps", "save_steps", "save_total_limit"),
        ),
        POSITIVE_INTEGER,
    ),
    "lr_schedule": one_of(*LEARNING_RATE_SCHEDULES),
    "warmup_share": SHARE_BELOW_ONE,
    "mixed_precision": one_of("no", "bf16"),
    "seed": COUNT,
    "max_minutes": optional(POSITIVE_NUMBER),
    "report_to": TEXT,
}


@dataclass
class LoopArguments:
    """What both trainings share. The defaults are the tokenizer's published recipe (arXiv 2408.09027)."""

    output_dir: str = option("Folder for checkpoints and logs; the finished model is in its subfolder `final`.")
    resume: str | None = option("`latest` or the folder of a checkpoint: goes on from there.", None)
    max_steps: int | None = option("Optimizer steps of the whole run; by default `num_train_epochs` decides.", None)
    num_train_epochs: float = option("Times that the run goes through the data, without `max_steps`.", 100.0)
    per_device_batch_size: int = option("Sounds per process and micro-batch.", 8)
    gradient_accumulation_steps: int = option("Micro-batches per optimizer step.", 1)
    learning_rate: float = option("Peak learning rate.", 3e-4)
    lr_schedule: str = option("How the rate falls after the warm-up: `cosine` or `lin0`.", "cosine")
    warmup_share: float = option("Share of the run in which the rate rises.", 0.02)
    max_grad_norm: float = option("Norm that gradients are clipped to.", 1.0)
    mixed_precision: str = option("`no` or `bf16`.", "no")
    seed: int = option("Another seed: other initial weights, order of sounds and crops.", 0)
    logging_steps: int = option("Steps from one log entry to the next.", 10)
    validation_steps: int = option("Steps from one validation to the next.", 500)
    save_steps: int = option("Steps from one checkpoint to the next.", 500)
    save_total_limit: int = option("Newest checkpoints that are kept.", 3)
    max_minutes: float | None = option("Saves and ends after so many minutes, to be resumed.", None)
    report_to: str = option("Trackers of Accelerate, separated by commas, or `none`.", "tensorboard")
    use_cpu: bool = option("Trains on the CPU, whatever else there is.", False)

    def __post_init__(self):
        check_fields(self, LOOP_RULES)


SAT_RULES = {
    "model_name_or_path": optional(TEXT),
    "adam_betas": BETAS,
    "discriminator_learning_rate": optional(POSITIVE_NUMBER),
    **dict.fromkeys(("discriminator_start_step", "discriminator_skip_interval"), COUNT),
    "codebook_start_examples": optional(POSITIVE_INTEGER),
}


@dataclass
class SatArguments:
    """The tokenizer's training. The defaults are the published recipe (arXiv 2408.09027)."""

    model_name_or_path: str | None = option("Codec to go on from, with its folder's discriminator if any.", None)
    # HfArgumentParser takes a dictionary as a text only where None is possible, too
    codec_config: dict | str | None = fields_option("fields of SatConfig that differ from its defaults")
    loss_weights: dict | str | None = fields_option(
        f"weights of the losses that differ from {json.dumps(SAT_LOSS_WEIGHTS)}"
    )
    adam_betas: list[float] = option("Adam's decay rates.", [0.5, 0.9])
    discriminators: dict | str | None = option(
        f"JSON: arguments of each discriminator ({', '.join(DISCRIMINATORS)}); "
        "{} for training without adversarial losses.",
        {"stft": {}},
    )
    discriminator_learning_rate: float | None = option("Peak rate; `learning_rate` by default.", None)
    discriminator_start_step: int = option("Step that adversarial training starts at.", 0)
    discriminator_skip_interval: int = option("The discriminator rests in every such step; 0: it never rests.", 3)
    data_dependent_init: bool = option(
        "Starts as a channel vocoder, computed from the sounds that the codebooks start from.", False
    )
    codebook_start_examples: int | None = option(
        "Sounds that the codebooks start from; the first global batch by default.", None
    )

    def __post_init__(self):
        decode_mappings(self, "codec_config", "loss_weights", "discriminators")
        check_fields(self, SAT_RULES)
        if self.discriminator_skip_interval == 1:
            raise ValueError(
                "`discriminator_skip_interval` of 1 would let the discriminator rest in every step: give 0 or at "
                "least 2, or no `discriminators`."
            )
        _refuse_unknown(self.codec_config, inspect.get_annotations(SatConfig), "field of SatConfig in `codec_config`")
        if self.model_name_or_path is None:
            SatConfig(**self.codec_config)
        self._check_discriminators()
        self._complete_loss_weights()

    def _check_discriminators(self) -> None:
        _refuse_unknown(self.discriminators, DISCRIMINATORS, "discriminator in `discriminators`")
        self.discriminators = {name: arguments or {} for name, arguments in self.discriminators.items()}
        for name, arguments in self.discriminators.items():
            if not isinstance(arguments, dict):
                raise ValueError(
                    f"`discriminators` must have a dictionary of arguments for {name}, got {arguments!r}."
                )
            known = inspect.signature(DISCRIMINATORS[name]).parameters
            _refuse_unknown(arguments, known, f"argument of the discriminator {name}")

    def _complete_loss_weights(self) -> None:
        _refuse_unknown(self.loss_weights, SAT_LOSS_WEIGHTS, "loss in `loss_weights`")
        for name, weight in self.loss_weights.items():
            if not NUMBER_FROM_ZERO[0](weight):
                raise ValueError(f"`loss_weights` must have {NUMBER_FROM_ZERO[1]} for {name}, got {weight!r}.")
        left_out = () if self.discriminators else ADVERSARIAL_LOSSES
        weights = SAT_LOSS_WEIGHTS | self.loss_weights
        self.loss_weights = {name: weight for name, weight in weights.items() if name not in left_out}


AAR_RULES = {
    "codec": TEXT,
    **dict.fromkeys(("model_name_or_path", "conditioner", "token_cache", "validation_token_cache"), optional(TEXT)),
    **dict.fromkeys(("weight_decay", "final_weight_decay"), NUMBER_FROM_ZERO),
    "adam_betas": BETAS,
    "ema_decay": optional(SHARE_BELOW_ONE),
    "prompts": optional((lambda values: is_list(values, TEXT[0]) and len(values) > 0, "a list of texts")),
    "attn_implementation": one_of("eager", "sdpa", "flex_attention"),
    "loss_average": one_of("tokens", "scales"),
}


@dataclass
class AarArguments:
    """The generator's training. The defaults are the published recipe (arXiv 2408.09027)."""

    codec: str = option("Folder or repository of the trained codec.")
    model_name_or_path: str | None = option("Generator to go on from.", None)
    model_config: dict | str | None = fields_option("fields of AarConfig that differ from its defaults")
    token_cache: str | None = option("Tokens of the training split; without them training reads audio.", None)
    validation_token_cache: str | None = option("Tokens of the validation split.", None)
    conditioner: str | None = option("Folder or repository of the CLAP model that sounds are conditioned by.", None)
    loss_average: str = option(
        "What the loss is a mean of: `tokens`, or `scales`, of which the coarse ones have few tokens.", "tokens"
    )
    weight_decay: float = option("Weight decay in the first step.", 0.05)
    final_weight_decay: float = option("Weight decay in the last step.", 0.0)
    adam_betas: list[float] = option("AdamW's decay rates.", [0.9, 0.95])
    gradient_checkpointing: bool = option("Computes activations again in the backward pass, to save memory.", False)
    ema_decay: float | None = option("Decay of an average of the weights, which is then what is validated.", None)
    prompts: list[str] | None = option("Prompts of the sounds for the log; the first labels by default.", None)
    attn_implementation: str = option("`eager`, `sdpa` or `flex_attention`.", "sdpa")

    def __post_init__(self):
        decode_mappings(self, "model_config")
        check_fields(self, AAR_RULES)
        # the two models inside are named by arguments of their own
        known = [*inspect.signature(AarConfig).parameters]
        known = [name for name in known if name not in ("codec_config", "conditioner_config", "kwargs")]
        _refuse_unknown(self.model_config, known, "field of AarConfig in `model_config`")
        if (self.token_cache is None) != (self.validation_token_cache is None):
            raise ValueError("`token_cache` and `validation_token_cache` belong together: give both or neither.")
        if self.model_name_or_path is None:
            self._check_new_model()

    def _check_new_model(self) -> None:
        conditioning = self.model_config.get("conditioning", "clap")
        # labels may come from the dataset, later
        placeholder = {"labels": ["label"]} if conditioning == "label" else {}
        AarConfig(**placeholder | self.model_config)
        if conditioning != "clap" and self.conditioner is not None:
            raise ValueError(f"`conditioner` is for conditioning by clap, but `model_config` says {conditioning}.")
        if conditioning == "clap" and self.conditioner is None and self.token_cache is None:
            raise ValueError(
                "Conditioning by clap needs a `conditioner`, a CLAP model such as laion/larger_clap_general, or a "
                "`token_cache` with its embeddings."
            )


def decode_mappings(arguments: Any, *names: str) -> None:
    """Replaces JSON in these fields by the dictionary that it is, and nothing by an empty one."""
    for name in names:
        value = getattr(arguments, name)
        decoded = _decode_mapping(value) if isinstance(value, str) else value or {}
        if not isinstance(decoded, dict):
            raise ValueError(f"`{name}` must be a dictionary, in JSON such as '{{\"name\": 1}}', got {value!r}.")
        setattr(arguments, name, decoded)


def _decode_mapping(text: str) -> dict | None:
    try:
        decoded = json.loads(text)
    except json.JSONDecodeError:
        return None
    return decoded if isinstance(decoded, dict) else None


def _refuse_unknown(names: Iterable, known: Iterable[str], kind: str) -> None:
    known = list(known)
    for name in map(str, names):
        if name not in known:
            nearest = get_close_matches(name, known, n=1, cutoff=0.0)
            raise ValueError(f"`{name}` is no {kind}: the nearest is `{nearest[0]}`.")


# Where things are, what is shown and kept, how long a run is, and how a step's work is done: other values of these
# leave what a step computes as it is.
BESIDE_THE_RECIPE = {
    *("output_dir", "resume", "max_steps", "num_train_epochs", "max_minutes", "report_to", "use_cpu"),
    *("logging_steps", "validation_steps", "save_steps", "save_total_limit"),
    *("per_device_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "attn_implementation"),
    *("model_name_or_path", "codec", "token_cache", "validation_token_cache", "conditioner", "prompts"),
}


def recipe_of(*arguments: Any) -> dict[str, Any]:
    """The options of these dataclasses that decide what a step computes."""
    options = {known.name: getattr(each, known.name) for each in arguments for known in fields(each)}
    return {name: value for name, value in options.items() if name not in BESIDE_THE_RECIPE}


# --- Parsing ---


class OneSentenceParser(HfArgumentParser):
    """An `HfArgumentParser` that says in one sentence what is wrong, and nothing else."""

    def error(self, message: str) -> NoReturn:
        # argparse names every spelling of an option, and each has two
        message = re.sub(r"(--\w+)/--[\w-]+", r"\1", message)
        self.exit(2, f"Error: {' '.join(message.split())}\n")


class RecipeLoader(yaml.SafeLoader):
    """Reads scalars as YAML 1.2 does (its core schema): 1e-4 is a number, and `no` is a word."""

    yaml_implicit_resolvers = {}


for _tag, _pattern in {
    "null": r"~|null|Null|NULL|",
    "bool": r"true|True|TRUE|false|False|FALSE",
    "int": r"[-+]?[0-9]+",
    "float": r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?",
}.items():
    RecipeLoader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), None)


def parse_arguments(argv: Sequence[str], *types: type) -> tuple:
    """
    Reads `[FILE.yaml] [--field value …]`. What the file says is put before the command line's own words, so that both
    are read by the same rules and the command line has the last word, in mappings field by field. In the file `null`
    leaves a field out.

    A mistake ends the process with exit status 2 and one sentence on stderr that names the field: unknown ones (and
    the nearest that there is), missing ones, wrong types, impossible values, and a file that can't be read.

    Args:
        argv (`Sequence[str]`): the command line, without the program's name.
        types (`type`): dataclasses, with no field in common.

    Returns:
        `tuple`: one instance of each.
    """
    parser = OneSentenceParser(types, usage="%(prog)s [FILE.yaml] [--field value ...]", allow_abbrev=False)
    recipe_path, words = (argv[0], argv[1:]) if argv and not argv[0].startswith("-") else (None, argv)
    try:
        recipe = {} if recipe_path is None else read_recipe(recipe_path)
        known = [known.name for arguments in types for known in fields(arguments)]
        _refuse_unknown(recipe, known, f"option in {recipe_path}")
        options = [word[2:].partition("=")[0].replace("-", "_") for word in words if word.startswith("--")]
        _refuse_unknown(options, [*known, "help"], "option")
        recipe_words = [word for name, value in recipe.items() for word in _as_words(name, value)]
        *arguments, unused = parser.parse_args_into_dataclasses(
            [*recipe_words, *words], return_remaining_strings=True, look_for_args_file=False
        )
        if unused:
            raise ValueError(
                f"{unused[0]!r} belongs to no option: a YAML file comes first, and only lists have several values."
            )
    except ValueError as error:
        parser.error(str(error))
    return tuple(arguments)


def make_arguments(options: Mapping[str, Any], *types: type) -> tuple:
    """
    The dataclasses that hold these options, each those that it knows.

    Raises:
        ValueError: for unknown options and impossible values, in one sentence.
    """
    names = {kind: [known.name for known in fields(kind)] for kind in types}
    _refuse_unknown(options, itertools.chain(*names.values()), "option")
    return tuple(kind(**{name: options[name] for name in names[kind] if name in options}) for kind in types)


def read_recipe(path: str | Path) -> dict[str, Any]:
    """
    The fields in a YAML file.

    Raises:
        ValueError: where it can't be read or is no mapping.
    """
    try:
        recipe = yaml.load(Path(path).read_text(encoding="utf-8"), RecipeLoader)
    except OSError as error:
        raise ValueError(f"{path} can't be read: {error.strerror}.") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no YAML: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} must have lines of `field: value`.")
    return recipe


def _as_words(name: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{name}", *map(_as_text, value)]
    # joined, since a value by itself may look like an option
    return [f"--{name}={_as_text(value)}"]


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
