// The CUDA variant `mma` in the emulator: kernels, strides, layouts of all alignments and dtypes; numbers that are not
// finite stay where they belong; every schedule gives the same bits; each removed synchronisation is noticed.
#include "cuda/variants.h"

#include "variant.h"

namespace {

constexpr CudaVariant mma{cuda::mma_refusal, cuda::mma_run};
constexpr DType mma_dtypes[] = {DType::f16, DType::bf16};

std::vector<char> run_and_check(const Trial& trial, const Strides& strides, uint64_t seed = 1) {
  return run_and_check(mma, trial, strides, seed);
}

// X (for its gradient, Y) with columns inside and W with taps inside is refused.
bool has_mix(int mix, Pass pass) { return (mix & 2) == 0 || (mix & (pass == Pass::grad_input ? 4 : 1)) != 0; }

// Layouts of X, W and Y, each with channels or taps inside where its bit is set, else columns.
Strides mixed_strides(const Case& shape, int mix) {
  const Strides columns = strides_of(shape, Layout::contiguous, Pass::forward),
                channels = strides_of(shape, Layout::channels_last, Pass::forward);
  return {mix & 1 ? channels.x : columns.x, mix & 2 ? channels.w : columns.w, mix & 4 ? channels.y : columns.y};
}

// Narrow and wide tiles, whole ones and parts, of each kernel, stride and layout; whole and partial chunks of groups.
void kernels_and_strides() {
  int next = 0;
  for (const int64_t k : {7, 5, 3})
    for (const int64_t s : {1, 2})
      for (const Case& shape :
           {Case{2, 32, 2, 7, 7, k, k, s, s, k / 2, k / 2}, Case{1, 64, 4, 9, 20, k, k, s, s, k / 2, k / 2},
            Case{1, 96, 6, 18, 34, k, k, s, s, k / 2 - 1, k / 2 + 1}, Case{1, 48, 3, 8, 24, k, k, s, s, 0, k - 1}})
        for (const Pass pass : passes) {
          for (int mix = 0; mix < 8; ++mix) {
            if (!has_mix(mix, pass) || (shape.c == 96 && k != 7)) continue;
            run_and_check({shape, Layout::contiguous, mma_dtypes[++next % 2], pass}, mixed_strides(shape, mix),
                          uint64_t(next));
          }
        }
}

// Widths of each alignment with each padding: x starts at another element of a vector.
void alignments() {
  int next = 0;
  for (const int64_t width : {12, 10, 9})
    for (const int64_t padding : {0, 1, 2, 3, 4, 6, 9})
      for (const int64_t s : {1, 2})
        for (const Pass pass : passes) {
          const Case shape{1, 16, 1, 8, width * s, 7, 7, s, s, 3, padding};
          run_and_check({shape, Layout::contiguous, mma_dtypes[++next % 2], pass}, mixed_strides(shape, 0),
                        uint64_t(next));
        }
}

// Kernels for one pixel, whose taps and columns both are dense.
void single_pixels() {
  for (const int64_t s : {1, 2})
    for (const Pass pass : passes)
      for (const int mix : {0, 5, 7})
        run_and_check({{2, 64, 4, 7, 7, 7, 7, s, s, 0, 0}, Layout::contiguous, DType::f16, pass},
                      mixed_strides({2, 64, 4, 7, 7, 7, 7, s, s, 0, 0}, mix));
}

// channels_last memory with gaps, aligned to vectors and not; tensors that repeat.
void gaps() {
  for (const Pass pass : passes)
    for (const DType dtype : mma_dtypes)
      for (const int64_t gap : {1, 2, 4, 8}) {
        const Case shape{2, 64, 4, 9, 11, 7, 7, 1, 1, 3, 3};
        Strides strides = mixed_strides(shape, 7);
        strides.x = strides_in_order({2, 64 + gap, 9, 11}, {0, 2, 3, 1});
        strides.y = strides_in_order({2, 64 + 2 * gap, 9, 11}, {0, 2, 3, 1});
        strides.w = strides_in_order({2, 1, 1, 4 * 49 + gap, 9, 11}, {0, 4, 5, 1, 2, 3});
        strides.w[1] = 49, strides.w[2] = 7;
        run_and_check({shape, Layout::channels_last, dtype, pass}, strides);
        strides = mixed_strides(shape, 0);
        strides.x = strides_in_order({2, 64, 9, 11 + gap}, {0, 1, 2, 3});
        strides.y = strides_in_order({2, 64, 9, 12 + gap}, {0, 1, 2, 3});
        strides.w = strides_in_order({2, 4, 7, 7, 9, 12 + gap}, {0, 1, 2, 3, 4, 5});
        run_and_check({shape, Layout::contiguous, dtype, pass}, strides);
        for (std::vector<int64_t>* repeated : {&strides.x, &strides.w, &strides.y})
          if (repeated != (pass == Pass::forward ? &strides.y : pass == Pass::grad_input ? &strides.x : &strides.w))
            (*repeated)[0] = 0;
        run_and_check({shape, Layout::contiguous, dtype, pass}, strides);
      }
}

// Also far from each other: the zeros beside a kernel must not meet an Inf.
void special_values() {
  int next = 0;
  for (const Case& shape : {Case{2, 16, 1, 8, 9, 7, 7, 1, 1, 3, 3}, Case{1, 32, 2, 14, 19, 7, 7, 1, 1, 3, 3},
                            Case{1, 16, 1, 19, 19, 7, 7, 2, 2, 3, 3}, Case{1, 16, 1, 12, 20, 3, 3, 1, 1, 1, 1},
                            Case{1, 32, 2, 12, 18, 5, 5, 2, 2, 2, 1}})
    for (const Pass pass : passes) {
      for (int mix = 0; mix < 8; ++mix)
        if (has_mix(mix, pass))
          run_and_check({shape, Layout::contiguous, mma_dtypes[++next % 2], pass, Values::special},
                        mixed_strides(shape, mix), uint64_t(next));
    }
}

void schedules_and_races() {
  for (const int mix : {7, 0, 5})
    for (const Pass pass : passes)
      for (const int64_t s : {1, 2}) {
        const Case shape{1, 64, 4, 9, 18, 7, 7, s, s, 3, 3};
        check_schedules(mma, {shape, Layout::contiguous, DType::bf16, pass}, mixed_strides(shape, mix));
        CHECK(emulator::statistics().matrix_loads > 0, "matrices were loaded");
      }
}

void refusals() {
  const Case good{1, 32, 2, 8, 8, 3, 3, 1, 1, 1, 1};
  check_usual_refusals(mma, good, DType::bf16, 4);
  check_refused(mma, good, DType::f32, Layout::contiguous, Pass::forward, "float16 or bfloat16, got float32");
  for (const Pass pass : passes) {
    const Problem problem = problem_of(good, DType::bf16, Device::cuda, mixed_strides(good, 2));
    CHECK(cuda::bool(cuda::mma_refusal(problem, pass)), "dense taps beside dense columns are refused");
  }
}

}  // namespace

int main() {
  kernels_and_strides();
  alignments();
  single_pixels();
  gaps();
  special_values();
  schedules_and_races();
  refusals();
  return checks::report("cuda mma");
}
