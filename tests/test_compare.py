import dataclasses
import json

import pytest
from tensorboardX import SummaryWriter

import compare
from plif_jax import curves
from plif_jax.analysis import reference
from plif_jax.config import Config
from plif_jax.curves import figure
from plif_jax.errors import UserError

SETTINGS = dict(dataset_name="CIFAR10", use_plif=True, use_max_pool=True, detach_reset=True)
ACCURACY = [(epoch, 0.5 + 0.01 * epoch) for epoch in range(40)]
W = [(3125 * (epoch + 1), -0.05 * epoch) for epoch in range(40)]


def write_csv(folder, run_name, tag, points):
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"{1.6e9 + step},{step},{value}" for step, value in points]
    path = folder / f"run-{run_name}-tag-{tag}.csv"
    path.write_text("\n".join(["Wall time,Step,Value", *lines]) + "\n")
    return path


@pytest.fixture
def published(tmp_path):
    """Published curves as CSV: PLIF, LIF, and accuracy-B."""
    folder, config = tmp_path / "published", Config(**SETTINGS)
    write_csv(folder / "CIFAR10", config.run_name, "test_accuracy", ACCURACY)
    write_csv(folder / "CIFAR10" / "w", config.run_name, "w0", W)
    write_csv(folder / "CIFAR10", Config(**SETTINGS | {"use_plif": False}).run_name, "test_accuracy", ACCURACY[:3])
    (folder / "accuracy_B").mkdir()
    (folder / "accuracy_B" / "CIFAR10.csv").write_text("epoch,val_accuracy,test_accuracy,seconds\n0,0.44,0.47,486\n")
    return folder


@pytest.fixture
def run(tmp_path):
    """A run folder of ten epochs, better than the published run by one point, its w 0.5 higher."""
    config = Config(**SETTINGS, log_dir_prefix=str(tmp_path / "logs"))
    config.run_dir.mkdir(parents=True)
    (config.run_dir / "config.json").write_text(config.to_json())
    points = [("test_accuracy", step, value + 0.01) for step, value in ACCURACY[:10]]
    points += [("w0", 10 * (epoch + 1), w + 0.5) for epoch, (_, w) in enumerate(W[:10])]
    lines = [json.dumps({"tag": tag, "step": step, "value": value, "time": 0.0}) for tag, step, value in points]
    (config.run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return config.run_dir


def test_the_curve_of_the_same_settings_is_found(published):
    found = reference.load(published, Config(**SETTINGS))
    assert found.metrics == {"test_accuracy": ACCURACY, "w0": W} and found.differences == []
    lif = reference.load(published, Config(**SETTINGS | {"use_plif": False}))
    assert lif.metrics == {"test_accuracy": ACCURACY[:3]}
    b = reference.load(published, Config(**SETTINGS, val_ratio=0.15))
    assert b.metrics == {"val_accuracy": [(0, 0.44)], "test_accuracy": [(0, 0.47)]}


def test_settings_that_differ_are_named(published):
    found = reference.load(published, Config(**SETTINGS, T=4, train_samples=100))
    assert found.differences == ["T is 4, theirs 8", "train_samples is 100, theirs None"]
    with pytest.raises(UserError, match=r"no curves of a run like MNIST_init_tau_2.*; its data sets are CIFAR10$"):
        reference.load(published, Config(**SETTINGS | {"dataset_name": "MNIST"}))
    others = "its CIFAR10 runs have use_plif False, init_tau 2.0, use_max_pool True; use_plif True, init_tau 2.0, "
    with pytest.raises(UserError, match=others):
        reference.load(published, Config(**SETTINGS, init_tau=16.0))
    nothing = published / "nothing"
    nothing.mkdir()
    with pytest.raises(UserError, match="holds no curves of another run; give a folder"):
        reference.load(nothing, Config(**SETTINGS))


@pytest.fixture
def event_file(tmp_path):
    """A TensorBoard event file, written by tensorboardX, of an event data set's run; its second half continues."""
    config = Config(**SETTINGS | {"dataset_name": "NMNIST"})
    folder = tmp_path / "events" / config.run_name
    with SummaryWriter(str(folder)) as writer:
        for epoch, value in ACCURACY[:3]:
            writer.add_scalar("test_accuracy", value, epoch, walltime=epoch)
        writer.add_scalar("test_accuracy", 0.75, 2, walltime=100)
    return next(folder.iterdir())


def test_event_files_are_read(event_file):
    found = reference.load(event_file.parents[1], Config(**SETTINGS | {"dataset_name": "NMNIST"}))
    assert found.metrics == {"test_accuracy": [(0, 0.5), (1, pytest.approx(0.51)), (2, 0.75)]}


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: data[:60] + b"?" + data[61:]])
def test_damaged_event_files_are_named(event_file, damage):
    event_file.write_bytes(damage(event_file.read_bytes()))
    with pytest.raises(UserError, match=rf"{event_file.name} is damaged \(.*byte \d+"):
        reference.read([event_file])


@pytest.mark.parametrize("row", ["1", "1,2", "1,x,0.5", "1,2,", "1,2,0.5x"])
def test_damaged_csv_files_are_named(tmp_path, row):
    path = write_csv(tmp_path, Config(**SETTINGS).run_name, "test_accuracy", ACCURACY)
    path.write_text(path.read_text() + row)
    with pytest.raises(UserError, match=r"is damaged .* fetch it again"):
        reference.read([path])


def test_epochs_count_from_one():
    ours, theirs = [(0, 0.1), (1, 0.2), (4, 0.3), (6, 0.4)], [(0, 0.5), (4, 0.7), (6, 0.8), (7, 0.9)]
    assert reference.differences_at(ours, theirs) == [(1, 0.1, 0.5), (5, 0.3, 0.7), (7, 0.4, 0.8)]


def test_compare_prints_and_draws(run, published, capsys):
    compare.main([str(run), "--reference", str(published)])
    printed = capsys.readouterr().out
    for line in ("after     1      51.00%   50.00%       +1.00", "after    10      60.00%   59.00%       +1.00"):
        assert line in printed
    # tau = 1 + exp(-w): w is -0.45 + 0.5 after ten epochs of 10 steps, theirs -0.45 after ten of 3125.
    assert [line for line in printed.splitlines() if "w of" in line or line.endswith(("1.607    2.000", "2.568"))] == [
        "w of layer 1       ours   theirs  difference   tau: ours   theirs",
        "after     1       0.500    0.000      +0.500       1.607    2.000",
        "after    10       0.050   -0.450      +0.500       1.951    2.568",
    ]
    assert (run / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "note:" not in printed
    (run / "result.json").write_text(json.dumps({"samples": {"train": 850, "val": 150, "test": 10000}}))
    compare.main([str(run), "-reference", str(published)])
    assert "note:  of 50000 samples for training ours had 1000\n\n" in capsys.readouterr().out


def test_layers_of_a_deeper_network_are_not_taken_for_one_another(run, published, capsys):
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"tag": "w1", "step": 10, "value": 0.0, "time": 0.0}) + "\n")
    compare.main([str(run), "-reference", str(published)])
    printed = capsys.readouterr().out
    assert "note:  2 layers have a w, theirs 1: they are not" in printed and "w of layer" not in printed
    assert "after    10      60.00%" in printed


def test_theirs_starts_from_the_same_tau(run, published, monkeypatch):
    drawn = []
    monkeypatch.setattr(compare, "run_title", lambda fig, name: drawn.extend(fig.axes))
    compare.main([str(run), "-reference", str(published)])
    ours, theirs = drawn[1].lines
    assert ours.get_xydata()[0].tolist() == theirs.get_xydata()[0].tolist() == [0, 2]
    assert len(ours.get_xydata()) == len(theirs.get_xydata()) == 11


def test_what_only_looks_like_a_time_constant_is_none():
    metrics = {"": [(1, 0.0)], "w²": [(1, 0.0)], "w" + "1" * 5000: [(1, 0.0)], "w0": [], "w1": [(0, 0.0)], "w2": W}
    assert curves.w_tags(metrics) == ["w2"]
    assert curves.infer_steps_per_epoch(metrics) == 3125


def test_settings_that_cannot_be_read_are_not_called_missing(run, published):
    (run / "config.json").unlink()
    (run / "config.json").mkdir()
    with pytest.raises(UserError, match=r"config\.json: Is a directory"):
        compare.main([str(run), "-reference", str(published)])


def test_one_epoch_is_drawn_as_a_point(tmp_path, monkeypatch):
    drawn, one = {}, {"test_accuracy": [(0, 0.5)], "w0": [(10, 0.1)]}
    monkeypatch.setattr(compare, "figure", lambda *args, **kwargs: drawn.setdefault("figure", figure(*args, **kwargs)))
    name = f"val_0.15_{Config(**SETTINGS | {'dataset_name': 'DVS128Gesture'}).run_name}"
    compare.draw(one, {"test_accuracy": ACCURACY, "w0": W}, 2.0, name, tmp_path / "compare.png")
    fig, axes = drawn["figure"]
    assert all(line.get_marker() not in ("", "None") for ax in axes.flat for line in ax.lines)
    fig.set_figwidth(6.4)
    curves.run_title(fig, name)
    over = fig._suptitle.get_window_extent()
    assert over.x0 > 0 and over.x1 < fig.bbox.width
    title = fig._suptitle.get_text()
    assert title.replace("\n", "") == name
    assert [line.split("_")[0] for line in title.split("\n")] == ["val", "use", "split"]  # no value begins one


def test_compare_explains_what_is_missing(run, published, tmp_path):
    with pytest.raises(UserError, match="is not the folder of a run"):
        compare.main([str(tmp_path), "--reference", str(published)])
    (run / "result.json").write_text('{"samples": {}}')
    assert compare.parts_used(run, Config(**SETTINGS)) == []
    (run / "metrics.jsonl").write_text('{"tag": "test_accuracy", "step": 0, "value": 0.5, "time": 0}')
    (run / "config.json").rename(run / "elsewhere.json")
    with pytest.raises(UserError, match=r"is not the folder of a run: it has no config\.json"):
        compare.main([str(run), "--reference", str(published)])
    (run / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="has no test accuracy yet"):
        compare.main([str(run), "--reference", str(published)])


def test_where_no_epoch_is_in_common_it_says_so(run, published, capsys):
    (run / "metrics.jsonl").write_text('{"tag": "test_accuracy", "step": 2000, "value": 0.5, "time": 0}')
    compare.main([str(run), "--reference", str(published)])
    assert "no epoch has a test accuracy both here and there" in capsys.readouterr().out


def test_another_test_set_or_fewer_tests_are_told():
    ours = Config(**SETTINGS | {"dataset_name": "CIFAR10DVS", "cifar10dvs_split": "tebn", "eval_every": 50})
    assert reference.differences(ours, ours.run_name) == [
        "cifar10dvs_split is tebn, theirs paper",
        "eval_every is 50, theirs 1",
    ]


def test_of_a_run_of_this_program_the_settings_are_known(run):
    ours = Config.of_run(run)
    write_csv(run, ours.run_name, "test_accuracy", ACCURACY)
    with pytest.raises(UserError, match="holds no curves of another run"):  # but those of the run itself
        compare.main([str(run), "-reference", str(run.parent)])
    theirs = dataclasses.replace(ours, learning_rate=0.003, seed=1)
    assert reference.load(run.parent, theirs).differences == [
        "learning_rate is 0.003, theirs 0.001",
        f"seed is 1, theirs {ours.seed}",
    ]
    (run / "config.json").write_text(theirs.to_json())
    assert reference.load(run.parent, theirs).differences == []
    (run / "config.json").write_text("{bad")
    with pytest.raises(UserError, match=r"config\.json"):
        reference.load(run.parent, theirs)


def test_curves_are_found_from_within_their_folder(published, monkeypatch):
    monkeypatch.chdir(published / "accuracy_B")
    assert list(reference.find(".")) == [reference.accuracy_b_name("CIFAR10")]
    with pytest.raises(UserError, match="nowhere is not a folder: give the one with the published curves"):
        reference.find("nowhere")


def test_a_run_that_was_run_twice_is_not_mixed(tmp_path):
    config = Config(**SETTINGS)
    for seed in ("seed_1", "seed_2"):
        with SummaryWriter(str(tmp_path / seed / config.run_name)) as writer:
            writer.add_scalar("test_accuracy", 0.5, 0)
    with pytest.raises(UserError, match=rf"run more than once: give one of .*seed_1/{config.run_name}, .*seed_2/"):
        reference.load(tmp_path, config)
    assert reference.load(tmp_path / "seed_1", config).metrics == {"test_accuracy": [(0, 0.5)]}


def test_of_a_step_in_several_files_the_last_written_counts(tmp_path):
    paths = []
    for i, (time, value) in enumerate([(200, 0.75), (100, 0.5)]):
        paths.append(tmp_path / str(i) / f"run-{Config(**SETTINGS).run_name}-tag-test_accuracy.csv")
        paths[i].parent.mkdir()
        paths[i].write_text(f"Wall time,Step,Value\n{time},0,{value}\n")
    assert reference.read(paths) == {"test_accuracy": [(0, 0.75)]}
