"""Curves on disk: read past damage, counted against the checkpoint, set aside where they are of another run."""

import json

import numpy as np
import pytest

from plif_jax.errors import UserError
from plif_jax.training import logs


def test_damaged_lines_cost_no_others_and_the_count_stays(tmp_path):
    written = logs.Logs(tmp_path)
    for step in range(6):
        written.add("train_loss", step / 8, step)
    path = tmp_path / logs.FILE
    lines = path.read_bytes().splitlines()
    lines[1] = b'{"tag": "tr\xff'
    path.write_bytes(b"\n".join(lines[:5]) + b"\n" + lines[5][:9])  # and the last is half a line
    with pytest.raises(
        UserError, match=r"is damaged in line 2 .*; the command that trained the run leaves the line out"
    ):
        logs.read_metrics(tmp_path)
    said = []
    continued = logs.Logs(tmp_path, 5, said.append)
    assert len(said) == 1 and "1 of 5 points are lost" in said[0]
    assert continued.points == 5 and [at for at, _ in logs.read_metrics(tmp_path)["train_loss"]] == [0, 2, 3, 4]
    continued.add("train_loss", 1, 5)
    assert logs.Logs(tmp_path, 5, said.append).points == 5  # a checkpoint counts what it counted before
    assert [at for at, _ in logs.read_metrics(tmp_path)["train_loss"]] == [0, 2, 3, 4]


def test_curves_that_are_gone_are_not_called_damaged(tmp_path):
    said = []
    logs.Logs(tmp_path / "run", 5, said.append)
    (line,) = said
    assert "is gone, and with it 5 points; to begin anew remove" in line and str(tmp_path / "pt_run") in line


def test_curves_without_a_checkpoint_are_set_aside(tmp_path):
    for value in (0.25, 0.5):
        logs.Logs(tmp_path, say=lambda line: None).add("train_loss", value, 0)
    logs.Logs(tmp_path, say=lambda line: None)
    assert not logs.read_metrics(tmp_path)
    aside = [json.loads((tmp_path / f"metrics_{i}.jsonl").read_text())["value"] for i in (1, 2)]
    np.testing.assert_array_equal(aside, [0.25, 0.5])


def test_event_files_of_others_are_left_alone(tmp_path):
    """The paper's program writes into a folder of the same name."""
    (tmp_path / "events.out.tfevents.1.theirs").write_bytes(b"theirs")
    for points in (None, 0):
        logs.Logs(tmp_path, points)
    assert len(list(tmp_path.glob("events.out.tfevents.*"))) == 2
    assert (tmp_path / "events.out.tfevents.1.theirs").read_bytes() == b"theirs"


def test_a_point_of_a_step_beyond_64_bits_is_damage(tmp_path):
    logs.Logs(tmp_path).add("train_loss", 0.5, 1)
    with (tmp_path / logs.FILE).open("a") as file:
        file.write('{"tag": "train_loss", "step": 9223372036854775808, "value": 1, "time": 0}\n')
    said = []
    assert logs.Logs(tmp_path, 2, said.append).points == 2 and "1 of 2 points are lost" in said[0]


def test_curves_without_a_point_are_not_set_aside(tmp_path):
    logs.Logs(tmp_path)
    said = []
    logs.Logs(tmp_path, say=said.append)
    assert not said and not (tmp_path / "metrics_1.jsonl").exists()
