// The operands of the products of the backward pass as pairs of bfloat16 (simd/pair_product.h), where an instruction set
// multiplies these. The loops are plain ones, of which compilers make vectors of any instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/arithmetic.h"
#include "cpu/simd/float16.h"
#include "cpu/simd/pair_product.h"
#include "cpu/simd/vector.h"

namespace pyinvolution::cpu {
namespace {

inline uint32_t pair_of(BFloat16 low, BFloat16 high) { return low.bits | uint32_t{high.bits} << 16; }

// `count` elements of two rows, `step` apart, as pairs; without a second one with zeros.
inline void interleave(const BFloat16* low, const BFloat16* high, int64_t step, int64_t count, uint32_t* to) {
  if (high == nullptr)
    for (int64_t i = 0; i < count; ++i) to[i] = low[i * step].bits;
  else if (step == 1)
    for (int64_t i = 0; i < count; ++i) to[i] = pair_of(low[i], high[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = pair_of(low[i * step], high[i * step]);
}

// Rows of S, [tap][r] with steps row and column, as [tap][pair of r] and as [pair of taps][r].
inline void pack_span_pairs(const BFloat16* from, int64_t row, int64_t column, int64_t taps, int64_t reduced,
                            uint32_t* to, uint32_t* across) {
  for (int64_t k = 0; k < taps; ++k, to += ceil_div(reduced, 2)) {
    const BFloat16* at = from + k * row;
    if (column == 1)
      std::memcpy(to, at, size_t(reduced / 2) * sizeof(uint32_t));
    else
      interleave(at, at + column, 2 * column, reduced / 2, to);
    if (reduced % 2 != 0) to[reduced / 2] = at[(reduced - 1) * column].bits;
  }
  for (int64_t k = 0; k < taps; k += 2, across += reduced)
    interleave(from + k * row, k + 1 < taps ? from + (k + 1) * row : nullptr, column, reduced, across);
}

// R at rows x columns pixels as [vector of pixels][pair of r][lane]; lanes past the last pixel are zero. `stride` has
// those of n, r, h and w.
inline void pack_reduced_pairs(const BFloat16* from, const int64_t (&stride)[4], int64_t reduced, int64_t rows,
                               int64_t columns, uint32_t* to) {
  const int64_t pixels = rows * columns, depth = ceil_div(reduced, 2), channel = stride[1], pixel = stride[3];
  const bool in_pairs = channel == 1 && reduced % 2 == 0 && pixel % 2 == 0;
  for (int64_t at = 0; at < pixels; at += product_lanes, to += product_lanes * depth) {
    const int64_t count = min(product_lanes, pixels - at);
    if (count < product_lanes) std::memset(to, 0, size_t(product_lanes * depth) * sizeof(uint32_t));
    // Runs of pixels in one row.
    for (int64_t lane = 0; lane < count;) {
      const int64_t row = (at + lane) / columns, column = (at + lane) % columns;
      const int64_t run = min(count - lane, columns - column);
      const BFloat16* source = from + row * stride[2] + column * pixel;
      if (in_pairs) {
        transpose(reinterpret_cast<const float*>(source), pixel / 2, run, depth, reinterpret_cast<float*>(to + lane),
                  product_lanes);
      } else {
        for (int64_t k = 0; k < depth; ++k)
          interleave(source + 2 * k * channel, 2 * k + 1 < reduced ? source + (2 * k + 1) * channel : nullptr, pixel,
                     run, to + k * product_lanes + lane);
      }
      lane += run;
    }
  }
}

// The same as [pair of pixels][r], rows `pitch` apart. What is past r is zero.
inline void pack_pixel_pairs(const BFloat16* from, const int64_t (&stride)[4], int64_t reduced, int64_t rows,
                             int64_t columns, uint32_t* to, int64_t pitch) {
  const int64_t pixels = rows * columns;
  const auto pixel = [&](int64_t i) { return from + i / columns * stride[2] + i % columns * stride[3]; };
  for (int64_t i = 0; i < pixels; i += 2, to += pitch) {
    interleave(pixel(i), i + 1 < pixels ? pixel(i + 1) : nullptr, stride[1], reduced, to);
    for (int64_t r = reduced; r < pitch; ++r) to[r] = 0;
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
    interleave(low, k + 1 < taps ? high : nullptr, 1, padded, across);
  }
}

}  // namespace
}  // namespace pyinvolution::cpu
