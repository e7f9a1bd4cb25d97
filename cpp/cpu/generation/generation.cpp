#include "cpu/generation/generation.h"

#include "cpu/arithmetic.h"
#include "cpu/generation/tiling.h"
#include "cpu/kernels.h"
#include "cpu/simd/dtype.h"
#include "cpu/tasks.h"

namespace pyinvolution::cpu {
namespace {

constexpr int64_t most_tasks = 32;  // one thread adds their sums

GenerationTiling tiling_of(const GenerationShape& shape) {
  GenerationTiling t{};
  t.dtype = shape.dtype;
  t.channels = shape.channels, t.reduced = shape.reduced, t.groups = shape.groups;
  t.in_h = shape.in_h, t.in_w = shape.in_w, t.out_h = shape.out_h, t.out_w = shape.out_w;
  t.stride_h = shape.stride_h, t.stride_w = shape.stride_w;
  t.pixels = shape.batch * shape.out_h * shape.out_w;
  t.task_pixels = round_up(ceil_div(t.pixels, most_tasks), generation_pixels);
  t.tasks = ceil_div(t.pixels, t.task_pixels);
  t.lanes = current_kernels().vector_bytes / int64_t{sizeof(float)};
  t.channel_columns = round_up(t.channels, t.lanes), t.reduced_columns = round_up(t.reduced, t.lanes);
  t.gram_partial = t.groups * ((t.reduced + 1) * t.reduced_columns + 1);
  return t;
}

// Floats of scratch memory of a task.
int64_t scratch_floats(const GenerationTiling& t, GenerationStep step) {
  if (step == GenerationStep::reduce || step == GenerationStep::reduce_gradients)
    return generation_pixels * (1 + 2 * t.channel_columns + t.reduced + t.reduced_columns);
  const int64_t lengths = generation_pixels * (2 * t.groups + t.reduced + 4 * (t.reduced + 1)) + t.reduced_columns;
  if (step == GenerationStep::length_gradients) return lengths;
  return lengths + generation_pixels * t.groups + t.lanes + 2 * t.lanes * t.channel_columns;
}

void run(const GenerationTiling& t, GenerationStep step, double multiply_adds, const Execution& execution) {
  const CpuKernels& kernels = current_kernels();
  const int64_t bytes = scratch_floats(t, step) * int64_t{sizeof(float)};
  for_each_task(execution_for(multiply_adds, execution), t.tasks,
                [&](int64_t task) { kernels.generation(t, step, task, scratch(bytes)); });
}

double products(const GenerationTiling& t) { return double(t.pixels) * double(t.channels * (t.reduced + 1)); }
double lengths(const GenerationTiling& t) {
  return double(t.pixels) * double(t.groups * (t.reduced + 1) * (t.reduced + 1) + t.channels);
}

// A as floats: rows of `pitch`, or transposed.
std::vector<float> packed(const GenerationTiling& t, const void* a, bool transposed, int64_t pitch) {
  std::vector<float> to((transposed ? t.channels : t.reduced) * pitch);
  dispatch(t.dtype, [&](auto element) {
    const auto* from = static_cast<const decltype(element)*>(a);
    for (int64_t r = 0; r < t.reduced; ++r)
      for (int64_t c = 0; c < t.channels; ++c)
        to[transposed ? c * pitch + r : r * pitch + c] = float(load(from[r * t.channels + c]));
  });
  return to;
}

// The group of each channel; those past the last one are of the last group.
std::vector<int32_t> groups_of_channels(const GenerationTiling& t) {
  std::vector<int32_t> groups(t.channel_columns);
  for (int64_t c = 0; c < t.channel_columns; ++c) groups[c] = int32_t(min(c, t.channels - 1) / (t.channels / t.groups));
  return groups;
}

}  // namespace

void reduce(const GenerationShape& shape, const void* x, const void* a, void* z, const Execution& execution) {
  GenerationTiling t = tiling_of(shape);
  const std::vector<float> by_channel = packed(t, a, true, t.reduced_columns);
  t.x = x, t.z = z, t.reduce_by_channel = by_channel.data();
  run(t, GenerationStep::reduce, products(t), execution);
}

void reduce_gradients(const GenerationShape& shape, const void* x, const void* a, const void* gz, void* gx,
                      float* grad_a, const Execution& execution) {
  GenerationTiling t = tiling_of(shape);
  const std::vector<float> rows = packed(t, a, false, t.channel_columns);
  std::vector<float> partial(t.tasks * t.reduced * t.channel_columns);
  t.x = x, t.gz = gz, t.gx = gx, t.reduce_rows = rows.data(), t.partial = partial.data();
  run(t, GenerationStep::reduce_gradients, 2 * products(t), execution);
  const float* from = partial.data();
  for (int64_t task = 0; task < t.tasks; ++task)
    for (int64_t r = 0; r < t.reduced; ++r, from += t.channel_columns) {
      float* to = grad_a + r * t.channels;
      for (int64_t c = 0; c < t.channels; ++c) to[c] = task == 0 ? from[c] : to[c] + from[c];
    }
}

std::vector<float> span_gram(const GenerationShape& shape, int64_t taps, const float* s, const float* b) {
  const int64_t reduced = shape.reduced, rows = reduced + 1;
  std::vector<float> gram(shape.groups * rows * rows);
  std::vector<double> sums(rows * rows), row(rows);
  for (int64_t g = 0; g < shape.groups; ++g) {
    for (double& sum : sums) sum = 0.0;
    for (int64_t k = g * taps; k < (g + 1) * taps; ++k) {
      for (int64_t i = 0; i < reduced; ++i) row[i] = s[k * reduced + i];
      row[reduced] = b == nullptr ? 0.0 : b[k];
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < rows; ++j) sums[i * rows + j] += row[i] * row[j];
    }
    for (int64_t i = 0; i < rows * rows; ++i) gram[g * rows * rows + i] = float(sums[i]);
  }
  return gram;
}

void divide_by_lengths(const GenerationShape& shape, const std::vector<float>& gram, float least, const void* r,
                       void* y, const Execution& execution) {
  GenerationTiling t = tiling_of(shape);
  const std::vector<int32_t> groups = groups_of_channels(t);
  t.gram = gram.data(), t.least = least, t.r = r, t.scaled = y, t.group_of = groups.data();
  run(t, GenerationStep::scale, lengths(t), execution);
}

std::vector<float> undivided_gradient(const GenerationShape& shape, const std::vector<float>& gram, float least,
                                      const void* r, const void* y, const void* gy, void* u,
                                      const Execution& execution) {
  GenerationTiling t = tiling_of(shape);
  const std::vector<int32_t> groups = groups_of_channels(t);
  std::vector<float> grad_squares(round_up(t.pixels, generation_pixels) * t.groups);
  t.gram = gram.data(), t.least = least, t.r = r, t.y = y, t.gy = gy, t.scaled = u, t.group_of = groups.data();
  t.grad_squares = grad_squares.data();
  run(t, GenerationStep::scale_gradient, lengths(t), execution);
  return grad_squares;
}

void length_gradients(const GenerationShape& shape, const std::vector<float>& gram, const void* r,
                      const std::vector<float>& grad_squares, void* gr, int64_t taps, const float* s, const float* b,
                      float* grad_s, float* grad_b, const Execution& execution) {
  GenerationTiling t = tiling_of(shape);
  const int64_t reduced = t.reduced, rows = reduced + 1;
  std::vector<float> partial(t.tasks * t.gram_partial);
  t.gram = gram.data(), t.r = r, t.gr = gr, t.grad_squares = const_cast<float*>(grad_squares.data());
  t.partial = partial.data();
  run(t, GenerationStep::length_gradients, 2 * lengths(t), execution);

  // Of M = (S b)^T (S b): that of (S b) is twice (S b) gM, which is symmetric.
  std::vector<double> grad_gram(rows * rows);
  for (int64_t g = 0; g < t.groups; ++g) {
    for (double& sum : grad_gram) sum = 0.0;
    for (int64_t task = 0; task < t.tasks; ++task) {
      const float* of_task = partial.data() + task * t.gram_partial;
      const float* from = of_task + g * rows * t.reduced_columns;
      for (int64_t i = 0; i < rows; ++i)
        for (int64_t j = 0; j < reduced; ++j) grad_gram[i * rows + j] += from[i * t.reduced_columns + j];
      grad_gram[rows * rows - 1] += of_task[t.groups * rows * t.reduced_columns + g];
    }
    for (int64_t i = 0; i < reduced; ++i) grad_gram[i * rows + reduced] = grad_gram[reduced * rows + i];
    for (int64_t k = g * taps; k < (g + 1) * taps; ++k)
      for (int64_t j = 0; j < rows; ++j) {
        double sum = b == nullptr ? 0.0 : b[k] * grad_gram[reduced * rows + j];
        for (int64_t i = 0; i < reduced; ++i) sum += s[k * reduced + i] * grad_gram[i * rows + j];
        if (j < reduced)
          grad_s[k * reduced + j] += float(2.0 * sum);
        else if (grad_b != nullptr)
          grad_b[k] += float(2.0 * sum);
      }
  }
}

}  // namespace pyinvolution::cpu
