// down_direct.cu - moe_down_3d_batched, direct schedule: the arithmetic of down.cu for a few tokens.
//
// A block serves a warp's rows of one token, a warp a slot, combined in shared memory: one launch, and nothing is
// written but the output.
#include "device.cuh"
#include "direct.cuh"
#include "down_rows.cuh"
#include "gating.cuh"
#include "launch.cuh"

namespace wd {

constexpr int kMaxSlots = WD_CUDA_DIRECT_MAX_TOP_K;

// grid (T, H / rows of a warp): tokens run side by side (see gate_up_direct); block 32 * K
template <class T, class Rows, int AHEAD>
__global__ void __launch_bounds__(32 * kMaxSlots)
    down_direct(const __grid_constant__ wd_down_args args, bool dependent) {
  constexpr int kRows = 16 * Rows::kTiles;
  extern __shared__ __align__(128) uint8_t rings[];
  __shared__ float values[kMaxSlots][kRows], slot_weights[kMaxSlots];
  __shared__ bool served[kMaxSlots];
  const wd_moe_shape &s = args.shape;
  const int slot = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t token = blockIdx.x, first_route = token * s.top_k;
  const int first_row = blockIdx.y * kRows;
  const int expert = expert_of(args.topk_ids, s.id_bytes, first_route + slot, s.experts);
  // now, not at the end, where nothing would hide their way from memory
  const float weight = expert >= 0 ? weight_at(args.topk_weights, args.topk_weights_dtype, first_route + slot) : 0.0f;
  if (expert >= 0) {
    float bias[Rows::kTiles][2];
    auto look_up = [&](bool given) {
#pragma unroll
      for (int tile = 0; tile < Rows::kTiles; tile++)
#pragma unroll
        for (int high = 0; high < 2; high++) {
          const int row = first_row + row_in_warp<Rows>(tile, high);
          bias[tile][high] = given && row < s.hidden ? bias_at(args.down_bias, expert, row) : -0.0f;
        }
    };
    const T *column = (const T *)args.intermediate + (first_route + slot) * 2 * s.intermediate;
    float c[Rows::kTiles][2][1][4];
    direct_dot<T, 2, AHEAD, true>(c, DownRows<Rows>::of(args, expert, first_row), column, s.intermediate,
                                  s.intermediate, rings + slot * direct_bytes<Rows, 2, AHEAD>(), [&] {
                                    look_up(args.down_bias.data || args.down_bias.pointers);
                                    if (dependent) wait_for_previous_grid();
                                  });
    if (lane % 4 == 0) { // all columns are the same route
#pragma unroll
      for (int tile = 0; tile < Rows::kTiles; tile++)
#pragma unroll
        for (int high = 0; high < 2; high++)
          values[slot][row_in_warp<Rows>(tile, high)] =
              __fadd_rn(join_parts<T>(c[tile][0][0][2 * high], c[tile][1][0][2 * high]), bias[tile][high]);
    }
  } else if (dependent) {
    wait_for_previous_grid(); // also where no id was valid: see down_grouped
  }
  if (lane == 0) slot_weights[slot] = weight, served[slot] = expert >= 0;
  __syncthreads();
  for (int row = threadIdx.x; row < kRows && first_row + row < s.hidden; row += blockDim.x) {
    float sum = 0.0f;
    for (int i = 0; i < s.top_k; i++)
      if (served[i]) sum = __fmaf_rn(slot_weights[i], values[i][row], sum);
    ((T *)args.output)[token * s.hidden + first_row + row] = Element<T>::round(sum);
  }
}

// Of weights on their way to an SM (choose_ahead): with 200 KB Qwen3-30B-A3B took 22.5 us at T = 1 (21.5 so),
// Phi-3.5-MoE 159 at 2 (146).
constexpr int64_t kDirectOnTheirWay = 150 << 10;

template <class T, class Rows>
static wd_status launch_direct(const wd_down_args &args, bool dependent, cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  constexpr int kRows = 16 * Rows::kTiles;
  const unsigned blocks = (unsigned)(s.hidden + kRows - 1) / kRows;
  return choose_ahead<Rows, 2>(blocks * s.tokens, s.top_k, kDirectOnTheirWay, [&](auto ahead) {
    size_t bytes = s.top_k * direct_bytes<Rows, 2, ahead>();
    if (dependent) WD_TRY(spread_bytes(&bytes, blocks * s.tokens));
    return launch_shared<down_direct<T, Rows, ahead>>("down_direct", dim3((unsigned)s.tokens, blocks),
                                                      dim3(32 * s.top_k), bytes, stream, dependent, args, dependent);
  });
}

template <class T> static wd_status choose_rows(const wd_down_args &args, bool dependent, cudaStream_t stream) {
  const wd_moe_shape &s = args.shape;
  if (args.down.k_stride == 1) return launch_direct<T, PlainRows<T, 128>>(args, dependent, stream);
  using Lines = TransposedRows<T, 4>;
  bool lines;
  int limit;
  WD_TRY(long_lines(&lines, (int64_t)s.hidden * s.tokens * s.top_k, false));
  WD_TRY(shared_memory_of_block(&limit));
  if (lines && direct_shared_bytes(s.top_k, direct_bytes<Lines, 2, 2>()) <= (size_t)limit)
    return launch_direct<T, Lines>(args, dependent, stream);
  static_assert(direct_bytes<PlainRows<T, 128>, 2, 2>() <= WD_CUDA_DIRECT_RING &&
                    direct_bytes<TransposedRows<T, 2>, 2, 2>() <= WD_CUDA_DIRECT_RING,
                "as wd_cuda_serves() counts");
  return launch_direct<T, TransposedRows<T, 2>>(args, dependent, stream);
}

wd_status down_direct(const wd_down_args &args, bool dependent, cudaStream_t stream) {
  return args.shape.dtype == WD_BF16 ? choose_rows<bf16>(args, dependent, stream)
                                     : choose_rows<f16>(args, dependent, stream);
}

} // namespace wd
