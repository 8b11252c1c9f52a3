/* cuda.h - the CUDA side as the API sees it. Implemented by cuda/, or by cuda_absent.c in a CPU-only build. */
#ifndef WD_CUDA_H
#define WD_CUDA_H

#include "args.h"
#include "check.h"

#ifdef __cplusplus
extern "C" {
#endif

/* The schedules (schedule.c chooses). All give the same bits. */
typedef enum { WD_CUDA_DIRECT, WD_CUDA_GROUPED, WD_CUDA_TILED } wd_cuda_schedule;

/* Most slots that the direct schedule serves; most hidden values and most neurons (the second axis of a grid, blocks of
 * 16 rows and more); bytes of shared memory that a slot needs at least (a ring of two steps of 16 rows and two columns,
 * 256 bytes of each); most experts that the tiled one serves. */
#define WD_CUDA_DIRECT_MAX_TOP_K 16
#define WD_CUDA_DIRECT_MAX_ROWS (16 * 65535)
#define WD_CUDA_DIRECT_RING (2 * (16 + 2) * 256)
#define WD_CUDA_TILED_MAX_EXPERTS 512

/* Most routes of one call of wd_gate_up_cuda or wd_down_cuda. */
#define WD_CUDA_MOST_ROUTES (1 << 17)

/* 1 when the schedule serves this shape on this device: tiled needs compute capability 9.0 and a build for it, and
 * weights as rows in one piece; direct room for a ring a slot, and rows that its grid has room for. */
int wd_cuda_serves(wd_cuda_schedule schedule, int32_t device, const wd_moe_shape *shape);

/* Makes `device` current and remembers the one that was; wd_cuda_leave restores it. Fails with WD_NO_CUDA where this
 * build or this machine cannot run CUDA. */
wd_status wd_cuda_enter(int32_t device, int32_t *previous);
wd_status wd_cuda_leave(int32_t previous);

/* Bytes of scratch that either operation needs on this shape, whichever schedule is chosen. A multiple of 16. */
size_t wd_cuda_scratch_bytes(const wd_moe_shape *shape);

/* What down of a call is told of the gate_up before it, which says in the scratch what it has served. row_blocks: the
 * blocks (tiled: units of rows) that serve the same routes of an expert; 0: nothing is said before the grid ends.
 * split_routes: how many routes of an expert they serve at once (tiled: each so many have units of their own). grouped
 * alone: splits such rows of blocks, of which z serves routes [z * split_routes, (z + 1) * split_routes) of the
 * expert's, and every splits-th such range after it. */
typedef struct {
  int32_t row_blocks, splits, split_routes;
} wd_cuda_handover;

/* Enqueue on stream, on the current device. handover: to down of the same call, which comes next; then nobody else
 * reads the intermediate, and it may lie in an order of its own, each row padded to a multiple of 32 values; and down
 * may load weights before gate_up has ended. NULL: one operation alone. */
wd_status wd_gate_up_cuda(const wd_gate_up_args *args, wd_cuda_schedule schedule, wd_cuda_handover *handover,
                          void *stream);
wd_status wd_down_cuda(const wd_down_args *args, wd_cuda_schedule schedule, const wd_cuda_handover *handover,
                       void *stream);

/* Reads `bytes` (a multiple of 16) and stores nothing that matters to sink (16 bytes). */
wd_status wd_read_cuda(const void *memory, size_t bytes, void *sink, void *stream);

/* 1 when this build can run the schedule on a device of this machine. Leaves wd_last_error() as it is: not an error. */
int wd_cuda_usable(wd_cuda_schedule schedule);

/* For wd_get_build_info. */
int32_t wd_cuda_runtime_version(void);
const char *wd_cuda_architectures(void);

#ifdef __cplusplus
}
#endif
#endif /* WD_CUDA_H */
