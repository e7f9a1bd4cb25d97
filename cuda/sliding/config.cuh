// The tiles of `sliding`, which are chosen for each problem, and its kernel parameters.
#pragma once

#include <algorithm>
#include <numeric>

#include "../launch.cuh"

namespace pyinvolution::cuda::sliding {

// A thread has this many pixels of a row, and slides over as many taps between two loads of weights.
constexpr int run_pixels = 4;
constexpr int max_threads = 256;
constexpr int max_classes = 4;  // of the pixels of X in one direction, in the gradient of a strided involution

// With more shared memory, fewer than four blocks would run on a multiprocessor; the second is what a block can have on
// every GPU since compute capability 8.0.
constexpr int wanted_shared_bytes = 56 * 1024, max_shared_bytes = 99 * 1024;

// Division of a number below 2^31 by one that is known at the launch, without dividing.
struct Divisor {
  unsigned divisor, factor, shift;

  __device__ __forceinline__ int operator()(int number) const {
    return int(uint64_t(unsigned(number)) * factor >> shift);
  }
};
struct Division {
  int quotient, remainder;
};
__device__ __forceinline__ Division divide(int number, const Divisor& by) {
  const int quotient = by(number);
  return {quotient, number - quotient * int(by.divisor)};
}
inline Divisor divisor(int64_t number) {
  unsigned shift = 0;
  while (int64_t{1} << shift < number) ++shift;
  return {unsigned(number), unsigned(((uint64_t{1} << (31 + shift)) + uint64_t(number) - 1) / uint64_t(number)),
          31 + shift};
}

// The sum over taps along one axis: pixel i of the tiled image meets tap t at pixel i*stride - padding + t*dilation of
// the image that has a halo. Pixel i is pixel first + i*every of the tensor, and tap t is tap first_tap + t*tap_step.
struct Axis {
  int pixels, first, every;
  int taps, stride, padding, dilation;
  int first_tap, tap_step;
};

// The axis of the forward pass, and that of the pixels of X with one remainder q mod stride. Such a pixel gets something
// from every (stride / gcd)th tap only, and the next such pixel gets it from the next pixel of Y. So it is a sum with
// stride 1, whose taps are reversed so that positions increase with the tap.
inline Axis forward_axis(int64_t pixels, int64_t taps, int64_t stride, int64_t padding, int64_t dilation) {
  return {int(pixels), 0, 1, int(taps), int(stride), int(padding), int(dilation), 0, 1};
}
inline Axis gradient_axis(int64_t remainder, int64_t pixels, int64_t taps, int64_t stride, int64_t padding,
                          int64_t dilation) {
  const int64_t common = std::gcd(stride, dilation), step = stride / common;
  int64_t tap = 0;
  while (tap < step && (remainder + padding - dilation * tap) % stride != 0) ++tap;
  const int64_t count = tap < step && tap < taps ? (taps - tap + step - 1) / step : 0;
  const int64_t last = tap + (count - 1) * step;
  return {int(remainder < pixels ? (pixels - remainder + stride - 1) / stride : 0),
          int(remainder),
          int(stride),
          int(count),
          1,
          count > 0 ? int((dilation * last - remainder - padding) / stride) : 0,
          int(dilation / common),
          int(count > 0 ? last : 0),
          int(-step)};
}

inline bool taps_are_inner(const Problem& p) {
  return p.w_stride[3] == 1 && p.w_stride[2] == p.kernel_w && p.w_stride[5] != 1 && p.taps() > 1;
}

// How a problem is cut into blocks. A unit is a group of an image; its channels come in chunks of `vectors` vectors of
// `vector` channels, and a plane is a chunk of a unit.
struct Plan {
  bool fits = false;
  int vector, vectors;
  int64_t image_units, images;  // small images count as one, so that a block can have units of several
  int64_t chunks;
  int units, unit_chunks, planes;  // of a block
  int rows, runs, columns;         // of its tile
  int64_t tiles_h, tiles_w;
  int classes_h, classes_w;
  // The pixels of a run are `spacing` apart, and `step` positions of the image. Taps fall into phases, in each of which
  // the next tap meets the next pixel's position.
  int spacing, step;
  bool slides;
  // Positions of the image in shared memory, in vectors. After each `every` one is left out, so that neighbouring runs
  // are in different banks.
  int x_rows, x_columns, every, pitch, plane;
  int w_columns, w_rows, w_bytes, w_pitch, w_row_pitch;  // of weights with inner taps; kernel rows at a time, bytes
  int threads, shared_bytes;

  int64_t blocks() const {
    const auto parts = [](int64_t all, int64_t of) { return (all + of - 1) / of; };
    return images * parts(image_units, units) * parts(chunks, unit_chunks) * tiles_h * tiles_w * classes_h * classes_w;
  }
};

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `parts` nearly equal parts of at most `most`: the size of one.
inline int64_t even_part(int64_t all, int64_t most) { return ceil_div(all, ceil_div(all, std::max<int64_t>(1, most))); }

// Bytes that hold so many bytes at any offset from a multiple of 16.
inline int with_offset(int bytes, int element) { return (bytes + 16 - element + 15) / 16 * 16; }

template <class Accept>
Plan search(const Problem& p, Pass pass, int vector, int vectors, int element, const Accept& accept) {
  const bool to_input = pass == Pass::grad_input;
  const int64_t sums = p.dtype == DType::f64 ? 8 : 4;
  Plan plan;
  plan.vector = vector, plan.vectors = vectors;
  plan.chunks = ceil_div(p.group_channels(), vector * vectors);
  plan.classes_h = to_input ? int(p.stride_h) : 1, plan.classes_w = to_input ? int(p.stride_w) : 1;
  const int64_t stride_h = to_input ? 1 : p.stride_h, stride_w = to_input ? 1 : p.stride_w;
  const int64_t dilation_h = to_input ? p.dilation_h / std::gcd(p.stride_h, p.dilation_h) : p.dilation_h;
  const int64_t dilation_w = to_input ? p.dilation_w / std::gcd(p.stride_w, p.dilation_w) : p.dilation_w;
  const int64_t taps_h = to_input ? ceil_div(p.kernel_h, p.stride_h / std::gcd(p.stride_h, p.dilation_h)) : p.kernel_h;
  const int64_t taps_w = to_input ? ceil_div(p.kernel_w, p.stride_w / std::gcd(p.stride_w, p.dilation_w)) : p.kernel_w;
  const int64_t height = ceil_div(to_input ? p.in_h : p.out_h, plan.classes_h);
  const int64_t width = ceil_div(to_input ? p.in_w : p.out_w, plan.classes_w);

  const int64_t common = std::lcm(stride_w, dilation_w);
  const int64_t spacing = common / stride_w, phases = common / dilation_w;
  plan.slides = (spacing == 1 || phases == 1) && spacing <= 8 && phases < taps_w;
  plan.spacing = plan.slides ? int(spacing) : 1;
  plan.step = plan.spacing * int(stride_w);
  plan.every = plan.slides ? run_pixels * plan.step : 1 << 30;

  const int64_t span = int64_t{run_pixels} * plan.spacing;
  const bool taps_inner = taps_are_inner(p);
  for (int64_t most_spans = std::max<int64_t>(1, 32 / span);; most_spans /= 2) {
    const int64_t spans = even_part(ceil_div(width, span), most_spans);
    plan.runs = int(spans * plan.spacing), plan.columns = int(spans * span);
    plan.tiles_w = ceil_div(width, plan.columns);
    const int64_t x_columns = (plan.columns - 1) * stride_w + (taps_w - 1) * dilation_w + 1;
    const int64_t natural = x_columns + (x_columns - 1) / plan.every;
    // Runs of the next row go on in the banks where those of the row before end, where that is possible.
    const int64_t banks = 128 / (vector * sums), run_banks = spans * (plan.slides ? plan.every + 1 : span * stride_w);
    int64_t pitch = natural;
    while (pitch < natural + banks && (pitch * stride_h - run_banks) % banks != 0) ++pitch;
    if (pitch == natural + banks) pitch = natural | 1;
    if (x_columns < (1 << 20)) {
      for (int64_t most_rows = std::max(1, max_threads / 2 / plan.runs);; most_rows /= 2) {
        const int64_t rows = even_part(height, most_rows), x_rows = (rows - 1) * stride_h + (taps_h - 1) * dilation_h + 1;
        plan.rows = int(rows), plan.tiles_h = ceil_div(height, rows);
        plan.x_rows = int(std::min<int64_t>(x_rows, 1 << 20)), plan.x_columns = int(x_columns), plan.pitch = int(pitch);
        // Whole images can share a block with others.
        const bool whole = plan.tiles_h * plan.tiles_w == 1;
        plan.images = whole ? 1 : p.batch, plan.image_units = whole ? p.batch * p.groups : p.groups;
        for (int64_t most_planes = std::max<int64_t>(1, max_threads / (rows * plan.runs));; most_planes /= 2) {
          plan.unit_chunks = int(even_part(plan.chunks, std::min(plan.chunks, most_planes)));
          plan.units = plan.unit_chunks == plan.chunks
                           ? int(std::clamp<int64_t>(most_planes / plan.chunks, 1, plan.image_units))
                           : 1;
          plan.planes = plan.units * plan.unit_chunks;
          plan.threads = int(ceil_div(rows * plan.runs * plan.planes, 32) * 32);
          const int64_t plane = int64_t{plan.x_rows} * pitch, x_bytes = plane * plan.planes * vectors * vector * sums;
          int64_t w_bytes = 0;
          plan.w_rows = 0, plan.w_columns = plan.w_pitch = plan.w_row_pitch = 0;
          if (taps_inner) {
            const int64_t halo = to_input ? (taps_w - 1) * dilation_w : 0;
            plan.w_columns = int(plan.columns + halo);
            const auto bytes = [&](int64_t kernel_rows) {
              plan.w_pitch = with_offset(int(kernel_rows * p.kernel_w * element), element);
              plan.w_row_pitch = plan.w_columns * plan.w_pitch + int(ceil_div(plan.w_columns, run_pixels)) * 16;
              return int64_t{plan.units} * rows * plan.w_row_pitch;
            };
            plan.w_rows = to_input ? 1 : int(std::min<int64_t>(p.kernel_h, 64));
            while (plan.w_rows > 1 && bytes(plan.w_rows) > wanted_shared_bytes / 2)
              plan.w_rows = int(even_part(p.kernel_h, (plan.w_rows + 1) / 2));
            w_bytes = bytes(plan.w_rows);
          }
          plan.w_bytes = int(std::min<int64_t>(w_bytes, 1 << 30));
          const int64_t shared = ceil_div(x_bytes, 16) * 16 + w_bytes;
          if (shared <= max_shared_bytes) {
            plan.plane = int(plane), plan.shared_bytes = int(shared);
            if (accept(plan)) {
              plan.fits = true;
              return plan;
            }
          }
          if (most_planes == 1) break;
        }
        if (most_rows == 1) break;
      }
    }
    if (most_spans == 1) break;
  }
  return plan;
}

inline Plan plan_of(const Problem& p, Pass pass) {
  const int element = p.dtype == DType::f64 ? 8 : p.dtype == DType::f32 ? 4 : 2;
  const int64_t channels = p.group_channels();
  const int vector = channels <= 2 ? int(channels) : 4, vectors = channels > 4 && p.dtype != DType::f64 ? 2 : 1;
  Plan plan;
  for (const int limit : {wanted_shared_bytes, max_shared_bytes}) {
    for (int each = vectors; each >= 1 && !plan.fits; --each)
      plan = search(p, pass, vector, each, element, [&](const Plan& found) { return found.shared_bytes <= limit; });
  }
  return plan;
}

// How the channels and pixels of an image lie in memory, in elements.
struct View {
  int64_t n;
  int c, h, w;
  bool vectors;  // a vector of channels can be moved at once
};

// The same for weights.
struct WeightView {
  int64_t n;
  int g, kh, kw, h, w;
  int64_t count;  // elements from the first to the last, with what is between them
  bool vectors;   // the pixels of a run can be read at once
};

struct KernelParams {
  int group_channels;
  int x_height, x_width;  // of the image that has a halo
  int w_height, w_width;  // of the weights' pixels
  Axis h[max_classes], w_axis[max_classes];
  int image_units, chunks, units, unit_chunks, planes;
  int rows, runs, columns;
  int spacing, step;
  bool slides, store_vectors;
  int x_rows, x_columns, every, pitch, plane;
  int w_columns, w_rows, w_pitch, w_row_pitch, w_pieces;
  int load_lanes, load_others;  // threads along vectors of channels, and along positions; which are neighbours:
  bool channels_inner;
  Divisor by_classes_w, by_classes, by_chunk_blocks, by_unit_blocks, by_tiles_w, by_tiles_h;
  Divisor by_groups, by_runs, by_rows, by_unit_chunks, by_spacing, by_load, by_x_columns, by_every;
  Divisor by_w_pieces, by_w_columns, by_w_rows;
  View x, y;
  WeightView w;
};

// Launches the kernels for one dtype; instances/ has one file for each, so that they compile at the same time.
template <DType dtype>
void run(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda::sliding
