"""A small sweep over every CUDA kernel, for compute-sanitizer; not collected by pytest.

for tool in memcheck racecheck initcheck synccheck; do
    compute-sanitizer --tool $tool --num-cuda-barriers 65536 --error-exitcode 9 python tests/sanitizer_sweep.py
done
"""

import torch

import warpdecode
from cases import make_layer, make_tokens
from layouts import GATES, LAYOUTS, describe, draw_parts, draw_tokens
from warpdecode.bench.candidates import read_memory

DTYPES = (torch.bfloat16, torch.float16)

# On 132 multiprocessors these and TRANSPOSED reach all kernels but UNREACHED: see test_sweep_cuda.py. "ahead": steps of
# 128 values in direct's rings, which depend on the number of blocks; H (I for down) has more, so that a ring is filled
# again.
CASES = (  # E, K, H, I, T, routing: decode, odd sizes, lists sorted in memory, more than one column tile
    (8, 4, 64, 32, 1, "out of range"),
    (5, 2, 72, 40, 3, "out of range"),
    (6, 3, 136, 104, 12, "out of range"),
    (2, 2, 40, 24, 33, "out of range"),
    (4, 2, 64, 32, 1100, "out of range"),
    (3, 2, 136, 152, 130, "out of range"),
    (6, 2, 40, 4000, 6, "out of range"),  # more blocks than run at once: down of grouped meets those of gate_up
    (6, 3, 392, 1408, 8, "uniform"),  # large blocks of grouped's gate_up, which are many here
    (9, 8, 776, 520, 1, "uniform"),  # direct: gate_up 6 ahead, down 4
    (6, 12, 392, 392, 3, "uniform"),  # direct: 3 ahead; small blocks of grouped's gate_up
    (6, 16, 40, 264, 1, "uniform"),  # direct: down 2 ahead
    (2, 2, 72, 104, 68, "uniform"),  # few experts: tiled's items share their rows
    (34, 2, 136, 104, 1156, "uniform"),  # 68 routes an expert, in one item of tiled's down
    (64, 4, 2112, 128, 24, "uniform"),  # blocks of grouped's down that fill the GPU more than twice
    (32, 4, 72, 1024, 300, "zipf"),  # columns of tiled's gate_up are tokens, with 38 routes an expert
    (24, 2, 136, 1376, 520, "uniform"),  # with 43
    (4, 2, 520, 2184, 41, "uniform"),  # with 20, and so many units that items have two
    # and with fewer; some have none: a wrong guess where its blocks begin; grouped's gate_up: 2 steps in its ring
    (64, 2, 264, 520, 24, "zipf"),
    (6, 3, 264, 136, 40, "one"),  # direct: gate_up 2 ahead
    # so many units that tiled's items have two: of down, with 25 and 75 routes an expert; of gate_up
    (4, 2, 4360, 32, 50, "uniform"),
    (4, 2, 4360, 32, 150, "uniform"),
    (4, 2, 32, 2184, 50, "uniform"),
)

# For direct's kernels: a warp has 32 rows of transposed weights, 64 where they are many, and rings of 2, 3, 4 or 6
# steps, 64 values each, which are filled again. For grouped's, which have one size for few routes and one for more.
TRANSPOSED = (  # E, K, H, I, T, layout: rows and steps ahead of direct's gate_up; of its down
    (5, 4, 392, 392, 1, "transposed"),  # 32, 6; 32, 6; grouped: up to two routes an expert
    (5, 8, 264, 264, 4, "transposed, interleaved"),  # 32, 4; 32, 4; grouped: more
    (5, 15, 200, 136, 6, "transposed, interleaved"),  # 32, 3; 32, 2
    (5, 16, 136, 8, 25, "transposed"),  # 32, 2
    (5, 12, 200, 200, 1, "transposed"),  # down: 32, 3
    (3, 1, 1408, 392, 18, "transposed"),  # 64, 6; 64, 6
    (3, 2, 704, 264, 18, "transposed"),  # 64, 4; 64, 4
    (3, 6, 200, 200, 22, "transposed"),  # 64, 2; 64, 3
    (3, 8, 264, 136, 13, "transposed"),  # 64, 3; 64, 2
)

# Template arguments of what no GPU reaches on which a block can have 227 KB of shared memory: the shorter ring of
# grouped's gate_up, where a block has less than the full one wants (has_room() of grouped.cuh).
UNREACHED = (
    "GroupedSizes<8, 2, 5>",  # below 110 KB, as where compute capability 8.6, 8.9 and 12.0 have 99
)


def main():
    """Runs every case on every kernel (direct up to 40 tokens) and sees that they agree, so that it does something."""
    runs = 0
    kernels = [kernel.name for kernel in warpdecode.kernels() if kernel.device == "cuda" and kernel.usable]
    for experts, top_k, hidden, intermediate, tokens, routing in CASES:
        for dtype in DTYPES:
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
        for tokens in (1, 4, 45):
            runs += sweep_layout((5, 3, 136, 72, tokens), layout, torch.bfloat16, kernels)
    for *case, layout in TRANSPOSED:
        runs += sum(sweep_layout(case, layout, dtype, kernels) for dtype in DTYPES)
    memory = torch.ones(3, 16400, dtype=torch.uint8).cuda()  # a block's 32 KB, and some of another's
    sink = torch.zeros(16, dtype=torch.uint8).cuda()
    read_memory(memory, sink)()
    torch.cuda.synchronize()
    print(f"{runs} calls over {', '.join(kernels)}: equal bits; and one of read_memory")


def sweep_layout(case, layout, dtype, kernels):
    """Calls in one layout, with biases and gpt-oss' gate, on the kernels that serve it; their number."""
    experts, top_k, hidden, intermediate, tokens = case
    parts = draw_parts(experts, hidden, intermediate, dtype, bias_dtype=torch.float32).to("cuda")
    call = [tensor.cuda() for tensor in draw_tokens(parts, tokens, top_k)]
    expected = describe(parts, **GATES["gpt_oss"])(*call)
    runs = 0
    for kernel in kernels:
        if kernel == "cuda_tiled" and ("pointers" in layout or "transposed" in layout):
            continue
        found = describe(parts, layout, kernel, **GATES["gpt_oss"])(*call)
        assert torch.equal(found, expected), (case, layout, dtype, kernel)
        runs += 1
    return runs


if __name__ == "__main__":
    main()
