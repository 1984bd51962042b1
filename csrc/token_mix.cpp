// Mixtures of every token with the one before it, over sequences of rows (tokens, C), channels in lanes.
//
//     y_m,t = x_t + (x_{t-1} - x_t) mix_m        for m < M, each an array of its own
//
// A row is read once for all mixtures; many and large ones are written past the caches. Backward walks from the end, so
// that what a token owes its successor is at hand.

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kWidth = 1024;      // channels of a task
constexpr int64_t kAhead = 8;         // tokens that backward asks for ahead: no processor's prefetcher follows it back
constexpr int64_t kLarge = 32 << 20;  // bytes of mixtures from which no cache holds them: they are written past it

template <class IO, class T>
STATEWISE_INLINE Vec<T> before(const IO* x, const T* begin, int64_t row, bool first, int64_t C, int64_t c, int64_t left) {
    return first ? load<T>(begin + c, left) : load<T>(x + (row - 1) * C + c, left);
}

template <class IO, class T>
void forward(
    const IO* x, const T* mix, const Span* spans, int64_t n, int64_t C, int64_t M, const T* begin, IO* const* y, T* end,
    int64_t threads) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t step = block_width(C, n, threads, lanes, kWidth), blocks = (C + step - 1) / step;
    int64_t tokens = 0;
    for (int64_t i = 0; i < n; ++i) tokens += spans[i].count;
    bool large = tokens * C * M * int64_t(sizeof(IO)) >= kLarge && C * sizeof(IO) % 64 == 0;
    for (int64_t m = 0; m < M; ++m) large &= (uintptr_t)y[m] % 64 == 0;
#pragma omp parallel for num_threads(int(threads)) if (threads > 1) schedule(static)
    for (int64_t task = 0; task < n * blocks; ++task) {
        const int64_t i = task / blocks, from = task % blocks * step, to = std::min(from + step, C);
        const Span span = spans[i];
        auto walk = [&](auto large) {
            for (int64_t row = span.begin; row < span.begin + span.count; ++row)
                for (int64_t c = from; c < to; c += lanes) {
                    const int64_t left = to - c;
                    Vec<T> now = load<T>(x + row * C + c, left);
                    Vec<T> change = before(x, begin + i * C, row, row == span.begin, C, c, left) - now;
                    for (int64_t m = 0; m < M; ++m) {
                        const Vec<T> mixed = now + change * load<T>(mix + m * C + c, left);
                        if (large) stream<T>(y[m] + row * C + c, mixed);
                        else store<T>(y[m] + row * C + c, mixed, left);
                    }
                }
        };
        large ? walk(std::true_type{}) : walk(std::false_type{});
        if (large) streamed();
        for (int64_t c = from; c < to; c += lanes)
            store<T>(
                end + i * C + c,
                before(x, begin + i * C, span.begin + span.count, span.count == 0, C, c, to - c), to - c);
    }
}

template <class IO, class T>
void backward(
    const IO* x, const T* mix, const Span* spans, int64_t n, int64_t C, int64_t M, const T* begin,
    const IO* const* grad_y, const T* grad_end, IO* grad_x, T* grad_mix, T* grad_begin, int64_t threads) {
    constexpr int64_t lanes = kLanes<T>;
    const int64_t step = block_width(C, n, threads, lanes, kWidth), blocks = (C + step - 1) / step;
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Scratch<T> owed(step), sums(M * step);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * blocks; ++task) {
            const int64_t i = task / blocks, from = task % blocks * step, to = std::min(from + step, C);
            const Span span = spans[i];
            for (int64_t c = from; c < to; c += lanes)
                store<T>(owed + (c - from), load<T>(grad_end + i * C + c, to - c));
            std::fill((T*)sums, sums + M * step, T(0));
            for (int64_t row = span.begin + span.count - 1; row >= span.begin; --row) {
                const int64_t earlier = std::max(row - kAhead, span.begin) * C;
                for (int64_t c = from; c < to; c += lanes) {
                    const int64_t left = to - c;
                    __builtin_prefetch(x + earlier + c, 0, 2);
                    __builtin_prefetch(grad_x + earlier + c, 1, 2);
                    Vec<T> now = load<T>(x + row * C + c, left);
                    Vec<T> change = before(x, begin + i * C, row, row == span.begin, C, c, left) - now;
                    Vec<T> kept = load<T>(owed + (c - from)), back = {};
                    for (int64_t m = 0; m < M; ++m) {
                        __builtin_prefetch(grad_y[m] + earlier + c, 0, 2);
                        T* sum = sums + m * step + (c - from);
                        Vec<T> g = load<T>(grad_y[m] + row * C + c, left), part = g * load<T>(mix + m * C + c, left);
                        kept += g - part;
                        back += part;
                        store<T>(sum, load<T>(sum) + g * change);
                    }
                    store<T>(grad_x + row * C + c, kept, left);
                    store<T>(owed + (c - from), back);
                }
            }
            for (int64_t c = from; c < to; c += lanes) {
                store<T>(grad_begin + i * C + c, load<T>(owed + (c - from)), to - c);
                for (int64_t m = 0; m < M; ++m)
                    store<T>(grad_mix + (i * M + m) * C + c, load<T>(sums + m * step + (c - from)), to - c);
            }
        }
    }
}

}  // namespace

// mix (M, C), state (n, C); y and its cotangents are M addresses.
STATEWISE_EXPORT int token_mix_forward(
    int64_t dtype, const void* x, const void* mix, const void* spans, int64_t n, int64_t C, int64_t M, const void* begin,
    void* y, void* end, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        forward<IO, T>(
            (const IO*)x, (const T*)mix, (const Span*)spans, n, C, M, (const T*)begin, (IO* const*)y, (T*)end, threads);
        return true;
    });
}

// grad_mix has a row a sequence, (n, M, C).
STATEWISE_EXPORT int token_mix_backward(
    int64_t dtype, const void* x, const void* mix, const void* spans, int64_t n, int64_t C, int64_t M, const void* begin,
    const void* grad_y, const void* grad_end, void* grad_x, void* grad_mix, void* grad_begin, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        backward<IO, T>(
            (const IO*)x, (const T*)mix, (const Span*)spans, n, C, M, (const T*)begin, (const IO* const*)grad_y,
            (const T*)grad_end, (IO*)grad_x, (T*)grad_mix, (T*)grad_begin, threads);
        return true;
    });
}
