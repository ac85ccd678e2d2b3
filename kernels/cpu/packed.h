/* Rows of packed codes: a little-endian bit stream along each row (see packing.py). */

#pragma once

#include "vectors.h"

/* How rows of `size` codes divide into segments, one step each. A vector of the stored bytes holds
   `parts` codes in each byte; activations lie part after part, vector after vector: a "panel". */
typedef struct {
    long size, segments, length; /* codes a row, steps a row, codes a segment */
    int bits, field, parts;      /* as stored, as multiplied (three bits become four), per byte */
    long row, bytes, panel;      /* bytes of a stored row, a segment, a segment's panel */
} layout;

INLINE layout layout_of(long size, int bits, long group) {
    layout l = {.size = size, .bits = bits, .field = bits == 3 ? 4 : bits};
    l.parts = 8 / l.field;
    l.length = group && group < size ? group : size;
    l.segments = size ? parts_of(size, l.length) : 1;
    l.row = parts_of(size * bits, 8);
    l.bytes = parts_of(l.length * l.field, 8);
    l.panel = parts_of(l.bytes, WIDTH) * WIDTH * l.parts;
    return l;
}

/* Three-bit codes to four-bit fields. */
static void expand(const uint8_t *from, long size, uint8_t *to) {
    long bytes = parts_of(3 * size, 8), i = 0, o = 0;
#if WIDTH == 64 && defined(__AVX512VBMI__)
    uint8_t three[64]; /* every word of eight bytes starts with three of the row */
    for (int k = 0; k < 64; k++) three[k] = (uint8_t)(k / 8 * 3 + k % 8);
    const __m512i words = (__m512i)load(three), starts = _mm512_set1_epi64(0x15120f0c09060300);
    const __m512i mask = _mm512_set1_epi8(7), join = _mm512_set1_epi16(0x1001);
    for (; i + 32 <= bytes; i += 24, o += 32) {
        __m512i row = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)(from + i)));
        __m512i codes = _mm512_and_si512(
            _mm512_multishift_epi64_epi8(starts, _mm512_permutexvar_epi8(words, row)), mask);
        _mm256_storeu_si256((__m256i *)(to + o),
                            _mm512_cvtepi16_epi8(_mm512_maddubs_epi16(codes, join)));
    }
#endif
    for (; i + 8 <= bytes; i += 6, o += 8) {
        uint64_t word, fields = 0;
        memcpy(&word, from + i, 8);
#ifdef __BMI2__
        fields = _pdep_u64(word, 0x7777777777777777u);
#else
        for (int j = 0; j < 16; j++) fields |= (word >> (3 * j) & 7) << (4 * j);
#endif
        memcpy(to + o, &fields, 8);
    }
    for (long k = 2 * o; k < size; k++) {
        long bit = 3 * k;
        int code = from[bit / 8] >> (bit % 8);
        if (bit % 8 > 5) code |= from[bit / 8 + 1] << (8 - bit % 8);
        if (k % 2 == 0) to[k / 2] = 0;
        to[k / 2] |= (uint8_t)((code & 7) << (k % 2 * 4));
    }
}

/* Codes of one part of a vector. */
INLINE u8s part_of(u8s fields, const int field, int part) {
    if (field == 8) return fields;
    return (u8s)((u16s)fields >> (field * part)) & (uint8_t)((1 << field) - 1);
}

/* Fields of a segment to codes of a byte each, in the order of a panel. */
INLINE void to_bytes_by(const uint8_t *from, long bytes, const int field, uint8_t *to) {
    for (long i = 0; i < bytes; i += WIDTH) {
        u8s fields = {0};
        if (i + WIDTH <= bytes) fields = load(from + i);
        else memcpy(&fields, from + i, bytes - i); /* do not read past the row */
#pragma GCC unroll 8
        for (int part = 0; part < 8 / field; part++, to += WIDTH) {
            u8s codes = part_of(fields, field, part);
            memcpy(to, &codes, WIDTH);
        }
    }
}

INLINE void to_bytes(const uint8_t *from, long bytes, int field, uint8_t *to) {
    switch (field) {
    case 1: to_bytes_by(from, bytes, 1, to); break;
    case 2: to_bytes_by(from, bytes, 2, to); break;
    case 4: to_bytes_by(from, bytes, 4, to); break;
    default: to_bytes_by(from, bytes, 8, to); break;
    }
}
