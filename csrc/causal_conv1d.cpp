// Causal depthwise convolution over sequences of rows (tokens, C), channels in lanes, with its activation.
//
//     pre_t = bias + sum_j weight[W-1-j] x_{t-j}        y_t = pre_t, or silu(pre_t)
//
// Every row is read once, a chunk of tokens at a time, with the window before it beside it. Backward computes pre anew
// and walks chunks from the end, carrying the W-1 cotangents that reach back across the edge.

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kChunk = 16;
constexpr int64_t kWidth = 256;  // channels of a task

struct Shape {
    int64_t C, W, silu;
};

template <class T>
struct Work {
    // (W - 1 + kChunk, lanes): samples with the window before them, cotangents with those after them
    Scratch<T> samples, pulls;
    Scratch<T> weight, bias;   // (W, width), (width)
    Scratch<T> carried;        // (W - 1, width): cotangents of the chunk after
    Scratch<T> grad_weight, grad_bias;
    explicit Work(int64_t W)
        : samples((W - 1 + kChunk) * kLanes<T>), pulls((W - 1 + kChunk) * kLanes<T>), weight(W * kWidth), bias(kWidth),
          carried(W * kWidth), grad_weight(W * kWidth), grad_bias(kWidth) {}

    void fill(const T* weight_in, const T* bias_in, int64_t width, int64_t W) {
        std::fill((T*)weight, weight + W * kWidth, T(0));
        std::fill((T*)bias, bias + kWidth, T(0));
        for (int64_t c = 0; c < width; ++c) {
            for (int64_t j = 0; j < W; ++j) weight[j * kWidth + c] = weight_in[c * W + j];
            if (bias_in) bias[c] = bias_in[c];
        }
    }
};

// Sample at time t of the sequence, counted from its start; before it, the window given.
template <class IO, class T>
STATEWISE_INLINE Vec<T> sample(const IO* x, const T* begin, Span span, Shape shape, int64_t t, int64_t c, int64_t left) {
    return t < 0 ? load<T>(begin + (t + shape.W - 1) * shape.C + c, left)
                 : load<T>(x + (span.begin + t) * shape.C + c, left);
}

template <class T>
STATEWISE_INLINE Vec<T> before_activation(const Work<T>& work, int64_t t, int64_t i, int64_t W) {
    Vec<T> pre = load<T>(work.bias + i);
    for (int64_t j = 0; j < W; ++j)
        pre += load<T>(work.weight + j * kWidth + i) * load<T>(work.samples + (t + j) * kLanes<T>);
    return pre;
}

template <class IO, class T>
void forward_block(
    const IO* x, const T* begin, IO* y, T* end, Span span, Shape shape, int64_t c, int64_t width, Work<T>& work) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t before = shape.W - 1;
    for (int64_t start = 0; start < span.count; start += kChunk) {
        const int64_t length = std::min(kChunk, span.count - start);
        for (int64_t i = 0; i < width; i += lanes) {
            const int64_t left = width - i;
            for (int64_t t = -before; t < length; ++t)
                store<T>(work.samples + (t + before) * lanes, sample(x, begin, span, shape, start + t, c + i, left));
            for (int64_t t = 0; t < length; ++t) {
                Vec<T> pre = before_activation(work, t, i, shape.W);
                store<T>(y + (span.begin + start + t) * shape.C + c + i, shape.silu ? pre * sigmoid<T>(pre) : pre, left);
            }
        }
    }
    for (int64_t m = 0; m < before; ++m)
        for (int64_t i = 0; i < width; i += lanes)
            store<T>(end + m * shape.C + c + i, sample(x, begin, span, shape, span.count - before + m, c + i, width - i), width - i);
}

template <class IO, class T>
void backward_block(
    const IO* x, const T* begin, const IO* grad_y, const T* grad_end, IO* grad_x, T* grad_weight, T* grad_bias,
    T* grad_begin, Span span, Shape shape, int64_t c, int64_t width, Work<T>& work) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t W = shape.W, before = W - 1, C = shape.C;
    std::fill((T*)work.carried, work.carried + W * kWidth, T(0));
    std::fill((T*)work.grad_weight, work.grad_weight + W * kWidth, T(0));
    std::fill((T*)work.grad_bias, work.grad_bias + kWidth, T(0));
    // What a sample's place in the last window adds to its gradient.
    auto from_end = [&](int64_t t, int64_t i) {
        const int64_t m = t - (span.count - before);
        return m >= 0 ? load<T>(grad_end + m * C + c + i, width - i) : Vec<T>{};
    };
    const int64_t chunks = (span.count + kChunk - 1) / kChunk;
    for (int64_t index = chunks - 1; index >= 0; --index) {
        const int64_t start = index * kChunk, length = std::min(kChunk, span.count - start);
        for (int64_t i = 0; i < width; i += lanes) {
            const int64_t left = width - i;
            for (int64_t t = -before; t < length; ++t)
                store<T>(work.samples + (t + before) * lanes, sample(x, begin, span, shape, start + t, c + i, left));
            Vec<T> total = load<T>(work.grad_bias + i);
            for (int64_t t = 0; t < length; ++t) {
                Vec<T> g = load<T>(grad_y + (span.begin + start + t) * C + c + i, left);
                if (shape.silu) {
                    Vec<T> pre = before_activation(work, t, i, W), gate = sigmoid<T>(pre);
                    g *= gate * (T(1) + pre * (T(1) - gate));
                }
                store<T>(work.pulls + t * lanes, g);
                total += g;
            }
            store<T>(work.grad_bias + i, total);
            for (int64_t m = 0; m < before; ++m)
                store<T>(work.pulls + (length + m) * lanes, load<T>(work.carried + m * kWidth + i));
            for (int64_t t = 0; t < length; ++t) {
                Vec<T> d = from_end(start + t, i);
                for (int64_t j = 0; j < W; ++j)
                    d += load<T>(work.weight + (before - j) * kWidth + i) * load<T>(work.pulls + (t + j) * lanes);
                store<T>(grad_x + (span.begin + start + t) * C + c + i, d, left);
            }
            for (int64_t j = 0; j < W; ++j) {
                Vec<T> d = load<T>(work.grad_weight + j * kWidth + i);
                for (int64_t t = 0; t < length; ++t)
                    d += load<T>(work.pulls + t * lanes) * load<T>(work.samples + (t + j) * lanes);
                store<T>(work.grad_weight + j * kWidth + i, d);
            }
            for (int64_t m = 0; m < before; ++m)
                store<T>(work.carried + m * kWidth + i, load<T>(work.pulls + m * lanes));
        }
    }
    for (int64_t m = 0; m < before; ++m)  // the sample at time m - before
        for (int64_t i = 0; i < width; i += lanes) {
            Vec<T> d = from_end(m - before, i);
            for (int64_t j = before - m; j < W; ++j)
                d += load<T>(work.weight + (before - j) * kWidth + i) *
                     load<T>(work.carried + (m - before + j) * kWidth + i);
            store<T>(grad_begin + m * C + c + i, d, width - i);
        }
    for (int64_t i = 0; i < width; ++i) {
        for (int64_t j = 0; j < W; ++j) grad_weight[(c + i) * W + j] = work.grad_weight[j * kWidth + i];
        if (grad_bias) grad_bias[c + i] = work.grad_bias[i];
    }
}

// Calls block(work, sequence, first channel, channels) for all of them.
template <class T, class Block>
void for_blocks(const T* weight, const T* bias, int64_t n, Shape shape, int64_t threads, Block block) {
    const int64_t step = std::min(block_width(shape.C, n, threads, kLanes<T>, kWidth), kWidth);
    const int64_t blocks = (shape.C + step - 1) / step;
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Work<T> work(shape.W);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * blocks; ++task) {
            const int64_t c = task % blocks * step, width = std::min(step, shape.C - c);
            work.fill(weight + c * shape.W, bias ? bias + c : nullptr, width, shape.W);
            block(work, task / blocks, c, width);
        }
    }
}

}  // namespace

// bias may be null. Window (n, W - 1, C), oldest first. Nothing is kept.
STATEWISE_EXPORT int causal_conv1d_forward(
    int64_t dtype, const void* x, const void* weight, const void* bias, const void* spans, int64_t n, int64_t C,
    int64_t W, int64_t silu, const void* begin, void* y, void* end, void* /*kept*/, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        const Shape shape{C, W, silu};
        const Span* span = (const Span*)spans;
        const int64_t window = (W - 1) * C;
        for_blocks<T>((const T*)weight, (const T*)bias, n, shape, threads, [&](Work<T>& work, int64_t i, int64_t c, int64_t width) {
            forward_block<IO, T>(
                (const IO*)x, (const T*)begin + i * window, (IO*)y, (T*)end + i * window, span[i], shape, c, width, work);
        });
        return true;
    });
}

STATEWISE_EXPORT int causal_conv1d_backward(
    int64_t dtype, const void* x, const void* weight, const void* bias, const void* spans, int64_t n, int64_t C,
    int64_t W, int64_t silu, const void* begin, const void* /*end*/, const void* /*kept*/, const void* grad_y,
    const void* grad_end, void* grad_x, void* grad_weight, void* grad_bias, void* grad_begin, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        const Shape shape{C, W, silu};
        const Span* span = (const Span*)spans;
        const int64_t window = (W - 1) * C;
        for_blocks<T>((const T*)weight, (const T*)bias, n, shape, threads, [&](Work<T>& work, int64_t i, int64_t c, int64_t width) {
            backward_block<IO, T>(
                (const IO*)x, (const T*)begin + i * window, (const IO*)grad_y, (const T*)grad_end + i * window,
                (IO*)grad_x, (T*)grad_weight + i * C * W, grad_bias ? (T*)grad_bias + i * C : nullptr,
                (T*)grad_begin + i * window, span[i], shape, c, width, work);
        });
        return true;
    });
}
