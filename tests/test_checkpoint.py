"""Checkpoints by themselves: written beside the training, kept, examined, and mended where they can be."""

import dataclasses
import errno
import shutil
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from plif_jax.config import Config
from plif_jax.errors import UserError
from plif_jax.training import checkpoint

CONFIG = Config(dataset_name="Digits")


def state_of(step):
    """A small state on a device."""
    return {"kernel": jnp.full((300, 300), float(step)), "step": jnp.int32(step)}


def fill(folder, steps=(5, 10, 15, 20), scores=None):
    """Saves a checkpoint at each of the steps."""
    best = {"score": -1}
    with checkpoint.Checkpoints(folder, CONFIG) as checkpoints:
        for step, score in zip(steps, scores or [0.5] * len(steps), strict=True):
            if score >= best["score"]:
                best = {"epoch": step // 5, "score": score}
            checkpoints.save(state_of(step), {"epoch": step // 5, "best": best}, score)


def restored(folder):
    """(step of the checkpoint that a run would continue from, what it says)."""
    said = []
    with checkpoint.Checkpoints(folder, CONFIG, said.append) as checkpoints:
        found = checkpoints.restore(state_of(0))
    return found and int(found[0]["step"]), said


def kept(folder):
    return sorted(int(path.name) for path in folder.glob("[0-9]*"))


def test_saving_does_not_wait_and_later_steps_do_not_reach_it(tmp_path, monkeypatch):
    save = ocp.CheckpointManager.save

    def slow_save(*args, **kwargs):
        time.sleep(1)
        return save(*args, **kwargs)

    monkeypatch.setattr(ocp.CheckpointManager, "save", slow_save)
    train = jax.jit(lambda state: jax.tree.map(lambda leaf: leaf + 1, state), donate_argnums=0)
    with checkpoint.Checkpoints(tmp_path, CONFIG) as checkpoints:
        progress, state = {"epoch": 1, "best": {"epoch": 1, "score": 0.5}}, train(train(state_of(3)))
        began = time.perf_counter()
        checkpoints.save(state, progress, 0.5)
        assert time.perf_counter() - began < 0.5
        for _ in range(3):  # in the memory of the state that is being saved, as far as JAX may take it
            state = train(state)
        jax.block_until_ready(state)
        progress["best"]["epoch"] = 2
        assert not kept(tmp_path)
        checkpoints.wait()
        found, then = checkpoints.restore(state_of(0))
    assert (found["kernel"] == 5).all() and int(found["step"]) == 5 and then["best"]["epoch"] == 1


def test_kept_are_the_last_two_the_best_and_timed_ones(tmp_path, monkeypatch):
    scores = [0.1, 0.9, 0.2, 0.3, 0.4, 0.4]
    fill(tmp_path / "few", range(1, 7), scores)
    assert kept(tmp_path / "few") == [1, 2, 5, 6]  # four hours begin with the first
    fill(tmp_path / "equal", range(1, 7), [0.1, 0.9, 0.9, 0.2, 0.3, 0.4])
    assert kept(tmp_path / "equal") == [1, 3, 5, 6]  # of equals the later
    monkeypatch.setattr(checkpoint, "KEEP_EVERY_SECONDS", 1e-6)
    fill(tmp_path / "timed", range(1, 7), scores)
    assert kept(tmp_path / "timed") == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name, refused", [("MNIST", False), ("NMNIST", True)])
def test_settings_of_event_networks_may_differ_for_images(tmp_path, name, refused):
    config = Config(dataset_name=name)
    with checkpoint.Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.save(state_of(5), {}, 0.5)
    other = dataclasses.replace(config, channels=3, number_layer=1, split_by="time", normalization="max")
    with checkpoint.Checkpoints(tmp_path, other) as checkpoints:
        if refused:
            with pytest.raises(UserError, match="channels was 128, is 3; number_layer was 2, is 1"):
                checkpoints.restore(state_of(0))
        else:
            assert int(checkpoints.restore(state_of(0))[0]["step"]) == 5
    other = dataclasses.replace(config, cifar10dvs_split="tebn")
    with checkpoint.Checkpoints(tmp_path, other) as checkpoints:
        assert int(checkpoints.restore(state_of(0))[0]["step"]) == 5


def test_a_folder_that_orbax_cannot_read_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"runs\[1\]/x: give a -log_dir_prefix without [\[\]]"):
        checkpoint.Checkpoints(tmp_path / "runs[1]" / "x", CONFIG)
    with pytest.raises(UserError, match=r"l\\udcc3\\udcb6gs': give a -log_dir_prefix in UTF-8"):  # ö without UTF-8
        checkpoint.Checkpoints(tmp_path / "l\udcc3\udcb6gs", CONFIG)


def test_where_files_cannot_be_locked_that_is_said(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(checkpoint.fcntl, "flock", refuse)
    with pytest.raises(UserError, match=r"cannot be locked \(Function not implemented\); give another -log_dir_prefix"):
        checkpoint.Checkpoints(tmp_path, CONFIG)


def test_what_a_killed_program_had_begun_to_write_is_removed(tmp_path):
    (tmp_path / "5.orbax-checkpoint-tmp").mkdir()
    with checkpoint.Checkpoints(tmp_path, CONFIG):
        assert not list(tmp_path.glob("*tmp*"))


def test_folders_that_only_look_like_checkpoints_are_left_alone(tmp_path):
    fill(tmp_path, (5, 10))
    (tmp_path / "0007").mkdir()
    with checkpoint.Checkpoints(tmp_path, CONFIG):
        assert (tmp_path / "0007").is_dir()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The settings of a run without checkpoints; of one it would have, no arrays are read."""
    config = dataclasses.replace(CONFIG, log_dir_prefix=str(tmp_path))
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(config.to_json())
    monkeypatch.setattr(checkpoint, "_read_state", lambda path, template: template)
    return config


def test_a_best_checkpoint_that_is_gone_is_not_another(run, capsys):
    fill(run.checkpoint_dir, (5, 10, 15), [0.9, 0.2, 0.7])

    def loaded(kind):
        return checkpoint.load_checkpoint(run.run_dir, kind)[2], capsys.readouterr().out

    assert loaded("best") == ("best checkpoint", "") and loaded("latest") == ("latest checkpoint", "")
    shutil.rmtree(run.checkpoint_dir / "5")
    lost = "the checkpoint of the best epoch, 1, is gone"
    for _ in range(2):  # every time
        what, said = loaded("best")
        assert what == "checkpoint of step 15, not the best epoch's"
        assert said == f"{lost}; this is the best that is left, of step 15\n"
    assert loaded("latest") == ("latest checkpoint", "")
    _, (said,) = restored(run.checkpoint_dir)
    assert said.startswith(lost)


@pytest.mark.parametrize("seal", ["{}", "[" * 100_000, '{"state/a": 1'])
def test_a_seal_that_says_nothing_is_damage(tmp_path, seal):
    fill(tmp_path, (5, 10))
    (tmp_path / "10" / checkpoint.SEAL).write_text(seal)
    step, (said,) = restored(tmp_path)
    assert step == 5 and "checkpoint of step 10 is damaged (its seal" in said and "using that of step 5" in said


@pytest.mark.parametrize(
    "note",
    [b"", b"{", b"[]", b'{"commit_timestamp_nsecs": "now"}', b'{"htem_handlers": 1, "custom_metadata": {"a": 1}}'],
)
def test_a_damaged_note_of_the_time_costs_nothing(tmp_path, note):
    """Orbax writes it after the seal."""
    fill(tmp_path, steps=(5, 10))
    (tmp_path / "10" / "_CHECKPOINT_METADATA").write_bytes(note)
    assert restored(tmp_path) == (10, [])


def test_only_what_matters_is_said_of_old_checkpoints(tmp_path):
    fill(tmp_path, (5, 10, 15), [0.1, 0.8, 0.9])
    (tmp_path / "5" / "record" / "metadata").unlink()  # as a program leaves it that is killed while it removes it
    assert restored(tmp_path) == (15, []) and kept(tmp_path) == [10, 15]
    (tmp_path / "10" / "record" / "metadata").write_bytes(b"{}")
    step, (said,) = restored(tmp_path)
    assert step == 15 and "checkpoint of step 10 is damaged" in said and "using" not in said
    assert (tmp_path / "damaged_10").is_dir()


def test_a_network_is_loaded_past_damage_and_that_is_said(run, monkeypatch, capsys):
    fill(run.checkpoint_dir, (5, 10))
    (run.checkpoint_dir / "10" / "record" / "metadata").write_bytes(b"")
    monkeypatch.setattr(checkpoint, "_read_state", lambda path, template: pytest.fail(path.name))
    with pytest.raises(pytest.fail.Exception, match=r"^5$"):
        checkpoint.load_network(run.run_dir, "latest")
    assert "checkpoint of step 10 is damaged" in capsys.readouterr().out
    monkeypatch.chdir(run.run_dir)
    with pytest.raises(pytest.fail.Exception, match=r"^5$"):
        checkpoint.load_network(".", "latest")
    with pytest.raises(UserError, match="no 'newest' checkpoint; give best or latest"):
        checkpoint.load_network(".", "newest")


@pytest.mark.parametrize("removed", ["the whole", "its arrays"])
def test_a_network_is_loaded_though_the_run_removes_its_checkpoint_meanwhile(tmp_path, monkeypatch, removed):
    config = dataclasses.replace(CONFIG, log_dir_prefix=str(tmp_path))
    config.run_dir.mkdir()
    (config.run_dir / "config.json").write_text(config.to_json())
    fill(config.checkpoint_dir, (5, 10), scores=(0.9, 0.5))
    examined, read, reached = checkpoint.examined, checkpoint._read_state, []

    def then_removed(folder):
        found = examined(folder)
        shutil.rmtree(folder / "5" / ("" if removed == "the whole" else "state/d"), ignore_errors=True)
        return found

    def read_or_fail(path, template):
        reached.append(path.name)
        return read(path, state_of(5)) if path.name == "5" else pytest.fail(path.name)

    monkeypatch.setattr(checkpoint, "examined", then_removed)
    monkeypatch.setattr(checkpoint, "_read_state", read_or_fail)
    with pytest.raises(pytest.fail.Exception, match=r"^10$"):
        checkpoint.load_network(config.run_dir)
    assert reached == (["10"] if removed == "the whole" else ["5", "10"])


def test_a_step_saved_again_replaces_what_was_saved(tmp_path):
    with checkpoint.Checkpoints(tmp_path, CONFIG) as checkpoints:
        checkpoints.save(state_of(5), {"epoch": 0}, -1.0)
        checkpoints.save(state_of(5), {"epoch": 1}, 0.5)
        checkpoints.wait()
        assert checkpoints.restore(state_of(0))[1] == {"epoch": 1}
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["5"]


def test_a_step_killed_while_it_is_saved_again_is_kept(tmp_path, monkeypatch):
    fill(tmp_path, [5, 10])
    checkpoints = checkpoint.Checkpoints(tmp_path, CONFIG)
    monkeypatch.setattr(checkpoints._manager, "save", lambda *_, **__: None)  # the program is killed here
    checkpoints.save(state_of(10), {"epoch": 3}, 0.5)
    checkpoints._writing.result()
    checkpoints._lock.close()
    assert kept(tmp_path) == [5] and [path.name for path in checkpoint.examined(tmp_path)[0]] == ["replaced_10", "5"]
    assert restored(tmp_path) == (10, [])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == ["10", "5"]


@pytest.mark.parametrize("damaged", [False, True])
def test_what_was_put_by_goes_once_the_other_is_sound(tmp_path, damaged):
    fill(tmp_path, [10])
    shutil.copytree(tmp_path / "10", tmp_path / "replaced_10")
    if damaged:  # by a power cut, say
        (tmp_path / "10" / "record" / "metadata").write_text("{}")
    (tmp_path / "replaced_10" / "old").touch()
    assert restored(tmp_path) == (10, [])
    assert (tmp_path / "10" / "old").exists() == damaged and not (tmp_path / "replaced_10").exists()


@pytest.mark.parametrize(
    "error, says", [(OSError(errno.ENOSPC, "No space left"), "No space left"), (OSError(), "OSError")]
)
def test_a_folder_is_free_after_a_save_that_failed(tmp_path, monkeypatch, error, says):
    def full(*_, **__):
        raise error

    with pytest.raises(UserError, match=says) as kept, checkpoint.Checkpoints(tmp_path, CONFIG) as checkpoints:
        monkeypatch.setattr(checkpoints._manager, "save", full)
        checkpoints.save(state_of(10), {"epoch": 3}, 0.5)
    del checkpoints
    assert restored(tmp_path)[0] is None and kept  # which, as a notebook does, keeps all that it came through

    def damaged(self):
        raise PermissionError("not yours")

    monkeypatch.setattr(checkpoint.Checkpoints, "_set_damaged_aside", damaged)
    with pytest.raises(PermissionError) as kept:
        checkpoint.Checkpoints(tmp_path, CONFIG)
    monkeypatch.undo()
    assert restored(tmp_path)[0] is None and kept


def test_a_step_that_cannot_be_saved_again_is_still_the_last_good_one(tmp_path, monkeypatch):
    fill(tmp_path, [10])
    checkpoints = checkpoint.Checkpoints(tmp_path, CONFIG)

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoints._manager, "save", full)
    checkpoints.save(state_of(10), {"epoch": 3}, 0.5)
    with pytest.raises(UserError, match=r"No space left on device.*; the last good one is of step 10"):
        checkpoints.wait()
    checkpoints.wait()
    checkpoints._lock.close()
    assert restored(tmp_path) == (10, [])


def test_a_run_does_not_go_on_with_another_learning_rate(tmp_path):
    fill(tmp_path, [5])
    other = dataclasses.replace(CONFIG, T_max=32)
    with (
        checkpoint.Checkpoints(tmp_path, other) as checkpoints,
        pytest.raises(UserError, match="T_max was 64, is 32"),
    ):
        checkpoints.restore(state_of(0))


@pytest.fixture
def asked(monkeypatch):
    """The steps whose checkpoints are read; reading ends there."""
    steps = []

    def read(path, template):
        steps.append(int(path.name))
        raise UserError("enough")

    monkeypatch.setattr(checkpoint, "_read_state", read)
    return steps


def test_of_equal_scores_the_later_is_the_best(run, asked):
    fill(run.checkpoint_dir, (5, 10))
    with pytest.raises(UserError):
        checkpoint.load_network(run.run_dir)
    assert asked[0] == 10


def test_a_run_is_read_through_a_link(run, tmp_path, asked):
    fill(run.checkpoint_dir, [5])
    (tmp_path / "link").symlink_to(run.run_dir)
    with pytest.raises(UserError):
        checkpoint.load_network(tmp_path / "link")
    assert asked == [5]


def unsealed(folder):
    (folder / checkpoint.SEAL).unlink()


def damaged_progress(folder):
    (folder / "metrics" / "metrics").write_text("{")


@pytest.mark.parametrize("damage", [unsealed, damaged_progress])
def test_a_last_checkpoint_without_its_seal_or_progress_is_damaged_and_kept(tmp_path, damage):
    fill(tmp_path, (5, 10))
    damage(tmp_path / "10")
    step, (said,) = restored(tmp_path)
    assert step == 5 and "checkpoint of step 10 is damaged" in said and (tmp_path / "damaged_10").is_dir()
