"""Detect objects with torchvision's Faster R-CNN.

    python examples/13_object_detection.py

The images are scenes of handwritten digits in random places and sizes. The
detector finds and classifies each digit. Batches are lists, since the number of
digits differs from scene to scene. The model computes its own losses, so one
method returns their sum, and another evaluates.

It prints the four losses of each epoch and the mean average precision (mAP) on
new scenes. At the end mAP at an overlap (IoU) of 0.5 is above 0.7. The picture
`outputs/13_object_detection/detections.png` shows the boxes found.

The detector is small and trained from scratch. For photographs take
`torchvision.models.detection.fasterrcnn_resnet50_fpn(weights="DEFAULT")`: the trainer stays as it is.
"""

import argparse
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import (
    FastRCNNPredictor,
    TwoMLPHead,
)
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign, nms

from accel_callbacks import DEFAULT_CALLBACKS, MetricsCallback
from accel_core import Trainer, TrainerPlaceholderValues

SCENE_SIZE = 96
MAX_LR = 4e-3


def digit_scenes(num_scenes, first, last, seed):
    """Return scenes of up to ten digits from `first` to `last`, with targets.

    An image is (1, 96, 96). A target has `boxes` (digits, 4), in pixels,
    and their `labels` (digits,), from 1 to 10: 0 is the
    background.
    """
    data = load_digits()
    digits, labels = (
        torch.tensor(data.images[first:last], dtype=torch.float32) / 16,
        torch.tensor(data.target[first:last]) + 1,
    )
    generator = torch.Generator().manual_seed(seed)

    def random(low, high):
        return int(torch.randint(low, high, (), generator=generator))

    def draw_scene():
        scene, boxes, chosen = torch.zeros(1, SCENE_SIZE, SCENE_SIZE), [], []
        for _ in range(random(4, 11)):
            index, size = random(0, len(digits)), random(16, 29)
            x, y = random(0, SCENE_SIZE - size), random(0, SCENE_SIZE - size)
            if scene[:, y : y + size, x : x + size].any():
                continue  # Digits do not overlap.
            scene[:, y : y + size, x : x + size] = F.interpolate(
                digits[index][None, None], (size, size), mode="bilinear"
            )[0]
            boxes.append([x, y, x + size, y + size])
            chosen.append(index)
        return scene, {
            "boxes": torch.tensor(boxes, dtype=torch.float32),
            "labels": labels[chosen],
        }

    return [draw_scene() for _ in range(num_scenes)]


def collate_as_lists(samples):
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class Precision(MeanAveragePrecision):
    """Mean average precision alone, without the seventeen numbers that come
    with it.
    """

    def compute(self):
        results = super().compute()
        return {name: results[name] for name in ("map", "map_50")}


class DetectionTrainer(Trainer):
    def calculate_train_batch_loss(self, batch):
        images, targets = batch
        losses = self.model(images, targets)
        return {
            "loss": sum(losses.values()),
            "model_outputs": None,
            "batch_size": len(images),
            "log": losses,
        }

    def calculate_eval_batch_loss(self, batch):
        """Torchvision's detectors return detections in eval mode, and losses in
        train mode: both are wanted here.
        """
        images, targets = batch
        detections = self.model(images)
        self.model.train()
        losses = self.model(images, targets)
        self.model.eval()
        return {
            "loss": sum(losses.values()),
            "model_outputs": detections,
            "batch_size": len(images),
        }


def create_detector():
    channels = 64
    backbone = nn.Sequential(
        *(
            nn.Conv2d(3, 32, 3, stride=2, padding=1),
            nn.GroupNorm(8, 32),
            nn.ReLU(),
        ),
        *(
            nn.Conv2d(32, channels, 3, stride=2, padding=1),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
        ),
        *(
            nn.Conv2d(channels, channels, 3, padding=1),
            nn.GroupNorm(8, channels),
            nn.ReLU(),
        ),
    )
    backbone.out_channels = channels
    return FasterRCNN(
        backbone,
        min_size=SCENE_SIZE,
        max_size=SCENE_SIZE,
        rpn_anchor_generator=AnchorGenerator(
            sizes=((16, 22, 28),), aspect_ratios=((1.0,),)
        ),
        box_roi_pool=MultiScaleRoIAlign(
            featmap_names=["0"], output_size=6, sampling_ratio=2
        ),
        box_head=TwoMLPHead(channels * 6 * 6, 128),
        box_predictor=FastRCNNPredictor(128, num_classes=11),
        rpn_batch_size_per_image=64,
        rpn_pre_nms_top_n_train=100,
        rpn_post_nms_top_n_train=50,
        rpn_pre_nms_top_n_test=100,
        rpn_post_nms_top_n_test=40,
        box_batch_size_per_image=32,
        box_positive_fraction=0.5,
        box_score_thresh=0.1,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=6)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = create_detector()
    mean_average_precision = MetricsCallback(
        {"": Precision(iou_type="bbox")},
        update=lambda metric, batch, batch_output: metric.update(
            batch_output["model_outputs"], batch[1]
        ),
    )
    trainer = DetectionTrainer(
        model,
        None,
        torch.optim.AdamW(model.parameters()),
        callbacks=(mean_average_precision, *DEFAULT_CALLBACKS),
        seed=0,
    )
    eval_scenes = digit_scenes(40, 1400, 1797, seed=1)
    history = trainer.train(
        digit_scenes(200, 0, 1400, seed=0),
        num_epochs=args.epochs,
        eval_dataset=eval_scenes,
        per_device_batch_size=4,
        create_scheduler_fn=partial(
            OneCycleLR,
            max_lr=MAX_LR,
            total_steps=TrainerPlaceholderValues.NUM_UPDATE_STEPS,
        ),
        collate_fn=collate_as_lists,
    )
    trainer.print(
        f"mAP at an overlap of 0.5: {history.get_latest_metric('map_50'):.2f}"
    )

    detections = trainer.predict(eval_scenes[:6], collate_fn=collate_as_lists)
    if trainer.is_main_process:
        draw(
            [scene for scene, _ in eval_scenes[:6]],
            detections,
            Path("outputs/13_object_detection"),
        )


def draw(scenes, detections, folder):
    import matplotlib.pyplot as plt

    folder.mkdir(parents=True, exist_ok=True)
    figure, axes = plt.subplots(2, 3, figsize=(7.2, 5.2), layout="constrained")
    figure.suptitle("Six scenes, with the boxes and digits that were found")
    for scene, found, ax in zip(scenes, detections, axes.flat, strict=True):
        ax.imshow(scene[0], cmap="gray")
        ax.axis("off")
        # Of boxes that overlap, with one label or another, the surest.
        chosen = nms(found["boxes"], found["scores"], 0.3)
        chosen = chosen[found["scores"][chosen] > 0.3]
        for (left, top, right, bottom), label in zip(
            found["boxes"][chosen].tolist(),
            found["labels"][chosen],
            strict=True,
        ):
            ax.add_patch(
                plt.Rectangle(
                    (left, top),
                    right - left,
                    bottom - top,
                    fill=False,
                    color="orange",
                    linewidth=2,
                )
            )
            # Above the box, or in it where the picture ends.
            ax.text(
                left + 1,
                max(top, 0) + 1 if top < 8 else top - 1,
                str(int(label) - 1),
                color="orange",
                fontsize=12,
                verticalalignment="top" if top < 8 else "bottom",
            )
    figure.savefig(folder / "detections.png", dpi=150)
    print(f"Picture in {folder}")


if __name__ == "__main__":
    main()
