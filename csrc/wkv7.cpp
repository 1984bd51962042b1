// WKV-7 over sequences of rows (tokens, H, K or V).
//
//     S_t = (diag(exp log_w_t) + b_t a_t^T) S_{t-1} + k_t v_t^T        y_t = S_t^T r_t        S of K rows and V columns
//
// Token after token: a rank-two update of a matrix that stays in the first cache needs fewer operations than any
// chunked form. Forward keeps columns in lanes: sums over rows are then sums of vectors, what a_{t+1} finds is gathered
// while S_t passes by, and each element is loaded and stored once a token. Backward keeps rows in lanes (S transposed),
// since five of its seven sums run over columns. It recomputes the states of a chunk from the one kept at its start and
// what forward found there, and never divides by a decay.

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kEvery = 16;  // tokens between kept states

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

// What backward needs of a chunk: its inputs widened and padded, and the transposed state before each token.
template <class T>
struct Chunk {
    int64_t rows, columns;  // padded K and V
    Scratch<T> r, w, k, a, b, v, found, grad_y, states, grad;
    Chunk(int64_t rows, int64_t columns)
        : rows(rows), columns(columns), r(kEvery * rows), w(kEvery * rows), k(kEvery * rows), a(kEvery * rows),
          b(kEvery * rows), v(kEvery * columns), found(kEvery * columns), grad_y(kEvery * columns),
          states(kEvery * columns * rows), grad(columns * rows) {}
};

template <class T>
struct Gradients {
    T *r, *w, *k, *a, *b, *v;
};

// One token back: `grad` is the cotangent of the transposed state after the token on entry, before it on return.
template <int KV, class T>
void backward_token(
    const T* r, const T* w, const T* k, const T* a, const T* b, const T* v, const T* found, const T* grad_y,
    const T* before, T* grad, Gradients<T> out, int64_t V) {
    constexpr int64_t lanes = kLanes<T>, rows = KV * lanes;
    Vec<T> d_r[KV] = {}, d_w[KV] = {}, d_k[KV] = {}, d_a[KV] = {}, d_b[KV] = {};
    T found_y = 0, value_y = 0;
    for (int64_t c = 0; c < V; ++c) {
        const T dy = grad_y[c], value = v[c], seen = found[c];
        const T* s = before + c * rows;
        T* d = grad + c * rows;
        Vec<T> now[KV], to_value = {}, to_found = {};
        for (int j = 0; j < KV; ++j) {
            Vec<T> state = load<T>(s + j * lanes);
            now[j] = load<T>(d + j * lanes) + load<T>(r + j * lanes) * dy;
            d_r[j] += state * dy;
            d_w[j] += state * now[j];
            d_k[j] += now[j] * value;
            d_b[j] += now[j] * seen;
            to_value += now[j] * load<T>(k + j * lanes);
            to_found += now[j] * load<T>(b + j * lanes);
        }
        T d_found;
        sum2<T>(to_value, to_found, out.v[c], d_found);
        for (int j = 0; j < KV; ++j) {
            d_a[j] += load<T>(s + j * lanes) * d_found;
            store<T>(d + j * lanes, now[j] * load<T>(w + j * lanes) + load<T>(a + j * lanes) * d_found);
        }
        found_y += seen * dy;
        value_y += value * dy;
    }
    for (int j = 0; j < KV; ++j) {
        Vec<T> decay = load<T>(w + j * lanes);
        // S_t^T dy without S_t: its three terms one by one
        store<T>(out.r + j * lanes, decay * d_r[j] + load<T>(b + j * lanes) * found_y + load<T>(k + j * lanes) * value_y);
        store<T>(out.w + j * lanes, decay * d_w[j]);
        store<T>(out.k + j * lanes, d_k[j]);
        store<T>(out.a + j * lanes, d_a[j]);
        store<T>(out.b + j * lanes, d_b[j]);
    }
}

template <int KV, class IO, class T>
void backward_head(
    const IO* r, const IO* log_w, const IO* k, const IO* v, const IO* a, const IO* b, const T* kept, const IO* grad_y,
    const T* grad_end, IO* grad_r, IO* grad_w, IO* grad_k, IO* grad_v, IO* grad_a, IO* grad_b, T* grad_begin, Span span,
    Shape shape, int64_t head, Chunk<T>& chunk, T* scratch) {
    constexpr int64_t lanes = kLanes<T>, rows = KV * lanes;
    const int64_t K = shape.K, V = shape.V, columns = chunk.columns;
    if (K < rows) {  // lanes past K take part in sums over lanes
        std::fill((T*)chunk.grad, chunk.grad + V * rows, T(0));
        std::fill((T*)chunk.states, chunk.states + V * rows, T(0));
    }
    for (int64_t i = 0; i < K; ++i)
        for (int64_t c = 0; c < V; ++c) chunk.grad[c * rows + i] = grad_end[i * V + c];
    const Gradients<T> out{
        scratch, scratch + rows, scratch + 2 * rows, scratch + 3 * rows, scratch + 4 * rows, scratch + 5 * rows};
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
        for (int64_t i = 0; i < K; ++i)
            for (int64_t c = 0; c < V; ++c) chunk.states[c * rows + i] = slot[i * V + c];
        for (int64_t t = 0; t + 1 < length; ++t) {
            const T *w = chunk.w + t * rows, *key = chunk.k + t * rows, *write = chunk.b + t * rows;
            const T* before = chunk.states + t * columns * rows;
            T* after = chunk.states + (t + 1) * columns * rows;
            for (int64_t c = 0; c < V; ++c) {
                const T seen = chunk.found[t * columns + c], value = chunk.v[t * columns + c];
                for (int j = 0; j < KV; ++j)
                    store<T>(
                        after + c * rows + j * lanes,
                        load<T>(before + c * rows + j * lanes) * load<T>(w + j * lanes) +
                            (load<T>(write + j * lanes) * seen + load<T>(key + j * lanes) * value));
            }
        }
        for (int64_t t = length - 1; t >= 0; --t) {
            const int64_t token = (span.begin + start + t) * shape.H + head;
            backward_token<KV, T>(
                chunk.r + t * rows, chunk.w + t * rows, chunk.k + t * rows, chunk.a + t * rows, chunk.b + t * rows,
                chunk.v + t * columns, chunk.found + t * columns, chunk.grad_y + t * columns,
                chunk.states + t * columns * rows, chunk.grad, out, V);
            for (int64_t i = 0; i < K; i += lanes) {
                store<T>(grad_r + token * K + i, load<T>(out.r + i), K - i);
                store<T>(grad_w + token * K + i, load<T>(out.w + i), K - i);
                store<T>(grad_k + token * K + i, load<T>(out.k + i), K - i);
                store<T>(grad_a + token * K + i, load<T>(out.a + i), K - i);
                store<T>(grad_b + token * K + i, load<T>(out.b + i), K - i);
            }
            for (int64_t c = 0; c < V; c += lanes) store<T>(grad_v + token * V + c, load<T>(out.v + c), V - c);
        }
    }
    for (int64_t i = 0; i < K; ++i)
        for (int64_t c = 0; c < V; ++c) grad_begin[i * V + c] = chunk.grad[c * rows + i];
}

template <int KV, class IO, class T>
void backward(
    const IO* r, const IO* log_w, const IO* k, const IO* v, const IO* a, const IO* b, const Span* spans, int64_t n,
    Shape shape, const T* kept, const IO* grad_y, const T* grad_end, IO* grad_r, IO* grad_w, IO* grad_k, IO* grad_v,
    IO* grad_a, IO* grad_b, T* grad_begin, int64_t threads) {
    const int64_t rows = KV * kLanes<T>, columns = round_up(shape.V, kLanes<T>);
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Chunk<T> chunk(rows, columns);
        Scratch<T> scratch(5 * rows + columns);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * shape.H; ++task) {
            const int64_t i = task / shape.H, head = task % shape.H, state = task * shape.K * shape.V;
            backward_head<KV, IO, T>(
                r, log_w, k, v, a, b, kept + (first_slot(spans, i, kEvery) * shape.H + head) * Kept<T>::size(shape),
                grad_y, grad_end + state, grad_r, grad_w, grad_k, grad_v, grad_a, grad_b, grad_begin + state, spans[i],
                shape, head, chunk, scratch);
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
        return with_vectors((K + kLanes<T> - 1) / kLanes<T>, [&](auto count) {
            backward<decltype(count)::value, IO, T>(
                (const IO*)r, (const IO*)log_w, (const IO*)k, (const IO*)v, (const IO*)a, (const IO*)b,
                (const Span*)spans, n, Shape{H, K, V}, (const T*)kept, (const IO*)grad_y, (const T*)grad_end,
                (IO*)grad_r, (IO*)grad_w, (IO*)grad_k, (IO*)grad_v, (IO*)grad_a, (IO*)grad_b, (T*)grad_begin, threads);
        });
    });
}
