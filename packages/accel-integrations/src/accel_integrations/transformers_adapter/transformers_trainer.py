"""TransformersTrainer: train models of transformers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from accel_core import DEFAULT_CALLBACKS, ConfigurationError, RunHistory, Trainer, TrainerCallback
from accel_core.extending import (
    UnclearBatchSize,
    answer_foreign_names,
    call_loss,
    check_finite,
    check_path,
    is_frozen,
    is_ready_loader,
    run_on_main,
    samples_of,
    weights_to_export,
)

from . import adapter_state
from .base_name import write_base_name
from .collating import create_collate_fn
from .import_transformers import import_transformers
from .model_facts import IGNORED_LABEL, input_names, is_encoder_decoder, label_shift
from .pretrained_folder import write_pretrained_folder


@answer_foreign_names
class TransformersTrainer(Trainer):
    """Trains models whose batches are mappings from the names of their inputs to tensors.

    The loss is the model's own, which it returns for a batch with `labels`. For models that predict tokens
    the labels are counted. Accumulated updates then equal one large batch, however long the sequences are
    and however they are spread over steps and processes. Entries that the model does not take, such as the
    number of a sample, stay in the batch for callbacks.

    With adapters of PEFT, exports and training states hold the adapters and whatever else is trained, but
    not the frozen base. Engines that shard the model save it whole.
    """

    prediction_padding = IGNORED_LABEL
    step_counts = "the labels other than -100 if the model predicts tokens, else over samples"
    """What `describe` says that the loss of a batch is the mean over."""

    def __init__(
        self,
        model: torch.nn.Module,
        loss_func: Callable[[Any, Any], torch.Tensor] | None = None,
        optimizer: Any = None,
        callbacks: Iterable[TrainerCallback | type[TrainerCallback]] = DEFAULT_CALLBACKS,
        run_history: RunHistory | None = None,
        *,
        tokenizer: Any = None,
        accelerator: Accelerator | None = None,
        seed: int | None = None,
    ) -> None:
        """Hold the parts; nothing is placed, wrapped or seeded before the first run.

        Args:
            loss_func: function from the model's outputs and `labels` to the mean loss; None takes the loss
                that the model returns. For models that predict tokens it is the mean over the labels that
                count (see `count_labels`).
            tokenizer: pads samples of different lengths if no `collate_fn` is given, and is saved by
                `save_pretrained`. A processor of another kind, such as one of images, is only saved.

        Raises:
            ConfigurationError: transformers is not installed, or an argument cannot be used.
        """
        import_transformers()
        super().__init__(
            model, loss_func, optimizer, callbacks, run_history, accelerator=accelerator, seed=seed
        )
        self.tokenizer = tokenizer
        self._look_at_model()

    # ------------------------------------------------------------------ what you may create

    def create_collate_fn(self) -> Callable[[list[Any]], Any]:
        """Return the function that makes batches if no `collate_fn` is given: it pads with a tokenizer.

        Raises:
            ConfigurationError: the tokenizer has no padding token.
        """
        return create_collate_fn(self.model, self.tokenizer)

    def create_train_dataloader(self, batch_size: int, train_dl_kwargs: dict[str, Any] | None = None) -> Any:
        """Return a loader of `self.train_dataset` as for a single process."""
        return super().create_train_dataloader(
            batch_size, self._with_collate_fn(self.train_dataset, train_dl_kwargs)
        )

    def create_eval_dataloader(self, batch_size: int, eval_dl_kwargs: dict[str, Any] | None = None) -> Any:
        """Return a loader of `self.eval_dataset` as for a single process."""
        return super().create_eval_dataloader(
            batch_size, self._with_collate_fn(self.eval_dataset, eval_dl_kwargs)
        )

    def prepare(self) -> None:
        """Place and wrap model and optimizer, after a look at what the model takes."""
        # The user may have replaced the model since the constructor, and DDP hides its `forward`.
        self._look_at_model()
        super().prepare()

    def _look_at_model(self) -> None:
        self._input_names = input_names(self.model)
        self._label_shift = label_shift(self.model)
        self._makes_decoder_inputs = is_encoder_decoder(self.model)
        # Weak, since the model as an attribute of the trainer under a second name is refused.
        self._own_model = weakref.ref(self.model)

    def _with_collate_fn(self, dataset: Any, kwargs: dict[str, Any] | None) -> dict[str, Any] | None:
        if self.collate_fn is not None or is_ready_loader(dataset, kwargs) or "collate_fn" in (kwargs or {}):
            return kwargs
        return {**(kwargs or {}), "collate_fn": self.create_collate_fn()}

    # ------------------------------------------------------------------ what you may override

    def calculate_train_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Return `loss`, `model_outputs` as the model returned them, and `batch_size`.

        For losses over tokens the dictionary also has `num_items_in_batch`.

        Raises:
            ConfigurationError: `batch` is no mapping, or the model returned no loss for it.
        """
        # With a loss_func the model gets no labels, so that it computes no loss in vain.
        outputs = self.model(**self._inputs_of(batch, with_labels=self.loss_func is None))
        if self.loss_func is None:
            loss = _loss_of(outputs, batch)
        elif "labels" in batch:
            loss = call_loss(self.loss_func, outputs, batch["labels"])
        else:
            raise ConfigurationError(
                f"loss_func needs 'labels', but the batch has only {list(batch)}. Add them to the samples."
            )
        batch_size = samples_of(self, batch.get("labels"), batch)
        output = {"loss": loss, "model_outputs": outputs, "batch_size": batch_size}
        num_labels = self.count_labels(batch)
        if num_labels is not None:
            if isinstance(batch_size, UnclearBatchSize):
                # Several samples may be packed into one row: the labels are counted, whatever the rows are.
                output["batch_size"] = batch_size.given
            # The mean over no label is nan, which would stay nan whatever it is multiplied by.
            output["loss"] = torch.where(num_labels > 0, loss, 0.0)
            output["num_items_in_batch"] = num_labels
        return output

    def calculate_eval_batch_loss(self, batch: Any) -> dict[str, Any]:
        """Return the same as `calculate_train_batch_loss`, without gradients.

        By default it is what `TransformersTrainer` computes, also if your class trains otherwise.
        """
        return TransformersTrainer.calculate_train_batch_loss(self, batch)

    def calculate_predictions(self, batch: Any) -> Any:
        """Return the model's outputs for a batch, without `loss` and caches.

        If their length varies by batch, `predict` pads them with -100. For generated text, override this with
        `self.get_model().generate(...)`.
        """
        outputs = self.model(**self._inputs_of(batch, with_labels=False))
        if not isinstance(outputs, Mapping):
            return outputs
        # Of the same class, so that attributes such as `logits` are still there.
        kind: Any = type(outputs)
        return kind(**{name: value for name, value in outputs.items() if _has_rows(value)})

    def count_labels(self, batch: Any) -> torch.Tensor | None:
        """Return the number of labels that the loss of `batch` is the mean of, as a scalar tensor.

        None means that it is the mean over samples. By default these are the `labels` other than -100 for
        models that predict tokens; for causal ones without the first of each sequence. Engines that step in
        backward need the number earlier: let `count_items` return `int(self.count_labels(batch))`.
        """
        labels = batch.get("labels")
        if self._label_shift is None or labels is None:
            return None
        # A tensor on its device, which nothing waits for.
        return (labels[..., self._label_shift :] != IGNORED_LABEL).sum()

    def _inputs_of(self, batch: Any, with_labels: bool) -> dict[str, Any]:
        """Return the entries of `batch` that the model takes, with or without labels."""
        if not isinstance(batch, Mapping):
            raise ConfigurationError(
                f"The batch is a {type(batch).__name__}, but TransformersTrainer needs a mapping from the "
                "names of the model's inputs to tensors. Pass a collate_fn that makes one, or override "
                "calculate_train_batch_loss."
            )
        names = self._input_names
        # An encoder-decoder makes the decoder's inputs of the labels, so it needs them for predictions too.
        keeps_labels = with_labels or (self._makes_decoder_inputs and "decoder_input_ids" not in batch)
        inputs = {name: value for name, value in batch.items() if names is None or name in names}
        if not keeps_labels:
            inputs.pop("labels", None)
        return inputs

    # ------------------------------------------------------------------ saving

    def create_model_state(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return the state of the model; of one with adapters, what is trained."""
        if adapter_state.has_adapters(model):
            return adapter_state.create_adapter_state(model, self._trained_like(model))
        return super().create_model_state(model)

    def load_model_state(self, model: torch.nn.Module, state: dict[str, Any]) -> None:
        """Load what `create_model_state` returned; a frozen base keeps its weights."""
        if adapter_state.has_adapters(model):
            adapter_state.load_adapter_state(model, self._trained_like(model), state)
        else:
            super().load_model_state(model, state)

    def _trained_like(self, model: torch.nn.Module) -> torch.nn.Module:
        """Return the model whose parameters with gradients are those that are trained."""
        # An average of the weights has no gradients, so the trainer's own model has to be asked.
        own_model = self._own_model()
        return own_model if is_frozen(model) and own_model is not None else model

    def save_pretrained(self, folder: str | Path, base_name: str | None = None) -> None:
        """Save model and tokenizer for `from_pretrained`.

        Of a model with adapters it saves the adapters, which PEFT loads onto the base. The folder is
        complete or absent; a model that was saved there before is replaced. Every process takes part; the
        main one writes. To merge adapters into their base, call `trainer.get_model().merge_and_unload()`.

        Args:
            base_name: the name by which another machine loads the base of adapters, such as a name of the
                hub. None keeps the name that it was loaded by, and warns if that is a path of this machine.

        Raises:
            ConfigurationError: the model has no `save_pretrained`, something else is in the folder, or
                `base_name` is given for a model without adapters.
            CheckpointError: it could not be written, or parameters are not finite; what was there is
                untouched.
        """
        path_of_folder = check_path("folder", folder, "Pass the name of a folder.")
        model: Any = self.get_model(keep_torch_compile=False)
        if not hasattr(model, "save_pretrained"):
            raise ConfigurationError(
                f"{type(model).__name__} has no save_pretrained. Use save_checkpoint instead."
            )
        if base_name is not None and not (base_name and adapter_state.has_adapters(model)):
            problem = f"{type(model).__name__} has no adapters of PEFT" if base_name else "it names nothing"
            raise ConfigurationError(
                f"base_name is {base_name!r}, but {problem}. Leave it out, or give the base of your adapters "
                "a name such as 'organisation/model'."
            )
        check_finite(self.model)

        def write(path: Path) -> None:
            model.save_pretrained(path, state_dict=state)
            if self.tokenizer is not None:
                self.tokenizer.save_pretrained(path)
            write_base_name(path, base_name)

        with weights_to_export(self):
            # Of all processes, so before the main one writes alone. PEFT picks the adapters out of the whole
            # state.
            state = self.engine.full_weights(self.model, torch.nn.Module.state_dict)
            run_on_main(lambda: write_pretrained_folder(path_of_folder, write), self.is_main_process)


def _loss_of(outputs: Any, batch: Mapping[str, Any]) -> torch.Tensor:
    """Return the loss that a model returned, as an entry or first in a tuple."""
    loss = (
        outputs.get("loss")
        if isinstance(outputs, Mapping)
        else outputs[0]
        if isinstance(outputs, tuple)
        else None
    )
    if loss is None:
        way_out = "Pass a loss_func" if "labels" in batch else "Add 'labels' to the samples"
        raise ConfigurationError(
            f"The model returned no loss for a batch with the entries {list(batch)}. {way_out}."
        )
    return loss  # type: ignore[no-any-return]


def _has_rows(value: Any) -> bool:
    """Whether `value` is a tensor with a row for each sample, or a tuple of such."""
    # A loss has no dimension, and caches are objects of classes of their own.
    if isinstance(value, torch.Tensor):
        return value.ndim > 0
    return isinstance(value, tuple) and all(map(_has_rows, value))
