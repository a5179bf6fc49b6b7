"""Described devices, and the reading of a real one (here: of a stand-in for what torch reports)."""

import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from tritongru.planning import devices
from tritongru.planning.devices import DEVICES, Device, describe, of_cuda

KIB = 1024
MIB = 1024 * KIB


@pytest.fixture
def reported(monkeypatch):
    """Let torch report the given properties, on a CUDA or (hip=True) on a ROCm build; gives `of_cuda(0)`."""

    def read(hip=False, **properties) -> Device:
        of_cuda.cache_clear()
        monkeypatch.setattr(torch.version, "hip", "6.2" if hip else None)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties))
        return of_cuda(0)

    yield read
    of_cuda.cache_clear()


def test_every_device_of_the_compile_matrix_is_described():
    assert {"a100", "h100", "h200", "b200", "rtx4090", "l4", "t4", "mi300x", "rtx5090", "interpreter"} <= set(DEVICES)


@pytest.mark.parametrize(
    ("name", "target", "sms", "shared_kib"),
    [
        ("a100", ("cuda", 80, 32), 108, 163),
        ("h100", ("cuda", 90, 32), 132, 227),
        ("h200", ("cuda", 90, 32), 132, 227),
        ("b200", ("cuda", 100, 32), 148, 227),
        ("rtx4090", ("cuda", 89, 32), 128, 99),
        ("l4", ("cuda", 89, 32), 58, 99),
        ("rtx5090", ("cuda", 120, 32), 170, 99),
        ("t4", ("cuda", 75, 32), 40, 64),
        ("mi300x", ("hip", "gfx942", 64), 304, 64),
    ],
)
def test_targets_and_limits(name, target, sms, shared_kib):
    device = describe(name)
    assert device.target == target
    assert device.sms == sms
    assert device.shared_per_program == shared_kib * KIB
    assert device.arch == ("gfx942" if name == "mi300x" else f"sm_{target[1]}")


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_limits_are_consistent(device):
    assert device.shared_per_program <= device.shared_per_sm
    assert min(device.sms, device.registers_per_sm, device.l2_bytes) > 0
    assert (device.capability is not None) == (device.vendor == "nvidia")
    assert (device.memory_bytes > 0) == (device.vendor != "interpreter")


def test_names_are_taken_in_any_case():
    assert describe("H100") is describe("h100") is DEVICES["h100"]


def test_unknown_name_lists_the_valid_ones():
    with pytest.raises(ValueError, match="unknown device 'v100'") as error:
        describe("v100")
    for name, device in DEVICES.items():
        assert (name in str(error.value)) == (device.vendor != "interpreter")


def test_interpreter_has_no_target_and_no_binding_limit():
    interpreter = describe("interpreter")
    assert interpreter.sms == 8  # programs that wait for each other are threads: few
    gpus = [device for device in DEVICES.values() if device.vendor != "interpreter"]
    assert interpreter.shared_per_program > max(device.shared_per_program for device in gpus)
    with pytest.raises(ValueError, match="interpreter"):
        _ = interpreter.target


def test_measured_values_win_over_the_described_product(reported):
    """A MIG slice of an H100 has few SMs; what torch does not report is taken from the H100."""
    device = reported(name="NVIDIA H100 80GB HBM3 MIG 1g.10gb", major=9, minor=0, multi_processor_count=16)
    assert device.name == "NVIDIA H100 80GB HBM3 MIG 1g.10gb"
    assert device.sms == 16
    assert device.target == ("cuda", 90, 32)
    assert device.shared_per_program == 227 * KIB
    assert device.l2_bytes == 50 * MIB


def test_reported_shared_memory_and_cache_are_used(reported):
    device = reported(
        name="NVIDIA A100-SXM4-80GB",
        major=8,
        minor=0,
        multi_processor_count=108,
        shared_memory_per_block_optin=160 * KIB,
        shared_memory_per_multiprocessor=161 * KIB,
        regs_per_multiprocessor=1000,
        L2_cache_size=39 * MIB,
        total_memory=79 * KIB * MIB,
    )
    assert (device.shared_per_program, device.shared_per_sm) == (160 * KIB, 161 * KIB)
    assert device.memory_bytes == 79 * KIB * MIB
    assert (device.registers_per_sm, device.l2_bytes) == (1000, 39 * MIB)


@pytest.mark.parametrize(
    ("product", "capability", "shared_kib"),
    [("NVIDIA L40S", (8, 9), 99), ("NVIDIA A10", (8, 6), 99), ("NVIDIA T400", (7, 5), 64), ("NVIDIA X1", (14, 0), 48)],
)
def test_product_that_is_not_described_gets_the_limits_of_its_capability(reported, product, capability, shared_kib):
    device = reported(name=product, major=capability[0], minor=capability[1], multi_processor_count=77, L2_cache_size=5)
    assert device.target == ("cuda", capability[0] * 10 + capability[1], 32)
    assert device.shared_per_program == shared_kib * KIB
    assert (device.sms, device.l2_bytes) == (77, 5)


@pytest.mark.parametrize(
    ("product", "key"),
    [
        ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA GeForce RTX 5090", "rtx5090"),
        ("NVIDIA A100 80GB PCIe", "a100"),
        ("NVIDIA L4", "l4"),
        ("Tesla T4", "t4"),
        ("NVIDIA B200", "b200"),
    ],
)
def test_product_names_find_their_description(reported, product, key):
    known = describe(key)
    major, minor = divmod(known.capability, 10)
    device = reported(name=product, major=major, minor=minor, multi_processor_count=known.sms)
    assert device.l2_bytes == known.l2_bytes


def test_amd_device(reported):
    """ROCm reports the L2 of one die; the description knows all eight."""
    device = reported(
        hip=True,
        name="AMD Instinct MI300X",
        major=9,
        minor=4,
        gcnArchName="gfx942:sramecc+:xnack-",
        multi_processor_count=304,
        shared_memory_per_block=64 * KIB,
        L2_cache_size=4 * MIB,
    )
    assert device.target == ("hip", "gfx942", 64)
    assert (device.vendor, device.capability, device.sms) == ("amd", None, 304)
    assert (device.shared_per_program, device.l2_bytes) == (64 * KIB, 32 * MIB)


def test_amd_device_that_is_not_described_has_its_own_wave_size(reported):
    device = reported(hip=True, name="Radeon", major=11, minor=0, gcnArchName="gfx1100", multi_processor_count=96)
    assert device.target == ("hip", "gfx1100", 32)


def test_a_device_is_read_once(monkeypatch, reported):
    first = reported(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", None)
    assert of_cuda(0) is first


def test_module_needs_neither_torch_nor_triton():
    """Run by itself where importing either one fails (the package around it may import what it likes)."""
    code = (
        "import runpy, sys;"
        "sys.modules['torch'] = sys.modules['triton'] = None;"
        f"assert runpy.run_path({devices.__file__!r})['describe']('h100').sms == 132"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
