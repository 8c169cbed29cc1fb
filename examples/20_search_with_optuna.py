"""Search for a learning rate and a width with Optuna.

It makes six trials, and ends bad ones early.

    python examples/20_search_with_optuna.py

The study is in a file of sqlite. If the script is killed, start it again: it
makes the trials that are left.
"""

import argparse

import optuna
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset, random_split

from accel_callbacks import OptunaPruningCallback
from accel_core import Trainer

digits = load_digits()
data = TensorDataset(
    torch.tensor(digits.data / 16, dtype=torch.float32),
    torch.tensor(digits.target),
)
train_data, eval_data = random_split(
    data, [0.8, 0.2], generator=torch.Generator().manual_seed(1)
)


def objective(trial):
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    width = trial.suggest_int("width", 8, 64, log=True)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))
    trainer = Trainer(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.AdamW(model.parameters(), lr=lr),
        callbacks=[OptunaPruningCallback(trial)],
        seed=0,
    )
    history = trainer.train(
        train_data,
        num_epochs=4,
        eval_dataset=eval_data,
        per_device_batch_size=32,
    )
    return history.get_latest_metric("eval_loss_epoch")


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--trials", type=int, default=6)
    parser.add_argument("--storage", default="sqlite:///study.db")
    arguments = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        study_name="digits",
        storage=arguments.storage,
        load_if_exists=True,
        sampler=optuna.samplers.TPESampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=2),
    )
    finished = [trial for trial in study.trials if trial.state.is_finished()]
    study.optimize(objective, n_trials=max(arguments.trials - len(finished), 0))
    finished = [trial for trial in study.trials if trial.state.is_finished()]
    pruned = [
        trial
        for trial in finished
        if trial.state == optuna.trial.TrialState.PRUNED
    ]
    print(f"{len(finished)} trials, {len(pruned)} of them pruned")
    print(
        f"The best has the loss {study.best_value:.3f} with {study.best_params}"
    )


if __name__ == "__main__":
    main()
