// Span involutions and layers that no kernel takes (float64, few channels in a group, very wide images), in loops over
// pixels with the weights of one pixel in memory: the equations of pyinvolution/problem.h for every dtype and stride.
#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

#include "core/parallel.h"
#include "cpu/simd/dtype.h"
#include "pyinvolution/involution.h"

namespace pyinvolution {
namespace cpu {
namespace {

template <class T>
class SpanByPixel {
 public:
  SpanByPixel(const SpanProblem& span, SpanOp op, const SpanBuffers& buffers)
      : span_(span), p_(span.involution), layer_(op == SpanOp::layer), buffers_(buffers) {}

  void row(int64_t n, int64_t out_row) const {
    std::vector<A> means(size_t(layer_ ? p_.channels : 0)), reduced(size_t(span_.reduced)),
        weight(size_t(span_.span_rows()));
    for (int64_t out_column = 0; out_column < p_.out_w; ++out_column) {
      if (layer_) {
        reduce(n, out_row, out_column, means, reduced);
      } else {
        const int64_t at = offset(span_.reduced_stride, n, 0, out_row, out_column);
        for (int64_t r = 0; r < span_.reduced; ++r)
          reduced[r] = value(buffers_.reduced, at + r * span_.reduced_stride[1]);
      }
      for (int64_t k = 0; k < span_.span_rows(); ++k) {
        A sum = buffers_.bias == nullptr ? A{0} : value(buffers_.bias, k);
        for (int64_t r = 0; r < span_.reduced; ++r)
          sum += value(buffers_.span, k * span_.span_stride[0] + r * span_.span_stride[1]) * reduced[r];
        weight[k] = sum;
      }
      for (int64_t c = 0; c < p_.channels; ++c) apply(n, c, out_row, out_column, weight);
    }
  }

 private:
  using A = Accumulator<T>;

  static A value(const void* from, int64_t at) { return load(static_cast<const T*>(from)[at]); }
  static int64_t offset(const int64_t (&stride)[4], int64_t n, int64_t c, int64_t h, int64_t w) {
    return n * stride[0] + c * stride[1] + h * stride[2] + w * stride[3];
  }

  // R of a pixel: the means of its cell through the reduce convolution and ReLU, which lets NaN pass.
  void reduce(int64_t n, int64_t out_row, int64_t out_column, std::vector<A>& means, std::vector<A>& reduced) const {
    const int64_t top = out_row * p_.stride_h, bottom = std::min(top + p_.stride_h, p_.in_h);
    const int64_t left = out_column * p_.stride_w, right = std::min(left + p_.stride_w, p_.in_w);
    for (int64_t c = 0; c < p_.channels; ++c) {
      A sum{0};
      for (int64_t h = top; h < bottom; ++h)
        for (int64_t w = left; w < right; ++w) sum += value(buffers_.x, offset(p_.x_stride, n, c, h, w));
      means[c] = sum / A((bottom - top) * (right - left));
    }
    for (int64_t r = 0; r < span_.reduced; ++r) {
      A sum = buffers_.reduce_bias == nullptr ? A{0} : value(buffers_.reduce_bias, r);
      for (int64_t c = 0; c < p_.channels; ++c)
        sum += value(buffers_.reduce, r * span_.reduce_stride[0] + c * span_.reduce_stride[1]) * means[c];
      reduced[r] = sum < A{0} ? A{0} : sum;
    }
  }

  void apply(int64_t n, int64_t c, int64_t out_row, int64_t out_column, const std::vector<A>& weight) const {
    const A* taps = weight.data() + c / p_.group_channels() * p_.taps();
    A sum{0};
    for (int64_t i = 0; i < p_.kernel_h; ++i)
      for (int64_t j = 0; j < p_.kernel_w; ++j) {
        const int64_t h = out_row * p_.stride_h + i * p_.dilation_h - p_.padding_h;
        const int64_t w = out_column * p_.stride_w + j * p_.dilation_w - p_.padding_w;
        const bool inside = h >= 0 && h < p_.in_h && w >= 0 && w < p_.in_w;
        sum += *taps++ * (inside ? value(buffers_.x, offset(p_.x_stride, n, c, h, w)) : A{0});
      }
    if (span_.epilogue) sum = static_cast<const A*>(buffers_.scale)[c] * sum + static_cast<const A*>(buffers_.shift)[c];
    if (span_.relu && sum < A{0}) sum = A{0};
    store(sum, static_cast<T*>(buffers_.y) + offset(p_.y_stride, n, c, out_row, out_column));
  }

  const SpanProblem& span_;
  const Problem& p_;
  const bool layer_;
  const SpanBuffers& buffers_;
};

}  // namespace
}  // namespace cpu

void run_by_pixel(const SpanProblem& span, SpanOp op, const SpanBuffers& buffers, const Execution& execution) {
  if (op != SpanOp::forward && op != SpanOp::layer)
    throw std::invalid_argument(std::string("op is ") + to_string(op) + ", expected forward or layer");
  if (span.involution.device != Device::cpu)
    throw std::invalid_argument(std::string("device is ") + to_string(span.involution.device) + ", expected cpu");
  validate(span, op, buffers);
  if (span.involution.channels == 0) return;
  dispatch(span.involution.dtype, [&](auto of_type) {
    const cpu::SpanByPixel<decltype(of_type)> loops(span, op, buffers);
    const int64_t rows = span.involution.out_h;
    for_each_task(execution, span.involution.batch * rows, [&](int64_t task) { loops.row(task / rows, task % rows); });
  });
}

}  // namespace pyinvolution
