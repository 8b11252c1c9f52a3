/* experts.h - the description of a layer, checked, and what the kernels make of its layout. */
#ifndef WD_EXPERTS_H
#define WD_EXPERTS_H

#include "tensor.h"

typedef struct {
  wd_moe_experts given;
  int both;           /* gate_up_proj has the rows of gate and of up */
  int transposed;     /* gate_up_proj and up_proj are */
  wd_moe_shape shape; /* experts, hidden, intermediate, dtype; the rest is the call's */
  DLDevice device;    /* kDLCPU or kDLCUDA */
  size_t alignment;   /* that floats of this device need, in bytes */
  wd_matrix gate, up, down;
  wd_bias gate_bias, up_bias, down_bias;
  wd_gating gating;
} wd_experts;

wd_status wd_check_experts(const wd_moe_experts *given, wd_experts *experts);

/* `written` must not overlap the weights, as far as they are tensors, nor the tables of pointers. */
wd_status wd_check_experts_disjoint(const wd_experts *experts, const DLTensor *written, const char *name);

#endif /* WD_EXPERTS_H */
