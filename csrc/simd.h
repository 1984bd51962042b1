// Vectors of the width this build is compiled for, and the few functions of them that the kernels need.
//
// The kernels are compiled once per instruction set (see README.md); everything here has internal linkage, so that no
// two builds can share a symbol. GCC's and Clang's portable vector extensions,
// and one intrinsic that compilers do not find by themselves.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <new>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define STATEWISE_VECTOR_BYTES 64
#elif defined(__AVX2__)
#define STATEWISE_VECTOR_BYTES 32
#else
#define STATEWISE_VECTOR_BYTES 16
#endif

#define STATEWISE_INLINE inline __attribute__((always_inline))

namespace {

struct bf16 {
    uint16_t bits;
};

#if defined(__AVX512F__)
// The same where the processor rounds to it by one instruction: a kernel is compiled for either, since to choose at
// every store costs registers.
struct rounded_bf16 : bf16 {};
#endif

// A vector of T, the integers of the same size (also the masks), and how many there are.
template <class T>
struct Vectors;

template <>
struct Vectors<float> {
    typedef float V __attribute__((vector_size(STATEWISE_VECTOR_BYTES)));
    typedef int32_t I __attribute__((vector_size(STATEWISE_VECTOR_BYTES)));
    static constexpr int lanes = STATEWISE_VECTOR_BYTES / 4;
};

template <>
struct Vectors<double> {
    typedef double V __attribute__((vector_size(STATEWISE_VECTOR_BYTES)));
    typedef int64_t I __attribute__((vector_size(STATEWISE_VECTOR_BYTES)));
    static constexpr int lanes = STATEWISE_VECTOR_BYTES / 8;
};

template <class T>
using Vec = typename Vectors<T>::V;
template <class T>
using Int = typename Vectors<T>::I;
template <class T>
constexpr int kLanes = Vectors<T>::lanes;

constexpr int64_t round_up(int64_t n, int64_t step) { return (n + step - 1) / step * step; }

template <class T>
STATEWISE_INLINE Vec<T> splat(T x) {
    return Vec<T>{} + x;  // x + 0: exact, but for the sign of a zero
}

template <class To, class From>
STATEWISE_INLINE To bits_of(From x) {
    static_assert(sizeof(To) == sizeof(From), "same size");
    To y;
    std::memcpy(&y, &x, sizeof y);
    return y;
}

// ---- memory: rows may start anywhere, so every access is unaligned; the last vector of a row may be partial

template <class T>
STATEWISE_INLINE Vec<T> load(const T* p) {
    Vec<T> x;
    std::memcpy(&x, p, sizeof x);
    return x;
}

typedef uint16_t u16x __attribute__((vector_size(STATEWISE_VECTOR_BYTES / 2)));
typedef uint32_t u32x __attribute__((vector_size(STATEWISE_VECTOR_BYTES)));

template <class T>
STATEWISE_INLINE Vec<T> load(const bf16* p) {
    static_assert(std::is_same<T, float>::value, "bfloat16 is computed in float32");
    u16x half;
    std::memcpy(&half, p, sizeof half);
#if defined(__AVX512F__)  // one permutation into the upper halves, for which compilers take two instructions
    const __m512i at = _mm512_set_epi16(
        15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
    return bits_of<Vec<float>>(
        _mm512_maskz_permutexvar_epi16(0xaaaaaaaau, at, _mm512_castsi256_si512(bits_of<__m256i>(half))));
#else
    return bits_of<Vec<float>>(__builtin_convertvector(half, u32x) << 16);
#endif
}

template <class T>
STATEWISE_INLINE void store(T* p, Vec<T> x) {
    std::memcpy(p, &x, sizeof x);
}

// To the nearest, ties to even; a NaN stays one.
template <class T>
STATEWISE_INLINE void store(bf16* p, Vec<T> x) {
    u32x bits = bits_of<u32x>(x);
    u32x rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    Int<float> number = x == x;
    rounded = number ? rounded : u32x{} + 0x7fc0u;
    u16x half = __builtin_convertvector(rounded, u16x);
    std::memcpy(p, &half, sizeof half);
}

#if defined(__AVX512F__)
// One instruction instead of eight. What is below 1.2e-38 becomes zero.
template <class T>
STATEWISE_INLINE void store(rounded_bf16* p, Vec<T> x) {
    __m256i half;
    __asm__("vcvtneps2bf16 %1, %0" : "=v"(half) : "v"(__m512(x)));
    std::memcpy(p, &half, sizeof half);
}
#endif

// The same past the caches, which saves reading what is overwritten: for whole vectors of rows that start on a line of
// memory, are written from their first to their last, and are more than a cache holds. After `streamed` others may read.
template <class T, class IO>
STATEWISE_INLINE void stream(IO* p, Vec<T> x) {
    alignas(64) IO values[kLanes<T>];
    store<T>(values, x);
#if defined(__AVX512F__)
    if constexpr (sizeof values == 64) return _mm512_stream_si512((__m512i*)p, _mm512_load_si512(values));
#endif
#if defined(__AVX2__)
    if constexpr (sizeof values == 32) return _mm256_stream_si256((__m256i*)p, _mm256_load_si256((__m256i*)values));
    if constexpr (sizeof values == 16) return _mm_stream_si128((__m128i*)p, _mm_load_si128((__m128i*)values));
#endif
    std::memcpy(p, values, sizeof values);
}

inline void streamed() {
#if defined(__AVX2__)
    _mm_sfence();
#endif
}

// The first n lanes; the others read as zero and are not written.
template <class T, class E>
STATEWISE_INLINE Vec<T> load(const E* p, int64_t n) {
    if (__builtin_expect(n >= kLanes<T>, 1)) return load<T>(p);
    E whole[kLanes<T>] = {};
    for (int64_t i = 0; i < n; ++i) whole[i] = p[i];
    return load<T>(whole);
}

template <class T, class E>
STATEWISE_INLINE void store(E* p, Vec<T> x, int64_t n) {
    if (__builtin_expect(n >= kLanes<T>, 1)) return store<T>(p, x);
    E whole[kLanes<T>];
    store<T>(whole, x);
    for (int64_t i = 0; i < n; ++i) p[i] = whole[i];
}

// ---- arithmetic

// Where x is NaN, x: a NaN that came in goes out.
template <class T>
STATEWISE_INLINE Vec<T> at_least(Vec<T> x, Vec<T> least) {
#if defined(__AVX512F__)
    if constexpr (std::is_same<T, float>::value) return Vec<T>(_mm512_maskz_max_ps(-1, __m512(least), __m512(x)));
    if constexpr (std::is_same<T, double>::value) return Vec<T>(_mm512_maskz_max_pd(-1, __m512d(least), __m512d(x)));
#elif defined(__AVX2__)
    if constexpr (std::is_same<T, float>::value) return Vec<T>(_mm256_max_ps(__m256(least), __m256(x)));
    if constexpr (std::is_same<T, double>::value) return Vec<T>(_mm256_max_pd(__m256d(least), __m256d(x)));
#endif
    return x < least ? least : x;
}

template <class T>
STATEWISE_INLINE Vec<T> at_most(Vec<T> x, Vec<T> most) {
#if defined(__AVX512F__)
    if constexpr (std::is_same<T, float>::value) return Vec<T>(_mm512_maskz_min_ps(-1, __m512(most), __m512(x)));
    if constexpr (std::is_same<T, double>::value) return Vec<T>(_mm512_maskz_min_pd(-1, __m512d(most), __m512d(x)));
#elif defined(__AVX2__)
    if constexpr (std::is_same<T, float>::value) return Vec<T>(_mm256_min_ps(__m256(most), __m256(x)));
    if constexpr (std::is_same<T, double>::value) return Vec<T>(_mm256_min_pd(__m256d(most), __m256d(x)));
#endif
    return x > most ? most : x;
}

template <class T>
struct Float;

template <>
struct Float<float> {
    static constexpr float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves an integer in the low bits
    static constexpr int exponent_bits = 23;
    static constexpr int32_t bias = 127;
};

template <>
struct Float<double> {
    static constexpr double to_integer = 6755399441055744.0;
    static constexpr int exponent_bits = 52;
    static constexpr int64_t bias = 1023;
};

template <class T>
constexpr T kLog2E = T(1.4426950408889634074);
template <class T>
constexpr T kLn2 = T(0.69314718055994530942);

// To the nearest integer; |x| below 2^22.
template <class T>
STATEWISE_INLINE Vec<T> nearest(Vec<T> x) {
    return (x + Float<T>::to_integer) - Float<T>::to_integer;
}

// 2^n of an integer-valued n ≤ 127 (1023); 0 from -127 (-1023) down.
template <class T>
STATEWISE_INLINE Vec<T> power_of_two(Vec<T> n) {
    n = at_least<T>(n, splat<T>(T(-Float<T>::bias)));
    Int<T> whole = bits_of<Int<T>>(n + Float<T>::to_integer);  // the low bits hold n
    return bits_of<Vec<T>>((whole + Float<T>::bias) << Float<T>::exponent_bits);
}

// 2^f for |f| ≤ 1/2, as 1 + f·q(f), so that it is exact at 0: decays near one must not drift. q is a minimax fit of
// our own in float32 (relative error 2.0e-9), Taylor's series in float64 (4e-18).
STATEWISE_INLINE Vec<float> exp2_fraction(Vec<float> f) {
    Vec<float> q = f * 0.00015353360504377633f + 0.0013398875016719103f;
    q = q * f + 0.00961843691766262f;
    q = q * f + 0.055503323674201965f;
    q = q * f + 0.24022647738456726f;
    q = q * f + 0.6931471824645996f;
    return q * f + 1.0f;
}

STATEWISE_INLINE Vec<double> exp2_fraction(Vec<double> f) {
    Vec<double> x = f * kLn2<double>;
    Vec<double> q = x * (1.0 / 6227020800.0) + 1.0 / 479001600.0;
    q = q * x + 1.0 / 39916800.0;
    q = q * x + 1.0 / 3628800.0;
    q = q * x + 1.0 / 362880.0;
    q = q * x + 1.0 / 40320.0;
    q = q * x + 1.0 / 5040.0;
    q = q * x + 1.0 / 720.0;
    q = q * x + 1.0 / 120.0;
    q = q * x + 1.0 / 24.0;
    q = q * x + 1.0 / 6.0;
    q = q * x + 0.5;
    q = q * x + 1.0;
    return q * x + 1.0;
}

#if defined(__AVX512F__)
// With x = n/16 + r, 2^x is 2^{n/16} times a short polynomial of r, exact at 0. A register holds a table of 2^{j/16}, as
// bits less j where the shifted n has it too, so that one addition gives table and exponent.
STATEWISE_INLINE Vec<float> exp2_by_table(Vec<float> x) {
    const __m512i table = _mm512_setr_epi32(
        0x3f800000, 0x3f7daac3, 0x3f7b95c2, 0x3f79c3d3, 0x3f7837f0, 0x3f76f532, 0x3f75fed7, 0x3f75583f, 0x3f7504f3,
        0x3f7508a4, 0x3f75672a, 0x3f76248c, 0x3f7744fd, 0x3f78ccdf, 0x3f7ac0c7, 0x3f7d257d);
    const float to_sixteenths = 786432.0f;  // 1.5 * 2^19
    Vec<float> shifted = x + to_sixteenths, r = x - (shifted - to_sixteenths);
    __m512i n = bits_of<__m512i>(shifted);
    __m512i bits = _mm512_add_epi32(_mm512_maskz_permutexvar_epi32(-1, n, table), _mm512_maskz_slli_epi32(-1, n, 19));
    __m512 scale = bits_of<__m512>(bits);
    Vec<float> rest = ((r * 0.055505409836769104f + 0.24023355543613434f) * r + 0.6931471824645996f) * r;
    __mmask16 there = _mm512_cmp_ps_mask(__m512(x), _mm512_set1_ps(-126.0f), _CMP_NLT_UQ);
    return Vec<float>(_mm512_maskz_fmadd_ps(there, scale, __m512(rest), scale));
}
#endif

// 2^x for any x below 127.5 (1023.5). Exactly 0 below -126 (-1022), where normal numbers end: what is forgotten leaves no
// trace, in gradients neither.
template <class T>
STATEWISE_INLINE Vec<T> exp2(Vec<T> x) {
#if defined(__AVX512F__)
    if constexpr (std::is_same<T, float>::value) return exp2_by_table(x);
#endif
    const Vec<T> least = splat<T>(T(1 - Float<T>::bias));
    Int<T> gone = x < least;
    x = at_least<T>(x, least);
    Vec<T> whole = x + Float<T>::to_integer;
    Vec<T> fraction = x - (whole - Float<T>::to_integer);
    // An integer addition to the exponent, as multiplications are what these kernels are short of.
    Int<T> bits = bits_of<Int<T>>(exp2_fraction(fraction)) + (bits_of<Int<T>>(whole) << Float<T>::exponent_bits);
    return gone ? Vec<T>{} : bits_of<Vec<T>>(bits);
}

// Whether a mask holds in all lanes.
template <class T>
STATEWISE_INLINE bool holds(Int<T> mask) {
    bool all = true;
    for (int i = 0; i < kLanes<T>; ++i) all &= mask[i] != 0;
    return all;
}

template <class T>
STATEWISE_INLINE Vec<T> exp(Vec<T> x) {
    return exp2<T>(x * kLog2E<T>);
}

// About 1 / x, to 2^-14 or better, for x from 1e-37 to 1e37.
template <class T>
STATEWISE_INLINE Vec<T> estimate(Vec<T> x) {
#if defined(__AVX512F__)
    if constexpr (std::is_same<T, float>::value) return Vec<T>(_mm512_maskz_rcp14_ps(-1, __m512(x)));
#endif
    return T(1) / x;
}

// 1 / x for such x, to an ulp or two: an estimate and one of Newton's steps where division is slower.
template <class T>
STATEWISE_INLINE Vec<T> reciprocal(Vec<T> x) {
#if defined(__AVX512F__)
    if constexpr (std::is_same<T, float>::value) {
        const Vec<T> near = estimate<T>(x);
        return near * (T(2) - x * near);
    }
#endif
    return T(1) / x;
}

// x / y, given an estimate of 1 / y: what it was off by is put right.
template <class T>
STATEWISE_INLINE Vec<T> quotient(Vec<T> x, Vec<T> y, Vec<T> inverse) {
    const Vec<T> near = x * inverse;
    return near + (x - near * y) * inverse;
}

// Where it lies between 0 and 1 whatever x is; a NaN stays one.
template <class T>
STATEWISE_INLINE Vec<T> sigmoid(Vec<T> x) {
    return reciprocal<T>(T(1) + exp2<T>(at_most<T>(x * -kLog2E<T>, splat<T>(T(Float<T>::bias - 5)))));
}

// -|x|: the sign bit set.
template <class T>
STATEWISE_INLINE Vec<T> minus_magnitude(Vec<T> x) {
    return bits_of<Vec<T>>(bits_of<Int<T>>(x) | ((Int<T>{} + 1) << int(8 * sizeof(T) - 1)));
}

// ln(1 + e^x), and x itself above 20, as torch has it. With e = e^-|x|, ln(1 + e) is twice the area tangent of
// e / (2 + e), at most 1/3, whose series needs 7 terms (float64: 17) and keeps its digits where e is tiny.
template <class T>
STATEWISE_INLINE Vec<T> softplus(Vec<T> x) {
    constexpr int terms = std::is_same<T, float>::value ? 7 : 17;
    Vec<T> minus = minus_magnitude<T>(x), e = exp<T>(minus), f = e / (e + T(2)), square = f * f;
    Vec<T> series = splat<T>(T(1) / T(2 * terms + 1));
    for (int i = terms - 1; i >= 0; --i) series = series * square + T(1) / T(2 * i + 1);
    Vec<T> value = (x - minus) * T(0.5) + f * series * T(2);  // (x + |x|) / 2 = max(x, 0)
    return x > T(20) ? x : value;
}

// What a maximum leaves of two exponentials of which b is e^{gap} of a: what each weighs relative to the larger one.
template <class T>
struct Weights {
    Int<T> a_leads;
    Vec<T> a, b;
    STATEWISE_INLINE explicit Weights(Vec<T> gap) : a_leads(gap <= T(0)) {
        Vec<T> lesser = exp<T>(minus_magnitude<T>(gap)), one = splat<T>(T(1));
        a = a_leads ? one : lesser;
        b = a_leads ? lesser : one;
    }
};

// ---- lanes of two vectors, numbered one after the other

template <class T, int... From>
STATEWISE_INLINE Vec<T> lanes_of(Vec<T> x, Vec<T> y) {
#if defined(__clang__)
    return __builtin_shufflevector(x, y, From...);
#else
    return __builtin_shuffle(x, y, Int<T>{From...});
#endif
}

template <class T, int... At>
STATEWISE_INLINE Int<T> lane_index(std::integer_sequence<int, At...>) {
    return Int<T>{At...};
}

template <class T, int Step, int... At>
STATEWISE_INLINE Vec<T> swap_lanes(Vec<T> x, std::integer_sequence<int, At...>) {
    return lanes_of<T, (At ^ Step)...>(x, x);
}

// The halves, quarters, ... (Step lanes long) of two vectors that lie off the diagonal, exchanged.
template <class T, int Step, int... At>
STATEWISE_INLINE void exchange(Vec<T>& x, Vec<T>& y, std::integer_sequence<int, At...>) {
    constexpr int lanes = sizeof...(At);
    Vec<T> first = lanes_of<T, ((At & Step) ? lanes + (At ^ Step) : At)...>(x, y);
    y = lanes_of<T, ((At & Step) ? lanes + At : (At ^ Step))...>(x, y);
    x = first;
}

template <class T, int Step>
STATEWISE_INLINE Vec<T> fold(Vec<T> x) {
    if constexpr (Step == 0) return x;
    else return fold<T, Step / 2>(x + swap_lanes<T, Step>(x, std::make_integer_sequence<int, kLanes<T>>{}));
}

// The sums over the lanes of two vectors, by halves that add to each other: always in the same order.
template <class T>
STATEWISE_INLINE void sum2(Vec<T> x, Vec<T> y, T& sum_x, T& sum_y) {
    constexpr int half = kLanes<T> / 2;
    exchange<T, half>(x, y, std::make_integer_sequence<int, kLanes<T>>{});
    const Vec<T> both = fold<T, half / 2>(x + y);
    sum_x = both[0];
    sum_y = both[half];
}

// ---- squares of lanes × lanes

template <class T, int Step>
STATEWISE_INLINE void transpose_square(Vec<T>* x) {
    for (int i = 0; i < kLanes<T>; ++i)
        if (!(i & Step)) exchange<T, Step>(x[i], x[i + Step], std::make_integer_sequence<int, kLanes<T>>{});
    if constexpr (Step > 1) transpose_square<T, Step / 2>(x);
}

// Lane i is the sum over the lanes of x[i]; x is used up.
template <class T, int Step = kLanes<T> / 2>
STATEWISE_INLINE Vec<T> lane_sums(Vec<T>* x) {
    for (int i = 0; i < Step; ++i) {
        exchange<T, Step>(x[i], x[i + Step], std::make_integer_sequence<int, kLanes<T>>{});
        x[i] += x[i + Step];
    }
    if constexpr (Step > 1) return lane_sums<T, Step / 2>(x);
    else return x[0];
}

// A matrix (K, V) with its rows in lanes: number (i, c), times a factor, lies at i / lanes · block + c · column + i % lanes.
// Lanes past K are zero.
template <class T>
void into_lanes(const T* from, T* to, int64_t K, int64_t V, int64_t block, int64_t column, T factor = T(1)) {
    constexpr int64_t lanes = kLanes<T>;
    for (int64_t i = 0; i < K; i += lanes)
        for (int64_t c = 0; c < V; c += lanes) {
            Vec<T> x[lanes] = {};
            for (int64_t l = 0; l < lanes && i + l < K; ++l) x[l] = load<T>(from + (i + l) * V + c, V - c) * factor;
            transpose_square<T, lanes / 2>(x);
            for (int64_t l = 0; l < lanes && c + l < V; ++l) store<T>(to + i / lanes * block + (c + l) * column, x[l]);
        }
}

template <class T>
void out_of_lanes(const T* from, T* to, int64_t K, int64_t V, int64_t block, int64_t column) {
    constexpr int64_t lanes = kLanes<T>;
    for (int64_t i = 0; i < K; i += lanes)
        for (int64_t c = 0; c < V; c += lanes) {
            Vec<T> x[lanes] = {};
            for (int64_t l = 0; l < lanes && c + l < V; ++l) x[l] = load<T>(from + i / lanes * block + (c + l) * column);
            transpose_square<T, lanes / 2>(x);
            for (int64_t l = 0; l < lanes && i + l < K; ++l) store<T>(to + (i + l) * V + c, x[l], V - c);
        }
}

// ---- rows: activations as sums see them; the last vector is filled up with zeros (with ones)

template <class T, class IO>
STATEWISE_INLINE void widen(const IO* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(to + i, load<T>(from + i, count - i));
}

template <class T, class IO>
STATEWISE_INLINE void widen_exp(const IO* from, T* to, int64_t count) {
    for (int64_t i = 0; i < count; i += kLanes<T>) store<T>(to + i, exp<T>(load<T>(from + i, count - i)));
}

// ---- scratch: a thread's own memory, aligned and padded to whole vectors

template <class T>
class Scratch {
  public:
    explicit Scratch(int64_t count)
        : data_(static_cast<T*>(::operator new(size_t(round_up(count, 64)) * sizeof(T), std::align_val_t(64)))) {
        std::memset(static_cast<void*>(data_), 0, size_t(round_up(count, 64)) * sizeof(T));
    }
    ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    operator T*() { return data_; }
    operator const T*() const { return data_; }

  private:
    T* data_;
};

}  // namespace
