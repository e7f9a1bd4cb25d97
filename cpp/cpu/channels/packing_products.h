// The operands of the products of the backward pass as pairs of bfloat16 (simd/pair_product.h), where an instruction set
// multiplies these. The loops are plain, for any instruction set: compilers make vectors of them.
#pragma once

#include <cstdint>

#include "cpu/arithmetic.h"
#include "cpu/simd/float16.h"
#include "cpu/simd/pair_product.h"

namespace pyinvolution::cpu {
namespace {

inline uint32_t pair_of(BFloat16 low, BFloat16 high) { return low.bits | uint32_t{high.bits} << 16; }

// Rows of S, [tap][r] with steps row and column, as [tap][pair of r] and as [pair of taps][r].
inline void pack_span_pairs(const BFloat16* from, int64_t row, int64_t column, int64_t taps, int64_t reduced,
                            uint32_t* to, uint32_t* across) {
  for (int64_t k = 0; k < taps; ++k, to += ceil_div(reduced, 2)) {
    const BFloat16* at = from + k * row;
    for (int64_t r = 0; r + 1 < reduced; r += 2) to[r / 2] = pair_of(at[r * column], at[(r + 1) * column]);
    if (reduced % 2 != 0) to[reduced / 2] = at[(reduced - 1) * column].bits;
  }
  for (int64_t k = 0; k < taps; k += 2, across += reduced) {
    const BFloat16 *low = from + k * row, *high = low + row;
    for (int64_t r = 0; r < reduced; ++r)
      across[r] = k + 1 < taps ? pair_of(low[r * column], high[r * column]) : low[r * column].bits;
  }
}

// R at rows x columns pixels as [vector of pixels][pair of r][lane]; lanes past the last pixel are zero. `stride` has
// those of n, r, h and w.
inline void pack_reduced_pairs(const BFloat16* from, const int64_t (&stride)[4], int64_t reduced, int64_t rows,
                               int64_t columns, uint32_t* to) {
  const int64_t pixels = rows * columns, depth = ceil_div(reduced, 2), channel = stride[1];
  for (int64_t i = 0; i < round_up(pixels, product_lanes); ++i) {
    uint32_t* at = to + i / product_lanes * product_lanes * depth + i % product_lanes;
    if (i >= pixels) {
      for (int64_t k = 0; k < depth; ++k) at[k * product_lanes] = 0;
      continue;
    }
    const BFloat16* pixel = from + i / columns * stride[2] + i % columns * stride[3];
    for (int64_t k = 0; k + 1 < depth; ++k)
      at[k * product_lanes] = pair_of(pixel[2 * k * channel], pixel[(2 * k + 1) * channel]);
    const BFloat16* last = pixel + 2 * (depth - 1) * channel;
    at[(depth - 1) * product_lanes] = reduced % 2 == 0 ? pair_of(*last, last[channel]) : last->bits;
  }
}

// The same as [pair of pixels][r], rows `pitch` apart. What is past r is zero.
inline void pack_pixel_pairs(const BFloat16* from, const int64_t (&stride)[4], int64_t reduced, int64_t rows,
                             int64_t columns, uint32_t* to, int64_t pitch) {
  const int64_t pixels = rows * columns, channel = stride[1];
  const auto pixel = [&](int64_t i) { return from + i / columns * stride[2] + i % columns * stride[3]; };
  for (int64_t i = 0; i < pixels; i += 2, to += pitch) {
    const BFloat16 *low = pixel(i), *high = i + 1 < pixels ? pixel(i + 1) : nullptr;
    for (int64_t r = 0; r < pitch; ++r) to[r] = 0;
    if (high == nullptr)
      for (int64_t r = 0; r < reduced; ++r) to[r] = low[r * channel].bits;
    else if (channel == 1)
      for (int64_t r = 0; r < reduced; ++r) to[r] = pair_of(low[r], high[r]);
    else
      for (int64_t r = 0; r < reduced; ++r) to[r] = pair_of(low[r * channel], high[r * channel]);
  }
}

// Rows of grad_W, `from_pitch` floats apart, rounded to [tap][pair of pixels] with rows of `pitch` pairs, and as [pair of
// taps][pixel] with rows of 2 * pitch pairs.
inline void round_weight_pairs(const float* from, int64_t from_pitch, int64_t taps, int64_t pixels, uint32_t* to,
                               uint32_t* across, int64_t pitch) {
  BFloat16* rounded = reinterpret_cast<BFloat16*>(to);
  const int64_t padded = round_up(pixels, product_lanes);
  for (int64_t k = 0; k < taps; ++k) {
    BFloat16* row = rounded + k * 2 * pitch;
    for (int64_t i = 0; i < pixels; ++i) {
      const uint32_t bits = bits_of(from[k * from_pitch + i]);
      const uint32_t even = (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16, nan = bits >> 16 | 0x40u;
      row[i].bits = uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? nan : even);
    }
    for (int64_t i = pixels; i < padded; ++i) row[i].bits = 0;
  }
  for (int64_t k = 0; k < taps; k += 2, across += 2 * pitch) {
    const BFloat16 *low = rounded + k * 2 * pitch, *high = low + 2 * pitch;
    if (k + 1 < taps)
      for (int64_t i = 0; i < padded; ++i) across[i] = pair_of(low[i], high[i]);
    else
      for (int64_t i = 0; i < padded; ++i) across[i] = low[i].bits;
  }
}

}  // namespace
}  // namespace pyinvolution::cpu
