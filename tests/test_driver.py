"""Why CUDA is not usable, in each of the ways in which it may not be: real processes, real loader."""

import os
import shutil
import subprocess
import sys

import pytest

import warpdecode

# The driver's library as an old driver would answer: its version, and nothing that the runtime could use.
OLD_DRIVER = (
    "int cuDriverGetVersion(int *version) { *version = 12020; return 0; }\nint cuInit(unsigned f) { return f != 0; }\n"
)
ASK = "import warpdecode; print(*warpdecode.cuda_usable(), sep='|'); print(warpdecode.info())"


def ask(**environment):
    """(usable, reason, report) of a fresh process."""
    done = subprocess.run(
        [sys.executable, "-c", ASK], env=os.environ | environment, capture_output=True, text=True, check=True
    )
    first, _, report = done.stdout.partition("\n")
    usable, _, reason = first.partition("|")
    return usable == "True", reason, report


def compiled_with_cuda():
    """Whether this build has CUDA kernels."""
    return any(kernel.device == "cuda" for kernel in warpdecode.kernels())


@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler to build the stand-in for an old driver with")
def test_driver_too_old(tmp_path):
    if not compiled_with_cuda():
        pytest.skip("a CPU-only build asks no driver")
    (tmp_path / "driver.c").write_text(OLD_DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", tmp_path / "libcuda.so.1", tmp_path / "driver.c"], check=True)
    usable, reason, report = ask(LD_LIBRARY_PATH=str(tmp_path))
    assert not usable
    assert "the driver serves CUDA 12.2, expected 13.0 or newer" in reason and "13.0" in reason
    assert reason in report


def test_report_names_the_reason():
    usable, reason, report = ask()
    assert usable or reason in report
    if not compiled_with_cuda():
        assert "CPU ONLY" in report and "WARPDECODE_CUDA=on" in reason


@pytest.mark.gpu
def test_hidden_devices(cuda):
    usable, reason, _ = ask(CUDA_VISIBLE_DEVICES="")
    assert not usable and reason.startswith("CUDA: ")


def test_library_of_another_version(tmp_path):
    """Compile-time and run-time version are compared when the package is imported."""
    library = tmp_path / "libwarpdecode.so"
    (tmp_path / "other.c").write_text('const char *wd_version(void) { return "9.9.9"; }\n')
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to build the other library with")
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, tmp_path / "other.c"], check=True)
    done = subprocess.run(
        [sys.executable, "-c", "import warpdecode"],
        env=os.environ | {"WARPDECODE_LIBRARY": str(library)}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "is version 9.9.9, but this package was built against the header of 0.1.0" in done.stderr
