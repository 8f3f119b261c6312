"""What people are told of devices, on machines that are not there."""

import types

import jax
import pytest

from jaxmed.runs import devices


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Makes a machine of files and devices; nobody has chosen one of them."""
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(devices.os, "cpu_count", lambda: 4)

    def make(platform="cpu", kind="cpu", count=1, gpu=False, cards=()):
        device = types.SimpleNamespace(platform=platform, device_kind=kind)
        monkeypatch.setattr(jax, "local_devices", lambda: [device] * count)
        monkeypatch.setattr(devices, "_NVIDIA", str(tmp_path / "nvidia[0-9]*"))
        monkeypatch.setattr(devices, "_PCI", str(tmp_path / "pci" / "*"))
        (tmp_path / "nvidiactl").touch()  # the driver without a GPU
        if gpu:
            (tmp_path / "nvidia0").touch()
        for number, (maker, kind) in enumerate(cards):
            (tmp_path / "pci" / str(number)).mkdir(parents=True)
            (tmp_path / "pci" / str(number) / "vendor").write_text(f"{maker}\n")
            (tmp_path / "pci" / str(number) / "device").write_text(f"{kind}\n")

    return make


INTEL, GOOGLES_NETWORK, TPU = ("0x8086", "0x1237"), ("0x1ae0", "0x0042"), ("0x1ae0", "0x0063")


def test_the_device_is_told_and_nothing_more_where_there_is_no_other(machine):
    machine(cards=[INTEL, GOOGLES_NETWORK])
    assert list(devices.told()) == ["Runs on CPU (4 cores)"]
    machine("gpu", "NVIDIA H100 80GB HBM3", gpu=True)
    assert list(devices.told()) == ["Runs on NVIDIA H100 80GB HBM3"]


def test_several_devices_are_told_with_their_mesh(machine):
    machine("tpu", "TPU v5 lite", 8, cards=[TPU])
    assert list(devices.told("4x2")) == ["Runs on 8 x TPU v5 lite, mesh 4x2"]


def test_an_unused_gpu_is_warned_of_with_the_way_out(machine):
    machine(gpu=True)
    runs, warning = devices.told()
    assert runs == "Runs on CPU (4 cores)"
    assert "has an NVIDIA GPU that is not used" in warning and "'jaxmed[cuda]'" in warning


def test_an_unused_tpu_is_warned_of_with_the_way_out(machine):
    machine(cards=[INTEL, TPU])
    _, warning = devices.told()
    assert "has a TPU that is not used" in warning and "'jaxmed[tpu]'" in warning


@pytest.mark.parametrize("name", ["JAX_PLATFORMS", "CUDA_VISIBLE_DEVICES"])
def test_who_chose_the_cpu_is_not_warned(name, machine, monkeypatch):
    machine(gpu=True)
    monkeypatch.setenv(name, "cpu")
    assert list(devices.told()) == ["Runs on CPU (4 cores)"]
