"""What is frozen does not change, what is not asked for stays as it is."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks.model_freezer import ModelFreezer
from accel_core import ConfigurationError, Trainer, TrainerCallback


class TinyTransformer(nn.Module):
    """As in vision transformers: parameters held by the model itself, and by a module with others in it."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 8))
        self.embed = nn.Linear(4, 8)
        self.attention = nn.MultiheadAttention(8, 2, dropout=0.1, batch_first=True)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), self.embed(x)], dim=1)
        x, _ = self.attention(x, x, x)
        return self.head(self.norm(x[:, 0]))


@pytest.fixture
def model():
    torch.manual_seed(0)
    return TinyTransformer()


def trainable(model):
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def values(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def train(model, callbacks=(), lr=0.1):
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.5)
    dataset = TensorDataset(torch.randn(16, 3, 4), torch.randn(16, 1))
    Trainer(model, nn.MSELoss(), optimizer, callbacks=callbacks).train(
        dataset, num_epochs=2, per_device_batch_size=4
    )


def test_lesson_13_constructing_changes_nothing(model):
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "bias" in name
    model.attention.eval()
    before, modes = trainable(model), [module.training for module in model.modules()]
    ModelFreezer(model)
    assert trainable(model) == before
    assert [module.training for module in model.modules()] == modes


def test_by_default_all_but_the_head_and_the_batch_norms_are_frozen(model):
    ModelFreezer(model).freeze()
    assert trainable(model) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_batch_norms_are_frozen_if_asked_for(model):
    ModelFreezer(model, freeze_batch_norms=True).freeze()
    assert trainable(model) == {"head.weight", "head.bias"}


def test_lesson_13_frozen_parameters_are_bit_identical_after_training(model):
    ModelFreezer(model).freeze()
    before, free = values(model), trainable(model)
    train(model)
    changed = {
        name
        for name, _ in model.named_parameters()
        if not torch.equal(before[name], model.state_dict()[name])
    }
    assert changed == free
    assert {"cls_token", "attention.in_proj_weight"} <= before.keys() - changed


def test_a_gradient_that_is_left_is_not_applied(model):
    model(torch.randn(4, 3, 4)).sum().backward()
    before = values(model)
    ModelFreezer(model).freeze()
    torch.optim.SGD(model.parameters(), lr=1.0).step()
    assert torch.equal(before["cls_token"], model.cls_token)
    assert not torch.equal(before["head.weight"], model.head.weight)


def test_layer_groups_are_the_modules_of_the_model(model):
    freezer = ModelFreezer(model)
    freezer.freeze(to_index=1)
    groups = freezer.get_layer_groups()
    assert [group.layer_group_idx for group in groups] == [(0, -4), (1, -3), (2, -2), (3, -1)]
    assert [group.module for group in groups] == [model.embed, model.attention, model.norm, model.head]
    assert [group.is_frozen for group in groups] == [True, True, False, False]


def test_layers_are_all_modules_that_hold_parameters_or_no_modules(model):
    freezer = ModelFreezer(model)
    freezer.freeze(0, 0)
    assert [(layer.layer_group_idx[0], layer.module, layer.is_frozen) for layer in freezer.get_layers()] == [
        (0, model, True),
        (0, model.embed, True),
        (1, model.attention, False),
        (1, model.attention.out_proj, False),
        (2, model.norm, False),
        (3, model.head, False),
    ]


def test_trainable_parameters_are_those_for_the_optimizer(model):
    freezer = ModelFreezer(model)
    freezer.freeze()
    assert [id(parameter) for parameter in freezer.get_trainable_parameters()] == [
        id(parameter) for parameter in (*model.norm.parameters(), *model.head.parameters())
    ]


@pytest.mark.parametrize(("from_index", "to_index"), [(1, 2), (2, 1), (-3, -2), (1, -2)])
def test_both_indices_are_included_in_either_order(model, from_index, to_index):
    ModelFreezer(model, freeze_batch_norms=True).freeze(from_index, to_index)
    assert trainable(model) == {"cls_token", "embed.weight", "embed.bias", "head.weight", "head.bias"}


def test_unfreezing_returns_what_was_frozen_for_the_optimizer(model):
    freezer = ModelFreezer(model)
    freezer.freeze()
    optimizer = torch.optim.SGD(freezer.get_trainable_parameters(), lr=0.1)
    unfrozen = freezer.unfreeze()
    assert {index: len(group["params"]) for index, group in unfrozen.items()} == {0: 3, 1: 4}
    for group in unfrozen.values():
        optimizer.add_param_group(group)
    assert trainable(model) == {name for name, _ in model.named_parameters()}
    assert freezer.unfreeze() == {}


def test_the_last_groups_may_be_unfrozen_alone(model):
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze(0, -1)
    freezer.unfreeze(-1, -2)
    assert trainable(model) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_lesson_13_frozen_modules_are_set_as_eval_and_no_others(model):
    freezer = ModelFreezer(model)
    freezer.freeze(set_modules_as_eval=True)
    assert [model.embed.training, model.attention.training, model.attention.out_proj.training] == [False] * 3
    assert [model.training, model.norm.training, model.head.training] == [True] * 3
    assert trainable(model) == {"norm.weight", "norm.bias", "head.weight", "head.bias"}


def test_lesson_13_without_it_modes_stay(model):
    ModelFreezer(model).freeze()
    assert all(module.training for module in model.modules())
    model.eval()
    freezer = ModelFreezer(model)
    freezer.unfreeze(set_modules_as_training=False)
    assert not any(module.training for module in model.modules())
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_unfrozen_modules_are_set_as_training(model):
    freezer = ModelFreezer(model)
    freezer.freeze(set_modules_as_eval=True)
    freezer.unfreeze(1, 1)
    freezer.restore_eval_modes()
    assert [model.embed.training, model.attention.training, model.attention.out_proj.training] == [
        False,
        True,
        True,
    ]


def test_eval_modes_are_kept_through_a_run_by_a_callback(model):
    freezer = ModelFreezer(model, freeze_batch_norms=True)
    freezer.freeze(set_modules_as_eval=True)
    before = values(model)

    class KeepFrozen(TrainerCallback):
        def on_train_epoch_start(self, trainer):
            freezer.restore_eval_modes()

    train(model, callbacks=[KeepFrozen])
    assert torch.equal(before["norm.running_mean"], model.norm.running_mean)
    assert model.norm.num_batches_tracked == 0


def test_parameters_are_frozen_by_name(model):
    freezer = ModelFreezer(model)
    freezer.freeze_parameters(["cls_token", "*bias"], set_modules_as_eval=True)
    assert trainable(model) == {
        "embed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
        "norm.weight",
        "head.weight",
    }
    assert not model.norm.training
    assert model.training
    unfrozen = freezer.unfreeze_parameters("*embed*")
    assert [id(parameter) for parameter in unfrozen[0]["params"]] == [id(model.embed.bias)]
    assert model.embed.training
    assert not model.norm.training


def test_adapters_are_unfrozen_without_touching_the_base():
    """As PEFT leaves a model: the base frozen, the adapters trainable."""
    model = nn.ModuleDict(
        {
            "base": nn.Linear(4, 4),
            "lora_A": nn.Linear(4, 1, bias=False),
            "lora_B": nn.Linear(1, 4, bias=False),
        }
    )
    model["base"].requires_grad_(False)
    freezer = ModelFreezer(model)
    freezer.freeze_parameters("*lora_*")
    freezer.unfreeze_parameters("*lora_*")
    assert trainable(model) == {"lora_A.weight", "lora_B.weight"}


def test_a_parameter_that_two_groups_share_is_returned_once():
    model = nn.Sequential(nn.Embedding(5, 3), nn.Linear(3, 5, bias=False))
    model[1].weight = model[0].weight
    freezer = ModelFreezer(model)
    freezer.freeze(0, -1)
    assert list(freezer.unfreeze()) == [0]


def test_a_model_without_modules_is_one_group():
    model = nn.Linear(2, 2)
    freezer = ModelFreezer(model)
    freezer.freeze(0, 0, set_modules_as_eval=True)
    assert [group.is_frozen for group in freezer.get_layer_groups()] == [True]
    assert not model.training


def test_quantised_weights_are_left_frozen():
    model = nn.Sequential(nn.Linear(2, 2))
    model[0].weight = nn.Parameter(torch.zeros(2, 2, dtype=torch.uint8), requires_grad=False)
    ModelFreezer(model).unfreeze()
    assert trainable(model) == {"0.bias"}


@pytest.mark.parametrize(("from_index", "to_index"), [(0, 4), (-5, 0), ("embed", 0), (0, None)])
def test_a_group_that_does_not_exist_is_reported(model, from_index, to_index):
    with pytest.raises(
        ConfigurationError,
        match=r"_index is .* from -4 to 3.*TinyTransformer.*\['embed', .*freeze_parameters",
    ):
        ModelFreezer(model).freeze(from_index, to_index)
    assert len(trainable(model)) == len(list(model.parameters()))


def test_a_model_that_is_none_is_reported():
    with pytest.raises(ConfigurationError, match=r"model is 'resnet18'.*torch\.nn\.Module.*Pass the model"):
        ModelFreezer("resnet18")


def test_a_name_that_matches_nothing_is_reported(model):
    with pytest.raises(
        ConfigurationError, match=r"'head\.weigth'.*TinyTransformer.*Did you mean 'head\.weight'\?"
    ):
        ModelFreezer(model).freeze_parameters(["*.bias", "head.weigth"])
    assert "head.bias" in trainable(model)


def test_a_compiled_model_has_the_groups_and_names_of_the_model_itself(model):
    compiled = ModelFreezer(torch.compile(model, backend="eager"))
    assert [group.module for group in compiled.get_layer_groups()] == list(model.children())
    compiled.freeze_parameters("cls_token")
    assert "cls_token" not in trainable(model)


@pytest.mark.parametrize("freeze_batch_norms", [True, False])
@pytest.mark.parametrize("part", [0, 2, -2, "*.bias"])
def test_the_parameters_of_a_part_are_those_that_freezing_it_freezes(model, part, freeze_batch_norms):
    freezer = ModelFreezer(model, freeze_batch_norms)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {names[id(parameter)] for parameter in freezer.get_parameters(part)}
    before = trainable(model)
    freezer.freeze_parameters(part) if isinstance(part, str) else freezer.freeze(part, part)
    assert before - trainable(model) == found
