/* Products of signs, one bit each: the bits that differ, counted. */

#pragma once

#include "vectors.h"

/* Signs of codes as bits: 1 where not negative. */
static void sign_bits(const int8_t *codes, long size, uint8_t *to) {
    long k = 0;
    for (; k + 8 <= size; k += 8) {
        uint64_t word;
        memcpy(&word, codes + k, 8);
        to[k / 8] = (uint8_t)(((~word & 0x8080808080808080u) * 0x0002040810204081u) >> 56);
    }
    for (; k < size; k++) to[k / 8] |= (uint8_t)((codes[k] >= 0) << (k % 8));
}

/* Bits that differ among the first `size`. */
static long differing(const uint8_t *a, const uint8_t *b, long size) {
    long count = 0, bytes = size / 8, i = 0;
#if WIDTH == 64 && defined(__AVX512VPOPCNTDQ__)
    __m512i total = _mm512_setzero_si512();
    for (; i + WIDTH <= bytes; i += WIDTH)
        total = _mm512_add_epi64(total, _mm512_popcnt_epi64((__m512i)(load(a + i) ^ load(b + i))));
    count += _mm512_reduce_add_epi64(total);
#elif defined(__AVX2__)
    const __m256i ones = _mm256_setr_epi8( /* bits of a number below 16 */
        0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3,
        3, 4);
    const __m256i low = _mm256_set1_epi8(15), none = _mm256_setzero_si256();
    __m256i total = none;
    while (i + 32 <= bytes) {
        long stop = least(i + 31 * 32, bytes - 31); /* 31 * 8 fit into a byte */
        __m256i near = none;
        for (; i < stop; i += 32) {
            __m256i found = _mm256_xor_si256(_mm256_loadu_si256((const __m256i *)(a + i)),
                                             _mm256_loadu_si256((const __m256i *)(b + i)));
            __m256i first = _mm256_shuffle_epi8(ones, _mm256_and_si256(found, low));
            __m256i second =
                _mm256_shuffle_epi8(ones, _mm256_and_si256(_mm256_srli_epi16(found, 4), low));
            near = _mm256_add_epi8(near, _mm256_add_epi8(first, second));
        }
        total = _mm256_add_epi64(total, _mm256_sad_epu8(near, none));
    }
    for (int lane = 0; lane < 4; lane++) count += (long)((long long *)&total)[lane];
#endif
    for (; i + 8 <= bytes; i += 8) {
        uint64_t left, right;
        memcpy(&left, a + i, 8);
        memcpy(&right, b + i, 8);
        count += __builtin_popcountll(left ^ right);
    }
    for (; i < bytes; i++) count += __builtin_popcount(a[i] ^ b[i]);
    if (size % 8) count += __builtin_popcount((a[i] ^ b[i]) & ((1 << (size % 8)) - 1));
    return count;
}
