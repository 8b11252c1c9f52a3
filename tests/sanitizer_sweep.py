"""A small sweep over every CUDA kernel, for compute-sanitizer; not collected by pytest.

for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool $tool --num-cuda-barriers 65536 --error-exitcode 9 python tests/sanitizer_sweep.py
done
"""

import torch

import warpdecode
from cases import make_layer, make_tokens
from layouts import GATES, LAYOUTS, describe, draw_parts, draw_tokens

CASES = (  # E, K, H, I, T, routing: decode, odd sizes, lists sorted in memory, more than one column tile
    (8, 4, 64, 32, 1, "out of range"),
    (5, 2, 72, 40, 3, "out of range"),
    (6, 3, 136, 104, 12, "out of range"),
    (2, 2, 40, 24, 33, "out of range"),
    (4, 2, 64, 32, 1100, "out of range"),
    (3, 2, 136, 152, 130, "out of range"),
    (6, 2, 40, 4000, 6, "out of range"),  # more blocks than run at once: down of grouped meets those of gate_up
    (6, 3, 40, 4000, 8, "uniform"),  # large blocks of grouped's gate_up, which are many here
    (2, 2, 72, 104, 68, "uniform"),  # few experts: tiled's items share their rows
    (34, 2, 136, 104, 1156, "uniform"),  # 68 routes an expert, in one item of tiled's down
    (64, 4, 2112, 128, 24, "uniform"),  # blocks of grouped's down that fill the GPU more than twice
    (32, 4, 72, 1024, 300, "zipf"),  # columns of tiled's gate_up are tokens, with 38 routes an expert
    (24, 2, 136, 1376, 520, "uniform"),  # with 43
    (4, 2, 520, 2184, 40, "uniform"),  # with 20, and so many units that items have two
    (64, 2, 40, 520, 24, "zipf"),  # and with fewer; some have none: a wrong guess where its blocks begin
    (6, 3, 200, 136, 40, "one"),
    # so many units that tiled's items have two: of down, with 25 and 75 routes an expert; of gate_up
    (4, 2, 4360, 32, 50, "uniform"),
    (4, 2, 4360, 32, 150, "uniform"),
    (4, 2, 32, 2184, 50, "uniform"),
)


def main():
    """Runs every case on every kernel (direct up to 40 tokens) and sees that they agree, so that it does something."""
    runs = 0
    kernels = [kernel.name for kernel in warpdecode.kernels() if kernel.device == "cuda" and kernel.usable]
    for experts, top_k, hidden, intermediate, tokens, routing in CASES:
        for dtype in (torch.bfloat16, torch.float16):
            layer = make_layer(experts, hidden, intermediate, dtype, "cpu")
            layer.gate_up, layer.down = layer.gate_up.cuda(), layer.down.cuda()  # initialised by copies: initcheck sees
            call = make_tokens(layer, tokens, top_k, seed=tokens, routing=routing)
            outputs = []
            for name in kernels:
                if name == "cuda_direct" and tokens > 40:
                    continue  # nothing that fewer do not reach, and minutes of racecheck
                described = warpdecode.Experts(layer.gate_up, layer.down, kernel=name)
                outputs.append(described(*call).cpu())
                # and the two kernels on their own: the tiled schedule then gathers what down reads
                middle = torch.zeros_like(warpdecode.moe_gate_up_3d_batched(described, call[0], call[1]))
                warpdecode.moe_gate_up_3d_batched(described, call[0], call[1], out=middle)
                outputs.append(warpdecode.moe_down_3d_batched(described, middle, call[1], call[2]).cpu())
            assert all(torch.equal(outputs[0], other) for other in outputs[1:])
            runs += len(outputs)
    for layout in LAYOUTS:
        runs += sweep_layout(layout, kernels)
    print(f"{runs} calls over {', '.join(kernels)}: equal bits")


def sweep_layout(layout, kernels):
    """Calls in one layout, with biases and gpt-oss' gate, on the kernels that serve it; their number."""
    runs = 0
    parts = draw_parts(5, 136, 72, torch.bfloat16, bias_dtype=torch.float32).to("cuda")
    for tokens in (1, 4, 45):
        call = [tensor.cuda() for tensor in draw_tokens(parts, tokens, 3)]
        expected = describe(parts, **GATES["gpt_oss"])(*call)
        for kernel in kernels:
            if kernel == "cuda_tiled" and ("pointers" in layout or "transposed" in layout):
                continue
            assert torch.equal(describe(parts, layout, kernel, **GATES["gpt_oss"])(*call), expected), (layout, kernel)
            runs += 1
    return runs


if __name__ == "__main__":
    main()
