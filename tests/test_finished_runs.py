"""What is done with a run: evaluated, drawn, converted, exported."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from runs import arrays

import compare
import convert
import evaluate
import export
import figures
from plif_jax import data, networks
from plif_jax.catalog import DATASETS
from plif_jax.config import Config
from plif_jax.errors import UserError
from plif_jax.training import checkpoint, evaluation, loop

pytestmark = pytest.mark.xdist_group("training")  # one worker: most begin from one run, `whole`


def test_evaluation_of_the_best_checkpoint_gives_the_run_s_best_accuracy(whole):
    config, result = whole
    figures = evaluation.evaluate(*checkpoint.load_network(config.run_dir), progress=False)
    assert figures["accuracy"] == result["best"]["test_accuracy"]
    assert figures["confusion"].sum() == figures["samples"] == 20
    assert all(0 <= rate <= 1 for rate in figures["firing_rates"].values())


def test_a_network_is_read_without_a_warning(whole, caplog):
    checkpoint.load_network(whole[0].run_dir)
    assert not caplog.records, "in a notebook they stand between the results"


def test_evaluation_on_one_device_takes_batches_that_fit_one(whole, monkeypatch):
    config, _ = whole
    sizes, run = [], evaluation.evaluation_calls
    monkeypatch.setattr(
        evaluation, "evaluation_calls", lambda config, *a: sizes.append(config.batch_size) or run(config, *a)
    )
    net = checkpoint.load_network(config.run_dir)[1]
    evaluation.evaluate(dataclasses.replace(config, batch_size=1024), net, progress=False)
    assert sizes == [16]


def test_evaluation_takes_whatever_the_network_holds(whole):
    config, result = whole
    net = checkpoint.load_network(config.run_dir)[1]
    for neuron in net.named_neurons().values():
        neuron.v_threshold = nnx.data(jnp.asarray(neuron.v_threshold))
    assert evaluation.evaluate(config, net, progress=False)["accuracy"] == result["best"]["test_accuracy"]


def test_a_still_image_is_shown_as_often_as_was_asked_for(settings):
    net = networks.MNISTNet(T=2, rngs=nnx.Rngs(0))
    with pytest.raises(UserError, match=r"^T is 3 in the settings, 2 in the network; set net\.T too"):
        evaluation.evaluate(settings(dataset_name="MNIST", channels=None, number_layer=None), net, progress=False)


def test_samples_of_another_number_of_timesteps_are_not_trained_on(settings, tmp_path):
    config = settings(log_dir_prefix=str(tmp_path))
    with pytest.raises(UserError, match="T is 4, but training and test frames have 3 and 3 steps; make them the same"):
        loop.train(dataclasses.replace(config, T=4), say=None, dataset=data.load(config))


def test_evaluate_prints_a_row_for_each_class(whole, capsys):
    config, result = whole
    evaluate.main([str(config.run_dir)])
    said = capsys.readouterr().out
    assert f"accuracy  {result['best']['test_accuracy']:.2%}" in said
    assert "class  accuracy  predicted as     0     1     2" in said
    rows = [line.split() for line in said.splitlines() if line[:2].strip().isdigit()]
    assert [row[0] for row in rows] == list("0123456789")
    assert sum(int(count) for row in rows for count in row[2:]) == 20


def test_every_class_has_a_name():
    names = {name: facts.class_names for name, facts in DATASETS.items()}
    assert {name: len(set(those)) for name, those in names.items()} == {n: f.classes for n, f in DATASETS.items()}
    assert names["DVS128Gesture"][9] == "air guitar" and names["MNIST"][9] == "9" and names["ASLDVS"][9] == "k"


def test_firing_rates_keep_the_order_of_the_layers(settings):
    net = networks.NMNISTNet(T=3, channels=2, number_layer=3, rngs=nnx.Rngs(0))
    figures = evaluation.evaluate(settings(number_layer=3), net, progress=False)
    assert list(figures["firing_rates"]) == ["conv.2", "conv.6", "conv.10", "fc.3", "fc.6"]


def test_a_run_leaves_as_weights_and_as_a_function(whole, tmp_path):
    pytest.importorskip("flatbuffers")
    config, _ = whole
    convert.main([str(config.run_dir), str(tmp_path / "weights.npz")])
    weights = np.load(tmp_path / "weights.npz")
    for name, array in arrays(config, "best").items():
        np.testing.assert_array_equal(weights[name], array)
    export.main([str(config.run_dir), str(tmp_path / "net.jax")])
    x = np.random.default_rng(0).poisson(1, (3, 2, 34, 34, 2)).astype(np.float32)
    rates = jax.export.deserialize((tmp_path / "net.jax").read_bytes()).call(x)
    np.testing.assert_allclose(rates, checkpoint.load_network(config.run_dir)[1](x), atol=1e-6)


def test_figures_are_drawn_of_a_run(whole, capsys):
    config, _ = whole
    figures.main([str(config.run_dir), "-sample", "19"])
    said = capsys.readouterr().out
    written = {path.name for path in (config.run_dir / "figures").iterdir()}
    assert written == {
        *("training.png", "neuron.png", "surrogate.png", "input.png", "input.gif", "firing_rates.png", "raster.png"),
        *("spike_maps.png", "confusion.png", "operations.txt"),
    }
    assert "sample 19 of 20: class 9, taken for" in said and "accumulates" in said
    with pytest.raises(UserError, match="-sample 20: the run tests on 20 samples; give 0 to 19"):
        figures.main([str(config.run_dir), "-sample", "20"])


def test_pictures_go_where_they_are_told(whole, tmp_path, capsys):
    config, _ = whole
    (tmp_path / "a file").touch()
    theirs = ["-reference", str(shutil.copytree(config.run_dir, tmp_path / "theirs" / config.run_name))]
    for main, more in ((figures.main, []), (compare.main, theirs)):
        with pytest.raises(UserError, match=r"a file.* cannot be written: .*\. Give another folder with -out"):
            main([str(config.run_dir), *more, "-out", str(tmp_path / "a file")])
    compare.main([str(config.run_dir), *theirs, "-out", str(tmp_path / "new" / "folder")])
    assert [path.name for path in (tmp_path / "new" / "folder").iterdir()] == ["compare.png"]


def test_what_is_no_run_or_lacks_its_curves_is_told_before_anything_is_drawn(whole, tmp_path):
    config, _ = whole
    with pytest.raises(UserError, match="its checkpoints are here, the run is"):
        figures.main([str(config.checkpoint_dir)])
    run = shutil.copytree(config.run_dir, tmp_path / "run")
    shutil.copytree(config.checkpoint_dir, tmp_path / "pt_run")
    (run / "metrics.jsonl").unlink()
    shutil.rmtree(run / "figures", ignore_errors=True)
    with pytest.raises(UserError, match=r"or its curves are gone: it has no metrics\.jsonl"):
        figures.main([str(run)])
    assert not (run / "figures").exists()


def test_damaged_settings_of_a_run_are_named(whole, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(whole[0].run_dir, run)
    (run / "config.json").write_text("{")
    for main, more in ((evaluate.main, []), (compare.main, ["-reference", str(tmp_path)])):
        with pytest.raises(UserError, match=rf"{run}/config\.json: not a run's settings: Expecting"):
            main([str(run), *more])


def test_an_epoch_s_figures_are_of_its_own_steps(whole):
    """Its loss, which starts near 1/10, does not add up over epochs."""
    last = whole[1]["last"]
    assert last["epoch"] == 2 and 0 < last["loss"] < 0.15 and 0 <= last["train_accuracy"] <= 1


def test_accuracy_per_class_is_of_the_samples_of_the_class(whole, monkeypatch):
    config, net = checkpoint.load_network(whole[0].run_dir)
    found = {"confusion": np.array([[3, 1], [0, 2]]), "spikes": dict.fromkeys(net.named_neurons(), 0.0)}
    monkeypatch.setattr(evaluation, "evaluation_calls", lambda *_: [()])
    monkeypatch.setattr(evaluation.step, "make_evaluate", lambda *_, **__: lambda *_: found)
    np.testing.assert_array_equal(evaluation.evaluate(config, net, progress=False)["per_class"], [3 / 4, 1])


def test_a_class_without_samples_has_no_accuracy(monkeypatch, capsys):
    figures = {"samples": 1, "accuracy": 1.0, "per_class": np.array([1.0] + [np.nan] * 9), "firing_rates": {}}
    figures["confusion"] = np.diag([1] + [0] * 9)
    monkeypatch.setattr(evaluate, "load_checkpoint", lambda *_: (Config(dataset_name="Digits"), None, "best"))
    monkeypatch.setattr(evaluate, "evaluate", lambda *_: figures)
    evaluate.main(["RUN"])
    printed = capsys.readouterr().out
    assert "nan" not in printed and " 9            -  " in printed


def test_a_sample_before_the_first_is_refused(whole):
    with pytest.raises(UserError, match="-sample -1: the run tests on 20 samples; give 0 to 19"):
        figures.main([str(whole[0].run_dir), "-sample", "-1"])


def test_weights_are_of_the_checkpoint_that_was_asked_for(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(convert, "load_network", lambda *given: asked.append(given) or (None, None))
    monkeypatch.setattr(convert.torch, "state_dict", lambda net: {"a": np.zeros(1)})
    for more, kind in (([], "best"), (["-checkpoint", "latest"], "latest")):
        convert.main([str(tmp_path), str(tmp_path / "x.npz"), *more])
        assert asked.pop() == (str(tmp_path), kind)
    with pytest.raises(UserError, match="-checkpoint best is of a run"):
        convert.main([str(tmp_path / "x.npz"), str(tmp_path / "y.npz"), "-checkpoint", "best"])


def test_frames_bring_their_own_timesteps_to_an_evaluation(settings):
    net = networks.NMNISTNet(T=9, channels=2, number_layer=1, rngs=nnx.Rngs(0))
    assert evaluation.evaluate(settings(), net, progress=False)["samples"] == 20


def test_a_drawn_sample_counts_once_in_the_means(whole, tmp_path, monkeypatch):
    def told(config, x):
        raise UserError(f"{len(x)} samples")

    monkeypatch.setattr(figures, "frames_for", told)
    with pytest.raises(UserError, match=r"^15 samples"):
        figures.main([str(whole[0].run_dir), "-sample", "19", "-out", str(tmp_path)])
