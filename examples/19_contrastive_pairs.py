"""Train with a contrastive loss (CLIP) over the pairs of all processes.

On one process:

    python examples/19_contrastive_pairs.py

On two, on a CPU:

    export ACCELERATE_USE_CPU=true
    accelerate launch --config_file examples/configs/two_cpu_processes.yaml \
        examples/19_contrastive_pairs.py

A digit is cut into its upper and its lower half, and two encoders learn which
halves belong together. The loss compares each pair with all others of the global
batch. So it needs the embeddings of all processes with their gradients, which
`gather_with_grad` returns. The script prints the loss, and for how many of 271
test images the lower half is among the five nearest of all. The lines are the
same on one process and on two.

Source: Radford et al. 2021, arXiv:2103.00020, figure 3.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset, random_split

from accel_core import Trainer

GLOBAL_BATCH_SIZE = 128
INVERSE_TEMPERATURE = 10.0


class HalvesEncoder(nn.Module):
    """Two encoders in one model, so that one call of DDP computes both."""

    def __init__(self) -> None:
        super().__init__()
        self.upper = nn.Sequential(
            nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32)
        )
        self.lower = nn.Sequential(
            nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 32)
        )

    def forward(self, upper: torch.Tensor, lower: torch.Tensor) -> torch.Tensor:
        """Return embeddings of length 1, of shape (samples, 2, 32)."""
        return F.normalize(
            torch.stack([self.upper(upper), self.lower(lower)], dim=1), dim=2
        )


def clip_loss(embeddings: torch.Tensor) -> torch.Tensor:
    """Cross entropy of each half against all halves of the other kind.

    Takes the shape (samples, 2, 32).
    """
    upper, lower = embeddings.unbind(dim=1)
    similarity = INVERSE_TEMPERATURE * upper @ lower.T
    own_pair = torch.arange(len(upper), device=upper.device)
    return (
        F.cross_entropy(similarity, own_pair)
        + F.cross_entropy(similarity.T, own_pair)
    ) / 2


class ContrastiveTrainer(Trainer):
    def calculate_train_batch_loss(self, batch):
        embeddings = self.model(*batch)
        # Each process computes the loss of the whole global batch. Each of
        # them adds its own gradients of it.
        loss = clip_loss(self.gather_with_grad(embeddings))
        return {
            "loss": loss,
            "model_outputs": embeddings,
            "batch_size": len(embeddings),
        }

    def calculate_predictions(self, batch):
        return self.model(*batch)


def main() -> None:
    halves = (
        torch.tensor(load_digits().data, dtype=torch.float32)
        .div(16)
        .split(32, dim=1)
    )
    data = TensorDataset(*halves)
    train_data, test_data = random_split(
        data, [1526, 271], generator=torch.Generator().manual_seed(0)
    )

    torch.manual_seed(0)
    model = HalvesEncoder()
    trainer = ContrastiveTrainer(
        model,
        None,
        torch.optim.AdamW(model.parameters(), lr=2e-3),
        callbacks=(),
        seed=0,
    )
    trainer.train(
        train_data,
        num_epochs=20,
        per_device_batch_size=GLOBAL_BATCH_SIZE // trainer.data_group.size,
    )
    loss = trainer.run_history.get_latest_metric("train_loss_epoch")
    trainer.print(f"Training loss: {loss:.3f}")

    upper, lower = trainer.predict(test_data).unbind(dim=1)
    nearest = (upper @ lower.T).topk(5, dim=1).indices
    found = (nearest == torch.arange(len(upper))[:, None]).any(dim=1)
    trainer.print(
        f"Lower halves among the five nearest: {found.double().mean():.1%}"
    )


if __name__ == "__main__":
    main()
