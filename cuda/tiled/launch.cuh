// Launches of `tiled` for one dtype.
#pragma once

#include <algorithm>

#include "kernels.cuh"

namespace pyinvolution::cuda::tiled {

template <class T>
View view(const int64_t (&strides)[4], const void* data) {
  const bool aligned = vector_of<T>(4, data, {strides[0], strides[2], strides[3]}) == 4;
  return {strides[0], int(strides[1]), int(strides[2]), int(strides[3]), strides[1] == 1 && aligned};
}

template <class T>
bool weights_in_vectors(const Problem& p, const void* data) {
  const int64_t (&strides)[6] = p.w_stride;
  if (taps_are_inner(p)) {
    // The pieces of 16 bytes in which the first and the last weight are.
    const int64_t sizes[] = {p.batch, p.groups, p.kernel_h, p.kernel_w, p.out_h, p.out_w};
    return vector_of<T>(piece<T>, data, {reach(sizes, strides) + 1}) == piece<T>;
  }
  return strides[5] == 1 &&
         vector_of<T>(4, data, {strides[0], strides[1], strides[2], strides[3], strides[4], p.out_w}) == 4;
}

template <class T>
KernelParams kernel_params(const Problem& p, Pass pass, const Buffers& buffers) {
  KernelParams q;
  set_images(q, p, pass, view<T>(p.x_stride, buffers.x), view<T>(p.y_stride, buffers.y));
  q.group_channels = int(p.group_channels()), q.kernel = int(p.kernel_h);
  q.by_chunks = Division(q.group_channels / 4);
  q.w = {p.w_stride[0],      int(p.w_stride[1]), int(p.w_stride[2]), int(p.w_stride[3]),
         int(p.w_stride[4]), int(p.w_stride[5]), taps_are_inner(p),  weights_in_vectors<T>(p, buffers.w)};
  return q;
}

template <class C, int Stride>
Grid grid(const Problem& p, KernelParams& q) {
  // A class of a strided gradient has every second row and column.
  const auto tiles = [](int pixels, int tile) { return (pixels + Stride * tile - 1) / (Stride * tile); };
  q.tiles_h = tiles(q.y_height, C::Rows), q.tiles_w = tiles(q.y_width, C::Columns);
  q.by_groups = Division(q.groups), q.by_tiles_h = Division(q.tiles_h), q.by_tiles_w = Division(q.tiles_w);
  return {p.batch * p.groups * q.tiles_h * q.tiles_w * Stride * Stride, 0, 0};
}

template <class C, int GradientStride, class T>
void run_apply(const Problem& p, KernelParams q, const T* x, const T* w, T* y, const Execution& execution) {
  Grid shape = grid<C, std::max(1, GradientStride)>(p, q);
  shape.threads = C::Rows / C::PixelRows * C::runs * (q.group_channels / 4);
  shape.shared_bytes = 4 * (C::w_floats + C::x_plane * q.group_channels);
  launch<KernelParams, const T*, const T*, T*>(GradientStride > 0 ? "tiled grad_input" : "tiled forward",
                                               apply<C, GradientStride, T>, shape, execution, q, x, w, y);
}

template <class C, class T>
void run_grad_weight(const Problem& p, KernelParams q, const T* x, T* w, const T* y, const Execution& execution) {
  Grid shape = grid<C, 1>(p, q);
  shape.threads = C::gradient_threads;
  shape.shared_bytes = 4 * std::max(C::gradient_floats, (C::gradient_x_plane + C::gradient_y_plane) * q.group_channels);
  launch<KernelParams, const T*, T*, const T*>("tiled grad_weight", grad_weight<C, T>, shape, execution, q, x, w, y);
}

template <int K, class T>
void run_kernel(const Problem& p, Pass pass, const Buffers& buffers, const Execution& execution) {
  const KernelParams q = kernel_params<T>(p, pass, buffers);
  T* x = static_cast<T*>(buffers.x);
  T* w = static_cast<T*>(buffers.w);
  T* y = static_cast<T*>(buffers.y);
  const bool wide = q.y_width > 8;
  switch (pass) {
    case Pass::forward:
      if (p.stride_h == 2) return run_apply<Narrow<K, 2>, 0, T>(p, q, x, w, y, execution);
      if (wide) return run_apply<Wide<K>, 0, T>(p, q, x, w, y, execution);
      return run_apply<Narrow<K, 1>, 0, T>(p, q, x, w, y, execution);
    case Pass::grad_input: {
      constexpr int half = (K + 1) / 2;
      if (p.stride_h == 2) {
        if (q.y_width > 16) return run_apply<Wide<half>, 2, T>(p, q, y, w, x, execution);
        return run_apply<Narrow<half, 1>, 2, T>(p, q, y, w, x, execution);
      }
      if (wide) return run_apply<Wide<K>, 1, T>(p, q, y, w, x, execution);
      return run_apply<Narrow<K, 1>, 1, T>(p, q, y, w, x, execution);
    }
    case Pass::grad_weight:
      if (p.stride_h == 2) return run_grad_weight<NarrowGradient<K, 2>, T>(p, q, x, w, y, execution);
      if (wide) return run_grad_weight<WideGradient<K>, T>(p, q, x, w, y, execution);
      return run_grad_weight<NarrowGradient<K, 1>, T>(p, q, x, w, y, execution);
  }
}

template <DType dtype>
void run(const Problem& p, Pass pass, const Buffers& buffers, const Execution& execution) {
  with_square_kernel(p.kernel_h, [&](auto k) { run_kernel<k.value, Storage<dtype>>(p, pass, buffers, execution); });
}

}  // namespace pyinvolution::cuda::tiled
