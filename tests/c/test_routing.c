/* test_routing.c - ids out of range, duplicates, no tokens at all, NaN that must or must not spread. */
#include "harness.h"
#include "reference.h"
#include <math.h>
#include <stdlib.h>
#include <string.h>

/* Ids that name no expert of small_sizes' three. Those beyond 32 bits would name one if they were cut to 32. */
static const int64_t nobody[] = {-1,        3,         INT32_MIN,       INT32_MAX,        INT64_MIN,
                                 INT64_MAX, 1ll << 32, (1ll << 32) + 1, -(1ll << 32) + 2, 65536,
                                 -3,        4,         INT64_MIN + 2,   (1ll << 62) + 2};
enum { NOBODIES = sizeof nobody / sizeof *nobody };

static int fits(kind ids, int64_t id) {
  return ids == INT64 || (id >= INT32_MIN && id <= INT32_MAX);
}

static void set_route(call *c, int64_t route, int64_t id, double weight) {
  tensor_set_id(&c->tensors[TOPK_IDS], route, id);
  tensor_set(&c->tensors[TOPK_WEIGHTS], route, weight);
}

/* Slot 1 of three names nobody: the bits are those of a call that never had the slot. */
static void an_invalid_slot_is_none(sizes s, int64_t id) {
  harness_doing("id %lld", (long long)id);
  call with, without;
  s.top_k = 2;
  call_make(&without, s, 900);
  s.top_k = 3;
  call_make(&with, s, 900);
  for (int64_t token = 0; token < s.tokens; token++)
    for (int64_t slot = 0; slot < 3; slot++) {
      const int64_t from = 2 * token + slot / 2;
      if (slot == 1)
        set_route(&with, 3 * token + 1, id, (double)NAN);
      else
        set_route(&with, 3 * token + slot, (int64_t)tensor_get(&without.tensors[TOPK_IDS], from),
                  tensor_get(&without.tensors[TOPK_WEIGHTS], from));
    }
  call_succeeds(&without, FORWARD);
  call_succeeds(&with, FORWARD);
  check_same_bits(&with.tensors[OUTPUT], without.tensors[OUTPUT].memory.data, "%s, a slot with id %lld (%s) added",
                  kind_name(s.of), (long long)id, kind_name(s.ids));
  check_output(&with, "a slot of an id out of range");
  call_runs_both_halves(&with); /* down meets NaN in the rows that gate_up left alone */
  check_intermediate(&with, "a slot of an id out of range");
  check_same_bits(&with.tensors[OUTPUT], without.tensors[OUTPUT].memory.data, "down, id %lld", (long long)id);
  call_free(&with);
  call_free(&without);
}

/* Token 1 has no expert at all: zeros, and nothing else changes. */
static void a_token_of_nobody_is_zero(sizes s) {
  call c;
  call_make(&c, s, 901);
  const size_t row = c.tensors[OUTPUT].memory.bytes / (size_t)s.tokens;
  unsigned char *zeros = calloc(row, 1);
  call_succeeds(&c, FORWARD);
  void *before = bits_of(&c.tensors[OUTPUT]);
  memset((unsigned char *)before + row, 0, row);
  for (int64_t slot = 0; slot < s.top_k; slot++)
    set_route(&c, s.top_k + slot, slot % 2 ? s.experts : -1, (double)NAN);
  call_succeeds(&c, FORWARD);
  check_same_bits(&c.tensors[OUTPUT], before, "%s, a token without experts", kind_name(s.of));
  for (int64_t route = 0; route < s.tokens * s.top_k; route++)
    set_route(&c, route, INT32_MIN, (double)INFINITY);
  for (int of = 0; of < OPERATIONS; of++) {
    call_succeeds(&c, (operation)of);
    if (of == GATE_UP) {
      CHECK(memory_is_poisoned(&c.tensors[INTERMEDIATE].memory), "gate_up wrote for ids that name nobody");
      continue;
    }
    for (int64_t token = 0; token < s.tokens; token++)
      CHECK(memcmp(c.tensors[OUTPUT].memory.data + (size_t)token * row, zeros, row) == 0,
            "%s: token %d of a call without experts is not zero", operation_name((operation)of), (int)token);
  }
  free(before);
  free(zeros);
  call_free(&c);
}

/* One expert in every slot counts once a slot: with equal weights, K times the slot alone. */
static void duplicates(sizes s) {
  call once, twice;
  s.top_k = 1;
  call_make(&once, s, 902);
  s.top_k = 2;
  call_make(&twice, s, 902);
  for (int64_t token = 0; token < s.tokens; token++) {
    const int64_t id = (int64_t)tensor_get(&once.tensors[TOPK_IDS], token);
    set_route(&once, token, id, 0.5);
    set_route(&twice, 2 * token, id, 0.25);
    set_route(&twice, 2 * token + 1, id, 0.25);
  }
  call_succeeds(&once, FORWARD);
  call_succeeds(&twice, FORWARD);
  check_output(&twice, "duplicates");
  /* 0.25 v is exact, and so is the sum of two of them */
  check_same_bits(&twice.tensors[OUTPUT], once.tensors[OUTPUT].memory.data, "%s, an expert twice at half the weight",
                  kind_name(s.of));
  call_free(&once);
  call_free(&twice);
}

/* A NaN or an infinity in a token's state or weight stays with the token, and shows there. */
static void nan_stays_with_its_token(sizes s) {
  call c;
  call_make(&c, s, 903);
  call_succeeds(&c, FORWARD);
  void *before = bits_of(&c.tensors[OUTPUT]);
  tensor_set(&c.tensors[HIDDEN_STATES], s.hidden + 3, (double)NAN);
  tensor_set(&c.tensors[TOPK_WEIGHTS], 2 * s.top_k, (double)NAN);
  call_succeeds(&c, FORWARD);
  const size_t row = c.tensors[OUTPUT].memory.bytes / (size_t)s.tokens;
  for (int64_t token = 0; token < s.tokens; token++) {
    if (token == 1 || token == 2) {
      int64_t nans = 0;
      for (int64_t h = 0; h < s.hidden; h++)
        nans += isnan(tensor_get(&c.tensors[OUTPUT], token * s.hidden + h));
      CHECK(nans == s.hidden, "%s: %d of %d outputs of a token with a NaN are NaN", kind_name(s.of), (int)nans,
            (int)s.hidden);
    } else {
      const size_t at = (size_t)token * row;
      CHECK(memcmp(c.tensors[OUTPUT].memory.data + at, (unsigned char *)before + at, row) == 0,
            "%s: a NaN of another token changed token %d", kind_name(s.of), (int)token);
    }
  }
  free(before);
  call_free(&c);
}

/* T == 0 succeeds with no memory at all, whatever the strides; each operation, with and without a pool. */
static void no_tokens(sizes s) {
  static const int64_t strides[4] = {7, 5, 3, 2};
  s.tokens = 0;
  call c;
  call_make(&c, s, 904);
  CHECK(c.given_workspace_size == 0, "no tokens want a workspace of %zu bytes", c.given_workspace_size);
  DLTensor empty[TENSORS];
  for (int i = HIDDEN_STATES; i < TENSORS; i++) {
    empty[i] = c.tensors[i].dl;
    empty[i].data = NULL;
    c.given[i] = &empty[i];
  }
  c.given_workspace = NULL;
  for (int strided = 0; strided < 2; strided++)
    for (int of = 0; of < OPERATIONS; of++) {
      for (int i = HIDDEN_STATES; i < TENSORS; i++)
        empty[i].strides = strided ? (int64_t *)(uintptr_t)strides : NULL;
      call_succeeds(&c, (operation)of);
    }
  CHECK(wd_threads_create(2, &c.options.threads) == WD_OK, "a pool: %s", wd_last_error());
  for (int of = 0; of < OPERATIONS; of++)
    call_succeeds(&c, (operation)of);
  wd_threads_destroy(c.options.threads);
  call_free(&c);
}

void test_routing(void) {
  for (int of = 0; of < FLOAT_KINDS; of++)
    for (int ids = INT32; ids <= INT64; ids++) {
      sizes s = small_sizes((kind)of);
      s.ids = (kind)ids;
      for (int i = 0; i < NOBODIES; i++)
        if (fits(s.ids, nobody[i])) an_invalid_slot_is_none(s, nobody[i]);
      a_token_of_nobody_is_zero(s);
      duplicates(s);
      nan_stays_with_its_token(s);
      no_tokens(s);
    }
}
