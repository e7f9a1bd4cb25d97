// A task of a backward pass: what the loops in float32 (backward.inl) and those in pairs of bfloat16
// (backward_pairs.inl) have in common, the strips of a part and the order of the steps. Compiled with the instruction
// set of the including file.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/channels/packing.h"
#include "cpu/channels/tiling.h"
#include "cpu/simd/prefetch.h"
#include "pyinvolution/axis.h"

namespace pyinvolution::cpu {
namespace {

// `Loops` derives from this and has the steps of a task (see tiling.h):
//
//   start()                               what a task does once
//   pack_reduced(n, strip)                R of a strip of image n
//   start_group(n, g, strip)              X, S and the bias of group g
//   prefetch(group, next, row, rows)      asks for what is read and written later; called before the tile of these rows, with
//                                         the group after this one, if there is one
//   tile(n, g, row, rows, index, strip)   the rows [row, row + rows) of the output, the index-th tile of the strip
//   finish_group(n, g, strip)
//   finish_task()
//   store_reduced_row(from, apart, to, channel, pixel)    grad_R at a row of the output
template <class T, class Loops>
struct BackwardTask {
  const BackwardTiling& tiling;
  const SpanProblem& span;
  const Problem& p;
  const Axis<int64_t> row_axis;
  float* memory;
  float *gr, *bias, *staging;
  int64_t chunk, part;
  bool want_x, want_weights;  // whether grad_X and grad_W are computed (grad_W also as a step to others)

  BackwardTask(const BackwardTiling& backward, int64_t task, void* scratch)
      : tiling(backward),
        span(backward.problem),
        p(backward.problem.involution),
        row_axis(rows_of(p)),
        memory(static_cast<float*>(scratch)),
        chunk(task % backward.chunks),
        part(task / backward.chunks) {
    gr = memory + tiling.grad_reduced_at, bias = memory + tiling.bias_at, staging = memory + tiling.staging_at;
    want_x = tiling.buffers.grad_x != nullptr;
    want_weights = tiling.grad_w != nullptr || tiling.buffers.grad_reduced != nullptr ||
                   tiling.buffers.grad_span != nullptr || tiling.buffers.grad_bias != nullptr;
  }

  int64_t first_group() const { return p.groups * chunk / tiling.chunks; }
  int64_t last_group() const { return p.groups * (chunk + 1) / tiling.chunks; }
  int64_t channels_of(int64_t block) const { return min(block_channels, p.group_channels() - block * block_channels); }
  int64_t first_channel(int64_t g, int64_t block) const { return g * p.group_channels() + block * block_channels; }

  // Calls body(row, rows, index) for the tiles of rows of a strip. None has rows of the strip itself and of a neighbour.
  template <class Body>
  void for_each_tile(const BackwardStrip& strip, const Body& body) const {
    const int64_t ends[] = {strip.begin, strip.end, last_row(strip)};
    int64_t row = first_row(strip), index = 0;
    for (const int64_t end : ends)
      for (int64_t rows; row < end; row += rows) {
        rows = min(tiling.tile_rows, end - row);
        body(row, rows, index++);
      }
  }
  int64_t first_row(const BackwardStrip& strip) const { return want_x ? strip.first : strip.begin; }
  int64_t last_row(const BackwardStrip& strip) const { return want_x ? strip.last : strip.end; }

  // A group of a strip of an image.
  struct Group {
    int64_t n, g;
    const BackwardStrip* strip;
    bool begins;  // the strip, whose R is read, too
  };

  // A strip of an image, after which a task computes the next one, if it does.
  void strip(int64_t unit, bool another) {
    const auto strip_of = [&](int64_t u) -> const BackwardStrip& { return tiling.strips[u % tiling.strip_count]; };
    const int64_t n = unit / tiling.strip_count;
    const BackwardStrip& strip = strip_of(unit);
    if (tiling.buffers.grad_reduced != nullptr) std::memset(gr, 0, size_t(span.reduced * tiling.plane) * sizeof(float));
    if (span.reduced > 0) loops().pack_reduced(n, strip);
    const int64_t first = first_group(), last = last_group();
    for (int64_t g = first; g < last; ++g) {
      load_bias<T>(span, tiling.buffers, g, bias);
      loops().start_group(n, g, strip);
      const Group next = g + 1 < last ? Group{n, g + 1, &strip, false}
                                      : Group{(unit + 1) / tiling.strip_count, first, &strip_of(unit + 1), true};
      for_each_tile(strip, [&](int64_t row, int64_t rows, int64_t index) {
        loops().prefetch({n, g, &strip, false}, g + 1 < last || another ? &next : nullptr, row, rows);
        loops().tile(n, g, row, rows, index, strip);
      });
      loops().finish_group(n, g, strip);
    }
    if (tiling.buffers.grad_reduced == nullptr) return;
    const int64_t at = strip.begin / tiling.height;
    if (tiling.chunks == 1) return store_reduced(n, at, at + 1, gr, tiling.plane);
    float* part_of_chunk = tiling.reduced_part(chunk, n) + at * tiling.plane;
    for (int64_t r = 0; r < span.reduced; ++r)
      std::memcpy(part_of_chunk + r * tiling.strip_count * tiling.plane, gr + r * tiling.plane,
                  size_t(tiling.plane) * sizeof(float));
  }

  // Asks for the rows [begin, end) of a group's X or grad_X, and of what has the size of the output.
  void prefetch_input(const Group& group, const void* at, const int64_t (&stride)[4], int64_t begin,
                      int64_t end) const {
    const int64_t channels = p.group_channels();
    const T* from = static_cast<const T*>(at) + group.n * stride[0] + group.g * channels * stride[1];
    for (int64_t h = max(begin, 0); h < min(end, p.in_h); ++h)
      prefetch_pixels(from + h * stride[2], stride[1], channels, stride[3], p.in_w);
  }
  void prefetch_output(const Group& group, int64_t begin, int64_t end) const {
    const int64_t n = group.n, g = group.g, channels = p.group_channels();
    const T* y = static_cast<const T*>(tiling.buffers.y) + n * p.y_stride[0] + g * channels * p.y_stride[1];
    const void* const weights[] = {tiling.w, tiling.grad_w};
    for (int64_t row = begin; row < end; ++row) {
      prefetch_pixels(y + row * p.y_stride[2], p.y_stride[1], channels, p.y_stride[3], p.out_w);
      for (const void* at : weights)
        if (at != nullptr)
          prefetch_pixels(weights_of<T>(p, at, n, g, row, 0), p.w_stride[3], p.taps(), p.w_stride[5], p.out_w);
      if (group.begins && span.reduced > 0)
        prefetch_pixels(
            static_cast<const T*>(tiling.buffers.reduced) + n * span.reduced_stride[0] + row * span.reduced_stride[2],
            span.reduced_stride[1], span.reduced, span.reduced_stride[3], p.out_w);
    }
  }

  // Sums of the strips [begin, end) of an image into grad_R. In `from` channels are `apart` floats apart.
  void store_reduced(int64_t n, int64_t begin, int64_t end, const float* from, int64_t apart) {
    T* to = static_cast<T*>(tiling.buffers.grad_reduced) + n * span.grad_reduced_stride[0];
    const int64_t channel = span.grad_reduced_stride[1], pixel = span.grad_reduced_stride[3];
    for (int64_t i = begin; i < end; ++i, from += tiling.plane) {
      const BackwardStrip& strip = tiling.strips[i];
      for (int64_t row = strip.begin; row < strip.end; ++row) {
        T* out = to + row * span.grad_reduced_stride[2];
        const float* in = from + tiling.place(row - strip.begin, 0);
        loops().store_reduced_row(in, apart, out, channel, pixel);
      }
    }
  }

  void run() {
    const int64_t taps = p.taps(), first = first_group() * taps, rows = last_group() * taps - first;
    if (tiling.buffers.grad_span != nullptr)
      std::memset(tiling.span_part(part) + first * tiling.reduced_padded, 0,
                  size_t(rows * tiling.reduced_padded) * sizeof(float));
    if (tiling.buffers.grad_bias != nullptr)
      std::memset(tiling.bias_part(part) + first, 0, size_t(rows) * sizeof(float));
    loops().start();
    const int64_t units = p.batch * tiling.strip_count, end = units * (part + 1) / tiling.parts;
    for (int64_t unit = units * part / tiling.parts; unit < end; ++unit) strip(unit, unit + 1 < end);
    loops().finish_task();
  }

  // --- sums over parts and chunks: tasks 0 .. groups - 1 are groups of S, the others images of grad_R

  void finish(int64_t task) {
    if (task >= p.groups) return finish_reduced(task - p.groups);
    const int64_t taps = p.taps();
    for (int64_t k = task * taps; k < (task + 1) * taps; ++k) {
      if (tiling.buffers.grad_span != nullptr) {
        T* to = static_cast<T*>(tiling.buffers.grad_span) + k * span.reduced;
        const float* from = tiling.span_part(0) + k * tiling.reduced_padded;
        const int64_t apart = span.span_rows() * tiling.reduced_padded;
        for (int64_t r = 0; r < span.reduced; r += V::lanes) {
          V sum = V::zero();
          for (int64_t i = 0; i < tiling.parts; ++i) sum.value = sum.value + V::load(from + i * apart + r).value;
          float sums[V::lanes];
          sum.store(sums);
          store_run(sums, min(V::lanes, span.reduced - r), to + r);
        }
      }
      if (tiling.buffers.grad_bias != nullptr) {
        float sum = 0;
        for (int64_t i = 0; i < tiling.parts; ++i) sum += tiling.bias_part(i)[k];
        store(sum, &static_cast<T*>(tiling.buffers.grad_bias)[k]);
      }
    }
  }

  void finish_reduced(int64_t n) {
    const int64_t apart = tiling.strip_count * tiling.plane, count = span.reduced * apart;
    float* sum = tiling.reduced_part(0, n);
    for (int64_t i = 1; i < tiling.chunks; ++i) {
      const float* other = tiling.reduced_part(i, n);
      for (int64_t k = 0; k < count; ++k) sum[k] += other[k];
    }
    store_reduced(n, 0, tiling.strip_count, sum, apart);
  }

 private:
  Loops& loops() { return static_cast<Loops&>(*this); }
};

template <class Loops>
void run_backward_task(const BackwardTiling& tiling, bool finish, int64_t task, void* scratch) {
  if (finish)
    Loops(tiling, 0, scratch).finish(task);
  else
    Loops(tiling, task, scratch).run();
}

}  // namespace
}  // namespace pyinvolution::cpu
