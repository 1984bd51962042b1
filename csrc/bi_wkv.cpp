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
// kept a token. Backward does the same with the cotangents: with D_t the denominator, p_t = g_t/D_t and -p_t y_t are
// summed from both sides in the way values and ones are, and so is every term times the steps it has faded:
//
//     dv_i = sum_t e_ti p_t          dk_i = sum_t e_ti p_t (v_i - y_t)          dw = sum_it n_ti e_ti p_t (v_i - y_t)
//
// with e_ti = e^{n_ti w + k_i}, n_ti = |t-i|-1; for t = i it is e^{u + k_i}, and n is 0. Since sum_i e_ti (v_i - y_t) is 0,
// steps may be counted from any number, one for each t: from those of its largest term, so that this, of which only
// rounding is left where it outweighs the others, is not multiplied by how far away it is.

#include "rows.h"
#include "simd.h"

namespace {

constexpr int64_t kChunk = 1024;  // tokens whose sums are kept: 384 KiB in backward, which the second cache holds
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
    STATEWISE_INLINE Weights<T> take(Vec<T> a, Vec<T> b, Vec<T> k, Vec<T> n, Vec<T> w) {
        Vec<T> faded = steps + T(1);
        Weights<T> weigh((k - key) + (n - faded) * w);
        num = num * weigh.a + a * weigh.b;
        den = den * weigh.a + b * weigh.b;
        key = weigh.a_leads ? key : k;
        steps = weigh.a_leads ? faded : n;
        return weigh;
    }
};

// Sums of cotangents; `late` are of each term times how many more steps it has faded than the largest has.
template <class T>
struct Pulls {
    Sum<T> sum;
    Vec<T> late_num, late_den;

    static constexpr int64_t fields = Sum<T>::fields + 2;
    static Pulls nothing() { return {Sum<T>::nothing(), Vec<T>{}, Vec<T>{}}; }

    STATEWISE_INLINE void keep(T* to, int64_t stride) const {
        sum.keep(to, stride);
        store<T>(to + 4 * stride, late_num);
        store<T>(to + 5 * stride, late_den);
    }
    STATEWISE_INLINE static Pulls kept(const T* from, int64_t stride) {
        return {Sum<T>::kept(from, stride), load<T>(from + 4 * stride), load<T>(from + 5 * stride)};
    }

    STATEWISE_INLINE void take(Vec<T> a, Vec<T> b, Vec<T> k, Vec<T> n, Vec<T> w) {
        const Vec<T> later = n - (sum.steps + T(1)), zero = {}, old_num = sum.num, old_den = sum.den;
        const Weights<T> weigh = sum.take(a, b, k, n, w);
        const Vec<T> of_old = weigh.a_leads ? zero : later, of_new = weigh.a_leads ? later : zero;
        late_num = (late_num - of_old * old_num) * weigh.a + of_new * (a * weigh.b);
        late_den = (late_den - of_old * old_den) * weigh.a + of_new * (b * weigh.b);
    }
};

template <class IO, class T>
struct Inputs {
    const IO *k, *v;
    const T *log_w, *u;
    int64_t C;
};

// A number of steps below 65,536.
struct Count {
    uint16_t n;
};

template <class T>
STATEWISE_INLINE Vec<T> load(const Count* p) {
    typedef uint16_t V __attribute__((vector_size(2 * kLanes<T>)));
    V x;
    std::memcpy(&x, p, sizeof x);
    return __builtin_convertvector(__builtin_convertvector(x, Int<T>), Vec<T>);
}

template <class T>
STATEWISE_INLINE void store(Count* p, Vec<T> x) {
    typedef uint16_t V __attribute__((vector_size(2 * kLanes<T>)));
    V y = __builtin_convertvector(__builtin_convertvector(x, Int<T>), V);
    std::memcpy(p, &y, sizeof y);
}

// What forward tells backward of a token, each (tokens, C): one over the denominator relative to the largest exponent, and
// that exponent as a pair, whose steps are Counts where sequences are short enough. The average is y, or kept, too, where y
// is of another dtype.
template <class IO, class T, class S>
struct Kept {
    T *inverse, *key, *average;
    S* steps;
    static constexpr bool own_average = !std::is_same<IO, T>::value;

    Kept(void* kept, void* steps_at, const void* y, int64_t plane)
        : inverse((T*)kept), key((T*)kept + plane), average(own_average ? (T*)kept + 2 * plane : (T*)y),
          steps((S*)steps_at) {}

    template <int for_writing>
    STATEWISE_INLINE void prefetch(int64_t row) const {
        __builtin_prefetch(inverse + row, for_writing, 2);
        __builtin_prefetch(key + row, for_writing, 2);
        __builtin_prefetch(steps + row, for_writing, 2);
        if (own_average || !for_writing) __builtin_prefetch(average + row, for_writing, 2);
    }
};

template <class T>
STATEWISE_INLINE Vec<T> bounded(const T* log_w, int64_t left) {
    return at_least<T>(load<T>(log_w, left), splat<T>(T(-1e30)));  // 0 steps of -inf are 0
}

// `kept` may be null.
template <class IO, class T, class S>
void forward_block(
    const Inputs<IO, T>& in, Span span, int64_t c0, int64_t width, IO* y, const Kept<IO, T, S>* kept, T* edges,
    T* inside) {
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
                if (kept) kept->template prefetch<1>(next);
                Vec<T> k = load<T>(in.k + row, left), v = load<T>(in.v + row, left), bonus = u + k;
                right = Sum<T>::kept(inside + (t - start) * fields * lanes, lanes);
                const Weights<T> sides((right.key - sum.key) + (right.steps - sum.steps) * w);
                Vec<T> key = sides.a_leads ? sum.key : right.key, steps = sides.a_leads ? sum.steps : right.steps;
                const Weights<T> all((bonus - key) - steps * w);
                key = all.a_leads ? key : bonus;
                steps = all.a_leads ? steps : zero;
                Vec<T> num = (sides.a * sum.num + sides.b * right.num) * all.a + all.b * v;
                Vec<T> den = (sides.a * sum.den + sides.b * right.den) * all.a + all.b;
                const Vec<T> inverse = reciprocal<T>(den);
                const Vec<T> average = quotient<T>(num, den, inverse);
                store<T>(y + row, average, left);
                if (kept) {
                    if (kept->own_average) store<T>(kept->average + row, average, left);
                    store<T>(kept->inverse + row, inverse, left);
                    store<T>(kept->key + row, key, left);
                    store<T>(kept->steps + row, steps, left);
                }
                sum.take(v, one, k, zero, w);
            }
        }
    }
}

// About e^x, x at most 0: the bits of a float taken for a number grow like its logarithm.
STATEWISE_INLINE Vec<float> rough_exp(Vec<float> x) {
    constexpr float unit = float(1 << Float<float>::exponent_bits);
    Vec<float> bits = at_least<float>(x * (kLog2E<float> * unit) + Float<float>::bias * unit, Vec<float>{});
    return bits_of<Vec<float>>(__builtin_convertvector(bits, Int<float>));
}

STATEWISE_INLINE Vec<double> rough_exp(Vec<double> x) { return exp<double>(x); }

// About the row's average with no decay. Averages move with their values, so values may be told relative to any number.
// Relative to this one the gradients of k, w and u stay what they are, and where one token outweighs all others do not
// drown in terms that cancel.
template <class IO, class T>
STATEWISE_INLINE Vec<T> rough_average(const Inputs<IO, T>& in, Span span, int64_t c, int64_t left) {
    constexpr int64_t group = 8;
    Vec<T> num = {}, den = {}, top = splat<T>(kNothing<T>);
    for (int64_t start = 0; start < span.count; start += group) {
        const int64_t end = std::min(span.count, start + group);
        const Vec<T> before = top;
        for (int64_t t = start; t < end; ++t) {
            const int64_t row = (span.begin + t) * in.C + c;
            const int64_t next = (span.begin + std::min(t + kAhead, span.count - 1)) * in.C + c;
            __builtin_prefetch(in.v + next, 0, 2);
            __builtin_prefetch(in.k + next, 0, 2);
            top = at_least<T>(load<T>(in.k + row, left), top);
        }
        const Vec<T> fade = rough_exp(before - top);
        num *= fade;
        den *= fade;
        for (int64_t t = start; t < end; ++t) {
            const int64_t row = (span.begin + t) * in.C + c;
            const Vec<T> weight = rough_exp(load<T>(in.k + row, left) - top);
            num += weight * load<T>(in.v + row, left);
            den += weight;
        }
    }
    return span.count ? num / den : Vec<T>{};
}

template <class IO, class T, class S>
void backward_block(
    const Inputs<IO, T>& in, Span span, int64_t c0, int64_t width, Kept<IO, T, S> kept, const IO* grad_y, IO* grad_k,
    IO* grad_v, T* grad_w, T* grad_u, T* edges, T* inside) {
    constexpr int64_t lanes = kLanes<T>, fields = Pulls<T>::fields;
    const int64_t chunks = (span.count + kChunk - 1) / kChunk;
    const Vec<T> zero = {};
    for (int64_t i = 0; i < width; i += lanes) {
        const int64_t c = c0 + i, left = width - i;
        const Vec<T> w = bounded<T>(in.log_w + c, left), u = load<T>(in.u + c, left);
        const Vec<T> center = rough_average(in, span, c, left);
        auto take = [&](Pulls<T>& side, int64_t t) {
            const int64_t row = (span.begin + t) * in.C + c;
            Vec<T> y = load<T>(kept.average + row, left) - center;
            Vec<T> pull = load<T>(grad_y + row, left) * load<T>(kept.inverse + row, left);
            side.take(pull, -pull * y, -load<T>(kept.key + row, left), -load<T>(kept.steps + row, left), w);
        };
        Pulls<T> right = Pulls<T>::nothing(), sum = Pulls<T>::nothing();
        for (int64_t chunk = chunks - 1; chunk >= 0; --chunk) {
            right.keep(edges + chunk * fields * lanes, lanes);
            for (int64_t t = std::min(span.count, (chunk + 1) * kChunk) - 1; t >= chunk * kChunk; --t) {
                if (!chunk) right.keep(inside + t * fields * lanes, lanes);
                const int64_t next = (span.begin + std::max<int64_t>(t - kAhead, 0)) * in.C + c;
                kept.template prefetch<0>(next);
                __builtin_prefetch(grad_y + next, 0, 2);
                take(right, t);
            }
        }
        Vec<T> total_w = {}, total_u = {};
        for (int64_t chunk = 0; chunk < chunks; ++chunk) {
            const int64_t start = chunk * kChunk, end = std::min(span.count, start + kChunk);
            Vec<T> part_w = {}, part_u = {};
            right = Pulls<T>::kept(edges + chunk * fields * lanes, lanes);
            for (int64_t t = end - 1; chunk && t >= start; --t) {
                right.keep(inside + (t - start) * fields * lanes, lanes);
                take(right, t);
            }
            for (int64_t t = start; t < end; ++t) {
                const int64_t row = (span.begin + t) * in.C + c;
                const int64_t next = (span.begin + std::min(t + kAhead, span.count - 1)) * in.C + c;
                __builtin_prefetch(grad_k + next, 1, 2);
                __builtin_prefetch(grad_v + next, 1, 2);
                right = Pulls<T>::kept(inside + (t - start) * fields * lanes, lanes);
                Vec<T> k = load<T>(in.k + row, left), v = load<T>(in.v + row, left) - center;
                Vec<T> y = load<T>(kept.average + row, left) - center;
                Vec<T> shared = load<T>(kept.inverse + row, left) * load<T>(grad_y + row, left);
                Vec<T> key = load<T>(kept.key + row, left), steps = load<T>(kept.steps + row, left);
                Vec<T> pull = exp<T>((u + k - key) - steps * w) * shared;
                Vec<T> bonus = pull * (v - y);
                Vec<T> earlier = exp<T>((k + sum.sum.key) + sum.sum.steps * w);
                Vec<T> later = exp<T>((k + right.sum.key) + right.sum.steps * w);
                Vec<T> to_num = earlier * sum.sum.num + later * right.sum.num;
                Vec<T> to_den = earlier * sum.sum.den + later * right.sum.den;
                Vec<T> late_num = earlier * (sum.late_num + sum.sum.steps * sum.sum.num) +
                                  later * (right.late_num + right.sum.steps * right.sum.num);
                Vec<T> late_den = earlier * (sum.late_den + sum.sum.steps * sum.sum.den) +
                                  later * (right.late_den + right.sum.steps * right.sum.den);
                store<T>(grad_v + row, pull + to_num, left);
                store<T>(grad_k + row, bonus + (v * to_num + to_den), left);
                part_u += bonus;
                part_w += (v * late_num + late_den) - steps * bonus;
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

// Calls kernel with a pointer of the type that steps are kept as.
template <class T, class Kernel>
void with_steps(int64_t narrow, Kernel kernel) {
    if (narrow) kernel((Count*)nullptr);
    else kernel((T*)nullptr);
}

}  // namespace

// log_w and u (C,). Kept, or null: (2, tokens, C), for bfloat16 (3, tokens, C); steps (tokens, C), 16 bits if `narrow`,
// which no sequence may be longer than 65,535 for.
STATEWISE_EXPORT int bi_wkv_forward(
    int64_t dtype, const void* k, const void* v, const void* log_w, const void* u, const void* spans, int64_t n,
    int64_t C, int64_t tokens, int64_t narrow, void* y, void* kept, void* steps, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        const Inputs<IO, T> in{(const IO*)k, (const IO*)v, (const T*)log_w, (const T*)u, C};
        const Span* span = (const Span*)spans;
        with_steps<T>(narrow, [&](auto* of) {
            using S = std::remove_pointer_t<decltype(of)>;
            const Kept<IO, T, S> to(kept, steps, y, tokens * C);
            for_blocks<T>(
                span, n, C, Sum<T>::fields, threads, [&](int64_t i, int64_t c, int64_t width, T* edges, T* inside) {
                    forward_block<IO, T, S>(in, span[i], c, width, (IO*)y, kept ? &to : nullptr, edges, inside);
                });
        });
        return true;
    });
}

// y may be null for bfloat16. Gradients of log_w and u come a row a sequence, (n, C).
STATEWISE_EXPORT int bi_wkv_backward(
    int64_t dtype, const void* k, const void* v, const void* log_w, const void* u, const void* spans, int64_t n,
    int64_t C, int64_t tokens, int64_t narrow, const void* y, void* kept, void* steps, const void* grad_y, void* grad_k,
    void* grad_v, void* grad_log_w, void* grad_u, int64_t threads) {
    return dispatch(dtype, [&](auto io, auto t) {
        using IO = decltype(io);
        using T = decltype(t);
        const Inputs<IO, T> in{(const IO*)k, (const IO*)v, (const T*)log_w, (const T*)u, C};
        const Span* span = (const Span*)spans;
        with_steps<T>(narrow, [&](auto* of) {
            using S = std::remove_pointer_t<decltype(of)>;
            const Kept<IO, T, S> from(kept, steps, y, tokens * C);
            for_blocks<T>(
                span, n, C, Pulls<T>::fields, threads, [&](int64_t i, int64_t c, int64_t width, T* edges, T* inside) {
                    backward_block<IO, T, S>(
                        in, span[i], c, width, from, (const IO*)grad_y, (IO*)grad_k, (IO*)grad_v,
                        (T*)grad_log_w + i * C, (T*)grad_u + i * C, edges, inside);
                });
        });
        return true;
    });
}
