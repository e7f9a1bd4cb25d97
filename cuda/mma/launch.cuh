// Launches of `mma` for one storage type; each type has its own file, so that they compile at the same time.
#pragma once

#include <algorithm>

#include "grad_input.cuh"
#include "mma.cuh"

namespace pyinvolution::cuda::mma {

// Tiles are wide where the image is, for a smaller halo. All fit into the 99 KB of shared memory that a block can have
// on every GPU since compute capability 8.0.
template <int K>
using Wide = Config<K, 1, 8, 16, 16>;
template <int K, int S>
using Narrow = Config<K, S, 8, 8, 8>;
template <int K>
using StridedGradient = Config<K, 2, 4, 8, 8>;
constexpr int max_shared_bytes = 99 * 1024;
// Blocks that keep a GPU busy; where there are fewer, the gradient of the input has more and shorter stripes.
constexpr int64_t enough_blocks = 512;
constexpr int least_stages = 4;

inline bool taps_are_inner(const Problem& p) {
  return p.w_stride[3] == 1 && p.w_stride[2] == p.kernel_w && (p.groups == 1 || p.w_stride[1] == p.taps());
}
inline bool columns_are_inner(const Problem& p) {
  return p.w_stride[5] == 1 && p.w_stride[2] == p.kernel_w * p.w_stride[3] &&
         (p.groups == 1 || p.w_stride[1] == p.taps() * p.w_stride[3]);
}
// Of kernels for one pixel both are.
inline bool uses_inner_taps(const Problem& p, Pass pass) {
  return taps_are_inner(p) && (pass == Pass::grad_input ? p.y_stride : p.x_stride)[1] == 1;
}

template <class T>
View view(const int64_t (&strides)[4], const void* data, int64_t width) {
  View view{strides[0], int(strides[1]), int(strides[2]), int(strides[3]), strides[1] == 1, 1};
  if (view.channels_inner) {
    view.vector = vector_of<T>(8, data, {strides[0], strides[2], strides[3]}) == 8 ? 8 : 1;
  } else {
    view.vector = vector_of<T>(4, data, {strides[0], strides[1], strides[2], width});
  }
  return view;
}

template <class T>
WeightView weight_view(const Problem& p, Pass pass, const void* data) {
  const int64_t tap = p.w_stride[3];
  WeightView view{p.w_stride[0], int(tap), int(p.w_stride[4]), int(p.w_stride[5]), 1};
  view.vector = uses_inner_taps(p, pass)
                    ? vector_of<T>(4, data, {view.n, view.h, view.w, p.groups % chunk_groups * p.taps()})
                    : vector_of<T>(4, data, {view.n, view.tap, view.h, p.out_w});
  return view;
}

template <class C, class T>
Geometry geometry(const Problem& p, Pass pass, const Buffers& buffers) {
  Geometry q;
  set_images(q, p, pass, view<T>(p.x_stride, buffers.x, p.in_w), view<T>(p.y_stride, buffers.y, p.out_w));
  q.chunks = (q.groups + chunk_groups - 1) / chunk_groups;
  q.w = weight_view<T>(p, pass, buffers.w);
  // What has columns inside and a halo begins in a tile where it can be moved in vectors, or in smaller ones.
  const bool x_columns = !q.x.channels_inner, w_columns = pass == Pass::grad_input && !uses_inner_taps(p, pass);
  int vector = std::max(x_columns ? q.x.vector : 1, w_columns ? q.w.vector : 1);
  const auto shift = [&] { return C::first_column(q.padding_w) & (vector - 1); };
  while (shift() > C::max_shift) vector /= 2;
  q.shift = shift();
  if (x_columns) q.x.vector = std::min(q.x.vector, vector);
  if (w_columns) q.w.vector = std::min(q.w.vector, vector);
  q.stages = 0;
  q.tiles_h = (q.y_height + C::Rows - 1) / C::Rows, q.tiles_w = (q.y_width + C::Columns - 1) / C::Columns;
  return q;
}

// Calls `body` with whether the channels of the image with the halo and the taps of the weights are inside. Taps inside
// beside columns inside are refused.
template <class Body>
void with_layouts(const Problem& p, Pass pass, const Geometry& q, const Body& body) {
  if (!q.x.channels_inner) return body(std::false_type{}, std::false_type{});
  if (uses_inner_taps(p, pass)) return body(std::true_type{}, std::true_type{});
  body(std::true_type{}, std::false_type{});
}

template <class C, class T>
void run_forward(const Problem& p, const Buffers& buffers, const Execution& execution) {
  const Geometry q = geometry<C, T>(p, Pass::forward, buffers);
  with_layouts(p, Pass::forward, q, [&](auto channels_inner, auto taps_inner) {
    constexpr int shared_bytes =
        Weights<C, taps_inner.value>::bytes +
        std::max({Image<C::x_rows, C::x_columns, channels_inner.value>::bytes, Image<C::Rows, C::Columns, true>::bytes,
                  Image<C::Rows, C::Columns, false>::bytes});
    static_assert(shared_bytes <= max_shared_bytes, "too much shared memory for some GPUs");
    const Grid grid{p.batch * q.chunks * q.tiles_h * q.tiles_w, C::threads, shared_bytes};
    launch<Geometry, const T*, const T*, T*>("mma forward", apply<C, channels_inner.value, taps_inner.value, T>, grid,
                                             execution, q, static_cast<T*>(buffers.x), static_cast<T*>(buffers.w),
                                             static_cast<T*>(buffers.y));
  });
}

template <class C, class T>
void run_grad_input(const Problem& p, const Buffers& buffers, const Execution& execution) {
  Geometry q = geometry<C, T>(p, Pass::grad_input, buffers);
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  q.tiles_w = int(parts(p.in_w, C::Stride * C::Columns));
  const int64_t rows = (p.in_h - 1 + p.padding_h) / C::Stride + 1 - C::first_row(q.padding_h);
  const int64_t stages = parts(rows, C::Rows), columns = p.batch * q.chunks * q.tiles_w;
  const int64_t stripes = std::clamp<int64_t>(enough_blocks / columns, 1, parts(stages, least_stages));
  q.stages = int(parts(stages, stripes)) + C::early;
  q.tiles_h = int(parts(stages, q.stages - C::early));
  with_layouts(p, Pass::grad_input, q, [&](auto channels_inner, auto taps_inner) {
    constexpr int shared_bytes =
        2 * (Weights<C, taps_inner.value>::bytes + Image<C::Rows, C::x_columns, channels_inner.value>::bytes);
    static_assert(shared_bytes <= max_shared_bytes, "too much shared memory for some GPUs");
    const Grid grid{columns * q.tiles_h, C::threads, shared_bytes};
    launch<Geometry, const T*, const T*, T*>("mma grad_input", grad_input<C, channels_inner.value, taps_inner.value, T>,
                                             grid, execution, q, static_cast<T*>(buffers.y), static_cast<T*>(buffers.w),
                                             static_cast<T*>(buffers.x));
  });
}

template <class C, class T>
void run_grad_weight(const Problem& p, const Buffers& buffers, const Execution& execution) {
  const Geometry q = geometry<C, T>(p, Pass::grad_weight, buffers);
  with_layouts(p, Pass::grad_weight, q, [&](auto channels_inner, auto taps_inner) {
    constexpr int shared_bytes =
        Weights<C, taps_inner.value>::bytes + Image<C::x_rows, C::x_columns, channels_inner.value>::bytes +
        std::max(Image<C::Rows, C::Columns, true>::bytes, Image<C::Rows, C::Columns, false>::bytes);
    static_assert(shared_bytes <= max_shared_bytes, "too much shared memory for some GPUs");
    const Grid grid{p.batch * q.chunks * q.tiles_h * q.tiles_w, C::threads, shared_bytes};
    launch<Geometry, const T*, T*, const T*>(
        "mma grad_weight", grad_weight<C, channels_inner.value, taps_inner.value, T>, grid, execution, q,
        static_cast<T*>(buffers.x), static_cast<T*>(buffers.w), static_cast<T*>(buffers.y));
  });
}

template <int K, class T>
void run_kernel(const Problem& p, Pass pass, const Buffers& buffers, const Execution& execution) {
  switch (pass) {
    case Pass::forward:
      if (p.stride_h == 2) return run_forward<Narrow<K, 2>, T>(p, buffers, execution);
      if (p.out_w > 8) return run_forward<Wide<K>, T>(p, buffers, execution);
      return run_forward<Narrow<K, 1>, T>(p, buffers, execution);
    case Pass::grad_input:
      if (p.stride_h == 2 && p.in_w > 16) return run_grad_input<Walk<K, 2, 16>, T>(p, buffers, execution);
      if (p.stride_h == 2) return run_grad_input<Walk<K, 2, 8>, T>(p, buffers, execution);
      if (p.in_w > 8) return run_grad_input<Walk<K, 1, 16>, T>(p, buffers, execution);
      return run_grad_input<Walk<K, 1, 8>, T>(p, buffers, execution);
    case Pass::grad_weight:
      if (p.stride_h == 2) return run_grad_weight<StridedGradient<K>, T>(p, buffers, execution);
      return run_grad_weight<Narrow<K, 1>, T>(p, buffers, execution);
  }
}

template <class T>
void run(const Problem& p, Pass pass, const Buffers& buffers, const Execution& execution) {
  switch (p.kernel_h) {
    case 3: return run_kernel<3, T>(p, pass, buffers, execution);
    case 5: return run_kernel<5, T>(p, pass, buffers, execution);
    case 7: return run_kernel<7, T>(p, pass, buffers, execution);
  }
}

void run_f16(const Problem&, Pass, const Buffers&, const Execution&);
void run_bf16(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda::mma
