"""AAR sharded by FSDP2. For a CPU Accelerate takes DistributedDataParallel, so its preparation is called directly."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

WORKER = """
import sys
import torch
import torch.distributed as dist
from functools import partial
from types import SimpleNamespace
from accelerate.utils import FullyShardedDataParallelPlugin
from accelerate.utils.fsdp_utils import fsdp2_prepare_model
from safetensors.torch import save_file
from transformers_aar import AarConfig, AarForConditionalGeneration
from transformers_aar.training.aar_training import AarStage, configure_fsdp
from transformers_aar.training.checkpoints import model_state, optimizer_state
from transformers_aar.training.schedules import weight_decay_groups

CODEC = {"num_filters": 2, "hidden_size": 8, "codebook_dim": 4, "codebook_size": 16, "num_lstm_layers": 1}
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "drop_path_rate": 0.5}


def build():
    torch.manual_seed(0)
    labels = {"conditioning": "label", "labels": ["Dog", "Rain"]}
    model = AarForConditionalGeneration(AarConfig(codec_config=CODEC, adaln=sys.argv[2], **labels, **SIZES)).train()
    return model, lambda: torch.optim.AdamW(weight_decay_groups(model), lr=1e-3, betas=(0.9, 0.95))


torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
(sharded, make_sharded_optimizer), (plain, make_optimizer) = build(), build()
plugin = FullyShardedDataParallelPlugin(
    fsdp_version=2,
    auto_wrap_policy="transformer_based_wrap",
    transformer_cls_names_to_wrap=["AarLayer"],
    cpu_ram_efficient_loading=False,
)
accelerator = SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin), torch_device_mesh=None)
accelerator.mixed_precision, accelerator.is_main_process = sys.argv[3], rank == 0
accelerator.device = torch.device("cpu")
accelerator.autocast = partial(torch.autocast, "cpu", torch.bfloat16, enabled=sys.argv[3] == "bf16")
if sys.argv[3] == "bf16":  # as Accelerate does
    plugin.set_mixed_precision("bf16")
configure_fsdp(plugin, sharded, accelerator.device)
fsdp2_prepare_model(accelerator, sharded)
optimizers = {sharded: make_sharded_optimizer(), plain: make_optimizer()}
generator, losses = torch.Generator().manual_seed(1), []
for step in range(3):
    batch = {
        "input_ids": torch.randint(2, (4, 1), generator=generator),
        "audio_codes": torch.randint(16, (4, 455), generator=generator),
        "dropout_draws": torch.rand(4, 5, generator=generator),
    }
    own = {name: value.chunk(dist.get_world_size())[rank] for name, value in batch.items()}
    for model, inputs in ((sharded, own), (plain, batch)):
        output = AarStage._forward(SimpleNamespace(accelerator=accelerator, model=model), inputs)
        assert output.logits.dtype == output.loss.dtype == torch.float32
        loss = output.loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 2.0)
        optimizers[model].step()
        optimizers[model].zero_grad()
        losses.append(loss.detach())
    dist.all_reduce(losses[-2])
    losses[-2] /= dist.get_world_size()
state = model_state(sharded)
entries = optimizer_state(sharded, optimizers[sharded])
if rank == 0:
    figures = {"losses": torch.stack(losses), "world": torch.tensor(dist.get_world_size())}
    save_file(figures, f"{sys.argv[1]}/figures.safetensors")
    save_file(state, f"{sys.argv[1]}/sharded.safetensors")
    save_file(plain.state_dict(), f"{sys.argv[1]}/plain.safetensors")
    save_file(entries, f"{sys.argv[1]}/optimizer.safetensors")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    "adaln, mixed_precision, accuracy",
    [("per_block", "no", 1e-5), ("shared", "no", 1e-5), ("per_block", "bf16", 1e-3)],
)
def test_sharded_training_equals_plain(tmp_path, adaln, mixed_precision, accuracy):
    """
    Two processes that each hold half of the transformer follow one that holds it all; what they save is whole. In bf16
    they take what is added up, and the head with its loss, in fp32 all the same.
    """
    script = tmp_path / "worker.py"
    script.write_text(WORKER)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [*launch, str(script), str(tmp_path), adaln, mixed_precision]
    subprocess.run(command, check=True, timeout=300, capture_output=True)
    figures = load_file(tmp_path / "figures.safetensors")
    assert figures["world"] == 2
    torch.testing.assert_close(figures["losses"][0::2], figures["losses"][1::2], rtol=accuracy, atol=0)
    sharded, plain = load_file(tmp_path / "sharded.safetensors"), load_file(tmp_path / "plain.safetensors")
    assert sharded.keys() == plain.keys()
    for name, tensor in plain.items():
        torch.testing.assert_close(sharded[name], tensor, rtol=0, atol=accuracy, msg=name)
    trained = [name for name in load_file(tmp_path / "optimizer.safetensors") if name.endswith(".exp_avg")]
    assert len(trained) > 20 and not any(name.startswith("codec_model.") for name in trained)
