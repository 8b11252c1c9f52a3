"""The plots of result files."""

import json

import pytest

pytest.importorskip("torch")

from test_bench_report import TIMES, made_row, written
from warpdecode.bench import plot
from warpdecode.bench.child import INVARIANT_NAME


def test_plot(tmp_path):
    times = {"read ceiling": 80.0, "two reads": 90.0, "warpdecode": 100.0, "vllm": 250.0, "gate_up": 60.0}
    results = tmp_path / "rows.jsonl"
    rows = [made_row("olmoe-1b-7b", 4, times), made_row("olmoe-1b-7b", 1, times), made_row("qwen3-next", 1, times)]
    results.write_text("".join(json.dumps(row) + "\n" for row in rows))
    figure = plot.plot(rows)
    assert len(figure.axes) == 4
    lines = {line.get_label(): line for line in figure.axes[1].get_lines()}
    assert list(lines["warpdecode"].get_xdata()) == [1, 4] and list(lines["vllm"].get_ydata()) == [0.32, 0.32]
    assert "gate_up" not in lines and "gate_up" in [line.get_label() for line in figure.axes[0].get_lines()]
    assert plot.main([str(results), str(tmp_path / "out.png")]) == 0
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_a_colour_is_one_candidate_s_on_both_plots():
    names = ["vllm", "gate_up", "down", "transformers eager", "transformers grouped_mm", "cuda_direct"]
    names += [f"layout {number}" for number in range(6)]
    times, fractions = plot.plot([made_row("olmoe-1b-7b", 1, {**TIMES, **dict.fromkeys(names, 400.0)})]).axes
    left, right = ({line.get_label(): line.get_color() for line in axes.get_lines()} for axes in (times, fractions))
    shown = {label: color for label, color in right.items() if not label.startswith("_")}
    assert set(left) - set(shown) == {"read ceiling", "two reads", "gate_up", "down"}
    assert shown == {label: left[label] for label in shown} and len(set(left.values())) == len(left)
    assert [text.get_text() for text in fractions.get_legend().get_texts()] == list(shown)
    assert fractions.get_ylim() == (0, 1.05)  # the ceiling is seen where nothing comes near it
    assert "a GPU; warpdecode 1, torch 2, vllm 3; commit 0123456; today" in times.get_title()


def test_fractions_are_of_the_ceiling_of_the_candidate_s_process():
    """And small calls have one of the two reads, too."""
    apart = {"read ceiling": 60.0, "two reads": 75.0, "warpdecode": 70.0, "vllm": 300.0}
    rows = [
        made_row("olmoe-1b-7b", 1, {**TIMES, "warpdecode": 50.0}, distinct_bytes=75_000_000, apart=apart),
        made_row("olmoe-1b-7b", 4, TIMES),
    ]
    axes = plot.plot(rows).axes[1]
    found = [(line.get_label(), list(line.get_xdata()), list(line.get_ydata())) for line in axes.get_lines()[1:]]
    (_, _, hollow), (_, _, apart_hollow) = found[1], found[3]
    assert found[0] == ("warpdecode", [1, 4], [1.6, 0.8]) and found[2] == (INVARIANT_NAME, [1], [0.2])
    assert hollow == [1.8] and apart_hollow == [0.25] and axes.get_ylim()[1] > 1.8
    assert found[4][0] == "of two reads (less than 100 MB)"


def test_a_command_without_matplotlib_ends_in_a_sentence(tmp_path, capsys, monkeypatch):
    def fails(rows):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(plot, "plot", fails)
    path = written(tmp_path / "rows.jsonl", made_row("olmoe-1b-7b", 4, TIMES))
    assert plot.main([str(path), str(tmp_path / "out.png")]) == 1
    assert "warpdecode.bench.plot: needs matplotlib; pip install 'warpdecode[notebook]'" in capsys.readouterr().err
