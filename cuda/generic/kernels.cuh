// Involution and its gradients for any parameters.
//
//   forward       Y[n,c,p]   = sum over taps k      of W[n,g(c),k,p] * X[n,c, first(p) + dilation*k]
//   grad_input    X[n,c,q]   = sum over (k,p) with first(p) + dilation*k = q of W[n,g(c),k,p] * Y[n,c,p]
//   grad_weight   W[n,g,k,p] = sum over c of group g of Y[n,c,p] * X[n,c, first(p) + dilation*k]
//
// first(p) is what pyinvolution/axis.h says: stride*p - padding with a border of zeros and without upsampling.
//
// X is N,C,H,W; W is N,G,Kh,Kw,Ho,Wo; Y is N,C,Ho,Wo; all with any element strides. In the gradients the tensor on the
// left is written and the name Y stands for grad_output. One thread gathers one element of the left side, so there are
// no atomics and the order of a sum is fixed. Consecutive threads take consecutive elements of the dimension in which
// the written tensor is dense (columns, or channels or taps when those are dense), which coalesces the store, the load
// of Y and, at stride 1, the load of X. Sums are in float, for double in double.
//
// Limit: nothing is reused deliberately. For a forward pass with K*K taps a thread issues 2*K*K loads for K*K FMA; the
// caches serve the K*K reads of an x and the C/G reads of a w, so the L1 load rate bounds it, at 1/4 or less of the FMA
// rate. Unique bytes per output: sizeof(T) * (2 + K*K*G/C).
#pragma once

#include "config.cuh"

namespace pyinvolution::cuda::generic {

template <class Index>
struct Point {
  Index n, c, h, w;
};

template <class Index>
__device__ __forceinline__ Point<Index> point(Index i, bool channels_inner, Index channels, Index height, Index width) {
  Point<Index> at;
  if (channels_inner) {
    at.c = i % channels, i /= channels;
    at.w = i % width, i /= width;
    at.h = i % height, at.n = i / height;
  } else {
    at.w = i % width, i /= width;
    at.h = i % height, i /= height;
    at.c = i % channels, at.n = i / channels;
  }
  return at;
}

template <class Index>
__device__ __forceinline__ Index first_index() {
  return Index(blockIdx.x) * Index(blockDim.x) + Index(threadIdx.x);
}

template <class Index>
__device__ __forceinline__ Index index_step() {
  return Index(gridDim.x) * Index(blockDim.x);
}

template <class T, class Index, template <class> class Params>
__global__ void forward(Params<Index> q, const T* __restrict__ x, const T* __restrict__ w, T* __restrict__ y) {
  using A = Accumulator<T>;
  for (Index i = first_index<Index>(); i < q.count; i += index_step<Index>()) {
    const auto at = point(i, q.dense_inner, q.channels, q.out_h, q.out_w);
    const T* plane = x + (at.n * q.x_stride[0] + at.c * q.x_stride[1]);
    const T* kernel = w + (at.n * q.w_stride[0] + at.c / q.group_channels * q.w_stride[1] + at.h * q.w_stride[4] +
                           at.w * q.w_stride[5]);
    A sum = 0;
    Index h = q.first_row(at.h);
    for (Index kh = 0; kh < q.kernel_h; ++kh, h += q.dilation_h) {
      const bool row_inside = h >= 0 && h < q.in_h;
      Index v = q.first_column(at.w);
      for (Index kw = 0; kw < q.kernel_w; ++kw, v += q.dilation_w) {
        const bool inside = row_inside && v >= 0 && v < q.in_w;
        const A value = inside ? load(plane[h * q.x_stride[2] + v * q.x_stride[3]]) : A(0);
        sum += load(kernel[kh * q.w_stride[2] + kw * q.w_stride[3]]) * value;
      }
    }
    store(sum, &y[at.n * q.y_stride[0] + at.c * q.y_stride[1] + at.h * q.y_stride[2] + at.w * q.y_stride[3]]);
  }
}

// The output position whose tap reads the input position `shifted` - padding + dilation*tap, or -1.
template <class Index>
__device__ __forceinline__ Index reader(Index shifted, Index stride, Index outputs) {
  if (shifted < 0) return -1;
  if (stride != 1) {
    const Index position = shifted / stride;
    if (position * stride != shifted) return -1;
    shifted = position;
  }
  return shifted < outputs ? shifted : Index(-1);
}

template <class T, class Index>
__global__ void grad_input(KernelParams<Index> q, T* __restrict__ x, const T* __restrict__ w, const T* __restrict__ y) {
  using A = Accumulator<T>;
  for (Index i = first_index<Index>(); i < q.count; i += index_step<Index>()) {
    const auto at = point(i, q.dense_inner, q.channels, q.in_h, q.in_w);
    const T* plane = y + (at.n * q.y_stride[0] + at.c * q.y_stride[1]);
    const T* kernel = w + (at.n * q.w_stride[0] + at.c / q.group_channels * q.w_stride[1]);
    A sum = 0;
    for (Index kh = 0; kh < q.kernel_h; ++kh) {
      const Index h = reader(at.h + q.padding_h - kh * q.dilation_h, q.stride_h, q.out_h);
      if (h < 0) continue;
      for (Index kw = 0; kw < q.kernel_w; ++kw) {
        const Index v = reader(at.w + q.padding_w - kw * q.dilation_w, q.stride_w, q.out_w);
        if (v < 0) continue;
        sum += load(kernel[kh * q.w_stride[2] + kw * q.w_stride[3] + h * q.w_stride[4] + v * q.w_stride[5]]) *
               load(plane[h * q.y_stride[2] + v * q.y_stride[3]]);
      }
    }
    store(sum, &x[at.n * q.x_stride[0] + at.c * q.x_stride[1] + at.h * q.x_stride[2] + at.w * q.x_stride[3]]);
  }
}

// The same for every border and upsampling, where several outputs may read a position by the same tap.
template <class T, class Index>
__global__ void grad_input_by_rule(RuleParams<Index> q, T* __restrict__ x, const T* __restrict__ w,
                                   const T* __restrict__ y) {
  using A = Accumulator<T>;
  for (Index i = first_index<Index>(); i < q.count; i += index_step<Index>()) {
    const auto at = point(i, q.dense_inner, q.channels, q.in_h, q.in_w);
    const T* plane = y + (at.n * q.y_stride[0] + at.c * q.y_stride[1]);
    const T* kernel = w + (at.n * q.w_stride[0] + at.c / q.group_channels * q.w_stride[1]);
    A sum = 0;
    for (Index kh = 0; kh < q.kernel_h; ++kh) {
      const auto rows = q.rows.readers(at.h - kh * q.dilation_h);
      for (Index kw = 0; kw < q.kernel_w; ++kw) {
        const auto columns = q.columns.readers(at.w - kw * q.dilation_w);
        const T* tap = kernel + (kh * q.w_stride[2] + kw * q.w_stride[3]);
        for (Index row = rows.begin; row < rows.end; row += rows.step) {
          const auto outputs_h = q.rows.outputs_at(row);
          for (Index h = outputs_h.begin; h < outputs_h.end; ++h)
            for (Index column = columns.begin; column < columns.end; column += columns.step) {
              const auto outputs_w = q.columns.outputs_at(column);
              for (Index v = outputs_w.begin; v < outputs_w.end; ++v)
                sum += load(tap[h * q.w_stride[4] + v * q.w_stride[5]]) *
                       load(plane[h * q.y_stride[2] + v * q.y_stride[3]]);
            }
        }
      }
    }
    store(sum, &x[at.n * q.x_stride[0] + at.c * q.x_stride[1] + at.h * q.x_stride[2] + at.w * q.x_stride[3]]);
  }
}

template <class T, class Index, template <class> class Params>
__global__ void grad_weight(Params<Index> q, const T* __restrict__ x, T* __restrict__ w, const T* __restrict__ y) {
  using A = Accumulator<T>;
  const Index taps = q.kernel_h * q.kernel_w;
  for (Index i = first_index<Index>(); i < q.count; i += index_step<Index>()) {
    const auto at = point(i, q.dense_inner, q.groups * taps, q.out_h, q.out_w);
    const Index g = at.c / taps, kh = at.c % taps / q.kernel_w, kw = at.c % q.kernel_w;
    const Index h = q.first_row(at.h) + kh * q.dilation_h;
    const Index v = q.first_column(at.w) + kw * q.dilation_w;
    const bool inside = h >= 0 && h < q.in_h && v >= 0 && v < q.in_w;
    const Index first = g * q.group_channels;
    const Index x_first = at.n * q.x_stride[0] + h * q.x_stride[2] + v * q.x_stride[3];
    const T* gradient = y + (at.n * q.y_stride[0] + at.h * q.y_stride[2] + at.w * q.y_stride[3]);
    A sum = 0;
    for (Index c = first; c < first + q.group_channels; ++c) {
      const A value = inside ? load(x[x_first + c * q.x_stride[1]]) : A(0);
      sum += load(gradient[c * q.y_stride[1]]) * value;
    }
    store(sum, &w[at.n * q.w_stride[0] + g * q.w_stride[1] + kh * q.w_stride[2] + kw * q.w_stride[3] +
                  at.h * q.w_stride[4] + at.w * q.w_stride[5]]);
  }
}

}  // namespace pyinvolution::cuda::generic
