"""Parameter groups for models of transformers: weight decay where it belongs, rates by layer."""

from typing import Any

import peft
import pytest
import torch

from accel_core import ConfigurationError
from accel_integrations.transformers_adapter import TransformersTrainer, transformers_parameter_groups
from tiny_transformers import collate, create_model, create_samples

KINDS = ["causal", "gpt2", "seq2seq", "masked", "tokens", "classes"]


def rates_by_name(model: Any, **kwargs: Any) -> dict[str, float]:
    groups = transformers_parameter_groups(model, lr=1.0, **kwargs)
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    return {name: rates[id(parameter)] for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("kind", KINDS)
def test_biases_and_norms_do_not_decay_and_every_parameter_is_in_one_group(kind: str) -> None:
    model = create_model(kind)
    groups = transformers_parameter_groups(model, lr=0.1, weight_decay=0.3)
    decaying = {
        id(parameter) for group in groups if group["weight_decay"] == 0.3 for parameter in group["params"]
    }
    others = {
        id(parameter) for group in groups if group["weight_decay"] == 0.0 for parameter in group["params"]
    }
    assert len(groups) == 2
    assert (
        sum(len(group["params"]) for group in groups)
        == len(list(model.parameters()))
        == len(decaying | others)
    )
    for name, parameter in model.named_parameters():
        is_norm_or_bias = name.endswith("bias") or "norm" in name.lower() or "ln_" in name
        # The bias of T5's attention by distance is a table, but a bias.
        assert (id(parameter) in others) == (is_norm_or_bias or "relative" in name), name


def test_rates_fall_from_the_head_to_the_embeddings() -> None:
    rates = rates_by_name(create_model("classes"), layer_decay=0.5)
    by_part = {
        "bert.embeddings.": 0.125,
        "bert.encoder.layer.0.": 0.25,
        "bert.encoder.layer.1.": 0.5,
        "bert.pooler.": 1.0,
        "classifier.": 1.0,
    }
    for name, rate in rates.items():
        assert rate == next(expected for part, expected in by_part.items() if name.startswith(part)), name


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (
            "causal",
            {
                "embed_tokens": 0.125,
                "layers.0.self": 0.25,
                "layers.1.mlp": 0.5,
                "model.norm": 1.0,
                "lm_head": 1.0,
            },
        ),
        ("gpt2", {"wte": 0.125, "wpe": 0.125, "h.0.attn": 0.25, "h.1.mlp": 0.5, "ln_f": 1.0}),
        (
            "seq2seq",
            {
                "shared": 0.125,
                "encoder.block.0": 0.25,
                "decoder.block.0": 0.25,
                "decoder.block.1": 0.5,
                "final": 1.0,
            },
        ),
    ],
)
def test_other_families_have_the_same_order(kind: str, expected: dict[str, float]) -> None:
    rates = rates_by_name(create_model(kind), layer_decay=0.5)
    for part, rate in expected.items():
        found = {value for name, value in rates.items() if part in name}
        assert found == {rate}, part


def test_adapters_are_grouped_by_the_layer_that_they_are_in() -> None:
    with pytest.warns(FutureWarning, match="is_gradient_checkpointing"):
        model = peft.get_peft_model(create_model("causal"), peft.LoraConfig(r=2, target_modules=["q_proj"]))
    groups = transformers_parameter_groups(model, lr=1.0, layer_decay=0.5)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert sorted(group["lr"] for group in groups) == [0.25, 0.5]
    assert {id(parameter) for group in groups for parameter in group["params"]} == set(map(id, trained))


def test_the_groups_train() -> None:
    model = create_model("classes")
    optimizer = torch.optim.AdamW(
        transformers_parameter_groups(model, lr=0.01, weight_decay=0.1, layer_decay=0.5)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    TransformersTrainer(model, None, optimizer, callbacks=()).train(
        create_samples("classes"), 1, collate_fn=collate
    )
    after = model.state_dict()
    moved = {
        part: (after[part] - before[part]).abs().max().item()
        for part in ("classifier.weight", "bert.pooler.dense.weight")
    }
    embedding = "bert.embeddings.position_embeddings.weight"
    assert (after[embedding] - before[embedding]).abs().max().item() < 0.3 * min(moved.values())


@pytest.mark.parametrize(
    "wrong", [{"lr": 0.0}, {"lr": 0.1, "layer_decay": -1.0}, {"lr": 0.1, "weight_decay": -1.0}]
)
def test_rates_that_cannot_be_are_reported(wrong: dict[str, float]) -> None:
    name, value = list(wrong.items())[-1]
    with pytest.raises(ConfigurationError, match=rf"{name} is {value}.*number (above|of at least) 0.*Use "):
        transformers_parameter_groups(create_model("classes"), **wrong)
