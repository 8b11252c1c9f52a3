// gate_up_tiled.cu - moe_gate_up_3d_batched, tiled schedule: bfloat16, and the choice. A file a type: they take
// minutes.
#include "gate_up_tiled.cuh"

namespace wd {

extern template wd_status gate_up_tiled_of<f16>(const wd_gate_up_args &, const RouteLists &, const void *,
                                                wd_cuda_handover *, cudaStream_t);

wd_status gate_up_tiled(const wd_gate_up_args &args, const RouteLists &lists, const void *columns,
                        wd_cuda_handover *handover, cudaStream_t stream) {
  return args.shape.dtype == WD_BF16 ? gate_up_tiled_of<bf16>(args, lists, columns, handover, stream)
                                     : gate_up_tiled_of<f16>(args, lists, columns, handover, stream);
}

} // namespace wd
