// The dispatch tables: which CUDA variant it takes, refusals, forced variants, and that each computes the same.
#include "pyinvolution/dispatch.h"

#include <algorithm>
#include <functional>

#include "cuda/variants.h"
#include "oracle.h"
#include "pyinvolution/involution.h"

namespace {

Problem problem(const Case& shape, DType dtype, Layout layout = Layout::contiguous) {
  return problem_of(shape, dtype, Device::cuda, strides_of(shape, layout, Pass::forward));
}

std::string chosen(const Problem& p, Pass pass) { return choose(p, pass).name; }

const Case rednet{2, 32, 2, 10, 17, 7, 7, 1, 1, 3, 3};
const Case dilated{1, 32, 2, 10, 17, 7, 7, 1, 1, 6, 6, 2, 2};
const Case small{1, 2, 2, 8, 8, 3, 3, 1, 1, 1, 1};
const Case far{1, 8, 1, 8, 8, 3, 3, 2, 2, 300, 300, 300, 300};

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
    for (const Layout layout : {Layout::contiguous, Layout::channels_last})
      CHECK(chosen(problem(dilated, DType::bf16, layout), pass) == "sliding", "so is dilation");
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

// Kernels without upsampling run once for each phase; the generic one takes what would be a sum over phases.
void phases() {
  const Case shape{2, 32, 2, 5, 9, 5, 5, 1, 1, 2, 2, 1, 1, Border::zeros, 2, 2};
  Case many = shape;
  many.uh = many.uw = 8;
  for (const Layout layout : {Layout::contiguous, Layout::channels_last}) {
    for (const DType dtype : {DType::f32, DType::bf16}) {
      CHECK(chosen(problem(shape, dtype, layout), Pass::grad_input) == "generic", "no kernel sums phases");
      CHECK(chosen(problem(many, dtype, layout), Pass::forward) == "generic", "nor is one launched for 64 phases");
      for (const Pass pass : passes) {
        Setting setting({shape, layout, dtype, pass}, Device::cuda);
        int ran = 0;
        for (const Verdict& verdict : explain(setting.problem, pass)) {
          if (!verdict.refusal.empty() && verdict.refusal.find("least 24 products") == std::string::npos) continue;
          force_variant(std::string("cuda/") + verdict.variant);
          setting.written().poison();
          run(setting.problem, pass, setting.buffers(), {});
          setting.check();
          ++ran;
        }
        force_variant("");
        CHECK(pass == Pass::grad_input ? ran == 1 : ran > 1, "more than the generic kernel run phases, but for sums");
      }
    }
  }
  CHECK(chosen(problem(shape, DType::bf16, Layout::channels_last), Pass::forward) == "mma",
        "the best kernel of a phase");
}

void borders() {
  Case shape = rednet;
  shape.ph = shape.pw = 0;
  shape.border = Border::shift;
  for (const Pass pass : passes) {
    const auto verdicts = explain(problem(shape, DType::bf16, Layout::channels_last), pass);
    CHECK(verdicts.front().refusal == "requires a border of zeros, got shift", verdicts.front().refusal);
    CHECK(chosen(problem(shape, DType::bf16, Layout::channels_last), pass) == "sliding",
          "another kernel moves windows");
    CHECK(verdicts.back().refusal.empty(), "the last one takes every border");
  }
  Problem p = problem(shape, DType::f32);
  std::vector<std::string> texts;
  for (const auto& change : std::vector<std::function<void(Problem&)>>{
           [](Problem&) {}, [](Problem& q) { q.border = Border::zeros; }, [](Problem& q) { q.upsample_h = 2; },
           [](Problem& q) { q.upsample_w = 2; }}) {
    Problem other = p;
    change(other);
    texts.push_back(describe(other, Pass::forward));
  }
  std::sort(texts.begin(), texts.end());
  CHECK(std::adjacent_find(texts.begin(), texts.end()) == texts.end(), "borders and upsamplings are told apart");
  for (const auto& [change, part] : std::vector<std::pair<std::function<void(Problem&)>, const char*>>{
           {[](Problem& q) { q.padding_h = 1; }, "padding_h is 1, expected 0"},
           {[](Problem& q) { q.in_w = 6, q.out_w = 6; }, "in_w is 6, expected at least kernel_w * dilation_w"},
           {[](Problem& q) { q.upsample_h = 0; }, "upsample_h is 0, expected at least 1"},
           {[](Problem& q) { q.upsample_w = 2, q.stride_w = 2; }, "stride_w is 2, expected 1"},
           {[](Problem& q) { q.border = Border(2); }, "border is 2, expected zeros or shift"},
           {[](Problem& q) { q.out_h = 4; }, "out_h is 4, expected 10"}}) {
    Problem wrong = p;
    change(wrong);
    const std::string message = checks::message_of([&, w = wrong] { validate(w); });
    CHECK(message.find(part) != std::string::npos, message);
  }
  SpanProblem span{};
  span.involution = p, span.reduced = 4;
  CHECK(checks::message_of([&] { validate(span, SpanOp::forward); }).find("border") != std::string::npos,
        "kernels from a span have a border of zeros");
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
  phases();
  borders();
  disabled();
  measured();
  empty();
  return checks::report("dispatch");
}
