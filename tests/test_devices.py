"""Which devices train, by the authors' names, and what is kept for them."""

from types import SimpleNamespace

import jax
import pytest

from plif_jax.errors import UserError
from plif_jax.training import devices


@pytest.mark.parametrize("error", [RuntimeError("Unable to initialize backend\nand more"), AssertionError()])
def test_devices_that_do_not_start_are_told(monkeypatch, error):
    def fail():
        raise error

    monkeypatch.setattr(jax, "devices", fail)
    with pytest.raises(UserError, match=r"^JAX finds no device of JAX_PLATFORMS=.*give cpu, or leave it unset$"):
        devices.start()


def test_batch_size_must_divide_among_the_devices(settings):
    with pytest.raises(UserError, match=r"-batch_size 6 does not divide among 4 devices; give 4 or 8"):
        devices.choose(settings(batch_size=6, device="cpu"))


def test_every_process_must_have_as_many_devices(settings, monkeypatch):
    of_two = [SimpleNamespace(process_index=i // 2, platform="cpu", id=i) for i in range(4)]
    monkeypatch.setattr(jax, "devices", lambda platform=None: of_two)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    for device, said in (("cpu:0", "1, 0"), ("cpu:0,1,2", "2, 1")):
        with pytest.raises(
            UserError, match=f"-device {device}: the processes have {said} of these .* leave -device out"
        ):
            devices.choose(settings(device=device))
    assert devices.choose(settings(device="cpu:0,2")) == devices.choose(settings(device="cpu:2,0")) == of_two[::2]
    assert devices.choose(settings(device="cpu:0,2,1,3")) == of_two  # of each process together, as JAX wants them


def test_devices_by_the_authors_names(settings):
    every = jax.devices()
    assert devices.choose(settings(device=None)) == devices.choose(settings(device="cpu")) == every
    assert devices.choose(settings(device="cpu:1")) == every[1:2]
    assert devices.choose(settings(device="cpu:0,1")) == every[:2]
    said = []
    assert devices.choose(settings(device="cuda:0"), said.append) == every
    assert "JAX finds no cuda here" in said[0]
    for wrong in ("cpu:9", "gpux", "cpu:a"):
        with pytest.raises(UserError, match=f"-device {wrong}"):
            devices.choose(settings(device=wrong))


@pytest.mark.parametrize("platform, chosen, kept", [("gpu", None, 1), ("gpu", "theirs", 0), ("cpu", None, 0)])
def test_what_is_compiled_for_an_accelerator_is_kept(tmp_path, platform, chosen, kept):
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", chosen)
    try:
        devices.keep_compiled([SimpleNamespace(platform=platform)], tmp_path)
        assert jax.config.jax_compilation_cache_dir == (str(tmp_path / "compiled") if kept else chosen)
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_device_named_twice_is_one(settings):
    assert devices.choose(settings(device="cpu:1,1")) == jax.devices()[1:2]


def test_a_device_beyond_the_last_is_told(settings):
    with pytest.raises(UserError, match="there is no cpu:4; this machine has cpu:0 to 3"):
        devices.choose(settings(device="cpu:4"))


def test_a_batch_of_fewer_samples_than_devices_is_told(settings):
    with pytest.raises(UserError, match="-batch_size 3 does not divide among 4 devices; give 4, or fewer"):
        devices.choose(settings(batch_size=3, device="cpu"))
