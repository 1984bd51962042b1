// SSD (Mamba-2) over sequences of rows (tokens, H, P), with B and C (tokens, G, N) and step sizes (tokens, H).
//
//     h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t^T      y_t = (h_t C_t + D x_t) silu(z_t)      h of P rows and N columns
//
// A head's decay is one number a token, so a chunk is a few small matrix products, and all of them run in one kernel of
// register tiles (`multiply`). With U_j = dt_j x_j, and a decay from after token j through token i of M_ij (a product of
// exp(dt A), never a quotient), h the state before the chunk and d the cotangent of the one after it:
//
//     y_i = M_i0 h C_i + sum_{j<=i} M_ij (C_i . B_j) U_j                   h_end = M_L0 h + sum_j M_Lj U_j B_j^T
//     dU_j = M_Lj d B_j + sum_{i>=j} M_ij (C_i . B_j) G_i                  d_begin = M_L0 d + sum_i M_i0 G_i C_i^T
//     dB_j = M_Lj d^T U_j + sum_{i>=j} M_ij (G_i . U_j) C_i                dC_i = M_i0 h^T G_i + sum_{j<=i} M_ij (G_i . U_j) B_j
//
// A decay's logarithm gets the sum of all products that passed through it. Chunks are padded with tokens of step size
// zero, rows with zeros. Backward recomputes the states of the chunks from the one kept every 128 tokens.

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kChunk = 16;   // tokens of a chunk: a whole number of vectors
constexpr int64_t kEvery = 128;  // tokens between kept states
constexpr int64_t kHeads = 4;    // heads of a task of backward, all of one group
constexpr int kRows = 4;         // of a register tile, and its vectors
constexpr int kWide = STATEWISE_VECTOR_BYTES == 64 ? 4 : 2;

struct Shape {
    int64_t H, P, N, G;
};

template <class T>
constexpr int64_t padded(int64_t size) {
    return round_up(size, kLanes<T> > kRows ? kLanes<T> : kRows);
}

// Step sizes are of the dtype of sums: one rounded to bfloat16 would be a different decay.
template <class IO, class T>
struct Inputs {
    const IO *x, *B, *C, *z;
    const T *dt, *A, *D;
};

// ---- matrices: rows of whole vectors

enum Steps { kAll, kUpTo, kFrom };  // of a triangle: those up to the row's own, or from it

template <class T>
struct Left {  // element (r, k)
    const T* at;
    int64_t row, step;
};

template <class T>
struct Start {  // what a sum starts from: rows times factors; null: zeros
    const T *rows, *factor;
    int64_t step;  // 0: one factor for all
};

template <int V, Steps steps, class T>
STATEWISE_INLINE void tile(
    T* out, Start<T> start, Left<T> left, const T* right, int64_t width, int64_t row, int64_t count) {
    constexpr int64_t lanes = kLanes<T>;
    Vec<T> sum[kRows][V];
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < V; ++v)
            sum[r][v] = start.rows ? load<T>(start.rows + (row + r) * width + v * lanes) *
                                         start.factor[(row + r) * start.step]
                                   : Vec<T>{};
    const int64_t last = steps == kUpTo ? row + kRows : count;
    const T* a = left.at + row * left.row;
    for (int64_t k = steps == kFrom ? row : 0; k < last; ++k) {
        Vec<T> b[V];
        for (int v = 0; v < V; ++v) b[v] = load<T>(right + k * width + v * lanes);
        for (int r = 0; r < kRows; ++r) {
            const T factor = a[r * left.row + k * left.step];
            for (int v = 0; v < V; ++v) sum[r][v] += b[v] * factor;
        }
    }
    for (int r = 0; r < kRows; ++r)
        for (int v = 0; v < V; ++v) store<T>(out + (row + r) * width + v * lanes, sum[r][v]);
}

// out (rows, width) = start + left (rows, count) · right (count, width). `out` may be what the sum starts from.
template <Steps steps, class T>
__attribute__((noinline)) void multiply(
    T* out, Start<T> start, Left<T> left, const T* right, int64_t rows, int64_t width, int64_t count) {
    constexpr int64_t lanes = kLanes<T>;
    auto panel = [&](auto vectors, int64_t at) {
        const Start<T> from{start.rows ? start.rows + at : nullptr, start.factor, start.step};
        for (int64_t row = 0; row < rows; row += kRows)
            tile<decltype(vectors)::value, steps, T>(out + at, from, left, right + at, width, row, count);
    };
    int64_t at = 0;
    for (; at + kWide * lanes <= width; at += kWide * lanes) panel(std::integral_constant<int, kWide>{}, at);
    if constexpr (kWide > 2)
        if (at + 2 * lanes <= width) panel(std::integral_constant<int, 2>{}, at), at += 2 * lanes;
    if (at < width) panel(std::integral_constant<int, 1>{}, at);
}

// (rows, columns), both whole vectors, into (columns, rows).
template <class T>
__attribute__((noinline)) void transpose(const T* from, T* to, int64_t rows, int64_t columns) {
    constexpr int64_t lanes = kLanes<T>;
    for (int64_t r = 0; r < rows; r += lanes)
        for (int64_t c = 0; c < columns; c += lanes) {
            Vec<T> x[lanes];
            for (int i = 0; i < lanes; ++i) x[i] = load<T>(from + (r + i) * columns + c);
            transpose_square<T, lanes / 2>(x);
            for (int i = 0; i < lanes; ++i) store<T>(to + (c + i) * rows + r, x[i]);
        }
}

// `rows` rows of `count` numbers into rows of `width`, up to `most` of them; zeros elsewhere.
template <class T, class IO>
void widen(const IO* from, int64_t stride, int64_t rows, int64_t count, T* to, int64_t most, int64_t width) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < width; i += kLanes<T>) store<T>(to + r * width + i, load<T>(from + r * stride + i, count - i));
    std::fill(to + rows * width, to + most * width, T(0));
}

template <class T>
void narrow(const T* from, int64_t width, T* to, int64_t stride, int64_t rows, int64_t count) {
    for (int64_t r = 0; r < rows; ++r)
        for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(to + r * stride + i, load<T>(from + r * width + i), count - i);
}

// to (rows, width) = from, row by row times a factor
template <class T>
void scale(const T* from, const T* factor, T* to, int64_t width) {
    for (int64_t t = 0; t < kChunk; ++t)
        for (int64_t i = 0; i < width; i += kLanes<T>) store<T>(to + t * width + i, load<T>(from + t * width + i) * factor[t]);
}

// ---- a chunk

// Scores C_i . B_j of every chunk, (slots, G, kChunk, kChunk): the heads of a group share them.
template <class T>
int64_t scores_size(const Span* spans, int64_t n, Shape shape) {
    if (!n) return 0;
    const int64_t last = (spans[n - 1].count + kChunk - 1) / kChunk;
    return (first_slot(spans, n - 1, kChunk) + last) * shape.G * kChunk * kChunk;
}

template <class IO, class T>
void find_scores(const Inputs<IO, T>& in, const Span* spans, int64_t n, Shape shape, T* scores) {
    const int64_t N = shape.N, width = padded<T>(N);
    Scratch<T> B(kChunk * width), C(kChunk * width), turned(kChunk * width);
    for (int64_t i = 0; i < n; ++i) {
        const int64_t chunks = (spans[i].count + kChunk - 1) / kChunk;
        T* to = scores + first_slot(spans, i, kChunk) * shape.G * kChunk * kChunk;
#pragma omp for schedule(static) nowait
        for (int64_t task = 0; task < chunks * shape.G; ++task) {
            const int64_t chunk = task / shape.G, group = task % shape.G;
            const int64_t length = std::min(kChunk, spans[i].count - chunk * kChunk);
            const int64_t from = ((spans[i].begin + chunk * kChunk) * shape.G + group) * N;
            widen<T>(in.B + from, shape.G * N, length, N, B, kChunk, width);
            widen<T>(in.C + from, shape.G * N, length, N, C, kChunk, width);
            transpose<T>(B, turned, kChunk, width);
            multiply<kAll, T>(to + task * kChunk * kChunk, {}, {C, width, 1}, turned, kChunk, kChunk, width);
        }
    }
#pragma omp barrier
}

template <class T>
struct Chunk {
    int64_t P, N;                 // padded
    T dt[kChunk], upto[kChunk], rest[kChunk];  // step sizes; M_i0 and M_Lj
    Scratch<T> x, U, late, B, C;  // late: rest times U
    Scratch<T> M, W;              // (kChunk, kChunk); W: M times scores
    explicit Chunk(Shape shape)
        : P(padded<T>(shape.P)), N(padded<T>(shape.N)), x(kChunk * P), U(kChunk * P), late(kChunk * P), B(kChunk * N),
          C(kChunk * N), M(kChunk * kChunk), W(kChunk * kChunk) {}

    const T* whole() const { return upto + kChunk - 1; }

    // Tokens token .. token + length. Without scores, only what the next state needs.
    template <class IO>
    void fill(const Inputs<IO, T>& in, int64_t token, int64_t length, Shape shape, int64_t head, const T* scores) {
        constexpr int64_t lanes = kLanes<T>;
        const int64_t group = head / (shape.H / shape.G), from = (token * shape.G + group) * shape.N;
        T decay[kChunk];
        for (int64_t t = 0; t < kChunk; ++t) dt[t] = t < length ? in.dt[(token + t) * shape.H + head] : T(0);
        for (int64_t t = 0; t < kChunk; t += lanes) {
            Vec<T> power = load<T>(dt + t) * (in.A[head] * kLog2E<T>);
            store<T>(decay + t, exp2<T>(power));
        }
        for (int64_t t = length; t < kChunk; ++t) decay[t] = T(1);
        T product = 1;
        for (int64_t t = 0; t < kChunk; ++t) upto[t] = product *= decay[t];
        product = 1;
        for (int64_t t = kChunk - 1; t >= 0; --t) rest[t] = product, product *= decay[t];

        widen<T>(in.x + (token * shape.H + head) * shape.P, shape.H * shape.P, length, shape.P, x, kChunk, P);
        widen<T>(in.B + from, shape.G * shape.N, length, shape.N, B, kChunk, N);
        scale<T>(x, dt, U, P);
        scale<T>(U, rest, late, P);
        if (!scores) return;
        widen<T>(in.C + from, shape.G * shape.N, length, shape.N, C, kChunk, N);
        const Int<T> index = lane_index<T>(std::make_integer_sequence<int, kLanes<T>>{});
        for (int64_t j = 0; j < kChunk; j += lanes) {
            Vec<T> between = {};
            for (int64_t i = 0; i < kChunk; ++i) {
                between = index + int(j) == int(i) ? splat<T>(1) : between * decay[i];
                store<T>(M + i * kChunk + j, between);
                store<T>(W + i * kChunk + j, between * load<T>(scores + i * kChunk + j));
            }
        }
    }

    // What tokens put out, (kChunk, P), from the state before them, (N, P).
    void outputs(const T* state, T* y) const {
        multiply<kAll, T>(y, {}, {C, N, 1}, state, kChunk, P, N);
        multiply<kUpTo, T>(y, {y, upto, 1}, {W, kChunk, 1}, U, kChunk, P, kChunk);
    }
};

// ---- forward: the state as (N, P), so that outputs are sums of its rows

template <class IO, class T>
void forward_head(
    const Inputs<IO, T>& in, const T* scores, const T* begin, IO* y, T* end, T* kept, Span span, Shape shape, int64_t head,
    Chunk<T>& chunk, T* state, T* turned, T* out) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t P = shape.P, N = shape.N, H = shape.H, group = head / (H / shape.G);
    widen<T>(begin, N, P, N, turned, chunk.P, chunk.N);
    transpose<T>(turned, state, chunk.P, chunk.N);
    for (int64_t start = 0; start < span.count; start += kChunk) {
        const int64_t token = span.begin + start, length = std::min(kChunk, span.count - start);
        if (kept && start % kEvery == 0) narrow<T>(state, chunk.P, kept + start / kEvery * H * P * N, P, N, P);
        chunk.fill(
            in, token, length, shape, head, scores + (start / kChunk * shape.G + group) * kChunk * kChunk);
        chunk.outputs(state, out);
        multiply<kAll, T>(
            state, {state, chunk.whole(), 0}, {chunk.B, 1, chunk.N}, chunk.late, chunk.N, chunk.P, kChunk);
        for (int64_t t = 0; t < length; ++t)
            for (int64_t p = 0; p < P; p += lanes) {
                const int64_t at = ((token + t) * H + head) * P + p;
                Vec<T> value = load<T>(out + t * chunk.P + p);
                if (in.D) value += load<T>(in.D + head * P + p, P - p) * load<T>(chunk.x + t * chunk.P + p);
                if (in.z) {
                    Vec<T> z = load<T>(in.z + at, P - p);
                    value *= z * sigmoid<T>(z);
                }
                store<T>(y + at, value, P - p);
            }
    }
    transpose<T>(state, turned, chunk.N, chunk.P);
    narrow<T>(turned, chunk.N, end, N, P, N);
}

template <class IO, class T>
void forward(
    Inputs<IO, T> in, const Span* spans, int64_t n, Shape shape, const T* begin, IO* y, T* end, T* kept, int64_t threads) {
    const int64_t size = shape.P * shape.N;
    Scratch<T> all_scores(scores_size<T>(spans, n, shape));
    T* scores = all_scores;
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        find_scores<IO, T>(in, spans, n, shape, scores);
        Chunk<T> chunk(shape);
        Scratch<T> state(chunk.P * chunk.N), turned(chunk.P * chunk.N), out(kChunk * chunk.P);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * shape.H; ++task) {
            const int64_t i = task / shape.H, head = task % shape.H;
            forward_head<IO, T>(
                in, scores + first_slot(spans, i, kChunk) * shape.G * kChunk * kChunk, begin + task * size, y,
                end + task * size, kept ? kept + (first_slot(spans, i, kEvery) * shape.H + head) * size : nullptr,
                spans[i], shape, head, chunk, state, turned, out);
        }
    }
}

// ---- backward: states as (P, N), so that the gradients of B and C are sums of their rows

template <class IO, class T>
struct Gradients {
    IO *x, *z;
    T *dt, *A, *D, *begin;
    T *B, *C;  // of this task's heads
    int64_t stride;
    bool first;  // no head before this one
};

template <class T>
struct BackWork {
    Scratch<T> states, turned, grad;           // before each chunk; a transposed one; the cotangent
    Scratch<T> G, early, U, dU, dB, dC, y, D;  // early: upto times G; U transposed
    Scratch<T> Z, WZ;                          // G_i . U_j, and M times that
    BackWork(int64_t P, int64_t N)
        : states(kEvery / kChunk * P * N), turned(P * N), grad(P * N), G(kChunk * P), early(kChunk * P), U(kChunk * P),
          dU(kChunk * P), dB(kChunk * N), dC(kChunk * N), y(kChunk * P), D(P), Z(kChunk * kChunk),
          WZ(kChunk * kChunk) {}
};

template <class T>
STATEWISE_INLINE Vec<T> dot(const T* x, const T* y, int64_t count) {
    Vec<T> sum = {};
    for (int64_t i = 0; i < count; i += kLanes<T>) sum += load<T>(x + i) * load<T>(y + i);
    return sum;
}

// Sums over j < l <= i of Z_ij W_ij, for every l
template <class T>
void across(const T* Z, const T* W, T* sums) {
    constexpr int64_t lanes = kLanes<T>;
    const Int<T> index = lane_index<T>(std::make_integer_sequence<int, kLanes<T>>{});
    Vec<T> below[kChunk / lanes] = {}, pair[2];
    for (int64_t l = kChunk - 1; l >= 0; --l) {
        Vec<T> sum = {};
        for (int64_t v = 0; v < kChunk / lanes; ++v) {
            const int64_t at = l * kChunk + v * lanes;
            below[v] += load<T>(Z + at) * load<T>(W + at);
            sum += index + int(v * lanes) < int(l) ? below[v] : Vec<T>{};
        }
        pair[l % 2] = sum;
        if (l % 2 == 0) sum2<T>(pair[0], pair[1], sums[l], sums[l + 1]);
    }
}

template <class T>
T inner(const T* x, const T* y, int64_t count) {  // count: whole numbers of kRows vectors
    Vec<T> sum[kRows] = {};
    for (int64_t i = 0; i < count; i += kRows * kLanes<T>)
        for (int j = 0; j < kRows; ++j) sum[j] += load<T>(x + i + j * kLanes<T>) * load<T>(y + i + j * kLanes<T>);
    T value, none;
    sum2<T>((sum[0] + sum[1]) + (sum[2] + sum[3]), Vec<T>{}, value, none);
    return value;
}

// One chunk back: work.grad is the cotangent of the state after it on entry, before it on return.
template <class IO, class T>
void backward_chunk(
    const Inputs<IO, T>& in, const T* scores, const IO* grad_y, const T* state, Gradients<IO, T> out, int64_t token,
    int64_t length, Shape shape, int64_t head, Chunk<T>& chunk, BackWork<T>& work) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t P = shape.P, N = shape.N, H = shape.H, row = H * P, at = (token * H + head) * P;
    chunk.fill(in, token, length, shape, head, scores);
    widen<T>(grad_y + at, row, length, P, work.G, kChunk, chunk.P);
    if (in.z) {
        transpose<T>(state, work.turned, chunk.P, chunk.N);
        chunk.outputs(work.turned, work.y);
        for (int64_t t = 0; t < length; ++t)
            for (int64_t p = 0; p < P; p += lanes) {
                const int64_t here = t * chunk.P + p;
                Vec<T> z = load<T>(in.z + at + t * row + p, P - p), gate = sigmoid<T>(z);
                Vec<T> y = load<T>(work.y + here), g = load<T>(work.G + here);
                if (in.D) y += load<T>(in.D + head * P + p, P - p) * load<T>(chunk.x + here);
                store<T>(out.z + at + t * row + p, g * y * (gate * (T(1) + z * (T(1) - gate))), P - p);
                store<T>(work.G + here, g * (z * gate));
            }
    }
    scale<T>(work.G, chunk.upto, work.early, chunk.P);
    transpose<T>(chunk.U, work.U, kChunk, chunk.P);
    multiply<kAll, T>(work.Z, {}, {work.G, chunk.P, 1}, work.U, kChunk, kChunk, chunk.P);
    for (int64_t i = 0; i < kChunk * kChunk; i += lanes) store<T>(work.WZ + i, load<T>(work.Z + i) * load<T>(chunk.M + i));

    transpose<T>(work.grad, work.turned, chunk.P, chunk.N);
    multiply<kAll, T>(work.dC, {}, {work.early, chunk.P, 1}, state, kChunk, chunk.N, chunk.P);
    multiply<kAll, T>(work.dB, {}, {chunk.late, chunk.P, 1}, work.grad, kChunk, chunk.N, chunk.P);
    multiply<kAll, T>(work.dU, {}, {chunk.B, chunk.N, 1}, work.turned, kChunk, chunk.P, chunk.N);

    T log_decay[kChunk], from_begin[kChunk], to_end[kChunk];
    across<T>(work.Z, chunk.W, log_decay);
    for (int64_t t = 0; t < kChunk; ++t)
        sum2<T>(
            dot<T>(chunk.C + t * chunk.N, work.dC + t * chunk.N, chunk.N),
            dot<T>(chunk.late + t * chunk.P, work.dU + t * chunk.P, chunk.P), from_begin[t], to_end[t]);
    T passing = inner<T>(state, work.grad, chunk.P * chunk.N) * *chunk.whole();
    for (int64_t t = 0; t < kChunk; ++t) log_decay[t] += passing, passing += to_end[t];
    T later = 0;
    for (int64_t t = kChunk - 1; t >= 0; --t) log_decay[t] += later += from_begin[t];

    const T one = 1;
    multiply<kUpTo, T>(work.dC, {work.dC, &one, 0}, {work.WZ, kChunk, 1}, chunk.B, kChunk, chunk.N, kChunk);
    multiply<kFrom, T>(work.dB, {work.dB, &one, 0}, {work.WZ, 1, kChunk}, chunk.C, kChunk, chunk.N, kChunk);
    multiply<kFrom, T>(work.dU, {work.dU, chunk.rest, 1}, {chunk.W, 1, kChunk}, work.G, kChunk, chunk.P, kChunk);
    multiply<kAll, T>(
        work.grad, {work.grad, chunk.whole(), 0}, {work.early, 1, chunk.P}, chunk.C, chunk.P, chunk.N, kChunk);

    for (int64_t t = 0; t < length; ++t) {
        for (int64_t i = 0; i < N; i += lanes) {
            const int64_t here = (token + t) * out.stride + i;
            Vec<T> d_B = load<T>(work.dB + t * chunk.N + i), d_C = load<T>(work.dC + t * chunk.N + i);
            if (!out.first) d_B += load<T>(out.B + here, N - i), d_C += load<T>(out.C + here, N - i);
            store<T>(out.B + here, d_B, N - i);
            store<T>(out.C + here, d_C, N - i);
        }
        Vec<T> to_dt = {};
        for (int64_t p = 0; p < P; p += lanes) {
            const int64_t here = t * chunk.P + p;
            Vec<T> d_U = load<T>(work.dU + here), x = load<T>(chunk.x + here), d_x = d_U * chunk.dt[t];
            to_dt += d_U * x;
            if (in.D) {
                Vec<T> g = load<T>(work.G + here);
                d_x += g * load<T>(in.D + head * P + p, P - p);
                store<T>(work.D + p, load<T>(work.D + p) + g * x);
            }
            store<T>(out.x + at + t * row + p, d_x, P - p);
        }
        T step, none;
        sum2<T>(to_dt, Vec<T>{}, step, none);
        out.dt[(token + t) * H + head] = step + in.A[head] * log_decay[t];
        out.A[head] += chunk.dt[t] * log_decay[t];
    }
}

template <class IO, class T>
void backward_head(
    const Inputs<IO, T>& in, const T* scores, const T* kept, const IO* grad_y, const T* grad_end,
    Gradients<IO, T> out, Span span, Shape shape, int64_t head, Chunk<T>& chunk, BackWork<T>& work) {
    const int64_t P = shape.P, N = shape.N, group = head / (shape.H / shape.G), size = chunk.P * chunk.N;
    widen<T>(grad_end, N, P, N, work.grad, chunk.P, chunk.N);
    std::fill((T*)work.D, work.D + chunk.P, T(0));
    out.A[head] = 0;
    const int64_t segments = (span.count + kEvery - 1) / kEvery;
    for (int64_t segment = segments - 1; segment >= 0; --segment) {
        const int64_t start = segment * kEvery, count = std::min(kEvery, span.count - start);
        const int64_t chunks = (count + kChunk - 1) / kChunk;
        widen<T>(kept + segment * shape.H * P * N, P, N, P, work.turned, chunk.N, chunk.P);
        transpose<T>(work.turned, work.states, chunk.N, chunk.P);
        for (int64_t c = 0; c + 1 < chunks; ++c) {
            chunk.fill(in, span.begin + start + c * kChunk, kChunk, shape, head, nullptr);
            multiply<kAll, T>(
                work.states + (c + 1) * size, {work.states + c * size, chunk.whole(), 0}, {chunk.late, 1, chunk.P},
                chunk.B, chunk.P, chunk.N, kChunk);
        }
        for (int64_t c = chunks - 1; c >= 0; --c)
            backward_chunk<IO, T>(
                in, scores + ((start / kChunk + c) * shape.G + group) * kChunk * kChunk, grad_y, work.states + c * size,
                out, span.begin + start + c * kChunk, std::min(kChunk, count - c * kChunk), shape, head, chunk, work);
    }
    narrow<T>(work.grad, chunk.N, out.begin, N, P, N);
    if (in.D) std::copy_n((T*)work.D, P, out.D + head * P);
}

template <class IO, class T>
void backward(
    Inputs<IO, T> in, const Span* spans, int64_t n, Shape shape, const T* kept, const IO* grad_y, const T* grad_end,
    Gradients<IO, T> out, IO* grad_B, IO* grad_C, int64_t threads) {
    const int64_t N = shape.N, size = shape.P * N, heads = shape.H / shape.G;
    const int64_t blocks = (heads + kHeads - 1) / kHeads;  // of a group
    int64_t tokens = 0;
    for (int64_t i = 0; i < n; ++i) tokens = std::max(tokens, spans[i].begin + spans[i].count);
    const int64_t part = tokens * shape.G * N;
    // Where sums have the dtype of gradients, the first block writes where the sum will be.
    constexpr bool in_place = std::is_same<IO, T>::value;
    const int64_t parts = blocks - in_place;
    Scratch<T> all_scores(scores_size<T>(spans, n, shape)), all_parts(2 * parts * part);
    T *scores = all_scores, *parts_B = all_parts, *parts_C = parts_B + parts * part;
    auto part_of = [&](int64_t block, T* all, [[maybe_unused]] IO* grad) -> T* {
        if constexpr (in_place) return block ? all + (block - 1) * part : grad;
        return all + block * part;
    };
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        find_scores<IO, T>(in, spans, n, shape, scores);
        Chunk<T> chunk(shape);
        BackWork<T> work(chunk.P, chunk.N);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * shape.G * blocks; ++task) {
            const int64_t i = task / (shape.G * blocks), group = task / blocks % shape.G, block = task % blocks;
            Gradients<IO, T> mine = out;
            mine.A += i * shape.H;
            if (mine.D) mine.D += i * shape.H * shape.P;
            mine.B = part_of(block, parts_B, grad_B) + group * N;
            mine.C = part_of(block, parts_C, grad_C) + group * N;
            mine.stride = shape.G * N;
            for (int64_t of = block * kHeads; of < std::min(heads, (block + 1) * kHeads); ++of) {
                const int64_t head = group * heads + of;
                mine.begin = out.begin + (i * shape.H + head) * size;
                mine.first = of == block * kHeads;
                backward_head<IO, T>(
                    in, scores + first_slot(spans, i, kChunk) * shape.G * kChunk * kChunk,
                    kept + (first_slot(spans, i, kEvery) * shape.H + head) * size, grad_y,
                    grad_end + (i * shape.H + head) * size, mine, spans[i], shape, head, chunk, work);
            }
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t token = spans[i].begin; token < spans[i].begin + spans[i].count; ++token)
                for (int64_t at = token * shape.G * N; at < (token + 1) * shape.G * N; at += kLanes<T>) {
                    const int64_t left = (token + 1) * shape.G * N - at;
                    Vec<T> d_B = load<T>(part_of(0, parts_B, grad_B) + at, left);
                    Vec<T> d_C = load<T>(part_of(0, parts_C, grad_C) + at, left);
                    for (int64_t block = 1; block < blocks; ++block) {
                        d_B += load<T>(part_of(block, parts_B, grad_B) + at, left);
                        d_C += load<T>(part_of(block, parts_C, grad_C) + at, left);
                    }
                    store<T>(grad_B + at, d_B, left);
                    store<T>(grad_C + at, d_C, left);
                }
    }
}

}  // namespace

// z and D (H, P) may be null. dt is final. State (n, H, P, N). Kept states, or null: (tokens / 128 + n, H, N, P).
STATEWISE_EXPORT int ssd_forward(
    int64_t dtype, const void* x, const void* dt, const void* B, const void* C, const void* z, const void* A,
    const void* D, const void* spans, int64_t n, int64_t H, int64_t P, int64_t N, int64_t G, const void* begin, void* y,
    void* end, void* kept, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        forward<IO, T>(
            Inputs<IO, T>{(const IO*)x, (const IO*)B, (const IO*)C, (const IO*)z, (const T*)dt, (const T*)A, (const T*)D},
            (const Span*)spans, n, Shape{H, P, N, G}, (const T*)begin, (IO*)y, (T*)end, (T*)kept, threads);
        return true;
    });
}

STATEWISE_EXPORT int ssd_backward(
    int64_t dtype, const void* x, const void* dt, const void* B, const void* C, const void* z, const void* A,
    const void* D, const void* spans, int64_t n, int64_t H, int64_t P, int64_t N, int64_t G, const void* /*begin*/,
    const void* /*end*/, const void* kept, const void* grad_y, const void* grad_end, void* grad_x, void* grad_dt,
    void* grad_B, void* grad_C, void* grad_z, void* grad_A, void* grad_D, void* grad_begin, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        backward<IO, T>(
            Inputs<IO, T>{(const IO*)x, (const IO*)B, (const IO*)C, (const IO*)z, (const T*)dt, (const T*)A, (const T*)D},
            (const Span*)spans, n, Shape{H, P, N, G}, (const T*)kept, (const IO*)grad_y, (const T*)grad_end,
            Gradients<IO, T>{(IO*)grad_x, (IO*)grad_z, (T*)grad_dt, (T*)grad_A, (T*)grad_D, (T*)grad_begin, nullptr,
                             nullptr, 0, true},
            (IO*)grad_B, (IO*)grad_C, threads);
        return true;
    });
}
