"""``warpdecode generate --compare``, and the demo, which compares unless told otherwise."""

import pytest

pytest.importorskip("transformers")

from warpdecode import cli, demo
from warpdecode.generate.report import Report

pytestmark = pytest.mark.usefixtures("one_thread")


def test_compare_says_whether_the_unpatched_model_agrees(generate, reference):
    code, path, printed = generate(flags=["--compare"])
    assert code == 0 and path.read_bytes() == reference.read_bytes()
    assert "warpdecode " in printed and "transformers alone " in printed and printed.count("tokens/s") == 2
    assert "15 of 15 samples are identical" in printed  # in float32 both round far below what a draw could show
    assert "sums right" not in printed


def test_the_first_difference_is_shown():
    report = Report()
    for sample, ours, stock in [(0, [1, 2], [1, 2]), (1, [1, 2, 3], [1, 2]), (2, [4], [5])]:
        row = {"prompt": "a", "sample": sample, "text": "x"}
        report.compare({**row, "token_ids": ours}, {**row, "token_ids": stock, "text": "y"})
    assert "1 of 3 samples are identical; the first difference is in sample 1 of 'a', at token 2" in report.text()
    assert "warpdecode 'x', transformers alone 'y'" in report.text()


def test_the_demo_needs_no_arguments(capfd):
    assert cli.main(["generate", "--device", "cpu"]) == 0
    printed = capfd.readouterr().out
    count = len(demo.load_prompts())
    for name in ("warpdecode", "transformers alone"):
        (line,) = (line for line in printed.splitlines() if line.startswith(name))
        right = int(line.partition(" s)   ")[2].partition(f" of {count} sums right")[0])
        assert right > 0.9 * count, line
    assert f"of {count} samples are identical" in printed


def test_the_demo_resumes_and_counts_all_sums(tmp_path, capfd):
    argv = ["generate", "--device", "cpu", "--no-compare", "--output", str(tmp_path / "demo.jsonl")]
    assert cli.main(argv) == 0
    report = capfd.readouterr().out
    whole = (tmp_path / "demo.jsonl").read_bytes()
    (tmp_path / "demo.jsonl").write_bytes(whole[: len(whole) // 2])
    assert cli.main(argv) == 0
    assert (tmp_path / "demo.jsonl").read_bytes() == whole
    sums = report.partition("tokens in")[2].partition(" s)")[2]
    assert "sums right" in sums and sums in capfd.readouterr().out
    assert cli.main(argv) == 0 and "Nothing was done" in capfd.readouterr().out
