// CUDA: 4 warps own 64 tokens (16 a warp) and walk over the others 32 at a time. A tile of products
// is summed over slices of 32 columns of the tokens; its accumulators are turned into gradients
// where they are and feed the next product as they are, for its summation index may be permuted at
// will.
#include "common/launch.h"
#include "common/reduce.cuh"
#include "relation/relation_check.h"
#include "relation/softmax_relation.h"

namespace kd::cuda {
namespace {

using relation::Constants;
using relation::Kind;

constexpr int kThreads = 128;
constexpr int kHere = 64, kThere = 32;  // tokens of a tile
constexpr int kSlice = 32;              // columns of the tokens in shared memory at a time
constexpr int kOut = 128;               // columns of a gradient that a block makes
constexpr int kTiles = kThere / 8;      // accumulators of 8 columns

// Rows of the slices lie apart so that the loads of a fragment hit 32 banks.
constexpr int kPad = 8;

template <class T>
struct alignas(16) Slices {
  T here[kHere][kSlice + kPad];
  T there[kThere][kSlice + kPad];
};
template <class T>
struct alignas(16) OutSlice {
  T there[kThere][kOut + 8];
};

// The tokens of one side; rows are queries, columns keys.
template <class T>
struct Tokens {
  const T *rows = nullptr, *columns = nullptr;
  int64_t width = 0;
  bool aligned = false;  // 16-byte copies
};

template <class T>
struct SoftmaxCall {
  RelationRows map;
  Tokens<T> student, teacher;
  float* statistics;
  float* gradient;  // of the tokens that a block of the backward owns
  int64_t rows, columns;
  bool of_teacher;
};

// ---- tiles -------------------------------------------------------------------------------------

// `kCount` tokens from `first`, columns [k0, k0 + kWide), zeros past the ends. Ends with a barrier.
template <int kCount, int kWide, class T, int kStride>
KD_DEVICE void load_tokens(T (&tile)[kCount][kStride], const T* tokens, int64_t first,
                           int64_t count, int64_t width, int64_t k0, bool aligned) {
  constexpr int kVec = 16 / static_cast<int>(sizeof(T)), kChunks = kWide / kVec;
  for (int x = threadIdx.x; x < kCount * kChunks; x += kThreads) {
    const int row = x / kChunks, column = x % kChunks * kVec;
    const int64_t token = first + row, k = k0 + column;
    const bool inside = token < count && k < width;
    const T* from = tokens + (inside ? token * width + k : 0);
    if (aligned) {
      cp_async16(&tile[row][column], from, inside ? 16 : 0);
    } else {
      for (int i = 0; i < kVec; ++i) {
        tile[row][column + i] = inside && k + i < width ? from[i] : cast<T>(0.0f);
      }
    }
  }
}

// A float as the sum of two tf32 numbers.
struct Split {
  uint32_t high, low;
  KD_DEVICE explicit Split(float x) : high(to_tf32(x)) {
    low = to_tf32(x - detail::bits_float(high));
  }
};

// acc += A B, 16 x 8 times 8 x 8, for a B that tf32 holds exactly: float32's accuracy.
KD_DEVICE void multiply(float (&acc)[4], const Split (&a)[4], const uint32_t (&b)[2]) {
  const uint32_t high[4] = {a[0].high, a[1].high, a[2].high, a[3].high};
  const uint32_t low[4] = {a[0].low, a[1].low, a[2].low, a[3].low};
  mma_m16n8k8_tf32(acc, low, b, acc);
  mma_m16n8k8_tf32(acc, high, b, acc);
}

template <class T>
KD_DEVICE uint32_t pair_at(const T* p) {
  uint32_t bits;
  memcpy(&bits, p, sizeof(bits));
  return bits;
}

// One slice of columns.
template <class T>
KD_DEVICE void multiply_slice(float (&acc)[kTiles][4], const Slices<T>& m) {
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  KD_UNROLL
  for (int k = 0; k < kSlice; k += 16) {
    uint32_t a[4], b[2];
    KD_UNROLL
    for (int i = 0; i < 4; ++i) {
      a[i] = pair_at(&m.here[warp * 16 + g + 8 * (i % 2)][k + 2 * t + 8 * (i / 2)]);
    }
    KD_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      KD_UNROLL
      for (int i = 0; i < 2; ++i) b[i] = pair_at(&m.there[n * 8 + g][k + 2 * t + 8 * i]);
      mma_m16n8k16<T>(acc[n], a, b, acc[n]);
    }
  }
}

// acc[n][i] = <here token warp 16 + g + 8 (i / 2), there token 8 n + 2 t + i % 2>.
template <class T>
KD_DEVICE void products(float (&acc)[kTiles][4], Slices<T>& m, const T* here, int64_t here_first,
                        int64_t here_count, const T* there, int64_t there_first,
                        int64_t there_count, const Tokens<T>& side) {
  KD_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    KD_UNROLL
    for (int i = 0; i < 4; ++i) acc[n][i] = 0.0f;
  }
  for (int64_t k = 0; k < side.width; k += kSlice) {
    __syncthreads();  // the slices before are used up
    load_tokens<kHere, kSlice>(m.here, here, here_first, here_count, side.width, k, side.aligned);
    load_tokens<kThere, kSlice>(m.there, there, there_first, there_count, side.width, k,
                                side.aligned);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    multiply_slice(acc, m);
  }
}

KD_DEVICE float similarity(float product, float scale, const RelationRows& map) {
  const float a = scale * product;
  return map.clamped ? max(a, static_cast<float>(map.clamp)) : a;
}

template <class T>
KD_DEVICE bool is_on(const SoftmaxCall<T>& call, int64_t h, int64_t i, int64_t j) {
  return i < call.rows && j < call.columns && call.map.selection.row(h, i) &&
         call.map.selection.entry(h, i, j);
}

// ---- forward -----------------------------------------------------------------------------------

// Blocks: 64 rows (x) of graph y. A thread holds two rows and a quarter of their columns.
template <Kind kKind, class T>
__global__ void __launch_bounds__(kThreads, 2) softmax_forward_kernel(SoftmaxCall<T> call) {
  constexpr bool kTeacher = relation::has_teacher(kKind);
  KD_SHARED(Slices<T>, slices);
  const int64_t h = blockIdx.y, first = static_cast<int64_t>(blockIdx.x) * kHere;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const T* q_s = call.student.rows + h * call.rows * call.student.width;
  const T* k_s = call.student.columns + h * call.columns * call.student.width;
  const T *q_t = nullptr, *k_t = nullptr;
  const float scale_s = *static_cast<const float*>(call.map.student_scale);
  float scale_t = scale_s;
  if constexpr (kTeacher) {
    q_t = call.teacher.rows + h * call.rows * call.teacher.width;
    k_t = call.teacher.columns + h * call.columns * call.teacher.width;
    scale_t = *static_cast<const float*>(call.map.teacher_scale);
  }
  const auto row_at = [&](int r) { return first + warp * 16 + g + 8 * r; };
  float acc_s[kTiles][4], acc_t[kTiles][4];
  const auto make = [&](int64_t there) {
    products(acc_s, slices, q_s, first, call.rows, k_s, there, call.columns, call.student);
    if constexpr (kTeacher) {
      products(acc_t, slices, q_t, first, call.rows, k_t, there, call.columns, call.teacher);
    }
  };

  // Maxima are those of the row, the same in its four lanes; sums are the lane's own.
  const float lowest = static_cast<float>(-kInfinity);
  float top_s[2] = {lowest, lowest}, top_t[2] = {lowest, lowest};
  double sum_s[2] = {0, 0}, sum_t[2] = {0, 0};
  double count[2] = {0, 0};
  const auto add = [&](float (&acc)[kTiles][4], float scale, unsigned on, int r, float& top,
                       double& sum) {
    float largest = lowest;
    KD_UNROLL
    for (int x = 0; x < 2 * kTiles; ++x) {
      float& a = acc[x / 2][2 * r + x % 2];
      a = similarity(a, scale, call.map);
      if (on >> x & 1) largest = max(largest, a);
    }
    largest = max(top, warp_max<4>(largest));
    if (largest == lowest) return;  // the same in all four lanes
    float share = 0.0f;
    KD_UNROLL
    for (int x = 0; x < 2 * kTiles; ++x) {
      if (on >> x & 1) share += exp(acc[x / 2][2 * r + x % 2] - largest);
    }
    sum = sum * static_cast<double>(exp(top - largest)) + static_cast<double>(share);
    top = largest;
  };
  const auto selected = [&](int64_t there, int r) {
    unsigned on = 0;
    KD_UNROLL
    for (int x = 0; x < 2 * kTiles; ++x) {
      const int64_t j = there + x / 2 * 8 + 2 * t + x % 2;
      on |= (is_on(call, h, row_at(r), j) ? 1u : 0u) << x;
    }
    return on;
  };
  for (int64_t there = 0; there < call.columns; there += kThere) {
    make(there);
    KD_UNROLL
    for (int r = 0; r < 2; ++r) {
      const unsigned on = selected(there, r);
      for (int x = 0; x < 2 * kTiles; ++x) count[r] += on >> x & 1;
      // No lane of a warp may miss the maximum's shuffle.
      add(acc_s, scale_s, on, r, top_s[r], sum_s[r]);
      if constexpr (kTeacher) add(acc_t, scale_t, on, r, top_t[r], sum_t[r]);
    }
  }

  Constants<float> c[2];
  float inverse_s[2], inverse_t[2];
  double lse_s[2];
  KD_UNROLL
  for (int r = 0; r < 2; ++r) {
    count[r] = warp_sum<4>(count[r]);
    sum_s[r] = warp_sum<4>(sum_s[r]);
    sum_t[r] = kTeacher ? warp_sum<4>(sum_t[r]) : sum_s[r];
    const bool some = count[r] > 0;
    if (!some) top_s[r] = top_t[r] = 0.0f, sum_s[r] = sum_t[r] = 1;
    if (!kTeacher) top_t[r] = top_s[r];
    lse_s[r] = static_cast<double>(top_s[r]) + log(sum_s[r]);
    const double lse_t = static_cast<double>(top_t[r]) + log(sum_t[r]);
    c[r].s = static_cast<float>(lse_s[r]), c[r].shift = static_cast<float>(lse_t - lse_s[r]);
    c[r].t = static_cast<float>(lse_t), c[r].es = c[r].et = 0.0f;
    inverse_s[r] = some ? static_cast<float>(1 / sum_s[r]) : 0.0f;
    inverse_t[r] = some ? static_cast<float>(1 / sum_t[r]) : 0.0f;
  }
  double value[2] = {0, 0}, mean_s[2] = {0, 0}, mean_t[2] = {0, 0}, label[2] = {0, 0};
  double labelled[2] = {0, 0};
  if constexpr (kTeacher) {
    for (int64_t there = 0; there < call.columns; there += kThere) {
      make(there);
      KD_UNROLL
      for (int r = 0; r < 2; ++r) {
        const unsigned on = selected(there, r);
        const int64_t own = call.map.selection.first_row + row_at(r) + call.map.selection.diagonal;
        float shares[3] = {0.0f, 0.0f, 0.0f};
        KD_UNROLL
        for (int x = 0; x < 2 * kTiles; ++x) {
          if (!(on >> x & 1)) continue;
          const float as = similarity(acc_s[x / 2][2 * r + x % 2], scale_s, call.map);
          const float at = similarity(acc_t[x / 2][2 * r + x % 2], scale_t, call.map);
          const float q = exp(as - top_s[r]) * inverse_s[r];
          const float p = exp(at - top_t[r]) * inverse_t[r];
          const auto term = relation::softmax_terms<kKind>(p, q, as, at, c[r]);
          shares[0] += term.value, shares[1] += term.es, shares[2] += term.et;
          if (there + x / 2 * 8 + 2 * t + x % 2 == own) {
            label[r] += static_cast<double>(as), labelled[r] += 1;
          }
        }
        value[r] += static_cast<double>(shares[0]);
        mean_s[r] += static_cast<double>(shares[1]), mean_t[r] += static_cast<double>(shares[2]);
      }
    }
  }
  KD_UNROLL
  for (int r = 0; r < 2; ++r) {
    value[r] = warp_sum<4>(value[r]), label[r] = warp_sum<4>(label[r]);
    mean_s[r] = warp_sum<4>(mean_s[r]), mean_t[r] = warp_sum<4>(mean_t[r]);
    const double mix = warp_sum<4>(labelled[r]) > 0 ? call.map.label_mix : 0.0;
    const int64_t i = row_at(r);
    if (t != 0 || i >= call.rows) continue;
    float* out = call.statistics + (h * call.rows + i) * kSoftmaxStatistics;
    out[kStatTopS] = top_s[r], out[kStatInverseS] = inverse_s[r];
    out[kStatTopT] = top_t[r], out[kStatInverseT] = inverse_t[r];
    out[kStatLseS] = c[r].s, out[kStatShift] = c[r].shift;
    out[kStatMeanS] = static_cast<float>(mean_s[r]);
    out[kStatMeanT] = static_cast<float>(mean_t[r]);
    out[kStatMix] = static_cast<float>(mix);
    double* row = call.map.rows + (h * call.rows + i) * kRelationRow;
    for (int k = 0; k < kRelationRow; ++k) row[k] = 0;
    row[kRowCount] = count[r];
    if (count[r] == 0) continue;
    row[kRowValue] = kTeacher ? (1 - mix) * value[r] + mix * (lse_s[r] - label[r]) : lse_s[r];
  }
}

// ---- backward ----------------------------------------------------------------------------------

// d row value / d a of entry (i, j) of the wanted side, not weighted; the row's statistics at
// `row`.
template <Kind kKind, class T>
KD_DEVICE float slope(const SoftmaxCall<T>& call, const float* row, float product_s,
                      float product_t, float scale_s, float scale_t, bool own) {
  Constants<float> c;
  c.s = row[kStatLseS], c.shift = row[kStatShift], c.t = c.s + c.shift;
  c.es = row[kStatMeanS], c.et = row[kStatMeanT];
  const float as = similarity(product_s, scale_s, call.map);
  const float at = similarity(product_t, scale_t, call.map);
  const float q = exp(as - row[kStatTopS]) * row[kStatInverseS];
  const float p =
      relation::has_teacher(kKind) ? exp(at - row[kStatTopT]) * row[kStatInverseT] : 0.0f;
  float gs, gt;
  relation::softmax_gradient<kKind>(p, q, as, at, c, &gs, &gt);
  const float mix = row[kStatMix];
  gs = (1.0f - mix) * gs + mix * (own ? q - 1.0f : q);
  gt = (1.0f - mix) * gt;
  if (call.map.clamped) {
    const float bound = static_cast<float>(call.map.clamp);
    gs = as > bound ? gs : 0.0f, gt = at > bound ? gt : 0.0f;
  }
  return call.of_teacher ? gt : gs;
}

// Blocks: 64 tokens (x) of graph y, 128 columns of their gradient (z). kOfRows: the queries', and
// the sums for the scale; else the keys'.
template <Kind kKind, bool kOfRows, class T>
__global__ void __launch_bounds__(kThreads, 2) softmax_backward_kernel(SoftmaxCall<T> call) {
  constexpr bool kTeacher = relation::has_teacher(kKind);
  KD_SHARED(Slices<T>, slices);
  KD_SHARED(OutSlice<T>, out_slice);
  const int64_t h = blockIdx.y, first = static_cast<int64_t>(blockIdx.x) * kHere;
  const int64_t first_column = static_cast<int64_t>(blockIdx.z) * kOut;
  const int warp = threadIdx.x / 32, g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  const int64_t here_count = kOfRows ? call.rows : call.columns;
  const int64_t there_count = kOfRows ? call.columns : call.rows;
  const auto here_of = [&](const Tokens<T>& side) {
    return (kOfRows ? side.rows : side.columns) + h * here_count * side.width;
  };
  const auto there_of = [&](const Tokens<T>& side) {
    return (kOfRows ? side.columns : side.rows) + h * there_count * side.width;
  };
  const Tokens<T>& wanted = call.of_teacher ? call.teacher : call.student;
  const T* others = there_of(wanted);
  const float scale_s = *static_cast<const float*>(call.map.student_scale);
  float scale_t = scale_s;
  if constexpr (kTeacher) scale_t = *static_cast<const float*>(call.map.teacher_scale);

  float acc_s[kTiles][4], acc_t[kTiles][4], out[kOut / 8][4];
  KD_UNROLL
  for (int n = 0; n < kOut / 8; ++n) {
    KD_UNROLL
    for (int i = 0; i < 4; ++i) out[n][i] = 0.0f;
  }
  double sums[2] = {0, 0};
  for (int64_t there = 0; there < there_count; there += kThere) {
    products(acc_s, slices, here_of(call.student), first, here_count, there_of(call.student), there,
             there_count, call.student);
    if constexpr (kTeacher) {
      products(acc_t, slices, here_of(call.teacher), first, here_count, there_of(call.teacher),
               there, there_count, call.teacher);
    }
    load_tokens<kThere, kOut>(out_slice.there, others, there, there_count, wanted.width,
                              first_column, wanted.aligned);
    cp_async_commit();
    KD_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      KD_UNROLL
      for (int i = 0; i < 4; ++i) {
        const int64_t a = first + warp * 16 + g + 8 * (i / 2), b = there + n * 8 + 2 * t + i % 2;
        const int64_t row = kOfRows ? a : b, column = kOfRows ? b : a;
        float value = 0.0f;
        if (is_on(call, h, row, column)) {
          const float product_s = acc_s[n][i], product_t = kTeacher ? acc_t[n][i] : 0.0f;
          const int64_t own = call.map.selection.first_row + row + call.map.selection.diagonal;
          value = slope<kKind>(call, call.statistics + (h * call.rows + row) * kSoftmaxStatistics,
                               product_s, product_t, scale_s, scale_t, column == own);
          if constexpr (kOfRows) {
            sums[i / 2] += static_cast<double>(value) *
                           static_cast<double>(call.of_teacher ? product_t : product_s);
          }
          value *= call.of_teacher ? scale_t : scale_s;
          if (call.map.row_weight) {
            value *=
                static_cast<const float*>(call.map.row_weight)[h * call.map.row_weight_stride[0] +
                                                               row * call.map.row_weight_stride[1]];
          }
        }
        acc_s[n][i] = value;
      }
    }
    cp_async_wait<0>();
    __syncthreads();
    KD_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      // Summation index t of the product stands for token 2 t, t + 4 for 2 t + 1.
      const Split a[4] = {Split(acc_s[n][0]), Split(acc_s[n][2]), Split(acc_s[n][1]),
                          Split(acc_s[n][3])};
      KD_UNROLL
      for (int o = 0; o < kOut / 8; ++o) {
        if (first_column + o * 8 >= wanted.width) continue;  // the same for the whole block
        const T* at = &out_slice.there[n * 8 + 2 * t][o * 8 + g];
        const uint32_t b[2] = {to_tf32(to_float(*at)), to_tf32(to_float(at[kOut + 8]))};
        multiply(out[o], a, b);
      }
    }
    // The next tile's first barrier comes before its loads of out_slice.
  }
  KD_UNROLL
  for (int o = 0; o < kOut / 8; ++o) {
    KD_UNROLL
    for (int i = 0; i < 4; ++i) {
      const int64_t token = first + warp * 16 + g + 8 * (i / 2);
      const int64_t column = first_column + o * 8 + 2 * t + i % 2;
      if (token < here_count && column < wanted.width) {
        call.gradient[(h * here_count + token) * wanted.width + column] = out[o][i];
      }
    }
  }
  if constexpr (kOfRows) {
    KD_UNROLL
    for (int r = 0; r < 2; ++r) {
      const double sum = warp_sum<4>(sums[r]);
      const int64_t row = first + warp * 16 + g + 8 * r;
      if (t == 0 && row < call.rows && blockIdx.z == 0) {
        call.map.rows[(h * call.rows + row) * kRelationRow +
                      (call.of_teacher ? kRowScaleT : kRowScaleS)] = sum;
      }
    }
  }
}

// ---- launchers ---------------------------------------------------------------------------------

dim3 blocks_of(int64_t tokens, int64_t graphs, int64_t slices) {
  return dim3(static_cast<unsigned>((tokens + kHere - 1) / kHere), static_cast<unsigned>(graphs),
              static_cast<unsigned>(slices));
}

template <Kind kKind, class T>
void launch_softmax(SoftmaxCall<T> call, const SoftmaxRelationArgs& a) {
  const int64_t graphs = call.map.graphs;
  const Stream stream = static_cast<Stream>(a.map.stream);
  const auto info = [&](const char* name, dim3 grid) {
    return LaunchInfo{name,
                      grid,
                      dim3(kThreads),
                      0,
                      stream,
                      "H=" + std::to_string(graphs) + ", N=" + std::to_string(call.rows) +
                          ", M=" + std::to_string(call.columns) +
                          ", d=" + std::to_string(call.student.width)};
  };
  launch(info("softmax_forward", blocks_of(call.rows, graphs, 1)), softmax_forward_kernel<kKind, T>,
         call);
  const auto backward = [&](const View& gradient, bool of_rows, bool of_teacher) {
    if (!gradient) return;
    call.gradient = gradient.as<float>(), call.of_teacher = of_teacher;
    const int64_t width = of_teacher ? call.teacher.width : call.student.width;
    const int64_t slices = (width + kOut - 1) / kOut;
    if (of_rows) {
      launch(info("softmax_backward_rows", blocks_of(call.rows, graphs, slices)),
             softmax_backward_kernel<kKind, true, T>, call);
    } else {
      launch(info("softmax_backward_columns", blocks_of(call.columns, graphs, slices)),
             softmax_backward_kernel<kKind, false, T>, call);
    }
  };
  backward(a.dq_s, true, false), backward(a.dk_s, false, false);
  if constexpr (relation::has_teacher(kKind)) {
    backward(a.dq_t, true, true), backward(a.dk_t, false, true);
  }
}

template <class T>
Tokens<T> tokens_of(const View& rows, const View& columns) {
  Tokens<T> out;
  out.rows = rows.as<const T>(), out.columns = columns.as<const T>();
  out.width = rows.shape[2];
  const auto address = [](const View& v) { return reinterpret_cast<uintptr_t>(v.data); };
  out.aligned = out.width * static_cast<int64_t>(sizeof(T)) % 16 == 0 &&
                (address(rows) | address(columns)) % 16 == 0;
  return out;
}

void check_tokens(const View& v, const char* argument, int64_t graphs, int64_t tokens,
                  int64_t width, DType dtype) {
  KD_CHECK(v.ndim == 3 && v.shape[0] == graphs && v.shape[1] == tokens && v.shape[2] == width,
           argument, ": expected shape (", graphs, ", ", tokens, ", ", width, "), got ",
           shape_text(v));
  check_dtype(v, argument, dtype);
  KD_CHECK(
      v.size() == 0 || ((width == 1 || v.stride[2] == 1) && (tokens == 1 || v.stride[1] == width) &&
                        (graphs == 1 || v.stride[0] == tokens * width)),
      argument, ": expected a contiguous tensor");
}

// The products that relation_rows would take: only their shape counts.
View map_view(int64_t graphs, int64_t rows, int64_t columns, const View& like) {
  View out = like;
  out.data = nullptr, out.dtype = DType::kFloat32, out.ndim = 3;
  out.shape[0] = graphs, out.shape[1] = rows, out.shape[2] = columns;
  out.stride[0] = rows * columns, out.stride[1] = columns, out.stride[2] = 1;
  return out;
}

}  // namespace

// ---- entry points ------------------------------------------------------------------------------

void softmax_relation(const SoftmaxRelationArgs& a) {
  KD_CHECK(a.q_s.ndim == 3 && a.k_s.ndim == 3, "student: expected tokens (H, N, d), got ",
           shape_text(a.q_s));
  const int64_t graphs = a.q_s.shape[0], rows = a.q_s.shape[1], width = a.q_s.shape[2];
  const int64_t columns = a.k_s.shape[1];
  const DType dtype = a.q_s.dtype;
  check_tokens(a.q_s, "student", graphs, rows, width, dtype);
  check_tokens(a.k_s, "student", graphs, columns, width, dtype);
  RelationArgs map = a.map;
  map.student = map_view(graphs, rows, columns, a.q_s);
  const bool teacher = static_cast<bool>(a.q_t);
  if (teacher) {
    KD_CHECK(a.q_t.ndim == 3, "teacher: expected tokens (H, N, d), got ", shape_text(a.q_t));
    check_tokens(a.q_t, "teacher", graphs, rows, a.q_t.shape[2], dtype);
    check_tokens(a.k_t, "teacher", graphs, columns, a.q_t.shape[2], dtype);
    map.teacher = map.student;
  }
  const RelationRows call = resolve_relation_inline(map);
  KD_CHECK(relation::is_softmax(call.kind), "kind: expected a softmax kind, got ",
           static_cast<int>(call.kind));
  KD_CHECK(relation::has_teacher(call.kind) == teacher, "teacher: not given, or not wanted");
  const auto output = [&](const View& v, const char* argument, int64_t tokens, int64_t d) {
    if (v) check_tokens(v, argument, graphs, tokens, d, DType::kFloat32);
  };
  output(a.dq_s, "dq_s", rows, width), output(a.dk_s, "dk_s", columns, width);
  if (teacher) {
    output(a.dq_t, "dq_t", rows, a.q_t.shape[2]), output(a.dk_t, "dk_t", columns, a.q_t.shape[2]);
  }
  KD_CHECK(a.statistics.size() == graphs * rows * kSoftmaxStatistics &&
               a.statistics.dtype == DType::kFloat32,
           "statistics: expected float32 (", graphs, ", ", rows, ", ",
           static_cast<int>(kSoftmaxStatistics), "), got ", shape_text(a.statistics));
  KD_CHECK(graphs <= 65535, "student: ", graphs, " graphs are beyond the 65535 of one launch");
  if (graphs == 0 || rows == 0 || columns == 0) return;
  const DeviceGuard guard(a.q_s.device_index);
  const auto run = [&](auto tag) {
    using T = decltype(tag);
    SoftmaxCall<T> all{};
    all.map = call;
    all.student = tokens_of<T>(a.q_s, a.k_s);
    if (teacher) all.teacher = tokens_of<T>(a.q_t, a.k_t);
    all.statistics = a.statistics.as<float>();
    all.rows = rows, all.columns = columns;
    switch (call.kind) {
      case Kind::kSoftmaxKl:
        return launch_softmax<Kind::kSoftmaxKl, T>(all, a);
      case Kind::kSoftmaxCrossEntropy:
        return launch_softmax<Kind::kSoftmaxCrossEntropy, T>(all, a);
      case Kind::kSoftmaxReverseKl:
        return launch_softmax<Kind::kSoftmaxReverseKl, T>(all, a);
      case Kind::kSoftmaxMse:
        return launch_softmax<Kind::kSoftmaxMse, T>(all, a);
      default:
        return launch_softmax<Kind::kLogSumExp, T>(all, a);
    }
  };
  if (dtype == DType::kFloat16) return run(f16{});
  KD_CHECK(dtype == DType::kBFloat16, "student: expected float16 or bfloat16 tokens, got ",
           name(dtype));
  run(bf16{});
}

}  // namespace kd::cuda
