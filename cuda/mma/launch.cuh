// Launches of `mma` for one storage type; each type has its own file, so that they compile at the same time.
#pragma once

#include <algorithm>

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

inline bool taps_are_inner(const Problem& p) {
  return p.w_stride[3] == 1 && p.w_stride[2] == p.kernel_w && (p.groups == 1 || p.w_stride[1] == p.taps());
}
inline bool columns_are_inner(const Problem& p) {
  return p.w_stride[5] == 1 && p.w_stride[2] == p.kernel_w * p.w_stride[3] &&
         (p.groups == 1 || p.w_stride[1] == p.taps() * p.w_stride[3]);
}

// The most elements, of 4, 2 and 1, that divide all of `sizes` and at whose multiples `data` is aligned.
template <class T>
int vector_of(const void* data, std::initializer_list<int64_t> sizes) {
  int vector = 4;
  const auto fits = [&](int64_t size) { return size % vector == 0; };
  while (vector > 1 && (reinterpret_cast<uintptr_t>(data) % (size_t(vector) * sizeof(T)) != 0 ||
                        !std::all_of(sizes.begin(), sizes.end(), fits)))
    vector /= 2;
  return vector;
}

template <class T>
View view(const int64_t (&strides)[4], const void* data, int64_t width) {
  View view{strides[0], int(strides[1]), int(strides[2]), int(strides[3]), strides[1] == 1, 1};
  if (view.channels_inner) {
    const bool aligned = strides[0] % 8 == 0 && strides[2] % 8 == 0 && strides[3] % 8 == 0 &&
                         reinterpret_cast<uintptr_t>(data) % (8 * sizeof(T)) == 0;
    view.vector = aligned ? 8 : 1;
  } else {
    view.vector = vector_of<T>(data, {strides[0], strides[1], strides[2], width});
  }
  return view;
}

template <class T>
WeightView weight_view(const Problem& p, const void* data) {
  const int64_t tap = p.w_stride[3];
  WeightView view{p.w_stride[0], int(tap), int(p.w_stride[4]), int(p.w_stride[5]), 1};
  view.vector = taps_are_inner(p) ? vector_of<T>(data, {view.n, view.h, view.w, p.groups % chunk_groups * p.taps()})
                                  : vector_of<T>(data, {view.n, view.tap, view.h, p.out_w});
  return view;
}

template <class C, class T>
Geometry geometry(const Problem& p, Pass pass, const Buffers& buffers) {
  Geometry q;
  q.groups = int(p.groups), q.chunks = (q.groups + chunk_groups - 1) / chunk_groups;
  const View x = view<T>(p.x_stride, buffers.x, p.in_w), y = view<T>(p.y_stride, buffers.y, p.out_w);
  const bool to_input = pass == Pass::grad_input;
  q.x = to_input ? y : x, q.y = to_input ? x : y;
  q.x_height = int(to_input ? p.out_h : p.in_h), q.x_width = int(to_input ? p.out_w : p.in_w);
  q.y_height = int(to_input ? p.in_h : p.out_h), q.y_width = int(to_input ? p.in_w : p.out_w);
  q.w_height = int(p.out_h), q.w_width = int(p.out_w);
  q.padding_h = int(to_input ? C::K - 1 - p.padding_h : p.padding_h);
  q.padding_w = int(to_input ? C::K - 1 - p.padding_w : p.padding_w);
  q.w = weight_view<T>(p, buffers.w);
  q.shift = 0;
  if (!q.x.channels_inner) {
    const auto shift = [&] { return -q.padding_w & (q.x.vector - 1); };
    while (shift() > C::max_shift) q.x.vector /= 2;
    q.shift = shift();
  }
  q.tiles_h = (q.y_height + C::Rows - 1) / C::Rows, q.tiles_w = (q.y_width + C::Columns - 1) / C::Columns;
  return q;
}

// Calls `body` with whether the channels of the image with the halo and the taps of the weights are inside. Taps inside
// beside columns inside are refused.
template <class Body>
void with_layouts(const Problem& p, const Geometry& q, const Body& body) {
  if (!q.x.channels_inner) return body(std::false_type{}, std::false_type{});
  if (taps_are_inner(p)) return body(std::true_type{}, std::true_type{});
  body(std::true_type{}, std::false_type{});
}

template <class C, bool ToInput, class T>
void run_apply(const Problem& p, Pass pass, const Buffers& buffers, const Execution& execution) {
  const Geometry q = geometry<C, T>(p, pass, buffers);
  const T* x = static_cast<T*>(ToInput ? buffers.y : buffers.x);
  T* y = static_cast<T*>(ToInput ? buffers.x : buffers.y);
  with_layouts(p, q, [&](auto channels_inner, auto taps_inner) {
    constexpr int shared_bytes =
        Weights<C, taps_inner.value>::bytes +
        std::max({Image<C::x_rows, C::x_columns, channels_inner.value>::bytes, Image<C::Rows, C::Columns, true>::bytes,
                  Image<C::Rows, C::Columns, false>::bytes});
    static_assert(shared_bytes <= max_shared_bytes, "too much shared memory for some GPUs");
    const Grid grid{p.batch * q.chunks * q.tiles_h * q.tiles_w, C::threads, shared_bytes};
    launch<Geometry, const T*, const T*, T*>(ToInput ? "mma grad_input" : "mma forward",
                                             apply<C, channels_inner.value, taps_inner.value, ToInput, T>, grid,
                                             execution, q, x, static_cast<T*>(buffers.w), y);
  });
}

template <class C, class T>
void run_grad_weight(const Problem& p, Pass pass, const Buffers& buffers, const Execution& execution) {
  const Geometry q = geometry<C, T>(p, pass, buffers);
  with_layouts(p, q, [&](auto channels_inner, auto taps_inner) {
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
      if (p.stride_h == 2) return run_apply<Narrow<K, 2>, false, T>(p, pass, buffers, execution);
      if (p.out_w > 8) return run_apply<Wide<K>, false, T>(p, pass, buffers, execution);
      return run_apply<Narrow<K, 1>, false, T>(p, pass, buffers, execution);
    case Pass::grad_input:
      if (p.in_w > 8) return run_apply<Wide<K>, true, T>(p, pass, buffers, execution);
      return run_apply<Narrow<K, 1>, true, T>(p, pass, buffers, execution);
    case Pass::grad_weight:
      if (p.stride_h == 2) return run_grad_weight<StridedGradient<K>, T>(p, pass, buffers, execution);
      return run_grad_weight<Narrow<K, 1>, T>(p, pass, buffers, execution);
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
