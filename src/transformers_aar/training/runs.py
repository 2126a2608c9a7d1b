"""From options to a running training: what `scripts/train_sat.py` and `scripts/train_aar.py` do."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow.compute
from accelerate import Accelerator, PartialState
from accelerate.utils import set_seed
from datasets import Dataset
from transformers import ClapProcessor
from transformers.utils import logging

from ..configuration_aar import AarConfig
from ..configuration_sat import SatConfig
from ..data.audioset import label_names
from ..data.audioset_folder import index_audioset
from ..data.events import single_events
from ..data.examples import CropExamples, TokenExamples
from ..data.token_cache import clap_fingerprint, load_token_cache, read_manifest
from ..hub.label_tokenizer import label_tokenizer
from ..hub.loading import load_codec
from ..memory import keep_freed_memory
from ..modeling_aar import AarForConditionalGeneration
from ..modeling_sat import SatModel
from ..processing_aar import AarProcessor
from .aar_training import AarStage, collate_generation_examples, num_draws
from .arguments import AarArguments, DataArguments, LoopArguments, SatArguments, parse_arguments
from .discriminators import AudioDiscriminator
from .loop import StopTraining, make_accelerator, num_steps, train
from .sampling import ExampleStream, ValidationSet
from .sat_training import DISCRIMINATOR_FILE, SatStage, collate_crops, feature_extractor


def run_script(main: Callable, *types: type) -> None:
    """
    Calls a script's main function with its options. What the user can put right ends in one sentence on stderr and a
    non-zero exit status.

    Args:
        main (`Callable`): takes an instance of each type.
        types (`type`): dataclasses; see [`parse_arguments`].
    """
    arguments = parse_arguments(sys.argv[1:], *types)
    keep_freed_memory()
    logging.disable_progress_bar()  # one for each model that is saved, in between our own
    try:
        main(*arguments)
        # Not while there are models that DistributedDataParallel has wrapped: whatever lets go of the process group
        # last waits for its threads, and models would do so holding Python's lock, which the threads may wait for.
        PartialState().destroy_process_group()
    except StopTraining as error:  # which all processes agree on
        if PartialState().is_main_process:
            print(f"Error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        print(f"Error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def train_sat(data: DataArguments, loop: LoopArguments, args: SatArguments) -> Path:
    """Trains a codec; returns the folder of the finished model, see [`train`]."""
    set_seed(loop.seed)
    accelerator = make_accelerator(loop)
    if args.model_name_or_path is None:
        codec = SatModel(SatConfig(**args.codec_config))
    else:
        codec = load_codec(args.model_name_or_path)
    crops, held_out = (
        CropExamples(dataset, codec.config.window_length_s, [codec.config.sampling_rate], loop.seed)
        for dataset in load_splits(data, codec, accelerator)
    )
    stage_data = make_stage_data(crops, held_out, collate_crops, data, loop, accelerator)
    max_steps = num_steps(loop, len(crops), accelerator.num_processes)
    stage = SatStage(accelerator, args, loop, codec, load_discriminator(args), *stage_data, max_steps)
    return train(stage, loop, accelerator, data.max_skipped_share, missing_clips(data))


def train_aar(
    data: DataArguments,
    loop: LoopArguments,
    args: AarArguments,
    model_class: type[AarForConditionalGeneration] = AarForConditionalGeneration,
) -> Path:
    """
    Trains a generator, of that class, on a codec's tokens; returns the folder of the finished model, see [`train`].
    """
    set_seed(loop.seed)
    accelerator = make_accelerator(loop)
    codec = load_codec(args.codec)
    if args.token_cache is None:
        splits = load_splits(data, codec, accelerator)
    else:
        splits = [load_token_cache(folder, codec) for folder in (args.token_cache, args.validation_token_cache)]
        splits = [with_labels(dataset, exactly=1) for dataset in splits] if data.single_events else splits
    generator = make_generator(args, codec, label_names(splits[0]), model_class)
    if generator.config.conditioning == "label":
        splits = [with_labels(dataset) for dataset in splits]
    elif generator.config.conditioning == "clap" and args.token_cache is not None:
        for folder in (args.token_cache, args.validation_token_cache):
            check_conditioning(folder, generator)
    processor = make_processor(args, generator)
    examples = [make_generation_examples(dataset, args, loop, generator, processor) for dataset in splits]
    collate = partial(
        collate_generation_examples,
        conditioning=generator.config.conditioning,
        conditioner_feature_extractor=None if args.token_cache else processor.conditioner_feature_extractor,
    )
    stage_data = make_stage_data(*examples, collate, data, loop, accelerator)
    max_steps = num_steps(loop, len(examples[0]), accelerator.num_processes)
    stage = AarStage(accelerator, args, loop, generator, processor, *stage_data, max_steps)
    missing = missing_clips(data) if args.token_cache is None else {}
    return train(stage, loop, accelerator, data.max_skipped_share, missing)


def load_discriminator(args: SatArguments) -> AudioDiscriminator | None:
    """A new adversary, with the weights that lie beside the codec to go on from."""
    if not args.discriminators:
        return None
    discriminator = AudioDiscriminator(args.discriminators)
    saved = Path(args.model_name_or_path or "") / DISCRIMINATOR_FILE
    if args.model_name_or_path is not None and saved.is_file():
        try:
            discriminator.load_state_dict(AudioDiscriminator.load(saved).state_dict())
        except RuntimeError as error:
            raise ValueError(
                f"{saved} holds another discriminator than `discriminators` says: make them agree."
            ) from error
    return discriminator


def load_splits(data: DataArguments, codec: SatModel, accelerator: Accelerator) -> list[Dataset]:
    """
    The sounds to train and to validate on; of single events those that fill one of the codec's windows.

    Raises:
        ValueError: for what isn't there, and when more clips of AudioSet's lists are missing than may be.
    """
    with accelerator.main_process_first():  # the others find them in the cache
        splits = [data.load(split) for split in (data.train_split, data.validation_split)]
        return [
            single_events(split, codec.config.window_length_s) if data.single_events else split for split in splits
        ]


def missing_clips(data: DataArguments) -> dict[str, str]:
    """Clips that AudioSet's lists name and the folder lacks, with the reason; too many of them are a `ValueError`."""
    missing, num_rows = {}, 0
    for split in (data.train_split, data.validation_split) if data.dataset_name is None else ():
        index = index_audioset(data.data_dir, split.partition("[")[0])
        missing |= dict.fromkeys(index.missing_ids, "there is no file of it")
        missing |= dict.fromkeys(index.refused_ids, "its id would lead out of the folder")
        num_rows += index.num_rows
    if len(missing) > data.max_skipped_share * num_rows:
        raise ValueError(
            f"{len(missing)} of the {num_rows} clips that {data.data_dir} lists are missing, more than the share of "
            f"{data.max_skipped_share} that may be: see transformers-aar dataset check, or raise --max_skipped_share."
        )
    return missing


def with_labels(dataset: Dataset, exactly: int | None = None) -> Dataset:
    """
    The rows that have labels, of which a model of labels can learn something; or exactly so many.

    Raises:
        ValueError: where there is none.
    """
    labels = dataset.select_columns("labels").with_format("arrow")[:]["labels"]
    counts = pyarrow.compute.list_value_length(labels).to_numpy()
    labelled = np.flatnonzero(counts if exactly is None else counts == exactly)
    if len(labelled) == 0:
        wanted = "labels" if exactly is None else f"exactly {exactly} label"
        raise ValueError(
            f"None of the {len(dataset)} sounds of a split has {wanted}: name another one to train or validate on."
        )
    return dataset if len(labelled) == len(dataset) else dataset.select(labelled)


def make_stage_data(
    examples, held_out, collate: Callable, data: DataArguments, loop: LoopArguments, accelerator: Accelerator
) -> tuple[ExampleStream, ValidationSet]:
    stream = ExampleStream(examples, collate, loop, accelerator, data.dataloader_num_workers)
    return stream, ValidationSet(
        held_out, collate, data.num_validation_examples, loop.per_device_batch_size, accelerator
    )


def make_generator(
    args: AarArguments,
    codec: SatModel,
    names: list[str] | None,
    model_class: type[AarForConditionalGeneration] = AarForConditionalGeneration,
) -> AarForConditionalGeneration:
    """A new generator for a codec, or the one to go on from."""
    if args.model_name_or_path is not None:
        generator = model_class.from_pretrained(args.model_name_or_path, attn_implementation=args.attn_implementation)
        if generator.codec_model.fingerprint() != codec.fingerprint():
            raise ValueError(
                f"{args.model_name_or_path} was trained with another codec than {args.codec}: name that one."
            )
        return generator
    fields = dict(args.model_config)
    if fields.get("conditioning") == "label" and "labels" not in fields:
        if names is None:
            raise ValueError("The dataset has no labels: choose another conditioning in `model_config`.")
        fields["labels"] = names
    config = AarConfig(codec_config=codec.config.to_dict(), **fields)
    config._attn_implementation = args.attn_implementation
    generator = model_class(config)
    generator.codec_model.load_state_dict(codec.state_dict())
    if config.conditioning == "clap" and args.conditioner is not None:
        generator.attach_conditioner(args.conditioner)
    return generator


def check_conditioning(folder: str, generator: AarForConditionalGeneration) -> None:
    """Makes sure that a token cache has the embeddings that a CLAP model is conditioned by."""
    manifest = read_manifest(folder)
    if manifest.conditioning_dim != generator.config.conditioning_dim:
        raise ValueError(
            f"{folder} has {manifest.conditioning_dim or 'no'} numbers of CLAP's for each window, and the model takes "
            f"{generator.config.conditioning_dim}: tokenize the dataset with the --conditioner of the model."
        )
    if generator.conditioner is not None:
        if manifest.conditioner_fingerprint != clap_fingerprint(generator.conditioner):
            raise ValueError(f"{folder} was made with {manifest.conditioner}, another --conditioner: name that one.")


def make_processor(args: AarArguments, generator: AarForConditionalGeneration) -> AarProcessor:
    """The processor that goes with a generator."""
    codec_extractor = feature_extractor(generator.codec_model)
    if args.conditioner is not None:
        clap = ClapProcessor.from_pretrained(args.conditioner)
        return AarProcessor(codec_extractor, clap.tokenizer, clap.feature_extractor)
    labels = generator.config.labels
    return AarProcessor(codec_extractor, label_tokenizer(labels), labels=labels)


def make_generation_examples(
    dataset: Dataset,
    args: AarArguments,
    loop: LoopArguments,
    generator: AarForConditionalGeneration,
    processor: AarProcessor,
) -> CropExamples | TokenExamples:
    """Windows of a token cache, or crops of sounds, which CLAP hears at its own rate."""
    draws = num_draws(generator.config.num_hidden_layers)
    if args.token_cache is not None:
        return TokenExamples(dataset, loop.seed, draws)
    codec_config = generator.config.codec_config
    rates = [codec_config.sampling_rate]
    if processor.conditioner_feature_extractor is not None:
        rates.append(processor.conditioner_feature_extractor.sampling_rate)
    return CropExamples(dataset, codec_config.window_length_s, rates, loop.seed, draws)
