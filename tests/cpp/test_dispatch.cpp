// The dispatch tables: which CUDA variant it takes, refusals, forced variants, and that each computes the same.
#include "pyinvolution/dispatch.h"

#include "cuda/variants.h"
#include "oracle.h"

namespace {

Problem problem(const Case& shape, DType dtype, Layout layout = Layout::contiguous) {
  return problem_of(shape, dtype, Device::cuda, strides_of(shape, layout, Pass::forward));
}

std::string chosen(const Problem& p, Pass pass) { return choose(p, pass).name; }

const Case rednet{2, 32, 2, 10, 17, 7, 7, 1, 1, 3, 3};
const Case dilated{1, 32, 2, 10, 17, 7, 7, 1, 1, 6, 6, 2, 2};
const Case small{1, 2, 2, 8, 8, 3, 3, 1, 1, 1, 1};
const Case far{1, 8, 1, 8, 8, 3, 3, 1, 1, 300, 300, 300, 300};

void choices() {
  for (const Pass pass : passes) {
    for (const DType dtype : {DType::f32, DType::f16, DType::bf16})
      for (const Layout layout : {Layout::contiguous, Layout::channels_last})
        CHECK(chosen(problem(rednet, dtype, layout), pass) != "generic", "a layer of RedNet has a kernel of its own");
    for (const Layout layout : {Layout::contiguous, Layout::channels_last})
      CHECK(chosen(problem(rednet, DType::bf16, layout), pass) == "mma", "16 bits are for the tensor cores");
    CHECK(chosen(problem(rednet, DType::f32, Layout::channels_last), pass) == "tiled", "float with dense taps is not");
    CHECK(chosen(problem(rednet, DType::f32), pass) == "sliding", "float with dense columns is for the sliding window");
    CHECK(chosen(problem(rednet, DType::f64), pass) == "sliding", "so is double");
    CHECK(chosen(problem(dilated, DType::bf16), pass) == "sliding", "so is dilation");
    CHECK(chosen(problem(small, DType::f32), pass) == "generic", "little work is for the generic kernel");
    CHECK(chosen(problem(far, DType::f32), pass) == "generic", "so is what does not fit into shared memory");
  }
}

void verdicts() {
  const auto verdicts = explain(problem(dilated, DType::f32), Pass::forward);
  int chosen = 0, refused = 0;
  std::vector<std::string> names, known;
  for (const std::string& name : variants())
    if (name.rfind("cuda/", 0) == 0) known.push_back(name);
  for (const Verdict& verdict : verdicts) {
    chosen += verdict.chosen;
    refused += !verdict.refusal.empty();
    CHECK(!(verdict.chosen && !verdict.refusal.empty()), "what refuses is not chosen");
    names.emplace_back(std::string("cuda/") + verdict.variant);
  }
  CHECK(names == known, "the variants of the problem's device, in order");
  CHECK(chosen == 1 && refused > 0, "one is chosen, others say why not");
  CHECK(std::string(verdicts.back().variant) == "generic" && verdicts.back().refusal.empty(),
        "the last one takes everything");
}

void spans() {
  SpanProblem span{};
  span.involution = problem(rednet, DType::bf16, Layout::channels_last);
  span.reduced = 16;
  std::copy_n(strides_in_order({2, 16, 10, 17}, {0, 2, 3, 1}).begin(), 4, span.reduced_stride);
  span.span_stride[0] = 16, span.span_stride[1] = 1;
  const auto chosen = [&](SpanOp pass) { return std::string(choose(span, pass).name); };
  CHECK(chosen(SpanOp::forward) == "fused", "a layer of RedNet is fused");
  CHECK(chosen(SpanOp::backward) == "fused", "and so are its gradients");
  const SpanVariant& fused = choose(span, SpanOp::backward);
  CHECK(fused.scratch != nullptr && fused.scratch(span, SpanOp::backward) > 0, "which need scratch memory");
  CHECK(fused.scratch(span, SpanOp::forward) == 0, "the result does not");
  span.involution.dtype = DType::f32;
  CHECK(chosen(SpanOp::forward) == "composed", "float is not");
}

void forced() {
  for (const std::string& name : variants()) {
    if (name.rfind("cuda/", 0) != 0) continue;
    force_variant(name);
    for (const Pass pass : passes) {
      Setting setting({rednet, Layout::channels_last, DType::bf16, pass}, Device::cuda);
      run(setting.problem, pass, setting.buffers(), {});
      setting.check();
      CHECK("cuda/" + chosen(setting.problem, pass) == name, "the forced variant runs: " + name);
    }
    if (name == "cuda/generic") continue;
    const std::string message = checks::message_of([] { choose(problem(far, DType::f64), Pass::forward); });
    CHECK(message.find(name) != std::string::npos, "a forced variant that refuses is named: " + message);
  }
  force_variant("");
  CHECK(!checks::message_of([] { force_variant("cuda/unheard-of"); }).empty(), "an unknown variant is an error");
}

void empty() {
  Case shape = rednet;
  shape.n = 0;
  run(problem(shape, DType::f32), Pass::forward, {}, {});
  shape = rednet, shape.h = 2, shape.ph = 0;
  run(problem(shape, DType::f32), Pass::forward, {}, {});
  Setting setting({shape, Layout::contiguous, DType::f32, Pass::grad_input}, Device::cuda);
  run(setting.problem, Pass::grad_input, setting.buffers(), {});
  setting.check();
}

}  // namespace

int main() {
  choices();
  verdicts();
  spans();
  forced();
  empty();
  return checks::report("dispatch");
}
