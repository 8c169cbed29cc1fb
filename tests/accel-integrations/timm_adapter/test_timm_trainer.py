"""`TimmTrainer` mixes as timm does, resumes to the bit, and evaluates plainly."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from sklearn.datasets import load_digits
from timm.data import Mixup
from timm.loss import SoftTargetCrossEntropy
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from accel_core import ConfigurationError, Trainer, TrainerCallback
from accel_integrations.timm_adapter import TimmTrainer
from case_runner import compare, run_as_script
from tiny import SaveAt, weights_of

NUM_CLASSES = 10
SEED = 3


def digits(size: int) -> TensorDataset:
    data = load_digits()
    images = torch.tensor(data.images[:size] / 16, dtype=torch.float32).unsqueeze(1)
    return TensorDataset(images, torch.tensor(data.target[:size]))


def labelled(size: int, dtype: torch.dtype = torch.float32) -> TensorDataset:
    """Images with any number of labels."""
    images = digits(size).tensors[0]
    rows = torch.rand(size, NUM_CLASSES, generator=torch.Generator().manual_seed(0)) < 0.3
    return TensorDataset(images, rows.to(dtype))


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(1, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(6 * 36, NUM_CLASSES))


def create_trainer(
    callbacks: Any = (), seed: int | None = SEED, loss_func: Any = None, **kwargs: Any
) -> TimmTrainer:
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return TimmTrainer(model, loss_func, optimizer, callbacks, seed=seed, num_classes=NUM_CLASSES, **kwargs)


class Batches(TrainerCallback):
    """Keeps what was trained on, as it is after the step."""

    def __init__(self) -> None:
        self.batches: list[Any] = []

    def on_train_step_end(self, trainer: Trainer, batch: Any, **_: Any) -> None:
        self.batches.append(batch)


def train_by_hand(batches: list[Any], loss_of: Any) -> torch.Tensor:
    """The weights after a plain loop over `batches`."""
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for images, targets in batches:
        loss_of(model, images.clone(), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
    return nn.utils.parameters_to_vector(model.parameters()).detach()


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize("alphas", [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)], ids=["mixup", "cutmix", "both"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_training_equals_a_plain_loop_with_timms_mixup(
    alphas: tuple[float, float], mode: str, smoothing: float
) -> None:
    seen = Batches()
    trainer = create_trainer(
        [seen],
        mixup_alpha=alphas[0],
        cutmix_alpha=alphas[1],
        mixup_mode=mode,
        mixup_probability=0.9,
        mixup_switch_probability=0.4,
        label_smoothing=smoothing,
    )
    trainer.train(digits(48), 2, per_device_batch_size=8)

    mixup = Mixup(
        *alphas, prob=0.9, switch_prob=0.4, mode=mode, label_smoothing=smoothing, num_classes=NUM_CLASSES
    )

    def loss_of(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        mixed_images, mixed_targets = mixup(images, targets)
        return SoftTargetCrossEntropy()(model(mixed_images), mixed_targets)

    np.random.seed(SEED)
    assert torch.equal(weights_of(trainer), train_by_hand(seen.batches, loss_of))


def test_callbacks_see_the_batch_as_it_was_loaded() -> None:
    seen = Batches()
    data = digits(24)
    create_trainer([seen], mixup_alpha=1.0, cutmix_alpha=1.0).train(
        data, 1, train_dataloader_kwargs={"shuffle": False}
    )
    assert torch.equal(torch.cat([images for images, _ in seen.batches]), data.tensors[0])
    assert torch.equal(torch.cat([targets for _, targets in seen.batches]), data.tensors[1])


class TestMixing:
    def test_the_last_of_an_odd_number_is_not_mixed(self) -> None:
        images, targets = digits(7).tensors
        trainer = create_trainer(mixup_alpha=1.0, label_smoothing=0.1)
        np.random.seed(0)
        mixed_images, mixed_targets = trainer.mix(images, targets)
        np.random.seed(0)
        even = Mixup(1.0, num_classes=NUM_CLASSES, label_smoothing=0.1)(images[:6].clone(), targets[:6])
        assert torch.equal(mixed_images, torch.cat([even[0], images[6:]]))
        smoothed = torch.full((NUM_CLASSES,), 0.01)
        smoothed[targets[6]] = 0.91
        torch.testing.assert_close(mixed_targets, torch.cat([even[1], smoothed.unsqueeze(0)]))

    def test_a_batch_of_one_stays_as_it_is(self) -> None:
        images, targets = digits(1).tensors
        mixed_images, mixed_targets = create_trainer(mixup_alpha=1.0).mix(images, targets)
        assert torch.equal(mixed_images, images)
        assert torch.equal(mixed_targets, F.one_hot(targets, NUM_CLASSES).float())

    def test_rows_of_labels_are_mixed_as_the_images_are(self) -> None:
        images, targets = labelled(8).tensors
        trainer = create_trainer(mixup_alpha=1.0, binary_targets=True)
        np.random.seed(0)
        mixed_images, mixed_targets = trainer.mix(images, targets)
        share = ((mixed_images - images.flip(0)).norm() / (images - images.flip(0)).norm()).item()
        torch.testing.assert_close(mixed_targets, share * targets + (1 - share) * targets.flip(0))

    def test_it_can_end_before_the_run_does(self) -> None:
        trainer = create_trainer(mixup_alpha=1.0)
        trainer.mixup.mixup_enabled = False
        images, targets = digits(6).tensors
        assert torch.equal(trainer.mix(images, targets)[0], images)

    def test_epochs_with_a_last_batch_of_any_size_can_be_trained(self) -> None:
        for size in (9, 10, 11):
            create_trainer(mixup_alpha=1.0, cutmix_alpha=1.0).train(digits(size), 1, per_device_batch_size=4)


class TestLossOfTraining:
    @pytest.mark.parametrize(
        ("kwargs", "data", "loss_of"),
        [
            ({}, digits(24), lambda o, t: F.cross_entropy(o, t)),
            ({"label_smoothing": 0.1}, digits(24), lambda o, t: F.cross_entropy(o, t, label_smoothing=0.1)),
            (
                {"binary_targets": True},
                digits(24),
                lambda o, t: F.binary_cross_entropy_with_logits(o, F.one_hot(t, NUM_CLASSES).float()),
            ),
            (
                {"binary_targets": True, "label_smoothing": 0.2},
                digits(24),
                lambda o, t: F.binary_cross_entropy_with_logits(o, F.one_hot(t, NUM_CLASSES) * 0.8 + 0.02),
            ),
            (
                {"binary_targets": True},
                labelled(24, torch.long),
                lambda o, t: F.binary_cross_entropy_with_logits(o, t.float()),
            ),
            (
                {"binary_targets": True, "label_smoothing": 0.2},
                labelled(24),
                lambda o, t: F.binary_cross_entropy_with_logits(o, t * 0.8 + 0.1),
            ),
        ],
        ids=["plain", "smoothed", "binary", "smoothed binary", "rows", "smoothed rows"],
    )
    def test_equals_its_formula(self, kwargs: dict[str, Any], data: TensorDataset, loss_of: Any) -> None:
        seen = Batches()
        trainer = create_trainer([seen], **kwargs)
        trainer.train(data, 1)
        by_hand = train_by_hand(seen.batches, lambda model, images, targets: loss_of(model(images), targets))
        torch.testing.assert_close(weights_of(trainer), by_hand)

    @pytest.mark.parametrize("threshold", [None, 0.3])
    def test_mixed_targets_can_be_made_binary_by_a_threshold(self, threshold: float | None) -> None:
        seen = Batches()
        trainer = create_trainer(
            [seen], mixup_alpha=1.0, binary_targets=True, binary_target_threshold=threshold
        )
        trainer.train(digits(24), 1)
        mixup = Mixup(1.0, num_classes=NUM_CLASSES, label_smoothing=0.0)

        def loss_of(model: nn.Module, images: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            mixed_images, rows = mixup(images, targets)
            rows = rows if threshold is None else (rows > threshold).float()
            return F.binary_cross_entropy_with_logits(model(mixed_images), rows)

        np.random.seed(SEED)
        torch.testing.assert_close(weights_of(trainer), train_by_hand(seen.batches, loss_of))

    def test_your_own_gets_the_mixed_targets(self) -> None:
        shapes = []

        def loss_func(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
            shapes.append(tuple(targets.shape))
            return F.cross_entropy(outputs, targets)

        create_trainer(loss_func=loss_func, mixup_alpha=1.0).train(digits(8), 1)
        create_trainer(loss_func=loss_func).train(digits(8), 1)
        assert shapes == [(8, NUM_CLASSES), (8,)]


# ---------------------------------------------------------------------- evaluation


class TestEvaluation:
    @pytest.mark.parametrize(
        "kwargs",
        [
            {"mixup_alpha": 1.0, "cutmix_alpha": 1.0, "label_smoothing": 0.1},
            {"label_smoothing": 0.1},
            {"binary_targets": True, "mixup_alpha": 1.0},
            {"mixup_alpha": 1.0, "loss_func": SoftTargetCrossEntropy()},
        ],
        ids=["mixed", "smoothed", "binary", "own loss"],
    )
    def test_is_plain_cross_entropy_without_anything_random(self, kwargs: dict[str, Any]) -> None:
        trainer = create_trainer(seed=None, **kwargs)
        data = digits(21)
        loss = F.cross_entropy(trainer.model(data.tensors[0]), data.tensors[1]).item()
        np.random.seed(0)
        assert trainer.evaluate(data)["evaluation_loss"] == pytest.approx(loss, rel=1e-5)
        drawn_after = np.random.rand()
        np.random.seed(0)
        assert drawn_after == np.random.rand()

    def test_of_rows_is_binary_cross_entropy(self) -> None:
        trainer = create_trainer(mixup_alpha=1.0, binary_targets=True, label_smoothing=0.1)
        data = labelled(21, torch.long)
        loss = F.binary_cross_entropy_with_logits(
            trainer.model(data.tensors[0]), data.tensors[1].float()
        ).item()
        assert trainer.evaluate(data)["evaluation_loss"] == pytest.approx(loss, rel=1e-5)

    def test_takes_your_own_loss_if_nothing_is_mixed(self) -> None:
        trainer = create_trainer(loss_func=nn.MultiMarginLoss())
        data = digits(21)
        loss = F.multi_margin_loss(trainer.model(data.tensors[0]), data.tensors[1]).item()
        assert trainer.evaluate(data)["evaluation_loss"] == pytest.approx(loss, rel=1e-5)

    def test_takes_the_loss_that_it_is_given(self) -> None:
        trainer = create_trainer(mixup_alpha=1.0, eval_loss_func=nn.MultiMarginLoss())
        data = digits(21)
        loss = F.multi_margin_loss(trainer.model(data.tensors[0]), data.tensors[1]).item()
        assert trainer.evaluate(data)["evaluation_loss"] == pytest.approx(loss, rel=1e-5)


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize("seed", [SEED, None], ids=["seeded", "not seeded"])
@pytest.mark.parametrize("mode", ["batch", "elem"])
def test_a_run_resumed_in_mid_epoch_mixes_to_the_same_bits(
    mode: str, seed: int | None, tmp_path: Path
) -> None:
    torch.manual_seed(11)
    np.random.seed(12)
    arguments: dict[str, Any] = {
        "num_epochs": 2,
        "per_device_batch_size": 4,
        "gradient_accumulation_steps": 2,
    }
    kwargs: dict[str, Any] = {"mixup_alpha": 0.4, "cutmix_alpha": 1.0, "mixup_mode": mode, "seed": seed}
    whole = create_trainer([SaveAt(5, tmp_path / "state")], **kwargs)
    whole.train(digits(27), eval_dataset=digits(5), **arguments)
    np.random.seed(99)  # as a new process would
    resumed = create_trainer(**kwargs)
    resumed.train(digits(27), eval_dataset=digits(5), resume_from=tmp_path / "state", **arguments)
    assert torch.equal(weights_of(resumed), weights_of(whole))
    assert resumed.run_history.get_metric_values("train_loss_epoch") == whole.run_history.get_metric_values(
        "train_loss_epoch"
    )


# ---------------------------------------------------------------------- learning


@pytest.mark.slow
def test_digits_are_learned_from_mixed_images() -> None:
    data = digits(1797)
    train_data, eval_data = (
        TensorDataset(*(t[part] for t in data.tensors)) for part in (slice(1400), slice(1400, None))
    )
    trainer = create_trainer(mixup_alpha=0.2, cutmix_alpha=0.5, label_smoothing=0.05)
    trainer.train(train_data, 8, per_device_batch_size=16)
    predicted = trainer.predict(eval_data).argmax(1)
    assert (predicted == eval_data.tensors[1]).float().mean() > 0.8


# ---------------------------------------------------------------------- mistakes of callers


class TestMistakes:
    @pytest.mark.parametrize(
        ("kwargs", "words"),
        [
            ({"mixup_alpha": -0.1}, ("mixup_alpha is -0.1", "of at least 0")),
            ({"cutmix_alpha": "1"}, ("cutmix_alpha is '1'", "a number")),
            ({"mixup_probability": 1.5}, ("mixup_probability is 1.5", "from 0 to 1")),
            ({"label_smoothing": 1.0}, ("label_smoothing is 1.0", "Use 0.1")),
            ({"mixup_mode": "half"}, ("mixup_mode is 'half'", "['batch', 'pair', 'elem']")),
            ({"binary_target_threshold": 0.2}, ("binary_target_threshold is 0.2", "binary_targets=True")),
            (
                {"loss_func": F.cross_entropy, "label_smoothing": 0.1},
                ("label_smoothing is 0.1", "no effect", "loss_func out"),
            ),
            ({"eval_loss_func": "mse"}, ("eval_loss_func is 'mse'", "function")),
        ],
    )
    def test_are_reported_at_once(self, kwargs: dict[str, Any], words: tuple[str, ...]) -> None:
        with pytest.raises(ConfigurationError) as caught:
            create_trainer(**kwargs)
        assert all(word in str(caught.value) for word in words), caught.value

    def test_num_classes_has_to_be_given(self) -> None:
        with pytest.raises(TypeError, match="num_classes"):
            TimmTrainer(network())  # type: ignore[call-arg]

    @pytest.mark.parametrize("kwargs", [{}, {"mixup_alpha": 1.0}])
    def test_rows_need_binary_targets(self, kwargs: dict[str, Any]) -> None:
        with pytest.raises(
            ConfigurationError, match=r"targets .*\(8, 10\).*class indices.*\(batch,\).*binary_targets=True"
        ):
            create_trainer(**kwargs).train(labelled(8), 1)

    def test_a_model_for_another_number_of_classes_is_refused(self) -> None:
        model = timm.create_model("test_resnet", num_classes=7)
        with pytest.raises(ConfigurationError, match=r"num_classes is 10.*model.* 7.*same number"):
            TimmTrainer(model, num_classes=10)

    def test_rows_need_a_column_for_each_class(self) -> None:
        images, rows = labelled(8).tensors
        with pytest.raises(
            ConfigurationError, match=r"targets .*\(8, 9\).*\(batch,\) or \(batch, 10\).*num_classes"
        ):
            create_trainer(binary_targets=True).train(TensorDataset(images, rows[:, :9]), 1)

    def test_without_an_optimizer_it_evaluates(self) -> None:
        trainer = TimmTrainer(network(), num_classes=NUM_CLASSES, callbacks=())
        assert set(trainer.evaluate(digits(8))) == {"evaluation_loss"}


# ---------------------------------------------------------------------- several processes


class Numbered(Dataset[Any]):
    """Images that all look the same: what differs between processes is how they are mixed."""

    def __len__(self) -> int:
        return 19

    def __getitem__(self, index: int) -> Any:
        return digits(2).tensors[0][index % 2], index % 2


def train_on_processes(batch_size: int) -> Any:
    class Losses(TrainerCallback):
        def __init__(self) -> None:
            self.losses: list[float] = []

        def on_train_step_end(self, trainer: Trainer, batch_output: Any, **_: Any) -> None:
            self.losses.append(batch_output["loss"].item())

    losses = Losses()
    trainer = create_trainer([losses], mixup_alpha=1.0, cutmix_alpha=1.0)
    trainer.train(
        Numbered(), 2, eval_dataset=digits(7), per_device_batch_size=batch_size, gradient_accumulation_steps=2
    )
    return {
        "weights": weights_of(trainer),
        "losses": losses.losses,
        "eval": trainer.evaluate(digits(7))["evaluation_loss"],
    }


PROCESS_CASES = {"mixing": train_on_processes}


@pytest.mark.slow
def test_processes_mix_differently_and_agree_on_the_weights(tmp_path: Path) -> None:
    first, second = compare(PROCESS_CASES, __file__, 2, tmp_path).of("mixing")
    assert torch.equal(first["weights"], second["weights"])
    assert first["eval"] == second["eval"]
    assert first["losses"] != second["losses"]


if __name__ == "__main__":
    run_as_script(PROCESS_CASES)
