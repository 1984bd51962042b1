// Bi-WKV over sequences of rows (tokens, C), channels in lanes: every token sees all others, from both sides.
//
//     y_t = (sum_{i!=t} e^{(|t-i|-1) w + k_i} v_i + e^{u+k_t} v_t) / (the same without v)        w = log_w, of any sign
//
// Sums of one side are num and den times e^K + n w, K being the key of its largest term and n how many steps it has
// faded: only differences of exponents are ever exponentiated, all of them at most zero, and kept as a pair they do not
// lose digits however far the decay (or, with w > 0, the growth) has carried them. Nothing is ever subtracted from a sum.
//
// One side is scanned from the end, remembering its sums at the edges of chunks and at every token of the first; then
// chunk after chunk is joined with the other side as that advances, the later ones scanned again from their end, sums
// kept a token. Backward does the same with twice as many sums: with D_t the denominator, g_t/D_t and -g_t y_t/D_t are
// summed from both sides in the way values and ones are, and meet in the gradients of k and v; sums of one side times
// cotangents' sums of the other give that of w.

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kChunk = 1024;  // tokens whose sums are kept: 512 KiB in backward, which the second cache holds
constexpr int64_t kAhead = 24;    // how many tokens on the rows are that are asked for meanwhile
constexpr int64_t kPart = 32;     // tokens whose gradients of w and u are added first: long sums lose fewer digits so
constexpr int64_t kWidth = 64;    // channels of a task

// Below every key.
template <class T>
constexpr T kNothing = T(std::is_same<T, float>::value ? -1e38 : -1e300);

template <class T>
struct Sum {
    Vec<T> num, den, key, steps;

    static constexpr int64_t fields = 4;
    static Sum nothing() { return {Vec<T>{}, Vec<T>{}, splat<T>(kNothing<T>), Vec<T>{}}; }

    STATEWISE_INLINE void keep(T* to, int64_t stride) const {
        store<T>(to, num);
        store<T>(to + stride, den);
        store<T>(to + 2 * stride, key);
        store<T>(to + 3 * stride, steps);
    }
    STATEWISE_INLINE static Sum kept(const T* from, int64_t stride) {
        return {load<T>(from), load<T>(from + stride), load<T>(from + 2 * stride), load<T>(from + 3 * stride)};
    }

    // Fade by one step, then take in (a, b) times e^{k + n w}.
    STATEWISE_INLINE void take(Vec<T> a, Vec<T> b, Vec<T> k, Vec<T> n, Vec<T> w) {
        Vec<T> faded = steps + T(1), gap = (key - k) + (faded - n) * w;
        Int<T> old_leads = gap >= T(0);
        Vec<T> lesser = exp<T>(old_leads ? -gap : gap), one = splat<T>(T(1));
        Vec<T> old = old_leads ? one : lesser, fresh = old_leads ? lesser : one;
        num = num * old + a * fresh;
        den = den * old + b * fresh;
        key = old_leads ? key : k;
        steps = old_leads ? faded : n;
    }
};

template <class IO, class T>
struct Inputs {
    const IO *k, *v;
    const T *log_w, *u;
    int64_t C;
};

// What forward tells backward of a token, as planes of (tokens, C): the average, one over the denominator relative to the
// largest exponent, and that exponent as a pair.
template <class T>
struct Kept {
    T* at;
    int64_t plane;
    STATEWISE_INLINE T* field(int64_t index, int64_t at_row) const { return at + index * plane + at_row; }
};

template <class T>
STATEWISE_INLINE Vec<T> bounded(const T* log_w, int64_t left) {
    return at_least<T>(load<T>(log_w, left), splat<T>(T(-1e30)));  // 0 steps of -inf are 0
}

template <class IO, class T>
void forward_block(
    const Inputs<IO, T>& in, Span span, int64_t c0, int64_t width, IO* y, Kept<T> kept, T* edges, T* inside) {
    constexpr int64_t lanes = kLanes<T>, fields = Sum<T>::fields;
    const int64_t chunks = (span.count + kChunk - 1) / kChunk;
    const Vec<T> one = splat<T>(T(1)), zero = {};
    for (int64_t i = 0; i < width; i += lanes) {
        const int64_t c = c0 + i, left = width - i;
        const Vec<T> w = bounded<T>(in.log_w + c, left), u = load<T>(in.u + c, left);
        auto from_right = [&](Sum<T>& right, int64_t t) {
            const int64_t row = (span.begin + t) * in.C + c;
            right.take(load<T>(in.v + row, left), one, load<T>(in.k + row, left), zero, w);
        };
        Sum<T> right = Sum<T>::nothing(), sum = Sum<T>::nothing();
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
            right.keep(edges + chunk * fields * lanes, lanes);
            for (int64_t t = std::min(span.count, (chunk + 1) * kChunk) - 1; t >= chunk * kChunk; --t) {
                const int64_t next = (span.begin + std::max<int64_t>(t - kAhead, 0)) * in.C + c;
                __builtin_prefetch(in.v + next, 0, 2);
                __builtin_prefetch(in.k + next, 0, 2);
                if (!chunk) right.keep(inside + t * fields * lanes, lanes);
                from_right(right, t);
            }
        }
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t start = chunk * kChunk, end = std::min(span.count, start + kChunk);
            right = Sum<T>::kept(edges + chunk * fields * lanes, lanes);
            for (int64_t t = end - 1; chunk && t >= start; --t) {
                right.keep(inside + (t - start) * fields * lanes, lanes);
                from_right(right, t);
            }
            for (int64_t t = start; t < end; ++t) {
                const int64_t row = (span.begin + t) * in.C + c;
                const int64_t next = (span.begin + std::min(t + kAhead, span.count - 1)) * in.C + c;
                __builtin_prefetch(y + next, 1, 2);
                for (int f = 0; kept.at && f < 4; ++f) __builtin_prefetch(kept.field(f, next), 1, 2);
                Vec<T> k = load<T>(in.k + row, left), v = load<T>(in.v + row, left), bonus = u + k;
                right = Sum<T>::kept(inside + (t - start) * fields * lanes, lanes);
                Int<T> sum_leads = (sum.key - right.key) + (sum.steps - right.steps) * w >= T(0);
                Vec<T> key = sum_leads ? sum.key : right.key, steps = sum_leads ? sum.steps : right.steps;
                Int<T> bonus_leads = (bonus - key) - steps * w >= T(0);
                key = bonus_leads ? bonus : key;
                steps = bonus_leads ? zero : steps;
                Vec<T> before = exp<T>((sum.key - key) + (sum.steps - steps) * w);
                Vec<T> after = exp<T>((right.key - key) + (right.steps - steps) * w);
                Vec<T> now = exp<T>((bonus - key) - steps * w);
                Vec<T> num = before * sum.num + after * right.num + now * v;
                Vec<T> den = before * sum.den + after * right.den + now;
                Vec<T> average = num / den;
                store<T>(y + row, average, left);
                if (kept.at) {
                    store<T>(kept.field(0, row), average, left);
                    store<T>(kept.field(1, row), T(1) / den, left);
                    store<T>(kept.field(2, row), key, left);
                    store<T>(kept.field(3, row), steps, left);
                }
                sum.take(v, one, k, zero, w);
            }
        }
    }
}

template <class IO, class T>
void backward_block(
    const Inputs<IO, T>& in, Span span, int64_t c0, int64_t width, Kept<T> kept, const IO* grad_y, IO* grad_k,
    IO* grad_v, T* grad_w, T* grad_u, T* edges, T* inside) {
    constexpr int64_t lanes = kLanes<T>, fields = 2 * Sum<T>::fields, half = Sum<T>::fields * lanes;
    const int64_t chunks = (span.count + kChunk - 1) / kChunk;
    const Vec<T> one = splat<T>(T(1)), zero = {};
    for (int64_t i = 0; i < width; i += lanes) {
        const int64_t c = c0 + i, left = width - i;
        const Vec<T> w = bounded<T>(in.log_w + c, left), u = load<T>(in.u + c, left);
        // Averages move with their values, so values may be told relative to any. Relative to the row's average with no
        // decay, the gradients of k, w and u stay what they are, and where one token outweighs all others do not drown
        // in terms that cancel.
        Sum<T> all = Sum<T>::nothing();
        for (int64_t t = 0; t < span.count; ++t) {
            const int64_t row = (span.begin + t) * in.C + c;
            const int64_t next = (span.begin + std::min(t + kAhead, span.count - 1)) * in.C + c;
            __builtin_prefetch(in.v + next, 0, 2);
            __builtin_prefetch(in.k + next, 0, 2);
            all.take(load<T>(in.v + row, left), one, load<T>(in.k + row, left), zero, zero);
        }
        const Vec<T> center = span.count ? all.num / all.den : zero;
        // Of the values on one side, and of the cotangents there.
        struct Side {
            Sum<T> values, pulls;
        };
        auto take = [&](Side& side, int64_t t) {
            const int64_t row = (span.begin + t) * in.C + c;
            side.values.take(load<T>(in.v + row, left) - center, one, load<T>(in.k + row, left), zero, w);
            Vec<T> y = load<T>(kept.field(0, row), left) - center;
            Vec<T> pull = load<T>(grad_y + row, left) * load<T>(kept.field(1, row), left);
            side.pulls.take(pull, -pull * y, -load<T>(kept.field(2, row), left), -load<T>(kept.field(3, row), left), w);
        };
        auto keep = [&](const Side& side, T* to) {
            side.values.keep(to, lanes);
            side.pulls.keep(to + half, lanes);
        };
        const Side nothing{Sum<T>::nothing(), Sum<T>::nothing()};
        Side right = nothing, sum = nothing;
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
            keep(right, edges + chunk * fields * lanes);
            for (int64_t t = std::min(span.count, (chunk + 1) * kChunk) - 1; t >= chunk * kChunk; --t) {
                if (!chunk) keep(right, inside + t * fields * lanes);
                const int64_t next = (span.begin + std::max<int64_t>(t - kAhead, 0)) * in.C + c;
                for (int f = 0; f < 4; ++f) __builtin_prefetch(kept.field(f, next), 0, 2);
                __builtin_prefetch(grad_y + next, 0, 2);
                take(right, t);
            }
        }
        Vec<T> total_w = {}, total_u = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t start = chunk * kChunk, end = std::min(span.count, start + kChunk);
            const T* edge = edges + chunk * fields * lanes;
            Vec<T> part_w = {}, part_u = {};
            right = {Sum<T>::kept(edge, lanes), Sum<T>::kept(edge + half, lanes)};
            for (int64_t t = end - 1; chunk && t >= start; --t) {
                keep(right, inside + (t - start) * fields * lanes);
                take(right, t);
            }
            for (int64_t t = start; t < end; ++t) {
                const int64_t row = (span.begin + t) * in.C + c;
                const int64_t next = (span.begin + std::min(t + kAhead, span.count - 1)) * in.C + c;
                __builtin_prefetch(grad_k + next, 1, 2);
                __builtin_prefetch(grad_v + next, 1, 2);
                const T* here = inside + (t - start) * fields * lanes;
                right = {Sum<T>::kept(here, lanes), Sum<T>::kept(here + half, lanes)};
                Vec<T> k = load<T>(in.k + row, left), v = load<T>(in.v + row, left) - center;
                Vec<T> y = load<T>(kept.field(0, row), left) - center;
                Vec<T> shared = load<T>(kept.field(1, row), left) * load<T>(grad_y + row, left);
                Vec<T> key = load<T>(kept.field(2, row), left), steps = load<T>(kept.field(3, row), left);
                Vec<T> pull = exp<T>((u + k - key) - steps * w) * shared;
                Vec<T> bonus = pull * (v - y);
                Vec<T> earlier = exp<T>((k + sum.pulls.key) + sum.pulls.steps * w);
                Vec<T> later = exp<T>((k + right.pulls.key) + right.pulls.steps * w);
                Vec<T> to_num = earlier * sum.pulls.num + later * right.pulls.num;
                Vec<T> to_den = earlier * sum.pulls.den + later * right.pulls.den;
                store<T>(grad_v + row, pull + to_num, left);
                store<T>(grad_k + row, bonus + (v * to_num + to_den), left);
                part_u += bonus;
                // A value on one side that a cotangent on the other meets fades once more in passing this token.
                auto passing = [&](const Sum<T>& values, const Sum<T>& pulls) {
                    Vec<T> size = exp<T>((values.key + pulls.key) + (values.steps + pulls.steps + T(1)) * w);
                    return size * (values.num * pulls.num + values.den * pulls.den);
                };
                part_w += passing(sum.values, right.pulls) + passing(right.values, sum.pulls);
                take(sum, t);
                if (t % kPart == kPart - 1 || t == end - 1) {
                    total_w += part_w;
                    total_u += part_u;
                    part_w = part_u = zero;
                }
            }
        }
        store<T>(grad_w + c, total_w, left);
        store<T>(grad_u + c, total_u, left);
    }
}

// Calls block(sequence, first channel, channels, room for edges, room inside a chunk) for all of them.
template <class T, class Block>
void for_blocks(const Span* spans, int64_t n, int64_t C, int64_t fields, int64_t threads, Block block) {
    const int64_t step = block_width(C, n, threads, kLanes<T>, kWidth), blocks = (C + step - 1) / step;
    int64_t longest = 0;
    for (int64_t i = 0; i < n; ++i) longest = std::max(longest, spans[i].count);
#pragma omp parallel num_threads(int(threads)) if (threads > 1)
    {
        Scratch<T> edges((longest + kChunk - 1) / kChunk * fields * kLanes<T>);
        Scratch<T> inside(std::min(longest, kChunk) * fields * kLanes<T>);
#pragma omp for schedule(static)
        for (int64_t task = 0; task < n * blocks; ++task) {
            const int64_t c = task % blocks * step;
            block(task / blocks, c, std::min(step, C - c), (T*)edges, (T*)inside);
        }
    }
}

}  // namespace

// log_w and u (C,). Kept, or null: (4, tokens, C).
STATEWISE_EXPORT int bi_wkv_forward(
    int64_t dtype, const void* k, const void* v, const void* log_w, const void* u, const void* spans, int64_t n,
    int64_t C, int64_t tokens, void* y, void* kept, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        const Inputs<IO, T> in{(const IO*)k, (const IO*)v, (const T*)log_w, (const T*)u, C};
        const Span* span = (const Span*)spans;
        for_blocks<T>(
            span, n, C, Sum<T>::fields, threads, [&](int64_t i, int64_t c, int64_t width, T* edges, T* inside) {
                forward_block<IO, T>(in, span[i], c, width, (IO*)y, {(T*)kept, tokens * C}, edges, inside);
            });
        return true;
    });
}

// Gradients of log_w and u come a row a sequence, (n, C).
STATEWISE_EXPORT int bi_wkv_backward(
    int64_t dtype, const void* k, const void* v, const void* log_w, const void* u, const void* spans, int64_t n,
    int64_t C, int64_t tokens, void* kept, const void* grad_y, void* grad_k, void* grad_v, void* grad_log_w,
    void* grad_u, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        const Inputs<IO, T> in{(const IO*)k, (const IO*)v, (const T*)log_w, (const T*)u, C};
        const Span* span = (const Span*)spans;
        for_blocks<T>(
            span, n, C, 2 * Sum<T>::fields, threads, [&](int64_t i, int64_t c, int64_t width, T* edges, T* inside) {
                backward_block<IO, T>(
                    in, span[i], c, width, {(T*)kept, tokens * C}, (const IO*)grad_y, (IO*)grad_k, (IO*)grad_v,
                    (T*)grad_log_w + i * C, (T*)grad_u + i * C, edges, inside);
            });
        return true;
    });
}
