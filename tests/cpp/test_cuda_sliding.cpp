// The CUDA variant `sliding` in the emulator: kernels, strides, dilations, widths of groups, layouts and dtypes; every
// schedule gives the same bits; each removed synchronisation is noticed.
#include "cuda/variants.h"

#include "variant.h"

namespace {

constexpr CudaVariant sliding{cuda::sliding_refusal, cuda::sliding_run};

void run_and_check(const Trial& trial, uint64_t seed = 1) {
  run_and_check(sliding, trial, strides_of(trial.shape, trial.layout, trial.pass), seed);
}

// Every parameter class in every layout, each dtype in its turn.
void parameters() {
  int next = 0;
  std::vector<Case> all = basic_cases();
  for (const Case& shape : random_cases(40, 5)) all.push_back(shape);
  for (const Case& shape : all)
    for (const Layout layout : layouts)
      for (const Pass pass : passes) {
        if (shape.n == 0 || shape.out_h() == 0 || shape.out_w() == 0) continue;
        run_and_check({shape, layout, dtypes[++next % 4], pass}, uint64_t(next));
      }
}

// What networks have: one group, a group for each few channels, large kernels, many small images.
void networks() {
  int next = 0;
  for (const Case& shape : {
           Case{1, 3, 1, 30, 37, 7, 7, 1, 1, 3, 3},
           Case{1, 40, 1, 9, 13, 3, 3, 1, 1, 1, 1},
           Case{1, 20, 1, 14, 14, 7, 7, 1, 1, 3, 3},
           Case{2, 6, 6, 17, 36, 7, 7, 1, 1, 3, 3},
           Case{1, 8, 4, 20, 20, 5, 5, 2, 2, 2, 2},
           Case{2, 8, 2, 15, 40, 7, 7, 2, 2, 3, 3},
           Case{9, 24, 2, 11, 11, 3, 3, 1, 1, 1, 1},
           Case{5, 9, 3, 13, 13, 5, 5, 1, 1, 2, 2},
           Case{33, 4, 2, 5, 5, 3, 3, 1, 1, 1, 1},
           Case{1, 4, 1, 12, 34, 15, 15, 1, 1, 7, 7},
           Case{1, 2, 2, 24, 20, 21, 21, 1, 1, 10, 10},
           Case{1, 4, 1, 40, 9, 31, 3, 1, 1, 15, 1},
           Case{1, 16, 2, 19, 21, 3, 3, 1, 1, 3, 3, 3, 3},
           Case{1, 3, 3, 40, 70, 3, 3, 1, 1, 12, 12, 12, 12},
           Case{2, 32, 2, 8, 70, 7, 7, 1, 1, 3, 3},
           Case{1, 8, 1, 21, 22, 3, 5, 4, 4, 1, 2, 2, 3},
       })
    for (const Layout layout : {Layout::contiguous, Layout::channels_last})
      for (const Pass pass : passes) run_and_check({shape, layout, dtypes[++next % 4], pass}, uint64_t(next));
}

// Classes by the dilation: paddings that are multiples of it and others, classes with a pixel less than the first and without
// any, windows outside the image, dilations that differ.
void dilated() {
  int next = 0;
  for (const Case& shape : {
           Case{2, 16, 2, 14, 15, 3, 3, 1, 1, 2, 2, 2, 2},
           Case{1, 40, 1, 13, 21, 5, 5, 1, 1, 5, 7, 3, 4},
           Case{1, 8, 4, 9, 13, 7, 7, 1, 1, 6, 5, 2, 2},
           Case{3, 6, 3, 5, 6, 3, 3, 1, 1, 7, 9, 7, 8},
           Case{1, 3, 1, 20, 37, 5, 3, 1, 1, 16, 0, 8, 1},
           Case{1, 12, 2, 6, 40, 3, 7, 1, 1, 1, 18, 1, 6},
           Case{1, 8, 2, 10, 9, 3, 3, 1, 1, 21, 30, 16, 17},
           Case{1, 4, 1, 3, 4, 3, 3, 1, 1, 300, 60, 300, 60},
       })
    for (const Layout layout : layouts)
      for (const Pass pass : passes) run_and_check({shape, layout, dtypes[++next % 4], pass}, uint64_t(next));
}

// Whether it leaves a shifted border to `generic`.
bool leaves(const Case& shape, Pass pass) {
  return (shape.sh > 1 && (shape.dh > 1 || pass == Pass::grad_input)) ||
         (shape.sw > 1 && (shape.dw > 1 || pass == Pass::grad_input));
}

// Windows that a border shifts: whole images and tiles, one window in an axis, classes with a pixel less than the first.
std::vector<Case> windows_inside() {
  constexpr Border shift = Border::shift;
  std::vector<Case> all{
      {1, 32, 2, 14, 14, 7, 7, 1, 1, 0, 0, 1, 1, shift}, {1, 32, 2, 14, 14, 13, 13, 1, 1, 0, 0, 1, 1, shift},
      {1, 32, 1, 22, 38, 7, 7, 1, 1, 0, 0, 1, 1, shift}, {2, 16, 1, 56, 14, 7, 7, 1, 1, 0, 0, 8, 2, shift},
      {9, 28, 2, 7, 7, 5, 7, 1, 1, 0, 0, 1, 1, shift},   {1, 3, 1, 19, 70, 4, 6, 1, 1, 0, 0, 1, 1, shift},
      {1, 2, 2, 40, 12, 3, 3, 1, 1, 0, 0, 1, 4, shift},  {1, 6, 3, 23, 33, 3, 5, 1, 1, 0, 0, 3, 5, shift},
      {1, 8, 1, 17, 40, 5, 5, 2, 3, 0, 0, 1, 1, shift},  {1, 20, 1, 12, 21, 1, 1, 1, 1, 0, 0, 3, 2, shift},
      {1, 4, 1, 40, 2, 31, 2, 1, 1, 0, 0, 1, 1, shift},  {2, 16, 4, 12, 16, 7, 7, 1, 1, 0, 0, 1, 1, shift},
  };
  for (const Case& shape : shifted_cases()) all.push_back(shape);
  for (Case shape : random_cases(60, 11)) {
    shape.border = shift, shape.ph = shape.pw = 0;
    shape.h = shape.kh * shape.dh + shape.h - 1, shape.w = shape.kw * shape.dw + shape.w - 1;
    all.push_back(shape);
  }
  return all;
}

void shifted() {
  int next = 0;
  for (const Case& shape : windows_inside())
    for (const Layout layout : layouts)
      for (const Pass pass : passes) {
        if (shape.out_h() == 0 || shape.out_w() == 0) continue;
        if (leaves(shape, pass))
          check_refused(sliding, shape, DType::f32, layout, pass, "stride of 1");
        else
          run_and_check({shape, layout, dtypes[++next % 4], pass}, uint64_t(next));
      }
}

// Layouts that differ between the tensors, and channels_last memory whose rows are not aligned to vectors.
void mixed_layouts() {
  for (int mix = 0; mix < 32; ++mix)
    for (const Pass pass : passes) {
      const int64_t s = 1 + mix / 16;
      const Case shape{2, 16, 2, 9, 16, 5, 5, s, s, 2, 2};
      Strides strides = mixed_strides(shape, mix);
      if (mix & 8) {
        strides.x = strides_in_order({2, 19, 9, 16}, {0, 2, 3, 1});
        strides.y = strides_in_order({2, 17, 9, 16}, {0, 2, 3, 1});
      }
      run_and_check(sliding, {shape, Layout::contiguous, dtypes[mix % 4], pass}, strides, uint64_t(mix));
    }
}

void special_values() {
  for (const Case& shape :
       {Case{2, 4, 2, 8, 9, 3, 3, 1, 1, 1, 1}, Case{1, 16, 1, 9, 9, 7, 7, 2, 2, 3, 3},
        Case{1, 6, 2, 8, 6, 5, 5, 2, 2, 2, 1}, Case{3, 3, 3, 5, 5, 3, 3, 1, 1, 2, 2, 2, 2},
        Case{1, 12, 1, 5, 17, 7, 7, 1, 1, 3, 3}, Case{1, 12, 1, 8, 17, 7, 7, 1, 1, 0, 0, 1, 1, Border::shift},
        Case{1, 4, 2, 12, 11, 3, 4, 1, 1, 0, 0, 3, 2, Border::shift}})
    for (const Layout layout : {Layout::contiguous, Layout::channels_last})
      for (const Pass pass : passes)
        for (uint64_t seed = 1; seed <= 4; ++seed)
          run_and_check({shape, layout, dtypes[seed % 4], pass, Values::special}, seed);
}

void schedules_and_races() {
  for (const DType dtype : {DType::f32, DType::bf16})
    for (const Layout layout : {Layout::contiguous, Layout::channels_last})
      for (const Pass pass : passes)
        for (const Case& shape : {Case{1, 16, 4, 10, 17, 5, 5, 1, 1, 2, 2}, Case{1, 16, 4, 10, 17, 5, 5, 2, 2, 2, 2},
                                  Case{1, 16, 4, 10, 17, 5, 5, 1, 1, 3, 4, 2, 3},
                                  Case{1, 16, 4, 10, 17, 5, 5, 1, 1, 0, 0, 1, 2, Border::shift}})
          check_schedules(sliding, {shape, layout, dtype, pass}, strides_of(shape, layout, pass));
}

void refusals() {
  const Case good{1, 32, 2, 8, 8, 3, 3, 1, 1, 1, 1};
  const auto refused = [&](const std::function<void(Case&)>& change, const char* part, Pass pass = Pass::forward) {
    Case shape = good;
    change(shape);
    check_refused(sliding, shape, DType::f32, Layout::contiguous, pass, part);
  };
  refused([](Case& k) { k.h = 2, k.ph = 0; }, "with pixels", Pass::grad_input);
  refused([](Case& k) { k.h = k.w = 40000; }, "32 bits");
  refused([](Case& k) { k.sh = 5; }, "stride of at most 4 (vertical and horizontal), got 5 x 1", Pass::grad_input);
  refused([](Case& k) { k.dh = k.dw = k.ph = k.pw = 300, k.sh = k.sw = 2; },
          "shared memory (reach of the kernel), got 601 x 601");
}

// What it leaves to others although it can run it.
void slower() {
  const auto left = [](const Case& shape, Layout layout, Pass pass) {
    const Problem problem = problem_of(shape, DType::f32, Device::cuda, strides_of(shape, layout, pass));
    return cuda::sliding_slower(problem, pass).text();
  };
  const Case narrow{1, 8, 2, 40, 40, 7, 7, 1, 1, 3, 3}, little{1, 4, 2, 9, 9, 3, 3, 1, 1, 1, 1};
  Case large = little;
  large.h = large.w = 40;
  for (const Pass pass : passes) {
    CHECK(left(narrow, Layout::contiguous, pass).empty(), "it runs narrow groups");
    CHECK(left(large, Layout::contiguous, pass).empty(), "in large images with few taps, too");
    CHECK(left(little, Layout::contiguous, pass).find("1024 pixels, got 18") != std::string::npos, "small images");
    CHECK(left(large, Layout::channels_last, pass).find("dense, got 18") != std::string::npos, "few dense taps");
    CHECK(left({1, 32, 2, 9, 9, 3, 3, 1, 1, 1, 1}, Layout::channels_last, pass).size() > 0, "what tiled takes");
    const Case shifted{1, 32, 2, 9, 9, 3, 3, 1, 1, 0, 0, 1, 1, Border::shift};
    CHECK(left(shifted, Layout::channels_last, pass).empty(), "shifted borders, which tiled does not take");
    Case narrowest = shifted;
    narrowest.g = 16;
    CHECK(left(narrowest, Layout::contiguous, pass).empty() == (pass == Pass::grad_weight), "with enough channels");
  }
  CHECK(left(narrow, Layout::channels_last, Pass::forward).empty(), "dense taps");
  CHECK(left(narrow, Layout::channels_last, Pass::grad_input).find("16 channels") != std::string::npos, "grad_input");
  // With a dilation, the pixels below a tile are those of one class.
  const Case dilated{1, 32, 4, 40, 40, 7, 7, 1, 1, 6, 6, 2, 2};
  Case narrower = dilated;
  narrower.g = 8;
  CHECK(left(dilated, Layout::channels_last, Pass::grad_input).empty(), "classes of a dilation");
  CHECK(left(narrower, Layout::channels_last, Pass::grad_input).find("8 channels") != std::string::npos,
        "which are not for the narrowest groups");
  Case strided = dilated;
  strided.sh = strided.sw = 2;
  CHECK(left(strided, Layout::channels_last, Pass::grad_input).find("16 channels") != std::string::npos,
        "a stride has no classes");
}

}  // namespace

int main() {
  parameters();
  networks();
  dilated();
  shifted();
  mixed_layouts();
  special_values();
  schedules_and_races();
  refusals();
  slower();
  return checks::report("cuda sliding");
}
