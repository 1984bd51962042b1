// Causal depthwise convolution over sequences of rows (tokens, C), channels in lanes, with its activation.
//
//     pre_t = bias + sum_j weight[W-1-j] x_{t-j}        y_t = pre_t, or silu(pre_t)
//
// Tiles of a few tokens are walked a vector of channels at a time, weights, samples and cotangents in registers; the rows
// of the next tile are asked for meanwhile. Backward computes pre anew and walks tiles from the end, carrying the W-1
// cotangents that reach back across the edge.

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kTile = 32;
constexpr int64_t kWidth = 512;   // channels of a task
constexpr int64_t kMostTaps = 8;  // W is known when this is compiled

// Weights of one vector of channels.
template <class T, int W>
struct Taps {
    Vec<T> at[W];
};

template <class IO, class T, int W>
struct Convolution {
    const IO* x;
    const T *weight, *bias, *begin;  // (C, W), (C) or null, (W - 1, C)
    Span span;
    int64_t C, silu;

    // What lies before the first sample is the window given.
    STATEWISE_INLINE Vec<T> sample(int64_t t, int64_t c, int64_t left) const {
        return t < 0 ? load<T>(begin + (t + W - 1) * C + c, left) : load<T>(x + (span.begin + t) * C + c, left);
    }

    // Those of a task's channels, a vector of channels after another.
    STATEWISE_INLINE void weights(int64_t first, int64_t width, Taps<T, W>* to) const {
        for (int64_t at = 0; at < width; at += kLanes<T>)
            for (int j = 0; j < W; ++j) {
                T lanes[kLanes<T>] = {};
                for (int64_t i = 0; i < std::min<int64_t>(width - at, kLanes<T>); ++i)
                    lanes[i] = weight[(first + at + i) * W + j];
                to[at / kLanes<T>].at[j] = load<T>(lanes);
            }
    }

    STATEWISE_INLINE Vec<T> shift(int64_t c, int64_t left) const { return bias ? load<T>(bias + c, left) : Vec<T>{}; }
};

// In two sums: what one waits for, the other need not.
template <int W, class V>
STATEWISE_INLINE V weighted(const V* weights, const V* samples, V sum) {
    V other{};
    for (int j = 0; j < W; ++j) (j < W / 2 ? sum : other) += weights[j] * samples[j];
    return sum + other;
}

// Calls walk for every vector of a block's channels, with what is there and whether there is an activation as constants.
template <class T, class Walk>
STATEWISE_INLINE void for_vectors(int64_t first, int64_t width, bool silu, Walk walk) {
    auto all = [&](auto silu) {
        int64_t c = first;
        for (; c + kLanes<T> <= first + width; c += kLanes<T>) walk(c, kLanes<T>, silu);
        if (c < first + width) walk(c, first + width - c, silu);
    };
    silu ? all(std::true_type{}) : all(std::false_type{});
}

template <class IO, class T, int W>
void forward_block(const Convolution<IO, T, W>& in, IO* y, T* end, int64_t first, int64_t width) {
    const int64_t count = in.span.count, C = in.C;
    Taps<T, W> taps[kWidth / kLanes<T>];
    in.weights(first, width, taps);
    for (int64_t start = 0; start < count; start += kTile) {
        const int64_t stop = std::min(start + kTile, count), ahead = prefetch_step(start, count, kTile, C);
        auto walk = [&](int64_t c, int64_t left, auto silu) {
            const Taps<T, W> weights = taps[(c - first) / kLanes<T>];
            Vec<T> samples[W], shift = in.shift(c, left);
            for (int j = 1; j < W; ++j) samples[j] = in.sample(start - W + j, c, left);
            const IO* from = in.x + (in.span.begin + start) * C + c;
            IO* to = y + (in.span.begin + start) * C + c;
            for (int64_t t = start; t < stop; ++t, from += C, to += C) {
                __builtin_prefetch(from + ahead, 0, 2);
                __builtin_prefetch(to + ahead, 1, 2);
                for (int j = 1; j < W; ++j) samples[j - 1] = samples[j];
                samples[W - 1] = load<T>(from, left);
                Vec<T> pre = weighted<W>(weights.at, samples, shift);
                store<T>(to, silu ? pre * sigmoid<T>(pre) : pre, left);
            }
        };
        for_vectors<T>(first, width, in.silu, walk);
    }
    for (int64_t m = 0; m < W - 1; ++m)
        for (int64_t c = first; c < first + width; c += kLanes<T>)
            store<T>(end + m * C + c, in.sample(count - W + 1 + m, c, first + width - c), first + width - c);
}

template <class T, int W>
struct Gradients {
    Vec<T> pulls[W];  // cotangents of the outputs at t, t + 1, ..., t + W - 1
    Vec<T> weights[W], bias;
};

template <class IO, class T, int W>
void backward_block(
    const Convolution<IO, T, W>& in, const IO* grad_y, const T* grad_end, IO* grad_x, T* grad_weight, T* grad_bias,
    T* grad_begin, int64_t first, int64_t width) {
    const int64_t count = in.span.count, C = in.C, before = W - 1;
    Gradients<T, W> gathered[kWidth / kLanes<T>] = {};
    Taps<T, W> taps[kWidth / kLanes<T>];
    in.weights(first, width, taps);
    // What a sample's place in the last window adds to its gradient.
    auto from_end = [&](int64_t t, int64_t c, int64_t left) {
        const int64_t m = t - (count - before);
        return m >= 0 ? load<T>(grad_end + m * C + c, left) : Vec<T>{};
    };
    for (int64_t start = (count - 1) / kTile * kTile; start >= 0 && count; start -= kTile) {
        const int64_t last = std::min(start + kTile, count) - 1, ahead = start ? -kTile * C : 0;
        // Inside, no sample lies before the first one and none in the last window.
        auto tile = [&](auto inside) {
            for_vectors<T>(first, width, in.silu, [&](int64_t c, int64_t left, auto silu) {
                Gradients<T, W> grad = gathered[(c - first) / kLanes<T>];
                const Taps<T, W> weights = taps[(c - first) / kLanes<T>];
                Vec<T> samples[W], shift = in.shift(c, left);
                for (int j = 0; j < W - 1; ++j) samples[j] = in.sample(last - W + 2 + j, c, left);
                const int64_t at = (in.span.begin + last) * C + c;
                const IO *x = in.x + at, *from = grad_y + at;
                IO* to = grad_x + at;
                for (int64_t t = last; t >= start; --t, x -= C, from -= C, to -= C) {
                    __builtin_prefetch(x + ahead, 0, 2);
                    __builtin_prefetch(from + ahead, 0, 2);
                    __builtin_prefetch(to + ahead, 1, 2);
                    for (int j = W - 1; j > 0; --j) samples[j] = samples[j - 1], grad.pulls[j] = grad.pulls[j - 1];
                    samples[0] = inside ? load<T>(x - before * C, left) : in.sample(t - before, c, left);
                    Vec<T> g = load<T>(from, left);
                    if (silu) {
                        Vec<T> pre = weighted<W>(weights.at, samples, shift), gate = sigmoid<T>(pre);
                        g = (g * gate) * (T(1) + pre * (T(1) - gate));
                    }
                    grad.pulls[0] = g;
                    grad.bias += g;
                    Vec<T> d = inside ? Vec<T>{} : from_end(t, c, left);
                    for (int j = W - 1; j >= 0; --j) {
                        d += weights.at[W - 1 - j] * grad.pulls[j];
                        grad.weights[j] += g * samples[j];
                    }
                    store<T>(to, d, left);
                }
                gathered[(c - first) / kLanes<T>] = grad;
            });
        };
        start >= before && last < count - before ? tile(std::true_type{}) : tile(std::false_type{});
    }
    for (int64_t c = first; c < first + width; c += kLanes<T>) {
        const int64_t left = first + width - c;
        const Gradients<T, W>& grad = gathered[(c - first) / kLanes<T>];
        const Taps<T, W>& weights = taps[(c - first) / kLanes<T>];
        for (int64_t m = 0; m < before; ++m) {  // the sample at time m - before, seen by outputs 0 .. m
            Vec<T> d = from_end(m - before, c, left);
            for (int64_t j = 0; j <= m; ++j) d += weights.at[m - j] * grad.pulls[j];
            store<T>(grad_begin + m * C + c, d, left);
        }
        for (int64_t i = 0; i < std::min<int64_t>(left, kLanes<T>); ++i)
            for (int j = 0; j < W; ++j) grad_weight[(c + i) * W + j] = grad.weights[j][i];
        if (grad_bias) store<T>(grad_bias + c, grad.bias, left);
    }
}

// Calls block(sequence, first channel, channels) for all of them.
template <class T, class Block>
void for_blocks(int64_t n, int64_t C, int64_t threads, Block block) {
    const int64_t step = block_width(C, n, threads, kLanes<T>, kWidth), blocks = (C + step - 1) / step;
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
    for (int64_t task = 0; task < n * blocks; ++task) {
        const int64_t c = task % blocks * step;
        block(task / blocks, c, std::min(step, C - c));
    }
}

// Calls kernel with W as a constant; false where there are too many taps.
template <int W = 1, class Kernel>
bool with_taps(int64_t taps, Kernel kernel) {
    if (taps == W) return kernel(std::integral_constant<int, W>{}), true;
    if constexpr (W < kMostTaps) return with_taps<W + 1>(taps, kernel);
    return false;
}

}  // namespace

// bias may be null. Window (n, W - 1, C), oldest first. Nothing is kept.
STATEWISE_EXPORT int causal_conv1d_forward(
    int64_t dtype, const void* x, const void* weight, const void* bias, const void* spans, int64_t n, int64_t C,
    int64_t W, int64_t silu, const void* begin, void* y, void* end, void* /*kept*/, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        return with_taps(W, [&](auto taps) {
            const int64_t window = (W - 1) * C;
            for_blocks<T>(n, C, threads, [&](int64_t i, int64_t c, int64_t width) {
                const Convolution<IO, T, decltype(taps)::value> in{
                    (const IO*)x, (const T*)weight, (const T*)bias, (const T*)begin + i * window,
                    ((const Span*)spans)[i], C, silu};
                forward_block(in, (IO*)y, (T*)end + i * window, c, width);
            });
        });
    });
}

// Gradients of weight and bias come a row a sequence.
STATEWISE_EXPORT int causal_conv1d_backward(
    int64_t dtype, const void* x, const void* weight, const void* bias, const void* spans, int64_t n, int64_t C,
    int64_t W, int64_t silu, const void* begin, const void* /*end*/, const void* /*kept*/, const void* grad_y,
    const void* grad_end, void* grad_x, void* grad_weight, void* grad_bias, void* grad_begin, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        return with_taps(W, [&](auto taps) {
            const int64_t window = (W - 1) * C;
            for_blocks<T>(n, C, threads, [&](int64_t i, int64_t c, int64_t width) {
                const Convolution<IO, T, decltype(taps)::value> in{
                    (const IO*)x, (const T*)weight, (const T*)bias, (const T*)begin + i * window,
                    ((const Span*)spans)[i], C, silu};
                backward_block(
                    in, (const IO*)grad_y, (const T*)grad_end + i * window, (IO*)grad_x, (T*)grad_weight + i * C * W,
                    grad_bias ? (T*)grad_bias + i * C : nullptr, (T*)grad_begin + i * window, c, width);
            });
        });
    });
}
