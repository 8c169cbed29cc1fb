"""Digits with Lightning.

A one-cycle schedule, accuracy after each epoch, the best weights at the end.
"""

import lightning as L
import torch
from digits import BATCH_SIZE, MAX_LR, NUM_EPOCHS, create_model, load_data
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader
from torchmetrics.classification import MulticlassAccuracy


class DigitsModule(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = create_model()
        self.loss_func = nn.CrossEntropyLoss()
        self.accuracy = MulticlassAccuracy(num_classes=10, average="micro")

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = self.loss_func(self.model(images), labels)
        self.log(
            "train_loss", loss, on_step=False, on_epoch=True, prog_bar=True
        )
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        outputs = self.model(images)
        self.accuracy.update(outputs, labels)
        self.log("eval_loss", self.loss_func(outputs, labels), prog_bar=True)
        self.log("accuracy", self.accuracy, prog_bar=True)

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        scheduler = OneCycleLR(
            optimizer,
            max_lr=MAX_LR,
            total_steps=self.trainer.estimated_stepping_batches,
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }


L.seed_everything(0)
train_data, eval_data = load_data()
train_loader = DataLoader(train_data, batch_size=BATCH_SIZE, shuffle=True)
eval_loader = DataLoader(eval_data, batch_size=BATCH_SIZE)
best = ModelCheckpoint(
    dirpath="outputs/lightning", monitor="accuracy", mode="max"
)
trainer = L.Trainer(
    max_epochs=NUM_EPOCHS, callbacks=[best], logger=False, accelerator="cpu"
)
module = DigitsModule()
trainer.fit(module, train_loader, eval_loader)
metrics = trainer.validate(
    module, eval_loader, ckpt_path="best", weights_only=True
)
print(f"Accuracy: {metrics[0]['accuracy']:.3f}")
