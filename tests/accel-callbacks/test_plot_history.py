"""The picture of a run history: what is in which panel, and what it shows in the awkward cases."""

import math
import subprocess
import sys

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from accel_callbacks import plot_history
from accel_callbacks.dark_figure import TEXT, darken
from accel_core import ConfigurationError, InMemoryRunHistory


def build_history(epochs, updates_per_epoch=20, nan_epochs=(), **metrics):
    """Losses and learning rate of a run; `metrics` are further values by epoch."""
    history = InMemoryRunHistory()
    for epoch in range(1, epochs + 1):
        history.current_epoch = epoch
        for update in range((epoch - 1) * updates_per_epoch + 1, epoch * updates_per_epoch + 1):
            history.current_update = update
            if update % 5 == 0:
                history.update_metric("learning_rate", 0.1 / update)
        history.update_metric("train_loss_epoch", math.nan if epoch in nan_epochs else 2 / epoch)
        history.update_metric("eval_loss_epoch", math.nan if epoch in nan_epochs else 1 / epoch + 0.1 * epoch)
        for name, calculate in metrics.items():
            history.update_metric(name, calculate(epoch))
    return history


def panels(figure):
    # The canvas of a figure without a window draws nothing, so its layout would not be that of the picture.
    figure.draw_without_rendering()
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def lines(axes):
    """The curves by their label, without what is only a mark."""
    return {
        line.get_label(): line
        for line in axes.lines
        if not line.get_label().startswith("_") and len(line.get_xdata())
    }


def texts(axes):
    return [text.get_text() for text in axes.get_legend().get_texts()]


@pytest.mark.parametrize("epochs", [1, 100])
def test_the_picture_is_saved_and_its_folder_made(tmp_path, epochs):
    path = tmp_path / "report" / "history.png"
    plot_history(build_history(epochs), path)
    picture = imread(path)
    assert picture.shape[0] > 300 and picture.shape[1] > 600
    assert picture.std() > 0.05


def test_losses_come_first_and_learning_rates_last():
    history = build_history(3, accuracy=lambda epoch: 0.2 * epoch, train_accuracy=lambda epoch: 0.3 * epoch)
    for update in range(60):
        history.current_update = update
        history.update_metric("gradient_norm", 1.0)
    figure = plot_history(history)
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "Loss",
        "Accuracy",
        "Gradient norm",
        "Learning rate",
    ]
    assert [axes.get_xlabel() for axes in figure.axes] == ["epoch", "epoch", "update", "update"]


def test_training_and_evaluation_of_a_metric_share_a_panel():
    history = build_history(
        3,
        accuracy=lambda epoch: 0.2 * epoch,
        train_accuracy=lambda epoch: 0.3 * epoch,
        ema_model_accuracy=lambda epoch: 0.25 * epoch,
        train_distance_epoch=lambda epoch: 1 / epoch,
        eval_distance_epoch=lambda epoch: 2 / epoch,
    )
    drawn = panels(plot_history(history))
    assert texts(drawn["Accuracy"]) == ["training", "evaluation, highest 0.6 in epoch 3", "averaged weights"]
    assert texts(drawn["Distance"]) == ["training", "evaluation, lowest 0.6667 in epoch 3"]


def test_each_kind_of_evaluation_of_each_set_has_a_line_in_the_panel_of_its_metric():
    history = InMemoryRunHistory()
    kinds = ("", "intermediate_", "ema_model_", "ema_model_intermediate_", "average_model_")
    for start in ("", "shifted_"):
        for kind in kinds:
            history.update_metric(f"{start}{kind}eval_loss_epoch", 1.0)
            history.update_metric(f"{start}{kind}accuracy", 0.5)
    history.update_metric("far_intermediate_eval_loss_epoch", 1.0)
    history.update_metric("far_evaluation_loss", 1.0)
    drawn = panels(plot_history(history))
    assert set(drawn) == {"Loss", "Accuracy"}
    labels = [
        "evaluation",
        "averaged weights",
        "mean of weights",
        "mid-epoch",
        "averaged weights, mid-epoch",
    ]
    for panel, further in (("Loss", ["mid-epoch on far", "evaluate() on far"]), ("Accuracy", [])):
        found = [
            text.partition(", ")[0] if "lowest" in text or "highest" in text else text.partition(":")[0]
            for text in texts(drawn[panel])
        ]
        shifted = {f"{label} on shifted" for label in labels}
        assert found[:5] == labels
        assert set(found[5:]) == shifted | set(further)


def test_values_stand_at_their_epoch_and_rates_at_their_update():
    drawn = panels(plot_history(build_history(3)))
    training = lines(drawn["Loss"])["training"]
    assert list(training.get_xdata()) == [1, 2, 3]
    assert list(training.get_ydata()) == [2, 1, 2 / 3]
    (rates,) = drawn["Learning rate"].lines[:1]
    assert list(rates.get_xdata()) == list(range(5, 65, 5))


def test_an_evaluation_in_mid_epoch_stands_within_its_epoch():
    history = InMemoryRunHistory()
    for epoch in (1, 2):
        history.current_epoch = epoch
        history.current_update = epoch * 20 - 10
        history.update_metric("intermediate_eval_loss", 1.0)
        history.current_update = epoch * 20
        history.update_metric("train_loss_epoch", 1.0)
    history.current_epoch, history.current_update = 3, 45
    history.update_metric("intermediate_eval_loss", 1.0)
    drawn = panels(plot_history(history))
    assert list(lines(drawn["Loss"])["mid-epoch"].get_xdata()) == [0.5, 1.5, 3.0]


def test_the_best_evaluation_is_marked_and_named():
    history = build_history(8)
    axes = panels(plot_history(history))["Loss"]
    assert "evaluation, lowest 0.6333 in epoch 3" in texts(axes)
    (ring,) = [line for line in axes.lines if line.get_markersize() > 10]
    assert (ring.get_xdata()[0], ring.get_ydata()[0]) == (3, 1 / 3 + 0.1 * 3)


def test_without_evaluation_the_best_of_training_is_marked():
    history = InMemoryRunHistory()
    history.update_metric("train_loss_epoch", 0.5)
    assert texts(panels(plot_history(history))["Loss"]) == ["training, lowest 0.5 in epoch 1"]


def test_one_epoch_has_its_number_at_the_axis_and_visible_points():
    axes = panels(plot_history(build_history(1)))["Loss"]
    low, high = axes.get_xlim()
    assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]
    assert all(line.get_marker() not in ("", "none", "None") for line in lines(axes).values())


def test_a_hundred_epochs_are_a_line_with_few_numbers_at_the_axis():
    axes = panels(plot_history(build_history(100)))["Loss"]
    assert list(lines(axes)["training"].get_markevery()) == []
    assert len(axes.get_xticks()) <= 9


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_a_gap_with_a_mark_and_does_not_hide_the_rest(value):
    history = build_history(12, accuracy=lambda epoch: value if epoch in (5, 6) else epoch / 20)
    axes = panels(plot_history(history))["Accuracy"]
    assert texts(axes) == ["evaluation, highest 0.6 in epoch 12", "not finite"]
    assert axes.get_ylim()[1] < 1
    crosses = [line for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert [list(line.get_xdata()) for line in crosses] == [[5, 6]]


def test_a_number_between_two_that_are_not_finite_is_seen_on_a_long_line():
    axes = panels(plot_history(build_history(100, nan_epochs=(20, 21, 23))))["Loss"]
    assert list(lines(axes)["training"].get_markevery()) == [21]


def test_crosses_of_two_series_do_not_cover_each_other():
    axes = panels(plot_history(build_history(12, nan_epochs=(5,))))["Loss"]
    heights = [
        line.get_ydata()[0] for line in axes.lines if line.get_marker() == "x" and len(line.get_xdata())
    ]
    assert len(set(heights)) == 2


def test_a_history_of_nothing_but_nan_is_drawn(tmp_path):
    plot_history(build_history(3, nan_epochs=(1, 2, 3)), tmp_path / "history.pdf")
    assert (tmp_path / "history.pdf").stat().st_size > 1000


def test_a_loss_over_many_magnitudes_has_a_logarithmic_axis_and_an_accuracy_has_not():
    history = build_history(
        3, eval_mse_epoch=lambda epoch: 10.0 ** (-2 * epoch), accuracy=lambda epoch: 10.0 ** (2 * epoch - 7)
    )
    drawn = panels(plot_history(history))
    assert drawn["Mse"].get_yscale() == "log"
    assert drawn["Loss"].get_yscale() == "linear"
    assert drawn["Accuracy"].get_yscale() == "linear"


def test_rates_of_several_groups_share_a_panel():
    history = InMemoryRunHistory()
    for update in range(3):
        history.current_update = update
        history.update_metric("lr_backbone", 0.1)
        history.update_metric("lr_head", 0.2)
    assert texts(panels(plot_history(history))["Learning rate"]) == ["backbone", "head"]


def test_a_long_title_takes_lines_so_as_not_to_run_into_the_next_panel():
    figure = plot_history(build_history(2, **{"a_long_name_" * 8: float}))
    title = next(title for title in panels(figure) if title.startswith("A long name"))
    assert max(map(len, title.split("\n"))) <= 34


def test_an_empty_history_is_reported():
    with pytest.raises(ConfigurationError, match=r"no values.*plot_history after train"):
        plot_history(InMemoryRunHistory())


def test_without_matplotlib_the_error_has_the_command_to_install_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigurationError, match=r'pip install "accel-callbacks\[matplotlib\]"'):
        plot_history(build_history(1))


def test_drawing_leaves_matplotlibs_global_state_alone(tmp_path):
    script = """
import sys
from accel_callbacks import plot_history
from accel_core import InMemoryRunHistory
assert "matplotlib" not in sys.modules
history = InMemoryRunHistory()
history.update_metric("train_loss_epoch", 1.0)
plot_history(history, sys.argv[1])
assert "matplotlib.pyplot" not in sys.modules
"""
    command = [sys.executable, "-c", script, str(tmp_path / "history.svg")]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert finished.returncode == 0, finished.stderr


def with_sets(*names, epochs=4):
    history = build_history(epochs, accuracy=lambda epoch: 0.2 * epoch)
    for epoch in range(1, epochs + 1):
        history.current_epoch, history.current_update = epoch, 20 * epoch
        for name in names:
            history.update_metric(f"{name}_eval_loss_epoch", 3 / epoch)
            history.update_metric(f"{name}_accuracy", 0.1 * epoch)
    return history


def with_groups(number):
    history = build_history(2)
    for group in range(number):
        history.update_metric(f"learning_rate_layer_{group}", 0.1 * 0.8**group)
    return history


def test_each_evaluation_set_has_a_line_beside_the_others(tmp_path):
    shown = panels(plot_history(with_sets("shifted", "noisy_images"), tmp_path / "sets.svg"))
    assert list(shown) == ["Loss", "Accuracy", "Learning rate"]
    for name in ("Loss", "Accuracy"):
        of_sets = lines(shown[name])
        assert {"evaluation on shifted", "evaluation on noisy images"} <= set(of_sets)
        assert len({line.get_color() for line in of_sets.values()}) == len(of_sets)
    assert lines(shown["Accuracy"])["evaluation on shifted"].get_ydata() == pytest.approx(
        [0.1, 0.2, 0.3, 0.4]
    )
    assert (tmp_path / "sets.svg").read_text().startswith("<?xml")


def test_runs_are_compared_on_one_axis_each_in_its_colour():
    runs = {"small": build_history(3), "large": build_history(5)}
    shown = panels(plot_history(runs))
    assert list(shown) == ["Loss", "Learning rate"]
    assert texts(shown["Learning rate"]) == ["small", "large"]
    colours = {text: line.get_color() for text, line in lines(shown["Learning rate"]).items()}
    assert len(set(colours.values())) == 2
    for label, line in lines(shown["Loss"]).items():
        assert line.get_color() == colours[label.partition(",")[0]]
    for run, epochs in (("small", 3), ("large", 5)):
        assert any(text.startswith(f"{run}, evaluation, lowest") for text in texts(shown["Loss"]))
        assert len(lines(shown["Loss"])[f"{run}, training"].get_xdata()) == epochs
    assert texts(panels(plot_history(list(runs.values())))["Learning rate"]) == ["run 1", "run 2"]


def test_a_full_legend_covers_no_curve():
    axes = panels(plot_history({name: build_history(4) for name in "abc"}))["Loss"]
    legend = axes.get_legend().get_window_extent()
    for line in lines(axes).values():
        points = axes.transData.transform(list(zip(line.get_xdata(), line.get_ydata(), strict=True)))
        assert not any(legend.contains(*point) for point in points)


@pytest.mark.parametrize(
    "given",
    [
        build_history(4),
        {name: build_history(4) for name in "abcdefgh"},
        {"resnet50 with a warm-up of five epochs": build_history(4), "b": build_history(4)},
        with_groups(14),
        {"a": with_sets("far", "near"), "b": with_sets("far", "near")},
    ],
    ids=["one run", "eight runs", "a long name", "fourteen groups", "evaluation sets of two runs"],
)
def test_pictures_are_readable_at_600_pixels(given):
    figure = plot_history(given)
    figure.draw_without_rendering()
    pixels = 600 / figure.get_figwidth() / 72
    for axes in figure.axes:
        assert axes.xaxis.label.get_fontsize() * pixels > 11
        legend = axes.get_legend()
        if legend is not None:
            assert min(text.get_fontsize() for text in legend.get_texts()) * pixels > 9
            # What stands beside its panel would be cut, or lie on the next one.
            inner, box = axes.get_window_extent(), legend.get_window_extent()
            assert inner.y0 <= box.y0 and box.y1 <= inner.y1
            assert inner.x0 <= box.x0 and box.x1 <= inner.x1


def test_the_value_of_a_test_stands_in_the_legend():
    history = build_history(3)
    history.update_metric("evaluation_loss", 0.12345)
    assert "evaluate(): 0.1235" in texts(panels(plot_history(history))["Loss"])


def test_a_dark_picture_has_light_lines_and_words_on_a_dark_ground(tmp_path):
    from matplotlib.colors import to_rgb
    from matplotlib.text import Text

    def brightness(color):
        red, green, blue = to_rgb(color)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    histories = {f"run {number}": with_sets("a", "b", "c", "d") for number in range(7)}
    for given in (histories, with_sets("a", "b", "c", "d"), build_history(3, nan_epochs=(2,))):
        figure = plot_history(given, tmp_path / "dark.png", dark=True)
        corner = imread(tmp_path / "dark.png")[2, 2, :3]
        assert corner.max() < 0.2
        figure.draw_without_rendering()
        words = [text for text in figure.findobj(Text) if text.get_text()]
        assert min(brightness(text.get_color()) for text in words) > 0.7
        lines_of_all = [line for axes in figure.axes for line in axes.lines]
        # Of viridis the darkest is of a single group's rate, which has a colour of its own.
        assert min(brightness(line.get_color()) for line in lines_of_all) > 0.25
    plot_history(given, tmp_path / "light.png")
    assert imread(tmp_path / "light.png")[2, 2, :3].min() > 0.9


def test_a_word_beside_the_data_keeps_its_colour_in_the_dark():
    figure = Figure()
    axes = figure.subplots()
    coloured, plain = axes.text(0, 0, "box", color="orange"), axes.text(1, 1, "note")
    darken(figure)
    assert (coloured.get_color(), plain.get_color()) == ("orange", TEXT)


def test_dark_is_true_or_false():
    with pytest.raises(ConfigurationError, match=r"dark is 'yes', but must be one of \[False, True\]"):
        plot_history(build_history(2), dark="yes")


def test_later_stages_go_on_at_their_epochs():
    history = build_history(2)
    history.current_epoch, history.current_update = 3, 60
    history.update_metric("train_loss_epoch", 0.1)
    line = lines(panels(plot_history(history))["Loss"])["training"]
    assert list(line.get_xdata()) == [1, 2, 3]


@pytest.mark.parametrize(
    ("given", "message"),
    [([], "empty"), ([3], "has 3"), (3, "has 3"), ({"b": InMemoryRunHistory()}, "history b has no values")],
)
def test_what_is_no_history_is_refused(given, message):
    with pytest.raises(ConfigurationError, match=message):
        plot_history(given)


def test_runs_whose_names_begin_with_an_underscore_have_a_picture_without_a_legend():
    history = build_history(3)
    assert all(axes.get_legend() is None for axes in plot_history({"_a": history, "_b": history}).axes)
