"""Training of AAR (paper, section 3.2): all scales of a window in one pass, from its own coarser scales."""

from collections.abc import Callable, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import MixedPrecisionPolicy
from transformers import ClapFeatureExtractor

from ..data.windows import hear_one_by_one
from ..modeling_aar import AarForConditionalGeneration, AarOutput
from ..processing_aar import AarProcessor
from .arguments import AarArguments, LoopArguments, recipe_of
from .checkpoints import load_model_state, load_optimizer_state, model_state, optimizer_state
from .loop import learning_rate_factor, take_step
from .sampling import ExampleStream, ValidationSet
from .schedules import annealed_weight_decay, set_weight_decay, weight_decay_groups

OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "average.safetensors"
# prompts that sounds are generated for, where none are given
NUM_PROMPTS = 4


def num_draws(num_hidden_layers: int) -> int:
    """Random numbers that a training example needs: one for its conditioning, two for each block."""
    return 1 + 2 * num_hidden_layers


def collate_generation_examples(
    examples: list[dict], conditioning: str, conditioner_feature_extractor: ClapFeatureExtractor | None = None
) -> dict:
    """
    A batch of [`TokenExamples`] or [`CropExamples`]: `inputs` for [`AarForConditionalGeneration`], names, and the
    files that were skipped.

    Args:
        examples (`list[dict]`): what the dataset gives.
        conditioning (`str`): the model's, "clap", "label" or "none".
        conditioner_feature_extractor ([`ClapFeatureExtractor`], *optional*): hears crops for a CLAP model, whose rate
            is their second one.
    """
    inputs = {"dropout_draws": torch.stack([example["draws"] for example in examples])}
    if "codes" in examples[0]:
        inputs["audio_codes"] = torch.stack([example["codes"] for example in examples])
    else:
        inputs["input_values"] = torch.stack([example["waveforms"][0] for example in examples])
    if conditioning == "label":
        inputs |= pad_labels([example["labels"] for example in examples])
    elif conditioning == "clap" and conditioner_feature_extractor is not None:
        inputs |= hear_one_by_one(conditioner_feature_extractor, [example["waveforms"][1] for example in examples])
    elif conditioning == "clap":
        inputs["conditioning_embeds"] = torch.stack([example["conditioning"] for example in examples])
    return {
        "inputs": inputs,
        "names": [example["name"] for example in examples],
        "skipped": [item for example in examples for item in example["skipped"]],
    }


def pad_labels(labels: Sequence[Sequence[int]]) -> dict[str, torch.Tensor]:
    """`input_ids` and `attention_mask` `(batch_size, most labels of a sound)`, at least one column."""
    width = max(1, *(len(ids) for ids in labels)) if labels else 1
    input_ids = torch.zeros(len(labels), width, dtype=torch.long)
    attention_mask = torch.zeros_like(input_ids)
    for row, ids in enumerate(labels):
        input_ids[row, : len(ids)] = torch.tensor(ids, dtype=torch.long)
        attention_mask[row, : len(ids)] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


class AverageWeights:
    """
    Exponential moving average of a model's trainable parameters.

    Args:
        model (`nn.Module`): whose weights are averaged, from their present values on.
        decay (`float`): share of the average that stays in every step.
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.parameters = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.average = {name: value.detach().clone() for name, value in self.parameters.items()}

    @torch.no_grad()
    def update(self) -> None:
        """Takes in the weights of a step."""
        torch._foreach_lerp_(list(self.average.values()), list(self.parameters.values()), 1 - self.decay)

    @contextmanager
    def applied(self):
        """Within this context the model has the average for its weights."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        for name, parameter in self.parameters.items():
            kept = parameter.clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(kept)


class AarStage:
    """
    AAR's training, for [`train`].

    Args:
        accelerator (`Accelerator`): the processes.
        args ([`AarArguments`]), loop_args ([`LoopArguments`]): settings.
        generator ([`AarForConditionalGeneration`]): the model to train; codec and conditioner stay as they are.
        processor ([`AarProcessor`], *optional*): saved with it, and reads the prompts.
        stream ([`ExampleStream`]): training batches of [`collate_generation_examples`].
        validation_set ([`ValidationSet`]): the same, held out.
        max_steps (`int`): optimizer steps of the whole run.
    """

    name = "aar"

    def __init__(
        self,
        accelerator: Accelerator,
        args: AarArguments,
        loop_args: LoopArguments,
        generator: AarForConditionalGeneration,
        processor: AarProcessor,
        stream: ExampleStream,
        validation_set: ValidationSet,
        max_steps: int,
    ):
        self.accelerator = accelerator
        self.args = args
        self.loop_args = loop_args
        self.model_class = type(generator)
        self.generator = generator.train()
        self.processor = processor
        self.stream = stream
        self.validation_set = validation_set
        self.max_steps = max_steps
        self.config = generator.config
        self.sampling_rate = generator.config.sampling_rate
        if args.gradient_checkpointing:
            generator.gradient_checkpointing_enable()
        self._prepare_sharding()
        groups = weight_decay_groups(generator)
        optimizer = torch.optim.AdamW(groups, betas=tuple(args.adam_betas), fused=True)
        self.model, self.optimizer = accelerator.prepare(generator, optimizer)
        self.average = None if args.ema_decay is None else AverageWeights(generator, args.ema_decay)
        if args.prompts:
            self._prompts()  # refuses what the model doesn't know before anything is trained

    @property
    def is_sharded(self) -> bool:
        return self.accelerator.distributed_type == DistributedType.FSDP

    def _prepare_sharding(self) -> None:
        if self.is_sharded:
            if not self.accelerator.is_fsdp2:
                raise ValueError("The generator is sharded by FSDP's second version only: add --fsdp_version 2.")
            if self.args.ema_decay is not None:
                raise ValueError("`ema_decay` needs whole weights: leave it out, or train without FSDP.")
            configure_fsdp(self.accelerator.state.fsdp_plugin, self.generator, self.accelerator.device)

    def recipe(self) -> dict:
        return recipe_of(self.loop_args, self.args) | {
            "max_steps": self.max_steps,
            "global_batch_size": self.stream.global_batch_size,
            "num_examples": len(self.stream.dataset),
            "codec": self.generator.codec_model.fingerprint(),
        }

    def start(self) -> None:
        """Nothing to do: weights start at random, or as they were loaded."""

    # --- a step ------------------------------------------------------------------------------------------------------

    def step(self, micro_batches: list[dict], step: int) -> dict[str, torch.Tensor]:
        self._set_schedules(step)
        total = 0.0
        for index, batch in enumerate(micro_batches):
            with self._accumulating(is_last=index == len(micro_batches) - 1):
                loss = self._loss(self._on_device(batch["inputs"]))
                self.accelerator.backward(loss / len(micro_batches))
            total = total + loss.detach() / len(micro_batches)
        norm = take_step(self.accelerator, self.optimizer, self.model.parameters(), self.loop_args.max_grad_norm)
        if self.average is not None:
            self.average.update()
        return {"loss": total, "grad_norm": norm}

    def _loss(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The model's own, over tokens; or the mean over scales of each scale's mean."""
        codes = self._codes(inputs)
        if self.args.loss_average == "tokens":
            return self._forward(inputs).loss
        logits = self._forward(inputs).logits
        losses, _, counts = scale_sums(logits, codes, self.generator.config.codec_config.scales).unbind(1)
        return (losses / counts).mean().to(logits.dtype)

    def _forward(self, inputs: dict[str, torch.Tensor]) -> AarOutput:
        with self.accelerator.autocast():  # which Accelerate adds to the model by itself, but for FSDP
            return self.model(**inputs)

    def _set_schedules(self, step: int) -> None:
        rate = self.loop_args.learning_rate * learning_rate_factor(self.loop_args, step, self.max_steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        first, last = self.args.weight_decay, self.args.final_weight_decay
        set_weight_decay(self.optimizer, annealed_weight_decay(step, self.max_steps, first, last))

    @contextmanager
    def _accumulating(self, is_last: bool):
        """All micro-batches but the last leave their gradients on their process."""
        if is_last:
            yield
        else:
            with self.accelerator.no_sync(self.model):
                yield

    def _on_device(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.accelerator.device, non_blocking=True) for name, value in inputs.items()}

    # --- validation --------------------------------------------------------------------------------------------------

    @contextmanager
    def _evaluating(self):
        """Evaluation mode, with the averaged weights where there are any."""
        self.model.eval()
        try:
            if self.average is None:
                yield
            else:
                with self.average.applied():
                    yield
        finally:
            self.model.train()

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """
        Cross-entropy in nats per token and the share of tokens that are guessed rightly, over all and for every scale;
        and the cross-entropy when each sound gets its neighbour's conditioning, which should be worse. Sounds without
        a neighbour, alone in their batch, don't count for the latter.
        """
        scales = self.generator.config.codec_config.scales
        device = self.accelerator.device
        sums, swapped_sums = torch.zeros(2, len(scales), 3, device=device, dtype=torch.float64)
        with self._evaluating():
            for batch in self.validation_set.batches():
                inputs = self._on_device(batch["inputs"])
                codes = self._codes(inputs)
                sums += scale_sums(self._forward(inputs).logits, codes, scales)
                swapped = scale_sums(self._forward(with_neighbours_conditioning(inputs)).logits, codes, scales)
                if len(codes) > 1:
                    swapped_sums += swapped
            for batch in self.validation_set.spare_batches() if self.is_sharded else ():
                for _ in (sums, swapped_sums):  # which sharded weights are gathered for, by all processes
                    self._forward(self._on_device(batch["inputs"]))
        sums, swapped_sums = self.accelerator.reduce(sums), self.accelerator.reduce(swapped_sums)
        loss, right, count = sums.sum(0).tolist()
        figures = {"loss": loss / count, "accuracy": right / count}
        loss, _, count = swapped_sums.sum(0).tolist()
        if count:
            figures["loss_with_neighbours_conditioning"] = loss / count
        for scale, (loss, right, count) in enumerate(sums.tolist()):
            figures |= {f"loss/{scale}": loss / count, f"accuracy/{scale}": right / count}
        return figures

    def _codes(self, inputs: dict[str, torch.Tensor]) -> torch.LongTensor:
        """The codes `(batch_size, tokens_per_window)` of a batch, which replace its audio."""
        if "input_values" in inputs:
            encoded = self.generator.codec_model.encode(inputs.pop("input_values"), return_dict=True)
            inputs["audio_codes"] = encoded.audio_codes[:, 0]
        return inputs["audio_codes"]

    @torch.no_grad()
    def sounds(self) -> dict[str, torch.Tensor]:
        """Sounds for the prompts, drawn with the same random numbers every time and on every device."""
        if self.is_sharded:  # generation calls parts of the model by themselves, whose weights aren't there
            return {}
        titles, inputs = self._prompts()
        generators = [torch.Generator().manual_seed(seed) for seed in range(len(titles))]
        with self._evaluating():
            waveforms = self.generator.generate(**self._on_device(inputs), generator=generators)
        return dict(zip(titles, waveforms.float().cpu()))

    def _prompts(self) -> tuple[list[str], dict[str, torch.Tensor]]:
        """Titles, and the conditioning that goes with them: the prompts, or that of validation sounds."""
        config = self.generator.config
        prompts = self.args.prompts or (config.labels or [])[:NUM_PROMPTS]
        if prompts and (config.conditioning == "label" or self.generator.conditioner is not None):
            return list(prompts), dict(self.processor(list(prompts), return_tensors="pt"))
        if config.conditioning == "none":  # whose prompts say how many only
            titles = [f"sound {number + 1}" for number in range(NUM_PROMPTS)]
            return titles, {"input_ids": torch.zeros(NUM_PROMPTS, 1, dtype=torch.long)}
        batch = self.validation_set.read(self.validation_set.keys[:NUM_PROMPTS])
        names = ("conditioning_embeds", "input_features", "is_longer")
        inputs = {name: batch["inputs"][name] for name in names if name in batch["inputs"]}
        return [f"like validation sound {number + 1}" for number in range(len(batch["names"]))], inputs

    # --- files -------------------------------------------------------------------------------------------------------

    def prepare_files(self) -> Callable[[Path], None]:
        state = model_state(self.model)
        optimizer = optimizer_state(self.model, self.optimizer)

        def write(folder: Path) -> None:
            self._save_model(folder, state)
            save_file(optimizer, folder / OPTIMIZER_FILE)
            if self.average is not None:
                save_file(self.average.average, folder / AVERAGE_FILE)

        return write

    def prepare_model(self) -> Callable[[Path], None]:
        if self.average is None:
            state = model_state(self.model)
        else:
            with self.average.applied():
                state = model_state(self.model)
        return partial(self._save_model, state=state)

    def _save_model(self, folder: Path, state: dict[str, torch.Tensor]) -> None:
        # by a model without weights, since the one that is trained may be of FSDP's class
        with torch.device("meta"):
            model = self.model_class(self.generator.config)
        model.generation_config = self.generator.generation_config
        model.save_pretrained(folder, state_dict=state)
        self.processor.save_pretrained(folder)

    def load_files(self, folder: Path) -> None:
        load_model_state(self.model, load_file(folder / "model.safetensors"))
        load_optimizer_state(self.model, self.optimizer, load_file(folder / OPTIMIZER_FILE))
        if self.average is not None:
            for name, value in load_file(folder / AVERAGE_FILE).items():
                self.average.average[name].copy_(value)


def configure_fsdp(
    plugin: FullyShardedDataParallelPlugin, generator: AarForConditionalGeneration, device: torch.device
) -> None:
    """
    FSDP shards the transformer only: of the codec methods are called that aren't its forward. Precision is left to
    autocast, as without FSDP: a policy of bf16 would also take the residual stream, the head, the logits and the sums
    of gradients.
    """
    plugin.mixed_precision_policy = MixedPrecisionPolicy()
    frozen = [generator.codec_model, generator.conditioner]
    plugin.ignored_modules = [part for part in frozen if part is not None]
    for part in plugin.ignored_modules:
        part.to(device)


def scale_sums(logits: torch.Tensor, codes: torch.LongTensor, scales: Sequence[int]) -> torch.Tensor:
    """Summed cross-entropy, right guesses and number of tokens of each scale, float64 `(num_scales, 3)`."""
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), codes, reduction="none")
    right = logits.argmax(-1) == codes
    rows = [
        torch.stack([loss.double().sum(), hit.double().sum(), loss.new_tensor(loss.numel(), dtype=torch.float64)])
        for loss, hit in zip(losses.split(list(scales), dim=1), right.split(list(scales), dim=1))
    ]
    return torch.stack(rows)


def with_neighbours_conditioning(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch in which every sound has the conditioning of the one before it."""
    kept = ("audio_codes", "dropout_draws")
    return {name: value if name in kept else value.roll(1, 0) for name, value in inputs.items()}
