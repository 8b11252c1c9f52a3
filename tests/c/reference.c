/* reference.c - the layer in FP64, and the bound of the error that the numerics contract leaves.
 *
 * U = 2^-24 is half an ulp of FP32. A sum of n products, added in 32 lanes that are then added in pairs, rounds no
 * addend more than n/32 + 6 times, so it errs by at most (n/32 + 6) U sum |a b|; two more are allowed for. The
 * intermediate adds the activation's error, and its rounding to 16 significant bits (2^-16; float16 keeps its remainder
 * no finer than 2^-35). down multiplies what it is given, so its error is |D| times that, plus its own sum's, plus one
 * rounding a slot. The output adds half an ulp of its type. Second-order terms are covered by 1% on everything. */
#include "reference.h"
#include "harness.h"
#include <math.h>
#include <stdlib.h>

static const double U = 0x1p-24;

/* A number and the bound of its error. */
typedef struct {
  double value, error;
} bounded;

/* The larger of two ratios; a NaN is worse than anything. */
static double worse(double a, double b) {
  return isnan(b) ? (double)INFINITY : a > b ? a : b;
}

static double roundings(int64_t n) {
  return (double)((n + 31) / 32 + 8) * U;
}

/* Half an ulp of the type at x, where x is in its range. */
static double half_ulp(kind of, double x) {
  static const int digits[] = {24, 11, 8}, least[] = {-149, -24, -133}; /* significant bits, the lowest subnormal */
  int exponent = 0;
  frexp(x, &exponent); /* x = m 2^exponent, 1/2 <= m < 1: an ulp is 2^(exponent - digits) */
  const int ulp = exponent - digits[of];
  return ldexp(1.0, (x == 0.0 || ulp < least[of] ? least[of] : ulp) - 1);
}

static bounded dot(const tensor *a, int64_t a_at, const tensor *b, int64_t b_at, int64_t n) {
  bounded sum = {0};
  for (int64_t i = 0; i < n; i++) {
    const double term = tensor_get(a, a_at + i) * tensor_get(b, b_at + i);
    sum.value += term;
    sum.error += fabs(term);
  }
  sum.error *= roundings(n);
  return sum;
}

/* No slope is above 1.13, but that of a square. silu rounds its argument never and its result a few times; gelu_tanh
 * raises e to a power that itself carries three roundings, which for |g| < 6 is a few dozen U; gelu is right to 16 U.
 */
static bounded activate(int32_t activation, bounded gate) {
  const double g = gate.value;
  double value = 0.0, slope = 1.13, steps = 8.0, tail = g;
  switch (activation) {
  case WD_ACTIVATION_GELU_TANH:
    tail = 2.0 * sqrt(2.0 / acos(-1.0)) * (g + 0.044715 * g * g * g);
    steps += 4.0 * fabs(tail);
    value = g / (1.0 + exp(-tail));
    break;
  case WD_ACTIVATION_GELU:
    value = 0.5 * g * erfc(-g / sqrt(2.0));
    steps = 16.0;
    break;
  case WD_ACTIVATION_RELU:
    value = fmax(g, 0.0);
    break;
  case WD_ACTIVATION_RELU2:
    value = g > 0.0 ? g * g : 0.0;
    slope = 2.0 * (fabs(g) + gate.error);
    break;
  default:
    value = g / (1.0 + exp(-tail));
  }
  return (bounded){value, slope * gate.error + steps * U * fabs(value)};
}

static bounded intermediate_at(const call *of, int64_t token, int64_t expert, int64_t i) {
  const sizes *s = &of->sizes;
  const tensor *states = &of->tensors[HIDDEN_STATES], *weights = &of->tensors[GATE_UP_PROJ];
  const int64_t row = expert * 2 * s->intermediate + i;
  const bounded gate = dot(states, token * s->hidden, weights, row * s->hidden, s->hidden);
  const bounded up = dot(states, token * s->hidden, weights, (row + s->intermediate) * s->hidden, s->hidden);
  const bounded act = activate(s->activation, gate);
  bounded product = {act.value * up.value, 0};
  product.error = 1.01 * (act.error * fabs(up.value) + up.error * fabs(act.value) + U * fabs(product.value));
  if (s->of != FLOAT32) product.error += 0x1p-16 * fabs(product.value) + (s->of == FLOAT16 ? 0x1p-35 : 0.0);
  return product;
}

static int64_t expert_of(const call *of, int64_t route) {
  const double id = tensor_get(&of->tensors[TOPK_IDS], route);
  return id >= 0.0 && id < (double)of->sizes.experts ? (int64_t)id : -1;
}

void check_intermediate(const call *of, const char *title) {
  const sizes *s = &of->sizes;
  const tensor *found = &of->tensors[INTERMEDIATE];
  const int parts = s->of == FLOAT32 ? 1 : 2;
  const double scale = s->of == FLOAT16 ? 0x1p-11 : 1.0; /* S of warpdecode.h */
  double worst = 0.0;
  int untouched = 1;
  for (int64_t route = 0; route < s->tokens * s->top_k; route++) {
    const int64_t expert = expert_of(of, route), row = route * parts * s->intermediate;
    for (int64_t i = 0; i < s->intermediate; i++) {
      const double first = tensor_get(found, row + i);
      const double second = parts == 2 ? tensor_get(found, row + s->intermediate + i) : 0.0;
      if (expert < 0) {
        untouched &= isnan(first) && (parts == 1 || isnan(second));
        continue;
      }
      const bounded expected = intermediate_at(of, route / s->top_k, expert, i);
      worst = worse(worst, fabs(first + second * scale - expected.value) / expected.error);
    }
  }
  CHECK(worst <= 1.0, "%s: the intermediate is %g times as far from the FP64 reference as it may be", title, worst);
  CHECK(untouched, "%s: the intermediate of an id out of range was written", title);
}

void check_output(const call *of, const char *title) {
  const sizes *s = &of->sizes;
  const tensor *down = &of->tensors[DOWN_PROJ];
  double worst = 0.0;
  bounded *sums = calloc((size_t)s->hidden, sizeof *sums);
  bounded *inter = calloc((size_t)s->intermediate, sizeof *inter);
  if (sums == NULL || inter == NULL) exit(2);
  for (int64_t token = 0; token < s->tokens; token++) {
    for (int64_t h = 0; h < s->hidden; h++)
      sums[h] = (bounded){0};
    for (int64_t route = token * s->top_k; route < (token + 1) * s->top_k; route++) {
      const int64_t expert = expert_of(of, route);
      if (expert < 0) continue;
      const double weight = tensor_get(&of->tensors[TOPK_WEIGHTS], route);
      for (int64_t i = 0; i < s->intermediate; i++)
        inter[i] = intermediate_at(of, token, expert, i);
      for (int64_t h = 0; h < s->hidden; h++) {
        bounded v = {0};
        for (int64_t i = 0; i < s->intermediate; i++) {
          const double d = tensor_get(down, (expert * s->hidden + h) * s->intermediate + i);
          v.value += d * inter[i].value;
          v.error += fabs(d) * (inter[i].error + roundings(s->intermediate) * fabs(inter[i].value));
        }
        sums[h].value += weight * v.value;
        /* each slot's product is rounded with its sum, and again with every later slot's */
        sums[h].error += fabs(weight) * (v.error + (double)s->top_k * U * fabs(v.value));
      }
    }
    for (int64_t h = 0; h < s->hidden; h++) {
      const double slack = 1.01 * sums[h].error;
      const double limit = half_ulp(s->of, fabs(sums[h].value) + slack) + slack;
      worst = worse(worst, fabs(tensor_get(&of->tensors[OUTPUT], token * s->hidden + h) - sums[h].value) / limit);
    }
  }
  free(sums);
  free(inter);
  CHECK(worst <= 1.0, "%s: the output is %g times as far from the FP64 reference as it may be", title, worst);
}
