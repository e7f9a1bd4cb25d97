// The `scalar` variant: the equation as loops, for every shape, stride and dtype. The other CPU variants are tested
// against it.
#include "core/parallel.h"
#include "cpu/arithmetic.h"
#include "cpu/simd/dtype.h"
#include "cpu/variants.h"
#include "pyinvolution/axis.h"

namespace pyinvolution::cpu {
namespace {

// Calls body(p) for each output p whose tap 0 reads position `base`.
template <class Body>
void for_each_reader(const Axis<int64_t>& axis, int64_t base, const Body& body) {
  const Positions<int64_t> positions = axis.readers(base);
  for (int64_t i = positions.begin; i < positions.end; i += positions.step) {
    const Positions<int64_t> outputs = axis.outputs_at(i);
    for (int64_t p = outputs.begin; p < outputs.end; ++p) body(p);
  }
}

template <class T>
struct Scalar {
  using A = Accumulator<T>;

  const Problem& p;
  Axis<int64_t> rows, columns;
  T* x;
  T* w;
  T* y;

  Scalar(const Problem& problem, const Buffers& buffers)
      : p(problem),
        rows(rows_of(problem)),
        columns(columns_of(problem)),
        x(static_cast<T*>(buffers.x)),
        w(static_cast<T*>(buffers.w)),
        y(static_cast<T*>(buffers.y)) {}

  T& x_at(int64_t n, int64_t c, int64_t h, int64_t v) const {
    return x[n * p.x_stride[0] + c * p.x_stride[1] + h * p.x_stride[2] + v * p.x_stride[3]];
  }
  T& w_at(int64_t n, int64_t g, int64_t i, int64_t j, int64_t h, int64_t v) const {
    return w[n * p.w_stride[0] + g * p.w_stride[1] + i * p.w_stride[2] + j * p.w_stride[3] + h * p.w_stride[4] +
             v * p.w_stride[5]];
  }
  T& y_at(int64_t n, int64_t c, int64_t h, int64_t v) const {
    return y[n * p.y_stride[0] + c * p.y_stride[1] + h * p.y_stride[2] + v * p.y_stride[3]];
  }

  A x_padded(int64_t n, int64_t c, int64_t h, int64_t v) const {
    return h >= 0 && h < p.in_h && v >= 0 && v < p.in_w ? load(x_at(n, c, h, v)) : A{0};
  }

  void forward(int64_t n, int64_t c) const {
    const int64_t g = c / p.group_channels();
    for (int64_t h = 0; h < p.out_h; ++h)
      for (int64_t v = 0; v < p.out_w; ++v) {
        A sum = 0;
        const int64_t first_h = rows.first(h), first_v = columns.first(v);
        for (int64_t i = 0; i < p.kernel_h; ++i)
          for (int64_t j = 0; j < p.kernel_w; ++j)
            sum +=
                load(w_at(n, g, i, j, h, v)) * x_padded(n, c, first_h + p.dilation_h * i, first_v + p.dilation_w * j);
        store(sum, &y_at(n, c, h, v));
      }
  }

  void grad_input(int64_t n, int64_t c) const {
    const int64_t g = c / p.group_channels();
    for (int64_t h = 0; h < p.in_h; ++h)
      for (int64_t v = 0; v < p.in_w; ++v) {
        A sum = 0;
        for (int64_t i = 0; i < p.kernel_h; ++i)
          for (int64_t j = 0; j < p.kernel_w; ++j)
            for_each_reader(rows, h - p.dilation_h * i, [&](int64_t out_h) {
              for_each_reader(columns, v - p.dilation_w * j, [&](int64_t out_v) {
                sum += load(w_at(n, g, i, j, out_h, out_v)) * load(y_at(n, c, out_h, out_v));
              });
            });
        store(sum, &x_at(n, c, h, v));
      }
  }

  void grad_weight(int64_t n, int64_t g) const {
    const int64_t first = g * p.group_channels();
    for (int64_t i = 0; i < p.kernel_h; ++i)
      for (int64_t j = 0; j < p.kernel_w; ++j)
        for (int64_t h = 0; h < p.out_h; ++h)
          for (int64_t v = 0; v < p.out_w; ++v) {
            A sum = 0;
            const int64_t row = rows.first(h) + p.dilation_h * i, column = columns.first(v) + p.dilation_w * j;
            for (int64_t c = first; c < first + p.group_channels(); ++c)
              sum += load(y_at(n, c, h, v)) * x_padded(n, c, row, column);
            store(sum, &w_at(n, g, i, j, h, v));
          }
  }
};

}  // namespace

Refusal scalar_refusal(const Problem&, Pass) { return {}; }

void scalar_run(const Problem& problem, Pass pass, const Buffers& buffers, const Execution& execution) {
  dispatch(problem.dtype, [&](auto element) {
    const Scalar<decltype(element)> loops(problem, buffers);
    const int64_t planes = pass == Pass::grad_weight ? problem.groups : problem.channels;
    for_each_task(execution, problem.batch * planes, [&](int64_t task) {
      const int64_t n = task / planes, plane = task % planes;
      switch (pass) {
        case Pass::forward: return loops.forward(n, plane);
        case Pass::grad_input: return loops.grad_input(n, plane);
        case Pass::grad_weight: return loops.grad_weight(n, plane);
      }
    });
  });
}

}  // namespace pyinvolution::cpu
