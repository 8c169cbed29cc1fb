"""The public names and signatures are those of the list that a person has read."""

import difflib

from public_api import LIST, public_api


def test_names_and_signatures_are_those_of_the_list() -> None:
    """Where the change is meant, run `hatch run api`, read the difference, and write a line into the changelog."""
    listed, found = LIST.read_text(encoding="utf-8"), public_api()
    difference = difflib.unified_diff(
        listed.splitlines(), found.splitlines(), "tests/public_api.txt", "the code", n=0, lineterm=""
    )
    assert listed == found, "\n".join(
        ["", *difference, "", str(test_names_and_signatures_are_those_of_the_list.__doc__)]
    )


def test_the_list_has_what_users_call() -> None:
    listed = LIST.read_text(encoding="utf-8")
    for line in (
        "class Trainer",
        "    on_optimizer_step_end(trainer)",
        "    stop_reason  (property)",
        "class TimmTrainer(Trainer)",
    ):
        assert f"\n{line}\n" in listed
    assert "    train(train_dataset, num_epochs=None, eval_dataset=None, per_device_batch_size=8" in listed
