"""Detect objects with torchvision's Faster R-CNN: a model that computes its own losses, a batch of lists, mean average precision.

    python examples/13_object_detection.py

The images are scenes of handwritten digits in random places and sizes; a detector finds each digit and says which it is. Batches
are lists, since the number of digits differs from scene to scene; one method says what the loss is, one more how to evaluate.
Prints the four losses of each epoch and the mean average precision on new scenes; at the end mAP at an overlap (IoU) of 0.5 is
above 0.8. The picture outputs/13_object_detection/detections.png shows what was found.

The detector is small and trained from nothing. For photographs take torchvision.models.detection.fasterrcnn_resnet50_fpn(
weights="DEFAULT"): the trainer stays as it is.
"""

import argparse
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, Subset
from torchmetrics.detection import MeanAveragePrecision
from torchvision.models.detection import FasterRCNN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.rpn import AnchorGenerator
from torchvision.ops import MultiScaleRoIAlign
from torchvision.utils import draw_bounding_boxes, make_grid, save_image

from accel_callbacks import DEFAULT_CALLBACKS, MetricsCallback
from accel_core import Trainer

SCENE_SIZE = 64


class DigitScenes(Dataset):
    """Scenes of one to three digits: an image (1, 64, 64), and its boxes (digits, 4) in pixels with their labels from 1 to 10."""

    def __init__(self, num_scenes, first, last, seed):
        data = load_digits()
        self.images = torch.tensor(data.images[first:last], dtype=torch.float32) / 16
        self.labels = torch.tensor(data.target[first:last]) + 1  # 0 is the background.
        generator = torch.Generator().manual_seed(seed)
        self.scenes = [self.draw(generator) for _ in range(num_scenes)]

    def draw(self, generator):
        def random(low, high):
            return int(torch.randint(low, high, (), generator=generator))

        scene, boxes, labels = torch.zeros(1, SCENE_SIZE, SCENE_SIZE), [], []
        for _ in range(random(1, 4)):
            index, size = random(0, len(self.images)), random(16, 29)
            x, y = random(0, SCENE_SIZE - size), random(0, SCENE_SIZE - size)
            if scene[:, y : y + size, x : x + size].any():
                continue  # Digits do not overlap.
            scene[:, y : y + size, x : x + size] = F.interpolate(self.images[index][None, None], (size, size), mode="bilinear")[0]
            boxes.append([x, y, x + size, y + size])
            labels.append(self.labels[index])
        return scene, {"boxes": torch.tensor(boxes, dtype=torch.float32), "labels": torch.stack(labels)}

    def __len__(self):
        return len(self.scenes)

    def __getitem__(self, index):
        return self.scenes[index]


def collate_as_lists(samples):
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)


class Precision(MeanAveragePrecision):
    """Mean average precision alone, without the seventeen numbers that come with it."""

    def compute(self):
        results = super().compute()
        return {name: results[name] for name in ("map", "map_50")}


class DetectionTrainer(Trainer):
    def calculate_train_batch_loss(self, batch):
        images, targets = batch
        losses = self.model(images, targets)
        return {"loss": sum(losses.values()), "model_outputs": None, "batch_size": len(images), "log": losses}

    def calculate_eval_batch_loss(self, batch):
        """In train mode torchvision's detectors return losses, in eval mode detections: both are wanted here."""
        detections = self.model(batch[0])
        self.model.train()
        output = self.calculate_train_batch_loss(batch)
        self.model.eval()
        return {**output, "model_outputs": detections}


def create_detector():
    channels = 64
    backbone = nn.Sequential(
        *(nn.Conv2d(3, 32, 3, stride=2, padding=1), nn.GroupNorm(8, 32), nn.ReLU()),
        *(nn.Conv2d(32, channels, 3, stride=2, padding=1), nn.GroupNorm(8, channels), nn.ReLU()),
        *(nn.Conv2d(channels, channels, 3, padding=1), nn.GroupNorm(8, channels), nn.ReLU()),
    )
    backbone.out_channels = channels
    return FasterRCNN(
        backbone,
        min_size=SCENE_SIZE,
        max_size=SCENE_SIZE,
        rpn_anchor_generator=AnchorGenerator(sizes=((16, 22, 28),), aspect_ratios=((1.0,),)),
        box_roi_pool=MultiScaleRoIAlign(featmap_names=["0"], output_size=6, sampling_ratio=2),
        box_head=TwoMLPHead(channels * 6 * 6, 128),
        box_predictor=FastRCNNPredictor(128, num_classes=11),
        rpn_batch_size_per_image=64,
        rpn_pre_nms_top_n_train=100,
        rpn_post_nms_top_n_train=50,
        rpn_pre_nms_top_n_test=50,
        rpn_post_nms_top_n_test=20,
        box_batch_size_per_image=32,
        box_score_thresh=0.1,
    )


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=8)
    args = parser.parse_args()

    torch.manual_seed(0)
    model = create_detector()
    mean_average_precision = MetricsCallback(
        {"": Precision(iou_type="bbox")},
        update=lambda metric, batch, batch_output: metric.update(batch_output["model_outputs"], batch[1]),
    )
    trainer = DetectionTrainer(
        model,
        None,
        torch.optim.AdamW(model.parameters(), lr=2e-3),
        callbacks=(mean_average_precision, *DEFAULT_CALLBACKS),
        seed=0,
    )
    eval_scenes = DigitScenes(100, 1400, 1797, seed=1)
    history = trainer.train(
        DigitScenes(600, 0, 1400, seed=0),
        num_epochs=args.epochs,
        eval_dataset=eval_scenes,
        per_device_batch_size=8,
        collate_fn=collate_as_lists,
    )
    trainer.print(f"mAP at an overlap of 0.5: {history.get_latest_metric('map_50'):.2f}")

    scenes = Subset(eval_scenes, range(6))
    detections = trainer.predict(scenes, collate_fn=collate_as_lists)
    if trainer.is_main_process:
        draw([scene for scene, _ in scenes], detections, Path("outputs/13_object_detection"))


def draw(scenes, detections, folder):
    folder.mkdir(parents=True, exist_ok=True)
    pictures = []
    for scene, found in zip(scenes, detections, strict=True):
        is_sure = found["scores"] > 0.3
        names = [str(int(label) - 1) for label in found["labels"][is_sure]]
        # Enlarged, so that the digit in the corner of each box can be read.
        picture = F.interpolate(scene[None], scale_factor=4)[0].expand(3, -1, -1)
        pictures.append(draw_bounding_boxes(picture, found["boxes"][is_sure] * 4, names, colors="orange", width=2))
    save_image(make_grid(pictures, nrow=3, pad_value=1), folder / "detections.png")
    print(f"Picture in {folder}")


if __name__ == "__main__":
    main()
