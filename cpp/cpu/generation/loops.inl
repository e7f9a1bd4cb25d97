// The inner loops of kernel generation in a training step; see tiling.h. Compiled for each instruction set by
// instances/kernels.inl.
#include <cstdint>
#include <cstring>

#include "cpu/arithmetic.h"
#include "cpu/generation/tiling.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/gemm.h"

namespace pyinvolution::cpu {
namespace {

// Calls body(at, whole, count) for the vectors of a run of elements.
template <class Body>
void for_vectors(int64_t elements, const Body& body) {
  int64_t i = 0;
  for (; i + Floats::lanes <= elements; i += Floats::lanes) body(i, std::true_type{}, Floats::lanes);
  if (i < elements) body(i, std::false_type{}, elements - i);
}

// The cells of neighbouring output pixels. (Their places are counted: divisions would take longer than the sums.)
class Cells {
 public:
  Cells(const GenerationTiling& tiling, int64_t pixel)
      : t(tiling),
        column(pixel % t.out_w),
        row(pixel / t.out_w % t.out_h),
        first(pixel / (t.out_w * t.out_h) * t.in_h * t.in_w) {}

  int64_t rows() const { return min(t.stride_h, t.in_h - row * t.stride_h); }
  int64_t columns() const { return min(t.stride_w, t.in_w - column * t.stride_w); }
  float share() const { return 1.0f / float(rows() * columns()); }

  // Calls body(index of the pixel in x) for the pixels of a cell.
  template <class Body>
  void for_each(const Body& body) const {
    int64_t at = first + row * t.stride_h * t.in_w + column * t.stride_w;
    for (int64_t i = rows(), width = columns(); i > 0; --i, at += t.in_w)
      for (int64_t j = 0; j < width; ++j) body(at + j);
  }

  void next() {
    if (++column < t.out_w) return;
    column = 0;
    if (++row < t.out_h) return;
    row = 0;
    first += t.in_h * t.in_w;
  }

 private:
  const GenerationTiling& t;
  int64_t column, row, first;
};

inline bool has_cells(const GenerationTiling& t) { return t.stride_h != 1 || t.stride_w != 1; }

// The means of `pixels` cells from `first` on, [pixels][channel_columns], in `to` or where they are.
template <class T>
const float* means_of_cells(const GenerationTiling& t, int64_t first, int64_t pixels, float* to) {
  const T* x = static_cast<const T*>(t.x);
  if constexpr (is_float<T>)
    if (!has_cells(t) && t.channels == t.channel_columns) return x + first * t.channels;
  Cells cell(t, first);
  float* row = to;
  for (int64_t p = first; p < first + pixels; ++p, row += t.channel_columns, cell.next()) {
    const float share = has_cells(t) ? cell.share() : 1.0f;
    for_vectors(t.channels, [&](int64_t c, auto whole, int64_t count) {
      constexpr bool W = decltype(whole)::value;
      if (!has_cells(t)) return load_lanes<W>(x + p * t.channels + c, count).store(row + c);
      Floats sum = Floats::zero();
      cell.for_each([&](int64_t at) { sum.value += load_lanes<W>(x + at * t.channels + c, count).value; });
      Floats{share * sum.value}.store(row + c);
    });
  }
  return to;
}

template <class T>
void reduce_task(const GenerationTiling& t, int64_t begin, int64_t end, float* zeros) {
  float *cells = zeros + generation_pixels, *sums = cells + generation_pixels * t.channel_columns;
  T* z = static_cast<T*>(t.z) + begin * t.reduced;
  for (int64_t first = begin; first < end; first += generation_pixels) {
    const int64_t pixels = min(generation_pixels, end - first);
    const float* x = means_of_cells<T>(t, first, pixels, cells);
    multiply({x, t.channel_columns, 1}, pixels, {t.reduce_by_channel, Floats::lanes, t.reduced_columns},
             t.reduced_columns / Floats::lanes, t.channels, zeros, sums, t.reduced_columns);
    // Whole vectors into z: parts of them would take longer.
    for (int64_t p = 0; p < pixels; ++p) copy(sums + p * t.reduced_columns, t.reduced, cells + p * t.reduced);
    for_vectors(pixels * t.reduced, [&](int64_t i, auto whole, int64_t count) {
      constexpr bool W = decltype(whole)::value;
      store_lanes<W>(load_lanes<W>(cells + i, count), z + i, count);
    });
    z += pixels * t.reduced;
  }
}

template <class T>
void reduce_gradients_task(const GenerationTiling& t, int64_t task, int64_t begin, int64_t end, float* zeros) {
  float *cells = zeros + generation_pixels, *back = cells + generation_pixels * t.channel_columns;
  float* gz = back + generation_pixels * t.channel_columns;
  float* partial = t.partial + task * t.reduced * t.channel_columns;
  const int64_t vectors = t.channel_columns / Floats::lanes;
  clear(partial, t.reduced * vectors);
  T* gx = static_cast<T*>(t.gx);
  for (int64_t first = begin; first < end; first += generation_pixels) {
    const int64_t pixels = min(generation_pixels, end - first);
    const float* x = means_of_cells<T>(t, first, pixels, cells);
    for_vectors(pixels * t.reduced, [&](int64_t i, auto whole, int64_t count) {
      constexpr bool W = decltype(whole)::value;
      store_lanes<W>(load_lanes<W>(static_cast<const T*>(t.gz) + first * t.reduced + i, count), gz + i, count);
    });
    multiply({gz, 1, t.reduced}, t.reduced, {x, Floats::lanes, t.channel_columns}, vectors, pixels, nullptr, partial,
             t.channel_columns);
    multiply({gz, t.reduced, 1}, pixels, {t.reduce_rows, Floats::lanes, t.channel_columns}, vectors, t.reduced, zeros,
             back, t.channel_columns);
    Cells cell(t, first);
    for (int64_t p = 0; p < pixels; ++p, cell.next()) {
      const float* row = back + p * t.channel_columns;
      const auto add = [&](int64_t at, float share) {
        for_vectors(t.channels, [&](int64_t c, auto whole, int64_t count) {
          constexpr bool W = decltype(whole)::value;
          T* to = gx + at * t.channels + c;
          store_lanes<W>({load_lanes<W>(to, count).value + share * Floats::load(row + c).value}, to, count);
        });
      };
      if (has_cells(t))
        cell.for_each([&, share = cell.share()](int64_t at) { add(at, share); });
      else
        add(first + p, 1.0f);
    }
  }
}

// The sum of all lanes.
inline float lane_sum(const Floats& vector) {
#if VECTOR_BYTES == 64
  typedef float Half512 __attribute__((vector_size(32)));
  Half512 parts[2];
  std::memcpy(parts, &vector.value, sizeof parts);
  parts[0] += parts[1];
  Four fours[2];
  std::memcpy(fours, &parts[0], sizeof fours);
#else
  Four fours[2] = {};
  std::memcpy(fours, &vector.value, sizeof vector.value);
#endif
  const Four sum = fours[0] + fours[1];
  return (sum[0] + sum[2]) + (sum[1] + sum[3]);
}

// What the lengths of a tile's kernels are computed from, in a task's scratch memory.
struct LengthTile {
  float* factor;      // [G][tile], f
  float* derivative;  // [G][tile], -1/2 f^2, and 0 where the least length is taken
  float* along;       // [R + 1][tile], r'
  float* products;    // [R + 1][tile], M r' of one group
  float* weighted;    // [R + 1][tile], h r' of one group
  float* gradient;    // [R + 1][tile], of r'
  float* rows;        // [tile][R] and a vector, r; zeros past the last pixel
  // For `scale` only:
  float* by_pixel;  // [tile][G] and a vector, f
  float* terms;     // [lane][channel_columns], gy y of a vector of pixels
  float* across;    // [channel_columns][lane], the same

  LengthTile(const GenerationTiling& t, float* memory) {
    const int64_t extended = (t.reduced + 1) * generation_pixels;
    factor = memory, derivative = factor + t.groups * generation_pixels;
    along = derivative + t.groups * generation_pixels;
    products = along + extended, weighted = products + extended, gradient = weighted + extended;
    rows = gradient + extended;
    by_pixel = rows + generation_pixels * t.reduced + t.reduced_columns;
    terms = by_pixel + generation_pixels * t.groups + Floats::lanes;
    across = terms + Floats::lanes * t.channel_columns;
  }

  template <class T>
  void load(const GenerationTiling& t, int64_t first, int64_t pixels) const {
    const T* r = static_cast<const T*>(t.r) + first * t.reduced;
    for_vectors(pixels * t.reduced, [&](int64_t i, auto whole, int64_t count) {
      load_lanes<decltype(whole)::value>(r + i, count).store(rows + i);
    });
    for (int64_t i = pixels * t.reduced; i < generation_pixels * t.reduced; ++i) rows[i] = 0.0f;
    transpose(rows, t.reduced, generation_pixels, t.reduced, along, generation_pixels);
    for (int64_t p = 0; p < generation_pixels; p += Floats::lanes)
      broadcast(1.0f).store(along + t.reduced * generation_pixels + p);
  }

  // The last column of M is its last row, and belongs to the 1 in r'.
  void multiply_by_gram(const GenerationTiling& t, int64_t group) const {
    const int64_t extended = t.reduced + 1;
    const float* gram = t.gram + group * extended * extended;
    multiply({gram, extended, 1}, extended, {along, Floats::lanes, generation_pixels},
             generation_pixels / Floats::lanes, t.reduced, gram + t.reduced * extended, products, generation_pixels);
  }

  void find_factors(const GenerationTiling& t) const {
    const Floats least = broadcast(t.least), one = broadcast(1.0f), zero = Floats::zero();
    for (int64_t g = 0; g < t.groups; ++g) {
      multiply_by_gram(t, g);
      for (int64_t p = 0; p < generation_pixels; p += Floats::lanes) {
        Floats squares = zero;
        for (int64_t i = 0; i <= t.reduced; ++i)
          squares.add_product(Floats::load(products + i * generation_pixels + p),
                              Floats::load(along + i * generation_pixels + p));
        const Floats at_least{squares.value < least.value ? least.value : squares.value};
        const Floats f{one.value / at_least.square_root().value};
        f.store(factor + g * generation_pixels + p);
        const Floats d{squares.value < least.value ? zero.value : -0.5f * f.value * f.value};
        d.store(derivative + g * generation_pixels + p);
      }
    }
  }
};

// A vector of channels may have those of several groups, so each of its lanes takes the factor of its own.
template <class T>
void scale_task(const GenerationTiling& t, int64_t begin, int64_t end, float* memory, bool gradient) {
  LengthTile tile(t, memory);
  const int64_t width = t.channels / t.groups;
  const T *gy = static_cast<const T*>(t.gy), *y = static_cast<const T*>(t.y);
  T* scaled = static_cast<T*>(t.scaled);
  for (int64_t first = begin; first < end; first += generation_pixels) {
    const int64_t pixels = min(generation_pixels, end - first);
    tile.load<T>(t, first, pixels);
    tile.find_factors(t);
    transpose(tile.factor, generation_pixels, t.groups, generation_pixels, tile.by_pixel, t.groups);
    const auto scale_pixel = [&](int64_t p) {
      const float* factors = tile.by_pixel + p * t.groups;
      const int64_t at = (first + p) * t.channels;
      float* terms = tile.terms + p % Floats::lanes * t.channel_columns;
      for_vectors(t.channels, [&](int64_t c, auto whole, int64_t count) {
        constexpr bool W = decltype(whole)::value;
        const int32_t group = t.group_of[c];
        const bool one = t.group_of[c + count - 1] == group;
        const Floats factor = one ? broadcast(factors[group])
                                  : Floats::load(factors + group).permuted(Floats::order(t.group_of + c, -group));
        const Floats from = load_lanes<W>(gradient ? gy + at + c : scaled + at + c, count);
        if (gradient) Floats{from.value * load_lanes<W>(y + at + c, count).value}.store(terms + c);
        store_lanes<W>({from.value * factor.value}, scaled + at + c, count);
      });
    };
    if (!gradient) {
      for (int64_t p = 0; p < pixels; ++p) scale_pixel(p);
      continue;
    }
    float* squares = t.grad_squares + first * t.groups;
    for (int64_t p = 0; p < generation_pixels; p += Floats::lanes) {
      const int64_t count = max(0, min(Floats::lanes, pixels - p));
      for (int64_t i = 0; i < count; ++i) scale_pixel(p + i);
      transpose(tile.terms, t.channel_columns, count, t.channels, tile.across, Floats::lanes);
      for (int64_t g = 0; g < t.groups; ++g) {
        Floats sum = Floats::zero();
        for (int64_t c = g * width; c < (g + 1) * width; ++c) {
          const Floats term = Floats::load(tile.across + c * Floats::lanes);
          sum.value += term.value;
        }
        const Floats derivative = Floats::load(tile.derivative + g * generation_pixels + p);
        sum.value *= derivative.value;
        float* to = squares + g * generation_pixels + p;
        sum.store(to);
        for (int64_t lane = count; lane < Floats::lanes; ++lane) to[lane] = 0.0f;
      }
    }
  }
}

template <class T>
void length_gradients_task(const GenerationTiling& t, int64_t task, int64_t begin, int64_t end, float* memory) {
  LengthTile tile(t, memory);
  const int64_t extended = t.reduced + 1, of_group = extended * t.reduced_columns;
  float* partial = t.partial + task * t.gram_partial;
  for (int64_t i = 0; i < t.gram_partial; ++i) partial[i] = 0.0f;
  T* gr = static_cast<T*>(t.gr);
  for (int64_t first = begin; first < end; first += generation_pixels) {
    const int64_t pixels = min(generation_pixels, end - first);
    tile.load<T>(t, first, pixels);
    clear(tile.gradient, extended * generation_pixels / Floats::lanes);
    for (int64_t g = 0; g < t.groups; ++g) {
      tile.multiply_by_gram(t, g);
      const float* squares = t.grad_squares + first * t.groups + g * generation_pixels;
      Floats total = Floats::zero();
      for (int64_t p = 0; p < generation_pixels; p += Floats::lanes) {
        const Floats h = Floats::load(squares + p), twice{2.0f * h.value};
        total.value += h.value;
        for (int64_t at = p; at < extended * generation_pixels; at += generation_pixels) {
          Floats sum = Floats::load(tile.gradient + at);
          sum.add_product(twice, Floats::load(tile.products + at));
          sum.store(tile.gradient + at);
          Floats{h.value * Floats::load(tile.along + at).value}.store(tile.weighted + at);
        }
      }
      // r' ends with a 1: the last row of gM is that of the others, and the last element the sum.
      multiply({tile.weighted, generation_pixels, 1}, extended, {tile.rows, Floats::lanes, t.reduced},
               t.reduced_columns / Floats::lanes, generation_pixels, nullptr, partial + g * of_group,
               t.reduced_columns);
      partial[t.groups * of_group + g] += lane_sum(total);
    }
    float* back = tile.rows;
    transpose(tile.gradient, generation_pixels, t.reduced, generation_pixels, back, t.reduced);
    for_vectors(pixels * t.reduced, [&](int64_t i, auto whole, int64_t count) {
      constexpr bool W = decltype(whole)::value;
      T* to = gr + first * t.reduced + i;
      store_lanes<W>({load_lanes<W>(to, count).value + load_lanes<W>(back + i, count).value}, to, count);
    });
  }
}

template <class T>
void generation(const GenerationTiling& t, GenerationStep step, int64_t task, void* scratch) {
  float* memory = static_cast<float*>(scratch);
  const int64_t begin = task * t.task_pixels, end = min(begin + t.task_pixels, t.pixels);
  if (step == GenerationStep::reduce || step == GenerationStep::reduce_gradients)
    clear(memory, generation_pixels / Floats::lanes);
  switch (step) {
    case GenerationStep::reduce: return reduce_task<T>(t, begin, end, memory);
    case GenerationStep::reduce_gradients: return reduce_gradients_task<T>(t, task, begin, end, memory);
    case GenerationStep::scale: return scale_task<T>(t, begin, end, memory, false);
    case GenerationStep::scale_gradient: return scale_task<T>(t, begin, end, memory, true);
    case GenerationStep::length_gradients: return length_gradients_task<T>(t, task, begin, end, memory);
  }
}

}  // namespace
}  // namespace pyinvolution::cpu
