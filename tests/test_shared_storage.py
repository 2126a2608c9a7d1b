"""LSTM weights that share storage, as cuDNN leaves them after the first forward on a GPU."""

import torch

from transformers_aar import SatConfig, SatModel


def flatten_lstm(lstm: torch.nn.LSTM) -> None:
    """Makes all parameters views of one buffer."""
    flat = torch.cat([parameter.detach().flatten() for parameter in lstm.parameters()])
    start = 0
    for parameter in lstm.parameters():
        parameter.data = flat[start : start + parameter.numel()].view_as(parameter)
        start += parameter.numel()


def test_save_pretrained_keeps_every_tensor(tmp_path):
    """Savers that drop tensors of shared storage keep one of eight; a folder must hold them all."""
    model = SatModel(SatConfig(num_filters=2, hidden_size=8, codebook_dim=4, codebook_size=16))
    for module in model.modules():
        if isinstance(module, torch.nn.LSTM):
            flatten_lstm(module)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert sum(name.endswith("weight_hh_l1") for name in before) == 2
    model.save_pretrained(tmp_path)
    loaded = SatModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(loaded[name], tensor), name
