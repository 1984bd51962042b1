// Sequences lie one after another on a single time axis: sequence i is tokens begin .. begin + count. A padded batch is
// sequences with gaps between them, a packed row is sequences without; a kernel never sees what lies in a gap.
#pragma once

#include <algorithm>
#include <cstdint>

#include "simd.h"

namespace {

struct Span {
    int64_t begin, count;
};

// What the caller calls a dtype: that of the activations. Sums are float64 for the last, float32 for the others.
enum Dtype : int64_t { kFloat32 = 0, kBFloat16 = 1, kFloat64 = 2 };

// Calls kernel(activation, sum) with zeros of the two types. 0 if it ran, -1 for a dtype or a size it does not serve.
template <class Kernel>
int dispatch(int64_t dtype, Kernel kernel) {
    switch (dtype) {
        case kFloat32: return kernel(float{}, float{}) ? 0 : -1;
        case kBFloat16:
#if defined(__AVX512F__)
            if (__builtin_cpu_supports("avx512bf16")) return kernel(rounded_bf16{}, float{}) ? 0 : -1;
#endif
            return kernel(bf16{}, float{}) ? 0 : -1;
        case kFloat64: return kernel(double{}, double{}) ? 0 : -1;
    }
    return -1;
}

// Calls kernel with the smallest of 1, 2, 4, 8, 16, 64 and 256 vectors that holds `vectors`, as a constant; false beyond.
template <class Kernel>
bool with_vectors(int64_t vectors, Kernel kernel) {
    if (vectors <= 1) return kernel(std::integral_constant<int, 1>{}), true;
    if (vectors <= 2) return kernel(std::integral_constant<int, 2>{}), true;
    if (vectors <= 4) return kernel(std::integral_constant<int, 4>{}), true;
    if (vectors <= 8) return kernel(std::integral_constant<int, 8>{}), true;
    if (vectors <= 16) return kernel(std::integral_constant<int, 16>{}), true;
    if (vectors <= 64) return kernel(std::integral_constant<int, 64>{}), true;
    if (vectors <= 256) return kernel(std::integral_constant<int, 256>{}), true;
    return false;
}

// How many vectors of a matrix state's columns one task takes, 4, 2 or 1: as many as registers hold, unless lanes would
// stay empty or threads go without.
inline int64_t column_vectors(int64_t columns, int64_t matrices, int64_t threads, int64_t lanes) {
    int64_t vectors = 4;
    while (vectors > 1 && ((vectors / 2) * lanes >= columns ||
                           matrices * ((columns + vectors * lanes - 1) / (vectors * lanes)) < threads))
        vectors /= 2;
    return vectors;
}

// Where the states kept for backward of sequence i start, one every `every` tokens: in order, never overlapping, and
// known without adding up, since floor(begin / every) + i grows by at least the slots sequence i takes.
inline int64_t first_slot(const Span* spans, int64_t i, int64_t every) { return spans[i].begin / every + i; }

// How many channels one task takes: whole cache lines, enough tasks for all threads, and no more than `most`.
inline int64_t block_width(int64_t channels, int64_t rows, int64_t threads, int64_t lanes, int64_t most) {
    int64_t blocks = std::max<int64_t>(1, (2 * threads + rows - 1) / std::max<int64_t>(rows, 1));
    int64_t width = (channels + blocks - 1) / blocks;
    width = std::min(std::max(width, 4 * lanes), most);
    return (width + lanes - 1) / lanes * lanes;
}

// How far on the rows of the next tile of `every` tokens are, each of C values; 0 where there is none.
inline int64_t prefetch_step(int64_t start, int64_t count, int64_t every, int64_t C) {
    return start + every < count ? every * C : 0;
}

// Asks for `count` values to be brought into the second cache: rows of a head lie far apart, and no processor's
// prefetcher follows them.
template <class T>
STATEWISE_INLINE void ask_for(const T* row, int64_t count) {
    for (int64_t i = 0; i < count; i += 64 / int64_t(sizeof(T))) __builtin_prefetch(row + i, 0, 2);
}

}  // namespace

#define STATEWISE_EXPORT extern "C" __attribute__((visibility("default")))
