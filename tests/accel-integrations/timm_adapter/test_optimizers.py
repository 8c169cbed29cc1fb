"""Optimizers and parameter groups of timm, whose rates by layer hold under any scheduler and under none."""

from typing import Any

import pytest
import timm
import timm.optim
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn
from torch.optim.lr_scheduler import ExponentialLR
from torch.utils.data import TensorDataset

from accel_core import ConfigurationError, Trainer
from accel_integrations.schedulers import CosineLrScheduler
from accel_integrations.timm_adapter import create_timm_optimizer, timm_parameter_groups, timm_scheduler_fn
from tiny import Rates, values_of

LR = 0.01
DECAY = 0.7


def create_model() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10)  # type: ignore[no-any-return]


def names_in(groups: list[dict[str, Any]], model: nn.Module, decayed: bool) -> set[str]:
    chosen = {
        id(parameter)
        for group in groups
        if bool(group["weight_decay"]) == decayed
        for parameter in group["params"]
    }
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


class TestParameterGroups:
    @pytest.mark.parametrize("layer_decay", [None, DECAY])
    def test_biases_norms_and_embeddings_have_no_weight_decay(self, layer_decay: float | None) -> None:
        model = create_model()
        groups = timm_parameter_groups(model, LR, 0.05, layer_decay)
        without = names_in(groups, model, decayed=False)
        assert without == {
            name
            for name, parameter in model.named_parameters()
            if parameter.ndim <= 1 or name in ("pos_embed", "cls_token", "reg_token", "dist_token")
        }
        assert (
            names_in(groups, model, decayed=True) == {name for name, _ in model.named_parameters()} - without
        )
        assert "pos_embed" in without

    def test_each_layer_learns_slower_than_the_one_above(self) -> None:
        model = create_model()
        optimizer = torch.optim.AdamW(timm_parameter_groups(model, LR, layer_decay=DECAY), lr=LR)
        of = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
        by_name = {name: of[id(parameter)] for name, parameter in model.named_parameters()}
        assert by_name["head.weight"] == by_name["head.bias"] == LR
        last = len(model.blocks)  # type: ignore[arg-type]
        for number in range(last - 1):
            ratio = (
                by_name[f"blocks.{number}.mlp.fc1.weight"] / by_name[f"blocks.{number + 1}.mlp.fc1.weight"]
            )
            assert ratio == pytest.approx(DECAY)
        assert by_name["patch_embed.proj.weight"] == pytest.approx(by_name["blocks.0.mlp.fc1.weight"] * DECAY)

    def test_frozen_parameters_are_left_out(self) -> None:
        model = create_model()
        model.patch_embed.requires_grad_(False)  # type: ignore[operator,union-attr]
        groups = timm_parameter_groups(model, LR)
        held = {id(parameter) for group in groups for parameter in group["params"]}
        assert held == {id(parameter) for parameter in model.parameters() if parameter.requires_grad}

    def test_they_fit_any_model(self) -> None:
        groups = timm_parameter_groups(nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)), LR, 0.1)
        assert [(len(group["params"]), group["weight_decay"]) for group in groups] == [(3, 0.0), (1, 0.1)]


class TestFactory:
    @pytest.mark.parametrize("name", ["sgd", "adamw", "lamb", "lion", "muon", "lookahead_radam"])
    @pytest.mark.parametrize("layer_decay", [None, DECAY])
    def test_gives_the_optimizer_of_timm(self, name: str, layer_decay: float | None) -> None:
        model = create_model()
        optimizer = create_timm_optimizer(model, name, LR, 0.05, layer_decay)
        timms = timm.optim.create_optimizer_v2(model, name, lr=LR, weight_decay=0.05, layer_decay=layer_decay)
        assert type(optimizer) is type(timms)
        for own, expected in zip(optimizer.param_groups, timms.param_groups, strict=True):
            assert own["params"] == expected["params"]
            assert own["weight_decay"] == expected["weight_decay"]
            assert own["lr"] == expected["lr"] * expected.get("lr_scale", 1.0)

    def test_arguments_of_the_optimizer_are_passed_on(self) -> None:
        optimizer = create_timm_optimizer(
            create_model(), "adamw", LR, betas=(0.8, 0.95), filter_bias_and_bn=False
        )
        assert {group["betas"] for group in optimizer.param_groups} == {(0.8, 0.95)}
        assert optimizer.param_groups[-1]["weight_decay"] == 0.05

    @pytest.mark.parametrize(
        ("kwargs", "words"),
        [
            ({"name": "adamww"}, ("name is 'adamww'", "Did you mean", "adamw")),
            ({"lr": 0.0}, ("lr is 0.0", "above 0")),
            ({"lr": None}, ("lr is None", "above 0")),
            ({"weight_decay": -0.1}, ("weight_decay is -0.1", "at least 0")),
            ({"layer_decay": -1}, ("layer_decay is -1", "Use None")),
        ],
    )
    def test_mistakes_are_reported(self, kwargs: dict[str, Any], words: tuple[str, ...]) -> None:
        with pytest.raises(ConfigurationError) as caught:
            create_timm_optimizer(create_model(), **kwargs)
        assert all(word in str(caught.value) for word in words), caught.value


# ---------------------------------------------------------------------- with schedulers


def small_vit() -> nn.Module:
    return timm.create_model("test_vit", num_classes=2, img_size=16)  # type: ignore[no-any-return]


DATA = TensorDataset(
    torch.randn(6, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
)


def train(optimizer: Any, model: nn.Module, create_scheduler_fn: Any) -> list[list[float]]:
    seen = Rates()
    trainer = Trainer(model, nn.functional.cross_entropy, optimizer, callbacks=[seen], seed=0)
    trainer.train(DATA, 3, per_device_batch_size=3, create_scheduler_fn=create_scheduler_fn)
    return seen.rates


def test_under_timms_schedulers_rates_by_layer_are_those_of_timms_loop() -> None:
    kwargs = {"t_initial": 6, "lr_min": 1e-4, "warmup_t": 2, "warmup_lr_init": 1e-3, "t_in_epochs": False}
    model = small_vit()
    optimizer = create_timm_optimizer(model, "sgd", LR, layer_decay=DECAY)
    own = train(optimizer, model, timm_scheduler_fn(CosineLRScheduler, **kwargs))

    timms = timm.optim.create_optimizer_v2(small_vit(), "sgd", lr=LR, weight_decay=0.05, layer_decay=DECAY)
    scheduler = CosineLRScheduler(timms, **kwargs)
    for update, seen in enumerate(own, start=1):
        assert seen == pytest.approx(values_of(timms), rel=0, abs=1e-9)
        scheduler.step_update(update)
    # A second run on the same optimizer begins at the same base.
    assert train(optimizer, model, timm_scheduler_fn(CosineLRScheduler, **kwargs)) == own


@pytest.mark.parametrize(
    "create_scheduler_fn",
    [
        lambda optimizer: ExponentialLR(optimizer, 0.5),
        CosineLrScheduler.create_scheduler_fn(lr_min=0.0),
        None,
    ],
    ids=["of torch", "of accel", "none"],
)
@pytest.mark.parametrize("after_timm", [False, True], ids=["", "after one of timm"])
def test_under_other_schedulers_the_ratios_between_layers_stay(
    create_scheduler_fn: Any, after_timm: bool
) -> None:
    model = small_vit()
    optimizer = create_timm_optimizer(model, "sgd", LR, layer_decay=DECAY)
    first = values_of(optimizer)
    if after_timm and create_scheduler_fn is not None:
        train(optimizer, model, timm_scheduler_fn(CosineLRScheduler, t_initial=3))
        for group in optimizer.param_groups:
            group["lr"] = group["initial_lr"]
    seen = train(optimizer, model, create_scheduler_fn)
    assert seen[0] == pytest.approx(first)
    for update in seen:
        assert [rate / update[-1] for rate in update] == pytest.approx([rate / first[-1] for rate in first])
