// The generation of kernels in a training step (cpp/cpu/generation) in every instruction set of this processor, against
// its equations as loops in double. Tensors end at memory that nobody may touch.
#include <algorithm>
#include <array>
#include <cmath>
#include <random>
#include <string>
#include <vector>

#include "check.h"
#include "cpp/core/isa.h"
#include "cpp/cpu/generation/generation.h"
#include "span_oracle.h"
#include "tensor.h"

using namespace pyinvolution;
using cpu::GenerationShape;

namespace {

// A dense tensor of `count` elements with values around 0, or as it was allocated, full of NaN.
struct Row {
  Tensor tensor;

  Row(DType dtype, int64_t count) : tensor(dtype, {count}, {1}) {}
  Row(DType dtype, int64_t count, std::mt19937& random) : Row(dtype, count) {
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < count; ++i) tensor.set(i, normal(random));
  }
  double operator[](int64_t i) const { return tensor.get(i); }
  void* data() const { return tensor.data(); }
};

// Sums of `terms` products in float, whose magnitudes add up to `magnitude`, stored in a dtype.
bool close(double found, double expected, double magnitude, DType dtype) {
  const double allowed = 4 * unit_roundoff(dtype) * std::abs(expected) + 64 * 0x1p-24 * magnitude + smallest(dtype);
  return std::abs(found - expected) <= allowed;
}

struct Layer {
  GenerationShape shape;
  DType dtype;
  int64_t taps, pixels;
  std::mt19937 random{1};

  std::string text() const {
    return std::to_string(shape.channels) + " channels, R = " + std::to_string(shape.reduced) + ", " +
           std::to_string(shape.in_h) + " x " + std::to_string(shape.in_w);
  }

  // Calls body(index of the pixel of x) for a cell, returns how many there are.
  template <class Body>
  int64_t cell(int64_t pixel, const Body& body) const {
    const int64_t w = pixel % shape.out_w, h = pixel / shape.out_w % shape.out_h, n = pixel / shape.out_w / shape.out_h;
    int64_t count = 0;
    for (int64_t i = h * shape.stride_h; i < std::min((h + 1) * shape.stride_h, shape.in_h); ++i)
      for (int64_t j = w * shape.stride_w; j < std::min((w + 1) * shape.stride_w, shape.in_w); ++j, ++count)
        body((n * shape.in_h + i) * shape.in_w + j);
    return count;
  }

  void reduction(const Execution& execution) {
    const int64_t c = shape.channels, r = shape.reduced, inputs = shape.batch * shape.in_h * shape.in_w;
    const Row x(dtype, inputs * c, random), a(dtype, r * c, random), gz(dtype, pixels * r, random);
    const Row z(dtype, pixels * r), gx(dtype, inputs * c, random);
    std::vector<float> grad_a(r * c, NAN);
    std::vector<double> before(inputs * c), expected_gx(inputs * c), size_gx(inputs * c), mean(pixels * c);
    for (int64_t i = 0; i < inputs * c; ++i) before[i] = expected_gx[i] = gx[i], size_gx[i] = std::abs(gx[i]);
    cpu::reduce(shape, x.data(), a.data(), z.data(), execution);
    cpu::reduce_gradients(shape, x.data(), a.data(), gz.data(), gx.data(), grad_a.data(), execution);
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t k = 0; k < c; ++k) {
        const int64_t of = cell(p, [&](int64_t at) { mean[p * c + k] += x[at * c + k]; });
        mean[p * c + k] /= double(of);
        for (int64_t i = 0; i < r; ++i)
          cell(p, [&](int64_t at) {
            const double term = a[i * c + k] * gz[p * r + i] / double(of);
            expected_gx[at * c + k] += term, size_gx[at * c + k] += std::abs(term);
          });
      }
    bool good_z = true, good_a = true, good_x = true;
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t i = 0; i < r; ++i) {
        double sum = 0, size = 0;
        for (int64_t k = 0; k < c; ++k)
          sum += a[i * c + k] * mean[p * c + k], size += std::abs(a[i * c + k] * mean[p * c + k]);
        good_z &= close(z[p * r + i], sum, size, dtype);
      }
    for (int64_t i = 0; i < r; ++i)
      for (int64_t k = 0; k < c; ++k) {
        double sum = 0, size = 0;
        for (int64_t p = 0; p < pixels; ++p)
          sum += gz[p * r + i] * mean[p * c + k], size += std::abs(gz[p * r + i] * mean[p * c + k]);
        good_a &= close(grad_a[i * c + k], sum, size, DType::f32);
      }
    for (int64_t i = 0; i < inputs * c; ++i) good_x &= close(gx[i], expected_gx[i], size_gx[i], dtype);
    CHECK(good_z, text() + ": z");
    CHECK(good_a, text() + ": the gradient of A");
    CHECK(good_x, text() + ": the gradient of x");
  }

  void lengths(bool biased, const Execution& execution) {
    const int64_t c = shape.channels, r = shape.reduced, g = shape.groups, width = c / g;
    const Row s(DType::f32, g * taps * r, random), b(DType::f32, g * taps, random);
    Row reduced(dtype, pixels * r, random);
    const Row gy(dtype, pixels * c, random), y(dtype, pixels * c, random);
    const Row u(dtype, pixels * c), gr(dtype, pixels * r, random);
    // Without a bias, kernels of zeros. (In float16, what is divided by the least length is not finite.)
    for (int64_t i = 0; i < r && dtype != DType::f16; ++i) reduced.tensor.set(i, 0.0);
    const auto* weights = static_cast<const float*>(s.data());
    const auto* biases = biased ? static_cast<const float*>(b.data()) : nullptr;
    std::vector<double> undivided(pixels * c), gradient(pixels * r), size(pixels * r);
    for (int64_t i = 0; i < pixels * c; ++i) undivided[i] = y[i];
    for (int64_t i = 0; i < pixels * r; ++i) gradient[i] = gr[i], size[i] = std::abs(gr[i]);
    std::vector<float> grad_s(g * taps * r, 1.0f), grad_b(g * taps, 2.0f);
    const float least = 1e-24f;
    const std::vector<float> gram = cpu::span_gram(shape, taps, weights, biases);
    cpu::divide_by_lengths(shape, gram, least, reduced.data(), y.data(), execution);
    const std::vector<float> h =
        cpu::undivided_gradient(shape, gram, least, reduced.data(), y.data(), gy.data(), u.data(), execution);
    cpu::length_gradients(shape, gram, reduced.data(), h, gr.data(), taps, weights, biases, grad_s.data(),
                          biased ? grad_b.data() : nullptr, execution);
    bool good_y = true, good_u = true, good_r = true, good_s = true, good_b = true;
    std::vector<double> of_s(grad_s.size(), 1.0), size_s(grad_s.size(), 1.0), of_b(grad_b.size(), 2.0),
        size_b(grad_b.size(), 2.0);
    for (int64_t p = 0; p < pixels; ++p)
      for (int64_t k = 0; k < g; ++k) {
        std::vector<double> kernel(taps);
        double square = 0;
        for (int64_t t = 0; t < taps; ++t) {
          kernel[t] = biased ? b[k * taps + t] : 0.0;
          for (int64_t i = 0; i < r; ++i) kernel[t] += s[(k * taps + t) * r + i] * reduced[p * r + i];
          square += kernel[t] * kernel[t];
        }
        const double factor = 1 / std::sqrt(std::max(square, 1e-24));
        double product = 0, products = 0;
        for (int64_t i = p * c + k * width; i < p * c + (k + 1) * width; ++i) {
          good_y &= close(y[i], factor * undivided[i], factor * std::abs(undivided[i]), dtype);
          good_u &= close(u[i], factor * gy[i], factor * std::abs(gy[i]), dtype);
          product += gy[i] * y[i], products += std::abs(gy[i] * y[i]);
        }
        const double by = square < 1e-24 ? 0 : -0.5 * factor * factor;
        for (int64_t t = 0; t < taps; ++t) {
          const double grad = 2 * by * product * kernel[t], magnitude = std::abs(2 * by * products) * std::sqrt(square);
          of_b[k * taps + t] += grad, size_b[k * taps + t] += magnitude;
          for (int64_t i = 0; i < r; ++i) {
            const int64_t at = (k * taps + t) * r + i;
            of_s[at] += grad * reduced[p * r + i], size_s[at] += magnitude * std::abs(reduced[p * r + i]);
            gradient[p * r + i] += grad * s[at], size[p * r + i] += magnitude * std::abs(s[at]);
          }
        }
      }
    // Gradients are sums of terms of M, which may be larger than the kernels that they make.
    for (int64_t i = 0; i < pixels * r; ++i) good_r &= close(gr[i], gradient[i], 16 * size[i], dtype);
    for (size_t i = 0; i < grad_s.size(); ++i) good_s &= close(grad_s[i], of_s[i], 16 * size_s[i], DType::f32);
    for (size_t i = 0; biased && i < grad_b.size(); ++i)
      good_b &= close(grad_b[i], of_b[i], 16 * size_b[i], DType::f32);
    CHECK(good_y, text() + ": y");
    CHECK(good_u, text() + ": u");
    CHECK(good_r, text() + ": the gradient of r");
    CHECK(good_s, text() + ": the gradient of S");
    CHECK(good_b, text() + ": the gradient of b");
  }
};

void layers() {
  int64_t index = 0;
  for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
    for (const auto& [channels, reduced, groups, height, width, stride] : {std::array<int64_t, 6>{16, 4, 1, 9, 8, 1},
                                                                           {24, 6, 3, 7, 5, 2},
                                                                           {64, 17, 4, 5, 5, 3},
                                                                           {10, 1, 2, 12, 9, 1},
                                                                           {36, 15, 3, 4, 4, 1},
                                                                           {40, 16, 5, 8, 17, 2},
                                                                           {48, 12, 12, 9, 8, 1},
                                                                           {21, 5, 7, 7, 10, 1},
                                                                           {20, 3, 20, 5, 13, 1},
                                                                           {72, 9, 2, 6, 7, 1}}) {
      const int64_t rows = (height + stride - 1) / stride, columns = (width + stride - 1) / stride;
      Layer layer{{dtype, 2, channels, reduced, groups, height, width, rows, columns, stride, stride},
                  dtype,
                  9,
                  2 * rows * columns};
      const Execution execution = ++index % 2 == 0 ? two_threads : Execution{};
      layer.reduction(execution);
      layer.lengths(true, execution);
      layer.lengths(false, execution);
    }
}

}  // namespace

int main() {
  for (const std::string& isa : available_isas()) {
    override_isa(isa);
    layers();
    std::printf("%s: %d checks so far\n", isa.c_str(), checks::passed + checks::failed);
  }
  return checks::report("generation");
}
