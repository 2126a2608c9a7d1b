"""
The paper's claims in miniature (arXiv 2408.09027): codecs and generators of equal budget, trained or found where they
were trained before, measured together, with what follows from the figures in words.
"""

import json
import os
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState
from transformers.utils import logging

from ..configuration_sat import POSITIVE_INTEGER, POSITIVE_NUMBER, SatConfig, check_fields
from ..data.audioset import load_audio_dataset
from ..data.synthetic_audioset import write_audioset
from ..data.token_cache import REPORT_FILE, write_json
from ..data.tokenization import write_token_cache
from ..hub.loading import load_codec
from ..modeling_aar import AarForConditionalGeneration
from ..training.arguments import (
    COUNT,
    TEXT,
    AarArguments,
    DataArguments,
    LoopArguments,
    SatArguments,
    decode_mappings,
    make_arguments,
    option,
    optional,
)
from ..training.classifier_training import ClassifierArguments, train_classifier
from ..training.loop import StopTraining
from ..training.runs import train_aar, train_sat
from .claims_measurements import System, claims_report, measure_claims
from .generator_evaluation import SamplingArguments
from .held_out import AT_LEAST_TWO, EvaluationArguments
from .next_token import NextTokenModel
from .reports import markdown_table, write_report

CODEC_TYPES = (DataArguments, LoopArguments, SatArguments)
GENERATOR_TYPES = (DataArguments, LoopArguments, AarArguments)
# What each piece was made with, in its folder.
OPTIONS_FILE = "made_with.json"
# Options that change how fast a piece is made, and not what; and folders, which may be moved.
FREE_OPTIONS = (
    *("use_cpu", "dataloader_num_workers", "report_to", "save_steps", "save_total_limit"),
    *("output_dir", "data_dir", "codec", "token_cache", "validation_token_cache"),
)
# Options that would give a system another budget than the others.
BUDGET_OPTIONS = ("max_steps", "num_train_epochs", "per_device_batch_size", "gradient_accumulation_steps", "seed")
RULES = {
    "output_dir": TEXT,
    "data_dir": optional(TEXT),
    **dict.fromkeys(("hours", "eval_hours"), POSITIVE_NUMBER),
    "num_examples": AT_LEAST_TWO,
    "batch_size": POSITIVE_INTEGER,
    "seed": COUNT,
}


@dataclass
class ClaimsArguments:
    """
    What is trained and compared. Each system is a codec and a generator on its tokens. All codecs share the options of
    `codec` and all generators those of `generator`; a system's own options are of its codec. Exactly one has a plain
    residual codec, and so the next-token generator. The paper's claims are about it and the first of the others.
    """

    output_dir: str = option("Folder for all that is made and for the report; what it holds already is reused.")
    data_dir: str | None = option("Folder in AudioSet's layout with strong labels; synthesised by default.", None)
    hours: float = option("Length of the synthesised training split.", 1.5)
    eval_hours: float = option("Length of the synthesised evaluation split.", 0.3)
    classifier: dict | str | None = option("JSON: options of train_classifier.py.", {})
    codec: dict | str | None = option("JSON: options of train_sat.py that all codecs share.", {})
    generator: dict | str | None = option("JSON: options of train_aar.py that all generators share.", {})
    systems: dict | str | None = option("JSON: by each system's name the options of its codec that differ.", {})
    sampling: dict | str | None = option("JSON: options of evaluate_aar.py that choose how all sounds are drawn.", {})
    num_examples: int = option("Held-out crops; for the labels of each that has any, a sound is generated.", 600)
    batch_size: int = option("Sounds that are tokenized, measured and generated at once.", 16)
    seed: int = option("Another seed: other sounds, initial weights, crops and draws.", 0)
    use_cpu: bool = option("Computes on the CPU, whatever else there is.", False)

    def __post_init__(self):
        decode_mappings(self, "classifier", "codec", "generator", "systems", "sampling")
        check_fields(self, RULES)
        # all mistakes are told before hours are spent
        make_arguments(self.sampling, SamplingArguments)
        make_arguments(self.classifier_options("data"), ClassifierArguments)
        for name in self.systems:
            if not re.fullmatch(r"[\w-]+", name):
                raise ValueError(f"`systems` must have names of letters, digits, - and _, got {name!r}.")
            if unfair := set(self.systems[name] or {}) & set(BUDGET_OPTIONS):
                raise ValueError(f"`systems` gives {name} a {min(unfair)} of its own: all have the same, in `codec`.")
            make_arguments(self.codec_options(name, "data"), *CODEC_TYPES)
        configs = [self.codec_config(name) for name in self.systems]
        if len({(config.sampling_rate, config.window_length) for config in configs}) > 1:
            raise ValueError("`systems` must have codecs with windows of one length and rate, to be compared.")
        plain = [name for name in self.systems if self.is_next_token(name)]
        if len(plain) != 1 or len(configs) < 2:
            raise ValueError(
                "`systems` must have one plain residual codec (equal `scales`, empty `phi_kernel_sizes`) and at least "
                f"one other, got {', '.join(plain) or 'none'} of {len(configs)}."
            )
        make_arguments(self.generator_options("codec", ("train", "validation")), *GENERATOR_TYPES)

    def classifier_options(self, data_dir: str) -> dict[str, Any]:
        return self._shared() | self.classifier | {"data_dir": data_dir, "output_dir": "unknown"}

    def codec_options(self, name: str, data_dir: str) -> dict[str, Any]:
        own = self.systems[name] or {}
        config = (self.codec.get("codec_config") or {}) | (own.get("codec_config") or {})
        options = self._shared() | {"report_to": "none"} | self.codec | own | {"codec_config": config}
        return options | {"data_dir": data_dir, "output_dir": "unknown"}

    def generator_options(self, codec: str, token_caches: tuple[str, str]) -> dict[str, Any]:
        config = (self.generator.get("model_config") or {}) | {"conditioning": "label"}
        options = self._shared() | {"report_to": "none"} | self.generator | {"model_config": config, "codec": codec}
        options |= dict(zip(("token_cache", "validation_token_cache"), token_caches))
        return options | {"output_dir": "unknown"}

    def codec_config(self, name: str) -> SatConfig:
        return SatConfig(**self.codec_options(name, "data")["codec_config"])

    @property
    def dataset(self) -> str:
        """The sounds, in words that tell them from others."""
        if self.data_dir is not None:
            return str(Path(self.data_dir).resolve())
        return f"{self.hours} and {self.eval_hours} hours synthesised with seed {self.seed}"

    def is_next_token(self, name: str) -> bool:
        """Whether the system has the plain residual codec."""
        config = self.codec_config(name)
        return len(set(config.scales)) == 1 and not config.phi_kernel_sizes

    def _shared(self) -> dict[str, Any]:
        return {"seed": self.seed, "use_cpu": self.use_cpu}


def reproduce_claims(args: ClaimsArguments) -> None:
    """
    Makes what isn't there yet, measures all systems, and writes and prints the table and the verdicts.

    Raises:
        ValueError: for pieces that were made otherwise, and when started with several processes.
        StopTraining: when a training was asked to stop; the same command goes on with it.
    """
    logging.set_verbosity_error()
    if PartialState(cpu=args.use_cpu).num_processes > 1:
        raise ValueError("The claims are checked in one process, since it measures seconds: start it with python.")
    folder = Path(args.output_dir)
    data_dir = make_sounds(args, folder)
    classifier = make_classifier(args, folder / "classifier", data_dir)
    systems = [make_system(args, name, folder / name, data_dir) for name in args.systems]
    AcceleratorState._reset_state()
    measured = measure_claims(
        systems, evaluation_arguments(args, data_dir, classifier), SamplingArguments(**args.sampling)
    )
    report = claims_report(measured)
    report.settings |= describe(args)
    write_report(report, folder)
    print(f"\n{markdown_table(report.tables['Systems'])}\n")
    print("\n\n".join(report.conclusions))
    print(f"\n{folder / 'report.md'}: {len(systems)} systems, {measured.num_generated} sounds generated by each")


def make_sounds(args: ClaimsArguments, folder: Path) -> str:
    """The dataset's folder; a synthesised one is completed."""
    if args.data_dir is not None:
        return args.data_dir
    sounds = folder / "sounds"
    write_audioset(sounds, args.hours, args.eval_hours, args.seed, num_processes=os.cpu_count() or 1)
    return str(sounds)


def make_classifier(args: ClaimsArguments, folder: Path, data_dir: str) -> Path:
    """The folder of the classifier that judges all systems; its training is short and begins anew when interrupted."""
    options = args.classifier_options(data_dir)
    note_options(folder, options, {"dataset": args.dataset})
    if not (folder / "model.safetensors").is_file():
        train_classifier(*make_arguments(options | {"output_dir": str(folder)}, ClassifierArguments))
    return folder


def make_system(args: ClaimsArguments, name: str, folder: Path, data_dir: str) -> System:
    """A system whose codec and generator are trained."""
    print(f"System {name}", flush=True)
    options = args.codec_options(name, data_dir)
    codec = train_piece(train_sat, CODEC_TYPES, options, folder / "codec", {"dataset": args.dataset})
    data, *_ = make_arguments(options, *CODEC_TYPES)
    token_caches = (folder / "tokens" / "train", folder / "tokens" / "validation")
    for split, token_cache in zip((data.train_split, data.validation_split), token_caches):
        if not (token_cache / REPORT_FILE).is_file():
            tokenize(args, load_audio_dataset(split, data_dir), codec, token_cache, data.dataloader_num_workers)
    model_class = NextTokenModel if args.is_next_token(name) else AarForConditionalGeneration
    generator = train_piece(
        lambda *arguments: train_aar(*arguments, model_class),
        GENERATOR_TYPES,
        args.generator_options(str(codec), tuple(map(str, token_caches))),
        folder / "generator",
        {"dataset": args.dataset, "codec's weights": load_codec(codec).fingerprint()},
    )
    return System(name, generator, model_class)


def tokenize(args: ClaimsArguments, dataset, codec: Path, token_cache: Path, num_workers: int) -> None:
    """Runs a codec over a split."""
    AcceleratorState._reset_state()
    model = load_codec(codec).requires_grad_(False)
    model.windows_per_batch = args.batch_size
    write_token_cache(dataset, token_cache, model, Accelerator(cpu=args.use_cpu), num_workers=num_workers)


def train_piece(
    train: Callable[..., Path], types: tuple[type, ...], options: dict[str, Any], folder: Path, sources: dict[str, str]
) -> Path:
    """
    Trains a model, of sources with these names, goes on with its training, or finds it finished.

    Raises:
        ValueError: when the folder holds a training with other options or sources.
        StopTraining: when the training was asked to stop before its end.
    """
    note_options(folder, options, sources)
    final = folder / "final"
    if not final.is_dir():
        # each training has a precision of its own, of which Accelerate takes one per process
        AcceleratorState._reset_state()
        train(*make_arguments(options | {"output_dir": str(folder), "resume": "latest"}, *types))
    if not final.is_dir():
        raise StopTraining(f"{folder} isn't finished: the same command goes on with it.")
    return final


def note_options(folder: Path, options: dict[str, Any], sources: dict[str, str]) -> None:
    """
    Writes down what a piece is made with and of, or makes sure that the one that is there was made with the same.

    Raises:
        ValueError: when it was made with other options.
        OSError: when the folder can't be made.
    """
    options = {name: value for name, value in options.items() if name not in FREE_OPTIONS} | sources
    path = folder / OPTIONS_FILE
    if not path.is_file():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OSError(f"The folder {folder} can't be made: {error.strerror}.") from error
        write_json(path, options)
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    changed = sorted(name for name in {*before, *options} if before.get(name) != options.get(name))
    if changed:
        raise ValueError(
            f"{folder} was made with another {', '.join(changed)}: go on as it was begun, remove it, or name another "
            "--output_dir."
        )


def evaluation_arguments(args: ClaimsArguments, data_dir: str, classifier: Path) -> EvaluationArguments:
    return EvaluationArguments(
        model="several",
        output_dir=args.output_dir,
        data_dir=data_dir,
        num_examples=args.num_examples,
        # crops in which nothing is to be heard have no label either
        max_skipped_share=1.0,
        batch_size=args.batch_size,
        embeddings=["log_mel", f"classifier={classifier}"],
        classifier=str(classifier),
        seed=args.seed,
        use_cpu=args.use_cpu,
    )


def describe(args: ClaimsArguments) -> dict[str, Any]:
    """The settings that the figures depend on, for the report."""
    settings = asdict(args)
    mappings = ("classifier", "codec", "generator", "systems", "sampling")
    return {"dataset": args.dataset, "seed": args.seed} | {name: json.dumps(settings[name]) for name in mappings}
