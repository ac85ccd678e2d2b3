/* Newer instructions that the kernels use, in plain C: code for them runs on any x86-64-v3.

   Included before the kernels; what they ask for is then defined. Semantics: Intel's intrinsics
   guide. */

#include <immintrin.h>
#include <stdint.h>
#include <string.h>

#if defined(EMULATE_AVXVNNI)
#define __AVXVNNI__ 1
#else
#define __AVX512VNNI__ 1
#define __AVX512BW__ 1
#define __AVX512DQ__ 1
#if !defined(EMULATE_CASCADELAKE)
#define __AVX512VBMI__ 1
#define __AVX512VPOPCNTDQ__ 1
#endif
#endif

typedef union {
    __m512i all;
    __m256i half[2];
    uint8_t u8[64];
    int8_t s8[64];
    int32_t s32[16];
    uint64_t u64[8];
    long long s64[8];
} lanes;

#define EMULATED static __attribute__((unused, noinline))

EMULATED __m512i emulated_dpbusd(__m512i sum, __m512i unsigned_bytes, __m512i signed_bytes) {
    lanes s = {sum}, u = {unsigned_bytes}, b = {signed_bytes};
    for (int i = 0; i < 64; i++) s.s32[i / 4] += (int)u.u8[i] * b.s8[i];
    return s.all;
}

EMULATED __m256i emulated_dpbusd_half(__m256i sum, __m256i unsigned_bytes, __m256i signed_bytes) {
    lanes s = {{0}}, u = {{0}}, b = {{0}};
    s.half[0] = sum, u.half[0] = unsigned_bytes, b.half[0] = signed_bytes;
    return ((lanes){emulated_dpbusd(s.all, u.all, b.all)}).half[0];
}

EMULATED __m512i emulated_maskz_loadu(uint64_t mask, const void *from) {
    lanes found = {{0}};
    for (int i = 0; i < 64; i++) /* what is masked out is not read */
        if (mask >> i & 1) found.u8[i] = ((const uint8_t *)from)[i];
    return found.all;
}

EMULATED __m512i emulated_permutexvar(__m512i places, __m512i from) {
    lanes p = {places}, f = {from}, found;
    for (int i = 0; i < 64; i++) found.u8[i] = f.u8[p.u8[i] & 63];
    return found.all;
}

EMULATED __m512i emulated_multishift(__m512i starts, __m512i from) {
    lanes s = {starts}, f = {from}, found;
    for (int i = 0; i < 64; i++) {
        int start = s.u8[i] & 63;
        uint64_t word = f.u64[i / 8];
        found.u8[i] = (uint8_t)(start ? word >> start | word << (64 - start) : word);
    }
    return found.all;
}

EMULATED __m512i emulated_set1(long long value) {
    lanes found;
    for (int i = 0; i < 8; i++) found.s64[i] = value;
    return found.all;
}

EMULATED __m512i emulated_popcnt(__m512i from) {
    lanes f = {from};
    for (int i = 0; i < 8; i++) f.u64[i] = (uint64_t)__builtin_popcountll(f.u64[i]);
    return f.all;
}

EMULATED long long emulated_reduce_add(__m512i from) {
    lanes f = {from};
    long long sum = 0;
    for (int i = 0; i < 8; i++) sum += f.s64[i];
    return sum;
}

#define _mm256_dpbusd_avx_epi32 emulated_dpbusd_half
#define _mm512_dpbusd_epi32 emulated_dpbusd
#define _mm512_maskz_loadu_epi8 emulated_maskz_loadu
#define _mm512_permutexvar_epi8 emulated_permutexvar
#define _mm512_multishift_epi64_epi8 emulated_multishift
#define _mm512_set1_epi64 emulated_set1
#define _mm512_setzero_si512() emulated_set1(0)
#define _mm512_add_epi64(a, b) ((a) + (b))
#define _mm512_popcnt_epi64 emulated_popcnt
#define _mm512_reduce_add_epi64 emulated_reduce_add
#define _mm512_castsi512_si256(a) (((lanes){a}).half[0])
#define _mm512_extracti64x4_epi64(a, i) (((lanes){a}).half[i])
