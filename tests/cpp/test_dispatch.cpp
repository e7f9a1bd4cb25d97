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
  SpanProblem wide = span;
  wide.reduced = 64;
  for (const int axis : {0, 2, 3}) wide.reduced_stride[axis] *= 4;
  wide.span_stride[0] = 64;
  CHECK(std::string(choose(wide, SpanOp::backward).name) == "composed", "gradients of a large span are composed");
  CHECK(route(wide, SpanOp::forward) == Route::span && route(wide, SpanOp::forward, true) == Route::unfused,
        "so is what they follow");
  CHECK(scratch_bytes(wide, SpanOp::backward) > 0, "without tensors, the kernel runs nevertheless");
  force_variant("fused");
  CHECK(std::string(choose(wide, SpanOp::backward).name) == "fused", "and where it is forced");
  force_variant("");
  span.reduce_stride[0] = span.involution.channels, span.reduce_stride[1] = 1;
  CHECK(chosen(SpanOp::layer) == "fused" && route(span, SpanOp::layer) == Route::layer, "and so is R, in one kernel");
  span.reduce_stride[1] = 2;
  CHECK(chosen(SpanOp::layer) == "composed" && route(span, SpanOp::layer) == Route::span, "from dense rows only");
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

void disabled() {
  const Problem p = problem(rednet, DType::bf16, Layout::channels_last);
  disable_variants("mma, cuda/tiled");
  CHECK(disabled_variants() == "cuda/mma,cuda/tiled", "names are qualified: " + disabled_variants());
  CHECK(chosen(p, Pass::forward) == "generic", "the next best runs");
  CHECK(explain(p, Pass::forward).front().refusal == "requires that PYINVOLUTION_DISABLE does not name it",
        "the reason is named");
  force_variant("mma");
  CHECK(checks::message_of([&] { choose(p, Pass::forward); }).find("PYINVOLUTION_DISABLE") != std::string::npos,
        "what is disabled cannot be forced");
  force_variant("");
  disable_variants("mma,tiled,generic");
  const std::string message = checks::message_of([&] { choose(p, Pass::forward); });
  CHECK(message.find("generic: requires that PYINVOLUTION_DISABLE") != std::string::npos, "none is left: " + message);
  CHECK(!checks::message_of([] { disable_variants("mmaa"); }).empty(), "an unknown variant is an error");
  CHECK(disabled_variants() == "cuda/mma,cuda/tiled,cuda/generic", "and changes nothing");
  disable_variants("");
  CHECK(chosen(p, Pass::forward) == "mma", "nothing is disabled any more");
}

void measured() {
  const Problem p = problem(rednet, DType::bf16, Layout::channels_last);
  Problem other = p;
  other.batch = 3;
  const std::string text = describe(p, Pass::forward);
  CHECK(text != describe(other, Pass::forward) && text != describe(p, Pass::grad_input), "problems are told apart");
  CHECK(keep_choice(text, "generic") && chosen(p, Pass::forward) == "mma", "nothing is taken while autotune is off");
  autotune(true);
  CHECK(chosen(p, Pass::forward) == "generic" && candidates(p, Pass::forward).empty(), "what is kept is taken");
  for (const Verdict& verdict : explain(p, Pass::forward))
    CHECK(verdict.measured == (std::string(verdict.variant) == "generic") && verdict.chosen == verdict.measured,
          "and explained");
  CHECK(chosen(other, Pass::forward) == "mma" && candidates(other, Pass::forward).size() == 4, "only for its problem");
  CHECK(keep_choice(text, "tiled") && chosen(p, Pass::forward) == "generic", "a choice stays");
  disable_variants("generic");
  CHECK(chosen(p, Pass::forward) == "mma", "unless it is disabled");
  CHECK(keep_choice(text, "tiled") && chosen(p, Pass::forward) == "tiled", "and another one takes its place");
  disable_variants("");
  Problem wide = p;
  wide.dtype = DType::f64;
  CHECK(keep_choice(describe(wide, Pass::forward), "mma") && chosen(wide, Pass::forward) != "mma",
        "a variant that refuses the problem is never taken");
  for (const char* wrong :
       {"", "involution2d", "involution2d forward: 0", "involution2d forward: 0 0 1 x", "other: 1 2 3"})
    CHECK(!keep_choice(wrong, "generic"), std::string("not a problem: ") + wrong);
  CHECK(!keep_choice(text, "fast") && !keep_choice(text, "scalar"), "not a variant of its device");
  forget_choices();
  CHECK(chosen(p, Pass::forward) == "mma", "forgotten");
  autotune(false);
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
  disabled();
  measured();
  empty();
  return checks::report("dispatch");
}
