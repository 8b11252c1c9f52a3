// gate_up_tiled_f16.cu - moe_gate_up_3d_batched, tiled schedule: float16.
#include "gate_up_tiled.cuh"

template wd_status wd::gate_up_tiled_of<wd::f16>(const wd_gate_up_args &, const RouteLists &, const void *,
                                                 wd_cuda_handover *, cudaStream_t);
