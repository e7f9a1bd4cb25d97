// A task of a forward pass: what the loops in float32 (forward.inl) and those in pairs of bfloat16 (forward_pairs.inl)
// have in common, the tiles of a strip and the order of the steps. Compiled with the instruction set of the including
// file.
#pragma once

#include <cstdint>

#include "cpu/channels/packing.h"
#include "cpu/channels/tiling.h"
#include "cpu/simd/prefetch.h"
#include "pyinvolution/axis.h"

namespace pyinvolution::cpu {
namespace {

// Consecutive pixels of some rows of the strip: pixel i is at row + i / columns, column + i % columns.
struct Tile {
  int64_t row, rows, column, columns;
  int64_t pixels() const { return rows * columns; }
};

// Some channels' scale and shift, padded to a block.
struct Epilogue {
  float scale[block_channels] = {}, shift[block_channels] = {};
};

// `Loops` derives from this and has the steps of a task (see tiling.h):
//
//   reduce(tile, slice, to)                                 a slice of R at a tile of a layer
//   pack_reduced(tile, to)                                  R at a tile
//   pack_input(g, block, from_row, to_row)                  rows of X of a block of channels of group g
//   start_group(g)                                          the rows of S of group g
//   compute_weights(tile, reduced), load_weights(tile, g)   W at a tile
//   apply_tile(tile, g, block)                              Y of a block at a tile
//
// R and W are 4 bytes an element in either form.
template <class T, class Loops>
struct StripTask {
  const ChannelsTiling& tiling;
  const SpanProblem& span;
  const Problem& p;
  const Axis<int64_t> row_axis;
  int64_t n, begin, end;        // rows of the strip
  int64_t x_begin;              // the first row of X that it reads
  int64_t first_group, groups;  // of the chunk, up to `groups`
  float* memory;

  StripTask(const ChannelsTiling& channels, int64_t n_and_strip, int64_t chunk, void* scratch)
      : tiling(channels),
        span(channels.problem),
        p(channels.problem.involution),
        row_axis(rows_of(p)),
        memory(static_cast<float*>(scratch)) {
    begin = n_and_strip % tiling.strips * tiling.height;
    end = min(begin + tiling.height, p.out_h);
    n = n_and_strip / tiling.strips;
    x_begin = row_axis.first(begin);
    if (p.border == Border::shift)
      for (int64_t row = begin + 1; row < end; ++row) x_begin = min(x_begin, row_axis.first(row));
    first_group = p.groups * chunk / tiling.chunks;
    groups = p.groups * (chunk + 1) / tiling.chunks;
  }

  template <class Body>
  void for_each_tile(const Body& body) const {
    int64_t index = 0;
    for (int64_t row = begin; row < end; row += tiling.tile_rows)
      for (int64_t column = 0; column < p.out_w; column += tiling.tile_columns)
        body(Tile{row, min(tiling.tile_rows, end - row), column, min(tiling.tile_columns, p.out_w - column)}, index++);
  }

  int64_t block_floats() const { return tiling.packed_rows * tiling.packed_columns * block_channels; }
  int64_t channels_of(int64_t block) const { return min(block_channels, p.group_channels() - block * block_channels); }
  int64_t first_channel(int64_t g, int64_t block) const { return g * p.group_channels() + block * block_channels; }

  // How many rows of X from x_begin on the strip's rows up to those of a tile read.
  int64_t rows_read(const Tile& tile) const {
    int64_t last = row_axis.first(tile.row + tile.rows - 1);
    if (p.border == Border::shift)
      for (int64_t row = tile.row; row < tile.row + tile.rows; ++row) last = max(last, row_axis.first(row));
    return last - x_begin + p.dilation_h * (p.kernel_h - 1) + 1;
  }

  // Calls body(run) for the runs of a tile's columns, where the border is shifted.
  template <class Body>
  void for_each_run(const Tile& tile, const Body& body) const {
    const int64_t* const ends = tiling.tile_runs + tile.column / tiling.tile_columns;
    for (int64_t i = ends[0]; i < ends[1]; ++i) body(tiling.runs[i]);
  }

  Epilogue epilogue_of(int64_t first, int64_t channels) const {
    Epilogue epilogue;
    for (int64_t c = 0; c < channels; ++c) {
      epilogue.scale[c] = static_cast<const float*>(tiling.buffers.scale)[first + c];
      epilogue.shift[c] = static_cast<const float*>(tiling.buffers.shift)[first + c];
    }
    return epilogue;
  }

  // Means of X over the cells of a tile as [pixel][c].
  void pool(const Tile& tile, float* to) const {
    const int64_t channel = p.x_stride[1], column = p.x_stride[3];
    for (int64_t r = 0; r < tile.rows; ++r) {
      const int64_t h = (tile.row + r) * p.stride_h, high = min(p.stride_h, p.in_h - h);
      const T* row = static_cast<const T*>(tiling.buffers.x) + n * p.x_stride[0] + h * p.x_stride[2];
      if (channel != 1 && column == 1 && p.stride_h == 1 && p.stride_w == 1) {
        transpose_into(row + tile.column, channel, p.channels, column, tile.columns, to, p.channels,
                       memory + tiling.staging_at);
        to += tile.columns * p.channels;
        continue;
      }
      for (int64_t v = 0; v < tile.columns; ++v, to += p.channels) {
        const int64_t q = (tile.column + v) * p.stride_w, wide = min(p.stride_w, p.in_w - q);
        const T* from = row + q * column;
        if (channel == 1) {
          for (int64_t c = 0; c < p.channels; ++c) to[c] = load(from[c]);
          for (int64_t i = 1; i < high * wide; ++i) {
            const T* other = from + i / wide * p.x_stride[2] + i % wide * column;
            for (int64_t c = 0; c < p.channels; ++c) to[c] += load(other[c]);
          }
        } else {
          for (int64_t c = 0; c < p.channels; ++c, from += channel) {
            float sum = 0;
            for (int64_t i = 0; i < high; ++i)
              for (int64_t j = 0; j < wide; ++j) sum += load(from[i * p.x_stride[2] + j * column]);
            to[c] = sum;
          }
        }
        if (high * wide > 1)
          for (int64_t c = 0; c < p.channels; ++c) to[c] /= float(high * wide);
      }
    }
  }

  int64_t tile_index(int64_t index) const { return (n * tiling.strips + begin / tiling.height) * tiling.tiles + index; }

  void reduce_shared(int64_t wanted, int64_t slice) const {
    for_each_tile([&](const Tile& tile, int64_t index) {
      if (index == wanted) loops().reduce(tile, slice, tiling.shared + tile_index(index) * tiling.tile_floats);
    });
  }

  void forward() {
    const bool fused = span.reduced > 0;
    const float* reduced = memory + tiling.reduced_at;
    if (tiling.shared != nullptr) {
      reduced = tiling.shared + tile_index(0) * tiling.tile_floats;
    } else if (fused) {
      for_each_tile([&](const Tile& tile, int64_t index) {
        float* to = memory + tiling.reduced_at + index * tiling.tile_floats;
        if (!tiling.layer) return loops().pack_reduced(tile, to);
        for (int64_t slice = 0; slice < tiling.slices; ++slice) loops().reduce(tile, slice, to);
      });
    }
    for (int64_t g = first_group; g < groups; ++g) {
      if (fused) {
        loops().start_group(g);
        load_bias<T>(span, tiling.buffers, g, memory + tiling.bias_at);
        // The parameters of a network do not stay in the cache from one inference to the next.
        if (g + 1 < groups && span.span_stride[1] == 1)
          prefetch_runs(span_row<T>(span, tiling.buffers, (g + 1) * p.taps()), p.taps(), span.span_stride[0],
                        span.reduced);
      }
      int64_t packed = 0;
      for_each_tile([&](const Tile& tile, int64_t index) {
        // A tile's rows of X are packed just before it reads them.
        const int64_t needed = max(packed, rows_read(tile));
        for (int64_t block = 0; block < tiling.blocks && needed > packed; ++block)
          loops().pack_input(g, block, packed, needed);
        packed = needed;
        if (fused)
          loops().compute_weights(tile, reduced + index * tiling.tile_floats);
        else
          loops().load_weights(tile, g);
        for (int64_t block = 0; block < tiling.blocks; ++block) loops().apply_tile(tile, g, block);
      });
    }
  }

 private:
  Loops& loops() { return static_cast<Loops&>(*this); }
  const Loops& loops() const { return static_cast<const Loops&>(*this); }
};

template <class Loops>
void run_strip_task(const ChannelsTiling& tiling, bool reduce, int64_t task, void* scratch) {
  const int64_t units = reduce ? tiling.tiles * tiling.slices : tiling.chunks;
  Loops run(tiling, task / units, reduce ? 0 : task % units, scratch);
  if (reduce)
    run.reduce_shared(task % units / tiling.slices, task % tiling.slices);
  else
    run.forward();
}

}  // namespace
}  // namespace pyinvolution::cpu
