// Span involutions and layers that no kernel of the core takes, pixel by pixel, in any type: the equations of
// pyinvolution/problem.h as loops, with the weights of one pixel in memory.
#pragma once

#include <algorithm>
#include <vector>

#include "pyinvolution/problem.h"

namespace pyinvolution::openvino {

// T: of the tensors; Sum: of sums, scale and shift. Tensors are dense and channels-last; op is forward or layer.
template <class T, class Sum>
void span_by_pixel(const SpanProblem& problem, SpanOp op, const SpanBuffers& buffers, const Execution& execution) {
  const auto row = [&](int64_t image_row) {
    const Problem& p = problem.involution;
    const int64_t taps = p.taps(), group_channels = p.group_channels();
    const T* const x = static_cast<const T*>(buffers.x) + image_row / p.out_h * p.in_h * p.in_w * p.channels;
    const int64_t out_row = image_row % p.out_h;
    const auto load = [](const void* from, int64_t at) {
      return from == nullptr ? Sum(0) : Sum(static_cast<const T*>(from)[at]);
    };
    std::vector<Sum> mean(p.channels), reduced(problem.reduced), weight(problem.span_rows()), sum(p.channels);
    for (int64_t out_column = 0; out_column < p.out_w; ++out_column) {
      const int64_t pixel = image_row * p.out_w + out_column;
      if (op == SpanOp::layer) {
        std::fill(mean.begin(), mean.end(), Sum(0));
        const int64_t top = out_row * p.stride_h, bottom = std::min(top + p.stride_h, p.in_h);
        const int64_t left = out_column * p.stride_w, right = std::min(left + p.stride_w, p.in_w);
        for (int64_t i = top; i < bottom; ++i)
          for (int64_t j = left; j < right; ++j)
            for (int64_t c = 0; c < p.channels; ++c) mean[c] += Sum(x[(i * p.in_w + j) * p.channels + c]);
        for (int64_t r = 0; r < problem.reduced; ++r) {
          Sum total = 0;
          for (int64_t c = 0; c < p.channels; ++c) total += load(buffers.reduce, r * p.channels + c) * mean[c];
          total = load(buffers.reduce_bias, r) + total / Sum((bottom - top) * (right - left));
          reduced[r] = total < 0 ? Sum(0) : total;  // a NaN stays one
        }
      } else {
        for (int64_t r = 0; r < problem.reduced; ++r) reduced[r] = load(buffers.reduced, pixel * problem.reduced + r);
      }
      for (int64_t k = 0; k < problem.span_rows(); ++k) {
        weight[k] = load(buffers.bias, k);
        for (int64_t r = 0; r < problem.reduced; ++r)
          weight[k] += load(buffers.span, k * problem.reduced + r) * reduced[r];
      }
      std::fill(sum.begin(), sum.end(), Sum(0));
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t i = out_row * p.stride_h + tap / p.kernel_w * p.dilation_h - p.padding_h;
        const int64_t j = out_column * p.stride_w + tap % p.kernel_w * p.dilation_w - p.padding_w;
        const bool inside = i >= 0 && i < p.in_h && j >= 0 && j < p.in_w;
        for (int64_t c = 0; c < p.channels; ++c) {
          const Sum value = inside ? Sum(x[(i * p.in_w + j) * p.channels + c]) : Sum(0);
          sum[c] += weight[c / group_channels * taps + tap] * value;
        }
      }
      for (int64_t c = 0; c < p.channels; ++c) {
        if (problem.epilogue)
          sum[c] = static_cast<const Sum*>(buffers.scale)[c] * sum[c] + static_cast<const Sum*>(buffers.shift)[c];
        if (problem.relu && sum[c] < 0) sum[c] = 0;
        static_cast<T*>(buffers.y)[pixel * p.channels + c] = T(sum[c]);
      }
    }
  };
  auto rows = [](int64_t begin, int64_t end, void* state) {
    for (int64_t i = begin; i < end; ++i) (*static_cast<decltype(&row)>(state))(i);
  };
  const int64_t count = problem.involution.batch * problem.involution.out_h;
  execution.parallel_for(0, count, 1, rows, const_cast<void*>(static_cast<const void*>(&row)));
}

}  // namespace pyinvolution::openvino
