// WKV-7 over sequences of rows (tokens, H, K or V).
//
//     S_t = (diag(exp log_w_t) + b_t a_t^T) S_{t-1} + k_t v_t^T        y_t = S_t^T r_t        S of K rows and V columns
//
// Token after token: a rank-two update of a matrix that stays in the first cache needs fewer operations than any
// chunked form. Forward keeps columns in lanes: sums over rows are then sums of vectors, what a_{t+1} finds is gathered
// while S_t passes by, and each element is loaded and stored once a token. Backward keeps rows in lanes (S transposed),
// since most of its sums run over columns. It recomputes the states of a chunk from the one kept at its start and what
// forward found there, and never divides by a decay.

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kEvery = 16;  // tokens between kept states
constexpr int64_t kAhead = 4;   // tokens a forward pass asks for rows ahead of time

struct Shape {
    int64_t H, K, V;
};

template <class T>
struct Kept {  // of one chunk and head: the state before it (K, V), then what each token found (kEvery, V)
    T* at;
    T* found(Shape shape) const { return at + shape.K * shape.V; }
    static int64_t size(Shape shape) { return (shape.K + kEvery) * shape.V; }
};

// Columns v .. v + NV·lanes of one head of one sequence.
template <int NV, class IO, class T>
void forward_columns(
    const IO* r, const IO* log_w, const IO* k, const IO* v, const IO* a, const IO* b, const T* begin, IO* y, T* end,
    T* kept, Span span, Shape shape, int64_t head, int64_t column, T* S, T* rows) {
    constexpr int64_t lanes = kLanes<T>, width = NV * lanes;
    const int64_t K = shape.K, V = shape.V, columns = std::min(width, V - column), padded = round_up(K, lanes);
    T *R = rows, *W = rows + padded, *Ks = rows + 2 * padded, *B = rows + 3 * padded, *A = rows + 4 * padded;

    for (int64_t i = 0; i < K; ++i)
        for (int64_t j = 0; j < width; j += lanes)
            store<T>(S + i * width + j, j < columns ? load<T>(begin + i * V + column + j, columns - j) : Vec<T>{});
    Vec<T> next[NV] = {};
    if (span.count) {
        widen<T>(a + (span.begin * shape.H + head) * K, A, K);
        for (int64_t i = 0; i < K; ++i)
            for (int j = 0; j < NV; ++j) next[j] += A[i] * load<T>(S + i * width + j * lanes);
    }
    for (int64_t t = 0; t < span.count; ++t) {
        const int64_t token = (span.begin + t) * shape.H + head;
        Vec<T> found[NV], value[NV], out[NV] = {};
        for (int j = 0; j < NV; ++j) {
            const int64_t left = columns - j * lanes;
            found[j] = next[j];
            next[j] = Vec<T>{};
            value[j] = left > 0 ? load<T>(v + token * V + column + j * lanes, left) : Vec<T>{};
        }
        if (kept) {
            Kept<T> slot{kept + t / kEvery * shape.H * Kept<T>::size(shape)};
            if (t % kEvery == 0)
                for (int64_t i = 0; i < K; ++i)
                    for (int64_t j = 0; j < columns; j += lanes)
                        store<T>(slot.at + i * V + column + j, load<T>(S + i * width + j), columns - j);
            for (int j = 0; j < NV && j * lanes < columns; ++j)
                store<T>(slot.found(shape) + t % kEvery * V + column + j * lanes, found[j], columns - j * lanes);
        }
        if (t + kAhead < span.count) {
            const int64_t later = token + kAhead * shape.H;
            for (const IO* x : {r, log_w, k, b, a}) ask_for(x + later * K, K);
            ask_for(v + later * V + column, columns);
        }
        widen<T>(r + token * K, R, K);
        widen_exp<T>(log_w + token * K, W, K);
        widen<T>(k + token * K, Ks, K);
        widen<T>(b + token * K, B, K);
        if (t + 1 < span.count) widen<T>(a + (token + shape.H) * K, A, K);
        for (int64_t i = 0; i < K; ++i) {
            T* row = S + i * width;
            for (int j = 0; j < NV; ++j) {
                Vec<T> s = load<T>(row + j * lanes) * W[i] + (found[j] * B[i] + value[j] * Ks[i]);
                out[j] += s * R[i];
                next[j] += s * A[i];
                store<T>(row + j * lanes, s);
            }
        }
        for (int j = 0; j < NV && j * lanes < columns; ++j)
            store<T>(y + token * V + column + j * lanes, out[j], columns - j * lanes);
    }
    for (int64_t i = 0; i < K; ++i)
        for (int64_t j = 0; j < columns; j += lanes)
            store<T>(end + i * V + column + j, load<T>(S + i * width + j), columns - j);
    if (kept && span.count % kEvery) {  // nothing returned is left to chance
        Kept<T> slot{kept + span.count / kEvery * shape.H * Kept<T>::size(shape)};
        for (int64_t t = span.count % kEvery; t < kEvery; ++t)
            std::fill_n(slot.found(shape) + t * V + column, columns, T(0));
    }
}

template <class IO, class T>
void forward(
    const IO* r, const IO* log_w, const IO* k, const IO* v, const IO* a, const IO* b, const Span* spans, int64_t n,
    Shape shape, const T* begin, IO* y, T* end, T* kept, int64_t threads) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t vectors = column_vectors(shape.V, n * shape.H, threads, lanes);
    const int64_t width = vectors * lanes, blocks = (shape.V + width - 1) / width;
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Scratch<T> S(shape.K * width), rows(5 * round_up(shape.K, lanes));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * shape.H * blocks; ++task) {
            const int64_t i = task / (shape.H * blocks), head = task / blocks % shape.H, column = task % blocks * width;
            const int64_t state = (i * shape.H + head) * shape.K * shape.V;
            T* keep = kept ? kept + (first_slot(spans, i, kEvery) * shape.H + head) * Kept<T>::size(shape) : nullptr;
            auto run = [&](auto count) {
                forward_columns<decltype(count)::value, IO, T>(
                    r, log_w, k, v, a, b, begin + state, y, end + state, keep, spans[i], shape, head, column, S, rows);
            };
            if (vectors == 4) run(std::integral_constant<int, 4>{});
            else if (vectors == 2) run(std::integral_constant<int, 2>{});
            else run(std::integral_constant<int, 1>{});
        }
    }
}

// Backward takes tokens two by two. Of tokens 1 and 2, with w = exp log_w, found f = S^T a and cotangents dy,
//
//     S_2 = (w_2 w_1) S_0 + (w_2 b_1) f_1^T + (w_2 k_1) v_1^T + b_2 f_2^T + k_2 v_2^T
//     N = dS_2 + r_2 dy_2^T        df_2 = N^T b_2        df_1 = N^T (w_2 b_1) + (b_1·a_2) df_2 + (b_1·r_1) dy_1
//     dS_0 = (w_2 w_1) N + (w_1 a_2) df_2^T + (w_1 r_1) dy_1^T + a_1 df_1^T
//
// so a state is read, and a cotangent read and written, once for two tokens, and every other gradient is made of nine
// sums over columns, of S_0 with dy_1, dy_2, df_1, df_2 and N, and of N with v_1, f_1, v_2, f_2. A token without a second
// goes with one that changes nothing: w = 1, all else 0.

// What backward needs of a chunk: its inputs widened and padded, the factors of its pairs, and the state before each
// pair. Matrices lie as (K / lanes, V, lanes): rows in lanes, so that most sums, over columns, are sums of vectors.
template <class T>
struct Chunk {
    int64_t rows, columns;  // padded K and V
    Scratch<T> r, w, k, a, b, v, found, grad_y;
    Scratch<T> both, b_on, k_on, a_back, r_back;  // w_2 w_1, w_2 b_1, w_2 k_1, w_1 a_2, w_1 r_1
    Scratch<T> grad_v, grad_found;                // of two tokens
    Scratch<T> products;                          // (4, columns): dS_2^T by k_2, b_2, w_2 k_1 and w_2 b_1
    Scratch<T> states, grad;
    Chunk(int64_t rows, int64_t columns)
        : rows(rows), columns(columns), r(kEvery * rows), w(kEvery * rows), k(kEvery * rows), a(kEvery * rows),
          b(kEvery * rows), v(kEvery * columns), found(kEvery * columns), grad_y(kEvery * columns),
          both(kEvery / 2 * rows), b_on(kEvery / 2 * rows), k_on(kEvery / 2 * rows), a_back(kEvery / 2 * rows),
          r_back(kEvery / 2 * rows), grad_v(2 * columns), grad_found(2 * columns), products(4 * columns),
          states(kEvery / 2 * columns * rows), grad(columns * rows) {}
};

// Products of pairs of rows of `count` values, whole vectors, summed; eight of them.
template <class T>
void eight_products(const T* const (&left)[8], const T* const (&right)[8], int64_t count, T* sums) {
    constexpr int64_t lanes = kLanes<T>;
    Vec<T> x[std::max<int64_t>(8, lanes)] = {};
    for (int64_t i = 0; i < count; i += lanes)
        for (int n = 0; n < 8; ++n) x[n] += load<T>(left[n] + i) * load<T>(right[n] + i);
    T all[std::max<int64_t>(8, lanes)];
    for (int64_t n = 0; n < 8; n += lanes) store<T>(all + n, lane_sums<T>(x + n));
    std::copy_n(all, 8, sums);
}

template <class IO>
struct Gradients {
    IO *r, *w, *k, *v, *a, *b;
};

// Two tokens back, the second perhaps not there: chunk.grad is the cotangent of the state after them on entry, of the
// state before them on return. `first` is where the first of them is in the chunk, `token` among all rows (., H).
template <class IO, class T>
void backward_pair(Chunk<T>& chunk, int64_t first, bool second, int64_t token, Shape shape, Gradients<IO> out) {
    constexpr int64_t lanes = kLanes<T>, group = std::max<int64_t>(1, lanes / 4);
    const int64_t K = shape.K, V = shape.V, rows = chunk.rows, columns = chunk.columns, pair = first / 2;
    const T *r1 = chunk.r + first * rows, *w1 = chunk.w + first * rows, *k1 = chunk.k + first * rows;
    const T *a1 = chunk.a + first * rows, *b1 = chunk.b + first * rows;
    const T *r2 = r1 + rows, *w2 = w1 + rows, *k2 = k1 + rows, *a2 = a1 + rows, *b2 = b1 + rows;
    const T *both = chunk.both + pair * rows, *b_on = chunk.b_on + pair * rows, *k_on = chunk.k_on + pair * rows;
    const T *a_back = chunk.a_back + pair * rows, *r_back = chunk.r_back + pair * rows;
    const T *v1 = chunk.v + first * columns, *f1 = chunk.found + first * columns, *dy1 = chunk.grad_y + first * columns;
    const T *v2 = v1 + columns, *f2 = f1 + columns, *dy2 = dy1 + columns;
    T *dv1 = chunk.grad_v, *df1 = chunk.grad_found, *dv2 = dv1 + columns, *df2 = df1 + columns;
    T *grad = chunk.grad, *products = chunk.products;

    for (int64_t c = 0; c < V; c += group) {
        Vec<T> x[4 * group] = {};
        for (int64_t i = 0; i < rows; i += lanes)
            for (int64_t n = 0; n < group; ++n) {
                const Vec<T> d = load<T>(grad + i * columns + (c + n) * lanes);
                x[n] += d * load<T>(k2 + i);
                x[group + n] += d * load<T>(b2 + i);
                x[2 * group + n] += d * load<T>(k_on + i);
                x[3 * group + n] += d * load<T>(b_on + i);
            }
        T sums[4 * group];
        for (int64_t n = 0; n < 4 * group; n += lanes) store<T>(sums + n, lane_sums<T>(x + n));
        for (int n = 0; n < 4; ++n) std::copy_n(sums + n * group, group, products + n * columns + c);
    }
    T dots[8];
    eight_products<T>({k2, b2, k_on, b_on, k1, b1, k1, b1}, {r2, r2, r2, r2, a2, a2, r1, r1}, rows, dots);
    for (int64_t c = 0; c < V; c += lanes) {
        const Vec<T> y1 = load<T>(dy1 + c), y2 = load<T>(dy2 + c);
        const Vec<T> f = load<T>(products + columns + c) + dots[1] * y2;
        store<T>(df2 + c, f);
        store<T>(dv2 + c, load<T>(products + c) + dots[0] * y2);
        store<T>(dv1 + c, load<T>(products + 2 * columns + c) + dots[2] * y2 + (dots[4] * f + dots[6] * y1));
        store<T>(df1 + c, load<T>(products + 3 * columns + c) + dots[3] * y2 + (dots[5] * f + dots[7] * y1));
    }
    for (int64_t c = 0; c < V; c += lanes) {
        store<T>(out.v + token * V + c, load<T>(dv1 + c), V - c);
        if (second) store<T>(out.v + (token + shape.H) * V + c, load<T>(dv2 + c), V - c);
    }
    T of[8];
    eight_products<T>({f1, v1, f1, v1, f1, v1, f2, v2}, {df2, df2, dy1, dy1, dy2, dy2, dy2, dy2}, columns, of);
    for (int64_t i = 0; i < rows; i += lanes) {
        const T* state = chunk.states + (pair * rows + i) * columns;
        T* d = grad + i * columns;
        const Vec<T> R2 = load<T>(r2 + i), fade = load<T>(both + i), A1 = load<T>(a1 + i);
        const Vec<T> A_back = load<T>(a_back + i), R_back = load<T>(r_back + i);
        Vec<T> s_y1 = {}, s_y2 = {}, s_f1 = {}, s_f2 = {}, s_n = {}, n_v1 = {}, n_f1 = {}, n_v2 = {}, n_f2 = {};
        for (int64_t c = 0; c < V; ++c) {
            const Vec<T> s = load<T>(state + c * lanes), n = load<T>(d + c * lanes) + R2 * dy2[c];
            s_n += s * n;
            s_y1 += s * dy1[c];
            s_y2 += s * dy2[c];
            s_f1 += s * df1[c];
            s_f2 += s * df2[c];
            n_v1 += n * v1[c];
            n_f1 += n * f1[c];
            n_v2 += n * v2[c];
            n_f2 += n * f2[c];
            store<T>(d + c * lanes, (n * fade + A_back * df2[c]) + (R_back * dy1[c] + A1 * df1[c]));
        }
        const Vec<T> R1 = load<T>(r1 + i), W1 = load<T>(w1 + i), K1 = load<T>(k1 + i), B1 = load<T>(b1 + i);
        const Vec<T> W2 = load<T>(w2 + i), K2 = load<T>(k2 + i), A2 = load<T>(a2 + i), B2 = load<T>(b2 + i);
        const int64_t at = token * K + i, left = K - i;
        store<T>(out.r + at, W1 * s_y1 + B1 * of[2] + K1 * of[3], left);
        store<T>(out.w + at, W1 * (W2 * s_n + A2 * s_f2 + R1 * s_y1), left);
        store<T>(out.k + at, W2 * n_v1 + A2 * of[1] + R1 * of[3], left);
        store<T>(out.a + at, s_f1, left);
        store<T>(out.b + at, W2 * n_f1 + A2 * of[0] + R1 * of[2], left);
        if (!second) continue;
        const int64_t next = at + shape.H * K;
        store<T>(out.r + next, W2 * (W1 * s_y2 + B1 * of[4] + K1 * of[5]) + B2 * of[6] + K2 * of[7], left);
        store<T>(out.w + next, W2 * (W1 * s_n + B1 * n_f1 + K1 * n_v1), left);
        store<T>(out.k + next, n_v2, left);
        store<T>(out.a + next, W1 * s_f2 + B1 * of[0] + K1 * of[1], left);
        store<T>(out.b + next, n_f2, left);
    }
}

// The factors of a chunk's pairs, and the states before all of them from that before the first.
template <class T>
void prepare_pairs(Chunk<T>& chunk, int64_t length, int64_t V) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t rows = chunk.rows, columns = chunk.columns;
    for (int64_t first = 0; first < length; first += 2) {
        const int64_t pair = first / 2;
        for (int64_t i = 0; i < rows; i += lanes) {
            const int64_t one = first * rows + i, two = one + rows, at = pair * rows + i;
            const Vec<T> W1 = load<T>(chunk.w + one), W2 = load<T>(chunk.w + two);
            store<T>(chunk.both + at, W2 * W1);
            store<T>(chunk.b_on + at, W2 * load<T>(chunk.b + one));
            store<T>(chunk.k_on + at, W2 * load<T>(chunk.k + one));
            store<T>(chunk.a_back + at, W1 * load<T>(chunk.a + two));
            store<T>(chunk.r_back + at, W1 * load<T>(chunk.r + one));
        }
        if (first + 2 >= length) break;
        const T *v1 = chunk.v + first * columns, *f1 = chunk.found + first * columns;
        const T *v2 = v1 + columns, *f2 = f1 + columns;
        for (int64_t i = 0; i < rows; i += lanes) {
            const T* before = chunk.states + (pair * rows + i) * columns;
            T* after = chunk.states + ((pair + 1) * rows + i) * columns;
            const Vec<T> fade = load<T>(chunk.both + pair * rows + i);
            const Vec<T> B1 = load<T>(chunk.b_on + pair * rows + i), K1 = load<T>(chunk.k_on + pair * rows + i);
            const Vec<T> B2 = load<T>(chunk.b + (first + 1) * rows + i);
            const Vec<T> K2 = load<T>(chunk.k + (first + 1) * rows + i);
            for (int64_t c = 0; c < V; ++c)
                store<T>(
                    after + c * lanes, load<T>(before + c * lanes) * fade +
                                           ((B1 * f1[c] + K1 * v1[c]) + (B2 * f2[c] + K2 * v2[c])));
        }
    }
}

template <class IO, class T>
void backward_head(
    const IO* r, const IO* log_w, const IO* k, const IO* v, const IO* a, const IO* b, const T* kept, const IO* grad_y,
    const T* grad_end, Gradients<IO> out, T* grad_begin, Span span, Shape shape, int64_t head, Chunk<T>& chunk) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t K = shape.K, V = shape.V, rows = chunk.rows, columns = chunk.columns;
    into_lanes<T>(grad_end, chunk.grad, K, V, columns * lanes, lanes);
    const int64_t chunks = (span.count + kEvery - 1) / kEvery;
    for (int64_t index = chunks - 1; index >= 0; --index) {
        const int64_t start = index * kEvery, length = std::min(kEvery, span.count - start);
        const T* slot = kept + index * shape.H * Kept<T>::size(shape);
        for (int64_t t = 0; t < length; ++t) {
            const int64_t token = (span.begin + start + t) * shape.H + head;
            widen<T>(r + token * K, chunk.r + t * rows, K);
            widen_exp<T>(log_w + token * K, chunk.w + t * rows, K);
            widen<T>(k + token * K, chunk.k + t * rows, K);
            widen<T>(a + token * K, chunk.a + t * rows, K);
            widen<T>(b + token * K, chunk.b + t * rows, K);
            widen<T>(v + token * V, chunk.v + t * columns, V);
            widen<T>(grad_y + token * V, chunk.grad_y + t * columns, V);
            widen<T>(slot + (K + t) * V, chunk.found + t * columns, V);
        }
        if (length % 2) {
            std::fill_n(chunk.w + length * rows, rows, T(1));
            for (T* x : {(T*)chunk.r, (T*)chunk.k, (T*)chunk.a, (T*)chunk.b}) std::fill_n(x + length * rows, rows, T(0));
            for (T* x : {(T*)chunk.v, (T*)chunk.found, (T*)chunk.grad_y})
                std::fill_n(x + length * columns, columns, T(0));
        }
        into_lanes<T>(slot, chunk.states, K, V, columns * lanes, lanes);
        prepare_pairs<T>(chunk, length, V);
        const int64_t share = Kept<T>::size(shape) / (kEvery / 2);
        for (int64_t first = (length - 1) / 2 * 2; first >= 0; first -= 2) {
            if (index) {  // the rows of the chunk before are on their way meanwhile
                for (int64_t t = first; t < first + 2; ++t) {
                    const int64_t token = (span.begin + start - kEvery + t) * shape.H + head;
                    for (const IO* x : {r, log_w, k, a, b}) ask_for(x + token * K, K);
                    for (const IO* x : {v, grad_y}) ask_for(x + token * V, V);
                }
                ask_for(slot - shape.H * Kept<T>::size(shape) + first / 2 * share, share);
            }
            backward_pair<IO, T>(
                chunk, first, first + 1 < length, (span.begin + start + first) * shape.H + head, shape, out);
        }
    }
    out_of_lanes<T>(chunk.grad, grad_begin, K, V, columns * lanes, lanes);
}

template <class IO, class T>
void backward(
    const IO* r, const IO* log_w, const IO* k, const IO* v, const IO* a, const IO* b, const Span* spans, int64_t n,
    Shape shape, const T* kept, const IO* grad_y, const T* grad_end, Gradients<IO> out, T* grad_begin,
    int64_t threads) {
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Chunk<T> chunk(round_up(shape.K, kLanes<T>), round_up(shape.V, kLanes<T>));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * shape.H; ++task) {
            const int64_t i = task / shape.H, head = task % shape.H, state = task * shape.K * shape.V;
            backward_head<IO, T>(
                r, log_w, k, v, a, b, kept + (first_slot(spans, i, kEvery) * shape.H + head) * Kept<T>::size(shape),
                grad_y, grad_end + state, out, grad_begin + state, spans[i], shape, head, chunk);
        }
    }
}

}  // namespace

// State (n, H, K, V). Kept states, or null: (tokens / 16 + n, H, K + 16, V).
STATEWISE_EXPORT int wkv7_forward(
    int64_t dtype, const void* r, const void* log_w, const void* k, const void* v, const void* a, const void* b,
    const void* spans, int64_t n, int64_t H, int64_t K, int64_t V, const void* begin, void* y, void* end, void* kept,
    int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        forward<IO, T>(
            (const IO*)r, (const IO*)log_w, (const IO*)k, (const IO*)v, (const IO*)a, (const IO*)b, (const Span*)spans,
            n, Shape{H, K, V}, (const T*)begin, (IO*)y, (T*)end, (T*)kept, threads);
        return true;
    });
}

STATEWISE_EXPORT int wkv7_backward(
    int64_t dtype, const void* r, const void* log_w, const void* k, const void* v, const void* a, const void* b,
    const void* spans, int64_t n, int64_t H, int64_t K, int64_t V, const void* /*begin*/, const void* /*end*/,
    const void* kept, const void* grad_y, const void* grad_end, void* grad_r, void* grad_w, void* grad_k, void* grad_v,
    void* grad_a, void* grad_b, void* grad_begin, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        backward<IO, T>(
            (const IO*)r, (const IO*)log_w, (const IO*)k, (const IO*)v, (const IO*)a, (const IO*)b, (const Span*)spans, n,
            Shape{H, K, V}, (const T*)kept, (const IO*)grad_y, (const T*)grad_end,
            {(IO*)grad_r, (IO*)grad_w, (IO*)grad_k, (IO*)grad_v, (IO*)grad_a, (IO*)grad_b}, (T*)grad_begin, threads);
        return true;
    });
}
