// WKV-4 over sequences of rows (tokens, C), channels in lanes.
//
//     y_t = (num_t + e^{u + k_t - m_t} v_t) / (den_t + e^{u + k_t - m_t})        sums before token t, times e^{m_t}
//     sum_{t+1} = e^{log_w} sum_t + e^{k_t} v_t                                  times e^{m_{t+1}}
//
// with m the running maximum max(m + log_w, k), so that of two weights one is always 1 and the other e^{-|difference|}.
// What a token weighs in its own y, relative to the sums, is what it weighs in the next sums times e^{u + log_w}, a
// constant: one exponential serves both, unless u or log_w of a channel are so large that the constant or what it is
// multiplied with could leave the range of numbers.
//
// Tiles of a few tokens are walked a vector of channels at a time, so sums stay in registers; the rows of the next tile
// are asked for meanwhile, since no processor's prefetcher follows a column. Backward recomputes a tile from the sums
// kept at its start and walks back with the same weights: no further exponential, no division by a decay.

#include <limits>

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kEvery = 32;    // tokens in a tile, and between kept states
constexpr int64_t kWidth = 512;   // channels a task takes at most: a tile and the next should stay in the second cache

template <class T>
struct Sums {
    Vec<T> num, den, top;
};

template <class T>
struct StatePointers {
    T *num, *den, *top;
};

template <class T, class P>
STATEWISE_INLINE Sums<T> load_sums(StatePointers<P> from, int64_t c, int64_t count) {
    return {load<T>(from.num + c, count), load<T>(from.den + c, count), load<T>(from.top + c, count)};
}

template <class T>
STATEWISE_INLINE void store_sums(StatePointers<T> to, int64_t c, const Sums<T>& sums, int64_t count) {
    store<T>(to.num + c, sums.num, count);
    store<T>(to.den + c, sums.den, count);
    store<T>(to.top + c, sums.top, count);
}

// Where states are kept: (slots, 3, C).
template <class T>
STATEWISE_INLINE StatePointers<T> slot_of(T* kept, int64_t index, int64_t C) {
    T* slot = kept + index * 3 * C;
    return {slot, slot + C, slot + 2 * C};
}

// One vector of channels.
template <class T>
struct Parameters {
    Vec<T> log_w, u, own;  // own = e^{u + log_w}

    STATEWISE_INLINE Parameters(const T* log_w_at, const T* u_at, int64_t count)
        : log_w(load<T>(log_w_at, count)), u(load<T>(u_at, count)), own(exp<T>(u + log_w)) {}

    // Whether `own` serves: far from the ends of numbers, so that no weight vanishes where it is not negligible.
    STATEWISE_INLINE bool plain() const {
        const Vec<T> limit = splat<T>(T(16));
        return holds<T>((log_w >= -limit) & (log_w <= limit) & (u >= -limit) & (u <= limit));
    }
};

// One token of one vector of channels.
template <class T>
struct Token {
    Vec<T> y, from_state, from_key, inverse;  // y = (num·from_state + v·from_key)·inverse, inverse = 1 / likewise of den
    Vec<T> fade, gain;                        // sum = sum·fade + v·gain
    Vec<T> lead;                              // how far the key is above what the maximum fell to
};

template <bool kPlain, class T>
STATEWISE_INLINE Token<T> advance(Vec<T> k, Vec<T> v, const Parameters<T>& of, Sums<T>& sums) {
    Token<T> token;
    Vec<T> faded = sums.top + of.log_w;
    token.lead = k - faded;
    const Weights<T> weights(token.lead);
    token.fade = weights.a;
    token.gain = weights.b;
    if constexpr (kPlain) {
        token.from_state = token.fade;
        token.from_key = token.gain * of.own;
    } else {
        const Weights<T> now(of.u + k - sums.top);
        token.from_state = now.a;
        token.from_key = now.b;
    }
    const Vec<T> total = sums.den * token.from_state + token.from_key;
    const Vec<T> weighed = sums.num * token.from_state + token.from_key * v;
    if constexpr (kPlain) {
        token.inverse = reciprocal<T>(total);
        token.y = quotient<T>(weighed, total, estimate<T>(total));
    } else {
        token.inverse = T(1) / total;
        token.y = weighed / total;
    }
    sums.num = sums.num * token.fade + token.gain * v;
    sums.den = sums.den * token.fade + token.gain;
    sums.top = at_least<T>(k, faded);
    return token;
}

template <class IO, class T>
void forward_block(
    const IO* k, const IO* v, IO* y, Span span, int64_t C, int64_t width, const T* log_w, const T* u,
    StatePointers<const T> begin, StatePointers<T> end, T* kept) {
    bool plain[kWidth / kLanes<T>];
    for (int64_t c = 0; c < width; c += kLanes<T>) {
        plain[c / kLanes<T>] = Parameters<T>(log_w + c, u + c, width - c).plain();
        store_sums<T>(end, c, load_sums<T>(begin, c, width - c), width - c);
    }
    for (int64_t start = 0; start < span.count; start += kEvery) {
        const int64_t length = std::min(kEvery, span.count - start), ahead = prefetch_step(start, span.count, kEvery, C);
        for (int64_t c = 0; c < width; c += kLanes<T>) {
            Sums<T> sums = load_sums<T>(end, c, width - c);
            if (kept) store_sums<T>(slot_of(kept, start / kEvery, C), c, sums, width - c);
            const Parameters<T> of(log_w + c, u + c, width - c);
            auto walk = [&](auto plain) {
                for (int64_t t = 0; t < length; ++t) {
                    const int64_t at = (span.begin + start + t) * C + c;
                    __builtin_prefetch(k + at + ahead, 0, 2);
                    __builtin_prefetch(v + at + ahead, 0, 2);
                    __builtin_prefetch(y + at + ahead, 1, 2);
                    Vec<T> key = load<T>(k + at, width - c), value = load<T>(v + at, width - c);
                    store<T>(y + at, advance<plain, T>(key, value, of, sums).y, width - c);
                }
            };
            plain[c / kLanes<T>] ? walk(std::true_type{}) : walk(std::false_type{});
            store_sums<T>(end, c, sums, width - c);
        }
    }
}

template <class IO, class T>
void forward(
    const IO* k, const IO* v, const T* log_w, const T* u, const Span* spans, int64_t n, int64_t C,
    const T* num, const T* den, const T* top, IO* y, T* num_end, T* den_end, T* top_end, T* kept, int64_t threads) {
    const int64_t step = block_width(C, n, threads, kLanes<T>, kWidth), blocks = (C + step - 1) / step;
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
    for (int64_t task = 0; task < n * blocks; ++task) {
        const int64_t i = task / blocks, c = task % blocks * step, width = std::min(step, C - c), at = i * C + c;
        forward_block<IO, T>(
            k + c, v + c, y + c, spans[i], C, width, log_w + c, u + c, {num + at, den + at, top + at},
            {num_end + at, den_end + at, top_end + at},
            kept ? kept + first_slot(spans, i, kEvery) * 3 * C + c : nullptr);
    }
}

// What backward gathers while it walks back, and where a block's is between tiles.
template <class T>
struct Gathered {
    // Cotangents of the sums and of the maximum.
    Vec<T> num, den, top;
    // The first maximum weighs the first average against all tokens. Where either side outweighs the other, that
    // gradient is what is left of terms that cancel, so it is gathered from differences to the first average.
    Vec<T> first;
    Vec<T> log_w, u;
};

// A tile's tokens of one vector of channels, as forward computed them.
template <class T>
struct Recomputed {
    Vec<T> y, fade, gain, num, den;
    Vec<T> pull;                 // grad_y / total
    Vec<T> from_state, from_key; // if they are not made of fade and gain
    Vec<T> lead;                 // if states have gradients
};

template <class IO, class T>
void backward_block(
    const IO* k, const IO* v, const IO* grad_y, IO* grad_k, IO* grad_v, const T* log_w, const T* u, T* grad_log_w,
    T* grad_u, Span span, int64_t C, int64_t width, Gathered<T>* gathered, Vec<T>* averages, const T* kept,
    StatePointers<const T> begin, StatePointers<const T> end, StatePointers<const T> grad_end,
    StatePointers<T> grad_begin) {
    const Vec<T> zero = {}, half = splat<T>(T(0.5)), one = splat<T>(T(1));
    // Nothing came in and nothing is asked of what goes out: the maximum has no gradient then.
    bool stateless[kWidth / kLanes<T>], plain[kWidth / kLanes<T>];
    for (int64_t c = 0; c < width; c += kLanes<T>) {
        Gathered<T> grad = {};
        grad.num = load<T>(grad_end.num + c, width - c);
        grad.den = load<T>(grad_end.den + c, width - c);
        grad.top = load<T>(grad_end.top + c, width - c);
        if (span.count)  // the maximum is what the sums are told relative to
            grad.top -= grad.num * load<T>(end.num + c, width - c) + grad.den * load<T>(end.den + c, width - c);
        Vec<T> den = load<T>(begin.den + c, width - c), average = load<T>(begin.num + c, width - c) / den;
        average = den == zero ? zero : average;
        grad.first = grad.num * average + grad.den;
        averages[c / kLanes<T>] = average;
        stateless[c / kLanes<T>] =
            holds<T>((den == zero) & (grad.num == zero) & (grad.den == zero) & (grad.top == zero));
        plain[c / kLanes<T>] = Parameters<T>(log_w + c, u + c, width - c).plain();
        gathered[c / kLanes<T>] = grad;
    }
    Recomputed<T> tile[kEvery];
    for (int64_t start = (span.count - 1) / kEvery * kEvery; start >= 0 && span.count; start -= kEvery) {
        const int64_t length = std::min(kEvery, span.count - start), ahead = start ? -kEvery * C : 0;
        for (int64_t c = 0; c < width; c += kLanes<T>) {
            Sums<T> sums = load_sums<T>(slot_of(kept, start / kEvery, C), c, width - c);
            const Parameters<T> of(log_w + c, u + c, width - c);
            Gathered<T> grad = gathered[c / kLanes<T>];
            const Vec<T> average = averages[c / kLanes<T>];
            auto walk = [&](auto is_plain, auto has_states) {
                for (int64_t t = 0; t < length; ++t) {
                    const int64_t at = (span.begin + start + t) * C + c;
                    __builtin_prefetch(k + at + ahead, 0, 2);
                    __builtin_prefetch(v + at + ahead, 0, 2);
                    __builtin_prefetch(grad_y + at + ahead, 0, 2);
                    Recomputed<T>& kept_token = tile[t];
                    kept_token.num = sums.num;
                    kept_token.den = sums.den;
                    const Vec<T> key = load<T>(k + at, width - c), value = load<T>(v + at, width - c);
                    const Token<T> token = advance<is_plain, T>(key, value, of, sums);
                    kept_token.y = token.y;
                    kept_token.fade = token.fade;
                    kept_token.gain = token.gain;
                    kept_token.pull = load<T>(grad_y + at, width - c) * token.inverse;
                    if constexpr (!is_plain) {
                        kept_token.from_state = token.from_state;
                        kept_token.from_key = token.from_key;
                    }
                    if constexpr (has_states) kept_token.lead = token.lead;
                }
                for (int64_t t = length - 1; t >= 0; --t) {
                    const int64_t at = (span.begin + start + t) * C + c;
                    __builtin_prefetch(grad_k + at + ahead, 1, 2);
                    __builtin_prefetch(grad_v + at + ahead, 1, 2);
                    const Recomputed<T>& token = tile[t];
                    const Vec<T> value = load<T>(v + at, width - c), y = token.y, fade = token.fade, gain = token.gain;
                    Vec<T> pull, rest;  // to this token's value, and to the sums before it
                    if constexpr (is_plain) {
                        pull = gain * of.own * token.pull;
                        rest = fade * token.pull;
                    } else {
                        pull = token.from_key * token.pull;
                        rest = token.from_state * token.pull;
                    }
                    Vec<T> bonus_grad = pull * (value - y);
                    Vec<T> d_key = bonus_grad + gain * (value * grad.num + grad.den);
                    grad.log_w += fade * (token.num * grad.num + token.den * grad.den);
                    if constexpr (has_states) {
                        // The maximum was this key, or what the key before left of it; a tie is shared, as torch.maximum
                        // shares it.
                        Vec<T> fresh = token.lead > zero ? one : token.lead < zero ? zero : half;
                        Vec<T> taken = fresh * grad.top;
                        d_key += taken;
                        grad.top -= taken;
                        grad.log_w += grad.top;
                        grad.first = rest * (average - y) + fade * grad.first;
                    }
                    store<T>(grad_k + at, d_key, width - c);
                    store<T>(grad_v + at, pull + gain * grad.num, width - c);
                    grad.u += bonus_grad;
                    grad.num = rest + fade * grad.num;
                    grad.den = fade * grad.den - rest * y;
                }
            };
            auto choose = [&](auto is_plain) {
                stateless[c / kLanes<T>] ? walk(is_plain, std::false_type{}) : walk(is_plain, std::true_type{});
            };
            plain[c / kLanes<T>] ? choose(std::true_type{}) : choose(std::false_type{});
            gathered[c / kLanes<T>] = grad;
        }
    }
    for (int64_t c = 0; c < width; c += kLanes<T>) {
        Gathered<T> grad = gathered[c / kLanes<T>];
        if (span.count) grad.top += load<T>(begin.den + c, width - c) * grad.first;
        store<T>(grad_begin.num + c, grad.num, width - c);
        store<T>(grad_begin.den + c, grad.den, width - c);
        store<T>(grad_begin.top + c, grad.top, width - c);
        store<T>(grad_log_w + c, grad.log_w, width - c);
        store<T>(grad_u + c, grad.u, width - c);
    }
}

template <class IO, class T>
void backward(
    const IO* k, const IO* v, const T* log_w, const T* u, const Span* spans, int64_t n, int64_t C, const T* num,
    const T* den, const T* num_end, const T* den_end, const T* kept, const IO* grad_y, const T* grad_num_end,
    const T* grad_den_end, const T* grad_top_end, IO* grad_k, IO* grad_v, T* grad_log_w, T* grad_u, T* grad_num,
    T* grad_den, T* grad_top, int64_t threads) {
    const int64_t step = block_width(C, n, threads, kLanes<T>, kWidth), blocks = (C + step - 1) / step;
#pragma omp parallel for schedule(static) num_threads(int(threads)) if (threads > 1)
    for (int64_t task = 0; task < n * blocks; ++task) {
        Gathered<T> gathered[kWidth / kLanes<T>];
        Vec<T> averages[kWidth / kLanes<T>];
        const int64_t i = task / blocks, c = task % blocks * step, width = std::min(step, C - c), at = i * C + c;
        backward_block<IO, T>(
            k + c, v + c, grad_y + c, grad_k + c, grad_v + c, log_w + c, u + c, grad_log_w + at, grad_u + at, spans[i],
            C, width, gathered, averages, kept + first_slot(spans, i, kEvery) * 3 * C + c,
            {num + at, den + at, nullptr}, {num_end + at, den_end + at, nullptr},
            {grad_num_end + at, grad_den_end + at, grad_top_end + at}, {grad_num + at, grad_den + at, grad_top + at});
    }
}

}  // namespace

// Sequences: (n, 2) begin and count. States (n, C). Kept states, or null: (tokens / 32 + n, 3, C).
STATEWISE_EXPORT int wkv4_forward(
    int64_t dtype, const void* k, const void* v, const void* log_w, const void* u, const void* spans, int64_t n,
    int64_t C, const void* num, const void* den, const void* top, void* y, void* num_end, void* den_end, void* top_end,
    void* kept, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        forward<IO, T>(
            (const IO*)k, (const IO*)v, (const T*)log_w, (const T*)u, (const Span*)spans, n, C, (const T*)num,
            (const T*)den, (const T*)top, (IO*)y, (T*)num_end, (T*)den_end, (T*)top_end, (T*)kept, threads);
        return true;
    });
}

// Gradients of log_w and u come a row a sequence, (n, C): who sums them decides the order.
STATEWISE_EXPORT int wkv4_backward(
    int64_t dtype, const void* k, const void* v, const void* log_w, const void* u, const void* spans, int64_t n,
    int64_t C, const void* num, const void* den, const void* /*top*/, const void* num_end, const void* den_end,
    const void* /*top_end*/, const void* kept, const void* grad_y, const void* grad_num_end,
    const void* grad_den_end, const void* grad_top_end, void* grad_k,
    void* grad_v, void* grad_log_w, void* grad_u, void* grad_num, void* grad_den, void* grad_top, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        backward<IO, T>(
            (const IO*)k, (const IO*)v, (const T*)log_w, (const T*)u, (const Span*)spans, n, C, (const T*)num,
            (const T*)den, (const T*)num_end, (const T*)den_end, (const T*)kept, (const IO*)grad_y,
            (const T*)grad_num_end, (const T*)grad_den_end, (const T*)grad_top_end, (IO*)grad_k, (IO*)grad_v,
            (T*)grad_log_w, (T*)grad_u, (T*)grad_num, (T*)grad_den, (T*)grad_top, threads);
        return true;
    });
}
