/* Activations as integers, in the order in which packed codes meet them.

   Floats become fixed-point numbers relative to the largest of their row: of 16 bits where they
   were halves, else of 24, or 8 more where one value stands out; codes become odd numbers of
   half steps. Every number is split into signed bytes ("limbs"), and every limb of every token is a
   column; COLUMNS columns together are a panel. */

#pragma once

#include "packed.h"

/* Largest magnitude; infinite for a row that holds anything not finite. */
static float largest(const float *x, long size) {
    uint32_t most = 0;
    for (long k = 0; k < size; k++) {
        uint32_t bits;
        memcpy(&bits, x + k, 4);
        bits &= 0x7fffffffu;
        most = bits > most ? bits : most;
    }
    if (most >= 0x7f800000u) most = 0x7f800000u;
    float found;
    memcpy(&found, &most, 4);
    return found;
}

/* Limbs a row needs: one more than `fewest` where its largest value is over `bound` times its root
   mean square. */
static int limbs_for(const float *x, long size, float most, int fewest) {
    double power = 0, bound = fewest < 3 ? 8.0 : 16.0;
#pragma omp simd reduction(+ : power)
    for (long k = 0; k < size; k++) power += (double)x[k] * x[k];
    return fewest + ((double)most * most * (double)size > bound * bound * power);
}

/* Row to fixed point; the value of one unit. */
static double fix(const float *x, long size, float most, int limbs, int32_t *to) {
    double top = 127.0 * (limbs == 2 ? 257 : limbs == 3 ? 65793 : 16843009); /* in every byte */
    double inverse = most > 0 ? top / most : 0;
    for (long k = 0; k < size; k++) to[k] = (int32_t)rint(x[k] * inverse);
    return most > 0 ? most / top : 0;
}

/* Where a column of all panels starts, and the bytes from one of its vectors to the next. */
INLINE int8_t *column_at(int8_t *panels, const layout *l, long columns, long column, long *stride) {
    long group = column / COLUMNS, width = least(COLUMNS, columns - group * COLUMNS);
    *stride = width * WIDTH;
    return panels + group * COLUMNS * l->segments * l->panel + column % COLUMNS * WIDTH;
}

/* One limb of a row of integers; lower limbs carry into higher ones. */
static void limb_of(const int32_t *values, long size, int limb, int8_t *to) {
    for (long k = 0; k < size; k++)
        to[k] = (int8_t)((((uint32_t)values[k] + 0x80808080u) >> (8 * limb)) ^ 128);
}

/* A row of bytes into its column. */
INLINE void spread_by(
    const int8_t *values, const layout *l, const int parts, int8_t *to, long stride
) {
    for (long s = 0; s < l->segments; s++) {
        const int8_t *from = values + s * l->length;
        long count = least(l->length, l->size - s * l->length);
        for (long start = 0; start < l->panel; start += WIDTH * parts)
            for (int part = 0; part < parts; part++, to += stride) {
                const int8_t *first = from + start + part;
                if (start + WIDTH * parts <= count) {
                    for (int i = 0; i < WIDTH; i++) to[i] = first[i * parts];
                    continue;
                }
                for (int i = 0; i < WIDTH; i++)
                    to[i] = start + part + i * parts < count ? first[i * parts] : 0;
            }
    }
}

static void spread(
    const int8_t *values, const layout *l, int8_t *panels, long columns, long column
) {
    long stride;
    int8_t *to = column_at(panels, l, columns, column, &stride);
    switch (l->parts) {
    case 1: spread_by(values, l, 1, to, stride); break;
    case 2: spread_by(values, l, 2, to, stride); break;
    case 4: spread_by(values, l, 4, to, stride); break;
    default: spread_by(values, l, 8, to, stride); break;
    }
}

/* Sum of the integers of each segment. */
static void sum_segments(const int32_t *values, const layout *l, int64_t *sums) {
    for (long s = 0; s < l->segments; s++) {
        const int32_t *from = values + s * l->length;
        long count = least(l->length, l->size - s * l->length);
        int64_t sum = 0;
        for (long k = 0; k < count; k++) sum += from[k];
        sums[s] = sum;
    }
}

/* The same of 2a + 1. */
static void sum_odd(const int8_t *codes, const layout *l, int64_t *sums) {
    for (long s = 0; s < l->segments; s++) {
        const int8_t *from = codes + s * l->length;
        long count = least(l->length, l->size - s * l->length);
        int32_t sum = 0;
        for (long k = 0; k < count; k++) sum += from[k];
        sums[s] = 2L * sum + count;
    }
}
