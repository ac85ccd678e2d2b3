/* Vectors of bytes, and sums of products of codes (unsigned) and signed bytes.

   Three forms: one instruction where the processor has it (VNNI), two with AVX2, GCC's vector
   extensions elsewhere. Codes are "wide" where one takes more than four bits: then two products
   may leave 16 bits, which is where a form without VNNI sums neighbours. */

#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define API __attribute__((visibility("default")))
#define INLINE static inline __attribute__((always_inline))
#define NOT_FINITE 1
#define NO_MEMORY 2

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__)
#define WIDTH 64 /* bytes of a vector */
#define VNNI(sum, codes, bytes) \
    _mm512_dpbusd_epi32((__m512i)(sum), (__m512i)(codes), (__m512i)(bytes))
#else
#define WIDTH 32
#if defined(__AVXVNNI__)
#define VNNI(sum, codes, bytes) \
    _mm256_dpbusd_avx_epi32((__m256i)(sum), (__m256i)(codes), (__m256i)(bytes))
#elif defined(__AVX512VNNI__) && defined(__AVX512VL__)
#define VNNI(sum, codes, bytes) \
    _mm256_dpbusd_epi32((__m256i)(sum), (__m256i)(codes), (__m256i)(bytes))
#endif
#endif
#define ROWS 4    /* rows of weights, and */
#define COLUMNS 4 /* vectors of activations that meet them */

/* Whether registers hold the sums of all these rows; else half of them come at a time. */
#if WIDTH == 64
#define ALL_ROWS(count, ones) 1
#elif defined(__AVX2__)
#define ALL_ROWS(count, ones) ((count) == 1 && !(ones))
#else
#define ALL_ROWS(count, ones) 0
#endif

typedef uint8_t u8s __attribute__((vector_size(WIDTH)));
typedef uint16_t u16s __attribute__((vector_size(WIDTH)));
typedef int16_t s16s __attribute__((vector_size(WIDTH)));
typedef int32_t s32s __attribute__((vector_size(WIDTH)));

INLINE long least(long a, long b) { return a < b ? a : b; }
INLINE long parts_of(long count, long size) { return (count + size - 1) / size; }

INLINE u8s load(const void *from) {
    u8s value;
    memcpy(&value, from, WIDTH);
    return value;
}

#ifdef VNNI

/* Sums of products of codes up to top, to be widened after LONGEST_RUN additions. */
typedef s32s narrow_sum;
#define LONGEST_RUN(top) (1L << 40)

INLINE narrow_sum add_narrow(narrow_sum sum, u8s codes, u8s bytes) {
    return (narrow_sum)VNNI(sum, codes, bytes);
}

INLINE s32s add_wide(s32s sum, u8s codes, u8s bytes) { return (s32s)VNNI(sum, codes, bytes); }

INLINE s32s widened(narrow_sum sum) { return sum; }

#else

typedef s16s narrow_sum;
#define LONGEST_RUN(top) (128 / (top)) /* two products at once, of at least -128 * top each */

/* Neighbours summed; no two products leave 16 bits. */
INLINE s16s pairs(u8s codes, u8s bytes) {
#ifdef __AVX2__
    return (s16s)_mm256_maddubs_epi16((__m256i)codes, (__m256i)bytes);
#else
    s16s even = ((s16s)bytes << 8) >> 8, odd = (s16s)bytes >> 8;
    return (s16s)((u16s)codes & 255) * even + (s16s)((u16s)codes >> 8) * odd;
#endif
}

/* Neighbours summed, times a number. */
INLINE s32s times(s16s value, const int16_t number) {
#ifdef __AVX2__
    return (s32s)_mm256_madd_epi16((__m256i)value, _mm256_set1_epi16(number));
#else
    return ((((s32s)value << 16) >> 16) + ((s32s)value >> 16)) * number;
#endif
}

INLINE narrow_sum add_narrow(narrow_sum sum, u8s codes, u8s bytes) {
    return sum + pairs(codes, bytes);
}

INLINE s32s add_wide(s32s sum, u8s codes, u8s bytes) {
    u8s low = codes & 15, high = (u8s)((u16s)codes >> 4) & 15;
    return sum + times(pairs(low, bytes), 1) + times(pairs(high, bytes), 16);
}

INLINE s32s widened(narrow_sum sum) { return times(sum, 1); }

#endif

/* Sums of codes of all sizes: no product, and no run to watch. */
INLINE s32s add_codes(s32s sum, u8s codes) {
#if defined(VNNI)
    return (s32s)VNNI(sum, codes, (u8s){0} + 1);
#elif defined(__AVX2__)
    return sum + (s32s)_mm256_sad_epu8((__m256i)codes, _mm256_setzero_si256());
#else
    u16s both = ((u16s)codes & 255) + ((u16s)codes >> 8);
    return sum + times((s16s)both, 1);
#endif
}

/* Bits of a vector, counted by the units for integers: those for vectors are busy. */
INLINE int32_t bits_of(const void *from) {
    int32_t count = 0;
    for (int i = 0; i < WIDTH / 8; i++) {
        uint64_t word;
        memcpy(&word, (const uint8_t *)from + 8 * i, 8);
        count += __builtin_popcountll(word);
    }
    return count;
}

/* Keeps a value in its register. GCC would put all products first, and then has no room for their
   sums; and it would read activations once for every row, since instructions can. */
#ifdef __AVX512F__
#define SETTLE(value) __asm__("" : "+v"(value))
#elif WIDTH == 32 && defined(__AVX2__)
#define SETTLE(value) __asm__("" : "+x"(value))
#else
#define SETTLE(value)
#endif

/* Lanes of two or four sums summed. */
INLINE void sum_lanes(const s32s *sums, int32_t *to, const int rows) {
#ifdef __AVX2__
    __m256i half[4];
    for (int r = 0; r < rows; r++) {
#if WIDTH == 64
        half[r] = _mm256_add_epi32(_mm512_castsi512_si256((__m512i)sums[r]),
                                   _mm512_extracti64x4_epi64((__m512i)sums[r], 1));
#else
        half[r] = (__m256i)sums[r];
#endif
    }
    __m256i first = _mm256_hadd_epi32(half[0], half[1]);
    __m256i all = _mm256_hadd_epi32(first, rows == 4 ? _mm256_hadd_epi32(half[2], half[3]) : first);
    __m128i found = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    if (rows == 4) _mm_storeu_si128((__m128i *)to, found);
    else _mm_storel_epi64((__m128i *)to, found);
#else
    for (int r = 0; r < rows; r++) {
        to[r] = 0;
        for (int i = 0; i < WIDTH / 4; i++) to[r] += sums[r][i];
    }
#endif
}
