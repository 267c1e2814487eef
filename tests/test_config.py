"""Settings: the paper's command lines are understood, a mistake ends in one helpful line."""

import os
import runpy
from pathlib import Path

import numpy as np
import pytest

from plif_jax.catalog import DATASETS
from plif_jax.config import Config, UserError, expanded, load, parse
from plif_jax.data.dataset import default_cache_dir

ROOT = Path(__file__).parents[1]

STATIC = (
    "-init_tau 2.0 -use_max_pool -use_plif -device cuda:0 -dataset_name {} -log_dir_prefix LOGS -T 8 "
    "-max_epoch 1024 -detach_reset"
)
EVENTS = (
    "-init_tau 2.0 -use_max_pool -device cuda:0 -dataset_name {} -log_dir_prefix LOGS -T {} -max_epoch 1024 "
    "-detach_reset -channels 128 -number_layer {} -split_by number -normalization None -use_plif"
)


@pytest.mark.parametrize(
    "line, name",
    [(STATIC.format(n), f"{n}_init_tau_2.0_use_plif_True_use_max_pool_True_T_8_detach_reset_True")
     for n in ("MNIST", "FashionMNIST", "CIFAR10")]
    + [(EVENTS.format(n, T, layers), f"{n}_init_tau_2.0_use_plif_True_use_max_pool_True_T_{T}_c_128_n_{layers}"
        "_split_by_number_normalization_None_detach_reset_True")
       for n, T, layers in (("NMNIST", 10, 2), ("CIFAR10DVS", 20, 4), ("DVS128Gesture", 20, 5))],
)  # fmt: skip
def test_the_published_commands_give_the_authors_run_names(line, name):
    config = parse(line.split(), val_ratio=0.15)
    assert config.run_name == f"val_0.15_{name}"
    assert config.checkpoint_dir == Path("LOGS") / f"pt_val_0.15_{name}"
    assert parse(line.split()).run_name == name
    assert (config.batch_size, config.learning_rate, config.T_max, config.seed) == (16, 1e-3, 64, 2020)
    assert config.use_plif and config.use_max_pool and config.detach_reset and not config.alpha_learnable


def test_absent_switches_are_off_as_in_the_authors_program():
    config = parse(["-dataset_name", "MNIST", "-init_tau", "16"])
    assert not (config.use_plif or config.use_max_pool or config.detach_reset)
    assert config.run_name == "MNIST_init_tau_16.0_use_plif_False_use_max_pool_False_T_8_detach_reset_False"


def test_a_whole_number_names_the_run_as_its_flag_does():
    assert Config(dataset_name="MNIST", init_tau=2) == Config(dataset_name="MNIST", init_tau=2.0)
    assert "_init_tau_2.0_" in Config(dataset_name="MNIST", init_tau=2).run_name


def test_paths_and_numpys_numbers_are_taken_as_what_they_say():
    given = dict(init_tau=np.float64(2), seed=np.int64(3), use_plif=np.bool_(True), data_root=Path("data"))
    config = Config(dataset_name="MNIST", **given)
    assert config == Config(dataset_name="MNIST", init_tau=2.0, seed=3, use_plif=True, data_root="data")
    assert Config.from_json(config.to_json()) == config
    with pytest.raises(UserError, match="seed must be a whole number"):
        Config(dataset_name="MNIST", seed=np.datetime64(5, "ns"))


def test_without_a_home_it_is_said_what_to_give(monkeypatch):
    monkeypatch.delenv("PLIF_JAX_CACHE")
    assert default_cache_dir() == Path("~/.cache/plif_jax").expanduser()
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    with pytest.raises(UserError, match="no home folder is known: give a folder for data with -cache_dir or PLIF_JAX"):
        default_cache_dir()
    monkeypatch.setenv("PLIF_JAX_CACHE", "~nobody_here/cache")
    with pytest.raises(UserError, match="~nobody_here/cache: no such home folder is known"):
        default_cache_dir()


def test_a_folder_is_no_address():
    for given in ("gs://bucket/logs", Path("s3://bucket")):
        with pytest.raises(UserError, match="an address; give a folder"):
            expanded(given)


@pytest.mark.parametrize("spelling", (["-T", "5"], ["--T", "5"], ["-T=5"], ["--T=5"]))
def test_one_dash_or_two(spelling):
    assert parse(["-dataset_name", "MNIST", *spelling]).T == 5


def test_flags_win_over_the_file_and_the_file_over_defaults():
    config = parse(["-config", str(ROOT / "configs/nmnist.py"), "-channels", "4", "-use_plif", "false"], val_ratio=0.15)
    assert (config.dataset_name, config.channels, config.number_layer) == ("NMNIST", 4, 2)
    assert not config.use_plif and config.use_max_pool and config.val_ratio == 0.15


def test_another_data_set_than_the_files_has_its_own_paper_settings():
    file = ["-config", str(ROOT / "configs/nmnist_paper.py")]
    config = parse([*file, "-dataset_name", "CIFAR10DVS"])
    assert (config.T, config.channels, config.number_layer) == (20, 128, 4)
    assert parse([*file, "-dataset_name", "CIFAR10DVS", "-T", "10"]).T == 10


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "cifar10", "nmnist_paper", "cifar10dvs", "dvs128gesture"])
def test_a_config_of_the_paper_is_the_published_command(name):
    config = load(ROOT / "configs" / f"{name}.py")
    command = "-init_tau 2.0 -use_max_pool -use_plif -detach_reset -max_epoch 1024"
    assert config == parse([*command.split(), "-dataset_name", config.dataset_name])


def test_a_value_in_a_file_is_refused_with_the_file_s_name(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from plif_jax.config import Config\nconfig = Config(dataset_name='MNIST', T='10')\n"
    )
    with pytest.raises(UserError, match=r"-config .*mine\.py: -T '10': T must be a whole number"):
        load(tmp_path / "mine.py")


def test_settings_that_a_data_set_does_not_use_are_named():
    given = dict(normalization="max", split_by="time", number_layer=3, cifar10dvs_split="tebn", init_tau=3.0)
    assert Config(dataset_name="MNIST", **given).without_effect() == [
        *("number_layer", "split_by", "normalization", "cifar10dvs_split")
    ]
    assert Config(dataset_name="NMNIST", **given | {"number_layer": 1}).without_effect() == ["cifar10dvs_split"]
    assert Config(dataset_name="CIFAR10DVS", **given).without_effect() == []
    assert Config(dataset_name="MNIST").without_effect() == []


def test_every_data_set_has_a_config():
    assert {load(path).dataset_name for path in (ROOT / "configs").glob("*.py")} == set(DATASETS)


def test_data_may_lie_elsewhere():
    config = Config(dataset_name="Digits", data_root="a", cache_dir="b")
    assert config.elsewhere() == config
    assert config.elsewhere(cache_dir="c") == Config(dataset_name="Digits", data_root="a", cache_dir="c")


def test_settings_survive_json():
    config = Config(dataset_name="CIFAR10DVS", init_tau=3, val_ratio=0.2)
    assert Config.from_json(config.to_json()) == config


@pytest.mark.parametrize(
    "text, said",
    [
        (b'{"dataset_name": "\xff"}', "can't decode byte 0xff"),
        (b'{"dataset_name": "MNIST", "learning_rate": 1' + b"0" * 400 + b"}", "learning_rate must be below 2**63"),
        ('{"seed": 1' + "0" * 5000 + "}", "4300 digits"),
        ("[" * 100_000, "recursion"),
        ('{"dataset_name": "MNIST", "T": ' + "[" * 200 + "]" * 200 + "}", "]]]: T must be a whole number"),
        ('{"dataset_name": "MNIST", "init_tau": null}', "-init_tau None: init_tau must be a number"),
        ('{"dataset_name": "MNIST", "use_plif": 1}', "-use_plif 1: use_plif must be true or false"),
        ('{"dataset_name": "MNIST", "device": 0}', "-device 0: device must be a text"),
        ('{"a\\nb": 1}', r"no field 'a\nb'"),
        ("[1]", "not a run's settings but a list"),
    ],
    ids=["utf-8", "401 digits", "5001 digits", "deep", "nested", "null", "switch", "text", "unknown", "list"],
)
def test_settings_that_are_not_a_runs_are_answered_in_one_line(text, said):
    with pytest.raises(UserError) as error:
        Config.from_json(text)
    assert said in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "line, said",
    [
        ("-inti_tau 3", "unknown argument -inti_tau; did you mean -init_tau?"),
        ("-use_pilf", "did you mean -use_plif?"),
        ("-lr 1e-3", "unknown argument -lr; did you mean -learning_rate?"),
        ("-tau 4", "unknown argument -tau; did you mean -init_tau?"),
        ("-max 3", "unknown argument -max; did you mean -max_epoch?"),
        ("-T 1_0", "-T 1_0: T must be a whole number"),
        ("-init_tau 1_6.0", "-init_tau 1_6.0: init_tau must be a number"),
        ("-T=", "-T without a value: T must be a whole number"),
        ("-dataset_name NMNIST -init 16", "unknown argument -init; did you mean -init_tau?"),
        ("-dataset_name NMNIST --max=5", "unknown argument --max=5; "),
        ("-dataset_name NMNIST -T_mx 5", "unknown argument -T_mx; did you mean -T_max?"),
        ("-dataset_name NMNIST -learning_rate -1", "-learning_rate -1.0: learning_rate must be above 0"),
        ("-dataset_name NMNIST -learning_rate -1e-3", "-learning_rate -0.001: learning_rate must be above 0"),
        ("-dataset_name NMIST", "did you mean NMNIST?"),
        ("-dataset_name NMNIST -init_tau 1", "-init_tau 1.0: init_tau must be above 1"),
        ("-dataset_name mnist", "did you mean MNIST?"),
        ("-dataset_name NMNIST -init_tau nan", "-init_tau nan: init_tau must be finite"),
        ("-dataset_name NMNIST -init_tau inf", "-init_tau inf: init_tau must be finite"),
        ("-dataset_name NMNIST -init_tau two", "init_tau must be a number"),
        ("-dataset_name NMNIST -T 0", "-T 0: T must be at least 1"),
        ("-dataset_name NMNIST -init_tau 1e31", "init_tau must be below 1e+30"),
        (f"-dataset_name NMNIST -T {2**31}", "T must be below 2147483648"),
        ("-dataset_name NMNIST -T 2.5", "T must be a whole number"),
        ("-dataset_name NMNIST -channels 0", "channels must be at least 1"),
        ("-dataset_name NMNIST -number_layer 6", "can be halved 5 times; give 1 to 5"),
        ("-dataset_name NMNIST -channels 1 -number_layer 5", "give more channels or fewer layers"),
        ("-dataset_name NMNIST -split_by frame", "split_by must be one of number, time"),
        ("-dataset_name NMNIST -normalization L2", "one of frequency, max, norm, sum, None"),
        ("-dataset_name NMNIST -use_plif maybe", "give nothing, true or false"),
        ("-dataset_name NMNIST -val_ratio 1.5", "below 1"),
        ("-dataset_name NMNIST -seed -1", "at least 0"),
        (f"-dataset_name NMNIST -seed {'9' * 400}", "seed must be below 2**63, not a number of 1329 bits"),
        (f"-dataset_name NMNIST -T {'9' * 5000}", "T must be a whole number"),
        ("-dataset_name NMNIST -init_tau None", "-init_tau None: init_tau must be a number"),
        ("-dataset_name NMNIST -T", "expected one argument"),
        ("", "-dataset_name is not given; it is one of MNIST"),
        ("-dataset_name NMNIST -T_max 10000000000", "T_max must be below 2147483648"),
        ("-config nowhere.py", "nowhere.py: no such file"),
        ("-config /", "-config /: a folder; give one of the files in it"),
        ("-dataset_name MNIST extra", "unknown argument extra"),
    ],
    ids=lambda text: text[:60],
)
def test_a_mistake_is_answered_in_one_line(line, said):
    with pytest.raises(UserError) as error:
        parse(line.split())
    assert said in str(error.value) and "\n" not in str(error.value)


def test_a_mistake_of_several_lines_is_too():
    with pytest.raises(UserError, match=r"^unknown argument a b; -h lists the flags$"):
        parse(["a\nb"])


@pytest.mark.parametrize(
    "script, ratio, said", [("train", "0.15", "use train_val.py"), ("train_val", "None", "which train.py trains")]
)
def test_each_protocol_has_its_script(script, ratio, said):
    main = runpy.run_path(str(ROOT / "experiments" / f"{script}.py"))["main"]
    with pytest.raises(UserError, match=said):
        main(["-dataset_name", "Digits", "-val_ratio", ratio])


@pytest.mark.parametrize(
    "text, said",
    [("config = 1", "defines no `config"), ("import nothing_such", "ModuleNotFoundError"), ("(", "SyntaxError")],
)
def test_a_broken_config_file_is_named(tmp_path, text, said):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=said) as error:
        parse(["-config", str(path)])
    assert "mine.py" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "said"), [("import sys\nsys.exit()", "c.py: SystemExit"), ("raise ValueError('a\\nb')", "ValueError: a")]
)
def test_a_configuration_that_does_not_run_is_told_in_a_line(tmp_path, text, said):
    (tmp_path / "c.py").write_text(text)
    with pytest.raises(UserError) as error:
        parse(["-config", str(tmp_path / "c.py")])
    assert str(error.value).endswith(said)


def test_a_switch_is_on_however_its_true_is_written():
    assert parse(["-dataset_name", "MNIST", "-use_plif", "True"]).use_plif


def test_a_seed_fits_what_draws_from_it():
    with pytest.raises(UserError, match="-seed 4294967296: seed must be below 4294967296"):
        parse(["-dataset_name", "MNIST", "-seed", str(2**32)])


def test_a_network_may_be_as_narrow_as_its_linear_layer_allows():
    assert Config(dataset_name="NMNIST", channels=1, number_layer=4).channels == 1
