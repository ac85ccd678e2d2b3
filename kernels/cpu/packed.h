/* Rows of packed codes: a little-endian bit stream along each row (see packing.py). */

#pragma once

#include "vectors.h"

#define AHEAD (6 << 10) /* bytes of a row on their way while others are multiplied; may pass its end */

/* How rows of `size` codes divide into segments, one step each. A vector holds `parts` codes in each
   byte; activations lie part after part, vector after vector: a "panel". */
typedef struct {
    long size, segments, length; /* codes a row, steps a row, codes a segment */
    int bits, parts;             /* of a code, codes a byte of a vector */
    long row, panel;             /* bytes of a stored row, of a segment's panel */
} layout;

INLINE layout layout_of(long size, int bits, long group) {
    layout l = {.size = size, .bits = bits, .parts = 8 / bits};
    l.length = group && group < size ? group : size;
    l.segments = size ? parts_of(size, l.length) : 1;
    l.row = parts_of(size * bits, 8);
    l.panel = parts_of(l.length, WIDTH * l.parts) * WIDTH * l.parts;
    return l;
}

/* Bytes that are stored for a vector: three bits leave two bits of each of its bytes unused. */
#define STORED(bits) (WIDTH / 8 * (bits) * (8 / (bits)))

/* Six bits to a byte. */
INLINE u8s load_sixes(const void *from) {
#if WIDTH == 64 && defined(__AVX512VBMI__)
    uint8_t six[64]; /* every word of eight bytes starts with six of the row */
    for (int k = 0; k < 64; k++) six[k] = (uint8_t)(k / 8 * 6 + k % 8);
    __m512i row = _mm512_maskz_loadu_epi8(0xffffffffffff, from);
    return (u8s)_mm512_multishift_epi64_epi8(_mm512_set1_epi64(0x2a241e18120c0600),
                                             _mm512_permutexvar_epi8((__m512i)load(six), row));
#else
    u8s value;
#ifdef __AVX2__
    const __m256i words = _mm256_setr_epi8( /* twelve bits in every word of sixteen */
        0, 1, 1, 2, 3, 4, 4, 5, 6, 7, 7, 8, 9, 10, 10, 11, 4, 5, 5, 6, 7, 8, 8, 9, 10, 11, 11, 12,
        13, 14, 14, 15);
    for (int i = 0; i < WIDTH / 32; i++) {
        const uint8_t *row = (const uint8_t *)from + 24 * i;
        __m256i both = _mm256_loadu2_m128i((const void *)(row + 8), (const void *)row);
        __m256i twelve = _mm256_mullo_epi16(_mm256_shuffle_epi8(both, words),
                                            _mm256_set1_epi32(0x10010)); /* the upper ones */
        __m256i first = _mm256_and_si256(_mm256_srli_epi16(twelve, 4), _mm256_set1_epi16(0x3f));
        __m256i second = _mm256_and_si256(_mm256_srli_epi16(twelve, 2), _mm256_set1_epi16(0x3f00));
        __m256i found = _mm256_or_si256(first, second);
        memcpy((uint8_t *)&value + 32 * i, &found, 32);
    }
#else
    for (int i = 0; i < WIDTH / 8; i++) {
        uint64_t word = 0;
        memcpy(&word, (const uint8_t *)from + 6 * i, 6);
        for (int k = 0; k < 8; k++) value[8 * i + k] = word >> (6 * k) & 63;
    }
#endif
    return value;
#endif
}

INLINE u8s load_fields(const void *from, const int bits) {
    return bits == 3 ? load_sixes(from) : load(from);
}

/* The same where only some bytes are left. */
INLINE u8s load_last(const void *from, long bytes, const int bits) {
    u8s rest = {0};
    memcpy(&rest, from, bytes);
    return load_fields(&rest, bits);
}

/* Codes of one part of a vector. */
INLINE u8s part_of(u8s fields, const int bits, int part) {
    if (bits == 8) return fields;
    return (u8s)((u16s)fields >> (bits * part)) & (uint8_t)((1 << bits) - 1);
}

/* Codes of a segment, a byte each, in the order of a panel. */
INLINE void to_bytes_by(const uint8_t *from, long bytes, const int bits, uint8_t *to) {
    for (; bytes > 0; bytes -= STORED(bits), from += STORED(bits)) {
        __builtin_prefetch(from + AHEAD, 0, 2);
        u8s fields =
            bytes >= STORED(bits) ? load_fields(from, bits) : load_last(from, bytes, bits);
#pragma GCC unroll 8
        for (int part = 0; part < 8 / bits; part++, to += WIDTH) {
            u8s codes = part_of(fields, bits, part);
            memcpy(to, &codes, WIDTH);
        }
    }
}

INLINE void to_bytes(const uint8_t *from, long bytes, int bits, uint8_t *to) {
    switch (bits) {
    case 1: to_bytes_by(from, bytes, 1, to); break;
    case 2: to_bytes_by(from, bytes, 2, to); break;
    case 3: to_bytes_by(from, bytes, 3, to); break;
    case 4: to_bytes_by(from, bytes, 4, to); break;
    default: to_bytes_by(from, bytes, 8, to); break;
    }
}
