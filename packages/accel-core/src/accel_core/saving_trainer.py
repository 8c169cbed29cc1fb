"""What a trainer saves and loads: exports of the model, and all that resuming needs."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from .base_trainer import BaseTrainer
from .checks.arguments import check_can_save
from .data.loader import ShardedDataLoader
from .engines.sharded import check_engine_files, is_sharded, load_full_state
from .engines.weights import (
    check_finite,
    full_model_state,
    load_into,
    load_state,
    loading,
    main_files,
    share_buffers,
)
from .processes.collectives import all_gather_object, run_on_main
from .run.run_progress import RunProgress
from .state import files
from .state.checkpoint import STATE_FILE, RunState, TrainerState, library_versions
from .state.export import read_export, write_export
from .state.random import capture_random_state, restore_random_state
from .state.resume import compare, limits_of_exactness, read_resume_point
from .state.save import save_folder

if TYPE_CHECKING:
    from .trainer import Trainer


class SavingTrainer(BaseTrainer):
    """The part of a trainer that writes files and reads them.

    Every process takes part in each of its methods.
    """

    # ------------------------------------------------------------------ exports

    def save_checkpoint(
        self,
        save_path: str | Path,
        checkpoint_kwargs: dict[str, Any] | None = None,
        save_optimizer: bool = True,
        save_scheduler: bool = True,
        *,
        model: torch.nn.Module | None = None,
    ) -> None:
        """Export the model to one file, atomically: `.safetensors` has weights only, any other ending all that is asked for.

        The keys are `model_state_dict`, `optimizer_state_dict`, `scheduler_state_dict` and those of
        `checkpoint_kwargs`. Every process takes part; the main one writes. Raises `CheckpointError` if
        parameters are not finite: nothing has changed then. The optimizer of an engine that shards (FSDP,
        DeepSpeed) is left out: it is in the training state.

        Args:
            model: the module to export in place of the trainer's own, such as one with averaged weights.
        """
        model = self.model if model is None else model
        check_finite(model)
        content = {
            "model_state_dict": full_model_state(self.accelerator, model, self.create_model_state),
            **(checkpoint_kwargs or {}),
        }
        if save_optimizer and self.optimizer is not None and not is_sharded(self.accelerator):
            content["optimizer_state_dict"] = self.optimizer.state_dict()
        if save_scheduler and self.scheduler is not None:
            content["scheduler_state_dict"] = self.scheduler.state_dict()
        run_on_main(lambda: write_export(Path(save_path), content), self.is_main_process)

    def load_checkpoint(
        self, checkpoint_path: str | Path, load_optimizer: bool = True, load_scheduler: bool = True
    ) -> dict[str, Any]:
        """Load an export, and return what is in it. The main process reads; every process takes part."""
        content: dict[str, Any] = run_on_main(
            lambda: read_export(Path(checkpoint_path)), self.is_main_process
        )
        model, state, load = (
            self.get_model(keep_torch_compile=False),
            content["model_state_dict"],
            self.load_model_state,
        )
        if is_sharded(self.accelerator) and self._prepared is not None:
            load = functools.partial(load_full_state, self.accelerator, self._prepared.model)
        optimizer = self.optimizer if load_optimizer and "optimizer_state_dict" in content else None
        with loading(model, state, Path(checkpoint_path), load, optimizer):
            if optimizer is not None:
                load_into(optimizer, Path(checkpoint_path), content["optimizer_state_dict"])
            if load_scheduler and self.scheduler is not None and "scheduler_state_dict" in content:
                load_into(self.scheduler, Path(checkpoint_path), content["scheduler_state_dict"])
        return content

    def create_model_state(self, model: torch.nn.Module) -> dict[str, Any]:
        """Return what exports and training states hold of the unwrapped model: its `state_dict()`, or a part that is enough."""
        return model.state_dict()

    def load_model_state(self, model: torch.nn.Module, state: dict[str, Any]) -> None:
        """Load what `create_model_state` returned.

        Raise `RuntimeError` or `KeyError` if it is of another model.
        """
        model.load_state_dict(state)

    def state_dict(self) -> dict[str, Any]:
        """Return plain values of your own subclass that have to survive with the training state, by process."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` returned; called like that of a callback."""

    # ------------------------------------------------------------------ training state

    def save_training_state(
        self, output_dir: str | Path, checkpoint_kwargs: dict[str, Any] | None = None
    ) -> None:
        """Save all that resuming needs as the folder `output_dir`, complete or not at all.

        Every process takes part.

        Between updates only. Does nothing where the state of this very update and epoch stands there already.

        Args:
            checkpoint_kwargs: plain values of your own, which `load_training_state` returns.

        Raises:
            CheckpointError: it could not be written, or parameters are not finite; what was there is
                untouched.
        """
        path = Path(output_dir).absolute()
        check_can_save(has_run=bool(self._arguments), is_in_update=self._is_in_update)
        prepared = self._prepared_parts()
        check_finite(prepared.model)
        share_buffers(prepared.model)
        extra = {"extra.pt": checkpoint_kwargs or {}}
        state = self._run_state()
        if save_folder(
            path,
            state,
            lambda: {
                **main_files(self.accelerator, prepared, self.scheduler, self.create_model_state),
                **extra,
            },
            self._process_state,
            process_index=self.accelerator.process_index,
            gather=all_gather_object,
            write_engine=self.accelerator.save_state if is_sharded(self.accelerator) else None,
            is_known=self._known_states.get(path) == state["run_progress"],
        ):
            self._known_states[path] = state["run_progress"]
            self.callbacks.on_checkpoint_saved(cast("Trainer", self), path=path)
        self.last_checkpoint = path

    def _run_state(self) -> RunState:
        loader, config = self.train_dataloader, self.run_config
        return {
            "run_id": str(self.run_id),
            "run_progress": dataclasses.asdict(self.run_progress),
            "run_history": self.run_history.state_dict(),
            "seed": self.data_seed,
            "num_samples": None if loader is None else loader.num_samples,
            "launched": {
                "num_processes": config.num_processes,
                "per_device_batch_size": config.train_per_device_batch_size,
                "gradient_accumulation_steps": config.gradient_accumulation_steps,
                "num_update_steps": config.num_update_steps,
                "versions": library_versions(),
            },
            "callbacks": list(self.callbacks.state_dict()),
        }

    def _process_state(self) -> dict[str, Any]:
        """What differs between processes."""
        loader = self.train_dataloader
        return {
            "random": capture_random_state(self.device),
            "train_loss": self.train_loss.state_dict(),
            "train_logs": self._train_logs.state_dict(),
            "callbacks": self.callbacks.state_dict(),
            "trainer": self.state_dict(),
            "data": None if loader is None else loader.state_before_batch,
        }

    def _restore_objects(self, folder: Path, state: TrainerState) -> None:
        """Restore model, optimizer, scheduler, progress and history; the place in the loop comes later."""
        self.run_id, self._known_states = state["run_id"], {folder.absolute(): state["run_progress"]}
        accelerator = self.accelerator
        saved_processes = state["launched"]["num_processes"]
        check_engine_files(folder, accelerator, saved_processes, self.trust_engine_files)
        place = read_resume_point(
            folder, accelerator.process_index, accelerator.num_processes, saved_processes
        )
        self._place, self._place_folder = place, folder
        self.callbacks.load_state_dict(place["callbacks"])
        self.load_state_dict(place["trainer"])
        with files.raising_checkpoint_error(folder / STATE_FILE, "is damaged; use another checkpoint"):
            progress = RunProgress(**state["run_progress"])
            self.run_history.load_state_dict(state["run_history"])
        load_state(folder, self.accelerator, self._prepared_parts(), self.scheduler, self.load_model_state)
        self.run_progress, self._before = progress, None

    def _tell_differences(self, state: TrainerState) -> None:
        """Say what cannot be carried over, before anything is changed."""
        loader, is_seeded = (
            cast(ShardedDataLoader, self.train_dataloader),
            self._arguments["seed_each_sample"],
        )
        names = [name for name, _ in self.callbacks.named()]
        told = compare(state, self._run_state(), names, self.scheduler is not None)
        for sentence in [*told, *limits_of_exactness(loader, self.eval_dataloader, state, is_seeded)]:
            self.print(sentence)

    def _restore_place(self) -> None:
        """Restore what the loop itself has changed since `_restore_objects`, at the place where it was saved."""
        if self._place is None:
            return
        place, self._place = self._place, None
        self.callbacks.load_state_dict(place["callbacks"])
        self.load_state_dict(place["trainer"])
        self.train_loss.load_state_dict(place["train_loss"])
        self._train_logs.load_state_dict(place["train_logs"])
        if self._open_loaders and place["data"] is not None:
            cast(ShardedDataLoader, self.train_dataloader).restore_source(place["data"])
        if place["random"] is not None:
            restore_random_state(place["random"], self.device)
        self.callbacks.on_checkpoint_loaded(cast("Trainer", self), path=self._place_folder)
        self.agreement.read(wait=True)
