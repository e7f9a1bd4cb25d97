// Where the windows of a problem lie, along one axis: the one rule that every kernel and every test follows.
//
//   first(p) = rule(floor(stride p / upsample))       the input position of tap 0; tap k is `dilation k` further on
//   zeros: rule(i) = i - padding
//   shift: rule(i) = a + d clamp(t - K div 2, 0, L_a - K),   a = i mod d,  t = i div d,  L_a = ceil((L - a) / d)
//
// L_a is the number of positions that share the residue a. A shift is a multiple of the dilation, so a window stays
// within the residue class of its pixel, and K d <= L makes room for it there.
#pragma once

#include "pyinvolution/problem.h"

// Always inlined: a copy compiled for a newer processor (cpp/cpu/instances) must not be the one that the linker keeps.
#ifdef __CUDACC__
#define PYINVOLUTION_ALWAYS_INLINE __host__ __device__ __forceinline__
#else
#define PYINVOLUTION_ALWAYS_INLINE [[gnu::always_inline]] inline
#endif

namespace pyinvolution {

// begin, begin + step, ... below end.
template <class Index>
struct Positions {
  Index begin, end, step;
};

template <class Index>
struct Axis {
  Border border;
  Index size;     // of the input
  Index outputs;  // of the output
  Index kernel, stride, padding, dilation, upsample;

  // rule(i). Only for positions of the input where the border is shifted.
  PYINVOLUTION_ALWAYS_INLINE Index rule(Index i) const {
    if (border == Border::zeros) return i - padding;
    const Index residue = i % dilation, last = last_step(residue);
    const Index step = i / dilation - kernel / 2;
    return residue + dilation * (step < 0 ? 0 : step > last ? last : step);
  }

  // The input position of tap 0 of output p.
  PYINVOLUTION_ALWAYS_INLINE Index first(Index p) const { return rule(upsample == 1 ? stride * p : p / upsample); }

  // The positions i with rule(i) = base. Those at which an output reads are told by `outputs_at`.
  PYINVOLUTION_ALWAYS_INLINE Positions<Index> readers(Index base) const {
    if (border == Border::zeros) {
      const Index i = base + padding;
      return {i, i < 0 ? i : i + 1, 1};
    }
    if (base < 0) return {0, 0, 1};
    const Index residue = base % dilation, step = base / dilation, last = last_step(residue);
    if (step > last) return {0, 0, 1};
    const Index from = step == 0 ? 0 : step + kernel / 2;
    const Index to = step == last ? last + kernel - 1 : step + kernel / 2;
    return {residue + dilation * from, residue + dilation * to + 1, dilation};
  }

  // The outputs p with floor(stride p / upsample) = i.
  PYINVOLUTION_ALWAYS_INLINE Positions<Index> outputs_at(Index i) const {
    if (stride != 1 && i % stride != 0) return {0, 0, 1};
    const Index begin = stride == 1 ? i * upsample : i / stride, end = begin + upsample;
    return {begin, end < outputs ? end : outputs, 1};
  }

 private:
  // The largest step from the first position of a residue class to a window that fits, L_a - K.
  PYINVOLUTION_ALWAYS_INLINE Index last_step(Index residue) const {
    return (size - residue + dilation - 1) / dilation - kernel;
  }
};

template <class Index = int64_t>
PYINVOLUTION_ALWAYS_INLINE Axis<Index> rows_of(const Problem& p) {
  return {p.border,          Index(p.in_h),      Index(p.out_h),      Index(p.kernel_h),
          Index(p.stride_h), Index(p.padding_h), Index(p.dilation_h), Index(p.upsample_h)};
}

template <class Index = int64_t>
PYINVOLUTION_ALWAYS_INLINE Axis<Index> columns_of(const Problem& p) {
  return {p.border,          Index(p.in_w),      Index(p.out_w),      Index(p.kernel_w),
          Index(p.stride_w), Index(p.padding_w), Index(p.dilation_w), Index(p.upsample_w)};
}

// Whether windows lie where a convolution has them: first(p) = stride p - padding.
PYINVOLUTION_ALWAYS_INLINE bool is_plain(const Problem& p) {
  return p.border == Border::zeros && p.upsample_h == 1 && p.upsample_w == 1;
}

}  // namespace pyinvolution
