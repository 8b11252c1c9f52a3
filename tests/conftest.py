"""Fixtures and the count of GPU tests that a machine without a GPU skips."""

import pytest

import warpdecode

pytest_plugins = ["generate_runs"]  # the fixtures of test_generate_*.py

CUDA_USABLE, CUDA_REASON = warpdecode.cuda_usable()


def pytest_collection_modifyitems(items):
    """GPU tests skip where there is no GPU, by their marker."""
    if CUDA_USABLE:
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=f"gpu: {CUDA_REASON}"))


def pytest_terminal_summary(terminalreporter):
    """Says how many GPU tests did not run, and which of transformers' families are not served: never in silence."""
    verdicts = []
    for report in terminalreporter.getreports("passed"):
        verdicts += [value for name, value in report.user_properties if name == "verdict" and report.when == "call"]
    if verdicts:
        served = sum(reason is None for _, reason in verdicts)
        terminalreporter.write_line(
            f"transformers' expert classes: {served} of {len(verdicts)} checks served, rest handed back:"
        )
        for reason in dict.fromkeys(reason for _, reason in verdicts if reason is not None):
            families = dict.fromkeys(family for family, why in verdicts if why == reason)
            terminalreporter.write_line(f"  {', '.join(families)}: {reason}")
    skipped = [report for report in terminalreporter.getreports("skipped") if "gpu: " in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} GPU tests skipped: {CUDA_REASON or 'see their reasons'}")


@pytest.fixture
def cuda():
    """The torch device of GPU tests."""
    torch = pytest.importorskip("torch")
    if not (CUDA_USABLE and torch.cuda.is_available()):
        pytest.skip(f"gpu: {CUDA_REASON or 'torch sees no CUDA device'}")
    return torch.device("cuda")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Each device that the library serves; CUDA is skipped, and counted, where there is none."""
    return request.param
