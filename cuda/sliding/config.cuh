// The tiles of `sliding`, which are chosen for each problem, and its kernel parameters.
#pragma once

#include <algorithm>
#include <numeric>

#include "../division.cuh"
#include "../launch.cuh"

namespace pyinvolution::cuda::sliding {

// A thread has this many pixels of a row, and slides over as many taps between two loads of weights.
constexpr int run_pixels = 4;
constexpr int max_threads = 256;
constexpr int max_columns = 32;  // of a tile
// On a multiprocessor; vectors of 4 doubles need more registers than two blocks leave them.
template <class T, int V>
constexpr int least_blocks = sizeof(T) * V > 16 ? 1 : 2;
constexpr int max_classes = 4;  // of the pixels of X in one direction, in the gradient of a strided involution

// With more shared memory, fewer than three blocks would run on a multiprocessor; the second is what a block can have on
// every GPU since compute capability 8.0.
constexpr int wanted_shared_bytes = 72 * 1024, max_shared_bytes = 99 * 1024;

// With fewer products for each pixel and group, in small images or with dense taps, `generic` is faster by counting.
constexpr int64_t least_products = 24, small_image = 1024;

struct Parts {
  int quotient, remainder;
};
__device__ __forceinline__ Parts divide(int number, const Division& by) {
  uint32_t quotient = uint32_t(number);
  const int remainder = by.split(quotient);
  return {int(quotient), remainder};
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

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

inline bool taps_are_inner(const Problem& p) {
  return p.w_stride[3] == 1 && p.w_stride[2] == p.kernel_w && p.w_stride[5] != 1 && p.taps() > 1;
}

// Whether the pixels with one remainder by the dilation are an image of their own, a class, in which the dilation is 1. They
// can be where the stride is 1: a window has pixels of one class only. Then its pixels are neighbours, and the halo of a tile
// is that of a kernel without dilation. But the columns of a class are not dense, and each reads the sectors of all. So where
// columns are dense, there are classes only if the halo of a dilated kernel is as wide as the widest tile.
inline bool in_classes(const Problem& p) {
  const bool strided = p.stride_h > 1 || p.stride_w > 1, dilated = p.dilation_h > 1 || p.dilation_w > 1;
  const bool far = p.dilation_h * (p.kernel_h - 1) >= max_columns || p.dilation_w * (p.kernel_w - 1) >= max_columns;
  return p.border == Border::shift || (dilated && !strided && (far || taps_are_inner(p)));
}

// How the classes of the image that has a halo follow those of the tiled image: tiled class c has windows in the class
// c - first, or c - first + dilation if c < first. In the latter, windows begin one pixel earlier.
inline int64_t first_class(Pass pass, int64_t padding, int64_t dilation) {
  const int64_t rest = padding % dilation;
  return pass == Pass::grad_input && rest > 0 ? dilation - rest : rest;
}

// The first class as a problem, which has the most pixels; a problem that is not in classes is itself. The tensors of the
// other classes begin later. Its padding is that of the classes whose windows do not begin earlier.
//
// Where the border is shifted, a window that is moved inside by s taps reads the same pixels as the one that is not, where
// the image repeats with period K beyond its borders: pixel i < 0 is pixel i + K, and pixel i >= L is pixel i - K. Its tap t
// is then tap (t + s) mod K of the moved one. So windows slide as with a border of zeros: X is brought in repeated, and taps
// change their places.
inline Problem class_of(const Problem& p, Pass pass) {
  Problem one = p;
  if (!in_classes(p)) return one;
  for (int64_t* size : {&one.in_h, &one.out_h}) *size = ceil_div(*size, p.dilation_h);
  for (int64_t* size : {&one.in_w, &one.out_w}) *size = ceil_div(*size, p.dilation_w);
  for (int64_t* stride : {&one.x_stride[2], &one.w_stride[4], &one.y_stride[2]}) *stride *= p.dilation_h;
  for (int64_t* stride : {&one.x_stride[3], &one.w_stride[5], &one.y_stride[3]}) *stride *= p.dilation_w;
  one.dilation_h = one.dilation_w = 1;
  if (p.border == Border::shift) {
    one.padding_h = p.kernel_h / 2, one.padding_w = p.kernel_w / 2;
  } else {
    const int64_t up_h = pass == Pass::grad_input ? p.dilation_h - 1 : 0;
    const int64_t up_w = pass == Pass::grad_input ? p.dilation_w - 1 : 0;
    one.padding_h = (p.padding_h + up_h) / p.dilation_h, one.padding_w = (p.padding_w + up_w) / p.dilation_w;
  }
  return one;
}

// The gradient of the input with a shifted border: a pixel gets something from those that are less than K away, each by
// another tap.
inline Axis shifted_gradient_axis(int64_t pixels, int64_t taps) {
  return forward_axis(pixels, 2 * taps - 1, 1, taps - 1, 1);
}

// `all` in nearly equal parts of at most `most`: the size of the first.
inline int64_t even_part(int64_t all, int64_t most) { return ceil_div(all, ceil_div(all, std::max<int64_t>(1, most))); }

// What a pass sums up, along both axes: for the gradient of the input, over one remainder of its pixels.
struct Sum {
  int64_t height, width, taps_h, taps_w, stride_h, stride_w, dilation_h, dilation_w;
};
inline Sum sum_of(const Problem& p, Pass pass) {
  if (p.border == Border::shift && pass == Pass::grad_input)
    return {p.in_h, p.in_w, 2 * p.kernel_h - 1, 2 * p.kernel_w - 1, 1, 1, 1, 1};
  if (pass != Pass::grad_input)
    return {p.out_h, p.out_w, p.kernel_h, p.kernel_w, p.stride_h, p.stride_w, p.dilation_h, p.dilation_w};
  const int64_t common_h = std::gcd(p.stride_h, p.dilation_h), common_w = std::gcd(p.stride_w, p.dilation_w);
  return {ceil_div(p.in_h, p.stride_h),
          ceil_div(p.in_w, p.stride_w),
          ceil_div(p.kernel_h, p.stride_h / common_h),
          ceil_div(p.kernel_w, p.stride_w / common_w),
          1,
          1,
          p.dilation_h / common_h,
          p.dilation_w / common_w};
}

// Whether weights come through shared memory: where their taps are dense, many threads need them, a run of them cannot
// be read at once, or the pixels of a run differ in the order of their taps.
inline bool is_staged(const Problem& p, Pass pass) {
  const bool parts = pass == Pass::forward && p.out_w % run_pixels != 0;
  return p.border == Border::shift || taps_are_inner(p) || p.group_channels() > (parts ? 8 : 16);
}

// How a problem is cut into blocks. A unit is a group of an image; its channels come in chunks of `vectors` vectors of
// `vector` channels, and a plane is a chunk of a unit.
struct Plan {
  int vector, vectors;
  int64_t image_units, images;  // small images count as one, so that a block can have units of several
  int64_t chunks;
  int units, unit_chunks, planes;  // of a block
  int rows, runs, columns;         // of its tile
  int64_t tiles_h, tiles_w;
  int classes_h, classes_w;
  // The pixels of a run are `spacing` apart, and `step` positions of the image. The taps of a kernel row fall into
  // phases, in each of which the next tap meets the next pixel's position.
  int spacing, step, phases;
  bool slides;
  // Positions of the image in shared memory, in vectors. After each `every` one is left out, so that neighbouring runs
  // are in different banks.
  int x_rows, x_columns, every, pitch, plane;
  // Weights in shared memory: pixels of a row, kernel rows at a time, elements from a tap to the next and
  // from a row to the next, bytes before them.
  int w_columns, w_rows, w_pitch, w_row_pitch, w_offset;
  // The gradient of the weights. A slot is a part of the taps of a phase.
  int y_every, y_pitch, slots, row_slots, stages;
  int threads;
  int64_t shared_bytes;

  int64_t blocks() const {
    return images * ceil_div(image_units, units) * ceil_div(chunks, unit_chunks) * tiles_h * tiles_w * classes_h *
           classes_w;
  }

  void set_columns(const Sum& sum, int64_t most_spans, int bytes) {
    const int64_t span = int64_t{run_pixels} * spacing, spans = even_part(ceil_div(sum.width, span), most_spans);
    runs = int(spans * spacing), columns = int(spans * span);
    tiles_w = ceil_div(sum.width, columns);
    x_columns = int((columns - 1) * sum.stride_w + (sum.taps_w - 1) * sum.dilation_w + 1);
    // Runs of the next row go on in the banks where those of the row before end, where that is possible.
    const int natural = x_columns + (x_columns - 1) / every, banks = 128 / bytes;
    const int64_t run_banks = spans * (slides ? every + 1 : span * sum.stride_w);
    for (pitch = natural; pitch < natural + banks; ++pitch)
      if ((pitch * sum.stride_h - run_banks) % banks == 0) break;
    if (pitch == natural + banks) pitch = natural | 1;
    y_every = int(span), y_pitch = columns + int(spans);
  }
  void set_rows(const Sum& sum, int64_t most_rows) {
    rows = int(even_part(sum.height, most_rows));
    tiles_h = ceil_div(sum.height, rows);
    x_rows = int((rows - 1) * sum.stride_h + (sum.taps_h - 1) * sum.dilation_h + 1);
    plane = x_rows * pitch;
  }
  void set_units(const Problem& p) {
    // Whole images can share a block with others.
    const bool whole = tiles_h * tiles_w == 1;
    images = whole ? 1 : p.batch, image_units = whole ? p.batch * p.groups : p.groups;
  }
  bool fits(int64_t limit) const { return shared_bytes <= limit; }
};

// Calls `body` with `most` and its halves until it returns true, down to 1.
template <class Body>
bool halving(int64_t most, const Body& body) {
  for (int64_t i = std::max<int64_t>(1, most); i >= 1; i /= 2)
    if (body(i)) return true;
  return false;
}

inline Plan start_plan(const Problem& p, Pass pass, const Sum& sum, int vector, int vectors) {
  Plan plan{};
  plan.vector = vector, plan.vectors = vectors;
  plan.chunks = ceil_div(p.group_channels(), vector * vectors);
  plan.classes_h = pass == Pass::grad_input ? int(p.stride_h) : 1;
  plan.classes_w = pass == Pass::grad_input ? int(p.stride_w) : 1;
  if (in_classes(p)) {
    const bool to_input = pass == Pass::grad_input;
    plan.classes_h = int(std::min(p.dilation_h, to_input ? p.in_h : p.out_h));
    plan.classes_w = int(std::min(p.dilation_w, to_input ? p.in_w : p.out_w));
  }
  const int64_t common = std::lcm(sum.stride_w, sum.dilation_w);
  const int64_t spacing = common / sum.stride_w, phases = common / sum.dilation_w;
  plan.slides = (spacing == 1 || phases == 1) && spacing <= 8 && phases < sum.taps_w;
  plan.spacing = plan.slides ? int(spacing) : 1;
  plan.phases = int(plan.slides ? phases : sum.taps_w);
  plan.step = plan.spacing * int(sum.stride_w);
  plan.every = plan.slides ? run_pixels * plan.step : 1 << 30;
  return plan;
}

inline int element_bytes(DType dtype) { return dtype == DType::f64 ? 8 : dtype == DType::f32 ? 4 : 2; }
inline int sum_bytes(DType dtype) { return dtype == DType::f64 ? 8 : 4; }

// The shared memory of `apply`, and how many kernel rows of weights are there. Returns whether these are enough, for a
// `choosy` caller.
inline bool set_memory(Plan& plan, const Problem& p, Pass pass, const Sum& sum, int64_t limit, bool choosy) {
  const int element = element_bytes(p.dtype), bytes = plan.vector * sum_bytes(p.dtype);
  // A window may be read one block of positions beyond the last one.
  const int64_t beyond = plan.slides ? plan.every + 1 + run_pixels * plan.step : 0;
  const int64_t x_bytes = (int64_t{plan.plane} * plan.planes * plan.vectors + beyond) * bytes;
  plan.w_offset = int(ceil_div(x_bytes, 16) * 16), plan.shared_bytes = plan.w_offset;
  if (!is_staged(p, pass)) return true;
  plan.w_columns = plan.columns + (pass == Pass::grad_input ? int((sum.taps_w - 1) * sum.dilation_w) : 0);
  if (p.border == Border::shift) plan.w_columns = std::min(plan.w_columns, int(p.out_w));
  plan.w_pitch = plan.columns % 8 == 0 ? plan.columns + 4 : plan.columns;
  for (int64_t stages = pass == Pass::grad_input ? p.kernel_h : 1; stages <= p.kernel_h; ++stages) {
    plan.w_rows = int(ceil_div(p.kernel_h, stages));
    plan.w_row_pitch = int(plan.w_rows * std::max(p.kernel_w, sum.taps_w) * plan.w_pitch);
    plan.shared_bytes = plan.w_offset + int64_t{plan.units} * plan.rows * plan.w_row_pitch * element;
    if (plan.fits(limit)) break;
  }
  // In short pieces, addresses cost more than what is copied.
  const int64_t piece = plan.w_rows * p.kernel_w * element;
  return !choosy || !taps_are_inner(p) || pass == Pass::grad_input || plan.w_rows == p.kernel_h ||
         piece * plan.unit_chunks >= 96;
}

inline bool plan_apply(Plan& plan, const Problem& p, Pass pass, const Sum& sum, int64_t limit, bool choosy) {
  return halving(max_columns / (run_pixels * plan.spacing), [&](int64_t most_spans) {
    plan.set_columns(sum, most_spans, plan.vector * sum_bytes(p.dtype));
    return halving(max_threads / 2 / plan.runs, [&](int64_t most_rows) {
      plan.set_rows(sum, most_rows);
      plan.set_units(p);
      return halving(max_threads / (plan.rows * plan.runs), [&](int64_t most_planes) {
        plan.unit_chunks = int(even_part(plan.chunks, most_planes));
        plan.units = plan.unit_chunks == plan.chunks
                         ? int(std::clamp<int64_t>(most_planes / plan.chunks, 1, plan.image_units))
                         : 1;
        plan.planes = plan.units * plan.unit_chunks;
        plan.threads = int(ceil_div(plan.rows * plan.runs * plan.planes, 32) * 32);
        return set_memory(plan, p, pass, sum, limit, choosy) && plan.fits(limit);
      });
    });
  });
}

// The number of taps of a slot: fewer for small kernels.
inline int slot_taps(const Plan& plan, const Problem& p) { return ceil_div(p.kernel_w, plan.phases) <= 4 ? 4 : 8; }

// In the gradient of the weights, a chunk is the vectors that are in shared memory at a time, and `w_rows` kernel rows
// have slots at a time.
inline bool plan_grad_weight(Plan& plan, const Problem& p, const Sum& sum, int64_t limit, int64_t min_pixels) {
  const int64_t vectors = plan.chunks, bytes = plan.vector * sum_bytes(p.dtype);
  const bool taps_inner = taps_are_inner(p);
  plan.chunks = plan.unit_chunks = 1;
  plan.row_slots = int(plan.phases * ceil_div(ceil_div(p.kernel_w, plan.phases), slot_taps(plan, p)));
  return halving(vectors, [&](int64_t most_vectors) {
    plan.vectors = int(even_part(vectors, most_vectors)), plan.stages = int(ceil_div(vectors, plan.vectors));
    // X comes once for the kernel rows that have slots at a time, unless it stays for all.
    return halving(plan.stages > 1 || taps_inner ? p.kernel_h : 1, [&](int64_t most_kernel_rows) {
      plan.w_rows = int(even_part(p.kernel_h, most_kernel_rows)), plan.slots = plan.w_rows * plan.row_slots;
      const int64_t most_runs = max_threads / plan.slots;
      if (most_runs < plan.spacing) return false;
      return halving(std::min<int64_t>(max_columns, most_runs * run_pixels) / (run_pixels * plan.spacing),
                     [&](int64_t most_spans) {
                       plan.set_columns(sum, most_spans, int(bytes));
                       return halving(most_runs / plan.runs, [&](int64_t most_rows) {
                         plan.set_rows(sum, most_rows);
                         plan.set_units(p);
                         if (plan.rows * plan.columns < std::min(min_pixels, sum.height * sum.width)) return false;
                         plan.w_pitch = int(plan.w_rows * p.kernel_w) | 1;
                         plan.w_row_pitch = plan.columns * plan.w_pitch + plan.columns / run_pixels;
                         return halving(most_runs / plan.runs / plan.rows, [&](int64_t most_units) {
                           plan.units = plan.planes = int(std::min(most_units, plan.image_units));
                           plan.threads = int(ceil_div(plan.rows * plan.runs * plan.slots * plan.units, 32) * 32);
                           const int64_t unit = (plan.plane + plan.rows * plan.y_pitch) * plan.vectors * bytes;
                           plan.shared_bytes =
                               plan.units *
                               (unit + (taps_inner ? plan.rows * plan.w_row_pitch * sum_bytes(p.dtype) : 0));
                           return plan.fits(limit);
                         });
                       });
                     });
    });
  });
}

// The first plan that fits, of those with much and with little shared memory; else one without threads.
inline Plan plan_of(const Problem& problem, Pass pass) {
  const Problem p = class_of(problem, pass);
  const int64_t channels = p.group_channels();
  const bool two = channels > 4 && pass == Pass::forward && p.dtype != DType::f64;
  // A shifted border has kernels for vectors of 4 only.
  const int vector = channels <= 2 && p.border == Border::zeros ? int(channels) : 4, vectors = two ? 2 : 1;
  const Sum sum = sum_of(p, pass);
  // So that sizes fit in 32 bits below.
  if ((double(sum.taps_h * sum.dilation_h) + 256.0 * double(sum.stride_h)) *
          (double(sum.taps_w * sum.dilation_w) + 32.0 * double(sum.stride_w)) >
      64.0 * max_shared_bytes)
    return {};
  // Wide groups get more channels, which share weights, in a block instead of more blocks.
  const bool wide = channels > 32 && pass != Pass::grad_weight;
  for (const int limit : {wide ? max_shared_bytes : wanted_shared_bytes, max_shared_bytes}) {
    if (pass == Pass::grad_weight) {
      for (const int64_t min_pixels : {96, 32, 1}) {
        Plan plan = start_plan(problem, pass, sum, vector, 1);
        if (plan_grad_weight(plan, p, sum, limit, min_pixels)) return plan;
      }
      continue;
    }
    for (const bool choosy : {true, false}) {
      for (int each = vectors; each >= 1; --each) {
        Plan plan = start_plan(problem, pass, sum, vector, each);
        if (plan_apply(plan, p, pass, sum, limit, choosy)) return plan;
      }
    }
  }
  return {};
}

// How the channels and pixels of an image lie in memory, in elements.
struct View {
  int64_t n;
  int c, h, w;
  bool vectors;  // a vector of channels can be moved at once
};

// A part of an image in shared memory, [vector of channels][row][position], and how many threads bring it along
// vectors, rows and columns. Neighbours are along what is consecutive in memory.
struct Area {
  int rows, columns, pitch, plane;
  int height, width;  // of the image
  int lanes, row_lanes, column_lanes;
  bool channels_inner;
  Division by_load, by_column_lanes, by_every;
};

// The same for weights.
struct WeightView {
  int64_t n;
  int g, kh, kw, h, w;
  int64_t count;        // elements from the first to the last, with what is between them
  bool vectors, dense;  // the pixels of a run can be read at once; are neighbours
};

// The classes along an axis (in_classes, first_class): how many pixels they have less than the first one of the tiled image
// and of the one that has a halo, for those from number `whole` and `halo_whole` on; and the distances in memory from a class
// to the next, of the image that has a halo, the weights and the image that is tiled.
struct Classes {
  int first, dilation;
  int whole, halo_whole;
  int halo, weights, tiled;
};

struct KernelParams {
  int group_channels;
  int w_height, w_width, kernel_h, kernel_w;
  Axis h[max_classes], w_axis[max_classes];
  int image_units, units, unit_vectors, unit_chunks, planes;
  int rows, columns;
  int spacing, step, phases, every, y_every;
  bool slides, store_vectors, taps_inner, plain, in_classes;
  int w_offset, w_columns, w_rows, w_pitch, w_row_pitch, w_lane_bits;  // w_offset in bytes
  int slots, stages, vectors;                                          // of the gradient of the weights
  Division by_classes_w, by_classes, by_chunk_blocks, by_unit_blocks, by_tiles_w, by_tiles_h;
  Division by_groups, by_runs, by_rows, by_unit_chunks, by_unit_vectors, by_spacing;
  Division by_columns, by_w_columns, by_span, by_tap_step, by_slots, by_row_slots, by_phases;
  Area x_area, y_area;
  View x, y;
  WeightView w;
  Classes classes_h, classes_w;
  Division by_kernel_w;
};

// Launches the kernels for one dtype; instances/ has one file for each, so that they compile at the same time.
template <DType dtype>
void run(const Problem&, Pass, const Buffers&, const Execution&);

}  // namespace pyinvolution::cuda::sliding
