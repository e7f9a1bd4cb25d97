// The inner loops of kernel generation in a training step; see tiling.h. Compiled for each instruction set by
// instances/kernels.inl.
#include <cstdint>

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

// Calls body(index of the pixel in x) for the pixels of a cell; returns how many there are.
template <class Body>
int64_t for_cell(const GenerationTiling& t, int64_t pixel, const Body& body) {
  const int64_t column = pixel % t.out_w * t.stride_w, row = pixel / t.out_w % t.out_h * t.stride_h;
  const int64_t first = pixel / (t.out_w * t.out_h) * t.in_h;
  const int64_t rows = min(t.stride_h, t.in_h - row), columns = min(t.stride_w, t.in_w - column);
  for (int64_t i = row; i < row + rows; ++i)
    for (int64_t j = column; j < column + columns; ++j) body((first + i) * t.in_w + j);
  return rows * columns;
}

inline bool has_cells(const GenerationTiling& t) { return t.stride_h != 1 || t.stride_w != 1; }

// The means of `pixels` cells from `first` on, [pixels][channel_columns], in `to` or where they are.
template <class T>
const float* means_of_cells(const GenerationTiling& t, int64_t first, int64_t pixels, float* to) {
  const T* x = static_cast<const T*>(t.x);
  if constexpr (is_float<T>)
    if (!has_cells(t) && t.channels == t.channel_columns) return x + first * t.channels;
  float* row = to;
  for (int64_t p = first; p < first + pixels; ++p, row += t.channel_columns) {
    for_vectors(t.channels, [&](int64_t c, auto whole, int64_t count) {
      constexpr bool W = decltype(whole)::value;
      Floats sum = Floats::zero();
      if (!has_cells(t)) {
        sum = load_lanes<W>(x + p * t.channels + c, count);
      } else {
        const int64_t of =
            for_cell(t, p, [&](int64_t at) { sum.value += load_lanes<W>(x + at * t.channels + c, count).value; });
        sum.value *= 1.0f / float(of);
      }
      sum.store(row + c);
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
    for (int64_t p = 0; p < pixels; ++p, z += t.reduced)
      for_vectors(t.reduced, [&](int64_t r, auto whole, int64_t count) {
        store_lanes<decltype(whole)::value>(Floats::load(sums + p * t.reduced_columns + r), z + r, count);
      });
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
    for (int64_t p = 0; p < pixels; ++p) {
      const float* row = back + p * t.channel_columns;
      const auto add = [&](int64_t at, float factor) {
        for_vectors(t.channels, [&](int64_t c, auto whole, int64_t count) {
          constexpr bool W = decltype(whole)::value;
          T* to = gx + at * t.channels + c;
          store_lanes<W>({load_lanes<W>(to, count).value + factor * Floats::load(row + c).value}, to, count);
        });
      };
      if (!has_cells(t)) {
        add(first + p, 1.0f);
      } else {
        const int64_t of = for_cell(t, first + p, [](int64_t) {});
        for_cell(t, first + p, [&](int64_t at) { add(at, 1.0f / float(of)); });
      }
    }
  }
}

// What the lengths of a tile's kernels are computed from, in a task's scratch memory.
struct LengthTile {
  float* factor;      // [G][tile], f
  float* derivative;  // [G][tile], -1/2 f^2, and 0 where the least length is taken
  float* rows;        // [tile][extended_columns], r'; zeros past the last pixel
  float* along;       // [R + 1][tile], r'
  float* products;    // [R + 1][tile], M r' of one group
  float* weighted;    // [R + 1][tile], h r' of one group
  float* gradient;    // [R + 1][tile], of r'
  float* back;        // [tile][R]

  LengthTile(const GenerationTiling& t, float* memory) {
    const int64_t extended = (t.reduced + 1) * generation_pixels;
    factor = memory, derivative = factor + t.groups * generation_pixels;
    rows = derivative + t.groups * generation_pixels, along = rows + generation_pixels * t.extended_columns;
    products = along + extended, weighted = products + extended, gradient = weighted + extended;
    back = gradient + extended;
  }

  template <class T>
  void load(const GenerationTiling& t, int64_t first, int64_t pixels) {
    const T* r = static_cast<const T*>(t.r) + first * t.reduced;
    for (int64_t p = 0; p < pixels; ++p, r += t.reduced) {
      float* row = rows + p * t.extended_columns;
      Floats::zero().store(row + t.extended_columns - Floats::lanes);
      for_vectors(t.reduced, [&](int64_t i, auto whole, int64_t count) {
        load_lanes<decltype(whole)::value>(r + i, count).store(row + i);
      });
      row[t.reduced] = 1.0f;
    }
    clear(rows + pixels * t.extended_columns, (generation_pixels - pixels) * t.extended_columns / Floats::lanes);
    transpose(rows, t.extended_columns, generation_pixels, t.reduced + 1, along, generation_pixels);
  }

  // The last column of M is its last row, and belongs to the 1 in r'.
  void multiply_by_gram(const GenerationTiling& t, int64_t group) const {
    const int64_t rows = t.reduced + 1;
    const float* gram = t.gram + group * rows * rows;
    multiply({gram, rows, 1}, rows, {along, Floats::lanes, generation_pixels}, generation_pixels / Floats::lanes,
             t.reduced, gram + t.reduced * rows, products, generation_pixels);
  }

  void find_factors(const GenerationTiling& t) const {
    for (int64_t g = 0; g < t.groups; ++g) {
      multiply_by_gram(t, g);
      for (int64_t p = 0; p < generation_pixels; p += Floats::lanes) {
        Floats squares = Floats::zero();
        for (int64_t i = 0; i <= t.reduced; ++i)
          squares.add_product(Floats::load(products + i * generation_pixels + p),
                              Floats::load(along + i * generation_pixels + p));
        squares.store(factor + g * generation_pixels + p);
      }
      for (int64_t p = 0; p < generation_pixels; ++p) {
        float &f = factor[g * generation_pixels + p], &d = derivative[g * generation_pixels + p];
        const bool least = f < t.least;
        f = 1.0f / __builtin_sqrtf(least ? t.least : f);
        d = least ? 0.0f : -0.5f * f * f;
      }
    }
  }
};

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
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t g = 0; g < t.groups; ++g) {
        const float factor = tile.factor[g * generation_pixels + p];
        const int64_t at = (first + p) * t.channels + g * width;
        Floats product = Floats::zero();
        for_vectors(width, [&](int64_t c, auto whole, int64_t count) {
          constexpr bool W = decltype(whole)::value;
          const Floats from = load_lanes<W>(gradient ? gy + at + c : scaled + at + c, count);
          if (gradient) product.add_product(from, load_lanes<W>(y + at + c, count));
          store_lanes<W>({from.value * factor}, scaled + at + c, count);
        });
        if (gradient)
          t.grad_squares[(first + p) * t.groups + g] = tile.derivative[g * generation_pixels + p] * sum_of(product);
      }
  }
}

template <class T>
void length_gradients_task(const GenerationTiling& t, int64_t task, int64_t begin, int64_t end, float* memory) {
  LengthTile tile(t, memory);
  const int64_t extended = t.reduced + 1, vectors = t.extended_columns / Floats::lanes;
  float* partial = t.partial + task * t.groups * extended * t.extended_columns;
  clear(partial, t.groups * extended * vectors);
  T* gr = static_cast<T*>(t.gr);
  for (int64_t first = begin; first < end; first += generation_pixels) {
    const int64_t pixels = min(generation_pixels, end - first);
    tile.load<T>(t, first, pixels);
    clear(tile.gradient, extended * generation_pixels / Floats::lanes);
    float* squares = tile.factor;
    clear(squares, generation_pixels / Floats::lanes);
    for (int64_t g = 0; g < t.groups; ++g) {
      tile.multiply_by_gram(t, g);
      for (int64_t p = 0; p < pixels; ++p) squares[p] = t.grad_squares[(first + p) * t.groups + g];
      for (int64_t i = 0; i < extended; ++i)
        for (int64_t p = i * generation_pixels; p < (i + 1) * generation_pixels; p += Floats::lanes) {
          const Floats h = Floats::load(squares + p % generation_pixels);
          Floats sum = Floats::load(tile.gradient + p);
          sum.add_product(h, Floats{2.0f * Floats::load(tile.products + p).value});
          sum.store(tile.gradient + p);
          Floats{h.value * Floats::load(tile.along + p).value}.store(tile.weighted + p);
        }
      multiply({tile.weighted, generation_pixels, 1}, extended, {tile.rows, Floats::lanes, t.extended_columns}, vectors,
               generation_pixels, nullptr, partial + g * extended * t.extended_columns, t.extended_columns);
    }
    transpose(tile.gradient, generation_pixels, t.reduced, generation_pixels, tile.back, t.reduced);
    for_vectors(pixels * t.reduced, [&](int64_t i, auto whole, int64_t count) {
      constexpr bool W = decltype(whole)::value;
      T* to = gr + first * t.reduced + i;
      store_lanes<W>({load_lanes<W>(to, count).value + load_lanes<W>(tile.back + i, count).value}, to, count);
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
