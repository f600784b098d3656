// Graph on logits: the contract between callers and every backend.
//
// A graph joins the T positions of a sequence (or of a whole batch). Position t keeps its k largest
// logits, scales them to z_t (k) and adds z_t z_t^T to the graph of rank positions
//
//   C = 1/T_selected  sum_t  z_t z_t^T                       (k, k), never formed
//
// whose nodes have the features  f(i) = sum_j C_ij  (divided by k with `average`):
//
//   f(i) = share  sum_t  z_ti S_t,    S_t = sum_j z_tj,   share = 1/T_selected  (/ k)
//
// The loss matches the sorted features of student and teacher; that is 2 k numbers a sequence and
// stands above this layer. Here: logits -> f, and the gradient back.
//
// Scaling. z = x / tau, or with `standardize` z = (x - mean) / (deviation + 1e-6) / tau, mean and
// population deviation over the row's vocabulary. The gradient of the latter reaches every entry.
//
// Conventions: a -inf logit is no part of the vocabulary (not in mean and deviation, z = 0 where
// it is kept for want of others, gradient 0); unselected rows count for nothing and get gradient 0
// whatever they hold; NaN or +inf in a selected row makes its graph's features NaN. Equal logits
// are kept by the lowest index.
#pragma once

#include <cstdint>

#include "common/view.h"

namespace kd {

// Saved statistics, a row of kNodeStats numbers in the compute dtype (float32; float64 for
// float64).
enum NodeStat : int {
  kNodeMean = 0,       // 0 without standardize
  kNodeDeviation = 1,  // population deviation; 0 without standardize
  kNodeScale = 2,      // z = (x - mean) scale
  kNodeCount = 3,      // entries that are not -inf; 0 without standardize
  kNodeSum = 4,        // S_t
  kNodeStats = 5,
};

struct GraphNodesSpec {
  bool standardize = true;
  bool average = true;  // divide f by k
  double temperature = 1;
};

struct GraphNodesArgs {
  // Inputs. N = G T rows, graph after graph.
  View logits;  // (N, V) float32 | float16 | bfloat16 | float64 (not on CUDA), V < 2^31
  View mask;    // (N,) bool, or none
  // Outputs of forward, inputs of backward.
  View values;   // (N, k) compute dtype: z, descending in x
  View indices;  // (N, k) int32: where in the row; -1 in unselected rows
  View stats;    // (N, kNodeStats) compute dtype
  View nodes;    // (G, k) float64: f
  View count;    // (G,) float64: T_selected
  // Backward only.
  View upstream;  // (G, k) float64
  View grad;      // (N, V) dtype of logits, rows contiguous; written whole
  GraphNodesSpec spec;
  void* stream = nullptr;  // CUDA stream
};

// Both throw std::invalid_argument for arguments that do not fit together.
namespace cpu {
void graph_nodes_fwd(const GraphNodesArgs& args);
void graph_nodes_bwd(const GraphNodesArgs& args);
}  // namespace cpu

namespace cuda {  // also the host emulation of the same kernels, on CPU memory
void graph_nodes_fwd(const GraphNodesArgs& args);
void graph_nodes_bwd(const GraphNodesArgs& args);
}  // namespace cuda

}  // namespace kd
