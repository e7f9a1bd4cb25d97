#include "cpu/batch_norm/batch_norm.h"

#include <cmath>
#include <vector>

#include "cpu/arithmetic.h"
#include "cpu/batch_norm/tiling.h"
#include "cpu/kernels.h"
#include "cpu/tasks.h"

namespace pyinvolution::cpu {
namespace {

constexpr int64_t block_elements = 8192;  // 32 KB in float: read twice, the second time from the first levels of cache
constexpr int64_t most_tasks = 64;
// Of a task, if there are so many: one thread merges the tasks' sums, which costs as much as a few pixels of each.
constexpr int64_t least_pixels = 32;
constexpr int64_t folded_channels =
    64;  // four vectors of 64 bytes: enough sums at a time to hide the latency of an addition

BatchNormTiling tiling_of(const BatchNormShape& shape) {
  BatchNormTiling t{};
  t.dtype = shape.dtype, t.channels_last = shape.channels_last;
  t.batch = shape.batch, t.channels = shape.channels, t.pixels = shape.pixels;
  t.fold = 1;
  const auto at_least_one = [](int64_t n) { return n < 1 ? int64_t{1} : n; };
  if (t.channels_last) {
    t.pixels *= t.batch, t.batch = 1;
    for (; 2 * t.channels <= folded_channels && t.pixels % 2 == 0; t.fold *= 2) t.channels *= 2, t.pixels /= 2;
    t.block_pixels = at_least_one(block_elements / t.channels);
    t.task_pixels = round_up(max(ceil_div(t.pixels, most_tasks), least_pixels), t.block_pixels);
    t.tasks = ceil_div(t.pixels, t.task_pixels);
  } else {
    t.block_pixels = block_elements;
    t.task_channels = min(at_least_one(block_elements / t.pixels), t.channels);
    t.tasks = t.batch * ceil_div(t.channels, t.task_channels);
  }
  return t;
}

// Rows of the partial sums, and the elements of a channel that a row stands for.
int64_t partial_rows(const BatchNormTiling& t) { return t.channels_last ? t.tasks : t.batch; }
int64_t elements_of(const BatchNormTiling& t, int64_t row) {
  return t.channels_last ? min(t.task_pixels, t.pixels - row * t.task_pixels) : t.pixels;
}

void run(const BatchNormTiling& t, BatchNormStep step, const Execution& execution) {
  const CpuKernels& kernels = current_kernels();
  const double elements = double(t.batch * t.channels) * double(t.pixels);
  for_each_task(execution_for(4 * elements, execution), t.tasks,
                [&](int64_t task) { kernels.batch_norm(t, step, task); });
}

// Values for each channel, as often as pixels are folded.
std::vector<float> repeated(const BatchNormTiling& t, const float* values) {
  std::vector<float> all(t.channels);
  const int64_t channels = t.channels / t.fold;
  for (int64_t c = 0; c < t.channels; ++c) all[c] = values[c % channels];
  return all;
}

}  // namespace

void batch_norm_output(const BatchNormShape& shape, const BatchNormForward& forward, const Execution& execution) {
  BatchNormTiling t = tiling_of(shape);
  const std::vector<float> mean = repeated(t, forward.mean), shift = repeated(t, forward.bias);
  std::vector<float> scale = repeated(t, forward.weight);
  for (int64_t c = 0; c < t.channels; ++c) scale[c] *= forward.invstd[c % shape.channels];
  t.x = forward.x, t.residual = forward.residual, t.out = forward.y, t.relu = forward.relu;
  t.mean = mean.data(), t.scale = scale.data(), t.shift = shift.data();
  run(t, BatchNormStep::output, execution);
}

void batch_norm_statistics(const BatchNormShape& shape, const void* x, double eps, float* mean, float* invstd,
                           float* unbiased, const Execution& execution) {
  BatchNormTiling t = tiling_of(shape);
  const int64_t rows = partial_rows(t);
  std::vector<float> partial(2 * rows * t.channels);
  t.x = x, t.partial = partial.data();
  run(t, BatchNormStep::moments, execution);

  std::vector<double> means(shape.channels), squares(shape.channels);
  double before = 0.0;
  for (int64_t row = 0; row < rows; ++row) {
    const double added = double(elements_of(t, row));
    const float *row_mean = &partial[row * t.channels], *square = &partial[(rows + row) * t.channels];
    for (int64_t f = 0; f < t.fold; ++f, row_mean += shape.channels, square += shape.channels, before += added) {
      const double total = before + added;
      for (int64_t c = 0; c < shape.channels; ++c) {
        const double difference = row_mean[c] - means[c];
        means[c] += difference * (added / total);
        squares[c] += square[c] + difference * difference * (before * added / total);
      }
    }
  }
  for (int64_t c = 0; c < shape.channels; ++c) {
    mean[c] = float(means[c]);
    invstd[c] = float(1.0 / std::sqrt(squares[c] / before + eps));
    if (unbiased != nullptr) unbiased[c] = float(squares[c] / (before - 1.0));
  }
}

void batch_norm_backward(const BatchNormShape& shape, const BatchNormBackward& backward, const Execution& execution) {
  BatchNormTiling t = tiling_of(shape);
  const int64_t rows = partial_rows(t);
  std::vector<float> partial(2 * rows * t.channels), scale = repeated(t, backward.weight);
  for (int64_t c = 0; c < t.channels; ++c) scale[c] *= backward.invstd[c % shape.channels];
  const std::vector<float> mean = repeated(t, backward.mean), shift = repeated(t, backward.bias);
  t.x = backward.x, t.gy = backward.gy, t.y = backward.y, t.grad_residual = backward.grad_residual;
  t.relu = backward.relu;
  t.mean = mean.data(), t.scale = scale.data(), t.shift = shift.data();
  t.partial = partial.data();
  run(t, BatchNormStep::sums, execution);

  std::vector<double> sums(shape.channels), products(shape.channels);
  const float *sum = partial.data(), *product = sum + rows * t.channels;
  for (int64_t row = 0; row < rows * t.fold; ++row, sum += shape.channels, product += shape.channels)
    for (int64_t c = 0; c < shape.channels; ++c) sums[c] += sum[c], products[c] += product[c];
  const double elements = double(shape.batch * shape.pixels);
  std::vector<float> linear(t.channels), constant(t.channels);
  for (int64_t c = 0; c < t.channels; ++c) {
    const int64_t of = c % shape.channels;
    const double invstd = backward.invstd[of], factor = scale[c];
    linear[c] = float(-factor * invstd * invstd * products[of] / elements);
    constant[c] = float(-factor * sums[of] / elements);
    backward.grad_bias[of] = float(sums[of]);
    backward.grad_weight[of] = float(invstd * products[of]);
  }
  t.linear = linear.data(), t.constant = constant.data(), t.out = backward.gx;
  run(t, BatchNormStep::gradient, execution);
}

}  // namespace pyinvolution::cpu
