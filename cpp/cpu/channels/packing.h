// Copies of tensors in the order that the loops of `channels` and `fused` read, and of results into tensors. Compiled
// with the instruction set of the including file.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/arithmetic.h"
#include "cpu/channels/tiling.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/dtype.h"
#include "cpu/simd/vector.h"

namespace pyinvolution::cpu {
namespace {

using V = Vector<float>;

// `count` neighbouring elements as floats: in place where they are, else in `staging`.
inline const float* as_float_row(const float* from, int64_t, float*) { return from; }
template <class T>
const float* as_float_row(const T* from, int64_t count, float* staging) {
  for (int64_t i = 0; i < count; ++i) staging[i] = load(from[i]);
  return staging;
}

// `rows` x `columns` elements as to[column][row], with columns `pitch` apart in `to`. In memory rows are `row` apart
// and columns `column`; either may be 1. `staging` holds tile_pixels * block_channels floats.
template <class T>
void transpose_into(const T* from, int64_t row, int64_t rows, int64_t column, int64_t columns, float* to, int64_t pitch,
                    float* staging) {
  if (column == 1) {
    if constexpr (is_float<T>) return transpose(from, row, rows, columns, to, pitch);
    for (int64_t r = 0; r < rows; r += block_channels)
      for (int64_t c = 0; c < columns; c += tile_pixels) {
        const int64_t high = min(block_channels, rows - r), wide = min(tile_pixels, columns - c);
        for (int64_t i = 0; i < high; ++i) as_float_row(from + (r + i) * row + c, wide, staging + i * tile_pixels);
        transpose(staging, tile_pixels, high, wide, to + c * pitch + r, pitch);
      }
  } else {
    if constexpr (is_float<T>) {
      if (row == 2) {
        for (int64_t c = 0; c < columns; ++c) copy_even(from + c * column, rows, to + c * pitch);
        return;
      }
    }
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t r = 0; r < rows; ++r) to[c * pitch + r] = load(from[r * row + c * column]);
  }
}

// A run of `count` neighbouring elements into floats, and back.
template <class T>
void load_run(const T* from, int64_t count, float* to) {
  if constexpr (is_float<T>)
    copy(from, count, to);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}
template <class T>
void store_run(const float* from, int64_t count, T* to) {
  if constexpr (is_float<T>)
    copy(from, count, to);
  else
    for (int64_t i = 0; i < count; ++i) store(from[i], &to[i]);
}

// `channels` channels at rows x columns pixels as [vector of pixels][channel][lane]; lanes past the last pixel are
// zero. `stride` has those of n, c, h and w.
template <class T>
void pack_pixels(const T* from, const int64_t (&stride)[4], int64_t channels, int64_t rows, int64_t columns, float* to,
                 float* staging) {
  const int64_t pixels = rows * columns;
  for (int64_t at = 0; at < pixels; at += V::lanes, to += V::lanes * channels) {
    const int64_t count = min(V::lanes, pixels - at);
    if (count < V::lanes) std::memset(to, 0, size_t(V::lanes * channels) * sizeof(float));
    // Runs of pixels in one row.
    for (int64_t lane = 0; lane < count;) {
      const int64_t row = (at + lane) / columns, column = (at + lane) % columns;
      const int64_t run = min(count - lane, columns - column);
      const T* source = from + row * stride[2] + column * stride[3];
      if (stride[3] == 1) {
        for (int64_t r = 0; r < channels; ++r)
          for (int64_t i = 0; i < run; ++i) to[r * V::lanes + lane + i] = load(source[r * stride[1] + i]);
      } else {
        transpose_into(source, stride[3], run, stride[1], channels, to + lane, V::lanes, staging);
      }
      lane += run;
    }
  }
}

template <class T>
const T* span_row(const SpanProblem& span, const SpanBuffers& buffers, int64_t row) {
  return static_cast<const T*>(buffers.span) + row * span.span_stride[0];
}

// Rows of S for group g, [tap][r]: in place where they are floats, else at `to`.
template <class T>
const float* span_rows(const SpanProblem& span, const SpanBuffers& buffers, int64_t g, float* to, int64_t* pitch) {
  const int64_t taps = span.involution.taps();
  const T* from = span_row<T>(span, buffers, g * taps);
  if constexpr (is_float<T>) {
    if (span.span_stride[1] == 1) {
      *pitch = span.span_stride[0];
      return from;
    }
  }
  *pitch = span.reduced;
  for (int64_t k = 0; k < taps; ++k)
    for (int64_t r = 0; r < span.reduced; ++r)
      to[k * span.reduced + r] = load(from[k * span.span_stride[0] + r * span.span_stride[1]]);
  return to;
}

template <class T>
void load_bias(const SpanProblem& span, const SpanBuffers& buffers, int64_t g, float* to) {
  const int64_t taps = span.involution.taps();
  const T* from = static_cast<const T*>(buffers.bias);
  for (int64_t k = 0; k < taps; ++k) to[k] = from == nullptr ? 0.0f : load(from[g * taps + k]);
}

// Fewer than 16 neighbours.
template <class T>
[[gnu::always_inline]] inline void copy_few(const T* from, int64_t count, T* to) {
  const auto piece = [&](auto size) __attribute__((always_inline)) {
    constexpr int n = decltype(size)::value;
    if ((count & n) == 0) return;
    std::memcpy(to, from, n * sizeof(T));
    from += n, to += n;
  };
  piece(Count<8>{}), piece(Count<4>{}), piece(Count<2>{}), piece(Count<1>{});
}

// Whether parts of vectors are loaded and converted as vectors: AVX-512 masks loads. Elsewhere a vector that is put
// together from elements would wait for them to reach memory.
constexpr bool masks_loads = V::lanes == 16;

// Neighbouring channels of a pixel, a block of them or with masks_loads fewer, as floats; missing ones are zero. And back.
template <class T>
[[gnu::always_inline]] inline void load_pixel(const T* from, int64_t channels, float* to) {
  if (masks_loads && channels < block_channels) return V::load_range(from, 0, 0, channels).store(to);
  for (int64_t c = 0; c < block_channels; c += V::lanes) V::load(from + c).store(to + c);
}
template <class T>
[[gnu::always_inline]] inline void store_pixel(const float* from, int64_t channels, T* to) {
  if (masks_loads && channels < block_channels) {
    T block[block_channels];
    store_vector(V::load(from), block);
    return copy_few(block, channels, to);
  }
  for (int64_t c = 0; c < block_channels; c += V::lanes) store_vector(V::load(from + c), to + c);
}

// [pixel][16] results of a run of pixels into a tensor; `staging` holds tile_pixels * 16 floats.
template <class T>
void store_pixels(const float* from, int64_t channels, int64_t pixels, T* to, int64_t channel, int64_t pixel,
                  float* staging) {
  if (pixel == 1 && channel != 1) {
    if constexpr (is_float<T>) {
      transpose(from, block_channels, pixels, channels, to, channel);
    } else {
      for (int64_t first = 0; first < pixels; first += tile_pixels) {
        const int64_t run = min(tile_pixels, pixels - first);
        transpose(from + first * block_channels, block_channels, run, channels, staging, tile_pixels);
        for (int64_t c = 0; c < channels; ++c)
          for (int64_t v = 0; v < run; ++v) store(staging[c * tile_pixels + v], &to[c * channel + first + v]);
      }
    }
  } else if (channel == 1 && (masks_loads || channels == block_channels)) {
    for (int64_t v = 0; v < pixels; ++v) store_pixel(from + v * block_channels, channels, to + v * pixel);
  } else {
    for (int64_t v = 0; v < pixels; ++v)
      for (int64_t c = 0; c < channels; ++c) store(from[v * block_channels + c], &to[v * pixel + c * channel]);
  }
}

// The reverse: a run of pixels as [pixel][16]; missing channels are zero-filled.
template <class T>
void load_pixels(const T* from, int64_t channels, int64_t pixels, int64_t channel, int64_t pixel, float* to,
                 float* staging) {
  if (channel == 1 && (masks_loads || channels == block_channels)) {
    for (int64_t v = 0; v < pixels; ++v) load_pixel(from + v * pixel, channels, to + v * block_channels);
    return;
  }
  if (channels < block_channels) std::memset(to, 0, size_t(pixels * block_channels) * sizeof(float));
  if (channel == 1) {
    for (int64_t v = 0; v < pixels; ++v)
      for (int64_t c = 0; c < channels; ++c) to[v * block_channels + c] = load(from[v * pixel + c]);
  } else {
    transpose_into(from, channel, channels, pixel, pixels, to, block_channels, staging);
  }
}

// W of an image, group and pixel.
template <class T>
T* weights_of(const Problem& p, const void* w, int64_t n, int64_t g, int64_t row, int64_t column) {
  return static_cast<T*>(const_cast<void*>(w)) + n * p.w_stride[0] + g * p.w_stride[1] + row * p.w_stride[4] +
         column * p.w_stride[5];
}

// W at rows x columns pixels as [tap][pixel].
template <class T>
void load_weights(const T* from, const Problem& p, int64_t rows, int64_t columns, float* to, float* staging) {
  const int64_t pixel = p.w_stride[5], pixels = rows * columns;
  const bool one_run = rows == 1 || p.w_stride[4] == columns * pixel;
  const int64_t runs = one_run ? 1 : rows, run = pixels / runs;
  const bool taps_together = p.w_stride[3] == 1 && p.w_stride[2] == p.kernel_w;
  for (int64_t r = 0; r < runs; ++r) {
    const T* source = from + r * p.w_stride[4];
    float* target = to + r * run;
    if (pixel != 1 && taps_together) {
      transpose_into(source, pixel, run, 1, p.taps(), target, tile_pixels, staging);
      continue;
    }
    for (int64_t i = 0; i < p.kernel_h; ++i)
      for (int64_t j = 0; j < p.kernel_w; ++j, target += tile_pixels) {
        const T* tap = source + i * p.w_stride[2] + j * p.w_stride[3];
        if (pixel == 1) {
          load_run(tap, run, target);
        } else {
          for (int64_t v = 0; v < run; ++v) target[v] = load(tap[v * pixel]);
        }
      }
  }
}

// The reverse, for a run of pixels in a row; taps are gradient_pitch apart.
template <class T>
void store_weights(const float* from, const Problem& p, int64_t columns, T* to) {
  const int64_t pixel = p.w_stride[5];
  if constexpr (is_float<T>) {
    if (pixel != 1 && p.w_stride[3] == 1 && p.w_stride[2] == p.kernel_w)
      return transpose(from, gradient_pitch, p.taps(), columns, to, pixel);
  }
  for (int64_t i = 0; i < p.kernel_h; ++i)
    for (int64_t j = 0; j < p.kernel_w; ++j, from += gradient_pitch) {
      T* tap = to + i * p.w_stride[2] + j * p.w_stride[3];
      if (pixel == 1) {
        store_run(from, columns, tap);
      } else {
        for (int64_t v = 0; v < columns; ++v) store(from[v], &tap[v * pixel]);
      }
    }
}

}  // namespace
}  // namespace pyinvolution::cpu
