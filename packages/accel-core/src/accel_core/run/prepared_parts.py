"""Model and optimizer of a run: what their engine refuses, and how they are placed and wrapped."""

from __future__ import annotations

from ..engines.engine import LEFT_TO_ENGINE, Prepared
from ..engines.patches import Patches
from ..engines.second_order import check_second_order
from ..engines.trained import Trained
from ..engines.weights import move_modules
from .counted_loss import counted_loss
from .run import Run
from .train_arguments import TrainArguments
from .trained_state import modules_of_optimizer, train_beside, what_is_trained
from .trainer_parts import TrainerParts

_COUNT = "count_items"
_STEP = "calculate_train_batch_loss"


def check_engine(trainer: TrainerParts, run: Run, arguments: TrainArguments, base: type) -> None:
    """Raise if the run asks for what the engine does not do.

    Args:
        base: `Trainer`, by which is known what the trainer's class overrides.
    """
    kind = type(trainer)
    overridden = [name for name in LEFT_TO_ENGINE if getattr(kind, name) is not getattr(base, name)]
    is_own = {name: getattr(kind, name) is not getattr(base, name) for name in (_COUNT, _STEP)}
    # The default counts for the default step, which an engine needs that changes the parameters inside
    # backward.
    counts_targets = run.engine.steps_in_backward and counted_loss(trainer.loss_func) is not None
    run.counts_before_forward = is_own[_COUNT] or (counts_targets and not is_own[_STEP])
    is_sized = run.train_loader is not None and run.train_loader.is_sized
    has_plan = is_sized or run.counts_before_forward
    engine = run.engine
    check_second_order(trainer.optimizer, trainer.accelerator, engine.group, engine.steps_in_backward)
    run.engine.check(overridden, arguments.gradient_clip_value, arguments.gradient_clip_norm, has_plan)


def prepare_parts(trainer: TrainerParts, run: Run, per_device_batch_size: int = 1) -> Prepared:
    """Place and wrap model and optimizer, unless they are those of the run before."""
    engine = run.engine
    if engine.prepared is None or not engine.prepared.is_of(trainer.model, trainer.optimizer):
        trainer.callbacks.on_prepare_start(trainer)  # type: ignore[arg-type]
        user_parts = (trainer.model, trainer.optimizer)
        leaves_model = engine.shards_parameters and not engine.gathers_files
        patches = Patches(trainer.model, trainer.accelerator, leaves_model)
        engine.check_trained(modules_of_optimizer(trainer), ())
        engine.check_model(trainer.model, trainer.optimizer)
        try:
            with engine.completed_config(per_device_batch_size):
                trainer.prepare()
            engine.check_model(trainer.model, trainer.optimizer)
            # Only now, as the user's own `prepare` may have wrapped what else there is.
            engine.check_trained((), Trained(vars(trainer), *user_parts).optimizers)
            engine.check_attributes(vars(trainer))
        except BaseException:
            patches.take_off()
            raise
        engine.keep(Prepared(*user_parts, trainer.model, trainer.optimizer, patches))
    prepared = run.prepared
    prepared.patches.put_on()
    trainer.model, trainer.optimizer = prepared.model, prepared.optimizer
    move_modules(vars(trainer), trainer.device)
    train_beside(run, what_is_trained(trainer, prepared))
    return prepared
