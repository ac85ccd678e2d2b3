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
    const uint8_t *codes, long count, const int bits, float middle, float unit, float *to
) {
    const u32x8 places = {0, bits, 2 * bits, 3 * bits, 4 * bits, 5 * bits, 6 * bits, 7 * bits};
    const uint32_t mask = (1u << bits) - 1;
    const int read = bits == 3 ? 4 : bits; /* one byte too many, which is not the row's last */
    long k = 0;
    for (; k + 8 * (read - bits + 1) <= count; k += 8, codes += bits) { /* in `bits` bytes */
        uint32_t word = 0;
        memcpy(&word, codes, read);
        u32x8 one = (u32x8){word, word, word, word, word, word, word, word} >> places & mask;
        f32x8 found = (__builtin_convertvector((s32x8)one, f32x8) - middle) * unit;
        memcpy(to + k, &found, sizeof found);
    }
    uint64_t last = 0;
    memcpy(&last, codes, parts_of((count - k) * bits, 8));
    for (; k < count; k++, last >>= bits) to[k] = ((float)(last & mask) - middle) * unit;
}

static void unpack(
    const uint8_t *codes, long count, int bits, float middle, float unit, float *to
) {
    switch (bits) {
    case 1: unpack_by(codes, count, 1, middle, unit, to); return;
    case 2: unpack_by(codes, count, 2, middle, unit, to); return;
    case 3: unpack_by(codes, count, 3, middle, unit, to); return;
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
API void resplice_dequantize(
    const uint8_t *codes, long rows, long size, int bits, const float *step, long group,
    float *to, int threads
) {
    layout l = layout_of(size, bits, group);
    const float middle = (float)((1 << bits) - 1) / 2;
    (void)threads;
#pragma omp parallel for num_threads(threads) if (threads > 1) schedule(static)
    for (long n = 0; n < rows; n++)
        for (long s = 0; s < l.segments; s++) {
            long from = s * l.length, count = least(l.length, size - from);
            unpack(codes + n * l.row + from * bits / 8, count, bits, middle,
                   step[n * l.segments + s], to + n * size + from);
        }
}
