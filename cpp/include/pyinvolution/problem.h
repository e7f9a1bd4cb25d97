// One involution as plain data: what crosses from the tensor world into kernels.
//
//   Y[n,c,p] = sum over k of  W[n,g(c),k,p] * X[n,c, first(p) + dilation*k],   g(c) = c / (C/G)
//   first(p) = stride*p - padding; in general, with a border and an upsampling, what pyinvolution/axis.h says
//
// X is N,C,H,W and zero outside its borders; W is N,G,Kh,Kw,Ho,Wo; Y is N,C,Ho,Wo. An element of padding takes part in
// the sum as a zero, so a non-finite weight at such a tap makes a NaN, as it does for an unfolded or padded input.
#pragma once

#include <cstdint>

namespace pyinvolution {

// Every dtype: name, name in text (PyTorch's), storage type and type of its sums in the kernels, PyTorch's ScalarType.
// The one list that every switch over dtypes is made from.
#define PYINVOLUTION_DTYPES(_)              \
  _(f32, "float32", float, float, Float)    \
  _(f64, "float64", double, double, Double) \
  _(f16, "float16", Half, float, Half)      \
  _(bf16, "bfloat16", BFloat16, float, BFloat16)

enum class DType : int32_t {
#define PYINVOLUTION_DTYPE(name, text, storage, sum, scalar_type) name,
  PYINVOLUTION_DTYPES(PYINVOLUTION_DTYPE)
#undef PYINVOLUTION_DTYPE
};
enum class Device : int32_t { cpu, cuda };

// What a window does that reaches beyond the input.
enum class Border : int32_t {
  zeros,  // it reads zeros there
  shift,  // it is moved inside, by multiples of the dilation, as in neighbourhood attention; the padding is 0
};

// Which of the three tensors is computed from the other two. `y` holds grad_output, and `x` or `w` receives the
// gradient.
enum class Pass : int32_t {
  forward,      // y from x, w
  grad_input,   // x from w, y
  grad_weight,  // w from x, y
};

struct Problem {
  DType dtype;  // storage; sums are kept in float, for f64 in double
  Device device;

  int64_t batch;     // N
  int64_t channels;  // C, a multiple of groups
  int64_t groups;    // G
  int64_t in_h, in_w;
  int64_t out_h, out_w;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;
  int64_t dilation_h, dilation_w;
  Border border = Border::zeros;
  int64_t upsample_h = 1, upsample_w = 1;  // outputs for each position of the input; above 1 only where the stride is 1

  // In elements; zero (expanded) strides are allowed for tensors that are only read.
  int64_t x_stride[4];  // n c h w
  int64_t w_stride[6];  // n g kh kw h w
  int64_t y_stride[4];  // n c h w

  // Always inlined: a copy compiled for a newer processor (cpp/cpu/instances) must not be the one that the linker keeps.
  [[gnu::always_inline]] int64_t group_channels() const { return groups > 0 ? channels / groups : 0; }
  [[gnu::always_inline]] int64_t taps() const { return kernel_h * kernel_w; }
};

// Addresses of element 0 of each tensor. A pass writes the tensor that it computes and only reads the others.
struct Buffers {
  void* x;
  void* w;
  void* y;
};

// An involution whose weights are a 1x1 convolution ("span") of a few reduced channels, so that W need not exist:
//
//   W[n,g,k,p] = b[g K + k] + sum over r of  S[g K + k, r] * R[n,r,p]      K = Kh * Kw
//
// R is N,R,Ho,Wo, S is (G K),R and b is (G K). The result may pass through an epilogue (a folded norm, and ReLU):
//
//   Z[n,c,p] = max(0, scale[c] * Y[n,c,p] + shift[c])
//
// A whole layer computes R too, a 1x1 convolution ("reduce") and ReLU of the means of X over cells of the stride:
//
//   R[n,r,p] = max(0, a[r] + sum over c of  A[r,c] * mean of X[n,c] over the part of cell p that is inside)
//
// There is a cell for each output pixel: Ho = ceil(H / stride). Where the window needs more padding than there is on
// the left and top, it is to the right and bottom.
// Which of the operators on a span problem.
enum class SpanOp : int32_t {
  forward,   // y from x, reduced, span
  backward,  // the gradients from x, reduced, span and y, which holds grad_output; no epilogue
  layer,     // y from x, reduce, span
};
using SpanPass [[deprecated("SpanPass is now called SpanOp")]] = SpanOp;

struct SpanProblem {
  Problem involution;  // w_stride has no meaning
  int64_t reduced;     // R

  int64_t reduced_stride[4];  // n r h w
  int64_t span_stride[2];     // row column
  int64_t reduce_stride[2];   // r c
  bool epilogue;              // scale and shift
  bool relu;

  // Of the gradients that backward writes; that of S and b are contiguous.
  int64_t grad_x_stride[4];
  int64_t grad_reduced_stride[4];

  [[gnu::always_inline]] int64_t span_rows() const { return involution.groups * involution.taps(); }
};

struct SpanBuffers {
  void* x;
  void* reduced;
  void* reduce;       // layer: A, instead of reduced
  void* reduce_bias;  // a; nullptr: none
  void* span;
  void* bias;   // nullptr: none
  void* scale;  // [channels], like shift in the type that sums are kept in; nullptr: none
  void* shift;
  void* y;
  // backward: nullptr where a gradient is not wanted
  void* grad_x;
  void* grad_reduced;
  void* grad_span;
  void* grad_bias;
  void* scratch;  // what the variant asks for, aligned to 16 bytes
};

// How a kernel gets its threads: `body(begin, end, state)` over disjoint ranges that cover [begin, end). It has the
// signature of torch_parallel_for, so that torch's thread pool is the only one in the process. Bodies do not throw.
using ParallelBody = void (*)(int64_t begin, int64_t end, void* state);
using ParallelFor = void (*)(int64_t begin, int64_t end, int64_t grain, ParallelBody body, void* state);

struct Execution {
  ParallelFor parallel_for = nullptr;  // CPU; nullptr runs on the calling thread
  int threads = 1;                     // CPU: how many threads parallel_for can use
  void* stream = nullptr;              // CUDA: a cudaStream_t of the current device
};

}  // namespace pyinvolution
