// The selective scan over sequences of rows (tokens, D), channels in lanes, a state of N numbers a channel.
//
//     dt_t = softplus(dt_raw_t + dt_bias)      h_t = exp(dt_t A) h_{t-1} + dt_t x_t B_t      y_t = (h_t C_t + D x_t) silu(z_t)
//
// N exponentials a token and channel are most of the work, so rows are read once, a chunk of tokens at a time, and the
// numbers of one vector of channels stay in registers for that chunk. Backward recomputes a chunk's states from the one
// kept at its start. The gradients of B and C are sums over channels: lanes are added up once a chunk, and blocks of
// channels, whose width does not depend on threads, are added in order.

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kEvery = 16;          // tokens of a chunk, and between kept states
constexpr int64_t kBlock = 256;         // channels of a task
// Numbers of a state that fit in registers together, forward, and backward, where each needs three.
constexpr int kPiece = STATEWISE_VECTOR_BYTES / 8, kBackPiece = kPiece / 2;

struct Shape {
    int64_t D, N, G, softplus, wide;  // wide: dt is of the dtype of sums, whatever the other activations are
};

template <class IO, class T>
struct Inputs {
    const IO* x;
    const void* dt;
    const IO *B, *C, *z;
    const T *A, *skip, *bias;
};

// What a task holds of one chunk and one vector of channels, (kEvery, lanes) each, and of B and C, (kEvery, N).
template <class T>
struct Work {
    Scratch<T> dt, gain, y, B, C, A2;
    explicit Work(int64_t N)
        : dt(kEvery * kLanes<T>), gain(kEvery * kLanes<T>), y(kEvery * kLanes<T>), B(kEvery * N), C(kEvery * N),
          A2(kBlock * N) {}
};

template <class IO, class T>
STATEWISE_INLINE Vec<T> raw_step(const Inputs<IO, T>& in, int64_t at, int64_t c, int64_t left, const Shape& shape) {
    Vec<T> dt = shape.wide ? load<T>((const T*)in.dt + at, left) : load<T>((const IO*)in.dt + at, left);
    return in.bias ? dt + load<T>(in.bias + c, left) : dt;
}

template <class IO, class T>
STATEWISE_INLINE Vec<T> step_size(const Inputs<IO, T>& in, int64_t at, int64_t c, int64_t left, const Shape& shape) {
    Vec<T> dt = raw_step(in, at, c, left, shape);
    return shape.softplus ? softplus<T>(dt) : dt;
}

template <class IO, class T>
void widen_rows(const IO* from, T* to, Span span, int64_t start, int64_t length, Shape shape, int64_t group) {
    for (int64_t t = 0; t < length; ++t) {
        const IO* row = from + ((span.begin + start + t) * shape.G + group) * shape.N;
        for (int64_t n = 0; n < shape.N; n += kLanes<T>)
            store<T>(to + t * shape.N + n, load<T>(row + n, shape.N - n), shape.N - n);
    }
}

// Numbers n .. n + P of the states of one vector of channels, over a chunk: h stays in registers.
template <int P, class T>
STATEWISE_INLINE void forward_piece(Work<T>& work, const T* A2, T* state, int64_t length, int64_t N, int64_t n) {
    constexpr int64_t lanes = kLanes<T>;
    Vec<T> h[P];
    for (int p = 0; p < P; ++p) h[p] = load<T>(state + (n + p) * lanes);
    for (int64_t t = 0; t < length; ++t) {
        Vec<T> dt = load<T>(work.dt + t * lanes), gain = load<T>(work.gain + t * lanes), y = load<T>(work.y + t * lanes);
        const T *B = work.B + t * N + n, *C = work.C + t * N + n;
        for (int p = 0; p < P; ++p) {
            h[p] = exp2<T>(dt * load<T>(A2 + (n + p) * lanes)) * h[p] + gain * B[p];
            y += h[p] * C[p];
        }
        store<T>(work.y + t * lanes, y);
    }
    for (int p = 0; p < P; ++p) store<T>(state + (n + p) * lanes, h[p]);
}

// Calls piece(constant P, n) for pieces of at most so many numbers that add up to N.
template <int kMost, class Piece>
STATEWISE_INLINE void in_pieces(int64_t N, Piece piece) {
    int64_t n = 0;
    for (; n + kMost <= N; n += kMost) piece(std::integral_constant<int, kMost>{}, n);
    if constexpr (kMost > 4)
        if (n + 4 <= N) piece(std::integral_constant<int, 4>{}, n), n += 4;
    for (; n < N; ++n) piece(std::integral_constant<int, 1>{}, n);
}

// Where the state of a vector of channels is kept for backward, N rows of as many lanes as it has.
template <class T, class P>
struct KeptState {
    P* at;  // T or const T
    int64_t lanes;
    KeptState(P* kept, int64_t slot, int64_t c, int64_t left, Shape shape)
        : at(kept + (slot * shape.D + c) * shape.N), lanes(std::min<int64_t>(left, kLanes<T>)) {}
};

template <class IO, class T>
void forward_block(
    const Inputs<IO, T>& in, const T* begin, IO* y, T* end, T* kept, Span span, Shape shape, int64_t c, int64_t width,
    Work<T>& work, T* states) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t D = shape.D, N = shape.N, group = c / (D / shape.G);
    const int64_t dt_bytes = shape.wide ? sizeof(T) : sizeof(IO);
    into_lanes<T>(in.A + c * N, work.A2, width, N, N * lanes, lanes, kLog2E<T>);
    into_lanes<T>(begin + c * N, states, width, N, N * lanes, lanes);
    for (int64_t start = 0; start < span.count; start += kEvery) {
        const int64_t length = std::min(kEvery, span.count - start), ahead = prefetch_step(start, span.count, kEvery, D);
        widen_rows<IO, T>(in.B, work.B, span, start, length, shape, group);
        widen_rows<IO, T>(in.C, work.C, span, start, length, shape, group);
        for (int64_t i = 0; i < width; i += lanes) {
            const int64_t left = width - i;
            T* state = states + i * N;
            if (kept) {
                const KeptState<T, T> slot(kept, start / kEvery, c + i, left, shape);
                for (int64_t n = 0; n < N; ++n) store<T>(slot.at + n * slot.lanes, load<T>(state + n * lanes), left);
            }
            for (int64_t t = 0; t < length; ++t) {
                const int64_t at = (span.begin + start + t) * D + c + i;
                __builtin_prefetch(in.x + at + ahead, 0, 2);
                __builtin_prefetch((const char*)in.dt + (at + ahead) * dt_bytes, 0, 2);
                __builtin_prefetch(y + at + ahead, 1, 2);
                if (in.z) __builtin_prefetch(in.z + at + ahead, 0, 2);
                Vec<T> x = load<T>(in.x + at, left), dt = step_size(in, at, c + i, left, shape);
                store<T>(work.dt + t * lanes, dt);
                store<T>(work.gain + t * lanes, dt * x);
                store<T>(work.y + t * lanes, in.skip ? load<T>(in.skip + c + i, left) * x : Vec<T>{});
            }
            in_pieces<kPiece>(N, [&](auto size, int64_t n) {
                forward_piece<decltype(size)::value, T>(work, work.A2 + i * N, state, length, N, n);
            });
            for (int64_t t = 0; t < length; ++t) {
                const int64_t at = (span.begin + start + t) * D + c + i;
                Vec<T> out = load<T>(work.y + t * lanes);
                if (in.z) {
                    Vec<T> z = load<T>(in.z + at, left);
                    out *= z * sigmoid<T>(z);
                }
                store<T>(y + at, out, left);
            }
        }
    }
    out_of_lanes<T>(states, end + c * N, width, N, N * lanes, lanes);
}

// Blocks of channels, none of which lies in two groups.
struct Blocks {
    int64_t per_group, blocks, channels;
    explicit Blocks(Shape shape)
        : per_group(((shape.D / shape.G) + kBlock - 1) / kBlock), blocks(per_group * shape.G),
          channels(shape.D / shape.G) {}
    int64_t first(int64_t block) const { return block / per_group * channels + block % per_group * kBlock; }
    int64_t width(int64_t block) const { return std::min(kBlock, channels - block % per_group * kBlock); }
};

template <class IO, class T>
void forward(
    Inputs<IO, T> in, const Span* spans, int64_t n, Shape shape, const T* begin, IO* y, T* end, T* kept,
    int64_t threads) {
    const Blocks blocks(shape);
    const int64_t size = shape.D * shape.N;
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Work<T> work(shape.N);
        Scratch<T> states(kBlock * shape.N);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * blocks.blocks; ++task) {
            const int64_t i = task / blocks.blocks, block = task % blocks.blocks;
            forward_block<IO, T>(
                in, begin + i * size, y, end + i * size, kept ? kept + first_slot(spans, i, kEvery) * size : nullptr,
                spans[i], shape, blocks.first(block), blocks.width(block), work, states);
        }
    }
}

template <class IO, class T>
struct Gradients {
    IO* x;
    void* dt;
    IO* z;
    T *A, *skip, *bias, *begin;
    T *B, *C;  // of one block of channels, (tokens, N)
};

template <class T>
struct BackWork {
    // (kEvery, lanes); then states before and after each token and decays, (kEvery (+ 1), P, lanes); then what is summed
    // over channels, (kEvery, N, lanes), and over tokens, (vectors, N, lanes).
    Scratch<T> grad_y, grad_dt, grad_gain, history, decay, B, C, A, state, skip, bias;
    explicit BackWork(int64_t N)
        : grad_y(kEvery * kLanes<T>), grad_dt(kEvery * kLanes<T>), grad_gain(kEvery * kLanes<T>),
          history((kEvery + 1) * kBackPiece * kLanes<T>), decay(kEvery * kBackPiece * kLanes<T>), B(kEvery * N * kLanes<T>),
          C(kEvery * N * kLanes<T>), A(kBlock * N), state(kBlock * N), skip(kBlock), bias(kBlock) {}
};

template <int P, class T>
STATEWISE_INLINE void backward_piece(
    Work<T>& work, BackWork<T>& back, const KeptState<T, const T>& kept, const T* A2, T* grad_A, T* grad_state,
    int64_t length, int64_t N, int64_t n, bool gated) {
    constexpr int64_t lanes = kLanes<T>;
    Vec<T> h[P], A[P], sum_A[P] = {};
    for (int p = 0; p < P; ++p) {
        A[p] = load<T>(A2 + (n + p) * lanes);
        h[p] = load<T>(kept.at + (n + p) * kept.lanes, kept.lanes);
        store<T>(back.history + p * lanes, h[p]);
    }
    for (int64_t t = 0; t < length; ++t) {
        Vec<T> dt = load<T>(work.dt + t * lanes), gain = load<T>(work.gain + t * lanes);
        const T* B = work.B + t * N + n;
        T *decay = back.decay + t * P * lanes, *after = back.history + (t + 1) * P * lanes;
        for (int p = 0; p < P; ++p) {
            Vec<T> e = exp2<T>(dt * A[p]);
            h[p] = e * h[p] + gain * B[p];
            store<T>(decay + p * lanes, e);
            store<T>(after + p * lanes, h[p]);
        }
        if (gated) {
            const T* C = work.C + t * N + n;
            Vec<T> y = load<T>(work.y + t * lanes);
            for (int p = 0; p < P; ++p) y += h[p] * C[p];
            store<T>(work.y + t * lanes, y);
        }
    }
    for (int p = 0; p < P; ++p) h[p] = load<T>(grad_state + (n + p) * lanes);  // from here on a cotangent
    for (int64_t t = length - 1; t >= 0; --t) {
        Vec<T> g = load<T>(back.grad_y + t * lanes), dt = load<T>(work.dt + t * lanes);
        Vec<T> gain = load<T>(work.gain + t * lanes);
        Vec<T> d_gain = load<T>(back.grad_gain + t * lanes), d_dt = load<T>(back.grad_dt + t * lanes);
        const T *B = work.B + t * N + n, *C = work.C + t * N + n;
        const T *before = back.history + t * P * lanes, *after = before + P * lanes, *decay = back.decay + t * P * lanes;
        T *sum_B = back.B + (t * N + n) * lanes, *sum_C = back.C + (t * N + n) * lanes;
        for (int p = 0; p < P; ++p) {
            h[p] += g * C[p];
            store<T>(sum_C + p * lanes, load<T>(sum_C + p * lanes) + g * load<T>(after + p * lanes));
            store<T>(sum_B + p * lanes, load<T>(sum_B + p * lanes) + gain * h[p]);
            d_gain += h[p] * B[p];
            h[p] *= load<T>(decay + p * lanes);
            Vec<T> rate = h[p] * load<T>(before + p * lanes);  // to dt·A
            d_dt += rate * A[p];                               // times ln 2 later
            sum_A[p] += rate * dt;
        }
        store<T>(back.grad_gain + t * lanes, d_gain);
        store<T>(back.grad_dt + t * lanes, d_dt);
    }
    for (int p = 0; p < P; ++p) {
        store<T>(grad_state + (n + p) * lanes, h[p]);
        store<T>(grad_A + (n + p) * lanes, load<T>(grad_A + (n + p) * lanes) + sum_A[p]);
    }
}

template <class IO, class T>
void backward_block(
    const Inputs<IO, T>& in, const T* kept, const IO* grad_y, const T* grad_end, Gradients<IO, T> out, Span span,
    Shape shape, int64_t c, int64_t width, Work<T>& work, BackWork<T>& back) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t D = shape.D, N = shape.N, group = c / (D / shape.G);
    const int64_t dt_bytes = shape.wide ? sizeof(T) : sizeof(IO);
    const Vec<T> zero = {};
    into_lanes<T>(in.A + c * N, work.A2, width, N, N * lanes, lanes, kLog2E<T>);
    into_lanes<T>(grad_end + c * N, back.state, width, N, N * lanes, lanes);
    std::fill((T*)back.A, back.A + round_up(width, lanes) * N, T(0));
    std::fill((T*)back.skip, back.skip + round_up(width, lanes), T(0));
    std::fill((T*)back.bias, back.bias + round_up(width, lanes), T(0));
    const int64_t chunks = (span.count + kEvery - 1) / kEvery;
    for (int64_t index = chunks - 1; index >= 0; --index) {
        const int64_t start = index * kEvery, length = std::min(kEvery, span.count - start);
        const int64_t ahead = index ? -kEvery * D : 0;
        widen_rows<IO, T>(in.B, work.B, span, start, length, shape, group);
        widen_rows<IO, T>(in.C, work.C, span, start, length, shape, group);
        for (int64_t i = 0; i < length * N * lanes; i += lanes) {
            store<T>(back.B + i, zero);
            store<T>(back.C + i, zero);
        }
        for (int64_t i = 0; i < width; i += lanes) {
            const int64_t left = width - i;
            const KeptState<T, const T> slot(kept, index, c + i, left, shape);
            if (index)
                for (int64_t n = 0; n < N; ++n) __builtin_prefetch(slot.at - N * D + n * slot.lanes, 0, 2);
            for (int64_t t = 0; t < length; ++t) {
                const int64_t at = (span.begin + start + t) * D + c + i;
                __builtin_prefetch(in.x + at + ahead, 0, 2);
                __builtin_prefetch((const char*)in.dt + (at + ahead) * dt_bytes, 0, 2);
                __builtin_prefetch(grad_y + at + ahead, 0, 2);
                __builtin_prefetch(out.x + at + ahead, 1, 2);
                __builtin_prefetch((const char*)out.dt + (at + ahead) * dt_bytes, 1, 2);
                Vec<T> x = load<T>(in.x + at, left), dt = step_size(in, at, c + i, left, shape);
                Vec<T> g = load<T>(grad_y + at, left);
                store<T>(work.dt + t * lanes, dt);
                store<T>(work.gain + t * lanes, dt * x);
                if (in.z) {
                    __builtin_prefetch(in.z + at + ahead, 0, 2);
                    __builtin_prefetch(out.z + at + ahead, 1, 2);
                    Vec<T> z = load<T>(in.z + at, left);
                    store<T>(work.y + t * lanes, in.skip ? load<T>(in.skip + c + i, left) * x : zero);
                    g *= z * sigmoid<T>(z);
                }
                store<T>(back.grad_y + t * lanes, g);
                store<T>(back.grad_dt + t * lanes, zero);
                store<T>(back.grad_gain + t * lanes, zero);
            }
            in_pieces<kBackPiece>(N, [&](auto size, int64_t n) {
                backward_piece<decltype(size)::value, T>(
                    work, back, slot, work.A2 + i * N, back.A + i * N, back.state + i * N, length, N, n,
                    in.z != nullptr);
            });
            for (int64_t t = 0; t < length; ++t) {
                const int64_t at = (span.begin + start + t) * D + c + i;
                Vec<T> x = load<T>(in.x + at, left), dt = load<T>(work.dt + t * lanes);
                Vec<T> g = load<T>(back.grad_y + t * lanes), d_gain = load<T>(back.grad_gain + t * lanes);
                Vec<T> d_x = d_gain * dt, d_dt = d_gain * x + load<T>(back.grad_dt + t * lanes) * kLn2<T>;
                if (in.skip) {
                    d_x += load<T>(in.skip + c + i, left) * g;
                    store<T>(back.skip + i, load<T>(back.skip + i) + g * x);
                }
                if (shape.softplus) {
                    Vec<T> raw = raw_step(in, at, c + i, left, shape);
                    d_dt = raw > T(20) ? d_dt : d_dt * sigmoid<T>(raw);
                }
                if (in.bias) store<T>(back.bias + i, load<T>(back.bias + i) + d_dt);
                if (in.z) {
                    Vec<T> z = load<T>(in.z + at, left), gate = sigmoid<T>(z);
                    Vec<T> slope = gate * (T(1) + z * (T(1) - gate));
                    store<T>(out.z + at, load<T>(grad_y + at, left) * load<T>(work.y + t * lanes) * slope, left);
                }
                store<T>(out.x + at, d_x, left);
                if (shape.wide) store<T>((T*)out.dt + at, d_dt, left);
                else store<T>((IO*)out.dt + at, d_dt, left);
            }
        }
        for (int64_t t = 0; t < length; ++t)
            for (int64_t n = 0; n < N; ++n) {
                const int64_t at = (span.begin + start + t) * N + n;
                sum2<T>(load<T>(back.B + (t * N + n) * lanes), load<T>(back.C + (t * N + n) * lanes), out.B[at], out.C[at]);
            }
    }
    out_of_lanes<T>(back.state, out.begin + c * N, width, N, N * lanes, lanes);
    out_of_lanes<T>(back.A, out.A + c * N, width, N, N * lanes, lanes);
    for (int64_t i = 0; i < width; ++i) {
        if (in.skip) out.skip[c + i] = back.skip[i];
        if (in.bias) out.bias[c + i] = back.bias[i];
    }
}

template <class IO, class T>
void backward(
    Inputs<IO, T> in, const Span* spans, int64_t n, Shape shape, const T* kept, const IO* grad_y, const T* grad_end,
    Gradients<IO, T> out, IO* grad_B, IO* grad_C, int64_t threads) {
    const Blocks blocks(shape);
    const int64_t size = shape.D * shape.N;
    int64_t tokens = 0;
    for (int64_t i = 0; i < n; ++i) tokens = std::max(tokens, spans[i].begin + spans[i].count);
    Scratch<T> part_B(blocks.blocks * tokens * shape.N), part_C(blocks.blocks * tokens * shape.N);
    T *parts_B = part_B, *parts_C = part_C;
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Work<T> work(shape.N);
        BackWork<T> back(shape.N);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * blocks.blocks; ++task) {
            const int64_t i = task / blocks.blocks, block = task % blocks.blocks;
            Gradients<IO, T> mine = out;
            mine.A += i * size;
            mine.begin += i * size;
            if (mine.skip) mine.skip += i * shape.D;
            if (mine.bias) mine.bias += i * shape.D;
            mine.B = parts_B + block * tokens * shape.N;
            mine.C = parts_C + block * tokens * shape.N;
            backward_block<IO, T>(
                in, kept + first_slot(spans, i, kEvery) * size, grad_y, grad_end + i * size, mine, spans[i], shape,
                blocks.first(block), blocks.width(block), work, back);
        }
#pragma omp for schedule(static)
        for (int64_t i = 0; i < n; ++i)
            for (int64_t t = spans[i].begin; t < spans[i].begin + spans[i].count; ++t)
                for (int64_t group = 0; group < shape.G; ++group)
                    for (int64_t at = 0; at < shape.N; at += kLanes<T>) {
                        const int64_t left = shape.N - at;
                        Vec<T> d_B = {}, d_C = {};
                        for (int64_t block = 0; block < blocks.per_group; ++block) {
                            const int64_t from = ((group * blocks.per_group + block) * tokens + t) * shape.N + at;
                            d_B += load<T>(parts_B + from, left);
                            d_C += load<T>(parts_C + from, left);
                        }
                        store<T>(grad_B + (t * shape.G + group) * shape.N + at, d_B, left);
                        store<T>(grad_C + (t * shape.G + group) * shape.N + at, d_C, left);
                    }
    }
}

}  // namespace

// z, D and dt_bias may be null. State (n, D, N). Kept states, or null: (tokens / 16 + n, D, N), a vector of
// channels as N rows of its lanes.
STATEWISE_EXPORT int selective_scan_forward(
    int64_t dtype, const void* x, const void* dt, const void* B, const void* C, const void* z, const void* A,
    const void* D, const void* dt_bias, const void* spans, int64_t n, int64_t channels, int64_t N, int64_t G,
    int64_t softplus, int64_t wide, const void* begin, void* y, void* end, void* kept, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        forward<IO, T>(
            Inputs<IO, T>{(const IO*)x, dt, (const IO*)B, (const IO*)C, (const IO*)z, (const T*)A,
                          (const T*)D, (const T*)dt_bias},
            (const Span*)spans, n, Shape{channels, N, G, softplus, wide}, (const T*)begin, (IO*)y, (T*)end, (T*)kept, threads);
        return true;
    });
}

STATEWISE_EXPORT int selective_scan_backward(
    int64_t dtype, const void* x, const void* dt, const void* B, const void* C, const void* z, const void* A,
    const void* D, const void* dt_bias, const void* spans, int64_t n, int64_t channels, int64_t N, int64_t G,
    int64_t softplus, int64_t wide, const void* /*begin*/, const void* /*end*/, const void* kept, const void* grad_y,
    const void* grad_end, void* grad_x, void* grad_dt, void* grad_B, void* grad_C, void* grad_z, void* grad_A,
    void* grad_D, void* grad_dt_bias, void* grad_begin, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        backward<IO, T>(
            Inputs<IO, T>{(const IO*)x, dt, (const IO*)B, (const IO*)C, (const IO*)z, (const T*)A,
                          (const T*)D, (const T*)dt_bias},
            (const Span*)spans, n, Shape{channels, N, G, softplus, wide}, (const T*)kept, (const IO*)grad_y,
            (const T*)grad_end,
            Gradients<IO, T>{(IO*)grad_x, grad_dt, (IO*)grad_z, (T*)grad_A, (T*)grad_D, (T*)grad_dt_bias,
                             (T*)grad_begin, nullptr, nullptr},
            (IO*)grad_B, (IO*)grad_C, threads);
        return true;
    });
}
