"""What a row says of the machine and of the command that wrote it."""

import argparse
import threading
from types import SimpleNamespace

import pytest

pytest.importorskip("torch")

import torch

import warpdecode
from warpdecode.bench import machine


def test_environment_says_threads_and_options():
    args = argparse.Namespace(
        command="bench", commit="abc", output="rows.jsonl", tokens="1,4", seed=0, repeats=None, kernels="", eager=True,
        no_parts=False, models=["qwen3-30b-a3b"], seconds=8.0,
    )  # fmt: skip
    found = machine.environment("cpu", "abc", args)
    assert found["options"] == {
        "tokens": "1,4", "seed": 0, "eager": True, "models": ["qwen3-30b-a3b"], "seconds": 8.0,
    }  # fmt: skip
    assert found["commit"] == "abc"
    assert found["torch_threads"] == torch.get_num_threads() and found["threads"] == warpdecode.get_num_threads()
    assert "options" not in machine.environment("cpu")


def test_clocks_are_those_of_a_gpu_at_work(monkeypatch):
    thrice, done = threading.Event(), []

    def smi(fields):
        assert fields == "clocks.sm,clocks.mem,clocks.max.sm,power.limit" and thrice.wait(60)
        return ["1980", "3201", "[N/A]", "700.00"]

    def work():
        done.append(None)
        if len(done) == 3:
            thrice.set()

    monkeypatch.setattr(machine, "_smi", smi)
    assert machine.clocks(work) == {
        "sm_mhz": 1980.0, "memory_mhz": 3201.0, "most_sm_mhz": None, "power_limit_w": 700.0,
    }  # fmt: skip
    monkeypatch.setattr(machine, "_smi", lambda fields: None)
    assert machine.clocks(work) is None


def test_processor_is_a_model(tmp_path, monkeypatch):
    file = tmp_path / "cpuinfo"
    file.write_text("processor\t: 0\nmodel\t\t: 85\nmodel name\t: Some CPU @ 2.50GHz: fast\n\nmodel name\t: Other\n")
    monkeypatch.setattr(machine, "Path", lambda _: file)
    assert machine._processor() == "Some CPU @ 2.50GHz: fast"
    file.write_text("processor\t: 0\nCPU part\t: 0xd0c\n")
    assert machine._processor() == (machine.platform.processor() or machine.platform.machine())
    file.unlink()
    assert machine._processor() == (machine.platform.processor() or machine.platform.machine())


@pytest.mark.parametrize(
    "uuid, printed, expected",
    [
        ("abc", {"GPU-abc": "1980, 2619"}, ["1980", "2619"]),
        ("abc", {None: "1, 2"}, None),  # it does not know this GPU: another one's clocks are none of it
        (None, {None: "1980, 2619"}, ["1980", "2619"]),
        (None, {None: "1980, 2619\n1, 2"}, None),  # which of them?
        ("abc", {}, None),
    ],
)
def test_clocks_are_of_the_gpu_that_is_measured(uuid, printed, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(uuid=uuid))
    asked = lambda *command: printed.get(command[-1] if "-i" in command else None)  # noqa: E731
    monkeypatch.setattr(machine, "_output", asked)
    assert machine._smi("clocks.sm,clocks.mem") == expected
