// The linear assignment problem, exactly: shortest augmenting paths (Jonker and Volgenant, 1987).
// Host code, n^3 at worst; one problem is small (n <= 512), a batch runs on all threads.
#pragma once

#include <cstdint>
#include <limits>
#include <vector>

namespace kd {

// columns[i] = the column of row i in an assignment that minimises sum_i cost[i * n + columns[i]].
// Of several the one found depends on the costs alone. NaN: false, and columns is the identity.
inline bool assign(const double* cost, int64_t n, int64_t* columns) {  // (n, n), (n,)
  for (int64_t i = 0; i < n; ++i) columns[i] = i;
  for (int64_t i = 0; i < n * n; ++i) {
    if (!(cost[i] - cost[i] == 0)) return false;
  }
  constexpr double kFar = std::numeric_limits<double>::infinity();
  // Column n is the virtual start of each path: it holds the row that is being inserted.
  std::vector<double> row_price(n, 0.0), column_price(n + 1, 0.0), distance(n);
  std::vector<int64_t> row_of(n + 1, -1), previous(n);
  std::vector<char> done(n + 1);
  for (int64_t inserted = 0; inserted < n; ++inserted) {
    row_of[n] = inserted;
    distance.assign(n, kFar);
    done.assign(n + 1, 0);
    int64_t column = n;
    // Dijkstra over reduced costs until a free column is reached.
    while (row_of[column] >= 0) {
      done[column] = 1;
      const int64_t row = row_of[column];
      const double* costs = cost + row * n;
      double nearest = kFar;
      int64_t next = -1;
      for (int64_t j = 0; j < n; ++j) {
        if (done[j]) continue;
        const double reduced = costs[j] - row_price[row] - column_price[j];
        if (reduced < distance[j]) {
          distance[j] = reduced;
          previous[j] = column;
        }
        if (distance[j] < nearest) {
          nearest = distance[j];
          next = j;
        }
      }
      // Prices move so that the nearest column becomes tight and everything done stays tight.
      for (int64_t j = 0; j <= n; ++j) {
        if (done[j]) {
          row_price[row_of[j]] += nearest;
          column_price[j] -= nearest;
        } else if (j < n) {
          distance[j] -= nearest;
        }
      }
      column = next;
    }
    while (column != n) {
      row_of[column] = row_of[previous[column]];
      column = previous[column];
    }
  }
  for (int64_t j = 0; j < n; ++j) columns[row_of[j]] = j;
  return true;
}

}  // namespace kd
