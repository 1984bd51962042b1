// WKV-4 over sequences of rows (tokens, C), channels in lanes, one exponential a token.
//
//     y_t = (num_t + e^{u + k_t - S_t} v_t) / (den_t + e^{u + k_t - S_t})        sums before token t, times e^{S_t}
//     sum_{t+1} = e^{log_w} sum_t + e^{k_t} v_t
//
// e^{k - S}, and with it e^{u + k - S} and e^{k - S - log_w}, is kept as a mantissa and an integer power of two: the
// constants e^u and e^{-log_w} are split so once, so the token's one exponential serves both, and rescaling a sum that a
// large key outgrows is an addition to its exponent. S falls by log_w a token (which is the forgetting) and is raised by
// whole powers of two, so den stays at or above about one half and nothing over- or underflows, whatever the keys.
//
// Backward recomputes a chunk from the state kept at its start, and walks back with the same scales: no further
// exponential, no division by a decay.

#include <limits>

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kEvery = 32;    // tokens between kept states
constexpr int64_t kWidth = 512;   // channels a task takes at most, forward
constexpr int64_t kChunkWidth = 128;  // ... and backward, where a chunk's factors should stay in the second cache
constexpr int64_t kFarBelow = 1 << 19;

// Per-channel constants: e^u = u_part · 2^u_whole, e^{-log_w} = w_part · 2^w_whole, w_rest = ln w_part.
template <class T>
struct Constants {
    Scratch<T> log_w, u_part, u_whole, w_part, w_whole, w_rest;
    explicit Constants(int64_t width) : log_w(width), u_part(width), u_whole(width), w_part(width), w_whole(width), w_rest(width) {}

    void fill(const T* log_w_in, const T* u_in, int64_t width) {
        for (int64_t c = 0; c < width; c += kLanes<T>) {
            Vec<T> w = load<T>(log_w_in + c, width - c), u = load<T>(u_in + c, width - c);
            store<T>(log_w + c, w);
            split(u, u_part + c, u_whole + c, nullptr);
            split(-w, w_part + c, w_whole + c, w_rest + c);
        }
    }

  private:
    static void split(Vec<T> x, T* part, T* whole, T* rest) {
        Vec<T> most = splat<T>(T(kFarBelow));
        Vec<T> scaled = at_most<T>(at_least<T>(x * kLog2E<T>, -most), most);
        Vec<T> n = nearest<T>(scaled), f = scaled - n;
        store<T>(part, exp2_fraction(f));
        store<T>(whole, n);
        if (rest) store<T>(rest, f * kLn2<T>);
    }
};

// One token of one vector of channels.
template <class T>
struct Token {
    Vec<T> y, from_state, from_key, total;  // y = (num·from_state + v·from_key) / total, total likewise of den
    Vec<T> fade, gain;                      // sum = sum·fade + v·gain
};

template <class T>
STATEWISE_INLINE Token<T> advance(
    Vec<T> k, Vec<T> v, Vec<T>& num, Vec<T>& den, Vec<T>& scale, Vec<T>& top, const Constants<T>& fixed, int64_t c) {
    const Vec<T> zero = {}, limit = splat<T>(T(2 * kFarBelow));
    Token<T> token;
    Vec<T> x = at_most<T>(at_least<T>((k - scale) * kLog2E<T>, -limit), limit);
    Vec<T> whole = nearest<T>(x), fraction = x - whole, part = exp2_fraction(fraction);

    Vec<T> bonus = whole + load<T>(fixed.u_whole + c), over = at_least<T>(bonus, zero);
    token.from_state = power_of_two<T>(-over);
    token.from_key = load<T>(fixed.u_part + c) * part * power_of_two<T>(bonus - over);
    token.total = den * token.from_state + token.from_key;
    token.y = (num * token.from_state + token.from_key * v) / token.total;

    Vec<T> lead = whole + load<T>(fixed.w_whole + c), raise = at_least<T>(lead, zero);
    token.fade = power_of_two<T>(-raise);
    token.gain = load<T>(fixed.w_part + c) * part * power_of_two<T>(lead - raise);
    num = num * token.fade + token.gain * v;
    den = den * token.fade + token.gain;
    Vec<T> log_w = load<T>(fixed.log_w + c);
    scale = raise > zero ? k - (fraction * kLn2<T> + load<T>(fixed.w_rest + c)) : scale + log_w;
    Vec<T> faded = top + log_w;
    top = faded > k ? faded : k;
    return token;
}

template <class T>
struct Sums {
    Scratch<T> num, den, scale, top;
    explicit Sums(int64_t width) : num(width), den(width), scale(width), top(width) {}
};

template <class T>
struct StatePointers {
    T *num, *den, *top;
};

template <class IO, class T>
void forward_block(
    const IO* k, const IO* v, IO* y, Span span, int64_t C, int64_t width, Constants<T>& fixed, Sums<T>& sums,
    StatePointers<const T> begin, StatePointers<T> end, T* kept) {
    if (span.count == 0) {
        std::copy(begin.num, begin.num + width, end.num);
        std::copy(begin.den, begin.den + width, end.den);
        std::copy(begin.top, begin.top + width, end.top);
        return;
    }
    const Vec<T> nothing = splat<T>(-std::numeric_limits<T>::infinity());
    for (int64_t c = 0; c < width; c += kLanes<T>) {
        store<T>(sums.num + c, load<T>(begin.num + c, width - c));
        store<T>(sums.den + c, load<T>(begin.den + c, width - c));
        Vec<T> top = load<T>(begin.top + c, width - c);
        store<T>(sums.top + c, top);
        // Sums of nothing get a scale that any first key outgrows.
        Vec<T> first = load<T>(k + span.begin * C + c, width - c) - T(kFarBelow);
        store<T>(sums.scale + c, top == nothing ? first : top);
    }
    for (int64_t t = 0; t < span.count; ++t) {
        if (kept && t % kEvery == 0) {
            T* slot = kept + t / kEvery * 4 * C;
            for (int64_t c = 0; c < width; c += kLanes<T>) {
                store<T>(slot + c, load<T>(sums.num + c), width - c);
                store<T>(slot + C + c, load<T>(sums.den + c), width - c);
                store<T>(slot + 2 * C + c, load<T>(sums.scale + c), width - c);
                store<T>(slot + 3 * C + c, load<T>(sums.top + c), width - c);
            }
        }
        const int64_t row = (span.begin + t) * C;
        for (int64_t c = 0; c < width; c += kLanes<T>) {
            Vec<T> num = load<T>(sums.num + c), den = load<T>(sums.den + c);
            Vec<T> scale = load<T>(sums.scale + c), top = load<T>(sums.top + c);
            Vec<T> key = load<T>(k + row + c, width - c), value = load<T>(v + row + c, width - c);
            Token<T> token = advance<T>(key, value, num, den, scale, top, fixed, c);
            store<T>(y + row + c, token.y, width - c);
            store<T>(sums.num + c, num);
            store<T>(sums.den + c, den);
            store<T>(sums.scale + c, scale);
            store<T>(sums.top + c, top);
        }
    }
    for (int64_t c = 0; c < width; c += kLanes<T>) {
        Vec<T> top = load<T>(sums.top + c), shift = exp<T>(load<T>(sums.scale + c) - top);
        store<T>(end.num + c, load<T>(sums.num + c) * shift, width - c);
        store<T>(end.den + c, load<T>(sums.den + c) * shift, width - c);
        store<T>(end.top + c, top, width - c);
    }
}

template <class IO, class T>
void forward(
    const IO* k, const IO* v, const T* log_w, const T* u, const Span* spans, int64_t n, int64_t C,
    const T* num, const T* den, const T* top, IO* y, T* num_end, T* den_end, T* top_end, T* kept, int64_t threads) {
    const int64_t step = block_width(C, n, threads, kLanes<T>, kWidth), blocks = (C + step - 1) / step;
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Constants<T> fixed(step);
        Sums<T> sums(step);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * blocks; ++task) {
            const int64_t i = task / blocks, c = task % blocks * step, width = std::min(step, C - c), at = i * C + c;
            fixed.fill(log_w + c, u + c, width);
            forward_block<IO, T>(
                k + c, v + c, y + c, spans[i], C, width, fixed, sums, {num + at, den + at, top + at},
                {num_end + at, den_end + at, top_end + at},
                kept ? kept + first_slot(spans, i, kEvery) * 4 * C + c : nullptr);
        }
    }
}

// The factors of a chunk's tokens, as forward computed them.
template <class T>
struct Chunk {
    Scratch<T> y, from_state, from_key, fade, gain, num, den, fresh;
    explicit Chunk(int64_t width)
        : y(kEvery * width), from_state(kEvery * width), from_key(kEvery * width), fade(kEvery * width),
          gain(kEvery * width), num(kEvery * width), den(kEvery * width), fresh(kEvery * width) {}
};

template <class IO, class T>
void backward_block(
    const IO* k, const IO* v, const IO* grad_y, IO* grad_k, IO* grad_v, T* grad_log_w, T* grad_u, Span span, int64_t C,
    int64_t width, Constants<T>& fixed, Chunk<T>& chunk, Sums<T>& grads, Sums<T>& totals, const T* kept,
    StatePointers<const T> begin, StatePointers<const T> end, StatePointers<const T> grad_end,
    StatePointers<T> grad_begin) {
    const int64_t stride = round_up(width, kLanes<T>);
    T *grad_num = grads.num, *grad_den = grads.den, *grad_top = grads.top;
    T *total_w = totals.num, *total_u = totals.den;
    // The first maximum weighs the first average against all tokens. Where either side outweighs the other, that
    // gradient is what is left of terms that cancel, so it is gathered from differences to the first average.
    T *first = totals.scale, *grad_first = grads.scale;
    const Vec<T> zero = {}, half = splat<T>(T(0.5)), one = splat<T>(T(1));
    for (int64_t c = 0; c < width; c += kLanes<T>) {
        Vec<T> d_num = load<T>(grad_end.num + c, width - c), d_den = load<T>(grad_end.den + c, width - c);
        Vec<T> d_top = load<T>(grad_end.top + c, width - c);
        if (span.count)  // the maximum is what the sums are told relative to
            d_top -= d_num * load<T>(end.num + c, width - c) + d_den * load<T>(end.den + c, width - c);
        store<T>(grad_num + c, d_num);
        store<T>(grad_den + c, d_den);
        store<T>(grad_top + c, d_top);
        store<T>(total_w + c, zero);
        store<T>(total_u + c, zero);
        Vec<T> den = load<T>(begin.den + c, width - c), average = load<T>(begin.num + c, width - c) / den;
        average = den == zero ? zero : average;
        store<T>(first + c, average);
        store<T>(grad_first + c, d_num * average + d_den);
    }
    const int64_t chunks = (span.count + kEvery - 1) / kEvery;
    for (int64_t index = chunks - 1; index >= 0; --index) {
        const int64_t start = index * kEvery, length = std::min(kEvery, span.count - start);
        const T* slot = kept + index * 4 * C;
        for (int64_t c = 0; c < width; c += kLanes<T>) {
            Vec<T> num = load<T>(slot + c, width - c), den = load<T>(slot + C + c, width - c);
            Vec<T> scale = load<T>(slot + 2 * C + c, width - c), top = load<T>(slot + 3 * C + c, width - c);
            Vec<T> log_w = load<T>(fixed.log_w + c);
            for (int64_t t = 0; t < length; ++t) {
                const int64_t row = (span.begin + start + t) * C + c, at = t * stride + c;
                Vec<T> key = load<T>(k + row, width - c), value = load<T>(v + row, width - c);
                store<T>(chunk.num + at, num);
                store<T>(chunk.den + at, den);
                Vec<T> faded = top + log_w;  // a tie is shared, as torch.maximum shares it
                store<T>(chunk.fresh + at, faded > key ? zero : faded < key ? one : half);
                Token<T> token = advance<T>(key, value, num, den, scale, top, fixed, c);
                Vec<T> inverse = T(1) / token.total;
                store<T>(chunk.y + at, token.y);
                store<T>(chunk.from_state + at, token.from_state * inverse);
                store<T>(chunk.from_key + at, token.from_key * inverse);
                store<T>(chunk.fade + at, token.fade);
                store<T>(chunk.gain + at, token.gain);
            }
            if (index == chunks - 1) {  // cotangents of the last sums, from their scale at the end to the running one
                Vec<T> shift = exp<T>(scale - top);
                store<T>(grad_num + c, load<T>(grad_num + c) * shift);
                store<T>(grad_den + c, load<T>(grad_den + c) * shift);
                store<T>(grad_first + c, load<T>(grad_first + c) * shift);
            }
        }
        for (int64_t t = length - 1; t >= 0; --t) {
            const int64_t row = (span.begin + start + t) * C;
            for (int64_t c = 0; c < width; c += kLanes<T>) {
                const int64_t at = t * stride + c;
                Vec<T> value = load<T>(v + row + c, width - c), g = load<T>(grad_y + row + c, width - c);
                Vec<T> d_num = load<T>(grad_num + c), d_den = load<T>(grad_den + c), d_top = load<T>(grad_top + c);
                Vec<T> y = load<T>(chunk.y + at), gain = load<T>(chunk.gain + at), fade = load<T>(chunk.fade + at);
                Vec<T> fresh = load<T>(chunk.fresh + at);
                Vec<T> pull = load<T>(chunk.from_key + at) * g;   // to this token's value
                Vec<T> rest = load<T>(chunk.from_state + at) * g;  // to the sums before it
                Vec<T> bonus = pull * (value - y);
                Vec<T> d_key = bonus + gain * (value * d_num + d_den);
                Vec<T> taken = fresh * d_top;  // the maximum was this key, or what the key before left of it
                store<T>(grad_k + row + c, d_key + taken, width - c);
                store<T>(grad_v + row + c, pull + gain * d_num, width - c);
                Vec<T> faded = fade * (load<T>(chunk.num + at) * d_num + load<T>(chunk.den + at) * d_den);
                store<T>(total_u + c, load<T>(total_u + c) + bonus);
                store<T>(total_w + c, load<T>(total_w + c) + faded + (d_top - taken));
                store<T>(grad_num + c, rest + fade * d_num);
                store<T>(grad_den + c, fade * d_den - rest * y);
                store<T>(grad_first + c, rest * (load<T>(first + c) - y) + fade * load<T>(grad_first + c));
                store<T>(grad_top + c, d_top - taken);
            }
        }
    }
    for (int64_t c = 0; c < width; c += kLanes<T>) {
        Vec<T> d_num = load<T>(grad_num + c), d_den = load<T>(grad_den + c), d_top = load<T>(grad_top + c);
        if (span.count) d_top += load<T>(begin.den + c, width - c) * load<T>(grad_first + c);
        store<T>(grad_begin.num + c, d_num, width - c);
        store<T>(grad_begin.den + c, d_den, width - c);
        store<T>(grad_begin.top + c, d_top, width - c);
        store<T>(grad_log_w + c, load<T>(total_w + c), width - c);
        store<T>(grad_u + c, load<T>(total_u + c), width - c);
    }
}

template <class IO, class T>
void backward(
    const IO* k, const IO* v, const T* log_w, const T* u, const Span* spans, int64_t n, int64_t C, const T* num,
    const T* den, const T* num_end, const T* den_end, const T* kept, const IO* grad_y, const T* grad_num_end,
    const T* grad_den_end, const T* grad_top_end, IO* grad_k, IO* grad_v, T* grad_log_w, T* grad_u, T* grad_num,
    T* grad_den, T* grad_top, int64_t threads) {
    const int64_t step = block_width(C, n, threads, kLanes<T>, kChunkWidth), blocks = (C + step - 1) / step;
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Constants<T> fixed(step);
        Chunk<T> chunk(step);
        Sums<T> grads(step), totals(step);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * blocks; ++task) {
            const int64_t i = task / blocks, c = task % blocks * step, width = std::min(step, C - c), at = i * C + c;
            fixed.fill(log_w + c, u + c, width);
            backward_block<IO, T>(
                k + c, v + c, grad_y + c, grad_k + c, grad_v + c, grad_log_w + at, grad_u + at, spans[i], C, width,
                fixed, chunk, grads, totals, kept + first_slot(spans, i, kEvery) * 4 * C + c,
                {num + at, den + at, nullptr}, {num_end + at, den_end + at, nullptr},
                {grad_num_end + at, grad_den_end + at, grad_top_end + at},
                {grad_num + at, grad_den + at, grad_top + at});
        }
    }
}

}  // namespace

// Sequences: (n, 2) begin and count. States (n, C). Kept states, or null: (tokens / 32 + n, 4, C).
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
