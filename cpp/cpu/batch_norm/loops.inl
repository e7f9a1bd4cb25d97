// The inner loops of batch norm; see tiling.h. Compiled for each instruction set by instances/kernels.inl.
#include <cstdint>
#include <type_traits>

#include "cpu/arithmetic.h"
#include "cpu/batch_norm/tiling.h"
#include "cpu/simd/convert.h"
#include "cpu/simd/dtype.h"

namespace pyinvolution::cpu {
namespace {

using Floats = Vector<float>;

// `count` neighbours, a whole vector or the first of one.
template <bool Whole, class T>
Floats load_lanes(const T* from, int64_t count) {
  if constexpr (Whole) return Floats::load(from);
  return Floats::load_range(from, 0, 0, count);
}
template <bool Whole, class T>
void store_lanes(const Floats& vector, T* to, int64_t count) {
  if constexpr (Whole) return store_vector(vector, to);
  store_some(vector, to, count);
}

inline Floats broadcast(float value) { return {Floats::zero().value + value}; }
// `value` where `gate` is positive or NaN, else 0: the ReLU of torch lets a NaN through.
inline Floats gated(const Floats& value, const Floats& gate) {
  return {gate.value <= Floats::zero().value ? Floats::zero().value : value.value};
}

// z of a vector of x, and g of one of gy.
template <class T>
struct Pointers {
  const T *x, *residual, *gy, *y;
  T *out, *grad_residual;
  bool relu;

  explicit Pointers(const BatchNormTiling& t, int64_t at)
      : x(move(t.x, at)),
        residual(move(t.residual, at)),
        gy(move(t.gy, at)),
        y(move(t.y, at)),
        out(const_cast<T*>(move(t.out, at))),
        grad_residual(const_cast<T*>(move(t.grad_residual, at))),
        relu(t.relu) {}
  static const T* move(const void* from, int64_t at) {
    return from == nullptr ? nullptr : static_cast<const T*>(from) + at;
  }
};

struct Parameters {
  Floats mean, scale, shift;
  Floats z(const Floats& x) const { return {(x.value - mean.value) * scale.value + shift.value}; }
};

template <bool Whole, class T>
Floats gradient_of_z(const Pointers<T>& p, int64_t at, int64_t count, const Floats& x, const Parameters& parameters) {
  const Floats gy = load_lanes<Whole>(p.gy + at, count);
  if (!p.relu) return gy;
  return gated(gy, p.y != nullptr ? load_lanes<Whole>(p.y + at, count) : parameters.z(x));
}

template <bool Whole, class T>
void put_output(const Pointers<T>& p, int64_t at, int64_t count, const Parameters& parameters) {
  Floats z = parameters.z(load_lanes<Whole>(p.x + at, count));
  if (p.residual != nullptr) z.value += load_lanes<Whole>(p.residual + at, count).value;
  store_lanes<Whole>(p.relu ? gated(z, z) : z, p.out + at, count);
}

template <bool Whole, class T>
void put_gradient(const Pointers<T>& p, int64_t at, int64_t count, const Parameters& parameters, const Floats& linear,
                  const Floats& constant) {
  const Floats x = load_lanes<Whole>(p.x + at, count);
  // With a residual, the step before has written g.
  const Floats g = p.grad_residual != nullptr ? load_lanes<Whole>(p.grad_residual + at, count)
                                              : gradient_of_z<Whole>(p, at, count, x, parameters);
  store_lanes<Whole>(
      {parameters.scale.value * g.value + ((x.value - parameters.mean.value) * linear.value + constant.value)},
      p.out + at, count);
}

// Merges a block's mean and squares into those of `before` elements.
inline void merge(float before, float added, const Floats& mean, const Floats& squares, Floats& all_mean,
                  Floats& all_squares) {
  const float total = before + added;
  const Floats difference{mean.value - all_mean.value};
  all_mean.value += difference.value * (added / total);
  all_squares.value += squares.value + difference.value * difference.value * (before * added / total);
}

// --- channels_last: vectors along the channels

#if VECTOR_BYTES == 64
constexpr int norm_vectors = 4;
#else
constexpr int norm_vectors = 2;
#endif

// Calls body(channel, Count<vectors>, whole, channels of the last vector) for all channels.
template <class Body>
void for_channels(int64_t channels, const Body& body) {
  int64_t c = 0;
  for (; c + norm_vectors * Floats::lanes <= channels; c += norm_vectors * Floats::lanes)
    body(c, Count<norm_vectors>{}, std::true_type{}, Floats::lanes);
  for (; c + Floats::lanes <= channels; c += Floats::lanes) body(c, Count<1>{}, std::true_type{}, Floats::lanes);
  if (c < channels) body(c, Count<1>{}, std::false_type{}, channels - c);
}

template <class T>
void moments_of_rows(const BatchNormTiling& t, const T* x, int64_t pixels, float* means, float* squares) {
  const int64_t channels = t.channels;
  for (int64_t c = 0; c < channels; ++c) means[c] = squares[c] = 0.0f;
  for (int64_t first = 0; first < pixels; first += t.block_pixels) {
    const int64_t rows = min(t.block_pixels, pixels - first);
    const T* block = x + first * channels;
    for_channels(channels, [&](int64_t c, auto vectors, auto whole, int64_t count) {
      constexpr int V = decltype(vectors)::value;
      constexpr bool W = decltype(whole)::value;
      Floats sum[V], square[V];
      for (int v = 0; v < V; ++v) sum[v] = square[v] = Floats::zero();
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < V; ++v)
          sum[v].value += load_lanes<W>(block + r * channels + c + v * Floats::lanes, count).value;
      for (int v = 0; v < V; ++v) sum[v].value *= 1.0f / float(rows);
      for (int64_t r = 0; r < rows; ++r)
        for (int v = 0; v < V; ++v) {
          const Floats x = load_lanes<W>(block + r * channels + c + v * Floats::lanes, count);
          const Floats difference{x.value - sum[v].value};
          square[v].value += difference.value * difference.value;
        }
      for (int v = 0; v < V; ++v) {
        const int64_t at = c + v * Floats::lanes;
        Floats mean = load_lanes<W>(means + at, count), all = load_lanes<W>(squares + at, count);
        merge(float(first), float(rows), sum[v], square[v], mean, all);
        store_lanes<W>(mean, means + at, count);
        store_lanes<W>(all, squares + at, count);
      }
    });
  }
}

template <bool W>
Parameters parameters_of(const BatchNormTiling& t, int64_t c, int64_t count) {
  return {load_lanes<W>(t.mean + c, count), load_lanes<W>(t.scale + c, count), load_lanes<W>(t.shift + c, count)};
}

template <class T>
void sums_of_rows(const BatchNormTiling& t, const Pointers<T>& p, int64_t pixels, float* sums, float* products) {
  const int64_t channels = t.channels;
  for (int64_t c = 0; c < channels; ++c) sums[c] = products[c] = 0.0f;
  for (int64_t first = 0; first < pixels; first += t.block_pixels) {
    const int64_t rows = min(t.block_pixels, pixels - first);
    for_channels(channels, [&](int64_t c, auto vectors, auto whole, int64_t count) {
      constexpr int V = decltype(vectors)::value;
      constexpr bool W = decltype(whole)::value;
      Parameters parameters[V];
      Floats sum[V], product[V];
      for (int v = 0; v < V; ++v) {
        parameters[v] = parameters_of<W>(t, c + v * Floats::lanes, count);
        sum[v] = product[v] = Floats::zero();
      }
      for (int64_t r = first; r < first + rows; ++r)
        for (int v = 0; v < V; ++v) {
          const int64_t at = r * channels + c + v * Floats::lanes;
          const Floats x = load_lanes<W>(p.x + at, count);
          const Floats g = gradient_of_z<W>(p, at, count, x, parameters[v]);
          if (p.grad_residual != nullptr) store_lanes<W>(g, p.grad_residual + at, count);
          sum[v].value += g.value;
          product[v].value += g.value * (x.value - parameters[v].mean.value);
        }
      for (int v = 0; v < V; ++v) {
        const int64_t at = c + v * Floats::lanes;
        store_lanes<W>({load_lanes<W>(sums + at, count).value + sum[v].value}, sums + at, count);
        store_lanes<W>({load_lanes<W>(products + at, count).value + product[v].value}, products + at, count);
      }
    });
  }
}

// The second pass of rows [first, first + rows).
template <class T>
void outputs_of_rows(const BatchNormTiling& t, const Pointers<T>& p, int64_t first, int64_t rows) {
  for_channels(t.channels, [&](int64_t c, auto vectors, auto whole, int64_t count) {
    constexpr int V = decltype(vectors)::value;
    constexpr bool W = decltype(whole)::value;
    Parameters parameters[V];
    for (int v = 0; v < V; ++v) parameters[v] = parameters_of<W>(t, c + v * Floats::lanes, count);
    for (int64_t r = first; r < first + rows; ++r)
      for (int v = 0; v < V; ++v) put_output<W>(p, r * t.channels + c + v * Floats::lanes, count, parameters[v]);
  });
}

template <class T>
void gradients_of_rows(const BatchNormTiling& t, const Pointers<T>& p, int64_t first, int64_t rows) {
  for_channels(t.channels, [&](int64_t c, auto vectors, auto whole, int64_t count) {
    constexpr int V = decltype(vectors)::value;
    constexpr bool W = decltype(whole)::value;
    Parameters parameters[V];
    Floats linear[V], constant[V];
    for (int v = 0; v < V; ++v) {
      const int64_t at = c + v * Floats::lanes;
      parameters[v] = parameters_of<W>(t, at, count);
      linear[v] = load_lanes<W>(t.linear + at, count), constant[v] = load_lanes<W>(t.constant + at, count);
    }
    for (int64_t r = first; r < first + rows; ++r)
      for (int v = 0; v < V; ++v)
        put_gradient<W>(p, r * t.channels + c + v * Floats::lanes, count, parameters[v], linear[v], constant[v]);
  });
}

template <class T>
void batch_norm_rows(const BatchNormTiling& t, BatchNormStep step, int64_t task) {
  const int64_t first = task * t.task_pixels, pixels = min(t.task_pixels, t.pixels - first);
  const Pointers<T> p(t, first * t.channels);
  float* partial = t.partial + task * t.channels;
  float* second = partial + t.tasks * t.channels;
  if (step == BatchNormStep::moments) return moments_of_rows(t, p.x, pixels, partial, second);
  if (step == BatchNormStep::sums) return sums_of_rows(t, p, pixels, partial, second);
  const bool output = step == BatchNormStep::output;
  if (is_float<T> && t.channels > norm_vectors * Floats::lanes) {
    // Waits for memory, which is fastest in its own order. (Types of 16 bits wait for conversions.)
    for (int64_t r = 0; r < pixels; ++r) {
      const auto vector = [&](int64_t c, auto whole, int64_t count) {
        constexpr bool W = decltype(whole)::value;
        const Parameters parameters = parameters_of<W>(t, c, count);
        const int64_t at = r * t.channels + c;
        if (output) return put_output<W>(p, at, count, parameters);
        put_gradient<W>(p, at, count, parameters, load_lanes<W>(t.linear + c, count),
                        load_lanes<W>(t.constant + c, count));
      };
      int64_t c = 0;
      for (; c + Floats::lanes <= t.channels; c += Floats::lanes) vector(c, std::true_type{}, Floats::lanes);
      if (c < t.channels) vector(c, std::false_type{}, t.channels - c);
    }
    return;
  }
  for (int64_t r = 0; r < pixels; r += t.block_pixels) {
    const int64_t rows = min(t.block_pixels, pixels - r);
    if (output)
      outputs_of_rows(t, p, r, rows);
    else
      gradients_of_rows(t, p, r, rows);
  }
}

// --- NCHW: vectors along the pixels of a channel

inline float sum_of(const Floats& vector) {
  float values[Floats::lanes], sum = 0.0f;
  vector.store(values);
  for (int64_t i = 0; i < Floats::lanes; ++i) sum += values[i];
  return sum;
}

// Calls body(pixel, whole, pixels, number of the accumulator) for the vectors of a run of pixels.
constexpr int chains = 4;
template <class Body>
void for_pixels(int64_t pixels, const Body& body) {
  int64_t i = 0;
  for (; i + chains * Floats::lanes <= pixels; i += chains * Floats::lanes)
    for (int k = 0; k < chains; ++k) body(i + k * Floats::lanes, std::true_type{}, Floats::lanes, k);
  for (; i + Floats::lanes <= pixels; i += Floats::lanes) body(i, std::true_type{}, Floats::lanes, 0);
  if (i < pixels) body(i, std::false_type{}, pixels - i, 1);
}

inline Floats total_of(const Floats (&sums)[chains]) {
  return {(sums[0].value + sums[1].value) + (sums[2].value + sums[3].value)};
}

template <class T>
void moments_of_plane(const BatchNormTiling& t, const T* x, float* mean, float* squares) {
  // One lane of a vector is enough for the merging.
  Floats all_mean = Floats::zero(), all_squares = Floats::zero();
  for (int64_t first = 0; first < t.pixels; first += t.block_pixels) {
    const int64_t count = min(t.block_pixels, t.pixels - first);
    Floats sums[chains] = {};
    for_pixels(count, [&](int64_t i, auto whole, int64_t lanes, int k) {
      sums[k].value += load_lanes<decltype(whole)::value>(x + first + i, lanes).value;
    });
    const Floats block_mean = broadcast(sum_of(total_of(sums)) / float(count));
    for (int k = 0; k < chains; ++k) sums[k] = Floats::zero();
    for_pixels(count, [&](int64_t i, auto whole, int64_t lanes, int k) {
      Floats difference = load_lanes<decltype(whole)::value>(x + first + i, lanes);
      difference.value -= block_mean.value;
      if constexpr (!decltype(whole)::value) {
        float values[Floats::lanes];
        difference.store(values);
        difference = Floats::load_range(values, 0, 0, lanes);
      }
      sums[k].value += difference.value * difference.value;
    });
    merge(float(first), float(count), block_mean, broadcast(sum_of(total_of(sums))), all_mean, all_squares);
  }
  store_some(all_mean, mean, 1);
  store_some(all_squares, squares, 1);
}

template <class T>
void batch_norm_planes(const BatchNormTiling& t, BatchNormStep step, int64_t task) {
  const int64_t parts = ceil_div(t.channels, t.task_channels), n = task / parts;
  const int64_t begin = task % parts * t.task_channels, end = min(begin + t.task_channels, t.channels);
  float* partial = t.partial + n * t.channels;
  float* second = partial + t.batch * t.channels;
  for (int64_t c = begin; c < end; ++c) {
    const Pointers<T> p(t, (n * t.channels + c) * t.pixels);
    if (step == BatchNormStep::moments) {
      moments_of_plane(t, p.x, partial + c, second + c);
      continue;
    }
    const Parameters parameters{broadcast(t.mean[c]), broadcast(t.scale[c]), broadcast(t.shift[c])};
    if (step == BatchNormStep::output) {
      for_pixels(t.pixels, [&](int64_t i, auto whole, int64_t lanes, int) {
        put_output<decltype(whole)::value>(p, i, lanes, parameters);
      });
    } else if (step == BatchNormStep::gradient) {
      const Floats linear = broadcast(t.linear[c]), constant = broadcast(t.constant[c]);
      for_pixels(t.pixels, [&](int64_t i, auto whole, int64_t lanes, int) {
        put_gradient<decltype(whole)::value>(p, i, lanes, parameters, linear, constant);
      });
    } else {
      float sum = 0.0f, product = 0.0f;
      for (int64_t first = 0; first < t.pixels; first += t.block_pixels) {
        Floats sums[chains] = {}, products[chains] = {};
        for_pixels(min(t.block_pixels, t.pixels - first), [&](int64_t i, auto whole, int64_t lanes, int k) {
          constexpr bool W = decltype(whole)::value;
          const Floats x = load_lanes<W>(p.x + first + i, lanes);
          // Past the end gy is zero, and so is g.
          const Floats g = gradient_of_z<W>(p, first + i, lanes, x, parameters);
          if (p.grad_residual != nullptr) store_lanes<W>(g, p.grad_residual + first + i, lanes);
          sums[k].value += g.value;
          products[k].value += g.value * (x.value - parameters.mean.value);
        });
        sum += sum_of(total_of(sums)), product += sum_of(total_of(products));
      }
      partial[c] = sum, second[c] = product;
    }
  }
}

template <class T>
void batch_norm(const BatchNormTiling& t, BatchNormStep step, int64_t task) {
  if (t.channels_last) return batch_norm_rows<T>(t, step, task);
  batch_norm_planes<T>(t, step, task);
}

}  // namespace
}  // namespace pyinvolution::cpu
