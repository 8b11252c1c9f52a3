/* harness.h - checks, counted. Only the main thread checks: a thread of a test reports to it. */
#ifndef HARNESS_H
#define HARNESS_H

/* Counts one check; a failed one prints the sentence. */
#define CHECK(condition, ...) harness_check((condition) != 0, __FILE__, __LINE__, __VA_ARGS__)

void harness_check(int passed, const char *file, int line, const char *format, ...)
    __attribute__((format(printf, 4, 5)));

/* Says what was not tested, and why. */
void harness_skip(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* What is being done, for the sentence that a fault (a guard page touched) ends the program with. */
void harness_doing(const char *format, ...) __attribute__((format(printf, 1, 2)));

/* The tests, in the order in which they run: one function a file. */
void test_info(void);
void test_values(void);
void test_bits(void);
void test_routing(void);
void test_tensor_refusals(void);
void test_call_refusals(void);
void test_addresses(void);
void test_guard_pages(void);
void test_layouts(void);
void test_experts_refusals(void);
void test_read_memory(void);
void test_cuda(void);
void test_concurrency(void);

#endif /* HARNESS_H */
