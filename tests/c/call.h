/* call.h - a layer, its tokens and everything a call needs, each buffer between guard pages. */
#ifndef CALL_H
#define CALL_H

#include "tensor.h"

typedef enum { FORWARD, GATE_UP, DOWN } operation;
enum { OPERATIONS = 3 };

/* The tensors of a call. GATE_UP_PROJ and DOWN_PROJ reach the library through wd_moe_experts. */
enum { GATE_UP_PROJ, DOWN_PROJ, HIDDEN_STATES, TOPK_IDS, TOPK_WEIGHTS, INTERMEDIATE, OUTPUT, TENSORS };

const char *operation_name(operation of);
const char *tensor_name(int which);    /* the argument's name in sentences */
const char *tensor_letters(int which); /* its shape in sentences */
int operation_uses(operation of, int which);

typedef struct {
  int64_t tokens, top_k, experts, hidden, intermediate;
  kind of, ids, weights; /* of weights and states, of topk_ids, of topk_weights */
  int32_t activation;
  place where;
} sizes;

typedef struct {
  sizes sizes;
  tensor tensors[TENSORS];
  const DLTensor *given[TENSORS]; /* what a call passes: tensors[i].dl, until a test replaces it */
  wd_moe_experts experts;         /* its two tensors are taken from `given` */
  wd_options options;
  memory workspace;
  void *given_workspace;
  size_t given_workspace_size;
} call;

/* Four tokens of two slots, three experts: for tests of anything but values. Every buffer is a multiple of 16 bytes. */
sizes small_sizes(kind of);

/* Draws everything; the ids are valid. `seed` decides all numbers. */
void call_make(call *made, sizes of, uint64_t seed);
void call_free(call *made);

/* Poisons the workspace and what the operation writes (`call_rerun` does not), and runs it. */
wd_status call_run(call *made, operation of);
wd_status call_rerun(const call *made, operation of);

/* Runs and counts a check that it succeeds. */
void call_succeeds(call *made, operation of);

/* GATE_UP, then DOWN, as checks that they succeed. */
void call_runs_both_halves(call *made);

/* Runs and counts a check that it gives `status`, exactly this sentence, and has written nothing. */
void call_refused(call *made, operation of, wd_status status, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* Counts a check of a status and of wd_last_error() as a whole. */
void check_error(wd_status found, wd_status expected, const char *format, ...) __attribute__((format(printf, 3, 4)));

/* Counts a check that two tensors (or a tensor's rows) have the same bits. */
void check_same_bits(const tensor *found, const void *expected, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

/* Shape or strides as sentences show them: "[3, 64]". */
void numbers_text(char text[96], const int64_t *values, int32_t count);

/* A copy of a tensor's bytes, for check_same_bits; freed by the caller. */
void *bits_of(const tensor *of);

/* The rows of the table of kernels that run on this machine's CPU; returns how many (at most `limit`). */
int usable_kernels(const char **names, int limit);

#endif /* CALL_H */
