// Launches of `mma` for one dtype.
#pragma once

#include <algorithm>

#include "forward.cuh"
#include "grad_input.cuh"
#include "grad_weight.cuh"

namespace pyinvolution::cuda::mma {

// Calls `body` with whether the image with the halo has channels inside and whether the weights have taps inside. Taps
// inside with columns inside are refused.
template <class Body>
void with_layouts(const Problem& p, Pass pass, const KernelParams& q, const Body& body) {
  if (!q.x.channels_inner) return body(std::false_type{}, std::false_type{});
  if (uses_inner_taps(p, pass)) return body(std::true_type{}, std::true_type{});
  body(std::true_type{}, std::false_type{});
}

template <class C, class T>
void run_forward(const Problem& p, const Buffers& buffers, const Execution& execution) {
  const KernelParams q = kernel_params<C, T>(p, Pass::forward, buffers);
  with_layouts(p, Pass::forward, q, [&](auto channels_inner, auto taps_inner) {
    constexpr int shared_bytes =
        Weights<C, taps_inner.value>::bytes +
        std::max({Image<C::x_rows, C::x_columns, channels_inner.value>::bytes, Image<C::Rows, C::Columns, true>::bytes,
                  Image<C::Rows, C::Columns, false>::bytes});
    static_assert(shared_bytes <= max_shared_bytes, "too much shared memory for some GPUs");
    const Grid grid{p.batch * q.chunks * q.tiles_h * q.tiles_w, C::threads, shared_bytes};
    launch<KernelParams, const T*, const T*, T*>("mma forward", forward<C, channels_inner.value, taps_inner.value, T>,
                                                 grid, execution, q, static_cast<T*>(buffers.x),
                                                 static_cast<T*>(buffers.w), static_cast<T*>(buffers.y));
  });
}

template <class C, class T>
void run_grad_input(const Problem& p, const Buffers& buffers, const Execution& execution) {
  KernelParams q = kernel_params<C, T>(p, Pass::grad_input, buffers);
  const auto parts = [](int64_t whole, int64_t part) { return (whole + part - 1) / part; };
  const int64_t tiles_w = parts(p.in_w, C::Stride * C::Columns);
  const int64_t rows = (p.in_h - 1 + p.padding_h) / C::Stride + 1 - C::first_row(q.padding_h);
  const int64_t stages = parts(rows, C::Rows), columns = p.batch * q.chunks * tiles_w;
  const int64_t stripes = std::clamp<int64_t>(enough_blocks / columns, 1, parts(stages, min_stages));
  q.stages = int(parts(stages, stripes)) + C::early;
  set_tiles(q, parts(stages, q.stages - C::early), tiles_w);
  with_layouts(p, Pass::grad_input, q, [&](auto channels_inner, auto taps_inner) {
    constexpr int shared_bytes =
        2 * (Weights<C, taps_inner.value>::bytes + Image<C::Rows, C::x_columns, channels_inner.value>::bytes);
    static_assert(shared_bytes <= max_shared_bytes, "too much shared memory for some GPUs");
    const Grid grid{columns * q.tiles_h, C::threads, shared_bytes};
    launch<KernelParams, const T*, const T*, T*>(
        "mma grad_input", grad_input<C, channels_inner.value, taps_inner.value, T>, grid, execution, q,
        static_cast<T*>(buffers.y), static_cast<T*>(buffers.w), static_cast<T*>(buffers.x));
  });
}

template <class C, class T>
void run_grad_weight(const Problem& p, const Buffers& buffers, const Execution& execution) {
  const KernelParams q = kernel_params<C, T>(p, Pass::grad_weight, buffers);
  with_layouts(p, Pass::grad_weight, q, [&](auto channels_inner, auto taps_inner) {
    constexpr int shared_bytes =
        Weights<C, taps_inner.value>::bytes + Image<C::x_rows, C::x_columns, channels_inner.value>::bytes +
        std::max(Image<C::Rows, C::Columns, true>::bytes, Image<C::Rows, C::Columns, false>::bytes);
    static_assert(shared_bytes <= max_shared_bytes, "too much shared memory for some GPUs");
    const Grid grid{p.batch * q.chunks * q.tiles_h * q.tiles_w, C::threads, shared_bytes};
    launch<KernelParams, const T*, T*, const T*>(
        "mma grad_weight", grad_weight<C, channels_inner.value, taps_inner.value, T>, grid, execution, q,
        static_cast<T*>(buffers.x), static_cast<T*>(buffers.w), static_cast<T*>(buffers.y));
  });
}

template <int K, class T>
void run_kernel(const Problem& p, Pass pass, const Buffers& buffers, const Execution& execution) {
  switch (pass) {
    case Pass::forward:
      if (p.stride_h == 2) return run_forward<NarrowTile<K, 2>, T>(p, buffers, execution);
      if (p.out_w > 8) return run_forward<WideTile<K>, T>(p, buffers, execution);
      return run_forward<NarrowTile<K, 1>, T>(p, buffers, execution);
    case Pass::grad_input:
      if (p.stride_h == 2 && p.in_w > 16) return run_grad_input<WalkConfig<K, 2, 16>, T>(p, buffers, execution);
      if (p.stride_h == 2) return run_grad_input<WalkConfig<K, 2, 8>, T>(p, buffers, execution);
      if (p.in_w > 8) return run_grad_input<WalkConfig<K, 1, 16>, T>(p, buffers, execution);
      return run_grad_input<WalkConfig<K, 1, 8>, T>(p, buffers, execution);
    case Pass::grad_weight:
      if (p.stride_h == 2) return run_grad_weight<StridedTile<K>, T>(p, buffers, execution);
      return run_grad_weight<NarrowTile<K, 1>, T>(p, buffers, execution);
  }
}

template <DType dtype>
void run(const Problem& p, Pass pass, const Buffers& buffers, const Execution& execution) {
  with_square_kernel(p.kernel_h, [&](auto k) { run_kernel<k.value, Storage<dtype>>(p, pass, buffers, execution); });
}

}  // namespace pyinvolution::cuda::mma
