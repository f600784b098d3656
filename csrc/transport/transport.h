// Contract of the family `transport`: entropic optimal transport (Sinkhorn) between dense cost
// matrices, and one-dimensional sorted transport between softmaxed rows (ULD).
//
// Sinkhorn. A problem is a cost C (n, m), marginals a (n), b (m) and epsilon. With
// K = exp(-C / epsilon) and scalings u, v, one full iteration of order "rows" is
//
//   u = a (K v + d)^-Da        d: denominator,  Da = reach_a / (reach_a + epsilon), 1 if balanced
//   v = b (K' u + d)^-Db
//
// and order "columns" does v first. The scalings start at one, at zero where the marginal is zero.
// The plan is P = diag(u) K diag(v). What is stored are logarithms to base 2 of the scalings over
// their marginals, f = log2(u / a) and g = log2(v / b): finite also where a marginal is zero.
//
// Row i of one sweep needs e_ij = 2^(f_i + log2 v_j - k C_ij), k = log2(e) / epsilon, with the f of
// the iteration before: sum_j e_ij says by how much f_i changes, and the same e_ij, rescaled, are
// row i's share of K' u. One read of C and one exponential an entry serve both half-iterations.
//
// Backward. With the adjoint of the plan, Pbar, and alpha_i = a_i^-1 dL/d log u_i, beta_j likewise,
// the iterations are walked backwards from the stored f and g alone, O(T (n + m)) memory:
//   alpha = -Db rho_i   sum_j K_ij b_j beta_j  / (K' u + d)_j       rho = u / a
//   beta  = -Da sigma_j sum_i K_ij a_i alpha_i / (K v + d)_i        sigma = v / b
//   Cbar += K_ij / epsilon times the same products                   abar += alpha, bbar += beta
// Gradient modes: unrolled walks the stored iterations; implicit repeats the last one until the
// adjoint has converged (the derivative of the fixed point); envelope is Cbar = linear_bar P alone.
#pragma once

#include <vector>

#include "common/view.h"

namespace kd {

enum class GradientMode : int { kUnrolled = 0, kImplicit = 1, kEnvelope = 2 };

// Plain numbers of a Sinkhorn call, in the order in which they cross from Python.
struct SinkhornSpec {
  double epsilon = 1;
  double iterations = 1;
  double tolerance = 0;      // 0: never stops early
  double columns_first = 0;  // order "columns"
  double damping_a = 1;      // Da; 1: balanced
  double damping_b = 1;
  double denominator = 0;
  double mode = 0;  // GradientMode
};

#define KD_SINKHORN_SPEC_FIELDS(X) \
  X(epsilon)                       \
  X(iterations) X(tolerance) X(columns_first) X(damping_a) X(damping_b) X(denominator) X(mode)

struct SinkhornArgs {
  // Inputs, float32 or float64 alike (the compute dtype).
  View cost;             // (B, N, M), last stride 1; stride 0 over B: one cost for all problems
  View a;                // (B, N), last stride 1; none: 1 / length
  View b;                // (B, M)
  View student_lengths;  // (B,) int64, none: N. Rows beyond are neither read nor meant.
  View teacher_lengths;  // (B,) int64, none: M
  // Outputs of forward, inputs of backward. Contiguous. Zero beyond the lengths.
  View f;     // (H, B, N): H = iterations (all are kept) or 1 (the last)
  View g;     // (H, B, M)
  View done;  // (B,) int64: iterations that ran
  // Further outputs of forward.
  View linear;   // (B,): <P, C>, or none
  View rows;     // (B, N): P 1
  View columns;  // (B, M): P' 1
  View plan;     // (B, N, M), or none
  // Adjoints (backward), each or none.
  View linear_bar;   // (B,)
  View rows_bar;     // (B, N)
  View columns_bar;  // (B, M)
  View plan_bar;     // (B, N, M)
  View f_bar;        // (B, N): of the last f, in units of log2
  View g_bar;        // (B, M)
  // Gradients (backward): zero beyond the lengths.
  View grad_cost;  // (B, N, M), or none
  View grad_a;     // (B, N)
  View grad_b;     // (B, M)
  // Scratch in the compute dtype: (B, sinkhorn_workspace(N, M)).
  View workspace;
  SinkhornSpec spec;
  void* stream = nullptr;
};

// Elements of scratch a problem needs on this build (forward and backward alike).
namespace cpu {
int64_t sinkhorn_workspace(int64_t rows, int64_t columns);
void sinkhorn_fwd(const SinkhornArgs& args);
void sinkhorn_bwd(const SinkhornArgs& args);

// Whether nothing is wrong with marginals (B, N) and (B, M), each or none (then uniform): finite,
// not negative, and where `balanced` of the same mass to 1e-3. Looks at nothing beyond the lengths.
bool marginals_fit(const View& a, const View& b, const View& student_lengths,
                   const View& teacher_lengths, bool balanced);
}  // namespace cpu

namespace cuda {  // also the host emulation of the same kernels, on CPU memory
int64_t sinkhorn_workspace(int64_t rows, int64_t columns);
void sinkhorn_fwd(const SinkhornArgs& args);
void sinkhorn_bwd(const SinkhornArgs& args);
}  // namespace cuda

// Annealed potentials, the inside of the Sinkhorn divergence between two clouds of points. A side
// has rows, columns with weights w, and a partner whose potential stands on the columns:
//
//   side 0: x against y, partner 1      side 2: x against x, its own partner
//   side 1: y against x, partner 0      side 3: y against y, its own partner   (2, 3: `debias`)
//
// With C = |x - y|^2 / 2 or sqrt(max(|x - y|^2, 1e-8)), D = 1 / (1 + epsilon / rho) and
// softmin(h)_i = -epsilon log sum_j exp(h_j - C_ij / epsilon), all sides at once:
//
//   start                 phi = D softmin(log w)
//   each epsilon          phi <- (phi + D softmin(log w + phi_partner / epsilon)) / 2
//   at the last one       phi <- D softmin(log w + phi_partner / epsilon)
//
// The last update alone carries the gradient: dphi_i / dx_i = D sum_j P_ij dC_ij / dx_i, where P
// are the softmin's weights.
struct AnnealedArgs {
  // float32 or float64 alike (the compute dtype), contiguous.
  View x;      // (B, d, N): coordinates first
  View y;      // (B, d, M)
  View log_a;  // (B, N) natural logarithms of the weights
  View log_b;  // (B, M)
  // The sides' costs (B, rows, columns), or none: made from the points at each use, for up to
  // kMostCoordinates of them.
  View costs[4];
  View potentials;  // (B, S): the sides one behind the other, S = N + M, twice with debias
  View slopes;      // (B, d, S): dphi_i / dx_i, or none. With costs: none, see `weights`
  View workspace;   // (2, B, S)
  std::vector<double> epsilons;
  bool root = false;  // C is the distance
  bool debias = true;
  // Of which points derivatives are wanted: slopes of their sides, or with costs, in the costs'
  // place, D P_ij (over C_ij for the distance, 0 where it is clamped).
  bool need_x = false, need_y = false;
  double rho = 0;  // 0: balanced
  void* stream = nullptr;
};

namespace cpu {
void annealed(const AnnealedArgs& args);
}  // namespace cpu
namespace cuda {
void annealed(const AnnealedArgs& args);
}  // namespace cuda

// Sorted transport. For each row, with p = cs softmax(z / tau_s) and q = ct softmax(a / tau_t), the
// excluded ids left out and the shorter side padded with zeros,
//
//   value = sum_r |p_(r) - q_(r)|      (r: rank in descending order)
//   grad_z_k = coefficient p_k (s_k [k not excluded] - (sum_l s_l p_l) / cs) / tau_s
//
// s_k is the mean of sign(p_(r) - q_(r)) over the ranks r that entries equal to z_k share. Softmax
// is monotone, so logits are sorted, never probabilities.
struct SortedArgs {
  View student;           // (N, V) float32 | float16 | bfloat16 | float64
  View teacher;           // (N, V')
  View mask;              // (N,) bool: rows that count, or none. Others give 0 whatever they hold.
  View student_scale;     // (N,) compute dtype: cs, or none (1)
  View teacher_scale;     // (N,)
  View student_excluded;  // (V,) bool, or none
  View teacher_excluded;  // (V',) bool, or none
  View coefficient;       // (N,) compute dtype: factor of the gradient, or none (1)
  View value;             // (N,) compute dtype
  View slopes;            // (N, 2): d value / d cs, d value / d ct
  View grad_student;      // (N, V) dtype of student, or none
  View workspace;         // (slots, sorted_workspace(V, V')) int32
  double student_temperature = 1, teacher_temperature = 1;
  void* stream = nullptr;
};

// `slots` rows are worked on at a time, each in its own int32 scratch of this many elements. wide:
// float64.
namespace cpu {
int64_t sorted_workspace(int64_t student_columns, int64_t teacher_columns, bool wide);
void sorted_transport(const SortedArgs& args);
}  // namespace cpu

namespace cuda {
int64_t sorted_workspace(int64_t student_columns, int64_t teacher_columns, bool wide);
void sorted_transport(const SortedArgs& args);
}  // namespace cuda

}  // namespace kd
