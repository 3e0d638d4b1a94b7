"""The C++ that every attention kernel shares: memory, packed tiles, and products of tiles in registers.

A product's right side lies in panels of two registers' width, [k, PANEL] each, so that a panel is read from front to
back. Rows of its left side may have any strides: the backward multiplies by transposed tiles.
"""

# Inductor compiles with -fno-tree-loop-vectorize, which makes gcc ignore `omp simd`, too.
OPTIONS = """
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("tree-loop-vectorize")
#endif
"""
OPTIONS_END = """
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif
"""

TILES = """
using Vec = at::vec::Vectorized<float>;
constexpr int64_t W = Vec::size(), PANEL = 2 * W;
constexpr float INF = std::numeric_limits<float>::infinity();
constexpr int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }
constexpr int64_t round_down(int64_t n, int64_t to) { return n / to * to; }
// The size of the fewest parts of n, about the same, that are at most so large.
constexpr int64_t evenly(int64_t n, int64_t most) {
  const int64_t parts = (n + std::max<int64_t>(most, 1) - 1) / std::max<int64_t>(most, 1);
  return (n + parts - 1) / std::max<int64_t>(parts, 1);
}

// Memory of one thread, reused for all its tiles.
template <typename T> struct Memory {
  T* at;
  explicit Memory(int64_t n) : at(static_cast<T*>(std::aligned_alloc(64, round_up(std::max<int64_t>(n, 1) * sizeof(T), 64)))) {
    if (at == nullptr) throw std::bad_alloc();
  }
  ~Memory() { std::free(at); }
  Memory(const Memory&) = delete;
  Memory& operator=(const Memory&) = delete;
  operator T*() const { return at; }
};
using Floats = Memory<float>;

// The first index out of range that any thread met.
struct Bad {
  std::atomic<int> load{-1};
  int64_t index = 0, size = 0;
  __attribute__((noinline, cold)) void report(int which, int64_t low, int64_t high, int64_t entries) {
    int none = -1;
    if (load.compare_exchange_strong(none, which)) { index = low < -entries ? low : high; size = entries; }
  }
  void raise() const {
    if (load < 0) return;
    throw std::runtime_error("recompile: index out of range: attention's table T" + std::to_string(load.load()) + " has " +
                             std::to_string(size) + " entries, got index " + std::to_string(index));
  }
};

template <typename T> inline int64_t least(const T* from, int64_t stride, int64_t n) {
  int64_t found = from[0];
  for (int64_t k = 1; k < n; ++k) found = std::min<int64_t>(found, from[k * stride]);
  return found;
}
template <typename T> inline int64_t greatest(const T* from, int64_t stride, int64_t n) {
  int64_t found = from[0];
  for (int64_t k = 1; k < n; ++k) found = std::max<int64_t>(found, from[k * stride]);
  return found;
}

// What a loop over the columns of a tile does with a block of rows.
enum Kind { SKIPPED, MASKED, KEPT };
struct Range {
  int64_t from, to;
  Kind kind;
};

// Rows of floats, `ld` apart.
struct Rows {
  const float* at;
  int64_t ld;
  const float* operator[](int64_t i) const { return at + i * ld; }
};

template <typename T> inline void read(const T* from, int64_t stride, int64_t n, float* to) {
  int64_t k = 0;
  if (stride == 1) {
    for (; k + W <= n; k += W) {
      Vec v;
      if constexpr (std::is_same_v<T, float>) v = Vec::loadu(from + k);
      else if constexpr (sizeof(T) == 2) at::vec::load_to_float<T>(from + k, v);
      v.store(to + k);
    }
  }
  for (; k < n; ++k) to[k] = static_cast<float>(from[k * stride]);
}

template <typename T> inline void write(const float* from, int64_t n, T* to, int64_t stride) {
  int64_t k = 0;
  if constexpr (std::is_same_v<T, float>) {
    if (stride == 1) for (; k + W <= n; k += W) Vec::loadu(from + k).store(to + k);
  }
  for (; k < n; ++k) to[k * stride] = static_cast<T>(from[k]);
}

// The entry of a table at an index that may count from its end.
template <typename T> inline float entry(const T* table, int64_t stride, int64_t size, int64_t index, int which, Bad& bad) {
  if (index < -size || index >= size) {
    bad.report(which, index, index, size);
    return 0.0f;
  }
  return static_cast<float>(table[(index < 0 ? index + size : index) * stride]);
}

// n values as a vector loop reads them: side by side, with zeros up to a whole register. In place where they are so.
template <typename A, typename T> inline const A* line(const T* from, int64_t stride, int64_t n, A* buffer) {
  if constexpr (std::is_same_v<A, T>) if (stride == 1 && n % W == 0) return from;
  for (int64_t k = 0; k < n; ++k) buffer[k] = static_cast<A>(from[k * stride]);
  for (int64_t k = n; k < round_up(n, W); ++k) buffer[k] = 0;
  return buffer;
}

// [n, d] as rows of floats, with zeros up to whole registers. In place where they are so.
template <typename T> inline Rows rows(const T* from, int64_t row, int64_t column, int64_t n, int64_t d, float* buffer) {
  if constexpr (std::is_same_v<T, float>) if (column == 1 && d % W == 0) return {from, row};
  const int64_t ld = round_up(d, W);
  for (int64_t i = 0; i < n; ++i) {
    read(from + i * row, column, d, buffer + i * ld);
    std::fill(buffer + i * ld + d, buffer + (i + 1) * ld, 0.0f);
  }
  return {buffer, ld};
}

// [n, d] as panels of columns: the right side of a product over n.
template <typename T> inline void panels(const T* from, int64_t row, int64_t column, int64_t n, int64_t d, float* to) {
  for (int64_t d0 = 0; d0 < d; d0 += PANEL, to += n * PANEL) {
    const int64_t width = std::min(PANEL, d - d0);
    for (int64_t i = 0; i < n; ++i) {
      __builtin_prefetch(from + (i + 16) * row + d0 * column);  // a row of other heads lies between
      read(from + i * row + d0 * column, column, width, to + i * PANEL);
      if (width < PANEL) std::fill(to + i * PANEL + width, to + (i + 1) * PANEL, 0.0f);
    }
  }
}

// [n, d] transposed, as panels of rows: the right side of a product over d.
inline void transposed_panels(Rows x, int64_t n, int64_t d, float* to) {
  for (int64_t n0 = 0; n0 < n; n0 += PANEL, to += d * PANEL)
    for (int64_t half = 0; half < PANEL; half += W)
      for (int64_t d0 = 0; d0 < d; d0 += W) {
        const float* const from = x[n0 + half] + d0;
        for (int64_t i = 0; i < W; ++i) __builtin_prefetch(from + (i + W) * x.ld);
        float* const block = to + d0 * PANEL + half;
        const int64_t have = std::min(W, n - n0 - half), wide = std::min(W, d - d0);
        if (have == W && wide == W) {
          at::vec::transpose_mxn<float, W, W>(from, x.ld, block, PANEL);
        } else {
          for (int64_t k = 0; k < wide; ++k)
            for (int64_t i = 0; i < W; ++i) block[k * PANEL + i] = i < have ? from[i * x.ld + k] : 0.0f;
        }
      }
}

// The right side of a product: element (k, n) is at[n / PANEL * panel + k * ld + n % PANEL].
struct Right {
  const float* at;
  int64_t ld, panel;
};
inline Right right(Rows x) { return {x.at, x.ld, PANEL}; }
inline Right right(const float* packed, int64_t k) { return {packed, PANEL, k * PANEL}; }

// R rows of V registers: c = a b, or c += a b; the last register holds `last` columns.
template <int R, int V, bool ADD>
inline void block(int64_t K, const float* a, int64_t am, int64_t ak, const float* b, int64_t ldb, int64_t panel, float* c, int64_t ldc,
                  int64_t last) {
  Vec sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = Vec(0.0f);
  for (int64_t k = 0; k < K; ++k) {
    Vec right[V];
    for (int v = 0; v < V; ++v) right[v] = Vec::loadu(b + k * ldb + v / 2 * panel + v % 2 * W);
    for (int r = 0; r < R; ++r) {
      const Vec left(a[r * am + k * ak]);
      for (int v = 0; v < V; ++v) sum[r][v] = at::vec::fmadd(left, right[v], sum[r][v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      float* const to = c + r * ldc + v * W;
      if (v < V - 1 || last == W) (ADD ? Vec::loadu(to) + sum[r][v] : sum[r][v]).store(to);
      else (ADD ? Vec::loadu(to, last) + sum[r][v] : sum[r][v]).store(to, last);
    }
}

template <int R, bool ADD>
inline void row_block(int64_t n, int64_t K, const float* a, int64_t am, int64_t ak, Right b, float* c, int64_t ldc) {
  int64_t n0 = 0;
  if constexpr (R <= 2)  // few rows: more columns at a time keep both multipliers busy
    for (; n0 + 4 * PANEL / R <= n; n0 += 4 * PANEL / R)
      block<R, 8 / R, ADD>(K, a, am, ak, b.at + n0 / PANEL * b.panel, b.ld, b.panel, c + n0, ldc, W);
  for (; n0 + W < n; n0 += PANEL)
    block<R, 2, ADD>(K, a, am, ak, b.at + n0 / PANEL * b.panel, b.ld, b.panel, c + n0, ldc, std::min(W, n - n0 - W));
  if (n0 < n) block<R, 1, ADD>(K, a, am, ak, b.at + n0 / PANEL * b.panel, b.ld, b.panel, c + n0, ldc, n - n0);
}

// c[m, n] = a[m, k] b[k, n], or += . More than R rows are taken R at a time.
constexpr int64_t R = 6;
template <bool ADD>
inline void product(int64_t m, int64_t n, int64_t K, const float* a, int64_t am, int64_t ak, Right b, float* c, int64_t ldc) {
  for (; m >= R; m -= R, a += R * am, c += R * ldc) row_block<R, ADD>(n, K, a, am, ak, b, c, ldc);
  switch (m) {
    case 5: return row_block<5, ADD>(n, K, a, am, ak, b, c, ldc);
    case 4: return row_block<4, ADD>(n, K, a, am, ak, b, c, ldc);
    case 3: return row_block<3, ADD>(n, K, a, am, ak, b, c, ldc);
    case 2: return row_block<2, ADD>(n, K, a, am, ak, b, c, ldc);
    case 1: return row_block<1, ADD>(n, K, a, am, ak, b, c, ldc);
  }
}

// c[m, n] = <a[m], b[n]>, without a transposed copy of b: for few rows a.
inline void dots(int64_t m, int64_t n, int64_t d, Rows a, Rows b, float* c, int64_t ldc) {
  alignas(64) float part[W * W], turned[W * W];
  for (int64_t n0 = 0; n0 < n; n0 += W)
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t w = 0; w < W; ++w) {
        const float* const x = b[std::min(n0 + w, n - 1)];
        Vec sum(0.0f);
        for (int64_t k = 0; k < d; k += W) sum = at::vec::fmadd(Vec::loadu(a[i] + k), Vec::loadu(x + k), sum);
        sum.store(part + w * W);
      }
      at::vec::transpose_mxn<float, W, W>(part, W, turned, W);
      Vec total = Vec::loadu(turned);
      for (int64_t w = 1; w < W; ++w) total = total + Vec::loadu(turned + w * W);
      total.store(c + i * ldc + n0);
    }
}

// Columns c0 to c1 of a row of scores: their maximum (NaN if there is one), and exp(score - shift) in their place.
inline float maximum(const float* s, int64_t c0, int64_t c1) {
  Vec top = Vec::loadu(s + c0);
  for (int64_t c = c0 + W; c < c1; c += W) top = at::vec::maximum(top, Vec::loadu(s + c));
  return at::vec::vec_reduce_all<float>([](Vec a, Vec b) { return at::vec::maximum(a, b); }, top);
}
inline float exponentials(float* s, int64_t c0, int64_t c1, float shift) {
  float sum = 0;
  #pragma omp simd reduction(+ : sum)
  for (int32_t c = int32_t(c0); c < int32_t(c1); ++c) {
    s[c] = real::exp(s[c] - shift);
    sum += s[c];
  }
  return sum;
}
inline void scale(float* x, int64_t n, float by) {
  for (int64_t k = 0; k < n; k += W) (Vec::loadu(x + k) * Vec(by)).store(x + k);
}
"""
