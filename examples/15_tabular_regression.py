"""Predict a number from a table.

    python examples/15_tabular_regression.py

The table is Auto MPG, which the package mlxtend ships. It has the miles per gallon
of 392 cars of 1970 to 1982, with seven columns such as horsepower, weight and
year. A table this small has few rows to test on. So the script trains five
networks, each without a fifth of the cars, and lets it predict that fifth: this
is cross-validation.

A range test finds the learning rate. Each network stops early and keeps its best
weights. The script prints the rate, and when and why each network stopped. At the
end the networks explain about 0.87 of the variance (R^2) of unseen cars. Linear
regression explains 0.81.

The folder `outputs/15_tabular_regression` holds the best models and two pictures:
`learning_rate.png` of the range test, and `history.png` of the first network.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from mlxtend.data import autompg_data
from sklearn.linear_model import LinearRegression
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, train_test_split
from torch import nn
from torch.utils.data import TensorDataset

from accel_callbacks import (
    EarlyStoppingCallback,
    SaveBestModelCallback,
    find_learning_rate,
    plot_history,
)
from accel_core import Trainer

FOLDER = Path("outputs/15_tabular_regression")
BATCH_SIZE = 32
ORIGINS = ("USA", "Europe", "Japan")


def cars():
    """Return features (cars, 9), with a column for each origin, and miles per
    gallon (cars, 1).
    """
    table, miles_per_gallon = autompg_data()
    # The column after the origin is empty: it held the names.
    numbers, origin = table[:, :6], table[:, 6]
    features = np.column_stack(
        [numbers, *(origin == number for number in range(1, len(ORIGINS) + 1))]
    )
    return features, miles_per_gallon[:, None]


def create_trainer(num_features, learning_rate, callbacks=()):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(num_features, 64),
        nn.ReLU(),
        nn.Linear(64, 64),
        nn.ReLU(),
        nn.Linear(64, 1),
    )
    return Trainer(
        model,
        nn.MSELoss(),
        torch.optim.AdamW(model.parameters(), lr=learning_rate),
        callbacks,
        seed=0,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=200, help="at most")
    args = parser.parse_args()

    features, targets = cars()
    predictions, linear_predictions = (
        np.empty_like(targets),
        np.empty_like(targets),
    )
    for fold, (seen, unseen) in enumerate(
        KFold(5, shuffle=True, random_state=0).split(features)
    ):
        linear_predictions[unseen] = (
            LinearRegression()
            .fit(features[seen], targets[seen])
            .predict(features[unseen])
        )

        train, evaluation = train_test_split(
            seen, test_size=0.2, random_state=0
        )
        # Mean and deviation are those of the rows that are trained on: nothing
        # is known of the others.
        mean, deviation = targets[train].mean(), targets[train].std()
        inputs = torch.tensor(
            (features - features[train].mean(0)) / features[train].std(0),
            dtype=torch.float32,
        )
        outputs = torch.tensor(
            (targets - mean) / deviation, dtype=torch.float32
        )
        train_data, eval_data = (
            TensorDataset(inputs[rows], outputs[rows])
            for rows in (train, evaluation)
        )

        if fold == 0:
            tested = create_trainer(features.shape[1], learning_rate=1e-3)
            found = find_learning_rate(
                tested, train_data, BATCH_SIZE, min_lr=1e-5, max_lr=1.0
            )
            found.plot(FOLDER / "learning_rate.png")
            tested.print(f"Suggested learning rate: {found.suggestion:.2g}")
        trainer = create_trainer(
            features.shape[1],
            found.suggestion,
            callbacks=(
                EarlyStoppingCallback(
                    early_stopping_patience=15, early_stopping_threshold=0
                ),
                SaveBestModelCallback(FOLDER / f"best_model_{fold}.pt"),
            ),
        )
        history = trainer.train(
            train_data,
            num_epochs=args.epochs,
            eval_dataset=eval_data,
            per_device_batch_size=BATCH_SIZE,
        )
        if fold == 0:
            plot_history(history, FOLDER / "history.png")
        trainer.print(
            f"Network {fold}: {trainer.run_progress.epochs_completed} "
            f"epochs; {trainer.stop_reason}"
        )
        # The best model was loaded when training ended.
        predictions[unseen] = (
            trainer.predict(TensorDataset(inputs[unseen])).numpy() * deviation
            + mean
        )

    explained, linearly = (
        r2_score(targets, predictions),
        r2_score(targets, linear_predictions),
    )
    trainer.print(
        f"R^2 on unseen cars: {explained:.3f}, by linear regression "
        f"{linearly:.3f}"
    )
    trainer.print(
        f"Off by {np.abs(predictions - targets).mean():.2f} miles per "
        f"gallon on average. Pictures in {FOLDER}"
    )


if __name__ == "__main__":
    main()
