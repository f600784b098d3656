// Last pass: the gradient, from what the earlier passes left in scratch or from the logits again.
#pragma once

#include "divergence/divergence_exact.h"

namespace kd {
namespace KDK_ISA_NAMESPACE {

template <class V, class T>
KD_LANES void store_upto(T* out, V v, int64_t left) {
  if (left >= V::kLanes) {
    store(out, v);
  } else if (left > 0) {
    store_partial(out, v, left);
  }
}

// out[i] = value(i, V) for i in [0, n): value gives the lanes that start at i. `around_cache`: by
// non-temporal stores, which leave the cache to the logits and read nothing; stream_fence() after
// the last one is the caller's.
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

// Where the student gradient of a row goes: to the row's gradient or, of a sum of several parts,
// into a row in the compute type that stays in the cache, until the last part writes the sum,
// rounded once.
template <class T>
struct GradientTarget {
  using S = compute_t<T>;
  T* out = nullptr;
  S* sum = nullptr;    // null: a plain call. A vector longer than the row
  bool holds = false;  // earlier parts have left something in sum
  bool last = true;
  bool around_cache = false;

  bool streams() const { return last && around_cache; }

  // Entries [begin, begin + n) get value(i, V) for i in [0, n), beside what earlier parts gave.
  template <class V, class Value>
  KD_LANES void write(int64_t begin, int64_t n, const Value& value) const {
    const auto added = [&](int64_t i) { return V::load(sum + (begin + i)) + value(i); };
    if constexpr (sizeof(T) == sizeof(S)) {  // out and sum are of one type
      T* const to = last ? out : sum;
      holds ? write_row<V>(to + begin, n, streams(), added)
            : write_row<V>(to + begin, n, streams(), value);
    } else if (last) {
      holds ? write_row<V>(out + begin, n, around_cache, added)
            : write_row<V>(out + begin, n, around_cache, value);
    } else {
      holds ? write_row<V>(sum + begin, n, false, added)
            : write_row<V>(sum + begin, n, false, value);
    }
  }

  S before(int64_t index) const { return holds ? sum[index] : S(0); }
  void put(int64_t index, S number) const {
    if (last) {
      out[index] = cast<T>(number);
    } else {
      sum[index] = number;
    }
  }
};

// Cross entropy with the label at tau = 1, beside the divergence.
template <class S>
struct LabelTerm {
  bool active = false;
  int64_t index = -1;  // of the one-hot; -1: its logit is impossible, which has no gradient
  S coefficient = 0;   // label_weight * factor
  S max = 0;           // z log2(e) - max, then minus lse: base-2 log-probability
  S lse = 0;
};

// coefficient * softmax(z) of n entries from `begin` on.
template <class V, class T, class S>
void label_block(const Side<T>& z, int64_t begin, int64_t n, const LabelTerm<S>& label, S* out) {
  for (int64_t i = 0; i < n; i += V::kLanes) {
    const V logit = load_logits<V>(z.logits + begin + i, z.columns - begin - i);
    const V power = max(V(kDead), fms(logit, V(S(kLog2E)), V(label.max))) - V(label.lse);
    store(out + i, V(label.coefficient) * exp2(power));
  }
}

// Coefficients of the gradients: coefficient * (s - q centre).
template <class S>
struct GradientScale {
  S student = 0, teacher = 0;  // factor * slope / tau
  S centre_s = 0, centre_t = 0;
};

// Gradients of one row from the logits: any kind, either side, in place or not. If asked, the sums
// of the gradients times u and v, for the temperatures.
template <class TS, class TT, class S>
void gradient_from_logits(const Side<TS>& z, const Side<TT>& a, const RowNumbers<S>& row,
                          DivergenceGroup group, const GradientScale<S>& scale,
                          const LabelTerm<S>& label, const GradientTarget<TS>& grad_s, TT* grad_t,
                          double* moment_s, double* moment_t) {
  using V = Lanes<TS>;
  // s is stored from behind an unaligned head: a vector may start at its last entry.
  alignas(64) S q[kBlock], s[kBlock + V::kLanes], p[kBlock], t[kBlock], soft[kBlock];
  const int64_t columns = z.columns > a.columns ? z.columns : a.columns;
  const Entries<TS, TT> entries(z, a, row);
  const bool both = grad_t != nullptr || moment_s != nullptr;
  // A side whose coefficient is 0 is written as 0: its terms may be infinite.
  const bool live_s = scale.student != S(0), live_t = scale.teacher != S(0);
  const V cs(scale.student), ct(scale.teacher), ms(scale.centre_s), mt(scale.centre_t);
  double sum_s = 0, sum_t = 0;
  for (int64_t begin = 0; begin < columns; begin += kBlock) {
    const int64_t n = padded<V>(columns - begin < kBlock ? columns - begin : kBlock);
    if (label.active) label_block<V>(z, begin, n, label, soft);
    entries.load(begin, n, q, s, p);
    with_group(group,
               [&](auto tag) { transform_block<decltype(tag)::value, V>(q, s, p, t, n, row); });
    V along_s = V::zero(), along_t = V::zero();
    for (int64_t i = 0; i < n; i += V::kLanes) {
      V gs = live_s ? cs * fnma(V::load(q + i), ms, V::load(s + i)) : V::zero();
      if (both) {
        const V gt = live_t ? ct * fnma(V::load(p + i), mt, V::load(t + i)) : V::zero();
        store(t + i, gt);
        if (moment_s != nullptr) {  // the logits are still there: gradients are written below
          along_s = fma(gs, scaled_logits<V>(z, begin + i), along_s);
          along_t = fma(gt, scaled_logits<V>(a, begin + i), along_t);
        }
      }
      if (label.active) gs += V::load(soft + i);
      store(s + i, gs);
    }
    sum_s += reduce_add_double(along_s);
    sum_t += reduce_add_double(along_t);
    if (label.index >= begin && label.index < begin + n)
      s[label.index - begin] -= label.coefficient;
    const auto left = [&](int64_t end) { return end - begin < n ? end - begin : n; };
    if (grad_s.out != nullptr && left(z.columns) > 0) {
      grad_s.template write<V>(begin, left(z.columns), [&](int64_t i) { return V::load(s + i); });
    }
    if (grad_t != nullptr && left(a.columns) > 0) {
      write_row<V>(grad_t + begin, left(a.columns), false,
                   [&](int64_t i) { return V::load(t + i); });
    }
  }
  if (grad_s.streams()) stream_fence();
  if (moment_s != nullptr) *moment_s = sum_s;
  if (moment_t != nullptr) *moment_t = sum_t;
}

// What a student gradient from scratch is multiplied from: cx x + cy y, or with x = 2^u and y = v -
// u for reverse KL x (cx + cy y + cr 2^y).
template <class S>
struct ScratchGradient {
  S cx = 0, cy = 0, cr = 0;
  bool product = false;
};

// Entries [begin, begin + n) of a student gradient from scratch.
template <class T, class S, class Value>
KD_LANES void write_with_label(const Side<T>& z, int64_t begin, int64_t n,
                               const LabelTerm<S>& label, const GradientTarget<T>& to,
                               const Value& value) {
  using V = Lanes<T>;
  if (!label.active) return to.template write<V>(begin, n, value);
  // The label's softmax is at another temperature, so not in scratch.
  const V log2e(static_cast<S>(kLog2E)), top(label.max), lse(label.lse), cl(label.coefficient);
  const T* const logits = z.logits + begin;
  const int64_t left = z.columns - begin;
  to.template write<V>(begin, n, [&](int64_t i) {
    const V logit = load_logits<V>(logits + i, left - i);
    const V soft = exp2(max(V(kDead), fms(logit, log2e, top)) - lse);
    return fma(cl, soft, value(i));
  });
}

template <class T, class S>
void gradient_from_scratch(const S* x, const S* y, const ScratchGradient<S>& c, const Side<T>& z,
                           int64_t begin, int64_t end, const LabelTerm<S>& label,
                           const GradientTarget<T>& to) {
  using V = Lanes<T>;
  const V cx(c.cx), cy(c.cy), cr(c.cr);
  const int64_t n = end - begin;
  x += begin;
  y += begin;
  if (!c.product) {
    write_with_label(z, begin, n, label, to,
                     [&](int64_t i) { return fma(V::load(y + i), cy, V::load(x + i) * cx); });
  } else if (c.cr == S(0)) {
    write_with_label(z, begin, n, label, to,
                     [&](int64_t i) { return V::load(x + i) * fma(V::load(y + i), cy, cx); });
  } else {
    write_with_label(z, begin, n, label, to, [&](int64_t i) {
      const V d = V::load(y + i);
      return V::load(x + i) * fma(cr, exp2(d), fma(d, cy, cx));
    });
  }
}

// The student gradient of the row whose terms lie in scratch. It is written block by block while
// the next statistics (of the next row, or of the row's next part) take the scratch over: each
// block is then read and overwritten while it is in the nearest cache, and the memory reads logits
// while it writes gradients.
template <class T>
class PendingGradient {
  using S = compute_t<T>;

 public:
  // Everything pointed to stays as it is until finish().
  void start(const S* x, const S* y, const ScratchGradient<S>& from, const Side<T>& z,
             const LabelTerm<S>& label, const GradientTarget<T>& to) {
    x_ = x;
    y_ = y;
    from_ = from;
    z_ = z;
    label_ = label;
    to_ = to;
    done_ = 0;
    replaced_ = -1;
  }

  // The entry `index` gets `value` instead of what scratch says.
  void replace(int64_t index, S value) {
    replaced_ = index;
    replacement_ = to_.before(index) + value;
  }

  // Entries below `end`; afterwards that part of the scratch is free.
  void write_upto(int64_t end) {
    if (end > z_.columns) end = z_.columns;
    if (done_ >= end) return;
    gradient_from_scratch(x_, y_, from_, z_, done_, end, label_, to_);
    done_ = end;
  }

  void finish() {
    if (z_.columns == 0) return;
    write_upto(z_.columns);
    if (to_.streams()) stream_fence();
    if (replaced_ >= 0) to_.put(replaced_, replacement_);
    z_.columns = 0;
  }

 private:
  const S* x_ = nullptr;
  const S* y_ = nullptr;
  ScratchGradient<S> from_;
  Side<T> z_{nullptr, 0, S(0), S(0)};
  LabelTerm<S> label_;
  GradientTarget<T> to_;
  int64_t done_ = 0, replaced_ = -1;
  S replacement_ = 0;
};

// The student gradient of the row that a thread is at.
template <class T>
struct RowGradient {
  using S = compute_t<T>;
  PendingGradient<T> pending;
  GradientTarget<T> target;

  // Before target is written to directly: what the row's earlier parts left to be written.
  void settle() {
    if (target.sum != nullptr) pending.finish();
  }

  // This part gives every entry the same number: 0 or NaN.
  void fill(int64_t columns, int64_t width, S number) {
    settle();
    if (!target.last) {
      if (number == S(0)) return;
      fill_row(target.sum, 0, columns, number);
      target.holds = true;
    } else if (!target.holds || number != S(0)) {
      fill_row(target.out, 0, width, number);
    } else {
      target.template write<Lanes<T>>(0, columns, [](int64_t) { return Lanes<T>::zero(); });
      if (target.streams()) stream_fence();
      fill_row(target.out, columns, width, S(0));
    }
  }
};

}  // namespace KDK_ISA_NAMESPACE
}  // namespace kd
