// Problems for tests: shapes of every parameter class, and the memory layouts of their tensors.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "pyinvolution/problem.h"

namespace {

using namespace pyinvolution;

struct Case {
  int64_t n, c, g, h, w, kh, kw;
  int64_t sh = 1, sw = 1, ph = 0, pw = 0, dh = 1, dw = 1;
  Border border = Border::zeros;
  int64_t uh = 1, uw = 1;

  int64_t out_h() const { return uh * windows(h, kh, sh, ph, dh); }
  int64_t out_w() const { return uw * windows(w, kw, sw, pw, dw); }
  int64_t windows(int64_t size, int64_t kernel, int64_t stride, int64_t padding, int64_t dilation) const {
    const int64_t positions = border == Border::shift ? size : size + 2 * padding - dilation * (kernel - 1);
    return positions > 0 ? (positions + stride - 1) / stride : 0;
  }
  std::string text() const {
    std::string all;
    for (const int64_t value : {n, c, g, h, w, kh, kw, sh, sw, ph, pw, dh, dw, int64_t(border), uh, uw})
      all += (all.empty() ? "" : ",") + std::to_string(value);
    return "[n,c,g,h,w,kh,kw,sh,sw,ph,pw,dh,dw,border,uh,uw = " + all + "]";
  }
};

enum class Layout {
  contiguous,
  channels_last,  // X and Y N,H,W,C; W as its 1x1 convolution writes it then, N,H,W,G,Kh,Kw
  gapped,         // slices of something larger, X with its rows and columns exchanged
  expanded,       // what is only read repeats over the batch, W also over rows, X over channels
};
constexpr Layout layouts[] = {Layout::contiguous, Layout::channels_last, Layout::gapped, Layout::expanded};
constexpr DType dtypes[] = {DType::f32, DType::f64, DType::f16, DType::bf16};
constexpr Pass passes[] = {Pass::forward, Pass::grad_input, Pass::grad_weight};

inline const char* to_text(Layout layout) {
  switch (layout) {
    case Layout::contiguous: return "contiguous";
    case Layout::channels_last: return "channels_last";
    case Layout::gapped: return "gapped";
    case Layout::expanded: return "expanded";
  }
  return "unknown";
}

// Strides of a tensor whose dimensions lie in memory in this order, outermost first.
inline std::vector<int64_t> strides_in_order(const std::vector<int64_t>& sizes, const std::vector<int>& order,
                                             int64_t gap = 0) {
  std::vector<int64_t> strides(sizes.size());
  int64_t step = 1 + gap;
  for (size_t i = order.size(); i-- > 0;) {
    strides[size_t(order[i])] = step;
    step = step * std::max<int64_t>(1, sizes[size_t(order[i])]) + gap;
  }
  return strides;
}

struct Strides {
  std::vector<int64_t> x, w, y;
};

inline Strides strides_of(const Case& k, Layout layout, Pass pass) {
  const std::vector<int64_t> x{k.n, k.c, k.h, k.w}, w{k.n, k.g, k.kh, k.kw, k.out_h(), k.out_w()},
      y{k.n, k.c, k.out_h(), k.out_w()};
  switch (layout) {
    case Layout::channels_last:
      return {strides_in_order(x, {0, 2, 3, 1}), strides_in_order(w, {0, 4, 5, 1, 2, 3}),
              strides_in_order(y, {0, 2, 3, 1})};
    case Layout::gapped:
      return {strides_in_order(x, {0, 1, 3, 2}, 1), strides_in_order(w, {1, 0, 3, 2, 4, 5}, 2),
              strides_in_order(y, {1, 0, 2, 3}, 3)};
    default: break;
  }
  Strides all{strides_in_order(x, {0, 1, 2, 3}), strides_in_order(w, {0, 1, 2, 3, 4, 5}),
              strides_in_order(y, {0, 1, 2, 3})};
  if (layout == Layout::expanded) {
    if (pass != Pass::grad_input) all.x[0] = all.x[1] = 0;
    if (pass != Pass::grad_weight) all.w[0] = all.w[4] = 0;
    if (pass != Pass::forward) all.y[0] = 0;
  }
  return all;
}

inline Problem problem_of(const Case& k, DType dtype, Device device, const Strides& strides) {
  Problem p{};
  p.dtype = dtype;
  p.device = device;
  p.batch = k.n, p.channels = k.c, p.groups = k.g;
  p.in_h = k.h, p.in_w = k.w, p.out_h = k.out_h(), p.out_w = k.out_w();
  p.kernel_h = k.kh, p.kernel_w = k.kw, p.stride_h = k.sh, p.stride_w = k.sw;
  p.padding_h = k.ph, p.padding_w = k.pw, p.dilation_h = k.dh, p.dilation_w = k.dw;
  p.border = k.border, p.upsample_h = k.uh, p.upsample_w = k.uw;
  std::copy(strides.x.begin(), strides.x.end(), p.x_stride);
  std::copy(strides.w.begin(), strides.w.end(), p.w_stride);
  std::copy(strides.y.begin(), strides.y.end(), p.y_stride);
  return p;
}

// One of each parameter class, by hand.
inline std::vector<Case> basic_cases() {
  std::vector<Case> all;
  for (const int64_t k : {1, 2, 3, 5, 7})
    for (const int64_t s : {1, 2, 3}) all.push_back({2, 4, 2, 8, 9, k, k, s, s, k / 2, k / 2});
  for (const int64_t padding : {0, 1, 2, 3}) all.push_back({1, 3, 1, 6, 5, 3, 3, 1, 1, padding, padding});
  for (const int64_t groups : {1, 2, 3, 6}) all.push_back({2, 6, groups, 5, 5, 3, 3, 1, 1, 1, 1});
  all.push_back({1, 32, 2, 6, 6, 3, 3, 1, 1, 1, 1});  // 16 channels a group
  all.push_back({1, 48, 3, 7, 7, 7, 7, 1, 1, 3, 3});
  all.push_back({1, 32, 2, 9, 9, 7, 7, 2, 2, 3, 3});
  all.push_back({2, 4, 2, 8, 9, 2, 5, 2, 1, 1, 3});  // even and rectangular
  all.push_back({2, 4, 1, 9, 8, 1, 7, 1, 2, 0, 2});
  all.push_back({1, 2, 2, 9, 7, 4, 3, 3, 1, 2, 0});
  all.push_back({1, 4, 2, 11, 12, 3, 3, 1, 1, 2, 2, 2, 2});  // dilation
  all.push_back({1, 4, 2, 11, 12, 3, 2, 2, 3, 3, 1, 3, 2});
  all.push_back({2, 2, 1, 3, 3, 7, 7, 1, 1, 3, 3});  // the kernel is larger than the image
  all.push_back({1, 2, 1, 1, 1, 3, 3, 1, 1, 1, 1});
  all.push_back({1, 2, 1, 2, 3, 1, 1, 1, 1, 2, 1});  // outputs that see nothing but padding
  all.push_back({0, 4, 2, 5, 5, 3, 3, 1, 1, 1, 1});  // nothing to do
  all.push_back({1, 4, 2, 2, 2, 3, 3, 1, 1, 0, 0});  // no output: gradients of input are zero
  return all;
}

// Windows that a border shifts.
inline std::vector<Case> shifted_cases() {
  constexpr Border shift = Border::shift;
  return {
      {2, 4, 2, 8, 9, 3, 3, 1, 1, 0, 0, 1, 1, shift},
      {1, 32, 2, 9, 7, 7, 7, 1, 1, 0, 0, 1, 1, shift},    // one axis is one window wide
      {1, 16, 2, 5, 13, 4, 2, 1, 1, 0, 0, 1, 1, shift},   // even
      {1, 16, 1, 11, 12, 3, 3, 1, 1, 0, 0, 2, 3, shift},  // no multiples of the dilation
      {1, 16, 2, 13, 21, 3, 5, 1, 1, 0, 0, 4, 4, shift},
      {1, 8, 1, 24, 9, 3, 1, 1, 1, 0, 0, 8, 8, shift},   // exactly one window in each residue class, rows
      {2, 8, 2, 10, 11, 3, 3, 2, 3, 0, 0, 2, 1, shift},  // every second and third
      {1, 6, 3, 9, 5, 3, 3, 4, 1, 0, 0, 3, 1, shift},
      {1, 4, 2, 0, 5, 3, 3, 1, 1, 0, 0, 1, 1, shift},
  };
}

// Several outputs for each position.
inline std::vector<Case> upsampled_cases() {
  constexpr Border zeros = Border::zeros, shift = Border::shift;
  return {
      {2, 4, 2, 5, 6, 3, 3, 1, 1, 1, 1, 1, 1, zeros, 2, 2},  {1, 32, 2, 4, 5, 5, 5, 1, 1, 2, 2, 1, 1, zeros, 2, 3},
      {1, 3, 1, 3, 4, 3, 3, 1, 2, 1, 1, 1, 1, zeros, 8, 1},  {1, 16, 1, 6, 7, 3, 3, 1, 1, 0, 1, 2, 1, zeros, 1, 4},
      {1, 16, 2, 6, 7, 3, 3, 1, 1, 0, 0, 2, 1, shift, 2, 2}, {1, 8, 2, 5, 8, 5, 4, 1, 1, 0, 0, 1, 2, shift, 3, 1},
      {1, 4, 2, 2, 2, 3, 3, 1, 1, 0, 0, 1, 1, zeros, 2, 2},  // no output
  };
}

// Others by chance, always the same.
inline std::vector<Case> random_cases(int count, uint64_t seed) {
  std::mt19937_64 engine(seed);
  const auto pick = [&](int64_t low, int64_t high) { return low + int64_t(engine() % uint64_t(high - low + 1)); };
  std::vector<Case> all;
  while (int(all.size()) < count) {
    Case k{};
    k.n = pick(1, 3);
    k.g = pick(1, 4);
    k.c = k.g * pick(1, 5);
    k.h = pick(1, 13), k.w = pick(1, 13);
    k.kh = pick(1, 7), k.kw = pick(1, 7);
    k.sh = pick(1, 3), k.sw = pick(1, 3);
    k.ph = pick(0, k.kh), k.pw = pick(0, k.kw);
    k.dh = pick(1, 3), k.dw = pick(1, 3);
    if (k.out_h() > 0 && k.out_w() > 0) all.push_back(k);
  }
  return all;
}

}  // namespace
