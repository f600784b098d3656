// Plackett-Luce likelihood of an order of items: the contract between callers and every backend.
//
//   S_k  = log sum_{j >= k} exp(s_{o_j})          suffix log-sum-exp along the order o
//   L    = sum_k w_k (S_k - s_{o_k})              one value a row
//   rho_k = exp(s_{o_k} - S_k)                    the chance of taking item k next
//   P_k  = P_{k-1} (1 - rho_{k-1}) + w_k          prefix, all terms positive: nothing cancels
//   dL / d s_{o_k} = P_k rho_k - w_k
//
// 1 - rho_k is taken as exp(S_{k+1} - S_k). Two walks over the row: from its end for S, from its
// front for the gradient. Scores of -inf have rho 0; with weight > 0 their row is inf.
#pragma once

#include "common/macros.h"
#include "common/scalar.h"
#include "common/view.h"

namespace kd {

struct PlackettLuceArgs {
  View scores;    // (N, V) float32 | float16 | bfloat16 | float64
  View order;     // (N, K) int64, K <= V: item ids, best first; each at most once
  View weights;   // (N, K) compute dtype, or none: 1
  View value;     // (N,) float64
  View gradient;  // (N, V) compute dtype, zeros; or none
  View suffix;    // (N, K) float64: CUDA workspace, with gradient
  void* stream = nullptr;
};

namespace cpu {
void plackett_luce(const PlackettLuceArgs& args);
}  // namespace cpu
namespace cuda {
void plackett_luce(const PlackettLuceArgs& args);
}  // namespace cuda

// A log-sum-exp that grows by one score at a time, from the end of the order.
struct SuffixLse {
  double lse = -kInfinity;

  KD_HOST_DEVICE void push(double score) {
    const double top = lse > score ? lse : score;
    if (top == -kInfinity) return;
    const double low = lse > score ? score : lse;
    lse = top + log1p(exp(low - top));
  }
};

}  // namespace kd
