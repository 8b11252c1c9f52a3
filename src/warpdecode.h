/* warpdecode.h - the public C ABI of warpdecode: warp decode kernels for Mixture-of-Experts layers.
 *
 * What a layer computes, for token t, slot k, expert e = topk_ids[t,k], neuron i, hidden index h:
 *
 *   gate      = sum_h hidden_states[t,h] * gate_up_proj[e,   i, h]
 *   up        = sum_h hidden_states[t,h] * gate_up_proj[e, I+i, h]
 *   inter     = activation(gate) * up                                      wd_moe_gate_up_3d_batched
 *   output    = sum_k topk_weights[t,k] * sum_i inter[t,k,i] * down_proj[e,h,i]   wd_moe_down_3d_batched
 *
 * wd_moe_experts says what other families of models do to this: other layouts, biases, limits, no up, the routing
 * weight on the input.
 *
 * Letters: T tokens, K experts per token (slots), E experts, H hidden size, I intermediate size. A *route* is one
 * (token, slot) pair.
 *
 * The numerics contract. The bits of a token's output depend on its hidden state, its ids, its routing weights and the
 * experts' weights, and on nothing else: not on T, the token's position, the other tokens, the layout of the weights,
 * the schedule, the number of threads, eager call or CUDA graph. All sums are FP32; a bias is added once, to the
 * finished sum; the intermediate keeps at least 16 significant bits (with float16 from 2^-20 to 65504: below it is off
 * by at most 2^-36, above it is infinite), slots are combined in slot order with one fused multiply-add each, and the
 * output is rounded once. On CPUs every kernel of the table gives the same bits; on GPUs the
 * bits may differ between architectures. wd_numerics_id() names them.
 *
 * Routing. An id outside [0, E) contributes nothing and is never dereferenced; its routing weight may be NaN. An id
 * that occurs twice in a token counts twice. T == 0 succeeds and does nothing.
 *
 * Tensors are borrowed DLPack tensors: compact (strides NULL or row-major), their data (byte_offset included) aligned
 * to their element size, on CUDA to 16 bytes (but ids, routing weights, biases and tables). All tensors of a call live
 * on one device: kDLCPU (or kDLCUDAHost, treated as CPU memory), or one kDLCUDA device. The library never allocates
 * device memory, never synchronises, never keeps a pointer after a call, never prints, never exits. On CUDA a call
 * enqueues kernels on the caller's stream and returns; every pointer must stay valid until the stream has passed them.
 * From compute capability 9.0 on the first of them may be a programmatic dependent launch; it waits, before it looks at
 * anything, for the kernel ahead of it, and one that was itself launched so must have waited for what is ahead of it,
 * as CUDA asks of it. On the CPU a call returns when the result is written.
 *
 * Errors. Every function that can fail returns a wd_status. wd_last_error() then holds a sentence, for this thread,
 * that names the argument, what it was and what was expected. Everything is checked before the first launch: when
 * WD_INVALID_ARGUMENT, WD_UNSUPPORTED or WD_NO_CUDA comes back, nothing was launched and nothing was written.
 *
 * Threads. Every function may be called from several threads at once, on memory of their own: what a call writes, its
 * workspace included, nothing else may read or write until it has ended (on CUDA: until the stream has passed it).
 */
#ifndef WARPDECODE_H
#define WARPDECODE_H

#include <dlpack/dlpack.h>
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define WD_API __attribute__((visibility("default")))
#else
#define WD_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* The version of this header; wd_version() is the library's. Major and minor are equal, or the two do not belong
 * together: structs say how large they are in the caller's header, and one of another size is refused. */
enum { WD_VERSION_MAJOR = 0, WD_VERSION_MINOR = 1, WD_VERSION_PATCH = 0 };

typedef enum wd_status {
  WD_OK = 0,
  WD_INVALID_ARGUMENT = 1, /* an argument breaks the contract of this header */
  WD_UNSUPPORTED = 2,      /* valid, but no kernel of this build serves it */
  WD_NO_CUDA = 3,          /* a CUDA tensor met a CPU-only build, or no usable driver or device */
  WD_CUDA_ERROR = 4,       /* the CUDA runtime reported an error */
  WD_OUT_OF_MEMORY = 5     /* host memory or threads could not be had (wd_threads_create alone) */
} wd_status;

typedef enum wd_activation {
  WD_ACTIVATION_SILU = 0,      /* g / (1 + exp(-alpha g)), alpha 1 unless the experts say another */
  WD_ACTIVATION_GELU_TANH = 1, /* 0.5 g (1 + tanh(sqrt(2/pi) (g + 0.044715 g^3))) */
  WD_ACTIVATION_GELU = 2,      /* 0.5 g (1 + erf(g / sqrt(2))) */
  WD_ACTIVATION_RELU = 3,      /* max(g, 0) */
  WD_ACTIVATION_RELU2 = 4      /* max(g, 0)^2 */
} wd_activation;

typedef enum wd_transposed {
  WD_TRANSPOSED_NONE = 0,
  WD_TRANSPOSED_ALL = 1, /* gate_up_proj is [E, H, 2I], up_proj [E, H, I], down_proj [E, I, H] */
  WD_TRANSPOSED_DOWN = 2 /* down_proj alone is [E, I, H] */
} wd_transposed;

/* One layer's experts. Set struct_size to sizeof(wd_moe_experts). The whole struct zero but for the first four fields
 * is the standard layout.
 *
 * dtype of all weights, of hidden_states and of output: bfloat16 or float16, on the CPU also float32. Biases: the same
 * dtype or float32. H and I are multiples of 8 from 8 to 2^24, E is 1 to 65535. All of it is borrowed for the duration
 * of a call and never written.
 *
 * The layout does not touch the bits: the same numbers, stored in another layout, give the same output. It may touch
 * the speed: on CUDA the schedule for many tokens needs rows in one piece, so neither transposed weights nor tables.
 *
 * Pointers. Experts whose matrices were allocated one by one need no copy: where `gate_up_pointers` is given, it is a
 * table of E addresses (int64 or uint64, in the memory of the weights' device), of the first element of each expert's
 * matrix, and gate_up_proj describes one of these matrices: its shape without E, dtype and device; its data is not
 * looked at. The same for the other tables. Each matrix is compact and aligned as a tensor would be. The addresses are
 * read by the kernels alone: the library cannot check them, and a wrong one is undefined behaviour, as is one whose
 * memory the call writes to. E is the table's length; tensors and tables may be mixed. */
typedef struct wd_moe_experts {
  size_t struct_size;
  const DLTensor *gate_up_proj; /* [E, 2I, H]: rows gate(0..I-1), then up(0..I-1) */
  const DLTensor *down_proj;    /* [E, H, I] */
  int32_t activation;           /* wd_activation, applied to gate */
  const DLTensor *up_proj;      /* NULL, or [E, I, H]: the up rows; gate_up_proj is then [E, I, H], the gate rows */
  const DLTensor *gate_up_bias; /* NULL, or [E, 2I], in the order of the rows of gate_up_proj ([E, I] where it has I) */
  const DLTensor *up_bias;      /* NULL, or with up_proj [E, I] */
  const DLTensor *down_bias;    /* NULL, or [E, H]: added before the routing weight is multiplied */
  const DLTensor *gate_up_pointers, *down_pointers, *up_pointers;                /* NULL, or [E]: see above */
  const DLTensor *gate_up_bias_pointers, *up_bias_pointers, *down_bias_pointers; /* NULL, or [E] */
  int32_t is_transposed;                                                         /* wd_transposed */
  int32_t is_interleaved;  /* 1: the rows of gate_up_proj (its columns, where transposed) and its biases are gate(0),
                              up(0), gate(1), up(1), ... */
  int32_t no_gate;         /* 1: gate_up_proj is [E, I, H] and inter = activation(x . row); there is no up */
  int32_t weight_on_input; /* 1: topk_weights multiply the hidden states instead of the output. The product with the
                              finished FP32 sums is taken, (w x) . g = w (x . g), before the biases, so nothing is
                              rounded to the dtype. wd_moe_forward alone serves it. */
  float limit;             /* 0: none. Else gate = min(gate, limit) and up = min(max(up, -limit), limit) */
  int32_t clamp_after_activation; /* 1: the limit holds for activation(gate) instead of gate (Step 3.7) */
  float alpha;                    /* of silu; 0: 1 */
  float up_offset; /* inter = activation(gate) * (up + up_offset), after the limit; gpt-oss: 1, limit 7, alpha 1.702 */
} wd_moe_experts;

/* A pool of CPU threads, owned by the caller. It must not be used in a child process after fork(). */
typedef struct wd_threads wd_threads;

/* How a call runs; NULL means all defaults. Set struct_size to sizeof(wd_options). */
typedef struct wd_options {
  size_t struct_size;
  wd_threads *threads; /* CPU: threads to share the work with; NULL: the calling thread alone. If another call is using
                          the pool, the calling thread works alone. The bits do not depend on it. Ignored on CUDA. */
  const char *kernel;  /* name of a wd_kernel_info row to use instead of the one that would be chosen; NULL: choose.
                          For tests and benchmarks: all rows of a device give the same bits. */
} wd_options;

/* The library's version, "major.minor.patch". Static storage. */
WD_API const char *wd_version(void);

/* A short string that changes whenever any bit of any output may change. Static storage. */
WD_API const char *wd_numerics_id(void);

/* This thread's last error sentence, "" before the first. Valid until this thread's next failing call. */
WD_API const char *wd_last_error(void);

/* Bytes of workspace for any of the three operations on `num_tokens` tokens (0 or more) with `top_k` slots each (1 to
 * 1024), written to *bytes; 0 when num_tokens is 0. The size grows with num_tokens only up to a bound: larger calls run
 * in passes. The experts are checked as by an operation, their data included. On failure *bytes stays as it was. */
WD_API wd_status wd_moe_workspace_size(const wd_moe_experts *experts, int64_t num_tokens, int64_t top_k, size_t *bytes);

/* The whole layer: output = MoE(hidden_states).
 *   hidden_states  [T, H]   dtype of the weights
 *   topk_ids       [T, K]   int32 or int64; K is 1 to 1024
 *   topk_weights   [T, K]   float32, bfloat16 or float16
 *   output         [T, H]   dtype of the weights; must not overlap any input
 *   workspace      at least wd_moe_workspace_size bytes on the same device, aligned to 16 bytes; contents do not
 * matter; must not overlap any tensor stream         the cudaStream_t to enqueue on (NULL is the legacy default
 * stream); ignored on the CPU options        NULL or see wd_options */
WD_API wd_status wd_moe_forward(const wd_moe_experts *experts, const DLTensor *hidden_states, const DLTensor *topk_ids,
                                const DLTensor *topk_weights, const DLTensor *output, void *workspace,
                                size_t workspace_size, void *stream, const wd_options *options);

/* The first kernel alone: intermediate = activation(gate) * up for every route. Like the second alone it refuses
 * experts with weight_on_input: it takes no routing weights, and the second would have to ignore those that it takes.
 *   intermediate   [T, K, P, I], dtype of the weights; must not overlap any input. P is 2 for bfloat16 and float16: the
 * rounded value, then the rounding's remainder, scaled: value = intermediate[..,0,:] + intermediate[..,1,:] * 2^-S,
 * where S is 0 for bfloat16 and 11 for float16. P is 1 for float32. Rows of routes whose id is outside [0, E) are not
 * written. The other arguments as in wd_moe_forward. */
WD_API wd_status wd_moe_gate_up_3d_batched(const wd_moe_experts *experts, const DLTensor *hidden_states,
                                           const DLTensor *topk_ids, const DLTensor *intermediate, void *workspace,
                                           size_t workspace_size, void *stream, const wd_options *options);

/* The second kernel alone: output = sum over slots of topk_weights * down_proj . intermediate.
 * Arguments as above. Together with wd_moe_gate_up_3d_batched it gives the bits of wd_moe_forward. */
WD_API wd_status wd_moe_down_3d_batched(const wd_moe_experts *experts, const DLTensor *intermediate,
                                        const DLTensor *topk_ids, const DLTensor *topk_weights, const DLTensor *output,
                                        void *workspace, size_t workspace_size, void *stream,
                                        const wd_options *options);

/* Reads every byte of `memory` once and computes nothing: the ceiling that benchmarks compare with. memory: compact, of
 * elements of whole bytes, data and number of bytes multiples of 16. sink: 16 bytes on the same device, aligned to 16,
 * outside of memory; written or not, contents do not matter. options: on the CPU a kernel's instructions read; on CUDA
 * kernel must be NULL. */
WD_API wd_status wd_read_memory(const DLTensor *memory, void *sink, void *stream, const wd_options *options);

/* Starts a pool in which `count` threads share a call's work, the calling thread included (count - 1 are created, with
 * all signals blocked). count >= 1. The caller owns *threads and ends it with wd_threads_destroy, when no call uses it;
 * NULL is allowed there. On failure (WD_INVALID_ARGUMENT, or WD_OUT_OF_MEMORY where the system gives no memory or no
 * thread) *threads is NULL. */
WD_API wd_status wd_threads_create(int32_t count, wd_threads **threads);
WD_API void wd_threads_destroy(wd_threads *threads);

/* What this build contains. Set struct_size to sizeof(wd_build_info) before the call. Strings are static. */
typedef struct wd_build_info {
  size_t struct_size;
  int32_t cuda_compiled;          /* 1 when CUDA kernels are compiled in */
  int32_t cuda_runtime_version;   /* of the static runtime linked in, 1000*major + 10*minor; 0 without CUDA */
  const char *cuda_architectures; /* e.g. "80;90;100;120;120-virtual"; "" without CUDA */
  const char *compiler;           /* the C compiler's version */
} wd_build_info;
WD_API wd_status wd_get_build_info(wd_build_info *info);

/* One row of the table of kernels, best first for each device. Set struct_size to sizeof(wd_kernel_info). */
typedef struct wd_kernel_info {
  size_t struct_size;
  const char *name;        /* for wd_options.kernel */
  const char *description; /* one line */
  int32_t device_type;     /* kDLCPU or kDLCUDA */
  int32_t usable;          /* 1 when this machine can run it */
} wd_kernel_info;
WD_API int32_t wd_kernel_count(void);
WD_API wd_status wd_get_kernel_info(int32_t index, wd_kernel_info *info); /* 0 <= index < wd_kernel_count() */

/* Number of usable CUDA devices, in *count. On failure (CPU-only build, no driver, driver too old) *count is 0, the
 * status is WD_NO_CUDA and wd_last_error() says why and what to do. */
WD_API wd_status wd_cuda_device_count(int32_t *count);

/* Set struct_size to sizeof(wd_cuda_device_info) before the call. 0 <= device < wd_cuda_device_count's; WD_NO_CUDA
 * where that fails. */
typedef struct wd_cuda_device_info {
  size_t struct_size;
  char name[256];
  int32_t compute_capability; /* 10*major + minor */
  int32_t num_sms;
  int32_t driver_version; /* newest CUDA version the driver serves, 1000*major + 10*minor */
  int64_t l2_bytes;
  int64_t memory_bytes;
} wd_cuda_device_info;
WD_API wd_status wd_get_cuda_device_info(int32_t device, wd_cuda_device_info *info);

#ifdef __cplusplus
}
#endif
#endif /* WARPDECODE_H */
