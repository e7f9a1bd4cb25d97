#include "cpu/columns/tiling.h"
#include "cpu/kernels.h"
#include "cpu/tasks.h"
#include "cpu/variants.h"

namespace pyinvolution::cpu {

Refusal columns_refusal(const Problem& p, Pass) {
  if (p.upsample_h != 1 || p.upsample_w != 1) return needs("an upsampling of 1", p.upsample_h, p.upsample_w);
  return {};
}

void columns_run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  const CpuKernels& kernels = current_kernels();
  const double work = double(problem.batch * problem.channels * problem.taps()) * double(problem.out_h * problem.out_w);
  const Execution where = execution_for(work, execution);
  ColumnsTables tables;
  const ColumnsTiling tiling = make_columns_tiling(problem, pass, buffers, kernels.vector_bytes, where.threads, tables);
  for_each_task(where, problem.batch * tiling.group_chunks * tiling.strips,
                [&](int64_t task) { kernels.columns(tiling, task, scratch(tiling.scratch_bytes)); });
}

}  // namespace pyinvolution::cpu
