"""Parameter groups of models with parametrized weights and with tables of relative positions."""

import pytest
import torch
from transformers import (
    SwinConfig,
    SwinModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from accel_integrations.transformers_adapter import transformers_parameter_groups


def wav2vec2():
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    convolutions = {"conv_dim": (16, 16), "conv_stride": (5, 2), "conv_kernel": (10, 3)}
    positions = {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    return Wav2Vec2ForCTC(Wav2Vec2Config(vocab_size=20, **sizes, **convolutions, **positions))


def t5():
    return T5ForConditionalGeneration(
        T5Config(vocab_size=20, d_model=16, d_kv=4, d_ff=16, num_layers=2, num_heads=2)
    )


def swin():
    return SwinModel(
        SwinConfig(image_size=32, patch_size=4, embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=4)
    )


def weight_norm():
    linear = torch.nn.utils.parametrizations.weight_norm(torch.nn.Linear(3, 3))
    return torch.nn.ModuleList([torch.nn.Sequential(linear), torch.nn.Linear(3, 3)])


@pytest.mark.parametrize("create", [wav2vec2, t5, swin, weight_norm])
@pytest.mark.parametrize("layer_decay", [None, 0.5])
def test_every_parameter_is_in_one_group_and_biases_do_not_decay(create, layer_decay):
    model = create()
    groups = transformers_parameter_groups(model, lr=1e-3, weight_decay=0.1, layer_decay=layer_decay)
    decays = {id(parameter): group["weight_decay"] > 0 for group in groups for parameter in group["params"]}
    assert len(decays) == sum(len(group["params"]) for group in groups) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        is_position = "relative_attention_bias" in name or "relative_position_bias" in name
        assert decays[id(parameter)] == (parameter.ndim > 1 and not is_position), name


@pytest.mark.parametrize(
    ("create", "name"), [(t5, "relative_attention_bias"), (swin, "relative_position_bias_table")]
)
def test_tables_of_relative_positions_are_there_and_do_not_decay(create, name):
    model = create()
    tables = {id(parameter) for key, parameter in model.named_parameters() if name in key}
    assert tables
    for group in transformers_parameter_groups(model, lr=1e-3, weight_decay=0.1):
        if tables & {id(parameter) for parameter in group["params"]}:
            assert group["weight_decay"] == 0.0
