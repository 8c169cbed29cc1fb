"""One process: equal to a loop written by hand, and resumed to the bit.

A state of several processes goes on on one in the files of these layouts, and one of a single process on two in
`test_resume_on_other_processes.py`.
"""

import torch
from torch import nn

from layout_promises import (
    ACCUMULATION,
    GLOBAL_BATCH,
    HALVED,
    NUM_EPOCHS,
    NUM_SAMPLES,
    SAVED_AT,
    Layout,
    Rates,
    make_data,
)
from tiny import SaveAt

LAYOUT = Layout("a single process")


def by_hand():
    """What `Layout.run` does without shuffling, in torch alone."""
    torch.manual_seed(3)
    model = LAYOUT.create_model(LAYOUT.dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)
    scheduler = HALVED(optimizer)
    inputs, targets = make_data(NUM_SAMPLES, LAYOUT.dtype).tensors
    eval_inputs, eval_targets = make_data(13, LAYOUT.dtype).tensors
    losses, measured = [], []
    for _ in range(NUM_EPOCHS):
        total = 0.0
        for window in zip(
            inputs.split(GLOBAL_BATCH * ACCUMULATION), targets.split(GLOBAL_BATCH * ACCUMULATION), strict=True
        ):
            loss = nn.functional.cross_entropy(model(window[0]), window[1])
            total += loss.item() * len(window[0])
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        losses.append(total / NUM_SAMPLES)
        with torch.no_grad():
            outputs = model(eval_inputs)
        accuracy = (outputs.argmax(1) == eval_targets).double().mean().item()
        measured.append((nn.functional.cross_entropy(outputs, eval_targets).item(), accuracy))
    return dict(model.state_dict()), losses, measured, outputs


def test_weights_losses_metrics_and_predictions_are_those_of_a_loop_by_hand():
    weights, losses, measured, outputs = by_hand()
    trainer = LAYOUT.create_trainer([Rates()])
    found = LAYOUT.run(trainer, train_dataloader_kwargs={"shuffle": False})
    LAYOUT.assert_equal(found["weights"], weights)
    LAYOUT.assert_equal(list(trainer.run_history.get_metric_values("train_loss_epoch")), losses)
    pairs = zip(*map(trainer.run_history.get_metric_values, ("eval_loss_epoch", "accuracy")), strict=True)
    # torchmetrics computes in float32.
    torch.testing.assert_close(list(pairs), measured, rtol=1e-6, atol=1e-6)
    LAYOUT.assert_equal(trainer.predict(make_data(13, LAYOUT.dtype), per_device_batch_size=4), outputs)


def test_a_resumed_run_has_the_same_bits(tmp_path):
    whole = LAYOUT.run(LAYOUT.create_trainer([Rates(), SaveAt(SAVED_AT, LAYOUT.state_in(tmp_path))]))
    torch.testing.assert_close(LAYOUT.go_on(tmp_path), whole, rtol=0, atol=0)


def test_describe_names_it():
    assert "processes: 1, layout: a single process" in LAYOUT.create_trainer().describe()
