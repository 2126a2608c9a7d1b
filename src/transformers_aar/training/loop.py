"""
The loop that both trainings share. A *stage* ([`SatStage`], [`AarStage`]) knows how to take a step, to validate and to
write its model; the loop counts steps, logs, saves, and stops. Everything that is random is a function of the seed and
of the step or the example, so that a run that goes on from a checkpoint equals one that never stopped.
"""

import itertools
import json
import math
import re
import signal
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol, TypeVar

import matplotlib.image
import torch
from accelerate import Accelerator
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    broadcast_object_list,
    gather_object,
    parse_flag_from_env,
)
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedConfig
from transformers.utils import logging

from ..data.audio import write_sound
from ..data.staging import staged_file
from ..evaluation.plots import plot_sounds
from .arguments import LoopArguments
from .checkpoints import Checkpoint, CheckpointFolder, read_manifest
from .sampling import ExampleStream, ValidationSet
from .schedules import LEARNING_RATE_SCHEDULES

logger = logging.get_logger(__name__)

Result = TypeVar("Result")

LOG_FILE = "metrics.jsonl"
SKIPPED_FILE = "skipped_files.json"


# fields of a configuration that may change: only training reads them, or, of CLAP's, a checkpoint brings its own
FREE_FIELDS = (
    *("drop_path_rate", "conditioning_dropout", "conditioner_config"),
    *("codebook_decay", "dead_code_threshold", "kmeans_iterations"),
)
# of fewer files no share is taken
FEW_FILES = 1000
# Processes wait for the one that prepares a dataset, or writes a checkpoint; but not for ever for one that is lost.
PATIENCE = InitProcessGroupKwargs(timeout=timedelta(hours=6))


class StopTraining(Exception):
    """Ends a run with one sentence and a non-zero exit status; all processes raise it together."""


class Stage(Protocol):
    """What the loop asks of a training."""

    name: str
    sampling_rate: int
    # optimizer steps of the whole run
    max_steps: int
    # of the model, as a checkpoint has it
    config: PreTrainedConfig

    def recipe(self) -> dict[str, Any]:
        """Settings that a checkpoint belongs to, as JSON; a run that goes on with others is told so."""

    # batches are dictionaries with at least `names` and `skipped`, the latter pairs of a name and a reason
    stream: ExampleStream
    validation_set: ValidationSet

    def start(self) -> None:
        """Does what comes before the first step; a run that goes on from a checkpoint has it behind itself."""

    def step(self, micro_batches: list[dict], step: int) -> dict[str, torch.Tensor]:
        """Takes an optimizer step and returns its losses, scalars of this process."""

    def validate(self) -> dict[str, float]:
        """Figures of the validation set, the same on every process."""

    def sounds(self) -> dict[str, torch.Tensor]:
        """Waveforms `(channels, num_samples)` by title, to be listened to; every process asks for them."""

    def prepare_files(self) -> Callable[[Path], None]:
        """Gathers what a checkpoint holds (every process calls it) and returns what writes it into a folder."""

    def load_files(self, folder: Path) -> None:
        """Takes over what a checkpoint holds."""

    def prepare_model(self) -> Callable[[Path], None]:
        """As `prepare_files`, for the finished model."""


@dataclass
class Progress:
    """How far a run is, and what it tells about itself; JSON in a checkpoint."""

    step: int = 0
    # of all processes; names and reasons
    skipped: dict[str, str] = field(default_factory=dict)
    examples_read: int = 0

    def __post_init__(self):
        # of this process, since all of them last shared theirs; no part of what is saved
        self.unshared: list[tuple[str, str]] = []

    def count(self, micro_batches: list[dict], num_examples: int) -> None:
        """Takes note of a step, of the examples of all processes, and of what this one couldn't read for it."""
        self.step += 1
        self.examples_read += num_examples
        for batch in micro_batches:
            self.unshared += batch["skipped"]

    def share_skipped(self) -> None:
        """Brings together what the processes couldn't read. Every process calls it."""
        for name, reason in gather_object([item for item in self.unshared if item[0] not in self.skipped]):
            self.skipped[name] = reason
        self.unshared.clear()


def make_accelerator(args: LoopArguments) -> Accelerator:
    """
    Accelerate's view of the processes. Codebook statistics are summed by the model, so buffers aren't broadcast.

    Raises:
        ValueError: for ways of sharing a training that the loop doesn't know.
    """
    for name in ("deepspeed", "megatron_lm"):
        if parse_flag_from_env(f"ACCELERATE_USE_{name.upper()}"):
            raise ValueError(
                f"Processes share a training by DistributedDataParallel or, the generator's, by FSDP: leave out "
                f"--use_{name}."
            )
    return Accelerator(
        cpu=args.use_cpu,
        mixed_precision=args.mixed_precision,
        log_with=None if args.report_to == "none" else args.report_to.split(","),
        project_dir=args.output_dir,
        kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False), PATIENCE],
    )


def num_steps(args: LoopArguments, num_examples: int, num_processes: int) -> int:
    """Optimizer steps of the whole run."""
    if args.max_steps is not None:
        return args.max_steps
    global_batch_size = args.per_device_batch_size * args.gradient_accumulation_steps * num_processes
    return max(1, math.ceil(args.num_train_epochs * num_examples / global_batch_size))


def learning_rate_factor(args: LoopArguments, step: int, max_steps: int) -> float:
    """The schedule's share of the peak learning rate in a step."""
    return LEARNING_RATE_SCHEDULES[args.lr_schedule](step, round(args.warmup_share * max_steps), max_steps)


def take_step(accelerator: Accelerator, optimizer, parameters, max_grad_norm: float) -> torch.Tensor:
    """
    Clips the gradients and takes an optimizer step.

    Returns:
        The norm before clipping, a scalar.

    Raises:
        FloatingPointError: when it is NaN or infinite; the weights are left as they were.
    """
    norm = accelerator.clip_grad_norm_(parameters, max_grad_norm)
    norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm  # FSDP's is spread over the processes
    if not torch.isfinite(norm):
        raise FloatingPointError("the gradients are not finite")
    optimizer.step()
    optimizer.zero_grad()
    return norm


def train(
    stage: Stage,
    args: LoopArguments,
    accelerator: Accelerator,
    max_skipped_share: float,
    missing: dict[str, str],
) -> Path:
    """
    Runs a training from its start or from a checkpoint to its end.

    Args:
        stage ([`Stage`]): what is trained.
        args ([`LoopArguments`]): settings of the loop.
        accelerator (`Accelerator`): the processes.
        max_skipped_share (`float`): the run ends when a larger share of the examples couldn't be read.
        missing (`dict[str, str]`): sounds that were never there, with the reason, for the report at the end.

    Returns:
        The folder of the finished model, or of the last checkpoint when the run was asked to stop.

    Raises:
        StopTraining: for a loss that isn't finite, too many broken files and a checkpoint that can't be written.
    """
    folder = CheckpointFolder(Path(args.output_dir), stage.name, args.save_total_limit)
    progress = resume(stage, args, accelerator, folder)
    with StopRequest(args.max_minutes) as stop, TrainingLog(stage, args, accelerator, progress) as log:
        stopped = take_steps(stage, args, accelerator, folder, progress, max_skipped_share, stop, log)
        if stopped is not None:
            accelerator.print(f"Stopped after step {progress.step}; --resume latest goes on from {stopped}.")
            return stopped
        final = write_files(accelerator, folder.finish, stage.prepare_model())
        if accelerator.is_main_process:
            report_skipped(missing | progress.skipped, Path(args.output_dir))
        accelerator.print(f"The finished model is in {final}.")
        return final


def take_steps(
    stage: Stage,
    args: LoopArguments,
    accelerator: Accelerator,
    folder: CheckpointFolder,
    progress: Progress,
    max_skipped_share: float,
    stop: "StopRequest",
    log: "TrainingLog",
) -> Path | None:
    """Goes through all steps that are left. Returns the last checkpoint when it was asked to stop before the end."""
    if from_main_process(accelerator, log.owes_validation):
        log.validation()
    loader = stage.stream.loader(range(progress.step, stage.max_steps))
    for micro_batches in grouped(loader, args.gradient_accumulation_steps):
        losses = guarded_step(stage, micro_batches, accelerator, progress, folder)
        progress.count(micro_batches, stage.stream.global_batch_size)
        log.losses(losses)
        is_last = progress.step == stage.max_steps
        stops = stop.agreed(accelerator)
        saves = progress.step % args.save_steps == 0 or is_last or stops
        if saves or progress.step % args.logging_steps == 0:
            check_skipped(progress, max_skipped_share, len(stage.stream.dataset))
        if saves:
            saved = save(stage, accelerator, folder, progress)
        if log.validates:  # after saving, so that nothing is lost where it fails
            log.validation()
        if stops and not is_last:
            return saved
    return None


def grouped(loader: DataLoader, size: int) -> Iterator[list[dict]]:
    """
    The loader's micro-batches, a step's worth at a time.

    Raises:
        ValueError: for what can't be read any more; on this process, which is the only one to know.
    """
    micro_batches = iter(loader)
    try:
        while group := list(itertools.islice(micro_batches, size)):
            yield group
    except (ValueError, OSError) as error:
        # a worker's error brings its traceback along
        sentence = re.sub(r"^\w+Error: ", "", str(error).splitlines()[-1])
        # whose frames would keep the loader alive, and its workers, which Python then waits for when it exits
        traceback.clear_frames(error.__traceback__)
        del micro_batches
        raise ValueError(sentence) from None


def guarded_step(
    stage: Stage, micro_batches: list[dict], accelerator: Accelerator, progress: Progress, folder: CheckpointFolder
) -> dict[str, torch.Tensor]:
    """A step of the stage; when it isn't finite, the files are named that it was made of."""
    try:
        return stage.step(micro_batches, progress.step)
    except FloatingPointError as error:
        names = gather_object([name for batch in micro_batches for name in batch["names"]])
        last = folder.latest()
        raise StopTraining(
            f"In step {progress.step + 1} {error}. Its batch was {'; '.join(names)}. The last good checkpoint is "
            f"{last.path if last else 'none'}: look at these files, or go on from there with a lower learning rate."
        ) from error


def check_skipped(progress: Progress, max_skipped_share: float, num_files: int) -> None:
    """
    Brings together, from all processes, what couldn't be read; too much of it ends the run. In later epochs the same
    files are read again, and a single broken one among the first few says nothing.
    """
    progress.share_skipped()
    share = len(progress.skipped) / min(max(progress.examples_read, FEW_FILES), num_files)
    if share > max_skipped_share:
        reason = next(reversed(progress.skipped.values()))
        raise StopTraining(
            f"{share:.1%} of the files that were wanted couldn't be read, and {max_skipped_share:.1%} may be missing; "
            f"one of them: {reason} Mend the dataset, or raise --max_skipped_share."
        )


def report_skipped(skipped: dict[str, str], output_dir: Path) -> None:
    """Lists the sounds that were missing or couldn't be read."""
    if skipped:
        with staged_file(output_dir / SKIPPED_FILE) as staged:
            staged.write_text(json.dumps(skipped, indent=1) + "\n")
        print(f"{len(skipped)} sounds were missing or couldn't be read; {output_dir / SKIPPED_FILE} lists them.")


# --- Saving and going on ---------------------------------------------------------------------------------------------


def save(stage: Stage, accelerator: Accelerator, folder: CheckpointFolder, progress: Progress) -> Path:
    """Writes a checkpoint of the last step; see [`CheckpointFolder.save`]."""
    state = {"progress": asdict(progress), "recipe": stage.recipe()}
    return write_files(accelerator, lambda write: folder.save(progress.step, state, write), stage.prepare_files())


def write_files(accelerator: Accelerator, write: Callable[[Callable], Path], files: Callable[[Path], None]) -> Path:
    """Lets the main process write; when it can't, all processes end with its sentence."""
    return from_main_process(accelerator, lambda: write(files))


def from_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """What a function returns to the main process, which alone calls it; its sentence when it fails ends all."""
    result, error = None, None
    if accelerator.is_main_process:
        try:
            result = function()
        except (StopTraining, ValueError, OSError) as caught:
            error = str(caught)
    result, error = broadcast_object_list([result, error])
    if error is not None:
        raise StopTraining(error)
    return result


def resume(stage: Stage, args: LoopArguments, accelerator: Accelerator, folder: CheckpointFolder) -> Progress:
    """Brings a stage to where its checkpoint was, or has it start."""
    checkpoint = from_main_process(accelerator, lambda: find_checkpoint(args, folder))
    if checkpoint is None:
        stage.start()
        return Progress()
    check_visible(accelerator, checkpoint)
    before, now = checkpoint.state["recipe"], json.loads(json.dumps(stage.recipe()))
    if before.get("codec") != now.get("codec"):  # the checkpoint brings its own codec, and tokens would be another's
        raise StopTraining(
            f"{checkpoint.path} was made with another codec: go on with that one, or name another --output_dir."
        )
    difference = first_difference(type(stage.config).from_pretrained(checkpoint.path), stage.config)
    if difference is not None:
        raise StopTraining(other_model(checkpoint, difference))
    load_files(stage, checkpoint)
    progress = Progress(**checkpoint.state["progress"])
    changed = [name for name in now if before.get(name) != now[name]]
    if changed and accelerator.is_main_process:
        changes = "; ".join(f"{name} was {before.get(name)} and is {now[name]}" for name in changed)
        logger.warning(f"This run goes on with other settings than it began with: {changes}.")
    accelerator.print(f"Going on after step {progress.step}, from {checkpoint.path}.")
    return progress


def load_files(stage: Stage, checkpoint: Checkpoint) -> None:
    """Loads a checkpoint on all processes; when one can't, all end with its sentence."""
    reason = None
    try:
        stage.load_files(checkpoint.path)
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, OSError) as error:  # tensors of other shapes or names, and files that aren't there
        reason = str(error).splitlines()[-1].strip()
    reasons = [each for each in gather_object([reason]) if each is not None]
    if reasons:
        raise StopTraining(other_model(checkpoint, reasons[0]))


def other_model(checkpoint: Checkpoint, reason: str) -> str:
    return (
        f"{checkpoint.path} is of another model than these options make: go on with those it was begun with, or name "
        f"another --output_dir ({reason})."
    )


def first_difference(before: PreTrainedConfig, now: PreTrainedConfig) -> str | None:
    """Name and values of the first field that gives a model's tensors, or its labels, another meaning."""
    of_the_library = {*PreTrainedConfig().to_dict(), "auto_map"}
    for name in now.to_dict():
        if name in of_the_library or name in FREE_FIELDS:
            continue
        old, new = getattr(before, name), getattr(now, name)
        if isinstance(new, PreTrainedConfig):
            difference = first_difference(old, new)
            if difference is not None:
                return difference
        elif old != new:
            return f"{name} was {old} and is {new}"
    return None


def find_checkpoint(args: LoopArguments, folder: CheckpointFolder) -> Checkpoint | None:
    """The checkpoint that `--resume` names. What another run has left isn't overwritten by accident."""
    occupant = folder.occupant()
    if args.resume not in (None, "latest"):
        if occupant is not None and not Path(args.resume).resolve().is_relative_to(folder.output_dir.resolve()):
            raise StopTraining(
                f"{occupant} is of another run than {args.resume}, and would be overwritten: name another "
                "--output_dir, or remove it."
            )
        return folder.load(Path(args.resume))
    latest = folder.latest()
    if latest is None and occupant is not None:
        raise StopTraining(
            f"{occupant} is of no use to this run, which would overwrite it: name another --output_dir, or remove it."
        )
    if latest is not None and args.resume is None:
        raise StopTraining(
            f"{args.output_dir} holds checkpoints of a run already, the last one {latest.path.name}: go on with "
            "--resume latest, or name another --output_dir."
        )
    return latest


def check_visible(accelerator: Accelerator, checkpoint: Checkpoint) -> None:
    """Makes sure that all processes see the checkpoint that the main one has found, and not another of its name."""
    try:
        is_visible = read_manifest(checkpoint.path)["state"] == checkpoint.state
    except ValueError:
        is_visible = False
    blind = [rank for rank, sees in enumerate(gather_object([is_visible])) if not sees]
    if blind:
        raise StopTraining(
            f"{checkpoint.path} can't be seen by process {', '.join(map(str, blind))} of {accelerator.num_processes}: "
            "put --output_dir on a disk that all machines have in common."
        )


class StopRequest:
    """
    Within this context Ctrl-C, SIGTERM and the time limit end a run after the step under way; a second Ctrl-C ends it
    at once.

    Args:
        max_minutes (`float`, *optional*): time from now on.
    """

    signals = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, max_minutes: float | None):
        self.deadline = math.inf if max_minutes is None else time.monotonic() + 60 * max_minutes
        self.requested = False

    def __enter__(self) -> "StopRequest":
        self.previous = {number: signal.signal(number, self._request) for number in self.signals}
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def agreed(self, accelerator: Accelerator) -> bool:
        """Whether any process was asked to stop; all of them get the same answer."""
        wanted = self.requested or time.monotonic() > self.deadline
        wanted = torch.tensor(float(wanted), device=accelerator.device)
        return accelerator.reduce(wanted, reduction="sum").item() > 0

    def _request(self, number: int, _) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True


# --- Logging ---------------------------------------------------------------------------------------------------------


class TrainingLog:
    """
    Writes losses, figures and sounds of a run: to Accelerate's trackers, to the progress bar and, one JSON object per
    line, to `metrics.jsonl` in the output folder. Lines of steps that a resumed run takes again are replaced.
    """

    def __init__(self, stage: Stage, args: LoopArguments, accelerator: Accelerator, progress: Progress):
        self.stage = stage
        self.args = args
        self.accelerator = accelerator
        self.progress = progress
        self.path = Path(args.output_dir) / LOG_FILE
        self.pending: list[dict[str, torch.Tensor]] = []
        self.started = time.monotonic()
        self.bar = tqdm(
            total=stage.max_steps,
            initial=progress.step,
            unit="step",
            disable=None if accelerator.is_local_main_process else True,
        )

    def __enter__(self) -> "TrainingLog":
        if self.accelerator.is_main_process:
            try:
                self.path.parent.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise OSError(f"The folder {self.path.parent} can't be made: {error.strerror}.") from error
            lines = self.path.read_text().splitlines() if self.path.exists() else []
            kept = [line for line in lines if step_of(line) <= self.progress.step]
            self.is_validated = any(step_of(line) == self.progress.step and '"validation/' in line for line in kept)
            with staged_file(self.path) as staged:
                staged.write_text("".join(f"{line}\n" for line in kept))
        self.accelerator.init_trackers(self.stage.name)
        return self

    def __exit__(self, *_) -> None:
        self.bar.close()
        for tracker in self.accelerator.trackers:
            tracker.finish()

    def losses(self, losses: dict[str, torch.Tensor]) -> None:
        """Takes the losses of a step; their means go out at every `logging_steps`."""
        self.pending.append({name: value.detach() for name, value in losses.items()})
        self.bar.update()
        if self.progress.step % self.args.logging_steps and self.progress.step != self.stage.max_steps:
            return
        means = {}
        for name in dict.fromkeys(name for entry in self.pending for name in entry):
            values = torch.stack([entry[name] for entry in self.pending if name in entry])
            means[name] = self.accelerator.reduce(values.mean(), reduction="mean").item()
        self.pending.clear()
        self._write({f"train/{name}": value for name, value in means.items()})
        self.bar.set_postfix({name: f"{value:.4g}" for name, value in list(means.items())[:4]})

    @property
    def validates(self) -> bool:
        """Whether a validation follows the last step."""
        step = self.progress.step
        return step > 0 and (step % self.args.validation_steps == 0 or step == self.stage.max_steps)

    def owes_validation(self) -> bool:
        """Whether the process that wrote the checkpoint ended before its validation; only the main one knows."""
        return self.validates and not self.is_validated

    def validation(self) -> None:
        """Validates, and logs the figures and some sounds."""
        figures = self.stage.validate()
        self.progress.unshared += self.stage.validation_set.skipped.items()
        self.progress.share_skipped()
        self._write({f"validation/{name}": value for name, value in figures.items()})
        sounds = self.stage.sounds()
        if self.accelerator.is_main_process and sounds:
            self._write_sounds(sounds)

    def _write(self, values: dict[str, float]) -> None:
        self.accelerator.log(values, step=self.progress.step)
        if self.accelerator.is_main_process:
            entry = {"step": self.progress.step, "seconds": round(time.monotonic() - self.started, 3), **values}
            try:
                with self.path.open("a") as file:
                    file.write(json.dumps(entry) + "\n")
            except OSError as error:
                raise OSError(
                    f"{self.path} can't be written: {error.strerror}; --resume latest goes on from the last "
                    "checkpoint."
                ) from error

    def _write_sounds(self, sounds: dict[str, torch.Tensor]) -> None:
        """A picture of all sounds and a file of each, in a folder of this step and in the trackers that take them."""
        folder = self.path.parent / "sounds" / f"step-{self.progress.step:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        rate, step = self.stage.sampling_rate, self.progress.step
        plot_sounds(folder / "spectrograms.png", sounds, rate)
        picture = matplotlib.image.imread(folder / "spectrograms.png")
        for name, sound in zip(file_names(sounds), sounds.values()):
            with write_sound(folder / f"{name}.wav", rate, len(sound)) as writer:
                writer.write(sound)
        for tracker in self.accelerator.trackers:
            if tracker.name == "tensorboard":
                tracker.writer.add_image("sounds", picture, step, dataformats="HWC")
                for title, sound in sounds.items():
                    # scaled down as in the file: TensorBoard would clip it
                    tracker.writer.add_audio(title, sound.cpu() / max(1.0, float(sound.abs().max())), step, rate)
            elif hasattr(tracker, "log_images"):
                tracker.log_images({"sounds": [picture]}, step=step)


def file_names(titles: Iterable[str]) -> list[str]:
    """A name for each title, without what file systems don't take; where two would be the same, with a number."""
    names = []
    for title in titles:
        name = re.sub(r"[^\w-]+", "_", title.replace(", ", "-"))[:80]
        names.append(f"{name}-{len(names) + 1}" if name in names else name)
    return names


def step_of(line: str) -> float:
    """The step of a line of `metrics.jsonl`; infinite for one that a process has died over."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf
