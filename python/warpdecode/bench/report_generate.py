"""The tables of `generate()`'s decode steps."""

from __future__ import annotations

from warpdecode.bench.report_parts import conditions, grouped, markdown, sections, span
from warpdecode.bench.row import largest, number


def generate_table(rows: list[dict]) -> str:
    """Decode steps of generate() with each variant of the experts: a part for each model, mode and length."""
    keys = ("model", "layers", "device", "mode", "prompt_tokens", "asked_tokens")
    return "\n\n".join(_section(part) for part in sections(rows, *keys))


def _section(rows: list[dict]) -> str:
    first = rows[0]
    batches = {batch: part for (batch,), part in grouped(rows, "batch").items()}
    lines = [_line(row) for row in rows if "failed" not in row]
    heads = [
        "batch", "experts", "tokens/s (p10 to p90)", "ms a step", "of the fastest stock", "of null experts",
        "whole call, tokens/s",
    ]  # fmt: skip
    parts = [
        f"`generate()`, {first['model']}, {first['layers']} layers of random weights, bfloat16, greedy, "
        f"{_mode(rows)}, {first['prompt_tokens']} prompt tokens and {first['asked_tokens']} new ones, "
        f"decode steps of {span(row['rounds'] for row in rows)} rounds in turn, medians; {conditions(rows)}.",
        markdown(heads, lines),
    ]
    aims = [found for found in (_aim(part) for part in batches.values()) if found]
    if aims:
        parts.append(f"A step of null experts and one read of the distinct experts of a step: {'; '.join(aims)}.")
    logits = [row for row in rows if "largest_logit_difference" in row]
    if logits:
        difference = largest([number(row["largest_logit_difference"]) for row in logits])
        deviation = -largest([-number(row["logit_standard_deviation"]) for row in logits])
        own = [number(row["stock_logit_difference"]) for row in logits if "stock_logit_difference" in row]
        parts.append(
            f"Logits of the same text, patched against stock: largest difference {difference:.3f}, where their "
            f"standard deviation is {deviation:.2f}"
            + (f"; two of transformers' own paths against each other: {largest(own):.3f}." if own else ".")
        )
    failed = [f"{row['variant']} at batch {row['batch']} ({row['failed']})" for row in rows if "failed" in row]
    if failed:
        parts.append(f"Left out: {', '.join(failed)}.")
    unseen = dict.fromkeys(row["not_looked_at"] for row in rows if "not_looked_at" in row)
    if unseen:
        parts.append(f"Not looked at behind the timing: {', '.join(unseen)}.")
    return "\n\n".join(parts)


def _mode(rows: list[dict]) -> str:
    """transformers compiles the step of a static cache on a GPU alone; the rows say whether it did."""
    if rows[0]["mode"] != "static":
        return rows[0]["mode"]
    compiled = [bool(row["compiled"] and row["compiled"]["graphs"]) for row in rows if "failed" not in row]
    how = "not compiled" if not any(compiled) else "compiled" if all(compiled) else "compiled in part"
    return f"static cache ({how})"


def _line(row: dict) -> list[str]:
    speed, ran = row["tokens_per_second"], row["implementation"]
    name = row["variant"] if row["variant"] in (ran, "patched") else f"{row['variant']} ({ran})"
    return [
        str(row["batch"]),
        name,
        f"{speed['median']:.1f} ({speed['p10']:.1f} to {speed['p90']:.1f})",
        f"{row['step_ms']['median']:.2f}",
        f"{row['ratio_to_stock']:.2f}" if row["ratio_to_stock"] else "-",
        f"{row['of_null']:.2f}" if row["of_null"] else "-",
        f"{row['generate_tokens_per_second']['median']:.1f}" if row["new_tokens"] == row["asked_tokens"] else "-",
    ]


def _aim(rows: list[dict]) -> str | None:
    """What a batch's step would take if the experts were read at the ceiling's speed, and how near ours comes."""
    steps = {row["variant"]: row["step_ms"]["median"] for row in rows if "step_ms" in row}
    looked = next((row for row in rows if "read_floor_ms" in row), None)
    if looked is None or not {"null", "patched"} <= set(steps):
        return None
    aim = steps["null"] + looked["read_floor_ms"]
    return (
        f"batch {looked['batch']} ({looked['distinct_experts']:.1f} experts a layer) {aim:.2f} ms, of which ours is "
        f"{aim / steps['patched']:.2f}"
    )
