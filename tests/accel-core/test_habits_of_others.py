"""What users of other libraries type first gets one sentence with accel's word, and nothing of theirs is ignored."""

import abc
import copy
import functools
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from accel_core import (
    AccelWarning,
    ConfigurationError,
    LossTracker,
    Trainer,
    TrainerCallback,
    TrainerPlaceholderValues,
)
from accel_core.callbacks.callback_list import EVENTS
from accel_core.foreign_names.tables import (
    FOREIGN_ARGUMENTS,
    FOREIGN_ATTRIBUTES,
    FOREIGN_CALLBACKS,
    FOREIGN_EVENTS,
    FOREIGN_OPTIMIZERS,
)

INPUTS = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
TARGETS = (INPUTS.sum(1) > 0).long()
DATA = TensorDataset(INPUTS, TARGETS)
PUBLIC = (Path(__file__).parents[1] / "public_api.txt").read_text()
OF_LIBRARIES = [
    "Accelerator",
    "AdamW",
    "OneCycleLR",
    "TensorDataset",
    "TrainingArguments",
    "random_split",
    "use_deterministic_algorithms",
    "mixed_precision",
    "num_workers",
    "is_local_main_process",
    "process_index",
    "local_process_index",
    "num_processes",
    "push_to_hub",
    "compile",
    "update_metric",
    "get_latest_metric",
    "on_",
    "request_stop",
    "create_scheduler_fn",
    "max_lr",
    "total_steps",
    "num_epochs",
    "num_update_steps",
]


def words_of(sentence: str) -> set[str]:
    """The names in a sentence: what has an underscore, or a capital letter inside."""
    return {
        word
        for word in re.findall(r"[A-Za-z_]+", sentence)
        if re.search(r"[a-z]_[a-z]|[a-z][A-Z]|[A-Z]{2}", word)
    }


@pytest.fixture
def parts() -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    model = nn.Linear(4, 2)
    return model, nn.CrossEntropyLoss(), torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.fixture
def trainer(parts) -> Trainer:
    return Trainer(*parts, callbacks=[])


@pytest.mark.parametrize(
    "sentence",
    sorted({*FOREIGN_ATTRIBUTES.values(), *FOREIGN_ARGUMENTS.values(), *FOREIGN_CALLBACKS.values()}),
    ids=lambda sentence: sentence[:40],
)
def test_each_sentence_names_what_there_is(sentence):
    unknown = {
        word
        for word in words_of(sentence)
        if not re.search(rf"\b{word}\b", PUBLIC) and word not in OF_LIBRARIES and word not in EVENTS
    }
    # The packages themselves, and attributes that a trainer has once it is made.
    unknown -= {"accel_callbacks", "accel_integrations", "accel_core"}
    trainer = Trainer(nn.Linear(1, 1), None, None, callbacks=[])
    assert unknown <= {*dir(trainer), *dir(TrainerPlaceholderValues)}


@pytest.mark.parametrize("name", FOREIGN_ATTRIBUTES)
def test_an_attribute_of_another_library_is_answered(trainer, name):
    with pytest.raises(AttributeError) as caught:
        getattr(trainer, name)
    assert str(caught.value) == f"'Trainer' object has no attribute {name!r}. {FOREIGN_ATTRIBUTES[name]}"
    assert not hasattr(trainer, name) and not hasattr(Trainer, name) and name not in dir(trainer)


def test_a_name_of_the_users_own_hides_the_answer(parts):
    class Own(Trainer):
        def fit(self):
            return "mine"

    trainer = Own(*parts, callbacks=[])
    trainer.state = "also mine"
    assert (trainer.fit(), trainer.state) == ("mine", "also mine")
    assert {"fit", "state"} <= set(dir(trainer))
    twin = pickle.loads(pickle.dumps(copy.deepcopy(Trainer(*parts, callbacks=[]))))
    assert not hasattr(twin, "fit")


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("device", "mine", "property"),
        ("stop_reason", lambda trainer: "mine", "property"),
        ("gather", None, "method"),
        ("run_update", 3, "method"),
    ],
)
def test_a_plain_value_in_place_of_a_property_or_a_method_is_refused(parts, name, value, kind):
    with pytest.raises(ConfigurationError, match=rf"^Own\.{name} is .* is a {kind} of Trainer.*another name"):
        type("Own", (Trainer,), {name: value})(*parts, callbacks=[])


def test_properties_methods_and_plain_attributes_of_a_subclass_are_its_own(parts):
    class Own(Trainer, type("Later", (), {"device": "hidden by Trainer"})):
        prediction_padding = 0.0
        stop_reason = property(lambda self: "mine")
        gather = staticmethod(torch.clone)
        is_main_process = functools.cached_property(lambda self: True)

    assert Own(*parts, callbacks=[]).stop_reason == "mine"


class Mixin:
    """What stands after `Trainer` among the bases of a class."""

    last_state = None

    def log(self, text):
        return f"logged {text}"

    @property
    def state(self):
        return self.last_state

    @state.setter
    def state(self, value):
        self.last_state = value


def test_a_base_after_the_trainer_keeps_its_names(parts):
    class Own(Trainer, Mixin):
        pass

    class Extends(Trainer, Mixin):
        def log(self, text):
            return f"{super().log(text)} twice"

    trainer = Own(*parts, callbacks=[])
    trainer.state = 3
    assert (trainer.log("a"), trainer.last_state, trainer.state) == ("logged a", 3, 3)
    assert {"log", "state"} <= set(dir(trainer)) and "fit" not in dir(trainer)
    assert Extends(*parts, callbacks=[]).log("b") == "logged b twice"
    with pytest.raises(AttributeError, match="'Own' object has no attribute 'fit'"):
        _ = trainer.fit


def test_an_abstract_method_after_the_trainer_stays_abstract(parts):
    class Fits(abc.ABC):
        @abc.abstractmethod
        def fit(self):
            pass

    class Own(Trainer, Fits):
        pass

    with pytest.raises(TypeError, match="abstract"):
        Own(*parts, callbacks=[])


def test_a_step_that_another_method_calls_is_a_helper(parts):
    class Calls(Trainer):
        def compute_loss(self, batch):
            return nn.functional.cross_entropy(self.model(batch[0]), batch[1])

        def calculate_eval_batch_loss(self, batch):
            return {"loss": self.compute_loss(batch), "batch_size": len(batch[0])}

    class CallsInside(Calls):
        training_step = None

        def train_step(self, batch):
            pass

        @property
        def steps(self):
            return lambda: [self.train_step(number) for number in range(3)]

    for own in (Calls, CallsInside):
        assert own(*parts, callbacks=[]).evaluate(DATA)

    class OfLightning(Trainer):
        def training_step(self, batch):
            return self.validation_step(batch)

        def validation_step(self, batch):
            return self.training_step(batch)

    with pytest.raises(ConfigurationError, match=r"OfLightning\.training_step is a method that another"):
        OfLightning(*parts, callbacks=[])


@pytest.mark.parametrize("name", FOREIGN_ARGUMENTS)
def test_an_argument_of_another_library_is_answered(parts, trainer, name):
    sentence = re.escape(FOREIGN_ARGUMENTS[name])
    with pytest.raises(ConfigurationError, match=rf"^Trainer was given {name}=3, but .*\. {sentence}$"):
        Trainer(*parts, **{name: 3})
    with pytest.raises(ConfigurationError, match=rf"^Trainer\.train was given {name}=3, but .*{sentence}$"):
        trainer.train(DATA, 1, **{name: 3})
    assert trainer.run_progress.updates_completed == 0


def test_an_argument_of_another_method_is_sent_there_and_a_misspelt_one_is_mended(parts, trainer):
    with pytest.raises(ConfigurationError, match=r"given num_epochs=3, .*Pass it to train\."):
        Trainer(*parts, num_epochs=3)
    with pytest.raises(ConfigurationError, match=r"given seed=3, .*Pass it to Trainer\."):
        trainer.train(DATA, seed=3)
    with pytest.raises(ConfigurationError, match=r"Did you mean 'num_epochs'\?"):
        trainer.train(DATA, num_epoch=3)
    with pytest.raises(
        ConfigurationError, match=r"given zzz=3, .*It has \['dataset', 'per_device_batch_size'"
    ):
        trainer.evaluate(DATA, zzz=3)
    with pytest.raises(ConfigurationError, match=r"Trainer\.predict was given bs=3"):
        trainer.predict(DATA, bs=3)
    with pytest.raises(ConfigurationError, match=r"Trainer\.iterate_predictions was given bs=3"):
        trainer.iterate_predictions(DATA, bs=3)


def test_missing_and_doubled_arguments_are_named_in_their_order(parts, trainer):
    with pytest.raises(
        ConfigurationError, match=r"missing a required argument: 'loss_func'.*\['model', 'loss_"
    ):
        Trainer(parts[0])
    with pytest.raises(ConfigurationError, match=r"multiple values for argument 'loss_func'"):
        Trainer(DATA, parts[0], loss_func=parts[1])
    with pytest.raises(
        ConfigurationError, match=r"Trainer\.train was called wrongly: missing .*'train_dataset'"
    ):
        trainer.train()


@pytest.mark.parametrize("name", FOREIGN_OPTIMIZERS)
def test_a_method_that_makes_an_optimizer_is_not_ignored(parts, name):
    model, loss_func, optimizer = parts
    own = type("Own", (Trainer,), {name: lambda self: optimizer})
    with pytest.raises(ConfigurationError, match=rf"Own\.{name} .*Pass the optimizer to Trainer"):
        own(model, loss_func, None)
    with pytest.warns(AccelWarning, match=rf"Own\.{name} .*another name if you call it yourself") as caught:
        own(model, loss_func, optimizer)
    assert caught[0].filename == __file__


@pytest.mark.parametrize("name", ["on_train_epoch_end", *FOREIGN_EVENTS])
def test_an_event_on_a_trainer_is_not_ignored(parts, name):
    own = type("Own", (Trainer,), {name: lambda self: None})
    with pytest.raises(
        ConfigurationError, match=rf"Own\.{name} is an event.*Move it to a TrainerCallback as "
    ):
        own(*parts)


def test_a_trainer_that_is_a_callback_too_may_have_events(parts):
    class Both(Trainer, TrainerCallback):
        def on_train_epoch_end(self, trainer):
            pass

    assert Both(*parts, callbacks=[])


@pytest.mark.parametrize("name", FOREIGN_CALLBACKS)
def test_a_callback_of_another_library_is_answered(parts, name):
    with pytest.raises(ConfigurationError) as caught:
        Trainer(*parts, callbacks=[type(name, (), {})()])
    assert str(caught.value).endswith(f"which is no callback. Use {FOREIGN_CALLBACKS[name]}.")


@pytest.mark.parametrize(
    "columns",
    [
        (INPUTS, TARGETS),
        [INPUTS, TARGETS],
        (INPUTS.numpy(), TARGETS.numpy()),
        (INPUTS, TARGETS, torch.ones(16)),
        (INPUTS[:, :1], INPUTS[:, :1].double()),
    ],
)
def test_inputs_and_targets_side_by_side_are_not_taken_for_samples(trainer, columns):
    words = rf"is a {type(columns).__name__} of {len(columns)} arrays of the length 16.*TensorDataset\("
    for call in (lambda: trainer.train(columns, 1), lambda: trainer.evaluate(columns)):
        with pytest.raises(ConfigurationError, match=words):
            call()


def test_samples_of_one_length_in_a_list_are_data(parts):
    """A collate function may pad what the samples differ in."""
    samples = [torch.ones(4, width) for width in (1, 2, 3)]
    trainer = Trainer(nn.Identity(), None, None, callbacks=[])
    outputs = trainer.predict(
        samples,
        collate_fn=lambda parts: torch.stack(
            [nn.functional.pad(part, (0, 3 - part.shape[1])) for part in parts]
        ),
    )
    assert outputs.shape == (3, 4, 3)
    assert trainer.predict((np.ones(4, "float32"), np.zeros(4, "float32"))).shape == (2, 4)


def test_a_model_with_a_training_step_is_not_ignored(trainer):
    class LitModel(nn.Linear):
        def training_step(self, batch, index):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

    model = LitModel(4, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, nn.CrossEntropyLoss(), optimizer, callbacks=[])
    with pytest.warns(
        AccelWarning, match=r"LitModel with a training_step.*calculate_train_batch_loss"
    ) as caught:
        trainer.train(DATA, 1)
    assert caught[0].filename == __file__

    class Calls(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {"loss": self.model.training_step(batch, 0), "batch_size": len(batch[0])}

    Calls(model, None, optimizer, callbacks=[]).train(DATA, 1)  # No warning, which would be an error here.


def test_old_attributes_of_other_classes_are_answered(trainer):
    tracker = LossTracker(torch.device("cpu"))
    for name, here in {"total_loss": "total", "running_count": "count", "loss_value": "average"}.items():
        with pytest.raises(AttributeError, match=rf"no attribute '{name}'\. Use {here}"):
            getattr(tracker, name)
    history = trainer.train(DATA, 1)
    with pytest.raises(AttributeError, match="Use plot_history"):
        history.plot()
    with pytest.raises(AttributeError, match="Use get_metric_values"):
        history.history["loss"]
    with pytest.raises(AttributeError, match="Use num_update_steps_per_epoch"):
        _ = trainer.run_config.num_local_update_steps_per_epoch


def test_outputs_of_the_model_are_returned_for_callbacks_only(parts):
    class WithoutOutputs(Trainer):
        def calculate_train_batch_loss(self, batch):
            return {"loss": self.loss_func(self.model(batch[0]), batch[1]), "batch_size": len(batch[0])}

        def calculate_eval_batch_loss(self, batch):
            return self.calculate_train_batch_loss(batch)

    history = WithoutOutputs(*parts, callbacks=[]).train(DATA, 1, eval_dataset=DATA)
    assert history.get_metric_names() == {"train_loss_epoch", "eval_loss_epoch"}


@pytest.mark.parametrize(("limit", "expected"), [({"num_epochs": 3}, 6), ({"max_num_train_steps": 5}, 5)])
def test_the_run_config_has_a_number_of_updates(trainer, limit, expected):
    trainer.train(DATA, **limit)
    assert trainer.run_config.max_num_train_steps == expected
