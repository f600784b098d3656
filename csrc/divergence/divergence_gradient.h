// Last pass: the gradient, from what the earlier passes left in scratch or from the logits again.
#pragma once

#include "divergence/divergence_fast.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

// How a row's terms are evaluated.
enum class Form { kForward, kLinear, kMixture, kProbability, kPower, kMath };

template <class S>
Form form_of(const RowKind<S>& c, DivergenceGroup group) {
  if (c.other == S(0)) {
    return c.reverse_kl == S(0) && c.entropy == S(0) ? Form::kForward : Form::kLinear;
  }
  if (sizeof(S) == 8) return Form::kMath;
  switch (group) {
    case DivergenceGroup::kMixture: return Form::kMixture;
    case DivergenceGroup::kProbability: return Form::kProbability;
    default: break;
  }
  const bool degenerate = c.alpha == S(0) || c.beta == S(0) || c.alpha + c.beta == S(0);
  return degenerate ? Form::kMath : Form::kPower;
}

template <Output Out, class V, class S>
RowTerms run_form(Form form, DivergenceGroup group, S* x, S* y, S* p, S* t, int64_t n,
                  const RowNumbers<S>& row) {
  switch (form) {
    case Form::kMixture:
      if constexpr (sizeof(S) == 4) return transform<MixtureForm, Out, V>(x, y, p, t, n, row);
      break;
    case Form::kProbability:
      if constexpr (sizeof(S) == 4) return transform<ProbabilityForm, Out, V>(x, y, p, t, n, row);
      break;
    case Form::kPower:
      if constexpr (sizeof(S) == 4) return transform<PowerForm, Out, V>(x, y, p, t, n, row);
      break;
    case Form::kMath:
      if (group == DivergenceGroup::kPower) {
        return transform<MathForm<DivergenceGroup::kPower>, Out, V>(x, y, p, t, n, row);
      }
      if constexpr (sizeof(S) == 8) {
        if (group == DivergenceGroup::kMixture) {
          return transform<MathForm<DivergenceGroup::kMixture>, Out, V>(x, y, p, t, n, row);
        }
        return transform<MathForm<DivergenceGroup::kProbability>, Out, V>(x, y, p, t, n, row);
      }
      break;
    case Form::kForward:
    case Form::kLinear: break;
  }
  return transform<LinearForm, Out, V>(x, y, p, t, n, row);
}

template <class V, class T>
KD_LANES void store_upto(T* out, V v, int64_t left) {
  if (left >= V::kLanes) {
    store(out, v);
  } else if (left > 0) {
    store_partial(out, v, left);
  }
}

// out[i] = value(i, V) for i in [0, n): value gives the lanes that start at i. `around_cache`: by
// non-temporal stores, which leave the cache to the logits and read nothing.
template <class V, class T, class Value>
KD_LANES void write_row(T* out, int64_t n, bool around_cache, const Value& value) {
  constexpr int64_t kLanes = V::kLanes, kPair = 2 * kLanes;
  int64_t i = 0;
  if (around_cache && reinterpret_cast<uintptr_t>(out) % sizeof(T) == 0) {
    const int64_t head = (-reinterpret_cast<uintptr_t>(out) & (kStreamAlignment - 1)) / sizeof(T);
    for (; i < head && i < n; i += kLanes) {
      const int64_t left = (head < n ? head : n) - i;
      store_upto(out + i, value(i), left);
    }
    i = head < n ? head : n;
    for (; i + kPair <= n; i += kPair) stream2(out + i, value(i), value(i + kLanes));
    stream_fence();
  } else {
    for (; i + kPair <= n; i += kPair) {
      const V first = value(i), second = value(i + kLanes);
      store(out + i, first);
      store(out + i + kLanes, second);
    }
  }
  for (; i < n; i += kLanes) store_upto(out + i, value(i), n - i);
}

template <class T>
void fill_row(T* out, int64_t begin, int64_t end, compute_t<T> number) {
  const T filled = cast<T>(number);
  for (int64_t i = begin; i < end; ++i) out[i] = filled;
}

// Cross entropy with the label at tau = 1, beside the divergence.
template <class S>
struct LabelTerm {
  int64_t index = -1;  // -1: no gradient
  S coefficient = 0;   // label_weight * factor
  S max = 0;           // z log2(e) - max, then minus lse: base-2 log-probability
  S lse = 0;
};

// Coefficients of the gradients: coefficient * (s - q centre).
template <class S>
struct GradientScale {
  S student = 0, teacher = 0;        // factor * slope / tau
  S centre_s = 0, centre_t = 0;
};

// Gradients of one row from the logits: any kind, either side, in place or not. Returns the sums of
// the gradients times u and v, for the temperatures.
template <class TS, class TT, class S>
void gradient_from_logits(const Side<TS>& z, const Side<TT>& a, const RowNumbers<S>& row, Form form,
                          DivergenceGroup group, const GradientScale<S>& scale,
                          const LabelTerm<S>& label, TS* grad_s, TT* grad_t, bool around_cache,
                          double* moment_s, double* moment_t) {
  using V = Lanes<TS>;
  constexpr S kLog2E = S(1.4426950408889634074);
  alignas(64) S x[kBlock], y[kBlock], p[kBlock], t[kBlock], soft[kBlock];
  const int64_t columns = z.columns > a.columns ? z.columns : a.columns;
  const bool both = grad_t != nullptr || moment_s != nullptr;
  // A side whose coefficient is 0 is written as 0: its terms may be infinite.
  const bool live_s = scale.student != S(0), live_t = scale.teacher != S(0);
  const V cs(scale.student), ct(scale.teacher), ms(scale.centre_s), mt(scale.centre_t);
  const V cl(label.coefficient);
  double sum_s = 0, sum_t = 0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t n = padded<V>((columns - begin < kBlock ? columns - begin : kBlock));
    for (int64_t i = 0; i < n; i += V::kLanes) {
      store(x + i, scaled_logits<V>(z, begin + i));
      store(y + i, scaled_logits<V>(a, begin + i));
      if (label.index >= 0) {
        const V logit = load_logits<V>(z.logits + begin + i, z.columns - begin - i);
        const V power = max(V(kDead), fms(logit, V(kLog2E), V(label.max))) - V(label.lse);
        store(soft + i, cl * exp2(power));
      }
    }
    if (both) {
      run_form<Output::kBoth, V>(form, group, x, y, p, t, n, row);
    } else {
      run_form<Output::kStudent, V>(form, group, x, y, p, t, n, row);
    }
    V along_s = V::zero(), along_t = V::zero();
    for (int64_t i = 0; i < n; i += V::kLanes) {
      V gs = live_s ? cs * fnma(V::load(x + i), ms, V::load(y + i)) : V::zero();
      if (both) {
        const V gt = live_t ? ct * fnma(V::load(p + i), mt, V::load(t + i)) : V::zero();
        store(t + i, gt);
        if (moment_s != nullptr) {  // the logits are still there: gradients are written below
          along_s = fma(gs, scaled_logits<V>(z, begin + i), along_s);
          along_t = fma(gt, scaled_logits<V>(a, begin + i), along_t);
        }
      }
      if (label.index >= 0) gs += V::load(soft + i);
      store(y + i, gs);
    }
    sum_s += reduce_add_double(along_s);
    sum_t += reduce_add_double(along_t);
    if (label.index >= begin && label.index < begin + n) y[label.index - begin] -= label.coefficient;
    const auto left = [&](int64_t end) { return end - begin < n ? end - begin : n; };
    if (grad_s != nullptr && left(z.columns) > 0) {
      write_row<V>(grad_s + begin, left(z.columns), around_cache,
                   [&](int64_t i) { return V::load(y + i); });
    }
    if (grad_t != nullptr && left(a.columns) > 0) {
      write_row<V>(grad_t + begin, left(a.columns), false,
                   [&](int64_t i) { return V::load(t + i); });
    }
  }
  if (moment_s != nullptr) *moment_s = sum_s;
  if (moment_t != nullptr) *moment_t = sum_t;
}

// Student gradient cx * x + cy * y from scratch, with the label's softmax where it is another one.
template <class T, class S>
void gradient_from_scratch(const S* x, const S* y, S cx, S cy, const Side<T>& z,
                           const LabelTerm<S>& label, T* out, bool around_cache) {
  using V = Lanes<T>;
  const V vx(cx), vy(cy);
  if (label.index < 0) {
    write_row<V>(out, z.columns, around_cache,
                 [&](int64_t i) { return fma(V::load(y + i), vy, V::load(x + i) * vx); });
    return;
  }
  const V log2e(S(1.4426950408889634074)), top(label.max), lse(label.lse), cl(label.coefficient);
  write_row<V>(out, z.columns, around_cache, [&](int64_t i) {
    const V logit = load_logits<V>(z.logits + i, z.columns - i);
    const V soft = exp2(max(V(kDead), fms(logit, log2e, top)) - lse);
    return fma(cl, soft, fma(V::load(y + i), vy, V::load(x + i) * vx));
  });
}

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
