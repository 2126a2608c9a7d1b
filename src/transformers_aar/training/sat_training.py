"""Training of SAT: reconstruction, mel, adversarial and feature losses around the quantizer's own training."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast
from safetensors.torch import load_file, save_file
from torch import nn

from ..evaluation.codebook_usage import CodebookUsage
from ..feature_extraction_sat import SatFeatureExtractor
from ..modeling_sat import SatModel
from .arguments import LoopArguments, SatArguments, recipe_of
from .checkpoints import load_optimizer_state, optimizer_state
from .discriminators import AudioDiscriminator
from .initialization import NUM_FITTED, initialize_from_data
from .loop import learning_rate_factor, take_step
from .losses import (
    MelLoss,
    adversarial_loss,
    discriminator_loss,
    feature_matching_loss,
    mean_magnitudes,
    relative_error,
    weighted_sum,
)
from .sampling import ExampleStream, ValidationSet

DISCRIMINATOR_FILE = "discriminator.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
DISCRIMINATOR_OPTIMIZER_FILE = "discriminator_optimizer.safetensors"
# sounds of the validation set that are reconstructed to be listened to
NUM_HEARD = 3


class SatForTraining(nn.Module):
    """A codec whose forward is what training needs, so that DistributedDataParallel can wrap it."""

    def __init__(self, codec: SatModel):
        super().__init__()
        self.codec = codec

    def forward(self, input_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Args:
            input_values (`torch.Tensor` of shape `(batch_size, 1, num_samples)`): one window of each sound.

        Returns:
            The reconstruction, of the input's shape, and the commitment loss, a scalar.
        """
        output = self.codec(input_values, return_dict=True)
        return output.audio_values, output.commitment_loss


def collate_crops(examples: list[dict]) -> dict:
    """A batch: `input_values` `(batch_size, 1, num_samples)`, names, and the files that were skipped."""
    return {
        "input_values": torch.stack([example["waveforms"][0] for example in examples]),
        "names": [example["name"] for example in examples],
        "skipped": [item for example in examples for item in example["skipped"]],
    }


class SatStage:
    """
    SAT's training, for [`train`].

    Args:
        accelerator (`Accelerator`): the processes.
        args ([`SatArguments`]), loop_args ([`LoopArguments`]): settings.
        codec ([`SatModel`]): the codec to train.
        discriminator ([`AudioDiscriminator`], *optional*): its adversary.
        stream ([`ExampleStream`]): training batches of [`collate_crops`].
        validation_set ([`ValidationSet`]): the same, held out.
        max_steps (`int`): optimizer steps of the whole run.
    """

    name = "sat"

    def __init__(
        self,
        accelerator: Accelerator,
        args: SatArguments,
        loop_args: LoopArguments,
        codec: SatModel,
        discriminator: AudioDiscriminator | None,
        stream: ExampleStream,
        validation_set: ValidationSet,
        max_steps: int,
    ):
        if accelerator.distributed_type == DistributedType.FSDP:
            raise ValueError("The tokenizer is small, and trained whole on every device: leave out --use_fsdp.")
        if (args.codebook_start_examples or accelerator.num_processes) < accelerator.num_processes:
            raise ValueError(
                f"`codebook_start_examples` must be at least the {accelerator.num_processes} processes, got "
                f"{args.codebook_start_examples}."
            )
        if accelerator.state.dynamo_plugin.use_regional_compilation:
            # which takes weight norms for blocks, and would give the model another quantizer than the codec's
            raise ValueError("The tokenizer has no blocks to compile: leave out --dynamo_use_regional_compilation.")
        self.accelerator = accelerator
        self.args = args
        self.loop_args = loop_args
        self.stream = stream
        self.validation_set = validation_set
        self.max_steps = max_steps
        self.config = codec.config
        self.sampling_rate = codec.config.sampling_rate
        self.codec = codec.to(accelerator.device).train()
        self.discriminator = discriminator
        self.mel_loss = MelLoss(self.sampling_rate).to(accelerator.device)
        self.model, self.optimizer = self._prepare(SatForTraining(self.codec))
        if discriminator is not None:
            self.discriminator_model, self.discriminator_optimizer = self._prepare(discriminator)

    def _prepare(self, module: nn.Module) -> tuple[nn.Module, torch.optim.Optimizer]:
        """A module and its optimizer in Accelerate's hands."""
        optimizer = torch.optim.Adam(module.parameters(), betas=tuple(self.args.adam_betas), fused=True)
        return self.accelerator.prepare(module, optimizer)

    def _read(self, positions: range) -> torch.Tensor:
        return self.stream.read(positions)["input_values"].to(self.accelerator.device)

    def recipe(self) -> dict:
        return recipe_of(self.loop_args, self.args) | {
            "max_steps": self.max_steps,
            "global_batch_size": self.stream.global_batch_size,
            "num_examples": len(self.stream.dataset),
        }

    @torch.no_grad()
    def start(self) -> None:
        """Encoder and decoder computed from sounds, if wanted."""
        if not self.args.data_dependent_init or self.args.model_name_or_path is not None:
            return
        initialize_from_data(self.codec, self._read(range(max(NUM_FITTED, self._num_start_examples))))
        # all processes had the same sounds, but may not round alike
        for parameter in self.codec.parameters():
            parameter.copy_(broadcast(parameter.clone()))

    # --- a step ------------------------------------------------------------------------------------------------------

    def step(self, micro_batches: list[dict], step: int) -> dict[str, torch.Tensor]:
        """The codec goes first, against the discriminator as it stands; that one follows on the same sounds."""
        if not self.codec.quantizer.initialized:
            self._start_codebooks(step)
        adversarial = self.discriminator is not None and step >= self.args.discriminator_start_step
        self._set_learning_rates(step)
        sounds = [batch["input_values"].to(self.accelerator.device, non_blocking=True) for batch in micro_batches]
        losses, reconstructions = self._codec_step(sounds, adversarial)
        if adversarial and not self._discriminator_rests(step):
            losses["discriminator"] = self._discriminator_step(sounds, reconstructions)
        return losses

    def _discriminator_rests(self, step: int) -> bool:
        interval = self.args.discriminator_skip_interval
        return interval > 0 and step % interval == 0

    def _set_learning_rates(self, step: int) -> None:
        factor = learning_rate_factor(self.loop_args, step, self.max_steps)
        rates = {"optimizer": self.loop_args.learning_rate}
        if self.discriminator is not None:
            rates["discriminator_optimizer"] = self.args.discriminator_learning_rate or self.loop_args.learning_rate
        for name, rate in rates.items():
            for group in getattr(self, name).param_groups:
                group["lr"] = rate * factor

    @property
    def _num_start_examples(self) -> int:
        return self.args.codebook_start_examples or self.stream.global_batch_size

    def _start_codebooks(self, step: int) -> None:
        """k-means from this step's examples, or from more: a coarse scale has few vectors per sound."""
        count = self._num_start_examples
        first = step * self.stream.global_batch_size
        self.codec.start_codebooks(self._read(self.stream.share_of(range(first, first + count))))
        # as if one batch had been counted, so that the moving averages forget the start at their normal pace
        for statistic in (self.codec.quantizer.cluster_size, self.codec.quantizer.codebook_sum):
            statistic.mul_(self.stream.global_batch_size / count)

    def _codec_step(
        self, sounds: list[torch.Tensor], adversarial: bool
    ) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
        """Losses, means over the micro-batches, and the reconstructions without their gradients."""
        magnitudes, real_features = self._feature_magnitudes(sounds) if adversarial else (None, None)
        totals, reconstructions = {}, []
        for index, real in enumerate(sounds):
            with self._accumulating(self.model, is_last=index == len(sounds) - 1):
                fake, commitment = self.model(real)
                losses = self._losses(real, fake, commitment, magnitudes, real_features)
                self.accelerator.backward(weighted_sum(losses, self.args.loss_weights) / len(sounds))
            reconstructions.append(fake.detach())
            for name, loss in losses.items():
                totals[name] = totals.get(name, 0.0) + loss.detach() / len(sounds)
        parameters = self.model.parameters()
        totals["grad_norm"] = take_step(self.accelerator, self.optimizer, parameters, self.loop_args.max_grad_norm)
        return totals, reconstructions

    def _losses(
        self,
        real: torch.Tensor,
        fake: torch.Tensor,
        commitment: torch.Tensor,
        magnitudes: torch.Tensor | None,
        real_features: list[list[torch.Tensor]] | None,
    ) -> dict[str, torch.Tensor]:
        """The codec's objective, term by term."""
        losses = {"wave": F.l1_loss(fake, real), "mel": self.mel_loss(fake, real), "commitment": commitment}
        if magnitudes is not None:
            if real_features is None:
                real_features = self._judge(real).features
            judged = self._judge(fake)
            losses["adversarial"] = adversarial_loss(judged.logits)
            losses["feature"] = feature_matching_loss(real_features, judged.features, magnitudes)
        return losses

    def _judge(self, sounds: torch.Tensor):
        """The discriminator's opinion, for the codec's step: no gradients for its weights, nor for recordings."""
        self.discriminator.requires_grad_(False)
        with self.accelerator.autocast(), torch.set_grad_enabled(sounds.requires_grad):
            return self.discriminator(sounds)

    def _feature_magnitudes(self, sounds: list[torch.Tensor]) -> tuple[torch.Tensor, list[list[torch.Tensor]] | None]:
        """
        Mean magnitudes of the recordings' features over the whole batch, all processes and micro-batches; and of a
        single micro-batch the features, which need not be computed again. Those of several would fill the memory.
        """
        means = []
        for real in sounds:
            features = self._judge(real).features
            means.append(mean_magnitudes(features))
        magnitudes = self.accelerator.reduce(torch.stack(means).mean(0), reduction="mean")
        return magnitudes, features if len(sounds) == 1 else None

    def _discriminator_step(self, sounds: list[torch.Tensor], reconstructions: list[torch.Tensor]) -> torch.Tensor:
        self.discriminator.requires_grad_(True)
        total = 0.0
        for index, (real, fake) in enumerate(zip(sounds, reconstructions, strict=True)):
            with self._accumulating(self.discriminator_model, is_last=index == len(sounds) - 1):
                # in one pass, since DistributedDataParallel wants one forward for each backward
                with self.accelerator.autocast():
                    logits = self.discriminator_model(torch.cat([real, fake])).logits
                real_logits, fake_logits = zip(*(part.chunk(2) for part in logits), strict=True)
                loss = discriminator_loss(real_logits, fake_logits)
                self.accelerator.backward(loss / len(sounds))
            total = total + loss.detach() / len(sounds)
        parameters = self.discriminator_model.parameters()
        take_step(self.accelerator, self.discriminator_optimizer, parameters, self.loop_args.max_grad_norm)
        return total

    @contextmanager
    def _accumulating(self, model: nn.Module, is_last: bool):
        """All micro-batches but the last leave gradients on their process and codebooks as they are."""
        if is_last:
            yield
        else:
            with self.accelerator.no_sync(model), self.codec.accumulate_codebook_statistics():
                yield

    # --- validation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def validate(self) -> dict[str, float]:
        """Reconstruction errors, and for every scale the share of codes in use and their perplexity."""
        codec, config = self.codec.eval(), self.codec.config
        usage = CodebookUsage(config.scales, config.codebook_size, self.accelerator.device)
        sums = torch.zeros(4, device=self.accelerator.device, dtype=torch.float64)
        for batch in self.validation_set.batches():
            real = batch["input_values"].to(self.accelerator.device)
            fake = self._reconstruct(real, usage)
            errors = [self.mel_loss(fake, real), F.l1_loss(fake, real), relative_error(fake, real)]
            sums += torch.stack([*errors, real.new_ones(())]).double() * len(real)
        codec.train()
        sums = self.accelerator.reduce(sums)
        mel, l1, relative = (sums[:3] / sums[3]).tolist()
        figures = {"mel": mel, "l1": l1, "relative_error": relative}
        usage.counts = self.accelerator.reduce(usage.counts)
        for scale, (used, perplexity) in enumerate(zip(usage.used.tolist(), usage.perplexity.tolist())):
            figures |= {f"codes_used/{scale}": used, f"perplexity/{scale}": perplexity}
        return figures

    def _reconstruct(self, real: torch.Tensor, usage: CodebookUsage | None = None) -> torch.Tensor:
        """What the codec makes of sounds, in evaluation mode."""
        audio_codes = self.codec.encode(real, return_dict=True).audio_codes
        if usage is not None:
            usage.update(audio_codes)
        return self.codec.decode(audio_codes, return_dict=True).audio_values

    @torch.no_grad()
    def sounds(self) -> dict[str, torch.Tensor]:
        batch = self.validation_set.read(self.validation_set.keys[:NUM_HEARD])
        self.codec.eval()
        reconstructions = self._reconstruct(batch["input_values"].to(self.accelerator.device))
        self.codec.train()
        heard = {}
        for number, (real, fake) in enumerate(zip(batch["input_values"], reconstructions), start=1):
            heard |= {f"sound {number}, original": real, f"sound {number}, reconstruction": fake}
        return heard

    # --- files -------------------------------------------------------------------------------------------------------

    def prepare_files(self) -> Callable[[Path], None]:
        states = {OPTIMIZER_FILE: optimizer_state(self.model, self.optimizer)}
        if self.discriminator is not None:
            states[DISCRIMINATOR_OPTIMIZER_FILE] = optimizer_state(
                self.discriminator_model, self.discriminator_optimizer
            )
        write_model = self.prepare_model()

        def write(folder: Path) -> None:
            write_model(folder)
            for name, state in states.items():
                save_file(state, folder / name)

        return write

    def prepare_model(self) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            self.codec.save_pretrained(folder)
            feature_extractor(self.codec).save_pretrained(folder)
            if self.discriminator is not None:
                self.discriminator.save(folder / DISCRIMINATOR_FILE)

        return write

    def load_files(self, folder: Path) -> None:
        # not through from_pretrained, which casts codebooks to fp32 where a run is in float64
        self.codec.load_state_dict(load_file(folder / "model.safetensors"))
        load_optimizer_state(self.model, self.optimizer, load_file(folder / OPTIMIZER_FILE))
        if self.discriminator is not None:
            self.discriminator.load_state_dict(load_file(folder / DISCRIMINATOR_FILE))
            state = load_file(folder / DISCRIMINATOR_OPTIMIZER_FILE)
            load_optimizer_state(self.discriminator_model, self.discriminator_optimizer, state)


def feature_extractor(codec: SatModel) -> SatFeatureExtractor:
    """The feature extractor that goes with a codec."""
    return SatFeatureExtractor(sampling_rate=codec.config.sampling_rate, feature_size=codec.config.audio_channels)
