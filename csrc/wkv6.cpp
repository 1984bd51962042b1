// WKV-6 over sequences of rows (tokens, H, K or V); a decay constant in time makes it WKV-5.
//
//     y_t = S_{t-1}^T r_t + (r_t . (u k_t)) v_t        S_t = diag(exp log_w_t) S_{t-1} + k_t v_t^T
//
// As wkv7.cpp, without what a token finds: forward keeps columns in lanes, and an element of S is loaded and stored
// once a token; backward keeps rows in lanes (S transposed), where four of its five sums run over columns, and
// recomputes the states of a chunk from the one kept at its start. No division by a decay.

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kEvery = 16;  // tokens between kept states
constexpr int64_t kAhead = 4;   // tokens a forward pass asks for rows ahead of time

struct Shape {
    int64_t H, K, V;
};

// Of the two decays one is null: per token (tokens, H, K), or constant (H, K).
template <class IO, class T>
struct Inputs {
    const IO *r, *log_w, *k, *v;
    const T *constant, *u;
};

// r . (u k), all padded with zeros
template <class T>
STATEWISE_INLINE T bonus_of(const T* r, const T* u, const T* k, int64_t padded) {
    Vec<T> sum = {};
    for (int64_t i = 0; i < padded; i += kLanes<T>) sum += load<T>(r + i) * load<T>(u + i) * load<T>(k + i);
    T value, none;
    sum2<T>(sum, Vec<T>{}, value, none);
    return value;
}

// Columns column .. column + NV·lanes of one head of one sequence.
template <int NV, class IO, class T>
void forward_columns(
    const Inputs<IO, T>& in, const T* begin, IO* y, T* end, T* kept, Span span, Shape shape, int64_t head,
    int64_t column, T* S, T* rows) {
    constexpr int64_t lanes = kLanes<T>, width = NV * lanes;
    const int64_t K = shape.K, V = shape.V, columns = std::min(width, V - column), padded = round_up(K, lanes);
    T *R = rows, *W = rows + padded, *Ks = rows + 2 * padded, *U = rows + 3 * padded;

    for (int64_t i = 0; i < K; ++i)
        for (int64_t j = 0; j < width; j += lanes)
            store<T>(S + i * width + j, j < columns ? load<T>(begin + i * V + column + j, columns - j) : Vec<T>{});
    widen<T>(in.u + head * K, U, K);
    if (in.constant) widen_exp<T>(in.constant + head * K, W, K);
    for (int64_t t = 0; t < span.count; ++t) {
        const int64_t token = (span.begin + t) * shape.H + head;
        if (kept && t % kEvery == 0)
            for (int64_t i = 0; i < K; ++i)
                for (int64_t j = 0; j < columns; j += lanes)
                    store<T>(
                        kept + t / kEvery * shape.H * K * V + i * V + column + j, load<T>(S + i * width + j),
                        columns - j);
        widen<T>(in.r + token * K, R, K);
        widen<T>(in.k + token * K, Ks, K);
        if (in.log_w) widen_exp<T>(in.log_w + token * K, W, K);
        if (t + kAhead < span.count) {
            const int64_t later = token + kAhead * shape.H;
            ask_for(in.r + later * K, K);
            ask_for(in.k + later * K, K);
            if (in.log_w) ask_for(in.log_w + later * K, K);
            ask_for(in.v + later * V + column, columns);
        }
        const T bonus = bonus_of(R, U, Ks, padded);
        Vec<T> value[NV], out[NV];
        for (int j = 0; j < NV; ++j) {
            const int64_t left = columns - j * lanes;
            value[j] = left > 0 ? load<T>(in.v + token * V + column + j * lanes, left) : Vec<T>{};
            out[j] = value[j] * bonus;
        }
        for (int64_t i = 0; i < K; ++i) {
            T* row = S + i * width;
            for (int j = 0; j < NV; ++j) {
                Vec<T> s = load<T>(row + j * lanes);
                out[j] += s * R[i];
                store<T>(row + j * lanes, s * W[i] + value[j] * Ks[i]);
            }
        }
        for (int j = 0; j < NV && j * lanes < columns; ++j)
            store<T>(y + token * V + column + j * lanes, out[j], columns - j * lanes);
    }
    for (int64_t i = 0; i < K; ++i)
        for (int64_t j = 0; j < columns; j += lanes)
            store<T>(end + i * V + column + j, load<T>(S + i * width + j), columns - j);
}

template <class IO, class T>
void forward(
    Inputs<IO, T> in, const Span* spans, int64_t n, Shape shape, const T* begin, IO* y, T* end, T* kept,
    int64_t threads) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t vectors = column_vectors(shape.V, n * shape.H, threads, lanes);
    const int64_t width = vectors * lanes, blocks = (shape.V + width - 1) / width;
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Scratch<T> S(shape.K * width), rows(4 * round_up(shape.K, lanes));
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * shape.H * blocks; ++task) {
            const int64_t i = task / (shape.H * blocks), head = task / blocks % shape.H, column = task % blocks * width;
            const int64_t size = shape.K * shape.V, state = (i * shape.H + head) * size;
            T* keep = kept ? kept + (first_slot(spans, i, kEvery) * shape.H + head) * size : nullptr;
            auto run = [&](auto count) {
                forward_columns<decltype(count)::value, IO, T>(
                    in, begin + state, y, end + state, keep, spans[i], shape, head, column, S, rows);
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
    Scratch<T> r, w, k, v, grad_y, u, states, grad, sum_w, sum_u;
    Chunk(int64_t rows, int64_t columns)
        : rows(rows), columns(columns), r(kEvery * rows), w(kEvery * rows), k(kEvery * rows), v(kEvery * columns),
          grad_y(kEvery * columns), u(rows), states(kEvery * columns * rows), grad(columns * rows), sum_w(rows),
          sum_u(rows) {}
};

template <class T>
struct Gradients {
    T *r, *w, *k, *v;
};

// One token back: `grad` is the cotangent of the transposed state after the token on entry, before it on return.
template <int KV, class T>
void backward_token(
    const T* r, const T* w, const T* k, const T* u, const T* v, const T* grad_y, const T* before, T* grad, T* sum_u,
    Gradients<T> out, int64_t V) {
    constexpr int64_t lanes = kLanes<T>, rows = KV * lanes;
    Vec<T> d_r[KV] = {}, d_w[KV] = {}, d_k[KV] = {};
    const T bonus = bonus_of(r, u, k, rows);
    T value_y = 0;
    auto column = [&](int64_t c) {
        const T dy = grad_y[c], value = v[c];
        const T* s = before + c * rows;
        T* d = grad + c * rows;
        Vec<T> to_value = {};
        for (int j = 0; j < KV; ++j) {
            Vec<T> state = load<T>(s + j * lanes), after = load<T>(d + j * lanes);
            d_r[j] += state * dy;
            d_w[j] += state * after;
            d_k[j] += after * value;
            to_value += after * load<T>(k + j * lanes);
            store<T>(d + j * lanes, after * load<T>(w + j * lanes) + load<T>(r + j * lanes) * dy);
        }
        value_y += value * dy;
        return to_value;
    };
    int64_t c = 0;
    for (; c + 1 < V; c += 2) {
        Vec<T> first = column(c), second = column(c + 1);
        sum2<T>(first, second, out.v[c], out.v[c + 1]);
        out.v[c] += bonus * grad_y[c];
        out.v[c + 1] += bonus * grad_y[c + 1];
    }
    if (c < V) {
        T none;
        sum2<T>(column(c), Vec<T>{}, out.v[c], none);
        out.v[c] += bonus * grad_y[c];
    }
    for (int j = 0; j < KV; ++j) {
        Vec<T> read = load<T>(r + j * lanes), key = load<T>(k + j * lanes), share = load<T>(u + j * lanes) * value_y;
        store<T>(out.r + j * lanes, d_r[j] + share * key);
        store<T>(out.w + j * lanes, d_w[j] * load<T>(w + j * lanes));
        store<T>(out.k + j * lanes, d_k[j] + share * read);
        store<T>(sum_u + j * lanes, load<T>(sum_u + j * lanes) + read * key * value_y);
    }
}

template <class IO, class T>
struct Results {
    IO *r, *log_w, *k, *v;
    T *constant, *u, *begin;
};

template <int KV, class IO, class T>
void backward_head(
    const Inputs<IO, T>& in, const T* kept, const IO* grad_y, const T* grad_end, Results<IO, T> to, Span span,
    Shape shape, int64_t head, Chunk<T>& chunk, T* scratch) {
    constexpr int64_t lanes = kLanes<T>, rows = KV * lanes;
    const int64_t K = shape.K, V = shape.V, columns = chunk.columns;
    if (K < rows) {  // lanes past K take part in sums over lanes
        std::fill((T*)chunk.grad, chunk.grad + V * rows, T(0));
        std::fill((T*)chunk.states, chunk.states + V * rows, T(0));
    }
    into_lanes<T>(grad_end, chunk.grad, K, V, lanes, rows);
    widen<T>(in.u + head * K, chunk.u, K);
    if (in.constant)
        for (int64_t t = 0; t < kEvery; ++t) widen_exp<T>(in.constant + head * K, chunk.w + t * rows, K);
    std::fill((T*)chunk.sum_w, chunk.sum_w + rows, T(0));
    std::fill((T*)chunk.sum_u, chunk.sum_u + rows, T(0));
    const Gradients<T> out{scratch, scratch + rows, scratch + 2 * rows, scratch + 3 * rows};
    const int64_t chunks = (span.count + kEvery - 1) / kEvery;
    for (int64_t index = chunks - 1; index >= 0; --index) {
        const int64_t start = index * kEvery, length = std::min(kEvery, span.count - start);
        const T* slot = kept + index * shape.H * K * V;
        for (int64_t t = 0; t < length; ++t) {
            const int64_t token = (span.begin + start + t) * shape.H + head;
            widen<T>(in.r + token * K, chunk.r + t * rows, K);
            widen<T>(in.k + token * K, chunk.k + t * rows, K);
            if (in.log_w) widen_exp<T>(in.log_w + token * K, chunk.w + t * rows, K);
            widen<T>(in.v + token * V, chunk.v + t * columns, V);
            widen<T>(grad_y + token * V, chunk.grad_y + t * columns, V);
        }
        into_lanes<T>(slot, chunk.states, K, V, lanes, rows);
        for (int64_t t = 0; t + 1 < length; ++t) {
            const T *w = chunk.w + t * rows, *key = chunk.k + t * rows, *before = chunk.states + t * columns * rows;
            T* after = chunk.states + (t + 1) * columns * rows;
            for (int64_t c = 0; c < V; ++c) {
                const T value = chunk.v[t * columns + c];
                for (int j = 0; j < KV; ++j)
                    store<T>(
                        after + c * rows + j * lanes, load<T>(before + c * rows + j * lanes) * load<T>(w + j * lanes) +
                                                          load<T>(key + j * lanes) * value);
            }
        }
        for (int64_t t = length - 1; t >= 0; --t) {
            const int64_t token = (span.begin + start + t) * shape.H + head;
            if (index) {  // the chunk before is on its way meanwhile
                const int64_t earlier = token - kEvery * shape.H, share = K * V / kEvery;
                ask_for(in.r + earlier * K, K);
                ask_for(in.k + earlier * K, K);
                if (in.log_w) ask_for(in.log_w + earlier * K, K);
                ask_for(in.v + earlier * V, V);
                ask_for(grad_y + earlier * V, V);
                ask_for(slot - shape.H * K * V + t * share, share);
            }
            backward_token<KV, T>(
                chunk.r + t * rows, chunk.w + t * rows, chunk.k + t * rows, chunk.u, chunk.v + t * columns,
                chunk.grad_y + t * columns, chunk.states + t * columns * rows, chunk.grad, chunk.sum_u, out, V);
            for (int64_t i = 0; i < K; i += lanes) {
                store<T>(to.r + token * K + i, load<T>(out.r + i), K - i);
                store<T>(to.k + token * K + i, load<T>(out.k + i), K - i);
                if (to.log_w) store<T>(to.log_w + token * K + i, load<T>(out.w + i), K - i);
                else store<T>(chunk.sum_w + i, load<T>(chunk.sum_w + i) + load<T>(out.w + i));
            }
            for (int64_t c = 0; c < V; c += lanes) store<T>(to.v + token * V + c, load<T>(out.v + c), V - c);
        }
    }
    out_of_lanes<T>(chunk.grad, to.begin, K, V, lanes, rows);
    std::copy_n((T*)chunk.sum_u, K, to.u + head * K);
    if (to.constant) std::copy_n((T*)chunk.sum_w, K, to.constant + head * K);
}

template <int KV, class IO, class T>
void backward(
    Inputs<IO, T> in, const Span* spans, int64_t n, Shape shape, const T* kept, const IO* grad_y, const T* grad_end,
    Results<IO, T> to, int64_t threads) {
    const int64_t rows = KV * kLanes<T>, columns = round_up(shape.V, kLanes<T>), size = shape.K * shape.V;
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Chunk<T> chunk(rows, columns);
        Scratch<T> scratch(3 * rows + columns);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * shape.H; ++task) {
            const int64_t i = task / shape.H, head = task % shape.H;
            Results<IO, T> mine = to;
            mine.u += i * shape.H * shape.K;
            if (mine.constant) mine.constant += i * shape.H * shape.K;
            mine.begin += task * size;
            backward_head<KV, IO, T>(
                in, kept + (first_slot(spans, i, kEvery) * shape.H + head) * size, grad_y, grad_end + task * size, mine,
                spans[i], shape, head, chunk, scratch);
        }
    }
}

}  // namespace

// One of log_w (tokens, H, K) and constant (H, K) is null. u (H, K). State (n, H, K, V). Kept states, or null:
// (tokens / 16 + n, H, K, V).
STATEWISE_EXPORT int wkv6_forward(
    int64_t dtype, const void* r, const void* log_w, const void* k, const void* v, const void* constant, const void* u,
    const void* spans, int64_t n, int64_t H, int64_t K, int64_t V, const void* begin, void* y, void* end, void* kept,
    int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        forward<IO, T>(
            Inputs<IO, T>{(const IO*)r, (const IO*)log_w, (const IO*)k, (const IO*)v, (const T*)constant, (const T*)u},
            (const Span*)spans, n, Shape{H, K, V}, (const T*)begin, (IO*)y, (T*)end, (T*)kept, threads);
        return true;
    });
}

STATEWISE_EXPORT int wkv6_backward(
    int64_t dtype, const void* r, const void* log_w, const void* k, const void* v, const void* constant, const void* u,
    const void* spans, int64_t n, int64_t H, int64_t K, int64_t V, const void* /*begin*/, const void* /*end*/,
    const void* kept, const void* grad_y, const void* grad_end, void* grad_r, void* grad_log_w, void* grad_k,
    void* grad_v, void* grad_constant, void* grad_u, void* grad_begin, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        return with_vectors((K + kLanes<T> - 1) / kLanes<T>, [&](auto count) {
            backward<decltype(count)::value, IO, T>(
                Inputs<IO, T>{(const IO*)r, (const IO*)log_w, (const IO*)k, (const IO*)v, (const T*)constant,
                              (const T*)u},
                (const Span*)spans, n, Shape{H, K, V}, (const T*)kept, (const IO*)grad_y, (const T*)grad_end,
                Results<IO, T>{(IO*)grad_r, (IO*)grad_log_w, (IO*)grad_k, (IO*)grad_v, (T*)grad_constant, (T*)grad_u,
                               (T*)grad_begin},
                threads);
        });
    });
}
