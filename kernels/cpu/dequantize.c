/* Packed weights as floats, for products of many tokens. */

#include "packed.h"

typedef int32_t s32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));

/* Levels of eight codes of eight bits. */
INLINE f32x8 levels_of(const uint8_t *codes) {
#ifdef __AVX2__
    __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)codes));
    return (f32x8)_mm256_cvtepi32_ps(wide) - 127.5f;
#else
    f32x8 found;
    for (int i = 0; i < 8; i++) found[i] = (float)codes[i] - 127.5f;
    return found;
#endif
}

/* Codes of one segment as floats. */
INLINE void unpack_by(
    const uint8_t *codes, long count, const int field, float middle, float unit, float *to
) {
    const u32x8 places = {0, field, 2 * field, 3 * field, 4 * field, 5 * field, 6 * field,
                          7 * field};
    const uint32_t mask = (1u << field) - 1;
    long k = 0;
    for (; k + 8 <= count; k += 8, codes += field) { /* eight codes take `field` bytes */
        uint32_t word = 0;
        memcpy(&word, codes, field);
        u32x8 one = (u32x8){word, word, word, word, word, word, word, word} >> places & mask;
        f32x8 found = (__builtin_convertvector((s32x8)one, f32x8) - middle) * unit;
        memcpy(to + k, &found, sizeof found);
    }
    for (int i = 0; k < count; k++, i += field)
        to[k] = ((float)(codes[i / 8] >> (i % 8) & mask) - middle) * unit;
}

static void unpack(
    const uint8_t *codes, long count, int field, float middle, float unit, float *to
) {
    switch (field) {
    case 1: unpack_by(codes, count, 1, middle, unit, to); return;
    case 2: unpack_by(codes, count, 2, middle, unit, to); return;
    case 4: unpack_by(codes, count, 4, middle, unit, to); return;
    default: break;
    }
    long k = 0;
    for (; k + 8 <= count; k += 8) {
        f32x8 found = levels_of(codes + k) * unit;
        memcpy(to + k, &found, sizeof found);
    }
    for (; k < count; k++) to[k] = ((float)codes[k] - middle) * unit;
}

/* Rows of weights as floats [rows, size]. */
API int resplice_dequantize(
    const uint8_t *codes, long rows, long size, int bits, const float *step, long group,
    float *to, int threads
) {
    layout l = layout_of(size, bits, group);
    const float middle = (float)((1 << bits) - 1) / 2;
    int failed = 0;
    (void)threads;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(| : failed)
    {
        uint8_t *scratch = bits == 3 ? malloc(parts_of(size, 2) + 1) : NULL;
        failed = bits == 3 && !scratch;
#pragma omp for schedule(static)
        for (long n = 0; n < rows; n++) {
            const uint8_t *row = codes + n * l.row;
            if (bits == 3) {
                if (!scratch) continue;
                expand(row, size, scratch);
                row = scratch;
            }
            for (long s = 0; s < l.segments; s++) {
                long from = s * l.length, count = least(l.length, size - from);
                unpack(row + from * l.field / 8, count, l.field, middle,
                       step[n * l.segments + s], to + n * size + from);
            }
        }
        free(scratch);
    }
    return failed ? NO_MEMORY : 0;
}
