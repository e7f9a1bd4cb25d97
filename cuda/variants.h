// The CUDA variants of the dispatch tables. A strategy's folder says how it works.
#pragma once

#include <functional>

#include "pyinvolution/dispatch.h"

namespace pyinvolution::cuda {

// A thread for each element: every problem.
Refusal generic_refusal(const Problem&, Pass);
void generic_run(const Problem&, Pass, const Buffers&, const Execution&);

// A sliding window in registers: every kernel, stride, dilation and number of channels whose windows fit into shared
// memory.
Refusal sliding_refusal(const Problem&, Pass);
Refusal sliding_slower(const Problem&, Pass);
void sliding_run(const Problem&, Pass, const Buffers&, const Execution&);

// Tiles in shared memory: float32 and 16-bit types.
Refusal tiled_refusal(const Problem&, Pass);
void tiled_run(const Problem&, Pass, const Buffers&, const Execution&);

// Tensor cores: 16-bit types with 16 channels per group.
Refusal mma_refusal(const Problem&, Pass);
void mma_run(const Problem&, Pass, const Buffers&, const Execution&);

// The same with weights computed on the fly from the reduced channels.
Refusal fused_refusal(const SpanProblem&, SpanOp);
Refusal fused_slower(const SpanProblem&, SpanOp);
void fused_run(const SpanProblem&, SpanOp, const SpanBuffers&, const Execution&);
int64_t fused_scratch(const SpanProblem&, SpanOp);

// "CUDA 12.8, architectures 80 86 89 90, PTX 80 90".
const char* build();

// Calls `work` unless the stream is being captured into a graph. What `work` allocates or waits for does not invalidate
// the captures of other threads.
void unless_captured(void* stream, const std::function<void()>& work);

// Seconds for which `work`, enqueued by its call, kept the stream busy.
double seconds(void* stream, const std::function<void()>& work);

}  // namespace pyinvolution::cuda
