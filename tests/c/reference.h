/* reference.h - the layer in FP64, written to be right by reading, and how far a right result may lie from it. */
#ifndef REFERENCE_H
#define REFERENCE_H

#include "call.h"

/* Counts a check that call->tensors[INTERMEDIATE] is right (rows of ids out of range: untouched, still poisoned). */
void check_intermediate(const call *of, const char *title);

/* Counts a check that call->tensors[OUTPUT] is right. */
void check_output(const call *of, const char *title);

#endif /* REFERENCE_H */
